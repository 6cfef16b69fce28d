/* See cpu_pool.h.
 *
 * The job lives in atomics: cursor packs the job's number and how many of its items nobody has taken.
 * Taking an item is one compare-and-swap on it. A thread that arrives late may read the fields of the
 * next job while they are being written, but then its swap fails: the cursor has moved on. If the swap
 * succeeds, the job had an item left, its owner was still waiting, and the fields read were this
 * job's.
 *
 * A thread that another process has pushed off its core in the middle of an item would hold up everybody
 * for a time slice. Whoever waits for it notices that the holder's CPU clock stands still, and gives it
 * its own core: the holder's affinity becomes that core, and the waiter sleeps. Then the worker of the two
 * goes where the holder came from and queues for its turn there: beside the other one it would only take
 * turns with it. */
#include "moe/cpu_pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    LINE = 64,
    PAUSES_PER_LOOK = 32,
    STAND_STILL_NS =
        20000, /* a clock that has not moved for so long belongs to a thread without a core */
    STAY_AWAY_NS = 1000000
};

/* Thread 0 is the caller, the others are workers. */
struct member {
    alignas(LINE) _Atomic uint32_t working; /* holds an item */
    _Atomic int32_t core; /* where it took the first one */
    _Atomic uint32_t moved; /* to a rescuer's core: 1 + the rescuer; 2 while it is being moved */
    struct cpu_pool *pool;
    pthread_t thread;
    pid_t tid;
    clockid_t clock; /* its CPU time */
    cpu_set_t cores; /* before it was moved; written by the rescuer */
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
    struct member *members; /* [n_threads] */
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

/* ---- rescue --------------------------------------------------------------------------------------- */

enum { NOT_MOVED, BEING_MOVED, MOVED }; /* MOVED + i: by member i */

/* What a waiter remembers between two looks at a member that holds an item. */
struct suspect {
    int idx; /* -1: nobody */
    uint64_t cpu_ns;
};

static uint64_t cpu_time_ns(const struct member *m) {
    struct timespec t = {0, 0};
    clock_gettime(m->clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Give the member, which has lost its own, the core that `self` runs on. */
static bool move_here(struct member *m, const struct member *self) {
    uint32_t not_moved = NOT_MOVED;
    if (!atomic_compare_exchange_strong_explicit(&m->moved, &not_moved, BEING_MOVED,
                                                 memory_order_acq_rel, memory_order_relaxed))
        return false;
    cpu_set_t here;
    int core = sched_getcpu();
    bool ok = core >= 0 && sched_getaffinity(m->tid, sizeof m->cores, &m->cores) == 0 &&
              CPU_ISSET((unsigned)core, &m->cores);
    if (ok) {
        CPU_ZERO(&here);
        CPU_SET((unsigned)core, &here);
        ok = sched_setaffinity(m->tid, sizeof here, &here) == 0;
    }
    atomic_store_explicit(&m->moved, ok ? (uint32_t)(MOVED + self->idx) : (uint32_t)NOT_MOVED,
                          memory_order_release);
    return ok;
}

/* Look at one member that holds an item; the same one twice in a row with a clock that stood still is
 * rescued. */
static bool rescue(struct cpu_pool *p, const struct member *self, struct suspect *s) {
    if (s->idx >= 0) {
        struct member *m = &p->members[s->idx];
        if (atomic_load_explicit(&m->working, memory_order_acquire)) {
            uint64_t before = s->cpu_ns;
            s->cpu_ns = cpu_time_ns(m);
            return s->cpu_ns == before && move_here(m, self);
        }
    }
    for (int i = 1; i < p->n_threads; i++) {
        s->idx = (self->idx + i) % p->n_threads;
        if (atomic_load_explicit(&p->members[s->idx].working, memory_order_acquire)) {
            s->cpu_ns = cpu_time_ns(&p->members[s->idx]);
            return false;
        }
    }
    s->idx = -1;
    return false;
}

/* A worker whose core went to somebody else queues at the one that was lost. */
static void go_to(int32_t lost_core) {
    cpu_set_t cores, lost;
    int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof cores, &cores) != 0) return;
    if (lost_core == here) /* the two shared one: to the next */
        do lost_core = (lost_core + 1) % CPU_SETSIZE;
        while (!CPU_ISSET((unsigned)lost_core, &cores));
    CPU_ZERO(&lost);
    CPU_SET((unsigned)lost_core, &lost);
    if (CPU_ISSET((unsigned)lost_core, &cores) && sched_setaffinity(0, sizeof lost, &lost) == 0)
        sched_setaffinity(0, sizeof cores, &cores);
}

/* After its last item of a job: whoever was moved may go where it could go before. */
static void move_back(struct member *m) {
    uint32_t moved;
    while ((moved = atomic_load_explicit(&m->moved, memory_order_acquire)) == BEING_MOVED)
        cpu_relax();
    if (moved == NOT_MOVED) return;
    sched_setaffinity(0, sizeof m->cores, &m->cores);
    atomic_store_explicit(&m->moved, NOT_MOVED, memory_order_release);
    if (m->idx > 0 && moved == MOVED) /* the caller goes on, on this core */
        go_to(atomic_load_explicit(&m->core, memory_order_relaxed));
}

/* ---- waiting ---------------------------------------------------------------------------------------- */

enum wait { WAIT_DONE, WAIT_LONG, WAIT_RESCUED };

/* Spin until *word is (equal) or is no longer (!equal) value, but not for long. */
static enum wait spin(const struct member *self, const _Atomic uint32_t *word, uint32_t value,
                      bool equal, int32_t *lost_core) {
    struct suspect suspect = {.idx = -1};
    uint64_t begun = 0, look = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) == value) == equal)
                return WAIT_DONE;
            cpu_relax();
        }
        uint64_t now = clock_now_ns();
        if (begun == 0) {
            begun = now;
            look = now + STAND_STILL_NS;
        } else if (now >= begun + CPU_POOL_SPIN_NS) {
            return WAIT_LONG;
        } else if (now >= look) {
            if (rescue(self->pool, self, &suspect)) {
                *lost_core = atomic_load_explicit(&self->pool->members[suspect.idx].core,
                                                  memory_order_relaxed);
                return WAIT_RESCUED;
            }
            look = now + STAND_STILL_NS;
        }
    }
}

