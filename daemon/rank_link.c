/* See rank_link.h. */
#include "daemon/rank_link.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are written as they lie");

#define MAGIC UINT32_C(0x4c454f4d) /* "MOEL" */
enum { RETRY_US = 100000, BACKLOG = 64 };

/* ---- sockets -------------------------------------------------------------------------------- */

/* tcp://HOST:PORT, HOST a name, an address or an [IPv6 address]. */
static enum status resolve(const char *address, bool passive, struct error *e,
                           struct addrinfo **out) {
    char host[256];
    const char *at = address + 6, *colon = strrchr(address, ':');
    if (strncmp(address, "tcp://", 6) != 0 || colon < at + 1 || !colon[1])
        return error_set(e, ST_INVALID, "%s: must be tcp://HOST:PORT", address);
    size_t n = (size_t)(colon - at);
    if (at[0] == '[' && at[n - 1] == ']') at++, n -= 2;
    if (n == 0 || n >= sizeof host)
        return error_set(e, ST_INVALID, "%s: must be tcp://HOST:PORT", address);
    memcpy(host, at, n);
    host[n] = '\0';
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0)};
    int rc = getaddrinfo(host, colon + 1, &hints, out);
    if (rc != 0) return error_set(e, ST_INVALID, "%s: %s", address, gai_strerror(rc));
    return ST_OK;
}

static void set_up(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

static enum status listen_at(const struct sockaddr *to, socklen_t n, int *fd) {
    int one = 1;
    *fd = socket(to->sa_family, SOCK_STREAM, 0);
    if (*fd < 0) return ST_IO;
    set_up(*fd);
    setsockopt(*fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(*fd, to, n) == 0 && listen(*fd, BACKLOG) == 0) return ST_OK;
    int err = errno;
    close(*fd);
    *fd = -1;
    errno = err;
    return ST_IO;
}

enum status rank_link_listen(const char *address, struct error *e, int *fd) {
    struct addrinfo *list;
    enum status st = resolve(address, true, e, &list);
    if (st != ST_OK) return st;
    st = listen_at(list->ai_addr, list->ai_addrlen, fd);
    if (st != ST_OK) error_set(e, st, "cannot listen at %s: %s", address, strerror(errno));
    freeaddrinfo(list);
    return st;
}

enum status rank_link_listen_beside(int fd, struct error *e, int *out, uint16_t *port) {
    union {
        struct sockaddr_storage storage;
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } a;
    socklen_t n = sizeof a;
    bool ok = getsockname(fd, &a.any, &n) == 0;
    bool v6 = ok && a.any.sa_family == AF_INET6;
    if (v6)
        a.v6.sin6_port = 0;
    else
        a.v4.sin_port = 0;
    ok = ok && listen_at(&a.any, n, out) == ST_OK;
    n = sizeof a;
    if (!ok || getsockname(*out, &a.any, &n) != 0)
        return error_set(e, ST_IO, "cannot listen for the other ranks: %s", strerror(errno));
    *port = ntohs(v6 ? a.v6.sin6_port : a.v4.sin_port);
    return ST_OK;
}

int rank_link_accept(int listener) {
    int fd = accept(listener, NULL, NULL);
    if (fd >= 0) set_up(fd);
    return fd;
}

/* SO_SNDTIMEO bounds connect too: a host that drops packets must not hold us for minutes. */
static int try_connect(const struct addrinfo *list, uint64_t until_ns) {
    int err = ECONNREFUSED;
    for (const struct addrinfo *a = list; a; a = a->ai_next) {
        uint64_t now = clock_now_ns(), left = until_ns > now ? until_ns - now : 0;
        struct timeval most = {(time_t)(left / 1000000000u),
                               (suseconds_t)(left % 1000000000u / 1000u) + 1};
        int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, 0);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most);
        if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) {
            set_up(fd);
            return fd;
        }
        err = errno == EINPROGRESS ? ETIMEDOUT : errno;
        close(fd);
    }
    errno = err;
    return -1;
}

enum status rank_link_connect(const char *address, uint64_t wait_ns, struct error *e, int *fd) {
    struct addrinfo *list;
    uint64_t until = clock_now_ns() + wait_ns;
    enum status st = resolve(address, false, e, &list);
    if (st != ST_OK) return st;
    while ((*fd = try_connect(list, until)) < 0 && clock_now_ns() < until) usleep(RETRY_US);
    if (*fd < 0) st = error_set(e, ST_IO, "cannot connect to %s: %s", address, strerror(errno));
    freeaddrinfo(list);
    return st;
}

