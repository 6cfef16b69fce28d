/* fragment: from panels in shared memory to A operands in registers.
 *
 * A quantised weight is never converted: its integer q, masked out of the packed word where it stands, is read as an
 * f16 subnormal (q * 2^-24, or q * 2^-20 for the rows whose field lies four bits higher), and one fused multiply-add by
 * the block's scale and minimum gives the weight times 2^-e, rounded once (panel_exponent). */
#ifndef MOED_CUDA_FRAGMENT_CUH
#define MOED_CUDA_FRAGMENT_CUH

#include "cuda/common.cuh"
#include "cuda/panel.h"

template <int TYPE> struct format {
    static constexpr int header = TYPE == PANEL_F16 ? 0 : TYPE == PANEL_Q6_K ? 288 : 256;
    static constexpr int unit = TYPE == PANEL_Q4_K   ? 512
                                : TYPE == PANEL_Q5_K ? 640
                                : TYPE == PANEL_Q6_K ? 768
                                : TYPE == PANEL_Q8_0 ? 1024
                                                     : 2048;
    static constexpr int bytes = header + PANEL_UNITS * unit;
};

enum : int { TABLE_BYTES = 512 }; /* a panel's scales, unpacked */

enum : h2 {
    MINUS_1024 = 0xe400e400u, /* 0x64xx is 1024 + xx */
    MINUS_1152 = 0xe480e480u
};

/* Powers of two that bring a panel's scales to 2^(24 - e) (rows 0 … 7) or 2^(20 - e) (rows 8 … 15). In two
 * factors, because the whole one may exceed f16. */
struct scaling {
    h2 first;  /* for {d, dmin}: 2^15, -2^-e */
    h2 second; /* 2^(9 - e) or 2^(5 - e), 1: of the row that this lane unpacks */
};

DEVICE struct scaling scaling_of(float scale, int lane) {
    int e = (int)(__float_as_uint(scale) >> 23) - 127;
    int shift = lane >> 1 < 8 ? 9 - e : 5 - e;
    struct scaling s;
    s.first = h2_pack(32768.0f, -__uint_as_float((uint32_t)(127 - e) << 23));
    s.second = h2_pack(__uint_as_float((uint32_t)(127 + shift) << 23), 1.0f);
    return s;
}

/* The warp unpacks one panel's header; lane l has half of row l / 2. Q4_K, Q5_K: table[row][8]{scale, -min};
 * Q6_K: table[row][16] scales; Q8_0: table[row][8] d. */
template <int TYPE>
DEVICE void unpack_scales(const uint8_t *header, uint8_t *table, int lane, const struct scaling &c) {
    int row = lane >> 1, part = lane & 1;
    if constexpr (TYPE == PANEL_Q4_K || TYPE == PANEL_Q5_K) {
        uint4 v = *(const uint4 *)(header + 16 * row);
        uint32_t scales = v.y & 0x3f3f3f3fu, mins = v.z & 0x3f3f3f3fu;
        if (part) {
            scales = (v.w & 0x0f0f0f0fu) | (v.y >> 2 & 0x30303030u);
            mins = (v.w >> 4 & 0x0f0f0f0fu) | (v.z >> 2 & 0x30303030u);
        }
        h2 d = h2_mul(h2_mul(v.x, c.first), c.second), out[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            h2 p = pick_bytes(scales, mins, 0x8080u | i | (4 + i) << 8) | 0x64006400u;
            out[i] = h2_mul(h2_add(p, MINUS_1024), d);
        }
        *(uint4 *)(table + 32 * row + 16 * part) = make_uint4(out[0], out[1], out[2], out[3]);
    } else if constexpr (TYPE == PANEL_Q6_K) {
        uint2 v = *(const uint2 *)(header + 16 * row + 8 * part);
        h2 d = *(const uint16_t *)(header + 256 + 2 * row);
        d = h2_mul(h2_mul(d | d << 16, h2_low(c.first)), h2_low(c.second));
        h2 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            h2 p = pick_bytes(i < 2 ? v.x : v.y, 0x64646464u, i & 1 ? 0x4342u : 0x4140u);
            out[i] = h2_mul(h2_add(p, MINUS_1152), d);
        }
        *(uint4 *)(table + 32 * row + 16 * part) = make_uint4(out[0], out[1], out[2], out[3]);
    } else if constexpr (TYPE == PANEL_Q8_0) {
        *(uint2 *)(table + 16 * row + 8 * part) = *(const uint2 *)(header + 16 * row + 8 * part);
    }
}

