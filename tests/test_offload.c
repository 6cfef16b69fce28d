/* offload: which experts stay in host memory: the coldest, exactly as many as asked for or as few as it takes; and the
 * expected bytes of a step, against a count by simulation. */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "moe/offload.h"

enum { LAYERS = 5, EXPERTS = 24, ALL = LAYERS * EXPERTS, USED = 4 };

static const uint64_t bytes[LAYERS] = {1000, 1200, 1000, 1200, 1000};

static uint64_t next_random(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return *state >> 33;
}

static struct offload_problem problem(const uint64_t *load) {
    return (struct offload_problem){LAYERS, EXPERTS, USED, bytes, load};
}

/* Some equal, some 0. */
static void make_load(uint64_t seed, uint64_t *load) {
    for (int i = 0; i < ALL; i++) load[i] = next_random(&seed) % 50;
}

static uint64_t bytes_near(const bool *far) {
    uint64_t n = 0;
    for (int i = 0; i < ALL; i++) n += far[i] ? 0 : bytes[i / EXPERTS];
    return n;
}

static int count(const bool *far) {
    int n = 0;
    for (int i = 0; i < ALL; i++) n += far[i];
    return n;
}

/* Nobody that stays away is in more demand than anybody on the device. */
static void expect_coldest(const uint64_t *load, const bool *far) {
    uint64_t hottest_far = 0, coldest_near = UINT64_MAX;
    for (int i = 0; i < ALL; i++) {
        if (far[i] && load[i] > hottest_far) hottest_far = load[i];
        if (!far[i] && load[i] < coldest_near) coldest_near = load[i];
    }
    assert_true(hottest_far <= coldest_near);
}

static void test_number(void **state) {
    (void)state;
    uint64_t load[ALL];
    bool far[ALL];
    for (uint64_t seed = 1; seed < 20; seed++) {
        make_load(seed, load);
        struct offload_problem p = problem(load);
        for (int n = 0; n <= ALL; n++) {
            assert_int_equal(offload_choose(&p, n, 0, far), n);
            assert_int_equal(count(far), n);
            expect_coldest(load, far);
            assert_int_equal(offload_host_bytes(&p, far) + bytes_near(far), (3 * 1000 + 2 * 1200) * EXPERTS);
        }
    }
}

static void test_room(void **state) {
    (void)state;
    uint64_t load[ALL];
    bool far[ALL], fewer[ALL];
    make_load(7, load);
    struct offload_problem p = problem(load);
    const uint64_t whole = (3 * 1000 + 2 * 1200) * EXPERTS;
    assert_int_equal(offload_choose(&p, MOE_OFFLOAD_AUTO, whole, far), 0);
    assert_int_equal(offload_choose(&p, MOE_OFFLOAD_AUTO, whole - 1, far), 1);
    assert_int_equal(offload_choose(&p, MOE_OFFLOAD_AUTO, 999, far), ALL);
    for (uint64_t room = 0; room < whole; room += 777) {
        int n = offload_choose(&p, MOE_OFFLOAD_AUTO, room, far);
        assert_int_equal(count(far), n);
        assert_true(bytes_near(far) <= room);
        expect_coldest(load, far);
        assert_int_equal(offload_choose(&p, n - 1, 0, fewer), n - 1);
        assert_true(bytes_near(fewer) > room);
    }
}

/* Nothing known: layers take turns. */
static void test_even(void **state) {
    (void)state;
    struct offload_problem p = problem(NULL);
    bool far[ALL];
    for (int n = 0; n <= ALL; n++) {
        assert_int_equal(offload_choose(&p, n, 0, far), n);
        for (int l = 0; l < LAYERS; l++) {
            int of_layer = 0;
            for (int x = 0; x < EXPERTS; x++) of_layer += far[l * EXPERTS + x];
            assert_in_range(of_layer, n / LAYERS, (n + LAYERS - 1) / LAYERS);
        }
    }
}

/* The formula at its ends, and in between against draws. */
static void test_step_bytes(void **state) {
    (void)state;
    uint64_t load[ALL], seed = 3;
    bool far[ALL];
    struct offload_problem even = problem(NULL);
    offload_choose(&even, ALL / 2, 0, far);
    double host = (double)offload_host_bytes(&even, far);
    assert_true(fabs(offload_step_bytes(&even, far, 1) / (host * USED / EXPERTS) - 1) < 1e-12);
    assert_true(fabs(offload_step_bytes(&even, far, 100000) / host - 1) < 1e-9);
    assert_true(offload_step_bytes(&even, far, 0) == 0);

    enum { TOKENS = 6, STEPS = 4000 };
    make_load(11, load);
    struct offload_problem p = problem(load);
    offload_choose(&p, ALL * 3 / 4, 0, far);
    double drawn = 0;
    for (int step = 0; step < STEPS; step++)
        for (int l = 0; l < LAYERS; l++) {
            uint64_t total = 0;
            for (int x = 0; x < EXPERTS; x++) total += load[l * EXPERTS + x];
            for (int x = 0; x < EXPERTS; x++) {
                bool read = false;
                for (int t = 0; t < TOKENS; t++)
                    read |= next_random(&seed) % total < load[l * EXPERTS + x] * USED;
                if (read && far[l * EXPERTS + x]) drawn += (double)bytes[l];
            }
        }
    assert_true(fabs(drawn / STEPS / offload_step_bytes(&p, far, TOKENS) - 1) < 0.02);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_number), cmocka_unit_test(test_room),
                                       cmocka_unit_test(test_even), cmocka_unit_test(test_step_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
