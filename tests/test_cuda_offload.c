/* cuda_offload: experts that a GPU reads from host memory give the bits that experts on the device give: logits of whole
 * prompts and of single tokens, and a batch of all prompts, with some, most and all experts far; what is counted is
 * what was read; and what does not fit is refused before anything is loaded. */
#include "tests/model_rig.h"

#include <stdio.h>

enum { N_SEQS = 24 };

static struct golden *golden;
static struct model_rig whole;

static struct moe_options options(void) {
    return (struct moe_options){.model_path = TINY_MODEL,
                                .device = "cuda:0",
                                .limits = {.max_batch_tokens = 256,
                                           .max_seqs = N_SEQS,
                                           .max_rows = 256,
                                           .n_blocks = N_SEQS * 66,
                                           .max_seq_tokens = 1056},
                                .n_threads = 1,
                                .gpu_memory_utilization = 0.5};
}

static struct model_rig open_rig(const struct moe_options *o) {
    struct model_rig r = {0};
    struct error e = {0};
    assert_ok(moe_open(o, NULL, NULL, &e, &r.m), &e);
    r.info = moe_info(r.m);
    r.blocks_per_seq = 66;
    r.rows = calloc((size_t)r.info->limits.max_rows, sizeof *r.rows);
    return r;
}

static int setup(void **state) {
    (void)state;
    golden = golden_load();
    struct moe_options o = options();
    whole = open_rig(&o);
    assert_int_equal(whole.info->offload.n_experts, 0);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    rig_close(&whole);
    golden_free(golden);
    return 0;
}

static const struct golden_prompt *prompt(int i) { return &golden->prompts[i % golden->n_prompts]; }

/* Every prompt alone, in chunks of `chunk`: all logits. */
static void compare_prompts(struct model_rig *far, int32_t chunk) {
    size_t v = (size_t)whole.info->shape.n_vocab;
    float *a = malloc(v * sizeof *a), *b = malloc(v * sizeof *b);
    for (int i = 0; i < 6; i++) {
        const struct golden_prompt *p = prompt(i);
        int32_t n_ids = chunk == 1 && p->n_ids > 20 ? 20 : p->n_ids;
        for (int32_t at = 0; at < n_ids; at += chunk) {
            int32_t n = n_ids - at < chunk ? n_ids - at : chunk;
            rig_run_one(&whole, 0, p->ids + at, at, n, MOE_ROWS_ALL);
            rig_run_one(far, 0, p->ids + at, at, n, MOE_ROWS_ALL);
            for (int32_t r = 0; r < n; r++) {
                assert_int_equal(moe_logits(whole.m, r, a), ST_OK);
                assert_int_equal(moe_logits(far->m, r, b), ST_OK);
                assert_memory_equal(a, b, v * sizeof *a);
            }
        }
    }
    free(a);
    free(b);
}

/* All together for some steps; returns the sampled tokens, [steps][N_SEQS]. */
static void decode(struct model_rig *r, int steps, int32_t *tokens) {
    struct moe_step_seq seqs[N_SEQS];
    int32_t ids[N_SEQS], *blocks = calloc((size_t)(N_SEQS * r->blocks_per_seq), sizeof *blocks);
    struct moe_sampling greedy = rig_greedy();
    for (int32_t s = 0; s < N_SEQS; s++) {
        const struct golden_prompt *p = prompt(s);
        int32_t n = p->n_ids < 200 ? p->n_ids : 200;
        rig_start(r, s, &greedy, p->ids, n, n);
        rig_run_one(r, s, p->ids, 0, n, MOE_ROWS_SAMPLE);
    }
    for (int k = 0; k < steps; k++) {
        struct moe_step step = {
            .n_seqs = N_SEQS, .n_tokens = N_SEQS, .seqs = seqs, .ids = ids, .blocks = blocks};
        int32_t n_blocks = 0;
        for (int32_t s = 0; s < N_SEQS; s++) {
            const struct golden_prompt *p = prompt(s);
            int32_t pos = (p->n_ids < 200 ? p->n_ids : 200) + k, table = pos / r->info->limits.block_tokens + 1;
            seqs[s] = (struct moe_step_seq){s, pos, 1, table, MOE_ROWS_SAMPLE};
            ids[s] = MOE_LAST_TOKEN;
            for (int32_t j = 0; j < table; j++) blocks[n_blocks++] = rig_block(r, s, j);
        }
        rig_run(r, &step);
        for (int32_t s = 0; s < N_SEQS; s++) {
            assert_int_equal(r->rows[s].st, ST_OK);
            tokens[k * N_SEQS + s] = r->rows[s].token;
        }
    }
    free(blocks);
}

