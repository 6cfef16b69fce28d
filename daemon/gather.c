/* See gather.h. */
#include "daemon/gather.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/mesh.h"

enum { MAX_COMING = 2 * MOE_MAX_RANKS, HELLO_BYTES = 4096, WAIT_MS = 100 };
#define WAITING_LINE_NS UINT64_C(10000000000)

/* One connection: first a stranger, then a rank. */
struct coming {
    struct rank_link link; /* room NULL: none */
    uint64_t since_ns;
    bool said_hello;
    struct rank_hello hello;
    int seat; /* rank - n_here, once it said hello */
};

struct gathering {
    const struct gather_options *o;
    int listener;
    struct coming coming[MAX_COMING];
    int n_seated;
    uint64_t said_ns; /* when it was last said that ranks are missing */
};

enum status gather_identify(const char *model_path, const char *device, struct error *e,
                            struct rank_hello *out) {
    *out = (struct rank_hello){.launched_rank = -1};
    snprintf(out->version, sizeof out->version, "%s", MOED_VERSION);
    snprintf(out->kind, sizeof out->kind, "%.*s", (int)strcspn(device, ":"), device);
    return moe_identify(model_path, e, &out->model);
}

/* ---- hello ---------------------------------------------------------------------------------- */

static void refuse(struct rank_link *l, const struct error *why) {
    uint8_t body[sizeof *why + 8];
    struct error copy = *why, ignored;
    struct pass p = pass_writer(body, sizeof body);
    pass_error(&p, &copy);
    rank_link_send(l, RANK_LINK_REFUSED, body, p.at, &ignored);
}

static enum status compare(const struct rank_hello *self, const struct rank_hello *h,
                           const char *peer, struct error *e) {
    if (strcmp(h->version, self->version) != 0)
        return error_set(e, ST_UNSUPPORTED, "the rank at %s is moed %s, the server moed %s", peer,
                         h->version, self->version);
    if (strcmp(h->kind, self->kind) != 0)
        return error_set(e, ST_CONFLICT,
                         "the rank at %s runs on %s, the server on %s: all must be of one kind",
                         peer, h->kind, self->kind);
    if (memcmp(&h->model.shape, &self->model.shape, sizeof h->model.shape) != 0)
        return error_set(e, ST_CONFLICT, "the rank at %s has a model of another shape", peer);
    if (h->model.fingerprint != self->model.fingerprint)
        return error_set(e, ST_CONFLICT, "the rank at %s has another model of the same shape",
                         peer);
    return ST_OK;
}

/* The rank's seat: by the launcher's number, or the next free one. */
static enum status seat(const struct gathering *g, const struct rank_hello *h, const char *peer,
                        struct error *e, int *out) {
    const struct gather_options *o = g->o;
    bool launched = o->per_process > 0;
    *out = launched ? (h->launched_rank - 1) * o->per_process + h->index : g->n_seated;
    if (launched != (h->launched_rank >= 0))
        return error_set(e, ST_CONFLICT,
                         "the rank at %s was%s started by a launcher, others were%s", peer,
                         launched ? " not" : "", launched ? "" : " not");
    if (launched &&
        (h->launched_rank < 1 || h->index < 0 || h->index >= o->per_process || *out >= o->n))
        return error_set(e, ST_CONFLICT, "the rank at %s has number %d.%d, which is not expected",
                         peer, h->launched_rank, h->index);
    for (int i = 0; i < MAX_COMING; i++)
        if (g->coming[i].said_hello && g->coming[i].seat == *out)
            return error_set(e, ST_CONFLICT, "two ranks have the number %d.%d", h->launched_rank,
                             h->index);
    return ST_OK;
}

static enum status take_hello(struct gathering *g, struct coming *c,
                              const struct rank_link_frame *f, struct error *e) {
    struct pass p = pass_reader(f->body, f->n);
    pass_hello(&p, &c->hello);
    enum status st = pass_done(&p)
                         ? ST_OK
                         : error_set(e, ST_INVALID, "the hello of the rank at %s is not understood",
                                     c->link.peer);
    if (st == ST_OK) st = compare(&g->o->self, &c->hello, c->link.peer, e);
    if (st == ST_OK) st = seat(g, &c->hello, c->link.peer, e, &c->seat);
    if (st != ST_OK) {
        refuse(&c->link, e);
        return st;
    }
    c->said_hello = true;
    g->n_seated++;
    log_event(LOG_INFO, "daemon", "rank_joined", "device=%d peer=%s have=%d of=%d",
              g->o->n_here + c->seat, c->link.peer, g->n_seated, g->o->n);
    return ST_OK;
}

/* ---- until all are there -------------------------------------------------------------------- */

static void accept_all(struct gathering *g) {
    for (int fd; (fd = rank_link_accept(g->listener)) >= 0;) {
        struct coming *c = NULL;
        for (int i = 0; i < MAX_COMING && !c; i++)
            if (!g->coming[i].link.room) c = &g->coming[i];
        if (!c || rank_link_create(fd, HELLO_BYTES, &c->link) != ST_OK) {
            if (!c) close(fd);
            continue;
        }
        c->since_ns = clock_now_ns();
        c->said_hello = false;
    }
}

