/* gemm: out[rows][n] = W[n][k] x[rows][k] for matrices kept as panels; weights are the A operand (16 rows), tokens
 * the B operand (8 columns), so that a group of 8 tokens costs one column of tensor work, however few experts
 * share a batch.
 *
 * One order of summation for every kernel and every batch: the columns are cut into gemm_parts(k) parts at
 * panel borders; a part is summed unit by unit in the matrix units; parts are added in order in f32. The split
 * kernel gives each part to a warp and adds them in shared memory; the tile kernel runs them one after the other.
 * Which of them runs, and how wide its tiles are, is therefore free to follow the batch.
 *
 * Work: dense products take blocks of rows x tiles of tokens from the grid; expert products take blocks of
 * rows x items from the routing's work list, and leave when their item does not exist. */
#ifndef MOED_CUDA_GEMM_CUH
#define MOED_CUDA_GEMM_CUH

#include "cuda/fragment.cuh"

/* Parts of the columns; at least one panel each. */
__host__ DEVICE int gemm_parts(int n_panels) {
    if (n_panels % 4 == 0) return 4;
    if (n_panels % 3 == 0) return 3;
    if (n_panels % 2 == 0) return 2;
    return n_panels < 4 ? n_panels : 4;
}

/* What a block works on. */
struct gemm_work {
    const uint8_t *w[2];  /* first panels of the rows' lower and upper half */
    size_t row_block;     /* bytes from one 16-row block to the next */
    int n_valid[2];       /* row blocks that exist, of each half */
    int segment, first_row;
    int n, first;         /* tokens; row of the first one in x (dense, or in routing order) */
    const int32_t *token_of;
};

/* false: nothing to do. ROW_BLOCKS: 16-row blocks of a tile, half of them gate and half up for SiLU. Dense work
 * may be asked for before depend_wait, expert work only after. */
template <int ROW_BLOCKS>
DEVICE bool find_work(const struct gemm_args &a, int width, struct gemm_work &w) {
    int tile, expert = 0;
    w.token_of = NULL;
    if (a.items) {
        if ((int)blockIdx.y >= *a.n_items) return false;
        struct gemm_item item = a.items[blockIdx.y];
        expert = item.expert, w.n = item.n, w.first = item.first;
        if (a.token_of) w.token_of = a.token_of + item.first;
        tile = (int)blockIdx.x;
    } else {
        w.first = (int)blockIdx.x * width;
        w.n = min(width, *a.n_tokens - w.first);
        if (w.n <= 0) return false;
        tile = (int)blockIdx.y;
    }
    w.segment = 0;
    bool silu = a.epilogue == GEMM_SILU_F16;
    while (!silu && w.segment + 1 < a.n_segments && tile >= a.segments[w.segment + 1].first_tile)
        w.segment++;
    const struct gemm_segment &s = a.segments[w.segment];
    const int half = ROW_BLOCKS / 2;
    int n_blocks = (s.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    int block = (tile - s.first_tile) * (silu ? half : ROW_BLOCKS);
    w.row_block = (size_t)(a.n_cols / PANEL_K) * (size_t)panel_bytes(s.type);
    size_t at = ((size_t)expert * (size_t)n_blocks + (size_t)block) * w.row_block;
    w.first_row = block * PANEL_ROWS;
    w.w[0] = s.w + at;
    w.w[1] = silu ? a.segments[1].w + at : w.w[0] + half * w.row_block;
    w.n_valid[0] = n_blocks - block;
    w.n_valid[1] = silu ? n_blocks - block : n_blocks - block - half;
    return true;
}

/* Where token i of the work (a column) is in x; columns beyond n read nothing and count as zeros. */
DEVICE const uint8_t *token_row(const struct gemm_args &a, const struct gemm_work &w, int i) {
    int row = i >= w.n ? 0 : w.token_of ? w.token_of[i] : w.first + i;
    return (const uint8_t *)a.x + (size_t)row * (size_t)a.n_cols * 2;
}

DEVICE float silu_mul(float gate, float up) {
    return __fdiv_rn(gate, 1.0f + exp2_fast(gate * -1.44269504f)) * up;
}

/* Sizes of the split kernel's shared memory, per warp. The float-like formats are too large to be held twice. */
template <int TYPE, int DEPTH> __host__ DEVICE constexpr int split_depth() {
    return TYPE == PANEL_Q8_0 || TYPE == PANEL_F16 ? 1 : DEPTH;
}

/* The launchers of the instances; each in a file of its own, to be compiled side by side. */
cudaError_t gemm_split8(const struct gemm_args &a, dim3 grid, size_t shared,
                        const struct cuda_queue *q);
cudaError_t gemm_split16(const struct gemm_args &a, dim3 grid, size_t shared,
                         const struct cuda_queue *q);
cudaError_t gemm_split32(const struct gemm_args &a, dim3 grid, size_t shared,
                         const struct cuda_queue *q);
cudaError_t gemm_tile64(const struct gemm_args &a, dim3 grid, size_t shared,
                        const struct cuda_queue *q);
cudaError_t gemm_split8_prepare(size_t max_shared);
cudaError_t gemm_split16_prepare(size_t max_shared);
cudaError_t gemm_split32_prepare(size_t max_shared);
cudaError_t gemm_tile64_prepare(size_t max_shared);

#endif
