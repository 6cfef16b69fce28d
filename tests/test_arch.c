/* arch: the bundled model's shape and tensors. */
#include "moe/arch.h"
#include "moe/quant.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void test_tiny(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    struct arch_model m;
    assert_ok(gguf_open(TINY_MODEL, false, &e, &g), &e);
    assert_ok(arch_read(g, &e, &m), &e);
    assert_string_equal(m.architecture, "qwen3moe");
    assert_string_equal(m.name, "tiny-qwen3-moe");
    assert_string_equal(m.quantization, "Q4_K");
    assert_int_equal(m.shape.n_layers, 6);
    assert_int_equal(m.shape.n_embd, 256);
    assert_int_equal(m.shape.n_heads, 4);
    assert_int_equal(m.shape.n_kv_heads, 1);
    assert_int_equal(m.shape.head_dim, 128);
    assert_int_equal(m.shape.n_experts, 32);
    assert_int_equal(m.shape.n_experts_used, 4);
    assert_int_equal(m.shape.n_ff_expert, 256);
    assert_int_equal(m.shape.n_vocab, 8192);
    assert_int_equal(m.shape.n_ctx_train, 4096);
    assert_true(m.shape.norm_eps == 1e-6f);
    assert_true(m.shape.rope_base == 1e6f);
    assert_true(m.router_renormalize);
    assert_ptr_not_equal(m.output, m.token_embd);
    assert_string_equal(m.output->name, "output.weight");
    assert_string_equal(m.layers[5].down_exps->name, "blk.5.ffn_down_exps.weight");
    assert_string_equal(m.layers[3].attn_k_norm->name, "blk.3.attn_k_norm.weight");
    assert_int_equal(m.layers[0].router->type, TENSOR_F32);
    assert_int_equal(m.layers[0].gate_exps->ne[2], 32);
    arch_free(&m);
    gguf_close(g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny),
    };
    return cmocka_run_group_tests_name("arch", tests, NULL, NULL);
}
