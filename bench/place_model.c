/* See place_model.h. */
#include "bench/place_model.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes from the tensor shapes: Q4_K is 4.5 bits a weight, Q6_K 6.5625; Q4_K_M puts Q6_K on ffn_down and attn_v of
 * half the layers and on the head; the router is f32; KV is f16. */
#define Q4 (4.5 / 8)
#define Q6 (6.5625 / 8)
#define QKM ((Q4 + Q6) / 2)
#define SHAPE(NAME, L, E, K, D, F, QD, KD, V)                                                      \
    {                                                                                              \
        .name = NAME, .n_layers = L, .n_experts = E, .n_used = K, .n_embd = D,                     \
        .expert_bytes = (double)D * F * (2 * Q4 + QKM),                                            \
        .attention_bytes = (double)D * (2.0 * QD * Q4 + KD * Q4 + KD * QKM) + 4.0 * D * E,         \
        .head_bytes = (double)D * V * Q6, .kv_bytes_per_token = 2.0 * 2.0 * KD,                    \
        .expert_flops = 6.0 * D * F                                                                \
    }
static const struct place_shape shapes[] = {
    SHAPE("qwen3-30b-a3b", 48, 128, 8, 2048, 768, 4096, 512, 151936),
    SHAPE("qwen3-235b-a22b", 94, 128, 8, 4096, 1536, 8192, 512, 151936),
};

const struct place_shape *place_shape_find(const char *name) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (strcmp(shapes[i].name, name) == 0) return &shapes[i];
    return NULL;
}

const char *place_shape_names(void) { return "qwen3-30b-a3b, qwen3-235b-a22b"; }

enum { MAX_EXPERTS = 1024 };

/* ---- traces ------------------------------------------------------------------------------ */

static enum status trace_create(const struct place_shape *s, int32_t n_steps,
                                struct place_trace *t) {
    *t = (struct place_trace){
        .n_steps = n_steps, .n_layers = s->n_layers, .n_experts = s->n_experts};
    t->tokens =
        calloc((size_t)n_steps * (size_t)s->n_layers * (size_t)s->n_experts, sizeof(int32_t));
    return t->tokens ? ST_OK : ST_NO_MEMORY;
}

void place_trace_free(struct place_trace *t) {
    free(t->tokens);
    t->tokens = NULL;
}

static int32_t *trace_row(const struct place_trace *t, int32_t step, int32_t layer) {
    return t->tokens + ((size_t)step * (size_t)t->n_layers + (size_t)layer) * (size_t)t->n_experts;
}

static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static double next_uniform(uint64_t *state) {
    return ((double)(next_random(state) >> 11) + 0.5) * 0x1p-53;
}

/* Fill one layer of all steps: n_used distinct experts a token, drawn by weight. */
static void draw_layer(struct place_trace *t, const struct place_shape *shape, int32_t layer,
                       const double *weight, uint64_t *seed) {
    int32_t n = shape->n_experts;
    double cumulative[MAX_EXPERTS], total = 0;
    bool taken[MAX_EXPERTS];
    for (int32_t i = 0; i < n; i++) cumulative[i] = total += weight[i];
    for (int32_t step = 0; step < t->n_steps; step++) {
        int32_t *row = trace_row(t, step, layer);
        for (int32_t token = 0; token < t->batch; token++) {
            memset(taken, 0, sizeof taken);
            for (int32_t k = 0; k < shape->n_used;) { /* draw again what is taken: distinct */
                double u = next_uniform(seed) * total;
                int32_t lo = 0, hi = n - 1;
                while (lo < hi) {
                    int32_t mid = (lo + hi) / 2;
                    if (cumulative[mid] < u)
                        lo = mid + 1;
                    else
                        hi = mid;
                }
                if (taken[lo]) continue;
                taken[lo] = true;
                row[lo]++;
                k++;
            }
        }
    }
}

