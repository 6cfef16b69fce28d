/* text: encoding against the reference tokenizer, decoding and streaming, hostile texts and files.
 *
 * The oracles: Hugging Face tokenizers' encodings in tests/data (*-reference.jsonl, text-hard.jsonl, made by
 * tests/make_text.py), and utf8proc for NFC. */
#include "tests/support.h"

#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utf8proc.h>

#include "moe/text_internal.h"
#include "tests/text_fixture.h"

enum { MB = 1 << 20 };

static struct text *open_text(const char *path) {
    struct error e = {0};
    struct text *t = NULL;
    assert_ok(text_open(path, NULL, &e, &t), &e);
    return t;
}

/* NFC by utf8proc; free the result. */
static uint8_t *nfc_of(const void *s, size_t n, size_t *n_out) {
    utf8proc_uint8_t *p = NULL;
    utf8proc_ssize_t k =
        utf8proc_map(s, (utf8proc_ssize_t)n, &p, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    assert_true(k >= 0);
    *n_out = (size_t)k;
    return p;
}

/* A random character, drawn often from where normalisation and word cutting have their corners. */
static size_t random_char(uint64_t *seed, char *dst) {
    static const struct {
        uint32_t lo, hi;
    } ranges[] = {{0x20, 0x7E},     {0x09, 0x0D},       {'a', 'z'},         {'0', '9'},
                  {0xA0, 0x17F},    {0x300, 0x36F},     {0x591, 0x5C7},     {0x900, 0x97F},
                  {0x1100, 0x11FF}, {0x1E00, 0x1FFF},   {0x2000, 0x206F},   {0xAC00, 0xD7A3},
                  {0xF900, 0xFAFF}, {0x1D15E, 0x1D164}, {0x1F300, 0x1F6FF}, {1, 0x10FFFF}};
    uint32_t cp;
    do {
        uint64_t r = test_random(seed);
        size_t i = r % (sizeof ranges / sizeof *ranges);
        cp = ranges[i].lo + (uint32_t)((r >> 16) % (ranges[i].hi - ranges[i].lo + 1));
    } while (cp >= 0xD800 && cp < 0xE000);
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)cp, (utf8proc_uint8_t *)dst);
}

/* ---- encoding against the reference ------------------------------------------------------------------ */

static void assert_ids(const struct text *t, const char *what, json_t *line, bool parse_special) {
    json_t *text = json_object_get(line, "text"), *want = json_object_get(line, what);
    const char *s = json_string_value(text);
    size_t len = json_string_length(text), n, cap = 4 * len + 1;
    assert_non_null(s);
    assert_true(json_is_array(want));
    int32_t *ids = malloc(cap * sizeof *ids);
    assert_int_equal(text_encode(t, s, len, parse_special, ids, cap, &n), ST_OK);
    bool same = n == json_array_size(want);
    for (size_t i = 0; same && i < n; i++)
        same = ids[i] == json_integer_value(json_array_get(want, i));
    if (!same)
        fail_msg("%s of \"%s\": %zu ids instead of %zu, or others", what, s, n,
                 json_array_size(want));

    size_t n_nfc, n_back;
    uint8_t *nfc = nfc_of(s, len, &n_nfc);
    char *back = malloc(n_nfc + 1);
    assert_int_equal(text_decode(t, ids, n, false, false, back, n_nfc, &n_back), ST_OK);
    assert_int_equal(n_back, n_nfc);
    assert_memory_equal(back, nfc, n_nfc);
    free(back);
    free(nfc);
    free(ids);
}

static size_t check_lines(const struct text *t, const char *path, const char *vocab) {
    FILE *f = fopen(path, "r");
    if (!f) fail_msg("cannot open %s", path);
    char *line = NULL;
    size_t cap = 0, n = 0;
    while (getline(&line, &cap, f) > 0) {
        json_t *j = json_loads(line, JSON_ALLOW_NUL, NULL);
        assert_non_null(j);
        const char *only = json_string_value(json_object_get(j, "vocab"));
        if (!only || strcmp(only, vocab) == 0) {
            assert_ids(t, "ids", j, true);
            assert_ids(t, "plain", j, false);
            n++;
        }
        json_decref(j);
    }
    free(line);
    fclose(f);
    return n;
}

