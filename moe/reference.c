/* reference: the backend that says what is right. Scalar, one thread, float32 activations, float64 sums;
 * weights stay as the file has them and a row is dequantised when it is used, once per step for all the
 * tokens that need it, so that a model takes no more memory than its file.
 *
 * Formulas: backend.h's op comments; they are computed here as written, in the order written.
 *
 * Invariants: a row of any buffer is a function of its own sequence alone, because every sum runs over
 * one row in one fixed order and nothing is shared between rows; positions beyond a token's own are not read.
 * One caller thread; a step is computed between step_begin and step_end. */
#include "moe/backend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/batch.h"
#include "moe/exchange.h"
#include "moe/quant.h"
#include "moe/route.h"
#include "moe/sampler.h"

struct weight {
    struct weight *next;
    enum tensor_type type;
    int32_t n_experts, n_rows, n_cols;
    size_t row_bytes;
    uint8_t *raw; /* [n_experts][n_rows][row_bytes] */
};

struct buf {
    struct buf *next;
    int32_t n_rows, n_cols;
    float *p; /* [n_rows][n_cols] */
};

struct reference {
    const struct backend_ops *ops; /* first: struct backend */
    struct model_shape shape;
    struct moe_limits limits;
    struct weight *weights;
    struct buf *bufs;
    int32_t max_cols; /* of any weight */
    float *row; /* [max_cols] the weight row in use */
    double *wide_row; /* [max_cols] the same in float64 */
    float *x; /* [T][max_cols] the inputs of a product: normed, or gathered for one expert */
    double *wide_x; /* [T][max_cols] the same in float64 */
    float *up; /* [T][F] one expert's up products */
    double *scores; /* [max_seq_tokens] */
    double *head; /* [Hd] one attention head's query, then its output */
    double *rope_freq; /* [Hd / 2] base^(-2i/Hd) */
    float *kv; /* see kv_at */
    size_t kv_tokens; /* n_blocks * B */
    struct batch batch; /* of the current step */
    struct route route;
    struct exchange *exchange; /* or NULL */
    /* exchange, or NULL: this step's experts are computed here, for its own tokens only */
    struct exchange *peers;
    float *inputs; /* exchange: [work tokens][D] */
    float *returned; /* exchange: [T * K][D] products of this rank's tokens, in its routing order */
    struct sampler *sampler;
    struct sampler_scratch *scratch;
    struct batch_results results;
    struct moe_counters counters;
    uint64_t begun_ns;
};

static struct reference *of(struct backend *b) { return (struct reference *)(void *)b; }
static const struct reference *of_const(const struct backend *b) {
    return (const struct reference *)(const void *)b;
}

/* ---- arithmetic ----------------------------------------------------------------------------- */

/* Two float64 at once: what every x86-64 and every 64-bit Arm adds in one instruction. */
typedef double two __attribute__((vector_size(2 * sizeof(double)), aligned(8), may_alias));

/* A product of two float32 values is exact in float64. Eight partial sums in a fixed order. Sanitizers leave it alone:
 * it reads just what widen wrote, and it is most of a test's time. */
static double dot(const double *a, const double *b, int32_t n)
    __attribute__((no_sanitize("address", "undefined")));
static double dot(const double *a, const double *b, int32_t n) {
    two sum[4] = {{0}};
    double rest = 0.0;
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const two *x = (const two *)(a + i), *y = (const two *)(b + i);
        sum[0] += x[0] * y[0];
        sum[1] += x[1] * y[1];
        sum[2] += x[2] * y[2];
        sum[3] += x[3] * y[3];
    }
    for (; i < n; i++) rest += a[i] * b[i];
    two total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return total[0] + total[1] + rest;
}

/* y += w * x; n is even. */
static void add_scaled(double w, const double *x, int32_t n, double *y) {
    for (int32_t i = 0; i < n; i += 2) *(two *)(y + i) += w * *(const two *)(x + i);
}

