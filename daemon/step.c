/* step: the loop's side of the engines. Takes results, gives each token to its choice, plans the
 * next steps. Each rank (device) has its own scheduler and blocks; a sequence stays on the rank it
 * was given to. */
#include <stdlib.h>

#include "daemon/state.h"

static enum status create_rank(struct server *v, const struct moe_limits *l, struct rank *r) {
    int32_t most = v->o.max_queued_tokens / v->o.n_ranks;
    struct sched_limits limits = {.max_batch_tokens = l->max_batch_tokens,
                                  .max_running = l->max_seqs,
                                  .max_sequences = l->max_seqs + v->o.max_queue,
                                  .max_seq_tokens = v->o.info->limits.max_seq_tokens,
                                  .max_queued_tokens = most > 0 ? most : 1,
                                  .prefill_chunk = v->o.prefill_chunk,
                                  .max_itl_ns = v->o.max_itl_ns};
    int32_t max_blocks = (limits.max_seq_tokens + l->block_tokens - 1) / l->block_tokens;
    struct paging_limits paging = {.n_blocks = l->n_blocks,
                                   .block_tokens = l->block_tokens,
                                   .n_slots = l->max_seqs,
                                   .max_blocks_per_seq = max_blocks};
    enum status st = paging_create(&paging, &r->paging);
    if (st == ST_OK) st = sched_create(&limits, r->paging, l->block_tokens, &r->sched);
    for (int i = 0; st == ST_OK && i < MOE_MAX_IN_FLIGHT; i++) {
        struct engine_step *step = &r->steps[i];
        st = sched_plan_create(&limits, max_blocks, &step->plan);
        if (st != ST_OK) break;
        step->result.rows = calloc((size_t)l->max_rows, sizeof *step->result.rows);
        if (!step->result.rows) st = ST_NO_MEMORY;
        r->idle_steps[r->n_idle_steps++] = step;
    }
    if (st != ST_OK) return st;
    r->choice_of_seq = malloc((size_t)limits.max_sequences * sizeof *r->choice_of_seq);
    if (!r->choice_of_seq) return ST_NO_MEMORY;
    for (int32_t i = 0; i < limits.max_sequences; i++) r->choice_of_seq[i] = -1;
    return ST_OK;
}

