/* cuda_exchange: the kernels by which GPUs share experts, against a sort written plainly here. One GPU stands for all
 * ranks: their flags say beforehand what they would say. Ranks with and without tokens, experts held by one rank and by
 * several, tokens of every chunk size. And that a wait for a rank that does not come ends, by time and by word. */
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

#include "cuda/kernels.h"

enum { EPOCH = 7 /* layers exchanged before */ };

struct world {
    uint64_t rng;
    int n_ranks, n_experts, n_used, n_cols, max_tokens, max_group;
    int n[MOE_MAX_RANKS], first[MOE_MAX_RANKS + 1];
    struct cuda_queue q;
    /* Device. */
    int32_t *ids[MOE_MAX_RANKS];
    uint16_t *x[MOE_MAX_RANKS];
    struct exchange_args a;
    struct step_header *header;
    /* Host: by rank, then all in their order. */
    int32_t *group_ids;
    uint16_t *inputs;
    struct expert_home *homes;
};

static void ok(cudaError_t e) {
    if (e != cudaSuccess) fail_msg("%s", cudaGetErrorString(e));
}

static void *device(size_t n) {
    void *p;
    ok(cudaMalloc(&p, n > 0 ? n : 16));
    ok(cudaMemset(p, 0xee, n > 0 ? n : 16));
    return p;
}

static void to_device(void *dst, const void *src, size_t n) {
    ok(cudaMemcpy(dst, src, n, cudaMemcpyHostToDevice));
}

static void *to_host(const void *src, size_t n) {
    void *p = malloc(n > 0 ? n : 1);
    ok(cudaMemcpy(p, src, n, cudaMemcpyDeviceToHost));
    return p;
}

static void open_queue(struct cuda_queue *q) {
    int major, n_sm, shared;
    ok(cudaSetDevice(0));
    ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    ok(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, 0));
    ok(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    *q = (struct cuda_queue){.dependent = major >= 9, .n_sm = n_sm, .max_shared = (size_t)shared};
    ok(cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking));
    ok(cuda_kernels_prepare(q));
}

/* A token's experts are distinct, and low ones more frequent. */
static void fill_token(struct world *w, int32_t *ids) {
    for (int k = 0; k < w->n_used; k++) {
        for (bool again = true; again;) {
            uint64_t a = test_random(&w->rng) % (uint64_t)w->n_experts, b = test_random(&w->rng) % (uint64_t)w->n_experts;
            ids[k] = (int32_t)(a < b ? a : b);
            again = false;
            for (int j = 0; j < k; j++) again |= ids[j] == ids[k];
        }
    }
}

static void fill_homes(struct world *w, bool several) {
    w->homes = calloc((size_t)w->n_experts, sizeof *w->homes);
    int16_t place = 0;
    for (int e = 0; e < w->n_experts; e++) {
        unsigned holders = 1u << test_random(&w->rng) % (uint64_t)w->n_ranks;
        if (several && test_random(&w->rng) % 2) holders |= (unsigned)(test_random(&w->rng) % (1u << w->n_ranks));
        w->homes[e] = (struct expert_home){(uint16_t)holders, place++};
    }
}

