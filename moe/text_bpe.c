/* Byte-pair encoding: the merge table and the merging of one word.
 *
 * A word starts as one token per byte. Again and again the adjacent pair of lowest rank, the leftmost of
 * equals, becomes one token, until no adjacent pair has a merge. (Sennrich, Haddow and Birch 2016; the
 * tie rule is the reference tokenizer's.) Short words scan an array; long ones keep a heap of candidate
 * pairs over a linked list, so that a word of n bytes costs O(n log n).
 *
 * Only ordinary tokens take part in merges: plain text can never turn into a special token. */
#include "moe/text_internal.h"

#include <stdlib.h>
#include <string.h>

enum { SHORT_WORD = 48 }; /* bytes; scanning is the faster way up to about 60 */

static size_t pair_hash(const struct bpe *b, uint64_t pair) {
    uint64_t h = (pair ^ b->seed) * UINT64_C(0x9e3779b97f4a7c15);
    h = (h ^ h >> 32) * UINT64_C(0xd6e8feb86659fd93);
    return h ^ h >> 32;
}

/* The slot of the pair, or the empty slot where it would be. */
static struct merge *merge_slot(const struct bpe *b, uint64_t pair) {
    size_t i = pair_hash(b, pair) & b->mask;
    while (b->slot[i].rank != MERGE_NONE && b->slot[i].pair != pair) i = (i + 1) & b->mask;
    return &b->slot[i];
}

static const struct merge *merge_of(const struct bpe *b, int32_t left, int32_t right) {
    return merge_slot(b, (uint64_t)left << 32 | (uint32_t)right);
}

/* ---- loading ------------------------------------------------------------------------------------------- */

static int32_t merge_part(const struct vocab *v, const struct vocab_index *index, const void *s,
                          size_t n) {
    int32_t id = vocab_index_find(index, s, n);
    return id >= 0 && v->kind[id] == TOKEN_NORMAL ? id : -1;
}

static enum status merge_add(struct bpe *b, const struct vocab *v, const struct vocab_index *index,
                             struct bytes line, uint32_t rank) {
    uint8_t joined[4 * TEXT_MAX_PIECE_BYTES];
    const uint8_t *space = line.n > 0 ? memchr(line.p, ' ', line.n) : NULL;
    if (!space || line.n - 1 > sizeof joined) return ST_CORRUPT;
    size_t n_left = (size_t)(space - line.p), n_right = line.n - n_left - 1;
    memcpy(joined, line.p, n_left);
    memcpy(joined + n_left, space + 1, n_right);
    int32_t left = merge_part(v, index, line.p, n_left);
    int32_t right = merge_part(v, index, space + 1, n_right);
    int32_t id = merge_part(v, index, joined, n_left + n_right);
    if (left < 0 || right < 0 || id < 0) return ST_NOT_FOUND;
    struct merge *m = merge_slot(b, (uint64_t)left << 32 | (uint32_t)right);
    if (m->rank != MERGE_NONE) return ST_CONFLICT;
    *m = (struct merge){(uint64_t)left << 32 | (uint32_t)right, rank, id};
    return ST_OK;
}

enum status bpe_load(const struct gguf *g, const struct vocab *v, const struct vocab_index *index,
                     struct error *e, struct bpe *out) {
    const struct bytes *lines;
    size_t n, size = 16;
    enum status st = text_required(gguf_string_array(g, "tokenizer.ggml.merges", e, &lines, &n), e);
    if (st != ST_OK) return st;
    if (n >= UINT32_MAX / 4)
        return error_set(e, ST_CORRUPT, "tokenizer.ggml.merges has %zu elements", n);
    while (size < 2 * n) size *= 2;
    out->slot = malloc(size * sizeof *out->slot);
    if (!out->slot) return error_set(e, ST_NO_MEMORY, "no memory for the merges");
    out->mask = size - 1;
    out->byte_id = v->byte_id;
    random_bytes(&out->seed, sizeof out->seed);
    for (size_t i = 0; i < size; i++) out->slot[i] = (struct merge){0, MERGE_NONE, -1};
    for (size_t i = 0; i < n; i++) {
        char name[64];
        switch (merge_add(out, v, index, lines[i], (uint32_t)i)) {
        case ST_OK: break;
        case ST_NOT_FOUND:
            return error_set(e, ST_CORRUPT,
                             "tokenizer.ggml.merges[%zu] '%s': a part or the result is not an "
                             "ordinary token of tokenizer.ggml.tokens",
                             i, text_printable(lines[i], name));
        case ST_CONFLICT:
            return error_set(e, ST_CORRUPT, "tokenizer.ggml.merges[%zu] '%s' is there twice", i,
                             text_printable(lines[i], name));
        default:
            return error_set(e, ST_CORRUPT,
                             "tokenizer.ggml.merges[%zu] '%s' is not two tokens with a space "
                             "between",
                             i, text_printable(lines[i], name));
        }
    }
    return ST_OK;
}

void bpe_free(struct bpe *b) {
    free(b->slot);
    *b = (struct bpe){0};
}

void bpe_scratch_free(struct bpe_scratch *x) {
    free(x->memory);
    *x = (struct bpe_scratch){0};
}

/* ---- short words ------------------------------------------------------------------------------------------ */

