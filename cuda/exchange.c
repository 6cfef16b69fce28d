/* See exchange.h. */
#include "cuda/exchange.h"

#include "cuda/nccl.h"

#include <stdlib.h>
#include <string.h>

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

/* ---- life ----------------------------------------------------------------------------------- */

/* Let this GPU read and write the memory of all others here. */
static enum status enable_peers(struct cuda *c, struct error *e) {
    int n = 0;
    cudaError_t err = cudaGetDeviceCount(&n);
    for (int d = 0; d < n && err == cudaSuccess; d++) {
        int can = 0;
        if (d == c->device) continue;
        err = cudaDeviceCanAccessPeer(&can, c->device, d);
        if (err == cudaSuccess && !can)
            return error_set(e, ST_UNSUPPORTED,
                             "GPU %d cannot read the memory of GPU %d: use --parallel replica",
                             c->device, d);
        if (err == cudaSuccess) err = cudaDeviceEnablePeerAccess(d, 0);
        if (err == cudaErrorPeerAccessAlreadyEnabled) {
            (void)cudaGetLastError();
            err = cudaSuccess;
        }
    }
    return err == cudaSuccess ? ST_OK : error_set(e, ST_ENGINE_LOST, "%s", cudaGetErrorString(err));
}

/* A GPU whose every processor has a waiting block of some rank may have no room for the rank that they wait for. The last
 * rank to join sees all others. */
static enum status check_sharing(struct cuda *c, struct error *e) {
    const struct cuda_exchange *g = c->exchange;
    int n = 0, most = (c->queue.n_sm - 1) / EXCHANGE_FEW + 1;
    for (int r = 0; r < exchange_n_ranks(g->x->group); r++) {
        const struct cuda_exchange *peer = exchange_peer(g->x, r);
        n += peer && peer->device == c->device;
    }
    if (n <= most) return ST_OK;
    return error_set(e, ST_UNSUPPORTED, "GPU %d can be %d ranks of a group, not more", c->device, most);
}

/* Number the experts that this rank holds, layer by layer. */
static bool number_places(struct cuda_exchange *g, const struct model_shape *m) {
    g->place_of = calloc((size_t)m->n_layers * (size_t)m->n_experts, sizeof *g->place_of);
    if (!g->place_of) return false;
    for (int32_t l = 0; l < m->n_layers; l++) {
        int32_t n = 0;
        for (int32_t x = 0; x < m->n_experts; x++)
            g->place_of[l * m->n_experts + x] = exchange_holds(g->x, l, x) ? n++ : -1;
        if (n > g->n_places) g->n_places = n;
    }
    return true;
}

enum status exchange_join(struct cuda *c, const struct backend_config *config, struct error *e) {
    if (!config->group) return ST_OK;
    struct cuda_exchange *g = c->exchange = calloc(1, sizeof *g);
    if (!g) return error_set(e, ST_NO_MEMORY, "no memory");
    g->device = c->device;
    enum status st = exchange_open(config->group, config->rank, &c->shape, c->limits.max_batch_tokens,
                                   &g->x);
    if (st == ST_OK && exchange_max_tokens(g->x) >= (1 << OWNER_SHIFT) / c->shape.n_experts_used) st = ST_INVALID;
    if (st == ST_OK && !number_places(g, &c->shape)) st = ST_NO_MEMORY;
    if (st != ST_OK)
        return error_set(e, st, "rank %d cannot join its group: %s", config->rank, status_name(st));
    if (exchange_is_remote(g->x)) return ST_OK;
    TRY(enable_peers(c, e));
    exchange_show(g->x, g);
    return check_sharing(c, e);
}

enum status exchange_upload_homes(struct cuda *c) {
    const struct cuda_exchange *g = c->exchange;
    size_t n_experts = (size_t)c->shape.n_experts, n = (size_t)c->shape.n_layers * n_experts;
    struct expert_home *homes = calloc(n, sizeof *homes);
    if (!homes) return ST_NO_MEMORY;
    for (size_t i = 0; i < n; i++) {
        homes[i].holders = exchange_holders(g->x, (int32_t)(i / n_experts), (int32_t)(i % n_experts));
        homes[i].place = (int16_t)g->place_of[i];
    }
    enum status st = device_check(c, cudaMemcpyAsync(g->homes, homes, n * sizeof *homes, cudaMemcpyHostToDevice,
                                                     c->queue.stream));
    if (st == ST_OK) st = device_check(c, cudaStreamSynchronize(c->queue.stream));
    free(homes);
    return st;
}

