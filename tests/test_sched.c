/* sched, step by step: what each plan holds and what each result means, on small pools where the answer
 * can be worked out by hand. Random workloads are in test_sched_random.c. */
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/sched.h"
#include "daemon/sched_state.h"

enum { B = 4, MAX_SEQ_TOKENS = 64, MAX_ROWS = 512 };

struct rig {
    struct paging *paging;
    struct sched *sched;
    struct sched_plan plan[MOE_MAX_IN_FLIGHT];
    int next; /* plan to fill */
    struct sched_token tokens[MAX_ROWS];
    struct moe_row rows[MAX_ROWS];
    uint64_t now;
};

static struct sched_limits limits(int32_t max_batch_tokens, int32_t max_running) {
    return (struct sched_limits){.max_batch_tokens = max_batch_tokens,
                                 .max_running = max_running,
                                 .max_sequences = 2 * max_running + 4,
                                 .max_seq_tokens = MAX_SEQ_TOKENS,
                                 .max_queued_tokens = 10000};
}

static struct rig *rig_open(const struct sched_limits *l, int32_t n_blocks) {
    struct rig *r = calloc(1, sizeof *r);
    struct paging_limits pl = {n_blocks, B, l->max_running, MAX_SEQ_TOKENS / B};
    assert_int_equal(paging_create(&pl, &r->paging), ST_OK);
    assert_int_equal(sched_create(l, r->paging, B, &r->sched), ST_OK);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++)
        assert_int_equal(sched_plan_create(l, pl.max_blocks_per_seq, &r->plan[i]), ST_OK);
    return r;
}

static void check(struct rig *r) {
    struct error error = {0}, *e = &error;
    assert_ok(sched_check(r->sched, e), e);
}

static void rig_close(struct rig *r) {
    check(r);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) sched_plan_destroy(&r->plan[i]);
    sched_destroy(r->sched);
    paging_destroy(r->paging);
    free(r);
}

/* A prompt first, first + 1, … */
static enum status try_add(struct rig *r, int32_t first, int32_t n_prompt, int32_t max_tokens,
                           int32_t priority, struct sched_id *id) {
    int32_t ids[2 * MAX_SEQ_TOKENS];
    for (int32_t i = 0; i < n_prompt; i++) ids[i] = first + i;
    struct sched_request q = {.ids = ids,
                              .n_ids = n_prompt,
                              .max_tokens = max_tokens,
                              .priority = priority,
                              .sampling = {.seed = (uint64_t)first}};
    enum status st = sched_add(r->sched, &q, ++r->now, id);
    check(r);
    return st;
}

static struct sched_id add(struct rig *r, int32_t first, int32_t n_prompt, int32_t max_tokens) {
    struct sched_id id;
    assert_int_equal(try_add(r, first, n_prompt, max_tokens, 1, &id), ST_OK);
    return id;
}

static struct sched_id add_class(struct rig *r, int32_t n_prompt, int32_t max_tokens, int32_t c) {
    struct sched_id id;
    assert_int_equal(try_add(r, 0, n_prompt, max_tokens, c, &id), ST_OK);
    return id;
}

/* The next plan, or NULL when nothing can run. */
static struct sched_plan *plan(struct rig *r) {
    struct sched_plan *p = &r->plan[r->next];
    bool any = sched_plan(r->sched, ++r->now, p);
    check(r);
    if (!any) {
        assert_int_equal(p->step.n_seqs + p->step.n_tokens + p->n_starts, 0);
        return NULL;
    }
    r->next ^= 1;
    return p;
}

/* Result of p, where the row of slot s is the token 1000 + s. */
static int32_t apply(struct rig *r, struct sched_plan *p) {
    struct moe_result result = {.rows = r->rows};
    for (int32_t i = 0; i < p->step.n_seqs; i++)
        if (p->seqs[i].rows == MOE_ROWS_SAMPLE)
            r->rows[result.n_rows++] =
                (struct moe_row){.slot = p->seqs[i].slot, .token = 1000 + p->seqs[i].slot};
    int32_t n = sched_apply(r->sched, p, &result, ++r->now, r->tokens);
    check(r);
    return n;
}

static void step(struct rig *r) {
    struct sched_plan *p = plan(r);
    assert_non_null(p);
    apply(r, p);
}

static void drop(struct rig *r, struct sched_id id) {
    sched_remove(r->sched, id);
    check(r);
}

static struct sched_seq_info info(struct rig *r, struct sched_id id) {
    struct sched_seq_info i;
    assert_int_equal(sched_seq_info(r->sched, id, &i), ST_OK);
    return i;
}

