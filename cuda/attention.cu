/* attention: decoding, one token at a time; see attention.cuh. A warp takes a piece of the work list, a token's keys for eight
 * heads or a part of them, one span after the other, while a ring of its own in shared memory is filled with the spans
 * to come: no warp waits for another. In small steps (`by_blocks`), where one span is all that there is time for, a
 * block takes a piece of up to four spans, a warp each, and its first warp merges them. Tokens are cut when there are
 * too few to go round; then the warp that finishes a token last merges its pieces. */
#include "cuda/attention.cuh"

enum : int { WARPS = ATTN_WARPS, MERGED = 3 /* partial results under way */ };

/* ---- the work list ------------------------------------------------------------------------------------------------- */

/* What of the header is asked for again and again. */
struct work_list {
    const struct attn_piece *pieces;
    int n, units; /* pieces of all units */
    bool by_blocks;
};

static DEVICE struct work_list read_list(const struct attn_args &a) {
    const struct step_header *h = a.step.header;
    int units = a.n_kv_heads * a.octets;
    return {(const struct attn_piece *)((const int32_t *)h + h->pieces_at), h->n_pieces * units, units, h->by_blocks != 0};
}

/* A warp's place in the work list: a piece, its spans of it, and the unit of heads. */
struct place {
    struct attn_piece p;
    int unit, round;
    int span, n_spans;
    bool valid;

    DEVICE bool last() const { return p.piece == p.n_pieces - 1; } /* has the token's own position */
};

/* Pieces come longest first: rounds of one for each warp (or block), to and fro, leave all with about the same. */
static DEVICE void find_place(const struct work_list &list, int round, struct place &at) {
    int warp = (int)threadIdx.x >> 5, n = (int)gridDim.x;
    int worker = list.by_blocks ? (int)blockIdx.x : warp * n + (int)blockIdx.x;
    if (!list.by_blocks) n *= WARPS;
    int i = round * n + (round & 1 ? n - 1 - worker : worker);
    at.round = round;
    at.valid = i < list.n;
    if (!at.valid) return;
    at.unit = i % list.units;
    at.p = list.pieces[i / list.units];
    at.span = at.p.span + (list.by_blocks ? warp : 0);
    at.n_spans = list.by_blocks ? (warp < at.p.n_spans ? 1 : 0) : at.p.n_spans;
}

/* ---- keys and values on their way ----------------------------------------------------------------------------------- */

/* What comes into the ring next: the keys of a span, then its values. A stage of the ring has either. */
struct fetcher {
    struct place at;
    int span; /* of the token */
    bool values;
    int slot;
    int32_t blocks[2]; /* of the span's positions lane and 32 + lane */
};

static DEVICE void find_blocks(const struct attn_args &a, struct fetcher &f) {
    if (!f.at.valid) return;
    const int32_t *table = (const int32_t *)a.step.header + f.at.p.table;
    int first = f.span * SPAN + ((int)threadIdx.x & 31);
#pragma unroll
    for (int i = 0; i < 2; i++) f.blocks[i] = table[min(first + 32 * i, f.at.p.end - 1) >> a.block_shift];
}

/* From the spans of `at` on. */
static DEVICE void begin_fetch(const struct attn_args &a, const struct work_list &list, const struct place &at,
                               struct fetcher &f) {
    f.at = at;
    while (f.at.valid && f.at.n_spans == 0) find_place(list, f.at.round + 1, f.at);
    f.span = f.at.span, f.values = false;
    find_blocks(a, f);
}

/* Keys at or beyond the end are zeros here and count for nothing in soften. fused: so is the last one, see put_new. Two
 * keys at a time, of which a block of 16 or more has eight pairs at least. */
