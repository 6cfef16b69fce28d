/* See offload.h. */
#include "moe/offload.h"

#include <math.h>
#include <stdlib.h>

struct candidate {
    uint64_t load;
    int32_t turn; /* of its layer */
    int32_t index;
};

static int by_load(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (x->load != y->load) return x->load < y->load ? -1 : 1;
    if (x->turn != y->turn) return x->turn < y->turn ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

int32_t offload_choose(const struct offload_problem *p, int32_t n, uint64_t room, bool *far) {
    int32_t n_all = p->n_layers * p->n_experts, taken = 0;
    uint64_t left = 0; /* bytes of those that are not far */
    CHECK(n == MOE_OFFLOAD_AUTO || (n >= 0 && n <= n_all));
    struct candidate *c = calloc((size_t)n_all, sizeof *c);
    if (!c) return -1;
    for (int32_t i = 0; i < n_all; i++) {
        c[i] = (struct candidate){p->load ? p->load[i] : 0, p->n_experts - 1 - i % p->n_experts, i};
        left += p->bytes[i / p->n_experts];
        far[i] = false;
    }
    qsort(c, (size_t)n_all, sizeof *c, by_load);
    while (n == MOE_OFFLOAD_AUTO ? left > room : taken < n) {
        int32_t i = c[taken++].index;
        far[i] = true;
        left -= p->bytes[i / p->n_experts];
    }
    free(c);
    return taken;
}

uint64_t offload_host_bytes(const struct offload_problem *p, const bool *far) {
    uint64_t n = 0;
    for (int32_t i = 0; i < p->n_layers * p->n_experts; i++)
        if (far[i]) n += p->bytes[i / p->n_experts];
    return n;
}

double offload_step_bytes(const struct offload_problem *p, const bool *far, int32_t n_tokens) {
    double sum = 0;
    for (int32_t l = 0; l < p->n_layers; l++) {
        double total = 0;
        for (int32_t x = 0; p->load && x < p->n_experts; x++)
            total += (double)p->load[l * p->n_experts + x];
        for (int32_t x = 0; x < p->n_experts; x++) {
            int32_t i = l * p->n_experts + x;
            if (!far[i]) continue;
            double share = total > 0 ? (double)p->load[i] / total : 1.0 / p->n_experts;
            double drawn = fmin(share * p->n_used, 1.0); /* by one token */
            sum += (1.0 - pow(1.0 - drawn, n_tokens)) * (double)p->bytes[l];
        }
    }
    return sum;
}
