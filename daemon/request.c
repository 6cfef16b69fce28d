/* See request.h. */
#include "daemon/request.h"

#include <stdlib.h>
#include <string.h>

struct requests {
    int32_t max_requests, max_choices, n_used;
    int32_t free_requests, free_choices; /* heads of the free lists */
    struct request *requests;
    struct choice *choices;
    struct arena memory; /* untouched pages cost nothing */
};

enum status requests_create(int32_t max_requests, int32_t max_choices, struct requests **out) {
    CHECK(max_requests > 0 && max_choices > 0);
    struct requests *t = calloc(1, sizeof *t);
    if (!t) return ST_NO_MEMORY;
    size_t n_requests = (size_t)max_requests, n_choices = (size_t)max_choices;
    size_t cap = n_requests * sizeof(struct request) + n_choices * sizeof(struct choice) +
                 n_choices * sizeof(struct pending) + 64;
    if (arena_create(cap, &t->memory) != ST_OK) {
        free(t);
        return ST_NO_MEMORY;
    }
    t->max_requests = max_requests;
    t->max_choices = max_choices;
    t->requests = arena_alloc(&t->memory, n_requests * sizeof(struct request));
    t->choices = arena_alloc(&t->memory, n_choices * sizeof(struct choice));
    struct pending *pending = arena_alloc(&t->memory, n_choices * sizeof(struct pending));
    CHECK(t->requests && t->choices && pending);
    for (int32_t i = 0; i < max_requests; i++)
        t->requests[i] = (struct request){.next_free = i + 1 < max_requests ? i + 1 : -1};
    for (int32_t i = 0; i < max_choices; i++)
        t->choices[i] = (struct choice){
            .request = -1, .pending = &pending[i], .next_free = i + 1 < max_choices ? i + 1 : -1};
    *out = t;
    return ST_OK;
}

void requests_destroy(struct requests *t) {
    if (!t) return;
    arena_destroy(&t->memory);
    free(t);
}

int32_t requests_count(const struct requests *t) { return t->n_used; }
int32_t requests_cap(const struct requests *t) { return t->max_requests; }
uint64_t requests_bytes(const struct requests *t) { return t->memory.cap_bytes; }

struct request *request_at(struct requests *t, int32_t idx) {
    CHECK(idx >= 0 && idx < t->max_requests);
    return &t->requests[idx];
}

int32_t request_idx(const struct requests *t, const struct request *r) {
    return (int32_t)(r - t->requests);
}

struct request *request_get(struct requests *t, int32_t idx, uint32_t generation) {
    struct request *r = request_at(t, idx);
    return r->state != REQUEST_FREE && r->generation == generation ? r : NULL;
}

struct choice *choice_at(struct requests *t, int32_t idx) {
    CHECK(idx >= 0 && idx < t->max_choices);
    return &t->choices[idx];
}

int32_t choice_idx(const struct requests *t, const struct choice *c) {
    return (int32_t)(c - t->choices);
}

struct request *request_new(struct requests *t) {
    if (t->free_requests < 0) return NULL;
    struct request *r = &t->requests[t->free_requests];
    CHECK(r->state == REQUEST_FREE);
    t->free_requests = r->next_free;
    *r = (struct request){.state = REQUEST_TOKENIZING, .generation = r->generation + 1};
    t->n_used++;
    return r;
}

void request_free(struct requests *t, struct request *r) {
    CHECK(r->state != REQUEST_FREE && r->n_open == 0);
    for (int32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = choice_at(t, r->choices[i]);
        CHECK(!c->open);
        c->request = -1;
        c->next_free = t->free_choices;
        t->free_choices = r->choices[i];
    }
    r->state = REQUEST_FREE;
    r->next_free = t->free_requests;
    t->free_requests = request_idx(t, r);
    t->n_used--;
}

struct choice *choice_new(struct requests *t, struct request *r) {
    if (t->free_choices < 0) return NULL;
    struct choice *c = &t->choices[t->free_choices];
    CHECK(c->request == -1 && r->n_choices < WIRE_MAX_CHOICES);
    int32_t idx = t->free_choices;
    t->free_choices = c->next_free;
    *c = (struct choice){.request = request_idx(t, r),
                         .index = (uint32_t)r->n_choices,
                         .hash = WIRE_HASH_START,
                         .stop = -1,
                         .stop_id = -1,
                         .pending = c->pending};
    r->choices[r->n_choices++] = idx;
    return c;
}

/* ---- tokens --------------------------------------------------------------------------------- */

static void append_text(struct choice *c, const void *text, size_t n) {
    CHECK(c->n_text_bytes + n <= PENDING_TEXT_BYTES);
    if (n > 0) memcpy(c->pending->text + c->n_text_bytes, text, n);
    c->n_text_bytes += (uint32_t)n;
}

