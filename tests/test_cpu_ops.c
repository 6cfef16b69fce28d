/* cpu ops: each op of the CPU backend against the reference backend on the same inputs, through backend.h, on
 * small models of awkward shapes and every weight type; and each op's rows, bit for bit, against the same rows
 * computed alone.
 *
 * Bounds on the normalised square error, from the step of what is quantised: in a block of 32 near-Gaussian values
 * the largest is below 4.5 sigma, so 8 bits give (4.5 / 127)² / 12 = 1.1e-4 and 16 bits 1.6e-9 of the input's
 * power, and the same of an output's. f16 keys and values: half a unit of 2^-11, so 2e-8 each, on scores that
 * are of order 1. What is float32 on both sides: 1e-11. With AMX the largest of
 * 256 values counts, which may be ten sigma: (10 / 1016)² / 12 = 8e-6, and before the head (10 / 127)² / 12 = 5.2e-4. */
#include "tests/amx_emulated.h"
#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/backend.h"
#include "moe/quant.h"

#define NMSE_FLOAT 1e-11
#define NMSE_16 2e-9
#define NMSE_8 1.2e-4
#define NMSE_11 8e-6
#define NMSE_8_OF_256 5.2e-4
#define NMSE_KV 1e-6

enum { MAX_T = 65, N_SEQS = 4, BLOCKS_PER_SEQ = 24 };

/* ---- models ----------------------------------------------------------------------------------- */

struct model_case {
    const char *name;
    struct model_shape shape;
    int32_t block_tokens;
    enum tensor_type q, k, v, out, up, down, head, embed;
    bool exact_up, exact_down; /* float types there: nothing is quantised */
};

static const struct model_case cases[] = {
    {.name = "k-quants",
     .shape = {2, 256, 4, 2, 64, 8, 3, 256, 300, 4096, 1e-6f, 1e6f},
     .block_tokens = 16,
     .q = TENSOR_Q4_K,
     .k = TENSOR_Q5_K,
     .v = TENSOR_Q6_K,
     .out = TENSOR_Q4_K,
     .up = TENSOR_Q4_K,
     .down = TENSOR_Q6_K,
     .head = TENSOR_Q6_K,
     .embed = TENSOR_Q4_K},
    {.name = "Q8_0 and a wide head, blocks of 64",
     .shape = {2, 96, 6, 2, 80, 5, 2, 160, 77, 4096, 1e-5f, 1e4f},
     .block_tokens = 64,
     .q = TENSOR_Q8_0,
     .k = TENSOR_Q8_0,
     .v = TENSOR_F16,
     .out = TENSOR_Q8_0,
     .up = TENSOR_Q8_0,
     .down = TENSOR_Q8_0,
     .head = TENSOR_Q8_0,
     .embed = TENSOR_F16},
    {.name = "floats of odd widths, blocks of 4",
     .shape = {1, 50, 3, 1, 22, 7, 7, 37, 41, 4096, 1e-6f, 1e6f},
     .block_tokens = 4,
     .q = TENSOR_F32,
     .k = TENSOR_F16,
     .v = TENSOR_BF16,
     .out = TENSOR_F32,
     .up = TENSOR_BF16,
     .down = TENSOR_F16,
     .head = TENSOR_BF16,
     .embed = TENSOR_F32,
     .exact_up = true,
     .exact_down = true},
    {.name = "float experts behind quantised ones, blocks of 1",
     .shape = {1, 256, 2, 2, 32, 4, 1, 64, 64, 4096, 1e-6f, 1e6f},
     .block_tokens = 1,
     .q = TENSOR_Q5_K,
     .k = TENSOR_F32,
     .v = TENSOR_Q8_0,
     .out = TENSOR_F16,
     .up = TENSOR_Q5_K,
     .down = TENSOR_F32,
     .head = TENSOR_F32,
     .embed = TENSOR_Q8_0,
     .exact_down = true},
};
enum { N_CASES = sizeof cases / sizeof *cases };

