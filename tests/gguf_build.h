/* gguf_build: writes GGUF files for tests, well-formed or not. Keys, tensor infos and data are three byte
 * strings; the functions append to them and count, and every field can be overwritten before saving. Runs
 * out of memory by failing the test. */
#ifndef MOED_TESTS_GGUF_BUILD_H
#define MOED_TESTS_GGUF_BUILD_H

#include "moe/gguf.h"
#include "tests/support.h"

struct gguf_bytes {
    uint8_t *p;
    size_t n, cap;
};

struct gguf_build {
    struct gguf_bytes keys, infos;
    size_t data_bytes; /* of zeros after the metadata */
    uint32_t version;
    uint64_t n_keys, n_tensors; /* as the header will claim */
    size_t alignment; /* where the data begins; also what gguf_build_tensor rounds to */
};

struct gguf_build gguf_build_new(void); /* version 3, alignment 32 */
void gguf_build_free(struct gguf_build *b);

/* Raw pieces, appended to the keys or the infos. */
void gguf_put(struct gguf_bytes *b, const void *p, size_t n);
void gguf_put_u32(struct gguf_bytes *b, uint32_t v);
void gguf_put_u64(struct gguf_bytes *b, uint64_t v);
void gguf_put_string(struct gguf_bytes *b, const void *p, size_t n);

/* The beginning of a key: name and type; the value follows with gguf_put. Counts the key. */
void gguf_build_key(struct gguf_build *b, const char *key, uint32_t type);
void gguf_build_u32(struct gguf_build *b, const char *key, uint32_t v);
void gguf_build_f32(struct gguf_build *b, const char *key, float v);
void gguf_build_string(struct gguf_build *b, const char *key, const char *v);
/* The beginning of an array key. */
void gguf_build_array(struct gguf_build *b, const char *key, uint32_t element, uint64_t n);

/* A tensor info as given. Counts the tensor. */
void gguf_build_info(struct gguf_build *b, const char *name, uint32_t n_dims, const uint64_t *ne,
                     uint32_t type, uint64_t offset);
/* A well-formed tensor of type (of quant.h), placed after the ones before; unused dimensions 0. */
void gguf_build_tensor(struct gguf_build *b, const char *name, enum tensor_type type, int64_t ne0,
                       int64_t ne1, int64_t ne2);

/* The whole file, malloc'd. */
uint8_t *gguf_build_bytes(const struct gguf_build *b, size_t *n);
/* Write it to path. */
void gguf_build_save(const struct gguf_build *b, const char *path);

/* Open path and expect a status, and `words` in the sentence that comes with it. */
void gguf_expect_open(const char *path, bool metadata_only, enum status want, const char *words);

#endif
