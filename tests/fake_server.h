/* fake_server: a server that speaks moed's protocol over a ROUTER socket and computes nothing, for
 * tests of the clients. Its answers are a pure function of the request, and it misbehaves on
 * request.
 *
 * One token is one Unicode character: its id is the code point. A text prompt P, or a chat whose
 * last message is P, is answered by "echo: P"; a P that begins with "!submit" by the Submit's
 * fields as key=value text; a P that begins with "!fail" by Failed. A prompt of ids is answered by
 * max_tokens (default 16) letters, the i-th 'a' + (sum of the prompt + i) % 26. Choice c > 0 has "
 * #c" appended.
 *
 * One thread of its own; fake_start and fake_stop from another. */
#ifndef MOED_TESTS_FAKE_SERVER_H
#define MOED_TESTS_FAKE_SERVER_H

#include "proto/base.h"

enum fake_fault {
    FAKE_NONE,
    FAKE_SILENT, /* takes connections and says nothing */
    FAKE_OTHER_MAJOR, /* answers Hello with Goodbye{UNSUPPORTED, majors 2 and 3} */
    FAKE_OTHER_HEADER, /* answers Hello with a header of major 2 */
    FAKE_DENY, /* answers Hello with Goodbye{DENIED} */
    FAKE_NOT_WELCOME, /* answers Hello with a message that is none */
    FAKE_HANG, /* after `at` chunks: reads and sends nothing more */
    FAKE_DIE, /* after `at` chunks: closes its socket */
    FAKE_GOODBYE, /* after `at` chunks: Goodbye{DRAINING} and nothing more */
    FAKE_BAD_MAGIC, /* chunk `at` has a header that is none */
    FAKE_BAD_BODY, /* chunk `at` has a body that is none */
    FAKE_LONG_BODY, /* chunk `at` has more body than its header says */
    FAKE_ONE_PART, /* chunk `at` is a header alone */
    FAKE_THREE_PARTS, /* chunk `at` has a part too many */
    FAKE_STRANGE_ID, /* chunk `at` is about a request that nobody made */
    FAKE_CLIENT_TYPE, /* chunk `at` comes as a Submit */
    FAKE_GAP, /* chunk `at` is left out */
    FAKE_BAD_HASH, /* every Finished has a wrong hash */
    FAKE_NO_WINDOW, /* chunks are sent whether there is credit or not */
    FAKE_FAIL, /* instead of chunk `at`: Failed{ENGINE_LOST, retryable}, once */
    FAKE_REJECT, /* the first `at` Submits: Rejected{OVERLOADED, retryable} */
    FAKE_UNSTABLE, /* answers to id prompts change with the number of requests seen */
    FAKE_NEW_WELCOME, /* answers Hello with a Welcome of major 2 */
    FAKE_STRAY_PONG, /* sends another Pong before each Pong */
    FAKE_DEAF /* questions (ModelInfo, Stats, …) get no answer */
};

struct fake_options {
    const char *endpoint; /* to bind; NULL = a fresh ipc path */
    uint32_t max_inflight; /* 0 = 8 */
    uint32_t credit_window; /* 0 = 16 */
    uint32_t max_frame_bytes; /* 0 = WIRE_MAX_BODY_BYTES */
    uint32_t heartbeat_ms; /* 0 = 1000 */
    int tokens_per_chunk; /* 0 = 4 */
    int chunk_us; /* pause between rounds of chunks */
    int answer_tokens; /* > 0: every answer is this long */
    enum fake_fault fault;
    int at;
};

struct fake_counts {
    int sessions, submits, rejected, chunks, finished, cancelled, credits, pings, byes,
        bad_boot_ids;
    int max_unacked; /* most chunks without credit in one session */
    int max_running; /* most requests at once in one session */
};

struct fake;

struct fake *fake_start(const struct fake_options *o);
const char *fake_endpoint(const struct fake *f);
/* Stop the thread, close the socket, free; returns what was counted. */
struct fake_counts fake_stop(struct fake *f);
/* Counts so far, while it runs. */
struct fake_counts fake_counts(struct fake *f);

#endif
