/* The client library against a server that misbehaves: what each function returns, in which
 * order messages come, and that nothing of the protocol's upkeep (credit, Ping, boot_id) is left
 * to the caller. */
#include "tests/support.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/lib/client.h"
#include "tests/fake_server.h"

enum { PATIENCE_MS = 20000 }; /* for what must come: the test fails by value, not by time */

static struct bytes str(const char *s) { return (struct bytes){(const uint8_t *)s, strlen(s)}; }

static void must(enum status st, const struct error *e) { assert_ok(st, e); }

static struct client *open_client(const char *endpoint) {
    struct error e;
    struct client *c = NULL;
    struct client_options o = {.endpoint = endpoint, .name = "test", .timeout_ms = PATIENCE_MS};
    must(client_open(&o, &e, &c), &e);
    return c;
}

static struct wire_submit text_submit(const char *prompt) {
    return (struct wire_submit){.prompt_text = str(prompt),
                                .sampling = {.temperature = 0, .top_p = 1, .repetition_penalty = 1},
                                .priority = 1,
                                .n = 1};
}

static uint64_t submit(struct client *c, const char *prompt) {
    struct wire_submit s = text_submit(prompt);
    struct error e;
    uint64_t id = 0;
    must(client_submit(c, &s, &e, &id), &e);
    return id;
}

static struct wire_msg next(struct client *c) {
    struct error e;
    struct wire_msg m;
    must(client_next(c, PATIENCE_MS, &e, &m), &e);
    return m;
}

/* Read one request to its end; its text in dst. Other requests' messages fail the test. */
static struct wire_choice read_answer(struct client *c, uint64_t id, char *dst, size_t cap) {
    size_t n = 0;
    uint32_t seq = 0;
    uint64_t hash = WIRE_HASH_START;
    assert_int_equal(next(c).type, WIRE_ACCEPTED);
    for (;;) {
        struct wire_msg m = next(c);
        assert_int_equal(m.request_id, id);
        if (m.type == WIRE_FINISHED) {
            assert_int_equal(m.finished.n_choices, 1);
            assert_true(m.finished.choices[0].hash == hash);
            dst[n] = 0;
            return m.finished.choices[0];
        }
        assert_int_equal(m.type, WIRE_TOKEN_CHUNK);
        assert_int_equal(m.chunk.seq, seq++);
        assert_true(n + m.chunk.text.n < cap);
        memcpy(dst + n, m.chunk.text.p, m.chunk.text.n);
        n += m.chunk.text.n;
        for (size_t i = 0; i < m.chunk.n_ids; i++) hash = wire_hash_id(hash, m.chunk.ids[i]);
    }
}

/* Messages until the session ends; how it ended. */
static enum status read_to_end(struct client *c, struct error *e, int *n_chunks) {
    struct wire_msg m;
    enum status st;
    *n_chunks = 0;
    while ((st = client_next(c, PATIENCE_MS, e, &m)) == ST_OK)
        if (m.type == WIRE_TOKEN_CHUNK) ++*n_chunks;
    return st;
}

/* ---- opening --------------------------------------------------------------------------------- */

static void test_welcome(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.max_inflight = 5, .credit_window = 9});
    struct client *c = open_client(fake_endpoint(f));
    const struct wire_welcome *w = client_welcome(c);
    assert_int_equal(w->limits.max_inflight, 5);
    assert_int_equal(w->limits.credit_window, 9);
    assert_int_equal(w->model.n, 4);
    assert_memory_equal(w->model.p, "fake", 4);
    assert_memory_equal(w->server.p, "fake 1", 6);
    client_close(c);
    client_close(NULL);
    /* Bye travels after close; the fake reads what was sent before it stops. */
    for (int i = 0; i < 1000 && fake_counts(f).byes == 0; i++) usleep(10000);
    struct fake_counts n = fake_stop(f);
    assert_int_equal(n.sessions, 1);
    assert_int_equal(n.byes, 1);
}

static enum status open_status(const char *endpoint, int timeout_ms, struct error *e) {
    struct client *c = NULL;
    struct client_options o = {.endpoint = endpoint, .timeout_ms = timeout_ms};
    enum status st = client_open(&o, e, &c);
    assert_null(c);
    assert_int_equal(e->code, st);
    return st;
}

