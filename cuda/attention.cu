/* attention: softmax(q K / sqrt(128)) V over paged keys and values, for eight query heads of one KV head at a time.
 *
 * Keys are the rows and heads the columns of the matrix products, so eight heads fill a column group and each key
 * is read once for all of them. Order of the arithmetic, the same wherever a token is computed: 64 keys (a span)
 * share a maximum and are summed in one accumulator; the four spans of a split (SPLIT_KEYS, cut at absolute
 * positions) are merged in order; splits are merged in order. Spans with no key at or before the token are
 * left out.
 *
 * k_attn_splits: a block takes a token and KV head, one split after the other, or one split of them when there are too few tokens
 * to go round; a warp takes a span; the last block of a token merges its splits. k_attn_tiles: a block is TILE_TOKENS consecutive tokens of a
 * sequence, a warp one token, keys shared through memory of the block. */
#include "cuda/rope.cuh"

enum : int { SPAN = 64, SPANS = SPLIT_KEYS / SPAN, WARPS = SPANS, TILE_KEYS = 16, TILES = SPAN / TILE_KEYS };

/* log2(e) / sqrt(128): scores are kept as exponents of 2. */
#define SCORE_SCALE 0.127517432f

/* ---- what one warp does with 64 keys ----------------------------------------------------------------- */

/* Operands of 16 keys; 16 halves-of-8 each. keys: row g (8 chunks of 32-dim blocks: [4]) then row g + 8;
 * lane t has dims 32 j + 8 t … + 7. values: keys 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t; dims 8 g … + 7 and 64 + 8 g …. */
struct key_tile {
    uint4 v[2][4];
};
struct value_tile {
    uint4 v[4][2];
};

/* The same lane's share of q: columns are heads, dims as in key_tile. */
struct query {
    uint4 v[4];
};

struct scores {
    float s[TILES][4]; /* keys 16 i + g and + 8, heads 2 t and 2 t + 1 */
};

/* Running result of heads 2 t and 2 t + 1. acc[4 h + w][…]: dims 64 h + 8 g + 2 w {head 2 t, head 2 t + 1}, then the
 * next dim. */
struct outcome {
    float max[2], sum[2];
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

/* Scores to probabilities relative to the span's maximum, as B operands of the values' product; n_keys of the span's
 * keys count. */
static DEVICE void soften(struct scores &s, int n_keys, int lane, struct outcome &o, h2 (&p)[TILES][2]) {
    int g = lane >> 2;
    o.max[0] = o.max[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bool counts = 16 * i + 8 * (j >> 1) + g < n_keys;
            s.s[i][j] = counts ? s.s[i][j] * SCORE_SCALE : -INFINITY;
            o.max[j & 1] = fmaxf(o.max[j & 1], s.s[i][j]);
        }
    o.max[0] = column_max(o.max[0]);
    o.max[1] = column_max(o.max[1]);
    o.sum[0] = o.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            h2 pair = h2_pack(exp2_fast(s.s[i][2 * j] - o.max[0]),
                              exp2_fast(s.s[i][2 * j + 1] - o.max[1]));
            o.sum[0] += h2_low_f32(pair);
            o.sum[1] += h2_high_f32(pair);
            p[i][j] = transpose_8x8(pair);
        }
    o.sum[0] = column_sum(o.sum[0]);
    o.sum[1] = column_sum(o.sum[1]);
#pragma unroll
    for (int i = 0; i < 8; i++) o.acc[i][0] = o.acc[i][1] = o.acc[i][2] = o.acc[i][3] = 0.0f;
}

static DEVICE uint32_t word_of(const uint4 &v, int w) {
    return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
}

static DEVICE void add_values(struct outcome &o, const struct value_tile &v, const h2 (&p)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int w = 0; w < 4; w++) {
            uint32_t k0 = word_of(v.v[0][h], w), k1 = word_of(v.v[1][h], w);
            uint32_t k2 = word_of(v.v[2][h], w), k3 = word_of(v.v[3][h], w);
            h2 a[4] = {pick_bytes(k0, k1, 0x5410u), pick_bytes(k0, k1, 0x7632u),
                       pick_bytes(k2, k3, 0x5410u), pick_bytes(k2, k3, 0x7632u)};
            mma_f16(o.acc[4 * h + w], a, p[0], p[1]);
        }
}

