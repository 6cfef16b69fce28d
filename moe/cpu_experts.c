/* cpu_experts: routing and the grouped products; see cpu.h.
 *
 * Items of the two expert jobs are (expert with tokens × rows): an item unpacks its weights once per tile
 * of up to max_tile of the expert's tokens, and the largest groups go first, so that the end of the job is
 * even. Gate, up, their product and its quantisation are one pass over 32 rows at a time. */
#include "moe/cpu.h"

#include <stdlib.h>
#include <string.h>

/* ---- routing ------------------------------------------------------------------------------------ */

enum { ROUTE_TOKENS = 4 }; /* tokens per pass over the router's rows */

struct routing {
    struct cpu *c;
    const struct op_route *op;
    int32_t n_items, n_row_items;
};

static void route_norm(struct cpu *c, const struct op_route *op, int32_t t) {
    float *x = cpu_row(op->x, t);
    int32_t n_cols = op->h->n_cols;
    c->kernels->rms_norm(cpu_row(op->h, t), op->norm->vector, op->eps, n_cols, x);
    if (!c->x_q) return;
    size_t row_bytes = cpu_q_bytes(c, n_cols, c->kernels->up_planes);
    c->kernels->quantize_row(x, n_cols, c->kernels->up_planes, c->x_q + (size_t)t * row_bytes);
}

static void route_choose(struct cpu *c, const struct op_route *op, int32_t t, const float *logits) {
    size_t k = (size_t)c->route.n_used;
    route_top_k(logits, c->route.n_experts, c->route.n_used, op->renormalize,
                c->route.ids + (size_t)t * k, c->route.weights + (size_t)t * k);
}

/* All of it, for a few tokens. */
static void route_item(void *ctx, int32_t item, int thread) {
    const struct routing *r = ctx;
    struct cpu *c = r->c;
    const struct cpu_matrix *m = &r->op->router->matrix;
    size_t stride = (size_t)m->n_tiles * CPU_ROWS;
    float *logits = c->scratch[thread].rows;
    int32_t n = c->batch.n_tokens;
    int32_t from = (int32_t)((int64_t)n * item / r->n_items);
    int32_t to = (int32_t)((int64_t)n * (item + 1) / r->n_items);
    for (int32_t t = from; t < to; t += ROUTE_TOKENS) {
        int width = to - t < ROUTE_TOKENS ? (int)(to - t) : ROUTE_TOKENS;
        for (int i = 0; i < width; i++) route_norm(c, r->op, t + i);
        struct cpu_input in = {.f = cpu_row(r->op->x, t), .f_stride = r->op->x->stride, .n = width};
        cpu_tile_product(c, m, &(struct cpu_rows){.n_tiles = m->n_tiles, .end = m->n_tiles}, &in,
                         logits, stride);
        for (int i = 0; i < width; i++) route_choose(c, r->op, t + i, logits + (size_t)i * stride);
    }
}

static int by_falling_size(const void *a, const void *b, void *ctx) {
    const int32_t *first = ctx, x = *(const int32_t *)a, y = *(const int32_t *)b;
    int32_t nx = first[x + 1] - first[x], ny = first[y + 1] - first[y];
    return nx != ny ? (nx < ny) - (nx > ny) : (x > y) - (x < y);
}

void cpu_route_done(struct cpu *c) {
    const struct route *work = cpu_work(c);
    c->n_groups = 0;
    for (int32_t e = 0; e < work->n_experts; e++)
        if (work->expert_first[e + 1] > work->expert_first[e]) c->groups[c->n_groups++] = e;
    qsort_r(c->groups, (size_t)c->n_groups, sizeof *c->groups, by_falling_size, work->expert_first);
}

static struct exchange_rows rows_of_buf(const struct buf *b) {
    return (struct exchange_rows){
        .p = b->f, .stride = b->stride * sizeof *b->f, .n_bytes = (size_t)b->n_cols * sizeof *b->f};
}

