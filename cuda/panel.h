/* panel: how a weight matrix lies in GPU memory. Plain C and CUDA, so that the layout is tested without a
 * GPU and the loader, the embedding and the tests share one definition.
 *
 * A panel is 16 rows x 256 columns, stored as a header (scales, as the file has them) and four units of 64
 * columns. Inside a unit every lane of a warp finds its own values in the order in which the A operand of
 * mma.m16n8k16 wants them, so that a lane copies and reads 16 bytes at a time and no value is ever shuffled.
 * Panels of a row block follow each other along the columns; row blocks follow each other; experts are
 * outermost. For quantised types a panel has as many bytes as its 16 x 256 weights have in the file.
 *
 * Which weight is where, as the instruction has it: lane = 4 g + t holds rows g and g + 8. Step s of a unit takes its
 * columns 16 s … 16 s + 15; register r of the step's four holds row g + 8 (r & 1), columns
 * 16 s + 8 (r >> 1) + 2 t + {0, 1} in its low and high half.
 *
 * Formats: ggml's block layouts (moe/quant.h). Pure functions. Private to cuda/ and its tests. */
#ifndef MOED_CUDA_PANEL_H
#define MOED_CUDA_PANEL_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define PANEL_FN __host__ __device__ static inline
#else
#define PANEL_FN static inline
#endif

enum {
    PANEL_ROWS = 16,
    PANEL_K = 256,
    PANEL_UNITS = 4,
    PANEL_UNIT_K = 64,
    PANEL_LANES = 32
};

/* How the weights of a panel are kept. BF16 and F32 matrices become F16. */
enum panel_type { PANEL_Q4_K, PANEL_Q5_K, PANEL_Q6_K, PANEL_Q8_0, PANEL_F16, PANEL_N_TYPES };

/* What a matrix is made from: GGUF's types, and how many bytes 256 of its weights take in the file. */
enum panel_source {
    SOURCE_Q4_K, SOURCE_Q5_K, SOURCE_Q6_K, SOURCE_Q8_0, SOURCE_F16, SOURCE_BF16, SOURCE_F32
};

/* Header: Q4_K and Q5_K: 16 bytes per row {f16 d, f16 dmin, u8 scales[12]}. Q6_K: 16 bytes per row, the
 * scales of its 16-column blocks, each + 128; then 16 f16 d. Q8_0: 8 f16
 * d per row. */
PANEL_FN int panel_header_bytes(int type) {
    return type == PANEL_F16 ? 0 : type == PANEL_Q6_K ? 288 : 256;
}

/* A unit: Q4_K: 16 bytes per lane. Q5_K and Q6_K: the same for the low 4 bits, then 4 or 8 bytes per
 * lane for the high ones. Q8_0: two, F16: four runs of 16 bytes per lane. */
PANEL_FN int panel_unit_bytes(int type) {
    return type == PANEL_Q4_K   ? 512
           : type == PANEL_Q5_K ? 640
           : type == PANEL_Q6_K ? 768
           : type == PANEL_Q8_0 ? 1024
                                : 2048;
}

PANEL_FN int panel_bytes(int type) {
    return panel_header_bytes(type) + PANEL_UNITS * panel_unit_bytes(type);
}

PANEL_FN int panel_of_source(int source) {
    return source <= SOURCE_F16 ? source : PANEL_F16;
}

PANEL_FN int source_bytes(int source) { /* of 256 weights */
    return source == SOURCE_Q4_K   ? 144
           : source == SOURCE_Q5_K ? 176
           : source == SOURCE_Q6_K ? 210
           : source == SOURCE_Q8_0 ? 272
           : source == SOURCE_F32  ? 1024
                                   : 512;
}

/* ---- numbers ------------------------------------------------------------------------------- */

PANEL_FN uint16_t panel_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

PANEL_FN float panel_f32_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

PANEL_FN float panel_f16(uint16_t h) { /* exact */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return panel_f32_bits(sign | 0x7f800000u | mantissa << 13);
    return panel_f32_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* To nearest, ties to even; beyond the largest finite f16 it saturates, because an infinite weight would turn
 * a whole row into NaN. NaN stays NaN. */
PANEL_FN uint16_t panel_to_f16(uint32_t u) { /* u: the bits of an f32 */
    uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477fe000u) return (uint16_t)(sign | 0x7bffu); /* 65504 */
    if (magnitude < 0x38800000u) { /* below 2^-14: in units of 2^-24 */
        if (magnitude < 0x33000000u) return (uint16_t)sign;
        uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u);
        uint32_t half = 1u << (shift - 1u);
        if (rest > half || (rest == half && (kept & 1u))) kept++;
        return (uint16_t)(sign | kept);
    }
    uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | rounded >> 13);
}

