/* exchange: where the ranks of a group meet in every layer, so that each computes the experts it holds for
 * all ranks' tokens. Ranks that are threads of one process show where their rows lie, and the others copy what they
 * need; ranks of several processes send their rows (moe/streams.h), and what came is shown in their place.
 *
 * A layer, on every rank at the same time:
 *   exchange_route     show this rank's routing and its experts' inputs; wait for all; deal the rows out
 *   exchange_gather    copy in the inputs of the rows that this rank computes
 *   ... the two expert products, over `work` instead of the rank's own routing ...
 *   exchange_products  show the products; wait for all
 *   exchange_return    copy back the products of this rank's own tokens, in its own routing order
 * and then the rank sums them as it would have its own. So every row is computed by the one kernel that would
 * have computed it alone, and summed in rank order at home: the bits are those of one rank.
 *
 * Two waits a layer are enough: among threads, nobody overwrites inputs before the second, nor products before the
 * first of the next layer. A rank without tokens takes part with none. A wait ends with ST_ENGINE_LOST when a rank does not
 * come in time, or has left or failed; from then on every call of the group says so.
 *
 * Ranks whose rows lie in memory that only devices can read meet there in every layer, and here twice a step: see the end.
 *
 * Between steps, when the load has been uneven, weights move (moe/shares.h has the policy): each rank copies
 * what it gains from a rank that has it, all switch tables, and each gives back the memory of what it lost.
 *
 * A rank's calls come from its own thread. No allocation after exchange_open but the planner's scratch, when it
 * plans. Private to moe/ and its tests. */
#ifndef MOED_MOE_EXCHANGE_H
#define MOED_MOE_EXCHANGE_H

#include "moe/backend.h"
#include "moe/route.h"

/* One rank's side. */
struct exchange {
    struct moe_group *group;
    int rank;
    /* The rows that this rank computes in the layer at hand, grouped by expert: expert_first and pair_of as in
     * route.h, with pair w * K + k for work token w; n_tokens is W. The rest of it is unused. */
    struct route work;
    int32_t *token_rank, *token_of; /* [R * T] whose token w is, and which */
    int32_t *back_rank,
        *back_row; /* [T * K] who computes a pair of this rank, and as which of its rows */
    int32_t *work_of; /* [R * T] token of the group -> w, or -1 */
    int32_t *counts, *seen; /* [E] rows of the group, and how many of them were placed */
    int32_t *rows,
        *first; /* [E][R] how many of them each rank computes, and where they begin there */
    /* By streams: [R * T * K] rows of this rank that belong to others, by owner, in the order of their pairs; rank r's
     * begin at given_first[r]. Else NULL. */
    int32_t *given, given_first[MOE_MAX_RANKS + 1];
    int32_t n_back[MOE_MAX_RANKS]; /* by streams: pairs of this rank that each other computes */
};

/* Join. All ranks of a group have the same shape and max_tokens, and the group's load, if it was given one, is of that
 * shape, else ST_INVALID; ST_NO_MEMORY. */
enum status exchange_open(struct moe_group *g, int rank, const struct model_shape *shape,
                          int32_t max_tokens, struct exchange **out);
/* Leave, between steps: the others' waits end, and this one returns once none of them reads what this rank
 * showed, but waits no longer than for a meeting. NULL is fine. */
void exchange_close(struct exchange *x);
/* Something else failed here: the others' waits end, with ST_ENGINE_LOST. */
void exchange_fail(struct moe_group *g);

int exchange_n_ranks(const struct moe_group *g);
const struct moe_unique_id *exchange_unique_id(const struct moe_group *g); /* zeros: none */

/* x, or NULL if x is NULL or its ranks compute alone. Asked at the beginning of a step, and true for all of it. */
struct exchange *exchange_in_use(struct exchange *x);

uint64_t exchange_timeout_ns(const struct exchange *x); /* of a wait */
/* Tokens and routed rows that may become this rank's work. */
int32_t exchange_max_tokens(const struct exchange *x);
uint64_t exchange_bytes(const struct exchange *x);

/* Whether this rank holds an expert: other experts need not be loaded. And which ranks do, a bit for each. */
bool exchange_holds(const struct exchange *x, int32_t layer, int32_t expert);
uint16_t exchange_holders(const struct exchange *x, int32_t layer, int32_t expert);
/* Tell where an expert stack of a layer lies, [E] experts of expert_bytes each, so that its experts can move.
 * Every rank tells the same stacks in the same order. ST_NO_MEMORY. */
enum status exchange_stack(struct exchange *x, int32_t layer, uint8_t *base, size_t expert_bytes);
/* Bytes of the told stacks' experts that this rank does not hold now. */
uint64_t exchange_away_bytes(const struct exchange *x);

/* Rows of a buffer. */
struct exchange_rows {
    const void *p;
    size_t stride, n_bytes; /* from row to row, and of one */
};

enum status exchange_route(struct exchange *x, int32_t layer, const struct route *own,
                           struct exchange_rows inputs);
void exchange_gather(const struct exchange *x, void *dst, size_t stride); /* row w */
enum status exchange_products(struct exchange *x, int32_t layer, struct exchange_rows products);
/* Row r of dst: the product of own routed row r. */
void exchange_return(struct exchange *x, int32_t layer, const struct route *own, void *dst,
                     size_t stride);

void exchange_counters(const struct exchange *x,
                       struct moe_counters *out); /* its own fields only */

/* ---- ranks that meet on their devices -------------------------------------------------------
 * A step is launched as a whole, and a device waits in it for what the others write into its memory. Here the ranks say
 * how large their steps are, and that all are ready to launch: what may take long, or would wait for a device, is done
 * before that, and so are weights moved: by the ranks, to exchange_moved. */

/* While opening: what this rank wants the others to know of, and read with exchange_peer; NULL before they show it. What
 * it points to is theirs, and stays until they leave. */
void exchange_show(struct exchange *x, void *own);
void *exchange_peer(const struct exchange *x, int rank);
/* While opening: where it is written, as 1, that the group is lost: devices that wait look there. NULL: no longer. */
void exchange_stop_word(struct exchange *x, volatile uint32_t *stop);

/* Ranks of other processes, whose memory this one's device does not see: there is no exchange_peer, exchange_meet does not
 * wait, and weights do not move. */
bool exchange_is_remote(const struct exchange *x);

/* A step begins: wait for all; all[r] is rank r's n_tokens. From here to exchange_step_done, or a failure, this
 * rank counts as reading what the others show; steps may overlap. */
enum status exchange_step_begin(struct exchange *x, int32_t n_tokens, int32_t *all);
/* Wait for all: once before each launch, and once in the first step of all, if a rank has more to show. */
enum status exchange_meet(struct exchange *x);
void exchange_step_done(struct exchange *x);
/* Rank 0 (remote: every rank), between exchange_meet of one step and exchange_step_begin of the next: the group's rows so far as its device
 * counted them, by expert, [L][E], and by who computed them, [L][n_ranks]. May lead to a new plan. */
void exchange_record(struct exchange *x, const uint64_t *load, const uint64_t *rows);

/* After exchange_step_begin: there is a plan; the holders that it gives an expert. Every rank gets what it gains from one
 * that has it, which may be at any time before exchange_moved; what it loses it may drop once all have met. */
bool exchange_moving(const struct exchange *x);
uint16_t exchange_next_holders(const struct exchange *x, int32_t layer, int32_t expert);
/* This rank has moved: wait for all; the plan is in force. */
enum status exchange_moved(struct exchange *x);

#endif
