/* moed-fake: fake_server.h as a process, for tests that start, stop and kill programs. Options
 * are key=value words named as the members of struct fake_options, fault by its number's name in
 * lower case. It prints "ready" when clients may connect and, at the end of its standard input
 * or on SIGTERM, its counts as JSON. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/fake_server.h"

static const char *const fault_names[] = {
    "none",        "silent",    "other_major", "other_header", "deny",
    "not_welcome", "hang",      "die",         "goodbye",      "bad_magic",
    "bad_body",    "long_body", "one_part",    "three_parts",  "strange_id",
    "client_type", "gap",       "bad_hash",    "no_window",    "fail",
    "reject",      "unstable",  "new_welcome", "stray_pong",   "deaf",
};

static int set_option(struct fake_options *o, const char *key, const char *value) {
    if (strcmp(key, "endpoint") == 0)
        o->endpoint = value;
    else if (strcmp(key, "max_inflight") == 0)
        o->max_inflight = (uint32_t)atoi(value);
    else if (strcmp(key, "credit_window") == 0)
        o->credit_window = (uint32_t)atoi(value);
    else if (strcmp(key, "max_frame_bytes") == 0)
        o->max_frame_bytes = (uint32_t)atoi(value);
    else if (strcmp(key, "heartbeat_ms") == 0)
        o->heartbeat_ms = (uint32_t)atoi(value);
    else if (strcmp(key, "tokens_per_chunk") == 0)
        o->tokens_per_chunk = atoi(value);
    else if (strcmp(key, "chunk_us") == 0)
        o->chunk_us = atoi(value);
    else if (strcmp(key, "answer_tokens") == 0)
        o->answer_tokens = atoi(value);
    else if (strcmp(key, "at") == 0)
        o->at = atoi(value);
    else if (strcmp(key, "fault") == 0) {
        for (int i = 0; i < (int)(sizeof fault_names / sizeof *fault_names); i++) {
            if (strcmp(value, fault_names[i]) != 0) continue;
            o->fault = (enum fake_fault)i;
            return 0;
        }
        return -1;
    } else
        return -1;
    return 0;
}

static void on_term(int sig) {
    (void)sig;
    close(STDIN_FILENO);
}

int main(int argc, char **argv) {
    struct fake_options o = {0};
    for (int i = 1; i < argc; i++) {
        char *eq = strchr(argv[i], '=');
        if (!eq) return 2;
        *eq = 0;
        if (set_option(&o, argv[i], eq + 1) != 0) {
            fprintf(stderr, "moed-fake: what is %s=%s?\n", argv[i], eq + 1);
            return 2;
        }
    }
    struct sigaction sa = {.sa_handler = on_term};
    sigaction(SIGTERM, &sa, NULL);
    struct fake *f = fake_start(&o);
    printf("ready\n");
    fflush(stdout);
    char c;
    while (read(STDIN_FILENO, &c, 1) > 0) {
    }
    struct fake_counts n = fake_stop(f);
    printf(
        "{\"sessions\": %d, \"submits\": %d, \"rejected\": %d, \"chunks\": %d, \"finished\": %d, "
        "\"cancelled\": %d, \"credits\": %d, \"pings\": %d, \"byes\": %d, \"bad_boot_ids\": %d, "
        "\"max_unacked\": %d, \"max_running\": %d}\n",
        n.sessions, n.submits, n.rejected, n.chunks, n.finished, n.cancelled, n.credits, n.pings,
        n.byes, n.bad_boot_ids, n.max_unacked, n.max_running);
    return 0;
}
