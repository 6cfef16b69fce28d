/* ops: each op of the table as launches. Three fusions cross op borders: the sum over a token's experts is left to the
 * norm that reads the result next (c->pending), the residual is added where the product that follows it is
 * written, and in a step of single tokens rope_store is left to attention (c->rope). Anything else that comes first
 * launches what was put off by itself (ops_flush). */
#include "cuda/exchange.h"

#include <string.h>

#include "cuda/panel.h"

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

static enum status begin_op(struct cuda *c) {
    c->n_ops++;
    if (c->lost) return ST_ENGINE_LOST;
    CHECK(c->mode == STEP_EAGER || c->mode == STEP_CAPTURE);
    return ST_OK;
}

enum status ops_flush(struct cuda *c) {
    if (c->rope_pending) {
        c->rope_pending = false;
        c->counted = 0;
        TRY(device_check(c, cuda_rope_store(&c->rope, c->bucket.n_tokens, &c->queue)));
    }
    if (!c->pending.y[0]) return ST_OK;
    struct norm_args a = c->pending;
    c->pending.y[0] = NULL;
    c->counted = 0;
    return device_check(c, cuda_norm(&a, c->bucket.n_tokens, &c->queue));
}

static struct gemm_segment segment(const struct weight *w, const struct buf *out) {
    CHECK((w->panels || w->experts) && out->n_cols == w->n_rows);
    return (struct gemm_segment){
        .w = w->panels, .experts = w->experts, .out = out->p, .type = w->type, .n_rows = w->n_rows, .scale = w->scale};
}

/* x [n][n_cols] times the segments; n is read through n_rows on the device and bounded by `bucket`. */
static enum status dense(struct cuda *c, struct gemm_args *a, int32_t bucket) {
    struct gemm_plan p = cuda_gemm_plan(a, bucket, 0, 0, &c->queue);
    return device_check(c, cuda_gemm(a, p, bucket, 0, 0, &c->queue));
}

/* x = rmsnorm(h), and before it whatever is pending for h. */
static enum status norm(struct cuda *c, const struct buf *h, const struct weight *norm, float eps, void *x) {
    CHECK(h->kind == BUF_EXACT && norm->f32 && norm->n_cols == h->n_cols);
    struct norm_args a = {0};
    if (c->pending.y[0] && c->pending.h == h->p) {
        a = c->pending;
        c->pending.y[0] = NULL;
    }
    TRY(ops_flush(c));
    a.n_rows = &c->view.header->n_tokens;
    a.h = h->p;
    a.n_cols = h->n_cols;
    a.norm = norm->f32;
    a.eps = eps;
    a.x = x;
    return device_check(c, cuda_norm(&a, c->bucket.n_tokens, &c->queue));
}

enum status ops_embed(struct backend *b, const struct op_embed *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->table->panels && op->h->kind == BUF_EXACT && op->h->n_cols == op->table->n_cols);
    const struct embed_args a = {.step = c->view,
                                 .table = op->table->panels,
                                 .type = op->table->type,
                                 .n_cols = op->table->n_cols,
                                 .slots = c->slots,
                                 .h = op->h->p};
    return device_check(c, cuda_embed(&a, c->bucket.n_tokens, &c->queue));
}

enum status ops_norm_linear(struct backend *b, const struct op_norm_linear *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->n_out >= 1 && op->n_out <= OP_MAX_OUT && op->x->n_cols == c->shape.n_embd);
    TRY(norm(c, op->x, op->norm, op->eps, c->x));
    struct gemm_args a = {.n_segments = op->n_out,
                          .x = c->x,
                          .n_cols = op->x->n_cols,
                          .n_tokens = &c->view.header->n_tokens};
    a.epilogue = op->out[0]->kind == BUF_EXACT ? GEMM_STORE_F32 : GEMM_STORE_F16;
    for (int i = 0; i < op->n_out; i++) {
        CHECK(op->w[i]->n_cols == op->x->n_cols && op->out[i]->kind == op->out[0]->kind);
        a.segments[i] = segment(op->w[i], op->out[i]);
    }
    return dense(c, &a, c->bucket.n_tokens);
}

