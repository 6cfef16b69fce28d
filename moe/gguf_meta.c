/* gguf_meta: the keys and values of a GGUF file, and the typed getters of gguf.h.
 *
 * Parsing records where each value lies; gguf_meta_finish then sorts the keys and lays out arrays of
 * strings and integers, after which nothing changes. Arrays of arrays are refused, so nothing recurses. */
#include "moe/gguf_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TYPES = GGUF_F64 + 1 };
static const uint8_t type_bytes[N_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
static const char *const type_names[N_TYPES] = {
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};

/* A key as messages show it: bounded, quoted by the caller. Keys are printable ASCII once parsed. */
enum { SHOWN_KEY_BYTES = 64 };

static enum status parse_key(struct gguf_reader *r, struct gguf_kv *kv) {
    uint64_t n;
    enum status st = gguf_reader_u64(r, "the length of a key", &n);
    if (st != ST_OK) return st;
    if (n == 0 || n > GGUF_MAX_KEY_BYTES)
        return gguf_reader_fail(r, ST_CORRUPT, "a key of %llu bytes (1 to %d are possible)",
                                (unsigned long long)n, GGUF_MAX_KEY_BYTES);
    st = gguf_reader_take(r, n, "a key", &kv->key_at);
    if (st != ST_OK) return st;
    kv->key.n = (size_t)n;
    for (size_t i = 0; i < kv->key.n; i++) {
        uint8_t c = r->p[kv->key_at + i];
        if (c < 0x20 || c > 0x7E)
            return gguf_reader_fail(r, ST_CORRUPT,
                                    "a key holds byte 0x%02x; keys are printable ASCII", c);
    }
    return ST_OK;
}

/* Step over the payload of an array whose element type and count are known. */
static enum status parse_elements(struct gguf_reader *r, struct gguf_kv *kv, const char *what) {
    if (kv->element != GGUF_STRING) {
        /* n was held against the remaining bytes, so the product cannot wrap. */
        return gguf_reader_take(r, (uint64_t)kv->n * type_bytes[kv->element], what, &kv->at);
    }
    kv->at = r->pos;
    for (size_t i = 0; i < kv->n; i++) {
        uint64_t n;
        size_t at;
        enum status st = gguf_reader_u64(r, what, &n);
        if (st == ST_OK) st = gguf_reader_take(r, n, what, &at);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static enum status parse_type(struct gguf_reader *r, const char *what, enum gguf_type *out) {
    uint32_t type;
    enum status st = gguf_reader_u32(r, what, &type);
    if (st != ST_OK) return st;
    if (type >= N_TYPES)
        return gguf_reader_fail(r, ST_CORRUPT, "%s has value type %u, which GGUF does not have",
                                what, type);
    *out = (enum gguf_type)type;
    return ST_OK;
}

static enum status parse_array(struct gguf_reader *r, struct gguf_kv *kv, const char *what) {
    uint64_t n;
    enum status st = parse_type(r, what, &kv->element);
    if (st == ST_OK) st = gguf_reader_u64(r, what, &n);
    if (st != ST_OK) return st;
    if (kv->element == GGUF_ARRAY)
        return gguf_reader_fail(r, ST_UNSUPPORTED, "%s is an array of arrays", what);
    uint64_t min_bytes = kv->element == GGUF_STRING ? sizeof(uint64_t) : type_bytes[kv->element];
    if (n > gguf_reader_left(r) / min_bytes)
        return gguf_reader_fail(r, ST_CORRUPT,
                                "%s claims %llu elements, more than the file can hold", what,
                                (unsigned long long)n);
    kv->n = (size_t)n;
    return parse_elements(r, kv, what);
}

static enum status parse_kv(struct gguf_reader *r, struct gguf_kv *kv) {
    enum status st = parse_key(r, kv);
    if (st != ST_OK) return st;
    char what[SHOWN_KEY_BYTES + 8];
    snprintf(what, sizeof what, "key %.*s",
             kv->key.n < SHOWN_KEY_BYTES ? (int)kv->key.n : SHOWN_KEY_BYTES,
             (const char *)r->p + kv->key_at);
    st = parse_type(r, what, &kv->type);
    if (st != ST_OK) return st;
    if (kv->type == GGUF_ARRAY) return parse_array(r, kv, what);
    uint64_t n = type_bytes[kv->type];
    kv->n = 1;
    if (kv->type == GGUF_STRING) {
        st = gguf_reader_u64(r, what, &n);
        if (st != ST_OK) return st;
        kv->n = (size_t)n;
    }
    return gguf_reader_take(r, n, what, &kv->at);
}

enum status gguf_meta_parse(struct gguf_reader *r, uint64_t n, struct gguf_meta *m) {
    if (n > gguf_reader_left(r) / GGUF_KEY_MIN_BYTES)
        return gguf_reader_fail(r, ST_CORRUPT,
                                "the header claims %llu keys, more than the file can hold",
                                (unsigned long long)n);
    if (n > GGUF_MAX_KEYS)
        return gguf_reader_fail(r, ST_UNSUPPORTED, "%llu keys; at most %d are read",
                                (unsigned long long)n, GGUF_MAX_KEYS);
    if (n == 0) return ST_OK;
    m->kvs = calloc((size_t)n, sizeof *m->kvs);
    if (!m->kvs) return gguf_reader_fail(r, ST_NO_MEMORY, "no memory for the keys");
    m->n_kvs = (size_t)n;
    for (size_t i = 0; i < m->n_kvs; i++) {
        enum status st = parse_kv(r, &m->kvs[i]);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static int bytes_compare(struct bytes a, struct bytes b) {
    int c = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return c != 0 ? c : (a.n > b.n) - (a.n < b.n);
}

static int kv_compare(const void *a, const void *b) {
    return bytes_compare(((const struct gguf_kv *)a)->key, ((const struct gguf_kv *)b)->key);
}

/* An integer of any width at p. False if it does not fit an int64. */
static bool int_at(enum gguf_type type, const uint8_t *p, int64_t *out) {
    union {
        uint8_t u8;
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        uint64_t u64;
        int64_t i64;
    } v;
    memcpy(&v, p, type_bytes[type]);
    switch (type) {
    case GGUF_U8: *out = v.u8; return true;
    case GGUF_I8: *out = v.i8; return true;
    case GGUF_U16: *out = v.u16; return true;
    case GGUF_I16: *out = v.i16; return true;
    case GGUF_U32: *out = v.u32; return true;
    case GGUF_I32: *out = v.i32; return true;
    case GGUF_I64: *out = v.i64; return true;
    case GGUF_U64: *out = v.i64; return v.u64 <= INT64_MAX;
    default: return false;
    }
}

static bool is_int(enum gguf_type type) {
    return type <= GGUF_I32 || type == GGUF_U64 || type == GGUF_I64;
}

static bool layout_strings(const uint8_t *meta, struct gguf_kv *kv) {
    kv->strings = calloc(kv->n ? kv->n : 1, sizeof *kv->strings);
    if (!kv->strings) return false;
    const uint8_t *p = meta + kv->at;
    for (size_t i = 0; i < kv->n; i++) {
        uint64_t n;
        memcpy(&n, p, sizeof n);
        kv->strings[i] = (struct bytes){p + sizeof n, (size_t)n};
        p += sizeof n + n;
    }
    return true;
}

/* Leaves ints NULL when an element does not fit: the getter then says so, if anybody asks. */
static bool layout_ints(const uint8_t *meta, struct gguf_kv *kv) {
    kv->ints = calloc(kv->n ? kv->n : 1, sizeof *kv->ints);
    if (!kv->ints) return false;
    const uint8_t *p = meta + kv->at;
    for (size_t i = 0; i < kv->n; i++, p += type_bytes[kv->element]) {
        int64_t v;
        if (!int_at(kv->element, p, &v) || v < INT32_MIN || v > INT32_MAX) {
            free(kv->ints);
            kv->ints = NULL;
            return true;
        }
        kv->ints[i] = (int32_t)v;
    }
    return true;
}

enum status gguf_meta_finish(struct gguf_reader *r, struct gguf_meta *m) {
    m->p = r->p;
    r->p = NULL;
    for (size_t i = 0; i < m->n_kvs; i++) m->kvs[i].key.p = m->p + m->kvs[i].key_at;
    if (m->n_kvs > 1) qsort(m->kvs, m->n_kvs, sizeof *m->kvs, kv_compare);
    for (size_t i = 0; i < m->n_kvs; i++) {
        struct gguf_kv *kv = &m->kvs[i];
        if (i > 0 && kv_compare(kv - 1, kv) == 0)
            return gguf_reader_fail(r, ST_CORRUPT, "key %.*s appears twice",
                                    kv->key.n < SHOWN_KEY_BYTES ? (int)kv->key.n : SHOWN_KEY_BYTES,
                                    (const char *)kv->key.p);
        if (kv->type != GGUF_ARRAY) continue;
        if ((kv->element == GGUF_STRING && !layout_strings(m->p, kv)) ||
            (is_int(kv->element) && !layout_ints(m->p, kv)))
            return gguf_reader_fail(r, ST_NO_MEMORY, "no memory for an array of %zu elements",
                                    kv->n);
    }
    return ST_OK;
}

void gguf_meta_free(struct gguf_meta *m) {
    for (size_t i = 0; i < m->n_kvs; i++) {
        free(m->kvs[i].strings);
        free(m->kvs[i].ints);
    }
    free(m->kvs);
    free(m->p);
    *m = (struct gguf_meta){0};
}

/* ---- getters ------------------------------------------------------------------------------------- */

static const struct gguf_kv *meta_find(const struct gguf_meta *m, const char *key) {
    struct bytes want = {(const uint8_t *)key, strlen(key)};
    size_t lo = 0, hi = m->n_kvs;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = bytes_compare(m->kvs[mid].key, want);
        if (c == 0) return &m->kvs[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

/* Find a key; when it is absent say so. */
static enum status meta_need(const struct gguf_meta *m, const char *key, struct error *e,
                             const struct gguf_kv **out) {
    *out = meta_find(m, key);
    return *out ? ST_OK : error_set(e, ST_NOT_FOUND, "the file has no key %s", key);
}

static enum status type_error(const struct gguf_kv *kv, const char *key, const char *want,
                              struct error *e) {
    if (kv->type == GGUF_ARRAY)
        return error_set(e, ST_CORRUPT, "key %s is an array of %s, not %s", key,
                         type_names[kv->element], want);
    return error_set(e, ST_CORRUPT, "key %s is of type %s, not %s", key, type_names[kv->type],
                     want);
}

bool gguf_meta_has(const struct gguf_meta *m, const char *key) { return meta_find(m, key) != NULL; }

enum status gguf_meta_int(const struct gguf_meta *m, const char *key, int64_t lo, int64_t hi,
                          struct error *e, int64_t *out) {
    const struct gguf_kv *kv;
    enum status st = meta_need(m, key, e, &kv);
    if (st != ST_OK) return st;
    if (!is_int(kv->type)) return type_error(kv, key, "an integer", e);
    int64_t v;
    bool fits = int_at(kv->type, m->p + kv->at, &v);
    if (!fits)
        return error_set(e, ST_CORRUPT, "key %s is above the largest value allowed, %lld", key,
                         (long long)hi);
    if (v < lo || v > hi)
        return error_set(e, ST_CORRUPT, "key %s is %lld, outside %lld to %lld", key, (long long)v,
                         (long long)lo, (long long)hi);
    *out = v;
    return ST_OK;
}

bool gguf_has(const struct gguf *g, const char *key) { return gguf_meta_has(&g->meta, key); }

enum status gguf_get_int(const struct gguf *g, const char *key, int64_t lo, int64_t hi,
                         struct error *e, int64_t *out) {
    return gguf_meta_int(&g->meta, key, lo, hi, e, out);
}

enum status gguf_get_float(const struct gguf *g, const char *key, double lo, double hi,
                           struct error *e, double *out) {
    const struct gguf_kv *kv;
    enum status st = meta_need(&g->meta, key, e, &kv);
    if (st != ST_OK) return st;
    double v;
    if (kv->type == GGUF_F32) {
        float f;
        memcpy(&f, g->meta.p + kv->at, sizeof f);
        v = (double)f;
    } else if (kv->type == GGUF_F64) {
        memcpy(&v, g->meta.p + kv->at, sizeof v);
    } else {
        return type_error(kv, key, "a float", e);
    }
    if (!isfinite(v)) return error_set(e, ST_CORRUPT, "key %s is not a finite number", key);
    if (v < lo || v > hi)
        return error_set(e, ST_CORRUPT, "key %s is %g, outside %g to %g", key, v, lo, hi);
    *out = v;
    return ST_OK;
}

enum status gguf_get_bool(const struct gguf *g, const char *key, struct error *e, bool *out) {
    const struct gguf_kv *kv;
    enum status st = meta_need(&g->meta, key, e, &kv);
    if (st != ST_OK) return st;
    if (kv->type != GGUF_BOOL) return type_error(kv, key, "a bool", e);
    uint8_t v = g->meta.p[kv->at];
    if (v > 1) return error_set(e, ST_CORRUPT, "key %s is a bool of value %u", key, v);
    *out = v == 1;
    return ST_OK;
}

enum status gguf_get_string(const struct gguf *g, const char *key, struct error *e,
                            struct bytes *out) {
    const struct gguf_kv *kv;
    enum status st = meta_need(&g->meta, key, e, &kv);
    if (st != ST_OK) return st;
    if (kv->type != GGUF_STRING) return type_error(kv, key, "a string", e);
    *out = (struct bytes){g->meta.p + kv->at, kv->n};
    return ST_OK;
}

enum status gguf_string_array(const struct gguf *g, const char *key, struct error *e,
                              const struct bytes **out, size_t *n) {
    const struct gguf_kv *kv;
    enum status st = meta_need(&g->meta, key, e, &kv);
    if (st != ST_OK) return st;
    if (!kv->strings) return type_error(kv, key, "an array of strings", e);
    *out = kv->strings;
    *n = kv->n;
    return ST_OK;
}

enum status gguf_int_array(const struct gguf *g, const char *key, struct error *e,
                           const int32_t **out, size_t *n) {
    const struct gguf_kv *kv;
    enum status st = meta_need(&g->meta, key, e, &kv);
    if (st != ST_OK) return st;
    if (kv->type != GGUF_ARRAY || !is_int(kv->element))
        return type_error(kv, key, "an array of integers", e);
    if (!kv->ints)
        return error_set(e, ST_CORRUPT, "key %s has an element that does not fit 32 bits", key);
    *out = kv->ints;
    *n = kv->n;
    return ST_OK;
}
