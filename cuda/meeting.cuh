/* meeting: flags by which kernels of several GPUs wait for each other. See exchange.cu for what they mean. */
#ifndef MOED_CUDA_MEETING_CUH
#define MOED_CUDA_MEETING_CUH

#include "cuda/common.cuh"

DEVICE uint64_t time_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
DEVICE uint64_t load_flag(const uint64_t *p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEVICE void store_flag(uint64_t *p, uint64_t v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/* By the block's first warp, in every other rank's flags, lane r in rank r's: what this GPU wrote until here is there (the
 * kernels before this one are over, and the store releases what this thread has seen of them). */
DEVICE void say(const struct exchange_meeting &m, int first, uint32_t epoch, int n) {
    int r = (int)threadIdx.x;
    if (r < m.n_ranks && r != m.rank) store_flag(m.flags[r] + first + m.rank, (uint64_t)epoch << 32 | (uint32_t)n);
    __syncwarp();
}

/* Until rank r has said `epoch`: what else it said then. 0 if it does not come, or will not. */
DEVICE int hear(const struct exchange_meeting &m, int first, int r, uint32_t epoch) {
    uint64_t begun = time_ns();
    for (int n = 1;; n++) {
        uint64_t v = load_flag(m.flags[m.rank] + first + r);
        if ((int32_t)((uint32_t)(v >> 32) - epoch) >= 0) return (int)(uint32_t)v;
        if (n % 256 != 0) continue;
        if (*(volatile uint32_t *)m.stop != 0) return 0;
        if (time_ns() - begun > m.timeout_ns) *(volatile uint32_t *)m.stop = 1;
    }
}

/* Which layer of all. May be asked before depend_wait, as all that the host says of a step. */
DEVICE uint32_t epoch_of(const struct exchange_meeting &m) { return m.header->n_exchanged + m.layer; }

/* The second meeting of a layer, by the first warp of every block. */
DEVICE void meet_for_products(const struct exchange_meeting &m, uint32_t epoch) {
    int lane = (int)threadIdx.x;
    if (blockIdx.x == 0) say(m, MOE_MAX_RANKS, epoch, 0);
    if (lane < m.n_ranks && lane != m.rank) hear(m, MOE_MAX_RANKS, lane, epoch);
    __syncwarp();
}

#endif
