/* See cpu_kernels.h: the table for avx512. */
#include "moe/cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include "moe/cpu_attention.h"
#include "moe/cpu_dot.h"
#include "moe/cpu_vector.h"

/* By CPUID leaf 1: clang 14 does not know the name. */
static bool cpu_has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

static const struct cpu_kernels kernels = {
    .name = "avx512-vnni",
    .up_planes = 1,
    .max_tile = CPU_VECTOR_TILE,
    .dot = CPU_DOT_TABLE,
    .dot_float = CPU_DOT_FLOAT_TABLE,
    .rms_norm = k_rms_norm,
    .quantize = k_quantize,
    .quantize_row = k_quantize_row,
    .quantize_block = k_quantize_block,
    .gather = k_gather,
    .silu_mul = k_silu_mul,
    .add = k_add,
    .combine = k_combine,
    .rope = k_rope,
    .to_f16 = k_to_f16,
    .attend = k_attend,
    .largest = k_largest,
    .divide = k_divide,
};
#endif

const struct cpu_kernels *cpu_kernels_avx512(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && cpu_has_f16c())
        return &kernels;
#endif
    return NULL;
}
