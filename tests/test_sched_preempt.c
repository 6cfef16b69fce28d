/* sched, step by step, when sequences leave and come back: preemption, failed rows, hold. */
#include "tests/sched_rig.h"

/* ---- preemption ------------------------------------------------------------------------------ */

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

/* Once it has started again, the row of the earlier run does not: this run samples that token
 * itself. */
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

/* A preempted sequence whose last token comes back while it waits is over: reported, and not
 * started. */
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

/* One at its limit, or failed, that was not removed yet gives its blocks like any other, and does
 * not come back to the queue; holding it does not either. */
static void test_over_is_not_queued(void **state) {
    (void)state;
    for (int failed = 0; failed < 2; failed++) {
        struct sched_limits l = limits(16, 4);
        struct rig *r = rig_open(&l, 4);
        struct sched_id a = add(r, 0, 8, 20), b = add(r, 100, 4, failed ? 9 : 1);
        struct sched_plan *p = plan(r);
        struct moe_row rows[2] = {
            {.slot = p->seqs[0].slot, .token = 5},
            {.slot = p->seqs[1].slot, .token = 5, .st = failed ? ST_NUMERIC : ST_OK}};
        struct moe_result result = {.n_rows = 2, .rows = rows};
        assert_int_equal(sched_apply(r->sched, p, &result, 0, r->tokens), 2);
        assert_int_equal(r->tokens[1].at_limit, !failed);
        for (int i = 0; i < 4; i++) step(r); /* a's fourth block */
        assert_true(info(r, b).running);
        step(r); /* there is no other: 12 positions are full */
        assert_int_equal(sched_stats(r->sched).n_preempted, 1);
        assert_int_equal(sched_stats(r->sched).n_waiting, 0);
        assert_int_equal(sched_stats(r->sched).n_running, 1);
        drop(r, b);
        drop(r, a);
        rig_close(r);
    }
    struct sched_limits l = limits(16, 4);
    struct rig *r = rig_open(&l, 4);
    struct sched_id id = add(r, 0, 4, 1);
    step(r);
    sched_hold(r->sched, id, true);
    sched_hold(r->sched, id, false);
    check(r);
    assert_int_equal(sched_stats(r->sched).n_waiting, 0);
    rig_close(r);
}

/* The victim is of the lowest class, then the youngest; an old sequence of a low class goes before
 * a young one of a high class. */
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

/* A victim that had no token coming frees none: what decoding sequences were promised stays
 * theirs. */
static void test_victim_and_budget(void **state) {
    (void)state;
    struct sched_limits l = limits(4, 5);
    struct rig *r = rig_open(&l, 16);
    struct sched_id a, b, c, over;
    assert_int_equal(try_add(r, 0, 2, 40, 0, &a), ST_OK);
    assert_int_equal(try_add(r, 0, 1, 40, 1, &c), ST_OK);
    assert_int_equal(try_add(r, 0, 8, 1, 2, &over), ST_OK);
    for (int i = 0; i < 5; i++) step(r);
    assert_true(r->tokens[2].at_limit); /* and not removed: it keeps two blocks */
    assert_int_equal(try_add(r, 0, 30, 40, 0, &b), ST_OK);
    step(r);
    step(r); /* a has 8 positions, b 4, c 7 */
    assert_int_equal(paging_seq_reserve(r->paging, 4, paging_n_free(r->paging) * B), ST_OK);
    struct sched_plan *p = &r->plan[r->next];
    assert_true(sched_plan(r->sched, 0, p));
    assert_int_equal(p->n_preempted, 1);
    assert_int_equal(tokens_of(p, a), 1);
    assert_int_equal(tokens_of(p, b), 2);
    assert_int_equal(tokens_of(p, c), 1);
    paging_seq_free(r->paging, 4);
    apply(r, p);
    rig_close(r);
}

/* A chunk shrinks to the free blocks before it costs a younger sequence its own. Slot 3, which
 * nobody uses, stands for what took the blocks that the prompt was promised. */
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

/* ---- failed rows, hold
 * -------------------------------------------------------------------------- */

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_preempt),
        cmocka_unit_test(test_preempt_with_rows_out),
        cmocka_unit_test(test_restart_drops_rows),
        cmocka_unit_test(test_limit_while_waiting),
        cmocka_unit_test(test_over_is_not_queued),
        cmocka_unit_test(test_victim),
        cmocka_unit_test(test_victim_and_budget),
        cmocka_unit_test(test_chunk_shrinks),
        cmocka_unit_test(test_failed_row),
        cmocka_unit_test(test_hold),
    };
    return cmocka_run_group_tests_name("sched_preempt", tests, NULL, NULL);
}