static enum status pinned(struct cuda *c, size_t n, struct error *e, void **out) {
    if (cudaHostAlloc(out, n, cudaHostAllocPortable) == cudaSuccess) {
        memset(*out, 0, n);
        return ST_OK;
    }
    (void)cudaGetLastError();
    *out = NULL;
    return error_set(e, ST_NO_MEMORY, "GPU %d: no page-locked memory for the exchange", c->device);
}

static size_t count_bytes(const struct cuda *c) {
    size_t per_layer = (size_t)c->shape.n_experts + (size_t)exchange_n_ranks(c->exchange->x->group);
    return (N_COUNTS + (size_t)c->shape.n_layers * per_layer) * sizeof(uint64_t);
}

static enum status create_buffers(struct cuda *c, struct error *e) {
    struct cuda_exchange *g = c->exchange;
    struct exchange_args *a = &g->args;
    size_t own = (size_t)c->limits.max_batch_tokens, used = (size_t)c->shape.n_experts_used;
    size_t t = (size_t)exchange_max_tokens(g->x), row = (size_t)c->shape.n_embd * 2;
    size_t experts = (size_t)c->shape.n_experts, layers = (size_t)c->shape.n_layers;
    const struct {
        enum memory_kind kind;
        size_t n;
        void **out;
    } demands[] = {
        {MEMORY_ACTIVATIONS, own * row, &g->x_own},
        {MEMORY_ACTIVATIONS, t * row, &a->inputs},
        {MEMORY_STEP, 2 * MOE_MAX_RANKS * sizeof *g->flags, (void **)&g->flags},
        {MEMORY_STEP, sizeof *a->tokens, (void **)&a->tokens},
        {MEMORY_STEP, t * used * sizeof(int32_t), (void **)&a->group_ids},
        {MEMORY_STEP, t * used, (void **)&a->rank_of},
        {MEMORY_STEP, EXCHANGE_MANY * experts * sizeof(int32_t), (void **)&a->chunk_counts},
        {MEMORY_STEP, t * used * sizeof(int32_t), (void **)&a->lists.token_of},
        {MEMORY_STEP, N_WIDTHS * sizeof(int32_t), (void **)&a->lists.n_items},
        {MEMORY_STEP, layers * experts * sizeof *g->homes, (void **)&g->homes},
        {MEMORY_STEP, count_bytes(c), (void **)&g->counts},
    };
    for (size_t i = 0; i < sizeof demands / sizeof *demands; i++)
        TRY(device_alloc(c, demands[i].kind, "the exchange", demands[i].n, e, demands[i].out));
    for (int i = 0; i < N_WIDTHS; i++) {
        void *p;
        TRY(device_alloc(c, MEMORY_STEP, "the exchange",
                         (experts + t * used / (8u << i)) * sizeof(struct gemm_item), e, &p));
        a->lists.items[i] = p;
    }
    if (exchange_is_remote(g->x)) {
        void *p;
        TRY(device_alloc(c, MEMORY_STEP, "the exchange", t * used * sizeof(int32_t), e, &p));
        a->all_rows = p;
    }
    TRY(pinned(c, 2 * count_bytes(c), e, (void **)&g->host_counts));
    return pinned(c, sizeof *g->stop, e, (void **)&g->stop);
}

enum status exchange_ready(struct cuda *c, struct error *e) {
    struct cuda_exchange *g = c->exchange;
    if (!g) return ST_OK;
    TRY(create_buffers(c, e));
    struct exchange_args *a = &g->args;
    g->ids = c->lists.ids;
    a->rank = g->x->rank;
    a->n_ranks = exchange_n_ranks(g->x->group);
    a->max_tokens = c->limits.max_batch_tokens;
    a->n_cols = c->shape.n_embd;
    a->n_experts = c->shape.n_experts;
    a->n_used = c->shape.n_experts_used;
    a->meeting.rank = a->rank;
    a->meeting.n_ranks = a->n_ranks;
    a->meeting.stop = g->stop;
    a->meeting.timeout_ns = exchange_timeout_ns(g->x);
    a->homes = g->homes;
    a->lists.row_of = c->lists.row_of;
    a->counts = g->counts;
    a->load = g->counts + N_COUNTS;
    a->rows = a->load + (size_t)c->shape.n_layers * (size_t)c->shape.n_experts;
    /* What every rank holds is dealt out evenly, near enough. */
    bool all = g->n_places == c->shape.n_experts;
    g->most_homes = all ? (g->n_places + a->n_ranks - 1) / a->n_ranks : g->n_places;
    if (!exchange_is_remote(g->x)) {
        TRY(move_ready(c, e));
    } else {
        const struct nccl_options o = {
            exchange_unique_id(g->x->group), a->n_ranks, a->rank, exchange_timeout_ns(g->x)};
        TRY(nccl_open(c, &o, e, &g->nccl));
    }
    enum status st = exchange_upload_homes(c);
    if (st != ST_OK) return error_set(e, st, "GPU %d: the exchange: %s", c->device, status_name(st));
    exchange_stop_word(g->x, g->stop);
    return ST_OK;
}

