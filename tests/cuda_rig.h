/* cuda_rig: the reference backend and the CUDA backend side by side: the same weights, the same inputs, the same
 * step; and how far apart their results are. The reference sums in float64, so that what it gives for inputs that
 * f16 holds exactly is the oracle for a kernel's own error. Header-only, as model_rig.h. */
#ifndef MOED_TESTS_CUDA_RIG_H
#define MOED_TESTS_CUDA_RIG_H

#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda_backend.h"
#include "moe/quant.h"

enum { REF, GPU, N_BACKENDS };

struct pair {
    struct model_shape shape;
    struct moe_limits limits;
    struct backend *b[N_BACKENDS];
    uint64_t rng;
    int32_t *ids, *blocks; /* of the step at hand: CPU backends borrow them until it ends */
};

struct weights {
    struct weight *w[N_BACKENDS];
    int32_t n_rows, n_cols;
};

struct bufs {
    struct buf *b[N_BACKENDS];
    int32_t n_rows, n_cols;
};

#define pair_ops(p, i) backend_ops_of((p)->b[i])

/* Run one call on both backends, as in BOTH(p, i, pair_ops(p, i)->embed((p)->b[i], …)). */
#define BOTH(p, i, call)                                                                           \
    for (int i = 0; i < N_BACKENDS; i++) assert_int_equal((call), ST_OK)

static inline struct pair pair_open(const struct model_shape *shape,
                                    const struct moe_limits *limits) {
    struct pair p = {.shape = *shape, .limits = *limits, .rng = 1};
    struct backend_config c = {.shape = *shape,
                               .limits = *limits,
                               .n_threads = 1,
                               .cpu_isa = "auto",
                               .gpu_memory_utilization = 0.5};
    struct error e = {0};
    assert_ok(backend_reference_open(&c, &e, &p.b[REF]), &e);
    assert_ok(backend_cuda_open(&c, &e, &p.b[GPU]), &e);
    return p;
}

static inline void pair_ready(struct pair *p) {
    struct error e = {0};
    for (int i = 0; i < N_BACKENDS; i++) {
        int32_t n_blocks = 0;
        assert_ok(pair_ops(p, i)->ready(p->b[i], &e, &n_blocks), &e);
        assert_int_equal(n_blocks, p->limits.n_blocks);
    }
}

static inline void pair_close(struct pair *p) {
    for (int i = 0; i < N_BACKENDS; i++) pair_ops(p, i)->close(p->b[i]);
}

/* ---- weights ------------------------------------------------------------------------------------- */

static inline void put_f16(uint8_t *p, float f) {
    uint16_t h = f32_to_f16(f);
    memcpy(p, &h, sizeof h);
}

/* One block of random weights, all of its bits in use; values up to a few times 0.1 * size. */
static inline void random_block(uint64_t *rng, enum tensor_type type, float size, uint8_t *p,
                                int n_bytes) {
    float d = size * test_uniform(rng, 0.5f, 1.5f);
    for (int i = 0; i < n_bytes; i++) p[i] = (uint8_t)(test_random(rng) >> 32);
    switch (type) {
    case TENSOR_F32: {
        float f = test_uniform(rng, -0.2f, 0.2f) * size;
        memcpy(p, &f, sizeof f);
        break;
    }
    case TENSOR_F16: put_f16(p, test_uniform(rng, -0.2f, 0.2f) * size); break;
    case TENSOR_BF16: {
        float f = test_uniform(rng, -0.2f, 0.2f) * size;
        memcpy(p, (const uint8_t *)&f + 2, 2);
        break;
    }
    case TENSOR_Q8_0: put_f16(p, d * 0.0015f); break;
    case TENSOR_Q4_K:
    case TENSOR_Q5_K:
        put_f16(p, d * 0.0004f);
        put_f16(p + 2, d * 0.003f);
        break;
    case TENSOR_Q6_K: put_f16(p + 208, (p[0] & 1 ? -d : d) * 0.00005f); break;
    }
}

struct memory_source {
    uint8_t *p;
    size_t n;
};

static inline enum status memory_read(void *ctx, size_t offset, void *dst, size_t n) {
    const struct memory_source *m = ctx;
    CHECK(offset <= m->n && n <= m->n - offset);
    memcpy(dst, m->p + offset, n);
    return ST_OK;
}

static inline struct weights pair_weights(struct pair *p, enum tensor_type type, int32_t n_experts,
                                          int32_t n_rows, int32_t n_cols, float size) {
    struct weights w = {.n_rows = n_rows, .n_cols = n_cols};
    struct memory_source m;
    int32_t per_block, block_bytes;
    size_t n = (size_t)n_experts * (size_t)n_rows * (size_t)n_cols;
    assert_true(tensor_type_bytes(type, n, &m.n) &&
                tensor_type_block(type, &per_block, &block_bytes));
    m.p = malloc(m.n);
    for (size_t at = 0; at < m.n; at += (size_t)block_bytes)
        random_block(&p->rng, type, size, m.p + at, block_bytes);
    struct weight_source s = {.name = "w",
                              .type = type,
                              .n_experts = n_experts,
                              .n_rows = n_rows,
                              .n_cols = n_cols,
                              .n_bytes = m.n,
                              .read = memory_read,
                              .ctx = &m};
    struct error e = {0};
    for (int i = 0; i < N_BACKENDS; i++)
        assert_ok(pair_ops(p, i)->weight_load(p->b[i], &s, &e, &w.w[i]), &e);
    free(m.p);
    return w;
}

