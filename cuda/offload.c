/* offload: before anything is loaded: do the weights fit beside all else that this backend allocates, and if not, which
 * experts stay in page-locked host memory? The expert kernels read those there, over PCIe, through a table of where
 * each expert lies (struct expert_panels): each is read about once per step, so a copy on the device would save nothing.
 * Panels and order of sums are the same wherever they lie, and with them every bit of the results. */
#include "cuda/device.h"

#include <stdlib.h>

#include "moe/offload.h"

enum { MIB = 1 << 20, SEQ_TOKENS = 1024 /* of the KV pool, for each sequence that may run */, KV_SHARE = 4 /* a quarter */ };

struct demand {
    size_t whole;    /* bytes of all weights, if all are on the device */
    size_t fixed;    /* of what must be on the device if any expert is not: all but panels of experts */
    uint64_t *expert; /* [L] bytes of one expert's panels */
};

static enum status add_up(const struct weight_source *all, size_t n, struct error *e, struct demand *d) {
    for (size_t i = 0; i < n; i++) {
        const struct weight_source *s = &all[i];
        struct weight_bytes bytes;
        enum status st = load_bytes(s, e, &bytes);
        if (st != ST_OK) return st;
        size_t others = bytes.others > 0 ? device_rounded(bytes.others) : 0, n_experts = (size_t)s->n_experts;
        size_t panels = bytes.expert > 0 ? device_rounded(n_experts * bytes.expert) : 0;
        d->whole += panels + others;
        d->fixed += others;
        if (s->n_experts == 1) {
            d->fixed += panels;
        } else { /* the table, and what rounding adds */
            d->fixed += device_rounded(n_experts * sizeof(struct expert_panels)) + device_rounded(1);
            d->expert[s->layer] += bytes.expert;
        }
    }
    return ST_OK;
}

/* Which experts, and what that costs. */
static enum status choose(struct cuda *c, const struct offload_problem *p, int32_t n, size_t room,
                          struct error *e, struct moe_offload *out) {
    c->far = calloc((size_t)p->n_layers * (size_t)p->n_experts, sizeof *c->far);
    out->n_experts = c->far ? offload_choose(p, n, room, c->far) : -1;
    if (out->n_experts < 0) return error_set(e, ST_NO_MEMORY, "no memory");
    c->host_bytes = out->host_bytes = offload_host_bytes(p, c->far);
    out->alone_bytes = offload_step_bytes(p, c->far, 1);
    out->full_bytes = offload_step_bytes(p, c->far, c->limits.max_seqs);
    return ST_OK;
}

/* What it would take, for somebody who has not asked for it. */
static enum status refuse(struct cuda *c, const struct offload_problem *p, size_t missing, size_t room,
                          struct error *e) {
    struct moe_offload o;
    enum status st = choose(c, p, MOE_OFFLOAD_AUTO, room, e, &o);
    if (st != ST_OK) return st;
    return error_set(e, ST_NO_MEMORY,
                     "GPU %d: the model needs %zu MiB more than the share allowed to this process has. "
                     "--offload-experts auto would keep %d of %d experts in host memory (%llu MiB) and read about "
                     "%.0f MiB per token of one sequence, %.0f MiB per step of %d, over PCIe",
                     c->device, missing / MIB + 1, (int)o.n_experts, (int)(p->n_layers * p->n_experts),
                     (unsigned long long)(o.host_bytes / MIB), o.alone_bytes / MIB, o.full_bytes / MIB,
                     (int)c->limits.max_seqs);
}

/* KV blocks that experts leave room for, of `left` bytes: those asked for; else SEQ_TOKENS for each sequence, but no more than
 * a share of what experts could have, and enough for one sequence. */
static size_t kv_blocks(const struct cuda *c, size_t left) {
    const struct moe_limits *l = &c->limits;
    int32_t tokens = l->max_seq_tokens < SEQ_TOKENS ? l->max_seq_tokens : SEQ_TOKENS;
    size_t least = device_least_blocks(c), most = left / KV_SHARE / device_block_bytes(c);
    size_t n = (size_t)l->max_seqs * (size_t)((tokens + l->block_tokens - 1) / l->block_tokens);
    if (n > most) n = most;
    return l->n_blocks > 0 || n < least ? least : n;
}

