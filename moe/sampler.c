/* See sampler.h for the definition. Here: how to do it without sorting a vocabulary.
 *
 * Greedy rows are a few scans. The first k tokens are a heap kept while scanning the logits once. Where a prefix of the
 * falling order is wanted (top_p, the draw), prefix_select halves towards its end as quickselect does,
 * carrying sums, so that an unrestricted draw from 150,000 tokens is linear in them.
 *
 * Sums are float64: the order in which they are taken, which selection changes, then moves a draw only
 * when u lies within about 1e-15 of a boundary; the result is a function of the logits in any case. */
#include "moe/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct slot {
    struct moe_sampling params;
    int32_t *ids; /* [cap]: prompt, then output */
    int32_t n_ids, n_prompt;
    int32_t last; /* -1 until it has sampled */
};

struct sampler {
    int32_t n_slots, n_vocab;
    int32_t cap; /* ids per slot: the last sampled one lies one past the last computed position */
    struct slot *slots;
    int32_t *ids; /* [n_slots][cap] */
};

struct candidate {
    float logit;
    float p; /* not normalised: the largest candidate's is 1 */
    int32_t id;
};

struct sampler_scratch {
    float *raw; /* [V] logits as they came, for logprobs */
    int32_t *count; /* [V] occurrences; all 0 between rows */
    struct candidate *candidates; /* [V] */
};

/* ---- life --------------------------------------------------------------------------------- */

enum status sampler_create(int32_t n_slots, int32_t max_seq_tokens, int32_t n_vocab,
                           struct sampler **out) {
    CHECK(n_slots > 0 && max_seq_tokens > 0 && max_seq_tokens < INT32_MAX && n_vocab > 0);
    *out = NULL;
    struct sampler *s = calloc(1, sizeof *s);
    if (!s) return ST_NO_MEMORY;
    s->n_slots = n_slots;
    s->n_vocab = n_vocab;
    s->cap = max_seq_tokens + 1;
    s->slots = calloc((size_t)n_slots, sizeof *s->slots);
    s->ids = calloc((size_t)n_slots * (size_t)s->cap, sizeof *s->ids);
    if (!s->slots || !s->ids) {
        sampler_destroy(s);
        return ST_NO_MEMORY;
    }
    for (int32_t i = 0; i < n_slots; i++) {
        s->slots[i].ids = s->ids + (size_t)i * (size_t)s->cap;
        s->slots[i].last = -1;
    }
    *out = s;
    return ST_OK;
}

void sampler_destroy(struct sampler *s) {
    if (!s) return;
    free(s->slots);
    free(s->ids);
    free(s);
}

uint64_t sampler_bytes(const struct sampler *s) {
    return sizeof *s +
           (uint64_t)s->n_slots * (sizeof *s->slots + (uint64_t)s->cap * sizeof *s->ids);
}

enum status sampler_scratch_create(int32_t n_vocab, struct sampler_scratch **out) {
    CHECK(n_vocab > 0);
    *out = NULL;
    struct sampler_scratch *c = calloc(1, sizeof *c);
    if (!c) return ST_NO_MEMORY;
    c->raw = calloc((size_t)n_vocab, sizeof *c->raw);
    c->count = calloc((size_t)n_vocab, sizeof *c->count);
    c->candidates = calloc((size_t)n_vocab, sizeof *c->candidates);
    if (!c->raw || !c->count || !c->candidates) {
        sampler_scratch_destroy(c);
        return ST_NO_MEMORY;
    }
    *out = c;
    return ST_OK;
}

void sampler_scratch_destroy(struct sampler_scratch *c) {
    if (!c) return;
    free(c->raw);
    free(c->count);
    free(c->candidates);
    free(c);
}

