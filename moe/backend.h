/* backend: what an implementer of the model's arithmetic provides. One table of functions; the
 * forward pass (moe/forward.c) is the only caller besides tests.
 *
 * The shape of the thing:
 *   - A backend owns all model memory: repacked weights, paged keys and values, activations, and the
 *     per-slot sampling state. Callers hold opaque handles (struct weight, struct buf).
 *   - An activation is a `struct buf`: a matrix whose storage type is the backend's business (f32,
 *     f16, quantised). buf_read and buf_write convert to and from f32, so that any two backends can be
 *     compared op by op.
 *   - Each op takes one argument struct. Fusion stays inside a backend.
 *   - A step is: step_begin, the ops of one forward pass, step_end, and later step_collect. A
 *     backend may run ops at once (CPU) or record and launch them (CUDA, graphs): after the first step
 *     of a shape, step_begin may clear *issue, and then the ops are not called and step_end replays.
 *     At most two steps lie between step_end and step_collect, and steps take effect in order.
 *
 * Batch invariance: a row's result, bit for bit, may depend on that row's own sequence alone, never on
 * how many other rows the step has, their order, the slot, or how a prompt was cut into chunks.
 *
 * A weight may serve several ops: a tied output matrix is the embedding's table.
 *
 * Threads: one caller thread for everything; a backend may use threads of its own. No allocation
 * after ready(). Errors: programmer errors CHECK; a device that is lost returns ST_ENGINE_LOST from
 * every call from then on.
 *
 * Letters: T tokens in a step, S sequences in a step, R rows that reach the head, D model width,
 * H/G query/KV heads, E experts, K experts per token, F expert width, B tokens per KV block,
 * V vocabulary, L layers, Hd head width. */
#ifndef MOED_MOE_BACKEND_H
#define MOED_MOE_BACKEND_H

#include "moe/moe.h"
#include "proto/base.h"

struct backend; /* the implementer's struct starts with `const struct backend_ops *ops` */
struct weight;  /* one tensor in the backend's own layout */
struct buf;     /* one activation matrix */

/* GGUF's numbers (ggml_type). */
enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q8_0 = 8,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_BF16 = 30
};

/* moe/quant.h has block sizes, byte sizes and scalar dequantisation. */

struct backend_config {
    struct model_shape shape;
    struct moe_limits limits;
    int n_threads;       /* CPU threads including the caller; >= 1 */
    const char *cpu_isa; /* "auto", "avx2", "avx512", …: which kernels a CPU backend uses */
    int device;          /* GPU ordinal */
    double gpu_memory_utilization; /* share of the GPU's memory that may be used, 0 … 1 */
    struct moe_group *group; /* NULL, or whom to share experts with: moe/exchange.h */
    int rank, n_ranks; /* in it, or 0 and 1. Ranks may be threads of this process or of others, on any host */
    /* In a group: the same bytes for all its ranks, made by moe_unique_id_create in one of their processes, for a
     * backend whose ranks find each other by such an id (an ncclUniqueId). Borrowed until ready() returns. */
    const struct moe_unique_id *unique_id;
    int32_t offload_experts;     /* as in struct moe_options */
    const uint64_t *expert_load; /* [L][E], NULL: not known; borrowed until plan returns */
};

/* A tensor of the file: n_experts matrices of n_rows x n_cols, row-major (GGUF ne = [n_cols,
 * n_rows, n_experts]). n_experts is 1 for anything that is not an expert stack. Vectors (norms) are
 * n_rows 1. read() copies bytes [offset, offset + n) of the tensor's raw GGUF data into dst; it may be
 * called in any order and more than once, so that a backend streams instead of holding the raw tensor. */
struct weight_source {
    const char *name;
    enum tensor_type type;
    int32_t n_experts, n_rows, n_cols;
    int32_t layer; /* of an expert stack */
    size_t n_bytes;
    enum status (*read)(void *ctx, size_t offset, void *dst, size_t n);
    void *ctx;
};

enum buf_rows {
    BUF_TOKENS, /* up to max_batch_tokens rows: one per token of the step */
    BUF_ROUTED, /* up to max_batch_tokens * K rows: one per (token, expert), grouped by expert */
    BUF_HEAD    /* up to max_rows rows: one per row that reaches the head */
};
enum buf_kind {
    BUF_EXACT, /* residual stream, router input, logits: f32 */
    BUF_INNER  /* what lies between two matrices: the backend chooses (f32, f16) */
};

