/* step: slot starts, and steps from begin to collect; graphs. See device.h. */
#include "cuda/exchange.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/panel.h"

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

/* ---- life ------------------------------------------------------------------------------------------ */

static enum status pinned(struct cuda *c, const char *what, size_t n, struct error *e, void **out) {
    cudaError_t err = cudaHostAlloc(out, n, cudaHostAllocDefault);
    if (err == cudaSuccess) {
        memset(*out, 0, n);
        return ST_OK;
    }
    *out = NULL;
    (void)cudaGetLastError();
    return error_set(e, ST_NO_MEMORY, "GPU %d: no page-locked memory for %s (%zu bytes)", c->device, what,
                     n);
}

/* cos and sin of every position and pair, from f64. */
static enum status create_rope_table(struct cuda *c, struct error *e) {
    enum { PAIRS = HEAD_DIM / 2 };
    size_t n = (size_t)c->limits.max_seq_tokens * PAIRS * 2 * sizeof(float);
    void *p;
    TRY(device_alloc(c, MEMORY_STEP, "the RoPE table", n, e, &p));
    c->rope_table = p;
    double freq[PAIRS];
    for (int i = 0; i < PAIRS; i++)
        freq[i] = pow((double)c->shape.rope_base, -2.0 * i / (double)HEAD_DIM);
    int32_t most = STAGING_BYTES / (int32_t)(PAIRS * 2 * sizeof(float));
    for (int32_t first = 0; first < c->limits.max_seq_tokens; first += most) {
        int32_t left = c->limits.max_seq_tokens - first, count = left < most ? left : most;
        float *at = (float *)(void *)c->staging[0];
        for (int32_t pos = first; pos < first + count; pos++)
            for (int i = 0; i < PAIRS; i++) {
                *at++ = (float)cos((double)pos * freq[i]);
                *at++ = (float)sin((double)pos * freq[i]);
            }
        size_t row = PAIRS * 2 * sizeof(float);
        TRY(device_check(c, cudaMemcpyAsync((uint8_t *)c->rope_table + (size_t)first * row,
                                            c->staging[0], (size_t)count * row, cudaMemcpyHostToDevice,
                                            c->queue.stream)));
        TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
    }
    return ST_OK;
}

struct demand {
    enum memory_kind kind;
    const char *what;
    size_t n;
    void **out;
};

static enum status create_scratch(struct cuda *c, struct error *e) {
    const struct model_shape *m = &c->shape;
    size_t t = (size_t)c->limits.max_batch_tokens, rows = (size_t)c->limits.max_rows;
    size_t n_pairs = t * (size_t)m->n_experts_used, experts = (size_t)m->n_experts;
    size_t slots = (size_t)c->limits.max_seqs, widest = t > rows ? t : rows;
    size_t splits = t * ((size_t)c->limits.max_seq_tokens / SPLIT_KEYS + 1);
    size_t octets = (size_t)attn_octets(m->n_heads, m->n_kv_heads);
    c->n_partials = splits < MAX_PARTIALS ? (int32_t)splits : MAX_PARTIALS;
    c->upload_cap = upload_capacity(c);
    const struct demand demands[] = {
        {MEMORY_ACTIVATIONS, "normalised inputs", widest * (size_t)m->n_embd * 2, &c->x},
        {MEMORY_ACTIVATIONS, "partial attention results",
         (size_t)c->n_partials * attn_partial_floats(m->n_heads, m->n_kv_heads) * sizeof(float),
         (void **)&c->attn_partials},
        {MEMORY_ACTIVATIONS, "attention tickets", t * (size_t)m->n_kv_heads * octets * sizeof(uint32_t),
         (void **)&c->attn_tickets},
        {MEMORY_ACTIVATIONS, "router sums", route_partial_floats(t, m->n_experts) * sizeof(float),
         (void **)&c->router_partials},
        {MEMORY_STEP, "routing", n_pairs * sizeof(int32_t), (void **)&c->lists.ids},
        {MEMORY_STEP, "routing", n_pairs * sizeof(float), (void **)&c->lists.weights},
        {MEMORY_STEP, "routing", (experts + 1) * sizeof(int32_t), (void **)&c->lists.expert_first},
        {MEMORY_STEP, "routing", n_pairs * sizeof(int32_t), (void **)&c->lists.token_of},
        {MEMORY_STEP, "routing", n_pairs * sizeof(int32_t), (void **)&c->lists.row_of},
        {MEMORY_STEP, "routing", N_WIDTHS * sizeof(int32_t), (void **)&c->lists.n_items},
        {MEMORY_STEP, "routing", (2 + t / ROUTE_CHUNK) * sizeof(uint32_t), (void **)&c->route_tickets},
        {MEMORY_STEP, "routing", (1 + t / ROUTE_CHUNK) * (size_t)route_pitch(m->n_experts), (void **)&c->route_marks},
        {MEMORY_STEP, "counters", N_READS * sizeof(uint64_t), (void **)&c->n_reads},
        {MEMORY_STEP, "uploads", c->upload_cap, (void **)&c->upload},
        {MEMORY_SAMPLER, "sampling slots", slots * sizeof(struct slot_state), (void **)&c->slots},
        {MEMORY_SAMPLER, "token counts", slots * (size_t)m->n_vocab * sizeof(uint32_t),
         (void **)&c->counts},
        {MEMORY_SAMPLER, "parts of rows", rows * SAMPLE_PARTS * sizeof(struct sample_part), (void **)&c->sample_parts},
        {MEMORY_SAMPLER, "sampling tickets", rows * sizeof(uint32_t), (void **)&c->sample_tickets},
        {MEMORY_SAMPLER, "slot starts", ((size_t)c->limits.max_seq_tokens + 1) * sizeof(int32_t),
         (void **)&c->start_ids},
    };
    for (size_t i = 0; i < sizeof demands / sizeof *demands; i++) {
        const struct demand *d = &demands[i];
        TRY(device_alloc(c, d->kind, d->what, d->n, e, d->out));
    }
    for (int i = 0; i < N_WIDTHS; i++) {
        void *p;
        TRY(device_alloc(c, MEMORY_STEP, "work lists",
                         (experts + n_pairs / (8u << i)) * sizeof(struct gemm_item), e, &p));
        c->lists.items[i] = p;
    }
    return ST_OK;
}

