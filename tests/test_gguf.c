/* gguf: the bundled files as the gguf Python package reads them; the getters; split files; truncations and
 * mutations. test_gguf_malformed.c has the files made wrong by hand. */
#include "moe/arch.h"
#include "moe/gguf.h"
#include "tests/gguf_build.h"
#include "tests/support.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch[] = "/tmp/moed-test-gguf-XXXXXX"; /* a directory of this program's own */

static char *scratch_path(const char *name) {
    char *path = malloc(sizeof scratch + strlen(name) + 1);
    sprintf(path, "%s/%s", scratch, name);
    return path;
}

/* ---- the bundled files -------------------------------------------------------------------------- */

static void test_tiny(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    assert_ok(gguf_open(TINY_MODEL, false, &e, &g), &e);
    assert_int_equal(gguf_n_tensors(g), 75);
    const struct gguf_tensor *t = gguf_tensor_find(g, "blk.0.attn_output.weight");
    assert_non_null(t);
    assert_int_equal(t->type, TENSOR_Q4_K);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->ne[0], 512);
    assert_int_equal(t->ne[1], 256);
    assert_int_equal(t->ne[2], 1);
    assert_int_equal(t->ne[3], 1);
    assert_int_equal(t->offset, 3190720);
    assert_int_equal(t->n_bytes, 73728);
    assert_int_equal(t->file, 0);
    assert_null(gguf_tensor_find(g, "blk.0.attn_output.weigh"));
    assert_null(gguf_tensor_find(g, ""));
    uint64_t sum = 0;
    for (size_t i = 0; i < 75; i++) {
        const struct gguf_tensor *at = gguf_tensor_at(g, i);
        assert_ptr_equal(gguf_tensor_find(g, at->name), at);
        sum += at->n_bytes;
    }
    assert_int_equal(gguf_tensor_bytes(g), sum);
    size_t n;
    uint8_t *file = test_read_file(TINY_MODEL, &n), *got = malloc(t->n_bytes);
    assert_int_equal(gguf_tensor_read(g, t, 0, got, t->n_bytes), ST_OK);
    assert_memory_equal(got, file + t->offset, t->n_bytes);
    assert_int_equal(gguf_tensor_read(g, t, 100, got, 1000), ST_OK);
    assert_memory_equal(got, file + t->offset + 100, 1000);
    assert_int_equal(gguf_tensor_read(g, t, t->n_bytes, got, 0), ST_OK);
    free(got);
    free(file);
    gguf_close(g);
    gguf_close(NULL);
}

static void test_vocab(void **state) {
    (void)state;
    struct error e = {0};
    struct gguf *g;
    const struct bytes *tokens;
    const int32_t *types;
    size_t n;
    int64_t eos;
    bool bos = true;
    assert_ok(gguf_open(QWEN3_VOCAB, true, &e, &g), &e);
    assert_ok(gguf_string_array(g, "tokenizer.ggml.tokens", &e, &tokens, &n), &e);
    assert_int_equal(n, 151936);
    assert_int_equal(tokens[151645].n, 10);
    assert_memory_equal(tokens[151645].p, "<|im_end|>", 10);
    assert_ok(gguf_int_array(g, "tokenizer.ggml.token_type", &e, &types, &n), &e);
    assert_int_equal(n, 151936);
    assert_int_equal(types[0], 1);
    assert_int_equal(types[151645], 3);
    assert_ok(gguf_get_int(g, "tokenizer.ggml.eos_token_id", 0, 151935, &e, &eos), &e);
    assert_int_equal(eos, 151645);
    assert_ok(gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &e, &bos), &e);
    assert_false(bos);
    assert_int_equal(gguf_n_tensors(g), 0);
    gguf_close(g);
}

/* ---- getters ------------------------------------------------------------------------------------ */

static struct gguf *open_built(struct gguf_build *b) {
    struct error e = {0};
    struct gguf *g;
    char *path = scratch_path("built.gguf");
    gguf_build_save(b, path);
    assert_ok(gguf_open(path, false, &e, &g), &e);
    gguf_build_free(b);
    free(path);
    return g;
}

