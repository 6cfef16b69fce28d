/* arch: the table of architectures and the reading of a file through one of its rows; see arch.h.
 *
 * Adding a family is adding a row: its name in general.architecture (which is also the prefix of its keys),
 * its switches, its tensors, and the keys that would change its arithmetic and so must be neutral. Called
 * once at start; no state. */
#include "moe/arch.h"

#include "moe/quant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the table ---------------------------------------------------------------------------------- */

/* A tensor's dimension, computed from the shape. */
enum dim {
    DIM_ONE = 0, /* unused dimensions are 1 */
    DIM_EMBD, /* D */
    DIM_Q, /* H*Hd */
    DIM_KV, /* G*Hd */
    DIM_HEAD, /* Hd */
    DIM_EXPERTS, /* E */
    DIM_FF, /* F */
    DIM_VOCAB, /* V */
    N_DIMS
};

enum role_type {
    ROLE_MATRIX, /* any type of quant.h */
    ROLE_EXACT /* F32: norms and the router, which the forward pass computes in f32 */
};

struct role {
    const char *name; /* after "blk.<layer>." for a layer's tensor */
    size_t at; /* offset of the pointer in arch_layer or arch_model */
    enum role_type type;
    enum dim dims[3]; /* fastest first */
};

enum neutral_kind { NEUTRAL_INT, NEUTRAL_FLOAT, NEUTRAL_STRING };

/* A key that may be present only with the value that means "not used". */
struct neutral_key {
    const char *key; /* after "<architecture>." */
    enum neutral_kind kind;
    double value; /* int and float */
    const char *text; /* string */
};

struct arch_row {
    const char *architecture;
    bool renormalize; /* norm_topk_prob when expert_weights_norm is absent */
    const struct role *layer_roles;
    size_t n_layer_roles;
    const struct neutral_key *neutral;
    size_t n_neutral;
};

#define LAYER(field) offsetof(struct arch_layer, field)
static const struct role qwen3moe_layer[] = {
    {"attn_norm.weight", LAYER(attn_norm), ROLE_EXACT, {DIM_EMBD}},
    {"attn_q.weight", LAYER(attn_q), ROLE_MATRIX, {DIM_EMBD, DIM_Q}},
    {"attn_k.weight", LAYER(attn_k), ROLE_MATRIX, {DIM_EMBD, DIM_KV}},
    {"attn_v.weight", LAYER(attn_v), ROLE_MATRIX, {DIM_EMBD, DIM_KV}},
    {"attn_q_norm.weight", LAYER(attn_q_norm), ROLE_EXACT, {DIM_HEAD}},
    {"attn_k_norm.weight", LAYER(attn_k_norm), ROLE_EXACT, {DIM_HEAD}},
    {"attn_output.weight", LAYER(attn_output), ROLE_MATRIX, {DIM_Q, DIM_EMBD}},
    {"ffn_norm.weight", LAYER(ffn_norm), ROLE_EXACT, {DIM_EMBD}},
    {"ffn_gate_inp.weight", LAYER(router), ROLE_EXACT, {DIM_EMBD, DIM_EXPERTS}},
    {"ffn_gate_exps.weight", LAYER(gate_exps), ROLE_MATRIX, {DIM_EMBD, DIM_FF, DIM_EXPERTS}},
    {"ffn_up_exps.weight", LAYER(up_exps), ROLE_MATRIX, {DIM_EMBD, DIM_FF, DIM_EXPERTS}},
    {"ffn_down_exps.weight", LAYER(down_exps), ROLE_MATRIX, {DIM_FF, DIM_EMBD, DIM_EXPERTS}},
};
#undef LAYER

static const struct neutral_key qwen3moe_neutral[] = {
    {"rope.scaling.type", NEUTRAL_STRING, 0, "none"},
    {"rope.scale_linear", NEUTRAL_FLOAT, 1, NULL},
    {"attention.sliding_window", NEUTRAL_INT, 0, NULL},
    {"expert_shared_count", NEUTRAL_INT, 0, NULL},
    {"expert_weights_scale", NEUTRAL_FLOAT, 1, NULL},
    {"expert_gating_func", NEUTRAL_INT, 1, NULL}, /* llama.cpp's number for softmax */
    {"leading_dense_block_count", NEUTRAL_INT, 0, NULL},
};