static void test_reference_qwen3(void **state) {
    (void)state;
    struct text *t = open_text(QWEN3_VOCAB);
    assert_int_equal(text_n_vocab(t), 151936);
    assert_int_equal(check_lines(t, TEST_DATA "/qwen3-reference.jsonl", "qwen3"), 274);
    assert_int_equal(check_lines(t, TEST_DATA "/text-hard.jsonl", "qwen3"), 150);
    text_close(t);
}

static void test_reference_tiny(void **state) {
    (void)state;
    struct text *t = open_text(TINY_MODEL);
    assert_int_equal(text_n_vocab(t), 8192);
    assert_int_equal(check_lines(t, TEST_DATA "/tiny-reference.jsonl", "tiny"), 274);
    assert_int_equal(check_lines(t, TEST_DATA "/text-hard.jsonl", "tiny"), 150);
    text_close(t);
}

static void test_limits(void **state) {
    (void)state;
    struct text *t = open_text(TINY_MODEL);
    int32_t ids[64];
    size_t n = 0, k = 12345;
    static const char *const bad[] = {"\x80", "ab\xC3", "\xED\xA0\x80", "\xF4\x90\x80\x80",
                                      "\xC0\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(text_encode(t, bad[i], strlen(bad[i]), true, ids, 64, &k), ST_INVALID);
        assert_int_equal(text_encode(t, bad[i], strlen(bad[i]), false, ids, 64, &k), ST_INVALID);
    }
    static const char s[] =
        "one two<|im_end|>\n  aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa \0.";
    assert_int_equal(text_encode(t, s, sizeof s - 1, true, ids, 64, &n), ST_OK);
    assert_int_equal(text_encode(t, s, sizeof s - 1, true, ids, n, &k), ST_OK);
    assert_int_equal(k, n);
    k = 12345;
    for (size_t cap = 0; cap < n; cap++) {
        int32_t *small = malloc((cap + 1) * sizeof *small); /* the sanitizer watches its end */
        small[cap] = -7;
        assert_int_equal(text_encode(t, s, sizeof s - 1, true, small, cap, &k), ST_TOO_LONG);
        assert_int_equal(small[cap], -7);
        free(small);
    }
    assert_int_equal(k, 12345);
    assert_int_equal(text_encode(t, NULL, 0, true, NULL, 0, &k), ST_OK);
    assert_int_equal(k, 0);
    text_close(t);
}

/* ---- NFC ---------------------------------------------------------------------------------------------- */

static void assert_nfc(const char *s, size_t n) {
    size_t n_want;
    uint8_t *want = nfc_of(s, n, &n_want), *owned;
    struct bytes got;
    assert_int_equal(nfc_normalize(s, n, &got, &owned), ST_OK);
    assert_int_equal(got.n, n_want);
    assert_memory_equal(got.p, want, n_want);
    free(owned);
    free(want);
}

static void test_nfc_random(void **state) {
    (void)state;
    uint64_t seed = 1;
    for (int round = 0; round < 20000; round++) {
        char s[400];
        size_t n = 0, chars = test_random(&seed) % 80;
        for (size_t i = 0; i < chars; i++) n += random_char(&seed, s + n);
        assert_nfc(s, n);
    }
}

/* Runs of marks of many classes, shorter and longer than what is sorted by insertion. */
static void test_nfc_marks(void **state) {
    (void)state;
    static const char *const marks[] = {"\xCC\x80", "\xCC\x96",     "\xCC\xB4",
                                        "\xCC\xA1", "\xCD\x85",     "\xD6\xB0",
                                        "\xCC\x88", "\xE3\x82\x99", "\xCD\x9C"};
    uint64_t seed = 2;
    for (size_t len = 0; len < 300; len++) {
        char s[1000] = "e";
        size_t n = 1;
        for (size_t i = 0; i < len; i++) {
            const char *m = marks[test_random(&seed) % (sizeof marks / sizeof *marks)];
            memcpy(s + n, m, strlen(m));
            n += strlen(m);
        }
        assert_nfc(s, n);
    }
}

/* ---- long texts of one kind --------------------------------------------------------------------------- */

static char *repeat(const char *unit, size_t n_bytes, size_t *n) {
    size_t len = strlen(unit), times = n_bytes / len;
    char *s = malloc(len * times + 1);
    for (size_t i = 0; i < times; i++) memcpy(s + i * len, unit, len);
    *n = len * times;
    return s;
}

