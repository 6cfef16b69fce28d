/* See textwork.h. The loop's thread owns `head` and `tail` of the byte ring; the worker only reads
 * bytes that a job names, and a job's bytes are given back when its result is popped. */
#include "daemon/textwork.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/ring.h"

enum {
    MAX_JOBS = 4096,
    N_OUTPUTS = 4, /* results that may wait for the loop before the worker does */
    OUTPUT_BYTES = TEXTWORK_MAX_IDS * 4
};
_Static_assert((int)OUTPUT_BYTES >= (int)TEXTWORK_MAX_TEXT_BYTES, "an output holds ids or text");

struct job_item {
    enum text_job_kind kind;
    struct text_ticket ticket;
    bool parse_special;
    const uint8_t *input;
    size_t n_bytes; /* text or ids; for a chat: lengths, then roles and contents */
    size_t n_messages;
    size_t max_ids;
    uint64_t end; /* byte ring position to free up to */
};

struct result_item {
    struct text_result result;
    uint64_t end;
};

struct textwork {
    const struct text *text;
    pthread_t thread;
    bool started;
    _Atomic bool stop;
    struct ring jobs, results;
    struct arena input; /* the byte ring */
    struct arena outputs; /* [N_OUTPUTS][OUTPUT_BYTES], by index in `results` */
    uint64_t head, tail; /* positions ever given out and taken back */
    struct text_message messages[WIRE_MAX_MESSAGES]; /* the worker's */
};

struct chat_lengths {
    uint32_t role, content;
};

/* ---- the worker's thread -------------------------------------------------------------------- */

static enum status run_chat(struct textwork *w, const struct job_item *job, struct error *e,
                            int32_t *ids, size_t *n_ids) {
    const struct chat_lengths *lengths = (const void *)job->input;
    const uint8_t *p = job->input + job->n_messages * sizeof *lengths;
    for (size_t i = 0; i < job->n_messages; i++) {
        w->messages[i].role = (struct bytes){p, lengths[i].role};
        p += lengths[i].role;
        w->messages[i].content = (struct bytes){p, lengths[i].content};
        p += lengths[i].content;
    }
    return text_chat_encode(w->text, w->messages, job->n_messages, e, ids, job->max_ids, n_ids);
}

static const char *describe(enum status st) {
    switch (st) {
    case ST_TOO_LONG: return "the text has more tokens than fit";
    case ST_TOO_LARGE: return "the text would not fit a frame";
    case ST_INVALID: return "the text is not valid UTF-8";
    default: return "the text could not be converted";
    }
}

static void run_job(struct textwork *w, const struct job_item *job, uint8_t *output,
                    struct text_result *r) {
    int32_t *ids = (int32_t *)(void *)output;
    size_t n = 0;
    enum status st = ST_OK;
    *r = (struct text_result){.kind = job->kind, .ticket = job->ticket};
    switch (job->kind) {
    case TEXT_JOB_TEXT:
        st = text_encode(w->text, job->input, job->n_bytes, job->parse_special, ids, job->max_ids,
                         &n);
        break;
    case TEXT_JOB_CHAT: st = run_chat(w, job, &r->error, ids, &n); break;
    case TEXT_JOB_DETOKENIZE:
        st = text_decode(w->text, (const int32_t *)(const void *)job->input,
                         job->n_bytes / sizeof(int32_t), false, true, (char *)output,
                         TEXTWORK_MAX_TEXT_BYTES, &n);
        break;
    }
    if (st != ST_OK) {
        if (r->error.text[0] == '\0') error_set(&r->error, st, "%s", describe(st));
        r->error.code = st;
    } else if (job->kind == TEXT_JOB_DETOKENIZE) {
        r->text = (struct bytes){output, n};
    } else {
        r->ids = ids;
        r->n_ids = n;
    }
}

static void *worker_main(void *ctx) {
    struct textwork *w = ctx;
    while (!atomic_load(&w->stop)) {
        const struct job_item *job = ring_peek(&w->jobs);
        if (!job || ring_full(&w->results)) { /* textwork_pop wakes us too */
            ring_sleep(&w->jobs);
            continue;
        }
        uint8_t *output = w->outputs.base + (size_t)ring_next_idx(&w->results) * OUTPUT_BYTES;
        struct result_item item = {.end = job->end};
        run_job(w, job, output, &item.result);
        ring_pop(&w->jobs);
        CHECK(ring_push(&w->results, &item));
    }
    return NULL;
}

/* ---- the loop's thread ---------------------------------------------------------------------- */

