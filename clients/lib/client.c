/* client: one session with a daemon; see client.h. Handshake, request ids, credit, liveness, and
 * the order in which messages are handed out. Framing and sockets are link's.
 *
 * Invariants: a session that is lost stays lost, with the status and text it was lost with; a
 * message is handed out once, in the order of arrival; credit is returned for chunks that were
 * handed out and never for others; at most a window of chunks and three messages per possible
 * request are ever kept. */
#include "clients/lib/client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/lib/link.h"

enum {
    DEFAULT_TIMEOUT_MS = 5000,
    DEFAULT_HEARTBEAT_MS = 2000,
    SILENT_HEARTBEATS = 3, /* without a word after a Ping: the server hangs */
    BYE_LINGER_MS = 200
};

struct kept {
    struct kept *next;
    struct frame frame;
};

struct client {
    struct link link;
    struct arena arena; /* the message last handed out */
    struct arena scratch; /* encoding */
    struct wire_welcome welcome;
    char *welcome_bytes; /* what welcome points to */
    int timeout_ms;
    uint64_t next_id;

    struct kept *kept_first, **kept_end; /* arrived during a client_call */
    size_t n_kept, max_kept;

    uint64_t read_seq, credit_seq; /* session_seq handed out, and acknowledged */
    uint64_t heartbeat_ns, silent_ns, checked_ns, pinged_ns, nonce;

    enum status lost; /* ST_OK while the session lives */
    struct error lost_error;
};

const char *client_default_endpoint(char *dst, size_t cap) {
    const char *endpoint = getenv("MOED_ENDPOINT");
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    if (endpoint && *endpoint)
        snprintf(dst, cap, "%s", endpoint);
    else if (runtime && *runtime)
        snprintf(dst, cap, "ipc://%s/moed.sock", runtime);
    else
        snprintf(dst, cap, "ipc:///tmp/moed-%u.sock", (unsigned)getuid());
    return dst;
}

/* ---- the end of a session -------------------------------------------------------------------- */

static enum status lose(struct client *c, enum status st, const char *text) {
    if (c->lost == ST_OK) {
        c->lost = st;
        error_set(&c->lost_error, st, "%s", text);
    }
    return c->lost;
}

static enum status report_lost(const struct client *c, struct error *e) {
    return error_set(e, c->lost, "%s", c->lost_error.text);
}

/* What a Goodbye says, as a sentence. Its text is the server's and may hold anything but is only
 * shown. */
static void goodbye_text(const struct wire_goodbye *g, char *dst, size_t cap) {
    int n =
        snprintf(dst, cap, "the server ended the session: %s", status_name((enum status)g->code));
    if (g->text.n > 0 && n > 0 && (size_t)n < cap)
        snprintf(dst + n, cap - (size_t)n, ", %.*s", (int)(g->text.n < 160 ? g->text.n : 160),
                 (const char *)g->text.p);
}

/* ---- sending --------------------------------------------------------------------------------- */

static enum status send_msg(struct client *c, const struct wire_msg *msg, int timeout_ms,
                            struct error *e) {
    size_t cap = WIRE_MAX_BODY_BYTES, n = 0;
    uint32_t limit = c->welcome.limits.max_frame_bytes;
    if (limit > 0 && limit < cap) cap = limit;
    arena_reset(&c->scratch);
    uint8_t *body = arena_alloc(&c->scratch, cap);
    enum status st = wire_encode(msg, &c->scratch, body, cap, &n);
    if (st != ST_OK)
        return error_set(e, st, "the %s message is over the limit of %zu bytes",
                         wire_type_name(msg->type), cap);
    struct wire_header h = {.major = WIRE_MAJOR,
                            .minor = WIRE_MINOR,
                            .type = (uint16_t)msg->type,
                            .body_bytes = (uint32_t)n,
                            .request_id = msg->request_id};
    st = link_send(&c->link, &h, body, timeout_ms);
    if (st == ST_TIMEOUT) return error_set(e, st, "the server does not take messages");
    if (st != ST_OK) return error_set(e, st, "the server is gone: it stopped or was restarted");
    return ST_OK;
}

/* Session messages that may be dropped when the socket is full: the next one replaces them. */
static bool send_if_room(struct client *c, const struct wire_msg *msg) {
    return send_msg(c, msg, 0, NULL) == ST_OK;
}

