/* cpu_dot_amx: products of weight row tiles with tokens by AMX's integer tiles. Included by cpu_kernels_amx.c, and by the
 * test that computes the tiles' operations itself; see cpu_kernels.h for layouts.
 *
 * A weight of a superblock is a float times an integer, scale times quant, and these integers are too long for a byte: they
 * go in two parts, made on the way. Of Q4_K and Q5_K a scale of six bits is cut in two such that each part times the
 * quant fits a byte, so that one 16-bit product makes two bytes; of Q6_K the product itself is cut. With two bytes of
 * each activation that makes four products.
 *
 * Of Q4_K and Q5_K the product of both low parts is left out, by definition: it is less than what rounding the activations
 * does. To that end low parts are remainders to the nearest, of either sign, so that they do not add up. And a weight's low part
 * counts an eighth of the high one, as an activation's does, so that both products of a high and a low part go to one sum.
 *
 * Sums leave the tiles once per 256 columns and are one integer there. Nothing is rounded before that, so a (row, token)
 * pair's result does not depend on the tile it was computed in, nor on whether a tile computed it: up to three tokens, for
 * which unpacking does not pay, are multiplied by vectors.
 *
 * Tokens are the left operand, sixteen to a tile, or eight each with its high and its low bytes; and
 * weights the right one, as they lie: a row to a lane. Between the products of one unit the next is unpacked and the sums
 * of the last are added up. */
#ifndef MOED_MOE_CPU_DOT_AMX_H
#define MOED_MOE_CPU_DOT_AMX_H

#include "moe/cpu_block.h"

enum {
    TILE_BYTES = 1024,
    TILE_ROWS = CPU_GROUP,
    FEW_TOKENS = 3, /* by vectors */
    UNIT_STEPS = QK_K / CPU_STEP, /* a tile product has CPU_STEP columns */
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

/* What a unit's results need beside the sums: minima per 32 columns (of Q6_K scales per 16; tiles do without). */
struct rest {
    vi groups[8];
    vf d, dmin;
};

struct unit {
    uint8_t parts[UNIT_STEPS][2][TILE_BYTES]; /* high, low; [columns / 4][row][4] */
    struct rest rest;
};

/* Words (byte, 0) of which each lane's byte is one. */
CPU_INLINE vi byte_words(const uint8_t *p) {
    vi x = vi_from_u8(p);
    return vi_or(x, vi_shl(x, 16));
}

/* a's bits where the mask is set, or b's, which has none there. */
CPU_INLINE vi masked_or(vi a, vi b, vi mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xec); }

/* The same of signed bytes, as words that are twice in a lane. */
CPU_INLINE vi signed_words(const uint8_t *p) {
    vi x = vi_from_i8(p);
    return masked_or(x, vi_shl(x, 16), vi_set1(0xffff));
}

/* How many bits of a scale are its low part. */
CPU_INLINE int low_bits(enum cpu_format format) { return format == CPU_Q4_K ? 2 : 3; }
/* What the sums of high parts count, as a power of two. */
CPU_INLINE int high_shift(enum cpu_format format) {
    return format == CPU_Q6_K ? 8 : CPU_X_LOW_BITS;
}