static DEVICE void copy_stage(const struct attn_args &a, const struct fetcher &f, struct span_rows &to) {
    int lane = (int)threadIdx.x & 31, odd = lane >> 4, piece = lane & 15;
    int head = f.at.unit / a.octets, first = f.span * SPAN;
    int n = f.at.p.end - (a.fused ? 1 : 0) - first - odd;
    const uint4 *kv = (const uint4 *)a.kv + piece;
    if (a.block_shift < 4) {
#pragma unroll 1
        for (int key = odd; key < SPAN; key += 2) {
            int32_t block = __shfl_sync(ALL_LANES, key < 32 ? f.blocks[0] : f.blocks[1], key & 31);
            size_t row = rope_cache_row(block, a.n_kv_heads, head, f.values, first + key, a.block_shift);
            copy16(&to.v[key][piece ^ (key & 7)], kv + row * (HEAD_DIM / 8), key - odd < n);
        }
        return;
    }
#pragma unroll 1
    for (int group = 0; group < SPAN; group += 16) {
        int32_t block = __shfl_sync(ALL_LANES, group < 32 ? f.blocks[0] : f.blocks[1], group & 31);
        size_t row = rope_cache_row(block, a.n_kv_heads, head, f.values, first + group + odd, a.block_shift);
        const uint4 *from = kv + row * (HEAD_DIM / 8);
#pragma unroll
        for (int i = 0; i < 16; i += 2)
            copy16(&to.v[group + i + odd][piece ^ ((i + odd) & 7)], from + i * (HEAD_DIM / 8), group + i < n);
    }
}

/* The next stage into the place that has just been read. */
template <int RING>
static DEVICE void refill(const struct attn_args &a, const struct work_list &list, struct fetcher &f,
                          struct span_rows *ring) {
    if (f.at.valid) copy_stage(a, f, ring[f.slot]);
    copy_commit();
    f.slot = f.slot == RING - 1 ? 0 : f.slot + 1;
    f.values = !f.values;
    if (f.values || !f.at.valid) return;
    if (++f.span < f.at.span + f.at.n_spans) return find_blocks(a, f);
    struct place next = f.at;
    find_place(list, f.at.round + 1, next);
    begin_fetch(a, list, next, f);
}

/* ---- one span --------------------------------------------------------------------------------------------------------- */

/* Sixteen keys at a time are the rows of the product, 16 dims its columns. */
static DEVICE void score_span(const struct span_rows &k, const struct query &q, int lane, struct scores &s) {
    int row = lane & 15, high = lane >> 4;
#pragma unroll
    for (int i = 0; i < TILES; i++) s.s[i][0] = s.s[i][1] = s.s[i][2] = s.s[i][3] = 0.0f;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 8; c += 2)
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            h2 keys[4];
            load_matrices(keys, &k.v[16 * i + row][(c + high) ^ (row & 7)]);
            mma_f16(s.s[i], keys, q.w[c], q.w[c + 1]);
        }
}

/* Sixteen dims at a time are the rows, 16 keys the columns. */
static DEVICE void value_span(const struct span_rows &v, const h2 (&p)[TILES][2], int lane, float (&acc)[8][4]) {
    int row = (lane & 7) + 8 * (lane >> 4), high = lane >> 3 & 1;
#pragma unroll
    for (int d = 0; d < 8; d++) acc[d][0] = acc[d][1] = acc[d][2] = acc[d][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int d = 0; d < 8; d++) {
            h2 values[4];
            load_transposed(values, &v.v[16 * i + row][(2 * d + high) ^ (row & 7)]);
            mma_f16(acc[d], values, p[i][0], p[i][1]);
        }
}

/* What a token brings to a fused step: its queries of an octet, normalised and turned, and its own key and value. */
struct __align__(16) new_rows {
    enum : int { PITCH = HEAD_DIM / 4 + 2 /* uint2, so that heads lie in different banks */ };
    uint2 q[8][PITCH], kv[2][HEAD_DIM / 4];
};

/* Once per piece: by a warp, or the block together. The token's own position is in no cache yet; who has the last piece
 * puts it there. */
static DEVICE void make_rows(const struct attn_args &a, const struct place &at, bool by_blocks, struct new_rows &to) {
    const struct rope_args &r = a.rope;
    int lane = (int)threadIdx.x % ROPE_LANES, half = (int)threadIdx.x / ROPE_LANES & 1, warp = (int)threadIdx.x >> 5;
    int octets = a.octets, per_kv = a.per_kv;
    int token = at.p.token, pos = at.p.end - 1, kv_head = at.unit / octets, octet = at.unit % octets;
    struct rope_half q[4], kv;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int head = kv_head * per_kv + min(octet * 8 + 2 * i + half, per_kv - 1);
        if (!by_blocks || i == warp) q[i] = rope_load(r.q, (size_t)token * (size_t)a.n_heads + (size_t)head, lane);
    }
    bool own = at.last() && (!by_blocks || warp == 0);
    if (own) kv = rope_load(half ? r.v : r.k, (size_t)token * (size_t)a.n_kv_heads + (size_t)kv_head, lane);
    struct rope_turn turn = rope_turn_at(r.q_norm, r.table, pos, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (by_blocks && i != warp) continue;
        struct rope_half v = rope_apply(q[i], turn, r.eps);
        if (octet * 8 + 2 * i + half >= per_kv) v = {{0, 0}, {0, 0}};
        to.q[2 * i + half][lane] = v.low, to.q[2 * i + half][lane + ROPE_LANES] = v.high;
    }
    if (own) {
        struct rope_half k = rope_apply(kv, rope_turn_at(r.k_norm, r.table, pos, lane), r.eps);
        if (half == 0) kv = k;
        const int32_t *table = (const int32_t *)a.step.header + at.p.table;
        size_t row = rope_cache_row(table[pos >> a.block_shift], a.n_kv_heads, kv_head, half, pos, a.block_shift);
        rope_save(to.kv, (size_t)half, lane, kv);
        if (octet == 0) rope_save(a.kv, row, lane, kv);
    }
}