/* id's entry in p, or NULL. */
static const struct moe_step_seq *in_plan(const struct sched_plan *p, struct sched_id id) {
    for (int32_t i = 0; i < p->step.n_seqs; i++)
        if (p->id_of[i].idx == id.idx && p->id_of[i].generation == id.generation)
            return &p->seqs[i];
    return NULL;
}

static int32_t tokens_of(const struct sched_plan *p, struct sched_id id) {
    const struct moe_step_seq *q = in_plan(p, id);
    return q ? q->n_tokens : 0;
}

/* ---- one sequence --------------------------------------------------------------------------- */

static void test_one(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 20);
    assert_null(plan(r));
    struct sched_id id = add(r, 50, 5, 3);
    assert_int_equal(sched_stats(r->sched).n_waiting_tokens, 5);
    assert_int_equal(info(r, id).first_scheduled_ns, 0);
    struct sched_plan *p = plan(r);
    assert_int_equal(p->number, 1);
    assert_int_equal(p->n_starts, 1);
    assert_int_equal(p->starts[0].slot, p->seqs[0].slot);
    assert_int_equal(p->starts[0].n_ids, 5);
    assert_int_equal(p->starts[0].n_prompt, 5);
    assert_true(p->starts[0].sampling.seed == 50);
    assert_int_equal(p->step.n_seqs, 1);
    assert_int_equal(p->step.n_tokens, 5);
    for (int32_t i = 0; i < 5; i++) {
        assert_int_equal(p->step.ids[i], 50 + i);
        assert_int_equal(p->starts[0].ids[i], 50 + i);
    }
    assert_int_equal(p->seqs[0].start_pos, 0);
    assert_int_equal(p->seqs[0].n_blocks, 2);
    assert_int_equal(p->seqs[0].rows, MOE_ROWS_SAMPLE);
    assert_int_equal(p->n_prefill_tokens, 5);
    assert_int_equal(p->n_decode_tokens, 0);
    int32_t table[2];
    paging_seq_copy(r->paging, p->seqs[0].slot, 2, table);
    assert_memory_equal(p->step.blocks, table, sizeof table);
    assert_true(info(r, id).running && info(r, id).first_scheduled_ns == r->now);

    assert_int_equal(apply(r, p), 1);
    assert_int_equal(r->tokens[0].id.idx, id.idx);
    assert_int_equal(r->tokens[0].n_sampled, 1);
    assert_ptr_equal(r->tokens[0].row, &r->rows[0]);
    assert_false(r->tokens[0].at_limit);
    p = plan(r);
    assert_int_equal(p->number, 2);
    assert_int_equal(p->n_starts, 0);
    assert_int_equal(p->step.n_tokens, 1);
    assert_int_equal(p->step.ids[0], 1000 + p->seqs[0].slot); /* known by now */
    assert_int_equal(p->seqs[0].start_pos, 5);
    assert_int_equal(p->n_decode_tokens, 1);
    apply(r, p);
    p = plan(r);
    assert_int_equal(apply(r, p), 1);
    assert_true(r->tokens[0].at_limit);
    assert_int_equal(r->tokens[0].n_sampled, 3);
    assert_int_equal(info(r, id).n_known, 8);
    assert_null(plan(r));
    drop(r, id);
    assert_int_equal(paging_n_free(r->paging), 20);
    struct sched_stats s = sched_stats(r->sched);
    assert_int_equal(s.n_plans, 3);
    assert_int_equal(s.n_prompt_tokens, 5);
    assert_int_equal(s.n_decode_tokens, 2);
    rig_close(r);
}

/* One step ahead: the token that is still out stands as MOE_LAST_TOKEN, up to the limit and not beyond. */
static void test_pipeline(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 20);
    struct sched_id id = add(r, 0, 3, 3);
    struct sched_plan *a = plan(r), *b = plan(r);
    assert_int_equal(b->step.n_tokens, 1);
    assert_int_equal(b->step.ids[0], MOE_LAST_TOKEN);
    assert_int_equal(b->seqs[0].start_pos, 3);
    assert_int_equal(apply(r, a), 1);
    assert_int_equal(r->tokens[0].n_sampled, 1);
    a = plan(r); /* two are known or out: the third and last is sampled here */
    assert_int_equal(a->step.ids[0], MOE_LAST_TOKEN);
    assert_int_equal(a->seqs[0].start_pos, 4);
    assert_int_equal(apply(r, b), 1);
    assert_null(plan(r)); /* at the limit once `a` is back */
    assert_int_equal(apply(r, a), 1);
    assert_true(r->tokens[0].at_limit);
    drop(r, id);
    /* A stop: the row of the step that ran ahead is dropped, and the entry may be used again at once. */
    id = add(r, 0, 3, 9);
    a = plan(r);
    b = plan(r);
    assert_int_equal(apply(r, a), 1);
    drop(r, id);
    struct sched_id other = add(r, 0, 2, 9);
    assert_int_equal(other.idx, id.idx);
    a = plan(r);
    assert_int_equal(apply(r, b), 0);
    assert_int_equal(apply(r, a), 1);
    assert_int_equal(info(r, other).n_known, 3);
    rig_close(r);
}

