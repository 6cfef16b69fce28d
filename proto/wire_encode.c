/* wire_encode: plain structs to protobuf. A tree of protobuf-c structs is built in the scratch
 * arena, borrowing the message's arrays and bytes, and packed from there. A field that equals its
 * default is left out: decoding fills it in. Pure functions, any thread. */
#include "moed.pb-c.h"
#include "proto/wire.h"

#include <string.h>

/* Set an optional scalar, unless it has the value that its absence means. */
#define PUT(m, field, value, absent)                                                               \
    do {                                                                                           \
        (m)->field = (value);                                                                      \
        (m)->has_##field = (m)->field != (absent);                                                 \
    } while (0)

/* Set an optional bytes field, unless it is empty. protobuf-c only reads what it wants writable. */
#define PUT_BYTES(m, field, b)                                                                     \
    do {                                                                                           \
        (m)->field = (ProtobufCBinaryData){.len = (b).n, .data = (uint8_t *)(b).p};                \
        (m)->has_##field = (b).n > 0;                                                              \
    } while (0)

/* One or n message structs in the arena; the caller runs the message's init. */
#define NEW(a, type) ((type *)arena_alloc((a), sizeof(type)))
#define NEW_ARRAY(a, n, type) ((type *)arena_alloc((a), (n) * sizeof(type)))

/* n messages of one type and the pointers that protobuf-c wants to them; false when scratch is
 * full. */
#define NEW_MESSAGES(a, n, items, pointers)                                                        \
    (((items) = arena_alloc((a), (n) * sizeof *(items))) != NULL &&                                \
     ((pointers) = arena_alloc((a), (n) * sizeof *(pointers))) != NULL)

static ProtobufCMessage *put_hello(struct arena *a, const struct wire_hello *w) {
    Moed__Wire__Hello *m = NEW(a, Moed__Wire__Hello);
    if (!m) return NULL;
    moed__wire__hello__init(m);
    m->majors = (uint32_t *)w->majors;
    m->n_majors = w->n_majors;
    PUT(m, features, w->features, 0);
    PUT_BYTES(m, client, w->client);
    return &m->base;
}

static ProtobufCMessage *put_welcome(struct arena *a, const struct wire_welcome *w) {
    Moed__Wire__Welcome *m = NEW(a, Moed__Wire__Welcome);
    Moed__Wire__Limits *l = NEW(a, Moed__Wire__Limits);
    if (!m || !l) return NULL;
    moed__wire__welcome__init(m);
    PUT(m, major, w->major, 0);
    PUT(m, minor, w->minor, 0);
    PUT(m, features, w->features, 0);
    PUT_BYTES(m, boot_id, ((struct bytes){w->boot_id, WIRE_ID_BYTES}));
    PUT_BYTES(m, session, ((struct bytes){w->session, WIRE_ID_BYTES}));
    PUT(m, heartbeat_ms, w->heartbeat_ms, 0);
    PUT_BYTES(m, model, w->model);
    PUT_BYTES(m, server, w->server);
    moed__wire__limits__init(l);
    PUT(l, max_frame_bytes, w->limits.max_frame_bytes, 0);
    PUT(l, max_inflight, w->limits.max_inflight, 0);
    PUT(l, credit_window, w->limits.credit_window, 0);
    PUT(l, max_context_tokens, w->limits.max_context_tokens, 0);
    PUT(l, max_stops, w->limits.max_stops, 0);
    PUT(l, max_choices, w->limits.max_choices, 0);
    m->limits = l;
    return &m->base;
}

static ProtobufCMessage *put_ping(struct arena *a, const struct wire_ping *w) {
    Moed__Wire__Ping *m = NEW(a, Moed__Wire__Ping);
    if (!m) return NULL;
    moed__wire__ping__init(m);
    PUT(m, nonce, w->nonce, 0);
    return &m->base;
}

static ProtobufCMessage *put_pong(struct arena *a, const struct wire_ping *w) {
    Moed__Wire__Pong *m = NEW(a, Moed__Wire__Pong);
    if (!m) return NULL;
    moed__wire__pong__init(m);
    PUT(m, nonce, w->nonce, 0);
    return &m->base;
}

