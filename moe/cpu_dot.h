/* cpu_dot: products of a weight row tile with a tile of tokens, for both instruction sets. Included by the
 * kernel files only; see cpu_kernels.h for layouts.
 *
 * In each block of 32 columns the weights are unpacked once, to eight vectors of unsigned bytes (vector
 * g holds columns 4g … 4g + 3 of row r in lane r), and stay in registers for all tokens of the tile. */
#ifndef MOED_MOE_CPU_DOT_H
#define MOED_MOE_CPU_DOT_H

#include "moe/cpu_block.h"

enum { CPU_VECTOR_TILE = 16 }; /* tokens: as many as there are registers for their sums */

/* How many of a tile's tokens have their sums under way together. One sum is a chain of dependent
 * products, each of which waits for the last: a scheduler of a hundred entries must find several chains in it
 * to keep two multipliers busy, so they are written one product of each after the other. Limited by
 * registers. */
#if defined(__AVX512F__)
enum { CHAINS = 4 };
#else
enum { CHAINS = 1 };
#endif

/* For tokens t … t + n - 1: s[i] += sum over vectors g in [first, first + count) of w[g] times the token's
 * columns 4g … 4g + 3, both planes. s is in units of the low plane. */
CPU_INLINE void dot_groups(vi *s, const vi *w, const struct tile_block *x, int t, int n, int first,
                           int count) {
    const uint8_t *q = x->q + t * CPU_BLOCK, *low = q + x->n * CPU_BLOCK;
    vi h[CHAINS];
    CPU_UNROLL
    for (int i = 0; i < n; i++) h[i] = vi_zero();
    CPU_UNROLL
    for (int g = first; g < first + count; g++) {
        CPU_UNROLL
        for (int i = 0; i < n; i++) {
            const uint8_t *at = q + i * CPU_BLOCK + 4 * g;
            if (x->planes == 1) {
                s[i] = vi_dot(s[i], w[g], broadcast4(at));
                continue;
            }
            h[i] = vi_dot(h[i], w[g], broadcast4(at));
            s[i] = vi_dot(s[i], w[g], broadcast4(low + i * CPU_BLOCK + 4 * g));
        }
    }
    if (x->planes == 1) return;
    CPU_UNROLL
    for (int i = 0; i < n; i++) s[i] = vi_add(s[i], vi_shl(h[i], 8));
}

enum { CHAINS_1 = CHAINS, CHAINS_2 = CHAINS / 2 > 0 ? CHAINS / 2 : 1 };

/* call(t, m) for the tokens of a tile of n in groups of m, all of them constants. */
#define FOR_TOKENS(planes, n, call)                                                                \
    do {                                                                                           \
        const int most_ = (planes) == 2 ? CHAINS_2 : CHAINS_1;                                     \
        CPU_UNROLL                                                                                 \
        for (int t_ = 0; t_ + most_ <= (n); t_ += most_) call(t_, most_);                          \
        if ((n) % most_ != 0) call((n) - (n) % most_, (n) % most_);                                \
    } while (0)

/* One block's share of tokens t … t + m - 1. */
CPU_INLINE void add_scale_min(vf *acc, const vi *q, const struct tile_block *x, int t, int m,
                              vf scale, vf min) {
    vi s[CHAINS];
    CPU_UNROLL
    for (int i = 0; i < m; i++) s[i] = vi_zero();
    dot_groups(s, q, x, t, m, 0, 8);
    CPU_UNROLL
    for (int i = t; i < t + m; i++) {
        acc[i] = vf_fma(vf_mul(vf_from_int(s[i - t]), vf_set1(x->scale[i])), scale, acc[i]);
        acc[i] = vf_fnma(min, vf_set1(x->sum[i]), acc[i]);
    }
}

CPU_INLINE void add_q6_k(vf *acc, const vi *q, const struct tile_block *x, int t, int m, vf scale0,
                         vf scale1) {
    vi s0[CHAINS], s1[CHAINS];
    CPU_UNROLL
    for (int i = 0; i < m; i++) {
        s0[i] = vi_set1(x->offset[t + i]);
        s1[i] = vi_set1(x->offset[x->n + t + i]);
    }
    dot_groups(s0, q, x, t, m, 0, 4);
    dot_groups(s1, q, x, t, m, 4, 4);
    CPU_UNROLL
    for (int i = t; i < t + m; i++) {
        vf y = vf_mul(vf_from_int(s0[i - t]), scale0);
        y = vf_fma(vf_from_int(s1[i - t]), scale1, y);
        acc[i] = vf_fma(y, vf_set1(x->scale[i]), acc[i]);
    }
}

