/* See worker.h. */
#include "daemon/worker.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/engine.h"
#include "daemon/gather.h"
#include "daemon/mesh.h"

enum { WAIT_MS = 20, JOIN_BYTES = RANK_MAX_EXPERTS * 8 + 4096 };
#define CONNECT_NS UINT64_C(60000000000) /* the server may be started later */

/* A step as it came, and its result. */
struct job {
    struct engine_step step;
    struct moe_step_seq *seqs; /* [max_seqs] */
    struct moe_slot_start *starts; /* [max_seqs] */
    uint8_t *room; /* the frame that it points into, while it is out */
};

struct worker {
    const struct config *config;
    int index; /* of the device */
    pthread_t thread;
    struct rank_link link;
    struct rank_hello hello;
    struct rank_welcome welcome;
    uint64_t *load; /* the welcome's */
    struct moe_group *group; /* or NULL */

    struct engine_ops ops;
    struct engine_moe model;
    struct engine *engine;
    struct error open_error;
    enum status open_st;
    _Atomic bool opened;

    struct job jobs[MOE_MAX_IN_FLIGHT];
    struct job *idle[MOE_MAX_IN_FLIGHT];
    int n_idle;
    bool answer_due; /* a result went out and the server has not said what comes next */
    uint8_t *result; /* [n_result] a result's frame */
    size_t n_result;
};

/* ---- joining -------------------------------------------------------------------------------- */

/* Wait for a frame of this type, which is the only one due. */
static enum status await(struct worker *w, enum rank_link_type type, struct error *e,
                         struct rank_link_frame *out) {
    for (;;) {
        enum status st = rank_link_next(&w->link, 1000, e, out);
        if (st != ST_OK) return st;
        if (out->type == type) return ST_OK;
        if (out->type == RANK_LINK_NONE) continue;
        struct pass p = pass_reader(out->body, out->n);
        if (out->type == RANK_LINK_REFUSED) pass_error(&p, e);
        if (out->type == RANK_LINK_REFUSED && pass_done(&p) && e->code != ST_OK) return e->code;
        return error_set(e, ST_INVALID, "%s sent what was not due", w->link.peer);
    }
}

static enum status say_hello(struct worker *w, struct error *e) {
    uint8_t body[sizeof w->hello + 64];
    struct pass p = pass_writer(body, sizeof body);
    w->hello.launched_rank = w->config->launched_rank;
    w->hello.index = w->index;
    pass_hello(&p, &w->hello);
    CHECK(!p.bad);
    return rank_link_send(&w->link, RANK_LINK_HELLO, body, p.at, e);
}

static enum status take_welcome(struct worker *w, struct error *e) {
    struct rank_link_frame f;
    enum status st = await(w, RANK_LINK_WELCOME, e, &f);
    if (st != ST_OK) return st;
    struct pass p = pass_reader(f.body, f.n);
    pass_welcome(&p, &w->welcome);
    if (!pass_done(&p)) return error_set(e, ST_INVALID, "the server's welcome is not understood");
    if (w->welcome.n_load == 0) return ST_OK;
    w->load = malloc((size_t)w->welcome.n_load * sizeof *w->load);
    if (!w->load) return error_set(e, ST_NO_MEMORY, "no memory for the experts' load");
    memcpy(w->load, w->welcome.load, (size_t)w->welcome.n_load * sizeof *w->load);
    return ST_OK;
}

/* Streams to all other ranks of the group. */
static enum status join_peers(struct worker *w, struct error *e, struct mesh *m) {
    struct rank_peers peers;
    struct rank_link_frame f;
    uint8_t body[8];
    uint16_t port = 0;
    struct pass p = pass_writer(body, sizeof body);
    enum status st = rank_link_listen_beside(w->link.fd, e, &m->listener, &port);
    if (st != ST_OK) return st;
    pass_port(&p, &port);
    st = rank_link_send(&w->link, RANK_LINK_PORT, body, p.at, e);
    if (st == ST_OK) st = await(w, RANK_LINK_PEERS, e, &f);
    if (st == ST_OK) {
        p = pass_reader(f.body, f.n);
        pass_peers(&p, &peers);
        if (!pass_done(&p) || peers.n != w->welcome.n_ranks)
            st = error_set(e, ST_INVALID, "the list of ranks is not understood");
    }
    *m = (struct mesh){.first = w->welcome.rank,
                       .n = 1,
                       .n_ranks = w->welcome.n_ranks,
                       .listener = m->listener,
                       .server = w->config->server,
                       .peers = &peers,
                       .token = w->welcome.token};
    if (st == ST_OK) st = mesh_join(m, e);
    close(m->listener);
    return st;
}

