/*
 * A libqpl that has a device: the real library (its path is in REAL_LIBQPL) does each job in
 * software, but only when it is waited for, and its queue is full now and then.  FAKE_IAA, read at
 * each job: "fail" has every job fail, "every:N" each N-th,
 * "lie" has each say a byte too few; compiled with -DLAYOUT its jobs are another library's.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { HARDWARE = 1, SOFTWARE = 2, QUEUE = 5, BUSY = 5, FAILED = 334 };

static atomic_int waiting, jobs;

static void *real(const char *name)
{
    static void *library;
    if (!library && !(library = dlopen(getenv("REAL_LIBQPL"), RTLD_NOW | RTLD_LOCAL)))
        abort();
    return dlsym(library, name);
}

const char *qpl_get_library_version(void)
{
    return ((const char *(*)(void))real("qpl_get_library_version"))();
}

int qpl_get_job_size(int path, uint32_t *size)
{
    (void)path;
#ifdef LAYOUT
    return *size = 4096, 0;
#endif
    return ((int (*)(int, uint32_t *))real("qpl_get_job_size"))(SOFTWARE, size);
}

int qpl_init_job(int path, void *job)
{
    (void)path;
#ifdef LAYOUT
    return *(int *)job = 1, 0;
#endif
    return ((int (*)(int, void *))real("qpl_init_job"))(SOFTWARE, job);
}

int qpl_fini_job(void *job)
{
    return ((int (*)(void *))real("qpl_fini_job"))(job);
}

int qpl_submit_job(void *job)
{
    (void)job;
    if (atomic_fetch_add(&waiting, 1) < QUEUE)
        return 0;
    waiting--;
    return BUSY;
}

int qpl_wait_job(void *job)
{
    const char *how = getenv("FAKE_IAA");
    int every = how && !strncmp(how, "every:", 6) ? atoi(how + 6) : 0;
    int number = atomic_fetch_add(&jobs, 1);
    waiting--;
    if (how && (!strcmp(how, "fail") || (every && number % every == 0)))
        return FAILED;
    int status = ((int (*)(void *))real("qpl_submit_job"))(job);
    if (how && !strcmp(how, "lie"))
        --*(uint32_t *)((char *)job + 28); /* total_out */
    return status;
}