/* Not ST_OK: the start is off. */
static enum status hear(struct gathering *g, struct coming *c, struct error *e) {
    struct rank_link_frame f;
    enum status st = rank_link_next(&c->link, 0, e, &f);
    if (st == ST_OK && f.type == RANK_LINK_NONE && !c->said_hello &&
        clock_now_ns() - c->since_ns > RANK_LINK_SILENCE_NS)
        st = error_set(e, ST_TIMEOUT, "%s says nothing", c->link.peer);
    if (st == ST_OK && f.type == RANK_LINK_NONE) return ST_OK;
    if (st == ST_OK && f.type == RANK_LINK_HELLO && !c->said_hello) return take_hello(g, c, &f, e);
    if (st == ST_OK) st = error_set(e, ST_INVALID, "%s sent what was not due", c->link.peer);
    if (c->said_hello || st == ST_UNSUPPORTED) { /* a rank, of whatever version */
        refuse(&c->link, e);
        return st;
    }
    log_event(LOG_WARN, "daemon", "stranger", "at=\"the ranks' address\" error=\"%s\"", e->text);
    rank_link_close(&c->link);
    return ST_OK;
}

static enum status wait_for_all(struct gathering *g, struct error *e) {
    while (g->n_seated < g->o->n) {
        struct pollfd fds[1 + MAX_COMING] = {{.fd = g->listener, .events = POLLIN}};
        for (int i = 0; i < MAX_COMING; i++)
            fds[1 + i] = (struct pollfd){.fd = g->coming[i].link.room ? g->coming[i].link.fd : -1,
                                         .events = POLLIN};
        poll(fds, 1 + MAX_COMING, WAIT_MS);
        accept_all(g);
        for (int i = 0; i < MAX_COMING; i++) {
            if (!g->coming[i].link.room) continue;
            enum status st = hear(g, &g->coming[i], e);
            if (st != ST_OK) return st;
        }
        uint64_t now = clock_now_ns();
        if (now - g->said_ns < WAITING_LINE_NS) continue;
        g->said_ns = now;
        log_event(LOG_INFO, "daemon", "waiting_for_ranks", "have=%d of=%d at=%s", g->n_seated,
                  g->o->n, g->o->address);
    }
    return ST_OK;
}

/* ---- welcome -------------------------------------------------------------------------------- */

static enum status welcome(const struct gather_options *o, struct gathered *out,
                           const uint8_t *token, struct error *e) {
    size_t n = sizeof o->welcome + (size_t)o->welcome.n_load * sizeof(uint64_t);
    uint8_t *body = malloc(n);
    if (!body) return error_set(e, ST_NO_MEMORY, "no memory to welcome the ranks");
    enum status st = ST_OK;
    for (int i = 0; i < o->n && st == ST_OK; i++) {
        struct rank_welcome w = o->welcome;
        w.rank = o->n_here + i;
        w.n_ranks = o->n_here + o->n;
        memcpy(w.token, token, sizeof w.token);
        struct pass p = pass_writer(body, n);
        pass_welcome(&p, &w);
        CHECK(!p.bad);
        st = rank_link_send(&out->links[i], RANK_LINK_WELCOME, body, p.at, e);
    }
    free(body);
    return st;
}

static enum status await_port(struct rank_link *l, struct error *e, uint16_t *port) {
    for (;;) {
        struct rank_link_frame f;
        enum status st = rank_link_next(l, 1000, e, &f);
        if (st != ST_OK) return st;
        if (f.type == RANK_LINK_NONE) continue;
        struct pass p = pass_reader(f.body, f.n);
        pass_port(&p, port);
        if (f.type == RANK_LINK_PORT && pass_done(&p)) return ST_OK;
        return error_set(e, ST_INVALID, "%s did not say where it listens", l->peer);
    }
}

static enum status make_group(const struct gathering *g, struct gathered *out, const uint8_t *token,
                              struct error *e) {
    const struct gather_options *o = g->o;
    struct rank_peers peers = {.n = o->n_here + o->n};
    uint8_t body[sizeof peers];
    enum status st = ST_OK;
    for (int i = 0; i < o->n && st == ST_OK; i++) {
        int rank = o->n_here + i;
        snprintf(peers.at[rank].host, sizeof peers.at[rank].host, "%s", out->links[i].peer);
        st = await_port(&out->links[i], e, &peers.at[rank].port);
    }
    struct pass p = pass_writer(body, sizeof body);
    pass_peers(&p, &peers);
    CHECK(!p.bad);
    for (int i = 0; i < o->n && st == ST_OK; i++)
        st = rank_link_send(&out->links[i], RANK_LINK_PEERS, body, p.at, e);
    if (st != ST_OK) return st;
    struct mesh m = {.n = o->n_here,
                     .n_ranks = peers.n,
                     .listener = g->listener,
                     .server = o->address,
                     .peers = &peers,
                     .token = token};
    st = mesh_join(&m, e);
    memcpy(out->streams, m.fds, sizeof m.fds);
    return st;
}

enum status gather(const struct gather_options *o, struct error *e, struct gathered *out) {
    struct gathering *g = calloc(1, sizeof *g);
    if (!g) return error_set(e, ST_NO_MEMORY, "no memory to gather ranks");
    *out = (struct gathered){0};
    g->o = o;
    uint8_t token[RANK_TOKEN_BYTES];
    random_bytes(token, sizeof token);
    enum status st = rank_link_listen(o->address, e, &g->listener);
    if (st != ST_OK) {
        free(g);
        return st;
    }
    st = wait_for_all(g, e);
    for (int i = 0; i < MAX_COMING; i++) {
        struct coming *c = &g->coming[i];
        if (st == ST_OK && c->said_hello)
            out->links[c->seat] = c->link;
        else
            rank_link_close(&c->link);
    }
    if (st == ST_OK) st = welcome(o, out, token, e);
    if (st == ST_OK && o->welcome.group) st = make_group(g, out, token, e);
    for (int i = 0; i < o->n && st != ST_OK; i++) rank_link_close(&out->links[i]);
    close(g->listener);
    free(g);
    return st;
}