/* ---- merging: total (running) and the next part, in order ------------------------------------------------ */

struct merge_factors {
    float total, part;
};

static DEVICE struct merge_factors merge_head(float &max, float &sum, float part_max, float part_sum) {
    struct merge_factors f;
    float m = fmaxf(max, part_max);
    f.total = exp2_fast(max - m);
    f.part = exp2_fast(part_max - m);
    sum = fmaf(sum, f.total, part_sum * f.part);
    max = m;
    return f;
}

static DEVICE float merge_value(float total, float part, const struct merge_factors &f) {
    return fmaf(total, f.total, part * f.part);
}

static DEVICE void outcome_clear(struct outcome &o) {
    o.max[0] = o.max[1] = -INFINITY;
    o.sum[0] = o.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) o.acc[i][0] = o.acc[i][1] = o.acc[i][2] = o.acc[i][3] = 0.0f;
}

static DEVICE void merge(struct outcome &total, const struct outcome &part) {
    struct merge_factors f0 = merge_head(total.max[0], total.sum[0], part.max[0], part.sum[0]);
    struct merge_factors f1 = merge_head(total.max[1], total.sum[1], part.max[1], part.sum[1]);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            total.acc[i][j] = merge_value(total.acc[i][j], part.acc[i][j], j & 1 ? f1 : f0);
}

/* ---- addresses ------------------------------------------------------------------------------------------------ */

/* One token's keys of one KV head. */
struct pages {
    const int32_t *blocks;
    const uint4 *kv; /* 16 rows of 8 halves per key */
    size_t n_kv_heads, head;
    int shift;

    /* Key (which = 0) or value (1) at a position: 16 uint4. */
    DEVICE const uint4 *row(int pos, int which) const {
        size_t at = ((size_t)blocks[pos >> shift] * n_kv_heads + head) * 2 + (size_t)which;
        return kv + ((at << shift) + (size_t)(pos & ((1 << shift) - 1))) * (HEAD_DIM / 8);
    }
};

static DEVICE struct pages pages_of(const struct attn_args &a, int token, int kv_head) {
    const struct step_header *h = a.step.header;
    struct pages p;
    p.blocks = (const int32_t *)h + h->blocks_at + a.step.table[a.step.seq[token]];
    p.kv = (const uint4 *)a.kv;
    p.n_kv_heads = (size_t)a.n_kv_heads;
    p.head = (size_t)kv_head;
    p.shift = a.block_shift;
    return p;
}