static void widen(const float *x, size_t n, double *y) {
    for (size_t i = 0; i < n; i++) y[i] = (double)x[i];
}

/* y = x / sqrt(mean(x²) + eps) * norm. y may be x. */
static void rms_norm(const float *x, const float *norm, float eps, int32_t n, float *y) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double scale = 1.0 / sqrt(sum / (double)n + (double)eps);
    for (int32_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * scale * (double)norm[i]);
}

static const float *weight_row(struct reference *r, const struct weight *w, int32_t e,
                               int32_t row) {
    size_t i = (size_t)e * (size_t)w->n_rows + (size_t)row;
    dequantize(w->type, w->raw + i * w->row_bytes, (size_t)w->n_cols, r->row);
    return r->row;
}

/* out[i][o] = (row o of w's matrix e) · x[i] for n inputs of w->n_cols values each. */
static void matmul(struct reference *r, const struct weight *w, int32_t e, const float *x,
                   int32_t n, float *out) {
    size_t n_cols = (size_t)w->n_cols;
    widen(x, (size_t)n * n_cols, r->wide_x);
    for (int32_t o = 0; o < w->n_rows; o++) {
        widen(weight_row(r, w, e, o), n_cols, r->wide_row);
        for (int32_t i = 0; i < n; i++)
            out[(size_t)i * (size_t)w->n_rows + (size_t)o] =
                (float)dot(r->wide_row, r->wide_x + (size_t)i * n_cols, w->n_cols);
    }
}

static float *buf_row(const struct buf *b, int32_t row) {
    return b->p + (size_t)row * (size_t)b->n_cols;
}

/* Key (or value) of all KV heads, [G * Hd], at a KV token index of a layer: [L][2][n_blocks * B][G * Hd]. */
static float *kv_at(const struct reference *r, int layer, bool value, size_t index) {
    size_t width = (size_t)r->shape.n_kv_heads * (size_t)r->shape.head_dim;
    return r->kv + (((size_t)layer * 2 + value) * r->kv_tokens + index) * width;
}

/* ---- life ------------------------------------------------------------------------------------- */

static void reference_close(struct backend *b) {
    struct reference *r = of(b);
    exchange_close(r->exchange); /* first: until then others may read weights and rows */
    while (r->weights) {
        struct weight *w = r->weights;
        r->weights = w->next;
        free(w->raw);
        free(w);
    }
    while (r->bufs) {
        struct buf *f = r->bufs;
        r->bufs = f->next;
        free(f->p);
        free(f);
    }
    free(r->row);
    free(r->wide_row);
    free(r->x);
    free(r->wide_x);
    free(r->up);
    free(r->scores);
    free(r->head);
    free(r->rope_freq);
    free(r->kv);
    free(r->inputs);
    free(r->returned);
    batch_destroy(&r->batch);
    route_destroy(&r->route);
    sampler_destroy(r->sampler);
    sampler_scratch_destroy(r->scratch);
    batch_results_destroy(&r->results);
    free(r);
}

/* An expert stack of which this rank holds some. What is not held is never touched, and takes no memory. */
static enum status load_held(struct reference *r, const struct weight_source *source,
                             const struct weight *w) {
    size_t expert_bytes = (size_t)w->n_rows * w->row_bytes;
    enum status st = exchange_stack(r->exchange, source->layer, w->raw, expert_bytes);
    for (int32_t e = 0; e < w->n_experts && st == ST_OK; e++) {
        size_t at = (size_t)e * expert_bytes;
        if (exchange_holds(r->exchange, source->layer, e))
            st = source->read(source->ctx, at, w->raw + at, expert_bytes);
    }
    return st;
}

/* Tokens of one step that this rank may compute experts for. */
static int32_t max_work_tokens(const struct reference *r) {
    return r->exchange ? exchange_max_tokens(r->exchange) : r->limits.max_batch_tokens;
}

