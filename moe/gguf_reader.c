/* gguf_reader: files and a checked cursor over their beginning; see gguf_internal.h.
 *
 * Everything is read with pread into memory that grows with what was really there: a count or length in the
 * file is compared with the bytes that remain before it is used. Nothing is mapped, so that a file
 * truncated under us is a short read and not a signal. */
#include "moe/gguf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FIRST_READ_BYTES = 256 << 10 };

const char *gguf_label(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

enum status gguf_file_open(const char *path, struct error *e, int *fd, uint64_t *file_bytes) {
    char why[128];
    /* O_NONBLOCK: a FIFO must be refused, not waited for. It means nothing to a regular file. */
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) {
        enum status st = errno == ENOENT ? ST_NOT_FOUND : ST_IO;
        return error_set(e, st, "%.150s: %s", path, strerror_r(errno, why, sizeof why));
    }
    struct stat s;
    enum status st = ST_OK;
    if (fstat(*fd, &s) != 0)
        st = error_set(e, ST_IO, "%.150s: %s", path, strerror_r(errno, why, sizeof why));
    else if (!S_ISREG(s.st_mode))
        st = error_set(e, ST_UNSUPPORTED, "%.150s: not a regular file", path);
    if (st != ST_OK) {
        close(*fd);
        *fd = -1;
        return st;
    }
    *file_bytes = (uint64_t)s.st_size;
    return ST_OK;
}

enum status gguf_file_read(int fd, uint64_t offset, void *dst, size_t n) {
    uint8_t *p = dst;
    while (n > 0) {
        ssize_t got = pread(fd, p, n, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return ST_IO;
        p += got;
        offset += (uint64_t)got;
        n -= (size_t)got;
    }
    return ST_OK;
}

enum status gguf_reader_fail(struct gguf_reader *r, enum status st, const char *fmt, ...) {
    char text[200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return error_set(r->e, st, "%.60s: %s", r->label, text);
}

uint64_t gguf_reader_left(const struct gguf_reader *r) {
    uint64_t end = r->file_bytes < GGUF_MAX_META_BYTES ? r->file_bytes : GGUF_MAX_META_BYTES;
    return end - r->pos;
}

/* Load at least up to `end`, which lies in the file. Doubling keeps the copying linear. */
static enum status reader_load(struct gguf_reader *r, size_t end) {
    size_t want = r->n < FIRST_READ_BYTES ? FIRST_READ_BYTES : 2 * r->n;
    if (want < end) want = end;
    if (want > GGUF_MAX_META_BYTES) want = GGUF_MAX_META_BYTES;
    if (want > r->file_bytes) want = (size_t)r->file_bytes;
    uint8_t *p = realloc(r->p, want);
    if (!p) return gguf_reader_fail(r, ST_NO_MEMORY, "no memory for %zu bytes of metadata", want);
    r->p = p;
    if (gguf_file_read(r->fd, r->n, r->p + r->n, want - r->n) != ST_OK)
        return gguf_reader_fail(r, ST_IO, "cannot read the metadata");
    r->n = want;
    return ST_OK;
}

enum status gguf_reader_take(struct gguf_reader *r, uint64_t n, const char *what, size_t *at) {
    if (n > r->file_bytes - r->pos)
        return gguf_reader_fail(r, ST_CORRUPT, "the file ends inside %s", what);
    if (n > gguf_reader_left(r))
        return gguf_reader_fail(r, ST_UNSUPPORTED, "more than %d MiB of metadata, at %s",
                                GGUF_MAX_META_BYTES >> 20, what);
    size_t end = r->pos + (size_t)n;
    if (end > r->n) {
        enum status st = reader_load(r, end);
        if (st != ST_OK) return st;
    }
    *at = r->pos;
    r->pos = end;
    return ST_OK;
}

enum status gguf_reader_u32(struct gguf_reader *r, const char *what, uint32_t *out) {
    size_t at;
    enum status st = gguf_reader_take(r, sizeof *out, what, &at);
    if (st == ST_OK) memcpy(out, r->p + at, sizeof *out);
    return st;
}

enum status gguf_reader_u64(struct gguf_reader *r, const char *what, uint64_t *out) {
    size_t at;
    enum status st = gguf_reader_take(r, sizeof *out, what, &at);
    if (st == ST_OK) memcpy(out, r->p + at, sizeof *out);
    return st;
}
