/* moed-place: what would n devices give? Replays a routing trace, recorded or synthetic, through the placement
 * planner and prints bytes, exchange, imbalance and predicted tokens per second for each number of devices. */
#include "bench/place_model.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "moed-place: predict expert placement over many devices\n"
    "\n"
    "  moed-place [--shape NAME] [--batch N] [--context N] [--zipf S | --trace FILE] [--devices LIST]\n"
    "\n"
    "Plans from the first half of a routing trace, replays the second half, and prints for each number of\n"
    "devices: expert bytes the busiest device reads per step, exchange volume, max/mean device load without\n"
    "and with the planner, step time and tokens/s of expert parallelism and of whole replicas. CSV with --csv.\n"
    "\n"
    "  --shape NAME       model shape (default qwen3-30b-a3b)\n"
    "  --batch N          sequences decoding together, over all devices (default 256)\n"
    "  --context N        mean context in tokens (default 576)\n"
    "  --steps N          steps of a synthetic trace (default 32)\n"
    "  --zipf S           synthetic trace: expert popularity ~ 1/rank^S (default 1.0; 0 = uniform)\n"
    "  --trace FILE       recorded trace: CSV step,layer,expert,tokens\n"
    "  --devices LIST     comma-separated (default 2,4,8,16,32,64,128,256)\n"
    "  --extra N          places per device and layer beyond E/n, for replicas (default 2)\n"
    "  --host N           devices per host (default 8)\n"
    "  --csv              comma-separated output\n"
    "\n"
    "The cost model's constants (bench/place_model.h says how they are used):\n"
    "  --memory-gbs X  4280   --tflops X   500   --layer-us X  20\n"
    "  --link-gbs X     396   --link-us X    5   --net-gbs X   50   --net-us X  12\n";

struct options {
    const struct place_shape *shape;
    struct place_costs costs;
    int32_t batch, steps, extra;
    double context, zipf;
    const char *trace, *devices;
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
    enum { SHAPE = 1, BATCH, CONTEXT, STEPS, ZIPF, TRACE, DEVICES, EXTRA, HOST, CSV, MEMORY, TFLOPS,
           LAYER, LINK, LINK_US, NET, NET_US, HELP };
    static const struct option longs[] = {
        {"shape", 1, 0, SHAPE},     {"batch", 1, 0, BATCH},     {"context", 1, 0, CONTEXT},
        {"steps", 1, 0, STEPS},     {"zipf", 1, 0, ZIPF},       {"trace", 1, 0, TRACE},
        {"devices", 1, 0, DEVICES}, {"extra", 1, 0, EXTRA},     {"host", 1, 0, HOST},
        {"csv", 0, 0, CSV},         {"memory-gbs", 1, 0, MEMORY}, {"tflops", 1, 0, TFLOPS},
        {"layer-us", 1, 0, LAYER},  {"link-gbs", 1, 0, LINK},   {"link-us", 1, 0, LINK_US},
        {"net-gbs", 1, 0, NET},     {"net-us", 1, 0, NET_US},   {"help", 0, 0, HELP}, {0}};
    *o = (struct options){.shape = place_shape_find("qwen3-30b-a3b"),
                          .costs = {4280, 500, 396, 5, 50, 12, 20, 8},
                          .batch = 256, .steps = 32, .extra = 2, .context = 576, .zipf = 1,
                          .devices = "2,4,8,16,32,64,128,256"};
    int c, at;
    while ((c = getopt_long(argc, argv, "", longs, &at)) != -1) {
        const char *n = c == '?' ? "" : longs[at].name;
        switch (c) {
        case SHAPE:
            o->shape = place_shape_find(optarg);
            if (!o->shape) {
                fprintf(stderr, "moed-place: no shape %s; there are %s\n", optarg, place_shape_names());
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
                           struct error *e) {
    int32_t slots = (o->shape->n_experts + n - 1) / n + o->extra;
    struct place_prediction plain, planned, replicas;
    enum status st = place_predict_experts(o->shape, &o->costs, trace, n, slots, false, o->context, e, &plain);
    if (st == ST_OK)
        st = place_predict_experts(o->shape, &o->costs, trace, n, slots, true, o->context, e, &planned);
    if (st != ST_OK) return st;
    place_predict_replicas(o->shape, &o->costs, trace, n, o->context, &replicas);
    printf(o->csv ? "%d,%d,%.4f,%.3f,%.3f,%.3f,%.4f,%.0f,%.4f,%.0f\n"
                  : "%7d %5d %9.3f %11.2f %9.2f %7.2f | %8.3f %9.0f | %8.3f %9.0f\n",
           n, slots, planned.expert_gb, planned.exchange_mb, plain.imbalance, planned.imbalance,
           planned.step_ms, planned.tokens_per_s, replicas.step_ms, replicas.tokens_per_s);
    return ST_OK;
}

int main(int argc, char **argv) {
    struct options o;
    parse(argc, argv, &o);
    struct error e = {0};
    struct place_trace trace;
    enum status st = o.trace ? place_trace_read(o.trace, o.shape, &e, &trace)
                             : place_trace_zipf(o.shape, o.steps, o.batch, o.zipf, 1, &trace);
    if (st != ST_OK) {
        fprintf(stderr, "moed-place: %s: %s\n", status_name(st), e.text);
        return 1;
    }
    puts(o.csv ? "devices,slots,expert_gb,exchange_mb,imbalance_in_order,imbalance_planned,ep_ms,ep_tok_s,replica_ms,replica_tok_s"
               : "devices slots expert GB exchange MB   in order planned |    EP ms     tok/s |  copies ms    tok/s");
    char *list = strdup(o.devices);
    for (char *w = strtok(list, ","); w && st == ST_OK; w = strtok(NULL, ","))
        st = one_row(&o, &trace, (int32_t)number("devices", w, 1, 4096), &e);
    if (st != ST_OK) fprintf(stderr, "moed-place: %s: %s\n", status_name(st), e.text);
    free(list);
    place_trace_free(&trace);
    return st == ST_OK ? 0 : 1;
}
