/* submit: from a Submit to Accepted or Rejected. Checks come cheapest first; a prompt in text goes
 * to the text worker and comes back by submit_tokenized; admission is last, when the prompt's
 * length is known. */
#include <stdio.h>
#include <string.h>

#include "daemon/state.h"

/* ---- checks --------------------------------------------------------------------------------- */

static bool in_flight(struct server *v, const struct session *s, uint64_t request_id) {
    int32_t idx = s->requests;
    for (int32_t n = s->n_requests; n > 0; n--) {
        const struct request *r = request_at(v->requests, idx);
        if (r->request_id == request_id) return true;
        idx = r->next;
    }
    return false;
}

/* Whether this session may submit anything at all, now. */
static enum status check_session(struct server *v, const struct session *s,
                                 const struct wire_msg *msg, struct error *e) {
    const struct wire_submit *w = &msg->submit;
    if (msg->request_id == 0)
        return error_set(e, ST_INVALID, "request_id is 0: a request needs a name of its own");
    if (w->boot_id.n > 0 &&
        (w->boot_id.n != WIRE_ID_BYTES || memcmp(w->boot_id.p, v->boot_id, WIRE_ID_BYTES) != 0))
        return error_set(e, ST_STALE_EPOCH, "the daemon was restarted: say Hello again");
    if (server_draining(v)) return error_set(e, ST_DRAINING, "the daemon is shutting down");
    if (in_flight(v, s, msg->request_id))
        return error_set(e, ST_CONFLICT, "request_id %llu is in flight already",
                         (unsigned long long)msg->request_id);
    if (s->n_requests >= SESSION_MAX_INFLIGHT)
        return error_set(e, ST_QUOTA, "%d requests of this session are in flight, the most allowed",
                         s->n_requests);
    return ST_OK;
}

enum status submit_check_ids(const struct server *v, const int32_t *ids, size_t n, const char *what,
                             struct error *e) {
    int32_t n_vocab = v->o.info->shape.n_vocab;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return error_set(e, ST_INVALID, "%s: token %d does not exist, the vocabulary has %d",
                             what, ids[i], n_vocab);
    return ST_OK;
}

static enum status check_fields(struct server *v, const struct wire_submit *w, struct error *e) {
    int32_t n_vocab = v->o.info->shape.n_vocab;
    for (size_t i = 0; i < w->sampling.n_bias; i++)
        if (w->sampling.bias[i].token >= n_vocab)
            return error_set(e, ST_INVALID, "bias: token %d does not exist, the vocabulary has %d",
                             w->sampling.bias[i].token, n_vocab);
    enum status st = submit_check_ids(v, w->stop_ids, w->n_stop_ids, "stop_ids", e);
    if (st != ST_OK) return st;
    if (w->n > (uint32_t)v->max_sequences)
        return error_set(e, ST_INVALID, "n is %u: this daemon has room for %d sequences", w->n,
                         v->max_sequences);
    size_t max = (size_t)v->o.info->limits.max_seq_tokens;
    if (w->n_prompt_ids >= max)
        return error_set(e, ST_TOO_LONG,
                         "the prompt has %zu tokens: with one to complete, at most %zu fit",
                         w->n_prompt_ids, max - 1);
    return submit_check_ids(v, w->prompt_ids, w->n_prompt_ids, "prompt_ids", e);
}

/* ---- the request ---------------------------------------------------------------------------- */

static void fill_sampling(struct server *v, const struct wire_submit *w, struct moe_sampling *m) {
    const struct wire_sampling *s = &w->sampling;
    int32_t n_vocab = v->o.info->shape.n_vocab;
    m->temperature = s->temperature;
    m->top_k = s->top_k < (uint32_t)n_vocab ? (int32_t)s->top_k : 0; /* all of them: off */
    m->top_p = s->top_p;
    m->min_p = s->min_p;
    m->repetition_penalty = s->repetition_penalty;
    m->presence_penalty = s->presence_penalty;
    m->frequency_penalty = s->frequency_penalty;
    m->n_bias = (int32_t)s->n_bias;
    for (size_t i = 0; i < s->n_bias; i++)
        m->bias[i] = (struct moe_bias){s->bias[i].token, s->bias[i].bias};
    m->logprobs = s->logprobs;
    m->n_top = (int32_t)s->top_logprobs;
    uint32_t max = (uint32_t)v->o.info->limits.max_seq_tokens;
    m->min_tokens = (int32_t)(w->min_tokens < max ? w->min_tokens : max);
    for (size_t i = 0; i < w->n_stop_ids; i++) m->stop_ids[m->n_stop_ids++] = w->stop_ids[i];
    if (w->ignore_eos) return;
    int room = MOE_MAX_STOP_IDS - m->n_stop_ids;
    int n = text_end_ids(v->o.text, m->stop_ids + m->n_stop_ids, room);
    m->n_stop_ids += n < room ? n : room;
}

