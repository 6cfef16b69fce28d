/* cpu_ops: dense products and what surrounds them; see cpu.h.
 *
 * A product is two jobs. `prepare` brings the input rows into the form the kernels read: normed, and
 * quantised into tiles of tokens. `product` then runs over (groups of token tiles × row tiles), one group
 * after the other: its tokens stay in the second-level cache while all weights pass by. */
#include "moe/cpu.h"

#include <string.h>

/* Row tiles that are multiplied with one token tile after the other: as many as leave the second-level cache to
 * the tokens, since a call's beginning and end cost as much as several blocks. */
enum { MOST_TILES = 8, TILES_BYTES = 256 * 1024 };

/* ---- cutting work ------------------------------------------------------------------------------- */

int32_t cpu_n_items(const struct cpu *c, int32_t n_parts, double cost) {
    /* Clocks per item. `least`: against the price of a hand-over. Then enough items for an even end, but no
     * more: an item that gathers its tokens, or finds them in another core's cache, wants many
     * rows to use them on. */
    const double least = 1500, good = 12000, most = 2000000;
    double total = cost * (double)n_parts, per_thread = total / c->n_threads;
    double size = per_thread / 32;
    if (size > most) size = most;
    if (size < good) size = per_thread / 2 < good ? per_thread / 2 : good;
    if (size < least) size = least;
    double n = total / size;
    if (n > (double)n_parts) return n_parts;
    return n < 1 ? 1 : (int32_t)n;
}

double cpu_tile_cost(const struct cpu *c, const struct cpu_matrix *m, double n, int planes) {
    double n_blocks = (double)m->n_cols / CPU_BLOCK;
    if (!cpu_matrix_quantized(m)) return (double)m->n_cols * (1.0 + n);
    if (c->kernels->inputs == CPU_BY_UNIT) return n_blocks * (40.0 + 4.0 * n);
    return n_blocks * (20.0 + (planes == 2 ? 21.0 : 13.0) * n);
}

int32_t cpu_tiles_at_once(const struct cpu_matrix *m, int32_t n) {
    size_t most = TILES_BYTES / m->tile_bytes;
    if (most > MOST_TILES) most = MOST_TILES;
    if (most < 1) most = 1;
    return n < (int32_t)most ? n : (int32_t)most;
}

/* ---- tiles ---------------------------------------------------------------------------------------- */

/* Weights this far ahead are prefetched: memory's latency at the pace of one thread. */
enum { AHEAD_BYTES = 8192 };

static const uint8_t *ahead(const struct cpu_matrix *m, const struct cpu_rows *rows,
                            const uint8_t *w) {
    const uint8_t *end = cpu_matrix_tile(m, rows->expert, rows->end);
    ptrdiff_t left = end - w;
    if (left > AHEAD_BYTES) return w + AHEAD_BYTES;
    return rows->next ? rows->next + (AHEAD_BYTES - left) : w;
}

void cpu_tile_product(const struct cpu *c, const struct cpu_matrix *m, const struct cpu_rows *rows,
                      const struct cpu_input *in, float *out, size_t stride) {
    const uint8_t *w = cpu_matrix_tile(m, rows->expert, rows->tile);
    if (cpu_matrix_quantized(m)) {
        struct cpu_dot d = {.w = w,
                            .ahead = ahead(m, rows, w),
                            .n_tiles = rows->n_tiles,
                            .n_units = m->n_units,
                            .x = in->q,
                            .n = in->n,
                            .out = out,
                            .stride = stride};
        c->kernels->dot[m->format][in->planes - 1][in->n](&d);
        return;
    }
    cpu_dot_float_fn *const *dot = c->kernels->dot_float[m->format - CPU_F32];
    for (int32_t i = 0; i < rows->n_tiles; i++, w += m->tile_bytes, out += CPU_ROWS) {
        for (int t = 0; t < in->n; t += 4) {
            int n = in->n - t < 4 ? in->n - t : 4;
            dot[n - 1](&(struct cpu_dot_float){w, m->n_cols, in->f + (size_t)t * in->f_stride,
                                               in->f_stride, out + (size_t)t * stride, stride});
        }
    }
}

