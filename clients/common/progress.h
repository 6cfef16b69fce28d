/* progress: how far a run is, on stderr. On a terminal one line that is redrawn, else a plain
 * line now and then. Single thread. */
#ifndef MOED_CLIENTS_COMMON_PROGRESS_H
#define MOED_CLIENTS_COMMON_PROGRESS_H

#include "proto/base.h"

struct progress {
    bool tty, drawn;
    uint64_t start_ns, last_ns;
    uint64_t total; /* 0 = not known in advance */
};

struct progress_now {
    uint64_t done, failed, running;
    uint64_t tokens; /* made since the start */
};

void progress_start(struct progress *p, uint64_t total);
/* May be called at any rate. Returns seconds since the start. */
double progress_update(struct progress *p, const struct progress_now *now);
/* Remove the redrawn line, so that other output may be printed; the next update draws it again. */
void progress_clear(struct progress *p);

/* "0:42", "3:05:07". Returns dst. */
const char *format_seconds(double s, char *dst, size_t cap);

#endif
