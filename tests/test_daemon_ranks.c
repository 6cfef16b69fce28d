/* Several engines behind one daemon: sequences spread over them by blocks to spare, answers are those
 * of one engine, and the loss of one ends everything with the reason. */
#include "tests/daemon_rig.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void start(struct rig *r, struct peer *p, const struct rig_options *o) {
    rig_start(r, o);
    peer_open(p, r);
    peer_hello(p);
}

static void submit(struct peer *p, uint64_t id, int32_t n_prompt, uint32_t max_tokens) {
    int32_t ids[64];
    for (int32_t i = 0; i < n_prompt; i++) ids[i] = 1000 + (int32_t)id + i;
    struct wire_msg m = submit_ids(id, ids, (size_t)n_prompt, max_tokens);
    peer_send(p, &m);
    peer_expect_after_chunks(p, WIRE_ACCEPTED, id, &m);
}

static double stat_of_rank(struct peer *p, int rank, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "device_%d_%s", rank, name);
    return peer_stat(p, full);
}

static double sequences_of(struct peer *p, int rank) {
    return stat_of_rank(p, rank, "sequences_running") + stat_of_rank(p, rank, "sequences_waiting");
}

/* Accepted comes before a sequence is given to a rank: until all n have been. */
static void wait_given(struct peer *p, int n_ranks, double n) {
    for (int tries = 0; tries < 10000; tries++) {
        double sum = 0;
        for (int i = 0; i < n_ranks; i++) sum += sequences_of(p, i);
        if (sum == n) return;
        usleep(1000);
    }
    fail_msg("%.0f sequences were not all given to ranks", n);
}

/* A rank's blocks are taken when it is next planned for. */
static void wait_planned(struct peer *p, int rank, double most_free) {
    for (int tries = 0; stat_of_rank(p, rank, "kv_blocks_free") > most_free; tries++) {
        if (tries == 10000) fail_msg("device %d has no step", rank);
        usleep(1000);
    }
}

/* Equal requests go round; a long prompt that waits counts as the blocks it will take. */
static void test_spread(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    start(&r, &p, &(struct rig_options){.n_ranks = 3, .max_seqs = 2});
    fake_gate(&r);
    for (uint64_t id = 1; id <= 6; id++) {
        submit(&p, id, 8, 4);
        wait_given(&p, 3, (double)id);
        if (id <= 3)
            wait_planned(&p, (int)id - 1, 63); /* the next one waits behind it, on every rank */
    }
    for (int i = 0; i < 3; i++) assert_true(sequences_of(&p, i) == 2);
    assert_true(peer_stat(&p, "kv_blocks_total") == 3 * 64);
    /* Ten blocks on rank 0, so the next two short ones go to 1 and 2, and the third not to 0. */
    submit(&p, 7, 60, 4);
    wait_given(&p, 3, 7);
    submit(&p, 8, 8, 4);
    submit(&p, 9, 8, 4);
    submit(&p, 10, 8, 4);
    wait_given(&p, 3, 10);
    assert_true(sequences_of(&p, 0) == 3);
    fake_ungate(&r);
    struct wire_msg m;
    for (int n = 0; n < 10; n += m.type == WIRE_FINISHED) peer_next(&p, &m);
    assert_true(peer_stat(&p, "kv_blocks_free") == 3 * 64);
    assert_true(peer_stat(&p, "tokens_sampled") == 40);
    peer_close(&p);
    assert_int_equal(rig_stop(&r), ST_OK);
}