static ProtobufCMessage *put_goaway(struct arena *a, const struct wire_goaway *w) {
    Moed__Wire__Goaway *m = NEW(a, Moed__Wire__Goaway);
    if (!m) return NULL;
    moed__wire__goaway__init(m);
    PUT(m, deadline_ms, w->deadline_ms, 0);
    return &m->base;
}

static ProtobufCMessage *put_goodbye(struct arena *a, const struct wire_goodbye *w) {
    Moed__Wire__Goodbye *m = NEW(a, Moed__Wire__Goodbye);
    if (!m) return NULL;
    moed__wire__goodbye__init(m);
    PUT(m, code, w->code, 0);
    PUT_BYTES(m, text, w->text);
    m->majors = (uint32_t *)w->majors;
    m->n_majors = w->n_majors;
    return &m->base;
}

static bool put_chat(struct arena *a, const struct wire_chat *w, size_t n,
                     Moed__Wire__ChatMessage ***out) {
    Moed__Wire__ChatMessage *items, **pointers;
    if (!NEW_MESSAGES(a, n, items, pointers)) return false;
    for (size_t i = 0; i < n; i++) {
        moed__wire__chat_message__init(&items[i]);
        PUT_BYTES(&items[i], role, w[i].role);
        PUT_BYTES(&items[i], content, w[i].content);
        pointers[i] = &items[i];
    }
    *out = pointers;
    return true;
}

static Moed__Wire__Sampling *put_sampling(struct arena *a, const struct wire_sampling *w) {
    Moed__Wire__Sampling *m = NEW(a, Moed__Wire__Sampling);
    Moed__Wire__TokenBias *items, **pointers;
    if (!m || !NEW_MESSAGES(a, w->n_bias, items, pointers)) return NULL;
    moed__wire__sampling__init(m);
    PUT(m, temperature, w->temperature, 1.0f);
    PUT(m, top_k, w->top_k, 0);
    PUT(m, top_p, w->top_p, 1.0f);
    PUT(m, min_p, w->min_p, 0.0f);
    PUT(m, repetition_penalty, w->repetition_penalty, 1.0f);
    PUT(m, presence_penalty, w->presence_penalty, 0.0f);
    PUT(m, frequency_penalty, w->frequency_penalty, 0.0f);
    for (size_t i = 0; i < w->n_bias; i++) {
        moed__wire__token_bias__init(&items[i]);
        PUT(&items[i], token, w->bias[i].token, 0);
        PUT(&items[i], bias, w->bias[i].bias, 0.0f);
        pointers[i] = &items[i];
    }
    m->bias = pointers;
    m->n_bias = w->n_bias;
    m->seed = w->seed;
    m->has_seed = w->has_seed;
    PUT(m, logprobs, w->logprobs, 0);
    PUT(m, top_logprobs, w->top_logprobs, 0);
    return m;
}

static ProtobufCMessage *put_submit(struct arena *a, const struct wire_submit *w) {
    CHECK(w->n_stop <= WIRE_MAX_STOPS && w->n_stop_ids <= WIRE_MAX_STOPS);
    Moed__Wire__Submit *m = NEW(a, Moed__Wire__Submit);
    ProtobufCBinaryData *stop = NEW_ARRAY(a, w->n_stop, ProtobufCBinaryData);
    if (!m || !stop) return NULL;
    moed__wire__submit__init(m);
    if (!put_chat(a, w->messages, w->n_messages, &m->messages)) return NULL;
    m->n_messages = w->n_messages;
    m->sampling = put_sampling(a, &w->sampling);
    if (!m->sampling) return NULL;
    for (size_t i = 0; i < w->n_stop; i++)
        stop[i] = (ProtobufCBinaryData){.len = w->stop[i].n, .data = (uint8_t *)w->stop[i].p};
    m->stop = stop;
    m->n_stop = w->n_stop;
    PUT_BYTES(m, boot_id, w->boot_id);
    m->prompt_ids = (int32_t *)w->prompt_ids;
    m->n_prompt_ids = w->n_prompt_ids;
    PUT_BYTES(m, prompt_text, w->prompt_text);
    m->stop_ids = (int32_t *)w->stop_ids;
    m->n_stop_ids = w->n_stop_ids;
    m->max_tokens = w->max_tokens;
    m->has_max_tokens = w->has_max_tokens;
    PUT(m, min_tokens, w->min_tokens, 0);
    PUT(m, ignore_eos, w->ignore_eos, 0);
    PUT(m, priority, w->priority, 1);
    PUT(m, ttl_ms, w->ttl_ms, 0);
    PUT(m, n, w->n, 1);
    PUT(m, parse_special, w->parse_special, 1);
    PUT_BYTES(m, tag, w->tag);
    return &m->base;
}

