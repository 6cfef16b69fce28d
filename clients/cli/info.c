/* moed-cli tokenize, detokenize, info, health, stats: one question each. See cli.h. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/cli.h"

#define EXIT_TEXT "Exit status: 0 done, 1 the daemon refused, 2 usage, 3 no connection."

/* Connect, ask, hand the reply to show. */
static int ask(const char *program, const struct endpoint_options *o,
               const struct wire_msg *question,
               int (*show)(struct client *c, const struct wire_msg *reply, const void *arg),
               const void *arg) {
    struct client *c = connect_or_complain(program, o);
    if (!c) return EXIT_CONNECT;
    struct wire_msg reply;
    int code = EXIT_DONE;
    if (ask_or_complain(program, c, o, question, &reply, &code)) code = show(c, &reply, arg);
    client_close(c);
    return code;
}

/* ---- tokenize -------------------------------------------------------------------------------- */

static int show_ids(struct client *c, const struct wire_msg *reply, const void *arg) {
    (void)c;
    (void)arg;
    for (size_t i = 0; i < reply->ids.n_ids; i++) printf("%s%d", i ? " " : "", reply->ids.ids[i]);
    putchar('\n');
    return EXIT_DONE;
}

static const char tokenize_summary[] =
    "Print the token ids of a text on one line. Without TEXT and --file it is read from\n"
    "standard input; every byte of it counts, a newline at its end too.";

int command_tokenize(int argc, char **argv) {
    struct endpoint_options endpoint = ENDPOINT_DEFAULTS;
    struct operands rest;
    const char *file = NULL, *system = NULL;
    bool chat = false, raw_special = false;
    const struct arg args[] = {
        {ARG_STRING, "file", 'f', "FILE", &file, 0, 0,
         "read the text from FILE; - is standard input"},
        {ARG_FLAG, "chat", 0, NULL, &chat, 0, 0, "as a user's message in the model's chat format"},
        {ARG_STRING, "system", 0, "TEXT", &system, 0, 0, "with --chat: after this system message"},
        {ARG_FLAG, "raw-special", 0, NULL, &raw_special, 0, 0,
         "names of special tokens are ordinary text"},
        ENDPOINT_ARGS(&endpoint),
    };
    const struct command cmd = {.name = "moed-cli tokenize",
                                .operands = "[TEXT]",
                                .summary = tokenize_summary,
                                .details = EXIT_TEXT,
                                .args = args,
                                .n_args = sizeof args / sizeof *args,
                                .rest = &rest};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    if (rest.n > 1 || (rest.n == 1 && file)) return usage_error(&cmd, "one TEXT, or --file");
    if (system && !chat) return usage_error(&cmd, "--system wants --chat");
    size_t n = rest.n == 1 ? strlen(rest.items[0]) : 0;
    char *text = rest.n == 1 ? strdup(rest.items[0])
                             : read_text_file(cmd.name, file ? file : "-", WIRE_MAX_BODY_BYTES, &n);
    if (!text) return EXIT_USAGE;
    struct bytes content = {(const uint8_t *)text, n};
    struct wire_chat messages[2] = {{bytes_of("system"), bytes_of(system ? system : "")},
                                    {bytes_of("user"), content}};
    struct wire_msg question = {.type = WIRE_TOKENIZE, .tokenize = {.parse_special = !raw_special}};
    if (chat) {
        question.tokenize.messages = system ? messages : messages + 1;
        question.tokenize.n_messages = system ? 2 : 1;
    } else {
        question.tokenize.text = content;
    }
    code = ask(cmd.name, &endpoint, &question, show_ids, NULL);
    free(text);
    return code;
}

/* ---- detokenize ------------------------------------------------------------------------------ */

static int show_text(struct client *c, const struct wire_msg *reply, const void *arg) {
    (void)c;
    (void)arg;
    return put_text((const char *)reply->text.text.p, reply->text.text.n) && putchar('\n') != EOF
               ? EXIT_DONE
               : EXIT_FAILED;
}

