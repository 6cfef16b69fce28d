/* See body.h. The fields are OpenAI's (platform.openai.com/docs/api-reference) and, where OpenAI
 * has none, those that other servers use for the same thing: top_k, min_p, repetition_penalty,
 * min_tokens, ignore_eos, stop_token_ids. */
#include "clients/common/body.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct bytes json_bytes(const json_t *s) {
    return (struct bytes){(const uint8_t *)json_string_value(s), json_string_length(s)};
}

/* ---- prompts --------------------------------------------------------------------------------- */

/* Content as a list of {"type":"text","text":…}: one string of the parts. */
static enum status join_parts(const json_t *parts, size_t idx, struct error *e, struct body *b,
                              struct bytes *out) {
    size_t n = 0, i;
    json_t *part;
    json_array_foreach(parts, i, part) {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *text = json_object_get(part, "text");
        if (!type || strcmp(type, "text") != 0 || !json_is_string(text))
            return error_set(e, ST_UNSUPPORTED,
                             "messages[%zu].content[%zu]: only text parts are served", idx, i);
        n += json_string_length(text);
    }
    char *joined = malloc(n + 1);
    if (!joined) return error_set(e, ST_NO_MEMORY, "no memory");
    b->joined[b->n_joined++] = joined;
    *out = (struct bytes){(const uint8_t *)joined, n};
    json_array_foreach(parts, i, part) {
        struct bytes t = json_bytes(json_object_get(part, "text"));
        memcpy(joined, t.p, t.n);
        joined += t.n;
    }
    return ST_OK;
}

static enum status read_message(const json_t *m, size_t idx, struct error *e, struct body *b) {
    const char *key;
    json_t *value;
    if (!json_is_object(m)) return error_set(e, ST_INVALID, "messages[%zu] is not an object", idx);
    json_object_foreach((json_t *)m, key, value) {
        if (strcmp(key, "role") != 0 && strcmp(key, "content") != 0 && !json_is_null(value))
            return error_set(e, ST_UNSUPPORTED, "messages[%zu].%.60s is not served", idx, key);
    }
    const json_t *role = json_object_get(m, "role"), *content = json_object_get(m, "content");
    if (!json_is_string(role))
        return error_set(e, ST_INVALID, "messages[%zu].role must be a string", idx);
    struct wire_chat *out = &b->messages[idx];
    out->role = json_bytes(role);
    if (json_is_array(content)) return join_parts(content, idx, e, b, &out->content);
    if (!json_is_string(content))
        return error_set(e, ST_INVALID, "messages[%zu].content must be a string or a list", idx);
    out->content = json_bytes(content);
    return ST_OK;
}