static enum status word_short(const struct bpe *b, const uint8_t *s, size_t n,
                              struct id_list *out) {
    int32_t ids[SHORT_WORD];
    uint32_t rank[SHORT_WORD]; /* of the pair that begins here */
    int32_t becomes[SHORT_WORD];
    for (size_t i = 0; i < n; i++) ids[i] = b->byte_id[s[i]];
    for (size_t i = 0; i + 1 < n; i++) {
        const struct merge *m = merge_of(b, ids[i], ids[i + 1]);
        rank[i] = m->rank;
        becomes[i] = m->id;
    }
    while (n > 1) {
        size_t at = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[at]) at = i;
        if (rank[at] == MERGE_NONE) break;
        ids[at] = becomes[at];
        n--;
        for (size_t i = at + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            rank[i] = rank[i + 1];
            becomes[i] = becomes[i + 1];
        }
        for (size_t i = at > 0 ? at - 1 : 0; i <= at && i + 1 < n; i++) {
            const struct merge *m = merge_of(b, ids[i], ids[i + 1]);
            rank[i] = m->rank;
            becomes[i] = m->id;
        }
    }
    if (n > out->cap - out->n) return ST_TOO_LONG;
    memcpy(out->p + out->n, ids, n * sizeof *ids);
    out->n += n;
    return ST_OK;
}

/* ---- long words -------------------------------------------------------------------------------------------- */

struct symbol {
    int32_t id; /* -1: merged into an earlier one */
    int32_t becomes; /* what the pair that begins here becomes */
    uint32_t rank; /* of that pair; MERGE_NONE: no merge */
    uint32_t prev, next;
};
#define SYMBOL_NONE UINT32_MAX

struct candidate_heap { /* least first: rank << 32 | position */
    uint64_t *key;
    size_t n;
};

static void heap_sift_down(struct candidate_heap *h, size_t i) {
    uint64_t key = h->key[i];
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= h->n) break;
        if (child + 1 < h->n && h->key[child + 1] < h->key[child]) child++;
        if (key <= h->key[child]) break;
        h->key[i] = h->key[child];
        i = child;
    }
    h->key[i] = key;
}

static void heap_push(struct candidate_heap *h, uint64_t key) {
    size_t i = h->n++;
    for (; i > 0 && h->key[(i - 1) / 2] > key; i = (i - 1) / 2) h->key[i] = h->key[(i - 1) / 2];
    h->key[i] = key;
}

static uint64_t heap_pop(struct candidate_heap *h) {
    uint64_t least = h->key[0];
    h->key[0] = h->key[--h->n];
    if (h->n > 1) heap_sift_down(h, 0);
    return least;
}

/* Look the pair that begins at i up again; true if it has a merge. */
static bool symbol_rank(const struct bpe *b, struct symbol *sym, uint32_t i) {
    sym[i].rank = MERGE_NONE;
    if (sym[i].next == SYMBOL_NONE) return false;
    const struct merge *m = merge_of(b, sym[i].id, sym[sym[i].next].id);
    sym[i].rank = m->rank;
    sym[i].becomes = m->id;
    return m->rank != MERGE_NONE;
}

static void symbols_merge(const struct bpe *b, struct symbol *sym, struct candidate_heap *h) {
    while (h->n > 0) {
        uint64_t key = heap_pop(h);
        uint32_t rank = (uint32_t)(key >> 32), i = (uint32_t)key;
        /* A rank names one pair, so an entry whose rank still stands is that pair still. */
        if (sym[i].id < 0 || sym[i].rank != rank) continue;
        uint32_t gone = sym[i].next, next = sym[gone].next, prev = sym[i].prev;
        sym[i].id = sym[i].becomes;
        sym[i].next = next;
        sym[gone].id = -1;
        if (next != SYMBOL_NONE) sym[next].prev = i;
        if (symbol_rank(b, sym, i)) heap_push(h, (uint64_t)sym[i].rank << 32 | i);
        if (prev != SYMBOL_NONE && symbol_rank(b, sym, prev))
            heap_push(h, (uint64_t)sym[prev].rank << 32 | prev);
    }
}

/* Room for n symbols and 2 n candidates: at most n - 1 at the start, and a merge takes one out and puts at
 * most two in. */
static bool scratch_reserve(struct bpe_scratch *x, size_t n) {
    size_t bytes;
    if (!size_mul(n, sizeof(struct symbol) + 2 * sizeof(uint64_t), &bytes)) return false;
    if (bytes <= x->cap_bytes) return true;
    bpe_scratch_free(x);
    x->memory = malloc(bytes);
    if (x->memory) x->cap_bytes = bytes;
    return x->memory != NULL;
}

static enum status word_long(const struct bpe *b, const uint8_t *s, size_t n, struct bpe_scratch *x,
                             struct id_list *out) {
    if (n >= SYMBOL_NONE) return ST_TOO_LONG;
    if (!scratch_reserve(x, n)) return ST_NO_MEMORY;
    struct candidate_heap h = {x->memory, 0};
    struct symbol *sym = (struct symbol *)(void *)(h.key + 2 * n);
    for (uint32_t i = 0; i < n; i++)
        sym[i] = (struct symbol){.id = b->byte_id[s[i]],
                                 .prev = i > 0 ? i - 1 : SYMBOL_NONE,
                                 .next = i + 1 < n ? i + 1 : SYMBOL_NONE};
    for (uint32_t i = 0; i < n; i++)
        if (symbol_rank(b, sym, i)) h.key[h.n++] = (uint64_t)sym[i].rank << 32 | i;
    for (size_t i = h.n / 2; i-- > 0;) heap_sift_down(&h, i);
    symbols_merge(b, sym, &h);
    for (uint32_t i = 0; i != SYMBOL_NONE; i = sym[i].next) {
        if (out->n == out->cap) return ST_TOO_LONG;
        out->p[out->n++] = sym[i].id;
    }
    return ST_OK;
}

enum status bpe_word(const struct bpe *b, const uint8_t *s, size_t n, struct bpe_scratch *x,
                     struct id_list *out) {
    if (n == 0) return ST_OK;
    return n <= SHORT_WORD ? word_short(b, s, n, out) : word_long(b, s, n, x, out);
}
