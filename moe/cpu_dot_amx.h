/* cpu_dot_amx: products of weight row tiles with a tile of tokens by AMX's BF16 tiles. Included by
 * cpu_kernels_amx.c, and by the test that computes the tiles' operations itself; see cpu_kernels.h for layouts.
 *
 * Weights are the left operand, 16 rows by 32 columns at a time, made BF16 on the way. An integer of Q4_K or Q5_K chooses
 * among the 16 or 32 products that its block's scale has, which lie in a table; d and dmin are applied to the sums of a
 * superblock. Those of Q6_K become floats by their place in the significand. Tokens are the right operand, 16 to a tile. A
 * unit is unpacked while the one before it is multiplied, over the ends of row tiles, and serves up to 64 tokens.
 *
 * Whatever the tile's width, a (row, token) pair goes through the same operations in the same order. */
#ifndef MOED_MOE_CPU_DOT_AMX_H
#define MOED_MOE_CPU_DOT_AMX_H

#include "moe/cpu_block.h"

enum {
    TILE_BYTES = 1024,
    UNIT_BLOCKS = QK_K / CPU_BLOCK,
    TILE_TOKENS = 16,
    MOST_TOKEN_TILES = CPU_TILE / TILE_TOKENS
};

/* What LDTILECFG reads: eight tiles of 16 rows by 64 bytes. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
};

/* A thread keeps its tiles configured, since configuring and releasing them takes as long as hundreds of weights do: a
 * context switch saves 8 KiB more, and Linux releases tiles before a core sleeps. */
static void configure_tiles(void) {
    static const struct tile_config config = {.palette = 1,
                                              .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                              .n_rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    static _Thread_local bool configured;
    if (configured) return;
    _tile_loadconfig(&config);
    configured = true;
}

/* GCC's tile loads do not tell the compiler that they read memory. */
#define TILE_LOAD(tile, p)                                                                         \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_loadd(tile, p, 64);                                                                  \
    } while (0)

/* ---- weights to BF16 --------------------------------------------------------------------------------- */

/* Q4_K and Q5_K: scale times (integer - half its range), [scale][integer]. What a superblock's d multiplies is the same
 * for all of its columns, so that is done to the sums; the other half of the range and the minima meet the sums of the
 * tokens' blocks. */
static uint16_t scaled_4[64][16], scaled_5[64][32];

