/* The daemon as a process, on the bundled model, by way of the client library: many streams on too
 * few blocks answer as each does alone, nothing leaks, and neither killed clients, garbage, a
 * second daemon nor SIGTERM hurt. */
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <zmq.h>

#include "tests/e2e_rig.h"

#ifdef __SANITIZE_THREAD__ /* arithmetic is some fifty times slower under it */
enum { CROWD = 75 };
#else
enum { CROWD = 300 };
#endif
/* ---- tests ---------------------------------------------------------------------------------- */

static void test_crowd(void **state) {
    (void)state;
    enum { N = CROWD, SESSIONS = 5, PER = N / SESSIONS, KINDS = 12 };
    struct daemon d;
    /* An answer takes up to 4 blocks; 96 are enough for some 40 at a time, and 64 may run. */
    daemon_start(&d,
                 (const char *const[]){"--max-seqs", "64", "--kv-blocks", "96", "--max-seq-tokens",
                                       "256", "--max-batch-tokens", "128", NULL});
    struct client *c[SESSIONS];
    static struct want alone[KINDS], all[N];
    for (int i = 0; i < SESSIONS; i++) c[i] = connect_to(&d);
    for (int i = 0; i < KINDS; i++) {
        want_init(&alone[i], i);
        run_alone(c[0], &alone[i]);
    }
    assert_memory_not_equal(alone[0].ids, alone[6].ids, LENGTH * sizeof(int32_t)); /* sampled */
    uint64_t first[SESSIONS];
    for (int s = 0; s < SESSIONS; s++) {
        for (int i = 0; i < PER; i++) {
            want_init(&all[s * PER + i], s * PER + i);
            uint64_t id = submit(c[s], &all[s * PER + i], LENGTH);
            if (i == 0) first[s] = id;
            assert_true(id == first[s] + (uint64_t)i);
        }
    }
    for (int n = 0; n < N;) {
        struct pollfd fds[SESSIONS];
        for (int s = 0; s < SESSIONS; s++)
            fds[s] = (struct pollfd){.fd = client_fd(c[s]), .events = POLLIN};
        if (poll(fds, SESSIONS, ANSWER_MS) <= 0) fail_msg("%d of %d are unanswered", N - n, N);
        for (int s = 0; s < SESSIONS; s++) {
            struct wire_msg m;
            struct error e = {0};
            enum status st;
            while ((st = client_next(c[s], 0, &e, &m)) == ST_OK) {
                struct want *w = &all[s * PER + (int)(m.request_id - first[s])];
                take(w, &m);
                n += m.type == WIRE_FINISHED || m.type == WIRE_FAILED || m.type == WIRE_REJECTED;
            }
            if (st != ST_TIMEOUT) fail_msg("session %d: %s", s, e.text);
        }
    }
    for (int i = 0; i < N; i++) {
        const struct want *w = &all[i], *a = &alone[i % KINDS];
        assert_int_equal(w->n_accepted, 1);
        assert_int_equal(w->n_ended, 1);
        assert_int_equal(w->end, WIRE_FINISHED);
        assert_int_equal(w->n_ids, LENGTH);
        assert_memory_equal(w->ids, a->ids, LENGTH * sizeof(int32_t));
        assert_string_equal(w->text, a->text);
    }
    assert_true(stat_of(c[0], "kv_blocks_held") == 0);
    assert_true(stat_of(c[0], "kv_blocks_free") == 96);
    assert_true(stat_of(c[0], "kv_blocks_held_peak") > 80);
    assert_true(stat_of(c[0], "requests_in_flight") == 0);
    assert_true(stat_of(c[0], "requests_accepted") == N + KINDS);
    assert_true(stat_of(c[0], "requests_finished_length") == N + KINDS);
    assert_true(stat_of(c[0], "requests_rejected") == 0);
    assert_true(stat_of(c[0], "expert_reads") < 0.5 * stat_of(c[0], "expert_reads_ungrouped"));
    for (int i = 0; i < SESSIONS; i++) client_close(c[i]);
    daemon_stop(&d);
}

