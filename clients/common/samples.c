/* See samples.h. */
#include "clients/common/samples.h"

#include <math.h>
#include <stdlib.h>

bool samples_add(struct samples *s, double value, size_t times) {
    if (s->n + times > s->cap) {
        size_t cap = s->cap ? s->cap * 2 : 1024;
        if (cap < s->n + times) cap = s->n + times;
        double *v = realloc(s->values, cap * sizeof *v);
        if (!v) return false;
        s->values = v;
        s->cap = cap;
    }
    for (size_t i = 0; i < times; i++) s->values[s->n++] = value;
    s->sorted = false;
    return true;
}

void samples_free(struct samples *s) {
    free(s->values);
    *s = (struct samples){0};
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double samples_percentile(struct samples *s, double p) {
    if (s->n == 0) return 0;
    if (!s->sorted) qsort(s->values, s->n, sizeof *s->values, compare);
    s->sorted = true;
    double rank = ceil(p * (double)s->n - 1e-9); /* 0.07 * 100 is a little more than 7 */
    size_t i = rank < 1 ? 0 : (size_t)rank - 1;
    return s->values[i < s->n ? i : s->n - 1];
}

double samples_mean(const struct samples *s) {
    double sum = 0;
    for (size_t i = 0; i < s->n; i++) sum += s->values[i];
    return s->n > 0 ? sum / (double)s->n : 0;
}
