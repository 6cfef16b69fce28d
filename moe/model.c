/* model: the public door (moe.h). Opens the file, chooses limits and a backend, loads the weights, and
 * holds every step against the limits before the backend sees it.
 *
 * Invariants: nothing that the file or the options say reaches a backend unchecked; a step that breaks a
 * limit is a programmer's error (CHECK), because callers know the limits from moe_info. The file is closed
 * after loading. One thread. */
#include "moe/moe.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/arch.h"
#include "moe/backend.h"
#include "moe/exchange.h"
#include "moe/forward.h"
#include "moe/gguf.h"
#include "moe/sampler.h"
#ifdef MOED_CUDA
#include "cuda/cuda_backend.h"
#endif

struct slot_state {
    bool started;
    bool sampled; /* a submitted step samples it: MOE_LAST_TOKEN has a meaning */
    int32_t n_ids; /* its history's length once all submitted steps have sampled */
    uint64_t checked; /* the last step it was in, by the count of checks */
};

struct moe {
    struct moe_info info;
    const struct backend_ops *ops;
    struct forward forward;
    struct moe_group *group; /* or NULL */
    struct slot_state *slots; /* [max_seqs] */
    uint64_t n_submitted, n_checked;
    int n_in_flight;
    int32_t n_result_rows; /* of the step collected last; -1: a later one was submitted */
    int32_t n_step_rows[MOE_MAX_IN_FLIGHT]; /* by step number */
    struct forward_probe probe;
};

/* ---- limits --------------------------------------------------------------------------------- */

enum {
    MAX_BATCH_TOKENS = 1 << 20,
    MAX_SEQS = 1 << 16,
    MAX_BLOCK_TOKENS = 256,
    DEFAULT_BLOCK_TOKENS = 16,
    DEFAULT_SEQ_TOKENS = 1024 /* per slot, for the KV pool's default size */
};

static enum status check_range(const char *name, int32_t value, int32_t lo, int32_t hi,
                               struct error *e) {
    if (value >= lo && value <= hi) return ST_OK;
    return error_set(e, ST_INVALID, "%s is %d: it must lie between %d and %d", name, (int)value,
                     (int)lo, (int)hi);
}

static int32_t blocks_of(int32_t n_tokens, int32_t block_tokens) {
    return (int32_t)(((int64_t)n_tokens + block_tokens - 1) / block_tokens);
}

/* The pool's default: DEFAULT_SEQ_TOKENS for each slot, no more than all slots at full length can use, and enough
 * for one sequence of full length if somebody chose that length. */
static int64_t default_blocks(const struct moe_limits *l, bool any_length) {
    int64_t full = blocks_of(l->max_seq_tokens, l->block_tokens);
    int64_t n = (int64_t)l->max_seqs * blocks_of(DEFAULT_SEQ_TOKENS, l->block_tokens);
    if (n > full * l->max_seqs) n = full * l->max_seqs;
    return n < full && !any_length ? full : n;
}

/* Fill in the defaults of *l and check it against the model. on_gpu: the backend sizes the pool. */
static enum status settle_limits(const struct model_shape *m, bool on_gpu, struct error *e,
                                 struct moe_limits *l) {
    bool any_length = l->max_seq_tokens == 0;
    if (l->block_tokens == 0) l->block_tokens = DEFAULT_BLOCK_TOKENS;
    if (any_length || l->max_seq_tokens > m->n_ctx_train) l->max_seq_tokens = m->n_ctx_train;
    if (l->max_rows == 0) l->max_rows = l->max_seqs;
    enum status st;
    if ((st = check_range("max_batch_tokens", l->max_batch_tokens, 1, MAX_BATCH_TOKENS, e)) ||
        (st = check_range("max_seqs", l->max_seqs, 1, MAX_SEQS, e)) ||
        (st = check_range("max_rows", l->max_rows, l->max_seqs, MAX_BATCH_TOKENS, e)) ||
        (st = check_range("max_seq_tokens", l->max_seq_tokens, 1, INT32_MAX - 1, e)) ||
        (st = check_range("block_tokens", l->block_tokens, 1, MAX_BLOCK_TOKENS, e)))
        return st;
    if (l->block_tokens & (l->block_tokens - 1))
        return error_set(e, ST_INVALID, "block_tokens is %d: it must be a power of two",
                         (int)l->block_tokens);
    if ((int64_t)l->max_batch_tokens * m->n_experts_used > INT32_MAX)
        return error_set(e, ST_INVALID,
                         "max_batch_tokens is %d: too many with %d experts per token",
                         (int)l->max_batch_tokens, (int)m->n_experts_used);
    int64_t n_blocks = l->n_blocks;
    if (n_blocks == 0 && !on_gpu) n_blocks = default_blocks(l, any_length);
    if (n_blocks < 0 || n_blocks * l->block_tokens > INT32_MAX)
        return error_set(e, ST_INVALID, "n_blocks is %lld: the pool must hold 1 to %d tokens",
                         (long long)n_blocks, INT32_MAX);
    l->n_blocks = (int32_t)n_blocks;
    /* A length that nobody chose need not be more than the pool can hold. */
    int64_t pool_tokens = n_blocks * l->block_tokens;
    if (any_length && pool_tokens > 0 && pool_tokens < l->max_seq_tokens)
        l->max_seq_tokens = (int32_t)pool_tokens;
    return ST_OK;
}

