/* gemm_many: the product for many tokens, up to 32, 64 or 128 to a tile. A block of W warps has 16 W rows; units of 64
 * columns come through a ring in shared memory, weights copied by the warp that uses them, activations by all. On
 * Hopper four warps multiply together (wgmma), each with the operands that it unpacked in its registers; while the
 * matrix units work for some fours of warps, the others unpack. Elsewhere every warp multiplies for itself. Bound by
 * the matrix units. */
#ifndef MOED_CUDA_GEMM_MANY_CUH
#define MOED_CUDA_GEMM_MANY_CUH

#include "cuda/gemm.cuh"

enum : int { STAGES = 6, AHEAD = STAGES - 2 /* units copied in advance: see many_tile */, MAX_WARPS = 16 };

template <int TYPE> DEVICE constexpr int warp_bytes() {
    return STAGES * format<TYPE>::unit + 2 * format<TYPE>::header + TABLE_BYTES;
}

template <int WIDTH> static size_t many_shared(int type, int warps, int parts) {
    int own = STAGES * panel_unit_bytes(type) + 2 * panel_header_bytes(type) + TABLE_BYTES;
    int rings = parts * STAGES * WIDTH * X_ROW + WIDTH * 4 + warps * own;
    return gemm_shared((size_t)rings, WIDTH, warps, parts);
}

/* x: of this warp's part, [STAGES][WIDTH][X_ROW]. units, headers, table: its own, [STAGES], [2] and one. rows: the tokens'
 * places in the activations. */
template <int TYPE, int WIDTH> struct many_ring {
    using f = format<TYPE>;
    const struct gemm_args &a;
    const struct gemm_work &w;
    uint8_t *x, *units, *headers, *table;
    int *rows;
    int lane;

    DEVICE void copy_weights(int i, int slot) const {
        int p = i / PANEL_UNITS, u = i % PANEL_UNITS;
        if (p >= w.n_panels || !w.stored) return;
        const uint8_t *panel = w.w + (size_t)p * f::bytes;
        copy_piece<f::unit>(units + slot * f::unit, panel + f::header + u * f::unit, lane);
        if (f::header > 0 && u == 0) copy_piece<f::header>(headers + (p & 1) * f::header, panel, lane);
    }

    /* Eight threads take a token's 64 columns. */
    DEVICE void copy_activations(int i, int slot) const {
        if (i >= w.n_panels * PANEL_UNITS) return;
        int c = lane & 7;
        const uint8_t *src = (const uint8_t *)a.x + (w.part * w.n_panels * PANEL_UNITS + i) * (PANEL_UNIT_K * 2) + c * 16;
        for (int r = w.warp * 4 + (lane >> 3); r < w.n; r += w.n_warps * 4)
            copy16(x + (slot * WIDTH + r) * X_ROW + (c ^ (r & 7)) * 16,
                   src + (size_t)rows[r] * (size_t)a.n_cols * 2);
    }
};

/* acc += a (16 rows of each warp, 64 columns) times 8 NG tokens. */
template <int NG>
static DEVICE void many_product(float (&acc)[NG][4], h2 (&a)[4][4], const uint8_t *x, int lane) {
#ifdef MOED_WGMMA
    (void)lane;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma_f16(acc, a[s], swizzled_matrix(x + 32 * s));
    wgmma_commit();
#else
#pragma unroll
    for (int n = 0; n < NG; n++) {
        h2 b[8];
        load_tokens(b, x, n, lane);
#pragma unroll
        for (int s = 0; s < 4; s++) mma_f16(acc[n], a[s], b[2 * s], b[2 * s + 1]);
    }
#endif
}

/* A place in the ring is written again AHEAD units after it was read and not at once: a unit's products may still run
 * while the next one's begin, but not when those of the one after that do. */
template <int TYPE, int WIDTH, int NG>
static DEVICE void many_tile(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31;
    int *rows = (int *)(shared + w.n_parts * STAGES * WIDTH * X_ROW);
    uint8_t *own = (uint8_t *)(rows + WIDTH) + (int)(threadIdx.x >> 5) * warp_bytes<TYPE>();
    uint8_t *headers = own + STAGES * f::unit;
    const struct many_ring<TYPE, WIDTH> ring = {
        a, w, shared + w.part * STAGES * WIDTH * X_ROW, own, headers, headers + 2 * f::header, rows, lane};
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) ring.copy_weights(i, i); /* they do not depend on the kernels before */
    if (!a.items) depend_wait();
    for (int i = (int)threadIdx.x; i < w.n; i += (int)blockDim.x) rows[i] = token_row(w, i);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) {
        ring.copy_activations(i, i);
        copy_commit(); /* the first group has all of the weights so far */
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    float acc[NG][4] = {};
    wgmma_pin(acc);
    int slot = 0, next = AHEAD;
#pragma unroll 1
    for (int i = 0; i < w.n_panels * PANEL_UNITS; i++) {
        int u = i % PANEL_UNITS;
        copy_wait<AHEAD - 1>();
        matrix_fence(); /* what this thread copied, before the others' matrix units read it */
        __syncthreads();
        ring.copy_weights(i + AHEAD, next);
        ring.copy_activations(i + AHEAD, next);
        copy_commit();
        if (u == 0 && f::header > 0) {
            unpack_scales<TYPE>(headers + (i / PANEL_UNITS & 1) * f::header, ring.table, lane, c);
            __syncwarp();
        }
        h2 operands[4][4];
        wgmma_wait<0>(); /* the last unit's products: the operands are free */
        load_fragments<TYPE>(operands, own + slot * f::unit, ring.table, u, lane);
        many_product<NG>(acc, operands, ring.x + slot * WIDTH * X_ROW, lane);
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        next = next == STAGES - 1 ? 0 : next + 1;
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    copy_wait<0>();
    write_tile<NG>(a, w, (float *)shared, lane, acc);
}

/* Bodies for fewer groups of 8 tokens for the common formats, one for the others. */
template <int TYPE, int WIDTH>
static DEVICE void many_groups(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared) {
    constexpr bool common = TYPE == PANEL_Q4_K || TYPE == PANEL_Q6_K;
    if constexpr (common && WIDTH == 128) {
        if (w.n <= 64) return many_tile<TYPE, WIDTH, 8>(a, w, shared);
        if (w.n <= 96) return many_tile<TYPE, WIDTH, 12>(a, w, shared);
    }
    if constexpr (common && WIDTH == 64) {
        if (w.n <= 32) return many_tile<TYPE, WIDTH, 4>(a, w, shared);
    }
    many_tile<TYPE, WIDTH, WIDTH / 8>(a, w, shared);
}

template <int WIDTH> static DEVICE void many_block(const struct gemm_args &a, uint8_t *shared) {
    struct gemm_work w;
    depend_release();
    if (a.items) depend_wait();
    if (!find_work(a, WIDTH, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return many_groups<PANEL_Q4_K, WIDTH>(a, w, shared);
    case PANEL_Q5_K: return many_groups<PANEL_Q5_K, WIDTH>(a, w, shared);
    case PANEL_Q6_K: return many_groups<PANEL_Q6_K, WIDTH>(a, w, shared);
    case PANEL_Q8_0: return many_groups<PANEL_Q8_0, WIDTH>(a, w, shared);
    default: return many_groups<PANEL_F16, WIDTH>(a, w, shared);
    }
}

#endif