static enum status decide(struct cuda *c, const struct demand *d, struct error *e, struct moe_offload *out) {
    const struct model_shape *m = &c->shape;
    const struct offload_problem p = {m->n_layers, m->n_experts, m->n_experts_used, d->expert, c->expert_load};
    size_t n_load = (size_t)m->n_layers * (size_t)m->n_experts;
    void *load = NULL;
    enum status st = ST_OK;
    if (c->offload_experts != 0)
        st = device_alloc(c, MEMORY_STEP, "counts of routed tokens", n_load * sizeof *c->load, e, &load);
    if (st != ST_OK) return st;
    size_t left = device_free_bytes(c), kv = device_rounded(device_least_blocks(c) * device_block_bytes(c));
    bool fits = d->whole + kv <= left;
    if (fits && c->offload_experts <= 0) return ST_OK;
    if (d->fixed + kv > left)
        return error_set(e, ST_NO_MEMORY,
                         "GPU %d: even with all experts in host memory, the other weights (%zu MiB) and %zu KV "
                         "blocks (%zu MiB) need %zu MiB more than the share allowed to this process has left",
                         c->device, d->fixed / MIB, device_least_blocks(c), kv / MIB,
                         (d->fixed + kv - left) / MIB + 1);
    size_t room = left - d->fixed - device_rounded(kv_blocks(c, left - d->fixed) * device_block_bytes(c));
    if (c->offload_experts == 0) return refuse(c, &p, d->whole + kv - left, room, e);
    c->load = load;
    st = choose(c, &p, c->offload_experts, room, e, out);
    if (st != ST_OK) return st;
    uint64_t near = 0;
    for (int32_t l = 0; l < m->n_layers; l++) near += d->expert[l] * (uint64_t)m->n_experts;
    near -= out->host_bytes;
    if (near > left - d->fixed - kv)
        return error_set(e, ST_NO_MEMORY,
                         "GPU %d: with %d of %d experts in host memory the others need %llu MiB more than the share "
                         "allowed to this process has left: keep more there, or --offload-experts auto",
                         c->device, (int)out->n_experts, (int)(m->n_layers * m->n_experts),
                         (unsigned long long)((near - (left - d->fixed - kv)) / MIB + 1));
    log_event(LOG_WARN, "cuda", "offload",
              "device=%d experts=%d of=%d host_bytes=%llu load=%s expected_pcie_bytes_per_step=%.0f sequences=%d "
              "expected_pcie_bytes_per_step_of_one=%.0f",
              c->device, (int)out->n_experts, (int)(m->n_layers * m->n_experts), (unsigned long long)out->host_bytes,
              c->expert_load ? "measured" : "even", out->full_bytes, (int)c->limits.max_seqs, out->alone_bytes);
    return ST_OK;
}

enum status offload_plan(struct backend *b, const struct weight_source *all, size_t n, struct error *e,
                         struct moe_offload *out) {
    struct cuda *c = of(b);
    *out = (struct moe_offload){0};
    if (c->lost) return ST_ENGINE_LOST;
    if (c->exchange) return ST_OK; /* a rank's share is the group's business */
    enum status st = cuda_step_create(c, e);
    if (st != ST_OK) return st;
    struct demand d = {0};
    d.expert = calloc((size_t)c->shape.n_layers, sizeof *d.expert);
    st = d.expert ? add_up(all, n, e, &d) : error_set(e, ST_NO_MEMORY, "no memory");
    if (st == ST_OK) st = decide(c, &d, e, out);
    free(d.expert);
    c->expert_load = NULL;
    return st;
}

enum status offload_load(struct backend *b, uint64_t *sum) {
    struct cuda *c = of(b);
    size_t n = (size_t)c->shape.n_layers * (size_t)c->shape.n_experts;
    if (!c->load) return ST_UNSUPPORTED;
    if (c->lost) return ST_ENGINE_LOST;
    uint64_t *load = calloc(n, sizeof *load);
    if (!load) return ST_NO_MEMORY;
    enum status st = device_check(c, cudaStreamSynchronize(c->queue.stream));
    if (st == ST_OK)
        st = device_check(c, cudaMemcpy(load, c->load, n * sizeof *load, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n && st == ST_OK; i++) sum[i] += load[i];
    free(load);
    return st;
}
