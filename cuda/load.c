/* load: tensors of the file to panels on the device, in pieces of whole 16-row blocks: read into pinned memory while
 * the piece before is copied and repacked. */
#include "cuda/exchange.h"

#include <stdlib.h>
#include <string.h>

#include "cuda/panel.h"

static const struct {
    enum tensor_type type;
    int source;
} sources[] = {
    {TENSOR_Q4_K, SOURCE_Q4_K}, {TENSOR_Q5_K, SOURCE_Q5_K}, {TENSOR_Q6_K, SOURCE_Q6_K},
    {TENSOR_Q8_0, SOURCE_Q8_0}, {TENSOR_F16, SOURCE_F16},   {TENSOR_BF16, SOURCE_BF16},
    {TENSOR_F32, SOURCE_F32},
};

static int source_of(enum tensor_type type) {
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++)
        if (sources[i].type == type) return sources[i].source;
    return -1;
}

/* The next piece: n bytes at `offset` of the tensor, on their way to device staging. *out: where. */
static enum status stage(struct cuda *c, const struct weight_source *s, size_t offset, size_t n, int i,
                         uint8_t **out) {
    enum status st = device_check(c, cudaEventSynchronize(c->staged[i]));
    if (st == ST_OK) st = s->read(s->ctx, offset, c->staging[i], n);
    if (st != ST_OK) return st;
    *out = c->device_staging[i];
    return device_check(c, cudaMemcpyAsync(*out, c->staging[i], n, cudaMemcpyHostToDevice,
                                           c->queue.stream));
}

static bool is_vector(const struct weight_source *s) { return s->n_rows == 1 && s->n_experts == 1; }

enum status load_bytes(const struct weight_source *s, struct error *e, struct weight_bytes *out) {
    int source = source_of(s->type);
    *out = (struct weight_bytes){0};
    if (source < 0)
        return error_set(e, ST_UNSUPPORTED, "tensor %s: the CUDA backend has no type %d", s->name,
                         (int)s->type);
    if (is_vector(s)) {
        out->others = (size_t)s->n_cols * sizeof(float);
        if (source >= SOURCE_F16) return ST_OK;
        return error_set(e, ST_UNSUPPORTED, "tensor %s: a vector cannot be of type %d", s->name,
                         (int)s->type);
    }
    if (s->n_cols % PANEL_K != 0)
        return error_set(e, ST_UNSUPPORTED,
                         "tensor %s: rows of %d values: the CUDA backend needs a multiple of %d",
                         s->name, (int)s->n_cols, PANEL_K);
    out->expert = (size_t)((s->n_rows + PANEL_ROWS - 1) / PANEL_ROWS) * (size_t)(s->n_cols / PANEL_K) *
                  (size_t)panel_bytes(panel_of_source(source));
    if (source == SOURCE_F32) out->others = s->n_bytes; /* the router reads it as it is */
    return ST_OK;
}

static enum status load_vector(struct cuda *c, const struct weight_source *s, int source,
                               struct error *e, struct weight *w) {
    void *p;
    enum status st =
        device_alloc(c, MEMORY_WEIGHTS, s->name, (size_t)s->n_cols * sizeof(float), e, &p);
    if (st != ST_OK) return st;
    w->f32 = p;
    w->type = -1;
    if (s->n_bytes > STAGING_BYTES)
        return error_set(e, ST_UNSUPPORTED, "tensor %s: a vector of %d values", s->name, (int)s->n_cols);
    uint8_t *piece;
    if ((st = stage(c, s, 0, s->n_bytes, 0, &piece)) != ST_OK) return st;
    st = device_check(c, cuda_to_f32(piece, source, (size_t)s->n_cols, w->f32, &c->queue));
    if (st != ST_OK) return st;
    return device_check(c, cudaEventRecord(c->staged[0], c->queue.stream));
}

/* An expert stack of which a group's ranks hold shares. */
static bool is_shared(const struct cuda *c, const struct weight_source *s) {
    return c->exchange && s->n_experts > 1;
}

/* All rows of all experts; an expert's last row block is filled up with zeros. at: where each lies, or NULL: in order. */
static enum status load_rows(struct cuda *c, const struct weight_source *s, int source,
                             struct weight *w, const struct expert_panels *at) {
    size_t row = (size_t)(s->n_cols / PANEL_K) * (size_t)source_bytes(source);
    size_t block = (size_t)(s->n_cols / PANEL_K) * (size_t)panel_bytes(w->type);
    int32_t most = (int32_t)(STAGING_BYTES / row) / PANEL_ROWS * PANEL_ROWS;
    CHECK(most > 0);
    int i = 0;
    uint8_t *dst = w->panels;
    enum status st = device_check(c, cudaMemsetAsync(c->d_max, 0, sizeof *c->d_max, c->queue.stream));
    size_t expert = (size_t)((s->n_rows + PANEL_ROWS - 1) / PANEL_ROWS) * block;
    for (int32_t x = 0; x < s->n_experts && st == ST_OK; x++) {
        /* What another rank holds is read too: the scale is that of the whole stack, on every rank. */
        if (at) dst = (uint8_t *)(uintptr_t)at[x].panels;
        else if (is_shared(c, s)) dst = w->panels + (size_t)exchange_place(c, s->layer, x) * expert;
        for (int32_t r = 0; r < s->n_rows && st == ST_OK; r += most, i ^= 1) {
            int32_t n = s->n_rows - r < most ? s->n_rows - r : most;
            size_t offset = ((size_t)x * (size_t)s->n_rows + (size_t)r) * row;
            uint8_t *piece;
            if ((st = stage(c, s, offset, (size_t)n * row, i, &piece)) != ST_OK) return st;
            const struct repack_args a = {.src = piece,
                                          .dst = dst,
                                          .source = source,
                                          .n_rows = n,
                                          .n_cols = s->n_cols,
                                          .d_max = c->d_max};
            st = device_check(c, cuda_repack(&a, &c->queue));
            if (st == ST_OK && source == SOURCE_F32)
                st = device_check(c, cudaMemcpyAsync((uint8_t *)w->f32 + offset, piece, (size_t)n * row,
                                                     cudaMemcpyDeviceToDevice, c->queue.stream));
            if (st == ST_OK) st = device_check(c, cudaEventRecord(c->staged[i], c->queue.stream));
            dst += (size_t)((n + PANEL_ROWS - 1) / PANEL_ROWS) * block;
        }
    }
    return st;
}

