/* paging: random histories against a model that keeps one owner per block; all or nothing; the
 * order of reuse; limits; and paging_check sees each invariant broken. */
#include "tests/support.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "paging/paging.h"
#include "paging/pool.h"

/* AddressSanitizer asks here: an allocation that cannot be made is NULL, as without it. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static struct paging *create(int32_t n_blocks, int32_t block_tokens, int32_t n_slots,
                             int32_t max_blocks) {
    struct paging_limits l = {n_blocks, block_tokens, n_slots, max_blocks};
    struct paging *p;
    assert_int_equal(paging_create(&l, &p), ST_OK);
    return p;
}

static void check(const struct paging *p) {
    struct error error = {0}, *e = &error;
    assert_ok(paging_check(p, e), e);
}

static void test_limits(void **state) {
    (void)state;
    static const struct paging_limits bad[] = {
        {0, 16, 1, 1},  {-1, 16, 1, 1}, {1, 0, 1, 1},  {1, 3, 1, 1},
        {1, 512, 1, 1}, {1, 16, 0, 1},  {1, 16, 1, 0}, {1, -16, 1, 1},
    };
    struct paging *p;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(paging_create(&bad[i], &p), ST_INVALID);
        assert_null(p);
    }
    struct paging_limits huge = {1, 16, 1 << 20, INT32_MAX};
    assert_int_equal(paging_create(&huge, &p), ST_NO_MEMORY);
    assert_null(p);
    p = create(1, 1, 1, 1);
    paging_destroy(p);
    p = create(1, 256, 2, 3);
    struct paging_limits l = paging_limits(p);
    assert_int_equal(l.n_blocks, 1);
    assert_int_equal(l.block_tokens, 256);
    assert_int_equal(l.n_slots, 2);
    assert_int_equal(l.max_blocks_per_seq, 3);
    paging_destroy(p);
    paging_destroy(NULL);
}

static void test_reserve(void **state) {
    (void)state;
    struct paging *p = create(6, 4, 2, 4);
    assert_int_equal(paging_seq_missing(p, 0, 0), 0);
    assert_int_equal(paging_seq_missing(p, 0, 1), 1);
    assert_int_equal(paging_seq_missing(p, 0, 4), 1);
    assert_int_equal(paging_seq_missing(p, 0, 5), 2);
    assert_int_equal(paging_seq_missing(p, 0, INT32_MAX), INT32_MAX / 4 + 1);
    assert_int_equal(paging_seq_reserve(p, 0, 0), ST_OK);
    assert_int_equal(paging_seq_n_blocks(p, 0), 0);
    assert_int_equal(paging_seq_reserve(p, 0, 5), ST_OK);
    assert_int_equal(paging_seq_reserve(p, 0, 8), ST_OK); /* covered already */
    assert_int_equal(paging_seq_reserve(p, 0, 1), ST_OK); /* fewer: nothing changes */
    assert_int_equal(paging_seq_n_blocks(p, 0), 2);
    assert_int_equal(paging_n_free(p), 4);
    assert_int_equal(paging_seq_missing(p, 0, 9), 1);

    /* Neither refusal changes anything. */
    assert_int_equal(paging_seq_reserve(p, 0, 17), ST_TOO_LONG);
    assert_int_equal(paging_seq_reserve(p, 0, INT32_MAX), ST_TOO_LONG);
    assert_int_equal(paging_seq_reserve(p, 1, 12), ST_OK);
    assert_int_equal(paging_seq_reserve(p, 0, 16), ST_NO_BLOCKS);
    assert_int_equal(paging_seq_n_blocks(p, 0), 2);
    assert_int_equal(paging_n_free(p), 1);
    struct paging_stats s = paging_stats(p);
    assert_int_equal(s.total, 6);
    assert_int_equal(s.free, 1);
    assert_int_equal(s.cached, 0);
    assert_int_equal(s.held, 5);
    assert_int_equal(s.peak_held, 5);
    assert_int_equal(s.n_reserved, 5);
    assert_int_equal(s.n_released, 0);
    assert_int_equal(s.n_refused, 1);

    /* The pool's last block can be had. */
    assert_int_equal(paging_seq_reserve(p, 0, 12), ST_OK);
    assert_int_equal(paging_n_free(p), 0);
    paging_seq_free(p, 1);
    paging_seq_free(p, 1); /* nothing held: no effect */
    assert_int_equal(paging_n_free(p), 3);
    s = paging_stats(p);
    assert_int_equal(s.peak_held, 6);
    assert_int_equal(s.n_released, 3);
    check(p);
    paging_destroy(p);
}

