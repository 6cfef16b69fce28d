/* gemm: chooses a kernel and a grid for a product. The choice follows the bucket; results do not depend on it. */
#include "cuda/gemm.cuh"

static const struct gemm_kernel *const kernels[N_WIDTHS] = {&gemm_few8, &gemm_few16, &gemm_few32,
                                                            &gemm_many64, &gemm_many128};

static size_t shared_bytes_of(const struct gemm_args &a, int width, int warps) {
    size_t most = 0;
    for (int i = 0; i < a.n_segments; i++) {
        size_t n = kernels[width]->shared(a.segments[i].type, warps, gemm_parts(a.n_cols));
        if (n > most) most = n;
    }
    return most;
}

/* Blocks along the rows. Fills first_tile. */
static int count_tiles(struct gemm_args &a, int warps, int n_tiles) {
    bool silu = a.epilogue == GEMM_SILU_F16;
    int n = 0, rows = n_tiles * (warps / gemm_parts(a.n_cols) * PANEL_ROWS / (silu ? 2 : 1));
    for (int i = 0; i < (silu ? 1 : a.n_segments); i++) {
        a.segments[i].first_tile = n;
        n += (a.segments[i].n_rows + rows - 1) / rows;
    }
    return n;
}

static int blocks_of(struct gemm_args &a, int width, int warps, int bucket) {
    int tokens = kernels[width]->width;
    return (bucket + tokens - 1) / tokens * count_tiles(a, warps, 1);
}

static bool is_few(int width) { return kernels[width]->width <= 32; }

static bool fits(const struct gemm_args &a, struct gemm_plan p, const struct cuda_queue *q) {
    return shared_bytes_of(a, p.width, p.warps) <= q->max_shared;
}

/* The fewest warps that make sense: a row block for every part (and of gate and of up), and all that multiply
 * together. */
static int least_warps(const struct gemm_args &a, int width) {
    int n = a.epilogue == GEMM_SILU_F16 ? 2 : 1, least = kernels[width]->least_warps;
    return gemm_parts(a.n_cols) * (n > least ? n : least);
}

/* Dense: wide tiles where whole blocks of them leave few processors without one; else few tokens to a block, and as few
 * rows as it takes. */
static struct gemm_plan plan_dense(struct gemm_args &a, int bucket, const struct cuda_queue *q) {
    struct gemm_plan p = {N_WIDTHS - 1, 0, 1};
    while (p.width > 0 && kernels[p.width - 1]->width >= bucket) p.width--;
    for (;; p.width--) {
        int least = least_warps(a, p.width);
        p.warps = kernels[p.width]->most_warps;
        if (!is_few(p.width)) {
            if (fits(a, p, q) && blocks_of(a, p.width, p.warps, bucket) * 4 >= q->n_sm * 3) return p;
            continue;
        }
        while (p.warps > least && (!fits(a, p, q) || blocks_of(a, p.width, p.warps, bucket) * 4 < q->n_sm * 3))
            p.warps /= 2;
        if (p.width == 0 || blocks_of(a, p.width, p.warps, bucket) * 4 >= q->n_sm) return p;
    }
}

/* Experts: tiles that hold most groups whole; few panels to a row are made one stream with those of the next rows. */
static struct gemm_plan plan_experts(struct gemm_args &a, int bucket, int n_experts, int n_used,
                                     const struct cuda_queue *q) {
    static const int most[N_WIDTHS - 1] = {6, 12, 26, 56}; /* mean group, with room for its spread */
    struct gemm_plan p = {0, 0, 1};
    while (p.width < N_WIDTHS - 1 && bucket * n_used > most[p.width] * n_experts) p.width++;
    if (bucket <= 8) p.width = 0; /* no group can be larger */
    for (;; p.width--) {
        int least = least_warps(a, p.width);
        p.warps = bucket == 1 ? least : kernels[p.width]->most_warps;
        while (p.warps > least && !fits(a, p, q)) p.warps /= 2;
        if (p.width == 0 || fits(a, p, q)) break;
    }
    int n_panels = a.n_cols / PANEL_K / gemm_parts(a.n_cols);
    if (is_few(p.width) && bucket > 1) p.tiles = n_panels < 8 ? 8 / n_panels : 1;
    return p;
}

struct gemm_plan cuda_gemm_plan(const struct gemm_args *args, int bucket, int n_experts, int n_used,
                                const struct cuda_queue *q) {
    struct gemm_args a = *args;
    return n_experts > 0 ? plan_experts(a, bucket, n_experts, n_used, q) : plan_dense(a, bucket, q);
}

cudaError_t cuda_gemm(const struct gemm_args *args, struct gemm_plan p, int bucket, int max_items,
                      const struct cuda_queue *q) {
    struct gemm_args a = *args;
    a.n_tiles = p.tiles;
    for (a.warps_shift = 0; 1 << a.warps_shift < p.warps;) a.warps_shift++;
    unsigned tiles = (unsigned)count_tiles(a, p.warps, p.tiles);
    unsigned width = (unsigned)kernels[p.width]->width;
    dim3 grid = a.items ? dim3(tiles, (unsigned)max_items, 1)
                        : dim3(((unsigned)bucket + width - 1) / width, tiles, 1);
    return launch(kernels[p.width]->kernel, grid, 32 * p.warps, shared_bytes_of(a, p.width, p.warps), q, a);
}

static cudaError_t gemm_prepare(size_t max_shared) {
    for (const struct gemm_kernel *k : kernels) {
        cudaError_t e = cudaFuncSetAttribute((const void *)k->kernel,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

cudaError_t cuda_kernels_prepare(const struct cuda_queue *q) {
    cudaError_t (*const sized[])(size_t) = {gemm_prepare, attn_prepare, route_prepare};
    cudaError_t (*const plain[])(void) = {load_prepare, norm_prepare, rope_prepare, sample_prepare, exchange_prepare};
    for (auto f : sized) {
        cudaError_t e = f(q->max_shared);
        if (e != cudaSuccess) return e;
    }
    for (auto f : plain) {
        cudaError_t e = f();
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}
