/* wire_decode: protobuf to plain structs, for bodies that nobody vouches for. Three passes:
 * protobuf-c unpacks into a budgeted part of the arena; one walk over the descriptors refuses
 * unknown fields in number and floats that are not finite, wherever they are; then each message's
 * own function checks what wire.h promises of it and copies the values out. Every refusal names
 * its field.
 *
 * protobuf-c 1.4.1 checks the wire form only. It recurses once per level of nesting, which the
 * schema bounds at 4; merges a submessage that comes twice; and amplifies (2 bytes of unknown
 * field cost it more than 80), which the budget bounds. Pure functions, any thread. */
#include "moed.pb-c.h"
#include "proto/wire.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Where one body is decoded to. */
struct decode {
    struct arena arena; /* the budgeted part of the caller's */
    bool exhausted; /* an allocation did not fit */
    void *last, *spare; /* see decode_free */
    struct error *e; /* may be NULL */
};

#define TRY(expr)                                                                                  \
    do {                                                                                           \
        enum status st_ = (expr);                                                                  \
        if (st_ != ST_OK) return st_;                                                              \
    } while (0)

#define BAD(d, ...) error_set((d)->e, ST_INVALID, __VA_ARGS__)

/* protobuf-c lists the fields of a message that has more than 16 in a table of this size first. */
enum { FIELD_TABLE_BYTES = 1024 };

static void *decode_alloc(void *ctx, size_t n) {
    struct decode *d = ctx;
    void *p = n == FIELD_TABLE_BYTES ? d->spare : NULL;
    if (p) d->spare = NULL;
    if (!p) p = arena_alloc(&d->arena, n);
    if (!p) d->exhausted = true;
    if (n == FIELD_TABLE_BYTES) d->last = p;
    return p;
}

/* The caller resets the arena when it is done with the message. Only the table of a finished
 * submessage is used again, for the next one's: a list of 20 top logprobs per token would not fit
 * otherwise. */
static void decode_free(void *ctx, void *p) {
    struct decode *d = ctx;
    if (p && p == d->last) d->spare = p;
}

static enum status too_large(struct decode *d, const char *name) {
    return error_set(d->e, ST_TOO_LARGE,
                     "%s takes more memory than a body of its size may: "
                     "send fewer or packed fields",
                     name);
}

/* Room for n items of an array that *out borrows from the arena. */
#define TAKE_ARRAY(d, name, n, array)                                                              \
    do {                                                                                           \
        (array) = decode_alloc((d), (n) * sizeof *(array));                                        \
        if (!(array)) return too_large((d), (name));                                               \
    } while (0)

/* ---- what holds for every message: few unknown fields, finite floats
 * ---------------------------- */

/* The path to a submessage, as a chain through the walk's stack frames: it becomes text only when
 * there is something to refuse. */
struct path {
    const struct path *up;
    const char *field;
    size_t idx; /* in a repeated field */
    bool repeated;
};

static size_t path_print(const struct path *p, char *dst, size_t cap) {
    size_t n = p->up ? path_print(p->up, dst, cap) : 0;
    const char *dot = p->up ? "." : "";
    int m = p->repeated ? snprintf(dst + n, cap - n, "%s%s[%zu]", dot, p->field, p->idx)
                        : snprintf(dst + n, cap - n, "%s%s", dot, p->field);
    n += (size_t)m;
    return n < cap ? n : cap - 1;
}

