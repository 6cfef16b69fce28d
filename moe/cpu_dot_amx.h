/* cpu_dot_amx: products of weight row tiles with tokens by AMX's integer tiles. Included by cpu_kernels_amx.c, and by the
 * test that computes the tiles' operations itself; see cpu_kernels.h for layouts.
 *
 * A weight of a superblock is a float times an integer, scale times quant, and these integers are too long for a byte: they
 * go in two parts, made on the way. Of Q4_K and Q5_K a scale of six bits is cut in two such that each part times the
 * quant fits a byte, so that one 16-bit product makes two bytes; of Q6_K the product itself is cut. With two bytes of
 * each activation that makes four sums, which leave the tiles once per 256 columns and are one integer there. Nothing is
 * rounded before that, so a (row, token) pair's result does not depend on the tile it was computed in, nor on whether a
 * tile computed it: up to three tokens, for which unpacking does not pay, are multiplied by vectors.
 *
 * Tokens are the left operand, eight to a tile, each with its high and its low bytes, or sixteen with one byte; and
 * weights the right one, as they lie: a row to a lane. While one unit is multiplied, the next is unpacked and the sums
 * of the last are added up. */
#ifndef MOED_MOE_CPU_DOT_AMX_H
#define MOED_MOE_CPU_DOT_AMX_H

#include "moe/cpu_block.h"

enum {
    TILE_BYTES = 1024,
    TILE_ROWS = 16,
    FEW_TOKENS = 3, /* by vectors */
    STEP_COLS = 64, /* of one tile product */
    UNIT_STEPS = QK_K / STEP_COLS,
    UNIT_BLOCKS = QK_K / CPU_BLOCK
};

/* What LDTILECFG reads: eight tiles of n_rows rows by row_bytes. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
};

/* Tiles 0 … 3 are sums, 4 and 5 tokens, 6 and 7 weights. A product takes a clock for each row of tokens, and 16 at least
 * with new weights. A thread keeps its tiles configured, since that takes as long as hundreds of weights do: a context
 * switch saves 8 KiB more, and Linux releases tiles before a core sleeps. */
static void configure_tiles(int n_rows, int n_cols) {
    static _Thread_local int rows, cols;
    if (rows == n_rows && cols == n_cols) return;
    struct tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? n_cols : 64);
        c.n_rows[i] = (uint8_t)(i < 6 ? n_rows : n_cols / 4);
    }
    /* GCC's intrinsics for tiles do not tell the compiler which memory they read. */
    __asm__ volatile("" ::"r"(&c) : "memory");
    _tile_loadconfig(&c);
    rows = n_rows;
    cols = n_cols;
}

/* ---- weights to bytes ---------------------------------------------------------------------------------- */

struct unit {
    uint8_t parts[UNIT_STEPS][2][TILE_BYTES]; /* high, low; [columns / 4][row][4] */
    /* What meets the sums of tokens' values: minima per 32 columns, or scales per 16. */
    int16_t groups[8][CPU_ROWS][2];
    float d[CPU_ROWS], dmin[CPU_ROWS];
};

/* Words (byte, 0) of which each lane's byte is one. */
CPU_INLINE vi byte_words(const uint8_t *p) {
    vi x = vi_from_u8(p);
    return vi_or(x, vi_shl(x, 16));
}

/* a's bits where the mask is set, or b's, which has none there. */
CPU_INLINE vi masked_or(vi a, vi b, vi mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xec); }

/* How many bits of a scale are its low part. */
CPU_INLINE int low_bits(enum cpu_format format) { return format == CPU_Q4_K ? 2 : 3; }
/* What the sums of high parts count, as a power of two. */
CPU_INLINE int high_shift(enum cpu_format format) {
    return format == CPU_Q6_K ? 8 : low_bits(format);
}

