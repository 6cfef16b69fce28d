/* See amx_emulated.h. */
#include "tests/amx_emulated.h"

#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

static _Thread_local float tiles[8][16][16];

static void load_tile(int tile, const uint8_t *p, size_t stride) {
    for (int r = 0; r < 16; r++) memcpy(tiles[tile][r], p + (size_t)r * stride, 64);
}

static void store_tile_to(int tile, uint8_t *p, size_t stride) {
    for (int r = 0; r < 16; r++) memcpy(p + (size_t)r * stride, tiles[tile][r], 64);
}

static __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
static __m512 high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

/* TDPBF16PS: products of even and of odd columns are summed apart, in order and fused, then added to each other and
 * to the sum; to nearest, denormals as zero. */
static void dot_tile(int sum, int left, int right) {
    unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8040); /* all exceptions masked, FTZ, DAZ */
    for (int r = 0; r < 16; r++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < 16; k++) {
            int32_t pair;
            memcpy(&pair, &tiles[left][r][k], 4);
            __m512i a = _mm512_set1_epi32(pair), b = _mm512_loadu_si512(tiles[right][k]);
            even = _mm512_fmadd_ps(low(a), low(b), even);
            odd = _mm512_fmadd_ps(high(a), high(b), odd);
        }
        _mm512_storeu_ps(tiles[sum][r],
                         _mm512_add_ps(_mm512_loadu_ps(tiles[sum][r]), _mm512_add_ps(even, odd)));
    }
    _mm_setcsr(mxcsr);
}

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_loadd(tile, p, stride) load_tile(tile, (const uint8_t *)(p), stride)
#define _tile_stored(tile, p, stride) store_tile_to(tile, (uint8_t *)(p), stride)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_dpbf16ps(sum, left, right) dot_tile(sum, left, right)

#include "moe/cpu_dot_amx.h"

bool amx_emulate;

const struct cpu_kernels *amx_emulated(void) {
    static struct cpu_kernels kernels;
    unsigned a, b, c, d;
    const struct cpu_kernels *avx512 = cpu_kernels_avx512();
    if (!avx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (c & 1u << 1) == 0 ||
        !__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & 1u << 5) == 0)
        return NULL;
    amx_table(&kernels, avx512);
    kernels.name = "amx-bf16 emulated";
    return &kernels;
}

const struct cpu_kernels *__real_cpu_kernels_amx(void);
const struct cpu_kernels *__wrap_cpu_kernels_amx(void);

const struct cpu_kernels *__wrap_cpu_kernels_amx(void) {
    const struct cpu_kernels *real = __real_cpu_kernels_amx();
    return real || !amx_emulate ? real : amx_emulated();
}
