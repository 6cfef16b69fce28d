/* moed-synth: writes a GGUF file of a named shape with random weights, for measuring models whose weights
 * cannot be had. The tensor types, shapes and keys are those of the real file, so that bytes read per
 * token are the real ones; the text it writes is noise.
 *
 * Weights are drawn directly in quantised form. Every matrix has dequantised mean 0 and standard
 * deviation 1/sqrt(columns), so that a normalised input gives outputs of unit size. The embedding has 1,
 * and the two matrices that write to the residual stream are smaller by sqrt(2 layers), as GPT-2's are at
 * first, so that all layers together add about as much as the embedding: at any depth activations are of
 * unit size and tokens stay apart, without which they would all be routed to the same experts. The
 * norms are 1. A file depends on its options and seed only, not on the number of threads: each chunk
 * seeds its own generator. It is written as FILE.part and renamed when whole. */
#include "moe/gguf.h"
#include "moe/quant.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

static _Noreturn void die(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static _Noreturn void die(int status, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fputs("moed-synth: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(status);
}

static void *need(void *p) {
    if (!p) die(1, "out of memory");
    return p;
}

/* ---- shapes ------------------------------------------------------------------------------------- */

struct synth_shape {
    const char *name;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_experts, n_experts_used,
        n_ff_expert, n_ff, n_vocab, n_ctx;
};

/* The first two as published in the models' config.json; the third is the bundled model's. */
static const struct synth_shape shapes[] = {
    {"qwen3-30b-a3b", 48, 2048, 32, 4, 128, 128, 8, 768, 6144, 151936, 40960},
    {"qwen3-235b-a22b", 94, 4096, 64, 4, 128, 128, 8, 1536, 12288, 151936, 40960},
    {"tiny", 6, 256, 4, 1, 128, 32, 4, 256, 1024, 8192, 4096},
};

struct options {
    struct synth_shape shape;
    bool q8_0; /* otherwise q4_k_m */
    const char *vocab, *out;
    uint64_t seed;
    int n_threads;
    double skew;
};

/* ---- metadata ----------------------------------------------------------------------------------- */

struct out {
    uint8_t *p;
    size_t n, cap;
    uint64_t n_keys;
};

static void put(struct out *o, const void *p, size_t n) {
    if (o->cap - o->n < n) {
        o->cap = 2 * o->cap + n + 4096;
        o->p = need(realloc(o->p, o->cap));
    }
    if (n) memcpy(o->p + o->n, p, n);
    o->n += n;
}

static void put_u32(struct out *o, uint32_t v) { put(o, &v, sizeof v); }
static void put_u64(struct out *o, uint64_t v) { put(o, &v, sizeof v); }

static void put_string(struct out *o, const void *p, size_t n) {
    put_u64(o, n);
    put(o, p, n);
}

static void put_key(struct out *o, const char *key, enum gguf_type type) {
    put_string(o, key, strlen(key));
    put_u32(o, type);
    o->n_keys++;
}

static void put_key_u32(struct out *o, const char *key, uint32_t v) {
    put_key(o, key, GGUF_U32);
    put_u32(o, v);
}

static void put_key_f32(struct out *o, const char *key, float v) {
    put_key(o, key, GGUF_F32);
    put(o, &v, sizeof v);
}

static void put_key_string(struct out *o, const char *key, struct bytes v) {
    put_key(o, key, GGUF_STRING);
    put_string(o, v.p, v.n);
}

static void put_key_array(struct out *o, const char *key, enum gguf_type element, size_t n) {
    put_key(o, key, GGUF_ARRAY);
    put_u32(o, element);
    put_u64(o, n);
}

static struct bytes text(const char *s) { return (struct bytes){(const uint8_t *)s, strlen(s)}; }

static void put_shape(struct out *o, const struct options *c) {
    const struct synth_shape *s = &c->shape;
    char name[64];
    snprintf(name, sizeof name, "synthetic %s", s->name);
    put_key_string(o, "general.architecture", text("qwen3moe"));
    put_key_string(o, "general.name", text(name));
    put_key_u32(o, "general.file_type",
                c->q8_0 ? 7 : 15); /* llama.cpp's MOSTLY_Q8_0, MOSTLY_Q4_K_M */
    put_key_u32(o, "general.quantization_version", 2);
    put_key_u32(o, "qwen3moe.block_count", s->n_layers);
    put_key_u32(o, "qwen3moe.context_length", s->n_ctx);
    put_key_u32(o, "qwen3moe.embedding_length", s->n_embd);
    put_key_u32(o, "qwen3moe.feed_forward_length", s->n_ff);
    put_key_u32(o, "qwen3moe.attention.head_count", s->n_heads);
    put_key_u32(o, "qwen3moe.attention.head_count_kv", s->n_kv_heads);
    put_key_u32(o, "qwen3moe.attention.key_length", s->head_dim);
    put_key_u32(o, "qwen3moe.attention.value_length", s->head_dim);
    put_key_f32(o, "qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    put_key_f32(o, "qwen3moe.rope.freq_base", 1e6f);
    put_key_u32(o, "qwen3moe.expert_count", s->n_experts);
    put_key_u32(o, "qwen3moe.expert_used_count", s->n_experts_used);
    put_key_u32(o, "qwen3moe.expert_feed_forward_length", s->n_ff_expert);
}

/* ---- vocabulary ---------------------------------------------------------------------------------- */

/* Copy a key of `from` if it has it. */
static void copy_key(struct out *o, const struct gguf *from, const char *key) {
    int64_t v;
    bool flag;
    struct bytes s;
    const struct bytes *strings;
    const int32_t *ints;
    size_t n;
    if (!gguf_has(from, key)) return;
    if (gguf_get_int(from, key, 0, UINT32_MAX, NULL, &v) == ST_OK) {
        put_key_u32(o, key, (uint32_t)v);
    } else if (gguf_get_bool(from, key, NULL, &flag) == ST_OK) {
        uint8_t byte = flag;
        put_key(o, key, GGUF_BOOL);
        put(o, &byte, 1);
    } else if (gguf_get_string(from, key, NULL, &s) == ST_OK) {
        put_key_string(o, key, s);
    } else if (gguf_string_array(from, key, NULL, &strings, &n) == ST_OK) {
        put_key_array(o, key, GGUF_STRING, n);
        for (size_t i = 0; i < n; i++) put_string(o, strings[i].p, strings[i].n);
    } else if (gguf_int_array(from, key, NULL, &ints, &n) == ST_OK) {
        put_key_array(o, key, GGUF_I32, n);
        put(o, ints, n * sizeof *ints);
    } else {
        die(1, "key %s of the vocabulary file is of a type that is not copied", key);
    }
}

/* Copy the tokenizer of a GGUF file, which must have as many tokens as the shape. */
static void put_vocab_file(struct out *o, const struct options *c) {
    static const char *const keys[] = {
        "tokenizer.ggml.model",         "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",  "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.eot_token_id",  "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
        "tokenizer.chat_template"};
    struct error e = {0};
    struct gguf *g;
    const struct bytes *tokens;
    size_t n;
    if (gguf_open(c->vocab, true, &e, &g) != ST_OK ||
        gguf_string_array(g, "tokenizer.ggml.tokens", &e, &tokens, &n) != ST_OK)
        die(1, "--vocab: %s", e.text);
    if (n != c->shape.n_vocab)
        die(1, "--vocab: %s has %zu tokens, but the shape %s has %u", c->vocab, n, c->shape.name,
            c->shape.n_vocab);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) copy_key(o, g, keys[i]);
    gguf_close(g);
}

/* The printable character that byte-level BPE (GPT-2) writes for a byte, as UTF-8. */
static int byte_symbol(int byte, char dst[3]) {
    int shown = byte;
    if (byte <= 32)
        shown = 256 + byte;
    else if (byte >= 127 && byte <= 160)
        shown = 256 + 33 + byte - 127;
    else if (byte == 173)
        shown = 256 + 33 + 34;
    if (shown < 0x80) {
        dst[0] = (char)shown;
        return 1;
    }
    dst[0] = (char)(0xC0 | shown >> 6);
    dst[1] = (char)(0x80 | (shown & 0x3F));
    return 2;
}

enum {
    N_LETTERS = 26,
    N_PAIRS = N_LETTERS + N_LETTERS * N_LETTERS, /* a space and a letter; two letters */
    N_SPECIAL = 3,
    TOKEN_NORMAL = 1,
    TOKEN_CONTROL = 3,
    TOKEN_UNUSED = 5
};

/* The i-th pair's parts, as tokens are spelt ("Ġ" stands for a space). */
static void pair_parts(int i, char left[4], char right[4]) {
    left[byte_symbol(i < N_LETTERS ? ' ' : 'a' + (i - N_LETTERS) / N_LETTERS, left)] = 0;
    right[byte_symbol('a' + (i < N_LETTERS ? i : (i - N_LETTERS) % N_LETTERS), right)] = 0;
}

/* A byte-level vocabulary of the shape's size: the 256 bytes, letter pairs with their merges, words that
 * no merge reaches ("Ġt1234"), and Qwen's special tokens where Qwen3 has them. */
static void put_synthetic_vocab(struct out *o, uint32_t n_vocab) {
    static const char *const special[N_SPECIAL] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    uint32_t first_special = n_vocab > 151645 ? 151643 : n_vocab - N_SPECIAL;
    put_key_string(o, "tokenizer.ggml.model", text("gpt2"));
    put_key_string(o, "tokenizer.ggml.pre", text("qwen2"));
    put_key_array(o, "tokenizer.ggml.tokens", GGUF_STRING, n_vocab);
    for (uint32_t id = 0; id < n_vocab; id++) {
        char left[4], right[4], s[32];
        int n = 0;
        if (id < 256) {
            n = byte_symbol((int)id, s);
        } else if (id < 256 + N_PAIRS) {
            pair_parts((int)id - 256, left, right);
            n = snprintf(s, sizeof s, "%s%s", left, right);
        } else if (id < first_special) {
            n = snprintf(s, sizeof s, "\xc4\xa0t%u", id);
        } else if (id < first_special + N_SPECIAL) {
            n = snprintf(s, sizeof s, "%s", special[id - first_special]);
        } else {
            n = snprintf(s, sizeof s, "[PAD%u]", id);
        }
        put_string(o, s, (size_t)n);
    }
    put_key_array(o, "tokenizer.ggml.token_type", GGUF_I32, n_vocab);
    for (uint32_t id = 0; id < n_vocab; id++)
        put_u32(o, id < first_special               ? TOKEN_NORMAL
                   : id < first_special + N_SPECIAL ? TOKEN_CONTROL
                                                    : TOKEN_UNUSED);
    put_key_array(o, "tokenizer.ggml.merges", GGUF_STRING, N_PAIRS);
    for (int i = 0; i < N_PAIRS; i++) {
        char left[4], right[4], s[16];
        pair_parts(i, left, right);
        put_string(o, s, (size_t)snprintf(s, sizeof s, "%s %s", left, right));
    }
    put_key_u32(o, "tokenizer.ggml.bos_token_id", first_special);
    put_key_u32(o, "tokenizer.ggml.eos_token_id", first_special + 2);
    put_key_u32(o, "tokenizer.ggml.padding_token_id", first_special);
    put_key_string(
        o, "tokenizer.chat_template",
        text("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
             "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"));
}

/* ---- tensors ------------------------------------------------------------------------------------- */

enum { ALIGNMENT = 32 };

struct tensor {
    char name[64];
    enum tensor_type type;
    uint32_t n_dims;
    uint64_t ne[3];
    uint64_t n_bytes, offset; /* from the beginning of the data */
    float std; /* 0: all ones */
    const float *row_std; /* [ne1] factors of an f32 tensor's rows; NULL: 1 */
};

struct plan {
    struct tensor *tensors;
    size_t n;
    uint64_t data_bytes;
};

/* ne1 and ne2 of 0: fewer dimensions. */
static void plan_add(struct plan *p, const char *name, enum tensor_type type, uint64_t ne0,
                     uint64_t ne1, uint64_t ne2) {
    struct tensor *t = &p->tensors[p->n++];
    size_t n_bytes;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->type = type;
    t->n_dims = ne2 ? 3 : ne1 ? 2 : 1;
    t->ne[0] = ne0;
    t->ne[1] = ne1 ? ne1 : 1;
    t->ne[2] = ne2 ? ne2 : 1;
    t->std = ne1 ? 1.0f / sqrtf((float)ne0) : 0;
    CHECK(tensor_type_bytes(type, (size_t)(t->ne[0] * t->ne[1] * t->ne[2]), &n_bytes));
    t->n_bytes = n_bytes;
    t->offset = p->data_bytes;
    p->data_bytes += (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* llama.cpp's choice of the layers whose attn_v and ffn_down get Q6_K in a Q4_K_M file. */
static bool use_more_bits(uint32_t i, uint32_t n) {
    return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
}

static struct plan make_plan(const struct options *c) {
    const struct synth_shape *s = &c->shape;
    struct plan p = {.tensors = need(calloc(3 + 12 * (size_t)s->n_layers, sizeof *p.tensors))};
    enum tensor_type base = c->q8_0 ? TENSOR_Q8_0 : TENSOR_Q4_K;
    enum tensor_type more = c->q8_0 ? TENSOR_Q8_0 : TENSOR_Q6_K;
    uint64_t d = s->n_embd, q = (uint64_t)s->n_heads * s->head_dim;
    uint64_t kv = (uint64_t)s->n_kv_heads * s->head_dim, f = s->n_ff_expert, e = s->n_experts;
    plan_add(&p, "output.weight", more, d, s->n_vocab, 0);
    plan_add(&p, "output_norm.weight", TENSOR_F32, d, 0, 0);
    plan_add(&p, "token_embd.weight", base, d, s->n_vocab, 0);
    p.tensors[2].std = 1;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        enum tensor_type mixed = use_more_bits(i, s->n_layers) ? more : base;
        const struct {
            const char *name;
            enum tensor_type type;
            uint64_t ne[3];
        } layer[] = {{"attn_k", base, {d, kv}},          {"attn_k_norm", TENSOR_F32, {s->head_dim}},
                     {"attn_norm", TENSOR_F32, {d}},     {"attn_output", base, {q, d}},
                     {"attn_q", base, {d, q}},           {"attn_q_norm", TENSOR_F32, {s->head_dim}},
                     {"attn_v", mixed, {d, kv}},         {"ffn_down_exps", mixed, {f, d, e}},
                     {"ffn_gate_exps", base, {d, f, e}}, {"ffn_gate_inp", TENSOR_F32, {d, e}},
                     {"ffn_norm", TENSOR_F32, {d}},      {"ffn_up_exps", base, {d, f, e}}};
        for (size_t k = 0; k < sizeof layer / sizeof *layer; k++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%u.%s.weight", i, layer[k].name);
            plan_add(&p, name, layer[k].type, layer[k].ne[0], layer[k].ne[1], layer[k].ne[2]);
            bool to_residual = strcmp(layer[k].name, "attn_output") == 0 ||
                               strcmp(layer[k].name, "ffn_down_exps") == 0;
            if (to_residual) p.tensors[p.n - 1].std /= sqrtf(2 * (float)s->n_layers);
        }
    }
    return p;
}

/* ---- random blocks ------------------------------------------------------------------------------- */

/* splitmix64 (Steele, Lea and Flood 2014): a counter and a mixer, fast enough to stay ahead of a disk. */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static double uniform(uint64_t *state) { return (double)(next_random(state) >> 11) * 0x1p-53; }

/* n bytes, a multiple of 8 but for the tail. */
static void fill_random(uint64_t *state, uint8_t *dst, size_t n) {
    for (; n >= 8; n -= 8, dst += 8) {
        uint64_t v = next_random(state);
        memcpy(dst, &v, 8);
    }
    uint64_t v = next_random(state);
    memcpy(dst, &v, n);
}

/* Standard deviations of the integers that a block stores when every bit is random. */
static const double std_u4 = 4.6097722286464436; /* sqrt((16² - 1) / 12) */
static const double std_u6 = 18.472953201911167; /* sqrt((64² - 1) / 12) */
static const double std_i8 = 73.899932341007; /* sqrt((256² - 1) / 12) */

enum { N_HEADS = 256 };

/* What a block has besides random bits, drawn once per tensor and picked at random for each block: the
 * scales and their common factor d, which is std / (deviation of the integers * rms of the scales). */
struct block_heads {
    uint8_t q4[N_HEADS][16]; /* d, dmin, scales[12] */
    uint8_t q6[N_HEADS][18]; /* scales[16], d */
    uint8_t q8[N_HEADS][2]; /* d */
};

/* Store v as a half; returns what was stored. */
static double put_f16(uint8_t *dst, double v) {
    uint16_t h = f32_to_f16((float)v);
    memcpy(dst, &h, sizeof h);
    return (double)f16_to_f32(h);
}

/* Scales stay in the lower half of their range, so that d keeps clear of the coarse end of the halves. */

/* Q4_K: minimum == scale and dmin == 7.5 d centre the sixteen steps. */
static void make_q4_head(uint64_t *rng, double std, uint8_t dst[16]) {
    uint8_t scale[8];
    double sum = 0;
    for (int i = 0; i < 8; i++) {
        scale[i] = (uint8_t)(16 + next_random(rng) % 16);
        sum += (double)scale[i] * scale[i];
    }
    double d = put_f16(dst, std / (std_u4 * sqrt(sum / 8)));
    put_f16(dst + 2, 7.5 * d);
    for (int i = 0; i < 4; i++) {
        dst[4 + i] = dst[8 + i] = (uint8_t)(scale[i] | (scale[4 + i] >> 4) << 6);
        dst[12 + i] = (uint8_t)((scale[4 + i] & 15) | (scale[4 + i] & 15) << 4);
    }
}

/* Q6_K: the 64 steps lie half a step off centre, which scales of both signs even out. */
static void make_q6_head(uint64_t *rng, double std, uint8_t dst[18]) {
    double sum = 0;
    for (int i = 0; i < 16; i++) {
        int scale = (int)(16 + next_random(rng) % 16) * (i % 2 ? -1 : 1);
        dst[i] = (uint8_t)scale;
        sum += (double)scale * scale;
    }
    put_f16(dst + 16, std / (std_u6 * sqrt(sum / 16)));
}

static void make_heads(uint64_t rng, double std, struct block_heads *h) {
    for (int i = 0; i < N_HEADS; i++) {
        double factor = 0.9 + 0.2 * uniform(&rng); /* superblocks differ in scale, a little */
        make_q4_head(&rng, std * factor, h->q4[i]);
        make_q6_head(&rng, std * factor, h->q6[i]);
        put_f16(h->q8[i], std * factor / std_i8);
    }
}

static void fill_blocks(const struct tensor *t, const struct block_heads *h, uint64_t rng,
                        uint8_t *dst, size_t n_bytes) {
    uint8_t *end = dst + n_bytes;
    switch (t->type) {
    case TENSOR_Q4_K:
        for (; dst < end; dst += Q4_K_BYTES) {
            memcpy(dst, h->q4[next_random(&rng) % N_HEADS], 16);
            fill_random(&rng, dst + 16, 128);
        }
        return;
    case TENSOR_Q6_K:
        for (; dst < end; dst += Q6_K_BYTES) {
            fill_random(&rng, dst, 192);
            memcpy(dst + 192, h->q6[next_random(&rng) % N_HEADS], 18);
        }
        return;
    case TENSOR_Q8_0:
        for (; dst < end; dst += Q8_0_BYTES) {
            memcpy(dst, h->q8[next_random(&rng) % N_HEADS], 2);
            fill_random(&rng, dst + 2, 32);
        }
        return;
    default: /* F32: the sum of four uniforms is bell-shaped enough for a router */
        for (size_t i = 0; dst < end; dst += sizeof(float), i++) {
            double u = uniform(&rng) + uniform(&rng) + uniform(&rng) + uniform(&rng) - 2;
            float v = t->std > 0 ? (float)(u * sqrt(3.0)) * t->std : 1;
            if (t->row_std) v *= t->row_std[i / t->ne[0]];
            memcpy(dst, &v, sizeof v);
        }
    }
}

/* ---- writing ------------------------------------------------------------------------------------- */

enum { CHUNK_BYTES = 4 << 20 };

struct job {
    const struct plan *plan;
    uint64_t seed, data_at;
    int fd;
    atomic_size_t next; /* tensor to take */
    atomic_int error; /* errno of the first failed write */
    size_t *first_chunk; /* [n + 1] prefix sums of chunks per tensor */
};

static size_t chunk_bytes(const struct tensor *t) {
    int32_t n_weights, n_bytes;
    CHECK(tensor_type_block(t->type, &n_weights, &n_bytes));
    return (size_t)(CHUNK_BYTES / n_bytes) * (size_t)n_bytes;
}

static int write_all(int fd, const uint8_t *p, size_t n, uint64_t offset) {
    while (n > 0) {
        ssize_t w = pwrite(fd, p, n, (off_t)offset);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) return errno;
        p += w;
        offset += (uint64_t)w;
        n -= (size_t)w;
    }
    return 0;
}

static void *write_chunks(void *arg) {
    struct job *j = arg;
    const struct plan *p = j->plan;
    uint8_t *buf = need(malloc(CHUNK_BYTES));
    struct block_heads *heads = need(malloc(sizeof *heads));
    size_t heads_of = SIZE_MAX, i = 0;
    for (;;) {
        size_t chunk = atomic_fetch_add(&j->next, 1);
        if (chunk >= j->first_chunk[p->n] || atomic_load(&j->error)) break;
        while (chunk >= j->first_chunk[i + 1]) i++; /* chunks come to a thread in rising order */
        const struct tensor *t = &p->tensors[i];
        uint64_t tensor_seed = j->seed + i * UINT64_C(0xd1342543de82ef95);
        if (heads_of != i) make_heads(tensor_seed, (double)t->std, heads);
        heads_of = i;
        size_t step = chunk_bytes(t), k = chunk - j->first_chunk[i];
        uint64_t at = (uint64_t)k * step;
        size_t n = t->n_bytes - at < step ? (size_t)(t->n_bytes - at) : step;
        uint64_t rng = tensor_seed ^ (k + 1) * UINT64_C(0xaef17502108ef2d9);
        fill_blocks(t, heads, next_random(&rng), buf, n);
        int error = write_all(j->fd, buf, n, j->data_at + t->offset + at);
        if (error) atomic_store(&j->error, error);
    }
    free(heads);
    free(buf);
    return NULL;
}

/* Returns an errno, 0 when all is written. */
static int write_tensors(int fd, const struct options *c, const struct plan *p, uint64_t data_at) {
    struct job j = {.plan = p, .seed = c->seed, .data_at = data_at, .fd = fd};
    j.first_chunk = need(calloc(p->n + 1, sizeof *j.first_chunk));
    for (size_t i = 0; i < p->n; i++) {
        size_t step = chunk_bytes(&p->tensors[i]);
        j.first_chunk[i + 1] = j.first_chunk[i] + (p->tensors[i].n_bytes + step - 1) / step;
    }
    pthread_t *threads = need(calloc((size_t)c->n_threads, sizeof *threads));
    int started = 0;
    while (started < c->n_threads - 1 &&
           pthread_create(&threads[started], NULL, write_chunks, &j) == 0)
        started++;
    write_chunks(&j);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
    free(j.first_chunk);
    return atomic_load(&j.error);
}

static struct out make_metadata(const struct options *c, const struct plan *p) {
    struct out keys = {0}, head = {0};
    put_shape(&keys, c);
    if (c->vocab)
        put_vocab_file(&keys, c);
    else
        put_synthetic_vocab(&keys, c->shape.n_vocab);
    put(&head, "GGUF", 4);
    put_u32(&head, 3);
    put_u64(&head, p->n);
    put_u64(&head, keys.n_keys);
    put(&head, keys.p, keys.n);
    for (size_t i = 0; i < p->n; i++) {
        const struct tensor *t = &p->tensors[i];
        put_string(&head, t->name, strlen(t->name));
        put_u32(&head, t->n_dims);
        put(&head, t->ne, t->n_dims * sizeof *t->ne);
        put_u32(&head, t->type);
        put_u64(&head, t->offset);
    }
    static const uint8_t zeros[ALIGNMENT];
    put(&head, zeros, (ALIGNMENT - head.n % ALIGNMENT) % ALIGNMENT);
    free(keys.p);
    return head;
}

/* How much longer the router's rows are than others, so that experts are in demand by Zipf's law: a row of length s gives
 * normal logits of deviation s, which are above 1, say, with probability Q(1 / s). That is at most a half, so the first
 * experts are less in demand than the law says. Every other expert comes first, so that a table which deals experts out
 * to two devices in turn is as wrong as can be. */
static float *make_row_stds(uint32_t n_experts, uint32_t n_used, double exponent) {
    float *std = need(calloc(n_experts, sizeof *std));
    double sum = 0;
    for (uint32_t i = 0; i < n_experts; i++) sum += pow(i + 1, -exponent);
    for (uint32_t i = 0; i < n_experts; i++) {
        double p = fmin(n_used * pow(i + 1, -exponent) / sum, 0.4), lo = 0.05, hi = 10;
        for (int k = 0; k < 50; k++) {
            double s = (lo + hi) / 2;
            if (0.5 * erfc(sqrt(0.5) / s) < p) lo = s;
            else hi = s;
        }
        std[i * 2 % n_experts + i * 2 / n_experts] = (float)lo;
    }
    return std;
}

static void write_file(const struct options *c) {
    struct plan p = make_plan(c);
    float *row_std = c->skew > 0 ? make_row_stds(c->shape.n_experts, c->shape.n_experts_used, c->skew) : NULL;
    for (size_t i = 0; i < p.n && row_std; i++) {
        if (strstr(p.tensors[i].name, "ffn_gate_inp") == NULL) continue;
        CHECK(p.tensors[i].n_bytes <= CHUNK_BYTES); /* rows are counted from the start of a chunk */
        p.tensors[i].row_std = row_std;
    }
    struct out meta = make_metadata(c, &p);
    uint64_t total = meta.n + p.data_bytes, start = clock_now_ns();
    char *part = need(malloc(strlen(c->out) + sizeof ".part"));
    sprintf(part, "%s.part", c->out);
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) die(1, "cannot create %s: %s", part, strerror(errno));
    /* A disk that is too small says so at once. Not by fallocate: a memory file system clears every page in it, on
     * one thread, before the threads write them. */
    struct statvfs disk;
    int error =
        fstatvfs(fd, &disk) == 0 && (uint64_t)disk.f_bavail * disk.f_frsize < total ? ENOSPC : 0;
    if (!error && ftruncate(fd, (off_t)total) != 0) error = errno;
    if (!error) error = write_all(fd, meta.p, meta.n, 0);
    if (!error) error = write_tensors(fd, c, &p, meta.n);
    if (close(fd) != 0 && !error) error = errno;
    if (!error && rename(part, c->out) != 0) error = errno;
    if (error) {
        unlink(part);
        die(1, "cannot write %s (%.2f GB): %s", c->out, (double)total / 1e9, strerror(error));
    }
    double seconds = (double)(clock_now_ns() - start) / 1e9;
    printf("%s: %s, %u layers, %s, %zu tensors, %.3f GB in %.1f s (%.2f GB/s)\n", c->out,
           c->shape.name, c->shape.n_layers, c->q8_0 ? "Q8_0" : "Q4_K_M", p.n, (double)total / 1e9,
           seconds, (double)total / 1e9 / seconds);
    free(part);
    free(meta.p);
    free(p.tensors);
    free(row_std);
}

/* ---- options ------------------------------------------------------------------------------------- */

static const char help[] =
    "usage: moed-synth --shape SHAPE -o FILE [options]\n"
    "\n"
    "Write a GGUF model of the given shape with random weights.\n"
    "\n"
    "  --shape SHAPE    qwen3-30b-a3b (18.6 GB as q4_k_m), qwen3-235b-a22b or tiny\n"
    "  -o FILE          the file to write\n"
    "  --type TYPE      q4_k_m (default) or q8_0\n"
    "  --layers N       1 to 512 instead of the shape's own number\n"
    "  --vocab FILE     copy the tokenizer of this GGUF file; none (default): a synthetic "
    "byte-level one\n"
    "  --seed N         of the weights (default 1)\n"
    "  --skew X         experts are in demand by Zipf's law with this exponent (default 0: all alike)\n"
    "  --threads N      default: one per CPU; the file does not depend on it\n"
    "  --help           this text\n";

static uint64_t parse_number(const char *name, const char *s, uint64_t lo, uint64_t hi) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (s[0] < '0' || s[0] > '9' || *end || errno || v < lo || v > hi)
        die(2, "%s %s: a number from %llu to %llu is needed", name, s, (unsigned long long)lo,
            (unsigned long long)hi);
    return v;
}

