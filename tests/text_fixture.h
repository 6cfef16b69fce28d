/* Writes small tokenizer files: a GGUF with metadata and no tensors, whose vocabulary is the 256 byte tokens
 * and whatever a test adds. Every part can be made wrong. */
#ifndef MOED_TESTS_TEXT_FIXTURE_H
#define MOED_TESTS_TEXT_FIXTURE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base.h"

struct fixture_token {
    struct bytes s;
    int32_t type;
};

struct fixture {
    const char *model, *pre;     /* NULL: the key is left out */
    const char *chat_template;
    const struct fixture_token *tokens; /* after the 256 byte tokens */
    size_t n_tokens;
    const struct bytes *merges;
    size_t n_merges;
    int missing_byte;            /* this byte's token is misspelt; -1: none */
    int types_missing;           /* token_type is this much too short */
    int64_t eos, bos;            /* -1: left out */
    bool add_bos;
    const char *drop;            /* this key is left out */
};

#define FIXTURE_DEFAULT {.model = "gpt2", .pre = "qwen2", .missing_byte = -1, .eos = -1, .bos = -1}
#define FIXTURE_BYTES(literal) {(const uint8_t *)(literal), sizeof(literal) - 1}

struct fixture_out {
    uint8_t *p;
    size_t n, cap;
    uint64_t n_keys;
    const char *drop;
};

static inline void fixture_put(struct fixture_out *o, const void *s, size_t n) {
    if (o->n + n > o->cap) {
        o->cap = 2 * (o->n + n) + 4096;
        o->p = realloc(o->p, o->cap);
        CHECK(o->p);
    }
    if (n > 0) memcpy(o->p + o->n, s, n);
    o->n += n;
}

static inline void fixture_u32(struct fixture_out *o, uint32_t v) { fixture_put(o, &v, 4); }
static inline void fixture_u64(struct fixture_out *o, uint64_t v) { fixture_put(o, &v, 8); }

static inline void fixture_str(struct fixture_out *o, struct bytes s) {
    fixture_u64(o, s.n);
    fixture_put(o, s.p, s.n);
}

/* GGUF's type numbers: 4 u32, 5 i32, 7 bool, 8 string, 9 array, 10 u64. False: the test drops the key. */
static inline bool fixture_key(struct fixture_out *o, const char *key, uint32_t type) {
    if (o->drop && strcmp(o->drop, key) == 0) return false;
    o->n_keys++;
    fixture_str(o, (struct bytes){(const uint8_t *)key, strlen(key)});
    fixture_u32(o, type);
    return true;
}

static inline void fixture_string_key(struct fixture_out *o, const char *key, const char *value) {
    if (!value || !fixture_key(o, key, 8)) return;
    fixture_str(o, (struct bytes){(const uint8_t *)value, strlen(value)});
}

static inline void fixture_id_key(struct fixture_out *o, const char *key, int64_t id) {
    if (id >= 0 && fixture_key(o, key, 10)) fixture_u64(o, (uint64_t)id);
}

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

static inline void fixture_vocab(struct fixture_out *o, const struct fixture *f) {
    size_t n = 256 + f->n_tokens;
    if (fixture_key(o, "tokenizer.ggml.tokens", 9)) {
        fixture_u32(o, 8);
        fixture_u64(o, n);
        for (int b = 0; b < 256; b++) {
            uint8_t name[2];
            size_t len = fixture_byte_name(b, name);
            if (b == f->missing_byte) fixture_str(o, (struct bytes)FIXTURE_BYTES("misspelt"));
            else fixture_str(o, (struct bytes){name, len});
        }
        for (size_t i = 0; i < f->n_tokens; i++) fixture_str(o, f->tokens[i].s);
    }
    if (fixture_key(o, "tokenizer.ggml.token_type", 9)) {
        fixture_u32(o, 5);
        fixture_u64(o, n - (size_t)f->types_missing);
        for (size_t i = 0; i < n - (size_t)f->types_missing; i++)
            fixture_u32(o, i < 256 ? 1 : (uint32_t)f->tokens[i - 256].type);
    }
    if (fixture_key(o, "tokenizer.ggml.merges", 9)) {
        fixture_u32(o, 8);
        fixture_u64(o, f->n_merges);
        for (size_t i = 0; i < f->n_merges; i++) fixture_str(o, f->merges[i]);
    }
}

/* The file as bytes (free them). */
static inline uint8_t *fixture_build(const struct fixture *f, size_t *n) {
    struct fixture_out o = {.drop = f->drop};
    fixture_put(&o, "GGUF", 4);
    fixture_u32(&o, 3);
    fixture_u64(&o, 0); /* tensors */
    fixture_u64(&o, 0); /* keys: filled in below */
    fixture_string_key(&o, "general.architecture", "qwen3moe");
    fixture_string_key(&o, "tokenizer.ggml.model", f->model);
    fixture_string_key(&o, "tokenizer.ggml.pre", f->pre);
    fixture_vocab(&o, f);
    fixture_id_key(&o, "tokenizer.ggml.eos_token_id", f->eos);
    fixture_id_key(&o, "tokenizer.ggml.bos_token_id", f->bos);
    if (f->add_bos && fixture_key(&o, "tokenizer.ggml.add_bos_token", 7)) fixture_put(&o, "\1", 1);
    fixture_string_key(&o, "tokenizer.chat_template", f->chat_template);
    memcpy(o.p + 16, &o.n_keys, 8);
    *n = o.n;
    return o.p;
}

#endif
