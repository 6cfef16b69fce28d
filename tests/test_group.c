/* Ranks that share experts, as threads with a model each: tokens are those of one rank alone, bit for bit,
 * however experts are spread, copied or moved; and a rank that dies, hangs or leaves ends the others' steps.
 *
 *     test_group                  every device that needs no GPU
 *     test_group cuda:0,cuda:1    ranks on these in turn; one GPU will do. With several, also as if they were processes */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/model_rig.h"

enum { N_SEQS = 7, N_PROMPT = 9, N_NEW = 10, MAX_RANKS = 3, N_STEPS = 2 * N_SEQS + N_NEW + 2 };

static const struct moe_limits limits = {.max_batch_tokens = 24,
                                         .max_seqs = N_SEQS,
                                         .max_rows = N_SEQS,
                                         .max_seq_tokens = 64,
                                         .block_tokens = 16,
                                         .n_blocks = N_SEQS * 4};

/* ---- a rank --------------------------------------------------------------------------------- */

struct world; /* what all ranks share */

struct rank {
    struct world *world;
    int idx;
    pthread_t thread;
    struct moe *m;
    struct error e;
    enum status st; /* of the step that failed, or ST_OK */
    struct moe_counters counters;
    int32_t sampled[N_SEQS][N_NEW]; /* of the sequences that are this rank's */
    int32_t n_sampled[N_SEQS];
};

struct world {
    struct moe_devices devices; /* of the ranks, in turn */
    int n_ranks;
    struct moe_group *group; /* NULL: one rank alone; by streams: rank 0's */
    bool by_streams; /* each rank with a group of its own, as if they were processes */
    struct moe_group *groups[MAX_RANKS]; /* then */
    struct rank ranks[MAX_RANKS];
    int quits_at[MAX_RANKS]; /* the step at which a rank returns without closing; 0: never */
    _Atomic bool may_return;
};

static int32_t prompt_id(int seq, int i) { return 300 + (seq * 97 + i * 31) % 4000; }

/* Every other sequence draws, so that all bits of the logits count. */
static struct moe_sampling sampling_of(int seq) {
    struct moe_sampling p = rig_greedy();
    if (seq % 2) p.temperature = 1.2f;
    p.seed = (uint64_t)seq;
    return p;
}

/* Sequence s begins at step 2 s + 1, in two chunks. Adds its part of step `number`, if any. */
static void add_seq(struct rank *r, int s, int number, struct moe_step *step,
                    struct moe_step_seq *seqs, int32_t *ids, int32_t *blocks) {
    int at = number - (2 * s + 1); /* 0, 1: chunks; then tokens */
    if (at < 0 || at > N_NEW) return;
    int32_t first = at == 0 ? 0 : at == 1 ? 4 : N_PROMPT + at - 2;
    int32_t n = at == 0 ? 4 : at == 1 ? N_PROMPT - 4 : 1;
    if (at == 0) {
        int32_t prompt[N_PROMPT];
        struct moe_sampling p = sampling_of(s);
        for (int i = 0; i < N_PROMPT; i++) prompt[i] = prompt_id(s, i);
        struct moe_slot_start start = {
            .slot = s, .sampling = p, .ids = prompt, .n_ids = N_PROMPT, .n_prompt = N_PROMPT};
        if (moe_slot_start(r->m, &start) != ST_OK) abort();
    }
    seqs[step->n_seqs++] = (struct moe_step_seq){.slot = s,
                                                 .start_pos = first,
                                                 .n_tokens = n,
                                                 .n_blocks = 4,
                                                 .rows = at == 0 ? MOE_ROWS_NONE : MOE_ROWS_SAMPLE};
    for (int32_t i = 0; i < n; i++)
        ids[step->n_tokens++] = at < 2 ? prompt_id(s, first + i) : MOE_LAST_TOKEN;
    for (int32_t b = 0; b < 4; b++) blocks[4 * (step->n_seqs - 1) + b] = s * 4 + b;
}

static enum status run_step(struct rank *r, int number) {
    struct moe_step_seq seqs[N_SEQS];
    struct moe_row rows[N_SEQS];
    int32_t ids[N_SEQS * N_PROMPT], blocks[N_SEQS * 4];
    struct moe_step step = {.seqs = seqs, .ids = ids, .blocks = blocks};
    for (int s = 0; s < N_SEQS; s++)
        if (s % r->world->n_ranks == r->idx) add_seq(r, s, number, &step, seqs, ids, blocks);
    if (step.n_seqs == 0 && !r->world->group) return ST_OK;
    struct moe_result result = {.rows = rows};
    enum status st = moe_submit(r->m, &step);
    if (st == ST_OK) st = moe_collect(r->m, &result);
    for (int32_t i = 0; st == ST_OK && i < result.n_rows; i++) {
        int s = rows[i].slot;
        r->sampled[s][r->n_sampled[s]++] = rows[i].token;
    }
    return st;
}

