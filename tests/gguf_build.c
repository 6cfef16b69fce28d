/* See gguf_build.h. */
#include "tests/gguf_build.h"

#include "moe/quant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct gguf_build gguf_build_new(void) {
    return (struct gguf_build){.version = 3, .alignment = 32};
}

void gguf_build_free(struct gguf_build *b) {
    free(b->keys.p);
    free(b->infos.p);
    *b = (struct gguf_build){0};
}

void gguf_put(struct gguf_bytes *b, const void *p, size_t n) {
    if (b->cap - b->n < n) {
        b->cap = 2 * b->cap + n + 256;
        b->p = realloc(b->p, b->cap);
        if (!b->p) fail_msg("no memory");
    }
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
}

void gguf_put_u32(struct gguf_bytes *b, uint32_t v) { gguf_put(b, &v, sizeof v); }

void gguf_put_u64(struct gguf_bytes *b, uint64_t v) { gguf_put(b, &v, sizeof v); }

void gguf_put_string(struct gguf_bytes *b, const void *p, size_t n) {
    gguf_put_u64(b, n);
    gguf_put(b, p, n);
}

void gguf_build_key(struct gguf_build *b, const char *key, uint32_t type) {
    gguf_put_string(&b->keys, key, strlen(key));
    gguf_put_u32(&b->keys, type);
    b->n_keys++;
}

void gguf_build_u32(struct gguf_build *b, const char *key, uint32_t v) {
    gguf_build_key(b, key, GGUF_U32);
    gguf_put_u32(&b->keys, v);
}

void gguf_build_f32(struct gguf_build *b, const char *key, float v) {
    gguf_build_key(b, key, GGUF_F32);
    gguf_put(&b->keys, &v, sizeof v);
}

void gguf_build_string(struct gguf_build *b, const char *key, const char *v) {
    gguf_build_key(b, key, GGUF_STRING);
    gguf_put_string(&b->keys, v, strlen(v));
}

void gguf_build_array(struct gguf_build *b, const char *key, uint32_t element, uint64_t n) {
    gguf_build_key(b, key, GGUF_ARRAY);
    gguf_put_u32(&b->keys, element);
    gguf_put_u64(&b->keys, n);
}

void gguf_build_info(struct gguf_build *b, const char *name, uint32_t n_dims, const uint64_t *ne,
                     uint32_t type, uint64_t offset) {
    gguf_put_string(&b->infos, name, strlen(name));
    gguf_put_u32(&b->infos, n_dims);
    for (uint32_t i = 0; i < n_dims; i++) gguf_put_u64(&b->infos, ne[i]);
    gguf_put_u32(&b->infos, type);
    gguf_put_u64(&b->infos, offset);
    b->n_tensors++;
}

void gguf_build_tensor(struct gguf_build *b, const char *name, enum tensor_type type, int64_t ne0,
                       int64_t ne1, int64_t ne2) {
    uint64_t ne[3] = {(uint64_t)ne0, (uint64_t)ne1, (uint64_t)ne2};
    uint32_t n_dims = ne2 ? 3 : ne1 ? 2 : 1;
    size_t n = (size_t)(ne0 * (ne1 ? ne1 : 1) * (ne2 ? ne2 : 1)), n_bytes;
    if (!tensor_type_bytes(type, n, &n_bytes)) fail_msg("%s: not whole blocks", name);
    b->data_bytes = (b->data_bytes + b->alignment - 1) / b->alignment * b->alignment;
    gguf_build_info(b, name, n_dims, ne, type, b->data_bytes);
    b->data_bytes += n_bytes;
}

uint8_t *gguf_build_bytes(const struct gguf_build *b, size_t *n) {
    struct gguf_bytes out = {0};
    gguf_put(&out, "GGUF", 4);
    gguf_put_u32(&out, b->version);
    gguf_put_u64(&out, b->n_tensors);
    gguf_put_u64(&out, b->n_keys);
    gguf_put(&out, b->keys.p, b->keys.n);
    gguf_put(&out, b->infos.p, b->infos.n);
    if (b->data_bytes > 0) {
        size_t data_at = (out.n + b->alignment - 1) / b->alignment * b->alignment;
        out.p = realloc(out.p, data_at + b->data_bytes);
        if (!out.p) fail_msg("no memory");
        memset(out.p + out.n, 0, data_at + b->data_bytes - out.n);
        out.n = data_at + b->data_bytes;
    }
    *n = out.n;
    return out.p;
}

void gguf_build_save(const struct gguf_build *b, const char *path) {
    size_t n;
    uint8_t *p = gguf_build_bytes(b, &n);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, n, f) != n || fclose(f) != 0) fail_msg("cannot write %s", path);
    free(p);
}

void gguf_expect_open(const char *path, bool metadata_only, enum status want, const char *words) {
    struct error e = {0};
    struct gguf *g = (struct gguf *)&e;
    enum status st = gguf_open(path, metadata_only, &e, &g);
    if (st != want || !strstr(e.text, words))
        fail_msg("%s \"%s\", not %s \"%s\"", status_name(st), e.text, status_name(want), words);
    if (st != ST_OK) {
        assert_int_equal(e.code, want);
        assert_null(g);
    }
    gguf_close(g);
}
