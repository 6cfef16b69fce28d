/* wire, golden bytes: every message type with every field set, and the smallest one, against bytes
 * that Python's protobuf made from moed.proto (fields in number order, defaults left out). These
 * bytes are the protocol: a change that fails here breaks peers. The frames are then cut and
 * mutated. */
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "tests/wire_promises.h"

#define B(s)                                                                                       \
    { (const uint8_t *)(s), sizeof(s) - 1 }
#define N(a) (sizeof(a) / sizeof *(a))
/* What a message that leaves out its sampling is given. */
#define NEUTRAL .temperature = 1, .top_p = 1, .repetition_penalty = 1

static const uint32_t hello_majors[] = {1, 300}, goodbye_majors[] = {1};
static const int32_t prompt_ids[] = {0, 1, 127, 128, 151645}, chunk_ids[] = {5, 151935};
static const int32_t result_ids[] = {0, INT32_MAX}, detokenize_ids[] = {9, 128};
static const struct wire_bias biases[] = {{7, -100}, {151935, 0.5f}};
static const struct wire_chat chat[] = {{B("system"), B("")}, {B("user"), B("hi")}};
static const struct wire_chat chat1[] = {{B("user"), B("x")}};
static const struct wire_top_logprob tops[] = {{5, -0.5f}, {0, -1.5f}};
static const struct wire_token_logprob logprobs[] = {{-0.5f, tops, 2}, {-2.0f, NULL, 0}};
static const struct wire_choice choices[] = {{.reason = REASON_STOP,
                                              .completion_tokens = 12,
                                              .last_seq = 4,
                                              .hash = WIRE_HASH_START,
                                              .stop = B("END")},
                                             {.index = 1,
                                              .reason = REASON_LENGTH,
                                              .completion_tokens = 13,
                                              .last_seq = 5,
                                              .hash = 1,
                                              .has_stop_id = true}};
static const struct wire_counter counters[] = {{B("steps"), 3}, {B("busy_ns"), 0}};

