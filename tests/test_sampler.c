/* sampler: every step of the definition by hand-computed rows, the fast selection against the definition
 * written out with a full sort, distributions, and what failures leave behind. */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "moe/sampler.h"

enum { MAX_POS = 256 };

struct rig {
    struct sampler *s;
    struct sampler_scratch *scratch;
    int32_t n_vocab;
    float *logits; /* [n_vocab] */
};

static struct rig rig_open(int32_t n_vocab) {
    struct rig r = {.n_vocab = n_vocab, .logits = calloc((size_t)n_vocab, sizeof(float))};
    assert_int_equal(sampler_create(2, MAX_POS, n_vocab, &r.s), ST_OK);
    assert_int_equal(sampler_scratch_create(n_vocab, &r.scratch), ST_OK);
    return r;
}

static void rig_close(struct rig *r) {
    sampler_destroy(r->s);
    sampler_scratch_destroy(r->scratch);
    free(r->logits);
}

static struct moe_sampling neutral(float temperature) {
    return (struct moe_sampling){
        .temperature = temperature, .top_p = 1.0f, .repetition_penalty = 1.0f};
}

static void start(struct rig *r, int32_t slot, const struct moe_sampling *p, const int32_t *ids,
                  int32_t n_ids, int32_t n_prompt) {
    sampler_start(
        r->s, &(struct moe_slot_start){
                  .slot = slot, .sampling = *p, .ids = ids, .n_ids = n_ids, .n_prompt = n_prompt});
}

/* Sample slot 0 from a copy of x. */
static struct moe_row sample(struct rig *r, const float *x) {
    struct moe_row row;
    memcpy(r->logits, x, (size_t)r->n_vocab * sizeof *x);
    sampler_row(r->s, r->scratch, 0, r->logits, &row);
    return row;
}

/* Start slot 0 with a one-token prompt (id 0) and sample once. */
static int32_t sample_once(struct rig *r, const struct moe_sampling *p, const float *x) {
    int32_t prompt = 0;
    start(r, 0, p, &prompt, 1, 1);
    return sample(r, x).token;
}

static void test_uniform_values(void **state) {
    (void)state;
    /* splitmix64 seeded with 0 begins e220a8397b1dcdaf (Vigna's test vector): its top 24 bits. */
    assert_true(sampler_uniform(0, 0) == (float)0xe220a8 * 0x1p-24f);
    assert_true(sampler_uniform(0, 1) == (float)0x6e789e * 0x1p-24f);
    for (uint32_t i = 0; i < 10000; i++) {
        float u = sampler_uniform(i * UINT64_C(0x123456789), i);
        assert_true(u >= 0.0f && u < 1.0f);
    }
}

static void test_greedy_ties(void **state) {
    (void)state;
    struct rig r = rig_open(5);
    struct moe_sampling p = neutral(0);
    assert_int_equal(sample_once(&r, &p, (float[]){1, 3, 2, 3, 3}), 1);
    assert_int_equal(sample_once(&r, &p, (float[]){-7, -3, -5, -9, -2}), 4);
    rig_close(&r);
}

static void test_bias_and_min_tokens(void **state) {
    (void)state;
    struct rig r = rig_open(4);
    struct moe_sampling p = neutral(0);
    const float x[4] = {5, 4, 1, 0};
    p.n_bias = 2; /* the same token twice: both count */
    p.bias[0] = (struct moe_bias){3, 3.0f};
    p.bias[1] = (struct moe_bias){3, 2.5f};
    assert_int_equal(sample_once(&r, &p, x), 3);
    /* A stop id cannot be sampled before min_tokens, whatever its bias; then it can. */
    p.min_tokens = 2;
    p.n_stop_ids = 1;
    p.stop_ids[0] = 3;
    int32_t prompt[2] = {0, 1};
    start(&r, 0, &p, prompt, 2, 2);
    assert_int_equal(sample(&r, x).token, 0);
    assert_int_equal(sample(&r, x).token, 0);
    assert_int_equal(sample(&r, x).token, 3);
    /* Resumed after one token was sampled: one more is owed. */
    int32_t resumed[3] = {0, 1, 0};
    start(&r, 0, &p, resumed, 3, 2);
    assert_int_equal(sample(&r, x).token, 0);
    assert_int_equal(sample(&r, x).token, 3);
    rig_close(&r);
}

