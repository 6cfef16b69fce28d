/* forward: the forward pass over the reference backend against the formulas written out again, in float64, without
 * batches, blocks or experts' groups, on random float32 weights in a shape the bundled model does not have: two KV
 * heads, a head width that is no power of two, a tied output, several sequences in blocks of four. */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "moe/forward.h"

enum { L = 2, D = 20, H = 6, G = 2, HD = 12, E = 7, K = 3, F = 9, V = 40, B = 4, CTX = 16, S = 3 };

static const struct model_shape shape = {.n_layers = L,
                                         .n_embd = D,
                                         .n_heads = H,
                                         .n_kv_heads = G,
                                         .head_dim = HD,
                                         .n_experts = E,
                                         .n_experts_used = K,
                                         .n_ff_expert = F,
                                         .n_vocab = V,
                                         .n_ctx_train = CTX,
                                         .norm_eps = 1e-3f,
                                         .rope_base = 50.0f};

struct matrix {
    int32_t n_experts, n_rows, n_cols;
    float *p;
    struct weight *weight;
};

struct layer {
    struct matrix attn_norm, q, k, v, q_norm, k_norm, out, ffn_norm, router, gate, up, down;
};

struct model {
    struct backend *backend;
    uint64_t rng;
    struct matrix embed, norm;
    struct layer layers[L];
    bool renormalize;
};

static enum status read_matrix(void *ctx, size_t offset, void *dst, size_t n) {
    const struct matrix *m = ctx;
    memcpy(dst, (const uint8_t *)m->p + offset, n);
    return ST_OK;
}

static void make(struct model *m, struct matrix *w, int32_t n_experts, int32_t n_rows,
                 int32_t n_cols) {
    size_t n = (size_t)(n_experts * n_rows * n_cols);
    *w = (struct matrix){n_experts, n_rows, n_cols, malloc(n * sizeof(float)), NULL};
    for (size_t i = 0; i < n; i++) w->p[i] = test_uniform(&m->rng, -1.5f, 1.5f);
    struct weight_source source = {.name = "w",
                                   .type = TENSOR_F32,
                                   .n_experts = n_experts,
                                   .n_rows = n_rows,
                                   .n_cols = n_cols,
                                   .n_bytes = n * sizeof(float),
                                   .read = read_matrix,
                                   .ctx = w};
    struct error e = {0};
    assert_ok(backend_ops_of(m->backend)->weight_load(m->backend, &source, &e, &w->weight), &e);
}

/* ---- the formulas ----------------------------------------------------------------------------------- */

static void norm(const double *x, const struct matrix *w, int n, double *y) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++)
        y[i] = x[i] / sqrt(sum / n + (double)shape.norm_eps) * (double)w->p[i];
}

static void product(const struct matrix *w, int e, const double *x, double *y) {
    for (int o = 0; o < w->n_rows; o++) {
        y[o] = 0;
        for (int i = 0; i < w->n_cols; i++)
            y[o] += (double)w->p[((size_t)e * (size_t)w->n_rows + (size_t)o) * (size_t)w->n_cols +
                                 (size_t)i] *
                    x[i];
    }
}

static void rotate(double *x, int pos) {
    for (int i = 0; i < HD / 2; i++) {
        double angle = pos * pow((double)shape.rope_base, -2.0 * i / HD);
        double a = x[i], b = x[i + HD / 2];
        x[i] = a * cos(angle) - b * sin(angle);
        x[i + HD / 2] = b * cos(angle) + a * sin(angle);
    }
}

