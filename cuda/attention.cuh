/* attention: softmax(q K / sqrt(128)) V over paged keys and values, for eight query heads of one KV head at a time: what
 * the two kernels share.
 *
 * Keys are the rows and heads the columns of the matrix products, so eight heads fill a column group and each key
 * is read once for all of them. Order of the arithmetic, the same wherever a token is computed: 64 keys (a span)
 * share a maximum and are summed in one accumulator; the four spans of a split (SPLIT_KEYS, cut at absolute
 * positions) are merged in order; splits are merged in order. Spans with no key at or before the token are
 * left out. */
#ifndef MOED_CUDA_ATTENTION_CUH
#define MOED_CUDA_ATTENTION_CUH

#include "cuda/rope.cuh"

enum : int { SPAN = SPAN_KEYS, SPANS = SPLIT_KEYS / SPAN, TILE_KEYS = 16, TILES = SPAN / TILE_KEYS };

/* log2(e) / sqrt(128): scores are kept as exponents of 2. */
#define SCORE_SCALE 0.127517432f

/* ---- what one warp does with 64 keys ----------------------------------------------------------------- */

/* Keys or values of a span in shared memory. Piece c of 8 dims of a key lies at c ^ (key & 7), so that the pieces of eight
 * keys lie in different banks. */
struct span_rows {
    uint4 v[SPAN][HEAD_DIM / 8];
};

/* A lane's share of q, columns are heads: word c is dims 8 c + 2 t and 8 c + 2 t + 1 of head g. */
struct query {
    h2 w[HEAD_DIM / 8];
};

struct scores {
    float s[TILES][4]; /* keys 16 i + g and + 8, heads 2 t and 2 t + 1 */
};

/* Of heads 2 t and 2 t + 1: the maximum, and the sum of the probabilities relative to it. */
struct measure {
    float max[2], sum[2];
};

/* Running result: accumulators [i][…] are dim 16 i + g of heads 2 t and 2 t + 1, then dim 16 i + 8 + g. */
struct outcome {
    struct measure m;
    float acc[8][4];
};

static DEVICE float column_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 4));
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 8));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 16));
}
static DEVICE float column_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 4);
    x += __shfl_xor_sync(ALL_LANES, x, 8);
    return x + __shfl_xor_sync(ALL_LANES, x, 16);
}

/* Of a score, relative to the maximum of the scores, which is scaled already. */
static DEVICE float probability(float score, float max) { return exp2_fast(fmaf(score, SCORE_SCALE, -max)); }

/* Scores to probabilities relative to the span's maximum, as B operands of the values' product; n_keys of the span's
 * keys count. */
static DEVICE void soften(struct scores &s, int n_keys, int lane, struct measure &m, h2 (&p)[TILES][2]) {
    int g = lane >> 2;
    m.max[0] = m.max[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (16 * i + 8 * (j >> 1) + g >= n_keys) s.s[i][j] = -INFINITY;
            m.max[j & 1] = fmaxf(m.max[j & 1], s.s[i][j]);
        }
    m.max[0] = column_max(m.max[0]) * SCORE_SCALE;
    m.max[1] = column_max(m.max[1]) * SCORE_SCALE;
    m.sum[0] = m.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            h2 pair = h2_pack_small(probability(s.s[i][2 * j], m.max[0]), probability(s.s[i][2 * j + 1], m.max[1]));
            m.sum[0] += h2_low_f32(pair);
            m.sum[1] += h2_high_f32(pair);
            p[i][j] = transpose_8x8(pair);
        }
    m.sum[0] = column_sum(m.sum[0]);
    m.sum[1] = column_sum(m.sum[1]);
}

/* ---- merging: total (running) and the next part, in order ------------------------------------------------ */

struct merge_factors {
    float total, part;
};

/* Of head i of the lane's two. */
static DEVICE struct merge_factors merge_head(struct measure &total, const struct measure &part, int i) {
    struct merge_factors f;
    float m = fmaxf(total.max[i], part.max[i]);
    f.total = exp2_fast(total.max[i] - m);
    f.part = exp2_fast(part.max[i] - m);
    total.sum[i] = fmaf(total.sum[i], f.total, part.sum[i] * f.part);
    total.max[i] = m;
    return f;
}

static DEVICE struct measure measure_none() {
    return {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
}

static DEVICE float merge_value(float total, float part, const struct merge_factors &f) {
    return fmaf(total, f.total, part * f.part);
}

/* Four accumulators. */
static DEVICE void merge_four(float (&total)[4], const float4 &part, const struct merge_factors &f0,
                              const struct merge_factors &f1) {
    total[0] = merge_value(total[0], part.x, f0);
    total[1] = merge_value(total[1], part.y, f1);
    total[2] = merge_value(total[2], part.z, f0);
    total[3] = merge_value(total[3], part.w, f1);
}

/* ---- memory ------------------------------------------------------------------------------------------------ */

/* Column g of an octet of a KV head's heads, if there is one; the others are zeros. unit: KV heads, then octets. */
static DEVICE void load_query(const struct attn_args &a, int token, int unit, int lane, struct query &q) {
    int kv_head = unit / a.octets, octet = unit % a.octets, per_kv = a.per_kv, g = lane >> 2, t = lane & 3;
    bool real = octet * 8 + g < per_kv;
    size_t head = (size_t)kv_head * (size_t)per_kv + (size_t)(octet * 8) + (size_t)g;
    const h2 *src = (const h2 *)a.q + ((size_t)token * (size_t)a.n_heads + head) * (HEAD_DIM / 2) + t;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 8; c++) q.w[c] = real ? src[4 * c] : 0;
}

cudaError_t attn_tiles_prepare(void);

#endif
