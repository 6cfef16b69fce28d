/* net: the daemon's one ROUTER socket: its options, its address, the lock that keeps a second
 * daemon off it, messages in and out, and word of peers that went away. Knows frames and routing
 * ids; no sessions.
 *
 * Nothing here blocks but net_wait. One thread: the loop's. */
#ifndef MOED_DAEMON_NET_H
#define MOED_DAEMON_NET_H

#include "proto/base.h"

enum { NET_MAX_ROUTE_BYTES = 255, NET_MAX_FDS = 20 };

struct net;

/* Check the endpoint and lock it for this process. ipc:// paths only: tcp would need encryption and
 * authentication, which are not built. ST_INVALID: not such an endpoint; ST_CONFLICT: another
 * daemon has it; ST_IO. */
enum status net_open(const char *endpoint, struct error *e, struct net **out);
/* Create the sockets and bind. The socket file has mode 0660. ST_IO. */
enum status net_bind(struct net *n, struct error *e);
/* Sends what is queued for up to two seconds, then closes and unlinks. NULL is fine. */
void net_close(struct net *n);
const char *net_endpoint(const struct net *n);

/* Sleep until a message, a disconnect, a readable fd or the timeout (ms, -1 = for ever). May return
 * early. */
void net_wait(struct net *n, const int *fds, int n_fds, int timeout_ms);

struct net_message { /* borrowed until the next net_receive */
    struct bytes route;
    bool three_frames; /* route, header, body; if not, header and body are empty */
    struct bytes header, body;
    int fd; /* the connection it came by, or -1: compare with net_disconnected */
    const char *peer; /* "localhost:uid:gid:pid", or "" */
};
/* False: none is waiting. */
bool net_receive(struct net *n, struct net_message *out);

/* The connection (net_message.fd) of a peer that went away since the last call; false: none. It is
 * a hint: the number may belong to a new connection by now, so ask by sending. */
bool net_disconnected(struct net *n, int *fd);

/* Queue one message. ST_NOT_FOUND: the peer is gone; ST_OVERLOADED: its queue is full, which a peer
 * that keeps to the limits and reads cannot bring about. */
enum status net_send(struct net *n, struct bytes route, struct bytes header, struct bytes body);

uint64_t net_bytes_in(const struct net *n);
uint64_t net_bytes_out(const struct net *n);

#endif
