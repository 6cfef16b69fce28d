/* gemm_dense: a dense matrix times many tokens, on Hopper. A block has 128 rows, up to 128 tokens and one or two parts of the
 * columns; the blocks of a tile's parts are a cluster, and read each other's sums from shared memory to add them in order. One warp
 * fetches: panels by bulk copies, the first of them while the kernels before still run, and activations by boxes of 64
 * columns, which come swizzled as wgmma reads them. Two fours of warps unpack and multiply. Few instructions are spent on
 * copies, and no barrier of the block holds up who multiplies.
 *
 * For one tile of tokens a block's ninth warp does nothing but fetch, and a block that has a processor to itself has most of its
 * activations under way at once: with few units, waiting for the next took half of the time. For a few tiles a block
 * has two parts, one after the other, and fewer tokens, if then every block has a processor: blocks of one part would come
 * two to a processor, as the kernel before leaves them, while others idle. For more tiles a processor has two blocks, and no
 * registers for such warps: the first one fetches between its products. */
#include "cuda/bulk.cuh"
#include "cuda/gemm.cuh"

enum : int {
    ROW_BLOCKS = 8,            /* a warp's each */
    ROWS = ROW_BLOCKS * PANEL_ROWS,
    THREADS = 32 * ROW_BLOCKS, /* that multiply */
    SUM_ROW = ROWS + 4,        /* floats of a token's sums */
    MOST_UNITS = 16,           /* in shared memory at a time: 64 columns of all tokens */
    MOST_PANELS = 4,           /* in shared memory at a time, of each row block */
    LEAST_PANELS = 2,          /* the last unit of one is given back after the first of the next has come */
    LEAST_UNITS = 3, ENOUGH_UNITS = 4, /* before panels get more room */
    RESERVED = 1024,           /* bytes of shared memory: of each block by the system, and arrivals */
    LEAST_TOKENS = 9,          /* fewer are faster with a block for all parts; */
    MOST_OF_TWO_PARTS = 512,   /* and more than this, if there are two parts */
    MOST_OWN = 2               /* parts of a block */
};

struct dense_args {
    struct gemm_args gemm;
    int units, panels; /* in shared memory at a time */
};

extern __shared__ __align__(1024) uint8_t shared_bytes[];

KERNEL_FN int unit_bytes(int n_groups) { return 8 * n_groups * X_ROW; }

#ifdef MOED_WGMMA

/* A block's place in the product, and its shared memory. */
struct dense_work {
    const struct gemm_segment *s;
    const uint8_t *w; /* first panel of its first row block and part */
    size_t block_bytes; /* from a row block to the next */
    int n_blocks, first_row, rank, n_ranks, n_panels, first, n; /* n_ranks: blocks of the cluster; n_panels: of the block */
    uint8_t *x, *panels, *table;
    float *sums[MOST_OWN]; /* of its parts */
    arrival *x_here, *x_free, *w_here;
};

template <int NG, int OWN> static DEVICE struct dense_work find_dense(const struct dense_args &d) {
    const struct gemm_args &a = d.gemm;
    struct dense_work w;
    int segment = 0, tile = (int)blockIdx.y;
    w.n_ranks = (1 << a.parts_shift) / OWN;
    w.rank = (int)blockIdx.x & (w.n_ranks - 1);
    w.first = (int)blockIdx.x / w.n_ranks * 8 * NG;
    w.n = min(8 * NG, *a.n_tokens - w.first);
    while (segment + 1 < a.n_segments && tile >= a.segments[segment + 1].first_tile) segment++;
    w.s = &a.segments[segment];
    tile -= w.s->first_tile;
    int bytes = panel_bytes(w.s->type), n_panels = a.n_cols / PANEL_K;
    w.n_panels = n_panels / w.n_ranks;
    w.block_bytes = (size_t)n_panels * (size_t)bytes;
    w.n_blocks = min((w.s->n_rows + PANEL_ROWS - 1) / PANEL_ROWS - tile * ROW_BLOCKS, (int)ROW_BLOCKS);
    w.first_row = tile * ROWS;
    w.w = w.s->w + (size_t)tile * ROW_BLOCKS * w.block_bytes + (size_t)(w.rank * w.n_panels) * (size_t)bytes;
    w.x = shared_bytes;
    w.panels = w.x + d.units * unit_bytes(NG);
    w.table = w.panels + d.panels * ROW_BLOCKS * bytes;
    for (int i = 0; i < OWN - 1; i++) w.sums[i] = (float *)(w.table + ROW_BLOCKS * TABLE_BYTES);
    w.sums[OWN - 1] = (float *)shared_bytes; /* when nothing else is there any more */
    return w;
}

