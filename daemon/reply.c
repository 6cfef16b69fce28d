/* reply: everything the loop sends, and every end of a request. request_finish, request_fail,
 * request_reject and request_drop are the only ways out of the request table, each sends its one
 * message (drop: none, the session is gone), so an accepted request cannot end twice or silently.
 */
#include <string.h>

#include "daemon/state.h"

/* ---- sending -------------------------------------------------------------------------------- */

static enum status send_encoded(struct server *v, struct bytes route, const struct wire_msg *msg) {
    size_t n = 0;
    arena_reset(&v->encode);
    enum status st = wire_encode(msg, &v->encode, v->frame, WIRE_MAX_BODY_BYTES, &n);
    if (st != ST_OK) return ST_TOO_LARGE;
    struct wire_header h = {.major = WIRE_MAJOR,
                            .minor = WIRE_MINOR,
                            .type = (uint16_t)msg->type,
                            .body_bytes = (uint32_t)n,
                            .request_id = msg->request_id};
    uint8_t header[WIRE_HEADER_BYTES];
    wire_header_encode(&h, header);
    v->tallies.messages_out++;
    return net_send(v->net, route, (struct bytes){header, sizeof header},
                    (struct bytes){v->frame, n});
}

static struct bytes route_of(const struct session *s) {
    return (struct bytes){s->route, s->n_route};
}

void session_lose(struct server *v, struct session *s, const char *why) {
    if (s->gone) return;
    s->gone = true;
    v->n_gone++;
    v->tallies.sessions_lost++;
    log_event(LOG_INFO, "daemon", "session_lost", "session=%02x%02x%02x%02x why=\"%s\" requests=%d",
              s->token[0], s->token[1], s->token[2], s->token[3], why, s->n_requests);
}

void send_session(struct server *v, struct session *s, const struct wire_msg *msg) {
    if (s->gone) return;
    switch (send_encoded(v, route_of(s), msg)) {
    case ST_OK: return;
    case ST_OVERLOADED: session_lose(v, s, "its queue is full: it does not read"); return;
    case ST_TOO_LARGE: {
        struct error e;
        error_set(&e, ST_TOO_LARGE, "the answer does not fit a frame of %d bytes",
                  WIRE_MAX_BODY_BYTES);
        send_failed(v, s, msg->request_id, &e);
        return;
    }
    default: session_lose(v, s, "disconnected"); return;
    }
}

/* To a peer that has no session: it gets the answer if it is still there and reads. */
void send_route(struct server *v, struct bytes route, const struct wire_msg *msg) {
    (void)send_encoded(v, route, msg);
}

static struct bytes text_bytes(const char *s) {
    return (struct bytes){(const uint8_t *)s, strlen(s)};
}

void send_failed(struct server *v, struct session *s, uint64_t request_id, const struct error *e) {
    struct wire_msg m = {.type = WIRE_FAILED,
                         .request_id = request_id,
                         .failed = {.code = (uint32_t)e->code,
                                    .text = text_bytes(e->text),
                                    .retryable = status_retryable(e->code)}};
    send_session(v, s, &m);
}

void send_rejected(struct server *v, struct session *s, uint64_t request_id,
                   const struct error *e) {
    bool retryable = status_retryable(e->code);
    struct wire_msg m = {.type = WIRE_REJECTED,
                         .request_id = request_id,
                         .rejected = {.code = (uint32_t)e->code,
                                      .text = text_bytes(e->text),
                                      .retryable = retryable,
                                      .retry_after_ms = retryable ? stats_retry_after_ms(v) : 0,
                                      .queue_depth = (uint32_t)stats_sched(v).n_waiting}};
    v->tallies.rejected[e->code]++;
    send_session(v, s, &m);
}

void send_goodbye(struct server *v, struct bytes route, const struct error *e) {
    static const uint32_t majors[] = {WIRE_MAJOR};
    struct wire_msg m = {.type = WIRE_GOODBYE,
                         .goodbye = {.code = (uint32_t)e->code,
                                     .text = text_bytes(e->text),
                                     .majors = majors,
                                     .n_majors = 1}};
    send_route(v, route, &m);
}

void session_dismiss(struct server *v, struct session *s, const struct error *e) {
    if (s->gone) return;
    send_goodbye(v, route_of(s), e);
    s->gone = true;
    v->n_gone++;
}

/* ---- ends of requests ----------------------------------------------------------------------- */

