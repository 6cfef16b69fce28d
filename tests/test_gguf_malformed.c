/* gguf: one hand-made file per known loader flaw (the CVE numbers are llama.cpp's and Ollama's) and per rule
 * of gguf.h. Each must end in a status and a sentence that names what is wrong. */
#include "moe/gguf.h"
#include "tests/gguf_build.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch[] = "/tmp/moed-test-malformed-XXXXXX"; /* a directory of this program's own */
static char case_path[sizeof scratch + 16], fifo_path[sizeof scratch + 16];

static void expect(struct gguf_build *b, enum status want, const char *words) {
    gguf_build_save(b, case_path);
    gguf_expect_open(case_path, false, want, words);
    gguf_build_free(b);
}

static struct gguf *open_built(struct gguf_build *b) {
    struct error e = {0};
    struct gguf *g;
    gguf_build_save(b, case_path);
    assert_ok(gguf_open(case_path, false, &e, &g), &e);
    gguf_build_free(b);
    return g;
}

static void test_header(void **state) {
    (void)state;
    gguf_expect_open("/nonexistent/model.gguf", false, ST_NOT_FOUND,
                     "/nonexistent/model.gguf: No such file");
    gguf_expect_open(scratch, false, ST_UNSUPPORTED, "not a regular file");
    assert_int_equal(mkfifo(fifo_path, 0600), 0);
    gguf_expect_open(fifo_path, false, ST_UNSUPPORTED, "not a regular file");

    struct gguf_build b = gguf_build_new();
    gguf_build_save(&b, case_path);
    assert_int_equal(truncate(case_path, 0), 0);
    gguf_expect_open(case_path, false, ST_CORRUPT, "the file ends inside the header");
    FILE *f = fopen(case_path, "wb");
    fputs("GGML\3\0\0\0 and something more after it", f);
    fclose(f);
    gguf_expect_open(case_path, false, ST_CORRUPT, "not a GGUF file");

    b.version = 1;
    expect(&b, ST_UNSUPPORTED, "GGUF version 1; convert the model again");
    static const struct {
        uint32_t version;
        const char *words;
    } versions[] = {{0, "GGUF version 0"},
                    {4, "GGUF version 4"},
                    {0x03000000, "big-endian"},
                    {0x02000000, "big-endian"},
                    {0xFFFFFFFF, "GGUF version 4294967295"}};
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        b = gguf_build_new();
        b.version = versions[i].version;
        expect(&b, ST_UNSUPPORTED, versions[i].words);
    }
    b = gguf_build_new();
    b.version = 2;
    expect(&b, ST_OK, "");
}

/* CVE-2024-23605, CVE-2024-21836: n_kv and n_tensors multiplied into an allocation. */
static void test_counts(void **state) {
    (void)state;
    static const uint64_t counts[] = {1,         2,          UINT64_C(1) << 32,  UINT64_C(1) << 58,
                                      INT64_MAX, UINT64_MAX, UINT64_MAX / 72 + 2};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        struct gguf_build b = gguf_build_new();
        b.n_keys = counts[i];
        expect(&b, ST_CORRUPT, "keys, more than the file can hold");
        b = gguf_build_new();
        gguf_build_u32(&b, "a", 1);
        b.n_tensors = counts[i];
        expect(&b, ST_CORRUPT, "tensors, more than the file can hold");
    }
    /* A long file and a large count: the count still has a limit. */
    struct gguf_build b = gguf_build_new();
    b.n_keys = 70000;
    b.data_bytes = 1 << 20;
    expect(&b, ST_UNSUPPORTED, "70000 keys");
    b = gguf_build_new();
    b.n_tensors = 300000;
    b.data_bytes = 10 << 20;
    expect(&b, ST_UNSUPPORTED, "more than 262144 tensors");
    /* No keys and no tensors at all is a GGUF file (CVE-2024-41130: a NULL table was read). */
    b = gguf_build_new();
    expect(&b, ST_OK, "");
}