/* Ids separated by blanks, commas or newlines, appended to *ids. EXIT_DONE or EXIT_USAGE. */
static int add_ids(const struct command *cmd, char *text, int32_t **ids, size_t *n) {
    for (char *save, *w = strtok_r(text, " ,\t\r\n", &save); w;
         w = strtok_r(NULL, " ,\t\r\n", &save)) {
        int64_t id;
        if (!args_int(w, 0, INT32_MAX, &id)) return usage_error(cmd, "'%s' is not a token id", w);
        /* Powers of two: the array is full exactly when its length is one. */
        if ((*n & (*n - 1)) == 0) {
            int32_t *more = realloc(*ids, (*n ? *n * 2 : 1) * sizeof **ids);
            if (!more) return usage_error(cmd, "no memory");
            *ids = more;
        }
        (*ids)[(*n)++] = (int32_t)id;
    }
    return EXIT_DONE;
}

static const char detokenize_summary[] =
    "Print the text of token ids, which may be separated by blanks or commas. Bytes that are no\n"
    "character are shown as U+FFFD.";

int command_detokenize(int argc, char **argv) {
    struct endpoint_options endpoint = ENDPOINT_DEFAULTS;
    struct operands rest;
    const char *file = NULL;
    const struct arg args[] = {
        {ARG_STRING, "file", 'f', "FILE", &file, 0, 0,
         "read the ids from FILE; - is standard input"},
        ENDPOINT_ARGS(&endpoint),
    };
    const struct command cmd = {.name = "moed-cli detokenize",
                                .operands = "ID…",
                                .summary = detokenize_summary,
                                .details = EXIT_TEXT,
                                .args = args,
                                .n_args = sizeof args / sizeof *args,
                                .rest = &rest};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    if ((rest.n > 0) == (file != NULL)) return usage_error(&cmd, "give ids, or --file");
    int32_t *ids = NULL;
    size_t n_ids = 0, n;
    char *text = NULL;
    if (file) {
        text = read_text_file(cmd.name, file, 16 * WIRE_MAX_BODY_BYTES, &n);
        code = text ? add_ids(&cmd, text, &ids, &n_ids) : EXIT_USAGE;
    }
    for (int i = 0; i < rest.n && code == EXIT_DONE; i++)
        code = add_ids(&cmd, rest.items[i], &ids, &n_ids);
    struct wire_msg question = {.type = WIRE_DETOKENIZE, .ids = {ids, n_ids}};
    if (code == EXIT_DONE) code = ask(cmd.name, &endpoint, &question, show_text, NULL);
    free(text);
    free(ids);
    return code;
}

/* ---- info ------------------------------------------------------------------------------------ */

static int show_info(struct client *c, const struct wire_msg *reply, const void *arg) {
    (void)arg;
    const struct wire_welcome *w = client_welcome(c);
    const struct wire_model_info *m = &reply->model_info;
    printf("server             %.*s, protocol %u.%u\n", (int)w->server.n, w->server.p, w->major,
           w->minor);
    printf("model              %.*s\n", (int)m->name.n, m->name.p);
    printf("architecture       %.*s\n", (int)m->architecture.n, m->architecture.p);
    printf("quantization       %.*s\n", (int)m->quantization.n, m->quantization.p);
    printf("backend            %.*s\n", (int)m->backend.n, m->backend.p);
    printf("layers             %u\n", m->n_layers);
    printf("experts            %u, %u per token\n", m->n_experts, m->n_experts_used);
    printf("vocabulary         %u, end of turn %d\n", m->n_vocab, m->eos_id);
    printf("context            %u tokens\n", m->max_context_tokens);
    printf("weights            %.1f MiB\n", (double)m->weight_bytes / (1 << 20));
    printf("KV cache           %llu bytes per token\n", (unsigned long long)m->kv_bytes_per_token);
    printf("requests at once   %u per session\n", w->limits.max_inflight);
    printf("credit window      %u chunks\n", w->limits.credit_window);
    printf("message size       %u bytes at most\n", w->limits.max_frame_bytes);
    return EXIT_DONE;
}

