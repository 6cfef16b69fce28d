/* See cpu_repack.h. GGUF block layouts: quant.c. */
#include "moe/cpu_repack.h"

#include <string.h>

enum { BLOCKS_PER_UNIT = QK_K / CPU_BLOCK };

static bool format_of(enum tensor_type type, enum cpu_format *format, size_t *unit_bytes,
                      int32_t *unit_cols) {
    static const struct {
        enum tensor_type type;
        enum cpu_format format;
        size_t unit_bytes;
        int32_t unit_cols;
    } rows[] = {
        {TENSOR_Q4_K, CPU_Q4_K, CPU_Q4_K_UNIT, QK_K},
        {TENSOR_Q5_K, CPU_Q5_K, CPU_Q5_K_UNIT, QK_K},
        {TENSOR_Q6_K, CPU_Q6_K, CPU_Q6_K_UNIT, QK_K},
        {TENSOR_Q8_0, CPU_Q8_0, CPU_Q8_0_UNIT, Q8_0_WEIGHTS},
        {TENSOR_F32, CPU_F32, CPU_ROWS * 4, 1},
        {TENSOR_F16, CPU_F16, CPU_ROWS * 2, 1},
        {TENSOR_BF16, CPU_BF16, CPU_ROWS * 2, 1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].type != type) continue;
        *format = rows[i].format;
        *unit_bytes = rows[i].unit_bytes;
        *unit_cols = rows[i].unit_cols;
        return true;
    }
    return false;
}

bool cpu_matrix_plan(enum tensor_type type, int32_t n_experts, int32_t n_rows, int32_t n_cols,
                     struct cpu_matrix *out) {
    CHECK(n_experts > 0 && n_rows > 0 && n_cols > 0);
    struct cpu_matrix m = {
        .type = type, .n_experts = n_experts, .n_rows = n_rows, .n_cols = n_cols};
    size_t unit_bytes, n_tiles;
    int32_t unit_cols;
    if (!format_of(type, &m.format, &unit_bytes, &unit_cols) || n_cols % unit_cols != 0)
        return false;
    if (!tensor_type_bytes(type, (size_t)n_cols, &m.row_bytes)) return false;
    m.n_tiles = (int32_t)(((int64_t)n_rows + CPU_ROWS - 1) / CPU_ROWS);
    m.n_units = n_cols / unit_cols;
    if (!size_mul(unit_bytes, (size_t)m.n_units, &m.tile_bytes) ||
        !size_mul((size_t)n_experts, (size_t)m.n_tiles, &n_tiles) ||
        !size_mul(n_tiles, m.tile_bytes, &m.n_bytes))
        return false;
    *out = m;
    return true;
}

static uint32_t load4(const uint8_t *p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}
static void store4(uint8_t *p, uint32_t x) { memcpy(p, &x, sizeof x); }
static float load_f16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return f16_to_f32(h);
}
static float load_f32(const uint8_t *p) {
    float f;
    memcpy(&f, p, sizeof f);
    return f;
}

/* The 4-bit parts of 32 columns: `low`'s nibbles at shift, to lane r of four vectors. */
static void pack_nibbles(const uint8_t *src, int shift, int r, uint8_t *dst) {
    for (int j = 0; j < 4; j++) {
        uint32_t low = load4(src + 4 * j) >> shift & 0x0f0f0f0f;
        uint32_t high = load4(src + 16 + 4 * j) >> shift & 0x0f0f0f0f;
        store4(dst + 64 * j + 4 * r, low | high << 4);
    }
}

/* Q4_K and Q5_K share their 6-bit scales and minima: see quant.c. */
static void pack_scales(const uint8_t *s, int r, uint8_t *sc, uint8_t *m) {
    for (int i = 0; i < 4; i++) {
        int at = CPU_ROWS * i + r, at4 = CPU_ROWS * (i + 4) + r;
        sc[at] = s[i] & 63;
        m[at] = s[i + 4] & 63;
        sc[at4] = (uint8_t)((s[i + 8] & 15) | (s[i] >> 6) << 4);
        m[at4] = (uint8_t)(s[i + 8] >> 4 | (s[i + 4] >> 6) << 4);
    }
}

