/* step: the loop's side of the engine. Takes results, gives each token to its choice, plans the
 * next step. */
#include <stdlib.h>

#include "daemon/state.h"

enum status step_create(struct server *v) {
    const struct moe_limits *l = &v->o.info->limits;
    v->max_sequences = l->max_seqs + v->o.max_queue;
    struct sched_limits limits = {.max_batch_tokens = l->max_batch_tokens,
                                  .max_running = l->max_seqs,
                                  .max_sequences = v->max_sequences,
                                  .max_seq_tokens = l->max_seq_tokens,
                                  .max_queued_tokens = v->o.max_queued_tokens,
                                  .prefill_chunk = v->o.prefill_chunk,
                                  .max_itl_ns = v->o.max_itl_ns};
    int32_t max_blocks = (l->max_seq_tokens + l->block_tokens - 1) / l->block_tokens;
    struct paging_limits paging = {.n_blocks = l->n_blocks,
                                   .block_tokens = l->block_tokens,
                                   .n_slots = l->max_seqs,
                                   .max_blocks_per_seq = max_blocks};
    enum status st = paging_create(&paging, &v->paging);
    if (st == ST_OK) st = sched_create(&limits, v->paging, l->block_tokens, &v->sched);
    for (int i = 0; st == ST_OK && i < MOE_MAX_IN_FLIGHT; i++) {
        struct engine_step *step = &v->steps[i];
        st = sched_plan_create(&limits, max_blocks, &step->plan);
        if (st != ST_OK) break;
        step->result.rows = calloc((size_t)l->max_rows, sizeof *step->result.rows);
        if (!step->result.rows) st = ST_NO_MEMORY;
        v->idle_steps[v->n_idle_steps++] = step;
    }
    if (st != ST_OK) return st;
    v->tokens = calloc((size_t)l->max_seqs, sizeof *v->tokens);
    v->choice_of_seq = malloc((size_t)v->max_sequences * sizeof *v->choice_of_seq);
    if (!v->tokens || !v->choice_of_seq) return ST_NO_MEMORY;
    for (int32_t i = 0; i < v->max_sequences; i++) v->choice_of_seq[i] = -1;
    return ST_OK;
}

void step_destroy(struct server *v) {
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        sched_plan_destroy(&v->steps[i].plan);
        free(v->steps[i].result.rows);
    }
    sched_destroy(v->sched);
    paging_destroy(v->paging);
    free(v->tokens);
    free(v->choice_of_seq);
}

static void take_token(struct server *v, const struct sched_token *token) {
    int32_t idx = v->choice_of_seq[token->id.idx];
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

static void lose_engine(struct server *v, enum status st) {
    log_event(LOG_ERROR, "daemon", "engine_lost", "status=%s requests=%d", status_name(st),
              requests_count(v->requests));
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

static void take_step(struct server *v, struct engine_step *step) {
    v->counters = step->counters;
    v->last_step_ns = v->now_ns;
    int32_t n = sched_apply(v->sched, &step->plan, &step->result, v->now_ns, v->tokens);
    for (int32_t i = 0; i < n; i++) take_token(v, &v->tokens[i]);
    CHECK(v->n_idle_steps < MOE_MAX_IN_FLIGHT);
    v->idle_steps[v->n_idle_steps++] = step;
    v->answer_due = true;
}

void step_results(struct server *v) {
    /* Bounded: a fast engine has the next result ready by then, and messages want their turn. */
    for (int i = 0; i < MOE_MAX_IN_FLIGHT && v->lost == ST_OK; i++) {
        struct engine_step *step = engine_pop(v->engine);
        if (!step) return;
        v->now_ns = clock_now_ns();
        if (step->st != ST_OK) {
            lose_engine(v, step->st);
            return;
        }
        take_step(v, step);
        /* The next step starts before this one's chunks are sent. */
        step_plan(v);
        server_flush(v);
    }
}

void step_plan(struct server *v) {
    while (v->lost == ST_OK && v->n_idle_steps > 0) {
        struct engine_step *step = v->idle_steps[v->n_idle_steps - 1];
        if (!sched_plan(v->sched, v->now_ns, &step->plan)) break;
        v->n_idle_steps--;
        engine_push(v->engine, step);
        v->answer_due = false;
    }
    if (v->answer_due) engine_push_none(v->engine);
    v->answer_due = false;
}