CPU_INLINE void unpack_block(enum cpu_format format, const uint8_t *w, int b, struct unit *u) {
    uint8_t *high = u->parts[b / 2][0] + b % 2 * 512, *low = u->parts[b / 2][1] + b % 2 * 512;
    vi q[8];
    if (format == CPU_Q6_K) {
        const vi first = _mm512_set1_epi16(0x00ff), second = _mm512_set1_epi16((int16_t)0xff00);
        unpack_q6_k(w, b, q);
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            vi scale = signed_words(w + CPU_Q6_K_SC + 32 * b + 16 * half);
            vi even = vi_and(scale, first), odd = _mm512_slli_epi16(scale, 8);
            vi offset = _mm512_slli_epi16(scale, 5); /* quants are 0 … 63 and stand for -32 … 31 */
            CPU_UNROLL
            for (int g = 4 * half; g < 4 * half + 4; g++) {
                vi x = _mm512_sub_epi16(_mm512_maddubs_epi16(q[g], even), offset);
                vi y = _mm512_sub_epi16(_mm512_maddubs_epi16(q[g], odd), offset);
                vi_store(high + 64 * g, masked_or(y, _mm512_srli_epi16(x, 8), second));
                vi_store(low + 64 * g, masked_or(x, _mm512_slli_epi16(y, 8), first));
            }
        }
        return;
    }
    const int bits = low_bits(format);
    const vi half = _mm512_set1_epi16((int16_t)(1 << (bits - 1))), sign = _mm512_set1_epi16(0x80);
    unpack_scale_min(w, format == CPU_Q5_K, b, q);
    vi scale = byte_words(w + (format == CPU_Q4_K ? CPU_Q4_K_SC : CPU_Q5_K_SC) + 16 * b);
    vi scale_high = _mm512_srli_epi16(_mm512_add_epi16(scale, half), (unsigned)bits);
    vi scale_low = _mm512_sub_epi16(scale, _mm512_slli_epi16(scale_high, (unsigned)bits));
    scale_low = _mm512_slli_epi16(scale_low, (unsigned)(CPU_X_LOW_BITS - bits));
    CPU_UNROLL
    for (int g = 0; g < 8; g++) { /* two quants at once */
        vi_store(high + 64 * g, _mm512_mullo_epi16(q[g], scale_high)); /* bytes 0 … 255 */
        /* Bytes -128 … 127, of which the first is made positive until it has taken nothing from the second. */
        vi product = _mm512_add_epi16(_mm512_mullo_epi16(q[g], scale_low), sign);
        vi_store(low + 64 * g, _mm512_xor_si512(product, sign));
    }
}

/* What the blocks have in common. */
CPU_INLINE struct rest unpack_rest(enum cpu_format format, const uint8_t *w) {
    struct rest r;
    if (format == CPU_Q6_K) {
        CPU_UNROLL
        for (int i = 0; i < 8; i++)
            r.groups[i] =
                masked_or(vi_from_i8(w + CPU_Q6_K_SC + 32 * i),
                          vi_shl(vi_from_i8(w + CPU_Q6_K_SC + 32 * i + 16), 16), vi_set1(0xffff));
        r.d = vf_load(w + CPU_Q6_K_D);
        r.dmin = vf_zero();
        return r;
    }
    const uint8_t *m = w + (format == CPU_Q4_K ? CPU_Q4_K_M : CPU_Q5_K_M);
    const uint8_t *d = w + (format == CPU_Q4_K ? CPU_Q4_K_D : CPU_Q5_K_D);
    CPU_UNROLL
    for (int i = 0; i < 4; i++)
        r.groups[i] = vi_or(vi_from_u8(m + 32 * i), vi_shl(vi_from_u8(m + 32 * i + 16), 16));
    r.d = vf_from_f16(d);
    r.dmin = vf_from_f16(d + 32);
    return r;
}

/* The same for sums of tiles, in which low parts of Q4_K and Q5_K count one. */
CPU_INLINE struct rest unpack_tile_rest(enum cpu_format format, int planes, const uint8_t *w) {
    struct rest r = unpack_rest(format, w);
    const int shift = low_bits(format) - (planes == 1 ? CPU_X_LOW_BITS : 0);
    if (format != CPU_Q6_K)
        r.d = vf_mul(r.d, vf_set1(shift < 0 ? 1 / (float)(1 << -shift) : (float)(1 << shift)));
    return r;
}

/* ---- sums to results ----------------------------------------------------------------------------------- */

CPU_INLINE float scale_of(const uint8_t *tail) {
    float scale;
    memcpy(&scale, tail + CPU_X_SCALE, sizeof scale);
    return scale;
}

CPU_INLINE vi sum_groups(int n, const vi *groups, const uint8_t *sums) {
    vi m = vi_zero();
    CPU_UNROLL
    for (int i = 0; i < n; i++) m = _mm512_dpwssd_epi32(m, groups[i], broadcast4(sums + 4 * i));
    return m;
}

/* total + the unit's share of a token, of which s is the sum of scale * quant * value. */
CPU_INLINE vf add_unit(enum cpu_format format, const struct rest *r, vi s, const uint8_t *tail,
                       vf total) {
    vf y = vf_mul(vf_from_int(s), r->d);
    if (format != CPU_Q6_K)
        y = vf_fnma(vf_from_int(sum_groups(4, r->groups, tail + CPU_X_SUMS_32)), r->dmin, y);
    return vf_fma(y, vf_set1(scale_of(tail)), total);
}

/* ---- few tokens ---------------------------------------------------------------------------------------- */

