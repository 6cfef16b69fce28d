/* sched, against a fake engine: random workloads on virtual time. The engine's next token is a
 * function of the ids so far, which it reads from its paged "KV" and from nowhere else; so
 * whatever the schedule, every sequence must get the tokens of the direct computation. The engine
 * also refuses a step that is not one: a gap in the positions, a table that does not cover them, a
 * slot twice, a position that another sequence, or an earlier run of the same one, wrote last. */
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/sched.h"
#include "daemon/sched_state.h"

enum { N_VOCAB = 1000, STOP_EVERY = 37 };

/* ---- the fake engine ------------------------------------------------------------------------- */

static uint64_t mix(uint64_t h, int32_t id) {
    h = (h ^ (uint64_t)(uint32_t)id) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ (h >> 29);
}

static int32_t token_of(uint64_t h) { return (int32_t)((h >> 20) % N_VOCAB); }

static int32_t direct_next(const int32_t *ids, int32_t n) {
    uint64_t h = 1;
    for (int32_t i = 0; i < n; i++) h = mix(h, ids[i]);
    return token_of(h);
}

struct cell { /* one position of one block */
    uint64_t run;
    int32_t pos, id;
};

struct fake_slot {
    uint64_t run; /* which start this is, over all slots; 0: never started */
    int32_t *ids, n_ids; /* the sampler's history */
    int32_t n_written;
    bool sampled;
};

struct fake {
    int32_t n_blocks, block_tokens, n_slots, max_batch_tokens;
    struct cell *cells;
    struct fake_slot *slots;
    uint64_t n_runs, rng;
    int32_t fail_permille; /* rows with ST_NUMERIC */
};

static void fake_start(struct fake *f, const struct moe_slot_start *start) {
    assert_in_range(start->slot, 0, f->n_slots - 1);
    struct fake_slot *slot = &f->slots[start->slot];
    slot->run = ++f->n_runs;
    slot->n_ids = start->n_ids;
    slot->n_written = 0;
    slot->sampled = false;
    memcpy(slot->ids, start->ids, (size_t)start->n_ids * sizeof *slot->ids);
    assert_true(start->n_prompt >= 1 && start->n_prompt <= start->n_ids);
}

static struct cell *cell_of(struct fake *f, const int32_t *table, int32_t n_table, int32_t pos) {
    int32_t b = pos / f->block_tokens;
    assert_true(b < n_table);
    assert_in_range(table[b], 0, f->n_blocks - 1);
    return &f->cells[table[b] * f->block_tokens + pos % f->block_tokens];
}

/* Run one sequence of a step; append its row if it samples. */
static void fake_seq(struct fake *f, const struct moe_step_seq *q, const int32_t *ids,
                     const int32_t *table, struct moe_result *out) {
    struct fake_slot *slot = &f->slots[q->slot];
    assert_true(slot->run > 0);
    assert_true(q->n_tokens >= 1);
    assert_int_equal(q->start_pos, slot->n_written); /* no gap, nothing twice */
    assert_int_equal(q->n_blocks,
                     (q->start_pos + q->n_tokens + f->block_tokens - 1) / f->block_tokens);
    for (int32_t i = 0; i < q->n_tokens; i++) {
        int32_t pos = q->start_pos + i, id = ids[i];
        assert_true(pos < slot->n_ids);
        if (id == MOE_LAST_TOKEN) {
            assert_true(slot->sampled && pos == slot->n_ids - 1);
            id = slot->ids[pos];
        }
        assert_int_equal(id, slot->ids[pos]);
        *cell_of(f, table, q->n_blocks, pos) = (struct cell){slot->run, pos, id};
    }
    slot->n_written += q->n_tokens;
    if (q->rows == MOE_ROWS_NONE) return;
    assert_int_equal(q->rows, MOE_ROWS_SAMPLE);
    assert_int_equal(slot->n_written, slot->n_ids);
    uint64_t h = 1;
    for (int32_t pos = 0; pos < slot->n_ids; pos++) {
        const struct cell *c = cell_of(f, table, q->n_blocks, pos);
        assert_true(c->run == slot->run && c->pos == pos);
        h = mix(h, c->id);
    }
    struct moe_row *row = &out->rows[out->n_rows++];
    *row = (struct moe_row){.slot = q->slot, .token = token_of(h)};
    slot->ids[slot->n_ids++] = row->token;
    slot->sampled = true;
    if (test_random(&f->rng) % 1000 < (uint64_t)f->fail_permille) {
        row->st = ST_NUMERIC;
        row->token = -1;
    }
}

