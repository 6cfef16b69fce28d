/* See streams.h. */
#include "moe/streams.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "messages are written as they lie");

enum { MAX_PARTS = 64 };

enum kind { KIND_ROUTES = 1, KIND_PRODUCTS, KIND_WEIGHTS, KIND_COUNTS };

struct header {
    uint32_t kind, number, n, row_bytes;
};

/* A message on its way, either way. */
struct message {
    struct header header;
    struct streams_rows ids, rows;
    size_t done, size; /* bytes; header included */
    uint64_t moved_ns; /* when the last of them went */
};

struct streams {
    int n_ranks, rank;
    uint64_t timeout_ns;
    int fds[MOE_MAX_RANKS]; /* -1: this rank */
    uint32_t number; /* of the meeting */
    struct message in[MOE_MAX_RANKS], out[MOE_MAX_RANKS];

    int32_t n_experts, n_used, max_tokens;
    size_t row_bytes; /* most of one row */
    int32_t *ids[MOE_MAX_RANKS]; /* [T][K] what came */
    uint8_t *inputs[MOE_MAX_RANKS]; /* [T] rows */
    uint8_t *products; /* [T * K] rows */
};

/* ---- life ----------------------------------------------------------------------------------- */

enum status streams_create(const int *fds, int n_ranks, int rank, uint64_t timeout_ns,
                           struct streams **out) {
    *out = calloc(1, sizeof **out);
    if (!*out) {
        for (int r = 0; r < n_ranks; r++)
            if (r != rank) close(fds[r]);
        return ST_NO_MEMORY;
    }
    (*out)->n_ranks = n_ranks;
    (*out)->rank = rank;
    (*out)->timeout_ns = timeout_ns;
    for (int r = 0; r < n_ranks; r++) (*out)->fds[r] = r == rank ? -1 : fds[r];
    return ST_OK;
}

void streams_destroy(struct streams *s) {
    if (!s) return;
    for (int r = 0; r < s->n_ranks; r++) {
        if (s->fds[r] >= 0) close(s->fds[r]);
        free(s->ids[r]);
        free(s->inputs[r]);
    }
    free(s->products);
    free(s);
}

enum status streams_room(struct streams *s, const struct model_shape *shape, int32_t max_tokens) {
    size_t n_ids = (size_t)max_tokens * (size_t)shape->n_experts_used;
    s->n_experts = shape->n_experts;
    s->n_used = shape->n_experts_used;
    s->max_tokens = max_tokens;
    s->row_bytes = (size_t)shape->n_embd * sizeof(float);
    s->products = calloc(n_ids, s->row_bytes);
    bool ok = s->products != NULL;
    for (int r = 0; r < s->n_ranks && ok; r++) {
        if (r == s->rank) continue;
        s->ids[r] = calloc(n_ids, sizeof(int32_t));
        s->inputs[r] = calloc((size_t)max_tokens, s->row_bytes);
        ok = s->ids[r] && s->inputs[r];
    }
    return ok ? ST_OK : ST_NO_MEMORY;
}

uint64_t streams_bytes(const struct streams *s) {
    uint64_t n_ids = (uint64_t)s->max_tokens * (uint64_t)s->n_used;
    uint64_t each = n_ids * sizeof(int32_t) + (uint64_t)s->max_tokens * s->row_bytes;
    return n_ids * s->row_bytes + (uint64_t)(s->n_ranks - 1) * each;
}

void streams_shut(struct streams *s) {
    for (int r = 0; r < s->n_ranks; r++)
        if (s->fds[r] >= 0) shutdown(s->fds[r], SHUT_RDWR);
}

/* ---- messages ------------------------------------------------------------------------------- */

static size_t bytes_of(const struct streams_rows *r) { return (size_t)r->n * r->n_bytes; }

/* The next bytes of a message, as up to MAX_PARTS pieces of memory. */
static int add_rows(const struct streams_rows *r, size_t at, struct iovec *iov, int n) {
    if (!r->of && r->stride == r->n_bytes) { /* one piece */
        iov[n++] = (struct iovec){(uint8_t *)(uintptr_t)r->p + at, bytes_of(r) - at};
        return n;
    }
    size_t in_row = at % r->n_bytes;
    for (int32_t i = (int32_t)(at / r->n_bytes); i < r->n && n < MAX_PARTS; i++, in_row = 0) {
        size_t row = (size_t)(r->of ? r->of[i] : i);
        iov[n++] = (struct iovec){(uint8_t *)(uintptr_t)r->p + row * r->stride + in_row,
                                  r->n_bytes - in_row};
    }
    return n;
}

