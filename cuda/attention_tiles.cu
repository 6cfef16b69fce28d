/* attention_tiles: prefill, TILE_TOKENS consecutive tokens of a sequence at a time; see attention.cuh. A block's warps share the
 * keys and values of a span through shared memory, PER_WARP tokens to a warp, so that each operand that is read from
 * there meets so many tokens. */
#include "cuda/attention.cuh"

enum : int { WARPS = 8 };

/* One span's keys and values in operand order: keys [tile][row g or g + 8][j][lane], values [tile][r][h][lane]. */
struct span_buffer {
    uint4 k[TILES][2][4][32];
    uint4 v[TILES][4][2][32];
};

/* A block's place in the work list: tokens `token` … of a tile, a unit of heads, a span. */
struct tile_cursor {
    struct attn_tile tile;
    int round, unit, token, n_tokens, span, n_spans;
    bool valid;
};

/* PER_WARP tokens of a warp. */
template <int PER_WARP> struct tile_tokens {
    struct query q[PER_WARP];
    struct outcome split[PER_WARP];
    struct measure total[PER_WARP]; /* its accumulators are in shared memory */
};

/* Accumulators of the totals: [8] quads of every lane. */
typedef float4 totals[8][32];

template <int PER_WARP> struct tiles_shared {
    struct span_buffer spans[2];
    totals total[WARPS][PER_WARP];
};

/* Tiles come longest first: rounds of one for each block, to and fro. */
template <int PER_WARP> static DEVICE void find_tile(const struct attn_args &a, struct tile_cursor &c) {
    constexpr int parts = TILE_TOKENS / (WARPS * PER_WARP);
    const struct step_header *h = a.step.header;
    int units = a.n_kv_heads * attn_octets(a.n_heads, a.n_kv_heads), n = (int)gridDim.x;
    int at = c.round * n + (c.round & 1 ? n - 1 - (int)blockIdx.x : (int)blockIdx.x);
    c.valid = at < h->n_tiles * units * parts;
    if (!c.valid) return;
    c.tile = ((const struct attn_tile *)((const int32_t *)h + h->tiles_at))[at / (units * parts)];
    int first = at / units % parts * WARPS * PER_WARP;
    c.unit = at % units;
    c.token = c.tile.token + first;
    c.n_tokens = min(c.tile.n_tokens - first, WARPS * PER_WARP);
    c.span = 0;
    c.n_spans = c.n_tokens > 0 ? (c.tile.pos + first + c.n_tokens + SPAN - 1) / SPAN : 0;
}

template <int PER_WARP> static DEVICE struct tile_cursor after(const struct attn_args &a, const struct tile_cursor &c) {
    struct tile_cursor next = c;
    if (++next.span < c.n_spans) return next;
    do {
        next.round++;
        find_tile<PER_WARP>(a, next);
    } while (next.valid && next.n_spans == 0);
    return next;
}

static DEVICE void copy_span(const struct attn_args &a, const struct tile_cursor &c, struct span_buffer &b) {
    if (!c.valid) return;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int head = c.unit / attn_octets(a.n_heads, a.n_kv_heads), first = c.span * SPAN;
    int end = c.tile.pos + c.token - c.tile.token + c.n_tokens;
    const int32_t *table = (const int32_t *)a.step.header + c.tile.table;
    const uint4 *kv = (const uint4 *)a.kv;
#pragma unroll
    for (int i = 0; i < 4; i++) { /* 32 rows of operands each, over 8 warps */
        int at = warp + 8 * i, tile = at >> 3, j = at & 3, r = at >> 1 & 3, h = at & 1;
        int pos = first + 16 * tile + g + 8 * (at >> 2 & 1), known = min(pos, end - 1);
        size_t row = rope_cache_row(table[known >> a.block_shift], a.n_kv_heads, head, 0, known, a.block_shift);
        copy16(&b.k[tile][at >> 2 & 1][j][lane], kv + row * (HEAD_DIM / 8) + 4 * j + t, pos < end);
        pos = first + 16 * tile + 2 * t + (r & 1) + 8 * (r >> 1), known = min(pos, end - 1);
        row = rope_cache_row(table[known >> a.block_shift], a.n_kv_heads, head, 1, known, a.block_shift);
        copy16(&b.v[tile][r][h][lane], kv + row * (HEAD_DIM / 8) + 8 * h + g, pos < end);
    }
}

/* Scores of a span for all tokens of the warp, softened: probabilities and measures. n_keys of it count. */
template <int PER_WARP>
static DEVICE void score_span(const struct span_buffer &b, const struct query (&q)[PER_WARP],
                              const int (&n_keys)[PER_WARP], int lane, struct measure (&m)[PER_WARP],
                              h2 (&p)[PER_WARP][TILES][2]) {
    struct scores s[PER_WARP];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        struct key_tile k;
#pragma unroll
        for (int r = 0; r < 8; r++) k.v[r >> 2][r & 3] = b.k[i][r >> 2][r & 3][lane];
#pragma unroll
        for (int x = 0; x < PER_WARP; x++) score_tile(s[x].s[i], k, q[x]);
    }
#pragma unroll
    for (int x = 0; x < PER_WARP; x++) soften(s[x], n_keys[x], lane, m[x], p[x]);
}