/* What the first warp fetches: panel p of the part, for all row blocks; */
static DEVICE void fetch_panel(const struct dense_work &w, int p, int place, int lane) {
    int bytes = panel_bytes(w.s->type);
    if (lane == 0) arrive_expecting(&w.w_here[place], w.n_blocks * bytes);
    __syncwarp();
    if (lane < w.n_blocks)
        copy_bulk(w.panels + (place * ROW_BLOCKS + lane) * bytes, w.w + (size_t)lane * w.block_bytes + (size_t)(p * bytes), bytes,
                  &w.w_here[place]);
}
/* unit i of the part, of all tokens. */
template <int NG>
static DEVICE void fetch_unit(const struct dense_work &w, const CUtensorMap *x, int i, int place, int lane) {
    if (lane != 0) return;
    arrive_expecting(&w.x_here[place], unit_bytes(NG));
    copy_box(w.x + place * unit_bytes(NG), x, (w.rank * w.n_panels * PANEL_UNITS + i) * PANEL_UNIT_K, w.first, &w.x_here[place]);
}

/* What the kernels before need not have ended for, and the first units. Returns how many. */
template <int NG>
static DEVICE int fetch_first(const struct dense_args &d, const struct dense_work &w, const CUtensorMap *x, int lane) {
    int n = min(d.units, w.n_panels * PANEL_UNITS);
    touch_map(x);
    for (int p = 0; p < min(d.panels, w.n_panels); p++) fetch_panel(w, p, p, lane);
    depend_wait();
    for (int i = 0; i < n; i++) fetch_unit<NG>(w, x, i, i, lane);
    depend_release(); /* the first units are under way */
    return n;
}

/* Unit i, where unit i - d.units was, once that is behind all warps; with the last unit of a panel, its place is free too. */
template <int NG>
static DEVICE void fetch_next(const struct dense_args &d, const struct dense_work &w, const CUtensorMap *x, int i, int place,
                              uint32_t parity, int &panel_place, int lane) {
    int done = i - d.units, p = done / PANEL_UNITS + d.panels;
    arrival_wait(&w.x_free[place], parity);
    if (done % PANEL_UNITS == PANEL_UNITS - 1) {
        if (p < w.n_panels) fetch_panel(w, p, panel_place, lane);
        panel_place = panel_place == d.panels - 1 ? 0 : panel_place + 1;
    }
    fetch_unit<NG>(w, x, i, place, lane);
}

/* The warp's row block, times the tokens. */
template <int NG> static DEVICE void put_sums(const float (&acc)[NG][4], float *sums, int lane, int warp) {
    float *own = sums + 2 * (lane & 3) * SUM_ROW + warp * PANEL_ROWS + (lane >> 2);
#pragma unroll
    for (int n = 0; n < NG; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) own[(8 * n + (j & 1)) * SUM_ROW + 8 * (j >> 1)] = acc[n][j];
}

