/* Writes small tokenizer files: a GGUF with metadata and no tensors, whose vocabulary is the 256 byte tokens
 * and whatever a test adds. Every part can be made wrong. */
#ifndef MOED_TESTS_TEXT_FIXTURE_H
#define MOED_TESTS_TEXT_FIXTURE_H

#include "tests/gguf_build.h"

#include <stdlib.h>
#include <string.h>

struct fixture_token {
    struct bytes s;
    int32_t type;
};

struct fixture {
    const char *model, *pre; /* NULL: the key is left out */
    const char *chat_template;
    const struct fixture_token *tokens; /* after the 256 byte tokens */
    size_t n_tokens;
    const struct bytes *merges;
    size_t n_merges;
    int missing_byte; /* this byte's token is misspelt; -1: none */
    int types_missing; /* token_type is this much too short */
    int64_t eos, bos; /* -1: left out */
    bool add_bos;
    const char *drop; /* this key is left out */
};

#define FIXTURE_DEFAULT                                                                            \
    { .model = "gpt2", .pre = "qwen2", .missing_byte = -1, .eos = -1, .bos = -1 }
#define FIXTURE_BYTES(literal)                                                                     \
    { (const uint8_t *)(literal), sizeof(literal) - 1 }

/* How GPT-2's table spells a byte: at most 2 bytes of UTF-8. */
static inline size_t fixture_byte_name(int byte, uint8_t dst[2]) {
    int cp = byte, shifted = 256;
    for (int b = 0; b <= byte; b++) {
        bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
        if (!printable && b == byte) cp = shifted;
        shifted += !printable;
    }
    if (cp < 0x80) {
        dst[0] = (uint8_t)cp;
        return 1;
    }
    dst[0] = (uint8_t)(0xC0 | cp >> 6);
    dst[1] = (uint8_t)(0x80 | (cp & 0x3F));
    return 2;
}

static inline bool fixture_keeps(const struct fixture *f, const char *key) {
    return !f->drop || strcmp(f->drop, key) != 0;
}

static inline void fixture_string(struct gguf_build *b, const struct fixture *f, const char *key,
                                  const char *value) {
    if (value && fixture_keeps(f, key)) gguf_build_string(b, key, value);
}

static inline void fixture_id(struct gguf_build *b, const char *key, int64_t id) {
    if (id < 0) return;
    gguf_build_key(b, key, GGUF_U64);
    gguf_put_u64(&b->keys, (uint64_t)id);
}

static inline void fixture_vocab(struct gguf_build *b, const struct fixture *f) {
    size_t n = 256 + f->n_tokens, n_types = n - (size_t)f->types_missing;
    if (fixture_keeps(f, "tokenizer.ggml.tokens")) {
        gguf_build_array(b, "tokenizer.ggml.tokens", GGUF_STRING, n);
        for (int byte = 0; byte < 256; byte++) {
            uint8_t name[2];
            size_t len = fixture_byte_name(byte, name);
            if (byte == f->missing_byte)
                gguf_put_string(&b->keys, "misspelt", 8);
            else
                gguf_put_string(&b->keys, name, len);
        }
        for (size_t i = 0; i < f->n_tokens; i++)
            gguf_put_string(&b->keys, f->tokens[i].s.p, f->tokens[i].s.n);
    }
    if (fixture_keeps(f, "tokenizer.ggml.token_type")) {
        gguf_build_array(b, "tokenizer.ggml.token_type", GGUF_I32, n_types);
        for (size_t i = 0; i < n_types; i++)
            gguf_put_u32(&b->keys, i < 256 ? 1 : (uint32_t)f->tokens[i - 256].type);
    }
    if (fixture_keeps(f, "tokenizer.ggml.merges")) {
        gguf_build_array(b, "tokenizer.ggml.merges", GGUF_STRING, f->n_merges);
        for (size_t i = 0; i < f->n_merges; i++)
            gguf_put_string(&b->keys, f->merges[i].p, f->merges[i].n);
    }
}

/* The file as bytes (free them). */
static inline uint8_t *fixture_build(const struct fixture *f, size_t *n) {
    struct gguf_build b = gguf_build_new();
    gguf_build_string(&b, "general.architecture", "qwen3moe");
    fixture_string(&b, f, "tokenizer.ggml.model", f->model);
    fixture_string(&b, f, "tokenizer.ggml.pre", f->pre);
    fixture_vocab(&b, f);
    fixture_id(&b, "tokenizer.ggml.eos_token_id", f->eos);
    fixture_id(&b, "tokenizer.ggml.bos_token_id", f->bos);
    if (f->add_bos) {
        gguf_build_key(&b, "tokenizer.ggml.add_bos_token", GGUF_BOOL);
        gguf_put(&b.keys, "\1", 1);
    }
    fixture_string(&b, f, "tokenizer.chat_template", f->chat_template);
    uint8_t *file = gguf_build_bytes(&b, n);
    gguf_build_free(&b);
    return file;
}

#endif