/* ---- devices -------------------------------------------------------------------------------- */

static int count_cores(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? n : 1;
}

/* "cuda" or "cuda:N". */
static bool parse_cuda(const char *device, int *out) {
    if (strncmp(device, "cuda", 4) != 0) return false;
    if (device[4] == 0) {
        *out = 0;
        return true;
    }
    if (device[4] != ':' || device[5] < '0' || device[5] > '9') return false;
    char *end;
    long n = strtol(device + 5, &end, 10);
    if (*end != 0 || n > 1023) return false;
    *out = (int)n;
    return true;
}

static enum status check_device(const char *device, struct error *e) {
    int n;
    if (strcmp(device, "cpu") == 0 || strcmp(device, "reference") == 0 || parse_cuda(device, &n))
        return ST_OK;
    return error_set(e, ST_INVALID, "device %s: it must be cpu, reference or cuda:N", device);
}

enum status moe_devices_parse(const char *list, struct error *e, struct moe_devices *out) {
    *out = (struct moe_devices){0};
    for (;;) {
        size_t len = strcspn(list, ",");
        if (out->n == MOE_MAX_RANKS)
            return error_set(e, ST_INVALID, "device: more than %d of them", MOE_MAX_RANKS);
        char *name = out->names[out->n];
        if (len >= sizeof out->names[0])
            return error_set(e, ST_INVALID, "device %s: it must be cpu, reference or cuda:N", list);
        memcpy(name, list, len);
        enum status st = check_device(name, e);
        if (st != ST_OK) return st;
        if (strncmp(name, out->names[0], 4) != 0)
            return error_set(e, ST_INVALID, "device %s beside %s: all must be of one kind", name,
                             out->names[0]);
        out->n++;
        if (list[len] == 0) return ST_OK;
        list += len + 1;
    }
}

static enum status open_backend(const char *device, const struct backend_config *c, struct error *e,
                                struct backend **out) {
    if (strcmp(device, "reference") == 0) return backend_reference_open(c, e, out);
    if (strcmp(device, "cpu") == 0) return backend_cpu_open(c, e, out);
#ifdef MOED_CUDA
    return backend_cuda_open(c, e, out);
#else
    return error_set(e, ST_UNSUPPORTED,
                     "this build has no device %s: build with MOED_CUDA, or use cpu", device);
#endif
}

enum status moe_unique_id_create(const char *device, struct error *e, struct moe_unique_id *out) {
    *out = (struct moe_unique_id){{0}};
    enum status st = check_device(device, e);
#ifdef MOED_CUDA
    if (st == ST_OK && strncmp(device, "cuda", 4) == 0) st = backend_cuda_unique_id(e, out);
#endif
    return st;
}

/* ---- loading -------------------------------------------------------------------------------- */

struct loader {
    const struct gguf *gguf;
    const struct gguf_tensor *tensor; /* in hand */
    int32_t layer;
    struct backend *backend;
    struct error *error;
    void (*progress)(void *ctx, uint64_t done, uint64_t total);
    void *ctx;
    uint64_t done; /* bytes of the tensors before this one */
    uint64_t total;
    struct weight_source *list; /* not NULL: tensors are listed here, not loaded */
    size_t n_list, n_list_room;
};