static void world_open(struct world *w, bool several) {
    size_t used = (size_t)w->n_used, cols = (size_t)w->n_cols, experts = (size_t)w->n_experts;
    for (int r = 0; r < w->n_ranks; r++) w->first[r + 1] = w->first[r] + w->n[r];
    w->max_group = w->max_tokens * w->n_ranks;
    size_t most = (size_t)w->max_group, n = (size_t)w->first[w->n_ranks];
    open_queue(&w->q);
    w->group_ids = calloc(n * used + 1, sizeof *w->group_ids);
    w->inputs = calloc(n * cols + 1, sizeof *w->inputs);
    for (size_t t = 0; t < n; t++) fill_token(w, w->group_ids + t * used);
    for (size_t i = 0; i < n * cols; i++) w->inputs[i] = (uint16_t)test_random(&w->rng);
    fill_homes(w, several);
    struct exchange_args *a = &w->a;
    *a = (struct exchange_args){.n_ranks = w->n_ranks,
                                .max_tokens = w->max_tokens,
                                .n_cols = w->n_cols,
                                .n_experts = w->n_experts,
                                .n_used = w->n_used,
                                .timeout_ns = UINT64_C(10000000000)};
    for (int r = 0; r < w->n_ranks; r++) {
        size_t at = (size_t)w->first[r];
        w->ids[r] = device((size_t)w->max_tokens * used * sizeof(int32_t));
        w->x[r] = device((size_t)w->max_tokens * cols * 2);
        to_device(w->ids[r], w->group_ids + at * used, (size_t)w->n[r] * used * sizeof(int32_t));
        to_device(w->x[r], w->inputs + at * cols, (size_t)w->n[r] * cols * 2);
        a->ids[r] = w->ids[r];
        a->x[r] = w->x[r];
        a->flags[r] = device(2 * MOE_MAX_RANKS * sizeof(uint64_t));
    }
    w->header = device(sizeof *w->header);
    a->header = w->header;
    a->epoch = device(sizeof *a->epoch);
    ok(cudaHostAlloc((void **)&a->stop, sizeof *a->stop, cudaHostAllocDefault));
    a->tokens = device(sizeof *a->tokens);
    a->group_ids = device(most * used * sizeof(int32_t));
    a->inputs = device(most * cols * 2);
    a->chunk_counts = device(EXCHANGE_BLOCKS * experts * sizeof(int32_t));
    a->homes = device(experts * sizeof *a->homes);
    to_device((void *)(uintptr_t)a->homes, w->homes, experts * sizeof *a->homes);
    a->lists.token_of = device(most * used * sizeof(int32_t));
    a->lists.row_of = device((size_t)w->max_tokens * used * sizeof(int32_t));
    a->lists.n_items = device(N_WIDTHS * sizeof(int32_t));
    for (int i = 0; i < N_WIDTHS; i++)
        a->lists.items[i] = device((experts + most * used / (8u << i)) * sizeof(struct gemm_item));
    a->counts = device(N_COUNTS * sizeof(uint64_t));
    a->load = device(experts * sizeof(uint64_t));
    a->rows = device(MOE_MAX_RANKS * sizeof(uint64_t));
}

static void world_close(struct world *w) {
    struct exchange_args *a = &w->a;
    ok(cudaDeviceSynchronize());
    for (int r = 0; r < w->n_ranks; r++) {
        ok(cudaFree(w->ids[r]));
        ok(cudaFree(w->x[r]));
        ok(cudaFree(a->flags[r]));
    }
    void *const all[] = {w->header,    a->epoch,          a->tokens,       a->group_ids,      a->inputs,
                         a->chunk_counts, (void *)(uintptr_t)a->homes, a->lists.token_of, a->lists.row_of,
                         a->lists.n_items, a->counts,      a->load,           a->rows};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ok(cudaFree(all[i]));
    for (int i = 0; i < N_WIDTHS; i++) ok(cudaFree(a->lists.items[i]));
    ok(cudaFreeHost(a->stop));
    ok(cudaStreamDestroy(w->q.stream));
    free(w->group_ids);
    free(w->inputs);
    free(w->homes);
}

/* Everybody but `absent` (-1: nobody) has said that its ids and products are there. */
static void as_rank(struct world *w, int rank, int absent) {
    const uint32_t epoch = EPOCH;
    w->a.rank = rank;
    *w->a.stop = 0;
    to_device(w->header, &(struct step_header){.n_tokens = w->n[rank]}, sizeof *w->header);
    to_device(w->a.epoch, &epoch, sizeof epoch);
    ok(cudaMemset(w->a.counts, 0, N_COUNTS * sizeof(uint64_t)));
    ok(cudaMemset(w->a.rows, 0, MOE_MAX_RANKS * sizeof(uint64_t)));
    ok(cudaMemset(w->a.load, 0, (size_t)w->n_experts * sizeof(uint64_t)));
    for (int r = 0; r < w->n_ranks; r++) {
        uint64_t flags[2 * MOE_MAX_RANKS] = {0};
        for (int q = 0; q < w->n_ranks; q++) {
            uint64_t layer = r == rank && q != absent ? EPOCH + 1 : EPOCH;
            flags[q] = layer << 32 | (uint64_t)w->n[q];
            flags[MOE_MAX_RANKS + q] = layer << 32;
        }
        to_device(w->a.flags[r], flags, sizeof flags);
    }
}

