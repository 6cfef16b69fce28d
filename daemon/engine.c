/* See engine.h. */
#include "daemon/engine.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/ring.h"

enum { RING_ITEMS = 16, IDLE_MS = 1000 };

struct engine {
    const struct engine_ops *ops;
    void *ctx;
    pthread_t thread;
    bool started;
    _Atomic bool stop;
    _Atomic int lost; /* enum status: with no step to give back */
    struct ring jobs; /* struct engine_step *, NULL for "none for now" */
    struct ring results; /* struct engine_step * */
    /* Written by the thread before its first push to `results`, read by engine_start after it. */
    enum status open_st;
    struct error open_error;
};

/* ---- the engine's thread -------------------------------------------------------------------- */

static enum status submit(struct engine *g, struct engine_step *step) {
    for (int32_t i = 0; i < step->plan.n_starts; i++) {
        enum status st = g->ops->slot_start(g->ctx, &step->plan.starts[i]);
        if (st != ST_OK) return st;
    }
    return g->ops->submit(g->ctx, &step->plan.step);
}

static void give_back(struct engine *g, struct engine_step *step, enum status st) {
    step->st = st;
    g->ops->counters(g->ctx, &step->counters);
    CHECK(ring_push(&g->results, &step));
}

/* Sleep until there may be a job. Not ST_OK: the engine was lost meanwhile. */
static enum status sleep_for_job(struct engine *g) {
    if (!g->ops->fd) {
        ring_sleep(&g->jobs);
        return ST_OK;
    }
    struct pollfd fds[] = {{.fd = g->jobs.fd, .events = POLLIN},
                           {.fd = g->ops->fd(g->ctx), .events = POLLIN}};
    poll(fds, 2, IDLE_MS);
    if (fds[0].revents) ring_clear(&g->jobs);
    return g->ops->idle(g->ctx);
}

/* The next job; waits for one if `wait`. *got false: none, or the engine is to stop. *step may be NULL. */
static enum status next_job(struct engine *g, bool wait, bool *got, struct engine_step **step) {
    for (;;) {
        struct engine_step *const *job = ring_peek(&g->jobs);
        *got = job != NULL;
        if (job) {
            *step = *job;
            ring_pop(&g->jobs);
            return ST_OK;
        }
        if (!wait || atomic_load(&g->stop)) return ST_OK;
        enum status st = sleep_for_job(g);
        if (st != ST_OK) return st;
    }
}

static void lose(struct engine *g, struct engine_step *oldest, enum status st) {
    if (oldest) {
        give_back(g, oldest, st);
    } else {
        atomic_store(&g->lost, (int)st);
        ring_wake(&g->results);
    }
}

static void run(struct engine *g) {
    struct engine_step *running[MOE_MAX_IN_FLIGHT];
    int n_running = 0, depth = g->ops->depth(g->ctx);
    bool answer_due = false; /* a result went out and the loop has not said what comes next */
    CHECK(depth >= 1 && depth <= MOE_MAX_IN_FLIGHT);
    for (;;) {
        while (n_running < depth) {
            struct engine_step *step = NULL;
            bool got;
            enum status st = next_job(g, n_running == 0 || answer_due, &got, &step);
            if (st != ST_OK) {
                lose(g, n_running > 0 ? running[0] : NULL, st);
                return;
            }
            if (!got) break;
            answer_due = false;
            if (!step && g->ops->rest) g->ops->rest(g->ctx);
            if (!step) continue;
            running[n_running++] = step;
            st = submit(g, step);
            if (st != ST_OK) {
                give_back(g, running[0], st);
                return;
            }
        }
        if (n_running == 0) return; /* only a stop ends the wait for a job without one */
        enum status st = g->ops->collect(g->ctx, &running[0]->result);
        give_back(g, running[0], st);
        if (st != ST_OK) return;
        n_running--;
        memmove(running, running + 1, (size_t)n_running * sizeof running[0]);
        answer_due = depth > 1;
    }
}

static void *engine_main(void *ctx) {
    struct engine *g = ctx;
    if (g->ops->open) g->open_st = g->ops->open(g->ctx, &g->open_error);
    struct engine_step *opened = NULL;
    CHECK(ring_push(&g->results, &opened));
    if (g->open_st == ST_OK) run(g);
    if (g->ops->close) {
        /* The caller may still look at what a lost engine left (moe_info): close when told to stop.
         */
        while (!atomic_load(&g->stop)) ring_sleep(&g->jobs);
        g->ops->close(g->ctx);
    }
    return NULL;
}

/* ---- the loop's thread ---------------------------------------------------------------------- */

