/* paging: where keys and values live. A pool of fixed-size blocks and, per sequence slot, the table
 * of blocks that hold its positions. Integers only: this room knows no model and no device; a block
 * id is an index that the backend turns into memory.
 *
 * Invariants, checked by paging_check and by property tests:
 *   free + cached + held == total; a block is on exactly one list or in exactly one table;
 *   a slot's blocks == ceil(reserved tokens / block_tokens).
 * (`cached` is 0 until there is a prefix cache.)
 *
 * One owner thread (the daemon's loop). No allocation after paging_create. */
#ifndef MOED_PAGING_PAGING_H
#define MOED_PAGING_PAGING_H

#include "proto/base.h"

struct paging;

struct paging_limits {
    int32_t n_blocks;           /* in the pool, > 0 */
    int32_t block_tokens;       /* B, a power of two, 1 … 256; 16 by default */
    int32_t n_slots;            /* sequences that can hold blocks at once, > 0 */
    int32_t max_blocks_per_seq; /* longest table, > 0 */
};

struct paging_stats {
    int32_t total, free, cached, held; /* blocks */
    int32_t peak_held;                 /* since creation */
    uint64_t n_reserved, n_released;   /* blocks handed out and returned, ever */
    uint64_t n_refused;                /* reservations that did not fit */
};

/* ST_INVALID on limits out of range, ST_NO_MEMORY. */
enum status paging_create(const struct paging_limits *limits, struct paging **out);
void paging_destroy(struct paging *p); /* NULL is fine */

/* Make slot's table cover n_tokens positions, all or nothing. Growing only: fewer tokens than it
 * covers already is ST_OK and changes nothing. ST_NO_BLOCKS when the pool is short, ST_TOO_LONG
 * when the table would exceed max_blocks_per_seq; in both cases nothing changed. */
enum status paging_seq_reserve(struct paging *p, int32_t slot, int32_t n_tokens);

/* Blocks that paging_seq_reserve(p, slot, n_tokens) would take from the pool now; >= 0. */
int32_t paging_seq_missing(const struct paging *p, int32_t slot, int32_t n_tokens);

/* Return all of slot's blocks to the pool. Nothing held: no effect. */
void paging_seq_free(struct paging *p, int32_t slot);

int32_t paging_seq_n_blocks(const struct paging *p, int32_t slot);

/* Copy slot's first n block ids, in position order, to out. CHECK: n <= its blocks. */
void paging_seq_copy(const struct paging *p, int32_t slot, int32_t n, int32_t *out);

int32_t paging_n_free(const struct paging *p);
struct paging_limits paging_limits(const struct paging *p); /* as created */
struct paging_stats paging_stats(const struct paging *p);

/* Verify every invariant in O(blocks). ST_INTERNAL with the first violation named. For tests, and
 * for the daemon when idle in debug builds. */
enum status paging_check(const struct paging *p, struct error *e);

#endif