static void test_refused(void **state) {
    (void)state;
    static const struct {
        enum fake_fault fault;
        enum status st;
        const char *text;
    } cases[] = {
        {FAKE_OTHER_MAJOR, ST_UNSUPPORTED, "2, 3"},
        {FAKE_OTHER_HEADER, ST_UNSUPPORTED, "another protocol version"},
        {FAKE_NEW_WELCOME, ST_UNSUPPORTED, "speaks protocol version 2 "},
        {FAKE_DENY, ST_IO, "not you"},
        {FAKE_NOT_WELCOME, ST_CORRUPT, "answered Hello"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fake *f = fake_start(&(struct fake_options){.fault = cases[i].fault});
        struct error e;
        assert_int_equal(open_status(fake_endpoint(f), PATIENCE_MS, &e), cases[i].st);
        if (!strstr(e.text, cases[i].text)) fail_msg("'%s' lacks '%s'", e.text, cases[i].text);
        fake_stop(f);
    }
}

static void test_nobody(void **state) {
    (void)state;
    struct error e;
    assert_int_equal(open_status("ipc:///tmp/moed-nobody-is-here", 50, &e), ST_TIMEOUT);
    assert_non_null(strstr(e.text, "is the daemon running"));
    assert_int_equal(open_status("ipc:/one-slash", 50, &e), ST_INVALID);
    assert_int_equal(open_status("carrier-pigeon://x", 50, &e), ST_INVALID);
    struct fake *f = fake_start(&(struct fake_options){.fault = FAKE_SILENT});
    assert_int_equal(open_status(fake_endpoint(f), 50, &e), ST_TIMEOUT);
    fake_stop(f);
}

/* A server that comes up while the client waits is found. */
static void *start_late(void *arg) {
    usleep(200000);
    return fake_start(arg);
}

static void test_late_server(void **state) {
    (void)state;
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "ipc:///tmp/moed-late-%d", (int)getpid());
    struct fake_options o = {.endpoint = endpoint};
    pthread_t t;
    pthread_create(&t, NULL, start_late, &o);
    struct client *c = open_client(endpoint);
    client_close(c);
    void *f;
    pthread_join(t, &f);
    assert_int_equal(fake_stop(f).sessions, 1);
}

static void test_default_endpoint(void **state) {
    (void)state;
    char text[128], want[64];
    setenv("MOED_ENDPOINT", "ipc:///x/y", 1);
    assert_string_equal(client_default_endpoint(text, sizeof text), "ipc:///x/y");
    unsetenv("MOED_ENDPOINT");
    setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
    assert_string_equal(client_default_endpoint(text, sizeof text), "ipc:///run/user/7/moed.sock");
    unsetenv("XDG_RUNTIME_DIR");
    snprintf(want, sizeof want, "ipc:///tmp/moed-%u.sock", (unsigned)getuid());
    assert_string_equal(client_default_endpoint(text, sizeof text), want);
}

/* ---- requests -------------------------------------------------------------------------------- */

static void test_answer(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.tokens_per_chunk = 3});
    struct client *c = open_client(fake_endpoint(f));
    char text[128];
    uint64_t first = submit(c, "Gr\xc3\xbc\xc3\x9f Gott \xf0\x9f\x98\x80");
    struct wire_choice end = read_answer(c, first, text, sizeof text);
    assert_string_equal(text, "echo: Gr\xc3\xbc\xc3\x9f Gott \xf0\x9f\x98\x80");
    assert_int_equal(end.completion_tokens, 17);
    assert_int_equal(end.reason, REASON_STOP);
    uint64_t second = submit(c, "again");
    assert_true(second > first);
    read_answer(c, second, text, sizeof text);
    assert_string_equal(text, "echo: again");
    client_close(c);
    assert_int_equal(fake_stop(f).bad_boot_ids, 0);
}

/* Requests at once: each one's messages in order, each ended once. */
static void test_many(void **state) {
    (void)state;
    enum { N = 8 };
    struct fake *f = fake_start(&(struct fake_options){.max_inflight = N, .tokens_per_chunk = 1});
    struct client *c = open_client(fake_endpoint(f));
    uint32_t seq[N + 1] = {0};
    int ended[N + 1] = {0}, n_ended = 0;
    for (int i = 0; i < N; i++) assert_int_equal(submit(c, "some words to repeat"), i + 1);
    while (n_ended < N) {
        struct wire_msg m = next(c);
        assert_in_range(m.request_id, 1, N);
        assert_int_equal(ended[m.request_id], 0);
        if (m.type == WIRE_TOKEN_CHUNK) {
            assert_int_equal(m.chunk.seq, seq[m.request_id]++);
        } else if (m.type == WIRE_FINISHED) {
            ended[m.request_id] = 1;
            n_ended++;
        }
    }
    for (int i = 1; i <= N; i++) assert_int_equal(seq[i], 26);
    client_close(c);
    fake_stop(f);
}

