/* cpu_simd: sixteen lanes of float and of int32, on AVX-512 as one register and on AVX2 as two. The
 * kernels are written once on top of it (cpu_dot.h, cpu_vector.h, cpu_attention.h) and compiled once per
 * instruction set; lanes, and therefore rounding, are the same on both.
 *
 * Only for files whose name ends in _avx2.c or _avx512.c: everything here is static. */
#ifndef MOED_MOE_CPU_SIMD_H
#define MOED_MOE_CPU_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CPU_INLINE static inline __attribute__((always_inline, unused))
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define __SANITIZE_ADDRESS__ 1 /* as GCC says it */
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CPU_UNROLL /* unrolled and instrumented, these files take minutes to compile */
#elif defined(__clang__)
#define CPU_UNROLL _Pragma("unroll")
#else
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)

typedef __m512 vf; /* 16 float */
typedef __m512i vi; /* 16 int32, or 64 bytes */

CPU_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
CPU_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
CPU_INLINE vf vf_load(const void *p) { return _mm512_loadu_ps(p); }
CPU_INLINE void vf_store(void *p, vf x) { _mm512_storeu_ps(p, x); }
CPU_INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }
/* The first n lanes, 0 <= n <= 16; the others read as 0 and are not written. */
CPU_INLINE vf vf_load_n(const void *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
CPU_INLINE void vf_store_n(void *p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
/* The first n lanes of x, the others of y. */
CPU_INLINE vf vf_first(vf x, vf y, int n) { return _mm512_mask_blend_ps(first_lanes(n), y, x); }
CPU_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
CPU_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
CPU_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
CPU_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
CPU_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */
CPU_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
/* b where either is NaN, as the instruction does. */
CPU_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
CPU_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
CPU_INLINE vf vf_round(vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 0 where x < lo, else y. */
CPU_INLINE vf vf_zero_below(vf x, float lo, vf y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, vf_set1(lo), _CMP_LT_OQ), vf_zero());
}
/* y where a > b, else z. */
CPU_INLINE vi vi_where_greater(vf a, vf b, vi y, vi z) {
    return _mm512_mask_mov_epi32(z, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y);
}
CPU_INLINE vi vf_to_int(vf x) { return _mm512_cvtps_epi32(x); } /* to nearest, ties to even */
CPU_INLINE vf vf_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
CPU_INLINE vf vf_cast(vi x) { return _mm512_castsi512_ps(x); }
CPU_INLINE vi vf_bits(vf x) { return _mm512_castps_si512(x); }

CPU_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
CPU_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
CPU_INLINE vi vi_lanes(void) { /* 0, 1, … 15 */
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
CPU_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
CPU_INLINE void vi_store(void *p, vi x) { _mm512_storeu_si512(p, x); }
CPU_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
CPU_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
CPU_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
CPU_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
CPU_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
#define vi_shl(x, n) _mm512_slli_epi32(x, n)
#define vi_shr(x, n) _mm512_srli_epi32(x, n)
#define vi_sar(x, n) _mm512_srai_epi32(x, n)
/* acc + the dot product of each lane's four bytes, a unsigned (below 128), b signed. Exact. */
CPU_INLINE vi vi_dot(vi acc, vi a, vi b) { return _mm512_dpbusd_epi32(acc, a, b); }
CPU_INLINE vi vi_from_u8(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
CPU_INLINE vi vi_from_i8(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
CPU_INLINE vf vf_from_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
CPU_INLINE void vf_to_f16(void *p, vf x) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CPU_INLINE vf vf_from_bf16(const void *p) {
    return vf_cast(vi_shl(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
/* The low bytes of 32 lanes. */
CPU_INLINE __m256i vi_bytes(vi a, vi b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(a)),
                                   _mm512_cvtepi32_epi8(b), 1);
}
/* acc + the dot products of each of eight lanes' four bytes, x unsigned below 128, y signed. Exact. */
CPU_INLINE __m256i dot_half(__m256i acc, __m256i x, __m256i y) {
    return _mm256_dpbusd_epi32(acc, x, y);
}
CPU_INLINE __m256 vf_low(vf x) { return _mm512_castps512_ps256(x); }
CPU_INLINE __m256 vf_high(vf x) { return _mm512_extractf32x8_ps(x, 1); }
CPU_INLINE __m256i vi_low(vi x) { return _mm512_castsi512_si256(x); }
CPU_INLINE __m256i vi_high(vi x) { return _mm512_extracti64x4_epi64(x, 1); }

#else /* AVX2 */

typedef struct {
    __m256 a, b; /* lanes 0 … 7, 8 … 15 */
} vf;
typedef struct {
    __m256i a, b;
} vi;

CPU_INLINE vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
CPU_INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
CPU_INLINE vf vf_load(const void *p) {
    return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps((const float *)p + 8)};
}
CPU_INLINE void vf_store(void *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps((float *)p + 8, x.b);
}
CPU_INLINE __m256i lane_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CPU_INLINE vf vf_load_n(const void *p, int n) {
    return (vf){_mm256_maskload_ps(p, lane_mask(n)),
                _mm256_maskload_ps((const float *)p + 8, lane_mask(n - 8))};
}
CPU_INLINE void vf_store_n(void *p, vf x, int n) {
    _mm256_maskstore_ps(p, lane_mask(n), x.a);
    _mm256_maskstore_ps((float *)p + 8, lane_mask(n - 8), x.b);
}
CPU_INLINE vf vf_first(vf x, vf y, int n) {
    return (vf){_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(lane_mask(n))),
                _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(lane_mask(n - 8)))};
}
CPU_INLINE vf vf_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
CPU_INLINE vf vf_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
CPU_INLINE vf vf_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
CPU_INLINE vf vf_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
CPU_INLINE vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
CPU_INLINE vf vf_fnma(vf x, vf y, vf z) {
    return (vf){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
CPU_INLINE vf vf_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
CPU_INLINE vf vf_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
CPU_INLINE vf vf_round(vf x) {
    return (vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
CPU_INLINE vf vf_zero_below(vf x, float lo, vf y) {
    __m256 l = _mm256_set1_ps(lo);
    return (vf){_mm256_andnot_ps(_mm256_cmp_ps(x.a, l, _CMP_LT_OQ), y.a),
                _mm256_andnot_ps(_mm256_cmp_ps(x.b, l, _CMP_LT_OQ), y.b)};
}
CPU_INLINE vi vi_where_greater(vf x, vf y, vi u, vi v) {
    __m256i a = _mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ));
    __m256i b = _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
    return (vi){_mm256_blendv_epi8(v.a, u.a, a), _mm256_blendv_epi8(v.b, u.b, b)};
}
CPU_INLINE vi vf_to_int(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
CPU_INLINE vf vf_from_int(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
CPU_INLINE vf vf_cast(vi x) { return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
CPU_INLINE vi vf_bits(vf x) { return (vi){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

CPU_INLINE vi vi_zero(void) { return (vi){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
CPU_INLINE vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
CPU_INLINE vi vi_lanes(void) {
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
CPU_INLINE vi vi_load(const void *p) {
    return (vi){_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
CPU_INLINE void vi_store(void *p, vi x) {
    _mm256_storeu_si256(p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
#define CPU_VI_BINARY(name, op)                                                                    \
    CPU_INLINE vi name(vi x, vi y) { return (vi){op(x.a, y.a), op(x.b, y.b)}; }
CPU_VI_BINARY(vi_add, _mm256_add_epi32)
CPU_VI_BINARY(vi_sub, _mm256_sub_epi32)
CPU_VI_BINARY(vi_and, _mm256_and_si256)
CPU_VI_BINARY(vi_or, _mm256_or_si256)
CPU_VI_BINARY(vi_max, _mm256_max_epi32)
#undef CPU_VI_BINARY
#define vi_shl(x, n) ((vi){_mm256_slli_epi32((x).a, n), _mm256_slli_epi32((x).b, n)})
#define vi_shr(x, n) ((vi){_mm256_srli_epi32((x).a, n), _mm256_srli_epi32((x).b, n)})
#define vi_sar(x, n) ((vi){_mm256_srai_epi32((x).a, n), _mm256_srai_epi32((x).b, n)})
CPU_INLINE __m256i dot_half(__m256i acc, __m256i x, __m256i y) {
    /* a < 128: no pair sum of vpmaddubsw saturates, so this is exact. */
    __m256i pairs = _mm256_maddubs_epi16(x, y);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
CPU_INLINE vi vi_dot(vi acc, vi x, vi y) {
    return (vi){dot_half(acc.a, x.a, y.a), dot_half(acc.b, x.b, y.b)};
}
CPU_INLINE __m128i low_bytes(__m256i x) {
    __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                     4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i y = _mm256_shuffle_epi8(x, order);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
CPU_INLINE __m256i vi_bytes(vi x, vi y) {
    return _mm256_setr_m128i(_mm_unpacklo_epi64(low_bytes(x.a), low_bytes(x.b)),
                             _mm_unpacklo_epi64(low_bytes(y.a), low_bytes(y.b)));
}
CPU_INLINE vi vi_from_u8(const void *p) {
    __m128i x = _mm_loadu_si128(p);
    return (vi){_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
CPU_INLINE vi vi_from_i8(const void *p) {
    __m128i x = _mm_loadu_si128(p);
    return (vi){_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
CPU_INLINE vf vf_from_f16(const void *p) {
    const __m128i *q = p;
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
CPU_INLINE void vf_to_f16(void *p, vf x) {
    _mm_storeu_si128(p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)p + 1,
                     _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CPU_INLINE vf vf_from_bf16(const void *p) {
    const __m128i *q = p;
    return vf_cast((vi){_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16),
                        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16)});
}
CPU_INLINE __m256 vf_low(vf x) { return x.a; }
CPU_INLINE __m256 vf_high(vf x) { return x.b; }
CPU_INLINE __m256i vi_low(vi x) { return x.a; }
CPU_INLINE __m256i vi_high(vi x) { return x.b; }

#endif

/* Across the lanes, always in the same tree: 16 to 8 to 4 to 2 to 1. */
CPU_INLINE float vf_sum(vf x) {
    __m256 h = _mm256_add_ps(vf_low(x), vf_high(x));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
CPU_INLINE float vf_max_lane(vf x) {
    __m256 h = _mm256_max_ps(vf_low(x), vf_high(x));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
/* The sums of lanes 0 … 3 and 4 … 7. */
CPU_INLINE void sum_quarters(__m256i x, int32_t *low, int32_t *high) {
    x = _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
    x = _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0xb1));
    *low = _mm_cvtsi128_si32(_mm256_castsi256_si128(x));
    *high = _mm_cvtsi128_si32(_mm256_extracti128_si256(x, 1));
}
CPU_INLINE int32_t vi_max_lane(vi x) {
    __m256i h = _mm256_max_epi32(vi_low(x), vi_high(x));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

/* e^x to about 2 ulp for x in [-86.5, 88.3]; 0 below, e^88.3 above, NaN for NaN. Cody-Waite reduction
 * by ln 2 in two parts, then the Taylor polynomial on [-ln 2 / 2, ln 2 / 2] (remainder < 2^-26). */
CPU_INLINE vf vf_exp(vf x) {
    vf y = vf_min(vf_set1(88.3f), vf_max(vf_set1(-86.5f), x));
    vf n = vf_round(vf_mul(y, vf_set1(0x1.715476p+0f)));
    vf r = vf_fnma(n, vf_set1(0x1.62e4p-1f), y);
    r = vf_fnma(n, vf_set1(0x1.7f7d1cp-20f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_cast(vi_add(vf_bits(p), vi_shl(vf_to_int(n), 23)));
    return vf_zero_below(x, -86.5f, p);
}

#endif