static void assert_round_trip(const struct text *t, const char *s, size_t n, const void *want,
                              size_t n_want) {
    int32_t *ids = malloc((3 * n + 1) * sizeof *ids);
    char *back = malloc(n_want + 1);
    size_t n_ids, n_back;
    assert_int_equal(text_encode(t, s, n, true, ids, 3 * n + 1, &n_ids), ST_OK);
    assert_int_equal(text_decode(t, ids, n_ids, false, true, back, n_want, &n_back), ST_OK);
    assert_int_equal(n_back, n_want);
    assert_memory_equal(back, want, n_want);
    free(back);
    free(ids);
}

static void test_megabytes(void **state) {
    (void)state;
    static const char *const units[] = {"a",
                                        " ",
                                        "\n",
                                        "\t",
                                        "0",
                                        "'",
                                        "<",
                                        "<|im_start|",
                                        "\xF0\x9F\x98\x80",
                                        "\xE6\xBC\xA2",
                                        "\xCC\x81",
                                        "e\xCC\x81",
                                        " \n",
                                        "\r\n ",
                                        "ab",
                                        "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8",
                                        "\xF0\x9D\x85\xA0",
                                        "\xE0\xBC\xB8",
                                        "\xC2\xA0",
                                        "!",
                                        "'s",
                                        "\xF0\x9F\x91\xA9\xE2\x80\x8D",
                                        "Ab1 "};
    struct text *t = open_text(QWEN3_VOCAB);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        size_t n, n_want;
        char *s = repeat(units[i], MB, &n);
        uint8_t *want = nfc_of(s, n, &n_want);
        assert_round_trip(t, s, n, want, n_want);
        free(want);
        free(s);
    }
    text_close(t);
}

/* Canonical order turned upside down over half a million marks, which is too much for utf8proc's own
 * sort: the answer is written out here. */
static void test_megabyte_of_marks(void **state) {
    (void)state;
    enum { K = MB / 4 };
    char *s = malloc(1 + 4 * K), *want = malloc(2 + 4 * K);
    size_t n = 0, n_want = 0;
    s[n++] = 'a';
    for (int i = 0; i < K; i++, n += 2) memcpy(s + n, "\xCC\x80", 2);
    for (int i = 0; i < K; i++, n += 2) memcpy(s + n, "\xCC\x96", 2);
    memcpy(want, "\xC3\xA0", 2);
    n_want = 2;
    for (int i = 0; i < K; i++, n_want += 2) memcpy(want + n_want, "\xCC\x96", 2);
    for (int i = 1; i < K; i++, n_want += 2) memcpy(want + n_want, "\xCC\x80", 2);
    struct text *t = open_text(QWEN3_VOCAB);
    assert_round_trip(t, s, n, want, n_want);
    text_close(t);
    free(want);
    free(s);
}

/* Interpreted matching cuts as generated code does, within its limits. */
static void test_split_interpreted(void **state) {
    (void)state;
    static const char *const units[] = {" ",    "a", "\n",           " \n",
                                        "   x", "'", "\xE3\x80\x80", "!\r\n"};
    struct splitter jit = {0}, plain = {0};
    struct bytes pre = FIXTURE_BYTES("qwen2");
    assert_int_equal(splitter_open(pre, true, NULL, &jit), ST_OK);
    assert_int_equal(splitter_open(pre, false, NULL, &plain), ST_OK);
    uint64_t seed = 3;
    for (size_t i = 0; i < 200 + sizeof units / sizeof *units; i++) {
        char *s;
        size_t n = 0;
        if (i >= 200) {
            s = repeat(units[i - 200], MB, &n);
        } else {
            s = malloc(4 * 100);
            for (int k = 0; k < 100; k++) n += random_char(&seed, s + n);
        }
        struct split a, b;
        struct bytes x, y;
        assert_int_equal(split_start(&jit, s, n, &a), ST_OK);
        assert_int_equal(split_start(&plain, s, n, &b), ST_OK);
        size_t total = 0;
        do {
            assert_int_equal(split_next(&a, &x), ST_OK);
            assert_int_equal(split_next(&b, &y), ST_OK);
            assert_ptr_equal(x.p, y.p);
            assert_int_equal(x.n, y.n);
            assert_true(utf8_valid(x.p, x.n));
            total += x.n;
        } while (x.n > 0);
        assert_int_equal(total, n);
        split_end(&a);
        split_end(&b);
        free(s);
    }
    splitter_close(&jit);
    splitter_close(&plain);
}

