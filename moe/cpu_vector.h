/* cpu_vector: row-wise kernels, for both instruction sets. Included by the kernel files only. Every sum
 * runs over one row, sixteen lanes wide, in one fixed order. */
#ifndef MOED_MOE_CPU_VECTOR_H
#define MOED_MOE_CPU_VECTOR_H

#include "moe/cpu_kernels.h"
#include "moe/cpu_simd.h"

CPU_INLINE int lanes_left(int32_t n, int32_t i) { return n - i < 16 ? (int)(n - i) : 16; }

static void k_rms_norm(const float *x, const float *norm, float eps, int32_t n, float *y) {
    vf squares = vf_zero();
    for (int32_t i = 0; i < n; i += 16) {
        vf v = vf_load_n(x + i, lanes_left(n, i));
        squares = vf_fma(v, v, squares);
    }
    vf scale = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf_store_n(y + i, vf_mul(vf_mul(vf_load_n(x + i, l), scale), vf_load_n(norm + i, l)), l);
    }
}

/* Round to nearest. A block that holds NaN or infinity gets a scale that is not finite, so that the row's
 * products are not finite either. */
static void k_quantize(const float *x, int32_t n, int planes, uint8_t *tile, int t, int n_tokens) {
    const float limit = planes == 2 ? 32639.0f : 127.0f, tiny = 1e-30f;
    const size_t plane = (size_t)CPU_BLOCK * (size_t)n_tokens;
    const vi no_sign = vi_set1(0x7fffffff);
    for (int32_t i = 0; i < n; i += CPU_BLOCK) {
        vf x0 = vf_load(x + i), x1 = vf_load(x + i + 16);
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
        uint8_t *q = tile + CPU_BLOCK * t;
        if (planes == 2) {
            const vi half = vi_set1(128);
            vi_store_bytes(q, vi_sar(vi_add(q0, half), 8));
            vi_store_bytes(q + 16, vi_sar(vi_add(q1, half), 8));
            vi_store_bytes(q + plane, q0);
            vi_store_bytes(q + plane + 16, q1);
        } else {
            vi_store_bytes(q, q0);
            vi_store_bytes(q + 16, q1);
        }
        int32_t sum0 = vi_sum(q0), sum1 = vi_sum(q1);
        float *f = (float *)(void *)(tile + (size_t)planes * plane);
        f[t] = scale;
        f[n_tokens + t] = scale * (float)(sum0 + sum1);
        int32_t *offset = (int32_t *)(void *)(f + 2 * n_tokens);
        offset[t] = (int32_t)(-32u * (uint32_t)sum0);
        offset[n_tokens + t] = (int32_t)(-32u * (uint32_t)sum1);
        tile += cpu_tile_block_bytes(planes, n_tokens);
    }
}

static void k_silu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf g = vf_load_n(gate + i, l);
        vf e = vf_exp(vf_sub(vf_zero(), g));
        vf s = vf_div(g, vf_add(vf_set1(1.0f), e));
        vf_store_n(gate + i, vf_mul(s, vf_load_n(up + i, l)), l);
    }
}

static void k_add(float *x, const float *y, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf_store_n(x + i, vf_add(vf_load_n(x + i, l), vf_load_n(y + i, l)), l);
    }
}

static void k_combine(float *h, const float *y, size_t stride, const int32_t *rows,
                      const float *weights, int32_t k, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf sum = vf_zero();
        for (int32_t j = 0; j < k; j++)
            sum = vf_fma(vf_load_n(y + (size_t)rows[j] * stride + i, l), vf_set1(weights[j]), sum);
        vf_store_n(h + i, vf_add(vf_load_n(h + i, l), sum), l);
    }
}

static void k_divide(float *x, float sum, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        vf_store_n(x + i, vf_div(vf_load_n(x + i, l), vf_set1(sum)), l);
    }
}

static void k_rope(float *x, const float *cs, int32_t head_dim) {
    int32_t half = head_dim / 2;
    for (int32_t i = 0; i < half; i += 16) {
        int l = lanes_left(half, i);
        vf a = vf_load_n(x + i, l), b = vf_load_n(x + half + i, l);
        vf c = vf_load_n(cs + i, l), s = vf_load_n(cs + half + i, l);
        vf_store_n(x + i, vf_fnma(b, s, vf_mul(a, c)), l);
        vf_store_n(x + half + i, vf_fma(a, s, vf_mul(b, c)), l);
    }
}

static void k_to_f16(const float *x, int32_t n, uint16_t *dst, size_t stride) {
    for (int32_t i = 0; i < n; i += 16) {
        int l = lanes_left(n, i);
        uint16_t h[16];
        vf_to_f16(h, vf_load_n(x + i, l));
        if (stride == 1) {
            memcpy(dst + i, h, (size_t)l * sizeof *h);
        } else {
            for (int j = 0; j < l; j++) dst[(size_t)(i + j) * stride] = h[j];
        }
    }
}

#endif
