/* paging: see paging.h. The free blocks are a stack: the block that was returned last is handed
 * out first, so that which blocks a history of calls yields is the same on every run, and memory
 * that was just used is used again. One thread. */
#include "paging/paging.h"

#include <stdlib.h>
#include <string.h>

#include "paging/pool.h"

static int32_t blocks_for(const struct paging *p, int32_t n_tokens) {
    int32_t b = p->limits.block_tokens;
    return n_tokens / b + (n_tokens % b != 0);
}

static int32_t *table_of(const struct paging *p, int32_t slot) {
    return p->tables + (size_t)slot * (size_t)p->limits.max_blocks_per_seq;
}

static void check_slot(const struct paging *p, int32_t slot) {
    CHECK(slot >= 0 && slot < p->limits.n_slots);
}

enum status paging_create(const struct paging_limits *l, struct paging **out) {
    *out = NULL;
    if (l->n_blocks <= 0 || l->n_slots <= 0 || l->max_blocks_per_seq <= 0) return ST_INVALID;
    if (l->block_tokens < 1 || l->block_tokens > 256 || (l->block_tokens & (l->block_tokens - 1)))
        return ST_INVALID;
    size_t n_entries;
    if (!size_mul((size_t)l->n_slots, (size_t)l->max_blocks_per_seq, &n_entries))
        return ST_NO_MEMORY;
    struct paging *p = calloc(1, sizeof *p);
    if (!p) return ST_NO_MEMORY;
    size_t n_blocks = (size_t)l->n_blocks, n_slots = (size_t)l->n_slots;
    p->limits = *l;
    p->free_blocks = calloc(n_blocks, sizeof *p->free_blocks);
    p->tables = calloc(n_entries, sizeof *p->tables);
    p->n_table = calloc(n_slots, sizeof *p->n_table);
    p->n_tokens = calloc(n_slots, sizeof *p->n_tokens);
    p->seen = calloc(n_blocks, sizeof *p->seen);
    if (!p->free_blocks || !p->tables || !p->n_table || !p->n_tokens || !p->seen) {
        paging_destroy(p);
        return ST_NO_MEMORY;
    }
    for (int32_t i = 0; i < l->n_blocks; i++) p->free_blocks[i] = l->n_blocks - 1 - i;
    p->n_free = l->n_blocks;
    *out = p;
    return ST_OK;
}

void paging_destroy(struct paging *p) {
    if (!p) return;
    free(p->free_blocks);
    free(p->tables);
    free(p->n_table);
    free(p->n_tokens);
    free(p->seen);
    free(p);
}

int32_t paging_seq_missing(const struct paging *p, int32_t slot, int32_t n_tokens) {
    check_slot(p, slot);
    CHECK(n_tokens >= 0);
    int32_t n = blocks_for(p, n_tokens) - p->n_table[slot];
    return n > 0 ? n : 0;
}

enum status paging_seq_reserve(struct paging *p, int32_t slot, int32_t n_tokens) {
    int32_t n = paging_seq_missing(p, slot, n_tokens);
    if (n > p->limits.max_blocks_per_seq - p->n_table[slot]) return ST_TOO_LONG;
    if (n > p->n_free) {
        p->n_refused++;
        return ST_NO_BLOCKS;
    }
    int32_t *table = table_of(p, slot) + p->n_table[slot];
    for (int32_t i = 0; i < n; i++) table[i] = p->free_blocks[--p->n_free];
    p->n_table[slot] += n;
    if (n_tokens > p->n_tokens[slot]) p->n_tokens[slot] = n_tokens;
    p->n_reserved += (uint64_t)n;
    int32_t held = p->limits.n_blocks - p->n_free;
    if (held > p->peak_held) p->peak_held = held;
    return ST_OK;
}

void paging_seq_free(struct paging *p, int32_t slot) {
    check_slot(p, slot);
    const int32_t *table = table_of(p, slot);
    /* Last block first: a sequence that starts next gets the same ones in the same order. */
    for (int32_t i = p->n_table[slot]; i-- > 0;) p->free_blocks[p->n_free++] = table[i];
    p->n_released += (uint64_t)p->n_table[slot];
    p->n_table[slot] = 0;
    p->n_tokens[slot] = 0;
}

int32_t paging_seq_n_blocks(const struct paging *p, int32_t slot) {
    check_slot(p, slot);
    return p->n_table[slot];
}

void paging_seq_copy(const struct paging *p, int32_t slot, int32_t n, int32_t *out) {
    check_slot(p, slot);
    CHECK(n >= 0 && n <= p->n_table[slot]);
    memcpy(out, table_of(p, slot), (size_t)n * sizeof *out);
}

int32_t paging_n_free(const struct paging *p) { return p->n_free; }

struct paging_limits paging_limits(const struct paging *p) {
    return p->limits;
}

struct paging_stats paging_stats(const struct paging *p) {
    return (struct paging_stats){
        .total = p->limits.n_blocks,
        .free = p->n_free,
        .cached = 0,
        .held = p->limits.n_blocks - p->n_free,
        .peak_held = p->peak_held,
        .n_reserved = p->n_reserved,
        .n_released = p->n_released,
        .n_refused = p->n_refused,
    };
}

/* Count block b, found in `where` (a slot, or -1 for the free list). */
static enum status see(const struct paging *p, int32_t b, int32_t where, struct error *e) {
    if (b < 0 || b >= p->limits.n_blocks)
        return error_set(e, ST_INTERNAL, "block %d, in slot %d (-1: free), is not of the pool", b,
                         where);
    if (p->seen[b])
        return error_set(e, ST_INTERNAL, "block %d, in slot %d (-1: free), is in two places", b,
                         where);
    p->seen[b] = 1;
    return ST_OK;
}

enum status paging_check(const struct paging *p, struct error *e) {
    int32_t n_held = 0;
    if (p->n_free < 0 || p->n_free > p->limits.n_blocks)
        return error_set(e, ST_INTERNAL, "%d blocks are free of %d", p->n_free, p->limits.n_blocks);
    memset(p->seen, 0, (size_t)p->limits.n_blocks);
    for (int32_t i = 0; i < p->n_free; i++) {
        enum status st = see(p, p->free_blocks[i], -1, e);
        if (st != ST_OK) return st;
    }
    for (int32_t slot = 0; slot < p->limits.n_slots; slot++) {
        int32_t n = p->n_table[slot];
        if (n < 0 || n > p->limits.max_blocks_per_seq || n != blocks_for(p, p->n_tokens[slot]))
            return error_set(e, ST_INTERNAL, "slot %d has %d blocks for %d tokens", slot, n,
                             p->n_tokens[slot]);
        for (int32_t i = 0; i < n; i++) {
            enum status st = see(p, table_of(p, slot)[i], slot, e);
            if (st != ST_OK) return st;
        }
        n_held += n;
    }
    if (p->n_free + n_held != p->limits.n_blocks)
        return error_set(e, ST_INTERNAL, "%d free and %d held blocks are not %d", p->n_free, n_held,
                         p->limits.n_blocks);
    if (p->n_reserved - p->n_released != (uint64_t)n_held || p->peak_held < n_held)
        return error_set(e, ST_INTERNAL, "the counters do not add up to %d held blocks", n_held);
    return ST_OK;
}