static void compare(int32_t n_far, const uint64_t *load) {
    enum { STEPS = 24 };
    struct moe_options o = options();
    o.offload_experts = n_far;
    o.expert_load = load;
    o.n_expert_load = (size_t)(whole.info->shape.n_layers * whole.info->shape.n_experts);
    struct model_rig far = open_rig(&o);
    assert_int_equal(far.info->offload.n_experts, n_far);
    assert_true(far.info->offload.host_bytes > 0);
    compare_prompts(&far, 256);
    compare_prompts(&far, 1);
    int32_t a[STEPS * N_SEQS], b[STEPS * N_SEQS];
    decode(&whole, STEPS, a);
    decode(&far, STEPS, b);
    assert_memory_equal(a, b, sizeof a);
    struct moe_counters c;
    moe_counters(whole.m, &c);
    assert_int_equal(c.offload_bytes, 0);
    moe_counters(far.m, &c);
    assert_true(c.offload_bytes > 0);
    rig_close(&far);
}

static int32_t n_all(void) { return whole.info->shape.n_layers * whole.info->shape.n_experts; }

static void test_some(void **state) {
    (void)state;
    compare(n_all() / 3, NULL);
}

static void test_skewed(void **state) {
    (void)state;
    uint64_t *load = calloc((size_t)n_all(), sizeof *load);
    for (int32_t i = 0; i < n_all(); i++) load[i] = (uint64_t)(i * 7919 % 101);
    compare(n_all() * 3 / 4, load);
    free(load);
}

/* With all of them far, one token alone reads K experts in each layer: what is counted is exact. */
static void test_all(void **state) {
    (void)state;
    compare(n_all(), NULL);
    struct moe_options o = options();
    o.offload_experts = n_all();
    struct model_rig far = open_rig(&o);
    struct moe_counters c;
    const struct model_shape *m = &far.info->shape;
    rig_run_one(&far, 0, prompt(0)->ids, 0, 1, MOE_ROWS_NONE);
    moe_counters(far.m, &c);
    assert_int_equal(c.expert_reads, m->n_layers * m->n_experts_used);
    uint64_t *load = calloc((size_t)n_all(), sizeof *load), sum = 0;
    for (int k = 0; k < 2; k++) assert_int_equal(moe_expert_load(far.m, load), ST_OK); /* added to what is there */
    for (int32_t i = 0; i < n_all(); i++) sum += load[i];
    assert_int_equal(sum, 2 * m->n_layers * m->n_experts_used);
    assert_int_equal(moe_expert_load(whole.m, load), ST_UNSUPPORTED);
    free(load);
    double expected = far.info->offload.alone_bytes;
    assert_true((double)c.offload_bytes > expected * 0.999999 && (double)c.offload_bytes < expected * 1.000001);
    rig_close(&far);
}

static void refused(const struct moe_options *o, enum status st, const char *word) {
    struct error e = {0};
    struct moe *m;
    assert_int_equal(moe_open(o, NULL, NULL, &e, &m), st);
    if (!strstr(e.text, word)) fail_msg("\"%s\" does not say \"%s\"", e.text, word);
}

static void test_refused(void **state) {
    (void)state;
    struct moe_options o = options();
    o.offload_experts = n_all() + 1;
    refused(&o, ST_INVALID, "the model has");
    o = options();
    o.device = "cpu";
    o.offload_experts = 1;
    refused(&o, ST_UNSUPPORTED, "only a GPU");
    o = options();
    uint64_t load[1] = {0};
    o.expert_load = load;
    o.n_expert_load = 1;
    refused(&o, ST_INVALID, "measured load");
    o = options();
    o.limits.n_blocks = INT32_MAX / 16;
    o.offload_experts = MOE_OFFLOAD_AUTO;
    refused(&o, ST_NO_MEMORY, "even with all experts in host memory");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_some), cmocka_unit_test(test_skewed),
                                       cmocka_unit_test(test_all), cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
