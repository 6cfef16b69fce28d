/* model: what moe_open accepts, refuses and reports; what a step may not be; and a weight that is NaN.
 *
 * Of the bugs that shipped in other servers, these tests see:
 *  - rope base or head width defaulted: a file without the keys is refused, by name.
 *  - a file reaching a path that was not made for it: an unknown architecture is refused, by name.
 *  - a context length ignored: limits in force are the model's, and a step beyond them aborts.
 *  - NaN in one request: its rows alone fail, and the next owner of its blocks is not touched. */
#include "tests/model_rig.h"

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "moe/gguf.h"

static const struct moe_limits small = {
    .max_batch_tokens = 32, .max_seqs = 4, .max_rows = 32, .max_seq_tokens = 64};

static enum status try_open(const char *path, const char *device, const struct moe_limits *l,
                            struct error *e) {
    struct moe *m = NULL;
    struct moe_options o = {.model_path = path, .device = device, .limits = *l, .n_threads = 1};
    enum status st = moe_open(&o, NULL, NULL, e, &m);
    if (st == ST_OK) {
        moe_close(m);
    } else {
        assert_null(m);
        assert_int_equal(e->code, st);
    }
    return st;
}

/* ---- opening ------------------------------------------------------------------------------------- */

static void test_info(void **state) {
    (void)state;
    struct model_rig r = rig_open("reference", 1, &small);
    const struct moe_info *i = r.info;
    assert_string_equal(i->architecture, "qwen3moe");
    assert_string_equal(i->quantization, "Q4_K");
    assert_true(i->name[0] != 0 && strstr(i->backend, "reference") != NULL);
    const struct model_shape *m = &i->shape;
    assert_int_equal(m->n_layers, 6);
    assert_int_equal(m->n_embd, 256);
    assert_int_equal(m->n_heads, 4);
    assert_int_equal(m->n_kv_heads, 1);
    assert_int_equal(m->head_dim, 128);
    assert_int_equal(m->n_experts, 32);
    assert_int_equal(m->n_experts_used, 4);
    assert_int_equal(m->n_ff_expert, 256);
    assert_int_equal(m->n_vocab, 8192);
    assert_int_equal(m->n_ctx_train, 4096);
    assert_true(m->rope_base == 1e6f);
    assert_int_equal(i->eos_id, 8191); /* <|im_end|> */
    assert_int_equal(i->kv_bytes_per_token, 6 * 2 * 128 * sizeof(float));
    struct moe_memory_line lines[16];
    int n = moe_memory(r.m, lines, 16);
    uint64_t weights = 0, kv = 0;
    for (int j = 0; j < n; j++) {
        assert_true(lines[j].n_bytes > 0);
        if (strcmp(lines[j].what, "weights") == 0) weights = lines[j].n_bytes;
        if (strcmp(lines[j].what, "kv") == 0) kv = lines[j].n_bytes;
    }
    assert_int_equal(weights, i->weight_bytes); /* the reference keeps the file's bytes */
    assert_int_equal(kv, i->kv_bytes_per_token * (uint64_t)i->limits.n_blocks * 16);
    assert_int_equal(moe_memory(r.m, lines, 1), 1);
    rig_close(&r);
}

/* The byte table of the fast backend names what moe_info reckons with. */
static void test_memory_cpu(void **state) {
    (void)state;
    struct model_rig r = rig_open("cpu", 1, &small);
    struct moe_memory_line lines[16];
    int n = moe_memory(r.m, lines, 16), n_found = 0;
    for (int j = 0; j < n; j++) {
        if (strcmp(lines[j].what, "weights") == 0) {
            n_found++;
            assert_true(lines[j].n_bytes >= r.info->weight_bytes * 9 / 10);
        } else if (strcmp(lines[j].what, "kv") == 0) {
            n_found++;
            assert_int_equal(lines[j].n_bytes,
                             r.info->kv_bytes_per_token * (uint64_t)r.info->limits.n_blocks * 16);
        }
    }
    assert_int_equal(n_found, 2);
    assert_in_range(r.info->kv_bytes_per_token, 6 * 2 * 128, 6 * 2 * 128 * sizeof(float));
    rig_close(&r);
}

