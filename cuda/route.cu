/* route: the experts' input x, and which experts each token goes to: logits in true f32, softmax, top-k, and the sort
 * of the pairs by expert (route_sort.cuh).
 *
 * A logit is 1 / rms times the sum, in a fixed tree, of 32 slices of the columns: slice l has columns 128 j + 4 l
 * + {0 … 3} for all j, added up in that order with fused multiply-adds of h and (router * norm). A lane of a
 * warp takes a slice (k_route_few), or a thread takes four slices of several tokens and experts (k_router_many): the
 * same sums either way.
 *
 * Small steps are one launch: a block has WARPS experts and ROUTE_CHUNK tokens (a chunk), the last block of a chunk chooses, one token
 * per warp, and the last chunk sorts. Large ones are k_router_many, then k_route_choose, whose last block sorts up
 * to SORT_HERE pairs; k_route_sort does the rest. */
#include "cuda/common.cuh"
#include "cuda/route_sort.cuh"

enum : int {
    WARPS = 8,
    HELD = 16,          /* 128 columns each: of the router, in registers */
    FEW_TOKENS = 64,    /* that k_route_few takes */
    SORT_WARPS = 32,
    SORT_HERE = 4096    /* pairs that the last block sorts at once */
};

static_assert((int)ROUTE_CHUNK == (int)WARPS && (int)ROUTE_CHUNK <= (int)SMALL_TOKENS,
              "a warp chooses for one token of a chunk");

extern __shared__ __align__(16) int shared_ints[];

/* ---- one row, by one warp ------------------------------------------------------------------------------ */

static DEVICE float row_inverse(const struct route_args &a, const float4 *h, int lane) {
    float squares = 0.0f;
#pragma unroll 8
    for (int i = lane; i < a.n_cols / 4; i += 32) {
        float4 v = h[i];
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    return 1.0f / sqrtf(warp_sum(squares) / (float)a.n_cols + a.eps);
}

/* x of a row, columns 128 i … for i = first, first + step, …. */
static DEVICE void write_x(const struct route_args &a, const float4 *h, int t, float inverse, int first, int step,
                           int lane) {
    const float4 *norm = (const float4 *)a.norm;
    uint2 *x = (uint2 *)((uint16_t *)a.x + (size_t)t * (size_t)a.n_cols);
#pragma unroll 4
    for (int i = 32 * first + lane; i < a.n_cols / 4; i += 32 * step) {
        float4 v = h[i], w = norm[i];
        x[i] = make_uint2(h2_pack(v.x * inverse * w.x, v.y * inverse * w.y),
                          h2_pack(v.z * inverse * w.z, v.w * inverse * w.w));
    }
}

/* Floats as integers of the same order; NaN loses to everything but an empty place (0). */
static DEVICE uint32_t order_key(float x) {
    uint32_t u = __float_as_uint(x + 0.0f); /* -0 is 0 */
    return x != x ? 1u : u & 0x80000000u ? ~u : u | 0x80000000u;
}
static DEVICE float key_value(uint32_t key) {
    return key == 1u ? NAN : __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The token's experts and weights from its logits, of which lane l has expert 32 i + l in p[i]. ids: in shared
 * memory too, unless NULL. */
template <int PER_LANE>
static DEVICE void choose(const struct route_args &a, int t, const float (&p)[PER_LANE], int *ids, int lane) {
    uint32_t keys[PER_LANE];
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        keys[i] = 32 * i + lane < a.n_experts ? order_key(p[i]) : 0u;
        max = fmaxf(max, p[i]);
    }
    max = warp_max(max);
    float value = 0.0f; /* lane k: of rank k */
    int id = 0;
    for (int k = 0; k < a.n_used; k++) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) best = keys[i] > best ? keys[i] : best;
        best = __reduce_max_sync(ALL_LANES, best);
        uint32_t at = MAX_EXPERTS;
#pragma unroll
        for (int i = PER_LANE - 1; i >= 0; i--)
            if (keys[i] == best) at = (uint32_t)(32 * i + lane);
        at = __reduce_min_sync(ALL_LANES, at);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (at == (uint32_t)(32 * i + lane)) keys[i] = 0;
        if (lane == k) value = key_value(best), id = (int)at;
    }
    bool kept = lane < a.n_used;
    float weight = kept ? expf(value - max) : 0.0f, sum;
    if (a.renormalize) {
        sum = warp_sum(weight);
    } else {
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (32 * i + lane < a.n_experts) sum += expf(p[i] - max);
        sum = warp_sum(sum);
    }
    if (!kept) return;
    a.lists.ids[t * a.n_used + lane] = id;
    a.lists.weights[t * a.n_used + lane] = weight / sum;
    if (ids) ids[lane] = id;
}

