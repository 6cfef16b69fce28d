/* route: which experts each token goes to. Three stages in two launches: partial sums of the logits in true f32
 * (k_router); softmax and top-k per token (k_route_topk), whose last block sorts when the batch is small; otherwise
 * k_route_sort does.
 *
 * A logit is the sum of D / 256 partial sums in order, each over 256 columns in order with fused multiply-adds, of
 * h * norm with the row's 1 / rms applied at the end: one order, whatever tile a token falls into. The sort is a
 * stable counting sort: within an expert, rows stand in the order of their tokens. */
#include "cuda/common.cuh"

/* ---- logits --------------------------------------------------------------------------------------- */

enum : int { SLICE_STEP = 32 };

/* Tiles of TT tokens x TE experts, TM x EM of them per thread, over one slice of the columns. */
template <int TT, int TE, int TM, int EM>
static DEVICE void router_tile(const struct route_args &a) {
    constexpr int threads = TT / TM * (TE / EM);
    __shared__ float xs[SLICE_STEP][TT + 4], ws[SLICE_STEP][TE + 4];
    int n_tokens = a.header->n_tokens, t0 = (int)blockIdx.x * TT, e0 = (int)blockIdx.y * TE;
    int first = (int)blockIdx.z * ROUTE_SLICE, last = min(first + ROUTE_SLICE, a.n_cols);
    if (t0 >= n_tokens) return;
    int te = (int)threadIdx.x % (TE / EM) * EM, tt = (int)threadIdx.x / (TE / EM) * TM;
    float acc[TM][EM] = {};
    for (int k0 = first; k0 < last; k0 += SLICE_STEP) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < TT * SLICE_STEP / 4; i += threads) {
            int t = i / (SLICE_STEP / 4), k = i % (SLICE_STEP / 4) * 4;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (t0 + t < n_tokens)
                v = *(const float4 *)(a.h + (size_t)(t0 + t) * (size_t)a.n_cols + (size_t)(k0 + k));
            float4 n = *(const float4 *)(a.norm + k0 + k);
            xs[k][t] = v.x * n.x, xs[k + 1][t] = v.y * n.y;
            xs[k + 2][t] = v.z * n.z, xs[k + 3][t] = v.w * n.w;
        }
        for (int i = (int)threadIdx.x; i < TE * SLICE_STEP / 4; i += threads) {
            int e = i / (SLICE_STEP / 4), k = i % (SLICE_STEP / 4) * 4;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (e0 + e < a.n_experts)
                v = *(const float4 *)(a.router + (size_t)(e0 + e) * (size_t)a.n_cols + (size_t)(k0 + k));
            ws[k][e] = v.x, ws[k + 1][e] = v.y, ws[k + 2][e] = v.z, ws[k + 3][e] = v.w;
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < SLICE_STEP; k++) {
            float x[TM], w[EM];
#pragma unroll
            for (int i = 0; i < TM; i++) x[i] = xs[k][tt + i];
#pragma unroll
            for (int j = 0; j < EM; j++) w[j] = ws[k][te + j];
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int j = 0; j < EM; j++) acc[i][j] = fmaf(x[i], w[j], acc[i][j]);
        }
    }
    float *out = a.partials + (size_t)blockIdx.z * (size_t)n_tokens * (size_t)a.n_experts;
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < EM; j++)
            if (t0 + tt + i < n_tokens && e0 + te + j < a.n_experts)
                out[(size_t)(t0 + tt + i) * (size_t)a.n_experts + (size_t)(e0 + te + j)] = acc[i][j];
}

static __global__ void __launch_bounds__(128) k_router_few_f32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    router_tile<8, 16, 1, 1>(a);
}

static __global__ void __launch_bounds__(128) k_router_f32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    router_tile<32, 64, 4, 4>(a);
}

/* ---- the stable sort, by one block --------------------------------------------------------------------- */

