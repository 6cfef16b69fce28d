/* sample: one block turns one row of logits into a token (several look for the largest first), by the definition in
 * moe/sampler.h: the same token as moe/sampler.c from the same logits, but for draws within about 1e-8 of a boundary
 * (expf differs in its last bit between libraries).
 *
 * Probabilities are summed as integers, 2^-44 of the largest: sums do not depend on the order in which threads
 * add, so a draw is a function of the row alone. Every cut that the parameters ask for (top_k, min_p, top_p, the
 * draw) is a prefix of the falling order, and the end of a prefix is found without sorting: a histogram over the
 * logits says in which narrow interval it lies, and the few candidates there are ranked by comparison. Many
 * candidates are split again; equal ones are counted by id.
 *
 * logits are changed only by bias and stop ids, whose raw values are put aside; penalties are applied as
 * values are read. */
#include "cuda/common.cuh"

enum : int { THREADS = 1024, WARPS = THREADS / 32, BINS = 2048, FEW = 1024 };
enum : uint32_t { IN_PROMPT = 0x80000000u };

#define MASS_ONE 0x1p44 /* the largest probability; 2^18 times it fits 63 bits */
#define MASS_RANGE 31.0 /* exp(-31) is below half a unit */

struct candidate {
    float value;
    int32_t id;
};

struct row_shared {
    uint32_t count[BINS]; /* after prefix(): exclusive sums */
    unsigned long long mass[BINS];
    struct candidate list[FEW];
    unsigned long long list_mass[FEW];
    struct candidate best[WARPS];
    float low[WARPS];
    double sums[WARPS];
    unsigned long long masses[WARPS], masses2[WARPS];
    int counts[WARPS], n_list, bin;
    bool last;
    struct candidate found;
    unsigned long long found_mass;
    float bias_raw[MOE_MAX_BIASES], stop_raw[MOE_MAX_STOP_IDS];
};

/* One row in a block's hands. */
struct row {
    float *logits;
    const uint32_t *counts; /* NULL: no penalties */
    int n_vocab;
    float repetition, presence, frequency;
    float max, temperature; /* of the draw */

    DEVICE float value(int i) const {
        float v = logits[i];
        if (!counts) return v;
        uint32_t c = counts[i];
        if (c == 0) return v;
        if (repetition != 1.0f) v = v > 0.0f ? v / repetition : v * repetition;
        c &= ~IN_PROMPT;
        if (c > 0) v -= presence + frequency * (float)c;
        return v;
    }
    DEVICE unsigned long long mass(float v) const {
        return (unsigned long long)((double)expf((v - max) / temperature) * MASS_ONE);
    }
};

/* ---- block-wide reductions ------------------------------------------------------------------------- */

static DEVICE bool precedes(const struct candidate &a, const struct candidate &b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

static DEVICE struct candidate warp_first(struct candidate c) {
    for (int d = 16; d > 0; d >>= 1) {
        struct candidate o = {__shfl_xor_sync(ALL_LANES, c.value, d), __shfl_xor_sync(ALL_LANES, c.id, d)};
        if (precedes(o, c)) c = o;
    }
    return {__shfl_sync(ALL_LANES, c.value, 0), __shfl_sync(ALL_LANES, c.id, 0)}; /* lanes differ if there are NaNs */
}
static DEVICE float warp_min(float x) {
    for (int d = 16; d > 0; d >>= 1) x = fminf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

/* Every warp puts the warps' results together for itself. */
static_assert(WARPS == 32, "a lane for each warp");
static DEVICE struct candidate block_first(struct candidate c, struct row_shared &s) {
    c = warp_first(c);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) s.best[threadIdx.x >> 5] = c;
    __syncthreads();
    return warp_first(s.best[threadIdx.x & 31]);
}

static DEVICE float block_min(float x, struct row_shared &s) {
    x = warp_min(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) s.low[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_min(s.low[threadIdx.x & 31]);
}

static DEVICE double block_sum(double x, struct row_shared &s) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) s.sums[threadIdx.x >> 5] = x;
    __syncthreads();
    x = s.sums[0];
    for (int i = 1; i < WARPS; i++) x += s.sums[i];
    return x;
}