enum status cpu_route(struct backend *b, const struct op_route *op) {
    struct cpu *c = cpu_of(b);
    const struct cpu_matrix *m = &op->router->matrix;
    CHECK(m->p && !cpu_matrix_quantized(m) && m->n_rows == c->route.n_experts);
    struct routing r = {.c = c, .op = op};
    int32_t n = c->batch.n_tokens;
    r.n_items = cpu_n_items(c, n, (double)m->n_cols * (2.0 + (double)m->n_tiles));
    cpu_pool_run(c->pool, r.n_items, route_item, &r);
    c->x_q_of = c->x_q ? op->x : NULL;
    route_sort(&c->route, n);
    c->counters.expert_reads_ungrouped += (uint64_t)n * (uint64_t)c->route.n_used;
    if (c->peers) {
        enum status st = exchange_route(c->peers, op->layer, &c->route, rows_of_buf(op->x));
        if (st != ST_OK) return st;
        exchange_gather(c->peers, c->inputs.f, c->inputs.stride * sizeof *c->inputs.f);
    }
    cpu_route_done(c);
    return ST_OK;
}

/* ---- quantised copies of buffers that were written from outside --------------------------------------- */

struct requantize {
    struct cpu *c;
    const struct buf *src;
    uint8_t *dst;
    int planes;
    int32_t n, n_items;
};

static void requantize_item(void *ctx, int32_t item, int thread) {
    const struct requantize *r = ctx;
    (void)thread;
    size_t row_bytes = cpu_q_bytes(r->c, r->src->n_cols, r->planes);
    int32_t from = (int32_t)((int64_t)r->n * item / r->n_items);
    int32_t to = (int32_t)((int64_t)r->n * (item + 1) / r->n_items);
    for (int32_t i = from; i < to; i++)
        r->c->kernels->quantize_row(cpu_row(r->src, i), r->src->n_cols, r->planes,
                                    r->dst + (size_t)i * row_bytes);
}

static void requantize(struct cpu *c, const struct buf *src, uint8_t *dst, int planes, int32_t n) {
    struct requantize r = {c, src, dst, planes, n, 0};
    r.n_items = cpu_n_items(c, n, 1.5 * (double)src->n_cols);
    cpu_pool_run(c->pool, r.n_items, requantize_item, &r);
}

/* ---- the expert products -------------------------------------------------------------------------------- */

struct experts {
    struct cpu *c;
    const struct buf *src; /* the input */
    const uint8_t *src_q; /* and its quantised rows */
    int planes;
    bool by_token; /* rows of src are tokens, not routed rows */
    const struct cpu_matrix *gate, *up; /* the same shape; or down and NULL */
    struct buf *dst;
    bool quantize; /* up: dst's rows go to act_q */
    int32_t part_tiles; /* row tiles per part: 2, or 1 for down */
    int32_t n_parts; /* of an expert's rows */
    int32_t n_row_items; /* per expert */
};

/* Routed rows `first` … first + n - 1 of the input, as a tile. */
static struct cpu_input gather(const struct experts *x, int32_t first, int n, int thread) {
    struct cpu *c = x->c;
    struct cpu_scratch *s = &c->scratch[thread];
    int32_t n_cols = x->gate->n_cols;
    bool quantized = cpu_matrix_quantized(x->gate);
    size_t row_bytes = cpu_q_bytes(c, n_cols, x->planes);
    struct cpu_input in = {
        .q = s->tile, .planes = x->planes, .f = s->rows, .f_stride = (size_t)c->max_cols, .n = n};
    const uint8_t *rows[CPU_TILE];
    for (int i = 0; i < n; i++) {
        int32_t row = first + i;
        if (x->by_token) row = cpu_work(c)->pair_of[row] / c->route.n_used;
        if (quantized)
            rows[i] = x->src_q + (size_t)row * row_bytes;
        else
            memcpy(s->rows + (size_t)i * in.f_stride, cpu_row(x->src, row), (size_t)n_cols * 4);
    }
    if (quantized && n == 1) /* a row is a tile */
        in.q = rows[0];
    else if (quantized)
        c->kernels->gather(rows, n, n_cols, x->planes, s->tile);
    return in;
}

/* The parts of expert `e` that an item covers, and the row tile the item after next starts with. */
struct span {
    int32_t e, from, to, next_e, next_tile;
};

static struct span item_span(const struct experts *x, int32_t item) {
    const struct cpu *c = x->c;
    int32_t n = x->n_row_items, part = item % n, next = item + c->n_threads;
    struct span s = {.e = c->groups[item / n],
                     .from = (int32_t)((int64_t)x->n_parts * part / n),
                     .to = (int32_t)((int64_t)x->n_parts * (part + 1) / n),
                     .next_e = -1};
    if (next >= c->n_groups * n) return s;
    s.next_e = c->groups[next / n];
    s.next_tile = (int32_t)((int64_t)x->n_parts * (next % n) / n) * x->part_tiles;
    return s;
}

