/* The daemon against raw clients, without load: handshake, every refusal, garbage frames,
 * questions. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/daemon_rig.h"

static const int32_t prompt[] = {600, 601, 602, 603, 604};
enum { N_PROMPT = 5 };

/* ---- handshake ------------------------------------------------------------------------------ */

static void test_welcome(void **state) {
    (void)state;
    struct rig r;
    struct peer a, b;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&a, &r);
    peer_open(&b, &r);
    static const uint32_t majors[] = {7, 1, 2};
    struct wire_msg m = {.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 3}};
    peer_send(&a, &m);
    peer_expect(&a, WIRE_WELCOME, 0, &m);
    assert_int_equal(m.welcome.major, 1);
    assert_int_equal(m.welcome.limits.credit_window, 128);
    assert_int_equal(m.welcome.limits.max_inflight, 64);
    assert_int_equal(m.welcome.limits.max_context_tokens, 256);
    assert_int_equal(m.welcome.limits.max_frame_bytes, WIRE_MAX_BODY_BYTES);
    assert_int_equal(m.welcome.limits.max_choices, WIRE_MAX_CHOICES);
    assert_int_equal(m.welcome.model.n, 4);
    assert_memory_equal(m.welcome.model.p, "fake", 4);
    assert_true(m.welcome.heartbeat_ms > 0);
    uint8_t boot[WIRE_ID_BYTES], session[WIRE_ID_BYTES];
    memcpy(boot, m.welcome.boot_id, sizeof boot);
    memcpy(session, m.welcome.session, sizeof session);
    peer_hello(&b);
    assert_memory_equal(b.boot_id, boot, sizeof boot);
    /* Hello again starts a new session. */
    m = (struct wire_msg){.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 3}};
    peer_send(&a, &m);
    peer_expect(&a, WIRE_WELCOME, 0, &m);
    assert_memory_not_equal(m.welcome.session, session, sizeof session);
    assert_true(peer_stat(&b, "sessions") == 2);
    peer_close(&a);
    peer_close(&b);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_version_mismatch(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    static const uint32_t majors[] = {2, 3};
    struct wire_msg m = {.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 2}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_UNSUPPORTED);
    assert_int_equal(m.goodbye.n_majors, 1);
    assert_int_equal(m.goodbye.majors[0], 1);
    peer_hello(&p); /* the connection is still good */
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_before_hello(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    struct wire_msg m = submit_ids(9, prompt, N_PROMPT, 4);
    peer_send(&p, &m);
    peer_expect(&p, WIRE_REJECTED, 9, &m);
    assert_int_equal(m.rejected.code, ST_UNAUTHENTICATED);
    m = (struct wire_msg){.type = WIRE_STATS, .request_id = 1};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_UNAUTHENTICATED);
    /* After Bye, likewise. */
    peer_hello(&p);
    m = (struct wire_msg){.type = WIRE_BYE};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_OK);
    m = (struct wire_msg){.type = WIRE_PING};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_session_table_full(void **state) {
    (void)state;
    struct rig r;
    struct peer p[3];
    struct wire_msg m;
    static const uint32_t majors[] = {1};
    rig_start(&r, &(struct rig_options){.max_sessions = 2});
    for (int i = 0; i < 3; i++) peer_open(&p[i], &r);
    peer_hello(&p[0]);
    peer_hello(&p[1]);
    m = (struct wire_msg){.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 1}};
    peer_send(&p[2], &m);
    peer_expect(&p[2], WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_OVERLOADED);
    peer_close(&p[0]); /* without Bye: found out by itself, and its place is free again */
    peer_wait_stat(&p[1], "sessions", 1);
    peer_hello(&p[2]);
    peer_close(&p[1]);
    peer_close(&p[2]);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static void reject(struct peer *p, const struct wire_msg *submit, enum status code, bool retryable,
                   const char *word) {
    struct wire_msg m;
    peer_send(p, submit);
    peer_expect(p, WIRE_REJECTED, submit->request_id, &m);
    if (m.rejected.code != (uint32_t)code)
        fail_msg("%s (%.*s) instead of %s", status_name((enum status)m.rejected.code),
                 (int)m.rejected.text.n, (const char *)m.rejected.text.p, status_name(code));
    assert_int_equal(m.rejected.retryable, retryable);
    assert_int_equal(m.rejected.retry_after_ms > 0, retryable);
    char text[300];
    snprintf(text, sizeof text, "%.*s", (int)m.rejected.text.n, (const char *)m.rejected.text.p);
    if (!strstr(text, word)) fail_msg("\"%s\" does not say \"%s\"", text, word);
}

