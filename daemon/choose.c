/* See choose.h. */
#include "daemon/choose.h"

#include <poll.h>
#include <stdlib.h>

enum { MAX_BATCH = 64, N_ROUNDS = 5, N_STEPS = 4 };

/* A step of `batch` sequences of one token each, which nobody samples: attention is the same either way. */
struct trial {
    struct engine_step step;
    struct moe_step_seq seqs[MAX_BATCH];
    int32_t ids[MAX_BATCH], blocks[MAX_BATCH];
    struct moe_row row;
};

static int32_t batch_of(const struct moe_limits *l) {
    int32_t n = MAX_BATCH;
    if (n > l->max_seqs) n = l->max_seqs;
    if (n > l->max_batch_tokens) n = l->max_batch_tokens;
    if (n > l->n_blocks) n = l->n_blocks;
    return n;
}

/* Tokens far apart, others in each step and on each device, so that routing spreads as it does in service. */
static void fill(struct trial *t, const struct moe_info *info, int rank, int number) {
    int32_t n = batch_of(&info->limits), n_vocab = info->shape.n_vocab;
    for (int32_t i = 0; i < n; i++) {
        uint64_t at = ((uint64_t)number * MOE_MAX_RANKS + (uint64_t)rank) * MAX_BATCH + (uint64_t)i;
        t->seqs[i] = (struct moe_step_seq){.slot = i, .n_tokens = 1, .n_blocks = 1};
        t->ids[i] = (int32_t)(at * UINT64_C(2654435761) % (uint64_t)n_vocab);
        t->blocks[i] = i;
    }
    t->step = (struct engine_step){.result = {.rows = &t->row}};
    t->step.plan.step = (struct moe_step){
        .n_seqs = n, .n_tokens = n, .seqs = t->seqs, .ids = t->ids, .blocks = t->blocks};
}

static enum status wait_for(struct engine *g) {
    for (;;) {
        engine_clear(g);
        const struct engine_step *step = engine_pop(g);
        if (step) return step->st;
        if (engine_lost(g) != ST_OK) return engine_lost(g);
        poll(&(struct pollfd){.fd = engine_fd(g), .events = POLLIN}, 1, -1);
    }
}

/* A few steps on all devices; *ns is the time of the whole. */
static enum status run(const struct choose_args *a, struct trial *trials, int round, uint64_t *ns) {
    uint64_t begun = clock_now_ns();
    enum status st = ST_OK;
    for (int k = 0; k < N_STEPS && st == ST_OK; k++) {
        for (int i = 0; i < a->n; i++) {
            fill(&trials[i], a->info, i, round * N_STEPS + k);
            engine_push(a->engines[i], &trials[i].step);
        }
        for (int i = 0; i < a->n; i++) {
            enum status one = wait_for(a->engines[i]);
            if (one == ST_OK) engine_push_none(a->engines[i]);
            if (st == ST_OK) st = one;
        }
    }
    *ns = clock_now_ns() - begun;
    return st;
}

/* Ranks elsewhere hear it with their next step. */
static void use(const struct choose_args *a, bool together) {
    for (int i = 0; i < a->n_groups; i++) CHECK(moe_group_use(a->groups[i], together) == ST_OK);
}

enum status choose_parallel(const struct choose_args *a, bool *together) {
    struct trial *trials = calloc((size_t)a->n, sizeof *trials);
    if (!trials) return ST_NO_MEMORY;
    uint64_t best[2] = {UINT64_MAX, UINT64_MAX}; /* replicas, together */
    enum status st = ST_OK;
    for (int round = 0; round <= N_ROUNDS && st == ST_OK; round++) {
        for (int mode = 0; mode < 2 && st == ST_OK; mode++) {
            uint64_t ns;
            use(a, mode == 1);
            st = run(a, trials, round, &ns);
            if (round > 0 && ns < best[mode]) best[mode] = ns; /* the first only warms */
        }
    }
    free(trials);
    if (st != ST_OK) return st;
    *together = best[1] < best[0];
    use(a, *together);
    log_event(LOG_INFO, "daemon", "parallel",
              "mode=%s why=\"measured\" batch=%d replica_step_us=%.1f expert_step_us=%.1f",
              *together ? "expert" : "replica", batch_of(&a->info->limits) * a->n,
              (double)best[0] / N_STEPS / 1e3, (double)best[1] / N_STEPS / 1e3);
    return ST_OK;
}
