/* Ranks in several processes, as a person starts them: answers are those of one process, whoever computes the
 * experts; a worker that is killed or stands still, a server that is gone, and ranks that do not fit each other or
 * do not speak as they should end everything, with the reason. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "daemon/rank_frames.h"
#include "daemon/rank_link.h"
#include "tests/e2e_rig.h"

enum { KINDS = 12, MAX_WORKERS = 3, MANY = 60 };

/* ---- processes ------------------------------------------------------------------------------ */

struct cluster {
    struct daemon d;
    char at[64]; /* where workers join */
    pid_t workers[MAX_WORKERS];
    int n_workers;
};

static uint16_t free_port(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, n) != 0 ||
        getsockname(fd, (struct sockaddr *)&a, &n) != 0)
        fail_msg("no port");
    close(fd);
    return ntohs(a.sin_port);
}

static void add_worker(struct cluster *c, const char *device) {
    c->workers[c->n_workers++] =
        spawn(c->d.endpoint,
              (const char *const[]){"--worker", c->at, "--device", device, "--threads", "1", NULL});
}

/* A server with one device, and n of workers to come. */
static void cluster_start(struct cluster *c, int n, const char *parallel) {
    char number[8];
    *c = (struct cluster){0};
    snprintf(c->at, sizeof c->at, "tcp://127.0.0.1:%u", free_port());
    snprintf(number, sizeof number, "%d", n);
    daemon_start(&c->d, (const char *const[]){"--workers", number, "--worker-listen", c->at,
                                              "--parallel", parallel, "--threads", "1",
                                              "--max-seqs", "8", "--kv-blocks", "80", NULL});
}

static void expect_exit(pid_t pid, int want) {
    int status = wait_status(pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), want);
}

/* SIGTERM to all at once, as launchers do: the server drains, and the workers with it. */
static void cluster_stop(struct cluster *c) {
    for (int i = 0; i < c->n_workers; i++) kill(c->workers[i], SIGTERM);
    daemon_stop(&c->d);
    for (int i = 0; i < c->n_workers; i++) expect_exit(c->workers[i], 0);
}

/* ---- answers -------------------------------------------------------------------------------- */

static void check_answers(struct cluster *c, const struct want *alone, int n_ranks) {
    enum { N = 36 };
    static struct want all[N];
    struct client *client = connect_to(&c->d);
    submit_all(client, all, N);
    for (int i = 0; i < N; i++) {
        assert_int_equal(all[i].end, WIRE_FINISHED);
        assert_memory_equal(all[i].ids, alone[i % KINDS].ids, LENGTH * sizeof(int32_t));
        assert_string_equal(all[i].text, alone[i % KINDS].text);
    }
    for (int i = 0; i < n_ranks; i++) {
        char name[32];
        snprintf(name, sizeof name, "device_%d_step_tokens", i);
        assert_true(stat_of(client, name) > N * LENGTH / (2.0 * n_ranks));
    }
    assert_true(stat_of(client, "kv_blocks_free") == 80 * n_ranks);
    client_close(client);
}

static void test_answers(void **state) {
    (void)state;
    static const char *const modes[] = {"replica", "expert", "auto"};
    static struct want alone[KINDS];
    struct daemon d;
    daemon_start(&d, (const char *const[]){"--max-seqs", "2", "--kv-blocks", "64", NULL});
    struct client *client = connect_to(&d);
    for (int i = 0; i < KINDS; i++) {
        want_init(&alone[i], i);
        run_alone(client, &alone[i]);
    }
    client_close(client);
    daemon_stop(&d);
    for (int k = 0; k < 3; k++) { /* a worker with two devices, and one with one */
        struct cluster c;
        cluster_start(&c, 3, modes[k]);
        add_worker(&c, "cpu,cpu");
        add_worker(&c, "cpu");
        check_answers(&c, alone, 4);
        client = connect_to(&c.d);
        if (k == 1) assert_true(stat_of(client, "device_3_expert_rows") > 0);
        client_close(client);
        cluster_stop(&c);
    }
}

