/* device: the CUDA backend's state, shared by this room's C files.
 *
 * One stream carries everything in order: slot starts, uploads, steps. A step's arguments travel as one upload from
 * pinned memory (two of them, because two steps may be in flight) to one device buffer at the start of the step; its
 * results are written by the sampling kernel into pinned memory of the same parity, and an event tells when.
 *
 * Sizes of a step fall into buckets (struct bucket). The first step of a bucket is captured as it is issued, then
 * instantiated; later ones are replayed and the caller skips the ops. Steps that are looked into while they
 * run are issued without capture. The kernels read real sizes from the upload.
 *
 * All device memory comes from device_alloc before ready() returns; graphs, which the driver allocates at a
 * bucket's first step, are what GRAPH_RESERVE keeps free. One thread. Private to cuda/. */
#ifndef MOED_CUDA_DEVICE_H
#define MOED_CUDA_DEVICE_H

#include "cuda/cuda_backend.h"
#include "cuda/kernels.h"

enum {
    MAX_ALLOCATIONS = 16384,
    MAX_GRAPHS = 96,
    N_STARTS = 16,           /* slot starts on their way to the device */
    STAGING_BYTES = 8 << 20, /* of pinned and device memory, twice, for loading and looking inside */
    MAX_PARTIALS = 8192      /* attention pieces whose results may wait for their siblings */
};

struct weight {
    struct weight *next;
    int32_t n_experts, n_rows, n_cols;
    int32_t type;    /* enum panel_type; -1: not a matrix */
    float scale;     /* 2^e of its panels */
    uint8_t *panels; /* NULL for a vector, and where experts says */
    struct expert_panels *experts; /* device [n_experts]: some lie in `host`, page-locked. Else NULL */
    void *host;
    float *f32;      /* vectors, and F32 matrices (the router) */
};

struct buf {
    struct buf *next;
    int32_t n_rows, n_cols;
    enum buf_kind kind; /* BUF_EXACT f32, BUF_INNER f16 */
    void *p;
};

/* A bound for the sizes of a step, and with it the launches that serve it. */
struct bucket {
    int32_t n_tokens, n_seqs, n_rows; /* at most so many */
    int32_t n_group;                  /* tokens of all ranks that compute this step together; 0: alone */
    int32_t n_most;                   /* of each of them, where collectives must know it; else 0 */
    bool tiles;                       /* attention takes prefill tiles too */
};

struct graph {
    struct bucket bucket;
    cudaGraphExec_t exec;
};

enum step_mode { STEP_NONE, STEP_EAGER, STEP_CAPTURE, STEP_REPLAY };

struct flight { /* a step between begin and collect */
    cudaEvent_t begun, done;
    uint8_t *upload; /* pinned */
    int32_t n_rows, n_tokens;
    bool together;
};

struct start { /* a slot start between the call and its copies */
    cudaEvent_t copied;
    struct slot_state *state; /* pinned */
    int32_t *ids;             /* pinned [max_seq_tokens] */
};

enum { READS_EXPERTS, READS_HOST_BYTES, N_READS }; /* expert reads, and bytes of them from host memory */

enum memory_kind { MEMORY_WEIGHTS, MEMORY_KV, MEMORY_ACTIVATIONS, MEMORY_STEP, MEMORY_SAMPLER, N_MEMORY };

struct cuda_exchange; /* cuda/exchange.h */

struct cuda {
    const struct backend_ops *ops; /* first: struct backend */
    struct model_shape shape;
    struct moe_limits limits;
    int device;
    char name[96];
    size_t total_bytes, budget_bytes; /* of the device */
    uint64_t used[N_MEMORY];
    struct cuda_queue queue;
    bool lost, ready;
    cudaError_t lost_by;
    int32_t offload_experts;     /* as configured */
    const uint64_t *expert_load; /* until plan returns */
    bool *far;                   /* [L][E] experts that stay in host memory; NULL: none */
    uint64_t host_bytes;         /* of them */
    uint64_t *load;              /* device [L][E], tokens since open; NULL: not counted */

    void **allocations;
    int n_allocations;
    struct weight *weights;
    struct buf *bufs;

    /* Loading, and looking inside. */
    uint8_t *staging[2]; /* pinned */
    uint8_t *device_staging[2];
    cudaEvent_t staged[2];
    uint32_t *d_max;

    /* Keys and values: [L][n_blocks][G]{K, V}[B][128] f16. */
    uint8_t *kv;
    size_t kv_layer_bytes;
    int32_t block_shift;

    /* Scratch between kernels. */
    void *x;             /* f16 [max(T, R)][widest] normalised inputs */
    float *rope_table;   /* [max_seq_tokens][64]{cos, sin} */
    float *attn_partials;
    int32_t n_partials;
    uint32_t *attn_tickets;
    float *router_partials;
    struct route_lists lists;
    uint32_t widths; /* of the lists that the last routing has */
    bool lists_read; /* a product has waited for them since; whoever writes them sets it to false */
    uint64_t n_ops; /* so far; */
    /* in which of them the experts' first product counted, how many blocks of an item, and in the list of which width */
    uint64_t counting_op;
    int32_t counted, counted_width; /* counted: 0: it did not, or other kernels came after it */
    uint32_t *route_tickets;
    uint8_t *route_marks;
    uint64_t *n_reads;      /* device [N_READS] */
    uint64_t *host_reads;   /* pinned [2][N_READS]: n_reads after a step */

