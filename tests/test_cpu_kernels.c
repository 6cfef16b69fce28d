/* cpu kernels: repacking, products, row kernels and attention of AVX2 and AVX-512, against
 * float64 on the same inputs (AMX: test_cpu_amx.c). Bounds are derived where they stand, from the rounding of float32 (u = 2^-24)
 * and the step of the activations' quantisation. */
#include "tests/cpu_rig.h"

enum { MAX_ISAS = 2, WIDTHS = 16 };
static const struct cpu_kernels *isas[MAX_ISAS];
static int n_isas;

/* ---- repacking ------------------------------------------------------------------------------------ */

static void test_round_trip(void **state) {
    (void)state;
    uint64_t seed = 1;
    for (int i = 0; i < N_TYPES; i++) {
        int32_t n_cols = types[i] == TENSOR_Q8_0 ? 96 : i < N_QUANT_TYPES ? 768 : 53;
        struct matrix x = make_matrix(types[i], 3, 37, n_cols, &seed);
        float *row = malloc((size_t)n_cols * sizeof *row);
        for (int32_t r = 0; r < 3 * 37; r++) {
            cpu_matrix_row(&x.m, r / 37, r % 37, row);
            assert_memory_equal(row, x.w + (size_t)r * (size_t)n_cols,
                                (size_t)n_cols * sizeof *row);
        }
        free(row);
        free_matrix(&x);
    }
}

static void test_plan_refuses(void **state) {
    (void)state;
    struct cpu_matrix m;
    assert_false(cpu_matrix_plan((enum tensor_type)2, 1, 16, 256, &m)); /* Q4_0 */
    assert_false(cpu_matrix_plan(TENSOR_Q4_K, 1, 16, 128, &m));
    assert_false(cpu_matrix_plan(TENSOR_Q8_0, 1, 16, 48, &m));
    assert_true(cpu_matrix_plan(TENSOR_Q4_K, 128, 768, 2048, &m));
    /* 4.625 bits a weight instead of 4.5: the file plus 2.8 %. */
    assert_int_equal(m.n_bytes, (size_t)128 * 768 * 2048 * 37 / 64);
}

/* ---- quantisation ------------------------------------------------------------------------------------ */

/* Value k of column t of a tile, as the integers and the scale say. */
static double tile_value(const uint8_t *tile, int planes, int n, int t, int32_t k, double *scale) {
    const uint8_t *b = tile + (size_t)(k / CPU_BLOCK) * cpu_tile_block_bytes(planes, n);
    int v = (int8_t)b[CPU_BLOCK * t + k % CPU_BLOCK];
    if (planes == 2) v = v * 256 + (int8_t)b[CPU_BLOCK * (n + t) + k % CPU_BLOCK];
    float s;
    memcpy(&s, b + planes * CPU_BLOCK * n + 4 * t, 4);
    *scale = (double)s;
    return (double)v * (double)s;
}