/* Inclusive sums over the threads of a count and a mass; totals to every thread. */
static DEVICE void block_prefix(int &n, unsigned long long &m, int &all_n, unsigned long long &all_m,
                                struct row_shared &s) {
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    for (int d = 1; d < 32; d <<= 1) {
        int up_n = __shfl_up_sync(ALL_LANES, n, d);
        unsigned long long up_m = __shfl_up_sync(ALL_LANES, m, d);
        if (lane >= d) n += up_n, m += up_m;
    }
    __syncthreads();
    if (lane == 31) s.counts[warp] = n, s.masses[warp] = m;
    __syncthreads();
    all_n = 0, all_m = 0;
    int before_n = 0;
    unsigned long long before_m = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i == warp) before_n = all_n, before_m = all_m;
        all_n += s.counts[i], all_m += s.masses[i];
    }
    n += before_n, m += before_m;
}

/* ---- prefixes of the falling order ------------------------------------------------------------------- */

/* An interval of values, and what precedes it. */
struct interval {
    float low, high;
    int count;
    unsigned long long mass;
};

/* In f64, so that two different values never make a bin that no smaller interval follows. */
static DEVICE int bin_of(float v, const struct interval &in, double per_bin) {
    return (int)fmin(((double)in.high - (double)v) * per_bin, (double)(BINS - 1));
}

/* Bins of equal width, but those below high - MASS_RANGE * temperature share the last one. */
static DEVICE double bins_per_unit(const struct row &r, const struct interval &in) {
    double range = (double)in.high - (double)in.low, heavy = MASS_RANGE * (double)r.temperature;
    if (in.high == r.max && heavy < range) range = heavy;
    return range > 0.0 ? (double)(BINS - 1) / range : 0.0;
}

/* Fill the histogram with the interval's values and turn it into exclusive sums. Returns the interval's totals. */
static DEVICE void histogram(const struct row &r, const struct interval &in, struct row_shared &s, int &n,
                             unsigned long long &m) {
    double per_bin = bins_per_unit(r, in);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < BINS; i += THREADS) s.count[i] = 0, s.mass[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) {
        float v = r.value(i);
        if (!(v >= in.low && v <= in.high)) continue;
        int b = bin_of(v, in, per_bin);
        unsigned long long q = r.mass(v);
        atomicAdd(&s.count[b], 1u);
        if (q > 0) atomicAdd(&s.mass[b], q);
    }
    __syncthreads();
    constexpr int per = BINS / THREADS;
    int at = (int)threadIdx.x * per, own_n = 0, all_n;
    unsigned long long own_m = 0, all_m;
    for (int i = 0; i < per; i++) own_n += (int)s.count[at + i], own_m += s.mass[at + i];
    int sum_n = own_n;
    unsigned long long sum_m = own_m;
    block_prefix(sum_n, sum_m, all_n, all_m, s);
    sum_n -= own_n, sum_m -= own_m;
    for (int i = 0; i < per; i++) {
        int c = (int)s.count[at + i];
        unsigned long long q = s.mass[at + i];
        s.count[at + i] = (uint32_t)sum_n, s.mass[at + i] = sum_m;
        sum_n += c, sum_m += q;
    }
    __syncthreads();
    n = all_n, m = all_m;
}

/* The need-th (from 1) id whose value is v. */
static DEVICE int nth_equal(const struct row &r, float v, int need, struct row_shared &s) {
    int chunk = (r.n_vocab + THREADS - 1) / THREADS, begin = (int)threadIdx.x * chunk;
    int end = min(begin + chunk, r.n_vocab), own = 0, all;
    unsigned long long ignored = 0, ignored2;
    for (int i = begin; i < end; i++) own += r.value(i) == v;
    int sum = own;
    block_prefix(sum, ignored, all, ignored2, s);
    int left = need - (sum - own);
    if (left >= 1 && left <= own)
        for (int i = begin; i < end; i++)
            if (r.value(i) == v && --left == 0) s.bin = i;
    __syncthreads();
    int id = s.bin;
    __syncthreads();
    return id;
}

