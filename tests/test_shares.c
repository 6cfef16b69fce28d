/* Who holds and who computes each expert: every row goes to a holder, the same way every time; a skewed
 * load is even after one plan; and what a plan moves is little. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "moe/shares.h"
#include "tests/support.h"

enum { MAX_EXPERTS = 128, MAX_USED = 8 };

/* Routes tokens by Zipf's law with the given exponent: K distinct experts per token, drawn without
 * replacement (Gumbel's trick). */
struct trace {
    struct model_shape shape;
    double exponent;
    int32_t stride; /* divides E: experts next to each other in demand are so far apart */
    uint64_t rng;
};

static int32_t ranked_expert(const struct trace *t, int32_t place) {
    int32_t n = t->shape.n_experts, at = place * t->stride;
    return at % n + at / n;
}

static void route(struct trace *t, int32_t n_tokens, int32_t *counts) {
    int32_t n = t->shape.n_experts;
    memset(counts, 0, (size_t)n * sizeof *counts);
    for (int32_t i = 0; i < n_tokens; i++) {
        double key[MAX_EXPERTS];
        for (int32_t p = 0; p < n; p++) {
            double u = ((double)(test_random(&t->rng) >> 11) + 0.5) * 0x1p-53;
            key[p] = -t->exponent * log(p + 1) - log(-log(u));
        }
        for (int32_t k = 0; k < t->shape.n_experts_used; k++) {
            int32_t best = 0;
            for (int32_t p = 1; p < n; p++)
                if (key[p] > key[best]) best = p;
            key[best] = -INFINITY;
            counts[ranked_expert(t, best)]++;
        }
    }
}

/* Every row to a holder, none lost; the table holds all experts and no rank more than it may. */
static void check_deal(const struct shares *s, int32_t layer, const int32_t *counts,
                       const int32_t *rows) {
    for (int32_t e = 0; e < s->n_experts; e++) {
        int32_t sum = 0;
        for (int32_t r = 0; r < s->n_ranks; r++) {
            int32_t n = rows[e * s->n_ranks + r];
            assert_true(n >= 0 && (n == 0 || shares_holds(s, layer, e, r)));
            sum += n;
        }
        assert_int_equal(sum, counts[e]);
    }
}

static void check_table(const struct shares *s, const uint16_t *table) {
    for (int32_t l = 0; l < s->n_layers; l++) {
        int32_t n_held[MOE_MAX_RANKS] = {0};
        for (int32_t e = 0; e < s->n_experts; e++) {
            unsigned held = table[l * s->n_experts + e];
            assert_true(held != 0 && held >> s->n_ranks == 0);
            for (int32_t r = 0; r < s->n_ranks; r++) n_held[r] += held >> r & 1;
        }
        for (int32_t r = 0; r < s->n_ranks; r++) assert_in_range(n_held[r], 1, s->slots);
    }
}

/* Steps of n_tokens until the window has that many; returns the imbalance. */
static double run_window(struct shares *s, struct trace *t, int32_t n_tokens, uint64_t window) {
    int32_t counts[MAX_EXPERTS], rows[MAX_EXPERTS * MOE_MAX_RANKS],
        again[MAX_EXPERTS * MOE_MAX_RANKS];
    struct shares_scratch scratch;
    while (s->window_rows < window) {
        for (int32_t l = 0; l < s->n_layers; l++) {
            route(t, n_tokens, counts);
            shares_assign(s, l, counts, &scratch, rows);
            shares_assign(s, l, counts, &scratch, again);
            assert_memory_equal(rows, again, (size_t)(s->n_experts * s->n_ranks) * sizeof *rows);
            check_deal(s, l, counts, rows);
            shares_record(s, l, counts, rows);
        }
    }
    return shares_imbalance(s);
}

static void adopt(struct shares *s) {
    check_table(s, s->next);
    memcpy(s->held, s->next, (size_t)(s->n_layers * s->n_experts) * sizeof *s->held);
}

