/* cuda_ops: every product, norm and routing op of the CUDA backend against the reference backend: all weight types, all
 * ways in which columns are cut into parts, token counts around every tile size, ragged expert groups, NaN in
 * every row that a step does not have.
 *
 * The bound: f16 weights and outputs leave a normalised mean square error of about 6e-8; a wrong scale, a shifted
 * nibble or a lost column leaves 1e-3 and more. */
#include "tests/cuda_rig.h"

#include <stdio.h>

#define BOUND 1e-6

static const struct model_shape small = {.n_layers = 1,
                                         .n_embd = 512,
                                         .n_heads = 8,
                                         .n_kv_heads = 2,
                                         .head_dim = 128,
                                         .n_experts = 20,
                                         .n_experts_used = 4,
                                         .n_ff_expert = 768,
                                         .n_vocab = 500,
                                         .n_ctx_train = 1024,
                                         .norm_eps = 1e-6f,
                                         .rope_base = 1e6f};

static struct moe_limits limits_of(int32_t max_batch_tokens) {
    return (struct moe_limits){.max_batch_tokens = max_batch_tokens,
                               .max_seqs = 4,
                               .max_rows = max_batch_tokens > 40 ? 40 : max_batch_tokens,
                               .max_seq_tokens = 1024,
                               .block_tokens = 16,
                               .n_blocks = 70};
}

static const enum tensor_type all_types[] = {TENSOR_Q4_K, TENSOR_Q6_K, TENSOR_Q5_K, TENSOR_Q8_0,
                                             TENSOR_F16,  TENSOR_BF16, TENSOR_F32};
enum { N_TYPES = sizeof all_types / sizeof *all_types };

static void check(const char *what, enum tensor_type type, int32_t cols, int32_t n, double error) {
    if (error > BOUND)
        fail_msg("%s, type %d, %d columns, %d tokens: error %.2e", what, (int)type, (int)cols, (int)n,
                 error);
}

/* h += W x for every type and 1, 2, 3, 4, 5, 8 and 16 panels of columns (two parts); tokens around each tile's border. Rows are not a
 * multiple of any tile. */
static void test_linear_add(void **state) {
    (void)state;
    enum { N_COLUMNS = 7 };
    static const int32_t columns[N_COLUMNS] = {256, 512, 768, 1024, 1280, 2048, 4096};
    static const int32_t tokens[] = {1, 7, 8, 9, 16, 17, 33, 48, 65, 130};
    double worst = 0;
    struct moe_limits l = limits_of(130);
    struct model_shape shape = small;
    shape.n_embd = 768;
    struct pair p = pair_open(&shape, &l);
    struct bufs h = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, 768);
    struct bufs x[N_COLUMNS];
    struct weights w[N_TYPES][N_COLUMNS];
    for (int c = 0; c < N_COLUMNS; c++) {
        x[c] = pair_bufs(&p, BUF_TOKENS, BUF_INNER, columns[c]);
        for (int t = 0; t < N_TYPES; t++)
            w[t][c] = pair_weights(&p, all_types[t], 1, 768, columns[c], 1.0f);
    }
    pair_ready(&p);
    for (int c = 0; c < N_COLUMNS; c++)
        for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++)
            for (int t = 0; t < N_TYPES; t++) {
                if (t >= 2 && (int)(k + (size_t)t) % 3 != c % 3) continue; /* a third of the rarer types */
                int32_t n = tokens[k];
                pair_fill(&p, &x[c], n, 2.0f);
                pair_fill(&p, &h, n, 1.0f);
                pair_begin(&p, 0, n, MOE_ROWS_NONE);
                BOTH(&p, i, pair_ops(&p, i)->linear_add(
                                p.b[i], &(struct op_linear_add){
                                            .x = x[c].b[i], .w = w[t][c].w[i], .h = h.b[i]}));
                double error = pair_error(&p, &h, n);
                check("linear_add", all_types[t], columns[c], n, error);
                worst = fmax(worst, error);
                pair_end(&p);
            }
    print_message("linear_add: worst error %.2e\n", worst);
    pair_close(&p);
}

