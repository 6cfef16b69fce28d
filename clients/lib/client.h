/* client: talk to a moed daemon. One `struct client` is one session over one DEALER socket; it sends
 * requests and hands back the server's messages one at a time, in order. Credit, Ping and the handshake
 * are handled here and never seen.
 *
 * Link with `pkg-config --cflags --libs moed-client`. Not thread-safe: one thread per client. No
 * function blocks longer than the timeout it is given. */
#ifndef MOED_CLIENTS_LIB_CLIENT_H
#define MOED_CLIENTS_LIB_CLIENT_H

#include "proto/base.h"
#include "proto/wire.h"

struct client;

struct client_options {
    const char *endpoint; /* "ipc:///run/moed/moed.sock"; NULL = client_default_endpoint() */
    const char *name;     /* for the server's log; NULL = "client" */
    int timeout_ms;       /* for connecting and the handshake; 0 = 5000 */
};

/* $MOED_ENDPOINT, else ipc://$XDG_RUNTIME_DIR/moed.sock, else ipc:///tmp/moed-<uid>.sock. The daemon
 * uses the same rule, so that both meet without a flag. Returns dst. */
const char *client_default_endpoint(char *dst, size_t cap);

/* Connect and shake hands. ST_TIMEOUT: nobody answered (is the daemon running?); ST_UNSUPPORTED: no
 * common protocol version; ST_INVALID: endpoint; ST_IO; ST_CORRUPT: not the protocol. */
enum status client_open(const struct client_options *o, struct error *e, struct client **out);
/* Says Bye, so that the server cancels what is in flight. NULL is fine. */
void client_close(struct client *c);

/* What Welcome said. Bytes are borrowed until client_close. */
const struct wire_welcome *client_welcome(const struct client *c);

/* Send a request; *request_id names it in later messages. Fills boot_id itself. ST_TOO_LARGE: over the
 * frame limit; ST_IO: the server is gone; ST_TIMEOUT: the socket stayed full for the handshake timeout. */
enum status client_submit(struct client *c, const struct wire_submit *submit, struct error *e,
                          uint64_t *request_id);
/* Ask for a request's end; its Finished{CANCELLED} (or earlier end) still comes by client_next. */
enum status client_cancel(struct client *c, uint64_t request_id);

/* The next message about a request: Accepted, Rejected, TokenChunk, Finished, Failed. *out points into
 * the client's memory and is valid until the next call on c. ST_TIMEOUT: none within timeout_ms (0 =
 * only look, -1 = wait for ever). ST_IO: the server is gone (Goodbye, disconnect, or no Pong): every open
 * request is lost, and no later call succeeds. ST_CORRUPT: it sent what is not the protocol, and
 * the session is over too. */
enum status client_next(struct client *c, int timeout_ms, struct error *e, struct wire_msg *out);

/* A file descriptor that becomes readable when client_next may have something: for poll(2) loops. Always
 * drain with client_next(c, 0, …) until ST_TIMEOUT before polling. */
int client_fd(const struct client *c);

/* Ask a question and wait for its answer (ModelInfo, Health, Stats, Tokenize, Detokenize, Ping):
 * request->type chooses. Messages about requests that arrive meanwhile are kept for client_next. A
 * Failed or Rejected answer becomes its status, with its text in *e. */
enum status client_call(struct client *c, const struct wire_msg *request, int timeout_ms,
                        struct error *e, struct wire_msg *reply);

#endif