/* Which block comes next is part of the promise that a run can be repeated. */
static void test_order(void **state) {
    (void)state;
    struct paging *p = create(8, 1, 3, 8);
    int32_t ids[8];
    assert_int_equal(paging_seq_reserve(p, 0, 3), ST_OK);
    assert_int_equal(paging_seq_reserve(p, 1, 2), ST_OK);
    paging_seq_copy(p, 0, 3, ids);
    for (int i = 0; i < 3; i++) assert_int_equal(ids[i], i);
    paging_seq_copy(p, 1, 2, ids);
    for (int i = 0; i < 2; i++) assert_int_equal(ids[i], 3 + i);
    paging_seq_free(p, 0);
    assert_int_equal(paging_seq_reserve(p, 2, 4), ST_OK);
    paging_seq_copy(p, 2, 4, ids);
    assert_int_equal(ids[0], 0); /* returned last, handed out first */
    assert_int_equal(ids[1], 1);
    assert_int_equal(ids[2], 2);
    assert_int_equal(ids[3], 5);
    ids[1] = -7;
    paging_seq_copy(p, 2, 1, ids);
    assert_int_equal(ids[1], -7); /* n and no more */
    paging_destroy(p);
}

/* ---- random histories
 * ---------------------------------------------------------------------------- */

enum { MAX_BLOCKS = 40, MAX_SLOTS = 8, MAX_TABLE = 16 };

struct model {
    int32_t n_blocks, block_tokens, n_slots, max_table;
    int32_t owner[MAX_BLOCKS]; /* slot, or -1 */
    int32_t table[MAX_SLOTS][MAX_TABLE], n_table[MAX_SLOTS];
};

static int32_t model_free(const struct model *m) {
    int32_t n = 0;
    for (int32_t b = 0; b < m->n_blocks; b++) n += m->owner[b] < 0;
    return n;
}

/* The tables are the model's, the new blocks were free, and the counts agree. */
static void compare(const struct paging *p, struct model *m) {
    for (int32_t slot = 0; slot < m->n_slots; slot++) {
        int32_t n = paging_seq_n_blocks(p, slot), ids[MAX_TABLE];
        paging_seq_copy(p, slot, n, ids);
        assert_int_equal(n, m->n_table[slot]);
        assert_memory_equal(ids, m->table[slot], (size_t)n * sizeof *ids);
    }
    assert_int_equal(paging_n_free(p), model_free(m));
}

static void random_reserve(struct paging *p, struct model *m, uint64_t *rng) {
    int32_t slot = (int32_t)(test_random(rng) % (uint64_t)m->n_slots);
    int32_t most = (m->max_table + 2) * m->block_tokens;
    int32_t n_tokens = (int32_t)(test_random(rng) % (uint64_t)most);
    int32_t want = (n_tokens + m->block_tokens - 1) / m->block_tokens, have = m->n_table[slot];
    int32_t missing = want > have ? want - have : 0;
    assert_int_equal(paging_seq_missing(p, slot, n_tokens), missing);
    enum status expected = ST_OK;
    if (want > m->max_table)
        expected = ST_TOO_LONG;
    else if (missing > model_free(m))
        expected = ST_NO_BLOCKS;
    assert_int_equal(paging_seq_reserve(p, slot, n_tokens), expected);
    if (expected != ST_OK || missing == 0) return;
    int32_t ids[MAX_TABLE];
    paging_seq_copy(p, slot, want, ids);
    for (int32_t i = have; i < want; i++) {
        assert_in_range(ids[i], 0, m->n_blocks - 1);
        assert_int_equal(m->owner[ids[i]], -1);
        m->owner[ids[i]] = slot;
        m->table[slot][i] = ids[i];
    }
    m->n_table[slot] = want;
}

static void random_free(struct paging *p, struct model *m, uint64_t *rng) {
    int32_t slot = (int32_t)(test_random(rng) % (uint64_t)m->n_slots);
    paging_seq_free(p, slot);
    for (int32_t i = 0; i < m->n_table[slot]; i++) m->owner[m->table[slot][i]] = -1;
    m->n_table[slot] = 0;
}

