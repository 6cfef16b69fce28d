/* link: one DEALER socket to one server, as frames in and frames out. Owns the ZeroMQ context, the
 * socket, its monitor and the file descriptor for poll(2) loops. Knows wire.h's framing and nothing
 * of what the messages mean.
 *
 * A link lives as long as its first connection: once that is gone, what had arrived can still be
 * read and then link_recv says ST_IO for ever. ZeroMQ would reconnect in silence, to a server that
 * may be another process and knows nothing of our session.
 *
 * Private to clients/lib. One thread. */
#ifndef MOED_CLIENTS_LIB_LINK_H
#define MOED_CLIENTS_LIB_LINK_H

#include <zmq.h>

#include "proto/base.h"
#include "proto/wire.h"

struct link {
    void *ctx, *sock, *monitor;
    int epoll_fd; /* readable when the socket, its monitor or the timer has something */
    int timer_fd;
    uint64_t timer_ns; /* when the timer fires; 0 = not set */
    bool connected; /* the ZMTP handshake was done */
    bool disconnected;
};

/* A received message: the checked header and its body, which the receiver closes. */
struct frame {
    struct wire_header header;
    zmq_msg_t body;
};

/* ST_INVALID: not an endpoint; ST_IO or ST_NO_MEMORY: no more sockets. Does not wait for the
 * server. */
enum status link_open(struct link *l, const char *endpoint, struct error *e);
/* Messages not yet sent get linger_ms; a link that failed to open may be closed too. */
void link_close(struct link *l, int linger_ms);

/* Send header and body as one message. ST_TIMEOUT: the socket stayed full; ST_IO: disconnected. */
enum status link_send(struct link *l, const struct wire_header *h, const void *body,
                      int timeout_ms);

/* The next message, without waiting: ST_TIMEOUT when there is none. ST_IO: disconnected, and
 * everything that had arrived was read. ST_CORRUPT, ST_UNSUPPORTED (another major),
 * ST_TOO_LARGE: what came is not a message, and *e says why. */
enum status link_recv(struct link *l, struct error *e, struct frame *out);

/* Wait until link_recv may have something, at most timeout_ms. Signals may end the wait early. */
void link_wait(struct link *l, int timeout_ms);

/* Let epoll_fd become readable at this time, for the session's own deadlines. */
void link_set_timer(struct link *l, uint64_t at_ns);

#endif