static uint8_t *layer_kv(const struct cuda *c, int layer) {
    CHECK(layer >= 0 && layer < c->shape.n_layers);
    return c->kv + (size_t)layer * c->kv_layer_bytes;
}

enum status ops_rope_store(struct backend *b, const struct op_rope_store *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->q->kind == BUF_INNER && op->k->kind == BUF_INNER && op->v->kind == BUF_INNER);
    TRY(ops_flush(c));
    c->rope = (struct rope_args){.step = c->view,
                                .q = op->q->p,
                                .k = op->k->p,
                                .v = op->v->p,
                                .q_norm = op->q_norm->f32,
                                .k_norm = op->k_norm->f32,
                                .table = c->rope_table,
                                .eps = op->eps,
                                .n_heads = c->shape.n_heads,
                                .n_kv_heads = c->shape.n_kv_heads,
                                .kv = layer_kv(c, op->layer),
                                .block_shift = c->block_shift};
    c->rope_pending = true;
    return c->bucket.tiles ? ops_flush(c) : ST_OK;
}

enum status ops_attention(struct backend *b, const struct op_attention *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->q->kind == BUF_INNER && op->out->kind == BUF_INNER);
    bool fused = c->rope_pending && c->rope.q == op->q->p && c->rope.kv == layer_kv(c, op->layer);
    if (fused) c->rope_pending = false;
    TRY(ops_flush(c));
    const struct attn_args a = {.step = c->view,
                                .q = op->q->p,
                                .out = op->out->p,
                                .kv = layer_kv(c, op->layer),
                                .n_heads = c->shape.n_heads,
                                .n_kv_heads = c->shape.n_kv_heads,
                                .block_shift = c->block_shift,
                                .per_kv = c->shape.n_heads / c->shape.n_kv_heads,
                                .octets = attn_octets(c->shape.n_heads, c->shape.n_kv_heads),
                                .fused = fused,
                                .rope = c->rope,
                                .partials = c->attn_partials,
                                .tickets = c->attn_tickets};
    TRY(device_check(c, cuda_attn_splits(&a, c->bucket.n_tokens, &c->queue)));
    if (!c->bucket.tiles) return ST_OK;
    return device_check(c, cuda_attn_tiles(&a, &c->queue));
}

enum status ops_linear_add(struct backend *b, const struct op_linear_add *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->x->kind == BUF_INNER && op->h->kind == BUF_EXACT && op->x->n_cols == op->w->n_cols);
    TRY(ops_flush(c));
    struct gemm_args a = {.n_segments = 1,
                          .epilogue = GEMM_ADD_F32,
                          .x = op->x->p,
                          .n_cols = op->w->n_cols,
                          .n_tokens = &c->view.header->n_tokens};
    a.segments[0] = segment(op->w, op->h);
    return dense(c, &a, c->bucket.n_tokens);
}

/* The work lists that an expert product may walk in this bucket, whatever the types of its weights. */
static uint32_t widths_of(const struct cuda *c) {
    const struct model_shape *m = &c->shape;
    uint32_t widths = 0;
    for (int type = 0; type < PANEL_N_TYPES; type++) {
        struct gemm_args up = {.n_segments = 2, .epilogue = GEMM_SILU_F16, .n_cols = m->n_embd};
        struct gemm_args down = {.n_segments = 1, .epilogue = GEMM_STORE_F16, .n_cols = m->n_ff_expert};
        up.segments[0].type = up.segments[1].type = down.segments[0].type = type;
        up.segments[0].n_rows = up.segments[1].n_rows = m->n_ff_expert;
        down.segments[0].n_rows = m->n_embd;
        struct gemm_args *const all[] = {&up, &down};
        for (int i = 0; i < 2; i++)
            widths |= 1u << cuda_gemm_plan(all[i], c->bucket.n_tokens, m->n_experts, m->n_experts_used, &c->queue).width;
    }
    return widths;
}

/* Of gate and of up, so much is brought into L2 while tokens are routed, that is, of the experts whose turn is first; with
 * more, the routing takes as much longer. Larger steps are bound by arithmetic. */