/* acc = the warp's row block times the tokens, of the last part; those before are in w.sums. */
template <int TYPE, int NG, int OWN, bool FETCHES>
static DEVICE void multiply_parts(const struct dense_args &d, const struct dense_work &w, const CUtensorMap *x,
                                  float (&acc)[NG][4]) {
    using f = format<TYPE>;
    int lane = (int)threadIdx.x & 31, warp = warp_index();
    uint8_t *table = w.table + warp * TABLE_BYTES;
    struct scaling c = scaling_of(w.s->scale, lane);
    uint32_t matrix = swizzled_matrix(w.x);
    int place = 0, panel_place = 0, last = 0, free_panel = 0; /* last: behind this warp */
    uint32_t parity = 0, panel_parity = 0, last_parity = 0;
    h2 operands[2][4][4];
    wgmma_pin(acc);
#pragma unroll 1
    for (int p = 0; p < w.n_panels; p++) {
        if (OWN == 2 && 2 * p == w.n_panels) {
            wgmma_wait<0>();
            wgmma_pin(acc);
            put_sums(acc, w.sums[0], lane, warp);
#pragma unroll
            for (int n = 0; n < NG; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
            wgmma_pin(acc);
        }
        const uint8_t *panel = w.panels + (panel_place * ROW_BLOCKS + warp) * f::bytes;
        arrival_wait(&w.w_here[panel_place], panel_parity);
        unpack_scales<TYPE>(panel, table, lane, c);
        __syncwarp();
#pragma unroll
        for (int u = 0; u < PANEL_UNITS; u++) {
            load_fragments<TYPE>(operands[u & 1], panel + f::header + u * f::unit, table, u, lane);
            arrival_wait(&w.x_here[place], parity);
            multiply<NG>(acc, operands[u & 1], w.x, matrix, place * unit_bytes(NG), lane);
            wgmma_wait<1>(); /* the unit before: its operands are free, and its place */
            if (u > 0 || p > 0) {
                if (lane == 0) arrive(&w.x_free[last]);
                int next = PANEL_UNITS * p + u - 1 + d.units;
                if (FETCHES && warp == 0 && next < PANEL_UNITS * w.n_panels)
                    fetch_next<NG>(d, w, x, next, last, last_parity, free_panel, lane);
            }
            last = place, last_parity = parity;
            if (++place == d.units) place = 0, parity ^= 1;
        }
        __syncwarp();
        if (++panel_place == d.panels) panel_place = 0, panel_parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
}

template <int NG, int OWN, bool FETCHES>
static DEVICE void multiply_type(const struct dense_args &d, const struct dense_work &w, const CUtensorMap *x,
                                 float (&acc)[NG][4]) {
    switch (w.s->type) {
    case PANEL_Q4_K: return multiply_parts<PANEL_Q4_K, NG, OWN, FETCHES>(d, w, x, acc);
    case PANEL_Q5_K: return multiply_parts<PANEL_Q5_K, NG, OWN, FETCHES>(d, w, x, acc);
    case PANEL_Q6_K: return multiply_parts<PANEL_Q6_K, NG, OWN, FETCHES>(d, w, x, acc);
    case PANEL_Q8_0: return multiply_parts<PANEL_Q8_0, NG, OWN, FETCHES>(d, w, x, acc);
    default: return multiply_parts<PANEL_F16, NG, OWN, FETCHES>(d, w, x, acc);
    }
}

/* The parts' sums, in order: each block of the cluster takes some of the tokens, a thread four rows of them. */
template <int OWN> static DEVICE void add_tile(const struct gemm_args &a, const struct dense_work &w) {
    constexpr int quads = ROWS / 4, at_once = 2, most_parts = 4;
    int row = (int)threadIdx.x % quads * 4, step = THREADS / quads * w.n_ranks, n_rows = w.s->n_rows;
    int n_parts = OWN * w.n_ranks;
    bool adds = a.epilogue == GEMM_ADD_F32;
    if (w.first_row + row >= n_rows) return;
    float scale = w.s->scale;
#pragma unroll 1
    for (int first = w.rank + w.n_ranks * ((int)threadIdx.x / quads); first < w.n; first += at_once * step) {
        float4 v[at_once][most_parts], old[at_once];
        size_t to[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++) { /* one twice rather than a branch: all loads are to be under way */
            int token = first + i * step < w.n ? first + i * step : first;
            to[i] = (size_t)(w.first + token) * (size_t)n_rows + (size_t)(w.first_row + row);
            old[i] = adds ? *(const float4 *)((const float *)w.s->out + to[i]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int p = 0; p < most_parts; p++)
                if (p < n_parts) v[i][p] = load_cluster(w.sums[p % OWN] + token * SUM_ROW + row, p / OWN);
        }
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            float4 t = v[i][0];
#pragma unroll
            for (int p = 1; p < most_parts; p++)
                if (p < n_parts) t.x += v[i][p].x, t.y += v[i][p].y, t.z += v[i][p].z, t.w += v[i][p].w;
            t = make_float4(t.x * scale, t.y * scale, t.z * scale, t.w * scale);
            if (i > 0 && first + i * step >= w.n) break;
            if (a.epilogue == GEMM_STORE_F16)
                *(uint2 *)((uint16_t *)w.s->out + to[i]) = make_uint2(h2_pack(t.x, t.y), h2_pack(t.z, t.w));
            else
                *(float4 *)((float *)w.s->out + to[i]) =
                    adds ? make_float4(old[i].x + t.x, old[i].y + t.y, old[i].z + t.z, old[i].w + t.w) : t;
        }
    }
}

template <int NG, int OWN, bool FETCHES> static DEVICE void dense_block(const CUtensorMap *x, const struct dense_args &d) {
    __shared__ arrival x_here[MOST_UNITS], x_free[MOST_UNITS], w_here[MOST_PANELS];
    struct dense_work w = find_dense<NG, OWN>(d);
    if (w.n <= 0) return; /* and so the whole cluster */
    w.x_here = x_here, w.x_free = x_free, w.w_here = w_here;
    int lane = (int)threadIdx.x & 31, warp = warp_index();
    if (threadIdx.x == 0) {
        for (int i = 0; i < d.units; i++) arrival_init(&x_here[i], 1), arrival_init(&x_free[i], ROW_BLOCKS);
        for (int i = 0; i < d.panels; i++) arrival_init(&w_here[i], 1);
        arrivals_ready();
    }
    __syncthreads();
    if (FETCHES && warp == 0) fetch_first<NG>(d, w, x, lane);
    if (warp == ROW_BLOCKS) {
        int n = fetch_first<NG>(d, w, x, lane), place = 0, panel_place = 0;
        uint32_t parity = 0;
        for (int i = n; i < w.n_panels * PANEL_UNITS; i++) {
            fetch_next<NG>(d, w, x, i, place, parity, panel_place, lane);
            if (++place == d.units) place = 0, parity ^= 1;
        }
        return;
    }
    float acc[NG][4] = {};
    multiply_type<NG, OWN, FETCHES>(d, w, x, acc);
    meet_threads(THREADS); /* nobody multiplies any more: the sums may lie where activations and panels were */
    put_sums(acc, w.sums[OWN - 1], lane, warp);
    depend_wait(); /* what is added to, or written, is of kernels before */
    if (w.n_ranks > 1) meet_cluster();
    else meet_threads(THREADS);
    add_tile<OWN>(d.gemm, w);
    if (w.n_ranks > 1) leave_cluster(); /* others may still read this block's sums */
}

#define DENSE_BLOCK(NG, OWN, FETCHES, x, d) dense_block<NG, OWN, FETCHES>(&(x), d)
#else
#define DENSE_BLOCK(NG, OWN, FETCHES, x, d) __trap()
#endif

static __global__ void __launch_bounds__(THREADS + 32, 2)
    k_gemm_dense32_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(4, 1, false, x, d);
}
static __global__ void __launch_bounds__(THREADS + 32, 2)
    k_gemm_dense64_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(8, 1, false, x, d);
}
static __global__ void __launch_bounds__(THREADS + 32, 1)
    k_gemm_dense128_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(16, 1, false, x, d);
}
static __global__ void __launch_bounds__(THREADS + 32, 2)
    k_gemm_dense64_own2_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(8, 2, false, x, d);
}
static __global__ void __launch_bounds__(THREADS + 32, 1)
    k_gemm_dense88_own2_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(11, 2, false, x, d);
}
static __global__ void __launch_bounds__(THREADS, 2)
    k_gemm_dense128_twice_f16(const __grid_constant__ CUtensorMap x, const __grid_constant__ struct dense_args d) {
    DENSE_BLOCK(16, 1, true, x, d);
}

