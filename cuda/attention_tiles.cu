/* attention_tiles: prefill, TILE_TOKENS consecutive tokens of a sequence at a time; see attention.cuh. A block's warps share the
 * keys and values of a span through shared memory, two tokens to a warp.
 *
 * Here the queries are the rows of the products, eight heads of one token and then of the other, and keys or dims the
 * columns: so the scores of one product are the operand of the next. A product's sum has the same order either way
 * round. */
#include "cuda/attention.cuh"

enum : int { WARPS = 8, ROWS = 2 /* tokens of a warp */, COLUMNS = SPAN / 8 /* of keys, 8 wide */ };
static_assert((int)WARPS * (int)ROWS == (int)TILE_TOKENS, "a block takes a tile");

struct span_buffer {
    struct span_rows k, v;
};

/* A block's place in the work list: a tile, a unit of heads, a span. */
struct tile_cursor {
    struct attn_tile tile;
    int round, unit, span, n_spans;
    bool valid;

    DEVICE int end() const { return tile.pos + tile.n_tokens; }
};

/* Head g of the warp's two tokens: of accumulators [i][2 x + e], dims 8 i + 2 t + e of token x. */
struct pair_outcome {
    struct measure m; /* [x] */
    float acc[HEAD_DIM / 8][4];
};

/* Sums over all splits so far, quads of every lane. */
typedef float4 totals[HEAD_DIM / 8][32];

template <int BUFFERS> struct tiles_shared {
    struct span_buffer spans[BUFFERS];
    totals total[WARPS];
};

/* Tiles come longest first: rounds of one for each block, to and fro. */
static DEVICE void find_tile(const struct attn_args &a, struct tile_cursor &c) {
    const struct step_header *h = a.step.header;
    int units = a.n_kv_heads * a.octets, n = (int)gridDim.x;
    int at = c.round * n + (c.round & 1 ? n - 1 - (int)blockIdx.x : (int)blockIdx.x);
    c.valid = at < h->n_tiles * units;
    if (!c.valid) return;
    c.tile = ((const struct attn_tile *)((const int32_t *)h + h->tiles_at))[at / units];
    c.unit = at % units;
    c.span = 0;
    c.n_spans = (c.end() + SPAN - 1) / SPAN;
}

static DEVICE struct tile_cursor after(const struct attn_args &a, const struct tile_cursor &c) {
    struct tile_cursor next = c;
    if (++next.span < c.n_spans) return next;
    next.round++;
    find_tile(a, next);
    return next;
}

/* The memory of a position, which: 0 key, 1 value. */
static DEVICE const uint4 *row_of(const struct attn_args &a, const struct tile_cursor &c, int pos, int which) {
    const int32_t *table = (const int32_t *)a.step.header + c.tile.table;
    int head = c.unit / a.octets;
    size_t row = rope_cache_row(table[pos >> a.block_shift], a.n_kv_heads, head, which, pos, a.block_shift);
    return (const uint4 *)a.kv + row * (HEAD_DIM / 8);
}

static DEVICE void copy_span(const struct attn_args &a, const struct tile_cursor &c, struct span_buffer &b) {
    if (!c.valid) return;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, first = c.span * SPAN, end = c.end();
    int piece = lane & 15;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int key = 8 * warp + 2 * (i & 3) + (lane >> 4), pos = first + key, which = i >> 2;
        const uint4 *row = row_of(a, c, min(pos, end - 1), which);
        copy16(&(which ? b.v : b.k).v[key][piece ^ (key & 7)], row + piece, pos < end);
    }
}

/* Queries of two tokens as operands, 16 dims each. */
struct query_pair {
    h2 a[8][4];
};

static DEVICE void load_pair(const struct attn_args &a, int token0, int token1, int unit, int lane, struct query_pair &q) {
    struct query q0, q1;
    load_query(a, token0, unit, lane, q0);
    load_query(a, token1, unit, lane, q1);
#pragma unroll
    for (int s = 0; s < 8; s++)
        q.a[s][0] = q0.w[2 * s], q.a[s][1] = q1.w[2 * s], q.a[s][2] = q0.w[2 * s + 1], q.a[s][3] = q1.w[2 * s + 1];
}

/* What soften does, of token x: keys are in lanes t and columns n; the sum goes over n, then over the keys of 8 in the
 * same tree. None of the keys counts where n_keys <= 0: then all is 0, which merges as nothing. */
static DEVICE void soften_row(float (&s)[COLUMNS][4], int x, int n_keys, int lane, struct measure &m,
                              h2 (&p)[COLUMNS][2]) {
    int t = lane & 3;
    float max = -INFINITY, sums[2] = {};
    if (n_keys < SPAN) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * n + 2 * t + e >= n_keys) s[n][2 * x + e] = -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) max = fmaxf(max, fmaxf(s[n][2 * x], s[n][2 * x + 1]));
    max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 1));
    max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 2)) * SCORE_SCALE;
    float base = n_keys > 0 ? max : 0.0f;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        p[n][x] = h2_pack_small(probability(s[n][2 * x], base), probability(s[n][2 * x + 1], base));
        sums[0] += h2_low_f32(p[n][x]);
        sums[1] += h2_high_f32(p[n][x]);
    }
    float sum = sums[0] + sums[1];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    m.sum[x] = sum + __shfl_xor_sync(ALL_LANES, sum, 2);
    m.max[x] = max;
}

static DEVICE void score_span(const struct span_buffer &b, const struct query_pair &q, const int (&n_keys)[ROWS],
                              int lane, struct measure &m, h2 (&p)[COLUMNS][2]) {
    float s[COLUMNS][4] = {};
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            h2 k[4];
            load_matrices(k, &b.k.v[8 * n + (lane & 7)][(4 * j + (lane >> 3)) ^ (lane & 7)]);
            mma_f16(s[n], q.a[2 * j], k[0], k[1]);
            mma_f16(s[n], q.a[2 * j + 1], k[2], k[3]);
        }
