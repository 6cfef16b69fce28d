/* moed-synth: the program is run and its files are opened. Shapes and types are the real model's, weights
 * have the deviation that was promised, files depend on the seed and on nothing else, failures say why and
 * leave nothing behind. */
#include "moe/arch.h"
#include "moe/moe.h"
#include "moe/quant.h"
#include "moe/text.h"
#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char scratch[] = "/tmp/moed-test-synth-XXXXXX";

/* Run moed-synth through sh; its output, both streams, in text. Returns the exit status. */
static int run(const char *before, const char *args, char text[2048]) {
    char command[1024];
    snprintf(command, sizeof command, "cd %s && %s " TEST_BIN "/moed-synth %s 2>&1", scratch,
             before, args);
    FILE *f = popen(command, "r");
    if (!f) fail_msg("popen");
    size_t n = fread(text, 1, 2047, f);
    text[n] = 0;
    int status = pclose(f);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void run_ok(const char *args) {
    char text[2048];
    int status = run("", args, text);
    if (status != 0) fail_msg("moed-synth %s: %d %s", args, status, text);
}

static void run_fails(const char *before, const char *args, int want, const char *words) {
    char text[2048];
    int status = run(before, args, text);
    if (status != want || !strstr(text, words))
        fail_msg("moed-synth %s: %d \"%s\", not %d \"%s\"", args, status, text, want, words);
}

static const char *in_scratch(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    return path;
}

static void open_model(const char *name, struct gguf **g, struct arch_model *m) {
    struct error e = {0};
    assert_ok(gguf_open(in_scratch(name), false, &e, g), &e);
    assert_ok(arch_read(*g, &e, m), &e);
}

static float *weights(const struct gguf *g, const struct gguf_tensor *t, size_t *n) {
    uint8_t *raw = malloc(t->n_bytes);
    *n = (size_t)(t->ne[0] * t->ne[1] * t->ne[2]);
    float *w = malloc(*n * sizeof *w);
    assert_int_equal(gguf_tensor_read(g, t, 0, raw, t->n_bytes), ST_OK);
    dequantize(t->type, raw, *n, w);
    free(raw);
    return w;
}

/* 65 536 or more independent weights: the estimate of the deviation is good to 0.3 %, and superblocks
 * vary by 0.2 % in the mean square; 2 % is neither noise nor room for a wrong scale. */
static void check_deviation(const struct gguf *g, const struct gguf_tensor *t, double std) {
    size_t n;
    float *w = weights(g, t, &n);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        assert_true(isfinite(w[i]));
        sum += (double)w[i];
        squares += (double)w[i] * (double)w[i];
    }
    free(w);
    double mean = sum / (double)n, got = sqrt(squares / (double)n);
    double slack = n >= 65536 ? 0.02 : 0.05;
    if (fabs(got / std - 1) > slack) fail_msg("%s: deviation %g, not %g", t->name, got, std);
    if (fabs(mean) > slack * std) fail_msg("%s: mean %g at deviation %g", t->name, mean, std);
}

static void check_ones(const struct gguf *g, const struct gguf_tensor *t) {
    size_t n;
    float *w = weights(g, t, &n);
    for (size_t i = 0; i < n; i++) assert_true(w[i] == 1.0f);
    free(w);
}

static void test_q4_k_m(void **state) {
    (void)state;
    struct gguf *g;
    struct arch_model m;
    run_ok("--shape tiny --layers 8 -o q4.gguf");
    open_model("q4.gguf", &g, &m);
    assert_int_equal(m.shape.n_layers, 8);
    assert_int_equal(m.shape.n_embd, 256);
    assert_int_equal(m.shape.n_experts, 32);
    assert_int_equal(m.shape.n_vocab, 8192);
    assert_string_equal(m.name, "synthetic tiny");
    assert_string_equal(m.quantization, "Q4_K");
    assert_int_equal(m.token_embd->type, TENSOR_Q4_K);
    assert_int_equal(m.output->type, TENSOR_Q6_K);
    check_deviation(g, m.token_embd, 1);
    check_deviation(g, m.output, 1 / sqrt(256));
    check_ones(g, m.output_norm);
    for (int i = 0; i < 8; i++) {
        const struct arch_layer *l = &m.layers[i];
        bool more = i == 0 || i == 3 || i == 6 || i == 7; /* llama.cpp's rule for 8 layers */
        assert_int_equal(l->attn_v->type, more ? TENSOR_Q6_K : TENSOR_Q4_K);
        assert_int_equal(l->down_exps->type, more ? TENSOR_Q6_K : TENSOR_Q4_K);
        assert_int_equal(l->attn_q->type, TENSOR_Q4_K);
        assert_int_equal(l->gate_exps->type, TENSOR_Q4_K);
        check_deviation(g, l->attn_q, 1 / sqrt(256));
        check_deviation(g, l->attn_k, 1 / sqrt(256));
        check_deviation(g, l->attn_v, 1 / sqrt(256));
        check_deviation(g, l->attn_output, 1 / sqrt(512 * 2 * 8));
        check_deviation(g, l->router, 1 / sqrt(256));
        check_deviation(g, l->gate_exps, 1 / sqrt(256));
        check_deviation(g, l->down_exps, 1 / sqrt(256 * 2 * 8));
        check_ones(g, l->attn_norm);
        check_ones(g, l->attn_q_norm);
        check_ones(g, l->ffn_norm);
    }
    arch_free(&m);
    gguf_close(g);
}