static enum status read_messages(const json_t *list, struct error *e, struct body *b) {
    size_t n = json_array_size(list);
    if (!json_is_array(list) || n == 0)
        return error_set(e, ST_INVALID, "messages must be a list of at least one message");
    if (n > WIRE_MAX_MESSAGES)
        return error_set(e, ST_TOO_LONG, "messages has %zu entries: at most %d", n,
                         WIRE_MAX_MESSAGES);
    b->messages = calloc(n, sizeof *b->messages);
    b->joined = calloc(n, sizeof *b->joined);
    if (!b->messages || !b->joined) return error_set(e, ST_NO_MEMORY, "no memory");
    b->submit.messages = b->messages;
    b->submit.n_messages = n;
    for (size_t i = 0; i < n; i++) {
        enum status st = read_message(json_array_get(list, i), i, e, b);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static enum status read_id(const json_t *v, const char *name, struct error *e, int32_t *out) {
    json_int_t id = json_integer_value(v);
    if (!json_is_integer(v) || id < 0 || id > INT32_MAX)
        return error_set(e, ST_INVALID, "%s must hold token ids", name);
    *out = (int32_t)id;
    return ST_OK;
}

static enum status read_prompt(const json_t *v, struct error *e, struct body *b) {
    if (json_is_string(v) && json_string_length(v) > 0) {
        b->submit.prompt_text = json_bytes(v);
        return ST_OK;
    }
    size_t n = json_array_size(v);
    if (n == 0)
        return error_set(e, ST_INVALID, "prompt must be a non-empty string or list of token ids");
    if (!json_is_integer(json_array_get(v, 0)))
        return error_set(e, ST_UNSUPPORTED,
                         "prompt: several prompts in one request are not served");
    b->prompt_ids = calloc(n, sizeof *b->prompt_ids);
    if (!b->prompt_ids) return error_set(e, ST_NO_MEMORY, "no memory");
    b->submit.prompt_ids = b->prompt_ids;
    b->submit.n_prompt_ids = n;
    for (size_t i = 0; i < n; i++) {
        enum status st = read_id(json_array_get(v, i), "prompt", e, &b->prompt_ids[i]);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

/* ---- fields ---------------------------------------------------------------------------------- */

static enum status read_real(const json_t *v, const char *name, double lo, double hi,
                             struct error *e, float *out) {
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= lo && x <= hi))
        return error_set(e, ST_INVALID, "%s must be a number from %g to %g", name, lo, hi);
    *out = (float)x;
    return ST_OK;
}

static enum status read_count(const json_t *v, const char *name, uint32_t lo, uint32_t hi,
                              struct error *e, uint32_t *out) {
    json_int_t x = json_integer_value(v);
    if (!json_is_integer(v) || x < (json_int_t)lo || x > (json_int_t)hi)
        return error_set(e, ST_INVALID, "%s must be a whole number from %u to %u", name, lo, hi);
    *out = (uint32_t)x;
    return ST_OK;
}

static enum status read_bool(const json_t *v, const char *name, struct error *e, bool *out) {
    if (!json_is_boolean(v)) return error_set(e, ST_INVALID, "%s must be true or false", name);
    *out = json_is_true(v);
    return ST_OK;
}

static enum status add_stop(const json_t *v, struct error *e, struct wire_submit *s) {
    size_t n = json_string_length(v);
    if (!json_is_string(v) || n == 0 || n > WIRE_MAX_STOP_BYTES)
        return error_set(e, ST_INVALID, "stop must hold strings of 1 to %d bytes",
                         WIRE_MAX_STOP_BYTES);
    if (s->n_stop == WIRE_MAX_STOPS)
        return error_set(e, ST_INVALID, "stop holds more than %d strings", WIRE_MAX_STOPS);
    s->stop[s->n_stop++] = json_bytes(v);
    return ST_OK;
}

static enum status read_stop(const json_t *v, struct error *e, struct wire_submit *s) {
    if (!json_is_array(v)) return add_stop(v, e, s);
    for (size_t i = 0; i < json_array_size(v); i++) {
        enum status st = add_stop(json_array_get(v, i), e, s);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static enum status read_stop_ids(const json_t *v, struct error *e, struct wire_submit *s) {
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n > WIRE_MAX_STOPS)
        return error_set(e, ST_INVALID, "stop_token_ids must be a list of at most %d ids",
                         WIRE_MAX_STOPS);
    for (; s->n_stop_ids < n; s->n_stop_ids++) {
        enum status st = read_id(json_array_get(v, s->n_stop_ids), "stop_token_ids", e,
                                 &s->stop_ids[s->n_stop_ids]);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static enum status read_bias(const json_t *v, struct error *e, struct body *b) {
    size_t n = json_object_size(v);
    const char *key;
    json_t *value;
    if (!json_is_object(v) || n > WIRE_MAX_BIASES)
        return error_set(e, ST_INVALID, "logit_bias must be an object of at most %d entries",
                         WIRE_MAX_BIASES);
    b->bias = calloc(n + 1, sizeof *b->bias);
    if (!b->bias) return error_set(e, ST_NO_MEMORY, "no memory");
    b->submit.sampling.bias = b->bias;
    json_object_foreach((json_t *)v, key, value) {
        char *end;
        long id = strtol(key, &end, 10);
        struct wire_bias *out = &b->bias[b->submit.sampling.n_bias++];
        if (*key == 0 || *end != 0 || id < 0 || id > INT32_MAX)
            return error_set(e, ST_INVALID, "logit_bias: '%.40s' is not a token id", key);
        out->token = (int32_t)id;
        enum status st = read_real(value, "logit_bias", -100, 100, e, &out->bias);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

/* Chat: "logprobs" says whether, "top_logprobs" how many. Completions: "logprobs" is the number. */
static enum status read_logprobs(const json_t *v, struct error *e, struct body *b) {
    struct wire_sampling *s = &b->submit.sampling;
    if (b->chat) return read_bool(v, "logprobs", e, &s->logprobs);
    s->logprobs = true;
    return read_count(v, "logprobs", 0, WIRE_MAX_TOP_LOGPROBS, e, &s->top_logprobs);
}

static enum status read_seed(const json_t *v, struct error *e, struct wire_sampling *s) {
    if (!json_is_integer(v)) return error_set(e, ST_INVALID, "seed must be a whole number");
    s->has_seed = true;
    s->seed = (uint64_t)json_integer_value(v);
    return ST_OK;
}

enum field {
    F_IGNORED, /* changes nothing in the answer */
    F_PROMPT,
    F_TEMPERATURE,
    F_TOP_P,
    F_MIN_P,
    F_TOP_K,
    F_REPETITION,
    F_PRESENCE,
    F_FREQUENCY,
    F_MAX_TOKENS,
    F_MIN_TOKENS,
    F_N,
    F_SEED,
    F_STOP,
    F_STOP_IDS,
    F_BIAS,
    F_LOGPROBS,
    F_TOP_LOGPROBS,
    F_IGNORE_EOS,
    F_MUST_BE_FALSE, /* served in its default form only */
    F_RESPONSE_FORMAT
};

static const struct {
    const char *name;
    enum field field;
} fields[] = {
    {"model", F_IGNORED},
    {"user", F_IGNORED},
    {"metadata", F_IGNORED},
    {"store", F_IGNORED},
    {"service_tier", F_IGNORED},
    {"safety_identifier", F_IGNORED},
    {"prompt_cache_key", F_IGNORED},
    {"messages", F_PROMPT},
    {"prompt", F_PROMPT},
    {"temperature", F_TEMPERATURE},
    {"top_p", F_TOP_P},
    {"min_p", F_MIN_P},
    {"top_k", F_TOP_K},
    {"repetition_penalty", F_REPETITION},
    {"presence_penalty", F_PRESENCE},
    {"frequency_penalty", F_FREQUENCY},
    {"max_tokens", F_MAX_TOKENS},
    {"max_completion_tokens", F_MAX_TOKENS},
    {"min_tokens", F_MIN_TOKENS},
    {"n", F_N},
    {"seed", F_SEED},
    {"stop", F_STOP},
    {"stop_token_ids", F_STOP_IDS},
    {"logit_bias", F_BIAS},
    {"logprobs", F_LOGPROBS},
    {"top_logprobs", F_TOP_LOGPROBS},
    {"ignore_eos", F_IGNORE_EOS},
    {"stream", F_MUST_BE_FALSE},
    {"echo", F_MUST_BE_FALSE},
    {"response_format", F_RESPONSE_FORMAT},
};

static enum status read_field(enum field f, const char *name, const json_t *v, struct error *e,
                              struct body *b) {
    struct wire_submit *s = &b->submit;
    struct wire_sampling *p = &s->sampling;
    const char *type;
    switch (f) {
    case F_IGNORED: return ST_OK;
    case F_PROMPT:
        if (strcmp(name, b->chat ? "messages" : "prompt") != 0)
            return error_set(e, ST_INVALID, "%s does not belong to this url", name);
        return b->chat ? read_messages(v, e, b) : read_prompt(v, e, b);
    case F_TEMPERATURE: return read_real(v, name, 0, 100, e, &p->temperature);
    case F_TOP_P: return read_real(v, name, 1e-6, 1, e, &p->top_p);
    case F_MIN_P: return read_real(v, name, 0, 1, e, &p->min_p);
    case F_TOP_K:
        if (json_is_integer(v) && json_integer_value(v) == -1) return ST_OK; /* elsewhere: off */
        return read_count(v, name, 0, INT32_MAX, e, &p->top_k);
    case F_REPETITION: return read_real(v, name, 1e-6, 100, e, &p->repetition_penalty);
    case F_PRESENCE: return read_real(v, name, -2, 2, e, &p->presence_penalty);
    case F_FREQUENCY: return read_real(v, name, -2, 2, e, &p->frequency_penalty);
    case F_MAX_TOKENS:
        s->has_max_tokens = true;
        return read_count(v, name, 1, INT32_MAX, e, &s->max_tokens);
    case F_MIN_TOKENS: return read_count(v, name, 0, INT32_MAX, e, &s->min_tokens);
    case F_N: return read_count(v, name, 1, WIRE_MAX_CHOICES, e, &s->n);
    case F_SEED: return read_seed(v, e, p);
    case F_STOP: return read_stop(v, e, s);
    case F_STOP_IDS: return read_stop_ids(v, e, s);
    case F_BIAS: return read_bias(v, e, b);
    case F_LOGPROBS: return read_logprobs(v, e, b);
    case F_TOP_LOGPROBS: return read_count(v, name, 0, WIRE_MAX_TOP_LOGPROBS, e, &p->top_logprobs);
    case F_IGNORE_EOS: return read_bool(v, name, e, &s->ignore_eos);
    case F_MUST_BE_FALSE:
        if (json_is_false(v)) return ST_OK;
        return error_set(e, ST_UNSUPPORTED, "%s is not served here", name);
    case F_RESPONSE_FORMAT:
        type = json_string_value(json_object_get(v, "type"));
        if (type && strcmp(type, "text") == 0) return ST_OK;
        return error_set(e, ST_UNSUPPORTED, "response_format: only text is served");
    }
    return error_set(e, ST_INTERNAL, "field %s", name);
}

static enum status read_named(const char *key, const json_t *v, struct error *e, struct body *b) {
    if (json_is_null(v)) return ST_OK; /* as if it were not there */
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (strcmp(key, fields[i].name) != 0) continue;
        return read_field(fields[i].field, key, v, e, b);
    }
    return error_set(e, ST_UNSUPPORTED, "%.80s is not a field that is served", key);
}

static enum status check_whole(const struct body *b, struct error *e) {
    const struct wire_submit *s = &b->submit;
    if (s->n_messages == 0 && s->prompt_text.n == 0 && s->n_prompt_ids == 0)
        return error_set(e, ST_INVALID, "%s is missing", b->chat ? "messages" : "prompt");
    if (s->has_max_tokens && s->min_tokens > s->max_tokens)
        return error_set(e, ST_INVALID, "min_tokens is more than max_tokens");
    if (b->chat && s->sampling.top_logprobs > 0 && !s->sampling.logprobs)
        return error_set(e, ST_INVALID, "top_logprobs needs logprobs to be true");
    return ST_OK;
}

enum status body_read(json_t *root, bool chat, struct error *e, struct body *out) {
    if (!json_is_object(root)) return error_set(e, ST_INVALID, "body must be an object");
    *out = (struct body){
        .chat = chat,
        .root = json_incref(root),
        .submit = {.sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
                   .priority = 1,
                   .n = 1,
                   .parse_special = true}};
    const char *key;
    json_t *value;
    enum status st = ST_OK;
    json_object_foreach(root, key, value) {
        st = read_named(key, value, e, out);
        if (st != ST_OK) break;
    }
    if (st == ST_OK) st = check_whole(out, e);
    out->logprobs = out->submit.sampling.logprobs;
    if (st != ST_OK) body_free(out);
    return st;
}

void body_free(struct body *b) {
    for (size_t i = 0; i < b->n_joined; i++) free(b->joined[i]);
    free(b->joined);
    free(b->messages);
    free(b->prompt_ids);
    free(b->bias);
    json_decref(b->root);
    *b = (struct body){0};
}