/* Column g of an octet is head `first` + g, if there is one; the others are zeros. */
static DEVICE void load_query(const struct attn_args &a, int token, int kv_head, int octet, int lane,
                              struct query &q) {
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

/* ---- decoding: one token against its splits ---------------------------------------------------------------------- */

/* A warp's keys and values on their way: a stage is 32 keys, or the values of 32. A lane copies what it reads itself,
 * so that nothing but its own copies need be waited for. RING stages are under way at a time. */
enum : int { STAGES = 4 /* of a span: keys 0 … 31, 32 … 63, then the values */, STAGE_KEYS = 32 };

struct stage {
    uint4 v[16][32];
};

/* A block's place in the work list, and the warp's span of it. */
struct cursor {
    struct attn_split item;
    int round, unit, split; /* split: the one at hand, if the item is a whole token */
    int first;              /* of the warp's span */
    int32_t blocks[2];      /* of positions first + lane and first + 32 + lane */
    bool valid;

    DEVICE bool live() const { return valid && first < item.end; }
    DEVICE int last_split() const { return item.split < 0 ? item.n_splits - 1 : item.split; }
};

static DEVICE void find_span(const struct attn_args &a, struct cursor &c) {
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const int32_t *table = (const int32_t *)a.step.header + c.item.table;
    c.first = c.split * SPLIT_KEYS + warp * SPAN;
    if (!c.live()) return;
#pragma unroll
    for (int i = 0; i < 2; i++)
        c.blocks[i] = table[min(c.first + STAGE_KEYS * i + lane, c.item.end - 1) >> a.block_shift];
}

/* Items come longest first: rounds of one for each block, to and fro, leave all with about the same. */
static DEVICE void find_item(const struct attn_args &a, struct cursor &c) {
    const struct step_header *h = a.step.header;
    int units = a.n_kv_heads * attn_octets(a.n_heads, a.n_kv_heads), n = (int)gridDim.x;
    int at = c.round * n + (c.round & 1 ? n - 1 - (int)blockIdx.x : (int)blockIdx.x);
    c.valid = at < h->n_splits * units;
    if (!c.valid) return;
    c.item = ((const struct attn_split *)((const int32_t *)h + h->splits_at))[at / units];
    c.unit = at % units;
    c.split = c.item.split < 0 ? 0 : c.item.split;
    find_span(a, c);
}

static DEVICE struct cursor after(const struct attn_args &a, const struct cursor &c) {
    struct cursor next = c;
    if (c.split < c.last_split()) {
        next.split++;
        find_span(a, next);
    } else {
        next.round++;
        find_item(a, next);
    }
    return next;
}

/* Keys at or beyond the end are zeros here and count for nothing in soften. fused: so is the last one, see put_new. */
static DEVICE void copy_stage(const struct attn_args &a, const struct cursor &c, int index, struct stage &to) {
    if (!c.live()) return;
    int lane = (int)threadIdx.x & 31, g = lane >> 2, t = lane & 3, which = index >> 1;
    int head = c.unit / attn_octets(a.n_heads, a.n_kv_heads);
#pragma unroll
    for (int i = 0; i < (which ? 8 : 4); i++) {
        /* key_tile: rows g and g + 8 of two tiles; value_tile: rows 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of two */
        int key = which ? 16 * (i >> 2) + 2 * t + (i & 1) + 8 * (i >> 1 & 1) : 16 * (i >> 1) + g + 8 * (i & 1);
        int pos = c.first + STAGE_KEYS * (index & 1) + key;
        int32_t block = __shfl_sync(ALL_LANES, c.blocks[index & 1], key);
        size_t at = rope_cache_row(block, a.n_kv_heads, head, which, pos, a.block_shift);
        const uint4 *row = (const uint4 *)a.kv + at * (HEAD_DIM / 8);
        bool real = pos < c.item.end - (a.fused ? 1 : 0);
        if (which) {
#pragma unroll
            for (int h = 0; h < 2; h++) copy16(&to.v[2 * i + h][lane], row + 8 * h + g, real);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) copy16(&to.v[4 * i + j][lane], row + 4 * j + t, real);
        }
    }
}

static DEVICE void score_stage(const struct stage &from, const struct query &q, int lane, float (&s0)[4],
                               float (&s1)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        struct key_tile k;
#pragma unroll
        for (int r = 0; r < 8; r++) k.v[r >> 2][r & 3] = from.v[8 * i + r][lane];
        score_tile(i ? s1 : s0, k, q);
    }
}

static DEVICE void value_stage(const struct stage &from, int lane, const h2 (&p0)[2], const h2 (&p1)[2],
                               struct outcome &o) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        struct value_tile v;
#pragma unroll
        for (int r = 0; r < 8; r++) v.v[r >> 1][r & 1] = from.v[8 * i + r][lane];
        add_values(o, v, i ? p1 : p0);
    }
}

/* Stage n of `now`, or n - STAGES of `next`, into the place that has just been read. */
template <int RING>
static DEVICE void refill(const struct attn_args &a, const struct cursor &now, const struct cursor &next, int n,
                          struct stage *ring) {
    copy_stage(a, n < STAGES ? now : next, n % STAGES, ring[n % RING]);
    copy_commit();
}

/* What a token brings to a fused step: its queries of an octet, normalised and turned, and its own key and value. */
struct new_rows {
    uint2 q[8][HEAD_DIM / 4], kv[2][HEAD_DIM / 4];
};