static void test_quantize(void **state) {
    (void)state;
    enum { N = 256, WIDTH = 5 };
    uint64_t seed = 2;
    float x[N];
    for (int isa = 0; isa < n_isas; isa++) {
        for (int planes = 1; planes <= 2; planes++) {
            double limit = planes == 2 ? 32639 : 127;
            for (int kind = 0; kind < N_KINDS; kind++) {
                fill_input(kind, &seed, N, x);
                for (int i = 32; i < 64; i++) x[i] = 0; /* a block of zeros */
                uint8_t tile[WIDTH * N * 3], row[N * 3];
                memset(tile, 0xaa, sizeof tile);
                isas[isa]->quantize(x, N, planes, tile, 3, WIDTH);
                isas[isa]->quantize(x, N, planes, row, 0, 1);
                for (int b = 0; b < N / 32; b++) {
                    double max = 0, sum = 0, half[2] = {0, 0}, scale, scale1;
                    for (int i = 0; i < 32; i++) max = fmax(max, fabs((double)x[32 * b + i]));
                    for (int i = 0; i < 32; i++) {
                        double v = tile_value(tile, planes, WIDTH, 3, 32 * b + i, &scale);
                        assert_true(v == tile_value(row, planes, 1, 0, 32 * b + i, &scale1));
                        assert_true(scale == scale1);
                        assert_true(fabs(scale * limit - max) <= 2 * U * max);
                        /* Half a step, and the rounding of scale and reciprocal. */
                        assert_true(fabs(v - (double)x[32 * b + i]) <=
                                    scale * (0.5 + 4 * U * limit));
                        sum += v;
                        half[i / 16] += scale > 0 ? v / scale : 0;
                    }
                    const uint8_t *tail =
                        row + (size_t)b * cpu_tile_block_bytes(planes, 1) + planes * CPU_BLOCK;
                    float s;
                    int32_t offset[2];
                    memcpy(&s, tail + 4, 4);
                    memcpy(offset, tail + 8, 8);
                    assert_true(fabs((double)s - sum) <= 32 * limit * scale * U);
                    assert_int_equal(offset[0], (int32_t)lrint(-32 * half[0]));
                    assert_int_equal(offset[1], (int32_t)lrint(-32 * half[1]));
                }
            }
        }
    }
}

/* A value that is not finite must reach every product of its row. */
static void test_not_finite(void **state) {
    (void)state;
    uint64_t seed = 3;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 16, 256, &seed);
        for (int isa = 0; isa < n_isas; isa++) {
            for (int k = 0; k < 6; k++) {
                float in[256], out[16];
                uint8_t row[256 * 3];
                fill_input(0, &seed, 256, in);
                in[17 + 40 * k] = bad[k % 3];
                isas[isa]->quantize(in, 256, 1 + k / 3, row, 0, 1);
                run_dot(isas[isa]->dot[x.m.format][k / 3][1], &x.m, 0, row, 1, out);
                for (int r = 0; r < 16; r++) assert_false(isfinite(out[r]));
            }
        }
        free_matrix(&x);
    }
}

/* ---- products ------------------------------------------------------------------------------------------ */

/* Every width against float64 on the integers themselves, where the error is rounding: an output sums N
 * blocks, each with at most three rounded operations of its own terms before the sum, so |error| <=
 * (2N + 6) u times the sum of the terms' magnitudes. */
static void check_rounding(const struct cpu_kernels *k, const struct matrix *x, int planes,
                           const float *in) {
    int32_t n_cols = x->m.n_cols;
    uint8_t *tile = malloc((size_t)WIDTHS * (size_t)n_cols * 3);
    float out[WIDTHS * CPU_ROWS];
    for (int n = 1; n <= WIDTHS; n++) {
        cpu_dot_fn *dot = k->dot[x->m.format][planes - 1][n];
        if (!dot) continue;
        for (int t = 0; t < n; t++)
            k->quantize(in + (size_t)t * (size_t)n_cols, n_cols, planes, tile, t, n);
        for (int32_t row = 0; row < x->m.n_tiles * CPU_ROWS; row++) {
            if (row % CPU_ROWS == 0) run_dot(dot, &x->m, row / CPU_ROWS, tile, n, out);
            for (int t = 0; t < n; t++) {
                double y = 0, size = 0, scale;
                for (int32_t c = 0; c < n_cols && row < x->m.n_rows; c++) {
                    double w = (double)x->w[(size_t)row * (size_t)n_cols + (size_t)c];
                    double v = tile_value(tile, planes, n, t, c, &scale);
                    y += w * v;
                    size += (fabs(w) + 2) * fabs(v); /* min < 1, and w is scale * q - min */
                }
                double got = (double)out[t * CPU_ROWS + row % CPU_ROWS];
                assert_true(fabs(got - y) <= (2 * (double)n_cols / 32 + 6) * U * size);
            }
        }
    }
    free(tile);
}