static void test_refusals(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    peer_hello(&p);
    struct wire_msg ok = submit_ids(1, prompt, N_PROMPT, 4), m = ok;
    uint8_t other_boot[WIRE_ID_BYTES] = {1};

    m.request_id = 0;
    reject(&p, &m, ST_INVALID, false, "request_id");
    m = ok;
    m.submit.boot_id = (struct bytes){other_boot, sizeof other_boot};
    reject(&p, &m, ST_STALE_EPOCH, true, "restarted");
    m = ok;
    int32_t bad_ids[] = {5, RIG_VOCAB};
    m.submit.prompt_ids = bad_ids;
    m.submit.n_prompt_ids = 2;
    reject(&p, &m, ST_INVALID, false, "prompt_ids");
    m = ok;
    m.submit.n_stop_ids = 1;
    m.submit.stop_ids[0] = RIG_VOCAB;
    reject(&p, &m, ST_INVALID, false, "stop_ids");
    m = ok;
    struct wire_bias bias = {RIG_VOCAB, 1};
    m.submit.sampling.bias = &bias;
    m.submit.sampling.n_bias = 1;
    reject(&p, &m, ST_INVALID, false, "bias");

    int32_t long_prompt[300];
    for (int i = 0; i < 300; i++) long_prompt[i] = 700 + i;
    m = submit_ids(1, long_prompt, 256, 1);
    reject(&p, &m, ST_TOO_LONG, false, "256");
    /* 255 and one to complete just fit. */
    m = submit_ids(2, long_prompt, 255, 10);
    struct answer a;
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 2, &m);
    peer_collect(&p, 2, &a, &m);
    assert_int_equal(a.n_ids, 1);
    assert_int_equal(m.finished.choices[0].reason, REASON_LENGTH);
    /* A text that is too long is found out by the text worker. */
    static char words[8000];
    for (size_t i = 0; i < sizeof words; i++) words[i] = (char)('0' + i * i % 10);
    m = submit_ids(3, NULL, 0, 1);
    m.submit.prompt_text = (struct bytes){(const uint8_t *)words, sizeof words};
    reject(&p, &m, ST_TOO_LONG, false, "256");
    /* A role that the template does not have. */
    struct wire_chat chat = {{(const uint8_t *)"nobody", 6}, {(const uint8_t *)"hi", 2}};
    m = submit_ids(4, NULL, 0, 1);
    m.submit.messages = &chat;
    m.submit.n_messages = 1;
    reject(&p, &m, ST_INVALID, false, "role");
    assert_true(peer_stat(&p, "requests_in_flight") == 0);
    assert_true(peer_stat(&p, "requests_rejected") == 8);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* Encode a good Submit, then spoil its body: what only a hand-made body can say. */
static void send_spoilt(struct peer *p, const struct wire_msg *m, const void *find, const void *put,
                        size_t n) {
    struct arena scratch;
    uint8_t body[4096], header[WIRE_HEADER_BYTES];
    size_t len = 0, at = 0;
    assert_int_equal(arena_create(1 << 20, &scratch), ST_OK);
    assert_int_equal(wire_encode(m, &scratch, body, sizeof body, &len), ST_OK);
    arena_destroy(&scratch);
    while (at + n <= len && memcmp(body + at, find, n) != 0) at++;
    if (at + n > len) fail_msg("nothing to spoil");
    memcpy(body + at, put, n);
    struct wire_header h = {.major = WIRE_MAJOR,
                            .type = WIRE_SUBMIT,
                            .body_bytes = (uint32_t)len,
                            .request_id = m->request_id};
    wire_header_encode(&h, header);
    struct bytes frames[] = {{header, sizeof header}, {body, len}};
    peer_send_frames(p, frames, 2);
}