void cpu_dequantize_row(const struct cpu *c, const uint8_t *row, int32_t n_cols, int planes,
                        float *dst) {
    if (c->kernels->inputs == CPU_BY_UNIT) {
        for (int32_t i = 0; i < n_cols; i++) {
            const uint8_t *unit = row + (size_t)(i / QK_K) * cpu_x_unit_bytes(planes);
            float scale;
            memcpy(&scale, unit + planes * QK_K + CPU_X_SCALE, sizeof scale);
            const uint8_t *at = unit + cpu_x_at(1, planes, 0, i % QK_K);
            int v = (int8_t)at[0];
            if (planes == 2) v = v * (1 << CPU_X_LOW_BITS) + (int8_t)at[CPU_STEP];
            dst[i] = scale * (float)v;
        }
        return;
    }
    for (int32_t i = 0; i < n_cols; i += CPU_BLOCK, row += cpu_tile_block_bytes(planes, 1)) {
        float scale;
        memcpy(&scale, row + planes * CPU_BLOCK, sizeof scale);
        for (int j = 0; j < CPU_BLOCK; j++) {
            int v = (int8_t)row[j];
            if (planes == 2) v = v * 256 + (int8_t)row[CPU_BLOCK + j];
            dst[i + j] = scale * (float)v;
        }
    }
}

/* Cut n tokens into tiles. */
static void set_tiles(struct cpu *c, int32_t n) {
    c->n_tiles = 0;
    for (int32_t at = 0; at < n;) {
        int width = cpu_tile_width(c->kernels, n - at);
        c->tile_first[c->n_tiles] = at;
        for (int i = 0; i < width; i++) c->tile_of[at + i] = c->n_tiles;
        c->n_tiles++;
        at += width;
    }
    c->tile_first[c->n_tiles] = n;
}

/* ---- prepare ---------------------------------------------------------------------------------------- */

struct prepare {
    struct cpu *c;
    const struct buf *src;
    const float *norm; /* NULL: as it is */
    float eps;
    const struct batch_row *rows; /* NULL: row i of src is input i */
    int32_t n, n_items;
    int planes;
    bool want_q, want_f;
};

static void prepare_item(void *ctx, int32_t item, int thread) {
    struct prepare *p = ctx;
    struct cpu *c = p->c;
    int32_t n_cols = p->src->n_cols;
    size_t row_bytes = cpu_q_bytes(c, n_cols, p->planes);
    int32_t from = (int32_t)((int64_t)p->n * item / p->n_items);
    int32_t to = (int32_t)((int64_t)p->n * (item + 1) / p->n_items);
    for (int32_t i = from; i < to; i++) {
        const float *x = cpu_row(p->src, p->rows ? p->rows[i].token : i);
        if (p->norm) {
            float *y = c->scratch[thread].rows;
            c->kernels->rms_norm(x, p->norm, p->eps, n_cols, y);
            x = y;
        }
        if (p->want_f) memcpy(c->x_rows + (size_t)i * (size_t)c->max_cols, x, (size_t)n_cols * 4);
        if (!p->want_q) continue;
        int32_t first = c->tile_first[c->tile_of[i]], end = c->tile_first[c->tile_of[i] + 1];
        c->kernels->quantize(x, n_cols, p->planes, c->x_tiles + (size_t)first * row_bytes,
                             i - first, end - first);
    }
}

static void prepare(struct prepare *p, const struct weight *const *w, int n_weights) {
    struct cpu *c = p->c;
    for (int i = 0; i < n_weights; i++) {
        bool q = cpu_matrix_quantized(&w[i]->matrix);
        p->want_q |= q;
        p->want_f |= !q;
        CHECK(w[i]->matrix.p && w[i]->matrix.n_cols == p->src->n_cols);
    }
    set_tiles(c, p->n);
    p->n_items = cpu_n_items(c, p->n, 1.5 * (double)p->src->n_cols + 50);
    cpu_pool_run(c->pool, p->n_items, prepare_item, p);
}

/* ---- product ------------------------------------------------------------------------------------------ */

struct product {
    struct cpu *c;
    int planes;
    bool add;
    int n_out;
    const struct weight *const *w; /* [n_out] */
    struct buf *const *out; /* [n_out] */
    int32_t n_row_tiles; /* of all matrices */
    int32_t n_row_items, n_groups;
    int32_t group_tiles; /* token tiles per group */
};

