/* forward: the one forward pass, over any backend's ops. Private to moe/ and its tests. One thread. */
#ifndef MOED_MOE_FORWARD_H
#define MOED_MOE_FORWARD_H

#include "moe/backend.h"

struct forward_layer {
    struct weight *attn_norm, *q, *k, *v, *q_norm, *k_norm, *attn_out;
    struct weight *ffn_norm, *router, *gate, *up, *down;
};

/* Weights and buffers belong to the backend. Fill the first group, then call forward_create_bufs. */
struct forward {
    struct backend *backend;
    struct model_shape shape;
    bool renormalize; /* the K router weights sum to 1 */
    struct weight *embed, *norm, *head; /* head == embed when tied */
    struct forward_layer *layers; /* [L] */

    struct buf *h; /* [T][D] residual stream */
    struct buf *q, *k, *v; /* [T][H*Hd], [T][G*Hd] */
    struct buf *attn; /* [T][H*Hd] */
    struct buf *x; /* [T][D] the experts' input */
    struct buf *act, *y; /* routed [T*K][F], [T*K][D] */
    struct buf *logits; /* head [R][V] */
};

enum status forward_create_bufs(struct forward *f);

/* What a probe reads into: [T][D], [T][K], [T][K] of the largest step. */
struct forward_probe {
    moe_probe_fn *fn;
    void *ctx;
    float *hidden;
    int32_t *ids;
    float *weights;
};

/* Run one step, step_begin to step_end. n_rows: rows that reach the head. probe may be NULL; with one,
 * the backend is asked to run the ops one by one. */
enum status forward_step(struct forward *f, const struct moe_step *step, int32_t n_rows,
                         const struct forward_probe *probe);

#endif