static enum status make_group(struct worker *w, struct error *e) {
    struct mesh m;
    enum status st = join_peers(w, e, &m);
    if (st != ST_OK) return st;
    const struct moe_group_options o = {.n_ranks = w->welcome.n_ranks,
                                        .streams = m.fds[0],
                                        .rank = w->welcome.rank,
                                        .experts_per_rank = w->welcome.experts_per_rank,
                                        .load = w->load,
                                        .n_load = w->welcome.n_load,
                                        .unique_id = &w->welcome.unique_id};
    return moe_group_create(&o, e, &w->group);
}

/* ---- the model ------------------------------------------------------------------------------ */

/* What comes from elsewhere is looked at before the model relies on it. */
static enum status start_slot(void *ctx, const struct moe_slot_start *start) {
    struct engine_moe *m = ctx;
    return moe_start_fits(m->moe, start) ? engine_moe_ops.slot_start(ctx, start) : ST_INVALID;
}

static enum status submit(void *ctx, const struct moe_step *step) {
    struct engine_moe *m = ctx;
    return moe_step_fits(m->moe, step) ? engine_moe_ops.submit(ctx, step) : ST_INVALID;
}

static void *open_main(void *ctx) {
    struct worker *w = ctx;
    struct engine_driver driver = {&w->ops, &w->model};
    w->open_st = engine_start(&driver, 1, &w->open_error, &w->engine);
    atomic_store(&w->opened, true);
    return NULL;
}

/* Beats go on while the model loads; if the server goes meanwhile, the process ends under the load. */
static enum status open_model(struct worker *w, struct error *e) {
    const struct config *c = w->config;
    w->ops = engine_moe_ops;
    w->ops.slot_start = start_slot;
    w->ops.submit = submit;
    w->model.options = (struct moe_options){.model_path = c->model,
                                            .device = c->devices.names[w->index],
                                            .limits = w->welcome.limits,
                                            .n_threads = c->threads,
                                            .n_ranks = c->devices.n,
                                            .group = w->group,
                                            .rank = w->welcome.rank,
                                            .cpu_isa = c->cpu_isa,
                                            .gpu_memory_utilization = c->gpu_memory_utilization,
                                            .offload_experts = c->offload_experts};
    pthread_t thread;
    if (pthread_create(&thread, NULL, open_main, w) != 0)
        return error_set(e, ST_NO_MEMORY, "cannot start a thread");
    while (!atomic_load(&w->opened)) {
        struct rank_link_frame f;
        enum status st = rank_link_next(&w->link, WAIT_MS, e, &f);
        if (st == ST_OK && f.type != RANK_LINK_NONE)
            st = error_set(e, ST_ENGINE_LOST, "the server gave up while the model was loading");
        if (st != ST_OK) return st;
    }
    pthread_join(thread, NULL);
    if (w->open_st != ST_OK) *e = w->open_error;
    return w->open_st;
}

static enum status allocate(struct worker *w, struct error *e) {
    const struct moe_limits *l = &moe_info(w->model.moe)->limits;
    size_t n_room = rank_step_bytes(l);
    w->n_result = rank_result_bytes(l);
    w->result = malloc(w->n_result);
    bool ok = w->result && rank_link_room(&w->link, n_room) == ST_OK;
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        struct job *j = &w->jobs[i];
        j->seqs = calloc((size_t)l->max_seqs, sizeof *j->seqs);
        j->starts = calloc((size_t)l->max_seqs, sizeof *j->starts);
        j->room = malloc(n_room);
        j->step.result.rows = calloc((size_t)l->max_rows, sizeof *j->step.result.rows);
        ok = ok && j->seqs && j->starts && j->room && j->step.result.rows;
        w->idle[w->n_idle++] = j;
    }
    return ok ? ST_OK : error_set(e, ST_NO_MEMORY, "no memory for steps");
}

