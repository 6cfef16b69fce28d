/* See place_plot.h. */
#include "bench/place_plot.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WIDTH = 640, HEIGHT = 420, LEFT = 70, RIGHT = 20, TOP = 40, BOTTOM = 50 };

struct axes {
    double x_lo, x_hi, y_lo, y_hi; /* log2 devices, log10 tokens/s */
};

static double at_x(const struct axes *a, double devices) {
    double span = a->x_hi > a->x_lo ? a->x_hi - a->x_lo : 1;
    return LEFT + (log2(devices) - a->x_lo) / span * (WIDTH - LEFT - RIGHT);
}

static double at_y(const struct axes *a, double tok_s) {
    return HEIGHT - BOTTOM -
           (log10(tok_s) - a->y_lo) / (a->y_hi - a->y_lo) * (HEIGHT - TOP - BOTTOM);
}

static struct axes fit(const struct place_point *p, int n) {
    struct axes a = {INFINITY, -INFINITY, INFINITY, -INFINITY};
    for (int i = 0; i < n; i++) {
        a.x_lo = fmin(a.x_lo, log2(p[i].n_devices));
        a.x_hi = fmax(a.x_hi, log2(p[i].n_devices));
        a.y_lo = fmin(a.y_lo, floor(log10(fmin(p[i].expert_tok_s, p[i].replica_tok_s))));
        a.y_hi = fmax(a.y_hi, ceil(log10(fmax(p[i].expert_tok_s, p[i].replica_tok_s))));
    }
    if (a.y_hi <= a.y_lo) a.y_hi = a.y_lo + 1;
    return a;
}

static void line(FILE *f, const struct axes *a, const struct place_point *p, int n, bool expert) {
    const char *color = expert ? "#0b6" : "#36c";
    fprintf(f, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"", color);
    for (int i = 0; i < n; i++)
        fprintf(f, "%.1f,%.1f ", at_x(a, p[i].n_devices),
                at_y(a, expert ? p[i].expert_tok_s : p[i].replica_tok_s));
    fputs("\"/>\n", f);
    fprintf(f, "<text x=\"%d\" y=\"%d\" fill=\"%s\">%s</text>\n", LEFT + 10,
            TOP + (expert ? 15 : 32), color, expert ? "expert parallel" : "whole copies");
}

static void frame(FILE *f, const struct axes *a, const struct place_point *p, int n) {
    for (int i = 0; i < n; i++)
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n",
                at_x(a, p[i].n_devices), HEIGHT - BOTTOM + 18, p[i].n_devices);
    for (double y = a->y_lo; y <= a->y_hi; y++) {
        double at = at_y(a, pow(10, y));
        fprintf(f, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ccc\"/>\n", LEFT,
                WIDTH - RIGHT, at, at);
        fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.0f</text>\n", LEFT - 6, at + 4,
                pow(10, y));
    }
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">devices (tokens/s upwards)</text>\n",
            WIDTH / 2, HEIGHT - 12);
}

enum status place_plot(const char *path, const char *title, const struct place_point *points,
                       int n_points, struct error *e) {
    if (n_points == 0) return error_set(e, ST_INVALID, "nothing to plot");
    FILE *f = fopen(path, "w");
    if (!f) return error_set(e, ST_IO, "%s: %s", path, strerror(errno));
    struct axes a = fit(points, n_points);
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
            "fill=\"white\"/>\n<text x=\"%d\" y=\"22\" text-anchor=\"middle\" font-size=\"15\">%s"
            "</text>\n",
            WIDTH, HEIGHT, WIDTH / 2, title);
    frame(f, &a, points, n_points);
    line(f, &a, points, n_points, true);
    line(f, &a, points, n_points, false);
    fputs("</svg>\n", f);
    bool written = !ferror(f);
    if (fclose(f) != 0 || !written)
        return error_set(e, ST_IO, "%s: cannot be written: %s", path, strerror(errno));
    return ST_OK;
}