static void pack_q4_k(const uint8_t *src, int r, uint8_t *u) {
    memcpy(u + CPU_Q4_K_D + 2 * r, src, 2);
    memcpy(u + CPU_Q4_K_D + 32 + 2 * r, src + 2, 2);
    pack_scales(src + 4, r, u + CPU_Q4_K_SC, u + CPU_Q4_K_M);
    for (int b = 0; b < BLOCKS_PER_UNIT; b++)
        pack_nibbles(src + 16 + b / 2 * 32, b % 2 * 4, r, u + 256 * b);
}

static void pack_q5_k(const uint8_t *src, int r, uint8_t *u) {
    memcpy(u + CPU_Q5_K_D + 2 * r, src, 2);
    memcpy(u + CPU_Q5_K_D + 32 + 2 * r, src + 2, 2);
    pack_scales(src + 4, r, u + CPU_Q5_K_SC, u + CPU_Q5_K_M);
    for (int b = 0; b < BLOCKS_PER_UNIT; b++) {
        uint32_t bits = 0;
        for (int j = 0; j < 8; j++) bits |= (load4(src + 16 + 4 * j) >> b & 0x01010101) << j;
        store4(u + CPU_Q5_K_H + 64 * b + 4 * r, bits);
        pack_nibbles(src + 48 + b / 2 * 32, b % 2 * 4, r, u + 256 * b);
    }
}

static void pack_q6_k(const uint8_t *src, int r, uint8_t *u) {
    float d = load_f16(src + 208);
    memcpy(u + CPU_Q6_K_D + 4 * r, &d, sizeof d);
    for (int i = 0; i < 16; i++) u[CPU_Q6_K_SC + 16 * i + r] = src[192 + i];
    for (int b = 0; b < BLOCKS_PER_UNIT; b++) {
        const uint8_t *high = src + 128 + b / 4 * 32;
        for (int v = 0; v < 2; v++) {
            uint32_t bits = 0;
            for (int i = 0; i < 4; i++)
                bits |= (load4(high + 16 * v + 4 * i) >> b % 4 * 2 & 0x03030303) << 2 * i;
            store4(u + CPU_Q6_K_H + 128 * b + 64 * v + 4 * r, bits);
        }
        pack_nibbles(src + b / 4 * 64 + b % 2 * 32, b % 4 / 2 * 4, r, u + 256 * b);
    }
}

static void pack_q8_0(const uint8_t *src, int r, uint8_t *u) {
    float d = load_f16(src);
    memcpy(u + CPU_Q8_0_D + 4 * r, &d, sizeof d);
    for (int j = 0; j < 8; j++) store4(u + 64 * j + 4 * r, load4(src + 2 + 4 * j) ^ 0x80808080);
}

void cpu_repack_tile(const struct cpu_matrix *m, const uint8_t *rows, int n_rows, uint8_t *tile) {
    CHECK(n_rows >= 1 && n_rows <= CPU_ROWS);
    size_t unit = m->tile_bytes / (size_t)m->n_units;
    if (n_rows < CPU_ROWS) memset(tile, 0, m->tile_bytes);
    for (int r = 0; r < n_rows; r++) {
        const uint8_t *src = rows + (size_t)r * m->row_bytes;
        uint8_t *u = tile;
        for (int32_t i = 0; i < m->n_units; i++, u += unit) {
            switch (m->format) {
            case CPU_Q4_K: pack_q4_k(src + (size_t)i * Q4_K_BYTES, r, u); break;
            case CPU_Q5_K: pack_q5_k(src + (size_t)i * Q5_K_BYTES, r, u); break;
            case CPU_Q6_K: pack_q6_k(src + (size_t)i * Q6_K_BYTES, r, u); break;
            case CPU_Q8_0: pack_q8_0(src + (size_t)i * Q8_0_BYTES, r, u); break;
            case CPU_F32: memcpy(u + 4 * r, src + (size_t)i * 4, 4); break;
            case CPU_F16:
            case CPU_BF16: memcpy(u + 2 * r, src + (size_t)i * 2, 2); break;
            case CPU_N_FORMATS: break;
            }
        }
    }
}

