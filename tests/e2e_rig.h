/* e2e_rig: moed as a process on the bundled model, and requests to it by way of the client library. Header-only:
 * each test program that includes it gets its own copy. */
#ifndef MOED_TESTS_E2E_RIG_H
#define MOED_TESTS_E2E_RIG_H

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clients/lib/client.h"
#include "tests/support.h"

enum { MAX_TEXT = 2048, MAX_IDS = 512, ANSWER_MS = 120000 };

/* ---- the process ---------------------------------------------------------------------------- */

struct daemon {
    pid_t pid;
    char dir[64], endpoint[96];
};

static inline pid_t spawn(const char *endpoint, const char *const *flags) {
    const char *argv[24] = {TEST_BIN "/moed", "--model",     TINY_MODEL, "--listen",
                            endpoint,         "--log-level", "error"};
    int n = 7;
    while (*flags) argv[n++] = *flags++;
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves no daemon behind */
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(127);
    }
    return pid;
}

static inline void daemon_start(struct daemon *d, const char *const *flags) {
    snprintf(d->dir, sizeof d->dir, "/tmp/moed-e2e-XXXXXX");
    if (!mkdtemp(d->dir)) fail_msg("mkdtemp");
    snprintf(d->endpoint, sizeof d->endpoint, "ipc://%s/moed.sock", d->dir);
    d->pid = spawn(d->endpoint, flags);
}

static inline int wait_status(pid_t pid) {
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) fail_msg("waitpid");
    return status;
}

/* SIGTERM must end it with status 0, and its socket and lock must be gone. */
static inline void daemon_stop(struct daemon *d) {
    kill(d->pid, SIGTERM);
    int status = wait_status(d->pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(rmdir(d->dir), 0);
}

static inline struct client *connect_to(const struct daemon *d) {
    struct client *c;
    struct error e = {0};
    struct client_options o = {.endpoint = d->endpoint, .name = "e2e", .timeout_ms = 60000};
    assert_ok(client_open(&o, &e, &c), &e);
    return c;
}

static inline double stat_of(struct client *c, const char *name) {
    struct wire_msg m = {.type = WIRE_STATS}, reply;
    struct error e = {0};
    assert_ok(client_call(c, &m, ANSWER_MS, &e, &reply), &e);
    for (size_t i = 0; i < reply.stats.n_counters; i++) {
        struct bytes b = reply.stats.counters[i].name;
        if (b.n == strlen(name) && memcmp(b.p, name, b.n) == 0)
            return reply.stats.counters[i].value;
    }
    fail_msg("no counter %s", name);
    return 0;
}

static inline void wait_stat(struct client *c, const char *name, double value) {
    double got = 0;
    for (int i = 0; i < 1000; i++) {
        got = stat_of(c, name);
        if (got == value) return;
        usleep(10000);
    }
    fail_msg("%s is %g and does not become %g", name, got, value);
}

/* ---- requests ------------------------------------------------------------------------------- */

struct want { /* a request, and its answer */
    const char *prompt;
    float temperature;
    uint64_t seed;
    char text[MAX_TEXT];
    size_t n_text;
    int32_t ids[MAX_IDS];
    int n_ids;
    int n_accepted, n_ended;
    enum wire_type end;
};

static const char *const prompts[] = {
    "What is a mutex?",
    "Is a violin a kind of fruit?",
    "What is the chemical symbol of gold?",
    "It is a truth universally acknowledged",
    "In the beginning",
    "The SELECT statement",
};

static inline void want_init(struct want *w, int i) {
    memset(w, 0, sizeof *w);
    w->prompt = prompts[i % 6];
    w->temperature = i % 12 < 6 ? 0.0f : 1.5f;
    w->seed = 1000 + (uint64_t)(i % 12);
}

enum { LENGTH = 24 };

static inline uint64_t submit(struct client *c, const struct want *w, uint32_t max_tokens) {
    struct wire_submit s = {.prompt_text = {(const uint8_t *)w->prompt, strlen(w->prompt)},
                            .sampling = {.temperature = w->temperature,
                                         .top_p = 1,
                                         .repetition_penalty = 1.1f,
                                         .has_seed = true,
                                         .seed = w->seed},
                            .has_max_tokens = true,
                            .max_tokens = max_tokens,
                            .ignore_eos = true, /* so that every answer is long */
                            .priority = 1,
                            .n = 1};
    uint64_t id;
    struct error e = {0};
    assert_ok(client_submit(c, &s, &e, &id), &e);
    return id;
}

static inline void take(struct want *w, const struct wire_msg *m) {
    switch (m->type) {
    case WIRE_ACCEPTED: w->n_accepted++; break;
    case WIRE_TOKEN_CHUNK:
        assert_true(w->n_text + m->chunk.text.n < MAX_TEXT);
        if (m->chunk.text.n > 0) memcpy(w->text + w->n_text, m->chunk.text.p, m->chunk.text.n);
        w->n_text += m->chunk.text.n;
        for (size_t i = 0; i < m->chunk.n_ids && w->n_ids < MAX_IDS; i++)
            w->ids[w->n_ids++] = m->chunk.ids[i];
        break;
    default: w->end = m->type; w->n_ended++;
    }
}

static inline void run_alone(struct client *c, struct want *w) {
    struct error e = {0};
    submit(c, w, LENGTH);
    while (w->n_ended == 0) {
        struct wire_msg m;
        assert_ok(client_next(c, ANSWER_MS, &e, &m), &e);
        take(w, &m);
    }
    assert_int_equal(w->end, WIRE_FINISHED);
    assert_int_equal(w->n_ids, LENGTH);
}

static inline void submit_all(struct client *c, struct want *all, int n) {
    uint64_t first = 0;
    for (int i = 0; i < n; i++) {
        want_init(&all[i], i);
        uint64_t id = submit(c, &all[i], LENGTH);
        if (i == 0) first = id;
    }
    for (int n_ended = 0; n_ended < n;) {
        struct wire_msg m;
        struct error e = {0};
        assert_ok(client_next(c, ANSWER_MS, &e, &m), &e);
        take(&all[m.request_id - first], &m);
        n_ended += m.type == WIRE_FINISHED || m.type == WIRE_FAILED || m.type == WIRE_REJECTED;
    }
}

#endif
