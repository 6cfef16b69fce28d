/* cpu amx: AMX's products, by the processor where it has AMX and emulated everywhere, against float64 on the same
 * numbers. Where both exist they agree bit for bit. */
#include "tests/amx_emulated.h"
#include "tests/cpu_rig.h"

enum { MAX_ISAS = 2, MAX_COLS = 768 };
static const struct cpu_kernels *isas[MAX_ISAS];
static int n_isas;

/* A tile, and behind it what products may read but must not heed. */
static uint8_t *new_tile(int32_t n_cols) {
    size_t n = (CPU_TILE + CPU_GROUP) * cpu_x_row_bytes(n_cols, 2);
    uint8_t *tile = aligned_alloc(64, n);
    memset(tile, 0xa5, n);
    return tile;
}

/* ---- quantisation ------------------------------------------------------------------------------------ */

static size_t tile_unit_bytes(int planes, int n) {
    return cpu_x_bytes(n, planes) + (size_t)n * CPU_X_TAIL;
}

static const uint8_t *tail_at(const uint8_t *tile, int planes, int n, int t, int32_t c) {
    return tile + (size_t)(c / QK_K) * tile_unit_bytes(planes, n) + cpu_x_bytes(n, planes) +
           t * CPU_X_TAIL;
}

/* Byte c of a plane of token t of a tile of n. */
static int byte_at(const uint8_t *tile, int planes, int n, int t, int32_t c, int plane) {
    const uint8_t *unit = tile + (size_t)(c / QK_K) * tile_unit_bytes(planes, n);
    const size_t plane_at = (size_t)(plane * cpu_x_group(n) * CPU_STEP);
    return (int8_t)unit[cpu_x_at(n, planes, t, c % QK_K) + plane_at];
}

/* The value in the low plane, which a scale's low bits are not multiplied with. */
static int low_at(const uint8_t *tile, int n, int t, int32_t c) {
    return byte_at(tile, 2, n, t, c, 1);
}

/* Value c, as an integer, and what one step of it is. */
static int value_at(const uint8_t *tile, int planes, int n, int t, int32_t c, float *scale) {
    memcpy(scale, tail_at(tile, planes, n, t, c) + CPU_X_SCALE, sizeof *scale);
    const int high = byte_at(tile, planes, n, t, c, 0);
    if (planes == 1) return high;
    assert_in_range(low_at(tile, n, t, c) + 4, 0, 8);
    return high * (1 << CPU_X_LOW_BITS) + low_at(tile, n, t, c);
}

/* What those low bits make of weight w in row r, column c. */
static double low_weight(const struct cpu_matrix *m, int32_t r, int32_t c, double w) {
    if (m->format != CPU_Q4_K && m->format != CPU_Q5_K) return 0;
    const bool four = m->format == CPU_Q4_K;
    const int lane = r % CPU_ROWS, block = c % QK_K / CPU_BLOCK;
    const uint8_t *unit = cpu_matrix_tile(m, 0, r / CPU_ROWS) +
                          (size_t)(c / QK_K) * (four ? CPU_Q4_K_UNIT : CPU_Q5_K_UNIT);
    const int at = block * CPU_ROWS + lane, scale = unit[(four ? CPU_Q4_K_SC : CPU_Q5_K_SC) + at];
    const int min = unit[(four ? CPU_Q4_K_M : CPU_Q5_K_M) + at];
    uint16_t dmin;
    memcpy(&dmin, unit + (four ? CPU_Q4_K_D : CPU_Q5_K_D) + 32 + 2 * lane, sizeof dmin);
    const int half = four ? 2 : 4, low = (scale + half) % (2 * half) - half;
    return scale ? (w + (double)f16_to_f32(dmin) * min) * low / scale : 0;
}

static int16_t sum_at(const uint8_t *p, int i) {
    int16_t sum;
    memcpy(&sum, p + 2 * i, sizeof sum);
    return sum;
}