struct model {
    struct backend *b;
    const struct backend_ops *ops;
    struct weight *norm, *q, *k, *v, *q_norm, *k_norm, *out, *router, *gate, *up, *down, *head,
        *embed;
    struct buf *h, *qb, *kb, *vb, *attn, *x, *act, *y, *logits;
};

struct bytes_source {
    uint8_t *p;
    size_t n;
};

static enum status read_bytes(void *ctx, size_t offset, void *dst, size_t n) {
    const struct bytes_source *s = ctx;
    assert_true(offset <= s->n && n <= s->n - offset);
    memcpy(dst, s->p + offset, n);
    return ST_OK;
}

static float gauss(uint64_t *seed) {
    float a = test_uniform(seed, 1e-7f, 1), b = test_uniform(seed, 0, 1);
    return sqrtf(-2 * logf(a)) * cosf(6.2831853f * b);
}

/* Random weights: quantised bits are uniform, scales random; float types are Gaussian. */
static void random_weights(enum tensor_type type, uint64_t *seed, struct bytes_source *s) {
    int32_t bw, bb;
    assert_true(tensor_type_block(type, &bw, &bb));
    for (size_t i = 0; i < s->n; i++) s->p[i] = (uint8_t)test_random(seed);
    for (size_t at = 0; at < s->n; at += (size_t)bb) {
        float g = gauss(seed) / 16;
        uint16_t d[2] = {f32_to_f16(g / 32), f32_to_f16(test_uniform(seed, 0, 1.0f / 16))}, bf;
        uint32_t bits;
        memcpy(&bits, &g, 4);
        bf = (uint16_t)(bits >> 16);
        switch (type) {
        case TENSOR_F32: memcpy(s->p + at, &g, 4); break;
        case TENSOR_F16:
            d[0] = f32_to_f16(g);
            memcpy(s->p + at, d, 2);
            break;
        case TENSOR_BF16: memcpy(s->p + at, &bf, 2); break;
        case TENSOR_Q6_K: memcpy(s->p + at + 208, d, 2); break;
        case TENSOR_Q8_0: memcpy(s->p + at, d, 2); break;
        case TENSOR_Q4_K:
        case TENSOR_Q5_K: memcpy(s->p + at, d, 4); break;
        }
    }
}

static struct weight *load(struct model *ms, int n_models, int which, enum tensor_type type,
                           int32_t n_experts, int32_t n_rows, int32_t n_cols) {
    uint64_t seed = (uint64_t)which * 1000 + 17;
    struct bytes_source s;
    assert_true(tensor_type_bytes(type, (size_t)n_experts * (size_t)n_rows * (size_t)n_cols, &s.n));
    s.p = malloc(s.n);
    random_weights(type, &seed, &s);
    struct weight *w[3] = {NULL};
    for (int i = 0; i < n_models; i++) {
        struct error e = {0};
        struct weight_source src = {.name = "w",
                                    .type = type,
                                    .n_experts = n_experts,
                                    .n_rows = n_rows,
                                    .n_cols = n_cols,
                                    .n_bytes = s.n,
                                    .read = read_bytes,
                                    .ctx = &s};
        assert_ok(ms[i].ops->weight_load(ms[i].b, &src, &e, &w[i]), &e);
        memcpy((uint8_t *)&ms[i] + offsetof(struct model, norm) + (size_t)which * sizeof *w, &w[i],
               sizeof *w);
    }
    free(s.p);
    return w[0];
}

