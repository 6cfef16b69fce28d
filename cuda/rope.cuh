/* rope: what is done to a head of q or k: RMSNorm, then rotation. Half a warp per head: lane l of 16 has values
 * 4 l … 4 l + 3 (low) and their partners 64 further on (high). For the kernels that write the cache. */
#ifndef MOED_CUDA_ROPE_CUH
#define MOED_CUDA_ROPE_CUH

#include "cuda/common.cuh"

enum : int { ROPE_LANES = 16 };

struct rope_half {
    uint2 low, high;
};

/* What a lane needs besides the head: its norm's weights, and (cos, sin) of its four angles. */
struct rope_turn {
    float norm[2][4], cos[4], sin[4];
};

static DEVICE struct rope_turn rope_turn_at(const float *norm, const float *table, int pos, int lane) {
    const float4 *weights = (const float4 *)norm;
    const float4 *angles = (const float4 *)table + (size_t)pos * (HEAD_DIM / 4) + (size_t)(2 * lane);
    float4 n0 = weights[lane], n1 = weights[lane + ROPE_LANES], a0 = angles[0], a1 = angles[1];
    return {{{n0.x, n0.y, n0.z, n0.w}, {n1.x, n1.y, n1.z, n1.w}},
            {a0.x, a0.z, a1.x, a1.z},
            {a0.y, a0.w, a1.y, a1.w}};
}

/* Head `head` of a row that begins at `from`. */
static DEVICE struct rope_half rope_load(const void *from, size_t head, int lane) {
    const uint2 *src = (const uint2 *)from + head * (HEAD_DIM / 4);
    return {src[lane], src[lane + ROPE_LANES]};
}
static DEVICE void rope_save(void *to, size_t head, int lane, const struct rope_half &v) {
    uint2 *dst = (uint2 *)to + head * (HEAD_DIM / 4);
    dst[lane] = v.low;
    dst[lane + ROPE_LANES] = v.high;
}

/* All lanes of the warp. */
static DEVICE struct rope_half rope_apply(const struct rope_half &v, const struct rope_turn &turn, float eps) {
    float a[4] = {h2_low_f32(v.low.x), h2_high_f32(v.low.x), h2_low_f32(v.low.y), h2_high_f32(v.low.y)};
    float b[4] = {h2_low_f32(v.high.x), h2_high_f32(v.high.x), h2_low_f32(v.high.y), h2_high_f32(v.high.y)};
    float squares = a[0] * a[0] + a[1] * a[1] + (a[2] * a[2] + a[3] * a[3]);
    squares += b[0] * b[0] + b[1] * b[1] + (b[2] * b[2] + b[3] * b[3]);
    for (int i = ROPE_LANES / 2; i > 0; i >>= 1) squares += __shfl_xor_sync(ALL_LANES, squares, i);
    float inverse = rsqrtf(squares * (1.0f / (float)HEAD_DIM) + eps);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x = a[i] * (inverse * turn.norm[0][i]), y = b[i] * (inverse * turn.norm[1][i]);
        a[i] = x * turn.cos[i] - y * turn.sin[i];
        b[i] = x * turn.sin[i] + y * turn.cos[i];
    }
    return {make_uint2(h2_pack(a[0], a[1]), h2_pack(a[2], a[3])),
            make_uint2(h2_pack(b[0], b[1]), h2_pack(b[2], b[3]))};
}

/* Where position `pos` of a KV head lies in the cache: in rows of HEAD_DIM halves. which: 0 key, 1 value. */
static DEVICE size_t rope_cache_row(int32_t block, int n_kv_heads, int head, int which, int pos, int shift) {
    size_t row = ((size_t)block * (size_t)n_kv_heads + (size_t)head) * 2 + (size_t)which;
    return (row << shift) + (size_t)(pos & ((1 << shift) - 1));
}

#endif
