/* wire: the header, each rule of wire.h broken in turn, memory budgets, encode's limits. The bytes
 * of whole messages are in test_wire_golden.c. */
#include "tests/support.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/wire.h"

#define N(a) (sizeof(a) / sizeof *(a))

static struct arena arena, scratch;

/* ---- header ---------------------------------------------------------------------------------- */

static const uint8_t header[WIRE_HEADER_BYTES] = {
    'M',  'O',  'E',  'D',  1,    7,    0x10, 0x00,
    0,    0,    0,    0,    0x03, 0x02, 0x01, 0, /* … body_bytes */
    0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
    0,    0,    0,    0,    0,    0,    0,    0};

static void test_header(void **state) {
    (void)state;
    struct wire_header h;
    assert_int_equal(wire_header_decode(header, sizeof header, NULL, &h), ST_OK);
    assert_int_equal(h.major, 1);
    assert_int_equal(h.minor, 7); /* a newer minor is read */
    assert_int_equal(h.type, WIRE_SUBMIT);
    assert_int_equal(h.body_bytes, 0x010203);
    assert_true(h.request_id == UINT64_C(0x1122334455667788));
    uint8_t out[WIRE_HEADER_BYTES];
    wire_header_encode(&h, out);
    assert_memory_equal(out, header, sizeof header);
}

static void test_header_refused(void **state) {
    (void)state;
    static const struct {
        int at, value;
        enum status st;
        const char *says;
    } bad[] = {
        {0, 'm', ST_INVALID, "MOED"},        {3, 0, ST_INVALID, "MOED"},
        {4, 0, ST_UNSUPPORTED, "major"},     {4, 2, ST_UNSUPPORTED, "major"},
        {8, 1, ST_INVALID, "flags"},         {11, 0x80, ST_INVALID, "flags"},
        {24, 1, ST_INVALID, "reserved"},     {31, 1, ST_INVALID, "reserved"},
        {15, 1, ST_TOO_LARGE, "body_bytes"}, {14, 0x40, ST_TOO_LARGE, "body_bytes"},
    };
    struct wire_header h = {.request_id = 5};
    for (size_t i = 0; i < N(bad); i++) {
        uint8_t p[WIRE_HEADER_BYTES];
        struct error e = {0};
        memcpy(p, header, sizeof p);
        p[bad[i].at] = (uint8_t)bad[i].value;
        assert_int_equal(wire_header_decode(p, sizeof p, &e, &h), bad[i].st);
        assert_int_equal(e.code, bad[i].st);
        assert_non_null(strstr(e.text, bad[i].says));
        assert_true(h.request_id == 5 && h.body_bytes == 0); /* untouched */
    }
    for (size_t n = 0; n < 64; n++)
        if (n != WIRE_HEADER_BYTES)
            assert_int_equal(wire_header_decode(header, n < 32 ? n : 33, NULL, &h), ST_INVALID);
    uint8_t full[WIRE_HEADER_BYTES];
    memcpy(full, header, sizeof full);
    memcpy(full + 12, (uint8_t[]){0, 0, 0x40, 0}, 4); /* 4 MiB is the most */
    assert_int_equal(wire_header_decode(full, sizeof full, NULL, &h), ST_OK);
    assert_int_equal(h.body_bytes, WIRE_MAX_BODY_BYTES);
}

/* ---- bodies ---------------------------------------------------------------------------------- */

static enum status decode(enum wire_type type, const uint8_t *p, size_t n, struct error *e,
                          struct wire_msg *out) {
    struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, (uint16_t)type, (uint32_t)n, 1};
    arena_reset(&arena);
    return wire_decode(&h, p, n, &arena, e, out);
}

static size_t unhex(const char *hex, uint8_t *dst) {
    size_t n = 0;
    for (const char *p = hex; *p; p++) {
        if (*p == ' ') continue;
        unsigned v;
        assert_int_equal(sscanf(p++, "%2x", &v), 1);
        dst[n++] = (uint8_t)v;
    }
    return n;
}

/* body followed by count times unit; *n its length. */
static uint8_t *build(const char *body, const char *unit, int count, size_t *n) {
    uint8_t *p = malloc(strlen(body) + strlen(unit) * (size_t)count + 1);
    *n = unhex(body, p);
    uint8_t one[256];
    size_t len = unhex(unit, one);
    for (int i = 0; i < count; i++, *n += len) memcpy(p + *n, one, len);
    return p;
}