/* Against float64 on the raw inputs the error is the quantisation's: uniform in half a step, so its square is
 * step² / 12 on average. Rows share a token's errors, so that sixteen tokens may be no more than sixteen
 * independent samples: chi-square of sixteen exceeds 2.5 times its mean once in a thousand. */
static void check_accuracy(const struct cpu_kernels *k, const struct matrix *x, int planes,
                           const float *in) {
    int32_t n_cols = x->m.n_cols;
    uint8_t *row = malloc((size_t)n_cols * 3);
    double error = 0, expected = 0;
    for (int t = 0; t < WIDTHS; t++, in += n_cols) {
        float out[CPU_ROWS];
        k->quantize(in, n_cols, planes, row, 0, 1);
        run_dot(k->dot[x->m.format][planes - 1][1], &x->m, 0, row, 1, out);
        for (int r = 0; r < CPU_ROWS; r++) {
            double y = 0, scale;
            for (int32_t c = 0; c < n_cols; c++) {
                double w = (double)x->w[(size_t)r * (size_t)n_cols + (size_t)c];
                y += w * (double)in[c];
                tile_value(row, planes, 1, 0, c, &scale);
                expected += w * w * scale * scale / 12;
            }
            error += ((double)out[r] - y) * ((double)out[r] - y);
        }
    }
    assert_true(error <= 2.5 * expected);
    free(row);
}

static void test_products(void **state) {
    (void)state;
    uint64_t seed = 5;
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 40, 768, &seed);
        for (int planes = 1; planes <= 2; planes++)
            for (int kind = 0; kind < N_KINDS; kind++) {
                static float in[WIDTHS * 768];
                fill_input(kind, &seed, WIDTHS * 768, in);
                for (int isa = 0; isa < n_isas; isa++) {
                    check_rounding(isas[isa], &x, planes, in);
                    check_accuracy(isas[isa], &x, planes, in);
                }
            }
        free_matrix(&x);
    }
}

static void test_float_products(void **state) {
    (void)state;
    enum { COLS = 203, TOKENS = 4 };
    uint64_t seed = 6;
    float in[TOKENS][COLS + 5], out[TOKENS][CPU_ROWS], alone[CPU_ROWS];
    fill_input(0, &seed, TOKENS * (COLS + 5), &in[0][0]);
    for (int i = N_QUANT_TYPES; i < N_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 20, COLS, &seed);
        for (int isa = 0; isa < n_isas; isa++) {
            cpu_dot_float_fn *const *dot = isas[isa]->dot_float[x.m.format - CPU_F32];
            for (int n = 1; n <= TOKENS; n++) {
                for (int32_t rt = 0; rt < x.m.n_tiles; rt++) {
                    const uint8_t *w = cpu_matrix_tile(&x.m, 0, rt);
                    dot[n - 1](&(struct cpu_dot_float){w, COLS, in[0], COLS + 5, out[0], CPU_ROWS});
                    for (int t = 0; t < n; t++) {
                        for (int r = 0; r < CPU_ROWS; r++) {
                            double y = 0, size = 0;
                            for (int c = 0; c < COLS && rt * CPU_ROWS + r < 20; c++) {
                                double p =
                                    (double)x.w[(rt * CPU_ROWS + r) * COLS + c] * (double)in[t][c];
                                y += p;
                                size += fabs(p);
                            }
                            /* Four chains of a quarter of the columns, and two additions. */
                            assert_true(fabs((double)out[t][r] - y) <= (COLS / 4.0 + 4) * U * size);
                        }
                        dot[0](&(struct cpu_dot_float){w, COLS, in[t], 0, alone, CPU_ROWS});
                        assert_memory_equal(alone, out[t], sizeof alone);
                    }
                }
            }
        }
        free_matrix(&x);
    }
}

/* m = 1 … 65 tokens, cut as the backend cuts them: every token's bits are those it has alone. And the
 * instruction sets agree bit for bit. */