/* ---- where a weight is ------------------------------------------------------------------------ */

struct panel_at {
    int unit, lane, step, reg, half;
};

PANEL_FN struct panel_at panel_find(int row, int k) {
    struct panel_at a;
    a.unit = k / PANEL_UNIT_K;
    a.lane = (row & 7) * 4 + k % 8 / 2;
    a.step = k % PANEL_UNIT_K / 16;
    a.reg = k % 16 / 8 * 2 + row / 8;
    a.half = k % 2;
    return a;
}

PANEL_FN int panel_row(int lane, int reg) { return (lane >> 2) + 8 * (reg & 1); }
PANEL_FN int panel_k(int unit, int lane, int step, int reg, int half) {
    return unit * PANEL_UNIT_K + step * 16 + (reg >> 1) * 8 + (lane & 3) * 2 + half;
}

/* Low 4 bits: bit position in the step's word. High bits of Q6_K: position in word step / 2; of Q5_K: in
 * the unit's only word. The kernels mask them out in place, without moving the values apart. */
PANEL_FN int panel_low_bit(int reg, int half) { return 4 * reg + 16 * half; }
PANEL_FN int panel_high_base(int reg) { return reg == 0 ? 4 : reg == 1 ? 8 : reg == 2 ? 0 : 12; }
PANEL_FN int panel_q6_bit(int step, int reg, int half) {
    return panel_high_base(reg) + 2 * (step & 1) + 16 * half;
}
PANEL_FN int panel_q5_bit(int step, int reg, int half) {
    return panel_high_base(reg) + step + 16 * half;
}

/* ---- from the file ------------------------------------------------------------------------------- */

/* The unsigned integer that weight k of 256 has in the file (Q8_0: + 128). */
PANEL_FN uint32_t source_quant(int source, const uint8_t *p, int k) {
    int i = k / 32, j = k % 32;
    switch (source) {
    case SOURCE_Q4_K: return (uint32_t)(p[16 + i / 2 * 32 + j] >> i % 2 * 4 & 15);
    case SOURCE_Q5_K:
        return (uint32_t)((p[48 + i / 2 * 32 + j] >> i % 2 * 4 & 15) | (p[16 + j] >> i & 1) << 4);
    case SOURCE_Q6_K:
        return (uint32_t)((p[i / 4 * 64 + i % 2 * 32 + j] >> i % 4 / 2 * 4 & 15) |
                          (p[128 + i / 4 * 32 + j] >> i % 4 * 2 & 3) << 4);
    default: return (uint32_t)(p[i * 34 + 2 + j] ^ 0x80);
    }
}

/* The f16 bits that weight k of a float type becomes. */
PANEL_FN uint16_t source_half(int source, const uint8_t *p, int k) {
    if (source == SOURCE_F16) return panel_u16(p + 2 * k);
    if (source == SOURCE_BF16) return panel_to_f16((uint32_t)panel_u16(p + 2 * k) << 16);
    p += 4 * k;
    return panel_to_f16((uint32_t)panel_u16(p) | (uint32_t)panel_u16(p + 2) << 16);
}

/* One row's share of the header, from the row's 256 weights. */
PANEL_FN void panel_pack_header(int source, const uint8_t *src, int row, uint8_t *panel) {
    uint8_t *dst = panel + 16 * row;
    switch (source) {
    case SOURCE_Q4_K:
    case SOURCE_Q5_K:
        for (int i = 0; i < 16; i++) dst[i] = src[i];
        break;
    case SOURCE_Q6_K:
        for (int i = 0; i < 16; i++) dst[i] = (uint8_t)(src[192 + i] ^ 0x80);
        panel[256 + 2 * row] = src[208];
        panel[256 + 2 * row + 1] = src[209];
        break;
    case SOURCE_Q8_0:
        for (int i = 0; i < 8; i++) {
            dst[2 * i] = src[34 * i];
            dst[2 * i + 1] = src[34 * i + 1];
        }
        break;
    default: break;
    }
}

PANEL_FN void panel_put32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> 8 * i);
}
PANEL_FN uint32_t panel_get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Everything one lane has in one unit. src + r * stride: the 256 weights of row r; rows >= n_rows are absent
 * and become zeros (in the integers; their scales are zero too). */
