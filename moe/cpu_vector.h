/* cpu_vector: row-wise kernels, for both instruction sets. Included by the kernel files only. Every sum
 * runs over one row, sixteen lanes wide, in one fixed order. */
#ifndef MOED_MOE_CPU_VECTOR_H
#define MOED_MOE_CPU_VECTOR_H

#include <float.h>

#include "moe/cpu_kernels.h"
#include "moe/cpu_simd.h"

CPU_INLINE int lanes_left(int32_t n, int32_t i) { return n - i < 16 ? (int)(n - i) : 16; }

/* Only the last vector of a row pays for a mask. */
CPU_INLINE vf load_l(const float *p, int l) { return l == 16 ? vf_load(p) : vf_load_n(p, l); }
CPU_INLINE void store_l(float *p, vf x, int l) {
    if (l == 16)
        vf_store(p, x);
    else
        vf_store_n(p, x, l);
}

static void k_rms_norm(const float *x, const float *norm, float eps, int32_t n, float *y) {
    vf squares[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    int32_t k = 0;
    for (; k + 64 <= n; k += 64) {
        CPU_UNROLL
        for (int j = 0; j < 4; j++) {
            vf v = vf_load(x + k + 16 * j);
            squares[j] = vf_fma(v, v, squares[j]);
        }
    }
    for (; k < n; k += 16) {
        vf v = load_l(x + k, lanes_left(n, k));
        squares[0] = vf_fma(v, v, squares[0]);
    }
    vf sum = vf_add(vf_add(squares[0], squares[1]), vf_add(squares[2], squares[3]));
    vf scale = vf_set1(1.0f / sqrtf(vf_sum(sum) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        store_l(y + i, vf_mul(vf_mul(load_l(x + i, l), scale), load_l(norm + i, l)), l);
    }
}

/* A block to column t of a tile's block of n. Round to nearest. If it holds NaN or infinity its scale is not
 * finite, so that the row's products are not finite either. */
CPU_INLINE void quantize_32(const float *x, int planes, uint8_t *block, int t, int n) {
    const float limit = planes == 2 ? 32639.0f : 127.0f, tiny = 1e-30f;
    const size_t plane = (size_t)CPU_BLOCK * (size_t)n;
    const vi no_sign = vi_set1(0x7fffffff);
    vf x0 = vf_load(x), x1 = vf_load(x + 16);
    /* As integers, so that NaN is the largest. */
    int32_t bits = vi_max_lane(vi_max(vi_and(vf_bits(x0), no_sign), vi_and(vf_bits(x1), no_sign)));
    float max, scale = 0, inverse = 0;
    memcpy(&max, &bits, sizeof max);
    if (!(max < tiny)) {
        scale = max / limit;
        inverse = limit / max;
    }
    vi q0 = vf_to_int(vf_mul(x0, vf_set1(inverse)));
    vi q1 = vf_to_int(vf_mul(x1, vf_set1(inverse)));
    uint8_t *q = block + CPU_BLOCK * t;
    const __m256i one = _mm256_set1_epi8(1);
    __m256i low = vi_bytes(q0, q1), sums = _mm256_setzero_si256();
    if (planes == 2) {
        const vi half = vi_set1(128);
        __m256i high = vi_bytes(vi_sar(vi_add(q0, half), 8), vi_sar(vi_add(q1, half), 8));
        sums = _mm256_slli_epi32(dot_half(sums, one, high), 8);
        _mm256_storeu_si256((__m256i *)(void *)q, high);
        q += plane;
    }
    _mm256_storeu_si256((__m256i *)(void *)q, low);
    int32_t sum0, sum1;
    sum_quarters(dot_half(sums, one, low), &sum0, &sum1);
    float *f = (float *)(void *)(block + (size_t)planes * plane);
    f[t] = scale;
    f[n + t] = scale * (float)(sum0 + sum1);
    int32_t *offset = (int32_t *)(void *)(f + 2 * n);
    offset[t] = -32 * sum0;
    offset[n + t] = -32 * sum1;
}

static void k_quantize(const float *x, int32_t n, int planes, uint8_t *tile, int t, int n_tokens) {
    const size_t block = cpu_tile_block_bytes(planes, n_tokens);
    if (planes == 2)
        for (int32_t i = 0; i < n; i += CPU_BLOCK, tile += block)
            quantize_32(x + i, 2, tile, t, n_tokens);
    else
        for (int32_t i = 0; i < n; i += CPU_BLOCK, tile += block)
            quantize_32(x + i, 1, tile, t, n_tokens);
}

static void k_quantize_row(const float *x, int32_t n, int planes, uint8_t *row) {
    k_quantize(x, n, planes, row, 0, 1);
}

static void k_quantize_block(const float *x, int n_rows, int32_t block, int32_t n, int planes,
                             uint8_t *rows) {
    const size_t bytes = cpu_tile_block_bytes(planes, 1), stride = (size_t)(n / CPU_BLOCK) * bytes;
    rows += (size_t)block * bytes;
    if (planes == 2)
        for (int i = 0; i < n_rows; i++)
            quantize_32(x + i * CPU_BLOCK, 2, rows + (size_t)i * stride, 0, 1);
    else
        for (int i = 0; i < n_rows; i++)
            quantize_32(x + i * CPU_BLOCK, 1, rows + (size_t)i * stride, 0, 1);
}

/* The quantised row's blocks to column t. */
CPU_INLINE void insert_blocks(const uint8_t *row, int32_t n_blocks, int planes, uint8_t *tile,
                              int t, int n) {
    const size_t plane = (size_t)CPU_BLOCK * (size_t)n, word = 4 * (size_t)n;
    for (int32_t i = 0; i < n_blocks; i++) {
        uint8_t *q = tile + CPU_BLOCK * t, *tail = tile + (size_t)planes * plane + 4 * t;
        CPU_UNROLL
        for (int p = 0; p < planes; p++)
            memcpy(q + (size_t)p * plane, row + p * CPU_BLOCK, CPU_BLOCK);
        CPU_UNROLL
        for (int j = 0; j < 4; j++)
            memcpy(tail + (size_t)j * word, row + planes * CPU_BLOCK + 4 * j, 4);
        row += cpu_tile_block_bytes(planes, 1);
        tile += cpu_tile_block_bytes(planes, n);
    }
}

static void k_gather(const uint8_t *const *rows, int n_tokens, int32_t n, int planes,
                     uint8_t *tile) {
    for (int t = 0; t < n_tokens; t++)
        if (planes == 2)
            insert_blocks(rows[t], n / CPU_BLOCK, 2, tile, t, n_tokens);
        else
            insert_blocks(rows[t], n / CPU_BLOCK, 1, tile, t, n_tokens);
}

CPU_INLINE vf silu(vf g) { return vf_div(g, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), g)))); }

