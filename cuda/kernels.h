/* kernels: what the host part of this room (C) and the kernels (CUDA) say to each other. One argument struct and
 * one launch function per kernel; pointers are device memory unless a comment says otherwise.
 *
 * Launch functions only enqueue; they return the launch's error and may be called while a stream is captured.
 * Real sizes (tokens, rows, work items) are read on the device from struct step_header, so that a captured
 * launch serves every step of its bucket: `bucket` arguments bound a grid, never the work. */
#ifndef MOED_CUDA_KERNELS_H
#define MOED_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define _Noreturn __attribute__((noreturn)) /* base.h is C */
extern "C" {
#endif

#include "moe/moe.h"

#ifdef __CUDACC__
#define KERNEL_FN __host__ __device__ static inline
#else
#define KERNEL_FN static inline
#endif

enum {
    HEAD_DIM = 128,
    SPAN_KEYS = 64, SPLIT_KEYS = 256, /* keys whose sums attention merges: fixed, so that none depends on the batch */
    ATTN_WARPS = SPLIT_KEYS / SPAN_KEYS, /* of a block of decoding attention */
    TILE_TOKENS = 16,       /* consecutive tokens of one sequence that attention takes together */
    MIN_TILE_TOKENS = 2,    /* of a sequence in a step, for attention to do so */
    MAX_EMBD = 16384,
    MAX_EXPERTS = 512,
    MAX_EXPERTS_USED = 32,
    ROUTE_PLANES = 16,      /* partial sums of a router's logit */
    ROUTE_TILE_EXPERTS = 128,
    ROUTE_CHUNK = 8,        /* tokens of a ticket of the router */
    SAMPLE_PARTS = 16,      /* blocks that may look through a row of logits */
    EXCHANGE_FEW = 48, EXCHANGE_MANY = 128, /* blocks of the kernel that waits for other GPUs, and pieces of the tokens */
    OWNER_SHIFT = 27,       /* of a row of products, below the rank whose they are: struct route_lists */
    N_WIDTHS = 5            /* token tiles of 8, 16, 32, 64 and 128 */
};

struct cuda_queue {
    cudaStream_t stream;
    bool dependent;    /* the device knows dependent launches (compute capability 9.0) */
    int n_sm;
    size_t max_shared; /* bytes one block may have */
    void *encode_map;  /* the driver's cuTensorMapEncodeTiled; NULL: not a Hopper */
};

/* ---- a step, as uploaded ----------------------------------------------------------------------- */

struct step_header {
    int32_t n_tokens, n_rows;
    int32_t n_pieces, n_tiles; /* attention work */
    int32_t by_blocks;         /* a piece is a block's, not a warp's */
    int32_t result;            /* 0 or 1: where the rows' results go */
    uint32_t n_exchanged;      /* layers that this rank's group exchanged before this step */
    int32_t pieces_at, tiles_at, blocks_at; /* 4-byte words from the header */
};

/* Spans of one token: all, or if the token is cut, those of a split. */
struct attn_piece {
    int32_t token, end;      /* keys 0 … end - 1 are the token's */
    int32_t table;           /* its block table, in 4-byte words from the header */
    int32_t span, n_spans;   /* of the piece */
    int32_t piece, n_pieces; /* of the token */
    int32_t partial;         /* where the piece's result goes; the token's first is partial - piece. -1: it is whole */
};

struct attn_tile {
    int32_t token, n_tokens; /* up to TILE_TOKENS consecutive tokens of a sequence */
    int32_t pos;             /* of the first */
    int32_t table;           /* the block table, in 4-byte words from the header */
};

struct head_row {
    int32_t token, slot, sample;
};

/* The upload's fixed part; where the arrays begin depends on the bucket. */
struct step_view {
    const struct step_header *header;
    const int32_t *ids, *pos, *seq; /* [T]: MOE_LAST_TOKEN stays; seq indexes the next two */
    const int32_t *slot, *table;    /* [S]: table: where its blocks begin, from blocks_at */
    const struct head_row *rows;    /* [R] */
};

/* ---- loading --------------------------------------------------------------------------------------- */

struct repack_args {
    const uint8_t *src;  /* [n_rows][n_cols] of the file's type */
    uint8_t *dst;        /* ceil(n_rows / 16) row blocks of panels */
    int32_t source;      /* enum panel_source */
    int32_t n_rows, n_cols;
    uint32_t *d_max;     /* raised to the largest |d| as f16 bits; zeroed by the caller before the first piece */
};
cudaError_t cuda_repack(const struct repack_args *a, const struct cuda_queue *q);
/* f32 from a float type of the file (enum panel_source), or f16 for buffers. */
cudaError_t cuda_to_f32(const void *src, int source, size_t n, float *dst, const struct cuda_queue *q);
cudaError_t cuda_to_f16(const float *src, size_t n, void *dst, const struct cuda_queue *q);

/* ---- embedding and norms ---------------------------------------------------------------------------- */

struct slot_state;

struct embed_args {
    struct step_view step;
    const uint8_t *table; /* panels [V][D] */
    int32_t type;         /* enum panel_type */
    int32_t n_cols;
    const struct slot_state *slots;
    float *h; /* [T][D] written */
};
cudaError_t cuda_embed(const struct embed_args *a, int bucket, const struct cuda_queue *q);

/* Where ranks meet on their devices. By rank; this rank's own among them: a flag is epoch << 32 | tokens; flags[r][i] is
 * written by rank i, once its ids and x of a layer are there, flags[r][MOE_MAX_RANKS + i] once its products are. */
struct exchange_meeting {
    uint64_t *flags[MOE_MAX_RANKS]; /* [2 * MOE_MAX_RANKS] */
    int32_t rank, n_ranks;
    const struct step_header *header; /* NULL: there is no meeting */
    uint32_t layer;      /* from 1: an epoch is header->n_exchanged + layer */
    uint32_t *stop;      /* pinned host memory: not 0 ends all waits; set by a wait of timeout_ns */
    uint64_t timeout_ns;
};

/* Optionally h[t] += sum of weights[t][k] * y[row_of[t][k]], in rank order; then optionally x = rmsnorm(h). */
struct norm_args {
    const int32_t *n_rows;       /* in the header */
    const struct head_row *rows; /* x[r] is made from h[rows[r].token]; NULL: from h[r] */
    float *h;                    /* [T][D] */
    int32_t n_cols;
    const void *y[MOE_MAX_RANKS]; /* f16 [rows][D], by the top of row_of; y[0] NULL: nothing to add */
    struct exchange_meeting meeting; /* before y is read, if there is one; a block per row, all at once, waits in it */
    const int32_t *row_of;       /* [T][K]: see struct route_lists */
    const float *weights;        /* [T][K] */
    int32_t n_used;              /* K */
    bool listed;                 /* h, row_of and weights are older than the last kernel, and are read before it has ended */
    const float *norm;           /* [D]; NULL: no x */
    float eps;
    void *x;                     /* f16 [rows][D] */
};
cudaError_t cuda_norm(const struct norm_args *a, int bucket, const struct cuda_queue *q);

/* ---- products ------------------------------------------------------------------------------------------ */

enum gemm_epilogue {
    GEMM_STORE_F16, /* out f16 */
    GEMM_STORE_F32, /* out f32 */
    GEMM_ADD_F32,   /* out f32 += */
    GEMM_SILU_F16   /* segments are gate and up: out f16 = silu(gate) * up */
};

/* Where an expert's panels lie, if not all experts lie in order on the device. */
struct expert_panels {
    const uint8_t *panels; /* on the device or in page-locked host memory */
    uint64_t host_bytes;   /* 0: on the device */
};

struct gemm_segment {
    const uint8_t *w; /* panels */
    const struct expert_panels *experts; /* [E]; NULL: w has them all, in order */
    void *out;        /* [rows][n_rows] */
    int32_t type;     /* enum panel_type */
    int32_t n_rows;   /* of the matrix */
    float scale;      /* 2^e, see panel_exponent */
    /* Filled by the launcher: the segment's first tile; row blocks of the matrix (of one expert), and bytes of one. */
    int32_t first_tile, n_blocks;
    uint32_t block_bytes;
};

/* Tokens of one expert: rows first … first + n - 1 in routing order. */
struct gemm_item {
    int32_t expert, first, n;
    int32_t n_done; /* blocks of a product that have written their rows of it: zero in a new list, see gemm_args.counts */
};

struct gemm_args {
    struct gemm_segment segments[3];
    int32_t n_segments;
    int32_t epilogue;
    const void *x;  /* f16 [rows][n_cols] */
    int32_t n_cols; /* a multiple of 256 */
    /* Filled by the launcher: tiles of rows that a block takes one after the other; log2 of its warps, and of the parts
     * of the columns. */
    int32_t n_tiles, warps_shift, parts_shift;
    const int32_t *n_tokens;        /* dense: how many rows of x */
    /* Expert products; all NULL when dense: */
    struct gemm_item *items;        /* of the launch's tile width, see route_lists */
    const int32_t *n_items;
    int32_t single_items; /* filled by the launcher: so many items have blocks of their own, others share */
    bool listed; /* the list is older than the last kernel: it, and weights, are read before that one has ended */
    /* The experts' second product begins with items whose first one is done, while the first is still at others: */
    bool counts;     /* the first: blocks raise their item's n_done */
    int32_t awaited; /* the second: the n_done with which an item's x is there; 0: x is there when the kernel before has ended */
    /* With segments' experts only: raised by what is read from host memory; [E] raised by tokens, or NULL. */
    uint64_t *host_bytes, *load;
    const int32_t *token_of;        /* [T * K] routed row -> row of x; NULL: x is in routing order */
    /* f16 rows go to out_of_rank[rank_of[row]], maybe in another GPU's memory, instead of the segment's out; NULL: not so. */
    const uint8_t *rank_of;
    void *out_of_rank[MOE_MAX_RANKS];
};

/* Which kernel, and how many warps to a block. */
struct gemm_plan {
    int width; /* tiles of 8 << width tokens, and for experts the work list of that width; bulk: which kernel */
    int warps;
    int tiles; /* of rows to a block */
    int blocks; /* to an item, if they can count and share; 0: they cannot */
    bool bulk; /* by gemm_dense, which has nothing else to plan */
};
/* The plan for `bucket` rows (dense) or for `bucket` tokens spread over n_experts experts (n_experts > 0, n_used
 * each). */
struct gemm_plan cuda_gemm_plan(const struct gemm_args *a, int bucket, int n_experts, int n_used,
                                const struct cuda_queue *q);
/* p: what cuda_gemm_plan said. Experts only: the work list has max_items at most, of which those beyond max_groups are
 * tiles of groups that have more than one. */
cudaError_t cuda_gemm(const struct gemm_args *a, struct gemm_plan p, int bucket, int max_groups, int max_items,
                      const struct cuda_queue *q);

/* ---- attention ------------------------------------------------------------------------------------------- */

struct rope_args {
    struct step_view step;
    void *q;             /* f16 [T][H][128] read and written */
    const void *k, *v;   /* f16 [T][G][128] */
    const float *q_norm, *k_norm; /* [128] */
    const float *table;  /* [max_seq_tokens][64]{cos, sin} */
    float eps;
    int32_t n_heads, n_kv_heads;
    void *kv;            /* f16, this layer's blocks: [n_blocks][G]{K, V}[B][128] */
    int32_t block_shift; /* log2 B */
};
cudaError_t cuda_rope_store(const struct rope_args *a, int bucket, const struct cuda_queue *q);

struct attn_args {
    struct step_view step;
    const void *q; /* f16 [T][H][128] */
    void *out;     /* f16 [T][H][128] written */
    void *kv;      /* read; fused: the step's own keys and values are written */
    int32_t n_heads, n_kv_heads, block_shift;
    int32_t per_kv, octets; /* query heads of a KV head; attn_octets() */
    bool fused;    /* every sequence of the step has one token, and what rope says is done on the way; q is rope's,
                      and stays as it is */
    struct rope_args rope;
    float *partials;   /* [n_partials][attn_partial_floats] */
    uint32_t *tickets; /* [T][G * octets], zero between launches */
};
/* Query heads of one KV head are taken eight at a time. */
KERNEL_FN int attn_octets(int n_heads, int n_kv_heads) {
    return (n_heads / n_kv_heads + 7) / 8;
}
KERNEL_FN size_t attn_partial_floats(int n_heads, int n_kv_heads) {
    return (size_t)n_kv_heads * (size_t)attn_octets(n_heads, n_kv_heads) * 8 * (HEAD_DIM + 2);
}
cudaError_t cuda_attn_splits(const struct attn_args *a, int bucket, const struct cuda_queue *q);
cudaError_t cuda_attn_tiles(const struct attn_args *a, const struct cuda_queue *q);

/* ---- routing ----------------------------------------------------------------------------------------------- */

/* What the expert products need of a routing; lists hold the same groups cut into tiles of 8 << i tokens. */
struct route_lists {
    int32_t *ids;          /* [T][K] rank order */
    float *weights;        /* [T][K] */
    int32_t *expert_first; /* [E + 1] */
    int32_t *token_of;     /* [T * K] routed row -> token */
    int32_t *row_of;       /* [T][K] -> row of the products; rank << OWNER_SHIFT on top, if a rank's lie elsewhere */
    struct gemm_item *items[N_WIDTHS];
    int32_t *n_items;      /* [N_WIDTHS] */
};

struct route_args {
    const struct step_header *header;
    const float *h;      /* [T][D] */
    const float *norm;   /* [D] */
    const float *router; /* f32 [E][D] */
    float eps;
    int32_t n_cols, n_experts, n_used;
    bool renormalize;
    void *x;             /* f16 [T][D] written */
    float *partials;     /* of route_partial_floats() */
    struct route_lists lists;
    uint32_t *tickets;   /* [1 + chunks of ROUTE_CHUNK tokens], zero between launches */
    uint8_t *marks;      /* [chunks][route_pitch(E)] */
    uint32_t used_inverse; /* route_inverse() */
    uint32_t widths;     /* bit i: list i is wanted */
    uint64_t *n_reads;   /* groups so far; NULL: they are not counted */
    bool unsorted;       /* ids and weights only: the group sorts */
    const uint8_t *next[2];  /* weights that are read next: steps of more than a launch bring */
    uint32_t next_bytes[2];  /* so much of each into L2, a multiple of 16 */
};
/* Sums of logits are kept for whole tiles of experts. */
KERNEL_FN int route_pitch(int n_experts) {
    return (n_experts + ROUTE_TILE_EXPERTS - 1) / ROUTE_TILE_EXPERTS * ROUTE_TILE_EXPERTS;
}
/* 2^32 / n_used, rounded up, for quotients of numbers below 2^22. */
KERNEL_FN uint32_t route_inverse(int n_used) { return UINT32_MAX / (uint32_t)n_used + 1u; }
KERNEL_FN size_t route_partial_floats(size_t n_tokens, int n_experts) {
    return ROUTE_PLANES * n_tokens * (size_t)(route_pitch(n_experts) + 1);
}
cudaError_t cuda_route(const struct route_args *a, int bucket, const struct cuda_queue *q);
/* Only the sort, of ids and weights already in place. */
cudaError_t cuda_route_sort(const struct route_args *a, int bucket, const struct cuda_queue *q);

/* ---- experts shared with other GPUs --------------------------------------------------------------------------- */

/* Which ranks hold an expert of a layer, and where its weights lie in this rank's stacks. */
struct expert_home {
    uint16_t holders; /* a bit for each rank; of several, a step's counts decide which computes it */
    int16_t place;    /* -1: not here */
};
/* Dealing experts out: what one costs a rank, in rows. Below it the weights are what takes time. */
enum { EXPERT_COST = 32 };

/* A layer's tokens: those of all ranks, in the order of the ranks. */
struct group_tokens {
    int32_t n, first_own, n_own;
    int32_t first[MOE_MAX_RANKS + 1]; /* of each rank; then n */
};

/* What a rank counts; behind it rows of the group by expert, [L][E], and by who computed them, [L][R]. */
enum { COUNT_READS /* groups of rows computed here */, COUNT_ROWS /* rows computed here */,
       COUNT_FAR /* inputs and products that came from other ranks */, N_COUNTS };

struct exchange_args {
    const struct step_header *header;
    /* By rank; this rank's own among them. */
    const int32_t *ids[MOE_MAX_RANKS]; /* [T][K] */
    const void *x[MOE_MAX_RANKS];      /* f16 [T][D] */
    struct exchange_meeting meeting;
    int32_t rank, n_ranks, max_tokens; /* max_tokens: of a rank */
    int32_t n_cols, n_experts, n_used;
    int32_t n_chunks;    /* EXCHANGE_FEW; or EXCHANGE_MANY, which only ranks with a GPU each may have */
    /* Or ids and x of all ranks were brought here: [R] how many tokens each has; there are no flags then. NULL: flags say. */
    const int32_t *arrived;
    int32_t *all_rows; /* then: [tokens][K], row_of of all ranks' tokens; row_of of a product from elsewhere is its pair */
    /* Else: [rows of the group] whose token a routed row is of, so that its product is written there. */
    uint8_t *rank_of;
    /* Written. R * T tokens at most: */
    struct group_tokens *tokens;
    int32_t *group_ids;    /* [tokens][K] */
    void *inputs;          /* f16 [tokens][D] */
    int32_t *chunk_counts; /* [EXCHANGE_MANY][E] */
    const struct expert_home *homes; /* [E] of this layer */
    struct route_lists lists; /* row_of: of this rank's tokens; items: of the rows computed here; no ids, weights, expert_first */
    uint64_t *counts;      /* [N_COUNTS] */
    uint64_t *load;        /* [E] of this layer */
    uint64_t *rows;        /* [R] of this layer */
};
/* Show ids and x, wait for all ranks, bring in theirs, and sort the pairs of all: lists for what is computed here. */
cudaError_t cuda_exchange_begin(const struct exchange_args *a, const struct cuda_queue *q);
/* After products with `arrived`: those of other ranks' tokens, each at its pair in send + r * rank_rows rows. */
cudaError_t cuda_exchange_pack(const struct exchange_args *a, const void *y, void *send, size_t rank_rows,
                               const struct cuda_queue *q);
/* Products are there; wait until all ranks' are. */
cudaError_t cuda_exchange_end(const struct exchange_meeting *m, const struct cuda_queue *q);

/* ---- sampling ------------------------------------------------------------------------------------------------ */

/* A slot: what moe_slot_start said, and what was sampled since. */
struct slot_state {
    struct moe_sampling sampling;
    int32_t n_ids, n_prompt;
    int32_t last; /* -1: it has not sampled */
    int32_t counting; /* counts are kept: a penalty is in force */
};

struct slot_args {
    struct slot_state *slot;
    uint32_t *counts;   /* [V] */
    const int32_t *ids; /* [n_ids] */
    int32_t n_ids, n_prompt;
};
/* Fill zeroed counts from a history. */
cudaError_t cuda_slot_count(const struct slot_args *a, const struct cuda_queue *q);

/* What a stretch of a row of logits says: its first in falling order, its smallest finite value. */
struct sample_part {
    float value;
    int32_t id;
    float low;
    int32_t bad; /* it has a value that is not finite */
};

struct sample_args {
    struct step_view step;
    float *logits; /* [R][V] overwritten */
    int32_t n_vocab;
    struct slot_state *slots;
    uint32_t *counts;         /* [slots][V]: times sampled; the top bit: in the prompt */
    struct sample_part *parts; /* [R][SAMPLE_PARTS] */
    uint32_t *tickets;        /* [R], zero between launches */
    struct moe_row *results;  /* [2][max_rows], pinned host memory */
    int32_t max_rows;
};
cudaError_t cuda_sample(const struct sample_args *a, int bucket, const struct cuda_queue *q);

/* Load every kernel now, and raise the limits they need. */
cudaError_t cuda_kernels_prepare(const struct cuda_queue *q);

#ifdef __cplusplus
}
#endif

#endif