enum status place_trace_zipf(const struct place_shape *shape, int32_t n_steps, int32_t batch,
                             double s, uint64_t seed, struct place_trace *out) {
    enum status st = trace_create(shape, n_steps, out);
    if (st != ST_OK) return st;
    out->batch = batch;
    int32_t n = shape->n_experts, order[MAX_EXPERTS];
    double weight[MAX_EXPERTS];
    CHECK(n <= MAX_EXPERTS);
    for (int32_t layer = 0; layer < shape->n_layers; layer++) {
        for (int32_t i = 0; i < n; i++) order[i] = i;
        for (int32_t i = n - 1; i > 0; i--) {
            int32_t j = (int32_t)(next_random(&seed) % (uint64_t)(i + 1)), t = order[i];
            order[i] = order[j];
            order[j] = t;
        }
        for (int32_t i = 0; i < n; i++) weight[order[i]] = pow(i + 1, -s);
        draw_layer(out, shape, layer, weight, &seed);
    }
    return ST_OK;
}

static enum status load_lines(FILE *f, const struct place_shape *s, struct error *e, double *load) {
    char line[256];
    for (int number = 1; fgets(line, sizeof line, f); number++) {
        int layer, expert;
        double tokens;
        if (number == 1 && strncmp(line, "layer,expert,devices,tokens", 27) == 0) continue;
        if (sscanf(line, "%d,%d,%*[0-9+],%lf", &layer, &expert, &tokens) != 3 || tokens < 0)
            return error_set(e, ST_INVALID, "line %d is not layer,expert,devices,tokens", number);
        if (layer < 0 || layer >= s->n_layers || expert < 0 || expert >= s->n_experts)
            return error_set(e, ST_INVALID, "line %d is out of range for %s", number, s->name);
        load[layer * s->n_experts + expert] = tokens;
    }
    return ST_OK;
}

enum status place_trace_load(const struct place_shape *shape, int32_t n_steps, int32_t batch,
                             const char *path, struct error *e, struct place_trace *out) {
    FILE *f = fopen(path, "r");
    if (!f) return error_set(e, ST_NOT_FOUND, "%s: %s", path, strerror(errno));
    double *load = calloc((size_t)shape->n_layers * (size_t)shape->n_experts, sizeof *load);
    enum status st = load ? load_lines(f, shape, e, load) : ST_NO_MEMORY;
    fclose(f);
    uint64_t seed = 1;
    *out = (struct place_trace){0};
    if (st == ST_OK) st = trace_create(shape, n_steps, out);
    out->batch = batch;
    for (int32_t l = 0; l < shape->n_layers && st == ST_OK; l++) {
        double *weight = load + l * shape->n_experts;
        int32_t n_used = 0;
        for (int32_t i = 0; i < shape->n_experts; i++) n_used += weight[i] > 0;
        if (n_used < shape->n_used)
            st = error_set(e, ST_INVALID, "%s: layer %d has fewer than %d experts with tokens",
                           path, l, shape->n_used);
        else
            draw_layer(out, shape, l, weight, &seed);
    }
    free(load);
    if (st != ST_OK) place_trace_free(out);
    return st;
}

static enum status trace_lines(FILE *f, const struct place_shape *s, struct error *e,
                               int32_t *n_steps, struct place_trace *t) {
    char line[128];
    int number = 0;
    while (fgets(line, sizeof line, f)) {
        int step, layer, expert, tokens;
        char rest;
        if (++number == 1 && strncmp(line, "step,layer,expert,tokens", 24) == 0) continue;
        if (sscanf(line, "%d,%d,%d,%d %c", &step, &layer, &expert, &tokens, &rest) != 4)
            return error_set(e, ST_INVALID, "line %d is not step,layer,expert,tokens", number);
        if (step < 0 || step > 1000000 || layer < 0 || layer >= s->n_layers || expert < 0 ||
            expert >= s->n_experts || tokens < 0)
            return error_set(e, ST_INVALID, "line %d is out of range for %s", number, s->name);
        if (step >= *n_steps) *n_steps = step + 1;
        if (t->tokens) trace_row(t, step, layer)[expert] += tokens;
    }
    return ST_OK;
}