static bool params_fit(const struct moe_sampling *p, int32_t n_vocab) {
    bool ok = isfinite(p->temperature) && p->temperature >= 0.0f && p->top_k >= 0 &&
              p->top_p >= 0.0f && p->top_p <= 1.0f && p->min_p >= 0.0f && p->min_p <= 1.0f &&
              isfinite(p->repetition_penalty) && p->repetition_penalty > 0.0f &&
              isfinite(p->presence_penalty) && isfinite(p->frequency_penalty) && p->n_bias >= 0 &&
              p->n_bias <= MOE_MAX_BIASES && p->n_stop_ids >= 0 &&
              p->n_stop_ids <= MOE_MAX_STOP_IDS && p->n_top >= 0 && p->n_top <= MOE_MAX_TOP;
    for (int32_t i = 0; ok && i < p->n_bias; i++)
        ok = p->bias[i].token >= 0 && p->bias[i].token < n_vocab && isfinite(p->bias[i].bias);
    for (int32_t i = 0; ok && i < p->n_stop_ids; i++)
        ok = p->stop_ids[i] >= 0 && p->stop_ids[i] < n_vocab;
    return ok;
}

bool sampler_start_fits(const struct moe_slot_start *start, int32_t n_slots, int32_t max_seq_tokens,
                        int32_t n_vocab) {
    bool ok = start->slot >= 0 && start->slot < n_slots && start->n_prompt >= 0 &&
              start->n_prompt <= start->n_ids && start->n_ids <= max_seq_tokens &&
              params_fit(&start->sampling, n_vocab);
    for (int32_t i = 0; ok && i < start->n_ids; i++)
        ok = start->ids[i] >= 0 && start->ids[i] < n_vocab;
    return ok;
}

void sampler_start(struct sampler *s, const struct moe_slot_start *start) {
    CHECK(sampler_start_fits(start, s->n_slots, s->cap - 1, s->n_vocab));
    struct slot *slot = &s->slots[start->slot];
    slot->params = start->sampling;
    slot->n_ids = start->n_ids;
    slot->n_prompt = start->n_prompt;
    slot->last = -1;
    if (start->n_ids > 0)
        memcpy(slot->ids, start->ids, (size_t)start->n_ids * sizeof *slot->ids);
}

int32_t sampler_last(const struct sampler *s, int32_t slot) {
    CHECK(slot >= 0 && slot < s->n_slots && s->slots[slot].last >= 0);
    return s->slots[slot].last;
}

/* ---- selection ------------------------------------------------------------------------------ */

/* The falling order: larger logit first, ties to the lower id. A strict total order. */
static bool precedes(const struct candidate *a, const struct candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static void swap(struct candidate *a, struct candidate *b) {
    struct candidate t = *a;
    *a = *b;
    *b = t;
}

static void sort_few(struct candidate *c, int32_t n) {
    for (int32_t i = 1; i < n; i++)
        for (int32_t j = i; j > 0 && precedes(&c[j], &c[j - 1]); j--) swap(&c[j], &c[j - 1]);
}

/* Restore the heap whose root is the last of its members in the falling order. */
static void sift_down(struct candidate *c, int32_t n, int32_t i) {
    for (;;) {
        int32_t child = 2 * i + 1;
        if (child >= n) return;
        if (child + 1 < n && precedes(&c[child], &c[child + 1])) child++;
        if (!precedes(&c[i], &c[child])) return;
        swap(&c[i], &c[child]);
        i = child;
    }
}

/* The largest of n > 0 values, none of them NaN; in lanes, for the compiler to vectorise. */
static float max_of(const float *x, int32_t n) {
    enum { LANES = 16 };
    float max[LANES];
    for (int j = 0; j < LANES; j++) max[j] = x[0];
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) max[j] = x[i + j] > max[j] ? x[i + j] : max[j];
    for (; i < n; i++) max[0] = x[i] > max[0] ? x[i] : max[0];
    for (int j = 1; j < LANES; j++) max[0] = max[j] > max[0] ? max[j] : max[0];
    return max[0];
}

