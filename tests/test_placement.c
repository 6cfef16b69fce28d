/* placement: the published worked example, and the properties that every plan has. */
#include "tests/support.h"

#include "moe/placement.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The worked example of DeepSeek's Expert Parallelism Load Balancer (README of EPLB, MIT): 2 layers, 12
 * experts in 4 groups, 16 replicas on 2 hosts of 4 GPUs. */
static void test_eplb_example(void **state) {
    (void)state;
    static const double load[] = {90, 132, 40, 61,  104, 165, 39,  4,   73,  56, 183, 86,
                                  20, 107, 104, 64, 19,  197, 187, 157, 172, 86, 16,  27};
    static const int32_t want[] = {5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1,
                                   7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1};
    struct placement_problem p = {.n_layers = 2, .n_experts = 12, .n_groups = 4, .n_hosts = 2,
                                  .n_devices = 8, .slots = 2, .load = load};
    int32_t expert_of[32], n_replicas[24];
    struct placement plan = {expert_of, n_replicas};
    struct error e = {0};
    assert_ok(placement_plan(&p, &e, &plan), &e);
    assert_memory_equal(expert_of, want, sizeof want);
}

static void check_plan(const struct placement_problem *p, const struct placement *plan) {
    int32_t places = p->n_devices * p->slots, group = p->n_experts / p->n_groups;
    int32_t per_host = places / p->n_hosts;
    for (int32_t l = 0; l < p->n_layers; l++) {
        const int32_t *at = plan->expert_of + l * places;
        const int32_t *want = plan->n_replicas + l * p->n_experts;
        int32_t *seen = calloc((size_t)p->n_experts, sizeof *seen);
        int32_t *host = malloc((size_t)p->n_groups * sizeof *host);
        memset(host, 0xFF, (size_t)p->n_groups * sizeof *host);
        for (int32_t k = 0; k < places; k++) {
            assert_in_range(at[k], 0, p->n_experts - 1);
            seen[at[k]]++;
            int32_t *h = &host[at[k] / group];
            if (*h >= 0) assert_int_equal(*h, k / per_host); /* a group lives on one host */
            *h = k / per_host;
        }
        for (int32_t i = 0; i < p->n_experts; i++) {
            assert_true(seen[i] >= 1);
            assert_int_equal(seen[i], want[i]);
        }
        free(seen);
        free(host);
    }
}

/* Greedy packing's bound for one host: when the last item of weight w went to a device, that device was the
 * least loaded with room. Without the room rule max <= mean + w_max; the room rule can only bind when the
 * others are full, so we assert what the planner promises for Zipf load at the shapes moed runs. */
static void test_zipf_bound(void **state) {
    (void)state;
    static const int32_t devices[] = {2, 4, 8, 16, 32};
    enum { E = 128 };
    double load[E];
    for (int i = 0; i < E; i++) load[(i * 37) % E] = 1.0 / (i + 1);
    for (size_t k = 0; k < sizeof devices / sizeof *devices; k++) {
        int32_t n = devices[k], slots = E / n + (n <= 8 ? 8 : 4);
        struct placement_problem p = {.n_layers = 1, .n_experts = E, .n_groups = 1, .n_hosts = 1,
                                      .n_devices = n, .slots = slots, .load = load};
        int32_t *at = calloc((size_t)(n * slots), sizeof *at), count[E];
        struct placement plan = {at, count};
        struct error e = {0};
        assert_ok(placement_plan(&p, &e, &plan), &e);
        check_plan(&p, &plan);
        assert_true(placement_imbalance(&p, &plan, 0) <= 1.15);
        free(at);
    }
}

static void test_random_plans(void **state) {
    (void)state;
    uint64_t rng = 7;
    for (int round = 0; round < 300; round++) {
        struct placement_problem p = {.n_layers = 1 + (int32_t)(test_random(&rng) % 3)};
        p.n_hosts = 1 << test_random(&rng) % 3;
        p.n_devices = p.n_hosts * (1 + (int32_t)(test_random(&rng) % 4));
        p.n_groups = p.n_hosts * (1 + (int32_t)(test_random(&rng) % 4));
        p.n_experts = p.n_groups * (1 + (int32_t)(test_random(&rng) % 8));
        p.slots = (p.n_experts + p.n_devices - 1) / p.n_devices + (int32_t)(test_random(&rng) % 4);
        double *load = calloc((size_t)(p.n_layers * p.n_experts), sizeof *load);
        for (int32_t i = 0; i < p.n_layers * p.n_experts; i++)
            load[i] = test_random(&rng) % 4 ? (double)(test_random(&rng) % 1000) : 0;
        p.load = load;
        struct placement plan = {calloc((size_t)(p.n_layers * p.n_devices * p.slots), 4),
                                 calloc((size_t)(p.n_layers * p.n_experts), 4)};
        struct error e = {0};
        assert_ok(placement_plan(&p, &e, &plan), &e);
        check_plan(&p, &plan);
        for (int32_t l = 0; l < p.n_layers; l++)
            assert_true(placement_imbalance(&p, &plan, l) >= 1 - 1e-12);
        free(load);
        free(plan.expert_of);
        free(plan.n_replicas);
    }
}

static void test_refusals(void **state) {
    (void)state;
    double load[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    struct placement_problem good = {.n_layers = 1, .n_experts = 8, .n_groups = 2, .n_hosts = 2,
                                     .n_devices = 4, .slots = 2, .load = load};
    int32_t at[8], count[8];
    struct placement plan = {at, count};
    struct error e;
    assert_ok(placement_plan(&good, &e, &plan), &e);
    struct {
        struct placement_problem p;
        const char *names;
    } bad[] = {{good, "n_layers"}, {good, "n_groups"}, {good, "groups"}, {good, "devices"}, {good, "slots"}};
    bad[0].p.n_layers = 0;
    bad[1].p.n_groups = 3;
    bad[2].p.n_hosts = 4;
    bad[3].p.n_devices = 3;
    bad[4].p.slots = 1;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(placement_plan(&bad[i].p, &e, &plan), ST_INVALID);
        assert_non_null(strstr(e.text, bad[i].names));
    }
    load[5] = NAN;
    assert_int_equal(placement_plan(&good, &e, &plan), ST_INVALID);
    assert_non_null(strstr(e.text, "expert 5"));
    load[5] = -1;
    assert_int_equal(placement_plan(&good, &e, &plan), ST_INVALID);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_eplb_example),
        cmocka_unit_test(test_zipf_bound),
        cmocka_unit_test(test_random_plans),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests_name("placement", tests, NULL, NULL);
}
