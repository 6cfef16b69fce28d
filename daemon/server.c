/* server: see server.h. The loop: sleep until something is to do; take the engine's results, plan
 * the next step, take text, messages and disconnects, look at the timers, plan again, send what is
 * ready. Every part is bounded, so that none starves another. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "daemon/state.h"

enum {
    DEFAULT_SESSIONS = 1024,
    TEXT_BUDGET_BYTES = 64 << 20,
    MESSAGES_PER_TURN = 64, /* before the engine's results are looked at again */
    TEXTS_PER_TURN = 16
};
#define DEFAULT_STALL_NS UINT64_C(30000000000)
#define ENCODE_BYTES                                                                               \
    ((size_t)(16) << 20) /* more than any answer needs: ids of a frame and their packing */

/* ---- life ----------------------------------------------------------------------------------- */

static enum status create_tables(struct server *v, struct error *e) {
    int32_t max_sessions = v->o.max_sessions;
    enum status st = step_create(v);
    if (st == ST_OK) st = sessions_create(max_sessions, &v->sessions);
    /* A choice that waits for its client keeps its place after its sequence is gone, hence the room
     * beyond. */
    if (st == ST_OK) st = requests_create(v->max_sequences, v->max_sequences * 2, &v->requests);
    if (st == ST_OK) st = textwork_create(v->o.text, TEXT_BUDGET_BYTES, &v->textwork);
    if (st == ST_OK) st = arena_create(WIRE_ARENA_BYTES, &v->decode);
    if (st == ST_OK) st = arena_create(ENCODE_BYTES, &v->encode);
    if (st != ST_OK)
        return error_set(e, st, "cannot set up the daemon's tables: %s", status_name(st));
    v->frame = malloc(WIRE_MAX_BODY_BYTES);
    v->logprobs = calloc(PENDING_MAX_IDS, sizeof *v->logprobs);
    v->dirty = calloc((size_t)max_sessions, sizeof *v->dirty);
    v->is_dirty = calloc((size_t)max_sessions, sizeof *v->is_dirty);
    if (!v->frame || !v->logprobs || !v->dirty || !v->is_dirty)
        return error_set(e, ST_NO_MEMORY, "no memory for the daemon's tables");
    const struct moe_limits *l = &v->o.info->limits;
    uint64_t id_bytes = (uint64_t)v->o.n_ranks * (uint64_t)(l->max_seqs + v->o.max_queue) *
                        (uint64_t)l->max_seq_tokens * sizeof(int32_t);
    v->n_bytes = id_bytes + requests_bytes(v->requests) + textwork_bytes(v->textwork) +
                 WIRE_ARENA_BYTES + ENCODE_BYTES + WIRE_MAX_BODY_BYTES;
    return ST_OK;
}

enum status server_create(const struct server_options *o, struct net *net,
                          struct engine *const *engines, struct error *e, struct server **out) {
    struct server *v = calloc(1, sizeof *v);
    int n_ranks = o->n_ranks > 0 ? o->n_ranks : 1;
    CHECK(n_ranks <= MOE_MAX_RANKS);
    if (!v) {
        for (int i = 0; i < n_ranks; i++) engine_stop(engines[i]);
        net_close(net);
        return error_set(e, ST_NO_MEMORY, "no memory for the daemon");
    }
    v->o = *o;
    if (v->o.max_sessions == 0) v->o.max_sessions = DEFAULT_SESSIONS;
    if (v->o.stall_ns == 0) v->o.stall_ns = DEFAULT_STALL_NS;
    v->net = net;
    v->o.n_ranks = n_ranks;
    for (int i = 0; i < n_ranks; i++) v->ranks[i].engine = engines[i];
    v->timer_ns = UINT64_MAX;
    v->start_ns = v->now_ns = clock_now_ns();
    random_bytes(v->boot_id, sizeof v->boot_id);
    random_bytes(&v->random, sizeof v->random);
    v->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    enum status st = v->stop_fd >= 0
                         ? create_tables(v, e)
                         : error_set(e, ST_IO, "no descriptor left: %s", strerror(errno));
    if (st == ST_OK) st = net_bind(net, e);
    if (st != ST_OK) {
        server_destroy(v);
        return st;
    }
    *out = v;
    return ST_OK;
}