static double parse_exponent(const char *s) {
    char *end;
    double v = strtod(s, &end);
    if (end == s || *end || !(v >= 0 && v <= 4)) die(2, "--skew %s: a number from 0 to 4 is needed", s);
    return v;
}

static const struct synth_shape *find_shape(const char *name) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (strcmp(name, shapes[i].name) == 0) return &shapes[i];
    die(2, "--shape %s: known shapes are qwen3-30b-a3b, qwen3-235b-a22b and tiny", name);
}

static struct options parse_options(int argc, char **argv) {
    static const struct option longs[] = {
        {"shape", required_argument, NULL, 's'},  {"type", required_argument, NULL, 't'},
        {"layers", required_argument, NULL, 'l'}, {"vocab", required_argument, NULL, 'v'},
        {"seed", required_argument, NULL, 'r'},   {"threads", required_argument, NULL, 'j'},
        {"skew", required_argument, NULL, 'z'},   {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct options c = {.seed = 1, .n_threads = cpus > 0 && cpus < 64 ? (int)cpus : 1};
    uint32_t n_layers = 0;
    for (int o; (o = getopt_long(argc, argv, "o:h", longs, NULL)) != -1;) {
        switch (o) {
        case 's': c.shape = *find_shape(optarg); break;
        case 't':
            c.q8_0 = strcmp(optarg, "q8_0") == 0;
            if (!c.q8_0 && strcmp(optarg, "q4_k_m") != 0)
                die(2, "--type %s: known types are q4_k_m and q8_0", optarg);
            break;
        case 'l': n_layers = (uint32_t)parse_number("--layers", optarg, 1, 512); break;
        case 'v': c.vocab = strcmp(optarg, "none") == 0 ? NULL : optarg; break;
        case 'r': c.seed = parse_number("--seed", optarg, 0, UINT64_MAX); break;
        case 'j': c.n_threads = (int)parse_number("--threads", optarg, 1, 64); break;
        case 'z': c.skew = parse_exponent(optarg); break;
        case 'o': c.out = optarg; break;
        case 'h': fputs(help, stdout); exit(0);
        default: fputs(help, stderr); exit(2);
        }
    }
    if (optind < argc) die(2, "%s: not an option; see --help", argv[optind]);
    if (!c.shape.name) die(2, "--shape is missing; see --help");
    if (!c.out) die(2, "-o is missing; see --help");
    if (n_layers) c.shape.n_layers = n_layers;
    return c;
}

int main(int argc, char **argv) {
    struct options c = parse_options(argc, argv);
    write_file(&c);
    return 0;
}
