/* route: the experts' input x, and which experts each token goes to: logits in true f32, softmax, top-k, and the sort
 * of the pairs by expert (route_sort.cuh).
 *
 * A logit is 1 / rms times the sum, in a fixed tree, of 32 slices of the columns: slice l has columns 128 j + 4 l
 * + {0 … 3} for all j, added up in that order with fused multiply-adds of h and (router * norm). A lane of a
 * warp takes a slice (k_route_few), or a thread takes four slices of several tokens and experts (k_router_many): the
 * same sums either way.
 *
 * Small steps are one launch: a block has WARPS experts and ROUTE_CHUNK tokens (a chunk), the last block of a chunk
 * chooses, one token per warp, and the last chunk sorts. Large ones are three: k_router_many, k_route_choose, which
 * counts the experts of each chunk too, and k_route_place. */
#include "cuda/common.cuh"
#include "cuda/route_sort.cuh"

enum : int {
    WARPS = 8,
    HELD = 16,          /* float4 of the router in a lane's registers */
    FEW_TOKENS = 128,   /* that k_route_few takes */
    SORT_WARPS = 32,
    PLACE_WARPS = 16
};

static_assert((int)ROUTE_CHUNK == (int)WARPS && (int)ROUTE_CHUNK <= (int)SMALL_TOKENS,
              "a warp chooses for one token of a chunk");

extern __shared__ __align__(16) int shared_ints[];

/* Without branches, here and below: all loads are to be under way at once. */
static DEVICE float4 load_if(bool real, const float4 *from) {
    return real ? *from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

/* ---- one row, by one warp ------------------------------------------------------------------------------ */

/* float4 32 j + lane of a row, from `first` on. */
static DEVICE void fetch_row(const struct route_args &a, const float4 *h, int first, int lane, float4 (&v)[HELD]) {
#pragma unroll
    for (int j = 0; j < HELD; j++) v[j] = load_if(first + 32 * j < a.n_cols / 4, h + first + 32 * j + lane);
}

/* 1 / rms. v: what was fetched last, all of a row that is short. */
static DEVICE float row_inverse(const struct route_args &a, const float4 *h, int lane, float4 (&v)[HELD]) {
    float squares = 0.0f;
    for (int first = 0; first < a.n_cols / 4; first += 32 * HELD) {
        fetch_row(a, h, first, lane, v);
#pragma unroll
        for (int j = 0; j < HELD; j++)
            squares += v[j].x * v[j].x + v[j].y * v[j].y + (v[j].z * v[j].z + v[j].w * v[j].w);
    }
    return 1.0f / sqrtf(warp_sum(squares) / (float)a.n_cols + a.eps);
}

static DEVICE void write_quad(const struct route_args &a, int t, int i, float4 v, float4 w, float inverse) {
    uint2 *x = (uint2 *)((uint16_t *)a.x + (size_t)t * (size_t)a.n_cols);
    x[i] = make_uint2(h2_pack(v.x * inverse * w.x, v.y * inverse * w.y),
                      h2_pack(v.z * inverse * w.z, v.w * inverse * w.w));
}

/* x of row t; v is as row_inverse left it. */
static DEVICE void write_row(const struct route_args &a, const float4 *h, int t, float inverse, int lane,
                             float4 (&v)[HELD]) {
    const float4 *norm = (const float4 *)a.norm;
    int quads = a.n_cols / 4;
    for (int first = 0; first < quads; first += 32 * HELD) {
        if (quads > 32 * HELD) fetch_row(a, h, first, lane, v);
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            int i = first + 32 * j + lane;
            if (first + 32 * j < quads) write_quad(a, t, i, v[j], norm[i], inverse);
        }
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
    for (int i = 0; i < PER_LANE; i++) { /* no branches: all loads are to be under way at once */
        int e = 32 * i + lane;
        bool real = e < a.n_experts;
        float s[ROUTE_GROUPS];
#pragma unroll
        for (int g = 0; g < ROUTE_GROUPS; g++) s[g] = real && g < n_groups ? __ldcg(logits + g * plane + e) : 0.0f;
        if (n_groups > 1) s[0] = (s[0] + s[1] + (s[2] + s[3])) + (s[4] + s[5] + (s[6] + s[7]));
        p[i] = real ? s[0] * inverse : -INFINITY;
    }
    choose<PER_LANE>(a, t, p, ids, lane);
}

static DEVICE void choose_any(const struct route_args &a, int t, int n_groups, float inverse, int *ids, int lane) {
    if (a.n_experts <= 128) choose_from<4>(a, t, n_groups, inverse, ids, lane);
    else choose_from<MAX_EXPERTS / 32>(a, t, n_groups, inverse, ids, lane);
}

/* ---- few tokens: everything at once ------------------------------------------------------------------------- */

static DEVICE void fetch_router(const struct route_args &a, int e, int first, int lane, float4 (&w)[HELD]) {
    int quads = a.n_cols / 4;
    const float4 *row = (const float4 *)a.router + (size_t)e * (size_t)quads + first + lane;
    const float4 *norm = (const float4 *)a.norm + first + lane;
#pragma unroll
    for (int j = 0; j < HELD; j++) w[j] = load_if(first + 32 * j < quads && e < a.n_experts, row + 32 * j);
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        float4 n = load_if(first + 32 * j < quads, norm + 32 * j);
        w[j] = make_float4(w[j].x * n.x, w[j].y * n.y, w[j].z * n.z, w[j].w * n.w);
    }
}

