/* See cpu_kernels.h: the table for avx512 with products of several tokens by AMX.
 *
 * A block's eight vectors of unpacked weights are the tile multiplier's right side as they stand: 8 rows of
 * 4 columns by 16 matrix rows. The left side is the block's activations, a token per row. The product is the
 * block's exact integer sums [token][row], which are scaled and added exactly as cpu_dot.h does it, in the
 * same order: the bits are those of the other kernels, at every width.
 *
 * A block passes through three stages, each `lag` blocks behind the one before: unpack, multiply,
 * add. What one stage stores the next would otherwise load before it has left the store buffer, and the
 * multiplier's latency would show. The stages run on over the ends of rows.
 *
 * Tiles are configured per call and released at its end, so that no thread that is between products carries
 * 8 KiB of tile registers through a context switch. */
#include "moe/cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "moe/cpu_block.h"

enum {
    AMX_LEAST = 4, /* tokens from which on AMX wins */
    MOST_LAG = 4,
    RING = 2 * MOST_LAG, /* blocks that two stages hold between them */
    SUMS = CPU_TILE * CPU_ROWS /* of one product */
};

/* What LDTILECFG reads. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
};

/* Tiles 0 … 3: sums; 4, 5: activations; 6, 7: weights. A product covers `groups` groups of 4 columns. */
#define TILE_CONFIG(n, groups)                                                                     \
    {                                                                                              \
        .palette = 1, .n_rows = {n, n, n, n, n, n, groups, groups}, .row_bytes = {                 \
            64,                                                                                    \
            64,                                                                                    \
            64,                                                                                    \
            64,                                                                                    \
            4 * (groups),                                                                          \
            4 * (groups),                                                                          \
            64,                                                                                    \
            64                                                                                     \
        }                                                                                          \
    }

/* GCC's tile loads do not tell the compiler that they read memory. */
#define TILE_LOAD(tile, p, stride)                                                                 \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_loadd(tile, p, stride);                                                              \
    } while (0)

/* How a format is multiplied. All of it is known at compile time. */
struct shape {
    enum cpu_format format;
    int planes, n;
    int halves; /* products per block and plane: 2 where 16 columns have a scale */
    int lag;
    int unit_bytes, unit_blocks;
};

CPU_INLINE struct shape shape_of(enum cpu_format format, int planes, int n) {
    static const int unit_bytes[] = {CPU_Q4_K_UNIT, CPU_Q5_K_UNIT, CPU_Q6_K_UNIT, CPU_Q8_0_UNIT};
    struct shape s = {format, planes, n, format == CPU_Q6_K ? 2 : 1, MOST_LAG, 0, 8};
    if (planes * s.halves == 4) s.lag = MOST_LAG / 2; /* the first-level cache holds no more */
    if (format == CPU_Q8_0) s.unit_blocks = 1;
    s.unit_bytes = unit_bytes[format];
    return s;
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
    } else if (s->format == CPU_Q6_K) {
        unpack_q6_k(p->w, p->block, q);
        CPU_UNROLL
        for (int g = 0; g < 8; g++) q[g] = _mm512_sub_epi8(q[g], _mm512_set1_epi8(32));
    } else {
        unpack_scale_min(p->w, s->format == CPU_Q5_K, p->block, q);
    }
    CPU_UNROLL
    for (int g = 0; g < 8; g++) vi_store(dst + 64 * g, q[g]);
}

/* sums[plane * halves + half][token][row] */
CPU_INLINE void multiply(const struct shape *s, const uint8_t *x, const uint8_t *q, int32_t *sums) {
    const uint8_t *low = x + s->n * CPU_BLOCK;
    TILE_LOAD(6, q, 64);
    TILE_LOAD(4, x, CPU_BLOCK);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, sums, 64);
    if (s->halves == 2) {
        TILE_LOAD(7, q + 256, 64);
        TILE_LOAD(5, x + CPU_BLOCK / 2, CPU_BLOCK);
        _tile_zero(1);
        _tile_dpbssd(1, 5, 7);
        _tile_stored(1, sums + SUMS, 64);
    }
    if (s->planes == 1) return;
    TILE_LOAD(4, low, CPU_BLOCK);
    _tile_zero(2);
    _tile_dpbssd(2, 4, 6);
    _tile_stored(2, sums + s->halves * SUMS, 64);
    if (s->halves == 2) {
        TILE_LOAD(5, low + CPU_BLOCK / 2, CPU_BLOCK);
        _tile_zero(3);
        _tile_dpbssd(3, 5, 7);
        _tile_stored(3, sums + 3 * SUMS, 64);
    }
}

CPU_INLINE vf sum_at(const struct shape *s, const int32_t *sums, int half, int t) {
    vi v = vi_load(sums + half * SUMS + t * CPU_ROWS);
    if (s->planes == 2)
        v = vi_add(vi_load(sums + (s->halves + half) * SUMS + t * CPU_ROWS), vi_shl(v, 8));
    return vf_from_int(v);
}

/* A unit's factors: d and, for Q4_K and Q5_K, dmin. */
struct factors {
    vf d, dmin;
};

