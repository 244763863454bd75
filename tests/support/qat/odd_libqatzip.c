/*
 * Libraries that are not the libqatzip they seem: what the plugin has to refuse by name, or
 * survive.  -DLAYOUT, -DBEHIND, -DMISSING, -DHANG, -DCRASH, -DLIE, -DNOTHING choose how.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int qzGetDefaultsDeflate(void *p) {
  static const int fields[] = {2, 1, 8, 3, 1, 65536, 65536, 1024, 32, 8, 0, 0, 0, 2};
  unsigned char *out = p;
  for (unsigned k = 0; k < sizeof fields / sizeof *fields; k++) {
    if (k == 2 || k == 4)
      out[4 * k] = (unsigned char)fields[k];
    else
      memcpy(out + 4 * k, &fields[k], 4);
  }
#ifdef LAYOUT
  memset(out + 20, 0, 4); /* hw_buff_sz */
#endif
#ifdef BEHIND
  memset(out + 56, 0, 4);
#endif
  return 0;
}

int qzInit(void *s, unsigned char b) {
  (void)s, (void)b;
#ifdef HANG
  sleep(1000);
#endif
#ifdef CRASH
  abort();
#endif
  return 0;
}
int qzSetupSessionDeflate(void *s, void *p) { return (void)s, (void)p, 0; }
int qzTeardownSession(void *s) { return (void)s, -2; }
#ifndef MISSING
int qzCompress(void *s, const void *in, unsigned *n, void *out, unsigned *m, unsigned last) {
  (void)s, (void)in, (void)n, (void)out, (void)last;
#ifdef LIE
  memset(out, 0, 100);
  *m = 100;
#endif
#ifdef NOTHING
  *m = 0;
#endif
  return (void)m, 0;
}
#endif
int qzDecompress(void *s, const void *in, unsigned *n, void *out, unsigned *m) {
  return (void)s, (void)in, (void)n, (void)out, (void)m, 0;
}