enum status place_trace_read(const char *path, const struct place_shape *shape, struct error *e,
                             struct place_trace *out) {
    FILE *f = fopen(path, "r");
    if (!f) return error_set(e, ST_NOT_FOUND, "%s: %s", path, strerror(errno));
    int32_t n_steps = 0;
    *out = (struct place_trace){0};
    enum status st = trace_lines(f, shape, e, &n_steps, out);
    if (st == ST_OK && n_steps < 2)
        st = error_set(e, ST_INVALID, "%s has fewer than 2 steps", path);
    if (st == ST_OK) st = trace_create(shape, n_steps, out);
    if (st == ST_OK) {
        rewind(f);
        st = trace_lines(f, shape, e, &n_steps, out);
        int64_t sum = 0;
        for (int32_t i = 0; i < shape->n_experts; i++) sum += trace_row(out, 0, 0)[i];
        out->batch = (int32_t)(sum / shape->n_used);
        if (out->batch < 1) st = error_set(e, ST_INVALID, "%s: step 0 layer 0 has no token", path);
        if (st != ST_OK) place_trace_free(out);
    }
    fclose(f);
    return st;
}

/* ---- predictions ------------------------------------------------------------------------- */

static double attention_ms(const struct place_shape *s, const struct place_costs *c, double seqs,
                           double context) {
    double bytes = s->attention_bytes + seqs * context * s->kv_bytes_per_token;
    return bytes / (c->memory_gbs * 1e6);
}

/* Tokens and experts read of each device in one (step, layer). */
static void split_tokens(const struct placement_problem *p, const struct placement *plan,
                         int32_t layer, const int32_t *tokens, int32_t *given,
                         double *device_tokens, double *device_reads) {
    const int32_t *at = plan->expert_of + (size_t)layer * (size_t)p->n_devices * (size_t)p->slots;
    const int32_t *count = plan->n_replicas + (size_t)layer * (size_t)p->n_experts;
    memset(given, 0, (size_t)p->n_experts * sizeof *given);
    for (int32_t d = 0; d < p->n_devices; d++) {
        device_tokens[d] = device_reads[d] = 0;
        for (int32_t k = 0; k < p->slots; k++) {
            int32_t x = at[d * p->slots + k], r = given[x]++;
            int32_t share = tokens[x] / count[x] + (r < tokens[x] % count[x]);
            device_tokens[d] += share;
            device_reads[d] += share > 0;
        }
    }
}

static void plan_in_order(const struct placement_problem *p, struct placement *plan) {
    size_t places = (size_t)p->n_devices * (size_t)p->slots;
    for (int32_t l = 0; l < p->n_layers; l++) {
        for (size_t k = 0; k < places; k++)
            plan->expert_of[(size_t)l * places + k] = (int32_t)(k % (size_t)p->n_experts);
        for (int32_t i = 0; i < p->n_experts; i++)
            plan->n_replicas[(size_t)l * (size_t)p->n_experts + (size_t)i] =
                (int32_t)((places - (size_t)i - 1) / (size_t)p->n_experts) + 1;
    }
}

struct sums {
    double ms, expert_bytes, imbalance;
};

static void replay(const struct place_shape *s, const struct place_costs *c,
                   const struct place_trace *t, const struct placement_problem *p,
                   const struct placement *plan, struct sums *sum, double *mem) {
    double *device_tokens = mem, *device_reads = mem + p->n_devices;
    int32_t given[MAX_EXPERTS];
    *sum = (struct sums){0};
    int32_t from = t->n_steps / 2;
    for (int32_t step = from; step < t->n_steps; step++) {
        for (int32_t l = 0; l < t->n_layers; l++) {
            split_tokens(p, plan, l, trace_row(t, step, l), given, device_tokens, device_reads);
            double slowest = 0, max_tokens = 0, total = 0, max_bytes = 0;
            for (int32_t d = 0; d < p->n_devices; d++) {
                double bytes = device_reads[d] * s->expert_bytes;
                double ms = fmax(bytes / (c->memory_gbs * 1e6),
                                 device_tokens[d] * s->expert_flops / (c->tflops * 1e9));
                slowest = fmax(slowest, ms);
                max_bytes = fmax(max_bytes, bytes);
                max_tokens = fmax(max_tokens, device_tokens[d]);
                total += device_tokens[d];
            }
            sum->ms += slowest;
            sum->expert_bytes += max_bytes;
            sum->imbalance += total > 0 ? max_tokens * p->n_devices / total : 1;
        }
    }
    double steps = t->n_steps - from;
    sum->ms /= steps;
    sum->expert_bytes /= steps;
    sum->imbalance /= steps * t->n_layers;
}