static enum status reference_weight_load(struct backend *b, const struct weight_source *source,
                                         struct error *e, struct weight **out) {
    struct reference *r = of(b);
    CHECK(source->n_experts > 0 && source->n_rows > 0 && source->n_cols > 0);
    size_t row_bytes, n_bytes;
    if (!tensor_type_bytes(source->type, (size_t)source->n_cols, &row_bytes))
        return error_set(e, ST_UNSUPPORTED, "tensor %s: rows of %d values cannot be type %d",
                         source->name, (int)source->n_cols, (int)source->type);
    if (!size_mul((size_t)source->n_experts * (size_t)source->n_rows, row_bytes, &n_bytes) ||
        n_bytes != source->n_bytes)
        return error_set(e, ST_CORRUPT, "tensor %s: %zu bytes do not fit its shape", source->name,
                         source->n_bytes);
    struct weight *w = calloc(1, sizeof *w);
    if (w) w->raw = malloc(n_bytes);
    if (!w || !w->raw) {
        free(w);
        return error_set(e, ST_NO_MEMORY, "tensor %s: no memory for %zu bytes", source->name,
                         n_bytes);
    }
    w->next = r->weights;
    r->weights = w;
    w->type = source->type;
    w->n_experts = source->n_experts;
    w->n_rows = source->n_rows;
    w->n_cols = source->n_cols;
    w->row_bytes = row_bytes;
    if (w->n_cols > r->max_cols) r->max_cols = w->n_cols;
    *out = w;
    if (r->exchange && w->n_experts > 1) return load_held(r, source, w);
    return source->read(source->ctx, 0, w->raw, n_bytes);
}

/* [a][b] values of `size` bytes, zeroed; NULL on overflow. */
static void *alloc2(int32_t a, int32_t b, size_t size) {
    size_t n;
    if (!size_mul((size_t)a, (size_t)b, &n)) return NULL;
    return calloc(n, size);
}

static enum status reference_buf_create(struct backend *b, enum buf_rows rows, enum buf_kind kind,
                                        int32_t n_cols, struct buf **out) {
    (void)kind; /* everything is float32 here */
    struct reference *r = of(b);
    struct buf *f = calloc(1, sizeof *f);
    if (!f) return ST_NO_MEMORY;
    f->n_cols = n_cols;
    f->n_rows = rows == BUF_HEAD     ? r->limits.max_rows
                : rows == BUF_TOKENS ? r->limits.max_batch_tokens
                                     : max_work_tokens(r) * r->shape.n_experts_used;
    f->p = alloc2(f->n_rows, n_cols, sizeof(float));
    if (!f->p) {
        free(f);
        return ST_NO_MEMORY;
    }
    f->next = r->bufs;
    r->bufs = f;
    *out = f;
    return ST_OK;
}

/* False if the size overflows or memory is short. */
static bool alloc_kv(struct reference *r) {
    const struct model_shape *m = &r->shape;
    size_t n = (size_t)m->n_kv_heads * (size_t)m->head_dim;
    r->kv_tokens = (size_t)r->limits.n_blocks * (size_t)r->limits.block_tokens;
    if (!size_mul(n, (size_t)m->n_layers * 2, &n) || !size_mul(n, r->kv_tokens, &n)) return false;
    r->kv = calloc(n, sizeof *r->kv);
    return r->kv != NULL;
}

static bool alloc_exchange(struct reference *r) {
    if (!r->exchange) return true;
    r->inputs = alloc2(max_work_tokens(r), r->shape.n_embd, sizeof *r->inputs);
    r->returned = alloc2(r->limits.max_batch_tokens * r->shape.n_experts_used, r->shape.n_embd,
                         sizeof *r->returned);
    return r->inputs && r->returned;
}