/* Exclusive prefix sums of counts[n] by one warp; returns the total. */
static DEVICE int warp_prefix(const int *counts, int *before, int n, int lane) {
    int total = 0;
    for (int i0 = 0; i0 < n; i0 += 32) {
        int i = i0 + lane, v = i < n ? counts[i] : 0, sum = v;
        for (int d = 1; d < 32; d <<= 1) {
            int up = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += up;
        }
        if (i < n) before[i] = total + sum - v;
        total += __shfl_sync(ALL_LANES, sum, 31);
    }
    return total;
}

/* Groups cut into tiles of at most `width` tokens, as even as multiples of 8 allow. */
static DEVICE int tile_tokens(int n, int width) {
    int n_tiles = (n + width - 1) / width, even = (n + n_tiles - 1) / n_tiles;
    return (even + 7) / 8 * 8;
}

/* shared: [WARPS][E] cursors, then [E] counts and [E] a spare, then the list lengths' base. */
template <int WARPS> static DEVICE void route_sort(const struct route_args &a, int *shared, bool count_reads) {
    int n_experts = a.n_experts, n_pairs = a.header->n_tokens * a.n_used;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int *cursors = shared, *counts = shared + WARPS * n_experts, *first = counts + n_experts;
    int chunk = (n_pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    int begin = warp * chunk, end = min(begin + chunk, n_pairs);
    for (int i = tid; i < WARPS * n_experts; i += WARPS * 32) cursors[i] = 0;
    __syncthreads();
    int *own = cursors + warp * n_experts;
    for (int i = begin + lane; i - lane < end; i += 32) {
        int e = i < end ? __ldcg(a.lists.ids + i) : -1;
        uint32_t same = __match_any_sync(ALL_LANES, e);
        if (e >= 0 && (same & ((1u << lane) - 1u)) == 0) own[e] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    for (int e = tid; e < n_experts; e += WARPS * 32) {
        int n = 0;
        for (int w = 0; w < WARPS; w++) {
            int c = cursors[w * n_experts + e];
            cursors[w * n_experts + e] = n;
            n += c;
        }
        counts[e] = n;
    }
    __syncthreads();
    if (warp == 0) {
        warp_prefix(counts, first, n_experts, lane);
        if (lane == 0) a.lists.expert_first[n_experts] = n_pairs;
    }
    __syncthreads();
    for (int e = tid; e < n_experts; e += WARPS * 32) a.lists.expert_first[e] = first[e];
    for (int i = begin + lane; i - lane < end; i += 32) {
        int e = i < end ? __ldcg(a.lists.ids + i) : -1;
        uint32_t same = __match_any_sync(ALL_LANES, e);
        int row = e >= 0 ? first[e] + own[e] + __popc(same & ((1u << lane) - 1u)) : 0;
        __syncwarp();
        if (e >= 0 && (same & ((1u << lane) - 1u)) == 0) own[e] += __popc(same);
        __syncwarp();
        if (e < 0) continue;
        a.lists.token_of[row] = i / a.n_used;
        a.lists.row_of[i] = row;
    }
    __syncthreads();
    int *n_tiles = cursors, *tiles_before = cursors + n_experts; /* the cursors are done with */
    for (int list = 0; list < N_WIDTHS; list++) {
        int width = 8 << list;
        for (int e = tid; e < n_experts; e += WARPS * 32) {
            int n = counts[e], w = n > 0 ? tile_tokens(n, width) : 1;
            n_tiles[e] = (n + w - 1) / w;
        }
        __syncthreads();
        if (warp == 0) {
            int total = warp_prefix(n_tiles, tiles_before, n_experts, lane);
            if (lane == 0) a.lists.n_items[list] = total;
        }
        __syncthreads();
        for (int e = tid; e < n_experts; e += WARPS * 32) {
            int n = counts[e], w = n > 0 ? tile_tokens(n, width) : 1;
            struct gemm_item *to = a.lists.items[list] + tiles_before[e];
            for (int at = 0; at < n; at += w)
                *to++ = {e, first[e] + at, min(w, n - at), 0};
        }
        __syncthreads();
    }
    if (!count_reads || warp != 0) return;
    int groups = 0;
    for (int e = lane; e < n_experts; e += 32) groups += counts[e] > 0;
    groups = warp_sum(groups);
    if (lane == 0) {
        uint64_t n = *a.n_reads + (uint64_t)groups;
        *a.n_reads = n;
        a.host_reads[a.header->result] = n;
    }
}

/* ---- softmax and top-k ---------------------------------------------------------------------------------- */

enum : int { TOPK_WARPS = 8, SORT_WARPS = 32, SORT_HERE = 4096 /* pairs that the last block of top-k sorts */ };

/* One warp, one token: probabilities stay in the lanes, expert 32 i + lane in p[i]. */
static DEVICE void choose(const struct route_args &a, int t, float inverse, int lane) {
    constexpr int per_lane = MAX_EXPERTS / 32;
    size_t plane = (size_t)a.header->n_tokens * (size_t)a.n_experts;
    const float *logits = a.partials + (size_t)t * (size_t)a.n_experts;
    int n_slices = (a.n_cols + ROUTE_SLICE - 1) / ROUTE_SLICE, n = (a.n_experts + 31) / 32;
    float p[per_lane], max = -INFINITY;
#pragma unroll
    for (int i = 0; i < per_lane; i++) {
        if (i >= n) break;
        int e = 32 * i + lane;
        p[i] = -INFINITY;
        if (e >= a.n_experts) continue;
        float sum = __ldcg(logits + e);
        for (int s = 1; s < n_slices; s++) sum += __ldcg(logits + s * plane + e);
        p[i] = sum * inverse;
        max = fmaxf(max, p[i]);
    }
    max = warp_max(max);
    float all = 0.0f, kept = 0.0f;
#pragma unroll
    for (int i = 0; i < per_lane; i++)
        if (i < n) all += expf(p[i] - max);
    all = warp_sum(all);
    float mine = 0.0f; /* lane k keeps the weight of rank k */
    int id = 0;
    uint32_t taken = 0; /* bit i: expert 32 i + lane */
    for (int k = 0; k < a.n_used; k++) {
        float best = -INFINITY;
        int at = MAX_EXPERTS;
#pragma unroll
        for (int i = 0; i < per_lane; i++) {
            int e = 32 * i + lane;
            if (i >= n || e >= a.n_experts || (taken >> i & 1u)) continue;
            /* NaN loses to everything but an empty place, so that k distinct ids come out in any case. */
            if (at == MAX_EXPERTS || p[i] > best || (best != best && p[i] == p[i])) best = p[i], at = e;
        }
        for (int d = 16; d > 0; d >>= 1) {
            float other = __shfl_xor_sync(ALL_LANES, best, d);
            int other_at = __shfl_xor_sync(ALL_LANES, at, d);
            bool nan = best != best, other_nan = other != other;
            bool better = other_at != MAX_EXPERTS &&
                          (at == MAX_EXPERTS || other > best || (nan && !other_nan) ||
                           ((other == best || (nan && other_nan)) && other_at < at));
            if (better) best = other, at = other_at;
        }
        if ((at & 31) == lane) taken |= 1u << (at >> 5);
        float w = expf(best - max);
        kept += w;
        if (lane == k) mine = w, id = at;
    }
    if (lane < a.n_used) {
        a.lists.ids[t * a.n_used + lane] = id;
        a.lists.weights[t * a.n_used + lane] = mine / (a.renormalize ? kept : all);
    }
}

extern __shared__ __align__(16) int shared_ints[];

/* One block per token: the row's norm, x for the experts, and by one warp the choice. */
static __global__ void __launch_bounds__(32 * TOPK_WARPS)
    k_route_topk_f32(const __grid_constant__ struct route_args a) {
    __shared__ float sums[TOPK_WARPS];
    __shared__ bool is_last;
    depend_release();
    depend_wait();
    int t = (int)blockIdx.x, n_tokens = a.header->n_tokens, lane = (int)threadIdx.x & 31;
    if (t >= n_tokens) return;
    const float4 *h = (const float4 *)(a.h + (size_t)t * (size_t)a.n_cols);
    const float4 *norm = (const float4 *)a.norm;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < a.n_cols / 4; i += 32 * TOPK_WARPS) {
        float4 v = h[i];
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    squares = warp_sum(squares);
    if (lane == 0) sums[threadIdx.x >> 5] = squares;
    __syncthreads();
    squares = sums[0];
    for (int i = 1; i < TOPK_WARPS; i++) squares += sums[i];
    float inverse = 1.0f / sqrtf(squares / (float)a.n_cols + a.eps);
    if (threadIdx.x < 32) choose(a, t, inverse, lane);
    uint2 *x = (uint2 *)((uint16_t *)a.x + (size_t)t * (size_t)a.n_cols);
    for (int i = (int)threadIdx.x; i < a.n_cols / 4; i += 32 * TOPK_WARPS) {
        float4 v = h[i], w = norm[i];
        x[i] = make_uint2(h2_pack(v.x * inverse * w.x, v.y * inverse * w.y),
                          h2_pack(v.z * inverse * w.z, v.w * inverse * w.w));
    }
    if (n_tokens * a.n_used > SORT_HERE) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(a.ticket, 1u) == (uint32_t)n_tokens - 1u;
        if (is_last) *a.ticket = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    route_sort<TOPK_WARPS>(a, shared_ints, true);
}

static __global__ void __launch_bounds__(32 * SORT_WARPS)
    k_route_sort_i32(const __grid_constant__ struct route_args a, bool count_reads) {
    depend_release();
    depend_wait();
    if (count_reads && a.header->n_tokens * a.n_used <= SORT_HERE) return; /* k_route_topk did it */
    route_sort<SORT_WARPS>(a, shared_ints, count_reads);
}

static size_t sort_shared(const struct route_args *a, int warps) {
    return (size_t)(warps + 2) * (size_t)a->n_experts * sizeof(int);
}

static cudaError_t launch_sort(const struct route_args *a, bool count_reads, const struct cuda_queue *q) {
    return launch(k_route_sort_i32, dim3(1, 1, 1), 32 * SORT_WARPS, sort_shared(a, SORT_WARPS), q, *a,
                  count_reads);
}

cudaError_t cuda_route(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    bool few = bucket <= 64;
    int tt = few ? 8 : 32, te = few ? 16 : 64;
    dim3 grid((unsigned)((bucket + tt - 1) / tt), (unsigned)((a->n_experts + te - 1) / te),
              (unsigned)((a->n_cols + ROUTE_SLICE - 1) / ROUTE_SLICE));
    cudaError_t e = few ? launch(k_router_few_f32, grid, 128, 0, q, *a)
                        : launch(k_router_f32, grid, 128, 0, q, *a);
    if (e != cudaSuccess) return e;
    e = launch(k_route_topk_f32, dim3((unsigned)bucket, 1, 1), 32 * TOPK_WARPS,
               sort_shared(a, TOPK_WARPS), q, *a);
    if (e != cudaSuccess || bucket * a->n_used <= SORT_HERE) return e;
    return launch_sort(a, true, q);
}

cudaError_t cuda_route_sort(const struct route_args *a, const struct cuda_queue *q) {
    return launch_sort(a, false, q);
}

cudaError_t route_prepare(size_t max_shared) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_router_few_f32);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&ignored, k_router_f32);
    if (e != cudaSuccess) return e;
    e = cudaFuncSetAttribute(k_route_sort_i32, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)max_shared);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(k_route_topk_f32, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (TOPK_WARPS + 2) * MAX_EXPERTS * (int)sizeof(int));
}
