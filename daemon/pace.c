/* See pace.h. */
#include "daemon/pace.h"

#include <math.h>

/* A step counts half after 34 more. Long enough to hold steps of several sizes, short against the hundreds of
 * steps in which contexts grow. */
static const double decay = 0.98;
/* One step that the machine held up (another process, a page fault) must not close the tap: it counts for
 * at most so many times what was expected. */
static const double most_surprise = 2;
/* Below this spread of sizes, relative to their mean, a slope would be read from noise. */
static const double least_spread = 0.05;

static double expected(const struct pace *p, double tokens) {
    double mean_x = p->x / p->n, mean_y = p->y / p->n;
    /* One size only: as if the tokens were all of the cost, which errs towards small steps. */
    double per_token = p->per_token > 0 ? p->per_token : mean_y / mean_x;
    double ns = mean_y + per_token * (tokens - mean_x);
    return ns > 0 ? ns : 0;
}

void pace_learn(struct pace *p, int32_t n_tokens, uint64_t ns) {
    CHECK(n_tokens >= 1);
    double x = n_tokens, y = (double)ns;
    if (p->n > 0) {
        double most = most_surprise * fmax(expected(p, x), p->y / p->n / 2);
        if (y > most) y = most;
    }
    p->n = decay * p->n + 1;
    p->x = decay * p->x + x;
    p->y = decay * p->y + y;
    p->xx = decay * p->xx + x * x;
    p->xy = decay * p->xy + x * y;
    double mean_x = p->x / p->n, mean_y = p->y / p->n;
    double var = p->xx / p->n - mean_x * mean_x, cov = p->xy / p->n - mean_x * mean_y;
    if (var < least_spread * least_spread * mean_x * mean_x) return;
    /* Never steeper than a line through zero, never flat: either would be noise. */
    p->per_token = fmin(fmax(cov / var, 1e-3 * mean_y / mean_x), mean_y / mean_x);
}

int32_t pace_tokens(const struct pace *p, uint64_t bound_ns) {
    if (p->n == 0) return INT32_MAX;
    double mean_x = p->x / p->n, mean_y = p->y / p->n;
    double per_token = p->per_token > 0 ? p->per_token : mean_y / mean_x;
    if (per_token <= 0) return INT32_MAX;
    double tokens = mean_x + ((double)bound_ns - mean_y) / per_token;
    return tokens < 1 ? 0 : tokens < INT32_MAX ? (int32_t)tokens : INT32_MAX;
}
