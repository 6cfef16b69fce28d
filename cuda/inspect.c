/* inspect: buffers, routing and the cache from outside, for probes and tests. Everything here waits for the device; a
 * step that is looked into must have been begun with *issue set. */
#include "cuda/device.h"

#include <string.h>

#include "cuda/panel.h"

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

static enum status settle(struct cuda *c) {
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->mode == STEP_NONE || c->mode == STEP_EAGER);
    TRY(ops_flush(c));
    return device_check(c, cudaStreamSynchronize(c->queue.stream));
}

/* Through pinned memory, a piece at a time. */
static enum status read_bytes(struct cuda *c, const void *src, size_t n, void *dst) {
    for (size_t at = 0; at < n; at += STAGING_BYTES) {
        size_t piece = n - at < STAGING_BYTES ? n - at : STAGING_BYTES;
        TRY(device_check(c, cudaMemcpyAsync(c->staging[0], (const uint8_t *)src + at, piece,
                                            cudaMemcpyDeviceToHost, c->queue.stream)));
        TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
        memcpy((uint8_t *)dst + at, c->staging[0], piece);
    }
    return ST_OK;
}

static enum status write_bytes(struct cuda *c, void *dst, size_t n, const void *src) {
    for (size_t at = 0; at < n; at += STAGING_BYTES) {
        size_t piece = n - at < STAGING_BYTES ? n - at : STAGING_BYTES;
        memcpy(c->staging[0], (const uint8_t *)src + at, piece);
        TRY(device_check(c, cudaMemcpyAsync((uint8_t *)dst + at, c->staging[0], piece,
                                            cudaMemcpyHostToDevice, c->queue.stream)));
        TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
    }
    return ST_OK;
}

enum status inspect_buf_read(struct backend *b, const struct buf *buf, int32_t row, int32_t n_rows,
                             float *dst) {
    struct cuda *c = of(b);
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    TRY(settle(c));
    size_t first = (size_t)row * (size_t)buf->n_cols, n = (size_t)n_rows * (size_t)buf->n_cols;
    if (buf->kind == BUF_EXACT)
        return read_bytes(c, (const float *)buf->p + first, n * sizeof *dst, dst);
    const size_t most = STAGING_BYTES / sizeof *dst;
    for (size_t at = 0; at < n; at += most) {
        size_t piece = n - at < most ? n - at : most;
        float *wide = (float *)(void *)c->device_staging[0];
        TRY(device_check(c, cuda_to_f32((const uint16_t *)buf->p + first + at, SOURCE_F16, piece, wide,
                                        &c->queue)));
        TRY(read_bytes(c, wide, piece * sizeof *dst, dst + at));
    }
    return ST_OK;
}

enum status inspect_buf_write(struct backend *b, struct buf *buf, int32_t row, int32_t n_rows,
                              const float *src) {
    struct cuda *c = of(b);
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    TRY(settle(c));
    size_t first = (size_t)row * (size_t)buf->n_cols, n = (size_t)n_rows * (size_t)buf->n_cols;
    if (buf->kind == BUF_EXACT) return write_bytes(c, (float *)buf->p + first, n * sizeof *src, src);
    const size_t most = STAGING_BYTES / sizeof *src;
    for (size_t at = 0; at < n; at += most) {
        size_t piece = n - at < most ? n - at : most;
        float *wide = (float *)(void *)c->device_staging[0];
        TRY(write_bytes(c, wide, piece * sizeof *src, src + at));
        TRY(device_check(c, cuda_to_f16(wide, piece, (uint16_t *)buf->p + first + at, &c->queue)));
        TRY(device_check(c, cudaStreamSynchronize(c->queue.stream)));
    }
    return ST_OK;
}

enum status inspect_route_read(struct backend *b, int32_t *ids, float *weights, int32_t *expert_first) {
    struct cuda *c = of(b);
    TRY(settle(c));
    size_t n = (size_t)c->n_tokens * (size_t)c->shape.n_experts_used;
    if (ids) TRY(read_bytes(c, c->lists.ids, n * sizeof *ids, ids));
    if (weights) TRY(read_bytes(c, c->lists.weights, n * sizeof *weights, weights));
    if (!expert_first) return ST_OK;
    return read_bytes(c, c->lists.expert_first, ((size_t)c->shape.n_experts + 1) * sizeof *expert_first,
                      expert_first);
}

enum status inspect_route_write(struct backend *b, const int32_t *ids, const float *weights) {
    struct cuda *c = of(b);
    TRY(settle(c));
    size_t n = (size_t)c->n_tokens * (size_t)c->shape.n_experts_used;
    c->lists_read = false;
    TRY(write_bytes(c, c->lists.ids, n * sizeof *ids, ids));
    TRY(write_bytes(c, c->lists.weights, n * sizeof *weights, weights));
    const struct route_args a = {.header = c->view.header,
                                 .n_experts = c->shape.n_experts,
                                 .n_used = c->shape.n_experts_used,
                                 .lists = c->lists,
                                 .widths = c->widths = (1u << N_WIDTHS) - 1,
                                 .marks = c->route_marks,
                                 .used_inverse = route_inverse(c->shape.n_experts_used)};
    return device_check(c, cuda_route_sort(&a, c->bucket.n_tokens, &c->queue));
}

enum status inspect_kv_poison(struct backend *b, uint8_t byte) {
    struct cuda *c = of(b);
    TRY(settle(c));
    return device_check(c, cudaMemsetAsync(c->kv, byte, c->kv_layer_bytes * (size_t)c->shape.n_layers,
                                           c->queue.stream));
}