static int parts(struct message *m, struct iovec *iov) {
    size_t at = m->done, n_ids = bytes_of(&m->ids), n_rows = bytes_of(&m->rows);
    int n = 0;
    if (at < sizeof m->header) {
        iov[n++] = (struct iovec){(uint8_t *)&m->header + at, sizeof m->header - at};
        at = sizeof m->header;
    }
    at -= sizeof m->header;
    if (at < n_ids) {
        n = add_rows(&m->ids, at, iov, n);
        at = n_ids;
    }
    at -= n_ids;
    return at < n_rows && n < MAX_PARTS ? add_rows(&m->rows, at, iov, n) : n;
}

static void set_size(struct message *m) {
    m->size = sizeof m->header + bytes_of(&m->ids) + bytes_of(&m->rows);
}

static bool ids_fit(const struct streams *s, const struct streams_rows *ids) {
    const int32_t *p = (const int32_t *)(const void *)ids->p;
    for (int32_t i = 0; i < ids->n * s->n_used; i++)
        if (p[i] < 0 || p[i] >= s->n_experts) return false;
    return true;
}

/* The header of a message has come: is it the one due? `want` is what it should say; routes say themselves how
 * many tokens there are. */
static bool take_header(const struct streams *s, struct message *m, const struct header *want) {
    const struct header *h = &m->header;
    if (h->kind != want->kind || h->number != want->number || h->row_bytes != want->row_bytes)
        return false;
    if (h->kind == KIND_ROUTES) {
        if (h->n > (uint32_t)s->max_tokens) return false;
        m->ids.n = m->rows.n = (int32_t)h->n;
        set_size(m);
    }
    return h->n == (uint32_t)m->rows.n;
}