static void open_models(const struct model_case *c, struct model *ms, int n, const char *isa) {
    const struct model_shape *s = &c->shape;
    struct backend_config config = {
        .shape = *s,
        .limits = {.max_batch_tokens = MAX_T,
                   .max_seqs = N_SEQS,
                   .max_rows = MAX_T,
                   .max_seq_tokens = 4096,
                   .block_tokens = c->block_tokens,
                   .n_blocks = N_SEQS * BLOCKS_PER_SEQ * 64 / c->block_tokens},
        .n_threads = 3,
        .cpu_isa = isa};
    for (int i = 0; i < n; i++) {
        struct error e = {0};
        if (i == 0 && n == 2)
            assert_ok(backend_reference_open(&config, &e, &ms[i].b), &e);
        else
            assert_ok(backend_cpu_open(&config, &e, &ms[i].b), &e);
        ms[i].ops = backend_ops_of(ms[i].b);
    }
    int32_t qd = s->n_heads * s->head_dim, kd = s->n_kv_heads * s->head_dim, d = s->n_embd;
    load(ms, n, 0, TENSOR_F32, 1, 1, d);
    load(ms, n, 1, c->q, 1, qd, d);
    load(ms, n, 2, c->k, 1, kd, d);
    load(ms, n, 3, c->v, 1, kd, d);
    load(ms, n, 4, TENSOR_F32, 1, 1, s->head_dim);
    load(ms, n, 5, TENSOR_F32, 1, 1, s->head_dim);
    load(ms, n, 6, c->out, 1, d, qd);
    load(ms, n, 7, TENSOR_F32, 1, s->n_experts, d);
    load(ms, n, 8, c->up, s->n_experts, s->n_ff_expert, d);
    load(ms, n, 9, c->up, s->n_experts, s->n_ff_expert, d);
    load(ms, n, 10, c->down, s->n_experts, d, s->n_ff_expert);
    load(ms, n, 11, c->head, 1, s->n_vocab, d);
    load(ms, n, 12, c->embed, 1, s->n_vocab, d);
    for (int i = 0; i < n; i++) {
        struct model *m = &ms[i];
        struct error e = {0};
        int32_t n_blocks;
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_EXACT, d, &m->h), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_INNER, qd, &m->qb), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_INNER, kd, &m->kb), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_INNER, kd, &m->vb), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_INNER, qd, &m->attn), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_TOKENS, BUF_INNER, d, &m->x), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_ROUTED, BUF_INNER, s->n_ff_expert, &m->act),
                         ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_ROUTED, BUF_INNER, d, &m->y), ST_OK);
        assert_int_equal(m->ops->buf_create(m->b, BUF_HEAD, BUF_EXACT, s->n_vocab, &m->logits),
                         ST_OK);
        assert_ok(m->ops->ready(m->b, &e, &n_blocks), &e);
        assert_int_equal(n_blocks, config.limits.n_blocks);
    }
}

static void close_models(struct model *ms, int n) {
    for (int i = 0; i < n; i++) ms[i].ops->close(ms[i].b);
}

/* ---- steps --------------------------------------------------------------------------------------- */

/* Sequence s of the step has n[s] tokens from start[s]; blocks of a sequence lie apart and in falling order. */
static void begin(struct model *m, const struct model_case *c, const int32_t *start,
                  const int32_t *n, enum moe_rows rows) {
    static int32_t blocks[N_SEQS * BLOCKS_PER_SEQ * 64], ids[MAX_T];
    struct moe_step_seq seqs[N_SEQS];
    struct moe_step step = {.seqs = seqs, .ids = ids, .blocks = blocks};
    int32_t at = 0, per_seq = BLOCKS_PER_SEQ * 64 / c->block_tokens;
    for (int32_t s = 0; s < N_SEQS; s++) {
        if (n[s] == 0) continue;
        int32_t n_blocks = (start[s] + n[s] + c->block_tokens - 1) / c->block_tokens;
        seqs[step.n_seqs++] = (struct moe_step_seq){s, start[s], n[s], n_blocks, rows};
        for (int32_t i = 0; i < n_blocks; i++) blocks[at++] = (s + 1) * per_seq - 1 - i;
        for (int32_t i = 0; i < n[s]; i++)
            ids[step.n_tokens++] = (7 * (start[s] + i) + 31 * s) % c->shape.n_vocab;
    }
    bool issue = false;
    assert_int_equal(m->ops->step_begin(m->b, &step, &issue), ST_OK);
    assert_true(issue);
}