CPU_INLINE void unpack_block(enum cpu_format format, const uint8_t *w, int b, struct unit *u) {
    uint8_t *high = u->parts[b / 2][0] + b % 2 * 512, *low = u->parts[b / 2][1] + b % 2 * 512;
    vi q[8];
    if (format == CPU_Q6_K) {
        const vi first = _mm512_set1_epi16(0x00ff), second = _mm512_set1_epi16((int16_t)0xff00);
        unpack_q6_k(w, b, q);
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            vi even = byte_words(w + CPU_Q6_K_SC + 32 * b + 16 * half);
            vi odd = _mm512_slli_epi16(even, 8);
            CPU_UNROLL
            for (int g = 4 * half; g < 4 * half + 4; g++) {
                vi x = _mm512_maddubs_epi16(q[g], even), y = _mm512_maddubs_epi16(q[g], odd);
                vi_store(high + 64 * g, masked_or(y, _mm512_srli_epi16(x, 8), second));
                vi_store(low + 64 * g, masked_or(x, _mm512_slli_epi16(y, 8), first));
            }
        }
        return;
    }
    const int bits = low_bits(format);
    unpack_scale_min(w, format == CPU_Q5_K, b, q);
    vi scale = byte_words(w + (format == CPU_Q4_K ? CPU_Q4_K_SC : CPU_Q5_K_SC) + 16 * b);
    vi scale_high = _mm512_srli_epi16(scale, (unsigned)bits);
    vi scale_low = vi_and(scale, _mm512_set1_epi16((int16_t)((1 << bits) - 1)));
    CPU_UNROLL
    for (int g = 0; g < 8; g++) { /* two quants at once: no product is above 255 */
        vi_store(high + 64 * g, _mm512_mullo_epi16(q[g], scale_high));
        vi_store(low + 64 * g, _mm512_mullo_epi16(q[g], scale_low));
    }
}

/* What the blocks have in common. */
CPU_INLINE void unpack_rest(enum cpu_format format, const uint8_t *w, struct unit *u) {
    if (format == CPU_Q6_K) {
        const uint8_t *sc = w + CPU_Q6_K_SC;
        CPU_UNROLL
        for (int i = 0; i < 8; i++)
            vi_store(u->groups[i],
                     masked_or(vi_from_i8(sc + 32 * i), vi_shl(vi_from_i8(sc + 32 * i + 16), 16),
                               vi_set1(0xffff)));
        vf_store(u->d, vf_load(w + CPU_Q6_K_D));
        return;
    }
    const uint8_t *m = w + (format == CPU_Q4_K ? CPU_Q4_K_M : CPU_Q5_K_M);
    const uint8_t *d = w + (format == CPU_Q4_K ? CPU_Q4_K_D : CPU_Q5_K_D);
    CPU_UNROLL
    for (int i = 0; i < 4; i++)
        vi_store(u->groups[i],
                 vi_or(vi_from_u8(m + 32 * i), vi_shl(vi_from_u8(m + 32 * i + 16), 16)));
    vf_store(u->d, vf_from_f16(d));
    vf_store(u->dmin, vf_from_f16(d + 32));
}

/* ---- sums to results ----------------------------------------------------------------------------------- */

/* What a unit's results need beside the sums. */
struct rest {
    vi groups[8];
    vf d, dmin;
};

CPU_INLINE struct rest load_rest(enum cpu_format format, const struct unit *u) {
    struct rest r;
    const int n_groups = format == CPU_Q6_K ? 8 : 4;
    CPU_UNROLL
    for (int i = 0; i < n_groups; i++) r.groups[i] = vi_load(u->groups[i]);
    r.d = vf_load(u->d);
    r.dmin = format == CPU_Q6_K ? vf_zero() : vf_load(u->dmin);
    return r;
}

CPU_INLINE float scale_of(const uint8_t *tail) {
    float scale;
    memcpy(&scale, tail + CPU_X_SCALE, sizeof scale);
    return scale;
}

/* total + the unit's share of a token, of which s is the sum of scale * quant * value. */
CPU_INLINE vf add_unit(enum cpu_format format, const struct rest *r, vi s, const uint8_t *tail,
                       vf total) {
    const uint8_t *sums = tail + (format == CPU_Q6_K ? CPU_X_SUMS_16 : CPU_X_SUMS_32);
    const int n_groups = format == CPU_Q6_K ? 8 : 4;
    vi m = vi_zero();
    vf y;
    CPU_UNROLL
    for (int i = 0; i < n_groups; i++)
        m = _mm512_dpwssd_epi32(m, r->groups[i], broadcast4(sums + 4 * i));
    if (format == CPU_Q6_K) /* quants were taken as 0 … 63 */
        y = vf_mul(vf_from_int(vi_sub(s, vi_shl(m, 5))), r->d);
    else
        y = vf_fnma(vf_from_int(m), r->dmin, vf_mul(vf_from_int(s), r->d));
    return vf_fma(y, vf_set1(scale_of(tail)), total);
}

