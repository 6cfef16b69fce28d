/* gemm_few: the product for few tokens, up to 8 or 16 to a tile. A block of W warps has 16 W rows; whole panels (256
 * columns) come through a ring in shared memory, weights copied by the warp that uses them, activations by all. Bound
 * by the bytes of the weights: what counts is how many are under way. */
#include "cuda/gemm.cuh"

enum : int { STAGES = 4, MAX_WARPS = 8 };

extern __shared__ __align__(1024) uint8_t shared_bytes[];

/* Bytes of one panel's activations, and of what a warp has to itself. */
template <int NG> __host__ DEVICE constexpr int x_bytes() { return PANEL_UNITS * 8 * NG * X_ROW; }
template <int TYPE> DEVICE constexpr int warp_bytes() {
    return STAGES * format<TYPE>::bytes + TABLE_BYTES;
}

template <int NG> static size_t few_shared(int type, int warps, int parts) {
    int rings = parts * STAGES * x_bytes<NG>() + 8 * NG * 4 + warps * (STAGES * panel_bytes(type) + TABLE_BYTES);
    return gemm_shared((size_t)rings, 8 * NG, warps, parts);
}

/* x: of this warp's part. panels, table: its own. rows: the tokens' places in the activations. */
template <int TYPE, int NG> struct few_ring {
    using f = format<TYPE>;
    const struct gemm_args &a;
    const struct gemm_work &w;
    uint8_t *x, *panels, *table;
    int *rows;
    int lane;

    DEVICE void copy_weights(int p) const {
        if (p < w.n_panels && w.stored)
            copy_piece<f::bytes>(panels + p % STAGES * f::bytes, w.w + (size_t)p * f::bytes, lane);
    }

    /* A warp takes whole rows, lane l the l-th chunk of a token's 256 columns. */
    DEVICE void copy_activations(int p) const {
        if (p >= w.n_panels) return;
        uint8_t *dst = x + p % STAGES * x_bytes<NG>() + (lane >> 3) * (8 * NG * X_ROW);
        const uint8_t *src = (const uint8_t *)a.x + (w.part * w.n_panels + p) * (PANEL_K * 2) + lane * 16;
#pragma unroll 1
        for (int i = w.warp; i < w.n; i += w.n_warps)
            copy16(dst + i * X_ROW + ((lane & 7) ^ (i & 7)) * 16,
                   src + (size_t)rows[i] * (size_t)a.n_cols * 2);
    }
};

/* acc += one panel times the tokens. */
template <int TYPE, int NG>
static DEVICE void few_panel(float (&acc)[NG][4], const uint8_t *panel, const uint8_t *table,
                             const uint8_t *x, int lane) {
    using f = format<TYPE>;
#pragma unroll 2
    for (int u = 0; u < PANEL_UNITS; u++) {
        h2 a[4][4];
        load_fragments<TYPE>(a, panel + f::header + u * f::unit, table, u, lane);
#pragma unroll
        for (int n = 0; n < NG; n++) {
            h2 b[8];
            load_tokens(b, x + u * (8 * NG * X_ROW), n, lane);
#pragma unroll
            for (int s = 0; s < 4; s++) mma_f16(acc[n], a[s], b[2 * s], b[2 * s + 1]);
        }
    }
}

template <int TYPE, int NG>
static DEVICE void few_tile(const struct gemm_args &a, const struct gemm_work &w) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31;
    int *rows = (int *)(shared_bytes + w.n_parts * STAGES * x_bytes<NG>());
    uint8_t *own = (uint8_t *)(rows + 8 * NG) + (int)(threadIdx.x >> 5) * warp_bytes<TYPE>();
    const struct few_ring<TYPE, NG> ring = {
        a, w, shared_bytes + w.part * STAGES * x_bytes<NG>(), own, own + STAGES * f::bytes, rows, lane};
#pragma unroll 1
    for (int p = 0; p < STAGES - 1; p++) ring.copy_weights(p); /* they do not depend on the kernels before */
    if (!a.items) depend_wait();
    for (int i = (int)threadIdx.x; i < w.n; i += (int)blockDim.x) rows[i] = token_row(w, i);
    __syncthreads();
#pragma unroll 1
    for (int p = 0; p < STAGES - 1; p++) {
        ring.copy_activations(p);
        copy_commit(); /* the first group has all of the weights so far */
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    float acc[NG][4] = {};
#pragma unroll 1
    for (int p = 0; p < w.n_panels; p++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* panel p is here, and panel p - 1's place is free */
        ring.copy_weights(p + STAGES - 1);
        ring.copy_activations(p + STAGES - 1);
        copy_commit();
        const uint8_t *panel = own + p % STAGES * f::bytes;
        unpack_scales<TYPE>(panel, ring.table, lane, c);
        __syncwarp();
        few_panel<TYPE, NG>(acc, panel, ring.table, ring.x + p % STAGES * x_bytes<NG>(), lane);
    }
    copy_wait<0>();
    write_tile<NG>(a, w, (float *)shared_bytes, lane, acc);
}

template <int NG> static DEVICE void few_block(const struct gemm_args &a) {
    struct gemm_work w;
    depend_release();
    if (a.items) depend_wait();
    if (!find_work(a, 8 * NG, w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return few_tile<PANEL_Q4_K, NG>(a, w);
    case PANEL_Q5_K: return few_tile<PANEL_Q5_K, NG>(a, w);
    case PANEL_Q6_K: return few_tile<PANEL_Q6_K, NG>(a, w);
    case PANEL_Q8_0: return few_tile<PANEL_Q8_0, NG>(a, w);
    default: return few_tile<PANEL_F16, NG>(a, w);
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

extern const struct gemm_kernel gemm_few8 = {8, k_gemm_few8_f16, few_shared<1>};
extern const struct gemm_kernel gemm_few16 = {16, k_gemm_few16_f16, few_shared<2>};