/* ---- what is expected ------------------------------------------------------------------------ */

struct expected {
    int32_t counts[MAX_EXPERTS], first[MAX_EXPERTS + 1], owner[MAX_EXPERTS];
    int32_t *row_of, *token_of; /* of all pairs */
};

static void expect(const struct world *w, struct expected *x) {
    int n_pairs = w->first[w->n_ranks] * w->n_used, n_shared = 0;
    int order[MAX_EXPERTS], cost[MOE_MAX_RANKS] = {0};
    memset(x, 0, sizeof *x);
    x->row_of = calloc((size_t)n_pairs + 1, sizeof *x->row_of);
    x->token_of = calloc((size_t)n_pairs + 1, sizeof *x->token_of);
    for (int p = 0; p < n_pairs; p++) x->counts[w->group_ids[p]]++;
    for (int e = 0; e < w->n_experts; e++) x->first[e + 1] = x->first[e] + x->counts[e];
    for (int e = 0, row = 0; e < w->n_experts; e++)
        for (int p = 0; p < n_pairs; p++)
            if (w->group_ids[p] == e) x->row_of[p] = row, x->token_of[row++] = p / w->n_used;
    for (int e = 0; e < w->n_experts; e++) {
        unsigned holders = w->homes[e].holders;
        x->owner[e] = __builtin_ctz(holders);
        if ((holders & (holders - 1)) == 0) {
            if (x->counts[e] > 0) cost[x->owner[e]] += x->counts[e] + EXPERT_COST;
            continue;
        }
        int at = n_shared++;
        for (; at > 0 && x->counts[order[at - 1]] < x->counts[e]; at--) order[at] = order[at - 1];
        order[at] = e;
    }
    for (int i = 0; i < n_shared; i++) {
        int e = order[i], best = -1;
        for (int r = 0; r < w->n_ranks; r++)
            if (w->homes[e].holders >> r & 1 && (best < 0 || cost[r] < cost[best])) best = r;
        x->owner[e] = best;
        if (x->counts[e] > 0) cost[best] += x->counts[e] + EXPERT_COST;
    }
}

static void check_items(const struct world *w, const struct expected *x, int list) {
    int32_t *n_items = to_host(w->a.lists.n_items, N_WIDTHS * sizeof *n_items), width = 8 << list, at = 0;
    struct gemm_item *items = to_host(w->a.lists.items[list], (size_t)n_items[list] * sizeof *items);
    for (int e = 0; e < w->n_experts; e++) {
        if (x->owner[e] != w->a.rank) continue;
        for (int32_t row = x->first[e]; row < x->first[e + 1]; row += items[at++].n) {
            assert_true(at < n_items[list]);
            assert_int_equal(items[at].expert, w->homes[e].place);
            assert_int_equal(items[at].first, row);
            assert_true(items[at].n > 0 && items[at].n <= width && row + items[at].n <= x->first[e + 1]);
        }
    }
    assert_int_equal(at, n_items[list]);
    free(n_items);
    free(items);
}

static void check_counts(const struct world *w, const struct expected *x, uint64_t n_far) {
    uint64_t *counts = to_host(w->a.counts, N_COUNTS * sizeof *counts), n_reads = 0, n_rows = 0;
    uint64_t *rows = to_host(w->a.rows, MOE_MAX_RANKS * sizeof *rows), owned[MOE_MAX_RANKS] = {0};
    uint64_t *load = to_host(w->a.load, (size_t)w->n_experts * sizeof *load);
    for (int e = 0; e < w->n_experts; e++) {
        assert_int_equal(load[e], x->counts[e]);
        owned[x->owner[e]] += (uint64_t)x->counts[e];
        if (x->owner[e] != w->a.rank) continue;
        n_reads += x->counts[e] > 0;
        n_rows += (uint64_t)x->counts[e];
    }
    assert_memory_equal(rows, owned, sizeof owned);
    assert_int_equal(counts[COUNT_READS], n_reads);
    assert_int_equal(counts[COUNT_ROWS], n_rows);
    assert_int_equal(counts[COUNT_FAR], n_far);
    free(counts);
    free(rows);
    free(load);
}