static void append_id(struct choice *c, const struct request *r, const struct moe_row *row) {
    CHECK(c->n_ids < PENDING_MAX_IDS);
    struct pending *p = c->pending;
    p->ids[c->n_ids] = row->token;
    if (r->sampling.logprobs) {
        int32_t n_top = r->sampling.n_top;
        struct wire_top_logprob *tops = p->tops + (size_t)c->n_ids * (size_t)n_top;
        p->logprobs[c->n_ids] = row->logprob;
        for (int32_t i = 0; i < n_top; i++) {
            /* A vocabulary smaller than n_top leaves a shorter list: repeat nothing, say token -1.
             */
            bool have = i < row->n_top;
            tops[i] = (struct wire_top_logprob){have ? row->top_ids[i] : -1,
                                                have ? row->top_logprobs[i] : 0};
        }
    }
    c->n_ids++;
    c->n_tokens++;
    c->hash = wire_hash_id(c->hash, row->token);
}

static bool is_stop_id(const struct request *r, int32_t token) {
    for (int32_t i = 0; i < r->sampling.n_stop_ids; i++)
        if (r->sampling.stop_ids[i] == token) return true;
    return false;
}

/* Text on its way out; a stop string ends the choice, and what follows it is dropped. */
static void pass_text(struct choice *c, const struct request *r, const char *text, size_t n,
                      bool may_stop) {
    if (!may_stop) {
        append_text(c, text, n);
        return;
    }
    uint8_t out[STOPS_MAX_HELD_BYTES + STOPS_MAX_PIECE_BYTES];
    size_t n_out;
    int match = stops_push(&r->stops, &c->stops, text, n, out, &n_out);
    append_text(c, out, n_out);
    if (match >= 0) {
        c->reason = REASON_STOP;
        c->stop = match;
    }
}

/* The choice is over without a stop string: nothing is held back any longer. */
static void release_text(struct choice *c) {
    uint8_t held[STOPS_MAX_HELD_BYTES];
    char tail[sizeof c->stream.pending * 3];
    append_text(c, held, stops_finish(&c->stops, held));
    append_text(c, tail, text_stream_finish(&c->stream, tail));
}

void choice_token(struct choice *c, struct request *r, const struct text *text,
                  const struct sched_token *token) {
    CHECK(c->open && c->reason == 0);
    const struct moe_row *row = token->row;
    if (is_stop_id(r, row->token)) {
        c->stop_id = row->token;
        choice_end(c, REASON_STOP);
        return;
    }
    append_id(c, r, row);
    char piece[TEXT_STREAM_MAX_BYTES];
    size_t n = text_stream_push(text, &c->stream, row->token, piece);
    pass_text(c, r, piece, n, token->n_sampled >= r->sampling.min_tokens);
    if (c->reason == 0 && token->at_limit) choice_end(c, REASON_LENGTH);
}

void choice_end(struct choice *c, enum wire_reason reason) {
    CHECK(c->open && c->reason == 0);
    release_text(c);
    c->reason = reason;
}

/* ---- pending -------------------------------------------------------------------------------- */

bool choice_full(const struct choice *c, const struct request *r) {
    int32_t n_top = r->sampling.n_top;
    uint32_t max_ids = n_top > 0 ? (uint32_t)(PENDING_MAX_TOPS / n_top) : PENDING_MAX_IDS;
    return c->n_ids >= max_ids || c->n_text_bytes + CHOICE_MAX_ADDED_BYTES > PENDING_TEXT_BYTES;
}

size_t choice_pending_bytes(const struct choice *c, const struct request *r) {
    size_t per_id = sizeof(int32_t);
    if (r->sampling.logprobs)
        per_id += sizeof(float) + (size_t)r->sampling.n_top * sizeof(struct wire_top_logprob);
    return c->n_ids * per_id + c->n_text_bytes;
}

void choice_chunk(const struct choice *c, const struct request *r,
                  struct wire_token_logprob *logprobs, struct wire_token_chunk *out) {
    const struct pending *p = c->pending;
    *out = (struct wire_token_chunk){
        .choice = c->index, .ids = p->ids, .n_ids = c->n_ids, .text = {p->text, c->n_text_bytes}};
    if (!r->sampling.logprobs) return;
    size_t n_top = (size_t)r->sampling.n_top;
    for (uint32_t i = 0; i < c->n_ids; i++) {
        const struct wire_top_logprob *tops = p->tops + i * n_top;
        size_t n = 0;
        while (n < n_top && tops[n].token >= 0) n++;
        logprobs[i] = (struct wire_token_logprob){p->logprobs[i], tops, n};
    }
    out->logprobs = logprobs;
    out->n_logprobs = c->n_ids;
}
