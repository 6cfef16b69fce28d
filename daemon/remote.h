/* remote: a rank in another process, as an engine: starts and steps go out as frames, results come back. The
 * scheduler and the loop know nothing of it. Everything that comes is held against what was asked for, because
 * the scheduler trusts results.
 *
 * The engine's thread, once it is started; nothing is allocated after open. */
#ifndef MOED_DAEMON_REMOTE_H
#define MOED_DAEMON_REMOTE_H

#include "daemon/engine.h"
#include "daemon/rank_link.h"
#include "daemon/rank_frames.h"

/* The ctx. The caller fills the first part; the link said Welcome, and is closed by engine_stop. */
struct engine_remote {
    struct rank_link link;
    int rank;
    struct moe_limits limits; /* as asked for */
    struct model_shape shape;
    const struct moe_group *group; /* one of this process with the same ranks, or NULL */

    struct moe_info info; /* set by open */
    int depth;
    uint8_t *frame; /* [n_frame] the next step's */
    size_t n_frame;
    struct pass starts; /* into it */
    uint32_t n_starts;
    struct remote_step {
        int32_t n_rows;
        int32_t *slots; /* [max_rows] */
    } steps[MOE_MAX_IN_FLIGHT]; /* out, by number */
    uint64_t n_sent, n_got;
    struct moe_counters counters; /* as of the last result */
};
extern const struct engine_ops engine_remote_ops;

#endif