/* FNV-1a over every table, to compare two runs of one history. */
static uint64_t random_history(uint64_t seed, int n_ops) {
    uint64_t rng = seed, hash = UINT64_C(0xcbf29ce484222325);
    struct model m = {.n_blocks = 1 + (int32_t)(test_random(&rng) % MAX_BLOCKS),
                      .block_tokens = 1 << test_random(&rng) % 6,
                      .n_slots = 1 + (int32_t)(test_random(&rng) % MAX_SLOTS),
                      .max_table = 1 + (int32_t)(test_random(&rng) % MAX_TABLE)};
    for (int32_t b = 0; b < m.n_blocks; b++) m.owner[b] = -1;
    struct paging *p = create(m.n_blocks, m.block_tokens, m.n_slots, m.max_table);
    for (int i = 0; i < n_ops; i++) {
        if (test_random(&rng) % 3 == 0)
            random_free(p, &m, &rng);
        else
            random_reserve(p, &m, &rng);
        compare(p, &m);
        check(p);
        for (int32_t slot = 0; slot < m.n_slots; slot++)
            for (int32_t k = 0; k < m.n_table[slot]; k++)
                hash = (hash ^ (uint64_t)m.table[slot][k]) * UINT64_C(0x100000001b3);
    }
    for (int32_t slot = 0; slot < m.n_slots; slot++) paging_seq_free(p, slot);
    check(p);
    struct paging_stats s = paging_stats(p);
    assert_int_equal(s.free, m.n_blocks);
    assert_true(s.n_reserved == s.n_released);
    paging_destroy(p);
    return hash;
}

static void test_random_histories(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 200; seed++) random_history(seed, 2000);
}

static void test_repeatable(void **state) {
    (void)state;
    uint64_t a = random_history(7, 3000), b = random_history(7, 3000), c = random_history(8, 3000);
    assert_true(a == b);
    assert_true(a != c);
}

/* ---- paging_check sees what it promises to see
 * -------------------------------------------------- */

enum { N_BREAKS = 14 };

static const char *break_it(struct paging *p, int how) {
    int32_t *table0 = p->tables, *table1 = p->tables + p->limits.max_blocks_per_seq;
    switch (how) {
    case 0: table0[0] = table0[1]; return "in two places";
    case 1: table1[0] = table0[0]; return "in two places";
    case 2: p->free_blocks[0] = table0[0]; return "in two places";
    case 3: p->free_blocks[0] = p->free_blocks[1]; return "in two places";
    case 4: table0[0] = -1; return "not of the pool";
    case 5: p->free_blocks[0] = p->limits.n_blocks; return "not of the pool";
    case 6: p->n_free--; return "are not 10";
    case 7: p->n_free = 11; return "11 blocks are free of 10";
    case 8: p->n_table[0]--; return "slot 0 has 1 blocks for 7 tokens";
    case 9: p->n_tokens[1] += 4; return "slot 1 has 2 blocks for 9 tokens";
    case 12: p->n_table[0] = -1; return "slot 0 has -1 blocks";
    case 13:
        p->n_table[0] = 5;
        p->n_tokens[0] = 20;
        return "slot 0 has 5 blocks";
    case 10: p->n_released++; return "counters";
    default: p->peak_held = 3; return "counters";
    }
}

static void test_check_sees(void **state) {
    (void)state;
    for (int how = 0; how < N_BREAKS; how++) {
        struct paging *p = create(10, 4, 2, 4);
        assert_int_equal(paging_seq_reserve(p, 0, 7), ST_OK);
        assert_int_equal(paging_seq_reserve(p, 1, 5), ST_OK);
        check(p);
        struct error e = {0};
        const char *says = break_it(p, how);
        assert_int_equal(paging_check(p, &e), ST_INTERNAL);
        if (!strstr(e.text, says)) fail_msg("break %d: '%s' does not say '%s'", how, e.text, says);
        assert_int_equal(paging_check(p, NULL), ST_INTERNAL);
        paging_destroy(p);
    }
}

/* ---- programmer errors end the process
 * ------------------------------------------------------------ */

static void misuse(struct paging *p, int how) {
    int32_t ids[4];
    switch (how) {
    case 0: paging_seq_reserve(p, -1, 1); break;
    case 1: paging_seq_reserve(p, 2, 1); break;
    case 2: paging_seq_reserve(p, 0, -1); break;
    case 3: paging_seq_free(p, 2); break;
    case 4: paging_seq_n_blocks(p, 2); break;
    case 5: paging_seq_copy(p, 2, 0, ids); break;
    case 6: paging_seq_copy(p, 0, 2, ids); break;
    case 7: paging_seq_copy(p, 0, -1, ids); break;
    default: paging_seq_copy(p, 0, 1, ids); break; /* the one that is right */
    }
}

static void test_misuse(void **state) {
    (void)state;
    for (int how = 0; how <= 8; how++) {
        struct paging *p = create(10, 4, 2, 4);
        assert_int_equal(paging_seq_reserve(p, 0, 4), ST_OK);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            close(STDERR_FILENO);
            misuse(p, how);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
        assert_int_equal(aborted, how < 8);
        paging_destroy(p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_limits),     cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_order),      cmocka_unit_test(test_random_histories),
        cmocka_unit_test(test_repeatable), cmocka_unit_test(test_check_sees),
        cmocka_unit_test(test_misuse),
    };
    return cmocka_run_group_tests_name("paging", tests, NULL, NULL);
}
