/* norm: embedding rows; and the row-wise kernel that adds the experts' products to the residual stream and
 * normalises it for the next product. One block per row and a fixed number of threads, so that a row's sum of
 * squares is taken in one order. */
#include "cuda/common.cuh"
#include "cuda/panel.h"

enum : int { THREADS = 256 };

static __global__ void __launch_bounds__(THREADS)
    k_embed_f32(const __grid_constant__ struct embed_args a) {
    depend_release();
    depend_wait();
    int t = (int)blockIdx.x;
    if (t >= a.step.header->n_tokens) return;
    int id = a.step.ids[t];
    if (id < 0) id = a.slots[a.step.slot[a.step.seq[t]]].last;
    int n_panels = a.n_cols / PANEL_K;
    const uint8_t *row = a.table + (size_t)(id / PANEL_ROWS) * (size_t)n_panels *
                                       (size_t)panel_bytes(a.type);
    for (int k = (int)threadIdx.x; k < a.n_cols; k += THREADS)
        a.h[(size_t)t * (size_t)a.n_cols + (size_t)k] =
            panel_value(a.type, row + (size_t)(k / PANEL_K) * (size_t)panel_bytes(a.type),
                        id % PANEL_ROWS, k % PANEL_K);
}

cudaError_t cuda_embed(const struct embed_args *a, int bucket, const struct cuda_queue *q) {
    return launch(k_embed_f32, dim3((unsigned)bucket, 1, 1), THREADS, 0, q, *a);
}

/* Sum over the block; every thread gets it. */
static DEVICE float block_sum(float x, float *shared) {
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = shared[0];
    for (int i = 1; i < THREADS / 32; i++) sum += shared[i];
    return sum;
}

/* h[i … i + 3] of row `row` plus the experts' products in rank order. */
static DEVICE float4 combine(const struct norm_args &a, int row, int i, float4 h) {
    float4 s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int k = 0; k < a.n_used; k++) {
        float w = a.weights[row * a.n_used + k];
        size_t at = (size_t)a.row_of[row * a.n_used + k] * (size_t)a.n_cols + (size_t)i;
        uint2 y = *(const uint2 *)((const uint16_t *)a.y + at);
        s.x += w * h2_low_f32(y.x);
        s.y += w * h2_high_f32(y.x);
        s.z += w * h2_low_f32(y.y);
        s.w += w * h2_high_f32(y.y);
    }
    return make_float4(h.x + s.x, h.y + s.y, h.z + s.z, h.w + s.w);
}

extern __shared__ __align__(16) float4 row_values[]; /* [D / 4] */

static __global__ void __launch_bounds__(THREADS)
    k_norm_f16(const __grid_constant__ struct norm_args a) {
    __shared__ float sums[THREADS / 32];
    depend_release();
    depend_wait();
    int r = (int)blockIdx.x;
    if (r >= *a.n_rows) return;
    int row = a.rows ? a.rows[r].token : r, n = a.n_cols / 4;
    float4 *h = (float4 *)(a.h + (size_t)row * (size_t)a.n_cols);
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        float4 v = h[i];
        if (a.y) {
            v = combine(a, row, 4 * i, v);
            h[i] = v;
        }
        row_values[i] = v;
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    if (!a.norm) return;
    float inverse = 1.0f / sqrtf(block_sum(squares, sums) / (float)a.n_cols + a.eps);
    const float4 *norm = (const float4 *)a.norm;
    uint2 *x = (uint2 *)((uint16_t *)a.x + (size_t)r * (size_t)a.n_cols);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        float4 v = row_values[i], w = norm[i];
        x[i] = make_uint2(h2_pack(v.x * inverse * w.x, v.y * inverse * w.y),
                          h2_pack(v.z * inverse * w.z, v.w * inverse * w.w));
    }
}

cudaError_t cuda_norm(const struct norm_args *a, int bucket, const struct cuda_queue *q) {
    return launch(k_norm_f16, dim3((unsigned)bucket, 1, 1), THREADS,
                  (size_t)a->n_cols * sizeof(float), q, *a);
}

cudaError_t norm_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_embed_f32);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(k_norm_f16, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                MAX_EMBD * (int)sizeof(float));
}
