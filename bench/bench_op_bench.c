/* moed-op-bench: how long does each op of moe/backend.h take, and how far is it from what its bytes and its arithmetic
 * cost? Opens a backend with a known shape and generated weights, no file, so that it runs where no model is.
 *
 * An op is issued many times in one step, over rotating layers so that no layer is still in a cache when it comes round,
 * and the time of the same step without it is taken off. On a GPU a few LM heads go first in both: while they run,
 * the launches of the rest are queued, so that launching is not what is timed. Rows `layers` and `step` are whole
 * steps as they are served (on a GPU, replayed graphs), one submitted ahead. */
#include <getopt.h>

static const char program[] = "moed-op-bench";
#include "bench/model_bench.h"
#include "moe/backend.h"
#include "moe/quant.h"
#ifdef MOED_CUDA
#include "cuda/cuda_backend.h"
#endif

static const char usage[] =
    "moed-op-bench: time per op, and the share of its floor that it reaches\n"
    "\n"
    "  moed-op-bench [options]\n"
    "\n"
    "One CSV line per workload and op: microseconds, bytes and arithmetic that the op cannot do "
    "without, the rates\n"
    "these make, and the floor by --gbps and --tflops. `step` is one step of --layers layers with "
    "head and\n"
    "sampling; `layers` one layer of a step without them; their floors are the sums of their ops' "
    "floors.\n"
    "\n"
    "  --device NAME           cpu, reference or cuda:N (default cpu)\n"
    "  --threads N             CPU threads (default 1)\n"
    "  --cpu-isa NAME          CPU kernels: auto, avx2, avx512, amx (default auto)\n"
    "  --shape NAME            qwen3-30b-a3b or small (default qwen3-30b-a3b), Q4_K with the Q6_K "
    "of Q4_K_M\n"
    "  --layers N              layers (default 8)\n"
    "  --decode LIST           batch sizes to decode (default 1,8,32,64,128,256)\n"
    "  --ctx N                 tokens of context when decoding (default 576)\n"
    "  --prefill N             prompt tokens in a prefill step (default 2048; 0: none)\n"
    "  --pp N                  tokens of one prompt (default 512)\n"
    "  --ops LIST              only ops whose names hold one of these words (default all)\n"
    "  --repeat N              times each, of which the fastest counts (default 5)\n"
    "  --gbps N                memory bandwidth in GB/s (default 3000)\n"
    "  --tflops N              arithmetic in TFLOP/s (default 500)\n";

enum {
    MAX_LAYERS = 64,
    MAX_WORKLOADS = 32,
    BLOCK_TOKENS = 16,
    POOL_BYTES = 16 << 20,
    N_BLOCKERS = 6,
    ROUNDS = 3
};

/* ---- weights ------------------------------------------------------------------------------------ */

struct matrix {
    struct weight *w;
    int32_t n_rows, n_cols;
    double bytes; /* of one expert */
};

/* Random blocks of a type, over and over; each tensor begins somewhere else. */
struct pool {
    uint8_t *p;
    size_t n, salt;
};

