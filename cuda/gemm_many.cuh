/* gemm_many: the product for many tokens, up to 64 or 128 to a tile. A block of W warps has 16 W rows; units of 64
 * columns come through a ring in shared memory, weights copied by the warp that uses them, activations by all. On
 * Hopper four warps multiply together (wgmma), each with the operands that it unpacked in its registers; while the
 * matrix units work for some fours of warps, the others unpack. Elsewhere every warp multiplies for itself. Bound by
 * the matrix units. */
#ifndef MOED_CUDA_GEMM_MANY_CUH
#define MOED_CUDA_GEMM_MANY_CUH

#include "cuda/gemm.cuh"

enum : int { MAX_WARPS = 16 };

/* Units in the ring: fewer where every part has a ring for many tokens. */
KERNEL_FN int many_stages(int width, int parts) { return width * parts <= 128 ? 6 : 4; }

template <int TYPE> DEVICE int warp_bytes(int stages) {
    return stages * format<TYPE>::unit + 2 * format<TYPE>::header + TABLE_BYTES;
}

template <int WIDTH> static size_t many_shared(int type, int warps, int parts) {
    int stages = many_stages(WIDTH, parts), own = stages * panel_unit_bytes(type) + 2 * panel_header_bytes(type) + TABLE_BYTES;
    int rings = parts * stages * WIDTH * X_ROW + WIDTH * 4 + warps * own;
    size_t sums = (size_t)(WIDTH * warps * PANEL_ROWS) * sizeof(float); /* where the rings were */
    return (size_t)rings > sums ? (size_t)rings : sums;
}

/* Where a warp copies from and to: its part's activations, of the tokens that this lane copies for, and its own units,
 * from this lane's first piece on. */
struct many_ring {
    const uint32_t *rows;  /* of this lane's first token */
    uint8_t *x, *units, *headers;
    int stages, lane, n_rows, stride; /* how many tokens, and from one to the next */
    bool stored;              /* the row block exists */
};

/* The unit that comes next. */
struct many_next {
    const uint8_t *w, *x;
    int unit, slot, left, parity; /* of the panel, in which its header lies */
};

template <int TYPE>
static DEVICE void copy_weights(const struct many_ring &r, const struct many_next &next) {
    using f = format<TYPE>;
    bool wanted = next.left > 0 && r.stored;
    copy_piece<f::unit>(wanted, shared_address(r.units + next.slot * f::unit), next.w + f::header + next.unit * f::unit, r.lane);
    if (f::header > 0 && next.unit == 0)
        copy_piece<f::header>(wanted, shared_address(r.headers + next.parity * f::header), next.w, r.lane);
}

/* Eight lanes take a token's 64 columns. */
template <int WIDTH>
static DEVICE void copy_activations(const struct many_ring &r, const struct many_next &next) {
    if (next.left <= 0) return;
    uint8_t *dst = r.x + next.slot * WIDTH * X_ROW;
#pragma unroll 1
    for (int i = 0; i < r.n_rows; i++)
        copy16(dst + i * r.stride * X_ROW, next.x + (size_t)r.rows[i * r.stride] * 16);
}

template <int TYPE> static DEVICE void advance(const struct many_ring &r, struct many_next &next) {
    next.x += PANEL_UNIT_K * 2;
    next.slot = next.slot == r.stages - 1 ? 0 : next.slot + 1;
    next.left--;
    if (++next.unit < PANEL_UNITS) return;
    next.unit = 0, next.parity ^= 1;
    next.w += format<TYPE>::bytes;
}

/* A place in the ring is written again two units after it was read, hence `ahead`: when the block meets for unit i, products
 * of unit i - 1 may still run, but none of unit i - 2. */