/* 5,000 chunks through a window of 4: credit must flow, and never for what was not read. */
static void test_credit(void **state) {
    (void)state;
    static const uint32_t windows[] = {1, 4, 64};
    for (int i = 0; i < 3; i++) {
        struct fake *f = fake_start(&(struct fake_options){
            .credit_window = windows[i], .tokens_per_chunk = 1, .answer_tokens = 1500});
        struct client *c = open_client(fake_endpoint(f));
        char text[2048];
        struct wire_choice end = read_answer(c, submit(c, "x"), text, sizeof text);
        assert_int_equal(end.completion_tokens, 1500);
        client_close(c);
        struct fake_counts n = fake_stop(f);
        assert_int_equal(n.chunks, 1500);
        assert_in_range(n.max_unacked, 1, windows[i]);
        /* One Credit per chunk would double the traffic of a wide window. */
        if (windows[i] == 64) assert_in_range(n.credits, 1500 / 64, 1500 / 16 + 1);
    }
}

/* A chunk that was not handed out earns no credit: the server stops at the window. */
static void test_no_credit_unread(void **state) {
    (void)state;
    struct fake *f = fake_start(
        &(struct fake_options){.credit_window = 8, .tokens_per_chunk = 1, .answer_tokens = 100});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    struct error e;
    struct wire_msg reply, ping = {.type = WIRE_PING, .ping = {.nonce = 42}};
    for (int i = 0; i < 50; i++) must(client_call(c, &ping, PATIENCE_MS, &e, &reply), &e);
    for (int i = 0; i < 1000 && fake_counts(f).chunks < 8; i++) usleep(1000);
    must(client_call(c, &ping, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(fake_counts(f).chunks, 8);
    assert_int_equal(fake_counts(f).credits, 0);
    client_close(c);
    fake_stop(f);
}

static void test_cancel(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){
        .credit_window = 8, .tokens_per_chunk = 1, .answer_tokens = 5000, .chunk_us = 1000});
    struct client *c = open_client(fake_endpoint(f));
    uint64_t id = submit(c, "x");
    while (next(c).type != WIRE_TOKEN_CHUNK) {
    }
    assert_int_equal(client_cancel(c, id), ST_OK);
    struct wire_msg m;
    do m = next(c);
    while (m.type == WIRE_TOKEN_CHUNK);
    assert_int_equal(m.type, WIRE_FINISHED);
    assert_int_equal(m.finished.choices[0].reason, REASON_CANCELLED);
    /* Of one that has ended: the server's Ack is not shown. */
    assert_int_equal(client_cancel(c, id), ST_OK);
    assert_int_equal(client_cancel(c, 99), ST_NOT_FOUND);
    struct error e;
    struct wire_msg reply, ping = {.type = WIRE_PING, .ping = {.nonce = 1}};
    must(client_call(c, &ping, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(client_next(c, 0, &e, &m), ST_TIMEOUT);
    client_close(c);
    assert_int_equal(fake_stop(f).cancelled, 2);
}

/* The server's limit counts, and a request over it harms nothing. */
static void test_too_large(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.max_frame_bytes = 1000});
    struct client *c = open_client(fake_endpoint(f));
    size_t n = 1000;
    char *big = malloc(n);
    memset(big, 'a', n);
    struct wire_submit s = text_submit("");
    s.prompt_text = (struct bytes){(uint8_t *)big, n};
    struct error e;
    uint64_t id = 77;
    assert_int_equal(client_submit(c, &s, &e, &id), ST_TOO_LARGE);
    assert_int_equal(id, 77);
    free(big);
    char text[64];
    read_answer(c, submit(c, "still here"), text, sizeof text); /* and the session goes on */
    assert_string_equal(text, "echo: still here");
    client_close(c);
    fake_stop(f);
}

/* ---- questions ------------------------------------------------------------------------------- */