/* The same command, and a launcher that says which process is which. */
static void test_launched(void **state) {
    (void)state;
    struct cluster c = {0};
    snprintf(c.at, sizeof c.at, "tcp://127.0.0.1:%u", free_port());
    const char *const flags[] = {"--launched", c.at,         "--parallel", "expert", "--threads",
                                 "1",          "--max-seqs", "8",          NULL};
    setenv("SLURM_NTASKS", "3", 1);
    for (int i = 2; i >= 0; i--) {
        char number[8];
        snprintf(number, sizeof number, "%d", i);
        setenv("SLURM_PROCID", number, 1);
        setenv("SLURM_LOCALID", number, 1);
        if (i > 0)
            c.workers[c.n_workers++] = spawn("ipc:///nowhere", flags);
        else
            daemon_start(&c.d, flags);
    }
    unsetenv("SLURM_NTASKS");
    unsetenv("SLURM_PROCID");
    unsetenv("SLURM_LOCALID");
    struct client *client = connect_to(&c.d);
    struct want w;
    want_init(&w, 0);
    run_alone(client, &w);
    assert_true(stat_of(client, "device_2_expert_rows") > 0);
    client_close(client);
    cluster_stop(&c);
}

/* ---- losses --------------------------------------------------------------------------------- */

/* Long answers on all ranks; returns once they run. */
static struct client *begin_long(struct cluster *c, int n) {
    struct client *client = connect_to(&c->d);
    struct want w;
    struct wire_msg m = {0};
    want_init(&w, 6);
    for (int i = 0; i < n; i++) submit(client, &w, 900);
    while (m.type != WIRE_TOKEN_CHUNK) {
        struct error e = {0};
        assert_ok(client_next(client, ANSWER_MS, &e, &m), &e);
    }
    return client;
}

/* All that did not end before fail, or are not even accepted, and say why; n are more than can end before. */
static void expect_lost(struct client *client, int n) {
    int n_failed = 0;
    for (int n_ended = 0; n_ended < n;) {
        struct wire_msg m;
        struct error e = {0};
        assert_ok(client_next(client, ANSWER_MS, &e, &m), &e);
        n_ended += m.type == WIRE_FINISHED || m.type == WIRE_FAILED || m.type == WIRE_REJECTED;
        if (m.type == WIRE_REJECTED) assert_int_equal(m.rejected.code, ST_ENGINE_LOST);
        if (m.type != WIRE_FAILED) continue;
        assert_int_equal(m.failed.code, ST_ENGINE_LOST);
        n_failed++;
    }
    assert_int_equal(n_failed > 0, n > 0);
    client_close(client);
}

