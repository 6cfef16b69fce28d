/* cpu_attend: rotation, the paged KV cache and attention; see cpu.h.
 *
 * Keys and values are f16: an eighth of a percent of what int8 activations cost in accuracy, half the
 * bytes of f32. The cache is [L][n_blocks][G] of keys, then values, of one block of B positions:
 *
 *     keys    B >= 16: [B / 16][Hd][16], so that sixteen positions are the lanes of one product;
 *             B < 16: [B][Hd], interleaved when they are used
 *     values  [B][Hd rounded up to 16]
 *
 * An item of attention is one KV head and up to ATTEND_TOKENS successive tokens of one sequence, which share
 * the reads of keys and values. It walks the sequence in splits of CPU_SPLIT positions. */
#include "moe/cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROPE_FINE = 256 };

static size_t padded_head(const struct cpu *c) { return cpu_pad((size_t)c->shape.head_dim, 16); }

bool cpu_kv_create(struct cpu *c) {
    const struct model_shape *m = &c->shape;
    size_t n_pos = (size_t)c->limits.block_tokens, half = (size_t)m->head_dim / 2, n;
    c->key_bytes = cpu_pad(n_pos * (size_t)m->head_dim * 2, 64);
    c->kv_head_bytes = c->key_bytes + n_pos * padded_head(c) * 2;
    if (!size_mul((size_t)m->n_layers * (size_t)m->n_kv_heads, c->kv_head_bytes, &n) ||
        !size_mul(n, (size_t)c->limits.n_blocks, &n))
        return false;
    size_t n_coarse = (size_t)c->limits.max_seq_tokens / ROPE_FINE + 1;
    c->kv = cpu_map(c, CPU_MEM_KV, n);
    c->rope_coarse = cpu_map(c, CPU_MEM_SCRATCH, n_coarse * half * 2 * sizeof(double));
    c->rope_fine = cpu_map(c, CPU_MEM_SCRATCH, ROPE_FINE * half * 2 * sizeof(double));
    c->rope =
        cpu_map(c, CPU_MEM_SCRATCH, (size_t)c->limits.max_batch_tokens * half * 2 * sizeof(float));
    if (!c->kv || !c->rope_coarse || !c->rope_fine || !c->rope) return false;
    for (size_t i = 0; i < half; i++) {
        double freq = pow((double)m->rope_base, -2.0 * (double)i / (double)m->head_dim);
        for (size_t j = 0; j < n_coarse + ROPE_FINE; j++) {
            bool fine = j >= n_coarse;
            double pos = fine ? (double)(j - n_coarse) : (double)j * ROPE_FINE;
            double *cs = fine ? c->rope_fine + ((j - n_coarse) * half + i) * 2
                              : c->rope_coarse + (j * half + i) * 2;
            cs[0] = cos(pos * freq);
            cs[1] = sin(pos * freq);
        }
    }
    return true;
}

/* ---- rotation --------------------------------------------------------------------------------------- */

/* cos and sin of token t's angles, in float64 by the sum formula from the two tables. */
static void rope_token(struct cpu *c, int32_t t) {
    size_t half = (size_t)c->shape.head_dim / 2;
    int32_t pos = c->batch.pos[t];
    const double *a = c->rope_coarse + (size_t)(pos / ROPE_FINE) * half * 2;
    const double *b = c->rope_fine + (size_t)(pos % ROPE_FINE) * half * 2;
    float *cs = c->rope + (size_t)t * half * 2;
    for (size_t i = 0; i < half; i++) {
        cs[i] = (float)(a[2 * i] * b[2 * i] - a[2 * i + 1] * b[2 * i + 1]);
        cs[half + i] = (float)(a[2 * i] * b[2 * i + 1] + a[2 * i + 1] * b[2 * i]);
    }
}

struct token_job {
    struct cpu *c;
    const struct op_rope_store *op;
    int32_t n_items;
};

static void rope_item(void *ctx, int32_t item, int thread) {
    const struct token_job *j = ctx;
    (void)thread;
    int32_t n = j->c->batch.n_tokens;
    int32_t to = (int32_t)((int64_t)n * (item + 1) / j->n_items);
    for (int32_t t = (int32_t)((int64_t)n * item / j->n_items); t < to; t++) rope_token(j->c, t);
}