/* What make_rows reads of constants, into L1 before it is wanted. */
static DEVICE void touch_rows(const struct attn_args &a, const struct place &at) {
    const struct rope_args &r = a.rope;
    int lane = (int)threadIdx.x & 31;
    const float *all[] = {r.q_norm + 4 * lane, r.k_norm + 4 * lane, r.table + (size_t)(at.p.end - 1) * HEAD_DIM + 4 * lane};
#pragma unroll
    for (int i = 0; i < 3; i++) asm volatile("{.reg .f32 x; ld.global.f32 x, [%0];}" ::"l"(all[i]));
}

static DEVICE void read_query(const struct new_rows &from, int lane, struct query &q) {
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 8; c += 4)
        load_matrices(*(h2(*)[4])(q.w + c), (const uint4 *)from.q[lane & 7] + c + (lane >> 3));
}

/* A stage that has come; the token's own row, which is `key` of the span, goes where copy_stage left zeros. */
static DEVICE void put_new(int key, const uint2 (&row)[HEAD_DIM / 4], int lane, struct span_rows &to) {
    if (key >= SPAN) return;
    if (lane < HEAD_DIM / 8) to.v[key][lane ^ (key & 7)] = ((const uint4 *)row)[lane];
    __syncwarp();
}

/* A warp's way through the ring. */
struct ring_reader {
    struct span_rows *ring;
    const struct new_rows &rows;
    int slot;
};

/* The stage that comes next in the ring, once it is there. */
template <int RING>
static DEVICE struct span_rows &next_stage(const struct attn_args &a, struct ring_reader &r, int own_key, bool values, int lane) {
    copy_wait<RING - 1>();
    __syncwarp();
    struct span_rows &stage = r.ring[r.slot];
    if (a.fused) put_new(own_key, r.rows.kv[values], lane, stage);
    r.slot = r.slot == RING - 1 ? 0 : r.slot + 1;
    return stage;
}

/* n_keys: from the span's first to the token's own. */
template <int RING>
static DEVICE void span_from_ring(const struct attn_args &a, const struct work_list &list, struct fetcher &f, struct ring_reader &r, int n_keys,
                                  const struct query &q, int lane, struct outcome &o) {
    struct scores s;
    h2 prob[TILES][2];
    score_span(next_stage<RING>(a, r, n_keys - 1, false, lane), q, lane, s);
    __syncwarp();
    refill<RING>(a, list, f, r.ring);
    soften(s, n_keys, lane, o.m, prob);
    value_span(next_stage<RING>(a, r, n_keys - 1, true, lane), prob, lane, o.acc);
    __syncwarp();
    refill<RING>(a, list, f, r.ring);
}

/* ---- merging spans and splits ---------------------------------------------------------------------------------------- */

static DEVICE void clear(struct outcome &o) {
    o.m = measure_none();
#pragma unroll
    for (int i = 0; i < 8; i++) o.acc[i][0] = o.acc[i][1] = o.acc[i][2] = o.acc[i][3] = 0.0f;
}

static DEVICE void merge(struct outcome &total, const struct outcome &part) {
    struct merge_factors f0 = merge_head(total.m, part.m, 0), f1 = merge_head(total.m, part.m, 1);
#pragma unroll
    for (int i = 0; i < 8; i++)
        merge_four(total.acc[i], make_float4(part.acc[i][0], part.acc[i][1], part.acc[i][2], part.acc[i][3]), f0, f1);
}

