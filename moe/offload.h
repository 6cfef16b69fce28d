/* offload: which experts stay in host memory when a device has no room for all of them, and what reading them there
 * costs. Pure arithmetic: no device, no clock, no state.
 *
 * The coldest go first: by measured load over all layers, or, where that is equal or not known, in turn from every
 * layer, from the last expert on. A step reads an expert once if any of its tokens is routed to it, so the colder
 * expert is never the dearer one to have far away.
 *
 * Any thread. */
#ifndef MOED_MOE_OFFLOAD_H
#define MOED_MOE_OFFLOAD_H

#include "moe/moe.h"

struct offload_problem {
    int32_t n_layers, n_experts;
    int32_t n_used;        /* experts per token */
    const uint64_t *bytes; /* [L] of one expert */
    const uint64_t *load;  /* [L][E] tokens; NULL: not known */
};

/* far[L][E] = stays in host memory: n of them, n <= L * E; or, with MOE_OFFLOAD_AUTO, as few as leave no more than
 * `room` bytes of the others. Returns how many; -1: no memory. */
int32_t offload_choose(const struct offload_problem *p, int32_t n, uint64_t room, bool *far);

uint64_t offload_host_bytes(const struct offload_problem *p, const bool *far);

/* Expected bytes of far experts that one step of n_tokens reads, if each token's experts are independent draws by
 * load. */
double offload_step_bytes(const struct offload_problem *p, const bool *far, int32_t n_tokens);

#endif