static enum status walk(struct decode *d, const ProtobufCMessage *m, const struct path *at,
                        size_t *n_unknown) {
    char text[160];
    *n_unknown += m->n_unknown_fields;
    if (*n_unknown > WIRE_MAX_UNKNOWN_FIELDS) {
        path_print(at, text, sizeof text);
        return BAD(d, "%s has unknown fields: at most %d in a message", text,
                   WIRE_MAX_UNKNOWN_FIELDS);
    }
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        const char *member = (const char *)m + f->offset;
        struct path here = {.up = at, .field = f->name};
        if (f->type == PROTOBUF_C_TYPE_FLOAT || f->type == PROTOBUF_C_TYPE_DOUBLE) {
            double v = f->type == PROTOBUF_C_TYPE_FLOAT
                           ? (double)*(const float *)(const void *)member
                           : *(const double *)(const void *)member;
            if (!isfinite(v)) {
                path_print(&here, text, sizeof text);
                return BAD(d, "%s is not a finite number", text);
            }
        } else if (f->type == PROTOBUF_C_TYPE_MESSAGE && f->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t n = *(const size_t *)(const void *)((const char *)m + f->quantifier_offset);
            ProtobufCMessage *const *items =
                *(ProtobufCMessage *const *const *)(const void *)member;
            here.repeated = true;
            for (here.idx = 0; here.idx < n; here.idx++)
                TRY(walk(d, items[here.idx], &here, n_unknown));
        } else if (f->type == PROTOBUF_C_TYPE_MESSAGE) {
            const ProtobufCMessage *sub = *(ProtobufCMessage *const *)(const void *)member;
            if (sub) TRY(walk(d, sub, &here, n_unknown));
        }
    }
    return ST_OK;
}

/* ---- fields ---------------------------------------------------------------------------------- */

static struct bytes as_bytes(ProtobufCBinaryData b) {
    return (struct bytes){.p = b.data, .n = b.len};
}

/* Text: well-formed UTF-8. */
static enum status take_text(struct decode *d, const char *field, ProtobufCBinaryData b,
                             struct bytes *out) {
    if (!utf8_valid(b.data, b.len)) return BAD(d, "%s is not UTF-8", field);
    *out = as_bytes(b);
    return ST_OK;
}

/* Short text: at most WIRE_MAX_TAG_BYTES. */
static enum status take_tag(struct decode *d, const char *field, ProtobufCBinaryData b,
                            struct bytes *out) {
    if (b.len > WIRE_MAX_TAG_BYTES)
        return BAD(d, "%s has %zu bytes: at most %d", field, b.len, WIRE_MAX_TAG_BYTES);
    return take_text(d, field, b, out);
}

static enum status check_ids(struct decode *d, const char *field, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0)
            return BAD(d, "%s[%zu] is %d: a token id is not negative", field, i, ids[i]);
    return ST_OK;
}

static enum status check_count(struct decode *d, const char *field, size_t n, size_t max) {
    if (n > max) return BAD(d, "%s has %zu items: at most %zu", field, n, max);
    return ST_OK;
}

static enum status check_uint(struct decode *d, const char *field, uint32_t v, uint32_t lo,
                              uint32_t hi) {
    if (v < lo || v > hi) return BAD(d, "%s is %u: must be %u to %u", field, v, lo, hi);
    return ST_OK;
}

static enum status check_float(struct decode *d, const char *field, float v, float lo, float hi) {
    if (!(v >= lo && v <= hi))
        return BAD(d, "%s is %g: must be %g to %g", field, (double)v, (double)lo, (double)hi);
    return ST_OK;
}

/* (0, hi] */
static enum status check_positive(struct decode *d, const char *field, float v, float hi) {
    if (!(v > 0 && v <= hi))
        return BAD(d, "%s is %g: must be above 0 and at most %g", field, (double)v, (double)hi);
    return ST_OK;
}

static enum status take_id(struct decode *d, const char *field, ProtobufCBinaryData b,
                           uint8_t out[WIRE_ID_BYTES]) {
    if (b.len != WIRE_ID_BYTES)
        return BAD(d, "%s has %zu bytes: must be %d", field, b.len, WIRE_ID_BYTES);
    memcpy(out, b.data, WIRE_ID_BYTES);
    return ST_OK;
}