#define MINUS_1 "ffffffffffffffffff01"

/* A body and what refuses it; says is NULL where the body is just within the rule. Field keys:
 * number times 8, plus 0 varint, 1 eight bytes, 2 counted, 5 four bytes. */
static const struct rule {
    enum wire_type type;
    const char *body, *unit;
    int count;
    const char *says;
} rules[] = {
    {WIRE_HELLO, "1a40", "61", 64, NULL},
    {WIRE_HELLO, "1a41", "61", 65, "Hello.client has 65 bytes"},
    {WIRE_HELLO, "1a01ff", "", 0, "Hello.client is not UTF-8"},

    {WIRE_WELCOME, "", "", 0, "Welcome.boot_id has 0 bytes"},
    {WIRE_WELCOME, "220f", "00", 15, "Welcome.boot_id has 15 bytes"},
    {WIRE_WELCOME, "2210101112131415161718191a1b1c1d1e1f 2a11", "00", 17,
     "Welcome.session has 17 bytes"},
    {WIRE_WELCOME, "4201ff 2210101112131415161718191a1b1c1d1e1f 2a10", "00", 16,
     "Welcome.model is not UTF-8"},
    {WIRE_WELCOME, "4a01ff 2210101112131415161718191a1b1c1d1e1f 2a10", "00", 16,
     "Welcome.server is not UTF-8"},

    {WIRE_GOODBYE, "0818", "", 0, NULL},
    {WIRE_GOODBYE, "0819", "", 0, "Goodbye.code is 25"},
    {WIRE_GOODBYE, "12028080", "", 0, "Goodbye.text is not UTF-8"},

    {WIRE_SUBMIT, "", "", 0, "Submit has 0 of prompt_ids, prompt_text and messages"},
    {WIRE_SUBMIT, "1200 1a00", "", 0, "Submit has 0 of"},
    {WIRE_SUBMIT, "120105 1a0161", "", 0, "Submit has 2 of"},
    {WIRE_SUBMIT, "120105 2200", "", 0, "Submit has 2 of"},
    {WIRE_SUBMIT, "1a0161 2200", "", 0, "Submit has 2 of"},
    {WIRE_SUBMIT, "120105 1a0161 2200", "", 0, "Submit has 3 of"},
    {WIRE_SUBMIT, "120105 1a00", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 0a00", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 0a0f", "00", 15, "Submit.boot_id has 15 bytes"},
    {WIRE_SUBMIT, "1a0161 0a11", "00", 17, "Submit.boot_id has 17 bytes"},
    {WIRE_SUBMIT, "120b05" MINUS_1, "", 0, "Submit.prompt_ids[1] is -1"},
    {WIRE_SUBMIT, "1a02c3", "28", 1, "Submit.prompt_text is not UTF-8"},
    {WIRE_SUBMIT, "1a03eda080", "", 0, "Submit.prompt_text is not UTF-8"}, /* a surrogate */
    {WIRE_SUBMIT, "1a0100", "", 0, NULL}, /* NUL is a character */
    {WIRE_SUBMIT, "2200 22030a01ff", "", 0, "Submit.messages[1].role is not UTF-8"},
    {WIRE_SUBMIT, "2203120180", "", 0, "Submit.messages[0].content is not UTF-8"},
    {WIRE_SUBMIT, "", "22120a0475736572120a31323334353637383930", 1024, NULL},
    {WIRE_SUBMIT, "", "22090a0475736572120161", 1024, NULL}, /* however short they are */
    {WIRE_SUBMIT, "", "22120a0475736572120a31323334353637383930", 1025,
     "Submit.messages has 1025 items"},

    {WIRE_SUBMIT, "1a0161 2a05 0d0000c07f", "", 0, "Submit.sampling.temperature is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a05 0d0000807f", "", 0, "Submit.sampling.temperature is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a05 0d000080ff", "", 0, "Submit.sampling.temperature is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a05 0d0000c842", "", 0, NULL}, /* 100 */
    {WIRE_SUBMIT, "1a0161 2a05 0d0100c842", "", 0, "Submit.sampling.temperature is 100"},
    {WIRE_SUBMIT, "1a0161 2a05 0d000080bf", "", 0, "Submit.sampling.temperature is -1"},
    {WIRE_SUBMIT, "1a0161 2a05 1d0000c0ff", "", 0, "Submit.sampling.top_p is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a05 1d00000000", "", 0, "Submit.sampling.top_p is 0"},
    {WIRE_SUBMIT, "1a0161 2a05 1d0100803f", "", 0, "Submit.sampling.top_p is 1"},
    {WIRE_SUBMIT, "1a0161 2a05 25000080bf", "", 0, "Submit.sampling.min_p is -1"},
    {WIRE_SUBMIT, "1a0161 2a05 250000803f", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 2a05 250100803f", "", 0, "Submit.sampling.min_p is 1"},
    {WIRE_SUBMIT, "1a0161 2a05 250000c07f", "", 0, "Submit.sampling.min_p is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a05 2d00000000", "", 0, "Submit.sampling.repetition_penalty is 0"},
    {WIRE_SUBMIT, "1a0161 2a05 2d0100c842", "", 0, "Submit.sampling.repetition_penalty is 100"},
    {WIRE_SUBMIT, "1a0161 2a05 2d0000807f", "", 0, "Submit.sampling.repetition_penalty is not a"},
    {WIRE_SUBMIT, "1a0161 2a05 3500000040", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 2a05 3501000040", "", 0, "Submit.sampling.presence_penalty is 2"},
    {WIRE_SUBMIT, "1a0161 2a05 350000c07f", "", 0, "Submit.sampling.presence_penalty is not a"},
    {WIRE_SUBMIT, "1a0161 2a05 3d010000c0", "", 0, "Submit.sampling.frequency_penalty is -2"},
    {WIRE_SUBMIT, "1a0161 2a05 3d0000c07f", "", 0, "Submit.sampling.frequency_penalty is not a"},
    {WIRE_SUBMIT, "1a0161 2a8002", "4200", 128, NULL},
    {WIRE_SUBMIT, "1a0161 2a8202", "4200", 129, "Submit.sampling.bias has 129 items"},
    {WIRE_SUBMIT, "1a0161 2a0d420b08" MINUS_1, "", 0, "Submit.sampling.bias[0].token is -1"},
    {WIRE_SUBMIT, "1a0161 2a094200 4205150000807f", "", 0,
     "Submit.sampling.bias[1].bias is not a finite"},
    {WIRE_SUBMIT, "1a0161 2a074205150100c842", "", 0, "Submit.sampling.bias[0].bias is 100"},
    {WIRE_SUBMIT, "1a0161 2a074205150100c8c2", "", 0, "Submit.sampling.bias[0].bias is -100"},
    {WIRE_SUBMIT, "1a0161 2a025815", "", 0, "Submit.sampling.top_logprobs is 21"},

    {WIRE_SUBMIT, "1a0161", "320161", 16, NULL},
    {WIRE_SUBMIT, "1a0161", "320161", 17, "Submit.stop has 17 items"},
    {WIRE_SUBMIT, "1a0161 320161 3200", "", 0, "Submit.stop[1] is empty"},
    {WIRE_SUBMIT, "1a0161 328002", "61", 256, NULL},
    {WIRE_SUBMIT, "1a0161 328102", "61", 257, "Submit.stop[0] has 257 bytes"},
    {WIRE_SUBMIT, "1a0161 3201c3", "", 0, "Submit.stop[0] is not UTF-8"},
    {WIRE_SUBMIT, "1a0161 3a10", "01", 16, NULL},
    {WIRE_SUBMIT, "1a0161 3a11", "01", 17, "Submit.stop_ids has 17 items"},
    {WIRE_SUBMIT, "1a0161 3a0a" MINUS_1, "", 0, "Submit.stop_ids[0] is -1"},
    {WIRE_SUBMIT, "1a0161 4000", "", 0, "Submit.max_tokens is 0"},
    {WIRE_SUBMIT, "1a0161 4002 4802", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 4002 4803", "", 0, "Submit.min_tokens is 3"},
    {WIRE_SUBMIT, "1a0161 4803", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 5802", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 5803", "", 0, "Submit.priority is 3"},
    {WIRE_SUBMIT, "1a0161 6800", "", 0, "Submit.n is 0"},
    {WIRE_SUBMIT, "1a0161 6810", "", 0, NULL},
    {WIRE_SUBMIT, "1a0161 6811", "", 0, "Submit.n is 17"},
    {WIRE_SUBMIT, "1a0161 7a40", "61", 64, NULL},
    {WIRE_SUBMIT, "1a0161 7a41", "61", 65, "Submit.tag has 65 bytes"},
    {WIRE_SUBMIT, "1a0161 7a01ff", "", 0, "Submit.tag is not UTF-8"},

    {WIRE_REJECTED, "", "", 0, "Rejected.code is 0"},
    {WIRE_REJECTED, "0819", "", 0, "Rejected.code is 25"},
    {WIRE_REJECTED, "0801 1201ff", "", 0, "Rejected.text is not UTF-8"},
    {WIRE_FAILED, "", "", 0, "Failed.code is 0"},
    {WIRE_FAILED, "08ffffffff0f", "", 0, "Failed.code is 4294967295"},
    {WIRE_FAILED, "0801 1201ff", "", 0, "Failed.text is not UTF-8"},

    {WIRE_TOKEN_CHUNK, "080f", "", 0, NULL},
    {WIRE_TOKEN_CHUNK, "0810", "", 0, "TokenChunk.choice is 16"},
    {WIRE_TOKEN_CHUNK, "1a0a" MINUS_1, "", 0, "TokenChunk.ids[0] is -1"},
    {WIRE_TOKEN_CHUNK, "2202e282", "", 0, "TokenChunk.text is not UTF-8"}, /* half a character */
    {WIRE_TOKEN_CHUNK, "1a020101 2a00 2a00", "", 0, NULL},
    {WIRE_TOKEN_CHUNK, "1a020101 2a00", "", 0, "TokenChunk.logprobs has 1 items"},
    {WIRE_TOKEN_CHUNK, "1a0101 2a050d000080ff", "", 0,
     "TokenChunk.logprobs[0].logprob is not a finite"},
    {WIRE_TOKEN_CHUNK, "1a020101 2a00 2a07120515000080ff", "", 0,
     "TokenChunk.logprobs[1].top[0].logprob is not a finite"},
    {WIRE_TOKEN_CHUNK, "1a0101 2a0f1200 120b08" MINUS_1, "", 0,
     "TokenChunk.logprobs[0].top[1].token is -1"},
    {WIRE_TOKEN_CHUNK, "1a0101 2a28", "1200", 20, NULL},
    {WIRE_TOKEN_CHUNK, "1a0101 2a2a", "1200", 21, "TokenChunk.logprobs[0].top has 21 items"},

    {WIRE_FINISHED, "0a00", "", 0, "Finished.choices[0].reason is 0"},
    {WIRE_FINISHED, "0a021001 0a021005", "", 0, "Finished.choices[1].reason is 5"},
    {WIRE_FINISHED, "0a04 0810 1001", "", 0, "Finished.choices[0].index is 16"},
    {WIRE_FINISHED, "0a05 1001 3201ff", "", 0, "Finished.choices[0].stop is not UTF-8"},
    {WIRE_FINISHED, "0a0d 1001 38" MINUS_1, "", 0, "Finished.choices[0].stop_id is -1"},
    {WIRE_FINISHED, "", "0a021004", 16, NULL},
    {WIRE_FINISHED, "", "0a021004", 17, "Finished.choices has 17 items"},
    {WIRE_FINISHED, "2a09 09000000000000f87f", "", 0, "Finished.timings.queue is not a finite"},
    {WIRE_FINISHED, "2a09 11000000000000f07f", "", 0, "Finished.timings.prefill is not a finite"},
    {WIRE_FINISHED, "2a09 19000000000000f0ff", "", 0, "Finished.timings.decode is not a finite"},

    {WIRE_MODEL_INFO_RESULT, "0a01ff", "", 0, "ModelInfoResult.name is not UTF-8"},
    {WIRE_MODEL_INFO_RESULT, "1201ff", "", 0, "ModelInfoResult.architecture is not UTF-8"},
    {WIRE_MODEL_INFO_RESULT, "1a01ff", "", 0, "ModelInfoResult.backend is not UTF-8"},
    {WIRE_MODEL_INFO_RESULT, "6201ff", "", 0, "ModelInfoResult.quantization is not UTF-8"},
    {WIRE_MODEL_INFO_RESULT, "58feffffffffffffffff01", "", 0, "ModelInfoResult.eos_id is -2"},
    {WIRE_HEALTH_RESULT, "1801", "", 0, "HealthResult.state is 1"},
    {WIRE_HEALTH_RESULT, "1811", "", 0, NULL}, /* ENGINE_LOST */
    {WIRE_STATS_RESULT, "0a00 0a030a01ff", "", 0, "StatsResult.counters[1].name is not UTF-8"},
    {WIRE_STATS_RESULT, "0a09 11000000000000f07f", "", 0,
     "StatsResult.counters[0].value is not a finite"},
    {WIRE_TOKENIZE, "", "", 0, "Tokenize has 0 of text and messages"},
    {WIRE_TOKENIZE, "0a00 1200", "", 0, "Tokenize has 2 of text and messages"},
    {WIRE_TOKENIZE, "0a01ff", "", 0, "Tokenize.text is not UTF-8"},
    {WIRE_TOKENIZE, "12030a01ff", "", 0, "Tokenize.messages[0].role is not UTF-8"},
    {WIRE_TOKENIZE, "", "12090a0475736572120161", 1024, NULL},
    {WIRE_TOKENIZE, "", "12120a0475736572120a31323334353637383930", 1025,
     "Tokenize.messages has 1025 items"},
    {WIRE_TOKENIZE_RESULT, "0a0a" MINUS_1, "", 0, "TokenizeResult.ids[0] is -1"},
    {WIRE_DETOKENIZE, "0a0b01" MINUS_1, "", 0, "Detokenize.ids[1] is -1"},

    /* What the wire form itself forbids. */
    {WIRE_PING, "08", "", 0, "Ping is not well-formed"},
    {WIRE_PING, "0d00000000", "", 0, "Ping is not well-formed"}, /* four bytes for a varint */
    {WIRE_PING, "08ffffffffffffffffffff01", "", 0, "Ping is not well-formed"},
    {WIRE_PING, "0f", "", 0, "Ping is not well-formed"}, /* no such wire type */
    {WIRE_SUBMIT, "1a8080808010", "", 0, "Submit is not well-formed"},
    {WIRE_SUBMIT, "1a0161 2a020d00", "", 0, "Submit is not well-formed"},

    /* Unknown fields: field 100 as a varint. */
    {WIRE_BYE, "", "a00600", 16, NULL},
    {WIRE_BYE, "", "a00600", 17, "Bye has unknown fields"},
    {WIRE_SUBMIT, "1a0161 2a1b a00600 a00600 a00600 a00600 a00600 a00600 a00600 a00600 a00600",
     "a00600", 7, NULL},
    {WIRE_SUBMIT, "1a0161 2a1b a00600 a00600 a00600 a00600 a00600 a00600 a00600 a00600 a00600",
     "a00600", 8, "Submit.sampling has unknown fields"},
};

static void test_rules(void **state) {
    (void)state;
    for (size_t i = 0; i < N(rules); i++) {
        size_t n;
        uint8_t *p = build(rules[i].body, rules[i].unit, rules[i].count, &n);
        struct error e = {0};
        struct wire_msg m = {.request_id = 99};
        enum status st = decode(rules[i].type, p, n, &e, &m);
        free(p);
        if (!rules[i].says) {
            if (st != ST_OK) fail_msg("rule %zu (%s): refused: %s", i, rules[i].body, e.text);
            continue;
        }
        if (st != ST_INVALID) fail_msg("rule %zu: %s, not INVALID", i, status_name(st));
        assert_int_equal(e.code, ST_INVALID);
        if (!strstr(e.text, rules[i].says))
            fail_msg("rule %zu: '%s' does not say '%s'", i, e.text, rules[i].says);
        assert_true(m.request_id == 99); /* untouched */
        assert_int_equal(arena.used_bytes, 0);
    }
}

static void test_envelope(void **state) {
    (void)state;
    struct error e = {0};
    struct wire_msg m;
    assert_int_equal(decode((enum wire_type)99, NULL, 0, &e, &m), ST_UNIMPLEMENTED);
    assert_non_null(strstr(e.text, "99"));
    struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, WIRE_PING, 3, 1};
    assert_int_equal(wire_decode(&h, "\x08\x01", 2, &arena, &e, &m), ST_INVALID);
    assert_non_null(strstr(e.text, "body_bytes is 3: the body has 2"));
    uint8_t *big = calloc(1, WIRE_MAX_BODY_BYTES + 1);
    assert_int_equal(decode(WIRE_PING, big, WIRE_MAX_BODY_BYTES + 1, &e, &m), ST_TOO_LARGE);
    free(big);
}

/* Defaults of everything that a Submit may leave out. */
static void test_defaults(void **state) {
    (void)state;
    struct wire_msg m;
    assert_int_equal(decode(WIRE_SUBMIT, (const uint8_t *)"\x1a\x01x", 3, NULL, &m), ST_OK);
    const struct wire_submit *s = &m.submit;
    assert_int_equal(s->boot_id.n, 0);
    assert_int_equal(s->prompt_text.n, 1);
    assert_int_equal(s->prompt_text.p[0], 'x');
    assert_true(s->sampling.temperature == 1 && s->sampling.top_p == 1 && s->sampling.min_p == 0);
    assert_true(s->sampling.repetition_penalty == 1 && s->sampling.presence_penalty == 0 &&
                s->sampling.frequency_penalty == 0);
    assert_int_equal(s->sampling.top_k, 0);
    assert_false(s->sampling.has_seed || s->sampling.logprobs || s->has_max_tokens);
    assert_int_equal(s->n_stop + s->n_stop_ids + s->sampling.n_bias + s->sampling.top_logprobs, 0);
    assert_int_equal(s->priority, 1);
    assert_int_equal(s->n, 1);
    assert_int_equal(s->ttl_ms, 0);
    assert_int_equal(s->min_tokens, 0);
    assert_true(s->parse_special);
    assert_false(s->ignore_eos);
}

/* Not defaults but consequences: top_logprobs asks for logprobs; a submessage that comes twice is
 * one. */
static void test_consequences(void **state) {
    (void)state;
    struct wire_msg m;
    size_t n;
    uint8_t *p = build("1a0161 2a025801", "", 0, &n);
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_OK);
    assert_true(m.submit.sampling.logprobs);
    free(p);
    p = build("1a0161 2a09 0d00000040 42020805 2a06 1005 42020806", "", 0, &n);
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_OK);
    assert_true(m.submit.sampling.temperature == 2);
    assert_int_equal(m.submit.sampling.top_k, 5);
    assert_int_equal(m.submit.sampling.n_bias, 2);
    assert_int_equal(m.submit.sampling.bias[0].token, 5);
    assert_int_equal(m.submit.sampling.bias[1].token, 6);
    free(p);
    p = build("12020506 100708ff01", "", 0,
              &n); /* packed and not: one list; boot_id's number as varint */
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_INVALID);
    free(p);
    p = build("12020506 1007", "", 0, &n);
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_OK);
    assert_int_equal(m.submit.n_prompt_ids, 3);
    assert_int_equal(m.submit.prompt_ids[2], 7);
    free(p);
}

