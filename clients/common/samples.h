/* samples: every measured value, kept, so that percentiles are exact. Single thread. */
#ifndef MOED_CLIENTS_COMMON_SAMPLES_H
#define MOED_CLIENTS_COMMON_SAMPLES_H

#include "proto/base.h"

struct samples {
    double *values;
    size_t n, cap;
    bool sorted;
};

/* False: no memory; the value is lost. */
bool samples_add(struct samples *s, double value, size_t times);
void samples_free(struct samples *s);
/* The smallest value that at least the share p (0 < p <= 1) of all values does not exceed
 * (nearest rank; no interpolation, so that it is a value that was measured). 0 when there are
 * none. Sorts. */
double samples_percentile(struct samples *s, double p);
double samples_mean(const struct samples *s);

#endif
