/* arch: the bundled model's shape and tensors; then a small complete model, with one thing wrong at a
 * time: each key, each tensor, each relation between them, named in the sentence that refuses it. */
#include "moe/arch.h"
#include "moe/quant.h"
#include "tests/gguf_build.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
    assert_string_equal(m.token_embd->name, "token_embd.weight");
    assert_string_equal(m.output_norm->name, "output_norm.weight");
    assert_string_equal(m.output->name, "output.weight");
    for (int i = 0; i < 6; i++) {
        const struct arch_layer *l = &m.layers[i];
        const struct {
            const struct gguf_tensor *t;
            const char *name;
        } want[] = {{l->attn_norm, "attn_norm"},     {l->attn_q, "attn_q"},
                    {l->attn_k, "attn_k"},           {l->attn_v, "attn_v"},
                    {l->attn_q_norm, "attn_q_norm"}, {l->attn_k_norm, "attn_k_norm"},
                    {l->attn_output, "attn_output"}, {l->ffn_norm, "ffn_norm"},
                    {l->router, "ffn_gate_inp"},     {l->gate_exps, "ffn_gate_exps"},
                    {l->up_exps, "ffn_up_exps"},     {l->down_exps, "ffn_down_exps"}};
        for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s.weight", i, want[k].name);
            assert_string_equal(want[k].t->name, name);
        }
    }
    arch_free(&m);
    gguf_close(g);
}

/* ---- a small model ------------------------------------------------------------------------------- */

enum value_kind { V_U32, V_F32, V_STRING, V_BOOL };

struct key_spec {
    const char *key; /* NULL: left out */
    enum value_kind kind;
    uint32_t u;
    float f;
    const char *s;
};

struct tensor_spec {
    const char *name; /* NULL: left out */
    enum tensor_type type;
    int64_t ne[4];
};

enum { MAX_KEYS = 24, MAX_TENSORS = 32 };

struct model_spec {
    struct key_spec keys[MAX_KEYS];
    struct tensor_spec tensors[MAX_TENSORS];
    int n_keys, n_tensors;
    int n_tokens; /* entries of tokenizer.ggml.tokens; -1: no such key */
    int n_token_types; /* likewise */
    bool no_data; /* tensor infos alone, opened as metadata */
};

