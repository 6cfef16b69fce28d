/* moed-place: what would n devices give? Replays a routing trace, recorded or synthetic, through the placement
 * planner and prints bytes, exchange, imbalance and predicted tokens per second for each number of devices. */
#include "bench/place_model.h"
#include "bench/place_plot.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "moed-place: predict expert placement over many devices\n"
    "\n"
    "  moed-place [--shape NAME] [--batch N] [--context N] [--zipf S | --trace FILE] [--devices "
    "LIST]\n"
    "\n"
    "Plans from the first half of a routing trace, replays the second half, and prints for each "
    "number of\n"
    "devices: expert bytes the busiest device reads per step, exchange volume, max/mean device "
    "load without\n"
    "and with the planner, step time and tokens/s of expert parallelism and of whole replicas. CSV "
    "with --csv.\n"
    "\n"
    "  --shape NAME       model shape (default qwen3-30b-a3b)\n"
    "  --batch N          sequences decoding together, over all devices (default 256)\n"
    "  --context N        mean context in tokens (default 576)\n"
    "  --steps N          steps of a synthetic trace (default 32)\n"
    "  --zipf S           synthetic trace: expert popularity ~ 1/rank^S (default 1.0; 0 = "
    "uniform)\n"
    "  --trace FILE       recorded trace: CSV step,layer,expert,tokens\n"
    "  --load FILE        synthetic trace by what a daemon measured: its --expert-load file\n"
    "  --devices LIST     comma-separated (default 2,4,8,16,32,64,128,256)\n"
    "  --extra N          places per device and layer beyond E/n, for replicas (default 2)\n"
    "  --host N           devices per host (default 8)\n"
    "  --fit N            experts of a layer that fit a device; the coldest of those that fit none "
    "stay in\n"
    "                     host memory and cross PCIe when they are needed (default: all fit)\n"
    "  --csv              comma-separated output\n"
    "  --svg FILE         plot tokens/s over the number of devices\n"
    "\n"
    "The cost model's constants (bench/place_model.h says how they are used):\n"
    "  --memory-gbs X  4280   --tflops X   500   --layer-us X  20\n"
    "  --link-gbs X     396   --link-us X    5   --net-gbs X   50   --net-us X  12\n"
    "  --pcie-gbs X      50\n";

#define CSV_HEADER                                                                                 \
    "devices,slots,expert_gb,exchange_mb,pcie_gb,imbalance_in_order,imbalance_planned,ep_ms,"      \
    "ep_tok_s,replica_ms,replica_tok_s"
#define TABLE_HEADER                                                                               \
    "devices slots expert GB exchange MB PCIe GB  in order planned |    EP ms     tok/s | "        \
    "copies ms    tok/s"

struct options {
    const struct place_shape *shape;
    struct place_costs costs;
    int32_t batch, steps, extra, fit;
    double context, zipf;
    const char *trace, *load, *devices, *svg;
    bool csv;
};

static double number(const char *name, const char *text, double lo, double hi) {
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || v < lo || v > hi) {
        fprintf(stderr, "moed-place: --%s %s: want a number from %g to %g\n", name, text, lo, hi);
        exit(2);
    }
    return v;
}

