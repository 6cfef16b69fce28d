/* cuda_sample: sampling on the device gives the tokens of moe/sampler.c (through the reference backend) for the same
 * logits and parameters: every parameter alone and together, ties, bans, histories, rows that are not finite,
 * logits of every shape; a real vocabulary's size too. */
#include "tests/cuda_rig.h"

#include <stdio.h>

enum { SLOTS = 32 };

struct rig {
    struct pair p;
    struct bufs logits;
    int32_t n_vocab;
    float *values; /* [SLOTS][V] */
};

static struct rig rig_open(int32_t n_vocab) {
    struct model_shape shape = {.n_layers = 1,
                                .n_embd = 256,
                                .n_heads = 1,
                                .n_kv_heads = 1,
                                .head_dim = 128,
                                .n_experts = 4,
                                .n_experts_used = 2,
                                .n_ff_expert = 256,
                                .n_vocab = n_vocab,
                                .n_ctx_train = 256,
                                .norm_eps = 1e-6f,
                                .rope_base = 1e6f};
    struct moe_limits l = {.max_batch_tokens = SLOTS,
                           .max_seqs = SLOTS,
                           .max_rows = SLOTS,
                           .max_seq_tokens = 256,
                           .block_tokens = 16,
                           .n_blocks = 16};
    struct rig r = {.p = pair_open(&shape, &l), .n_vocab = n_vocab};
    r.logits = pair_bufs(&r.p, BUF_HEAD, BUF_EXACT, n_vocab);
    r.values = calloc((size_t)SLOTS * (size_t)n_vocab, sizeof *r.values);
    pair_ready(&r.p);
    return r;
}

static void rig_close(struct rig *r) {
    pair_close(&r->p);
    free(r->values);
}

enum logit_shape { GAUSS, PEAKED, FLAT, COARSE, WIDE, N_LOGIT_SHAPES };

static float gauss(uint64_t *rng) {
    float x = 0;
    for (int i = 0; i < 6; i++) x += test_uniform(rng, -1.0f, 1.0f);
    return x * 0.7f;
}

static void fill_row(struct rig *r, int row, enum logit_shape shape) {
    float *x = r->values + (size_t)row * (size_t)r->n_vocab;
    uint64_t *rng = &r->p.rng;
    for (int32_t i = 0; i < r->n_vocab; i++) switch (shape) {
        case GAUSS: x[i] = 3.0f * gauss(rng); break;
        case PEAKED: x[i] = gauss(rng) + (test_random(rng) % 400 == 0 ? 15.0f : 0.0f); break;
        case FLAT: x[i] = 0.25f; break;
        case COARSE: x[i] = roundf(gauss(rng)); break; /* a handful of values: long ties */
        case WIDE: x[i] = gauss(rng) * (i % 97 == 0 ? 1e6f : 1e-3f); break;
        default: break;
        }
}

static void start(struct rig *r, int32_t slot, const struct moe_sampling *s, const int32_t *ids,
                  int32_t n_ids, int32_t n_prompt) {
    struct moe_slot_start a = {.slot = slot, .sampling = *s, .ids = ids, .n_ids = n_ids, .n_prompt = n_prompt};
    BOTH(&r->p, i, pair_ops(&r->p, i)->slot_start(r->p.b[i], &a));
}

/* Sample one token in each of the first n slots from r->values, on both, and compare the rows. */
static int sample(struct rig *r, int n) {
    struct pair *p = &r->p;
    struct moe_step_seq seqs[SLOTS];
    int32_t ids[SLOTS] = {0}, blocks[SLOTS] = {0};
    for (int i = 0; i < n; i++)
        seqs[i] = (struct moe_step_seq){
            .slot = i, .start_pos = 0, .n_tokens = 1, .n_blocks = 1, .rows = MOE_ROWS_SAMPLE};
    struct moe_step step = {.n_seqs = n, .n_tokens = n, .seqs = seqs, .ids = ids, .blocks = blocks};
    static struct moe_row rows[2][SLOTS];
    for (int i = 0; i < N_BACKENDS; i++) {
        bool issue = true;
        struct moe_result result = {.rows = rows[i]};
        const struct backend_ops *ops = pair_ops(p, i);
        assert_int_equal(ops->step_begin(p->b[i], &step, &issue), ST_OK);
        assert_int_equal(ops->buf_write(p->b[i], r->logits.b[i], 0, n, r->values), ST_OK);
        assert_int_equal(ops->sample(p->b[i], &(struct op_sample){.logits = r->logits.b[i]}), ST_OK);
        assert_int_equal(ops->step_end(p->b[i]), ST_OK);
        assert_int_equal(ops->step_collect(p->b[i], &result), ST_OK);
        assert_int_equal(result.n_rows, n);
    }
    int n_ok = 0;
    for (int i = 0; i < n; i++) {
        const struct moe_row *a = &rows[REF][i], *b = &rows[GPU][i];
        if (a->token != b->token || a->st != b->st || a->slot != b->slot)
            fail_msg("slot %d: token %d, status %d; the reference: %d, %d", i, (int)b->token, (int)b->st,
                     (int)a->token, (int)a->st);
        assert_int_equal(a->n_top, b->n_top);
        assert_memory_equal(a->top_ids, b->top_ids, (size_t)a->n_top * sizeof *a->top_ids);
        assert_float_equal(a->logprob, b->logprob, 1e-5f * fmaxf(1.0f, fabsf(a->logprob)));
        for (int k = 0; k < a->n_top; k++)
            assert_float_equal(a->top_logprobs[k], b->top_logprobs[k],
                               1e-5f * fmaxf(1.0f, fabsf(a->top_logprobs[k])));
        n_ok += a->st == ST_OK;
    }
    return n_ok;
}

