/* See exchange.h. */
#include "moe/exchange.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "moe/shares.h"
#include "moe/streams.h"

#define DEFAULT_TIMEOUT_NS UINT64_C(10000000000)
/* Some seconds of work: moving takes some steps' time. */
#define HOST_REPLAN_TOKENS (UINT64_C(1) << 20)
#define DEVICE_REPLAN_TOKENS (UINT64_C(1) << 26)
#define DEFAULT_MAX_IMBALANCE 1.1

/* An expert stack as one rank has it. */
struct stack {
    int32_t layer;
    uint8_t *base;
    size_t expert_bytes;
};

/* What a rank shows the others. Written by it before it meets them, read by them after. */
struct shown {
    const struct route *route;
    struct exchange_rows inputs, products;
};

struct member {
    bool joined;
    int inside; /* steps in which it reads what the others show */
    int32_t n_tokens; /* of the step at hand, of ranks that meet on their devices */
    void *own; /* shown to the others */
    volatile uint32_t *stop;
    struct shown shown;
    struct stack *stacks;
    int32_t n_stacks, max_stacks;
    struct moe_counters counters;
};

struct moe_group {
    struct moe_group_options o;
    /* NULL, or how the one rank that is here meets the others; it keeps tables of its own then. */
    struct streams *streams;
    struct moe_unique_id unique_id;
    pthread_mutex_t lock; /* of the meeting, and of joining */
    pthread_cond_t all_here; /* or lost, or a member is no longer inside */
    int n_here;
    uint64_t round;
    bool lost;

    /* Written when the first rank joins. */
    struct model_shape shape;
    int32_t max_tokens;
    struct shares shares; /* rank 0 writes, between two meetings at which nobody reads */
    _Atomic uint64_t *load; /* [L][E] since the beginning */
    uint64_t *rows; /* [L][n_ranks] likewise, of ranks that meet on their devices */
    bool apart; /* ranks compute alone, until told otherwise */
    bool moving; /* shares.next is to be taken before the next layer 0 */
    struct member members[MOE_MAX_RANKS];
    struct route routes[MOE_MAX_RANKS]; /* streams: what the others showed; ids are borrowed */
    int32_t
        *moves; /* streams: [2][R][E] experts of a stack that go to a rank, and that come from it */
};

/* ---- the group ------------------------------------------------------------------------------ */

enum status moe_group_create(const struct moe_group_options *o, struct error *e,
                             struct moe_group **out) {
    *out = NULL;
    struct streams *streams = NULL;
    if (o->n_ranks < 1 || o->n_ranks > MOE_MAX_RANKS)
        return error_set(e, ST_INVALID, "a group has 1 to %d ranks, not %d", MOE_MAX_RANKS,
                         o->n_ranks);
    uint64_t timeout_ns = o->timeout_ns > 0 ? o->timeout_ns : DEFAULT_TIMEOUT_NS;
    enum status st = ST_OK;
    if (o->streams) st = streams_create(o->streams, o->n_ranks, o->rank, timeout_ns, &streams);
    struct moe_group *g = st == ST_OK ? calloc(1, sizeof *g) : NULL;
    if (!g) {
        streams_destroy(streams);
        return error_set(e, ST_NO_MEMORY, "no memory for a group of devices");
    }
    g->o = *o;
    g->streams = streams;
    g->o.streams = NULL; /* theirs now */
    if (o->unique_id) g->unique_id = *o->unique_id;
    g->o.timeout_ns = timeout_ns;
    if (g->o.max_imbalance == 0) g->o.max_imbalance = DEFAULT_MAX_IMBALANCE;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->all_here, &clock);
    pthread_condattr_destroy(&clock);
    *out = g;
    return ST_OK;
}