/* Of tokens: how many planes, their size, and where the tails begin in the first. */
struct planes {
    int n;
    size_t bytes, tails;
};

CPU_INLINE struct planes planes_of(int32_t n_cols, int planes) {
    return (struct planes){planes, cpu_x_plane_bytes(n_cols),
                           ((size_t)n_cols + QK_K - 1) / QK_K * QK_K};
}

CPU_INLINE size_t row_bytes(struct planes p) { return (size_t)p.n * p.bytes; }

/* ---- few tokens ---------------------------------------------------------------------------------------- */

/* Block b's sums of scale * quant * value of n tokens. */
CPU_INLINE void add_block(enum cpu_format format, const uint8_t *w, int b, const uint8_t *x,
                          struct planes p, int n, vi *s) {
    vi q[8], scale[2];
    if (format == CPU_Q6_K) {
        unpack_q6_k(w, b, q);
        scale[0] = vi_from_i8(w + CPU_Q6_K_SC + 32 * b);
        scale[1] = vi_from_i8(w + CPU_Q6_K_SC + 32 * b + 16);
    } else {
        unpack_scale_min(w, format == CPU_Q5_K, b, q);
        scale[0] = vi_from_u8(w + (format == CPU_Q4_K ? CPU_Q4_K_SC : CPU_Q5_K_SC) + 16 * b);
    }
    const int n_scales = format == CPU_Q6_K ? 2 : 1, count = 8 / n_scales;
    CPU_UNROLL
    for (int t = 0; t < n; t++) {
        const uint8_t *high = x + (size_t)t * row_bytes(p) + b * CPU_BLOCK, *low = high + p.bytes;
        CPU_UNROLL
        for (int i = 0; i < n_scales; i++) {
            vi h = vi_zero(), l = vi_zero();
            CPU_UNROLL
            for (int g = i * count; g < (i + 1) * count; g++) {
                h = vi_dot(h, q[g], broadcast4(high + 4 * g));
                if (p.n == 2) l = vi_dot(l, q[g], broadcast4(low + 4 * g));
            }
            if (p.n == 2) h = vi_add(l, vi_shl(h, 8));
            s[t] = vi_add(s[t], _mm512_mullo_epi32(h, scale[i]));
        }
    }
}

CPU_INLINE void dot_few(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                        int planes, int n) {
    const struct planes p = planes_of(job->n_units * QK_K, planes);
    const int lines = (unit_bytes / UNIT_BLOCKS + 63) / 64;
    const uint8_t *w = job->w;
    _Alignas(64) struct unit u;
    for (int32_t tile = 0; tile < job->n_tiles; tile++) {
        vf total[FEW_TOKENS];
        CPU_UNROLL
        for (int t = 0; t < n; t++) total[t] = vf_zero();
        for (int32_t i = 0; i < job->n_units; i++, w += unit_bytes) {
            const uint8_t *x = job->x + i * QK_K, *tail = job->x + p.tails + i * CPU_X_TAIL;
            vi s[FEW_TOKENS];
            CPU_UNROLL
            for (int t = 0; t < n; t++) s[t] = vi_zero();
            for (int b = 0; b < UNIT_BLOCKS; b++) {
                prefetch(job, w + b * unit_bytes / UNIT_BLOCKS, lines);
                add_block(format, w, b, x, p, n, s);
            }
            unpack_rest(format, w, &u);
            struct rest rest = load_rest(format, &u);
            CPU_UNROLL
            for (int t = 0; t < n; t++, tail += row_bytes(p))
                total[t] = add_unit(format, &rest, s[t], tail, total[t]);
        }
        CPU_UNROLL
        for (int t = 0; t < n; t++)
            vf_store(job->out + (size_t)t * job->stride + tile * CPU_ROWS, total[t]);
    }
}

