/* See cpu_kernels.h: the table for avx512 with products of several tokens by AMX.
 *
 * A block's eight vectors of unpacked weights are the tile multiplier's right side as they stand: 8 rows of
 * 4 columns by 16 matrix rows. The left side is the block's activations, a token per row. The product is the
 * block's exact integer sums [token][row], which are scaled and added exactly as cpu_dot.h does it, in the
 * same order: the bits are those of the other kernels, at every width.
 *
 * A tile's load, product and store take about 15, 16 and 25 clocks for sixteen rows, and loads seem to wait for the
 * tile stores before them. Blocks therefore go through three stages (unpack, multiply, add) a group at a time,
 * each stage a group behind the one before, and over the ends of matrix rows. Q6_K, with a scale per 16
 * columns, would need twice the products and stores; it stays with the vectors, which are faster there.
 *
 * A thread keeps its tiles configured, since configuring and releasing them takes as long as four blocks do: a
 * context switch saves 8 KiB more, and Linux releases tiles before a core sleeps. */
#include "moe/cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "moe/cpu_block.h"

enum {
    GROUP = 4, /* blocks per stage */
    RING = 2 * GROUP, /* blocks that two stages hold between them */
    SUMS = CPU_TILE * CPU_ROWS /* of one product */
};

/* What LDTILECFG reads. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
};

/* Tiles 0, 1: sums; 4, 5: activations; 6: weights. */
#define TILE_CONFIG(n)                                                                             \
    {                                                                                              \
        .palette = 1, .n_rows = {n, n, 0, 0, n, n, 8}, .row_bytes = { 64, 64, 0, 0, 32, 32, 64 }   \
    }
static const struct tile_config configs[CPU_TILE + 1] = {
    [6] = TILE_CONFIG(6),   [7] = TILE_CONFIG(7),   [8] = TILE_CONFIG(8),   [9] = TILE_CONFIG(9),
    [10] = TILE_CONFIG(10), [11] = TILE_CONFIG(11), [12] = TILE_CONFIG(12), [13] = TILE_CONFIG(13),
    [14] = TILE_CONFIG(14), [15] = TILE_CONFIG(15), [16] = TILE_CONFIG(16)};
static _Thread_local const struct tile_config *configured;

/* GCC's tile loads do not tell the compiler that they read memory. */
#define TILE_LOAD(tile, p, stride)                                                                 \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_loadd(tile, p, stride);                                                              \
    } while (0)

/* What is multiplied. All of it is known at compile time. */
struct shape {
    enum cpu_format format;
    int planes, n;
    int unit_bytes, unit_blocks;
};

CPU_INLINE struct shape shape_of(enum cpu_format format, int planes, int n) {
    const int bytes = format == CPU_Q4_K   ? CPU_Q4_K_UNIT
                      : format == CPU_Q5_K ? CPU_Q5_K_UNIT
                                           : CPU_Q8_0_UNIT;
    return (struct shape){format, planes, n, bytes, format == CPU_Q8_0 ? 1 : QK_K / CPU_BLOCK};
}

/* Where a stage is: block `block` of the unit at w, whose tokens are at x. */
struct place {
    const uint8_t *w, *x;
    int block;
    int32_t left; /* blocks in the row tile, this one included */
};

CPU_INLINE void advance(struct place *p, const struct shape *s, const struct cpu_dot *job,
                        int32_t n_blocks) {
    p->x += cpu_tile_block_bytes(s->planes, s->n);
    if (++p->block == s->unit_blocks) {
        p->block = 0;
        p->w += s->unit_bytes;
    }
    if (--p->left > 0) return;
    p->left = n_blocks;
    p->x = job->x;
}