static void test_chunks(void **state) {
    (void)state;
    struct sched_limits l = limits(10, 4);
    struct rig *r = rig_open(&l, 30);
    struct sched_id id = add(r, 0, 25, 5);
    int32_t expected[] = {10, 10, 5}, pos = 0;
    for (int i = 0; i < 3; i++) { /* also ahead: no row is out between chunks */
        struct sched_plan *p = plan(r);
        assert_int_equal(tokens_of(p, id), expected[i]);
        assert_int_equal(in_plan(p, id)->start_pos, pos);
        assert_int_equal(p->step.ids[0], pos);
        assert_int_equal(in_plan(p, id)->rows, i == 2 ? MOE_ROWS_SAMPLE : MOE_ROWS_NONE);
        assert_int_equal(p->n_starts, i == 0);
        pos += expected[i];
        assert_int_equal(apply(r, p), i == 2);
    }
    rig_close(r);
    l.prefill_chunk = 4;
    r = rig_open(&l, 30);
    id = add(r, 0, 9, 5);
    struct sched_id second = add(r, 100, 9, 5), third = add(r, 200, 9, 5);
    struct sched_plan *p = plan(r); /* 4 + 4 + the 2 that are left */
    assert_int_equal(tokens_of(p, id), 4);
    assert_int_equal(tokens_of(p, second), 4);
    assert_int_equal(tokens_of(p, third), 2);
    apply(r, p);
    p = plan(r); /* oldest first */
    assert_int_equal(tokens_of(p, id), 4);
    assert_int_equal(tokens_of(p, second), 4);
    assert_int_equal(tokens_of(p, third), 2);
    apply(r, p);
    p = plan(r);
    assert_int_equal(tokens_of(p, id), 1);
    assert_int_equal(tokens_of(p, second), 1);
    assert_int_equal(tokens_of(p, third), 4);
    assert_int_equal(apply(r, p), 2);
    rig_close(r);
}

/* A huge prompt, running and queued, takes what decoding leaves and never a decoding sequence's token. */
static void test_head_of_line(void **state) {
    (void)state;
    struct sched_limits l = limits(8, 6);
    struct rig *r = rig_open(&l, 40);
    struct sched_id small[3];
    for (int i = 0; i < 3; i++) small[i] = add(r, 100 * i, 2, 40);
    step(r);
    struct sched_id huge = add(r, 0, 50, 5), late = add(r, 0, 2, 5);
    for (int i = 0; i < 10; i++) {
        struct sched_plan *p = plan(r);
        for (int k = 0; k < 3; k++) assert_int_equal(tokens_of(p, small[k]), 1);
        assert_int_equal(tokens_of(p, huge), 5);
        assert_int_equal(tokens_of(p, late), 0); /* the budget is spent, and it may not overtake */
        assert_int_equal(p->n_decode_tokens, 3);
        assert_int_equal(p->n_prefill_tokens, 5);
        apply(r, p);
    }
    struct sched_plan *p = plan(r);
    assert_int_equal(tokens_of(p, huge), 1);
    assert_int_equal(p->n_decode_tokens, 4);
    assert_int_equal(tokens_of(p, late), 2);
    apply(r, p);
    rig_close(r);
}

/* The plan lists decoding sequences before chunks, whoever is older. */
static void test_order_in_plan(void **state) {
    (void)state;
    struct sched_limits l = limits(8, 4);
    l.prefill_chunk = 4;
    struct rig *r = rig_open(&l, 40);
    struct sched_id slow = add(r, 0, 20, 5), quick = add(r, 0, 2, 5);
    step(r);
    struct sched_plan *p = plan(r);
    assert_int_equal(p->step.n_seqs, 2);
    assert_int_equal(p->id_of[0].idx, quick.idx);
    assert_int_equal(p->id_of[1].idx, slow.idx);
    assert_int_equal(p->seqs[1].start_pos, 4);
    apply(r, p);
    rig_close(r);
}