/* Chat messages of `owner`, a message's name. */
static enum status take_chat(struct decode *d, const char *owner, Moed__Wire__ChatMessage **m,
                             size_t n, const struct wire_chat **out) {
    if (n > WIRE_MAX_MESSAGES)
        return BAD(d, "%s.messages has %zu items: at most %d", owner, n, WIRE_MAX_MESSAGES);
    struct wire_chat *chat;
    TAKE_ARRAY(d, owner, n, chat);
    for (size_t i = 0; i < n; i++) {
        if (!utf8_valid(m[i]->role.data, m[i]->role.len))
            return BAD(d, "%s.messages[%zu].role is not UTF-8", owner, i);
        if (!utf8_valid(m[i]->content.data, m[i]->content.len))
            return BAD(d, "%s.messages[%zu].content is not UTF-8", owner, i);
        chat[i] = (struct wire_chat){as_bytes(m[i]->role), as_bytes(m[i]->content)};
    }
    *out = chat;
    return ST_OK;
}

/* ---- messages: *w is zeroed ------------------------------------------------------------------ */

static enum status take_hello(struct decode *d, const Moed__Wire__Hello *m, struct wire_hello *w) {
    w->majors = m->majors;
    w->n_majors = m->n_majors;
    w->features = m->features;
    return take_tag(d, "Hello.client", m->client, &w->client);
}

static enum status take_welcome(struct decode *d, const Moed__Wire__Welcome *m,
                                struct wire_welcome *w) {
    w->major = m->major;
    w->minor = m->minor;
    w->features = m->features;
    TRY(take_id(d, "Welcome.boot_id", m->boot_id, w->boot_id));
    TRY(take_id(d, "Welcome.session", m->session, w->session));
    w->heartbeat_ms = m->heartbeat_ms;
    TRY(take_text(d, "Welcome.model", m->model, &w->model));
    TRY(take_text(d, "Welcome.server", m->server, &w->server));
    const Moed__Wire__Limits *l = m->limits;
    if (l)
        w->limits = (struct wire_limits){
            .max_frame_bytes = l->max_frame_bytes,
            .max_inflight = l->max_inflight,
            .credit_window = l->credit_window,
            .max_context_tokens = l->max_context_tokens,
            .max_stops = l->max_stops,
            .max_choices = l->max_choices,
        };
    return ST_OK;
}

static enum status take_goodbye(struct decode *d, const Moed__Wire__Goodbye *m,
                                struct wire_goodbye *w) {
    TRY(check_uint(d, "Goodbye.code", m->code, 0, ST_COUNT - 1));
    w->code = m->code;
    w->majors = m->majors;
    w->n_majors = m->n_majors;
    return take_text(d, "Goodbye.text", m->text, &w->text);
}

static enum status take_bias(struct decode *d, const Moed__Wire__Sampling *m,
                             struct wire_sampling *w) {
    TRY(check_count(d, "Submit.sampling.bias", m->n_bias, WIRE_MAX_BIASES));
    struct wire_bias *bias;
    TAKE_ARRAY(d, "Submit.sampling.bias", m->n_bias, bias);
    for (size_t i = 0; i < m->n_bias; i++) {
        const Moed__Wire__TokenBias *b = m->bias[i];
        if (b->token < 0)
            return BAD(d, "Submit.sampling.bias[%zu].token is %d: a token id is not negative", i,
                       b->token);
        if (!(fabsf(b->bias) <= 100))
            return BAD(d, "Submit.sampling.bias[%zu].bias is %g: must be -100 to 100", i,
                       (double)b->bias);
        bias[i] = (struct wire_bias){b->token, b->bias};
    }
    w->bias = bias;
    w->n_bias = m->n_bias;
    return ST_OK;
}

static enum status take_sampling(struct decode *d, const Moed__Wire__Sampling *given,
                                 struct wire_sampling *w) {
    Moed__Wire__Sampling defaults = MOED__WIRE__SAMPLING__INIT;
    const Moed__Wire__Sampling *m = given ? given : &defaults;
    TRY(check_float(d, "Submit.sampling.temperature", m->temperature, 0, 100));
    TRY(check_positive(d, "Submit.sampling.top_p", m->top_p, 1));
    TRY(check_float(d, "Submit.sampling.min_p", m->min_p, 0, 1));
    TRY(check_positive(d, "Submit.sampling.repetition_penalty", m->repetition_penalty, 100));
    TRY(check_float(d, "Submit.sampling.presence_penalty", m->presence_penalty, -2, 2));
    TRY(check_float(d, "Submit.sampling.frequency_penalty", m->frequency_penalty, -2, 2));
    TRY(check_uint(d, "Submit.sampling.top_logprobs", m->top_logprobs, 0, WIRE_MAX_TOP_LOGPROBS));
    w->temperature = m->temperature;
    w->top_k = m->top_k;
    w->top_p = m->top_p;
    w->min_p = m->min_p;
    w->repetition_penalty = m->repetition_penalty;
    w->presence_penalty = m->presence_penalty;
    w->frequency_penalty = m->frequency_penalty;
    w->has_seed = m->has_seed;
    w->seed = m->seed;
    w->top_logprobs = m->top_logprobs;
    w->logprobs = m->logprobs || m->top_logprobs > 0;
    return take_bias(d, m, w);
}