/* Once per item, by the block. Its last split has the token's own position, which is in no cache yet. */
static DEVICE void make_rows(const struct attn_args &a, const struct cursor &c, struct new_rows &to) {
    const struct rope_args &r = a.rope;
    int lane = (int)threadIdx.x % ROPE_LANES, half = (int)threadIdx.x / ROPE_LANES;
    int octets = attn_octets(a.n_heads, a.n_kv_heads), per_kv = a.n_heads / a.n_kv_heads;
    int token = c.item.token, pos = c.item.end - 1, kv_head = c.unit / octets, octet = c.unit % octets;
    int head = kv_head * per_kv + min(octet * 8 + half, per_kv - 1);
    struct rope_half q = rope_load(r.q, (size_t)token * (size_t)a.n_heads + (size_t)head, lane);
    q = rope_apply(q, rope_turn_at(r.q_norm, r.table, pos, lane), r.eps);
    if (octet * 8 + half >= per_kv) q = {{0, 0}, {0, 0}};
    rope_save(to.q, (size_t)half, lane, q);
    if (threadIdx.x < 32 && c.last_split() == c.item.n_splits - 1) {
        size_t row = (size_t)token * (size_t)a.n_kv_heads + (size_t)kv_head;
        struct rope_half v = rope_load(half ? r.v : r.k, row, lane);
        struct rope_half k = rope_apply(v, rope_turn_at(r.k_norm, r.table, pos, lane), r.eps);
        if (half == 0) v = k;
        const int32_t *table = (const int32_t *)a.step.header + c.item.table;
        row = rope_cache_row(table[pos >> a.block_shift], a.n_kv_heads, kv_head, half, pos, a.block_shift);
        rope_save(to.kv, (size_t)half, lane, v);
        if (octet == 0) rope_save(a.kv, row, lane, v);
    }
    __syncthreads();
}

static DEVICE void read_query(const struct new_rows &from, int lane, struct query &q) {
    const uint4 *row = (const uint4 *)from.q[lane >> 2];
#pragma unroll
    for (int j = 0; j < 4; j++) q.v[j] = row[4 * j + (lane & 3)];
}

/* The token's own key or value to where copy_stage would have put it, if the stage has it. */
static DEVICE void put_new(const struct cursor &c, int index, const struct new_rows &from, int lane, struct stage &to) {
    int key = c.item.end - 1 - c.first - STAGE_KEYS * (index & 1), g = lane >> 2, t = lane & 3, row = key & 15;
    if (key < 0 || key >= STAGE_KEYS) return;
    const uint4 *src = (const uint4 *)from.kv[index >> 1];
    if (index >> 1) {
        int r = 8 * (key >> 4) + 2 * ((row >> 3) * 2 + (row & 1));
        if ((row & 7) >> 1 == t)
            for (int h = 0; h < 2; h++) to.v[r + h][lane] = src[8 * h + g];
    } else if ((row & 7) == g) {
        for (int j = 0; j < 4; j++) to.v[8 * (key >> 4) + 4 * (row >> 3) + j][lane] = src[4 * j + t];
    }
}

/* The warp's span of `now`. */
template <int RING>
static DEVICE void span_from_ring(const struct attn_args &a, const struct cursor &now, const struct cursor &next,
                                  struct stage *ring, const struct new_rows &rows, int lane, struct outcome &o) {
    struct query q;
    struct scores s;
    h2 prob[TILES][2];
    bool live = now.live();
    int octets = attn_octets(a.n_heads, a.n_kv_heads);
    if (a.fused) read_query(rows, lane, q);
    else if (live) load_query(a, now.item.token, now.unit / octets, now.unit % octets, lane, q);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        copy_wait<RING - 1>();
        if (live && a.fused) put_new(now, i, rows, lane, ring[i % RING]);
        if (live) score_stage(ring[i % RING], q, lane, s.s[2 * i], s.s[2 * i + 1]);
        refill<RING>(a, now, next, i + RING, ring);
    }
    if (live) soften(s, now.item.end - now.first, lane, o, prob);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        copy_wait<RING - 1>();
        if (live && a.fused) put_new(now, 2 + i, rows, lane, ring[(2 + i) % RING]);
        if (live) value_stage(ring[(2 + i) % RING], lane, prob[2 * i], prob[2 * i + 1], o);
        refill<RING>(a, now, next, 2 + i + RING, ring);
    }
}

struct split_shared {
    float acc[SPANS][32][36]; /* [span][lane][8 x 4], padded */
    float max[SPANS][4][2], sum[SPANS][4][2];
    bool last;
};

/* A partial result: [WARPS][32 lanes]{float4 acc[2]}, then per lane 0 … 3: max[2], sum[2]. Warp `pair` has
 * accumulators 2 pair and 2 pair + 1 of every lane. */
