/* load: from the file's bytes to panels, and between f32 and the types of buffers. */
#include "cuda/common.cuh"
#include "cuda/panel.h"

/* One block per panel, one thread per lane and unit. */
static __global__ void __launch_bounds__(128) k_repack_u8(const __grid_constant__ struct repack_args a) {
    depend_wait();
    int panel = (int)blockIdx.x, row_block = (int)blockIdx.y, type = panel_of_source(a.source);
    int n_panels = a.n_cols / PANEL_K, bytes = source_bytes(a.source);
    size_t stride = (size_t)n_panels * (size_t)bytes;
    const uint8_t *src = a.src + (size_t)row_block * PANEL_ROWS * stride + (size_t)panel * (size_t)bytes;
    uint8_t *dst = a.dst + ((size_t)row_block * (size_t)n_panels + (size_t)panel) *
                               (size_t)panel_bytes(type);
    int n_rows = min(PANEL_ROWS, a.n_rows - row_block * PANEL_ROWS);
    int lane = (int)threadIdx.x & 31, unit = (int)threadIdx.x >> 5, row = (int)threadIdx.x;
    panel_pack_lane(a.source, src, stride, n_rows, unit, lane, dst);
    if (row >= PANEL_ROWS || type == PANEL_F16) return;
    if (row < n_rows) {
        const uint8_t *p = src + (size_t)row * stride;
        panel_pack_header(a.source, p, row, dst);
        uint32_t d = panel_u16(type == PANEL_Q6_K ? p + 208 : p) & 0x7fffu;
        if (type != PANEL_Q8_0) atomicMax(a.d_max, d);
        return;
    }
    for (int i = 0; i < 16; i++) dst[16 * row + i] = 0; /* a row that is not in the file: all zeros */
    if (type == PANEL_Q6_K) dst[256 + 2 * row] = dst[256 + 2 * row + 1] = 0;
}

cudaError_t cuda_repack(const struct repack_args *a, const struct cuda_queue *q) {
    dim3 grid((unsigned)(a->n_cols / PANEL_K), (unsigned)((a->n_rows + PANEL_ROWS - 1) / PANEL_ROWS), 1);
    return launch(k_repack_u8, grid, 128, 0, q, *a);
}

static __global__ void __launch_bounds__(256)
    k_widen_f32(const uint8_t *src, int source, size_t n, float *dst) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    depend_wait();
    if (i >= n) return;
    if (source == SOURCE_F32) {
        dst[i] = ((const float *)src)[i];
    } else {
        uint16_t h = ((const uint16_t *)src)[i];
        dst[i] = source == SOURCE_BF16 ? panel_f32_bits((uint32_t)h << 16) : panel_f16(h);
    }
}

cudaError_t cuda_to_f32(const void *src, int source, size_t n, float *dst, const struct cuda_queue *q) {
    return launch(k_widen_f32, dim3((unsigned)((n + 255) / 256), 1, 1), 256, 0, q,
                  (const uint8_t *)src, source, n, dst);
}

static __global__ void __launch_bounds__(256) k_narrow_f16(const float *src, size_t n, uint16_t *dst) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    depend_wait();
    if (i < n) dst[i] = (uint16_t)h2_pack(src[i], 0.0f);
}

cudaError_t cuda_to_f16(const float *src, size_t n, void *dst, const struct cuda_queue *q) {
    return launch(k_narrow_f16, dim3((unsigned)((n + 255) / 256), 1, 1), 256, 0, q, src, n,
                  (uint16_t *)dst);
}

cudaError_t load_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_repack_u8);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&ignored, k_widen_f32);
    return e != cudaSuccess ? e : cudaFuncGetAttributes(&ignored, k_narrow_f16);
}
