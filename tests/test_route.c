/* route: top-k, renormalisation and ties by hand; the counting sort's invariants on random routings. */
#include "tests/support.h"

#include <math.h>

#include "moe/route.h"

static void test_top_k(void **state) {
    (void)state;
    int32_t ids[4];
    float w[4];
    /* Probabilities .1 .4 .2 .3; ties to the lower id at the cut and inside. */
    float x[4] = {logf(0.1f), logf(0.4f), logf(0.2f), logf(0.3f)};
    route_top_k(x, 4, 2, false, ids, w);
    assert_int_equal(ids[0], 1);
    assert_int_equal(ids[1], 3);
    assert_float_equal(w[0], 0.4, 1e-6);
    assert_float_equal(w[1], 0.3, 1e-6);
    route_top_k(x, 4, 2, true, ids, w);
    assert_float_equal(w[0], 4.0 / 7, 1e-6);
    assert_float_equal(w[1], 3.0 / 7, 1e-6);
    route_top_k((float[]){1, 2, 1, 2, 1}, 5, 3, true, ids, w);
    assert_int_equal(ids[0], 1);
    assert_int_equal(ids[1], 3);
    assert_int_equal(ids[2], 0);
    assert_true(w[0] == w[1] && w[2] < w[1]);
    /* Large logits: the maximum is subtracted. */
    route_top_k((float[]){900, 902, -5000, 901}, 4, 2, true, ids, w);
    assert_int_equal(ids[0], 1);
    assert_float_equal(w[0], 0.731059f, 1e-6f); /* 1 / (1 + e^-1) */
}

static void test_top_k_not_finite(void **state) {
    (void)state;
    const float odd[3] = {NAN, INFINITY, -INFINITY};
    uint64_t rng = 1;
    for (int i = 0; i < 2000; i++) {
        float x[6];
        int32_t ids[3];
        float w[3];
        for (int e = 0; e < 6; e++)
            x[e] = test_random(&rng) % 2 ? odd[test_random(&rng) % 3] : test_uniform(&rng, -1, 1);
        route_top_k(x, 6, 3, true, ids, w);
        for (int k = 0; k < 3; k++) {
            assert_in_range(ids[k], 0, 5);
            for (int j = 0; j < k; j++) assert_int_not_equal(ids[k], ids[j]);
        }
    }
}

static void test_sort(void **state) {
    (void)state;
    enum { E = 9, K = 3, T = 20 };
    struct model_shape shape = {.n_experts = E, .n_experts_used = K};
    struct route r;
    assert_int_equal(route_create(&shape, T, &r), ST_OK);
    uint64_t rng = 4;
    for (int i = 0; i < 500; i++) {
        int32_t n_tokens = (int32_t)(test_random(&rng) % (T + 1)), spread = 3 + i % 7;
        for (int32_t t = 0; t < n_tokens; t++)
            for (int32_t k = 0; k < K; k++) /* distinct: consecutive modulo the spread */
                r.ids[t * K + k] =
                    (r.ids[t * K] * (k > 0) + k +
                     (k == 0 ? (int32_t)(test_random(&rng) % (uint64_t)spread) : 0)) %
                    E;
        route_sort(&r, n_tokens);
        assert_int_equal(r.expert_first[0], 0);
        assert_int_equal(r.expert_first[E], n_tokens * K);
        int32_t n_groups = 0;
        for (int32_t e = 0; e < E; e++) {
            n_groups += r.expert_first[e + 1] > r.expert_first[e];
            for (int32_t row = r.expert_first[e]; row < r.expert_first[e + 1]; row++) {
                assert_int_equal(r.ids[r.pair_of[row]], e);
                assert_int_equal(r.row_of[r.pair_of[row]], row);
                if (row > r.expert_first[e]) assert_true(r.pair_of[row] > r.pair_of[row - 1]);
            }
        }
        assert_int_equal(route_n_groups(&r), n_groups);
    }
    route_destroy(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_top_k),
        cmocka_unit_test(test_top_k_not_finite),
        cmocka_unit_test(test_sort),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