enum status cuda_step_create(struct cuda *c, struct error *e) {
    if (c->results) return ST_OK;
    TRY(create_scratch(c, e));
    TRY(create_rope_table(c, e));
    size_t result_bytes = 2 * (size_t)c->limits.max_rows * sizeof *c->results;
    TRY(pinned(c, "results", result_bytes, e, (void **)&c->results));
    TRY(pinned(c, "counters", 2 * N_READS * sizeof *c->host_reads, e, (void **)&c->host_reads));
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        struct flight *f = &c->flights[i];
        TRY(pinned(c, "uploads", c->upload_cap, e, (void **)&f->upload));
        TRY(device_check(c, cudaEventCreate(&f->begun)));
        TRY(device_check(c, cudaEventCreate(&f->done)));
    }
    for (int i = 0; i < N_STARTS; i++) {
        struct start *s = &c->starts[i];
        size_t n_ids = (size_t)c->limits.max_seq_tokens + 1;
        TRY(pinned(c, "slot starts", sizeof *s->state, e, (void **)&s->state));
        TRY(pinned(c, "slot starts", n_ids * sizeof *s->ids, e, (void **)&s->ids));
        TRY(device_check(c, cudaEventCreateWithFlags(&s->copied, cudaEventDisableTiming)));
    }
    return ST_OK;
}

void cuda_graphs_destroy(struct cuda *c) {
    for (int i = 0; i < c->n_graphs; i++) (void)cudaGraphExecDestroy(c->graphs[i].exec);
    c->n_graphs = 0;
}

void cuda_step_destroy(struct cuda *c) {
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        struct flight *f = &c->flights[i];
        if (f->upload) (void)cudaFreeHost(f->upload);
        if (f->begun) (void)cudaEventDestroy(f->begun);
        if (f->done) (void)cudaEventDestroy(f->done);
    }
    for (int i = 0; i < N_STARTS; i++) {
        struct start *s = &c->starts[i];
        if (s->state) (void)cudaFreeHost(s->state);
        if (s->ids) (void)cudaFreeHost(s->ids);
        if (s->copied) (void)cudaEventDestroy(s->copied);
    }
    if (c->results) (void)cudaFreeHost(c->results);
    if (c->host_reads) (void)cudaFreeHost(c->host_reads);
}

/* ---- slots ------------------------------------------------------------------------------------------- */