/* ---- launching ------------------------------------------------------------------------------------------------- */

typedef void dense_kernel(const CUtensorMap, const struct dense_args);
static const struct dense_kind {
    int n_tokens, own; /* of a tile; parts of a block */
    bool halves;       /* a processor can have two blocks */
    int threads;
    dense_kernel *kernel;
} kinds[] = {/* for one tile of tokens; */
             {32, 1, true, THREADS + 32, k_gemm_dense32_f16},
             {64, 1, true, THREADS + 32, k_gemm_dense64_f16},
             {128, 1, false, THREADS + 32, k_gemm_dense128_f16},
             /* for several, if no processor needs two blocks (88: a third of 256, and few tokens that are none); */
             {64, 2, false, THREADS + 32, k_gemm_dense64_own2_f16},
             {88, 2, false, THREADS + 32, k_gemm_dense88_own2_f16},
             /* for more */
             {128, 1, true, THREADS, k_gemm_dense128_twice_f16}};

/* Blocks along the rows. Fills first_tile. */
static unsigned count_row_tiles(struct gemm_args &a) {
    int n = 0;
    for (int i = 0; i < a.n_segments; i++) {
        a.segments[i].first_tile = n;
        n += (a.segments[i].n_rows + ROWS - 1) / ROWS;
    }
    return (unsigned)n;
}