static void test_questions(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){0});
    struct client *c = open_client(fake_endpoint(f));
    struct error e;
    struct wire_msg reply;
    struct wire_msg ask = {.type = WIRE_TOKENIZE, .tokenize = {.text = str("h\xc3\xa9")}};
    must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(reply.type, WIRE_TOKENIZE_RESULT);
    assert_int_equal(reply.ids.n_ids, 2);
    assert_int_equal(reply.ids.ids[1], 0xE9);
    static const int32_t ids[] = {'o', 'k', 0x20AC};
    ask = (struct wire_msg){.type = WIRE_DETOKENIZE, .ids = {ids, 3}};
    must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(reply.text.text.n, 5);
    assert_memory_equal(reply.text.text.p, "ok\xe2\x82\xac", 5);
    ask = (struct wire_msg){.type = WIRE_MODEL_INFO};
    must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(reply.model_info.n_experts, 4);
    ask = (struct wire_msg){.type = WIRE_HEALTH};
    must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
    assert_true(reply.health.ready);
    ask = (struct wire_msg){.type = WIRE_STATS};
    must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
    assert_true(reply.stats.counters[2].value == 1000.0);
    client_close(c);
    fake_stop(f);
}

/* A Pong for another Ping is no answer to this one. */
static void test_stray_pong(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.fault = FAKE_STRAY_PONG});
    struct client *c = open_client(fake_endpoint(f));
    struct error e;
    struct wire_msg reply, ping = {.type = WIRE_PING, .ping = {.nonce = 100}};
    must(client_call(c, &ping, PATIENCE_MS, &e, &reply), &e);
    assert_int_equal(reply.type, WIRE_PONG);
    assert_int_equal(reply.ping.nonce, 100);
    client_close(c);
    fake_stop(f);
}

/* A refused question is its status and its text. */
static void test_question_refused(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){0});
    struct client *c = open_client(fake_endpoint(f));
    struct error e;
    struct wire_msg reply, ask = {.type = WIRE_TOKENIZE, .tokenize = {.text = str("bad \xff")}};
    assert_int_equal(client_call(c, &ask, PATIENCE_MS, &e, &reply), ST_INVALID);
    assert_string_equal(e.text, "made to reject");
    client_close(c);
    fake_stop(f);
}

/* Questions in the middle of streams: every message about requests comes afterwards, once, in
 * order. */
static void test_call_amid_streams(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){
        .credit_window = 8, .tokens_per_chunk = 2, .answer_tokens = 200, .chunk_us = 200});
    struct client *c = open_client(fake_endpoint(f));
    uint64_t a = submit(c, "first"), b = submit(c, "second");
    uint32_t seq[3] = {0};
    int ended = 0, calls = 0, accepted = 0;
    while (ended < 2) {
        struct error e;
        struct wire_msg reply,
            ask = {.type = WIRE_DETOKENIZE, .ids = {(int32_t[]){'A' + calls % 26}, 1}};
        must(client_call(c, &ask, PATIENCE_MS, &e, &reply), &e);
        assert_int_equal(reply.text.text.p[0], 'A' + calls++ % 26);
        struct wire_msg m = next(c);
        assert_true(m.request_id == a || m.request_id == b);
        if (m.type == WIRE_ACCEPTED) accepted++;
        if (m.type == WIRE_TOKEN_CHUNK) assert_int_equal(m.chunk.seq, seq[m.request_id]++);
        if (m.type == WIRE_FINISHED) ended++;
    }
    assert_int_equal(accepted, 2);
    assert_int_equal(seq[a], 100);
    assert_int_equal(seq[b], 100);
    client_close(c);
    fake_stop(f);
}

static void test_call_timeout(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.fault = FAKE_DEAF});
    struct client *c = open_client(fake_endpoint(f));
    struct error e;
    struct wire_msg reply, ask = {.type = WIRE_STATS};
    assert_int_equal(client_call(c, &ask, 30, &e, &reply), ST_TIMEOUT);
    char text[64];
    read_answer(c, submit(c, "alive"), text, sizeof text);
    assert_string_equal(text, "echo: alive");
    client_close(c);
    fake_stop(f);
}

/* ---- faults ---------------------------------------------------------------------------------- */