CPU_INLINE void add_q8_0(vf *acc, const vi *q, const struct tile_block *x, int t, int m, vf d) {
    vi s[CHAINS];
    CPU_UNROLL
    for (int i = 0; i < m; i++)
        s[i] = vi_shl(vi_set1(x->offset[t + i] + x->offset[x->n + t + i]), 2);
#if defined(__AVX512F__)
    dot_groups(s, q, x, t, m, 0, 8);
#else
    vi half[8], s_high = vi_zero();
    CPU_UNROLL
    for (int g = 0; g < 8; g++) half[g] = vi_and(q[g], vi_set1(0x0f0f0f0f));
    dot_groups(s, half, x, t, m, 0, 8);
    CPU_UNROLL
    for (int g = 0; g < 8; g++) half[g] = vi_and(vi_shr(q[g], 4), vi_set1(0x0f0f0f0f));
    dot_groups(&s_high, half, x, t, m, 0, 8);
    s[0] = vi_add(s[0], vi_shl(s_high, 4));
#endif
    CPU_UNROLL
    for (int i = t; i < t + m; i++)
        acc[i] = vf_fma(vf_mul(vf_from_int(s[i - t]), vf_set1(x->scale[i])), d, acc[i]);
}

/* One row tile each; they return where the next one begins.
 *
 * Q4_K and Q5_K: y = (d * sc) * q - (dmin * m). */
CPU_INLINE const uint8_t *dot_scale_min(const struct cpu_dot *job, const uint8_t *w, float *out,
                                        int five, int planes, int n) {
    const uint8_t *x = job->x;
    const int sc_at = five ? CPU_Q5_K_SC : CPU_Q4_K_SC, m_at = five ? CPU_Q5_K_M : CPU_Q4_K_M;
    const int d_at = five ? CPU_Q5_K_D : CPU_Q4_K_D, unit = five ? CPU_Q5_K_UNIT : CPU_Q4_K_UNIT;
    vf acc[CPU_VECTOR_TILE];
    CPU_UNROLL
    for (int t = 0; t < n; t++) acc[t] = vf_zero();
    for (int32_t u = 0; u < job->n_units; u++, w += unit) {
        vf d = vf_from_f16(w + d_at), dmin = vf_from_f16(w + d_at + 32);
        for (int b = 0; b < QK_K / CPU_BLOCK; b++) {
            prefetch(job, w + b * unit / 8, five ? 6 : 5);
            vi q[8];
            unpack_scale_min(w, five, b, q);
            vf scale = vf_mul(d, vf_from_int(vi_from_u8(w + sc_at + 16 * b)));
            vf min = vf_mul(dmin, vf_from_int(vi_from_u8(w + m_at + 16 * b)));
            struct tile_block xb = tile_block_at(x, planes, n);
#define ADD_TOKENS(t, m) add_scale_min(acc, q, &xb, t, m, scale, min)
            FOR_TOKENS(planes, n, ADD_TOKENS);
#undef ADD_TOKENS
            x += cpu_tile_block_bytes(planes, n);
        }
    }
    store_tile(acc, out, job->stride, n);
    return w;
}