static void test_width_does_not_matter(void **state) {
    (void)state;
    enum { MOST = 65, COLS = 512 };
    uint64_t seed = 7;
    static float in[MOST][COLS], alone[MAX_ISAS][MOST][CPU_ROWS], out[WIDTHS][CPU_ROWS];
    static uint8_t tile[WIDTHS * COLS * 3];
    fill_input(1, &seed, MOST * COLS, in[0]);
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, 16, COLS, &seed);
        for (int planes = 1; planes <= 2; planes++) {
            for (int isa = 0; isa < n_isas; isa++) {
                const struct cpu_kernels *k = isas[isa];
                for (int t = 0; t < MOST; t++) {
                    k->quantize(in[t], COLS, planes, tile, 0, 1);
                    run_dot(k->dot[x.m.format][planes - 1][1], &x.m, 0, tile, 1, alone[isa][t]);
                }
                for (int m = 1; m <= MOST; m++) {
                    for (int at = 0; at < m;) {
                        int n = cpu_tile_width(k, m - at);
                        assert_in_range(n, 1, m - at);
                        assert_non_null(k->dot[x.m.format][planes - 1][n]);
                        for (int t = 0; t < n; t++)
                            k->quantize(in[at + t], COLS, planes, tile, t, n);
                        run_dot(k->dot[x.m.format][planes - 1][n], &x.m, 0, tile, n, out[0]);
                        assert_memory_equal(out, alone[isa][at], (size_t)n * sizeof *out);
                        at += n;
                    }
                }
            }
            for (int isa = 1; isa < n_isas; isa++)
                assert_memory_equal(alone[0], alone[isa], sizeof alone[0]);
        }
        free_matrix(&x);
    }
}

/* Several row tiles in one call, of every width there is, into rows that lie apart: the bits of the first
 * instruction set's kernel for one token and one row tile, and nothing beside them. */
static void test_row_tiles(void **state) {
    (void)state;
    enum { COLS = 768, MOST_TILES = 5, STRIDE = MOST_TILES * CPU_ROWS + 3 };
    uint64_t seed = 11;
    static float in[WIDTHS][COLS], out[WIDTHS][STRIDE], want[WIDTHS][STRIDE];
    static uint8_t tile[WIDTHS * COLS * 3];
    for (int i = 0; i < N_QUANT_TYPES; i++) {
        struct matrix x = make_matrix(types[i], 1, MOST_TILES * CPU_ROWS, COLS, &seed);
        for (int width = 1; width <= 2 * MOST_TILES * WIDTHS * n_isas; width++) {
            /* Every combination of planes, row tiles, width and instruction set. */
            int n = (width - 1) % WIDTHS + 1, rest = (width - 1) / WIDTHS;
            int isa = rest % n_isas, planes = rest / n_isas % 2 + 1,
                n_tiles = rest / n_isas / 2 + 1;
            cpu_dot_fn *dot = isas[isa]->dot[x.m.format][planes - 1][n];
            if (!dot) continue;
            fill_input(width % N_KINDS, &seed, n * COLS, in[0]);
            memset(want, 0x7b, sizeof want);
            memset(out, 0x7b, sizeof out);
            for (int t = 0; t < n; t++) {
                isas[0]->quantize(in[t], COLS, planes, tile, 0, 1);
                for (int k = 0; k < n_tiles; k++)
                    run_dot(isas[0]->dot[x.m.format][planes - 1][1], &x.m, k, tile, 1,
                            want[t] + k * CPU_ROWS);
            }
            for (int t = 0; t < n; t++) isas[isa]->quantize(in[t], COLS, planes, tile, t, n);
            dot(&(struct cpu_dot){x.m.p, x.m.p, n_tiles, x.m.n_units, tile, n, out[0], STRIDE});
            assert_memory_equal(out, want, sizeof out);
        }
        free_matrix(&x);
    }
}

/* ---- row kernels ----------------------------------------------------------------------------------------- */

