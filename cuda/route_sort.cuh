/* route_sort: the stable counting sort of (token, expert) pairs by expert, and the work lists that the expert products
 * walk. Within an expert, rows stand in the order of their tokens.
 *
 * Up to SMALL_TOKENS tokens a group has at most SMALL_TOKENS rows, which is one tile in every list: then each pair
 * finds its place by looking at all others (route_sort_small). More pairs are counted by warps, each a stretch of
 * them, in one block (route_sort); or, counted already, placed by many (route_place). */
#ifndef MOED_CUDA_ROUTE_SORT_CUH
#define MOED_CUDA_ROUTE_SORT_CUH

#include "cuda/common.cuh"

enum : int { SMALL_TOKENS = 8, SMALL_PAIRS = SMALL_TOKENS * MAX_EXPERTS_USED, BATCH = 8 /* loads under way */ };

/* Groups cut into tiles of at most `width` tokens, as even as multiples of 8 allow. Most are one tile. */
static DEVICE int tile_tokens(int n, int width) {
    int even = n;
    if (n > width) {
        int n_tiles = (n + width - 1) / width;
        even = (n + n_tiles - 1) / n_tiles;
    }
    return (even + 7) / 8 * 8;
}
static DEVICE int tiles_of(int n, int width) {
    if (n <= width) return n > 0;
    int w = tile_tokens(n, width);
    return (n + w - 1) / w;
}

/* One warp: before[i] = value(0) + … + value(i - 1) for i < n <= MAX_EXPERTS; returns the total. */
template <typename F> static DEVICE int warp_prefix(F value, int *before, int n, int lane) {
    int per = (n + 31) / 32, begin = lane * per, end = min(begin + per, n), own = 0;
    for (int i = begin; i < end; i++) own += value(i);
    int sum = own;
    for (int d = 1; d < 32; d <<= 1) {
        int up = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane >= d) sum += up;
    }
    int at = sum - own;
    for (int i = begin; i < end; i++) before[i] = at, at += value(i);
    return __shfl_sync(ALL_LANES, sum, 31);
}

/* Without waiting for what the counter was. */
static DEVICE void count_groups(const struct route_args &a, int groups) {
    atomicAdd((unsigned long long *)a.n_reads, (unsigned long long)groups);
}

/* What all sorts come to: per expert, its rows and where they begin; per list and expert, the tiles before its own. */
struct sort_shared {
    int *counts, *first, *tiles_before; /* [E], [E], [N_WIDTHS][E] */

    DEVICE sort_shared(int *memory, int n_experts)
        : counts(memory), first(memory + n_experts), tiles_before(memory + 2 * n_experts) {}
};
static constexpr int sort_shared_ints(int warps, int n_experts) { return (warps + 2 + N_WIDTHS) * n_experts; }

/* From counts: first, and if `lists` the rest, and what the lists say in memory. By a block of WARPS warps. */
template <int WARPS>
static DEVICE void sort_prefixes(const struct route_args &a, const struct sort_shared &s, bool lists, bool count_reads) {
    int n_experts = a.n_experts, lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const int *counts = s.counts;
    for (int job = warp; job <= (lists ? N_WIDTHS + 1 : 0); job += WARPS) {
        if (job == 0) {
            warp_prefix([=](int e) { return counts[e]; }, s.first, n_experts, lane);
        } else if (job <= N_WIDTHS) {
            int list = job - 1, *before = s.tiles_before + list * n_experts;
            int n = warp_prefix([=](int e) { return tiles_of(counts[e], 8 << list); }, before, n_experts, lane);
            if (lane == 0) a.lists.n_items[list] = n;
        } else if (count_reads) {
            int groups = 0;
            for (int e = lane; e < n_experts; e += 32) groups += counts[e] > 0;
            groups = warp_sum(groups);
            if (lane == 0) count_groups(a, groups);
        }
    }
    __syncthreads();
    if (!lists) return;
    for (int u = (int)threadIdx.x; u < N_WIDTHS * n_experts; u += WARPS * 32) {
        int list = u / n_experts, e = u - list * n_experts, n = counts[e];
        if (n == 0) continue;
        int w = tile_tokens(n, 8 << list);
        struct gemm_item *to = a.lists.items[list] + s.tiles_before[u];
        for (int at = 0; at < n; at += w) *to++ = {e, s.first[e] + at, min(w, n - at), 0};
    }
    for (int e = (int)threadIdx.x; e <= n_experts; e += WARPS * 32)
        a.lists.expert_first[e] = e < n_experts ? s.first[e] : a.header->n_tokens * a.n_used;
}