/* ---- many ---------------------------------------------------------------------------------------------- */

/* Of a pass, [tile of tokens][high or low weights]. */
typedef int32_t sum_tiles[2][2][TILE_ROWS][CPU_ROWS];

#define TILE_LOAD(tile, p, stride)                                                                 \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_loadd(tile, p, stride);                                                              \
    } while (0)

/* A pass's first product goes into tile `sum` when what the pass before left there has gone to memory. Not all four go at
 * once: a tile waits for its last product. */
#define TAKE(sum, to)                                                                              \
    do {                                                                                           \
        if (!(to)) break;                                                                          \
        _tile_stored(sum, (to)[sum / 2][sum % 2], 64);                                             \
        _tile_zero(sum);                                                                           \
    } while (0)
#define MULTIPLY_HIGH(format, sum, x)                                                              \
    do {                                                                                           \
        if ((format) == CPU_Q6_K)                                                                  \
            _tile_dpbssd(sum, x, 6);                                                               \
        else                                                                                       \
            _tile_dpbsud(sum, x, 6);                                                               \
    } while (0)

/* One or two tiles of tokens, from x and x + next on, times a step's weights. take: where the sums so far go, or NULL. */
CPU_INLINE void multiply(enum cpu_format format, int n_tiles, const uint8_t *parts,
                         const uint8_t *x, size_t stride, size_t next, sum_tiles take) {
    TILE_LOAD(6, parts, 64);
    TILE_LOAD(4, x, stride);
    TAKE(0, take);
    MULTIPLY_HIGH(format, 0, 4);
    if (n_tiles > 1) {
        TILE_LOAD(5, x + next, stride);
        TAKE(2, take);
        MULTIPLY_HIGH(format, 2, 5);
    }
    TILE_LOAD(7, parts + TILE_BYTES, 64);
    TAKE(1, take);
    _tile_dpbsud(1, 4, 7);
    if (n_tiles > 1) {
        TAKE(3, take);
        _tile_dpbsud(3, 5, 7);
    }
    if (take) __asm__ volatile("" ::: "memory");
}

CPU_INLINE void take_sums(int n_tiles, sum_tiles sums) {
    TAKE(0, sums);
    TAKE(1, sums);
    if (n_tiles > 1) {
        TAKE(2, sums);
        TAKE(3, sums);
    }
    __asm__ volatile("" ::: "memory");
}

/* What is to be done with the sums of a pass over a unit. */
struct fold {
    const struct unit *u;
    const int32_t *sums; /* sum_tiles */
    const uint8_t *tail; /* of the first token */
    const float *total; /* so far, [token][CPU_ROWS]; NULL: nothing */
    float *dst;
    size_t dst_stride, row_bytes;
    int height, n; /* tokens of a tile, and in all */
};

/* Tokens from … to - 1. */
CPU_INLINE void fold_tokens(enum cpu_format format, int planes, const struct fold *f, int from,
                            int to) {
    if (to > f->n) to = f->n;
    if (from >= to) return;
    const int shift = high_shift(format);
    const struct rest rest = load_rest(format, f->u);
    for (int t = from; t < to; t++) {
        int tile = t >= f->height;
        const int32_t *high =
            f->sums + (2 * tile * TILE_ROWS + planes * (t - tile * f->height)) * CPU_ROWS;
        const int32_t *low = high + TILE_ROWS * CPU_ROWS;
        vi s = vi_add(vi_shl(vi_load(high), shift), vi_load(low));
        if (planes == 2) { /* rows of low bytes after those of high ones */
            s = vi_add(vi_shl(s, 8), vi_shl(vi_load(high + CPU_ROWS), shift));
            s = vi_add(s, vi_load(low + CPU_ROWS));
        }
        vf total = f->total ? vf_load(f->total + t * CPU_ROWS) : vf_zero();
        vf_store(f->dst + (size_t)t * f->dst_stride,
                 add_unit(format, &rest, s, f->tail + (size_t)t * f->row_bytes, total));
    }
}

/* In passes of one tile of tokens or two, all of one height. During a pass its predecessor's sums are taken, then added up, and
 * the next unit is unpacked. */
