/* See batch.h. */
#include "moe/batch.h"

#include <stdlib.h>
#include <string.h>

enum status batch_create(const struct moe_limits *limits, struct batch *out) {
    size_t n_tokens = (size_t)limits->max_batch_tokens;
    *out = (struct batch){.block_tokens = limits->block_tokens,
                          .ids = calloc(n_tokens, sizeof *out->ids),
                          .pos = calloc(n_tokens, sizeof *out->pos),
                          .blocks = calloc(n_tokens, sizeof *out->blocks),
                          .rows = calloc((size_t)limits->max_rows, sizeof *out->rows)};
    if (out->ids && out->pos && out->blocks && out->rows) return ST_OK;
    batch_destroy(out);
    return ST_NO_MEMORY;
}

void batch_destroy(struct batch *b) {
    free(b->ids);
    free(b->pos);
    free(b->blocks);
    free(b->rows);
    *b = (struct batch){0};
}

uint64_t batch_bytes(const struct moe_limits *limits) {
    return (uint64_t)limits->max_batch_tokens * (2 * sizeof(int32_t) + sizeof(int32_t *)) +
           (uint64_t)limits->max_rows *
               (sizeof(struct batch_row) + MOE_MAX_IN_FLIGHT * sizeof(struct moe_row));
}

void batch_set(struct batch *b, const struct moe_step *step, const struct sampler *sampler) {
    const int32_t *blocks = step->blocks;
    b->n_tokens = b->n_rows = 0;
    for (int32_t s = 0; s < step->n_seqs; s++) {
        const struct moe_step_seq *seq = &step->seqs[s];
        for (int32_t i = 0; i < seq->n_tokens; i++) {
            int32_t t = b->n_tokens++;
            int32_t id = step->ids[t];
            b->ids[t] = id == MOE_LAST_TOKEN ? sampler_last(sampler, seq->slot) : id;
            b->pos[t] = seq->start_pos + i;
            b->blocks[t] = blocks;
            bool last = i == seq->n_tokens - 1;
            if (seq->rows == MOE_ROWS_ALL || (seq->rows == MOE_ROWS_SAMPLE && last))
                b->rows[b->n_rows++] =
                    (struct batch_row){t, seq->slot, seq->rows == MOE_ROWS_SAMPLE};
        }
        blocks += seq->n_blocks;
    }
}

enum status batch_results_create(int32_t max_rows, struct batch_results *out) {
    *out = (struct batch_results){.max_rows = max_rows};
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        out->rows[i] = calloc((size_t)max_rows, sizeof(struct moe_row));
        if (out->rows[i]) continue;
        batch_results_destroy(out);
        return ST_NO_MEMORY;
    }
    return ST_OK;
}

void batch_results_destroy(struct batch_results *q) {
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) free(q->rows[i]);
    *q = (struct batch_results){0};
}

struct moe_row *batch_results_next(struct batch_results *q) {
    CHECK(q->n < MOE_MAX_IN_FLIGHT);
    return q->rows[(q->first + q->n) % MOE_MAX_IN_FLIGHT];
}

void batch_results_push(struct batch_results *q, int32_t n_rows, uint64_t run_ns) {
    CHECK(q->n < MOE_MAX_IN_FLIGHT && n_rows <= q->max_rows);
    int32_t i = (q->first + q->n++) % MOE_MAX_IN_FLIGHT;
    q->n_rows[i] = n_rows;
    q->run_ns[i] = run_ns;
}

void batch_results_pop(struct batch_results *q, struct moe_result *out) {
    CHECK(q->n > 0);
    int32_t i = q->first;
    out->n_rows = q->n_rows[i];
    out->run_ns = q->run_ns[i];
    memcpy(out->rows, q->rows[i], (size_t)out->n_rows * sizeof *out->rows);
    q->first = (q->first + 1) % MOE_MAX_IN_FLIGHT;
    q->n--;
}
