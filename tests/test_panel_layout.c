/* panel_layout: the GPU's weight layout, without a GPU: packing loses nothing, whatever the type, and every byte of a
 * panel is written. */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/panel.h"
#include "moe/quant.h"

static const struct {
    enum tensor_type type;
    int source;
} types[] = {
    {TENSOR_Q4_K, SOURCE_Q4_K}, {TENSOR_Q5_K, SOURCE_Q5_K}, {TENSOR_Q6_K, SOURCE_Q6_K},
    {TENSOR_Q8_0, SOURCE_Q8_0}, {TENSOR_F16, SOURCE_F16},   {TENSOR_BF16, SOURCE_BF16},
    {TENSOR_F32, SOURCE_F32},
};
enum { N_TYPES = sizeof types / sizeof *types };

static void pack(int source, const uint8_t *src, int n_rows, uint8_t *panel) {
    size_t stride = (size_t)source_bytes(source);
    for (int r = 0; r < n_rows; r++) panel_pack_header(source, src + (size_t)r * stride, r, panel);
    for (int u = 0; u < PANEL_UNITS; u++)
        for (int lane = 0; lane < PANEL_LANES; lane++)
            panel_pack_lane(source, src, stride, n_rows, u, lane, panel);
}

/* Random file bytes; float types get finite values that f16 holds. */
static void random_rows(uint64_t *rng, enum tensor_type type, uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)test_random(rng);
    size_t size = type == TENSOR_F32 ? 4 : type == TENSOR_F16 || type == TENSOR_BF16 ? 2 : 0;
    for (size_t i = 0; size && i < n; i += size) {
        float f = (float)(int)(test_random(rng) % 255 - 127) / 64.0f;
        uint16_t h = f32_to_f16(f);
        if (type == TENSOR_F32) memcpy(p + i, &f, 4);
        else if (type == TENSOR_F16) memcpy(p + i, &h, 2);
        else memcpy(p + i, (const uint8_t *)&f + 2, 2);
    }
}

static void test_round_trip(void **state) {
    (void)state;
    uint64_t rng = 3;
    for (int t = 0; t < N_TYPES; t++) {
        int source = types[t].source, type = panel_of_source(source);
        size_t stride = (size_t)source_bytes(source), tensor;
        assert_true(tensor_type_bytes(types[t].type, PANEL_K, &tensor));
        assert_int_equal(tensor, stride);
        uint8_t *src = malloc(PANEL_ROWS * stride);
        static uint8_t panel[2][8192];
        assert_true(panel_bytes(type) <= 8192 && panel_bytes(type) % 16 == 0);
        for (int round = 0; round < 8; round++) {
            random_rows(&rng, types[t].type, src, PANEL_ROWS * stride);
            for (int i = 0; i < 2; i++) { /* what is left of either filling was not written */
                memset(panel[i], i ? 0xff : 0, sizeof panel[i]);
                pack(source, src, PANEL_ROWS, panel[i]);
            }
            assert_memory_equal(panel[0], panel[1], (size_t)panel_bytes(type));
            for (int r = 0; r < PANEL_ROWS; r++) {
                float expected[PANEL_K];
                dequantize(types[t].type, src + (size_t)r * stride, PANEL_K, expected);
                for (int k = 0; k < PANEL_K; k++) {
                    float got = panel_value(type, panel[0], r, k);
                    if (isnan(expected[k])) assert_true(isnan(got));
                    else assert_memory_equal(&got, &expected[k], sizeof got);
                }
            }
        }
        free(src);
    }
}

/* Rows beyond the matrix are zeros, and are not read. */
static void test_missing_rows(void **state) {
    (void)state;
    uint64_t rng = 4;
    for (int t = 0; t < N_TYPES; t++) {
        int source = types[t].source, type = panel_of_source(source);
        size_t stride = (size_t)source_bytes(source);
        uint8_t *src = malloc(5 * stride);
        static uint8_t panel[8192];
        random_rows(&rng, types[t].type, src, 5 * stride);
        memset(panel, 0, sizeof panel);
        pack(source, src, 5, panel);
        for (int r = 5; r < PANEL_ROWS; r++)
            for (int k = 0; k < PANEL_K; k++)
                assert_int_equal(type == PANEL_F16 ? panel_value(type, panel, r, k) != 0.0f
                                                   : panel_quant(type, panel, r, k),
                                 0);
        free(src);
    }
}

/* The place of a weight: every (row, column) has one of its own. */
static void test_places(void **state) {
    (void)state;
    static uint8_t seen[PANEL_UNITS][PANEL_LANES][4][4][2];
    for (int r = 0; r < PANEL_ROWS; r++)
        for (int k = 0; k < PANEL_K; k++) {
            struct panel_at a = panel_find(r, k);
            assert_int_equal(panel_row(a.lane, a.reg), r);
            assert_int_equal(panel_k(a.unit, a.lane, a.step, a.reg, a.half), k);
            assert_int_equal(seen[a.unit][a.lane][a.step][a.reg][a.half]++, 0);
        }
}

/* The matrix's exponent: the largest scale fits f16, with less than one bit to spare where the range allows. */
static void test_exponent(void **state) {
    (void)state;
    for (float d = 1e-7f; d < 300.0f; d *= 1.3f)
        for (int type = PANEL_Q4_K; type <= PANEL_Q6_K; type++) {
            int e = panel_exponent(type, d);
            float most = d * (type == PANEL_Q6_K ? 128.0f : 63.0f) * ldexpf(1.0f, 24 - e);
            assert_in_range(e + 6, 0, 20);
            if (e < 14) assert_true(most < 65504.0f);
            if (e > -6 && e < 14) assert_true(most * 2.0f >= 65504.0f);
        }
    assert_int_equal(panel_exponent(PANEL_Q8_0, 1.0f), 0);
}

static void test_f16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float expected = f16_to_f32((uint16_t)h), got = panel_f16((uint16_t)h);
        if (isnan(expected)) {
            assert_true(isnan(got));
            continue;
        }
        assert_memory_equal(&expected, &got, sizeof got);
        uint32_t bits;
        memcpy(&bits, &got, sizeof bits);
        if (isfinite(got)) assert_int_equal(panel_to_f16(bits), h);
    }
    uint64_t rng = 5;
    for (int i = 0; i < 100000; i++) {
        uint32_t bits = (uint32_t)test_random(&rng);
        float f;
        memcpy(&f, &bits, sizeof f);
        uint16_t h = f32_to_f16(f);
        if (isnan(f)) assert_true(isnan(panel_f16(panel_to_f16(bits))));
        else if (fabsf(f) >= 65504.0f) assert_int_equal(panel_to_f16(bits), f < 0 ? 0xfbff : 0x7bff);
        else assert_int_equal(panel_to_f16(bits), h);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_missing_rows),
        cmocka_unit_test(test_places),     cmocka_unit_test(test_exponent),
        cmocka_unit_test(test_f16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
