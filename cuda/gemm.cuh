/* gemm: out[rows][n] = W[n][k] x[rows][k] for matrices kept as panels; weights are the A operand (16 rows), tokens
 * the B operand (8 columns), so that a group of 8 tokens costs one column of tensor work, however few experts
 * share a batch.
 *
 * One order of summation for every kernel and every batch: the columns of a row are summed 16 at a time, first to last,
 * in one f32 accumulator of the matrix units. wgmma and mma.sync give the same bits for that (test_cuda_ops holds them
 * against each other). Which kernel runs, and how wide its tiles are, is therefore free to follow the batch.
 *
 * Every warp has one block of 16 rows; for SiLU the first half of a block's warps has rows of gate, the second the same
 * rows of up. A block shares the activations of up to 128 tokens in shared memory, rows of 64 columns (128 bytes) with
 * their 16-byte chunks permuted by the row (chunk c of row r lies at c ^ (r & 7)), as wgmma's 128-byte swizzle has it.
 *
 * Work: dense products take blocks of rows x tiles of tokens from the grid; expert products take blocks of
 * rows x items from the routing's work list, and leave when their item does not exist. */
#ifndef MOED_CUDA_GEMM_CUH
#define MOED_CUDA_GEMM_CUH

#include "cuda/fragment.cuh"

enum : int { X_ROW = 128 /* bytes of one token's 64 columns */ };

/* What a warp works on. */
struct gemm_work {
    const uint8_t *w; /* first panel of its row block */
    bool stored;      /* the row block exists */
    int row;          /* its first row */
    int segment;
    int n, first; /* tokens; row of the first one in x (dense, or in routing order) */
    const int32_t *token_of;
};

/* false: nothing to do. Dense work may be asked for before depend_wait, expert work only after. */
DEVICE bool find_work(const struct gemm_args &a, int width, struct gemm_work &w) {
    int tile, expert = 0, warp = (int)threadIdx.x >> 5, n_warps = (int)blockDim.x >> 5;
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
    if (a.epilogue == GEMM_SILU_F16) {
        n_warps /= 2;
        if (warp >= n_warps) w.segment = 1, warp -= n_warps;
    } else {
        while (w.segment + 1 < a.n_segments && tile >= a.segments[w.segment + 1].first_tile) w.segment++;
    }
    const struct gemm_segment &s = a.segments[w.segment];
    int n_blocks = (s.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    int block = (tile - s.first_tile) * n_warps + warp;
    size_t row_block = (size_t)(a.n_cols / PANEL_K) * (size_t)panel_bytes(s.type);
    w.w = s.w + ((size_t)expert * (size_t)n_blocks + (size_t)block) * row_block;
    w.stored = block < n_blocks;
    w.row = block * PANEL_ROWS;
    return true;
}

/* Which row of x token i of the work (a column) is. */
DEVICE int token_row(const struct gemm_work &w, int i) {
    return w.token_of ? w.token_of[i] : w.first + i;
}

/* n 16-byte pieces by one warp. */
template <int BYTES> DEVICE void copy_piece(uint8_t *dst, const uint8_t *src, int lane) {
#pragma unroll
    for (int at = 0; at < BYTES; at += 512)
        if (at + 512 <= BYTES || at + lane * 16 < BYTES)
            copy16(dst + at + lane * 16, src + at + lane * 16);
}

/* B operands of 64 columns of tokens 8 n … 8 n + 7: step s has b[2 s], b[2 s + 1]. */
DEVICE void load_tokens(h2 (&b)[8], const uint8_t *x, int n, int lane) {
    const uint8_t *row = x + (8 * n + (lane & 7)) * X_ROW;
#pragma unroll
    for (int half = 0; half < 2; half++)
        load_matrices(*(h2(*)[4])(b + 4 * half), row + ((4 * half + (lane >> 3)) ^ (lane & 7)) * 16);
}

DEVICE float silu_mul(float gate, float up) {
    return __fdiv_rn(gate, 1.0f + exp2_fast(gate * -1.44269504f)) * up;
}

/* One 16 x 8 tile of results, f16: after a transposition a lane has two neighbouring rows of token g. */
DEVICE void store_f16(const struct gemm_segment &s, const struct gemm_work &w, int row, int n, int lane,
                      const float (&v)[4]) {
    int token = 8 * n + (lane >> 2);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        h2 pair = transpose_8x8(h2_pack(v[2 * j], v[2 * j + 1]));
        int r = row + 8 * j + 2 * (lane & 3);
        if (token >= w.n || r >= s.n_rows) continue;
        uint16_t *to = (uint16_t *)s.out + (size_t)(w.first + token) * (size_t)s.n_rows + r;
        if (s.n_rows % 2 == 0) {
            *(h2 *)to = pair;
        } else {
            to[0] = (uint16_t)pair;
            if (r + 1 < s.n_rows) to[1] = (uint16_t)(pair >> 16);
        }
    }
}

/* Results of a warp: D fragments hold rows g, g + 8 and tokens 2 t, 2 t + 1. For SiLU the warps of up hand theirs over
 * through shared memory, which nobody may still be reading: 32 NG floats per thread of half a block. */
template <int NG>
DEVICE void write_tile(const struct gemm_args &a, const struct gemm_work &w, float *shared, int lane,
                       const float (&acc)[NG][4]) {
    const struct gemm_segment &s = a.segments[w.segment];
    bool silu = a.epilogue == GEMM_SILU_F16;
    bool wide = a.epilogue == GEMM_ADD_F32 || a.epilogue == GEMM_STORE_F32;
    int half = (int)blockDim.x / 2;
    float4 *up = (float4 *)shared + (int)threadIdx.x % half;
    if (silu) {
        __syncthreads();
        if (w.segment == 1) {
#pragma unroll
            for (int n = 0; n < NG; n++)
                up[n * half] = make_float4(acc[n][0] * s.scale, acc[n][1] * s.scale, acc[n][2] * s.scale,
                                           acc[n][3] * s.scale);
        }
        __syncthreads();
        if (w.segment == 1) return;
    }
    if (w.row >= s.n_rows) return;
#pragma unroll
    for (int n = 0; n < NG; n++) {
        if (8 * n >= w.n) break;
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = acc[n][j] * s.scale;
        if (silu) {
            float4 u = up[n * half];
            v[0] = silu_mul(v[0], u.x), v[1] = silu_mul(v[1], u.y);
            v[2] = silu_mul(v[2], u.z), v[3] = silu_mul(v[3], u.w);
        }
        if (!wide) {
            store_f16(s, w, w.row, n, lane, v);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int token = 8 * n + 2 * (lane & 3) + (j & 1), r = w.row + (lane >> 2) + 8 * (j >> 1);
            if (token >= w.n || r >= s.n_rows) continue;
            float *to = (float *)s.out + (size_t)(w.first + token) * (size_t)s.n_rows + r;
            *to = a.epilogue == GEMM_ADD_F32 ? *to + v[j] : v[j];
        }
    }
}

/* The kernels, by tile width. shared: bytes that a launch of `warps` warps needs for weights of a type. */
struct gemm_kernel {
    int width;
    void (*kernel)(struct gemm_args);
    size_t (*shared)(int type, int warps);
};
extern const struct gemm_kernel gemm_few8, gemm_few16, gemm_many32, gemm_many64, gemm_many128;

#endif