/* ---- the ops ----------------------------------------------------------------------------- */

enum { OP_MAX_OUT = 3 };

/* h[t] = row ids[t] of table, dequantised. T x D. */
struct op_embed {
    const struct weight *table; /* [V][D] */
    struct buf *h;              /* [T][D] written */
};

/* out[i] = W[i] · rmsnorm(x): y = x / sqrt(mean(x²) + eps) * norm, then each matrix. */
struct op_norm_linear {
    const struct buf *x;         /* [T][D] */
    const struct weight *norm;   /* [D] */
    float eps;
    int n_out;                   /* 1 … OP_MAX_OUT */
    const struct weight *w[OP_MAX_OUT];   /* [n][D] */
    struct buf *out[OP_MAX_OUT];          /* [T][n] written */
};

/* Per head: q and k get RMSNorm over Hd values (q_norm, k_norm), then RoPE with NEOX pairs (i, i+Hd/2)
 * and angle pos * base^(-2i/Hd), computed in float64 or better than 1e-6; k and v are written to the
 * cache of `layer` at the token's position. */
struct op_rope_store {
    int layer;
    struct buf *q;               /* [T][H*Hd] read and written */
    const struct buf *k, *v;     /* [T][G*Hd] */
    const struct weight *q_norm, *k_norm; /* [Hd] each */
    float eps;
};

/* out[t] = softmax(q · K / sqrt(Hd)) · V over the sequence's positions 0 … pos[t], f32 softmax; query
 * head j uses KV head j / (H/G). Never reads a position it does not cover. */
struct op_attention {
    int layer;
    const struct buf *q;         /* [T][H*Hd] */
    struct buf *out;             /* [T][H*Hd] written */
};

/* h += W · x. */
struct op_linear_add {
    const struct buf *x;         /* [T][n_cols] */
    const struct weight *w;      /* [D][n_cols] */
    struct buf *h;               /* [T][D] read and written */
};

/* x = rmsnorm(h); logits = W x in true f32; softmax over all E with the maximum subtracted; the K
 * largest, ties to the lower id; renormalised to sum 1 when `renormalize`; then a stable counting sort
 * of the T*K (token, expert) pairs by expert. The result is the step's routing, kept by the backend
 * until the next op_route (see route_read). */
struct op_route {
    int layer;
    const struct buf *h;         /* [T][D] */
    const struct weight *norm;   /* [D] */
    float eps;
    const struct weight *router; /* [E][D], f32 */
    bool renormalize;
    struct buf *x;               /* [T][D] written: the experts' input */
    const struct weight *next[2]; /* what experts_up will read, gate and up: may be fetched meanwhile. NULLs: unknown */
};

/* act[g] = silu(gate_e · x[t]) * (up_e · x[t]) for each routed pair g = (t, e), in routing order. Each
 * expert with a non-empty group has its weights read once. */
struct op_experts_up {
    int layer;
    const struct buf *x;         /* [T][D] */
    const struct weight *gate, *up; /* [E][F][D] */
    struct buf *act;             /* routed [T*K][F] written */
};

/* h[t] += sum over k, in rank order, of weight_k * (down_e · act[g]). `y` is room for the products
 * before the fixed-order sum. */
struct op_experts_down {
    int layer;
    const struct buf *act;       /* routed [T*K][F] */
    const struct weight *down;   /* [E][D][F] */
    struct buf *y;               /* routed [T*K][D] scratch, written */
    struct buf *h;               /* [T][D] read and written */
};

/* logits[r] = W · rmsnorm(h[row r's token]). */
struct op_head {
    const struct buf *h;         /* [T][D] */
    const struct weight *norm;   /* [D] */
    float eps;
    const struct weight *w;      /* [V][D] */
    struct buf *logits;          /* head [R][V] written */
};

/* For each row that samples: apply the slot's penalties, bias and bans, draw, append the token to the
 * slot's history, and keep it as the slot's last token (moe/sampler.h has the definition). A row with a
 * logit that is not finite gets ST_NUMERIC and no token. */
struct op_sample {
    struct buf *logits;          /* head [R][V]; may be overwritten */
};

/* ---- the table --------------------------------------------------------------------------- */

struct backend_ops {
    const char *kind; /* "reference", "cpu", "cuda" */