static enum status take_stops(struct decode *d, const Moed__Wire__Submit *m,
                              struct wire_submit *w) {
    TRY(check_count(d, "Submit.stop", m->n_stop, WIRE_MAX_STOPS));
    for (size_t i = 0; i < m->n_stop; i++) {
        if (m->stop[i].len == 0) return BAD(d, "Submit.stop[%zu] is empty", i);
        if (m->stop[i].len > WIRE_MAX_STOP_BYTES)
            return BAD(d, "Submit.stop[%zu] has %zu bytes: at most %d", i, m->stop[i].len,
                       WIRE_MAX_STOP_BYTES);
        if (!utf8_valid(m->stop[i].data, m->stop[i].len))
            return BAD(d, "Submit.stop[%zu] is not UTF-8", i);
        w->stop[i] = as_bytes(m->stop[i]);
    }
    w->n_stop = m->n_stop;
    TRY(check_count(d, "Submit.stop_ids", m->n_stop_ids, WIRE_MAX_STOPS));
    TRY(check_ids(d, "Submit.stop_ids", m->stop_ids, m->n_stop_ids));
    for (size_t i = 0; i < m->n_stop_ids; i++) w->stop_ids[i] = m->stop_ids[i];
    w->n_stop_ids = m->n_stop_ids;
    return ST_OK;
}

static enum status take_prompt(struct decode *d, const Moed__Wire__Submit *m,
                               struct wire_submit *w) {
    int n = (m->n_prompt_ids > 0) + (m->prompt_text.len > 0) + (m->n_messages > 0);
    if (n != 1)
        return BAD(d, "Submit has %d of prompt_ids, prompt_text and messages: must be one", n);
    TRY(check_ids(d, "Submit.prompt_ids", m->prompt_ids, m->n_prompt_ids));
    w->prompt_ids = m->prompt_ids;
    w->n_prompt_ids = m->n_prompt_ids;
    TRY(take_text(d, "Submit.prompt_text", m->prompt_text, &w->prompt_text));
    TRY(take_chat(d, "Submit", m->messages, m->n_messages, &w->messages));
    w->n_messages = m->n_messages;
    return ST_OK;
}

static enum status take_submit(struct decode *d, const Moed__Wire__Submit *m,
                               struct wire_submit *w) {
    if (m->boot_id.len != 0 && m->boot_id.len != WIRE_ID_BYTES)
        return BAD(d, "Submit.boot_id has %zu bytes: must be %d or absent", m->boot_id.len,
                   WIRE_ID_BYTES);
    w->boot_id = as_bytes(m->boot_id);
    TRY(take_prompt(d, m, w));
    TRY(take_sampling(d, m->sampling, &w->sampling));
    TRY(take_stops(d, m, w));
    if (m->has_max_tokens && m->max_tokens == 0)
        return BAD(d, "Submit.max_tokens is 0: must be positive or absent");
    if (m->has_max_tokens && m->min_tokens > m->max_tokens)
        return BAD(d, "Submit.min_tokens is %u: more than max_tokens, which is %u", m->min_tokens,
                   m->max_tokens);
    TRY(check_uint(d, "Submit.priority", m->priority, 0, 2));
    TRY(check_uint(d, "Submit.n", m->n, 1, WIRE_MAX_CHOICES));
    TRY(take_tag(d, "Submit.tag", m->tag, &w->tag));
    w->has_max_tokens = m->has_max_tokens;
    w->max_tokens = m->max_tokens;
    w->min_tokens = m->min_tokens;
    w->ignore_eos = m->ignore_eos;
    w->priority = m->priority;
    w->ttl_ms = m->ttl_ms;
    w->n = m->n;
    w->parse_special = m->parse_special;
    return ST_OK;
}