void moe_group_destroy(struct moe_group *g) {
    if (!g) return;
    streams_destroy(g->streams);
    shares_destroy(&g->shares);
    free((void *)g->load);
    free(g->rows);
    free(g->moves);
    for (int r = 0; r < g->o.n_ranks; r++) free(g->members[r].stacks);
    pthread_cond_destroy(&g->all_here);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

static size_t n_cells(const struct moe_group *g) {
    return (size_t)g->shape.n_layers * (size_t)g->shape.n_experts;
}

void moe_group_load(const struct moe_group *g, uint64_t *dst) {
    for (size_t i = 0; i < n_cells(g); i++)
        dst[i] = atomic_load_explicit(&g->load[i], memory_order_relaxed);
}

enum status moe_group_use(struct moe_group *g, bool together) {
    if (!together && g->shares.slots < g->shape.n_experts) return ST_UNSUPPORTED;
    g->apart = !together;
    return ST_OK;
}

bool moe_group_together(const struct moe_group *g) { return !g->apart; }

struct exchange *exchange_in_use(struct exchange *x) {
    return x && !x->group->apart ? x : NULL;
}

void moe_group_held(const struct moe_group *g, uint16_t *dst) {
    memcpy(dst, g->shares.held, n_cells(g) * sizeof *dst);
}

/* With the lock held. */
static void lose(struct moe_group *g) {
    g->lost = true;
    for (int r = 0; r < g->o.n_ranks; r++)
        if (g->members[r].stop) *g->members[r].stop = 1;
    pthread_cond_broadcast(&g->all_here);
}

void exchange_fail(struct moe_group *g) {
    pthread_mutex_lock(&g->lock);
    lose(g);
    pthread_mutex_unlock(&g->lock);
    if (g->streams) streams_shut(g->streams);
}

int exchange_n_ranks(const struct moe_group *g) { return g->o.n_ranks; }

const struct moe_unique_id *exchange_unique_id(const struct moe_group *g) { return &g->unique_id; }

static struct timespec deadline(const struct moe_group *g) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + g->o.timeout_ns;
    until.tv_sec += (time_t)(ns / 1000000000u);
    until.tv_nsec = (long)(ns % 1000000000u);
    return until;
}

/* Wait until all ranks are here. */
static enum status meet(struct moe_group *g) {
    struct timespec until = deadline(g);
    pthread_mutex_lock(&g->lock);
    uint64_t round = g->round;
    if (!g->lost && ++g->n_here == g->o.n_ranks) {
        g->n_here = 0;
        g->round++;
        pthread_cond_broadcast(&g->all_here);
    }
    while (!g->lost && g->round == round)
        if (pthread_cond_timedwait(&g->all_here, &g->lock, &until) == ETIMEDOUT &&
            g->round == round) {
            log_event(LOG_ERROR, "moe", "rank_missing", "here=%d of=%d", g->n_here, g->o.n_ranks);
            lose(g);
        }
    bool lost = g->lost;
    pthread_mutex_unlock(&g->lock);
    return lost ? ST_ENGINE_LOST : ST_OK;
}

static void add_inside(struct exchange *x, int n) {
    struct moe_group *g = x->group;
    pthread_mutex_lock(&g->lock);
    g->members[x->rank].inside += n;
    pthread_cond_broadcast(&g->all_here);
    pthread_mutex_unlock(&g->lock);
}

/* Wait until nobody can be reading this rank's rows: the others are outside, or have taken too long. */
static void wait_until_unread(struct exchange *x) {
    struct moe_group *g = x->group;
    struct timespec until = deadline(g);
    pthread_mutex_lock(&g->lock);
    g->members[x->rank].inside = 0;
    bool late = false;
    for (int r = 0; r < g->o.n_ranks && !late;) {
        if (g->members[r].inside > 0)
            late = pthread_cond_timedwait(&g->all_here, &g->lock, &until) == ETIMEDOUT;
        else
            r++;
    }
    pthread_mutex_unlock(&g->lock);
}

/* ---- joining -------------------------------------------------------------------------------- */