static void build_int(struct gguf_build *b, const char *key, enum gguf_type type, uint64_t v) {
    static const size_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    gguf_build_key(b, key, type);
    gguf_put(&b->keys, &v, bytes[type]);
}

static void check_int(const struct gguf *g, const char *key, int64_t want) {
    struct error e = {0};
    int64_t v = 0;
    assert_ok(gguf_get_int(g, key, INT64_MIN, INT64_MAX, &e, &v), &e);
    assert_true(v == want);
    assert_ok(gguf_get_int(g, key, want, want, &e, &v), &e);
    if (want < INT64_MAX) {
        assert_int_equal(gguf_get_int(g, key, want + 1, INT64_MAX, &e, &v), ST_CORRUPT);
        assert_non_null(strstr(e.text, key));
    }
    if (want > INT64_MIN)
        assert_int_equal(gguf_get_int(g, key, INT64_MIN, want - 1, &e, &v), ST_CORRUPT);
}

static void test_int_getter(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    build_int(&b, "u8", GGUF_U8, 200);
    build_int(&b, "i8", GGUF_I8, (uint64_t)-100);
    build_int(&b, "u16", GGUF_U16, 60000);
    build_int(&b, "i16", GGUF_I16, (uint64_t)-30000);
    build_int(&b, "u32", GGUF_U32, 4000000000u);
    build_int(&b, "i32", GGUF_I32, (uint64_t)-2000000000);
    build_int(&b, "u64", GGUF_U64, INT64_MAX);
    build_int(&b, "i64", GGUF_I64, (uint64_t)INT64_MIN);
    build_int(&b, "huge", GGUF_U64, (uint64_t)INT64_MAX + 1);
    gguf_build_f32(&b, "float", 3);
    gguf_build_array(&b, "array", GGUF_U32, 0);
    struct gguf *g = open_built(&b);
    check_int(g, "u8", 200);
    check_int(g, "i8", -100);
    check_int(g, "u16", 60000);
    check_int(g, "i16", -30000);
    check_int(g, "u32", 4000000000);
    check_int(g, "i32", -2000000000);
    check_int(g, "u64", INT64_MAX);
    check_int(g, "i64", INT64_MIN);
    struct error e = {0};
    int64_t v;
    assert_int_equal(gguf_get_int(g, "huge", INT64_MIN, INT64_MAX, &e, &v), ST_CORRUPT);
    assert_int_equal(gguf_get_int(g, "float", 0, 9, &e, &v), ST_CORRUPT);
    assert_string_equal(e.text, "key float is of type f32, not an integer");
    assert_int_equal(gguf_get_int(g, "array", 0, 9, &e, &v), ST_CORRUPT);
    assert_string_equal(e.text, "key array is an array of u32, not an integer");
    assert_int_equal(gguf_get_int(g, "absent", 0, 9, &e, &v), ST_NOT_FOUND);
    assert_string_equal(e.text, "the file has no key absent");
    assert_int_equal(e.code, ST_NOT_FOUND);
    assert_int_equal(gguf_get_int(g, "absent", 0, 9, NULL, &v), ST_NOT_FOUND);
    assert_true(gguf_has(g, "u8"));
    assert_false(gguf_has(g, "u"));
    assert_false(gguf_has(g, "u88"));
    gguf_close(g);
}