static void end(struct model *m) {
    static struct moe_row rows[MAX_T];
    struct moe_result r = {.rows = rows};
    /* Every step ends with a sample op or has no rows. */
    assert_int_equal(m->ops->step_end(m->b), ST_OK);
    assert_int_equal(m->ops->step_collect(m->b, &r), ST_OK);
}

static void write(struct model *m, struct buf *b, int32_t n, int32_t cols, uint64_t seed,
                  float size) {
    float *x = malloc((size_t)n * (size_t)cols * sizeof *x);
    for (int32_t i = 0; i < n * cols; i++) x[i] = gauss(&seed) * size;
    assert_int_equal(m->ops->buf_write(m->b, b, 0, n, x), ST_OK);
    free(x);
}

static float *read(struct model *m, const struct buf *b, int32_t n, int32_t cols) {
    float *x = malloc((size_t)n * (size_t)cols * sizeof *x);
    assert_int_equal(m->ops->buf_read(m->b, b, 0, n, x), ST_OK);
    return x;
}

#define FIELD(m, offset) (*(struct buf **)(void *)((uint8_t *)(m) + (offset)))

/* NMSE of a buffer of ms[1] against ms[0], of what an op added to `base` (NULL: all). */
static void compare(struct model *ms, size_t field, int32_t n, int32_t cols, double bound) {
    float *a = read(&ms[0], FIELD(&ms[0], field), n, cols);
    float *b = read(&ms[1], FIELD(&ms[1], field), n, cols);
    double error = 0, power = 0;
    for (int32_t i = 0; i < n * cols; i++) {
        error += ((double)b[i] - (double)a[i]) * ((double)b[i] - (double)a[i]);
        power += (double)a[i] * (double)a[i];
    }
    if (!(error <= bound * power))
        fail_msg("buffer at %zu: error %.2e, bound %.2e", field, error / power, bound);
    assert_true(power > 0);
    free(a);
    free(b);
}
#define COMPARE(field, n, cols, bound) compare(ms, offsetof(struct model, field), n, cols, bound)

/* The same op on n models. */
#define BOTH(n, call)                                                                              \
    for (int i_ = 0; i_ < (n); i_++) {                                                             \
        struct model *m = &ms[i_];                                                                 \
        assert_int_equal((call), ST_OK);                                                           \
    }

