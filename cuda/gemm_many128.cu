/* gemm_many128: tiles of up to 128 tokens. */
#include "cuda/gemm_many.cuh"

extern __shared__ __align__(1024) uint8_t shared_bytes[];

static __global__ void __launch_bounds__(32 * MAX_WARPS, 1)
    k_gemm_many128_f16(const __grid_constant__ struct gemm_args a) {
    many_block<128>(a, shared_bytes);
}

extern const struct gemm_kernel gemm_many128 = {128, MAX_WARPS, 4, k_gemm_many128_f16, many_shared<128>};