static void fill_request(struct server *v, struct request *r, const struct wire_submit *w) {
    r->received_ns = v->now_ns;
    if (w->ttl_ms > 0) {
        r->deadline_ns = v->now_ns + (uint64_t)w->ttl_ms * 1000000u;
        server_timer(v, r->deadline_ns);
    }
    r->n = (int32_t)w->n;
    uint32_t max = (uint32_t)v->o.info->limits.max_seq_tokens;
    r->max_tokens = (int32_t)(w->has_max_tokens && w->max_tokens < max ? w->max_tokens : max);
    r->priority = (int32_t)w->priority;
    r->seed = w->sampling.has_seed ? w->sampling.seed : server_random(v);
    fill_sampling(v, w, &r->sampling);
    r->stops.n = (int32_t)w->n_stop;
    for (size_t i = 0; i < w->n_stop; i++) {
        r->stops.strings[i].n_bytes = (uint16_t)w->stop[i].n;
        memcpy(r->stops.strings[i].bytes, w->stop[i].p, w->stop[i].n);
    }
    snprintf(r->tag, sizeof r->tag, "%.*s", (int)w->tag.n, w->tag.n ? (const char *)w->tag.p : "");
}

static void join_session(struct server *v, struct session *s, struct request *r) {
    int32_t idx = request_idx(v->requests, r);
    r->session = session_idx(v->sessions, s);
    if (s->requests < 0) {
        s->requests = r->next = r->prev = idx;
    } else {
        struct request *first = request_at(v->requests, s->requests);
        r->next = s->requests;
        r->prev = first->prev;
        request_at(v->requests, first->prev)->next = idx;
        first->prev = idx;
    }
    s->n_requests++;
}

/* ---- admission ------------------------------------------------------------------------------ */

static enum status add_choice(struct server *v, struct session *s, struct request *r,
                              const int32_t *ids, size_t n_ids) {
    struct choice *c = choice_new(v->requests, r);
    if (!c) return ST_OVERLOADED;
    struct sched_request want = {.ids = ids,
                                 .n_ids = (int32_t)n_ids,
                                 .max_tokens = r->max_tokens,
                                 .priority = r->priority,
                                 .sampling = r->sampling};
    want.sampling.seed = r->seed + c->index;
    c->rank = step_pick_rank(v);
    struct rank *rank = &v->ranks[c->rank];
    enum status st = sched_add(rank->sched, &want, v->now_ns, &c->seq);
    if (st != ST_OK) return st;
    c->open = true;
    r->n_open++;
    rank->choice_of_seq[c->seq.idx] = choice_idx(v->requests, c);
    if (s->held) sched_hold(rank->sched, c->seq, true);
    return ST_OK;
}

/* The prompt is known: into the scheduler with all choices, or out with a reason. */
static void admit(struct server *v, struct session *s, struct request *r, const int32_t *ids,
                  size_t n_ids) {
    struct error e;
    uint32_t depth = (uint32_t)stats_sched(v).n_waiting;
    enum status st = ST_OK;
    for (int32_t i = 0; st == ST_OK && i < r->n; i++) st = add_choice(v, s, r, ids, n_ids);
    if (st != ST_OK) {
        if (st == ST_TOO_LONG)
            error_set(&e, st,
                      "the prompt has %zu tokens: it does not fit the context or the KV pool",
                      n_ids);
        else
            error_set(&e, st, "the queue is full: %u sequences wait", depth);
        request_reject(v, r, &e);
        return;
    }
    r->n_prompt = (int32_t)n_ids;
    r->state = REQUEST_RUNNING;
    v->tallies.accepted++;
    v->tallies.prompt_tokens += n_ids;
    log_event(LOG_DEBUG, "daemon", "accepted", "request=%llu prompt_tokens=%zu n=%d tag=\"%s\"",
              (unsigned long long)r->request_id, n_ids, r->n, r->tag);
    struct wire_msg m = {.type = WIRE_ACCEPTED,
                         .request_id = r->request_id,
                         .accepted = {.prompt_tokens = (uint32_t)n_ids, .queue_depth = depth}};
    send_session(v, s, &m);
}