/* Block b's sums of scale * quant * value of n tokens; Q6_K's quants as 0 … 63. Of the others a scale's low part is not
 * multiplied with a value's. */
CPU_INLINE void add_block(enum cpu_format format, const uint8_t *w, int b, const uint8_t *x,
                          int planes, int n, vi *s) {
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
    const int bits = low_bits(format);
    const vi scale_high = vi_and(vi_add(scale[0], vi_set1(1 << (bits - 1))), vi_set1(-(1 << bits)));
    CPU_UNROLL
    for (int t = 0; t < n; t++) {
        const uint8_t *high = x + cpu_x_at(n, planes, t, b * CPU_BLOCK), *low = high + n * CPU_STEP;
        CPU_UNROLL
        for (int i = 0; i < n_scales; i++) {
            vi h = vi_zero(), l = vi_zero();
            CPU_UNROLL
            for (int g = i * count; g < (i + 1) * count; g++) {
                h = vi_dot(h, q[g], broadcast4(high + 4 * g));
                if (planes == 2) l = vi_dot(l, q[g], broadcast4(low + 4 * g));
            }
            if (planes == 2) h = vi_shl(h, CPU_X_LOW_BITS);
            if (planes == 2 && format == CPU_Q6_K) h = vi_add(h, l);
            h = _mm512_mullo_epi32(h, scale[i]);
            if (planes == 2 && format != CPU_Q6_K) /* both fit 16 bits */
                h = _mm512_dpwssd_epi32(h, l, scale_high);
            s[t] = vi_add(s[t], h);
        }
    }
}

CPU_INLINE void dot_few(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                        int planes, int n) {
    const int lines = (unit_bytes / UNIT_BLOCKS + 63) / 64;
    const uint8_t *w = job->w;
    for (int32_t tile = 0; tile < job->n_tiles; tile++) {
        const uint8_t *x = job->x;
        vf total[FEW_TOKENS];
        CPU_UNROLL
        for (int t = 0; t < n; t++) total[t] = vf_zero();
        for (int32_t i = 0; i < job->n_units; i++, w += unit_bytes) {
            vi s[FEW_TOKENS];
            CPU_UNROLL
            for (int t = 0; t < n; t++) s[t] = vi_zero();
            for (int b = 0; b < UNIT_BLOCKS; b++) {
                prefetch(job, w + b * unit_bytes / UNIT_BLOCKS, lines);
                add_block(format, w, b, x, planes, n, s);
            }
            const struct rest rest = unpack_rest(format, w);
            x += n * planes * QK_K;
            CPU_UNROLL
            for (int t = 0; t < n; t++, x += CPU_X_TAIL) {
                if (format == CPU_Q6_K)
                    s[t] = vi_sub(s[t], vi_shl(sum_groups(8, rest.groups, x + CPU_X_SUMS_16), 5));
                total[t] = add_unit(format, &rest, s[t], x, total[t]);
            }
        }
        CPU_UNROLL
        for (int t = 0; t < n; t++)
            vf_store(job->out + (size_t)t * job->stride + tile * CPU_ROWS, total[t]);
    }
}

/* ---- many ---------------------------------------------------------------------------------------------- */

/* Of a pass, of high and of low weights: rows of the first tile of tokens, then those of the second. If planes are apart the
 * second is of all products with a low part. */
typedef int32_t sum_tiles[2][2 * TILE_ROWS][CPU_ROWS];

/* How a pass lays tokens in tiles: one tile or two, with both planes of one group of tokens or, apart, one plane at a
 * time of one group or two. */
struct shape {
    int n_tiles;
    bool both, apart;
    int slots; /* products of a step, after each of which there is time for vector work */
    int rows; /* of a tile */
    int step_bytes; /* from CPU_STEP columns to the next ones */
    int second; /* bytes from the first tile to the second */
};

#define TILE_LOAD(tile, p)                                                                         \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_loadd(tile, p, 64);                                                                  \
    } while (0)
/* Tokens come from the second-level cache and are needed once a unit: the first-level one is for unpacked weights and sums. */
#define TOKENS_LOAD(tile, p)                                                                       \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_stream_loadd(tile, p, CPU_STEP);                                                     \
    } while (0)

/* A tile of sums goes to memory and starts again at zero. */
#define TAKE(sum, to)                                                                              \
    do {                                                                                           \
        _tile_stored(sum, (to)[sum % 2][sum / 2 * rows], 64);                                      \
        _tile_zero(sum);                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
    } while (0)

