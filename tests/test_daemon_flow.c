/* Flow control, disconnects, draining, a lost engine, and a ledger under random faults: every
 * accepted request of a living session ends exactly once, and nothing is left behind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/daemon_rig.h"

static const int32_t prompt[] = {600, 601, 602, 603, 604};
enum { N_PROMPT = 5 };

static void start(struct rig *r, struct peer *p, const struct rig_options *o) {
    rig_start(r, o);
    peer_open(p, r);
    peer_hello(p);
}

static void stop(struct rig *r, struct peer *p) {
    peer_wait_stat(p, "kv_blocks_held", 0);
    peer_wait_stat(p, "requests_in_flight", 0);
    peer_close(p);
    assert_int_equal(rig_stop(r), ST_OK);
}

static void submit(struct peer *p, uint64_t id, uint32_t max_tokens) {
    struct wire_msg m = submit_ids(id, prompt, N_PROMPT, max_tokens);
    peer_send(p, &m);
    peer_expect(p, WIRE_ACCEPTED, id, &m);
}

static void check_answer(const struct answer *a, uint64_t seed, int32_t n) {
    static int32_t want[4096];
    fake_answer(prompt, N_PROMPT, seed, want, n);
    assert_int_equal(a->n_ids, n);
    assert_memory_equal(a->ids, want, (size_t)n * sizeof *want);
}

/* ---- slow readers --------------------------------------------------------------------------- */

static const struct rig_options long_answers = {.max_seq_tokens = 4096, .n_blocks = 1024};

/* Without Credit: a window of chunks, then silence; with it: the rest, and not a token wrong. */
static void test_window(void **state) {
    (void)state;
    enum { LENGTH = 1000 };
    struct rig r;
    struct peer p, watch;
    struct wire_msg m;
    static struct answer a;
    memset(&a, 0, sizeof a);
    start(&r, &p, &long_answers);
    peer_open(&watch, &r);
    peer_hello(&watch);
    p.auto_credit = false;
    submit(&p, 1, LENGTH);
    for (int i = 0; i < 128; i++) {
        peer_expect(&p, WIRE_TOKEN_CHUNK, 1, &m);
        answer_chunk(&a, &m);
    }
    /* All of it is computed, its blocks are free, but neither text nor Finished comes. */
    peer_wait_stat(&watch, "completion_tokens", LENGTH);
    peer_wait_stat(&watch, "kv_blocks_held", 0);
    assert_false(peer_poll(&p, 50, &m));
    assert_true(peer_stat(&watch, "requests_in_flight") == 1);
    peer_credit(&p, 1);
    peer_expect(&p, WIRE_TOKEN_CHUNK, 1, &m);
    answer_chunk(&a, &m);
    assert_true(m.chunk.n_ids > 1); /* what had gathered, in one */
    peer_expect(&p, WIRE_FINISHED, 1, &m);
    check_answer(&a, 1, LENGTH);
    assert_true(m.finished.choices[0].hash == a.hash);
    assert_int_equal(m.finished.choices[0].last_seq, a.n_chunks);
    peer_close(&watch);
    stop(&r, &p);
}

/* Far behind: the sequence is taken out, its blocks serve others, and it comes back when the client
 * has read. */
static void test_hold_and_release(void **state) {
    (void)state;
    enum { LENGTH = 3000 };
    struct rig r;
    struct peer slow, fast;
    struct wire_msg m;
    static int32_t ids[LENGTH], want[LENGTH];
    int n = 0;
    start(&r, &slow, &long_answers);
    peer_open(&fast, &r);
    peer_hello(&fast);
    slow.auto_credit = false;
    submit(&slow, 1, LENGTH);
    for (int i = 0; i < 128; i++) {
        peer_expect(&slow, WIRE_TOKEN_CHUNK, 1, &m);
        for (size_t k = 0; k < m.chunk.n_ids; k++) ids[n++] = m.chunk.ids[k];
    }
    peer_wait_stat(&fast, "kv_blocks_held", 0);
    peer_wait_stat(&fast, "sequences_running", 0);
    assert_true(peer_stat(&fast, "requests_in_flight") == 1);
    /* The other client does not notice. */
    struct answer a;
    submit(&fast, 2, 50);
    peer_collect(&fast, 2, &a, &m);
    check_answer(&a, 2, 50);
    /* One that joins a held session waits with it. */
    m = submit_ids(5, prompt, N_PROMPT, 20);
    peer_send(&slow, &m);
    peer_expect(&slow, WIRE_ACCEPTED, 5, &m);
    assert_false(peer_poll(&slow, 50, &m));
    assert_true(peer_stat(&fast, "completion_tokens") == 50); /* the other client's */
    peer_credit(&slow, 128);
    slow.auto_credit = true;
    bool done[6] = {false};
    uint64_t hash = 0;
    while (!done[1] || !done[5]) {
        peer_next(&slow, &m);
        if (m.type == WIRE_FINISHED) {
            done[m.request_id] = true;
            if (m.request_id == 1) hash = m.finished.choices[0].hash;
        } else {
            assert_int_equal(m.type, WIRE_TOKEN_CHUNK);
            for (size_t i = 0; m.request_id == 1 && i < m.chunk.n_ids; i++)
                ids[n++] = m.chunk.ids[i];
        }
    }
    fake_answer(prompt, N_PROMPT, 1, want, LENGTH);
    assert_int_equal(n, LENGTH);
    assert_memory_equal(ids, want, sizeof want);
    uint64_t want_hash = WIRE_HASH_START;
    for (int i = 0; i < LENGTH; i++) want_hash = wire_hash_id(want_hash, want[i]);
    assert_true(hash == want_hash);
    peer_close(&fast);
    stop(&r, &slow);
}