/* Row tiles `tile` … of m, which the item uses up to tile `end`. */
static struct cpu_rows rows_of(const struct cpu_matrix *m, const struct span *s, int32_t tile,
                               int32_t n_tiles, int32_t end) {
    struct cpu_rows r = {.expert = s->e, .tile = tile, .n_tiles = n_tiles, .end = end};
    if (s->next_e >= 0) r.next = cpu_matrix_tile(m, s->next_e, s->next_tile);
    return r;
}

/* 32 rows of gate and up for the routed rows from `first`: to the inner activations. */
static void up_rows(const struct experts *x, const struct span *sp, int32_t part,
                    const struct cpu_input *in, int32_t first, struct cpu_scratch *s) {
    struct cpu *c = x->c;
    int32_t row = part * CPU_BLOCK, n_rows = x->gate->n_rows - row, tile = part * x->part_tiles;
    if (n_rows > CPU_BLOCK) n_rows = CPU_BLOCK;
    int32_t n_tiles = (n_rows + CPU_ROWS - 1) / CPU_ROWS, end = sp->to * x->part_tiles;
    if (end > x->gate->n_tiles) end = x->gate->n_tiles;
    struct cpu_rows rows = rows_of(x->gate, sp, tile, n_tiles, end);
    cpu_tile_product(c, x->gate, &rows, in, s->gate, CPU_BLOCK);
    rows = rows_of(x->up, sp, tile, n_tiles, end);
    cpu_tile_product(c, x->up, &rows, in, s->up, CPU_BLOCK);
    /* Columns beyond the last row are products with zero rows, or left over: nobody reads them. */
    c->kernels->silu_mul(s->gate, s->up, in->n * CPU_BLOCK);
    if (x->quantize) {
        size_t row_bytes = cpu_q_bytes(c, x->dst->n_cols, CPU_PLANES_DOWN);
        c->kernels->quantize_block(s->gate, in->n, part, x->dst->n_cols, CPU_PLANES_DOWN,
                                   c->act_q + (size_t)first * row_bytes);
        return;
    }
    for (int t = 0; t < in->n; t++)
        memcpy(cpu_row(x->dst, first + t) + row, s->gate + t * CPU_BLOCK, (size_t)n_rows * 4);
}

static void down_rows(const struct experts *x, const struct span *s, const struct cpu_input *in,
                      int32_t first) {
    for (int32_t tile = s->from; tile < s->to;) {
        int32_t n = cpu_tiles_at_once(x->gate, s->to - tile);
        struct cpu_rows rows = rows_of(x->gate, s, tile, n, s->to);
        cpu_tile_product(x->c, x->gate, &rows, in, cpu_row(x->dst, first) + tile * CPU_ROWS,
                         x->dst->stride);
        tile += n;
    }
}

static void experts_item(void *ctx, int32_t item, int thread) {
    const struct experts *x = ctx;
    struct cpu *c = x->c;
    struct span s = item_span(x, item);
    const int32_t *expert_first = cpu_work(c)->expert_first;
    int32_t end = expert_first[s.e + 1];
    for (int32_t first = expert_first[s.e]; first < end;) {
        int n = cpu_tile_width(c->kernels, end - first);
        struct cpu_input in = gather(x, first, n, thread);
        if (x->up)
            for (int32_t p = s.from; p < s.to; p++)
                up_rows(x, &s, p, &in, first, &c->scratch[thread]);
        else
            down_rows(x, &s, &in, first);
        first += n;
    }
}

static int32_t n_work_rows(const struct cpu *c) {
    return cpu_work(c)->expert_first[c->route.n_experts];
}

static void run_experts(struct experts *x) {
    struct cpu *c = x->c;
    if (c->n_groups == 0) return;
    int32_t n_routed = n_work_rows(c);
    double n = (double)n_routed / (double)c->n_groups;
    double cost = cpu_tile_cost(c, x->gate, n, x->planes);
    if (x->up) cost *= 2 * CPU_BLOCK / CPU_ROWS;
    int32_t n_items = cpu_n_items(c, c->n_groups * x->n_parts, cost);
    x->n_row_items = (n_items + c->n_groups - 1) / c->n_groups;
    if (x->n_row_items > x->n_parts) x->n_row_items = x->n_parts;
    cpu_pool_run(c->pool, c->n_groups * x->n_row_items, experts_item, x);
}