/* Lengths with and without whole vectors. What lies beyond n must stay as it is. */
static void test_rows(void **state) {
    (void)state;
    enum { MOST = 70 };
    uint64_t seed = 8;
    float x[MOST + 1], y[MOST + 1], z[MOST + 1];
    for (int isa = 0; isa < n_isas; isa++) {
        const struct cpu_kernels *k = isas[isa];
        for (int n = 1; n <= MOST; n++) {
            fill_input(1, &seed, MOST + 1, x);
            fill_input(0, &seed, MOST + 1, y);
            double squares = 0;
            for (int i = 0; i < n; i++) squares += (double)x[i] * (double)x[i];
            double norm = 1 / sqrt(squares / n + 1e-6);
            z[n] = 77;
            k->rms_norm(x, y, 1e-6f, n, z);
            for (int i = 0; i < n; i++) {
                double r = (double)x[i] * norm * (double)y[i];
                assert_true(fabs((double)z[i] - r) <= (n / 32.0 + 8) * U * fabs(r));
            }
            assert_true(z[n] == 77);

            memcpy(z, x, sizeof z);
            k->silu_mul(z, y, n);
            for (int i = 0; i < n; i++) {
                double g = (double)x[i], r = g / (1 + exp(-g)) * (double)y[i];
                /* exp to 2 ulp, and four roundings; below e^-86.5 it is cut off. */
                assert_true(fabs((double)z[i] - r) <= 10 * U * fabs(r) + 1e-34);
            }
            assert_true(z[n] == x[n]);

            memcpy(z, x, sizeof z);
            k->add(z, y, n);
            for (int i = 0; i <= n; i++) assert_true(z[i] == (i < n ? x[i] + y[i] : x[i]));

            memcpy(z, x, sizeof z);
            k->divide(z, 3, n);
            for (int i = 0; i <= n; i++) assert_true(z[i] == (i < n ? x[i] / 3 : x[i]));

            int32_t rows[3] = {1, 0, 1};
            float weights[3] = {0.5f, 0.25f, -0.125f}, ys[2 * MOST];
            fill_input(0, &seed, 2 * MOST, ys);
            memcpy(z, x, sizeof z);
            k->combine(&(struct cpu_combine){z, ys, MOST, rows, weights, 3, n});
            for (int i = 0; i < n; i++) {
                double r = 0, size = fabs((double)x[i]);
                for (int j = 0; j < 3; j++) {
                    double p = (double)weights[j] * (double)ys[rows[j] * MOST + i];
                    r += p;
                    size += fabs(p);
                }
                assert_true(fabs((double)z[i] - (double)x[i] - r) <= 4 * U * size);
            }
            assert_true(z[n] == x[n]);
        }
    }
}

static void test_silu_range(void **state) {
    (void)state;
    for (int isa = 0; isa < n_isas; isa++) {
        float g[] = {0, -0.0f, 1e-30f, 80, 200, 3e38f, -80, -200, -3e38f, INFINITY, NAN}, up[11];
        for (int i = 0; i < 11; i++) up[i] = 1;
        isas[isa]->silu_mul(g, up, 11);
        assert_true(g[0] == 0 && g[1] == 0 && fabsf(g[2] - 5e-31f) < 1e-36f);
        assert_true(g[3] == 80 && g[4] == 200 && g[5] == 3e38f);
        assert_true(g[6] < 0 && g[6] > -1e-32f && fabsf(g[7]) < 1e-34f && fabsf(g[8]) < 10);
        assert_true(g[9] == INFINITY && isnan(g[10]));
    }
}