/* ---- decoding and streaming ---------------------------------------------------------------------------- */

/* Pushing ids one by one gives the text of decoding them at once, and whole characters at every step. */
static void assert_stream(const struct text *t, const int32_t *ids, size_t n) {
    size_t cap = n * TEXT_STREAM_MAX_BYTES + 3, n_whole, n_got = 0;
    char *whole = malloc(cap), *got = malloc(cap + TEXT_STREAM_MAX_BYTES);
    assert_int_equal(text_decode(t, ids, n, true, true, whole, cap, &n_whole), ST_OK);
    struct text_stream s = {0};
    for (size_t i = 0; i < n; i++) {
        size_t k = text_stream_push(t, &s, ids[i], got + n_got);
        assert_true(k <= TEXT_STREAM_MAX_BYTES);
        assert_true(utf8_valid(got + n_got, k));
        assert_true(s.n_pending <= 3);
        n_got += k;
    }
    n_got += text_stream_finish(&s, got + n_got);
    assert_int_equal(s.n_pending, 0);
    assert_int_equal(text_stream_finish(&s, got + n_got), 0);
    assert_int_equal(n_got, n_whole);
    assert_memory_equal(got, whole, n_got);
    free(whole);
    free(got);
}

static void test_stream_random_ids(void **state) {
    (void)state;
    uint64_t seed = 4;
    const char *const files[] = {TINY_MODEL, QWEN3_VOCAB};
    for (int f = 0; f < 2; f++) {
        struct text *t = open_text(files[f]);
        uint32_t n_vocab = (uint32_t)text_n_vocab(t);
        for (int round = 0; round < 4000; round++) {
            int32_t ids[24];
            size_t n = test_random(&seed) % 25;
            for (size_t i = 0; i < n; i++) {
                uint64_t r = test_random(&seed);
                if (r % 3 == 0)
                    ids[i] = (int32_t)(94 + r / 3 % 162); /* tokens of single bytes */
                else if (r % 31 == 0)
                    ids[i] = (int32_t)(n_vocab - 3 + r / 31 % 5);
                else
                    ids[i] = (int32_t)(r / 3 % n_vocab);
            }
            assert_stream(t, ids, n);
        }
        text_close(t);
    }
}

/* Random characters as single bytes: the text is cut inside every character, and comes out whole. */
static void test_stream_cut_characters(void **state) {
    (void)state;
    struct fixture f = FIXTURE_DEFAULT; /* byte b has id b */
    size_t n_file;
    uint8_t *file = fixture_build(&f, &n_file);
    char *path = test_write_temp(file, n_file);
    struct text *t = open_text(path);
    uint64_t seed = 5;
    for (int round = 0; round < 3000; round++) {
        char s[200], got[4096];
        int32_t ids[200];
        size_t n = 0, n_got = 0, chars = test_random(&seed) % 40;
        for (size_t i = 0; i < chars; i++) n += random_char(&seed, s + n);
        for (size_t i = 0; i < n; i++) ids[i] = (uint8_t)s[i];
        struct text_stream stream = {0};
        for (size_t i = 0; i < n; i++) n_got += text_stream_push(t, &stream, ids[i], got + n_got);
        n_got += text_stream_finish(&stream, got + n_got);
        assert_int_equal(n_got, n);
        assert_memory_equal(got, s, n);
        for (size_t i = 0; i < n; i++) /* now with damage */
            if (test_random(&seed) % 8 == 0) ids[i] = (int32_t)(test_random(&seed) % 256);
        assert_stream(t, ids, n);
    }
    text_close(t);
    unlink(path);
    free(path);
    free(file);
}

