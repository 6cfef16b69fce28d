/* Stop strings: what is released must not depend on how the text was cut. The oracle searches the
 * whole text. */
#include <stdlib.h>
#include <string.h>

#include "daemon/stops.h"
#include "tests/support.h"

static void set_of(struct stop_set *set, const char *const *strings, int n) {
    memset(set, 0, sizeof *set);
    set->n = n;
    for (int i = 0; i < n; i++) {
        set->strings[i].n_bytes = (uint16_t)strlen(strings[i]);
        memcpy(set->strings[i].bytes, strings[i], strlen(strings[i]));
    }
}

/* The definition: the match that ends first, of those the longest. Returns the length of text
 * before it. */
static size_t oracle(const struct stop_set *set, const char *text, size_t n, int *which) {
    for (size_t end = 1; end <= n; end++) {
        int best = -1;
        for (int i = 0; i < set->n; i++) {
            size_t len = set->strings[i].n_bytes;
            if (len > end || memcmp(text + end - len, set->strings[i].bytes, len) != 0) continue;
            if (best < 0 || len > set->strings[best].n_bytes) best = i;
        }
        if (best >= 0) {
            *which = best;
            return end - set->strings[best].n_bytes;
        }
    }
    *which = -1;
    return n;
}

/* Feed text in pieces that end where `cuts` has a bit; compare with the oracle. */
static void run(const struct stop_set *set, const char *text, size_t n, uint64_t cuts) {
    struct stop_state s = {0};
    uint8_t out[4096], piece[4096];
    size_t total = 0, start = 0, want_n;
    int which, match = -1;
    want_n = oracle(set, text, n, &which);
    for (size_t i = 0; i < n && match < 0; i++) {
        if (i + 1 < n && !(cuts >> (i % 63) & 1)) continue;
        size_t got;
        match = stops_push(set, &s, text + start, i + 1 - start, piece, &got);
        memcpy(out + total, piece, got);
        total += got;
        start = i + 1;
        /* Nothing that will turn out to belong to the stop string is ever released. */
        assert_true(total <= want_n);
    }
    if (match < 0) {
        size_t got = stops_finish(&s, piece);
        memcpy(out + total, piece, got);
        total += got;
    }
    assert_int_equal(match, which);
    assert_int_equal(total, want_n);
    assert_memory_equal(out, text, want_n);
}

static void test_all_splits(void **state) {
    (void)state;
    static const char *const sets[][4] = {
        {"stop", NULL},        {"aab", NULL}, {"abc", "b", NULL},           {"\n\n", "END", NULL},
        {"aaaa", "aab", NULL}, {"x", NULL},   {"cde", "abcdef", "f", NULL},
    };
    static const char *const texts[] = {"a stop here", "aaaaab", "abcabc",      "one\n\ntwo END",
                                        "aaabaab",     "sto",    "abcdefgh",    "nothing",
                                        "ststostop",   "",       "EN\nEND\n\n", "abcdeabcdef"};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        struct stop_set set;
        int n = 0;
        while (sets[i][n]) n++;
        set_of(&set, sets[i], n);
        for (size_t k = 0; k < sizeof texts / sizeof *texts; k++) {
            size_t len = strlen(texts[k]);
            for (uint64_t cuts = 0; cuts < UINT64_C(1) << len; cuts++)
                run(&set, texts[k], len, cuts);
        }
    }
}

static void test_random_texts(void **state) {
    (void)state;
    uint64_t rng = 1;
    for (int round = 0; round < 20000; round++) {
        struct stop_set set = {.n = (int32_t)(1 + test_random(&rng) % 4)};
        for (int i = 0; i < set.n; i++) {
            set.strings[i].n_bytes = (uint16_t)(1 + test_random(&rng) % 6);
            for (int k = 0; k < set.strings[i].n_bytes; k++)
                set.strings[i].bytes[k] = (uint8_t)('a' + test_random(&rng) % 2);
        }
        char text[48];
        size_t n = test_random(&rng) % sizeof text;
        for (size_t k = 0; k < n; k++) text[k] = (char)('a' + test_random(&rng) % 3);
        run(&set, text, n, test_random(&rng));
    }
}

static void test_longest_string(void **state) {
    (void)state;
    static struct stop_set set;
    set.n = 1;
    set.strings[0].n_bytes = WIRE_MAX_STOP_BYTES;
    memset(set.strings[0].bytes, 'z', WIRE_MAX_STOP_BYTES);
    char text[2 * WIRE_MAX_STOP_BYTES];
    memset(text, 'z', sizeof text);
    run(&set, text, WIRE_MAX_STOP_BYTES - 1, ~UINT64_C(0)); /* all held, then released */
    run(&set, text, sizeof text, ~UINT64_C(0));
    text[WIRE_MAX_STOP_BYTES - 1] = 'y';
    run(&set, text, sizeof text, UINT64_C(0x5555));
}

static void test_no_strings(void **state) {
    (void)state;
    struct stop_set set = {0};
    run(&set, "all of it", 9, UINT64_C(0x155));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_splits),
        cmocka_unit_test(test_random_texts),
        cmocka_unit_test(test_longest_string),
        cmocka_unit_test(test_no_strings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
