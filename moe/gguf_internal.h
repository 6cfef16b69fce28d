/* gguf_internal: what gguf.c (files, tensors, splits), gguf_meta.c (keys and values) and gguf_reader.c
 * (bytes) share. Included by nobody else. */
#ifndef MOED_MOE_GGUF_INTERNAL_H
#define MOED_MOE_GGUF_INTERNAL_H

#include "moe/gguf.h"

enum {
    /* Limits on what is held in memory for one file; real files stay far below. */
    GGUF_MAX_META_BYTES = 128 << 20, /* header, keys, values and tensor infos */
    GGUF_MAX_KEYS = 1 << 16,
    GGUF_MAX_TENSORS = 1 << 18,
    GGUF_MAX_KEY_BYTES = 65535, /* the format's own */
    GGUF_MAX_NAME_BYTES = 64,   /* the format's own */
    GGUF_MAX_PARTS = 512,
    GGUF_KEY_MIN_BYTES = 13,   /* empty key: u64 length, u32 type, 1-byte value */
    GGUF_TENSOR_MIN_BYTES = 32 /* empty name: u64 length, u32 n_dims, u64 ne, u32 type, u64 offset */
};

/* ---- reader: a cursor over the beginning of a file, which stays in memory as far as it was read. ---- */

struct gguf_reader {
    int fd; /* owned by whoever opened it */
    uint64_t file_bytes;
    uint8_t *p; /* [n] the file's first bytes; owned by the reader until taken */
    size_t n, pos;
    const char *label; /* base name of the file, for messages; borrowed */
    struct error *e;
};

/* Open a regular file. *fd is -1 on failure. */
enum status gguf_file_open(const char *path, struct error *e, int *fd, uint64_t *file_bytes);
/* Read exactly n bytes at offset; ST_IO if the file does not have them. */
enum status gguf_file_read(int fd, uint64_t offset, void *dst, size_t n);
const char *gguf_label(const char *path);

/* error_set with "label: " before it. */
enum status gguf_reader_fail(struct gguf_reader *r, enum status st, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Bytes between the cursor and the end of the file or of GGUF_MAX_META_BYTES. */
uint64_t gguf_reader_left(const struct gguf_reader *r);
/* Make n bytes at the cursor available and step over them; *at is where they begin in r->p, which may
 * move with the next call. `what` completes "the file ends inside …". */
enum status gguf_reader_take(struct gguf_reader *r, uint64_t n, const char *what, size_t *at);
enum status gguf_reader_u32(struct gguf_reader *r, const char *what, uint32_t *out);
enum status gguf_reader_u64(struct gguf_reader *r, const char *what, uint64_t *out);

/* ---- meta: the keys and values of one file ------------------------------------------------------- */

struct gguf_kv {
    size_t key_at; /* in the metadata bytes */
    struct bytes key;
    enum gguf_type type, element; /* element: of an array */
    size_t n;                     /* elements; bytes of a string; 1 */
    size_t at;                    /* the value (past counts and lengths) in the metadata bytes */
    struct bytes *strings;        /* [n] of an array of strings; owned */
    int32_t *ints;                /* [n] of an array of integers that all fit; owned */
};

struct gguf_meta {
    uint8_t *p; /* the metadata bytes that the values point into; owned */
    struct gguf_kv *kvs;
    size_t n_kvs; /* sorted by key once finished */
};

/* Parse n keys and values at the cursor. m is zero or partly filled on failure: free it either way. */
enum status gguf_meta_parse(struct gguf_reader *r, uint64_t n, struct gguf_meta *m);
/* Take over the reader's bytes, sort, refuse duplicates, lay out the arrays. */
enum status gguf_meta_finish(struct gguf_reader *r, struct gguf_meta *m);
void gguf_meta_free(struct gguf_meta *m);
/* As gguf_get_int, usable on a part's own keys. */
enum status gguf_meta_int(const struct gguf_meta *m, const char *key, int64_t lo, int64_t hi,
                          struct error *e, int64_t *out);
bool gguf_meta_has(const struct gguf_meta *m, const char *key);

struct gguf {
    struct gguf_meta meta; /* of the first part */
    int n_parts;
    struct gguf_part {
        int fd;
        uint64_t file_bytes;
        char *names; /* the tensor names of this part */
    } *parts; /* [n_parts] */
    struct gguf_tensor *tensors; /* in the order of the files */
    size_t n_tensors;
    const struct gguf_tensor **by_name; /* [n_tensors] */
    uint64_t tensor_bytes;
};

#endif