static enum status loader_read(void *ctx, size_t offset, void *dst, size_t n) {
    struct loader *l = ctx;
    enum status st = gguf_tensor_read(l->gguf, l->tensor, offset, dst, n);
    if (st != ST_OK)
        return error_set(l->error, st, "tensor %s: the file ends or cannot be read at byte %zu",
                         l->tensor->name, offset);
    /* A backend may read in any order and twice: how far this read reached is near enough. */
    if (l->progress) l->progress(l->ctx, l->done + offset + n, l->total);
    return ST_OK;
}

static enum status load(struct loader *l, const struct gguf_tensor *t, struct weight **out) {
    l->tensor = t;
    /* A vector is one row; arch_read has range-checked every dimension. */
    struct weight_source source = {.name = t->name,
                                   .type = t->type,
                                   .n_experts = (int32_t)t->ne[2],
                                   .n_rows = (int32_t)t->ne[1],
                                   .n_cols = (int32_t)t->ne[0],
                                   .layer = l->layer,
                                   .n_bytes = t->n_bytes,
                                   .read = loader_read,
                                   .ctx = l};
    if (l->list) {
        CHECK(l->n_list < l->n_list_room);
        l->list[l->n_list++] = source;
        *out = NULL;
        return ST_OK;
    }
    enum status st = backend_ops_of(l->backend)->weight_load(l->backend, &source, l->error, out);
    l->done += t->n_bytes;
    return st;
}