static void test_q8_0(void **state) {
    (void)state;
    struct gguf *g;
    struct arch_model m;
    run_ok("--shape tiny --layers 1 --type q8_0 -o q8.gguf");
    open_model("q8.gguf", &g, &m);
    assert_string_equal(m.quantization, "Q8_0");
    assert_int_equal(m.output->type, TENSOR_Q8_0);
    assert_int_equal(m.layers[0].attn_v->type, TENSOR_Q8_0);
    assert_int_equal(m.layers[0].router->type, TENSOR_F32);
    check_deviation(g, m.layers[0].up_exps, 1 / sqrt(256));
    check_deviation(g, m.layers[0].attn_output, 1 / sqrt(512 * 2 * 1));
    arch_free(&m);
    gguf_close(g);
}

static void test_determinism(void **state) {
    (void)state;
    size_t n[4];
    uint8_t *file[4];
    run_ok("--shape tiny --layers 2 --seed 7 --threads 1 -o a.gguf");
    run_ok("--shape tiny --layers 2 --seed 7 --threads 3 -o b.gguf");
    run_ok("--shape tiny --layers 2 --seed 8 -o c.gguf");
    for (int i = 0; i < 3; i++) {
        char name[] = "a.gguf";
        name[0] = (char)('a' + i);
        file[i] = test_read_file(in_scratch(name), &n[i]);
        assert_int_equal(n[i], n[0]);
    }
    assert_memory_equal(file[0], file[1], n[0]);
    size_t same = 0;
    for (size_t i = n[0] / 2; i < n[0]; i++) same += file[0][i] == file[2][i];
    assert_true(same < n[0] / 2 / 20); /* 1 in 256, and the few bytes of scales */
    for (int i = 0; i < 3; i++) free(file[i]);
}

static int compare_bytes(const void *a, const void *b) {
    const struct bytes *x = a, *y = b;
    int c = memcmp(x->p, y->p, x->n < y->n ? x->n : y->n);
    return c ? c : (x->n > y->n) - (x->n < y->n);
}

static void test_synthetic_vocabulary(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    const struct bytes *tokens, *merges;
    const int32_t *types;
    size_t n, n_types, n_merges;
    int64_t eos;
    run_ok("--shape tiny --layers 1 -o v.gguf");
    assert_ok(gguf_open(in_scratch("v.gguf"), true, &e, &g), &e);
    assert_ok(gguf_string_array(g, "tokenizer.ggml.tokens", &e, &tokens, &n), &e);
    assert_ok(gguf_int_array(g, "tokenizer.ggml.token_type", &e, &types, &n_types), &e);
    assert_ok(gguf_string_array(g, "tokenizer.ggml.merges", &e, &merges, &n_merges), &e);
    assert_ok(gguf_get_int(g, "tokenizer.ggml.eos_token_id", 0, 8191, &e, &eos), &e);
    assert_int_equal(n, 8192);
    assert_int_equal(n_types, 8192);
    assert_int_equal(eos, 8191);
    assert_int_equal(tokens[eos].n, 10);
    assert_memory_equal(tokens[eos].p, "<|im_end|>", 10);
    assert_int_equal(types[eos], 3);
    assert_memory_equal(tokens['A'].p, "A", 1);
    assert_memory_equal(tokens[' '].p, "\xc4\xa0", 2); /* U+0120 */
    assert_memory_equal(tokens[0xAD].p, "\xc5\x83", 2); /* U+0143 */
    assert_memory_equal(tokens[0x7F].p, "\xc4\xa1", 2); /* U+0121 */
    struct bytes *sorted = malloc(n * sizeof *sorted);
    memcpy(sorted, tokens, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, compare_bytes);
    for (size_t i = 1; i < n; i++) assert_true(compare_bytes(&sorted[i - 1], &sorted[i]) != 0);
    for (size_t i = 0; i < n_merges; i++) { /* both parts and what they make are tokens */
        const uint8_t *space = memchr(merges[i].p, ' ', merges[i].n);
        assert_non_null(space);
        size_t left = (size_t)(space - merges[i].p), right = merges[i].n - left - 1;
        uint8_t whole[16];
        memcpy(whole, merges[i].p, left);
        memcpy(whole + left, space + 1, right);
        const struct bytes parts[3] = {
            {merges[i].p, left}, {space + 1, right}, {whole, left + right}};
        for (int k = 0; k < 3; k++)
            assert_non_null(bsearch(&parts[k], sorted, n, sizeof *sorted, compare_bytes));
    }
    assert_int_equal(n_merges, 702);
    free(sorted);
    gguf_close(g);

    struct text *t;
    int32_t ids[32];
    char text[64];
    static const char sample[] = "Two words, th\xc3\xa9 rest";
    assert_ok(text_open(in_scratch("v.gguf"), NULL, &e, &t), &e);
    assert_int_equal(text_encode(t, sample, strlen(sample), false, ids, 32, &n), ST_OK);
    assert_true(n < strlen(sample)); /* merges were used */
    size_t n_text;
    assert_int_equal(text_decode(t, ids, n, false, false, text, sizeof text, &n_text), ST_OK);
    assert_int_equal(n_text, strlen(sample));
    assert_memory_equal(text, sample, n_text);
    text_close(t);
}