enum { AHEAD_BYTES = 4 << 20, AHEAD_TOKENS = 512 };

/* If all experts lie here in order. */
static void bring_experts(const struct cuda *c, const struct weight *const next[2], struct route_args *a) {
    if (c->bucket.n_tokens > AHEAD_TOKENS || c->exchange || !next[0] || !next[0]->panels || !next[1]->panels) return;
    for (int i = 0; i < 2; i++) {
        const struct weight *w = next[i];
        size_t rows = (size_t)w->n_experts * (size_t)((w->n_rows + PANEL_ROWS - 1) / PANEL_ROWS);
        size_t n = rows * (size_t)(w->n_cols / PANEL_K) * (size_t)panel_bytes(w->type);
        a->next[i] = w->panels;
        a->next_bytes[i] = n < AHEAD_BYTES ? (uint32_t)n : AHEAD_BYTES;
    }
}

enum status ops_route(struct backend *b, const struct op_route *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->h->kind == BUF_EXACT && op->x->kind == BUF_INNER && op->router->f32);
    CHECK(op->router->n_rows == c->shape.n_experts && op->router->n_cols == op->h->n_cols);
    TRY(ops_flush(c));
    c->lists_read = false;
    struct route_args a = {.header = c->view.header,
                                   .h = op->h->p,
                                   .norm = op->norm->f32,
                                   .router = op->router->f32,
                                   .eps = op->eps,
                                   .n_cols = op->h->n_cols,
                                   .n_experts = c->shape.n_experts,
                                   .n_used = c->shape.n_experts_used,
                                   .renormalize = op->renormalize,
                                   .x = c->together ? c->exchange->x_own : op->x->p,
                                   .partials = c->router_partials,
                                   .lists = c->lists,
                                   .tickets = c->route_tickets,
                                   .marks = c->route_marks,
                                   .used_inverse = route_inverse(c->shape.n_experts_used),
                                   .widths = c->widths = widths_of(c),
                                   .n_reads = c->n_reads + READS_EXPERTS,
                                   .unsorted = c->together};
    bring_experts(c, op->next, &a);
    if (c->n_tokens > 0) TRY(device_check(c, cuda_route(&a, c->bucket.n_tokens, &c->queue)));
    return c->together ? exchange_begin_layer(c, op->layer) : ST_OK;
}

/* If both products of a routing follow each other and walk the same list, the first counts for the second. */
static void link_products(struct cuda *c, struct gemm_args *a, struct gemm_plan p) {
    bool first = a->epilogue == GEMM_SILU_F16;
    a->counts = first && !c->lists_read && p.blocks > 0;
    a->awaited = !first && p.blocks > 0 && c->counting_op == c->n_ops - 1 && c->counted_width == p.width ? c->counted : 0;
    c->counted = a->counts ? p.blocks : 0;
    c->counted_width = p.width;
    c->counting_op = c->n_ops;
}

/* A product of every expert's group. */
static enum status grouped(struct cuda *c, struct gemm_args *a) {
    if (c->together) return exchange_grouped(c, a);
    int32_t n_tokens = c->bucket.n_tokens, used = c->shape.n_experts_used;
    if (n_tokens == 0) return ST_OK;
    int32_t n_pairs = n_tokens * used, experts = c->shape.n_experts;
    struct gemm_plan p = cuda_gemm_plan(a, n_tokens, experts, used, &c->queue);
    CHECK(c->widths >> p.width & 1);
    a->items = c->lists.items[p.width];
    a->n_items = c->lists.n_items + p.width;
    a->host_bytes = c->n_reads + READS_HOST_BYTES;
    /* A group has at most one tile that is not full. */
    int max_groups = n_pairs < experts ? n_pairs : experts;
    link_products(c, a, p);
    return device_check(c, cuda_gemm(a, p, n_tokens, max_groups, max_groups + n_pairs / (8 << p.width), &c->queue));
}