static const struct golden_wire {
    const char *hex; /* the body; spaces are for the reader */
    struct wire_msg msg;
} golden[] = {
    /* majors, features, client */
    {"0a0301ac02 1005 1a086d6f65642d636c69",
     {.type = WIRE_HELLO, .hello = {hello_majors, 2, 5, B("moed-cli")}}},
    {"", {.type = WIRE_HELLO}},
    /* major, minor, features; boot_id; session; limits; heartbeat_ms, model; server */
    {"0801 1002 1803 2210101112131415161718191a1b1c1d1e1f 2a10404142434445464748494a4b4c4d4e4f"
     " 321208808080021040188001208080022810300f 38d00f 420474696e79 4a0a6d6f656420302e312e30",
     {.type = WIRE_WELCOME,
      .welcome = {.major = 1,
                  .minor = 2,
                  .features = 3,
                  .heartbeat_ms = 2000,
                  .boot_id = {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31},
                  .session = {64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79},
                  .limits = {4194304, 64, 128, 32768, 16, 15},
                  .model = B("tiny"),
                  .server = B("moed 0.1.0")}}},
    {"221000000000000000000000000000000000 2a1000000000000000000000000000000000 3200",
     {.type = WIRE_WELCOME}},
    {"0888ef99abc5e88c9111", {.type = WIRE_PING, .ping = {0x1122334455667788}}},
    {"", {.type = WIRE_PING}},
    {"08ffffffffffffffffff01", {.type = WIRE_PONG, .ping = {UINT64_MAX}}},
    {"", {.type = WIRE_PONG}},
    {"", {.type = WIRE_BYE}},
    /* code, text, majors */
    {"0803 12076d616a6f722032 1a0101",
     {.type = WIRE_GOODBYE, .goodbye = {ST_UNSUPPORTED, B("major 2"), goodbye_majors, 1}}},
    {"", {.type = WIRE_GOODBYE}},
    {"08b0ea01", {.type = WIRE_GOAWAY, .goaway = {30000}}},
    {"", {.type = WIRE_GOAWAY}},
    /* boot_id, prompt_ids; sampling: temperature, top_k, top_p, min_p, three penalties, two
     * biases, seed, logprobs, top_logprobs; stop, stop, stop_ids; max_tokens, min_tokens,
     * ignore_eos, priority, ttl_ms, n, parse_special, tag */
    {"0a10a0a1a2a3a4a5a6a7a8a9aaabacadaeaf 120800017f8001dda009"
     " 2a3a 0d00000000 1028 1d0000003f 250000803e 2d0000c03f 35000000c0 3d00000040"
     " 42070807150000c8c2 420908ffa209150000003f 4800 5001 5814"
     " 32020a0a 3202c3a9 3a0402dba009"
     " 408002 4803 5001 5800 60e0d403 6810 7000 7a076772c3b6c39f65",
     {.type = WIRE_SUBMIT,
      .submit = {.boot_id = B("\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7\xa8\xa9\xaa\xab\xac\xad\xae\xaf"),
                 .prompt_ids = prompt_ids,
                 .n_prompt_ids = N(prompt_ids),
                 .sampling = {.temperature = 0,
                              .top_k = 40,
                              .top_p = 0.5f,
                              .min_p = 0.25f,
                              .repetition_penalty = 1.5f,
                              .presence_penalty = -2,
                              .frequency_penalty = 2,
                              .bias = biases,
                              .n_bias = 2,
                              .has_seed = true,
                              .seed = 0,
                              .logprobs = true,
                              .top_logprobs = 20},
                 .stop = {B("\n\n"), B("\xc3\xa9")},
                 .n_stop = 2,
                 .stop_ids = {2, 151643},
                 .n_stop_ids = 2,
                 .has_max_tokens = true,
                 .max_tokens = 256,
                 .min_tokens = 3,
                 .ignore_eos = true,
                 .priority = 0,
                 .ttl_ms = 60000,
                 .n = 16,
                 .parse_special = false,
                 .tag = B("gr\xc3\xb6\xc3\x9f"
                          "e")}}},
    /* prompt_text, sampling */
    {"1a066e61c3af7665 2a00",
     {.type = WIRE_SUBMIT,
      .submit = {.prompt_text = B("na\xc3\xafve"),
                 .sampling = {NEUTRAL},
                 .priority = 1,
                 .n = 1,
                 .parse_special = true}}},
    /* messages, messages, sampling: seed */
    {"22080a0673797374656d 220a0a047573657212026869 2a0b48ffffffffffffffffff01",
     {.type = WIRE_SUBMIT,
      .submit = {.messages = chat,
                 .n_messages = 2,
                 .sampling = {NEUTRAL, .has_seed = true, .seed = UINT64_MAX},
                 .priority = 1,
                 .n = 1,
                 .parse_special = true}}},
    {"08e807 1003", {.type = WIRE_ACCEPTED, .accepted = {1000, 3}}},
    {"", {.type = WIRE_ACCEPTED}},
    /* code, text, retryable, retry_after_ms, queue_depth */
    {"080e 120466756c6c 1801 20fa01 2809",
     {.type = WIRE_REJECTED, .rejected = {ST_OVERLOADED, B("full"), true, 250, 9}}},
    {"0801", {.type = WIRE_REJECTED, .rejected = {.code = ST_INVALID}}},
    /* choice, seq, ids, text; logprobs: logprob, top, top; logprobs; session_seq */
    {"0802 10ac02 1a0405ffa209 22036ec3a9"
     " 2a15 0d000000bf 1207 0805 15000000bf 1205 150000c0bf 2a050d000000c0 30f0a204",
     {.type = WIRE_TOKEN_CHUNK,
      .chunk = {2, 300, chunk_ids, 2, B("n\xc3\xa9"), logprobs, 2, 70000}}},
    {"", {.type = WIRE_TOKEN_CHUNK}},
    /* choices: reason, completion_tokens, last_seq, hash, stop; choices: index, reason,
     * completion_tokens, last_seq, hash, stop_id; three counts; timings */
    {"0a16 1001 180c 2004 28a5c688a1c89ca7f9cb01 3203454e44 0a0c 0801 1002 180d 2005 2801 3800"
     " 1014 1810 2019 2a1d 09000000000000e03f 11000000000000f43f 190000000000005940 2002",
     {.type = WIRE_FINISHED, .finished = {choices, 2, 20, 16, 25, 0.5, 1.25, 100, 2}}},
    {"2a00", {.type = WIRE_FINISHED}},
    {"080b 120a6e6f742066696e697465 1801",
     {.type = WIRE_FAILED, .failed = {ST_NUMERIC, B("not finite"), true}}},
    {"0801", {.type = WIRE_FAILED, .failed = {.code = ST_INVALID}}},
    {"", {.type = WIRE_CANCEL}},
    {"", {.type = WIRE_ACK}},
    {"08808080808020", {.type = WIRE_CREDIT, .credit = {UINT64_C(1) << 40}}},
    {"", {.type = WIRE_CREDIT}},
    {"", {.type = WIRE_MODEL_INFO}},
    /* name, architecture, backend, five counts, weight_bytes, kv_bytes_per_token, eos_id,
     * quantization */
    {"0a0474696e79 12087177656e336d6f65 1a03637075 2004 2880a309 308001 3808 408020 488080808040"
     " 50808006 58ffffffffffffffffff01 620451345f4b",
     {.type = WIRE_MODEL_INFO_RESULT,
      .model_info = {B("tiny"), B("qwen3moe"), B("cpu"), B("Q4_K"), 4, 151936, 128, 8, 4096,
                     UINT64_C(1) << 34, 98304, -1}}},
    {"", {.type = WIRE_MODEL_INFO_RESULT}},
    {"", {.type = WIRE_HEALTH}},
    /* live, ready, state, uptime_ms, last_step_ms */
    {"0801 1001 180f 2080b89929 280c",
     {.type = WIRE_HEALTH_RESULT, .health = {true, true, ST_DRAINING, 86400000, 12}}},
    {"", {.type = WIRE_HEALTH_RESULT}},
    {"", {.type = WIRE_STATS}},
    {"0a10 0a057374657073 110000000000000840 0a09 0a07627573795f6e73",
     {.type = WIRE_STATS_RESULT, .stats = {counters, 2}}},
    {"", {.type = WIRE_STATS_RESULT}},
    /* text, which is empty and present; parse_special */
    {"0a00 1800", {.type = WIRE_TOKENIZE}},
    {"12090a0475736572120178",
     {.type = WIRE_TOKENIZE,
      .tokenize = {.messages = chat1, .n_messages = 1, .parse_special = true}}},
    {"0a0600ffffffff07", {.type = WIRE_TOKENIZE_RESULT, .ids = {result_ids, 2}}},
    {"", {.type = WIRE_TOKENIZE_RESULT}},
    {"0a03098001", {.type = WIRE_DETOKENIZE, .ids = {detokenize_ids, 2}}},
    {"", {.type = WIRE_DETOKENIZE}},
    {"0a02e282", {.type = WIRE_DETOKENIZE_RESULT, .text = {B("\xe2\x82")}}}, /* half a euro sign */
    {"", {.type = WIRE_DETOKENIZE_RESULT}},
};