static void tokenize(struct server *v, struct session *s, struct request *r,
                     const struct wire_submit *w) {
    size_t max_ids = (size_t)v->o.info->limits.max_seq_tokens - 1;
    struct text_job job = {.kind = w->n_messages > 0 ? TEXT_JOB_CHAT : TEXT_JOB_TEXT,
                           .ticket = {.session = r->session,
                                      .session_generation = s->generation,
                                      .request = request_idx(v->requests, r),
                                      .request_generation = r->generation,
                                      .request_id = r->request_id},
                           .text = w->prompt_text,
                           .parse_special = w->parse_special,
                           .messages = w->messages,
                           .n_messages = w->n_messages,
                           .max_ids = max_ids < TEXTWORK_MAX_IDS ? max_ids : TEXTWORK_MAX_IDS};
    if (textwork_submit(v->textwork, &job) == ST_OK) return;
    struct error e;
    error_set(&e, ST_OVERLOADED, "too much text waits to be tokenized");
    request_reject(v, r, &e);
}

void submit_receive(struct server *v, struct session *s, const struct wire_msg *msg) {
    const struct wire_submit *w = &msg->submit;
    struct error e;
    enum status st = check_session(v, s, msg, &e);
    if (st == ST_OK) st = check_fields(v, w, &e);
    struct request *r = NULL;
    if (st == ST_OK) {
        r = request_new(v->requests);
        if (!r)
            error_set(&e, ST_OVERLOADED, "the queue is full: %d requests",
                      requests_count(v->requests));
    }
    if (!r) {
        send_rejected(v, s, msg->request_id, &e);
        return;
    }
    r->request_id = msg->request_id;
    join_session(v, s, r);
    fill_request(v, r, w);
    if (w->n_prompt_ids > 0)
        admit(v, s, r, w->prompt_ids, w->n_prompt_ids);
    else
        tokenize(v, s, r, w);
}

/* ---- the text worker's answers -------------------------------------------------------------- */

static void answer_question(struct server *v, struct session *s, const struct text_result *result) {
    s->n_questions--;
    if (result->error.code != ST_OK) {
        send_failed(v, s, result->ticket.request_id, &result->error);
        return;
    }
    struct wire_msg m = {.request_id = result->ticket.request_id};
    if (result->kind == TEXT_JOB_DETOKENIZE) {
        m.type = WIRE_DETOKENIZE_RESULT;
        m.text.text = result->text;
    } else {
        m.type = WIRE_TOKENIZE_RESULT;
        m.ids = (struct wire_ids){result->ids, result->n_ids};
    }
    send_session(v, s, &m);
}

void submit_tokenized(struct server *v, const struct text_result *result) {
    const struct text_ticket *t = &result->ticket;
    struct session *s = session_get(v->sessions, t->session, t->session_generation);
    if (!s) return;
    if (t->request < 0) {
        answer_question(v, s, result);
        return;
    }
    struct request *r = request_get(v->requests, t->request, t->request_generation);
    if (!r || r->state != REQUEST_TOKENIZING) return; /* cancelled or timed out meanwhile */
    struct error e = result->error;
    if (e.code == ST_OK && result->n_ids == 0)
        error_set(&e, ST_INVALID, "the prompt has no tokens");
    if (e.code == ST_TOO_LONG)
        error_set(&e, ST_TOO_LONG, "the prompt has more tokens than the context of %d holds",
                  v->o.info->limits.max_seq_tokens);
    if (e.code != ST_OK)
        request_reject(v, r, &e);
    else
        admit(v, s, r, result->ids, result->n_ids);
}
