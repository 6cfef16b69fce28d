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

/* x stays in its register: it is not computed again where it is needed. */
DEVICE void keep(uint32_t &x) { asm volatile("" : "+r"(x)); }
/* The thread's warp in its block. The compiler sees that it is the same in every lane, and computes what follows from it
 * once for all lanes. */
DEVICE int warp_index() { return __shfl_sync(ALL_LANES, (int)threadIdx.x >> 5, 0); }

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
/* Of values that f16 holds without saturating. */
DEVICE h2 h2_pack_small(float low, float high) {
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

/* Bytes picked from the eight of (b, a): selector nibble i names byte i of the result, a's are 0 … 3; 8 + n is zero if byte n
 * is less than 128. */
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

/* 2^x. */
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- matrix units ------------------------------------------------------------------------------- */

/* Four 8 x 8 matrices of halves from shared memory, transposed: lanes 8 i … 8 i + 7 name the rows of matrix i; d[i] of
 * lane 4 g + t is column g, rows 2 t and 2 t + 1. */
DEVICE void load_transposed(h2 (&d)[4], const void *row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(at)
                 : "memory");
}

/* d[16][8] += a[16][16] * b[16][8]; fragments as the PTX manual has them for mma.m16n8k16. */
DEVICE void mma_f16(float (&d)[4], const h2 (&a)[4], h2 b0, h2 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8 x 8 matrices of halves from shared memory: lane l gives the address of row l & 7 of matrix l >> 3; lane 4 g + t gets
 * columns 2 t and 2 t + 1 of row g of each. */
DEVICE void load_matrices(h2 (&d)[4], const void *row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(at));
}

/* An 8 x 8 matrix of halves across the warp, lane 4 g + t holding row g, columns 2 t and 2 t + 1: transposed. */
DEVICE h2 transpose_8x8(h2 a) {
    h2 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

/* ---- Hopper's matrix units: four warps together, asynchronous -------------------------------------- */

/* Products of 64 rows (16 per warp, in registers, as for mma_f16) and 16 columns by 8 … 128 tokens in shared memory.
 * Between wgmma_fence and the wgmma_wait that waits for them, neither their operands nor their results may be touched.
 * Without these units the same functions stand for nothing to wait for. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOED_WGMMA 1
#define F4(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
DEVICE void wgmma_f16(float (&d)[2][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[3][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n24k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, %16, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[4][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2]), F4(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[8][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                 "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2]), F4(d[3]), F4(d[4]), F4(d[5]), F4(d[6]), F4(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[11][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n88k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                 "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43"
                 "}, {%44, %45, %46, %47}, %48, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2]), F4(d[3]), F4(d[4]), F4(d[5]), F4(d[6]), F4(d[7]),
                   F4(d[8]), F4(d[9]), F4(d[10])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[12][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                 "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
                 "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2]), F4(d[3]), F4(d[4]), F4(d[5]), F4(d[6]), F4(d[7]),
                   F4(d[8]), F4(d[9]), F4(d[10]), F4(d[11])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void wgmma_f16(float (&d)[16][4], const h2 (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                 "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
                 "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : F4(d[0]), F4(d[1]), F4(d[2]), F4(d[3]), F4(d[4]), F4(d[5]), F4(d[6]), F4(d[7]),
                   F4(d[8]), F4(d[9]), F4(d[10]), F4(d[11]), F4(d[12]), F4(d[13]), F4(d[14]), F4(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef F4

/* What wgmma calls a descriptor: rows of 128 bytes, each eight of them 1024 bytes, chunks swizzled; `offset` bytes after
 * where `matrix` begins, which may be 32, 64 or 96 bytes inside a row. All of a loop's descriptors come from one, by one
 * scalar addition of 64 bits each: put together from halves, each would be three instructions. */
DEVICE uint32_t swizzled_matrix(const void *at) {
    uint32_t first = (uint32_t)__cvta_generic_to_shared(at) >> 4 | 1u << 16;
    keep(first); /* else the compiler sees no need for what makes it a scalar */
    return __shfl_sync(ALL_LANES, first, 0);
}
DEVICE uint64_t swizzled_matrix(uint32_t matrix, int offset) {
    return ((uint64_t)(1024 / 16 | 1u << 30) << 32 | matrix) + (uint64_t)(offset / 16);
}
/* Results are in their registers by here, and the compiler moves none of them across. */
template <int N> DEVICE void wgmma_pin(float (&d)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* This thread's writes to shared memory, before a barrier behind which matrix units read them. */
DEVICE void matrix_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
template <int PENDING> DEVICE void wgmma_wait() {}
template <int N> DEVICE void wgmma_pin(float (&)[N][4]) {}
DEVICE void matrix_fence() {}
DEVICE uint32_t swizzled_matrix(const void *) { return 0; }
#endif

/* ---- asynchronous copies into shared memory ------------------------------------------------------- */

DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* 16 bytes, past L1; if !ok, zeros, and src is not read. */
DEVICE void copy16(void *shared_dst, const void *src, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared_dst)), "l"(src),
                 "r"(ok ? 16 : 0)
                 : "memory");
}
/* dst: a shared_address. */
DEVICE void copy16(uint32_t dst, const void *src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
DEVICE void copy16(void *shared_dst, const void *src) { copy16(shared_address(shared_dst), src); }
/* If !wanted, nothing is written. */
DEVICE void copy16_if(bool wanted, uint32_t dst, const void *src) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(dst), "l"(src),
                 "r"((int)wanted)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most PENDING of this thread's groups are unfinished. */
template <int PENDING> DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* By one thread: n bytes, a multiple of 16, from memory into L2, if the device can. */
DEVICE void bring(const void *from, uint32_t n) {
#ifdef MOED_WGMMA
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(n) : "memory");
#else
    (void)from, (void)n;
#endif
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
/* Lets the next kernel's blocks in, as far as there is room, once all of this one's have called it or ended. Where counts for
 * more than what a kernel gains by itself: too early, and they take room, and memory's time for their weights, from
 * blocks that have not begun; too late, and their weights are not there when their turn comes. */
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

/* What was written before an add_release of any block, and a barrier of it, is seen after a load_acquire that sees the sum. */
DEVICE void add_release(int32_t *to, int32_t n) {
    asm volatile("red.add.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(n) : "memory");
}
DEVICE int32_t load_acquire(const int32_t *from) {
    int32_t x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
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
cudaError_t exchange_prepare(void);
cudaError_t rope_prepare(void);
cudaError_t attn_prepare(size_t max_shared);
cudaError_t sample_prepare(void);
cudaError_t norm_prepare(void);
cudaError_t route_prepare(size_t max_shared);

#endif
