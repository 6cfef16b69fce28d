/* See shares.h. */
#include "moe/shares.h"

#include <stdlib.h>
#include <string.h>

#include "moe/placement.h"

/* ---- life ----------------------------------------------------------------------------------- */

static size_t n_cells(const struct shares *s) { return (size_t)s->n_layers * (size_t)s->n_experts; }

static struct placement_problem problem_of(const struct shares *s) {
    return (struct placement_problem){.n_layers = s->n_layers,
                                      .n_experts = s->n_experts,
                                      .n_groups = 1,
                                      .n_hosts = 1,
                                      .n_devices = s->n_ranks,
                                      .slots = s->slots,
                                      .load = s->load};
}

/* The planner may put two replicas of an expert on one device. Give the place saved to the expert with the
 * highest load per copy that the device has not. */
static void fill_layer(const struct shares *s, const double *load, uint16_t *bits) {
    for (int32_t r = 0; r < s->n_ranks; r++) {
        int32_t n = 0;
        for (int32_t e = 0; e < s->n_experts; e++) n += bits[e] >> r & 1;
        for (; n < s->slots; n++) {
            int32_t best = -1;
            double most = -1;
            for (int32_t e = 0; e < s->n_experts; e++) {
                double per_copy = load[e] / __builtin_popcount(bits[e]);
                if (bits[e] >> r & 1 || per_copy <= most) continue;
                most = per_copy;
                best = e;
            }
            bits[best] |= (uint16_t)(1u << r);
        }
    }
}

/* A plan's devices as bits. */
static void to_bits(const struct shares *s, uint16_t *bits) {
    memset(bits, 0, n_cells(s) * sizeof *bits);
    int32_t n_places = s->n_ranks * s->slots;
    for (int32_t l = 0; l < s->n_layers; l++)
        for (int32_t p = 0; p < n_places; p++) {
            int32_t e = s->expert_of[(size_t)l * (size_t)n_places + (size_t)p];
            bits[(size_t)l * (size_t)s->n_experts + (size_t)e] |= (uint16_t)(1u << (p / s->slots));
        }
    for (int32_t l = 0; l < s->n_layers; l++) {
        size_t at = (size_t)l * (size_t)s->n_experts;
        fill_layer(s, s->load + at, bits + at);
    }
}

enum status shares_create(const struct model_shape *shape, int n_ranks, int32_t slots,
                          const uint64_t *load, struct shares *out) {
    int32_t least = (shape->n_experts + n_ranks - 1) / n_ranks;
    CHECK(n_ranks >= 1 && n_ranks <= MOE_MAX_RANKS);
    if (slots < least) slots = least;
    if (slots > shape->n_experts) slots = shape->n_experts;
    *out = (struct shares){.n_layers = shape->n_layers,
                           .n_experts = shape->n_experts,
                           .n_ranks = n_ranks,
                           .slots = slots};
    size_t n = n_cells(out), n_places = (size_t)n_ranks * (size_t)slots;
    out->held = calloc(n, sizeof *out->held);
    out->next = calloc(n, sizeof *out->next);
    out->load = calloc(n, sizeof *out->load);
    out->rows = calloc((size_t)shape->n_layers * (size_t)n_ranks, sizeof *out->rows);
    out->expert_of = calloc((size_t)shape->n_layers * n_places, sizeof *out->expert_of);
    out->n_replicas = calloc(n, sizeof *out->n_replicas);
    bool ok = out->held && out->next && out->load && out->rows && out->expert_of && out->n_replicas;
    if (ok) {
        struct placement_problem p = problem_of(out);
        struct placement plan = {out->expert_of, out->n_replicas};
        for (size_t i = 0; i < n; i++) out->load[i] = load ? (double)load[i] : 1;
        ok = placement_plan(&p, NULL, &plan) == ST_OK;
    }
    if (!ok) {
        shares_destroy(out);
        return ST_NO_MEMORY;
    }
    to_bits(out, out->held);
    memset(out->load, 0, n * sizeof *out->load);
    return ST_OK;
}

void shares_destroy(struct shares *s) {
    free(s->held);
    free(s->next);
    free(s->load);
    free(s->rows);
    free(s->expert_of);
    free(s->n_replicas);
    *s = (struct shares){0};
}

/* ---- a step --------------------------------------------------------------------------------- */

static int least_loaded(uint16_t holders, int n_ranks, const int64_t *load) {
    int best = -1;
    for (int r = 0; r < n_ranks; r++)
        if (holders >> r & 1 && (best < 0 || load[r] < load[best])) best = r;
    return best;
}

