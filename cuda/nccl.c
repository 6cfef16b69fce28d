/* See nccl.h. */
#include "cuda/nccl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef MOED_NCCL
#include <nccl.h>

#define TRY(call) \
    do { \
        enum status st_ = (call); \
        if (st_ != ST_OK) return st_; \
    } while (0)

#define JOIN_NS UINT64_C(600000000000)

/* ---- the library ---------------------------------------------------------------------------- */

static struct {
    void *handle;
    ncclResult_t (*get_unique_id)(ncclUniqueId *);
    ncclResult_t (*comm_init)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *);
    ncclResult_t (*comm_abort)(ncclComm_t);
    ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
    ncclResult_t (*group_start)(void);
    ncclResult_t (*group_end)(void);
    ncclResult_t (*all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
    ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*recv)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    const char *(*error_string)(ncclResult_t);
    bool whole;
} lib;

static void load(void) {
    /* Multicast in use can put a host's GPUs out of service when a process dies. */
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    lib.handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!lib.handle) return;
    const struct {
        const char *name;
        void *to;
    } symbols[] = {{"ncclGetUniqueId", &lib.get_unique_id},
                   {"ncclCommInitRankConfig", &lib.comm_init},
                   {"ncclCommAbort", &lib.comm_abort},
                   {"ncclCommGetAsyncError", &lib.async_error},
                   {"ncclGroupStart", &lib.group_start},
                   {"ncclGroupEnd", &lib.group_end},
                   {"ncclAllGather", &lib.all_gather},
                   {"ncclSend", &lib.send},
                   {"ncclRecv", &lib.recv},
                   {"ncclGetErrorString", &lib.error_string}};
    lib.whole = true;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *p = dlsym(lib.handle, symbols[i].name);
        memcpy(symbols[i].to, &p, sizeof p);
        if (!p) lib.whole = false;
    }
}

static enum status need_library(struct error *e) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (lib.whole) return ST_OK;
    return error_set(e, ST_UNSUPPORTED, "GPUs of several processes need NCCL: libnccl.so.2 is not there, or too old");
}

_Static_assert(sizeof(ncclUniqueId) == sizeof(struct moe_unique_id), "an id is carried as it is");

enum status nccl_unique_id(struct error *e, struct moe_unique_id *out) {
    ncclUniqueId id;
    TRY(need_library(e));
    ncclResult_t r = lib.get_unique_id(&id);
    if (r != ncclSuccess) return error_set(e, ST_UNSUPPORTED, "NCCL: %s", lib.error_string(r));
    memcpy(out, &id, sizeof id);
    return ST_OK;
}

/* ---- a rank --------------------------------------------------------------------------------- */

struct nccl {
    struct cuda *c;
    struct nccl_options o;
    ncclComm_t comm;
    size_t max_tokens, used, cols; /* T, K, D */
    int32_t *counts, *ids;         /* [R], [R][T][K] */
    uint16_t *x, *sent, *received; /* [R][T][D], [R][T * K][D] twice */
};