static void test_other_getters(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    double d = 0.1, inf = INFINITY;
    gguf_build_f32(&b, "f32", 2.5f);
    gguf_build_key(&b, "f64", GGUF_F64);
    gguf_put(&b.keys, &d, sizeof d);
    gguf_build_key(&b, "inf", GGUF_F64);
    gguf_put(&b.keys, &inf, sizeof inf);
    gguf_build_f32(&b, "nan", NAN);
    build_int(&b, "true", GGUF_BOOL, 1);
    build_int(&b, "false", GGUF_BOOL, 0);
    build_int(&b, "two", GGUF_BOOL, 2);
    gguf_build_key(&b, "string", GGUF_STRING);
    gguf_put_string(&b.keys, "a\0b", 3);
    gguf_build_string(&b, "empty", "");
    struct gguf *g = open_built(&b);
    struct error e = {0};
    double v;
    bool flag;
    struct bytes s;
    assert_ok(gguf_get_float(g, "f32", 0, 3, &e, &v), &e);
    assert_true(v == 2.5);
    assert_ok(gguf_get_float(g, "f64", 0, 3, &e, &v), &e);
    assert_true(v == 0.1);
    assert_int_equal(gguf_get_float(g, "f32", 0, 2, &e, &v), ST_CORRUPT);
    assert_string_equal(e.text, "key f32 is 2.5, outside 0 to 2");
    assert_int_equal(gguf_get_float(g, "f32", 3, 4, &e, &v), ST_CORRUPT);
    assert_int_equal(gguf_get_float(g, "inf", 0, INFINITY, &e, &v), ST_CORRUPT);
    assert_int_equal(gguf_get_float(g, "nan", 0, 1, &e, &v), ST_CORRUPT);
    assert_int_equal(gguf_get_float(g, "true", 0, 1, &e, &v), ST_CORRUPT);
    assert_int_equal(gguf_get_float(g, "absent", 0, 1, &e, &v), ST_NOT_FOUND);
    assert_ok(gguf_get_bool(g, "true", &e, &flag), &e);
    assert_true(flag);
    assert_ok(gguf_get_bool(g, "false", &e, &flag), &e);
    assert_false(flag);
    assert_int_equal(gguf_get_bool(g, "two", &e, &flag), ST_CORRUPT);
    assert_int_equal(gguf_get_bool(g, "f32", &e, &flag), ST_CORRUPT);
    assert_ok(gguf_get_string(g, "string", &e, &s), &e);
    assert_int_equal(s.n, 3);
    assert_memory_equal(s.p, "a\0b", 3);
    assert_ok(gguf_get_string(g, "empty", &e, &s), &e);
    assert_int_equal(s.n, 0);
    assert_int_equal(gguf_get_string(g, "f64", &e, &s), ST_CORRUPT);
    gguf_close(g);
}

static void test_array_getters(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    gguf_build_array(&b, "strings", GGUF_STRING, 3);
    gguf_put_string(&b.keys, "one", 3);
    gguf_put_string(&b.keys, "", 0);
    gguf_put_string(&b.keys, "three", 5);
    gguf_build_array(&b, "i16", GGUF_I16, 2);
    int16_t i16[2] = {-7, 8};
    gguf_put(&b.keys, i16, sizeof i16);
    gguf_build_array(&b, "u32", GGUF_U32, 2);
    gguf_put_u32(&b.keys, 1);
    gguf_put_u32(&b.keys, 0x80000000u); /* does not fit */
    gguf_build_array(&b, "f32", GGUF_F32, 1);
    gguf_put_u32(&b.keys, 0);
    gguf_build_array(&b, "none", GGUF_U8, 0);
    struct gguf *g = open_built(&b);
    struct error e = {0};
    const struct bytes *strings;
    const int32_t *ints;
    size_t n;
    assert_ok(gguf_string_array(g, "strings", &e, &strings, &n), &e);
    assert_int_equal(n, 3);
    assert_int_equal(strings[0].n, 3);
    assert_memory_equal(strings[0].p, "one", 3);
    assert_int_equal(strings[1].n, 0);
    assert_int_equal(strings[2].n, 5);
    assert_memory_equal(strings[2].p, "three", 5);
    assert_ok(gguf_int_array(g, "i16", &e, &ints, &n), &e);
    assert_int_equal(n, 2);
    assert_int_equal(ints[0], -7);
    assert_int_equal(ints[1], 8);
    assert_int_equal(gguf_int_array(g, "u32", &e, &ints, &n), ST_CORRUPT);
    assert_string_equal(e.text, "key u32 has an element that does not fit 32 bits");
    assert_int_equal(gguf_int_array(g, "f32", &e, &ints, &n), ST_CORRUPT);
    assert_int_equal(gguf_int_array(g, "strings", &e, &ints, &n), ST_CORRUPT);
    assert_int_equal(gguf_string_array(g, "i16", &e, &strings, &n), ST_CORRUPT);
    assert_ok(gguf_int_array(g, "none", &e, &ints, &n), &e);
    assert_int_equal(n, 0);
    assert_int_equal(gguf_string_array(g, "absent", &e, &strings, &n), ST_NOT_FOUND);
    gguf_close(g);
}