/* ---- admission ------------------------------------------------------------------------------ */

static void test_add_refuses(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 2);
    l.max_sequences = 3;
    l.max_queued_tokens = 30;
    struct rig *r = rig_open(&l, 100);
    struct sched_id id, ids[3];
    assert_int_equal(try_add(r, 0, 64, 1, 1, &id), ST_TOO_LONG);
    assert_int_equal(try_add(r, 0, 63, 1, 1, &ids[0]),
                     ST_OK); /* over the queue's limit, but alone */
    assert_int_equal(try_add(r, 0, 1, 1, 1, &id), ST_OVERLOADED);
    drop(r, ids[0]);
    ids[0] = add(r, 0, 10, 1);
    ids[1] = add(r, 0, 10, 1);
    assert_int_equal(try_add(r, 0, 11, 1, 1, &id), ST_OVERLOADED);
    ids[2] = add(r, 0, 10, 1);
    assert_int_equal(try_add(r, 0, 1, 1, 1, &id), ST_OVERLOADED); /* the table is full */
    struct sched_stats s = sched_stats(r->sched);
    assert_int_equal(s.n_waiting, 3);
    assert_int_equal(s.n_waiting_tokens, 30);
    step(r);
    assert_int_equal(sched_stats(r->sched).n_waiting_tokens, 10); /* two slots */
    assert_int_equal(sched_stats(r->sched).n_running, 2);
    drop(r, ids[1]);
    drop(r, ids[1]); /* an old id: no effect */
    assert_int_equal(sched_stats(r->sched).n_running, 1);
    drop(r, (struct sched_id){.idx = -1});
    drop(r, (struct sched_id){.idx = 99});
    struct sched_seq_info i;
    assert_int_equal(sched_seq_info(r->sched, ids[1], &i), ST_NOT_FOUND);
    rig_close(r);
}

/* A pool smaller than the context is the context: longer prompts are refused, completions clipped. */
static void test_pool_is_the_limit(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 2);
    struct rig *r = rig_open(&l, 3); /* 12 positions: 13 tokens, the last of which needs none */
    struct sched_id id;
    assert_int_equal(try_add(r, 0, 13, 1, 1, &id), ST_TOO_LONG);
    assert_int_equal(try_add(r, 0, 12, 9, 1, &id), ST_OK);
    step(r);
    assert_true(r->tokens[0].at_limit);
    drop(r, id);
    id = add(r, 0, 10, 1000000000);
    int32_t n = 1;
    for (step(r); !r->tokens[0].at_limit; n++) step(r);
    assert_int_equal(n, 3);
    rig_close(r);
}

static void test_priorities(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 1);
    struct rig *r = rig_open(&l, 20);
    struct sched_id id[5];
    const int32_t class_of[] = {2, 1, 0, 1, 0}, order[] = {2, 4, 1, 3, 0};
    for (int i = 0; i < 5; i++) id[i] = add_class(r, 2, 1, class_of[i]);
    for (int i = 0; i < 5; i++) {
        step(r);
        assert_int_equal(r->tokens[0].id.idx, id[order[i]].idx);
        drop(r, id[order[i]]);
    }
    rig_close(r);
}

/* 1 + running / 8 blocks stay free, what running prompts still need is not given twice, and nobody
 * overtakes the head. */
static void test_reserve(void **state) {
    (void)state;
    struct sched_limits l = limits(64, 20);
    struct rig *r = rig_open(&l, 10);
    struct sched_id a =
        add(r, 0, 16, 9); /* 4 blocks; the 6 left are for 5 blocks and the reserve */
    struct sched_id b = add(r, 0, 20, 9);
    struct sched_plan *p = plan(r);
    assert_int_equal(tokens_of(p, a), 16);
    assert_int_equal(tokens_of(p, b), 20);
    apply(r, p);
    drop(r, b);
    b = add(r, 0, 21, 9); /* 6 blocks: they are free, but the reserve is not */
    struct sched_id c = add(r, 0, 1, 9);
    p = plan(r);
    assert_int_equal(tokens_of(p, a), 1);
    assert_int_equal(tokens_of(p, b), 0);
    assert_int_equal(tokens_of(p, c), 0);
    apply(r, p);
    drop(r, a);
    p = plan(r); /* nothing runs: no reserve for b, and c fits beside it */
    assert_int_equal(tokens_of(p, b), 21);
    assert_int_equal(tokens_of(p, c), 1);
    apply(r, p);
    rig_close(r);

    l.prefill_chunk = 4;
    r = rig_open(&l, 10);
    a = add(r, 0, 24, 9); /* 6 blocks, of which the first step takes 1 */
    b = add(r, 0, 12, 9); /* 3 blocks: 9 are free, 5 promised, 1 reserved */
    c = add(r, 0, 1, 9); /* 8 free, 5 + 2 promised, 1 reserved */
    p = plan(r);
    assert_int_equal(tokens_of(p, a), 4);
    assert_int_equal(tokens_of(p, b), 4);
    assert_int_equal(tokens_of(p, c), 0);
    apply(r, p);
    rig_close(r);

    r = rig_open(&l, 20); /* with 8 running the reserve is 2 */
    for (int i = 0; i < 8; i++) add(r, 0, 8, 9);
    step(r);
    step(r);
    assert_int_equal(sched_stats(r->sched).n_running, 8);
    assert_int_equal(paging_n_free(r->paging), 4);
    a = add(r, 0, 9, 9); /* 3 blocks */
    assert_int_equal(tokens_of(plan(r), a), 0);
    rig_close(r);
}