static void check_case(const struct model_case *c, const char *isa) {
    const struct model_shape *s = &c->shape;
    struct model ms[2];
    open_models(c, ms, 2, isa);
    int32_t qd = s->n_heads * s->head_dim, kd = s->n_kv_heads * s->head_dim, d = s->n_embd;
    int32_t f = s->n_ff_expert, k = s->n_experts_used;
    bool exact_dense = c->q == TENSOR_F32;
    bool amx = strcmp(isa, "amx") == 0;
    double nmse_16 = amx ? NMSE_11 : NMSE_16, nmse_up = amx ? NMSE_11 : NMSE_8;
    double dense = exact_dense ? NMSE_FLOAT : nmse_16;
    int32_t start[N_SEQS] = {0, 0, 0, 0}, n[N_SEQS];
    BOTH(2, m->ops->kv_poison(m->b, 0xff));
    for (int round = 0; round < 6; round++) {
        /* Chunks, then decoding beside chunks; sequence 3 joins late; up to 3 splits of context. */
        static const int32_t plan[6][N_SEQS] = {{40, 1, 17, 0}, {25, 20, 20, 0}, {1, 1, 62, 1},
                                                {1, 33, 1, 30}, {64, 1, 0, 0},   {1, 1, 1, 1}};
        int32_t t = 0;
        for (int i = 0; i < N_SEQS; i++) t += n[i] = plan[round][i];
        uint64_t seed = 100 + (uint64_t)round * 10;
        for (int i = 0; i < 2; i++) begin(&ms[i], c, start, n, MOE_ROWS_ALL);
        BOTH(2, m->ops->embed(m->b, &(struct op_embed){m->embed, m->h}));
        COMPARE(h, t, d, 0);
        for (int i = 0; i < 2; i++) write(&ms[i], ms[i].h, t, d, seed, 3);
        BOTH(2, m->ops->norm_linear(m->b, &(struct op_norm_linear){.x = m->h,
                                                                   .norm = m->norm,
                                                                   .eps = s->norm_eps,
                                                                   .n_out = 3,
                                                                   .w = {m->q, m->k, m->v},
                                                                   .out = {m->qb, m->kb, m->vb}}));
        COMPARE(qb, t, qd, dense);
        COMPARE(kb, t, kd, c->k == TENSOR_F32 ? NMSE_FLOAT : dense);
        COMPARE(vb, t, kd, dense);

        for (int i = 0; i < 2; i++) {
            write(&ms[i], ms[i].qb, t, qd, seed + 1, 2);
            write(&ms[i], ms[i].kb, t, kd, seed + 2, 2);
            write(&ms[i], ms[i].vb, t, kd, seed + 3, 2);
        }
        int layer = s->n_layers - 1;
        BOTH(2, m->ops->rope_store(m->b, &(struct op_rope_store){.layer = layer,
                                                                 .q = m->qb,
                                                                 .k = m->kb,
                                                                 .v = m->vb,
                                                                 .q_norm = m->q_norm,
                                                                 .k_norm = m->k_norm,
                                                                 .eps = s->norm_eps}));
        COMPARE(qb, t, qd, NMSE_FLOAT);
        BOTH(2, m->ops->attention(m->b, &(struct op_attention){layer, m->qb, m->attn}));
        COMPARE(attn, t, qd, NMSE_KV);

        for (int i = 0; i < 2; i++) write(&ms[i], ms[i].attn, t, qd, seed + 4, 1);
        for (int i = 0; i < 2; i++) write(&ms[i], ms[i].h, t, d, seed + 5, 0.01f);
        BOTH(2, m->ops->linear_add(m->b, &(struct op_linear_add){m->attn, m->out, m->h}));
        COMPARE(h, t, d, c->out == TENSOR_F32 || c->out == TENSOR_F16 ? NMSE_FLOAT : nmse_16);

        for (int i = 0; i < 2; i++) write(&ms[i], ms[i].h, t, d, seed + 6, 2);
        BOTH(2, m->ops->route(m->b, &(struct op_route){.h = m->h,
                                                       .norm = m->norm,
                                                       .eps = s->norm_eps,
                                                       .router = m->router,
                                                       .renormalize = round % 2 == 0,
                                                       .x = m->x}));
        COMPARE(x, t, d, NMSE_FLOAT);
        int32_t ids[2][MAX_T * 8], first[2][9];
        float weights[2][MAX_T * 8];
        for (int i = 0; i < 2; i++)
            assert_int_equal(ms[i].ops->route_read(ms[i].b, ids[i], weights[i], first[i]), ST_OK);
        for (int32_t i = 0; i < t * k; i++) {
            assert_int_equal(ids[0][i], ids[1][i]);
            assert_true(fabsf(weights[0][i] - weights[1][i]) < 1e-5f);
        }
        assert_memory_equal(first[0], first[1], ((size_t)s->n_experts + 1) * sizeof(int32_t));
        if (round == 4) { /* all tokens to the last experts, the others empty */
            for (int32_t i = 0; i < t * k; i++) ids[0][i] = s->n_experts - 1 - i % k;
            BOTH(2, m->ops->route_write(m->b, ids[0], weights[0]));
        }
        BOTH(2, m->ops->experts_up(m->b, &(struct op_experts_up){0, m->x, m->gate, m->up, m->act}));
        /* gate and up both carry the error, and silu's slope is at most 1.1. */
        COMPARE(act, t * k, f, c->exact_up ? NMSE_FLOAT * 4 : nmse_up * 2.2);
        for (int i = 0; i < 2; i++) {
            write(&ms[i], ms[i].act, t * k, f, seed + 7, 1);
            write(&ms[i], ms[i].h, t, d, seed + 8, 0.01f);
        }
        BOTH(2,
             m->ops->experts_down(m->b, &(struct op_experts_down){0, m->act, m->down, m->y, m->h}));
        COMPARE(h, t, d, c->exact_down ? NMSE_FLOAT : nmse_16);

        for (int i = 0; i < 2; i++) write(&ms[i], ms[i].h, t, d, seed + 9, 2);
        BOTH(2,
             m->ops->head(m->b, &(struct op_head){m->h, m->norm, s->norm_eps, m->head, m->logits}));
        COMPARE(logits, t, s->n_vocab,
                c->head == TENSOR_F32 || c->head == TENSOR_BF16 ? NMSE_FLOAT
                : amx                                           ? NMSE_8_OF_256
                                                                : NMSE_8);
        BOTH(2, m->ops->sample(m->b, &(struct op_sample){m->logits}));
        for (int i = 0; i < 2; i++) end(&ms[i]);
        for (int i = 0; i < N_SEQS; i++) start[i] += n[i];
    }
    struct moe_counters a, b;
    ms[0].ops->counters(ms[0].b, &a);
    ms[1].ops->counters(ms[1].b, &b);
    assert_int_equal(a.expert_reads, b.expert_reads);
    assert_int_equal(a.expert_reads_ungrouped, b.expert_reads_ungrouped);
    assert_int_equal(b.n_steps, 6);
    assert_int_equal(a.n_tokens, b.n_tokens);
    assert_true(b.busy_ns > 0);
    close_models(ms, 2);
}