static uint64_t random_next(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void put_f16(uint8_t *p, float f) {
    uint16_t h = f32_to_f16(f);
    memcpy(p, &h, sizeof h);
}

/* Weights of about 0.03. */
static void fill_block(enum tensor_type type, uint8_t *p, int32_t n_bytes, uint64_t *rng) {
    for (int32_t i = 0; i < n_bytes; i++) p[i] = (uint8_t)(random_next(rng) >> 32);
    if (type == TENSOR_F32) {
        float f = ((float)(random_next(rng) >> 40) * 0x1p-24f - 0.5f) * 0.1f;
        memcpy(p, &f, sizeof f);
    } else if (type == TENSOR_Q4_K) {
        put_f16(p, 0.00015f);
        put_f16(p + 2, 0.001f);
    } else {
        CHECK(type == TENSOR_Q6_K);
        put_f16(p + 208, p[0] & 1 ? 0.00002f : -0.00002f);
    }
}

static enum status read_pool(void *ctx, size_t offset, void *dst, size_t n) {
    const struct pool *pool = ctx;
    uint8_t *to = dst;
    for (size_t at = (offset + pool->salt) % pool->n; n > 0; at = 0) {
        size_t most = pool->n - at, piece = n < most ? n : most;
        memcpy(to, pool->p + at, piece);
        to += piece;
        n -= piece;
    }
    return ST_OK;
}

/* ---- the model ------------------------------------------------------------------------------------ */

struct layer {
    struct weight *attn_norm, *q_norm, *k_norm, *ffn_norm;
    struct matrix q, k, v, attn_out, router, gate, up, down;
};

struct rig {
    struct backend *b;
    const struct backend_ops *ops;
    bool gpu;
    struct model_shape m;
    struct moe_limits limits;
    struct pool f32, q4, q6;
    uint64_t rng;
    struct matrix embed, head;
    struct weight *norm;
    struct layer layers[MAX_LAYERS];
    struct buf *h, *q, *k, *v, *attn, *x, *act, *y, *logits;
    /* The workload. */
    struct moe_step step;
    struct moe_step_seq *seqs;
    int32_t *ids, *blocks;
    struct moe_row *rows;
    double n_context; /* keys that all tokens together attend over */
    double n_cached; /* keys that must be read for it, each once per sequence */
    double n_groups; /* experts of a layer that have tokens */
};

static void pool_create(struct rig *r, enum tensor_type type, struct pool *out) {
    int32_t n_weights, n_bytes;
    bench_require(tensor_type_block(type, &n_weights, &n_bytes) ? ST_OK : ST_UNSUPPORTED, "type");
    out->n = POOL_BYTES / (size_t)n_bytes * (size_t)n_bytes;
    out->p = bench_alloc(out->n, 1);
    for (size_t at = 0; at < out->n; at += (size_t)n_bytes)
        fill_block(type, out->p + at, n_bytes, &r->rng);
}

static struct matrix load(struct rig *r, enum tensor_type type, int32_t n_experts, int32_t n_rows,
                          int32_t n_cols) {
    struct pool *pool = type == TENSOR_F32 ? &r->f32 : type == TENSOR_Q4_K ? &r->q4 : &r->q6;
    struct matrix m = {.n_rows = n_rows, .n_cols = n_cols};
    int32_t n_weights, block_bytes;
    size_t n, n_all = (size_t)n_experts * (size_t)n_rows * (size_t)n_cols;
    bool ok =
        tensor_type_bytes(type, n_all, &n) && tensor_type_block(type, &n_weights, &block_bytes);
    bench_require(ok ? ST_OK : ST_UNSUPPORTED, "shape");
    pool->salt = (size_t)(random_next(&r->rng) % 4096) * (size_t)block_bytes;
    const struct weight_source s = {.name = "generated",
                                    .type = type,
                                    .n_experts = n_experts,
                                    .n_rows = n_rows,
                                    .n_cols = n_cols,
                                    .n_bytes = n,
                                    .read = read_pool,
                                    .ctx = pool};
    struct error e = {0};
    if (r->ops->weight_load(r->b, &s, &e, &m.w) != ST_OK) {
        fprintf(stderr, "%s: %s\n", program, e.text);
        exit(1);
    }
    m.bytes = (double)n / n_experts;
    return m;
}

static void load_model(struct rig *r) {
    const struct model_shape *m = &r->m;
    int32_t q_dim = m->n_heads * m->head_dim, kv_dim = m->n_kv_heads * m->head_dim;
    pool_create(r, TENSOR_F32, &r->f32);
    pool_create(r, TENSOR_Q4_K, &r->q4);
    pool_create(r, TENSOR_Q6_K, &r->q6);
    r->embed = load(r, TENSOR_Q4_K, 1, m->n_vocab, m->n_embd);
    r->head = load(r, TENSOR_Q6_K, 1, m->n_vocab, m->n_embd);
    r->norm = load(r, TENSOR_F32, 1, 1, m->n_embd).w;
    for (int i = 0; i < m->n_layers; i++) {
        struct layer *l = &r->layers[i];
        enum tensor_type mixed = i % 2 ? TENSOR_Q4_K : TENSOR_Q6_K;
        l->attn_norm = load(r, TENSOR_F32, 1, 1, m->n_embd).w;
        l->ffn_norm = load(r, TENSOR_F32, 1, 1, m->n_embd).w;
        l->q_norm = load(r, TENSOR_F32, 1, 1, m->head_dim).w;
        l->k_norm = load(r, TENSOR_F32, 1, 1, m->head_dim).w;
        l->q = load(r, TENSOR_Q4_K, 1, q_dim, m->n_embd);
        l->k = load(r, TENSOR_Q4_K, 1, kv_dim, m->n_embd);
        l->v = load(r, mixed, 1, kv_dim, m->n_embd);
        l->attn_out = load(r, TENSOR_Q4_K, 1, m->n_embd, q_dim);
        l->router = load(r, TENSOR_F32, 1, m->n_experts, m->n_embd);
        l->gate = load(r, TENSOR_Q4_K, m->n_experts, m->n_ff_expert, m->n_embd);
        l->up = load(r, TENSOR_Q4_K, m->n_experts, m->n_ff_expert, m->n_embd);
        l->down = load(r, mixed, m->n_experts, m->n_embd, m->n_ff_expert);
    }
    struct {
        enum buf_rows rows;
        enum buf_kind kind;
        int32_t n_cols;
        struct buf **out;
    } bufs[] = {
        {BUF_TOKENS, BUF_EXACT, m->n_embd, &r->h},        {BUF_TOKENS, BUF_INNER, q_dim, &r->q},
        {BUF_TOKENS, BUF_INNER, kv_dim, &r->k},           {BUF_TOKENS, BUF_INNER, kv_dim, &r->v},
        {BUF_TOKENS, BUF_INNER, q_dim, &r->attn},         {BUF_TOKENS, BUF_INNER, m->n_embd, &r->x},
        {BUF_ROUTED, BUF_INNER, m->n_ff_expert, &r->act}, {BUF_ROUTED, BUF_INNER, m->n_embd, &r->y},
        {BUF_HEAD, BUF_EXACT, m->n_vocab, &r->logits}};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++)
        bench_require(
            r->ops->buf_create(r->b, bufs[i].rows, bufs[i].kind, bufs[i].n_cols, bufs[i].out),
            "buffer");
}