static void test_repetition_penalty(void **state) {
    (void)state;
    struct rig r = rig_open(4);
    struct moe_sampling p = neutral(0);
    p.repetition_penalty = 2.0f;
    /* Positive logits are divided: 4 / 2 < 3. Once per distinct id: three 1s leave 5 / 2 > 1.25. */
    int32_t ids[5] = {0, 1, 1, 1, 0};
    start(&r, 0, &p, ids, 5, 4);
    assert_int_equal(sample(&r, (float[]){4, 1, 3, 0}).token, 2);
    start(&r, 0, &p, ids, 5, 4);
    assert_int_equal(sample(&r, (float[]){0, 5, 1.3f, 2.4f}).token, 1);
    /* Negative ones are multiplied: -1 becomes -2 and loses against -1.5. */
    start(&r, 0, &p, ids, 5, 4);
    assert_int_equal(sample(&r, (float[]){-1, -1.2f, -1.5f, -9}).token, 2);
    /* Bias comes first: (1 + 3) / 2 = 2 loses against 2.5; 1 / 2 + 3 would win. */
    p.n_bias = 1;
    p.bias[0] = (struct moe_bias){0, 3.0f};
    start(&r, 0, &p, ids, 5, 4);
    assert_int_equal(sample(&r, (float[]){1, 0, 2.5f, 0}).token, 2);
    rig_close(&r);
}

static void test_presence_and_frequency(void **state) {
    (void)state;
    struct rig r = rig_open(4);
    /* Prompt 0 0 0, output 1 2 2. */
    int32_t ids[6] = {0, 0, 0, 1, 2, 2};
    struct moe_sampling p = neutral(0);
    p.presence_penalty = 1.0f;
    start(&r, 0, &p, ids, 6, 3);
    /* 5 untouched: the prompt does not count; 5.5 - 1 and 5.9 - 1 lose (once each). */
    assert_int_equal(sample(&r, (float[]){5, 5.5f, 5.9f, 0}).token, 0);
    start(&r, 0, &p, ids, 6, 3);
    assert_int_equal(sample(&r, (float[]){5, 5.5f, 6.1f, 0}).token, 2);
    p.presence_penalty = 0.0f;
    p.frequency_penalty = 1.0f;
    start(&r, 0, &p, ids, 6, 3);
    /* 6.1 - 2 < 5.3 - 1: by count. */
    assert_int_equal(sample(&r, (float[]){4.2f, 5.3f, 6.1f, 0}).token, 1);
    /* That 1 is output too now: 5.3 - 2 < 4.2 - 0. */
    assert_int_equal(sample(&r, (float[]){4.2f, 5.3f, 6.1f, 0}).token, 0);
    /* An id of both counts its output only: 5 - 1 wins against 3.5, 5 - 3 would not. */
    int32_t both[4] = {2, 2, 0, 2};
    start(&r, 0, &p, both, 4, 3);
    assert_int_equal(sample(&r, (float[]){3.5f, 0, 5, 0}).token, 2);
    rig_close(&r);
}

/* Draws n tokens at consecutive positions of consecutive seeds and counts them. */
static void count_draws(struct rig *r, struct moe_sampling p, const float *x, int n, int *counts) {
    memset(counts, 0, (size_t)r->n_vocab * sizeof *counts);
    int32_t prompt = 0;
    for (int i = 0; i < n; i++) {
        if (i % (MAX_POS - 1) == 0) {
            p.seed = (uint64_t)i * 7919;
            start(r, 0, &p, &prompt, 1, 1);
        }
        struct moe_row row = sample(r, x);
        assert_int_equal(row.st, ST_OK);
        counts[row.token]++;
    }
}

/* Pearson's statistic of counts against expected probabilities; p == 0 must have no count. */
static double chi_square(const int *counts, const double *p, int n_cells, int n) {
    double sum = 0;
    for (int i = 0; i < n_cells; i++) {
        if (p[i] == 0.0) {
            assert_int_equal(counts[i], 0);
            continue;
        }
        double d = counts[i] - n * p[i];
        sum += d * d / (n * p[i]);
    }
    return sum;
}

static void logits_of(const double *p, int n, double temperature, float *x) {
    for (int i = 0; i < n; i++) x[i] = (float)(log(p[i]) * temperature) + 3.0f;
}

/* Fixed seeds; the bounds are the chi-square quantiles of 1 - 1e-4 (15.1 for 1 degree of freedom, 18.4 for
 * 2, 21.1 for 3), so a right sampler passes but for bad luck and a wrong one cannot at 20,000 draws. */