    /* -- life: open, create every buf, plan, load every weight, ready, steps, close -- */
    void (*close)(struct backend *b); /* frees everything, weights and bufs included */
    /* What will be loaded, each tensor once (read and ctx are not to be used): does it fit, and what goes where? May be
     * NULL, and a caller with few weights may leave it out. ST_NO_MEMORY names what is missing. */
    enum status (*plan)(struct backend *b, const struct weight_source *all, size_t n, struct error *e,
                        struct moe_offload *out);
    /* Load one tensor. ST_UNSUPPORTED with the tensor and type named if this backend cannot;
     * ST_NO_MEMORY; or what source->read returned. */
    enum status (*weight_load)(struct backend *b, const struct weight_source *source,
                               struct error *e, struct weight **out);
    enum status (*buf_create)(struct backend *b, enum buf_rows rows, enum buf_kind kind,
                              int32_t n_cols, struct buf **out);
    /* All weights and bufs exist: allocate the KV cache and finish (plans, streams). limits.n_blocks
     * 0 asks the backend to fill what memory allows; *n_blocks says how many there are. */
    enum status (*ready)(struct backend *b, struct error *e, int32_t *n_blocks);

    /* "cpu avx512 2 threads": for people. */
    void (*describe)(const struct backend *b, char *dst, size_t cap);
    /* Memory table: up to cap lines; returns how many. The line named "kv" is the KV cache: n_blocks * B tokens'
     * worth, from which moe_info takes the bytes per token. */
    int (*memory)(const struct backend *b, struct moe_memory_line *dst, int cap);
    void (*counters)(const struct backend *b, struct moe_counters *out);
    /* sum[L][E] += tokens routed to each (layer, expert) since open. NULL or ST_UNSUPPORTED: not counted. */
    enum status (*expert_load)(struct backend *b, uint64_t *sum);

    /* -- sampling slots -- */
    enum status (*slot_start)(struct backend *b, const struct moe_slot_start *start);

    /* -- steps: in the order of this table; head and sample only when the step has head rows. *issue on
     * entry: true asks that the ops run one by one, because a probe reads between them; on return: false
     * lets the caller skip the ops (see the top of this file), never when it asked. -- */
    enum status (*step_begin)(struct backend *b, const struct moe_step *step, bool *issue);
    enum status (*embed)(struct backend *b, const struct op_embed *op);
    enum status (*norm_linear)(struct backend *b, const struct op_norm_linear *op);
    enum status (*rope_store)(struct backend *b, const struct op_rope_store *op);
    enum status (*attention)(struct backend *b, const struct op_attention *op);
    enum status (*linear_add)(struct backend *b, const struct op_linear_add *op);
    enum status (*route)(struct backend *b, const struct op_route *op);
    enum status (*experts_up)(struct backend *b, const struct op_experts_up *op);
    enum status (*experts_down)(struct backend *b, const struct op_experts_down *op);
    enum status (*head)(struct backend *b, const struct op_head *op);
    enum status (*sample)(struct backend *b, const struct op_sample *op);
    enum status (*step_end)(struct backend *b);
    /* Wait for the oldest step not yet collected and fill its rows (room for max_rows). */
    enum status (*step_collect)(struct backend *b, struct moe_result *out);

    /* -- looking inside, for tests and probes; valid for the last step issued. Waits for it. -- */
    enum status (*buf_read)(struct backend *b, const struct buf *buf, int32_t row, int32_t n_rows,
                            float *dst);
    enum status (*buf_write)(struct backend *b, struct buf *buf, int32_t row, int32_t n_rows,
                             const float *src);
    /* The current routing: ids and weights [T][K] in rank order, expert_first [E+1]. NULLs are
     * skipped. */
    enum status (*route_read)(struct backend *b, int32_t *ids, float *weights,
                              int32_t *expert_first);
    /* Replace the current routing (replaying forced experts; testing the expert ops alone). */
    enum status (*route_write)(struct backend *b, const int32_t *ids, const float *weights);
    /* Overwrite the whole KV cache with a byte pattern (0xFF is NaN in f16, bf16 and f32): to prove that
     * no op reads what it was not given. */
    enum status (*kv_poison)(struct backend *b, uint8_t byte);
};

/* The implementers. Each opens without weights; *out is NULL on failure. */
enum status backend_reference_open(const struct backend_config *c, struct error *e,
                                   struct backend **out);
enum status backend_cpu_open(const struct backend_config *c, struct error *e, struct backend **out);

static inline const struct backend_ops *backend_ops_of(const struct backend *b) {
    return *(const struct backend_ops *const *)(const void *)b;
}

#endif