static void *rank_main(void *ctx) {
    struct rank *r = ctx;
    struct world *w = r->world;
    for (int n = 0; n < N_STEPS && r->st == ST_OK; n++) {
        if (w->quits_at[r->idx] > 0 && n == w->quits_at[r->idx]) break;
        r->st = run_step(r, n);
    }
    moe_counters(r->m, &r->counters);
    return NULL;
}

static void make_streams(int fds[MAX_RANKS][MAX_RANKS], int n) {
    for (int i = 0; i < n; i++) {
        fds[i][i] = -1;
        for (int k = 0; k < i; k++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) != 0)
                fail_msg("socketpair");
            fds[i][k] = pair[0];
            fds[k][i] = pair[1];
        }
    }
}

static void create_groups(struct world *w, const struct moe_group_options *o) {
    struct error e = {0};
    int fds[MAX_RANKS][MAX_RANKS];
    struct moe_unique_id id;
    if (w->by_streams) make_streams(fds, w->n_ranks);
    if (w->by_streams) assert_ok(moe_unique_id_create(w->devices.names[0], &e, &id), &e);
    for (int i = 0; i < (w->by_streams ? w->n_ranks : 1); i++) {
        struct moe_group_options own = *o;
        if (w->by_streams) own.streams = fds[i], own.unique_id = &id;
        own.rank = i;
        assert_ok(moe_group_create(&own, &e, &w->groups[i]), &e);
    }
    w->group = w->groups[0];
}

static struct moe_group *group_of(struct world *w, int rank) {
    return w->groups[w->by_streams ? rank : 0];
}

/* Ranks of several processes may wait for each other while they open. */
static void *open_main(void *ctx) {
    struct rank *r = ctx;
    struct world *w = r->world;
    struct moe_options options = {.model_path = TINY_MODEL,
                                  .device = w->devices.names[r->idx % w->devices.n],
                                  .limits = limits,
                                  .n_threads = w->n_ranks,
                                  .gpu_memory_utilization = 0.5,
                                  .n_ranks = w->n_ranks,
                                  .group = group_of(w, r->idx),
                                  .rank = r->idx};
    r->st = moe_open(&options, NULL, NULL, &r->e, &r->m);
    return NULL;
}

static void on_all(struct world *w, void *(*main)(void *)) {
    for (int i = 0; i < w->n_ranks; i++)
        if (pthread_create(&w->ranks[i].thread, NULL, main, &w->ranks[i]) != 0)
            fail_msg("pthread_create");
    for (int i = 0; i < w->n_ranks; i++) pthread_join(w->ranks[i].thread, NULL);
}

static void world_open(struct world *w, const char *device, const struct moe_group_options *o) {
    struct error e = {0};
    assert_ok(moe_devices_parse(device, &e, &w->devices), &e);
    w->n_ranks = o ? o->n_ranks : 1;
    if (o) create_groups(w, o);
    for (int i = 0; i < w->n_ranks; i++) w->ranks[i] = (struct rank){.world = w, .idx = i};
    on_all(w, open_main);
    for (int i = 0; i < w->n_ranks; i++) assert_ok(w->ranks[i].st, &w->ranks[i].e);
}

static void world_run(struct world *w) { on_all(w, rank_main); }

static void world_close(struct world *w) {
    for (int i = 0; i < w->n_ranks; i++) moe_close(w->ranks[i].m);
    for (int i = 0; i < MAX_RANKS; i++) moe_group_destroy(w->groups[i]);
}

/* What a test runs on. */
struct kind {
    const char *device;
    bool by_streams;
};

static void world_init(struct world *w, const struct kind *kind) {
    memset(w, 0, sizeof *w);
    w->by_streams = kind->by_streams;
}

/* ---- tests ---------------------------------------------------------------------------------- */

static uint64_t weight_bytes(const struct moe *m) {
    struct moe_memory_line lines[16];
    int n = moe_memory(m, lines, 16);
    for (int i = 0; i < n; i++)
        if (strcmp(lines[i].what, "weights") == 0) return lines[i].n_bytes;
    fail_msg("no weights");
    return 0;
}