static ProtobufCMessage *put_accepted(struct arena *a, const struct wire_accepted *w) {
    Moed__Wire__Accepted *m = NEW(a, Moed__Wire__Accepted);
    if (!m) return NULL;
    moed__wire__accepted__init(m);
    PUT(m, prompt_tokens, w->prompt_tokens, 0);
    PUT(m, queue_depth, w->queue_depth, 0);
    return &m->base;
}

static ProtobufCMessage *put_rejected(struct arena *a, const struct wire_rejected *w) {
    Moed__Wire__Rejected *m = NEW(a, Moed__Wire__Rejected);
    if (!m) return NULL;
    moed__wire__rejected__init(m);
    PUT(m, code, w->code, 0);
    PUT_BYTES(m, text, w->text);
    PUT(m, retryable, w->retryable, 0);
    PUT(m, retry_after_ms, w->retry_after_ms, 0);
    PUT(m, queue_depth, w->queue_depth, 0);
    return &m->base;
}

static bool put_top(struct arena *a, const struct wire_token_logprob *w,
                    Moed__Wire__TokenLogprob *m) {
    Moed__Wire__TopLogprob *items, **pointers;
    if (!NEW_MESSAGES(a, w->n_top, items, pointers)) return false;
    for (size_t i = 0; i < w->n_top; i++) {
        moed__wire__top_logprob__init(&items[i]);
        PUT(&items[i], token, w->top[i].token, 0);
        PUT(&items[i], logprob, w->top[i].logprob, 0.0f);
        pointers[i] = &items[i];
    }
    m->top = pointers;
    m->n_top = w->n_top;
    return true;
}

static ProtobufCMessage *put_chunk(struct arena *a, const struct wire_token_chunk *w) {
    Moed__Wire__TokenChunk *m = NEW(a, Moed__Wire__TokenChunk);
    Moed__Wire__TokenLogprob *items, **pointers;
    if (!m || !NEW_MESSAGES(a, w->n_logprobs, items, pointers)) return NULL;
    moed__wire__token_chunk__init(m);
    PUT(m, choice, w->choice, 0);
    PUT(m, seq, w->seq, 0);
    m->ids = (int32_t *)w->ids;
    m->n_ids = w->n_ids;
    PUT_BYTES(m, text, w->text);
    for (size_t i = 0; i < w->n_logprobs; i++) {
        moed__wire__token_logprob__init(&items[i]);
        PUT(&items[i], logprob, w->logprobs[i].logprob, 0.0f);
        if (!put_top(a, &w->logprobs[i], &items[i])) return NULL;
        pointers[i] = &items[i];
    }
    m->logprobs = pointers;
    m->n_logprobs = w->n_logprobs;
    PUT(m, session_seq, w->session_seq, 0);
    return &m->base;
}

static void put_choice(const struct wire_choice *w, Moed__Wire__Choice *m) {
    moed__wire__choice__init(m);
    PUT(m, index, w->index, 0);
    PUT(m, reason, w->reason, 0);
    PUT(m, completion_tokens, w->completion_tokens, 0);
    PUT(m, last_seq, w->last_seq, 0);
    PUT(m, hash, w->hash, 0);
    PUT_BYTES(m, stop, w->stop);
    m->stop_id = w->stop_id;
    m->has_stop_id = w->has_stop_id;
}