/* The candidates of one bin, ranked: the one at which the running count (by_mass: mass) reaches need. */
static DEVICE void rank_bin(const struct row &r, const struct interval &in, double per_bin, int bin,
                            bool by_mass, unsigned long long need, struct row_shared &s) {
    int before_n = in.count + (int)s.count[bin];
    unsigned long long before_m = in.mass + s.mass[bin];
    if (threadIdx.x == 0) s.n_list = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) {
        float v = r.value(i);
        if (!(v >= in.low && v <= in.high) || bin_of(v, in, per_bin) != bin) continue;
        int at = atomicAdd(&s.n_list, 1);
        s.list[at].value = v, s.list[at].id = i;
        s.list_mass[at] = r.mass(v);
    }
    __syncthreads();
    if ((int)threadIdx.x < s.n_list) {
        struct candidate own = s.list[threadIdx.x];
        for (int i = 0; i < s.n_list; i++)
            if (precedes(s.list[i], own)) before_n++, before_m += s.list_mass[i];
        unsigned long long before = by_mass ? before_m : (unsigned long long)before_n;
        unsigned long long width = by_mass ? s.list_mass[threadIdx.x] : 1;
        if (before < need && need <= before + width) {
            s.found = own;
            s.found_mass = before_m + s.list_mass[threadIdx.x];
        }
    }
    __syncthreads();
}

/* The first member of the falling order at which the running count (by_mass: mass) reaches need, 1 <= need <= the
 * total. *fresh: the histogram is that of `in`; it may be lost. The mass up to and with the member: *mass. */
static DEVICE struct candidate locate(const struct row &r, struct interval in, bool by_mass,
                                      unsigned long long need, struct row_shared &s, bool &fresh,
                                      unsigned long long &mass) {
    for (;;) {
        int n;
        unsigned long long m;
        if (!fresh) histogram(r, in, s, n, m);
        double per_bin = bins_per_unit(r, in);
        unsigned long long before = by_mass ? in.mass : (unsigned long long)in.count;
        for (int b = (int)threadIdx.x; b < BINS; b += THREADS) {
            unsigned long long from = before + (by_mass ? s.mass[b] : s.count[b]);
            bool ends = b == BINS - 1;
            unsigned long long to = before + (ends ? 0 : by_mass ? s.mass[b + 1] : s.count[b + 1]);
            if (from < need && (ends || need <= to)) s.bin = b;
        }
        __syncthreads();
        int bin = s.bin;
        struct candidate high = {-INFINITY, 0};
        float low = INFINITY;
        int members = 0, all;
        for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) {
            float v = r.value(i);
            if (!(v >= in.low && v <= in.high) || bin_of(v, in, per_bin) != bin) continue;
            members++;
            high.value = fmaxf(high.value, v), low = fminf(low, v);
        }
        unsigned long long none = 0, ignored;
        block_prefix(members, none, all, ignored, s);
        if (all <= FEW) {
            rank_bin(r, in, per_bin, bin, by_mass, need, s);
            mass = s.found_mass;
            return s.found;
        }
        high = block_first(high, s);
        low = block_min(low, s);
        in.count += (int)s.count[bin], in.mass += s.mass[bin];
        in.low = low, in.high = high.value;
        fresh = false;
        __syncthreads();
        if (low < high.value) continue;
        unsigned long long q = r.mass(low), left = need - (by_mass ? in.mass : (unsigned long long)in.count);
        int nth = (int)(by_mass ? (left + q - 1) / q : left);
        mass = in.mass + (unsigned long long)nth * q;
        return {low, nth_equal(r, low, nth, s)};
    }
}