static void check_answers(const struct world *w, const struct world *alone) {
    for (int s = 0; s < N_SEQS; s++) {
        const struct rank *r = &w->ranks[s % w->n_ranks];
        assert_int_equal(r->n_sampled[s], N_NEW);
        assert_memory_equal(r->sampled[s], alone->ranks[0].sampled[s], sizeof r->sampled[s]);
    }
}

static void test_tokens(void **state) {
    const struct kind *kind = *state;
    const char *device = kind->device;
    const bool collectives = kind->by_streams && strncmp(device, "cuda", 4) == 0;
    static struct world alone, w;
    memset(&alone, 0, sizeof alone);
    world_open(&alone, device, NULL);
    world_run(&alone);
    uint64_t all_bytes = weight_bytes(alone.ranks[0].m);
    const int32_t n_experts = moe_info(alone.ranks[0].m)->shape.n_experts;
    world_close(&alone);
    /* Ranks, experts held by each (0: as few as can be, -1: all), and tokens between looks at the balance. */
    const int cases[][3] = {{1, 0, 0},  {2, 0, 0},   {3, 0, 0},   {2, -1, 0},
                            {3, -1, 0}, {2, 0, 200}, {3, 2, 200}, {3, 0, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int n_ranks = cases[i][0], extra = cases[i][1];
        if (kind->by_streams && !collectives && i != 1 && i != 4 && i != 6)
            continue; /* one of each sort */
        if (collectives && n_ranks > alone.devices.n) continue; /* NCCL wants a GPU for each rank */
        int32_t least = (n_experts + n_ranks - 1) / n_ranks;
        world_init(&w, kind);
        world_open(&w, device,
                   &(struct moe_group_options){
                       .n_ranks = n_ranks,
                       .experts_per_rank = extra < 0 ? n_experts : least + extra,
                       .timeout_ns = UINT64_C(120000000000),
                       .replan_tokens = cases[i][2] > 0 ? (uint64_t)cases[i][2] : 0,
                       .max_imbalance = cases[i][2] > 0 ? 1.0 : 0});
        if (extra == 0 && n_ranks > 1) assert_true(weight_bytes(w.ranks[0].m) < all_bytes * 3 / 4);
        world_run(&w);
        uint64_t n_rows = 0, n_moved = 0, n_ungrouped = 0;
        for (int r = 0; r < n_ranks; r++) {
            assert_int_equal(w.ranks[r].st, ST_OK);
            assert_true(n_ranks == 1 || w.ranks[r].counters.exchange_bytes > 0);
            n_rows += w.ranks[r].counters.expert_rows;
            n_ungrouped += w.ranks[r].counters.expert_reads_ungrouped;
            n_moved += w.ranks[r].counters.n_moved;
        }
        assert_true(n_rows == n_ungrouped);
        assert_int_equal(n_moved > 0, cases[i][2] > 0 && !collectives);
        check_answers(&w, &alone);
        world_close(&w);
    }
}

/* Ranks with all experts may compute them alone, and then together again. */
static void test_apart(void **state) {
    const struct kind *kind = *state;
    static struct world alone, w;
    memset(&alone, 0, sizeof alone);
    world_open(&alone, kind->device, NULL);
    world_run(&alone);
    world_close(&alone);
    world_init(&w, kind);
    world_open(&w, kind->device,
               &(struct moe_group_options){
                   .n_ranks = 2, .experts_per_rank = 1000, .timeout_ns = UINT64_C(120000000000)});
    uint64_t n_rows = 0;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 2; i++)
            assert_int_equal(moe_group_use(group_of(&w, i), round != 1), ST_OK);
        world_run(&w);
        check_answers(&w, &alone);
        uint64_t n = w.ranks[0].counters.expert_rows;
        assert_int_equal(n > n_rows, round != 1);
        n_rows = n;
        for (int r = 0; r < 2; r++) memset(w.ranks[r].n_sampled, 0, sizeof w.ranks[r].n_sampled);
    }
    world_close(&w);
    world_init(&w, kind);
    world_open(&w, kind->device, &(struct moe_group_options){.n_ranks = 2});
    assert_int_equal(moe_group_use(w.group, false), ST_UNSUPPORTED);
    world_close(&w);
}