/* Many answers on few blocks, preempted often: each is what one engine alone gives. */
static void test_answers(void **state) {
    (void)state;
    enum { N = 60, LENGTH = 40 };
    static struct answer answers[N + 1];
    for (int kind = 0; kind < 4; kind++) {
        const int depth = 1 + kind % 2;
        const bool lockstep = kind >= 2;
        struct rig r;
        struct peer p;
        struct wire_msg m;
        memset(answers, 0, sizeof answers);
        start(&r, &p,
              &(struct rig_options){.n_ranks = 4,
                                    .max_seqs = 6,
                                    .n_blocks = 12,
                                    .max_queue = N,
                                    .depth = depth,
                                    .lockstep = lockstep});
        int32_t ids[64];
        int n_accepted = 0, n_finished = 0;
        for (uint64_t id = 1; id <= N; id++) {
            for (int32_t i = 0; i < 10; i++) ids[i] = 1000 + (int32_t)id + i;
            m = submit_ids(id, ids, 10, LENGTH);
            peer_send(&p, &m);
        }
        while (n_finished < N) {
            peer_next(&p, &m);
            n_accepted += m.type == WIRE_ACCEPTED;
            n_finished += m.type == WIRE_FINISHED;
            if (m.type == WIRE_TOKEN_CHUNK) answer_chunk(&answers[m.request_id], &m);
        }
        assert_int_equal(n_accepted, N);
        for (int id = 1; id <= N; id++) {
            int32_t want[LENGTH];
            for (int32_t i = 0; i < 10; i++) ids[i] = 1000 + id + i;
            fake_answer(ids, 10, (uint64_t)id, want, LENGTH);
            assert_int_equal(answers[id].n_ids, LENGTH);
            assert_memory_equal(answers[id].ids, want, sizeof want);
        }
        for (int i = 0; i < 4; i++) {
            assert_true(stat_of_rank(&p, i, "step_tokens") > N * LENGTH / 8);
            assert_true(stat_of_rank(&p, i, "kv_blocks_free") == 12);
        }
        assert_true(peer_stat(&p, "preemptions") > 0);
        double steps = stat_of_rank(&p, 0, "steps");
        for (int i = 1; i < 4 && lockstep; i++) {
            char name[32];
            snprintf(name, sizeof name, "device_%d_steps", i);
            peer_wait_stat(&p, name, steps);
        }
        peer_close(&p);
        assert_int_equal(rig_stop(&r), ST_OK);
    }
}

static void test_one_lost(void **state) {
    (void)state;
    enum { N = 9 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p, &(struct rig_options){.n_ranks = 3});
    fake_gate(&r);
    for (uint64_t id = 1; id <= N; id++) submit(&p, id, 8, 200);
    atomic_store(&r.more[1].lose_at_step, 3);
    fake_ungate(&r);
    int n = 0;
    do {
        peer_next(&p, &m);
        if (m.type != WIRE_FAILED) continue;
        assert_int_equal(m.failed.code, ST_ENGINE_LOST);
        n++;
    } while (m.type != WIRE_GOODBYE);
    assert_int_equal(n, N);
    assert_int_equal(m.goodbye.code, ST_ENGINE_LOST);
    assert_int_equal(rig_join(&r), ST_ENGINE_LOST);
    peer_close(&p);
}

/* One hangs: all fail, in time, while the others go on. */
static void test_one_hangs(void **state) {
    (void)state;
    enum { N = 9 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p,
          &(struct rig_options){
              .n_ranks = 3, .step_ms = 300, .max_seq_tokens = 4096, .n_blocks = 1024});
    fake_gate(&r);
    for (int i = 0; i < 3; i++) atomic_store(&(i ? &r.more[i - 1] : &r.fake)->step_us, 2000);
    for (uint64_t id = 1; id <= N; id++) submit(&p, id, 8, 4000);
    for (int i = 0; i < 3; i++) { /* all but rank 1 */
        struct fake *f = i ? &r.more[i - 1] : &r.fake;
        if (i == 1) continue;
        atomic_store(&f->gated, false);
        for (int n = 0; n < 2; n++) sem_post(&f->gate);
    }
    int n = 0;
    do {
        peer_next(&p, &m);
        if (m.type != WIRE_FAILED) continue;
        assert_int_equal(m.failed.code, ST_ENGINE_LOST);
        n++;
    } while (m.type != WIRE_GOODBYE);
    assert_int_equal(n, N);
    fake_ungate(&r); /* so that the test can end it */
    assert_int_equal(rig_join(&r), ST_ENGINE_LOST);
    peer_close(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spread),
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_one_lost),
        cmocka_unit_test(test_one_hangs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
