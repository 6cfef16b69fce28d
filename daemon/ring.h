/* ring: a bounded queue of fixed-size items between exactly two threads, with an eventfd that wakes
 * the reader. The only way threads of the daemon talk.
 *
 * One producer thread pushes, one consumer thread peeks and pops. What the producer wrote before
 * ring_push is visible to the consumer after ring_peek; what the consumer did before ring_pop is
 * visible to the producer once it sees the room. No allocation after ring_create. */
#ifndef MOED_DAEMON_RING_H
#define MOED_DAEMON_RING_H

#include <stdatomic.h>

#include "proto/base.h"

struct ring {
    uint8_t *items; /* [n_items][item_bytes] */
    uint32_t n_items, item_bytes;
    int fd; /* eventfd: readable when something was pushed since ring_clear */
    _Alignas(64) _Atomic uint32_t head; /* pushed so far; producer writes */
    _Alignas(64) _Atomic uint32_t tail; /* popped so far; consumer writes */
};

/* n_items: a power of two. ST_NO_MEMORY, ST_IO (no descriptor left). */
enum status ring_create(uint32_t n_items, uint32_t item_bytes, struct ring *out);
void ring_destroy(struct ring *r); /* a zeroed ring is fine */

/* Producer. Copies the item; false when the ring is full. */
bool ring_push(struct ring *r, const void *item);
bool ring_full(const struct ring *r);
/* Index, 0 … n_items-1, that the next pushed item will have: names a side buffer of the producer's
 * that belongs to the item until it is popped. */
uint32_t ring_next_idx(const struct ring *r);
/* Wake the consumer without an item. Any thread. */
void ring_wake(struct ring *r);

/* Consumer. The oldest item, in place until ring_pop; NULL when there is none. */
void *ring_peek(struct ring *r);
uint32_t ring_peek_idx(const struct ring *r);
void ring_pop(struct ring *r);
/* Forget wake-ups so far: call before draining, never after, or one may be lost. */
void ring_clear(struct ring *r);
/* Sleep until woken (at once if woken since ring_clear), and clear. May return without an item. */
void ring_sleep(struct ring *r);

#endif