/* Q6_K: y = (d * sc) * (q - 32), a scale per 16 columns; the 32 is in the tile's offsets. */
CPU_INLINE const uint8_t *dot_q6_k(const struct cpu_dot *job, const uint8_t *w, float *out,
                                   int planes, int n) {
    const uint8_t *x = job->x;
    vf acc[CPU_VECTOR_TILE];
    CPU_UNROLL
    for (int t = 0; t < n; t++) acc[t] = vf_zero();
    for (int32_t u = 0; u < job->n_units; u++, w += CPU_Q6_K_UNIT) {
        vf d = vf_load(w + CPU_Q6_K_D);
        for (int b = 0; b < QK_K / CPU_BLOCK; b++) {
            prefetch(job, w + b * CPU_Q6_K_UNIT / 8, 7);
            vi q[8];
            unpack_q6_k(w, b, q);
            const uint8_t *sc = w + CPU_Q6_K_SC + 32 * b;
            vf scale0 = vf_mul(d, vf_from_int(vi_from_i8(sc)));
            vf scale1 = vf_mul(d, vf_from_int(vi_from_i8(sc + 16)));
            struct tile_block xb = tile_block_at(x, planes, n);
#define ADD_TOKENS(t, m) add_q6_k(acc, q, &xb, t, m, scale0, scale1)
            FOR_TOKENS(planes, n, ADD_TOKENS);
#undef ADD_TOKENS
            x += cpu_tile_block_bytes(planes, n);
        }
    }
    store_tile(acc, out, job->stride, n);
    return w;
}

/* Q8_0: y = d * (q - 128). AVX2's byte product needs its unsigned side below 128: there the byte goes in
 * two halves of 4 bits. */
CPU_INLINE const uint8_t *dot_q8_0(const struct cpu_dot *job, const uint8_t *w, float *out,
                                   int planes, int n) {
    const uint8_t *x = job->x;
    vf acc[CPU_VECTOR_TILE];
    CPU_UNROLL
    for (int t = 0; t < n; t++) acc[t] = vf_zero();
    for (int32_t u = 0; u < job->n_units; u++, w += CPU_Q8_0_UNIT) {
        prefetch(job, w, CPU_Q8_0_UNIT / 64);
        vf d = vf_load(w + CPU_Q8_0_D);
        vi q[8];
        CPU_UNROLL
        for (int g = 0; g < 8; g++) q[g] = vi_load(w + 64 * g);
        struct tile_block xb = tile_block_at(x, planes, n);
#define ADD_TOKENS(t, m) add_q8_0(acc, q, &xb, t, m, d)
        FOR_TOKENS(planes, n, ADD_TOKENS);
#undef ADD_TOKENS
        x += cpu_tile_block_bytes(planes, n);
    }
    store_tile(acc, out, job->stride, n);
    return w;
}

CPU_INLINE vf load_float_unit(const uint8_t *w, int format) {
    if (format == CPU_F32) return vf_load(w);
    if (format == CPU_F16) return vf_from_f16(w);
    return vf_from_bf16(w);
}

/* One row tile. Four partial sums per row and token, by column modulo 4, to keep the multipliers busy. */
CPU_INLINE void dot_float(const struct cpu_dot_float *job, int format, int n) {
    const size_t unit = CPU_ROWS * (format == CPU_F32 ? 4 : 2);
    const float *x = job->x;
    const uint8_t *w = job->w;
    vf acc[4][4];
    CPU_UNROLL
    for (int i = 0; i < 16; i++) acc[i / 4][i % 4] = vf_zero();
    int32_t k = 0;
    for (; k + 4 <= job->n_cols; k += 4, x += 4) {
        CPU_UNROLL
        for (int j = 0; j < 4; j++, w += unit) {
            vf row = load_float_unit(w, format);
            CPU_UNROLL
            for (int t = 0; t < n; t++)
                acc[t][j] =
                    vf_fma(row, vf_set1(x[(size_t)t * job->x_stride + (size_t)j]), acc[t][j]);
        }
    }
    for (; k < job->n_cols; k++, x++, w += unit) {
        vf row = load_float_unit(w, format);
        CPU_UNROLL
        for (int t = 0; t < n; t++)
            acc[t][0] = vf_fma(row, vf_set1(x[(size_t)t * job->x_stride]), acc[t][0]);
    }
    CPU_UNROLL
    for (int t = 0; t < n; t++)
        vf_store(job->out + (size_t)t * job->stride,
                 vf_add(vf_add(acc[t][0], acc[t][1]), vf_add(acc[t][2], acc[t][3])));
}

/* ---- one function per format, planes and tile width ------------------------------------------- */

#define CPU_DOT_WIDTHS_4(M, name, planes)                                                          \
    M(name, planes, 1) M(name, planes, 2) M(name, planes, 3) M(name, planes, 4)
