/* invariance: what a request computes, bit for bit, does not depend on its neighbours, its slot, the batch, how its
 * prompt was cut, where its keys lie, what lay there before, or whether it was preempted. Run for every CPU device;
 * `test_invariance cuda:0` runs it for the devices named.
 *
 * Of the bugs that shipped in other servers, these tests see:
 *  - frozen slots in batched decode: 64 slots at once give what one alone gives, and it is not one token repeated.
 *  - batched prefill that corrupts KV beyond some batch size: 250 tokens at once against chunks.
 *  - sampling parameters dropped when batched: eleven different sets together and alone.
 *  - stale NaN in recycled blocks: a poisoned cache changes nothing.
 *  - stale KV lengths: cached decoding against recomputing the prefix for every token. */
#include "tests/amx_emulated.h"
#include "tests/model_rig.h"

#include <stdio.h>

enum {
    N_SLOTS = 64,
    SEQ_TOKENS = 320,
    BLOCK_TOKENS = 16,
    SEQ_BLOCKS = SEQ_TOKENS / BLOCK_TOKENS,
    BATCH_TOKENS = 512,
    MAX_GEN = 16
};

static const char *device;
static struct golden *golden;
static struct model_rig rig;
static int32_t blocks_of_slot[N_SLOTS][SEQ_BLOCKS];

static void shuffle_blocks(uint64_t seed) {
    int32_t *all = &blocks_of_slot[0][0];
    for (int32_t i = 0; i < N_SLOTS * SEQ_BLOCKS; i++) all[i] = i;
    if (seed == 0) return;
    for (int32_t i = N_SLOTS * SEQ_BLOCKS - 1; i > 0; i--) {
        int32_t j = (int32_t)(test_random(&seed) % (uint64_t)(i + 1)), t = all[i];
        all[i] = all[j];
        all[j] = t;
    }
}

static struct model_rig open_rig(int n_threads) {
    struct moe_limits limits = {.max_batch_tokens = BATCH_TOKENS,
                                .max_seqs = N_SLOTS,
                                .max_rows = BATCH_TOKENS,
                                .max_seq_tokens = SEQ_TOKENS,
                                .block_tokens = BLOCK_TOKENS,
                                .n_blocks = N_SLOTS * SEQ_BLOCKS};
    return rig_open(device, n_threads, &limits);
}

static int setup(void **state) {
    (void)state;
    golden = golden_load();
    rig = open_rig(2);
    shuffle_blocks(0);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    rig_close(&rig);
    golden_free(golden);
    return 0;
}

static const struct golden_prompt *prompt_named(const char *name) {
    for (int i = 0; i < golden->n_prompts; i++)
        if (strcmp(golden->prompts[i].name, name) == 0) return &golden->prompts[i];
    fail_msg("no prompt %s", name);
    return NULL;
}

/* ---- requests and a small scheduler ------------------------------------------------------------------ */

struct request {
    int32_t slot, chunk, delay; /* delay: steps before it joins */
    int32_t n_prompt, n_known, n_computed;
    int n_gen, n_got;
    struct moe_sampling sampling;
    int32_t ids[SEQ_TOKENS];
    struct moe_row got[MAX_GEN];
};

static struct moe_sampling hot(uint64_t seed) {
    return (struct moe_sampling){.temperature = 1.0f,
                                 .top_p = 0.98f,
                                 .repetition_penalty = 1.1f,
                                 .presence_penalty = 0.3f,
                                 .frequency_penalty = 0.2f,
                                 .seed = seed,
                                 .logprobs = true,
                                 .n_top = MOE_MAX_TOP};
}

static void request_start(struct request *q) {
    rig_start(&rig, q->slot, &q->sampling, q->ids, q->n_known, q->n_prompt);
    q->n_computed = 0;
}

static void request_init(struct request *q, int32_t slot, const int32_t *ids, int32_t n_ids,
                         const struct moe_sampling *p) {
    *q = (struct request){.slot = slot,
                          .chunk = SEQ_TOKENS,
                          .n_prompt = n_ids,
                          .n_known = n_ids,
                          .n_gen = 10,
                          .sampling = *p};
    memcpy(q->ids, ids, (size_t)n_ids * sizeof *ids);
    request_start(q);
}

