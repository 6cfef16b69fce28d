/* pace: how many tokens a step may hold so that it ends in time. Learns what steps cost from those that were run: a line
 * over their number of tokens, ns = base + per_token * tokens, fitted by least squares to the recent ones. A token of a
 * prompt and one of a running stream count alike, and longer contexts or more experts shift the line as the steps come in.
 *
 * Pure: time comes from the caller. It only ever chooses sizes; what is computed does not depend on them. */
#ifndef MOED_DAEMON_PACE_H
#define MOED_DAEMON_PACE_H

#include "proto/base.h"

struct pace { /* zeroed: nothing known */
    double n, x, y, xx, xy; /* decayed sums over steps: weight, tokens, ns, tokens^2, tokens * ns */
    double per_token; /* ns, kept while all steps are of one size; 0: no two sizes were seen yet */
};

/* A step of n_tokens >= 1 took that long. */
void pace_learn(struct pace *p, int32_t n_tokens, uint64_t ns);
/* The most tokens whose step is expected to take at most bound_ns; 0 if none. INT32_MAX: nothing known. */
int32_t pace_tokens(const struct pace *p, uint64_t bound_ns);

#endif
