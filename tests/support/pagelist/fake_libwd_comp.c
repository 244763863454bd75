/*
 * A libwd_comp with a device, made of zlib: it takes the calls as UADK's headers document them,
 * and aborts where UADK would refuse or misread one.  FAKE_UADK, read at each call: "none" has no
 * device, "fail" has every job fail, "every:N" each N-th, "lie" has each say a byte too few.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int compress2(unsigned char *, unsigned long *, const unsigned char *, unsigned long, int);
int uncompress2(unsigned char *, unsigned long *, const unsigned char *, unsigned long *);

struct request {
    void *src;
    uint32_t src_len;
    void *dst;
    uint32_t dst_len;
    void *cb, *cb_param;
    int op_type, data_fmt;
    uint32_t last, status;
    void *priv;
};

struct scheduling {
    int numa_id;
    uint8_t type, mode;
    uint32_t begin, end, dev_id;
};

struct setup {
    int alg_type, comp_lv, win_sz, op_type;
    struct scheduling *sched_param;
    char mm_ops[56];
    int mm_type;
};

enum { ZLIB = 1, EEXIST_ = 17, ENODEV_ = 19, BAD_INPUT = 67, STREAM_END = 1 };

static int started;
static atomic_int sessions[2];

#define MUST(condition) do { if (!(condition)) abort(); } while (0)

static int told(const char *what)
{
    const char *how = getenv("FAKE_UADK");
    return how && !strcmp(how, what);
}

int wd_comp_init2_(char *alg, uint32_t sched_type, int task_type, void *ctx_params)
{
    MUST(!strcmp(alg, "zlib") && sched_type == 0 && task_type == 1 && !ctx_params);
    if (told("none"))
        return -ENODEV_;
    if (started)
        return -EEXIST_;
    started = 1;
    return 0;
}

uintptr_t wd_comp_alloc_sess(struct setup *setup)
{
    static const char nothing[56];
    MUST(started && setup->alg_type == ZLIB && !setup->comp_lv && !setup->win_sz && !setup->mm_type);
    MUST(!memcmp(setup->mm_ops, nothing, sizeof nothing));
    MUST(setup->op_type == setup->sched_param->type && setup->sched_param->numa_id == -1);
    sessions[setup->op_type]++;
    return (uintptr_t)&sessions[setup->op_type];
}

void wd_comp_free_sess(uintptr_t session)
{
    MUST(--*(atomic_int *)session >= 0);
}

int wd_do_comp_sync(uintptr_t session, struct request *req)
{
    unsigned long made = req->dst_len, used = req->src_len;
    MUST(session == (uintptr_t)&sessions[req->op_type] && *(atomic_int *)session > 0);
    MUST(!req->cb && !req->data_fmt && req->src_len > 2 && req->dst_len > 2);
    const char *how = getenv("FAKE_UADK");
    static atomic_int jobs;
    int number = ++jobs;
    if (told("fail") || (how && !strncmp(how, "every:", 6) && number % atoi(how + 6) == 0))
        return -5;
    if (req->op_type == 0) {
        MUST(compress2(req->dst, &made, req->src, used, 1) == 0);
        memcpy(req->dst, "\x78\x9c", 2);
    } else {
        unsigned char *copy = malloc(used); /* the driver skips the header unread */
        memcpy(copy, req->src, used);
        memcpy(copy, "\x78\x9c", 2);
        int failed = uncompress2(req->dst, &made, copy, &used);
        free(copy);
        if (failed) {
            req->status = BAD_INPUT;
            return 0;
        }
        req->status = STREAM_END;
    }
    req->src_len = used;
    req->dst_len = made - told("lie");
    return 0;
}