/* No more run than a plan has tokens for. */
static void test_budget_bounds_running(void **state) {
    (void)state;
    struct sched_limits l = limits(3, 8);
    struct rig *r = rig_open(&l, 100);
    for (int i = 0; i < 6; i++) add(r, 0, 1, 9);
    step(r);
    assert_int_equal(sched_stats(r->sched).n_running, 3);
    struct sched_plan *p = plan(r);
    assert_int_equal(p->n_decode_tokens, 3);
    apply(r, p);
    rig_close(r);
}

/* Starts of one plan share a bounded array: the rest come with the next plan. */
static void test_many_starts(void **state) {
    (void)state;
    struct sched_limits l = limits(40, 20);
    l.prefill_chunk = 1;
    struct rig *r = rig_open(&l, 1000);
    for (int i = 0; i < 10; i++) add(r, 0, 50, 9);
    struct sched_plan *p = plan(r);
    assert_int_equal(p->n_starts, (2 * MAX_SEQ_TOKENS + 40) / 50);
    apply(r, p);
    p = plan(r);
    assert_int_equal(p->n_starts, 3);
    assert_int_equal(p->step.n_seqs, 6);
    apply(r, p);
    rig_close(r);
}

/* ---- preemption ------------------------------------------------------------------------------- */

/* Two sequences of 2 blocks in a pool of 5: the older takes the fifth block, the younger goes. */
static void test_preempt(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 5);
    struct sched_id a = add(r, 0, 7, 20), b = add(r, 100, 7, 20);
    step(r); /* 7 positions each */
    step(r); /* 8 */
    uint64_t b_first = info(r, b).first_scheduled_ns;
    struct sched_id c = add(r, 200, 1, 20); /* would fit the last block: the reserve holds it */
    struct sched_plan *p = plan(r); /* position 8: a gets the free block, b gets none */
    assert_int_equal(p->n_preempted, 0);
    assert_int_equal(tokens_of(p, a), 1);
    assert_int_equal(tokens_of(p, b), 0); /* nobody is younger: it sits out and keeps its blocks */
    assert_true(info(r, b).running);
    apply(r, p);
    for (int i = 0; i < 3; i++) step(r); /* a fills its block: 12 positions */
    assert_true(info(r, b).running);
    p = plan(r); /* a needs a fourth */
    assert_int_equal(p->n_preempted, 1);
    assert_int_equal(tokens_of(p, a), 1);
    assert_int_equal(p->step.n_seqs, 1); /* and nobody is admitted in this plan */
    assert_false(info(r, b).running);
    assert_int_equal(info(r, b).n_preempted, 1);
    assert_int_equal(info(r, b).n_known, 9);
    assert_int_equal(sched_stats(r->sched).n_preempted, 1);
    assert_int_equal(paging_n_free(r->paging), 1);
    apply(r, p);
    drop(r, a);
    p = plan(r); /* b first, though c has waited too; it brings its sampled tokens */
    assert_int_equal(p->id_of[0].idx, b.idx);
    assert_int_equal(p->starts[0].n_ids, 9);
    assert_int_equal(p->starts[0].n_prompt, 7);
    assert_int_equal(p->starts[0].ids[0], 100);
    assert_int_equal(p->starts[0].ids[8], p->step.ids[8]);
    assert_true(p->starts[0].ids[8] >= 1000);
    assert_int_equal(tokens_of(p, b), 9);
    assert_int_equal(p->n_prefill_tokens, 10); /* recomputed, and c's */
    assert_int_equal(tokens_of(p, c), 1);
    assert_true(info(r, b).first_scheduled_ns == b_first);
    assert_int_equal(apply(r, p), 2);
    assert_int_equal(r->tokens[0].n_sampled, 3);
    rig_close(r);
}

