/* See mesh.h. */
#include "daemon/mesh.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/rank_link.h"

#define GREETING_NS UINT64_C(500000000)

/* What the connecting side says first. */
struct greeting {
    uint8_t token[RANK_TOKEN_BYTES];
    int32_t from, to;
};

static enum status connect_to(struct mesh *m, int from, int to, uint64_t until, struct error *e) {
    char address[RANK_ADDRESS_BYTES + 32];
    const char *host = m->peers->at[to].host;
    int *fd = &m->fds[from - m->first][to];
    if (host[0])
        snprintf(address, sizeof address, strchr(host, ':') ? "tcp://[%s]:%u" : "tcp://%s:%u", host,
                 m->peers->at[to].port);
    uint64_t now = clock_now_ns();
    enum status st =
        rank_link_connect(host[0] ? address : m->server, until > now ? until - now : 0, e, fd);
    if (st != ST_OK) return st;
    struct greeting g = {.from = from, .to = to};
    memcpy(g.token, m->token, sizeof g.token);
    st = rank_link_write_all(*fd, &g, sizeof g, until);
    return st == ST_OK ? ST_OK : error_set(e, st, "rank %d cannot greet rank %d", from, to);
}

/* The next of the higher ranks. Whoever is not one is shown out. */
static enum status accept_one(struct mesh *m, uint64_t until, int *n_missing) {
    uint64_t now = clock_now_ns();
    struct pollfd p = {.fd = m->listener, .events = POLLIN};
    if (now >= until) return ST_TIMEOUT;
    poll(&p, 1, (int)((until - now) / 1000000u) + 1);
    int fd = rank_link_accept(m->listener);
    if (fd < 0) return ST_OK;
    struct greeting g;
    uint64_t greeted =
        clock_now_ns() + GREETING_NS; /* a stranger that says nothing holds nobody up for long */
    bool ok = rank_link_read_all(fd, &g, sizeof g, greeted < until ? greeted : until) == ST_OK &&
              memcmp(g.token, m->token, sizeof g.token) == 0 && g.to >= m->first &&
              g.to < m->first + m->n && g.from > g.to && g.from < m->n_ranks &&
              m->fds[g.to - m->first][g.from] < 0;
    if (ok) {
        m->fds[g.to - m->first][g.from] = fd;
        --*n_missing;
    } else {
        close(fd);
        log_event(LOG_WARN, "daemon", "stranger", "at=\"the ranks' sockets\"");
    }
    return ST_OK;
}

enum status mesh_join(struct mesh *m, struct error *e) {
    uint64_t until = clock_now_ns() + MESH_NS;
    enum status st = ST_OK;
    int n_missing = 0;
    memset(m->fds, -1, sizeof m->fds);
    /* A connection stands before it is accepted, so nobody waits for anybody here. */
    for (int i = m->first; i < m->first + m->n; i++) {
        for (int k = 0; k < i && st == ST_OK; k++) st = connect_to(m, i, k, until, e);
        n_missing += m->n_ranks - 1 - i;
    }
    while (st == ST_OK && n_missing > 0) {
        st = accept_one(m, until, &n_missing);
        if (st != ST_OK) error_set(e, st, "%d connections of other ranks did not come", n_missing);
    }
    for (int i = 0; i < m->n && st != ST_OK; i++)
        for (int k = 0; k < m->n_ranks; k++)
            if (m->fds[i][k] >= 0) close(m->fds[i][k]);
    return st;
}