/* Unicode's own examples of maximal subparts (section 3.9, tables 3-8 to 3-11). */
static void test_replacement(void **state) {
    (void)state;
    static const struct {
        const char *bytes, *text;
    } cases[] = {
#define R "\xEF\xBF\xBD"
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", R R R R R R R R "A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", R R R R R R R R "A"},
        {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", R R R R R "A" R R "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", R R R R "A"},
        {"\xF0\x9F\x98", R},
        {"x\xE2\x82", "x" R},
        {"x\xC3", "x" R},
#undef R
    };
    struct fixture f = FIXTURE_DEFAULT;
    size_t n_file;
    uint8_t *file = fixture_build(&f, &n_file);
    char *path = test_write_temp(file, n_file);
    struct text *t = open_text(path);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t ids[16];
        char got[64];
        size_t n = strlen(cases[i].bytes), n_got, want = strlen(cases[i].text);
        for (size_t k = 0; k < n; k++) ids[k] = (uint8_t)cases[i].bytes[k];
        assert_int_equal(text_decode(t, ids, n, true, true, got, sizeof got, &n_got), ST_OK);
        assert_int_equal(n_got, want);
        assert_memory_equal(got, cases[i].text, want);
        assert_stream(t, ids, n);
        /* As they are; and a buffer too short is told how much is needed, and not overrun. */
        assert_int_equal(text_decode(t, ids, n, true, false, got, sizeof got, &n_got), ST_OK);
        assert_int_equal(n_got, n);
        assert_memory_equal(got, cases[i].bytes, n);
        for (size_t cap = 0; cap < want; cap++) {
            char *small = malloc(cap + 1);
            assert_int_equal(text_decode(t, ids, n, true, true, small, cap, &n_got), ST_TOO_LARGE);
            assert_int_equal(n_got, want);
            free(small);
        }
    }
    text_close(t);
    unlink(path);
    free(path);
    free(file);
}

/* ---- special tokens --------------------------------------------------------------------------------------- */

enum { CONTROL = TOKEN_CONTROL, USER = TOKEN_USER_DEFINED, NORMAL = TOKEN_NORMAL };

static struct text *open_fixture(const struct fixture *f) {
    size_t n;
    uint8_t *file = fixture_build(f, &n);
    char *path = test_write_temp(file, n);
    struct text *t = open_text(path);
    unlink(path);
    free(path);
    free(file);
    return t;
}

static void assert_decodes(const struct text *t, const int32_t *ids, size_t n, bool skip,
                           const char *want) {
    char got[256];
    size_t n_got;
    assert_int_equal(text_decode(t, ids, n, skip, true, got, sizeof got, &n_got), ST_OK);
    assert_int_equal(n_got, strlen(want));
    assert_memory_equal(got, want, n_got);
}