/* The session's end as seen by every function, and for good. */
static void assert_lost(struct client *c, enum status want) {
    struct error e, first;
    struct wire_msg m, ask = {.type = WIRE_STATS};
    uint64_t id;
    struct wire_submit s = text_submit("more");
    assert_int_equal(client_next(c, 0, &first, &m), want);
    assert_int_equal(client_next(c, -1, &e, &m), want);
    assert_string_equal(e.text, first.text);
    assert_int_equal(client_submit(c, &s, &e, &id), want);
    assert_int_equal(client_call(c, &ask, -1, &e, &m), want);
    assert_int_equal(client_cancel(c, 1), want);
    struct pollfd p = {.fd = client_fd(c), .events = POLLIN};
    if (want == ST_IO && !strstr(e.text, "hangs") && !strstr(e.text, "ended the session"))
        assert_int_equal(poll(&p, 1, 0), 1);
}

static void test_server_dies(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){
        .fault = FAKE_DIE, .at = 5, .tokens_per_chunk = 1, .answer_tokens = 100});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    struct error e;
    int n_chunks;
    assert_int_equal(read_to_end(c, &e, &n_chunks), ST_IO);
    assert_int_equal(n_chunks, 5); /* what had arrived is not lost */
    assert_lost(c, ST_IO);
    client_close(c);
    fake_stop(f);
}

/* A new server on the same endpoint does not inherit the session. */
static void test_server_restarts(void **state) {
    (void)state;
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "ipc:///tmp/moed-restart-%d", (int)getpid());
    struct fake *f = fake_start(&(struct fake_options){.endpoint = endpoint});
    struct client *c = open_client(endpoint);
    fake_stop(f);
    f = fake_start(&(struct fake_options){.endpoint = endpoint});
    struct error e;
    struct wire_msg m;
    assert_int_equal(client_next(c, PATIENCE_MS, &e, &m), ST_IO);
    assert_lost(c, ST_IO);
    client_close(c);
    struct client *d = open_client(endpoint);
    client_close(d);
    struct fake_counts n = fake_stop(f);
    assert_int_equal(n.submits, 0);
    assert_int_equal(n.sessions, 1);
}

static void test_server_hangs(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.fault = FAKE_HANG,
                                                       .at = 3,
                                                       .tokens_per_chunk = 1,
                                                       .answer_tokens = 50,
                                                       .heartbeat_ms = 20});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    struct error e;
    int n_chunks;
    assert_int_equal(read_to_end(c, &e, &n_chunks), ST_IO);
    assert_int_equal(n_chunks, 3);
    assert_non_null(strstr(e.text, "does not answer"));
    assert_lost(c, ST_IO);
    client_close(c);
    fake_stop(f);
}

/* Silence with Pongs is not death: the session outlives many heartbeats without a request. */
static void test_idle(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.heartbeat_ms = 100});
    struct client *c = open_client(fake_endpoint(f));
    struct error e;
    struct wire_msg m;
    while (fake_counts(f).pings < 6) assert_int_equal(client_next(c, 100, &e, &m), ST_TIMEOUT);
    char text[64];
    read_answer(c, submit(c, "still"), text, sizeof text);
    assert_string_equal(text, "echo: still");
    client_close(c);
    fake_stop(f);
}

/* A program that does not look for many heartbeats finds its session alive. */
static void test_absent_program(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.heartbeat_ms = 100});
    struct client *c = open_client(fake_endpoint(f));
    usleep(1000000);
    char text[64];
    read_answer(c, submit(c, "back"), text, sizeof text);
    assert_string_equal(text, "echo: back");
    client_close(c);
    fake_stop(f);
}

static void test_goodbye(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){
        .fault = FAKE_GOODBYE, .at = 2, .tokens_per_chunk = 1, .answer_tokens = 9});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    struct error e;
    int n_chunks;
    assert_int_equal(read_to_end(c, &e, &n_chunks), ST_IO);
    assert_int_equal(n_chunks, 2);
    assert_non_null(strstr(e.text, "DRAINING, shutting down"));
    assert_lost(c, ST_IO);
    client_close(c);
    fake_stop(f);
}