/* With the lock held: the first rank sets what all have in common. */
static enum status agree(struct moe_group *g, const struct model_shape *shape, int32_t max_tokens) {
    if (g->load) {
        bool same = memcmp(&g->shape, shape, sizeof *shape) == 0 && g->max_tokens == max_tokens;
        return same ? ST_OK : ST_INVALID;
    }
    size_t n = (size_t)shape->n_layers * (size_t)shape->n_experts;
    if (g->o.load && g->o.n_load != n) return ST_INVALID;
    enum status st =
        shares_create(shape, g->o.n_ranks, g->o.experts_per_rank, g->o.load, &g->shares);
    if (st != ST_OK) return st;
    g->shape = *shape;
    g->max_tokens = max_tokens;
    g->load = calloc(n, sizeof *g->load);
    g->rows = calloc((size_t)shape->n_layers * (size_t)g->o.n_ranks, sizeof *g->rows);
    size_t n_moves = 2 * (size_t)g->o.n_ranks * (size_t)shape->n_experts;
    bool ok = g->load && g->rows;
    if (ok && g->streams) {
        g->moves = calloc(n_moves, sizeof *g->moves);
        ok = g->moves && streams_room(g->streams, shape, max_tokens) == ST_OK;
    }
    if (ok) return ST_OK;
    free(g->rows);
    g->rows = NULL;
    shares_destroy(&g->shares);
    free((void *)g->load);
    g->load = NULL;
    return ST_NO_MEMORY;
}

static bool allocate(struct exchange *x) {
    const struct moe_group *g = x->group;
    size_t n_tokens = (size_t)exchange_max_tokens(x), n_experts = (size_t)g->shape.n_experts;
    size_t n_own = (size_t)g->max_tokens * (size_t)g->shape.n_experts_used;
    size_t n_ranks = (size_t)g->o.n_ranks;
    if (route_create(&g->shape, (int32_t)n_tokens, &x->work) != ST_OK) return false;
    x->token_rank = calloc(n_tokens, sizeof(int32_t));
    x->token_of = calloc(n_tokens, sizeof(int32_t));
    x->work_of = calloc(n_tokens, sizeof(int32_t));
    x->back_rank = calloc(n_own, sizeof(int32_t));
    x->back_row = calloc(n_own, sizeof(int32_t));
    x->counts = calloc(n_experts, sizeof(int32_t));
    x->seen = calloc(n_experts, sizeof(int32_t));
    x->rows = calloc(n_experts * n_ranks, sizeof(int32_t));
    x->first = calloc(n_experts * n_ranks, sizeof(int32_t));
    if (g->streams) x->given = calloc(n_tokens * (size_t)g->shape.n_experts_used, sizeof(int32_t));
    return (x->given || !g->streams) && x->token_rank && x->token_of && x->work_of &&
           x->back_rank && x->back_row && x->counts && x->seen && x->rows && x->first;
}

enum status exchange_open(struct moe_group *g, int rank, const struct model_shape *shape,
                          int32_t max_tokens, struct exchange **out) {
    CHECK(rank >= 0 && rank < g->o.n_ranks);
    *out = NULL;
    int64_t most = (int64_t)max_tokens * g->o.n_ranks * shape->n_experts_used;
    if (most > INT32_MAX || shape->n_experts > 512) return ST_INVALID;
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return ST_NO_MEMORY;
    x->group = g;
    x->rank = rank;
    pthread_mutex_lock(&g->lock);
    CHECK(!g->members[rank].joined && (!g->streams || rank == g->o.rank));
    g->members[rank].joined = true;
    enum status st = agree(g, shape, max_tokens);
    pthread_mutex_unlock(&g->lock);
    if (st == ST_OK && !allocate(x)) st = ST_NO_MEMORY;
    if (st != ST_OK) {
        exchange_close(x);
        return st;
    }
    *out = x;
    return ST_OK;
}

void exchange_close(struct exchange *x) {
    if (!x) return;
    exchange_fail(x->group);
    wait_until_unread(x);
    route_destroy(&x->work);
    free(x->token_rank);
    free(x->token_of);
    free(x->work_of);
    free(x->back_rank);
    free(x->back_row);
    free(x->counts);
    free(x->seen);
    free(x->rows);
    free(x->first);
    free(x->given);
    free(x);
}