/* Memory that is given back may only be used again for what fits: a tag that comes twice frees the
 * first one's byte before the submessage with more than 16 fields asks for a table. */
static void test_reuse(void **state) {
    (void)state;
    struct wire_msg m;
    size_t n;
    uint8_t *p = build("1a0161 7a0162 7a0163 2a58", "42020807", 22, &n);
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_OK);
    assert_int_equal(m.submit.tag.p[0], 'c');
    assert_int_equal(m.submit.sampling.n_bias, 22);
    for (int i = 0; i < 22; i++) assert_int_equal(m.submit.sampling.bias[i].token, 7);
    assert_true(m.submit.sampling.top_p == 1);
    free(p);
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* True if no byte at or above `from` was ever written (the arena's pages start as zeros). */
static bool untouched(const struct arena *a, size_t from) {
    for (size_t i = from; i < a->cap_bytes; i++)
        if (a->base[i]) return false;
    return true;
}

/* Small inputs that protobuf-c blows up: they fail, and never write past their budget. */
static void test_amplification(void **state) {
    (void)state;
    static const struct {
        enum wire_type type;
        const char *unit;
    } bad[] = {
        {WIRE_PING, "7800"}, /* unknown fields */
        {WIRE_SUBMIT, "2200"}, /* empty messages of a list */
        {WIRE_SUBMIT, "2a00"}, /* one submessage, again and again */
        {WIRE_SUBMIT, "2a024200"}, /* and with a list that merging copies */
        {WIRE_STATS_RESULT, "0a00"}, /* no count cap of its own */
        {WIRE_DETOKENIZE, "0801"}, /* a packed list, unpacked */
    };
    for (size_t i = 0; i < N(bad); i++) {
        size_t n;
        uint8_t *p = build("", bad[i].unit, (1 << 20) / (int)(strlen(bad[i].unit) / 2), &n);
        assert_int_equal(n, 1 << 20);
        struct arena own;
        struct error e = {0};
        struct wire_msg m;
        struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, (uint16_t)bad[i].type, (uint32_t)n, 1};
        assert_int_equal(arena_create(WIRE_ARENA_BYTES, &own), ST_OK);
        assert_int_equal(wire_decode(&h, p, n, &own, &e, &m), ST_TOO_LARGE);
        assert_non_null(strstr(e.text, wire_type_name(bad[i].type)));
        assert_int_equal(own.used_bytes, 0);
        assert_true(untouched(&own, 8 * n + WIRE_BUDGET_BYTES));
        arena_destroy(&own);
        free(p);
    }
}

