/* common: the machine instructions the kernels are made of, each behind a function with a plain meaning, and
 * the launch helper. Everything that is not ordinary CUDA C stands here and nowhere else.
 *
 * Packed halves travel as uint32_t (h2): low half first. Bit-equal results across kernels rest on two things:
 * this directory is compiled with -fmad=false, so that a * b + c fuses only where fmaf is written, and
 * functions that two kernels must agree on are written once. */
#ifndef MOED_CUDA_COMMON_CUH
#define MOED_CUDA_COMMON_CUH

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "cuda/kernels.h"

#define DEVICE __device__ __forceinline__

typedef uint32_t h2;

enum : uint32_t { ALL_LANES = 0xffffffffu };

/* ---- packed halves ---------------------------------------------------------------------------- */

DEVICE h2 h2_fma(h2 a, h2 b, h2 c) {
    h2 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE h2 h2_mul(h2 a, h2 b) {
    h2 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE h2 h2_add(h2 a, h2 b) {
    h2 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
/* Both halves = the low (high) half of a; folds into the operand of the instruction that uses it. */
DEVICE h2 h2_low(h2 a) {
    h2 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(a));
    return d;
}
DEVICE h2 h2_high(h2 a) {
    h2 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(a));
    return d;
}
/* To nearest; finite values beyond f16's range saturate at 65504 instead of becoming infinite. */
DEVICE h2 h2_pack(float low, float high) {
    low = low > 65504.0f ? 65504.0f : low < -65504.0f ? -65504.0f : low; /* NaN passes */
    high = high > 65504.0f ? 65504.0f : high < -65504.0f ? -65504.0f : high;
    h2 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE float h2_low_f32(h2 a) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(a));
    return f;
}
DEVICE float h2_high_f32(h2 a) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(a));
    return f;
}

/* Bytes picked from the eight of (b, a): selector nibble i names byte i of the result, a's are 0 … 3. */
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

/* 2^x. */
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- matrix units ------------------------------------------------------------------------------- */

/* d[16][8] += a[16][16] * b[16][8]; fragments as the PTX manual has them for mma.m16n8k16. */
DEVICE void mma_f16(float (&d)[4], const h2 (&a)[4], h2 b0, h2 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* An 8 x 8 matrix of halves across the warp, lane 4 g + t holding row g, columns 2 t and 2 t + 1: transposed. */
DEVICE h2 transpose_8x8(h2 a) {
    h2 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

/* ---- asynchronous copies into shared memory ------------------------------------------------------- */

/* 16 bytes, past L1; if !ok, zeros, and src is not read. */
DEVICE void copy16(void *shared_dst, const void *src, bool ok) {
    uint32_t dst = (uint32_t)__cvta_generic_to_shared(shared_dst);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "r"(ok ? 16 : 0)
                 : "memory");
}
DEVICE void copy16(void *shared_dst, const void *src) {
    uint32_t dst = (uint32_t)__cvta_generic_to_shared(shared_dst);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most PENDING of this thread's groups are unfinished. */
template <int PENDING> DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* ---- dependent launches ---------------------------------------------------------------------------- */

/* A kernel may be started before its predecessor in the stream has finished. It must call depend_wait before it
 * reads what a predecessor wrote and before it writes anything at all; weights may be read earlier. Since every
 * kernel waits, waiting for one predecessor waits for all. */
DEVICE void depend_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void depend_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- reductions: the same bits in every lane, in a fixed order -------------------------------------- */

DEVICE float warp_sum(float x) {
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}
DEVICE float warp_max(float x) {
    for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, i));
    return x;
}
DEVICE int warp_sum(int x) {
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}

/* ---- blocks that finish last ------------------------------------------------------------------------ */

/* Thread 0, after a barrier of the block: whether this block is the last of n to come here. The last one's threads see,
 * after another barrier, what all the others wrote before theirs. *ticket is zero before and after. */
DEVICE bool draw_last(uint32_t *ticket, int n) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
    if (before != (uint32_t)n - 1u) return false;
    *ticket = 0;
    return true;
}

/* ---- launching -------------------------------------------------------------------------------------- */

#ifdef __CUDACC__
template <typename... P, typename... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, int block, size_t shared,
                          const struct cuda_queue *q, A... args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)block, 1, 1);
    config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)q->stream;
    config.attrs = &attribute;
    config.numAttrs = q->dependent ? 1u : 0u;
    return cudaLaunchKernelEx(&config, kernel, P(args)...);
}
#endif

/* Per file: load its kernels (the driver would do it at their first launch, which must not allocate) and let
 * them have the shared memory they may ask for. */
cudaError_t load_prepare(void);
cudaError_t rope_prepare(void);
cudaError_t attn_prepare(void);
cudaError_t sample_prepare(void);
cudaError_t norm_prepare(void);
cudaError_t route_prepare(size_t max_shared);

#endif
