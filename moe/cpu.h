/* cpu: the backend that runs on x86 cores. Private to its files:
 *
 *     cpu.c          life: opening, loading and repacking weights, memory, steps
 *     cpu_ops.c      products with dense matrices: embedding, norms, projections, head; sampling
 *     cpu_experts.c  routing and the grouped expert products
 *     cpu_attend.c   rotation, the paged KV cache, attention
 *     cpu_pool.h     threads; cpu_repack.h weights' layout; cpu_kernels.h arithmetic per instruction set
 *
 * An op is one or a few jobs on the pool; items of a job write disjoint rows or columns. Buffers are
 * float32. What meets a quantised matrix is quantised on the way in: per 32 values, to 16 bits in attention, in
 * the experts' second half and in whatever feeds them, to 8 bits before the experts' gate and up matrices and
 * before the head, where the error does least harm; with AMX per 256 values, to 8 bits before the head, else
 * to 11 (ARCHITECTURE.md has the figures).
 *
 * Invariant: a row's bits depend on its own sequence alone; see cpu_kernels.h for how. One caller
 * thread. */
#ifndef MOED_MOE_CPU_H
#define MOED_MOE_CPU_H

#include "moe/backend.h"
#include "moe/batch.h"
#include "moe/cpu_kernels.h"
#include "moe/cpu_pool.h"
#include "moe/cpu_repack.h"
#include "moe/exchange.h"
#include "moe/route.h"
#include "moe/sampler.h"

enum { CPU_PLANES_DENSE = 2, CPU_PLANES_HEAD = 1, CPU_PLANES_DOWN = 2 };

enum cpu_memory {
    CPU_MEM_WEIGHTS,
    CPU_MEM_KV,
    CPU_MEM_ACTIVATIONS,
    CPU_MEM_SCRATCH,
    CPU_MEM_COUNT
};

struct cpu_alloc { /* header of a list of mappings, freed at close */
    struct cpu_alloc *next;
    void *p;
    size_t n_bytes;
};

struct weight {
    struct weight *next;
    struct cpu_matrix matrix; /* p NULL for a vector */
    float *vector; /* n_rows == 1: [n_cols] */
};

struct buf {
    struct buf *next;
    int32_t n_rows, n_cols;
    size_t stride; /* n_cols rounded up to CPU_ROWS: kernels write whole row tiles */
    float *f; /* [n_rows][stride] */
};

/* What one thread works in. */
struct cpu_scratch {
    struct sampler_scratch *sampler;
    uint8_t *tile; /* a quantised tile of max_tile tokens, max_cols wide, two planes */
    float *rows; /* [CPU_TILE][max_cols padded] */
    float *gate, *up; /* [CPU_TILE][CPU_BLOCK] */
    float *state; /* attention: [CPU_ATTEND_ROWS][Hd padded] */
    uint16_t
        *keys; /* attention: [CPU_SPLIT][2][Hd padded] keys and values out of small KV blocks */
};

enum {
    CPU_ATTEND_ROWS = 64
}; /* query rows of one attention item at most, if one token has fewer */

struct cpu {
    const struct backend_ops *ops; /* first: struct backend */
    struct model_shape shape;
    struct moe_limits limits;
    const struct cpu_kernels *kernels;
    struct cpu_pool *pool;
    int n_threads;

    struct cpu_alloc *allocs;
    uint8_t *chunk; /* what is left of one of them */
    size_t n_chunk_bytes;
    uint64_t n_bytes[CPU_MEM_COUNT];
    struct weight *weights;
    struct buf *bufs;
    int32_t max_cols; /* of any matrix, rounded up to CPU_BLOCK */
    bool float_experts; /* an expert stack of a float type was loaded */

    struct batch batch; /* of the step */
    struct route route;
    struct sampler *sampler;
    struct batch_results results;
    struct moe_counters counters;
    uint64_t begun_ns;
    struct cpu_scratch *scratch; /* [n_threads] */

    /* The input of a dense product: rows 0 … n - 1 as quantised tiles and, for float matrices, as rows.
     * Tile i holds rows tile_first[i] … tile_first[i + 1] - 1. */
    uint8_t *x_tiles;
    float *x_rows; /* [T][max_cols padded] */
    int32_t n_tiles, *tile_first, *tile_of; /* [T + 1], [T] */

    /* Quantised rows of the experts' input, [T], and of their inner activations, [T * K]. Each stands for
     * the buffer it was made from, until that is written again. */
    uint8_t *x_q, *act_q;
    const struct buf *x_q_of, *act_q_of;
    int32_t *groups; /* [E] experts with tokens, the largest group first */
    int32_t n_groups;

