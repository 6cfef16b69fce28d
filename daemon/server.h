/* server: the daemon's event loop, for main and for tests. One `struct server` serves one model on
 * one endpoint; server_run is the loop and is what "the loop's thread" means everywhere in this
 * room. */
#ifndef MOED_DAEMON_SERVER_H
#define MOED_DAEMON_SERVER_H

#include "daemon/engine.h"
#include "daemon/net.h"
#include "moe/moe.h"
#include "moe/text.h"
#include "proto/base.h"

#define MOED_SERVER_NAME "moed " MOED_VERSION /* MOED_VERSION: from the build */

struct server;

struct server_options {
    const struct text *text; /* borrowed */
    const struct moe_info *info; /* borrowed; limits as in force, of each rank */
    int n_ranks; /* engines; 0: 1 */
    bool lockstep; /* they form a group: all run the same steps, some with nothing in them */
    const int32_t
        *rank_blocks; /* [n_ranks] where KV pools differ; NULL: as in info; borrowed by create */
    int32_t prefill_chunk; /* 0: the whole batch */
    uint64_t max_itl_ns; /* time between a running stream's tokens that prompts may not exceed; 0: any */
    int32_t max_queue; /* requests, and sequences, that may wait beside max_seqs running ones */
    int32_t max_queued_tokens;
    int32_t max_sessions; /* 0: 1024 */
    uint64_t drain_ns; /* what running requests get after server_stop */
    uint64_t stall_ns; /* how long a client may not read; 0: 30 s */
    uint64_t
        step_ns; /* how long an engine may take for a step before it counts as lost; 0: any time */
};

/* Allocate everything and bind. Takes net and the n_ranks engines (opened, started) in any case:
 * server_destroy, or a failure here, closes them. */
enum status server_create(const struct server_options *o, struct net *net,
                          struct engine *const *engines, struct error *e, struct server **out);
void server_destroy(struct server *s); /* NULL is fine */
/* Bytes that server_create allocated, for the memory table. */
uint64_t server_bytes(const struct server *s);

/* After ST_ENGINE_LOST, instead of server_destroy: an engine may hang, and waiting for it would take for
 * ever. Sends what waits and gives the socket back; the process is to end. */
void server_abandon(struct server *s);

/* Serve until stopped and drained, or until the engine is lost. ST_OK or ST_ENGINE_LOST. */
enum status server_run(struct server *s);

/* Begin to drain; called again, stop at once. Any thread, and signal handlers. */
void server_stop(struct server *s);

#endif