/* To eight vectors of signed bytes. */
CPU_INLINE void unpack(const struct cpu_dot *job, const struct shape *s, const struct place *p,
                       uint8_t *dst) {
    const int lines = (s->unit_bytes / s->unit_blocks + 63) / 64;
    vi q[8];
    prefetch(job, p->w + p->block * s->unit_bytes / s->unit_blocks, lines);
    if (s->format == CPU_Q8_0) {
        CPU_UNROLL
        for (int g = 0; g < 8; g++)
            q[g] = _mm512_xor_si512(vi_load(p->w + 64 * g), _mm512_set1_epi8(-128));
    } else {
        unpack_scale_min(p->w, s->format == CPU_Q5_K, p->block, q);
    }
    CPU_UNROLL
    for (int g = 0; g < 8; g++) vi_store(dst + 64 * g, q[g]);
}

/* sums[plane][token][row] */
CPU_INLINE void multiply(const struct shape *s, const uint8_t *x, const uint8_t *q, int32_t *sums) {
    TILE_LOAD(6, q, 64);
    TILE_LOAD(4, x, CPU_BLOCK);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, sums, 64);
    if (s->planes == 1) return;
    TILE_LOAD(5, x + s->n * CPU_BLOCK, CPU_BLOCK);
    _tile_zero(1);
    _tile_dpbssd(1, 5, 6);
    _tile_stored(1, sums + SUMS, 64);
}

CPU_INLINE vf sum_at(const struct shape *s, const int32_t *sums, int t) {
    vi v = vi_load(sums + t * CPU_ROWS);
    if (s->planes == 2) v = vi_add(vi_load(sums + SUMS + t * CPU_ROWS), vi_shl(v, 8));
    return vf_from_int(v);
}

/* A unit's factors: d and, for Q4_K and Q5_K, dmin. */
struct factors {
    vf d, dmin;
};

CPU_INLINE void load_factors(const struct shape *s, const uint8_t *w, struct factors *f) {
    if (s->format == CPU_Q8_0) {
        f->d = vf_load(w + CPU_Q8_0_D);
        return;
    }
    const int at = s->format == CPU_Q5_K ? CPU_Q5_K_D : CPU_Q4_K_D;
    f->d = vf_from_f16(w + at);
    f->dmin = vf_from_f16(w + at + 32);
}

/* The block's share of acc, as cpu_dot.h has it. */
CPU_INLINE void add(const struct shape *s, const struct place *p, const struct factors *f,
                    const int32_t *sums, vf *acc) {
    struct tile_block x = tile_block_at(p->x, s->planes, s->n);
    if (s->format == CPU_Q8_0) {
        CPU_UNROLL
        for (int t = 0; t < s->n; t++)
            acc[t] = vf_fma(vf_mul(sum_at(s, sums, t), vf_set1(x.scale[t])), f->d, acc[t]);
        return;
    }
    const bool five = s->format == CPU_Q5_K;
    const uint8_t *sc = p->w + (five ? CPU_Q5_K_SC : CPU_Q4_K_SC) + 16 * p->block;
    const uint8_t *m = p->w + (five ? CPU_Q5_K_M : CPU_Q4_K_M) + 16 * p->block;
    vf scale = vf_mul(f->d, vf_from_int(vi_from_u8(sc)));
    vf min = vf_mul(f->dmin, vf_from_int(vi_from_u8(m)));
    CPU_UNROLL
    for (int t = 0; t < s->n; t++) {
        acc[t] = vf_fma(vf_mul(sum_at(s, sums, t), vf_set1(x.scale[t])), scale, acc[t]);
        acc[t] = vf_fnma(min, vf_set1(x.sum[t]), acc[t]);
    }
}

