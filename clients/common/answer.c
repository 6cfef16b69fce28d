/* See answer.h. */
#include "clients/common/answer.h"

#include <stdlib.h>
#include <string.h>

void answer_start(struct answer *a, uint32_t n) {
    *a = (struct answer){.n_choices = n};
    for (uint32_t i = 0; i < n; i++) a->choices[i].hash = WIRE_HASH_START;
}

void answer_free(struct answer *a) {
    for (uint32_t i = 0; i < a->n_choices; i++) {
        free(a->choices[i].text);
        free(a->choices[i].ids);
        free(a->choices[i].logprobs);
        free(a->choices[i].top);
    }
    *a = (struct answer){0};
}

/* Make room for n more elements after used; *p and *cap change together. */
static bool grow(void **p, size_t *cap, size_t used, size_t n, size_t size) {
    if (n <= *cap - used) return true;
    size_t want = *cap < 64 ? 64 : *cap * 2;
    if (want < used + n) want = used + n;
    void *q = realloc(*p, want * size);
    if (!q) return false;
    *p = q;
    *cap = want;
    return true;
}

static bool add_logprobs(struct answer_choice *c, const struct wire_token_chunk *k) {
    size_t n_top = k->logprobs[0].n_top;
    if (c->n_ids == 0) c->n_top = n_top;
    if (!grow((void **)&c->logprobs, &c->cap_logprobs, c->n_ids, k->n_ids, sizeof *c->logprobs))
        return false;
    if (!grow((void **)&c->top, &c->cap_top, c->n_ids * c->n_top, k->n_ids * c->n_top,
              sizeof *c->top))
        return false;
    for (size_t i = 0; i < k->n_ids; i++) {
        const struct wire_token_logprob *p = &k->logprobs[i];
        c->logprobs[c->n_ids + i] = p->logprob;
        /* The server sends as many alternatives as were asked for; what differs is cut or left
         * at token -1. */
        for (size_t t = 0; t < c->n_top; t++)
            c->top[(c->n_ids + i) * c->n_top + t] =
                t < p->n_top ? p->top[t] : (struct wire_top_logprob){.token = -1};
    }
    return true;
}

static enum status add_chunk(struct answer *a, const struct wire_token_chunk *k, struct error *e) {
    if (k->choice >= a->n_choices)
        return error_set(e, ST_CORRUPT, "a chunk of choice %u, where %u were asked for", k->choice,
                         a->n_choices);
    struct answer_choice *c = &a->choices[k->choice];
    if (k->seq != c->n_chunks)
        return error_set(e, ST_CORRUPT, "a chunk is missing: number %u came where %u was next",
                         k->seq, c->n_chunks);
    c->n_chunks++;
    if (k->n_ids > 0 && c->n_ids > 0 && (c->logprobs != NULL) != (k->n_logprobs > 0))
        return error_set(e, ST_CORRUPT, "some chunks have log-probabilities and some have none");
    if (k->n_logprobs > 0 && !add_logprobs(c, k)) return error_set(e, ST_NO_MEMORY, "no memory");
    if (!grow((void **)&c->ids, &c->cap_ids, c->n_ids, k->n_ids, sizeof *c->ids) ||
        !grow((void **)&c->text, &c->cap_text, c->n_text, k->text.n + 1, 1))
        return error_set(e, ST_NO_MEMORY, "no memory");
    for (size_t i = 0; i < k->n_ids; i++) {
        c->ids[c->n_ids++] = k->ids[i];
        c->hash = wire_hash_id(c->hash, k->ids[i]);
    }
    if (k->text.n > 0) memcpy(c->text + c->n_text, k->text.p, k->text.n);
    c->n_text += k->text.n;
    c->text[c->n_text] = 0;
    return ST_OK;
}

static enum status check_choice(const struct answer *a, const struct wire_choice *w,
                                struct error *e) {
    if (w->index >= a->n_choices)
        return error_set(e, ST_CORRUPT, "Finished names choice %u of %u", w->index, a->n_choices);
    const struct answer_choice *c = &a->choices[w->index];
    if (c->reason != 0) return error_set(e, ST_CORRUPT, "Finished names choice %u twice", w->index);
    if (w->last_seq != c->n_chunks)
        return error_set(e, ST_CORRUPT, "%u chunks came of choice %u, and %u were sent",
                         c->n_chunks, w->index, w->last_seq);
    if (w->completion_tokens != c->n_ids)
        return error_set(e, ST_CORRUPT, "%zu tokens came of choice %u, and %u were made", c->n_ids,
                         w->index, w->completion_tokens);
    if (w->hash != c->hash)
        return error_set(e, ST_CORRUPT, "the hash of choice %u differs: a token was altered",
                         w->index);
    return ST_OK;
}

static enum status add_finished(struct answer *a, const struct wire_finished *f, struct error *e) {
    if (f->n_choices != a->n_choices)
        return error_set(e, ST_CORRUPT, "Finished has %zu choices, where %u were asked for",
                         f->n_choices, a->n_choices);
    for (size_t i = 0; i < f->n_choices; i++) {
        enum status st = check_choice(a, &f->choices[i], e);
        if (st != ST_OK) return st;
        a->choices[f->choices[i].index].reason = (enum wire_reason)f->choices[i].reason;
    }
    a->prompt_tokens = f->prompt_tokens;
    a->cached_tokens = f->cached_tokens;
    a->completion_tokens = f->completion_tokens;
    a->preemptions = f->preemptions;
    a->queue_ms = f->queue_ms;
    a->prefill_ms = f->prefill_ms;
    a->decode_ms = f->decode_ms;
    return ST_OK;
}

static void set_error(struct answer *a, uint32_t code, struct bytes text, bool retryable) {
    enum status st = code > ST_OK && code < ST_COUNT ? (enum status)code : ST_INTERNAL;
    error_set(&a->error, st, "%.*s", (int)(text.n < 250 ? text.n : 250), (const char *)text.p);
    a->retryable = retryable;
}

enum status answer_add(struct answer *a, const struct wire_msg *m, struct error *e) {
    enum status st = ST_OK;
    if (a->ended)
        return error_set(e, ST_CORRUPT, "a %s came after the request's end",
                         wire_type_name(m->type));
    switch (m->type) {
    case WIRE_ACCEPTED:
        if (a->accepted) return error_set(e, ST_CORRUPT, "the request was accepted twice");
        a->accepted = true;
        a->prompt_tokens = m->accepted.prompt_tokens;
        return ST_OK;
    case WIRE_REJECTED:
        a->ended = a->rejected = true;
        set_error(a, m->rejected.code, m->rejected.text, m->rejected.retryable);
        a->retry_after_ms = m->rejected.retry_after_ms;
        if (a->accepted) return error_set(e, ST_CORRUPT, "the request was rejected after Accepted");
        return ST_OK;
    case WIRE_TOKEN_CHUNK: st = add_chunk(a, &m->chunk, e); break;
    case WIRE_FINISHED:
        a->ended = true;
        st = add_finished(a, &m->finished, e);
        break;
    case WIRE_FAILED:
        a->ended = true;
        set_error(a, m->failed.code, m->failed.text, m->failed.retryable);
        return ST_OK;
    default:
        return error_set(e, ST_CORRUPT, "a %s is not about a request", wire_type_name(m->type));
    }
    if (st == ST_OK && !a->accepted)
        return error_set(e, ST_CORRUPT, "a %s came before Accepted", wire_type_name(m->type));
    return st;
}