#define COUNT(a) (sizeof(a) / sizeof *(a))
static const struct arch_row rows[] = {
    {"qwen3moe", true, qwen3moe_layer, COUNT(qwen3moe_layer), qwen3moe_neutral,
     COUNT(qwen3moe_neutral)},
};

/* Tensors outside the layers, the same in every family so far. */
static const struct role role_token_embd = {"token_embd.weight",
                                            offsetof(struct arch_model, token_embd),
                                            ROLE_MATRIX,
                                            {DIM_EMBD, DIM_VOCAB}};
static const struct role role_output_norm = {
    "output_norm.weight", offsetof(struct arch_model, output_norm), ROLE_EXACT, {DIM_EMBD}};
static const struct role role_output = {
    "output.weight", offsetof(struct arch_model, output), ROLE_MATRIX, {DIM_EMBD, DIM_VOCAB}};

static const struct arch_row *row_find(struct bytes name) {
    for (size_t i = 0; i < COUNT(rows); i++)
        if (strlen(rows[i].architecture) == name.n &&
            memcmp(rows[i].architecture, name.p, name.n) == 0)
            return &rows[i];
    return NULL;
}

/* ---- keys ---------------------------------------------------------------------------------------- */

/* One arch_read. */
struct reading {
    const struct gguf *g;
    const struct arch_row *row;
    struct arch_model *out;
    int64_t dims[N_DIMS];
    bool *used; /* [gguf_n_tensors] the tensors that have a role */
    struct error *e;
};

enum { KEY_CAP = 96 };

static const char *key_of(const struct reading *r, const char *suffix, char dst[KEY_CAP]) {
    snprintf(dst, KEY_CAP, "%s.%s", r->row->architecture, suffix);
    return dst;
}

/* Copy text of a file for people: cut to whole characters, control characters and what is not UTF-8
 * replaced. */
static void copy_text(struct bytes s, char *dst, size_t cap) {
    size_t n = s.n < cap - 1 ? s.n : utf8_complete_prefix(s.p, cap - 1);
    bool valid = utf8_valid(s.p, n);
    for (size_t i = 0; i < n; i++) {
        uint8_t c = s.p[i];
        dst[i] = (char)(c < 0x20 || c == 0x7F || (c >= 0x80 && !valid) ? '?' : c);
    }
    dst[n] = 0;
}

static enum status read_row(struct reading *r) {
    struct bytes s;
    enum status st = gguf_get_string(r->g, "general.architecture", r->e, &s);
    if (st != ST_OK) return st;
    r->row = row_find(s);
    char name[sizeof r->out->architecture];
    copy_text(s, name, sizeof name);
    if (!r->row) {
        char known[128] = "";
        for (size_t i = 0, n = 0; i < COUNT(rows) && n < sizeof known; i++)
            n += (size_t)snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "",
                                  rows[i].architecture);
        return error_set(r->e, ST_UNSUPPORTED, "architecture \"%s\" (this build knows: %s)", name,
                         known);
    }
    memcpy(r->out->architecture, name, sizeof name);
    memcpy(r->out->name, name, sizeof name);
    if (gguf_has(r->g, "general.name")) {
        st = gguf_get_string(r->g, "general.name", r->e, &s);
        if (st != ST_OK) return st;
        copy_text(s, r->out->name, sizeof r->out->name);
    }
    return ST_OK;
}