/* A token's result, bit for bit, whatever kernel the size of its step chooses: mma.sync and wgmma, tiles of every
 * width, one part, two and four, by warps of a block and by blocks of a cluster. A matrix of many rows has other tiles than
 * one of few. */
static void test_any_step(void **state) {
    (void)state;
    enum { MOST = 520, N_MATRICES = 4, N_TALL_TYPES = 2 };
    static const struct {
        int32_t rows, columns;
    } matrices[N_MATRICES] = {{768, 256}, {768, 2048}, {768, 4096}, {5120, 2048}};
    static const int32_t tokens[] = {1, 8, 9, 16, 24, 32, 33, 48, 100, 192, 256, 300};
    struct moe_limits l = limits_of(MOST);
    struct pair p = pair_open(&small, &l);
    struct bufs h[N_MATRICES], x[N_MATRICES];
    struct weights w[N_TYPES][N_MATRICES];
    size_t most_values = 0;
    for (int c = 0; c < N_MATRICES; c++) {
        int32_t rows = matrices[c].rows;
        x[c] = pair_bufs(&p, BUF_TOKENS, BUF_INNER, matrices[c].columns);
        h[c] = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, rows);
        for (int t = 0; t < (rows > 768 ? N_TALL_TYPES : N_TYPES); t++)
            w[t][c] = pair_weights(&p, all_types[t], 1, rows, matrices[c].columns, 1.0f);
        if ((size_t)MOST * (size_t)rows > most_values) most_values = (size_t)MOST * (size_t)rows;
    }
    pair_ready(&p);
    const struct backend_ops *gpu = pair_ops(&p, GPU);
    float *zeros = calloc(most_values, sizeof *zeros), *whole = NULL;
    for (int c = 0; c < N_MATRICES; c++)
        for (int t = 0; t < (matrices[c].rows > 768 ? N_TALL_TYPES : N_TYPES); t++) {
            int32_t rows = matrices[c].rows;
            pair_fill(&p, &x[c], MOST, 2.0f);
            for (int k = -1; k < (int)(sizeof tokens / sizeof *tokens); k++) {
                int32_t n = k < 0 ? MOST : tokens[k];
                assert_int_equal(gpu->buf_write(p.b[GPU], h[c].b[GPU], 0, n, zeros), ST_OK);
                pair_begin(&p, 0, n, MOE_ROWS_NONE);
                const struct op_linear_add op = {.x = x[c].b[GPU], .w = w[t][c].w[GPU], .h = h[c].b[GPU]};
                assert_int_equal(gpu->linear_add(p.b[GPU], &op), ST_OK);
                float *got = pair_read(&p, GPU, &h[c], n);
                pair_end(&p);
                if (k < 0) {
                    whole = got;
                    continue;
                }
                for (int32_t i = 0; i < n * rows; i++)
                    if (memcmp(&got[i], &whole[i], sizeof *got) != 0)
                        fail_msg("type %d, %d rows, %d columns: token %d differs in a step of %d", (int)all_types[t],
                                 (int)rows, (int)matrices[c].columns, (int)(i / rows), (int)n);
                free(got);
            }
            free(whole);
        }
    free(zeros);
    pair_close(&p);
}