static void k_silu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        store_l(gate + i, vf_mul(silu(load_l(gate + i, l)), load_l(up + i, l)), l);
    }
}

static void k_add(float *x, const float *y, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        store_l(x + i, vf_add(load_l(x + i, l), load_l(y + i, l)), l);
    }
}

static void k_combine(const struct cpu_combine *m) {
    for (int32_t i = 0; i < m->n; i += 16) {
        int l = lanes_left(m->n, i);
        vf sum = vf_zero();
        for (int32_t j = 0; j < m->k; j++) {
            const float *y = m->y + (size_t)m->rows[j] * m->stride + i;
            sum = vf_fma(load_l(y, l), vf_set1(m->weights[j]), sum);
        }
        store_l(m->h + i, vf_add(load_l(m->h + i, l), sum), l);
    }
}

static void k_divide(float *x, float sum, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        store_l(x + i, vf_div(load_l(x + i, l), vf_set1(sum)), l);
    }
}

static int32_t k_largest(const float *x, int32_t n) {
    const vi no_sign = vi_set1(0x7fffffff);
    vf best = vf_set1(-INFINITY);
    vi where = vi_zero(), bits = vi_zero(), lane = vi_lanes();
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf v = l == 16 ? vf_load(x + i) : vf_first(vf_load_n(x + i, l), vf_set1(-FLT_MAX), l);
        bits = vi_max(bits, vi_and(vf_bits(v), no_sign));
        where = vi_where_greater(v, best, vi_add(lane, vi_set1(i)), where);
        best = vf_max(v, best);
    }
    if (vi_max_lane(bits) >= 0x7f800000) return -1;
    float values[16];
    int32_t ids[16];
    vf_store(values, best);
    vi_store(ids, where);
    int32_t token = ids[0];
    float max = values[0];
    for (int j = 1; j < 16; j++) {
        if (values[j] < max || (values[j] == max && ids[j] > token)) continue;
        max = values[j];
        token = ids[j];
    }
    return token;
}

static void k_rope(float *x, const float *cs, int32_t head_dim) {
    int32_t half = head_dim / 2;
    for (int32_t i = 0; i < half; i += 16) {
        int l = lanes_left(half, i);
        vf a = load_l(x + i, l), b = load_l(x + half + i, l);
        vf c = load_l(cs + i, l), s = load_l(cs + half + i, l);
        store_l(x + i, vf_fnma(b, s, vf_mul(a, c)), l);
        store_l(x + half + i, vf_fma(a, s, vf_mul(b, c)), l);
    }
}

static void k_to_f16(const float *x, int32_t n, uint16_t *dst, size_t stride) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        uint16_t h[16];
        vf_to_f16(h, load_l(x + i, l));
        if (stride == 1) {
            memcpy(dst + i, h, (size_t)l * sizeof *h);
        } else {
            for (int j = 0; j < l; j++) dst[(size_t)(i + j) * stride] = h[j];
        }
    }
}

#endif