static void test_special(void **state) {
    (void)state;
    static const struct fixture_token tokens[] = {
        {FIXTURE_BYTES("<a>"), CONTROL}, /* 256 */
        {FIXTURE_BYTES("<a><b>c"), CONTROL}, /* 257 */
        {FIXTURE_BYTES("<b>"), USER}, /* 258 */
        {FIXTURE_BYTES("ab"), NORMAL}, /* 259 */
        {FIXTURE_BYTES("[PAD]"), TOKEN_UNUSED}, /* 260 */
        {FIXTURE_BYTES("<|endoftext|>"), CONTROL}, /* 261 */
        {FIXTURE_BYTES("<|im_end|>"), CONTROL}, /* 262 */
        {FIXTURE_BYTES("e\xCC\x81"), USER}, /* 263: not in NFC */
        {FIXTURE_BYTES("\xC4\xA0\n"), NORMAL}, /* 264: "Ġ" and a raw newline: literal */
        {FIXTURE_BYTES("\n"), NORMAL}, /* 265: literal, not the token of the byte */
    };
    static const struct bytes merges[] = {FIXTURE_BYTES("a b")};
    struct fixture f = FIXTURE_DEFAULT;
    f.tokens = tokens, f.n_tokens = sizeof tokens / sizeof *tokens;
    f.merges = merges, f.n_merges = 1;
    f.eos = 262;
    struct text *t = open_fixture(&f);

    /* Leftmost, then longest; what is left is text, merged only within itself. */
    static const struct {
        const char *s;
        bool parse;
        int32_t ids[16];
        size_t n;
    } cases[] = {
        {"<a><b>c", true, {257}, 1},
        {"<a><b>", true, {256, 258}, 2},
        {"<a><a><b>cc", true, {256, 257, 'c'}, 3},
        {"ab<b>a<b>b", true, {259, 258, 'a', 258, 'b'}, 5},
        {"<a", true, {'<', 'a'}, 2},
        {"<a>", false, {'<', 'a', '>'}, 3},
        {"[PAD]", true, {'[', 'P', 'A', 'D', ']'}, 5},
        {"e\xCC\x81\xC3\xA9", true, {263, 0xC3, 0xA9}, 3}, /* found before normalising */
        {"e\xCC\x81", false, {0xC3, 0xA9}, 2},
        {"<b>\xCC\x81", true, {258, 0xCC, 0x81}, 3},
        {"\n", true, {'\n'}, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t ids[16];
        size_t n = 0;
        assert_int_equal(
            text_encode(t, cases[i].s, strlen(cases[i].s), cases[i].parse, ids, 16, &n), ST_OK);
        assert_int_equal(n, cases[i].n);
        assert_memory_equal(ids, cases[i].ids, n * sizeof *ids);
    }

    /* Control tokens can be left out; user-defined ones are text; unused ones and strangers are nothing. */
    static const int32_t ids[] = {256, 'x', 258, 260, 999999, -1, 262, 259};
    assert_decodes(t, ids, 8, false, "<a>x<b><|im_end|>ab");
    assert_decodes(t, ids, 8, true, "x<b>ab");
    assert_stream(t, ids, 8);
    static const int32_t literal[] = {264};
    assert_decodes(t, literal, 1, true, "\xC4\xA0\n");
    /* A control token between two halves of a character does not come between them. */
    static const int32_t halves[] = {0xC3, 262, 0xA9};
    assert_decodes(t, halves, 3, true, "\xC3\xA9");
    assert_stream(t, halves, 3);

    assert_true(text_is_special(t, 256));
    assert_false(text_is_special(t, 258));
    assert_false(text_is_special(t, 260));
    assert_false(text_is_special(t, -1));
    assert_false(text_is_special(t, 266));
    assert_int_equal(text_piece(t, 266).n, 0);
    assert_int_equal(text_piece(t, -1).n, 0);
    assert_int_equal(text_piece(t, 257).n, 7);
    int32_t end[3] = {-5, -5, -5};
    assert_int_equal(text_eos_id(t), 262);
    assert_int_equal(text_end_ids(t, end, 1), 2);
    assert_int_equal(end[1], -5);
    assert_int_equal(text_end_ids(t, end, 3), 2);
    assert_int_equal(end[0], 262);
    assert_int_equal(end[1], 261);
    text_close(t);
}

static void test_end_ids(void **state) {
    (void)state;
    int32_t end[3];
    struct text *t = open_text(QWEN3_VOCAB);
    assert_int_equal(text_end_ids(t, end, 3), 2);
    assert_int_equal(end[0], 151645);
    assert_int_equal(end[1], 151643);
    text_close(t);
    struct fixture f = FIXTURE_DEFAULT;
    t = open_fixture(&f);
    assert_int_equal(text_eos_id(t), -1);
    assert_int_equal(text_end_ids(t, end, 3), 0);
    text_close(t);
}

/* ---- files that are wrong ----------------------------------------------------------------------------------- */

static void assert_refused(const struct fixture *f, enum status want, const char *says) {
    size_t n;
    uint8_t *file = fixture_build(f, &n);
    char *path = test_write_temp(file, n);
    struct error e = {0};
    struct text *t = NULL;
    enum status st = text_open(path, NULL, &e, &t);
    if (st != want || e.code != want || !strstr(e.text, says))
        fail_msg("%s '%s' instead of %s '…%s…'", status_name(st), e.text, status_name(want), says);
    assert_null(t);
    assert_int_equal(text_open(path, NULL, NULL, &t), want);
    unlink(path);
    free(path);
    free(file);
}

static void assert_token_refused(struct bytes s, int32_t type, enum status want, const char *says) {
    struct fixture f = FIXTURE_DEFAULT;
    struct fixture_token tokens[] = {{FIXTURE_BYTES("ab"), NORMAL}, {s, type}};
    f.tokens = tokens, f.n_tokens = 2;
    assert_refused(&f, want, says);
}

static void test_bad_tokens(void **state) {
    (void)state;
    assert_token_refused((struct bytes)FIXTURE_BYTES("ab"), NORMAL, ST_CORRUPT,
                         "ids 256 and 257 are both 'ab'");
    assert_token_refused((struct bytes)FIXTURE_BYTES("!"), NORMAL, ST_CORRUPT, "ids 33 and 257");
    assert_token_refused((struct bytes)FIXTURE_BYTES(""), NORMAL, ST_CORRUPT,
                         "tokens[257] is empty");
    assert_token_refused((struct bytes)FIXTURE_BYTES(""), CONTROL, ST_CORRUPT,
                         "tokens[257] is empty");
    assert_token_refused((struct bytes)FIXTURE_BYTES("\xC3"), NORMAL, ST_CORRUPT,
                         "tokens[257] is not UTF-8");
    assert_token_refused((struct bytes)FIXTURE_BYTES("x"), 0, ST_CORRUPT, "token_type[257] is 0");
    assert_token_refused((struct bytes)FIXTURE_BYTES("x"), 7, ST_CORRUPT, "token_type[257] is 7");
    assert_token_refused((struct bytes)FIXTURE_BYTES("x"), -1, ST_CORRUPT, "token_type[257] is -1");
    assert_token_refused((struct bytes)FIXTURE_BYTES("<0x0A>"), TOKEN_BYTE, ST_UNSUPPORTED,
                         "byte token");
    char name[TEXT_MAX_PIECE_BYTES + 1];
    memset(name, 'q', sizeof name);
    struct bytes longest = {(uint8_t *)name, TEXT_MAX_PIECE_BYTES},
                 longer = {(uint8_t *)name, sizeof name};
    assert_token_refused(longer, NORMAL, ST_UNSUPPORTED, "tokens[257] is 1022 bytes long");
    assert_token_refused(longer, CONTROL, ST_UNSUPPORTED, "tokens[257] is 1022 bytes long");

    /* The longest piece there may be, of bytes that are nothing, behind three that wait: the most that one
     * push gives. */
    uint8_t spelt[2 * TEXT_MAX_PIECE_BYTES];
    for (int i = 0; i < TEXT_MAX_PIECE_BYTES; i++) fixture_byte_name(0xFF, spelt + 2 * i);
    struct fixture_token tokens[] = {{{spelt, sizeof spelt}, NORMAL}, {longest, CONTROL}};
    struct fixture f = FIXTURE_DEFAULT;
    f.tokens = tokens, f.n_tokens = 2;
    struct text *t = open_fixture(&f);
    char *dst = malloc(TEXT_STREAM_MAX_BYTES);
    struct text_stream s = {0};
    for (int i = 0; i < 3; i++)
        assert_int_equal(text_stream_push(t, &s, "\xF0\x9F\x98"[i] & 0xFF, dst), 0);
    assert_int_equal(text_stream_push(t, &s, 256, dst), 3 * TEXT_MAX_PIECE_BYTES + 3);
    free(dst);
    text_close(t);
}

static void test_bad_merges(void **state) {
    (void)state;
    static const struct fixture_token tokens[] = {{FIXTURE_BYTES("ab"), NORMAL},
                                                  {FIXTURE_BYTES("<a>"), CONTROL},
                                                  {FIXTURE_BYTES("cd"), CONTROL}};
    static const struct {
        struct bytes second;
        const char *says;
    } cases[] = {
        {FIXTURE_BYTES("x y"), "merges[1] 'x y': a part or the result"},
        {FIXTURE_BYTES("ab zz"), "merges[1] 'ab zz': a part or the result"},
        {FIXTURE_BYTES("c d"),
         "merges[1] 'c d': a part or the result"}, /* would forge a control token */
        {FIXTURE_BYTES("a b"), "merges[1] 'a b' is there twice"},
        {FIXTURE_BYTES("ab"), "merges[1] 'ab' is not two tokens"},
        {FIXTURE_BYTES(""), "merges[1] '' is not two tokens"},
        {FIXTURE_BYTES(" "), "merges[1] ' ': a part or the result"},
        {FIXTURE_BYTES("a\n \x01"), "merges[1] 'a? ?': a part or the result"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct bytes merges[] = {FIXTURE_BYTES("a b"), cases[i].second};
        struct fixture f = FIXTURE_DEFAULT;
        f.tokens = tokens, f.n_tokens = 3;
        f.merges = merges, f.n_merges = 2;
        assert_refused(&f, ST_CORRUPT, cases[i].says);
    }
    /* Longer than any pair of tokens can be. */
    uint8_t *line = malloc(MB);
    memset(line, 'a', MB);
    line[7] = ' ';
    struct bytes merges[] = {{line, MB}};
    struct fixture f = FIXTURE_DEFAULT;
    f.merges = merges, f.n_merges = 1;
    assert_refused(&f, ST_CORRUPT, "merges[0] 'aaaaaaa a");
    free(line);
}

static void test_bad_keys(void **state) {
    (void)state;
    static const char *const required[] = {"tokenizer.ggml.model", "tokenizer.ggml.pre",
                                           "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
                                           "tokenizer.ggml.merges"};
    for (size_t i = 0; i < sizeof required / sizeof *required; i++) {
        struct fixture f = FIXTURE_DEFAULT;
        f.drop = required[i];
        assert_refused(&f, ST_CORRUPT, required[i]);
    }
    struct fixture f = FIXTURE_DEFAULT;
    f.model = "llama";
    assert_refused(&f, ST_UNSUPPORTED, "tokenizer.ggml.model 'llama' is not supported");
    f = (struct fixture)FIXTURE_DEFAULT;
    f.pre = "llama-bpe";
    assert_refused(&f, ST_UNSUPPORTED, "tokenizer.ggml.pre 'llama-bpe' is not supported");
    f.pre = "qwen";
    assert_refused(&f, ST_UNSUPPORTED, "tokenizer.ggml.pre 'qwen' is not supported");
    f = (struct fixture)FIXTURE_DEFAULT;
    f.add_bos = true;
    assert_refused(&f, ST_UNSUPPORTED, "tokenizer.ggml.add_bos_token is true");
    f = (struct fixture)FIXTURE_DEFAULT;
    f.types_missing = 1;
    assert_refused(&f, ST_CORRUPT, "token_type has 255 elements, tokenizer.ggml.tokens 256");
    f = (struct fixture)FIXTURE_DEFAULT;
    f.eos = 256;
    assert_refused(&f, ST_CORRUPT, "tokenizer.ggml.eos_token_id");
    f = (struct fixture)FIXTURE_DEFAULT;
    f.bos = INT64_MAX;
    assert_refused(&f, ST_CORRUPT, "tokenizer.ggml.bos_token_id");
    for (int b = 0; b < 256; b += 5) {
        char says[64];
        snprintf(says, sizeof says, "no token for byte 0x%02X", b);
        f = (struct fixture)FIXTURE_DEFAULT;
        f.missing_byte = b;
        assert_refused(&f, ST_CORRUPT, says);
    }
    struct error e = {0};
    struct text *t = NULL;
    assert_int_equal(text_open("/nonexistent/x.gguf", NULL, &e, &t), ST_NOT_FOUND);
    text_close(NULL);
}

/* ---- many threads ---------------------------------------------------------------------------------------------- */

static void *encode_often(void *arg) {
    const struct text *t = arg;
    static const char s[] = "Several threads, one text: na\xC3\xAFve e\xCC\x81 <|im_end|> 123\n\n"
                            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    int32_t first[128], ids[128];
    size_t n_first = 0, n;
    if (text_encode(t, s, sizeof s - 1, true, first, 128, &n_first) != ST_OK) return NULL;
    for (int i = 0; i < 300; i++) {
        if (text_encode(t, s, sizeof s - 1, true, ids, 128, &n) != ST_OK || n != n_first)
            return NULL;
        if (memcmp(ids, first, n * sizeof *ids) != 0) return NULL;
    }
    return arg;
}

static void test_threads(void **state) {
    (void)state;
    struct text *t = open_text(TINY_MODEL);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, encode_often, t), 0);
    for (int i = 0; i < 4; i++) {
        void *result = NULL;
        pthread_join(threads[i], &result);
        assert_ptr_equal(result, t);
    }
    text_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_qwen3),
        cmocka_unit_test(test_reference_tiny),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_nfc_random),
        cmocka_unit_test(test_nfc_marks),
        cmocka_unit_test(test_megabytes),
        cmocka_unit_test(test_megabyte_of_marks),
        cmocka_unit_test(test_split_interpreted),
        cmocka_unit_test(test_stream_random_ids),
        cmocka_unit_test(test_stream_cut_characters),
        cmocka_unit_test(test_replacement),
        cmocka_unit_test(test_special),
        cmocka_unit_test(test_end_ids),
        cmocka_unit_test(test_bad_tokens),
        cmocka_unit_test(test_bad_merges),
        cmocka_unit_test(test_bad_keys),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests_name("text", tests, NULL, NULL);
}
