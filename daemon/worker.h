/* worker: a process whose devices compute for a moed elsewhere: each device is a rank with a link of its own
 * (rank_link.h), a thread that keeps it, and an engine. The model is this process's own file; limits, slots, blocks and
 * steps are the other's. */
#ifndef MOED_DAEMON_WORKER_H
#define MOED_DAEMON_WORKER_H

#include "daemon/config.h"

/* Join c->server and compute until it says that all is done. Ends the process: status 0 then, 1 when
 * the server or a device was lost, 2 when they cannot work together. */
_Noreturn void worker_run(const struct config *c);

#endif