static void test_spoilt_bodies(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m, reply;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    peer_hello(&p);
    float marker = 1.2345678f, nan = NAN, infinity = INFINITY;
    m = submit_ids(1, prompt, N_PROMPT, 4);
    m.submit.sampling.temperature = marker;
    send_spoilt(&p, &m, &marker, &nan, sizeof nan);
    peer_expect(&p, WIRE_REJECTED, 1, &reply);
    assert_int_equal(reply.rejected.code, ST_INVALID);
    send_spoilt(&p, &m, &marker, &infinity, sizeof infinity);
    peer_expect(&p, WIRE_REJECTED, 1, &reply);
    assert_int_equal(reply.rejected.code, ST_INVALID);
    m = submit_ids(2, NULL, 0, 4);
    m.submit.prompt_text = (struct bytes){(const uint8_t *)"prompt text", 11};
    send_spoilt(&p, &m, "prompt", "pro\xffpt", 6);
    peer_expect(&p, WIRE_REJECTED, 2, &reply);
    assert_int_equal(reply.rejected.code, ST_INVALID);
    m = submit_ids(3, prompt, N_PROMPT, 4);
    m.submit.n_stop = 1;
    m.submit.stop[0] = (struct bytes){(const uint8_t *)"marker", 6};
    send_spoilt(&p, &m, "marker", "mark\xed\xa0", 6);
    peer_expect(&p, WIRE_REJECTED, 3, &reply);
    assert_int_equal(reply.rejected.code, ST_INVALID);
    /* Unspoilt, the same is served. */
    m.request_id = 4;
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 4, &reply);
    struct answer a;
    peer_collect(&p, 4, &a, &reply);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_conflict_quota_overload(void **state) {
    (void)state;
    struct rig r;
    struct peer p, q;
    struct wire_msg m, reply;
    rig_start(&r, &(struct rig_options){.max_seqs = 2, .max_queue = 70, .max_queued_tokens = 2000});
    atomic_store(&r.fake.gated, true);
    peer_open(&p, &r);
    peer_open(&q, &r);
    peer_hello(&p);
    peer_hello(&q);
    for (uint64_t i = 1; i <= 64; i++) {
        m = submit_ids(i, prompt, N_PROMPT, 4);
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, i, &reply);
        assert_int_equal(reply.accepted.prompt_tokens, N_PROMPT);
    }
    reject(&p, &m, ST_CONFLICT, false, "64");
    m = submit_ids(65, prompt, N_PROMPT, 4);
    reject(&p, &m, ST_QUOTA, true, "64 requests");
    for (uint64_t i = 1; i <= 8; i++) { /* 72 requests are all there is room for */
        m = submit_ids(i, prompt, N_PROMPT, 4);
        peer_send(&q, &m);
        peer_expect(&q, WIRE_ACCEPTED, i, &reply);
    }
    m = submit_ids(9, prompt, N_PROMPT, 4);
    reject(&q, &m, ST_OVERLOADED, true, "full");
    double waiting = peer_stat(&q, "sequences_waiting");
    assert_true(waiting >= 70);
    /* Cancel makes room at once. */
    m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = 8};
    peer_send(&q, &m);
    peer_expect(&q, WIRE_FINISHED, 8, &reply);
    assert_int_equal(reply.finished.choices[0].reason, REASON_CANCELLED);
    m = submit_ids(9, prompt, N_PROMPT, 4);
    peer_send(&q, &m);
    peer_expect(&q, WIRE_ACCEPTED, 9, &reply);
    fake_ungate(&r);
    for (int n = 0; n < 64; n += reply.type == WIRE_FINISHED) peer_next(&p, &reply);
    for (int n = 0; n < 8; n += reply.type == WIRE_FINISHED) peer_next(&q, &reply);
    peer_wait_stat(&q, "kv_blocks_held", 0);
    peer_close(&p);
    peer_close(&q);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_queued_tokens(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m, reply;
    rig_start(&r, &(struct rig_options){.max_seqs = 1, .max_queued_tokens = 300});
    atomic_store(&r.fake.gated, true);
    peer_open(&p, &r);
    peer_hello(&p);
    int32_t ids[200];
    for (int i = 0; i < 200; i++) ids[i] = 600 + i;
    uint64_t id = 1;
    for (; id <= 2; id++) { /* one runs (and is held by the gate), one waits */
        m = submit_ids(id, ids, 200, 2);
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, id, &reply);
        if (id == 1) peer_wait_stat(&p, "sequences_running", 1);
    }
    m = submit_ids(id, ids, 101, 2);
    reject(&p, &m, ST_OVERLOADED, true, "full");
    m = submit_ids(id, ids, 100, 2);
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, id, &reply);
    assert_int_equal(reply.accepted.queue_depth, 1);
    fake_ungate(&r);
    for (int n = 0; n < 3; n += reply.type == WIRE_FINISHED) peer_next(&p, &reply);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* ---- garbage -------------------------------------------------------------------------------- */

