/* quant: the GGUF tensor types as bytes, and their scalar dequantisation: the definition that every
 * faster path is tested against (and that is tested against the gguf Python package, bit for bit).
 * Formats: ggml's block layouts. Pure functions. Private to moe/ and to cuda/ through backend.h's users:
 * cuda/ may include this header too. */
#ifndef MOED_MOE_QUANT_H
#define MOED_MOE_QUANT_H

#include "moe/backend.h"
#include "proto/base.h"

enum {
    QK_K = 256,            /* weights per superblock: Q4_K, Q5_K, Q6_K */
    Q4_K_BYTES = 144,      /* f16 d, f16 dmin, u8 scales[12], u8 qs[128] */
    Q5_K_BYTES = 176,      /* f16 d, f16 dmin, u8 scales[12], u8 qh[32], u8 qs[128] */
    Q6_K_BYTES = 210,      /* u8 ql[128], u8 qh[64], i8 scales[16], f16 d */
    Q8_0_WEIGHTS = 32,
    Q8_0_BYTES = 34        /* f16 d, i8 qs[32] */
};

/* NULL for a type we do not have. "Q4_K". */
const char *tensor_type_name(enum tensor_type type);
/* Weights and bytes of one block (1 and element size for the float types); false: unknown type. */
bool tensor_type_block(enum tensor_type type, int32_t *n_weights, int32_t *n_bytes);
/* Bytes of n weights; false if the type is unknown, n is not whole blocks, or it overflows. */
bool tensor_type_bytes(enum tensor_type type, size_t n_weights, size_t *out);

/* n weights (whole blocks) from src to dst, f32. */
void dequantize(enum tensor_type type, const void *src, size_t n, float *dst);

float f16_to_f32(uint16_t h);   /* exact, subnormals and infinities included */
uint16_t f32_to_f16(float f);   /* round to nearest, ties to even */
static inline float bf16_to_f32(uint16_t h) {
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

#endif
