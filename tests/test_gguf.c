/* gguf: the bundled files. */
#include "moe/gguf.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void test_tiny(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    assert_ok(gguf_open(TINY_MODEL, false, &e, &g), &e);
    assert_int_equal(gguf_n_tensors(g), 75);
    const struct gguf_tensor *t = gguf_tensor_find(g, "blk.0.attn_output.weight");
    assert_non_null(t);
    assert_int_equal(t->type, TENSOR_Q4_K);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->ne[0], 512);
    assert_int_equal(t->ne[1], 256);
    assert_int_equal(t->ne[2], 1);
    assert_int_equal(t->offset, 3190720); /* as the gguf Python package reads it */
    assert_int_equal(t->n_bytes, 73728);
    size_t n;
    uint8_t *file = test_read_file(TINY_MODEL, &n), *got = malloc(t->n_bytes);
    assert_int_equal(gguf_tensor_read(g, t, 100, got, 1000), ST_OK);
    assert_memory_equal(got, file + t->offset + 100, 1000);
    free(got);
    free(file);
    gguf_close(g);
}

static void test_vocab(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    const struct bytes *tokens;
    const int32_t *types;
    size_t n;
    int64_t eos;
    assert_ok(gguf_open(QWEN3_VOCAB, true, &e, &g), &e);
    assert_ok(gguf_string_array(g, "tokenizer.ggml.tokens", &e, &tokens, &n), &e);
    assert_int_equal(n, 151936);
    assert_int_equal(tokens[151645].n, 10);
    assert_memory_equal(tokens[151645].p, "<|im_end|>", 10);
    assert_ok(gguf_int_array(g, "tokenizer.ggml.token_type", &e, &types, &n), &e);
    assert_int_equal(n, 151936);
    assert_int_equal(types[0], 1);
    assert_int_equal(types[151645], 3);
    assert_ok(gguf_get_int(g, "tokenizer.ggml.eos_token_id", 0, 151935, &e, &eos), &e);
    assert_int_equal(eos, 151645);
    gguf_close(g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny),
        cmocka_unit_test(test_vocab),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
