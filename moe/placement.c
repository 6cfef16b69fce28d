/* See placement.h. */
#include "moe/placement.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum status problem_check(const struct placement_problem *p, struct error *e) {
    if (p->n_layers < 1) return error_set(e, ST_INVALID, "n_layers is %d", p->n_layers);
    if (p->n_experts < 1) return error_set(e, ST_INVALID, "n_experts is %d", p->n_experts);
    if (p->n_groups < 1 || p->n_experts % p->n_groups != 0)
        return error_set(e, ST_INVALID, "n_groups %d does not divide %d experts", p->n_groups,
                         p->n_experts);
    if (p->n_hosts < 1 || p->n_groups % p->n_hosts != 0)
        return error_set(e, ST_INVALID, "n_hosts %d does not divide %d groups", p->n_hosts,
                         p->n_groups);
    if (p->n_devices < 1 || p->n_devices % p->n_hosts != 0)
        return error_set(e, ST_INVALID, "n_hosts %d does not divide %d devices", p->n_hosts,
                         p->n_devices);
    int64_t places = (int64_t)p->slots * p->n_devices;
    if (p->slots < 1 || places < p->n_experts || places > INT32_MAX)
        return error_set(e, ST_INVALID, "%d slots on %d devices cannot hold %d experts", p->slots,
                         p->n_devices, p->n_experts);
    for (int64_t i = 0; i < (int64_t)p->n_layers * p->n_experts; i++)
        if (!isfinite(p->load[i]) || p->load[i] < 0)
            return error_set(e, ST_INVALID, "load of layer %lld expert %lld is not a load",
                             (long long)(i / p->n_experts), (long long)(i % p->n_experts));
    return ST_OK;
}

/* Sort indices 0 … n-1 by falling weight, ties by rising index. Merge sort through tmp[n]. */
static void sort_heaviest(const double *weight, int32_t n, int32_t *idx, int32_t *tmp) {
    for (int32_t i = 0; i < n; i++) idx[i] = i;
    for (int32_t width = 1; width < n; width *= 2) {
        for (int32_t lo = 0; lo < n; lo += 2 * width) {
            int32_t mid = lo + width < n ? lo + width : n;
            int32_t hi = mid + width < n ? mid + width : n;
            int32_t a = lo, b = mid;
            for (int32_t k = lo; k < hi; k++) {
                bool left = a < mid && (b >= hi || weight[idx[a]] >= weight[idx[b]]);
                tmp[k] = left ? idx[a++] : idx[b++];
            }
        }
        memcpy(idx, tmp, (size_t)n * sizeof *idx);
    }
}

/* Put n items into n_packs packs of n / n_packs items each: heaviest first, into the least loaded
 * pack with room. place[i] = pack * (n / n_packs) + rank within the pack. */
struct packer {
    double *pack_load;   /* [packs] */
    int32_t *pack_items; /* [packs] */
    int32_t *order, *tmp; /* [items] */
};

static void pack_balanced(struct packer *w, const double *weight, int32_t n, int32_t n_packs,
                          int32_t *place) {
    int32_t room = n / n_packs;
    for (int32_t k = 0; k < n_packs; k++) w->pack_load[k] = 0, w->pack_items[k] = 0;
    /* One item per pack: the order of the items is the order of the packs, as EPLB has it. */
    if (room == 1) {
        for (int32_t i = 0; i < n; i++) place[i] = i;
        return;
    }
    sort_heaviest(weight, n, w->order, w->tmp);
    for (int32_t k = 0; k < n; k++) {
        int32_t item = w->order[k], best = -1;
        for (int32_t j = 0; j < n_packs; j++)
            if (w->pack_items[j] < room && (best < 0 || w->pack_load[j] < w->pack_load[best]))
                best = j;
        place[item] = best * room + w->pack_items[best]++;
        w->pack_load[best] += weight[item];
    }
}

struct scratch {
    struct packer packer;
    double *group_load;   /* [groups] */
    int32_t *group_place; /* [groups] */
    int32_t *expert_at;   /* [E] expert in host-major order */
    double *replica_load; /* [places per host] */
    int32_t *replica;     /* [places per host] expert, as an index within the host */
    int32_t *replica_place;
    double *host_load;    /* [E per host] */
    int32_t *host_count;
};

/* Give each expert of a host one replica, then each further place to the highest load per replica. */
static void replicate(struct scratch *s, int32_t n_experts, int32_t n_places) {
    for (int32_t i = 0; i < n_experts; i++) s->host_count[i] = 1, s->replica[i] = i;
    for (int32_t r = n_experts; r < n_places; r++) {
        int32_t best = 0;
        for (int32_t i = 1; i < n_experts; i++)
            if (s->host_load[i] / s->host_count[i] > s->host_load[best] / s->host_count[best])
                best = i;
        s->replica[r] = best;
        s->host_count[best]++;
    }
    for (int32_t r = 0; r < n_places; r++)
        s->replica_load[r] = s->host_load[s->replica[r]] / s->host_count[s->replica[r]];
}