/* The first k of n logits in the falling order, to c[k] as a heap: c[0] is the last of them. */
static void select_top(const float *logits, int32_t n, int32_t k, struct candidate *c) {
    enum { STRIDE = 128 };
    for (int32_t i = 0; i < k; i++) c[i] = (struct candidate){.logit = logits[i], .id = i};
    for (int32_t i = k / 2; i-- > 0;) sift_down(c, k, i);
    for (int32_t at = k; at < n; at += STRIDE) {
        int32_t end = n - at < STRIDE ? n : at + STRIDE;
        if (!(max_of(logits + at, end - at) > c[0].logit)) continue;
        for (int32_t i = at; i < end; i++) {
            if (!(logits[i] > c[0].logit)) continue; /* an equal one has the higher id */
            c[0] = (struct candidate){.logit = logits[i], .id = i};
            sift_down(c, k, 0);
        }
    }
}

/* Partition c[n], n >= 3, so that all of c[0, r) precede all of c[r, n); returns r, 0 < r < n. */
static int32_t partition(struct candidate *c, int32_t n) {
    int32_t mid = n / 2;
    if (precedes(&c[mid], &c[0])) swap(&c[mid], &c[0]);
    if (precedes(&c[n - 1], &c[0])) swap(&c[n - 1], &c[0]);
    if (precedes(&c[n - 1], &c[mid])) swap(&c[n - 1], &c[mid]);
    struct candidate pivot = c[mid]; /* the median: something on either side stops both scans */
    int32_t i = 0, j = n - 1;
    for (;;) {
        while (precedes(&c[i], &pivot)) i++;
        while (precedes(&pivot, &c[j])) j--;
        if (i >= j) return i;
        swap(&c[i++], &c[j--]);
    }
}

/* The shortest prefix of the falling order whose sum of p is >= target (> target if `exceed`); at least one
 * candidate, all of them if no sum gets there. Afterwards c[0, result) is that prefix and c[result - 1] its
 * last member; *sum is its sum. */
static int32_t prefix_select(struct candidate *c, int32_t n, double target, bool exceed,
                             double *sum) {
    enum { FEW = 32 };
    int32_t lo = 0,
            hi = n; /* the end lies in c[lo, hi): c[0, lo) precede them and sum to `before` */
    double before = 0.0;
    while (hi - lo > FEW) {
        int32_t mid = lo + partition(c + lo, hi - lo);
        double upper = before;
        for (int32_t i = lo; i < mid; i++) upper += (double)c[i].p;
        if (exceed ? upper > target : upper >= target) {
            hi = mid;
        } else {
            before = upper;
            lo = mid;
        }
    }
    sort_few(c + lo, hi - lo);
    int32_t i = lo;
    do before += (double)c[i++].p;
    while (i < hi && !(exceed ? before > target : before >= target));
    *sum = before;
    return i;
}

/* ---- one row -------------------------------------------------------------------------------- */

static bool all_finite(const float *x, int32_t n) {
    uint32_t bad = 0;
    for (int32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bad |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
    }
    return bad == 0;
}

static int32_t largest(const float *x, int32_t n) {
    float max = max_of(x, n);
    int32_t i = 0;
    while (i < n - 1 && x[i] != max) i++;
    return i;
}

typedef float floats __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
enum { LANES = 4 };

/* e^x for x <= 0, relatively within 1e-7; below -87 it stays at e^-87, which no float64 sum beside a 1 notices.
 * Range reduction and polynomial: Cephes' expf (Moshier). */
static inline floats exp_of(floats x) {
    ints low = x < -87.0f;
    floats y = (floats)(((ints)x & ~low) | ((ints)((floats){0} - 87.0f) & low));
    ints n = __builtin_convertvector(y * 1.44269504f - 0.5f, ints); /* rounds: y is not positive */
    floats f = __builtin_convertvector(n, floats);
    floats r = y - f * 0.693359375f + f * 2.12194440e-4f;
    floats e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    return e * (floats)((n + 127) << 23);
}