void cpu_rope_begin(struct cpu *c) {
    struct token_job j = {.c = c};
    j.n_items = cpu_n_items(c, c->batch.n_tokens, 2.0 * c->shape.head_dim);
    cpu_pool_run(c->pool, j.n_items, rope_item, &j);
}

/* ---- the cache ---------------------------------------------------------------------------------------- */

static uint8_t *kv_head(const struct cpu *c, int layer, int32_t block, int32_t g) {
    size_t i =
        ((size_t)layer * (size_t)c->limits.n_blocks + (size_t)block) * (size_t)c->shape.n_kv_heads +
        (size_t)g;
    return c->kv + i * c->kv_head_bytes;
}

/* Position `pos` of a block: where its key's first value lies and how far apart the values are. */
static uint16_t *key_at(const struct cpu *c, uint8_t *head, int32_t pos, size_t *stride) {
    size_t hd = (size_t)c->shape.head_dim, p = (size_t)pos;
    uint16_t *keys = (uint16_t *)(void *)head;
    if (c->limits.block_tokens < CPU_POS) {
        *stride = 1;
        return keys + p * hd;
    }
    *stride = CPU_POS;
    return keys + p / CPU_POS * CPU_POS * hd + p % CPU_POS;
}

static uint16_t *value_at(const struct cpu *c, uint8_t *head, int32_t pos) {
    return (uint16_t *)(void *)(head + c->key_bytes) + (size_t)pos * padded_head(c);
}

static void store_token(struct cpu *c, const struct op_rope_store *op, int32_t t, float *key) {
    const struct model_shape *m = &c->shape;
    const float *cs = c->rope + (size_t)t * (size_t)m->head_dim;
    int32_t hd = m->head_dim, pos = c->batch.pos[t], b = c->limits.block_tokens;
    for (int32_t g = 0; g < m->n_kv_heads; g++) { /* a key goes to Hd / 2 cache lines: fetch them */
        size_t stride;
        uint16_t *dst =
            key_at(c, kv_head(c, op->layer, c->batch.blocks[t][pos / b], g), pos % b, &stride);
        for (int32_t d = 0; d < hd; d += 2) __builtin_prefetch(dst + (size_t)d * stride, 1);
    }
    for (int32_t j = 0; j < m->n_heads; j++) {
        float *q = cpu_row(op->q, t) + (size_t)j * (size_t)hd;
        c->kernels->rms_norm(q, op->q_norm->vector, op->eps, hd, q);
        c->kernels->rope(q, cs, hd);
    }
    for (int32_t g = 0; g < m->n_kv_heads; g++) {
        size_t at = (size_t)g * (size_t)hd, stride;
        uint8_t *head = kv_head(c, op->layer, c->batch.blocks[t][pos / b], g);
        c->kernels->rms_norm(cpu_row(op->k, t) + at, op->k_norm->vector, op->eps, hd, key);
        c->kernels->rope(key, cs, hd);
        uint16_t *dst = key_at(c, head, pos % b, &stride);
        c->kernels->to_f16(key, hd, dst, stride);
        c->kernels->to_f16(cpu_row(op->v, t) + at, hd, value_at(c, head, pos % b), 1);
    }
}

static void store_item(void *ctx, int32_t item, int thread) {
    const struct token_job *j = ctx;
    int32_t n = j->c->batch.n_tokens;
    int32_t to = (int32_t)((int64_t)n * (item + 1) / j->n_items);
    for (int32_t t = (int32_t)((int64_t)n * item / j->n_items); t < to; t++)
        store_token(j->c, j->op, t, j->c->scratch[thread].rows);
}

enum status cpu_rope_store(struct backend *b, const struct op_rope_store *op) {
    struct cpu *c = cpu_of(b);
    struct token_job j = {.c = c, .op = op};
    double n_heads = (double)c->shape.n_heads + 2.0 * (double)c->shape.n_kv_heads;
    j.n_items = cpu_n_items(c, c->batch.n_tokens, n_heads * (50 + 1.0 * c->shape.head_dim));
    cpu_pool_run(c->pool, j.n_items, store_item, &j);
    return ST_OK;
}

enum status cpu_kv_poison(struct backend *b, uint8_t byte) {
    struct cpu *c = cpu_of(b);
    memset(c->kv, byte,
           (size_t)c->shape.n_layers * (size_t)c->limits.n_blocks * (size_t)c->shape.n_kv_heads *
               c->kv_head_bytes);
    return ST_OK;
}

