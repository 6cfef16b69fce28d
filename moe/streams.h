/* streams: the exchange between ranks of different processes, one connected stream socket to each. A meeting is
 * all-to-all: every rank sends one message to every other and takes one from each. Its messages' sizes follow from
 * what all know already, but for the number of tokens, and are checked on arrival; a message that is not the one
 * due, like a peer that neither sends nor takes a byte for the group's timeout, ends the group.
 *
 *   routes     token counts, experts' ids and inputs of all tokens, to everybody: with more than a few experts to
 *              a token nearly every rank needs nearly every token, and one meeting is saved
 *   products   to each rank, the products of its pairs, in its pair order
 *   counts     tokens of the step that begins, to everybody: where the rows themselves go from device to device
 *   weights    of one expert stack: to each rank, the experts that it gains from this one
 *
 * Message, little-endian: 0 kind u32  4 number u32 (of the meeting)  8 n u32 (rows)  12 row_bytes u32, then for
 * routes [n][K] i32 ids, then [n] rows.
 *
 * One rank's side and one thread, but for streams_shut. No allocation after streams_create. Private to moe/. */
#ifndef MOED_MOE_STREAMS_H
#define MOED_MOE_STREAMS_H

#include "moe/backend.h"

struct streams;

/* Takes the n_ranks sockets (moe_group_options) in any case. ST_NO_MEMORY. */
enum status streams_create(const int *fds, int n_ranks, int rank, uint64_t timeout_ns,
                           struct streams **out);
void streams_destroy(struct streams *s); /* NULL is fine */
/* Room for meetings of ranks with such models and up to max_tokens each. ST_NO_MEMORY. */
enum status streams_room(struct streams *s, const struct model_shape *shape, int32_t max_tokens);
uint64_t streams_bytes(const struct streams *s);
/* The others' waits end. Any thread. */
void streams_shut(struct streams *s);

/* Rows somewhere in memory: those numbered in `of`, or 0 … n - 1 if that is NULL. */
struct streams_rows {
    const uint8_t *p;
    size_t stride, n_bytes;
    const int32_t *of;
    int32_t n;
};

/* What another rank showed; borrowed until the next streams_routes. */
struct streams_route {
    int32_t n_tokens;
    const int32_t *ids; /* [n_tokens][K], each in 0 … E - 1 */
    struct streams_rows inputs;
};

/* All of these: ST_ENGINE_LOST when a peer is. Arrays are by rank; this rank's own entries are not used. */
enum status streams_routes(struct streams *s, const int32_t *ids, const struct streams_rows *inputs,
                           struct streams_route *out);
/* all[r]: what rank r says, 0 … max_tokens; all[rank] is what this one says. */
enum status streams_counts(struct streams *s, int32_t *all);
/* n_from[r] rows come from rank r, and lie in out[r] until the next meeting. All together T * K at most. */
enum status streams_products(struct streams *s, const struct streams_rows *to,
                             const int32_t *n_from, struct streams_rows *out);
/* What comes goes to the rows of `from`, which is written through. */
enum status streams_weights(struct streams *s, const struct streams_rows *to,
                            const struct streams_rows *from);

#endif