static void fake_step(struct fake *f, const struct sched_plan *plan, struct moe_result *out) {
    bool *used = calloc((size_t)f->n_slots, sizeof *used);
    const struct moe_step *step = &plan->step;
    const int32_t *ids = step->ids, *table = step->blocks;
    for (int32_t i = 0; i < plan->n_starts; i++) fake_start(f, &plan->starts[i]);
    out->n_rows = 0;
    for (int32_t i = 0; i < step->n_seqs; i++) {
        const struct moe_step_seq *q = &step->seqs[i];
        assert_in_range(q->slot, 0, f->n_slots - 1);
        assert_false(used[q->slot]);
        used[q->slot] = true;
        fake_seq(f, q, ids, table, out);
        ids += q->n_tokens;
        table += q->n_blocks;
    }
    assert_int_equal(ids - step->ids, step->n_tokens);
    assert_in_range(step->n_tokens, 1, f->max_batch_tokens);
    assert_int_equal(plan->n_decode_tokens + plan->n_prefill_tokens, step->n_tokens);
    free(used);
}

/* ---- the client's side: a ledger
 * ------------------------------------------------------------------- */

struct client {
    bool live, held;
    struct sched_id id;
    int32_t *ids, n_ids, n_prompt, limit;
    bool stops; /* at a token that STOP_EVERY divides */
    uint64_t arrival;
    int32_t priority;
};

struct world {
    uint64_t rng, now;
    struct sched_limits limits;
    int32_t n_priorities, n_blocks, block_tokens, depth;
    int32_t cancel_percent, hold_percent, fail_permille;
    struct paging *paging;
    struct sched *sched;
    struct fake fake;
    struct client *clients; /* by sched_id.idx */
    struct sched_plan plans[MOE_MAX_IN_FLIGHT];
    struct moe_result results[MOE_MAX_IN_FLIGHT];
    int32_t first, n_in_flight, n_live, n_todo;
    uint64_t n_added, n_done, n_tokens, n_plans, n_work;
    struct sched_token *tokens;
};

static int32_t below(struct world *w, int32_t n) {
    return (int32_t)(test_random(&w->rng) % (uint64_t)n);
}

static void check(struct world *w) {
    struct error error = {0}, *e = &error;
    assert_ok(sched_check(w->sched, e), e);
}

static void add(struct world *w) {
    struct client c = {
        .live = true, .stops = below(w, 2) == 0, .priority = below(w, w->n_priorities)};
    int32_t most = w->limits.max_seq_tokens;
    c.n_prompt = 1 + below(w, below(w, 4) == 0 ? most : most / 4);
    c.ids = malloc((size_t)(most + 1) * sizeof *c.ids);
    for (int32_t i = 0; i < c.n_prompt; i++) c.ids[i] = below(w, N_VOCAB);
    c.n_ids = c.n_prompt;
    int32_t pool = w->n_blocks * w->block_tokens + 1, cap = pool < most ? pool : most;
    struct sched_request r = {.ids = c.ids,
                              .n_ids = c.n_prompt,
                              .priority = c.priority,
                              .max_tokens = 1 + below(w, most)};
    enum status st = sched_add(w->sched, &r, w->now, &c.id);
    check(w);
    if (c.n_prompt >= cap)
        assert_int_equal(st, ST_TOO_LONG);
    else if (st != ST_OK)
        assert_int_equal(st, ST_OVERLOADED);
    if (st != ST_OK) {
        free(c.ids);
        return;
    }
    c.limit = c.n_prompt + r.max_tokens < cap ? c.n_prompt + r.max_tokens : cap;
    c.arrival = w->n_added++;
    assert_false(w->clients[c.id.idx].live);
    w->clients[c.id.idx] = c;
    w->n_work += (uint64_t)c.limit;
    w->n_live++;
    w->n_todo--;
}

static void leave(struct world *w, struct client *c) {
    sched_remove(w->sched, c->id);
    check(w);
    free(c->ids);
    *c = (struct client){0};
    w->n_live--;
    w->n_done++;
}

static void disturb(struct world *w) {
    struct client *c = &w->clients[below(w, w->limits.max_sequences)];
    if (!c->live) return;
    if (below(w, 100) < w->cancel_percent) {
        leave(w, c);
    } else if (below(w, 100) < (c->held ? 50 : w->hold_percent)) {
        c->held = !c->held;
        sched_hold(w->sched, c->id, c->held);
        check(w);
    }
}

/* The oldest of the running sequences that can advance is in the plan. */
static void check_oldest(struct world *w, const struct sched_plan *plan) {
    const struct client *oldest = NULL;
    for (int32_t i = 0; i < w->limits.max_sequences; i++) {
        const struct client *c = &w->clients[i];
        const struct seq *q = &w->sched->seqs[i];
        if (!c->live || q->state != SEQ_RUNNING) continue;
        bool waits = n_virtual(q) == q->limit || q->failed;
        for (int32_t k = 0; k < plan->step.n_seqs; k++) waits &= plan->id_of[k].idx != i;
        if (waits) continue;
        if (!oldest || c->priority < oldest->priority ||
            (c->priority == oldest->priority && c->arrival < oldest->arrival))
            oldest = c;
    }
    assert_non_null(oldest);
    bool found = false;
    for (int32_t k = 0; k < plan->step.n_seqs; k++) found |= plan->id_of[k].idx == oldest->id.idx;
    assert_true(found);
}