/* What a lane holds of one panel's unit: its weights, and the scales of its rows g and g + 8. */
template <int TYPE> struct lane_unit {
    uint32_t low[4];
    uint32_t high[2];
    h2 scale[2][2]; /* of rows g and g + 8; Q4_K, Q5_K: [32-column block]{scale, -min}; Q6_K: [32-column block]{scale of
                       its first 16 columns, of its last} */
};
template <> struct lane_unit<PANEL_Q8_0> {
    uint32_t word[8];
    h2 scale[2];
};
template <> struct lane_unit<PANEL_F16> {
    const uint8_t *p;
};

template <int TYPE>
DEVICE void load_unit(struct lane_unit<TYPE> &w, const uint8_t *unit, const uint8_t *table, int u,
                      int lane) {
    int g = lane >> 2;
    if constexpr (TYPE == PANEL_F16) {
        w.p = unit + 16 * lane;
    } else if constexpr (TYPE == PANEL_Q8_0) {
        uint4 a = *(const uint4 *)(unit + 16 * lane), b = *(const uint4 *)(unit + 512 + 16 * lane);
        w.word[0] = a.x, w.word[1] = a.y, w.word[2] = a.z, w.word[3] = a.w;
        w.word[4] = b.x, w.word[5] = b.y, w.word[6] = b.z, w.word[7] = b.w;
        w.scale[0] = *(const h2 *)(table + 16 * g + 4 * u);
        w.scale[1] = *(const h2 *)(table + 16 * (g + 8) + 4 * u);
    } else {
        uint4 a = *(const uint4 *)(unit + 16 * lane);
        w.low[0] = a.x, w.low[1] = a.y, w.low[2] = a.z, w.low[3] = a.w;
        if constexpr (TYPE == PANEL_Q5_K) w.high[0] = *(const uint32_t *)(unit + 512 + 4 * lane);
        if constexpr (TYPE == PANEL_Q6_K) {
            uint2 h = *(const uint2 *)(unit + 512 + 8 * lane);
            w.high[0] = h.x, w.high[1] = h.y;
        }
        uint2 s = *(const uint2 *)(table + 32 * g + 8 * u);
        w.scale[0][0] = s.x, w.scale[0][1] = s.y;
        s = *(const uint2 *)(table + 32 * (g + 8) + 8 * u);
        w.scale[1][0] = s.x, w.scale[1][1] = s.y;
    }
}

/* The A operand of step `step` (a constant once unrolled). */
template <int TYPE>
DEVICE void load_fragment(h2 (&a)[4], const struct lane_unit<TYPE> &w, int step) {
    int block = step >> 1;
    if constexpr (TYPE == PANEL_F16) {
        uint4 v = *(const uint4 *)(w.p + 512 * step);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    } else if constexpr (TYPE == PANEL_Q8_0) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t bytes = w.word[step * 2 + (r >> 1)];
            h2 q = pick_bytes(bytes, 0x64646464u, r & 1 ? 0x4342u : 0x4140u);
            h2 d = block ? h2_high(w.scale[r & 1]) : h2_low(w.scale[r & 1]);
            a[r] = h2_mul(h2_add(q, MINUS_1152), d);
        }
    } else {
        uint32_t q[4];
        uint32_t v = w.low[step];
        q[0] = v & 0x000f000fu, q[1] = v & 0x00f000f0u;
        q[2] = v >> 8 & 0x000f000fu, q[3] = v >> 8 & 0x00f000f0u;
        if constexpr (TYPE == PANEL_Q5_K) {
            uint32_t h = w.high[0] >> step;
            q[0] |= h & 0x00100010u, q[1] |= h & 0x01000100u;
            q[2] |= h << 4 & 0x00100010u, q[3] |= h >> 4 & 0x01000100u;
        }
        if constexpr (TYPE == PANEL_Q6_K) {
            uint32_t h = w.high[block] >> 2 * (step & 1);
            q[0] |= h & 0x00300030u, q[1] |= h & 0x03000300u;
            q[2] |= h << 4 & 0x00300030u, q[3] |= h >> 4 & 0x03000300u;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            h2 s = w.scale[r & 1][block];
            if constexpr (TYPE == PANEL_Q6_K) {
                s = step & 1 ? h2_high(s) : h2_low(s);
                a[r] = h2_fma(q[r], s, h2_mul(s, r & 1 ? 0x82008200u : 0x80208020u)); /* -32 * 2^-20, -32 * 2^-24 */
            } else {
                a[r] = h2_fma(q[r], h2_low(s), h2_high(s));
            }
        }
    }
}

/* The A operands of one unit, of a panel's rows. */
template <int TYPE>
DEVICE void load_fragments(h2 (&a)[4][4], const uint8_t *unit, const uint8_t *table, int u, int lane) {
    struct lane_unit<TYPE> w;
    load_unit<TYPE>(w, unit, table, u, lane);
#pragma unroll
    for (int step = 0; step < 4; step++) load_fragment<TYPE>(a[step], w, step);
}

#endif