static void test_slow_consumer_fails(void **state) {
    (void)state;
    struct rig r;
    struct peer slow, fast;
    struct wire_msg m;
    struct rig_options o = long_answers;
    o.stall_ms = 100;
    start(&r, &slow, &o);
    peer_open(&fast, &r);
    peer_hello(&fast);
    slow.auto_credit = false;
    submit(&slow, 1, 3000); /* will be held */
    submit(&fast, 2, 20);
    peer_expect_after_chunks(&fast, WIRE_FINISHED, 2, &m);
    peer_expect_after_chunks(&slow, WIRE_FAILED, 1, &m);
    assert_int_equal(m.failed.code, ST_SLOW_CONSUMER);
    assert_true(m.failed.retryable);
    peer_wait_stat(&fast, "requests_in_flight", 0);
    /* The same for an answer that is complete but not read. The window is still shut. */
    submit(&slow, 3, 200);
    peer_expect(&slow, WIRE_FAILED, 3, &m);
    assert_int_equal(m.failed.code, ST_SLOW_CONSUMER);
    assert_true(peer_stat(&fast, "requests_failed_slow_consumer") == 2);
    /* The session lives: once it reads, it is served. */
    peer_credit(&slow, 128);
    slow.auto_credit = true;
    struct answer a;
    submit(&slow, 4, 30);
    peer_collect(&slow, 4, &a, &m);
    check_answer(&a, 4, 30);
    peer_close(&fast);
    stop(&r, &slow);
}

/* Several requests share a window: each gets its turn, and all end. */
static void test_window_is_shared(void **state) {
    (void)state;
    enum { N = 40, LENGTH = 100 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    static struct answer answers[N + 1];
    memset(answers, 0, sizeof answers);
    start(&r, &p, &(struct rig_options){.max_seqs = 16, .n_blocks = 256});
    p.auto_credit = false;
    for (uint64_t i = 1; i <= N; i++) {
        m = submit_ids(i, prompt, N_PROMPT, LENGTH);
        peer_send(&p, &m);
    }
    for (int n = 0; n < N;) {
        peer_next(&p, &m);
        if (m.type == WIRE_TOKEN_CHUNK) {
            answer_chunk(&answers[m.request_id], &m);
            /* A client that acknowledges rarely, but does. */
            if (m.chunk.session_seq % 100 == 0) peer_credit(&p, m.chunk.session_seq);
            assert_true(m.chunk.session_seq <= 128 + m.chunk.session_seq / 100 * 100);
        } else if (m.type == WIRE_FINISHED) {
            check_answer(&answers[m.request_id], m.request_id, LENGTH);
            n++;
        } else {
            assert_int_equal(m.type, WIRE_ACCEPTED);
        }
    }
    stop(&r, &p);
}

/* Let the gated engine run one step, and read the chunks that come of it. */
static void one_step(struct rig *r, struct peer *p) {
    double steps = peer_stat(p, "steps");
    fake_let(r, 1);
    peer_wait_stat(p, "steps", steps + 1);
}

/* While the window is all but shut, whose turn it is moves on: nobody is served twice before the
 * other once. */
static void test_turns(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p, &(struct rig_options){0});
    atomic_store(&r.fake.gated, true);
    p.auto_credit = false;
    submit(&p, 1, 200);
    submit(&p, 2, 200);
    int n_of[3] = {0};
    uint64_t last = 0;
    while (p.last_session_seq < 128) one_step(&r, &p); /* fill the window */
    for (uint64_t credit = 1; credit <= 20; credit++) {
        one_step(&r, &p); /* both have something again */
        peer_credit(&p, credit);
        peer_next(&p, &m);
        assert_int_equal(m.type, WIRE_TOKEN_CHUNK);
        assert_true(m.request_id != last);
        last = m.request_id;
        n_of[last]++;
    }
    assert_int_equal(n_of[1], 10);
    assert_int_equal(n_of[2], 10);
    fake_ungate(&r);
    p.auto_credit = true;
    peer_credit(&p, 148);
    for (int n = 0; n < 2; n += m.type == WIRE_FINISHED) peer_next(&p, &m);
    stop(&r, &p);
}

