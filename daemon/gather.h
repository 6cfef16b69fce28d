/* gather: how ranks of other processes come together with the process that serves. Each connects, says who it is
 * (Hello), and waits until all are there; then each hears what it is to be (Welcome), and, in a group, where the
 * others are (Port, Peers). A rank of another version, device or model is refused, and the start with it: both
 * sides say why. Whoever does not speak the language of ranks is shown out.
 *
 * Main's thread, before any model is loaded. */
#ifndef MOED_DAEMON_GATHER_H
#define MOED_DAEMON_GATHER_H

#include "daemon/rank_link.h"
#include "daemon/rank_frames.h"

struct gather_options {
    const char *address; /* "tcp://ADDRESS:PORT" to listen at */
    int n; /* ranks to wait for */
    int n_here; /* ranks of this process: the first ones */
    int per_process; /* 0: in order of coming; else each process brings so many, in the launcher's order */
    struct rank_hello self; /* what they must match: version, kind and model */
    struct rank_welcome welcome; /* what all hear; their ranks and the token are filled in */
};

struct gathered {
    struct rank_link links[MOE_MAX_RANKS]; /* [n] of ranks n_here, n_here + 1 … */
    int streams[MOE_MAX_RANKS][MOE_MAX_RANKS]; /* in a group: [n_here][n_here + n] */
};

/* Waits for as long as ranks are missing. ST_INVALID, ST_IO: the address; ST_CONFLICT, ST_UNSUPPORTED: a rank was
 * refused; ST_ENGINE_LOST: one went away. */
enum status gather(const struct gather_options *o, struct error *e, struct gathered *out);

/* Version, kind and model of a process with these devices. */
enum status gather_identify(const char *model_path, const char *device, struct error *e,
                            struct rank_hello *out);

#endif
