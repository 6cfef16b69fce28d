/* exchange: how GPUs that share a layer's experts meet, by stores and loads in each other's memory and without the host.
 *
 * A layer, on every rank, between its router and the next norm:
 *   k_exchange_gather  says "my ids and x are there" in every other rank's flags and waits until all have said so in its
 *                      own; then brings in all tokens' ids and x, rank after rank, as if they were one step's
 *   k_exchange_place   sorts the pairs of all tokens by expert; the same on every rank, but for the work lists, which
 *                      have only what is computed here
 *   ... the expert products, over those lists; a pair's product stands at the pair's row, on the rank that computes it ...
 *   k_exchange_meet    says "my products are there" and waits for the others'
 * and the norm that follows reads each product from the rank that has it, and adds them in the order that it has alone.
 *
 * Two waits a layer are enough. ids and x are overwritten by the next layer's router, after this rank's second wait, when
 * all ranks have gathered: each said so by its second flag. Products are overwritten by the next layer's, after this rank's
 * first wait there, when all ranks' norms have read them: each said so by the first flag that followed. A flag is
 * therefore never ahead of what is waited for.
 *
 * Ranks whose memory this GPU does not see (cuda/nccl.h) have their ids and x brought here by collectives, whole, before
 * k_exchange_gather, which then only packs them; and after the products, instead of k_exchange_meet, each rank sends the
 * others' (k_exchange_pack), so that a product from elsewhere lies in its sender's part of a buffer, at its pair.
 *
 * A wait ends after timeout_ns, or when the host says so: then *stop stays set, no later wait waits, and what is computed
 * is worth nothing, but stays within its buffers. Waiting kernels let the next kernel start only when their wait is
 * over and have few blocks, so that ranks may share a GPU: a kernel that waits never keeps its peer's from running. */
#include "cuda/common.cuh"
#include "cuda/route_sort.cuh"

enum : int {
    COPY_THREADS = 256,  /* of a gathering block; one more warp has the ids */
    COPIES = 8,          /* 16-byte loads of a thread that are under way at once: a way to another GPU is long */
    PACK_THREADS = 256,
    PLACE_WARPS = 16,
    PLACE_THREADS = 32 * PLACE_WARPS
};

static_assert((int)PLACE_THREADS >= (int)MAX_EXPERTS, "a thread has an expert");

/* ---- flags --------------------------------------------------------------------------------------------- */