    struct exchange *exchange; /* or NULL */
    /* exchange, or NULL: this step's experts are computed here, for its own tokens only */
    struct exchange *peers;
    struct buf inputs; /* exchange: [work tokens][D] */
    uint8_t *inputs_q; /* quantised, as x_q */
    struct buf
        returned; /* exchange: [T * K][D] products of this rank's tokens, in its routing order */

    uint8_t *kv; /* see cpu_attend.c */
    size_t kv_head_bytes; /* of one block and KV head: keys, then values */
    size_t key_bytes; /* of which keys */
    double *rope_coarse,
        *rope_fine; /* cos, sin of pair i at positions 256 j and j: [..][Hd / 2][2] */
    float *rope; /* [T][Hd] cos then sin of the step's tokens */
    int32_t *attend_first, n_attend_tiles; /* [T + 1] tokens that attend together */
};

static inline struct cpu *cpu_of(struct backend *b) { return (struct cpu *)(void *)b; }

/* What this rank computes experts for. */
static inline const struct route *cpu_work(const struct cpu *c) {
    return c->peers ? &c->peers->work : &c->route;
}
static inline int32_t cpu_max_work_tokens(const struct cpu *c) {
    return c->exchange ? exchange_max_tokens(c->exchange) : c->limits.max_batch_tokens;
}

static inline size_t cpu_pad(size_t n, size_t to) { return (n + to - 1) / to * to; }
static inline float *cpu_row(const struct buf *b, int32_t row) {
    return b->f + (size_t)row * b->stride;
}
/* Bytes of a quantised row of n_cols. */
static inline size_t cpu_q_bytes(const struct cpu *c, int32_t n_cols, int planes) {
    return cpu_row_bytes(c->kernels, n_cols, planes);
}

/* Zeroed pages, freed at close; NULL when memory is out. */
void *cpu_map(struct cpu *c, enum cpu_memory what, size_t n_bytes);

/* How many items to cut a job into: it has n_parts equal parts of `cost` clocks each. */
int32_t cpu_n_items(const struct cpu *c, int32_t n_parts, double cost);
/* Clocks of a row tile of m times n tokens, roughly. */
double cpu_tile_cost(const struct cpu *c, const struct cpu_matrix *m, double n, int planes);

/* The tokens of one tile: quantised, float or both. */
struct cpu_input {
    const uint8_t *q;
    int planes;
    const float *f;
    size_t f_stride;
    int n;
};
/* Successive row tiles of one expert's matrix, a part of the `end`-th exclusive that this item will work
 * through, and where the thread will probably go on after that (NULL: unknown). */
struct cpu_rows {
    int32_t expert, tile, n_tiles;
    int32_t end;
    const uint8_t *next;
};
/* How many of n row tiles to multiply at once. */
int32_t cpu_tiles_at_once(const struct cpu_matrix *m, int32_t n);
/* out[t * stride + r] = row r of the tiles · token t. */
void cpu_tile_product(const struct cpu *c, const struct cpu_matrix *m, const struct cpu_rows *rows,
                      const struct cpu_input *in, float *out, size_t stride);
void cpu_dequantize_row(const struct cpu *c, const uint8_t *row, int32_t n_cols, int planes,
                        float *dst);

enum status cpu_embed(struct backend *b, const struct op_embed *op);
enum status cpu_norm_linear(struct backend *b, const struct op_norm_linear *op);
enum status cpu_linear_add(struct backend *b, const struct op_linear_add *op);
enum status cpu_head(struct backend *b, const struct op_head *op);
enum status cpu_sample(struct backend *b, const struct op_sample *op);

enum status cpu_route(struct backend *b, const struct op_route *op);
enum status cpu_experts_up(struct backend *b, const struct op_experts_up *op);
enum status cpu_experts_down(struct backend *b, const struct op_experts_down *op);
/* After the routing changed: group lists. */
void cpu_route_done(struct cpu *c);

/* Sizes of the KV cache; false on overflow. */
bool cpu_kv_create(struct cpu *c);
void cpu_rope_begin(struct cpu *c); /* with batch set */
void cpu_attend_begin(struct cpu *c);
enum status cpu_rope_store(struct backend *b, const struct op_rope_store *op);
enum status cpu_attention(struct backend *b, const struct op_attention *op);
enum status cpu_kv_poison(struct backend *b, uint8_t byte);

#endif
