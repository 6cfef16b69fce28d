/* cuda_backend: the door of this room: the op table of moe/backend.h on one NVIDIA GPU. */
#ifndef MOED_CUDA_BACKEND_H
#define MOED_CUDA_BACKEND_H

#include "moe/backend.h"

/* Opens device c->device. ST_UNSUPPORTED: no driver, no such device, compute capability below 8.0, or a model
 * shape the kernels do not have; ST_NO_MEMORY; ST_ENGINE_LOST. Inner activations, keys and values are f16,
 * sums f32. Of the device's memory, c->gpu_memory_utilization may be used, what others use included. One caller
 * thread. After a CUDA error the backend is lost: every call says so, and only close does anything. */
enum status backend_cuda_open(const struct backend_config *c, struct error *e, struct backend **out);

/* An id for a group of ranks of several processes. ST_UNSUPPORTED: no NCCL here. */
enum status backend_cuda_unique_id(struct error *e, struct moe_unique_id *out);

#endif