enum status ops_experts_up(struct backend *b, const struct op_experts_up *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->x->kind == BUF_INNER && op->act->kind == BUF_INNER);
    CHECK(op->gate->n_cols == op->x->n_cols && op->up->n_cols == op->x->n_cols);
    CHECK(op->gate->n_rows == op->up->n_rows && op->gate->n_experts == c->shape.n_experts);
    if (op->gate->type != op->up->type) {
        log_event(LOG_ERROR, "cuda", "unsupported", "what=\"gate and up of different types\" layer=%d",
                  op->layer);
        return ST_UNSUPPORTED;
    }
    struct gemm_args a = {.n_segments = 2,
                          .epilogue = GEMM_SILU_F16,
                          .x = c->together ? NULL : op->x->p, /* the group's inputs */
                          .n_cols = op->gate->n_cols,
                          .token_of = c->lists.token_of};
    if (c->load) a.load = c->load + (size_t)op->layer * (size_t)c->shape.n_experts;
    a.segments[0] = segment(op->gate, op->act);
    a.segments[1] = segment(op->up, op->act);
    TRY(grouped(c, &a));
    c->lists_read = true;
    return ST_OK;
}

enum status ops_experts_down(struct backend *b, const struct op_experts_down *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->act->kind == BUF_INNER && op->y->kind == BUF_INNER && op->h->kind == BUF_EXACT);
    CHECK(op->down->n_cols == op->act->n_cols && op->down->n_experts == c->shape.n_experts);
    TRY(ops_flush(c));
    struct gemm_args a = {.n_segments = 1,
                          .epilogue = GEMM_STORE_F16,
                          .x = op->act->p,
                          .n_cols = op->down->n_cols,
                          .listed = c->lists_read};
    a.segments[0] = segment(op->down, op->y);
    TRY(c->together ? exchange_down(c, op->layer, &a, op->y) : grouped(c, &a));
    if (c->n_tokens == 0) return ST_OK;
    c->pending = (struct norm_args){.n_rows = &c->view.header->n_tokens,
                                    .h = op->h->p,
                                    .n_cols = op->h->n_cols,
                                    .y = {op->y->p},
                                    .row_of = c->lists.row_of,
                                    .weights = c->lists.weights,
                                    .listed = c->lists_read && !c->together,
                                    .n_used = c->shape.n_experts_used};
    if (!c->together) return ST_OK;
    memcpy(c->pending.y, c->exchange->products, sizeof c->pending.y);
    c->pending.meeting = c->exchange->due;
    return ST_OK;
}

enum status ops_head(struct backend *b, const struct op_head *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->h->kind == BUF_EXACT && op->logits->kind == BUF_EXACT && c->bucket.n_rows > 0);
    TRY(ops_flush(c));
    const struct norm_args n = {.n_rows = &c->view.header->n_rows,
                                .rows = c->view.rows,
                                .h = op->h->p,
                                .n_cols = op->h->n_cols,
                                .norm = op->norm->f32,
                                .eps = op->eps,
                                .x = c->x};
    TRY(device_check(c, cuda_norm(&n, c->bucket.n_rows, &c->queue)));
    struct gemm_args a = {.n_segments = 1,
                          .epilogue = GEMM_STORE_F32,
                          .x = c->x,
                          .n_cols = op->h->n_cols,
                          .n_tokens = &c->view.header->n_rows};
    a.segments[0] = segment(op->w, op->logits);
    return dense(c, &a, c->bucket.n_rows);
}

enum status ops_sample(struct backend *b, const struct op_sample *op) {
    struct cuda *c = of(b);
    TRY(begin_op(c));
    CHECK(op->logits->kind == BUF_EXACT && op->logits->n_cols == c->shape.n_vocab);
    TRY(ops_flush(c));
    const struct sample_args a = {.step = c->view,
                                  .logits = op->logits->p,
                                  .n_vocab = c->shape.n_vocab,
                                  .slots = c->slots,
                                  .counts = c->counts,
                                  .parts = c->sample_parts,
                                  .tickets = c->sample_tickets,
                                  .results = c->results,
                                  .max_rows = c->limits.max_rows};
    return device_check(c, cuda_sample(&a, c->bucket.n_rows, &c->queue));
}
