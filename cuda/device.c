/* device: opening, memory, errors, and the op table. See device.h. */
#include "cuda/exchange.h"
#include "cuda/nccl.h"
#include "cuda/panel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    GRAPH_RESERVE = 256 << 20, /* what stays free for captured steps */
    MIB = 1 << 20
};

enum status device_check(struct cuda *c, cudaError_t e) {
    if (e == cudaSuccess) return c->lost ? ST_ENGINE_LOST : ST_OK;
    if (!c->lost)
        log_event(LOG_ERROR, "cuda", "device_lost", "device=%d error=%s text=\"%s\"", c->device,
                  cudaGetErrorName(e), cudaGetErrorString(e));
    c->lost = true;
    c->lost_by = e;
    return ST_ENGINE_LOST;
}

enum status device_status(const struct cuda *c, enum status st, struct error *e) {
    if (st != ST_ENGINE_LOST || !c->lost) return st;
    return error_set(e, st, "GPU %d is lost: %s", c->device, cudaGetErrorString(c->lost_by));
}

/* ---- memory ------------------------------------------------------------------------------------- */

size_t device_free_bytes(const struct cuda *c) {
    uint64_t used = 0;
    for (int i = 0; i < N_MEMORY; i++) used += c->used[i];
    return used < c->budget_bytes ? c->budget_bytes - (size_t)used : 0;
}

/* As the allocator does; and reads of whole vectors stay inside. */
size_t device_rounded(size_t n) { return ((n > 0 ? n : 1) + 255) & ~(size_t)255; }

enum status device_alloc(struct cuda *c, enum memory_kind kind, const char *what, size_t n,
                         struct error *e, void **out) {
    *out = NULL;
    n = device_rounded(n);
    size_t left = device_free_bytes(c);
    if (n > left)
        return error_set(e, ST_NO_MEMORY,
                         "GPU %d: %s needs %zu MiB, %zu MiB more than the share allowed to this "
                         "process has left",
                         c->device, what, n / MIB, (n - left) / MIB + 1);
    CHECK(c->n_allocations < MAX_ALLOCATIONS);
    cudaError_t err = cudaMalloc(out, n);
    if (err == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        *out = NULL;
        return error_set(e, ST_NO_MEMORY, "GPU %d: no memory for %s (%zu MiB): another process uses it",
                         c->device, what, n / MIB);
    }
    if (err == cudaSuccess) err = cudaMemsetAsync(*out, 0, n, c->queue.stream);
    if (err != cudaSuccess) return device_status(c, device_check(c, err), e);
    c->allocations[c->n_allocations++] = *out;
    c->used[kind] += n;
    return ST_OK;
}

/* Tokens of one step that this GPU may compute experts for. */
static int32_t max_work_tokens(const struct cuda *c) {
    return c->exchange ? exchange_max_tokens(c->exchange->x) : c->limits.max_batch_tokens;
}

static enum status buf_create(struct backend *b, enum buf_rows rows, enum buf_kind kind,
                              int32_t n_cols, struct buf **out) {
    struct cuda *c = of(b);
    *out = NULL;
    if (c->lost) return ST_ENGINE_LOST;
    struct buf *f = calloc(1, sizeof *f);
    if (!f) return ST_NO_MEMORY;
    f->kind = kind;
    f->n_cols = n_cols;
    f->n_rows = rows == BUF_HEAD     ? c->limits.max_rows
                : rows == BUF_TOKENS ? c->limits.max_batch_tokens
                                     : max_work_tokens(c) * c->shape.n_experts_used;
    size_t n = (size_t)f->n_rows * (size_t)n_cols * (kind == BUF_EXACT ? sizeof(float) : 2);
    enum status st = device_alloc(c, MEMORY_ACTIVATIONS, "an activation buffer", n, NULL, &f->p);
    if (st != ST_OK) {
        free(f);
        return st;
    }
    f->next = c->bufs;
    c->bufs = f;
    *out = f;
    return ST_OK;
}

/* ---- ready ------------------------------------------------------------------------------------------ */

/* All that were asked for, or what one sequence takes. */
size_t device_least_blocks(const struct cuda *c) {
    const struct moe_limits *l = &c->limits;
    if (l->n_blocks > 0) return (size_t)l->n_blocks;
    return ((size_t)l->max_seq_tokens + (size_t)l->block_tokens - 1) / (size_t)l->block_tokens;
}