static void test_distributions(void **state) {
    (void)state;
    enum { N = 20000 };
    struct rig r = rig_open(4);
    const double p[4] = {0.15, 0.5, 0.05, 0.3};
    float x[4];
    int counts[4];
    struct moe_sampling s = neutral(1.0f);
    logits_of(p, 4, 1.0, x);
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, p, 4, N) < 21.1);
    s.temperature = 0.7f; /* logits scaled so that the same probabilities come out */
    logits_of(p, 4, 0.7, x);
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, p, 4, N) < 21.1);

    logits_of(p, 4, 1.0, x);
    s = neutral(1.0f);
    s.top_k = 2;
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, (double[]){0, 0.625, 0, 0.375}, 4, N) < 15.1);
    s = neutral(1.0f);
    s.top_p = 0.75f; /* 0.5 does not reach it, 0.8 does */
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, (double[]){0, 0.625, 0, 0.375}, 4, N) < 15.1);
    s = neutral(1.0f);
    s.min_p = 0.2f; /* 0.05 < 0.2 * 0.5 <= 0.15 */
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, (double[]){0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95}, 4, N) <
                18.4);
    /* top_p's shares are of the softmax before min_p: 0.5 < 0.6 keeps two, though 0.5 / 0.8 > 0.6. */
    s.min_p = 0.5f;
    s.top_p = 0.6f;
    count_draws(&r, s, x, N, counts);
    assert_true(chi_square(counts, (double[]){0, 0.625, 0, 0.375}, 4, N) < 15.1);
    /* ... and after top_k: 0.5 / 0.8 reaches 0.6. */
    s = neutral(1.0f);
    s.top_k = 2;
    s.top_p = 0.6f;
    count_draws(&r, s, x, N, counts);
    assert_int_equal(counts[1], N);
    rig_close(&r);
}

static void test_top_k_ties(void **state) {
    (void)state;
    struct rig r = rig_open(6);
    struct moe_sampling s = neutral(1.0f);
    int counts[6];
    s.top_k = 1;
    count_draws(&r, s, (float[]){0, 2, 1, 2, 2, 0}, 500, counts);
    assert_int_equal(counts[1], 500);
    s.top_k = 3; /* 5, then the first two of the three 2s */
    count_draws(&r, s, (float[]){2, 1, 2, 2, 2.5f, 0}, 3000, counts);
    assert_true(counts[0] > 0 && counts[2] > 0 && counts[4] > 0);
    assert_int_equal(counts[0] + counts[2] + counts[4], 3000);
    rig_close(&r);
}

/* ---- against the definition with a full sort ---------------------------------------------------- */

static const float *sort_key;
static int by_falling(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (sort_key[i] != sort_key[j]) return sort_key[i] > sort_key[j] ? -1 : 1;
    return i < j ? -1 : 1;
}

static int32_t draw_by_definition(const struct moe_sampling *p, uint32_t position, const float *x,
                                  int32_t n_vocab) {
    int32_t *order = calloc((size_t)n_vocab, sizeof *order);
    double *prob = calloc((size_t)n_vocab, sizeof *prob);
    for (int32_t i = 0; i < n_vocab; i++) order[i] = i;
    sort_key = x;
    qsort(order, (size_t)n_vocab, sizeof *order, by_falling);
    int32_t n = p->top_k > 0 && p->top_k < n_vocab ? p->top_k : n_vocab;
    double total = 0, kept = 0;
    for (int32_t i = 0; i < n; i++)
        total += prob[i] = (double)expf((x[order[i]] - x[order[0]]) / p->temperature);
    while (n > 1 && prob[n - 1] < (double)p->min_p) n--;
    if (p->top_p < 1.0f) {
        int32_t m = 0;
        while (m < n && kept < (double)p->top_p * total) kept += prob[m++];
        n = m;
    } else {
        for (int32_t i = 0; i < n; i++) kept += prob[i];
    }
    double u = (double)sampler_uniform(p->seed, position) * kept, sum = 0;
    int32_t i = 0;
    while (i < n - 1 && (sum += prob[i]) <= u) i++;
    int32_t id = order[i];
    free(order);
    free(prob);
    return id;
}