static struct moe_sampling neutral(float temperature) {
    return (struct moe_sampling){.temperature = temperature, .top_p = 1.0f, .repetition_penalty = 1.0f};
}

/* Parameters of request i: a walk through all of them and some of their combinations. */
static struct moe_sampling parameters(struct rig *r, int i) {
    static const float temperatures[] = {0.0f, 1.0f, 0.2f, 1.7f, 30.0f, 1e-4f, 1e-38f};
    static const float top_ps[] = {1.0f, 0.9f, 0.3f, 0.999f, 0.0f};
    static const int32_t top_ks[] = {0, 1, 2, 40, 1000, INT32_MAX};
    static const float min_ps[] = {0.0f, 0.05f, 0.5f, 1.0f};
    uint64_t *rng = &r->p.rng;
    struct moe_sampling s = neutral(temperatures[i % 7]);
    s.seed = test_random(rng);
    s.top_p = top_ps[i / 3 % 5];
    s.top_k = i % 2 ? 0 : top_ks[i / 2 % 6];
    s.min_p = i % 3 ? 0.0f : min_ps[i / 3 % 4];
    if (i % 4 == 1) s.repetition_penalty = test_uniform(rng, 0.5f, 2.0f);
    if (i % 5 == 1) s.presence_penalty = test_uniform(rng, -2.0f, 2.0f);
    if (i % 5 == 2) s.frequency_penalty = test_uniform(rng, -2.0f, 2.0f);
    if (i % 6 == 1) {
        s.n_bias = 20;
        for (int j = 0; j < s.n_bias; j++) /* some twice */
            s.bias[j] = (struct moe_bias){(int32_t)(test_random(rng) % (j % 2 ? 5 : (uint64_t)r->n_vocab)),
                                          test_uniform(rng, -20.0f, 20.0f)};
    }
    if (i % 6 >= 4) {
        s.min_tokens = i % 3;
        s.n_stop_ids = MOE_MAX_STOP_IDS;
        for (int j = 0; j < s.n_stop_ids; j++) s.stop_ids[j] = (int32_t)(test_random(rng) % (uint64_t)r->n_vocab);
    }
    s.logprobs = i % 2 == 1;
    s.n_top = i % 4 == 3 ? MOE_MAX_TOP : i % 3;
    return s;
}

static void walk(int32_t n_vocab, int n_rounds) {
    struct rig r = rig_open(n_vocab);
    int n_ok = 0;
    for (int round = 0; round < n_rounds; round++) {
        for (int slot = 0; slot < SLOTS; slot++) {
            struct moe_sampling s = parameters(&r, round * SLOTS + slot);
            int32_t ids[64];
            int32_t n = (int32_t)(test_random(&r.p.rng) % 65);
            for (int32_t j = 0; j < n; j++)
                ids[j] = (int32_t)(test_random(&r.p.rng) % (j % 2 ? 6 : (uint64_t)n_vocab));
            start(&r, slot, &s, ids, n, n / 2);
        }
        for (int step = 0; step < 3; step++) { /* the history grows by what was sampled */
            for (int slot = 0; slot < SLOTS; slot++)
                fill_row(&r, slot, (enum logit_shape)((slot + step + round) % N_LOGIT_SHAPES));
            n_ok += sample(&r, SLOTS - step);
        }
    }
    print_message("%d tokens equal from a vocabulary of %d\n", n_ok, (int)n_vocab);
    assert_true(n_ok > n_rounds * SLOTS * 2);
    rig_close(&r);
}

static void test_small_vocabularies(void **state) {
    (void)state;
    walk(7, 4);
    walk(777, 8);
    walk(5000, 8);
}

static void test_real_vocabulary(void **state) {
    (void)state;
    walk(151936, 2);
}