static void test_against_reference(void **state) {
    (void)state;
    static const char *const isas[] = {"avx2", "avx512", "amx"};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        struct backend *b;
        struct error e;
        struct backend_config config = {
            .shape = cases[0].shape, .limits = {.max_seqs = 1}, .n_threads = 1, .cpu_isa = isas[i]};
        amx_emulate = strcmp(isas[i], "amx") == 0;
        if (backend_cpu_open(&config, &e, &b) != ST_OK) {
            print_message("%s: %s\n", isas[i], e.text);
            assert_int_equal(e.code, ST_UNSUPPORTED);
            continue;
        }
        char text[64];
        backend_ops_of(b)->describe(b, text, sizeof text);
        backend_ops_of(b)->close(b);
        for (int k = 0; k < N_CASES; k++) {
            print_message("%s: %s\n", text, cases[k].name);
            check_case(&cases[k], isas[i]);
        }
    }
}

/* ---- rows alone --------------------------------------------------------------------------------------- */

/* T tokens at once against each alone: the experts' ops under a given routing, and the dense ones. */
static void check_alone(const struct model_case *c, struct model *m, int32_t t, bool one_expert) {
    const struct model_shape *s = &c->shape;
    int32_t d = s->n_embd, k = s->n_experts_used, qd = s->n_heads * s->head_dim, v = s->n_vocab;
    int32_t zero[N_SEQS] = {0}, n[N_SEQS] = {t, 0, 0, 0}, one[N_SEQS] = {1, 0, 0, 0};
    int32_t ids[MAX_T * 8];
    float weights[MAX_T * 8];
    uint64_t seed = (uint64_t)t;
    for (int32_t i = 0; i < t; i++) {
        int32_t first = one_expert ? 1 : (int32_t)(test_random(&seed) % (uint64_t)s->n_experts);
        for (int32_t j = 0; j < k; j++) {
            ids[i * k + j] = (first + j) % s->n_experts;
            weights[i * k + j] = test_uniform(&seed, 0, 1);
        }
    }
    float *all_q = NULL, *all_h = NULL, *all_logits = NULL;
    float *in = malloc((size_t)t * (size_t)d * sizeof *in);
    for (int32_t i = 0; i < t * d; i++) in[i] = gauss(&seed);
    for (int32_t pass = -1; pass < t; pass++) {
        int32_t rows = pass < 0 ? t : 1, at = pass < 0 ? 0 : pass;
        begin(m, c, zero, pass < 0 ? n : one, MOE_ROWS_ALL);
        assert_int_equal(m->ops->buf_write(m->b, m->h, 0, rows, in + (size_t)at * (size_t)d),
                         ST_OK);
        assert_int_equal(m->ops->buf_write(m->b, m->x, 0, rows, in + (size_t)at * (size_t)d),
                         ST_OK);
        struct op_norm_linear qkv = {.x = m->h,
                                     .norm = m->norm,
                                     .eps = s->norm_eps,
                                     .n_out = 1,
                                     .w = {m->q},
                                     .out = {m->qb}};
        assert_int_equal(m->ops->norm_linear(m->b, &qkv), ST_OK);
        assert_int_equal(m->ops->linear_add(m->b, &(struct op_linear_add){m->qb, m->out, m->h}),
                         ST_OK);
        assert_int_equal(m->ops->route_write(m->b, ids + (size_t)at * (size_t)k,
                                             weights + (size_t)at * (size_t)k),
                         ST_OK);
        assert_int_equal(
            m->ops->experts_up(m->b, &(struct op_experts_up){0, m->x, m->gate, m->up, m->act}),
            ST_OK);
        assert_int_equal(
            m->ops->experts_down(m->b, &(struct op_experts_down){0, m->act, m->down, m->y, m->h}),
            ST_OK);
        assert_int_equal(
            m->ops->head(m->b, &(struct op_head){m->h, m->norm, s->norm_eps, m->head, m->logits}),
            ST_OK);
        float *q = read(m, m->qb, rows, qd), *h = read(m, m->h, rows, d),
              *logits = read(m, m->logits, rows, v);
        assert_int_equal(m->ops->sample(m->b, &(struct op_sample){m->logits}), ST_OK);
        end(m);
        if (pass < 0) {
            all_q = q;
            all_h = h;
            all_logits = logits;
            continue;
        }
        assert_memory_equal(q, all_q + (size_t)at * (size_t)qd, (size_t)qd * sizeof *q);
        assert_memory_equal(h, all_h + (size_t)at * (size_t)d, (size_t)d * sizeof *h);
        assert_memory_equal(logits, all_logits + (size_t)at * (size_t)v, (size_t)v * sizeof *h);
        free(q);
        free(h);
        free(logits);
    }
    free(all_q);
    free(all_h);
    free(all_logits);
    free(in);
}