static enum status reference_ready(struct backend *b, struct error *e, int32_t *n_blocks) {
    struct reference *r = of(b);
    const struct model_shape *m = &r->shape;
    const struct moe_limits *l = &r->limits;
    int32_t n_pairs = m->head_dim / 2;
    r->row = calloc((size_t)r->max_cols, sizeof *r->row);
    r->wide_row = calloc((size_t)r->max_cols, sizeof *r->wide_row);
    r->x = alloc2(max_work_tokens(r), r->max_cols, sizeof *r->x);
    r->wide_x = alloc2(max_work_tokens(r), r->max_cols, sizeof *r->wide_x);
    r->up = alloc2(max_work_tokens(r), m->n_ff_expert, sizeof *r->up);
    r->scores = calloc((size_t)l->max_seq_tokens, sizeof *r->scores);
    r->head = calloc((size_t)m->head_dim, sizeof *r->head);
    r->rope_freq = calloc((size_t)n_pairs, sizeof *r->rope_freq);
    bool ok = r->row && r->wide_row && r->x && r->wide_x && r->up && r->scores && r->head &&
              r->rope_freq && alloc_exchange(r) && alloc_kv(r) &&
              batch_create(l, &r->batch) == ST_OK &&
              route_create(m, l->max_batch_tokens, &r->route) == ST_OK &&
              sampler_create(l->max_seqs, l->max_seq_tokens, m->n_vocab, &r->sampler) == ST_OK &&
              sampler_scratch_create(m->n_vocab, &r->scratch) == ST_OK &&
              batch_results_create(l->max_rows, &r->results) == ST_OK;
    if (!ok)
        return error_set(e, ST_NO_MEMORY,
                         "no memory for %d KV blocks of %d tokens and a batch of %d",
                         (int)l->n_blocks, (int)l->block_tokens, (int)l->max_batch_tokens);
    for (int32_t i = 0; i < n_pairs; i++)
        r->rope_freq[i] = pow((double)m->rope_base, -2.0 * i / (double)m->head_dim);
    *n_blocks = l->n_blocks;
    return ST_OK;
}

static void reference_describe(const struct backend *b, char *dst, size_t cap) {
    (void)b;
    snprintf(dst, cap, "reference: scalar float32, 1 thread");
}

static int reference_memory(const struct backend *b, struct moe_memory_line *dst, int cap) {
    const struct reference *r = of_const(b);
    const struct model_shape *m = &r->shape;
    uint64_t weights = 0, bufs = 0, n_tokens = (uint64_t)max_work_tokens(r);
    for (const struct weight *w = r->weights; w; w = w->next)
        weights += (uint64_t)w->n_experts * (uint64_t)w->n_rows * w->row_bytes;
    if (r->exchange) {
        uint64_t n_returned = (uint64_t)r->limits.max_batch_tokens * (uint64_t)m->n_experts_used;
        weights -= exchange_away_bytes(r->exchange);
        bufs += (n_tokens + n_returned) * (uint64_t)m->n_embd * sizeof(float) +
                exchange_bytes(r->exchange);
    }
    for (const struct buf *f = r->bufs; f; f = f->next)
        bufs += (uint64_t)f->n_rows * (uint64_t)f->n_cols * sizeof(float);
    bufs += n_tokens * (uint64_t)r->max_cols * (sizeof(float) + sizeof(double)) +
            n_tokens * (uint64_t)m->n_ff_expert * sizeof(float);
    const struct moe_memory_line lines[] = {
        {"weights", weights},
        {"kv", r->kv_tokens * (uint64_t)m->n_layers * 2 * (uint64_t)m->n_kv_heads *
                   (uint64_t)m->head_dim * sizeof(float)},
        {"activations", bufs},
        {"sampler", sampler_bytes(r->sampler)},
        {"batch and routing", batch_bytes(&r->limits) + route_bytes(&r->route)},
    };
    int n = (int)(sizeof lines / sizeof *lines);
    if (n > cap) n = cap;
    memcpy(dst, lines, (size_t)n * sizeof *dst);
    return n;
}

static void reference_counters(const struct backend *b, struct moe_counters *out) {
    const struct reference *r = of_const(b);
    *out = r->counters;
    if (r->exchange) exchange_counters(r->exchange, out);
}

static enum status reference_slot_start(struct backend *b, const struct moe_slot_start *start) {
    sampler_start(of(b)->sampler, start);
    return ST_OK;
}

