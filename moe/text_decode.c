/* From ids back to text, all at once or as they come.
 *
 * Tokens are bytes, and a character may be spread over several of them. Ill-formed bytes become U+FFFD, one
 * for each maximal subpart (Unicode 15, section 3.9, "U+FFFD Substitution of Maximal Subparts"), which is
 * also what the reference tokenizer does. Both ways of decoding go through the same feed, so that they
 * agree on every sequence of ids. */
#include "moe/text_internal.h"

#include <string.h>

static const char replacement[3] = "\xEF\xBF\xBD";

struct sink { /* counts what does not fit instead of writing it */
    char *p;
    size_t cap, n;
};

static void put(struct sink *out, const void *s, size_t n) {
    if (n > 0 && out->n <= out->cap && n <= out->cap - out->n) memcpy(out->p + out->n, s, n);
    out->n += n;
}

/* The character or the ill-formed maximal subpart at p (n > 0): its length, and which of the two. 0: the
 * bytes end inside a character. (Unicode 15, table 3-7.) */
static size_t next_unit(const uint8_t *p, size_t n, bool *well_formed) {
    uint8_t lead = p[0], lo = 0x80, hi = 0xBF;
    size_t len = lead < 0x80   ? 1
                 : lead < 0xC2 ? 0
                 : lead < 0xE0 ? 2
                 : lead < 0xF0 ? 3
                 : lead < 0xF5 ? 4
                               : 0;
    *well_formed = len > 0;
    if (len == 0) return 1;
    if (lead == 0xE0) lo = 0xA0;
    if (lead == 0xED) hi = 0x9F;
    if (lead == 0xF0) lo = 0x90;
    if (lead == 0xF4) hi = 0x8F;
    for (size_t i = 1; i < len; i++, lo = 0x80, hi = 0xBF) {
        if (i == n) return 0;
        if (p[i] < lo || p[i] > hi) {
            *well_formed = false;
            return i;
        }
    }
    return len;
}

/* Add a piece to what is pending and put out all that is decided. */
static void feed(struct text_stream *s, struct bytes piece, struct sink *out) {
    uint8_t buf[sizeof s->pending + TEXT_MAX_PIECE_BYTES];
    CHECK(s->n_pending <= sizeof s->pending && piece.n <= TEXT_MAX_PIECE_BYTES);
    size_t n = s->n_pending, at = 0;
    memcpy(buf, s->pending, n);
    if (piece.n > 0) memcpy(buf + n, piece.p, piece.n);
    n += piece.n;
    while (at < n) {
        bool well_formed;
        size_t len = next_unit(buf + at, n - at, &well_formed);
        if (len == 0) break;
        if (well_formed)
            put(out, buf + at, len);
        else
            put(out, replacement, sizeof replacement);
        at += len;
    }
    s->n_pending = (uint8_t)(n - at);
    memcpy(s->pending, buf + at, n - at);
}

static void finish(struct text_stream *s, struct sink *out) {
    if (s->n_pending > 0) put(out, replacement, sizeof replacement);
    s->n_pending = 0;
}

size_t text_stream_push(const struct text *t, struct text_stream *s, int32_t id, char *dst) {
    struct sink out = {dst, TEXT_STREAM_MAX_BYTES, 0};
    if (!text_is_special(t, id)) feed(s, vocab_piece(&t->vocab, id), &out);
    return out.n;
}

size_t text_stream_finish(struct text_stream *s, char *dst) {
    struct sink out = {dst, TEXT_STREAM_MAX_BYTES, 0};
    finish(s, &out);
    return out.n;
}

enum status text_decode(const struct text *t, const int32_t *ids, size_t n_ids, bool skip_special,
                        bool lossy, char *dst, size_t cap, size_t *n) {
    struct sink out = {dst, cap, 0};
    struct text_stream s = {0};
    for (size_t i = 0; i < n_ids; i++) {
        if (skip_special && text_is_special(t, ids[i])) continue;
        struct bytes piece = vocab_piece(&t->vocab, ids[i]);
        if (lossy)
            feed(&s, piece, &out);
        else
            put(&out, piece.p, piece.n);
    }
    finish(&s, &out);
    *n = out.n;
    return out.n > cap ? ST_TOO_LARGE : ST_OK;
}