size_t device_block_bytes(const struct cuda *c) {
    return (size_t)c->shape.n_layers * (size_t)c->shape.n_kv_heads * 2 * (size_t)c->limits.block_tokens * HEAD_DIM * 2;
}

static enum status create_kv(struct cuda *c, struct error *e, int32_t *n_blocks) {
    const struct moe_limits *l = &c->limits;
    size_t all_layers = device_block_bytes(c), n = (size_t)l->n_blocks;
    if (n == 0) {
        size_t seq = device_least_blocks(c);
        n = device_free_bytes(c) / all_layers;
        if (n > seq * (size_t)l->max_seqs) n = seq * (size_t)l->max_seqs;
        if (n > (size_t)(INT32_MAX / l->block_tokens)) n = (size_t)(INT32_MAX / l->block_tokens);
        if (n < seq)
            return error_set(e, ST_NO_MEMORY,
                             "GPU %d: keys and values of one sequence of %d tokens need %zu MiB, but "
                             "%zu MiB of the share allowed are left: %zu MiB are missing",
                             c->device, (int)l->max_seq_tokens, seq * all_layers / MIB,
                             device_free_bytes(c) / MIB,
                             (seq * all_layers - device_free_bytes(c)) / MIB + 1);
    }
    void *p;
    enum status st = device_alloc(c, MEMORY_KV, "the KV cache", n * all_layers, e, &p);
    if (st != ST_OK) return st;
    c->kv = p;
    c->kv_layer_bytes = n * (all_layers / (size_t)c->shape.n_layers);
    c->limits.n_blocks = *n_blocks = (int32_t)n;
    return ST_OK;
}

static enum status ready(struct backend *b, struct error *e, int32_t *n_blocks) {
    struct cuda *c = of(b);
    if (c->lost) return ST_ENGINE_LOST;
    enum status st = cuda_step_create(c, e);
    if (st == ST_OK) st = exchange_ready(c, e);
    if (st == ST_OK) st = create_kv(c, e, n_blocks);
    if (st == ST_OK) st = device_check(c, cudaStreamSynchronize(c->queue.stream));
    c->ready = st == ST_OK;
    return device_status(c, st, e);
}

/* ---- for people ---------------------------------------------------------------------------------------- */

static void describe(const struct backend *b, char *dst, size_t cap) {
    const struct cuda *c = of_const(b);
    snprintf(dst, cap, "cuda:%d %s, %d SMs, %zu MiB", c->device, c->name, c->queue.n_sm,
             c->total_bytes / MIB);
}

static int memory(const struct backend *b, struct moe_memory_line *dst, int cap) {
    static const char *const names[N_MEMORY] = {"weights", "kv", "activations", "step", "sampler"};
    const struct cuda *c = of_const(b);
    int n = 0;
    for (; n < N_MEMORY && n < cap; n++) {
        snprintf(dst[n].what, sizeof dst[n].what, "%s", names[n]);
        dst[n].n_bytes = c->used[n];
    }
    if (c->far && n < cap) {
        snprintf(dst[n].what, sizeof dst[n].what, "experts in host memory");
        dst[n++].n_bytes = c->host_bytes;
    }
    /* Exactly, without the allocator's rounding: bytes per token are taken from it. */
    if (MEMORY_KV < n) dst[MEMORY_KV].n_bytes = c->kv_layer_bytes * (uint64_t)c->shape.n_layers;
    return n;
}

static void counters(const struct backend *b, struct moe_counters *out) {
    const struct cuda *c = of_const(b);
    *out = c->counters;
    if (!c->exchange) return;
    const struct moe_counters *together = &c->exchange->counters;
    out->expert_reads += together->expert_reads;
    out->expert_rows = together->expert_rows;
    out->exchange_bytes = together->exchange_bytes;
    out->n_replans = together->n_replans;
    out->n_moved = together->n_moved;
}

/* ---- life ------------------------------------------------------------------------------------------------- */