static void check_start(const struct cuda *c, const struct moe_slot_start *start) {
    const struct moe_sampling *p = &start->sampling;
    CHECK(start->slot >= 0 && start->slot < c->limits.max_seqs);
    CHECK(start->n_prompt >= 0 && start->n_prompt <= start->n_ids &&
          start->n_ids <= c->limits.max_seq_tokens);
    for (int32_t i = 0; i < start->n_ids; i++)
        CHECK(start->ids[i] >= 0 && start->ids[i] < c->shape.n_vocab);
    CHECK(isfinite(p->temperature) && p->temperature >= 0.0f && p->top_k >= 0);
    CHECK(p->top_p >= 0.0f && p->top_p <= 1.0f && p->min_p >= 0.0f && p->min_p <= 1.0f);
    CHECK(isfinite(p->repetition_penalty) && p->repetition_penalty > 0.0f);
    CHECK(isfinite(p->presence_penalty) && isfinite(p->frequency_penalty));
    CHECK(p->n_bias >= 0 && p->n_bias <= MOE_MAX_BIASES);
    for (int32_t i = 0; i < p->n_bias; i++)
        CHECK(p->bias[i].token >= 0 && p->bias[i].token < c->shape.n_vocab && isfinite(p->bias[i].bias));
    CHECK(p->n_stop_ids >= 0 && p->n_stop_ids <= MOE_MAX_STOP_IDS);
    for (int32_t i = 0; i < p->n_stop_ids; i++)
        CHECK(p->stop_ids[i] >= 0 && p->stop_ids[i] < c->shape.n_vocab);
    CHECK(p->n_top >= 0 && p->n_top <= MOE_MAX_TOP);
}

enum status step_slot_start(struct backend *b, const struct moe_slot_start *start) {
    struct cuda *c = of(b);
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->ready && c->mode == STEP_NONE);
    check_start(c, start);
    TRY(device_check(c, cudaSetDevice(c->device))); /* the caller's thread may be another than before */
    struct start *s = &c->starts[c->n_starts++ % N_STARTS];
    TRY(device_check(c, cudaEventSynchronize(s->copied)));
    const struct moe_sampling *p = &start->sampling;
    bool counting = p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f ||
                    p->frequency_penalty != 0.0f;
    *s->state = (struct slot_state){.sampling = *p,
                                    .n_ids = start->n_ids,
                                    .n_prompt = start->n_prompt,
                                    .last = -1,
                                    .counting = counting};
    cudaStream_t stream = c->queue.stream;
    TRY(device_check(c, cudaMemcpyAsync(c->slots + start->slot, s->state, sizeof *s->state,
                                        cudaMemcpyHostToDevice, stream)));
    if (counting) {
        size_t n_vocab = (size_t)c->shape.n_vocab;
        uint32_t *counts = c->counts + (size_t)start->slot * n_vocab;
        size_t n_bytes = (size_t)start->n_ids * sizeof *s->ids;
        TRY(device_check(c, cudaMemsetAsync(counts, 0, n_vocab * sizeof *counts, stream)));
        if (n_bytes > 0) memcpy(s->ids, start->ids, n_bytes);
        TRY(device_check(c, cudaMemcpyAsync(c->start_ids, s->ids, n_bytes, cudaMemcpyHostToDevice,
                                            stream)));
        const struct slot_args a = {.counts = counts,
                                    .ids = c->start_ids,
                                    .n_ids = start->n_ids,
                                    .n_prompt = start->n_prompt};
        TRY(device_check(c, cuda_slot_count(&a, &c->queue)));
    }
    return device_check(c, cudaEventRecord(s->copied, stream));
}

/* ---- steps ----------------------------------------------------------------------------------------------- */

static bool same_bucket(const struct bucket *a, const struct bucket *b) {
    return a->n_tokens == b->n_tokens && a->n_seqs == b->n_seqs && a->n_rows == b->n_rows &&
           a->n_group == b->n_group && a->n_most == b->n_most && a->tiles == b->tiles;
}

static struct graph *find_graph(struct cuda *c) {
    for (int i = 0; i < c->n_graphs; i++)
        if (same_bucket(&c->graphs[i].bucket, &c->bucket)) return &c->graphs[i];
    return NULL;
}