/* Zipf 1.0: one plan and the load is within 1.15 from then on, and no other plan follows. */
static void test_skew(void **state) {
    (void)state;
    const int cases[][4] = {
        /* experts, used, ranks, slots beyond the least; ranks divide the stride, so that the first table,
         * which deals experts out in turn, puts those in demand on one rank */
        {128, 8, 2, 0}, {128, 8, 2, 4}, {128, 8, 4, 2},
        {128, 8, 8, 4}, {60, 4, 3, 2},  {32, 4, 4, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int *c = cases[i];
        struct trace t = {.shape = {.n_layers = 3, .n_experts = c[0], .n_experts_used = c[1]},
                          .exponent = 1.0,
                          .stride = c[0] == 60 ? 3 : 8};
        struct shares s;
        int32_t least = (c[0] + c[2] - 1) / c[2];
        assert_int_equal(shares_create(&t.shape, c[2], least + c[3], NULL, &s), ST_OK);
        check_table(&s, s.held);
        const uint64_t window = 200000;
        assert_false(shares_replan(&s, window, 1.1)); /* not yet */
        double before = run_window(&s, &t, 256, window);
        assert_true(before > 1.15);
        assert_true(shares_replan(&s, window, 1.1));
        assert_true(s.window_rows == 0 && shares_imbalance(&s) == 1);
        adopt(&s);
        double after = run_window(&s, &t, 256, window);
        if (after > 1.15) fail_msg("case %zu: %.3f, then %.3f", i, before, after);
        if (after <= 1.1) assert_false(shares_replan(&s, window, 1.1));
        shares_destroy(&s);
    }
}

/* With the load of an earlier run the first table is as good as a plan. */
static void test_known_load(void **state) {
    (void)state;
    struct trace t = {.shape = {.n_layers = 2, .n_experts = 128, .n_experts_used = 8},
                      .exponent = 1.0,
                      .stride = 8};
    struct shares s;
    uint64_t load[2 * 128];
    assert_int_equal(shares_create(&t.shape, 2, 0, NULL, &s), ST_OK);
    assert_true(run_window(&s, &t, 256, 200000) > 1.15);
    for (int i = 0; i < 2 * 128; i++) load[i] = (uint64_t)s.load[i];
    shares_destroy(&s);
    assert_int_equal(shares_create(&t.shape, 2, 0, load, &s), ST_OK);
    assert_true(run_window(&s, &t, 256, 200000) < 1.1);
    shares_destroy(&s);
}

/* Everybody holds everything: each step is even by itself, and nothing is ever planned. */
static void test_all_everywhere(void **state) {
    (void)state;
    struct trace t = {.shape = {.n_layers = 2, .n_experts = 128, .n_experts_used = 8},
                      .exponent = 1.3,
                      .stride = 1};
    struct shares s;
    assert_int_equal(shares_create(&t.shape, 8, 1000, NULL, &s), ST_OK);
    assert_int_equal(s.slots, 128);
    assert_true(run_window(&s, &t, 64, 50000) < 1.02);
    assert_false(shares_replan(&s, 50000, 1.0));
    shares_destroy(&s);
}

/* An even load, and one that is as before, move nothing. */
static void test_calm(void **state) {
    (void)state;
    struct trace t = {.shape = {.n_layers = 2, .n_experts = 64, .n_experts_used = 4}, .stride = 1};
    struct shares s;
    assert_int_equal(shares_create(&t.shape, 4, 0, NULL, &s), ST_OK);
    assert_int_equal(s.slots, 16);
    run_window(&s, &t, 256, 100000);
    assert_false(shares_replan(&s, 100000, 1.1));
    shares_destroy(&s);
}

/* Devices of a plan are named after the rank that has most of it: the plan that made the table, made again from
 * the same loads after the ranks' names were turned round by one, moves nothing. */
static void test_little_moves(void **state) {
    (void)state;
    struct model_shape shape = {.n_layers = 1, .n_experts = 64, .n_experts_used = 4};
    struct shares s;
    assert_int_equal(shares_create(&shape, 4, 18, NULL, &s), ST_OK);
    int32_t counts[64], rows[64 * 4];
    struct shares_scratch scratch;
    for (int32_t e = 0; e < 64; e++) counts[e] = 6400 / (1 + e % 64);
    for (int round = 0; round < 2; round++) {
        shares_assign(&s, 0, counts, &scratch, rows);
        if (round == 1) { /* as if all rows had gone to one rank, so that a plan is due */
            memset(rows, 0, sizeof rows);
            for (int32_t e = 0; e < 64; e++) rows[e * 4] = counts[e];
        }
        shares_record(&s, 0, counts, rows);
        assert_true(shares_replan(&s, 1, 1.0));
        if (round == 0) adopt(&s);
        for (int32_t e = 0; e < 64 && round == 0; e++)
            s.held[e] = (uint16_t)((s.held[e] << 1 | s.held[e] >> 3) & 15);
    }
    assert_memory_equal(s.next, s.held, 64 * sizeof *s.held);
    shares_destroy(&s);
}

/* Steps remembered one by one, or what they come to. */
static void test_sums(void **state) {
    (void)state;
    struct trace t = {
        .shape = {.n_layers = 2, .n_experts = 32, .n_experts_used = 4}, .exponent = 1.0, .stride = 4};
    struct shares one, sums;
    struct shares_scratch scratch;
    assert_int_equal(shares_create(&t.shape, 4, 0, NULL, &one), ST_OK);
    assert_int_equal(shares_create(&t.shape, 4, 0, NULL, &sums), ST_OK);
    for (int32_t l = 0; l < 2; l++) {
        uint64_t all_counts[32] = {0}, all_rows[4] = {0};
        for (int step = 0; step < 5; step++) {
            int32_t counts[32], rows[32 * 4];
            route(&t, 64, counts);
            shares_assign(&one, l, counts, &scratch, rows);
            shares_record(&one, l, counts, rows);
            for (int e = 0; e < 32; e++) all_counts[e] += (uint64_t)counts[e];
            for (int i = 0; i < 32 * 4; i++) all_rows[i % 4] += (uint64_t)rows[i];
        }
        shares_record_sums(&sums, l, all_counts, all_rows);
    }
    assert_int_equal(one.window_rows, sums.window_rows);
    assert_true(shares_imbalance(&one) == shares_imbalance(&sums));
    assert_true(shares_replan(&one, 1, 1.0) && shares_replan(&sums, 1, 1.0));
    assert_memory_equal(one.next, sums.next, 2 * 32 * sizeof *one.next);
    shares_destroy(&one);
    shares_destroy(&sums);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_skew),           cmocka_unit_test(test_known_load),
        cmocka_unit_test(test_all_everywhere), cmocka_unit_test(test_calm),
        cmocka_unit_test(test_little_moves),   cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