/* CVE-2024-23496: string length; CVE-2025-49847: a token longer than an int. */
static void test_string_lengths(void **state) {
    (void)state;
    static const uint64_t lengths[] = {4,         1 << 20,    UINT64_C(0x80000001),
                                       INT64_MAX, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct gguf_build b = gguf_build_new();
        gguf_build_key(&b, "s", GGUF_STRING);
        gguf_put_u64(&b.keys, lengths[i]);
        gguf_put(&b.keys, "abc", 3);
        expect(&b, ST_CORRUPT, "the file ends inside key s");

        b = gguf_build_new();
        gguf_build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, 2);
        gguf_put_string(&b.keys, "x", 1);
        gguf_put_u64(&b.keys, lengths[i]);
        gguf_put(&b.keys, "abc", 3);
        expect(&b, ST_CORRUPT, "the file ends inside key tokenizer.ggml.tokens");

        b = gguf_build_new();
        gguf_put_u64(&b.keys, lengths[i] | 32); /* the key's own length, past the end */
        gguf_put(&b.keys, "abcdefghijkl", 12);
        b.n_keys = 1;
        expect(&b, ST_CORRUPT, lengths[i] > 65535 ? "a key of" : "the file ends inside a key");
    }
}

/* CVE-2024-21825: array counts. */
static void test_array_counts(void **state) {
    (void)state;
    static const uint64_t counts[] = {3, UINT64_C(1) << 32, UINT64_C(1) << 61, UINT64_C(1) << 62,
                                      UINT64_MAX};
    static const uint32_t elements[] = {GGUF_U8,  GGUF_I16,  GGUF_F32,
                                        GGUF_U64, GGUF_BOOL, GGUF_STRING};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (size_t k = 0; k < sizeof elements / sizeof *elements; k++) {
            struct gguf_build b = gguf_build_new();
            gguf_build_array(&b, "a", elements[k], counts[i]);
            gguf_put(&b.keys, "\0", 1);
            expect(&b, ST_CORRUPT, "key a claims");
        }
    }
    struct gguf_build b = gguf_build_new();
    gguf_build_array(&b, "a", GGUF_ARRAY, 1);
    gguf_put_u64(&b.keys, 0);
    gguf_put_u64(&b.keys, 0);
    expect(&b, ST_UNSUPPORTED, "key a is an array of arrays");
    b = gguf_build_new();
    gguf_build_array(&b, "a", 13, 1);
    gguf_put_u64(&b.keys, 0);
    expect(&b, ST_CORRUPT, "key a has value type 13");
    b = gguf_build_new();
    gguf_build_key(&b, "k", 0xFFFFFFFF);
    gguf_put_u64(&b.keys, 0);
    expect(&b, ST_CORRUPT, "key k has value type 4294967295");
}

static void test_keys(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    gguf_build_u32(&b, "a.b", 1);
    gguf_build_u32(&b, "a.c", 1);
    gguf_build_f32(&b, "a.b", 1);
    expect(&b, ST_CORRUPT, "key a.b appears twice");
    b = gguf_build_new();
    gguf_build_u32(&b, "", 1);
    expect(&b, ST_CORRUPT, "a key of 0 bytes");
    b = gguf_build_new();
    gguf_build_u32(&b, "a\033[2J", 1);
    expect(&b, ST_CORRUPT, "a key holds byte 0x1b");
    b = gguf_build_new();
    gguf_put_string(&b.keys, "a\0b", 3);
    gguf_put_u64(&b.keys, 0);
    b.n_keys = 1;
    expect(&b, ST_CORRUPT, "a key holds byte 0x00");
    /* A key longer than a message can show is a key all the same. */
    char *key = malloc(65537);
    memset(key, 'k', 65536);
    key[65535] = 0;
    b = gguf_build_new();
    gguf_build_u32(&b, key, 1);
    gguf_build_u32(&b, key, 1);
    expect(&b, ST_CORRUPT, "appears twice");
    key[65535] = 'k';
    key[65536] = 0;
    b = gguf_build_new();
    gguf_build_u32(&b, key, 1);
    expect(&b, ST_CORRUPT, "a key of 65536 bytes");
    free(key);
}

