/* gguf: files, tensor infos and splits; see gguf.h. gguf_meta.c has the keys, gguf_reader.c the bytes.
 *
 * Opening parses each part of a split file by itself, then looks at all tensors together: unique names, no
 * overlap, the number the first part promised. Every offset and size in struct gguf_tensor has been checked
 * against its file when gguf_open returns. Immutable from then on. */
#include "moe/gguf_internal.h"
#include "moe/quant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    DEFAULT_ALIGNMENT = 32, /* the format's own, when general.alignment is absent */
    MIN_ALIGNMENT = 8,
    MAX_ALIGNMENT = 4096
};

/* ---- header ------------------------------------------------------------------------------------- */

struct header {
    uint64_t n_tensors, n_keys;
};

static enum status parse_header(struct gguf_reader *r, struct header *h) {
    size_t at;
    uint32_t version;
    enum status st = gguf_reader_take(r, 4, "the header", &at);
    if (st != ST_OK) return st;
    if (memcmp(r->p + at, "GGUF", 4) != 0)
        return gguf_reader_fail(r, ST_CORRUPT, "not a GGUF file (it does not begin with GGUF)");
    st = gguf_reader_u32(r, "the header", &version);
    if (st != ST_OK) return st;
    uint32_t swapped = __builtin_bswap32(version);
    if (version > 0xFFFF && swapped >= 1 && swapped <= 0xFFFF)
        return gguf_reader_fail(r, ST_UNSUPPORTED,
                                "a big-endian GGUF file; convert it to little-endian");
    if (version == 1)
        return gguf_reader_fail(
            r, ST_UNSUPPORTED,
            "GGUF version 1; convert the model again (versions 2 and 3 are read)");
    if (version != 2 && version != 3)
        return gguf_reader_fail(r, ST_UNSUPPORTED, "GGUF version %u; versions 2 and 3 are read",
                                version);
    st = gguf_reader_u64(r, "the header", &h->n_tensors);
    if (st == ST_OK) st = gguf_reader_u64(r, "the header", &h->n_keys);
    return st;
}

static enum status read_alignment(struct gguf_reader *r, const struct gguf_meta *m, uint64_t *out) {
    int64_t v = DEFAULT_ALIGNMENT;
    struct error why;
    if (gguf_meta_has(m, "general.alignment")) {
        enum status st =
            gguf_meta_int(m, "general.alignment", MIN_ALIGNMENT, MAX_ALIGNMENT, &why, &v);
        if (st != ST_OK) return gguf_reader_fail(r, st, "%s", why.text);
    }
    if ((v & (v - 1)) != 0)
        return gguf_reader_fail(r, ST_CORRUPT, "general.alignment is %lld, not a power of two",
                                (long long)v);
    *out = (uint64_t)v;
    return ST_OK;
}

/* ---- tensor infos ------------------------------------------------------------------------------- */