enum status textwork_create(const struct text *text, size_t budget_bytes, struct textwork **out) {
    struct textwork *w = calloc(1, sizeof *w);
    if (!w) return ST_NO_MEMORY;
    w->text = text;
    enum status st = ring_create(MAX_JOBS, sizeof(struct job_item), &w->jobs);
    if (st == ST_OK) st = ring_create(N_OUTPUTS, sizeof(struct result_item), &w->results);
    if (st == ST_OK) st = arena_create(budget_bytes, &w->input);
    if (st == ST_OK) st = arena_create((size_t)N_OUTPUTS * OUTPUT_BYTES, &w->outputs);
    if (st == ST_OK) {
        w->started = pthread_create(&w->thread, NULL, worker_main, w) == 0;
        if (!w->started) st = ST_NO_MEMORY;
    }
    if (st != ST_OK) {
        textwork_destroy(w);
        return st;
    }
    *out = w;
    return ST_OK;
}

void textwork_destroy(struct textwork *w) {
    if (!w) return;
    if (w->started) {
        atomic_store(&w->stop, true);
        ring_wake(&w->jobs);
        pthread_join(w->thread, NULL);
    }
    ring_destroy(&w->jobs);
    ring_destroy(&w->results);
    arena_destroy(&w->input);
    arena_destroy(&w->outputs);
    free(w);
}

/* n contiguous bytes of the byte ring, or NULL. *end is where the ring's head then stands. */
static uint8_t *input_reserve(struct textwork *w, size_t n, uint64_t *end) {
    size_t cap = w->input.cap_bytes;
    n = (n + 15) & ~(size_t)15; /* lengths and ids stay aligned */
    if (n > cap) return NULL;
    size_t at = (size_t)(w->head % cap);
    size_t skip = n > cap - at ? cap - at : 0;
    if (w->head + skip + n - w->tail > cap) return NULL;
    *end = w->head + skip + n;
    return w->input.base + (at + skip) % cap;
}

static bool input_size(const struct text_job *job, size_t *n) {
    switch (job->kind) {
    case TEXT_JOB_TEXT: *n = job->text.n; return true;
    case TEXT_JOB_DETOKENIZE: return size_mul(job->n_ids, sizeof(int32_t), n);
    case TEXT_JOB_CHAT: break;
    }
    CHECK(job->n_messages <= WIRE_MAX_MESSAGES);
    size_t total = job->n_messages * sizeof(struct chat_lengths);
    for (size_t i = 0; i < job->n_messages; i++) {
        if (!size_add(total, job->messages[i].role.n, &total)) return false;
        if (!size_add(total, job->messages[i].content.n, &total)) return false;
    }
    *n = total;
    return true;
}

static uint8_t *put(uint8_t *p, const void *src, size_t n) {
    if (n > 0) memcpy(p, src, n);
    return p + n;
}

static void input_copy(const struct text_job *job, uint8_t *p) {
    switch (job->kind) {
    case TEXT_JOB_TEXT: put(p, job->text.p, job->text.n); return;
    case TEXT_JOB_DETOKENIZE: put(p, job->ids, job->n_ids * sizeof(int32_t)); return;
    case TEXT_JOB_CHAT: break;
    }
    for (size_t i = 0; i < job->n_messages; i++) {
        struct chat_lengths l = {(uint32_t)job->messages[i].role.n,
                                 (uint32_t)job->messages[i].content.n};
        p = put(p, &l, sizeof l);
    }
    for (size_t i = 0; i < job->n_messages; i++) {
        p = put(p, job->messages[i].role.p, job->messages[i].role.n);
        p = put(p, job->messages[i].content.p, job->messages[i].content.n);
    }
}

enum status textwork_submit(struct textwork *w, const struct text_job *job) {
    CHECK(job->max_ids <= TEXTWORK_MAX_IDS);
    struct job_item item = {.kind = job->kind,
                            .ticket = job->ticket,
                            .parse_special = job->parse_special,
                            .n_messages = job->n_messages,
                            .max_ids = job->max_ids};
    if (!input_size(job, &item.n_bytes) || ring_full(&w->jobs)) return ST_OVERLOADED;
    uint8_t *p = input_reserve(w, item.n_bytes, &item.end);
    if (!p) return ST_OVERLOADED;
    input_copy(job, p);
    item.input = p;
    w->head = item.end;
    CHECK(ring_push(&w->jobs, &item));
    return ST_OK;
}

int textwork_fd(const struct textwork *w) { return w->results.fd; }

void textwork_clear(struct textwork *w) { ring_clear(&w->results); }

bool textwork_peek(struct textwork *w, struct text_result *out) {
    const struct result_item *item = ring_peek(&w->results);
    if (!item) return false;
    *out = item->result;
    return true;
}

void textwork_pop(struct textwork *w) {
    const struct result_item *item = ring_peek(&w->results);
    CHECK(item);
    w->tail = item->end;
    ring_pop(&w->results);
    ring_wake(&w->jobs);
}

uint64_t textwork_bytes(const struct textwork *w) {
    return w->input.cap_bytes + w->outputs.cap_bytes;
}