static DEVICE uint64_t time_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
static DEVICE uint64_t load_flag(const uint64_t *p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
static DEVICE void store_flag(uint64_t *p, uint64_t v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/* In every other rank's flags, lane r in rank r's: what this GPU wrote until here is there. */
static DEVICE void say(const struct exchange_args &a, int first, uint32_t epoch, int n) {
    int r = (int)threadIdx.x;
    if (r < a.n_ranks && r != a.rank) {
        __threadfence_system();
        store_flag(a.flags[r] + first + a.rank, (uint64_t)epoch << 32 | (uint32_t)n);
    }
    __syncwarp();
}

/* Until the other rank has said `epoch` in this flag: the tokens that it has. 0 if it does not come, or will not. */
static DEVICE int hear(const struct exchange_args &a, const uint64_t *flag, uint32_t epoch) {
    uint64_t begun = time_ns();
    for (int n = 1;; n++) {
        uint64_t v = load_flag(flag);
        if ((int32_t)((uint32_t)(v >> 32) - epoch) >= 0) return min((int)(uint32_t)v, a.max_tokens);
        if (n % 256 != 0) continue;
        if (*(volatile uint32_t *)a.stop != 0) return 0;
        if (time_ns() - begun > a.timeout_ns) *(volatile uint32_t *)a.stop = 1;
    }
}

/* ---- all ranks' tokens --------------------------------------------------------------------------------- */

/* first[r]: the first of rank r's tokens among all; first[R]: how many there are. */
static DEVICE int rank_of(const int *first, int token) {
    int r = 0;
    while (token >= first[r + 1]) r++;
    return r;
}

/* x of tokens begin … end - 1. */
static DEVICE void gather_inputs(const struct exchange_args &a, const int *first, int begin, int end) {
    int row = a.n_cols / 8, stop = end * row; /* pieces of 16 bytes */
    uint4 *dst = (uint4 *)a.inputs;
    for (int i0 = begin * row + (int)threadIdx.x; i0 < stop; i0 += COPIES * COPY_THREADS) {
        uint4 v[COPIES];
#pragma unroll
        for (int j = 0; j < COPIES; j++) {
            int i = min(i0 + j * COPY_THREADS, stop - 1), token = i / row, r = rank_of(first, token);
            v[j] = __ldcg((const uint4 *)a.x[r] + (i - first[r] * row));
        }
#pragma unroll
        for (int j = 0; j < COPIES; j++)
            if (i0 + j * COPY_THREADS < stop) dst[i0 + j * COPY_THREADS] = v[j];
    }
}

/* Their ids, and how many pairs each expert has among them; by one warp. */
static DEVICE void gather_ids(const struct exchange_args &a, const int *first, int begin, int end, int *counts, int lane) {
    int stop = end * a.n_used;
    for (int i0 = begin * a.n_used + lane; i0 - lane < stop; i0 += 32 * BATCH) {
        int id[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int i = min(i0 + 32 * j, stop - 1), r = rank_of(first, i / a.n_used);
            id[j] = __ldcg(a.ids[r] + (i - first[r] * a.n_used));
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (i0 + 32 * j < stop) {
                a.group_ids[i0 + 32 * j] = id[j];
                atomicAdd(&counts[id[j]], 1);
            }
    }
    __syncwarp();
    for (int e = lane; e < a.n_experts; e += 32) a.chunk_counts[(int)blockIdx.x * a.n_experts + e] = counts[e];
}

/* Tokens of a block: chunks of the same size, the last ones smaller or empty. */
static DEVICE void chunk_of(int block, int n, int &begin, int &end) {
    int size = (n + EXCHANGE_BLOCKS - 1) / EXCHANGE_BLOCKS;
    begin = min(block * size, n), end = min(begin + size, n);
}

static __global__ void __launch_bounds__(COPY_THREADS + 32)
    k_exchange_gather_f16(const __grid_constant__ struct exchange_args a) {
    __shared__ int first[MOE_MAX_RANKS + 1], counts[MAX_EXPERTS];
    int tid = (int)threadIdx.x;
    for (int e = tid; e < a.n_experts; e += COPY_THREADS + 32) counts[e] = 0;
    depend_wait();
    if (tid < 32) {
        int n = 0;
        if (a.arrived) {
            if (tid < a.n_ranks) n = __ldcg(a.arrived + tid);
        } else {
            uint32_t epoch = __ldcg(a.epoch) + 1;
            int n_own = a.header->n_tokens;
            if (blockIdx.x == 0) say(a, 0, epoch, n_own);
            if (tid < a.n_ranks) n = tid == a.rank ? n_own : hear(a, a.flags[a.rank] + tid, epoch);
        }
        __syncwarp();
        int sum = n; /* of this rank's and those before */
        for (int d = 1; d < MOE_MAX_RANKS; d <<= 1) {
            int up = __shfl_up_sync(ALL_LANES, sum, d);
            if (tid >= d) sum += up;
        }
        if (tid < a.n_ranks) first[tid + 1] = sum;
        if (tid == 0) first[0] = 0;
    }
    __syncthreads();
    depend_release();
    int begin, end, n = first[a.n_ranks], n_own = first[a.rank + 1] - first[a.rank];
    chunk_of((int)blockIdx.x, n, begin, end);
    if (tid >= COPY_THREADS) gather_ids(a, first, begin, end, counts, tid - COPY_THREADS);
    else gather_inputs(a, first, begin, end);
    if (blockIdx.x == 0 && tid == 0) {
        *a.tokens = {n, first[a.rank], n_own};
        atomicAdd((unsigned long long *)a.counts + COUNT_FAR, (unsigned long long)(n - n_own));
    }
}

/* ---- the sort ------------------------------------------------------------------------------------------ */

struct place_shared {
    int counts[MAX_EXPERTS], before[MAX_EXPERTS]; /* rows of an expert: all, those of the chunks before */
    int first[MAX_EXPERTS];                       /* where its rows begin */
    int owner[MAX_EXPERTS];
    struct expert_home home[MAX_EXPERTS];
    int order[MAX_EXPERTS], n_shared; /* experts with several holders, by falling counts */
    int cost[32];                     /* of each rank */
    int tiles_before[N_WIDTHS][MAX_EXPERTS];
    int n_rows, n_tiles[N_WIDTHS];
};

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

static DEVICE void add_chunks(const struct exchange_args &a, struct place_shared &s) {
    int tid = (int)threadIdx.x, n_experts = a.n_experts, parts = PLACE_THREADS / n_experts;
    int e = tid % n_experts, part = tid / n_experts, all = 0, before = 0;
    if (part >= parts) return;
    for (int c0 = part; c0 < EXCHANGE_BLOCKS; c0 += 2 * BATCH * parts) {
        int n[2 * BATCH];
#pragma unroll
        for (int j = 0; j < 2 * BATCH; j++) {
            int c = c0 + parts * j;
            n[j] = c < EXCHANGE_BLOCKS ? __ldcg(a.chunk_counts + c * n_experts + e) : 0;
        }
#pragma unroll
        for (int j = 0; j < 2 * BATCH; j++) {
            all += n[j];
            before += c0 + parts * j < (int)blockIdx.x ? n[j] : 0;
        }
    }
    atomicAdd(&s.counts[e], all);
    atomicAdd(&s.before[e], before);
}

static DEVICE int cost_of(int n_rows) { return n_rows > 0 ? n_rows + EXPERT_COST : 0; }
static DEVICE bool is_shared(struct expert_home home) { return (home.holders & (home.holders - 1)) != 0; }

/* Who computes each expert: its holder; then those with several, by falling counts, each by the one of least cost so far. */
static DEVICE void find_owners(const struct exchange_args &a, struct place_shared &s) {
    int e = (int)threadIdx.x, lane = e & 31;
    if (e < a.n_experts && !is_shared(s.home[e])) {
        s.owner[e] = __ffs(s.home[e].holders) - 1;
        atomicAdd(&s.cost[s.owner[e]], cost_of(s.counts[e]));
    } else if (e < a.n_experts) {
        int at = 0;
        for (int x = 0; x < a.n_experts; x++)
            at += is_shared(s.home[x]) && (s.counts[x] > s.counts[e] || (s.counts[x] == s.counts[e] && x < e));
        s.order[at] = e;
        atomicAdd(&s.n_shared, 1);
    }
    __syncthreads();
    if (e >= 32) return;
    uint32_t cost = (uint32_t)s.cost[lane]; /* of rank `lane` */
    for (int base = 0; base < s.n_shared; base += 32) {
        int n = min(s.n_shared - base, 32), x = s.order[base + min(lane, n - 1)], owner = 0;
        uint32_t holders = s.home[x].holders, own = (uint32_t)cost_of(s.counts[x]);
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            bool may = __shfl_sync(ALL_LANES, holders, i) >> lane & 1;
            uint32_t more = __shfl_sync(ALL_LANES, own, i);
            int least = (int)(__reduce_min_sync(ALL_LANES, may ? cost << 4 | (uint32_t)lane : ~0u) & 15u);
            if (lane == least) cost += more;
            if (lane == i) owner = least;
        }
        if (lane < n) s.owner[x] = owner;
    }
}

/* One block's: the lists, and what is counted. */
static DEVICE void write_lists(const struct exchange_args &a, const struct place_shared &s) {
    for (int u = (int)threadIdx.x; u < N_WIDTHS * a.n_experts; u += PLACE_THREADS) {
        int list = u / a.n_experts, e = u - list * a.n_experts, n = s.counts[e];
        if (n == 0 || s.owner[e] != a.rank) continue;
        int w = tile_tokens(n, list);
        struct gemm_item *to = a.lists.items[list] + s.tiles_before[list][e];
        for (int at = 0; at < n; at += w) *to++ = {s.home[e].place, s.first[e] + at, min(w, n - at), 0};
    }
    if (threadIdx.x < N_WIDTHS) a.lists.n_items[threadIdx.x] = s.n_tiles[threadIdx.x];
    for (int e = (int)threadIdx.x; e < a.n_experts; e += PLACE_THREADS) {
        a.load[e] += (uint64_t)s.counts[e];
        if (s.counts[e] > 0) atomicAdd((unsigned long long *)a.rows + s.owner[e], (unsigned long long)s.counts[e]);
    }
}

static DEVICE void count_owned(const struct exchange_args &a, const struct place_shared &s, int lane) {
    int groups = 0, rows = 0;
    for (int e = lane; e < a.n_experts; e += 32)
        if (s.owner[e] == a.rank) groups += s.counts[e] > 0, rows += s.counts[e];
    groups = warp_sum(groups), rows = warp_sum(rows);
    if (lane != 0) return;
    atomicAdd((unsigned long long *)a.counts + COUNT_READS, (unsigned long long)groups);
    atomicAdd((unsigned long long *)a.counts + COUNT_ROWS, (unsigned long long)rows);
}

/* By one warp: the rows of the block's pairs, in their order. */
static DEVICE void place_chunk(const struct exchange_args &a, struct place_shared &s, struct group_tokens t, int lane) {
    int begin, end, far = 0;
    chunk_of((int)blockIdx.x, t.n, begin, end);
    int stop = end * a.n_used, first_own = t.first_own * a.n_used, n_own = t.n_own * a.n_used;
    for (int i0 = begin * a.n_used + lane; i0 - lane < stop; i0 += 32 * BATCH) {
        int e[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) e[j] = i0 + 32 * j < stop ? __ldcg(a.group_ids + i0 + 32 * j) : -1;
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (i0 - lane + 32 * j >= stop) break;
            int pair = i0 + 32 * j, own = pair - first_own;
            uint32_t same = __match_any_sync(ALL_LANES, e[j]), below = same & ((1u << lane) - 1u);
            int before = e[j] >= 0 ? s.before[e[j]] : 0;
            __syncwarp();
            if (e[j] >= 0 && below == 0) s.before[e[j]] = before + __popc(same);
            __syncwarp();
            int row = e[j] >= 0 ? s.first[e[j]] + before + __popc(below) : s.n_rows;
            if (row >= s.n_rows) continue; /* none, or the group is lost */
            int owner = s.owner[e[j]];
            a.lists.token_of[row] = pair / a.n_used;
            if (a.all_rows) a.all_rows[pair] = row | owner << OWNER_SHIFT;
            if (own < 0 || own >= n_own) continue;
            a.lists.row_of[own] = (a.all_rows && owner != a.rank ? own : row) | owner << OWNER_SHIFT;
            far += owner != a.rank;
        }
    }
    far = warp_sum(far);
    if (lane == 0 && far > 0) atomicAdd((unsigned long long *)a.counts + COUNT_FAR, (unsigned long long)far);
}

static __global__ void __launch_bounds__(PLACE_THREADS)
    k_exchange_place_i32(const __grid_constant__ struct exchange_args a) {
    __shared__ struct place_shared s;
    int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5, n_experts = a.n_experts;
    depend_release();
    if (tid < n_experts) {
        s.home[tid] = a.homes[tid]; /* the host writes them, between steps */
        s.counts[tid] = s.before[tid] = 0;
    }
    if (tid < 32) s.cost[tid] = 0;
    if (tid == 0) s.n_shared = 0;
    __syncthreads();
    depend_wait();
    struct group_tokens t = *a.tokens;
    add_chunks(a, s);
    __syncthreads();
    find_owners(a, s);
    __syncthreads();
    const int *counts = s.counts, *owners = s.owner;
    int rank = a.rank;
    if (warp == 0) {
        int n = warp_prefix([=](int e) { return counts[e]; }, s.first, n_experts, lane);
        if (lane == 0) s.n_rows = n;
    } else if (blockIdx.x == 0 && warp <= N_WIDTHS) {
        int list = warp - 1;
        int n = warp_prefix([=](int e) { return owners[e] == rank ? tiles_of(counts[e], list) : 0; },
                            s.tiles_before[list], n_experts, lane);
        if (lane == 0) s.n_tiles[list] = n;
    } else if (blockIdx.x == 0 && warp == N_WIDTHS + 1) {
        count_owned(a, s, lane);
    }
    __syncthreads();
    if (s.n_rows != t.n * a.n_used) { /* some blocks heard a rank, others not: the group is lost */
        if (blockIdx.x == 0 && tid < N_WIDTHS) a.lists.n_items[tid] = 0;
        return;
    }
    if (blockIdx.x == 0) write_lists(a, s);
    if (warp == PLACE_WARPS - 1) place_chunk(a, s, t, lane);
}

/* ---- products ------------------------------------------------------------------------------------------ */

static __global__ void __launch_bounds__(32) k_exchange_meet_u64(const __grid_constant__ struct exchange_args a) {
    int lane = (int)threadIdx.x;
    depend_wait();
    uint32_t epoch = __ldcg(a.epoch) + 1;
    say(a, MOE_MAX_RANKS, epoch, 0);
    if (lane < a.n_ranks && lane != a.rank) hear(a, a.flags[a.rank] + MOE_MAX_RANKS + lane, epoch);
    __syncwarp();
    depend_release();
    if (lane == 0) *a.epoch = epoch;
}

/* A warp takes a pair. */
static __global__ void __launch_bounds__(PACK_THREADS)
    k_exchange_pack_f16(const __grid_constant__ struct exchange_args a, const uint4 *y, uint4 *send, size_t rank_rows) {
    __shared__ int first[MOE_MAX_RANKS + 1];
    depend_release();
    depend_wait();
    if (threadIdx.x == 0) {
        first[0] = 0;
        for (int r = 0; r < a.n_ranks; r++) first[r + 1] = first[r] + a.arrived[r];
    }
    __syncthreads();
    int lane = (int)threadIdx.x & 31, row = a.n_cols / 8, n_pairs = first[a.n_ranks] * a.n_used;
    int n_warps = (int)gridDim.x * (PACK_THREADS / 32);
    for (int p = (int)(blockIdx.x * PACK_THREADS + threadIdx.x) / 32; p < n_pairs; p += n_warps) {
        int at = a.all_rows[p], r = rank_of(first, p / a.n_used);
        if (at >> OWNER_SHIFT != a.rank || r == a.rank) continue;
        const uint4 *from = y + (size_t)(at & ((1 << OWNER_SHIFT) - 1)) * (size_t)row;
        uint4 *to = send + ((size_t)r * rank_rows + (size_t)(p - first[r] * a.n_used)) * (size_t)row;
#pragma unroll 8
        for (int i = lane; i < row; i += 32) to[i] = from[i];
    }
}

/* ---- launching ----------------------------------------------------------------------------------------- */

cudaError_t cuda_exchange_begin(const struct exchange_args *a, const struct cuda_queue *q) {
    dim3 grid(EXCHANGE_BLOCKS, 1, 1);
    cudaError_t e = launch(k_exchange_gather_f16, grid, COPY_THREADS + 32, 0, q, *a);
    return e != cudaSuccess ? e : launch(k_exchange_place_i32, grid, PLACE_THREADS, 0, q, *a);
}

cudaError_t cuda_exchange_pack(const struct exchange_args *a, const void *y, void *send, size_t rank_rows,
                               const struct cuda_queue *q) {
    return launch(k_exchange_pack_f16, dim3((unsigned)(2 * q->n_sm), 1, 1), PACK_THREADS, 0, q, *a, (const uint4 *)y,
                  (uint4 *)send, rank_rows);
}

cudaError_t cuda_exchange_end(const struct exchange_args *a, const struct cuda_queue *q) {
    return launch(k_exchange_meet_u64, dim3(1, 1, 1), 32, 0, q, *a);
}

cudaError_t exchange_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_exchange_gather_f16);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&ignored, k_exchange_place_i32);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&ignored, k_exchange_pack_f16);
    return e != cudaSuccess ? e : cudaFuncGetAttributes(&ignored, k_exchange_meet_u64);
}
