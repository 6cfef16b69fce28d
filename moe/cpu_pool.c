/* See cpu_pool.h.
 *
 * The job lives in atomics: cursor packs the job's number and how many of its items nobody has taken.
 * Taking an item is one compare-and-swap on it. A thread that arrives late may read the fields of the
 * next job while they are being written, but then its swap fails: the cursor has moved on. If the swap
 * succeeds, the job had an item left, its owner was still waiting, and the fields read were this
 * job's. */
#include "moe/cpu_pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LINE = 64, PAUSES_PER_LOOK = 32 };

struct worker {
    struct cpu_pool *pool;
    pthread_t thread;
    int idx;
};

struct cpu_pool {
    alignas(LINE) _Atomic uint64_t cursor; /* job number << 32 | items not taken */
    /* The job. Written by the caller between jobs. */
    _Atomic(cpu_pool_fn *) fn;
    _Atomic(void *) ctx;
    _Atomic int32_t n_items;
    alignas(
        LINE) _Atomic uint32_t job; /* futex: the low half of the job number, once it is there */
    _Atomic uint32_t n_sleeping; /* workers in futex_wait on job, or about to be */
    _Atomic uint32_t closing;
    alignas(LINE) _Atomic uint32_t n_done; /* futex: finished items of the job */
    _Atomic uint32_t caller_sleeping;
    alignas(LINE) int n_threads;
    struct worker *workers; /* [n_threads - 1] */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, (void *)word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n) {
    syscall(SYS_futex, (void *)word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Spin until *word is (equal) or is no longer (!equal) value; false if that took too long. */
static bool spin(const _Atomic uint32_t *word, uint32_t value, bool equal) {
    uint64_t until = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) == value) == equal) return true;
            cpu_relax();
        }
        uint64_t now = clock_now_ns();
        if (until == 0)
            until = now + CPU_POOL_SPIN_NS;
        else if (now >= until)
            return false;
    }
}

/* Take and run items until none is left. */
static void work(struct cpu_pool *p, int thread) {
    uint32_t n_mine = 0;
    int32_t n_items = 0;
    uint64_t c = atomic_load_explicit(&p->cursor, memory_order_acquire);
    while ((uint32_t)c != 0) {
        cpu_pool_fn *fn = atomic_load_explicit(&p->fn, memory_order_relaxed);
        void *ctx = atomic_load_explicit(&p->ctx, memory_order_relaxed);
        int32_t n = atomic_load_explicit(&p->n_items, memory_order_relaxed);
        if (!atomic_compare_exchange_weak_explicit(&p->cursor, &c, c - 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        fn(ctx, n - (int32_t)(uint32_t)c, thread);
        n_items = n;
        n_mine++;
        /* Another job cannot start before this thread's items are counted below. */
        c = atomic_load_explicit(&p->cursor, memory_order_acquire);
    }
    if (n_mine == 0) return;
    uint32_t n_done = atomic_fetch_add_explicit(&p->n_done, n_mine, memory_order_seq_cst) + n_mine;
    if (n_done == (uint32_t)n_items &&
        atomic_load_explicit(&p->caller_sleeping, memory_order_seq_cst))
        futex_wake(&p->n_done, 1);
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct cpu_pool *p = w->pool;
    uint32_t seen = 0;
    for (;;) {
        while (!spin(&p->job, seen, false)) {
            atomic_fetch_add_explicit(&p->n_sleeping, 1, memory_order_seq_cst);
            futex_wait(&p->job, seen);
            atomic_fetch_sub_explicit(&p->n_sleeping, 1, memory_order_relaxed);
        }
        seen = atomic_load_explicit(&p->job, memory_order_acquire);
        if (atomic_load_explicit(&p->closing, memory_order_acquire)) return NULL;
        work(p, w->idx);
    }
}

/* Publish a new value of job and wake who sleeps on it, at most n_wanted. */
static void announce(struct cpu_pool *p, uint32_t job, int n_wanted) {
    atomic_store_explicit(&p->job, job, memory_order_seq_cst);
    if (atomic_load_explicit(&p->n_sleeping, memory_order_seq_cst) > 0)
        futex_wake(&p->job, n_wanted);
}

void cpu_pool_run(struct cpu_pool *p, int32_t n_items, cpu_pool_fn *fn, void *ctx) {
    CHECK(n_items >= 0);
    if (n_items <= 1 || p->n_threads == 1) {
        for (int32_t i = 0; i < n_items; i++) fn(ctx, i, 0);
        return;
    }
    uint32_t job = atomic_load_explicit(&p->job, memory_order_relaxed) + 1;
    atomic_store_explicit(&p->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&p->ctx, ctx, memory_order_relaxed);
    atomic_store_explicit(&p->n_items, n_items, memory_order_relaxed);
    atomic_store_explicit(&p->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&p->cursor, (uint64_t)job << 32 | (uint32_t)n_items,
                          memory_order_release);
    announce(p, job, n_items - 1);
    work(p, 0);
    if (spin(&p->n_done, (uint32_t)n_items, true)) return;
    atomic_store_explicit(&p->caller_sleeping, 1, memory_order_seq_cst);
    uint32_t n_done;
    while ((n_done = atomic_load_explicit(&p->n_done, memory_order_seq_cst)) != (uint32_t)n_items)
        futex_wait(&p->n_done, n_done);
    atomic_store_explicit(&p->caller_sleeping, 0, memory_order_relaxed);
}

enum status cpu_pool_create(int n_threads, struct cpu_pool **out) {
    CHECK(n_threads >= 1 && n_threads <= CPU_POOL_MAX_THREADS);
    *out = NULL;
    struct cpu_pool *p = aligned_alloc(LINE, sizeof *p);
    if (!p) return ST_NO_MEMORY;
    *p = (struct cpu_pool){.n_threads = 1};
    p->workers = calloc((size_t)n_threads, sizeof *p->workers);
    if (!p->workers) {
        free(p);
        return ST_NO_MEMORY;
    }
    /* Workers leave signals to the process's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p->n_threads < n_threads) {
        struct worker *w = &p->workers[p->n_threads - 1];
        *w = (struct worker){.pool = p, .idx = p->n_threads};
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) break;
        pthread_setname_np(w->thread, "moed-cpu");
        p->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (p->n_threads < n_threads) {
        cpu_pool_destroy(p);
        return ST_NO_MEMORY;
    }
    *out = p;
    return ST_OK;
}

void cpu_pool_destroy(struct cpu_pool *p) {
    if (!p) return;
    atomic_store_explicit(&p->closing, 1, memory_order_release);
    announce(p, atomic_load_explicit(&p->job, memory_order_relaxed) + 1, INT_MAX);
    for (int i = 0; i < p->n_threads - 1; i++) pthread_join(p->workers[i].thread, NULL);
    free(p->workers);
    free(p);
}

int cpu_pool_n_threads(const struct cpu_pool *p) { return p->n_threads; }
