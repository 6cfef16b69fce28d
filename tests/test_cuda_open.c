/* cuda_open: what the CUDA backend says when it cannot start: each refusal has its status and names what to mend. */
#include "tests/cuda_rig.h"

static struct backend_config config(void) {
    return (struct backend_config){.shape = {.n_layers = 2,
                                             .n_embd = 512,
                                             .n_heads = 4,
                                             .n_kv_heads = 1,
                                             .head_dim = 128,
                                             .n_experts = 8,
                                             .n_experts_used = 2,
                                             .n_ff_expert = 256,
                                             .n_vocab = 100,
                                             .n_ctx_train = 4096,
                                             .norm_eps = 1e-6f,
                                             .rope_base = 1e6f},
                                   .limits = {.max_batch_tokens = 64,
                                              .max_seqs = 4,
                                              .max_rows = 4,
                                              .max_seq_tokens = 4096,
                                              .block_tokens = 16},
                                   .n_threads = 1,
                                   .cpu_isa = "auto",
                                   .gpu_memory_utilization = 0.5};
}

static void refused(const struct backend_config *c, enum status st, const char *word) {
    struct error e = {0};
    struct backend *b = (struct backend *)1;
    assert_int_equal(backend_cuda_open(c, &e, &b), st);
    assert_null(b);
    assert_int_equal(e.code, st);
    if (!strstr(e.text, word)) fail_msg("\"%s\" does not say \"%s\"", e.text, word);
}

static void test_devices(void **state) {
    (void)state;
    struct backend_config c = config();
    c.device = 999;
    refused(&c, ST_UNSUPPORTED, "no GPU 999");
}

static void test_shapes(void **state) {
    (void)state;
    struct backend_config c = config();
    c.shape.head_dim = 64;
    refused(&c, ST_UNSUPPORTED, "heads of 64");
    c = config();
    c.shape.n_embd = 520;
    refused(&c, ST_UNSUPPORTED, "520");
    c = config();
    c.shape.n_experts = 513;
    refused(&c, ST_UNSUPPORTED, "513 experts");
}

static void test_memory(void **state) {
    (void)state;
    struct backend_config c = config();
    c.gpu_memory_utilization = 1e-5;
    refused(&c, ST_NO_MEMORY, "are in use already");
    c.gpu_memory_utilization = 0.0;
    refused(&c, ST_INVALID, "gpu_memory_utilization");

    c = config();
    c.limits.n_blocks = INT32_MAX / 16;
    c.shape.n_layers = 500;
    struct error e = {0};
    struct backend *b;
    int32_t n_blocks = 0;
    assert_ok(backend_cuda_open(&c, &e, &b), &e);
    assert_int_equal(backend_ops_of(b)->ready(b, &e, &n_blocks), ST_NO_MEMORY);
    assert_non_null(strstr(e.text, "the KV cache needs"));
    assert_non_null(strstr(e.text, "MiB more than"));
    backend_ops_of(b)->close(b);
}

/* n_blocks 0: the pool is what memory allows, but no more than all slots can use. */
static void test_pool(void **state) {
    (void)state;
    struct backend_config c = config();
    struct error e = {0};
    struct backend *b;
    int32_t n_blocks = 0;
    assert_ok(backend_cuda_open(&c, &e, &b), &e);
    assert_ok(backend_ops_of(b)->ready(b, &e, &n_blocks), &e);
    assert_int_equal(n_blocks, 4 * 4096 / 16);
    struct moe_memory_line lines[8];
    int n = backend_ops_of(b)->memory(b, lines, 8);
    bool seen = false;
    for (int i = 0; i < n; i++) {
        if (strcmp(lines[i].what, "kv") != 0) continue;
        assert_int_equal(lines[i].n_bytes, (uint64_t)n_blocks * 16 * 2 * 2 * 128 * 2);
        seen = true;
    }
    assert_true(seen);
    backend_ops_of(b)->close(b);
}

static enum status never(void *ctx, size_t offset, void *dst, size_t n) {
    (void)ctx, (void)offset, (void)dst, (void)n;
    return ST_IO;
}