/* ---- host memory ------------------------------------------------------------------------- */

/* Keep each layer's n_kept hottest experts of the first half: *kept is the trace of these alone, renumbered by
 * falling load; returns the others that a step of the second half routes to, over all layers. */
static enum status keep_hottest(const struct place_shape *s, const struct place_trace *t,
                                int32_t n_kept, struct place_trace *kept, double *n_fetched) {
    struct place_shape fewer = *s;
    fewer.n_experts = n_kept;
    enum status st = trace_create(&fewer, t->n_steps, kept);
    if (st != ST_OK) return st;
    kept->batch = t->batch;
    *n_fetched = 0;
    int32_t half = t->n_steps / 2;
    for (int32_t l = 0; l < t->n_layers; l++) {
        double load[MAX_EXPERTS] = {0};
        for (int32_t step = 0; step < half; step++)
            for (int32_t i = 0; i < t->n_experts; i++) load[i] += trace_row(t, step, l)[i];
        for (int32_t i = 0; i < t->n_experts; i++) {
            int32_t place = 0; /* how many are hotter */
            for (int32_t j = 0; j < t->n_experts; j++)
                place += load[j] > load[i] || (load[j] == load[i] && j < i);
            for (int32_t step = 0; step < t->n_steps; step++) {
                int32_t tokens = trace_row(t, step, l)[i];
                if (place < n_kept)
                    trace_row(kept, step, l)[place] = tokens;
                else
                    *n_fetched += step >= half && tokens > 0;
            }
        }
    }
    *n_fetched /= t->n_steps - half;
    return ST_OK;
}

/* slots * n_devices >= E. */
static enum status predict_resident(const struct place_shape *shape,
                                    const struct place_costs *costs,
                                    const struct place_trace *trace, int32_t n_devices,
                                    int32_t slots, bool planned, double context, struct error *e,
                                    struct place_prediction *out) {
    *out = (struct place_prediction){0};
    int32_t hosts = (n_devices + costs->devices_per_host - 1) / costs->devices_per_host;
    size_t cells = (size_t)shape->n_layers * (size_t)shape->n_experts;
    size_t places = (size_t)shape->n_layers * (size_t)n_devices * (size_t)slots;
    double *load = calloc(cells, sizeof *load);
    double *mem = calloc(2 * (size_t)n_devices, sizeof *mem);
    struct placement plan = {calloc(places, sizeof(int32_t)), calloc(cells, sizeof(int32_t))};
    enum status st = ST_NO_MEMORY;
    if (load && mem && plan.expert_of && plan.n_replicas) {
        for (int32_t step = 0; step < trace->n_steps / 2; step++)
            for (size_t i = 0; i < cells; i++) load[i] += trace_row(trace, step, 0)[i];
        /* One host group: an expert may live anywhere, and the network's price is in the exchange. */
        struct placement_problem p = {.n_layers = shape->n_layers,
                                      .n_experts = shape->n_experts,
                                      .n_groups = 1,
                                      .n_hosts = 1,
                                      .n_devices = n_devices,
                                      .slots = slots,
                                      .load = load};
        st = placement_plan(&p, e, &plan);
        if (st == ST_OK) {
            if (!planned) plan_in_order(&p, &plan);
            struct sums sum;
            replay(shape, costs, trace, &p, &plan, &sum, mem);
            bool net = hosts > 1;
            /* Rows of two bytes a value, of which 1 / n_devices are at home. */
            double row = shape->n_embd * 2.0 * (n_devices - 1) / n_devices;
            double bytes = row * trace->batch * (1 + (double)shape->n_used / n_devices);
            double exchange_ms = 2 * (net ? costs->net_us : costs->link_us) * 1e-3 +
                                 bytes / ((net ? costs->net_gbs : costs->link_gbs) * 1e6);
            if (n_devices == 1) exchange_ms = 0;
            double seqs = (double)trace->batch / n_devices;
            out->step_ms = sum.ms + shape->head_bytes / (costs->memory_gbs * 1e6) +
                           shape->n_layers * (attention_ms(shape, costs, seqs, context) +
                                              exchange_ms + costs->layer_us * 1e-3);
            out->tokens_per_s = trace->batch / out->step_ms * 1e3;
            out->expert_gb = sum.expert_bytes / 1e9;
            out->exchange_mb = n_devices == 1 ? 0 : shape->n_layers * bytes / 1e6;
            out->imbalance = sum.imbalance;
        }
    } else {
        error_set(e, ST_NO_MEMORY, "no memory for %d devices", n_devices);
    }
    free(load);
    free(mem);
    free(plan.expert_of);
    free(plan.n_replicas);
    return st;
}

