/* exchange: this room's side of moe/exchange.h: experts shared with other GPUs of this process, which meet on the
 * devices, inside a step and its graph (cuda/exchange.cu says how).
 *
 * The host's part: to find the other ranks' buffers, to agree on a step's size before it is launched, and to hear
 * afterwards whether a wait on the device failed. All memory that others read or write is plain device memory, with
 * peer access between all GPUs here. Ranks of other processes are reached by NCCL instead (cuda/nccl.h).
 *
 * A stack holds the rank's experts in places, not by number: place_of says where an expert lies, and work items
 * name the place. When the group has a new plan, weights move between steps (cuda/move.c). One thread. Private to cuda/. */
#ifndef MOED_CUDA_EXCHANGE_H
#define MOED_CUDA_EXCHANGE_H

#include "cuda/device.h"
#include "moe/exchange.h"

struct stack { /* one expert matrix of a layer, by places */
    int32_t layer;
    uint8_t *panels;
    size_t expert_bytes;
};

struct cuda_exchange {
    struct exchange *x;
    int32_t n_places;  /* in each stack; one more is scratch for what is read and not held */
    int32_t *place_of; /* [L][E], -1: not held; the others read it when weights move */
    struct stack *stacks; /* [n_stacks], in the order of loading; likewise */
    int32_t n_stacks, max_stacks;
    uint8_t *bounce; /* room for what may be gained in a layer; NULL: every rank holds every expert */
    int32_t most_homes; /* experts of a layer that may be this rank's to compute */
    struct expert_home *homes; /* device [L][E] */
    uint64_t *counts, *host_counts; /* device [N_COUNTS + L * E]; pinned: two of them, by a step's parity */
    struct moe_counters counters;   /* of what the device counts, and what moved */
    uint64_t moved_bytes;
    uint32_t *stop;                 /* pinned */
    /* Read, and in the case of flags written, by the others: */
    int device;
    int32_t *ids;    /* [T][K], c->lists' */
    void *x_own;     /* f16 [T][D] */
    uint64_t *flags; /* [2 * MOE_MAX_RANKS] */
    const void *y;   /* f16 [R * T * K][D], NULL before the first step */
    /* What the kernels are told; homes and load are those of layer 0. peers_known: pointers of others too. */
    struct exchange_args args;
    const void *products[MOE_MAX_RANKS]; /* each rank's y */
    bool peers_known, products_known;
    struct nccl *nccl; /* NULL: peer memory */
};

/* Join config's group. ST_UNSUPPORTED: GPUs here cannot read each other's memory, or too many ranks to a GPU. */
enum status exchange_join(struct cuda *c, const struct backend_config *config, struct error *e);
enum status exchange_ready(struct cuda *c, struct error *e);
/* Nobody waits for this rank from here on; then, no graph being left, its collectives end; then, once its stream is empty,
 * leave. */
void exchange_abandon(struct cuda *c);
void exchange_disconnect(struct cuda *c);
void exchange_leave(struct cuda *c);

/* The place of an expert in its stack; the scratch place if it is not held. */
int32_t exchange_place(const struct cuda *c, int32_t layer, int32_t expert);

/* An expert stack is loaded: it may move. ST_NO_MEMORY. */
enum status exchange_add_stack(struct cuda *c, int32_t layer, uint8_t *panels, size_t expert_bytes);
/* Tell the device who holds what, and where. */
enum status exchange_upload_homes(struct cuda *c);
/* move.c: room for it, while opening; and to do it, no step being out on any rank once all have met. */
enum status move_ready(struct cuda *c, struct error *e);
enum status move_experts(struct cuda *c);

/* A step that is computed together: its size, into the bucket, before it is issued; its counts, behind it in the stream; and, once they
 * are there, whether all went well. */
enum status exchange_begin_step(struct cuda *c, int32_t n_tokens, struct bucket *bucket);
enum status exchange_end_step(struct cuda *c, uint64_t parity);
enum status exchange_collect(struct cuda *c, uint64_t parity);

/* After this rank's routing: meet, bring in the inputs, make the work lists. */
enum status exchange_begin_layer(struct cuda *c, int layer);
/* The product of what this rank computes; the group's inputs unless a->x is set. */
enum status exchange_grouped(struct cuda *c, struct gemm_args *a);
/* After this rank's products in y: meet. Where products then are, by rank: c->exchange->products; see struct route_lists
 * and exchange_args.all_rows for which is whose. */
enum status exchange_end_layer(struct cuda *c, int layer, const struct buf *y);

#endif