/* The budget is counted from the arena's mark, ends where the arena ends, and is 32 MiB at most. */
static void test_budget(void **state) {
    (void)state;
    struct wire_msg m;
    size_t n;
    uint8_t *p = build("1aa01f", "61", 4000, &n);
    struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, WIRE_SUBMIT, (uint32_t)n, 1};
    struct arena small;
    assert_int_equal(arena_create(8192, &small), ST_OK);
    assert_int_equal(wire_decode(&h, p, n, &small, NULL, &m), ST_OK);
    size_t used = small.used_bytes;
    assert_true(used > 4000);
    assert_int_equal(wire_decode(&h, p, n, &small, NULL, &m), ST_TOO_LARGE);
    assert_int_equal(small.used_bytes, used);
    arena_destroy(&small);
    free(p);
    /* The most of what a client may send, packed: a token per byte, 4 bytes each when decoded. */
    p = build("12fbffff01", "01", WIRE_MAX_BODY_BYTES - 5, &n);
    assert_int_equal(n, WIRE_MAX_BODY_BYTES);
    assert_int_equal(decode(WIRE_SUBMIT, p, n - 1, NULL, &m), ST_INVALID);
    assert_int_equal(decode(WIRE_SUBMIT, p, n, NULL, &m), ST_OK);
    assert_int_equal(m.submit.n_prompt_ids, WIRE_MAX_BODY_BYTES - 5);
    assert_true(arena.used_bytes <= (size_t)32 << 20);
    free(p);
}