int command_info(int argc, char **argv) {
    struct endpoint_options endpoint = ENDPOINT_DEFAULTS;
    const struct arg args[] = {ENDPOINT_ARGS(&endpoint)};
    const struct command cmd = {
        .name = "moed-cli info",
        .summary = "Print what the daemon serves: the model, the backend and the limits.",
        .details = EXIT_TEXT,
        .args = args,
        .n_args = sizeof args / sizeof *args};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    return ask(cmd.name, &endpoint, &(struct wire_msg){.type = WIRE_MODEL_INFO}, show_info, NULL);
}

/* ---- health ---------------------------------------------------------------------------------- */

static int show_health(struct client *c, const struct wire_msg *reply, const void *arg) {
    (void)c;
    (void)arg;
    const struct wire_health *h = &reply->health;
    printf("%s %s, up %.1f s, last step %.1f s ago\n", h->ready ? "ready" : "not ready",
           status_name((enum status)h->state), (double)h->uptime_ms / 1000.0,
           (double)h->last_step_ms / 1000.0);
    return h->live && h->ready ? EXIT_DONE : EXIT_FAILED;
}

int command_health(int argc, char **argv) {
    struct endpoint_options endpoint = ENDPOINT_DEFAULTS;
    const struct arg args[] = {ENDPOINT_ARGS(&endpoint)};
    const struct command cmd = {
        .name = "moed-cli health",
        .summary = "Print whether the daemon takes requests, on one line.",
        .details = "Exit status: 0 ready, 1 not ready (loading, draining, device lost), 2 usage,\n"
                   "3 no connection.",
        .args = args,
        .n_args = sizeof args / sizeof *args};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    return ask(cmd.name, &endpoint, &(struct wire_msg){.type = WIRE_HEALTH}, show_health, NULL);
}

/* ---- stats ----------------------------------------------------------------------------------- */

static json_t *number(double v) {
    return v == floor(v) && fabs(v) < 9e15 ? json_integer((json_int_t)v) : json_real(v);
}

static int show_stats_json(const struct wire_stats *s) {
    json_t *o = json_object();
    for (size_t i = 0; i < s->n_counters; i++) {
        const struct wire_counter *k = &s->counters[i];
        char name[128];
        snprintf(name, sizeof name, "%.*s", (int)k->name.n, k->name.p);
        json_object_set_new(o, name, number(k->value));
    }
    int rc = json_dumpf(o, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(o);
    return rc == 0 ? EXIT_DONE : EXIT_FAILED;
}

static int show_stats(struct client *c, const struct wire_msg *reply, const void *arg) {
    (void)c;
    const bool *json = arg;
    const struct wire_stats *s = &reply->stats;
    if (*json) return show_stats_json(s);
    for (size_t i = 0; i < s->n_counters; i++) {
        const struct wire_counter *k = &s->counters[i];
        printf("%-36.*s %.*f\n", (int)k->name.n, k->name.p, k->value == floor(k->value) ? 0 : 3,
               k->value);
    }
    return EXIT_DONE;
}

int command_stats(int argc, char **argv) {
    struct endpoint_options endpoint = ENDPOINT_DEFAULTS;
    bool json = false;
    const struct arg args[] = {
        {ARG_FLAG, "json", 0, NULL, &json, 0, 0, "as one JSON object"},
        ENDPOINT_ARGS(&endpoint),
    };
    const struct command cmd = {.name = "moed-cli stats",
                                .summary =
                                    "Print the daemon's counters since its start, one per line.",
                                .details = EXIT_TEXT,
                                .args = args,
                                .n_args = sizeof args / sizeof *args};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    return ask(cmd.name, &endpoint, &(struct wire_msg){.type = WIRE_STATS}, show_stats, &json);
}
