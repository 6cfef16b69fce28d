/* norm: embedding rows; and the row-wise kernel that adds the experts' products to the residual stream and
 * normalises it for the next product. One block per row and a fixed number of threads, so that a row's sum of
 * squares is taken in one order. */
#include "cuda/common.cuh"
#include "cuda/meeting.cuh"
#include "cuda/panel.h"

enum : int {
    EMBED_THREADS = 256,
    THREADS = 512,
    RANKS = 8, /* experts' products under way at a time */
    FEW_ROWS = 16
};

static __global__ void __launch_bounds__(EMBED_THREADS)
    k_embed_f32(const __grid_constant__ struct embed_args a) {
    depend_release();
    depend_wait();
    int t = (int)blockIdx.x, k = (int)(blockIdx.y * EMBED_THREADS + threadIdx.x);
    if (t >= a.step.header->n_tokens || k >= a.n_cols) return;
    int id = a.step.ids[t];
    if (id < 0) id = a.slots[a.step.slot[a.step.seq[t]]].last;
    size_t panel = (size_t)(id / PANEL_ROWS) * (size_t)(a.n_cols / PANEL_K) + (size_t)(k / PANEL_K);
    a.h[(size_t)t * (size_t)a.n_cols + (size_t)k] =
        panel_value(a.type, a.table + panel * (size_t)panel_bytes(a.type), id % PANEL_ROWS, k % PANEL_K);
}

cudaError_t cuda_embed(const struct embed_args *a, int bucket, const struct cuda_queue *q) {
    unsigned pieces = (unsigned)((a->n_cols + EMBED_THREADS - 1) / EMBED_THREADS);
    return launch(k_embed_f32, dim3((unsigned)bucket, pieces, 1), EMBED_THREADS, 0, q, *a);
}

/* Sum over the block; every thread gets it. Once per kernel. */
static DEVICE float block_sum(float x) {
    __shared__ float sums[THREADS / 32];
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = sums[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) sum += sums[i];
    return sum;
}

/* A token's experts: where their products lie, and their weights. In shared memory. */
struct ranks {
    int at[MAX_EXPERTS_USED];
    float w[MAX_EXPERTS_USED];
};

/* h[4 i … 4 i + 3] of a row plus the experts' products in rank order. */
static DEVICE float4 combine(const struct norm_args &a, const struct ranks &r, int i, float4 h) {
    float4 s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < a.n_used; first += RANKS) {
        int n = a.n_used - first;
        uint2 y[RANKS];
#pragma unroll
        for (int k = 0; k < RANKS; k++) { /* no branches: all loads are to be under way at once */
            int at = k < n ? r.at[first + k] : 0;
            const uint2 *products = (const uint2 *)a.y[at >> OWNER_SHIFT] + i; /* of another GPU, it may be: past L1 */
            size_t from = (size_t)(at & ((1 << OWNER_SHIFT) - 1)) * (size_t)(a.n_cols / 4);
            y[k] = k < n ? __ldcg(products + from) : make_uint2(0, 0);
        }
#pragma unroll
        for (int k = 0; k < RANKS; k++) {
            float w = k < n ? r.w[first + k] : 0.0f;
            s.x += w * h2_low_f32(y[k].x);
            s.y += w * h2_high_f32(y[k].x);
            s.z += w * h2_low_f32(y[k].y);
            s.w += w * h2_high_f32(y[k].y);
        }
    }
    return make_float4(h.x + s.x, h.y + s.y, h.z + s.z, h.w + s.w);
}

/* QUADS: float4 of a row that a thread may have. */
template <int QUADS>
static __global__ void __launch_bounds__(THREADS, QUADS == 1 ? 2 : 1)
    k_norm_f16(const __grid_constant__ struct norm_args a) {
    const bool few = (int)gridDim.x <= FEW_ROWS; /* then the next kernel may come at once: there is room */
    if (!a.meeting.header && few) depend_release();
    int r = (int)blockIdx.x, n = a.n_cols / 4;
    if (r >= *a.n_rows) return;
    int row = a.rows ? a.rows[r].token : r;
    float4 v[QUADS], norm[QUADS];
    uint32_t epoch = a.meeting.header ? epoch_of(a.meeting) : 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = (int)threadIdx.x + THREADS * j;
        if (a.norm && i < n) norm[j] = ((const float4 *)a.norm)[i];
    }
    if (!a.listed) depend_wait();
    __shared__ struct ranks ranks;
    if (a.y[0] && (int)threadIdx.x < a.n_used) {
        ranks.at[threadIdx.x] = __ldcg(a.row_of + row * a.n_used + (int)threadIdx.x);
        ranks.w[threadIdx.x] = __ldcg(a.weights + row * a.n_used + (int)threadIdx.x);
    }
    float4 *h = (float4 *)(a.h + (size_t)row * (size_t)a.n_cols);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = (int)threadIdx.x + THREADS * j;
        if (i < n) v[j] = __ldcg(h + i);
    }
    __syncthreads();
    if (a.listed) depend_wait();
    if (!a.meeting.header && !few) depend_release();
    if (a.meeting.header) { /* what comes next may fill the GPU, and is let in when nobody waits */
        if (threadIdx.x < 32) meet_for_products(a.meeting, epoch);
        __syncthreads();
        depend_release();
    }
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = (int)threadIdx.x + THREADS * j;
        if (i >= n) break;
        if (a.y[0]) h[i] = v[j] = combine(a, ranks, i, v[j]);
        squares += v[j].x * v[j].x + v[j].y * v[j].y + (v[j].z * v[j].z + v[j].w * v[j].w);
    }
    if (!a.norm) return;
    float inverse = 1.0f / sqrtf(block_sum(squares) / (float)a.n_cols + a.eps);
    uint2 *x = (uint2 *)((uint16_t *)a.x + (size_t)r * (size_t)a.n_cols);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = (int)threadIdx.x + THREADS * j;
        if (i >= n) break;
        x[i] = make_uint2(h2_pack(v[j].x * inverse * norm[j].x, v[j].y * inverse * norm[j].y),
                          h2_pack(v[j].z * inverse * norm[j].z, v[j].w * inverse * norm[j].w));
    }
}

enum : int { FEW_QUADS = 1, MOST_QUADS = MAX_EMBD / 4 / THREADS };

cudaError_t cuda_norm(const struct norm_args *a, int bucket, const struct cuda_queue *q) {
    auto kernel = a->n_cols <= 4 * THREADS * FEW_QUADS ? k_norm_f16<FEW_QUADS> : k_norm_f16<MOST_QUADS>;
    return launch(kernel, dim3((unsigned)bucket, 1, 1), THREADS, 0, q, *a);
}

cudaError_t norm_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_embed_f32);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&ignored, k_norm_f16<FEW_QUADS>);
    return e != cudaSuccess ? e : cudaFuncGetAttributes(&ignored, k_norm_f16<MOST_QUADS>);
}