/* A few row tiles of matrix i with the token tiles of group g. */
static void product_tiles(const struct product *p, int i, const struct cpu_rows *rows, int32_t g) {
    struct cpu *c = p->c;
    const struct cpu_matrix *m = &p->w[i]->matrix;
    struct buf *out = p->out[i];
    size_t row_bytes = cpu_q_bytes(c, m->n_cols, p->planes);
    int32_t n_rows = rows->n_tiles * CPU_ROWS;
    int32_t end = (g + 1) * p->group_tiles < c->n_tiles ? (g + 1) * p->group_tiles : c->n_tiles;
    for (int32_t k = g * p->group_tiles; k < end; k++) {
        int32_t first = c->tile_first[k];
        struct cpu_input in = {.q = c->x_tiles + (size_t)first * row_bytes,
                               .planes = p->planes,
                               .f = c->x_rows + (size_t)first * (size_t)c->max_cols,
                               .f_stride = (size_t)c->max_cols,
                               .n = c->tile_first[k + 1] - first};
        float *dst = cpu_row(out, first) + (size_t)rows->tile * CPU_ROWS;
        if (!p->add) {
            cpu_tile_product(c, m, rows, &in, dst, out->stride);
            continue;
        }
        float y[CPU_TILE * MOST_TILES * CPU_ROWS];
        cpu_tile_product(c, m, rows, &in, y, (size_t)n_rows);
        for (int t = 0; t < in.n; t++)
            c->kernels->add(dst + (size_t)t * out->stride, y + t * n_rows, n_rows);
    }
}

/* The row tile that row item i starts with, and its matrix. */
static int32_t first_tile(const struct product *p, int32_t row_item, int *matrix) {
    int32_t tile = (int32_t)((int64_t)p->n_row_tiles * row_item / p->n_row_items);
    for (*matrix = 0; *matrix < p->n_out && tile >= p->w[*matrix]->matrix.n_tiles; ++*matrix)
        tile -= p->w[*matrix]->matrix.n_tiles;
    return tile;
}

static void product_item(void *ctx, int32_t item, int thread) {
    const struct product *p = ctx;
    (void)thread;
    int32_t g = item / p->n_row_items, row_item = item % p->n_row_items;
    int i, last, soon;
    int32_t tile = first_tile(p, row_item, &i), end = first_tile(p, row_item + 1, &last);
    int32_t next = first_tile(p, (item + p->c->n_threads) % p->n_row_items, &soon);
    for (; i < last || (i == last && tile < end); i++, tile = 0) {
        const struct cpu_matrix *m = &p->w[i]->matrix;
        struct cpu_rows rows = {.tile = tile, .end = i == last ? end : m->n_tiles};
        if (i + 1 < last || (i + 1 == last && end > 0))
            rows.next = p->w[i + 1]->matrix.p;
        else if (soon < p->n_out)
            rows.next = cpu_matrix_tile(&p->w[soon]->matrix, 0, next);
        for (; rows.tile < rows.end; rows.tile += rows.n_tiles) {
            rows.n_tiles = cpu_tiles_at_once(m, rows.end - rows.tile);
            product_tiles(p, i, &rows, g);
        }
    }
}

static void product(struct product *p, int32_t n) {
    enum {
        GROUP_BYTES = 512 * 1024
    }; /* of token tiles: what a second-level cache holds beside weights */
    struct cpu *c = p->c;
    double cost = 0;
    for (int i = 0; i < p->n_out; i++) {
        const struct cpu_matrix *m = &p->w[i]->matrix;
        CHECK(p->out[i]->n_cols == m->n_rows);
        p->n_row_tiles += m->n_tiles;
        cost += cpu_tile_cost(c, m, n, p->planes) * (double)m->n_tiles;
    }
    size_t tile_bytes =
        (size_t)c->kernels->max_tile * cpu_q_bytes(c, p->w[0]->matrix.n_cols, p->planes);
    p->group_tiles = tile_bytes >= GROUP_BYTES ? 1 : (int32_t)(GROUP_BYTES / (tile_bytes + 1));
    p->n_groups = (c->n_tiles + p->group_tiles - 1) / p->group_tiles;
    p->n_row_items = cpu_n_items(c, p->n_row_tiles, cost / (double)p->n_row_tiles / p->n_groups);
    cpu_pool_run(c->pool, p->n_row_items * p->n_groups, product_item, p);
}