/* ---- attention ------------------------------------------------------------------------------------------ */

enum { ATTEND_TOKENS = 8 };

struct attention {
    struct cpu *c;
    const struct op_attention *op;
};

/* A group of CPU_POS positions (n of them in use) out of blocks smaller than that: keys, then values. */
static void gather_group(const struct attention *a, const int32_t *blocks, int32_t g, int32_t at,
                         int32_t n, uint16_t *keys) {
    const struct cpu *c = a->c;
    int32_t b = c->limits.block_tokens;
    size_t hd = (size_t)c->shape.head_dim, width = padded_head(c), stride;
    uint16_t *values = keys + width * CPU_POS;
    for (int32_t i = 0; i < n; i++) {
        uint8_t *head = kv_head(c, a->op->layer, blocks[(at + i) / b], g);
        const uint16_t *key = key_at(c, head, (at + i) % b, &stride);
        for (size_t d = 0; d < hd; d++) keys[d * CPU_POS + (size_t)i] = key[d];
        memcpy(values + (size_t)i * width, value_at(c, head, (at + i) % b), width * 2);
    }
}

/* Keys and values of a sequence's positions from `at`, to be prefetched. */
static void find_next(const struct attention *a, const int32_t *blocks, int32_t g, int32_t at,
                      int32_t n_pos, struct cpu_attend *x) {
    const struct cpu *c = a->c;
    int32_t b = c->limits.block_tokens;
    size_t stride;
    for (int32_t i = 0; i < CPU_SPLIT / CPU_POS; i++, at += CPU_POS) {
        x->next_k[i] = x->next_v[i] = NULL;
        if (b < CPU_POS || at >= n_pos) continue;
        uint8_t *head = kv_head(c, a->op->layer, blocks[at / b], g);
        x->next_k[i] = key_at(c, head, at % b, &stride);
        x->next_v[i] = value_at(c, head, at % b);
    }
}

/* Keys and values of x->n_pos positions from `at`, a multiple of CPU_SPLIT. */
static void find_split(const struct attention *a, const int32_t *blocks, int32_t g, int32_t at,
                       struct cpu_scratch *s, struct cpu_attend *x) {
    const struct cpu *c = a->c;
    int32_t b = c->limits.block_tokens;
    size_t group = padded_head(c) * CPU_POS, stride;
    for (int32_t i = 0; i * CPU_POS < x->n_pos; i++) {
        int32_t pos = at + i * CPU_POS, left = x->n_pos - i * CPU_POS;
        if (b >= CPU_POS) {
            uint8_t *head = kv_head(c, a->op->layer, blocks[pos / b], g);
            x->k[i] = key_at(c, head, pos % b, &stride);
            x->v[i] = value_at(c, head, pos % b);
            continue;
        }
        uint16_t *keys = s->keys + (size_t)i * 2 * group;
        gather_group(a, blocks, g, pos, left < CPU_POS ? left : CPU_POS, keys);
        x->k[i] = keys;
        x->v[i] = keys + group;
    }
}

/* Heads first_head … + n_heads - 1 of KV head g for tokens t … t + n_tokens - 1: their rows of state. */
struct rows {
    int32_t t, n_tokens, g, first_head, n_heads;
    int32_t next_t, next_g; /* where this thread will probably go on; next_t -1: unknown */
    float max[CPU_ATTEND_ROWS], sum[CPU_ATTEND_ROWS];
};

static void attend_split(const struct attention *a, struct rows *r, int32_t at,
                         struct cpu_scratch *s, struct cpu_attend *x) {
    const struct cpu *c = a->c;
    size_t hd = (size_t)c->shape.head_dim, width = padded_head(c);
    const int32_t in_split = x->n_pos;
    x->n_rows = 0;
    for (int32_t i = 0; i < r->n_tokens * r->n_heads; i++) {
        int32_t t = r->t + i / r->n_heads, covered = c->batch.pos[t] + 1 - at;
        if (covered > in_split) covered = in_split;
        if (x->n_rows == CPU_QROWS || (x->n_rows > 0 && x->n_pos != covered)) {
            c->kernels->attend(x);
            x->n_rows = 0;
            for (int j = 0; j < CPU_SPLIT / CPU_POS; j++) x->next_k[j] = NULL; /* once is enough */
        }
        if (covered <= 0) continue;
        x->n_pos = covered;
        size_t head = (size_t)(r->first_head + i % r->n_heads);
        x->q[x->n_rows] = cpu_row(a->op->q, t) + head * hd;
        x->out[x->n_rows] = s->state + (size_t)i * width;
        x->max[x->n_rows] = &r->max[i];
        x->sum[x->n_rows++] = &r->sum[i];
    }
    if (x->n_rows > 0) c->kernels->attend(x);
}

