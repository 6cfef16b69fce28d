/* See ring.h. */
#include "daemon/ring.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum status ring_create(uint32_t n_items, uint32_t item_bytes, struct ring *out) {
    CHECK(n_items > 0 && (n_items & (n_items - 1)) == 0 && item_bytes > 0);
    memset(out, 0, sizeof *out);
    out->fd = -1;
    out->items = calloc(n_items, item_bytes);
    if (!out->items) return ST_NO_MEMORY;
    out->n_items = n_items;
    out->item_bytes = item_bytes;
    out->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (out->fd < 0) {
        ring_destroy(out);
        return ST_IO;
    }
    return ST_OK;
}

void ring_destroy(struct ring *r) {
    if (r->items && r->fd >= 0) close(r->fd);
    free(r->items);
    memset(r, 0, sizeof *r);
    r->fd = -1;
}

static uint8_t *item_at(const struct ring *r, uint32_t count) {
    return r->items + (size_t)(count & (r->n_items - 1)) * r->item_bytes;
}

bool ring_full(const struct ring *r) {
    uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    uint32_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
    return head - tail == r->n_items;
}

uint32_t ring_next_idx(const struct ring *r) {
    return atomic_load_explicit(&r->head, memory_order_relaxed) & (r->n_items - 1);
}

bool ring_push(struct ring *r, const void *item) {
    if (ring_full(r)) return false;
    uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    memcpy(item_at(r, head), item, r->item_bytes);
    atomic_store_explicit(&r->head, head + 1, memory_order_release);
    ring_wake(r);
    return true;
}

void ring_wake(struct ring *r) {
    uint64_t one = 1;
    ssize_t w;
    do {
        w = write(r->fd, &one, sizeof one);
    } while (w < 0 && errno == EINTR);
    /* EAGAIN would need 2^64-2 pending wake-ups, and would still leave the descriptor readable. */
}

void *ring_peek(struct ring *r) {
    uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    uint32_t head = atomic_load_explicit(&r->head, memory_order_acquire);
    return head == tail ? NULL : item_at(r, tail);
}

uint32_t ring_peek_idx(const struct ring *r) {
    return atomic_load_explicit(&r->tail, memory_order_relaxed) & (r->n_items - 1);
}

void ring_pop(struct ring *r) {
    uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    CHECK(atomic_load_explicit(&r->head, memory_order_acquire) != tail);
    atomic_store_explicit(&r->tail, tail + 1, memory_order_release);
}

void ring_clear(struct ring *r) {
    uint64_t n;
    ssize_t got;
    do {
        got = read(r->fd, &n, sizeof n);
    } while (got < 0 && errno == EINTR);
}

void ring_sleep(struct ring *r) {
    struct pollfd p = {.fd = r->fd, .events = POLLIN};
    while (poll(&p, 1, -1) < 0 && errno == EINTR) {
    }
    ring_clear(r);
}
