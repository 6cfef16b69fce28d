/* max_itl_ns on virtual time: an engine whose steps cost a known number of nanoseconds, and what the scheduler
 * puts into them. */
#include "tests/sched_rig.h"

#include "daemon/pace.h"

enum { MS = 1000000 };

/* ---- pace ------------------------------------------------------------------------------------- */

static uint64_t cost(int32_t n_tokens) { return 3 * MS + (uint64_t)n_tokens * 20000; }

static void test_line(void **state) {
    (void)state;
    struct pace p = {0};
    assert_int_equal(pace_tokens(&p, MS), INT32_MAX); /* nothing known */
    pace_learn(&p, 10, cost(10));
    /* One size: as if there were no base. */
    assert_in_range(pace_tokens(&p, 32 * MS), 90, 100);
    pace_learn(&p, 1000, cost(1000));
    assert_in_range(pace_tokens(&p, 13 * MS), 499, 501);
    assert_in_range(pace_tokens(&p, 43 * MS), 1999, 2001);
    assert_int_equal(pace_tokens(&p, 2 * MS), 0);
    /* Many of one size leave the slope as it was. */
    for (int i = 0; i < 5000; i++) pace_learn(&p, 8, cost(8));
    assert_in_range(pace_tokens(&p, 13 * MS), 495, 505);
}

/* A machine that becomes slower is noticed; a single stall is forgiven. */
static void test_change(void **state) {
    (void)state;
    struct pace p = {0};
    for (int i = 0; i < 200; i++) pace_learn(&p, 8 + 100 * (i % 5), cost(8 + 100 * (i % 5)));
    pace_learn(&p, 8, 2000 * (uint64_t)MS);
    assert_in_range(pace_tokens(&p, 23 * MS), 900, 1100);
    for (int i = 0; i < 200; i++) pace_learn(&p, 8 + 100 * (i % 5), 2 * cost(8 + 100 * (i % 5)));
    assert_in_range(pace_tokens(&p, 46 * MS), 950, 1050);
    for (int i = 0; i < 10; i++) pace_learn(&p, 8, 0); /* a clock that stands */
    assert_true(pace_tokens(&p, MS) >= 0);
}

/* ---- the scheduler ---------------------------------------------------------------------------- */

/* The step's cost passes between its plan and its results, steps one behind the other. */
static uint64_t run_step(struct rig *r) {
    struct sched_plan *p = plan(r);
    assert_non_null(p);
    uint64_t ns = cost(p->step.n_tokens);
    r->now += ns;
    apply(r, p);
    return ns;
}

static struct rig *rig_with_bound(uint64_t max_itl_ns) {
    struct sched_limits l = limits(4096, 256);
    l.max_itl_ns = max_itl_ns;
    l.max_queued_tokens = 1 << 20;
    return rig_open(&l, 8192);
}

/* Prompts of 40 tokens come in crowds while two streams run; returns the longest step in which streams ran,
 * the first dozen left to learn in, and how many prompts were read. */
static uint64_t longest_step(struct rig *r, int *n_read) {
    struct sched_id stream[2] = {add(r, 0, 4, 60), add(r, 50, 4, 60)};
    uint64_t longest = 0;
    *n_read = 0;
    for (int i = 0; i < 56; i++) {
        if (i % 8 == 1)
            for (int k = 0; k < 100; k++)
                if (sched_stats(r->sched).n_waiting < 200) (void)add_class(r, 40, 1, 2);
        uint64_t ns = run_step(r);
        for (int k = 0, n = sched_stats(r->sched).n_running; k < n; k++) {
            const struct sched_token *t = &r->tokens[k];
            if (t->row && t->at_limit && t->n_sampled == 1) {
                drop(r, t->id);
                ++*n_read;
            }
            r->tokens[k].row = NULL;
        }
        if (i >= 12 && ns > longest) longest = ns;
    }
    drop(r, stream[0]);
    drop(r, stream[1]);
    return longest;
}

static void test_bound(void **state) {
    (void)state;
    int n_bound, n_free;
    struct rig *r = rig_with_bound(10 * MS);
    uint64_t bound = longest_step(r, &n_bound);
    rig_close(r);
    r = rig_with_bound(0);
    uint64_t free = longest_step(r, &n_free);
    rig_close(r);
    assert_true(free > 30 * (uint64_t)MS); /* without the bound they would have been longer */
    assert_in_range(bound, 8 * MS, 10 * MS); /* used, and not exceeded */
    /* 56 steps of about (9 - 3) / 0.02 = 300 tokens, 40 for each prompt. */
    assert_in_range(n_bound, 300, 420);
    assert_true(n_free > n_bound);
}

/* A bound that no step can meet: prompts get on, a block in each step. */
static void test_impossible(void **state) {
    (void)state;
    struct rig *r = rig_with_bound(MS);
    struct sched_id stream = add(r, 0, 4, 60);
    run_step(r);
    struct sched_id prompt = add(r, 100, 10 * B, 4);
    for (int i = 0; i < 10; i++) {
        struct sched_plan *p = plan(r);
        assert_int_equal(tokens_of(p, stream), 1);
        assert_int_equal(tokens_of(p, prompt), B);
        r->now += cost(p->step.n_tokens);
        apply(r, p);
    }
    assert_int_equal(info(r, prompt).n_known, 10 * B + 1);
    rig_close(r);
}

/* Nobody waits for a token: a prompt is read as fast as it can be. */
static void test_no_stream(void **state) {
    (void)state;
    struct rig *r = rig_with_bound(MS);
    struct sched_id id = add(r, 0, 4, 1);
    run_step(r);
    drop(r, id);
    id = add(r, 0, 60, 4);
    struct sched_plan *p = plan(r);
    assert_int_equal(tokens_of(p, id), 60);
    rig_close(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_line),      cmocka_unit_test(test_change),
        cmocka_unit_test(test_bound),     cmocka_unit_test(test_impossible),
        cmocka_unit_test(test_no_stream),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