static void attend_rows(const struct attention *a, struct rows *r, struct cpu_scratch *s) {
    const struct cpu *c = a->c;
    size_t hd = (size_t)c->shape.head_dim, width = padded_head(c);
    int32_t n_rows = r->n_tokens * r->n_heads, n_pos = c->batch.pos[r->t + r->n_tokens - 1] + 1;
    struct cpu_attend x = {.head_dim = c->shape.head_dim, .scale = 1.0f / sqrtf((float)hd)};
    memset(s->state, 0, (size_t)n_rows * width * sizeof *s->state);
    for (int32_t i = 0; i < n_rows; i++) {
        r->max[i] = -INFINITY;
        r->sum[i] = 0;
    }
    for (int32_t at = 0; at < n_pos; at += CPU_SPLIT) {
        x.n_pos = n_pos - at < CPU_SPLIT ? n_pos - at : CPU_SPLIT;
        find_split(a, c->batch.blocks[r->t], r->g, at, s, &x);
        if (at + CPU_SPLIT < n_pos)
            find_next(a, c->batch.blocks[r->t], r->g, at + CPU_SPLIT, n_pos, &x);
        else if (r->next_t >= 0)
            find_next(a, c->batch.blocks[r->next_t], r->next_g, 0, c->batch.pos[r->next_t] + 1, &x);
        else
            find_next(a, NULL, 0, 0, 0, &x);
        attend_split(a, r, at, s, &x);
    }
    for (int32_t i = 0; i < n_rows; i++) {
        float *out = s->state + (size_t)i * width;
        size_t head = (size_t)(r->first_head + i % r->n_heads);
        c->kernels->divide(out, r->sum[i], c->shape.head_dim);
        memcpy(cpu_row(a->op->out, r->t + i / r->n_heads) + head * hd, out, hd * sizeof *out);
    }
}

static void attention_item(void *ctx, int32_t item, int thread) {
    const struct attention *a = ctx;
    const struct cpu *c = a->c;
    int32_t per_kv = c->shape.n_heads / c->shape.n_kv_heads, tile = item / c->shape.n_kv_heads;
    struct rows r = {.t = c->attend_first[tile], .g = item % c->shape.n_kv_heads};
    r.n_tokens = c->attend_first[tile + 1] - r.t;
    int32_t next = item + c->n_threads;
    r.next_t = next / c->shape.n_kv_heads < c->n_attend_tiles
                   ? c->attend_first[next / c->shape.n_kv_heads]
                   : -1;
    r.next_g = next % c->shape.n_kv_heads;
    for (int32_t h = 0; h < per_kv; h += CPU_ATTEND_ROWS) {
        r.first_head = r.g * per_kv + h;
        r.n_heads = per_kv - h < CPU_ATTEND_ROWS ? per_kv - h : CPU_ATTEND_ROWS;
        attend_rows(a, &r, &c->scratch[thread]);
    }
}

/* Tiles of the step's tokens: successive positions of one sequence. */
void cpu_attend_begin(struct cpu *c) {
    int32_t per_kv = c->shape.n_heads / c->shape.n_kv_heads, n = 0;
    int32_t most = per_kv >= CPU_ATTEND_ROWS ? 1 : CPU_ATTEND_ROWS / per_kv;
    if (most > ATTEND_TOKENS) most = ATTEND_TOKENS;
    const struct batch *b = &c->batch;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        bool same = t > 0 && b->blocks[t] == b->blocks[t - 1] && b->pos[t] == b->pos[t - 1] + 1;
        if (same && t - c->attend_first[n - 1] < most) continue;
        c->attend_first[n++] = t;
    }
    c->attend_first[n] = b->n_tokens;
    c->n_attend_tiles = n;
}

enum status cpu_attention(struct backend *b, const struct op_attention *op) {
    struct cpu *c = cpu_of(b);
    struct attention a = {.c = c, .op = op};
    cpu_pool_run(c->pool, c->n_attend_tiles * c->shape.n_kv_heads, attention_item, &a);
    return ST_OK;
}
