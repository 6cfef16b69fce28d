/* cpu: life of the backend, loading, memory and steps; see cpu.h. */
#include "moe/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- memory -------------------------------------------------------------------------------------- */

enum { HUGE_PAGE = 2 << 20, CHUNK = 32 << 20, LINE = 64 };

/* Memory comes in chunks of huge pages, small pieces several to a chunk: streaming weights through small
 * pages otherwise spends its time in page walks, and the prefetcher stops at each page. What is never
 * touched costs nothing. */
void *cpu_map(struct cpu *c, enum cpu_memory what, size_t n_bytes) {
    size_t size;
    if (!size_add(n_bytes, 3 * HUGE_PAGE, &size)) return NULL;
    n_bytes = cpu_pad(n_bytes, LINE);
    if (n_bytes > c->n_chunk_bytes) {
        size = cpu_pad(n_bytes, HUGE_PAGE);
        if (size < CHUNK) size = CHUNK;
        struct cpu_alloc *a = malloc(sizeof *a);
        if (!a) return NULL;
        void *p = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
        if (p == MAP_FAILED) {
            free(a);
            return NULL;
        }
        *a = (struct cpu_alloc){c->allocs, p, size + HUGE_PAGE};
        c->allocs = a;
        uint8_t *aligned = (uint8_t *)cpu_pad((size_t)(uintptr_t)p, HUGE_PAGE);
        madvise(aligned, size, MADV_HUGEPAGE); /* advice: may be refused */
        /* The rest of the larger of the two chunks serves the next pieces. */
        c->n_bytes[what] += n_bytes;
        if (size - n_bytes > c->n_chunk_bytes) {
            c->chunk = aligned + n_bytes;
            c->n_chunk_bytes = size - n_bytes;
        }
        return aligned;
    }
    uint8_t *p = c->chunk;
    c->chunk += n_bytes;
    c->n_chunk_bytes -= n_bytes;
    c->n_bytes[what] += n_bytes;
    return p;
}

/* [a][b] of `size` bytes; NULL on overflow too. */
static void *map2(struct cpu *c, enum cpu_memory what, size_t a, size_t b, size_t size) {
    size_t n;
    if (!size_mul(a, b, &n) || !size_mul(n, size, &n)) return NULL;
    return cpu_map(c, what, n);
}

static void cpu_close(struct backend *b) {
    struct cpu *c = cpu_of(b);
    exchange_close(c->exchange); /* first: until then others may read weights and rows */
    cpu_pool_destroy(c->pool);
    while (c->weights) {
        struct weight *w = c->weights;
        c->weights = w->next;
        free(w);
    }
    while (c->bufs) {
        struct buf *f = c->bufs;
        c->bufs = f->next;
        free(f);
    }
    if (c->scratch)
        for (int i = 0; i < c->n_threads; i++) sampler_scratch_destroy(c->scratch[i].sampler);
    free(c->scratch);
    batch_destroy(&c->batch);
    route_destroy(&c->route);
    sampler_destroy(c->sampler);
    batch_results_destroy(&c->results);
    while (c->allocs) {
        struct cpu_alloc *a = c->allocs;
        c->allocs = a->next;
        munmap(a->p, a->n_bytes);
        free(a);
    }
    free(c);
}

/* ---- weights ---------------------------------------------------------------------------------------- */

/* Row tiles are read and repacked a few at a time, by all threads. */
struct repack {
    const struct cpu_matrix *m;
    const uint8_t *raw;
    int32_t first_tile, n_rows; /* of one expert; the rows in raw */
    int32_t expert;
};

static void repack_item(void *ctx, int32_t item, int thread) {
    const struct repack *r = ctx;
    (void)thread;
    int32_t row = item * CPU_ROWS, n = r->n_rows - row < CPU_ROWS ? r->n_rows - row : CPU_ROWS;
    cpu_repack_tile(r->m, r->raw + (size_t)row * r->m->row_bytes, (int)n,
                    cpu_matrix_tile(r->m, r->expert, r->first_tile + item));
}

