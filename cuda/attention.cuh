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

enum : int { SPAN = 64, SPANS = SPLIT_KEYS / SPAN, TILE_KEYS = 16, TILES = SPAN / TILE_KEYS };

/* log2(e) / sqrt(128): scores are kept as exponents of 2. */
#define SCORE_SCALE 0.127517432f

/* ---- what one warp does with 64 keys ----------------------------------------------------------------- */

/* Operands of 16 keys: row g, [4] of 8 dims each, then row g + 8; lane t has dims 32 j + 8 t … + 7. Values: keys 2 t,
 * 2 t + 1, 8 + 2 t, 9 + 2 t ([4]); dims 8 g … + 7, then 64 + 8 g …. */
struct key_tile {
    uint4 v[2][4];
};

/* The same lane's share of q: columns are heads, dims as in key_tile. */
struct query {
    uint4 v[4];
};

struct scores {
    float s[TILES][4]; /* keys 16 i + g and + 8, heads 2 t and 2 t + 1 */
};

/* Of heads 2 t and 2 t + 1: the maximum, and the sum of the probabilities relative to it. */
struct measure {
    float max[2], sum[2];
};

/* Running result: accumulators [4 h + w][…] are dims 64 h + 8 g + 2 w {head 2 t, head 2 t + 1}, then the next dim. */
struct outcome {
    struct measure m;
    float acc[8][4];
};

static DEVICE void score_tile(float (&s)[4], const struct key_tile &k, const struct query &q) {
    s[0] = s[1] = s[2] = s[3] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        h2 a0[4] = {k.v[0][j].x, k.v[1][j].x, k.v[0][j].y, k.v[1][j].y};
        h2 a1[4] = {k.v[0][j].z, k.v[1][j].z, k.v[0][j].w, k.v[1][j].w};
        mma_f16(s, a0, q.v[j].x, q.v[j].y);
        mma_f16(s, a1, q.v[j].z, q.v[j].w);
    }
}

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

static DEVICE uint32_t word_of(const uint4 &v, int w) {
    return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
}

/* Word w of the values, keys in pairs, as an A operand. */
static DEVICE void value_operand(const uint4 (&v)[4], int w, h2 (&a)[4]) {
    uint32_t k0 = word_of(v[0], w), k1 = word_of(v[1], w), k2 = word_of(v[2], w), k3 = word_of(v[3], w);
    a[0] = pick_bytes(k0, k1, 0x5410u), a[1] = pick_bytes(k0, k1, 0x7632u);
    a[2] = pick_bytes(k2, k3, 0x5410u), a[3] = pick_bytes(k2, k3, 0x7632u);
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
    int octets = attn_octets(a.n_heads, a.n_kv_heads), kv_head = unit / octets, octet = unit % octets;
    int per_kv = a.n_heads / a.n_kv_heads, g = lane >> 2, t = lane & 3;
    bool real = octet * 8 + g < per_kv;
    size_t head = (size_t)kv_head * (size_t)per_kv + (size_t)(octet * 8) + (size_t)g;
    const uint4 *src = (const uint4 *)a.q + ((size_t)token * (size_t)a.n_heads + head) * (HEAD_DIM / 8);
#pragma unroll
    for (int j = 0; j < 4; j++) q.v[j] = real ? src[4 * j + t] : make_uint4(0, 0, 0, 0);
}

/* acc / sum of dims 64 h + 8 g + 2 w … of heads 2 t, 2 t + 1; `pair` names two neighbouring accumulators. */
static DEVICE void store_out(const struct attn_args &a, int token, int kv_head, int octet, int lane,
                             int pair, const float (&acc)[2][4], const float (&sum)[2]) {
    int per_kv = a.n_heads / a.n_kv_heads, g = lane >> 2, t = lane & 3;
    int dim = (pair >> 1) * 64 + 8 * g + (pair & 1) * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int column = octet * 8 + 2 * t + i;
        if (column >= per_kv) continue;
        size_t head = (size_t)kv_head * (size_t)per_kv + (size_t)column;
        uint16_t *to = (uint16_t *)a.out + ((size_t)token * (size_t)a.n_heads + head) * HEAD_DIM + dim;
        *(uint2 *)to = make_uint2(h2_pack(acc[0][i] / sum[i], acc[0][2 + i] / sum[i]),
                                  h2_pack(acc[1][i] / sum[i], acc[1][2 + i] / sum[i]));
    }
}

cudaError_t attn_tiles_prepare(void);

#endif
