/* gemm_few: the product for few tokens, up to 8, 16 or 32 to a tile. A block of W warps has 16 W rows; whole panels (256
 * columns) come through a ring in shared memory, weights copied by the warp that uses them, activations by all. Bound
 * by the bytes of the weights: what counts is how many are under way. */
#include "cuda/gemm.cuh"

enum : int { MAX_WARPS = 8 };

/* Depth of the ring: as much as lets a processor have two blocks of 8 warps. fours: four warps multiply together. */
__host__ DEVICE constexpr int few_stages(int type, int n_groups, bool fours) {
    return n_groups == 4 || (fours && type != PANEL_Q4_K) ? 2 : 3;
}

extern __shared__ __align__(1024) uint8_t shared_bytes[];

/* For weights of a type and up to 8 NG tokens: bytes of one panel's activations, and of what a warp has to itself. */
template <int TYPE, int NG, bool FOURS> struct few {
    using f = format<TYPE>;
    static constexpr int stages = few_stages(TYPE, NG, FOURS);
    static constexpr int x_bytes = PANEL_UNITS * 8 * NG * X_ROW, own_bytes = stages * f::bytes + TABLE_BYTES;
};

static size_t few_bytes(int type, int warps, int parts, int n_groups, bool fours) {
    int stages = few_stages(type, n_groups, fours), x_bytes = PANEL_UNITS * 8 * n_groups * X_ROW;
    int rings = parts * stages * x_bytes + 8 * n_groups * 4 + warps * (stages * panel_bytes(type) + TABLE_BYTES);
    return (size_t)rings + gemm_sums_bytes(8 * n_groups, warps, parts);
}

/* Formats that have bodies of their own for fewer tokens than gemm_few32 may have. */
__host__ DEVICE constexpr bool is_common(int type) { return type == PANEL_Q4_K || type == PANEL_Q6_K; }

