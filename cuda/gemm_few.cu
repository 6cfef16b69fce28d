/* gemm_few: the product for few tokens, up to 8, 16 or 32 to a tile. A block of W warps has 16 W rows; whole panels (256
 * columns) come through a ring in shared memory, weights copied by the warp that uses them, activations by all. Bound
 * by the bytes of the weights: what counts is how many are under way. */
#include "cuda/gemm.cuh"

enum : int { MAX_WARPS = 8 };

/* Depth of the ring: as much as lets a processor have two blocks. */
template <int NG> __host__ DEVICE constexpr int stages() { return NG < 4 ? 3 : 2; }

extern __shared__ __align__(1024) uint8_t shared_bytes[];

/* Bytes of one panel's activations, and of what a warp has to itself. */
template <int NG> __host__ DEVICE constexpr int x_bytes() { return PANEL_UNITS * 8 * NG * X_ROW; }
template <int TYPE, int NG> DEVICE constexpr int warp_bytes() {
    return stages<NG>() * format<TYPE>::bytes + TABLE_BYTES;
}

template <int NG> static size_t few_shared(int type, int warps, int parts) {
    int rings = parts * stages<NG>() * x_bytes<NG>() + 8 * NG * 4 +
                warps * (stages<NG>() * panel_bytes(type) + TABLE_BYTES);
    return (size_t)rings + gemm_sums_bytes(8 * NG, warps, parts);
}

/* Where a warp copies from and to: its part's activations and its own panels, from this lane's first piece on. */
template <int TYPE, int NG> struct few_ring {
    using f = format<TYPE>;
    const struct gemm_work &w;
    const uint32_t *rows;
    uint8_t *x, *panels;
    int tile_blocks; /* row blocks of a tile */
    size_t tile_skip; /* bytes from the end of a tile's panels to the next tile's */
    int lane;
};

/* The panel that comes next: those of a tile, then those of the next tile's rows. */
struct few_next {
    const uint8_t *w, *x;
    int panel, tile, slot;
};

template <int TYPE, int NG>
static DEVICE void copy_weights(const struct few_ring<TYPE, NG> &r, const struct few_next &next) {
    using f = format<TYPE>;
    if (next.tile < r.w.n_tiles && r.w.block + next.tile * r.tile_blocks < r.w.n_blocks)
        copy_piece<f::bytes>(r.panels + next.slot * f::bytes, next.w, r.lane);
}

/* A warp takes whole rows, lane l the l-th piece of a token's 256 columns. */
template <int TYPE, int NG>
static DEVICE void copy_activations(const struct few_ring<TYPE, NG> &r, const struct few_next &next) {
    if (next.tile >= r.w.n_tiles) return;
    uint8_t *dst = r.x + next.slot * x_bytes<NG>();
#pragma unroll 1
    for (int i = r.w.warp; i < r.w.n; i += r.w.n_warps)
        copy16(dst + i * X_ROW + ((r.lane & 7) ^ (i & 7)) * 16, next.x + (size_t)r.rows[i] * 16);
}

template <int TYPE, int NG>
static DEVICE void advance(const struct few_ring<TYPE, NG> &r, struct few_next &next) {
    next.w += format<TYPE>::bytes, next.x += PANEL_K * 2;
    next.slot = next.slot == stages<NG>() - 1 ? 0 : next.slot + 1;
    if (++next.panel < r.w.n_panels) return;
    next.panel = 0, next.tile++;
    next.w += r.tile_skip, next.x -= r.w.n_panels * (PANEL_K * 2);
}

/* acc += one panel times the tokens. Everything is read before anything waits for it, as far as registers go. */
template <int TYPE, int NG>
static DEVICE void few_panel(float (&acc)[NG][4], const uint8_t *panel, const uint8_t *table,
                             const uint8_t *x, int lane) {
    using f = format<TYPE>;
    constexpr bool common = TYPE == PANEL_Q4_K || TYPE == PANEL_Q6_K;
    constexpr int together = common ? (NG == 1 ? 4 : 2) : 1;
#pragma unroll 1
    for (int u0 = 0; u0 < PANEL_UNITS; u0 += together) {
        struct lane_unit<TYPE> unit[together];
#pragma unroll
        for (int i = 0; i < together; i++)
            load_unit<TYPE>(unit[i], panel + f::header + (u0 + i) * f::unit, table, u0 + i, lane);
        if constexpr (NG < 4) {
            h2 b[together][NG][8];
#pragma unroll
            for (int i = 0; i < together; i++)
#pragma unroll
                for (int n = 0; n < NG; n++)
                    load_tokens(b[i][n], x + (u0 + i) * (8 * NG * X_ROW), n, lane);
#pragma unroll
            for (int i = 0; i < together; i++)
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    h2 a[4];
                    load_fragment<TYPE>(a, unit[i], s);
#pragma unroll
                    for (int n = 0; n < NG; n++) mma_f16(acc[n], a, b[i][n][2 * s], b[i][n][2 * s + 1]);
                }
        } else {
            h2 a[together][4][4];
#pragma unroll
            for (int i = 0; i < together; i++) {
                wgmma_wait<together - 1>(); /* the products that had these operands */
#pragma unroll
                for (int s = 0; s < 4; s++) load_fragment<TYPE>(a[i][s], unit[i], s);
                multiply<NG>(acc, a[i], x + (u0 + i) * (8 * NG * X_ROW), lane);
            }
        }
    }
}

