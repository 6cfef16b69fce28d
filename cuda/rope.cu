/* rope: per head, RMSNorm of q and k, rotation, and the write of k and v to the paged cache. One warp per head: lane l
 * has values 2 l, 2 l + 1 and their partners 64 further on. */
#include "cuda/common.cuh"

enum : int { WARPS = 4 };

static __global__ void __launch_bounds__(32 * WARPS)
    k_rope_store_f16(const __grid_constant__ struct rope_args a) {
    depend_release();
    depend_wait();
    int lane = (int)threadIdx.x & 31, n_units = a.n_heads + 2 * a.n_kv_heads;
    int at = (int)blockIdx.x * WARPS + ((int)threadIdx.x >> 5);
    int t = at / n_units, unit = at % n_units;
    if (t >= a.step.header->n_tokens) return;
    bool is_q = unit < a.n_heads, is_v = unit >= a.n_heads + a.n_kv_heads;
    int head = is_q ? unit : is_v ? unit - a.n_heads - a.n_kv_heads : unit - a.n_heads;
    int heads = is_q ? a.n_heads : a.n_kv_heads, pos = a.step.pos[t];
    const void *from = is_q ? a.q : is_v ? a.v : a.k;
    const h2 *src = (const h2 *)from + ((size_t)t * (size_t)heads + (size_t)head) * (HEAD_DIM / 2);
    h2 low = src[lane], high = src[lane + 32];
    if (!is_v) {
        float x[4] = {h2_low_f32(low), h2_high_f32(low), h2_low_f32(high), h2_high_f32(high)};
        float squares = warp_sum(x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]));
        float inverse = 1.0f / sqrtf(squares / (float)HEAD_DIM + a.eps);
        const float2 *norm = (const float2 *)(is_q ? a.q_norm : a.k_norm);
        float2 n0 = norm[lane], n1 = norm[lane + 32];
        x[0] *= inverse * n0.x, x[1] *= inverse * n0.y;
        x[2] *= inverse * n1.x, x[3] *= inverse * n1.y;
        float4 r = ((const float4 *)a.table)[(size_t)pos * (HEAD_DIM / 4) + (size_t)lane];
        low = h2_pack(x[0] * r.x - x[2] * r.y, x[1] * r.z - x[3] * r.w);
        high = h2_pack(x[0] * r.y + x[2] * r.x, x[1] * r.w + x[3] * r.z);
    }
    h2 *dst = (h2 *)a.q + ((size_t)t * (size_t)heads + (size_t)head) * (HEAD_DIM / 2);
    if (!is_q) {
        const int32_t *blocks = (const int32_t *)a.step.header + a.step.header->blocks_at +
                                a.step.table[a.step.seq[t]];
        size_t block = (size_t)blocks[pos >> a.block_shift];
        size_t row = (block * (size_t)a.n_kv_heads + (size_t)head) * 2 + (is_v ? 1 : 0);
        row = (row << a.block_shift) + (size_t)(pos & ((1 << a.block_shift) - 1));
        dst = (h2 *)a.kv + row * (HEAD_DIM / 2);
    }
    dst[lane] = low;
    dst[lane + 32] = high;
}

cudaError_t cuda_rope_store(const struct rope_args *a, int bucket, const struct cuda_queue *q) {
    int warps = bucket * (a->n_heads + 2 * a->n_kv_heads);
    return launch(k_rope_store_f16, dim3((unsigned)((warps + WARPS - 1) / WARPS), 1, 1), 32 * WARPS, 0,
                  q, *a);
}

cudaError_t rope_prepare(void) {
    cudaFuncAttributes ignored;
    return cudaFuncGetAttributes(&ignored, k_rope_store_f16);
}
