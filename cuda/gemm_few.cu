/* gemm_few: the product for few tokens, up to 8, 16 or 32 to a tile. A block of W warps has 16 W rows; whole panels (256
 * columns) come through a ring in shared memory, weights copied by the warp that uses them, activations by all. Bound
 * by the bytes of the weights as long as enough are under way, and, from some 4 tokens to an expert on, as much by the
 * number of instructions for a panel. */
#include "cuda/gemm.cuh"

enum : int { MAX_WARPS = 8 };

/* Depth of the ring for tiles of 8 NG tokens in a kernel for up to 8 MOST: as much as lets a processor have four blocks of
 * 4 warps, or two of 8; fewer tokens leave room for one panel more. */
__host__ DEVICE constexpr int few_stages(int type, int n_groups, int most) {
    return (most == 1 || type == PANEL_Q4_K ? 3 : 2) + (most == 4 && n_groups == 2);
}

extern __shared__ __align__(1024) uint8_t shared_bytes[];

/* Formats that have bodies of their own for fewer tokens than a tile may have, and a panel without loops. */
__host__ DEVICE constexpr bool is_common(int type) { return type == PANEL_Q4_K || type == PANEL_Q6_K; }

/* Four warps multiply together. */
__host__ DEVICE constexpr bool is_fours(int n_groups) { return n_groups == 4; }

/* What a warp has to itself, panels and scales, and all warps of a block together; activations come behind. */
KERNEL_FN int own_bytes(int type, int stages) { return stages * panel_bytes(type) + TABLE_BYTES; }
KERNEL_FN int all_own_bytes(int type, int stages, int warps) { return (warps * own_bytes(type, stages) + 1023) / 1024 * 1024; }

/* For weights of a type and up to 8 NG tokens, in a kernel for up to 8 MOST. */
template <int TYPE, int NG, int MOST> struct few {
    using f = format<TYPE>;
    static constexpr bool fours = is_fours(MOST);
    static constexpr int stages = few_stages(TYPE, NG, MOST);
    static constexpr int x_bytes = PANEL_UNITS * 8 * NG * X_ROW;           /* of one panel's activations */
    static constexpr int held = fours ? NG : NG == 1 ? 2 : 4; /* rows of activations a warp knows by heart; of fours, all its rows */
    static constexpr int together = !is_common(TYPE) || fours ? 1 : NG == 1 ? 4 : 2; /* units that are read at once */
    static constexpr int unrolled = is_common(TYPE) ? PANEL_UNITS : 1;
};

template <int MOST> static size_t few_shared(int type, int warps, int parts) {
    int most = 0;
    for (int n_groups = MOST == 4 && is_common(type) ? 2 : MOST; n_groups <= MOST; n_groups++) {
        int stages = few_stages(type, n_groups, MOST), x_bytes = PANEL_UNITS * 8 * n_groups * X_ROW;
        int n = all_own_bytes(type, stages, warps) + parts * stages * x_bytes;
        if (n > most) most = n;
    }
    return (size_t)most;
}

/* Of fours, scalar registers are for wgmma's descriptors. */
template <int MOST> static DEVICE int warp_of() { return is_fours(MOST) ? (int)threadIdx.x >> 5 : warp_index(); }

/* The panel that comes next: those of a tile, then those of the next tile's rows. */
struct few_next {
    const uint8_t *w, *x;
    int panel, tile, slot;
};

/* Where a warp copies panels from and to, from this lane's first piece on. */
struct few_panels {
    const uint8_t *w;
    size_t tile_skip;   /* bytes from the end of a tile's panels to the next tile's */
    int lane, n_stored; /* tiles in which this warp's rows exist */
    uint32_t to;        /* in shared memory */
};

/* And activations of its part. */
template <class F> struct few_ring {
    const struct gemm_args &a;
    const struct gemm_work &w;
    const struct few_panels &panels;
    uint32_t x;             /* token 0, chunks not permuted, in shared memory */
    uint32_t own_x[F::held]; /* of the first tokens that this warp copies */
    uint32_t rows[F::held];  /* where they are in x, in pieces of 16 bytes */
};

