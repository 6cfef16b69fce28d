/* sampler: one row of logits to one token; the definition that every backend follows.
 *
 * Order: (1) logprobs, if asked for, are log_softmax of the raw logits; (2) logit bias is added; (3) stop
 * ids are set to -inf while fewer than min_tokens were sampled; (4) repetition penalty for every distinct id of
 * prompt and output: logit > 0 ? logit / p : logit * p; (5) presence and frequency penalties over the
 * output: logit -= presence * (count > 0) + frequency * count; (6) temperature 0: the largest logit, ties
 * to the lower id. Otherwise: divide by temperature; top_k largest (ties to the lower id); softmax; min_p:
 * drop p < min_p * max; top_p: the shortest prefix by falling p (ties to the lower id) whose sum reaches
 * top_p; renormalise; draw u = sampler_uniform(seed, position) and take the first token whose running sum, in
 * that order, exceeds u. `position` is the position the sampled token will have in its sequence, so that a
 * draw does not depend on batching, chunks or preemption. That position is the length of the slot's history.
 *
 * The falling order is that of the logits after (5). The softmax may be taken as exp((logit - max) / temperature).
 * min_p's and top_p's shares are of the softmax over the top_k, before anything was dropped. Logits that are not finite
 * on entry, or whose largest is not finite after (5), give ST_NUMERIC and no token. n_top counts only with logprobs.
 *
 * Private to moe/ and cuda/ (which must produce the same tokens given the same logits). */
#ifndef MOED_MOE_SAMPLER_H
#define MOED_MOE_SAMPLER_H

#include "moe/moe.h"

/* Uniform in [0, 1), 24 bits: splitmix64 finaliser over (seed, position). */
static inline float sampler_uniform(uint64_t seed, uint32_t position) {
    uint64_t z = seed + UINT64_C(0x9e3779b97f4a7c15) * ((uint64_t)position + 1);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    z ^= z >> 31;
    return (float)(z >> 40) * 0x1p-24f;
}

struct sampler; /* all slots' parameters and histories */

enum status sampler_create(int32_t n_slots, int32_t max_seq_tokens, int32_t n_vocab,
                           struct sampler **out);
void sampler_destroy(struct sampler *s);
uint64_t sampler_bytes(const struct sampler *s);

/* Within limits; ids in the vocabulary. */
bool sampler_start_fits(const struct moe_slot_start *start, int32_t n_slots, int32_t max_seq_tokens,
                        int32_t n_vocab);
/* Copies start's parameters and ids. CHECK: sampler_start_fits. */
void sampler_start(struct sampler *s, const struct moe_slot_start *start);
/* Sample slot's next token from logits[V] (overwritten), append it to the history, fill *row. scratch is the
 * calling thread's (sampler_scratch_create), so that rows of one step can be sampled in parallel. */
struct sampler_scratch;
enum status sampler_scratch_create(int32_t n_vocab, struct sampler_scratch **out);
void sampler_scratch_destroy(struct sampler_scratch *scratch);
void sampler_row(struct sampler *s, struct sampler_scratch *scratch, int32_t slot, float *logits,
                 struct moe_row *row);
/* Whether sampler_row would do nothing but take the largest logit, ties to the lower id: then a backend may
 * find it by its own means and say so with sampler_take. token -1: a logit is not finite. */
bool sampler_takes_largest(const struct sampler *s, int32_t slot);
void sampler_take(struct sampler *s, int32_t slot, int32_t token, struct moe_row *row);
/* The token the slot sampled last: what MOE_LAST_TOKEN stands for. CHECK: sampler_row was called since the start.
 * After a row that failed it is the token before, or 0 if there was none: a step submitted ahead still runs. */
int32_t sampler_last(const struct sampler *s, int32_t slot);

#endif
