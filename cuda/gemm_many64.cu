/* gemm_many64: tiles of up to 64 tokens. */
#include "cuda/gemm_many.cuh"

extern __shared__ __align__(1024) uint8_t shared_bytes[];

static __global__ void __launch_bounds__(32 * MAX_WARPS, 1)
    k_gemm_many64_f16(const __grid_constant__ struct gemm_args a) {
    many_block<64>(a, shared_bytes);
}

extern const struct gemm_kernel gemm_many64 = {64, MAX_WARPS, 4, k_gemm_many64_f16, many_shared<64>};