void rank_link_peer(int fd, char *dst, size_t cap) {
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    if (getpeername(fd, (struct sockaddr *)&a, &n) != 0 ||
        getnameinfo((struct sockaddr *)&a, n, dst, (socklen_t)cap, NULL, 0, NI_NUMERICHOST) != 0)
        snprintf(dst, cap, "?");
}

/* Until the socket is ready for `events`. False: it is too late. */
static bool wait_ready(int fd, short events, uint64_t until_ns) {
    uint64_t now = clock_now_ns();
    if (now >= until_ns) return false;
    struct pollfd p = {.fd = fd, .events = events};
    poll(&p, 1, (int)((until_ns - now) / 1000000u) + 1);
    return true;
}

enum status rank_link_write_all(int fd, const void *p, size_t n, uint64_t until_ns) {
    const uint8_t *at = p;
    while (n > 0) {
        ssize_t w = send(fd, at, n, MSG_NOSIGNAL);
        if (w > 0) {
            at += w;
            n -= (size_t)w;
        } else if (w < 0 && errno != EAGAIN && errno != EINTR) {
            return ST_IO;
        } else if (!wait_ready(fd, POLLOUT, until_ns)) {
            return ST_TIMEOUT;
        }
    }
    return ST_OK;
}

enum status rank_link_read_all(int fd, void *p, size_t n, uint64_t until_ns) {
    uint8_t *at = p;
    while (n > 0) {
        ssize_t r = recv(fd, at, n, 0);
        if (r > 0) {
            at += r;
            n -= (size_t)r;
        } else if (r == 0 || (errno != EAGAIN && errno != EINTR)) {
            return ST_IO;
        } else if (!wait_ready(fd, POLLIN, until_ns)) {
            return ST_TIMEOUT;
        }
    }
    return ST_OK;
}

/* ---- links ---------------------------------------------------------------------------------- */

enum status rank_link_create(int fd, size_t n_room, struct rank_link *out) {
    *out = (struct rank_link){.fd = fd, .heard_ns = clock_now_ns(), .sent_ns = clock_now_ns()};
    rank_link_peer(fd, out->peer, sizeof out->peer);
    enum status st = rank_link_room(out, n_room);
    if (st != ST_OK) rank_link_close(out);
    return st;
}

void rank_link_close(struct rank_link *l) {
    if (!l->room) return;
    /* Whoever closes with something unread takes back what it sent last. */
    uint8_t unread[4096];
    if (l->fd >= 0) shutdown(l->fd, SHUT_WR);
    while (l->fd >= 0 && recv(l->fd, unread, sizeof unread, 0) > 0) {
    }
    if (l->fd >= 0) close(l->fd);
    free(l->room);
    *l = (struct rank_link){.fd = -1};
}

enum status rank_link_room(struct rank_link *l, size_t n) {
    uint8_t *p = realloc(l->room, n > 0 ? n : 1);
    if (!p) return ST_NO_MEMORY;
    l->room = p;
    l->n_room = n;
    return ST_OK;
}

uint8_t *rank_link_swap_room(struct rank_link *l, uint8_t *room) {
    CHECK(l->n_got == 0 && !l->whole);
    uint8_t *old = l->room;
    l->room = room;
    return old;
}

