/* base: see base.h. Holds no state but the log level. */
#include "proto/base.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

static const char *const status_names[ST_COUNT] = {
    "OK",         "INVALID",  "TOO_LONG", "UNSUPPORTED", "UNAUTHENTICATED",
    "DENIED",     "NOT_FOUND", "CONFLICT", "STALE_EPOCH", "TOO_LARGE",
    "QUOTA",      "NUMERIC",  "INTERNAL", "UNIMPLEMENTED", "OVERLOADED",
    "DRAINING",   "LOADING",  "ENGINE_LOST", "TIMEOUT",  "SLOW_CONSUMER",
    "CANCELLED",  "NO_MEMORY", "IO",      "CORRUPT",     "NO_BLOCKS",
};

const char *status_name(enum status st) {
    return (unsigned)st < ST_COUNT ? status_names[st] : "?";
}

bool status_retryable(enum status st) {
    switch (st) {
    case ST_QUOTA:
    case ST_OVERLOADED:
    case ST_DRAINING:
    case ST_LOADING:
    case ST_ENGINE_LOST:
    case ST_TIMEOUT:
    case ST_STALE_EPOCH:
    case ST_SLOW_CONSUMER:
        return true;
    default:
        return false;
    }
}

enum status error_set(struct error *e, enum status st, const char *fmt, ...) {
    if (!e) return st;
    va_list ap;
    va_start(ap, fmt);
    e->code = st;
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    return st;
}

void check_failed(const char *file, int line, const char *what) {
    fprintf(stderr, "CHECK failed at %s:%d: %s\n", file, line, what);
    abort();
}

static enum log_level log_min = LOG_INFO;
static const char *const level_names[] = {"debug", "info", "warn", "error"};

void log_set_level(enum log_level level) { log_min = level; }

bool log_parse_level(const char *name, enum log_level *out) {
    for (int i = LOG_DEBUG; i <= LOG_ERROR; i++) {
        if (strcmp(name, level_names[i]) == 0) {
            *out = (enum log_level)i;
            return true;
        }
    }
    return false;
}

void log_event(enum log_level level, const char *room, const char *event, const char *fmt, ...) {
    if (level < log_min) return;
    char line[1024];
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts); /* for people; decisions use clock_now_ns */
    int n = snprintf(line, sizeof line, "ts=%lld.%03ld level=%s room=%s event=%s ",
                     (long long)ts.tv_sec, ts.tv_nsec / 1000000, level_names[level], room, event);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m < 0 ? 0 : (size_t)m);
    if (len > sizeof line - 2) len = sizeof line - 2;
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f) line[i] = '?';
    while (len > 0 && line[len - 1] == ' ') len--;
    line[len++] = '\n';
    /* One write: lines of several threads do not interleave. A full or closed stderr loses the
     * line and nothing else. */
    ssize_t w = write(STDERR_FILENO, line, len);
    (void)w;
}

uint64_t clock_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void random_bytes(void *dst, size_t n) {
    uint8_t *p = dst;
    while (n > 0) {
        ssize_t got = getrandom(p, n, 0);
        if (got < 0 && errno == EINTR) continue;
        CHECK(got > 0);
        p += got;
        n -= (size_t)got;
    }
}

/* Bytes that a lead byte announces (1 to 4), 0 if it cannot lead; *lo and *hi bound the second. */
static int utf8_lead(uint8_t c, uint8_t *lo, uint8_t *hi) {
    *lo = 0x80;
    *hi = 0xBF;
    if (c < 0x80) return 1;
    if (c < 0xC2) return 0;
    if (c < 0xE0) return 2;
    if (c < 0xF0) {
        if (c == 0xE0) *lo = 0xA0;
        if (c == 0xED) *hi = 0x9F;
        return 3;
    }
    if (c > 0xF4) return 0;
    if (c == 0xF0) *lo = 0x90;
    if (c == 0xF4) *hi = 0x8F;
    return 4;
}

bool utf8_valid(const void *s, size_t n) {
    const uint8_t *p = s;
    for (size_t i = 0; i < n;) {
        uint8_t lo, hi;
        int len = utf8_lead(p[i], &lo, &hi);
        if (len == 0 || (size_t)len > n - i) return false;
        if (len > 1 && (p[i + 1] < lo || p[i + 1] > hi)) return false;
        for (int k = 2; k < len; k++)
            if ((p[i + (size_t)k] & 0xC0) != 0x80) return false;
        i += (size_t)len;
    }
    return true;
}

size_t utf8_complete_prefix(const void *s, size_t n) {
    const uint8_t *p = s;
    /* Only the last lead byte within three bytes of the end can be incomplete. */
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t c = p[n - back];
        if ((c & 0xC0) == 0x80) continue;
        uint8_t lo, hi;
        int len = utf8_lead(c, &lo, &hi);
        if ((size_t)len <= back) return n;
        if (back >= 2 && (p[n - back + 1] < lo || p[n - back + 1] > hi)) return n;
        return n - back;
    }
    return n;
}

enum status arena_create(size_t cap_bytes, struct arena *out) {
    void *p = mmap(NULL, cap_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return ST_NO_MEMORY;
    *out = (struct arena){.base = p, .cap_bytes = cap_bytes};
    return ST_OK;
}

void arena_destroy(struct arena *a) {
    if (a->base) munmap(a->base, a->cap_bytes);
    *a = (struct arena){0};
}

void *arena_alloc(struct arena *a, size_t n) {
    size_t start, end;
    if (!size_add(a->used_bytes, 15, &start)) return NULL;
    start &= ~(size_t)15;
    if (!size_add(start, n, &end) || end > a->cap_bytes) return NULL;
    a->used_bytes = end;
    return a->base + start;
}