enum { MAX_GOLDEN = 512 };
static struct arena arena, scratch;

static size_t unhex(const char *hex, uint8_t *dst) {
    size_t n = 0;
    for (const char *p = hex; *p; p++) {
        if (*p == ' ') continue;
        unsigned v;
        assert_int_equal(sscanf(p, "%2x", &v), 1);
        dst[n++] = (uint8_t)v;
        p++;
    }
    assert_true(n <= MAX_GOLDEN);
    return n;
}

/* Decode a copy that ends where its allocation ends, so that a sanitizer sees any read past it. */
static enum status decode(enum wire_type type, const uint8_t *p, size_t n, struct error *e,
                          struct wire_msg *out) {
    struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, (uint16_t)type, (uint32_t)n, 77};
    uint8_t *copy = malloc(n ? n : 1);
    memcpy(copy, p, n);
    arena_reset(&arena);
    enum status st = wire_decode(&h, copy, n, &arena, e, out);
    free(copy);
    assert_true(arena.used_bytes <= 8 * n + WIRE_BUDGET_BYTES);
    if (st != ST_OK) assert_int_equal(arena.used_bytes, 0);
    return st;
}

static void test_encode(void **state) {
    (void)state;
    for (size_t i = 0; i < N(golden); i++) {
        uint8_t want[MAX_GOLDEN], got[MAX_GOLDEN];
        size_t n = unhex(golden[i].hex, want), len;
        assert_int_equal(wire_encode(&golden[i].msg, &scratch, got, sizeof got, &len), ST_OK);
        assert_int_equal(len, n);
        assert_memory_equal(got, want, n);
        assert_int_equal(scratch.used_bytes, 0);
    }
}