static enum status take_rejected(struct decode *d, const Moed__Wire__Rejected *m,
                                 struct wire_rejected *w) {
    TRY(check_uint(d, "Rejected.code", m->code, ST_OK + 1, ST_COUNT - 1));
    w->code = m->code;
    w->retryable = m->retryable;
    w->retry_after_ms = m->retry_after_ms;
    w->queue_depth = m->queue_depth;
    return take_text(d, "Rejected.text", m->text, &w->text);
}

static enum status take_top(struct decode *d, const Moed__Wire__TokenLogprob *m, size_t idx,
                            struct wire_token_logprob *w) {
    if (m->n_top > WIRE_MAX_TOP_LOGPROBS)
        return BAD(d, "TokenChunk.logprobs[%zu].top has %zu items: at most %d", idx, m->n_top,
                   WIRE_MAX_TOP_LOGPROBS);
    struct wire_top_logprob *top;
    TAKE_ARRAY(d, "TokenChunk.logprobs", m->n_top, top);
    for (size_t i = 0; i < m->n_top; i++) {
        if (m->top[i]->token < 0)
            return BAD(d,
                       "TokenChunk.logprobs[%zu].top[%zu].token is %d: a token id is not negative",
                       idx, i, m->top[i]->token);
        top[i] = (struct wire_top_logprob){m->top[i]->token, m->top[i]->logprob};
    }
    *w = (struct wire_token_logprob){.logprob = m->logprob, .top = top, .n_top = m->n_top};
    return ST_OK;
}

static enum status take_chunk(struct decode *d, const Moed__Wire__TokenChunk *m,
                              struct wire_token_chunk *w) {
    TRY(check_uint(d, "TokenChunk.choice", m->choice, 0, WIRE_MAX_CHOICES - 1));
    TRY(check_ids(d, "TokenChunk.ids", m->ids, m->n_ids));
    TRY(take_text(d, "TokenChunk.text", m->text, &w->text));
    if (m->n_logprobs != 0 && m->n_logprobs != m->n_ids)
        return BAD(d, "TokenChunk.logprobs has %zu items: must be one per id or none",
                   m->n_logprobs);
    struct wire_token_logprob *logprobs;
    TAKE_ARRAY(d, "TokenChunk.logprobs", m->n_logprobs, logprobs);
    for (size_t i = 0; i < m->n_logprobs; i++) TRY(take_top(d, m->logprobs[i], i, &logprobs[i]));
    w->choice = m->choice;
    w->seq = m->seq;
    w->ids = m->ids;
    w->n_ids = m->n_ids;
    w->logprobs = logprobs;
    w->n_logprobs = m->n_logprobs;
    w->session_seq = m->session_seq;
    return ST_OK;
}

static enum status take_choice(struct decode *d, const Moed__Wire__Choice *m, size_t i,
                               struct wire_choice *w) {
    if (m->index >= WIRE_MAX_CHOICES)
        return BAD(d, "Finished.choices[%zu].index is %u: at most %d", i, m->index,
                   WIRE_MAX_CHOICES - 1);
    if (m->reason < REASON_STOP || m->reason > REASON_TIMEOUT)
        return BAD(d, "Finished.choices[%zu].reason is %u: must be %d to %d", i, m->reason,
                   REASON_STOP, REASON_TIMEOUT);
    if (!utf8_valid(m->stop.data, m->stop.len))
        return BAD(d, "Finished.choices[%zu].stop is not UTF-8", i);
    if (m->has_stop_id && m->stop_id < 0)
        return BAD(d, "Finished.choices[%zu].stop_id is %d: a token id is not negative", i,
                   m->stop_id);
    *w = (struct wire_choice){
        .index = m->index,
        .reason = m->reason,
        .completion_tokens = m->completion_tokens,
        .last_seq = m->last_seq,
        .hash = m->hash,
        .stop = as_bytes(m->stop),
        .has_stop_id = m->has_stop_id,
        .stop_id = m->stop_id,
    };
    return ST_OK;
}

