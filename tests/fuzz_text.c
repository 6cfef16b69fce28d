/* libFuzzer target: the tokenizer. The first byte chooses what the rest is:
 *   a text, encoded with a small vocabulary and held against normalisation and decoding;
 *   token ids, decoded at once and as a stream;
 *   a conversation, whose control tokens must be the template's own;
 *   a vocabulary (tokens, kinds, merges), opened and, where it is accepted, used.
 *
 *     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_text
 *     build/fuzz/bin/fuzz_text -max_len=2048 /tmp/corpus */
#include "moe/text_internal.h"
#include "tests/text_fixture.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utf8proc.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static enum status open_fixture(const struct fixture *f, const char *style, struct error *e,
                                struct text **out) {
    size_t n;
    uint8_t *file = fixture_build(f, &n);
    char path[64];
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    CHECK(fd >= 0 && write(fd, file, n) == (ssize_t)n);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    enum status st = text_open(path, style, e, out);
    close(fd);
    free(file);
    return st;
}

/* Encoding, and that decoding gives the normalised text. */
static void try_text(const struct text *t, const uint8_t *s, size_t n, bool parse_special) {
    size_t cap = 3 * n + 1, n_ids, n_back;
    int32_t *ids = malloc(cap * sizeof *ids);
    char *back = malloc(cap);
    enum status st = text_encode(t, s, n, parse_special, ids, cap, &n_ids);
    CHECK(st == (utf8_valid(s, n) ? ST_OK : ST_INVALID));
    if (st == ST_OK) {
        CHECK(text_decode(t, ids, n_ids, false, true, back, cap, &n_back) == ST_OK);
        if (!parse_special) {
            utf8proc_uint8_t *nfc = NULL;
            utf8proc_ssize_t k =
                utf8proc_map(s, (utf8proc_ssize_t)n, &nfc, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
            CHECK(k >= 0 && (size_t)k == n_back && (k == 0 || memcmp(back, nfc, n_back) == 0));
            free(nfc);
        }
        if (n_ids > 0)
            CHECK(text_encode(t, s, n, parse_special, ids, n_ids - 1, &n_back) == ST_TOO_LONG);
    }
    free(back);
    free(ids);
}

static void try_ids(const struct text *t, const uint8_t *data, size_t n) {
    int32_t ids[64];
    size_t n_ids = 0, n_whole, n_got = 0, cap = 64 * TEXT_STREAM_MAX_BYTES;
    for (; n >= 2 && n_ids < 64; data += 2, n -= 2)
        ids[n_ids++] = (data[0] | data[1] << 8) % (text_n_vocab(t) + 2) - 1;
    char *whole = malloc(cap), *got = malloc(cap + TEXT_STREAM_MAX_BYTES);
    CHECK(text_decode(t, ids, n_ids, true, true, whole, cap, &n_whole) == ST_OK);
    struct text_stream s = {0};
    for (size_t i = 0; i < n_ids; i++) {
        size_t k = text_stream_push(t, &s, ids[i], got + n_got);
        CHECK(k <= TEXT_STREAM_MAX_BYTES && utf8_valid(got + n_got, k) && s.n_pending <= 3);
        n_got += k;
    }
    n_got += text_stream_finish(&s, got + n_got);
    CHECK(n_got == n_whole && memcmp(got, whole, n_got) == 0);
    free(whole);
    free(got);
}

static void try_chat(const struct text *t, const uint8_t *data, size_t n) {
    static const char *const roles[] = {"system", "user", "assistant", "tool"};
    struct text_message msgs[8];
    size_t n_msgs = 0, n_ids, cap = 3 * n + 4096;
    while (n >= 2 && n_msgs < 8) {
        const char *role = roles[data[0] & 3];
        size_t len = data[1] < n - 2 ? data[1] : n - 2;
        msgs[n_msgs++] =
            (struct text_message){{(const uint8_t *)role, strlen(role)}, {data + 2, len}};
        data += 2 + len;
        n -= 2 + len;
    }
    int32_t *ids = malloc(cap * sizeof *ids);
    struct error e = {0};
    enum status st = text_chat_encode(t, msgs, n_msgs, &e, ids, cap, &n_ids);
    if (st == ST_OK) {
        size_t controls = 0, turns = n_msgs;
        if (t->chat == chat_style_named("qwen2.5")) turns += msgs[0].role.p[0] != 's';
        for (size_t i = 0; i < n_ids; i++) controls += text_is_special(t, ids[i]);
        CHECK(controls == 2 * turns + 1);
    } else {
        CHECK(e.code == st && e.text[0]);
    }
    free(ids);
}

/* Records of kind, length, bytes: kinds 1 to 6 and nonsense are tokens, others are merges. */
static void try_vocab(const uint8_t *data, size_t n) {
    enum { MAX = 64 };
    struct fixture_token tokens[MAX];
    struct bytes merges[MAX];
    struct fixture f = FIXTURE_DEFAULT;
    f.tokens = tokens;
    f.merges = merges;
    while (n >= 2 && f.n_tokens < MAX && f.n_merges < MAX) {
        size_t len = data[1] & 63;
        if (len > n - 2) len = n - 2;
        struct bytes s = {data + 2, len};
        if (data[0] & 0x80)
            merges[f.n_merges++] = s;
        else
            tokens[f.n_tokens++] = (struct fixture_token){s, data[0] & 7};
        data += 2 + len;
        n -= 2 + len;
    }
    struct error e = {0};
    struct text *t;
    enum status st = open_fixture(&f, "chatml", &e, &t);
    if (st != ST_OK) {
        CHECK(e.code == st && e.text[0] && utf8_valid(e.text, strlen(e.text)));
        return;
    }
    for (size_t i = 0; i < f.n_merges; i++) try_text(t, merges[i].p, merges[i].n, i & 1);
    for (size_t i = 0; i < f.n_tokens; i++) try_text(t, tokens[i].s.p, tokens[i].s.n, i & 1);
    try_ids(t, data, n);
    text_close(t);
}

static struct text *open_small(const char *style) {
    static const struct fixture_token tokens[] = {
        {FIXTURE_BYTES("<|im_start|>"), TOKEN_CONTROL},
        {FIXTURE_BYTES("<|im_end|>"), TOKEN_CONTROL},
        {FIXTURE_BYTES("<think>"), TOKEN_USER_DEFINED},
        {FIXTURE_BYTES("<a>"), TOKEN_USER_DEFINED},
        {FIXTURE_BYTES("<a><b>"), TOKEN_CONTROL},
        {FIXTURE_BYTES("aa"), TOKEN_NORMAL},
        {FIXTURE_BYTES("ab"), TOKEN_NORMAL},
        {FIXTURE_BYTES("aaaa"), TOKEN_NORMAL},
        {FIXTURE_BYTES("aab"), TOKEN_NORMAL},
        {FIXTURE_BYTES("\xC3\x83\xC2\xA9"), TOKEN_NORMAL},
        {FIXTURE_BYTES("[PAD]"), TOKEN_UNUSED},
    };
    static const struct bytes merges[] = {
        FIXTURE_BYTES("a b"),  FIXTURE_BYTES("a a"),   FIXTURE_BYTES("\xC3\x83 \xC2\xA9"),
        FIXTURE_BYTES("a ab"), FIXTURE_BYTES("aa aa"),
    };
    struct fixture f = FIXTURE_DEFAULT;
    f.tokens = tokens;
    f.n_tokens = sizeof tokens / sizeof *tokens;
    f.merges = merges;
    f.n_merges = sizeof merges / sizeof *merges;
    struct text *t;
    CHECK(open_fixture(&f, style, NULL, &t) == ST_OK);
    return t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const styles[] = {"chatml", "qwen2.5", "qwen3", "qwq"};
    static struct text *small[4]; /* live as long as the process */
    if (size == 0) return 0;
    for (int i = 0; i < 4 && !small[i]; i++) small[i] = open_small(styles[i]);
    const uint8_t *rest = data + 1;
    size_t n = size - 1;
    switch (data[0] & 7) {
    case 0: try_text(small[0], rest, n, false); break;
    case 1: try_text(small[0], rest, n, true); break;
    case 2: try_ids(small[0], rest, n); break;
    case 3: try_vocab(rest, n); break;
    default: try_chat(small[data[0] & 3], rest, n); break;
    }
    return 0;
}