static void test_against_definition(void **state) {
    (void)state;
    enum { V = 3000 };
    struct rig r = rig_open(V);
    uint64_t rng = 11;
    float *x = calloc(V, sizeof *x);
    int n_distinct = 0;
    int32_t previous = -1;
    for (int i = 0; i < 600; i++) {
        float spread = test_uniform(&rng, 0.01f, 8.0f);
        bool coarse = i % 3 == 0; /* many ties */
        for (int32_t j = 0; j < V; j++) {
            x[j] = test_uniform(&rng, -spread, spread);
            if (coarse) x[j] = roundf(x[j] * 4) / 4;
        }
        struct moe_sampling p = neutral(test_uniform(&rng, 0.1f, 2.0f));
        p.seed = test_random(&rng);
        if (i % 2) p.top_p = test_uniform(&rng, 0.05f, 0.999f);
        if (i / 2 % 2) p.top_k = 1 + (int32_t)(test_random(&rng) % 2 * 40 + test_random(&rng) % V);
        if (i / 4 % 2) p.min_p = test_uniform(&rng, 0.0f, 0.5f);
        int32_t prompt = 0;
        start(&r, 0, &p, &prompt, 1, 1);
        for (uint32_t position = 1; position < 4; position++) {
            int32_t token = sample(&r, x).token;
            assert_int_equal(token, draw_by_definition(&p, position, x, V));
            n_distinct += token != previous;
            previous = token;
        }
    }
    assert_true(n_distinct > 1000); /* the cases do not all fall on one token */
    free(x);
    rig_close(&r);
}

/* A vocabulary of the real size and plain temperature: the draw is over all of it. */
static void test_large_vocabulary(void **state) {
    (void)state;
    enum { V = 151936 };
    struct rig r = rig_open(V);
    uint64_t rng = 5;
    float *x = calloc(V, sizeof *x);
    for (int32_t j = 0; j < V; j++) x[j] = test_uniform(&rng, -4, 4);
    struct moe_sampling p = neutral(1.0f);
    int32_t prompt = 0;
    start(&r, 0, &p, &prompt, 1, 1);
    for (uint32_t position = 1; position < 9; position++)
        assert_int_equal(sample(&r, x).token, draw_by_definition(&p, position, x, V));
    free(x);
    rig_close(&r);
}

/* ---- determinism, logprobs, failures -------------------------------------------------------------- */

/* A draw depends on seed and position: not on the slot, on what else was sampled, or on a restart. */
static void test_resume(void **state) {
    (void)state;
    enum { V = 100, N = 40 };
    struct rig r = rig_open(V);
    uint64_t rng = 3;
    float x[V];
    for (int i = 0; i < V; i++) x[i] = test_uniform(&rng, -2, 2);
    struct moe_sampling p = neutral(1.0f);
    p.seed = 99;
    p.presence_penalty = 0.4f;
    p.repetition_penalty = 1.2f;
    int32_t ids[3 + N] = {7, 8, 9};
    start(&r, 0, &p, ids, 3, 3);
    for (int i = 0; i < N; i++) ids[3 + i] = sample(&r, x).token;
    for (int n = 0; n < N; n += 7) {
        start(&r, 1, &p, ids, 3 + n, 3);
        for (int i = n; i < N; i++) {
            struct moe_row row;
            memcpy(r.logits, x, sizeof x);
            sampler_row(r.s, r.scratch, 1, r.logits, &row);
            assert_int_equal(row.token, ids[3 + i]);
            assert_int_equal(row.slot, 1);
            assert_int_equal(sampler_last(r.s, 1), row.token);
        }
    }
    p.seed = 100;
    int n_same = 0;
    start(&r, 0, &p, ids, 3, 3);
    for (int i = 0; i < N; i++) n_same += sample(&r, x).token == ids[3 + i];
    assert_true(n_same < N / 2);
    rig_close(&r);
}