/* choose() from logits in memory: n_groups planes of partial sums, 1 or 8. */
template <int PER_LANE>
static DEVICE void choose_from(const struct route_args &a, int t, int n_groups, float inverse, int *ids, int lane) {
    const float *logits = a.partials + (size_t)t * (size_t)a.n_experts;
    size_t plane = (size_t)a.header->n_tokens * (size_t)a.n_experts;
    float p[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int e = 32 * i + lane;
        p[i] = -INFINITY;
        if (e >= a.n_experts) continue;
        float s[ROUTE_GROUPS];
#pragma unroll
        for (int g = 0; g < ROUTE_GROUPS; g++) s[g] = g < n_groups ? __ldcg(logits + g * plane + e) : 0.0f;
        if (n_groups > 1) s[0] = (s[0] + s[1] + (s[2] + s[3])) + (s[4] + s[5] + (s[6] + s[7]));
        p[i] = s[0] * inverse;
    }
    choose<PER_LANE>(a, t, p, ids, lane);
}

static DEVICE void choose_any(const struct route_args &a, int t, int n_groups, float inverse, int *ids, int lane) {
    if (a.n_experts <= 128) choose_from<4>(a, t, n_groups, inverse, ids, lane);
    else choose_from<MAX_EXPERTS / 32>(a, t, n_groups, inverse, ids, lane);
}

/* ---- blocks that finish last ------------------------------------------------------------------------------- */

/* What this block wrote is to be seen by the last of n blocks: all threads, then draw() by thread 0. */
static DEVICE void publish() {
    __threadfence();
    __syncthreads();
}
static DEVICE bool draw(uint32_t *ticket, int n) {
    bool last = atomicAdd(ticket, 1u) == (uint32_t)n - 1u;
    if (last) *ticket = 0;
    return last;
}

/* ---- few tokens: everything at once ------------------------------------------------------------------------- */

static DEVICE void fetch_router(const struct route_args &a, int e, int first, int lane, float4 (&w)[HELD]) {
    const float4 *row = (const float4 *)a.router + (size_t)e * (size_t)(a.n_cols / 4);
    const float4 *norm = (const float4 *)a.norm;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        int i = first + 32 * j;
        w[j] = i < a.n_cols / 4 && e < a.n_experts ? row[i + lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        int i = first + 32 * j;
        if (i >= a.n_cols / 4) break;
        float4 n = norm[i + lane];
        w[j] = make_float4(w[j].x * n.x, w[j].y * n.y, w[j].z * n.z, w[j].w * n.w);
    }
}

static DEVICE float dot(float4 h, float4 w, float sum) {
    return fmaf(h.w, w.w, fmaf(h.z, w.z, fmaf(h.y, w.y, fmaf(h.x, w.x, sum))));
}

