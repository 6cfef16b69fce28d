/* The exchange by streams, message by message: rows arrive where they belong, however the socket cuts them; a
 * message that is not the one due, or none, ends the group and nothing else. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "moe/streams.h"
#include "tests/support.h"

enum { T = 40, D = 96, E = 8, K = 2, ROW = D * 4 };

static const struct model_shape shape = {.n_embd = D, .n_experts = E, .n_experts_used = K};

/* Two ranks; small buffers, so that a message takes many turns. */
static void pair_up(struct streams *s[2], int *raw, uint64_t timeout_ns) {
    int fds[2], small = 2048;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
    for (int i = 0; i < 2; i++) setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    if (raw) *raw = fds[1];
    for (int i = 0; i < (raw ? 1 : 2); i++) {
        int of[2] = {-1, -1};
        of[1 - i] = fds[i];
        assert_int_equal(streams_create(of, 2, i, timeout_ns, &s[i]), ST_OK);
        assert_int_equal(streams_room(s[i], &shape, T), ST_OK);
    }
}

struct side {
    struct streams *s;
    int rank;
    int32_t n_tokens;
    int32_t ids[T * K];
    float inputs[T][D + 3], products[T * K][D + 3], weights[E][D];
    enum status st;
    struct streams_route route[2];
    struct streams_rows back[2];
    int32_t counts[2];
};

static float value(int rank, int what, int row, int col) {
    return (float)(rank * 1000000 + what * 100000 + row * 1000 + col);
}

static void fill(struct side *s, int rank, int32_t n_tokens) {
    s->rank = rank;
    s->n_tokens = n_tokens;
    for (int i = 0; i < n_tokens * K; i++) s->ids[i] = (i + rank) % E;
    for (int c = 0; c < D; c++) {
        for (int r = 0; r < n_tokens; r++) s->inputs[r][c] = value(rank, 1, r, c);
        for (int r = 0; r < T * K; r++) s->products[r][c] = value(rank, 2, r, c);
        for (int r = 0; r < E; r++) s->weights[r][c] = value(rank, 3, r, c);
    }
}

/* Products of every third row go over, and experts 1 and 5 of rank 0 in exchange for 6 of rank 1. */
static void *side_main(void *ctx) {
    static const int32_t every_third[] = {0, 3, 6, 9, 12}, low[] = {1, 5}, high[] = {6};
    struct side *s = ctx;
    int other = 1 - s->rank;
    s->counts[s->rank] = s->n_tokens;
    s->st = streams_counts(s->s, s->counts);
    const struct streams_rows inputs = {(const uint8_t *)s->inputs, sizeof s->inputs[0], ROW, NULL,
                                        s->n_tokens};
    if (s->st == ST_OK) s->st = streams_routes(s->s, s->ids, &inputs, s->route);
    struct streams_rows to[2], from[2];
    int32_t n_from[2] = {5, 5};
    for (int i = 0; i < 2; i++)
        to[i] = (struct streams_rows){(const uint8_t *)s->products, sizeof s->products[0], ROW,
                                      every_third, i == other ? 5 : 0};
    if (s->st == ST_OK) s->st = streams_products(s->s, to, n_from, s->back);
    for (int i = 0; i < 2; i++) {
        to[i] = (struct streams_rows){(const uint8_t *)s->weights, ROW, ROW, low, 0};
        from[i] = to[i];
    }
    to[other].of = s->rank == 0 ? low : high;
    from[other].of = s->rank == 0 ? high : low;
    to[other].n = s->rank == 0 ? 2 : 1;
    from[other].n = s->rank == 0 ? 1 : 2;
    if (s->st == ST_OK) s->st = streams_weights(s->s, to, from);
    return NULL;
}