/* Half a step and the rounding of scale and reciprocal; the sums are of the integers; what a begun unit lacks is zero. */
static void check_quantize(const struct cpu_kernels *k, int planes, const float *x,
                           int32_t n_cols) {
    const int limit = planes == 2 ? CPU_X_LIMIT_2 : CPU_X_LIMIT_1,
              n_units = (n_cols + QK_K - 1) / QK_K;
    const size_t bytes = cpu_row_bytes(k, n_cols, planes);
    uint8_t *row = aligned_alloc(64, bytes);
    assert_int_equal(bytes, (size_t)n_units * cpu_x_unit_bytes(planes));
    memset(row, 0xaa, bytes);
    k->quantize_row(x, n_cols, planes, row);
    for (int u = 0; u < n_units; u++) {
        const uint8_t *tail = tail_at(row, planes, 1, 0, QK_K * u);
        double max = 0;
        int sums[16] = {0};
        float scale;
        for (int c = QK_K * u; c < QK_K * (u + 1) && c < n_cols; c++)
            max = fmax(max, fabs((double)x[c]));
        for (int c = QK_K * u; c < QK_K * (u + 1); c++) {
            int v = value_at(row, planes, 1, 0, c, &scale);
            double want = c < n_cols ? (double)x[c] : 0;
            assert_in_range(v + limit, 0, 2 * limit);
            assert_true(fabs((double)scale * limit - max) <= 2 * U * max);
            assert_true(fabs(v * (double)scale - want) <= (double)scale * (0.5 + 4 * U * limit));
            sums[c % QK_K / 16] += v;
        }
        for (int i = 0; i < 16; i++) assert_int_equal(sum_at(tail + CPU_X_SUMS_16, i), sums[i]);
        for (int i = 0; i < 8; i++)
            assert_int_equal(sum_at(tail + CPU_X_SUMS_32, i), sums[2 * i] + sums[2 * i + 1]);
    }
    free(row);
}

static void test_quantize(void **state) {
    (void)state;
    enum { COLS = 544 };
    uint64_t seed = 20;
    float x[COLS];
    for (int kind = 0; kind <= N_KINDS; kind++) {
        fill_input(kind, &seed, COLS, x);
        for (int c = 0; c < COLS && kind == N_KINDS; c++)
            x[c] = c < QK_K ? 0 : 3; /* no range, all of it */
        for (int isa = 0; isa < n_isas; isa++)
            for (int planes = 1; planes <= 2; planes++) check_quantize(isas[isa], planes, x, COLS);
    }
}

/* A tile has its tokens' values and tails, rows gathered to one are the tile, groups are of an even number if more than
 * one, and tiles are no larger than the rows of whole groups of CPU_GROUP. */
static void check_tile(const struct cpu_kernels *k, int planes, int width) {
    enum { COLS = 288 };
    uint64_t seed = 22;
    const size_t bytes = cpu_x_row_bytes(COLS, planes);
    const int group = cpu_x_group(width), n_groups = (width + group - 1) / group;
    const size_t tile_bytes = bytes / cpu_x_unit_bytes(planes) * tile_unit_bytes(planes, width);
    uint8_t *rows = new_tile(COLS), *tile = new_tile(COLS), *gathered = new_tile(COLS);
    const uint8_t *at[CPU_TILE];
    float in[COLS], scale, row_scale;
    assert_in_range(group, 1, CPU_GROUP);
    assert_true(n_groups == 1 || n_groups % 2 == 0);
    const int whole = (width + CPU_GROUP - 1) / CPU_GROUP * CPU_GROUP;
    assert_true(tile_bytes <= (size_t)whole * bytes);
    for (int t = 0; t < width; t++) {
        fill_input(t % N_KINDS, &seed, COLS, in);
        at[t] = rows + (size_t)t * bytes;
        k->quantize_row(in, COLS, planes, rows + (size_t)t * bytes);
        k->quantize(in, COLS, planes, tile, t, width);
    }
    k->gather(at, width, COLS, planes, gathered);
    assert_memory_equal(gathered, tile, tile_bytes + CPU_X_TAIL); /* and nothing beyond */
    for (int t = 0; t < width; t++)
        for (int c = 0; c < 2 * QK_K; c++) {
            assert_int_equal(value_at(tile, planes, width, t, c, &scale),
                             value_at(at[t], planes, 1, 0, c, &row_scale));
            if (c % QK_K == 0)
                assert_memory_equal(tail_at(tile, planes, width, t, c),
                                    tail_at(at[t], planes, 1, 0, c), CPU_X_TAIL);
        }
    free(rows);
    free(tile);
    free(gathered);
}