template <int TYPE, int NG>
static DEVICE void few_tiles(const struct gemm_args &a, const struct gemm_work &w) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    uint8_t *x = shared_bytes + w.part * stages<NG>() * x_bytes<NG>();
    uint32_t *rows = (uint32_t *)(shared_bytes + w.n_parts * stages<NG>() * x_bytes<NG>());
    uint8_t *own = (uint8_t *)(rows + 8 * NG) + warp * warp_bytes<TYPE, NG>(), *table = own + stages<NG>() * f::bytes;
    float *sums = (float *)((uint8_t *)(rows + 8 * NG) + (int)(blockDim.x >> 5) * warp_bytes<TYPE, NG>());
    int blocks = 1 << w.rows_shift;
    const struct few_ring<TYPE, NG> ring = {
        w,    rows, x + (lane >> 3) * (8 * NG * X_ROW), own + lane * 16, blocks,
        (size_t)(blocks * w.n_parts - 1) * (size_t)(w.n_panels * f::bytes), lane};
    const struct few_next first = {w.w + lane * 16,
                                   (const uint8_t *)a.x + w.part * w.n_panels * (PANEL_K * 2) + lane * 16, 0, 0, 0};
    struct few_next next = first;
#pragma unroll 1
    for (int i = 0; i < stages<NG>() - 1; i++) { /* weights do not depend on the kernels before */
        copy_weights(ring, next);
        advance(ring, next);
    }
    if (!a.items || a.listed) depend_wait();
    find_rows(a, w, rows);
    next = first;
#pragma unroll 1
    for (int i = 0; i < stages<NG>() - 1; i++) {
        copy_activations(ring, next);
        copy_commit(); /* the first group has all of the weights so far */
        advance(ring, next);
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    int slot = 0;
    depend_release(); /* the first panels are under way */
#pragma unroll 1
    for (int tile = 0; tile < w.n_tiles; tile++) {
        float acc[NG][4] = {};
        wgmma_pin(acc);
#pragma unroll 1
        for (int p = 0; p < w.n_panels; p++) {
            copy_wait<stages<NG>() - 2>();
            wgmma_wait<0>();
            matrix_fence(); /* what this thread copied, before the others' matrix units read it */
            __syncthreads(); /* this panel is here, and the last one's place is free */
            copy_weights(ring, next);
            copy_activations(ring, next);
            copy_commit();
            advance(ring, next);
            const uint8_t *panel = own + slot * f::bytes;
            unpack_scales<TYPE>(panel, table, lane, c);
            __syncwarp();
            few_panel<TYPE, NG>(acc, panel, table, x + slot * x_bytes<NG>(), lane);
            slot = slot == stages<NG>() - 1 ? 0 : slot + 1;
        }
        wgmma_wait<0>();
        wgmma_pin(acc);
        write_tile<NG>(a, w, w.first_row + tile * blocks * PANEL_ROWS, sums, lane, acc);
    }
    copy_wait<0>();
}

template <int NG> static DEVICE void few_block(const struct gemm_args &a) {
    struct gemm_work w;
    if (a.items && !a.listed) depend_wait();
    if (!find_work(a, 8 * NG, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return few_tiles<PANEL_Q4_K, NG>(a, w);
    case PANEL_Q5_K: return few_tiles<PANEL_Q5_K, NG>(a, w);
    case PANEL_Q6_K: return few_tiles<PANEL_Q6_K, NG>(a, w);
    case PANEL_Q8_0: return few_tiles<PANEL_Q8_0, NG>(a, w);
    default: return few_tiles<PANEL_F16, NG>(a, w);
    }
}

static __global__ void __launch_bounds__(32 * MAX_WARPS, 3)
    k_gemm_few8_f16(const __grid_constant__ struct gemm_args a) {
    few_block<1>(a);
}

static __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
    k_gemm_few16_f16(const __grid_constant__ struct gemm_args a) {
    few_block<2>(a);
}

static __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
    k_gemm_few32_f16(const __grid_constant__ struct gemm_args a) {
    few_block<4>(a);
}

extern const struct gemm_kernel gemm_few8 = {8, MAX_WARPS, 1, k_gemm_few8_f16, few_shared<1>};
extern const struct gemm_kernel gemm_few16 = {16, MAX_WARPS, 1, k_gemm_few16_f16, few_shared<2>};
extern const struct gemm_kernel gemm_few32 = {32, MAX_WARPS, 4, k_gemm_few32_f16, few_shared<4>};