static DEVICE void store(const struct attn_args &a, const struct place &at, int lane, const struct outcome &o) {
    int column = at.unit % a.octets * 8 + (lane >> 2);
    size_t head = (size_t)(at.unit / a.octets) * (size_t)a.per_kv + (size_t)column;
    float inverse[2] = {1.0f / o.m.sum[0], 1.0f / o.m.sum[1]};
    h2 *to = (h2 *)a.out + ((size_t)at.p.token * (size_t)a.n_heads + head) * (HEAD_DIM / 2) + (lane & 3);
#pragma unroll
    for (int d = 0; d < 8; d++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            h2 dims = transpose_8x8(h2_pack(o.acc[d][2 * i] * inverse[0], o.acc[d][2 * i + 1] * inverse[1]));
            if (column < a.per_kv) to[8 * d + 4 * i] = dims;
        }
}

/* A partial result: float4 acc[8][32 lanes], then a measure for each of lanes 0 … 3. */
static DEVICE float4 *partial_of(const struct attn_args &a, int index, int unit) {
    size_t n = attn_partial_floats(a.n_heads, a.n_kv_heads);
    return (float4 *)(a.partials + (size_t)index * n + (size_t)unit * (8 * (HEAD_DIM + 2)));
}

static DEVICE void load_partial(const float4 *from, int lane, struct outcome &o) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float4 v = __ldcg(from + 32 * i + lane);
        o.acc[i][0] = v.x, o.acc[i][1] = v.y, o.acc[i][2] = v.z, o.acc[i][3] = v.w;
    }
    float4 m = __ldcg(from + 8 * HEAD_DIM / 4 + (lane & 3));
    o.m = {{m.x, m.y}, {m.z, m.w}};
}

/* Pieces in order, a split each. */
static DEVICE void merge_pieces(const struct attn_args &a, const struct place &at, int lane, struct outcome &total) {
    const struct attn_piece &p = at.p;
    clear(total);
#pragma unroll 1
    for (int first = 0; first < p.n_pieces; first += MERGED) {
        struct outcome part[MERGED];
#pragma unroll
        for (int i = 0; i < MERGED; i++) /* one twice rather than a branch: all loads are to be under way */
            load_partial(partial_of(a, p.partial - p.piece + min(first + i, p.n_pieces - 1), at.unit), lane, part[i]);
#pragma unroll
        for (int i = 0; i < MERGED; i++)
            if (first + i < p.n_pieces) merge(total, part[i]);
    }
}

/* Writes a piece's result; the warp that finishes the token last has them all in o, merged first to last, and true. */
static DEVICE bool hand_in(const struct attn_args &a, const struct place &at, int lane, struct outcome &o) {
    int units = a.n_kv_heads * a.octets;
    float4 *to = partial_of(a, at.p.partial, at.unit);
#pragma unroll
    for (int i = 0; i < 8; i++)
        __stcg(to + 32 * i + lane, make_float4(o.acc[i][0], o.acc[i][1], o.acc[i][2], o.acc[i][3]));
    if (lane < 4) __stcg(to + 8 * HEAD_DIM / 4 + lane, make_float4(o.m.max[0], o.m.max[1], o.m.sum[0], o.m.sum[1]));
    __syncwarp();
    bool last = lane == 0 && draw_last(a.tickets + (size_t)at.p.token * (size_t)units + at.unit, at.p.n_pieces);
    last = __any_sync(ALL_LANES, last);
    if (last) merge_pieces(a, at, lane, o);
    return last;
}

/* ---- the kernel ---------------------------------------------------------------------------------------------------------- */

/* What a warp hands to the first of its block. */
struct __align__(16) handed {
    float4 acc[8][32];
    struct measure m[4];
};

template <int RING> struct splits_shared {
    struct span_rows ring[WARPS][RING];
    struct new_rows rows[WARPS];
    struct handed handed[WARPS - 1];
};

extern __shared__ __align__(16) uint8_t shared_bytes[];

/* The warp's spans of a piece, into its split or all of its splits. */
template <int RING>
static DEVICE void run_piece(const struct attn_args &a, const struct work_list &list, const struct place &at,
                             struct fetcher &f, struct ring_reader &r, const struct query &q, int lane,
                             struct outcome &total) {
    struct outcome split, part;
    int end = at.span + at.n_spans;
    clear(total);
    clear(split);
#pragma unroll 1
    for (int span = at.span; span < end; span++) {
        span_from_ring<RING>(a, list, f, r, at.p.end - span * SPAN, q, lane, part);
        merge(split, part);
        if (span + 1 < end && (span + 1) % SPANS != 0) continue;
        merge(total, split);
        clear(split);
    }
}