/* --check, --version and refusals: what a person sees. */
static void run_moed(const char *const *flags, int want_status, const char *want_output) {
    char output[8192], command[2048] = TEST_BIN "/moed";
    for (; *flags; flags++) {
        size_t n = strlen(command);
        snprintf(command + n, sizeof command - n, " '%s'", *flags);
    }
    size_t n = strlen(command);
    snprintf(command + n, sizeof command - n, " 2>&1");
    FILE *f = popen(command, "r");
    assert_non_null(f);
    output[fread(output, 1, sizeof output - 1, f)] = '\0';
    int status = pclose(f);
    assert_int_equal(WEXITSTATUS(status), want_status);
    if (!strstr(output, want_output)) fail_msg("\"%s\" is not in: %s", want_output, output);
}

/* Several devices behind one daemon say what one says, each with the whole model or all with shares of it. */
static void test_devices(void **state) {
    (void)state;
    enum { N = 36, KINDS = 12 };
    struct daemon d;
    static struct want alone[KINDS], all[N];
    daemon_start(&d, (const char *const[]){"--max-seqs", "2", "--kv-blocks", "64", NULL});
    struct client *c = connect_to(&d);
    for (int i = 0; i < KINDS; i++) {
        want_init(&alone[i], i);
        run_alone(c, &alone[i]);
    }
    client_close(c);
    daemon_stop(&d);
    static const char *const modes[] = {"replica", "auto", "expert", "expert"};
    char load_path[64];
    snprintf(load_path, sizeof load_path, "/tmp/moed-e2e-load-%d.csv", (int)getpid());
    for (int k = 0; k < 4; k++) { /* the last begins with the load that the one before measured */
        daemon_start(&d, (const char *const[]){"--device", "cpu,cpu", "--parallel", modes[k],
                                               "--max-seqs", "8", "--kv-blocks", "24",
                                               k > 1 ? "--expert-load" : NULL, load_path, NULL});
        c = connect_to(&d);
        submit_all(c, all, N);
        for (int i = 0; i < N; i++) {
            assert_int_equal(all[i].end, WIRE_FINISHED);
            assert_memory_equal(all[i].ids, alone[i % KINDS].ids, LENGTH * sizeof(int32_t));
            assert_string_equal(all[i].text, alone[i % KINDS].text);
        }
        /* Half each, give or take what preemption computes again. */
        double a = stat_of(c, "device_0_step_tokens"), b = stat_of(c, "device_1_step_tokens");
        assert_true(a > 0.3 * (a + b) && b > 0.3 * (a + b));
        assert_true(stat_of(c, "kv_blocks_free") == 48);
        if (k > 1) {
            double rows = 0, want = 1;
            for (int i = 0; i < 500 && rows != want; i++) { /* the last step may not be back yet */
                rows = stat_of(c, "device_0_expert_rows") + stat_of(c, "device_1_expert_rows");
                want = stat_of(c, "expert_reads_ungrouped");
            }
            assert_true(rows == want);
            assert_true(stat_of(c, "expert_imbalance") < 1.5);
        }
        client_close(c);
        daemon_stop(&d);
    }
    FILE *f = fopen(load_path, "r");
    assert_non_null(f);
    char line[64];
    int n_lines = 0;
    while (fgets(line, sizeof line, f)) n_lines++;
    fclose(f);
    assert_true(n_lines > 1 && (n_lines - 1) % 4 == 0);
    run_moed((const char *const[]){"--model", TINY_MODEL, "--device", "cpu,cpu", "--parallel",
                                   "expert", "--check", "--expert-load", load_path, NULL},
             0, "backend   cpu ");
    assert_int_equal(truncate(load_path, 100), 0);
    run_moed((const char *const[]){"--model", TINY_MODEL, "--device", "cpu,cpu", "--parallel",
                                   "expert", "--check", "--expert-load", load_path, NULL},
             2, load_path);
    unlink(load_path);
}