/* A client that reads nothing at all and asks for ever: its queue fills, it loses its session,
 * others do not care. */
static void test_deaf_client(void **state) {
    (void)state;
    struct rig r;
    struct peer deaf, fast;
    struct wire_msg m;
    start(&r, &fast, &(struct rig_options){0});
    peer_open(&deaf, &r);
    peer_hello(&deaf);
    submit(&deaf, 1, 200);
    for (int i = 0; i < 20000; i++) {
        m = (struct wire_msg){.type = WIRE_STATS, .request_id = (uint64_t)i};
        peer_send(&deaf, &m);
        if (i % 500 == 0 && peer_stat(&fast, "sessions_lost") > 0) break;
    }
    peer_wait_stat(&fast, "sessions_lost", 1);
    struct answer a;
    submit(&fast, 2, 30);
    peer_collect(&fast, 2, &a, &m);
    check_answer(&a, 2, 30);
    peer_close(&deaf);
    stop(&r, &fast);
}

/* ---- disconnects ---------------------------------------------------------------------------- */

static void test_disconnect(void **state) {
    (void)state;
    struct rig r;
    struct peer gone, watch;
    struct wire_msg m;
    start(&r, &watch, &(struct rig_options){.max_seqs = 2});
    atomic_store(&r.fake.step_us, 2000);
    peer_open(&gone, &r);
    peer_hello(&gone);
    for (uint64_t i = 1; i <= 6; i++) { /* two run, four wait; the first answers come meanwhile */
        m = submit_ids(i, prompt, N_PROMPT, 200);
        peer_send(&gone, &m);
        do {
            peer_next(&gone, &m);
        } while (m.type == WIRE_TOKEN_CHUNK);
        assert_int_equal(m.type, WIRE_ACCEPTED);
    }
    peer_wait_stat(&watch, "sequences_running", 2);
    assert_true(peer_stat(&watch, "kv_blocks_held") > 0);
    peer_close(&gone); /* no Bye */
    peer_wait_stat(&watch, "requests_in_flight", 0);
    assert_true(peer_stat(&watch, "kv_blocks_held") == 0);
    assert_true(peer_stat(&watch, "requests_dropped") == 6);
    assert_true(peer_stat(&watch, "sessions") == 1);
    /* With Bye. */
    peer_open(&gone, &r);
    peer_hello(&gone);
    submit(&gone, 1, 200);
    m = (struct wire_msg){.type = WIRE_BYE};
    peer_send(&gone, &m);
    do {
        peer_next(&gone, &m);
    } while (m.type == WIRE_TOKEN_CHUNK);
    assert_int_equal(m.type, WIRE_GOODBYE);
    peer_wait_stat(&watch, "requests_dropped",
                   7); /* Goodbye is sent before the session is cleared */
    assert_true(peer_stat(&watch, "kv_blocks_held") == 0);
    peer_close(&gone);
    stop(&r, &watch);
}

/* ---- the ledger ----------------------------------------------------------------------------- */

enum { PEERS = 6, IDS = 40 };

struct ledger {
    struct peer peer;
    bool open;
    int submitted[IDS], accepted[IDS], ended[IDS], rejected[IDS];
    uint64_t unacknowledged;
    bool lazy; /* acknowledges only now and then */
};

static void ledger_open(struct ledger *l, const struct rig *r) {
    memset(l, 0, sizeof *l);
    peer_open(&l->peer, r);
    peer_hello(&l->peer);
    l->peer.auto_credit = false;
    l->open = true;
}

static void ledger_take(struct ledger *l, const struct wire_msg *m) {
    uint64_t id = m->request_id;
    switch (m->type) {
    case WIRE_ACCEPTED: l->accepted[id]++; break;
    case WIRE_REJECTED: l->rejected[id]++; break;
    case WIRE_FINISHED:
    case WIRE_FAILED: l->ended[id]++; break;
    case WIRE_TOKEN_CHUNK:
        assert_true(l->accepted[id] == l->ended[id] + 1); /* never before, never after */
        l->unacknowledged = m->chunk.session_seq;
        break;
    default: break;
    }
    assert_true(id >= IDS ||
                (l->accepted[id] <= l->submitted[id] && l->ended[id] <= l->accepted[id]));
}