static uint16_t round_bf16(int x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void fill_scaled(void) {
    for (int i = 0; i < 64; i++) {
        for (int q = 0; q < 16; q++) scaled_4[i][q] = round_bf16(i * (q - 8));
        for (int q = 0; q < 32; q++) scaled_5[i][q] = round_bf16(i * (q - 16));
    }
}

/* Q6_K and Q8_0: a unit's factors, [block of 16, or of 32, columns][row]. A weight is scale * integer or, for Q6_K, scale *
 * (1 + integer / 64) + shift. */
struct factors {
    float scale[QK_K / 16][CPU_ROWS], shift[QK_K / 16][CPU_ROWS];
};

CPU_INLINE void load_factors(const uint8_t *w, enum cpu_format format, struct factors *f) {
    if (format == CPU_Q8_0) {
        vf_store(f->scale[0], vf_load(w + CPU_Q8_0_D));
        return;
    }
    vf d = vf_mul(vf_load(w + CPU_Q6_K_D), vf_set1(64));
    CPU_UNROLL
    for (int g = 0; g < QK_K / 16; g++) {
        vf scale = vf_mul(d, vf_from_int(vi_from_i8(w + CPU_Q6_K_SC + 16 * g)));
        vf_store(f->scale[g], scale);
        vf_store(f->shift[g], vf_mul(scale, vf_set1(-1.5f)));
    }
}

CPU_INLINE vf weights_of(const struct factors *f, int b, int r, vf x) {
    return vf_fma(x, vf_set1(f->scale[b][r]), vf_set1(f->shift[b][r]));
}

/* x, then y, rounded. */
CPU_INLINE vi to_bf16(vf x, vf y) { return (vi)_mm512_cvtne2ps_pbh(y, x); }

/* In a register: or else the compiler loads it again for every shift. */
CPU_INLINE vi keep(vi x) {
    __asm__("" : "+v"(x));
    return x;
}

/* Row r of each of a unit's blocks. dst[block][row][32] */
CPU_INLINE void unpack_row_4(const uint8_t *w, int r, uint8_t *dst) {
    vi low = keep(vi_load(w + 128 * r)), high = keep(vi_load(w + 128 * r + 64));
    const uint8_t *scale = w + CPU_Q4_K_SC + UNIT_BLOCKS * r;
    CPU_UNROLL
    for (int b = 0; b < UNIT_BLOCKS; b++) {
        vi q = b < 4 ? low : high;
        if (b % 4 > 0) q = _mm512_srli_epi16(q, (unsigned)(4 * (b % 4)));
        /* The 16 products twice: what is above an index's four bits makes no difference. */
        vi products = _mm512_broadcast_i64x4(
            _mm256_loadu_si256((const __m256i *)(const void *)scaled_4[scale[b]]));
        vi_store(dst + b * TILE_BYTES + 64 * r, _mm512_permutexvar_epi16(q, products));
    }
}

CPU_INLINE void unpack_row_5(const uint8_t *w, int r, uint8_t *dst) {
    vi high = _mm512_cvtepu8_epi16(
        _mm256_loadu_si256((const __m256i *)(const void *)(w + CPU_Q5_K_H + 32 * r)));
    const uint8_t *scale = w + CPU_Q5_K_SC + UNIT_BLOCKS * r;
    CPU_UNROLL
    for (int b = 0; b < UNIT_BLOCKS; b++) {
        vi q = _mm512_srli_epi16(vi_load(w + 128 * r + b / 4 * 64), (unsigned)(4 * (b % 4)));
        vi bit = _mm512_srli_epi16(_mm512_slli_epi16(high, 4), (unsigned)b);
        /* bit where the mask is set, else q */
        q = _mm512_ternarylogic_epi32(_mm512_set1_epi16(16), bit, q, 0xca);
        vi_store(dst + b * TILE_BYTES + 64 * r,
                 _mm512_permutexvar_epi16(q, vi_load(scaled_5[scale[b]])));
    }
}

/* A unit's scales or minima, times a power of two, twice: for the high and the low parts of the tokens' sums.
 * dst[row][32], the second half zero. */
CPU_INLINE void unpack_per_block(const uint8_t *p, float factor, uint8_t *dst) {
    CPU_UNROLL
    for (int r = 0; r < CPU_ROWS; r += 2) { /* six bits are exact in BF16 */
        vf x = vf_mul(vf_from_int(vi_from_u8(p + UNIT_BLOCKS * r)), vf_set1(factor));
        __m256i words = _mm512_cvtepi32_epi16(vi_shr(vf_bits(x), 16));
        _mm256_storeu_si256((__m256i *)(void *)(dst + 64 * r),
                            _mm256_broadcastsi128_si256(_mm256_castsi256_si128(words)));
        _mm256_storeu_si256((__m256i *)(void *)(dst + 64 * r + 64),
                            _mm256_broadcastsi128_si256(_mm256_extracti128_si256(words, 1)));
    }
}

/* 1 + q / 64 of the integer at bits 17 … 22. */
CPU_INLINE vf one_and_64ths(vi x) {
    return vf_cast(_mm512_ternarylogic_epi32(x, vi_set1(0x7e0000), vi_set1(0x3f800000), 0xea));
}

CPU_INLINE void unpack_row_6(const uint8_t *w, const struct factors *f, int r, uint8_t *dst) {
    vi v[3];
    vf x[16];
    CPU_UNROLL
    for (int i = 0; i < 3; i++) v[i] = keep(vi_load(w + 192 * r + 64 * i));
    CPU_UNROLL
    for (int i = 0; i < 3; i++) {
        x[5 * i] = one_and_64ths(v[i]);
        x[5 * i + 1] = one_and_64ths(_mm512_ror_epi32(v[i], 6));
        x[5 * i + 2] = one_and_64ths(_mm512_ror_epi32(v[i], 12));
        x[5 * i + 3] = one_and_64ths(_mm512_ror_epi32(v[i], 18));
        x[5 * i + 4] = one_and_64ths(_mm512_ror_epi32(v[i], 24));
    }
    /* Two bits of each. */
    vi last = _mm512_ternarylogic_epi32(vi_set1(0x60000), vi_shl(v[0], 2), vi_shl(v[1], 4), 0xca);
    last = _mm512_ternarylogic_epi32(vi_set1(0x600000), vi_shl(v[2], 6), last, 0xca);
    x[15] = one_and_64ths(last);
    CPU_UNROLL
    for (int b = 0; b < UNIT_BLOCKS; b++)
        vi_store(dst + b * TILE_BYTES + 64 * r, to_bf16(weights_of(f, 2 * b, r, x[2 * b]),
                                                        weights_of(f, 2 * b + 1, r, x[2 * b + 1])));
}

CPU_INLINE void unpack_row_8(const uint8_t *w, const struct factors *f, int r, uint8_t *dst) {
    vf d = vf_set1(f->scale[0][r]);
    vi_store(dst + 64 * r, to_bf16(vf_mul(vf_from_int(vi_from_i8(w + 32 * r)), d),
                                   vf_mul(vf_from_int(vi_from_i8(w + 32 * r + 16)), d)));
}

CPU_INLINE void unpack_row(enum cpu_format format, const uint8_t *w, const struct factors *f, int r,
                           uint8_t *dst) {
    switch (format) {
    case CPU_Q4_K: unpack_row_4(w, r, dst); break;
    case CPU_Q5_K: unpack_row_5(w, r, dst); break;
    case CPU_Q6_K: unpack_row_6(w, f, r, dst); break;
    default: unpack_row_8(w, f, r, dst); break;
    }
}

/* ---- products ------------------------------------------------------------------------------------------ */

/* Tiles 0 … n - 1 are sums. A tile that is loaded waits for the last product that reads it, so operands alternate. */
#define ADD_PRODUCT(i, left, right)                                                                \
    do {                                                                                           \
        TILE_LOAD(right, x + (i)*stride);                                                          \
        _tile_dpbf16ps(i, left, right);                                                            \
    } while (0)
#define ADD_2(left, right0, right1)                                                                \
    do {                                                                                           \
        TILE_LOAD(left, w);                                                                        \
        ADD_PRODUCT(0, left, right0);                                                              \
        if (n > 1) ADD_PRODUCT(1, left, right1);                                                   \
    } while (0)
#define ADD_4(left)                                                                                \
    do {                                                                                           \
        TILE_LOAD(left, w);                                                                        \
        ADD_PRODUCT(0, left, 6);                                                                   \
        ADD_PRODUCT(1, left, 7);                                                                   \
        ADD_PRODUCT(2, left, 6);                                                                   \
        if (n > 3) ADD_PRODUCT(3, left, 7);                                                        \
    } while (0)

/* A block of weights times n tiles of tokens, which lie `stride` bytes apart. n is known at compile time. */
CPU_INLINE void multiply(bool odd, const uint8_t *w, const uint8_t *x, size_t stride, int n) {
    if (n <= 2 && odd)
        ADD_2(2, 4, 5);
    else if (n <= 2)
        ADD_2(3, 6, 7);
    else if (odd)
        ADD_4(4);
    else
        ADD_4(5);
}

CPU_INLINE void zero_sums(int n) {
    _tile_zero(0);
    if (n > 1) _tile_zero(1);
    if (n > 2) _tile_zero(2);
    if (n > 3) _tile_zero(3);
}

/* Four 32-bit columns of sixteen rows, from row r at rows[r]: y[c], lane by lane. */
CPU_INLINE void transpose_four(const uint8_t *const *rows, size_t offset, __m512 *y) {
    __m512 x[4];
    CPU_UNROLL
    for (int i = 0; i < 4; i++) { /* rows i, i + 4, i + 8, i + 12, a 128-bit lane each */
        const uint8_t *const *r = rows + i;
#define FOUR_OF(row) _mm_loadu_ps((const float *)(const void *)((row) + offset))
        x[i] = _mm512_broadcast_f32x4(FOUR_OF(r[0]));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, FOUR_OF(r[4]));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, FOUR_OF(r[8]));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, FOUR_OF(r[12]));
