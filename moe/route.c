/* See route.h. */
#include "moe/route.h"

#include <math.h>
#include <stdlib.h>

enum status route_create(const struct model_shape *shape, int32_t max_tokens, struct route *out) {
    CHECK(shape->n_experts > 0 && shape->n_experts_used > 0 && max_tokens > 0);
    CHECK(shape->n_experts_used <= shape->n_experts);
    size_t n_pairs = (size_t)max_tokens * (size_t)shape->n_experts_used;
    *out = (struct route){.n_experts = shape->n_experts,
                          .n_used = shape->n_experts_used,
                          .max_tokens = max_tokens,
                          .ids = calloc(n_pairs, sizeof(int32_t)),
                          .weights = calloc(n_pairs, sizeof(float)),
                          .expert_first = calloc((size_t)shape->n_experts + 1, sizeof(int32_t)),
                          .pair_of = calloc(n_pairs, sizeof(int32_t)),
                          .row_of = calloc(n_pairs, sizeof(int32_t))};
    if (out->ids && out->weights && out->expert_first && out->pair_of && out->row_of) return ST_OK;
    route_destroy(out);
    return ST_NO_MEMORY;
}

void route_destroy(struct route *r) {
    free(r->ids);
    free(r->weights);
    free(r->expert_first);
    free(r->pair_of);
    free(r->row_of);
    *r = (struct route){0};
}

uint64_t route_bytes(const struct route *r) {
    uint64_t n_pairs = (uint64_t)r->max_tokens * (uint64_t)r->n_used;
    return n_pairs * (3 * sizeof(int32_t) + sizeof(float)) +
           ((uint64_t)r->n_experts + 1) * sizeof(int32_t);
}

void route_top_k(const float *logits, int32_t n, int32_t k, bool renormalize, int32_t *ids,
                 float *weights) {
    CHECK(k > 0 && k <= n);
    int32_t n_kept = 0;
    for (int32_t e = 0; e < n; e++) {
        if (n_kept == k && !(logits[e] > logits[ids[k - 1]])) continue;
        int32_t i = n_kept < k ? n_kept++ : k - 1;
        /* Only a strictly larger logit passes an earlier id: ties stay with the lower one. */
        for (; i > 0 && logits[e] > logits[ids[i - 1]]; i--) ids[i] = ids[i - 1];
        ids[i] = e;
    }
    float max = logits[ids[0]];
    double sum = 0.0, kept = 0.0;
    for (int32_t e = 0; e < n && !renormalize; e++) sum += exp((double)logits[e] - (double)max);
    for (int32_t i = 0; i < k; i++) kept += exp((double)logits[ids[i]] - (double)max);
    for (int32_t i = 0; i < k; i++) {
        double p = exp((double)logits[ids[i]] - (double)max);
        weights[i] = (float)(p / (renormalize ? kept : sum));
    }
}

void route_sort(struct route *r, int32_t n_tokens) {
    CHECK(n_tokens >= 0 && n_tokens <= r->max_tokens);
    r->n_tokens = n_tokens;
    int32_t n_pairs = n_tokens * r->n_used;
    int32_t *first = r->expert_first;
    for (int32_t e = 0; e <= r->n_experts; e++) first[e] = 0;
    for (int32_t i = 0; i < n_pairs; i++) first[r->ids[i] + 1]++;
    for (int32_t e = 0; e < r->n_experts; e++) first[e + 1] += first[e];
    /* Place pairs with first[e] as the cursor, which leaves it at the end of e's group: shift back. */
    for (int32_t i = 0; i < n_pairs; i++) {
        int32_t row = first[r->ids[i]]++;
        r->row_of[i] = row;
        r->pair_of[row] = i;
    }
    for (int32_t e = r->n_experts; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

int32_t route_n_groups(const struct route *r) {
    int32_t n = 0;
    for (int32_t e = 0; e < r->n_experts; e++) n += r->expert_first[e + 1] > r->expert_first[e];
    return n;
}