/* Room for a stack of which some experts stay in host memory, and the table that says where each lies: *at, of the
 * caller from now on, and on the device. */
static enum status place_far(struct cuda *c, const struct weight_source *s, size_t expert_bytes,
                             struct error *e, struct weight *w, struct expert_panels **at) {
    const bool *far = c->far + (size_t)s->layer * (size_t)s->n_experts;
    size_t n = (size_t)s->n_experts, n_far = 0;
    for (size_t x = 0; x < n; x++) n_far += far[x];
    struct expert_panels *table = *at = calloc(n, sizeof *table);
    if (!table) return error_set(e, ST_NO_MEMORY, "tensor %s: no memory", s->name);
    void *near, *p;
    enum status st = device_alloc(c, MEMORY_WEIGHTS, s->name, (n - n_far) * expert_bytes, e, &near);
    if (st == ST_OK) st = device_alloc(c, MEMORY_WEIGHTS, s->name, n * sizeof *table, e, &p);
    if (st != ST_OK) return st;
    w->experts = p;
    if (n_far > 0 && cudaHostAlloc(&w->host, n_far * expert_bytes, cudaHostAllocMapped) != cudaSuccess) {
        (void)cudaGetLastError();
        w->host = NULL;
        return error_set(e, ST_NO_MEMORY,
                         "GPU %d: no page-locked host memory for %zu experts of %s (%zu MiB; %llu MiB for all "
                         "that stay in host memory)",
                         c->device, n_far, s->name, n_far * expert_bytes >> 20,
                         (unsigned long long)(c->host_bytes >> 20));
    }
    const uint8_t *next_near = near, *next_far = w->host;
    for (size_t x = 0; x < n; x++) {
        const uint8_t **next = far[x] ? &next_far : &next_near;
        table[x] = (struct expert_panels){*next, far[x] ? expert_bytes : 0};
        *next += expert_bytes;
    }
    return device_check(c, cudaMemcpyAsync(w->experts, table, n * sizeof *table, cudaMemcpyHostToDevice,
                                           c->queue.stream));
}

static enum status load_matrix(struct cuda *c, const struct weight_source *s, int source,
                               const struct weight_bytes *bytes, struct error *e, struct weight *w) {
    w->type = panel_of_source(source);
    int32_t n_places = is_shared(c, s) ? c->exchange->n_places + 1 : s->n_experts;
    struct expert_panels *at = NULL;
    enum status st;
    void *p;
    if (c->far && s->n_experts > 1) {
        st = place_far(c, s, bytes->expert, e, w, &at);
    } else {
        st = device_alloc(c, MEMORY_WEIGHTS, s->name, (size_t)n_places * bytes->expert, e, &p);
        w->panels = p;
    }
    if (st == ST_OK && bytes->others > 0) {
        st = device_alloc(c, MEMORY_WEIGHTS, s->name, bytes->others, e, &p);
        w->f32 = p;
    }
    if (st == ST_OK && is_shared(c, s)) {
        st = exchange_add_stack(c, s->layer, w->panels, bytes->expert);
        if (st != ST_OK) error_set(e, st, "tensor %s: no memory", s->name);
    }
    if (st == ST_OK) st = load_rows(c, s, source, w, at);
    free(at);
    if (st != ST_OK) return st;
    uint32_t bits = 0;
    st = device_check(c, cudaMemcpyAsync(&bits, c->d_max, sizeof bits, cudaMemcpyDeviceToHost,
                                         c->queue.stream));
    if (st == ST_OK) st = device_check(c, cudaStreamSynchronize(c->queue.stream));
    if (st != ST_OK) return st;
    float d_max = bits < 0x7c00u ? panel_f16((uint16_t)bits) : 65504.0f; /* not finite: NaN at run time */
    int exponent = panel_exponent(w->type, d_max);
    w->scale = panel_f32_bits((uint32_t)(127 + exponent) << 23);
    return ST_OK;
}

enum status load_weight(struct backend *b, const struct weight_source *s, struct error *e,
                        struct weight **out) {
    struct cuda *c = of(b);
    *out = NULL;
    if (c->lost) return device_status(c, ST_ENGINE_LOST, e);
    CHECK(s->n_experts > 0 && s->n_rows > 0 && s->n_cols > 0 && !c->ready);
    struct weight_bytes bytes;
    enum status st = load_bytes(s, e, &bytes);
    if (st != ST_OK) return st;
    int source = source_of(s->type);
    struct weight *w = calloc(1, sizeof *w);
    if (!w) return error_set(e, ST_NO_MEMORY, "tensor %s: no memory", s->name);
    w->next = c->weights; /* freed by close, whatever happens */
    c->weights = w;
    w->n_experts = s->n_experts;
    w->n_rows = s->n_rows;
    w->n_cols = s->n_cols;
    w->scale = 1.0f;
    st = is_vector(s) ? load_vector(c, s, source, e, w) : load_matrix(c, s, source, &bytes, e, w);
    if (st == ST_OK) *out = w;
    return device_status(c, st, e);
}
