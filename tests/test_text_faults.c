/* The tokenizer under failing allocations: each allocation of opening, encoding and rendering fails in turn,
 * the call says ST_NO_MEMORY, nothing leaks (ASan watches), and the next call works. The linker's --wrap
 * puts these functions in the place of libc's; what PCRE2 allocates within itself is not reached. */
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "moe/text_internal.h"
#include "tests/text_fixture.h"

void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n);

static int countdown; /* the allocation that brings it to 0 fails */

static bool fails(void) { return countdown > 0 && --countdown == 0; }
void *__wrap_malloc(size_t n) { return fails() ? NULL : __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t size) { return fails() ? NULL : __real_calloc(n, size); }
void *__wrap_realloc(void *p, size_t n) { return fails() ? NULL : __real_realloc(p, n); }

enum { MAX_ALLOCATIONS = 200, MAX_IDS = 8192 };
static int32_t ids[MAX_IDS], want[MAX_IDS];

static char *write_fixture(void) {
    static const struct fixture_token tokens[] = {{FIXTURE_BYTES("<|im_start|>"), TOKEN_CONTROL},
                                                  {FIXTURE_BYTES("<|im_end|>"), TOKEN_CONTROL},
                                                  {FIXTURE_BYTES("ab"), TOKEN_NORMAL}};
    static const struct bytes merges[] = {FIXTURE_BYTES("a b")};
    struct fixture f = FIXTURE_DEFAULT;
    f.tokens = tokens;
    f.n_tokens = 3;
    f.merges = merges;
    f.n_merges = 1;
    size_t n;
    uint8_t *file = fixture_build(&f, &n);
    char *path = test_write_temp(file, n);
    free(file);
    return path;
}

static void test_open(void **state) {
    (void)state;
    char *path = write_fixture();
    enum status st = ST_NO_MEMORY;
    int n = 0;
    while (st != ST_OK && n < MAX_ALLOCATIONS) {
        struct error e = {0};
        struct text *t = NULL;
        countdown = ++n;
        st = text_open(path, "chatml", &e, &t);
        countdown = 0;
        if (st != ST_OK) {
            assert_int_equal(st, ST_NO_MEMORY);
            assert_int_equal(e.code, ST_NO_MEMORY);
            assert_null(t);
        }
        text_close(t);
    }
    assert_int_equal(st, ST_OK);
    assert_in_range(n, 8, MAX_ALLOCATIONS); /* the vocabulary's own arrays at least */
    unlink(path);
    free(path);
}

/* A long word, marks to be ordered in a long run, a special token and a conversation: every allocation that
 * encoding makes. */
static void test_encode(void **state) {
    (void)state;
    char *path = write_fixture(), s[2048];
    struct text *t;
    assert_int_equal(text_open(path, "chatml", NULL, &t), ST_OK);
    size_t n = 0, n_want = 0, n_ids = 0;
    for (int i = 0; i < 100; i++, n += 2) memcpy(s + n, "ab", 2);
    for (int i = 0; i < 300; i++, n += 2) memcpy(s + n, i % 2 ? "\xCC\x80" : "\xCC\x96", 2);
    memcpy(s + n, "<|im_end|>\n", 11);
    n += 11;
    struct text_message msgs[] = {{{(const uint8_t *)"system", 6}, {(const uint8_t *)s, n}},
                                  {{(const uint8_t *)"user", 4}, {(const uint8_t *)s, n}}};
    for (int chat = 0; chat < 2; chat++) {
        enum status st = ST_NO_MEMORY;
        struct error e = {0};
        if (chat)
            assert_int_equal(text_chat_encode(t, msgs, 2, NULL, want, MAX_IDS, &n_want), ST_OK);
        else
            assert_int_equal(text_encode(t, s, n, true, want, MAX_IDS, &n_want), ST_OK);
        int k = 0;
        while (st != ST_OK && k < MAX_ALLOCATIONS) {
            countdown = ++k;
            st = chat ? text_chat_encode(t, msgs, 2, &e, ids, MAX_IDS, &n_ids)
                      : text_encode(t, s, n, true, ids, MAX_IDS, &n_ids);
            countdown = 0;
            if (st == ST_OK) break;
            assert_int_equal(st, ST_NO_MEMORY);
            if (chat) assert_int_equal(e.code, ST_NO_MEMORY);
        }
        assert_int_equal(st, ST_OK);
        assert_in_range(k, 5, MAX_ALLOCATIONS);
        assert_int_equal(n_ids, n_want);
        assert_memory_equal(ids, want, n_ids * sizeof *ids);
    }
    text_close(t);
    unlink(path);
    free(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_encode),
    };
    return cmocka_run_group_tests_name("text_faults", tests, NULL, NULL);
}