static ProtobufCMessage *put_finished(struct arena *a, const struct wire_finished *w) {
    Moed__Wire__Finished *m = NEW(a, Moed__Wire__Finished);
    Moed__Wire__Timings *t = NEW(a, Moed__Wire__Timings);
    Moed__Wire__Choice *items, **pointers;
    if (!m || !t || !NEW_MESSAGES(a, w->n_choices, items, pointers)) return NULL;
    moed__wire__finished__init(m);
    for (size_t i = 0; i < w->n_choices; i++) {
        put_choice(&w->choices[i], &items[i]);
        pointers[i] = &items[i];
    }
    m->choices = pointers;
    m->n_choices = w->n_choices;
    PUT(m, prompt_tokens, w->prompt_tokens, 0);
    PUT(m, cached_tokens, w->cached_tokens, 0);
    PUT(m, completion_tokens, w->completion_tokens, 0);
    moed__wire__timings__init(t);
    PUT(t, queue, w->queue_ms, 0.0);
    PUT(t, prefill, w->prefill_ms, 0.0);
    PUT(t, decode, w->decode_ms, 0.0);
    PUT(t, preemptions, w->preemptions, 0);
    m->timings = t;
    return &m->base;
}

static ProtobufCMessage *put_failed(struct arena *a, const struct wire_failed *w) {
    Moed__Wire__Failed *m = NEW(a, Moed__Wire__Failed);
    if (!m) return NULL;
    moed__wire__failed__init(m);
    PUT(m, code, w->code, 0);
    PUT_BYTES(m, text, w->text);
    PUT(m, retryable, w->retryable, 0);
    return &m->base;
}

static ProtobufCMessage *put_credit(struct arena *a, const struct wire_credit *w) {
    Moed__Wire__Credit *m = NEW(a, Moed__Wire__Credit);
    if (!m) return NULL;
    moed__wire__credit__init(m);
    PUT(m, session_seq, w->session_seq, 0);
    return &m->base;
}

static ProtobufCMessage *put_model_info(struct arena *a, const struct wire_model_info *w) {
    Moed__Wire__ModelInfoResult *m = NEW(a, Moed__Wire__ModelInfoResult);
    if (!m) return NULL;
    moed__wire__model_info_result__init(m);
    PUT_BYTES(m, name, w->name);
    PUT_BYTES(m, architecture, w->architecture);
    PUT_BYTES(m, backend, w->backend);
    PUT(m, n_layers, w->n_layers, 0);
    PUT(m, n_vocab, w->n_vocab, 0);
    PUT(m, n_experts, w->n_experts, 0);
    PUT(m, n_experts_used, w->n_experts_used, 0);
    PUT(m, max_context_tokens, w->max_context_tokens, 0);
    PUT(m, weight_bytes, w->weight_bytes, 0);
    PUT(m, kv_bytes_per_token, w->kv_bytes_per_token, 0);
    PUT(m, eos_id, w->eos_id, 0);
    PUT_BYTES(m, quantization, w->quantization);
    return &m->base;
}

static ProtobufCMessage *put_health(struct arena *a, const struct wire_health *w) {
    Moed__Wire__HealthResult *m = NEW(a, Moed__Wire__HealthResult);
    if (!m) return NULL;
    moed__wire__health_result__init(m);
    PUT(m, live, w->live, 0);
    PUT(m, ready, w->ready, 0);
    PUT(m, state, w->state, 0);
    PUT(m, uptime_ms, w->uptime_ms, 0);
    PUT(m, last_step_ms, w->last_step_ms, 0);
    return &m->base;
}

static ProtobufCMessage *put_stats(struct arena *a, const struct wire_stats *w) {
    Moed__Wire__StatsResult *m = NEW(a, Moed__Wire__StatsResult);
    Moed__Wire__Counter *items, **pointers;
    if (!m || !NEW_MESSAGES(a, w->n_counters, items, pointers)) return NULL;
    moed__wire__stats_result__init(m);
    for (size_t i = 0; i < w->n_counters; i++) {
        moed__wire__counter__init(&items[i]);
        PUT_BYTES(&items[i], name, w->counters[i].name);
        PUT(&items[i], value, w->counters[i].value, 0.0);
        pointers[i] = &items[i];
    }
    m->counters = pointers;
    m->n_counters = w->n_counters;
    return &m->base;
}

static ProtobufCMessage *put_tokenize(struct arena *a, const struct wire_tokenize *w) {
    Moed__Wire__Tokenize *m = NEW(a, Moed__Wire__Tokenize);
    if (!m) return NULL;
    moed__wire__tokenize__init(m);
    PUT_BYTES(m, text, w->text);
    m->has_text |= w->n_messages == 0; /* an empty text is a text, and not an absent one */
    if (!put_chat(a, w->messages, w->n_messages, &m->messages)) return NULL;
    m->n_messages = w->n_messages;
    PUT(m, parse_special, w->parse_special, 1);
    return &m->base;
}

