/* route_sort: the stable counting sort of (token, expert) pairs by expert, and the work lists that the expert products
 * walk. Within an expert, rows stand in the order of their tokens.
 *
 * Each chunk of ROUTE_CHUNK tokens marks its experts: a byte for each, with a bit for each token. A pair's place among its
 * expert's rows is the number of bits in the chunks before, and before its own bit. Up to SORT_TOKENS tokens one
 * block sorts (route_sort); more are placed by many (route_place). */
#ifndef MOED_CUDA_ROUTE_SORT_CUH
#define MOED_CUDA_ROUTE_SORT_CUH

#include "cuda/common.cuh"

enum : int { SORT_TOKENS = 256 /* a byte says which */, BATCH = 8 /* loads under way */ };
static_assert((int)ROUTE_CHUNK == 8, "a bit for each token");

/* Groups cut into tiles of at most 8 << list tokens, as even as multiples of 8 allow. Most are one tile. */
static DEVICE int tile_tokens(int n, int list) {
    int even = n;
    if (n > 8 << list) {
        int n_tiles = (n + (8 << list) - 1) >> (3 + list);
        even = (n + n_tiles - 1) / n_tiles;
    }
    return (even + 7) / 8 * 8;
}
static DEVICE int tiles_of(int n, int list) {
    if (n <= 8 << list) return n > 0;
    int w = tile_tokens(n, list);
    return (n + w - 1) / w;
}

static DEVICE int token_of_pair(const struct route_args &a, int pair) {
    return a.n_used == 1 ? pair : (int)__umulhi((uint32_t)pair, a.used_inverse);
}

/* ---- marks ----------------------------------------------------------------------------------------------------- */

/* Those of a chunk's pairs, in shared memory: a byte for each expert. */
template <int THREADS>
static DEVICE void route_mark(const struct route_args &a, const int *ids, int n_pairs, uint32_t *marks) {
    int n_words = route_pitch(a.n_experts) / 4;
    for (int i = (int)threadIdx.x; i < n_words; i += THREADS) marks[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n_pairs; i += THREADS)
        atomicOr(&marks[ids[i] >> 2], 1u << (8 * (ids[i] & 3) + token_of_pair(a, i)));
    __syncthreads();
}
template <int THREADS> static DEVICE void save_marks(const struct route_args &a, const uint32_t *marks, int chunk) {
    int n_words = route_pitch(a.n_experts) / 4;
    for (int i = (int)threadIdx.x; i < n_words; i += THREADS) __stcg((uint32_t *)a.marks + chunk * n_words + i, marks[i]);
}

/* Rows of a chunk's expert before its token `t`. */
static DEVICE int marked_before(uint8_t marks, int t) { return __popc(marks & ((1u << (t % ROUTE_CHUNK)) - 1u)); }

/* ---- experts ---------------------------------------------------------------------------------------------------- */

/* Sums over the threads before this one; all: over all. totals[2 * THREADS / 32] is shared. */
template <int THREADS> static DEVICE void block_prefix(int &rows, int &tiles, int &all_tiles, int *totals) {
    constexpr int warps = THREADS / 32;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, own_rows = rows, own_tiles = tiles;
    for (int d = 1; d < 32; d <<= 1) {
        int r = __shfl_up_sync(ALL_LANES, rows, d), t = __shfl_up_sync(ALL_LANES, tiles, d);
        if (lane >= d) rows += r, tiles += t;
    }
    if (lane == 31) totals[warp] = rows, totals[warps + warp] = tiles;
    __syncthreads();
    rows -= own_rows, tiles -= own_tiles, all_tiles = 0;
#pragma unroll
    for (int w = 0; w < warps; w++) {
        int t = totals[warps + w];
        if (w < warp) rows += totals[w], tiles += t;
        all_tiles += t;
    }
    __syncthreads();
}