/* ---- steps ------------------------------------------------------------------------------------ */

static enum status reference_step_begin(struct backend *b, const struct moe_step *step,
                                        bool *issue) {
    struct reference *r = of(b);
    r->begun_ns = clock_now_ns();
    r->peers = exchange_in_use(r->exchange);
    batch_set(&r->batch, step, r->sampler);
    *issue = true;
    return ST_OK;
}

static enum status reference_embed(struct backend *b, const struct op_embed *op) {
    struct reference *r = of(b);
    for (int32_t t = 0; t < r->batch.n_tokens; t++)
        memcpy(buf_row(op->h, t), weight_row(r, op->table, 0, r->batch.ids[t]),
               (size_t)op->table->n_cols * sizeof(float));
    return ST_OK;
}

/* Norm row `from` of h into row `to` of y, [..][D]. */
static void norm_row(const struct buf *h, int32_t from, const float *norm, float eps, float *y,
                     int32_t to) {
    rms_norm(buf_row(h, from), norm, eps, h->n_cols, y + (size_t)to * (size_t)h->n_cols);
}

static enum status reference_norm_linear(struct backend *b, const struct op_norm_linear *op) {
    struct reference *r = of(b);
    const float *norm = weight_row(r, op->norm, 0, 0);
    for (int32_t t = 0; t < r->batch.n_tokens; t++) norm_row(op->x, t, norm, op->eps, r->x, t);
    for (int i = 0; i < op->n_out; i++)
        matmul(r, op->w[i], 0, r->x, r->batch.n_tokens, op->out[i]->p);
    return ST_OK;
}

/* NEOX pairs (i, i + Hd/2), angle pos * freq[i]. */
static void rope(const struct reference *r, int32_t pos, float *x) {
    int32_t half = r->shape.head_dim / 2;
    for (int32_t i = 0; i < half; i++) {
        double angle = (double)pos * r->rope_freq[i];
        double c = cos(angle), s = sin(angle);
        double a = (double)x[i], d = (double)x[i + half];
        x[i] = (float)(a * c - d * s);
        x[i + half] = (float)(a * s + d * c);
    }
}

static enum status reference_rope_store(struct backend *b, const struct op_rope_store *op) {
    struct reference *r = of(b);
    int32_t hd = r->shape.head_dim;
    size_t kv_width = (size_t)r->shape.n_kv_heads * (size_t)hd;
    const float *norm = weight_row(r, op->q_norm, 0, 0);
    for (int32_t t = 0; t < r->batch.n_tokens; t++) {
        for (int32_t j = 0; j < r->shape.n_heads; j++) {
            float *q = buf_row(op->q, t) + (size_t)j * (size_t)hd;
            rms_norm(q, norm, op->eps, hd, q);
            rope(r, r->batch.pos[t], q);
        }
    }
    norm = weight_row(r, op->k_norm, 0, 0);
    for (int32_t t = 0; t < r->batch.n_tokens; t++) {
        size_t index = batch_kv_index(&r->batch, t, r->batch.pos[t]);
        float *k = kv_at(r, op->layer, false, index);
        for (int32_t g = 0; g < r->shape.n_kv_heads; g++) {
            size_t at = (size_t)g * (size_t)hd;
            rms_norm(buf_row(op->k, t) + at, norm, op->eps, hd, k + at);
            rope(r, r->batch.pos[t], k + at);
        }
        memcpy(kv_at(r, op->layer, true, index), buf_row(op->v, t), kv_width * sizeof(float));
    }
    return ST_OK;
}