void server_destroy(struct server *v) {
    if (!v) return;
    /* First: they may hold steps. */
    for (int i = 0; i < v->o.n_ranks; i++) engine_stop(v->ranks[i].engine);
    textwork_destroy(v->textwork);
    step_destroy(v);
    sessions_destroy(v->sessions);
    requests_destroy(v->requests);
    arena_destroy(&v->decode);
    arena_destroy(&v->encode);
    free(v->frame);
    free(v->logprobs);
    free(v->dirty);
    free(v->is_dirty);
    if (v->stop_fd >= 0) close(v->stop_fd);
    net_close(v->net);
    free(v);
}

void server_abandon(struct server *v) { net_close(v->net); }

uint64_t server_bytes(const struct server *v) { return v->n_bytes; }

void server_stop(struct server *v) {
    int saved = errno; /* a signal handler leaves it alone */
    uint64_t one = 1;
    ssize_t w = write(v->stop_fd, &one, sizeof one);
    (void)w;
    errno = saved;
}

/* ---- small things --------------------------------------------------------------------------- */

/* splitmix64 (Steele, Lea, Flood 2014). For seeds and jitter, not for secrets. */
uint64_t server_random(struct server *v) {
    uint64_t z = (v->random += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

void server_timer(struct server *v, uint64_t at_ns) {
    if (at_ns < v->timer_ns) v->timer_ns = at_ns;
}

void server_dirty(struct server *v, struct session *s) {
    int32_t idx = session_idx(v->sessions, s);
    if (v->is_dirty[idx]) return;
    v->is_dirty[idx] = true;
    v->dirty[v->n_dirty++] = idx;
}

/* ---- timers --------------------------------------------------------------------------------- */

/* An answer that nobody asked for and every client ignores: whether it can be queued is what we
 * want to know. */
static void probe(struct server *v, struct session *s) {
    struct wire_msg m = {.type = WIRE_PONG};
    send_session(v, s, &m);
    uint64_t next = session_probed(s, v->now_ns);
    if (next != 0) server_timer(v, next);
}

static void request_timers(struct server *v, struct request *r) {
    if (r->state == REQUEST_FLUSHING) {
        const struct session *s = session_at(v->sessions, r->session);
        uint64_t since = s->progress_ns > r->flushing_ns ? s->progress_ns : r->flushing_ns;
        if (v->now_ns - since >= v->o.stall_ns)
            request_fail(v, r, ST_SLOW_CONSUMER, "the client did not read its tokens");
        else
            server_timer(v, since + v->o.stall_ns);
    } else if (r->deadline_ns != 0) {
        if (v->now_ns >= r->deadline_ns)
            request_end_early(v, r, REASON_TIMEOUT);
        else
            server_timer(v, r->deadline_ns);
    }
}

static void session_timers(struct server *v, struct session *s) {
    if (s->n_probes > 0) {
        if (v->now_ns >= s->next_probe_ns)
            probe(v, s);
        else
            server_timer(v, s->next_probe_ns);
    }
    if (!s->held || s->gone) return;
    if (v->now_ns - s->progress_ns < v->o.stall_ns) {
        server_timer(v, s->progress_ns + v->o.stall_ns);
        return;
    }
    for (int32_t n = s->n_requests, idx = s->requests; n > 0; n--) {
        struct request *r = request_at(v->requests, idx);
        idx = r->next;
        if (r->state != REQUEST_TOKENIZING)
            request_fail(v, r, ST_SLOW_CONSUMER, "the client did not read its tokens");
    }
    server_dirty(v, s);
}

static void run_timers(struct server *v) {
    if (v->now_ns < v->timer_ns) return;
    v->timer_ns = UINT64_MAX;
    for (int32_t i = 0; i < sessions_end(v->sessions); i++) {
        struct session *s = session_at(v->sessions, i);
        if (s->used) session_timers(v, s);
    }
    for (int32_t i = 0; i < requests_cap(v->requests); i++) {
        struct request *r = request_at(v->requests, i);
        if (r->state != REQUEST_FREE) request_timers(v, r);
    }
    step_timers(v);
    if (server_draining(v)) server_timer(v, v->drain_until_ns);
}

/* ---- stopping ------------------------------------------------------------------------------- */

static void begin_drain(struct server *v) {
    v->drain_until_ns = v->now_ns + v->o.drain_ns;
    server_timer(v, v->drain_until_ns);
    log_event(LOG_INFO, "daemon", "draining", "requests=%d seconds=%.0f",
              requests_count(v->requests), (double)v->o.drain_ns / 1e9);
    struct wire_msg m = {.type = WIRE_GOAWAY,
                         .goaway = {.deadline_ms = (uint32_t)(v->o.drain_ns / 1000000u)}};
    for (int32_t i = 0; i < sessions_end(v->sessions); i++) {
        struct session *s = session_at(v->sessions, i);
        if (s->used) send_session(v, s, &m);
    }
}

static void take_stop(struct server *v) {
    uint64_t n;
    if (read(v->stop_fd, &n, sizeof n) != (ssize_t)sizeof n) return;
    if (v->n_stops == 0) begin_drain(v);
    v->n_stops += (int)(n < 2 ? n : 2);
}

/* Whether the loop is over: engine lost, drained, or out of patience. Requests that are left fail.
 */
static bool is_over(struct server *v) {
    if (v->lost != ST_OK) return true;
    if (!server_draining(v)) return false;
    if (requests_count(v->requests) == 0) return true;
    if (v->now_ns < v->drain_until_ns && v->n_stops < 2) return false;
    struct error e;
    error_set(&e, ST_DRAINING, "the daemon shut down before the request was done");
    for (int32_t i = 0; i < requests_cap(v->requests); i++) {
        struct request *r = request_at(v->requests, i);
        if (r->state == REQUEST_TOKENIZING)
            request_reject(v, r, &e);
        else if (r->state != REQUEST_FREE)
            request_fail(v, r, e.code, e.text);
    }
    return true;
}

static void say_goodbye(struct server *v) {
    struct error e;
    error_set(&e, v->lost != ST_OK ? ST_ENGINE_LOST : ST_DRAINING, "%s",
              v->lost != ST_OK ? "the engine was lost" : "the daemon shut down");
    for (int32_t i = 0; i < sessions_end(v->sessions); i++) {
        struct session *s = session_at(v->sessions, i);
        if (s->used) session_dismiss(v, s, &e);
    }
    server_clear_gone(v);
}

/* ---- the loop ------------------------------------------------------------------------------- */

static void take_texts(struct server *v) {
    struct text_result result;
    for (int i = 0; i < TEXTS_PER_TURN && textwork_peek(v->textwork, &result); i++) {
        submit_tokenized(v, &result);
        textwork_pop(v->textwork);
    }
}

static void take_messages(struct server *v) {
    struct net_message m;
    for (int i = 0; i < MESSAGES_PER_TURN && net_receive(v->net, &m); i++) receive_message(v, &m);
}

static void take_disconnects(struct server *v) {
    int fd;
    while (net_disconnected(v->net, &fd)) {
        for (int32_t i = 0; i < sessions_end(v->sessions); i++) {
            struct session *s = session_at(v->sessions, i);
            if (!s->used || s->gone || s->fd != fd) continue;
            session_suspect(s, v->now_ns);
            server_timer(v, v->now_ns);
        }
    }
}

static int sleep_ms(const struct server *v) {
    if (v->timer_ns == UINT64_MAX) return -1;
    uint64_t now = clock_now_ns();
    if (v->timer_ns <= now) return 0;
    uint64_t ms = (v->timer_ns - now + 999999u) / 1000000u;
    return ms > 60000 ? 60000 : (int)ms;
}

static void turn(struct server *v) {
    int fds[2 + MOE_MAX_RANKS] = {v->stop_fd, textwork_fd(v->textwork)};
    for (int i = 0; i < v->o.n_ranks; i++) fds[2 + i] = engine_fd(v->ranks[i].engine);
    struct text_result text;
    /* Text beyond one turn's share has had its wake-up cleared already. */
    int ms = textwork_peek(v->textwork, &text) ? 0 : sleep_ms(v);
    net_wait(v->net, fds, 2 + v->o.n_ranks, ms);
    for (int i = 0; i < v->o.n_ranks; i++) engine_clear(v->ranks[i].engine);
    textwork_clear(v->textwork);
    v->now_ns = clock_now_ns();
    take_stop(v);
    step_results(v);
    take_texts(v);
    take_messages(v);
    take_disconnects(v);
    run_timers(v);
    server_flush(v);
    server_clear_gone(v);
    step_plan(v);
}

enum status server_run(struct server *v) {
    do {
        turn(v);
    } while (!is_over(v));
    say_goodbye(v);
    log_event(LOG_INFO, "daemon", "stopped", "accepted=%llu sessions=%llu",
              (unsigned long long)v->tallies.accepted,
              (unsigned long long)v->tallies.sessions_opened);
    return v->lost == ST_OK ? ST_OK : ST_ENGINE_LOST;
}
