/* cpu_kernels: the arithmetic of the CPU backend, one table of functions per instruction set, and the
 * memory layouts they share.
 *
 * A product is computed in tiles of CPU_ROWS weight rows by 1 … max_tile tokens. Every sum of a tile runs
 * over one (row, token) pair in one fixed order, so that a token's result does not depend on the width of the
 * tile it was computed in.
 *
 * Activations that meet quantised weights are quantised too. By blocks (AVX2, AVX-512): per 32 values a float
 * scale and integers of 8 bits (one plane) or 16 bits (two planes of 8, high and low byte: 32639 = 127 * 256 +
 * 127 steps on either side). Dot products of a block of 32 are exact integers; block sums are combined in
 * float32, in order. A tile of n tokens is, per block of 32 columns:
 *
 *     int8  high[n][32]; int8 low[n][32] (two planes only);
 *     float scale[n]; float sum[n] (scale times the integers' sum);
 *     int32 offset[2][n] (-32 times the sum of the first and of the second 16 integers)
 *
 * and a quantised row is a tile of one.
 *
 * By units (AMX): per 256 values, the superblock of K quants, a float scale and integers of one byte (one plane), or of
 * eleven bits (two planes: the eight high ones, rounded to nearest, and the CPU_X_LOW_BITS left, both signed) in
 * CPU_X_LIMIT_2 steps on either side, so that their sums of 32 fit 16 bits and those of a superblock 32. Dot products of a
 * superblock (of Q8_0: of a block) are exact integers, but for one part of Q4_K and Q5_K with two planes, which is left
 * out: scales, too, are high bits, rounded to nearest, and two (Q4_K) or three (Q5_K) left, and low bits are not
 * multiplied with low bits. These integers are combined in float32, in order. A tile of n tokens is cut into groups of
 * equally many, of which the last may have room for more: one group, or with more than CPU_GROUP tokens an even number. What
 * a product of AMX reads lies together. A tile is, per unit, the last one filled up with zeros:
 *
 *     int8 x[groups][256 / CPU_STEP][planes][tokens of a group][CPU_STEP]
 *     n times CPU_X_TAIL bytes: float scale; at CPU_X_SUMS_32 int16 [8], sums of each 32 values; at CPU_X_SUMS_16
 *     int16 [16], of each 16
 *
 * and a quantised row is a tile of one.
 *
 * Private to the CPU backend and its tests. */
#ifndef MOED_MOE_CPU_KERNELS_H
#define MOED_MOE_CPU_KERNELS_H

#include "moe/backend.h"
#include "moe/quant.h"

enum {
    CPU_ROWS = 16, /* weight rows per tile: the lanes of a 512-bit register */
    CPU_TILE = 64, /* tokens per tile at most */
    CPU_GROUP = 16, /* by units: tokens whose values lie together, at most */
    CPU_STEP = 64, /* and columns */
    CPU_BLOCK = 32, /* columns per activation scale */
    CPU_POS = 16, /* key positions interleaved in the KV cache */
    CPU_SPLIT = 64, /* positions per step of the running softmax, from multiples of it */
    CPU_QROWS = 8 /* query rows that attention handles together at most */
};

enum {
    CPU_X_SCALE = 0,
    CPU_X_SUMS_32 = 16,
    CPU_X_SUMS_16 = 32,
    CPU_X_TAIL = 64,
    CPU_X_LOW_BITS = 3, /* of a value of two planes in the low one */
    CPU_X_LIMIT_1 = 127,
    CPU_X_LIMIT_2 = CPU_X_LIMIT_1 << CPU_X_LOW_BITS
};

enum cpu_inputs { CPU_BY_BLOCK, CPU_BY_UNIT };

/* Weights: [row tile][unit], a unit being CPU_ROWS rows of one superblock (K quants), of 32 columns (Q8_0)
 * or of one column (float types). See cpu_repack.c. */
enum cpu_format {
    CPU_Q4_K,
    CPU_Q5_K,
    CPU_Q6_K,
    CPU_Q8_0,
    CPU_N_QUANTS,
    CPU_F32 = CPU_N_QUANTS,
    CPU_F16,
    CPU_BF16,
    CPU_N_FORMATS
};