void exchange_abandon(struct cuda *c) {
    if (c->exchange && c->exchange->x) exchange_fail(c->exchange->x->group);
}

void exchange_disconnect(struct cuda *c) {
    if (!c->exchange) return;
    nccl_close(c->exchange->nccl); /* waits for graphs that have its collectives */
    c->exchange->nccl = NULL;
}

void exchange_leave(struct cuda *c) {
    struct cuda_exchange *g = c->exchange;
    if (!g) return;
    if (g->x) {
        exchange_stop_word(g->x, NULL);
        exchange_close(g->x);
    }
    if (g->host_counts) (void)cudaFreeHost(g->host_counts);
    if (g->stop) (void)cudaFreeHost(g->stop);
    free(g->place_of);
    free(g->stacks);
    free(g);
    c->exchange = NULL;
}

int32_t exchange_place(const struct cuda *c, int32_t layer, int32_t expert) {
    const struct cuda_exchange *g = c->exchange;
    int32_t place = g->place_of[layer * c->shape.n_experts + expert];
    return place >= 0 ? place : g->n_places;
}

enum status exchange_add_stack(struct cuda *c, int32_t layer, uint8_t *panels, size_t expert_bytes) {
    struct cuda_exchange *g = c->exchange;
    if (g->n_stacks == g->max_stacks) {
        int32_t max = g->max_stacks > 0 ? g->max_stacks * 2 : 64;
        struct stack *p = realloc(g->stacks, (size_t)max * sizeof *p);
        if (!p) return ST_NO_MEMORY;
        g->stacks = p;
        g->max_stacks = max;
    }
    g->stacks[g->n_stacks++] = (struct stack){layer, panels, expert_bytes};
    return ST_OK;
}

/* ---- a step --------------------------------------------------------------------------------- */

static void set_sizes(const struct cuda *c, const int32_t *all, struct bucket *bucket) {
    const struct cuda_exchange *g = c->exchange;
    int32_t sum = 0, most = 1;
    for (int r = 0; r < g->args.n_ranks; r++) {
        sum += all[r];
        if (all[r] > most) most = all[r];
    }
    bucket->n_group = upload_round_up(sum > 0 ? sum : 1, exchange_max_tokens(g->x));
    if (g->nccl) bucket->n_most = upload_round_up(most, c->limits.max_batch_tokens);
}

enum status exchange_begin_step(struct cuda *c, int32_t n_tokens, struct bucket *bucket) {
    struct cuda_exchange *g = c->exchange;
    int32_t all[MOE_MAX_RANKS];
    TRY(exchange_step_begin(g->x, n_tokens, all));
    set_sizes(c, all, bucket);
    if (g->nccl) return ST_OK;
    if (exchange_moving(g->x)) {
        enum status st = move_experts(c);
        if (st != ST_OK) exchange_step_done(g->x);
        return st;
    }
    if (g->peers_known) return ST_OK;
    for (int r = 0; r < g->args.n_ranks; r++) { /* all are ready, or they would not begin a step */
        const struct cuda_exchange *peer = exchange_peer(g->x, r);
        g->args.ids[r] = peer->ids;
        g->args.x[r] = peer->x_own;
        g->args.meeting.flags[r] = peer->flags;
        if (r != g->args.rank && peer->device == c->device) g->shares_gpu = true;
    }
    g->peers_known = true;
    return ST_OK;
}

enum status exchange_end_step(struct cuda *c, uint64_t parity) {
    struct cuda_exchange *g = c->exchange;
    return device_check(c, cudaMemcpyAsync((uint8_t *)g->host_counts + parity * count_bytes(c), g->counts,
                                           count_bytes(c), cudaMemcpyDeviceToHost, c->queue.stream));
}

enum status exchange_collect(struct cuda *c, uint64_t parity) {
    struct cuda_exchange *g = c->exchange;
    exchange_step_done(g->x);
    if (*(volatile uint32_t *)g->stop != 0) {
        if (!c->lost) log_event(LOG_ERROR, "cuda", "group_lost", "device=%d rank=%d", c->device, g->args.rank);
        c->lost = true;
        return ST_ENGINE_LOST;
    }
    const uint64_t *n = g->host_counts + parity * (count_bytes(c) / sizeof *n);
    g->counters.expert_reads = n[COUNT_READS];
    g->counters.expert_rows = n[COUNT_ROWS];
    g->counters.exchange_bytes = n[COUNT_FAR] * (uint64_t)c->shape.n_embd * 2 + g->moved_bytes;
    size_t n_load = (size_t)c->shape.n_layers * (size_t)c->shape.n_experts;
    if (g->args.rank == 0 || g->nccl) exchange_record(g->x, n + N_COUNTS, n + N_COUNTS + n_load);
    return ST_OK;
}