static ProtobufCMessage *put_tokenize_result(struct arena *a, const struct wire_ids *w) {
    Moed__Wire__TokenizeResult *m = NEW(a, Moed__Wire__TokenizeResult);
    if (!m) return NULL;
    moed__wire__tokenize_result__init(m);
    m->ids = (int32_t *)w->ids;
    m->n_ids = w->n_ids;
    return &m->base;
}

static ProtobufCMessage *put_detokenize(struct arena *a, const struct wire_ids *w) {
    Moed__Wire__Detokenize *m = NEW(a, Moed__Wire__Detokenize);
    if (!m) return NULL;
    moed__wire__detokenize__init(m);
    m->ids = (int32_t *)w->ids;
    m->n_ids = w->n_ids;
    return &m->base;
}

static ProtobufCMessage *put_detokenize_result(struct arena *a, const struct wire_text *w) {
    Moed__Wire__DetokenizeResult *m = NEW(a, Moed__Wire__DetokenizeResult);
    if (!m) return NULL;
    moed__wire__detokenize_result__init(m);
    PUT_BYTES(m, text, w->text);
    return &m->base;
}

/* The six messages without fields differ in name only: any of them packs to nothing. */
static ProtobufCMessage *put_empty(struct arena *a) {
    Moed__Wire__Ack *m = NEW(a, Moed__Wire__Ack);
    if (!m) return NULL;
    moed__wire__ack__init(m);
    return &m->base;
}

static ProtobufCMessage *put(struct arena *a, const struct wire_msg *msg) {
    switch (msg->type) {
    case WIRE_HELLO: return put_hello(a, &msg->hello);
    case WIRE_WELCOME: return put_welcome(a, &msg->welcome);
    case WIRE_PING: return put_ping(a, &msg->ping);
    case WIRE_PONG: return put_pong(a, &msg->ping);
    case WIRE_GOODBYE: return put_goodbye(a, &msg->goodbye);
    case WIRE_GOAWAY: return put_goaway(a, &msg->goaway);
    case WIRE_SUBMIT: return put_submit(a, &msg->submit);
    case WIRE_ACCEPTED: return put_accepted(a, &msg->accepted);
    case WIRE_REJECTED: return put_rejected(a, &msg->rejected);
    case WIRE_TOKEN_CHUNK: return put_chunk(a, &msg->chunk);
    case WIRE_FINISHED: return put_finished(a, &msg->finished);
    case WIRE_FAILED: return put_failed(a, &msg->failed);
    case WIRE_CREDIT: return put_credit(a, &msg->credit);
    case WIRE_MODEL_INFO_RESULT: return put_model_info(a, &msg->model_info);
    case WIRE_HEALTH_RESULT: return put_health(a, &msg->health);
    case WIRE_STATS_RESULT: return put_stats(a, &msg->stats);
    case WIRE_TOKENIZE: return put_tokenize(a, &msg->tokenize);
    case WIRE_TOKENIZE_RESULT: return put_tokenize_result(a, &msg->ids);
    case WIRE_DETOKENIZE: return put_detokenize(a, &msg->ids);
    case WIRE_DETOKENIZE_RESULT: return put_detokenize_result(a, &msg->text);
    case WIRE_BYE:
    case WIRE_CANCEL:
    case WIRE_ACK:
    case WIRE_MODEL_INFO:
    case WIRE_HEALTH:
    case WIRE_STATS: return put_empty(a);
    }
    CHECK(0 && "a message type of this version");
    return NULL;
}

enum status wire_encode(const struct wire_msg *msg, struct arena *scratch, uint8_t *dst, size_t cap,
                        size_t *len) {
    size_t mark = scratch->used_bytes;
    enum status st = ST_TOO_LARGE;
    *len = 0;
    const ProtobufCMessage *m = put(scratch, msg);
    if (m) {
        *len = protobuf_c_message_get_packed_size(m);
        if (*len <= cap && *len <= WIRE_MAX_BODY_BYTES) {
            protobuf_c_message_pack(m, dst);
            st = ST_OK;
        }
    }
    scratch->used_bytes = mark;
    return st;
}