static enum status check_neutral(const struct reading *r) {
    for (size_t i = 0; i < r->row->n_neutral; i++) {
        const struct neutral_key *k = &r->row->neutral[i];
        char key[KEY_CAP];
        if (!gguf_has(r->g, key_of(r, k->key, key))) continue;
        enum status st = ST_OK;
        bool neutral = false;
        if (k->kind == NEUTRAL_INT) {
            int64_t v;
            st = gguf_get_int(r->g, key, INT64_MIN, INT64_MAX, r->e, &v);
            neutral = st == ST_OK && v == (int64_t)k->value;
        } else if (k->kind == NEUTRAL_FLOAT) {
            double v;
            st = gguf_get_float(r->g, key, -1e300, 1e300, r->e, &v);
            neutral = st == ST_OK && !(v < k->value) && !(v > k->value);
        } else {
            struct bytes s;
            st = gguf_get_string(r->g, key, r->e, &s);
            neutral = st == ST_OK && s.n == strlen(k->text) && memcmp(s.p, k->text, s.n) == 0;
        }
        if (st != ST_OK) return st;
        if (!neutral)
            return error_set(r->e, ST_UNSUPPORTED,
                             "key %s asks for arithmetic that this build does not have", key);
    }
    return ST_OK;
}

/* Every integer key of the shape, with its range. None has a default: a wrong guess is a model that
 * babbles. The upper bounds keep every product of dimensions inside 63 bits. */
static const struct int_key {
    const char *key;
    size_t at; /* of an int32_t in model_shape */
    int32_t lo, hi;
} int_keys[] = {
    {"block_count", offsetof(struct model_shape, n_layers), 1, ARCH_MAX_LAYERS},
    {"embedding_length", offsetof(struct model_shape, n_embd), 1, 1 << 17},
    {"attention.head_count", offsetof(struct model_shape, n_heads), 1, 1 << 10},
    {"attention.head_count_kv", offsetof(struct model_shape, n_kv_heads), 1, 1 << 10},
    {"attention.key_length", offsetof(struct model_shape, head_dim), 2, 1 << 10},
    {"expert_count", offsetof(struct model_shape, n_experts), 1, 1 << 12},
    {"expert_used_count", offsetof(struct model_shape, n_experts_used), 1, 1 << 12},
    {"expert_feed_forward_length", offsetof(struct model_shape, n_ff_expert), 1, 1 << 20},
    {"context_length", offsetof(struct model_shape, n_ctx_train), 1, 1 << 30},
};

static enum status read_ints(const struct reading *r) {
    for (size_t i = 0; i < COUNT(int_keys); i++) {
        char key[KEY_CAP];
        int64_t v;
        enum status st = gguf_get_int(r->g, key_of(r, int_keys[i].key, key), int_keys[i].lo,
                                      int_keys[i].hi, r->e, &v);
        if (st != ST_OK) return st;
        *(int32_t *)(void *)((char *)&r->out->shape + int_keys[i].at) = (int32_t)v;
    }
    return ST_OK;
}

/* What the integer keys must be to each other. */
static enum status check_ints(const struct reading *r) {
    const struct model_shape *s = &r->out->shape;
    char key[KEY_CAP];
    int64_t v;
    enum status st = gguf_get_int(r->g, key_of(r, "attention.value_length", key), s->head_dim,
                                  s->head_dim, r->e, &v);
    if (st == ST_OK && gguf_has(r->g, key_of(r, "rope.dimension_count", key)))
        st = gguf_get_int(r->g, key, s->head_dim, s->head_dim, r->e, &v);
    if (st != ST_OK) return st;
    const char *arch = r->row->architecture;
    if (s->head_dim % 2 != 0)
        return error_set(r->e, ST_CORRUPT,
                         "key %s.attention.key_length is %d; rotation needs pairs", arch,
                         s->head_dim);
    if (s->n_heads % s->n_kv_heads != 0)
        return error_set(r->e, ST_CORRUPT,
                         "key %s.attention.head_count is %d, not a multiple of head_count_kv, %d",
                         arch, s->n_heads, s->n_kv_heads);
    if (s->n_experts_used > s->n_experts)
        return error_set(r->e, ST_CORRUPT, "key %s.expert_used_count is %d of %d experts", arch,
                         s->n_experts_used, s->n_experts);
    return ST_OK;
}