/* The values that come out are the ones that encode to the same bytes: test_encode fixes which. */
static void test_decode(void **state) {
    (void)state;
    for (size_t i = 0; i < N(golden); i++) {
        uint8_t want[MAX_GOLDEN], got[MAX_GOLDEN];
        size_t n = unhex(golden[i].hex, want), len;
        struct error error = {0}, *e = &error;
        struct wire_msg m;
        assert_ok(decode(golden[i].msg.type, want, n, e, &m), e);
        assert_int_equal(m.type, golden[i].msg.type);
        assert_int_equal(m.request_id, 77);
        assert_null(wire_broken_promise(&m));
        assert_int_equal(wire_encode(&m, &scratch, got, sizeof got, &len), ST_OK);
        assert_int_equal(len, n);
        assert_memory_equal(got, want, n);
    }
}

/* The same without encode between: some of each kind of field, by value. */
static void test_decode_values(void **state) {
    (void)state;
    struct wire_msg m;
    uint8_t p[MAX_GOLDEN];
    for (size_t i = 0; i < N(golden); i++) {
        const struct wire_msg *w = &golden[i].msg;
        if (w->type != WIRE_SUBMIT && w->type != WIRE_TOKEN_CHUNK) continue;
        assert_int_equal(decode(w->type, p, unhex(golden[i].hex, p), NULL, &m), ST_OK);
        if (w->type == WIRE_TOKEN_CHUNK) {
            assert_int_equal(m.chunk.n_ids, w->chunk.n_ids);
            assert_int_equal(m.chunk.n_logprobs, w->chunk.n_logprobs);
            for (size_t k = 0; k < m.chunk.n_logprobs; k++)
                assert_true(m.chunk.logprobs[k].logprob == logprobs[k].logprob);
            continue;
        }
        const struct wire_submit *a = &m.submit, *b = &w->submit;
        assert_int_equal(a->n_prompt_ids, b->n_prompt_ids);
        assert_memory_equal(a->prompt_ids ? a->prompt_ids : prompt_ids, prompt_ids,
                            a->n_prompt_ids * sizeof *prompt_ids);
        assert_int_equal(a->n_messages, b->n_messages);
        assert_true(a->sampling.temperature == b->sampling.temperature);
        assert_true(a->sampling.top_p == b->sampling.top_p);
        assert_true(a->sampling.repetition_penalty == b->sampling.repetition_penalty);
        assert_int_equal(a->sampling.n_bias, b->sampling.n_bias);
        assert_int_equal(a->sampling.has_seed, b->sampling.has_seed);
        assert_true(a->sampling.seed == b->sampling.seed);
        assert_int_equal(a->n_stop, b->n_stop);
        assert_memory_equal(a->stop_ids, b->stop_ids, sizeof a->stop_ids);
        assert_int_equal(a->has_max_tokens, b->has_max_tokens);
        assert_int_equal(a->priority, b->priority);
        assert_int_equal(a->n, b->n);
        assert_int_equal(a->parse_special, b->parse_special);
    }
}

/* Every type is in the table, so that a new one cannot be left out. */
static void test_complete(void **state) {
    (void)state;
    for (int type = 0; type < 256; type++) {
        bool known = strcmp(wire_type_name((enum wire_type)type), "?") != 0, here = false;
        for (size_t i = 0; i < N(golden); i++) here |= golden[i].msg.type == (enum wire_type)type;
        assert_int_equal(here, known);
    }
}

/* Cut at every byte: either refused, or what is left stands by itself (a cut between fields). */
static void test_truncation(void **state) {
    (void)state;
    int n_refused = 0, n_kept = 0;
    for (size_t i = 0; i < N(golden); i++) {
        uint8_t p[MAX_GOLDEN];
        size_t n = unhex(golden[i].hex, p);
        for (size_t cut = 0; cut < n; cut++) {
            struct error e = {0};
            struct wire_msg m;
            enum status st = decode(golden[i].msg.type, p, cut, &e, &m);
            if (st == ST_OK) {
                assert_null(wire_broken_promise(&m));
                n_kept++;
            } else {
                assert_int_equal(st, ST_INVALID);
                assert_non_null(strstr(e.text, wire_type_name(golden[i].msg.type)));
                n_refused++;
            }
        }
    }
    assert_true(n_refused > 500);
    assert_true(n_kept > 30);
}

/* Each allocation failed in turn: every arena too small for a message refuses it and stays as it
 * was. */