static bool plan(struct world *w) {
    int32_t i = (w->first + w->n_in_flight) % MOE_MAX_IN_FLIGHT;
    bool any = sched_plan(w->sched, w->now, &w->plans[i]);
    check(w);
    if (!any) {
        assert_int_equal(w->plans[i].step.n_seqs, 0);
        return false;
    }
    assert_true(w->plans[i].number == ++w->n_plans);
    check_oldest(w, &w->plans[i]);
    fake_step(&w->fake, &w->plans[i], &w->results[i]);
    w->n_in_flight++;
    return true;
}

static void apply(struct world *w) {
    struct moe_result *result = &w->results[w->first];
    int32_t n = sched_apply(w->sched, &w->plans[w->first], result, w->now, w->tokens);
    check(w);
    w->first = (w->first + 1) % MOE_MAX_IN_FLIGHT;
    w->n_in_flight--;
    for (int32_t i = 0; i < n; i++) {
        const struct sched_token *t = &w->tokens[i];
        struct client *c = &w->clients[t->id.idx];
        assert_true(c->live && !c->held && c->id.generation == t->id.generation);
        if (t->row->st != ST_OK) {
            assert_int_equal(t->n_sampled, c->n_ids - c->n_prompt);
            leave(w, c);
            continue;
        }
        assert_int_equal(t->row->token, direct_next(c->ids, c->n_ids));
        c->ids[c->n_ids++] = t->row->token;
        assert_int_equal(t->n_sampled, c->n_ids - c->n_prompt); /* none lost, none twice */
        assert_int_equal(t->at_limit, c->n_ids == c->limit);
        w->n_tokens++;
        if (t->at_limit || (c->stops && t->row->token % STOP_EVERY == 0)) leave(w, c);
    }
}

static void open_world(struct world *w) {
    struct paging_limits pl = {w->n_blocks, w->block_tokens, w->limits.max_running,
                               w->limits.max_seq_tokens / w->block_tokens + 1};
    int32_t n = w->limits.max_running;
    assert_int_equal(paging_create(&pl, &w->paging), ST_OK);
    assert_int_equal(sched_create(&w->limits, w->paging, w->block_tokens, &w->sched), ST_OK);
    w->fake = (struct fake){.n_blocks = w->n_blocks,
                            .block_tokens = w->block_tokens,
                            .n_slots = n,
                            .max_batch_tokens = w->limits.max_batch_tokens,
                            .rng = w->rng,
                            .fail_permille = w->fail_permille};
    w->fake.cells = calloc((size_t)(w->n_blocks * w->block_tokens), sizeof *w->fake.cells);
    w->fake.slots = calloc((size_t)n, sizeof *w->fake.slots);
    for (int32_t i = 0; i < n; i++)
        w->fake.slots[i].ids =
            malloc((size_t)(w->limits.max_seq_tokens + 2) * sizeof *w->fake.slots[i].ids);
    w->clients = calloc((size_t)w->limits.max_sequences, sizeof *w->clients);
    w->tokens = calloc((size_t)n, sizeof *w->tokens);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        assert_int_equal(sched_plan_create(&w->limits, pl.max_blocks_per_seq, &w->plans[i]), ST_OK);
        w->results[i].rows = calloc((size_t)n, sizeof *w->results[i].rows);
    }
}

/* Everything came back: no block, slot or sequence is left. */
static void close_world(struct world *w) {
    struct sched_stats s = sched_stats(w->sched);
    assert_int_equal(s.n_waiting, 0);
    assert_int_equal(s.n_running, 0);
    assert_int_equal(s.n_waiting_tokens, 0);
    assert_true(s.n_plans == w->n_plans);
    assert_int_equal(paging_n_free(w->paging), w->n_blocks);
    check(w);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        sched_plan_destroy(&w->plans[i]);
        free(w->results[i].rows);
    }
    sched_destroy(w->sched);
    paging_destroy(w->paging);
    for (int32_t i = 0; i < w->limits.max_running; i++) free(w->fake.slots[i].ids);
    free(w->fake.slots);
    free(w->fake.cells);
    free(w->clients);
    free(w->tokens);
}

static void release_all(struct world *w) {
    for (int32_t i = 0; i < w->limits.max_sequences; i++) {
        if (!w->clients[i].live || !w->clients[i].held) continue;
        w->clients[i].held = false;
        sched_hold(w->sched, w->clients[i].id, false);
    }
}