/* A norm's vector: around 1. */
static inline struct weights pair_norm(struct pair *p, int32_t n) {
    struct weights w = {.n_rows = 1, .n_cols = n};
    float *v = malloc((size_t)n * sizeof *v);
    for (int32_t i = 0; i < n; i++) v[i] = test_uniform(&p->rng, 0.5f, 1.5f);
    struct memory_source m = {(uint8_t *)v, (size_t)n * sizeof *v};
    struct weight_source s = {.name = "norm",
                              .type = TENSOR_F32,
                              .n_experts = 1,
                              .n_rows = 1,
                              .n_cols = n,
                              .n_bytes = m.n,
                              .read = memory_read,
                              .ctx = &m};
    struct error e = {0};
    for (int i = 0; i < N_BACKENDS; i++)
        assert_ok(pair_ops(p, i)->weight_load(p->b[i], &s, &e, &w.w[i]), &e);
    free(v);
    return w;
}

/* ---- buffers --------------------------------------------------------------------------------------- */

static inline struct bufs pair_bufs(struct pair *p, enum buf_rows rows, enum buf_kind kind,
                                    int32_t n_cols) {
    struct bufs f = {.n_cols = n_cols};
    f.n_rows = rows == BUF_HEAD     ? p->limits.max_rows
               : rows == BUF_TOKENS ? p->limits.max_batch_tokens
                                    : p->limits.max_batch_tokens * p->shape.n_experts_used;
    BOTH(p, i, pair_ops(p, i)->buf_create(p->b[i], rows, kind, n_cols, &f.b[i]));
    return f;
}

/* n rows of values that f16 holds exactly, with a heavy tail and, in some rows, a few outliers; every other row of
 * the buffer is NaN. */
static inline void pair_fill(struct pair *p, const struct bufs *f, int32_t n, float size) {
    float *v = malloc((size_t)f->n_rows * (size_t)f->n_cols * sizeof *v);
    for (int32_t r = 0; r < f->n_rows; r++) {
        for (int32_t c = 0; c < f->n_cols; c++) {
            float x = test_uniform(&p->rng, -1.0f, 1.0f);
            x *= x * x * size;
            if (r % 3 == 1 && test_random(&p->rng) % 100 == 0) x *= 30.0f;
            v[(size_t)r * (size_t)f->n_cols + (size_t)c] = r < n ? f16_to_f32(f32_to_f16(x)) : NAN;
        }
    }
    BOTH(p, i, pair_ops(p, i)->buf_write(p->b[i], f->b[i], 0, f->n_rows, v));
    free(v);
}

static inline float *pair_read(struct pair *p, int i, const struct bufs *f, int32_t n) {
    float *v = malloc((size_t)n * (size_t)f->n_cols * sizeof *v);
    assert_int_equal(pair_ops(p, i)->buf_read(p->b[i], f->b[i], 0, n, v), ST_OK);
    return v;
}

/* The largest normalised mean square error of a row, sum (a - b)² / sum b², of the first n rows; a value that is not
 * finite fails the test, and so does a row beyond n that was written (they were NaN). */
static inline double pair_error(struct pair *p, const struct bufs *f, int32_t n) {
    float *a = pair_read(p, GPU, f, f->n_rows), *b = pair_read(p, REF, f, f->n_rows);
    double worst = 0;
    size_t cols = (size_t)f->n_cols;
    for (int32_t r = 0; r < f->n_rows; r++) {
        double error = 0, square = 0;
        for (size_t c = 0; c < cols; c++) {
            double x = (double)a[(size_t)r * cols + c], y = (double)b[(size_t)r * cols + c];
            if (r >= n) {
                if (!isnan(x)) fail_msg("row %d of %d, column %zu was written", (int)r, (int)n, c);
                continue;
            }
            if (!isfinite(x)) fail_msg("row %d, column %zu is not finite", (int)r, c);
            error += (x - y) * (x - y);
            square += y * y;
        }
        if (r < n && square > 0 && error / square > worst) worst = error / square;
    }
    free(a);
    free(b);
    return worst;
}

/* ---- steps ------------------------------------------------------------------------------------------- */

/* A step of n tokens in one sequence, slot 0, from position `start`; the pool's blocks in falling order; ops run one
 * by one. */
static inline void pair_begin(struct pair *p, int32_t start, int32_t n, enum moe_rows rows) {
    int32_t b = p->limits.block_tokens, n_blocks = (start + n + b - 1) / b;
    p->ids = calloc((size_t)n, sizeof *p->ids);
    p->blocks = calloc((size_t)n_blocks, sizeof *p->blocks);
    for (int32_t i = 0; i < n; i++)
        p->ids[i] = (int32_t)(test_random(&p->rng) % (uint64_t)p->shape.n_vocab);
    for (int32_t i = 0; i < n_blocks; i++) p->blocks[i] = p->limits.n_blocks - 1 - i;
    struct moe_step_seq seq = {
        .start_pos = start, .n_tokens = n, .n_blocks = n_blocks, .rows = rows};
    struct moe_step step = {
        .n_seqs = 1, .n_tokens = n, .seqs = &seq, .ids = p->ids, .blocks = p->blocks};
    for (int i = 0; i < N_BACKENDS; i++) {
        bool issue = true;
        assert_int_equal(pair_ops(p, i)->step_begin(p->b[i], &step, &issue), ST_OK);
        assert_true(issue);
    }
}

static inline void pair_end(struct pair *p) {
    struct moe_row *rows = calloc((size_t)p->limits.max_rows, sizeof *rows);
    for (int i = 0; i < N_BACKENDS; i++) {
        struct moe_result result = {.rows = rows};
        assert_int_equal(pair_ops(p, i)->step_end(p->b[i]), ST_OK);
        assert_int_equal(pair_ops(p, i)->step_collect(p->b[i], &result), ST_OK);
    }
    free(rows);
    free(p->ids);
    free(p->blocks);
}

#endif