static void test_limits_in_force(void **state) {
    (void)state;
    struct moe_limits l = {.max_batch_tokens = 8, .max_seqs = 8};
    struct model_rig r = rig_open("reference", 1, &l);
    const struct moe_limits *f = &r.info->limits;
    assert_int_equal(f->max_seq_tokens, 4096); /* the model's */
    assert_int_equal(f->block_tokens, 16);
    assert_int_equal(f->max_rows, 8);
    assert_int_equal(f->n_blocks, 8 * 1024 / 16);
    rig_close(&r);
    l.max_seqs = 2; /* a length that nobody chose shrinks to the pool ... */
    r = rig_open("reference", 1, &l);
    f = &r.info->limits;
    assert_int_equal(f->max_seq_tokens, 2048);
    assert_int_equal(f->n_blocks, 2048 / 16);
    rig_close(&r);
    l.max_seq_tokens = 100000; /* ... for a chosen one, clipped to the model's, the pool grows */
    l.block_tokens = 64;
    r = rig_open("reference", 1, &l);
    f = &r.info->limits;
    assert_int_equal(f->max_seq_tokens, 4096);
    assert_int_equal(f->n_blocks, 4096 / 64);
    rig_close(&r);
    l.max_seq_tokens = 100; /* and not more than all slots can use */
    r = rig_open("reference", 1, &l);
    f = &r.info->limits;
    assert_int_equal(f->max_seq_tokens, 100);
    assert_int_equal(f->n_blocks, 2 * 2);
    rig_close(&r);
}

static void test_bad_limits(void **state) {
    (void)state;
    const struct {
        struct moe_limits limits;
        const char *named;
    } cases[] = {
        {{.max_batch_tokens = 0, .max_seqs = 1}, "max_batch_tokens"},
        {{.max_batch_tokens = INT32_MAX, .max_seqs = 1}, "max_batch_tokens"},
        {{.max_batch_tokens = 8, .max_seqs = 0}, "max_seqs"},
        {{.max_batch_tokens = 8, .max_seqs = INT32_MAX}, "max_seqs"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .max_rows = 3}, "max_rows"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .max_seq_tokens = -1}, "max_seq_tokens"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .block_tokens = 24}, "block_tokens"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .block_tokens = -16}, "block_tokens"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .block_tokens = 512}, "block_tokens"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .n_blocks = -1}, "n_blocks"},
        {{.max_batch_tokens = 8, .max_seqs = 4, .n_blocks = INT32_MAX}, "n_blocks"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error e = {0};
        assert_int_equal(try_open(TINY_MODEL, "reference", &cases[i].limits, &e), ST_INVALID);
        if (!strstr(e.text, cases[i].named)) fail_msg("case %zu: %s", i, e.text);
    }
}

static void test_bad_device(void **state) {
    (void)state;
    static const char *const bad[] = {"",        "gpu",   "cuda:",      "cuda:x",
                                      "cuda:1x", "cuda1", "cuda:99999", "cpu:0"};
    struct error e = {0};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(try_open(TINY_MODEL, bad[i], &small, &e), ST_INVALID);
        assert_non_null(strstr(e.text, "cuda:N"));
    }
#ifndef MOED_CUDA
    assert_int_equal(try_open(TINY_MODEL, "cuda:0", &small, &e), ST_UNSUPPORTED);
    assert_non_null(strstr(e.text, "MOED_CUDA"));
#endif
    assert_int_equal(try_open("/nonexistent.gguf", "reference", &small, &e), ST_NOT_FOUND);
}

/* The model with the first `from` in it replaced by `to`, of the same length, in a temporary file. */
static char *patched_model(const char *from, const char *to, size_t n_keep) {
    size_t n;
    uint8_t *p = test_read_file(TINY_MODEL, &n);
    if (from) {
        uint8_t *at = memmem(p, n, from, strlen(from));
        assert_non_null(at);
        assert_int_equal(strlen(from), strlen(to));
        memcpy(at, to, strlen(to));
    }
    char *path = test_write_temp(p, n_keep < n ? n_keep : n);
    free(p);
    return path;
}

static void test_refused_files(void **state) {
    (void)state;
    const struct {
        const char *from, *to;
        const char *named; /* what the error must mention */
    } cases[] = {
        {"qwen3moe.rope.freq_base", "qwen3moe.rope.freq_basX", "rope.freq_base"},
        {"qwen3moe.attention.key_length", "qwen3moe.attention.key_lengtX", "key_length"},
        {"qwen3moe.expert_used_count", "qwen3moe.expert_used_counX", "expert_used_count"},
        {"blk.3.attn_q_norm.weight", "blk.3.attn_X_norm.weight", "blk.3.attn_"},
        {"qwen3moe", "qwen3moX", "qwen3moX"}, /* general.architecture comes first */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error e = {0};
        char *path = patched_model(cases[i].from, cases[i].to, SIZE_MAX);
        assert_int_not_equal(try_open(path, "reference", &small, &e), ST_OK);
        if (!strstr(e.text, cases[i].named)) fail_msg("%s: %s", cases[i].to, e.text);
        unlink(path);
        free(path);
    }
    struct error e = {0};
    char *path = patched_model(NULL, NULL, 20000000);
    assert_int_not_equal(try_open(path, "reference", &small, &e), ST_OK);
    assert_true(e.text[0] != 0);
    unlink(path);
    free(path);
}