static enum status take_finished(struct decode *d, const Moed__Wire__Finished *m,
                                 struct wire_finished *w) {
    TRY(check_count(d, "Finished.choices", m->n_choices, WIRE_MAX_CHOICES));
    struct wire_choice *choices;
    TAKE_ARRAY(d, "Finished.choices", m->n_choices, choices);
    for (size_t i = 0; i < m->n_choices; i++) TRY(take_choice(d, m->choices[i], i, &choices[i]));
    w->choices = choices;
    w->n_choices = m->n_choices;
    w->prompt_tokens = m->prompt_tokens;
    w->cached_tokens = m->cached_tokens;
    w->completion_tokens = m->completion_tokens;
    if (m->timings) {
        w->queue_ms = m->timings->queue;
        w->prefill_ms = m->timings->prefill;
        w->decode_ms = m->timings->decode;
        w->preemptions = m->timings->preemptions;
    }
    return ST_OK;
}

static enum status take_failed(struct decode *d, const Moed__Wire__Failed *m,
                               struct wire_failed *w) {
    TRY(check_uint(d, "Failed.code", m->code, ST_OK + 1, ST_COUNT - 1));
    w->code = m->code;
    w->retryable = m->retryable;
    return take_text(d, "Failed.text", m->text, &w->text);
}

static enum status take_model_info(struct decode *d, const Moed__Wire__ModelInfoResult *m,
                                   struct wire_model_info *w) {
    TRY(take_text(d, "ModelInfoResult.name", m->name, &w->name));
    TRY(take_text(d, "ModelInfoResult.architecture", m->architecture, &w->architecture));
    TRY(take_text(d, "ModelInfoResult.backend", m->backend, &w->backend));
    TRY(take_text(d, "ModelInfoResult.quantization", m->quantization, &w->quantization));
    w->n_layers = m->n_layers;
    w->n_vocab = m->n_vocab;
    w->n_experts = m->n_experts;
    w->n_experts_used = m->n_experts_used;
    w->max_context_tokens = m->max_context_tokens;
    w->weight_bytes = m->weight_bytes;
    w->kv_bytes_per_token = m->kv_bytes_per_token;
    if (m->eos_id < -1)
        return BAD(d, "ModelInfoResult.eos_id is %d: must be a token id or -1", m->eos_id);
    w->eos_id = m->eos_id;
    return ST_OK;
}

static enum status take_health(struct decode *d, const Moed__Wire__HealthResult *m,
                               struct wire_health *w) {
    switch (m->state) {
    case ST_OK:
    case ST_LOADING:
    case ST_DRAINING:
    case ST_ENGINE_LOST: break;
    default:
        return BAD(d, "HealthResult.state is %u: must be OK, LOADING, DRAINING or ENGINE_LOST",
                   m->state);
    }
    w->live = m->live;
    w->ready = m->ready;
    w->state = m->state;
    w->uptime_ms = m->uptime_ms;
    w->last_step_ms = m->last_step_ms;
    return ST_OK;
}

static enum status take_stats(struct decode *d, const Moed__Wire__StatsResult *m,
                              struct wire_stats *w) {
    struct wire_counter *counters;
    TAKE_ARRAY(d, "StatsResult.counters", m->n_counters, counters);
    for (size_t i = 0; i < m->n_counters; i++) {
        const Moed__Wire__Counter *c = m->counters[i];
        if (!utf8_valid(c->name.data, c->name.len))
            return BAD(d, "StatsResult.counters[%zu].name is not UTF-8", i);
        counters[i] = (struct wire_counter){as_bytes(c->name), c->value};
    }
    w->counters = counters;
    w->n_counters = m->n_counters;
    return ST_OK;
}