enum status step_begin(struct backend *b, const struct moe_step *step, bool *issue) {
    struct cuda *c = of(b);
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->ready && c->mode == STEP_NONE && c->n_begun - c->n_collected < MOE_MAX_IN_FLIGHT);
    TRY(device_check(c, cudaSetDevice(c->device)));
    struct flight *f = &c->flights[c->n_begun % MOE_MAX_IN_FLIGHT];
    c->together = c->exchange && exchange_in_use(c->exchange->x);
    c->bucket = upload_bucket(c, step);
    if (c->together) TRY(exchange_begin_step(c, step->n_tokens, &c->bucket));
    c->view = upload_view(&c->bucket, c->upload);
    c->n_tokens = step->n_tokens;
    f->n_rows = upload_rows(step);
    f->n_tokens = step->n_tokens;
    f->together = c->together;
    size_t n = upload_fill(c, step, f->upload);
    if (c->together) c->n_exchanged += (uint32_t)c->shape.n_layers;
    TRY(device_check(c, cudaEventRecord(f->begun, c->queue.stream)));
    TRY(device_check(c, cudaMemcpyAsync(c->upload, f->upload, n, cudaMemcpyHostToDevice,
                                        c->queue.stream)));
    bool any = step->n_tokens > 0 || c->together;
    if (*issue || !any || (!find_graph(c) && c->n_graphs == MAX_GRAPHS)) {
        c->mode = STEP_EAGER;
    } else if (find_graph(c)) {
        c->mode = STEP_REPLAY;
    } else {
        c->mode = STEP_CAPTURE;
        TRY(device_check(c, cudaStreamBeginCapture(c->queue.stream, cudaStreamCaptureModeRelaxed)));
    }
    *issue = c->mode != STEP_REPLAY;
    /* No device waits for others before these can come: it might keep them from what they do first. */
    return c->together && c->mode == STEP_EAGER ? exchange_meet(c->exchange->x) : ST_OK;
}

static enum status finish_capture(struct cuda *c) {
    cudaGraph_t graph = NULL;
    struct graph *g = &c->graphs[c->n_graphs];
    TRY(device_check(c, cudaStreamEndCapture(c->queue.stream, &graph)));
    cudaError_t e = cudaGraphInstantiate(&g->exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    TRY(device_check(c, e));
    g->bucket = c->bucket;
    c->n_graphs++;
    return ST_OK;
}

enum status step_end(struct backend *b) {
    struct cuda *c = of(b);
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->mode != STEP_NONE);
    TRY(ops_flush(c));
    if (c->mode == STEP_CAPTURE) TRY(finish_capture(c));
    if (c->mode != STEP_EAGER) {
        const struct graph *g = find_graph(c);
        if (c->together) TRY(exchange_meet(c->exchange->x));
        TRY(device_check(c, cudaGraphLaunch(g->exec, c->queue.stream)));
    }
    struct flight *f = &c->flights[c->n_begun % MOE_MAX_IN_FLIGHT];
    TRY(device_check(c, cudaMemcpyAsync(c->host_reads + N_READS * (c->n_begun & 1), c->n_reads,
                                        N_READS * sizeof *c->n_reads, cudaMemcpyDeviceToHost, c->queue.stream)));
    if (c->together) TRY(exchange_end_step(c, c->n_begun & 1));
    TRY(device_check(c, cudaEventRecord(f->done, c->queue.stream)));
    c->n_begun++;
    c->mode = STEP_NONE;
    return ST_OK;
}

enum status step_collect(struct backend *b, struct moe_result *out) {
    struct cuda *c = of(b);
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->n_collected < c->n_begun);
    uint64_t parity = c->n_collected & 1;
    struct flight *f = &c->flights[c->n_collected % MOE_MAX_IN_FLIGHT];
    TRY(device_check(c, cudaEventSynchronize(f->done)));
    if (f->together) TRY(exchange_collect(c, parity));
    float ms = 0.0f;
    TRY(device_check(c, cudaEventElapsedTime(&ms, f->begun, f->done)));
    c->n_collected++;
    out->n_rows = f->n_rows;
    out->run_ns = (uint64_t)((double)ms * 1e6);
    memcpy(out->rows, c->results + parity * (uint64_t)c->limits.max_rows,
           (size_t)f->n_rows * sizeof *out->rows);
    struct moe_counters *n = &c->counters;
    n->n_steps++;
    n->n_tokens += (uint64_t)f->n_tokens;
    for (int32_t i = 0; i < f->n_rows; i++) n->n_sampled += out->rows[i].token >= 0;
    const uint64_t *reads = c->host_reads + N_READS * parity;
    n->expert_reads = reads[READS_EXPERTS];
    n->offload_bytes = reads[READS_HOST_BYTES];
    n->expert_reads_ungrouped += (uint64_t)f->n_tokens * (uint64_t)c->shape.n_experts_used *
                                 (uint64_t)c->shape.n_layers;
    n->busy_ns += out->run_ns;
    return ST_OK;
}
