/* batch_result: the lines of a batch's output, in OpenAI's shape. See batch.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clients/cli/batch.h"
#include "clients/cli/cli.h"

/* The server promises UTF-8; if it is not, the result says so instead of being lost. */
static json_t *text_json(const char *s, size_t n) {
    json_t *text = n > 0 ? json_stringn(s, n) : json_string("");
    return text ? text : json_string("\xef\xbf\xbd");
}

static json_t *random_id(const char *prefix) {
    uint8_t r[12];
    char text[64];
    random_bytes(r, sizeof r);
    int n = snprintf(text, sizeof text, "%s", prefix);
    for (size_t i = 0; i < sizeof r; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%02x", r[i]);
    return json_string(text);
}

/* ---- log-probabilities ----------------------------------------------------------------------- */

void token_names_free(struct token_names *t) {
    for (size_t i = 0; i < t->n; i++) free(t->names[i]);
    free(t->names);
    *t = (struct token_names){0};
}

static json_t *token_name(struct client *c, struct token_names *t, int32_t id) {
    size_t i = (size_t)(id < 0 ? 0 : id);
    if (i >= t->n) {
        size_t n = i + 1024;
        char **names = realloc(t->names, n * sizeof *names);
        if (!names) return json_string("");
        memset(names + t->n, 0, (n - t->n) * sizeof *names);
        t->names = names;
        t->n = n;
    }
    if (!t->names[i]) t->names[i] = token_text(c, id);
    if (!t->names[i]) return json_string("");
    return json_loads(t->names[i], JSON_DECODE_ANY, NULL);
}

static json_t *chat_logprobs(struct client *c, struct token_names *names,
                             const struct answer_choice *a) {
    json_t *content = json_array();
    for (size_t i = 0; i < a->n_ids && a->logprobs; i++) {
        json_t *top = json_array();
        for (size_t t = 0; t < a->n_top; t++) {
            const struct wire_top_logprob *p = &a->top[i * a->n_top + t];
            if (p->token < 0) break;
            json_array_append_new(top, json_pack("{s:o, s:f, s:n}", "token",
                                                 token_name(c, names, p->token), "logprob",
                                                 (double)p->logprob, "bytes"));
        }
        json_array_append_new(
            content, json_pack("{s:o, s:f, s:n, s:o}", "token", token_name(c, names, a->ids[i]),
                               "logprob", (double)a->logprobs[i], "bytes", "top_logprobs", top));
    }
    return json_pack("{s:o}", "content", content);
}

static json_t *completion_logprobs(struct client *c, struct token_names *names,
                                   const struct answer_choice *a) {
    json_t *tokens = json_array(), *logprobs = json_array(), *tops = json_array();
    json_t *offsets = json_array();
    size_t offset = 0;
    for (size_t i = 0; i < a->n_ids && a->logprobs; i++) {
        json_t *name = token_name(c, names, a->ids[i]), *top = json_object();
        json_array_append_new(offsets, json_integer((json_int_t)offset));
        offset += json_string_length(name);
        json_array_append_new(tokens, name);
        json_array_append_new(logprobs, json_real((double)a->logprobs[i]));
        for (size_t t = 0; t < a->n_top; t++) {
            const struct wire_top_logprob *p = &a->top[i * a->n_top + t];
            if (p->token < 0) break;
            json_t *key = token_name(c, names, p->token);
            json_object_set_new(top, json_string_value(key), json_real((double)p->logprob));
            json_decref(key);
        }
        json_array_append_new(tops, top);
    }
    return json_pack("{s:o, s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", logprobs,
                     "top_logprobs", tops, "text_offset", offsets);
}

/* ---- results --------------------------------------------------------------------------------- */

static json_t *choice_json(struct client *c, struct token_names *names, const struct body *b,
                           const struct answer_choice *a, uint32_t idx) {
    json_t *text = text_json(a->text, a->n_text), *logprobs = json_null();
    if (b->logprobs)
        logprobs = b->chat ? chat_logprobs(c, names, a) : completion_logprobs(c, names, a);
    const char *reason = wire_reason_name(a->reason);
    if (b->chat)
        return json_pack("{s:i, s:{s:s, s:o}, s:o, s:s}", "index", (int)idx, "message", "role",
                         "assistant", "content", text, "logprobs", logprobs, "finish_reason",
                         reason);
    return json_pack("{s:i, s:o, s:o, s:s}", "index", (int)idx, "text", text, "logprobs", logprobs,
                     "finish_reason", reason);
}

json_t *batch_result(struct client *c, struct token_names *names, const struct batch_request *r,
                     const struct answer *a) {
    const struct wire_welcome *w = client_welcome(c);
    json_t *choices = json_array();
    for (uint32_t i = 0; i < a->n_choices; i++)
        json_array_append_new(choices, choice_json(c, names, &r->body, &a->choices[i], i));
    json_t *usage =
        json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", (json_int_t)a->prompt_tokens,
                  "completion_tokens", (json_int_t)a->completion_tokens, "total_tokens",
                  (json_int_t)a->prompt_tokens + (json_int_t)a->completion_tokens,
                  "prompt_tokens_details", "cached_tokens", (json_int_t)a->cached_tokens);
    json_t *body = json_pack(
        "{s:o, s:s, s:I, s:o, s:o, s:o}", "id", random_id(r->body.chat ? "chatcmpl-" : "cmpl-"),
        "object", r->body.chat ? "chat.completion" : "text_completion", "created",
        (json_int_t)time(NULL), "model", text_json((const char *)w->model.p, w->model.n), "choices",
        choices, "usage", usage);
    return json_pack("{s:o, s:s, s:{s:i, s:o, s:o}, s:n}", "id", random_id("batch_req_"),
                     "custom_id", r->custom_id, "response", "status_code", 200, "request_id",
                     random_id("req_"), "body", body, "error");
}

json_t *batch_error(const char *custom_id, const struct error *e) {
    const char *code = status_name(e->code);
    int http = http_status(e->code);
    json_t *body = json_pack("{s:{s:s, s:s, s:s}}", "error", "message", e->text, "type",
                             http < 500 ? "invalid_request_error" : "server_error", "code", code);
    return json_pack("{s:o, s:s, s:{s:i, s:o, s:o}, s:{s:s, s:s}}", "id", random_id("batch_req_"),
                     "custom_id", custom_id, "response", "status_code", http, "request_id",
                     random_id("req_"), "body", body, "error", "code", code, "message", e->text);
}