/* Step 6 for temperature > 0. low: the smallest finite value. */
static DEVICE int draw(const struct row &r, const struct moe_sampling &p, int position, float low,
                       struct row_shared &s) {
    struct interval in = {low, r.max, 0, 0};
    int n;
    unsigned long long total, kept;
    histogram(r, in, s, n, total);
    bool fresh = true;
    kept = total;
    int limit = n;
    if (p.top_k > 0 && p.top_k < n) {
        limit = p.top_k;
        locate(r, in, false, (unsigned long long)p.top_k, s, fresh, total);
        kept = total;
    }
    if (p.min_p > 0.0f) {
        int likely = 0, all;
        unsigned long long m = 0, all_m;
        for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) {
            float v = r.value(i);
            if (expf((v - r.max) / r.temperature) >= p.min_p) likely++, m += r.mass(v);
        }
        block_prefix(likely, m, all, all_m, s);
        if (all < limit) kept = all_m;
    }
    if (p.top_p < 1.0f) {
        double target = ceil((double)p.top_p * (double)total);
        unsigned long long need = target < 1.0 ? 1 : (unsigned long long)target;
        if (need < kept) locate(r, in, true, need, s, fresh, kept);
    }
    /* sampler_uniform of moe/sampler.h */
    uint64_t z = p.seed + 0x9e3779b97f4a7c15ull * ((uint64_t)(uint32_t)position + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    double u = (double)((float)(z >> 40) * 0x1p-24f);
    unsigned long long ignored;
    return locate(r, in, true, (unsigned long long)(u * (double)kept) + 1, s, fresh, ignored).id;
}

/* ---- one row --------------------------------------------------------------------------------------------- */

/* Thread by thread: the first of the falling order, the smallest finite value, and whether any value is NaN or
 * infinite. */
struct scanner {
    struct candidate best;
    float low;
    bool bad;

    DEVICE void take(float v, int id) {
        if (!(fabsf(v) <= 3.402823466e38f)) bad = true;
        else low = fminf(low, v);
        if (v > best.value || best.id < 0) best.value = v, best.id = id;
    }
};
static DEVICE struct scanner scanner_none() { return {{-INFINITY, -1}, INFINITY, false}; }

/* The threads' findings put together; an infinity is what a ban makes, and then `finite` is not asked for. */
static DEVICE struct candidate scanned(struct scanner t, int n_vocab, struct row_shared &s, float &low, bool &finite) {
    finite = !__syncthreads_or(t.bad);
    low = block_min(t.low, s);
    if (t.best.id < 0) t.best.id = n_vocab;
    return block_first(t.best, s);
}

/* All values, penalties and all. */
static DEVICE struct candidate scan(const struct row &r, struct row_shared &s, float &low) {
    struct scanner t = scanner_none();
    bool ignored;
    for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) t.take(r.value(i), i);
    return scanned(t, r.n_vocab, s, low, ignored);
}

/* The raw logits of a part of a row. */
static DEVICE struct scanner scan_part(const float *logits, int n_vocab, int part, int n_parts) {
    struct scanner t = scanner_none();
    if (n_vocab % 4 != 0) { /* rows are not aligned */
        for (int i = part * THREADS + (int)threadIdx.x; i < n_vocab; i += n_parts * THREADS) t.take(logits[i], i);
        return t;
    }
    const float4 *quads = (const float4 *)logits;
#pragma unroll 4
    for (int i = part * THREADS + (int)threadIdx.x; i < n_vocab / 4; i += n_parts * THREADS) {
        float4 v = quads[i];
        t.take(v.x, 4 * i);
        t.take(v.y, 4 * i + 1);
        t.take(v.z, 4 * i + 2);
        t.take(v.w, 4 * i + 3);
    }
    return t;
}

/* The row's blocks meet: the last one goes on, with what all have found. */
static DEVICE bool meet(const struct sample_args &a, struct row_shared &s, struct candidate &best, float &low,
                        bool &finite) {
    if (gridDim.y == 1) return true;
    struct sample_part *parts = a.parts + (size_t)blockIdx.x * SAMPLE_PARTS;
    if (threadIdx.x == 0) {
        parts[blockIdx.y] = {best.value, best.id, low, !finite};
        s.last = draw_last(a.tickets + blockIdx.x, (int)gridDim.y);
    }
    __syncthreads();
    if (!s.last) return false;
    struct scanner t = scanner_none();
    if (threadIdx.x < gridDim.y) {
        float4 v = __ldcg((const float4 *)parts + threadIdx.x);
        t = {{v.x, __float_as_int(v.y)}, v.z, __float_as_int(v.w) != 0};
    }
    best = scanned(t, a.n_vocab, s, low, finite);
    return true;
}

