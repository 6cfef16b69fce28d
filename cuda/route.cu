/* route: the experts' input x, and which experts each token goes to: logits in true f32, softmax, top-k, and the sort
 * of the pairs by expert (route_sort.cuh).
 *
 * Chain l of 32 has columns 128 j + 4 l + {0 … 3} for all j, summed in that order with fused multiply-adds of h and
 * (router * norm); the chains' sums are added as neighbours in a tree, and multiplied with 1 / rms, whose squares are
 * summed the same way. Small steps: a lane of a warp has a chain (k_route_few). Larger ones: a block has a tile of
 * tokens, TILE_EXPERTS experts and one plane, which is two chains (k_route_logits). The same sums either way.
 *
 * Small steps are one launch: a block has WARPS experts and ROUTE_CHUNK tokens (a chunk), the last block of a chunk
 * chooses, one token per warp, and the last chunk sorts. Larger ones choose in a launch of their own, and the largest
 * sort in a third. */
#include "cuda/common.cuh"
#include "cuda/route_sort.cuh"

enum : int {
    WARPS = 8,
    THREADS = 32 * WARPS,
    TILE_EXPERTS = ROUTE_TILE_EXPERTS,
    CHAIN_QUADS = 16, /* quads of a chain that are in shared memory at a time: all of 2048 columns */
    ROW = 2 * 4 * CHAIN_QUADS + 4, /* floats of a row there, padded */
    FEW_TOKENS = 64,  /* of a step that is one launch */
    HELD = 16,        /* float4 of a row in a lane's registers */
    WIDE_TOKENS = 512,
    PLACE_WARPS = 16
};

static_assert((int)ROUTE_CHUNK == (int)WARPS, "a warp chooses for one token of a chunk");
static_assert(2 * (int)CHAIN_QUADS == 32, "a lane has a quad of a row");

extern __shared__ __align__(16) uint8_t shared_bytes[];

/* Without branches, here and below: all loads are to be under way at once. */
static DEVICE float4 load_if(bool real, const float4 *from) {
    return real ? *from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}
static DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
static DEVICE float dot(float4 h, float4 w, float sum) {
    return fmaf(h.w, w.w, fmaf(h.z, w.z, fmaf(h.y, w.y, fmaf(h.x, w.x, sum))));
}

static DEVICE int pitch_of(const struct route_args &a) { return route_pitch(a.n_experts); }