void choice_take_out(struct server *v, struct request *r, struct choice *c) {
    CHECK(c->open);
    struct rank *rank = &v->ranks[c->rank];
    struct sched_seq_info info;
    if (sched_seq_info(rank->sched, c->seq, &info) == ST_OK) {
        r->n_preempted += info.n_preempted;
        uint64_t first = info.first_scheduled_ns;
        if (first != 0 && (r->first_scheduled_ns == 0 || first < r->first_scheduled_ns))
            r->first_scheduled_ns = first;
    }
    sched_remove(rank->sched, c->seq);
    rank->choice_of_seq[c->seq.idx] = -1;
    c->open = false;
    r->n_open--;
    v->tallies.completion_tokens += c->n_tokens;
}

static void clear_pending(struct server *v, struct request *r, struct choice *c) {
    struct session *s = session_at(v->sessions, r->session);
    s->pending_bytes -= choice_pending_bytes(c, r);
    choice_clear_pending(c);
}

/* Out of the table and out of its session's ring. */
static void leave(struct server *v, struct request *r) {
    struct session *s = session_at(v->sessions, r->session);
    int32_t idx = request_idx(v->requests, r);
    for (int32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = choice_at(v->requests, r->choices[i]);
        if (c->open) choice_take_out(v, r, c);
        clear_pending(v, r, c);
    }
    if (r->next == idx) {
        s->requests = -1;
    } else {
        request_at(v->requests, r->prev)->next = r->next;
        request_at(v->requests, r->next)->prev = r->prev;
        if (s->requests == idx) s->requests = r->next;
    }
    s->n_requests--;
    request_free(v->requests, r);
}

void request_reject(struct server *v, struct request *r, const struct error *e) {
    CHECK(r->state == REQUEST_TOKENIZING);
    struct session *s = session_at(v->sessions, r->session);
    uint64_t request_id = r->request_id;
    leave(v, r);
    send_rejected(v, s, request_id, e);
}

void request_fail(struct server *v, struct request *r, enum status st, const char *text) {
    CHECK(r->state == REQUEST_RUNNING || r->state == REQUEST_FLUSHING);
    struct session *s = session_at(v->sessions, r->session);
    uint64_t request_id = r->request_id;
    struct error e;
    error_set(&e, st, "%s", text);
    leave(v, r);
    v->tallies.failed[st]++;
    stats_finished(v);
    send_failed(v, s, request_id, &e);
    server_dirty(v, s); /* what it kept waiting may go on */
}

/* Its session is gone: nobody is left to tell. */
static void request_drop(struct server *v, struct request *r) {
    if (r->state != REQUEST_TOKENIZING) v->tallies.dropped++;
    leave(v, r);
}

static double ms_between(uint64_t from, uint64_t to) {
    return from != 0 && to > from ? (double)(to - from) / 1e6 : 0;
}

static void request_finish(struct server *v, struct request *r) {
    CHECK((r->state == REQUEST_RUNNING || r->state == REQUEST_FLUSHING) && r->n_open == 0);
    struct wire_choice choices[WIRE_MAX_CHOICES];
    uint32_t n_completion = 0;
    for (int32_t i = 0; i < r->n; i++) {
        choices[i] =
            (struct wire_choice){.index = (uint32_t)i, .reason = r->early, .hash = WIRE_HASH_START};
        if (i >= r->n_choices) continue; /* ended before it had sequences */
        const struct choice *c = choice_at(v->requests, r->choices[i]);
        choices[i].reason = c->reason;
        choices[i].completion_tokens = c->n_tokens;
        choices[i].last_seq = c->n_chunks;
        choices[i].hash = c->hash;
        choices[i].has_stop_id = c->stop_id >= 0;
        choices[i].stop_id = c->stop_id;
        if (c->stop >= 0)
            choices[i].stop =
                (struct bytes){r->stops.strings[c->stop].bytes, r->stops.strings[c->stop].n_bytes};
        n_completion += c->n_tokens;
    }
    uint64_t scheduled = r->first_scheduled_ns ? r->first_scheduled_ns : v->now_ns;
    struct wire_msg m = {
        .type = WIRE_FINISHED,
        .request_id = r->request_id,
        .finished = {.choices = choices,
                     .n_choices = (size_t)r->n,
                     .prompt_tokens = (uint32_t)r->n_prompt,
                     .completion_tokens = n_completion,
                     .queue_ms = ms_between(r->received_ns, scheduled),
                     .prefill_ms = ms_between(r->first_scheduled_ns, r->first_token_ns),
                     .decode_ms = ms_between(r->first_token_ns, r->last_token_ns),
                     .preemptions = (uint32_t)r->n_preempted}};
    struct session *s = session_at(v->sessions, r->session);
    send_session(v, s, &m);
    v->tallies.finished[r->early ? r->early : choices[0].reason]++;
    stats_finished(v);
    leave(v, r);
}