static uint32_t u32_at(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static uint16_t u16_at(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static enum status check_header(const struct rank_link *l, struct error *e) {
    const uint8_t *h = l->header;
    if (u32_at(h) != MAGIC)
        return error_set(e, ST_INVALID, "%s does not speak the language of ranks", l->peer);
    if (u16_at(h + 4) != RANK_LINK_VERSION)
        return error_set(e, ST_UNSUPPORTED,
                         "%s speaks version %d of the language of ranks, this moed version %d",
                         l->peer, u16_at(h + 4), RANK_LINK_VERSION);
    uint16_t type = u16_at(h + 6);
    if (type < RANK_LINK_BEAT || type > RANK_LINK_BYE || u32_at(h + 12) != 0)
        return error_set(e, ST_INVALID, "%s sent a frame of unknown type %d", l->peer, type);
    if (u32_at(h + 8) > l->n_room)
        return error_set(e, ST_INVALID, "%s sent a frame of %u bytes, %zu are allowed", l->peer,
                         u32_at(h + 8), l->n_room);
    return ST_OK;
}

/* Bytes of the frame that is coming, header included, as far as known. */
static size_t frame_bytes(const struct rank_link *l) {
    return RANK_LINK_HEADER_BYTES +
           (l->n_got < RANK_LINK_HEADER_BYTES ? 0 : (size_t)u32_at(l->header + 8));
}

/* Take what has come, up to the end of one frame that is not a beat. */
static enum status receive(struct rank_link *l, struct error *e) {
    while (!l->whole) {
        bool in_body = l->n_got >= RANK_LINK_HEADER_BYTES;
        uint8_t *at =
            in_body ? l->room + (l->n_got - RANK_LINK_HEADER_BYTES) : l->header + l->n_got;
        ssize_t r = recv(l->fd, at, frame_bytes(l) - l->n_got, 0);
        if (r < 0 && (errno == EAGAIN || errno == EINTR)) return ST_OK;
        if (r <= 0) return error_set(e, ST_ENGINE_LOST, "the connection to %s ended", l->peer);
        l->heard_ns = clock_now_ns();
        l->n_got += (size_t)r;
        if (l->n_got == RANK_LINK_HEADER_BYTES) {
            enum status st = check_header(l, e);
            if (st != ST_OK) return st;
        }
        if (l->n_got < frame_bytes(l) || l->n_got < RANK_LINK_HEADER_BYTES) continue;
        l->n_got = 0;
        l->whole = u16_at(l->header + 6) != RANK_LINK_BEAT;
    }
    return ST_OK;
}

/* Frames that come meanwhile are taken as far as there is room, so that two sides that send to each other do
 * not wait for each other. */
static enum status send_bytes(struct rank_link *l, const uint8_t *p, size_t n, struct error *e) {
    uint64_t until = clock_now_ns() + RANK_LINK_SILENCE_NS;
    while (n > 0) {
        ssize_t w = send(l->fd, p, n, MSG_NOSIGNAL);
        if (w > 0) {
            p += w;
            n -= (size_t)w;
            continue;
        }
        if (w < 0 && errno != EAGAIN && errno != EINTR)
            return error_set(e, ST_ENGINE_LOST, "the connection to %s ended", l->peer);
        if (!wait_ready(l->fd, (short)(POLLOUT | (l->whole ? 0 : POLLIN)), until))
            return error_set(e, ST_ENGINE_LOST, "%s does not read", l->peer);
        enum status st = receive(l, e);
        if (st != ST_OK) return st;
    }
    l->sent_ns = clock_now_ns();
    return ST_OK;
}

enum status rank_link_send(struct rank_link *l, enum rank_link_type type, const void *body,
                           size_t n, struct error *e) {
    CHECK(n <= RANK_LINK_MAX_BODY_BYTES);
    uint8_t h[RANK_LINK_HEADER_BYTES] = {0};
    uint32_t magic = MAGIC, n_bytes = (uint32_t)n;
    uint16_t version = RANK_LINK_VERSION, t = (uint16_t)type;
    memcpy(h, &magic, 4);
    memcpy(h + 4, &version, 2);
    memcpy(h + 6, &t, 2);
    memcpy(h + 8, &n_bytes, 4);
    enum status st = send_bytes(l, h, sizeof h, e);
    return st == ST_OK ? send_bytes(l, body, n, e) : st;
}

enum status rank_link_beat(struct rank_link *l, struct error *e) {
    if (clock_now_ns() - l->sent_ns < RANK_LINK_BEAT_NS) return ST_OK;
    return rank_link_send(l, RANK_LINK_BEAT, NULL, 0, e);
}

enum status rank_link_next(struct rank_link *l, int timeout_ms, struct error *e,
                           struct rank_link_frame *out) {
    *out = (struct rank_link_frame){.type = RANK_LINK_NONE};
    enum status st = receive(l, e);
    if (st == ST_OK && !l->whole && timeout_ms > 0) {
        const int beat_ms = (int)(RANK_LINK_BEAT_NS / 1000000u);
        struct pollfd p = {.fd = l->fd, .events = POLLIN};
        poll(&p, 1, timeout_ms < beat_ms ? timeout_ms : beat_ms);
        st = receive(l, e);
    }
    if (st != ST_OK) return st;
    /* The beat first: sending may receive, but not over a frame that is there. */
    if ((st = rank_link_beat(l, e)) != ST_OK) return st;
    if (!l->whole && clock_now_ns() - l->heard_ns > RANK_LINK_SILENCE_NS)
        return error_set(e, ST_ENGINE_LOST, "%s has been silent for %d s", l->peer,
                         (int)(RANK_LINK_SILENCE_NS / 1000000000u));
    if (!l->whole) return ST_OK;
    l->whole = false;
    *out = (struct rank_link_frame){(enum rank_link_type)u16_at(l->header + 6), l->room,
                                    u32_at(l->header + 8)};
    return ST_OK;
}