uint64_t exchange_timeout_ns(const struct exchange *x) { return x->group->o.timeout_ns; }

int32_t exchange_max_tokens(const struct exchange *x) {
    return x->group->max_tokens * x->group->o.n_ranks;
}

uint64_t exchange_bytes(const struct exchange *x) {
    const struct moe_group *g = x->group;
    uint64_t n_own = (uint64_t)g->max_tokens * (uint64_t)g->shape.n_experts_used;
    uint64_t n_cuts = (uint64_t)g->shape.n_experts * (uint64_t)(g->o.n_ranks + 1);
    uint64_t n_tokens = (uint64_t)exchange_max_tokens(x);
    uint64_t n_each = 3 + (g->streams ? (uint64_t)g->shape.n_experts_used : 0);
    return route_bytes(&x->work) + (g->streams ? streams_bytes(g->streams) : 0) +
           sizeof(int32_t) * (n_each * n_tokens + 2 * n_own + 2 * n_cuts);
}

bool exchange_holds(const struct exchange *x, int32_t layer, int32_t expert) {
    return shares_holds(&x->group->shares, layer, expert, x->rank);
}

uint16_t exchange_holders(const struct exchange *x, int32_t layer, int32_t expert) {
    const struct shares *s = &x->group->shares;
    return s->held[(size_t)layer * (size_t)s->n_experts + (size_t)expert];
}

enum status exchange_stack(struct exchange *x, int32_t layer, uint8_t *base, size_t expert_bytes) {
    struct member *m = &x->group->members[x->rank];
    if (m->n_stacks == m->max_stacks) {
        int32_t max = m->max_stacks > 0 ? m->max_stacks * 2 : 64;
        struct stack *p = realloc(m->stacks, (size_t)max * sizeof *p);
        if (!p) return ST_NO_MEMORY;
        m->stacks = p;
        m->max_stacks = max;
    }
    m->stacks[m->n_stacks++] = (struct stack){layer, base, expert_bytes};
    return ST_OK;
}

uint64_t exchange_away_bytes(const struct exchange *x) {
    const struct member *m = &x->group->members[x->rank];
    uint64_t sum = 0;
    for (int32_t i = 0; i < m->n_stacks; i++)
        for (int32_t e = 0; e < x->group->shape.n_experts; e++)
            if (!exchange_holds(x, m->stacks[i].layer, e)) sum += m->stacks[i].expert_bytes;
    return sum;
}

/* ---- moving weights ------------------------------------------------------------------------- */

/* Give back whole pages; what is read next is zero. */
static void drop(uint8_t *p, size_t n) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)p + page - 1) / page * page, to = ((uintptr_t)p + n) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_DONTNEED); /* advice: may be refused */
}

static void copy_gained(struct exchange *x) {
    struct moe_group *g = x->group;
    struct member *m = &g->members[x->rank];
    for (int32_t i = 0; i < m->n_stacks; i++) {
        const struct stack *s = &m->stacks[i];
        size_t row = (size_t)s->layer * (size_t)g->shape.n_experts;
        for (int32_t e = 0; e < g->shape.n_experts; e++) {
            unsigned held = g->shares.held[row + (size_t)e], next = g->shares.next[row + (size_t)e];
            if ((next & ~held) >> x->rank & 1) {
                const struct stack *from = &g->members[__builtin_ctz(held)].stacks[i];
                CHECK(from->layer == s->layer && from->expert_bytes == s->expert_bytes);
                size_t at = (size_t)e * s->expert_bytes;
                memcpy(s->base + at, from->base + at, s->expert_bytes);
                m->counters.exchange_bytes += s->expert_bytes;
                m->counters.n_moved++;
            }
        }
    }
}