/* Everything between the socket and the weights, held against the reference outputs. */
static void test_reference_answer(void **state) {
    (void)state;
    enum { N = 12 };
    struct daemon d;
    daemon_start(&d, (const char *const[]){"--device", "reference", "--max-seqs", "2",
                                           "--kv-blocks", "64", "--max-seq-tokens", "512", NULL});
    struct client *c = connect_to(&d);
    struct golden *g = golden_load();
    int n_prompts = 0;
    for (int p = 0; p < g->n_prompts && n_prompts < 3; p++) {
        const struct golden_prompt *gp = &g->prompts[p];
        if (gp->n_ids > 40 || gp->n_greedy < N) continue;
        n_prompts++;
        struct wire_submit s = {.prompt_ids = gp->ids,
                                .n_prompt_ids = (size_t)gp->n_ids,
                                .sampling = {.top_p = 1, .repetition_penalty = 1},
                                .has_max_tokens = true,
                                .max_tokens = N,
                                .ignore_eos = true,
                                .priority = 1,
                                .n = 1};
        struct error e = {0};
        uint64_t id;
        struct want w = {0};
        assert_ok(client_submit(c, &s, &e, &id), &e);
        while (w.n_ended == 0) {
            struct wire_msg m;
            assert_ok(client_next(c, ANSWER_MS, &e, &m), &e);
            take(&w, &m);
        }
        assert_int_equal(w.n_ids, N);
        assert_memory_equal(w.ids, gp->greedy, N * sizeof(int32_t));
    }
    assert_int_equal(n_prompts, 3);
    golden_free(g);
    client_close(c);
    daemon_stop(&d);
}

static void test_killed_client(void **state) {
    (void)state;
    struct daemon d;
    daemon_start(&d, (const char *const[]){"--max-seqs", "8", "--kv-blocks", "2048", NULL});
    int ready[2];
    char byte;
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) { /* a client in the middle of eight long answers */
        struct client *c = connect_to(&d);
        struct want w;
        want_init(&w, 0);
        for (int i = 0; i < 8; i++) submit(c, &w, 4000);
        for (;;) {
            struct wire_msg m;
            if (client_next(c, ANSWER_MS, NULL, &m) != ST_OK) _exit(1);
            if (m.type == WIRE_TOKEN_CHUNK && write(ready[1], "x", 1) != 1) _exit(1);
        }
    }
    for (int i = 0; i < 30; i++) assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    struct client *c = connect_to(&d);
    assert_true(stat_of(c, "kv_blocks_held") > 0);
    assert_true(stat_of(c, "requests_in_flight") == 8);
    kill(pid, SIGKILL);
    wait_status(pid);
    close(ready[1]);
    wait_stat(c, "requests_in_flight", 0);
    assert_true(stat_of(c, "kv_blocks_held") == 0);
    assert_true(stat_of(c, "requests_dropped") == 8);
    assert_true(stat_of(c, "sessions") == 1);
    client_close(c);
    daemon_stop(&d);
}