static DEVICE float dot(float4 h, float4 w, float sum) {
    return fmaf(h.w, w.w, fmaf(h.z, w.z, fmaf(h.y, w.y, fmaf(h.x, w.x, sum))));
}

/* Slices 4 g … 4 g + 3 in order, as k_router_many has them, then the groups g in a tree. */
static DEVICE float slice_sum(float x, int lane) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = __shfl_sync(ALL_LANES, x, (lane & ~3) + i);
    x = s[0] + s[1] + s[2] + s[3];
    for (int i = 4; i < 32; i <<= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}

/* Logits of expert e for the n tokens at h, N at most, written by lane i for token i. */
template <int N>
static DEVICE void few_logits(const struct route_args &a, const float4 *h, int n, int e, float *out, int lane) {
    constexpr int at_once = N == 1 ? HELD : 1; /* float4 of each token */
    int quads = a.n_cols / 4;
    float sums[N] = {};
    for (int first = 0; first < quads; first += 32 * HELD) {
        float4 w[HELD];
        fetch_router(a, e, first, lane, w);
        depend_wait(); /* at once, but for the first time */
#pragma unroll
        for (int j0 = 0; j0 < HELD; j0 += at_once) {
            float4 v[at_once][N];
#pragma unroll
            for (int j = 0; j < at_once; j++)
#pragma unroll
                for (int i = 0; i < N; i++) {
                    int at = first + 32 * (j0 + j);
                    v[j][i] = load_if(at < quads, h + min(i, n - 1) * quads + at + lane);
                }
#pragma unroll
            for (int j = 0; j < at_once; j++)
#pragma unroll
                for (int i = 0; i < N; i++) sums[i] = dot(v[j][i], w[j0 + j], sums[i]);
        }
    }
    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sum = slice_sum(sums[i], lane);
        if (lane == i) logit = sum;
    }
    if (lane < n && e < a.n_experts) __stcg(out + (size_t)lane * (size_t)a.n_experts + (size_t)e, logit);
}