/* What the probe of a run at depth collects. */
enum { DEPTH = 40, N_TOKENS = 16 };

static void count_experts(void *ctx, int layer, int32_t n_tokens, const float *hidden,
                          const int32_t *ids, const float *weights_of) {
    (void)hidden, (void)weights_of;
    if (layer < 0) return;
    assert_int_equal(n_tokens, N_TOKENS);
    bool seen[32] = {false};
    for (int i = 0; i < n_tokens * 4; i++) seen[ids[i]] = true;
    for (int i = 0; i < 32; i++) ((int *)ctx)[layer] += seen[i];
}

/* Forty layers deep, logits are of unit size and tokens are still routed apart: 16 tokens that drew 4 of
 * 32 experts at random would meet 28.2 of them in a layer. */
static void test_depth(void **state) {
    (void)state;
    struct error e = {0};
    struct moe *m;
    int distinct[DEPTH] = {0};
    run_ok("--shape tiny --layers 40 -o deep.gguf");
    const struct moe_options o = {.model_path = in_scratch("deep.gguf"),
                                  .device = "cpu",
                                  .n_threads = 2,
                                  .limits = {.max_batch_tokens = N_TOKENS,
                                             .max_seqs = 1,
                                             .max_rows = N_TOKENS,
                                             .max_seq_tokens = 64,
                                             .block_tokens = 16,
                                             .n_blocks = 4}};
    assert_ok(moe_open(&o, NULL, NULL, &e, &m), &e);
    moe_set_probe(m, count_experts, distinct);
    int32_t ids[N_TOKENS], block = 1;
    for (int i = 0; i < N_TOKENS; i++) ids[i] = 300 + 97 * i;
    const struct moe_slot_start start = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                                         .ids = ids,
                                         .n_ids = N_TOKENS,
                                         .n_prompt = N_TOKENS};
    const struct moe_step_seq seq = {.n_tokens = N_TOKENS, .n_blocks = 1, .rows = MOE_ROWS_ALL};
    const struct moe_step step = {1, N_TOKENS, &seq, ids, &block};
    struct moe_row rows[N_TOKENS];
    struct moe_result result = {.rows = rows};
    assert_int_equal(moe_slot_start(m, &start), ST_OK);
    assert_int_equal(moe_submit(m, &step), ST_OK);
    assert_int_equal(moe_collect(m, &result), ST_OK);
    assert_int_equal(result.n_rows, N_TOKENS);
    float *logits = malloc(8192 * sizeof *logits);
    for (int r = 0; r < N_TOKENS; r++) {
        double squares = 0;
        assert_int_equal(moe_logits(m, r, logits), ST_OK);
        for (int i = 0; i < 8192; i++) squares += (double)logits[i] * (double)logits[i];
        assert_true(squares > 8192 * 0.8 && squares < 8192 * 1.25);
    }
    free(logits);
    moe_close(m);
    int sum = 0;
    for (int i = 0; i < DEPTH; i++) sum += distinct[i];
    if (sum < DEPTH * 25) fail_msg("%g distinct experts in a layer", (double)sum / DEPTH);
}