static void return_credit(struct client *c) {
    uint32_t window = c->welcome.limits.credit_window;
    uint64_t step = window >= 8 ? window / 4 : 1;
    if (c->read_seq < c->credit_seq + step) return;
    struct wire_msg msg = {.type = WIRE_CREDIT, .credit = {.session_seq = c->read_seq}};
    if (send_if_room(c, &msg)) c->credit_seq = c->read_seq;
}

/* ---- liveness -------------------------------------------------------------------------------- */

/* To be called when nothing is there to read. Time in which the program did not look counts as
 * one heartbeat at most: our pause is not the server's silence. */
static enum status check_silence(struct client *c) {
    uint64_t now = clock_now_ns();
    uint64_t passed = now - c->checked_ns;
    c->checked_ns = now;
    c->silent_ns += passed < c->heartbeat_ns ? passed : c->heartbeat_ns;
    if (c->silent_ns >= SILENT_HEARTBEATS * c->heartbeat_ns)
        return lose(c, ST_IO,
                    "the server is connected but does not answer: it hangs or is overloaded");
    if (c->silent_ns >= c->heartbeat_ns && now - c->pinged_ns >= c->heartbeat_ns) {
        struct wire_msg ping = {.type = WIRE_PING, .ping = {.nonce = c->nonce++}};
        if (send_if_room(c, &ping)) c->pinged_ns = now;
    }
    return_credit(c); /* if it was due and the socket had no room */
    link_set_timer(&c->link, now + c->heartbeat_ns / 2);
    return ST_OK;
}

static int wait_ms(const struct client *c, uint64_t now_ns, uint64_t end_ns) {
    uint64_t ns = c->heartbeat_ns / 2;
    if (end_ns - now_ns < ns) ns = end_ns - now_ns;
    return (int)(ns / 1000000u) + 1;
}

/* ---- receiving ------------------------------------------------------------------------------- */

static enum status decode(struct client *c, struct frame *f, struct error *e,
                          struct wire_msg *out) {
    arena_reset(&c->arena);
    enum status st =
        wire_decode(&f->header, zmq_msg_data(&f->body), f->header.body_bytes, &c->arena, e, out);
    zmq_msg_close(&f->body);
    return st;
}

/* The next frame within the time given (end_ns 0 = only look, UINT64_MAX = for ever).
 * ST_TIMEOUT: none. */
static enum status next_frame(struct client *c, uint64_t end_ns, struct frame *out) {
    for (;;) {
        struct error err;
        enum status st = link_recv(&c->link, &err, out);
        if (st == ST_OK) {
            c->silent_ns = 0;
            c->checked_ns = clock_now_ns();
            return ST_OK;
        }
        if (st == ST_IO) return lose(c, ST_IO, err.text);
        if (st != ST_TIMEOUT) return lose(c, ST_CORRUPT, err.text);
        st = check_silence(c);
        if (st != ST_OK) return st;
        uint64_t now = clock_now_ns();
        if (now >= end_ns) return ST_TIMEOUT;
        link_wait(&c->link, wait_ms(c, now, end_ns));
    }
}

static uint64_t deadline_ns(int timeout_ms) {
    if (timeout_ms < 0) return UINT64_MAX;
    return timeout_ms == 0 ? 0 : clock_now_ns() + (uint64_t)timeout_ms * 1000000u;
}

static bool is_about_request(unsigned type) {
    return type == WIRE_ACCEPTED || type == WIRE_REJECTED || type == WIRE_TOKEN_CHUNK ||
           type == WIRE_FINISHED || type == WIRE_FAILED;
}

/* Answers to a client_call that no longer waits, and notices. */
static bool is_ignored(unsigned type) {
    switch (type) {
    case WIRE_PONG:
    case WIRE_GOAWAY:
    case WIRE_ACK:
    case WIRE_MODEL_INFO_RESULT:
    case WIRE_HEALTH_RESULT:
    case WIRE_STATS_RESULT:
    case WIRE_TOKENIZE_RESULT:
    case WIRE_DETOKENIZE_RESULT: return true;
    default: return false;
    }
}