/* A row that comes back while its sequence waits after a preemption counts. */
static void test_preempt_with_rows_out(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 4);
    struct sched_id a = add(r, 0, 4, 20), b = add(r, 100, 4, 20);
    for (int i = 0; i < 4; i++) step(r);
    struct sched_plan *p = plan(r); /* 8 positions each; the pool is full */
    assert_int_equal(tokens_of(p, b), 1);
    struct sched_plan *q = plan(r); /* a's ninth takes b's blocks while b's row is out */
    assert_int_equal(q->n_preempted, 1);
    assert_int_equal(tokens_of(q, a), 1);
    assert_int_equal(tokens_of(q, b), 0);
    assert_int_equal(apply(r, p), 2);
    assert_int_equal(info(r, b).n_known, 9);
    apply(r, q);
    rig_close(r);
}

/* Once it has started again, the row of the earlier run does not: this run samples that token itself. */
static void test_restart_drops_rows(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 6);
    struct sched_id a = add(r, 0, 8, 20), b = add(r, 100, 3, 20);
    step(r);
    struct sched_plan *p = plan(r); /* b's fourth position: its row goes out */
    assert_int_equal(tokens_of(p, b), 1);
    sched_hold(r->sched, b, true); /* off and on: the same as a preemption and a free pool */
    sched_hold(r->sched, b, false);
    struct sched_plan *q = plan(r);
    assert_int_equal(q->n_starts, 1);
    assert_int_equal(tokens_of(q, b), 4);
    assert_int_equal(apply(r, p), 1); /* a's */
    assert_int_equal(r->tokens[0].id.idx, a.idx);
    assert_int_equal(info(r, b).n_known, 4);
    assert_int_equal(apply(r, q), 2);
    assert_int_equal(info(r, b).n_known, 5);
    rig_close(r);
}

/* A preempted sequence whose last token comes back while it waits is over: reported, and not started. */
static void test_limit_while_waiting(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 4);
    struct sched_id a = add(r, 0, 4, 20), b = add(r, 100, 4, 5);
    for (int i = 0; i < 4; i++) step(r);
    struct sched_plan *p = plan(r), *q = plan(r);
    assert_int_equal(q->n_preempted, 1);
    assert_int_equal(apply(r, p), 2);
    assert_int_equal(r->tokens[1].id.idx, b.idx);
    assert_true(r->tokens[1].at_limit);
    assert_int_equal(sched_stats(r->sched).n_waiting, 0);
    apply(r, q);
    drop(r, a);
    assert_null(plan(r));
    sched_hold(r->sched, b, true); /* over: no effect */
    sched_hold(r->sched, b, false);
    assert_null(plan(r));
    drop(r, b);
    rig_close(r);
}

/* The victim is of the lowest class, then the youngest; an old sequence of a low class goes before a young
 * one of a high class. */
static void test_victim(void **state) {
    (void)state;
    struct sched_limits l = limits(32, 4);
    struct rig *r = rig_open(&l, 8);
    struct sched_id low_old = add_class(r, 7, 20, 2), low_young = add_class(r, 3, 20, 2);
    struct sched_id high = add_class(r, 7, 20, 0), mid = add_class(r, 3, 20, 1);
    step(r);
    step(r); /* two of 8 positions, two of 4: 6 blocks of 8 */
    assert_int_equal(paging_n_free(r->paging), 2);
    struct sched_plan *p = plan(r); /* each needs one more: high and mid get them; then low_old */
    assert_int_equal(tokens_of(p, high), 1);
    assert_int_equal(tokens_of(p, mid), 1);
    assert_int_equal(tokens_of(p, low_old), 1); /* with what low_young held */
    assert_int_equal(p->n_preempted, 1);
    assert_int_equal(info(r, low_young).n_preempted, 1);
    apply(r, p);
    rig_close(r);
}

/* A chunk shrinks to the free blocks before it costs a younger sequence its own. Slot 3, which nobody uses,
 * stands for what took the blocks that the prompt was promised. */