enum status place_predict_experts(const struct place_shape *shape, const struct place_costs *costs,
                                  const struct place_trace *trace, int32_t n_devices, int32_t slots,
                                  bool planned, double context, struct error *e,
                                  struct place_prediction *out) {
    int64_t room = (int64_t)slots * n_devices;
    if (room >= shape->n_experts)
        return predict_resident(shape, costs, trace, n_devices, slots, planned, context, e, out);
    struct place_shape fewer = *shape;
    fewer.n_experts = (int32_t)room;
    struct place_trace kept;
    double n_fetched;
    enum status st = keep_hottest(shape, trace, (int32_t)room, &kept, &n_fetched);
    if (st != ST_OK) return error_set(e, st, "no memory for a trace");
    st = predict_resident(&fewer, costs, &kept, n_devices, slots, planned, context, e, out);
    place_trace_free(&kept);
    out->pcie_gb = n_fetched * shape->expert_bytes / 1e9;
    out->step_ms += out->pcie_gb * 1e3 / (costs->pcie_gbs * n_devices);
    out->tokens_per_s = trace->batch / out->step_ms * 1e3;
    return st;
}

void place_predict_replicas(const struct place_shape *shape, const struct place_costs *costs,
                            const struct place_trace *trace, int32_t n_devices, double context,
                            struct place_prediction *out) {
    double seqs = (double)trace->batch / n_devices, ms = 0, bytes_sum = 0;
    for (int32_t l = 0; l < shape->n_layers; l++) {
        double reads = 0;
        for (int32_t x = 0; x < shape->n_experts; x++) {
            double share = 0; /* chance that one token goes to expert x */
            for (int32_t step = 0; step < trace->n_steps; step++)
                share += trace_row(trace, step, l)[x];
            share /= (double)trace->n_steps * trace->batch;
            reads += 1 - pow(1 - fmin(share, 1), seqs);
        }
        double bytes = reads * shape->expert_bytes;
        bytes_sum += bytes;
        ms += fmax(bytes / (costs->memory_gbs * 1e6),
                   seqs * shape->n_used * shape->expert_flops / (costs->tflops * 1e9));
    }
    *out = (struct place_prediction){.expert_gb = bytes_sum / 1e9, .imbalance = 1};
    out->step_ms =
        ms + shape->head_bytes / (costs->memory_gbs * 1e6) +
        shape->n_layers * (attention_ms(shape, costs, seqs, context) + costs->layer_us * 1e-3);
    out->tokens_per_s = trace->batch / out->step_ms * 1e3;
}