static DEVICE float *partial_of(const struct attn_args &a, int index, int unit) {
    size_t n = attn_partial_floats(a.n_heads, a.n_kv_heads);
    return a.partials + (size_t)index * n + (size_t)unit * (8 * (HEAD_DIM + 2));
}

static DEVICE void merge_pair(float (&total)[2][4], const float4 (&part)[2],
                              const struct merge_factors &f0, const struct merge_factors &f1) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i][0] = merge_value(total[i][0], part[i].x, f0);
        total[i][1] = merge_value(total[i][1], part[i].y, f1);
        total[i][2] = merge_value(total[i][2], part[i].z, f0);
        total[i][3] = merge_value(total[i][3], part[i].w, f1);
    }
}

/* All splits of a token that wrote partial results, first to last. */
static DEVICE void merge_splits(const struct attn_args &a, int first_partial, int n, int unit, int lane,
                                int pair, float (&acc)[2][4], float (&max)[2], float (&sum)[2]) {
    for (int s = 0; s < n; s++) {
        const float4 *from = (const float4 *)partial_of(a, first_partial + s, unit);
        float4 part[2] = {__ldcg(from + (pair * 32 + lane) * 2), __ldcg(from + (pair * 32 + lane) * 2 + 1)};
        float4 ms = __ldcg(from + 8 * HEAD_DIM / 4 + (lane & 3));
        struct merge_factors f0 = merge_head(max[0], sum[0], ms.x, ms.z);
        struct merge_factors f1 = merge_head(max[1], sum[1], ms.y, ms.w);
        merge_pair(acc, part, f0, f1);
    }
}

/* The split's spans, merged by the block: warp `pair` merges two accumulators of every lane. */
static DEVICE void merge_spans(const struct split_shared &b, int n_spans, int lane, int pair,
                               float (&acc)[2][4], float (&max)[2], float (&sum)[2]) {
    int t = lane & 3;
    for (int s = 0; s < n_spans; s++) {
        const float4 *from = (const float4 *)&b.acc[s][lane][8 * pair];
        float4 part[2] = {from[0], from[1]};
        struct merge_factors f0 = merge_head(max[0], sum[0], b.max[s][t][0], b.sum[s][t][0]);
        struct merge_factors f1 = merge_head(max[1], sum[1], b.max[s][t][1], b.sum[s][t][1]);
        merge_pair(acc, part, f0, f1);
    }
}

static DEVICE void clear_pair(float (&acc)[2][4], float (&max)[2], float (&sum)[2]) {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i >> 2][i & 3] = 0.0f;
}

/* The outcomes of the warps' spans of a split, merged: two accumulators of every lane to each warp. */
static DEVICE void gather_split(struct split_shared &b, const struct cursor &c, const struct outcome &o, int lane,
                                int warp, float (&acc)[2][4], float (&max)[2], float (&sum)[2]) {
    __syncthreads(); /* b is free */
    if (c.live()) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            *(float4 *)&b.acc[warp][lane][4 * i] = make_float4(o.acc[i][0], o.acc[i][1], o.acc[i][2],
                                                               o.acc[i][3]);
        if (lane < 4) {
#pragma unroll
            for (int i = 0; i < 2; i++) b.max[warp][lane][i] = o.max[i], b.sum[warp][lane][i] = o.sum[i];
        }
    }
    __syncthreads();
    int n_spans = (c.item.end - c.split * SPLIT_KEYS + SPAN - 1) / SPAN;
    clear_pair(acc, max, sum);
    merge_spans(b, n_spans < SPANS ? n_spans : SPANS, lane, warp, acc, max, sum);
}

