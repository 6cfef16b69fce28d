/* quant: dequantisation and half conversion, bit for bit against the gguf Python package's vectors
 * (tests/make_quant_vectors.py), and block arithmetic. */
#include "moe/quant.h"
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TO_F16 = -1 };

static uint32_t read_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static void check_floats(const char *name, const float *got, const uint8_t *want, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float w;
        memcpy(&w, want + 4 * i, sizeof w);
        if (memcmp(&got[i], &w, sizeof w) != 0)
            fail_msg("%s weight %zu: %a, not %a", name, i, (double)got[i], (double)w);
    }
}

static void test_vectors(void **state) {
    (void)state;
    size_t size, n_records = 0;
    uint8_t *file = test_read_file(TEST_DATA "/quant-vectors.bin", &size);
    for (size_t at = 0; at < size; n_records++) {
        int type = (int)read_u32(file + at);
        size_t n_weights = read_u32(file + at + 4), n_bytes = read_u32(file + at + 8);
        const uint8_t *raw = file + at + 12, *want = raw + n_bytes;
        if (type == TO_F16) {
            assert_true(n_weights > 3000);
            for (size_t i = 0; i < n_weights; i++) {
                float f;
                uint16_t h;
                memcpy(&f, raw + 4 * i, sizeof f);
                memcpy(&h, want + 2 * i, sizeof h);
                if (f32_to_f16(f) != h)
                    fail_msg("f32_to_f16(%a): %04x, not %04x", (double)f, f32_to_f16(f), h);
            }
            at += 12 + n_bytes + 2 * n_weights;
            continue;
        }
        size_t bytes;
        assert_true(tensor_type_bytes((enum tensor_type)type, n_weights, &bytes));
        assert_int_equal(bytes, n_bytes);
        float *got = malloc(n_weights * sizeof *got);
        /* One byte off: blocks of a file have no alignment. */
        uint8_t *shifted = malloc(n_bytes + 1);
        memcpy(shifted + 1, raw, n_bytes);
        dequantize((enum tensor_type)type, shifted + 1, n_weights, got);
        check_floats(tensor_type_name((enum tensor_type)type), got, want, n_weights);
        free(shifted);
        free(got);
        at += 12 + n_bytes + 4 * n_weights;
    }
    assert_int_equal(n_records, 8); /* seven types and the conversion */
    free(file);
}

/* Every half: its value by the definition of binary16, and back. */
static void test_every_half(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        int exponent = h >> 10 & 31, mantissa = h & 0x3FF;
        float f = f16_to_f32((uint16_t)h);
        assert_int_equal(!!signbit(f), h >> 15);
        if (exponent == 31 && mantissa) {
            assert_true(isnan(f));
            assert_true(isnan(f16_to_f32(f32_to_f16(f))));
            continue;
        }
        double want = exponent == 31 ? INFINITY
                      : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                     : ldexp(mantissa, -24);
        if (h >> 15) want = -want;
        if ((double)f != want) fail_msg("f16_to_f32(%04x) = %a", h, (double)f);
        assert_int_equal(f32_to_f16(f), h);
    }
    /* A NaN whose payload lies only in the bits that are dropped. */
    uint32_t u = 0x7F800001u;
    float nan_low;
    memcpy(&nan_low, &u, sizeof u);
    assert_true(isnan(f16_to_f32(f32_to_f16(nan_low))));
}

static void test_types(void **state) {
    (void)state;
    static const struct {
        enum tensor_type type;
        const char *name;
        int32_t n_weights, n_bytes;
    } want[] = {{TENSOR_F32, "F32", 1, 4},       {TENSOR_F16, "F16", 1, 2},
                {TENSOR_BF16, "BF16", 1, 2},     {TENSOR_Q8_0, "Q8_0", 32, 34},
                {TENSOR_Q4_K, "Q4_K", 256, 144}, {TENSOR_Q5_K, "Q5_K", 256, 176},
                {TENSOR_Q6_K, "Q6_K", 256, 210}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        int32_t w, b;
        assert_string_equal(tensor_type_name(want[i].type), want[i].name);
        assert_true(tensor_type_block(want[i].type, &w, &b));
        assert_int_equal(w, want[i].n_weights);
        assert_int_equal(b, want[i].n_bytes);
    }
    int32_t w, b;
    size_t n;
    assert_null(tensor_type_name((enum tensor_type)2)); /* Q4_0: a type of ggml, not of ours */
    assert_false(tensor_type_block((enum tensor_type)2, &w, &b));
    assert_false(tensor_type_bytes((enum tensor_type)2, 32, &n));
    assert_true(tensor_type_bytes(TENSOR_Q4_K, 2048 * 768, &n));
    assert_int_equal(n, 2048 * 768 / 256 * 144);
    assert_false(tensor_type_bytes(TENSOR_Q4_K, 255, &n));
    assert_false(tensor_type_bytes(TENSOR_F32, SIZE_MAX / 4 + 1, &n));
    assert_false(tensor_type_bytes(TENSOR_Q8_0, SIZE_MAX - 31, &n));
    assert_true(tensor_type_bytes(TENSOR_Q6_K, 0, &n));
    assert_int_equal(n, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_every_half),
        cmocka_unit_test(test_types),
    };
    return cmocka_run_group_tests_name("quant", tests, NULL, NULL);
}