static void test_rows_alone(void **state) {
    (void)state;
    for (int k = 0; k < 2 * N_CASES; k++) { /* with and without AMX's kernels */
        const struct model_case *c = &cases[k / 2];
        struct model m;
        amx_emulate = k % 2 == 1 && amx_emulated();
        open_models(c, &m, 1, amx_emulate ? "amx" : cpu_kernels_avx512() ? "avx512" : "avx2");
        for (int32_t t = 1; t <= MAX_T; t += t < 20 ? 1 : 9) {
            check_alone(c, &m, t, false);
            check_alone(c, &m, t, true);
        }
        close_models(&m, 1);
    }
}

/* ---- opening --------------------------------------------------------------------------------------------- */

static void test_opening(void **state) {
    (void)state;
    amx_emulate = false;
    struct error e = {0};
    struct backend *b = (struct backend *)&e;
    struct backend_config config = {
        .shape = cases[0].shape, .limits = {.max_seqs = 1}, .n_threads = 2, .cpu_isa = "sse9"};
    assert_int_equal(backend_cpu_open(&config, &e, &b), ST_UNSUPPORTED);
    assert_null(b);
    assert_non_null(strstr(e.text, "sse9"));
    config.cpu_isa = "auto";
    assert_ok(backend_cpu_open(&config, &e, &b), &e);
    char text[64];
    backend_ops_of(b)->describe(b, text, sizeof text);
    /* The best that this processor has. */
    const struct cpu_kernels *best = cpu_kernels_amx();
    if (!best) best = cpu_kernels_avx512();
    if (!best) best = cpu_kernels_avx2();
    char start[64];
    snprintf(start, sizeof start, "cpu %s, ", best->name);
    assert_memory_equal(text, start, strlen(start));
    assert_non_null(strstr(text, "2 threads"));
    /* A type that has no kernel, a row that is not whole blocks, bytes that do not fit. */
    struct weight *w;
    struct bytes_source s = {calloc(1, 4096), 4096};
    struct weight_source src = {.name = "blk.0.odd",
                                .type = (enum tensor_type)2,
                                .n_experts = 1,
                                .n_rows = 16,
                                .n_cols = 256,
                                .n_bytes = 2304,
                                .read = read_bytes,
                                .ctx = &s};
    assert_int_equal(backend_ops_of(b)->weight_load(b, &src, &e, &w), ST_UNSUPPORTED);
    assert_non_null(strstr(e.text, "blk.0.odd"));
    src.type = TENSOR_Q4_K;
    src.n_cols = 128;
    assert_int_equal(backend_ops_of(b)->weight_load(b, &src, &e, &w), ST_UNSUPPORTED);
    src.n_cols = 256;
    src.n_bytes = 2303;
    assert_int_equal(backend_ops_of(b)->weight_load(b, &src, &e, &w), ST_CORRUPT);
    src.n_bytes = 2304;
    assert_ok(backend_ops_of(b)->weight_load(b, &src, &e, &w), &e);
    backend_ops_of(b)->close(b);
    free(s.p);
}

