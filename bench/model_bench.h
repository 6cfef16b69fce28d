/* model_bench: what the benches that drive moe.h share: option parsing, opening, stepping, medians. Each program
 * defines `program` before it includes this. Errors print one line and exit with 2 (options) or 1 (the rest). */
#ifndef MOED_BENCH_MODEL_BENCH_H
#define MOED_BENCH_MODEL_BENCH_H

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/moe.h"

static inline int bench_int(const char *name, const char *text, int lo, int hi) {
    char *end;
    long v = strtol(text, &end, 10);
    if (end == text || *end || v < lo || v > hi) {
        fprintf(stderr, "%s: --%s %s: want a whole number from %d to %d\n", program, name, text, lo,
                hi);
        exit(2);
    }
    return (int)v;
}

/* Comma-separated whole numbers; returns how many. */
static inline int bench_ints(const char *name, const char *text, int lo, int hi, int *dst,
                             int cap) {
    int n = 0;
    while (*text) {
        char word[16];
        size_t len = strcspn(text, ",");
        if (n == cap || len == 0 || len >= sizeof word) break;
        memcpy(word, text, len);
        word[len] = 0;
        dst[n++] = bench_int(name, word, lo, hi);
        text += len;
        if (*text == ',' && text[1]) text++;
    }
    if (n == 0 || *text) {
        fprintf(stderr, "%s: --%s: want up to %d numbers with commas between them\n", program, name,
                cap);
        exit(2);
    }
    return n;
}

static inline void *bench_alloc(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (p) return p;
    fprintf(stderr, "%s: no memory\n", program);
    exit(1);
}

static inline void bench_require(enum status st, const char *what) {
    if (st == ST_OK) return;
    fprintf(stderr, "%s: %s: %s\n", program, what, status_name(st));
    exit(1);
}

static inline struct moe *bench_open(const struct moe_options *o) {
    struct moe *m;
    struct error e = {0};
    if (!o->model_path) {
        fprintf(stderr, "%s: --model FILE is needed; --help lists the options\n", program);
        exit(2);
    }
    if (moe_open(o, NULL, NULL, &e, &m) != ST_OK) {
        fprintf(stderr, "%s: %s\n", program, e.text);
        exit(1);
    }
    const struct moe_info *i = moe_info(m);
    fprintf(stderr, "%s: %s, %s, %.1f MB, on %s\n", program, i->name, i->quantization,
            (double)i->weight_bytes / 1e6, i->backend);
    if (i->limits.max_seq_tokens >= o->limits.max_seq_tokens) return m;
    fprintf(stderr, "%s: %d tokens are wanted, the model's context is %d\n", program,
            (int)o->limits.max_seq_tokens, (int)i->limits.max_seq_tokens);
    exit(2);
}

static inline void bench_start_greedy(struct moe *m, int32_t slot, const int32_t *ids, int32_t n) {
    const struct moe_sampling greedy = {.top_p = 1.0f, .repetition_penalty = 1.0f};
    struct moe_slot_start start = {
        .slot = slot, .sampling = greedy, .ids = ids, .n_ids = n, .n_prompt = n};
    bench_require(moe_slot_start(m, &start), "slot");
}

/* Collect a step whose rows must all have a token. */
static inline void bench_collect(struct moe *m, struct moe_result *result) {
    bench_require(moe_collect(m, result), "step");
    for (int32_t i = 0; i < result->n_rows; i++) bench_require(result->rows[i].st, "row");
}

static inline int bench_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts x. */
static inline double bench_median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, bench_by_value);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

#endif
