/* model_rig: an open model in a test and the few things tests do with it: score ids, sample, decode. Sequences
 * own fixed ranges of KV blocks by slot unless a test gives tables of its own. Header-only: each test program
 * that includes it gets its own copy. */
#ifndef MOED_TESTS_MODEL_RIG_H
#define MOED_TESTS_MODEL_RIG_H

#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

#include "moe/moe.h"

struct model_rig {
    struct moe *m;
    const struct moe_info *info;
    int32_t blocks_per_seq;
    struct moe_row *rows; /* [max_rows] of the last collect */
    int32_t n_rows;
};

static const char *rig_isa; /* of device cpu; NULL: the best there is */

static inline struct model_rig rig_open(const char *device, int n_threads,
                                        const struct moe_limits *limits) {
    struct model_rig r = {0};
    struct error e = {0};
    struct moe_options o = {.model_path = TINY_MODEL,
                            .device = device,
                            .limits = *limits,
                            .n_threads = n_threads,
                            .cpu_isa = rig_isa,
                            .gpu_memory_utilization = 0.5};
    assert_ok(moe_open(&o, NULL, NULL, &e, &r.m), &e);
    r.info = moe_info(r.m);
    const struct moe_limits *l = &r.info->limits;
    r.blocks_per_seq = (l->max_seq_tokens + l->block_tokens - 1) / l->block_tokens;
    r.rows = calloc((size_t)l->max_rows, sizeof *r.rows);
    return r;
}

static inline void rig_close(struct model_rig *r) {
    moe_close(r->m);
    free(r->rows);
}

static inline struct moe_sampling rig_greedy(void) {
    return (struct moe_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
}

static inline void rig_start(struct model_rig *r, int32_t slot, const struct moe_sampling *p,
                             const int32_t *ids, int32_t n_ids, int32_t n_prompt) {
    struct moe_slot_start s = {
        .slot = slot, .sampling = *p, .ids = ids, .n_ids = n_ids, .n_prompt = n_prompt};
    assert_int_equal(moe_slot_start(r->m, &s), ST_OK);
}

/* Submit and collect one step. */
static inline void rig_run(struct model_rig *r, const struct moe_step *step) {
    struct moe_result result = {.rows = r->rows};
    assert_int_equal(moe_submit(r->m, step), ST_OK);
    assert_int_equal(moe_collect(r->m, &result), ST_OK);
    r->n_rows = result.n_rows;
}

/* Block i of a slot's own table: slot s has the pool's blocks from s * blocks_per_seq on, in falling order, so that a
 * table is never the identity. */
static inline int32_t rig_block(const struct model_rig *r, int32_t slot, int32_t i) {
    int32_t block = (slot + 1) * r->blocks_per_seq - 1 - i;
    assert_in_range(block, 0, r->info->limits.n_blocks - 1);
    return block;
}

/* Run positions [start, start + n) of one sequence in its slot's own blocks. */
static inline void rig_run_one(struct model_rig *r, int32_t slot, const int32_t *ids, int32_t start,
                               int32_t n, enum moe_rows rows) {
    int32_t b = r->info->limits.block_tokens, n_blocks = (start + n + b - 1) / b;
    int32_t *blocks = calloc((size_t)n_blocks, sizeof *blocks);
    for (int32_t i = 0; i < n_blocks; i++) blocks[i] = rig_block(r, slot, i);
    struct moe_step_seq seq = {
        .slot = slot, .start_pos = start, .n_tokens = n, .n_blocks = n_blocks, .rows = rows};
    rig_run(r, &(struct moe_step){
                   .n_seqs = 1, .n_tokens = n, .seqs = &seq, .ids = ids, .blocks = blocks});
    free(blocks);
}

/* Logits of all n positions of ids, [n][V], in steps of at most max_batch_tokens. */
static inline void rig_score(struct model_rig *r, int32_t slot, const int32_t *ids, int32_t n,
                             float *logits) {
    int32_t chunk = r->info->limits.max_batch_tokens, n_vocab = r->info->shape.n_vocab;
    for (int32_t at = 0; at < n; at += chunk) {
        int32_t c = n - at < chunk ? n - at : chunk;
        rig_run_one(r, slot, ids + at, at, c, MOE_ROWS_ALL);
        assert_int_equal(r->n_rows, c);
        for (int32_t i = 0; i < c; i++)
            assert_int_equal(moe_logits(r->m, i, logits + (size_t)(at + i) * (size_t)n_vocab),
                             ST_OK);
    }
}

#endif