/* ---- the ops: issue one, and what it cannot do without ------------------------------------------------ */

struct cost {
    double bytes, flops;
};

static double n_tokens(const struct rig *r) { return r->step.n_tokens; }

static double product(const struct matrix *m) { return 2.0 * m->n_rows * m->n_cols; }

static enum status embed(struct rig *r, int i) {
    (void)i;
    return r->ops->embed(r->b, &(struct op_embed){.table = r->embed.w, .h = r->h});
}
static struct cost embed_cost(const struct rig *r, const struct layer *l) {
    (void)l;
    return (struct cost){n_tokens(r) * (r->embed.bytes / r->m.n_vocab + 4.0 * r->m.n_embd), 0};
}

static enum status norm_linear(struct rig *r, int i) {
    const struct layer *l = &r->layers[i];
    return r->ops->norm_linear(r->b, &(struct op_norm_linear){.x = r->h,
                                                              .norm = l->attn_norm,
                                                              .eps = r->m.norm_eps,
                                                              .n_out = 3,
                                                              .w = {l->q.w, l->k.w, l->v.w},
                                                              .out = {r->q, r->k, r->v}});
}
static struct cost norm_linear_cost(const struct rig *r, const struct layer *l) {
    double n_out = l->q.n_rows + l->k.n_rows + l->v.n_rows;
    return (struct cost){l->q.bytes + l->k.bytes + l->v.bytes +
                             n_tokens(r) * (4.0 * r->m.n_embd + 2.0 * n_out),
                         n_tokens(r) * (product(&l->q) + product(&l->k) + product(&l->v))};
}

static enum status rope_store(struct rig *r, int i) {
    const struct layer *l = &r->layers[i];
    return r->ops->rope_store(r->b, &(struct op_rope_store){.layer = i,
                                                            .q = r->q,
                                                            .k = r->k,
                                                            .v = r->v,
                                                            .q_norm = l->q_norm,
                                                            .k_norm = l->k_norm,
                                                            .eps = r->m.norm_eps});
}
static struct cost rope_store_cost(const struct rig *r, const struct layer *l) {
    return (struct cost){n_tokens(r) * 4.0 * (l->q.n_rows + l->k.n_rows + l->v.n_rows), 0};
}

static enum status attention(struct rig *r, int i) {
    return r->ops->attention(r->b, &(struct op_attention){.layer = i, .q = r->q, .out = r->attn});
}
static struct cost attention_cost(const struct rig *r, const struct layer *l) {
    return (struct cost){r->n_cached * 4.0 * l->k.n_rows + n_tokens(r) * 4.0 * l->q.n_rows,
                         r->n_context * 4.0 * l->q.n_rows};
}

