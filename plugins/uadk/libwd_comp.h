/*
 * What multifd-uadk uses of libwd_comp, soname 2.  wd_comp_sess_setup is that of 2.10, which has the
 * longest: earlier ones read its first five fields.  All that is not set here is zero, as in QEMU.
 */

typedef struct wd_comp_req {
    void *src;
    uint32_t src_len;
    void *dst;
    uint32_t dst_len;
    void *cb;
    void *cb_param;
    int op_type;
    int data_fmt;
    uint32_t last;
    uint32_t status;
    void *priv;
} wd_comp_req;

typedef struct {
    int numa_id;
    uint8_t type;
    uint8_t mode;
    uint32_t begin;
    uint32_t end;
    uint32_t dev_id;
} sched_params;

typedef struct {
    int alg_type;
    int comp_lv;
    int win_sz;
    int op_type;
    void *sched_param;
    struct {
        void *alloc;
        void *free;
        void *iova_map;
        void *iova_unmap;
        void *get_bufsize;
        void *usr;
        bool sva_mode;
    } mm_ops;
    int mm_type;
} wd_comp_sess_setup;

int wd_comp_init2_(char *alg, uint32_t sched_type, int task_type, void *ctx_params);
uintptr_t wd_comp_alloc_sess(wd_comp_sess_setup *setup);
void wd_comp_free_sess(uintptr_t session);
int wd_do_comp_sync(uintptr_t session, wd_comp_req *req);