void request_end_early(struct server *v, struct request *r, enum wire_reason reason) {
    struct session *s = session_at(v->sessions, r->session);
    if (r->state == REQUEST_TOKENIZING) {
        /* Its prompt was never counted; Accepted all the same, so that every Finished follows one.
         */
        struct wire_msg m = {.type = WIRE_ACCEPTED, .request_id = r->request_id};
        send_session(v, s, &m);
        r->state = REQUEST_RUNNING;
        v->tallies.accepted++;
    }
    r->early = reason;
    for (int32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = choice_at(v->requests, r->choices[i]);
        if (!c->open) continue;
        s->pending_bytes -= choice_pending_bytes(c, r);
        choice_end(c, reason);
        s->pending_bytes += choice_pending_bytes(c, r);
        choice_take_out(v, r, c);
    }
    server_dirty(v, s);
}

/* ---- sessions that are gone ----------------------------------------------------------------- */

void server_clear_gone(struct server *v) {
    for (int32_t i = 0; v->n_gone > 0 && i < sessions_end(v->sessions); i++) {
        struct session *s = session_at(v->sessions, i);
        if (!s->used || !s->gone) continue;
        while (s->requests >= 0) request_drop(v, request_at(v->requests, s->requests));
        session_close(v->sessions, s);
        v->n_gone--;
    }
}

/* ---- chunks --------------------------------------------------------------------------------- */

static void send_chunk(struct server *v, struct session *s, struct request *r, struct choice *c) {
    struct wire_msg m = {.type = WIRE_TOKEN_CHUNK, .request_id = r->request_id};
    choice_chunk(c, r, v->logprobs, &m.chunk);
    m.chunk.seq = c->n_chunks++;
    m.chunk.session_seq = ++s->sent_seq;
    v->tallies.chunks++;
    clear_pending(v, r, c);
    send_session(v, s, &m);
}

/* Send what r's choices have pending; false if some of it has to wait. */
static bool flush_request(struct server *v, struct session *s, struct request *r) {
    bool all = true;
    for (int32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = choice_at(v->requests, r->choices[i]);
        if (!choice_has_pending(c)) continue;
        if (session_window_open(s))
            send_chunk(v, s, r, c);
        else
            all = false;
    }
    return all;
}

static void hold(struct server *v, struct session *s, bool held) {
    s->held = held;
    s->progress_ns = v->now_ns;
    if (held) server_timer(v, v->now_ns + v->o.stall_ns);
    int32_t idx = s->requests;
    for (int32_t n = s->n_requests; n > 0; n--) {
        struct request *r = request_at(v->requests, idx);
        for (int32_t i = 0; i < r->n_choices; i++) {
            struct choice *c = choice_at(v->requests, r->choices[i]);
            if (c->open) sched_hold(v->ranks[c->rank].sched, c->seq, held);
        }
        idx = r->next;
    }
}

static void flush_session(struct server *v, struct session *s) {
    int32_t blocked = -1, idx = s->requests;
    bool full = false;
    for (int32_t n = s->n_requests; n > 0 && !s->gone; n--) {
        struct request *r = request_at(v->requests, idx);
        int32_t next = r->next;
        if (r->state != REQUEST_TOKENIZING) {
            bool all = flush_request(v, s, r);
            if (!all && blocked < 0) blocked = idx;
            for (int32_t i = 0; i < r->n_choices; i++)
                full = full || choice_full(choice_at(v->requests, r->choices[i]), r);
            if (r->n_open == 0 && all) {
                request_finish(v, r);
            } else if (r->n_open == 0 && r->state == REQUEST_RUNNING) {
                r->state = REQUEST_FLUSHING;
                r->flushing_ns = v->now_ns;
                server_timer(v, v->now_ns + v->o.stall_ns);
            }
        }
        idx = next;
    }
    if (s->gone) return;
    if (blocked >= 0) s->requests = blocked; /* next time it is first */
    if (!s->held && (full || s->pending_bytes > SESSION_MAX_PENDING_BYTES))
        hold(v, s, true);
    else if (s->held && s->pending_bytes == 0)
        hold(v, s, false);
}

void server_flush(struct server *v) {
    for (int32_t i = 0; i < v->n_dirty; i++) {
        struct session *s = session_at(v->sessions, v->dirty[i]);
        v->is_dirty[v->dirty[i]] = false;
        if (s->used && !s->gone) flush_session(v, s);
    }
    v->n_dirty = 0;
}
