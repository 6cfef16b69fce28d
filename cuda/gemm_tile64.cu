/* gemm_tile64: the product for many tokens. A block of eight warps is one tile of 256 rows (128 gate and 128 up) and up
 * to 64 tokens; a warp has two 16-row blocks and all of the tile's tokens, so that a weight is unpacked once per
 * 64 tokens. Activations are shared by the warps, which therefore meet at every unit. Bound by the matrix units. */
#include "cuda/gemm.cuh"

enum : int { WARPS = 8, ROW_BLOCKS = 2 * WARPS, GROUPS = 8, STAGES = 4, STAGE_BYTES = GROUPS * 1024 };

extern __shared__ __align__(16) uint8_t shared_bytes[];

template <int TYPE> static DEVICE constexpr int warp_bytes() {
    return 2 * (format<TYPE>::bytes + TABLE_BYTES);
}

/* Copies for unit u of the whole product. Each warp copies its own weights and a share of the activations. */
template <int TYPE, int NG> struct tile_ring {
    using f = format<TYPE>;
    const uint8_t *w[2];
    bool stored[2];
    uint8_t *panels, *stages;
    int lane, warp;
    const uint8_t *x[2]; /* of the two token groups this warp copies for */
    bool real[2];

    DEVICE void copy_weights(int p, int unit) const {
        int from = unit == 0 ? 0 : f::header + unit * f::unit;
        int to = f::header + (unit + 1) * f::unit;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!stored[i]) continue;
            const uint8_t *src = w[i] + (size_t)p * f::bytes;
#pragma unroll
            for (int at = 0; at < to - from; at += 512)
                if (at + 512 <= to - from || at + lane * 16 < to - from)
                    copy16(panels + i * f::bytes + from + at + lane * 16, src + from + at + lane * 16);
        }
    }

    /* Warp v copies block v & 1 of groups v / 2 and v / 2 + 4. */
    DEVICE void copy_activations(int p, int unit) const {
        int block = warp & 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int group = (warp >> 1) + 4 * i;
            if (group < NG)
                copy16(stages + unit * STAGE_BYTES + (2 * group + block) * 512 + lane * 16,
                       x[i] + p * (PANEL_K * 2) + unit * (PANEL_UNIT_K * 2) + block * 64, real[i]);
        }
    }
};

/* Results of two row blocks: D fragments hold rows g, g + 8 and tokens 2 t, 2 t + 1. */
template <int NG>
static DEVICE void write_tile(const struct gemm_args &a, const struct gemm_work &w, int warp, int lane,
                              const float (&sum)[2][NG][4]) {
    const struct gemm_segment &s = a.segments[w.segment];
    int g = lane >> 2, t = lane & 3;
    bool silu = a.epilogue == GEMM_SILU_F16;
#pragma unroll
    for (int n = 0; n < NG; n++) {
        if (8 * n >= w.n) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (silu && i == 1) break;
            int row = w.first_row + (silu ? warp * 16 : warp * 32 + i * 16);
            if (row >= s.n_rows) break;
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[j] = sum[i][n][j] * s.scale;
                if (silu) v[j] = silu_mul(v[j], sum[1][n][j] * a.segments[1].scale);
            }
            if (a.epilogue == GEMM_ADD_F32 || a.epilogue == GEMM_STORE_F32) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int token = 8 * n + 2 * t + (j & 1), r = row + g + 8 * (j >> 1);
                    if (token >= w.n || r >= s.n_rows) continue;
                    float *to = (float *)s.out + (size_t)(w.first + token) * (size_t)s.n_rows + r;
                    *to = a.epilogue == GEMM_ADD_F32 ? *to + v[j] : v[j];
                }
                continue;
            }
            int token = 8 * n + g; /* after the transposition */
#pragma unroll
            for (int j = 0; j < 2; j++) {
                h2 pair = transpose_8x8(h2_pack(v[2 * j], v[2 * j + 1]));
                int r = row + 8 * j + 2 * t;
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
    }
}