/* Judge a frame by its header. *deliver: it is about a request; otherwise it was dealt with. */
static enum status sort_frame(struct client *c, struct frame *f, bool *deliver) {
    unsigned type = f->header.type;
    char text[256];
    *deliver = false;
    if (type == WIRE_GOODBYE) {
        struct wire_msg msg;
        if (decode(c, f, NULL, &msg) != ST_OK)
            return lose(c, ST_CORRUPT, "the server sent a Goodbye that cannot be read");
        goodbye_text(&msg.goodbye, text, sizeof text);
        return lose(c, ST_IO, text);
    }
    bool known_id = f->header.request_id > 0 && f->header.request_id < c->next_id;
    if (is_about_request(type) && known_id) {
        *deliver = true;
        return ST_OK;
    }
    zmq_msg_close(&f->body);
    if (is_ignored(type)) return ST_OK;
    snprintf(text, sizeof text,
             "the server sent a message of type %u (%s) about request %llu: not %s", type,
             wire_type_name((enum wire_type)type), (unsigned long long)f->header.request_id,
             is_about_request(type) ? "one of ours" : "a message for clients");
    return lose(c, ST_CORRUPT, text);
}

static enum status hand_out(struct client *c, struct frame *f, struct error *e,
                            struct wire_msg *out) {
    struct error why;
    unsigned type = f->header.type;
    if (decode(c, f, &why, out) != ST_OK) {
        char text[256];
        snprintf(text, sizeof text, "the server sent a %s that cannot be read: %.180s",
                 wire_type_name((enum wire_type)type), why.text);
        lose(c, ST_CORRUPT, text);
        return report_lost(c, e);
    }
    if (type == WIRE_TOKEN_CHUNK && out->chunk.session_seq > c->read_seq) {
        c->read_seq = out->chunk.session_seq;
        return_credit(c);
    }
    return ST_OK;
}

static bool take_kept(struct client *c, struct frame *out) {
    struct kept *k = c->kept_first;
    if (!k) return false;
    *out = k->frame;
    c->kept_first = k->next;
    if (!c->kept_first) c->kept_end = &c->kept_first;
    c->n_kept--;
    free(k);
    return true;
}

enum status client_next(struct client *c, int timeout_ms, struct error *e, struct wire_msg *out) {
    struct frame f;
    if (take_kept(c, &f)) return hand_out(c, &f, e, out);
    if (c->lost != ST_OK) return report_lost(c, e);
    uint64_t end_ns = deadline_ns(timeout_ms);
    for (;;) {
        bool deliver = false;
        enum status st = next_frame(c, end_ns, &f);
        if (st == ST_TIMEOUT) return error_set(e, st, "no message within %d ms", timeout_ms);
        if (st == ST_OK) st = sort_frame(c, &f, &deliver);
        if (st != ST_OK) return report_lost(c, e);
        if (deliver) return hand_out(c, &f, e, out);
    }
}

int client_fd(const struct client *c) { return c->link.epoll_fd; }

/* ---- questions ------------------------------------------------------------------------------- */

static enum status keep(struct client *c, struct frame *f) {
    struct kept *k = c->n_kept < c->max_kept ? malloc(sizeof *k) : NULL;
    if (!k) {
        zmq_msg_close(&f->body);
        return lose(c, ST_CORRUPT, "the server sent more chunks than the credit window allows");
    }
    *k = (struct kept){.frame = *f};
    *c->kept_end = k;
    c->kept_end = &k->next;
    c->n_kept++;
    return ST_OK;
}

/* Is f the answer to the question, one way or another? A Pong is known by its nonce alone. */
static bool is_answer(const struct wire_msg *question, const struct frame *f) {
    unsigned type = f->header.type;
    if (question->type == WIRE_PING && type == WIRE_PONG) return true;
    return f->header.request_id == question->request_id &&
           (type == (unsigned)question->type + 1 || type == WIRE_FAILED || type == WIRE_REJECTED);
}

static enum status answer_error(enum status code, struct bytes text, struct error *e) {
    if (code <= ST_OK || code >= ST_COUNT) code = ST_INTERNAL;
    return error_set(e, code, "%.*s", (int)(text.n < 240 ? text.n : 240), (const char *)text.p);
}

/* ST_OK with *done: *reply is the answer. ST_OK without: it was another Ping's. */
static enum status read_answer(struct client *c, const struct wire_msg *question, struct frame *f,
                               struct error *e, struct wire_msg *reply, bool *done) {
    enum status st = hand_out(c, f, e, reply);
    if (st != ST_OK) return st;
    *done = reply->type != WIRE_PONG || reply->ping.nonce == question->ping.nonce;
    if (reply->type == WIRE_FAILED)
        return answer_error((enum status)reply->failed.code, reply->failed.text, e);
    if (reply->type == WIRE_REJECTED)
        return answer_error((enum status)reply->rejected.code, reply->rejected.text, e);
    return ST_OK;
}