/* N: tokens of a block, 1 or ROUTE_CHUNK. */
template <int N>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_route_few_f32(const __grid_constant__ struct route_args a) {
    __shared__ int ids[SMALL_PAIRS];
    __shared__ uint32_t present[MAX_EXPERTS / 32];
    __shared__ bool last;
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, quads = a.n_cols / 4;
    int e = (int)blockIdx.x * WARPS + warp, t0 = (int)blockIdx.y * N, n_tokens = a.header->n_tokens;
    if (t0 >= n_tokens) return;
    const float4 *h = (const float4 *)a.h + (size_t)t0 * (size_t)quads;
    int n = min(n_tokens - t0, N);
    few_logits<N>(a, h, n, e, a.partials + (size_t)t0 * (size_t)a.n_experts, lane);
    __syncthreads();
    if (threadIdx.x == 0) last = draw_last(a.tickets + 1 + blockIdx.y, (int)gridDim.x);
    float inverse = 0.0f;
    if (warp < n) {
        const float4 *row = h + (size_t)warp * (size_t)quads, *norm = (const float4 *)a.norm;
        float4 v[HELD];
        inverse = row_inverse(a, row, lane, v);
        for (int i = 32 * (int)blockIdx.x + lane; i < quads; i += 32 * (int)gridDim.x)
            write_quad(a, t0 + warp, i, row[i], norm[i], inverse);
    }
    __syncthreads();
    if (!last) return;
    if (warp < n) choose_any(a, t0 + warp, 1, inverse, ids + warp * a.n_used, lane);
    if (a.unsorted) return;
    __syncthreads();
    if (N == 1 || n_tokens <= N) return route_sort_small<32 * WARPS>(a, ids, present, n_tokens * a.n_used);
    if (threadIdx.x == 0) last = draw_last(a.tickets, (n_tokens + N - 1) / N);
    __syncthreads();
    if (last) route_sort<WARPS>(a, shared_ints, true);
}

/* ---- many tokens ---------------------------------------------------------------------------------------------- */

/* A block: TT tokens, TE experts, and the slices 4 g … 4 g + 3 of the columns, g = blockIdx.z. A stage is BLOCK_QUADS
 * quads of 4 columns of one slice, 128 columns apart; the stages of slice 0 come first. STAGES of them are in
 * shared memory at a time: all of 2048 columns. A thread: TM tokens tt + i * (TT / TM), TE / 16 experts te + 16 j. */
enum : int { BLOCK_QUADS = 16, STAGES = 4, ROW_QUADS = STAGES * BLOCK_QUADS, ROW = 4 * ROW_QUADS + 4 /* padded */ };

template <int TT, int TE, int TM> struct many_tile {
    static constexpr int threads = TT / TM * 16, experts = TE / 16;
    struct memory {
        float x[TT][ROW], w[TE][ROW];
    };

    /* Which float4 of a row is quad `at` of the STAGES stages from `first`; beyond the row: -1. */
    static DEVICE int column(const struct route_args &a, int first, int at) {
        int n_blocks = (a.n_cols / 128 + BLOCK_QUADS - 1) / BLOCK_QUADS, stage = first + at % STAGES;
        int j = stage % n_blocks * BLOCK_QUADS + at / STAGES;
        return j < a.n_cols / 128 ? 32 * j + 4 * (int)blockIdx.z + stage / n_blocks : -1;
    }

    static DEVICE void fetch_weights(const struct route_args &a, int first, struct memory &b) {
        const int step = threads / ROW_QUADS; /* rows */
        int at = (int)threadIdx.x % ROW_QUADS, row = (int)threadIdx.x / ROW_QUADS, e0 = (int)blockIdx.y * TE;
        int column_at = column(a, first, at), quads = a.n_cols / 4, to = 4 * (at % STAGES * BLOCK_QUADS + at / STAGES);
        float4 norm = load_if(column_at >= 0, (const float4 *)a.norm + column_at);
        const float4 *from = (const float4 *)a.router + column_at;
#pragma unroll 8
        for (int i = 0; i < TE / step; i++) {
            int e = row + step * i;
            float4 w = load_if(column_at >= 0 && e0 + e < a.n_experts, from + (size_t)(e0 + e) * (size_t)quads);
            *(float4 *)&b.w[e][to] = make_float4(w.x * norm.x, w.y * norm.y, w.z * norm.z, w.w * norm.w);
        }
    }

    static DEVICE void fetch_inputs(const struct route_args &a, int first, struct memory &b) {
        const int step = threads / ROW_QUADS;
        int at = (int)threadIdx.x % ROW_QUADS, row = (int)threadIdx.x / ROW_QUADS, t0 = (int)blockIdx.x * TT;
        int column_at = column(a, first, at), quads = a.n_cols / 4, to = 4 * (at % STAGES * BLOCK_QUADS + at / STAGES);
        int n_tokens = a.header->n_tokens;
#pragma unroll 8
        for (int i = 0; i < TT / step; i++) {
            int t = row + step * i;
            bool real = column_at >= 0 && t0 + t < n_tokens;
            const float4 *from = (const float4 *)a.h;
            if (real) from += (size_t)(t0 + t) * (size_t)quads + (size_t)column_at;
            copy16(&b.x[t][to], from, real);
        }
    }

    static DEVICE void add_stage(const struct memory &b, int stage, float (&acc)[TM][experts]) {
        int tt = (int)threadIdx.x / 16, te = (int)threadIdx.x % 16;
#pragma unroll 2
        for (int k = 4 * BLOCK_QUADS * stage; k < 4 * BLOCK_QUADS * (stage + 1); k += 4) {
            float4 x[TM], w[experts];
#pragma unroll
            for (int i = 0; i < TM; i++) x[i] = *(const float4 *)&b.x[tt + TT / TM * i][k];
#pragma unroll
            for (int j = 0; j < experts; j++) w[j] = *(const float4 *)&b.w[te + 16 * j][k];
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int j = 0; j < experts; j++) acc[i][j] = dot(x[i], w[j], acc[i][j]);
        }
    }
};