static void drop_lost(struct exchange *x) {
    struct moe_group *g = x->group;
    const struct member *m = &g->members[x->rank];
    for (int32_t i = 0; i < m->n_stacks; i++) {
        const struct stack *s = &m->stacks[i];
        size_t row = (size_t)s->layer * (size_t)g->shape.n_experts;
        for (int32_t e = 0; e < g->shape.n_experts; e++) {
            unsigned held = g->shares.held[row + (size_t)e], next = g->shares.next[row + (size_t)e];
            if ((held & ~next) >> x->rank & 1)
                drop(s->base + (size_t)e * s->expert_bytes, s->expert_bytes);
        }
    }
}

/* The experts of stack i that this rank gives to rank r, or gets from it: in either case those that only one of
 * them is to have, from the first that has them. */
static struct streams_rows moving_rows(struct exchange *x, const struct stack *s, int from, int to,
                                       int32_t *list) {
    struct moe_group *g = x->group;
    size_t row = (size_t)s->layer * (size_t)g->shape.n_experts;
    struct streams_rows rows = {s->base, s->expert_bytes, s->expert_bytes, list, 0};
    for (int32_t e = 0; e < g->shape.n_experts; e++) {
        unsigned held = g->shares.held[row + (size_t)e], next = g->shares.next[row + (size_t)e];
        if ((next & ~held) >> to & 1 && __builtin_ctz(held) == from) list[rows.n++] = e;
    }
    return rows;
}

static enum status stream_gained(struct exchange *x) {
    struct moe_group *g = x->group;
    struct member *m = &g->members[x->rank];
    struct streams_rows to[MOE_MAX_RANKS], from[MOE_MAX_RANKS];
    enum status st = ST_OK;
    for (int32_t i = 0; i < m->n_stacks && st == ST_OK; i++) {
        const struct stack *s = &m->stacks[i];
        int32_t *list = g->moves;
        for (int r = 0; r < g->o.n_ranks; r++, list += 2 * g->shape.n_experts) {
            to[r] = moving_rows(x, s, x->rank, r, list);
            from[r] = moving_rows(x, s, r, x->rank, list + g->shape.n_experts);
            m->counters.n_moved += (uint64_t)from[r].n;
            m->counters.exchange_bytes += (uint64_t)from[r].n * s->expert_bytes;
        }
        st = streams_weights(g->streams, to, from);
    }
    return st;
}

/* What was lost has gone to whoever gained it once all was sent, so that nobody need be waited for. */
static enum status stream_move(struct exchange *x) {
    struct moe_group *g = x->group;
    enum status st = stream_gained(x);
    if (st != ST_OK) return st;
    drop_lost(x);
    g->members[x->rank].counters.n_replans++;
    memcpy(g->shares.held, g->shares.next, n_cells(g) * sizeof *g->shares.held);
    g->moving = false;
    return ST_OK;
}

/* All ranks have met and see `moving`. Sources stay until all have copied, the old table until all have
 * dropped. */
static enum status move(struct exchange *x) {
    struct moe_group *g = x->group;
    copy_gained(x);
    enum status st = meet(g);
    if (st != ST_OK) return st;
    drop_lost(x);
    g->members[x->rank].counters.n_replans++;
    return exchange_moved(x);
}

enum status exchange_moved(struct exchange *x) {
    struct moe_group *g = x->group;
    enum status st = meet(g);
    if (st != ST_OK) return st;
    if (x->rank == 0) {
        memcpy(g->shares.held, g->shares.next, n_cells(g) * sizeof *g->shares.held);
        g->moving = false;
    }
    return meet(g);
}

/* ---- a layer -------------------------------------------------------------------------------- */

/* Count the group's rows by expert, and mark its tokens as nobody's work yet. */
static void count(struct exchange *x) {
    const struct moe_group *g = x->group;
    memset(x->counts, 0, (size_t)g->shape.n_experts * sizeof *x->counts);
    memset(x->seen, 0, (size_t)g->shape.n_experts * sizeof *x->seen);
    int32_t n_tokens = 0;
    for (int q = 0; q < g->o.n_ranks; q++) {
        const struct route *r = g->members[q].shown.route;
        for (int32_t i = 0; i < r->n_tokens * r->n_used; i++) x->counts[r->ids[i]]++;
        n_tokens += r->n_tokens;
    }
    for (int32_t t = 0; t < n_tokens; t++) x->work_of[t] = -1;
}

