/* quant: sizes and scalar dequantisation of the GGUF tensor types; see quant.h.
 *
 * Pure functions, any thread. The block layouts and the order of the float operations are ggml's
 * (ggml-common.h, ggml-quants.c); results equal the gguf Python package's bit for bit, which is why no
 * product here may be fused or reordered. */
#include "moe/quant.h"

#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF data is read as little-endian");

static const struct type_row {
    enum tensor_type type;
    const char *name;
    int32_t n_weights, n_bytes; /* of one block */
} type_rows[] = {
    {TENSOR_F32, "F32", 1, 4},
    {TENSOR_F16, "F16", 1, 2},
    {TENSOR_BF16, "BF16", 1, 2},
    {TENSOR_Q8_0, "Q8_0", Q8_0_WEIGHTS, Q8_0_BYTES},
    {TENSOR_Q4_K, "Q4_K", QK_K, Q4_K_BYTES},
    {TENSOR_Q5_K, "Q5_K", QK_K, Q5_K_BYTES},
    {TENSOR_Q6_K, "Q6_K", QK_K, Q6_K_BYTES},
};

static const struct type_row *type_find(enum tensor_type type) {
    for (size_t i = 0; i < sizeof type_rows / sizeof *type_rows; i++)
        if (type_rows[i].type == type) return &type_rows[i];
    return NULL;
}

const char *tensor_type_name(enum tensor_type type) {
    const struct type_row *r = type_find(type);
    return r ? r->name : NULL;
}

bool tensor_type_block(enum tensor_type type, int32_t *n_weights, int32_t *n_bytes) {
    const struct type_row *r = type_find(type);
    if (!r) return false;
    *n_weights = r->n_weights;
    *n_bytes = r->n_bytes;
    return true;
}

bool tensor_type_bytes(enum tensor_type type, size_t n_weights, size_t *out) {
    const struct type_row *r = type_find(type);
    if (!r || n_weights % (size_t)r->n_weights != 0) return false;
    return size_mul(n_weights / (size_t)r->n_weights, (size_t)r->n_bytes, out);
}

static float f32_from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = h >> 10 & 0x1F, mantissa = h & 0x3FF;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, which f32 holds exactly */
        float magnitude = (float)mantissa * 0x1p-24f;
        return f32_from_bits(f32_bits(magnitude) | sign);
    }
    if (exponent == 0x1F) return f32_from_bits(sign | 0x7F800000u | mantissa << 13);
    return f32_from_bits(sign | (exponent + (127 - 15)) << 23 | mantissa << 13);
}

uint16_t f32_to_f16(float f) {
    uint32_t u = f32_bits(f);
    uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
    if (magnitude > 0x7F800000u) { /* NaN stays NaN even if its payload lay in the bits dropped */
        return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    }
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00); /* 65520 and above */
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal, in units of 2^-24 */
        if (magnitude < 0x33000000u) return (uint16_t)sign; /* below 2^-25 */
        uint32_t shift = 126 - (magnitude >> 23);
        uint32_t mantissa = (magnitude & 0x7FFFFF) | 0x800000;
        uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
        uint32_t half = 1u << (shift - 1);
        if (rest > half || (rest == half && (kept & 1))) kept++;
        return (uint16_t)(sign | kept);
    }
    /* Rounding may carry into the exponent, which is what the next power of two needs. */
    uint32_t rounded = magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | rounded >> 13);
}

static float read_f16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return f16_to_f32(h);
}

static void q8_0_block(const uint8_t *p, float *dst) {
    float d = read_f16(p);
    for (int i = 0; i < Q8_0_WEIGHTS; i++) dst[i] = (float)(int8_t)p[2 + i] * d;
}

/* Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minimums in 12 bytes: the first four of each
 * in the low bits of bytes 0 … 7; the others' low four bits in bytes 8 … 11 and their high two on
 * top of bytes 0 … 7. */