static void check_rank(struct world *w, const struct expected *x, int rank) {
    int n = w->first[w->n_ranks], first = w->first[rank] * w->n_used, n_own = w->n[rank] * w->n_used;
    size_t pairs = (size_t)n * (size_t)w->n_used, input_bytes = (size_t)n * (size_t)w->n_cols * 2;
    as_rank(w, rank, -1);
    ok(cuda_exchange_begin(&w->a, &w->q));
    ok(cuda_exchange_end(&w->a, &w->q));
    ok(cudaStreamSynchronize(w->q.stream));
    assert_int_equal(*w->a.stop, 0);
    struct group_tokens *t = to_host(w->a.tokens, sizeof *t);
    assert_int_equal(t->n, n);
    assert_int_equal(t->first_own, w->first[rank]);
    assert_int_equal(t->n_own, w->n[rank]);
    uint32_t *epoch = to_host(w->a.epoch, sizeof *epoch);
    assert_int_equal(*epoch, EPOCH + 1);
    for (int r = 0; r < w->n_ranks; r++) {
        uint64_t *flags = to_host(w->a.flags[r], 2 * MOE_MAX_RANKS * sizeof *flags);
        uint64_t said = (uint64_t)(EPOCH + 1) << 32;
        assert_int_equal(flags[rank], said | (uint64_t)w->n[rank]);
        assert_int_equal(flags[MOE_MAX_RANKS + rank], said);
        free(flags);
    }
    int32_t *ids = to_host(w->a.group_ids, pairs * sizeof *ids), *token_of = to_host(w->a.lists.token_of, pairs * sizeof *ids);
    int32_t *row_of = to_host(w->a.lists.row_of, (size_t)n_own * sizeof *row_of);
    uint16_t *inputs = to_host(w->a.inputs, input_bytes);
    assert_memory_equal(ids, w->group_ids, pairs * sizeof *ids);
    assert_memory_equal(inputs, w->inputs, input_bytes);
    assert_memory_equal(token_of, x->token_of, pairs * sizeof *ids);
    uint64_t n_far = (uint64_t)(n - w->n[rank]);
    for (int p = 0; p < n_own; p++) {
        int owner = x->owner[w->group_ids[first + p]];
        assert_int_equal(row_of[p], x->row_of[first + p] | owner << OWNER_SHIFT);
        n_far += owner != rank;
    }
    check_counts(w, x, n_far);
    for (int i = 0; i < N_WIDTHS; i++) check_items(w, x, i);
    free(t);
    free(epoch);
    free(ids);
    free(token_of);
    free(row_of);
    free(inputs);
}

/* ---- ids and inputs that collectives brought ------------------------------------------------- */