/* One head of one token; `at` is where its KV head lies in a key. */
static void attend(struct reference *r, int layer, int32_t t, size_t at, const float *q,
                   float *out) {
    int32_t hd = r->shape.head_dim, n = r->batch.pos[t] + 1;
    double max = -INFINITY, sum = 0.0;
    widen(q, (size_t)hd, r->head);
    for (int32_t p = 0; p < n; p++) {
        widen(kv_at(r, layer, false, batch_kv_index(&r->batch, t, p)) + at, (size_t)hd,
              r->wide_row);
        r->scores[p] = dot(r->head, r->wide_row, hd) / sqrt((double)hd);
        if (r->scores[p] > max) max = r->scores[p];
    }
    memset(r->head, 0, (size_t)hd * sizeof *r->head);
    for (int32_t p = 0; p < n; p++) {
        widen(kv_at(r, layer, true, batch_kv_index(&r->batch, t, p)) + at, (size_t)hd, r->wide_row);
        double w = exp(r->scores[p] - max);
        sum += w;
        add_scaled(w, r->wide_row, hd, r->head);
    }
    for (int32_t i = 0; i < hd; i++) out[i] = (float)(r->head[i] / sum);
}

static enum status reference_attention(struct backend *b, const struct op_attention *op) {
    struct reference *r = of(b);
    size_t hd = (size_t)r->shape.head_dim;
    int32_t heads_per_kv = r->shape.n_heads / r->shape.n_kv_heads;
    for (int32_t t = 0; t < r->batch.n_tokens; t++)
        for (int32_t j = 0; j < r->shape.n_heads; j++)
            attend(r, op->layer, t, (size_t)(j / heads_per_kv) * hd,
                   buf_row(op->q, t) + (size_t)j * hd, buf_row(op->out, t) + (size_t)j * hd);
    return ST_OK;
}

static enum status reference_linear_add(struct backend *b, const struct op_linear_add *op) {
    struct reference *r = of(b);
    size_t n = (size_t)r->batch.n_tokens * (size_t)op->w->n_rows;
    matmul(r, op->w, 0, op->x->p, r->batch.n_tokens, r->x);
    for (size_t i = 0; i < n; i++) op->h->p[i] += r->x[i];
    return ST_OK;
}

static struct exchange_rows rows_of(const struct buf *b) {
    size_t n_bytes = (size_t)b->n_cols * sizeof *b->p;
    return (struct exchange_rows){.p = b->p, .stride = n_bytes, .n_bytes = n_bytes};
}

static enum status reference_route(struct backend *b, const struct op_route *op) {
    struct reference *r = of(b);
    int32_t n_tokens = r->batch.n_tokens, k = r->shape.n_experts_used;
    const float *norm = weight_row(r, op->norm, 0, 0);
    for (int32_t t = 0; t < n_tokens; t++) norm_row(op->h, t, norm, op->eps, op->x->p, t);
    /* r->x has room for the [T][E] logits if E <= max_cols; the router's rows go through r->row. */
    matmul(r, op->router, 0, op->x->p, n_tokens, r->x);
    for (int32_t t = 0; t < n_tokens; t++)
        route_top_k(r->x + (size_t)t * (size_t)r->shape.n_experts, r->shape.n_experts, k,
                    op->renormalize, r->route.ids + (size_t)t * (size_t)k,
                    r->route.weights + (size_t)t * (size_t)k);
    route_sort(&r->route, n_tokens);
    r->counters.expert_reads_ungrouped += (uint64_t)n_tokens * (uint64_t)k;
    if (!r->peers) return ST_OK;
    enum status st = exchange_route(r->peers, op->layer, &r->route, rows_of(op->x));
    if (st == ST_OK) exchange_gather(r->peers, r->inputs, rows_of(op->x).stride);
    return st;
}

/* What this rank computes experts for. */
static const struct route *work_of(const struct reference *r) {
    return r->peers ? &r->peers->work : &r->route;
}