/* Writes the split's result; the block that finishes a token last merges them all. */
static DEVICE void hand_in(const struct attn_args &a, struct split_shared &b, const struct attn_split &item,
                           int kv_head, int octet, int lane, int warp, const float (&acc)[2][4],
                           const float (&max)[2], const float (&sum)[2]) {
    int octets = attn_octets(a.n_heads, a.n_kv_heads), unit = kv_head * octets + octet;
    float4 *to = (float4 *)partial_of(a, item.partial, unit);
#pragma unroll
    for (int i = 0; i < 2; i++)
        __stcg(to + (warp * 32 + lane) * 2 + i, make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
    if (warp == 0 && lane < 4)
        __stcg(to + 8 * HEAD_DIM / 4 + lane, make_float4(max[0], max[1], sum[0], sum[1]));
    __syncthreads();
    if (threadIdx.x == 0)
        b.last = draw_last(a.tickets + (size_t)item.token * (size_t)(a.n_kv_heads * octets) + unit, item.n_splits);
    __syncthreads();
    if (!b.last) return;
    float total[2][4], total_max[2], total_sum[2];
    clear_pair(total, total_max, total_sum);
    merge_splits(a, item.partial - item.split, item.n_splits, unit, lane, warp, total, total_max,
                 total_sum);
    store_out(a, item.token, kv_head, octet, lane, warp, total, total_sum);
}

template <int RING> struct splits_shared {
    struct stage ring[WARPS][RING];
    struct split_shared b;
    struct new_rows rows;
};

extern __shared__ __align__(16) uint8_t shared_bytes[];

/* RING 4 wants more shared memory than some devices have. */
template <int RING>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_attn_splits_f16(const __grid_constant__ struct attn_args a) {
    depend_release();
    struct splits_shared<RING> &shared = *(struct splits_shared<RING> *)shared_bytes;
    int octets = attn_octets(a.n_heads, a.n_kv_heads);
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    struct stage *ring = shared.ring[warp];
    struct cursor now = {}, next;
    find_item(a, now);
    /* Keys of earlier steps are there already: all that are copied if fused, or the token's sequence has but one. */
    if (!a.fused && (!now.valid || now.first + SPAN >= now.item.end)) depend_wait();
#pragma unroll
    for (int n = 0; n < RING; n++) {
        copy_stage(a, now, n, ring[n]);
        copy_commit();
    }
    depend_wait();
    float total[2][4], total_max[2], total_sum[2];
    clear_pair(total, total_max, total_sum);
    for (; now.valid; now = next) {
        float acc[2][4], max[2], sum[2];
        struct outcome o;
        next = after(a, now);
        if (a.fused && (now.split == now.item.split || now.split == 0)) make_rows(a, now, shared.rows);
        span_from_ring<RING>(a, now, next, ring, shared.rows, lane, o);
        gather_split(shared.b, now, o, lane, warp, acc, max, sum);
        int kv_head = now.unit / octets, octet = now.unit % octets;
        if (now.item.partial >= 0) {
            hand_in(a, shared.b, now.item, kv_head, octet, lane, warp, acc, max, sum);
            continue;
        }
        float4 part[2];
#pragma unroll
        for (int j = 0; j < 2; j++) part[j] = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
        struct merge_factors f0 = merge_head(total_max[0], total_sum[0], max[0], sum[0]);
        struct merge_factors f1 = merge_head(total_max[1], total_sum[1], max[1], sum[1]);
        merge_pair(total, part, f0, f1);
        if (now.split < now.last_split()) continue;
        store_out(a, now.item.token, kv_head, octet, lane, warp, total, total_sum);
        clear_pair(total, total_max, total_sum);
    }
    copy_wait<0>();
}

cudaError_t cuda_attn_splits(const struct attn_args *a, const struct cuda_queue *q) {
    dim3 grid((unsigned)q->n_sm, 1, 1);
    if (sizeof(struct splits_shared<4>) <= q->max_shared)
        return launch(k_attn_splits_f16<4>, grid, 32 * WARPS, sizeof(struct splits_shared<4>), q, *a);
    return launch(k_attn_splits_f16<2>, grid, 32 * WARPS, sizeof(struct splits_shared<2>), q, *a);
}

/* ---- prefill: eight tokens against all their keys ------------------------------------------------------------------ */

/* One span's keys and values in operand order: keys [tile][row g or g + 8][j][lane], values [tile][r][h][lane]. */
struct span_buffer {
    uint4 k[TILES][2][4][32];
    uint4 v[TILES][4][2][32];
};

static DEVICE void copy_span(struct span_buffer &b, const struct pages &p, int first, int end) {
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) { /* 32 rows of operands each, over 8 warps */
        int at = warp + 8 * i, tile = at >> 3;
        int pos = first + 16 * tile + g + 8 * (at >> 2 & 1), j = at & 3;
        bool real = pos < end;
        copy16(&b.k[tile][at >> 2 & 1][j][lane], p.row(real ? pos : first, 0) + 4 * j + t, real);
        int r = at >> 1 & 3, h = at & 1;
        pos = first + 16 * tile + 2 * t + (r & 1) + 8 * (r >> 1);
        real = pos < end;
        copy16(&b.v[tile][r][h][lane], p.row(real ? pos : first, 1) + 8 * h + g, real);
    }
}