static void plan_layer(const struct placement_problem *p, const double *load, struct scratch *s,
                       int32_t *expert_of, int32_t *n_replicas) {
    int32_t group_size = p->n_experts / p->n_groups;
    for (int32_t g = 0; g < p->n_groups; g++) {
        s->group_load[g] = 0;
        for (int32_t i = 0; i < group_size; i++) s->group_load[g] += load[g * group_size + i];
    }
    pack_balanced(&s->packer, s->group_load, p->n_groups, p->n_hosts, s->group_place);
    for (int32_t g = 0; g < p->n_groups; g++)
        for (int32_t i = 0; i < group_size; i++)
            s->expert_at[s->group_place[g] * group_size + i] = g * group_size + i;

    int32_t host_experts = p->n_experts / p->n_hosts;
    int32_t host_places = p->n_devices / p->n_hosts * p->slots;
    for (int32_t h = 0; h < p->n_hosts; h++) {
        const int32_t *experts = s->expert_at + h * host_experts;
        for (int32_t i = 0; i < host_experts; i++) s->host_load[i] = load[experts[i]];
        replicate(s, host_experts, host_places);
        pack_balanced(&s->packer, s->replica_load, host_places, p->n_devices / p->n_hosts,
                      s->replica_place);
        for (int32_t r = 0; r < host_places; r++)
            expert_of[h * host_places + s->replica_place[r]] = experts[s->replica[r]];
        for (int32_t i = 0; i < host_experts; i++) n_replicas[experts[i]] = s->host_count[i];
    }
}

/* Carve n elements of `size` bytes off one zeroed block (first pass: base NULL, only counts). */
static void *carve(uint8_t *base, size_t *used, size_t n, size_t size) {
    void *p = base ? base + *used : NULL;
    *used += (n * size + 15) & ~(size_t)15;
    return p;
}

static size_t scratch_layout(const struct placement_problem *p, uint8_t *base, struct scratch *s) {
    size_t used = 0;
    size_t places = (size_t)p->n_devices * (size_t)p->slots, experts = (size_t)p->n_experts;
    size_t packs = (size_t)(p->n_devices > p->n_hosts ? p->n_devices : p->n_hosts);
    s->packer.pack_load = carve(base, &used, packs, sizeof(double));
    s->packer.pack_items = carve(base, &used, packs, sizeof(int32_t));
    s->packer.order = carve(base, &used, places, sizeof(int32_t)); /* places >= experts >= groups */
    s->packer.tmp = carve(base, &used, places, sizeof(int32_t));
    s->group_load = carve(base, &used, (size_t)p->n_groups, sizeof(double));
    s->group_place = carve(base, &used, (size_t)p->n_groups, sizeof(int32_t));
    s->expert_at = carve(base, &used, experts, sizeof(int32_t));
    s->replica_load = carve(base, &used, places, sizeof(double));
    s->replica = carve(base, &used, places, sizeof(int32_t));
    s->replica_place = carve(base, &used, places, sizeof(int32_t));
    s->host_load = carve(base, &used, experts, sizeof(double));
    s->host_count = carve(base, &used, experts, sizeof(int32_t));
    return used;
}

enum status placement_plan(const struct placement_problem *p, struct error *e,
                           struct placement *out) {
    enum status st = problem_check(p, e);
    if (st != ST_OK) return st;
    struct scratch s;
    uint8_t *mem = malloc(scratch_layout(p, NULL, &s));
    if (!mem) return error_set(e, ST_NO_MEMORY, "no memory to plan %d experts", p->n_experts);
    scratch_layout(p, mem, &s);
    size_t places = (size_t)p->n_devices * (size_t)p->slots, experts = (size_t)p->n_experts;
    for (size_t l = 0; l < (size_t)p->n_layers; l++)
        plan_layer(p, p->load + l * experts, &s, out->expert_of + l * places,
                   out->n_replicas + l * experts);
    free(mem);
    return ST_OK;
}

double placement_imbalance(const struct placement_problem *p, const struct placement *plan,
                           int32_t layer) {
    const double *load = p->load + (size_t)layer * (size_t)p->n_experts;
    const int32_t *count = plan->n_replicas + (size_t)layer * (size_t)p->n_experts;
    const int32_t *at = plan->expert_of + (size_t)layer * (size_t)p->n_devices * (size_t)p->slots;
    double total = 0, max = 0;
    for (int32_t d = 0; d < p->n_devices; d++) {
        double sum = 0;
        for (int32_t k = 0; k < p->slots; k++) {
            int32_t expert = at[d * p->slots + k];
            sum += load[expert] / count[expert];
        }
        total += sum;
        if (sum > max) max = sum;
    }
    return total > 0 ? max * p->n_devices / total : 1;
}
