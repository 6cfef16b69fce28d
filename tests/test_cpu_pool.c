/* cpu_pool: every item runs exactly once, on a valid thread, before run returns; sleeping and waking
 * lose no job. Meant to be run under the thread sanitizer as well. */
#include "tests/support.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "moe/cpu_pool.h"

struct job {
    int32_t *hits; /* [n] plain memory: the pool alone orders the accesses */
    int32_t *threads; /* [n] who ran it */
    int64_t *scratch; /* [n_threads] plain, one thread at a time */
    int n_threads;
};

static void count_item(void *ctx, int32_t item, int thread) {
    struct job *j = ctx;
    j->hits[item]++;
    j->threads[item] = thread;
    if (thread >= 0 && thread < j->n_threads) j->scratch[thread] += item + 1;
}

static void run_and_check(struct cpu_pool *p, int n_threads, int32_t n) {
    struct job j = {calloc((size_t)n + 1, sizeof(int32_t)), calloc((size_t)n + 1, sizeof(int32_t)),
                    calloc((size_t)n_threads, sizeof(int64_t)), n_threads};
    cpu_pool_run(p, n, count_item, &j);
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++) {
        assert_int_equal(j.hits[i], 1);
        assert_in_range(j.threads[i], 0, n_threads - 1);
    }
    for (int t = 0; t < n_threads; t++) sum += j.scratch[t];
    assert_int_equal(sum, (int64_t)n * (n + 1) / 2);
    free(j.hits);
    free(j.threads);
    free(j.scratch);
}

/* Many jobs back to back, of sizes around the number of threads. */
static void test_every_item_once(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 3, 8};
    for (size_t k = 0; k < sizeof threads / sizeof *threads; k++) {
        struct cpu_pool *p;
        assert_int_equal(cpu_pool_create(threads[k], &p), ST_OK);
        assert_int_equal(cpu_pool_n_threads(p), threads[k]);
        uint64_t seed = 7;
        for (int i = 0; i < 500; i++)
            run_and_check(p, threads[k], (int32_t)(test_random(&seed) % 40));
        run_and_check(p, threads[k], 10000);
        cpu_pool_destroy(p);
    }
}

static void nap(long ns) {
    struct timespec t = {0, ns};
    nanosleep(&t, NULL);
}

/* Pauses longer than the spin put the workers to sleep: the next job must wake them. */
static void test_sleep_and_wake(void **state) {
    (void)state;
    struct cpu_pool *p;
    assert_int_equal(cpu_pool_create(4, &p), ST_OK);
    for (int i = 0; i < 50; i++) {
        nap(CPU_POOL_SPIN_NS * (i % 3));
        run_and_check(p, 4, 1 + i % 9);
    }
    cpu_pool_destroy(p);
}

struct slow {
    atomic_int first_thread; /* whoever runs item 0 */
    atomic_int others; /* items that ran while item 0 was held up */
    int32_t n;
};

/* Item 0 does not end until all other items have run: a held-up thread delays its own item only. */
static void slow_item(void *ctx, int32_t item, int thread) {
    struct slow *s = ctx;
    (void)thread;
    if (item > 0) {
        atomic_fetch_add(&s->others, 1);
        return;
    }
    while (atomic_load(&s->others) < s->n - 1) nap(1000);
}

static void test_held_up_thread(void **state) {
    (void)state;
    struct cpu_pool *p;
    assert_int_equal(cpu_pool_create(3, &p), ST_OK);
    for (int i = 0; i < 20; i++) {
        struct slow s = {.n = 100};
        cpu_pool_run(p, s.n, slow_item, &s);
        assert_int_equal(atomic_load(&s.others), s.n - 1);
    }
    cpu_pool_destroy(p);
}

/* The caller sleeps while a worker finishes, and is woken. */
static void caller_idle_item(void *ctx, int32_t item, int thread) {
    (void)item;
    if (thread != 0) nap(5 * CPU_POOL_SPIN_NS);
    atomic_fetch_add((atomic_int *)ctx, 1);
}

static void test_caller_waits(void **state) {
    (void)state;
    struct cpu_pool *p;
    assert_int_equal(cpu_pool_create(2, &p), ST_OK);
    for (int i = 0; i < 100; i++) {
        atomic_int n = 0;
        cpu_pool_run(p, 2, caller_idle_item, &n);
        assert_int_equal(atomic_load(&n), 2);
    }
    cpu_pool_destroy(p);
}

/* Another process's load: keeps the core it is told to use busy. */
static void *hog_main(void *stop) {
    while (!atomic_load((atomic_int *)stop)) {
    }
    return NULL;
}

static cpu_set_t cores; /* that the process began with */

/* Threads of this process, the hogs aside, that may not run on all of them. */
static int n_confined(int n_hogs) {
    int n = -n_hogs;
    DIR *d = opendir("/proc/self/task");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        cpu_set_t s;
        if (e->d_name[0] == '.') continue;
        n += sched_getaffinity((pid_t)atoi(e->d_name), sizeof s, &s) == 0 && !CPU_EQUAL(&s, &cores);
    }
    closedir(d);
    return n;
}

static void spin_item(void *ctx, int32_t item, int thread) {
    (void)item;
    (void)thread;
    for (int i = 0; i < 20000; i++) atomic_fetch_add((atomic_int *)ctx, 1);
}

/* Threads pushed off their core by somebody else are helped out, and may go wherever they could before once
 * their jobs are over. */
static void test_crowded_core(void **state) {
    (void)state;
    enum { N_HOGS = 2, N_ITEMS = 8 };
    cpu_set_t one;
    if (CPU_COUNT(&cores) < 2) skip();
    struct cpu_pool *p;
    assert_int_equal(cpu_pool_create(2, &p), ST_OK);
    atomic_int stop = 0, n = 0;
    pthread_t hogs[N_HOGS];
    CPU_ZERO(&one);
    CPU_SET((unsigned)sched_getcpu(), &one);
    for (int i = 0; i < N_HOGS; i++) {
        assert_int_equal(pthread_create(&hogs[i], NULL, hog_main, &stop), 0);
        assert_int_equal(pthread_setaffinity_np(hogs[i], sizeof one, &one), 0);
    }
    for (int i = 0; i < 300; i++) {
        atomic_store(&n, 0);
        cpu_pool_run(p, N_ITEMS, spin_item, &n);
        assert_int_equal(atomic_load(&n), 20000 * N_ITEMS);
    }
    for (int i = 0; n_confined(N_HOGS) > 0 && i < 5000; i++) nap(1000000);
    assert_int_equal(n_confined(N_HOGS), 0);
    atomic_store(&stop, 1);
    for (int i = 0; i < N_HOGS; i++) pthread_join(hogs[i], NULL);
    cpu_pool_destroy(p);
}

int main(void) {
    if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once), cmocka_unit_test(test_sleep_and_wake),
        cmocka_unit_test(test_held_up_thread),  cmocka_unit_test(test_caller_waits),
        cmocka_unit_test(test_crowded_core),
    };
    int n_failed = cmocka_run_group_tests_name("cpu_pool", tests, NULL, NULL);
    return n_failed == 0 && CPU_COUNT(&cores) < 2 ? TEST_SKIPPED : n_failed;
}
