/* A scheduler with a pool and two plans, for tests that go step by step. Each call is followed by
 * sched_check. A prompt is first, first + 1, …; the row of slot s is the token 1000 + s. */
#ifndef MOED_TESTS_SCHED_RIG_H
#define MOED_TESTS_SCHED_RIG_H

#include "tests/support.h"

#include <stdlib.h>

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

static inline struct sched_limits limits(int32_t max_batch_tokens, int32_t max_running) {
    return (struct sched_limits){.max_batch_tokens = max_batch_tokens,
                                 .max_running = max_running,
                                 .max_sequences = 2 * max_running + 4,
                                 .max_seq_tokens = MAX_SEQ_TOKENS,
                                 .max_queued_tokens = 10000};
}

static inline struct rig *rig_open(const struct sched_limits *l, int32_t n_blocks) {
    struct rig *r = calloc(1, sizeof *r);
    struct paging_limits pl = {n_blocks, B, l->max_running, MAX_SEQ_TOKENS / B};
    assert_int_equal(paging_create(&pl, &r->paging), ST_OK);
    assert_int_equal(sched_create(l, r->paging, B, &r->sched), ST_OK);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++)
        assert_int_equal(sched_plan_create(l, pl.max_blocks_per_seq, &r->plan[i]), ST_OK);
    return r;
}

static inline void check(struct rig *r) {
    struct error error = {0}, *e = &error;
    assert_ok(sched_check(r->sched, e), e);
}

static inline void rig_close(struct rig *r) {
    check(r);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) sched_plan_destroy(&r->plan[i]);
    sched_destroy(r->sched);
    paging_destroy(r->paging);
    free(r);
}

/* A prompt first, first + 1, … */
static inline enum status try_add(struct rig *r, int32_t first, int32_t n_prompt,
                                  int32_t max_tokens, int32_t priority, struct sched_id *id) {
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

static inline struct sched_id add(struct rig *r, int32_t first, int32_t n_prompt,
                                  int32_t max_tokens) {
    struct sched_id id;
    assert_int_equal(try_add(r, first, n_prompt, max_tokens, 1, &id), ST_OK);
    return id;
}

static inline struct sched_id add_class(struct rig *r, int32_t n_prompt, int32_t max_tokens,
                                        int32_t c) {
    struct sched_id id;
    assert_int_equal(try_add(r, 0, n_prompt, max_tokens, c, &id), ST_OK);
    return id;
}

/* The next plan, or NULL when nothing can run. */
static inline struct sched_plan *plan(struct rig *r) {
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
static inline int32_t apply(struct rig *r, struct sched_plan *p) {
    struct moe_result result = {.rows = r->rows};
    for (int32_t i = 0; i < p->step.n_seqs; i++)
        if (p->seqs[i].rows == MOE_ROWS_SAMPLE)
            r->rows[result.n_rows++] =
                (struct moe_row){.slot = p->seqs[i].slot, .token = 1000 + p->seqs[i].slot};
    int32_t n = sched_apply(r->sched, p, &result, ++r->now, r->tokens);
    check(r);
    return n;
}

static inline void step(struct rig *r) {
    struct sched_plan *p = plan(r);
    assert_non_null(p);
    apply(r, p);
}

static inline void drop(struct rig *r, struct sched_id id) {
    sched_remove(r->sched, id);
    check(r);
}

static inline struct sched_seq_info info(struct rig *r, struct sched_id id) {
    struct sched_seq_info i;
    assert_int_equal(sched_seq_info(r->sched, id, &i), ST_OK);
    return i;
}

/* id's entry in p, or NULL. */
static inline const struct moe_step_seq *in_plan(const struct sched_plan *p, struct sched_id id) {
    for (int32_t i = 0; i < p->step.n_seqs; i++)
        if (p->id_of[i].idx == id.idx && p->id_of[i].generation == id.generation)
            return &p->seqs[i];
    return NULL;
}

static inline int32_t tokens_of(const struct sched_plan *p, struct sched_id id) {
    const struct moe_step_seq *q = in_plan(p, id);
    return q ? q->n_tokens : 0;
}

#endif