/* Lists as long as coalescing makes them: 20 candidates for each of 2,040 tokens, with small ids,
 * which is where bytes are fewest for the memory that they need. (2,033 fields double protobuf-c's
 * table.) */
static void test_large_chunk(void **state) {
    (void)state;
    enum { T = 2040 };
    static int32_t ids[T];
    static struct wire_token_logprob lp[T];
    struct wire_top_logprob top[WIRE_MAX_TOP_LOGPROBS];
    for (int i = 0; i < WIRE_MAX_TOP_LOGPROBS; i++) top[i] = (struct wire_top_logprob){1 + i, -1};
    for (int i = 0; i < T; i++) lp[i] = (struct wire_token_logprob){-1, top, WIRE_MAX_TOP_LOGPROBS};
    struct wire_msg m = {.type = WIRE_TOKEN_CHUNK,
                         .chunk = {.ids = ids, .n_ids = T, .logprobs = lp, .n_logprobs = T}};
    uint8_t *p = malloc(WIRE_MAX_BODY_BYTES);
    size_t n;
    assert_int_equal(wire_encode(&m, &scratch, p, WIRE_MAX_BODY_BYTES, &n), ST_OK);
    struct error error = {0}, *e = &error;
    assert_ok(decode(WIRE_TOKEN_CHUNK, p, n, e, &m), e);
    assert_int_equal(m.chunk.logprobs[T - 1].top[19].token, 20);
    free(p);
}