/* One step of all requests that still want tokens; false if there is none. */
static bool step(struct request *qs, int n) {
    static int32_t ids[BATCH_TOKENS], blocks[N_SLOTS * SEQ_BLOCKS];
    struct moe_step_seq seqs[N_SLOTS];
    struct request *of_row[N_SLOTS];
    struct moe_step s = {.seqs = seqs, .ids = ids, .blocks = blocks};
    int32_t n_blocks = 0, n_rows = 0;
    bool waiting = false;
    for (int i = 0; i < n; i++) {
        struct request *q = &qs[i];
        if (q->n_got == q->n_gen) continue;
        if (q->delay > 0) {
            q->delay--;
            waiting = true;
            continue;
        }
        int32_t c = q->n_known - q->n_computed;
        if (c > q->chunk) c = q->chunk;
        bool samples = q->n_computed + c == q->n_known;
        int32_t table = (q->n_computed + c + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        seqs[s.n_seqs++] = (struct moe_step_seq){q->slot, q->n_computed, c, table,
                                                 samples ? MOE_ROWS_SAMPLE : MOE_ROWS_NONE};
        memcpy(ids + s.n_tokens, q->ids + q->n_computed, (size_t)c * sizeof *ids);
        memcpy(blocks + n_blocks, blocks_of_slot[q->slot], (size_t)table * sizeof *blocks);
        s.n_tokens += c;
        n_blocks += table;
        q->n_computed += c;
        if (samples) of_row[n_rows++] = q;
    }
    if (s.n_seqs == 0) return waiting;
    rig_run(&rig, &s);
    assert_int_equal(rig.n_rows, n_rows);
    for (int32_t r = 0; r < n_rows; r++) {
        struct request *q = of_row[r];
        assert_int_equal(rig.rows[r].slot, q->slot);
        assert_int_equal(rig.rows[r].st, ST_OK);
        q->got[q->n_got++] = rig.rows[r];
        q->ids[q->n_known++] = rig.rows[r].token;
    }
    return true;
}

static void run(struct request *qs, int n) {
    while (step(qs, n)) {
    }
}

/* Same tokens, and the same bits in every reported log-probability. */
static void assert_same(const struct request *a, const struct request *b) {
    assert_int_equal(a->n_got, b->n_got);
    for (int i = 0; i < a->n_got; i++) {
        const struct moe_row *x = &a->got[i], *y = &b->got[i];
        assert_int_equal(x->token, y->token);
        assert_memory_equal(&x->logprob, &y->logprob, sizeof x->logprob);
        assert_int_equal(x->n_top, y->n_top);
        assert_memory_equal(x->top_ids, y->top_ids, sizeof x->top_ids);
        assert_memory_equal(x->top_logprobs, y->top_logprobs, sizeof x->top_logprobs);
    }
}

/* The request every test compares with: alone, in slot 0, its prompt in one piece. */
static struct request alone(const char *prompt, const struct moe_sampling *p) {
    struct request q;
    const struct golden_prompt *g = prompt_named(prompt);
    request_init(&q, 0, g->ids, g->n_ids, p);
    run(&q, 1);
    return q;
}

/* ---- logits ------------------------------------------------------------------------------------------- */

/* Logits [n][V] of ids in `slot`, cut into chunks; with a crowd, every step also prefills random tokens of other
 * sequences, some before and some behind in the step. */
static float *score(const int32_t *ids, int32_t n, int32_t chunk, int32_t slot, bool crowd) {
    static int32_t step_ids[BATCH_TOKENS], blocks[N_SLOTS * SEQ_BLOCKS];
    size_t v = (size_t)rig.info->shape.n_vocab;
    float *logits = malloc((size_t)n * v * sizeof *logits);
    int32_t crowd_pos[N_SLOTS] = {0};
    uint64_t rng = 17;
    for (int32_t at = 0; at < n; at += chunk) {
        struct moe_step_seq seqs[N_SLOTS];
        struct moe_step s = {.seqs = seqs, .ids = step_ids, .blocks = blocks};
        int32_t n_blocks = 0;
        for (int32_t i = 0; i < (crowd ? 9 : 1); i++) {
            bool own = i == (crowd ? 4 : 0);
            int32_t other = (slot + 1 + i * 7) % N_SLOTS;
            int32_t start = own ? at : crowd_pos[other];
            int32_t c =
                own ? (n - at < chunk ? n - at : chunk) : 1 + (int32_t)(test_random(&rng) % 5);
            int32_t table = (start + c + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
            seqs[s.n_seqs++] = (struct moe_step_seq){own ? slot : other, start, c, table,
                                                     own ? MOE_ROWS_ALL : MOE_ROWS_NONE};
            for (int32_t j = 0; j < c; j++)
                step_ids[s.n_tokens++] = own ? ids[at + j] : (int32_t)(test_random(&rng) % v);
            memcpy(blocks + n_blocks, blocks_of_slot[own ? slot : other],
                   (size_t)table * sizeof *blocks);
            n_blocks += table;
            if (!own) crowd_pos[other] += c;
        }
        rig_run(&rig, &s);
        for (int32_t j = 0; j < rig.n_rows; j++)
            assert_int_equal(moe_logits(rig.m, j, logits + (size_t)(at + j) * v), ST_OK);
    }
    return logits;
}

static void assert_scores(const float *expected, const int32_t *ids, int32_t n, int32_t chunk,
                          int32_t slot, bool crowd) {
    float *logits = score(ids, n, chunk, slot, crowd);
    size_t v = (size_t)rig.info->shape.n_vocab;
    for (int32_t t = 0; t < n; t++)
        if (memcmp(expected + (size_t)t * v, logits + (size_t)t * v, v * sizeof *logits) != 0)
            fail_msg("logits of position %d differ: chunk %d, slot %d, crowd %d", (int)t,
                     (int)chunk, (int)slot, crowd);
    free(logits);
}

static void test_chunks(void **state) {
    (void)state;
    const struct golden_prompt *g = prompt_named("ask-two-turns");
    static const int32_t chunks[] = {1, 2, 3, 7, 16, 33};
    float *expected = score(g->ids, g->n_ids, g->n_ids, 0, false);
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++)
        assert_scores(expected, g->ids, g->n_ids, chunks[i], 0, false);
    assert_scores(expected, g->ids, g->n_ids, 5, 63, true);
    assert_scores(expected, g->ids, g->n_ids, g->n_ids, 31, true);
    free(expected);
}

static void test_long_prefill(void **state) {
    (void)state;
    const struct golden_prompt *g = prompt_named("text-3");
    assert_true(g->n_ids >= 250);
    float *expected = score(g->ids, g->n_ids, 16, 0, false);
    assert_scores(expected, g->ids, g->n_ids, g->n_ids, 1, false);
    assert_scores(expected, g->ids, g->n_ids, 97, 2, true);
    assert_scores(expected, g->ids, g->n_ids, 1, 3, false); /* threads share what little there is */
    free(expected);
}

static void test_block_tables_and_poison(void **state) {
    (void)state;
    const struct golden_prompt *g = prompt_named("ask-two-turns");
    float *expected = score(g->ids, g->n_ids, g->n_ids, 0, false);
    struct moe_sampling p = hot(1);
    struct request generated = alone("ask-kernel", &p);
    for (uint64_t seed = 1; seed <= 3; seed++) {
        shuffle_blocks(seed);
        assert_int_equal(moe_kv_poison(rig.m, 0xFF), ST_OK);
        assert_scores(expected, g->ids, g->n_ids, seed == 1 ? 10 : g->n_ids, (int32_t)seed * 20,
                      seed == 2);
        assert_int_equal(moe_kv_poison(rig.m, 0xFF), ST_OK);
        struct request q = alone("ask-kernel", &p);
        assert_same(&generated, &q);
    }
    shuffle_blocks(0);
    free(expected);
}

/* ---- generation --------------------------------------------------------------------------------------- */

static void test_every_slot_at_once(void **state) {
    (void)state;
    struct moe_sampling p = hot(2);
    struct request one = alone("ask-kernel", &p);
    int n_changes = 0;
    for (int i = 1; i < one.n_got; i++) n_changes += one.got[i].token != one.got[i - 1].token;
    assert_true(n_changes >= 4); /* a live continuation, not a frozen slot */
    static struct request qs[N_SLOTS];
    const struct golden_prompt *g = prompt_named("ask-kernel");
    for (int32_t i = 0; i < N_SLOTS; i++) {
        request_init(&qs[i], N_SLOTS - 1 - i, g->ids, g->n_ids, &p);
        qs[i].chunk = 1 + i % 6;
    }
    run(qs, N_SLOTS);
    for (int32_t i = 0; i < N_SLOTS; i++) assert_same(&one, &qs[i]);
}

static void test_among_neighbours(void **state) {
    (void)state;
    const struct golden_prompt *g = prompt_named("ask-two-turns");
    struct moe_sampling p = hot(3);
    struct request one = alone("ask-two-turns", &p);
    static struct request qs[N_SLOTS];
    uint64_t rng = 23;
    for (int32_t i = 0; i < N_SLOTS; i++) {
        int32_t ids[24], n = 1 + (int32_t)(test_random(&rng) % 24);
        for (int32_t j = 0; j < n; j++)
            ids[j] = (int32_t)(test_random(&rng) % (uint64_t)rig.info->shape.n_vocab);
        struct moe_sampling s = hot(test_random(&rng));
        if (i % 3 == 0) s = rig_greedy();
        request_init(&qs[i], i, ids, n, &s);
        qs[i].chunk = 1 + (int32_t)(test_random(&rng) % 9);
        qs[i].n_gen = 1 + (int)(test_random(&rng) % 10);
        qs[i].delay = (int32_t)(test_random(&rng) % 8);
    }
    request_init(&qs[40], 40, g->ids, g->n_ids, &p);
    qs[40].chunk = 11;
    qs[40].delay = 2;
    run(qs, N_SLOTS);
    assert_same(&one, &qs[40]);
}

/* Request i of the next test: 0 is the baseline, every other one differs from it in one parameter. */
static struct moe_sampling nth_parameters(int i, int32_t baseline_first) {
    struct moe_sampling p = {
        .temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .seed = 8};
    switch (i) {
    case 1: p.temperature = 0.0f; break;
    case 2: p.top_k = 2; break;
    case 3: p.top_p = 0.3f; break;
    case 4: p.min_p = 0.4f; break;
    case 5: p.repetition_penalty = 2.5f; break;
    case 6: p.frequency_penalty = -4.0f; break;
    case 7: p.presence_penalty = -6.0f; break;
    case 8: p.seed = 9; break;
    case 9:
        p.n_bias = 1;
        p.bias[0] = (struct moe_bias){baseline_first, -50.0f};
        break;
    case 10:
        p.min_tokens = 1;
        p.n_stop_ids = 1;
        p.stop_ids[0] = baseline_first;
        break;
    default: break;
    }
    return p;
}

/* Requests that differ in one parameter each: alone and together the same, and different from each other. */
static void test_parameters_in_a_batch(void **state) {
    (void)state;
    enum { N = 11 };
    static struct request single[N], together[N];
    const struct golden_prompt *g = prompt_named("nine-tokens");
    for (int i = 0; i < N; i++) {
        struct moe_sampling p = nth_parameters(i, single[0].got[0].token);
        request_init(&single[i], i, g->ids, g->n_ids, &p);
        single[i].n_gen = MAX_GEN;
        run(&single[i], 1);
        /* The parameter does matter. */
        if (i > 0 && memcmp(single[0].ids, single[i].ids, sizeof single[i].ids) == 0)
            fail_msg("request %d is the baseline's", i);
    }
    for (int i = 0; i < N; i++) {
        struct moe_sampling p = nth_parameters(i, single[0].got[0].token);
        request_init(&together[i], N - 1 - i, g->ids, g->n_ids, &p);
        together[i].n_gen = MAX_GEN;
    }
    run(together, N);
    for (int i = 0; i < N; i++) assert_same(&single[i], &together[i]);
}

/* Blocks dropped (poisoned) after j tokens, everything recomputed in another slot. */
static void test_preemption(void **state) {
    (void)state;
    struct moe_sampling p = hot(4);
    struct request one = alone("ask-kernel", &p);
    for (int j = 1; j < one.n_gen; j += 3) {
        const struct golden_prompt *g = prompt_named("ask-kernel");
        struct request q;
        request_init(&q, 5, g->ids, g->n_ids, &p);
        while (q.n_got < j) assert_true(step(&q, 1));
        assert_int_equal(moe_kv_poison(rig.m, 0xFF), ST_OK);
        q.slot = 9;
        q.chunk = j;
        request_start(&q);
        run(&q, 1);
        assert_same(&one, &q);
    }
}

/* The whole prefix recomputed for every token, as a server without a cache does. */
static void test_uncached(void **state) {
    (void)state;
    struct moe_sampling p = hot(5);
    struct request cached = alone("ask-kernel", &p), q;
    const struct golden_prompt *g = prompt_named("ask-kernel");
    request_init(&q, 3, g->ids, g->n_ids, &p);
    do q.n_computed = 0;
    while (step(&q, 1));
    assert_same(&cached, &q);
}

/* Steps submitted before the previous one's token is known. */
static void test_one_step_ahead(void **state) {
    (void)state;
    struct moe_sampling p = hot(6);
    struct request one = alone("ask-kernel", &p), q;
    const struct golden_prompt *g = prompt_named("ask-kernel");
    request_init(&q, 12, g->ids, g->n_ids, &p);
    int32_t last = MOE_LAST_TOKEN;
    for (int i = 0; i <= q.n_gen; i++) {
        int32_t pos = i == 0 ? 0 : g->n_ids + i - 1, n = i == 0 ? g->n_ids : 1;
        struct moe_step_seq seq = {q.slot, pos, n, (pos + n - 1) / BLOCK_TOKENS + 1,
                                   MOE_ROWS_SAMPLE};
        struct moe_step s = {.n_seqs = 1,
                             .n_tokens = n,
                             .seqs = &seq,
                             .ids = i == 0 ? g->ids : &last,
                             .blocks = blocks_of_slot[q.slot]};
        if (i < q.n_gen) assert_int_equal(moe_submit(rig.m, &s), ST_OK);
        if (i == 0) continue;
        struct moe_result result = {.rows = rig.rows};
        assert_int_equal(moe_collect(rig.m, &result), ST_OK);
        assert_int_equal(result.n_rows, 1);
        q.got[q.n_got++] = rig.rows[0];
    }
    assert_same(&one, &q);
}

static void test_threads(void **state) {
    (void)state;
    struct moe_sampling p = hot(7);
    struct request one = alone("ask-kernel", &p);
    struct model_rig two_threads = rig;
    for (int n = 1; n <= 3; n += 2) {
        rig = open_rig(n);
        struct request q = alone("ask-kernel", &p);
        rig_close(&rig);
        assert_same(&one, &q);
    }
    rig = two_threads;
}

/* ---- expert reads --------------------------------------------------------------------------------------- */

struct reads {
    uint64_t groups;
    int n_layers;
};

static void count_groups(void *ctx, int layer, int32_t n_tokens, const float *hidden,
                         const int32_t *ids, const float *weights) {
    (void)hidden;
    struct reads *r = ctx;
    if (layer < 0) return;
    int32_t k = rig.info->shape.n_experts_used;
    bool seen[512] = {false};
    for (int32_t t = 0; t < n_tokens; t++) {
        float sum = 0, previous = 1;
        for (int32_t i = 0; i < k; i++) {
            int32_t e = ids[t * k + i];
            for (int32_t j = 0; j < i; j++) assert_int_not_equal(e, ids[t * k + j]);
            assert_in_range(e, 0, rig.info->shape.n_experts - 1);
            assert_true(weights[t * k + i] <= previous); /* rank order */
            previous = weights[t * k + i];
            sum += previous;
            r->groups += !seen[e];
            seen[e] = true;
        }
        assert_float_equal(sum, 1.0f, 1e-5f);
    }
    r->n_layers++;
}

/* Every (layer, expert) that has tokens is read once per step, however many tokens it has. */
static void test_expert_reads(void **state) {
    (void)state;
    const struct golden_prompt *g = prompt_named("ask-two-turns");
    for (int32_t n = 1; n <= g->n_ids; n += 12) {
        struct moe_counters before, after;
        struct reads r = {0};
        moe_counters(rig.m, &before);
        moe_set_probe(rig.m, count_groups, &r);
        rig_run_one(&rig, 0, g->ids, 0, n, MOE_ROWS_NONE);
        moe_set_probe(rig.m, NULL, NULL);
        moe_counters(rig.m, &after);
        uint64_t pairs = (uint64_t)(n * rig.info->shape.n_experts_used * rig.info->shape.n_layers);
        assert_int_equal(r.n_layers, rig.info->shape.n_layers);
        assert_int_equal(after.expert_reads - before.expert_reads, r.groups);
        assert_int_equal(after.expert_reads_ungrouped - before.expert_reads_ungrouped, pairs);
        assert_true(n == 1 ? r.groups == pairs : r.groups < pairs);
        assert_int_equal(after.n_steps - before.n_steps, 1);
        assert_int_equal(after.n_tokens - before.n_tokens, n);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_long_prefill),
        cmocka_unit_test(test_block_tables_and_poison),
        cmocka_unit_test(test_every_slot_at_once),
        cmocka_unit_test(test_among_neighbours),
        cmocka_unit_test(test_parameters_in_a_batch),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_uncached),
        cmocka_unit_test(test_one_step_ahead),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_expert_reads),
    };
    static char *cpu_devices[] = {"reference", "cpu"};
    char **devices = argc > 1 ? argv + 1 : cpu_devices;
    int n_devices = argc > 1 ? argc - 1 : 2, n_failed = 0;
    for (int i = 0; i < n_devices; i++) {
        amx_emulate = strcmp(devices[i], "amx") == 0;
        rig_isa = amx_emulate ? "amx" : NULL;
        device = amx_emulate ? "cpu" : devices[i];
        if (amx_emulate && !cpu_kernels_amx()) {
            printf("NOT TESTED: AMX, or AVX-512 with VNNI to emulate it, is not there\n");
            return n_failed > 0 ? n_failed : TEST_SKIPPED;
        }
        print_message("device %s\n", devices[i]);
        n_failed += cmocka_run_group_tests_name(devices[i], tests, setup, teardown);
    }
    return n_failed;
}