/* Start the thread; it opens the model. */
static enum status spawn(struct engine_driver driver, struct error *e, struct engine **out) {
    struct engine *g = calloc(1, sizeof *g);
    if (!g) return error_set(e, ST_NO_MEMORY, "no memory for the engine's thread");
    g->ops = driver.ops;
    g->ctx = driver.ctx;
    enum status st = ring_create(RING_ITEMS, sizeof(struct engine_step *), &g->jobs);
    if (st == ST_OK) st = ring_create(RING_ITEMS, sizeof(struct engine_step *), &g->results);
    if (st == ST_OK) {
        g->started = pthread_create(&g->thread, NULL, engine_main, g) == 0;
        if (!g->started) st = ST_NO_MEMORY;
    }
    if (st != ST_OK) {
        error_set(e, st, "cannot start the engine's thread");
        engine_stop(g);
        return st;
    }
    *out = g;
    return ST_OK;
}

/* Wait until the model is open: what open returned. */
static enum status await(struct engine *g, struct error *e) {
    while (!ring_peek(&g->results)) ring_sleep(&g->results);
    ring_pop(&g->results);
    if (g->open_st != ST_OK && e) *e = g->open_error;
    return g->open_st;
}

enum status engine_start(const struct engine_driver *drivers, int n, struct error *e,
                         struct engine **out) {
    enum status st = ST_OK;
    int n_spawned = 0;
    while (st == ST_OK && n_spawned < n) {
        st = spawn(drivers[n_spawned], e, &out[n_spawned]);
        n_spawned += st == ST_OK;
    }
    for (int i = 0; i < n_spawned; i++) {
        enum status opened = await(out[i], st == ST_OK ? e : NULL);
        if (st == ST_OK) st = opened;
    }
    if (st == ST_OK) return ST_OK;
    for (int i = 0; i < n_spawned; i++) engine_stop(out[i]);
    return st;
}

void engine_stop(struct engine *g) {
    if (!g) return;
    if (g->started) {
        atomic_store(&g->stop, true);
        ring_wake(&g->jobs);
        pthread_join(g->thread, NULL);
    }
    ring_destroy(&g->jobs);
    ring_destroy(&g->results);
    free(g);
}

void engine_push(struct engine *g, struct engine_step *step) {
    CHECK(step && ring_push(&g->jobs, &step));
}

void engine_push_none(struct engine *g) {
    struct engine_step *none = NULL;
    if (!ring_full(&g->jobs)) CHECK(ring_push(&g->jobs, &none));
}

int engine_fd(const struct engine *g) { return g->results.fd; }

void engine_clear(struct engine *g) { ring_clear(&g->results); }

struct engine_step *engine_pop(struct engine *g) {
    struct engine_step *const *item = ring_peek(&g->results);
    if (!item) return NULL;
    struct engine_step *step = *item;
    ring_pop(&g->results);
    return step;
}

enum status engine_lost(const struct engine *g) { return (enum status)atomic_load(&g->lost); }

/* ---- the real model ------------------------------------------------------------------------- */

static enum status moe_ops_open(void *ctx, struct error *e) {
    struct engine_moe *m = ctx;
    return moe_open(&m->options, m->progress, NULL, e, &m->moe);
}
static void moe_ops_close(void *ctx) {
    struct engine_moe *m = ctx;
    if (m->load) (void)moe_expert_load(m->moe, m->load); /* if not: none was counted, or the device is lost */
    moe_close(m->moe);
    m->moe = NULL;
}
static enum status moe_ops_slot_start(void *ctx, const struct moe_slot_start *start) {
    return moe_slot_start(((struct engine_moe *)ctx)->moe, start);
}
static enum status moe_ops_submit(void *ctx, const struct moe_step *step) {
    return moe_submit(((struct engine_moe *)ctx)->moe, step);
}
static enum status moe_ops_collect(void *ctx, struct moe_result *out) {
    return moe_collect(((struct engine_moe *)ctx)->moe, out);
}
static void moe_ops_counters(void *ctx, struct moe_counters *out) {
    moe_counters(((struct engine_moe *)ctx)->moe, out);
}
static int moe_ops_depth(void *ctx) {
    const struct engine_moe *m = ctx;
    return strncmp(m->options.device, "cuda", 4) == 0 ? MOE_MAX_IN_FLIGHT : 1;
}

const struct engine_ops engine_moe_ops = {
    .open = moe_ops_open,
    .close = moe_ops_close,
    .slot_start = moe_ops_slot_start,
    .submit = moe_ops_submit,
    .collect = moe_ops_collect,
    .counters = moe_ops_counters,
    .depth = moe_ops_depth,
};