struct progress {
    uint64_t done, total, n_calls;
};

static void on_progress(void *ctx, uint64_t done, uint64_t total) {
    struct progress *p = ctx;
    assert_true(done >= p->done && done <= total && total > 0);
    *p = (struct progress){done, total, p->n_calls + 1};
}

static void test_progress(void **state) {
    (void)state;
    struct moe *m;
    struct error e = {0};
    struct progress p = {0};
    struct moe_options o = {.model_path = TINY_MODEL, .device = "reference", .limits = small};
    assert_ok(moe_open(&o, on_progress, &p, &e, &m), &e);
    assert_int_equal(p.done, p.total);
    assert_int_equal(p.total, moe_info(m)->weight_bytes);
    assert_true(p.n_calls > 70);
    moe_close(m);
    moe_close(NULL);
}

/* ---- steps that are programmer's errors -------------------------------------------------------------- */

struct bad_step {
    const char *what;
    struct moe_step_seq seqs[2];
    int32_t n_seqs, n_tokens, id, block;
};

static bool aborts(struct model_rig *r, const struct bad_step *b) {
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(2);
        signal(SIGABRT, SIG_DFL); /* cmocka catches it */
        int32_t ids[64], blocks[64];
        for (int i = 0; i < 64; i++) ids[i] = b->id, blocks[i] = b->block;
        struct moe_step s = {b->n_seqs, b->n_tokens, b->seqs, ids, blocks};
        (void)!moe_submit(r->m, &s);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static void test_bad_steps(void **state) {
    (void)state;
    struct model_rig r = rig_open("reference", 1, &small);
    struct moe_sampling p = rig_greedy();
    int32_t prompt = 1;
    rig_start(&r, 0, &p, &prompt, 1, 1);
    int32_t n_blocks = r.info->limits.n_blocks;
    const struct bad_step good = {"nothing", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, 5, 0};
    assert_false(aborts(&r, &good));
    const struct bad_step cases[] = {
        {"no sequence", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 0, 0, 5, 0},
        {"slot out of range", {{4, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, 5, 0},
        {"slot twice", {{1, 0, 1, 1, MOE_ROWS_NONE}, {1, 1, 1, 1, MOE_ROWS_NONE}}, 2, 2, 5, 0},
        {"tokens do not add up", {{0, 0, 2, 1, MOE_ROWS_NONE}}, 1, 3, 5, 0},
        {"too many tokens", {{0, 0, 33, 3, MOE_ROWS_NONE}}, 1, 33, 5, 0},
        {"beyond the context", {{0, 60, 5, 5, MOE_ROWS_NONE}}, 1, 5, 5, 0},
        {"negative position", {{0, -1, 1, 1, MOE_ROWS_NONE}}, 1, 1, 5, 0},
        {"table too short", {{0, 15, 2, 1, MOE_ROWS_NONE}}, 1, 2, 5, 0},
        {"table too long", {{0, 0, 1, 5, MOE_ROWS_NONE}}, 1, 1, 5, 0},
        {"block out of range", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, 5, n_blocks},
        {"token out of range", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, 8192, 0},
        {"negative token", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, -2, 0},
        {"nothing sampled yet", {{0, 0, 1, 1, MOE_ROWS_NONE}}, 1, 1, MOE_LAST_TOKEN, 0},
        {"slot not started", {{2, 0, 1, 1, MOE_ROWS_SAMPLE}}, 1, 1, 5, 0},
        {"history of another length", {{0, 1, 1, 1, MOE_ROWS_SAMPLE}}, 1, 1, 5, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!aborts(&r, &cases[i])) fail_msg("accepted: %s", cases[i].what);
    /* A third step in flight. */
    int32_t id = 5, block = 0;
    struct moe_step s = {1, 1, good.seqs, &id, &block};
    assert_int_equal(moe_submit(r.m, &s), ST_OK);
    assert_int_equal(moe_submit(r.m, &s), ST_OK);
    assert_true(aborts(&r, &good));
    struct moe_result result = {.rows = r.rows};
    assert_int_equal(moe_collect(r.m, &result), ST_OK);
    assert_int_equal(moe_collect(r.m, &result), ST_OK);
    assert_int_equal(result.n_rows, 0);
    rig_close(&r);
}

/* ---- NaN ------------------------------------------------------------------------------------------------ */

enum { BAD_TOKEN = 4242 };

/* A model whose embedding of BAD_TOKEN is NaN: the scale of its first superblock is. */
static char *nan_model(void) {
    struct gguf *g;
    struct error e = {0};
    assert_ok(gguf_open(TINY_MODEL, false, &e, &g), &e);
    const struct gguf_tensor *t = gguf_tensor_find(g, "token_embd.weight");
    assert_true(t && t->type == TENSOR_Q4_K);
    size_t n, row_bytes = t->n_bytes / (size_t)t->ne[1];
    uint8_t *p = test_read_file(TINY_MODEL, &n);
    uint8_t *scale = p + t->offset + BAD_TOKEN * row_bytes;
    scale[0] = 0x00;
    scale[1] = 0x7e; /* f16 NaN */
    char *path = test_write_temp(p, n);
    free(p);
    gguf_close(g);
    return path;
}

/* Slot 0 holds the bad token (or not), slots 1 and 2 do not; all in one step, then one decode step in which the bad slot,
 * submitted ahead, takes part. rows: [2][3]. */
static void run_three(struct moe *m, bool bad, struct moe_row rows[2][3]) {
    static const int32_t ids[3][3] = {{7, 8, 9}, {388, 475, 271}, {360, 2142, 344}};
    struct moe_sampling p = rig_greedy();
    p.logprobs = true;
    struct moe_step_seq first[3], second[3];
    int32_t step_ids[9], last[3] = {MOE_LAST_TOKEN, MOE_LAST_TOKEN, MOE_LAST_TOKEN};
    const int32_t blocks[3] = {2, 0, 1};
    for (int32_t s = 0; s < 3; s++) {
        memcpy(step_ids + 3 * s, ids[s], sizeof ids[s]);
        if (bad && s == 0) step_ids[1] = BAD_TOKEN;
        struct moe_slot_start start = {
            .slot = s, .sampling = p, .ids = step_ids + 3 * s, .n_ids = 3, .n_prompt = 3};
        assert_int_equal(moe_slot_start(m, &start), ST_OK);
        first[s] = (struct moe_step_seq){s, 0, 3, 1, MOE_ROWS_SAMPLE};
        second[s] = (struct moe_step_seq){s, 3, 1, 1, MOE_ROWS_SAMPLE};
    }
    assert_int_equal(moe_submit(m, &(struct moe_step){3, 9, first, step_ids, blocks}), ST_OK);
    assert_int_equal(moe_submit(m, &(struct moe_step){3, 3, second, last, blocks}), ST_OK);
    for (int i = 0; i < 2; i++) {
        struct moe_result result = {.rows = rows[i]};
        assert_int_equal(moe_collect(m, &result), ST_OK);
        assert_int_equal(result.n_rows, 3);
    }
}

static void test_nan_fails_one_request(void **state) {
    (void)state;
    char *path = nan_model();
    struct moe_limits l = small;
    l.max_rows = 3;
    l.max_seqs = 3;
    struct moe *m;
    struct error e = {0};
    struct moe_options o = {.model_path = path, .device = "reference", .limits = l};
    assert_ok(moe_open(&o, NULL, NULL, &e, &m), &e);
    struct moe_row good[2][3], bad[2][3], again[2][3];
    run_three(m, false, good);
    run_three(m, true, bad);
    run_three(m, false, again); /* in the blocks that now hold NaN */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(bad[i][0].st, ST_NUMERIC);
        assert_int_equal(bad[i][0].token, -1);
        for (int s = 0; s < 3; s++) {
            assert_int_equal(good[i][s].st, ST_OK);
            assert_memory_equal(&good[i][s], &again[i][s], sizeof good[i][s]);
            if (s > 0) assert_memory_equal(&good[i][s], &bad[i][s], sizeof good[i][s]);
        }
    }
    moe_close(m);
    unlink(path);
    free(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_info),
        cmocka_unit_test(test_memory_cpu),
        cmocka_unit_test(test_limits_in_force),
        cmocka_unit_test(test_bad_limits),
        cmocka_unit_test(test_bad_device),
        cmocka_unit_test(test_refused_files),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_bad_steps),
        cmocka_unit_test(test_nan_fails_one_request),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