/* ---- back to rows ------------------------------------------------------------------------------- */

/* The 4-bit part of column c (0 … 31) of row r. */
static int nibble(const uint8_t *block, int r, int c) {
    int byte = block[c % 16 / 4 * 64 + 4 * r + c % 4];
    return c < 16 ? byte & 15 : byte >> 4;
}

/* Integers of Q4_K or Q5_K, column c (0 … 31) of block b. */
static int q_scale_min(const uint8_t *u, int r, bool five, int b, int c) {
    int high = five ? u[CPU_Q5_K_H + 64 * b + 4 * r + c % 4] >> c / 4 & 1 : 0;
    return nibble(u + 256 * b, r, c) | high << 4;
}

static void unpack_scale_min(const uint8_t *u, int r, bool five, float *dst) {
    const uint8_t *d_at = u + (five ? CPU_Q5_K_D : CPU_Q4_K_D) + 2 * r;
    float d = load_f16(d_at), dmin = load_f16(d_at + 32);
    for (int b = 0; b < BLOCKS_PER_UNIT; b++) {
        int at = CPU_ROWS * b + r;
        float a = d * (float)u[(five ? CPU_Q5_K_SC : CPU_Q4_K_SC) + at];
        float min = dmin * (float)u[(five ? CPU_Q5_K_M : CPU_Q4_K_M) + at];
        for (int c = 0; c < CPU_BLOCK; c++) {
            int q = q_scale_min(u, r, five, b, c);
            dst[CPU_BLOCK * b + c] = a * (float)q - min;
        }
    }
}

static int q_q6_k(const uint8_t *u, int r, int b, int c) {
    int high = u[CPU_Q6_K_H + 128 * b + c / 16 * 64 + 4 * r + c % 4] >> c % 16 / 4 * 2 & 3;
    return nibble(u + 256 * b, r, c) | high << 4;
}

static void unpack_q6_k(const uint8_t *u, int r, float *dst) {
    float d = load_f32(u + CPU_Q6_K_D + 4 * r);
    for (int b = 0; b < BLOCKS_PER_UNIT; b++) {
        for (int c = 0; c < CPU_BLOCK; c++) {
            int q = q_q6_k(u, r, b, c) - 32;
            float a = d * (float)(int8_t)u[CPU_Q6_K_SC + 16 * (2 * b + c / 16) + r];
            dst[CPU_BLOCK * b + c] = a * (float)q;
        }
    }
}

static void unpack_q8_0(const uint8_t *u, int r, float *dst) {
    float d = load_f32(u + CPU_Q8_0_D + 4 * r);
    for (int c = 0; c < CPU_BLOCK; c++) {
        int q = u[c / 4 * 64 + 4 * r + c % 4] ^ 0x80;
        dst[c] = (float)(int8_t)q * d;
    }
}

void cpu_matrix_row(const struct cpu_matrix *m, int32_t expert, int32_t row, float *dst) {
    CHECK(expert >= 0 && expert < m->n_experts && row >= 0 && row < m->n_rows);
    const uint8_t *u = cpu_matrix_tile(m, expert, row / CPU_ROWS);
    size_t unit = m->tile_bytes / (size_t)m->n_units;
    int r = row % CPU_ROWS;
    for (int32_t i = 0; i < m->n_units; i++, u += unit) {
        uint16_t h;
        switch (m->format) {
        case CPU_Q4_K: unpack_scale_min(u, r, false, dst + (size_t)i * QK_K); break;
        case CPU_Q5_K: unpack_scale_min(u, r, true, dst + (size_t)i * QK_K); break;
        case CPU_Q6_K: unpack_q6_k(u, r, dst + (size_t)i * QK_K); break;
        case CPU_Q8_0: unpack_q8_0(u, r, dst + (size_t)i * CPU_BLOCK); break;
        case CPU_F32: dst[i] = load_f32(u + 4 * r); break;
        case CPU_F16: dst[i] = load_f16(u + 2 * r); break;
        case CPU_BF16:
            memcpy(&h, u + 2 * r, sizeof h);
            dst[i] = bf16_to_f32(h);
            break;
        case CPU_N_FORMATS: break;
        }
    }
}