#if defined(__AVX512F__)
#define CPU_DOT_WIDTHS(M, name, planes)                                                            \
    CPU_DOT_WIDTHS_4(M, name, planes)                                                              \
    M(name, planes, 5)                                                                             \
    M(name, planes, 6)                                                                             \
    M(name, planes, 7)                                                                             \
    M(name, planes, 8) M(name, planes, 9) M(name, planes, 10) M(name, planes, 11)                  \
        M(name, planes, 12) M(name, planes, 13) M(name, planes, 14) M(name, planes, 15)            \
            M(name, planes, 16)
#else /* 16 registers hold no more */
#define CPU_DOT_WIDTHS CPU_DOT_WIDTHS_4
#endif
#define CPU_DOT(name, planes, n, call)                                                             \
    static void k_dot_##name##_##planes##_##n(const struct cpu_dot *job) {                         \
        const uint8_t *w = job->w;                                                                 \
        float *out = job->out;                                                                     \
        for (int32_t i = 0; i < job->n_tiles; i++, out += CPU_ROWS) w = call;                      \
    }
#define CPU_DOT_Q4_K(name, planes, n)                                                              \
    CPU_DOT(name, planes, n, dot_scale_min(job, w, out, 0, planes, n))
#define CPU_DOT_Q5_K(name, planes, n)                                                              \
    CPU_DOT(name, planes, n, dot_scale_min(job, w, out, 1, planes, n))
#define CPU_DOT_Q6_K(name, planes, n) CPU_DOT(name, planes, n, dot_q6_k(job, w, out, planes, n))
#define CPU_DOT_Q8_0(name, planes, n) CPU_DOT(name, planes, n, dot_q8_0(job, w, out, planes, n))
CPU_DOT_WIDTHS(CPU_DOT_Q4_K, q4_k, 1)
CPU_DOT_WIDTHS(CPU_DOT_Q4_K, q4_k, 2)
CPU_DOT_WIDTHS(CPU_DOT_Q5_K, q5_k, 1)
CPU_DOT_WIDTHS(CPU_DOT_Q5_K, q5_k, 2)
CPU_DOT_WIDTHS(CPU_DOT_Q6_K, q6_k, 1)
CPU_DOT_WIDTHS(CPU_DOT_Q6_K, q6_k, 2)
CPU_DOT_WIDTHS(CPU_DOT_Q8_0, q8_0, 1)
CPU_DOT_WIDTHS(CPU_DOT_Q8_0, q8_0, 2)

#define CPU_DOT_FLOAT(name, format, n)                                                             \
    static void k_dot_##name##_##n(const struct cpu_dot_float *job) { dot_float(job, format, n); }
#define CPU_DOT_FLOATS(name, format)                                                               \
    CPU_DOT_FLOAT(name, format, 1)                                                                 \
    CPU_DOT_FLOAT(name, format, 2) CPU_DOT_FLOAT(name, format, 3) CPU_DOT_FLOAT(name, format, 4)
CPU_DOT_FLOATS(f32, CPU_F32)
CPU_DOT_FLOATS(f16, CPU_F16)
CPU_DOT_FLOATS(bf16, CPU_BF16)

#define CPU_DOT_ENTRY(name, planes, n) [n] = k_dot_##name##_##planes##_##n,
#define CPU_DOT_ROW(name)                                                                          \
    {                                                                                              \
        {CPU_DOT_WIDTHS(CPU_DOT_ENTRY, name, 1)}, { CPU_DOT_WIDTHS(CPU_DOT_ENTRY, name, 2) }       \
    }
#define CPU_DOT_TABLE                                                                              \
    { CPU_DOT_ROW(q4_k), CPU_DOT_ROW(q5_k), CPU_DOT_ROW(q6_k), CPU_DOT_ROW(q8_0) }
#define CPU_DOT_FLOAT_ROW(name)                                                                    \
    { k_dot_##name##_1, k_dot_##name##_2, k_dot_##name##_3, k_dot_##name##_4 }
#define CPU_DOT_FLOAT_TABLE                                                                        \
    { CPU_DOT_FLOAT_ROW(f32), CPU_DOT_FLOAT_ROW(f16), CPU_DOT_FLOAT_ROW(bf16) }

#endif
