/* move: experts' weights from GPU to GPU, between two steps, when the group has a new plan (moe/shares.h). All ranks do
 * this at the same time, layer by layer: what a rank gains is copied from a holder into a bounce buffer; when all have
 * met, nobody needs the layer's old weights, and what was gained takes the places of what was lost. A rank gains as many
 * experts in a layer as it loses. Tables change at the end; captured steps read them from memory. See exchange.h. */
#include "cuda/exchange.h"

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

/* Bytes of one expert of a layer. */
static size_t layer_bytes(const struct cuda_exchange *g, int32_t layer) {
    size_t n = 0;
    for (int32_t i = 0; i < g->n_stacks; i++)
        if (g->stacks[i].layer == layer) n += g->stacks[i].expert_bytes;
    return n;
}

enum status move_ready(struct cuda *c, struct error *e) {
    struct cuda_exchange *g = c->exchange;
    int32_t others = c->shape.n_experts - g->n_places, most = others < g->n_places ? others : g->n_places;
    size_t widest = 0;
    for (int32_t l = 0; l < c->shape.n_layers; l++)
        if (layer_bytes(g, l) > widest) widest = layer_bytes(g, l);
    if (most == 0 || widest == 0) return ST_OK;
    void *p;
    TRY(device_alloc(c, MEMORY_STEP, "experts on the move", (size_t)most * widest, e, &p));
    g->bounce = p;
    return ST_OK;
}

static bool gains(const struct cuda_exchange *g, int32_t layer, int32_t x) {
    unsigned was = exchange_holders(g->x, layer, x), next = exchange_next_holders(g->x, layer, x);
    return (next & ~was) >> g->args.rank & 1;
}

static bool loses(const struct cuda_exchange *g, int32_t layer, int32_t x) {
    unsigned was = exchange_holders(g->x, layer, x), next = exchange_next_holders(g->x, layer, x);
    return (was & ~next) >> g->args.rank & 1;
}

static enum status copy(struct cuda *c, void *dst, const void *src, size_t n) {
    return device_check(c, cudaMemcpyAsync(dst, src, n, cudaMemcpyDefault, c->queue.stream));
}

/* What this rank gains in a layer, into the bounce buffer: stack after stack, experts by number. */
static enum status bring(struct cuda *c, int32_t layer) {
    struct cuda_exchange *g = c->exchange;
    uint8_t *to = g->bounce;
    for (int32_t i = 0; i < g->n_stacks; i++) {
        size_t n = g->stacks[i].expert_bytes;
        if (g->stacks[i].layer != layer) continue;
        for (int32_t x = 0; x < c->shape.n_experts; x++) {
            if (!gains(g, layer, x)) continue;
            const struct cuda_exchange *from =
                exchange_peer(g->x, __builtin_ctz(exchange_holders(g->x, layer, x)));
            int32_t place = from->place_of[layer * c->shape.n_experts + x];
            CHECK(place >= 0 && from->stacks[i].expert_bytes == n);
            TRY(copy(c, to, from->stacks[i].panels + (size_t)place * n, n));
            to += n;
            g->moved_bytes += n;
        }
    }
    return device_check(c, cudaStreamSynchronize(c->queue.stream));
}

/* From there to the places of what it loses. */
static enum status settle(struct cuda *c, int32_t layer) {
    struct cuda_exchange *g = c->exchange;
    int32_t *place_of = g->place_of + layer * c->shape.n_experts, lost = 0;
    for (int32_t x = 0; x < c->shape.n_experts; x++) {
        if (!gains(g, layer, x)) continue;
        while (!loses(g, layer, lost)) lost++;
        place_of[x] = place_of[lost];
        place_of[lost++] = -1;
        g->counters.n_moved++;
    }
    const uint8_t *from = g->bounce;
    for (int32_t i = 0; i < g->n_stacks; i++) {
        size_t n = g->stacks[i].expert_bytes;
        if (g->stacks[i].layer != layer) continue;
        for (int32_t x = 0; x < c->shape.n_experts; x++) {
            if (!gains(g, layer, x)) continue;
            TRY(copy(c, g->stacks[i].panels + (size_t)place_of[x] * n, from, n));
            from += n;
        }
    }
    return ST_OK;
}

enum status move_experts(struct cuda *c) {
    struct cuda_exchange *g = c->exchange;
    uint64_t begun = clock_now_ns(), n_moved = g->counters.n_moved;
    TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
    for (int32_t l = 0; l < c->shape.n_layers; l++) {
        TRY(bring(c, l));
        TRY(exchange_meet(g->x));
        TRY(settle(c, l));
    }
    TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
    TRY(exchange_moved(g->x));
    g->counters.n_replans++;
    log_event(LOG_INFO, "cuda", "experts_moved", "rank=%d gained=%llu us=%llu", g->args.rank,
              (unsigned long long)(g->counters.n_moved - n_moved),
              (unsigned long long)((clock_now_ns() - begun) / 1000));
    return exchange_upload_homes(c);
}