/* The two parts of weights: of Q6_K the high one has a sign, of the others the low one. */
#define MULTIPLY_HIGH(format, sum, x)                                                              \
    do {                                                                                           \
        if ((format) == CPU_Q6_K)                                                                  \
            _tile_dpbssd(sum, x, 6);                                                               \
        else                                                                                       \
            _tile_dpbsud(sum, x, 6);                                                               \
    } while (0)
#define MULTIPLY_LOW(format, sum, x)                                                               \
    do {                                                                                           \
        if ((format) == CPU_Q6_K)                                                                  \
            _tile_dpbsud(sum, x, 7);                                                               \
        else                                                                                       \
            _tile_dpbssd(sum, x, 7);                                                               \
    } while (0)

CPU_INLINE void take_sums(int n_tiles, int rows, sum_tiles sums) {
    TAKE(0, sums);
    TAKE(1, sums);
    if (n_tiles > 1) {
        TAKE(2, sums);
        TAKE(3, sums);
    }
}

/* What is to be done with the sums of a pass over a unit. */
struct fold {
    const int32_t *sums; /* sum_tiles */
    const uint8_t *tails; /* of the tokens */
    const float *total; /* so far, [token][CPU_ROWS] */
    float *dst;
    size_t stride; /* of dst */
    int n; /* tokens */
    int low_sums; /* from the sums of a token's high plane to those of its low one, if it has these */
};

CPU_INLINE void fold_token(enum cpu_format format, bool both, const struct fold *f,
                           const struct rest *rest, int t) {
    const int shift = high_shift(format), low = 2 * TILE_ROWS * CPU_ROWS;
    const int32_t *sums = f->sums + t * CPU_ROWS;
    const uint8_t *tail = f->tails + t * CPU_X_TAIL;
    vi s = vi_add(vi_shl(vi_load(sums), shift), vi_load(sums + low));
    if (both) {
        const int32_t *l = sums + f->low_sums;
        if (format == CPU_Q6_K)
            s = vi_add(vi_shl(s, CPU_X_LOW_BITS),
                       vi_add(vi_shl(vi_load(l), shift), vi_load(l + low)));
        else
            s = vi_add(s, vi_load(l));
    }
    vf_store(f->dst + (size_t)t * f->stride,
             add_unit(format, rest, s, tail, vf_load(f->total + t * CPU_ROWS)));
}

/* What vectors do while tiles are multiplied. */
struct beside {
    struct fold last; /* the sums of the last pass */
    int token; /* so many of its tokens are added up */
    const struct cpu_dot *job;
    const uint8_t *next; /* the next unit */
    struct unit *fresh; /* to be unpacked to this */
    int block, n_blocks; /* so many of its blocks are; should be by the end of this pass */
};

CPU_INLINE void unpack_next_block(enum cpu_format format, int unit_bytes, struct beside *b) {
    const int lines = (unit_bytes / UNIT_BLOCKS + 63) / 64;
    prefetch(b->job, b->next + b->block * unit_bytes / UNIT_BLOCKS, lines);
    unpack_block(format, b->next, b->block++, b->fresh);
}

/* The vector work after one product. `summed`: the last pass's sums are in memory. A slot has either sums or a block, and
 * few of them: a processor looks ahead by some 190 vector instructions, and must see the next products by then. */
CPU_INLINE void work_beside(enum cpu_format format, int unit_bytes, const struct shape *p,
                            bool summed, const struct rest *rest, struct beside *b) {
    const int most = p->n_tiles * TILE_ROWS / (p->both ? 2 : 1); /* tokens of a pass */
    const int n_slots = (UNIT_STEPS - 1) * p->slots, n = (most + n_slots - 1) / n_slots;
    if (summed && (p->n_tiles > 1 || b->token < b->last.n)) {
        CPU_UNROLL
        for (int i = 0; i < n; i++)
            if (b->token + i < b->last.n) fold_token(format, p->both, &b->last, rest, b->token + i);
        b->token += n;
    } else if (b->block < b->n_blocks) {
        unpack_next_block(format, unit_bytes, b);
    }
}

/* A pass's first product goes into tile `sum` when what the pass before left there has gone to memory. Not all four go at
 * once: a tile waits for its last product. */