static void test_logprobs(void **state) {
    (void)state;
    struct rig r = rig_open(5);
    const double p[5] = {0.1, 0.4, 0.2, 0.1, 0.2};
    float x[5];
    logits_of(p, 5, 1.0, x);
    struct moe_sampling s = neutral(0);
    s.logprobs = true;
    s.n_top = 4;
    s.n_bias = 1;
    s.bias[0] = (struct moe_bias){3, 9.0f}; /* decides the draw, not the report */
    s.repetition_penalty = 1.5f;
    int32_t prompt[2] = {1, 2};
    start(&r, 0, &s, prompt, 2, 2);
    struct moe_row row = sample(&r, x);
    assert_int_equal(row.token, 3);
    assert_float_equal(row.logprob, log(0.1), 1e-6);
    assert_int_equal(row.n_top, 4);
    const int32_t ids[4] = {1, 2, 4, 0}; /* ties to the lower id, also at the cut */
    for (int i = 0; i < 4; i++) {
        assert_int_equal(row.top_ids[i], ids[i]);
        assert_float_equal(row.top_logprobs[i], log(p[ids[i]]), 1e-6);
    }
    /* The temperature does not enter either. More than V: V of them. */
    s = neutral(5.0f);
    s.logprobs = true;
    s.n_top = MOE_MAX_TOP;
    start(&r, 0, &s, prompt, 2, 2);
    row = sample(&r, x);
    assert_int_equal(row.n_top, 5);
    assert_float_equal(row.logprob, log(p[row.token]), 1e-6);
    /* Not asked for: not given. */
    s.logprobs = false;
    start(&r, 0, &s, prompt, 2, 2);
    row = sample(&r, x);
    assert_int_equal(row.n_top, 0);
    assert_true(row.logprob == 0.0f);
    rig_close(&r);
}

static void test_not_finite(void **state) {
    (void)state;
    const float bad[3] = {NAN, INFINITY, -INFINITY};
    struct rig r = rig_open(4);
    int32_t prompt = 0;
    for (int i = 0; i < 3; i++) {
        for (int at = 0; at < 4; at++) {
            for (int hot = 0; hot < 2; hot++) {
                struct moe_sampling p = neutral((float)hot);
                p.logprobs = true;
                p.n_top = 2;
                float x[4] = {1, 9, 2, 3};
                start(&r, 0, &p, &prompt, 1, 1);
                start(&r, 1, &p, &prompt, 1, 1);
                x[at] = bad[i];
                struct moe_row row = sample(&r, x);
                assert_int_equal(row.st, ST_NUMERIC);
                assert_int_equal(row.token, -1);
                assert_int_equal(row.n_top, 0);
                /* A step submitted ahead may ask for the token: any valid id. */
                assert_int_equal(sampler_last(r.s, 0), 0);
            }
        }
    }
    /* It was that row alone, and the failed row left no trace in the history or the scratch. */
    struct moe_sampling p = neutral(0);
    p.frequency_penalty = 1.0f;
    start(&r, 0, &p, &prompt, 1, 1);
    assert_int_equal(sample(&r, (float[]){0, 5, 4.5f, 0}).token, 1);
    assert_int_equal(sample(&r, (float[]){0, NAN, 4.5f, 0}).st, ST_NUMERIC);
    assert_int_equal(sampler_last(r.s, 0), 1);
    assert_int_equal(sample(&r, (float[]){0, 5, 3.5f, 0}).token, 1);
    assert_int_equal(sample(&r, (float[]){0, 5, 3.5f, 0}).token, 2);
    rig_close(&r);
}

/* Finite parameters whose effects are not. */
static void test_overflow(void **state) {
    (void)state;
    struct rig r = rig_open(3);
    for (int hot = 0; hot < 2; hot++) {
        struct moe_sampling p = neutral((float)hot);
        p.n_bias = 1;
        p.bias[0] = (struct moe_bias){1, 3e38f};
        int32_t prompt = 0;
        start(&r, 0, &p, &prompt, 1, 1);
        assert_int_equal(sample(&r, (float[]){0, 3e38f, 0}).st, ST_NUMERIC);
        p = neutral((float)hot); /* every id banned */
        p.min_tokens = 1;
        p.n_stop_ids = 3;
        for (int i = 0; i < 3; i++) p.stop_ids[i] = i;
        start(&r, 0, &p, &prompt, 1, 1);
        assert_int_equal(sample(&r, (float[]){1, 2, 3}).st, ST_NUMERIC);
    }
    /* A temperature so low that everything but the largest logit underflows. */
    struct moe_sampling p = neutral(1e-30f);
    assert_int_equal(sample_once(&r, &p, (float[]){1, 2, 1.999f}), 1);
    rig_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_uniform_values),
        cmocka_unit_test(test_greedy_ties),
        cmocka_unit_test(test_bias_and_min_tokens),
        cmocka_unit_test(test_repetition_penalty),
        cmocka_unit_test(test_presence_and_frequency),
        cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_top_k_ties),
        cmocka_unit_test(test_against_definition),
        cmocka_unit_test(test_large_vocabulary),
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_overflow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