static void parse(int argc, char **argv, struct options *o) {
    enum {
        SHAPE = 1,
        BATCH,
        CONTEXT,
        STEPS,
        ZIPF,
        TRACE,
        DEVICES,
        EXTRA,
        HOST,
        CSV,
        MEMORY,
        TFLOPS,
        LAYER,
        LINK,
        LINK_US,
        NET,
        NET_US,
        PCIE,
        LOAD,
        FIT,
        SVG,
        HELP
    };
    static const struct option longs[] = {{"shape", 1, 0, SHAPE},
                                          {"batch", 1, 0, BATCH},
                                          {"context", 1, 0, CONTEXT},
                                          {"steps", 1, 0, STEPS},
                                          {"zipf", 1, 0, ZIPF},
                                          {"trace", 1, 0, TRACE},
                                          {"devices", 1, 0, DEVICES},
                                          {"extra", 1, 0, EXTRA},
                                          {"host", 1, 0, HOST},
                                          {"csv", 0, 0, CSV},
                                          {"memory-gbs", 1, 0, MEMORY},
                                          {"tflops", 1, 0, TFLOPS},
                                          {"layer-us", 1, 0, LAYER},
                                          {"link-gbs", 1, 0, LINK},
                                          {"link-us", 1, 0, LINK_US},
                                          {"net-gbs", 1, 0, NET},
                                          {"net-us", 1, 0, NET_US},
                                          {"pcie-gbs", 1, 0, PCIE},
                                          {"load", 1, 0, LOAD},
                                          {"fit", 1, 0, FIT},
                                          {"svg", 1, 0, SVG},
                                          {"help", 0, 0, HELP},
                                          {0}};
    *o = (struct options){.shape = place_shape_find("qwen3-30b-a3b"),
                          .costs = {.memory_gbs = 4280,
                                    .tflops = 500,
                                    .link_gbs = 396,
                                    .link_us = 5,
                                    .net_gbs = 50,
                                    .net_us = 12,
                                    .pcie_gbs = 50,
                                    .layer_us = 20,
                                    .devices_per_host = 8},
                          .fit = INT32_MAX,
                          .batch = 256,
                          .steps = 32,
                          .extra = 2,
                          .context = 576,
                          .zipf = 1,
                          .devices = "2,4,8,16,32,64,128,256"};
    int c, at;
    while ((c = getopt_long(argc, argv, "", longs, &at)) != -1) {
        const char *n = c == '?' ? "" : longs[at].name;
        switch (c) {
        case SHAPE:
            o->shape = place_shape_find(optarg);
            if (!o->shape) {
                fprintf(stderr, "moed-place: no shape %s; there are %s\n", optarg,
                        place_shape_names());
                exit(2);
            }
            break;
        case BATCH: o->batch = (int32_t)number(n, optarg, 1, 65536); break;
        case CONTEXT: o->context = number(n, optarg, 0, 1e7); break;
        case STEPS: o->steps = (int32_t)number(n, optarg, 2, 4096); break;
        case ZIPF: o->zipf = number(n, optarg, 0, 4); break;
        case TRACE: o->trace = optarg; break;
        case DEVICES: o->devices = optarg; break;
        case EXTRA: o->extra = (int32_t)number(n, optarg, 0, 1024); break;
        case HOST: o->costs.devices_per_host = (int32_t)number(n, optarg, 1, 4096); break;
        case CSV: o->csv = true; break;
        case MEMORY: o->costs.memory_gbs = number(n, optarg, 1, 1e6); break;
        case TFLOPS: o->costs.tflops = number(n, optarg, 0.001, 1e6); break;
        case LAYER: o->costs.layer_us = number(n, optarg, 0, 1e6); break;
        case LINK: o->costs.link_gbs = number(n, optarg, 0.001, 1e6); break;
        case LINK_US: o->costs.link_us = number(n, optarg, 0, 1e6); break;
        case NET: o->costs.net_gbs = number(n, optarg, 0.001, 1e6); break;
        case NET_US: o->costs.net_us = number(n, optarg, 0, 1e6); break;
        case PCIE: o->costs.pcie_gbs = number(n, optarg, 0.001, 1e6); break;
        case LOAD: o->load = optarg; break;
        case FIT: o->fit = (int32_t)number(n, optarg, 1, 65536); break;
        case SVG: o->svg = optarg; break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fputs("moed-place: see --help\n", stderr); exit(2);
        }
    }
    if (optind < argc) {
        fprintf(stderr, "moed-place: unexpected argument %s\n", argv[optind]);
        exit(2);
    }
}

static enum status one_row(const struct options *o, const struct place_trace *trace, int32_t n,
                           struct error *e, struct place_point *point) {
    int32_t slots = (o->shape->n_experts + n - 1) / n + o->extra;
    if (slots > o->fit) slots = o->fit;
    struct place_prediction plain, planned, replicas;
    enum status st =
        place_predict_experts(o->shape, &o->costs, trace, n, slots, false, o->context, e, &plain);
    if (st == ST_OK)
        st = place_predict_experts(o->shape, &o->costs, trace, n, slots, true, o->context, e,
                                   &planned);
    if (st != ST_OK) return st;
    place_predict_replicas(o->shape, &o->costs, trace, n, o->context, &replicas);
    printf(o->csv ? "%d,%d,%.4f,%.3f,%.4f,%.3f,%.3f,%.4f,%.0f,%.4f,%.0f\n"
                  : "%7d %5d %9.3f %11.2f %7.3f %9.2f %7.2f | %8.3f %9.0f | %8.3f %9.0f\n",
           n, slots, planned.expert_gb, planned.exchange_mb, planned.pcie_gb, plain.imbalance,
           planned.imbalance, planned.step_ms, planned.tokens_per_s, replicas.step_ms,
           replicas.tokens_per_s);
    *point = (struct place_point){n, planned.tokens_per_s, replicas.tokens_per_s};
    return ST_OK;
}

static enum status make_trace(const struct options *o, struct error *e, struct place_trace *out) {
    if (o->trace) return place_trace_read(o->trace, o->shape, e, out);
    if (o->load) return place_trace_load(o->shape, o->steps, o->batch, o->load, e, out);
    return place_trace_zipf(o->shape, o->steps, o->batch, o->zipf, 1, out);
}

int main(int argc, char **argv) {
    enum { MAX_POINTS = 64 };
    struct options o;
    parse(argc, argv, &o);
    struct error e = {0};
    struct place_trace trace;
    struct place_point points[MAX_POINTS];
    int n_points = 0;
    enum status st = make_trace(&o, &e, &trace);
    if (st != ST_OK) {
        fprintf(stderr, "moed-place: %s: %s\n", status_name(st), e.text);
        return 1;
    }
    puts(o.csv ? CSV_HEADER : TABLE_HEADER);
    char *list = strdup(o.devices);
    for (char *w = strtok(list, ","); w && st == ST_OK && n_points < MAX_POINTS;
         w = strtok(NULL, ","))
        st = one_row(&o, &trace, (int32_t)number("devices", w, 1, 4096), &e, &points[n_points++]);
    if (st == ST_OK && o.svg) {
        char title[128];
        snprintf(title, sizeof title, "%s, %d sequences, context %.0f", o.shape->name, trace.batch,
                 o.context);
        st = place_plot(o.svg, title, points, n_points, &e);
    }
    if (st != ST_OK) fprintf(stderr, "moed-place: %s: %s\n", status_name(st), e.text);
    free(list);
    place_trace_free(&trace);
    return st == ST_OK ? 0 : 1;
}
