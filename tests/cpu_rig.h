/* cpu_rig: weights in the CPU kernels' layouts and inputs for them, for the tests of kernels. Header-only. */
#ifndef MOED_TESTS_CPU_RIG_H
#define MOED_TESTS_CPU_RIG_H

#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/cpu_kernels.h"
#include "moe/cpu_repack.h"

#define U 0x1p-24 /* of float32's rounding */

static const enum tensor_type types[] = {TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K, TENSOR_Q8_0,
                                         TENSOR_F32,  TENSOR_F16,  TENSOR_BF16};
enum { N_TYPES = sizeof types / sizeof *types, N_QUANT_TYPES = 4 };

/* ---- inputs ------------------------------------------------------------------------------------- */

static inline float gauss(uint64_t *seed) {
    float a = test_uniform(seed, 1e-7f, 1), b = test_uniform(seed, 0, 1);
    return sqrtf(-2 * logf(a)) * cosf(6.2831853f * b);
}

/* Gaussian; Gaussian with twelve outliers of 30; heavy-tailed and lopsided like SwiGLU's product. */
enum { N_KINDS = 3 };
static inline void fill_input(int kind, uint64_t *seed, int32_t n, float *x) {
    for (int32_t i = 0; i < n; i++) {
        float g = gauss(seed);
        x[i] = kind == 2 ? g / (1 + expf(-2 * g)) * gauss(seed) : g;
    }
    for (int i = 0; kind == 1 && i < 12; i++) x[test_random(seed) % (uint64_t)n] = 30 * gauss(seed);
}

/* Random GGUF bytes of a type with finite scales of about 1/64. */
static inline uint8_t *random_rows(enum tensor_type type, size_t n_weights, uint64_t *seed) {
    size_t n_bytes;
    int32_t bw, bb;
    assert_true(tensor_type_bytes(type, n_weights, &n_bytes));
    assert_true(tensor_type_block(type, &bw, &bb));
    uint8_t *p = malloc(n_bytes);
    for (size_t i = 0; i < n_bytes; i++) p[i] = (uint8_t)test_random(seed);
    for (size_t at = 0; at < n_bytes; at += (size_t)bb) {
        float a = test_uniform(seed, -1, 1) / 64, b = test_uniform(seed, 0, 1) / 64;
        uint16_t h[2] = {f32_to_f16(a), f32_to_f16(b)};
        if (type == TENSOR_F32)
            memcpy(p + at, &a, 4);
        else if (type == TENSOR_F16)
            memcpy(p + at, h, 2);
        else if (type == TENSOR_BF16)
            p[at + 1] = (uint8_t)((p[at + 1] & 0x81) | 0x3c);
        else if (type == TENSOR_Q6_K)
            memcpy(p + at + 208, h, 2);
        else if (type == TENSOR_Q8_0)
            memcpy(p + at, h, 2);
        else
            memcpy(p + at, h, 4);
    }
    return p;
}

struct matrix {
    struct cpu_matrix m;
    float *w; /* [n_experts][n_rows][n_cols] by dequantize */
};

static inline struct matrix make_matrix(enum tensor_type type, int32_t n_experts, int32_t n_rows,
                                        int32_t n_cols, uint64_t *seed) {
    struct matrix x;
    assert_true(cpu_matrix_plan(type, n_experts, n_rows, n_cols, &x.m));
    size_t n = (size_t)n_experts * (size_t)n_rows * (size_t)n_cols;
    uint8_t *raw = random_rows(type, n, seed);
    x.w = malloc(n * sizeof *x.w);
    dequantize(type, raw, n, x.w);
    x.m.p = aligned_alloc(64, (x.m.n_bytes + 63) / 64 * 64);
    memset(x.m.p, 0xff, x.m.n_bytes);
    for (int32_t e = 0; e < n_experts; e++)
        for (int32_t t = 0; t < x.m.n_tiles; t++) {
            int32_t row = t * CPU_ROWS, left = n_rows - row;
            cpu_repack_tile(&x.m, raw + ((size_t)e * (size_t)n_rows + (size_t)row) * x.m.row_bytes,
                            left < CPU_ROWS ? left : CPU_ROWS, cpu_matrix_tile(&x.m, e, t));
        }
    free(raw);
    return x;
}

/* One row tile by a tile of n tokens; out[t][16]. */
static inline void run_dot(cpu_dot_fn *dot, const struct cpu_matrix *m, int32_t tile,
                           const uint8_t *x, int n, float *out) {
    const uint8_t *w = cpu_matrix_tile(m, 0, tile);
    dot(&(struct cpu_dot){w, w, 1, m->n_units, x, n, out, CPU_ROWS});
}

static inline void free_matrix(struct matrix *x) {
    free(x->m.p);
    free(x->w);
}

#endif