enum status cpu_experts_up(struct backend *b, const struct op_experts_up *op) {
    struct cpu *c = cpu_of(b);
    const struct cpu_matrix *gate = &op->gate->matrix, *up = &op->up->matrix;
    CHECK(gate->p && up->p && gate->n_rows == up->n_rows && gate->n_cols == up->n_cols);
    bool quantized = cpu_matrix_quantized(gate) || cpu_matrix_quantized(up);
    if (quantized && c->peers) {
        requantize(c, &c->inputs, c->inputs_q, c->kernels->up_planes, cpu_work(c)->n_tokens);
    } else if (quantized && c->x_q_of != op->x) {
        requantize(c, op->x, c->x_q, c->kernels->up_planes, c->batch.n_tokens);
        c->x_q_of = op->x;
    }
    struct experts x = {.c = c,
                        .src = c->peers ? &c->inputs : op->x,
                        .src_q = c->peers ? c->inputs_q : c->x_q,
                        .planes = c->kernels->up_planes,
                        .by_token = true,
                        .gate = gate,
                        .up = up,
                        .dst = op->act,
                        .quantize = c->act_q && !c->float_experts && c->kernels->quantize_block,
                        .part_tiles = CPU_BLOCK / CPU_ROWS,
                        .n_parts = (gate->n_rows + CPU_BLOCK - 1) / CPU_BLOCK};
    c->counters.expert_reads += (uint64_t)c->n_groups;
    run_experts(&x);
    c->act_q_of = x.quantize ? op->act : NULL;
    return ST_OK;
}

struct combine {
    struct cpu *c;
    const struct buf *y; /* products in this rank's routing order */
    const struct buf *h;
    int32_t n_items;
};

static void combine_item(void *ctx, int32_t item, int thread) {
    const struct combine *m = ctx;
    struct cpu *c = m->c;
    (void)thread;
    int32_t n = c->batch.n_tokens, k = c->route.n_used;
    int32_t from = (int32_t)((int64_t)n * item / m->n_items);
    int32_t to = (int32_t)((int64_t)n * (item + 1) / m->n_items);
    for (int32_t t = from; t < to; t++)
        c->kernels->combine(
            &(struct cpu_combine){.h = cpu_row(m->h, t),
                                  .y = m->y->f,
                                  .stride = m->y->stride,
                                  .rows = c->route.row_of + (size_t)t * (size_t)k,
                                  .weights = c->route.weights + (size_t)t * (size_t)k,
                                  .k = k,
                                  .n = m->h->n_cols});
}

enum status cpu_experts_down(struct backend *b, const struct op_experts_down *op) {
    struct cpu *c = cpu_of(b);
    const struct cpu_matrix *down = &op->down->matrix;
    CHECK(down->p && down->n_cols == op->act->n_cols && down->n_rows == op->h->n_cols);
    if (cpu_matrix_quantized(down) && c->act_q_of != op->act) {
        requantize(c, op->act, c->act_q, CPU_PLANES_DOWN, n_work_rows(c));
        c->act_q_of = op->act;
    }
    struct experts x = {.c = c,
                        .src = op->act,
                        .src_q = c->act_q,
                        .planes = CPU_PLANES_DOWN,
                        .gate = down,
                        .dst = op->y,
                        .part_tiles = 1,
                        .n_parts = down->n_tiles};
    run_experts(&x);
    struct combine m = {.c = c, .y = op->y, .h = op->h};
    if (c->peers) {
        enum status st = exchange_products(c->peers, op->layer, rows_of_buf(op->y));
        if (st != ST_OK) return st;
        exchange_return(c->peers, op->layer, &c->route, c->returned.f,
                        c->returned.stride * sizeof *c->returned.f);
        m.y = &c->returned;
    }
    m.n_items =
        cpu_n_items(c, c->batch.n_tokens, (double)(op->h->n_cols / 8) * (double)c->route.n_used);
    cpu_pool_run(c->pool, m.n_items, combine_item, &m);
    return ST_OK;
}