static void test_chunk_shrinks(void **state) {
    (void)state;
    struct sched_limits l = limits(32, 4);
    l.prefill_chunk = 8;
    struct rig *r = rig_open(&l, 9);
    struct sched_id a = add(r, 0, 20, 20), b = add(r, 100, 4, 20);
    struct sched_plan *p = plan(r);
    assert_int_equal(tokens_of(p, a), 8);
    assert_int_equal(tokens_of(p, b), 4);
    apply(r, p);
    assert_int_equal(paging_seq_reserve(r->paging, 3, 5 * B), ST_OK);
    assert_true(sched_plan(r->sched, 0, p));
    assert_int_equal(p->n_preempted, 0);
    assert_int_equal(tokens_of(p, a), 4); /* the last free block */
    assert_int_equal(tokens_of(p, b), 0);
    paging_seq_free(r->paging, 3);
    apply(r, p);
    assert_int_equal(paging_seq_reserve(r->paging, 3, 5 * B), ST_OK);
    assert_true(sched_plan(r->sched, 0, p));
    assert_int_equal(p->n_preempted, 1);
    assert_int_equal(tokens_of(p, a), 4); /* b's block */
    paging_seq_free(r->paging, 3);
    apply(r, p);
    assert_int_equal(info(r, b).n_preempted, 1);
    rig_close(r);
}

/* ---- failed rows, hold -------------------------------------------------------------------------- */

static void test_failed_row(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 20);
    struct sched_id a = add(r, 0, 3, 9), b = add(r, 0, 3, 9);
    struct sched_plan *p = plan(r), *q = plan(r);
    struct moe_row rows[2] = {{.slot = p->seqs[0].slot, .token = -1, .st = ST_NUMERIC},
                              {.slot = p->seqs[1].slot, .token = 7}};
    struct moe_result result = {.n_rows = 2, .rows = rows};
    assert_int_equal(sched_apply(r->sched, p, &result, 0, r->tokens), 2);
    check(r);
    assert_int_equal(r->tokens[0].id.idx, a.idx);
    assert_int_equal(r->tokens[0].row->st, ST_NUMERIC);
    assert_int_equal(r->tokens[0].n_sampled, 0);
    assert_false(r->tokens[0].at_limit);
    assert_int_equal(info(r, a).n_known, 3);
    assert_int_equal(info(r, b).n_known, 4);
    p = plan(r);
    assert_int_equal(tokens_of(p, a), 0); /* not planned again, though not removed yet */
    assert_int_equal(tokens_of(p, b), 1);
    assert_int_equal(apply(r, q), 1); /* a's second row is of no use */
    assert_int_equal(r->tokens[0].id.idx, b.idx);
    sched_hold(r->sched, a, true); /* as over as one can be */
    sched_hold(r->sched, a, false);
    assert_int_equal(sched_stats(r->sched).n_waiting, 0);
    drop(r, a);
    apply(r, p);
    rig_close(r);
}

static void test_hold(void **state) {
    (void)state;
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 20);
    struct sched_id a = add(r, 0, 3, 9), b = add(r, 100, 3, 9), c = add(r, 200, 3, 9);
    sched_hold(r->sched, c, true); /* before it ever ran */
    sched_hold(r->sched, c, true);
    sched_hold(r->sched, b, false); /* not held: no effect */
    check(r);
    assert_int_equal(sched_stats(r->sched).n_waiting, 2);
    struct sched_plan *p = plan(r);
    assert_int_equal(tokens_of(p, c), 0);
    sched_hold(r->sched, a, true);
    check(r);
    assert_false(info(r, a).running);
    assert_int_equal(info(r, a).n_preempted, 0);
    assert_int_equal(paging_n_free(r->paging), 19);
    assert_int_equal(apply(r, p), 1); /* b's only */
    assert_int_equal(info(r, a).n_known, 3);
    struct sched_id d = add(r, 300, 3, 9);
    sched_hold(r->sched, c, false);
    sched_hold(r->sched, a, false); /* older than c, which is older than d */
    check(r);
    p = plan(r);
    assert_int_equal(p->n_starts, 3);
    assert_int_equal(p->starts[0].ids[0], 0);
    assert_int_equal(p->starts[1].ids[0], 200);
    assert_int_equal(p->starts[2].ids[0], 300);
    apply(r, p);
    p = plan(r); /* a runs behind b no longer: it is the oldest */
    assert_int_equal(p->id_of[0].idx, a.idx);
    assert_int_equal(p->id_of[1].idx, b.idx);
    assert_int_equal(p->id_of[3].idx, d.idx);
    sched_hold(r->sched, d, true);
    drop(r, d); /* held and gone */
    sched_hold(r->sched, d, false);
    check(r);
    assert_int_equal(sched_stats(r->sched).n_waiting, 0);
    rig_close(r);
}

/* ---- create, check ----------------------------------------------------------------------------- */