template <int TYPE> static DEVICE void copy_weights(const struct few_panels &p, const struct few_next &next) {
    copy_piece<format<TYPE>::bytes>(next.tile < p.n_stored, p.to + next.slot * format<TYPE>::bytes, next.w, p.lane);
}

template <class F> static DEVICE uint32_t place_of(const struct few_ring<F> &r, int token) {
    return r.x + token * X_ROW + ((r.panels.lane ^ token) & 7) * 16;
}

/* A warp takes whole rows. */
template <class F> static DEVICE void find_rows(struct few_ring<F> &r) {
#pragma unroll
    for (int k = 0; k < F::held; k++) {
        int i = r.w.warp + k * r.w.n_warps;
        r.rows[k] = row_of(r.a, r.w, i);
        r.own_x[k] = place_of(r, i);
        keep(r.own_x[k]);
    }
}

/* Lane l takes the l-th piece of a token's 256 columns. */
template <class F>
static DEVICE void copy_activations(const struct few_ring<F> &r, const struct few_next &next) {
    int i = r.w.warp, n = next.tile < r.w.n_tiles ? r.w.n : 0;
#pragma unroll
    for (int k = 0; k < F::held; k++, i += r.w.n_warps)
        copy16_if(i < n, r.own_x[k] + next.slot * F::x_bytes, next.x + (size_t)r.rows[k] * 16);
#pragma unroll 1
    for (; i < n; i += r.w.n_warps)
        copy16(place_of(r, i) + next.slot * F::x_bytes, next.x + (size_t)row_of(r.a, r.w, i) * 16);
}

template <int TYPE, int STAGES>
static DEVICE void advance(const struct gemm_work &w, const struct few_panels &p, struct few_next &next) {
    next.w += format<TYPE>::bytes, next.x += PANEL_K * 2;
    next.slot = next.slot == STAGES - 1 ? 0 : next.slot + 1;
    if (++next.panel < w.n_panels) return;
    next.panel = 0, next.tile++;
    next.w += p.tile_skip, next.x -= w.n_panels * (PANEL_K * 2);
}

/* acc += one panel times the tokens. Everything is read before anything waits for it, as far as registers go. */
template <class F, int TYPE, int NG>
static DEVICE void few_panel(float (&acc)[NG][4], const uint8_t *panel, const uint8_t *table,
                             const uint8_t *x, int lane) {
    using f = typename F::f;
    constexpr int together = F::together;
    uint32_t matrix = F::fours ? swizzled_matrix(x) : 0;
#pragma unroll F::unrolled
    for (int u0 = 0; u0 < PANEL_UNITS; u0 += together) {
        struct lane_unit<TYPE> unit[together];
#pragma unroll
        for (int i = 0; i < together; i++)
            load_unit<TYPE>(unit[i], panel + f::header + (u0 + i) * f::unit, table, u0 + i, lane);
        if constexpr (!F::fours) {
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
                multiply<NG>(acc, a[i], x, matrix, (u0 + i) * (8 * NG * X_ROW), lane);
            }
        }
    }
}