static enum status read_shape(struct reading *r) {
    char key[KEY_CAP];
    double eps, base;
    enum status st = read_ints(r);
    if (st == ST_OK) st = check_ints(r);
    if (st == ST_OK)
        st = gguf_get_float(r->g, key_of(r, "attention.layer_norm_rms_epsilon", key), 1e-12, 0.1,
                            r->e, &eps);
    if (st == ST_OK)
        st = gguf_get_float(r->g, key_of(r, "rope.freq_base", key), 1, 1e12, r->e, &base);
    if (st != ST_OK) return st;
    r->out->shape.norm_eps = (float)eps;
    r->out->shape.rope_base = (float)base;
    r->out->router_renormalize = r->row->renormalize;
    if (gguf_has(r->g, key_of(r, "expert_weights_norm", key)))
        return gguf_get_bool(r->g, key, r->e, &r->out->router_renormalize);
    return ST_OK;
}

/* ---- vocabulary ---------------------------------------------------------------------------------- */

enum { MAX_VOCAB = 1 << 24 };

/* V is the height of the embedding; whatever the file says about tokens must agree with it. */
static enum status read_vocab(struct reading *r) {
    const struct gguf_tensor *t = gguf_tensor_find(r->g, role_token_embd.name);
    if (!t) return error_set(r->e, ST_NOT_FOUND, "the file has no tensor %s", role_token_embd.name);
    if (t->ne[1] < 1 || t->ne[1] > MAX_VOCAB)
        return error_set(r->e, ST_CORRUPT, "tensor %s has %lld rows; 1 to %d are possible", t->name,
                         (long long)t->ne[1], MAX_VOCAB);
    r->out->shape.n_vocab = (int32_t)t->ne[1];
    size_t n_vocab = (size_t)t->ne[1], n = n_vocab;
    enum status st = ST_OK;
    if (gguf_has(r->g, "tokenizer.ggml.tokens")) {
        const struct bytes *tokens;
        st = gguf_string_array(r->g, "tokenizer.ggml.tokens", r->e, &tokens, &n);
        if (st != ST_OK) return st;
        if (n != n_vocab)
            return error_set(r->e, ST_CORRUPT,
                             "key tokenizer.ggml.tokens has %zu tokens, %s has %zu", n, t->name,
                             n_vocab);
    }
    if (gguf_has(r->g, "tokenizer.ggml.token_type")) {
        const int32_t *types;
        st = gguf_int_array(r->g, "tokenizer.ggml.token_type", r->e, &types, &n);
        if (st != ST_OK) return st;
        if (n != n_vocab)
            return error_set(r->e, ST_CORRUPT,
                             "key tokenizer.ggml.token_type has %zu entries for %zu "
                             "tokens",
                             n, n_vocab);
    }
    static const char *const special[] = {"bos",     "eos",     "eot",     "eom",       "unknown",
                                          "padding", "mask",    "cls",     "seperator", "fim_pre",
                                          "fim_suf", "fim_mid", "fim_pad", "fim_rep",   "fim_sep"};
    for (size_t i = 0; i < COUNT(special) && st == ST_OK; i++) {
        char key[KEY_CAP];
        int64_t id;
        snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id", special[i]);
        if (gguf_has(r->g, key)) st = gguf_get_int(r->g, key, 0, (int64_t)n_vocab - 1, r->e, &id);
    }
    return st;
}

/* ---- tensors ------------------------------------------------------------------------------------- */

static enum status take_tensor(struct reading *r, const struct role *role, const char *name,
                               const struct gguf_tensor **out) {
    const struct gguf_tensor *t = gguf_tensor_find(r->g, name);
    if (!t) return error_set(r->e, ST_NOT_FOUND, "the file has no tensor %s", name);
    int64_t want[3];
    for (int i = 0; i < 3; i++) want[i] = r->dims[role->dims[i]];
    if (t->ne[0] != want[0] || t->ne[1] != want[1] || t->ne[2] != want[2] || t->ne[3] != 1)
        return error_set(
            r->e, ST_CORRUPT,
            "tensor %s is %lld x %lld x %lld x %lld, but the keys say %lld x %lld x %lld", name,
            (long long)t->ne[0], (long long)t->ne[1], (long long)t->ne[2], (long long)t->ne[3],
            (long long)want[0], (long long)want[1], (long long)want[2]);
    if (role->type == ROLE_EXACT && t->type != TENSOR_F32)
        return error_set(r->e, ST_UNSUPPORTED, "tensor %s is %s; only F32 will do here", name,
                         tensor_type_name(t->type));
    r->used[t - gguf_tensor_at(r->g, 0)] = true;
    *out = t;
    return ST_OK;
}

