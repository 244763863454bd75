/*
 * What multifd-qpl uses of libqpl, soname 1.  A job's memory is allocated by the size that libqpl
 * asks for; it begins with these fields, the same from 1.0 to 1.9, and those behind them keep what
 * qpl_init_job wrote.  hardware.py checks the layout on the library it loads.
 */

typedef struct {
    uint8_t *next_in_ptr;
    uint32_t available_in;
    uint32_t total_in;
    uint8_t *next_out_ptr;
    uint32_t available_out;
    uint32_t total_out;
    int op;
    uint32_t flags;
    uint32_t crc;
    uint32_t xor_checksum;
    uint32_t last_bit_offset;
    int level;
} qpl_job;

const char *qpl_get_library_version(void);
int qpl_get_job_size(int path, uint32_t *size);
int qpl_init_job(int path, qpl_job *job);
int qpl_submit_job(qpl_job *job);
int qpl_wait_job(qpl_job *job);
int qpl_fini_job(qpl_job *job);