static void close_backend(struct backend *b) {
    struct cuda *c = of(b);
    exchange_abandon(c);
    cuda_graphs_destroy(c);
    exchange_disconnect(c);
    if (c->queue.stream) (void)cudaStreamSynchronize(c->queue.stream);
    exchange_leave(c); /* before any memory goes that others may read */
    cuda_step_destroy(c);
    for (int i = 0; i < c->n_allocations; i++) (void)cudaFree(c->allocations[i]);
    for (int i = 0; i < 2; i++) {
        if (c->staging[i]) (void)cudaFreeHost(c->staging[i]);
        if (c->staged[i]) (void)cudaEventDestroy(c->staged[i]);
    }
    if (c->queue.stream) (void)cudaStreamDestroy(c->queue.stream);
    while (c->weights) {
        struct weight *w = c->weights;
        c->weights = w->next;
        if (w->host) (void)cudaFreeHost(w->host);
        free(w);
    }
    while (c->bufs) {
        struct buf *f = c->bufs;
        c->bufs = f->next;
        free(f);
    }
    free(c->far);
    free(c->allocations);
    free(c);
}

static const struct backend_ops cuda_ops = {
    .kind = "cuda",
    .close = close_backend,
    .plan = offload_plan,
    .expert_load = offload_load,
    .weight_load = load_weight,
    .buf_create = buf_create,
    .ready = ready,
    .describe = describe,
    .memory = memory,
    .counters = counters,
    .slot_start = step_slot_start,
    .step_begin = step_begin,
    .embed = ops_embed,
    .norm_linear = ops_norm_linear,
    .rope_store = ops_rope_store,
    .attention = ops_attention,
    .linear_add = ops_linear_add,
    .route = ops_route,
    .experts_up = ops_experts_up,
    .experts_down = ops_experts_down,
    .head = ops_head,
    .sample = ops_sample,
    .step_end = step_end,
    .step_collect = step_collect,
    .buf_read = inspect_buf_read,
    .buf_write = inspect_buf_write,
    .route_read = inspect_route_read,
    .route_write = inspect_route_write,
    .kv_poison = inspect_kv_poison,
};

/* The shapes that the kernels have. */
static enum status check_shape(const struct backend_config *c, struct error *e) {
    const struct model_shape *m = &c->shape;
    if (m->head_dim != HEAD_DIM)
        return error_set(e, ST_UNSUPPORTED, "heads of %d values: the CUDA backend has kernels for %d",
                         (int)m->head_dim, HEAD_DIM);
    if (m->n_kv_heads <= 0 || m->n_heads % m->n_kv_heads != 0)
        return error_set(e, ST_UNSUPPORTED, "%d query heads do not divide among %d KV heads",
                         (int)m->n_heads, (int)m->n_kv_heads);
    if (m->n_embd % PANEL_K != 0 || m->n_embd > MAX_EMBD || m->n_ff_expert % PANEL_K != 0)
        return error_set(e, ST_UNSUPPORTED,
                         "width %d with experts of width %d: the CUDA backend needs multiples of %d, "
                         "at most %d",
                         (int)m->n_embd, (int)m->n_ff_expert, PANEL_K, MAX_EMBD);
    if (m->n_experts > MAX_EXPERTS || m->n_experts_used > MAX_EXPERTS_USED)
        return error_set(e, ST_UNSUPPORTED,
                         "%d experts, %d per token: the CUDA backend has room for %d and %d",
                         (int)m->n_experts, (int)m->n_experts_used, MAX_EXPERTS, MAX_EXPERTS_USED);
    return ST_OK;
}

/* A driver and a device of this number that the kernels can run on. */
static enum status find_device(struct cuda *c, int device, struct error *e) {
    int n = 0;
    cudaError_t err = cudaGetDeviceCount(&n);
    if (err == cudaErrorInsufficientDriver)
        return error_set(e, ST_UNSUPPORTED,
                         "no NVIDIA driver here, or one too old for CUDA %d.%d: install it, or use "
                         "--device cpu",
                         CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (err == cudaErrorNoDevice || (err == cudaSuccess && n == 0))
        return error_set(e, ST_UNSUPPORTED, "no NVIDIA GPU is visible here: use --device cpu");
    if (err != cudaSuccess)
        return error_set(e, ST_UNSUPPORTED, "CUDA does not start: %s", cudaGetErrorString(err));
    if (device < 0 || device >= n)
        return error_set(e, ST_UNSUPPORTED, "no GPU %d here: there %s %d, counted from 0", device,
                         n == 1 ? "is" : "are", n);
    struct cudaDeviceProp p;
    err = cudaGetDeviceProperties(&p, device);
    if (err != cudaSuccess)
        return error_set(e, ST_UNSUPPORTED, "GPU %d: %s", device, cudaGetErrorString(err));
    if (p.major < 8)
        return error_set(e, ST_UNSUPPORTED,
                         "GPU %d (%s) has compute capability %d.%d: 8.0 or later is needed", device,
                         p.name, p.major, p.minor);
    c->device = device;
    snprintf(c->name, sizeof c->name, "%.*s", (int)sizeof c->name - 1, p.name);
    c->queue.n_sm = p.multiProcessorCount;
    c->queue.max_shared = p.sharedMemPerBlockOptin;
    c->queue.dependent = p.major >= 9;
    enum cudaDriverEntryPointQueryResult ignored; /* what is not there is NULL */
    if (p.major == 9 && cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &c->queue.encode_map, 12000,
                                                         cudaEnableDefault, &ignored) != cudaSuccess)
        c->queue.encode_map = NULL;
    return ST_OK;
}