static void test_rows_and_tiles(void **state) {
    (void)state;
    for (int isa = 0; isa < n_isas; isa++)
        for (int planes = 1; planes <= 2; planes++)
            for (int width = 1; width <= CPU_TILE; width++) check_tile(isas[isa], planes, width);
}

/* ---- products ------------------------------------------------------------------------------------------ */

/* Every width against float64 on the integers themselves. An output sums N units (Q8_0: blocks), each with at most four rounded
 * operations of its own terms before the sum, so |error| <= (N + 4) u times the sum of the terms' magnitudes. */
static void check_rounding(const struct cpu_kernels *k, const struct matrix *x, int planes,
                           const float *in) {
    int32_t n_cols = x->m.n_cols;
    double n = (double)n_cols / (x->m.format == CPU_Q8_0 ? CPU_BLOCK : QK_K);
    uint8_t *tile = new_tile(n_cols);
    float out[CPU_TILE * CPU_ROWS];
    for (int width = 1; width <= CPU_TILE; width++) {
        for (int t = 0; t < width; t++)
            k->quantize(in + (size_t)t * (size_t)n_cols, n_cols, planes, tile, t, width);
        for (int32_t row = 0; row < x->m.n_tiles * CPU_ROWS; row++) {
            if (row % CPU_ROWS == 0)
                run_dot(k->dot[x->m.format][planes - 1][width], &x->m, row / CPU_ROWS, tile, width,
                        out);
            for (int t = 0; t < width; t++) {
                double y = 0, size = 0;
                for (int32_t c = 0; c < n_cols && row < x->m.n_rows; c++) {
                    float scale;
                    int v = value_at(tile, planes, width, t, c, &scale);
                    double w = (double)x->w[(size_t)row * (size_t)n_cols + (size_t)c];
                    y += w * v * (double)scale;
                    if (planes == 2)
                        y -= low_weight(&x->m, row, c, w) * low_at(tile, width, t, c) *
                             (double)scale;
                    size += (fabs(w) + 2) * abs(v) *
                            (double)scale; /* min < 1, and w is scale * q - min */
                }
                double got = (double)out[t * CPU_ROWS + row % CPU_ROWS];
                assert_true(fabs(got - y) <= (n + 4) * U * size);
            }
        }
    }
    free(tile);
}

/* Against float64 on the raw inputs: see test_cpu_kernels.c. */
static void check_accuracy(const struct cpu_kernels *k, const struct matrix *x, int planes,
                           const float *in) {
    enum { TOKENS = 16 };
    int32_t n_cols = x->m.n_cols;
    uint8_t *tile = new_tile(n_cols);
    double error = 0, expected = 0;
    float out[TOKENS * CPU_ROWS];
    for (int t = 0; t < TOKENS; t++) k->quantize(in + t * n_cols, n_cols, planes, tile, t, TOKENS);
    run_dot(k->dot[x->m.format][planes - 1][TOKENS], &x->m, 0, tile, TOKENS, out);
    for (int i = 0; i < TOKENS * CPU_ROWS; i++) {
        int t = i / CPU_ROWS, r = i % CPU_ROWS;
        double y = 0;
        for (int32_t c = 0; c < n_cols; c++) {
            float scale;
            double w = (double)x->w[r * n_cols + c];
            value_at(tile, planes, TOKENS, t, c, &scale);
            y += w * (double)in[t * n_cols + c];
            expected += w * w * (double)scale * (double)scale / 12;
        }
        error += ((double)out[i] - y) * ((double)out[i] - y);
    }
    assert_true(error <= 2.5 * expected);
    free(tile);
}