/* Weights whose sizes differ by 2^16 keep their precision: the kernels' scaling follows the matrix. */
static void test_weight_sizes(void **state) {
    (void)state;
    static const float sizes[] = {1.0f / 64, 1.0f, 32.0f, 256.0f};
    struct moe_limits l = limits_of(16);
    struct pair p = pair_open(&small, &l);
    struct bufs h = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, 512);
    struct bufs x = pair_bufs(&p, BUF_TOKENS, BUF_INNER, 512);
    struct weights w[3][4];
    for (int t = 0; t < 3; t++)
        for (int s = 0; s < 4; s++) w[t][s] = pair_weights(&p, all_types[t], 1, 512, 512, sizes[s]);
    pair_ready(&p);
    float *zeros = calloc(16 * 512, sizeof *zeros);
    for (int t = 0; t < 3; t++)
        for (int s = 0; s < 4; s++) {
            pair_fill(&p, &x, 5, 2.0f);
            BOTH(&p, i, pair_ops(&p, i)->buf_write(p.b[i], h.b[i], 0, 16, zeros));
            pair_begin(&p, 0, 5, MOE_ROWS_NONE);
            BOTH(&p, i, pair_ops(&p, i)->linear_add(
                            p.b[i], &(struct op_linear_add){
                                        .x = x.b[i], .w = w[t][s].w[i], .h = h.b[i]}));
            float *a = pair_read(&p, GPU, &h, 5), *b = pair_read(&p, REF, &h, 5);
            double error = 0, square = 0;
            for (int i = 0; i < 5 * 512; i++) {
                error += pow((double)a[i] - (double)b[i], 2);
                square += pow((double)b[i], 2);
            }
            free(a);
            free(b);
            check("weight size", all_types[t], 512, 5, error / square);
            pair_end(&p);
        }
    free(zeros);
    pair_close(&p);
}

/* Three matrices of different heights and types in one op, the last one with rows that fill no row block. */
static void test_norm_linear(void **state) {
    (void)state;
    static const int32_t tokens[] = {1, 8, 13, 40, 129, 200};
    struct moe_limits l = limits_of(200);
    struct pair p = pair_open(&small, &l);
    struct bufs x = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, 512);
    static const int32_t heights[] = {1024, 256, 250};
    static const enum tensor_type types[] = {TENSOR_Q4_K, TENSOR_Q6_K, TENSOR_Q5_K};
    struct weights norm = pair_norm(&p, 512), w[3];
    struct bufs out[3];
    for (int j = 0; j < 3; j++) {
        w[j] = pair_weights(&p, types[j], 1, heights[j], 512, 1.0f);
        out[j] = pair_bufs(&p, BUF_TOKENS, BUF_INNER, heights[j]);
    }
    pair_ready(&p);
    double worst = 0;
    for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++) {
        int32_t n = tokens[k];
        pair_fill(&p, &x, n, 5.0f);
        for (int j = 0; j < 3; j++) pair_fill(&p, &out[j], 0, 1.0f);
        pair_begin(&p, 0, n, MOE_ROWS_NONE);
        BOTH(&p, i, pair_ops(&p, i)->norm_linear(
                        p.b[i], &(struct op_norm_linear){.x = x.b[i],
                                                         .norm = norm.w[i],
                                                         .eps = 1e-6f,
                                                         .n_out = 3,
                                                         .w = {w[0].w[i], w[1].w[i], w[2].w[i]},
                                                         .out = {out[0].b[i], out[1].b[i], out[2].b[i]}}));
        for (int j = 0; j < 3; j++) {
            double error = pair_error(&p, &out[j], n);
            check("norm_linear", types[j], 512, n, error);
            worst = fmax(worst, error);
        }
        pair_end(&p);
    }
    print_message("norm_linear: worst error %.2e\n", worst);
    pair_close(&p);
}

/* ---- experts ------------------------------------------------------------------------------------------ */

struct expert_set {
    struct pair p;
    struct weights gate, up, down;
    struct bufs x, act, y, h;
};

static struct expert_set experts_open(enum tensor_type up_type, enum tensor_type down_type, int32_t max) {
    struct moe_limits l = limits_of(max);
    struct expert_set s = {.p = pair_open(&small, &l)};
    const struct model_shape *m = &small;
    s.gate = pair_weights(&s.p, up_type, m->n_experts, m->n_ff_expert, m->n_embd, 1.0f);
    s.up = pair_weights(&s.p, up_type, m->n_experts, m->n_ff_expert, m->n_embd, 3.0f);
    s.down = pair_weights(&s.p, down_type, m->n_experts, m->n_embd, m->n_ff_expert, 1.0f);
    s.x = pair_bufs(&s.p, BUF_TOKENS, BUF_INNER, m->n_embd);
    s.h = pair_bufs(&s.p, BUF_TOKENS, BUF_EXACT, m->n_embd);
    s.act = pair_bufs(&s.p, BUF_ROUTED, BUF_INNER, m->n_ff_expert);
    s.y = pair_bufs(&s.p, BUF_ROUTED, BUF_INNER, m->n_embd);
    pair_ready(&s.p);
    return s;
}