/* Where each expert's rows begin on each rank. */
static void place(struct exchange *x) {
    const struct moe_group *g = x->group;
    int n_ranks = g->o.n_ranks;
    int32_t end[MOE_MAX_RANKS] = {0};
    for (int32_t e = 0; e < g->shape.n_experts; e++) {
        x->work.expert_first[e] = end[x->rank];
        for (int r = 0; r < n_ranks; r++) {
            x->first[e * n_ranks + r] = end[r];
            end[r] += x->rows[e * n_ranks + r];
        }
    }
    x->work.expert_first[g->shape.n_experts] = end[x->rank];
}

/* Which rank computes the next row of expert e, and as which of its rows. */
static int32_t next_row(struct exchange *x, int32_t e, int *rank) {
    int n_ranks = x->group->o.n_ranks;
    int32_t i = x->seen[e]++;
    const int32_t *rows = x->rows + e * n_ranks;
    for (*rank = 0; i >= rows[*rank]; ++*rank) i -= rows[*rank];
    return x->first[e * n_ranks + *rank] + i;
}

/* Walk the group's pairs, rank after rank: those of this rank learn who computes them, those that this rank
 * computes become its work. Products that come by streams lie in the order of the pairs. */
static void deal(struct exchange *x) {
    const struct moe_group *g = x->group;
    int32_t group_token = 0, n_given = 0;
    x->work.n_tokens = 0;
    memset(x->n_back, 0, sizeof x->n_back);
    for (int q = 0; q < g->o.n_ranks; q++) {
        x->given_first[q] = n_given;
        const struct route *r = g->members[q].shown.route;
        for (int32_t t = 0; t < r->n_tokens; t++, group_token++) {
            for (int32_t k = 0; k < r->n_used; k++) {
                int32_t pair = t * r->n_used + k;
                int computes;
                int32_t row = next_row(x, r->ids[pair], &computes);
                if (q == x->rank) {
                    x->back_rank[pair] = computes;
                    x->back_row[pair] = g->streams && computes != q ? x->n_back[computes]++ : row;
                }
                if (computes != x->rank) continue;
                if (x->given && q != x->rank) x->given[n_given++] = row;
                int32_t *w = &x->work_of[group_token];
                if (*w < 0) {
                    *w = x->work.n_tokens++;
                    x->token_rank[*w] = q;
                    x->token_of[*w] = t;
                }
                x->work.pair_of[row] = *w * r->n_used + k;
            }
        }
    }
    x->given_first[g->o.n_ranks] = n_given;
}

/* By rank 0: a new plan, if the window is full and was uneven. */
static void replan(struct moe_group *g, uint64_t default_tokens) {
    uint64_t window = g->o.replan_tokens > 0 ? g->o.replan_tokens : default_tokens;
    if (g->moving || g->shares.window_rows < window) return;
    double was = shares_imbalance(&g->shares);
    g->moving = shares_replan(&g->shares, window, g->o.max_imbalance);
    log_event(g->moving ? LOG_INFO : LOG_DEBUG, "moe", "expert_balance", "imbalance=%.3f replan=%d", was, g->moving);
}

static void record(struct exchange *x, int32_t layer) {
    struct moe_group *g = x->group;
    shares_record(&g->shares, layer, x->counts, x->rows);
    _Atomic uint64_t *load = g->load + (size_t)layer * (size_t)g->shape.n_experts;
    for (int32_t e = 0; e < g->shape.n_experts; e++)
        atomic_fetch_add_explicit(&load[e], (uint64_t)x->counts[e], memory_order_relaxed);
    if (layer == g->shape.n_layers - 1) replan(g, HOST_REPLAN_TOKENS);
}

static struct streams_rows stream_rows(struct exchange_rows r, int32_t n) {
    return (struct streams_rows){.p = r.p, .stride = r.stride, .n_bytes = r.n_bytes, .n = n};
}

