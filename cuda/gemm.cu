/* gemm: chooses an instance and a grid for a product. The choice follows the bucket; results do not depend on it. */
#include "cuda/gemm.cuh"

static size_t split_shared(int type, int parts, int mt, int nt, int depth) {
    if (type == PANEL_Q8_0 || type == PANEL_F16) depth = 1;
    return (size_t)parts * (size_t)(depth * (mt * panel_bytes(type) + PANEL_UNITS * nt * 1024) +
                                    mt * TABLE_BYTES);
}

static size_t shared_bytes_of(const struct gemm_args &a, int width) {
    size_t most = 0;
    int parts = gemm_parts(a.n_cols / PANEL_K);
    for (int i = 0; i < a.n_segments; i++) {
        int type = a.segments[i].type;
        size_t n = width == 8    ? split_shared(type, parts, 2, 1, 2)
                   : width == 16 ? split_shared(type, parts, 4, 2, 1)
                   : width == 32 ? split_shared(type, parts, 4, 4, 1)
                                 : (size_t)(32 * 1024 + 16 * (panel_bytes(type) + TABLE_BYTES));
        if (n > most) most = n;
    }
    return most;
}

static int rows_of_tile(const struct gemm_args &a, int width) {
    int rows = width == 8 ? 32 : width == 64 ? 256 : 64;
    return a.epilogue == GEMM_SILU_F16 ? rows / 2 : rows;
}

/* Fills first_tile. */
static int count_tiles(struct gemm_args &a, int rows) {
    int n = 0, n_segments = a.epilogue == GEMM_SILU_F16 ? 1 : a.n_segments;
    for (int i = 0; i < n_segments; i++) {
        a.segments[i].first_tile = n;
        n += (a.segments[i].n_rows + rows - 1) / rows;
    }
    return n;
}

int cuda_gemm_width(const struct gemm_args *args, int bucket, int n_experts, int n_used,
                    const struct cuda_queue *q) {
    struct gemm_args a = *args;
    int width = 64;
    if (bucket <= 8) {
        width = 8;
    } else if (bucket <= 16) {
        width = 16;
    } else if (n_experts > 0) {
        /* The wide kernel unpacks a weight once for more tokens, the narrow one has more of them in flight. */
        int mean = bucket * n_used / n_experts;
        width = mean <= 8 ? 16 : mean <= 24 ? 32 : 64;
    } else {
        /* The tile kernel wants at least half of the processors busy. */
        int blocks = (bucket + 63) / 64 * count_tiles(a, rows_of_tile(a, 64));
        if (bucket <= 32 || blocks < q->n_sm / 2) width = 32;
    }
    while (width > 8 && shared_bytes_of(a, width) > q->max_shared) width /= 2;
    return width;
}

cudaError_t cuda_gemm(const struct gemm_args *args, int width, int bucket, int max_items,
                      const struct cuda_queue *q) {
    struct gemm_args a = *args;
    unsigned tiles = (unsigned)count_tiles(a, rows_of_tile(a, width));
    dim3 grid = a.items ? dim3(tiles, (unsigned)max_items, 1)
                        : dim3((unsigned)((bucket + width - 1) / width), tiles, 1);
    size_t shared = shared_bytes_of(a, width);
    switch (width) {
    case 8: return gemm_split8(a, grid, shared, q);
    case 16: return gemm_split16(a, grid, shared, q);
    case 32: return gemm_split32(a, grid, shared, q);
    default: return gemm_tile64(a, grid, shared, q);
    }
}

cudaError_t cuda_kernels_prepare(const struct cuda_queue *q) {
    cudaError_t (*const sized[])(size_t) = {gemm_split8_prepare, gemm_split16_prepare,
                                            gemm_split32_prepare, gemm_tile64_prepare,
                                            route_prepare};
    cudaError_t (*const plain[])(void) = {load_prepare, norm_prepare, rope_prepare, attn_prepare, sample_prepare};
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
