/* place_plot: what moed-place predicts, as a picture: tokens/s over devices, both axes logarithmic, one line for
 * expert parallelism and one for whole copies. */
#ifndef MOED_BENCH_PLACE_PLOT_H
#define MOED_BENCH_PLACE_PLOT_H

#include "proto/base.h"

struct place_point {
    int32_t n_devices;
    double expert_tok_s, replica_tok_s;
};

/* Writes an SVG file. ST_IO; ST_INVALID: no point. */
enum status place_plot(const char *path, const char *title, const struct place_point *points,
                       int n_points, struct error *e);

#endif