enum status client_call(struct client *c, const struct wire_msg *request, int timeout_ms,
                        struct error *e, struct wire_msg *reply) {
    struct wire_msg question = *request;
    CHECK(question.type == WIRE_PING || is_ignored((unsigned)question.type + 1));
    if (c->lost != ST_OK) return report_lost(c, e);
    question.request_id = c->next_id++;
    uint64_t end_ns = deadline_ns(timeout_ms);
    enum status st = send_msg(c, &question, timeout_ms < 0 ? c->timeout_ms : timeout_ms, e);
    if (st != ST_OK) return st;
    for (;;) {
        struct frame f;
        bool deliver = false, done = false;
        st = next_frame(c, end_ns, &f);
        if (st == ST_TIMEOUT)
            return error_set(e, st, "no answer to %s within %d ms", wire_type_name(question.type),
                             timeout_ms);
        if (st == ST_OK && is_answer(&question, &f)) {
            st = read_answer(c, &question, &f, e, reply, &done);
            if (st != ST_OK || done) return st;
            continue;
        }
        if (st == ST_OK) st = sort_frame(c, &f, &deliver);
        if (st == ST_OK && deliver) st = keep(c, &f);
        if (st != ST_OK) return report_lost(c, e);
    }
}

/* ---- requests -------------------------------------------------------------------------------- */

enum status client_submit(struct client *c, const struct wire_submit *submit, struct error *e,
                          uint64_t *request_id) {
    if (c->lost != ST_OK) return report_lost(c, e);
    struct wire_msg msg = {.type = WIRE_SUBMIT, .request_id = c->next_id, .submit = *submit};
    msg.submit.boot_id = (struct bytes){c->welcome.boot_id, WIRE_ID_BYTES};
    enum status st = send_msg(c, &msg, c->timeout_ms, e);
    if (st == ST_OK) *request_id = c->next_id++;
    return st;
}

enum status client_cancel(struct client *c, uint64_t request_id) {
    if (c->lost != ST_OK) return c->lost;
    if (request_id == 0 || request_id >= c->next_id) return ST_NOT_FOUND;
    struct wire_msg msg = {.type = WIRE_CANCEL, .request_id = request_id};
    return send_msg(c, &msg, c->timeout_ms, NULL);
}

/* ---- opening and closing --------------------------------------------------------------------- */

/* The welcome outlives the frame it came in. */
static enum status keep_welcome(struct client *c, const struct wire_welcome *w, struct error *e) {
    c->welcome_bytes = malloc(w->model.n + w->server.n + 1);
    if (!c->welcome_bytes) return error_set(e, ST_NO_MEMORY, "no memory for the session");
    c->welcome = *w;
    char *p = c->welcome_bytes;
    if (w->model.n > 0) memcpy(p, w->model.p, w->model.n);
    if (w->server.n > 0) memcpy(p + w->model.n, w->server.p, w->server.n);
    c->welcome.model.p = (const uint8_t *)p;
    c->welcome.server.p = (const uint8_t *)p + w->model.n;

    const struct wire_limits *l = &c->welcome.limits;
    c->max_kept = (size_t)l->credit_window + 3 * (size_t)l->max_inflight + 64;
    uint32_t heartbeat_ms = w->heartbeat_ms > 0 ? w->heartbeat_ms : DEFAULT_HEARTBEAT_MS;
    c->heartbeat_ns = (uint64_t)heartbeat_ms * 1000000u;
    return ST_OK;
}

static enum status unsupported(const struct wire_goodbye *g, struct error *e) {
    char list[128] = "";
    size_t n = 0;
    for (size_t i = 0; i < g->n_majors && n + 16 < sizeof list; i++)
        n += (size_t)snprintf(list + n, sizeof list - n, "%s%u", i ? ", " : "", g->majors[i]);
    return error_set(
        e, ST_UNSUPPORTED,
        "the server speaks protocol version %s and this client version %d: update the older",
        n ? list : "?", WIRE_MAJOR);
}