CPU_INLINE void dot_units(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                          int planes, int n_tiles) {
    _Alignas(64) struct unit unpacked[2];
    _Alignas(64) sum_tiles sums;
    _Alignas(64) float total[CPU_TILE][CPU_ROWS];
    const int most = n_tiles * TILE_ROWS / planes, n_passes = (job->n + most - 1) / most;
    const int height = (job->n + n_passes * n_tiles - 1) / (n_passes * n_tiles),
              n_pass = n_tiles * height;
    const int lines = (unit_bytes / UNIT_BLOCKS + 63) / 64,
              n_blocks = n_passes == 1 ? 2 : 1; /* a step */
    const int part =
        (n_pass + UNIT_STEPS - 2) / (UNIT_STEPS - 1); /* tokens added up per step after the first */
    const struct planes p = planes_of(job->n_units * QK_K, planes);
    const size_t next_tile = (size_t)height * row_bytes(p);
    const int32_t n_units = job->n_tiles * job->n_units;
    const uint8_t *next = job->w;
    float *out = job->out;
    struct fold last = {.n = 0};
    configure_tiles(planes * height, STEP_COLS);
    take_sums(n_tiles, sums); /* for the zeros */
    unpack_rest(format, next, &unpacked[0]);
    for (int b = 0; b < UNIT_BLOCKS; b++) unpack_block(format, next, b, &unpacked[0]);
    for (int32_t i = 0, column = 0; i < n_units; i++) {
        const struct unit *u = &unpacked[i % 2];
        struct unit *fresh = &unpacked[(i + 1) % 2];
        const bool first = column == 0, final = column == job->n_units - 1;
        int b = i + 1 < n_units ? 0 : UNIT_BLOCKS;
        next += unit_bytes;
        for (int t = 0; t < job->n; t += n_pass) {
            const uint8_t *x = job->x + (size_t)t * row_bytes(p) + column * QK_K;
            CPU_UNROLL
            for (int s = 0; s < UNIT_STEPS; s++) {
                multiply(format, n_tiles, u->parts[s][0], x + s * STEP_COLS, p.bytes, next_tile,
                         s == 0 ? sums : NULL);
                if (s > 0) fold_tokens(format, planes, &last, (s - 1) * part, s * part);
                for (int end = b + n_blocks; b < end && b < UNIT_BLOCKS; b++) {
                    prefetch(job, next + b * unit_bytes / UNIT_BLOCKS, lines);
                    unpack_block(format, next, b, fresh);
                }
            }
            last = (struct fold){.u = u,
                                 .sums = sums[0][0][0],
                                 .tail = x + p.tails - column * (QK_K - CPU_X_TAIL),
                                 .total = first ? NULL : total[t],
                                 .dst = final ? out + (size_t)t * job->stride : total[t],
                                 .dst_stride = final ? job->stride : CPU_ROWS,
                                 .row_bytes = row_bytes(p),
                                 .height = height,
                                 .n = job->n - t < n_pass ? job->n - t : n_pass};
        }
        if (i + 1 < n_units) unpack_rest(format, next, fresh);
        if (++column < job->n_units) continue;
        column = 0;
        out += CPU_ROWS;
    }
    take_sums(n_tiles, sums);
    fold_tokens(format, planes, &last, 0, n_pass);
}

CPU_INLINE void dot_superblocks(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                                int planes) {
    if (job->n == 1)
        dot_few(job, format, unit_bytes, planes, 1);
    else if (job->n == 2)
        dot_few(job, format, unit_bytes, planes, 2);
    else if (job->n == FEW_TOKENS)
        dot_few(job, format, unit_bytes, planes, FEW_TOKENS);
    else if (job->n <= TILE_ROWS / planes)
        dot_units(job, format, unit_bytes, planes, 1);
    else
        dot_units(job, format, unit_bytes, planes, 2);
}

