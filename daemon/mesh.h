/* mesh: a stream between every two ranks of a group, over which they exchange rows (moe_group_options.streams).
 * The higher rank connects to where the lower one listens and shows the token that all got from the process
 * that serves; nobody listens any longer than that takes.
 *
 * Blocks for up to MESH_NS; one thread. */
#ifndef MOED_DAEMON_MESH_H
#define MOED_DAEMON_MESH_H

#include "daemon/rank_frames.h"

#define MESH_NS UINT64_C(5000000000) /* shorter than RANK_LINK_SILENCE_NS: no beats are sent meanwhile */

struct mesh {
    int first, n; /* the ranks of this side: first … first + n - 1 */
    int n_ranks;
    int listener; /* where higher ranks reach them; borrowed */
    const char *server; /* "tcp://HOST:PORT": where a peer without a host is */
    const struct rank_peers *peers;
    const uint8_t *token; /* [RANK_TOKEN_BYTES] */
    int fds[MOE_MAX_RANKS][MOE_MAX_RANKS]; /* [n][n_ranks] set by mesh_join, the caller's then; -1: itself */
};

/* ST_IO, ST_TIMEOUT: some peer cannot be reached, or did not come; all streams are closed. */
enum status mesh_join(struct mesh *m, struct error *e);

#endif