/* What others show lies where their message was received. */
static enum status stream_routes(struct exchange *x) {
    struct moe_group *g = x->group;
    struct streams_route shown[MOE_MAX_RANKS];
    const struct shown *own = &g->members[x->rank].shown;
    struct streams_rows inputs = stream_rows(own->inputs, own->route->n_tokens);
    enum status st = streams_routes(g->streams, own->route->ids, &inputs, shown);
    for (int r = 0; r < g->o.n_ranks && st == ST_OK; r++) {
        if (r == x->rank) continue;
        g->routes[r].n_tokens = shown[r].n_tokens;
        g->routes[r].n_used = g->shape.n_experts_used;
        g->routes[r].ids = (int32_t *)(uintptr_t)shown[r].ids;
        g->members[r].shown.route = &g->routes[r];
        g->members[r].shown.inputs = (struct exchange_rows){
            shown[r].inputs.p, shown[r].inputs.stride, shown[r].inputs.n_bytes};
    }
    return st;
}

static enum status stream_products(struct exchange *x) {
    struct moe_group *g = x->group;
    struct streams_rows to[MOE_MAX_RANKS], from[MOE_MAX_RANKS];
    for (int r = 0; r < g->o.n_ranks; r++) {
        to[r] = stream_rows(g->members[x->rank].shown.products,
                            x->given_first[r + 1] - x->given_first[r]);
        to[r].of = x->given + x->given_first[r];
    }
    enum status st = streams_products(g->streams, to, x->n_back, from);
    for (int r = 0; r < g->o.n_ranks && st == ST_OK; r++)
        if (r != x->rank)
            g->members[r].shown.products =
                (struct exchange_rows){from[r].p, from[r].stride, from[r].n_bytes};
    return st;
}

enum status exchange_route(struct exchange *x, int32_t layer, const struct route *own,
                           struct exchange_rows inputs) {
    struct moe_group *g = x->group;
    struct shares_scratch scratch;
    g->members[x->rank].shown.route = own;
    g->members[x->rank].shown.inputs = inputs;
    if (layer == 0) add_inside(x, 1);
    enum status st = g->streams ? stream_routes(x) : meet(g);
    if (st == ST_OK && layer == 0 && g->moving) st = g->streams ? stream_move(x) : move(x);
    if (st != ST_OK) {
        add_inside(x, -1);
        return st;
    }
    count(x);
    shares_assign(&g->shares, layer, x->counts, &scratch, x->rows);
    place(x);
    deal(x);
    struct moe_counters *c = &g->members[x->rank].counters;
    c->expert_rows += (uint64_t)x->work.expert_first[g->shape.n_experts];
    for (int32_t w = 0; w < x->work.n_tokens; w++)
        if (x->token_rank[w] != x->rank) c->exchange_bytes += inputs.n_bytes;
    return ST_OK;
}

void exchange_gather(const struct exchange *x, void *dst, size_t stride) {
    for (int32_t w = 0; w < x->work.n_tokens; w++) {
        const struct exchange_rows *from = &x->group->members[x->token_rank[w]].shown.inputs;
        memcpy((uint8_t *)dst + (size_t)w * stride,
               (const uint8_t *)from->p + (size_t)x->token_of[w] * from->stride, from->n_bytes);
    }
}

enum status exchange_products(struct exchange *x, int32_t layer, struct exchange_rows products) {
    x->group->members[x->rank].shown.products = products;
    bool alone = x->group->streams != NULL;
    enum status st = alone ? stream_products(x) : meet(x->group);
    /* All have dealt this layer out, and look at the tables again only after the next meeting. */
    if (st == ST_OK && (alone || x->rank == 0)) record(x, layer);
    if (st != ST_OK) add_inside(x, -1);
    return st;
}