static void test_small_arena(void **state) {
    (void)state;
    for (size_t i = 0; i < N(golden); i++) {
        uint8_t p[MAX_GOLDEN];
        size_t n = unhex(golden[i].hex, p);
        struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, (uint16_t)golden[i].msg.type, (uint32_t)n,
                                1};
        struct wire_msg m;
        arena_reset(&arena);
        assert_int_equal(wire_decode(&h, p, n, &arena, NULL, &m), ST_OK);
        size_t needed = arena.used_bytes;
        for (size_t cap = 0; cap <= needed; cap++) {
            struct arena part = {.base = arena.base, .cap_bytes = cap};
            enum status st = wire_decode(&h, p, n, &part, NULL, &m);
            assert_int_equal(st, cap < needed ? ST_TOO_LARGE : ST_OK);
            assert_int_equal(part.used_bytes, cap < needed ? 0 : needed);
        }
    }
}

/* The same for encoding: a scratch too small says so and is given back. */
static void test_small_scratch(void **state) {
    (void)state;
    for (size_t i = 0; i < N(golden); i++) {
        uint8_t dst[MAX_GOLDEN];
        size_t cap = 0, len = 1;
        struct arena part = {.base = scratch.base};
        while (wire_encode(&golden[i].msg, &part, dst, sizeof dst, &len) != ST_OK) {
            assert_int_equal(len, 0);
            assert_int_equal(part.used_bytes, 0);
            part.cap_bytes = ++cap;
            assert_true(cap < 65536);
        }
        assert_true(cap > 0);
    }
}

static size_t mutate(uint64_t *rng, uint8_t *p, size_t n, size_t cap) {
    uint64_t r = test_random(rng);
    size_t at = n ? (size_t)(r >> 8) % n : 0;
    uint8_t byte = (uint8_t)(r >> 48);
    switch (r % 5) {
    case 0:
        if (n) p[at] = byte;
        return n;
    case 1:
        if (n) p[at] ^= (uint8_t)(1u << (byte & 7));
        return n;
    case 2: /* insert */
        if (n + 1 > cap) return n;
        memmove(p + at + 1, p + at, n - at);
        p[at] = byte;
        return n + 1;
    case 3: /* delete */
        if (n == 0) return 0;
        memmove(p + at, p + at + 1, n - at - 1);
        return n - 1;
    default: { /* append a part of itself: fields that come twice */
        size_t len = n - at;
        if (n + len > cap) len = cap - n;
        memmove(p + n, p + at, len);
        return n + len;
    }
    }
}

static void test_mutation(void **state) {
    (void)state;
    uint64_t rng = 1;
    int n_ok = 0, n_invalid = 0;
    for (int round = 0; round < 100000; round++) {
        const struct golden_wire *g = &golden[test_random(&rng) % N(golden)];
        uint8_t p[MAX_GOLDEN], again[2 * MAX_GOLDEN];
        size_t n = unhex(g->hex, p), len;
        for (uint64_t k = 1 + test_random(&rng) % 6; k > 0; k--) n = mutate(&rng, p, n, sizeof p);
        struct error e = {0};
        struct wire_msg m;
        enum status st = decode(g->msg.type, p, n, &e, &m);
        if (st != ST_OK) {
            assert_int_equal(st, ST_INVALID);
            assert_int_equal(e.code, ST_INVALID);
            assert_true(e.text[0] != 0);
            n_invalid++;
            continue;
        }
        const char *broken = wire_broken_promise(&m);
        if (broken) fail_msg("round %d: %s", round, broken);
        assert_int_equal(wire_encode(&m, &scratch, again, sizeof again, &len), ST_OK);
        assert_int_equal(decode(g->msg.type, again, len, NULL, &m), ST_OK);
        n_ok++;
    }
    assert_true(n_ok > 10000);
    assert_true(n_invalid > 10000);
}

static int setup(void **state) {
    (void)state;
    return arena_create(WIRE_ARENA_BYTES, &arena) || arena_create(1 << 20, &scratch);
}

static int teardown(void **state) {
    (void)state;
    arena_destroy(&arena);
    arena_destroy(&scratch);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_encode),        cmocka_unit_test(test_decode),
        cmocka_unit_test(test_decode_values), cmocka_unit_test(test_complete),
        cmocka_unit_test(test_truncation),    cmocka_unit_test(test_small_arena),
        cmocka_unit_test(test_small_scratch), cmocka_unit_test(test_mutation),
    };
    return cmocka_run_group_tests_name("wire_golden", tests, setup, teardown);
}