static enum status load_matrix(struct cpu *c, const struct weight_source *source,
                               const struct cpu_matrix *m) {
    enum { PIECE = 8 << 20 };
    size_t tile_raw = m->row_bytes * CPU_ROWS;
    int32_t step = tile_raw >= PIECE ? 1 : (int32_t)(PIECE / tile_raw);
    if (step > m->n_tiles) step = m->n_tiles;
    uint8_t *raw = malloc((size_t)step * tile_raw);
    if (!raw) return ST_NO_MEMORY;
    enum status st = ST_OK;
    bool shared = c->exchange && m->n_experts > 1;
    if (shared)
        st = exchange_stack(c->exchange, source->layer, m->p, m->n_bytes / (size_t)m->n_experts);
    for (int32_t e = 0; e < m->n_experts && st == ST_OK; e++) {
        /* What is not held is never touched, and takes no memory. */
        if (shared && !exchange_holds(c->exchange, source->layer, e)) continue;
        for (int32_t tile = 0; tile < m->n_tiles && st == ST_OK; tile += step) {
            int32_t row = tile * CPU_ROWS, n_rows = m->n_rows - row;
            if (n_rows > step * CPU_ROWS) n_rows = step * CPU_ROWS;
            size_t at = ((size_t)e * (size_t)m->n_rows + (size_t)row) * m->row_bytes;
            st = source->read(source->ctx, at, raw, (size_t)n_rows * m->row_bytes);
            if (st != ST_OK) break;
            struct repack r = {m, raw, tile, n_rows, e};
            cpu_pool_run(c->pool, (n_rows + CPU_ROWS - 1) / CPU_ROWS, repack_item, &r);
        }
    }
    free(raw);
    return st;
}

static enum status load_vector(const struct weight_source *source, float *dst) {
    uint8_t *raw = malloc(source->n_bytes);
    if (!raw) return ST_NO_MEMORY;
    enum status st = source->read(source->ctx, 0, raw, source->n_bytes);
    if (st == ST_OK) dequantize(source->type, raw, (size_t)source->n_cols, dst);
    free(raw);
    return st;
}

static enum status cpu_weight_load(struct backend *b, const struct weight_source *source,
                                   struct error *e, struct weight **out) {
    struct cpu *c = cpu_of(b);
    struct cpu_matrix m;
    const char *type = tensor_type_name(source->type);
    if (!cpu_matrix_plan(source->type, source->n_experts, source->n_rows, source->n_cols, &m))
        return error_set(e, ST_UNSUPPORTED,
                         "tensor %s: no CPU kernel for rows of %d values of type %s", source->name,
                         (int)source->n_cols, type ? type : "unknown");
    size_t n_bytes;
    if (!size_mul((size_t)source->n_experts * (size_t)source->n_rows, m.row_bytes, &n_bytes) ||
        n_bytes != source->n_bytes)
        return error_set(e, ST_CORRUPT, "tensor %s: %zu bytes do not fit its shape", source->name,
                         source->n_bytes);
    struct weight *w = calloc(1, sizeof *w);
    if (!w) return error_set(e, ST_NO_MEMORY, "tensor %s: no memory", source->name);
    w->next = c->weights;
    c->weights = w;
    bool vector = source->n_rows == 1 && source->n_experts == 1;
    if (vector)
        w->vector = map2(c, CPU_MEM_WEIGHTS, 1, (size_t)source->n_cols, sizeof(float));
    else
        m.p = cpu_map(c, CPU_MEM_WEIGHTS, m.n_bytes);
    w->matrix = m;
    if (!w->vector && !m.p)
        return error_set(e, ST_NO_MEMORY, "tensor %s: no memory for %zu bytes", source->name,
                         m.n_bytes);
    if (source->n_cols > c->max_cols) c->max_cols = (int32_t)cpu_pad((size_t)source->n_cols, 32);
    if (source->n_experts > 1 && !cpu_matrix_quantized(&m)) c->float_experts = true;
    *out = w;
    enum status st = vector ? load_vector(source, w->vector) : load_matrix(c, source, &m);
    return st == ST_NO_MEMORY ? error_set(e, st, "tensor %s: no memory to load it", source->name)
                              : st;
}

/* ---- the rest of the memory ------------------------------------------------------------------------- */

