/* See net.h. */
#include "daemon/net.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "proto/wire.h"

enum { MAX_PATH_BYTES = sizeof(((struct sockaddr_un *)0)->sun_path) - 1 };

struct net {
    char endpoint[MAX_PATH_BYTES + 16];
    char lock_path[MAX_PATH_BYTES + 16];
    const char *path; /* in endpoint */
    int lock_fd;
    bool bound;
    void *zmq, *router, *monitor;
    zmq_msg_t frames[3]; /* of the message received last */
    int n_frames;
    uint64_t bytes_in, bytes_out;
};

/* ---- address and lock ----------------------------------------------------------------------- */

static enum status check_endpoint(const char *endpoint, struct error *e) {
    if (strncmp(endpoint, "tcp://", 6) == 0)
        return error_set(e, ST_UNSUPPORTED,
                         "%s: only ipc:// endpoints are served; from other machines, forward the "
                         "socket (ssh -L)",
                         endpoint);
    if (strncmp(endpoint, "ipc://", 6) != 0 || endpoint[6] == '\0' || endpoint[6] == '*')
        return error_set(e, ST_INVALID, "%s: an endpoint is ipc:// and the path of a socket",
                         endpoint);
    if (endpoint[6] == '@')
        return error_set(e, ST_INVALID,
                         "%s: abstract socket names have no permissions; give a path", endpoint);
    if (strlen(endpoint + 6) > MAX_PATH_BYTES)
        return error_set(e, ST_INVALID, "the socket's path is longer than %d bytes",
                         (int)MAX_PATH_BYTES);
    return ST_OK;
}

/* Lock the file beside the socket. It is removed at exit, so a lock counts only on the inode that
 * still has the name. */
static enum status take_lock(struct net *n, struct error *e) {
    for (;;) {
        int fd = open(n->lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0)
            return error_set(e, ST_IO, "cannot create the lock file %s: %s", n->lock_path,
                             strerror(errno));
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            int err = errno;
            close(fd);
            if (err == EWOULDBLOCK)
                return error_set(e, ST_CONFLICT, "another daemon is serving %s", n->endpoint);
            return error_set(e, ST_IO, "cannot lock %s: %s", n->lock_path, strerror(err));
        }
        struct stat mine, named;
        if (fstat(fd, &mine) == 0 && stat(n->lock_path, &named) == 0 &&
            mine.st_ino == named.st_ino && mine.st_dev == named.st_dev) {
            n->lock_fd = fd;
            return ST_OK;
        }
        close(fd);
    }
}

enum status net_open(const char *endpoint, struct error *e, struct net **out) {
    enum status st = check_endpoint(endpoint, e);
    if (st != ST_OK) return st;
    struct net *n = calloc(1, sizeof *n);
    if (!n) return error_set(e, ST_NO_MEMORY, "no memory for the socket");
    n->lock_fd = -1;
    snprintf(n->endpoint, sizeof n->endpoint, "%s", endpoint);
    n->path = n->endpoint + 6;
    snprintf(n->lock_path, sizeof n->lock_path, "%s.lock", n->path);
    st = take_lock(n, e);
    if (st != ST_OK) {
        net_close(n);
        return st;
    }
    *out = n;
    return ST_OK;
}

/* ---- sockets -------------------------------------------------------------------------------- */

static bool set_option(void *socket, int option, int value) {
    return zmq_setsockopt(socket, option, &value, sizeof value) == 0;
}

/* No ZMTP heartbeats: on ipc a dead peer is seen at once, one that stands still runs into its window, and libzmq
 * 4.3.4 aborts the process (stream_engine_base.cpp, !_io_error) when a heartbeat falls due on a connection
 * that was lost while its input was stopped, which a client that floods and leaves can arrange. The send queue
 * holds one window of TokenChunks, the answers of a full set of requests in flight, and room for a
 * burst of small answers. */
static bool set_options(void *router) {
    int64_t max_frame = WIRE_MAX_BODY_BYTES;
    return set_option(router, ZMQ_ROUTER_MANDATORY, 1) &&
           set_option(router, ZMQ_ROUTER_HANDOVER, 0) && set_option(router, ZMQ_SNDHWM, 1024) &&
           set_option(router, ZMQ_RCVHWM, 256) &&
           zmq_setsockopt(router, ZMQ_MAXMSGSIZE, &max_frame, sizeof max_frame) == 0 &&
           set_option(router, ZMQ_HANDSHAKE_IVL, 5000) && set_option(router, ZMQ_LINGER, 2000);
}

static bool open_monitor(struct net *n) {
    static const char address[] = "inproc://moed-monitor";
    if (zmq_socket_monitor(n->router, address, ZMQ_EVENT_DISCONNECTED) != 0) return false;
    n->monitor = zmq_socket(n->zmq, ZMQ_PAIR);
    return n->monitor && set_option(n->monitor, ZMQ_LINGER, 0) &&
           set_option(n->monitor, ZMQ_RCVHWM, 0) && zmq_connect(n->monitor, address) == 0;
}

enum status net_bind(struct net *n, struct error *e) {
    n->zmq = zmq_ctx_new();
    n->router = n->zmq ? zmq_socket(n->zmq, ZMQ_ROUTER) : NULL;
    if (!n->router || !set_options(n->router) || !open_monitor(n))
        return error_set(e, ST_IO, "cannot set up the socket: %s", zmq_strerror(zmq_errno()));
    mode_t old = umask(0117);
    int rc = zmq_bind(n->router, n->endpoint);
    int err = zmq_errno();
    umask(old);
    if (rc != 0) return error_set(e, ST_IO, "cannot bind %s: %s", n->endpoint, zmq_strerror(err));
    n->bound = true;
    return ST_OK;
}