/* The lanes' sums, neighbours first: a tree that begins with planes. */
static DEVICE float chain_sum(float x) {
    for (int d = 1; d < 32; d <<= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}
static DEVICE float square(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }
static DEVICE float inverse_of(const struct route_args &a, float squares) {
    return 1.0f / sqrtf(squares / (float)a.n_cols + a.eps);
}

/* Sums of squares: [T][ROUTE_PLANES] behind the logits' planes. */
static DEVICE float *squares_of(const struct route_args &a) {
    return a.partials + (size_t)ROUTE_PLANES * (size_t)a.header->n_tokens * (size_t)pitch_of(a);
}

/* The block's share of the weights that are read next: memory has nothing else to do. */
static DEVICE void bring_next(const struct route_args &a) {
    if (threadIdx.x >= 2) return;
    uint32_t n_blocks = gridDim.x * gridDim.y * gridDim.z, n = a.next_bytes[threadIdx.x];
    uint32_t each = (n / n_blocks + 127) / 128 * 128, at = each * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    if (at < n) bring(a.next[threadIdx.x] + at, min(each, n - at));
}

/* ---- logits by planes -------------------------------------------------------------------------------------------- */

/* A block: TT tokens. Half of its warps have one chain, half the other; a warp has 32 experts, a lane TM tokens
 * tt + LT i and TN experts te + LE j of them. */
template <int TT> struct logit_tile {
    static constexpr int LT = 4, LE = 32 / LT, TM = TT / LT, TN = 32 / LE;
    float w[TILE_EXPERTS][ROW], x[TT][ROW];

    /* Which float4 of a row of n_cols this lane brings: quad `lane` of the piece of the plane. */
    static DEVICE int column(const struct route_args &a, int piece, int lane, bool &real) {
        int quads = a.n_cols / (8 * ROUTE_PLANES), at = piece * CHAIN_QUADS + lane % CHAIN_QUADS; /* of a chain */
        real = at < quads;
        return real ? 32 * at + 2 * (int)blockIdx.z + lane / CHAIN_QUADS : 0;
    }

    /* On their way, and there: most blocks begin when x is there too, and then wait for both at once. */
    struct weights {
        float4 norm, v[TILE_EXPERTS / WARPS];
    };
    static DEVICE void load_weights(const struct route_args &a, int piece, int lane, int warp, struct weights &from) {
        bool real;
        int at = column(a, piece, lane, real), quads = a.n_cols / 4, e0 = (int)blockIdx.y * TILE_EXPERTS;
        from.norm = load_if(real, (const float4 *)a.norm + at);
#pragma unroll
        for (int i = 0; i < TILE_EXPERTS / WARPS; i++) {
            int e = e0 + warp + WARPS * i;
            from.v[i] = load_if(real && e < a.n_experts, (const float4 *)a.router + (size_t)e * (size_t)quads + at);
        }
    }
    DEVICE void put_weights(const struct weights &from, int lane, int warp) {
        float4 norm = from.norm;
#pragma unroll
        for (int i = 0; i < TILE_EXPERTS / WARPS; i++) {
            float4 v = from.v[i];
            *(float4 *)&w[warp + WARPS * i][4 * lane] = make_float4(v.x * norm.x, v.y * norm.y, v.z * norm.z, v.w * norm.w);
        }
    }

    DEVICE void fetch_inputs(const struct route_args &a, int piece, int t0, int lane, int warp) {
        bool real;
        int at = column(a, piece, lane, real), quads = a.n_cols / 4, n = a.header->n_tokens;
#pragma unroll
        for (int i = warp; i < TT; i += WARPS) {
            bool there = real && t0 + i < n;
            copy16(&x[i][4 * lane], (const float4 *)a.h + (there ? (size_t)(t0 + i) * (size_t)quads + (size_t)at : 0),
                   there);
        }
        copy_commit();
    }

    DEVICE void add_piece(int quads, int lane, int warp, float (&acc)[TM][TN]) const {
        int chain = warp / (WARPS / 2) * (4 * CHAIN_QUADS), e = warp % (WARPS / 2) * 32 + lane % LE, t = lane / LE;
#pragma unroll 2
        for (int k = chain; k < chain + 4 * quads; k += 4) {
            float4 own[TN];
#pragma unroll
            for (int j = 0; j < TN; j++) own[j] = *(const float4 *)&w[e + LE * j][k];
#pragma unroll
            for (int i = 0; i < TM; i++) {
                float4 h = *(const float4 *)&x[t + LT * i][k];
#pragma unroll
                for (int j = 0; j < TN; j++) acc[i][j] = dot(h, own[j], acc[i][j]);
            }
        }
    }

    /* The chains' sums together, to memory. The block has met. */
    DEVICE void store(const struct route_args &a, int t0, int lane, int warp, const float (&acc)[TM][TN]) {
        float *other = &w[0][0] + (warp % (WARPS / 2) * 32 + lane);
        bool second = warp >= WARPS / 2;
#pragma unroll
        for (int i = 0; i < TM * TN; i++)
            if (second) other[i * (THREADS / 2)] = acc[i / TN][i % TN];
        __syncthreads();
        if (second) return;
        int n_tokens = a.header->n_tokens, pitch = pitch_of(a);
        int e = (int)blockIdx.y * TILE_EXPERTS + warp * 32 + lane % LE, t = t0 + lane / LE;
        float *out = a.partials + (size_t)blockIdx.z * (size_t)n_tokens * (size_t)pitch + e;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
                if (t + LT * i < n_tokens)
                    __stcg(out + (size_t)(t + LT * i) * (size_t)pitch + LE * j,
                           acc[i][j] + other[(i * TN + j) * (THREADS / 2)]);
    }
};

/* ---- one token, by one warp ------------------------------------------------------------------------------ */

/* Floats as integers of the same order; NaN loses to everything but an empty place (0). */
static DEVICE uint32_t order_key(float x) {
    uint32_t u = __float_as_uint(x + 0.0f); /* -0 is 0 */
    return x != x ? 1u : u & 0x80000000u ? ~u : u | 0x80000000u;
}
static DEVICE float key_value(uint32_t key) {
    return key == 1u ? NAN : __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* Which expert a lane has in place i. */
static DEVICE int expert_at(int i, int lane) { return (i & ~3) * 32 + 4 * lane + (i & 3); }

/* The token's experts and weights from its logits. ids: in shared memory too. */
template <int PER_LANE>
static DEVICE void choose(const struct route_args &a, int t, const float (&p)[PER_LANE], int *ids, int lane) {
    uint32_t keys[PER_LANE];
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        keys[i] = expert_at(i, lane) < a.n_experts ? order_key(p[i]) : 0u;
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
            if (keys[i] == best) at = (uint32_t)expert_at(i, lane);
        at = __reduce_min_sync(ALL_LANES, at);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (at == (uint32_t)expert_at(i, lane)) keys[i] = 0;
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
            if (expert_at(i, lane) < a.n_experts) sum += expf(p[i] - max);
        sum = warp_sum(sum);
    }
    if (!kept) return;
    a.lists.ids[t * a.n_used + lane] = id;
    a.lists.weights[t * a.n_used + lane] = weight / sum;
    ids[lane] = id;
}

/* A token's logits, but for 1 / rms, from the planes: p[i] of expert_at(i, lane). */
template <int PLANES, int PER_LANE>
static DEVICE void add_planes(const struct route_args &a, int t, int lane, float (&p)[PER_LANE]) {
    int pitch = pitch_of(a);
    size_t plane = (size_t)a.header->n_tokens * (size_t)(pitch / 4);
    const float4 *logits = (const float4 *)a.partials + (size_t)t * (size_t)(pitch / 4) + lane;
#pragma unroll
    for (int i = 0; i < PER_LANE; i += 4) {
        if (i > 0) asm volatile("" ::: "memory"); /* registers are for one round of loads */
        float4 s[PLANES];
#pragma unroll
        for (int k = 0; k < PLANES; k++)
            s[k] = 32 * i < pitch ? __ldcg(logits + k * plane + 8 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int d = 1; d < PLANES; d *= 2)
#pragma unroll
            for (int k = 0; k < PLANES; k += 2 * d) s[k] = add(s[k], s[k + d]);
        p[i] = s[0].x, p[i + 1] = s[0].y, p[i + 2] = s[0].z, p[i + 3] = s[0].w;
    }
}

/* Sums of squares of token t's planes. */
static DEVICE float load_squares(const struct route_args &a, int t, int lane) {
    return __ldcg(squares_of(a) + (size_t)t * ROUTE_PLANES + lane % ROUTE_PLANES);
}
static DEVICE float inverse_of_planes(const struct route_args &a, float squares) {
    for (int d = 1; d < ROUTE_PLANES; d <<= 1) squares += __shfl_xor_sync(ALL_LANES, squares, d);
    return inverse_of(a, squares);
}

/* Experts and weights of token t from the sums; inverse: of one plane. */
template <int PLANES, int PER_LANE>
static DEVICE void finish_token(const struct route_args &a, int t, float inverse, int *ids, int lane) {
    float p[PER_LANE], squares = PLANES > 1 ? load_squares(a, t, lane) : 0.0f;
    add_planes<PLANES, PER_LANE>(a, t, lane, p);
    if (PLANES > 1) inverse = inverse_of_planes(a, squares); /* asked for with the planes, not before */
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) p[i] = expert_at(i, lane) < a.n_experts ? p[i] * inverse : -INFINITY;
    choose<PER_LANE>(a, t, p, ids, lane);
}

