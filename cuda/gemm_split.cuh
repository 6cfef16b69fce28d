/* gemm_split: the product for few tokens. A block is one tile of MT 16-row blocks and up to 8 NT tokens; each of its
 * warps has one part of the columns and runs its own pipeline: weights and activations come through a ring in
 * shared memory that only this warp uses, so that nothing in the loop waits for another warp. Bound by the bytes of
 * the weights. */
#ifndef MOED_CUDA_GEMM_SPLIT_CUH
#define MOED_CUDA_GEMM_SPLIT_CUH

#include "cuda/gemm.cuh"

/* The ring is DEPTH panels deep and mirrors them: unit u of panel p lies where it lies in memory. */
template <int TYPE, int MT, int NT, int DEPTH> DEVICE constexpr int split_warp_bytes() {
    return split_depth<TYPE, DEPTH>() * (MT * format<TYPE>::bytes + PANEL_UNITS * NT * 1024) +
           MT * TABLE_BYTES;
}

/* Copies of one warp into its ring. */
template <int TYPE, int MT, int NG, int DEPTH> struct split_ring {
    using f = format<TYPE>;
    static constexpr int ahead = PANEL_UNITS * DEPTH - 1; /* units copied in advance */
    const struct gemm_work &w;
    uint8_t *panels, *b;
    int lane;
    const uint8_t *x[NG]; /* this lane's activations, of the part's first column */
    bool real[NG];

    DEVICE const uint8_t *source(int i) const {
        const int half = MT / 2;
        return w.w[i / half] + (i % half) * w.row_block;
    }

    /* Unit u % 4 of panel p of the part: `offset` bytes from the work's first panel. */
    DEVICE void copy_weights(int p, int unit, size_t offset) const {
        uint8_t *dst = panels + p % DEPTH * (MT * f::bytes);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            if (i % (MT / 2) >= w.n_valid[i / (MT / 2)]) continue; /* its rows are not stored */
            const uint8_t *src = source(i) + offset + (size_t)p * f::bytes;
            int from = unit == 0 ? 0 : f::header + unit * f::unit;
            int to = f::header + (unit + 1) * f::unit;
#pragma unroll
            for (int at = 0; at < to - from; at += 512)
                if (at + 512 <= to - from || at + lane * 16 < to - from)
                    copy16(dst + i * f::bytes + from + at + lane * 16, src + from + at + lane * 16);
        }
    }

    DEVICE void copy_activations(int p, int unit) const {
        uint8_t *dst = b + (p % DEPTH * PANEL_UNITS + unit) * (NG * 1024) + lane * 16;
#pragma unroll
        for (int n = 0; n < NG; n++)
#pragma unroll
            for (int block = 0; block < 2; block++)
                copy16(dst + (2 * n + block) * 512,
                       x[n] + p * (PANEL_K * 2) + unit * (PANEL_UNIT_K * 2) + block * 64, real[n]);
    }
};

/* One warp's part of the tile: acc = W x over the part's columns. */
template <int TYPE, int MT, int NG, int DEPTH>
DEVICE void split_part(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared,
                       int part, int n_parts, int lane, float (&acc)[MT][NG][4]) {
    using f = format<TYPE>;
    constexpr int ahead = PANEL_UNITS * DEPTH - 1;
    int n_panels = a.n_cols / PANEL_K;
    int first = part * n_panels / n_parts, n = (part + 1) * n_panels / n_parts - first;
    uint8_t *tables = shared + DEPTH * MT * f::bytes;
    struct split_ring<TYPE, MT, NG, DEPTH> ring = {w, shared, tables + MT * TABLE_BYTES, lane, {}, {}};
    size_t offset = (size_t)first * f::bytes;

#pragma unroll
    for (int u = 0; u < ahead; u++) /* weights do not depend on the kernels before */
        if (u < PANEL_UNITS * n) ring.copy_weights(u / PANEL_UNITS, u % PANEL_UNITS, offset);
    if (!a.items) depend_wait();
#pragma unroll
    for (int i = 0; i < NG; i++) {
        int token = 8 * i + (lane >> 2);
        ring.real[i] = token < w.n;
        ring.x[i] = token_row(a, w, token) + first * (PANEL_K * 2) + (lane & 3) * 16;
    }
#pragma unroll
    for (int u = 0; u < ahead; u++) {
        if (u < PANEL_UNITS * n) ring.copy_activations(u / PANEL_UNITS, u % PANEL_UNITS);
        copy_commit();
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane), c1 = c;
    if (a.epilogue == GEMM_SILU_F16) c1 = scaling_of(a.segments[1].scale, lane);
    for (int p = 0; p < n; p++) {
#pragma unroll
        for (int u = 0; u < PANEL_UNITS; u++) {
            const int next = u + ahead; /* counted from this panel's first unit */
            if (p + next / PANEL_UNITS < n) {
                ring.copy_weights(p + next / PANEL_UNITS, next % PANEL_UNITS, offset);
                ring.copy_activations(p + next / PANEL_UNITS, next % PANEL_UNITS);
            }
            copy_commit();
            copy_wait<ahead>();
            const uint8_t *panels = shared + p % DEPTH * (MT * f::bytes);
            /* High planes and headers are read by other lanes than copied them. (That a place is free again
             * follows from the matrix products, at which all lanes have met since.) */
            if (u == 0 || TYPE == PANEL_Q5_K || TYPE == PANEL_Q6_K) __syncwarp();
            if (u == 0) {
#pragma unroll
                for (int i = 0; i < MT; i++)
                    unpack_scales<TYPE>(panels + i * f::bytes, tables + i * TABLE_BYTES, lane,
                                        i < MT / 2 ? c : c1);
                __syncwarp();
            }
            compute_unit<TYPE, MT, NG>(acc, panels + f::header + u * f::unit, f::bytes, tables,
                                       ring.b + (p % DEPTH * PANEL_UNITS + u) * (NG * 1024), u, lane);
        }
    }
    copy_wait<0>();
}

