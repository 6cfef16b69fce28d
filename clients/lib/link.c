/* link: see link.h. Never blocks but in link_send (DONTWAIT and poll, up to its timeout),
 * link_wait and, up to linger_ms, link_close. */
#include "clients/lib/link.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
    LINK_HWM = 1000, /* messages each way; the server's credit window is far below */
    /* ZMTP heartbeats see a dead host; the session's Ping sees a hung server. */
    LINK_HEARTBEAT_MS = 2000,
    LINK_HEARTBEAT_TIMEOUT_MS = 6000,
    LINK_RECONNECT_MS = 50 /* while the server is not up yet */
};

static enum status set_int(void *sock, int option, int value) {
    return zmq_setsockopt(sock, option, &value, sizeof value) == 0 ? ST_OK : ST_IO;
}

static enum status set_options(struct link *l) {
    int64_t max_bytes = WIRE_MAX_BODY_BYTES;
    if (zmq_setsockopt(l->sock, ZMQ_MAXMSGSIZE, &max_bytes, sizeof max_bytes) != 0) return ST_IO;
    const int options[][2] = {
        {ZMQ_SNDHWM, LINK_HWM},
        {ZMQ_RCVHWM, LINK_HWM},
        {ZMQ_LINGER, 0},
        {ZMQ_RECONNECT_IVL, LINK_RECONNECT_MS},
        {ZMQ_HEARTBEAT_IVL, LINK_HEARTBEAT_MS},
        {ZMQ_HEARTBEAT_TIMEOUT, LINK_HEARTBEAT_TIMEOUT_MS},
        {ZMQ_HEARTBEAT_TTL, LINK_HEARTBEAT_TIMEOUT_MS},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (set_int(l->sock, options[i][0], options[i][1]) != ST_OK) return ST_IO;
    return ST_OK;
}

/* The monitor tells of a disconnect in milliseconds, where heartbeats would take seconds. */
static enum status open_monitor(struct link *l) {
    char name[64];
    snprintf(name, sizeof name, "inproc://monitor-%p", (void *)l);
    int events = ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_SUCCEEDED;
    if (zmq_socket_monitor(l->sock, name, events) != 0) return ST_IO;
    l->monitor = zmq_socket(l->ctx, ZMQ_PAIR);
    if (!l->monitor) return ST_IO;
    if (set_int(l->monitor, ZMQ_LINGER, 0) != ST_OK) return ST_IO;
    return zmq_connect(l->monitor, name) == 0 ? ST_OK : ST_IO;
}

static enum status epoll_add(struct link *l, int fd) {
    struct epoll_event ev = {.events = EPOLLIN};
    return epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, fd, &ev) == 0 ? ST_OK : ST_IO;
}

static enum status open_fds(struct link *l) {
    int sock_fd, monitor_fd;
    size_t n = sizeof sock_fd;
    if (zmq_getsockopt(l->sock, ZMQ_FD, &sock_fd, &n) != 0) return ST_IO;
    if (zmq_getsockopt(l->monitor, ZMQ_FD, &monitor_fd, &n) != 0) return ST_IO;
    l->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (l->timer_fd < 0 || l->epoll_fd < 0) return ST_IO;
    if (epoll_add(l, sock_fd) != ST_OK || epoll_add(l, monitor_fd) != ST_OK) return ST_IO;
    return epoll_add(l, l->timer_fd);
}

enum status link_open(struct link *l, const char *endpoint, struct error *e) {
    *l = (struct link){.epoll_fd = -1, .timer_fd = -1};
    l->ctx = zmq_ctx_new();
    if (!l->ctx) return error_set(e, ST_NO_MEMORY, "no memory for a ZeroMQ context");
    l->sock = zmq_socket(l->ctx, ZMQ_DEALER);
    if (!l->sock || set_options(l) != ST_OK || open_monitor(l) != ST_OK || open_fds(l) != ST_OK)
        return error_set(e, ST_IO, "cannot make a socket: %s", zmq_strerror(zmq_errno()));
    if (zmq_connect(l->sock, endpoint) != 0) {
        return error_set(e, ST_INVALID,
                         "endpoint '%s': %s (an endpoint looks like ipc:///run/moed/moed.sock)",
                         endpoint, zmq_strerror(zmq_errno()));
    }
    return ST_OK;
}

void link_close(struct link *l, int linger_ms) {
    if (l->epoll_fd >= 0) close(l->epoll_fd);
    if (l->timer_fd >= 0) close(l->timer_fd);
    if (l->sock) {
        zmq_socket_monitor(l->sock, NULL, 0);
        set_int(l->sock, ZMQ_LINGER, linger_ms);
        zmq_close(l->sock);
    }
    if (l->monitor) zmq_close(l->monitor);
    if (l->ctx)
        while (zmq_ctx_term(l->ctx) != 0 && zmq_errno() == EINTR) {
        }
    *l = (struct link){.epoll_fd = -1, .timer_fd = -1};
}

static void arm_timer(struct link *l, uint64_t at_ns) {
    struct itimerspec t = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u),
                                        .tv_nsec = (long)(at_ns % 1000000000u)}};
    timerfd_settime(l->timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
    l->timer_ns = at_ns;
}

