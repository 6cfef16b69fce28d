/* sched, step by step: what each plan holds and what each result means, on small pools where the
 * answer can be worked out by hand. Preemption is in test_sched_preempt.c, random workloads in
 * test_sched_random.c. */
#include "tests/sched_rig.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- one sequence ---------------------------------------------------------------------------- */

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

/* One step ahead: the token that is still out stands as MOE_LAST_TOKEN, up to the limit and not
 * beyond. */
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
    /* A stop: the row of the step that ran ahead is dropped, and the entry may be used again at
     * once. */
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

/* A huge prompt, running and queued, takes what decoding leaves and never a decoding sequence's
 * token. */
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

/* ---- admission ------------------------------------------------------------------------------- */

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

/* A smaller pool is the context: longer prompts are refused, completions clipped. */
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
        assert_int_equal(sched_stats(r->sched).n_waiting, 4 - i);
        assert_int_equal(sched_stats(r->sched).n_running, 1);
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

/* AddressSanitizer asks here: an allocation that cannot be made is NULL, as without it. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static void test_no_memory(void **state) {
    (void)state;
    struct paging_limits pl = {10, 256, 1, 1 << 20};
    struct sched_limits l = {1, 1, 1 << 28, 1 << 28, 1, 0, 0};
    struct paging *p;
    struct sched *s;
    struct sched_plan plan;
    assert_int_equal(paging_create(&pl, &p), ST_OK);
    assert_int_equal(sched_create(&l, p, 256, &s), ST_NO_MEMORY);
    assert_null(s);
    paging_destroy(p);
    l = limits(8, 1 << 20);
    assert_int_equal(sched_plan_create(&l, INT32_MAX, &plan), ST_NO_MEMORY);
    assert_null(plan.seqs);
    sched_plan_destroy(&plan);
}

/* ---- create, check --------------------------------------------------------------------------- */

static void test_create_refuses(void **state) {
    (void)state;
    struct paging_limits pl = {10, B, 4, 16};
    struct paging *p;
    struct sched *s;
    assert_int_equal(paging_create(&pl, &p), ST_OK);
    struct sched_limits ok = limits(8, 4);
    for (int i = 0; i < 13; i++) {
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
        if (i == 12) l = (struct sched_limits){1, 1, 1, 2, 1, 0, 0};
        enum status st = sched_create(&l, p, block_tokens, &s);
        assert_int_equal(st, i == 0 || i >= 11 ? ST_OK : ST_INVALID);
        assert_int_equal(s != NULL, st == ST_OK);
        sched_destroy(s);
    }
    sched_destroy(NULL);
    paging_destroy(p);
}

/* ---- programmer errors end the process
 * ------------------------------------------------------------ */

enum { N_MISUSES = 10 };

static void misuse(struct rig *r, int how, struct sched_plan *p) {
    int32_t ids[4] = {0};
    struct sched_request q = {.ids = ids, .n_ids = 1, .max_tokens = 1, .priority = 2};
    struct moe_row rows[2] = {{.slot = p->seqs[0].slot}, {.slot = p->seqs[1].slot}};
    struct moe_result result = {.n_rows = 2, .rows = rows};
    struct sched_plan other = {.number = 2};
    struct sched_id id;
    if (how == 0) q.n_ids = 0;
    if (how == 1) q.max_tokens = 0;
    if (how == 2) q.priority = -1;
    if (how == 3) q.priority = SCHED_N_PRIORITIES;
    sched_add(r->sched, &q, 0, &id);
    if (how == 4) plan(r), plan(r);
    if (how == 5) p = &other;
    if (how == 6) result.n_rows = 1;
    if (how == 7) rows[1].slot = rows[0].slot;
    sched_apply(r->sched, p, &result, 0, r->tokens);
    if (how == 8) sched_apply(r->sched, p, &result, 0, r->tokens);
    /* how 9: nothing is wrong */
}

static void test_misuse(void **state) {
    (void)state;
    for (int how = 0; how < N_MISUSES; how++) {
        struct sched_limits l = limits(16, 4);
        struct rig *r = rig_open(&l, 20);
        add(r, 0, 3, 9);
        add(r, 0, 3, 9);
        struct sched_plan *p = plan(r);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            close(STDERR_FILENO);
            misuse(r, how, p);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
        assert_int_equal(aborted, how < N_MISUSES - 1);
        rig_close(r);
    }
}

/* ---- sched_check sees what it promises to see
 * ----------------------------------------------------- */

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
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_create_refuses),
        cmocka_unit_test(test_misuse),
        cmocka_unit_test(test_check_sees),
    };
    return cmocka_run_group_tests_name("sched", tests, NULL, NULL);
}
