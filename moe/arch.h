/* arch: the table of model architectures. One row says how a family's GGUF keys and tensors are named
 * and which switches its forward pass has; qwen3moe is the first, others are rows to add.
 *
 * arch_read turns a file into a range-checked shape and the list of tensors that shape needs; the file
 * must hold exactly those (shapes computed from the shape and compared, never adopted). Private to moe/. */
#ifndef MOED_MOE_ARCH_H
#define MOED_MOE_ARCH_H

#include "moe/backend.h"
#include "moe/gguf.h"

enum { ARCH_MAX_LAYERS = 512 };

struct arch_layer { /* borrowed from the gguf; never NULL after arch_read */
    const struct gguf_tensor *attn_norm, *attn_q, *attn_k, *attn_v, *attn_q_norm, *attn_k_norm,
        *attn_output, *ffn_norm, *router, *gate_exps, *up_exps, *down_exps;
};

struct arch_model {
    char architecture[32];
    char name[128];
    struct model_shape shape;
    bool router_renormalize;    /* norm_topk_prob */
    const struct gguf_tensor *token_embd, *output_norm, *output; /* output == token_embd when tied */
    struct arch_layer *layers;  /* [shape.n_layers], owned */
    char quantization[16];      /* most common type of the expert tensors */
};

/* ST_UNSUPPORTED: architecture, or a tensor type in a role that cannot have it, or a tensor we would
 * ignore (named); ST_NOT_FOUND / ST_CORRUPT: a key or tensor missing or of the wrong shape (named). */
enum status arch_read(const struct gguf *g, struct error *e, struct arch_model *out);
void arch_free(struct arch_model *a);

#endif