/* gate, up and down under a given routing. The two ops are compared one by one: down starts from the reference's act. */
static void run_experts(struct expert_set *s, int32_t n, const int32_t *ids, const float *weights,
                        enum tensor_type type, double *worst) {
    struct pair *p = &s->p;
    int32_t n_pairs = n * small.n_experts_used;
    pair_fill(p, &s->x, n, 2.0f);
    pair_fill(p, &s->h, n, 1.0f);
    pair_fill(p, &s->act, 0, 1.0f);
    pair_fill(p, &s->y, 0, 1.0f);
    pair_begin(p, 0, n, MOE_ROWS_NONE);
    BOTH(p, i, pair_ops(p, i)->route_write(p->b[i], ids, weights));
    int32_t first[2][21];
    BOTH(p, i, pair_ops(p, i)->route_read(p->b[i], NULL, NULL, first[i]));
    assert_memory_equal(first[REF], first[GPU], sizeof first[REF]);
    BOTH(p, i, pair_ops(p, i)->experts_up(
                   p->b[i], &(struct op_experts_up){.x = s->x.b[i],
                                                    .gate = s->gate.w[i],
                                                    .up = s->up.w[i],
                                                    .act = s->act.b[i]}));
    double error = pair_error(p, &s->act, n_pairs);
    check("experts_up", type, small.n_embd, n, error);
    *worst = fmax(*worst, error);
    pair_fill(p, &s->act, n_pairs, 1.0f);
    BOTH(p, i, pair_ops(p, i)->experts_down(
                   p->b[i], &(struct op_experts_down){
                                .act = s->act.b[i], .down = s->down.w[i], .y = s->y.b[i], .h = s->h.b[i]}));
    error = pair_error(p, &s->h, n);
    check("experts_down", type, small.n_ff_expert, n, error);
    *worst = fmax(*worst, error);
    pair_end(p);
}

/* Distinct experts per token, random weights in falling order. */
static void random_routing(uint64_t *rng, int32_t n, int32_t n_experts, int32_t *ids, float *weights) {
    for (int32_t t = 0; t < n; t++) {
        float w = 0.5f;
        for (int k = 0; k < 4; k++) {
            bool again;
            do {
                ids[4 * t + k] = (int32_t)(test_random(rng) % (uint64_t)n_experts);
                again = false;
                for (int j = 0; j < k; j++) again |= ids[4 * t + j] == ids[4 * t + k];
            } while (again);
            weights[4 * t + k] = w;
            w *= test_uniform(rng, 0.3f, 0.9f);
        }
    }
}

static void test_experts(void **state) {
    (void)state;
    static const enum tensor_type types[][2] = {{TENSOR_Q4_K, TENSOR_Q4_K},
                                                {TENSOR_Q4_K, TENSOR_Q6_K},
                                                {TENSOR_Q6_K, TENSOR_Q5_K},
                                                {TENSOR_Q5_K, TENSOR_Q8_0},
                                                {TENSOR_Q8_0, TENSOR_F16}};
    enum { MAX = 300 };
    static int32_t ids[4 * MAX];
    static float weights[4 * MAX];
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        struct expert_set s = experts_open(types[t][0], types[t][1], MAX);
        double worst = 0;
        bool common = t < 2;
        /* Random groups; the expert count leaves some of them empty. */
        static const int32_t tokens[] = {1, 2, 8, 11, 16, 30, 64, 100, 136, 250, 257, MAX};
        for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k += common ? 1 : 3) {
            random_routing(&s.p.rng, tokens[k], k % 2 ? 20 : 7, ids, weights);
            run_experts(&s, tokens[k], ids, weights, types[t][0], &worst);
        }
        /* All tokens to the same four experts, the last one among them. */
        for (int32_t n = 1; n <= 65; n += common ? 8 : 32) {
            random_routing(&s.p.rng, n, 20, ids, weights);
            for (int32_t i = 0; i < n; i++) memcpy(ids + 4 * i, (int32_t[]){19, 3, 0, 7}, 4 * sizeof *ids);
            run_experts(&s, n, ids, weights, types[t][0], &worst);
        }
        print_message("experts, types %d and %d: worst error %.2e\n", (int)types[t][0],
                      (int)types[t][1], worst);
        pair_close(&s.p);
    }
}