static DEVICE uint2 normed(float4 v, float inverse, float4 w) {
    return make_uint2(h2_pack(v.x * inverse * w.x, v.y * inverse * w.y),
                      h2_pack(v.z * inverse * w.z, v.w * inverse * w.w));
}

/* x of a chunk of n tokens. No load waits for a store of before: a thread has two quads of each token at once. */
static DEVICE void write_rows(const struct route_args &a, int t0, int n, const float *inverse) {
    int quads = a.n_cols / 4;
    const float4 *h = (const float4 *)a.h + (size_t)t0 * (size_t)quads, *norm = (const float4 *)a.norm;
    uint2 *x = (uint2 *)a.x + (size_t)t0 * (size_t)quads;
    for (int first = (int)threadIdx.x; first < quads; first += 2 * THREADS) {
        float4 v[2][ROUTE_CHUNK], w[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int i = first + THREADS * j;
            w[j] = load_if(i < quads, norm + i);
#pragma unroll
            for (int t = 0; t < ROUTE_CHUNK; t++) v[j][t] = load_if(i < quads && t < n, h + (size_t)t * (size_t)quads + i);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int t = 0; t < ROUTE_CHUNK; t++) {
                int i = first + THREADS * j;
                float r = inverse[t];
                if (i < quads && t < n)
                    x[(size_t)t * (size_t)quads + i] = normed(v[j][t], r, w[j]);
            }
    }
}