/* The block's spans of a piece into the first warp's o, in order. Returns whether this is the first warp. */
static DEVICE bool gather(struct handed (&to)[WARPS - 1], const struct place &at, int lane, int warp, struct outcome &o) {
    __syncthreads(); /* the first warp has done with the piece before */
    if (warp > 0 && at.n_spans > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) to[warp - 1].acc[i][lane] = make_float4(o.acc[i][0], o.acc[i][1], o.acc[i][2], o.acc[i][3]);
        if (lane < 4) to[warp - 1].m[lane] = o.m;
    }
    __syncthreads();
    if (warp > 0) return false;
    struct outcome part;
#pragma unroll 1
    for (int w = 1; w < at.p.n_spans; w++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 v = to[w - 1].acc[i][lane];
            part.acc[i][0] = v.x, part.acc[i][1] = v.y, part.acc[i][2] = v.z, part.acc[i][3] = v.w;
        }
        part.m = to[w - 1].m[lane & 3];
        merge(o, part);
    }
    return true;
}

/* RING 3 wants more shared memory than some devices have. */
template <int RING>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    k_attn_splits_f16(const __grid_constant__ struct attn_args a) {
    struct splits_shared<RING> &shared = *(struct splits_shared<RING> *)shared_bytes;
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    struct work_list list = read_list(a);
    struct new_rows &rows = shared.rows[list.by_blocks ? 0 : warp];
    struct ring_reader r = {shared.ring[warp], rows, 0};
    struct place at;
    struct fetcher f;
    find_place(list, 0, at);
    f.slot = 0;
    begin_fetch(a, list, at, f);
    /* Keys of earlier steps are there already: all that are copied if fused; else the token's own is not. */
    if (!a.fused) depend_wait();
#pragma unroll 1
    for (int n = 0; n < RING; n++) refill<RING>(a, list, f, r.ring);
    depend_release(); /* when the first copies are under way */
    if (a.fused && at.valid) touch_rows(a, at);
    depend_wait();
#pragma unroll 1
    for (; at.valid; find_place(list, at.round + 1, at)) {
        struct query q;
        struct outcome o;
        if (a.fused) {
            make_rows(a, at, list.by_blocks, rows);
            if (list.by_blocks) __syncthreads();
            else __syncwarp();
            read_query(rows, lane, q);
        } else {
            load_query(a, at.p.token, at.unit, lane, q);
        }
        run_piece<RING>(a, list, at, f, r, q, lane, o);
        if (list.by_blocks && !gather(shared.handed, at, lane, warp, o)) continue;
        if (at.p.partial < 0 || hand_in(a, at, lane, o)) store(a, at, lane, o);
    }
    copy_wait<0>();
}

template <int RING> static cudaError_t launch_ring(const struct attn_args *a, const struct cuda_queue *q) {
    return launch(k_attn_splits_f16<RING>, dim3((unsigned)q->n_sm, 1, 1), 32 * WARPS, sizeof(struct splits_shared<RING>), q,
                  *a);
}

/* Small steps leave room for the blocks of the product before, which else would have to end before any of these begin. */
cudaError_t cuda_attn_splits(const struct attn_args *a, int bucket, const struct cuda_queue *q) {
    if (bucket > 8 && sizeof(struct splits_shared<3>) <= q->max_shared) return launch_ring<3>(a, q);
    return sizeof(struct splits_shared<2>) <= q->max_shared ? launch_ring<2>(a, q) : launch_ring<1>(a, q);
}

template <int RING> static cudaError_t prepare_ring(size_t max_shared) {
    cudaFuncAttributes ignored;
    if (sizeof(struct splits_shared<RING>) > max_shared) return cudaFuncGetAttributes(&ignored, k_attn_splits_f16<RING>);
    return cudaFuncSetAttribute(k_attn_splits_f16<RING>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)sizeof(struct splits_shared<RING>));
}

cudaError_t attn_prepare(size_t max_shared) {
    const cudaError_t all[] = {prepare_ring<3>(max_shared), prepare_ring<2>(max_shared), prepare_ring<1>(max_shared),
                               attn_tiles_prepare()};
    for (cudaError_t e : all)
        if (e != cudaSuccess) return e;
    return cudaSuccess;
}
