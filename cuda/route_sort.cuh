/* route_sort: the stable counting sort of (token, expert) pairs by expert, and the work lists that the expert products
 * walk, by one block. Within an expert, rows stand in the order of their tokens.
 *
 * Up to SMALL_TOKENS tokens a group has at most SMALL_TOKENS rows, which is one tile in every list: then each pair
 * finds its place by looking at all others. More pairs are counted by warps, each a stretch of them. */
#ifndef MOED_CUDA_ROUTE_SORT_CUH
#define MOED_CUDA_ROUTE_SORT_CUH

#include "cuda/common.cuh"

enum : int { SMALL_TOKENS = 8, SMALL_PAIRS = SMALL_TOKENS * MAX_EXPERTS_USED, BATCH = 8 /* loads under way */ };

/* Groups cut into tiles of at most `width` tokens, as even as multiples of 8 allow. */
static DEVICE int tile_tokens(int n, int width) {
    int n_tiles = (n + width - 1) / width, even = (n + n_tiles - 1) / n_tiles;
    return (even + 7) / 8 * 8;
}
static DEVICE int tiles_of(int n, int width) {
    if (n == 0) return 0;
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

/* shared: [WARPS][E] cursors, [E] counts, [E] first, [N_WIDTHS][E] tiles before. */
template <int WARPS> static constexpr int sort_shared_ints(int n_experts) {
    return (WARPS + 2 + N_WIDTHS) * n_experts;
}

/* Ids stand in a.lists.ids. Rows within a warp's stretch and expert are kept in row_of between the passes. */
template <int WARPS> static DEVICE void route_sort(const struct route_args &a, int *shared, bool count_reads) {
    int n_experts = a.n_experts, n_pairs = a.header->n_tokens * a.n_used;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int *cursors = shared, *counts = shared + WARPS * n_experts, *first = counts + n_experts;
    int *tiles_before = first + n_experts, *own = cursors + warp * n_experts;
    int chunk = (n_pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    int begin = warp * chunk, end = min(begin + chunk, n_pairs);
    for (int e = lane; e < n_experts; e += 32) own[e] = 0;
    __syncwarp();
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
            if (e[j] >= 0) a.lists.row_of[base + 32 * j] = before + __popc(below);
        }
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
    for (int job = warp; job <= N_WIDTHS + 1; job += WARPS) {
        if (job == 0) {
            warp_prefix([=](int e) { return counts[e]; }, first, n_experts, lane);
        } else if (job <= N_WIDTHS) {
            int list = job - 1, *before = tiles_before + list * n_experts;
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
    for (int base = begin + lane; base < end; base += 32 * BATCH) {
        int e[BATCH], row[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            bool real = base + 32 * j < end;
            e[j] = real ? __ldcg(a.lists.ids + base + 32 * j) : 0;
            row[j] = real ? a.lists.row_of[base + 32 * j] : 0;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int i = base + 32 * j;
            if (i >= end) break;
            row[j] += first[e[j]] + own[e[j]];
            a.lists.token_of[row[j]] = i / a.n_used;
            a.lists.row_of[i] = row[j];
        }
    }
    for (int u = tid; u < N_WIDTHS * n_experts; u += WARPS * 32) {
        int list = u / n_experts, e = u - list * n_experts, n = counts[e];
        if (n == 0) continue;
        int w = tile_tokens(n, 8 << list);
        struct gemm_item *to = a.lists.items[list] + tiles_before[u];
        for (int at = 0; at < n; at += w) *to++ = {e, first[e] + at, min(w, n - at), 0};
    }
    for (int e = tid; e <= n_experts; e += WARPS * 32)
        a.lists.expert_first[e] = e < n_experts ? first[e] : n_pairs;
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
