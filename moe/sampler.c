/* See sampler.h for the definition. Here: how to do it without sorting a vocabulary.
 *
 * Greedy rows are one scan. top_k keeps a heap of k while scanning the logits once. Where a prefix of the
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

static void check_params(const struct moe_sampling *p, int32_t n_vocab) {
    CHECK(isfinite(p->temperature) && p->temperature >= 0.0f);
    CHECK(p->top_k >= 0);
    CHECK(p->top_p >= 0.0f && p->top_p <= 1.0f);
    CHECK(p->min_p >= 0.0f && p->min_p <= 1.0f);
    CHECK(isfinite(p->repetition_penalty) && p->repetition_penalty > 0.0f);
    CHECK(isfinite(p->presence_penalty) && isfinite(p->frequency_penalty));
    CHECK(p->n_bias >= 0 && p->n_bias <= MOE_MAX_BIASES);
    for (int32_t i = 0; i < p->n_bias; i++) {
        CHECK(p->bias[i].token >= 0 && p->bias[i].token < n_vocab);
        CHECK(isfinite(p->bias[i].bias));
    }
    CHECK(p->n_stop_ids >= 0 && p->n_stop_ids <= MOE_MAX_STOP_IDS);
    for (int32_t i = 0; i < p->n_stop_ids; i++)
        CHECK(p->stop_ids[i] >= 0 && p->stop_ids[i] < n_vocab);
    CHECK(p->n_top >= 0 && p->n_top <= MOE_MAX_TOP);
}

void sampler_start(struct sampler *s, const struct moe_slot_start *start) {
    CHECK(start->slot >= 0 && start->slot < s->n_slots);
    CHECK(start->n_prompt >= 0 && start->n_prompt <= start->n_ids && start->n_ids < s->cap);
    check_params(&start->sampling, s->n_vocab);
    struct slot *slot = &s->slots[start->slot];
    slot->params = start->sampling;
    slot->n_ids = start->n_ids;
    slot->n_prompt = start->n_prompt;
    slot->last = -1;
    for (int32_t i = 0; i < start->n_ids; i++) {
        CHECK(start->ids[i] >= 0 && start->ids[i] < s->n_vocab);
        slot->ids[i] = start->ids[i];
    }
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

/* The first k of n logits in the falling order, in no order, to c[k]. */
static void select_top(const float *logits, int32_t n, int32_t k, struct candidate *c) {
    for (int32_t i = 0; i < k; i++) c[i] = (struct candidate){.logit = logits[i], .id = i};
    for (int32_t i = k / 2; i-- > 0;) sift_down(c, k, i);
    for (int32_t i = k; i < n; i++) {
        if (!(logits[i] > c[0].logit)) continue; /* an equal one has the higher id */
        c[0] = (struct candidate){.logit = logits[i], .id = i};
        sift_down(c, k, 0);
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
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
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

/* Step 6 for temperature > 0. */
static int32_t draw(const struct moe_sampling *p, uint32_t position, const float *logits,
                    int32_t n_vocab, struct candidate *c) {
    int32_t n = n_vocab;
    if (p->top_k > 0 && p->top_k < n_vocab) {
        n = p->top_k;
        select_top(logits, n_vocab, n, c);
    } else {
        for (int32_t i = 0; i < n; i++) c[i] = (struct candidate){.logit = logits[i], .id = i};
    }
    float max = logits[largest(logits, n_vocab)];
    double total = 0.0, kept = 0.0;
    int32_t n_kept = 0;
    for (int32_t i = 0; i < n; i++) {
        struct candidate d = c[i];
        d.p = expf((d.logit - max) / p->temperature);
        total += (double)d.p;
        if (d.p < p->min_p) continue; /* the largest p is 1 */
        kept += (double)d.p;
        c[n_kept++] = d;
    }
    if (p->top_p < 1.0f) n_kept = prefix_select(c, n_kept, (double)p->top_p * total, false, &kept);
    double u = (double)sampler_uniform(p->seed, position);
    double ignored;
    return c[prefix_select(c, n_kept, u * kept, true, &ignored) - 1].id;
}

/* Step 1: the log of the softmax's denominator, and the most likely tokens. */
static double report_top(const struct moe_sampling *p, const float *logits, int32_t n_vocab,
                         struct candidate *c, struct moe_row *row) {
    float max = logits[largest(logits, n_vocab)];
    double sum = 0.0;
    for (int32_t i = 0; i < n_vocab; i++) sum += (double)expf(logits[i] - max);
    double log_sum = (double)max + log(sum);
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
    int32_t token = largest(logits, s->n_vocab);
    /* Extreme biases can overflow, and bans can leave a tiny vocabulary empty. */
    if (!isfinite(logits[token])) {
        row->n_top = 0;
        return;
    }
    if (p->temperature > 0.0f)
        token = draw(p, (uint32_t)slot->n_ids, logits, s->n_vocab, scratch->candidates);
    slot->ids[slot->n_ids++] = token;
    slot->last = token;
    row->token = token;
    row->st = ST_OK;
    if (p->logprobs) row->logprob = (float)((double)scratch->raw[token] - log_sum);
}
