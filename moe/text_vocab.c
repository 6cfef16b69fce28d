/* The vocabulary: tokens, their kinds and bytes, and the names of the special ones.
 *
 * A byte-level vocabulary spells each byte as one printable character (GPT-2's table). Pieces are kept as
 * the bytes they stand for; special tokens are spelt as they are. After loading: every piece is at most
 * TEXT_MAX_PIECE_BYTES long, every one of the 256 bytes has a token, every special id is in range. */
#include "moe/text_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* GPT-2's table runs over U+0000 … U+0143: 188 bytes stand for themselves, the other 68 take
 * U+0100 onwards in rising order (openai/gpt-2, src/encoder.py, bytes_to_unicode). */
enum { ALPHABET = 256 + 68 };

static void alphabet_fill(int16_t byte_of[ALPHABET]) {
    int next = 256;
    for (int i = 0; i < ALPHABET; i++) byte_of[i] = -1;
    for (int b = 0; b < 256; b++) {
        bool itself = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        byte_of[itself ? b : next++] = (int16_t)b;
    }
}

uint64_t text_hash(const void *s, size_t n, uint64_t seed) {
    const uint8_t *p = s;
    uint64_t h = seed ^ n;
    while (n > 0) {
        uint64_t word = 0;
        size_t k = n < 8 ? n : 8;
        memcpy(&word, p, k);
        h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 32;
        p += k;
        n -= k;
    }
    h *= UINT64_C(0xd6e8feb86659fd93);
    return h ^ h >> 32;
}

const char *text_printable(struct bytes s, char dst[64]) {
    size_t n = s.n < 48 ? s.n : utf8_complete_prefix(s.p, 48);
    uint8_t limit = utf8_valid(s.p, n) ? 0xFF : 0x7E;
    for (size_t i = 0; i < n; i++) {
        bool plain = s.p[i] >= 0x20 && s.p[i] != 0x7F && s.p[i] <= limit;
        dst[i] = plain ? (char)s.p[i] : '?';
    }
    dst[n] = 0;
    return dst;
}

enum status text_required(enum status st, struct error *e) {
    if (st != ST_NOT_FOUND) return st;
    if (e) e->code = ST_CORRUPT;
    return ST_CORRUPT;
}

/* ---- the index: token string to id ---------------------------------------------------------------- */

static size_t index_slot(const struct vocab_index *x, const void *s, size_t n) {
    size_t i = text_hash(s, n, x->seed) & x->mask;
    for (; x->slot[i] >= 0; i = (i + 1) & x->mask) {
        const struct bytes *t = &x->tokens[x->slot[i]];
        if (t->n == n && memcmp(t->p, s, n) == 0) break;
    }
    return i;
}

int32_t vocab_index_find(const struct vocab_index *index, const void *s, size_t n) {
    return index->slot[index_slot(index, s, n)];
}

void vocab_index_free(struct vocab_index *index) {
    free(index->slot);
    *index = (struct vocab_index){0};
}

static enum status index_build(const struct bytes *tokens, int32_t n, struct error *e,
                               struct vocab_index *x) {
    size_t size = 16;
    while (size < 2 * (size_t)n) size *= 2;
    x->tokens = tokens;
    x->mask = size - 1;
    x->slot = malloc(size * sizeof *x->slot);
    if (!x->slot) return error_set(e, ST_NO_MEMORY, "no memory for the vocabulary");
    memset(x->slot, 0xFF, size * sizeof *x->slot);
    random_bytes(&x->seed, sizeof x->seed);
    for (int32_t id = 0; id < n; id++) {
        size_t i = index_slot(x, tokens[id].p, tokens[id].n);
        if (x->slot[i] >= 0) {
            char name[64];
            return error_set(e, ST_CORRUPT, "tokenizer.ggml.tokens: ids %d and %d are both '%s'",
                             x->slot[i], id, text_printable(tokens[id], name));
        }
        x->slot[i] = id;
    }
    return ST_OK;
}

/* ---- pieces ----------------------------------------------------------------------------------------- */

/* The bytes that a token string stands for, to dst (at most s.n). A character outside the alphabet makes
 * the whole string literal, as the reference tokenizer's byte-level decoder has it. */
