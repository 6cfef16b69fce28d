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

static struct rig rig_open_for(int32_t n_heads, int32_t n_kv_heads, int32_t block_tokens, int32_t n_seqs,
                               int32_t n_blocks) {
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
                           .max_seqs = n_seqs,
                           .max_rows = 8,
                           .max_seq_tokens = SEQ_TOKENS,
                           .block_tokens = block_tokens,
                           .n_blocks = n_blocks};
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

static struct rig rig_open(int32_t n_heads, int32_t n_kv_heads, int32_t block_tokens) {
    return rig_open_for(n_heads, n_kv_heads, block_tokens, 8, SEQ_TOKENS / block_tokens + 1);
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

/* Many sequences at once, whose first blocks are those of one prompt and whose last is their own: as many as make
 * attention cut tokens into spans, into splits, and not at all. The same rows are the same bits in every step. */
enum { MANY = 280, PROMPT = 1088, BLOCK = 16, PROMPT_BLOCKS = PROMPT / BLOCK };

static void begin_many(struct rig *r, const int32_t *start, const int32_t *n_tokens, int32_t first, int32_t n) {
    static struct moe_step_seq seqs[MANY];
    struct pair *p = &r->p;
    p->ids = calloc(MAX_TOKENS, sizeof *p->ids);
    p->blocks = calloc((size_t)n * (PROMPT_BLOCKS + 1), sizeof *p->blocks);
    struct moe_step step = {.n_seqs = n, .seqs = seqs, .ids = p->ids, .blocks = p->blocks};
    int32_t *to = p->blocks;
    for (int32_t i = 0; i < n; i++) {
        int32_t shared = start[first + i] / BLOCK;
        seqs[i] = (struct moe_step_seq){
            .slot = i, .start_pos = start[first + i], .n_tokens = n_tokens[first + i], .n_blocks = shared + 1};
        step.n_tokens += seqs[i].n_tokens;
        for (int32_t k = 0; k < shared; k++) *to++ = p->limits.n_blocks - 1 - k; /* as pair_begin has it */
        *to++ = first + i;
    }
    for (int i = 0; i < N_BACKENDS; i++) {
        bool issue = true;
        assert_int_equal(pair_ops(p, i)->step_begin(p->b[i], &step, &issue), ST_OK);
    }
}

static void fill_inputs(struct rig *r, int32_t n) {
    pair_fill(&r->p, &r->q, n, 4.0f);
    pair_fill(&r->p, &r->k, n, 4.0f);
    pair_fill(&r->p, &r->v, n, 4.0f);
}

static void test_many_sequences(void **state) {
    (void)state;
    static const int32_t sizes[] = {MANY, 140, 20, 3};
    struct rig r = rig_open_for(8, 1, BLOCK, MANY, PROMPT_BLOCKS + MANY);
    struct pair *p = &r.p;
    int32_t start[MANY], own[MANY], one[MANY];
    for (int32_t at = 0; at < PROMPT; at += MAX_TOKENS) {
        int32_t n = PROMPT - at < MAX_TOKENS ? PROMPT - at : MAX_TOKENS;
        fill_inputs(&r, n);
        pair_begin(p, at, n, MOE_ROWS_NONE);
        BOTH(p, i, (rope(&r, i, 0), ST_OK));
        pair_end(p);
    }
    for (int32_t s = 0; s < MANY; s++) {
        start[s] = (int32_t)(test_random(&p->rng) % PROMPT_BLOCKS) * BLOCK;
        own[s] = 1 + (int32_t)(test_random(&p->rng) % (BLOCK - 1));
        one[s] = 1;
    }
    for (int32_t s = 0; s < MANY; s += 20) { /* the first tokens of their own blocks */
        fill_inputs(&r, 20 * BLOCK > MAX_TOKENS ? MAX_TOKENS : 20 * BLOCK);
        begin_many(&r, start, own, s, 20);
        BOTH(p, i, (rope(&r, i, 0), ST_OK));
        pair_end(p);
    }
    for (int32_t s = 0; s < MANY; s++) start[s] += own[s];
    fill_inputs(&r, MANY);
    float *q = pair_read(p, GPU, &r.q, MANY), *all = NULL;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        int32_t n = sizes[k];
        BOTH(p, i, pair_ops(p, i)->buf_write(p->b[i], r.q.b[i], 0, n, q)); /* RoPE turns q in place */
        pair_fill(p, &r.out, 0, 1.0f);
        begin_many(&r, start, one, 0, n);
        for (int i = 0; i < N_BACKENDS; i++) {
            rope(&r, i, 0);
            attend(&r, i, 0);
        }
        double error = pair_error(p, &r.out, n);
        if (error > ATTENTION_BOUND) fail_msg("%d sequences: error %.2e", (int)n, error);
        float *out = pair_read(p, GPU, &r.out, n);
        pair_end(p);
        if (all) assert_memory_equal(out, all, (size_t)n * (size_t)r.out.n_cols * sizeof *out);
        if (all) free(out);
        else all = out;
    }
    free(all);
    free(q);
    pair_close(p);
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
        cmocka_unit_test(test_many_sequences),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