void shares_assign(const struct shares *s, int32_t layer, const int32_t *counts,
                   struct shares_scratch *scratch, int32_t *rows) {
    const uint16_t *held = s->held + (size_t)layer * (size_t)s->n_experts;
    int64_t *load = scratch->load, total = 0;
    int32_t n = 0;
    memset(load, 0, sizeof scratch->load);
    memset(rows, 0, (size_t)s->n_experts * (size_t)s->n_ranks * sizeof *rows);
    for (int32_t e = 0; e < s->n_experts; e++) {
        total += counts[e];
        if (counts[e] == 0) continue;
        if ((held[e] & (held[e] - 1)) == 0) {
            int r = least_loaded(held[e], s->n_ranks, load);
            rows[e * s->n_ranks + r] = counts[e];
            load[r] += counts[e];
            continue;
        }
        int32_t at = n++; /* insertion by falling count, ties by rising expert */
        for (; at > 0 && counts[scratch->order[at - 1]] < counts[e]; at--)
            scratch->order[at] = scratch->order[at - 1];
        scratch->order[at] = e;
    }
    int64_t most = (total + 2 * s->n_ranks - 1) / (2 * s->n_ranks);
    for (int32_t i = 0; i < n; i++) {
        int32_t e = scratch->order[i];
        for (int64_t left = counts[e]; left > 0;) {
            int r = least_loaded(held[e], s->n_ranks, load);
            int64_t piece = left < most ? left : most;
            rows[e * s->n_ranks + r] += (int32_t)piece;
            load[r] += piece;
            left -= piece;
        }
    }
}

void shares_record(struct shares *s, int32_t layer, const int32_t *counts, const int32_t *rows) {
    double *load = s->load + (size_t)layer * (size_t)s->n_experts;
    uint64_t *sum = s->rows + (size_t)layer * (size_t)s->n_ranks;
    for (int32_t e = 0; e < s->n_experts; e++) {
        load[e] += counts[e];
        s->window_rows += (uint64_t)counts[e];
        for (int32_t r = 0; r < s->n_ranks; r++) sum[r] += (uint64_t)rows[e * s->n_ranks + r];
    }
}

void shares_record_sums(struct shares *s, int32_t layer, const uint64_t *counts, const uint64_t *rows) {
    double *load = s->load + (size_t)layer * (size_t)s->n_experts;
    uint64_t *sum = s->rows + (size_t)layer * (size_t)s->n_ranks;
    for (int32_t e = 0; e < s->n_experts; e++) load[e] += (double)counts[e];
    for (int32_t r = 0; r < s->n_ranks; r++) {
        sum[r] += rows[r];
        s->window_rows += rows[r];
    }
}

/* ---- plans ---------------------------------------------------------------------------------- */

double shares_imbalance(const struct shares *s) {
    uint64_t most = 0;
    for (int32_t l = 0; l < s->n_layers; l++) {
        uint64_t max = 0;
        for (int32_t r = 0; r < s->n_ranks; r++) {
            uint64_t n = s->rows[(size_t)l * (size_t)s->n_ranks + (size_t)r];
            if (n > max) max = n;
        }
        most += max;
    }
    return s->window_rows > 0 ? (double)most * s->n_ranks / (double)s->window_rows : 1;
}

/* As shares_imbalance, of the plan at hand if the load stays as it was. */
static double promised(const struct shares *s, const struct placement_problem *p,
                       const struct placement *plan) {
    double most = 0, total = 0;
    for (int32_t l = 0; l < s->n_layers; l++) {
        double sum = 0;
        for (int32_t e = 0; e < s->n_experts; e++)
            sum += s->load[(size_t)l * (size_t)s->n_experts + (size_t)e];
        most += placement_imbalance(p, plan, l) * sum;
        total += sum;
    }
    return total > 0 ? most / total : 1;
}

/* Rename a layer's devices in `next`: each rank in turn takes the device that has most of what it holds. */
static void rename_layer(const struct shares *s, int32_t layer) {
    const uint16_t *held = s->held + (size_t)layer * (size_t)s->n_experts;
    uint16_t *next = s->next + (size_t)layer * (size_t)s->n_experts;
    int rank_of[MOE_MAX_RANKS];
    unsigned taken = 0;
    for (int r = 0; r < s->n_ranks; r++) {
        int best = -1, most = -1;
        for (int d = 0; d < s->n_ranks; d++) {
            if (taken >> d & 1) continue;
            int n = 0;
            for (int32_t e = 0; e < s->n_experts; e++) n += next[e] >> d & held[e] >> r & 1;
            if (n > most) most = n, best = d;
        }
        rank_of[best] = r;
        taken |= 1u << best;
    }
    for (int32_t e = 0; e < s->n_experts; e++) {
        unsigned bits = 0;
        for (int d = 0; d < s->n_ranks; d++)
            if (next[e] >> d & 1) bits |= 1u << rank_of[d];
        next[e] = (uint16_t)bits;
    }
}

bool shares_replan(struct shares *s, uint64_t window_tokens, double bound) {
    /* A plan must be worth the copying. */
    const double least_gain = 0.02;
    if (s->window_rows < window_tokens) return false;
    double was = shares_imbalance(s);
    bool better = false;
    if (was > bound && s->slots < s->n_experts) {
        struct placement_problem p = problem_of(s);
        struct placement plan = {s->expert_of, s->n_replicas};
        better =
            placement_plan(&p, NULL, &plan) == ST_OK && promised(s, &p, &plan) + least_gain < was;
    }
    if (better) {
        to_bits(s, s->next);
        for (int32_t l = 0; l < s->n_layers; l++) rename_layer(s, l);
    }
    memset(s->load, 0, n_cells(s) * sizeof *s->load);
    memset(s->rows, 0, (size_t)s->n_layers * (size_t)s->n_ranks * sizeof *s->rows);
    s->window_rows = 0;
    return better;
}