static DEVICE void span_from_shared(const struct span_buffer &b, const struct query &q, int n_keys,
                                    int lane, struct outcome &o) {
    struct scores s;
    h2 prob[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        struct key_tile k;
#pragma unroll
        for (int r = 0; r < 8; r++) k.v[r >> 2][r & 3] = b.k[i][r >> 2][r & 3][lane];
        score_tile(s.s[i], k, q);
    }
    soften(s, n_keys, lane, o, prob);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        struct value_tile v;
#pragma unroll
        for (int r = 0; r < 8; r++) v.v[r >> 1][r & 1] = b.v[i][r >> 1][r & 1][lane];
        add_values(o, v, prob[i]);
    }
}

static __global__ void __launch_bounds__(32 * TILE_TOKENS, 1)
    k_attn_tiles_f16(const __grid_constant__ struct attn_args a) {
    depend_release();
    depend_wait();
    const struct step_header *h = a.step.header;
    if ((int)blockIdx.y >= h->n_tiles) return;
    struct attn_tile tile = ((const struct attn_tile *)((const int32_t *)h + h->tiles_at))[blockIdx.y];
    struct span_buffer *buffers = (struct span_buffer *)shared_bytes;
    int octets = attn_octets(a.n_heads, a.n_kv_heads);
    int kv_head = (int)blockIdx.x / octets, octet = (int)blockIdx.x % octets;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    int token = tile.token + min(warp, tile.n_tokens - 1);
    int end = a.step.pos[token] + 1, end_of_tile = a.step.pos[tile.token] + tile.n_tokens;
    struct pages p = pages_of(a, token, kv_head);
    struct query q;
    load_query(a, token, kv_head, octet, lane, q);
    struct outcome total, split;
    outcome_clear(total);
    outcome_clear(split);
    int n_spans = (end_of_tile + SPAN - 1) / SPAN;
    copy_span(buffers[0], p, 0, end_of_tile);
    copy_commit();
    for (int i = 0; i < n_spans; i++) {
        if (i + 1 < n_spans) copy_span(buffers[(i + 1) & 1], p, (i + 1) * SPAN, end_of_tile);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        if (i * SPAN < end) {
            struct outcome part;
            span_from_shared(buffers[i & 1], q, end - i * SPAN, lane, part);
            merge(split, part);
            if (i % SPANS == SPANS - 1 || (i + 1) * SPAN >= end) {
                merge(total, split);
                outcome_clear(split);
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
    if (warp >= tile.n_tokens) return;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        float acc[2][4];
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j >> 2][j & 3] = total.acc[2 * pair + (j >> 2)][j & 3];
        store_out(a, token, kv_head, octet, lane, pair, acc, total.sum);
    }
}

cudaError_t cuda_attn_tiles(const struct attn_args *a, int max_tiles, const struct cuda_queue *q) {
    unsigned units = (unsigned)(a->n_kv_heads * attn_octets(a->n_heads, a->n_kv_heads));
    return launch(k_attn_tiles_f16, dim3(units, (unsigned)max_tiles, 1), 32 * TILE_TOKENS,
                  2 * sizeof(struct span_buffer), q, *a);
}

cudaError_t attn_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_attn_splits_f16<4>);
    if (e != cudaSuccess) return e;
    (void)cudaFuncSetAttribute(k_attn_splits_f16<4>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)sizeof(struct splits_shared<4>));
    (void)cudaGetLastError(); /* where it is too much, RING 2 is launched */
    e = cudaFuncSetAttribute(k_attn_splits_f16<2>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(struct splits_shared<2>));
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(k_attn_tiles_f16, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)(2 * sizeof(struct span_buffer)));
}