/* ---- a layer -------------------------------------------------------------------------------- */

enum { FEW_TOKENS = 512 };

/* args, of a layer. */
static struct exchange_args layer_args(const struct cuda *c, int layer) {
    struct exchange_args a = c->exchange->args;
    size_t at = (size_t)layer * (size_t)c->shape.n_experts;
    a.header = a.meeting.header = c->view.header;
    a.meeting.layer = (uint32_t)layer + 1;
    a.n_chunks = c->bucket.n_group > FEW_TOKENS && !c->exchange->shares_gpu ? EXCHANGE_MANY : EXCHANGE_FEW;
    a.homes += at;
    a.load += at;
    a.rows += (size_t)layer * (size_t)a.n_ranks;
    if (c->exchange->nccl) nccl_set_sources(c->exchange->nccl, c->bucket.n_most, &a);
    return a;
}

enum status exchange_begin_layer(struct cuda *c, int layer) {
    const struct cuda_exchange *g = c->exchange;
    const struct exchange_args a = layer_args(c, layer);
    if (g->nccl) TRY(nccl_gather(g->nccl, c->bucket.n_most, g->ids, g->x_own, a.header));
    return device_check(c, cuda_exchange_begin(&a, &c->queue));
}

enum status exchange_grouped(struct cuda *c, struct gemm_args *a) {
    const struct cuda_exchange *g = c->exchange;
    int32_t n_tokens = c->bucket.n_group, used = c->shape.n_experts_used, n_pairs = n_tokens * used;
    if (!a->x) a->x = g->args.inputs;
    if (a->token_of) a->token_of = g->args.lists.token_of;
    struct gemm_plan p = cuda_gemm_plan(a, n_tokens, c->shape.n_experts, used, &c->queue);
    a->items = g->args.lists.items[p.width];
    a->n_items = g->args.lists.n_items + p.width;
    int max_groups = n_pairs < g->most_homes ? n_pairs : g->most_homes;
    return device_check(c, cuda_gemm(a, p, n_tokens, max_groups, max_groups + n_pairs / (8 << p.width), &c->queue));
}

/* In the first step of all: the buffer of products is known by now. */
static enum status find_products(struct cuda *c, const struct buf *y) {
    struct cuda_exchange *g = c->exchange;
    CHECK(y->kind == BUF_INNER && y->n_cols == c->shape.n_embd);
    g->y = y->p;
    TRY(exchange_meet(g->x));
    for (int r = 0; r < g->args.n_ranks; r++)
        g->all_y[r] = ((const struct cuda_exchange *)exchange_peer(g->x, r))->y;
    g->products[0] = g->y;
    return ST_OK;
}

static enum status return_products(struct cuda *c, const struct exchange_args *a, const struct buf *y) {
    struct cuda_exchange *g = c->exchange;
    size_t rank_rows;
    void *send = nccl_send_buffer(g->nccl, &rank_rows);
    for (int r = 0; r < a->n_ranks; r++) g->products[r] = r == a->rank ? y->p : nccl_received(g->nccl, r);
    TRY(device_check(c, cuda_exchange_pack(a, y->p, send, rank_rows, &c->queue)));
    return nccl_return(g->nccl, c->bucket.n_most);
}

enum status exchange_down(struct cuda *c, int layer, struct gemm_args *p, const struct buf *y) {
    struct cuda_exchange *g = c->exchange;
    const struct exchange_args a = layer_args(c, layer);
    if (g->nccl) {
        TRY(exchange_grouped(c, p));
        return return_products(c, &a, y);
    }
    if (!g->y) TRY(find_products(c, y));
    CHECK(g->y == y->p);
    p->rank_of = a.rank_of;
    memcpy(p->out_of_rank, g->all_y, sizeof p->out_of_rank);
    TRY(exchange_grouped(c, p));
    /* The norm's waiting blocks are all of its, and must not keep out those that they wait for. */
    bool by_norm = c->bucket.n_tokens > 0 && c->bucket.n_tokens <= c->queue.n_sm && !g->shares_gpu;
    g->due = by_norm ? a.meeting : (struct exchange_meeting){.header = NULL};
    return by_norm ? ST_OK : device_check(c, cuda_exchange_end(&a.meeting, &c->queue));
}