static size_t piece_bytes(struct bytes s, const int16_t byte_of[ALPHABET], uint8_t *dst) {
    size_t n = 0;
    for (size_t i = 0; i < s.n;) {
        uint32_t cp = s.p[i];
        size_t len = 1;
        if (cp >= 0xC2 && cp <= 0xDF) {
            cp = (cp & 0x1F) << 6 | (s.p[i + 1] & 0x3F);
            len = 2;
        } else if (cp >= 0x80) {
            cp = ALPHABET;
        }
        if (cp >= ALPHABET || byte_of[cp] < 0) {
            memcpy(dst, s.p, s.n);
            return s.n;
        }
        dst[n++] = (uint8_t)byte_of[cp];
        i += len;
    }
    return n;
}

static enum status token_check(struct bytes s, int64_t kind, int32_t id, struct error *e) {
    if (kind < TOKEN_NORMAL || kind > TOKEN_BYTE)
        return error_set(e, ST_CORRUPT, "tokenizer.ggml.token_type[%d] is %lld: not a token type",
                         id, (long long)kind);
    if (kind == TOKEN_BYTE)
        return error_set(e, ST_UNSUPPORTED,
                         "tokenizer.ggml.token_type[%d] is a byte token, which a byte-level "
                         "vocabulary does not have",
                         id);
    if (!utf8_valid(s.p, s.n))
        return error_set(e, ST_CORRUPT, "tokenizer.ggml.tokens[%d] is not UTF-8", id);
    if (s.n == 0 && kind != TOKEN_UNUSED)
        return error_set(e, ST_CORRUPT, "tokenizer.ggml.tokens[%d] is empty", id);
    return ST_OK;
}

static enum status pieces_fill(const struct bytes *tokens, const int32_t *kinds, struct error *e,
                               struct vocab *v) {
    int16_t byte_of[ALPHABET];
    alphabet_fill(byte_of);
    size_t used = 0;
    for (int32_t id = 0; id < v->n; id++) {
        struct bytes s = tokens[id];
        enum status st = token_check(s, kinds[id], id, e);
        if (st != ST_OK) return st;
        uint8_t *dst = v->piece + used;
        size_t n = 0; /* unknown and unused tokens stand for nothing */
        if (kinds[id] == TOKEN_NORMAL) {
            n = piece_bytes(s, byte_of, dst);
            if (n == 1 && (s.n == 2 || byte_of[s.p[0]] >= 0)) v->byte_id[dst[0]] = id;
        } else if (kinds[id] == TOKEN_CONTROL || kinds[id] == TOKEN_USER_DEFINED) {
            n = s.n;
            memcpy(dst, s.p, n);
            v->n_special++;
            v->special_lead[s.p[0]] = true;
        }
        if (n > TEXT_MAX_PIECE_BYTES)
            return error_set(
                e, ST_UNSUPPORTED,
                "tokenizer.ggml.tokens[%d] is %zu bytes long; at most %d are supported", id, n,
                TEXT_MAX_PIECE_BYTES);
        v->kind[id] = (uint8_t)kinds[id];
        used += n;
        v->first[id + 1] = (uint32_t)used;
    }
    for (int b = 0; b < 256; b++)
        if (v->byte_id[b] < 0)
            return error_set(e, ST_CORRUPT,
                             "tokenizer.ggml.tokens has no token for byte 0x%02X: such text could "
                             "not be encoded",
                             b);
    return ST_OK;
}

struct bytes vocab_piece(const struct vocab *v, int32_t id) {
    if (id < 0 || id >= v->n) return (struct bytes){NULL, 0};
    return (struct bytes){v->piece + v->first[id], v->first[id + 1] - v->first[id]};
}

/* ---- special tokens ----------------------------------------------------------------------------------- */

static int bytes_compare(struct bytes a, struct bytes b) {
    int c = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return c != 0 ? c : (a.n > b.n) - (a.n < b.n);
}

static int special_compare(const void *a, const void *b, void *v) {
    return bytes_compare(vocab_piece(v, *(const int32_t *)a), vocab_piece(v, *(const int32_t *)b));
}

static enum status special_fill(struct vocab *v, struct error *e) {
    v->special = malloc((v->n_special + 1) * sizeof *v->special);
    if (!v->special) return error_set(e, ST_NO_MEMORY, "no memory for the special tokens");
    size_t k = 0;
    for (int32_t id = 0; id < v->n; id++)
        if (v->kind[id] == TOKEN_CONTROL || v->kind[id] == TOKEN_USER_DEFINED) v->special[k++] = id;
    qsort_r(v->special, k, sizeof *v->special, special_compare, v);
    return ST_OK;
}