/* Q8_0 has a scale per 32 columns, and needs no unpacking. */
CPU_INLINE void dot_blocks(const struct cpu_dot *job, int planes) {
    _Alignas(64) int32_t sums[TILE_ROWS][CPU_ROWS];
    _Alignas(64) float total[CPU_TILE][CPU_ROWS];
    const struct planes p = planes_of(job->n_units * CPU_BLOCK, planes);
    const int most = TILE_ROWS / planes, n_tiles = (job->n + most - 1) / most;
    const int height = (job->n + n_tiles - 1) / n_tiles;
    const uint8_t *w = job->w;
    configure_tiles(planes * height, CPU_BLOCK);
    for (int32_t tile = 0; tile < job->n_tiles; tile++) {
        memset(total, 0, (size_t)job->n * sizeof *total);
        for (int32_t b = 0; b < job->n_units; b++, w += CPU_Q8_0_UNIT) {
            prefetch(job, w, CPU_Q8_0_UNIT / 64);
            vf d = vf_load(w + CPU_Q8_0_D);
            TILE_LOAD(6, w, 64);
            for (int from = 0; from < job->n; from += height) {
                const uint8_t *x = job->x + (size_t)from * row_bytes(p);
                TILE_LOAD(4, x + b * CPU_BLOCK, p.bytes);
                _tile_zero(0);
                _tile_dpbsud(0, 4, 6);
                _tile_stored(0, sums, 64);
                __asm__ volatile("" ::: "memory");
                const uint8_t *tail = x + p.tails + b / UNIT_BLOCKS * CPU_X_TAIL;
                for (int t = from; t < job->n && t < from + height; t++, tail += row_bytes(p)) {
                    int16_t sum;
                    memcpy(&sum, tail + CPU_X_SUMS_32 + 2 * (b % UNIT_BLOCKS), sizeof sum);
                    vi s = vi_load(sums[planes * (t - from)]);
                    if (planes == 2) s = vi_add(vi_shl(s, 8), vi_load(sums[2 * (t - from) + 1]));
                    s = vi_sub(s, vi_set1(128 * sum)); /* quants were taken as 0 … 255 */
                    vf y = vf_mul(vf_from_int(s), d);
                    vf_store(total[t], vf_fma(y, vf_set1(scale_of(tail)), vf_load(total[t])));
                }
            }
        }
        for (int t = 0; t < job->n; t++)
            vf_store(job->out + (size_t)t * job->stride + tile * CPU_ROWS, vf_load(total[t]));
    }
}

/* ---- tokens to integers ------------------------------------------------------------------------------- */

/* The sums of sixteen vectors, of x[i] in lane i. */
CPU_INLINE vi sums_of(const vi *x) {
    vi a[8], b[4], c[2];
    CPU_UNROLL
    for (int i = 0; i < 8; i++)
        a[i] = vi_add(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]),
                      _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
    CPU_UNROLL
    for (int i = 0; i < 4; i++)
        b[i] = vi_add(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]),
                      _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
#define EVEN_AND_ODD_LANES(x, y)                                                                   \
    vi_add(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd))
    CPU_UNROLL
    for (int i = 0; i < 2; i++) c[i] = EVEN_AND_ODD_LANES(b[2 * i], b[2 * i + 1]);
    return EVEN_AND_ODD_LANES(c[0], c[1]);
#undef EVEN_AND_ODD_LANES
}

/* Up to 256 values, whole blocks of 32, to a unit of a row; the others are zero. Round to nearest. If they hold NaN or
 * infinity their scale is not finite, so that the row's products are not finite either. */
