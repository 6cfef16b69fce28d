/* session: what the programs do around a client: connect or complain, read files, watch for
 * Ctrl-C, say what an error means. Single thread. */
#ifndef MOED_CLIENTS_COMMON_SESSION_H
#define MOED_CLIENTS_COMMON_SESSION_H

#include "clients/common/args.h"
#include "clients/lib/client.h"

/* Options that every command takes; set defaults, then put ENDPOINT_ARGS(&v) into the table. */
struct endpoint_options {
    const char *endpoint;
    int64_t timeout_ms;
};
#define ENDPOINT_DEFAULTS                                                                          \
    { .endpoint = NULL, .timeout_ms = 5000 }
/* clang-format off */
#define ENDPOINT_ARGS(v) \
    {ARG_SECTION, .help = "Connection"}, \
    {ARG_STRING, "endpoint", 0, "URI", &(v)->endpoint, 0, 0, \
     "the daemon's socket. Default: $MOED_ENDPOINT, else\n" \
     "ipc://$XDG_RUNTIME_DIR/moed.sock, else\n" \
     "ipc:///tmp/moed-<uid>.sock"}, \
    {ARG_INT, "timeout", 0, "MS", &(v)->timeout_ms, 1, 3600000, \
     "for connecting and for answers to questions (5000)"}
/* clang-format on */

/* NULL after a complaint on stderr that begins with `program`. */
struct client *connect_or_complain(const char *program, const struct endpoint_options *o);

/* client_call with the timeout; on failure complains and returns false with *code set
 * (EXIT_CONNECT when the session is lost, EXIT_FAILED otherwise). */
bool ask_or_complain(const char *program, struct client *c, const struct endpoint_options *o,
                     const struct wire_msg *question, struct wire_msg *reply, int *code);

/* The whole of a file ("-" = standard input) as malloc'd bytes, NUL-terminated. NULL after a
 * complaint: it cannot be read, is larger than max_bytes, or is not UTF-8. */
char *read_text_file(const char *program, const char *path, size_t max_bytes, size_t *n);

static inline struct bytes bytes_of(const char *s) {
    struct bytes b = {(const uint8_t *)s, 0};
    while (s[b.n]) b.n++;
    return b;
}

/* From now on SIGINT sets a flag, which interrupted() reads and clears; a blocking read then
 * fails with EINTR. SIGPIPE is ignored from now on: a closed stdout is a write error. */
void catch_interrupt(void);
bool interrupted(void);
/* Until fd can be read or has ended. false: interrupted, were it a moment before the wait, which a read alone would miss. */
bool await_input(int fd);

/* "OVERLOADED: queue full" for people. Returns dst. */
const char *error_line(const struct error *e, char *dst, size_t cap);

/* The HTTP status that a code answers to in OpenAI-style results. */
int http_status(enum status st);

#endif