static enum status cpu_buf_create(struct backend *b, enum buf_rows rows, enum buf_kind kind,
                                  int32_t n_cols, struct buf **out) {
    (void)kind; /* everything is float32 here; quantised copies are the ops' business */
    struct cpu *c = cpu_of(b);
    struct buf *f = calloc(1, sizeof *f);
    if (!f) return ST_NO_MEMORY;
    f->next = c->bufs;
    c->bufs = f;
    f->n_cols = n_cols;
    f->stride = cpu_pad((size_t)n_cols, CPU_ROWS);
    f->n_rows = rows == BUF_HEAD     ? c->limits.max_rows
                : rows == BUF_TOKENS ? c->limits.max_batch_tokens
                                     : cpu_max_work_tokens(c) * c->shape.n_experts_used;
    f->f = map2(c, CPU_MEM_ACTIVATIONS, (size_t)f->n_rows, f->stride, sizeof(float));
    *out = f;
    return f->f ? ST_OK : ST_NO_MEMORY;
}

static bool create_scratch(struct cpu *c) {
    size_t cols = (size_t)c->max_cols, head = cpu_pad((size_t)c->shape.head_dim, 16);
    size_t most = cpu_pad((size_t)c->kernels->max_tile, CPU_GROUP);
    c->scratch = calloc((size_t)c->n_threads, sizeof *c->scratch);
    if (!c->scratch) return false;
    for (int i = 0; i < c->n_threads; i++) {
        struct cpu_scratch *s = &c->scratch[i];
        s->tile = cpu_map(c, CPU_MEM_SCRATCH, most * cpu_q_bytes(c, c->max_cols, 2));
        s->rows = map2(c, CPU_MEM_SCRATCH, most, cols, sizeof(float));
        s->gate = map2(c, CPU_MEM_SCRATCH, most, CPU_BLOCK, sizeof(float));
        s->up = map2(c, CPU_MEM_SCRATCH, most, CPU_BLOCK, sizeof(float));
        s->state = map2(c, CPU_MEM_SCRATCH, CPU_ATTEND_ROWS, head, sizeof(float));
        s->keys = map2(c, CPU_MEM_SCRATCH, CPU_SPLIT * 2, head, sizeof(uint16_t));
        if (!s->tile || !s->rows || !s->gate || !s->up || !s->state || !s->keys) return false;
        if (sampler_scratch_create(c->shape.n_vocab, &s->sampler) != ST_OK) return false;
    }
    return true;
}

static bool create_exchange(struct cpu *c) {
    size_t n_work = (size_t)cpu_max_work_tokens(c),
           stride = cpu_pad((size_t)c->shape.n_embd, CPU_ROWS);
    size_t n_own = (size_t)c->limits.max_batch_tokens * (size_t)c->shape.n_experts_used;
    c->inputs = (struct buf){.n_cols = c->shape.n_embd, .stride = stride};
    c->returned = c->inputs;
    c->inputs.f = map2(c, CPU_MEM_ACTIVATIONS, n_work, stride, sizeof(float));
    c->returned.f = map2(c, CPU_MEM_ACTIVATIONS, n_own, stride, sizeof(float));
    if (!c->inputs.f || !c->returned.f) return false;
    if (!c->x_q) return true;
    c->inputs_q = map2(c, CPU_MEM_ACTIVATIONS, n_work,
                       cpu_q_bytes(c, c->shape.n_embd, c->kernels->up_planes), 1);
    return c->inputs_q != NULL;
}

