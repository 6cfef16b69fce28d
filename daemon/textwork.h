/* textwork: a thread that tokenizes prompts, renders chats and detokenizes long lists, so that a
 * megabyte of text delays other text and never a running stream.
 *
 * The loop submits jobs (their input is copied into a byte ring of fixed size) and takes results in
 * the same order. No allocation of its own after textwork_create; the tokenizer uses scratch memory
 * while it encodes. */
#ifndef MOED_DAEMON_TEXTWORK_H
#define MOED_DAEMON_TEXTWORK_H

#include "moe/text.h"
#include "proto/base.h"
#include "proto/wire.h"

enum {
    TEXTWORK_MAX_IDS = 1 << 20, /* in one result: fits a frame */
    TEXTWORK_MAX_TEXT_BYTES = WIRE_MAX_BODY_BYTES - 64 /* likewise */
};

struct textwork;

/* Who asked: the worker carries it through unseen. */
struct text_ticket {
    int32_t session, request; /* request -1: a question, not a Submit */
    uint32_t session_generation, request_generation;
    uint64_t request_id;
};

enum text_job_kind { TEXT_JOB_TEXT, TEXT_JOB_CHAT, TEXT_JOB_DETOKENIZE };

struct text_job { /* inputs are borrowed until textwork_submit returns */
    enum text_job_kind kind;
    struct text_ticket ticket;
    struct bytes text; /* TEXT_JOB_TEXT: UTF-8 */
    bool parse_special;
    const struct wire_chat *messages; /* TEXT_JOB_CHAT */
    size_t n_messages; /* <= WIRE_MAX_MESSAGES */
    const int32_t *ids; /* TEXT_JOB_DETOKENIZE */
    size_t n_ids;
    size_t max_ids; /* of the result; <= TEXTWORK_MAX_IDS */
};

struct text_result {
    enum text_job_kind kind;
    struct text_ticket ticket;
    struct error error; /* code ST_OK, or what the text room said */
    const int32_t *ids; /* borrowed until textwork_pop */
    size_t n_ids;
    struct bytes text;
};

/* text is borrowed. budget_bytes: input that may wait. ST_NO_MEMORY, ST_IO. */
enum status textwork_create(const struct text *text, size_t budget_bytes, struct textwork **out);
/* Waits for the job in hand, drops the rest. NULL is fine. */
void textwork_destroy(struct textwork *w);

/* All of these: the loop's thread. ST_OVERLOADED: too many jobs or bytes wait. */
enum status textwork_submit(struct textwork *w, const struct text_job *job);
int textwork_fd(const struct textwork *w); /* readable: textwork_clear, then peek */
void textwork_clear(struct textwork *w);
bool textwork_peek(struct textwork *w, struct text_result *out);
void textwork_pop(struct textwork *w);
uint64_t textwork_bytes(const struct textwork *w); /* reserved at start, for the memory table */

#endif