/* Take and run items until none is left. */
static void work(struct cpu_pool *p, struct member *self) {
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
        if (n_mine == 0) {
            atomic_store_explicit(&self->core, sched_getcpu(), memory_order_relaxed);
            atomic_store_explicit(&self->working, 1, memory_order_release);
        }
        fn(ctx, n - (int32_t)(uint32_t)c, self->idx);
        n_items = n;
        n_mine++;
        /* Another job cannot start before this thread's items are counted below. */
        c = atomic_load_explicit(&p->cursor, memory_order_acquire);
    }
    if (n_mine > 0) {
        atomic_store_explicit(&self->working, 0, memory_order_release);
        uint32_t n = atomic_fetch_add_explicit(&p->n_done, n_mine, memory_order_seq_cst) + n_mine;
        if (n == (uint32_t)n_items &&
            atomic_load_explicit(&p->caller_sleeping, memory_order_seq_cst))
            futex_wake(&p->n_done, 1);
    }
    move_back(self);
}

static void set_identity(struct member *m) {
    if (m->idx == 0) m->thread = pthread_self();
    m->tid = gettid();
    pthread_getcpuclockid(m->thread, &m->clock);
}

static void *worker_main(void *arg) {
    struct member *self = arg;
    struct cpu_pool *p = self->pool;
    uint32_t seen = 0;
    set_identity(self);
    for (;;) {
        enum wait w;
        int32_t lost_core = 0;
        while ((w = spin(self, &p->job, seen, false, &lost_core)) != WAIT_DONE) {
            if (w == WAIT_RESCUED) {
                go_to(lost_core);
                continue;
            }
            atomic_fetch_add_explicit(&p->n_sleeping, 1, memory_order_seq_cst);
            futex_wait(&p->job, seen);
            atomic_fetch_sub_explicit(&p->n_sleeping, 1, memory_order_relaxed);
        }
        seen = atomic_load_explicit(&p->job, memory_order_acquire);
        if (atomic_load_explicit(&p->closing, memory_order_acquire)) return NULL;
        work(p, self);
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
    struct member *self = &p->members[0];
    if (self->tid == 0 || !pthread_equal(self->thread, pthread_self())) set_identity(self);
    uint32_t job = atomic_load_explicit(&p->job, memory_order_relaxed) + 1;
    atomic_store_explicit(&p->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&p->ctx, ctx, memory_order_relaxed);
    atomic_store_explicit(&p->n_items, n_items, memory_order_relaxed);
    atomic_store_explicit(&p->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&p->cursor, (uint64_t)job << 32 | (uint32_t)n_items,
                          memory_order_release);
    announce(p, job, n_items - 1);
    work(p, self);
    int32_t lost_core;
    if (spin(self, &p->n_done, (uint32_t)n_items, true, &lost_core) == WAIT_DONE) return;
    atomic_store_explicit(&p->caller_sleeping, 1, memory_order_seq_cst);
    uint32_t n_done;
    while ((n_done = atomic_load_explicit(&p->n_done, memory_order_seq_cst)) != (uint32_t)n_items)
        futex_wait(&p->n_done, n_done);
    atomic_store_explicit(&p->caller_sleeping, 0, memory_order_relaxed);
}

/* The first n_started members exist. */
static void stop(struct cpu_pool *p, int n_started) {
    atomic_store_explicit(&p->closing, 1, memory_order_release);
    announce(p, atomic_load_explicit(&p->job, memory_order_relaxed) + 1, INT_MAX);
    for (int i = 1; i < n_started; i++) pthread_join(p->members[i].thread, NULL);
    free(p->members);
    free(p);
}

enum status cpu_pool_create(int n_threads, struct cpu_pool **out) {
    CHECK(n_threads >= 1 && n_threads <= CPU_POOL_MAX_THREADS);
    *out = NULL;
    struct cpu_pool *p = aligned_alloc(LINE, sizeof *p);
    if (!p) return ST_NO_MEMORY;
    *p = (struct cpu_pool){.n_threads = n_threads};
    p->members = aligned_alloc(LINE, (size_t)n_threads * sizeof *p->members);
    if (!p->members) {
        free(p);
        return ST_NO_MEMORY;
    }
    for (int i = 0; i < n_threads; i++) p->members[i] = (struct member){.pool = p, .idx = i};
    /* Workers leave signals to the process's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int n = 1;
    for (; n < n_threads; n++) {
        pthread_t *thread = &p->members[n].thread;
        if (pthread_create(thread, NULL, worker_main, &p->members[n]) != 0) break;
        pthread_setname_np(*thread, "moed-cpu");
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (n < n_threads) {
        stop(p, n);
        return ST_NO_MEMORY;
    }
    *out = p;
    return ST_OK;
}

void cpu_pool_destroy(struct cpu_pool *p) {
    if (p) stop(p, p->n_threads);
}

int cpu_pool_n_threads(const struct cpu_pool *p) { return p->n_threads; }