/* One expert with every group size from 1 to 65, the other tokens elsewhere. */
static void test_group_sizes(void **state) {
    (void)state;
    enum { N = 70 };
    static int32_t ids[4 * N];
    static float weights[4 * N];
    struct expert_set s = experts_open(TENSOR_Q4_K, TENSOR_Q6_K, N);
    double worst = 0;
    for (int32_t size = 1; size <= 65; size += size < 18 ? 1 : 5) {
        random_routing(&s.p.rng, N, 10, ids, weights);
        for (int32_t i = 0; i < size; i++) ids[4 * i + i % 4] = 15;
        run_experts(&s, N, ids, weights, TENSOR_Q4_K, &worst);
    }
    print_message("group sizes: worst error %.2e\n", worst);
    pair_close(&s.p);
}

/* The same for the experts: a token with its experts, in steps of sizes that go by different kernels. */
static void test_experts_any_step(void **state) {
    (void)state;
    enum { MOST = 300 };
    static const int32_t tokens[] = {1, 2, 8, 9, 33, 64, 100, 130, 200};
    static const enum tensor_type types[][2] = {{TENSOR_Q4_K, TENSOR_Q4_K}, {TENSOR_Q6_K, TENSOR_Q6_K}};
    static int32_t ids[4 * MOST];
    static float weights[4 * MOST];
    for (int t = 0; t < 2; t++) {
        struct expert_set s = experts_open(types[t][0], types[t][1], MOST);
        const struct backend_ops *gpu = pair_ops(&s.p, GPU);
        struct backend *b = s.p.b[GPU];
        size_t n_embd = (size_t)small.n_embd;
        float *zeros = calloc(MOST * n_embd, sizeof *zeros), *whole = NULL;
        pair_fill(&s.p, &s.x, MOST, 2.0f);
        random_routing(&s.p.rng, MOST, 20, ids, weights);
        for (int k = -1; k < (int)(sizeof tokens / sizeof *tokens); k++) {
            int32_t n = k < 0 ? MOST : tokens[k];
            assert_int_equal(gpu->buf_write(b, s.h.b[GPU], 0, n, zeros), ST_OK);
            pair_begin(&s.p, 0, n, MOE_ROWS_NONE);
            assert_int_equal(gpu->route_write(b, ids, weights), ST_OK);
            const struct op_experts_up up = {
                .x = s.x.b[GPU], .gate = s.gate.w[GPU], .up = s.up.w[GPU], .act = s.act.b[GPU]};
            const struct op_experts_down down = {
                .act = s.act.b[GPU], .down = s.down.w[GPU], .y = s.y.b[GPU], .h = s.h.b[GPU]};
            assert_int_equal(gpu->experts_up(b, &up), ST_OK);
            assert_int_equal(gpu->experts_down(b, &down), ST_OK);
            float *got = pair_read(&s.p, GPU, &s.h, n);
            pair_end(&s.p);
            if (k < 0) {
                whole = got;
                continue;
            }
            for (size_t i = 0; i < (size_t)n * n_embd; i++)
                if (memcmp(&got[i], &whole[i], sizeof *got) != 0)
                    fail_msg("type %d: token %zu differs in a step of %d", (int)types[t][0], i / n_embd, (int)n);
            free(got);
        }
        free(whole);
        free(zeros);
        pair_close(&s.p);
    }
}