/* ---- chunks ----------------------------------------------------------------------------------------------------- */

/* For token t0 + warp of a chunk of n; the block meets. */
template <int PLANES>
static DEVICE void choose_chunk(const struct route_args &a, int t0, int n, float inverse, int *ids, int lane, int warp) {
    if (warp < n) {
        if (a.n_experts <= 128) finish_token<PLANES, 4>(a, t0 + warp, inverse, ids + warp * a.n_used, lane);
        else finish_token<PLANES, MAX_EXPERTS / 32>(a, t0 + warp, inverse, ids + warp * a.n_used, lane);
    }
    __syncthreads();
}

/* Marks the experts of a chunk's n tokens. The last chunk sorts, if there are not too many. */
static DEVICE void sort_chunk(const struct route_args &a, int t0, int n, const int *ids) {
    __shared__ bool last;
    int n_tokens = a.header->n_tokens;
    uint32_t *memory = (uint32_t *)shared_bytes;
    route_mark<THREADS>(a, ids, n * a.n_used, memory);
    bool alone = n_tokens <= ROUTE_CHUNK, one_block = n_tokens <= SORT_TOKENS;
    if (!alone) save_marks<THREADS>(a, memory, t0 / ROUTE_CHUNK);
    __syncthreads();
    if (threadIdx.x == 0)
        last = alone || (one_block && draw_last(a.tickets, (n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK));
    __syncthreads();
    if (last) route_sort<THREADS>(a, alone ? ids : NULL, memory);
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
        float sum = chain_sum(sums[i]);
        if (lane == i) logit = sum;
    }
    if (lane < n && e < a.n_experts) __stcg(out + (size_t)lane * (size_t)pitch_of(a) + (size_t)e, logit);
}

/* 1 / rms of a row. */
static DEVICE float row_inverse(const struct route_args &a, const float4 *h, int lane) {
    float squares = 0.0f;
    for (int first = 0; first < a.n_cols / 4; first += 32 * HELD) {
        float4 v[HELD];
#pragma unroll
        for (int j = 0; j < HELD; j++) v[j] = load_if(first + 32 * j < a.n_cols / 4, h + first + 32 * j + lane);
#pragma unroll
        for (int j = 0; j < HELD; j++) squares += square(v[j]);
    }
    return inverse_of(a, chain_sum(squares));
}

/* N: tokens of a block, 1 or ROUTE_CHUNK. All blocks of a chunk write a part of its x. */
template <int N>
static __global__ void __launch_bounds__(THREADS, 1)
    k_route_few_f32(const __grid_constant__ struct route_args a) {
    __shared__ int ids[ROUTE_CHUNK * MAX_EXPERTS_USED];
    __shared__ bool last;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, quads = a.n_cols / 4;
    int e = (int)blockIdx.x * WARPS + warp, t0 = (int)blockIdx.y * N, n_tokens = a.header->n_tokens;
    if (t0 >= n_tokens) return;
    const float4 *h = (const float4 *)a.h + (size_t)t0 * (size_t)quads;
    int n = min(n_tokens - t0, N);
    few_logits<N>(a, h, n, e, a.partials + (size_t)t0 * (size_t)pitch_of(a), lane);
    depend_release();
    __syncthreads();
    if (threadIdx.x == 0) last = draw_last(a.tickets + 1 + blockIdx.y, (int)gridDim.x);
    float inverse = 0.0f;
    if (warp < n) {
        const float4 *row = h + (size_t)warp * (size_t)quads, *norm = (const float4 *)a.norm;
        uint2 *x = (uint2 *)a.x + (size_t)(t0 + warp) * (size_t)quads;
        inverse = row_inverse(a, row, lane);
        for (int i = 32 * (int)blockIdx.x + lane; i < quads; i += 32 * (int)gridDim.x)
            x[i] = normed(row[i], inverse, norm[i]);
    }
    __syncthreads();
    if (!last) return;
    choose_chunk<1>(a, t0, n, inverse, ids, lane, warp);
    if (!a.unsorted) sort_chunk(a, t0, n, ids);
}

/* ---- many tokens -------------------------------------------------------------------------------------------------- */