static void test_alignment(void **state) {
    (void)state;
    static const struct {
        uint32_t v;
        const char *words;
    } bad[] = {{0, "outside 8 to 4096"},         {1, "outside 8 to 4096"},
               {4, "outside 8 to 4096"},         {24, "not a power of two"},
               {8192, "outside 8 to 4096"},      {UINT32_C(1) << 31, "outside 8 to 4096"},
               {0xFFFFFFE0, "outside 8 to 4096"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gguf_build b = gguf_build_new();
        gguf_build_u32(&b, "general.alignment", bad[i].v);
        expect(&b, ST_CORRUPT, bad[i].words);
    }
    struct gguf_build b = gguf_build_new();
    gguf_build_string(&b, "general.alignment", "32");
    expect(&b, ST_CORRUPT, "key general.alignment is of type string");
    for (uint32_t a = 8; a <= 4096; a *= 2) {
        b = gguf_build_new();
        b.alignment = a;
        gguf_build_u32(&b, "general.alignment", a);
        gguf_build_tensor(&b, "first", TENSOR_F32, 3, 0, 0);
        gguf_build_tensor(&b, "second", TENSOR_F32, 3, 0, 0);
        struct gguf *g = open_built(&b);
        const struct gguf_tensor *t = gguf_tensor_find(g, "second");
        assert_int_equal(t->offset % a, 0);
        assert_int_equal(t->offset - gguf_tensor_find(g, "first")->offset, (12 + a - 1) / a * a);
        gguf_close(g);
    }
}

static void one_tensor(struct gguf_build *b, uint32_t n_dims, const uint64_t *ne, uint32_t type,
                       uint64_t offset) {
    *b = gguf_build_new();
    b->data_bytes = 4096;
    gguf_build_info(b, "t", n_dims, ne, type, offset);
}

/* CVE-2024-21802 (ne), CVE-2025-53630 and CVE-2026-27940 (sums of sizes), CVE-2026-33298 (a size that wraps),
 * CVE-2026-7482 (a size larger than the file). */
static void test_tensor_sizes(void **state) {
    (void)state;
    const uint64_t e = 1;
    static const struct {
        uint32_t n_dims, type;
        uint64_t ne[4], offset;
        const char *words;
    } bad[] = {
        {0, 0, {8}, 0, "tensor t has 0 dimensions"},
        {0xFFFFFFFF, 0, {8}, 0, "tensor t has 4294967295 dimensions"},
        {1, 0, {0}, 0, "tensor t has an impossible dimension, 0"},
        {3, 0, {8, 0, 8}, 0, "tensor t has an impossible dimension, 0"},
        {1, 0, {UINT64_MAX}, 0, "tensor t has an impossible dimension"},
        {1, 0, {UINT64_C(1) << 63}, 0, "tensor t has an impossible dimension"},
        {2, 0, {UINT64_C(1) << 32, UINT64_C(1) << 32}, 0, "tensor t has an impossible dimension"},
        {4, 0, {1 << 16, 1 << 16, 1 << 16, 1 << 16}, 0, "tensor t has an impossible dimension"},
        {2, 0, {UINT64_C(1) << 62, 2}, 0, "tensor t has an impossible dimension"},
        {2, 0, {3, UINT64_C(0x5555555555555556)}, 0, "tensor t has an impossible dimension"},
        {1, 0, {UINT64_C(1) << 62}, 0, "tensor t is larger than any memory"},
        {2, 0, {UINT64_C(1) << 31, UINT64_C(1) << 31}, 0, "tensor t is larger than any memory"},
        {1, 0, {UINT64_C(1) << 61}, 0, "tensor t lies beyond any file"},
        {1, 0, {(UINT64_C(1) << 60) + 1}, 0, "but the file has"},
        {1, 0, {1025}, 0, "but the file has"},
        {1, 0, {1}, 4096, "but the file has"},
        {1, 0, {1}, UINT64_MAX - 31, "tensor t lies beyond any file"},
        {1, 0, {1}, UINT64_MAX - 1023, "tensor t lies beyond any file"},
        {1, 0, {1}, (UINT64_C(1) << 63) - 32, "tensor t lies beyond any file"},
        {1, 0, {1}, 1, "tensor t is not aligned to 32"},
        {1, 0, {1}, 16, "tensor t is not aligned to 32"},
        {1, TENSOR_Q4_K, {255}, 0, "tensor t has rows of 255 weights"},
        {2, TENSOR_Q6_K, {128, 2}, 0, "tensor t has rows of 128 weights"},
        {1, TENSOR_Q8_0, {33}, 0, "tensor t has rows of 33 weights"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gguf_build b;
        one_tensor(&b, bad[i].n_dims == 0xFFFFFFFF ? 1 : bad[i].n_dims, bad[i].ne, bad[i].type,
                   bad[i].offset);
        if (bad[i].n_dims == 0xFFFFFFFF) memcpy(b.infos.p + 9, &bad[i].n_dims, 4);
        expect(&b, ST_CORRUPT, bad[i].words);
    }
    struct gguf_build b;
    static const uint64_t five[5] = {1, 1, 1, 1, 1};
    one_tensor(&b, 5, five, 0, 0);
    expect(&b, ST_CORRUPT, "tensor t has 5 dimensions");
    one_tensor(&b, 1, &e, 0, 4064);
    expect(&b, ST_OK, "");
    /* Two halves of 2^63 bytes each: either sum alone would wrap. */
    static const uint64_t half = UINT64_C(1) << 60;
    one_tensor(&b, 1, &half, 0, 0);
    gguf_build_info(&b, "u", 1, &half, 0, UINT64_C(1) << 62);
    expect(&b, ST_CORRUPT, "but the file has");
}

static void test_tensor_types(void **state) {
    (void)state;
    static const struct {
        uint32_t type;
        const char *words;
    } bad[] = {{2, "tensor t has type 2 (Q4_0)"},
               {23, "tensor t has type 23 (IQ4_XS)"},
               {4, "tensor t has type 4 (unknown to this build)"},
               {40, "tensor t has type 40 (unknown"},
               {0xFFFFFFFF, "tensor t has type 4294967295 (unknown"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gguf_build b;
        const uint64_t ne = 256;
        one_tensor(&b, 1, &ne, bad[i].type, 0);
        expect(&b, ST_UNSUPPORTED, bad[i].words);
    }
}

static void test_tensor_names(void **state) {
    (void)state;
    struct gguf_build b = gguf_build_new();
    gguf_build_tensor(&b, "a", TENSOR_F32, 1, 0, 0);
    gguf_build_tensor(&b, "b", TENSOR_F32, 1, 0, 0);
    gguf_build_tensor(&b, "a", TENSOR_F32, 1, 0, 0);
    expect(&b, ST_CORRUPT, "tensor a appears twice");
    b = gguf_build_new();
    gguf_build_tensor(&b, "", TENSOR_F32, 1, 0, 0);
    expect(&b, ST_CORRUPT, "a tensor name of 0 bytes");
    char name[66];
    memset(name, 'n', 65);
    name[65] = 0;
    b = gguf_build_new();
    gguf_build_tensor(&b, name, TENSOR_F32, 1, 0, 0);
    expect(&b, ST_CORRUPT, "a tensor name of 65 bytes");
    name[64] = 0;
    b = gguf_build_new();
    gguf_build_tensor(&b, name, TENSOR_F32, 1, 0, 0);
    struct gguf *g = open_built(&b);
    assert_string_equal(gguf_tensor_at(g, 0)->name, name);
    gguf_close(g);
    b = gguf_build_new();
    gguf_build_tensor(&b, "a\nb", TENSOR_F32, 1, 0, 0);
    expect(&b, ST_CORRUPT, "a tensor name holds byte 0x0a");
    b = gguf_build_new();
    gguf_build_tensor(&b, "a\xff", TENSOR_F32, 1, 0, 0);
    expect(&b, ST_CORRUPT, "a tensor name holds byte 0xff");
}

static void test_overlap(void **state) {
    (void)state;
    const uint64_t ne[2] = {16, 24}; /* 64 and 96 bytes */
    static const struct {
        uint64_t a, b;
        enum status want;
    } cases[] = {{0, 0, ST_CORRUPT},   {0, 32, ST_CORRUPT}, {0, 64, ST_OK},
                 {32, 0, ST_CORRUPT},  {64, 0, ST_CORRUPT}, {96, 0, ST_OK},
                 {128, 64, ST_CORRUPT}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf_build b = gguf_build_new();
        b.data_bytes = 4096;
        gguf_build_info(&b, "a", 1, &ne[0], 0, cases[i].a);
        gguf_build_info(&b, "b", 1, &ne[1], 0, cases[i].b);
        expect(&b, cases[i].want, cases[i].want == ST_OK ? "" : "overlap");
    }
    /* Many tensors in falling order, then one that lies across a neighbour. */
    const uint64_t one = 8;
    for (int bad = 0; bad < 2; bad++) {
        struct gguf_build b = gguf_build_new();
        b.data_bytes = 32 * 20000;
        for (uint64_t i = 20000; i-- > 0;) {
            char name[32];
            snprintf(name, sizeof name, "t%d", (int)i);
            gguf_build_info(&b, name, 1, bad && i == 9999 ? &ne[0] : &one, 0, 32 * i);
        }
        expect(&b, bad ? ST_CORRUPT : ST_OK, bad ? "tensors t9999 and t10000 overlap" : "");
    }
}

/* A vocabulary file may carry tensor infos without their data. */
static void test_metadata_only(void **state) {
    (void)state;
    struct gguf_build b;
    const uint64_t ne = 1 << 20;
    one_tensor(&b, 1, &ne, 0, 0);
    gguf_build_save(&b, case_path);
    gguf_build_free(&b);
    gguf_expect_open(case_path, true, ST_OK, "");
    gguf_expect_open(case_path, false, ST_CORRUPT, "tensor t ends at byte");
    const uint64_t far[1] = {UINT64_C(1) << 61};
    one_tensor(&b, 1, far, 0, 0);
    gguf_build_save(&b, case_path);
    gguf_build_free(&b);
    gguf_expect_open(case_path, true, ST_CORRUPT, "tensor t lies beyond any file");
}

static int make_scratch(void **state) {
    (void)state;
    if (!mkdtemp(scratch)) return -1;
    snprintf(case_path, sizeof case_path, "%s/case.gguf", scratch);
    snprintf(fifo_path, sizeof fifo_path, "%s/fifo", scratch);
    return 0;
}

static int remove_scratch(void **state) {
    (void)state;
    unlink(case_path);
    unlink(fifo_path);
    return rmdir(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_header),         cmocka_unit_test(test_counts),
        cmocka_unit_test(test_string_lengths), cmocka_unit_test(test_array_counts),
        cmocka_unit_test(test_keys),           cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_tensor_sizes),   cmocka_unit_test(test_tensor_types),
        cmocka_unit_test(test_tensor_names),   cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_metadata_only),
    };
    return cmocka_run_group_tests_name("gguf_malformed", tests, make_scratch, remove_scratch);
}