/* Send or receive what goes now. False: the peer is lost, or sends what is not due. */
static bool move(struct streams *s, int r, struct message *m, const struct header *want) {
    while (m->done < m->size) {
        struct iovec iov[MAX_PARTS];
        struct msghdr h = {.msg_iov = iov};
        bool had_header = m->done >= sizeof m->header;
        h.msg_iovlen = (size_t)parts(m, iov);
        if (want && !had_header) h.msg_iovlen = 1; /* it says how much follows */
        ssize_t n = want ? recvmsg(s->fds[r], &h, 0) : sendmsg(s->fds[r], &h, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
        if (n <= 0) return false;
        m->done += (size_t)n;
        m->moved_ns = clock_now_ns();
        if (want && !had_header && m->done >= sizeof m->header && !take_header(s, m, want))
            return false;
    }
    return true;
}

/* ---- a meeting ------------------------------------------------------------------------------ */

static enum status lose(struct streams *s, int r, const char *why) {
    log_event(LOG_ERROR, "moe", "rank_missing", "rank=%d of=%d why=\"%s\"", r, s->n_ranks, why);
    streams_shut(s);
    return ST_ENGINE_LOST;
}

/* Messages in `in` and `out` are filled but for their headers. */
static enum status meet(struct streams *s, enum kind kind, size_t row_bytes) {
    struct header want = {kind, ++s->number, 0, (uint32_t)row_bytes};
    uint64_t now = clock_now_ns();
    for (int r = 0; r < s->n_ranks; r++) {
        struct message *out = &s->out[r], *in = &s->in[r];
        out->header = want;
        out->header.n = (uint32_t)out->rows.n;
        out->done = in->done = 0;
        out->moved_ns = in->moved_ns = now;
        set_size(out);
        set_size(in);
    }
    for (;;) {
        struct pollfd fds[MOE_MAX_RANKS];
        int n_waiting = 0;
        uint64_t due = UINT64_MAX;
        for (int r = 0; r < s->n_ranks; r++) {
            struct message *out = &s->out[r], *in = &s->in[r];
            fds[r] = (struct pollfd){.fd = -1};
            if (r == s->rank) continue;
            if (!move(s, r, out, NULL) || !move(s, r, in, &want))
                return lose(s, r, "it is gone, or does not keep in step");
            bool sends = out->done < out->size, takes = in->done < in->size;
            if (!sends && !takes) continue;
            uint64_t moved = out->moved_ns > in->moved_ns ? out->moved_ns : in->moved_ns;
            if (clock_now_ns() - moved > s->timeout_ns) return lose(s, r, "it is late");
            if (moved + s->timeout_ns < due) due = moved + s->timeout_ns;
            fds[r].fd = s->fds[r];
            fds[r].events = (short)((sends ? POLLOUT : 0) | (takes ? POLLIN : 0));
            n_waiting++;
        }
        if (n_waiting == 0) return ST_OK;
        now = clock_now_ns();
        uint64_t ms = due > now ? (due - now) / 1000000u + 1 : 0;
        poll(fds, (nfds_t)s->n_ranks, ms > 60000 ? 60000 : (int)ms);
    }
}

enum status streams_routes(struct streams *s, const int32_t *ids, const struct streams_rows *inputs,
                           struct streams_route *out) {
    CHECK(inputs->n_bytes <= s->row_bytes && inputs->n <= s->max_tokens);
    size_t id_bytes = (size_t)s->n_used * sizeof *ids, n = inputs->n_bytes;
    for (int r = 0; r < s->n_ranks; r++) {
        s->out[r].ids =
            (struct streams_rows){(const uint8_t *)ids, id_bytes, id_bytes, NULL, inputs->n};
        s->out[r].rows = *inputs;
        s->in[r].ids =
            (struct streams_rows){(const uint8_t *)s->ids[r], id_bytes, id_bytes, NULL, 0};
        s->in[r].rows = (struct streams_rows){s->inputs[r], n, n, NULL, 0};
    }
    enum status st = meet(s, KIND_ROUTES, n);
    for (int r = 0; r < s->n_ranks && st == ST_OK; r++) {
        if (r == s->rank) continue;
        if (!ids_fit(s, &s->in[r].ids)) return lose(s, r, "it names experts that there are not");
        out[r] = (struct streams_route){s->in[r].rows.n, s->ids[r], s->in[r].rows};
    }
    return st;
}

enum status streams_counts(struct streams *s, int32_t *all) {
    size_t n = sizeof *all;
    for (int r = 0; r < s->n_ranks; r++) {
        s->out[r].ids = s->in[r].ids = (struct streams_rows){0};
        s->out[r].rows = (struct streams_rows){(const uint8_t *)&all[s->rank], n, n, NULL, 1};
        s->in[r].rows = (struct streams_rows){(const uint8_t *)&all[r], n, n, NULL, 1};
    }
    enum status st = meet(s, KIND_COUNTS, n);
    for (int r = 0; r < s->n_ranks && st == ST_OK; r++)
        if (all[r] < 0 || all[r] > s->max_tokens) return lose(s, r, "it has more tokens than there can be");
    return st;
}

enum status streams_products(struct streams *s, const struct streams_rows *to,
                             const int32_t *n_from, struct streams_rows *out) {
    size_t n_bytes = to[s->rank].n_bytes;
    int64_t n = 0;
    for (int r = 0; r < s->n_ranks; r++) {
        int32_t n_rows = r == s->rank ? 0 : n_from[r];
        s->out[r].ids = s->in[r].ids = (struct streams_rows){0};
        s->out[r].rows = to[r];
        out[r] = (struct streams_rows){s->products + (size_t)n * n_bytes, n_bytes, n_bytes, NULL,
                                       n_rows};
        s->in[r].rows = out[r];
        n += n_rows;
    }
    CHECK(n_bytes <= s->row_bytes && n <= (int64_t)s->max_tokens * s->n_used);
    return meet(s, KIND_PRODUCTS, n_bytes);
}

enum status streams_weights(struct streams *s, const struct streams_rows *to,
                            const struct streams_rows *from) {
    for (int r = 0; r < s->n_ranks; r++) {
        s->out[r].ids = s->in[r].ids = (struct streams_rows){0};
        s->out[r].rows = to[r];
        s->in[r].rows = from[r];
    }
    return meet(s, KIND_WEIGHTS, to[s->rank].n_bytes);
}