/* ---- routing --------------------------------------------------------------------------------------------- */

/* Logits in true f32: the same experts as the reference wherever its margin is above f32's own noise, weights to
 * 1e-5, and the same sort. */
static void run_route(int32_t n_experts, int32_t n_embd, int32_t used, bool renormalize) {
    static const int32_t tokens[] = {1, 5, 33, 64, 65, 130, 256, 300, 600};
    enum { MAX = 600 };
    struct model_shape shape = small;
    shape.n_experts = n_experts;
    shape.n_embd = n_embd;
    shape.n_experts_used = used;
    struct moe_limits l = limits_of(MAX);
    struct pair p = pair_open(&shape, &l);
    struct weights norm = pair_norm(&p, n_embd);
    struct weights router = pair_weights(&p, TENSOR_F32, 1, n_experts, n_embd, 1.0f);
    struct bufs h = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, n_embd);
    struct bufs x = pair_bufs(&p, BUF_TOKENS, BUF_INNER, n_embd);
    pair_ready(&p);
    int32_t *ids[2], *first[2];
    float *weights[2];
    for (int i = 0; i < 2; i++) {
        ids[i] = calloc((size_t)(MAX * used), sizeof **ids);
        weights[i] = calloc((size_t)(MAX * used), sizeof **weights);
        first[i] = calloc((size_t)n_experts + 1, sizeof **first);
    }
    for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++) {
        int32_t n = tokens[k];
        pair_fill(&p, &h, n, 3.0f);
        pair_fill(&p, &x, 0, 1.0f);
        pair_begin(&p, 0, n, MOE_ROWS_NONE);
        BOTH(&p, i, pair_ops(&p, i)->route(p.b[i], &(struct op_route){.h = h.b[i],
                                                                     .norm = norm.w[i],
                                                                     .eps = 1e-6f,
                                                                     .router = router.w[i],
                                                                     .renormalize = renormalize,
                                                                     .x = x.b[i]}));
        check("route's x", TENSOR_F32, n_embd, n, pair_error(&p, &x, n));
        BOTH(&p, i, pair_ops(&p, i)->route_read(p.b[i], ids[i], weights[i], first[i]));
        int n_differ = 0;
        for (int32_t j = 0; j < n * used; j++) {
            n_differ += ids[REF][j] != ids[GPU][j];
            assert_float_equal(weights[REF][j], weights[GPU][j], 1e-5f);
        }
        assert_true(n_differ <= n * used / 500);
        if (n_differ == 0)
            assert_memory_equal(first[REF], first[GPU], ((size_t)n_experts + 1) * sizeof **first);
        assert_int_equal(first[GPU][n_experts], n * used);
        pair_end(&p);
    }
    for (int i = 0; i < 2; i++) {
        free(ids[i]);
        free(weights[i]);
        free(first[i]);
    }
    pair_close(&p);
}

static void test_route(void **state) {
    (void)state;
    run_route(128, 2048, 8, true);
    run_route(20, 512, 4, false);
    run_route(500, 256, 12, true);
    run_route(128, 2304, 8, true); /* longer rows than one pass of the kernels takes */
}

