/* gemm: out[rows][n] = W[n][k] x[rows][k] for matrices kept as panels; weights are the A operand (16 rows), tokens
 * the B operand (8 columns), so that a group of 8 tokens costs one column of tensor work, however few experts
 * share a batch.
 *
 * One order of summation for every kernel and every batch: a matrix's columns are cut into parts (gemm.cu); a part is summed
 * 16 columns at a time, first to last, in one f32 accumulator of the matrix units; parts are added in order. wgmma and
 * mma.sync have given the same bits for that wherever they were compared, and test_cuda_ops and test_invariance on a GPU
 * hold them to it. Which kernel runs, and how wide its tiles are, is therefore free to follow the batch.
 *
 * Every warp has one block of 16 rows and one part. Of the warps of a part the first half has rows of gate, the second the
 * same rows of up, if it is a product for SiLU. A block shares the activations of up to 128 tokens in shared memory, rows
 * of 64 columns (128 bytes) with their 16-byte chunks permuted by the row (chunk c of row r lies at c ^ (r & 7)), as
 * wgmma's 128-byte swizzle has it.
 *
 * Work: dense products take blocks of rows x tiles of tokens from the grid; expert products take blocks of
 * rows x items from the routing's work list, and leave when their item does not exist. */
#ifndef MOED_CUDA_GEMM_CUH
#define MOED_CUDA_GEMM_CUH

#include "cuda/fragment.cuh"

enum : int {
    X_ROW = 128, /* bytes of one token's 64 columns */
    SHARE = 4    /* blocks of an item that one stands for, see share_of */
};

/* What a warp works on. */
struct gemm_work {
    const uint8_t *w; /* first panel of its row block and part */
    int warp, n_warps;      /* its place among the warps of its part: a power of two */
    int part, n_parts, n_panels; /* n_panels: of a part */
    int first_row, n_tiles; /* of the block: its first tile of rows, and how many it has */
    int block, n_blocks;    /* this warp's row block of the matrix, in the first tile; and of how many */
    int rows_shift;         /* log2 of a tile's row blocks */
    int segment;
    int n, first; /* tokens; row of the first one in x (dense, or in routing order) */
    const int32_t *token_of;
    int index;  /* of the item */
    int share;  /* how many of its blocks this one stands for */
    bool ready; /* the item's x is there */
};

/* An item is counted by one thread, maybe before depend_wait: no kernel reads these. */
DEVICE void count_item(const struct gemm_args &a, int expert, int n_tokens, struct expert_panels at) {
    int n_matrices = a.epilogue == GEMM_SILU_F16 ? 2 : 1; /* up's are as large as gate's, and lie beside them */
    if (at.host_bytes > 0)
        atomicAdd((unsigned long long *)a.host_bytes, (unsigned long long)at.host_bytes * n_matrices);
    if (a.load) atomicAdd((unsigned long long *)a.load + expert, (unsigned long long)n_tokens);
}

static_assert(sizeof(struct gemm_item) == sizeof(int4) && offsetof(struct gemm_item, n) == offsetof(int4, z), "one load");

/* What a block has of an item: as much as n blocks from `block` on. */
struct item_share {
    int index, block, n;
};
/* Items beyond single_items are tiles that most groups do not have. So that there are few blocks without work, each such item
 * has fewer blocks, and a row of blocks several items. These rows are in the middle: at the end, the next kernel's blocks
 * would come only after theirs. */
DEVICE struct item_share share_of(const struct gemm_args &a) {
    int x = (int)blockIdx.x, y = (int)blockIdx.y, n = (int)gridDim.x;
    int n_shared = (int)gridDim.y - a.single_items, first = a.single_items / 2;
    if (y < first || n_shared == 0) return {y, x, 1};
    if (y >= first + n_shared) return {y - n_shared, x, 1};
    int each = (n + SHARE - 1) / SHARE, at_once = n / each, i = x / each, block = x % each * SHARE;
    if (i >= at_once) return {-1, 0, 0};
    return {a.single_items + (y - first) * at_once + i, block, min((int)SHARE, n - block)};
}

/* false: nothing to do. Dense work may be asked for before depend_wait, expert work if its list is older (listed). warp:
 * of the block; warp_index() makes what follows from it scalar. */
