/* What wire.h promises of a decoded message, checked by an independent hand: for the mutation test
 * and the fuzzer. Returns NULL, or the promise that does not hold. */
#ifndef MOED_TESTS_WIRE_PROMISES_H
#define MOED_TESTS_WIRE_PROMISES_H

#include <math.h>

#include "proto/wire.h"

static inline bool promise_ids(const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0) return false;
    return true;
}

static inline bool promise_text(struct bytes b) { return utf8_valid(b.p, b.n); }

static inline bool promise_chat(const struct wire_chat *m, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!promise_text(m[i].role) || !promise_text(m[i].content)) return false;
    return n <= WIRE_MAX_MESSAGES;
}

static inline bool promise_range(float v, float lo, float hi) {
    return isfinite(v) && v >= lo && v <= hi;
}

static inline const char *promise_sampling(const struct wire_sampling *s) {
    if (!promise_range(s->temperature, 0, 100)) return "temperature";
    if (!promise_range(s->top_p, 0, 1) || s->top_p == 0) return "top_p";
    if (!promise_range(s->min_p, 0, 1)) return "min_p";
    if (!promise_range(s->repetition_penalty, 0, 100) || s->repetition_penalty == 0)
        return "repetition_penalty";
    if (!promise_range(s->presence_penalty, -2, 2)) return "presence_penalty";
    if (!promise_range(s->frequency_penalty, -2, 2)) return "frequency_penalty";
    if (s->n_bias > WIRE_MAX_BIASES) return "n_bias";
    for (size_t i = 0; i < s->n_bias; i++)
        if (s->bias[i].token < 0 || !promise_range(s->bias[i].bias, -100, 100)) return "bias";
    if (s->top_logprobs > WIRE_MAX_TOP_LOGPROBS) return "top_logprobs";
    if (s->top_logprobs > 0 && !s->logprobs) return "logprobs";
    return NULL;
}

static inline const char *promise_submit(const struct wire_submit *s) {
    if (s->boot_id.n != 0 && s->boot_id.n != WIRE_ID_BYTES) return "boot_id";
    if ((s->n_prompt_ids > 0) + (s->prompt_text.n > 0) + (s->n_messages > 0) != 1) return "prompt";
    if (!promise_ids(s->prompt_ids, s->n_prompt_ids)) return "prompt_ids";
    if (!promise_text(s->prompt_text)) return "prompt_text";
    if (!promise_chat(s->messages, s->n_messages)) return "messages";
    if (s->n_stop > WIRE_MAX_STOPS || s->n_stop_ids > WIRE_MAX_STOPS) return "n_stop";
    for (size_t i = 0; i < s->n_stop; i++)
        if (s->stop[i].n == 0 || s->stop[i].n > WIRE_MAX_STOP_BYTES || !promise_text(s->stop[i]))
            return "stop";
    if (!promise_ids(s->stop_ids, s->n_stop_ids)) return "stop_ids";
    if (s->has_max_tokens && (s->max_tokens == 0 || s->min_tokens > s->max_tokens))
        return "max_tokens";
    if (s->priority > 2) return "priority";
    if (s->n == 0 || s->n > WIRE_MAX_CHOICES) return "n";
    if (s->tag.n > WIRE_MAX_TAG_BYTES || !promise_text(s->tag)) return "tag";
    return promise_sampling(&s->sampling);
}

static inline const char *promise_chunk(const struct wire_token_chunk *c) {
    if (c->choice >= WIRE_MAX_CHOICES) return "choice";
    if (!promise_ids(c->ids, c->n_ids)) return "ids";
    if (!promise_text(c->text)) return "text";
    if (c->n_logprobs != 0 && c->n_logprobs != c->n_ids) return "n_logprobs";
    for (size_t i = 0; i < c->n_logprobs; i++) {
        const struct wire_token_logprob *l = &c->logprobs[i];
        if (!isfinite(l->logprob) || l->n_top > WIRE_MAX_TOP_LOGPROBS) return "logprobs";
        for (size_t k = 0; k < l->n_top; k++)
            if (l->top[k].token < 0 || !isfinite(l->top[k].logprob)) return "top";
    }
    return NULL;
}

static inline const char *promise_finished(const struct wire_finished *f) {
    if (f->n_choices > WIRE_MAX_CHOICES) return "n_choices";
    for (size_t i = 0; i < f->n_choices; i++) {
        const struct wire_choice *c = &f->choices[i];
        if (c->index >= WIRE_MAX_CHOICES || c->reason < REASON_STOP || c->reason > REASON_TIMEOUT ||
            !promise_text(c->stop) || (c->has_stop_id && c->stop_id < 0))
            return "choices";
    }
    return isfinite(f->queue_ms) && isfinite(f->prefill_ms) && isfinite(f->decode_ms) ? NULL
                                                                                      : "timings";
}

static inline const char *wire_broken_promise(const struct wire_msg *m) {
    switch (m->type) {
    case WIRE_HELLO:
        return m->hello.client.n <= WIRE_MAX_TAG_BYTES && promise_text(m->hello.client) ? NULL
                                                                                        : "client";
    case WIRE_SUBMIT: return promise_submit(&m->submit);
    case WIRE_TOKEN_CHUNK: return promise_chunk(&m->chunk);
    case WIRE_FINISHED: return promise_finished(&m->finished);
    case WIRE_GOODBYE: return m->goodbye.code < ST_COUNT ? NULL : "code";
    case WIRE_REJECTED: return m->rejected.code > 0 && m->rejected.code < ST_COUNT ? NULL : "code";
    case WIRE_FAILED: return m->failed.code > 0 && m->failed.code < ST_COUNT ? NULL : "code";
    case WIRE_STATS_RESULT:
        for (size_t i = 0; i < m->stats.n_counters; i++)
            if (!isfinite(m->stats.counters[i].value)) return "counters";
        return NULL;
    case WIRE_TOKENIZE:
        if (m->tokenize.n_messages > 0 && m->tokenize.text.n > 0) return "text";
        return promise_chat(m->tokenize.messages, m->tokenize.n_messages) ? NULL : "messages";
    case WIRE_TOKENIZE_RESULT:
    case WIRE_DETOKENIZE: return promise_ids(m->ids.ids, m->ids.n_ids) ? NULL : "ids";
    default: return NULL;
    }
}

#endif
