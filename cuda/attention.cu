/* attention: decoding, one token at a time; see attention.cuh. A block takes a token and KV head, one split after the other, or
 * one split of them when there are too few tokens to go round; then the last block of a token merges its splits. A
 * warp takes a span. */
#include "cuda/attention.cuh"

enum : int { WARPS = SPANS, MERGED = 4 /* partial results under way */ };

/* ---- keys and values on their way -------------------------------------------------------------------------------- */

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
                               float (&acc)[8][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint4 v[4];
#pragma unroll
            for (int r = 0; r < 4; r++) v[r] = from.v[8 * i + 2 * r + h][lane];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                h2 values[4];
                value_operand(v, w, values);
                mma_f16(acc[4 * h + w], values, i ? p1[0] : p0[0], i ? p1[1] : p0[1]);
            }
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
struct __align__(16) new_rows {
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
    if (a.fused) read_query(rows, lane, q);
    else if (live) load_query(a, now.item.token, now.unit, lane, q);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        copy_wait<RING - 1>();
        if (live && a.fused) put_new(now, i, rows, lane, ring[i % RING]);
        if (live) score_stage(ring[i % RING], q, lane, s.s[2 * i], s.s[2 * i + 1]);
        refill<RING>(a, now, next, i + RING, ring);
    }
    if (live) soften(s, now.item.end - now.first, lane, o.m, prob);
#pragma unroll
    for (int i = 0; i < 8; i++) o.acc[i][0] = o.acc[i][1] = o.acc[i][2] = o.acc[i][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        copy_wait<RING - 1>();
        if (live && a.fused) put_new(now, 2 + i, rows, lane, ring[(2 + i) % RING]);
        if (live) value_stage(ring[(2 + i) % RING], lane, prob[2 * i], prob[2 * i + 1], o.acc);
        refill<RING>(a, now, next, 2 + i + RING, ring);
    }
}

/* ---- merging spans and splits ---------------------------------------------------------------------------------------- */

struct __align__(16) split_shared {
    float acc[SPANS][32][36]; /* [span][lane][8 x 4], padded */
    struct measure m[SPANS][4];
    bool last;
};

/* What a warp merges: accumulators 2 warp and 2 warp + 1 of every lane. */
struct quarter {
    struct measure m;
    float acc[2][4];
};

static DEVICE struct quarter quarter_none() { return {measure_none(), {}}; }

static DEVICE void merge_part(struct quarter &total, const float4 (&part)[2], const struct measure &m) {
    struct merge_factors f0 = merge_head(total.m, m, 0), f1 = merge_head(total.m, m, 1);
    merge_four(total.acc[0], part[0], f0, f1);
    merge_four(total.acc[1], part[1], f0, f1);
}

static DEVICE float4 as_float4(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }

/* The outcomes of the warps' spans of a split. */
static DEVICE struct quarter gather_split(struct split_shared &b, const struct cursor &c, const struct outcome &o,
                                          int lane, int warp) {
    __syncthreads(); /* b is free */
    if (c.live()) {
#pragma unroll
        for (int i = 0; i < 8; i++) *(float4 *)&b.acc[warp][lane][4 * i] = as_float4(o.acc[i]);
        if (lane < 4) b.m[warp][lane] = o.m;
    }
    __syncthreads();
    int n_spans = min((c.item.end - c.split * SPLIT_KEYS + SPAN - 1) / SPAN, (int)SPANS);
    struct quarter total = quarter_none();
    for (int s = 0; s < n_spans; s++) {
        const float4 *from = (const float4 *)&b.acc[s][lane][8 * warp];
        merge_part(total, {from[0], from[1]}, b.m[s][lane & 3]);
    }
    return total;
}

/* A partial result: [WARPS][32 lanes]{float4 acc[2]}, then a measure for each of lanes 0 … 3. */
static DEVICE float4 *partial_of(const struct attn_args &a, int index, int unit) {
    size_t n = attn_partial_floats(a.n_heads, a.n_kv_heads);
    return (float4 *)(a.partials + (size_t)index * n + (size_t)unit * (8 * (HEAD_DIM + 2)));
}