DEVICE bool find_work(const struct gemm_args &a, int width, int warp, struct gemm_work &w) {
    int tile, expert = 0;
    w.token_of = NULL;
    w.share = 1;
    if (a.items) {
        struct item_share s = share_of(a);
        if (s.index < 0) return false;
        w.index = s.index, w.share = s.n;
        /* Past L1, which may have an earlier layer's. Asking for all keeps one load from waiting for the other. */
        int4 item = __ldcg((const int4 *)(a.items + s.index));
        int n_items = __ldcg(a.n_items);
        w.ready = a.awaited > 0 && load_acquire(&a.items[s.index].n_done) >= a.awaited;
        expert = item.x, w.first = item.y, w.n = item.z;
        if ((s.index >= n_items) | (w.n <= 0)) return false;
        if (a.token_of) w.token_of = a.token_of + w.first;
        tile = s.block;
    } else {
        w.first = (int)blockIdx.x * width;
        w.n = min(width, *a.n_tokens - w.first);
        if (w.n <= 0) return false;
        tile = (int)blockIdx.y;
    }
    w.n_parts = 1 << a.parts_shift;
    int shift = a.warps_shift - a.parts_shift;
    w.n_warps = 1 << shift;
    w.part = warp >> shift;
    w.warp = warp & (w.n_warps - 1);
    w.segment = 0;
    w.block = w.warp;
    w.rows_shift = shift;
    if (a.epilogue == GEMM_SILU_F16) {
        w.rows_shift--;
        w.segment = w.warp >> w.rows_shift;
        w.block = w.warp & ((1 << w.rows_shift) - 1);
    } else {
        while (w.segment + 1 < a.n_segments && tile >= a.segments[w.segment + 1].first_tile) w.segment++;
    }
    const struct gemm_segment &s = a.segments[w.segment];
    tile = (tile - s.first_tile) * a.n_tiles;
    w.n_blocks = s.n_blocks;
    w.n_tiles = min(w.share * a.n_tiles, ((w.n_blocks - 1) >> w.rows_shift) + 1 - tile);
    w.first_row = (tile << w.rows_shift) * PANEL_ROWS;
    w.block += tile << w.rows_shift;
    w.n_panels = a.n_cols / PANEL_K >> a.parts_shift;
    if (s.experts) {
        struct expert_panels at = s.experts[expert];
        w.w = at.panels;
        if (tile == 0 && threadIdx.x == 0) count_item(a, expert, w.n, at);
    } else {
        w.w = s.w + (size_t)((uint32_t)expert * (uint32_t)w.n_blocks) * s.block_bytes;
    }
    w.w += (size_t)(uint32_t)w.block * s.block_bytes + (uint32_t)w.part * (s.block_bytes >> a.parts_shift);
    return true;
}

/* Until x is there; at once, if it is not the first time. */
DEVICE void wait_for_inputs(const struct gemm_args &a, const struct gemm_work &w) {
    if (a.awaited == 0) return depend_wait();
    if (w.ready) return;
    while (load_acquire(&a.items[w.index].n_done) < a.awaited) {}
}

/* By a block whose results are written. A kernel that did not wait for the one before must not end earlier: later kernels rely
 * on that. For this, one of its blocks is enough. */
DEVICE void finish_item(const struct gemm_args &a, const struct gemm_work &w) {
    if (a.counts) {
        __syncthreads();
        if (threadIdx.x == 0) add_release(&a.items[w.index].n_done, w.share);
    }
    if (a.awaited > 0 && blockIdx.x == 0 && w.index == 0) depend_wait();
}

/* Where token i of the work (a column) is in x, in pieces of 16 bytes. */
DEVICE uint32_t row_of(const struct gemm_args &a, const struct gemm_work &w, int i) {
    int row = w.first + i;
    if (w.token_of && i < w.n) row = w.token_of[i];
    return (uint32_t)row * (uint32_t)(a.n_cols / 8);
}

/* 16-byte pieces by one warp. dst (in shared memory), src: of this lane's first piece. Predicates instead
 * of branches: neighbouring copies are one stretch of instructions. */
template <int BYTES> DEVICE void copy_piece(bool wanted, uint32_t dst, const uint8_t *src, int lane) {
#pragma unroll
    for (int at = 0; at < BYTES; at += 512)
        copy16_if(wanted && (at + 512 <= BYTES || at + lane * 16 < BYTES), dst + at, src + at);
}

/* B operands of 64 columns of tokens 8 n … 8 n + 7: step s has b[2 s], b[2 s + 1]. */
DEVICE void load_tokens(h2 (&b)[8], const uint8_t *x, int n, int lane) {
    const uint8_t *row = x + (8 * n + (lane & 7)) * X_ROW;
#pragma unroll
    for (int half = 0; half < 2; half++)
        load_matrices(*(h2(*)[4])(b + 4 * half), row + ((4 * half + (lane >> 3)) ^ (lane & 7)) * 16);
}

/* acc += a (16 rows of each warp, 64 columns) times 8 NG tokens, `offset` bytes after x; matrix: swizzled_matrix(x). wgmma:
 * by four warps together, and not at once. */
template <int NG>
DEVICE void multiply(float (&acc)[NG][4], h2 (&a)[4][4], const uint8_t *x, uint32_t matrix, int offset, int lane) {
#ifdef MOED_WGMMA
    (void)x, (void)lane;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma_f16(acc, a[s], swizzled_matrix(matrix, offset + 32 * s));
    wgmma_commit();
#else
    (void)matrix;
#pragma unroll
    for (int n = 0; n < NG; n++) {
        h2 b[8];
        load_tokens(b, x + offset, n, lane);
#pragma unroll
        for (int s = 0; s < 4; s++) mma_f16(acc[n], a[s], b[2 * s], b[2 * s + 1]);
    }
#endif
}

