/* The file with the measured load: what was written is read back, and what is not such a file is refused with
 * its line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/load_file.h"
#include "tests/support.h"

static const char header[] = "layer,expert,devices,tokens\n";

static enum status read_text(const char *text, struct error *e, uint64_t **tokens, size_t *n) {
    char *path = test_write_temp(text, strlen(text));
    enum status st = load_file_read(path, e, tokens, n);
    unlink(path);
    free(path);
    return st;
}

static void test_read(void **state) {
    (void)state;
    uint64_t *tokens;
    size_t n;
    struct error e = {0};
    char text[512];
    snprintf(text, sizeof text,
             "%s0,0,0+1,5\n0,1,1,0\n0,2,0,18446744073709551615\n1,0,1,7\n1,1,0,8\n"
             "1,2,1,9\n",
             header);
    assert_ok(read_text(text, &e, &tokens, &n), &e);
    const uint64_t want[] = {5, 0, UINT64_MAX, 7, 8, 9};
    assert_int_equal(n, 6);
    assert_memory_equal(tokens, want, sizeof want);
    free(tokens);
    assert_ok(load_file_read("/nonexistent/load.csv", &e, &tokens, &n), &e);
    assert_null(tokens);
    assert_int_equal(n, 0);
    assert_int_equal(load_file_read("/", &e, &tokens, &n), ST_IO);
}

static void test_write(void **state) {
    (void)state;
    const struct model_shape shape = {.n_layers = 2, .n_experts = 3};
    const uint64_t want[] = {5, 0, UINT64_MAX, 7, 8, 9};
    const uint16_t held[] = {1, 2, 3, 0x8000, 0xffff, 1};
    uint64_t *tokens;
    size_t n;
    struct error e = {0};
    char *path = test_write_temp("old", 3);
    assert_ok(load_file_write(path, &shape, want, held, &e), &e);
    assert_ok(load_file_read(path, &e, &tokens, &n), &e);
    assert_int_equal(n, 6);
    assert_memory_equal(tokens, want, sizeof want);
    free(tokens);
    unlink(path);
    free(path);
    assert_int_equal(load_file_write("/nonexistent/load.csv", &shape, want, held, &e), ST_IO);
}

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *lines;
        int at;
    } cases[] = {
        {"", 1}, /* no experts */
        {"0,0,0,1", 2}, /* cut short */
        {"0,1,0,1\n", 2}, /* not from 0 */
        {"0,0,0,1\n0,0,0,1\n", 3}, /* twice */
        {"0,0,0,1\n0,1,0,1\n1,0,0,1\n", 4}, /* the second layer is shorter */
        {"0,0,0,1\n0,1,0,1\n1,0,0,1\n1,1,0,1\n1,2,0,1\n", 6}, /* or longer */
        {"0,0,0,1\n2,0,0,1\n", 3}, /* a layer is missing */
        {"0,0,x,1\n", 2}, /* no devices */
        {"0,0,0,1 \n", 2}, /* more on the line */
        {"0,0,0,-1 \n", 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t *tokens;
        size_t n;
        struct error e = {0};
        char text[512], want[32];
        snprintf(text, sizeof text, "%s%s", header, cases[i].lines);
        assert_int_equal(read_text(text, &e, &tokens, &n), ST_CORRUPT);
        assert_null(tokens);
        snprintf(want, sizeof want, ": line %d ", cases[i].at);
        if (!strstr(e.text, want)) fail_msg("case %zu: %s", i, e.text);
    }
    uint64_t *tokens;
    size_t n;
    assert_int_equal(read_text("tokens\n0,0,0,1\n", NULL, &tokens, &n), ST_CORRUPT);
    assert_int_equal(read_text("", NULL, &tokens, &n), ST_CORRUPT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read),
        cmocka_unit_test(test_write),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
