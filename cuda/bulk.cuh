/* bulk: Hopper's copies in bulk and their arrivals, and clusters of blocks: the machine instructions, each behind a function
 * with a plain meaning. */
#ifndef MOED_CUDA_BULK_CUH
#define MOED_CUDA_BULK_CUH

#include <cuda.h> /* CUtensorMap */

#include "cuda/common.cuh"

#ifdef MOED_WGMMA

/* An arrival, in shared memory: complete when as many threads have arrived as it was made for, and all bytes that they said
 * to expect; then it begins anew. Its first round has parity 0. */
typedef uint64_t arrival;

DEVICE void arrival_init(arrival *a, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(n) : "memory");
}
/* After inits, before the barrier of the block behind which others use them. */
DEVICE void arrivals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(arrival *a) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(a)) : "memory");
}
DEVICE void arrive_expecting(arrival *a, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes) : "memory");
}
/* Until the round of that parity is complete. */
DEVICE void arrival_wait(arrival *a, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n}" ::"r"(shared_address(a)),
        "r"(parity)
        : "memory");
}

/* By one thread: `bytes`, a multiple of 16, to where `a` says that they arrived. */
DEVICE void copy_bulk(void *shared_dst, const void *src, int bytes, arrival *a) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared_dst)),
                 "l"(src), "r"(bytes), "r"(shared_address(a))
                 : "memory");
}
/* Has the map at hand before it is used. */
DEVICE void touch_map(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
/* The box of a matrix that begins at a column and row; the map says its size and how it lies in shared memory. */
DEVICE void copy_box(void *shared_dst, const CUtensorMap *map, int column, int row, arrival *a) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared_dst)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(a))
        : "memory");
}

/* The first n threads of a block. */
DEVICE void meet_threads(int n) { asm volatile("bar.sync 1, %0;" ::"r"(n) : "memory"); }
/* All threads of a cluster that have not ended; writes to shared memory before it are seen after it. */
DEVICE void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* The same, but nothing that the thread wrote needs to be seen. */
DEVICE void leave_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
/* What lies there in the shared memory of another block of the cluster. */
DEVICE float4 load_cluster(const float *at, int block) {
    uint32_t from;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(shared_address(at)), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

#endif
#endif
