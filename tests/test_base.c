/* base: status names, UTF-8, arena. */
#include "tests/support.h"

#include <stdio.h>
#include <string.h>

static void test_status_names(void **state) {
    (void)state;
    for (int i = 0; i < ST_COUNT; i++) assert_string_not_equal(status_name((enum status)i), "?");
    assert_string_equal(status_name(ST_NO_BLOCKS), "NO_BLOCKS");
    assert_string_equal(status_name(ST_COUNT), "?");
}

static void test_utf8(void **state) {
    (void)state;
    static const char *const good[] = {"", "a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80",
                                       "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80", "\xc0\x80", "\xc3", "\xe2\x82", "\xed\xa0\x80",
                                      "\xf4\x90\x80\x80", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xff"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(utf8_valid(good[i], strlen(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(utf8_valid(bad[i], strlen(bad[i])));
    assert_true(utf8_valid("a\0b", 3));
}

/* Every code point, cut at every byte: the prefix stops before the cut character and nowhere else. */
static void test_utf8_prefix(void **state) {
    (void)state;
    for (uint32_t cp = 1; cp < 0x110000; cp += (cp < 0x1000 ? 1 : 97)) {
        if (cp >= 0xD800 && cp < 0xE000) continue;
        uint8_t s[8] = {'x'};
        size_t n = 1;
        if (cp < 0x80) s[n++] = (uint8_t)cp;
        else if (cp < 0x800) s[n++] = (uint8_t)(0xC0 | cp >> 6);
        else if (cp < 0x10000) s[n++] = (uint8_t)(0xE0 | cp >> 12);
        else s[n++] = (uint8_t)(0xF0 | cp >> 18);
        if (cp >= 0x10000) s[n++] = (uint8_t)(0x80 | (cp >> 12 & 0x3F));
        if (cp >= 0x800) s[n++] = (uint8_t)(0x80 | (cp >> 6 & 0x3F));
        if (cp >= 0x80) s[n++] = (uint8_t)(0x80 | (cp & 0x3F));
        assert_true(utf8_valid(s, n));
        for (size_t cut = 2; cut < n; cut++) assert_int_equal(utf8_complete_prefix(s, cut), 1);
        assert_int_equal(utf8_complete_prefix(s, n), n);
    }
    assert_int_equal(utf8_complete_prefix("\x80\x80", 2), 2); /* can never become a character */
    assert_int_equal(utf8_complete_prefix("\xed\xa0", 2), 2);
}

static void test_arena(void **state) {
    (void)state;
    struct arena a;
    assert_int_equal(arena_create(4096, &a), ST_OK);
    assert_non_null(arena_alloc(&a, 100));
    uint8_t *p = arena_alloc(&a, 1);
    assert_int_equal((uintptr_t)p % 16, 0);
    assert_null(arena_alloc(&a, SIZE_MAX));
    assert_null(arena_alloc(&a, 4096));
    assert_non_null(arena_alloc(&a, 4096 - 128));
    arena_reset(&a);
    assert_non_null(arena_alloc(&a, 4096));
    arena_destroy(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status_names),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_utf8_prefix),
        cmocka_unit_test(test_arena),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