template <int TT>
static __global__ void __launch_bounds__(THREADS, 2)
    k_route_logits_f32(const __grid_constant__ struct route_args a) {
    typedef logit_tile<TT> tile;
    tile &b = *(tile *)shared_bytes;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    int t0 = (int)blockIdx.x * TT, n_tokens = a.header->n_tokens, quads = a.n_cols / (8 * ROUTE_PLANES);
    if (t0 >= n_tokens) return;
    float acc[tile::TM][tile::TN] = {}, squares = 0.0f; /* thread 2 i + c: of token i, chain c */
    const float *own = &b.x[(int)threadIdx.x / 2 % TT][(int)threadIdx.x % 2 * (4 * CHAIN_QUADS)];
    for (int first = 0; first < quads; first += CHAIN_QUADS) {
        typename tile::weights weights;
        if (first > 0) __syncthreads();
        tile::load_weights(a, first / CHAIN_QUADS, lane, warp, weights);
        if (TT == 64) b.put_weights(weights, lane, warp); /* registers are for sums */
        if (first == 0) depend_wait();
        b.fetch_inputs(a, first / CHAIN_QUADS, t0, lane, warp);
        if (first == 0) bring_next(a);
        if (TT < 64) b.put_weights(weights, lane, warp);
        copy_wait<0>();
        __syncthreads();
        int n = min(quads - first, (int)CHAIN_QUADS);
        b.add_piece(n, lane, warp, acc);
        if (blockIdx.y == 0 && threadIdx.x < 2 * TT)
            for (int k = 0; k < n; k++) squares += square(*(const float4 *)(own + 4 * k));
    }
    squares += __shfl_xor_sync(ALL_LANES, squares, 1);
    int t = t0 + (int)threadIdx.x / 2;
    if (blockIdx.y == 0 && threadIdx.x < 2 * TT && threadIdx.x % 2 == 0 && t < n_tokens)
        __stcg(squares_of(a) + (size_t)t * ROUTE_PLANES + blockIdx.z, squares);
    __syncthreads();
    depend_release();
    b.store(a, t0, lane, warp, acc);
}

/* Half of the blocks choose, the others write x: who chooses may have to sort, and is waited for. */
static __global__ void __launch_bounds__(THREADS, 2)
    k_route_choose_f32(const __grid_constant__ struct route_args a) {
    __shared__ int ids[ROUTE_CHUNK * MAX_EXPERTS_USED];
    __shared__ float inverses[ROUTE_CHUNK];
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, n_chunks = (int)gridDim.x / 2;
    bool writes = (int)blockIdx.x >= n_chunks;
    int t0 = ((int)blockIdx.x - (writes ? n_chunks : 0)) * ROUTE_CHUNK, n = min(a.header->n_tokens - t0, (int)ROUTE_CHUNK);
    if (n <= 0) return;
    depend_wait();
    if (writes) {
        float inverse = warp < n ? inverse_of_planes(a, load_squares(a, t0 + warp, lane)) : 0.0f;
        if (lane == 0) inverses[warp] = inverse;
        __syncthreads();
        depend_release();
        return write_rows(a, t0, n, inverses);
    }
    choose_chunk<ROUTE_PLANES>(a, t0, n, 0.0f, ids, lane, warp);
    depend_release();
    if (!a.unsorted) sort_chunk(a, t0, n, ids);
}

static __global__ void __launch_bounds__(32 * PLACE_WARPS)
    k_route_place_i32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    if ((int)blockIdx.x * PLACE_WARPS * ROUTE_CHUNK < a.header->n_tokens)
        route_place<PLACE_WARPS>(a, (uint32_t *)shared_bytes);
}

/* Routings that came from elsewhere. */
static __global__ void __launch_bounds__(THREADS) k_route_mark_i32(const __grid_constant__ struct route_args a) {
    depend_release();
    int first = (int)blockIdx.x * ROUTE_CHUNK, n = min(a.header->n_tokens - first, (int)ROUTE_CHUNK);
    if (n <= 0) return;
    depend_wait();
    route_mark<THREADS>(a, a.lists.ids + first * a.n_used, n * a.n_used, (uint32_t *)shared_bytes);
    save_marks<THREADS>(a, (const uint32_t *)shared_bytes, (int)blockIdx.x);
}

static __global__ void __launch_bounds__(THREADS) k_route_sort_i32(const __grid_constant__ struct route_args a) {
    depend_release();
    depend_wait();
    route_sort<THREADS>(a, NULL, (uint32_t *)shared_bytes);
}

/* ---- launching ------------------------------------------------------------------------------------------------- */