/* Sum of e^((x - max) / temperature). */
static double sum_exp(const float *x, int32_t n, float max, float temperature) {
    double sum[LANES] = {0};
    for (int32_t i = 0; i < n; i += LANES) {
        int32_t m = n - i < LANES ? n - i : LANES;
        floats e;
        if (m == LANES)
            memcpy(&e, x + i, sizeof e);
        else
            for (int32_t j = 0; j < LANES; j++) e[j] = j < m ? x[i + j] : -INFINITY;
        e = exp_of((e - max) / temperature);
        for (int32_t j = 0; j < LANES; j++) sum[j] += (double)e[j];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* Steps 2 to 5: bias, stop ids, penalties. */
static void adjust(const struct slot *slot, int32_t *count, float *logits) {
    const struct moe_sampling *p = &slot->params;
    for (int32_t i = 0; i < p->n_bias; i++) logits[p->bias[i].token] += p->bias[i].bias;
    if (slot->n_ids - slot->n_prompt < p->min_tokens)
        for (int32_t i = 0; i < p->n_stop_ids; i++) logits[p->stop_ids[i]] = -INFINITY;
    if (p->repetition_penalty != 1.0f) {
        for (int32_t i = 0; i < slot->n_ids; i++) {
            float *logit = &logits[slot->ids[i]];
            if (count[slot->ids[i]]++ > 0) continue;
            *logit =
                *logit > 0.0f ? *logit / p->repetition_penalty : *logit * p->repetition_penalty;
        }
        for (int32_t i = 0; i < slot->n_ids; i++) count[slot->ids[i]] = 0;
    }
    if (p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f) {
        for (int32_t i = slot->n_prompt; i < slot->n_ids; i++) count[slot->ids[i]]++;
        for (int32_t i = slot->n_prompt; i < slot->n_ids; i++) {
            int32_t id = slot->ids[i];
            if (count[id] == 0) continue;
            logits[id] -= p->presence_penalty + p->frequency_penalty * (float)count[id];
            count[id] = 0;
        }
    }
}

/* Set p of n candidates; returns their sum. */
static double weigh(const struct moe_sampling *p, float max, struct candidate *c, int32_t n) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i += LANES) {
        int32_t m = n - i < LANES ? n - i : LANES;
        floats e = {0};
        for (int32_t j = 0; j < m; j++) e[j] = (c[i + j].logit - max) / p->temperature;
        e = exp_of(e);
        for (int32_t j = 0; j < m; j++) sum += (double)(c[i + j].p = e[j]);
    }
    return sum;
}

/* Do the first candidates of the falling order, c[n] as a heap with this sum, contain all that steps after top_k can
 * choose? pool is the sum over everything. */
static bool enough(const struct moe_sampling *p, const struct candidate *c, double sum, double pool,
                   double u) {
    if (c[0].p < p->min_p)
        return true; /* c[0] is the last of them: it and all behind it are dropped */
    if (p->top_p < 1.0f) return sum >= (double)p->top_p * pool;
    return p->min_p == 0.0f && sum > u * pool;
}

static int32_t drop_below(struct candidate *c, int32_t n, float min_p, double *sum) {
    int32_t n_kept = 0;
    *sum = 0.0;
    for (int32_t i = 0; i < n; i++) {
        if (c[i].p < min_p) continue; /* the largest p is 1 */
        *sum += (double)c[i].p;
        c[n_kept++] = c[i];
    }
    return n_kept;
}

/* Step 6 for temperature > 0. Without top_k nearly every draw ends among the first few hundred tokens; only when it
 * may not are all of them made candidates. */
static int32_t draw(const struct moe_sampling *p, uint32_t position, const float *logits,
                    int32_t n_vocab, struct candidate *c) {
    enum { FIRST = 256 };
    double u = (double)sampler_uniform(p->seed, position);
    float max = max_of(logits, n_vocab);
    bool top_k = p->top_k > 0 && p->top_k < n_vocab;
    int32_t n = top_k ? p->top_k : n_vocab < FIRST ? n_vocab : FIRST;
    select_top(logits, n_vocab, n, c);
    double pool = weigh(p, max, c, n);
    if (!top_k && n < n_vocab) {
        double sum = pool;
        pool = sum_exp(logits, n_vocab, max, p->temperature);
        if (!enough(p, c, sum, pool, u)) {
            n = n_vocab;
            for (int32_t i = 0; i < n; i++) c[i] = (struct candidate){.logit = logits[i], .id = i};
            weigh(p, max, c, n);
        }
    }
    double kept = pool;
    if (p->min_p > 0.0f) n = drop_below(c, n, p->min_p, &kept);
    if (p->top_p < 1.0f) n = prefix_select(c, n, (double)p->top_p * pool, false, &kept);
    double ignored;
    return c[prefix_select(c, n, u * kept, true, &ignored) - 1].id;
}

