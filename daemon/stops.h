/* stops: stop strings over a stream of text. Text that could be the beginning of a stop string is
 * held back until it is known; text from a stop string on is never released.
 *
 * Of several matches the one that ends first counts, and of those that end together the longest:
 * what is released does not depend on how the text was cut into pieces. Pieces are whole UTF-8
 * characters, and so is what is released.
 *
 * Pure functions of their arguments. */
#ifndef MOED_DAEMON_STOPS_H
#define MOED_DAEMON_STOPS_H

#include "proto/base.h"
#include "proto/wire.h"

enum {
    STOPS_MAX_HELD_BYTES = WIRE_MAX_STOP_BYTES - 1,
    STOPS_MAX_PIECE_BYTES = 4096 /* in one push */
};

struct stop_set {
    int32_t n;
    struct {
        uint16_t n_bytes; /* 1 … WIRE_MAX_STOP_BYTES */
        uint8_t bytes[WIRE_MAX_STOP_BYTES];
    } strings[WIRE_MAX_STOPS];
};

struct stop_state { /* zero to start */
    uint16_t n_held;
    uint8_t held[STOPS_MAX_HELD_BYTES];
};

/* Append n bytes; write what may be released to dst (room for n + STOPS_MAX_HELD_BYTES) and its
 * length to *n_out. Returns the index of the string that matched, or -1; after a match the stream
 * is over. */
int stops_push(const struct stop_set *set, struct stop_state *s, const void *text, size_t n,
               uint8_t *dst, size_t *n_out);
/* The text is over without a match: release what is held. Returns its length. */
size_t stops_finish(struct stop_state *s, uint8_t *dst);

#endif