/* ---- the ops -------------------------------------------------------------------------------------------- */

struct embed {
    struct cpu *c;
    const struct op_embed *op;
    int32_t n_items;
};

static void embed_item(void *ctx, int32_t item, int thread) {
    const struct embed *e = ctx;
    struct cpu *c = e->c;
    (void)thread;
    int32_t n = c->batch.n_tokens;
    int32_t from = (int32_t)((int64_t)n * item / e->n_items);
    int32_t to = (int32_t)((int64_t)n * (item + 1) / e->n_items);
    for (int32_t t = from; t < to; t++)
        cpu_matrix_row(&e->op->table->matrix, 0, c->batch.ids[t], cpu_row(e->op->h, t));
}

enum status cpu_embed(struct backend *b, const struct op_embed *op) {
    struct cpu *c = cpu_of(b);
    struct embed e = {.c = c, .op = op};
    e.n_items = cpu_n_items(c, c->batch.n_tokens, 4.0 * (double)op->h->n_cols);
    cpu_pool_run(c->pool, e.n_items, embed_item, &e);
    return ST_OK;
}

enum status cpu_norm_linear(struct backend *b, const struct op_norm_linear *op) {
    struct cpu *c = cpu_of(b);
    CHECK(op->n_out >= 1 && op->n_out <= OP_MAX_OUT);
    prepare(&(struct prepare){.c = c,
                              .src = op->x,
                              .norm = op->norm->vector,
                              .eps = op->eps,
                              .n = c->batch.n_tokens,
                              .planes = CPU_PLANES_DENSE},
            op->w, op->n_out);
    product(
        &(struct product){
            .c = c, .planes = CPU_PLANES_DENSE, .n_out = op->n_out, .w = op->w, .out = op->out},
        c->batch.n_tokens);
    return ST_OK;
}

enum status cpu_linear_add(struct backend *b, const struct op_linear_add *op) {
    struct cpu *c = cpu_of(b);
    prepare(
        &(struct prepare){.c = c, .src = op->x, .n = c->batch.n_tokens, .planes = CPU_PLANES_DENSE},
        &op->w, 1);
    product(&(struct product){.c = c,
                              .planes = CPU_PLANES_DENSE,
                              .add = true,
                              .n_out = 1,
                              .w = &op->w,
                              .out = &op->h},
            c->batch.n_tokens);
    return ST_OK;
}

enum status cpu_head(struct backend *b, const struct op_head *op) {
    struct cpu *c = cpu_of(b);
    if (c->batch.n_rows == 0) return ST_OK;
    prepare(&(struct prepare){.c = c,
                              .src = op->h,
                              .norm = op->norm->vector,
                              .eps = op->eps,
                              .rows = c->batch.rows,
                              .n = c->batch.n_rows,
                              .planes = CPU_PLANES_HEAD},
            &op->w, 1);
    product(
        &(struct product){
            .c = c, .planes = CPU_PLANES_HEAD, .n_out = 1, .w = &op->w, .out = &op->logits},
        c->batch.n_rows);
    return ST_OK;
}

struct sample {
    struct cpu *c;
    const struct buf *logits;
    struct moe_row *rows;
};

static void sample_item(void *ctx, int32_t item, int thread) {
    const struct sample *s = ctx;
    struct cpu *c = s->c;
    int32_t slot = c->batch.rows[item].slot;
    float *logits = cpu_row(s->logits, item);
    if (!c->batch.rows[item].sample)
        s->rows[item] = (struct moe_row){.slot = slot, .token = -1};
    else if (sampler_takes_largest(c->sampler, slot))
        sampler_take(c->sampler, slot, c->kernels->largest(logits, s->logits->n_cols),
                     &s->rows[item]);
    else
        sampler_row(c->sampler, c->scratch[thread].sampler, slot, logits, &s->rows[item]);
}

enum status cpu_sample(struct backend *b, const struct op_sample *op) {
    struct cpu *c = cpu_of(b);
    struct sample s = {c, op->logits, batch_results_next(&c->results)};
    cpu_pool_run(c->pool, c->batch.n_rows, sample_item, &s);
    for (int32_t i = 0; i < c->batch.n_rows; i++)
        c->counters.n_sampled += c->batch.rows[i].sample && s.rows[i].st == ST_OK;
    return ST_OK;
}