CPU_INLINE void quantize_unit(const float *x, int n_blocks, uint8_t *high, uint8_t *tail,
                              struct planes p) {
    const float limit = p.n == 2 ? CPU_X_LIMIT_2 : CPU_X_LIMIT_1, tiny = 1e-30f;
    const vi no_sign = vi_set1(0x7fffffff);
    vf v[16];
    vi q[16], largest = vi_zero();
    CPU_UNROLL
    for (int i = 0; i < 16; i++) {
        v[i] = i < 2 * n_blocks ? vf_load(x + 16 * i) : vf_zero();
        /* As integers, so that NaN is the largest. */
        largest = vi_max(largest, vi_and(vf_bits(v[i]), no_sign));
    }
    int32_t bits = vi_max_lane(largest);
    float max, scale = 0, inverse = 0;
    memcpy(&max, &bits, sizeof max);
    if (!(max < tiny)) {
        scale = max / limit;
        inverse = limit / max;
    }
    CPU_UNROLL
    for (int i = 0; i < 16; i++) {
        q[i] = vf_to_int(vf_mul(v[i], vf_set1(inverse)));
        vi first = q[i];
        if (p.n == 2) {
            first = vi_sar(vi_add(q[i], vi_set1(128)), 8);
            _mm_storeu_si128((__m128i *)(void *)(high + p.bytes + 16 * i),
                             _mm512_cvtepi32_epi8(q[i]));
        }
        _mm_storeu_si128((__m128i *)(void *)(high + 16 * i), _mm512_cvtepi32_epi8(first));
    }
    __m256i sums = _mm512_cvtepi32_epi16(sums_of(q));
    __m256i pairs = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    memset(tail, 0, CPU_X_SUMS_32);
    memcpy(tail + CPU_X_SCALE, &scale, sizeof scale);
    _mm_storeu_si128((__m128i *)(void *)(tail + CPU_X_SUMS_32), _mm256_cvtepi32_epi16(pairs));
    _mm256_storeu_si256((__m256i *)(void *)(tail + CPU_X_SUMS_16), sums);
}

CPU_INLINE void quantize_units(const float *x, int32_t n, int planes, uint8_t *row) {
    const struct planes p = planes_of(n, planes);
    for (int32_t at = 0, i = 0; at < n; at += QK_K, i++)
        quantize_unit(x + at, (n - at < QK_K ? n - at : QK_K) / CPU_BLOCK, row + at,
                      row + p.tails + i * CPU_X_TAIL, p);
}

static void k_quantize_units(const float *x, int32_t n, int planes, uint8_t *row) {
    if (planes == 2)
        quantize_units(x, n, 2, row);
    else
        quantize_units(x, n, 1, row);
}

static void k_quantize_unit_tile(const float *x, int32_t n, int planes, uint8_t *tile, int t,
                                 int n_tokens) {
    (void)n_tokens;
    k_quantize_units(x, n, planes, tile + (size_t)t * cpu_x_row_bytes(n, planes));
}

static void k_gather_units(const uint8_t *const *rows, int n_tokens, int32_t n, int planes,
                           uint8_t *tile) {
    const size_t bytes = cpu_x_row_bytes(n, planes);
    for (int t = 0; t < n_tokens; t++) memcpy(tile + (size_t)t * bytes, rows[t], bytes);
}

/* ---- one function per format and number of planes ------------------------------------------------------- */

#define AMX_DOT(name, planes, call)                                                                \
    static void k_dot_##name##_amx_##planes(const struct cpu_dot *job) { call; }
#define AMX_DOTS(name, format)                                                                     \
    AMX_DOT(name, 1, dot_superblocks(job, format, format##_UNIT, 1))                               \
    AMX_DOT(name, 2, dot_superblocks(job, format, format##_UNIT, 2))
AMX_DOTS(q4_k, CPU_Q4_K)
AMX_DOTS(q5_k, CPU_Q5_K)
AMX_DOTS(q6_k, CPU_Q6_K)
AMX_DOT(q8_0, 1, dot_blocks(job, 1))
AMX_DOT(q8_0, 2, dot_blocks(job, 2))

/* What AMX does differently from `avx512`. */
static void amx_table(struct cpu_kernels *k, const struct cpu_kernels *avx512) {
#define AMX_ROW(name)                                                                              \
    { k_dot_##name##_amx_1, k_dot_##name##_amx_2 }
    static cpu_dot_fn *const dots[CPU_N_QUANTS][2] = {AMX_ROW(q4_k), AMX_ROW(q5_k), AMX_ROW(q6_k),
                                                      AMX_ROW(q8_0)};
    *k = *avx512;
    k->inputs = CPU_BY_UNIT;
    k->up_planes = 2;
    k->max_tile = CPU_TILE;
    for (int f = 0; f < CPU_N_QUANTS; f++)
        for (int planes = 0; planes < 2; planes++)
            for (int n = 1; n <= CPU_TILE; n++) k->dot[f][planes][n] = dots[f][planes];
    k->quantize = k_quantize_unit_tile;
    k->quantize_row = k_quantize_units;
    k->quantize_block = NULL;
    k->gather = k_gather_units;
}

#endif