/* From the rows n[i] of expert e0 + i, i < PER: where they begin; and if `lists`, what the lists say. By all threads. */
template <int THREADS, int PER>
static DEVICE void place_experts(const struct route_args &a, int e0, const int (&n)[PER], bool lists, int *first, int *totals) {
#pragma unroll 1
    for (int list = 0; list < N_WIDTHS; list++) {
        if (!(a.widths >> list & 1)) continue;
        int rows = 0, tiles = 0, all;
#pragma unroll
        for (int i = 0; i < PER; i++) rows += n[i], tiles += tiles_of(n[i], list);
        block_prefix<THREADS>(rows, tiles, all, totals);
        if (threadIdx.x == 0 && lists) a.lists.n_items[list] = all;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            if (e0 + i < a.n_experts) first[e0 + i] = rows;
            if (lists) {
                int w = tile_tokens(n[i], list);
                struct gemm_item *to = a.lists.items[list] + tiles;
#pragma unroll 1
                for (int at = 0; at < n[i]; at += w, tiles++) *to++ = {e0 + i, rows + at, min(w, n[i] - at), 0};
                if (e0 + i < a.n_experts) a.lists.expert_first[e0 + i] = rows;
            }
            rows += n[i];
        }
    }
    if (lists && threadIdx.x == 0) a.lists.expert_first[a.n_experts] = a.header->n_tokens * a.n_used;
}

/* The groups of those rows are read. */
template <int PER> static DEVICE void count_reads(const struct route_args &a, const int (&n)[PER]) {
    if (!a.n_reads) return;
    int groups = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) groups += n[i] > 0;
    groups = warp_sum(groups);
    if (groups > 0 && (threadIdx.x & 31) == 0) atomicAdd((unsigned long long *)a.n_reads, (unsigned long long)groups);
}

/* ---- one block -------------------------------------------------------------------------------------------------- */

/* Bytes of shared memory for up to n_tokens; marks come first. */
KERNEL_FN size_t route_sort_bytes(int n_tokens, int n_experts, int n_used) {
    size_t chunks = (size_t)((n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK), pitch = (size_t)route_pitch(n_experts);
    return chunks * pitch * 3 + pitch * sizeof(int) + 32 * sizeof(int) + (size_t)n_tokens * (size_t)n_used;
}

/* Of up to SORT_TOKENS tokens. ids: of one chunk, whose marks are in memory; NULL: both are in global memory. */
template <int THREADS> static DEVICE void route_sort(const struct route_args &a, const int *ids, uint32_t *memory) {
    constexpr int PER = MAX_EXPERTS / THREADS;
    int n_tokens = a.header->n_tokens, n_pairs = n_tokens * a.n_used, pitch = route_pitch(a.n_experts);
    int tid = (int)threadIdx.x, n_chunks = (n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK, e[BATCH];
    const uint8_t *marks = (const uint8_t *)memory;
    int *first = (int *)memory + n_chunks * (pitch / 4), *totals = first + pitch; /* [E], [2 * THREADS / 32] */
    uint16_t *before = (uint16_t *)(totals + 32);                                 /* [chunks][pitch] */
    uint8_t *tokens = (uint8_t *)(before + n_chunks * pitch);                     /* [pairs]: in routing order */
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
        int i = tid + THREADS * j;
        e[j] = i >= n_pairs ? 0 : ids ? ids[i] : __ldcg(a.lists.ids + i);
    }
    if (!ids) {
#pragma unroll 1
        for (int i = tid; i < n_chunks * (pitch / 16); i += THREADS) ((uint4 *)memory)[i] = __ldcg((const uint4 *)a.marks + i);
        __syncthreads();
    }
    int per = (a.n_experts + THREADS - 1) / THREADS, n[PER] = {};
#pragma unroll
    for (int i = 0; i < PER; i++) {
        if (i >= per || tid * per + i >= a.n_experts) break;
#pragma unroll 1
        for (int c0 = 0; c0 < n_chunks; c0 += BATCH) {
            int at = c0 * pitch + tid * per + i, m[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) m[j] = c0 + j < n_chunks ? marks[at + j * pitch] : 0;
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                if (c0 + j < n_chunks) before[at + j * pitch] = (uint16_t)n[i];
                n[i] += __popc(m[j]);
            }
        }
    }
    place_experts<THREADS, PER>(a, tid * per, n, true, first, totals);
    __syncthreads();
#pragma unroll 1
    for (int base = tid; base < n_pairs; base += THREADS * BATCH) {
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int i = base + THREADS * j, t = token_of_pair(a, i);
            if (i >= n_pairs) break;
            if (base != tid) e[j] = ids ? ids[i] : __ldcg(a.lists.ids + i);
            int at = t / ROUTE_CHUNK * pitch + e[j], row = first[e[j]] + before[at] + marked_before(marks[at], t);
            a.lists.row_of[i] = row;
            tokens[row] = (uint8_t)t;
        }
    }
    __syncthreads();
    for (int i = tid; i < n_pairs; i += THREADS) a.lists.token_of[i] = tokens[i]; /* rows together, not each by itself */
    count_reads<PER>(a, n);
}