template <int NG> static size_t few_shared(int type, int warps, int parts) {
    size_t most = few_bytes(type, warps, parts, NG, NG == 4);
    for (int n = 2; NG == 4 && is_common(type) && n < NG; n++) {
        size_t bytes = few_bytes(type, warps, parts, n, true);
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Where a warp copies from and to: its part's activations and its own panels, from this lane's first piece on. */
struct few_ring {
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

template <class F>
static DEVICE void copy_weights(const struct few_ring &r, const struct few_next &next) {
    using f = typename F::f;
    if (next.tile < r.w.n_tiles && r.w.block + next.tile * r.tile_blocks < r.w.n_blocks)
        copy_piece<f::bytes>(r.panels + next.slot * f::bytes, next.w, r.lane);
}

/* A warp takes whole rows, lane l the l-th piece of a token's 256 columns. */
template <class F>
static DEVICE void copy_activations(const struct few_ring &r, const struct few_next &next) {
    if (next.tile >= r.w.n_tiles) return;
    uint8_t *dst = r.x + next.slot * F::x_bytes;
#pragma unroll 1
    for (int i = r.w.warp; i < r.w.n; i += r.w.n_warps)
        copy16(dst + i * X_ROW + ((r.lane & 7) ^ (i & 7)) * 16, next.x + (size_t)r.rows[i] * 16);
}

template <class F>
static DEVICE void advance(const struct few_ring &r, struct few_next &next) {
    next.w += F::f::bytes, next.x += PANEL_K * 2;
    next.slot = next.slot == F::stages - 1 ? 0 : next.slot + 1;
    if (++next.panel < r.w.n_panels) return;
    next.panel = 0, next.tile++;
    next.w += r.tile_skip, next.x -= r.w.n_panels * (PANEL_K * 2);
}

/* acc += one panel times the tokens. Everything is read before anything waits for it, as far as registers go. */
template <int TYPE, int NG, bool FOURS>
static DEVICE void few_panel(float (&acc)[NG][4], const uint8_t *panel, const uint8_t *table,
                             const uint8_t *x, int lane) {
    using f = format<TYPE>;
    constexpr int together = is_common(TYPE) ? (NG == 1 ? 4 : 2) : 1;
#pragma unroll 1
    for (int u0 = 0; u0 < PANEL_UNITS; u0 += together) {
        struct lane_unit<TYPE> unit[together];
#pragma unroll
        for (int i = 0; i < together; i++)
            load_unit<TYPE>(unit[i], panel + f::header + (u0 + i) * f::unit, table, u0 + i, lane);
        if constexpr (!FOURS) {
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

template <int TYPE, int NG, bool FOURS>
static DEVICE void few_tiles(const struct gemm_args &a, const struct gemm_work &w) {
    using F = few<TYPE, NG, FOURS>;
    using f = typename F::f;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    uint8_t *x = shared_bytes + w.part * F::stages * F::x_bytes;
    uint32_t *rows = (uint32_t *)(shared_bytes + w.n_parts * F::stages * F::x_bytes);
    uint8_t *own = (uint8_t *)(rows + 8 * NG) + warp * F::own_bytes, *table = own + F::stages * f::bytes;
    float *sums = (float *)((uint8_t *)(rows + 8 * NG) + (int)(blockDim.x >> 5) * F::own_bytes);
    int blocks = 1 << w.rows_shift;
    const struct few_ring ring = {
        w,    rows, x + (lane >> 3) * (8 * NG * X_ROW), own + lane * 16, blocks,
        (size_t)(blocks * w.n_parts - 1) * (size_t)(w.n_panels * f::bytes), lane};
    const struct few_next first = {w.w + lane * 16,
                                   (const uint8_t *)a.x + w.part * w.n_panels * (PANEL_K * 2) + lane * 16, 0, 0, 0};
    struct few_next next = first;
#pragma unroll 1
    for (int i = 0; i < F::stages - 1; i++) { /* weights do not depend on the kernels before */
        copy_weights<F>(ring, next);
        advance<F>(ring, next);
    }
    if (!a.items || a.listed) depend_wait();
    find_rows(a, w, rows);
    next = first;
#pragma unroll 1
    for (int i = 0; i < F::stages - 1; i++) {
        copy_activations<F>(ring, next);
        copy_commit(); /* the first group has all of the weights so far */
        advance<F>(ring, next);
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
            copy_wait<F::stages - 2>();
            wgmma_wait<0>();
            matrix_fence(); /* what this thread copied, before the others' matrix units read it */
            __syncthreads(); /* this panel is here, and the last one's place is free */
            copy_weights<F>(ring, next);
            copy_activations<F>(ring, next);
            copy_commit();
            advance<F>(ring, next);
            const uint8_t *panel = own + slot * f::bytes;
            unpack_scales<TYPE>(panel, table, lane, c);
            __syncwarp();
            few_panel<TYPE, NG, FOURS>(acc, panel, table, x + slot * F::x_bytes, lane);
            slot = slot == F::stages - 1 ? 0 : slot + 1;
        }
        wgmma_wait<0>();
        wgmma_pin(acc);
        write_tile<NG>(a, w, w.first_row + tile * blocks * PANEL_ROWS, sums, lane, acc);
    }
    copy_wait<0>();
}

/* Where four warps multiply together, bodies for fewer groups of 8 tokens for the common formats, one for the others. */
template <int TYPE, int NG> static DEVICE void few_groups(const struct gemm_args &a, const struct gemm_work &w) {
    constexpr bool fours = NG == 4;
    if constexpr (fours && is_common(TYPE)) {
        if (w.n <= 16) return few_tiles<TYPE, 2, fours>(a, w);
        if (w.n <= 24) return few_tiles<TYPE, 3, fours>(a, w);
    }
    few_tiles<TYPE, NG, fours>(a, w);
}

template <int NG> static DEVICE void few_block(const struct gemm_args &a) {
    struct gemm_work w;
    if (a.items && !a.listed) depend_wait();
    if (!find_work(a, 8 * NG, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return few_groups<PANEL_Q4_K, NG>(a, w);
    case PANEL_Q5_K: return few_groups<PANEL_Q5_K, NG>(a, w);
    case PANEL_Q6_K: return few_groups<PANEL_Q6_K, NG>(a, w);
    case PANEL_Q8_0: return few_groups<PANEL_Q8_0, NG>(a, w);
    default: return few_groups<PANEL_F16, NG>(a, w);
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