static void forget(struct cluster *c) { /* the server left them behind */
    char path[128];
    snprintf(path, sizeof path, "%s/moed.sock", c->d.dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/moed.sock.lock", c->d.dir);
    unlink(path);
    assert_int_equal(rmdir(c->d.dir), 0);
}

static void test_killed_worker(void **state) {
    (void)state;
    static const char *const modes[] = {"replica", "expert", "replica"};
    for (int k = 0; k < 3; k++) {
        const int n_requests = k < 2 ? MANY : 0; /* at the last, nothing runs */
        struct cluster c;
        cluster_start(&c, 2, modes[k]);
        add_worker(&c, "cpu");
        add_worker(&c, "cpu");
        struct client *client = n_requests > 0 ? begin_long(&c, n_requests) : connect_to(&c.d);
        kill(c.workers[0], SIGKILL);
        expect_lost(client, n_requests);
        expect_exit(c.d.pid, 1);
        expect_exit(c.workers[1], 1);
        wait_status(c.workers[0]);
        forget(&c);
    }
}

/* A worker, and a server, that only stand still: nobody hangs up, so silence has to tell. Side by side, since
 * each takes its time. */
static void test_stopped(void **state) {
    (void)state;
    struct cluster worker, server;
    cluster_start(&worker, 2, "expert");
    add_worker(&worker, "cpu");
    add_worker(&worker, "cpu");
    cluster_start(&server, 1, "replica");
    add_worker(&server, "cpu");
    struct client *lost = begin_long(&worker, MANY), *stands = begin_long(&server, 1);
    kill(worker.workers[1], SIGSTOP);
    kill(server.d.pid, SIGSTOP);
    expect_lost(lost, MANY);
    expect_exit(worker.d.pid, 1);
    expect_exit(worker.workers[0], 1);
    expect_exit(server.workers[0], 1);
    kill(worker.workers[1], SIGKILL);
    kill(server.d.pid, SIGKILL);
    wait_status(worker.workers[1]);
    wait_status(server.d.pid);
    client_close(stands);
    forget(&worker);
    forget(&server);
}

static void test_server_gone(void **state) {
    (void)state;
    struct cluster c;
    cluster_start(&c, 2, "expert");
    add_worker(&c, "cpu");
    add_worker(&c, "cpu");
    struct client *client = begin_long(&c, 2);
    kill(c.d.pid, SIGKILL);
    for (int i = 0; i < 2; i++) expect_exit(c.workers[i], 1);
    wait_status(c.d.pid);
    client_close(client);
    forget(&c);
}

/* ---- ranks that do not fit ------------------------------------------------------------------ */

/* Another model of the same shape: some bits of one tensor differ. */
static void write_other_model(char *path) {
    char buffer[65536];
    int fd = mkstemp(path);
    FILE *in = fopen(TINY_MODEL, "rb"), *out = fdopen(fd, "wb");
    size_t n, at = 0;
    assert_true(in && out);
    while ((n = fread(buffer, 1, sizeof buffer, in)) > 0) {
        for (size_t i = 0; i < n; i++, at++)
            if (at > 16000000 && at < 17000000) buffer[i] ^= 1;
        assert_int_equal(fwrite(buffer, 1, n, out), n);
    }
    fclose(in);
    assert_int_equal(fclose(out), 0);
}

static void test_misfits(void **state) {
    (void)state;
    char other[] = "/tmp/moed-e2e-other-XXXXXX";
    write_other_model(other);
    for (int k = 0; k < 2; k++) {
        struct cluster c;
        cluster_start(&c, 1, "replica");
        const char *flags[] = {"--worker", c.at, k == 0 ? "--model" : "--device",
                               k == 0 ? other : "reference", NULL};
        c.workers[0] = spawn(c.d.endpoint, flags);
        expect_exit(c.workers[0], 2);
        expect_exit(c.d.pid, 2);
        assert_int_equal(rmdir(c.d.dir), 0);
    }
    unlink(other);
}

/* ---- frames by hand ------------------------------------------------------------------------- */

static int connect_raw(const char *at) {
    struct error e = {0};
    int fd;
    assert_ok(rank_link_connect(at, UINT64_C(60000000000), &e, &fd), &e);
    return fd;
}

/* The next frame, whatever it is. */
static enum status next_frame(struct rank_link *l, struct error *e, struct rank_link_frame *f) {
    enum status st;
    do {
        st = rank_link_next(l, 1000, e, f);
    } while (st == ST_OK && f->type == RANK_LINK_NONE);
    return st;
}

/* Strangers at the ranks' address are shown out, and a rank of another version stops the start: it hears why, if it
 * can. */
static void test_strangers(void **state) {
    (void)state;
    struct cluster c;
    cluster_start(&c, 1, "replica");
    uint64_t rng = 7;
    for (int i = 0; i < 20; i++) {
        uint8_t junk[600];
        for (size_t k = 0; k < sizeof junk; k++) junk[k] = (uint8_t)test_random(&rng);
        int fd = connect_raw(c.at);
        rank_link_write_all(fd, junk, sizeof junk, clock_now_ns() + 1000000000u); /* may hang up */
        close(fd);
    }
    uint8_t header[RANK_LINK_HEADER_BYTES] = {
        'M', 'O', 'E', 'L', RANK_LINK_VERSION + 1, 0, RANK_LINK_HELLO};
    int fd = connect_raw(c.at);
    assert_int_equal(rank_link_write_all(fd, header, sizeof header, clock_now_ns() + 1000000000u),
                     ST_OK);
    struct rank_link l;
    struct rank_link_frame f;
    struct error e = {0}, why = {0};
    assert_int_equal(rank_link_create(fd, 4096, &l), ST_OK);
    assert_ok(next_frame(&l, &e, &f), &e);
    assert_int_equal(f.type, RANK_LINK_REFUSED);
    struct pass p = pass_reader(f.body, f.n);
    pass_error(&p, &why);
    assert_true(pass_done(&p) && why.code == ST_UNSUPPORTED);
    rank_link_close(&l);
    expect_exit(c.d.pid, 2);
    assert_int_equal(rmdir(c.d.dir), 0);
}

/* Everything that a rank says of itself has to agree; the server ends with the first that does not. */
static void test_hellos(void **state) {
    (void)state;
    static const enum status want[] = {ST_UNSUPPORTED, ST_CONFLICT, ST_CONFLICT,
                                       ST_CONFLICT,    ST_CONFLICT, ST_INVALID};
    struct moe_identity self;
    struct error e = {0};
    assert_ok(moe_identify(TINY_MODEL, &e, &self), &e);
    for (int kind = 0; kind < 6; kind++) {
        struct cluster c;
        cluster_start(&c, 1, "replica");
        struct rank_hello h = {
            .version = MOED_VERSION, .kind = "cpu", .launched_rank = -1, .model = self};
        if (kind == 0) h.version[0]++;
        if (kind == 1) h.kind[2] = 'x';
        if (kind == 2) h.model.shape.n_layers++;
        if (kind == 3) h.model.fingerprint ^= 1;
        if (kind == 4) h.launched_rank = 1;
        uint8_t body[256];
        struct pass p = pass_writer(body, sizeof body);
        pass_hello(&p, &h);
        assert_false(p.bad);
        struct rank_link l;
        struct rank_link_frame f;
        assert_int_equal(rank_link_create(connect_raw(c.at), 4096, &l), ST_OK);
        assert_ok(rank_link_send(&l, RANK_LINK_HELLO, body, kind == 5 ? 30 : p.at, &e), &e);
        struct error why = {0};
        assert_ok(next_frame(&l, &e, &f), &e);
        assert_int_equal(f.type, RANK_LINK_REFUSED);
        p = pass_reader(f.body, f.n);
        pass_error(&p, &why);
        assert_true(pass_done(&p));
        assert_int_equal(why.code, want[kind]);
        rank_link_close(&l);
        expect_exit(c.d.pid, 2);
        assert_int_equal(rmdir(c.d.dir), 0);
    }
}

/* A server that sends steps which do not fit: the worker says so and ends. */
static void serve_badly(struct rank_link *l, int kind) {
    uint8_t body[4096] = {0};
    struct moe_step_seq seq = {.n_tokens = 1, .n_blocks = 1, .rows = MOE_ROWS_NONE};
    int32_t id = 5, block = 0;
    if (kind == 1) block = 1000;
    if (kind == 2) id = -2;
    if (kind == 3) seq.slot = 99;
    if (kind == 4) seq.rows = MOE_ROWS_SAMPLE; /* of a slot that was not started */
    struct moe_step step = {1, 1, &seq, &id, &block};
    struct rank_step_head head = {0};
    struct pass p = pass_writer(body, sizeof body);
    struct error e;
    pass_step_head(&p, &head);
    pass_step(&p, &step, NULL, 8);
    assert_false(p.bad);
    rank_link_send(l, RANK_LINK_STEP, body, kind == 5 ? p.at - 4 : p.at, &e);
}

static void expect_frame(struct rank_link *l, enum rank_link_type type, struct rank_link_frame *f) {
    struct error e = {0};
    assert_ok(next_frame(l, &e, f), &e);
    assert_int_equal(f->type, type);
}

static void test_bad_server(void **state) {
    (void)state;
    for (int kind = 0; kind < 6; kind++) { /* 0: nothing is wrong */
        char at[64];
        struct error e = {0};
        int listener, fd;
        snprintf(at, sizeof at, "tcp://127.0.0.1:%u", free_port());
        assert_ok(rank_link_listen(at, &e, &listener), &e);
        pid_t pid = spawn("ipc:///nowhere", (const char *const[]){"--worker", at, NULL});
        while ((fd = rank_link_accept(listener)) < 0) usleep(1000);
        close(listener);
        struct rank_link l;
        struct rank_link_frame f;
        assert_int_equal(rank_link_create(fd, 1 << 20, &l), ST_OK);
        expect_frame(&l, RANK_LINK_HELLO, &f);
        struct rank_welcome w = {.rank = 1,
                                 .n_ranks = 2,
                                 .limits = {.max_batch_tokens = 8,
                                            .max_seqs = 8,
                                            .max_rows = 8,
                                            .block_tokens = 16,
                                            .n_blocks = 64}};
        uint8_t body[1024];
        struct pass p = pass_writer(body, sizeof body);
        pass_welcome(&p, &w);
        assert_ok(rank_link_send(&l, RANK_LINK_WELCOME, body, p.at, &e), &e);
        expect_frame(&l, RANK_LINK_OPENED, &f);
        for (int i = 0; i < 100; i++) /* answers to nothing */
            assert_ok(rank_link_send(&l, RANK_LINK_REST, NULL, 0, &e), &e);
        serve_badly(&l, kind);
        expect_frame(&l, kind == 0 ? RANK_LINK_RESULT : RANK_LINK_LOST, &f);
        if (kind > 0) {
            struct error why = {0};
            p = pass_reader(f.body, f.n);
            pass_error(&p, &why);
            assert_true(pass_done(&p));
            assert_int_equal(why.code, ST_INVALID);
        } else {
            assert_ok(rank_link_send(&l, RANK_LINK_BYE, NULL, 0, &e), &e);
        }
        expect_exit(pid, kind == 0 ? 0 : 1);
        rank_link_close(&l);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers),       cmocka_unit_test(test_launched),
        cmocka_unit_test(test_killed_worker), cmocka_unit_test(test_stopped),
        cmocka_unit_test(test_server_gone),   cmocka_unit_test(test_misfits),
        cmocka_unit_test(test_strangers),     cmocka_unit_test(test_hellos),
        cmocka_unit_test(test_bad_server),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