/* Offsets and sizes in bytes of one unit. In 4-bit parts the byte b of 32-bit lane r of 64-byte vector j
 * holds, of row r, column 4j + b in the low nibble and 16 + 4j + b in the high one, per 32 columns. */
enum {
    CPU_Q4_K_SC = 2048, /* u8 [8][16] scales */
    CPU_Q4_K_M = CPU_Q4_K_SC + 128, /* u8 [8][16] minima */
    CPU_Q4_K_D = CPU_Q4_K_M + 128, /* f16 [16] d, then f16 [16] dmin */
    CPU_Q4_K_UNIT = CPU_Q4_K_D + 64,
    CPU_Q5_K_H = 2048, /* per 32 columns 64 bytes: bit j of byte b of lane r: column 4j + b */
    CPU_Q5_K_SC = CPU_Q5_K_H + 512,
    CPU_Q5_K_M = CPU_Q5_K_SC + 128,
    CPU_Q5_K_D = CPU_Q5_K_M + 128,
    CPU_Q5_K_UNIT = CPU_Q5_K_D + 64,
    CPU_Q6_K_H =
        2048, /* per 32 columns 128 bytes: bits 2i of byte b, vector v: column 16v + 4i + b */
    CPU_Q6_K_SC = CPU_Q6_K_H + 1024, /* i8 [16][16] scales, one per 16 columns */
    CPU_Q6_K_D = CPU_Q6_K_SC + 256, /* f32 [16] d */
    CPU_Q6_K_UNIT = CPU_Q6_K_D + 64,
    CPU_Q8_0_D = 512, /* before it u8 (value + 128), vector j, byte b: column 4j + b */
    CPU_Q8_0_UNIT = CPU_Q8_0_D + 64 /* f32 [16] d */
};

static inline size_t cpu_tile_block_bytes(int planes, int n_tokens) {
    return (size_t)n_tokens * ((size_t)planes * CPU_BLOCK + 16);
}

/* out[t * stride + r] = dot of row r with token t, for the rows of n_tiles successive row tiles from w, of
 * n_units units each, and the n tokens of the tile x. */
struct cpu_dot {
    const uint8_t *w;
    const uint8_t *ahead; /* what will be needed soon: prefetched at the pace of w */
    int32_t n_tiles, n_units;
    const uint8_t *x;
    int n;
    float *out;
    size_t stride;
};
typedef void cpu_dot_fn(const struct cpu_dot *d);
/* The same for one row tile of float weights and tokens in float32. */
struct cpu_dot_float {
    const uint8_t *w;
    int32_t n_cols;
    const float *x; /* [t * x_stride + column] */
    size_t x_stride;
    float *out;
    size_t stride;
};
typedef void cpu_dot_float_fn(const struct cpu_dot_float *d);

/* h[i] += sum over j < k, in order, of weights[j] * y[rows[j] * stride + i], for i < n. */
struct cpu_combine {
    float *h;
    const float *y;
    size_t stride;
    const int32_t *rows;
    const float *weights;
    int32_t k, n;
};

/* Attention of up to CPU_QROWS query rows over one split of at most CPU_SPLIT positions that all of them
 * cover. */
struct cpu_attend {
    const float *q[CPU_QROWS]; /* [Hd] */
    float *out[CPU_QROWS]; /* [Hd rounded up to 16] running sum of p * v, not yet divided */
    float *max[CPU_QROWS]; /* running maximum of the scores */
    float *sum[CPU_QROWS]; /* running sum of p */
    /* Per group of CPU_POS positions: f16 keys [Hd][CPU_POS], f16 values [CPU_POS][Hd rounded up to 16]. */
    const uint16_t *k[CPU_SPLIT / CPU_POS], *v[CPU_SPLIT / CPU_POS];
    const uint16_t *next_k[CPU_SPLIT / CPU_POS]; /* what comes next, to be prefetched; or NULL */
    const uint16_t *next_v[CPU_SPLIT / CPU_POS];
    int32_t n_rows, n_pos, head_dim;
    float scale; /* of the scores */
};