static void test_rope_and_f16(void **state) {
    (void)state;
    uint64_t seed = 9;
    for (int isa = 0; isa < n_isas; isa++) {
        for (int hd = 2; hd <= 128; hd += hd < 40 ? 2 : 22) {
            float x[128], y[128], cs[128];
            fill_input(0, &seed, hd, x);
            memcpy(y, x, sizeof y);
            for (int i = 0; i < hd / 2; i++) {
                cs[i] = cosf((float)i + 0.3f);
                cs[hd / 2 + i] = sinf((float)i + 0.3f);
            }
            isas[isa]->rope(y, cs, hd);
            for (int i = 0; i < hd / 2; i++) {
                double a = (double)x[i], b = (double)x[hd / 2 + i], c = (double)cs[i],
                       s = (double)cs[hd / 2 + i], size = fabs(a) + fabs(b);
                assert_true(fabs((double)y[i] - (a * c - b * s)) <= 2 * U * size);
                assert_true(fabs((double)y[hd / 2 + i] - (b * c + a * s)) <= 2 * U * size);
            }
            uint16_t h[128 * CPU_POS], dense[129];
            memset(h, 0xee, sizeof h);
            dense[hd] = 0xeeee;
            isas[isa]->to_f16(x, hd, h + 5, CPU_POS);
            isas[isa]->to_f16(x, hd, dense, 1);
            for (int i = 0; i < hd; i++) {
                assert_int_equal(dense[i], f32_to_f16(x[i]));
                for (int p = 0; p < CPU_POS; p++)
                    assert_int_equal(h[i * CPU_POS + p], p == 5 ? dense[i] : 0xeeee);
            }
            assert_int_equal(dense[hd], 0xeeee);
        }
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------- */

enum { MAX_HD = 128, MAX_POS = 150, N_GROUPS = (MAX_POS + CPU_POS) / CPU_POS };

struct attention_case {
    int hd, width, n_pos;
    float q[CPU_QROWS][MAX_HD];
    uint16_t k[MAX_POS][MAX_HD], v[MAX_POS][MAX_HD];
    uint16_t keys[N_GROUPS][MAX_HD * CPU_POS], values[N_GROUPS][MAX_HD * CPU_POS];
};

static void fill_case(struct attention_case *c, int hd, int n_pos, uint64_t *seed) {
    float x[MAX_HD];
    memset(c, 0xff, sizeof *c); /* NaN wherever nothing is written */
    c->hd = hd;
    c->width = (hd + 15) / 16 * 16;
    c->n_pos = n_pos;
    for (int r = 0; r < CPU_QROWS; r++) {
        fill_input(0, seed, hd, c->q[r]);
        for (int i = 0; i < hd; i++) c->q[r][i] *= (float)(r + 1); /* soft to sharp */
    }
    for (int p = 0; p < n_pos; p++) {
        fill_input(0, seed, hd, x);
        for (int i = 0; i < hd; i++) {
            c->k[p][i] = f32_to_f16(x[i]);
            c->keys[p / CPU_POS][i * CPU_POS + p % CPU_POS] = c->k[p][i];
        }
        fill_input(1, seed, hd, x);
        for (int i = 0; i < c->width; i++) {
            c->v[p][i] = i < hd ? f32_to_f16(x[i]) : 0;
            c->values[p / CPU_POS][p % CPU_POS * c->width + i] = c->v[p][i];
        }
    }
}

/* Rows first … first + n - 1 through the kernel, split by split; out[n][MAX_HD]. */
static void attend(const struct cpu_kernels *k, const struct attention_case *c, int first, int n,
                   float out[][MAX_HD]) {
    float max[CPU_QROWS], sum[CPU_QROWS];
    struct cpu_attend a = {.n_rows = n, .head_dim = c->hd, .scale = 1 / sqrtf((float)c->hd)};
    for (int r = 0; r < n; r++) {
        memset(out[r], 0, sizeof out[r]);
        max[r] = -INFINITY;
        sum[r] = 0;
        a.q[r] = c->q[first + r];
        a.out[r] = out[r];
        a.max[r] = &max[r];
        a.sum[r] = &sum[r];
    }
    for (int at = 0; at < c->n_pos; at += CPU_SPLIT) {
        a.n_pos = c->n_pos - at < CPU_SPLIT ? c->n_pos - at : CPU_SPLIT;
        for (int g = 0; g * CPU_POS < a.n_pos; g++) {
            a.k[g] = c->keys[at / CPU_POS + g];
            a.v[g] = c->values[at / CPU_POS + g];
        }
        k->attend(&a);
    }
    for (int r = 0; r < n; r++) k->divide(out[r], sum[r], c->hd);
}

static void check_attention(const struct attention_case *c, float out[][MAX_HD]) {
    for (int r = 0; r < CPU_QROWS; r++) {
        double s[MAX_POS], max = -INFINITY, sum = 0, width = 0;
        for (int p = 0; p < c->n_pos; p++) {
            double size = 0;
            s[p] = 0;
            for (int i = 0; i < c->hd; i++) {
                double x =
                    (double)c->q[r][i] * (double)f16_to_f32(c->k[p][i]) / sqrt((double)c->hd);
                s[p] += x;
                size += fabs(x);
            }
            max = fmax(max, s[p]);
            width = fmax(width, size);
        }
        for (int p = 0; p < c->n_pos; p++) sum += s[p] = exp(s[p] - max);
        for (int i = 0; i < c->hd; i++) {
            double y = 0, size = 0;
            for (int p = 0; p < c->n_pos; p++) {
                double x = s[p] / sum * (double)f16_to_f32(c->v[p][i]);
                y += x;
                size += fabs(x);
            }
            /* A score is off by at most (Hd + 3) u of its terms' magnitudes, which moves p by that much
             * relatively, as does max; exp, two sums over positions and the splits' factors add. */
            double bound = 2 * (c->hd + 3) * width + 2 * c->n_pos + 16;
            assert_true(fabs((double)out[r][i] - y) <= bound * U * size);
        }
    }
}

static void test_attention(void **state) {
    (void)state;
    static struct attention_case c;
    static const int widths[] = {128, 64, 40, 2};
    uint64_t seed = 10;
    static float out[MAX_ISAS][CPU_QROWS][MAX_HD], alone[1][MAX_HD];
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        for (int n_pos = 1; n_pos <= MAX_POS; n_pos += n_pos < 70 ? 3 : 37) {
            fill_case(&c, widths[w], n_pos, &seed);
            for (int isa = 0; isa < n_isas; isa++) {
                attend(isas[isa], &c, 0, CPU_QROWS, out[isa]);
                check_attention(&c, out[isa]);
                for (int n = 1; n < CPU_QROWS; n++) { /* fewer rows at once: the same bits */
                    static float few[CPU_QROWS][MAX_HD];
                    attend(isas[isa], &c, CPU_QROWS - n, n, few);
                    for (int r = 0; r < n; r++)
                        assert_memory_equal(few[r], out[isa][CPU_QROWS - n + r],
                                            (size_t)c.hd * sizeof(float));
                }
                attend(isas[isa], &c, 2, 1, alone);
                assert_memory_equal(alone[0], out[isa][2], (size_t)c.hd * sizeof(float));
            }
            for (int isa = 1; isa < n_isas; isa++)
                assert_memory_equal(out[0], out[isa], sizeof out[0]);
        }
    }
}

int main(void) {
    const struct {
        const char *name;
        const struct cpu_kernels *kernels;
    } all[MAX_ISAS] = {{"AVX2", cpu_kernels_avx2()}, {"AVX-512 with VNNI", cpu_kernels_avx512()}};
    for (int i = 0; i < MAX_ISAS; i++) {
        if (all[i].kernels) isas[n_isas++] = all[i].kernels;
        printf("[ %s ] %s\n", all[i].kernels ? "testing  " : "NOT TESTED",
               all[i].kernels ? all[i].kernels->name : all[i].name);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_plan_refuses),
        cmocka_unit_test(test_quantize),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_float_products),
        cmocka_unit_test(test_width_does_not_matter),
        cmocka_unit_test(test_row_tiles),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_silu_range),
        cmocka_unit_test(test_rope_and_f16),
        cmocka_unit_test(test_attention),
    };
    return cmocka_run_group_tests_name("cpu_kernels", tests, NULL, NULL);
}