static void add_attention(const struct layer *l, double (*h)[D], int n) {
    double q[CTX][H * HD], k[CTX][G * HD], v[CTX][G * HD];
    for (int t = 0; t < n; t++) {
        double x[D];
        norm(h[t], &l->attn_norm, D, x);
        product(&l->q, 0, x, q[t]);
        product(&l->k, 0, x, k[t]);
        product(&l->v, 0, x, v[t]);
        for (int j = 0; j < H; j++) norm(q[t] + j * HD, &l->q_norm, HD, q[t] + j * HD);
        for (int j = 0; j < H; j++) rotate(q[t] + j * HD, t);
        for (int j = 0; j < G; j++) norm(k[t] + j * HD, &l->k_norm, HD, k[t] + j * HD);
        for (int j = 0; j < G; j++) rotate(k[t] + j * HD, t);
    }
    for (int t = 0; t < n; t++) {
        double heads[H * HD] = {0}, y[D];
        for (int j = 0; j < H; j++) {
            int g = j * G / H; /* heads 0 1 2 use KV head 0, heads 3 4 5 use 1 */
            double w[CTX], sum = 0;
            for (int p = 0; p <= t; p++) {
                double score = 0;
                for (int i = 0; i < HD; i++) score += q[t][j * HD + i] * k[p][g * HD + i];
                sum += w[p] = exp(score / sqrt(HD));
            }
            for (int p = 0; p <= t; p++)
                for (int i = 0; i < HD; i++) heads[j * HD + i] += w[p] / sum * v[p][g * HD + i];
        }
        product(&l->out, 0, heads, y);
        for (int i = 0; i < D; i++) h[t][i] += y[i];
    }
}

static void add_experts(const struct model *m, const struct layer *l, double *h) {
    double x[D], p[E], sum = 0, kept = 0;
    bool taken[E] = {false};
    norm(h, &l->ffn_norm, D, x);
    product(&l->router, 0, x, p);
    for (int e = 0; e < E; e++) sum += p[e] = exp(p[e]);
    int order[K];
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
        taken[order[k] = best] = true;
        kept += p[best];
    }
    for (int k = 0; k < K; k++) {
        double gate[F], up[F], y[D];
        product(&l->gate, order[k], x, gate);
        product(&l->up, order[k], x, up);
        for (int i = 0; i < F; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
        product(&l->down, order[k], gate, y);
        for (int i = 0; i < D; i++) h[i] += p[order[k]] / (m->renormalize ? kept : sum) * y[i];
    }
}

static void formulas(const struct model *m, const int32_t *ids, int n, double (*logits)[V]) {
    double h[CTX][D];
    for (int t = 0; t < n; t++)
        for (int i = 0; i < D; i++) h[t][i] = (double)m->embed.p[ids[t] * D + i];
    for (int l = 0; l < L; l++) {
        add_attention(&m->layers[l], h, n);
        for (int t = 0; t < n; t++) add_experts(m, &m->layers[l], h[t]);
    }
    for (int t = 0; t < n; t++) {
        double x[D];
        norm(h[t], &m->norm, D, x);
        product(&m->embed, 0, x, logits[t]);
    }
}

/* ---- the test ----------------------------------------------------------------------------------------- */

static void build(struct model *m, struct forward *f, struct forward_layer *layers) {
    make(m, &m->embed, 1, V, D);
    make(m, &m->norm, 1, 1, D);
    *f = (struct forward){.backend = m->backend,
                          .shape = shape,
                          .renormalize = m->renormalize,
                          .embed = m->embed.weight,
                          .norm = m->norm.weight,
                          .head = m->embed.weight,
                          .layers = layers};
    for (int i = 0; i < L; i++) {
        struct layer *l = &m->layers[i];
        make(m, &l->attn_norm, 1, 1, D);
        make(m, &l->q, 1, H * HD, D);
        make(m, &l->k, 1, G * HD, D);
        make(m, &l->v, 1, G * HD, D);
        make(m, &l->q_norm, 1, 1, HD);
        make(m, &l->k_norm, 1, 1, HD);
        make(m, &l->out, 1, D, H * HD);
        make(m, &l->ffn_norm, 1, 1, D);
        make(m, &l->router, 1, E, D);
        make(m, &l->gate, E, F, D);
        make(m, &l->up, E, F, D);
        make(m, &l->down, E, D, F);
        layers[i] = (struct forward_layer){
            l->attn_norm.weight, l->q.weight,      l->k.weight,   l->v.weight,
            l->q_norm.weight,    l->k_norm.weight, l->out.weight, l->ffn_norm.weight,
            l->router.weight,    l->gate.weight,   l->up.weight,  l->down.weight};
    }
}