static void test_create_refuses(void **state) {
    (void)state;
    struct paging_limits pl = {10, B, 4, 16};
    struct paging *p;
    struct sched *s;
    assert_int_equal(paging_create(&pl, &p), ST_OK);
    struct sched_limits ok = limits(8, 4);
    for (int i = 0; i < 12; i++) {
        struct sched_limits l = ok;
        int32_t block_tokens = B;
        if (i == 1) l.max_batch_tokens = 0;
        if (i == 2) l.max_running = 0;
        if (i == 3) l.max_sequences = 0;
        if (i == 4) l.max_seq_tokens = 1;
        if (i == 5) l.max_queued_tokens = 0;
        if (i == 6) l.prefill_chunk = -1;
        if (i == 7) l.max_running = 5; /* slots in the pool: 4 */
        if (i == 8) l.max_seq_tokens = 66; /* tables: 64 positions, and one token more */
        if (i == 9) block_tokens = 8;
        if (i == 10) l.max_batch_tokens = INT32_MAX;
        if (i == 11) l.max_seq_tokens = 65;
        enum status st = sched_create(&l, p, block_tokens, &s);
        assert_int_equal(st, i == 0 || i == 11 ? ST_OK : ST_INVALID);
        assert_int_equal(s != NULL, st == ST_OK);
        sched_destroy(s);
    }
    sched_destroy(NULL);
    paging_destroy(p);
}

enum { N_BREAKS = 15 };

/* a runs, b waits, c runs and has a row out. */
static const char *break_it(struct sched *s, int how, int32_t a, int32_t b, int32_t c) {
    struct seq *qa = &s->seqs[a], *qb = &s->seqs[b], *qc = &s->seqs[c];
    switch (how) {
    case 0: qa->n_known = 2; return "knows 2 + 1";
    case 1: qa->n_known = qa->limit; return "of 12 tokens";
    case 2: qa->n_step = 1; return "a step between plans";
    case 3: qb->n_scheduled = 1; return "does not run and has progress";
    case 4: qb->slot = 1; return "does not run and has progress";
    case 5: qa->slot = qc->slot; return "which is not its own";
    case 6: qa->n_scheduled--; return "tokens scheduled";
    case 7: qc->run++; return "waits for 1 rows of 0";
    case 8: paging_seq_reserve(s->paging, qa->slot, 9); return "blocks for 3 tokens";
    case 9: s->n_queued_tokens++; return "tokens are queued";
    case 10: qa->arrival = 99; return "in front of an older one";
    case 11: qb->priority = 0; return "a list that is not its own";
    case 12: s->waiting[1].n = 2; return "a list of 2 has 1";
    case 13: s->n_free_slots++; return "the lists do not agree";
    default: paging_seq_reserve(s->paging, 3, 1); return "slot 3 is free and holds blocks";
    }
}

static void test_check_sees(void **state) {
    (void)state;
    for (int how = 0; how < N_BREAKS; how++) {
        struct sched_limits l = limits(16, 4);
        struct rig *r = rig_open(&l, 20);
        struct sched_id a = add(r, 0, 3, 9), c = add(r, 0, 3, 9);
        assert_non_null(plan(r));
        struct sched_id b = add(r, 0, 3, 9);
        struct error e = {0};
        const char *says = break_it(r->sched, how, a.idx, b.idx, c.idx);
        assert_int_equal(sched_check(r->sched, &e), ST_INTERNAL);
        if (!strstr(e.text, says)) fail_msg("break %d: '%s' does not say '%s'", how, e.text, says);
        for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) sched_plan_destroy(&r->plan[i]);
        sched_destroy(r->sched);
        paging_destroy(r->paging);
        free(r);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one),
        cmocka_unit_test(test_pipeline),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_head_of_line),
        cmocka_unit_test(test_order_in_plan),
        cmocka_unit_test(test_add_refuses),
        cmocka_unit_test(test_pool_is_the_limit),
        cmocka_unit_test(test_priorities),
        cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_budget_bounds_running),
        cmocka_unit_test(test_many_starts),
        cmocka_unit_test(test_preempt),
        cmocka_unit_test(test_preempt_with_rows_out),
        cmocka_unit_test(test_restart_drops_rows),
        cmocka_unit_test(test_limit_while_waiting),
        cmocka_unit_test(test_victim),
        cmocka_unit_test(test_chunk_shrinks),
        cmocka_unit_test(test_failed_row),
        cmocka_unit_test(test_hold),
        cmocka_unit_test(test_create_refuses),
        cmocka_unit_test(test_check_sees),
    };
    return cmocka_run_group_tests_name("sched", tests, NULL, NULL);
}
