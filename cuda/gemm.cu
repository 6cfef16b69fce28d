/* gemm: chooses a kernel and a grid for a product. The choice follows the bucket; results do not depend on it. */
#include "cuda/gemm.cuh"

static const struct gemm_kernel *const kernels[N_WIDTHS] = {&gemm_few8, &gemm_few16, &gemm_few32,
                                                            &gemm_many64, &gemm_many128};

static int parts_of(const struct gemm_args &a) { return 1 << a.parts_shift; }

static size_t shared_bytes_of(const struct gemm_args &a, int width, int warps) {
    size_t most = 0;
    for (int i = 0; i < a.n_segments; i++) {
        size_t n = kernels[width]->shared(a.segments[i].type, warps, parts_of(a));
        if (n > most) most = n;
    }
    return most;
}

/* Blocks along the rows. Fills first_tile. */
static int count_tiles(struct gemm_args &a, int warps, int n_tiles) {
    bool silu = a.epilogue == GEMM_SILU_F16;
    int n = 0, rows = n_tiles * (warps / parts_of(a) * PANEL_ROWS / (silu ? 2 : 1));
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
    return parts_of(a) * (n > least ? n : least);
}

enum : int { MANY_ROWS = 8192 };

/* The parts of the columns. The order of sums rests on them, so the matrix decides (and the card), never the step. Dense matrices
 * other than the head have too few rows to give every processor its warps, so warps share the columns. Of experts there
 * are many; theirs have two parts where one chain of sums would be the longest wait of a small step. */
static void set_parts(struct gemm_args &a, bool dense, const struct cuda_queue *q) {
    int n_rows = 0, n_panels = a.n_cols / PANEL_K;
    for (int i = 0; i < a.n_segments; i++) n_rows += a.segments[i].n_rows;
    bool narrow = dense && n_rows < MANY_ROWS;
    int most = narrow ? 2 : 1, least_panels = narrow ? 4 : 8;
    a.parts_shift = 0;
    while (a.parts_shift < most && n_panels >= least_panels << (a.parts_shift + 1) && n_panels % (2 << a.parts_shift) == 0)
        a.parts_shift++;
    while (a.parts_shift > 0 && shared_bytes_of(a, 0, least_warps(a, 0)) > q->max_shared) a.parts_shift--;
}

/* Dense: the widest tiles whose blocks, if need be of fewer rows, are a quarter as many as processors or more; of few tokens, as
 * few rows as give nearly every processor a block. */
static struct gemm_plan plan_dense(struct gemm_args &a, int bucket, const struct cuda_queue *q) {
    struct gemm_plan p = {N_WIDTHS - 1, 0, 1, 0, false};
    while (p.width > 0 && kernels[p.width - 1]->width >= bucket) p.width--;
    for (;; p.width--) {
        bool few = is_few(p.width);
        int least = least_warps(a, p.width), most = kernels[p.width]->most_warps;
        if (least > most) continue;
        if (!few && least < most / 2) least = most / 2;
        p.warps = most;
        if (!few && !fits(a, p, q)) continue;
        while (p.warps > least && (!fits(a, p, q) || blocks_of(a, p.width, p.warps, bucket) * (few ? 4 : 5) < q->n_sm * 3))
            p.warps /= 2;
        if (p.width == 0 || blocks_of(a, p.width, p.warps, bucket) * 4 >= q->n_sm) return p;
    }
}

/* Experts: tiles that hold most groups whole. Few panels to a row are made one stream with those of the next rows; so are more,
 * where a processor has but two blocks: a fifth of a short one's time goes by before its first panel is there. Where
 * activations are few, blocks are small: processors end more evenly, and the kernels before and after find room sooner. */
static struct gemm_plan plan_experts(struct gemm_args &a, int bucket, int n_experts, int n_used,
                                     const struct cuda_queue *q) {
    static const int most[N_WIDTHS - 1] = {6, 12, 26, 56}; /* mean group, with room for its spread */
    struct gemm_plan p = {0, 0, 1, 0, false};
    while (p.width < N_WIDTHS - 1 && bucket * n_used > most[p.width] * n_experts) p.width++;
    if (bucket <= 8) p.width = 0; /* no group can be larger */
    for (;; p.width--) {
        int least = least_warps(a, p.width);
        p.warps = bucket == 1 ? least : kernels[p.width]->most_warps;
        if (p.warps > 4 && kernels[p.width]->width <= 16) p.warps = 4;
        while (p.warps > least && !fits(a, p, q)) p.warps /= 2;
        if (p.width == 0 || fits(a, p, q)) break;
    }
    int n_panels = a.n_cols / PANEL_K / parts_of(a);
    if (!is_few(p.width) || bucket == 1) return p;
    p.tiles = n_panels < 8 ? 8 / n_panels : kernels[p.width]->width == 32 ? 3 : 1;
    p.blocks = count_tiles(a, p.warps, p.tiles);
    return p;
}

struct gemm_plan cuda_gemm_plan(const struct gemm_args *args, int bucket, int n_experts, int n_used,
                                const struct cuda_queue *q) {
    struct gemm_args a = *args;
    set_parts(a, n_experts == 0, q);
    if (n_experts > 0) return plan_experts(a, bucket, n_experts, n_used, q);
    int width = dense_plan(a, bucket, q);
    return width >= 0 ? (struct gemm_plan){width, 0, 1, 0, true} : plan_dense(a, bucket, q);
}

cudaError_t cuda_gemm(const struct gemm_args *args, struct gemm_plan p, int bucket, int max_groups, int max_items,
                      const struct cuda_queue *q) {
    struct gemm_args a = *args;
    a.n_tiles = p.tiles;
    set_parts(a, !a.items, q);
    if (p.bulk) return dense_launch(a, p.width, bucket, q);
    for (a.warps_shift = 0; 1 << a.warps_shift < p.warps;) a.warps_shift++;
    for (int i = 0; i < a.n_segments; i++) {
        struct gemm_segment &s = a.segments[i];
        s.n_blocks = (s.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
        s.block_bytes = (uint32_t)(a.n_cols / PANEL_K * panel_bytes(s.type));
    }
    unsigned tiles = (unsigned)count_tiles(a, p.warps, p.tiles);
    unsigned width = (unsigned)kernels[p.width]->width, item_rows = (unsigned)max_items;
    a.single_items = max_items;
    if (p.blocks > 0) {
        unsigned at_once = tiles / ((tiles + SHARE - 1) / SHARE); /* items of a row of blocks */
        a.single_items = max_groups;
        item_rows = (unsigned)max_groups + ((unsigned)(max_items - max_groups) + at_once - 1) / at_once;
    }
    dim3 grid = a.items ? dim3(tiles, item_rows, 1)
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
    cudaError_t (*const sized[])(size_t) = {gemm_prepare, dense_prepare, attn_prepare, route_prepare};
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