template <int TYPE, int WIDTH, int NG>
static DEVICE void many_tile(const struct gemm_args &a, const struct gemm_work &w, uint8_t *shared) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31, warp = warp_index();
    int stages = many_stages(WIDTH, w.n_parts), ahead = stages - 2; /* units copied in advance */
    uint8_t *x = shared + w.part * stages * WIDTH * X_ROW;
    uint32_t *rows = (uint32_t *)(shared + w.n_parts * stages * WIDTH * X_ROW);
    uint8_t *own = (uint8_t *)(rows + WIDTH) + warp * warp_bytes<TYPE>(stages);
    uint8_t *headers = own + stages * f::unit, *table = headers + 2 * f::header;
    int token = w.warp * 4 + (lane >> 3), stride = w.n_warps * 4; /* a multiple of 8: all of its chunks lie alike */
    const struct many_ring ring = {rows + token,
                                   x + token * X_ROW + ((lane ^ token) & 7) * 16,
                                   own + lane * 16,
                                   headers + lane * 16,
                                   stages,
                                   lane,
                                   (w.n - token + stride - 1) / stride,
                                   stride,
                                   w.block < w.n_blocks};
    const struct many_next first = {
        w.w + lane * 16,
        (const uint8_t *)a.x + w.part * w.n_panels * (PANEL_K * 2) + (lane & 7) * 16, 0, 0,
        w.n_panels * PANEL_UNITS, 0};
    struct many_next next = first;
#pragma unroll 1
    for (int i = 0; i < ahead; i++) { /* weights do not depend on the kernels before */
        copy_weights<TYPE>(ring, next);
        advance<TYPE>(ring, next);
    }
    depend_wait(); /* at once, if it is not the first time */
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < w.n; i += (int)blockDim.x) rows[i] = row_of(a, w, i);
    __syncthreads();
    next = first;
#pragma unroll 1
    for (int i = 0; i < ahead; i++) {
        copy_activations<WIDTH>(ring, next);
        copy_commit(); /* the first group has all of the weights so far */
        advance<TYPE>(ring, next);
    }
    struct scaling c = scaling_of(a.segments[w.segment].scale, lane);
    float acc[NG][4] = {};
    wgmma_pin(acc);
    uint32_t matrix = swizzled_matrix(x);
    int slot = 0;
    depend_release(); /* the first units are under way */
#pragma unroll 1
    for (int i = 0; i < w.n_panels * PANEL_UNITS; i++) {
        int u = i % PANEL_UNITS;
        if (stages == 6) copy_wait<3>();
        else copy_wait<1>();
        matrix_fence(); /* what this thread copied, before the others' matrix units read it */
        __syncthreads();
        copy_weights<TYPE>(ring, next);
        copy_activations<WIDTH>(ring, next);
        copy_commit();
        advance<TYPE>(ring, next);
        if (u == 0 && f::header > 0) {
            unpack_scales<TYPE>(headers + (i / PANEL_UNITS & 1) * f::header, table, lane, c);
            __syncwarp();
        }
        h2 operands[4][4];
        wgmma_wait<0>(); /* the last unit's products: the operands are free */
        load_fragments<TYPE>(operands, own + slot * f::unit, table, u, lane);
        multiply<NG>(acc, operands, x, matrix, slot * WIDTH * X_ROW, lane);
        slot = slot == stages - 1 ? 0 : slot + 1;
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    copy_wait<0>();
    write_tile<NG>(a, w, w.first_row, (float *)shared, 8 * NG * w.n_warps * PANEL_ROWS, lane, acc);
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
    if (a.items && !a.listed) depend_wait();
    if (!find_work(a, WIDTH, warp_index(), w)) return;
    switch (a.segments[w.segment].type) {
    case PANEL_Q4_K: return many_groups<PANEL_Q4_K, WIDTH>(a, w, shared);
    case PANEL_Q5_K: return many_groups<PANEL_Q5_K, WIDTH>(a, w, shared);
    case PANEL_Q6_K: return many_groups<PANEL_Q6_K, WIDTH>(a, w, shared);
    case PANEL_Q8_0: return many_groups<PANEL_Q8_0, WIDTH>(a, w, shared);
    default: return many_groups<PANEL_F16, WIDTH>(a, w, shared);
    }
}

#endif
