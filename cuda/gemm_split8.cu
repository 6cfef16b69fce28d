/* gemm_split8: tiles of 32 rows and up to 8 tokens. */
#include "cuda/gemm_split.cuh"

extern __shared__ __align__(16) uint8_t shared_bytes[];

static __global__ void __launch_bounds__(128, 4)
    k_gemm_split8_f16(const __grid_constant__ struct gemm_args a) {
    split_block<2, 1, 2>(a, shared_bytes);
}

cudaError_t gemm_split8(const struct gemm_args &a, dim3 grid, size_t shared,
                         const struct cuda_queue *q) {
    int n_parts = gemm_parts(a.n_cols / PANEL_K);
    return launch(k_gemm_split8_f16, grid, 32 * n_parts, shared, q, a);
}

cudaError_t gemm_split8_prepare(size_t max_shared) {
    return cudaFuncSetAttribute(k_gemm_split8_f16, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)max_shared);
}
