/* See cli.h. */
#include <stdlib.h>
#include <string.h>

#include "clients/cli/cli.h"

static int read_bias(const struct command *cmd, struct sampling_options *o, size_t i) {
    const char *word = o->bias.items[i], *eq = strchr(word, '=');
    char id[24] = "";
    int64_t token;
    double value;
    if (eq && (size_t)(eq - word) < sizeof id) memcpy(id, word, (size_t)(eq - word));
    if (!eq || !args_int(id, 0, INT32_MAX, &token) || !args_real(eq + 1, -100, 100, &value))
        return usage_error(cmd, "--bias wants ID=V with V from -100 to 100, not '%s'", word);
    o->biases[i] = (struct wire_bias){.token = (int32_t)token, .bias = (float)value};
    return EXIT_DONE;
}

static int read_stops(const struct command *cmd, const struct sampling_options *o,
                      struct wire_submit *s) {
    if (o->stop.n > WIRE_MAX_STOPS || o->stop_ids.n > WIRE_MAX_STOPS)
        return usage_error(cmd, "at most %d of --stop and as many of --stop-id", WIRE_MAX_STOPS);
    for (size_t i = 0; i < o->stop.n; i++) {
        struct bytes text = bytes_of(o->stop.items[i]);
        if (text.n == 0 || text.n > WIRE_MAX_STOP_BYTES || !utf8_valid(text.p, text.n))
            return usage_error(cmd, "--stop wants 1 to %d bytes of UTF-8", WIRE_MAX_STOP_BYTES);
        s->stop[s->n_stop++] = text;
    }
    for (size_t i = 0; i < o->stop_ids.n; i++) {
        int64_t id;
        if (!args_int(o->stop_ids.items[i], 0, INT32_MAX, &id))
            return usage_error(cmd, "--stop-id wants a token id, not '%s'", o->stop_ids.items[i]);
        s->stop_ids[s->n_stop_ids++] = (int32_t)id;
    }
    return EXIT_DONE;
}

int sampling_apply(const struct command *cmd, struct sampling_options *o, struct wire_submit *s) {
    if (o->max_tokens > 0 && o->min_tokens > o->max_tokens)
        return usage_error(cmd, "--min-tokens is more than --max-tokens");
    for (size_t i = 0; i < o->bias.n; i++) {
        int code = read_bias(cmd, o, i);
        if (code != EXIT_DONE) return code;
    }
    s->sampling =
        (struct wire_sampling){.temperature = (float)o->temperature,
                               .top_k = (uint32_t)o->top_k,
                               .top_p = (float)o->top_p,
                               .min_p = (float)o->min_p,
                               .repetition_penalty = (float)o->repetition,
                               .presence_penalty = (float)o->presence,
                               .frequency_penalty = (float)o->frequency,
                               .bias = o->biases,
                               .n_bias = o->bias.n,
                               .has_seed = o->seed >= 0,
                               .seed = o->seed >= 0 ? (uint64_t)o->seed : 0,
                               .logprobs = o->logprobs >= 0,
                               .top_logprobs = o->logprobs > 0 ? (uint32_t)o->logprobs : 0};
    s->has_max_tokens = o->max_tokens > 0;
    s->max_tokens = (uint32_t)o->max_tokens;
    s->min_tokens = (uint32_t)o->min_tokens;
    s->ignore_eos = o->ignore_eos;
    s->priority = (uint32_t)o->priority;
    s->ttl_ms = (uint32_t)o->ttl_ms;
    s->n = (uint32_t)o->n;
    s->parse_special = !o->raw_special;
    return read_stops(cmd, o, s);
}