#define LAYER(l)                                                                                   \
    {"blk." #l ".attn_norm.weight", TENSOR_F32, {32}},                                             \
        {"blk." #l ".attn_q.weight", TENSOR_Q8_0, {32, 64}},                                       \
        {"blk." #l ".attn_k.weight", TENSOR_F16, {32, 32}},                                        \
        {"blk." #l ".attn_v.weight", TENSOR_BF16, {32, 32}},                                       \
        {"blk." #l ".attn_q_norm.weight", TENSOR_F32, {16}},                                       \
        {"blk." #l ".attn_k_norm.weight", TENSOR_F32, {16}},                                       \
        {"blk." #l ".attn_output.weight", TENSOR_F32, {64, 32}},                                   \
        {"blk." #l ".ffn_norm.weight", TENSOR_F32, {32}},                                          \
        {"blk." #l ".ffn_gate_inp.weight", TENSOR_F32, {32, 6}},                                   \
        {"blk." #l ".ffn_gate_exps.weight", TENSOR_Q8_0, {32, 96, 6}},                             \
        {"blk." #l ".ffn_up_exps.weight", TENSOR_Q8_0, {32, 96, 6}}, {                             \
        "blk." #l ".ffn_down_exps.weight", TENSOR_F16, { 96, 32, 6 }                               \
    }

/* D 32, H 4, G 2, Hd 16, E 6, K 2, F 96, V 10, 2 layers. */
static const struct model_spec small = {
    .keys = {{"general.architecture", V_STRING, 0, 0, "qwen3moe"},
             {"general.name", V_STRING, 0, 0, "small"},
             {"qwen3moe.block_count", V_U32, 2, 0, NULL},
             {"qwen3moe.context_length", V_U32, 64, 0, NULL},
             {"qwen3moe.embedding_length", V_U32, 32, 0, NULL},
             {"qwen3moe.attention.head_count", V_U32, 4, 0, NULL},
             {"qwen3moe.attention.head_count_kv", V_U32, 2, 0, NULL},
             {"qwen3moe.attention.key_length", V_U32, 16, 0, NULL},
             {"qwen3moe.attention.value_length", V_U32, 16, 0, NULL},
             {"qwen3moe.attention.layer_norm_rms_epsilon", V_F32, 0, 1e-6f, NULL},
             {"qwen3moe.rope.freq_base", V_F32, 0, 10000000.0f, NULL},
             {"qwen3moe.expert_count", V_U32, 6, 0, NULL},
             {"qwen3moe.expert_used_count", V_U32, 2, 0, NULL},
             {"qwen3moe.expert_feed_forward_length", V_U32, 96, 0, NULL},
             {"tokenizer.ggml.eos_token_id", V_U32, 9, 0, NULL}},
    .n_keys = 15,
    .tensors = {{"token_embd.weight", TENSOR_Q8_0, {32, 10}},
                {"output_norm.weight", TENSOR_F32, {32}},
                {"output.weight", TENSOR_F16, {32, 10}},
                LAYER(0),
                LAYER(1)},
    .n_tensors = 27,
    .n_tokens = 10,
    .n_token_types = 10,
};

static struct gguf *open_model(const struct model_spec *m) {
    struct gguf_build b = gguf_build_new();
    for (int i = 0; i < m->n_keys; i++) {
        const struct key_spec *k = &m->keys[i];
        if (!k->key) continue;
        if (k->kind == V_U32) gguf_build_u32(&b, k->key, k->u);
        if (k->kind == V_F32) gguf_build_f32(&b, k->key, k->f);
        if (k->kind == V_STRING) gguf_build_string(&b, k->key, k->s);
        if (k->kind == V_BOOL) {
            gguf_build_key(&b, k->key, GGUF_BOOL);
            gguf_put(&b.keys, &k->u, 1);
        }
    }
    if (m->n_tokens >= 0)
        gguf_build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)m->n_tokens);
    for (int i = 0; i < m->n_tokens; i++) gguf_put_string(&b.keys, "x", 1);
    if (m->n_token_types >= 0)
        gguf_build_array(&b, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)m->n_token_types);
    for (int i = 0; i < m->n_token_types; i++) gguf_put_u32(&b.keys, 1);
    for (int i = 0; i < m->n_tensors; i++) {
        const struct tensor_spec *t = &m->tensors[i];
        if (t->name && t->ne[3] == 0)
            gguf_build_tensor(&b, t->name, t->type, t->ne[0], t->ne[1], t->ne[2]);
        if (t->name && t->ne[3] != 0)
            gguf_build_info(&b, t->name, 4, (const uint64_t *)t->ne, t->type, (uint64_t)1 << 20);
    }
    if (m->no_data) b.data_bytes = 0;
    size_t n;
    uint8_t *file = gguf_build_bytes(&b, &n);
    char *path = test_write_temp(file, n);
    struct error e = {0};
    struct gguf *g;
    assert_ok(gguf_open(path, m->no_data, &e, &g), &e);
    unlink(path);
    free(path);
    free(file);
    gguf_build_free(&b);
    return g;
}

static struct key_spec *key(struct model_spec *m, const char *name) {
    for (int i = 0; i < m->n_keys; i++)
        if (m->keys[i].key && strcmp(m->keys[i].key, name) == 0) return &m->keys[i];
    if (m->n_keys == MAX_KEYS) fail_msg("too many keys");
    m->keys[m->n_keys].key = name;
    return &m->keys[m->n_keys++];
}

static struct tensor_spec *tensor(struct model_spec *m, const char *name) {
    for (int i = 0; i < m->n_tensors; i++)
        if (m->tensors[i].name && strcmp(m->tensors[i].name, name) == 0) return &m->tensors[i];
    if (m->n_tensors == MAX_TENSORS) fail_msg("too many tensors");
    m->tensors[m->n_tensors].name = name;
    return &m->tensors[m->n_tensors++];
}

static void expect(const struct model_spec *spec, enum status want, const char *words) {
    struct error e = {0};
    struct arch_model m;
    struct gguf *g = open_model(spec);
    enum status st = arch_read(g, &e, &m);
    if (st != want || !strstr(e.text, words))
        fail_msg("%s \"%s\", not %s \"%s\"", status_name(st), e.text, status_name(want), words);
    if (st == ST_OK)
        arch_free(&m);
    else
        assert_null(m.layers);
    gguf_close(g);
}

static void expect_u32(const char *name, uint32_t v, enum status want, const char *words) {
    struct model_spec m = small;
    *key(&m, name) = (struct key_spec){name, V_U32, v, 0, NULL};
    expect(&m, want, words);
}

static void test_small(void **state) {
    (void)state;
    struct error e = {0};
    struct arch_model m;
    struct gguf *g = open_model(&small);
    assert_ok(arch_read(g, &e, &m), &e);
    assert_string_equal(m.name, "small");
    assert_int_equal(m.shape.n_heads, 4);
    assert_int_equal(m.shape.n_kv_heads, 2);
    assert_int_equal(m.shape.n_vocab, 10);
    assert_int_equal(m.shape.n_ff_expert, 96);
    assert_int_equal(m.shape.n_experts_used, 2);
    assert_true(m.shape.rope_base == 1e7f);
    assert_string_equal(m.quantization, "Q8_0");
    assert_ptr_equal(m.output, gguf_tensor_find(g, "output.weight"));
    arch_free(&m);
    gguf_close(g);
}

static void test_optional(void **state) {
    (void)state;
    struct error e = {0};
    struct arch_model m;
    struct model_spec spec = small;
    tensor(&spec, "output.weight")->name = NULL; /* tied */
    spec.n_tokens = spec.n_token_types = -1;
    *key(&spec, "general.name") =
        (struct key_spec){"general.name", V_STRING, 0, 0, "a\033[1mb\xff\n"};
    *key(&spec, "qwen3moe.expert_weights_norm") =
        (struct key_spec){"qwen3moe.expert_weights_norm", V_BOOL, 0, 0, NULL};
    struct gguf *g = open_model(&spec);
    assert_ok(arch_read(g, &e, &m), &e);
    assert_ptr_equal(m.output, m.token_embd);
    assert_string_equal(m.name, "a?[1mb??");
    assert_false(m.router_renormalize);
    arch_free(&m);
    gguf_close(g);

    /* A name longer than its field is cut before a character, not inside one. */
    char text[200] = "";
    for (int i = 0; i < 60; i++) strcat(text, "\xe2\x82\xac");
    spec = small;
    key(&spec, "general.name")->s = text;
    g = open_model(&spec);
    assert_ok(arch_read(g, &e, &m), &e);
    assert_int_equal(strlen(m.name), 126);
    assert_memory_equal(m.name, text, 126);
    arch_free(&m);
    gguf_close(g);
    key(&spec, "general.name")->key = NULL;
    expect(&spec, ST_OK, "");
}

static void test_required_keys(void **state) {
    (void)state;
    int n = 0;
    for (int i = 0; i < small.n_keys; i++) {
        const char *name = small.keys[i].key;
        if (strncmp(name, "qwen3moe.", 9) != 0 && strcmp(name, "general.architecture") != 0)
            continue;
        n++;
        struct model_spec m = small;
        m.keys[i].key = NULL;
        char words[96];
        snprintf(words, sizeof words, "the file has no key %s", name);
        expect(&m, ST_NOT_FOUND, words);
        /* As a string (or, the architecture, as a number) it is refused too. */
        m = small;
        m.keys[i].kind = small.keys[i].kind == V_STRING ? V_U32 : V_STRING;
        m.keys[i].s = "2";
        snprintf(words, sizeof words, "key %s is of type", name);
        expect(&m, ST_CORRUPT, words);
    }
    assert_int_equal(n, 13);
}

static void test_key_ranges(void **state) {
    (void)state;
    expect_u32("qwen3moe.block_count", 0, ST_CORRUPT,
               "qwen3moe.block_count is 0, outside 1 to 512");
    expect_u32("qwen3moe.block_count", 513, ST_CORRUPT, "qwen3moe.block_count is 513");
    expect_u32("qwen3moe.block_count", 0xFFFFFFFF, ST_CORRUPT,
               "qwen3moe.block_count is 4294967295");
    expect_u32("qwen3moe.block_count", 3, ST_NOT_FOUND,
               "the file has no tensor blk.2.attn_norm.weight");
    expect_u32("qwen3moe.block_count", 1, ST_UNSUPPORTED,
               "tensor blk.1.attn_norm.weight has no place");
    expect_u32("qwen3moe.embedding_length", 0, ST_CORRUPT, "qwen3moe.embedding_length is 0");
    expect_u32("qwen3moe.embedding_length", 64, ST_CORRUPT,
               "tensor token_embd.weight is 32 x 10 x 1 x 1, but the keys say 64 x 10 x 1");
    expect_u32("qwen3moe.attention.head_count", 0, ST_CORRUPT, "head_count is 0");
    expect_u32("qwen3moe.attention.head_count", 3, ST_CORRUPT,
               "not a multiple of head_count_kv, 2");
    expect_u32("qwen3moe.attention.head_count_kv", 0, ST_CORRUPT, "head_count_kv is 0");
    expect_u32("qwen3moe.attention.key_length", 8, ST_CORRUPT,
               "value_length is 16, outside 8 to 8");
    expect_u32("qwen3moe.attention.value_length", 32, ST_CORRUPT, "value_length is 32");
    expect_u32("qwen3moe.rope.dimension_count", 8, ST_CORRUPT, "rope.dimension_count is 8");
    expect_u32("qwen3moe.rope.dimension_count", 16, ST_OK, "");
    expect_u32("qwen3moe.expert_count", 0, ST_CORRUPT, "expert_count is 0");
    expect_u32("qwen3moe.expert_count", 7, ST_CORRUPT,
               "tensor blk.0.ffn_gate_inp.weight is 32 x 6");
    expect_u32("qwen3moe.expert_used_count", 0, ST_CORRUPT, "expert_used_count is 0");
    expect_u32("qwen3moe.expert_used_count", 7, ST_CORRUPT, "expert_used_count is 7 of 6 experts");
    expect_u32("qwen3moe.expert_feed_forward_length", 0, ST_CORRUPT, "feed_forward_length is 0");
    expect_u32("qwen3moe.context_length", 0, ST_CORRUPT, "context_length is 0");
    expect_u32("qwen3moe.context_length", 0x80000000, ST_CORRUPT, "context_length is 2147483648");
    struct model_spec m = small;
    key(&m, "qwen3moe.attention.key_length")->u = key(&m, "qwen3moe.attention.value_length")->u =
        15;
    expect(&m, ST_CORRUPT, "key_length is 15; rotation needs pairs");
    m = small;
    key(&m, "qwen3moe.rope.freq_base")->f = 0;
    expect(&m, ST_CORRUPT, "rope.freq_base is 0");
    m = small;
    key(&m, "qwen3moe.attention.layer_norm_rms_epsilon")->f = 1;
    expect(&m, ST_CORRUPT, "layer_norm_rms_epsilon is 1, outside");
}

static void test_architecture(void **state) {
    (void)state;
    static const char *const names[] = {"llama", "qwen3", "qwen3moe2", "", "q\033n"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct model_spec m = small;
        key(&m, "general.architecture")->s = names[i];
        expect(&m, ST_UNSUPPORTED, "this build knows: qwen3moe");
    }
}

/* Keys that would change the arithmetic are refused unless they say what is done anyway. */
static void test_neutral_keys(void **state) {
    (void)state;
    struct model_spec m = small;
    *key(&m, "qwen3moe.rope.scaling.type") =
        (struct key_spec){"qwen3moe.rope.scaling.type", V_STRING, 0, 0, "yarn"};
    expect(&m, ST_UNSUPPORTED, "key qwen3moe.rope.scaling.type asks for arithmetic");
    key(&m, "qwen3moe.rope.scaling.type")->s = "none";
    expect(&m, ST_OK, "");
    expect_u32("qwen3moe.expert_gating_func", 1, ST_OK, "");
    expect_u32("qwen3moe.expert_gating_func", 2, ST_UNSUPPORTED, "key qwen3moe.expert_gating_func");
    expect_u32("qwen3moe.expert_shared_count", 1, ST_UNSUPPORTED,
               "key qwen3moe.expert_shared_count");
    expect_u32("qwen3moe.attention.sliding_window", 512, ST_UNSUPPORTED,
               "attention.sliding_window");
    m = small;
    *key(&m, "qwen3moe.expert_weights_scale") =
        (struct key_spec){"qwen3moe.expert_weights_scale", V_F32, 0, 2.5f, NULL};
    expect(&m, ST_UNSUPPORTED, "key qwen3moe.expert_weights_scale");
    key(&m, "qwen3moe.expert_weights_scale")->f = 1;
    expect(&m, ST_OK, "");
}

static void test_vocabulary(void **state) {
    (void)state;
    struct model_spec m = small;
    m.n_tokens = 11;
    expect(&m, ST_CORRUPT, "key tokenizer.ggml.tokens has 11 tokens, token_embd.weight has 10");
    m = small;
    m.no_data = true;
    m.n_tokens = m.n_token_types = -1;
    tensor(&m, "token_embd.weight")->ne[1] = (1 << 24) + 1;
    expect(&m, ST_CORRUPT,
           "tensor token_embd.weight has 16777217 rows; 1 to 16777216 are possible");
    m = small;
    m.n_token_types = 9;
    expect(&m, ST_CORRUPT, "key tokenizer.ggml.token_type has 9 entries for 10 tokens");
    static const char *const special[] = {
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.unknown_token_id"};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++) {
        expect_u32(special[i], 9, ST_OK, "");
        expect_u32(special[i], 10, ST_CORRUPT, special[i]);
        expect_u32(special[i], 0xFFFFFFFF, ST_CORRUPT, special[i]);
    }
}

static void test_tensors(void **state) {
    (void)state;
    for (int i = 0; i < small.n_tensors; i++) {
        const char *name = small.tensors[i].name;
        char words[96];
        struct model_spec m = small;
        if (strcmp(name, "output.weight") != 0) {
            m.tensors[i].name = NULL;
            snprintf(words, sizeof words, "the file has no tensor %s", name);
            expect(&m, ST_NOT_FOUND, words);
        }
        /* Each dimension in turn larger than the keys say; the embedding's height is V itself. */
        for (int d = 0; d < 3; d++) {
            m = small;
            int64_t *ne = m.tensors[i].ne;
            if (d == 1 && strcmp(name, "token_embd.weight") == 0) continue;
            if (d > 0 && ne[d - 1] == 0) continue;
            ne[d] = ne[d] ? 2 * ne[d] : 2;
            snprintf(words, sizeof words, "tensor %s is ", name);
            expect(&m, ST_CORRUPT, words);
        }
    }
    struct model_spec m = small;
    *tensor(&m, "blk.0.attn_q.bias") = (struct tensor_spec){"blk.0.attn_q.bias", TENSOR_F32, {64}};
    expect(&m, ST_UNSUPPORTED,
           "tensor blk.0.attn_q.bias has no place in a qwen3moe model of 2 layers");
    m = small;
    m.no_data = true;
    tensor(&m, "blk.1.ffn_down_exps.weight")->ne[3] = 2;
    expect(&m, ST_CORRUPT, "tensor blk.1.ffn_down_exps.weight is 96 x 32 x 6 x 2, but");
    static const char *const exact[] = {"output_norm.weight",       "blk.0.attn_norm.weight",
                                        "blk.0.attn_q_norm.weight", "blk.1.attn_k_norm.weight",
                                        "blk.1.ffn_norm.weight",    "blk.1.ffn_gate_inp.weight"};
    for (size_t i = 0; i < sizeof exact / sizeof *exact; i++) {
        m = small;
        tensor(&m, exact[i])->type = TENSOR_F16;
        char words[96];
        snprintf(words, sizeof words, "tensor %s is F16; only F32", exact[i]);
        expect(&m, ST_UNSUPPORTED, words);
    }
}

/* A file with keys and no tensors (a vocabulary) is not a model. */
static void test_vocabulary_file(void **state) {
    (void)state;
    struct model_spec m = small;
    m.n_tensors = 0;
    expect(&m, ST_NOT_FOUND, "the file has no tensor token_embd.weight");
    struct error e = {0};
    struct gguf *g;
    struct arch_model a;
    assert_ok(gguf_open(QWEN3_VOCAB, true, &e, &g), &e);
    assert_int_equal(arch_read(g, &e, &a), ST_NOT_FOUND);
    assert_int_equal(arch_read(g, NULL, &a), ST_NOT_FOUND);
    arch_free(&a);
    gguf_close(g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny),         cmocka_unit_test(test_small),
        cmocka_unit_test(test_optional),     cmocka_unit_test(test_required_keys),
        cmocka_unit_test(test_key_ranges),   cmocka_unit_test(test_architecture),
        cmocka_unit_test(test_neutral_keys), cmocka_unit_test(test_vocabulary),
        cmocka_unit_test(test_tensors),      cmocka_unit_test(test_vocabulary_file),
    };
    return cmocka_run_group_tests_name("arch", tests, NULL, NULL);
}