/* A rank that stops coming: the others wait no longer than they were told to. */
static void test_missing_rank(void **state) {
    const struct kind *kind = *state;
    static struct world w;
    world_init(&w, kind);
    world_open(&w, kind->device,
               &(struct moe_group_options){.n_ranks = 3, .timeout_ns = UINT64_C(300000000)});
    w.quits_at[1] = 4;
    world_run(&w);
    assert_int_equal(w.ranks[0].st, ST_ENGINE_LOST);
    assert_int_equal(w.ranks[1].st, ST_OK);
    assert_int_equal(w.ranks[2].st, ST_ENGINE_LOST);
    /* It comes back too late, and hears it too. */
    assert_int_equal(run_step(&w.ranks[1], 4), ST_ENGINE_LOST);
    world_close(&w);
}

static void *close_main(void *ctx) {
    struct rank *r = ctx;
    usleep(50000);
    moe_close(r->m);
    r->m = NULL;
    return NULL;
}

/* One that leaves: they do not wait at all, or this test would time out. */
static void test_rank_leaves(void **state) {
    const struct kind *kind = *state;
    static struct world w;
    world_init(&w, kind);
    world_open(&w, kind->device,
               &(struct moe_group_options){.n_ranks = 2, .timeout_ns = UINT64_C(3600000000000)});
    pthread_t closer;
    assert_int_equal(pthread_create(&closer, NULL, close_main, &w.ranks[1]), 0);
    assert_int_equal(run_step(&w.ranks[0], 1), ST_ENGINE_LOST);
    pthread_join(closer, NULL);
    world_close(&w);
}

static void test_refusals(void **state) {
    const struct kind *kind = *state;
    struct moe_group *g;
    struct error e;
    struct moe_options o = {
        .model_path = TINY_MODEL, .device = kind->device, .limits = limits, .n_threads = 1};
    assert_int_equal(moe_group_create(&(struct moe_group_options){.n_ranks = 0}, &e, &g),
                     ST_INVALID);
    assert_int_equal(moe_group_create(&(struct moe_group_options){.n_ranks = 17}, &e, &g),
                     ST_INVALID);
    assert_ok(moe_group_create(&(struct moe_group_options){.n_ranks = 2}, &e, &g), &e);
    struct moe *a, *b;
    o.group = g;
    assert_ok(moe_open(&o, NULL, NULL, &e, &a), &e);
    o.rank = 1;
    o.limits.max_batch_tokens = 25; /* the ranks must agree on what a step holds */
    assert_int_equal(moe_open(&o, NULL, NULL, &e, &b), ST_INVALID);
    assert_non_null(strstr(e.text, "rank 1"));
    moe_close(a);
    moe_group_destroy(g);
}

int main(int argc, char **argv) {
    static struct kind reference = {"reference", false}, cpu = {"cpu", false},
                       streams = {"cpu", true}, slow_streams = {"reference", true};
    struct kind device = {argc > 1 ? argv[1] : NULL, false}, apart = {device.device, true};
    const struct CMUnitTest on_host[] = {
        cmocka_unit_test_prestate(test_tokens, &reference),
        cmocka_unit_test_prestate(test_tokens, &cpu),
        cmocka_unit_test_prestate(test_tokens, &streams),
        cmocka_unit_test_prestate(test_apart, &reference),
        cmocka_unit_test_prestate(test_apart, &cpu),
        cmocka_unit_test_prestate(test_apart, &streams),
        cmocka_unit_test_prestate(test_missing_rank, &reference),
        cmocka_unit_test_prestate(test_missing_rank, &cpu),
        cmocka_unit_test_prestate(test_missing_rank, &slow_streams),
        cmocka_unit_test_prestate(test_rank_leaves, &reference),
        cmocka_unit_test_prestate(test_rank_leaves, &slow_streams),
        cmocka_unit_test_prestate(test_refusals, &reference),
    };
    const struct CMUnitTest on_device[] = {
        cmocka_unit_test_prestate(test_tokens, &device),
        cmocka_unit_test_prestate(test_apart, &device),
        cmocka_unit_test_prestate(test_missing_rank, &device),
        cmocka_unit_test_prestate(test_rank_leaves, &device),
        /* Two ranks of different processes, or as if, need two GPUs. */
        cmocka_unit_test_prestate(test_tokens, &apart),
        cmocka_unit_test_prestate(test_apart, &apart),
        cmocka_unit_test_prestate(test_rank_leaves, &apart),
    };
    size_t n = sizeof on_device / sizeof *on_device - (device.device && strchr(device.device, ',') ? 0 : 3);
    return device.device ? _cmocka_run_group_tests("device", on_device, n, NULL, NULL)
                         : cmocka_run_group_tests(on_host, NULL, NULL);
}