static void ledger_drain(struct ledger *l, int timeout_ms) {
    struct wire_msg m;
    while (peer_poll(&l->peer, timeout_ms, &m)) ledger_take(l, &m);
}

static void ledger_act(struct ledger *l, const struct rig *r, uint64_t *rng) {
    struct wire_msg m;
    uint64_t id = 1 + test_random(rng) % (IDS - 1), dice = test_random(rng) % 100;
    if (!l->open) {
        ledger_open(l, r);
        l->lazy = dice < 30;
    } else if (dice < 55) {
        if (l->submitted[id] > 0) return; /* one life an id keeps the books simple */
        int32_t ids[40];
        size_t n = 1 + test_random(rng) % 40;
        for (size_t i = 0; i < n; i++) ids[i] = 600 + (int32_t)(test_random(rng) % 100);
        if (dice < 9) ids[0] = FAKE_NUMERIC;
        m = submit_ids(id, ids, n, (uint32_t)(1 + test_random(rng) % 100));
        m.submit.n = (uint32_t)(1 + test_random(rng) % 3);
        m.submit.ttl_ms = dice < 15 ? (uint32_t)(1 + test_random(rng) % 20) : 0;
        m.submit.priority = (uint32_t)(test_random(rng) % 3);
        if (dice >= 45) { /* as text */
            m.submit.n_prompt_ids = 0;
            m.submit.prompt_text =
                (struct bytes){(const uint8_t *)"some words to continue", n % 22 + 1};
        }
        l->submitted[id]++;
        peer_send(&l->peer, &m);
    } else if (dice < 70) {
        m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = id};
        peer_send(&l->peer, &m);
    } else if (dice < 95) {
        ledger_drain(l, 0);
        if (!l->lazy || dice < 75) peer_credit(&l->peer, l->unacknowledged);
    } else if (dice < 97) {
        peer_close(&l->peer); /* and its books with it */
        l->open = false;
    }
}

static void settle(struct ledger *l) {
    /* Read and acknowledge until nothing has come for a while and every request has ended. */
    for (int round = 0; round < 200; round++) {
        ledger_drain(l, 20);
        peer_credit(&l->peer, l->unacknowledged);
        bool open = false;
        for (int i = 0; i < IDS; i++)
            open = open || l->submitted[i] != l->ended[i] + l->rejected[i];
        if (!open) return;
    }
    for (int i = 0; i < IDS; i++)
        if (l->submitted[i] != l->ended[i] + l->rejected[i])
            fail_msg("request %d: submitted %d, accepted %d, rejected %d, ended %d", i,
                     l->submitted[i], l->accepted[i], l->rejected[i], l->ended[i]);
}

static double ledger_rounds(uint64_t seed, int depth) {
    struct rig r;
    struct peer watch;
    static struct ledger ledgers[PEERS];
    memset(ledgers, 0, sizeof ledgers);
    uint64_t rng = seed;
    start(&r, &watch,
          &(struct rig_options){.max_seqs = 6, .n_blocks = 24, .max_queue = 40, .depth = depth});
    atomic_store(&r.fake.step_us, 50);
    for (int i = 0; i < 4000; i++) ledger_act(&ledgers[test_random(&rng) % PEERS], &r, &rng);
    for (int i = 0; i < PEERS; i++) {
        if (!ledgers[i].open) continue;
        settle(&ledgers[i]);
        ledger_drain(&ledgers[i], 30); /* nothing comes after an end */
        peer_close(&ledgers[i].peer);
    }
    peer_wait_stat(&watch, "sessions", 1);
    peer_wait_stat(&watch, "requests_in_flight", 0);
    double ended = peer_stat(&watch, "requests_failed") + peer_stat(&watch, "requests_dropped");
    static const char *const finished[] = {"requests_finished_stop", "requests_finished_length",
                                           "requests_finished_cancelled",
                                           "requests_finished_timeout"};
    for (int i = 0; i < 4; i++) ended += peer_stat(&watch, finished[i]);
    assert_true(peer_stat(&watch, "requests_accepted") == ended);
    assert_true(ended > 100 && peer_stat(&watch, "requests_dropped") > 0);
    assert_true(peer_stat(&watch, "requests_finished_cancelled") > 0);
    double n_numeric = peer_stat(&watch, "requests_failed_numeric");
    stop(&r, &watch);
    return n_numeric;
}