enum status step_create(struct server *v) {
    const struct moe_limits *l = &v->o.info->limits;
    v->max_sequences = v->o.n_ranks * l->max_seqs + v->o.max_queue;
    v->tokens = calloc((size_t)l->max_seqs, sizeof *v->tokens);
    if (!v->tokens) return ST_NO_MEMORY;
    for (int i = 0; i < v->o.n_ranks; i++) {
        struct moe_limits limits = *l;
        if (v->o.rank_blocks) limits.n_blocks = v->o.rank_blocks[i];
        enum status st = create_rank(v, &limits, &v->ranks[i]);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

void step_destroy(struct server *v) {
    for (int k = 0; k < v->o.n_ranks; k++) {
        struct rank *r = &v->ranks[k];
        for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
            sched_plan_destroy(&r->steps[i].plan);
            free(r->steps[i].result.rows);
        }
        sched_destroy(r->sched);
        paging_destroy(r->paging);
        free(r->choice_of_seq);
    }
    free(v->tokens);
}

/* ---- spreading sequences -------------------------------------------------------------------- */

/* Blocks that would be free if all that waits ran: what waits takes its prompt and a block to go on in. */
static int64_t blocks_to_spare(const struct server *v, const struct rank *r) {
    struct sched_stats s = sched_stats(r->sched);
    int32_t b = v->o.info->limits.block_tokens;
    return (int64_t)paging_stats(r->paging).free - (s.n_waiting_tokens + b - 1) / b - s.n_waiting;
}

int step_pick_rank(const struct server *v) {
    int best = 0;
    int64_t most = INT64_MIN;
    for (int i = 0; i < v->o.n_ranks; i++) {
        int64_t n = blocks_to_spare(v, &v->ranks[i]);
        if (n <= most) continue;
        most = n;
        best = i;
    }
    return best;
}

/* ---- results and plans ---------------------------------------------------------------------- */

static void take_token(struct server *v, const struct rank *rank, const struct sched_token *token) {
    int32_t idx = rank->choice_of_seq[token->id.idx];
    if (idx < 0) return; /* a choice of the same request failed earlier in this step */
    struct choice *c = choice_at(v->requests, idx);
    if (c->seq.generation != token->id.generation) return;
    struct request *r = request_at(v->requests, c->request);
    struct session *s = session_at(v->sessions, r->session);
    if (token->row->st != ST_OK) {
        request_fail(v, r, token->row->st, "the model's output was not a finite number");
        return;
    }
    if (r->first_token_ns == 0) r->first_token_ns = v->now_ns;
    r->last_token_ns = v->now_ns;
    s->pending_bytes -= choice_pending_bytes(c, r);
    choice_token(c, r, v->o.text, token);
    s->pending_bytes += choice_pending_bytes(c, r);
    if (c->reason != 0) choice_take_out(v, r, c);
    server_dirty(v, s);
}

static void lose_engine(struct server *v, int rank, enum status st) {
    log_event(LOG_ERROR, "daemon", "engine_lost", "device=%d status=%s requests=%d", rank,
              status_name(st), requests_count(v->requests));
    v->lost = st;
    for (int32_t i = 0; i < requests_cap(v->requests); i++) {
        struct request *r = request_at(v->requests, i);
        struct error e;
        error_set(&e, ST_ENGINE_LOST, "the engine was lost");
        if (r->state == REQUEST_TOKENIZING)
            request_reject(v, r, &e);
        else if (r->state != REQUEST_FREE)
            request_fail(v, r, e.code, e.text);
    }
}

static void take_step(struct server *v, struct rank *r, struct engine_step *step) {
    r->counters = step->counters;
    v->last_step_ns = v->now_ns;
    int32_t n = 0;
    if (step->plan.step.n_seqs > 0) /* else it was only there for the group */
        n = sched_apply(r->sched, &step->plan, &step->result, v->now_ns, v->tokens);
    for (int32_t i = 0; i < n; i++) take_token(v, r, &v->tokens[i]);
    CHECK(r->n_idle_steps < MOE_MAX_IN_FLIGHT);
    r->idle_steps[r->n_idle_steps++] = step;
    r->moved_ns = v->now_ns;
    r->answer_due = true;
}

/* Returns false if there was none. */
static bool take_result(struct server *v, int idx) {
    struct rank *r = &v->ranks[idx];
    struct engine_step *step = engine_pop(r->engine);
    enum status st = step ? step->st : engine_lost(r->engine);
    if (st != ST_OK) lose_engine(v, idx, st);
    if (!step || st != ST_OK) return false;
    v->now_ns = clock_now_ns();
    take_step(v, r, step);
    /* The next step starts before this one's chunks are sent. */
    step_plan(v);
    server_flush(v);
    return true;
}

void step_results(struct server *v) {
    /* Bounded: a fast engine has the next result ready by then, and messages want their turn. */
    for (int i = 0; i < v->o.n_ranks; i++)
        for (int n = 0; n < MOE_MAX_IN_FLIGHT && v->lost == ST_OK; n++)
            if (!take_result(v, i)) break;
}

/* The step on top goes out. */
static void push(struct server *v, struct rank *r) {
    if (r->n_idle_steps == MOE_MAX_IN_FLIGHT) r->moved_ns = v->now_ns;
    engine_push(r->engine, r->idle_steps[--r->n_idle_steps]);
    r->answer_due = false;
    if (v->o.step_ns > 0) server_timer(v, r->moved_ns + v->o.step_ns);
}

void step_timers(struct server *v) {
    for (int i = 0; i < v->o.n_ranks && v->o.step_ns > 0 && v->lost == ST_OK; i++) {
        const struct rank *r = &v->ranks[i];
        if (r->n_idle_steps == MOE_MAX_IN_FLIGHT) continue;
        if (v->now_ns - r->moved_ns >= v->o.step_ns)
            lose_engine(v, i, ST_ENGINE_LOST);
        else
            server_timer(v, r->moved_ns + v->o.step_ns);
    }
}

static void plan_rank(struct server *v, struct rank *r) {
    while (r->n_idle_steps > 0) {
        if (!sched_plan(r->sched, v->now_ns, &r->idle_steps[r->n_idle_steps - 1]->plan)) break;
        push(v, r);
    }
    if (r->answer_due) engine_push_none(r->engine);
    r->answer_due = false;
}

/* One step for all ranks, once each has one to fill; false if that is not so, or none has anything to
 * do. */
static bool plan_together(struct server *v) {
    bool any = false;
    for (int i = 0; i < v->o.n_ranks; i++)
        if (v->ranks[i].n_idle_steps == 0) return false;
    for (int i = 0; i < v->o.n_ranks; i++) {
        struct rank *r = &v->ranks[i];
        any |= sched_plan(r->sched, v->now_ns, &r->idle_steps[r->n_idle_steps - 1]->plan);
    }
    for (int i = 0; i < v->o.n_ranks && any; i++) {
        push(v, &v->ranks[i]);
    }
    return any;
}

static void plan_group(struct server *v) {
    while (plan_together(v)) {
    }
    /* An engine whose peers have a step to bring back hears then what comes next. */
    for (int i = 0; i < v->o.n_ranks; i++)
        if (v->ranks[i].n_idle_steps == 0) return;
    for (int i = 0; i < v->o.n_ranks; i++) {
        if (v->ranks[i].answer_due) engine_push_none(v->ranks[i].engine);
        v->ranks[i].answer_due = false;
    }
}

void step_plan(struct server *v) {
    if (v->o.lockstep) {
        if (v->lost == ST_OK) plan_group(v);
        return;
    }
    for (int i = 0; i < v->o.n_ranks && v->lost == ST_OK; i++) plan_rank(v, &v->ranks[i]);
}