/* Monitor messages are [event u16, value u32][address]. */
static void read_monitor(struct link *l) {
    for (;;) {
        uint8_t part[6] = {0};
        int n = zmq_recv(l->monitor, part, sizeof part, ZMQ_DONTWAIT);
        if (n < 0) return;
        uint16_t event;
        memcpy(&event, part, sizeof event);
        if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) l->connected = true;
        /* A server that is not up yet refuses connections; only a loss counts. From now on the
         * fd stays readable, so that a poll loop comes to see it. */
        if (event == ZMQ_EVENT_DISCONNECTED) {
            l->disconnected = true;
            arm_timer(l, 1);
        }
        char address[256];
        zmq_recv(l->monitor, address, sizeof address, ZMQ_DONTWAIT);
    }
}

static enum status try_send(struct link *l, const uint8_t *header, const void *body, size_t n) {
    if (zmq_send(l->sock, header, WIRE_HEADER_BYTES, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0)
        return zmq_errno() == EAGAIN || zmq_errno() == EINTR ? ST_TIMEOUT : ST_IO;
    /* EAGAIN here means that the pipe went away between the two: ZeroMQ took the header back. */
    if (zmq_send(l->sock, body, n, ZMQ_DONTWAIT) < 0)
        return zmq_errno() == EAGAIN ? ST_TIMEOUT : ST_IO;
    return ST_OK;
}

enum status link_send(struct link *l, const struct wire_header *h, const void *body,
                      int timeout_ms) {
    uint8_t header[WIRE_HEADER_BYTES];
    wire_header_encode(h, header);
    uint64_t end_ns = clock_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        read_monitor(l);
        if (l->disconnected) return ST_IO;
        enum status st = try_send(l, header, body, h->body_bytes);
        if (st != ST_TIMEOUT) return st;
        uint64_t now = clock_now_ns();
        if (now >= end_ns) return ST_TIMEOUT;
        zmq_pollitem_t items[] = {{.socket = l->sock, .events = ZMQ_POLLOUT},
                                  {.socket = l->monitor, .events = ZMQ_POLLIN}};
        zmq_poll(items, 2, (long)((end_ns - now) / 1000000u) + 1);
    }
}

/* Read the rest of a message that has more parts than it should. */
static void skip_parts(struct link *l) {
    int more = 1;
    size_t n = sizeof more;
    while (zmq_getsockopt(l->sock, ZMQ_RCVMORE, &more, &n) == 0 && more) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        zmq_msg_recv(&part, l->sock, ZMQ_DONTWAIT);
        zmq_msg_close(&part);
    }
}

static enum status recv_body(struct link *l, zmq_msg_t *header, struct error *e,
                             struct frame *out) {
    enum status st =
        wire_header_decode(zmq_msg_data(header), zmq_msg_size(header), e, &out->header);
    if (st != ST_OK) return st == ST_INVALID ? ST_CORRUPT : st;
    if (!zmq_msg_more(header)) return error_set(e, ST_CORRUPT, "the server sent a header alone");
    zmq_msg_init(&out->body);
    if (zmq_msg_recv(&out->body, l->sock, ZMQ_DONTWAIT) < 0) {
        zmq_msg_close(&out->body);
        return error_set(e, ST_CORRUPT, "the server sent half a message");
    }
    if (zmq_msg_more(&out->body) || zmq_msg_size(&out->body) != out->header.body_bytes) {
        zmq_msg_close(&out->body);
        return error_set(e, ST_CORRUPT,
                         "the server sent a message that its header does not describe");
    }
    return ST_OK;
}

enum status link_recv(struct link *l, struct error *e, struct frame *out) {
    zmq_msg_t header;
    zmq_msg_init(&header);
    bool was_disconnected = l->disconnected;
    int rc = zmq_msg_recv(&header, l->sock, ZMQ_DONTWAIT);
    if (rc < 0 && !was_disconnected) {
        /* The event comes after the last message it follows: look at the socket again. */
        read_monitor(l);
        if (l->disconnected) rc = zmq_msg_recv(&header, l->sock, ZMQ_DONTWAIT);
    }
    enum status st;
    if (rc >= 0) {
        st = recv_body(l, &header, e, out);
        if (st != ST_OK) skip_parts(l);
    } else if (l->disconnected) {
        st = error_set(e, ST_IO, "the server closed the connection: it stopped or was restarted");
    } else {
        st = ST_TIMEOUT;
    }
    zmq_msg_close(&header);
    return st;
}

void link_wait(struct link *l, int timeout_ms) {
    zmq_pollitem_t items[] = {{.socket = l->sock, .events = ZMQ_POLLIN},
                              {.socket = l->monitor, .events = ZMQ_POLLIN}};
    /* Once disconnected the monitor has nothing more to say, and the socket may never be
     * readable. */
    if (!l->disconnected) zmq_poll(items, 2, timeout_ms);
}

void link_set_timer(struct link *l, uint64_t at_ns) {
    if (l->disconnected) return;
    /* One that wakes too early is harmless, and is set again then. */
    if (l->timer_ns > clock_now_ns() && l->timer_ns <= at_ns) return;
    arm_timer(l, at_ns);
}