/* Pairs first: slices 4 g … 4 g + 3, as k_router_many has them, then the groups. */
static DEVICE float slice_sum(float x) {
    for (int i = 1; i < 32; i <<= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}

static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_route_few_f32(const __grid_constant__ struct route_args a) {
    __shared__ int ids[SMALL_PAIRS];
    __shared__ uint32_t present[MAX_EXPERTS / 32];
    __shared__ bool last;
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, quads = a.n_cols / 4;
    int e = (int)blockIdx.x * WARPS + warp, t0 = (int)blockIdx.y * ROUTE_CHUNK, n_tokens = a.header->n_tokens;
    if (t0 >= n_tokens) return;
    float4 w[HELD];
    fetch_router(a, e, 0, lane, w);
    depend_wait();
    const float4 *h = (const float4 *)a.h + (size_t)t0 * (size_t)quads;
    int n_here = min(n_tokens - t0, (int)ROUTE_CHUNK), t = t0 + warp;
    float sums[ROUTE_CHUNK] = {};
    for (int first = 0; first < quads; first += 32 * HELD) {
        if (first > 0) fetch_router(a, e, first, lane, w);
#pragma unroll
        for (int i = 0; i < ROUTE_CHUNK; i++) {
            if (i >= n_here) break;
#pragma unroll
            for (int j = 0; j < HELD; j++) {
                int at = first + 32 * j;
                if (at < quads) sums[i] = dot(h[(size_t)i * (size_t)quads + (size_t)(at + lane)], w[j], sums[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROUTE_CHUNK; i++) {
        if (i >= n_here) break;
        float logit = slice_sum(sums[i]);
        if (lane == i && e < a.n_experts)
            __stcg(a.partials + (size_t)(t0 + i) * (size_t)a.n_experts + (size_t)e, logit);
    }
    publish();
    if (threadIdx.x == 0) last = draw(a.tickets + 1 + blockIdx.y, (int)gridDim.x);
    float inverse = 0.0f;
    if (warp < n_here) {
        const float4 *row = h + (size_t)warp * (size_t)quads;
        inverse = row_inverse(a, row, lane);
        write_x(a, row, t, inverse, (int)blockIdx.x, (int)gridDim.x, lane);
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (warp < n_here) choose_any(a, t, 1, inverse, ids + warp * a.n_used, lane);
    if (n_tokens <= ROUTE_CHUNK) {
        __syncthreads();
        return route_sort_small<32 * WARPS>(a, ids, present, n_tokens * a.n_used);
    }
    publish();
    if (threadIdx.x == 0) last = draw(a.tickets, (n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    __syncthreads();
    if (!last) return;
    __threadfence();
    route_sort<WARPS>(a, shared_ints, true);
}

/* ---- many tokens ---------------------------------------------------------------------------------------------- */

enum : int {
    TILE_T = 32,
    TILE_E = 64,
    THREADS = 128,
    STEP_QUADS = 16,              /* float4 of a row in a step: of 4 slices each, 4 of 128 columns */
    ROW = 4 * STEP_QUADS + 4      /* floats, padded */
};

struct many_shared {
    float x[TILE_T][ROW], w[TILE_E][ROW];
};

/* A thread's share of a step on its way to shared memory: quad `threadIdx.x % 16` of every 8th row. */
struct many_step {
    float4 x[TILE_T / 8], w[TILE_E / 8], norm;
};

static DEVICE void fetch_step(const struct route_args &a, struct many_step &s, int step, bool weights, bool inputs) {
    int row = (int)threadIdx.x / STEP_QUADS, quad = (int)threadIdx.x % STEP_QUADS;
    int t0 = (int)blockIdx.x * TILE_T, e0 = (int)blockIdx.y * TILE_E, n_tokens = a.header->n_tokens;
    int at = 32 * (4 * step + quad / 4) + 4 * (int)blockIdx.z + quad % 4, quads = a.n_cols / 4;
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    bool inside = at < quads;
    if (weights) {
        s.norm = inside ? ((const float4 *)a.norm)[at] : zero;
#pragma unroll
        for (int i = 0; i < TILE_E / 8; i++) {
            int e = e0 + row + 8 * i;
            bool real = inside && e < a.n_experts;
            s.w[i] = real ? ((const float4 *)a.router)[(size_t)e * (size_t)quads + (size_t)at] : zero;
        }
    }
    if (!inputs) return;
#pragma unroll
    for (int i = 0; i < TILE_T / 8; i++) {
        int t = t0 + row + 8 * i;
        bool real = inside && t < n_tokens;
        s.x[i] = real ? ((const float4 *)a.h)[(size_t)t * (size_t)quads + (size_t)at] : zero;
    }
}

static DEVICE void store_step(struct many_shared &b, const struct many_step &s) {
    int row = (int)threadIdx.x / STEP_QUADS, quad = (int)threadIdx.x % STEP_QUADS;
#pragma unroll
    for (int i = 0; i < TILE_T / 8; i++) *(float4 *)&b.x[row + 8 * i][4 * quad] = s.x[i];
#pragma unroll
    for (int i = 0; i < TILE_E / 8; i++)
        *(float4 *)&b.w[row + 8 * i][4 * quad] =
            make_float4(s.w[i].x * s.norm.x, s.w[i].y * s.norm.y, s.w[i].z * s.norm.z, s.w[i].w * s.norm.w);
}

/* A block: TILE_T tokens, TILE_E experts, slices 4 g … 4 g + 3 with g = blockIdx.z. A thread: tokens tt + 8 i, experts
 * te + 16 j. */
static __global__ void __launch_bounds__(THREADS, 2)
    k_router_many_f32(const __grid_constant__ struct route_args a) {
    __shared__ struct many_shared b;
    depend_release();
    int n_tokens = a.header->n_tokens, t0 = (int)blockIdx.x * TILE_T, e0 = (int)blockIdx.y * TILE_E;
    if (t0 >= n_tokens) return;
    int tt = (int)threadIdx.x / 16, te = (int)threadIdx.x % 16;
    int n_steps = (a.n_cols / 128 + 3) / 4;
    struct many_step next;
    fetch_step(a, next, 0, true, false);
    depend_wait();
    fetch_step(a, next, 0, false, true);
    float acc[4][4][4] = {}; /* [slice][i][j] */
    for (int step = 0; step < n_steps; step++) {
        __syncthreads();
        store_step(b, next);
        __syncthreads();
        if (step + 1 < n_steps) fetch_step(a, next, step + 1, true, true);
#pragma unroll 1
        for (int k = 0; k < STEP_QUADS; k += 4)
#pragma unroll
            for (int s = 0; s < 4; s++) {
                float4 x[4], w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = *(const float4 *)&b.x[tt + 8 * i][4 * (k + s)];
#pragma unroll
                for (int j = 0; j < 4; j++) w[j] = *(const float4 *)&b.w[te + 16 * j][4 * (k + s)];
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[s][i][j] = dot(x[i], w[j], acc[s][i][j]);
            }
    }
    float *out = a.partials + (size_t)blockIdx.z * (size_t)n_tokens * (size_t)a.n_experts;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = t0 + tt + 8 * i, e = e0 + te + 16 * j;
            if (t < n_tokens && e < a.n_experts)
                out[(size_t)t * (size_t)a.n_experts + (size_t)e] =
                    acc[0][i][j] + acc[1][i][j] + (acc[2][i][j] + acc[3][i][j]);
        }
}

static __global__ void __launch_bounds__(32 * WARPS)
    k_route_choose_f32(const __grid_constant__ struct route_args a) {
    __shared__ bool last;
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    int t = (int)blockIdx.x * ROUTE_CHUNK + warp, n_tokens = a.header->n_tokens;
    if ((int)blockIdx.x * ROUTE_CHUNK >= n_tokens) return;
    depend_wait();
    if (t < n_tokens) {
        const float4 *h = (const float4 *)(a.h + (size_t)t * (size_t)a.n_cols);
        float inverse = row_inverse(a, h, lane);
        choose_any(a, t, ROUTE_GROUPS, inverse, NULL, lane);
        write_x(a, h, t, inverse, 0, 1, lane);
    }
    if (n_tokens * a.n_used > SORT_HERE) return;
    publish();
    if (threadIdx.x == 0) last = draw(a.tickets, (n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    __syncthreads();
    if (!last) return;
    __threadfence();
    route_sort<WARPS>(a, shared_ints, true);
}

static __global__ void __launch_bounds__(32 * SORT_WARPS)
    k_route_sort_i32(const __grid_constant__ struct route_args a, bool count_reads) {
    depend_release();
    depend_wait();
    if (count_reads && a.header->n_tokens * a.n_used <= SORT_HERE) return; /* k_route_choose did it */
    route_sort<SORT_WARPS>(a, shared_ints, count_reads);
}

/* ---- launching ------------------------------------------------------------------------------------------------- */

template <int N> static size_t sort_shared(int n_experts) {
    return (size_t)sort_shared_ints<N>(n_experts) * sizeof(int);
}

static cudaError_t launch_sort(const struct route_args *a, bool count_reads, const struct cuda_queue *q) {
    return launch(k_route_sort_i32, dim3(1, 1, 1), 32 * SORT_WARPS, sort_shared<SORT_WARPS>(a->n_experts), q, *a,
                  count_reads);
}

cudaError_t cuda_route(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    size_t shared = sort_shared<WARPS>(a->n_experts);
    unsigned chunks = (unsigned)((bucket + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    if (bucket <= FEW_TOKENS)
        return launch(k_route_few_f32, dim3((unsigned)((a->n_experts + WARPS - 1) / WARPS), chunks, 1), 32 * WARPS,
                      shared, q, *a);
    dim3 grid((unsigned)((bucket + TILE_T - 1) / TILE_T), (unsigned)((a->n_experts + TILE_E - 1) / TILE_E),
              ROUTE_GROUPS);
    cudaError_t e = launch(k_router_many_f32, grid, THREADS, 0, q, *a);
    if (e != cudaSuccess) return e;
    e = launch(k_route_choose_f32, dim3(chunks, 1, 1), 32 * WARPS, shared, q, *a);
    if (e != cudaSuccess || bucket * a->n_used <= SORT_HERE) return e;
    return launch_sort(a, true, q);
}

cudaError_t cuda_route_sort(const struct route_args *a, const struct cuda_queue *q) {
    return launch_sort(a, false, q);
}

cudaError_t route_prepare(size_t max_shared) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_router_many_f32);
    if (e != cudaSuccess) return e;
    e = cudaFuncSetAttribute(k_route_sort_i32, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);
    if (e != cudaSuccess) return e;
    int most = (int)sort_shared<WARPS>(MAX_EXPERTS);
    e = cudaFuncSetAttribute(k_route_few_f32, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(k_route_choose_f32, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}
