/* See fake_server.h. Everything below fake_start runs on the server's thread; the counts are
 * read under a lock. */
#include "tests/fake_server.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "proto/wire.h"

enum {
    MAX_SESSIONS = 64,
    MAX_REQUESTS = 4096,
    MAX_ANSWER = 8192,
    DEFAULT_TOKENS = 16,
    EOS = 0x110000,
    N_VOCAB = 0x110001
};

struct session {
    uint8_t id[64];
    size_t n_id;
    uint64_t sent_seq, credit_seq;
    int n_running;
};

/* One choice of a request being answered. Choices of a request end in order of their index. */
struct running {
    int session;
    uint64_t request_id;
    uint32_t choice, n_choices;
    struct wire_choice
        *done; /* [n_choices], shared by the request's choices; the last one frees it */
    int32_t *ids;
    int n_ids, n_sent;
    uint32_t seq, n_prompt, top_logprobs;
    uint64_t hash;
    bool logprobs, at_length;
};

struct fake {
    struct fake_options o;
    char endpoint[128];
    pthread_t thread;
    pthread_mutex_t lock;
    struct fake_counts counts;
    atomic_bool stop;
    void *ctx, *sock;
    struct arena arena, scratch;
    struct session sessions[MAX_SESSIONS];
    int n_sessions;
    struct running running[MAX_REQUESTS];
    int n_running;
    uint8_t boot_id[WIRE_ID_BYTES];
    int n_chunks; /* sent or withheld, all sessions */
    bool failed_once, mute, dead;
};

#define COUNT(f, member, n)                                                                        \
    do {                                                                                           \
        pthread_mutex_lock(&(f)->lock);                                                            \
        (f)->counts.member += (n);                                                                 \
        pthread_mutex_unlock(&(f)->lock);                                                          \
    } while (0)

#define COUNT_MAX(f, member, n)                                                                    \
    do {                                                                                           \
        pthread_mutex_lock(&(f)->lock);                                                            \
        if ((f)->counts.member < (n)) (f)->counts.member = (n);                                    \
        pthread_mutex_unlock(&(f)->lock);                                                          \
    } while (0)

/* ---- UTF-8 ----------------------------------------------------------------------------------- */