/* Reads of a large tensor: how long, how many bytes in all. */
struct stream {
    size_t n_bytes, longest, total;
};

static enum status read_stream(void *ctx, size_t offset, void *dst, size_t n) {
    struct stream *s = ctx;
    assert_true(offset <= s->n_bytes && n <= s->n_bytes - offset);
    if (n > s->longest) s->longest = n;
    s->total += n;
    memset(dst, 1, n);
    return ST_OK;
}

/* A tensor goes through a buffer of a few megabytes, each byte once, into little more than its size: so
 * loading needs the file's size and a few percent. */
static void test_loading_streams(void **state) {
    (void)state;
    static const enum tensor_type types[] = {TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K, TENSOR_Q8_0};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct error e = {0};
        struct backend *b;
        struct weight *w;
        struct backend_config config = {
            .shape = cases[0].shape, .limits = {1, 1, 1, 64, 16, 4}, .n_threads = 2};
        assert_ok(backend_cpu_open(&config, &e, &b), &e);
        struct stream s = {0};
        assert_true(tensor_type_bytes(types[i], (size_t)3 * 5000 * 2048, &s.n_bytes));
        struct weight_source src = {.name = "blk.0.large",
                                    .type = types[i],
                                    .n_experts = 3,
                                    .n_rows = 5000,
                                    .n_cols = 2048,
                                    .n_bytes = s.n_bytes,
                                    .read = read_stream,
                                    .ctx = &s};
        assert_ok(backend_ops_of(b)->weight_load(b, &src, &e, &w), &e);
        assert_int_equal(s.total, s.n_bytes);
        assert_in_range(s.longest, 1, 8 << 20);
        int32_t n_blocks;
        struct moe_memory_line lines[1];
        assert_ok(backend_ops_of(b)->ready(b, &e, &n_blocks), &e);
        assert_int_equal(backend_ops_of(b)->memory(b, lines, 1), 1);
        assert_in_range(lines[0].n_bytes, s.n_bytes, s.n_bytes + s.n_bytes / 16);
        backend_ops_of(b)->close(b);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_reference),
        cmocka_unit_test(test_rows_alone),
        cmocka_unit_test(test_opening),
        cmocka_unit_test(test_loading_streams),
    };
    return cmocka_run_group_tests_name("cpu_ops", tests, NULL, NULL);
}
