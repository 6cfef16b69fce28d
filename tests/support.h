/* Test support: fixtures on disk, the golden reference outputs, a deterministic generator. cmocka's
 * headers come with it in the order they need. */
#ifndef MOED_TESTS_SUPPORT_H
#define MOED_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base.h"

#define TINY_MODEL TEST_DATA "/tiny-moe-q4_k_m.gguf"
#define QWEN3_VOCAB TEST_DATA "/qwen3-vocab.gguf"

/* What a program returns of which a part, or all, could not be tested here: ctest shows it as skipped, not as passed
 * (SKIP_RETURN_CODE). */
enum { TEST_SKIPPED = 77 };

/* Fail with the error's text unless st is ST_OK. err: `const struct error *`, may be NULL. */
static inline void test_assert_ok(enum status st, const struct error *err, const char *file,
                                  int line) {
    if (st == ST_OK) return;
    print_error("%s: %s\n", status_name(st), err ? err->text : "");
    _fail(file, line);
}
#define assert_ok(st, err) test_assert_ok((st), (err), __FILE__, __LINE__)

/* Whole file in malloc'd memory; fails the test if it cannot be read. */
uint8_t *test_read_file(const char *path, size_t *n);
/* Write n bytes to a fresh temporary file; returns its path (malloc'd; unlink and free it). */
char *test_write_temp(const void *p, size_t n);

/* Deterministic pseudo-random numbers (splitmix64). */
uint64_t test_random(uint64_t *state);
float test_uniform(uint64_t *state, float lo, float hi);

/* ---- golden: Hugging Face transformers' outputs on the bundled model (tests/make_golden.py) ------ */

struct golden_route {
    int layer, pos, n;
    int32_t ids[8];
    float weights[8];
};

struct golden_prompt {
    char name[32];
    int32_t *ids;
    int n_ids;
    int32_t *greedy; /* continuation; generation did not stop at end-of-turn tokens */
    float *margins;  /* top-1 minus top-2 logit at each greedy step */
    int n_greedy;
    double nll;      /* sum over the prompt */
    int32_t top8_ids[8];
    float top8_logprobs[8];
    /* Only where has_full: */
    int has_full;
    int n_tokens, n_vocab, n_layers, n_embd;
    const float *logits; /* [T][V] */
    const float *hidden; /* [L][T][D]: the embedding, then the outputs of layers 0 … L-2 */
    struct golden_route *routes;
    int n_routes;
};

struct golden {
    struct golden_prompt *prompts;
    int n_prompts;
    float *f32; /* the .f32 file, which logits and hidden point into */
};

struct golden *golden_load(void); /* of the bundled model; fails the test on any error */
void golden_free(struct golden *g);

#endif
