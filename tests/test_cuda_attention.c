/* cuda_attention: RoPE, the paged cache and attention of the CUDA backend against the reference backend, over a sequence
 * that grows by single tokens, short runs and long chunks, so that every kernel meets every border: spans of 64
 * keys, splits of 256, tiles of 16 tokens, blocks of every size. The cache begins as NaN. Single tokens are done a
 * second time without a look between the ops, which lets the backend do both at once: the same bits. */
#include "tests/cuda_rig.h"

#include <stdio.h>

/* Of the worst row. Keys are f16, and scores reach 25: their rounding moves a probability by up to 1 %. */
#define ATTENTION_BOUND 3e-5
#define ROPE_BOUND 1e-6

enum { MAX_TOKENS = 300, SEQ_TOKENS = 1200 };

struct rig {
    struct pair p;
    struct bufs q, k, v, out;
    struct weights q_norm, k_norm;
};

static struct rig rig_open(int32_t n_heads, int32_t n_kv_heads, int32_t block_tokens) {
    struct model_shape shape = {.n_layers = 2,
                                .n_embd = 256,
                                .n_heads = n_heads,
                                .n_kv_heads = n_kv_heads,
                                .head_dim = 128,
                                .n_experts = 4,
                                .n_experts_used = 2,
                                .n_ff_expert = 256,
                                .n_vocab = 16,
                                .n_ctx_train = SEQ_TOKENS,
                                .norm_eps = 1e-6f,
                                .rope_base = 1e6f};
    struct moe_limits l = {.max_batch_tokens = MAX_TOKENS,
                           .max_seqs = 8,
                           .max_rows = 8,
                           .max_seq_tokens = SEQ_TOKENS,
                           .block_tokens = block_tokens,
                           .n_blocks = SEQ_TOKENS / block_tokens + 1};
    struct rig r = {.p = pair_open(&shape, &l)};
    r.q = pair_bufs(&r.p, BUF_TOKENS, BUF_INNER, n_heads * 128);
    r.k = pair_bufs(&r.p, BUF_TOKENS, BUF_INNER, n_kv_heads * 128);
    r.v = pair_bufs(&r.p, BUF_TOKENS, BUF_INNER, n_kv_heads * 128);
    r.out = pair_bufs(&r.p, BUF_TOKENS, BUF_INNER, n_heads * 128);
    r.q_norm = pair_norm(&r.p, 128);
    r.k_norm = pair_norm(&r.p, 128);
    pair_ready(&r.p);
    BOTH(&r.p, i, pair_ops(&r.p, i)->kv_poison(r.p.b[i], 0xff));
    return r;
}

static void rope(struct rig *r, int i, int layer) {
    const struct op_rope_store op = {.layer = layer,
                                     .q = r->q.b[i],
                                     .k = r->k.b[i],
                                     .v = r->v.b[i],
                                     .q_norm = r->q_norm.w[i],
                                     .k_norm = r->k_norm.w[i],
                                     .eps = 1e-6f};
    assert_int_equal(pair_ops(&r->p, i)->rope_store(r->p.b[i], &op), ST_OK);
}

static void attend(struct rig *r, int i, int layer) {
    const struct op_attention op = {.layer = layer, .q = r->q.b[i], .out = r->out.b[i]};
    assert_int_equal(pair_ops(&r->p, i)->attention(r->p.b[i], &op), ST_OK);
}

/* Both ops in `layer` for n tokens from position `start`; errors are compared with the bounds. Every other single token
 * is not looked at between the ops, so that what the cache holds of it is from both at once. */
static void run(struct rig *r, int layer, int32_t start, int32_t n, double *worst) {
    struct pair *p = &r->p;
    bool look = n > 1 || start % 2;
    /* Sharp scores in some rows: q is normed, so that only k's and q's weights and the data's tails matter. */
    pair_fill(p, &r->q, n, 4.0f);
    pair_fill(p, &r->k, n, 4.0f);
    pair_fill(p, &r->v, n, 4.0f);
    pair_fill(p, &r->out, 0, 1.0f);
    pair_begin(p, start, n, MOE_ROWS_NONE);
    float *q = pair_read(p, GPU, &r->q, 1), *out[2];
    for (int i = 0; i < N_BACKENDS; i++) rope(r, i, layer);
    double error = look ? pair_error(p, &r->q, n) : 0.0;
    if (error > ROPE_BOUND) fail_msg("rope at %d + %d: error %.2e", (int)start, (int)n, error);
    for (int i = 0; i < N_BACKENDS; i++) attend(r, i, layer);
    error = pair_error(p, &r->out, n);
    if (error > ATTENTION_BOUND) fail_msg("attention at %d + %d: error %.2e", (int)start, (int)n, error);
    *worst = fmax(*worst, error);
    out[0] = pair_read(p, GPU, &r->out, 1);
    if (n == 1) { /* the other way: the same bits */
        assert_int_equal(pair_ops(p, GPU)->buf_write(p->b[GPU], r->q.b[GPU], 0, 1, q), ST_OK);
        rope(r, GPU, layer);
        if (!look) free(pair_read(p, GPU, &r->q, 1));
        attend(r, GPU, layer);
        out[1] = pair_read(p, GPU, &r->out, 1);
        assert_memory_equal(out[0], out[1], (size_t)r->out.n_cols * sizeof *q);
        free(out[1]);
    }
    free(out[0]);
    free(q);
    pair_end(p);
}

static void grow(int32_t n_heads, int32_t n_kv_heads, int32_t block_tokens) {
    static const int32_t runs[] = {1,  1, 3, 11, 46, 1, 1, 1, 2,   /* to 67: past the first span */
                                   60, 1, 1, 3,  57, 5, 61, 1, 1,  /* to 257: past the first split */
                                   30, 1, 3, 300, 1, 170, 4, 1, 2, 300, 3, 1};
    struct rig r = rig_open(n_heads, n_kv_heads, block_tokens);
    double worst = 0;
    int32_t start = 0;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; start += runs[i++]) {
        assert_true(start + runs[i] <= SEQ_TOKENS);
        run(&r, 1, start, runs[i], &worst);
    }
    print_message("%d heads on %d, blocks of %d: %d positions, worst error %.2e\n", (int)n_heads,
                  (int)n_kv_heads, (int)block_tokens, (int)start, worst);
    pair_close(&r.p);
}

static void test_eight_heads_per_kv_head(void **state) {
    (void)state;
    grow(16, 2, 16);
}

static void test_other_head_counts(void **state) {
    (void)state;
    grow(4, 1, 64); /* half of an octet */
    grow(12, 1, 1); /* one octet and a half */
}

/* Layers do not share keys: the same positions in another layer, then the first one's again. */
static void test_layers(void **state) {
    (void)state;
    struct rig r = rig_open(8, 1, 32);
    double worst = 0;
    run(&r, 0, 0, 40, &worst);
    run(&r, 1, 0, 40, &worst);
    run(&r, 0, 40, 1, &worst);
    run(&r, 1, 40, 9, &worst);
    pair_close(&r.p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_eight_heads_per_kv_head),
        cmocka_unit_test(test_other_head_counts),
        cmocka_unit_test(test_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