static void test_sigterm_under_load(void **state) {
    (void)state;
    enum { N = 40 };
    struct daemon d;
    daemon_start(&d, (const char *const[]){"--max-seqs", "8", "--kv-blocks", "256", NULL});
    struct client *c = connect_to(&d);
    static struct want all[N];
    uint64_t first = 0;
    for (int i = 0; i < N; i++) {
        want_init(&all[i], i);
        uint64_t id = submit(c, &all[i], LENGTH);
        if (i == 0) first = id;
    }
    struct want late;
    uint64_t late_id = 0;
    int n_ended = 0, n_accepted = 0;
    want_init(&late, 0);
    while (n_ended < N || late.n_ended == 0) {
        struct wire_msg m;
        struct error e = {0};
        assert_ok(client_next(c, ANSWER_MS, &e, &m), &e);
        if (late_id != 0 && m.request_id == late_id) {
            take(&late, &m);
            if (m.type == WIRE_REJECTED) assert_int_equal(m.rejected.code, ST_DRAINING);
            continue;
        }
        struct want *w = &all[m.request_id - first];
        take(w, &m);
        n_ended += m.type == WIRE_FINISHED || m.type == WIRE_FAILED || m.type == WIRE_REJECTED;
        n_accepted += m.type == WIRE_ACCEPTED;
        if (n_accepted == N && late_id == 0) {
            kill(d.pid, SIGTERM);
            struct wire_msg health = {.type = WIRE_HEALTH}, reply;
            do { /* until the signal has arrived */
                assert_ok(client_call(c, &health, ANSWER_MS, &e, &reply), &e);
            } while (reply.health.ready);
            late_id = submit(c, &late, LENGTH);
        }
    }
    for (int i = 0; i < N; i++) {
        assert_int_equal(all[i].n_ended, 1);
        assert_int_equal(all[i].end, WIRE_FINISHED);
        assert_int_equal(all[i].n_ids, LENGTH);
    }
    assert_int_equal(late.end, WIRE_REJECTED);
    int status = wait_status(d.pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(rmdir(d.dir), 0);
    client_close(c);
}

/* Bytes that are not ZMTP, and ZMTP that is not moed. */
static void send_garbage(const struct daemon *d) {
    uint64_t rng = 99;
    uint8_t junk[3000];
    for (int round = 0; round < 30; round++) {
        for (size_t i = 0; i < sizeof junk; i++) junk[i] = (uint8_t)test_random(&rng);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        struct sockaddr_un to = {.sun_family = AF_UNIX};
        snprintf(to.sun_path, sizeof to.sun_path, "%s", d->endpoint + 6);
        if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0) fail_msg("connect");
        ssize_t w = send(fd, junk, sizeof junk, MSG_NOSIGNAL);
        (void)w; /* the daemon may hang up first */
        close(fd);
    }
    void *ctx = zmq_ctx_new(), *sock = zmq_socket(ctx, ZMQ_DEALER);
    int linger = 1000;
    zmq_setsockopt(sock, ZMQ_LINGER, &linger, sizeof linger);
    assert_int_equal(zmq_connect(sock, d->endpoint), 0);
    for (int round = 0; round < 300; round++) {
        int n_frames = 1 + (int)(test_random(&rng) % 4);
        for (int i = 0; i < n_frames; i++) {
            size_t n = test_random(&rng) % sizeof junk;
            junk[0] = (uint8_t)test_random(&rng);
            zmq_send(sock, junk, n, i + 1 < n_frames ? ZMQ_SNDMORE : 0);
        }
    }
    zmq_close(sock);
    zmq_ctx_term(ctx);
}

static void test_garbage_and_second_daemon(void **state) {
    (void)state;
    struct daemon d;
    daemon_start(&d, (const char *const[]){"--max-seqs", "8", "--kv-blocks", "256", NULL});
    struct client *c = connect_to(&d);
    struct want before, after;
    want_init(&before, 0);
    want_init(&after, 0);
    run_alone(c, &before);
    send_garbage(&d);
    pid_t second = spawn(d.endpoint, (const char *const[]){"--max-seqs", "8", NULL});
    int status = wait_status(second);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 2);
    run_alone(c, &after);
    assert_string_equal(after.text, before.text);
    /* 300 messages, and what libzmq took for an old peer's in the raw bytes. */
    assert_true(stat_of(c, "messages_malformed") >= 300);
    wait_stat(c, "sessions", 1);
    client_close(c);
    daemon_stop(&d);
}

static void test_command_line(void **state) {
    (void)state;
    run_moed((const char *const[]){"--help", NULL}, 0, "Usage: moed --model FILE");
    run_moed((const char *const[]){"--version", NULL}, 0, "moed 0.");
    run_moed((const char *const[]){"--model", TINY_MODEL, "--check", NULL}, 0, "weights");
    run_moed((const char *const[]){"--model", TINY_MODEL, "--check", NULL}, 0, "backend   cpu ");
    run_moed((const char *const[]){NULL}, 2, "--model is missing");
    run_moed((const char *const[]){"--model", "/nonexistent.gguf", "--check", NULL}, 2,
             "/nonexistent.gguf");
    run_moed((const char *const[]){"--model", TINY_MODEL, "--listen", "tcp://127.0.0.1:1", NULL}, 2,
             "only ipc:// endpoints");
    run_moed((const char *const[]){"--model", TINY_MODEL, "--max-seqs", "0", NULL}, 2,
             "must lie between 1 and");
    run_moed((const char *const[]){"--model", TINY_MODEL, "--cpu-isa", "abacus", "--check", NULL},
             2, "abacus");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_killed_client), /* forks: before this process has a ZeroMQ thread */
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_devices),
        cmocka_unit_test(test_reference_answer),
        cmocka_unit_test(test_sigterm_under_load),
        cmocka_unit_test(test_garbage_and_second_daemon),
        cmocka_unit_test(test_command_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