CPU_INLINE void dot(const struct cpu_dot *job, const struct tile_config *config,
                    const struct shape *s) {
    _Alignas(64) uint8_t weights[RING][CPU_BLOCK * CPU_ROWS];
    _Alignas(64) int32_t sums[RING * 2 * SUMS];
    const int block_sums = s->planes * SUMS;
    const int32_t n_blocks = job->n_units * s->unit_blocks, n = job->n_tiles * n_blocks;
    struct place at[3];
    CPU_UNROLL
    for (int i = 0; i < 3; i++) at[i] = (struct place){job->w, job->x, 0, n_blocks};
    struct factors f = {vf_zero(), vf_zero()};
    float *out = job->out;
    vf acc[CPU_TILE];
    CPU_UNROLL
    for (int t = 0; t < s->n; t++) acc[t] = vf_zero();
    if (configured != config) {
        _tile_loadconfig(config);
        configured = config;
    }
    for (int32_t first = 0; first < n + 2 * GROUP; first += GROUP) {
        for (int32_t i = first; i < first + GROUP && i < n; i++) {
            unpack(job, s, &at[0], weights[i % RING]);
            advance(&at[0], s, job, n_blocks);
        }
        if (first < GROUP) continue;
        for (int32_t i = first - GROUP; i < first && i < n; i++) {
            multiply(s, at[1].x, weights[i % RING], sums + i % RING * block_sums);
            advance(&at[1], s, job, n_blocks);
        }
        if (first < 2 * GROUP) continue;
        for (int32_t i = first - 2 * GROUP; i < first - GROUP && i < n; i++) {
            if (at[2].block == 0) load_factors(s, at[2].w, &f);
            add(s, &at[2], &f, sums + i % RING * block_sums, acc);
            advance(&at[2], s, job, n_blocks);
            if (at[2].left < n_blocks) continue;
            store_tile(acc, out, job->stride, s->n);
            out += CPU_ROWS;
            CPU_UNROLL
            for (int t = 0; t < s->n; t++) acc[t] = vf_zero();
        }
    }
}

/* ---- one function per format, planes and tile width -------------------------------------------
 *
 * From the width on at which they are faster than vectors: 6 with two planes, 9 with one. */

#define AMX_WIDTHS_2(M, name, format)                                                              \
    M(name, format, 2, 6) M(name, format, 2, 7) M(name, format, 2, 8)
#define AMX_WIDTHS(M, name, format, planes)                                                        \
    M(name, format, planes, 9)                                                                     \
    M(name, format, planes, 10)                                                                    \
    M(name, format, planes, 11)                                                                    \
    M(name, format, planes, 12)                                                                    \
    M(name, format, planes, 13)                                                                    \
    M(name, format, planes, 14) M(name, format, planes, 15) M(name, format, planes, 16)
#define AMX_FORMAT(M, name, format)                                                                \
    AMX_WIDTHS(M, name, format, 1) AMX_WIDTHS_2(M, name, format) AMX_WIDTHS(M, name, format, 2)
#define AMX_FORMATS(M)                                                                             \
    AMX_FORMAT(M, q4_k, CPU_Q4_K) AMX_FORMAT(M, q5_k, CPU_Q5_K) AMX_FORMAT(M, q8_0, CPU_Q8_0)
#define AMX_DOT(name, format, planes, n)                                                           \
    static void k_dot_##name##_##planes##_##n(const struct cpu_dot *job) {                         \
        const struct shape s = shape_of(format, planes, n);                                        \
        dot(job, &configs[n], &s);                                                                 \
    }
AMX_FORMATS(AMX_DOT)

static struct cpu_kernels kernels; /* written once */
static bool available;

static bool has_amx(void) {
    unsigned a, b, c, d;
    const unsigned wanted = 1u << 24 | 1u << 25; /* AMX-TILE, AMX-INT8 */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted;
}

/* Linux hands out the tile registers on request, for the whole process. Kernels before 5.16 refuse. */
static bool ask_for_tiles(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static void fill_table(void) {
    const struct cpu_kernels *avx512 = cpu_kernels_avx512();
    if (!avx512 || !has_amx() || !ask_for_tiles()) return;
    kernels = *avx512;
    kernels.name = "avx512-amx";
#define AMX_ENTRY(name, format, planes, n)                                                         \
    kernels.dot[format][planes - 1][n] = k_dot_##name##_##planes##_##n;
    AMX_FORMATS(AMX_ENTRY)
    available = true;
}
#endif

const struct cpu_kernels *cpu_kernels_amx(void) {
#if defined(__x86_64__)
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    if (available) return &kernels;
#endif
    return NULL;
}