static bool create_inputs(struct cpu *c) {
    size_t n_tokens = (size_t)c->limits.max_batch_tokens, n_used = (size_t)c->shape.n_experts_used;
    int32_t d = c->shape.n_embd, f = c->shape.n_ff_expert;
    c->x_tiles = map2(c, CPU_MEM_ACTIVATIONS, cpu_pad(n_tokens, CPU_GROUP),
                      cpu_q_bytes(c, c->max_cols, 2), 1);
    c->x_rows = map2(c, CPU_MEM_ACTIVATIONS, n_tokens, (size_t)c->max_cols, sizeof(float));
    c->tile_first = map2(c, CPU_MEM_SCRATCH, n_tokens + 1, 1, sizeof(int32_t));
    c->tile_of = map2(c, CPU_MEM_SCRATCH, n_tokens, 1, sizeof(int32_t));
    c->attend_first = map2(c, CPU_MEM_SCRATCH, n_tokens + 1, 1, sizeof(int32_t));
    c->groups = map2(c, CPU_MEM_SCRATCH, (size_t)c->shape.n_experts, 1, sizeof(int32_t));
    if (!c->x_tiles || !c->x_rows || !c->tile_first || !c->tile_of || !c->attend_first ||
        !c->groups)
        return false;
    /* Widths that are not whole blocks never meet a quantised matrix. */
    if (d % CPU_BLOCK == 0) {
        c->x_q =
            map2(c, CPU_MEM_ACTIVATIONS, n_tokens, cpu_q_bytes(c, d, c->kernels->up_planes), 1);
        if (!c->x_q) return false;
    }
    if (f % CPU_BLOCK == 0) {
        c->act_q = map2(c, CPU_MEM_ACTIVATIONS, (size_t)cpu_max_work_tokens(c) * n_used,
                        cpu_q_bytes(c, f, CPU_PLANES_DOWN), 1);
        if (!c->act_q) return false;
    }
    return !c->exchange || create_exchange(c);
}

static enum status cpu_ready(struct backend *b, struct error *e, int32_t *n_blocks) {
    struct cpu *c = cpu_of(b);
    const struct model_shape *m = &c->shape;
    struct moe_limits *l = &c->limits;
    if (l->n_blocks == 0) /* as much as moe_open chooses: 1,024 tokens a slot */
        l->n_blocks = l->max_seqs * ((1024 + l->block_tokens - 1) / l->block_tokens);
    int32_t logits = (int32_t)cpu_pad((size_t)m->n_experts, CPU_BLOCK); /* go into scratch rows */
    if (c->max_cols < logits) c->max_cols = logits;
    bool ok = create_scratch(c) && create_inputs(c) && cpu_kv_create(c) &&
              batch_create(l, &c->batch) == ST_OK &&
              route_create(m, l->max_batch_tokens, &c->route) == ST_OK &&
              sampler_create(l->max_seqs, l->max_seq_tokens, m->n_vocab, &c->sampler) == ST_OK &&
              batch_results_create(l->max_rows, &c->results) == ST_OK;
    if (!ok)
        return error_set(e, ST_NO_MEMORY,
                         "no memory for %d KV blocks of %d tokens and a batch of %d",
                         (int)l->n_blocks, (int)l->block_tokens, (int)l->max_batch_tokens);
    *n_blocks = l->n_blocks;
    return ST_OK;
}

/* ---- telling ------------------------------------------------------------------------------------------ */

static void cpu_describe(const struct backend *b, char *dst, size_t cap) {
    const struct cpu *c = (const struct cpu *)(const void *)b;
    snprintf(dst, cap, "cpu %s, %d thread%s", c->kernels->name, c->n_threads,
             c->n_threads == 1 ? "" : "s");
}

static int cpu_memory(const struct backend *b, struct moe_memory_line *dst, int cap) {
    const struct cpu *c = (const struct cpu *)(const void *)b;
    uint64_t away = c->exchange ? exchange_away_bytes(c->exchange) : 0;
    uint64_t exchange = c->exchange ? exchange_bytes(c->exchange) : 0;
    const struct moe_memory_line lines[] = {
        {"weights", c->n_bytes[CPU_MEM_WEIGHTS] - away},
        {"kv", c->n_bytes[CPU_MEM_KV]},
        {"activations", c->n_bytes[CPU_MEM_ACTIVATIONS]},
        {"scratch", c->n_bytes[CPU_MEM_SCRATCH]},
        {"sampler", sampler_bytes(c->sampler)},
        {"batch and routing", batch_bytes(&c->limits) + route_bytes(&c->route) + exchange},
    };
    int n = (int)(sizeof lines / sizeof *lines);
    if (n > cap) n = cap;
    memcpy(dst, lines, (size_t)n * sizeof *dst);
    return n;
}