/* Ties go to the lower id, wherever the largest value first appears. */
static void test_greedy_ties(void **state) {
    (void)state;
    struct rig r = rig_open(3000);
    struct moe_sampling s = neutral(0.0f);
    for (int slot = 0; slot < SLOTS; slot++) {
        start(&r, slot, &s, NULL, 0, 0);
        fill_row(&r, slot, GAUSS);
        float *x = r.values + (size_t)slot * 3000;
        x[2999 - slot] = x[slot * 90] = x[slot * 90 + 31] = 99.0f;
    }
    assert_int_equal(sample(&r, SLOTS), SLOTS);
    rig_close(&r);
}

/* NaN and infinities fail their row only; so do biases that overflow and bans that leave nothing. A failed row leaves
 * the slot usable. */
static void test_not_finite(void **state) {
    (void)state;
    struct rig r = rig_open(40);
    for (int slot = 0; slot < 8; slot++) {
        struct moe_sampling s = neutral(slot % 2 ? 1.0f : 0.0f);
        s.logprobs = true;
        s.n_top = 3;
        if (slot == 6) {
            s.n_bias = 1;
            s.bias[0] = (struct moe_bias){5, 3e38f};
        }
        start(&r, slot, &s, NULL, 0, 0);
        fill_row(&r, slot, GAUSS);
    }
    r.values[0 * 40 + 39] = NAN;
    r.values[1 * 40 + 0] = INFINITY;
    r.values[2 * 40 + 17] = -INFINITY;
    r.values[3 * 40 + 16] = -NAN;
    r.values[6 * 40 + 5] = 3e38f;
    assert_int_equal(sample(&r, 8), 3);
    for (int slot = 0; slot < 8; slot++) fill_row(&r, slot, PEAKED);
    assert_int_equal(sample(&r, 8), 8);
    rig_close(&r);

    r = rig_open(20);
    struct moe_sampling ban = neutral(1.0f);
    ban.min_tokens = 1;
    ban.n_stop_ids = 20;
    for (int i = 0; i < 20; i++) ban.stop_ids[i] = i;
    start(&r, 0, &ban, NULL, 0, 0);
    fill_row(&r, 0, GAUSS);
    assert_int_equal(sample(&r, 1), 0);
    rig_close(&r);
}

/* The frequencies of many draws follow the distribution: 8,000 draws from four tokens. */
static void test_frequencies(void **state) {
    (void)state;
    struct rig r = rig_open(64);
    static const float p[4] = {0.5f, 0.25f, 0.2f, 0.05f};
    int count[64] = {0};
    static struct moe_row rows[SLOTS];
    for (int slot = 0; slot < SLOTS; slot++) {
        for (int i = 0; i < 64; i++) r.values[slot * 64 + i] = i % 16 ? -200.0f : logf(p[i / 16]);
    }
    for (int round = 0; round < 250; round++) {
        struct moe_step_seq seqs[SLOTS];
        int32_t ids[SLOTS] = {0}, blocks[SLOTS] = {0};
        struct moe_sampling s = neutral(1.0f);
        for (int i = 0; i < SLOTS; i++) {
            seqs[i] = (struct moe_step_seq){i, 0, 1, 1, MOE_ROWS_SAMPLE};
            s.seed = (uint64_t)(round * SLOTS + i);
            struct moe_slot_start a = {.slot = i, .sampling = s};
            assert_int_equal(pair_ops(&r.p, GPU)->slot_start(r.p.b[GPU], &a), ST_OK);
        }
        struct moe_step step = {.n_seqs = SLOTS, .n_tokens = SLOTS, .seqs = seqs, .ids = ids, .blocks = blocks};
        bool issue = true;
        struct moe_result result = {.rows = rows};
        const struct backend_ops *ops = pair_ops(&r.p, GPU);
        assert_int_equal(ops->step_begin(r.p.b[GPU], &step, &issue), ST_OK);
        assert_int_equal(ops->buf_write(r.p.b[GPU], r.logits.b[GPU], 0, SLOTS, r.values), ST_OK);
        assert_int_equal(ops->sample(r.p.b[GPU], &(struct op_sample){.logits = r.logits.b[GPU]}), ST_OK);
        assert_int_equal(ops->step_end(r.p.b[GPU]), ST_OK);
        assert_int_equal(ops->step_collect(r.p.b[GPU], &result), ST_OK);
        for (int i = 0; i < SLOTS; i++) count[rows[i].token]++;
    }
    for (int k = 0; k < 4; k++) {
        double expected = 8000.0 * (double)p[k], sigma = sqrt(expected * (1.0 - (double)p[k]));
        assert_true(fabs(count[16 * k] - expected) < 5.0 * sigma);
    }
    rig_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_vocabularies), cmocka_unit_test(test_real_vocabulary),
        cmocka_unit_test(test_greedy_ties),        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_frequencies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
