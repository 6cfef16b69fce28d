/* receive: from frames to handlers. What is wrong with a message is told to its sender, and costs
 * it the session only when the frames themselves cannot be trusted any more. */
#include <stdio.h>
#include <string.h>

#include "daemon/state.h"

/* ---- handshake ------------------------------------------------------------------------------ */

static bool speaks_ours(const struct wire_hello *h) {
    for (size_t i = 0; i < h->n_majors; i++)
        if (h->majors[i] == WIRE_MAJOR) return true;
    return false;
}

static void send_welcome(struct server *v, struct session *s) {
    struct wire_msg m = {.type = WIRE_WELCOME};
    struct wire_welcome *w = &m.welcome;
    const struct moe_info *info = v->o.info;
    w->major = WIRE_MAJOR;
    w->minor = WIRE_MINOR;
    memcpy(w->boot_id, v->boot_id, WIRE_ID_BYTES);
    memcpy(w->session, s->token, WIRE_ID_BYTES);
    w->limits = (struct wire_limits){.max_frame_bytes = WIRE_MAX_BODY_BYTES,
                                     .max_inflight = SESSION_MAX_INFLIGHT,
                                     .credit_window = SESSION_WINDOW,
                                     .max_context_tokens = (uint32_t)info->limits.max_seq_tokens,
                                     .max_stops = WIRE_MAX_STOPS,
                                     .max_choices = WIRE_MAX_CHOICES};
    w->heartbeat_ms = 2000;
    w->model = (struct bytes){(const uint8_t *)info->name, strlen(info->name)};
    w->server = (struct bytes){(const uint8_t *)MOED_SERVER_NAME, strlen(MOED_SERVER_NAME)};
    send_session(v, s, &m);
}

static void on_hello(struct server *v, const struct net_message *m, struct session *old,
                     const struct wire_msg *msg) {
    struct error e;
    if (!speaks_ours(&msg->hello)) {
        error_set(&e, ST_UNSUPPORTED, "no common protocol version: this daemon speaks major %d",
                  WIRE_MAJOR);
        send_goodbye(v, m->route, &e);
        return;
    }
    if (old) { /* the client starts over: nobody waits for the old session's answers */
        old->gone = true;
        v->n_gone++;
        server_clear_gone(v);
    }
    if (server_draining(v)) {
        error_set(&e, ST_DRAINING, "the daemon is shutting down");
        send_goodbye(v, m->route, &e);
        return;
    }
    struct session *s = session_open(v->sessions, m->route);
    if (!s) {
        error_set(&e, ST_OVERLOADED, "%d sessions are open, the most allowed",
                  sessions_count(v->sessions));
        send_goodbye(v, m->route, &e);
        return;
    }
    s->fd = m->fd;
    v->tallies.sessions_opened++;
    log_event(LOG_INFO, "daemon", "session_opened",
              "session=%02x%02x%02x%02x client=\"%.*s\" peer=%s", s->token[0], s->token[1],
              s->token[2], s->token[3], (int)msg->hello.client.n,
              msg->hello.client.n ? (const char *)msg->hello.client.p : "", m->peer);
    send_welcome(v, s);
}

/* ---- questions ------------------------------------------------------------------------------ */

static void on_model_info(struct server *v, struct session *s, uint64_t request_id) {
    const struct moe_info *i = v->o.info;
    struct wire_msg m = {
        .type = WIRE_MODEL_INFO_RESULT,
        .request_id = request_id,
        .model_info = {.name = {(const uint8_t *)i->name, strlen(i->name)},
                       .architecture = {(const uint8_t *)i->architecture, strlen(i->architecture)},
                       .backend = {(const uint8_t *)i->backend, strlen(i->backend)},
                       .quantization = {(const uint8_t *)i->quantization, strlen(i->quantization)},
                       .n_layers = (uint32_t)i->shape.n_layers,
                       .n_vocab = (uint32_t)i->shape.n_vocab,
                       .n_experts = (uint32_t)i->shape.n_experts,
                       .n_experts_used = (uint32_t)i->shape.n_experts_used,
                       .max_context_tokens = (uint32_t)i->limits.max_seq_tokens,
                       .weight_bytes = i->weight_bytes,
                       .kv_bytes_per_token = i->kv_bytes_per_token,
                       .eos_id = i->eos_id}};
    send_session(v, s, &m);
}