/* What came in answer to Hello. */
static enum status read_welcome(struct client *c, struct frame *f, struct error *e) {
    struct wire_msg msg;
    unsigned type = f->header.type;
    if (type != WIRE_WELCOME && type != WIRE_GOODBYE) {
        zmq_msg_close(&f->body);
        return error_set(e, ST_CORRUPT, "the server answered Hello with a message of type %u",
                         type);
    }
    if (decode(c, f, e, &msg) != ST_OK)
        return error_set(e, ST_CORRUPT, "the server's answer to Hello cannot be read");
    if (type == WIRE_GOODBYE) {
        if (msg.goodbye.code == ST_UNSUPPORTED) return unsupported(&msg.goodbye, e);
        char text[256];
        goodbye_text(&msg.goodbye, text, sizeof text);
        return error_set(e, ST_IO, "%s", text);
    }
    if (msg.welcome.major != WIRE_MAJOR)
        return unsupported(&(struct wire_goodbye){.majors = &msg.welcome.major, .n_majors = 1}, e);
    return keep_welcome(c, &msg.welcome, e);
}

static enum status shake_hands(struct client *c, const struct client_options *o,
                               const char *endpoint, struct error *e) {
    uint64_t end_ns = clock_now_ns() + (uint64_t)c->timeout_ms * 1000000u;
    static const uint32_t majors[] = {WIRE_MAJOR};
    const char *name = o->name ? o->name : "client";
    struct wire_msg hello = {.type = WIRE_HELLO,
                             .hello = {.majors = majors,
                                       .n_majors = 1,
                                       .client = {(const uint8_t *)name, strlen(name)}}};
    enum status st = send_msg(c, &hello, c->timeout_ms, e);
    if (st != ST_OK) return st;
    for (;;) {
        struct frame f;
        st = link_recv(&c->link, e, &f);
        if (st == ST_OK) return read_welcome(c, &f, e);
        if (st == ST_UNSUPPORTED)
            return error_set(e, st, "the server speaks another protocol version than %d",
                             WIRE_MAJOR);
        if (st != ST_TIMEOUT) return st;
        uint64_t now = clock_now_ns();
        if (now >= end_ns) break;
        link_wait(&c->link, (int)((end_ns - now) / 1000000u) + 1);
    }
    return error_set(e, ST_TIMEOUT,
                     c->link.connected
                         ? "%s took the connection but did not answer within %d ms"
                         : "nobody answers at %s within %d ms: is the daemon running?",
                     endpoint, c->timeout_ms);
}

enum status client_open(const struct client_options *o, struct error *e, struct client **out) {
    char endpoint[512];
    if (o->endpoint)
        snprintf(endpoint, sizeof endpoint, "%s", o->endpoint);
    else
        client_default_endpoint(endpoint, sizeof endpoint);
    struct client *c = calloc(1, sizeof *c);
    if (!c) return error_set(e, ST_NO_MEMORY, "no memory for the session");
    c->timeout_ms = o->timeout_ms > 0 ? o->timeout_ms : DEFAULT_TIMEOUT_MS;
    c->next_id = 1;
    c->kept_end = &c->kept_first;
    random_bytes(&c->nonce, sizeof c->nonce);
    enum status st = link_open(&c->link, endpoint, e);
    if (st == ST_OK) {
        st = arena_create(WIRE_ARENA_BYTES, &c->arena);
        if (st == ST_OK) st = arena_create(WIRE_ARENA_BYTES + WIRE_MAX_BODY_BYTES, &c->scratch);
        if (st != ST_OK) error_set(e, st, "no memory for the session");
    }
    if (st == ST_OK) st = shake_hands(c, o, endpoint, e);
    if (st != ST_OK) {
        lose(c, st, "not open");
        client_close(c);
        return st;
    }
    c->checked_ns = clock_now_ns();
    link_set_timer(&c->link, c->checked_ns + c->heartbeat_ns / 2);
    *out = c;
    return ST_OK;
}

void client_close(struct client *c) {
    if (!c) return;
    struct wire_msg bye = {.type = WIRE_BYE};
    bool said_bye = c->lost == ST_OK && send_if_room(c, &bye);
    struct frame f;
    while (take_kept(c, &f)) zmq_msg_close(&f.body);
    link_close(&c->link, said_bye ? BYE_LINGER_MS : 0);
    arena_destroy(&c->arena);
    arena_destroy(&c->scratch);
    free(c->welcome_bytes);
    free(c);
}

const struct wire_welcome *client_welcome(const struct client *c) { return &c->welcome; }