static enum status take_tokenize(struct decode *d, const Moed__Wire__Tokenize *m,
                                 struct wire_tokenize *w) {
    int n = (m->has_text != 0) + (m->n_messages > 0);
    if (n != 1) return BAD(d, "Tokenize has %d of text and messages: must be one", n);
    TRY(take_text(d, "Tokenize.text", m->text, &w->text));
    TRY(take_chat(d, "Tokenize", m->messages, m->n_messages, &w->messages));
    w->n_messages = m->n_messages;
    w->parse_special = m->parse_special;
    return ST_OK;
}

static enum status take_ids(struct decode *d, const char *field, const int32_t *ids, size_t n,
                            struct wire_ids *w) {
    TRY(check_ids(d, field, ids, n));
    w->ids = ids;
    w->n_ids = n;
    return ST_OK;
}

static enum status take(struct decode *d, const ProtobufCMessage *base, struct wire_msg *out) {
    const void *m = base;
    switch (out->type) {
    case WIRE_HELLO: return take_hello(d, m, &out->hello);
    case WIRE_WELCOME: return take_welcome(d, m, &out->welcome);
    case WIRE_PING: out->ping.nonce = ((const Moed__Wire__Ping *)m)->nonce; return ST_OK;
    case WIRE_PONG: out->ping.nonce = ((const Moed__Wire__Pong *)m)->nonce; return ST_OK;
    case WIRE_GOODBYE: return take_goodbye(d, m, &out->goodbye);
    case WIRE_GOAWAY:
        out->goaway.deadline_ms = ((const Moed__Wire__Goaway *)m)->deadline_ms;
        return ST_OK;
    case WIRE_SUBMIT: return take_submit(d, m, &out->submit);
    case WIRE_ACCEPTED:
        out->accepted.prompt_tokens = ((const Moed__Wire__Accepted *)m)->prompt_tokens;
        out->accepted.queue_depth = ((const Moed__Wire__Accepted *)m)->queue_depth;
        return ST_OK;
    case WIRE_REJECTED: return take_rejected(d, m, &out->rejected);
    case WIRE_TOKEN_CHUNK: return take_chunk(d, m, &out->chunk);
    case WIRE_FINISHED: return take_finished(d, m, &out->finished);
    case WIRE_FAILED: return take_failed(d, m, &out->failed);
    case WIRE_CREDIT:
        out->credit.session_seq = ((const Moed__Wire__Credit *)m)->session_seq;
        return ST_OK;
    case WIRE_MODEL_INFO_RESULT: return take_model_info(d, m, &out->model_info);
    case WIRE_HEALTH_RESULT: return take_health(d, m, &out->health);
    case WIRE_STATS_RESULT: return take_stats(d, m, &out->stats);
    case WIRE_TOKENIZE: return take_tokenize(d, m, &out->tokenize);
    case WIRE_TOKENIZE_RESULT: {
        const Moed__Wire__TokenizeResult *t = m;
        return take_ids(d, "TokenizeResult.ids", t->ids, t->n_ids, &out->ids);
    }
    case WIRE_DETOKENIZE: {
        const Moed__Wire__Detokenize *t = m;
        return take_ids(d, "Detokenize.ids", t->ids, t->n_ids, &out->ids);
    }
    case WIRE_DETOKENIZE_RESULT: /* any bytes: ids may cut a character */
        out->text.text = as_bytes(((const Moed__Wire__DetokenizeResult *)m)->text);
        return ST_OK;
    case WIRE_BYE:
    case WIRE_CANCEL:
    case WIRE_ACK:
    case WIRE_MODEL_INFO:
    case WIRE_HEALTH:
    case WIRE_STATS: return ST_OK;
    }
    CHECK(0 && "every type that has a descriptor is above");
    return ST_INTERNAL;
}