/* ---- many blocks -------------------------------------------------------------------------------------------------- */

KERNEL_FN size_t route_place_bytes(int warps, int n_experts) {
    return (size_t)route_pitch(n_experts) * (size_t)(5 * warps + 12) + 64 * sizeof(int);
}

/* Each block has WARPS chunks and adds up what stands before them. The first block writes the lists. */
template <int WARPS> static DEVICE void route_place(const struct route_args &a, uint32_t *memory) {
    constexpr int THREADS = 32 * WARPS;
    static_assert(THREADS >= MAX_EXPERTS, "a thread for each expert");
    int n_experts = a.n_experts, n_tokens = a.header->n_tokens, pitch = route_pitch(n_experts);
    int n_chunks = (n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK, first_chunk = (int)blockIdx.x * WARPS;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    uint8_t *marks = (uint8_t *)memory;                                /* [WARPS][pitch] */
    int *before = (int *)(marks + WARPS * pitch), *first = before + WARPS * pitch; /* [WARPS][pitch], [E] */
    int *all = first + pitch, *earlier = all + pitch, *totals = earlier + pitch;
    for (int e = tid; e < pitch; e += THREADS) all[e] = earlier[e] = 0;
    for (int i = tid; i < WARPS * (pitch / 16); i += THREADS) {
        bool real = first_chunk * (pitch / 16) + i < n_chunks * (pitch / 16);
        ((uint4 *)marks)[i] = real ? ((const uint4 *)a.marks)[first_chunk * (pitch / 16) + i] : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    int parts = THREADS / pitch, part = tid / pitch, e = tid % pitch; /* parts of the chunks */
    if (part < parts) {
        int sum = 0, sum_earlier = 0;
        for (int c0 = part; c0 < n_chunks; c0 += parts * 2 * BATCH) {
            int n[2 * BATCH];
#pragma unroll
            for (int j = 0; j < 2 * BATCH; j++) {
                int c = c0 + parts * j;
                n[j] = c < n_chunks ? a.marks[c * pitch + e] : 0;
            }
#pragma unroll
            for (int j = 0; j < 2 * BATCH; j++) {
                sum += __popc(n[j]);
                if (c0 + parts * j < first_chunk) sum_earlier += __popc(n[j]);
            }
        }
        atomicAdd(&all[e], sum);
        atomicAdd(&earlier[e], sum_earlier);
    }
    __syncthreads();
    int n[1] = {tid < n_experts ? all[tid] : 0};
    if (tid < n_experts) {
        int at = earlier[tid];
#pragma unroll 4
        for (int w = 0; w < WARPS; w++) before[w * pitch + tid] = at, at += __popc(marks[w * pitch + tid]);
    }
    place_experts<THREADS, 1>(a, tid, n, blockIdx.x == 0, first, totals);
    if (blockIdx.x == 0) count_reads<1>(a, n);
    __syncthreads();
    int chunk = ROUTE_CHUNK * a.n_used, begin = (first_chunk + warp) * chunk, end = min(begin + chunk, n_tokens * a.n_used);
    for (int i = begin + lane; i < end; i += 32) {
        int id = a.lists.ids[i], t = token_of_pair(a, i), at = warp * pitch + id;
        int row = first[id] + before[at] + marked_before(marks[at], t);
        a.lists.token_of[row] = t;
        a.lists.row_of[i] = row;
    }
}

#endif