extern __shared__ __align__(16) uint8_t shared_bytes[];

template <int TT, int TE, int TM>
static __global__ void __launch_bounds__(TT / TM * 16, 1)
    k_router_many_f32(const __grid_constant__ struct route_args a) {
    typedef many_tile<TT, TE, TM> tile;
    typename tile::memory &b = *(typename tile::memory *)shared_bytes;
    depend_release();
    int n_tokens = a.header->n_tokens, t0 = (int)blockIdx.x * TT, e0 = (int)blockIdx.y * TE;
    if (t0 >= n_tokens) return;
    int n_blocks = (a.n_cols / 128 + BLOCK_QUADS - 1) / BLOCK_QUADS;
    float acc[TM][tile::experts] = {}, sum[TM][tile::experts] = {};
    tile::fetch_weights(a, 0, b);
    depend_wait();
    for (int first = 0; first < 4 * n_blocks; first += STAGES) {
        if (first > 0) {
            __syncthreads();
            tile::fetch_weights(a, first, b);
        }
        tile::fetch_inputs(a, first, b);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int stage = 0; stage < STAGES; stage++) {
            tile::add_stage(b, stage, acc);
            if ((first + stage + 1) % n_blocks != 0) continue;
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int j = 0; j < tile::experts; j++) sum[i][j] += acc[i][j], acc[i][j] = 0.0f;
        }
    }
    float *out = a.partials + (size_t)blockIdx.z * (size_t)n_tokens * (size_t)a.n_experts;
    int tt = (int)threadIdx.x / 16, te = (int)threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < tile::experts; j++) {
            int t = t0 + tt + TT / TM * i, e = e0 + te + 16 * j;
            if (t < n_tokens && e < a.n_experts)
                out[(size_t)t * (size_t)a.n_experts + (size_t)e] = sum[i][j];
        }
}

static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_route_choose_f32(const __grid_constant__ struct route_args a) {
    __shared__ int ids[SMALL_PAIRS];
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    int t0 = (int)blockIdx.x * ROUTE_CHUNK, n = min(a.header->n_tokens - t0, (int)ROUTE_CHUNK), t = t0 + warp;
    if (n <= 0) return;
    for (int e = (int)threadIdx.x; e < a.n_experts; e += 32 * WARPS) shared_ints[e] = 0;
    depend_wait();
    if (warp < n) {
        const float4 *h = (const float4 *)(a.h + (size_t)t * (size_t)a.n_cols);
        float4 v[HELD];
        float inverse = row_inverse(a, h, lane, v);
        choose_any(a, t, ROUTE_GROUPS, inverse, ids + warp * a.n_used, lane);
        write_row(a, h, t, inverse, lane, v);
    }
    __syncthreads();
    if ((int)threadIdx.x < n * a.n_used) atomicAdd(&shared_ints[ids[threadIdx.x]], 1);
    __syncthreads();
    for (int e = (int)threadIdx.x; e < a.n_experts; e += 32 * WARPS)
        a.chunk_counts[(int)blockIdx.x * a.n_experts + e] = shared_ints[e];
}
static_assert((int)SMALL_PAIRS <= 32 * (int)WARPS, "a thread counts one pair");