/* A call's result, once it is one: calls return before they are done. */
static ncclResult_t settle(const struct nccl *n, ncclResult_t r, uint64_t most_ns) {
    uint64_t begun = clock_now_ns();
    while (r == ncclInProgress) {
        ncclResult_t state;
        ncclResult_t asked = lib.async_error(n->comm, &state);
        r = asked != ncclSuccess ? asked : state;
        if (r != ncclInProgress) break;
        if (clock_now_ns() - begun > most_ns) return ncclSystemError;
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    return r;
}

static enum status check(struct nccl *n, ncclResult_t r) {
    r = settle(n, r, n->o.timeout_ns);
    if (r == ncclSuccess) return ST_OK;
    if (!n->c->lost)
        log_event(LOG_ERROR, "cuda", "nccl_failed", "device=%d rank=%d text=\"%s\"", n->c->device, n->o.rank,
                  lib.error_string(r));
    n->c->lost = true;
    return ST_ENGINE_LOST;
}

static enum status create_buffers(struct nccl *n, struct error *e) {
    struct cuda *c = n->c;
    size_t ranks = (size_t)n->o.n_ranks;
    n->max_tokens = (size_t)c->limits.max_batch_tokens;
    n->used = (size_t)c->shape.n_experts_used;
    n->cols = (size_t)c->shape.n_embd;
    size_t tokens = ranks * n->max_tokens, pairs = tokens * n->used;
    const struct {
        size_t n;
        void **out;
    } demands[] = {{ranks * sizeof *n->counts, (void **)&n->counts},
                   {pairs * sizeof *n->ids, (void **)&n->ids},
                   {tokens * n->cols * 2, (void **)&n->x},
                   {pairs * n->cols * 2, (void **)&n->sent},
                   {pairs * n->cols * 2, (void **)&n->received}};
    for (size_t i = 0; i < sizeof demands / sizeof *demands; i++)
        TRY(device_alloc(c, MEMORY_ACTIVATIONS, "NCCL", demands[i].n, e, demands[i].out));
    return ST_OK;
}

enum status nccl_open(struct cuda *c, const struct nccl_options *o, struct error *e, struct nccl **out) {
    *out = NULL;
    TRY(need_library(e));
    struct nccl *n = calloc(1, sizeof *n);
    if (!n) return error_set(e, ST_NO_MEMORY, "no memory for NCCL");
    n->c = c;
    n->o = *o;
    n->o.id = NULL; /* borrowed */
    enum status st = create_buffers(n, e);
    if (st == ST_OK) {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        ncclUniqueId id;
        memcpy(&id, o->id, sizeof id);
        config.blocking = 0;
        ncclResult_t r = settle(n, lib.comm_init(&n->comm, o->n_ranks, id, o->rank, &config), JOIN_NS);
        if (r != ncclSuccess)
            st = error_set(e, ST_ENGINE_LOST, "rank %d cannot join its group: NCCL: %s", o->rank, lib.error_string(r));
    }
    if (st != ST_OK) {
        nccl_close(n);
        return st;
    }
    *out = n;
    return ST_OK;
}

void nccl_close(struct nccl *n) {
    if (!n) return;
    if (n->comm) (void)lib.comm_abort(n->comm);
    free(n);
}

/* ---- a layer -------------------------------------------------------------------------------- */

void nccl_set_sources(const struct nccl *n, int32_t n_most, struct exchange_args *a) {
    a->arrived = n->counts;
    for (int r = 0; r < n->o.n_ranks; r++) {
        size_t token = (size_t)r * (size_t)n_most;
        a->ids[r] = n->ids + token * n->used;
        a->x[r] = n->x + token * n->cols;
    }
}

enum status nccl_gather(struct nccl *n, int32_t n_most, const int32_t *ids, const void *x, const struct step_header *header) {
    cudaStream_t s = n->c->queue.stream;
    size_t tokens = (size_t)n_most;
    TRY(check(n, lib.group_start()));
    TRY(check(n, lib.all_gather(&header->n_tokens, n->counts, 1, ncclInt32, n->comm, s)));
    TRY(check(n, lib.all_gather(ids, n->ids, tokens * n->used, ncclInt32, n->comm, s)));
    TRY(check(n, lib.all_gather(x, n->x, tokens * n->cols, ncclFloat16, n->comm, s)));
    return check(n, lib.group_end());
}

void *nccl_send_buffer(const struct nccl *n, size_t *rank_rows) {
    *rank_rows = n->max_tokens * n->used;
    return n->sent;
}

const void *nccl_received(const struct nccl *n, int rank) {
    return n->received + (size_t)rank * n->max_tokens * n->used * n->cols;
}

enum status nccl_return(struct nccl *n, int32_t n_most) {
    cudaStream_t s = n->c->queue.stream;
    size_t count = (size_t)n_most * n->used * n->cols, step = n->max_tokens * n->used * n->cols;
    TRY(check(n, lib.group_start()));
    for (int r = 0; r < n->o.n_ranks; r++) {
        if (r == n->o.rank) continue;
        TRY(check(n, lib.send(n->sent + (size_t)r * step, count, ncclFloat16, r, n->comm, s)));
        TRY(check(n, lib.recv(n->received + (size_t)r * step, count, ncclFloat16, r, n->comm, s)));
    }
    return check(n, lib.group_end());
}

#else /* built where nccl.h is not */

enum status nccl_unique_id(struct error *e, struct moe_unique_id *out) {
    (void)out;
    return error_set(e, ST_UNSUPPORTED, "GPUs of several processes need NCCL, which this build has not");
}

enum status nccl_open(struct cuda *c, const struct nccl_options *o, struct error *e, struct nccl **out) {
    struct moe_unique_id ignored;
    (void)c, (void)o;
    *out = NULL;
    return nccl_unique_id(e, &ignored);
}
void nccl_close(struct nccl *n) { (void)n; }
void nccl_set_sources(const struct nccl *n, int32_t n_most, struct exchange_args *a) { (void)n, (void)n_most, (void)a; }
enum status nccl_gather(struct nccl *n, int32_t n_most, const int32_t *ids, const void *x, const struct step_header *header) {
    (void)n, (void)n_most, (void)ids, (void)x, (void)header;
    return ST_UNSUPPORTED;
}
void *nccl_send_buffer(const struct nccl *n, size_t *rank_rows) {
    (void)n;
    *rank_rows = 0;
    return NULL;
}
enum status nccl_return(struct nccl *n, int32_t n_most) {
    (void)n, (void)n_most;
    return ST_UNSUPPORTED;
}
const void *nccl_received(const struct nccl *n, int rank) {
    (void)n, (void)rank;
    return NULL;
}

#endif
