/* See amx_emulated.h. */
#include "tests/amx_emulated.h"

#include <immintrin.h>
#include <string.h>

static _Thread_local uint8_t tiles[8][16][64];
static _Thread_local struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
} config;

static void configure(const void *p) {
    memcpy(&config, p, sizeof config);
    memset(tiles, 0, sizeof tiles);
}

static void load_tile(int tile, const uint8_t *p, size_t stride) {
    memset(tiles[tile], 0, sizeof tiles[tile]);
    for (int r = 0; r < config.n_rows[tile]; r++)
        memcpy(tiles[tile][r], p + (size_t)r * stride, config.row_bytes[tile]);
}

static void store_tile_to(int tile, uint8_t *p, size_t stride) {
    for (int r = 0; r < config.n_rows[tile]; r++)
        memcpy(p + (size_t)r * stride, tiles[tile][r], config.row_bytes[tile]);
}

/* TDPBSUD and, with signed_right, TDPBSSD: exact, modulo 2^32. Signed bytes go through the product of unsigned with signed
 * ones, 128 larger. */
static void dot_tile(int sum, int left, int right, int signed_right) {
    const __m512i half = _mm512_set1_epi8(-128);
    for (int r = 0; r < config.n_rows[left]; r++) {
        __m512i y = _mm512_loadu_si512(tiles[sum][r]);
        for (int k = 0; k < config.n_rows[right]; k++) {
            int32_t four;
            memcpy(&four, tiles[left][r] + 4 * k, 4);
            __m512i a = _mm512_set1_epi32(four), b = _mm512_loadu_si512(tiles[right][k]);
            if (signed_right)
                y = _mm512_sub_epi32(_mm512_dpbusd_epi32(y, _mm512_xor_si512(b, half), a),
                                     _mm512_dpbusd_epi32(_mm512_setzero_si512(), half, a));
            else
                y = _mm512_dpbusd_epi32(y, b, a);
        }
        _mm512_storeu_si512(tiles[sum][r], y);
    }
}

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbssd
#define _tile_loadconfig(p) configure(p)
#define _tile_loadd(tile, p, stride) load_tile(tile, (const uint8_t *)(p), stride)
#define _tile_stream_loadd(tile, p, stride) load_tile(tile, (const uint8_t *)(p), stride)
#define _tile_stored(tile, p, stride) store_tile_to(tile, (uint8_t *)(p), stride)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_dpbsud(sum, left, right) dot_tile(sum, left, right, 0)
#define _tile_dpbssd(sum, left, right) dot_tile(sum, left, right, 1)

#include "moe/cpu_dot_amx.h"

bool amx_emulate;

const struct cpu_kernels *amx_emulated(void) {
    static struct cpu_kernels kernels;
    const struct cpu_kernels *avx512 = cpu_kernels_avx512();
    if (!avx512) return NULL;
    amx_table(&kernels, avx512);
    kernels.name = "amx-int8 emulated";
    return &kernels;
}

const struct cpu_kernels *__real_cpu_kernels_amx(void);
const struct cpu_kernels *__wrap_cpu_kernels_amx(void);

const struct cpu_kernels *__wrap_cpu_kernels_amx(void) {
    const struct cpu_kernels *real = __real_cpu_kernels_amx();
    return real || !amx_emulate ? real : amx_emulated();
}