void exchange_return(struct exchange *x, int32_t layer, const struct route *own, void *dst,
                     size_t stride) {
    struct moe_counters *c = &x->group->members[x->rank].counters;
    for (int32_t i = 0; i < own->n_tokens * own->n_used; i++) {
        const struct exchange_rows *from = &x->group->members[x->back_rank[i]].shown.products;
        memcpy((uint8_t *)dst + (size_t)own->row_of[i] * stride,
               (const uint8_t *)from->p + (size_t)x->back_row[i] * from->stride, from->n_bytes);
        if (x->back_rank[i] != x->rank) c->exchange_bytes += from->n_bytes;
    }
    if (layer == x->group->shape.n_layers - 1) add_inside(x, -1);
}

void exchange_counters(const struct exchange *x, struct moe_counters *out) {
    const struct moe_counters *c = &x->group->members[x->rank].counters;
    out->expert_rows = c->expert_rows;
    out->exchange_bytes = c->exchange_bytes;
    out->n_replans = c->n_replans;
    out->n_moved = c->n_moved;
}

/* ---- ranks that meet on their devices ------------------------------------------------------- */

void exchange_show(struct exchange *x, void *own) {
    pthread_mutex_lock(&x->group->lock);
    x->group->members[x->rank].own = own;
    pthread_mutex_unlock(&x->group->lock);
}

void *exchange_peer(const struct exchange *x, int rank) {
    pthread_mutex_lock(&x->group->lock);
    void *own = x->group->members[rank].own;
    pthread_mutex_unlock(&x->group->lock);
    return own;
}

void exchange_stop_word(struct exchange *x, volatile uint32_t *stop) {
    struct moe_group *g = x->group;
    pthread_mutex_lock(&g->lock);
    g->members[x->rank].stop = stop;
    if (stop && g->lost) *stop = 1;
    pthread_mutex_unlock(&g->lock);
}

bool exchange_is_remote(const struct exchange *x) { return x->group->streams != NULL; }

enum status exchange_step_begin(struct exchange *x, int32_t n_tokens, int32_t *all) {
    struct moe_group *g = x->group;
    add_inside(x, 1);
    g->members[x->rank].n_tokens = all[x->rank] = n_tokens;
    enum status st = g->streams ? streams_counts(g->streams, all) : meet(g);
    for (int r = 0; r < g->o.n_ranks && !g->streams; r++) all[r] = g->members[r].n_tokens;
    if (st != ST_OK) add_inside(x, -1);
    return st;
}

enum status exchange_meet(struct exchange *x) { return x->group->streams ? ST_OK : meet(x->group); }

void exchange_step_done(struct exchange *x) { add_inside(x, -1); }

void exchange_record(struct exchange *x, const uint64_t *load, const uint64_t *rows) {
    struct moe_group *g = x->group;
    int32_t n_experts = g->shape.n_experts, n_ranks = g->o.n_ranks;
    for (int32_t l = 0; l < g->shape.n_layers; l++, load += n_experts, rows += n_ranks) {
        uint64_t new_load[512], new_rows[MOE_MAX_RANKS], *known_rows = g->rows + (size_t)l * (size_t)n_ranks;
        _Atomic uint64_t *known = g->load + (size_t)l * (size_t)n_experts;
        for (int32_t e = 0; e < n_experts; e++) {
            new_load[e] = load[e] - atomic_load_explicit(&known[e], memory_order_relaxed);
            atomic_store_explicit(&known[e], load[e], memory_order_relaxed);
        }
        for (int32_t r = 0; r < n_ranks; r++) {
            new_rows[r] = rows[r] - known_rows[r];
            known_rows[r] = rows[r];
        }
        shares_record_sums(&g->shares, l, new_load, new_rows);
    }
    if (!g->streams) replan(g, DEVICE_REPLAN_TOKENS);
}

bool exchange_moving(const struct exchange *x) { return x->group->moving; }

uint16_t exchange_next_holders(const struct exchange *x, int32_t layer, int32_t expert) {
    const struct shares *s = &x->group->shares;
    return s->next[(size_t)layer * (size_t)s->n_experts + (size_t)expert];
}