static enum status load_layer(struct loader *l, const struct arch_layer *a,
                              struct forward_layer *f) {
    const struct {
        const struct gguf_tensor *tensor;
        struct weight **weight;
    } pairs[] = {
        {a->attn_norm, &f->attn_norm},
        {a->attn_q, &f->q},
        {a->attn_k, &f->k},
        {a->attn_v, &f->v},
        {a->attn_q_norm, &f->q_norm},
        {a->attn_k_norm, &f->k_norm},
        {a->attn_output, &f->attn_out},
        {a->ffn_norm, &f->ffn_norm},
        {a->router, &f->router},
        {a->gate_exps, &f->gate},
        {a->up_exps, &f->up},
        {a->down_exps, &f->down},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        enum status st = load(l, pairs[i].tensor, pairs[i].weight);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static enum status load_all(struct loader *l, const struct arch_model *a, struct forward *f) {
    enum status st;
    if ((st = load(l, a->token_embd, &f->embed)) != ST_OK) return st;
    for (l->layer = 0; l->layer < a->shape.n_layers; l->layer++)
        if ((st = load_layer(l, &a->layers[l->layer], &f->layers[l->layer])) != ST_OK) return st;
    if ((st = load(l, a->output_norm, &f->norm)) != ST_OK) return st;
    f->head = f->embed;
    return a->output == a->token_embd ? ST_OK : load(l, a->output, &f->head);
}

/* Tell the backend what is coming. */
static enum status plan(struct loader *l, const struct arch_model *a, struct moe *m) {
    enum { PER_LAYER = 12, OTHERS = 3 };
    if (!m->ops->plan) return ST_OK;
    l->n_list_room = (size_t)a->shape.n_layers * PER_LAYER + OTHERS;
    l->list = calloc(l->n_list_room, sizeof *l->list);
    if (!l->list) return error_set(l->error, ST_NO_MEMORY, "no memory");
    enum status st = load_all(l, a, &m->forward);
    if (st == ST_OK) st = m->ops->plan(l->backend, l->list, l->n_list, l->error, &m->info.offload);
    free(l->list);
    l->list = NULL;
    return st;
}

/* ---- opening -------------------------------------------------------------------------------- */

static enum status read_info(const struct gguf *g, const struct arch_model *a, struct error *e,
                             struct moe_info *info) {
    memcpy(info->name, a->name, sizeof info->name);
    memcpy(info->architecture, a->architecture, sizeof info->architecture);
    memcpy(info->quantization, a->quantization, sizeof info->quantization);
    info->shape = a->shape;
    info->weight_bytes = gguf_tensor_bytes(g);
    info->eos_id = -1;
    if (!gguf_has(g, "tokenizer.ggml.eos_token_id")) return ST_OK;
    int64_t eos;
    enum status st =
        gguf_get_int(g, "tokenizer.ggml.eos_token_id", 0, a->shape.n_vocab - 1, e, &eos);
    if (st == ST_OK) info->eos_id = (int32_t)eos;
    return st;
}

static int n_threads_of(const struct moe_options *o) {
    int n_ranks = o->n_ranks > 0 ? o->n_ranks : 1;
    int n = (o->n_threads > 0 ? o->n_threads : count_cores()) / n_ranks;
    return n > 0 ? n : 1;
}

static enum status start_backend(struct moe *m, const struct moe_options *o, int device,
                                 struct error *e) {
    struct backend_config c = {.shape = m->info.shape,
                               .limits = m->info.limits,
                               .n_threads = n_threads_of(o),
                               .cpu_isa = o->cpu_isa ? o->cpu_isa : "auto",
                               .device = device,
                               .gpu_memory_utilization = o->gpu_memory_utilization,
                               .group = o->group,
                               .rank = o->rank,
                               .n_ranks = o->group ? exchange_n_ranks(o->group) : 1,
                               .unique_id = o->group ? exchange_unique_id(o->group) : NULL,
                               .offload_experts = o->offload_experts,
                               .expert_load = o->expert_load};
    enum status st = open_backend(o->device, &c, e, &m->forward.backend);
    if (st == ST_OK) m->ops = backend_ops_of(m->forward.backend);
    return st;
}

/* The pool as the backend made it must hold at least one block; the memory table tells bytes per token. */
static enum status finish_backend(struct moe *m, struct error *e) {
    int32_t n_blocks = 0;
    enum status st = m->ops->ready(m->forward.backend, e, &n_blocks);
    if (st != ST_OK) return st;
    if (n_blocks <= 0) return error_set(e, ST_NO_MEMORY, "no memory is left for KV blocks");
    m->info.limits.n_blocks = n_blocks;
    m->ops->describe(m->forward.backend, m->info.backend, sizeof m->info.backend);
    struct moe_memory_line lines[32];
    int n = m->ops->memory(m->forward.backend, lines, 32);
    for (int i = 0; i < n; i++)
        if (strcmp(lines[i].what, "kv") == 0)
            m->info.kv_bytes_per_token =
                lines[i].n_bytes / ((uint64_t)n_blocks * (uint64_t)m->info.limits.block_tokens);
    return ST_OK;
}

static enum status check_offload(const struct moe_options *o, const struct model_shape *m, bool on_gpu,
                                 struct error *e) {
    int64_t n = (int64_t)m->n_layers * m->n_experts;
    if (o->expert_load && o->n_expert_load != (size_t)n)
        return error_set(e, ST_INVALID, "the measured load is of %zu experts, the model has %lld",
                         o->n_expert_load, (long long)n);
    if (o->offload_experts == 0) return ST_OK;
    if (o->group || !on_gpu)
        return error_set(e, ST_UNSUPPORTED, "only a GPU that computes all experts itself can have some of them "
                                            "in host memory");
    if (o->offload_experts == MOE_OFFLOAD_AUTO) return ST_OK;
    if (o->offload_experts >= 0 && o->offload_experts <= n) return ST_OK;
    return error_set(e, ST_INVALID, "%d experts in host memory: the model has %lld", (int)o->offload_experts,
                     (long long)n);
}

static enum status alloc_model(const struct arch_model *a, struct moe *m) {
    m->forward.shape = a->shape;
    m->forward.renormalize = a->router_renormalize;
    m->forward.layers = calloc((size_t)a->shape.n_layers, sizeof *m->forward.layers);
    m->slots = calloc((size_t)m->info.limits.max_seqs, sizeof *m->slots);
    return m->forward.layers && m->slots ? ST_OK : ST_NO_MEMORY;
}

static enum status open_into(struct moe *m, const struct moe_options *o, struct loader *l,
                             const struct arch_model *a) {
    int device = 0;
    bool cuda = parse_cuda(o->device, &device);
    enum status st = check_device(o->device, l->error);
    if (st == ST_OK) st = read_info(l->gguf, a, l->error, &m->info);
    if (st != ST_OK) return st;
    m->group = o->group;
    m->info.limits = o->limits;
    if ((st = check_offload(o, &a->shape, cuda, l->error)) != ST_OK) return st;
    if ((st = settle_limits(&a->shape, cuda, l->error, &m->info.limits)) != ST_OK) return st;
    if ((st = alloc_model(a, m)) != ST_OK) return error_set(l->error, st, "no memory");
    if ((st = start_backend(m, o, device, l->error)) != ST_OK) return st;
    l->backend = m->forward.backend;
    if ((st = forward_create_bufs(&m->forward)) != ST_OK)
        return error_set(l->error, st, "no memory for the activations of a batch of %d tokens",
                         (int)m->info.limits.max_batch_tokens);
    if ((st = plan(l, a, m)) != ST_OK) return st;
    if ((st = load_all(l, a, &m->forward)) != ST_OK) return st;
    return finish_backend(m, l->error);
}

enum status moe_open(const struct moe_options *o,
                     void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                     struct error *e, struct moe **out) {
    CHECK(o->model_path && o->device && o->n_threads >= 0);
    *out = NULL;
    struct error ignored;
    if (!e) e = &ignored;
    e->text[0] = 0;
    struct gguf *g = NULL;
    enum status st = gguf_open(o->model_path, false, e, &g);
    if (st != ST_OK) return st;
    struct arch_model arch;
    st = arch_read(g, e, &arch);
    if (st != ST_OK) {
        gguf_close(g);
        return st;
    }
    struct loader l = {
        .gguf = g, .error = e, .progress = progress, .ctx = ctx, .total = gguf_tensor_bytes(g)};
    struct moe *m = calloc(1, sizeof *m);
    st = m ? open_into(m, o, &l, &arch) : error_set(e, ST_NO_MEMORY, "no memory");
    arch_free(&arch);
    gguf_close(g);
    if (st != ST_OK) {
        moe_close(m);
        return e->text[0] ? st : error_set(e, st, "loading failed: %s", status_name(st));
    }
    *out = m;
    return ST_OK;
}

void moe_close(struct moe *m) {
    if (!m) return;
    if (m->forward.backend) m->ops->close(m->forward.backend);
    moe_set_probe(m, NULL, NULL);
    free(m->forward.layers);
    free(m->slots);
    free(m);
}

const struct moe_info *moe_info(const struct moe *m) { return &m->info; }

int moe_memory(const struct moe *m, struct moe_memory_line *dst, int cap) {
    return m->ops->memory(m->forward.backend, dst, cap);
}

void moe_counters(const struct moe *m, struct moe_counters *out) {
    m->ops->counters(m->forward.backend, out);
}

enum status moe_expert_load(struct moe *m, uint64_t *sum) {
    return m->ops->expert_load ? m->ops->expert_load(m->forward.backend, sum) : ST_UNSUPPORTED;
}

/* ---- steps ---------------------------------------------------------------------------------- */

bool moe_start_fits(const struct moe *m, const struct moe_slot_start *start) {
    const struct moe_limits *l = &m->info.limits;
    return sampler_start_fits(start, l->max_seqs, l->max_seq_tokens, m->info.shape.n_vocab);
}

enum status moe_slot_start(struct moe *m, const struct moe_slot_start *start) {
    CHECK(moe_start_fits(m, start));
    struct slot_state *slot = &m->slots[start->slot];
    slot->started = true;
    slot->sampled = false;
    slot->n_ids = start->n_ids;
    return m->ops->slot_start(m->forward.backend, start);
}

static int32_t rows_of(const struct moe_step_seq *seq) {
    return seq->rows == MOE_ROWS_NONE ? 0 : seq->rows == MOE_ROWS_ALL ? seq->n_tokens : 1;
}

static bool seq_fits(struct moe *m, const struct moe_step_seq *seq, const int32_t *ids,
                     const int32_t *blocks) {
    const struct moe_limits *l = &m->info.limits;
    if (seq->slot < 0 || seq->slot >= l->max_seqs) return false;
    struct slot_state *slot = &m->slots[seq->slot];
    if (slot->checked == m->n_checked) return false; /* once per step */
    slot->checked = m->n_checked;
    bool ok = seq->start_pos >= 0 && seq->start_pos <= l->max_seq_tokens - seq->n_tokens &&
              seq->n_blocks >= blocks_of(seq->start_pos + seq->n_tokens, l->block_tokens) &&
              seq->n_blocks <= blocks_of(l->max_seq_tokens, l->block_tokens);
    for (int32_t i = 0; ok && i < seq->n_blocks; i++)
        ok = blocks[i] >= 0 && blocks[i] < l->n_blocks;
    for (int32_t i = 0; ok && i < seq->n_tokens; i++)
        ok = ids[i] == MOE_LAST_TOKEN ? slot->sampled
                                      : ids[i] >= 0 && ids[i] < m->info.shape.n_vocab;
    /* The sampled token's position is the history's length: draws and penalties rest on it. */
    if (seq->rows == MOE_ROWS_SAMPLE)
        ok = ok && slot->started && slot->n_ids == seq->start_pos + seq->n_tokens;
    return ok;
}

bool moe_step_fits(struct moe *m, const struct moe_step *step) {
    const struct moe_limits *l = &m->info.limits;
    int32_t n_tokens = 0;
    int64_t n_rows = 0;
    const int32_t *blocks = step->blocks;
    m->n_checked++;
    if (step->n_seqs < (m->group ? 0 : 1) || step->n_seqs > l->max_seqs ||
        step->n_tokens > l->max_batch_tokens)
        return false;
    for (int32_t s = 0; s < step->n_seqs; s++) {
        const struct moe_step_seq *seq = &step->seqs[s];
        if (seq->n_tokens < 1 || seq->n_tokens > step->n_tokens - n_tokens) return false;
        if (!seq_fits(m, seq, step->ids + n_tokens, blocks)) return false;
        n_rows += rows_of(seq);
        n_tokens += seq->n_tokens;
        blocks += seq->n_blocks;
    }
    return n_tokens == step->n_tokens && n_rows <= l->max_rows;
}

/* What the slots are once the step has run; returns the rows that reach the head. */
static int32_t note_step(struct moe *m, const struct moe_step *step) {
    int32_t n_rows = 0;
    for (int32_t s = 0; s < step->n_seqs; s++) {
        n_rows += rows_of(&step->seqs[s]);
        if (step->seqs[s].rows != MOE_ROWS_SAMPLE) continue;
        struct slot_state *slot = &m->slots[step->seqs[s].slot];
        slot->n_ids++;
        slot->sampled = true;
    }
    return n_rows;
}

enum status moe_submit(struct moe *m, const struct moe_step *step) {
    CHECK(m->n_in_flight < MOE_MAX_IN_FLIGHT && moe_step_fits(m, step));
    m->n_submitted++;
    int32_t n_rows = note_step(m, step);
    m->n_step_rows[m->n_submitted % MOE_MAX_IN_FLIGHT] = n_rows;
    m->n_result_rows = -1;
    enum status st = forward_step(&m->forward, step, n_rows, m->probe.fn ? &m->probe : NULL);
    if (st == ST_OK) m->n_in_flight++;
    if (st != ST_OK && m->group) exchange_fail(m->group);
    return st;
}

enum status moe_collect(struct moe *m, struct moe_result *out) {
    CHECK(m->n_in_flight > 0);
    enum status st = m->ops->step_collect(m->forward.backend, out);
    if (st != ST_OK && m->group) exchange_fail(m->group);
    if (st != ST_OK) return st;
    m->n_in_flight--;
    uint64_t number = m->n_submitted - (uint64_t)m->n_in_flight;
    CHECK(out->n_rows == m->n_step_rows[number % MOE_MAX_IN_FLIGHT]);
    if (m->n_in_flight == 0) m->n_result_rows = out->n_rows;
    return ST_OK;
}

enum status moe_logits(struct moe *m, int32_t row, float *dst) {
    CHECK(row >= 0 && row < m->n_result_rows);
    return m->ops->buf_read(m->forward.backend, m->forward.logits, row, 1, dst);
}

void moe_set_probe(struct moe *m, moe_probe_fn *fn, void *ctx) {
    size_t n_tokens = (size_t)m->info.limits.max_batch_tokens;
    size_t n_pairs = n_tokens * (size_t)m->info.shape.n_experts_used;
    free(m->probe.hidden);
    free(m->probe.ids);
    free(m->probe.weights);
    m->probe = (struct forward_probe){0};
    if (!fn) return;
    m->probe = (struct forward_probe){
        .fn = fn,
        .ctx = ctx,
        .hidden = malloc(n_tokens * (size_t)m->info.shape.n_embd * sizeof(float)),
        .ids = malloc(n_pairs * sizeof(int32_t)),
        .weights = malloc(n_pairs * sizeof(float))};
    CHECK(m->probe.hidden && m->probe.ids && m->probe.weights);
}

enum status moe_kv_poison(struct moe *m, uint8_t byte) {
    return m->ops->kv_poison(m->forward.backend, byte);
}
