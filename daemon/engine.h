/* engine: the thread that owns the model and runs steps. The loop hands it plans and gets them back
 * with their results, in order; up to MOE_MAX_IN_FLIGHT are out at a time.
 *
 * What the thread drives is a table of functions, so that tests can put a deterministic fake with
 * faults in the model's place; engine_moe_ops is the real one. All of them are called on the
 * engine's thread only.
 *
 * No allocation after engine_start but what the model does. */
#ifndef MOED_DAEMON_ENGINE_H
#define MOED_DAEMON_ENGINE_H

#include "daemon/sched.h"
#include "moe/moe.h"
#include "proto/base.h"

struct engine_ops {
    /* Load; NULL if there is nothing to do. Errors name what to mend. */
    enum status (*open)(void *ctx, struct error *e);
    void (*close)(void *ctx); /* may be NULL */
    enum status (*slot_start)(void *ctx, const struct moe_slot_start *start);
    enum status (*submit)(void *ctx, const struct moe_step *step);
    enum status (*collect)(void *ctx, struct moe_result *out);
    void (*counters)(void *ctx, struct moe_counters *out);
    /* Steps that may lie between submit and collect: 1 where submit computes (CPU; a second submit
     * would only delay the first one's tokens), MOE_MAX_IN_FLIGHT where it launches (GPU). Asked
     * after open. */
    int (*depth)(void *ctx);

    /* For engines that are elsewhere; NULL if not. There is no further step for now. */
    void (*rest)(void *ctx);
    /* What becomes readable when something happens there while no step is out; then, and once a second at least,
     * idle is called. Not ST_OK: the engine is lost. */
    int (*fd)(void *ctx);
    enum status (*idle)(void *ctx);
};

/* One step's trip to the engine and back. Whoever holds the pointer owns it all. */
struct engine_step {
    struct sched_plan plan;
    struct moe_result result; /* rows: an array of its own, max_rows long */
    enum status st; /* not ST_OK: the engine is lost and takes no more steps */
    struct moe_counters counters;
};

struct engine;

/* What an engine's thread drives; both are borrowed. */
struct engine_driver {
    const struct engine_ops *ops;
    void *ctx;
};
/* Start n engines' threads, out[i] on drivers[i], and wait until all have opened their models, which they do
 * at the same time: what open returned, of the first that failed. On failure none is left running. */
enum status engine_start(const struct engine_driver *drivers, int n, struct error *e,
                         struct engine **out);
/* Finish the steps in hand, close, join. NULL is fine. */
void engine_stop(struct engine *g);

/* The loop's thread. At most MOE_MAX_IN_FLIGHT steps are out. */
void engine_push(struct engine *g, struct engine_step *step);
/* After each engine_pop that gave a step the loop pushes the next one, or says with this that there
 * is none for now: the engine waits for that answer before it blocks on a running step, so that a
 * GPU always has the next step queued when there is one. */
void engine_push_none(struct engine *g);
int engine_fd(const struct engine *g); /* readable: engine_clear, then pop */
void engine_clear(struct engine *g);
struct engine_step *engine_pop(struct engine *g); /* NULL: none is done */
/* Whether it was lost without a step in hand that could say so: asked after engine_pop gave NULL. */
enum status engine_lost(const struct engine *g);

/* The real model as an engine's ctx. */
struct engine_moe {
    struct moe_options options; /* filled by the caller; its strings are borrowed */
    void (*progress)(void *ctx, uint64_t done, uint64_t total); /* may be NULL */
    uint64_t *load; /* NULL, or [L][E]: what moe_expert_load says is added at the end, by one engine at a time, as
                       engine_stop ends them; it may be set while the engine runs */
    struct moe *moe; /* set by open; moe_info and moe_memory may be read from any thread */
};
extern const struct engine_ops engine_moe_ops;

#endif