static unsigned tiles_of(int bucket, const struct dense_kind &k) { return (unsigned)((bucket + k.n_tokens - 1) / k.n_tokens); }

/* How much of x and w is in shared memory at a time. */
static size_t fill_shared(struct dense_args &d, const struct dense_kind &k, bool alone, const struct cuda_queue *q) {
    const struct gemm_args &a = d.gemm;
    int bytes = 0, n_panels = (a.n_cols / PANEL_K >> a.parts_shift) * k.own, unit = unit_bytes(k.n_tokens / 8);
    for (int i = 0; i < a.n_segments; i++)
        if (panel_bytes(a.segments[i].type) > bytes) bytes = panel_bytes(a.segments[i].type);
    int sums = (int)sizeof(float) * k.n_tokens * SUM_ROW;
    int whole = (int)q->max_shared - RESERVED, half = whole / 2 - RESERVED;
    int fixed = ROW_BLOCKS * TABLE_BYTES + (k.own - 1) * sums, panel = ROW_BLOCKS * bytes;
    int least = fixed + LEAST_PANELS * panel + LEAST_UNITS * unit;
    int room = !k.halves || alone || half < least ? whole : half;
    room -= fixed;
    d.panels = n_panels < MOST_PANELS ? n_panels : (int)MOST_PANELS;
    while (d.panels > LEAST_PANELS && d.panels * panel + ENOUGH_UNITS * unit > room) d.panels--;
    d.units = (room - d.panels * panel) / unit;
    if (d.units > MOST_UNITS) d.units = MOST_UNITS;
    if (d.units > d.panels * PANEL_UNITS) d.units = d.panels * PANEL_UNITS;
    int n = d.panels * panel + d.units * unit;
    return (size_t)(fixed + (n > sums ? n : sums));
}

int dense_plan(const struct gemm_args &args, int bucket, const struct cuda_queue *q) {
    struct gemm_args a = args;
    if (!q->encode_map || bucket < LEAST_TOKENS || (a.parts_shift == 1 && bucket > MOST_OF_TWO_PARTS)) return -1;
    for (int i = 0; i < a.n_segments; i++)
        if (a.segments[i].n_rows % 4 != 0) return -1;
    unsigned row_tiles = count_row_tiles(a);
    int n = (int)(sizeof kinds / sizeof *kinds), i = 0;
    for (; i < n - 1; i++) {
        const struct dense_kind &k = kinds[i];
        if (k.own == 1 && bucket <= k.n_tokens) break;
        if (k.own > 1 && a.parts_shift > 0 &&
            (tiles_of(bucket, k) * row_tiles << a.parts_shift) / (unsigned)k.own <= (unsigned)q->n_sm) break;
    }
    return i;
}

cudaError_t dense_launch(const struct gemm_args &a, int kind, int bucket, const struct cuda_queue *q) {
    CUtensorMap map;
    struct dense_args d = {a, 0, 0};
    const struct dense_kind &k = kinds[kind];
    unsigned n_tokens = (unsigned)k.n_tokens, token_tiles = tiles_of(bucket, k);
    unsigned row_tiles = count_row_tiles(d.gemm), ranks = (1u << a.parts_shift) / (unsigned)k.own;
    bool alone = token_tiles == 1 && ranks * row_tiles <= (unsigned)q->n_sm; /* a block has a processor */
    size_t shared = fill_shared(d, k, alone, q);
    const cuuint64_t size[2] = {(cuuint64_t)a.n_cols, (cuuint64_t)bucket}, row[1] = {(cuuint64_t)a.n_cols * 2};
    const cuuint32_t box[2] = {PANEL_UNIT_K, n_tokens}, one[2] = {1, 1};
    CUresult r = ((decltype(&cuTensorMapEncodeTiled))q->encode_map)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void *)a.x, size, row, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {ranks, 1, 1};
    config.gridDim = dim3(token_tiles * ranks, row_tiles, 1);
    config.blockDim = dim3((unsigned)k.threads, 1, 1);
    config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)q->stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, k.kernel, map, d);
}

cudaError_t dense_prepare(size_t max_shared) {
    cudaError_t e = cudaSuccess;
    for (const auto &k : kinds)
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute((const void *)k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)max_shared - RESERVED);
    return e;
}