/* Step 1: log of the softmax's denominator; the n_top first of the raw logits into the result. */
static DEVICE double report_top(const struct row &r, int n_top, struct candidate first,
                                struct row_shared &s, struct moe_row *out) {
    double sum = 0.0;
    for (int i = (int)threadIdx.x; i < r.n_vocab; i += THREADS) sum += (double)expf(r.value(i) - first.value);
    double log_sum = (double)first.value + log(block_sum(sum, s));
    struct candidate c = first;
    for (int k = 0; k < n_top; k++) {
        if (threadIdx.x == 0) {
            out->top_ids[k] = c.id;
            out->top_logprobs[k] = (float)((double)c.value - log_sum);
        }
        struct candidate next = {-INFINITY, r.n_vocab};
        for (int i = (int)threadIdx.x; i < r.n_vocab && k + 1 < n_top; i += THREADS) {
            struct candidate x = {r.value(i), i};
            if (precedes(c, x) && precedes(x, next)) next = x;
        }
        c = block_first(next, s);
    }
    return log_sum;
}

/* Steps 2 and 3; whether anything changed. Raw values are put aside. */
static DEVICE bool bias_and_ban(const struct row &r, const struct slot_state &slot, struct row_shared &s) {
    const struct moe_sampling &p = slot.sampling;
    int n_bias = p.n_bias, n_stop = slot.n_ids - slot.n_prompt < p.min_tokens ? p.n_stop_ids : 0;
    int i = (int)threadIdx.x;
    if (n_bias + n_stop == 0) return false;
    if (i < n_bias) s.bias_raw[i] = r.logits[p.bias[i].token];
    if (i < n_stop) s.stop_raw[i] = r.logits[p.stop_ids[i]];
    __syncthreads();
    bool first = i < n_bias; /* a token that is named twice is biased twice, by one thread */
    for (int j = 0; j < i && first; j++) first = p.bias[j].token != p.bias[i].token;
    if (first) {
        float v = s.bias_raw[i];
        for (int j = i; j < n_bias; j++)
            if (p.bias[j].token == p.bias[i].token) v += p.bias[j].bias;
        r.logits[p.bias[i].token] = v;
    }
    __syncthreads();
    if (i < n_stop) r.logits[p.stop_ids[i]] = -INFINITY;
    __syncthreads();
    return true;
}

static DEVICE float raw_logit(const struct row &r, const struct slot_state &slot, int token,
                              const struct row_shared &s) {
    const struct moe_sampling &p = slot.sampling;
    for (int i = 0; i < p.n_bias; i++)
        if (p.bias[i].token == token) return s.bias_raw[i];
    return r.logits[token]; /* a banned token is never drawn */
}

/* Called by all threads; thread 0 writes. */
static DEVICE void finish(struct slot_state &slot, struct moe_row *out, int slot_idx, int token, int n_top,
                          float logprob) {
    __syncthreads();
    for (int k = (int)threadIdx.x; k < MOE_MAX_TOP; k += THREADS) {
        if (k < n_top) continue;
        out->top_ids[k] = 0;
        out->top_logprobs[k] = 0.0f;
    }
    if (threadIdx.x != 0) return;
    out->slot = slot_idx;
    out->token = token;
    out->st = token >= 0 ? ST_OK : ST_NUMERIC;
    out->logprob = logprob;
    out->n_top = n_top;
    if (token >= 0) {
        slot.n_ids++;
        slot.last = token;
    } else if (slot.last < 0) {
        slot.last = 0; /* what a step already under way may read */
    }
}

