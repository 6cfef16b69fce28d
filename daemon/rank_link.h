/* rank_link: one TCP connection between the process that serves and one rank of another process. Frames with a
 * fixed header, beats that tell a silent peer from a dead one, and no reconnection: a link that broke stays so.
 *
 * Header, little-endian:  0 magic "MOEL"  4 version u16  6 type u16  8 body_bytes u32  12 reserved u32 (0)
 *
 * Both sides send a beat when they have sent nothing for RANK_LINK_BEAT_NS; a side that hears nothing for
 * RANK_LINK_SILENCE_NS takes its peer for lost. So whoever has a link calls rank_link_next at least every few beats.
 *
 * Plain sockets rather than ZeroMQ: an end of the connection is seen when it comes, there is one peer and one
 * thread, and libzmq cannot be held against strangers on TCP. There is no encryption and no authentication: for
 * trusted networks only.
 *
 * One thread per link. No allocation but in rank_link_create and rank_link_room. */
#ifndef MOED_DAEMON_RANK_LINK_H
#define MOED_DAEMON_RANK_LINK_H

#include "proto/base.h"

enum { RANK_LINK_VERSION = 1, RANK_LINK_HEADER_BYTES = 16, RANK_LINK_MAX_BODY_BYTES = 1 << 30 };
#define RANK_LINK_BEAT_NS UINT64_C(1000000000)
#define RANK_LINK_SILENCE_NS UINT64_C(8000000000)

/* What a frame is; rank_frames.h has the bodies. */
enum rank_link_type {
    RANK_LINK_NONE = 0, /* no frame */
    RANK_LINK_BEAT = 1, /* never seen outside */
    RANK_LINK_HELLO = 2, /* rank: who I am */
    RANK_LINK_WELCOME = 3, /* what you are to be */
    RANK_LINK_REFUSED = 4, /* why you cannot take part; the last frame */
    RANK_LINK_PORT = 5, /* rank: where its peers reach it */
    RANK_LINK_PEERS = 6, /* where it reaches them */
    RANK_LINK_OPENED = 7, /* rank: the model is open */
    RANK_LINK_STEP = 8,
    RANK_LINK_REST = 9, /* no step for now */
    RANK_LINK_RESULT = 10, /* rank: of the oldest step */
    RANK_LINK_LOST = 11, /* rank: why there will be no more; the last frame */
    RANK_LINK_BYE = 12 /* all is done; the last frame */
};

/* ---- sockets: blocking in connect only --------------------------------------------------------- */

/* Listen at "tcp://ADDRESS:PORT"; port 0 takes any. ST_INVALID: not such an address; ST_IO. */
enum status rank_link_listen(const char *address, struct error *e, int *fd);
/* Listen on any port of the address that connection `fd` has on this side. */
enum status rank_link_listen_beside(int fd, struct error *e, int *out, uint16_t *port);
/* The next connection, or -1 if none waits. */
int rank_link_accept(int listener);
/* Connect, trying again for up to wait_ns while nobody listens there. ST_INVALID; ST_IO. */
enum status rank_link_connect(const char *address, uint64_t wait_ns, struct error *e, int *fd);
/* The peer's address, without its port; "?" if it has none. */
void rank_link_peer(int fd, char *dst, size_t cap);

/* Send or receive exactly n bytes by then. ST_IO; ST_TIMEOUT. */
enum status rank_link_write_all(int fd, const void *p, size_t n, uint64_t until_ns);
enum status rank_link_read_all(int fd, void *p, size_t n, uint64_t until_ns);

/* ---- links ------------------------------------------------------------------------------------- */

struct rank_link {
    int fd; /* -1: none */
    char peer[64]; /* for people */
    uint64_t heard_ns, sent_ns;
    uint8_t header[RANK_LINK_HEADER_BYTES];
    size_t n_got; /* bytes of the frame that is coming, header included */
    uint8_t *room; /* [n_room] its body: owned */
    size_t n_room;
    bool whole; /* a frame has come and was not taken yet */
};

struct rank_link_frame {
    enum rank_link_type type;
    const uint8_t *body; /* borrowed until the next rank_link_next */
    size_t n;
};

/* Takes the connected socket in any case. ST_NO_MEMORY. */
enum status rank_link_create(int fd, size_t n_room, struct rank_link *out);
void rank_link_close(struct rank_link *l); /* a zeroed one, or a closed one, is fine */
/* Make room for bodies of n bytes; a longer one is not taken. ST_NO_MEMORY. */
enum status rank_link_room(struct rank_link *l, size_t n);
/* Trade the room that holds the frame taken last for another of the same size. */
uint8_t *rank_link_swap_room(struct rank_link *l, uint8_t *room);

/* Blocks while the peer takes nothing, but no longer than RANK_LINK_SILENCE_NS. ST_ENGINE_LOST, with the reason. */
enum status rank_link_send(struct rank_link *l, enum rank_link_type type, const void *body, size_t n,
                      struct error *e);
/* Send a beat if one is due. ST_ENGINE_LOST. */
enum status rank_link_beat(struct rank_link *l, struct error *e);
/* Wait up to timeout_ms, or less, for a frame: RANK_LINK_NONE if none came. Sends beats. ST_ENGINE_LOST: the
 * connection ended, or was silent for too long; ST_UNSUPPORTED: another version; ST_INVALID: no frame of ours. */
enum status rank_link_next(struct rank_link *l, int timeout_ms, struct error *e, struct rank_link_frame *out);

#endif