static enum status say_opened(struct worker *w, struct error *e) {
    struct rank_opened o = {.info = *moe_info(w->model.moe), .depth = w->ops.depth(&w->model)};
    uint8_t body[sizeof o + 64];
    struct pass p = pass_writer(body, sizeof body);
    pass_opened(&p, &o);
    CHECK(!p.bad);
    const struct moe_limits *l = &o.info.limits;
    log_event(LOG_INFO, "daemon", "rank_ready",
              "rank=%d of=%d device=%s backend=\"%s\" kv_blocks=%d block_tokens=%d",
              w->welcome.rank, w->welcome.n_ranks, w->model.options.device, o.info.backend,
              l->n_blocks, l->block_tokens);
    return rank_link_send(&w->link, RANK_LINK_OPENED, body, p.at, e);
}

/* ---- steps ---------------------------------------------------------------------------------- */

static enum status take_step(struct worker *w, const struct rank_link_frame *f, struct error *e) {
    const struct moe_limits *l = &moe_info(w->model.moe)->limits;
    struct rank_step_head head = {0};
    struct pass p = pass_reader(f->body, f->n);
    pass_step_head(&p, &head);
    bool ok = !p.bad && w->n_idle > 0 && head.n_starts <= (uint32_t)l->max_seqs;
    /* Whether experts are computed together changes between steps only. */
    if (ok && w->group && head.together != moe_group_together(w->group))
        ok = w->n_idle == MOE_MAX_IN_FLIGHT && moe_group_use(w->group, head.together) == ST_OK;
    if (ok) {
        struct job *j = w->idle[w->n_idle - 1];
        for (uint32_t i = 0; i < head.n_starts; i++) pass_start(&p, &j->starts[i]);
        pass_step(&p, &j->step.plan.step, j->seqs, l->max_seqs);
        ok = pass_done(&p);
        j->step.plan.n_starts = (int32_t)head.n_starts;
        j->step.plan.starts = j->starts;
    }
    if (!ok) return error_set(e, ST_INVALID, "the server sent a step that is not understood");
    struct job *j = w->idle[--w->n_idle];
    j->room = rank_link_swap_room(&w->link, j->room);
    engine_push(w->engine, &j->step);
    return ST_OK;
}

/* *bye: there was nothing else to come. */
static enum status take_frames(struct worker *w, struct error *e, bool *bye) {
    for (;;) {
        struct rank_link_frame f;
        enum status st = rank_link_next(&w->link, 0, e, &f);
        if (st != ST_OK || f.type == RANK_LINK_NONE) return st;
        *bye = f.type == RANK_LINK_BYE;
        if (*bye) return ST_OK;
        if (f.type == RANK_LINK_STEP)
            st = take_step(w, &f, e);
        else if (f.type != RANK_LINK_REST)
            st = error_set(e, ST_INVALID, "the server sent what was not due");
        else if (
            w->answer_due) /* else it is no answer, and the engine's ring has no room for more */
            engine_push_none(w->engine);
        w->answer_due = false;
        if (st != ST_OK) return st;
    }
}

static enum status send_results(struct worker *w, struct error *e) {
    struct engine_step *step;
    engine_clear(w->engine);
    while ((step = engine_pop(w->engine))) {
        if (step->st != ST_OK)
            return error_set(e, step->st, "rank %d failed in a step: %s", w->welcome.rank,
                             status_name(step->st));
        struct rank_result r = {.run_ns = step->result.run_ns,
                                .counters = step->counters,
                                .n_rows = step->result.n_rows,
                                .rows = step->result.rows};
        struct pass p = pass_writer(w->result, w->n_result);
        pass_result(&p, &r, r.n_rows);
        CHECK(!p.bad); /* rank_result_bytes */
        enum status st = rank_link_send(&w->link, RANK_LINK_RESULT, w->result, p.at, e);
        if (st != ST_OK) return st;
        w->idle[w->n_idle++] = (struct job *)(void *)step; /* its first member */
        w->answer_due = true;
    }
    return ST_OK;
}