static DEVICE void store_quarter(const struct attn_args &a, const struct cursor &c, int lane, int warp,
                                 const struct quarter &total) {
    int octets = attn_octets(a.n_heads, a.n_kv_heads);
    store_out(a, c.item.token, c.unit / octets, c.unit % octets, lane, warp, total.acc, total.m.sum);
}

/* Writes the split's result; the block that finishes a token last merges them all, first to last. */
static DEVICE void hand_in(const struct attn_args &a, struct split_shared &b, const struct cursor &c,
                           const struct quarter &own, int lane, int warp) {
    int units = a.n_kv_heads * attn_octets(a.n_heads, a.n_kv_heads), at = warp * 32 + lane;
    float4 *to = partial_of(a, c.item.partial, c.unit);
    __stcg(to + 2 * at, as_float4(own.acc[0]));
    __stcg(to + 2 * at + 1, as_float4(own.acc[1]));
    const struct measure &m = own.m;
    if (warp == 0 && lane < 4)
        __stcg(to + 8 * HEAD_DIM / 4 + lane, make_float4(m.max[0], m.max[1], m.sum[0], m.sum[1]));
    __syncthreads();
    if (threadIdx.x == 0)
        b.last = draw_last(a.tickets + (size_t)c.item.token * (size_t)units + c.unit, c.item.n_splits);
    __syncthreads();
    if (!b.last) return;
    struct quarter total = quarter_none();
    for (int first = 0; first < c.item.n_splits; first += MERGED) {
        float4 part[MERGED][2], v[MERGED];
#pragma unroll
        for (int i = 0; i < MERGED; i++) { /* a split twice rather than a branch: all loads are to be under way */
            int split = min(first + i, c.item.n_splits - 1);
            const float4 *from = partial_of(a, c.item.partial - c.item.split + split, c.unit);
            part[i][0] = __ldcg(from + 2 * at);
            part[i][1] = __ldcg(from + 2 * at + 1);
            v[i] = __ldcg(from + 8 * HEAD_DIM / 4 + (lane & 3));
        }
#pragma unroll
        for (int i = 0; i < MERGED; i++)
            if (first + i < c.item.n_splits) merge_part(total, part[i], {{v[i].x, v[i].y}, {v[i].z, v[i].w}});
    }
    store_quarter(a, c, lane, warp, total);
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
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    struct stage *ring = shared.ring[warp];
    struct cursor now = {}, next;
    find_item(a, now);
    /* Keys of earlier steps are there already: all that are copied if fused, else all but the token's own. */
    if (!a.fused && (!now.valid || now.first + SPAN >= now.item.end)) depend_wait();
#pragma unroll
    for (int n = 0; n < RING; n++) {
        copy_stage(a, now, n, ring[n]);
        copy_commit();
    }
    depend_wait();
    struct quarter total = quarter_none();
    for (; now.valid; now = next) {
        struct outcome o;
        next = after(a, now);
        if (a.fused && (now.split == now.item.split || now.split == 0)) make_rows(a, now, shared.rows);
        span_from_ring<RING>(a, now, next, ring, shared.rows, lane, o);
        struct quarter split = gather_split(shared.b, now, o, lane, warp);
        if (now.item.partial >= 0) {
            hand_in(a, shared.b, now, split, lane, warp);
            continue;
        }
        merge_part(total, {as_float4(split.acc[0]), as_float4(split.acc[1])}, split.m);
        if (now.split < now.last_split()) continue;
        store_quarter(a, now, lane, warp, total);
        total = quarter_none();
    }
    copy_wait<0>();
}

cudaError_t cuda_attn_splits(const struct attn_args *a, const struct cuda_queue *q) {
    dim3 grid((unsigned)q->n_sm, 1, 1);
    if (sizeof(struct splits_shared<4>) <= q->max_shared)
        return launch(k_attn_splits_f16<4>, grid, 32 * WARPS, sizeof(struct splits_shared<4>), q, *a);
    return launch(k_attn_splits_f16<2>, grid, 32 * WARPS, sizeof(struct splits_shared<2>), q, *a);
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
    return e != cudaSuccess ? e : attn_tiles_prepare();
}
