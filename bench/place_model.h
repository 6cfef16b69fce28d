/* place_model: the small, stated cost model behind moed-place. All figures are inputs; none is fitted here.
 *
 * One decode step of B sequences on n devices, per layer:
 *   attention  each device serves B/n sequences: (attention weights + B/n * context * KV bytes) / memory bandwidth
 *   experts    the slowest device: max over devices of max(bytes of the experts it must read / memory bandwidth,
 *              its tokens * flops per token and expert / arithmetic rate); an expert with r replicas splits its
 *              tokens over them as evenly as whole tokens go
 *   exchange   two meetings: every device gets the inputs of all B rows, then the products of its own B/n rows, K of
 *              each, which are summed at home so that the bits are those of one device: latency + bytes / link rate
 *              each, where a device receives B * D * 2 * (1 + K/n) * (n-1)/n bytes; devices of several hosts use
 *              the network's latency and rate
 *   overhead   a fixed time per layer for launches and small kernels
 *   host       experts that fit no device stay in host memory, coldest first by the trace's first half; those that a
 *              step routes to cross PCIe, each to one device, all devices' links at once, before they can be used
 * and once per step the LM head, split over the devices' sequences. Replicas: no exchange, B/n sequences per
 * device, every device reads what its own tokens route to. */
#ifndef MOED_BENCH_PLACE_MODEL_H
#define MOED_BENCH_PLACE_MODEL_H

#include "moe/placement.h"

struct place_shape {
    const char *name;
    int32_t n_layers, n_experts, n_used, n_embd;
    double expert_bytes; /* gate, up and down of one expert, mean over layers */
    double attention_bytes; /* per layer: q, k, v, o and the router */
    double head_bytes;
    double kv_bytes_per_token; /* per layer */
    double expert_flops; /* per token and expert */
};
const struct place_shape *place_shape_find(const char *name); /* NULL: unknown */
const char *place_shape_names(void);

struct place_costs {
    double memory_gbs; /* device memory, GB/s */
    double tflops; /* arithmetic rate of the expert kernels */
    double link_gbs, link_us; /* between devices of a host */
    double net_gbs, net_us; /* between hosts, per device */
    double pcie_gbs; /* host memory to device, each device */
    double layer_us; /* fixed, per layer */
    int32_t devices_per_host;
};

/* A routing trace: tokens per (step, layer, expert). */
struct place_trace {
    int32_t n_steps, n_layers, n_experts;
    int32_t batch; /* tokens per step */
    int32_t *tokens; /* [n_steps][n_layers][n_experts], owned */
};
/* n_steps steps of `batch` tokens, each routed to n_used distinct experts drawn from Zipf(s) popularity, a
 * different permutation of the experts in each layer. */
enum status place_trace_zipf(const struct place_shape *shape, int32_t n_steps, int32_t batch,
                             double s, uint64_t seed, struct place_trace *out);
/* CSV lines `step,layer,expert,tokens` with that header; steps and layers from 0. */
enum status place_trace_read(const char *path, const struct place_shape *shape, struct error *e,
                             struct place_trace *out);
/* As zipf, but experts drawn by the load that a daemon measured (its --expert-load file: CSV lines
 * layer,expert,devices,tokens). */
enum status place_trace_load(const struct place_shape *shape, int32_t n_steps, int32_t batch,
                             const char *path, struct error *e, struct place_trace *out);
void place_trace_free(struct place_trace *t);

struct place_prediction {
    double step_ms, tokens_per_s;
    double expert_gb; /* read per step by the busiest device */
    double exchange_mb; /* received per step and device */
    double pcie_gb; /* per step, of all devices: experts that are kept in host memory */
    double imbalance; /* max / mean device tokens, averaged over layers and steps */
};

/* Experts spread over n devices by a plan made from the trace's first half, evaluated on its second half. slots is
 * per device and layer; experts beyond slots * n_devices are kept in host memory. planned = false: experts in order, no replicas (what one would do without a planner). */
enum status place_predict_experts(const struct place_shape *shape, const struct place_costs *costs,
                                  const struct place_trace *trace, int32_t n_devices, int32_t slots,
                                  bool planned, double context, struct error *e,
                                  struct place_prediction *out);
/* n whole copies, each serving batch/n of the sequences: expected distinct experts from the trace's shares. */
void place_predict_replicas(const struct place_shape *shape, const struct place_costs *costs,
                            const struct place_trace *trace, int32_t n_devices, double context,
                            struct place_prediction *out);

#endif