static enum status reference_experts_up(struct backend *b, const struct op_experts_up *op) {
    struct reference *r = of(b);
    const struct route *route = work_of(r);
    const float *inputs = r->peers ? r->inputs : op->x->p;
    size_t d = (size_t)op->gate->n_cols, f = (size_t)op->gate->n_rows;
    for (int32_t e = 0; e < route->n_experts; e++) {
        int32_t first = route->expert_first[e], n = route->expert_first[e + 1] - first;
        if (n == 0) continue;
        r->counters.expert_reads++;
        for (int32_t i = 0; i < n; i++)
            memcpy(r->x + (size_t)i * d,
                   inputs + (size_t)(route->pair_of[first + i] / route->n_used) * d,
                   d * sizeof(float));
        float *act = buf_row(op->act, first);
        matmul(r, op->gate, e, r->x, n, act);
        matmul(r, op->up, e, r->x, n, r->up);
        for (size_t i = 0; i < (size_t)n * f; i++) {
            double gate = (double)act[i];
            act[i] = (float)(gate / (1.0 + exp(-gate)) * (double)r->up[i]);
        }
    }
    return ST_OK;
}

/* h[t] += the weighted products of token t, in rank order; y is in routing order. */
static void combine(const struct reference *r, const float *y, struct buf *h) {
    const struct route *route = &r->route;
    size_t n_cols = (size_t)h->n_cols;
    for (int32_t t = 0; t < r->batch.n_tokens; t++) {
        float *row = buf_row(h, t);
        for (size_t i = 0; i < n_cols; i++) {
            double sum = 0.0;
            for (int32_t k = 0; k < route->n_used; k++) {
                int32_t pair = t * route->n_used + k;
                sum += (double)route->weights[pair] *
                       (double)y[(size_t)route->row_of[pair] * n_cols + i];
            }
            row[i] = (float)((double)row[i] + sum);
        }
    }
}

static enum status reference_experts_down(struct backend *b, const struct op_experts_down *op) {
    struct reference *r = of(b);
    const struct route *route = work_of(r);
    for (int32_t e = 0; e < route->n_experts; e++) {
        int32_t first = route->expert_first[e], n = route->expert_first[e + 1] - first;
        if (n > 0) matmul(r, op->down, e, buf_row(op->act, first), n, buf_row(op->y, first));
    }
    const float *y = op->y->p;
    if (r->peers) {
        enum status st = exchange_products(r->peers, op->layer, rows_of(op->y));
        if (st != ST_OK) return st;
        exchange_return(r->peers, op->layer, &r->route, r->returned, rows_of(op->y).stride);
        y = r->returned;
    }
    combine(r, y, op->h);
    return ST_OK;
}

static enum status reference_head(struct backend *b, const struct op_head *op) {
    struct reference *r = of(b);
    const float *norm = weight_row(r, op->norm, 0, 0);
    for (int32_t i = 0; i < r->batch.n_rows; i++)
        norm_row(op->h, r->batch.rows[i].token, norm, op->eps, r->x, i);
    matmul(r, op->w, 0, r->x, r->batch.n_rows, op->logits->p);
    return ST_OK;
}

static enum status reference_sample(struct backend *b, const struct op_sample *op) {
    struct reference *r = of(b);
    struct moe_row *rows = batch_results_next(&r->results);
    for (int32_t i = 0; i < r->batch.n_rows; i++) {
        int32_t slot = r->batch.rows[i].slot;
        if (r->batch.rows[i].sample) {
            sampler_row(r->sampler, r->scratch, slot, buf_row(op->logits, i), &rows[i]);
            r->counters.n_sampled += rows[i].st == ST_OK;
        } else {
            rows[i] = (struct moe_row){.slot = slot, .token = -1};
        }
    }
    return ST_OK;
}

static enum status reference_step_end(struct backend *b) {
    struct reference *r = of(b);
    uint64_t run_ns = clock_now_ns() - r->begun_ns;
    r->counters.n_steps++;
    r->counters.n_tokens += (uint64_t)r->batch.n_tokens;
    r->counters.busy_ns += run_ns;
    batch_results_push(&r->results, r->batch.n_rows, run_ns);
    return ST_OK;
}

static enum status reference_step_collect(struct backend *b, struct moe_result *out) {
    batch_results_pop(&of(b)->results, out);
    return ST_OK;
}

/* ---- looking inside ------------------------------------------------------------------------------ */