static void test_copied_vocabulary(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g, *from;
    const struct bytes *got, *want;
    const int32_t *got_types, *want_types;
    struct bytes template, want_template;
    bool bos = true;
    size_t n, n_want;
    run_ok("--shape tiny --layers 1 --vocab " TINY_MODEL " -o copy.gguf");
    assert_ok(gguf_open(in_scratch("copy.gguf"), false, &e, &g), &e);
    assert_ok(gguf_open(TINY_MODEL, false, &e, &from), &e);
    static const char *const keys[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"};
    for (int i = 0; i < 2; i++) {
        assert_ok(gguf_string_array(g, keys[i], &e, &got, &n), &e);
        assert_ok(gguf_string_array(from, keys[i], &e, &want, &n_want), &e);
        assert_int_equal(n, n_want);
        for (size_t k = 0; k < n; k++) assert_int_equal(compare_bytes(&got[k], &want[k]), 0);
    }
    assert_ok(gguf_int_array(g, "tokenizer.ggml.token_type", &e, &got_types, &n), &e);
    assert_ok(gguf_int_array(from, "tokenizer.ggml.token_type", &e, &want_types, &n_want), &e);
    assert_int_equal(n, n_want);
    assert_memory_equal(got_types, want_types, n * sizeof *got_types);
    assert_ok(gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &e, &bos), &e);
    assert_false(bos);
    assert_ok(gguf_get_string(g, "tokenizer.chat_template", &e, &template), &e);
    assert_ok(gguf_get_string(from, "tokenizer.chat_template", &e, &want_template), &e);
    assert_int_equal(compare_bytes(&template, &want_template), 0);
    gguf_close(g);
    gguf_close(from);
}

static void test_failures(void **state) {
    (void)state;
    run_fails("", "--shape huge -o x.gguf", 2, "--shape huge: known shapes are qwen3-30b-a3b");
    run_fails("", "-o x.gguf", 2, "--shape is missing");
    run_fails("", "--shape tiny", 2, "-o is missing");
    run_fails("", "--shape tiny --type q3 -o x.gguf", 2, "--type q3: known types are");
    run_fails("", "--shape tiny --layers 0 -o x.gguf", 2, "--layers 0: a number from 1 to 512");
    run_fails("", "--shape tiny --layers 1x -o x.gguf", 2, "--layers 1x: a number");
    run_fails("", "--shape tiny --seed -1 -o x.gguf", 2, "--seed -1: a number");
    run_fails("", "--shape tiny --skew -1 -o x.gguf", 2, "--skew -1: a number from 0 to 4");
    run_fails("", "--shape tiny -o x.gguf surplus", 2, "surplus: not an option");
    run_fails("", "--nonsense", 2, "usage: moed-synth");
    run_fails("", "--shape tiny --vocab absent.gguf -o x.gguf", 1,
              "--vocab: absent.gguf: No such file");
    run_fails("", "--shape tiny --vocab " QWEN3_VOCAB " -o x.gguf", 1,
              "has 151936 tokens, but the shape tiny has 8192");
    run_fails("", "--shape tiny -o absent/x.gguf", 1,
              "cannot create absent/x.gguf.part: No such file");
    /* A limit on file size stands for a full disk. */
    run_fails("trap '' XFSZ; ulimit -f 2000; exec", "--shape tiny -o x.gguf", 1,
              "cannot write x.gguf (0.03 GB): File too large");
    assert_int_equal(access(in_scratch("x.gguf"), F_OK), -1);
    assert_int_equal(access(in_scratch("x.gguf.part"), F_OK), -1);
    char text[2048];
    assert_int_equal(run("", "--help", text), 0);
    assert_non_null(strstr(text, "--layers N"));
}

static int make_scratch(void **state) {
    (void)state;
    return mkdtemp(scratch) ? 0 : -1;
}

static int remove_scratch(void **state) {
    (void)state;
    static const char *const names[] = {"q4.gguf", "q8.gguf", "a.gguf",    "b.gguf",
                                        "c.gguf",  "v.gguf",  "copy.gguf", "deep.gguf"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(in_scratch(names[i]));
    return rmdir(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_q4_k_m),
        cmocka_unit_test(test_q8_0),
        cmocka_unit_test(test_determinism),
        cmocka_unit_test(test_synthetic_vocabulary),
        cmocka_unit_test(test_copied_vocabulary),
        cmocka_unit_test(test_depth),
        cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests_name("synth", tests, make_scratch, remove_scratch);
}
