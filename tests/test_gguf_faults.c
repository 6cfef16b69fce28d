/* gguf and arch under failing calls: every allocation, read, open and stat of an opening fails in turn, once
 * each, and the opening ends in the right status with a sentence and without a leak (ASan watches). The
 * linker's --wrap puts these functions in the place of libc's. */
#include "moe/arch.h"
#include "moe/gguf.h"
#include "tests/gguf_build.h"
#include "tests/support.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n);
ssize_t __real_pread(int fd, void *dst, size_t n, off_t offset);
ssize_t __wrap_pread(int fd, void *dst, size_t n, off_t offset);
int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __real_fstat(int fd, struct stat *s);
int __wrap_fstat(int fd, struct stat *s);

enum site { SITE_NONE, SITE_ALLOC, SITE_PREAD, SITE_OPEN, SITE_FSTAT };

static struct {
    enum site site;
    int countdown; /* the call that brings it to 0 fails */
    int error; /* its errno; 0 for pread: end of file */
    bool fired;
    size_t max_read; /* at most so many bytes per pread; 0: no limit */
    bool interrupt; /* every other pread is EINTR */
    unsigned n_preads;
} fault;

static bool fails(enum site site) {
    if (fault.site != site || --fault.countdown != 0) return false;
    fault.fired = true;
    errno = fault.error;
    return true;
}

void *__wrap_malloc(size_t n) { return fails(SITE_ALLOC) ? NULL : __real_malloc(n); }

void *__wrap_calloc(size_t n, size_t size) {
    return fails(SITE_ALLOC) ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n) { return fails(SITE_ALLOC) ? NULL : __real_realloc(p, n); }

ssize_t __wrap_pread(int fd, void *dst, size_t n, off_t offset) {
    if (fails(SITE_PREAD)) return fault.error ? -1 : 0;
    if (fault.interrupt && fault.n_preads++ % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    if (fault.max_read && n > fault.max_read) n = fault.max_read;
    return __real_pread(fd, dst, n, offset);
}

int __wrap_open(const char *path, int flags, ...) {
    return fails(SITE_OPEN) ? -1 : __real_open(path, flags, 0);
}

int __wrap_fstat(int fd, struct stat *s) { return fails(SITE_FSTAT) ? -1 : __real_fstat(fd, s); }

static int count_fds(void) {
    int n = 0;
    for (int fd = 0; fd < 256; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* Open and read the architecture (the split fixture has none: NOT_FOUND is its success). */
static enum status open_and_read(const char *path, bool is_model, struct error *e) {
    struct gguf *g;
    struct arch_model m;
    enum status st = gguf_open(path, false, e, &g);
    if (st == ST_OK && is_model) {
        st = arch_read(g, e, &m);
        if (st == ST_OK) arch_free(&m);
    }
    gguf_close(g);
    return st;
}

/* Fail the first, second, … call at site until an opening gets through; returns how many there were. */
static int fail_each(const char *path, bool is_model, enum site site, int error, enum status want) {
    int fds = count_fds();
    for (int n = 1;; n++) {
        struct error e = {0};
        memset(&fault, 0, sizeof fault);
        fault.site = site;
        fault.countdown = n;
        fault.error = error;
        enum status st = open_and_read(path, is_model, &e);
        bool fired = fault.fired;
        memset(&fault, 0, sizeof fault);
        assert_int_equal(count_fds(), fds);
        if (!fired) {
            assert_ok(st, &e);
            return n - 1;
        }
        if (st != want || e.code != st || strlen(e.text) < 10)
            fail_msg("call %d: %s \"%s\", not %s", n, status_name(st), e.text, status_name(want));
    }
}

/* A model of two parts, each with a tensor and an array of each kind. */
static char *save_split(void) {
    char dir[] = "/tmp/moed-test-faults-XXXXXX";
    if (!mkdtemp(dir)) fail_msg("mkdtemp");
    char *first = malloc(sizeof dir + 32);
    for (uint32_t i = 2; i-- > 0;) {
        struct gguf_build b = gguf_build_new();
        gguf_build_u32(&b, "split.no", i);
        gguf_build_u32(&b, "split.count", 2);
        gguf_build_u32(&b, "split.tensors.count", 2);
        gguf_build_array(&b, "strings", GGUF_STRING, 1);
        gguf_put_string(&b.keys, "s", 1);
        gguf_build_array(&b, "ints", GGUF_U32, 1);
        gguf_put_u32(&b.keys, 7);
        gguf_build_tensor(&b, i ? "b" : "a", TENSOR_F32, 4, 0, 0);
        sprintf(first, "%s/m-%05u-of-00002.gguf", dir, i + 1);
        gguf_build_save(&b, first);
        gguf_build_free(&b);
    }
    return first;
}

static void remove_split(char *first) {
    char *slash = strrchr(first, '/');
    unlink(first);
    memcpy(slash, "/m-00002", 8);
    unlink(first);
    *slash = 0;
    rmdir(first);
    free(first);
}

static void test_allocations(void **state) {
    (void)state;
    char *split = save_split();
    /* struct, parts, bytes (grown once), keys, tensors, names, three arrays, order, layers, marks */
    assert_int_equal(fail_each(TINY_MODEL, true, SITE_ALLOC, ENOMEM, ST_NO_MEMORY), 13);
    assert_true(fail_each(split, false, SITE_ALLOC, ENOMEM, ST_NO_MEMORY) > 20);
    remove_split(split);
}

static void test_reads(void **state) {
    (void)state;
    char *split = save_split();
    assert_true(fail_each(TINY_MODEL, true, SITE_PREAD, EIO, ST_IO) >= 1);
    assert_true(fail_each(TINY_MODEL, true, SITE_PREAD, 0, ST_IO) >= 1);
    assert_true(fail_each(QWEN3_VOCAB, false, SITE_PREAD, 0, ST_IO) > 4);
    assert_int_equal(fail_each(split, false, SITE_PREAD, EIO, ST_IO), 3);
    assert_int_equal(fail_each(split, false, SITE_OPEN, EMFILE, ST_IO), 3);
    assert_int_equal(fail_each(split, false, SITE_OPEN, ENOENT, ST_NOT_FOUND), 3);
    assert_int_equal(fail_each(split, false, SITE_FSTAT, EIO, ST_IO), 3);
    remove_split(split);
}

/* Short and interrupted reads are not errors. */
static void test_short_reads(void **state) {
    (void)state;
    struct error e = {0};
    memset(&fault, 0, sizeof fault);
    fault.max_read = 997;
    fault.interrupt = true;
    assert_ok(open_and_read(TINY_MODEL, true, &e), &e);
    assert_true(fault.n_preads > 400);
    memset(&fault, 0, sizeof fault);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_allocations),
        cmocka_unit_test(test_reads),
        cmocka_unit_test(test_short_reads),
    };
    return cmocka_run_group_tests_name("gguf_faults", tests, NULL, NULL);
}