/* A file that loses its end after opening: reads of what is gone fail, reads of the rest do not. */
static void test_shrinking_file(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    gguf_build_tensor(&b, "a", TENSOR_F32, 1024, 0, 0);
    struct gguf *g = open_built(&b);
    const struct gguf_tensor *t = gguf_tensor_at(g, 0);
    char *path = scratch_path("built.gguf");
    assert_int_equal(truncate(path, (off_t)t->offset + 2000), 0);
    uint8_t dst[4096];
    assert_int_equal(gguf_tensor_read(g, t, 0, dst, 2000), ST_OK);
    assert_int_equal(gguf_tensor_read(g, t, 0, dst, 2001), ST_IO);
    assert_int_equal(gguf_tensor_read(g, t, 4000, dst, 96), ST_IO);
    gguf_close(g);
    free(path);
}

/* ---- split files -------------------------------------------------------------------------------- */

struct part_spec {
    int no, count, n_tensors;
    const char *tensors[3];
};

static char *part_path(int no, int count) {
    char name[64];
    snprintf(name, sizeof name, "split-%05d-of-%05d.gguf", no + 1, count);
    return scratch_path(name);
}

static void save_part(int file_no, int file_count, const struct part_spec *s) {
    struct gguf_build b = gguf_build_new();
    if (file_no == 0) gguf_build_string(&b, "general.name", "first part");
    gguf_build_key(&b, "split.no", GGUF_U16);
    gguf_put(&b.keys, &s->no, 2);
    gguf_build_key(&b, "split.count", GGUF_U16);
    gguf_put(&b.keys, &s->count, 2);
    gguf_build_key(&b, "split.tensors.count", GGUF_I32);
    gguf_put(&b.keys, &s->n_tensors, 4);
    /* Data begins a little later in each part, and tensors are long: offsets of different parts cross. */
    char pad[200] = "";
    memset(pad, 'x', 60 * (size_t)file_no);
    gguf_build_string(&b, "pad", pad);
    for (int i = 0; i < 3 && s->tensors[i]; i++)
        gguf_build_tensor(&b, s->tensors[i], TENSOR_F32, 1000 + i, 0, 0);
    char *path = part_path(file_no, file_count);
    gguf_build_save(&b, path);
    free(path);
    gguf_build_free(&b);
}

static const struct part_spec good_parts[3] = {
    {0, 3, 5, {"a", "b"}}, {1, 3, 5, {"c"}}, {2, 3, 5, {"d", "e"}}};

static void save_parts(void) {
    for (int i = 0; i < 3; i++) save_part(i, 3, &good_parts[i]);
}

static void test_split(void **state) {
    (void)state;
    save_parts();
    for (int named = 0; named < 3; named++) {
        char *path = part_path(named, 3);
        struct error e = {0};
        struct gguf *g;
        struct bytes s;
        assert_ok(gguf_open(path, false, &e, &g), &e);
        assert_int_equal(gguf_n_tensors(g), 5);
        assert_ok(gguf_get_string(g, "general.name", &e, &s), &e);
        static const char *const names[] = {"a", "b", "c", "d", "e"};
        static const int files[] = {0, 0, 1, 2, 2};
        for (size_t i = 0; i < 5; i++) {
            const struct gguf_tensor *t = gguf_tensor_find(g, names[i]);
            assert_non_null(t);
            assert_int_equal(t->file, files[i]);
            assert_ptr_equal(t, gguf_tensor_at(g, i));
            uint8_t dst[4096];
            assert_int_equal(t->n_bytes, i == 1 || i == 4 ? 4004 : 4000);
            assert_int_equal(gguf_tensor_read(g, t, 0, dst, t->n_bytes), ST_OK);
        }
        gguf_close(g);
        /* Metadata alone is in the first part, whichever is named. */
        assert_ok(gguf_open(path, true, &e, &g), &e);
        assert_ok(gguf_get_string(g, "general.name", &e, &s), &e);
        assert_int_equal(gguf_n_tensors(g), 2);
        gguf_close(g);
        free(path);
    }
}

