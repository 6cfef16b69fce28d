/* See forward.h. The order of the ops is the model's definition; what each computes stands in backend.h.
 * Architecture: Qwen3-MoE (Hugging Face transformers, modeling_qwen3_moe.py). */
#include "moe/forward.h"

#define TRY(call)                                                                                  \
    do {                                                                                           \
        enum status st_ = (call);                                                                  \
        if (st_ != ST_OK) return st_;                                                              \
    } while (0)

enum status forward_create_bufs(struct forward *f) {
    const struct backend_ops *ops = backend_ops_of(f->backend);
    struct backend *b = f->backend;
    const struct model_shape *m = &f->shape;
    int32_t q_dim = m->n_heads * m->head_dim, kv_dim = m->n_kv_heads * m->head_dim;
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_EXACT, m->n_embd, &f->h));
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_INNER, q_dim, &f->q));
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_INNER, kv_dim, &f->k));
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_INNER, kv_dim, &f->v));
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_INNER, q_dim, &f->attn));
    TRY(ops->buf_create(b, BUF_TOKENS, BUF_INNER, m->n_embd, &f->x));
    TRY(ops->buf_create(b, BUF_ROUTED, BUF_INNER, m->n_ff_expert, &f->act));
    TRY(ops->buf_create(b, BUF_ROUTED, BUF_INNER, m->n_embd, &f->y));
    TRY(ops->buf_create(b, BUF_HEAD, BUF_EXACT, m->n_vocab, &f->logits));
    return ST_OK;
}

static enum status attention(struct forward *f, int i) {
    const struct backend_ops *ops = backend_ops_of(f->backend);
    struct backend *b = f->backend;
    const struct forward_layer *l = &f->layers[i];
    float eps = f->shape.norm_eps;
    TRY(ops->norm_linear(b, &(struct op_norm_linear){.x = f->h,
                                                     .norm = l->attn_norm,
                                                     .eps = eps,
                                                     .n_out = 3,
                                                     .w = {l->q, l->k, l->v},
                                                     .out = {f->q, f->k, f->v}}));
    TRY(ops->rope_store(b, &(struct op_rope_store){.layer = i,
                                                   .q = f->q,
                                                   .k = f->k,
                                                   .v = f->v,
                                                   .q_norm = l->q_norm,
                                                   .k_norm = l->k_norm,
                                                   .eps = eps}));
    TRY(ops->attention(b, &(struct op_attention){.layer = i, .q = f->q, .out = f->attn}));
    return ops->linear_add(b, &(struct op_linear_add){.x = f->attn, .w = l->attn_out, .h = f->h});
}

static enum status experts(struct forward *f, int i) {
    const struct backend_ops *ops = backend_ops_of(f->backend);
    struct backend *b = f->backend;
    const struct forward_layer *l = &f->layers[i];
    TRY(ops->route(b, &(struct op_route){.layer = i,
                                         .h = f->h,
                                         .norm = l->ffn_norm,
                                         .eps = f->shape.norm_eps,
                                         .router = l->router,
                                         .renormalize = f->renormalize,
                                         .x = f->x,
                                         .next = {l->gate, l->up}}));
    TRY(ops->experts_up(b,
                        &(struct op_experts_up){
                            .layer = i, .x = f->x, .gate = l->gate, .up = l->up, .act = f->act}));
    return ops->experts_down(b,
                             &(struct op_experts_down){
                                 .layer = i, .act = f->act, .down = l->down, .y = f->y, .h = f->h});
}

static enum status look(struct forward *f, const struct forward_probe *p, int layer,
                        int32_t n_tokens) {
    if (!p) return ST_OK;
    const struct backend_ops *ops = backend_ops_of(f->backend);
    bool routed = layer >= 0;
    TRY(ops->buf_read(f->backend, f->h, 0, n_tokens, p->hidden));
    if (routed) TRY(ops->route_read(f->backend, p->ids, p->weights, NULL));
    p->fn(p->ctx, layer, n_tokens, p->hidden, routed ? p->ids : NULL, routed ? p->weights : NULL);
    return ST_OK;
}

enum status forward_step(struct forward *f, const struct moe_step *step, int32_t n_rows,
                         const struct forward_probe *probe) {
    const struct backend_ops *ops = backend_ops_of(f->backend);
    struct backend *b = f->backend;
    bool issue = probe != NULL;
    TRY(ops->step_begin(b, step, &issue));
    CHECK(issue || !probe);
    if (!issue) return ops->step_end(b);

    /* In a group, a step without tokens is there for the experts' sake. */
    bool any = step->n_tokens > 0;
    if (any) TRY(ops->embed(b, &(struct op_embed){.table = f->embed, .h = f->h}));
    TRY(look(f, probe, -1, step->n_tokens));
    for (int i = 0; i < f->shape.n_layers; i++) {
        if (any) TRY(attention(f, i));
        TRY(experts(f, i));
        TRY(look(f, probe, i, step->n_tokens));
    }
    if (n_rows > 0) {
        TRY(ops->head(b, &(struct op_head){.h = f->h,
                                           .norm = f->norm,
                                           .eps = f->shape.norm_eps,
                                           .w = f->head,
                                           .logits = f->logits}));
        TRY(ops->sample(b, &(struct op_sample){.logits = f->logits}));
    }
    return ops->step_end(b);
}