/* Step 1: the log of the softmax's denominator, and the most likely tokens. */
static double report_top(const struct moe_sampling *p, const float *logits, int32_t n_vocab,
                         struct candidate *c, struct moe_row *row) {
    float max = max_of(logits, n_vocab);
    double log_sum = (double)max + log(sum_exp(logits, n_vocab, max, 1.0f));
    row->n_top = p->n_top < n_vocab ? p->n_top : n_vocab;
    if (row->n_top == 0) return log_sum;
    select_top(logits, n_vocab, row->n_top, c);
    sort_few(c, row->n_top);
    for (int32_t i = 0; i < row->n_top; i++) {
        row->top_ids[i] = c[i].id;
        row->top_logprobs[i] = (float)((double)c[i].logit - log_sum);
    }
    return log_sum;
}

void sampler_row(struct sampler *s, struct sampler_scratch *scratch, int32_t slot_idx,
                 float *logits, struct moe_row *row) {
    CHECK(slot_idx >= 0 && slot_idx < s->n_slots);
    struct slot *slot = &s->slots[slot_idx];
    const struct moe_sampling *p = &slot->params;
    CHECK(slot->n_ids < s->cap && p->repetition_penalty > 0.0f); /* room, and started */
    *row = (struct moe_row){.slot = slot_idx, .token = -1, .st = ST_NUMERIC};
    if (slot->last < 0)
        slot->last = 0; /* what a step already under way may read if this row fails */
    if (!all_finite(logits, s->n_vocab)) return;

    double log_sum = 0.0;
    if (p->logprobs) {
        memcpy(scratch->raw, logits, (size_t)s->n_vocab * sizeof *logits);
        log_sum = report_top(p, logits, s->n_vocab, scratch->candidates, row);
    }
    adjust(slot, scratch->count, logits);
    /* Extreme biases can overflow, and bans can leave a tiny vocabulary empty. */
    if (!isfinite(max_of(logits, s->n_vocab))) {
        row->n_top = 0;
        return;
    }
    int32_t token = p->temperature > 0.0f
                        ? draw(p, (uint32_t)slot->n_ids, logits, s->n_vocab, scratch->candidates)
                        : largest(logits, s->n_vocab);
    slot->ids[slot->n_ids++] = token;
    slot->last = token;
    row->token = token;
    row->st = ST_OK;
    if (p->logprobs) row->logprob = (float)((double)scratch->raw[token] - log_sum);
}

bool sampler_takes_largest(const struct sampler *s, int32_t slot_idx) {
    CHECK(slot_idx >= 0 && slot_idx < s->n_slots);
    const struct slot *slot = &s->slots[slot_idx];
    const struct moe_sampling *p = &slot->params;
    return p->temperature == 0.0f && !p->logprobs && p->n_bias == 0 &&
           p->repetition_penalty == 1.0f && p->presence_penalty == 0.0f &&
           p->frequency_penalty == 0.0f &&
           (p->n_stop_ids == 0 || slot->n_ids - slot->n_prompt >= p->min_tokens);
}

void sampler_take(struct sampler *s, int32_t slot_idx, int32_t token, struct moe_row *row) {
    CHECK(slot_idx >= 0 && slot_idx < s->n_slots && token < s->n_vocab);
    struct slot *slot = &s->slots[slot_idx];
    CHECK(slot->n_ids < s->cap);
    *row = (struct moe_row){.slot = slot_idx, .token = -1, .st = ST_NUMERIC};
    if (slot->last < 0) slot->last = 0; /* as in sampler_row */
    if (token < 0) return;
    slot->ids[slot->n_ids++] = token;
    slot->last = token;
    row->token = token;
    row->st = ST_OK;
}
