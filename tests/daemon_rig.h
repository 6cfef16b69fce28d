/* daemon_rig: a daemon in this process for tests: the real loop, text worker and sockets around a
 * fake engine, and clients that send raw frames.
 *
 * The fake's model is a function of what lies in the KV cache: position p of a sequence stores a
 * hash of the one before it and the token, in the block that the step's table names, and the next
 * token is drawn from the last hash and the seed. A wrong table, a block with two owners or a lost
 * position therefore changes the answer; fake_answer says what it must be. */
#ifndef MOED_TESTS_DAEMON_RIG_H
#define MOED_TESTS_DAEMON_RIG_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

#include "daemon/server.h"
#include "proto/wire.h"
#include "tests/support.h"

enum {
    FAKE_SCRIPTS = 16,
    FAKE_NUMERIC = 300, /* a prompt that begins with this id fails at its third token */
    RIG_VOCAB = 8192,
    RIG_MAX_RANKS = 4,
    RIG_EOS = 8189 /* <|im_end|> of the bundled vocabulary */
};

struct fake_script { /* answers for prompts that begin with first_id: these ids, then RIG_EOS */
    int32_t first_id, n;
    int32_t ids[64];
};

struct fake_slot {
    struct moe_sampling sampling;
    int32_t n_known, n_prompt, first_id, last;
};

struct fake_step {
    int32_t n_rows;
    struct moe_row *rows;
};

struct fake {
    struct moe_info info;
    struct fake_slot *slots;
    uint64_t *kv; /* [n_blocks * block_tokens] */
    struct fake_step steps[MOE_MAX_IN_FLIGHT];
    int n_submitted, first, depth;
    struct moe_counters counters;
    struct fake_script scripts[FAKE_SCRIPTS];
    _Atomic int n_scripts;
    /* Set by the test's thread at any time. */
    _Atomic int lose_at_step; /* 0: never */
    _Atomic int step_us; /* how long a step takes */
    _Atomic bool gated; /* steps wait for fake_let */
    sem_t gate;
};

struct rig_options { /* zero: the default in brackets */
    int32_t max_seqs; /* [4] */
    int32_t n_blocks; /* [64] */
    int32_t max_seq_tokens; /* [256] */
    int32_t max_batch_tokens; /* [64] */
    int32_t max_queue; /* [64] */
    int32_t max_queued_tokens; /* [10000] */
    int32_t max_sessions; /* [64] */
    int depth; /* [1] */
    int n_ranks; /* [1] engines, each with the limits above */
    bool lockstep;
    int drain_ms; /* [5000] */
    int stall_ms; /* [30000] */
    int step_ms; /* [any] an engine that takes longer is lost */
};

struct rig {
    struct fake fake; /* of rank 0 */
    struct fake more[RIG_MAX_RANKS - 1]; /* of the others */
    int n_ranks;
    struct text *text;
    struct server *server;
    pthread_t thread;
    enum status result;
    char dir[64], endpoint[96];
};

void rig_start(struct rig *r, const struct rig_options *o);
/* Ask the server to stop and wait; returns what server_run did. Leaves nothing behind. */
enum status rig_stop(struct rig *r);
/* As rig_stop when it stops by itself. */
enum status rig_join(struct rig *r);

void fake_add_script(struct rig *r, int32_t first_id, const int32_t *ids, int32_t n);
/* Make steps of all ranks wait, for fake_let or the end of the gate. */
void fake_gate(struct rig *r);
/* Let n gated steps of rank 0 run. */
void fake_let(struct rig *r, int n);
void fake_ungate(struct rig *r);
/* What the fake answers to a prompt: n tokens. */
void fake_answer(const int32_t *prompt, int32_t n_prompt, uint64_t seed, int32_t *out, int32_t n);
/* Ids of ASCII text, one token per character: scripts with every boundary where the test wants it.
 */
int32_t fake_char(const struct rig *r, char c);

/* ---- clients -------------------------------------------------------------------------------- */

struct peer {
    void *ctx, *sock;
    struct arena arena, scratch;
    uint8_t *body;
    uint8_t boot_id[WIRE_ID_BYTES];
    uint64_t last_session_seq;
    bool auto_credit; /* acknowledge every chunk as it is received */
};

void peer_open(struct peer *p, const struct rig *r); /* connects; says nothing */
void peer_hello(struct peer *p); /* and takes Welcome */
void peer_close(struct peer *p); /* without Bye */
void peer_send(struct peer *p, const struct wire_msg *m);
void peer_send_frames(struct peer *p, const struct bytes *frames, int n);
/* The next message within 5 s; fails the test if none comes. Borrowed until the next call. */
void peer_next(struct peer *p, struct wire_msg *out);
/* Likewise, but false if none comes within timeout_ms. */
bool peer_poll(struct peer *p, int timeout_ms, struct wire_msg *out);
/* The next message must be of that type (TokenChunks before it are skipped if skip_chunks) and
 * about request_id. */
void peer_expect(struct peer *p, enum wire_type type, uint64_t request_id, struct wire_msg *out);
void peer_expect_after_chunks(struct peer *p, enum wire_type type, uint64_t request_id,
                              struct wire_msg *out);
void peer_credit(struct peer *p, uint64_t session_seq);

/* A Submit with neutral values: greedy, prompt of ids, n tokens at most. */
struct wire_msg submit_ids(uint64_t request_id, const int32_t *ids, size_t n, uint32_t max_tokens);
/* A counter of Stats, asked for now; fails the test if there is none of that name. */
double peer_stat(struct peer *p, const char *name);
/* Wait up to 5 s until the counter has the value. */
void peer_wait_stat(struct peer *p, const char *name, double value);

/* One whole answer, put together from its chunks and checked against its Finished: gapless seq,
 * hash, counts. */
struct answer {
    int32_t ids[1024];
    int n_ids;
    char text[8192];
    size_t n_text;
    uint32_t n_chunks;
    uint64_t hash;
};
void answer_chunk(struct answer *a, const struct wire_msg *m);
/* Read the only request in flight to its end: its Accepted was read, its Finished goes to *out. */
void peer_collect(struct peer *p, uint64_t request_id, struct answer *a, struct wire_msg *out);

#endif
