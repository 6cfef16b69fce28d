/* Rings between two threads: order, nothing lost or doubled, no lost wake-up. Meant to run under
 * the thread sanitizer too. */
#include <pthread.h>
#include <sched.h>
#include <string.h>

#include "daemon/ring.h"
#include "tests/support.h"

struct item {
    uint64_t number, check;
};

enum { N_ITEMS = 200000 };

static void *produce(void *ctx) {
    struct ring *r = ctx;
    for (uint64_t i = 1; i <= N_ITEMS; i++) {
        struct item it = {i, ~i};
        while (!ring_push(r, &it)) sched_yield();
    }
    return NULL;
}

/* Sleeping proves the wake-ups; spinning leaves the ring's own ordering as the only one, for the
 * sanitizer to judge. */
static void consume(bool sleeps) {
    struct ring r;
    assert_int_equal(ring_create(64, sizeof(struct item), &r), ST_OK);
    pthread_t t;
    pthread_create(&t, NULL, produce, &r);
    uint64_t next = 1;
    while (next <= N_ITEMS) {
        const struct item *it = ring_peek(&r);
        if (!it) {
            if (sleeps)
                ring_sleep(&r); /* hangs here if a wake-up gets lost */
            else
                sched_yield();
            continue;
        }
        assert_true(it->number == next && it->check == ~next);
        next++;
        ring_pop(&r);
    }
    assert_null(ring_peek(&r));
    pthread_join(t, NULL);
    ring_destroy(&r);
}

static void test_order_sleeping(void **state) {
    (void)state;
    consume(true);
}

static void test_order_spinning(void **state) {
    (void)state;
    consume(false);
}

static void test_full_and_empty(void **state) {
    (void)state;
    struct ring r;
    assert_int_equal(ring_create(4, sizeof(int), &r), ST_OK);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 4; i++) {
            assert_int_equal(ring_next_idx(&r), i);
            assert_true(ring_push(&r, &i));
        }
        int fifth = 5;
        assert_true(ring_full(&r));
        assert_false(ring_push(&r, &fifth));
        for (int i = 0; i < 4; i++) {
            assert_int_equal(ring_peek_idx(&r), i);
            assert_int_equal(*(int *)ring_peek(&r), i);
            ring_pop(&r);
        }
        assert_null(ring_peek(&r));
    }
    ring_destroy(&r);
}

static void *wake(void *ctx) {
    ring_wake(ctx);
    return NULL;
}

static void test_wake_without_item(void **state) {
    (void)state;
    struct ring r;
    assert_int_equal(ring_create(4, sizeof(int), &r), ST_OK);
    pthread_t t;
    pthread_create(&t, NULL, wake, &r);
    ring_sleep(&r);
    assert_null(ring_peek(&r));
    pthread_join(t, NULL);
    ring_destroy(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_sleeping),
        cmocka_unit_test(test_order_spinning),
        cmocka_unit_test(test_full_and_empty),
        cmocka_unit_test(test_wake_without_item),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