static void cpu_counters(const struct backend *b, struct moe_counters *out) {
    const struct cpu *c = (const struct cpu *)(const void *)b;
    *out = c->counters;
    if (c->exchange) exchange_counters(c->exchange, out);
}

/* ---- steps ---------------------------------------------------------------------------------------------- */

static enum status cpu_slot_start(struct backend *b, const struct moe_slot_start *start) {
    sampler_start(cpu_of(b)->sampler, start);
    return ST_OK;
}

static enum status cpu_step_begin(struct backend *b, const struct moe_step *step, bool *issue) {
    struct cpu *c = cpu_of(b);
    c->begun_ns = clock_now_ns();
    c->peers = exchange_in_use(c->exchange);
    batch_set(&c->batch, step, c->sampler);
    cpu_rope_begin(c);
    cpu_attend_begin(c);
    c->x_q_of = c->act_q_of = NULL;
    *issue = true;
    return ST_OK;
}

static enum status cpu_step_end(struct backend *b) {
    struct cpu *c = cpu_of(b);
    uint64_t run_ns = clock_now_ns() - c->begun_ns;
    c->counters.n_steps++;
    c->counters.n_tokens += (uint64_t)c->batch.n_tokens;
    c->counters.busy_ns += run_ns;
    batch_results_push(&c->results, c->batch.n_rows, run_ns);
    return ST_OK;
}

static enum status cpu_step_collect(struct backend *b, struct moe_result *out) {
    batch_results_pop(&cpu_of(b)->results, out);
    return ST_OK;
}

/* ---- looking inside --------------------------------------------------------------------------------------- */

static enum status cpu_buf_read(struct backend *b, const struct buf *buf, int32_t row,
                                int32_t n_rows, float *dst) {
    const struct cpu *c = cpu_of(b);
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    size_t row_bytes = cpu_q_bytes(c, buf->n_cols, CPU_PLANES_DOWN);
    for (int32_t i = row; i < row + n_rows; i++, dst += buf->n_cols) {
        if (buf == c->act_q_of)
            cpu_dequantize_row(c, c->act_q + (size_t)i * row_bytes, buf->n_cols, CPU_PLANES_DOWN,
                               dst);
        else
            memcpy(dst, cpu_row(buf, i), (size_t)buf->n_cols * sizeof *dst);
    }
    return ST_OK;
}

static enum status cpu_buf_write(struct backend *b, struct buf *buf, int32_t row, int32_t n_rows,
                                 const float *src) {
    struct cpu *c = cpu_of(b);
    CHECK(row >= 0 && n_rows >= 0 && row <= buf->n_rows - n_rows);
    if (buf == c->act_q_of) { /* rows that are not written keep their values */
        size_t row_bytes = cpu_q_bytes(c, buf->n_cols, CPU_PLANES_DOWN);
        for (int32_t i = 0; i < buf->n_rows; i++)
            cpu_dequantize_row(c, c->act_q + (size_t)i * row_bytes, buf->n_cols, CPU_PLANES_DOWN,
                               cpu_row(buf, i));
        c->act_q_of = NULL;
    }
    if (buf == c->x_q_of) c->x_q_of = NULL;
    for (int32_t i = 0; i < n_rows; i++)
        memcpy(cpu_row(buf, row + i), src + (size_t)i * (size_t)buf->n_cols,
               (size_t)buf->n_cols * sizeof *src);
    return ST_OK;
}

static enum status cpu_route_read(struct backend *b, int32_t *ids, float *weights,
                                  int32_t *expert_first) {
    const struct route *route = &cpu_of(b)->route;
    size_t n = (size_t)route->n_tokens * (size_t)route->n_used;
    if (ids) memcpy(ids, route->ids, n * sizeof *ids);
    if (weights) memcpy(weights, route->weights, n * sizeof *weights);
    if (expert_first)
        memcpy(expert_first, route->expert_first,
               ((size_t)route->n_experts + 1) * sizeof *expert_first);
    return ST_OK;
}