static void test_meetings(void **state) {
    (void)state;
    static struct side sides[2];
    struct streams *s[2];
    pair_up(s, NULL, UINT64_C(60000000000));
    for (int round = 0; round < 3; round++) { /* the last: a rank without tokens */
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) {
            fill(&sides[i], i, round == 2 && i == 1 ? 0 : T - round);
            sides[i].s = s[i];
            assert_int_equal(pthread_create(&threads[i], NULL, side_main, &sides[i]), 0);
        }
        for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
        for (int i = 0; i < 2; i++) {
            const struct side *a = &sides[i], *b = &sides[1 - i];
            const struct streams_route *r = &a->route[1 - i];
            assert_int_equal(a->st, ST_OK);
            assert_int_equal(a->counts[i], a->n_tokens);
            assert_int_equal(a->counts[1 - i], b->n_tokens);
            assert_int_equal(r->n_tokens, b->n_tokens);
            assert_int_equal(r->inputs.n, b->n_tokens);
            assert_memory_equal(r->ids, b->ids, (size_t)(b->n_tokens * K) * sizeof(int32_t));
            for (int t = 0; t < b->n_tokens; t++)
                assert_memory_equal(r->inputs.p + (size_t)t * r->inputs.stride, b->inputs[t], ROW);
            assert_int_equal(a->back[1 - i].n, 5);
            for (int k = 0; k < 5; k++)
                assert_memory_equal(a->back[1 - i].p + k * a->back[1 - i].stride,
                                    b->products[3 * k], ROW);
            for (int e = 0; e < E; e++) {
                bool moved = i == 0 ? e == 6 : e == 1 || e == 5;
                assert_true(a->weights[e][7] == value(moved ? 1 - i : i, 3, e, 7));
            }
        }
    }
    for (int i = 0; i < 2; i++) streams_destroy(s[i]);
}

/* What a peer may send instead of its routes. */
static void test_bad_messages(void **state) {
    (void)state;
    const struct {
        uint32_t header[4]; /* kind, number, tokens, row_bytes */
        int32_t id;
        enum status want;
    } cases[] = {
        {{1, 1, 1, ROW}, E - 1, ST_OK},
        {{2, 1, 1, ROW}, 0, ST_ENGINE_LOST},
        {{1, 2, 1, ROW}, 0, ST_ENGINE_LOST},
        {{1, 1, T + 1, ROW}, 0, ST_ENGINE_LOST},
        {{1, 1, UINT32_MAX, ROW}, 0, ST_ENGINE_LOST},
        {{1, 1, 1, ROW + 4}, 0, ST_ENGINE_LOST},
        {{1, 1, 1, ROW}, E, ST_ENGINE_LOST},
        {{1, 1, 1, ROW}, -1, ST_ENGINE_LOST},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct streams *s[2];
        int raw;
        pair_up(s, &raw, UINT64_C(60000000000));
        uint8_t body[K * 4 + ROW] = {0};
        memcpy(body, &cases[i].id, sizeof cases[i].id);
        assert_int_equal(write(raw, cases[i].header, 16), 16);
        assert_int_equal(write(raw, body, sizeof body), sizeof body);
        const struct streams_rows none = {.stride = ROW, .n_bytes = ROW};
        struct streams_route out[2];
        assert_int_equal(streams_routes(s[0], NULL, &none, out), cases[i].want);
        close(raw);
        if (cases[i].want == ST_OK) /* and then it is gone */
            assert_int_equal(streams_routes(s[0], NULL, &none, out), ST_ENGINE_LOST);
        streams_destroy(s[0]);
    }
}

static void test_bad_counts(void **state) {
    (void)state;
    const int32_t cases[] = {T, T + 1, -1};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct streams *s[2];
        int raw;
        pair_up(s, &raw, UINT64_C(60000000000));
        const uint32_t header[4] = {4, 1, 1, sizeof cases[i]};
        int32_t counts[2] = {0};
        assert_int_equal(write(raw, header, 16), 16);
        assert_int_equal(write(raw, &cases[i], sizeof cases[i]), sizeof cases[i]);
        assert_int_equal(streams_counts(s[0], counts), cases[i] == T ? ST_OK : ST_ENGINE_LOST);
        close(raw);
        streams_destroy(s[0]);
    }
}

/* Half a message, and then nothing. */
static void test_late(void **state) {
    (void)state;
    struct streams *s[2];
    int raw;
    pair_up(s, &raw, UINT64_C(100000000));
    const uint32_t header[4] = {1, 1, 1, ROW};
    assert_int_equal(write(raw, header, 16), 16);
    const struct streams_rows none = {.stride = ROW, .n_bytes = ROW};
    struct streams_route out[2];
    assert_int_equal(streams_routes(s[0], NULL, &none, out), ST_ENGINE_LOST);
    close(raw);
    streams_destroy(s[0]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_meetings),
        cmocka_unit_test(test_bad_messages),
        cmocka_unit_test(test_bad_counts),
        cmocka_unit_test(test_late),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