/* NULL for a type that this version does not know. */
static const ProtobufCMessageDescriptor *descriptor_of(uint16_t type) {
    switch (type) {
    case WIRE_HELLO: return &moed__wire__hello__descriptor;
    case WIRE_WELCOME: return &moed__wire__welcome__descriptor;
    case WIRE_PING: return &moed__wire__ping__descriptor;
    case WIRE_PONG: return &moed__wire__pong__descriptor;
    case WIRE_BYE: return &moed__wire__bye__descriptor;
    case WIRE_GOODBYE: return &moed__wire__goodbye__descriptor;
    case WIRE_GOAWAY: return &moed__wire__goaway__descriptor;
    case WIRE_SUBMIT: return &moed__wire__submit__descriptor;
    case WIRE_ACCEPTED: return &moed__wire__accepted__descriptor;
    case WIRE_REJECTED: return &moed__wire__rejected__descriptor;
    case WIRE_TOKEN_CHUNK: return &moed__wire__token_chunk__descriptor;
    case WIRE_FINISHED: return &moed__wire__finished__descriptor;
    case WIRE_FAILED: return &moed__wire__failed__descriptor;
    case WIRE_CANCEL: return &moed__wire__cancel__descriptor;
    case WIRE_ACK: return &moed__wire__ack__descriptor;
    case WIRE_CREDIT: return &moed__wire__credit__descriptor;
    case WIRE_MODEL_INFO: return &moed__wire__model_info__descriptor;
    case WIRE_MODEL_INFO_RESULT: return &moed__wire__model_info_result__descriptor;
    case WIRE_HEALTH: return &moed__wire__health__descriptor;
    case WIRE_HEALTH_RESULT: return &moed__wire__health_result__descriptor;
    case WIRE_STATS: return &moed__wire__stats__descriptor;
    case WIRE_STATS_RESULT: return &moed__wire__stats_result__descriptor;
    case WIRE_TOKENIZE: return &moed__wire__tokenize__descriptor;
    case WIRE_TOKENIZE_RESULT: return &moed__wire__tokenize_result__descriptor;
    case WIRE_DETOKENIZE: return &moed__wire__detokenize__descriptor;
    case WIRE_DETOKENIZE_RESULT: return &moed__wire__detokenize_result__descriptor;
    default: return NULL;
    }
}

/* The part of a that a body of n bytes may use: min(8 n + 256 KiB, 32 MiB) above its mark. */
static struct arena budget(const struct arena *a, size_t n) {
    size_t most = (size_t)32 << 20, end;
    if (n < (most - WIRE_BUDGET_BYTES) / 8) most = 8 * n + WIRE_BUDGET_BYTES;
    struct arena part = *a;
    if (size_add(a->used_bytes, most, &end) && end < part.cap_bytes) part.cap_bytes = end;
    return part;
}

enum status wire_decode(const struct wire_header *h, const void *body, size_t n, struct arena *a,
                        struct error *e, struct wire_msg *out) {
    const ProtobufCMessageDescriptor *desc = descriptor_of(h->type);
    if (!desc) return error_set(e, ST_UNIMPLEMENTED, "message type %d is not known", h->type);
    if (n != h->body_bytes)
        return error_set(e, ST_INVALID, "header's body_bytes is %u: the body has %zu",
                         h->body_bytes, n);
    if (n > WIRE_MAX_BODY_BYTES)
        return error_set(e, ST_TOO_LARGE, "%s has %zu bytes: at most %d", desc->short_name, n,
                         WIRE_MAX_BODY_BYTES);
    struct decode d = {.arena = budget(a, n), .e = e};
    ProtobufCAllocator allocator = {decode_alloc, decode_free, &d};
    const ProtobufCMessage *m = protobuf_c_message_unpack(desc, &allocator, n, body);
    if (!m) {
        if (d.exhausted) return too_large(&d, desc->short_name);
        return error_set(e, ST_INVALID, "%s is not well-formed protobuf", desc->short_name);
    }
    struct path at = {.field = desc->short_name};
    size_t n_unknown = 0;
    TRY(walk(&d, m, &at, &n_unknown));
    struct wire_msg msg;
    memset(&msg, 0, sizeof msg);
    msg.type = (enum wire_type)h->type;
    msg.request_id = h->request_id;
    TRY(take(&d, m, &msg));
    a->used_bytes = d.arena.used_bytes;
    *out = msg;
    return ST_OK;
}
