/* choose: whether several devices serve faster as replicas or with their experts together, measured before
 * serving by decode steps on all of them. Main's thread, while the engines have nothing else to do. */
#ifndef MOED_DAEMON_CHOOSE_H
#define MOED_DAEMON_CHOOSE_H

#include "daemon/engine.h"

struct choose_args {
    struct engine *const *engines; /* [n] */
    int n;
    struct moe_group *const *groups; /* [n_groups] of the models of this process; each holds all experts */
    int n_groups;
    const struct moe_info *info; /* limits that hold for each */
};

/* Leaves the group as it chose. ST_ENGINE_LOST; ST_NO_MEMORY. */
enum status choose_parallel(const struct choose_args *a, bool *together);

#endif