static void test_products(void **state) {
    (void)state;
    uint64_t seed = 21;
    static float in[CPU_TILE * MAX_COLS];
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x =
            make_matrix(types[i], 1, 40, types[i] == TENSOR_Q8_0 ? 352 : MAX_COLS, &seed);
        for (int isa = 0; isa < n_isas; isa++)
            for (int kind = 0; kind < N_KINDS; kind++) {
                fill_input(kind, &seed, CPU_TILE * MAX_COLS, in);
                for (int planes = 1; planes <= 2; planes++) {
                    check_rounding(isas[isa], &x, planes, in);
                    check_accuracy(isas[isa], &x, planes, in);
                }
            }
        free_matrix(&x);
    }
}

/* The largest integers that there are fit the sums: all bits set, or, of Q6_K, quants of 0 (-32) with scales of -128. With d 1
 * and no minimum a row of ones is the row's sum, exact but for float32's rounding. */
static void test_largest_sums(void **state) {
    (void)state;
    uint64_t seed = 25;
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 16, QK_K, &seed);
        uint8_t *raw = malloc(16 * x.m.row_bytes);
        const uint16_t one = f32_to_f16(1), zero = 0;
        int32_t bw, bb;
        assert_true(tensor_type_block(types[i], &bw, &bb));
        memset(raw,
               types[i] == TENSOR_Q6_K   ? 0
               : types[i] == TENSOR_Q8_0 ? 0x80
                                         : 0xff,
               16 * x.m.row_bytes);
        for (size_t at = 0; at < 16 * x.m.row_bytes; at += (size_t)bb) {
            if (types[i] == TENSOR_Q6_K) memset(raw + at + 192, 0x80, 16);
            memcpy(raw + at + (types[i] == TENSOR_Q6_K ? 208 : 0), &one, 2);
            if (types[i] == TENSOR_Q4_K || types[i] == TENSOR_Q5_K) memcpy(raw + at + 2, &zero, 2);
        }
        dequantize(types[i], raw, 16 * QK_K, x.w);
        cpu_repack_tile(&x.m, raw, 16, x.m.p);
        for (int isa = 0; isa < n_isas; isa++) {
            for (int k = 0; k < 16; k++) {
                static const int widths[] = {1, 3, 8, CPU_TILE};
                const int planes = 1 + k % 2, sign = k / 2 % 2 * 2 - 1, n = widths[k / 4];
                float in[QK_K], out[CPU_TILE * CPU_ROWS];
                double want = 0;
                uint8_t *tile = new_tile(QK_K);
                for (int c = 0; c < QK_K; c++) {
                    in[c] = (float)sign;
                    want += (double)x.w[c] * sign;
                }
                for (int t = 0; t < n; t++) isas[isa]->quantize(in, QK_K, planes, tile, t, n);
                run_dot(isas[isa]->dot[x.m.format][planes - 1][n], &x.m, 0, tile, n, out);
                for (int j = 0; j < n * CPU_ROWS; j++)
                    assert_true(fabs((double)out[j] - want) <= 12 * U * fabs(want));
                free(tile);
            }
        }
        free(raw);
        free_matrix(&x);
    }
}

