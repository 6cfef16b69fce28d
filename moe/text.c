/* The tokenizer as its neighbours see it: opening, encoding, and small questions. The parts are in
 * text_*.c; text_internal.h names them. Any thread; nothing changes after text_open. */
#include "moe/text_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- opening ---------------------------------------------------------------------------------------------- */

static enum status string_key(const struct gguf *g, const char *key, struct error *e,
                              struct bytes *out) {
    return text_required(gguf_get_string(g, key, e, out), e);
}

static bool bytes_are(struct bytes b, const char *s) {
    return b.n == strlen(s) && memcmp(b.p, s, b.n) == 0;
}

/* Models whose tokenizer puts tokens around the text need more than we do. */
static enum status refuse_added(const struct gguf *g, const char *key, struct error *e) {
    bool add;
    enum status st = gguf_get_bool(g, key, e, &add);
    if (st == ST_NOT_FOUND) return ST_OK;
    if (st != ST_OK) return st;
    return add ? error_set(e, ST_UNSUPPORTED, "%s is true: this is not supported", key) : ST_OK;
}

static enum status chat_open(const struct gguf *g, const char *chosen, struct error *e,
                             struct text *t) {
    static const char key[] = "tokenizer.chat_template";
    t->has_template = gguf_has(g, key);
    if (chosen) {
        t->chat = chat_style_named(chosen);
        return t->chat
                   ? ST_OK
                   : error_set(e, ST_INVALID, "no chat template is called '%.32s'; there are: %s",
                               chosen, chat_style_names());
    }
    if (!t->has_template) return ST_OK;
    struct bytes text;
    enum status st = gguf_get_string(g, key, e, &text);
    if (st == ST_OK) t->chat = chat_style_of(text);
    return st;
}

static enum status parts_open(const struct gguf *g, const char *chat_template, struct error *e,
                              struct text *t) {
    struct bytes model, pre;
    enum status st = string_key(g, "tokenizer.ggml.model", e, &model);
    if (st != ST_OK) return st;
    if (!bytes_are(model, "gpt2")) {
        char name[64];
        return error_set(e, ST_UNSUPPORTED,
                         "tokenizer.ggml.model '%s' is not supported (supported: gpt2)",
                         text_printable(model, name));
    }
    st = string_key(g, "tokenizer.ggml.pre", e, &pre);
    if (st == ST_OK) st = splitter_open(pre, true, e, &t->splitter);
    if (st == ST_OK) st = refuse_added(g, "tokenizer.ggml.add_bos_token", e);
    if (st == ST_OK) st = refuse_added(g, "tokenizer.ggml.add_eos_token", e);
    if (st != ST_OK) return st;
    struct vocab_index index = {0};
    st = vocab_load(g, e, &t->vocab, &index);
    if (st == ST_OK) st = bpe_load(g, &t->vocab, &index, e, &t->bpe);
    vocab_index_free(&index);
    return st == ST_OK ? chat_open(g, chat_template, e, t) : st;
}

enum status text_open(const char *gguf_path, const char *chat_template, struct error *e,
                      struct text **out) {
    struct gguf *g;
    enum status st = gguf_open(gguf_path, true, e, &g);
    if (st != ST_OK) return st;
    struct text *t = calloc(1, sizeof *t);
    st = t ? parts_open(g, chat_template, e, t) : error_set(e, ST_NO_MEMORY, "no memory");
    gguf_close(g);
    if (st != ST_OK) {
        text_close(t);
        return st;
    }
    *out = t;
    return ST_OK;
}

void text_close(struct text *t) {
    if (!t) return;
    splitter_close(&t->splitter);
    bpe_free(&t->bpe);
    vocab_free(&t->vocab);
    free(t);
}

/* ---- questions -------------------------------------------------------------------------------------------- */

int32_t text_n_vocab(const struct text *t) { return t->vocab.n; }
int32_t text_eos_id(const struct text *t) { return t->vocab.eos_id; }
struct bytes text_piece(const struct text *t, int32_t id) {
    return vocab_piece(&t->vocab, id);
}

bool text_is_special(const struct text *t, int32_t id) {
    return id >= 0 && id < t->vocab.n && t->vocab.kind[id] == TOKEN_CONTROL;
}

int text_end_ids(const struct text *t, int32_t *dst, int cap) {
    const int32_t ids[] = {t->vocab.eos_id, vocab_special_find(&t->vocab, "<|im_end|>", 10),
                           vocab_special_find(&t->vocab, "<|endoftext|>", 13)};
    int n = 0;
    for (int i = 0; i < 3; i++) {
        bool seen = ids[i] < 0;
        for (int j = 0; j < i; j++) seen |= ids[j] == ids[i];
        if (seen) continue;
        if (n < cap) dst[n] = ids[i];
        n++;
    }
    return n;
}

/* ---- encoding --------------------------------------------------------------------------------------------- */

enum status text_encode_plain(const struct text *t, const uint8_t *s, size_t n,
                              struct id_list *out) {
    struct bytes nfc, word;
    uint8_t *owned;
    struct split split;
    struct bpe_scratch scratch = {0};
    if (n == 0) return ST_OK;
    enum status st = nfc_normalize(s, n, &nfc, &owned);
    if (st != ST_OK) return st;
    st = split_start(&t->splitter, nfc.p, nfc.n, &split);
    while (st == ST_OK) {
        st = split_next(&split, &word);
        if (st != ST_OK || word.n == 0) break;
        st = bpe_word(&t->bpe, word.p, word.n, &scratch, out);
    }
    bpe_scratch_free(&scratch);
    split_end(&split);
    free(owned);
    return st;
}

/* Special tokens are found in the text as it came; what lies between them is normalised piece by piece. */
static enum status encode_parsed(const struct text *t, const uint8_t *s, size_t n,
                                 struct id_list *out) {
    size_t begin = 0, at = 0;
    while (at < n) {
        size_t len = 0;
        int32_t id = vocab_special_at(&t->vocab, s + at, n - at, &len);
        if (id < 0) {
            at++;
            continue;
        }
        enum status st = text_encode_plain(t, s + begin, at - begin, out);
        if (st != ST_OK) return st;
        if (out->n == out->cap) return ST_TOO_LONG;
        out->p[out->n++] = id;
        at += len;
        begin = at;
    }
    return text_encode_plain(t, s + begin, n - begin, out);
}

enum status text_encode(const struct text *t, const void *s, size_t n, bool parse_special,
                        int32_t *ids, size_t cap, size_t *n_ids) {
    if (!utf8_valid(s, n)) return ST_INVALID;
    struct id_list out = {ids, cap, 0};
    enum status st =
        parse_special ? encode_parsed(t, s, n, &out) : text_encode_plain(t, s, n, &out);
    if (st == ST_OK) *n_ids = out.n;
    return st;
}