CPU_INLINE void load_factors(const struct shape *s, const uint8_t *w, struct factors *f) {
    if (s->format == CPU_Q6_K || s->format == CPU_Q8_0) {
        f->d = vf_load(w + (s->format == CPU_Q6_K ? CPU_Q6_K_D : CPU_Q8_0_D));
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
            acc[t] = vf_fma(vf_mul(sum_at(s, sums, 0, t), vf_set1(x.scale[t])), f->d, acc[t]);
        return;
    }
    if (s->format == CPU_Q6_K) {
        const uint8_t *sc = p->w + CPU_Q6_K_SC + 32 * p->block;
        vf scale0 = vf_mul(f->d, vf_from_int(vi_from_i8(sc)));
        vf scale1 = vf_mul(f->d, vf_from_int(vi_from_i8(sc + 16)));
        CPU_UNROLL
        for (int t = 0; t < s->n; t++) {
            vf y = vf_mul(sum_at(s, sums, 0, t), scale0);
            y = vf_fma(sum_at(s, sums, 1, t), scale1, y);
            acc[t] = vf_fma(y, vf_set1(x.scale[t]), acc[t]);
        }
        return;
    }
    const bool five = s->format == CPU_Q5_K;
    const uint8_t *sc = p->w + (five ? CPU_Q5_K_SC : CPU_Q4_K_SC) + 16 * p->block;
    const uint8_t *m = p->w + (five ? CPU_Q5_K_M : CPU_Q4_K_M) + 16 * p->block;
    vf scale = vf_mul(f->d, vf_from_int(vi_from_u8(sc)));
    vf min = vf_mul(f->dmin, vf_from_int(vi_from_u8(m)));
    CPU_UNROLL
    for (int t = 0; t < s->n; t++) {
        acc[t] = vf_fma(vf_mul(sum_at(s, sums, 0, t), vf_set1(x.scale[t])), scale, acc[t]);
        acc[t] = vf_fnma(min, vf_set1(x.sum[t]), acc[t]);
    }
}

CPU_INLINE void dot(const struct cpu_dot *job, const struct tile_config *config,
                    const struct shape *s) {
    _Alignas(64) uint8_t weights[RING][CPU_BLOCK * CPU_ROWS];
    _Alignas(64) int32_t sums[RING * 2 * SUMS];
    const int mask = 2 * s->lag - 1, block_sums = s->planes * s->halves * SUMS;
    const int32_t n_blocks = job->n_units * s->unit_blocks, n = job->n_tiles * n_blocks;
    struct place at[3];
    CPU_UNROLL
    for (int i = 0; i < 3; i++) at[i] = (struct place){job->w, job->x, 0, n_blocks};
    struct factors f = {vf_zero(), vf_zero()};
    float *out = job->out;
    vf acc[CPU_TILE];
    CPU_UNROLL
    for (int t = 0; t < s->n; t++) acc[t] = vf_zero();
    _tile_loadconfig(config);
    for (int32_t i = 0; i < n + 2 * s->lag; i++) {
        if (i < n) {
            unpack(job, s, &at[0], weights[i & mask]);
            advance(&at[0], s, job, n_blocks);
        }
        if (i >= s->lag && i < n + s->lag) {
            int32_t k = (i - s->lag) & mask;
            multiply(s, at[1].x, weights[k], sums + k * block_sums);
            advance(&at[1], s, job, n_blocks);
        }
        if (i < 2 * s->lag) continue;
        if (at[2].block == 0) load_factors(s, at[2].w, &f);
        add(s, &at[2], &f, sums + (i & mask) * block_sums, acc);
        advance(&at[2], s, job, n_blocks);
        if (at[2].left < n_blocks) continue;
        store_tile(acc, out, job->stride, s->n);
        out += CPU_ROWS;
        CPU_UNROLL
        for (int t = 0; t < s->n; t++) acc[t] = vf_zero();
    }
    _tile_release();
}

/* ---- one function per format, planes and tile width ------------------------------------------- */

#define AMX_WIDTHS(M, name, format, planes)                                                        \
    M(name, format, planes, 4)                                                                     \
    M(name, format, planes, 5)                                                                     \
    M(name, format, planes, 6)                                                                     \
    M(name, format, planes, 7) M(name, format, planes, 8) M(name, format, planes, 9)               \
        M(name, format, planes, 10) M(name, format, planes, 11) M(name, format, planes, 12)        \
            M(name, format, planes, 13) M(name, format, planes, 14) M(name, format, planes, 15)    \
                M(name, format, planes, 16)
#define AMX_FORMATS(M)                                                                             \
    AMX_WIDTHS(M, q4_k, CPU_Q4_K, 1)                                                               \
    AMX_WIDTHS(M, q4_k, CPU_Q4_K, 2)                                                               \
    AMX_WIDTHS(M, q5_k, CPU_Q5_K, 1)                                                               \
    AMX_WIDTHS(M, q5_k, CPU_Q5_K, 2)                                                               \
    AMX_WIDTHS(M, q6_k, CPU_Q6_K, 1)                                                               \
    AMX_WIDTHS(M, q6_k, CPU_Q6_K, 2)                                                               \
    AMX_WIDTHS(M, q8_0, CPU_Q8_0, 1)                                                               \
    AMX_WIDTHS(M, q8_0, CPU_Q8_0, 2)
#define AMX_DOT(name, format, planes, n)                                                           \
    static void k_dot_##name##_##planes##_##n(const struct cpu_dot *job) {                         \
        static const struct tile_config config = TILE_CONFIG(n, format == CPU_Q6_K ? 4 : 8);       \
        const struct shape s = shape_of(format, planes, n);                                        \
        dot(job, &config, &s);                                                                     \
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
    if (n >= AMX_LEAST) kernels.dot[format][planes - 1][n] = k_dot_##name##_##planes##_##n;
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