static void test_encode_limits(void **state) {
    (void)state;
    struct wire_msg m = {.type = WIRE_DETOKENIZE_RESULT};
    uint8_t dst[64];
    size_t n;
    m.text.text = (struct bytes){(const uint8_t *)"0123456789", 10};
    memset(dst, 0xAA, sizeof dst);
    assert_int_equal(wire_encode(&m, &scratch, dst, 11, &n), ST_TOO_LARGE);
    assert_int_equal(n, 12);
    for (size_t i = 0; i < sizeof dst; i++) assert_int_equal(dst[i], 0xAA);
    assert_int_equal(wire_encode(&m, &scratch, dst, 12, &n), ST_OK);
    assert_int_equal(dst[12], 0xAA);
    /* Scratch: above its mark, and given back. */
    struct arena small;
    assert_int_equal(arena_create(4096, &small), ST_OK);
    assert_non_null(arena_alloc(&small, 4000));
    assert_int_equal(wire_encode(&m, &small, dst, sizeof dst, &n), ST_OK);
    assert_int_equal(small.used_bytes, 4000);
    assert_non_null(arena_alloc(&small, 80));
    assert_int_equal(wire_encode(&m, &small, dst, sizeof dst, &n), ST_TOO_LARGE);
    assert_int_equal(n, 0);
    assert_int_equal(small.used_bytes, 4080);
    arena_destroy(&small);
    /* No frame that the other side's header check would refuse. */
    uint8_t *big = calloc(2, WIRE_MAX_BODY_BYTES);
    m.text.text = (struct bytes){big, WIRE_MAX_BODY_BYTES};
    assert_int_equal(wire_encode(&m, &scratch, big, 2 * (size_t)WIRE_MAX_BODY_BYTES, &n),
                     ST_TOO_LARGE);
    assert_int_equal(n, WIRE_MAX_BODY_BYTES + 5);
    free(big);
}