static void test_garbage(void **state) {
    (void)state;
    static const enum fake_fault faults[] = {FAKE_BAD_MAGIC,  FAKE_BAD_BODY,    FAKE_LONG_BODY,
                                             FAKE_ONE_PART,   FAKE_THREE_PARTS, FAKE_STRANGE_ID,
                                             FAKE_CLIENT_TYPE};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        struct fake *f = fake_start(&(struct fake_options){
            .fault = faults[i], .at = 2, .tokens_per_chunk = 1, .answer_tokens = 9});
        struct client *c = open_client(fake_endpoint(f));
        submit(c, "x");
        struct error e;
        int n_chunks;
        enum status st = read_to_end(c, &e, &n_chunks);
        if (st != ST_CORRUPT || n_chunks != 2)
            fail_msg("fault %d: %s after %d chunks: %s", faults[i], status_name(st), n_chunks,
                     e.text);
        assert_lost(c, ST_CORRUPT);
        client_close(c);
        fake_stop(f);
    }
}

/* A server that ignores the window cannot fill the memory of a client that waits for an answer. */
static void test_flood(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.fault = FAKE_NO_WINDOW,
                                                       .max_inflight = 1,
                                                       .credit_window = 4,
                                                       .tokens_per_chunk = 1,
                                                       .answer_tokens = 3000});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    struct error e;
    struct wire_msg reply, ping = {.type = WIRE_PING, .ping = {.nonce = 3}};
    enum status st = ST_OK;
    for (int i = 0; i < 100000 && st == ST_OK; i++)
        st = client_call(c, &ping, PATIENCE_MS, &e, &reply);
    assert_int_equal(st, ST_CORRUPT);
    assert_non_null(strstr(e.text, "credit window"));
    client_close(c);
    fake_stop(f);
}

/* ---- poll(2) --------------------------------------------------------------------------------- */

/* The loop that client.h describes sees every message, and the end. */
static void test_fd(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){.credit_window = 4,
                                                       .tokens_per_chunk = 1,
                                                       .answer_tokens = 300,
                                                       .fault = FAKE_DIE,
                                                       .at = 250});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    int n_chunks = 0;
    enum status st = ST_TIMEOUT;
    while (st == ST_TIMEOUT) {
        struct error e;
        struct wire_msg m;
        while ((st = client_next(c, 0, &e, &m)) == ST_OK)
            if (m.type == WIRE_TOKEN_CHUNK) n_chunks++;
        struct pollfd p = {.fd = client_fd(c), .events = POLLIN};
        assert_int_equal(poll(&p, 1, PATIENCE_MS), 1);
    }
    assert_int_equal(st, ST_IO);
    assert_int_equal(n_chunks, 250);
    client_close(c);
    fake_stop(f);
}

/* The fd wakes a loop that has nothing else to do, so that a hung server is noticed. */
static void test_fd_liveness(void **state) {
    (void)state;
    struct fake *f = fake_start(&(struct fake_options){
        .fault = FAKE_HANG, .at = 0, .answer_tokens = 3, .heartbeat_ms = 20});
    struct client *c = open_client(fake_endpoint(f));
    submit(c, "x");
    enum status st = ST_OK;
    while (st == ST_OK || st == ST_TIMEOUT) {
        struct error e;
        struct wire_msg m;
        while ((st = client_next(c, 0, &e, &m)) == ST_OK) {
        }
        if (st != ST_TIMEOUT) break;
        struct pollfd p = {.fd = client_fd(c), .events = POLLIN};
        assert_int_equal(poll(&p, 1, PATIENCE_MS), 1);
    }
    assert_int_equal(st, ST_IO);
    client_close(c);
    fake_stop(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_welcome),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_nobody),
        cmocka_unit_test(test_late_server),
        cmocka_unit_test(test_default_endpoint),
        cmocka_unit_test(test_answer),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_credit),
        cmocka_unit_test(test_no_credit_unread),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_too_large),
        cmocka_unit_test(test_questions),
        cmocka_unit_test(test_stray_pong),
        cmocka_unit_test(test_question_refused),
        cmocka_unit_test(test_call_amid_streams),
        cmocka_unit_test(test_call_timeout),
        cmocka_unit_test(test_server_dies),
        cmocka_unit_test(test_server_restarts),
        cmocka_unit_test(test_server_hangs),
        cmocka_unit_test(test_idle),
        cmocka_unit_test(test_absent_program),
        cmocka_unit_test(test_goodbye),
        cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_flood),
        cmocka_unit_test(test_fd),
        cmocka_unit_test(test_fd_liveness),
    };
    return cmocka_run_group_tests_name("client_lib", tests, NULL, NULL);
}