/* A warp's pairs begin … end - 1: how many of the stretch's earlier ones have the same expert, on top of own[E], which
 * is moved on. take(pair, expert, before) for each. */
template <typename F>
static DEVICE void rank_pairs(const struct route_args &a, int begin, int end, int *own, int lane, F take) {
    for (int base = begin + lane; base - lane < end; base += 32 * BATCH) {
        int e[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) e[j] = base + 32 * j < end ? __ldcg(a.lists.ids + base + 32 * j) : -1;
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            uint32_t same = __match_any_sync(ALL_LANES, e[j]), below = same & ((1u << lane) - 1u);
            int before = e[j] >= 0 ? own[e[j]] : 0;
            __syncwarp();
            if (e[j] >= 0 && below == 0) own[e[j]] = before + __popc(same);
            __syncwarp();
            if (e[j] >= 0) take(base + 32 * j, e[j], before + __popc(below));
        }
    }
}

static DEVICE void place_pair(const struct route_args &a, int pair, int row) {
    a.lists.token_of[row] = pair / a.n_used;
    a.lists.row_of[pair] = row;
}

/* All of it by one block; ids stand in a.lists.ids. Ranks are kept in row_of between the passes. */
template <int WARPS> static DEVICE void route_sort(const struct route_args &a, int *memory, bool count_reads) {
    int n_experts = a.n_experts, n_pairs = a.header->n_tokens * a.n_used;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int *cursors = memory, *own = cursors + warp * n_experts, *row_of = a.lists.row_of;
    struct sort_shared s(memory + WARPS * n_experts, n_experts);
    int chunk = (n_pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    int begin = min(warp * chunk, n_pairs), end = min(begin + chunk, n_pairs);
    for (int e = lane; e < n_experts; e += 32) own[e] = 0;
    __syncwarp();
    rank_pairs(a, begin, end, own, lane, [=](int pair, int, int before) { row_of[pair] = before; });
    __syncthreads();
    for (int e = tid; e < n_experts; e += WARPS * 32) {
        int n = 0;
        for (int w = 0; w < WARPS; w++) {
            int c = cursors[w * n_experts + e];
            cursors[w * n_experts + e] = n;
            n += c;
        }
        s.counts[e] = n;
    }
    __syncthreads();
    sort_prefixes<WARPS>(a, s, true, count_reads);
    for (int base = begin + lane; base < end; base += 32 * BATCH) {
        int e[BATCH], row[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            bool real = base + 32 * j < end;
            e[j] = real ? __ldcg(a.lists.ids + base + 32 * j) : 0;
            row[j] = real ? row_of[base + 32 * j] : 0;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (base + 32 * j < end) place_pair(a, base + 32 * j, row[j] + s.first[e[j]] + own[e[j]]);
    }
}

/* By many blocks: each has WARPS chunks of ROUTE_CHUNK tokens, whose experts are counted in a.chunk_counts, [chunk][E], and adds up
 * what stands before them. The first block writes the lists. PARTS threads share an expert's chunks. */
template <int WARPS> static DEVICE void route_place(const struct route_args &a, int *memory) {
    int n_experts = a.n_experts, n_pairs = a.header->n_tokens * a.n_used;
    int n_chunks = (a.header->n_tokens + ROUTE_CHUNK - 1) / ROUTE_CHUNK, first_chunk = (int)blockIdx.x * WARPS;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int *cursors = memory, *own = cursors + warp * n_experts;
    struct sort_shared s(memory + WARPS * n_experts, n_experts);
    for (int e = tid; e < n_experts; e += 32 * WARPS) s.counts[e] = s.first[e] = 0;
    __syncthreads();
    int parts = max(32 * WARPS / n_experts, 1), part = tid / n_experts;
    for (int e = tid % n_experts; e < n_experts && part < parts; e += 32 * WARPS) {
        int all = 0, before = 0;
        for (int c0 = part; c0 < n_chunks; c0 += parts * BATCH) {
            int n[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int c = c0 + parts * j;
                n[j] = c < n_chunks ? a.chunk_counts[c * n_experts + e] : 0;
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) all += n[j], before += c0 + parts * j < first_chunk ? n[j] : 0;
        }
        atomicAdd(&s.counts[e], all);
        atomicAdd(&s.first[e], before);
    }
    __syncthreads();
    for (int e = tid; e < n_experts; e += 32 * WARPS) {
        int n[WARPS], at = s.first[e];
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            n[w] = first_chunk + w < n_chunks ? a.chunk_counts[(first_chunk + w) * n_experts + e] : 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) cursors[w * n_experts + e] = at, at += n[w];
    }
    __syncthreads();
    sort_prefixes<WARPS>(a, s, blockIdx.x == 0, true);
    int chunk = ROUTE_CHUNK * a.n_used, begin = min((first_chunk + warp) * chunk, n_pairs);
    const int *first = s.first;
    rank_pairs(a, begin, min(begin + chunk, n_pairs), own, lane,
               [=](int pair, int e, int before) { place_pair(a, pair, first[e] + before); });
}

/* ids[n_pairs] in shared memory, of at most SMALL_TOKENS tokens; present[MAX_EXPERTS / 32] in shared memory. */
template <int THREADS>
static DEVICE void route_sort_small(const struct route_args &a, const int *ids, uint32_t *present, int n_pairs) {
    int tid = (int)threadIdx.x, n_words = (a.n_experts + 31) / 32;
    for (int i = tid; i < n_words; i += THREADS) present[i] = 0;
    __syncthreads();
    for (int i = tid; i < n_pairs; i += THREADS) atomicOr(&present[ids[i] >> 5], 1u << (ids[i] & 31));
    __syncthreads();
    for (int i = tid; i < n_pairs; i += THREADS) {
        int e = ids[i], smaller = 0, earlier = 0, same = 0, groups = 0;
        for (int j = 0; j < n_pairs; j++) {
            int other = ids[j];
            smaller += other < e;
            same += other == e;
            earlier += other == e && j < i;
        }
        int row = smaller + earlier;
        a.lists.token_of[row] = i / a.n_used;
        a.lists.row_of[i] = row;
        if (earlier > 0) continue;
        for (int w = 0; w < e >> 5; w++) groups += __popc(present[w]);
        groups += __popc(present[e >> 5] & ((1u << (e & 31)) - 1u));
        for (int list = 0; list < N_WIDTHS; list++) a.lists.items[list][groups] = {e, row, same, 0};
    }
    for (int e = tid; e <= a.n_experts; e += THREADS) {
        int smaller = 0;
        for (int j = 0; j < n_pairs; j++) smaller += ids[j] < e;
        a.lists.expert_first[e] = smaller;
    }
    if (tid >= 32) return;
    int groups = 0;
    for (int w = tid; w < n_words; w += 32) groups += __popc(present[w]);
    groups = warp_sum(groups);
    if (tid < N_WIDTHS) a.lists.n_items[tid] = groups;
    if (tid == 0) count_groups(a, groups);
}

#endif