/* Names of ggml types that quant.h does not have, for the message. */
static const char *foreign_type_name(uint32_t type) {
    static const char *const names[] = {
        [2] = "Q4_0",     [3] = "Q4_1",   [6] = "Q5_0",    [7] = "Q5_1",     [9] = "Q8_1",
        [10] = "Q2_K",    [11] = "Q3_K",  [15] = "Q8_K",   [16] = "IQ2_XXS", [17] = "IQ2_XS",
        [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",   [22] = "IQ2_S",
        [23] = "IQ4_XS",  [24] = "I8",    [25] = "I16",    [26] = "I32",     [27] = "I64",
        [28] = "F64",     [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",   [39] = "MXFP4"};
    const char *name = type < sizeof names / sizeof *names ? names[type] : NULL;
    return name ? name : "unknown to this build";
}

/* Append a NUL-terminated copy of the name to *names, which has room for it. */
static enum status parse_name(struct gguf_reader *r, char **names, const char **out) {
    uint64_t n;
    size_t at;
    enum status st = gguf_reader_u64(r, "the length of a tensor name", &n);
    if (st != ST_OK) return st;
    if (n == 0 || n > GGUF_MAX_NAME_BYTES)
        return gguf_reader_fail(r, ST_CORRUPT, "a tensor name of %llu bytes (1 to %d are possible)",
                                (unsigned long long)n, GGUF_MAX_NAME_BYTES);
    st = gguf_reader_take(r, n, "a tensor name", &at);
    if (st != ST_OK) return st;
    for (size_t i = 0; i < n; i++) {
        uint8_t c = r->p[at + i];
        if (c < 0x20 || c > 0x7E)
            return gguf_reader_fail(
                r, ST_CORRUPT, "a tensor name holds byte 0x%02x; names are printable ASCII", c);
    }
    *out = *names;
    memcpy(*names, r->p + at, (size_t)n);
    (*names)[n] = 0;
    *names += n + 1;
    return ST_OK;
}

/* n_dims and ne; *n_weights is their product. */
static enum status parse_dims(struct gguf_reader *r, struct gguf_tensor *t, size_t *n_weights) {
    uint32_t n_dims;
    enum status st = gguf_reader_u32(r, t->name, &n_dims);
    if (st != ST_OK) return st;
    if (n_dims < 1 || n_dims > 4)
        return gguf_reader_fail(r, ST_CORRUPT, "tensor %s has %u dimensions, not 1 to 4", t->name,
                                n_dims);
    t->n_dims = (int)n_dims;
    *n_weights = 1;
    for (int i = 0; i < 4; i++) {
        uint64_t ne = 1;
        if (i < t->n_dims) st = gguf_reader_u64(r, t->name, &ne);
        if (st != ST_OK) return st;
        if (ne == 0 || ne > INT64_MAX || !size_mul(*n_weights, (size_t)ne, n_weights) ||
            *n_weights > INT64_MAX)
            return gguf_reader_fail(r, ST_CORRUPT, "tensor %s has an impossible dimension, %llu",
                                    t->name, (unsigned long long)ne);
        t->ne[i] = (int64_t)ne;
    }
    return ST_OK;
}

/* One tensor info; offset stays relative to the data section until that is known. */
static enum status parse_tensor(struct gguf_reader *r, char **names, struct gguf_tensor *t) {
    size_t n_weights = 0;
    uint32_t type;
    int32_t block_weights, block_bytes;
    enum status st = parse_name(r, names, &t->name);
    if (st == ST_OK) st = parse_dims(r, t, &n_weights);
    if (st == ST_OK) st = gguf_reader_u32(r, t->name, &type);
    if (st == ST_OK) st = gguf_reader_u64(r, t->name, &t->offset);
    if (st != ST_OK) return st;
    t->type = (enum tensor_type)type;
    if (!tensor_type_block(t->type, &block_weights, &block_bytes))
        return gguf_reader_fail(
            r, ST_UNSUPPORTED,
            "tensor %s has type %u (%s); F32, F16, BF16, Q8_0, Q4_K, Q5_K and Q6_K are read",
            t->name, type, foreign_type_name(type));
    if (t->ne[0] % block_weights != 0)
        return gguf_reader_fail(
            r, ST_CORRUPT, "tensor %s has rows of %lld weights, not whole %s blocks of %d", t->name,
            (long long)t->ne[0], tensor_type_name(t->type), block_weights);
    if (!tensor_type_bytes(t->type, n_weights, &t->n_bytes))
        return gguf_reader_fail(r, ST_CORRUPT, "tensor %s is larger than any memory", t->name);
    return ST_OK;
}

static enum status parse_tensors(struct gguf_reader *r, uint64_t n, struct gguf *g, int file) {
    if (n > gguf_reader_left(r) / GGUF_TENSOR_MIN_BYTES)
        return gguf_reader_fail(r, ST_CORRUPT,
                                "the header claims %llu tensors, more than the file can hold",
                                (unsigned long long)n);
    if (n > GGUF_MAX_TENSORS - g->n_tensors)
        return gguf_reader_fail(r, ST_UNSUPPORTED, "more than %d tensors", GGUF_MAX_TENSORS);
    if (n == 0) return ST_OK;
    struct gguf_tensor *ts = realloc(g->tensors, (g->n_tensors + (size_t)n) * sizeof *ts);
    if (ts) g->tensors = ts;
    char *names = malloc((size_t)n * (GGUF_MAX_NAME_BYTES + 1));
    g->parts[file].names = names;
    if (!ts || !names) return gguf_reader_fail(r, ST_NO_MEMORY, "no memory for the tensor infos");
    for (size_t i = 0; i < n; i++) {
        struct gguf_tensor *t = &ts[g->n_tensors];
        *t = (struct gguf_tensor){.file = file};
        enum status st = parse_tensor(r, &names, t);
        if (st != ST_OK) return st;
        g->n_tensors++;
    }
    return ST_OK;
}

/* Make the offsets of a part's tensors, from g->tensors[first] on, absolute: they count from the end of
 * the metadata, rounded up. Hold each against the file's end. */
static enum status place_tensors(struct gguf_reader *r, uint64_t alignment, bool metadata_only,
                                 struct gguf *g, size_t first) {
    uint64_t data_at = (r->pos + alignment - 1) & ~(alignment - 1);
    for (size_t i = first; i < g->n_tensors; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        uint64_t end;
        if (t->offset % alignment != 0)
            return gguf_reader_fail(r, ST_CORRUPT, "tensor %s is not aligned to %llu bytes",
                                    t->name, (unsigned long long)alignment);
        if (__builtin_add_overflow(data_at, t->offset, &t->offset) ||
            __builtin_add_overflow(t->offset, t->n_bytes, &end) || end > INT64_MAX)
            return gguf_reader_fail(r, ST_CORRUPT, "tensor %s lies beyond any file", t->name);
        if (!metadata_only && end > r->file_bytes)
            return gguf_reader_fail(
                r, ST_CORRUPT, "tensor %s ends at byte %llu but the file has %llu; is it complete?",
                t->name, (unsigned long long)end, (unsigned long long)r->file_bytes);
    }
    return ST_OK;
}

/* ---- one file ------------------------------------------------------------------------------------ */

struct split {
    int64_t no, count, n_tensors; /* count 1: not split */
};

/* What open_part learns about a file besides its tensors. */
struct part {
    struct gguf_meta meta;
    struct split split;
};

static enum status read_split(struct gguf_reader *r, const struct gguf_meta *m, struct split *out) {
    struct error why;
    *out = (struct split){.count = 1};
    if (!gguf_meta_has(m, "split.count")) return ST_OK;
    enum status st = gguf_meta_int(m, "split.count", 0, GGUF_MAX_PARTS, &why, &out->count);
    if (st == ST_OK && out->count <= 1) {
        out->count = 1;
        return ST_OK;
    }
    if (st == ST_OK) st = gguf_meta_int(m, "split.no", 0, out->count - 1, &why, &out->no);
    if (st == ST_OK)
        st = gguf_meta_int(m, "split.tensors.count", 0, GGUF_MAX_TENSORS, &why, &out->n_tensors);
    return st == ST_OK ? ST_OK : gguf_reader_fail(r, st, "%s", why.text);
}

/* Open and check one file as part number `file` of g. out->meta is to be freed, also on failure. */
static enum status open_part(struct gguf *g, int file, const char *path, bool metadata_only,
                             struct error *e, struct part *out) {
    struct gguf_part *part = &g->parts[file];
    struct gguf_reader r = {.label = gguf_label(path), .e = e};
    struct header h;
    uint64_t alignment = 0;
    size_t first = g->n_tensors;
    enum status st = gguf_file_open(path, e, &part->fd, &part->file_bytes);
    if (st != ST_OK) return st;
    r.fd = part->fd;
    r.file_bytes = part->file_bytes;
    st = parse_header(&r, &h);
    if (st == ST_OK) st = gguf_meta_parse(&r, h.n_keys, &out->meta);
    if (st == ST_OK) st = parse_tensors(&r, h.n_tensors, g, file);
    if (st == ST_OK) st = gguf_meta_finish(&r, &out->meta);
    if (st == ST_OK) st = read_alignment(&r, &out->meta, &alignment);
    if (st == ST_OK) st = place_tensors(&r, alignment, metadata_only, g, first);
    if (st == ST_OK) st = read_split(&r, &out->meta, &out->split);
    free(r.p); /* NULL once out->meta has it */
    return st;
}

/* ---- all files ----------------------------------------------------------------------------------- */

static void gguf_clear(struct gguf *g) {
    for (int i = 0; i < g->n_parts; i++) {
        if (g->parts[i].fd >= 0) close(g->parts[i].fd);
        free(g->parts[i].names);
    }
    free(g->parts);
    free(g->tensors);
    free(g->by_name);
    gguf_meta_free(&g->meta);
    *g = (struct gguf){0};
}

static enum status make_parts(struct gguf *g, int n, struct error *e) {
    g->parts = calloc((size_t)n, sizeof *g->parts);
    if (!g->parts) return error_set(e, ST_NO_MEMORY, "no memory to open the model");
    g->n_parts = n;
    for (int i = 0; i < n; i++) g->parts[i].fd = -1;
    return ST_OK;
}

/* A part's name ends in "-00002-of-00005.gguf", counted from 1. */
enum { SUFFIX_BYTES = sizeof "-00001-of-00001.gguf" - 1 };

struct suffix {
    char s[48]; /* SUFFIX_BYTES long, as counts are at most GGUF_MAX_PARTS */
};

static struct suffix part_suffix(int64_t no, int64_t count) {
    struct suffix x;
    snprintf(x.s, sizeof x.s, "-%05d-of-%05d.gguf", (int)no + 1, (int)count);
    return x;
}

/* Open every part of the split file of which `path` is one, in order; the first only if metadata_only. */
static enum status open_split(struct gguf *g, const char *path, const struct split *named,
                              bool metadata_only, struct error *e) {
    struct suffix suffix = part_suffix(named->no, named->count);
    size_t n = strlen(path);
    if (n < SUFFIX_BYTES || strcmp(path + n - SUFFIX_BYTES, suffix.s) != 0)
        return error_set(e, ST_CORRUPT,
                         "%.80s: the file says it is part %d of %d, so its name must end in %s",
                         gguf_label(path), (int)named->no + 1, (int)named->count, suffix.s);
    char *name = malloc(n + 1);
    if (!name) return error_set(e, ST_NO_MEMORY, "no memory to open the model");
    memcpy(name, path, n + 1);
    enum status st = make_parts(g, metadata_only ? 1 : (int)named->count, e);
    for (int i = 0; st == ST_OK && i < g->n_parts; i++) {
        struct part part = {0};
        suffix = part_suffix(i, named->count);
        memcpy(name + n - SUFFIX_BYTES, suffix.s, SUFFIX_BYTES);
        st = open_part(g, i, name, metadata_only, e, &part);
        if (st == ST_NOT_FOUND)
            error_set(e, st, "part %d of %d is missing: %.150s", i + 1, (int)named->count, name);
        else if (st == ST_OK && (part.split.no != i || part.split.count != named->count ||
                                 part.split.n_tensors != named->n_tensors))
            st = error_set(
                e, ST_CORRUPT,
                "%.80s: says it is part %d of %d with %d tensors in all, not part %d of %d "
                "with %d",
                gguf_label(name), (int)part.split.no + 1, (int)part.split.count,
                (int)part.split.n_tensors, i + 1, (int)named->count, (int)named->n_tensors);
        if (i == 0)
            g->meta = part.meta;
        else
            gguf_meta_free(&part.meta);
    }
    if (st == ST_OK && !metadata_only && g->n_tensors != (size_t)named->n_tensors)
        st = error_set(e, ST_CORRUPT, "%.80s: the parts hold %zu tensors, not %d", gguf_label(path),
                       g->n_tensors, (int)named->n_tensors);
    free(name);
    return st;
}

static int compare_name(const void *a, const void *b) {
    return strcmp((*(const struct gguf_tensor *const *)a)->name,
                  (*(const struct gguf_tensor *const *)b)->name);
}

static int compare_place(const void *a, const void *b) {
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(const struct gguf_tensor *const *)b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* What concerns all tensors together. */
static enum status check_tensors(struct gguf *g, const char *label, struct error *e) {
    size_t n = g->n_tensors;
    if (n == 0) return ST_OK;
    const struct gguf_tensor **by = calloc(n, sizeof(*by));
    g->by_name = by;
    if (!by) return error_set(e, ST_NO_MEMORY, "no memory for the tensor infos");
    for (size_t i = 0; i < n; i++) by[i] = &g->tensors[i];
    qsort(by, n, sizeof(*by), compare_place);
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && by[i - 1]->file == by[i]->file &&
            by[i]->offset - by[i - 1]->offset < by[i - 1]->n_bytes)
            return error_set(e, ST_CORRUPT, "%.60s: tensors %s and %s overlap", label,
                             by[i - 1]->name, by[i]->name);
        if (__builtin_add_overflow(g->tensor_bytes, by[i]->n_bytes, &g->tensor_bytes))
            return error_set(e, ST_CORRUPT, "%.60s: the tensors are larger than any file", label);
    }
    qsort(by, n, sizeof(*by), compare_name);
    for (size_t i = 1; i < n; i++)
        if (compare_name(&by[i - 1], &by[i]) == 0)
            return error_set(e, ST_CORRUPT, "%.60s: tensor %s appears twice", label, by[i]->name);
    return ST_OK;
}

static enum status open_all(struct gguf *g, const char *path, bool metadata_only, struct error *e) {
    struct part part = {0};
    enum status st = make_parts(g, 1, e);
    if (st != ST_OK) return st;
    st = open_part(g, 0, path, metadata_only, e, &part);
    g->meta = part.meta;
    if (st != ST_OK) return st;
    if (part.split.count > 1 && !(metadata_only && part.split.no == 0)) {
        gguf_clear(g); /* the parts are opened in their order, this one again among them */
        st = open_split(g, path, &part.split, metadata_only, e);
        if (st != ST_OK) return st;
    }
    return check_tensors(g, gguf_label(path), e);
}

enum status gguf_open(const char *path, bool metadata_only, struct error *e, struct gguf **out) {
    *out = NULL;
    struct gguf *g = calloc(1, sizeof *g);
    if (!g) return error_set(e, ST_NO_MEMORY, "no memory to open the model");
    enum status st = open_all(g, path, metadata_only, e);
    if (st != ST_OK) {
        gguf_close(g);
        return st;
    }
    *out = g;
    return ST_OK;
}

void gguf_close(struct gguf *g) {
    if (!g) return;
    gguf_clear(g);
    free(g);
}

/* ---- tensors ------------------------------------------------------------------------------------- */

size_t gguf_n_tensors(const struct gguf *g) { return g->n_tensors; }

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i) {
    CHECK(i < g->n_tensors);
    return &g->tensors[i];
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name) {
    size_t lo = 0, hi = g->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = strcmp(g->by_name[mid]->name, name);
        if (c == 0) return g->by_name[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

enum status gguf_tensor_read(const struct gguf *g, const struct gguf_tensor *t, size_t offset,
                             void *dst, size_t n) {
    CHECK(offset <= t->n_bytes && n <= t->n_bytes - offset);
    return gguf_file_read(g->parts[t->file].fd, t->offset + offset, dst, n);
}

uint64_t gguf_tensor_bytes(const struct gguf *g) { return g->tensor_bytes; }