/* A token's experts, weights and x, bit for bit, alone and among as many as each kernel takes. */
static void test_route_alone(void **state) {
    (void)state;
    enum { E = 128, D = 2304, K = 8, MAX = 1100 };
    static const int32_t tokens[] = {MAX, 1, 7, 8, 9, 64, 65, 129, 256, 257, 513};
    static int32_t ids[2][MAX * K];
    static float weights[2][MAX * K];
    struct model_shape shape = small;
    shape.n_experts = E;
    shape.n_embd = D;
    shape.n_experts_used = K;
    struct moe_limits l = limits_of(MAX);
    shape.n_ctx_train = l.max_seq_tokens = MAX;
    struct pair p = pair_open(&shape, &l);
    const struct backend_ops *gpu = pair_ops(&p, GPU);
    struct weights norm = pair_norm(&p, D);
    struct weights router = pair_weights(&p, TENSOR_F32, 1, E, D, 1.0f);
    struct bufs h = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, D);
    struct bufs x = pair_bufs(&p, BUF_TOKENS, BUF_INNER, D);
    pair_ready(&p);
    pair_fill(&p, &h, MAX, 3.0f);
    float *rows = pair_read(&p, GPU, &h, MAX), *all = NULL;
    for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++) {
        int32_t n = tokens[k], from = MAX - n;
        assert_int_equal(gpu->buf_write(p.b[GPU], h.b[GPU], 0, n, rows + (size_t)from * D), ST_OK);
        pair_begin(&p, 0, n, MOE_ROWS_NONE);
        const struct op_route op = {.h = h.b[GPU],
                                    .norm = norm.w[GPU],
                                    .eps = 1e-6f,
                                    .router = router.w[GPU],
                                    .renormalize = true,
                                    .x = x.b[GPU]};
        assert_int_equal(gpu->route(p.b[GPU], &op), ST_OK);
        assert_int_equal(gpu->route_read(p.b[GPU], ids[k > 0], weights[k > 0], NULL), ST_OK);
        float *own = pair_read(&p, GPU, &x, n);
        pair_end(&p);
        if (k == 0) {
            all = own;
            continue;
        }
        size_t pairs = (size_t)n * K;
        assert_memory_equal(ids[1], ids[0] + (size_t)from * K, pairs * sizeof *ids[0]);
        assert_memory_equal(weights[1], weights[0] + (size_t)from * K, pairs * sizeof *weights[0]);
        assert_memory_equal(own, all + (size_t)from * D, (size_t)n * D * sizeof *own);
        free(own);
    }
    free(all);
    free(rows);
    pair_close(&p);
}

/* ---- embedding and head ------------------------------------------------------------------------------------- */

/* Embedding rows are the file's numbers, bit for bit; the head's rows are the step's, in order; one matrix is both. */
static void test_embed_and_head(void **state) {
    (void)state;
    for (int t = 0; t < N_TYPES; t++) {
        struct moe_limits l = limits_of(40);
        struct pair p = pair_open(&small, &l);
        struct weights norm = pair_norm(&p, 512);
        struct weights table = pair_weights(&p, all_types[t], 1, small.n_vocab, 512, 1.0f);
        struct bufs h = pair_bufs(&p, BUF_TOKENS, BUF_EXACT, 512);
        struct bufs logits = pair_bufs(&p, BUF_HEAD, BUF_EXACT, small.n_vocab);
        pair_ready(&p);
        for (int32_t n = 1; n <= 40; n += 13) {
            pair_fill(&p, &h, 0, 1.0f);
            pair_fill(&p, &logits, 0, 1.0f);
            pair_begin(&p, 0, n, MOE_ROWS_ALL);
            BOTH(&p, i, pair_ops(&p, i)->embed(
                            p.b[i], &(struct op_embed){.table = table.w[i], .h = h.b[i]}));
            double error = pair_error(&p, &h, n);
            if (all_types[t] == TENSOR_F32) check("embed", all_types[t], 512, n, error);
            else assert_true(error == 0.0);
            BOTH(&p, i, pair_ops(&p, i)->head(p.b[i], &(struct op_head){.h = h.b[i],
                                                                       .norm = norm.w[i],
                                                                       .eps = 1e-6f,
                                                                       .w = table.w[i],
                                                                       .logits = logits.b[i]}));
            check("head", all_types[t], 512, n, pair_error(&p, &logits, n));
            pair_end(&p);
        }
        pair_close(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear_add),  cmocka_unit_test(test_any_step),
        cmocka_unit_test(test_weight_sizes),
        cmocka_unit_test(test_norm_linear), cmocka_unit_test(test_experts),
        cmocka_unit_test(test_group_sizes), cmocka_unit_test(test_experts_any_step),
        cmocka_unit_test(test_route),       cmocka_unit_test(test_route_alone),
        cmocka_unit_test(test_embed_and_head),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