static void test_split_malformed(void **state) {
    (void)state;
    static const struct {
        int file;
        struct part_spec spec;
        const char *words; /* when part 1 is named */
    } cases[] = {
        {1,
         {2, 3, 5, {"c"}},
         "split-00002-of-00003.gguf: says it is part 3 of 3 with 5 tensors in all"},
        {1, {1, 4, 5, {"c"}}, "says it is part 2 of 4"},
        {1, {1, 3, 6, {"c"}}, "with 6 tensors in all"},
        {1, {3, 3, 5, {"c"}}, "key split.no is 3, outside 0 to 2"},
        {1, {0, 1, 5, {"c"}}, "says it is part 1 of 1"},
        {1, {1, 3, -1, {"c"}}, "key split.tensors.count is -1"},
        {1, {1, 3, 5, {"c", "x"}}, "the parts hold 6 tensors, not 5"},
        {1, {1, 3, 5, {NULL}}, "the parts hold 4 tensors, not 5"},
        {2, {2, 3, 5, {"d", "a"}}, "tensor a appears twice"},
        {0, {0, 600, 5, {"a", "b"}}, "key split.count is 600, outside 0 to 512"},
        {0, {1, 3, 5, {"a", "b"}}, "its name must end in -00002-of-00003.gguf"},
    };
    char *first = part_path(0, 3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        save_parts();
        save_part(cases[i].file, 3, &cases[i].spec);
        gguf_expect_open(first, false, ST_CORRUPT, cases[i].words);
    }
    save_parts();
    char *second = part_path(1, 3);
    unlink(second);
    gguf_expect_open(first, false, ST_NOT_FOUND, "part 2 of 3 is missing: ");
    gguf_expect_open(first, true, ST_OK, "");
    save_parts();
    char *renamed = scratch_path("renamed.gguf");
    assert_int_equal(rename(second, renamed), 0);
    gguf_expect_open(renamed, false, ST_CORRUPT, "renamed.gguf: the file says it is part 2 of 3");
    /* count 1 is a file in one piece under any name */
    save_part(0, 1, &(struct part_spec){0, 1, 2, {"a", "b"}});
    char *whole = part_path(0, 1);
    assert_int_equal(rename(whole, renamed), 0);
    gguf_expect_open(renamed, false, ST_OK, "");
    free(whole);
    free(renamed);
    free(second);
    free(first);
}

/* ---- truncation and mutation -------------------------------------------------------------------- */

/* Open, read the architecture, touch every tensor's first bytes. Any outcome but a crash or a failure
 * without a sentence is right. Returns what gguf_open said. */
static enum status try_open(const char *path) {
    struct error e = {0};
    struct gguf *g;
    enum status st = gguf_open(path, false, &e, &g);
    if (st == ST_OK) {
        struct arch_model m;
        enum status arch_st = arch_read(g, &e, &m);
        if (arch_st == ST_OK)
            arch_free(&m);
        else if (e.code != arch_st || !e.text[0])
            fail_msg("arch_read: no sentence");
    } else if (e.code != st || !e.text[0]) {
        fail_msg("gguf_open: no sentence");
    }
    for (const char *c = e.text; *c; c++)
        if ((unsigned char)*c < 0x20) fail_msg("a control character in \"%s\"", e.text);
    assert_true(st == ST_OK || st == ST_CORRUPT || st == ST_UNSUPPORTED || st == ST_NOT_FOUND);
    gguf_close(g);
    return st;
}