/* The two as a layer has them: a backend may do them at once. */
static enum status rope_attention(struct rig *r, int i) {
    enum status st = rope_store(r, i);
    return st == ST_OK ? attention(r, i) : st;
}
static struct cost rope_attention_cost(const struct rig *r, const struct layer *l) {
    struct cost a = rope_store_cost(r, l), b = attention_cost(r, l);
    return (struct cost){a.bytes + b.bytes, a.flops + b.flops};
}

static enum status linear_add(struct rig *r, int i) {
    return r->ops->linear_add(
        r->b, &(struct op_linear_add){.x = r->attn, .w = r->layers[i].attn_out.w, .h = r->h});
}
static struct cost linear_add_cost(const struct rig *r, const struct layer *l) {
    return (struct cost){l->attn_out.bytes +
                             n_tokens(r) * (2.0 * l->attn_out.n_cols + 8.0 * r->m.n_embd),
                         n_tokens(r) * product(&l->attn_out)};
}

static enum status route(struct rig *r, int i) {
    const struct layer *l = &r->layers[i];
    return r->ops->route(r->b, &(struct op_route){.h = r->h,
                                                  .norm = l->ffn_norm,
                                                  .eps = r->m.norm_eps,
                                                  .router = l->router.w,
                                                  .renormalize = true,
                                                  .x = r->x});
}
static struct cost route_cost(const struct rig *r, const struct layer *l) {
    return (struct cost){l->router.bytes + n_tokens(r) * 6.0 * r->m.n_embd,
                         n_tokens(r) * product(&l->router)};
}

static enum status experts_up(struct rig *r, int i) {
    const struct layer *l = &r->layers[i];
    return r->ops->experts_up(
        r->b, &(struct op_experts_up){
                  .layer = i, .x = r->x, .gate = l->gate.w, .up = l->up.w, .act = r->act});
}
static struct cost experts_up_cost(const struct rig *r, const struct layer *l) {
    double pairs = n_tokens(r) * r->m.n_experts_used;
    return (struct cost){r->n_groups * (l->gate.bytes + l->up.bytes) +
                             n_tokens(r) * 2.0 * r->m.n_embd + pairs * 2.0 * r->m.n_ff_expert,
                         pairs * (product(&l->gate) + product(&l->up))};
}

static enum status experts_down(struct rig *r, int i) {
    return r->ops->experts_down(
        r->b, &(struct op_experts_down){
                  .layer = i, .act = r->act, .down = r->layers[i].down.w, .y = r->y, .h = r->h});
}
static struct cost experts_down_cost(const struct rig *r, const struct layer *l) {
    double pairs = n_tokens(r) * r->m.n_experts_used;
    return (struct cost){r->n_groups * l->down.bytes +
                             pairs * 2.0 * (r->m.n_ff_expert + r->m.n_embd) +
                             n_tokens(r) * 8.0 * r->m.n_embd,
                         pairs * product(&l->down)};
}

static enum status head(struct rig *r, int i) {
    (void)i;
    return r->ops->head(
        r->b,
        &(struct op_head){
            .h = r->h, .norm = r->norm, .eps = r->m.norm_eps, .w = r->head.w, .logits = r->logits});
}
static struct cost head_cost(const struct rig *r, const struct layer *l) {
    (void)l;
    double n = r->step.n_seqs;
    return (struct cost){r->head.bytes + n * 4.0 * (r->m.n_embd + r->m.n_vocab),
                         n * product(&r->head)};
}

static enum status sample(struct rig *r, int i) {
    (void)i;
    return r->ops->sample(r->b, &(struct op_sample){.logits = r->logits});
}
static struct cost sample_cost(const struct rig *r, const struct layer *l) {
    (void)l;
    return (struct cost){r->step.n_seqs * 4.0 * r->m.n_vocab, 0};
}

enum op_use { PER_STEP, PER_LAYER, MEASURED /* only: its parts are in the table too */ };

static const struct op {
    const char *name;
    enum op_use use;
    enum status (*issue)(struct rig *r, int layer);
    struct cost (*cost)(const struct rig *r, const struct layer *l);
} ops[] = {
    {"embed", PER_STEP, embed, embed_cost},
    {"norm_linear", PER_LAYER, norm_linear, norm_linear_cost},
    {"rope_store", PER_LAYER, rope_store, rope_store_cost},
    {"attention", PER_LAYER, attention, attention_cost},
    {"rope_attention", MEASURED, rope_attention, rope_attention_cost},
    {"linear_add", PER_LAYER, linear_add, linear_add_cost},
    {"route", PER_LAYER, route, route_cost},
    {"experts_up", PER_LAYER, experts_up, experts_up_cost},
    {"experts_down", PER_LAYER, experts_down, experts_down_cost},
    {"head", PER_STEP, head, head_cost},
    {"sample", PER_STEP, sample, sample_cost},
};
enum { N_OPS = sizeof ops / sizeof *ops };

