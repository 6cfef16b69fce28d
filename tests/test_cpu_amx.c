/* cpu amx: AMX's products, by the processor where it has AMX and emulated everywhere, against float64 on the same
 * numbers. Where both exist they agree bit for bit. */
#include "tests/amx_emulated.h"
#include "tests/cpu_rig.h"

enum { MAX_ISAS = 2 };
static const struct cpu_kernels *isas[MAX_ISAS];
static int n_isas;

static double bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += 0x7fff + (bits >> 16 & 1);
    return (double)bf16_to_f32((uint16_t)(bits >> 16));
}

/* Half the range of a format's integers if it has minima, or 0. */
static int half_range(enum cpu_format format) {
    return format == CPU_Q4_K ? 8 : format == CPU_Q5_K ? 16 : 0;
}

/* Each weight as the kernel sees it, found by products with one 1 among zeros. Q6_K and Q8_0 are rounded to 8 bits, so off by
 * 2^-8 at most. Of Q4_K and Q5_K that is done to scale times integer less half its range, which is up to 504 or 1,008 and
 * so off by 1 or 2, times a d of up to 1/64. float32 rounds a product of up to 96 steps of a scale below 1. */
static float *seen_weights(const struct cpu_kernels *k, const struct matrix *x) {
    int32_t n = x->m.n_cols, n_rows = x->m.n_tiles * CPU_ROWS;
    float *seen = malloc((size_t)n * (size_t)n_rows * sizeof *seen), out[CPU_TILE * CPU_ROWS];
    float *in = calloc((size_t)n, sizeof *in);
    uint8_t *tile = aligned_alloc(64, CPU_TILE * cpu_row_bytes(k, n, 1));
    for (int32_t c = 0; c < n; c += CPU_TILE) {
        int width = n - c < CPU_TILE ? (int)(n - c) : CPU_TILE;
        for (int t = 0; t < width; t++) {
            in[c + t] = 1;
            k->quantize(in, n, 1, tile, t, width);
            in[c + t] = 0;
        }
        for (int32_t rt = 0; rt < x->m.n_tiles; rt++) {
            run_dot(k->dot[x->m.format][0][width], &x->m, rt, tile, width, out);
            for (int i = 0; i < width * CPU_ROWS; i++) {
                int32_t row = rt * CPU_ROWS + i % CPU_ROWS, col = c + i / CPU_ROWS;
                float want = row < x->m.n_rows ? x->w[row * n + col] : 0, w = out[i];
                seen[row * n + col] = w;
                float off = (float)half_range(x->m.format) / 8 / 64;
                if (off == 0) off = 0x1p-8f * fabsf(want);
                assert_true(fabsf(w - want) <= off + 96 * (float)U);
            }
        }
    }
    free(in);
    free(tile);
    return seen;
}

/* Every width. A sum is of up to 16 fused products, twice, then one term per block of 32. With minima its terms are up to 2
 * half ranges and a minimum of below 1 larger than what they leave together; what meets a sum of 32 values in two parts of
 * 8 bits, half a range and the minimum, is off by 2^-17. */
static void check_products(const struct cpu_kernels *k, const struct matrix *x, const float *seen,
                           const float *in) {
    int32_t n_cols = x->m.n_cols;
    uint8_t *tile = aligned_alloc(64, CPU_TILE * cpu_row_bytes(k, n_cols, 2));
    float out[CPU_TILE * CPU_ROWS];
    for (int n = 1; n <= CPU_TILE; n++) {
        for (int t = 0; t < n; t++)
            k->quantize(in + (size_t)t * (size_t)n_cols, n_cols, 2, tile, t, n);
        for (int32_t row = 0; row < x->m.n_tiles * CPU_ROWS; row++) {
            if (row % CPU_ROWS == 0)
                run_dot(k->dot[x->m.format][1][n], &x->m, row / CPU_ROWS, tile, n, out);
            for (int t = 0; t < n; t++) {
                double y = 0, size = 0, block = 0, values = 0, sums = 0;
                for (int32_t c = 0; c < n_cols; c++) {
                    double w = (double)seen[row * n_cols + c], v = bf16(in[t * n_cols + c]);
                    y += w * v;
                    size += fabs(w * v);
                    block += v;
                    values += fabs(v);
                    if (c % CPU_BLOCK < CPU_BLOCK - 1) continue;
                    sums += fabs(block);
                    block = 0;
                }
                double got = (double)out[t * CPU_ROWS + row % CPU_ROWS];
                int half = half_range(x->m.format);
                double bound =
                    (16 + 6 + n_cols / 32.0) * U * (size + (half ? (2 * half + 1) * values : 0));
                assert_true(fabs(got - y) <= bound + (half ? (half + 1) * 0x1p-17 * sums : 0));
            }
        }
    }
    free(tile);
}