/* The span's values by the probabilities, merged into the splits; half of the dims at a time. */
template <int PER_WARP>
static DEVICE void add_span(const struct span_buffer &b, const struct measure (&m)[PER_WARP],
                            const h2 (&p)[PER_WARP][TILES][2], const int (&n_keys)[PER_WARP], int lane,
                            struct outcome (&split)[PER_WARP]) {
    struct merge_factors f[PER_WARP][2];
#pragma unroll
    for (int x = 0; x < PER_WARP; x++) {
        if (n_keys[x] <= 0) continue;
        f[x][0] = merge_head(split[x].m, m[x], 0);
        f[x][1] = merge_head(split[x].m, m[x], 1);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float part[PER_WARP][4][4] = {};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint4 v[4];
#pragma unroll
            for (int r = 0; r < 4; r++) v[r] = b.v[i][r][h][lane];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                h2 values[4];
                value_operand(v, w, values);
#pragma unroll
                for (int x = 0; x < PER_WARP; x++) mma_f16(part[x][w], values, p[x][i][0], p[x][i][1]);
            }
        }
#pragma unroll
        for (int x = 0; x < PER_WARP; x++) {
            if (n_keys[x] <= 0) continue;
#pragma unroll
            for (int w = 0; w < 4; w++)
                merge_four(split[x].acc[4 * h + w],
                           make_float4(part[x][w][0], part[x][w][1], part[x][w][2], part[x][w][3]), f[x][0], f[x][1]);
        }
    }
}

static DEVICE void clear(struct outcome &o) {
    o.m = measure_none();
#pragma unroll
    for (int i = 0; i < 8; i++) o.acc[i][0] = o.acc[i][1] = o.acc[i][2] = o.acc[i][3] = 0.0f;
}

/* split into total, and split is empty again. */
static DEVICE void merge_split(struct measure &m, totals &total, struct outcome &split, int lane) {
    struct merge_factors f0 = merge_head(m, split.m, 0), f1 = merge_head(m, split.m, 1);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float4 v = total[i][lane];
        float acc[4] = {v.x, v.y, v.z, v.w};
        merge_four(acc, make_float4(split.acc[i][0], split.acc[i][1], split.acc[i][2], split.acc[i][3]), f0, f1);
        total[i][lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    }
    clear(split);
}

static DEVICE void store_total(const struct attn_args &a, int token, int unit, const struct measure &m,
                               const totals &total, int lane) {
    int octets = attn_octets(a.n_heads, a.n_kv_heads);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        float4 v = total[2 * pair][lane], w = total[2 * pair + 1][lane];
        float acc[2][4] = {{v.x, v.y, v.z, v.w}, {w.x, w.y, w.z, w.w}};
        store_out(a, token, unit / octets, unit % octets, lane, pair, acc, m.sum);
    }
}

extern __shared__ __align__(16) uint8_t shared_bytes[];

template <int PER_WARP>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_attn_tiles_f16(const __grid_constant__ struct attn_args a) {
    struct tiles_shared<PER_WARP> &shared = *(struct tiles_shared<PER_WARP> *)shared_bytes;
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, octets = attn_octets(a.n_heads, a.n_kv_heads);
    struct tile_cursor now = {}, next;
    now.round = -1;
    now = after<PER_WARP>(a, now);
    depend_wait();
    copy_span(a, now, shared.spans[0]);
    copy_commit();
    struct tile_tokens<PER_WARP> t;
    totals *total = shared.total[warp];
    for (int n = 0; now.valid; now = next, n++) {
        int end[PER_WARP], n_keys[PER_WARP];
#pragma unroll
        for (int x = 0; x < PER_WARP; x++) {
            int token = min(now.token + PER_WARP * warp + x, now.token + now.n_tokens - 1);
            end[x] = now.tile.pos + token - now.tile.token + 1;
            n_keys[x] = end[x] - now.span * SPAN;
            if (now.span > 0) continue;
            load_query(a, token, now.unit / octets, now.unit % octets, lane, t.q[x]);
            clear(t.split[x]);
            t.total[x] = measure_none();
#pragma unroll
            for (int i = 0; i < 8; i++) total[x][i][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        next = after<PER_WARP>(a, now);
        copy_wait<0>();
        __syncthreads(); /* the span is there, and the other buffer free */
        copy_span(a, next, shared.spans[(n + 1) & 1]);
        copy_commit();
        if (PER_WARP * warp >= now.n_tokens) continue;
        const struct span_buffer &b = shared.spans[n & 1];
        struct measure m[PER_WARP];
        h2 p[PER_WARP][TILES][2];
        score_span<PER_WARP>(b, t.q, n_keys, lane, m, p);
        add_span<PER_WARP>(b, m, p, n_keys, lane, t.split);
#pragma unroll
        for (int x = 0; x < PER_WARP; x++) {
            bool last = n_keys[x] <= SPAN, some = n_keys[x] > 0;
            if (some && (last || now.span % SPANS == SPANS - 1)) merge_split(t.total[x], total[x], t.split[x], lane);
            int token = PER_WARP * warp + x;
            if (now.span == now.n_spans - 1 && token < now.n_tokens)
                store_total(a, now.token + token, now.unit, t.total[x], total[x], lane);
        }
    }
    copy_wait<0>();
}

cudaError_t cuda_attn_tiles(const struct attn_args *a, const struct cuda_queue *q) {
    dim3 grid((unsigned)q->n_sm, 1, 1);
    if (sizeof(struct tiles_shared<2>) <= q->max_shared)
        return launch(k_attn_tiles_f16<2>, grid, 32 * WARPS, sizeof(struct tiles_shared<2>), q, *a);
    return launch(k_attn_tiles_f16<1>, grid, 32 * WARPS, sizeof(struct tiles_shared<1>), q, *a);
}

cudaError_t attn_tiles_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_attn_tiles_f16<2>);
    if (e != cudaSuccess) return e;
    (void)cudaFuncSetAttribute(k_attn_tiles_f16<2>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)sizeof(struct tiles_shared<2>));
    (void)cudaGetLastError(); /* where it is too much, one token to a warp is launched */
    return cudaFuncSetAttribute(k_attn_tiles_f16<1>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)sizeof(struct tiles_shared<1>));
}