static void on_health(struct server *v, struct session *s, uint64_t request_id) {
    enum status state = v->lost != ST_OK     ? ST_ENGINE_LOST
                        : server_draining(v) ? ST_DRAINING
                                             : ST_OK;
    uint64_t since = v->last_step_ns ? v->last_step_ns : v->start_ns;
    struct wire_msg m = {.type = WIRE_HEALTH_RESULT,
                         .request_id = request_id,
                         .health = {.live = true,
                                    .ready = state == ST_OK,
                                    .state = (uint32_t)state,
                                    .uptime_ms = (v->now_ns - v->start_ns) / 1000000u,
                                    .last_step_ms = (v->now_ns - since) / 1000000u}};
    send_session(v, s, &m);
}

/* Tokenize and Detokenize go through the text worker. */
static void on_text_question(struct server *v, struct session *s, const struct wire_msg *msg) {
    struct error e;
    struct text_job job = {.kind = TEXT_JOB_DETOKENIZE,
                           .ticket = {.session = session_idx(v->sessions, s),
                                      .session_generation = s->generation,
                                      .request = -1,
                                      .request_id = msg->request_id},
                           .max_ids = TEXTWORK_MAX_IDS};
    if (msg->type == WIRE_DETOKENIZE) {
        job.ids = msg->ids.ids;
        job.n_ids = msg->ids.n_ids;
    } else {
        job.kind = msg->tokenize.n_messages > 0 ? TEXT_JOB_CHAT : TEXT_JOB_TEXT;
        job.text = msg->tokenize.text;
        job.messages = msg->tokenize.messages;
        job.n_messages = msg->tokenize.n_messages;
        job.parse_special = msg->tokenize.parse_special;
    }
    if (submit_check_ids(v, job.ids, job.n_ids, "ids", &e) != ST_OK) {
        /* e says it */
    } else if (s->n_questions >= SESSION_MAX_INFLIGHT)
        error_set(&e, ST_QUOTA, "%d questions of this session wait, the most allowed",
                  s->n_questions);
    else if (textwork_submit(v->textwork, &job) != ST_OK)
        error_set(&e, ST_OVERLOADED, "too much text waits to be tokenized");
    else {
        s->n_questions++;
        return;
    }
    send_failed(v, s, msg->request_id, &e);
}

/* ---- the rest ------------------------------------------------------------------------------- */

static void on_cancel(struct server *v, struct session *s, uint64_t request_id) {
    int32_t idx = s->requests;
    for (int32_t n = s->n_requests; n > 0; n--) {
        struct request *r = request_at(v->requests, idx);
        if (r->request_id == request_id) {
            request_end_early(v, r, REASON_CANCELLED);
            return;
        }
        idx = r->next;
    }
    struct wire_msg m = {.type = WIRE_ACK, .request_id = request_id};
    send_session(v, s, &m);
}

static void on_credit(struct server *v, struct session *s, uint64_t session_seq) {
    if (session_credit(s, session_seq, v->now_ns)) {
        server_dirty(v, s);
        return;
    }
    struct error e;
    error_set(&e, ST_INVALID, "Credit for %llu: only %llu were sent",
              (unsigned long long)session_seq, (unsigned long long)s->sent_seq);
    session_dismiss(v, s, &e);
}