static enum status cpu_route_write(struct backend *b, const int32_t *ids, const float *weights) {
    struct cpu *c = cpu_of(b);
    size_t n = (size_t)c->batch.n_tokens * (size_t)c->shape.n_experts_used;
    memcpy(c->route.ids, ids, n * sizeof *ids);
    memcpy(c->route.weights, weights, n * sizeof *weights);
    route_sort(&c->route, c->batch.n_tokens);
    cpu_route_done(c);
    return ST_OK;
}

/* ---- opening -------------------------------------------------------------------------------------------- */

static const struct backend_ops cpu_ops = {
    .kind = "cpu",
    .close = cpu_close,
    .weight_load = cpu_weight_load,
    .buf_create = cpu_buf_create,
    .ready = cpu_ready,
    .describe = cpu_describe,
    .memory = cpu_memory,
    .counters = cpu_counters,
    .slot_start = cpu_slot_start,
    .step_begin = cpu_step_begin,
    .embed = cpu_embed,
    .norm_linear = cpu_norm_linear,
    .rope_store = cpu_rope_store,
    .attention = cpu_attention,
    .linear_add = cpu_linear_add,
    .route = cpu_route,
    .experts_up = cpu_experts_up,
    .experts_down = cpu_experts_down,
    .head = cpu_head,
    .sample = cpu_sample,
    .step_end = cpu_step_end,
    .step_collect = cpu_step_collect,
    .buf_read = cpu_buf_read,
    .buf_write = cpu_buf_write,
    .route_read = cpu_route_read,
    .route_write = cpu_route_write,
    .kv_poison = cpu_kv_poison,
};

static enum status choose_kernels(const char *isa, struct error *e,
                                  const struct cpu_kernels **out) {
    static const struct {
        const char *name;
        const struct cpu_kernels *(*kernels)(void);
        const char *lacks;
    } sets[] = {
        /* The best first. */
        {"amx", cpu_kernels_amx, "no AMX, or this kernel does not give its tiles out"},
        {"avx512", cpu_kernels_avx512, "no AVX-512 with VNNI"},
        {"avx2", cpu_kernels_avx2, "no AVX2 with FMA and F16C"},
    };
    bool any = strcmp(isa, "auto") == 0;
    *out = NULL;
    if (!cpu_kernels_avx2())
        return error_set(
            e, ST_UNSUPPORTED,
            "this processor has no AVX2 with FMA and F16C, which device cpu needs: use "
            "device reference");
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        if (!any && strcmp(isa, sets[i].name) != 0) continue;
        *out = sets[i].kernels();
        if (*out) return ST_OK;
        if (!any)
            return error_set(e, ST_UNSUPPORTED, "cpu_isa %s: this processor has %s: use auto", isa,
                             sets[i].lacks);
    }
    return error_set(e, ST_UNSUPPORTED, "cpu_isa %s: it must be auto, avx2, avx512 or amx", isa);
}

enum status backend_cpu_open(const struct backend_config *c, struct error *e,
                             struct backend **out) {
    *out = NULL;
    const struct cpu_kernels *kernels;
    enum status st = choose_kernels(c->cpu_isa ? c->cpu_isa : "auto", e, &kernels);
    if (st != ST_OK) return st;
    CHECK(c->n_threads >= 1);
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu) return error_set(e, ST_NO_MEMORY, "no memory for the CPU backend");
    cpu->ops = &cpu_ops;
    cpu->shape = c->shape;
    cpu->limits = c->limits;
    cpu->kernels = kernels;
    cpu->n_threads = c->n_threads < CPU_POOL_MAX_THREADS ? c->n_threads : CPU_POOL_MAX_THREADS;
    st = cpu_pool_create(cpu->n_threads, &cpu->pool);
    if (st != ST_OK) {
        free(cpu);
        return error_set(e, st, "cannot start %d threads", c->n_threads);
    }
    if (c->group) {
        st =
            exchange_open(c->group, c->rank, &c->shape, c->limits.max_batch_tokens, &cpu->exchange);
        if (st != ST_OK) {
            cpu_close((struct backend *)(void *)cpu);
            return error_set(e, st, "rank %d cannot join its group: %s", c->rank, status_name(st));
        }
    }
    *out = (struct backend *)(void *)cpu;
    return ST_OK;
}