/* Where the bundled model's tensor data begins. */
static size_t tiny_data_at(void) {
    struct gguf *g;
    struct error e = {0};
    assert_ok(gguf_open(TINY_MODEL, false, &e, &g), &e);
    size_t at = SIZE_MAX;
    for (size_t i = 0; i < gguf_n_tensors(g); i++)
        if (gguf_tensor_at(g, i)->offset < at) at = (size_t)gguf_tensor_at(g, i)->offset;
    gguf_close(g);
    return at;
}

static void test_truncation(void **state) {
    (void)state;
    size_t size, data_at = tiny_data_at();
    uint8_t *tiny = test_read_file(TINY_MODEL, &size);
    char *path = scratch_path("cut.gguf");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    for (size_t n = 0; n < data_at;) {
        assert_int_equal(try_open(path), ST_CORRUPT);
        size_t step = n + 1024 < data_at ? 1024 : data_at - n;
        assert_int_equal(pwrite(fd, tiny + n, step, (off_t)n), step);
        n += step;
    }
    for (size_t n = data_at; n < size;
         n += 1 << 20) { /* the data itself is not looked at: a hole will do */
        assert_int_equal(ftruncate(fd, (off_t)n), 0);
        assert_int_equal(try_open(path), ST_CORRUPT);
    }
    assert_int_equal(ftruncate(fd, (off_t)size - 1), 0);
    assert_int_equal(try_open(path), ST_CORRUPT);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    assert_int_equal(try_open(path), ST_OK);
    close(fd);
    free(path);
    free(tiny);
}

/* Every byte of the small keys and of the tensor infos, a sample of the arrays: one byte changed to
 * something else, opened, put back. */
static void test_mutation(void **state) {
    (void)state;
    size_t size, data_at = tiny_data_at(), n_refused = 0, n_tried = 0;
    uint8_t *tiny = test_read_file(TINY_MODEL, &size);
    char *path = scratch_path("mutant.gguf");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_int_equal(pwrite(fd, tiny, data_at, 0), data_at);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    uint64_t seed = 1;
    for (size_t at = 0; at < data_at;) {
        static const uint8_t flips[] = {0x01, 0x80, 0xFF};
        uint8_t byte = (uint8_t)(tiny[at] ^ flips[test_random(&seed) % 3]);
        assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
        n_refused += try_open(path) != ST_OK;
        n_tried++;
        assert_int_equal(pwrite(fd, &tiny[at], 1, (off_t)at), 1);
        bool dense = at < 1200 || at > data_at - 2400;
        at += dense ? 1 : 1 + test_random(&seed) % 600;
    }
    assert_int_equal(try_open(path), ST_OK);
    assert_true(n_tried > 4000);
    assert_true(n_refused > 1000);
    close(fd);
    free(path);
    free(tiny);
}

static int make_scratch(void **state) {
    (void)state;
    return mkdtemp(scratch) ? 0 : -1;
}

static int remove_scratch(void **state) {
    (void)state;
    static const char *const names[] = {"built.gguf",
                                        "case.gguf",
                                        "fifo",
                                        "renamed.gguf",
                                        "cut.gguf",
                                        "mutant.gguf",
                                        "split-00001-of-00003.gguf",
                                        "split-00002-of-00003.gguf",
                                        "split-00003-of-00003.gguf"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = scratch_path(names[i]);
        unlink(path);
        free(path);
    }
    return rmdir(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny),          cmocka_unit_test(test_vocab),
        cmocka_unit_test(test_int_getter),    cmocka_unit_test(test_other_getters),
        cmocka_unit_test(test_array_getters), cmocka_unit_test(test_shrinking_file),
        cmocka_unit_test(test_split),         cmocka_unit_test(test_split_malformed),
        cmocka_unit_test(test_truncation),    cmocka_unit_test(test_mutation),
    };
    return cmocka_run_group_tests_name("gguf", tests, make_scratch, remove_scratch);
}