static void test_not_finite(void **state) {
    (void)state;
    uint64_t seed = 23;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const int widths[] = {1, 5, 20};
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 16, 256, &seed);
        for (int isa = 0; isa < n_isas; isa++) {
            for (int k = 0; k < 9; k++) {
                int width = widths[k / 3];
                float in[256], out[CPU_TILE * CPU_ROWS];
                uint8_t *tile = new_tile(256);
                for (int t = 0; t < width; t++) {
                    fill_input(0, &seed, 256, in);
                    if (t == width / 2) in[17 + 25 * k] = bad[k % 3];
                    isas[isa]->quantize(in, 256, 1, tile, t, width);
                }
                run_dot(isas[isa]->dot[x.m.format][0][width], &x.m, 0, tile, width, out);
                for (int j = 0; j < width * CPU_ROWS; j++)
                    assert_int_equal(isfinite(out[j]) != 0, j / CPU_ROWS != width / 2);
                free(tile);
            }
        }
        free_matrix(&x);
    }
}

/* m = 1 … 100 tokens, cut as the backend cuts them, several row tiles in one call, into rows that lie apart: every
 * token's bits are those it has alone, tile by tile, and nothing is written beside them. */
static void test_width_does_not_matter(void **state) {
    (void)state;
    enum { MOST = 100, COLS = MAX_COLS, MOST_TILES = 3, STRIDE = MOST_TILES * CPU_ROWS + 3 };
    uint64_t seed = 24;
    static float in[MOST][COLS], alone[MAX_ISAS][MOST][STRIDE], out[CPU_TILE][STRIDE];
    uint8_t *tile = new_tile(COLS);
    for (int i = 0; i < 2 * N_QUANT_TYPES; i++) {
        const int planes = 1 + i % 2;
        struct matrix x = make_matrix(types[i / 2], 1, MOST_TILES * CPU_ROWS, COLS, &seed);
        fill_input(1, &seed, MOST * COLS, in[0]);
        for (int isa = 0; isa < n_isas; isa++) {
            const struct cpu_kernels *k = isas[isa];
            cpu_dot_fn *const *dot = k->dot[x.m.format][planes - 1];
            for (int t = 0; t < MOST; t++) {
                k->quantize(in[t], COLS, planes, tile, 0, 1);
                for (int rt = 0; rt < MOST_TILES; rt++)
                    run_dot(dot[1], &x.m, rt, tile, 1, alone[isa][t] + rt * CPU_ROWS);
            }
            for (int m = 1; m <= MOST; m += m < 20 ? 1 : 9) {
                for (int at = 0; at < m;) {
                    int n = cpu_tile_width(k, m - at), n_tiles = m % MOST_TILES + 1;
                    assert_in_range(n, 1, m - at);
                    for (int t = 0; t < n; t++) k->quantize(in[at + t], COLS, planes, tile, t, n);
                    memset(out, 0x7b, sizeof out);
                    dot[n](&(struct cpu_dot){x.m.p, x.m.p, n_tiles, x.m.n_units, tile, n, out[0],
                                             STRIDE});
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
    free(tile);
}

int main(void) {
    const struct {
        const char *name;
        const struct cpu_kernels *kernels;
    } all[MAX_ISAS] = {{"AMX emulated, for want of AVX-512 with VNNI", amx_emulated()},
                       {"AMX", cpu_kernels_amx()}};
    for (int i = 0; i < MAX_ISAS; i++) {
        if (all[i].kernels) isas[n_isas++] = all[i].kernels;
        printf("[ %s ] %s\n", all[i].kernels ? "testing  " : "NOT TESTED",
               all[i].kernels ? all[i].kernels->name : all[i].name);
    }
    if (n_isas == 0) return TEST_SKIPPED;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantize),   cmocka_unit_test(test_rows_and_tiles),
        cmocka_unit_test(test_products),   cmocka_unit_test(test_largest_sums),
        cmocka_unit_test(test_not_finite), cmocka_unit_test(test_width_does_not_matter),
    };
    return cmocka_run_group_tests_name("cpu_amx", tests, NULL, NULL);
}