struct cpu_kernels {
    const char *name; /* "avx512-vnni" */
    enum cpu_inputs inputs;
    int up_planes; /* of the input of gate and up */
    int max_tile; /* tokens: 64, 16 or 4; there are kernels for all widths up to it */
    cpu_dot_fn *dot[CPU_N_QUANTS][2][CPU_TILE + 1]; /* [format][planes - 1][tokens] */
    cpu_dot_float_fn
        *dot_float[CPU_N_FORMATS - CPU_N_QUANTS][4]; /* [format - CPU_F32][tokens - 1] */
    /* y = x / sqrt(mean(x²) + eps) * norm over n values. y may be x. */
    void (*rms_norm)(const float *x, const float *norm, float eps, int32_t n, float *y);
    /* From here on "quantised" is what `inputs` says. */
    /* Row of n values (a multiple of 32) to column t of a quantised tile of n_tokens. */
    void (*quantize)(const float *x, int32_t n, int planes, uint8_t *tile, int t, int n_tokens);
    void (*quantize_row)(const float *x, int32_t n, int planes, uint8_t *row);
    /* Block `block` of 32 values of each of n_rows rows x[n_rows][32], to successive rows of n values,
     * which are zero or have been quantised before. NULL by units, which are longer than blocks. */
    void (*quantize_block)(const float *x, int n_rows, int32_t block, int32_t n, int planes,
                           uint8_t *rows);
    /* n_tokens quantised rows of n values to a tile. */
    void (*gather)(const uint8_t *const *rows, int n_tokens, int32_t n, int planes, uint8_t *tile);
    /* gate = silu(gate) * up, n values. */
    void (*silu_mul)(float *gate, const float *up, int32_t n);
    void (*add)(float *x, const float *y, int32_t n); /* x += y */
    void (*combine)(const struct cpu_combine *m);
    /* NEOX rotation of x[Hd] by cs = cos[Hd/2], sin[Hd/2]. */
    void (*rope)(float *x, const float *cs, int32_t head_dim);
    /* Key to positions' layout: dst[i * stride] = f16(x[i]); value: dst[i] = f16(x[i]). */
    void (*to_f16)(const float *x, int32_t n, uint16_t *dst, size_t stride);
    void (*attend)(const struct cpu_attend *a);
    /* Index of the largest of n values, the lowest of equals; -1 if one is not finite. */
    int32_t (*largest)(const float *x, int32_t n);
    /* x[i] = x[i] / sum, n values. */
    void (*divide)(float *x, float sum, int32_t n);
};

/* Bytes of a token's unit and of its row. */
static inline size_t cpu_x_unit_bytes(int planes) { return (size_t)planes * QK_K + CPU_X_TAIL; }
static inline size_t cpu_x_row_bytes(int32_t n_cols, int planes) {
    return ((size_t)n_cols + QK_K - 1) / QK_K * cpu_x_unit_bytes(planes);
}
/* Of a tile of n tokens: how many a group has, bytes of all groups' values in a unit, and where value c of token t is.
 * Its second plane follows after a group's CPU_STEP columns. */
static inline int cpu_x_group(int n) {
    const int pairs = (n + 2 * CPU_GROUP - 1) / (2 * CPU_GROUP);
    return n <= CPU_GROUP ? n : (n + 2 * pairs - 1) / (2 * pairs);
}
static inline size_t cpu_x_bytes(int n, int planes) {
    const int group = cpu_x_group(n);
    return (size_t)((n + group - 1) / group * group) * (size_t)planes * QK_K;
}
static inline size_t cpu_x_at(int n, int planes, int t, int c) {
    const int group = cpu_x_group(n), step = t / group * (QK_K / CPU_STEP) + c / CPU_STEP;
    return (size_t)((step * planes * group + t % group) * CPU_STEP + c % CPU_STEP);
}
static inline size_t cpu_row_bytes(const struct cpu_kernels *k, int32_t n_cols, int planes) {
    if (k->inputs == CPU_BY_UNIT) return cpu_x_row_bytes(n_cols, planes);
    return (size_t)(n_cols / CPU_BLOCK) * cpu_tile_block_bytes(planes, 1);
}

/* How many of n > 0 tokens the next tile takes. */
static inline int cpu_tile_width(const struct cpu_kernels *k, int32_t n) {
    return n < k->max_tile ? (int)n : k->max_tile;
}

/* NULL if this build, this processor or, for the tiles of AMX, this kernel lacks them. */
const struct cpu_kernels *cpu_kernels_avx2(void);
const struct cpu_kernels *cpu_kernels_avx512(void);
const struct cpu_kernels *cpu_kernels_amx(void);

#endif