static const struct gguf_tensor **slot(void *base, const struct role *role) {
    return (const struct gguf_tensor **)(void *)((char *)base + role->at);
}

static void fill_dims(struct reading *r) {
    const struct model_shape *s = &r->out->shape;
    r->dims[DIM_ONE] = 1;
    r->dims[DIM_EMBD] = s->n_embd;
    r->dims[DIM_Q] = (int64_t)s->n_heads * s->head_dim;
    r->dims[DIM_KV] = (int64_t)s->n_kv_heads * s->head_dim;
    r->dims[DIM_HEAD] = s->head_dim;
    r->dims[DIM_EXPERTS] = s->n_experts;
    r->dims[DIM_FF] = s->n_ff_expert;
    r->dims[DIM_VOCAB] = s->n_vocab;
}

static enum status read_tensors(struct reading *r) {
    struct arch_model *m = r->out;
    fill_dims(r);
    enum status st = take_tensor(r, &role_token_embd, role_token_embd.name, &m->token_embd);
    if (st == ST_OK) st = take_tensor(r, &role_output_norm, role_output_norm.name, &m->output_norm);
    m->output = m->token_embd;
    if (st == ST_OK && gguf_tensor_find(r->g, role_output.name))
        st = take_tensor(r, &role_output, role_output.name, &m->output);
    for (int layer = 0; layer < m->shape.n_layers && st == ST_OK; layer++) {
        for (size_t i = 0; i < r->row->n_layer_roles && st == ST_OK; i++) {
            const struct role *role = &r->row->layer_roles[i];
            char name[KEY_CAP];
            snprintf(name, sizeof name, "blk.%d.%s", layer, role->name);
            st = take_tensor(r, role, name, slot(&m->layers[layer], role));
        }
    }
    if (st != ST_OK) return st;
    for (size_t i = 0; i < gguf_n_tensors(r->g); i++)
        if (!r->used[i])
            return error_set(r->e, ST_UNSUPPORTED,
                             "tensor %s has no place in a %s model of %d layers",
                             gguf_tensor_at(r->g, i)->name, m->architecture, m->shape.n_layers);
    return ST_OK;
}

static void name_quantization(struct arch_model *m) {
    int count[TENSOR_BF16 + 1] = {0}, best = 0;
    for (int i = 0; i < m->shape.n_layers; i++) {
        count[m->layers[i].gate_exps->type]++;
        count[m->layers[i].up_exps->type]++;
        count[m->layers[i].down_exps->type]++;
    }
    for (int i = 1; i <= TENSOR_BF16; i++)
        if (count[i] > count[best]) best = i;
    snprintf(m->quantization, sizeof m->quantization, "%s",
             tensor_type_name((enum tensor_type)best));
}

enum status arch_read(const struct gguf *g, struct error *e, struct arch_model *out) {
    *out = (struct arch_model){0};
    struct reading r = {.g = g, .out = out, .e = e};
    enum status st = read_row(&r);
    if (st == ST_OK) st = read_shape(&r);
    if (st == ST_OK) st = check_neutral(&r);
    if (st == ST_OK) st = read_vocab(&r);
    if (st == ST_OK) {
        out->layers = calloc((size_t)out->shape.n_layers, sizeof *out->layers);
        r.used = calloc(gguf_n_tensors(g), sizeof *r.used);
        if (!out->layers || !r.used)
            st = error_set(e, ST_NO_MEMORY, "no memory for the layer table");
    }
    if (st == ST_OK) st = read_tensors(&r);
    free(r.used);
    if (st == ST_OK)
        name_quantization(out);
    else
        arch_free(out);
    return st;
}

void arch_free(struct arch_model *a) {
    free(a->layers);
    *a = (struct arch_model){0};
}