/* Mean over the layers. */
static struct cost op_cost(const struct rig *r, const struct op *op) {
    struct cost sum = {0};
    for (int i = 0; i < r->m.n_layers; i++) {
        struct cost c = op->cost(r, &r->layers[i]);
        sum.bytes += c.bytes / r->m.n_layers;
        sum.flops += c.flops / r->m.n_layers;
    }
    return sum;
}

/* ---- workloads ------------------------------------------------------------------------------------------ */

struct workload {
    const char *phase;
    int32_t n_seqs, start, n_tokens; /* of each sequence, from position `start` */
};

static void set_workload(struct rig *r, const struct workload *w, enum moe_rows rows) {
    int32_t stride = r->limits.max_seq_tokens / BLOCK_TOKENS, n_blocks = 0;
    r->step = (struct moe_step){.n_seqs = w->n_seqs,
                                .n_tokens = w->n_seqs * w->n_tokens,
                                .seqs = r->seqs,
                                .ids = r->ids,
                                .blocks = r->blocks};
    for (int32_t s = 0; s < w->n_seqs; s++) {
        int32_t n = (w->start + w->n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        r->seqs[s] = (struct moe_step_seq){
            .slot = s, .start_pos = w->start, .n_tokens = w->n_tokens, .n_blocks = n, .rows = rows};
        for (int32_t i = 0; i < n; i++) r->blocks[n_blocks++] = s * stride + i;
    }
    double last = w->start + w->n_tokens;
    r->n_cached = w->n_seqs * last;
    r->n_context = w->n_seqs * (last * (last + 1) - (double)w->start * (w->start + 1)) / 2;
}

/* Greedy sequences; their histories, one id long, have room for what the steps that follow sample. */
static void start_slots(struct rig *r) {
    for (int32_t i = 0; i < r->limits.max_seqs; i++) {
        const struct moe_slot_start start = {
            .slot = i,
            .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
            .ids = r->ids,
            .n_ids = 1,
            .n_prompt = 1};
        bench_require(r->ops->slot_start(r->b, &start), "slot");
    }
}

/* Ops of one step, by hand; how long it ran. */
static double timed_step(struct rig *r, const struct op *op, int n) {
    start_slots(r);
    bool issue = true;
    struct moe_result result = {.rows = r->rows};
    bench_require(r->ops->step_begin(r->b, &r->step, &issue), "step");
    bench_require(embed(r, 0), "embed");
    bench_require(route(r, 0), "route");
    for (int i = 0; i < (r->gpu ? N_BLOCKERS : 1); i++) bench_require(head(r, 0), "head");
    for (int i = 0; i < n; i++) bench_require(op->issue(r, i % r->m.n_layers), op->name);
    bench_require(r->ops->step_end(r->b), "step");
    bench_require(r->ops->step_collect(r->b, &result), "step");
    return (double)result.run_ns * 1e-3;
}

static double fastest(struct rig *r, const struct op *op, int n, int n_repeat) {
    double best = timed_step(r, op, n);
    for (int i = 0; i < n_repeat; i++) {
        double t = timed_step(r, op, n);
        if (t < best) best = t;
    }
    return best;
}

static void forward(struct rig *r, bool rows) {
    bool issue = false;
    bench_require(r->ops->step_begin(r->b, &r->step, &issue), "step");
    if (issue) {
        bench_require(embed(r, 0), "embed");
        for (int i = 0; i < r->m.n_layers; i++)
            for (int k = 0; k < N_OPS; k++)
                if (ops[k].use == PER_LAYER) bench_require(ops[k].issue(r, i), ops[k].name);
        if (rows) {
            bench_require(head(r, 0), "head");
            bench_require(sample(r, 0), "sample");
        }
    }
    bench_require(r->ops->step_end(r->b), "step");
}

/* Microseconds per step, one submitted ahead. */
static double whole_step(struct rig *r, bool rows, int n_repeat) {
    enum { STEPS = 8 };
    struct moe_result result = {.rows = r->rows};
    double best = 0;
    for (int k = 0; k <= n_repeat; k++) {
        start_slots(r);
        forward(r, rows);
        bench_require(r->ops->step_collect(r->b, &result), "step");
        uint64_t begun = clock_now_ns();
        for (int i = 0; i < STEPS; i++) {
            forward(r, rows);
            if (i > 0) bench_require(r->ops->step_collect(r->b, &result), "step");
        }
        bench_require(r->ops->step_collect(r->b, &result), "step");
        double t = (double)(clock_now_ns() - begun) * 1e-3 / STEPS;
        if (k == 0 || t < best) best = t;
    }
    return best;
}

/* Keys and values of every sequence: those of random tokens. */
static void fill_cache(struct rig *r, int32_t n_seqs, int32_t n_positions) {
    struct moe_result result = {.rows = r->rows};
    for (int32_t s = 0; s < n_seqs; s++) {
        for (int32_t at = 0; at < n_positions; at += r->limits.max_batch_tokens) {
            int32_t left = n_positions - at;
            const struct workload w = {
                "fill", 1, at,
                left < r->limits.max_batch_tokens ? left : r->limits.max_batch_tokens};
            set_workload(r, &w, MOE_ROWS_NONE);
            r->seqs[0].slot = s;
            for (int32_t i = 0; i < r->seqs[0].n_blocks; i++)
                r->blocks[i] += s * (r->limits.max_seq_tokens / BLOCK_TOKENS);
            bool issue = true;
            bench_require(r->ops->step_begin(r->b, &r->step, &issue), "step");
            bench_require(embed(r, 0), "embed");
            for (int i = 0; i < r->m.n_layers; i++) {
                bench_require(norm_linear(r, i), "norm_linear");
                bench_require(rope_store(r, i), "rope_store");
            }
            bench_require(r->ops->step_end(r->b), "step");
            bench_require(r->ops->step_collect(r->b, &result), "step");
        }
    }
}

/* ---- what is printed --------------------------------------------------------------------------------------- */

struct options {
    const char *device, *isa, *shape, *words;
    int n_threads, n_layers, ctx, prefill, pp, n_repeat, gbps, tflops;
    int decode[MAX_WORKLOADS], n_decode;
};

static double floor_us(const struct options *o, struct cost c) {
    double bytes = c.bytes / (o->gbps * 1e3), flops = c.flops / (o->tflops * 1e6);
    return bytes > flops ? bytes : flops;
}

static void print_line(const struct rig *r, const char *phase, const char *name, double us,
                       struct cost c, double floor) {
    printf("%s,%d,%s,%.2f,%.3f,%.4f,%.0f,%.1f,%.2f,%.0f\n", phase, (int)r->step.n_tokens, name, us,
           c.bytes / 1e6, c.flops / 1e9, c.bytes / us / 1e3, c.flops / us / 1e6, floor,
           100 * floor / us);
    fflush(stdout);
}

static bool wanted(const struct options *o, const char *name) {
    if (!o->words) return true;
    for (const char *p = o->words; *p;) {
        size_t n = strcspn(p, ",");
        char word[32];
        if (n > 0 && n < sizeof word) {
            memcpy(word, p, n);
            word[n] = 0;
            if (strstr(name, word)) return true;
        }
        p += n + (p[n] == ',');
    }
    return false;
}

static void run_ops(struct rig *r, const struct options *o, const struct workload *w) {
    int n = ROUNDS * r->m.n_layers;
    set_workload(r, w, MOE_ROWS_SAMPLE);
    double empty = fastest(r, NULL, 0, o->n_repeat);
    for (int k = 0; k < N_OPS; k++) {
        if (!wanted(o, ops[k].name)) continue;
        struct cost c = op_cost(r, &ops[k]);
        double us = (fastest(r, &ops[k], n, o->n_repeat) - empty) / n;
        print_line(r, w->phase, ops[k].name, us, c, floor_us(o, c));
    }
}

static void run(struct rig *r, const struct options *o, const struct workload *w) {
    /* How many experts a layer reads, from a step; all layers have the same kind of router. */
    struct moe_counters before, after;
    set_workload(r, w, MOE_ROWS_NONE);
    double layers_us = whole_step(r, false, o->n_repeat) / r->m.n_layers;
    r->ops->counters(r->b, &before);
    whole_step(r, false, 0);
    r->ops->counters(r->b, &after);
    r->n_groups = (double)(after.expert_reads - before.expert_reads) /
                  (double)((after.n_steps - before.n_steps) * (uint64_t)r->m.n_layers);
    run_ops(r, o, w);
    struct cost layer = {0}, step = {0};
    double layer_floor = 0, step_floor = 0;
    for (int k = 0; k < N_OPS; k++) {
        struct cost c = op_cost(r, &ops[k]);
        int times = ops[k].use == PER_LAYER ? r->m.n_layers : ops[k].use == PER_STEP ? 1 : 0;
        step.bytes += times * c.bytes, step.flops += times * c.flops;
        step_floor += times * floor_us(o, c);
        if (ops[k].use != PER_LAYER) continue;
        layer.bytes += c.bytes, layer.flops += c.flops;
        layer_floor += floor_us(o, c);
    }
    if (wanted(o, "layers")) print_line(r, w->phase, "layers", layers_us, layer, layer_floor);
    set_workload(r, w, MOE_ROWS_SAMPLE);
    if (wanted(o, "step"))
        print_line(r, w->phase, "step", whole_step(r, true, o->n_repeat), step, step_floor);
}

/* ---- options, life --------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    struct model_shape shape;
} shapes[] = {
    {"qwen3-30b-a3b",
     {.n_embd = 2048,
      .n_heads = 32,
      .n_kv_heads = 4,
      .head_dim = 128,
      .n_experts = 128,
      .n_experts_used = 8,
      .n_ff_expert = 768,
      .n_vocab = 151936,
      .n_ctx_train = 40960,
      .norm_eps = 1e-6f,
      .rope_base = 1e6f}},
    {"small",
     {.n_embd = 512,
      .n_heads = 8,
      .n_kv_heads = 2,
      .head_dim = 128,
      .n_experts = 32,
      .n_experts_used = 4,
      .n_ff_expert = 256,
      .n_vocab = 8192,
      .n_ctx_train = 40960,
      .norm_eps = 1e-6f,
      .rope_base = 1e6f}},
};

static struct model_shape find_shape(const char *name) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (strcmp(shapes[i].name, name) == 0) return shapes[i].shape;
    fprintf(stderr, "%s: --shape %s: want qwen3-30b-a3b or small\n", program, name);
    exit(2);
}

static void parse(int argc, char **argv, struct options *o) {
    enum {
        DEVICE = 1,
        THREADS,
        ISA,
        SHAPE,
        LAYERS,
        DECODE,
        CTX,
        PREFILL,
        PP,
        OPS,
        REPEAT,
        GBPS,
        TFLOPS,
        HELP
    };
    static const struct option longs[] = {
        {"device", 1, 0, DEVICE},   {"threads", 1, 0, THREADS}, {"shape", 1, 0, SHAPE},
        {"layers", 1, 0, LAYERS},   {"decode", 1, 0, DECODE},   {"ctx", 1, 0, CTX},
        {"prefill", 1, 0, PREFILL}, {"pp", 1, 0, PP},           {"ops", 1, 0, OPS},
        {"repeat", 1, 0, REPEAT},   {"gbps", 1, 0, GBPS},       {"tflops", 1, 0, TFLOPS},
        {"cpu-isa", 1, 0, ISA},     {"help", 0, 0, HELP},       {0, 0, 0, 0}};
    *o = (struct options){.device = "cpu",
                          .isa = "auto",
                          .shape = "qwen3-30b-a3b",
                          .n_threads = 1,
                          .n_layers = 8,
                          .ctx = 576,
                          .prefill = 2048,
                          .pp = 512,
                          .n_repeat = 5,
                          .gbps = 3000,
                          .tflops = 500};
    const char *decode = "1,8,32,64,128,256";
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case DEVICE: o->device = optarg; break;
        case THREADS: o->n_threads = bench_int("threads", optarg, 1, 1024); break;
        case ISA: o->isa = optarg; break;
        case SHAPE: o->shape = optarg; break;
        case LAYERS: o->n_layers = bench_int("layers", optarg, 1, MAX_LAYERS); break;
        case DECODE: decode = optarg; break;
        case CTX: o->ctx = bench_int("ctx", optarg, 1, 32768); break;
        case PREFILL: o->prefill = bench_int("prefill", optarg, 0, 16384); break;
        case PP: o->pp = bench_int("pp", optarg, 1, 16384); break;
        case OPS: o->words = optarg; break;
        case REPEAT: o->n_repeat = bench_int("repeat", optarg, 1, 1000); break;
        case GBPS: o->gbps = bench_int("gbps", optarg, 1, 100000); break;
        case TFLOPS: o->tflops = bench_int("tflops", optarg, 1, 100000); break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fprintf(stderr, "%s: --help lists the options\n", program); exit(2);
        }
    }
    if (optind < argc || (o->prefill > 0 && o->prefill < o->pp)) {
        fprintf(stderr, "%s: --help lists the options; --prefill is at least --pp\n", program);
        exit(2);
    }
    o->n_decode = bench_ints("decode", decode, 1, 4096, o->decode, MAX_WORKLOADS);
}

static void open_backend(struct rig *r, const struct options *o) {
    struct backend_config c = {.shape = r->m,
                               .limits = r->limits,
                               .n_threads = o->n_threads,
                               .cpu_isa = o->isa,
                               .gpu_memory_utilization = 0.9};
    struct error e = {0};
    enum status st = ST_UNSUPPORTED;
    error_set(&e, st, "--device %s: want cpu, reference or (in a build with CUDA) cuda:N",
              o->device);
    if (strcmp(o->device, "cpu") == 0) st = backend_cpu_open(&c, &e, &r->b);
    if (strcmp(o->device, "reference") == 0) st = backend_reference_open(&c, &e, &r->b);
#ifdef MOED_CUDA
    if (strncmp(o->device, "cuda:", 5) == 0) {
        c.device = bench_int("device cuda", o->device + 5, 0, 63);
        r->gpu = true;
        st = backend_cuda_open(&c, &e, &r->b);
    }
#endif
    if (st != ST_OK) {
        fprintf(stderr, "%s: %s\n", program, e.text);
        exit(1);
    }
    r->ops = backend_ops_of(r->b);
}

static void create_step(struct rig *r) {
    const struct moe_limits *l = &r->limits;
    r->seqs = bench_alloc((size_t)l->max_seqs, sizeof *r->seqs);
    r->ids = bench_alloc((size_t)l->max_batch_tokens, sizeof *r->ids);
    r->blocks = bench_alloc((size_t)l->n_blocks, sizeof *r->blocks);
    r->rows = bench_alloc((size_t)l->max_rows, sizeof *r->rows);
    for (int32_t i = 0; i < l->max_batch_tokens; i++)
        r->ids[i] = (int32_t)(random_next(&r->rng) % (uint64_t)r->m.n_vocab);
}

int main(int argc, char **argv) {
    static struct rig r;
    struct options o;
    parse(argc, argv, &o);
    int32_t most = o.prefill > 0 ? o.prefill / o.pp : 1, longest = o.ctx > o.pp ? o.ctx : o.pp;
    int32_t most_tokens = o.prefill;
    for (int i = 0; i < o.n_decode; i++) {
        if (o.decode[i] > most) most = o.decode[i];
        if (o.decode[i] > most_tokens) most_tokens = o.decode[i];
    }
    if (longest < (ROUNDS + 1) * MAX_LAYERS)
        longest = (ROUNDS + 1) * MAX_LAYERS; /* histories of op_sample */
    longest = (longest + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    r.rng = 1;
    r.m = find_shape(o.shape);
    r.m.n_layers = o.n_layers;
    r.limits = (struct moe_limits){.max_batch_tokens = most_tokens,
                                   .max_seqs = most,
                                   .max_rows = most,
                                   .max_seq_tokens = longest,
                                   .block_tokens = BLOCK_TOKENS,
                                   .n_blocks = most * (longest / BLOCK_TOKENS)};
    open_backend(&r, &o);
    load_model(&r);
    struct error e = {0};
    int32_t n_blocks;
    if (r.ops->ready(r.b, &e, &n_blocks) != ST_OK) {
        fprintf(stderr, "%s: %s\n", program, e.text);
        exit(1);
    }
    create_step(&r);
    fill_cache(&r, most, longest);
    printf("phase,tokens,op,us,mbytes,gflop,gb_per_s,tflop_per_s,floor_us,floor_pct\n");
    for (int i = 0; i < o.n_decode; i++)
        run(&r, &o, &(struct workload){"decode", o.decode[i], o.ctx - 1, 1});
    if (o.prefill > 0) run(&r, &o, &(struct workload){"prefill", o.prefill / o.pp, 0, o.pp});
    r.ops->close(r.b);
    free(r.f32.p);
    free(r.q4.p);
    free(r.q6.p);
    free(r.seqs);
    free(r.ids);
    free(r.blocks);
    free(r.rows);
    return 0;
}
