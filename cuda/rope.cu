/* rope: per head, RMSNorm of q and k, rotation, and the write of k and v to the paged cache. Steps in which every
 * sequence has one token do this on attention's way (attention.cu). */
#include "cuda/rope.cuh"

enum : int { THREADS = 128 };

static __global__ void __launch_bounds__(THREADS)
    k_rope_store_f16(const __grid_constant__ struct rope_args a) {
    depend_release();
    int lane = (int)threadIdx.x % ROPE_LANES, n_units = a.n_heads + 2 * a.n_kv_heads;
    int at = (int)(blockIdx.x * (THREADS / ROPE_LANES) + threadIdx.x / ROPE_LANES);
    int t = at / n_units, unit = at % n_units;
    bool real = t < a.step.header->n_tokens; /* the other half of a warp may be real */
    if (!real) t = 0;
    bool is_q = unit < a.n_heads, is_v = unit >= a.n_heads + a.n_kv_heads;
    int head = is_q ? unit : is_v ? unit - a.n_heads - a.n_kv_heads : unit - a.n_heads;
    int heads = is_q ? a.n_heads : a.n_kv_heads, pos = a.step.pos[t];
    size_t row = (size_t)t * (size_t)heads + (size_t)head, to_row = row;
    struct rope_turn turn = rope_turn_at(is_q ? a.q_norm : a.k_norm, a.table, pos, lane);
    if (!is_q) {
        const int32_t *blocks = (const int32_t *)a.step.header + a.step.header->blocks_at +
                                a.step.table[a.step.seq[t]];
        to_row = rope_cache_row(blocks[pos >> a.block_shift], a.n_kv_heads, head, is_v, pos, a.block_shift);
    }
    depend_wait();
    struct rope_half v = rope_load(is_q ? a.q : is_v ? a.v : a.k, row, lane);
    struct rope_half turned = rope_apply(v, turn, a.eps);
    if (real) rope_save(is_q ? a.q : a.kv, to_row, lane, is_v ? v : turned);
}

cudaError_t cuda_rope_store(const struct rope_args *a, int bucket, const struct cuda_queue *q) {
    int per_block = THREADS / ROPE_LANES, n = bucket * (a->n_heads + 2 * a->n_kv_heads);
    return launch(k_rope_store_f16, dim3((unsigned)((n + per_block - 1) / per_block), 1, 1), THREADS, 0, q, *a);
}

cudaError_t rope_prepare(void) {
    cudaFuncAttributes ignored;
    return cudaFuncGetAttributes(&ignored, k_rope_store_f16);
}
