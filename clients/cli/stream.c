/* See cli.h. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/cli/cli.h"

enum { SLICE_MS = 100, DETOKENIZE_MS = 5000 }; /* how often an interrupt is looked for */

bool put_text(const char *s, size_t n) {
    if (!isatty(STDOUT_FILENO)) {
        fwrite(s, 1, n, stdout);
    } else {
        for (size_t i = 0; i < n; i++) {
            unsigned char c = (unsigned char)s[i];
            putchar((c < 0x20 && c != '\n' && c != '\t') || c == 0x7f ? '?' : c);
        }
    }
    return fflush(stdout) == 0 && !ferror(stdout);
}

char *token_text(struct client *c, int32_t id) {
    struct wire_msg reply, ask = {.type = WIRE_DETOKENIZE, .ids = {&id, 1}};
    if (client_call(c, &ask, DETOKENIZE_MS, NULL, &reply) != ST_OK) return NULL;
    json_t *s = json_stringn((const char *)reply.text.text.p, reply.text.text.n);
    if (!s) s = json_string("\xef\xbf\xbd"); /* a part of a character is no text by itself */
    char *quoted = json_dumps(s, JSON_ENCODE_ANY);
    json_decref(s);
    return quoted;
}

static void put_token_name(struct client *c, int32_t id) {
    char *text = token_text(c, id);
    printf("%s", text ? text : "?");
    free(text);
}

/* Tokens [from, n_ids) of choice 0. The chunk is already copied: asking the daemon would
 * overwrite it. */
static bool show_logprobs(struct client *c, const struct answer_choice *a, size_t from) {
    for (size_t i = from; i < a->n_ids && a->logprobs; i++) {
        printf("%8d  %9.4f  ", a->ids[i], (double)a->logprobs[i]);
        put_token_name(c, a->ids[i]);
        for (size_t t = 0; t < a->n_top; t++) {
            const struct wire_top_logprob *p = &a->top[i * a->n_top + t];
            if (p->token < 0) break;
            printf("%s%d ", t ? ", " : "  | ", p->token);
            put_token_name(c, p->token);
            printf(" %.4f", (double)p->logprob);
        }
        putchar('\n');
    }
    return fflush(stdout) == 0 && !ferror(stdout);
}

/* What the message added to choice 0. False when stdout is closed or full. */
static bool show_message(struct client *c, enum show show, const struct answer *a, size_t n_text,
                         size_t n_ids) {
    const struct answer_choice *first = &a->choices[0];
    if (show == SHOW_LOGPROBS) return show_logprobs(c, first, n_ids);
    return first->n_text == n_text || put_text(first->text + n_text, first->n_text - n_text);
}

static void show_others(struct client *c, enum show show, const struct answer *a) {
    for (uint32_t i = 1; i < a->n_choices; i++) {
        printf("--- choice %u ---\n", i);
        if (show == SHOW_LOGPROBS)
            show_logprobs(c, &a->choices[i], 0);
        else {
            put_text(a->choices[i].text ? a->choices[i].text : "", a->choices[i].n_text);
            putchar('\n');
        }
    }
}

static int judge(const char *program, const struct answer *a) {
    char line[300];
    if (a->error.code != ST_OK) {
        fprintf(stderr, "%s: the request %s: %s\n", program,
                a->rejected ? "was rejected" : "failed", error_line(&a->error, line, sizeof line));
        return EXIT_FAILED;
    }
    for (uint32_t i = 0; i < a->n_choices; i++) {
        enum wire_reason reason = a->choices[i].reason;
        if (reason == REASON_STOP || reason == REASON_LENGTH) continue;
        fprintf(stderr, "%s: %s\n", program,
                reason == REASON_CANCELLED ? "cancelled" : "the time given by --ttl-ms is over");
        return EXIT_FAILED;
    }
    return EXIT_DONE;
}

int stream_request(const char *program, struct client *c, const struct wire_submit *submit,
                   enum show show, struct answer *a) {
    struct error e;
    uint64_t id;
    bool cancelled = false;
    answer_start(a, submit->n);
    enum status st = client_submit(c, submit, &e, &id);
    interrupted();
    while (st == ST_OK && !a->ended) {
        struct wire_msg m;
        size_t n_text = a->choices[0].n_text, n_ids = a->choices[0].n_ids;
        if (interrupted() && !cancelled) {
            cancelled = true;
            client_cancel(c, id);
        }
        st = client_next(c, SLICE_MS, &e, &m);
        if (st == ST_TIMEOUT) {
            st = ST_OK;
            continue;
        }
        if (st == ST_OK && m.request_id == id) st = answer_add(a, &m, &e);
        /* A reader that left wants no more: stop the work, and do not show the rest. */
        if (st == ST_OK && !cancelled && !show_message(c, show, a, n_text, n_ids)) {
            cancelled = true;
            client_cancel(c, id);
        }
    }
    if (st != ST_OK) {
        fprintf(stderr, "%s: %s\n", program, e.text);
        return st == ST_IO || st == ST_CORRUPT ? EXIT_CONNECT : EXIT_FAILED;
    }
    if (show == SHOW_TEXT && a->choices[0].n_text > 0) putchar('\n');
    if (a->error.code == ST_OK) show_others(c, show, a);
    fflush(stdout);
    return judge(program, a);
}

void print_usage_line(const struct answer *a) {
    double rate = a->decode_ms > 0 ? 1000.0 * (double)a->completion_tokens / a->decode_ms : 0;
    fprintf(
        stderr,
        "[%u prompt tokens (%u cached), %u new, first after %.0f ms, %.1f tokens/s, ended by %s]\n",
        a->prompt_tokens, a->cached_tokens, a->completion_tokens, a->queue_ms + a->prefill_ms, rate,
        wire_reason_name(a->choices[0].reason));
}