DEVICE float silu_mul(float gate, float up) {
    return __fdiv_rn(gate, 1.0f + exp2_fast(gate * -1.44269504f)) * up;
}

/* Where a row's sum of a part stands among [tokens][rows], so that no two lanes that write together meet in a bank. */
DEVICE int sum_at(int token, int row, int n_rows) { return (token * n_rows + row) ^ (token >> 1 & 3) << 3; }

/* Four rows of one token: stored, or added to what is there; rows beyond the matrix are not. */
DEVICE void store_rows(const struct gemm_args &a, const struct gemm_segment &s, size_t token, int row,
                       float4 v) {
    size_t to = token * (size_t)s.n_rows + (size_t)row;
    const float f[4] = {v.x, v.y, v.z, v.w};
    bool whole = s.n_rows % 4 == 0;
    if (a.epilogue == GEMM_ADD_F32 || a.epilogue == GEMM_STORE_F32) {
        float *out = (float *)s.out + to;
        if (whole) {
            float4 h = a.epilogue == GEMM_ADD_F32 ? *(const float4 *)out : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            *(float4 *)out = a.epilogue == GEMM_ADD_F32 ? make_float4(h.x + v.x, h.y + v.y, h.z + v.z, h.w + v.w) : v;
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + i < s.n_rows) out[i] = a.epilogue == GEMM_ADD_F32 ? out[i] + f[i] : f[i];
        return;
    }
    uint16_t *out = (uint16_t *)(a.rank_of ? a.out_of_rank[a.rank_of[token]] : s.out) + to;
    if (whole) {
        *(uint2 *)out = make_uint2(h2_pack(v.x, v.y), h2_pack(v.z, v.w));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (row + i < s.n_rows) out[i] = (uint16_t)h2_pack(f[i], 0.0f);
}

DEVICE float4 add_parts(const float *at, int n_parts, int size, float scale) {
    float4 v = *(const float4 *)at;
#pragma unroll 1
    for (int p = 1; p < n_parts; p++) {
        float4 u = *(const float4 *)(at + p * size);
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
    }
    return make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
}

/* Results of a block's tile, by way of shared memory, whose former use is over for this thread: parts' sums, 64 bytes for
 * each warp and token, part_floats from one part to the next. A warp's D fragments hold rows g, g + 8 and tokens
 * 2 t, 2 t + 1. */
template <int NG>
DEVICE void write_tile(const struct gemm_args &a, const struct gemm_work &w, int first_row, float *sums, int part_floats,
                       int lane, const float (&acc)[NG][4]) {
    bool silu = a.epilogue == GEMM_SILU_F16;
    int n_rows = w.n_warps * PANEL_ROWS, own_row = w.warp * PANEL_ROWS + (lane >> 2);
    float *own = sums + w.part * part_floats;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NG; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            own[sum_at(8 * n + 2 * (lane & 3) + (j & 1), own_row + 8 * (j >> 1), n_rows)] = acc[n][j];
    __syncthreads();
    const struct gemm_segment &s = a.segments[silu ? 0 : w.segment];
    int shift = w.rows_shift + 2, rows = PANEL_ROWS << w.rows_shift; /* four rows to a thread */
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < w.n << shift; i += (int)blockDim.x) {
        int token = i >> shift, row = (i & ((1 << shift) - 1)) * 4;
        if (first_row + row >= s.n_rows) continue;
        float4 v = add_parts(sums + sum_at(token, row, n_rows), w.n_parts, part_floats, s.scale);
        if (silu) {
            const float *up = sums + sum_at(token, rows + row, n_rows);
            float4 u = add_parts(up, w.n_parts, part_floats, a.segments[1].scale);
            v = make_float4(silu_mul(v.x, u.x), silu_mul(v.y, u.y), silu_mul(v.z, u.z), silu_mul(v.w, u.w));
        }
        store_rows(a, s, (size_t)(w.first + token), first_row + row, v);
    }
}

/* The kernels, by tile width. shared: bytes that a launch of `warps` warps and `parts` parts needs for weights of a
 * type. */
struct gemm_kernel {
    int width;
    int most_warps, least_warps; /* of a block; least_warps: of a part */
    void (*kernel)(struct gemm_args);
    size_t (*shared)(int type, int warps, int parts);
};
extern const struct gemm_kernel gemm_few8, gemm_few16, gemm_few32, gemm_many64, gemm_many128;

/* gemm_dense: dense products of more than a few tokens on Hopper. The plan is which of its kernels, or -1:
 * not by this one. */
int dense_plan(const struct gemm_args &a, int bucket, const struct cuda_queue *q);
cudaError_t dense_launch(const struct gemm_args &a, int kind, int bucket, const struct cuda_queue *q);
cudaError_t dense_prepare(size_t max_shared);

#endif
