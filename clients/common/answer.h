/* answer: put one request's messages together, and hold them to what the protocol promises: chunks
 * numbered without gaps, a hash that matches the ids, one final message. Owns copies of text, ids
 * and log-probabilities.
 *
 * One thread per answer. */
#ifndef MOED_CLIENTS_COMMON_ANSWER_H
#define MOED_CLIENTS_COMMON_ANSWER_H

#include "proto/base.h"
#include "proto/wire.h"

struct answer_choice {
    char *text; /* NUL-terminated for printing; may hold NULs: n_text counts */
    size_t n_text, cap_text;
    int32_t *ids;
    size_t n_ids, cap_ids;
    float *logprobs; /* [n_ids], or NULL: none were sent */
    size_t cap_logprobs;
    struct wire_top_logprob *top; /* [n_ids][n_top] */
    size_t n_top, cap_top;
    uint32_t n_chunks;
    uint64_t hash;
    enum wire_reason reason; /* 0 until finished */
};

struct answer {
    struct answer_choice choices[WIRE_MAX_CHOICES];
    uint32_t n_choices; /* asked for */
    bool accepted, ended;
    /* When ended: ST_OK, or why it was rejected or failed. */
    struct error error;
    bool rejected, retryable;
    uint32_t retry_after_ms;
    uint32_t prompt_tokens, cached_tokens, completion_tokens, preemptions;
    double queue_ms, prefill_ms, decode_ms;
};

/* Ready for the messages of a request for n choices. */
void answer_start(struct answer *a, uint32_t n);
void answer_free(struct answer *a);

/* Take the request's next message (Accepted, Rejected, TokenChunk, Finished, Failed).
 * ST_CORRUPT: it breaks a promise, and *e says which; ST_NO_MEMORY. */
enum status answer_add(struct answer *a, const struct wire_msg *m, struct error *e);

#endif