static void expect_goodbye(struct peer *p, enum status code) {
    struct wire_msg m;
    peer_expect(p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, code);
}

static void test_frame_counts(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    uint8_t header[WIRE_HEADER_BYTES];
    struct wire_header h = {.major = WIRE_MAJOR, .type = WIRE_PING};
    wire_header_encode(&h, header);
    struct bytes f = {header, sizeof header}, none = {NULL, 0};
    struct bytes one[] = {f}, three[] = {f, none, none}, five[] = {f, none, f, none, f};
    for (int with_session = 0; with_session < 2; with_session++) {
        if (with_session) peer_hello(&p);
        peer_send_frames(&p, one, 1);
        expect_goodbye(&p, ST_INVALID);
        if (with_session) peer_hello(&p); /* it had cost the session */
        peer_send_frames(&p, three, 3);
        expect_goodbye(&p, ST_INVALID);
        if (with_session) peer_hello(&p);
        peer_send_frames(&p, five, 5);
        expect_goodbye(&p, ST_INVALID);
    }
    peer_hello(&p);
    struct bytes good[] = {f, none};
    struct wire_msg m;
    peer_send_frames(&p, good, 2);
    peer_expect(&p, WIRE_PONG, 0, &m);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_bad_headers(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    static const struct {
        int at, value;
        enum status code;
    } spoil[] = {
        {0, 'm', ST_INVALID}, /* magic */
        {4, 9, ST_UNSUPPORTED}, /* major */
        {8, 1, ST_INVALID}, /* flags */
        {24, 1, ST_INVALID}, /* reserved */
        {15, 1, ST_TOO_LARGE}, /* body_bytes of 16 MiB */
    };
    for (size_t i = 0; i < sizeof spoil / sizeof *spoil; i++) {
        uint8_t header[WIRE_HEADER_BYTES];
        struct wire_header h = {.major = WIRE_MAJOR, .type = WIRE_PING};
        wire_header_encode(&h, header);
        header[spoil[i].at] = (uint8_t)spoil[i].value;
        struct bytes frames[] = {{header, sizeof header}, {NULL, 0}};
        peer_hello(&p);
        peer_send_frames(&p, frames, 2);
        expect_goodbye(&p, spoil[i].code);
    }
    struct bytes shorter[] = {{(const uint8_t *)"MOED", 4}, {NULL, 0}};
    peer_send_frames(&p, shorter, 2);
    expect_goodbye(&p, ST_INVALID);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* Bad bodies and unknown types are answered, and the session goes on. */
static void test_session_survives(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    peer_hello(&p);
    uint8_t header[WIRE_HEADER_BYTES];
    static const uint8_t junk[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                                   0xff, 0xff, 0xff, 0xff, 0xff};
    struct wire_header h = {.major = WIRE_MAJOR, .type = 999, .request_id = 5};
    struct bytes frames[] = {{header, sizeof header}, {NULL, 0}};
    wire_header_encode(&h, header);
    peer_send_frames(&p, frames, 2); /* a type of the future */
    peer_expect(&p, WIRE_FAILED, 5, &m);
    assert_int_equal(m.failed.code, ST_UNIMPLEMENTED);
    h.type = WIRE_WELCOME; /* a server's message */
    wire_header_encode(&h, header);
    peer_send_frames(&p, frames, 2);
    peer_expect(&p, WIRE_FAILED, 5, &m);
    h.type = WIRE_SUBMIT;
    h.body_bytes = sizeof junk;
    wire_header_encode(&h, header);
    frames[1] = (struct bytes){junk, sizeof junk};
    peer_send_frames(&p, frames, 2);
    peer_expect(&p, WIRE_REJECTED, 5, &m);
    assert_int_equal(m.rejected.code, ST_INVALID);
    h.type = WIRE_DETOKENIZE;
    wire_header_encode(&h, header);
    peer_send_frames(&p, frames, 2);
    peer_expect(&p, WIRE_FAILED, 5, &m);
    assert_int_equal(m.failed.code, ST_INVALID);
    h.body_bytes = sizeof junk + 1; /* truncated */
    wire_header_encode(&h, header);
    peer_send_frames(&p, frames, 2);
    peer_expect(&p, WIRE_FAILED, 5, &m);
    assert_int_equal(m.failed.code, ST_INVALID);
    /* A Credit for what was never sent is a broken client. */
    peer_credit(&p, 1000);
    expect_goodbye(&p, ST_INVALID);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

static void test_random_bytes(void **state) {
    (void)state;
    struct rig r;
    struct peer good, bad;
    struct wire_msg m;
    uint64_t rng = 20;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&good, &r);
    peer_open(&bad, &r);
    peer_hello(&good);
    for (int i = 0; i < 3000; i++) {
        uint8_t header[WIRE_HEADER_BYTES], body[64];
        size_t n = test_random(&rng) % sizeof body;
        for (size_t k = 0; k < n; k++) body[k] = (uint8_t)test_random(&rng);
        struct wire_header h = {.major = WIRE_MAJOR,
                                .type = (uint16_t)(2 + test_random(&rng) % 42),
                                .body_bytes = (uint32_t)n,
                                .request_id = test_random(&rng) % 4};
        wire_header_encode(&h, header);
        if (test_random(&rng) % 4 == 0)
            header[test_random(&rng) % 32] ^= (uint8_t)test_random(&rng);
        struct bytes frames[] = {{header, sizeof header}, {body, n}, {body, n / 2}};
        peer_send_frames(&bad, frames, 1 + (int)(test_random(&rng) % 8 == 0 ? 2 : 1));
        if (i % 16 == 0) { /* keep it within a session, mostly */
            static const uint32_t majors[] = {1};
            m = (struct wire_msg){.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 1}};
            peer_send(&bad, &m);
        }
        while (peer_poll(&bad, 0, &m)) {
        }
    }
    /* The daemon serves others as if nothing had been. */
    struct answer a;
    int32_t want[8];
    m = submit_ids(1, prompt, N_PROMPT, 8);
    peer_send(&good, &m);
    peer_expect(&good, WIRE_ACCEPTED, 1, &m);
    peer_collect(&good, 1, &a, &m);
    fake_answer(prompt, N_PROMPT, 1, want, 8);
    assert_int_equal(a.n_ids, 8);
    assert_memory_equal(a.ids, want, sizeof want);
    assert_true(peer_stat(&good, "messages_malformed") > 100);
    peer_close(&bad);
    peer_wait_stat(&good, "sessions", 1);
    peer_wait_stat(&good, "kv_blocks_held", 0);
    peer_wait_stat(&good, "requests_in_flight", 0);
    peer_close(&good);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* ---- questions ------------------------------------------------------------------------------ */

static void test_questions(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    rig_start(&r, &(struct rig_options){0});
    peer_open(&p, &r);
    peer_hello(&p);
    m = (struct wire_msg){.type = WIRE_PING, .request_id = 1, .ping = {77}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_PONG, 1, &m);
    assert_int_equal(m.ping.nonce, 77);

    m = (struct wire_msg){.type = WIRE_MODEL_INFO, .request_id = 2};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_MODEL_INFO_RESULT, 2, &m);
    assert_int_equal(m.model_info.n_vocab, RIG_VOCAB);
    assert_int_equal(m.model_info.n_experts, 8);
    assert_int_equal(m.model_info.n_experts_used, 2);
    assert_int_equal(m.model_info.max_context_tokens, 256);
    assert_int_equal(m.model_info.eos_id, RIG_EOS);

    m = (struct wire_msg){.type = WIRE_HEALTH, .request_id = 3};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_HEALTH_RESULT, 3, &m);
    assert_true(m.health.live && m.health.ready);
    assert_int_equal(m.health.state, ST_OK);

    static const char text[] = "What is a mutex? \xe2\x82\xac";
    int32_t ids[64];
    size_t n_ids;
    assert_int_equal(text_encode(r.text, text, strlen(text), true, ids, 64, &n_ids), ST_OK);
    m = (struct wire_msg){
        .type = WIRE_TOKENIZE,
        .request_id = 4,
        .tokenize = {.text = {(const uint8_t *)text, strlen(text)}, .parse_special = true}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_TOKENIZE_RESULT, 4, &m);
    assert_int_equal(m.ids.n_ids, n_ids);
    assert_memory_equal(m.ids.ids, ids, n_ids * sizeof *ids);

    m = (struct wire_msg){.type = WIRE_DETOKENIZE, .request_id = 5, .ids = {ids, n_ids}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_DETOKENIZE_RESULT, 5, &m);
    assert_int_equal(m.text.text.n, strlen(text));
    assert_memory_equal(m.text.text.p, text, strlen(text));
    int32_t unknown[] = {5, RIG_VOCAB};
    m = (struct wire_msg){.type = WIRE_DETOKENIZE, .request_id = 7, .ids = {unknown, 2}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_FAILED, 7, &m);
    assert_int_equal(m.failed.code, ST_INVALID);

    struct wire_chat chat[] = {{{(const uint8_t *)"user", 4}, {(const uint8_t *)"hello", 5}}};
    struct error e;
    struct text_message message = {chat[0].role, chat[0].content};
    assert_int_equal(text_chat_encode(r.text, &message, 1, &e, ids, 64, &n_ids), ST_OK);
    m = (struct wire_msg){
        .type = WIRE_TOKENIZE, .request_id = 6, .tokenize = {.messages = chat, .n_messages = 1}};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_TOKENIZE_RESULT, 6, &m);
    assert_int_equal(m.ids.n_ids, n_ids);
    assert_memory_equal(m.ids.ids, ids, n_ids * sizeof *ids);

    m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = 1234};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACK, 1234, &m);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* ---- endpoint ------------------------------------------------------------------------------- */