PANEL_FN void panel_pack_lane(int source, const uint8_t *src, size_t stride, int n_rows, int unit,
                              int lane, uint8_t *panel) {
    int type = panel_of_source(source);
    uint8_t *dst = panel + panel_header_bytes(type) + unit * panel_unit_bytes(type);
    uint32_t high[2] = {0, 0};
    for (int step = 0; step < 4; step++) {
        uint32_t low = 0;
        for (int reg = 0; reg < 4; reg++) {
            for (int half = 0; half < 2; half++) {
                int row = panel_row(lane, reg), k = panel_k(unit, lane, step, reg, half);
                const uint8_t *p = src + (size_t)row * stride;
                if (type == PANEL_F16) {
                    uint16_t h = row < n_rows ? source_half(source, p, k) : (uint16_t)0;
                    uint8_t *at = dst + step * 512 + lane * 16 + reg * 4 + half * 2;
                    at[0] = (uint8_t)h;
                    at[1] = (uint8_t)(h >> 8);
                    continue;
                }
                uint32_t q = row < n_rows ? source_quant(source, p, k) : 0;
                if (type == PANEL_Q8_0)
                    dst[step / 2 * 512 + lane * 16 + step % 2 * 8 + (reg >> 1) * 4 + (reg & 1) * 2 +
                        half] = (uint8_t)q;
                low |= (q & 15u) << panel_low_bit(reg, half);
                if (type == PANEL_Q6_K) high[step / 2] |= q >> 4 << panel_q6_bit(step, reg, half);
                if (type == PANEL_Q5_K) high[0] |= q >> 4 << panel_q5_bit(step, reg, half);
            }
        }
        if (type <= PANEL_Q6_K) panel_put32(dst + lane * 16 + step * 4, low);
    }
    if (type == PANEL_Q5_K) panel_put32(dst + 512 + lane * 4, high[0]);
    if (type == PANEL_Q6_K) {
        panel_put32(dst + 512 + lane * 8, high[0]);
        panel_put32(dst + 512 + lane * 8 + 4, high[1]);
    }
}

/* ---- back to a number ------------------------------------------------------------------------------- */

PANEL_FN uint32_t panel_quant(int type, const uint8_t *panel, int row, int k) {
    struct panel_at a = panel_find(row, k);
    const uint8_t *p = panel + panel_header_bytes(type) + a.unit * panel_unit_bytes(type);
    if (type == PANEL_Q8_0)
        return p[a.step / 2 * 512 + a.lane * 16 + a.step % 2 * 8 + (a.reg >> 1) * 4 + (a.reg & 1) * 2 +
                 a.half];
    uint32_t q = panel_get32(p + a.lane * 16 + a.step * 4) >> panel_low_bit(a.reg, a.half) & 15u;
    if (type == PANEL_Q5_K)
        q |= (panel_get32(p + 512 + a.lane * 4) >> panel_q5_bit(a.step, a.reg, a.half) & 1u) << 4;
    if (type == PANEL_Q6_K)
        q |= (panel_get32(p + 512 + a.lane * 8 + a.step / 2 * 4) >>
                  panel_q6_bit(a.step, a.reg, a.half) & 3u) << 4;
    return q;
}

/* The weight, with dequantize()'s float operations in its order; the compiler must not fuse them. */
PANEL_FN float panel_value(int type, const uint8_t *panel, int row, int k) {
    const uint8_t *h = panel + 16 * row;
    int i = k / 32;
    if (type == PANEL_F16) {
        struct panel_at a = panel_find(row, k);
        return panel_f16(panel_u16(panel + a.unit * 2048 + a.step * 512 + a.lane * 16 + a.reg * 4 +
                                   a.half * 2));
    }
    int q = (int)panel_quant(type, panel, row, k);
    if (type == PANEL_Q8_0) return (float)(q - 128) * panel_f16(panel_u16(h + 2 * i));
    if (type == PANEL_Q6_K) {
        int scale = (int)h[k / 16] - 128;
        float a = panel_f16(panel_u16(panel + 256 + 2 * row)) * (float)scale;
        return a * (float)(q - 32);
    }
    const uint8_t *s = h + 4;
    int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4;
    int min = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4;
    float a = panel_f16(panel_u16(h)) * (float)scale, b = panel_f16(panel_u16(h + 2)) * (float)min;
    return a * (float)q - b;
}

/* ---- the scale of a matrix ---------------------------------------------------------------------------- */

/* The kernels read integers as f16 subnormals (q * 2^-24, free of any conversion) and multiply by scales that
 * are 2^(24 - e) times the true ones, so that what a product sums is 2^-e times the true weight. e is as
 * small as the largest scale of the matrix allows, which keeps small weights out of f16's subnormals. d_max:
 * the largest |d| of the matrix. */
PANEL_FN int panel_exponent(int type, float d_max) {
    float factor = type == PANEL_Q6_K ? 128.0f : 63.0f; /* the largest integer scale */
    float bound = 65504.0f / factor;
    int e = -6;
    if (type > PANEL_Q6_K) return 0;
    /* d_max * 2^(24 - e) < bound; the range keeps 2^-e and its parts representable in f16. */
    while (e < 14 && !(d_max * panel_f32_bits((uint32_t)(127 + 24 - e) << 23) < bound)) e++;
    return e;
}

#endif