/* Add n sequences over time and run until all are done; returns the scheduler's last statistics. */
static struct sched_stats run_world(struct world *w, int32_t n) {
    open_world(w);
    w->n_todo = n;
    while (w->n_todo > 0 || w->n_live > 0 || w->n_in_flight > 0) {
        w->now++;
        for (int32_t k = below(w, 4); k > 0 && w->n_todo > 0; k--) add(w);
        disturb(w);
        if (w->n_in_flight < w->depth && below(w, 4) != 0 && plan(w)) continue;
        if (w->n_in_flight > 0) {
            apply(w);
        } else if (w->n_todo == 0 && w->n_live > 0) {
            release_all(w);
            assert_true(plan(w)); /* nothing out and something waits: there must be a step */
        }
    }
    struct sched_stats s = sched_stats(w->sched);
    close_world(w);
    return s;
}

/* Shapes from roomy to so tight that sequences preempt each other all the time. */
static struct world random_world(uint64_t seed) {
    struct world w = {.rng = seed};
    w.block_tokens = 1 << below(&w, 4);
    w.limits = (struct sched_limits){.max_batch_tokens = 1 + below(&w, 40),
                                     .max_running = 1 + below(&w, 12),
                                     .max_sequences = 1 + below(&w, 40),
                                     .max_seq_tokens = 8 + below(&w, 60),
                                     .max_queued_tokens = 1 + below(&w, 400),
                                     .prefill_chunk = below(&w, 2) * (1 + below(&w, 16))};
    w.n_blocks =
        1 + w.limits.max_seq_tokens * (1 + below(&w, 3)) / w.block_tokens / (1 + below(&w, 2));
    w.depth = 1 + below(&w, 2);
    w.n_priorities = below(&w, 2) ? 1 : SCHED_N_PRIORITIES;
    w.cancel_percent = below(&w, 3) * 3;
    w.hold_percent = below(&w, 3) == 0 ? 5 : 0;
    w.fail_permille = below(&w, 4) == 0 ? 10 : 0;
    return w;
}

static void test_random_worlds(void **state) {
    (void)state;
    uint64_t n_tokens = 0, n_preempted = 0;
    for (uint64_t seed = 1; seed <= 400; seed++) {
        struct world w = random_world(seed);
        struct sched_stats s = run_world(&w, 60);
        n_tokens += w.n_tokens;
        n_preempted += s.n_preempted;
    }
    assert_true(n_tokens > 100000); /* else the worlds are too easy to show anything */
    assert_true(n_preempted > 1000);
}

/* One class, nobody leaves early: each plan advances the oldest for good, a bound on the plans. */
static void test_no_starvation(void **state) {
    (void)state;
    for (uint64_t seed = 1000; seed < 1100; seed++) {
        struct world w = random_world(seed);
        w.n_priorities = 1;
        w.cancel_percent = w.hold_percent = w.fail_permille = 0;
        run_world(&w, 40);
        assert_true(w.n_plans <= w.n_work);
        assert_true(w.n_done == w.n_added);
    }
}

/* Thousands of sequences, more than 256 running, a pool that all of them do not fit. */
static void test_many(void **state) {
    (void)state;
    struct world w = {.rng = 5, .block_tokens = 4, .n_blocks = 1000, .depth = 2, .n_priorities = 2};
    w.limits = (struct sched_limits){600, 400, 3000, 40, 1 << 20, 16, 0};
    w.cancel_percent = 1;
    open_world(&w);
    w.n_todo = 2500;
    while (w.n_todo > 0) add(&w);
    int32_t most_running = 0;
    while (w.n_live > 0 || w.n_in_flight > 0) {
        w.now++;
        disturb(&w);
        if (w.n_in_flight == w.depth || !plan(&w)) apply(&w);
        int32_t n = sched_stats(w.sched).n_running;
        if (n > most_running) most_running = n;
    }
    assert_true(most_running > 256);
    assert_true(sched_stats(w.sched).n_preempted > 0);
    close_world(&w);
}

/* The tokens do not depend on the schedule: the ledger checks each against the direct computation;
 * here, that depth and pool change the schedule at all, or that check would be empty. */
static void test_schedules_differ(void **state) {
    (void)state;
    struct world tight = {
        .rng = 9, .block_tokens = 2, .n_blocks = 40, .depth = 2, .n_priorities = 1};
    tight.limits = (struct sched_limits){24, 8, 50, 60, 100000, 0, 0};
    struct world roomy = tight;
    roomy.n_blocks = 4000;
    roomy.depth = 1;
    assert_true(run_world(&tight, 50).n_preempted > 20);
    assert_true(run_world(&roomy, 50).n_preempted == 0);
    assert_true(tight.n_plans != roomy.n_plans);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_worlds),
        cmocka_unit_test(test_no_starvation),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_schedules_differ),
    };
    return cmocka_run_group_tests_name("sched_random", tests, NULL, NULL);
}