#undef FOUR_OF
    }
    __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    y[0] = _mm512_shuffle_ps(a, c, 0x44);
    y[1] = _mm512_shuffle_ps(a, c, 0xee);
    y[2] = _mm512_shuffle_ps(b, d, 0x44);
    y[3] = _mm512_shuffle_ps(b, d, 0xee);
}

typedef float sum_tiles[MOST_TOKEN_TILES][CPU_ROWS][TILE_TOKENS];

CPU_INLINE void take_sums(int n, sum_tiles sums) {
    _tile_stored(0, sums[0], 64);
    if (n > 1) _tile_stored(1, sums[1], 64);
    if (n > 2) _tile_stored(2, sums[2], 64);
    if (n > 3) _tile_stored(3, sums[3], 64);
    zero_sums(n);
    __asm__ volatile("" ::: "memory");
}

/* A row tile's products of job->n tokens, in n tiles, to out. */
CPU_INLINE void store_products(const struct cpu_dot *job, sum_tiles sums, int n, float *out) {
    for (int i = 0; i < n; i++) {
        const uint8_t *rows[CPU_ROWS];
        CPU_UNROLL
        for (int r = 0; r < CPU_ROWS; r++) rows[r] = (const uint8_t *)sums[i][r];
        int end = job->n < TILE_TOKENS * (i + 1) ? job->n : TILE_TOKENS * (i + 1);
        for (int t = TILE_TOKENS * i; t < end; t += 4) {
            __m512 y[4];
            transpose_four(rows, (size_t)(t % TILE_TOKENS) * 4, y);
            CPU_UNROLL
            for (int j = 0; j < 4; j++)
                if (t + j < end) vf_store(out + (size_t)(t + j) * job->stride, y[j]);
        }
    }
}