template <int TYPE, int NG>
static DEVICE void tile(const struct gemm_args &a, const struct gemm_work &w) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    bool silu = a.epilogue == GEMM_SILU_F16;
    uint8_t *panels = shared_bytes + STAGES * STAGE_BYTES + warp * warp_bytes<TYPE>();
    uint8_t *tables = panels + 2 * f::bytes;
    struct tile_ring<TYPE, NG> ring;
    ring.panels = panels, ring.stages = shared_bytes, ring.lane = lane, ring.warp = warp;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int block = silu ? warp : 2 * warp + i;
        ring.w[i] = (silu ? w.w[i] : w.w[0]) + block * w.row_block;
        ring.stored[i] = block < w.n_valid[0];
    }
    int n_panels = a.n_cols / PANEL_K, n_parts = gemm_parts(n_panels);
#pragma unroll
    for (int u = 0; u < STAGES - 1; u++) ring.copy_weights(0, u);
    if (!a.items) depend_wait();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int token = 8 * ((warp >> 1) + 4 * i) + (lane >> 2);
        ring.real[i] = token < w.n;
        ring.x[i] = token_row(a, w, token) + (lane & 3) * 16;
    }
#pragma unroll
    for (int u = 0; u < STAGES - 1; u++) {
        ring.copy_activations(0, u);
        copy_commit();
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    struct scaling c1 = silu ? scaling_of(a.segments[1].scale, lane) : c;
    float acc[2][NG][4] = {}, sum[2][NG][4] = {};
    int part = 0, end = n_panels / n_parts;
    for (int p = 0; p < n_panels; p++) {
#pragma unroll
        for (int u = 0; u < PANEL_UNITS; u++) {
            copy_wait<STAGES - 2>();
            __syncthreads(); /* unit u is here, and unit u - 1's place is free */
            const int next = u + STAGES - 1;
            if (p + next / PANEL_UNITS < n_panels) {
                ring.copy_weights(p + next / PANEL_UNITS, next % PANEL_UNITS);
                ring.copy_activations(p + next / PANEL_UNITS, next % PANEL_UNITS);
            }
            copy_commit();
            if (u == 0) {
                unpack_scales<TYPE>(panels, tables, lane, c);
                unpack_scales<TYPE>(panels + f::bytes, tables + TABLE_BYTES, lane, c1);
                __syncwarp();
            }
            compute_unit<TYPE, 2, NG>(acc, panels + f::header + u * f::unit, f::bytes, tables,
                                      shared_bytes + u * STAGE_BYTES, u, lane);
        }
        if (p + 1 < end) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < NG; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum[i][n][j] = part == 0 ? acc[i][n][j] : sum[i][n][j] + acc[i][n][j];
                    acc[i][n][j] = 0.0f;
                }
        part++;
        end = (part + 1) * n_panels / n_parts;
    }
    write_tile<NG>(a, w, warp, lane, sum);
}

template <int TYPE> static DEVICE void tile_groups(const struct gemm_args &a, const struct gemm_work &w) {
    if constexpr (TYPE == PANEL_Q4_K || TYPE == PANEL_Q6_K) {
        if (w.n <= 16) return tile<TYPE, 2>(a, w);
        if (w.n <= 32) return tile<TYPE, 4>(a, w);
        if (w.n <= 48) return tile<TYPE, 6>(a, w);
    }
    tile<TYPE, 8>(a, w);
}

static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_gemm_tile64_f16(const __grid_constant__ struct gemm_args a) {
    struct gemm_work w;
    depend_release();
    if (a.items) depend_wait();
    if (!find_work<ROW_BLOCKS>(a, 8 * GROUPS, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return tile_groups<PANEL_Q4_K>(a, w);
    case PANEL_Q5_K: return tile_groups<PANEL_Q5_K>(a, w);
    case PANEL_Q6_K: return tile_groups<PANEL_Q6_K>(a, w);
    case PANEL_Q8_0: return tile_groups<PANEL_Q8_0>(a, w);
    default: return tile_groups<PANEL_F16>(a, w);
    }
}

cudaError_t gemm_tile64(const struct gemm_args &a, dim3 grid, size_t shared,
                        const struct cuda_queue *q) {
    return launch(k_gemm_tile64_f16, grid, 32 * WARPS, shared, q, a);
}

cudaError_t gemm_tile64_prepare(size_t max_shared) {
    return cudaFuncSetAttribute(k_gemm_tile64_f16, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)max_shared);
}