#define PRODUCT(sum, multiply)                                                                     \
    do {                                                                                           \
        if (take) TAKE(sum, take);                                                                 \
        multiply;                                                                                  \
    } while (0)

/* CPU_STEP columns of a pass. take: where the sums so far go, or NULL. rest: of the last pass's unit. */
CPU_INLINE void multiply_step(enum cpu_format format, int unit_bytes, const struct shape *p,
                              const uint8_t *parts, const uint8_t *x, sum_tiles take,
                              const struct rest *rest, struct beside *b) {
    const int rows = p->rows, low = rows * CPU_STEP;
#define WORK_BESIDE() work_beside(format, unit_bytes, p, !take, rest, b)
    TILE_LOAD(6, parts);
    TOKENS_LOAD(4, x);
    PRODUCT(0, MULTIPLY_HIGH(format, 0, 4));
    WORK_BESIDE();
    if (p->n_tiles > 1) {
        TOKENS_LOAD(5, x + p->second);
        PRODUCT(2, MULTIPLY_HIGH(format, 2, 5));
        WORK_BESIDE();
    }
    TILE_LOAD(7, parts + TILE_BYTES);
    PRODUCT(1, MULTIPLY_LOW(format, 1, 4));
    if (p->apart) TOKENS_LOAD(4, x + low); /* for high parts of weights */
    WORK_BESIDE();
    if (p->n_tiles > 1) {
        PRODUCT(3, MULTIPLY_LOW(format, 3, 5));
        if (p->apart) TOKENS_LOAD(5, x + p->second + low);
        WORK_BESIDE();
    }
    if (p->apart) {
        MULTIPLY_HIGH(format, 1, 4);
        WORK_BESIDE();
    }
    if (p->apart && p->n_tiles > 1) {
        MULTIPLY_HIGH(format, 3, 5);
        WORK_BESIDE();
    }
#undef WORK_BESIDE
}

/* Of the lines that a row tile's results go to a share per unit, if they lie in pages of their own: rows of a large matrix,
 * in no near cache. Stores would wait for them one after the other. */
CPU_INLINE void fetch_results(const struct cpu_dot *job, const float *out, int32_t column) {
    if (job->stride * sizeof *out < 4096) return;
    for (int t = job->n * column / job->n_units; t < job->n * (column + 1) / job->n_units; t++)
        __builtin_prefetch(out + (size_t)t * job->stride, 1);
}

