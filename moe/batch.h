/* batch: a step spelled out per token and per head row, and the results of steps not yet collected. What
 * CPU backends share around the ops; they compute a step inside submit, so the step may be borrowed.
 * Private to moe/. One thread. */
#ifndef MOED_MOE_BATCH_H
#define MOED_MOE_BATCH_H

#include "moe/backend.h"
#include "moe/sampler.h"

struct batch_row {
    int32_t token; /* index of its token in the step */
    int32_t slot;
    bool sample; /* false: MOE_ROWS_ALL */
};

struct batch {
    int32_t block_tokens; /* B */
    int32_t n_tokens; /* T */
    int32_t n_rows; /* R */
    int32_t *ids; /* [T], MOE_LAST_TOKEN replaced */
    int32_t *pos; /* [T] position in its sequence */
    const int32_t **blocks; /* [T] its sequence's block table, borrowed from the step */
    struct batch_row *rows; /* [R] in step order */
};

/* ST_NO_MEMORY leaves *out zeroed; so does destroy. */
enum status batch_create(const struct moe_limits *limits, struct batch *out);
void batch_destroy(struct batch *b);
uint64_t batch_bytes(const struct moe_limits *limits);
/* Spell out a step that moe_submit has checked; valid until the step's owner takes it back. */
void batch_set(struct batch *b, const struct moe_step *step, const struct sampler *sampler);

/* Where position pos of token t's sequence lives: a KV token index, block * B + offset. */
static inline size_t batch_kv_index(const struct batch *b, int32_t t, int32_t pos) {
    return (size_t)b->blocks[t][pos / b->block_tokens] * (size_t)b->block_tokens +
           (size_t)(pos % b->block_tokens);
}

/* A queue of finished steps, oldest first. */
struct batch_results {
    int32_t max_rows;
    int32_t first, n; /* n <= MOE_MAX_IN_FLIGHT */
    struct moe_row *rows[MOE_MAX_IN_FLIGHT];
    int32_t n_rows[MOE_MAX_IN_FLIGHT];
    uint64_t run_ns[MOE_MAX_IN_FLIGHT];
};

enum status batch_results_create(int32_t max_rows, struct batch_results *out);
void batch_results_destroy(struct batch_results *q);
/* The rows of the next step, to be filled; batch_results_push makes them the newest result. */
struct moe_row *batch_results_next(struct batch_results *q);
void batch_results_push(struct batch_results *q, int32_t n_rows, uint64_t run_ns);
/* CHECK: there is one. Copies the rows to out->rows. */
void batch_results_pop(struct batch_results *q, struct moe_result *out);

#endif
