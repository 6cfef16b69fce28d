/* cpu_block: one block of 32 columns of a weight row tile and of a quantised tile, as the kernels take them
 * up. Included by the kernel files only; see cpu_kernels.h for layouts. */
#ifndef MOED_MOE_CPU_BLOCK_H
#define MOED_MOE_CPU_BLOCK_H

#include "moe/cpu_kernels.h"
#include "moe/cpu_simd.h"

/* Cache lines of `ahead`, which runs parallel to w. */
CPU_INLINE void prefetch(const struct cpu_dot *d, const uint8_t *w, int lines) {
    uintptr_t p = (uintptr_t)d->ahead + ((uintptr_t)w - (uintptr_t)d->w);
    CPU_UNROLL
    for (int i = 0; i < lines; i++)
        _mm_prefetch((const char *)(p + 64 * (uintptr_t)i), _MM_HINT_T1);
}

/* One block of a quantised tile of n tokens. */
struct tile_block {
    const uint8_t *q; /* high plane; the low one follows */
    const float *scale, *sum;
    const int32_t *offset; /* [2][n] */
    int planes, n;
};

CPU_INLINE struct tile_block tile_block_at(const uint8_t *x, int planes, int n) {
    const uint8_t *tail = x + (size_t)planes * CPU_BLOCK * (size_t)n;
    const float *f = (const float *)(const void *)tail;
    return (struct tile_block){x, f, f + n, (const int32_t *)(const void *)(f + 2 * n), planes, n};
}

/* Four bytes to every lane. */
CPU_INLINE vi broadcast4(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return vi_set1(x);
}

CPU_INLINE void split_nibbles(const uint8_t *p, vi *w) {
    vi low = vi_set1(0x0f0f0f0f);
    CPU_UNROLL
    for (int j = 0; j < 4; j++) {
        vi packed = vi_load(p + 64 * j);
        w[j] = vi_and(packed, low);
        w[j + 4] = vi_and(vi_shr(packed, 4), low);
    }
}

/* Block b of a unit of Q4_K or, with `five`, Q5_K: vector g of bytes holds columns 4g … 4g + 3 of row r in
 * lane r. */
CPU_INLINE void unpack_scale_min(const uint8_t *w, int five, int b, vi *q) {
    split_nibbles(w + 256 * b, q);
    if (!five) return;
    vi high = vi_load(w + CPU_Q5_K_H + 64 * b), one = vi_set1(0x10101010);
#define FIFTH_BIT(g, shifted) q[g] = vi_or(q[g], vi_and(shifted, one))
    FIFTH_BIT(0, vi_shl(high, 4));
    FIFTH_BIT(1, vi_shl(high, 3));
    FIFTH_BIT(2, vi_shl(high, 2));
    FIFTH_BIT(3, vi_shl(high, 1));
    FIFTH_BIT(4, high);
    FIFTH_BIT(5, vi_shr(high, 1));
    FIFTH_BIT(6, vi_shr(high, 2));
    FIFTH_BIT(7, vi_shr(high, 3));
#undef FIFTH_BIT
}

/* The same of Q6_K, values 0 … 63. */
CPU_INLINE void unpack_q6_k(const uint8_t *w, int b, vi *q) {
    const vi two = vi_set1(0x30303030);
    split_nibbles(w + 256 * b, q);
    CPU_UNROLL
    for (int v = 0; v < 2; v++) {
        vi high = vi_load(w + CPU_Q6_K_H + 128 * b + 64 * v);
        q[4 * v] = vi_or(q[4 * v], vi_and(vi_shl(high, 4), two));
        q[4 * v + 1] = vi_or(q[4 * v + 1], vi_and(vi_shl(high, 2), two));
        q[4 * v + 2] = vi_or(q[4 * v + 2], vi_and(high, two));
        q[4 * v + 3] = vi_or(q[4 * v + 3], vi_and(vi_shr(high, 2), two));
    }
}

CPU_INLINE void store_tile(const vf *acc, float *out, size_t stride, int n) {
    CPU_UNROLL
    for (int t = 0; t < n; t++) vf_store(out + (size_t)t * stride, acc[t]);
}

#endif