/* The item's tiles. */
template <int TYPE, int NG, int MOST>
static DEVICE void few_tiles(const struct gemm_args &a, const struct gemm_work &w) {
    using F = few<TYPE, NG, MOST>;
    using f = typename F::f;
    int lane = (int)threadIdx.x & 31, warp = warp_of<MOST>(), blocks = 1 << w.rows_shift;
    uint8_t *own = shared_bytes + warp * own_bytes(TYPE, F::stages), *table = own + F::stages * f::bytes;
    struct few_panels panels = {w.w + lane * 16, (size_t)(blocks * w.n_parts - 1) * (size_t)(w.n_panels * f::bytes), lane,
                                min(w.n_tiles, (w.n_blocks - w.block + blocks - 1) >> w.rows_shift),
                                shared_address(own + lane * 16)};
    keep(panels.to);
    struct few_next next = {panels.w, NULL, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < F::stages - 1; i++) { /* weights do not depend on the kernels before */
        copy_weights<TYPE>(panels, next);
        advance<TYPE, F::stages>(w, panels, next);
    }
    wait_for_inputs(a, w);
    uint8_t *all_x = shared_bytes + all_own_bytes(TYPE, F::stages, 1 << a.warps_shift), *x = all_x + w.part * F::stages * F::x_bytes;
    struct few_ring<F> ring = {a, w, panels, shared_address(x + (lane >> 3) * (8 * NG * X_ROW)), {}, {}};
    next = {panels.w, (const uint8_t *)a.x + w.part * w.n_panels * (PANEL_K * 2) + lane * 16, 0, 0, 0};
    find_rows(ring);
#pragma unroll 1
    for (int i = 0; i < F::stages - 1; i++) {
        copy_activations<F>(ring, next);
        copy_commit(); /* the first group has all of the weights so far */
        advance<TYPE, F::stages>(w, panels, next);
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    int slot = 0, last = 0;
    depend_release(); /* the first panels are under way */
#pragma unroll 1
    for (int tile = 0; tile < w.n_tiles; tile++) {
        float acc[NG][4] = {};
        if constexpr (F::fours) wgmma_pin(acc);
#pragma unroll 1
        for (int p = 0; p < w.n_panels; p++) {
            copy_wait<F::stages - 2>();
            if constexpr (F::fours) {
                wgmma_wait<0>();
                matrix_fence(); /* what this thread copied, before the others' matrix units read it */
            }
            __syncthreads(); /* this panel is here, and the last one's place is free */
            copy_weights<TYPE>(panels, next);
            copy_activations<F>(ring, next);
            copy_commit();
            advance<TYPE, F::stages>(w, panels, next);
            const uint8_t *panel = own + slot * f::bytes;
            unpack_scales<TYPE>(panel, table, lane, c);
            __syncwarp();
            few_panel<F, TYPE, NG>(acc, panel, table, x + slot * F::x_bytes, lane);
            last = slot, slot = slot == F::stages - 1 ? 0 : slot + 1;
        }
        if constexpr (F::fours) {
            wgmma_wait<0>();
            wgmma_pin(acc);
        }
        /* The place of the last panel's activations is free until the block meets again. */
        write_tile<NG>(a, w, w.first_row + (tile * PANEL_ROWS << w.rows_shift), (float *)(all_x + last * F::x_bytes),
                       F::stages * F::x_bytes / 4, lane, acc);
    }
    copy_wait<0>();
    finish_item(a, w);
}

/* Bodies for fewer groups of 8 tokens for the common formats, one for the others. */
template <int TYPE, int MOST> static DEVICE void few_groups(const struct gemm_args &a, const struct gemm_work &w) {
    if constexpr (MOST == 4 && is_common(TYPE)) {
        if (w.n <= 16) return few_tiles<TYPE, 2, MOST>(a, w);
        if (w.n <= 24) return few_tiles<TYPE, 3, MOST>(a, w);
    }
    if constexpr (MOST == 2 && is_common(TYPE))
        if (w.n <= 8) return few_tiles<TYPE, 1, MOST>(a, w);
    few_tiles<TYPE, MOST, MOST>(a, w);
}

template <int MOST> static DEVICE void few_block(const struct gemm_args &a) {
    struct gemm_work w;
    if (a.items && !a.listed) depend_wait();
    if (!find_work(a, 8 * MOST, warp_of<MOST>(), w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return few_groups<PANEL_Q4_K, MOST>(a, w);
    case PANEL_Q5_K: return few_groups<PANEL_Q5_K, MOST>(a, w);
    case PANEL_Q6_K: return few_groups<PANEL_Q6_K, MOST>(a, w);
    case PANEL_Q8_0: return few_groups<PANEL_Q8_0, MOST>(a, w);
    default: return few_groups<PANEL_F16, MOST>(a, w);
    }
}

static __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
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