static __global__ void __launch_bounds__(THREADS)
    k_sample_f32(const __grid_constant__ struct sample_args a) {
    __shared__ struct row_shared s;
    depend_release();
    depend_wait();
    const struct step_header *h = a.step.header;
    if ((int)blockIdx.x >= h->n_rows) return;
    struct head_row head = a.step.rows[blockIdx.x];
    struct moe_row *out = a.results + (size_t)h->result * (size_t)a.max_rows + blockIdx.x;
    struct slot_state &slot = a.slots[head.slot];
    const struct moe_sampling &p = slot.sampling;
    if (!head.sample) {
        if (threadIdx.x == 0 && blockIdx.y == 0) {
            out->slot = head.slot;
            out->token = -1;
            out->st = ST_OK;
            out->logprob = 0.0f;
            out->n_top = 0;
        }
        return;
    }
    struct row r = {a.logits + (size_t)blockIdx.x * (size_t)a.n_vocab, NULL, a.n_vocab,
                    p.repetition_penalty, p.presence_penalty, p.frequency_penalty, 0.0f, p.temperature};
    float low;
    bool finite;
    struct scanner found = scan_part(r.logits, a.n_vocab, (int)blockIdx.y, (int)gridDim.y);
    struct candidate best = scanned(found, a.n_vocab, s, low, finite);
    if (!meet(a, s, best, low, finite)) return;
    if (!finite) return finish(slot, out, head.slot, -1, 0, 0.0f);
    double log_sum = 0.0;
    int n_top = p.logprobs ? min(p.n_top, a.n_vocab) : 0;
    if (p.logprobs) log_sum = report_top(r, n_top, best, s, out);
    uint32_t *counts = a.counts + (size_t)head.slot * (size_t)a.n_vocab;
    bool changed = bias_and_ban(r, slot, s);
    if (slot.counting) r.counts = counts;
    if (changed || slot.counting) best = scan(r, s, low);
    /* Extreme biases can overflow, and bans can leave a tiny vocabulary empty. */
    if (!(fabsf(best.value) <= 3.402823466e38f)) return finish(slot, out, head.slot, -1, 0, 0.0f);
    int token = best.id;
    if (p.temperature > 0.0f) {
        r.max = best.value;
        token = draw(r, p, slot.n_ids, low, s);
    }
    float logprob = 0.0f;
    if (p.logprobs) logprob = (float)((double)raw_logit(r, slot, token, s) - log_sum);
    if (slot.counting && threadIdx.x == 0) counts[token]++;
    finish(slot, out, head.slot, token, n_top, logprob);
}

cudaError_t cuda_sample(const struct sample_args *a, int bucket, const struct cuda_queue *q) {
    int parts = q->n_sm / bucket;
    parts = parts < 1 ? 1 : parts > SAMPLE_PARTS ? SAMPLE_PARTS : parts;
    return launch(k_sample_f32, dim3((unsigned)bucket, (unsigned)parts, 1), THREADS, 0, q, *a);
}

/* ---- histories ------------------------------------------------------------------------------------------------ */

static __global__ void __launch_bounds__(256) k_slot_count_u32(const __grid_constant__ struct slot_args a) {
    depend_wait();
    int i = (int)(blockIdx.x * 256 + threadIdx.x);
    if (i >= a.n_ids) return;
    uint32_t *count = a.counts + a.ids[i];
    if (i < a.n_prompt) atomicOr(count, (uint32_t)IN_PROMPT);
    else atomicAdd(count, 1u);
}

cudaError_t cuda_slot_count(const struct slot_args *a, const struct cuda_queue *q) {
    if (a->n_ids == 0) return cudaSuccess;
    return launch(k_slot_count_u32, dim3((unsigned)((a->n_ids + 255) / 256), 1, 1), 256, 0, q, *a);
}

cudaError_t sample_prepare(void) {
    cudaFuncAttributes ignored;
    cudaError_t e = cudaFuncGetAttributes(&ignored, k_slot_count_u32);
    return e != cudaSuccess ? e : cudaFuncGetAttributes(&ignored, k_sample_f32);
}
