/* route: which experts each token goes to, and the tokens of each expert. The arithmetic every CPU
 * backend shares, so that two of them can differ in router logits only.
 *
 * A pair is (token t, rank k), numbered t * K + k. Routing order sorts pairs by expert, and within an
 * expert by pair number (a stable counting sort), so that expert e's group is the routed rows
 * expert_first[e] … expert_first[e + 1] - 1.
 *
 * Invariants after route_sort: expert_first[0] == 0, expert_first[E] == T * K, a token's experts are
 * distinct, pair_of and row_of are inverse permutations. Private to moe/ and its tests. One thread. */
#ifndef MOED_MOE_ROUTE_H
#define MOED_MOE_ROUTE_H

#include "moe/backend.h"

struct route {
    int32_t n_experts, n_used; /* E, K */
    int32_t max_tokens;
    int32_t n_tokens; /* T, set by route_sort */
    int32_t *ids; /* [T][K], rank order; the caller writes, by route_top_k */
    float *weights; /* [T][K] */
    int32_t *expert_first; /* [E + 1] */
    int32_t *pair_of; /* [T * K]: routed row -> pair */
    int32_t *row_of; /* [T * K]: pair -> routed row */
};

/* ST_NO_MEMORY leaves *out zeroed; so does destroy. */
enum status route_create(const struct model_shape *shape, int32_t max_tokens, struct route *out);
void route_destroy(struct route *r);
uint64_t route_bytes(const struct route *r);

/* Softmax over n logits, the k largest by falling value (ties to the lower id), renormalised to sum 1 if
 * asked. The k ids are distinct whatever the logits are, NaN included: NaN only poisons the weights. */
void route_top_k(const float *logits, int32_t n, int32_t k, bool renormalize, int32_t *ids,
                 float *weights);

/* Group the first n_tokens tokens' pairs by expert. */
void route_sort(struct route *r, int32_t n_tokens);

/* Experts with at least one token. */
int32_t route_n_groups(const struct route *r);

#endif