static void test_ledger(void **state) {
    (void)state;
    double n_numeric = ledger_rounds(1, 1) + ledger_rounds(2, 2) + ledger_rounds(3, 1);
    assert_true(n_numeric > 0);
}

/* ---- draining and dying --------------------------------------------------------------------- */

static void test_drain(void **state) {
    (void)state;
    struct rig r;
    struct peer p, late;
    struct wire_msg m;
    static struct answer a;
    memset(&a, 0, sizeof a);
    start(&r, &p, &(struct rig_options){0});
    peer_open(&late, &r);
    peer_hello(&late);
    atomic_store(&r.fake.gated, true);
    submit(&p, 1, 30);
    server_stop(r.server);
    peer_expect(&p, WIRE_GOAWAY, 0, &m);
    assert_int_equal(m.goaway.deadline_ms, 5000);
    peer_expect(&late, WIRE_GOAWAY, 0, &m);
    m = submit_ids(2, prompt, N_PROMPT, 4);
    peer_send(&late, &m);
    peer_expect(&late, WIRE_REJECTED, 2, &m);
    assert_int_equal(m.rejected.code, ST_DRAINING);
    assert_true(m.rejected.retryable);
    m = (struct wire_msg){.type = WIRE_HEALTH, .request_id = 3};
    peer_send(&late, &m);
    peer_expect(&late, WIRE_HEALTH_RESULT, 3, &m);
    assert_true(m.health.live && !m.health.ready);
    assert_int_equal(m.health.state, ST_DRAINING);
    /* A newcomer is told so. */
    static const uint32_t majors[] = {1};
    struct peer newcomer;
    peer_open(&newcomer, &r);
    m = (struct wire_msg){.type = WIRE_HELLO, .hello = {.majors = majors, .n_majors = 1}};
    peer_send(&newcomer, &m);
    peer_expect(&newcomer, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_DRAINING);
    fake_ungate(&r);
    for (;;) {
        peer_next(&p, &m);
        if (m.type != WIRE_TOKEN_CHUNK) break;
        answer_chunk(&a, &m);
    }
    assert_int_equal(m.type, WIRE_FINISHED);
    check_answer(&a, 1, 30);
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(rig_join(&r), ST_OK);
    peer_close(&p);
    peer_close(&late);
    peer_close(&newcomer);
}

/* What does not end in time fails: by the deadline, or by a second stop. */
static void drain_cut_short(int drain_ms, int n_stops) {
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p, &(struct rig_options){.drain_ms = drain_ms, .max_seqs = 1});
    atomic_store(&r.fake.gated, true);
    submit(&p, 1, 30);
    submit(&p, 2, 30);
    for (int i = 0; i < n_stops; i++) server_stop(r.server);
    peer_expect(&p, WIRE_GOAWAY, 0, &m);
    for (int i = 0; i < 2; i++) {
        peer_next(&p, &m);
        assert_int_equal(m.type, WIRE_FAILED);
        assert_int_equal(m.failed.code, ST_DRAINING);
        assert_true(m.failed.retryable);
    }
    peer_expect(&p, WIRE_GOODBYE, 0, &m);
    assert_int_equal(m.goodbye.code, ST_DRAINING);
    assert_int_equal(rig_join(&r), ST_OK);
    peer_close(&p);
}

static void test_drain_cut_short(void **state) {
    (void)state;
    drain_cut_short(100, 1);
    drain_cut_short(60000, 2);
}

static void test_engine_lost(void **state) {
    (void)state;
    enum { N = 10 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    for (int depth = 1; depth <= 2; depth++) {
        start(&r, &p, &(struct rig_options){.depth = depth});
        atomic_store(&r.fake.gated, true);
        for (uint64_t i = 1; i <= N; i++) submit(&p, i, 200);
        atomic_store(&r.fake.lose_at_step, 3);
        fake_ungate(&r);
        int n = 0;
        do {
            peer_next(&p, &m);
            if (m.type == WIRE_FAILED) {
                assert_int_equal(m.failed.code, ST_ENGINE_LOST);
                n++;
            }
        } while (m.type != WIRE_GOODBYE);
        assert_int_equal(n, N);
        assert_int_equal(m.goodbye.code, ST_ENGINE_LOST);
        assert_int_equal(rig_join(&r), ST_ENGINE_LOST);
        peer_close(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_window),
        cmocka_unit_test(test_hold_and_release),
        cmocka_unit_test(test_slow_consumer_fails),
        cmocka_unit_test(test_window_is_shared),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_deaf_client),
        cmocka_unit_test(test_disconnect),
        cmocka_unit_test(test_ledger),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_drain_cut_short),
        cmocka_unit_test(test_engine_lost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