static enum status start_device(struct cuda *c, double share, struct error *e) {
    cudaError_t err = cudaSetDevice(c->device);
    if (err == cudaSuccess) err = cudaStreamCreateWithFlags(&c->queue.stream, cudaStreamNonBlocking);
    if (err == cudaSuccess) err = cuda_kernels_prepare(&c->queue);
    for (int i = 0; i < 2 && err == cudaSuccess; i++) {
        err = cudaHostAlloc((void **)&c->staging[i], STAGING_BYTES, cudaHostAllocDefault);
        if (err == cudaSuccess) err = cudaEventCreateWithFlags(&c->staged[i], cudaEventDisableTiming);
    }
    size_t free_bytes = 0;
    if (err == cudaSuccess) err = cudaMemGetInfo(&free_bytes, &c->total_bytes);
    if (err == cudaErrorMemoryAllocation)
        return error_set(e, ST_NO_MEMORY, "GPU %d: no memory to start with", c->device);
    if (err == cudaErrorNoKernelImageForDevice)
        return error_set(e, ST_UNSUPPORTED, "GPU %d (%s): this build has no code for it", c->device,
                         c->name);
    if (err != cudaSuccess)
        return error_set(e, ST_ENGINE_LOST, "GPU %d: %s", c->device, cudaGetErrorString(err));
    double allowed = (double)c->total_bytes * share;
    double taken = (double)(c->total_bytes - free_bytes) + GRAPH_RESERVE;
    if (allowed <= taken)
        return error_set(e, ST_NO_MEMORY,
                         "GPU %d: %.0f MiB are in use already, and %.0f %% of its %zu MiB are allowed",
                         c->device, taken / MIB, share * 100.0, c->total_bytes / MIB);
    c->budget_bytes = (size_t)(allowed - taken);
    for (int i = 0; i < 2; i++) {
        void *p;
        enum status st = device_alloc(c, MEMORY_STEP, "staging", STAGING_BYTES, e, &p);
        if (st != ST_OK) return st;
        c->device_staging[i] = p;
    }
    void *p;
    enum status st = device_alloc(c, MEMORY_STEP, "staging", sizeof *c->d_max, e, &p);
    c->d_max = p;
    return st;
}

enum status backend_cuda_unique_id(struct error *e, struct moe_unique_id *out) { return nccl_unique_id(e, out); }

enum status backend_cuda_open(const struct backend_config *config, struct error *e,
                              struct backend **out) {
    *out = NULL;
    struct error ignored;
    if (!e) e = &ignored;
    enum status st = check_shape(config, e);
    if (st != ST_OK) return st;
    double share = config->gpu_memory_utilization;
    if (!(share > 0.0 && share <= 1.0))
        return error_set(e, ST_INVALID, "gpu_memory_utilization is %g: it must lie in (0, 1]", share);
    struct cuda *c = calloc(1, sizeof *c);
    if (c) c->allocations = calloc(MAX_ALLOCATIONS, sizeof *c->allocations);
    if (!c || !c->allocations) {
        free(c);
        return error_set(e, ST_NO_MEMORY, "no memory for the CUDA backend");
    }
    c->ops = &cuda_ops;
    c->shape = config->shape;
    c->limits = config->limits;
    c->offload_experts = config->offload_experts;
    c->expert_load = config->expert_load;
    while (1 << c->block_shift < c->limits.block_tokens) c->block_shift++;
    CHECK(1 << c->block_shift == c->limits.block_tokens);
    st = find_device(c, config->device, e);
    if (st == ST_OK) st = start_device(c, share, e);
    if (st == ST_OK) st = exchange_join(c, config, e);
    if (st != ST_OK) {
        close_backend((struct backend *)(void *)c);
        return st;
    }
    *out = (struct backend *)(void *)c;
    return ST_OK;
}