#pragma unroll
    for (int x = 0; x < ROWS; x++) soften_row(s, x, n_keys[x], lane, m, p);
}

/* The span's values by the probabilities, merged into the split; a quarter of the dims at a time. */
static DEVICE void add_span(const struct span_buffer &b, const struct measure &m, const h2 (&p)[COLUMNS][2], int lane,
                            struct pair_outcome &split) {
    enum : int { QUARTER = HEAD_DIM / 8 / 4 };
    struct merge_factors f[ROWS] = {merge_head(split.m, m, 0), merge_head(split.m, m, 1)};
    int row = (lane & 7) + 8 * (lane >> 3 & 1);
#pragma unroll
    for (int first = 0; first < HEAD_DIM / 8; first += QUARTER) {
        float part[QUARTER][4] = {};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            h2 rows[4] = {p[2 * i][0], p[2 * i][1], p[2 * i + 1][0], p[2 * i + 1][1]};
#pragma unroll
            for (int n = 0; n < QUARTER; n += 2) {
                h2 v[4];
                load_transposed(v, &b.v.v[16 * i + row][(first + n + (lane >> 4)) ^ (row & 7)]);
                mma_f16(part[n], rows, v[0], v[1]);
                mma_f16(part[n + 1], rows, v[2], v[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < QUARTER; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                split.acc[first + n][j] = merge_value(split.acc[first + n][j], part[n][j], f[j >> 1]);
    }
}

static DEVICE void clear_row(struct pair_outcome &o, int x) {
    o.m.max[x] = -INFINITY, o.m.sum[x] = 0.0f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) o.acc[i][2 * x] = o.acc[i][2 * x + 1] = 0.0f;
}

/* The split of token x into its total; then it is empty again. */
static DEVICE void merge_split(struct measure &m, totals &total, struct pair_outcome &split, int x, int lane) {
    struct merge_factors f = merge_head(m, split.m, x);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
        float2 *at = (float2 *)&total[i][lane] + x;
        float2 v = *at;
        *at = make_float2(merge_value(v.x, split.acc[i][2 * x], f), merge_value(v.y, split.acc[i][2 * x + 1], f));
    }
    clear_row(split, x);
}

static DEVICE void store_row(const struct attn_args &a, int token, int unit, const struct measure &m, const totals &total,
                             int x, int lane) {
    int octets = a.octets, per_kv = a.per_kv;
    int column = unit % octets * 8 + (lane >> 2);
    if (column >= per_kv) return;
    size_t head = (size_t)(unit / octets) * (size_t)per_kv + (size_t)column;
    h2 *to = (h2 *)a.out + ((size_t)token * (size_t)a.n_heads + head) * (HEAD_DIM / 2) + (lane & 3);
    float inverse = 1.0f / m.sum[x];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
        float2 v = ((const float2 *)&total[i][lane])[x];
        to[4 * i] = h2_pack(v.x * inverse, v.y * inverse);
    }
}

extern __shared__ __align__(16) uint8_t shared_bytes[];

/* BUFFERS 2 wants more shared memory than some devices have. */
template <int BUFFERS>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_attn_tiles_f16(const __grid_constant__ struct attn_args a) {
    struct tiles_shared<BUFFERS> &shared = *(struct tiles_shared<BUFFERS> *)shared_bytes;
    depend_release();
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    struct tile_cursor now = {}, next;
    find_tile(a, now);
    depend_wait();
    copy_span(a, now, shared.spans[0]);
    copy_commit();
    struct query_pair q;
    struct pair_outcome split;
    struct measure m_total;
    totals &total = shared.total[warp];
    for (int n = 0; now.valid; now = next, n++) {
        int n_keys[ROWS], last = now.tile.n_tokens - 1, token[ROWS];
#pragma unroll
        for (int x = 0; x < ROWS; x++) {
            token[x] = min(ROWS * warp + x, last);
            n_keys[x] = now.tile.pos + token[x] + 1 - now.span * SPAN;
        }
        if (now.span == 0) {
            load_pair(a, now.tile.token + token[0], now.tile.token + token[1], now.unit, lane, q);
            m_total = measure_none();
#pragma unroll
            for (int x = 0; x < ROWS; x++) clear_row(split, x);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) total[i][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        next = after(a, now);
        copy_wait<0>();
        __syncthreads(); /* the span is there, and the other buffer free */
        if (BUFFERS > 1) copy_span(a, next, shared.spans[(n + 1) % BUFFERS]);
        copy_commit();
        if (ROWS * warp <= last) {
            const struct span_buffer &b = shared.spans[n % BUFFERS];
            struct measure m;
            h2 p[COLUMNS][2];
            score_span(b, q, n_keys, lane, m, p);
            add_span(b, m, p, lane, split);
#pragma unroll
            for (int x = 0; x < ROWS; x++) {
                bool ends = n_keys[x] <= SPAN || now.span % SPANS == SPANS - 1;
                if (n_keys[x] > 0 && ends) merge_split(m_total, total, split, x, lane);
                if (now.span == now.n_spans - 1 && ROWS * warp + x <= last)
                    store_row(a, now.tile.token + token[x], now.unit, m_total, total, x, lane);
            }
        }
        if (BUFFERS > 1) continue;
        __syncthreads();
        copy_span(a, next, shared.spans[0]);
        copy_commit();
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
    (void)cudaGetLastError(); /* where it is too much, one buffer does */
    return cudaFuncSetAttribute(k_attn_tiles_f16<1>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)sizeof(struct tiles_shared<1>));
}