static void test_products(void **state) {
    (void)state;
    uint64_t seed = 21;
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x =
            make_matrix(types[i], 1, 40, types[i] == TENSOR_Q8_0 ? 96 : 768, CPU_BY_ROW, &seed);
        for (int isa = 0; isa < n_isas; isa++) {
            float *seen = seen_weights(isas[isa], &x);
            for (int kind = 0; kind < N_KINDS; kind++) {
                static float in[CPU_TILE * 768];
                fill_input(kind, &seed, CPU_TILE * 768, in);
                check_products(isas[isa], &x, seen, in);
            }
            free(seen);
        }
        free_matrix(&x);
    }
}

/* Rows as such, rows block by block, and columns of tiles are the same; sums are those of the rounded values. */
static void test_rows_and_tiles(void **state) {
    (void)state;
    enum { COLS = 288, WIDTH = 37, BYTES = 2 * COLS + 2 * 64 };
    uint64_t seed = 22;
    for (int isa = 0; isa < n_isas; isa++) {
        const struct cpu_kernels *k = isas[isa];
        static float in[WIDTH][COLS];
        static uint8_t a[CPU_TILE * BYTES], b[CPU_TILE * BYTES];
        static uint8_t rows[WIDTH][BYTES];
        const uint8_t *at[WIDTH];
        assert_int_equal(cpu_row_bytes(k, COLS, 1), BYTES);
        memset(a, 0xee, sizeof a);
        for (int t = 0; t < WIDTH; t++) {
            uint8_t blocks[BYTES] = {0};
            uint16_t h[BYTES / 2];
            at[t] = rows[t];
            fill_input(t % N_KINDS, &seed, COLS, in[t]);
            k->quantize_row(in[t], COLS, 1, rows[t]);
            memcpy(h, rows[t], sizeof h);
            for (int c = 0; c < COLS; c++) assert_true((double)bf16_to_f32(h[c]) == bf16(in[t][c]));
            for (int i = 0; i < COLS / CPU_BLOCK; i++) {
                double sum = 0, size = 0;
                for (int c = CPU_BLOCK * i; c < CPU_BLOCK * (i + 1); c++) {
                    sum += bf16(in[t][c]);
                    size += fabs(bf16(in[t][c]));
                }
                const uint16_t *parts = h + COLS + 32 * (i / 8) + i % 8;
                double got = (double)bf16_to_f32(parts[0]) + (double)bf16_to_f32(parts[8]);
                assert_true(fabs(got - sum) <= 0x1p-17 * fabs(sum) + 6 * U * size);
                k->quantize_block(in[t] + CPU_BLOCK * i, 1, i, COLS, 1, blocks);
            }
            for (int i = 0; i < 64; i++)
                assert_true(i % 32 < (i < 32 ? 16 : 9) || h[COLS + i] == 0);
            assert_memory_equal(rows[t], blocks, BYTES);
            k->quantize(in[t], COLS, 1, a, t, WIDTH);
        }
        k->gather(at, WIDTH, COLS, 1, b);
        for (int t = 0; t < CPU_TILE; t++)
            for (int i = 0; i < BYTES / 4; i++) {
                const uint8_t *p = a + t / 16 * 16 * BYTES + 64 * i + 4 * (t % 16);
                static const uint8_t untouched[4] = {0xee, 0xee, 0xee, 0xee};
                assert_memory_equal(p, t < WIDTH ? rows[t] + 4 * i : untouched, 4);
                if (t < WIDTH) assert_memory_equal(p, b + (p - a), 4);
            }
    }
}