static void test_endpoint(void **state) {
    (void)state;
    static const struct {
        const char *endpoint, *word;
        enum status st;
    } bad[] = {
        {"tcp://127.0.0.1:5555", "ipc://", ST_UNSUPPORTED},
        {"ipc://@abstract", "abstract", ST_INVALID},
        {"ipc://", "ipc://", ST_INVALID},
        {"ipc://*", "ipc://", ST_INVALID},
        {"/tmp/x", "ipc://", ST_INVALID},
        {"ipc:///no/such/folder/sock", "lock file", ST_IO},
    };
    struct net *n;
    struct error e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(net_open(bad[i].endpoint, &e, &n), bad[i].st);
        if (!strstr(e.text, bad[i].word)) fail_msg("\"%s\" lacks \"%s\"", e.text, bad[i].word);
    }
    char longer[200] = "ipc:///tmp/";
    memset(longer + strlen(longer), 'x', 150);
    assert_int_equal(net_open(longer, &e, &n), ST_INVALID);
    assert_non_null(strstr(e.text, "longer than"));

    /* A running daemon keeps its endpoint; the socket is for owner and group. */
    struct rig r;
    rig_start(&r, &(struct rig_options){0});
    assert_int_equal(net_open(r.endpoint, &e, &n), ST_CONFLICT);
    assert_non_null(strstr(e.text, "another daemon"));
    struct stat st;
    assert_int_equal(stat(r.endpoint + 6, &st), 0);
    assert_true(S_ISSOCK(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0660);
    struct peer p;
    peer_open(&p, &r);
    peer_hello(&p); /* the refused one did not take the socket away */
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_welcome),
        cmocka_unit_test(test_version_mismatch),
        cmocka_unit_test(test_before_hello),
        cmocka_unit_test(test_session_table_full),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_spoilt_bodies),
        cmocka_unit_test(test_conflict_quota_overload),
        cmocka_unit_test(test_queued_tokens),
        cmocka_unit_test(test_frame_counts),
        cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_session_survives),
        cmocka_unit_test(test_random_bytes),
        cmocka_unit_test(test_questions),
        cmocka_unit_test(test_endpoint),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