static void scale_min(const uint8_t *s, int i, uint8_t *scale, uint8_t *min) {
    if (i < 4) {
        *scale = s[i] & 63;
        *min = s[i + 4] & 63;
    } else {
        *scale = (uint8_t)((s[i + 4] & 15) | (s[i - 4] >> 6) << 4);
        *min = (uint8_t)(s[i + 4] >> 4 | (s[i] >> 6) << 4);
    }
}

static void q4_k_block(const uint8_t *p, float *dst) {
    float d = read_f16(p), dmin = read_f16(p + 2);
    const uint8_t *scales = p + 4, *qs = p + 16;
    for (int i = 0; i < 8; i++) { /* 32 weights share a scale; two such groups share 32 bytes */
        uint8_t scale, min;
        scale_min(scales, i, &scale, &min);
        float a = d * (float)scale, b = dmin * (float)min;
        const uint8_t *q = qs + i / 2 * 32;
        int shift = i % 2 * 4;
        for (int j = 0; j < 32; j++) dst[i * 32 + j] = a * (float)(q[j] >> shift & 15) - b;
    }
}

static void q5_k_block(const uint8_t *p, float *dst) {
    float d = read_f16(p), dmin = read_f16(p + 2);
    const uint8_t *scales = p + 4, *qh = p + 16, *qs = p + 48;
    for (int i = 0; i < 8; i++) { /* as Q4_K; bit i of qh[j] is the fifth bit */
        uint8_t scale, min;
        scale_min(scales, i, &scale, &min);
        float a = d * (float)scale, b = dmin * (float)min;
        const uint8_t *q = qs + i / 2 * 32;
        int shift = i % 2 * 4;
        for (int j = 0; j < 32; j++) {
            int v = (q[j] >> shift & 15) | (qh[j] >> i & 1) << 4;
            dst[i * 32 + j] = a * (float)v - b;
        }
    }
}

static void q6_k_block(const uint8_t *p, float *dst) {
    const uint8_t *ql = p, *qh = p + 128, *scales = p + 192;
    float d = read_f16(p + 208);
    for (int i = 0; i < 8; i++) { /* 32 weights; scales are per 16 */
        const uint8_t *low = ql + i / 4 * 64 + i % 2 * 32, *high = qh + i / 4 * 32;
        int low_shift = i % 4 / 2 * 4, high_shift = i % 4 * 2;
        for (int j = 0; j < 32; j++) {
            int q = ((low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4) - 32;
            float a = d * (float)(int8_t)scales[i * 2 + j / 16];
            dst[i * 32 + j] = a * (float)q;
        }
    }
}

void dequantize(enum tensor_type type, const void *src, size_t n, float *dst) {
    const struct type_row *r = type_find(type);
    CHECK(r && n % (size_t)r->n_weights == 0);
    if (n == 0) return;
    const uint8_t *p = src;
    size_t n_blocks = n / (size_t)r->n_weights, block_bytes = (size_t)r->n_bytes;
    switch (type) {
    case TENSOR_F32: memcpy(dst, src, n * sizeof *dst); return;
    case TENSOR_F16:
        for (size_t i = 0; i < n; i++) dst[i] = read_f16(p + 2 * i);
        return;
    case TENSOR_BF16:
        for (size_t i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, p + 2 * i, sizeof h);
            dst[i] = bf16_to_f32(h);
        }
        return;
    case TENSOR_Q8_0:
        for (size_t i = 0; i < n_blocks; i++)
            q8_0_block(p + i * block_bytes, dst + i * Q8_0_WEIGHTS);
        return;
    case TENSOR_Q4_K:
        for (size_t i = 0; i < n_blocks; i++) q4_k_block(p + i * block_bytes, dst + i * QK_K);
        return;
    case TENSOR_Q5_K:
        for (size_t i = 0; i < n_blocks; i++) q5_k_block(p + i * block_bytes, dst + i * QK_K);
        return;
    case TENSOR_Q6_K:
        for (size_t i = 0; i < n_blocks; i++) q6_k_block(p + i * block_bytes, dst + i * QK_K);
        return;
    }
}