static enum status reference_buf_read(struct backend *b, const struct buf *buf, int32_t row,
                                      int32_t n_rows, float *dst) {
    (void)b;
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    memcpy(dst, buf_row(buf, row), (size_t)n_rows * (size_t)buf->n_cols * sizeof *dst);
    return ST_OK;
}

static enum status reference_buf_write(struct backend *b, struct buf *buf, int32_t row,
                                       int32_t n_rows, const float *src) {
    (void)b;
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    memcpy(buf_row(buf, row), src, (size_t)n_rows * (size_t)buf->n_cols * sizeof *src);
    return ST_OK;
}

static enum status reference_route_read(struct backend *b, int32_t *ids, float *weights,
                                        int32_t *expert_first) {
    const struct route *route = &of(b)->route;
    size_t n = (size_t)route->n_tokens * (size_t)route->n_used;
    if (ids) memcpy(ids, route->ids, n * sizeof *ids);
    if (weights) memcpy(weights, route->weights, n * sizeof *weights);
    if (expert_first)
        memcpy(expert_first, route->expert_first,
               ((size_t)route->n_experts + 1) * sizeof *expert_first);
    return ST_OK;
}

static enum status reference_route_write(struct backend *b, const int32_t *ids,
                                         const float *weights) {
    struct reference *r = of(b);
    size_t n = (size_t)r->batch.n_tokens * (size_t)r->shape.n_experts_used;
    memcpy(r->route.ids, ids, n * sizeof *ids);
    memcpy(r->route.weights, weights, n * sizeof *weights);
    route_sort(&r->route, r->batch.n_tokens);
    return ST_OK;
}

static enum status reference_kv_poison(struct backend *b, uint8_t byte) {
    struct reference *r = of(b);
    memset(r->kv, byte,
           r->kv_tokens * (size_t)r->shape.n_layers * 2 * (size_t)r->shape.n_kv_heads *
               (size_t)r->shape.head_dim * sizeof *r->kv);
    return ST_OK;
}

static const struct backend_ops reference_ops = {
    .kind = "reference",
    .close = reference_close,
    .weight_load = reference_weight_load,
    .buf_create = reference_buf_create,
    .ready = reference_ready,
    .describe = reference_describe,
    .memory = reference_memory,
    .counters = reference_counters,
    .slot_start = reference_slot_start,
    .step_begin = reference_step_begin,
    .embed = reference_embed,
    .norm_linear = reference_norm_linear,
    .rope_store = reference_rope_store,
    .attention = reference_attention,
    .linear_add = reference_linear_add,
    .route = reference_route,
    .experts_up = reference_experts_up,
    .experts_down = reference_experts_down,
    .head = reference_head,
    .sample = reference_sample,
    .step_end = reference_step_end,
    .step_collect = reference_step_collect,
    .buf_read = reference_buf_read,
    .buf_write = reference_buf_write,
    .route_read = reference_route_read,
    .route_write = reference_route_write,
    .kv_poison = reference_kv_poison,
};

enum status backend_reference_open(const struct backend_config *c, struct error *e,
                                   struct backend **out) {
    *out = NULL;
    struct reference *r = calloc(1, sizeof *r);
    if (!r) return error_set(e, ST_NO_MEMORY, "no memory for the reference backend");
    r->ops = &reference_ops;
    r->shape = c->shape;
    r->limits = c->limits;
    /* Rows also hold router logits, [T][E], and one head of a key or value. */
    r->max_cols = c->shape.n_experts > c->shape.head_dim ? c->shape.n_experts : c->shape.head_dim;
    if (c->group) {
        enum status st =
            exchange_open(c->group, c->rank, &c->shape, c->limits.max_batch_tokens, &r->exchange);
        if (st != ST_OK) {
            free(r);
            return error_set(e, st, "rank %d cannot join its group: %s", c->rank, status_name(st));
        }
    }
    *out = (struct backend *)(void *)r;
    return ST_OK;
}