/* For steps of up to `bucket` tokens. */
static size_t sort_bytes(const struct route_args *a, int bucket) {
    return route_sort_bytes(bucket < SORT_TOKENS ? bucket : SORT_TOKENS, a->n_experts, a->n_used);
}

/* alone: a processor has one block, two would halve each other's speed while others idle. Tiles of 16 tokens are too short
 * for that to pay. */
template <int TT>
static cudaError_t launch_logits(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    dim3 grid((unsigned)((bucket + TT - 1) / TT), (unsigned)(route_pitch(a->n_experts) / TILE_EXPERTS), ROUTE_PLANES);
    size_t shared = sizeof(logit_tile<TT>), most = q->max_shared / 2 + 1;
    bool alone = TT == 32 && grid.x * grid.y * grid.z <= (unsigned)q->n_sm;
    return launch(k_route_logits_f32<TT>, grid, THREADS, alone && shared < most ? most : shared, q, *a);
}

static cudaError_t launch_place(const struct route_args *a, unsigned chunks, const struct cuda_queue *q) {
    size_t shared = route_place_bytes(PLACE_WARPS, a->n_experts);
    return launch(k_route_place_i32, dim3((chunks + PLACE_WARPS - 1) / PLACE_WARPS, 1, 1), 32 * PLACE_WARPS, shared, q, *a);
}

cudaError_t cuda_route(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    unsigned chunks = (unsigned)((bucket + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    dim3 few((unsigned)((a->n_experts + WARPS - 1) / WARPS), chunks, 1);
    if (bucket == 1) return launch(k_route_few_f32<1>, few, THREADS, sort_bytes(a, bucket), q, *a);
    if (bucket <= FEW_TOKENS) return launch(k_route_few_f32<ROUTE_CHUNK>, few, THREADS, sort_bytes(a, bucket), q, *a);
    bool wide = bucket > WIDE_TOKENS && sizeof(logit_tile<64>) <= q->max_shared;
    cudaError_t e = wide            ? launch_logits<64>(a, bucket, q)
                    : bucket <= 128 ? launch_logits<16>(a, bucket, q)
                                    : launch_logits<32>(a, bucket, q);
    if (e == cudaSuccess)
        e = launch(k_route_choose_f32, dim3(2 * chunks, 1, 1), THREADS, sort_bytes(a, bucket), q, *a);
    return e == cudaSuccess && bucket > SORT_TOKENS && !a->unsorted ? launch_place(a, chunks, q) : e;
}

cudaError_t cuda_route_sort(const struct route_args *a, int bucket, const struct cuda_queue *q) {
    unsigned chunks = (unsigned)((bucket + ROUTE_CHUNK - 1) / ROUTE_CHUNK);
    cudaError_t e = launch(k_route_mark_i32, dim3(chunks, 1, 1), THREADS, sort_bytes(a, 1), q, *a);
    if (e != cudaSuccess) return e;
    if (bucket > SORT_TOKENS) return launch_place(a, chunks, q);
    return launch(k_route_sort_i32, dim3(1, 1, 1), THREADS, sort_bytes(a, bucket), q, *a);
}

template <typename K> static cudaError_t allow_shared(K *kernel, size_t n) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n);
}

cudaError_t route_prepare(size_t max_shared) {
    const size_t sort = route_sort_bytes(SORT_TOKENS, MAX_EXPERTS, MAX_EXPERTS_USED);
    const size_t half = max_shared / 2 + 1, logits32 = half > sizeof(logit_tile<32>) ? half : sizeof(logit_tile<32>);
    const cudaError_t all[] = {
        allow_shared(k_route_few_f32<1>, sort),
        allow_shared(k_route_few_f32<ROUTE_CHUNK>, sort),
        allow_shared(k_route_logits_f32<16>, sizeof(logit_tile<16>)),
        allow_shared(k_route_logits_f32<32>, logits32),
        sizeof(logit_tile<64>) <= max_shared ? allow_shared(k_route_logits_f32<64>, sizeof(logit_tile<64>)) : cudaSuccess,
        allow_shared(k_route_choose_f32, sort),
        allow_shared(k_route_mark_i32, sort),
        allow_shared(k_route_sort_i32, sort),
        allow_shared(k_route_place_i32, route_place_bytes(PLACE_WARPS, MAX_EXPERTS))};
    for (cudaError_t e : all)
        if (e != cudaSuccess) return e;
    return cudaSuccess;
}