    /* Sampling. */
    struct slot_state *slots; /* [max_seqs] */
    uint32_t *counts;         /* [max_seqs][V] */
    struct sample_part *sample_parts;
    uint32_t *sample_tickets;
    int32_t *start_ids;       /* [max_seq_tokens] */
    struct start starts[N_STARTS];
    uint32_t n_starts;
    struct moe_row *results; /* pinned [2][max_rows] */

    /* Steps. */
    uint8_t *upload; /* device */
    size_t upload_cap;
    struct flight flights[MOE_MAX_IN_FLIGHT];
    uint64_t n_begun, n_collected;
    enum step_mode mode;
    struct bucket bucket; /* of the step at hand, or of the last one */
    int32_t n_tokens;     /* of the same */
    struct step_view view;
    struct graph graphs[MAX_GRAPHS];
    int n_graphs;
    struct cuda_exchange *exchange; /* NULL: no group */
    bool together; /* this step's experts are computed by the group */
    uint32_t n_exchanged; /* layers of such steps; the same on every rank */
    struct norm_args pending; /* y != NULL: products of experts_down that the next norm will add */
    struct rope_args rope; /* rope_pending: what attention will do on its way */
    bool rope_pending;
    struct moe_counters counters;
};

static inline struct cuda *of(struct backend *b) { return (struct cuda *)(void *)b; }
static inline const struct cuda *of_const(const struct backend *b) {
    return (const struct cuda *)(const void *)b;
}

/* device.c. Any CUDA error after opening means the device is lost. */
enum status device_check(struct cuda *c, cudaError_t e);
/* st; and if the device is lost, a sentence that says by what. */
enum status device_status(const struct cuda *c, enum status st, struct error *e);
/* Zeroed device memory within the budget, freed by close. ST_NO_MEMORY with what is missing, and for what. */
enum status device_alloc(struct cuda *c, enum memory_kind kind, const char *what, size_t n,
                         struct error *e, void **out);
/* What the budget still allows. */
size_t device_free_bytes(const struct cuda *c);

/* load.c */
/* What a tensor takes on the device: panels of one expert (or of the whole matrix), and what is not panels. */
struct weight_bytes {
    size_t expert, others;
};
enum status load_bytes(const struct weight_source *source, struct error *e, struct weight_bytes *out);
enum status load_weight(struct backend *b, const struct weight_source *source, struct error *e,
                        struct weight **out);

/* Bytes that device_alloc takes for n. */
size_t device_rounded(size_t n);
/* Blocks of the KV pool that there must be room for, and bytes of one. */
size_t device_least_blocks(const struct cuda *c);
size_t device_block_bytes(const struct cuda *c);

/* offload.c: whether the weights fit, and which experts stay in host memory if not. */
enum status offload_plan(struct backend *b, const struct weight_source *all, size_t n, struct error *e,
                         struct moe_offload *out);
enum status offload_load(struct backend *b, uint64_t *sum);

/* step.c. Once; also what a plan subtracts from what is free. */
enum status cuda_step_create(struct cuda *c, struct error *e);
void cuda_graphs_destroy(struct cuda *c); /* they may be running */
void cuda_step_destroy(struct cuda *c);
enum status step_slot_start(struct backend *b, const struct moe_slot_start *start);
enum status step_begin(struct backend *b, const struct moe_step *step, bool *issue);
enum status step_end(struct backend *b);
enum status step_collect(struct backend *b, struct moe_result *out);

/* upload.c: fill a flight's upload. Returns its bytes. */
size_t upload_capacity(const struct cuda *c);
size_t upload_fill(struct cuda *c, const struct moe_step *step, uint8_t *dst);
/* Bucket of a step, and where the upload's arrays lie in the device's buffer. */
struct bucket upload_bucket(const struct cuda *c, const struct moe_step *step);
struct step_view upload_view(const struct bucket *b, uint8_t *base);
int32_t upload_rows(const struct moe_step *step);
/* The size of a bucket for n things, at most `most`. */
int32_t upload_round_up(int32_t n, int32_t most);

/* ops.c */
enum status ops_embed(struct backend *b, const struct op_embed *op);
enum status ops_norm_linear(struct backend *b, const struct op_norm_linear *op);
enum status ops_rope_store(struct backend *b, const struct op_rope_store *op);
enum status ops_attention(struct backend *b, const struct op_attention *op);
enum status ops_linear_add(struct backend *b, const struct op_linear_add *op);
enum status ops_route(struct backend *b, const struct op_route *op);
enum status ops_experts_up(struct backend *b, const struct op_experts_up *op);
enum status ops_experts_down(struct backend *b, const struct op_experts_down *op);
enum status ops_head(struct backend *b, const struct op_head *op);
enum status ops_sample(struct backend *b, const struct op_sample *op);
/* Launch what an op put off. */
enum status ops_flush(struct cuda *c);

/* inspect.c */
enum status inspect_buf_read(struct backend *b, const struct buf *buf, int32_t row, int32_t n_rows,
                             float *dst);
enum status inspect_buf_write(struct backend *b, struct buf *buf, int32_t row, int32_t n_rows,
                              const float *src);
enum status inspect_route_read(struct backend *b, int32_t *ids, float *weights, int32_t *expert_first);
enum status inspect_route_write(struct backend *b, const int32_t *ids, const float *weights);
enum status inspect_kv_poison(struct backend *b, uint8_t byte);

#endif
