/* accuracy: how far the fast CPU backend is from the reference backend, which agrees with transformers to rounding
 * (test_reference.c). Teacher-forced over every reference prompt and its continuation: at each position, does the
 * arg-max agree, and what is the Kullback-Leibler divergence of the next-token distribution?
 *
 * The gate: at least 98 % and at most 5e-3 on average. For scale: an engine with coarser activations agrees at 97.0 %
 * (tests/data/tiny-moe-card.md), because a changed activation changes which experts are chosen.
 * `test_accuracy cuda:0` gates another device, `test_accuracy amx` the CPU with AMX, emulated if need be. */
#include "tests/amx_emulated.h"
#include "tests/model_rig.h"

#include <math.h>
#include <stdio.h>

enum { SEQ_TOKENS = 1056, CHUNK = 128 };

static int32_t largest(const float *x, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Sum over tokens of p log(p / q). */
static double divergence(const float *p, const float *q, int32_t n) {
    double max_p = (double)p[largest(p, n)], max_q = (double)q[largest(q, n)];
    double sum_p = 0, sum_q = 0, kl = 0;
    for (int32_t i = 0; i < n; i++) {
        sum_p += exp((double)p[i] - max_p);
        sum_q += exp((double)q[i] - max_q);
    }
    double shift = max_q + log(sum_q) - max_p - log(sum_p);
    for (int32_t i = 0; i < n; i++)
        kl += exp((double)p[i] - max_p) / sum_p * ((double)p[i] - (double)q[i] + shift);
    return kl;
}

struct score {
    int n, n_same;
    double kl, worst_kl;
};

/* Feed ids to both models in the same chunks and compare every position. */
static void compare(struct model_rig *reference, struct model_rig *fast, const int32_t *ids,
                    int32_t n, struct score *s) {
    int32_t v = reference->info->shape.n_vocab;
    float *p = malloc((size_t)v * sizeof *p), *q = malloc((size_t)v * sizeof *q);
    for (int32_t at = 0; at < n; at += CHUNK) {
        int32_t c = n - at < CHUNK ? n - at : CHUNK;
        rig_run_one(reference, 0, ids + at, at, c, MOE_ROWS_ALL);
        rig_run_one(fast, 0, ids + at, at, c, MOE_ROWS_ALL);
        for (int32_t i = 0; i < c; i++) {
            assert_int_equal(moe_logits(reference->m, i, p), ST_OK);
            assert_int_equal(moe_logits(fast->m, i, q), ST_OK);
            double kl = divergence(p, q, v);
            assert_true(isfinite(kl));
            s->n++;
            s->n_same += largest(p, v) == largest(q, v);
            s->kl += kl;
            s->worst_kl = fmax(s->worst_kl, kl);
        }
    }
    free(p);
    free(q);
}

static const char *device = "cpu";

static void test_device(void **state) {
    (void)state;
    struct golden *golden = golden_load();
    struct moe_limits limits = {
        .max_batch_tokens = CHUNK, .max_seqs = 1, .max_rows = CHUNK, .max_seq_tokens = SEQ_TOKENS};
    struct model_rig reference = rig_open("reference", 1, &limits);
    struct model_rig fast = rig_open(device, 2, &limits);
    struct score s = {0};
    for (int i = 0; i < golden->n_prompts; i++) {
        const struct golden_prompt *p = &golden->prompts[i];
        int32_t ids[SEQ_TOKENS];
        assert_true(p->n_ids + p->n_greedy <= SEQ_TOKENS);
        memcpy(ids, p->ids, (size_t)p->n_ids * sizeof *ids);
        memcpy(ids + p->n_ids, p->greedy, (size_t)p->n_greedy * sizeof *ids);
        compare(&reference, &fast, ids, p->n_ids + p->n_greedy, &s);
    }
    double same = (double)s.n_same / s.n, kl = s.kl / s.n;
    print_message("%s: arg-max agrees at %.2f %% of %d positions; KL mean %.2e, largest %.2e\n",
                  fast.info->backend, 100 * same, s.n, kl, s.worst_kl);
    assert_true(s.n > 3000);
    assert_true(same >= 0.98);
    assert_true(kl <= 5e-3);
    rig_close(&reference);
    rig_close(&fast);
    golden_free(golden);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_device)};
    amx_emulate = argc > 1 && strcmp(argv[1], "amx") == 0;
    if (amx_emulate)
        rig_isa = "amx";
    else if (argc > 1)
        device = argv[1];
    if (amx_emulate && !cpu_kernels_amx()) {
        printf("NOT TESTED: AMX, or AVX-512 with VNNI to emulate it, is not there\n");
        return TEST_SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