static void dispatch(struct server *v, struct session *s, const struct wire_msg *msg) {
    struct wire_msg reply = {.request_id = msg->request_id};
    struct error e;
    switch (msg->type) {
    case WIRE_PING:
        reply.type = WIRE_PONG;
        reply.ping = msg->ping;
        send_session(v, s, &reply);
        return;
    case WIRE_BYE:
        error_set(&e, ST_OK, "bye");
        session_dismiss(v, s, &e);
        return;
    case WIRE_SUBMIT: submit_receive(v, s, msg); return;
    case WIRE_CANCEL: on_cancel(v, s, msg->request_id); return;
    case WIRE_CREDIT: on_credit(v, s, msg->credit.session_seq); return;
    case WIRE_MODEL_INFO: on_model_info(v, s, msg->request_id); return;
    case WIRE_HEALTH: on_health(v, s, msg->request_id); return;
    case WIRE_STATS: stats_send(v, s, msg->request_id); return;
    case WIRE_TOKENIZE:
    case WIRE_DETOKENIZE: on_text_question(v, s, msg); return;
    default:
        error_set(&e, ST_UNIMPLEMENTED, "%s is not a message to a daemon",
                  wire_type_name(msg->type));
        send_failed(v, s, msg->request_id, &e);
    }
}

/* A header that is not the protocol: nothing that follows from this peer can be trusted. */
static void bad_frames(struct server *v, const struct net_message *m, struct session *s,
                       const struct error *e) {
    v->tallies.bad_messages++;
    log_event(LOG_DEBUG, "daemon", "bad_message", "peer=%s error=\"%s\"", m->peer, e->text);
    if (s)
        session_dismiss(v, s, e);
    else
        send_goodbye(v, m->route, e);
}

/* A good header with a bad body: an answer to that request, and the session goes on. */
static void bad_body(struct server *v, const struct net_message *m, struct session *s,
                     const struct wire_header *h, const struct error *e) {
    v->tallies.bad_messages++;
    if (h->type == WIRE_HELLO)
        send_goodbye(v, m->route, e);
    else if (h->type == WIRE_SUBMIT)
        send_rejected(v, s, h->request_id, e);
    else
        send_failed(v, s, h->request_id, e);
}

static void no_session(struct server *v, const struct net_message *m, const struct wire_header *h) {
    struct error e;
    error_set(&e, ST_UNAUTHENTICATED, "say Hello first");
    if (h->type != WIRE_SUBMIT) {
        send_goodbye(v, m->route, &e);
        return;
    }
    struct wire_msg r = {.type = WIRE_REJECTED,
                         .request_id = h->request_id,
                         .rejected = {.code = ST_UNAUTHENTICATED,
                                      .text = {(const uint8_t *)e.text, strlen(e.text)}}};
    v->tallies.rejected[ST_UNAUTHENTICATED]++;
    send_route(v, m->route, &r);
}

void receive_message(struct server *v, const struct net_message *m) {
    struct session *s = session_find(v->sessions, m->route);
    if (s && s->gone) { /* dismissed earlier in this turn */
        server_clear_gone(v);
        s = NULL;
    }
    v->tallies.messages_in++;
    struct error e;
    struct wire_header h;
    if (!m->three_frames) {
        error_set(&e, ST_INVALID, "a message has a header frame and a body frame");
        bad_frames(v, m, s, &e);
        return;
    }
    if (wire_header_decode(m->header.p, m->header.n, &e, &h) != ST_OK) {
        bad_frames(v, m, s, &e);
        return;
    }
    if (!s && h.type != WIRE_HELLO) {
        no_session(v, m, &h);
        return;
    }
    if (s) s->fd = m->fd;
    struct wire_msg msg;
    arena_reset(&v->decode);
    if (wire_decode(&h, m->body.p, m->body.n, &v->decode, &e, &msg) != ST_OK)
        bad_body(v, m, s, &h, &e);
    else if (msg.type == WIRE_HELLO)
        on_hello(v, m, s, &msg);
    else
        dispatch(v, s, &msg);
}