static void test_not_finite(void **state) {
    (void)state;
    uint64_t seed = 23;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 16, 256, CPU_BY_ROW, &seed);
        for (int isa = 0; isa < n_isas; isa++) {
            for (int k = 0; k < 6; k++) {
                float in[256], out[16];
                static uint8_t tile[16 * (256 * 2 + 64)];
                fill_input(0, &seed, 256, in);
                in[17 + 40 * k] = bad[k % 3];
                isas[isa]->quantize(in, 256, 1, tile, 0, 1);
                run_dot(isas[isa]->dot[x.m.format][0][1], &x.m, 0, tile, 1, out);
                for (int r = 0; r < 16; r++) assert_false(isfinite(out[r]));
            }
        }
        free_matrix(&x);
    }
}

/* m = 1 … 100 tokens, cut as the backend cuts them, several row tiles in one call, into rows that lie apart: every
 * token's bits are those it has alone, tile by tile, and nothing is written beside them. */
static void test_width_does_not_matter(void **state) {
    (void)state;
    enum { MOST = 100, COLS = 768, MOST_TILES = 3, STRIDE = MOST_TILES * CPU_ROWS + 3 };
    uint64_t seed = 24;
    static float in[MOST][COLS], alone[MAX_ISAS][MOST][STRIDE], out[CPU_TILE][STRIDE];
    static uint8_t tile[CPU_TILE * (COLS * 2 + 3 * 64)];
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, MOST_TILES * CPU_ROWS, COLS, CPU_BY_ROW, &seed);
        fill_input(1, &seed, MOST * COLS, in[0]);
        for (int isa = 0; isa < n_isas; isa++) {
            const struct cpu_kernels *k = isas[isa];
            for (int t = 0; t < MOST; t++) {
                k->quantize(in[t], COLS, 1, tile, 0, 1);
                for (int rt = 0; rt < MOST_TILES; rt++)
                    run_dot(k->dot[x.m.format][0][1], &x.m, rt, tile, 1,
                            alone[isa][t] + rt * CPU_ROWS);
            }
            for (int m = 1; m <= MOST; m += m < 20 ? 1 : 9) {
                for (int at = 0; at < m;) {
                    int n = cpu_tile_width(k, m - at), n_tiles = m % MOST_TILES + 1;
                    assert_in_range(n, 1, m - at);
                    assert_true(n % CPU_TILE_PAD == 0 || at + n == m);
                    for (int t = 0; t < n; t++) k->quantize(in[at + t], COLS, 1, tile, t, n);
                    memset(out, 0x7b, sizeof out);
                    k->dot[x.m.format][0][n](&(struct cpu_dot){x.m.p, x.m.p, n_tiles, x.m.n_units,
                                                               tile, n, out[0], STRIDE});
                    for (int t = 0; t < CPU_TILE; t++)
                        for (int r = 0; r < STRIDE; r++) {
                            bool mine = t < n && r < n_tiles * CPU_ROWS;
                            uint32_t want = 0x7b7b7b7b;
                            assert_memory_equal(
                                &out[t][r], mine ? (const void *)&alone[isa][at + t][r] : &want, 4);
                        }
                    at += n;
                }
            }
        }
        if (n_isas == 2) assert_memory_equal(alone[0], alone[1], sizeof alone[0]);
        free_matrix(&x);
    }
}

int main(void) {
    const struct {
        const char *name;
        const struct cpu_kernels *kernels;
    } all[MAX_ISAS] = {{"AMX emulated, for want of AVX-512 with VBMI and BF16", amx_emulated()},
                       {"AMX", cpu_kernels_amx()}};
    for (int i = 0; i < MAX_ISAS; i++) {
        if (all[i].kernels) isas[n_isas++] = all[i].kernels;
        printf("[ %s ] %s\n", all[i].kernels ? "testing  " : "NOT TESTED",
               all[i].kernels ? all[i].kernels->name : all[i].name);
    }
    if (n_isas == 0) return NOTHING_TESTED;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_rows_and_tiles),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_width_does_not_matter),
    };
    return cmocka_run_group_tests_name("cpu_amx", tests, NULL, NULL);
}