static enum status serve(struct worker *w, struct error *e) {
    bool bye = false;
    enum status st = ST_OK;
    while (st == ST_OK && !bye) {
        struct pollfd fds[] = {{.fd = w->link.fd, .events = POLLIN},
                               {.fd = engine_fd(w->engine), .events = POLLIN}};
        poll(fds, 2, (int)(RANK_LINK_BEAT_NS / 1000000u));
        st = take_frames(w, e, &bye);
        if (st == ST_OK && !bye) st = send_results(w, e);
    }
    return st;
}

/* ---- a rank's life -------------------------------------------------------------------------- */

/* Once it takes part, a rank ends with the server: whoever signals both lets the server finish first. A second
 * signal has its default action. */
static void on_signal(int signal) { (void)signal; }

static void ignore_one_signal(void) {
    struct sigaction a = {.sa_handler = on_signal, .sa_flags = SA_RESTART | SA_RESETHAND};
    sigemptyset(&a.sa_mask);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGINT, &a, NULL);
}

static void say_lost(struct worker *w, const struct error *why) {
    uint8_t body[sizeof *why + 8];
    struct error copy = *why, ignored;
    struct pass p = pass_writer(body, sizeof body);
    pass_error(&p, &copy);
    rank_link_send(&w->link, RANK_LINK_LOST, body, p.at, &ignored);
    rank_link_close(&w->link);
}

/* The process ends with its first rank that fails; what others are in the middle of is of no use then. */
_Noreturn static void fail(struct worker *w, const struct error *e) {
    log_event(LOG_ERROR, "daemon", "failed", "rank=%d code=%s error=\"%s\"", w->welcome.rank,
              status_name(e->code), e->text);
    if (w->link.room) say_lost(w, e);
    _exit(e->code == ST_ENGINE_LOST || w->engine ? 1 : 2);
}

static void *rank_main(void *ctx) {
    struct worker *w = ctx;
    struct error e = {0};
    int fd;
    log_event(LOG_INFO, "daemon", "joining", "server=%s device=%s seconds=%d", w->config->server,
              w->config->devices.names[w->index], (int)(CONNECT_NS / 1000000000u));
    enum status st = rank_link_connect(w->config->server, CONNECT_NS, &e, &fd);
    if (st == ST_OK && (st = rank_link_create(fd, JOIN_BYTES, &w->link)) != ST_OK)
        error_set(&e, st, "no memory for the link");
    if (st == ST_OK) st = say_hello(w, &e);
    if (st == ST_OK) st = take_welcome(w, &e);
    if (st == ST_OK && w->welcome.group) st = make_group(w, &e);
    if (st == ST_OK) st = open_model(w, &e);
    if (st == ST_OK) st = allocate(w, &e);
    if (st == ST_OK) ignore_one_signal();
    if (st == ST_OK) st = say_opened(w, &e);
    if (st == ST_OK) st = serve(w, &e);
    if (st != ST_OK) fail(w, &e);
    log_event(LOG_INFO, "daemon", "stopped", "rank=%d", w->welcome.rank);
    engine_stop(w->engine);
    moe_group_destroy(w->group);
    rank_link_close(&w->link);
    return NULL;
}

void worker_run(const struct config *c) {
    static struct worker workers[MOE_MAX_RANKS];
    struct error e = {0};
    struct rank_hello hello;
    if (gather_identify(c->model, c->devices.names[0], &e, &hello) != ST_OK) fail(&workers[0], &e);
    for (int i = 0; i < c->devices.n; i++) {
        struct worker *w = &workers[i];
        w->config = c;
        w->index = i;
        w->hello = hello;
        if (pthread_create(&w->thread, NULL, rank_main, w) != 0) {
            error_set(&e, ST_NO_MEMORY, "cannot start a thread");
            fail(w, &e);
        }
    }
    for (int i = 0; i < c->devices.n; i++) pthread_join(workers[i].thread, NULL);
    exit(0);
}
