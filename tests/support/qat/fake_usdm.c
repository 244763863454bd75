/*
 * A stand-in for libusdm.so.0: the real one's pinned memory, but not more than there is.
 * For tests only.  Needs the real library beside it as real-libusdm.so.0.
 *
 *   FAKE_QAT_PINNED=N     bytes of pinned memory for this process (default: no limit)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t taken;

static void *real(const char *name) {
  static void *handle;
  if (!handle) {
    Dl_info here;
    char path[4096];
    if (!dladdr((void *)real, &here)) abort();
    const char *slash = strrchr(here.dli_fname, '/');
    snprintf(path, sizeof path, "%.*sreal-libusdm.so.0", (int)(slash ? slash + 1 - here.dli_fname : 0), here.dli_fname);
    handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      fprintf(stderr, "fake_usdm: %s\n", dlerror());
      abort();
    }
  }
  return dlsym(handle, name);
}

void *qaeMemAllocNUMA(size_t size, int node, size_t alignment) {
  void *(*alloc)(size_t, int, size_t) = (void *(*)(size_t, int, size_t))real("qaeMemAllocNUMA");
  const char *limit = getenv("FAKE_QAT_PINNED");
  if (limit && __sync_add_and_fetch(&taken, size) > strtoull(limit, NULL, 10)) {
    __sync_sub_and_fetch(&taken, size);
    return NULL;
  }
  return alloc(size, node, alignment);
}

void qaeMemFreeNUMA(void **pointer) { ((void (*)(void **))real("qaeMemFreeNUMA"))(pointer); }

uint64_t qaeVirtToPhysNUMA(void *pointer) { return ((uint64_t(*)(void *))real("qaeVirtToPhysNUMA"))(pointer); }