/* Add the parts in order and write the tile. sums: [parts][8 NG tokens][16 MT + 4]. */
template <int MT, int NG>
DEVICE void split_finish(const struct gemm_args &a, const struct gemm_work &w, float *sums,
                         int n_parts) {
    constexpr int rows = MT * PANEL_ROWS, stride = rows + 4, size = 8 * NG * stride;
    const struct gemm_segment &s = a.segments[w.segment];
    bool silu = a.epilogue == GEMM_SILU_F16;
    int n_out = silu ? rows / 2 : rows;
    for (int i = (int)threadIdx.x; i < w.n * n_out; i += (int)blockDim.x) {
        int token = i / n_out, row = i % n_out;
        const float *at = sums + token * stride + row;
        float v = at[0];
        for (int p = 1; p < n_parts; p++) v += at[p * size];
        v *= s.scale;
        if (silu) {
            float up = at[rows / 2];
            for (int p = 1; p < n_parts; p++) up += at[p * size + rows / 2];
            v = silu_mul(v, up * a.segments[1].scale);
        }
        if (w.first_row + row >= s.n_rows) continue;
        size_t to = (size_t)(w.first + token) * (size_t)s.n_rows + (size_t)(w.first_row + row);
        if (a.epilogue == GEMM_ADD_F32) {
            ((float *)s.out)[to] += v;
        } else if (a.epilogue == GEMM_STORE_F32) {
            ((float *)s.out)[to] = v;
        } else {
            ((uint16_t *)s.out)[to] = (uint16_t)h2_pack(v, 0.0f);
        }
    }
}

template <int TYPE, int MT, int NG, int DEPTH>
DEVICE void split_tile(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared) {
    constexpr int depth = split_depth<TYPE, DEPTH>(), stride = MT * PANEL_ROWS + 4;
    int part = (int)threadIdx.x >> 5, n_parts = (int)blockDim.x >> 5, lane = (int)threadIdx.x & 31;
    float acc[MT][NG][4] = {};
    split_part<TYPE, MT, NG, depth>(a, w, shared + part * split_warp_bytes<TYPE, MT, NG, DEPTH>(),
                                    part, n_parts, lane, acc);
    __syncthreads(); /* the rings become the sums */
    float *sums = (float *)shared, *own = sums + part * (8 * NG * stride);
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < NG; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                own[(8 * n + 2 * t + (j & 1)) * stride + 16 * i + 8 * (j >> 1) + g] = acc[i][n][j];
    __syncthreads();
    split_finish<MT, NG>(a, w, sums, n_parts);
}

/* Bodies for 1, 2, … NT groups of 8 tokens for the common formats, one for the others. */
template <int TYPE, int MT, int NT, int DEPTH>
DEVICE void split_groups(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared) {
    constexpr bool common = TYPE == PANEL_Q4_K || TYPE == PANEL_Q6_K;
    if constexpr (common && NT > 1) {
        if (w.n <= 8) return split_tile<TYPE, MT, 1, DEPTH>(a, w, shared);
    }
    if constexpr (common && NT > 2) {
        if (w.n <= 16) return split_tile<TYPE, MT, 2, DEPTH>(a, w, shared);
    }
    split_tile<TYPE, MT, NT, DEPTH>(a, w, shared);
}

template <int MT, int NT, int DEPTH>
DEVICE void split_block(const struct gemm_args &a, uint8_t *shared) {
    struct gemm_work w;
    depend_release();
    if (a.items) depend_wait();
    if (!find_work<MT>(a, 8 * NT, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return split_groups<PANEL_Q4_K, MT, NT, DEPTH>(a, w, shared);
    case PANEL_Q5_K: return split_groups<PANEL_Q5_K, MT, NT, DEPTH>(a, w, shared);
    case PANEL_Q6_K: return split_groups<PANEL_Q6_K, MT, NT, DEPTH>(a, w, shared);
    case PANEL_Q8_0: return split_groups<PANEL_Q8_0, MT, NT, DEPTH>(a, w, shared);
    default: return split_groups<PANEL_F16, MT, NT, DEPTH>(a, w, shared);
    }
}

#endif