/* total += d * sums - dmin * minima, of a unit of Q4_K or Q5_K whose d and dmin are at d_at. */
CPU_INLINE void add_unit(const uint8_t *d_at, sum_tiles sums, sum_tiles minima, int n, bool first,
                         sum_tiles total) {
    _Alignas(64) float d[CPU_ROWS], dmin[CPU_ROWS];
    vf_store(d, vf_from_f16(d_at));
    vf_store(dmin, vf_from_f16(d_at + 32));
    for (int i = 0; i < n; i++) {
        CPU_UNROLL
        for (int r = 0; r < CPU_ROWS; r++) {
            vf y = first ? vf_zero() : vf_load(total[i][r]);
            y = vf_fma(vf_load(sums[i][r]), vf_set1(d[r]), y);
            vf_store(total[i][r], vf_fnma(vf_load(minima[i][r]), vf_set1(dmin[r]), y));
        }
    }
}

/* Every step unpacks unit i and multiplies unit i - 1. */
CPU_INLINE void dot_tiles(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                          int n) {
    const bool scaled_after = format == CPU_Q4_K || format == CPU_Q5_K;
    const int d_at = format == CPU_Q4_K ? CPU_Q4_K_D : CPU_Q5_K_D;
    const int sc_at = format == CPU_Q4_K ? CPU_Q4_K_SC : CPU_Q5_K_SC;
    const int m_at = format == CPU_Q4_K ? CPU_Q4_K_M : CPU_Q5_K_M;
    const int unit_blocks = format == CPU_Q8_0 ? 1 : UNIT_BLOCKS;
    const int block_rows = CPU_ROWS / unit_blocks, lines = (unit_bytes / unit_blocks + 63) / 64;
    const int32_t n_units = job->n_tiles * job->n_units, n_blocks = job->n_units * unit_blocks;
    const size_t stride =
        (size_t)(n_blocks + (n_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS) * TILE_BYTES;
    _Alignas(64) uint8_t unpacked[2][UNIT_BLOCKS * TILE_BYTES];
    _Alignas(64) uint8_t scales[2][TILE_BYTES], minima[2][TILE_BYTES];
    _Alignas(64) struct factors f;
    _Alignas(64) sum_tiles sums, total, minimum_sums;
    const uint8_t *w = job->w, *x = job->x;
    float *out = job->out;
    int32_t block = 0; /* of the row tile, multiplied next */
    configure_tiles();
    zero_sums(n);
    if (scaled_after) {
        memset(scales, 0, sizeof scales);
        memset(minima, 0, sizeof minima);
    }
    for (int32_t i = 0; i <= n_units; i++, w += unit_bytes) {
        uint8_t *fresh = unpacked[i % 2], *ready = unpacked[(i + 1) % 2];
        if (i < n_units && scaled_after) {
            unpack_per_block(w + sc_at, format == CPU_Q4_K ? 8 : 16, scales[i % 2]);
            unpack_per_block(w + m_at, 1, minima[i % 2]);
        }
        if (i < n_units && !scaled_after) load_factors(w, format, &f);
        for (int b = 0; b < unit_blocks; b++) {
            if (i < n_units) {
                prefetch(job, w + b * unit_bytes / unit_blocks, lines);
                for (int r = b * block_rows; r < (b + 1) * block_rows; r++)
                    unpack_row(format, w, &f, r, fresh);
            }
            if (i == 0) continue;
            multiply(block % 2 == 1, ready + b * TILE_BYTES, x + (size_t)block * TILE_BYTES, stride,
                     n);
            block++;
        }
        if (i > 0 && scaled_after) {
            int32_t unit = block / UNIT_BLOCKS - 1;
            const uint8_t *x_sums = x + (size_t)(n_blocks + unit) * TILE_BYTES;
            multiply(false, scales[(i + 1) % 2], x_sums, stride, n);
            take_sums(n, sums);
            multiply(true, minima[(i + 1) % 2], x_sums, stride, n);
            take_sums(n, minimum_sums);
            add_unit(w - unit_bytes + d_at, sums, minimum_sums, n, unit == 0, total);
        }
        if (block < n_blocks) continue;
        if (!scaled_after) take_sums(n, total);
        store_products(job, total, n, out);
        out += CPU_ROWS;
        block = 0;
    }
}

/* ---- tokens to BF16 ------------------------------------------------------------------------------------- */

CPU_INLINE vf low_half(vi words) { return vf_cast(_mm512_slli_epi32(words, 16)); }
CPU_INLINE vf high_half(vi words) { return vf_cast(vi_and(words, vi_set1((int32_t)0xffff0000))); }

/* A block of a row, and the parts of its sum. */
CPU_INLINE void bf16_block(const float *x, uint8_t *row, uint8_t *row_sums, int32_t block) {
    vi words = to_bf16(vf_load(x), vf_load(x + 16));
    vi_store(row + 64 * (size_t)block, words);
    float sum = vf_sum(vf_add(low_half(words), high_half(words)));
    vi high = to_bf16(vf_set1(sum), vf_zero());
    vi low = to_bf16(vf_sub(vf_set1(sum), low_half(high)), vf_zero());
    uint8_t *parts = row_sums + 64 * (size_t)(block / UNIT_BLOCKS);
    memcpy(parts + 2 * (block % UNIT_BLOCKS), &high, 2);
    memcpy(parts + 16 + 2 * (block % UNIT_BLOCKS), &low, 2);
}

static void k_bf16_row(const float *x, int32_t n, int planes, uint8_t *row) {
    (void)planes;
    memset(row + 2 * (size_t)n, 0, cpu_bf16_row_bytes(n) - 2 * (size_t)n);
    for (int32_t b = 0; b < n / CPU_BLOCK; b++)
        bf16_block(x + b * CPU_BLOCK, row, row + 2 * (size_t)n, b);
}

/* 64 bytes of a row to column t of a tile. */
CPU_INLINE void scatter(const uint8_t *row, uint8_t *tile, int t) {
    CPU_UNROLL
    for (int i = 0; i < 16; i++) memcpy(tile + 64 * i + 4 * t, row + 4 * i, 4);
}

static void k_bf16(const float *x, int32_t n, int planes, uint8_t *tile, int t, int n_tokens) {
    (void)planes, (void)n_tokens;
    const int32_t n_blocks = n / CPU_BLOCK;
    tile += (size_t)(t / TILE_TOKENS) * TILE_TOKENS * cpu_bf16_row_bytes(n);
    for (int32_t first = 0; first < n_blocks; first += UNIT_BLOCKS) {
        _Alignas(64) uint8_t blocks[UNIT_BLOCKS * 64], sums[64] = {0};
        for (int b = 0; b < UNIT_BLOCKS && first + b < n_blocks; b++) {
            bf16_block(x + (first + b) * CPU_BLOCK, blocks, sums, b);
            scatter(blocks + 64 * b, tile + (size_t)(first + b) * TILE_BYTES, t % TILE_TOKENS);
        }
        scatter(sums, tile + (size_t)(n_blocks + first / UNIT_BLOCKS) * TILE_BYTES,
                t % TILE_TOKENS);
    }
}

static void k_bf16_block(const float *x, int n_rows, int32_t block, int32_t n, int planes,
                         uint8_t *rows) {
    (void)planes;
    for (int i = 0; i < n_rows; i++, rows += cpu_bf16_row_bytes(n))
        bf16_block(x + i * CPU_BLOCK, rows, rows + 2 * (size_t)n, block);
}

/* Sixteen tokens; of fewer, the last ones are the first again. */
static void k_gather_bf16(const uint8_t *const *rows, int n_tokens, int32_t n, int planes,
                          uint8_t *tile) {
    (void)planes;
    for (int t = 0; t < n_tokens; t += TILE_TOKENS) {
        const uint8_t *sixteen[TILE_TOKENS];
        for (int i = 0; i < TILE_TOKENS; i++) sixteen[i] = rows[t + i < n_tokens ? t + i : t];
        for (size_t at = 0; at < cpu_bf16_row_bytes(n); at += 16, tile += TILE_BYTES / 4) {
            __m512 y[4];
            transpose_four(sixteen, at, y);
            CPU_UNROLL
            for (int i = 0; i < 4; i++) vf_store(tile + 64 * i, y[i]);
        }
    }
}

/* ---- one function per format and tile width ------------------------------------------------------------ */

#define AMX_DOT(name, format, n)                                                                   \
    static void k_dot_##name##_amx_##n(const struct cpu_dot *job) {                                \
        dot_tiles(job, format, format##_UNIT, n);                                                  \
    }
#define AMX_DOTS(name, format)                                                                     \
    AMX_DOT(name, format, 1)                                                                       \
    AMX_DOT(name, format, 2) AMX_DOT(name, format, 3) AMX_DOT(name, format, 4)
AMX_DOTS(q4_k, CPU_Q4_K)
AMX_DOTS(q5_k, CPU_Q5_K)
AMX_DOTS(q6_k, CPU_Q6_K)
AMX_DOTS(q8_0, CPU_Q8_0)

/* What AMX does differently from `avx512`. */
static void amx_table(struct cpu_kernels *k, const struct cpu_kernels *avx512) {
#define AMX_ROW(name)                                                                              \
    { k_dot_##name##_amx_1, k_dot_##name##_amx_2, k_dot_##name##_amx_3, k_dot_##name##_amx_4 }
    static cpu_dot_fn *const dots[CPU_N_QUANTS][MOST_TOKEN_TILES] = {AMX_ROW(q4_k), AMX_ROW(q5_k),
                                                                     AMX_ROW(q6_k), AMX_ROW(q8_0)};
    fill_scaled();
    *k = *avx512;
    k->layout = CPU_BY_ROW;
    k->max_tile = CPU_TILE;
    for (int f = 0; f < CPU_N_QUANTS; f++)
        for (int n = 1; n <= CPU_TILE; n++)
            k->dot[f][0][n] = k->dot[f][1][n] = dots[f][(n - 1) / TILE_TOKENS];
    k->quantize = k_bf16;
    k->quantize_row = k_bf16_row;
    k->quantize_block = k_bf16_block;
    k->gather = k_gather_bf16;
}

#endif
