/* base: the words every room uses. Status codes, typed errors, CHECK, log, clock, checked size
 * arithmetic, UTF-8 validation and the arena. Depends on libc only; all functions are
 * thread-safe unless a comment says otherwise. */
#ifndef MOED_PROTO_BASE_H
#define MOED_PROTO_BASE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- status ------------------------------------------------------------------------------ */

/* Every fallible function returns one of these; results come back by out-parameter, last. The
 * numeric values are part of the wire protocol (moed.proto, enum Code): never renumber. */
enum status {
    ST_OK = 0,
    ST_INVALID = 1,          /* malformed or out-of-range input */
    ST_TOO_LONG = 2,         /* prompt or text longer than the model or the limits allow */
    ST_UNSUPPORTED = 3,      /* well-formed, but this build or model cannot do it */
    ST_UNAUTHENTICATED = 4,  /* no session, or credentials missing */
    ST_DENIED = 5,           /* credentials known and not sufficient */
    ST_NOT_FOUND = 6,        /* no such file, request or key */
    ST_CONFLICT = 7,         /* the id is already in use */
    ST_STALE_EPOCH = 8,      /* boot_id of another daemon process */
    ST_TOO_LARGE = 9,        /* frame or file over a byte limit */
    ST_QUOTA = 10,           /* this peer has too much in flight */
    ST_NUMERIC = 11,         /* NaN or infinity where a finite number was needed */
    ST_INTERNAL = 12,        /* a fault of ours */
    ST_UNIMPLEMENTED = 13,   /* unknown message type or feature */
    ST_OVERLOADED = 14,      /* queue full: try again later */
    ST_DRAINING = 15,        /* shutting down: try another server */
    ST_LOADING = 16,         /* not ready yet */
    ST_ENGINE_LOST = 17,     /* the device or the engine is gone */
    ST_TIMEOUT = 18,         /* a deadline passed */
    ST_SLOW_CONSUMER = 19,   /* the peer did not read its answers */
    ST_CANCELLED = 20,       /* the peer asked to stop */
    ST_NO_MEMORY = 21,       /* host or device memory exhausted */
    ST_IO = 22,              /* read, write or socket failure */
    ST_CORRUPT = 23,         /* a file contradicts itself or its format */
    ST_NO_BLOCKS = 24,       /* the KV pool cannot hold the reservation now */
    ST_COUNT
};

/* "TOO_LONG" for ST_TOO_LONG; "?" outside the enum. Static storage. */
const char *status_name(enum status st);
/* True when the same request may succeed later or elsewhere without being changed. */
bool status_retryable(enum status st);

/* A status with a sentence for the person who has to mend it. Text never holds addresses or
 * prompts; paths only where the user gave them. Functions that fill one take `struct error *`
 * just before their out-parameters and accept NULL. */
struct error {
    enum status code;
    char text[256];
};

/* Fill *e (may be NULL) and return st, so that callers write `return error_set(...)`. */
enum status error_set(struct error *e, enum status st, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- CHECK: programmer errors. Never for bytes from a file or a socket; never compiled out. */

_Noreturn void check_failed(const char *file, int line, const char *what);
#define CHECK(cond) ((cond) ? (void)0 : check_failed(__FILE__, __LINE__, #cond))

/* ---- log: one line per event on stderr: `ts=<s.ms> level=info room=daemon event=… key=value` */

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

/* Events below `level` are dropped. Default LOG_INFO. Call before threads start. */
void log_set_level(enum log_level level);
/* "debug", "info", "warn" or "error" to its level; false if it is none of them. */
bool log_parse_level(const char *name, enum log_level *out);
/* `event` is a word such as "listening"; fmt gives `key=value` pairs. Control characters and
 * newlines in the formatted text are replaced, so that one event is one line. */
void log_event(enum log_level level, const char *room, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* ---- clock ------------------------------------------------------------------------------- */

/* CLOCK_MONOTONIC in nanoseconds. The only clock that decisions are made on. */
uint64_t clock_now_ns(void);
/* 128 random bits or more, from getrandom; aborts only if the kernel has no entropy source. */
void random_bytes(void *dst, size_t n);

/* ---- checked sizes: false on overflow, *out untouched ------------------------------------- */

static inline bool size_add(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
static inline bool size_mul(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

/* ---- UTF-8 ------------------------------------------------------------------------------- */

/* True if [s, s+n) is well-formed UTF-8 (Unicode 15 table 3-7: no surrogates, no overlongs,
 * nothing above U+10FFFF). NUL is allowed: text is counted bytes here. */
bool utf8_valid(const void *s, size_t n);
/* The longest prefix length <= n that does not end inside a character: the rest (0 to 3 bytes) is
 * the beginning of one that may still be completed. Ill-formed bytes count as complete. */
size_t utf8_complete_prefix(const void *s, size_t n);

/* ---- bytes: counted, borrowed ------------------------------------------------------------- */

struct bytes {
    const uint8_t *p; /* not NUL-terminated; may be NULL when n == 0 */
    size_t n;
};

/* ---- arena: bump allocation with a hard budget. One thread at a time. ----------------------- */

struct arena {
    uint8_t *base;
    size_t cap_bytes;
    size_t used_bytes;
};

/* Reserve cap bytes (mmap, so that untouched pages cost nothing). ST_NO_MEMORY on failure. */
enum status arena_create(size_t cap_bytes, struct arena *out);
void arena_destroy(struct arena *a);
/* 16-byte aligned, not zeroed; NULL when the budget does not hold n more bytes. */
void *arena_alloc(struct arena *a, size_t n);
static inline void arena_reset(struct arena *a) { a->used_bytes = 0; }

#endif