/* In passes of one group of tokens or two. */
CPU_INLINE void dot_units(const struct cpu_dot *job, enum cpu_format format, int unit_bytes,
                          int planes, int n_tiles, bool apart) {
    static const float zeros[CPU_TILE][CPU_ROWS];
    _Alignas(64) struct unit unpacked[2];
    _Alignas(64) sum_tiles sums;
    _Alignas(64) float total[CPU_TILE][CPU_ROWS];
    const bool both = planes == 2 && !apart; /* of a group's planes in a pass */
    const int group = cpu_x_group(job->n), plane_bytes = group * CPU_STEP;
    const int n_pass = both ? group : n_tiles * group, n_passes = (job->n + n_pass - 1) / n_pass;
    const struct shape shape = {.n_tiles = n_tiles,
                                .both = both,
                                .apart = apart,
                                .slots = n_tiles * (apart ? 3 : 2),
                                .rows = both && n_tiles == 1 ? 2 * group : group,
                                .step_bytes = planes * plane_bytes,
                                .second = (both ? 1 : UNIT_STEPS * planes) * plane_bytes};
    const int32_t n_units = job->n_tiles * job->n_units;
    const uint8_t *x = job->x;
    float *out = job->out;
    struct beside beside = {.job = job, .next = job->w};
    configure_tiles(shape.rows, CPU_STEP);
    take_sums(n_tiles, shape.rows, sums); /* for the zeros */
    unpacked[0].rest = unpack_tile_rest(format, planes, job->w);
    unpacked[1].rest = unpacked[0].rest; /* of the pass before the first one, which has no tokens */
    for (int b = 0; b < UNIT_BLOCKS; b++) unpack_block(format, job->w, b, &unpacked[0]);
    for (int32_t i = 0, column = 0; i < n_units; i++) {
        const struct unit *u = &unpacked[i % 2];
        const bool first = column == 0, final = column == job->n_units - 1;
        const uint8_t *tails = x + cpu_x_bytes(job->n, planes);
        beside.next += unit_bytes;
        beside.fresh = &unpacked[(i + 1) % 2];
        beside.block = 0;
        fetch_results(job, out, column);
        for (int pass = 0, t = 0; pass < n_passes; pass++, t += n_pass) {
            const struct rest rest = pass == 0 ? beside.fresh->rest : u->rest;
            beside.token = 0;
            beside.n_blocks = i + 1 < n_units ? (pass + 1) * UNIT_BLOCKS / n_passes : 0;
            for (int s = 0; s < UNIT_STEPS; s++)
                multiply_step(format, unit_bytes, &shape, u->parts[s][0],
                              x + t * planes * QK_K + s * shape.step_bytes, s == 0 ? sums : NULL,
                              &rest, &beside);
            while (beside.block < beside.n_blocks) unpack_next_block(format, unit_bytes, &beside);
            beside.last = (struct fold){.sums = sums[0][0],
                                        .tails = tails + t * CPU_X_TAIL,
                                        .total = first ? zeros[t] : total[t],
                                        .dst = final ? out + (size_t)t * job->stride : total[t],
                                        .stride = final ? job->stride : CPU_ROWS,
                                        .n = job->n - t < n_pass ? job->n - t : n_pass,
                                        .low_sums = group * CPU_ROWS};
        }
        if (i + 1 < n_units) beside.fresh->rest = unpack_tile_rest(format, planes, beside.next);
        x = tails + job->n * CPU_X_TAIL;
        if (++column < job->n_units) continue;
        column = 0;
        x = job->x;
        out += CPU_ROWS;
    }
    take_sums(n_tiles, shape.rows, sums);
    const struct rest rest = unpacked[(n_units - 1) % 2].rest;
    for (int t = 0; t < beside.last.n; t++) fold_token(format, both, &beside.last, &rest, t);
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
        dot_units(job, format, unit_bytes, planes, 1, false);
    else if (planes == 1 || format == CPU_Q6_K)
        dot_units(job, format, unit_bytes, planes, 2, false);
    else if (job->n <= TILE_ROWS)
        dot_units(job, format, unit_bytes, planes, 1, true);
    else
        dot_units(job, format, unit_bytes, planes, 2, true);
}