/* True if encoding m ends the process with abort. */
static bool encode_aborts(const struct wire_msg *m) {
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        uint8_t dst[64];
        size_t n;
        close(STDERR_FILENO);
        wire_encode(m, &scratch, dst, sizeof dst, &n);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static void test_encode_checks(void **state) {
    (void)state;
    struct wire_msg m = {.type = WIRE_SUBMIT, .submit = {.n_stop = WIRE_MAX_STOPS + 1}};
    assert_true(encode_aborts(&m));
    m.submit.n_stop = 0;
    assert_false(encode_aborts(&m));
    m.submit.n_stop_ids = WIRE_MAX_STOPS + 1;
    assert_true(encode_aborts(&m));
    m.type = (enum wire_type)1;
    assert_true(encode_aborts(&m));
}

static void test_names(void **state) {
    (void)state;
    assert_string_equal(wire_type_name(WIRE_SUBMIT), "Submit");
    assert_string_equal(wire_type_name(WIRE_TOKEN_CHUNK), "TokenChunk");
    assert_string_equal(wire_type_name((enum wire_type)0), "?");
    assert_string_equal(wire_reason_name(REASON_STOP), "stop");
    assert_string_equal(wire_reason_name(REASON_LENGTH), "length");
    assert_string_equal(wire_reason_name(REASON_CANCELLED), "cancelled");
    assert_string_equal(wire_reason_name(REASON_TIMEOUT), "timeout");
    assert_string_equal(wire_reason_name((enum wire_reason)0), "?");
    /* "foob" of the FNV test suite, as one little-endian id. */
    assert_true(wire_hash_id(WIRE_HASH_START, 0x626f6f66) == UINT64_C(0xdd120e790c2512af));
    assert_true(wire_hash_id(WIRE_HASH_START, -1) != wire_hash_id(WIRE_HASH_START, 255));
}

static int setup(void **state) {
    (void)state;
    return arena_create(WIRE_ARENA_BYTES, &arena) || arena_create(8 << 20, &scratch);
}

static int teardown(void **state) {
    (void)state;
    arena_destroy(&arena);
    arena_destroy(&scratch);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_header),        cmocka_unit_test(test_header_refused),
        cmocka_unit_test(test_rules),         cmocka_unit_test(test_envelope),
        cmocka_unit_test(test_defaults),      cmocka_unit_test(test_consequences),
        cmocka_unit_test(test_reuse),         cmocka_unit_test(test_amplification),
        cmocka_unit_test(test_budget),        cmocka_unit_test(test_large_chunk),
        cmocka_unit_test(test_encode_limits), cmocka_unit_test(test_encode_checks),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests_name("wire", tests, setup, teardown);
}