static void drop_frames(struct net *n) {
    for (int i = 0; i < n->n_frames; i++) zmq_msg_close(&n->frames[i]);
    n->n_frames = 0;
}

void net_close(struct net *n) {
    if (!n) return;
    drop_frames(n);
    if (n->router) zmq_socket_monitor(n->router, NULL, 0);
    if (n->monitor) zmq_close(n->monitor);
    if (n->router) zmq_close(n->router);
    if (n->zmq) zmq_ctx_term(n->zmq);
    if (n->lock_fd >= 0) {
        if (n->bound) unlink(n->path);
        unlink(n->lock_path);
        close(n->lock_fd);
    }
    free(n);
}

const char *net_endpoint(const struct net *n) { return n->endpoint; }

void net_wait(struct net *n, const int *fds, int n_fds, int timeout_ms) {
    CHECK(n_fds <= NET_MAX_FDS);
    zmq_pollitem_t items[2 + NET_MAX_FDS] = {{.socket = n->router, .events = ZMQ_POLLIN},
                                             {.socket = n->monitor, .events = ZMQ_POLLIN}};
    for (int i = 0; i < n_fds; i++)
        items[2 + i] = (zmq_pollitem_t){.fd = fds[i], .events = ZMQ_POLLIN};
    zmq_poll(items, 2 + n_fds, timeout_ms);
}

/* ---- messages ------------------------------------------------------------------------------- */

static struct bytes frame_bytes(zmq_msg_t *m) {
    return (struct bytes){zmq_msg_data(m), zmq_msg_size(m)};
}

/* Read the frames that follow the routing id; those beyond the third are counted and dropped. */
static int receive_rest(struct net *n) {
    int count = 1;
    bool more = zmq_msg_more(&n->frames[0]);
    while (more) {
        zmq_msg_t extra;
        zmq_msg_t *m = count < 3 ? &n->frames[count] : &extra;
        zmq_msg_init(m);
        if (zmq_msg_recv(m, n->router, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(m);
            break; /* parts arrive together: only a closing context gets here */
        }
        n->bytes_in += zmq_msg_size(m);
        more = zmq_msg_more(m);
        if (count < 3)
            n->n_frames++;
        else
            zmq_msg_close(m);
        count++;
    }
    return count;
}

bool net_receive(struct net *n, struct net_message *out) {
    drop_frames(n);
    zmq_msg_init(&n->frames[0]);
    int rc;
    do {
        rc = zmq_msg_recv(&n->frames[0], n->router, ZMQ_DONTWAIT);
    } while (rc < 0 && zmq_errno() == EINTR);
    if (rc < 0) {
        zmq_msg_close(&n->frames[0]);
        return false;
    }
    n->n_frames = 1;
    int count = receive_rest(n);
    *out = (struct net_message){
        .route = frame_bytes(&n->frames[0]), .three_frames = count == 3, .fd = -1, .peer = ""};
    if (count > 1) {
        out->fd = zmq_msg_get(&n->frames[1], ZMQ_SRCFD);
        const char *peer = zmq_msg_gets(&n->frames[1], "Peer-Address");
        if (peer) out->peer = peer;
    }
    if (count == 3) {
        out->header = frame_bytes(&n->frames[1]);
        out->body = frame_bytes(&n->frames[2]);
    }
    return true;
}

bool net_disconnected(struct net *n, int *fd) {
    zmq_msg_t event, address;
    zmq_msg_init(&event);
    if (zmq_msg_recv(&event, n->monitor, ZMQ_DONTWAIT) < 0) {
        zmq_msg_close(&event);
        return false;
    }
    /* Frame 1: event u16, value i32 (the descriptor), unaligned. Frame 2: the address. */
    int32_t value = -1;
    if (zmq_msg_size(&event) >= 6)
        memcpy(&value, (uint8_t *)zmq_msg_data(&event) + 2, sizeof value);
    bool more = zmq_msg_more(&event);
    zmq_msg_close(&event);
    while (more) {
        zmq_msg_init(&address);
        more = zmq_msg_recv(&address, n->monitor, ZMQ_DONTWAIT) >= 0 && zmq_msg_more(&address);
        zmq_msg_close(&address);
    }
    *fd = value;
    return true;
}

static int send_frame(struct net *n, struct bytes b, int flags) {
    int rc;
    do {
        rc = zmq_send(n->router, b.p, b.n, flags | ZMQ_DONTWAIT);
    } while (rc < 0 && zmq_errno() == EINTR);
    return rc;
}

enum status net_send(struct net *n, struct bytes route, struct bytes header, struct bytes body) {
    /* The first frame decides: once the route is taken, libzmq reports success for the rest
     * whatever happens. */
    if (send_frame(n, route, ZMQ_SNDMORE) < 0)
        return zmq_errno() == EAGAIN ? ST_OVERLOADED : ST_NOT_FOUND;
    if (send_frame(n, header, ZMQ_SNDMORE) < 0 || send_frame(n, body, 0) < 0) return ST_NOT_FOUND;
    n->bytes_out += header.n + body.n;
    return ST_OK;
}

uint64_t net_bytes_in(const struct net *n) { return n->bytes_in; }
uint64_t net_bytes_out(const struct net *n) { return n->bytes_out; }