static __global__ void __launch_bounds__(32 * PLACE_WARPS)
    k_route_place_i32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    if ((int)blockIdx.x * PLACE_WARPS * ROUTE_CHUNK < a.header->n_tokens) route_place<PLACE_WARPS>(a, shared_ints);
}

static __global__ void __launch_bounds__(32 * SORT_WARPS)
    k_route_sort_i32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    route_sort<SORT_WARPS>(a, shared_ints, false);
}

/* ---- launching ------------------------------------------------------------------------------------------------- */

static size_t sort_shared_bytes(int warps, int n_experts) {
    return (size_t)sort_shared_ints(warps, n_experts) * sizeof(int);
}

typedef many_tile<32, 64, 4> narrow_tile;
typedef many_tile<64, 128, 8> wide_tile;
enum : int { WIDE_TOKENS = 1024 }; /* enough for a wide tile on every processor */

template <int TT, int TE, int TM>
static cudaError_t launch_many(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    typedef many_tile<TT, TE, TM> tile;
    dim3 grid((unsigned)((bucket + TT - 1) / TT), (unsigned)((a->n_experts + TE - 1) / TE), ROUTE_GROUPS);
    return launch(k_router_many_f32<TT, TE, TM>, grid, tile::threads, sizeof(typename tile::memory), q, *a);
}

cudaError_t cuda_route(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    size_t shared = sort_shared_bytes(WARPS, a->n_experts);
    unsigned chunks = (unsigned)((bucket + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    dim3 few((unsigned)((a->n_experts + WARPS - 1) / WARPS), chunks, 1);
    if (bucket == 1) return launch(k_route_few_f32<1>, few, 32 * WARPS, shared, q, *a);
    if (bucket <= FEW_TOKENS) return launch(k_route_few_f32<ROUTE_CHUNK>, few, 32 * WARPS, shared, q, *a);
    bool wide = bucket >= WIDE_TOKENS && sizeof(wide_tile::memory) <= q->max_shared;
    cudaError_t e = wide ? launch_many<64, 128, 8>(a, bucket, q) : launch_many<32, 64, 4>(a, bucket, q);
    if (e != cudaSuccess) return e;
    e = launch(k_route_choose_f32, dim3(chunks, 1, 1), 32 * WARPS, (size_t)a->n_experts * sizeof(int), q, *a);
    if (e != cudaSuccess || a->unsorted) return e;
    return launch(k_route_place_i32, dim3((chunks + PLACE_WARPS - 1) / PLACE_WARPS, 1, 1), 32 * PLACE_WARPS,
                  sort_shared_bytes(PLACE_WARPS, a->n_experts), q, *a);
}

cudaError_t cuda_route_sort(const struct route_args *a, const struct cuda_queue *q) {
    return launch(k_route_sort_i32, dim3(1, 1, 1), 32 * SORT_WARPS, sort_shared_bytes(SORT_WARPS, a->n_experts), q,
                  *a);
}

cudaError_t route_prepare(size_t max_shared) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_router_many_f32<64, 128, 8>);
    if (e != cudaSuccess) return e;
    if (sizeof(wide_tile::memory) <= max_shared)
        e = cudaFuncSetAttribute(k_router_many_f32<64, 128, 8>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)sizeof(wide_tile::memory));
    if (e != cudaSuccess) return e;
    e = cudaFuncSetAttribute(k_router_many_f32<32, 64, 4>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(narrow_tile::memory));
    if (e != cudaSuccess) return e;
    e = cudaFuncSetAttribute(k_route_sort_i32, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);
    if (e != cudaSuccess) return e;
    int most = (int)sort_shared_bytes(WARPS, MAX_EXPERTS);
    e = cudaFuncSetAttribute(k_route_few_f32<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (e != cudaSuccess) return e;
    e = cudaFuncSetAttribute(k_route_few_f32<ROUTE_CHUNK>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (e != cudaSuccess) return e;
    e = cudaFuncGetAttributes(&ignored, k_route_choose_f32);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(k_route_place_i32, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)sort_shared_bytes(PLACE_WARPS, MAX_EXPERTS));
}