/* The same without flags; then what is sent to each other rank, pair by pair, out of products at their rows. */
static void check_packed(struct world *w, const struct expected *x, int rank) {
    int n_pairs = w->first[w->n_ranks] * w->n_used;
    size_t row = (size_t)w->n_cols, rank_rows = (size_t)w->max_tokens * (size_t)w->n_used;
    size_t sent_bytes = (size_t)w->n_ranks * rank_rows * row * 2;
    int32_t *arrived = device(MOE_MAX_RANKS * sizeof *arrived);
    to_device(arrived, w->n, sizeof w->n);
    as_rank(w, rank, rank == 0 ? 1 : 0); /* flags would end in a time-out */
    struct exchange_args a = w->a;
    a.arrived = arrived;
    a.all_rows = device((size_t)n_pairs * sizeof *a.all_rows);
    uint16_t *y = malloc((size_t)n_pairs * row * 2 + 1), *device_y = device((size_t)n_pairs * row * 2);
    for (size_t i = 0; i < (size_t)n_pairs * row; i++) y[i] = (uint16_t)test_random(&w->rng);
    to_device(device_y, y, (size_t)n_pairs * row * 2);
    uint16_t *send = device(sent_bytes);
    ok(cuda_exchange_begin(&a, &w->q));
    ok(cuda_exchange_pack(&a, device_y, send, rank_rows, &w->q));
    ok(cudaStreamSynchronize(w->q.stream));
    assert_int_equal(*w->a.stop, 0);
    uint16_t *sent = to_host(send, sent_bytes);
    int32_t *row_of = to_host(a.lists.row_of, (size_t)w->n[rank] * (size_t)w->n_used * sizeof *row_of);
    for (int r = 0; r < w->n_ranks; r++)
        for (int i = 0; i < w->n[r] * w->n_used; i++) {
            int p = w->first[r] * w->n_used + i, owner = x->owner[w->group_ids[p]];
            const uint16_t *to = sent + ((size_t)r * rank_rows + (size_t)i) * row;
            if (r == rank) {
                assert_int_equal(row_of[i], (owner == rank ? x->row_of[p] : i) | owner << OWNER_SHIFT);
            } else if (owner == rank) {
                assert_memory_equal(to, y + (size_t)x->row_of[p] * row, row * 2);
            } else {
                assert_int_equal(to[0], 0xeeee); /* not this rank's to send */
            }
        }
    ok(cudaFree(arrived));
    ok(cudaFree(a.all_rows));
    ok(cudaFree(device_y));
    ok(cudaFree(send));
    free(y);
    free(sent);
    free(row_of);
}

/* ---- tests ---------------------------------------------------------------------------------- */

static void test_all_tokens(void **state) {
    (void)state;
    static const struct {
        int n_ranks, n_experts, n_used, n_cols, n[3];
        bool several;
    } cases[] = {
        {1, 20, 4, 256, {24}, false},           {2, 20, 4, 512, {5, 3}, false},
        {2, 128, 8, 2048, {1, 0}, false},       {2, 128, 8, 2048, {32, 32}, true},
        {2, 128, 8, 2048, {128, 128}, false},   {3, 128, 8, 256, {0, 90, 61}, true},
        {2, 128, 8, 512, {2048, 1999}, true},   {3, 512, 10, 256, {700, 1, 47}, true},
        {2, 17, 1, 256, {49, 48}, false},       {2, 64, 32, 256, {333, 200}, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct world w = {.rng = i + 1,
                          .n_ranks = cases[i].n_ranks,
                          .n_experts = cases[i].n_experts,
                          .n_used = cases[i].n_used,
                          .n_cols = cases[i].n_cols,
                          .max_tokens = 2048};
        memcpy(w.n, cases[i].n, sizeof cases[i].n);
        world_open(&w, cases[i].several);
        struct expected x;
        expect(&w, &x);
        for (int r = 0; r < w.n_ranks; r++) check_rank(&w, &x, r);
        for (int r = 0; r < w.n_ranks; r++) check_packed(&w, &x, r);
        free(x.row_of);
        free(x.token_of);
        world_close(&w);
    }
}

/* No rows are left to compute, and later waits do not wait. */
static void check_lost(struct world *w) {
    for (int layer = 0; layer < 20; layer++) {
        ok(cuda_exchange_begin(&w->a, &w->q));
        ok(cuda_exchange_end(&w->a, &w->q));
    }
    ok(cudaStreamSynchronize(w->q.stream));
    assert_true(*w->a.stop != 0);
    struct group_tokens *t = to_host(w->a.tokens, sizeof *t);
    assert_int_equal(t->n, w->n[0]);
    free(t);
}

static void test_lost(void **state) {
    (void)state;
    struct world w = {
        .rng = 9, .n_ranks = 2, .n_experts = 128, .n_used = 8, .n_cols = 256, .max_tokens = 64, .n = {20, 30}};
    world_open(&w, false);
    w.a.timeout_ns = UINT64_C(2000000000);
    as_rank(&w, 0, 1);
    check_lost(&w);
    w.a.timeout_ns = UINT64_C(3600000000000);
    as_rank(&w, 0, 1);
    *w.a.stop = 1;
    check_lost(&w);
    world_close(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_all_tokens), cmocka_unit_test(test_lost)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
