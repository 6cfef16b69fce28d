/* session: the table of clients that have said Hello. A session is found by its routing id, which
 * is an address and not an identity; its token (16 random bytes) is what names it to people.
 *
 * Flow control lives here: every TokenChunk takes the next session_seq, the client acknowledges
 * cumulatively, and while SESSION_WINDOW of them are unacknowledged none is sent. What is produced
 * meanwhile waits with the choices (request.h) and is counted here in pending_bytes; over
 * SESSION_MAX_PENDING_BYTES the session is held: its sequences leave the scheduler's running set
 * until the client has read everything that waits.
 *
 * One thread: the loop's. No allocation after sessions_create. */
#ifndef MOED_DAEMON_SESSION_H
#define MOED_DAEMON_SESSION_H

#include "daemon/net.h"
#include "proto/base.h"
#include "proto/wire.h"

enum {
    SESSION_WINDOW = 128, /* TokenChunks sent and not acknowledged */
    SESSION_MAX_INFLIGHT = 64, /* requests, and as many questions to the text worker */
    SESSION_MAX_PENDING_BYTES = 1 << 20,
    SESSION_PROBES = 6
};

struct session {
    bool used;
    bool gone; /* unreachable or dismissed: nothing is sent any more, the loop clears it away */
    uint32_t generation;
    uint8_t token[WIRE_ID_BYTES];
    uint8_t route[NET_MAX_ROUTE_BYTES];
    uint8_t n_route;
    int fd; /* connection it was last heard on, -1 if unknown */
    int32_t next_in_bucket;
    int32_t requests; /* ring of its requests; -1: none. Chunks go out from here on, in turn */
    int32_t n_requests, n_questions;
    uint64_t sent_seq, acked_seq;
    size_t pending_bytes;
    bool held;
    uint64_t
        progress_ns; /* when it was held, released, or acknowledged something, whichever was last */
    int n_probes; /* still to send: its connection may be gone */
    uint64_t next_probe_ns;
};

struct sessions;

enum status sessions_create(int32_t max_sessions, struct sessions **out);
void sessions_destroy(struct sessions *t);

int32_t sessions_count(const struct sessions *t);
/* Indices below this may be in use: for walking the table with session_at. */
int32_t sessions_end(const struct sessions *t);
struct session *session_at(struct sessions *t, int32_t idx); /* used or not */
int32_t session_idx(const struct sessions *t, const struct session *s);

struct session *session_find(struct sessions *t, struct bytes route); /* NULL: none */
/* The session with that index, unless it was closed since; NULL then. */
struct session *session_get(struct sessions *t, int32_t idx, uint32_t generation);
/* A new session; the route must have none. NULL: the table is full. */
struct session *session_open(struct sessions *t, struct bytes route);
/* CHECK: it has no requests. */
void session_close(struct sessions *t, struct session *s);

static inline bool session_window_open(const struct session *s) {
    return s->sent_seq - s->acked_seq < SESSION_WINDOW;
}
/* Take a Credit. False: it acknowledges what was never sent. */
bool session_credit(struct session *s, uint64_t session_seq, uint64_t now_ns);

/* Its connection may be gone: probe now and a few times soon, because the word of it can come
 * before the socket knows. */
void session_suspect(struct session *s, uint64_t now_ns);
/* A probe was sent. Returns when to send the next; 0: that was the last. */
uint64_t session_probed(struct session *s, uint64_t now_ns);

#endif
