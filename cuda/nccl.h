/* nccl: ids, inputs and products between ranks whose memory this GPU does not see: other processes, other hosts. Collectives
 * of fixed sizes, inside a step and its graph; they carry as many tokens of each rank as the bucket allows. The library is
 * loaded when a group needs it (libnccl.so.2); NVLink multicast stays off. One thread. Private to cuda/. */
#ifndef MOED_CUDA_NCCL_H
#define MOED_CUDA_NCCL_H

#include "cuda/device.h"

struct nccl;

/* An id for a group, to be carried to all its ranks. ST_UNSUPPORTED: no NCCL here. */
enum status nccl_unique_id(struct error *e, struct moe_unique_id *out);

struct nccl_options {
    const struct moe_unique_id *id;
    int n_ranks, rank;
    uint64_t timeout_ns; /* of an answer, once all ranks have joined */
};
/* Join; waits for all ranks, but not for ever (ten minutes: models are loading). ST_UNSUPPORTED, ST_ENGINE_LOST,
 * ST_NO_MEMORY. */
enum status nccl_open(struct cuda *c, const struct nccl_options *o, struct error *e, struct nccl **out);
void nccl_close(struct nccl *n); /* NULL is fine; aborts what still runs */

/* Point a's ids, x and arrived at what nccl_gather brings for ranks of up to n_most tokens, and bring it: of this rank ids,
 * x and header->n_tokens. */
void nccl_set_sources(const struct nccl *n, int32_t n_most, struct exchange_args *a);
enum status nccl_gather(struct nccl *n, int32_t n_most, const int32_t *ids, const void *x, const struct step_header *header);
/* Where products for rank r are put: send + r * *rank_rows rows; send them, and take those that others computed, which come
 * to nccl_received(r), pair by pair. */
void *nccl_send_buffer(const struct nccl *n, size_t *rank_rows);
enum status nccl_return(struct nccl *n, int32_t n_most);
const void *nccl_received(const struct nccl *n, int rank);

#endif