int32_t vocab_special_find(const struct vocab *v, const void *name, size_t n) {
    size_t len;
    int32_t id = vocab_special_at(v, name, n, &len);
    return id >= 0 && len == n ? id : -1;
}

/* The first special in [lo, hi) whose byte at depth is >= want; names in the range agree before depth, and
 * one that ends there sorts first. */
static size_t special_bound(const struct vocab *v, size_t lo, size_t hi, size_t depth, int want) {
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        struct bytes name = vocab_piece(v, v->special[mid]);
        int byte = depth < name.n ? name.p[depth] : -1;
        if (byte < want)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

int32_t vocab_special_at(const struct vocab *v, const uint8_t *s, size_t n, size_t *len) {
    int32_t found = -1;
    size_t lo = 0, hi = v->n_special;
    if (n == 0 || !v->special_lead[s[0]]) return -1;
    for (size_t depth = 0; depth < n; depth++) {
        lo = special_bound(v, lo, hi, depth, s[depth]);
        hi = special_bound(v, lo, hi, depth, s[depth] + 1);
        if (lo == hi) break;
        if (vocab_piece(v, v->special[lo]).n == depth + 1) {
            found = v->special[lo];
            *len = depth + 1;
        }
    }
    return found;
}

/* ---- loading ------------------------------------------------------------------------------------------- */

/* Every id the file gives a meaning to is checked, also those that nothing here uses. */
static enum status ids_check(const struct gguf *g, struct error *e, struct vocab *v) {
    static const char *const keys[] = {
        "tokenizer.ggml.bos_token_id",       "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",       "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.unknown_token_id",   "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.seperator_token_id", /* sic, in the format */
        "tokenizer.ggml.mask_token_id",
    };
    v->eos_id = -1;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int64_t id;
        if (!gguf_has(g, keys[i])) continue;
        enum status st = gguf_get_int(g, keys[i], 0, v->n - 1, e, &id);
        if (st != ST_OK) return st;
        if (strcmp(keys[i], "tokenizer.ggml.eos_token_id") == 0) v->eos_id = (int32_t)id;
    }
    return ST_OK;
}

enum status vocab_load(const struct gguf *g, struct error *e, struct vocab *v,
                       struct vocab_index *index) {
    const struct bytes *tokens;
    const int32_t *kinds;
    size_t n, n_kinds, n_bytes = 0;
    enum status st =
        text_required(gguf_string_array(g, "tokenizer.ggml.tokens", e, &tokens, &n), e);
    if (st != ST_OK) return st;
    st = text_required(gguf_int_array(g, "tokenizer.ggml.token_type", e, &kinds, &n_kinds), e);
    if (st != ST_OK) return st;
    if (n == 0 || n >= INT32_MAX / 2)
        return error_set(e, ST_CORRUPT, "tokenizer.ggml.tokens has %zu elements", n);
    if (n_kinds != n)
        return error_set(e, ST_CORRUPT,
                         "tokenizer.ggml.token_type has %zu elements, tokenizer.ggml.tokens %zu",
                         n_kinds, n);
    for (size_t i = 0; i < n; i++)
        if (!size_add(n_bytes, tokens[i].n, &n_bytes) || n_bytes > UINT32_MAX)
            return error_set(e, ST_UNSUPPORTED, "tokenizer.ggml.tokens holds more than 4 GiB");
    v->n = (int32_t)n;
    memset(v->byte_id, 0xFF, sizeof v->byte_id);
    v->kind = malloc(n);
    v->first = calloc(n + 1, sizeof *v->first);
    v->piece = malloc(n_bytes + 1);
    if (!v->kind || !v->first || !v->piece)
        return error_set(e, ST_NO_MEMORY, "no memory for the vocabulary");
    st = pieces_fill(tokens, kinds, e, v);
    if (st == ST_OK) st = index_build(tokens, v->n, e, index);
    if (st == ST_OK) st = special_fill(v, e);
    if (st == ST_OK) st = ids_check(g, e, v);
    return st;
}

void vocab_free(struct vocab *v) {
    free(v->kind);
    free(v->first);
    free(v->piece);
    free(v->special);
    *v = (struct vocab){0};
}
