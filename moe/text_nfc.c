/* Unicode normalisation form C, in linear time.
 *
 * The tables are utf8proc's; putting combining marks into canonical order is done here, because
 * utf8proc's own ordering takes quadratic time over long runs of marks and text comes from strangers.
 *
 * Every character below U+0300 is in NFC, is a starter and never joins the character before it. So only
 * stretches of characters from U+0300 on, each with the one character before it, need work; all other
 * text is copied. Combining classes are those of utf8proc's Unicode version; the reference tokenizer's
 * table is older and does not order marks that are newer than it. */
#include "moe/text_internal.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum {
    LEAD_0300 = 0xCC, /* lead bytes from here on begin characters >= U+0300 */
    MAX_DECOMPOSITION = 4, /* code points in the full canonical decomposition of one */
    SHORT_RUN = 24 /* marks; longer runs are sorted by counting */
};

struct nfc {
    uint8_t *out; /* what is done */
    size_t n, cap;
    int32_t *cp; /* the stretch at hand, decomposed; twice its size, the second half for sorting */
    size_t n_cp, cap_cp;
};

static bool out_reserve(struct nfc *x, size_t more) {
    size_t want;
    if (!size_add(x->n, more, &want)) return false;
    if (want <= x->cap) return true;
    size_t cap = want + want / 2 + 64;
    uint8_t *p = realloc(x->out, cap);
    if (!p) return false;
    x->out = p;
    x->cap = cap;
    return true;
}

static bool cp_reserve(struct nfc *x, size_t more) {
    size_t want = x->n_cp + more;
    if (want <= x->cap_cp) return true;
    size_t cap = want + want / 2 + 64;
    int32_t *p = realloc(x->cp, 2 * cap * sizeof *p);
    if (!p) return false;
    x->cp = p;
    x->cap_cp = cap;
    return true;
}

static bool append(struct nfc *x, const uint8_t *s, size_t n) {
    if (!out_reserve(x, n)) return false;
    memcpy(x->out + x->n, s, n);
    x->n += n;
    return true;
}

static int combining_class(int32_t cp) { return utf8proc_get_property(cp)->combining_class; }

/* Sort a run of marks by combining class, equal classes in their order. */
static void sort_marks(int32_t *cp, size_t n, int32_t *spare) {
    if (n <= SHORT_RUN) {
        for (size_t i = 1; i < n; i++) {
            int32_t c = cp[i];
            size_t j = i;
            for (; j > 0 && combining_class(cp[j - 1]) > combining_class(c); j--) cp[j] = cp[j - 1];
            cp[j] = c;
        }
        return;
    }
    size_t first[257] = {0};
    for (size_t i = 0; i < n; i++) first[combining_class(cp[i]) + 1]++;
    for (int k = 0; k < 256; k++) first[k + 1] += first[k];
    for (size_t i = 0; i < n; i++) spare[first[combining_class(cp[i])]++] = cp[i];
    memcpy(cp, spare, n * sizeof *cp);
}

static void sort_stretch(struct nfc *x) {
    for (size_t i = 0; i < x->n_cp; i++) {
        if (combining_class(x->cp[i]) == 0) continue;
        size_t begin = i;
        while (i < x->n_cp && combining_class(x->cp[i]) != 0) i++;
        if (i - begin > 1) sort_marks(x->cp + begin, i - begin, x->cp + x->cap_cp);
    }
}

/* Decompose, order, compose and append one stretch. */
static bool normalise_stretch(struct nfc *x, const uint8_t *s, size_t n) {
    x->n_cp = 0;
    for (size_t i = 0; i < n;) {
        int32_t c;
        if (!cp_reserve(x, MAX_DECOMPOSITION)) return false;
        utf8proc_ssize_t len = utf8proc_iterate(s + i, (utf8proc_ssize_t)(n - i), &c);
        int boundary;
        utf8proc_ssize_t k = utf8proc_decompose_char(c, x->cp + x->n_cp, MAX_DECOMPOSITION,
                                                     UTF8PROC_STABLE | UTF8PROC_COMPOSE, &boundary);
        CHECK(len > 0 && k > 0 && k <= MAX_DECOMPOSITION);
        i += (size_t)len;
        x->n_cp += (size_t)k;
    }
    sort_stretch(x);
    utf8proc_ssize_t n_cp = utf8proc_normalize_utf32(x->cp, (utf8proc_ssize_t)x->n_cp,
                                                     UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (!out_reserve(x, 4 * (size_t)n_cp)) return false;
    for (utf8proc_ssize_t i = 0; i < n_cp; i++)
        x->n += (size_t)utf8proc_encode_char(x->cp[i], x->out + x->n);
    return true;
}

static bool is_low(uint8_t byte) { return byte < LEAD_0300 && (byte & 0xC0) != 0x80; }

static bool normalise(struct nfc *x, const uint8_t *s, size_t n, size_t high) {
    size_t done = 0;
    while (high < n) {
        size_t begin = high;
        if (begin > done) /* the character before may take marks */
            do begin--;
            while (begin > done && (s[begin] & 0xC0) == 0x80);
        size_t end = high;
        while (end < n && !is_low(s[end])) end++;
        if (!append(x, s + done, begin - done)) return false;
        if (!normalise_stretch(x, s + begin, end - begin)) return false;
        done = end;
        for (high = end; high < n && s[high] < LEAD_0300; high++) {
        }
    }
    return append(x, s + done, n - done);
}

enum status nfc_normalize(const void *s, size_t n, struct bytes *out, uint8_t **owned) {
    const uint8_t *p = s;
    size_t high = 0;
    *owned = NULL;
    *out = (struct bytes){p, n};
    while (high < n && p[high] < LEAD_0300) high++;
    if (high == n) return ST_OK;
    struct nfc x = {0};
    bool ok = out_reserve(&x, n) && normalise(&x, p, n, high);
    free(x.cp);
    if (!ok) {
        free(x.out);
        return ST_NO_MEMORY;
    }
    *owned = x.out;
    *out = (struct bytes){x.out, x.n};
    return ST_OK;
}