/* Q8_0 has a scale per 32 columns, and needs no unpacking. */
CPU_INLINE void dot_blocks(const struct cpu_dot *job, int planes) {
    _Alignas(64) int32_t sums[2 * TILE_ROWS][CPU_ROWS];
    _Alignas(64) float total[CPU_TILE][CPU_ROWS];
    const int group = cpu_x_group(job->n), n_rows = planes * group;
    const int tile_rows = n_rows <= TILE_ROWS ? n_rows : group;
    const size_t x_bytes = cpu_x_bytes(job->n, planes),
                 x_unit = x_bytes + (size_t)job->n * CPU_X_TAIL;
    const uint8_t *w = job->w;
    configure_tiles(tile_rows, CPU_BLOCK);
    for (int32_t tile = 0; tile < job->n_tiles; tile++) {
        memset(total, 0, (size_t)job->n * sizeof *total);
        for (int32_t b = 0; b < job->n_units; b++, w += CPU_Q8_0_UNIT) {
            prefetch(job, w, CPU_Q8_0_UNIT / 64);
            vf d = vf_load(w + CPU_Q8_0_D);
            TILE_LOAD(6, w);
            const uint8_t *x = job->x + (size_t)(b / UNIT_BLOCKS) * x_unit, *tail = x + x_bytes;
            for (int from = 0; from < job->n; from += group) {
                const uint8_t *rows =
                    x + cpu_x_at(job->n, planes, from, b % UNIT_BLOCKS * CPU_BLOCK);
                for (int r = 0; r < n_rows; r += tile_rows) {
                    TOKENS_LOAD(4, rows + r * CPU_STEP);
                    _tile_zero(0);
                    _tile_dpbsud(0, 4, 6);
                    _tile_stored(0, sums[r], 64);
                    __asm__ volatile("" ::: "memory");
                }
                for (int t = from; t < job->n && t < from + group; t++, tail += CPU_X_TAIL) {
                    int16_t sum;
                    memcpy(&sum, tail + CPU_X_SUMS_32 + 2 * (b % UNIT_BLOCKS), sizeof sum);
                    vi s = vi_load(sums[t - from]);
                    if (planes == 2)
                        s = vi_add(vi_shl(s, CPU_X_LOW_BITS), vi_load(sums[group + t - from]));
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

/* Up to 256 values, whole blocks of 32, to token t's unit in a tile of n; the others are zero. Round to nearest. If they
 * hold NaN or infinity their scale is not finite, so that the row's products are not finite either. */
CPU_INLINE void quantize_unit(const float *x, int n_blocks, uint8_t *tile, int t, int n,
                              int planes) {
    const float limit = planes == 2 ? CPU_X_LIMIT_2 : CPU_X_LIMIT_1, tiny = 1e-30f;
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
    uint8_t *tail = tile + cpu_x_bytes(n, planes) + t * CPU_X_TAIL;
    const int plane_bytes = cpu_x_group(n) * CPU_STEP, step_bytes = planes * plane_bytes;
    uint8_t *first_step = tile + cpu_x_at(n, planes, t, 0);
    CPU_UNROLL
    for (int i = 0; i < 16; i++) {
        uint8_t *to = first_step + i / 4 * step_bytes + i % 4 * 16;
        q[i] = vf_to_int(vf_mul(v[i], vf_set1(inverse)));
        vi first = q[i];
        if (planes == 2) {
            /* To nearest, halves away from zero: low bytes have no sign in common that would add up. */
            vi half = vi_add(vi_set1(1 << (CPU_X_LOW_BITS - 1)), vi_sar(q[i], 31));
            first = vi_sar(vi_add(q[i], half), CPU_X_LOW_BITS);
            vi second = vi_sub(q[i], vi_shl(first, CPU_X_LOW_BITS));
            _mm_storeu_si128((__m128i *)(void *)(to + plane_bytes), _mm512_cvtepi32_epi8(second));
        }
        _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtepi32_epi8(first));
    }
    __m256i sums = _mm512_cvtepi32_epi16(sums_of(q));
    __m256i pairs = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    memset(tail, 0, CPU_X_SUMS_32);
    memcpy(tail + CPU_X_SCALE, &scale, sizeof scale);
    _mm_storeu_si128((__m128i *)(void *)(tail + CPU_X_SUMS_32), _mm256_cvtepi32_epi16(pairs));
    _mm256_storeu_si256((__m256i *)(void *)(tail + CPU_X_SUMS_16), sums);
}

CPU_INLINE void quantize_units(const float *x, int32_t n, int planes, uint8_t *tile, int t,
                               int n_tokens) {
    const size_t unit_bytes = cpu_x_bytes(n_tokens, planes) + (size_t)n_tokens * CPU_X_TAIL;
    for (int32_t at = 0; at < n; at += QK_K, tile += unit_bytes)
        quantize_unit(x + at, (n - at < QK_K ? n - at : QK_K) / CPU_BLOCK, tile, t, n_tokens,
                      planes);
}

static void k_quantize_unit_tile(const float *x, int32_t n, int planes, uint8_t *tile, int t,
                                 int n_tokens) {
    if (planes == 2)
        quantize_units(x, n, 2, tile, t, n_tokens);
    else
        quantize_units(x, n, 1, tile, t, n_tokens);
}

static void k_quantize_units(const float *x, int32_t n, int planes, uint8_t *row) {
    k_quantize_unit_tile(x, n, planes, row, 0, 1);
}

static void k_gather_units(const uint8_t *const *rows, int n_tokens, int32_t n, int planes,
                           uint8_t *tile) {
    const size_t x_bytes = cpu_x_bytes(n_tokens, planes),
                 unit_bytes = x_bytes + (size_t)n_tokens * CPU_X_TAIL;
    const int plane_bytes = cpu_x_group(n_tokens) * CPU_STEP;
    for (int t = 0; t < n_tokens; t++) { /* a row after the other, as memory is fetched ahead */
        const uint8_t *from = rows[t], *end = from + cpu_x_row_bytes(n, planes);
        uint8_t *x = tile + cpu_x_at(n_tokens, planes, t, 0),
                *tail = tile + x_bytes + t * CPU_X_TAIL;
        for (; from < end; x += unit_bytes, tail += unit_bytes, from += CPU_X_TAIL) {
            for (int i = 0; i < UNIT_STEPS * planes; i++, from += CPU_STEP)
                memcpy(x + i * plane_bytes, from, CPU_STEP);
            memcpy(tail, from, CPU_X_TAIL);
        }
    }
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
