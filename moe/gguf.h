/* gguf: reads GGUF v2 and v3 files, split files included, and trusts nothing in them.
 *
 * gguf_open reads and checks all metadata and all tensor infos (never the tensor data) with pread; a
 * file that shrinks later is an ST_IO, not a signal. Rules: every count is held against the bytes that
 * remain before anything is allocated; every sum and product is checked; keys and tensor names are
 * unique; alignment is a power of two, 8 … 4096; n_dims 1 … 4; tensors are aligned, inside their file and
 * do not overlap; tensor types are the ones quant.h knows, or the open fails naming the tensor. More than
 * 128 MiB of metadata, 65536 keys or 262144 tensors is ST_UNSUPPORTED; more than 512 parts is ST_CORRUPT.
 *
 * Private to moe/. Immutable after opening; gguf_tensor_read may be called from any thread. */
#ifndef MOED_MOE_GGUF_H
#define MOED_MOE_GGUF_H

#include "moe/backend.h"
#include "proto/base.h"

struct gguf;

enum gguf_type { /* metadata value types, GGUF's numbers */
    GGUF_U8 = 0, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL,
    GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64
};

/* Open path; if it is a split file (`name-00001-of-0000N.gguf`, split.count), open its siblings too. Any
 * part may be named. ST_NOT_FOUND, ST_IO, ST_NO_MEMORY, ST_UNSUPPORTED (version, tensor type, big-endian)
 * or ST_CORRUPT, with what is wrong in *e. metadata_only: tensor infos are parsed and checked against each
 * other but not against file size, and only the named file is opened (vocabulary files); if that is a later
 * part of a split file, the first part is opened in its place, because it alone has the metadata. */
enum status gguf_open(const char *path, bool metadata_only, struct error *e, struct gguf **out);
void gguf_close(struct gguf *g); /* NULL is fine */

/* ---- metadata: typed getters. A key of another type is ST_CORRUPT with the key named; an absent one is
 * ST_NOT_FOUND with the key named, unless the getter takes a default. Integers of any width and sign are
 * accepted where the value lies in [lo, hi]; outside is ST_CORRUPT. ------------------------------------ */
bool gguf_has(const struct gguf *g, const char *key);
enum status gguf_get_int(const struct gguf *g, const char *key, int64_t lo, int64_t hi,
                         struct error *e, int64_t *out);
enum status gguf_get_float(const struct gguf *g, const char *key, double lo, double hi,
                           struct error *e, double *out); /* F32 or F64; finite */
enum status gguf_get_bool(const struct gguf *g, const char *key, struct error *e, bool *out);
/* Borrowed from g; not NUL-terminated; valid UTF-8 is not promised. */
enum status gguf_get_string(const struct gguf *g, const char *key, struct error *e,
                            struct bytes *out);
/* All elements at once; the array lives in g. */
enum status gguf_string_array(const struct gguf *g, const char *key, struct error *e,
                              const struct bytes **out, size_t *n);
/* An array of any integer type, widened; lives in g. */
enum status gguf_int_array(const struct gguf *g, const char *key, struct error *e,
                           const int32_t **out, size_t *n);

/* ---- tensors ------------------------------------------------------------------------------------ */
struct gguf_tensor {
    const char *name; /* NUL-terminated, no control characters, unique; borrowed */
    enum tensor_type type;
    int n_dims;
    int64_t ne[4]; /* fastest first; unused are 1 */
    size_t n_bytes;
    int file;        /* part of a split file */
    uint64_t offset; /* absolute, in that file */
};
size_t gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i);
const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name); /* NULL: none */
/* Raw bytes [offset, offset+n) of a tensor. ST_IO on a short read. CHECK: within the tensor. */
enum status gguf_tensor_read(const struct gguf *g, const struct gguf_tensor *t, size_t offset,
                             void *dst, size_t n);
uint64_t gguf_tensor_bytes(const struct gguf *g); /* sum over all tensors */

#endif