static size_t put_char(int32_t id, char *dst) {
    uint32_t c = (uint32_t)id;
    if (id < 0 || id >= 0x110000) return 0;
    if (c < 0x80) {
        dst[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = n - 1; i > 0; i--, c >>= 6) dst[i] = (char)(0x80 | (c & 0x3F));
    dst[0] = (char)(lead[n] | c);
    return n;
}

static int get_chars(const char *s, size_t n, int32_t *ids, int cap) {
    int count = 0;
    for (size_t i = 0; i < n && count < cap;) {
        uint8_t c = (uint8_t)s[i];
        size_t len = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
        uint32_t v = len == 1 ? c : c & (0x7Fu >> len);
        for (size_t k = 1; k < len; k++) v = v << 6 | ((uint8_t)s[i + k] & 0x3F);
        ids[count++] = (int32_t)v;
        i += len;
    }
    return count;
}

/* ---- sending --------------------------------------------------------------------------------- */

static void send_parts(struct fake *f, int session, const uint8_t *header, const void *body,
                       size_t n) {
    struct session *s = &f->sessions[session];
    if (f->mute) return;
    bool one =
        f->o.fault == FAKE_ONE_PART && header[6] == WIRE_TOKEN_CHUNK && f->n_chunks == f->o.at;
    bool three =
        f->o.fault == FAKE_THREE_PARTS && header[6] == WIRE_TOKEN_CHUNK && f->n_chunks == f->o.at;
    if (zmq_send(f->sock, s->id, s->n_id, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0) return; /* it left */
    zmq_send(f->sock, header, WIRE_HEADER_BYTES, ZMQ_DONTWAIT | (one ? 0 : ZMQ_SNDMORE));
    if (!one) zmq_send(f->sock, body, n, ZMQ_DONTWAIT | (three ? ZMQ_SNDMORE : 0));
    if (three) zmq_send(f->sock, "more", 4, ZMQ_DONTWAIT);
}

static void spoil(struct fake *f, uint8_t *header, uint8_t *body, size_t *n) {
    if (header[6] == WIRE_WELCOME && f->o.fault == FAKE_OTHER_HEADER) header[4] = 2;
    if (header[6] != WIRE_TOKEN_CHUNK || f->n_chunks != f->o.at) return;
    switch (f->o.fault) {
    case FAKE_BAD_MAGIC: header[0] = 'X'; break;
    case FAKE_BAD_BODY: memset(body, 0xFF, *n); break;
    case FAKE_LONG_BODY: body[(*n)++] = 0; break;
    case FAKE_STRANGE_ID: header[16] = 0xEE; break;
    case FAKE_CLIENT_TYPE: header[6] = WIRE_SUBMIT; break;
    default: break;
    }
}

static void send_msg(struct fake *f, int session, const struct wire_msg *msg) {
    size_t n = 0, cap = WIRE_MAX_BODY_BYTES;
    arena_reset(&f->scratch);
    uint8_t *body = arena_alloc(&f->scratch, cap + 1), header[WIRE_HEADER_BYTES];
    CHECK(wire_encode(msg, &f->scratch, body, cap, &n) == ST_OK);
    struct wire_header h = {.major = WIRE_MAJOR,
                            .minor = WIRE_MINOR,
                            .type = (uint16_t)msg->type,
                            .body_bytes = (uint32_t)n,
                            .request_id = msg->request_id};
    wire_header_encode(&h, header);
    spoil(f, header, body, &n);
    send_parts(f, session, header, body, n);
}

static struct bytes str(const char *s) { return (struct bytes){(const uint8_t *)s, strlen(s)}; }

static void send_goodbye(struct fake *f, int session, enum status code, const char *text) {
    static const uint32_t majors[] = {2, 3};
    struct wire_msg msg = {.type = WIRE_GOODBYE, .goodbye = {.code = code, .text = str(text)}};
    if (code == ST_UNSUPPORTED) {
        msg.goodbye.majors = majors;
        msg.goodbye.n_majors = 2;
    }
    send_msg(f, session, &msg);
}

/* ---- answers --------------------------------------------------------------------------------- */

static size_t add_bytes(char *dst, size_t cap, size_t n, const char *key, struct bytes b) {
    n += (size_t)snprintf(dst + n, cap - n, " %s=%.*s", key, (int)b.n, (const char *)b.p);
    return n;
}

static size_t render_submit(const struct wire_submit *s, char *dst, size_t cap) {
    const struct wire_sampling *p = &s->sampling;
    size_t n = (size_t)snprintf(
        dst, cap,
        "temperature=%g top_k=%u top_p=%g min_p=%g repetition=%g presence=%g frequency=%g "
        "logprobs=%d top_logprobs=%u max_tokens=%u min_tokens=%u ignore_eos=%d priority=%u "
        "ttl_ms=%u "
        "n=%u parse_special=%d",
        p->temperature, p->top_k, p->top_p, p->min_p, p->repetition_penalty, p->presence_penalty,
        p->frequency_penalty, p->logprobs, p->top_logprobs, s->has_max_tokens ? s->max_tokens : 0,
        s->min_tokens, s->ignore_eos, s->priority, s->ttl_ms, s->n, s->parse_special);
    if (p->has_seed)
        n += (size_t)snprintf(dst + n, cap - n, " seed=%llu", (unsigned long long)p->seed);
    for (size_t i = 0; i < p->n_bias; i++)
        n += (size_t)snprintf(dst + n, cap - n, " bias=%d:%g", p->bias[i].token, p->bias[i].bias);
    for (size_t i = 0; i < s->n_stop; i++) n = add_bytes(dst, cap, n, "stop", s->stop[i]);
    for (size_t i = 0; i < s->n_stop_ids; i++)
        n += (size_t)snprintf(dst + n, cap - n, " stop_id=%d", s->stop_ids[i]);
    for (size_t i = 0; i < s->n_messages; i++) {
        n = add_bytes(dst, cap, n, "role", s->messages[i].role);
        n = add_bytes(dst, cap, n, "content", s->messages[i].content);
    }
    return n;
}

static int answer_ids_prompt(struct fake *f, const struct wire_submit *s, int32_t *ids) {
    uint32_t sum = 0;
    for (size_t i = 0; i < s->n_prompt_ids; i++) sum += (uint32_t)s->prompt_ids[i];
    if (f->o.fault == FAKE_UNSTABLE) sum += (uint32_t)f->counts.submits;
    int n = s->has_max_tokens ? (int)s->max_tokens : DEFAULT_TOKENS;
    if (n > MAX_ANSWER) n = MAX_ANSWER;
    for (int i = 0; i < n; i++) ids[i] = 'a' + (int32_t)((sum + (uint32_t)i) % 26);
    return n;
}

/* The whole answer of one choice, before max_tokens. */
static int answer(struct fake *f, const struct wire_submit *s, uint32_t choice, int32_t *ids) {
    static char text[MAX_ANSWER];
    int n;
    if (s->n_prompt_ids > 0) {
        n = answer_ids_prompt(f, s, ids);
    } else {
        struct bytes p =
            s->n_messages > 0 ? s->messages[s->n_messages - 1].content : s->prompt_text;
        size_t len;
        if (p.n >= 7 && memcmp(p.p, "!submit", 7) == 0)
            len = render_submit(s, text, sizeof text);
        else
            len = (size_t)snprintf(text, sizeof text, "echo: %.*s", (int)(p.n < 4000 ? p.n : 4000),
                                   (const char *)p.p);
        n = get_chars(text, len, ids, MAX_ANSWER);
    }
    if (choice > 0) {
        int len = snprintf(text, sizeof text, " #%u", choice);
        n += get_chars(text, (size_t)len, ids + n, MAX_ANSWER - n);
    }
    while (n < f->o.answer_tokens && n < MAX_ANSWER) ids[n++] = '.';
    return n;
}

static void start_choice(struct fake *f, int session, uint64_t id, const struct wire_submit *s,
                         uint32_t choice, struct wire_choice *done) {
    static int32_t ids[MAX_ANSWER];
    int n = answer(f, s, choice, ids);
    bool at_length = s->has_max_tokens && (uint32_t)n >= s->max_tokens;
    if (at_length) n = (int)s->max_tokens;
    CHECK(f->n_running < MAX_REQUESTS);
    struct running *r = &f->running[f->n_running++];
    *r = (struct running){.session = session,
                          .request_id = id,
                          .choice = choice,
                          .n_choices = s->n,
                          .done = done,
                          .n_ids = n,
                          .hash = WIRE_HASH_START,
                          .logprobs = s->sampling.logprobs || s->sampling.top_logprobs > 0,
                          .top_logprobs = s->sampling.top_logprobs,
                          .at_length = at_length,
                          .n_prompt =
                              (uint32_t)(s->n_prompt_ids + s->prompt_text.n + s->n_messages)};
    r->ids = malloc(((size_t)n + 1) * sizeof *r->ids);
    CHECK(r->ids);
    memcpy(r->ids, ids, (size_t)n * sizeof *r->ids);
    for (int i = 0; i < n; i++) r->hash = wire_hash_id(r->hash, ids[i]);
}

/* ---- running requests ------------------------------------------------------------------------ */

static void remove_running(struct fake *f, int i) {
    struct running *r = &f->running[i];
    free(r->ids);
    if (r->choice + 1 == r->n_choices) free(r->done);
    memmove(&f->running[i], &f->running[i + 1],
            (size_t)(f->n_running - i - 1) * sizeof f->running[0]);
    f->n_running--;
}

static void finish_choice(struct fake *f, const struct running *r, enum wire_reason reason) {
    struct wire_choice *c = &r->done[r->choice];
    *c = (struct wire_choice){.index = r->choice,
                              .reason = reason,
                              .completion_tokens = (uint32_t)r->n_sent,
                              .last_seq = r->seq,
                              .hash = r->hash};
    if (reason == REASON_STOP) {
        c->has_stop_id = true;
        c->stop_id = EOS;
    }
    if (f->o.fault == FAKE_BAD_HASH) c->hash++;
    if (r->choice + 1 < r->n_choices) return;
    struct wire_msg msg = {.type = WIRE_FINISHED,
                           .request_id = r->request_id,
                           .finished = {.choices = r->done,
                                        .n_choices = r->n_choices,
                                        .prompt_tokens = r->n_prompt,
                                        .queue_ms = 1,
                                        .prefill_ms = 2,
                                        .decode_ms = 3}};
    for (uint32_t i = 0; i < r->n_choices; i++)
        msg.finished.completion_tokens += r->done[i].completion_tokens;
    send_msg(f, r->session, &msg);
    f->sessions[r->session].n_running--;
    COUNT(f, finished, 1);
}

static void fail_request(struct fake *f, const struct running *r, enum status code,
                         bool retryable) {
    struct wire_msg msg = {
        .type = WIRE_FAILED,
        .request_id = r->request_id,
        .failed = {.code = code, .text = str("made to fail"), .retryable = retryable}};
    send_msg(f, r->session, &msg);
    f->sessions[r->session].n_running--;
}

static void send_chunk(struct fake *f, struct running *r) {
    static struct wire_token_logprob logprobs[MAX_ANSWER];
    static struct wire_top_logprob top[WIRE_MAX_TOP_LOGPROBS];
    static char text[4 * MAX_ANSWER];
    int n = f->o.tokens_per_chunk;
    if (n > r->n_ids - r->n_sent) n = r->n_ids - r->n_sent;
    size_t len = 0;
    for (int i = 0; i < n; i++) len += put_char(r->ids[r->n_sent + i], text + len);
    for (uint32_t i = 0; i < r->top_logprobs; i++)
        top[i] = (struct wire_top_logprob){.token = 'A' + (int32_t)i, .logprob = -1.0f - (float)i};
    for (int i = 0; i < n; i++)
        logprobs[i] = (struct wire_token_logprob){.logprob = -0.125f * (float)((r->n_sent + i) % 8),
                                                  .top = top,
                                                  .n_top = r->top_logprobs};
    struct session *s = &f->sessions[r->session];
    struct wire_msg msg = {.type = WIRE_TOKEN_CHUNK,
                           .request_id = r->request_id,
                           .chunk = {.choice = r->choice,
                                     .seq = r->seq++,
                                     .ids = r->ids + r->n_sent,
                                     .n_ids = (size_t)n,
                                     .text = {(const uint8_t *)text, len},
                                     .logprobs = logprobs,
                                     .n_logprobs = r->logprobs ? (size_t)n : 0,
                                     .session_seq = ++s->sent_seq}};
    bool left_out = f->o.fault == FAKE_GAP && f->n_chunks == f->o.at;
    if (!left_out) send_msg(f, r->session, &msg);
    r->n_sent += n;
    f->n_chunks++;
    COUNT(f, chunks, 1);
    COUNT_MAX(f, max_unacked, (int)(s->sent_seq - s->credit_seq));
}

/* What happens instead of the next chunk; true if something did. */
static bool fault_before_chunk(struct fake *f, struct running *r, bool *gone) {
    *gone = false;
    if (f->n_chunks != f->o.at) return false;
    switch (f->o.fault) {
    case FAKE_HANG: return f->mute = true;
    case FAKE_DIE: return f->dead = true;
    case FAKE_GOODBYE:
        send_goodbye(f, r->session, ST_DRAINING, "shutting down");
        return f->mute = true;
    case FAKE_FAIL:
        if (f->failed_once) return false;
        f->failed_once = true;
        fail_request(f, r, ST_ENGINE_LOST, true);
        return *gone = true;
    default: return false;
    }
}

/* One chunk, or the end, for every running choice. True if any was sent. */
static bool advance(struct fake *f) {
    bool any = false;
    for (int i = 0; i < f->n_running && !f->dead && !f->mute;) {
        struct running *r = &f->running[i];
        struct session *s = &f->sessions[r->session];
        bool open =
            s->sent_seq - s->credit_seq < f->o.credit_window || f->o.fault == FAKE_NO_WINDOW;
        if (r->n_sent == r->n_ids) {
            finish_choice(f, r, r->at_length ? REASON_LENGTH : REASON_STOP);
            remove_running(f, i);
            any = true;
            continue;
        }
        /* Choices of one request are answered one after the other: the first of them holds the
         * rest up. */
        bool first = i == 0 || f->running[i - 1].request_id != r->request_id ||
                     f->running[i - 1].session != r->session;
        bool gone = false;
        if (open && first) {
            if (fault_before_chunk(f, r, &gone))
                any = true;
            else
                send_chunk(f, r);
            any = true;
        }
        if (gone)
            remove_running(f, i);
        else
            i++;
    }
    return any;
}

/* ---- receiving ------------------------------------------------------------------------------- */

static void on_hello(struct fake *f, int session) {
    switch (f->o.fault) {
    case FAKE_SILENT: return;
    case FAKE_OTHER_MAJOR: send_goodbye(f, session, ST_UNSUPPORTED, "no common version"); return;
    case FAKE_DENY: send_goodbye(f, session, ST_DENIED, "not you"); return;
    case FAKE_NOT_WELCOME: send_msg(f, session, &(struct wire_msg){.type = WIRE_ACK}); return;
    default: break;
    }
    COUNT(f, sessions, 1);
    struct wire_msg msg = {.type = WIRE_WELCOME,
                           .welcome = {.major = f->o.fault == FAKE_NEW_WELCOME ? 2 : WIRE_MAJOR,
                                       .minor = WIRE_MINOR,
                                       .limits = {.max_frame_bytes = f->o.max_frame_bytes,
                                                  .max_inflight = f->o.max_inflight,
                                                  .credit_window = f->o.credit_window,
                                                  .max_context_tokens = MAX_ANSWER,
                                                  .max_stops = WIRE_MAX_STOPS,
                                                  .max_choices = WIRE_MAX_CHOICES},
                                       .heartbeat_ms = f->o.heartbeat_ms,
                                       .model = str("fake"),
                                       .server = str("fake 1")}};
    memcpy(msg.welcome.boot_id, f->boot_id, WIRE_ID_BYTES);
    memset(msg.welcome.session, session + 1, WIRE_ID_BYTES);
    send_msg(f, session, &msg);
}

static void reject(struct fake *f, int session, uint64_t id, enum status code, bool retryable) {
    struct wire_msg msg = {.type = WIRE_REJECTED,
                           .request_id = id,
                           .rejected = {.code = code,
                                        .text = str("made to reject"),
                                        .retryable = retryable,
                                        .retry_after_ms = 5,
                                        .queue_depth = 7}};
    send_msg(f, session, &msg);
    COUNT(f, rejected, 1);
}

static void on_submit(struct fake *f, int session, const struct wire_msg *m) {
    const struct wire_submit *s = &m->submit;
    struct session *owner = &f->sessions[session];
    COUNT(f, submits, 1);
    if (s->boot_id.n != WIRE_ID_BYTES || memcmp(s->boot_id.p, f->boot_id, WIRE_ID_BYTES) != 0)
        COUNT(f, bad_boot_ids, 1);
    if (f->o.fault == FAKE_REJECT && f->counts.rejected < f->o.at) {
        reject(f, session, m->request_id, ST_OVERLOADED, true);
        return;
    }
    if (owner->n_running >= (int)f->o.max_inflight) {
        reject(f, session, m->request_id, ST_QUOTA, true);
        return;
    }
    struct bytes p = s->n_messages > 0 ? s->messages[s->n_messages - 1].content : s->prompt_text;
    owner->n_running++;
    COUNT_MAX(f, max_running, owner->n_running);
    struct wire_msg ok = {.type = WIRE_ACCEPTED,
                          .request_id = m->request_id,
                          .accepted = {.prompt_tokens = (uint32_t)(s->n_prompt_ids + p.n)}};
    send_msg(f, session, &ok);
    if (p.n >= 5 && memcmp(p.p, "!fail", 5) == 0) {
        fail_request(f, &(struct running){.session = session, .request_id = m->request_id},
                     ST_NUMERIC, false);
        return;
    }
    struct wire_choice *done = calloc(s->n, sizeof *done);
    CHECK(done);
    for (uint32_t c = 0; c < s->n; c++) start_choice(f, session, m->request_id, s, c, done);
}

static void on_cancel(struct fake *f, int session, uint64_t id) {
    COUNT(f, cancelled, 1);
    bool any = false;
    for (int i = 0; i < f->n_running;) {
        struct running *r = &f->running[i];
        if (r->session != session || r->request_id != id) {
            i++;
            continue;
        }
        any = true;
        r->hash = WIRE_HASH_START;
        for (int k = 0; k < r->n_sent; k++) r->hash = wire_hash_id(r->hash, r->ids[k]);
        finish_choice(f, r, REASON_CANCELLED);
        remove_running(f, i);
    }
    if (!any) send_msg(f, session, &(struct wire_msg){.type = WIRE_ACK, .request_id = id});
}

static void drop_session(struct fake *f, int session) {
    for (int i = 0; i < f->n_running;) {
        if (f->running[i].session == session)
            remove_running(f, i);
        else
            i++;
    }
    f->sessions[session].n_running = 0;
}

static void answer_stats(struct fake *f, struct wire_msg *reply) {
    static struct wire_counter counters[3];
    counters[0] = (struct wire_counter){str("requests_total"), f->counts.submits};
    counters[1] = (struct wire_counter){str("expert_reads"), 250};
    counters[2] = (struct wire_counter){str("expert_reads_ungrouped"), 1000};
    reply->stats = (struct wire_stats){counters, 3};
}

static void on_question(struct fake *f, int session, const struct wire_msg *m) {
    static int32_t ids[MAX_ANSWER];
    static char text[4 * MAX_ANSWER];
    struct wire_msg reply = {.type = (enum wire_type)(m->type + 1), .request_id = m->request_id};
    struct bytes p = {0};
    size_t n = 0;
    if (f->o.fault == FAKE_DEAF) return;
    switch (m->type) {
    case WIRE_MODEL_INFO:
        reply.model_info = (struct wire_model_info){.name = str("fake"),
                                                    .architecture = str("echo"),
                                                    .backend = str("none"),
                                                    .quantization = str("Q4_K"),
                                                    .n_layers = 1,
                                                    .n_vocab = N_VOCAB,
                                                    .n_experts = 4,
                                                    .n_experts_used = 2,
                                                    .max_context_tokens = MAX_ANSWER,
                                                    .weight_bytes = 1 << 20,
                                                    .kv_bytes_per_token = 1024,
                                                    .eos_id = EOS};
        break;
    case WIRE_HEALTH:
        reply.health = (struct wire_health){.live = true, .ready = true, .uptime_ms = 1000};
        break;
    case WIRE_STATS: answer_stats(f, &reply); break;
    case WIRE_TOKENIZE:
        p = m->tokenize.n_messages > 0 ? m->tokenize.messages[0].content : m->tokenize.text;
        reply.ids.ids = ids;
        reply.ids.n_ids = (size_t)get_chars((const char *)p.p, p.n, ids, MAX_ANSWER);
        break;
    case WIRE_DETOKENIZE:
        for (size_t i = 0; i < m->ids.n_ids && i < MAX_ANSWER; i++)
            n += put_char(m->ids.ids[i], text + n);
        reply.text.text = (struct bytes){(const uint8_t *)text, n};
        break;
    default: return;
    }
    send_msg(f, session, &reply);
}

static void on_message(struct fake *f, int session, const struct wire_msg *m) {
    switch (m->type) {
    case WIRE_HELLO: on_hello(f, session); break;
    case WIRE_PING:
        COUNT(f, pings, 1);
        if (f->o.fault == FAKE_STRAY_PONG)
            send_msg(f, session,
                     &(struct wire_msg){.type = WIRE_PONG, .ping = {.nonce = m->ping.nonce + 1}});
        send_msg(f, session, &(struct wire_msg){.type = WIRE_PONG, .ping = m->ping});
        break;
    case WIRE_BYE:
        COUNT(f, byes, 1);
        drop_session(f, session);
        break;
    case WIRE_SUBMIT: on_submit(f, session, m); break;
    case WIRE_CANCEL: on_cancel(f, session, m->request_id); break;
    case WIRE_CREDIT:
        COUNT(f, credits, 1);
        f->sessions[session].credit_seq = m->credit.session_seq;
        break;
    default: on_question(f, session, m); break;
    }
}

static int find_session(struct fake *f, const uint8_t *id, size_t n) {
    for (int i = 0; i < f->n_sessions; i++)
        if (f->sessions[i].n_id == n && memcmp(f->sessions[i].id, id, n) == 0) return i;
    CHECK(f->n_sessions < MAX_SESSIONS && n <= sizeof f->sessions[0].id);
    struct session *s = &f->sessions[f->n_sessions];
    *s = (struct session){.n_id = n};
    memcpy(s->id, id, n);
    return f->n_sessions++;
}

static bool receive(struct fake *f) {
    static uint8_t body[WIRE_MAX_BODY_BYTES];
    uint8_t id[64], header[WIRE_HEADER_BYTES];
    int n_id = zmq_recv(f->sock, id, sizeof id, ZMQ_DONTWAIT);
    if (n_id < 0) return false;
    int n_header = zmq_recv(f->sock, header, sizeof header, ZMQ_DONTWAIT);
    int n_body = zmq_recv(f->sock, body, sizeof body, ZMQ_DONTWAIT);
    CHECK(n_header == WIRE_HEADER_BYTES && n_body >= 0);
    struct wire_header h;
    struct wire_msg msg;
    struct error e;
    arena_reset(&f->arena);
    CHECK(wire_header_decode(header, sizeof header, &e, &h) == ST_OK);
    if (wire_decode(&h, body, (size_t)n_body, &f->arena, &e, &msg) != ST_OK) {
        fprintf(stderr, "fake_server: a %s was refused: %s\n", wire_type_name(h.type), e.text);
        reject(f, find_session(f, id, (size_t)n_id), h.request_id, ST_INVALID, false);
        return true;
    }
    msg.request_id = h.request_id;
    on_message(f, find_session(f, id, (size_t)n_id), &msg);
    return true;
}

static void *serve(void *arg) {
    struct fake *f = arg;
    while (!atomic_load(&f->stop)) {
        bool any = false;
        if (f->dead && f->sock) {
            zmq_close(f->sock);
            f->sock = NULL;
        }
        if (f->sock && !f->mute) {
            while (receive(f)) any = true;
            if (advance(f)) {
                any = true;
                if (f->o.chunk_us > 0) usleep((useconds_t)f->o.chunk_us);
            }
        }
        zmq_pollitem_t item = {.socket = f->sock, .events = ZMQ_POLLIN};
        if (!any && f->sock && !f->mute)
            zmq_poll(&item, 1, 20);
        else if (!any)
            usleep(5000);
    }
    return NULL;
}

/* ---- from another thread --------------------------------------------------------------------- */

struct fake *fake_start(const struct fake_options *o) {
    static atomic_int n_started;
    struct fake *f = calloc(1, sizeof *f);
    CHECK(f);
    f->o = *o;
    if (f->o.max_inflight == 0) f->o.max_inflight = 8;
    if (f->o.credit_window == 0) f->o.credit_window = 16;
    if (f->o.max_frame_bytes == 0) f->o.max_frame_bytes = WIRE_MAX_BODY_BYTES;
    if (f->o.heartbeat_ms == 0) f->o.heartbeat_ms = 1000;
    if (f->o.tokens_per_chunk == 0) f->o.tokens_per_chunk = 4;
    if (o->endpoint)
        snprintf(f->endpoint, sizeof f->endpoint, "%s", o->endpoint);
    else
        snprintf(f->endpoint, sizeof f->endpoint, "ipc:///tmp/moed-fake-%d-%d", (int)getpid(),
                 atomic_fetch_add(&n_started, 1));
    random_bytes(f->boot_id, sizeof f->boot_id);
    pthread_mutex_init(&f->lock, NULL);
    CHECK(arena_create(WIRE_ARENA_BYTES, &f->arena) == ST_OK);
    CHECK(arena_create(WIRE_ARENA_BYTES + WIRE_MAX_BODY_BYTES, &f->scratch) == ST_OK);
    f->ctx = zmq_ctx_new();
    f->sock = zmq_socket(f->ctx, ZMQ_ROUTER);
    int mandatory = 1, linger = 100, hwm = 100000;
    zmq_setsockopt(f->sock, ZMQ_ROUTER_MANDATORY, &mandatory, sizeof mandatory);
    zmq_setsockopt(f->sock, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(f->sock, ZMQ_SNDHWM, &hwm, sizeof hwm);
    if (zmq_bind(f->sock, f->endpoint) != 0) {
        fprintf(stderr, "fake_server: bind %s: %s\n", f->endpoint, zmq_strerror(zmq_errno()));
        abort();
    }
    CHECK(pthread_create(&f->thread, NULL, serve, f) == 0);
    return f;
}

const char *fake_endpoint(const struct fake *f) { return f->endpoint; }

struct fake_counts fake_counts(struct fake *f) {
    pthread_mutex_lock(&f->lock);
    struct fake_counts c = f->counts;
    pthread_mutex_unlock(&f->lock);
    return c;
}

struct fake_counts fake_stop(struct fake *f) {
    atomic_store(&f->stop, true);
    pthread_join(f->thread, NULL);
    if (f->sock) zmq_close(f->sock);
    zmq_ctx_term(f->ctx);
    while (f->n_running > 0) remove_running(f, 0);
    arena_destroy(&f->arena);
    arena_destroy(&f->scratch);
    pthread_mutex_destroy(&f->lock);
    struct fake_counts c = f->counts;
    free(f);
    return c;
}
