/* cpu_pool: the CPU backend's threads. A job is a number of independent items; threads take items from
 * one atomic counter, so that a thread the kernel has descheduled delays its own item and nothing else.
 *
 * Whoever waits spins for CPU_POOL_SPIN_NS and then sleeps on a futex: jobs of one step follow each other
 * within microseconds, and an idle pool leaves its cores alone. A thread that lost its core to another process
 * while it held an item is moved to the core of one that waits for it (cpu_pool.c). The caller of cpu_pool_run works too, as
 * thread 0. One caller thread; no allocation after creation. Private to the CPU backend. */
#ifndef MOED_MOE_CPU_POOL_H
#define MOED_MOE_CPU_POOL_H

#include "proto/base.h"

enum { CPU_POOL_SPIN_NS = 50000, CPU_POOL_MAX_THREADS = 1024 };

struct cpu_pool;

/* One item of a job. thread is 0 … n_threads - 1 and is nobody else's while the item runs, so that it
 * can index scratch memory. */
typedef void cpu_pool_fn(void *ctx, int32_t item, int thread);

/* n_threads counts the caller. ST_NO_MEMORY when memory or threads run out. */
enum status cpu_pool_create(int n_threads, struct cpu_pool **out);
void cpu_pool_destroy(struct cpu_pool *p); /* NULL is fine; no job may be running */
int cpu_pool_n_threads(const struct cpu_pool *p);

/* Run items 0 … n_items - 1, in no order; everything they wrote is visible when this returns. Not from
 * inside an item. */
void cpu_pool_run(struct cpu_pool *p, int32_t n_items, cpu_pool_fn *fn, void *ctx);

#endif
