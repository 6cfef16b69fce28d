/* shares: which ranks hold each expert's weights, and which of them computes each row of a step. Pure
 * arithmetic on tables: no thread, no clock, no device; what moves weights is moe/exchange.h.
 *
 * Loads are routed tokens. Each step and layer, shares_assign deals every expert's rows out to ranks that
 * hold it, by the step's own counts: an expert with one holder goes there, the others follow by falling
 * count, each to its least loaded holder; one that is more than half of a rank's fair share is cut into
 * pieces of that size first, because a cut reads the weights twice. Same counts, same deal, on every rank.
 *
 * Over many steps the tables remember how the load fell. Once a window of tokens has passed, shares_replan
 * says whether it was uneven, and if so plans anew from it (moe/placement.h) and names the devices of the
 * plan so that as few weights move as can be had greedily.
 *
 * Private to moe/ and its tests. One thread at a time. */
#ifndef MOED_MOE_SHARES_H
#define MOED_MOE_SHARES_H

#include "moe/moe.h"

struct shares {
    int32_t n_layers, n_experts, n_ranks;
    int32_t slots; /* experts that a rank holds, per layer */
    uint16_t *held; /* [L][E] a bit for each rank that holds it */
    uint16_t *next; /* [L][E] the plan that shares_replan made */
    double *load; /* [L][E] tokens in this window */
    uint64_t *rows; /* [L][n_ranks] rows computed in this window */
    uint64_t window_rows; /* of all layers */
    /* room for planning */
    int32_t *expert_of, *n_replicas;
};

/* slots 0: as few as hold every expert once; more than E means E. The first plan is made for load, [L][E]
 * tokens, or takes all experts for equally loaded (NULL). ST_NO_MEMORY leaves *out zeroed; so does destroy. */
enum status shares_create(const struct model_shape *shape, int n_ranks, int32_t slots,
                          const uint64_t *load, struct shares *out);
void shares_destroy(struct shares *s);

static inline bool shares_holds(const struct shares *s, int32_t layer, int32_t expert, int rank) {
    return s->held[(size_t)layer * (size_t)s->n_experts + (size_t)expert] >> rank & 1;
}

/* Room for one deal: order[E], load[n_ranks]. */
struct shares_scratch {
    int32_t order[512];
    int64_t load[MOE_MAX_RANKS];
};

/* rows[e * n_ranks + r] = how many of expert e's counts[e] rows rank r computes; the first of them go to rank
 * 0 and so on. */
void shares_assign(const struct shares *s, int32_t layer, const int32_t *counts,
                   struct shares_scratch *scratch, int32_t *rows);

/* Remember a layer of a step. */
void shares_record(struct shares *s, int32_t layer, const int32_t *counts, const int32_t *rows);
/* Or of several: counts[E], and rows[n_ranks] that each rank computed of them. */
void shares_record_sums(struct shares *s, int32_t layer, const uint64_t *counts, const uint64_t *rows);

/* Most loaded rank over the mean in this window, over all layers' sums of their most loaded ranks, since
 * layers run one after the other; 1: even, or no load. */
double shares_imbalance(const struct shares *s);

/* Between steps: true if the window is full, was less even than `bound`, and a new plan in `next` promises
 * better. The window starts anew when it was full. */
bool shares_replan(struct shares *s, uint64_t window_tokens, double bound);

#endif