static void test_tensors(void **state) {
    (void)state;
    struct backend_config c = config();
    struct error e = {0};
    struct backend *b;
    struct weight *w;
    assert_ok(backend_cuda_open(&c, &e, &b), &e);
    struct weight_source s = {.name = "blk.0.odd",
                              .type = TENSOR_F16,
                              .n_experts = 1,
                              .n_rows = 16,
                              .n_cols = 300,
                              .n_bytes = 16 * 300 * 2,
                              .read = never};
    assert_int_equal(backend_ops_of(b)->weight_load(b, &s, &e, &w), ST_UNSUPPORTED);
    assert_non_null(strstr(e.text, "blk.0.odd"));
    s = (struct weight_source){.name = "blk.0.type",
                               .type = (enum tensor_type)99,
                               .n_experts = 1,
                               .n_rows = 16,
                               .n_cols = 256,
                               .n_bytes = 16 * 256,
                               .read = never};
    assert_int_equal(backend_ops_of(b)->weight_load(b, &s, &e, &w), ST_UNSUPPORTED);
    assert_non_null(strstr(e.text, "blk.0.type"));
    s = (struct weight_source){.name = "blk.0.gone",
                               .type = TENSOR_Q4_K,
                               .n_experts = 1,
                               .n_rows = 16,
                               .n_cols = 256,
                               .n_bytes = 16 * 144,
                               .read = never};
    assert_int_equal(backend_ops_of(b)->weight_load(b, &s, &e, &w), ST_IO);
    backend_ops_of(b)->close(b);
}

/* A kernel's fault: whoever waits for the step is told, every later call is refused, and closing still ends. No device
 * is left to this process, so this comes last. */
static void test_fault(void **state) {
    (void)state;
    struct backend_config config_ = config();
    config_.limits.n_blocks = 1024;
    struct pair p = pair_open(&config_.shape, &config_.limits);
    struct weights q_norm = pair_norm(&p, 128), k_norm = pair_norm(&p, 128);
    struct bufs q = pair_bufs(&p, BUF_TOKENS, BUF_INNER, 4 * 128), k = pair_bufs(&p, BUF_TOKENS, BUF_INNER, 128);
    struct bufs v = pair_bufs(&p, BUF_TOKENS, BUF_INNER, 128);
    pair_ready(&p);
    const struct backend_ops *gpu = pair_ops(&p, GPU);
    struct backend *b = p.b[GPU];
    int32_t id = 0, block = 1 << 26; /* far outside the pool */
    struct moe_step_seq seq = {.n_tokens = 1, .n_blocks = 1, .rows = MOE_ROWS_NONE};
    struct moe_step step = {.n_seqs = 1, .n_tokens = 1, .seqs = &seq, .ids = &id, .blocks = &block};
    struct moe_row rows[4];
    struct moe_result result = {.rows = rows};
    bool issue = true;
    assert_int_equal(gpu->step_begin(b, &step, &issue), ST_OK);
    assert_int_equal(gpu->rope_store(b, &(struct op_rope_store){.q = q.b[GPU],
                                                                .k = k.b[GPU],
                                                                .v = v.b[GPU],
                                                                .q_norm = q_norm.w[GPU],
                                                                .k_norm = k_norm.w[GPU],
                                                                .eps = 1e-6f}),
                     ST_OK);
    assert_int_equal(gpu->step_end(b), ST_OK);
    assert_int_equal(gpu->step_collect(b, &result), ST_ENGINE_LOST);
    assert_int_equal(gpu->step_begin(b, &step, &issue), ST_ENGINE_LOST);
    struct moe_slot_start start = {.ids = &id, .n_ids = 1, .n_prompt = 1};
    assert_int_equal(gpu->slot_start(b, &start), ST_ENGINE_LOST);
    struct weight *w;
    struct error e = {0};
    struct weight_source s = {.name = "late", .type = TENSOR_F32, .n_experts = 1, .n_rows = 1, .n_cols = 128};
    assert_int_equal(gpu->weight_load(b, &s, &e, &w), ST_ENGINE_LOST);
    assert_non_null(strstr(e.text, "is lost"));
    pair_close(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices), cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_memory),  cmocka_unit_test(test_pool),
        cmocka_unit_test(test_tensors), cmocka_unit_test(test_fault),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
