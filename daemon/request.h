/* request: the table of requests and of their choices (one sequence each), and what a choice does
 * with a token: stop ids, detokenizing, stop strings, and the chunk that waits to be sent.
 *
 *     FREE -> TOKENIZING -> RUNNING -> FLUSHING -> FREE
 *        \_______________/                  (prompts given as ids are not tokenized)
 *
 * TOKENIZING: the text worker has the prompt. RUNNING: Accepted was sent and a choice still
 * samples. FLUSHING: all choices are over and text waits for the client to read. Leaving for FREE
 * takes exactly one of: a Rejected (from TOKENIZING only), a Finished, a Failed, or the end of the
 * session; the loop's reply.c is the only place that does it.
 *
 * One thread: the loop's. No allocation after requests_create. */
#ifndef MOED_DAEMON_REQUEST_H
#define MOED_DAEMON_REQUEST_H

#include "daemon/sched.h"
#include "daemon/stops.h"
#include "moe/moe.h"
#include "moe/text.h"
#include "proto/wire.h"

enum {
    PENDING_MAX_IDS = 1024,
    PENDING_MAX_TOPS = 1024, /* so with top logprobs fewer ids fit */
    PENDING_TEXT_BYTES = 16 << 10,
    /* The most text one token, and then the end of its choice, can add: a piece, what the stop
     * strings held back, and the replacement characters of an unfinished one. */
    CHOICE_MAX_ADDED_BYTES = TEXT_STREAM_MAX_BYTES + STOPS_MAX_HELD_BYTES + 64
};

/* What of a choice was not sent yet. */
struct pending {
    int32_t ids[PENDING_MAX_IDS];
    float logprobs[PENDING_MAX_IDS];
    struct wire_top_logprob tops[PENDING_MAX_TOPS]; /* [n_ids][n_top] */
    uint8_t text[PENDING_TEXT_BYTES];
};

struct choice {
    int32_t request; /* owner; -1: free */
    int32_t next_free;
    uint32_t index; /* 0 … n-1 in the request */
    bool open; /* it has a sequence */
    int rank; /* whose scheduler has it */
    struct sched_id seq;
    struct text_stream stream;
    struct stop_state stops;
    uint32_t n_tokens, n_chunks; /* ids kept, chunks sent */
    uint64_t hash;
    enum wire_reason reason; /* 0 while open */
    int stop; /* stop string that matched, or -1 */
    int32_t stop_id; /* stop id that came, or -1 */
    uint32_t n_ids, n_text_bytes; /* pending */
    struct pending *pending; /* its own, for life */
};

enum request_state { REQUEST_FREE, REQUEST_TOKENIZING, REQUEST_RUNNING, REQUEST_FLUSHING };

struct request {
    enum request_state state;
    uint32_t generation;
    int32_t next_free;
    int32_t session, next, prev; /* ring of the session's requests */
    uint64_t request_id;
    uint64_t received_ns, deadline_ns; /* 0: no deadline */
    uint64_t first_scheduled_ns, first_token_ns, last_token_ns, flushing_ns; /* 0: not yet */
    int32_t n_prompt;
    int32_t n; /* choices asked for */
    int32_t n_choices, n_open; /* made, and still sampling */
    int32_t choices[WIRE_MAX_CHOICES];
    int32_t n_preempted;
    enum wire_reason early; /* CANCELLED or TIMEOUT, or 0 */
    uint64_t seed; /* of choice 0 */
    int32_t max_tokens, priority;
    struct moe_sampling sampling; /* stop_ids: all ids that end a choice */
    struct stop_set stops;
    char tag[WIRE_MAX_TAG_BYTES + 1];
};

struct requests;

enum status requests_create(int32_t max_requests, int32_t max_choices, struct requests **out);
void requests_destroy(struct requests *t);

int32_t requests_count(const struct requests *t);
int32_t requests_cap(const struct requests *t);
struct request *request_at(struct requests *t, int32_t idx);
int32_t request_idx(const struct requests *t, const struct request *r);
/* The request with that index, unless it ended since; NULL then. */
struct request *request_get(struct requests *t, int32_t idx, uint32_t generation);
struct choice *choice_at(struct requests *t, int32_t idx);
int32_t choice_idx(const struct requests *t, const struct choice *c);
uint64_t requests_bytes(const struct requests *t);

/* A zeroed request in state TOKENIZING with a new generation; NULL: the table is full. */
struct request *request_new(struct requests *t);
/* Give back the request and its choices. CHECK: none is open. */
void request_free(struct requests *t, struct request *r);
/* The request's next choice; NULL: the table is full. */
struct choice *choice_new(struct requests *t, struct request *r);

/* One sampled token of an open choice: keep it or end on it. Sets reason, and stop or stop_id, when
 * the choice is over; the caller then takes the sequence out. n_sampled and at_limit as in
 * sched_token. */
void choice_token(struct choice *c, struct request *r, const struct text *text,
                  const struct sched_token *token);
/* End an open choice for another reason; what was held back becomes pending. */
void choice_end(struct choice *c, enum wire_reason reason);

static inline bool choice_has_pending(const struct choice *c) {
    return c->n_ids > 0 || c->n_text_bytes > 0;
}
/* Whether one more token might not fit. */
bool choice_full(const struct choice *c, const struct request *r);
size_t choice_pending_bytes(const struct choice *c, const struct request *r);
/* The pending chunk; logprobs: room for PENDING_MAX_IDS. seq and session_seq are left for the
 * caller. */
void choice_chunk(const struct choice *c, const struct request *r,
                  struct wire_token_logprob *logprobs, struct wire_token_chunk *out);
static inline void choice_clear_pending(struct choice *c) { c->n_ids = c->n_text_bytes = 0; }

#endif