static void free_model(struct model *m) {
    free(m->embed.p);
    free(m->norm.p);
    for (int i = 0; i < L; i++) {
        struct matrix *w = &m->layers[i].attn_norm;
        for (size_t j = 0; j < sizeof(struct layer) / sizeof(struct matrix); j++) free(w[j].p);
    }
    backend_ops_of(m->backend)->close(m->backend);
}

/* Feed S sequences of 16, 11 and 5 tokens in steps of mixed chunks and hold every logit against the formulas. */
static void run(struct model *m, struct forward *f) {
    static const int lengths[S] = {16, 11, 5}, chunks[S] = {3, 5, 1};
    static double expected[S][CTX][V];
    const struct backend_ops *ops = backend_ops_of(m->backend);
    int32_t ids[S][CTX], tables[S][CTX / B];
    for (int s = 0; s < S; s++) {
        for (int t = 0; t < lengths[s]; t++) ids[s][t] = (int32_t)(test_random(&m->rng) % V);
        for (int i = 0; i < CTX / B; i++) tables[s][i] = S * CTX / B - 1 - (i * S + s);
        formulas(m, ids[s], lengths[s], expected[s]);
    }
    int done[S] = {0}, n_checked = 0;
    for (;;) {
        struct moe_step_seq seqs[S];
        int32_t step_ids[S * CTX], blocks[S * CTX / B], n_blocks = 0;
        struct moe_step step = {.seqs = seqs, .ids = step_ids, .blocks = blocks};
        for (int s = 0; s < S; s++) {
            int c = lengths[s] - done[s] < chunks[s] ? lengths[s] - done[s] : chunks[s];
            if (c == 0) continue;
            int32_t table = (done[s] + c + B - 1) / B;
            seqs[step.n_seqs++] = (struct moe_step_seq){s, done[s], c, table, MOE_ROWS_ALL};
            for (int i = 0; i < c; i++) step_ids[step.n_tokens++] = ids[s][done[s] + i];
            for (int i = 0; i < table; i++) blocks[n_blocks++] = tables[s][i];
        }
        if (step.n_seqs == 0) break;
        assert_int_equal(forward_step(f, &step, step.n_tokens, NULL), ST_OK);
        struct moe_row rows[S * CTX];
        struct moe_result result = {.rows = rows};
        assert_int_equal(ops->step_collect(m->backend, &result), ST_OK);
        assert_int_equal(result.n_rows, step.n_tokens);
        for (int i = 0, row = 0; i < step.n_seqs; i++) {
            for (int t = 0; t < seqs[i].n_tokens; t++, row++) {
                float logits[V];
                assert_int_equal(ops->buf_read(m->backend, f->logits, row, 1, logits), ST_OK);
                assert_int_equal(rows[row].slot, seqs[i].slot);
                for (int j = 0; j < V; j++)
                    assert_float_equal(logits[j], expected[seqs[i].slot][seqs[i].start_pos + t][j],
                                       1e-4);
                n_checked++;
            }
            done[seqs[i].slot] += seqs[i].n_tokens;
        }
    }
    assert_int_equal(n_checked, 16 + 11 + 5);
}

static void test_against_formulas(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct model m = {.rng = (uint64_t)i, .renormalize = i % 2 == 0};
        struct backend_config c = {.shape = shape,
                                   .limits = {.max_batch_tokens = S * CTX,
                                              .max_seqs = S,
                                              .max_rows = S * CTX,
                                              .max_seq_tokens = CTX,
                                              .block_tokens = B,
                                              .n_blocks = S * CTX / B},
                                   .n_threads = 1,
                                   .cpu_isa = "auto"};
        struct error e = {0};
        assert_ok(backend_reference_open(&c, &e, &m.backend), &e);
        struct forward f;
        struct forward_layer layers[L];
        int32_t n_blocks;
        build(&m, &f, layers);
        assert_int_equal(forward_create_bufs(&f), ST_OK);
        assert_ok(backend_ops_of(m.backend)->ready(m.backend, &e, &n_blocks), &e);
        assert_int_equal(backend_ops_of(m.backend)->kv_poison(m.backend, 0xFF), ST_OK);
        run(&m, &f);
        free_model(&m);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_against_formulas)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
