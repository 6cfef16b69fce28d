/* See session.h. */
#include "clients/common/session.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct client *connect_or_complain(const char *program, const struct endpoint_options *o) {
    struct client_options co = {
        .endpoint = o->endpoint, .name = program, .timeout_ms = (int)o->timeout_ms};
    struct error e;
    struct client *c = NULL;
    if (client_open(&co, &e, &c) == ST_OK) return c;
    fprintf(stderr, "%s: %s\n", program, e.text);
    return NULL;
}

bool ask_or_complain(const char *program, struct client *c, const struct endpoint_options *o,
                     const struct wire_msg *question, struct wire_msg *reply, int *code) {
    struct error e;
    char line[300];
    enum status st = client_call(c, question, (int)o->timeout_ms, &e, reply);
    if (st == ST_OK) return true;
    fprintf(stderr, "%s: %s\n", program, error_line(&e, line, sizeof line));
    *code = st == ST_IO || st == ST_CORRUPT ? EXIT_CONNECT : EXIT_FAILED;
    return false;
}

char *read_text_file(const char *program, const char *path, size_t max_bytes, size_t *n) {
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    if (!f) {
        fprintf(stderr, "%s: %s: %s\n", program, path, strerror(errno));
        return NULL;
    }
    size_t cap = 1 << 16;
    char *text = malloc(cap + 1);
    const char *problem = text ? NULL : "no memory";
    *n = 0;
    while (!problem) {
        size_t got = fread(text + *n, 1, cap - *n, f);
        *n += got;
        if (ferror(f))
            problem = strerror(errno);
        else if (*n > max_bytes)
            problem = "too large for one request";
        if (problem || (got == 0 && feof(f))) break;
        if (*n < cap) continue;
        char *more = realloc(text, cap * 2 + 1);
        if (!more)
            problem = "no memory";
        else {
            text = more;
            cap *= 2;
        }
    }
    if (!is_stdin) fclose(f);
    if (!problem && !utf8_valid(text, *n)) problem = "not UTF-8 text";
    if (!problem) {
        text[*n] = 0;
        return text;
    }
    fprintf(stderr, "%s: %s: %s\n", program, is_stdin ? "standard input" : path, problem);
    free(text);
    return NULL;
}

static volatile sig_atomic_t interrupt_seen;

static void on_interrupt(int sig) {
    (void)sig;
    interrupt_seen = 1;
}

void catch_interrupt(void) {
    struct sigaction sa = {.sa_handler = on_interrupt}; /* no SA_RESTART: reads end */
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
}

bool interrupted(void) {
    bool seen = interrupt_seen != 0;
    interrupt_seen = 0;
    return seen;
}

bool await_input(int fd) {
    sigset_t signals, before;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, &before);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    int n = interrupt_seen ? -1 : ppoll(&p, 1, NULL, &before);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !(n < 0 && interrupted());
}

const char *error_line(const struct error *e, char *dst, size_t cap) {
    snprintf(dst, cap, "%s%s%s", status_name(e->code), e->text[0] ? ": " : "", e->text);
    return dst;
}

int http_status(enum status st) {
    switch (st) {
    case ST_OK: return 200;
    case ST_INVALID:
    case ST_TOO_LONG:
    case ST_UNSUPPORTED: return 400;
    case ST_UNAUTHENTICATED: return 401;
    case ST_DENIED: return 403;
    case ST_NOT_FOUND: return 404;
    case ST_CONFLICT:
    case ST_STALE_EPOCH: return 409;
    case ST_TOO_LARGE: return 413;
    case ST_QUOTA: return 429;
    case ST_UNIMPLEMENTED: return 501;
    case ST_OVERLOADED:
    case ST_DRAINING:
    case ST_LOADING:
    case ST_ENGINE_LOST:
    case ST_NO_BLOCKS: return 503;
    case ST_TIMEOUT: return 504;
    default: return 500;
    }
}
