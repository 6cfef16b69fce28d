/* Ranks elsewhere, without the elsewhere: bodies of frames say what was put in and no more than they hold; a link
 * cuts bytes into frames however they come; a remote engine takes results only for the steps it sent. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/rank_frames.h"
#include "daemon/remote.h"
#include "tests/support.h"

/* ---- bodies --------------------------------------------------------------------------------- */

static void fill(void *p, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++) ((uint8_t *)p)[i] = (uint8_t)(test_random(&seed) % 100);
}

static const struct moe_limits limits = {.max_batch_tokens = 16,
                                         .max_seqs = 4,
                                         .max_rows = 4,
                                         .max_seq_tokens = 64,
                                         .block_tokens = 16,
                                         .n_blocks = 32};

/* One of every body; every field is something. */
struct all {
    struct rank_hello hello;
    struct rank_welcome welcome;
    struct error error;
    uint16_t port;
    struct rank_peers peers;
    struct rank_opened opened;
    struct rank_step_head head;
    struct moe_slot_start start;
    struct moe_step step;
    struct moe_step_seq seqs[4];
    struct rank_result result;
    struct moe_row rows[4];
};
enum { N_BODIES = 8 };

static int32_t ids[16], blocks[16];
static uint64_t load[6];

static void fill_all(struct all *a) {
    fill(a, sizeof *a, 3);
    fill(ids, sizeof ids, 4);
    fill(load, sizeof load, 5);
    snprintf(a->hello.version, sizeof a->hello.version, "1.2.3");
    snprintf(a->hello.kind, sizeof a->hello.kind, "cpu");
    a->welcome.rank = 2;
    a->welcome.n_ranks = 3;
    a->welcome.group = true;
    a->welcome.n_load = 6;
    a->welcome.load = (const uint8_t *)load;
    a->error = (struct error){ST_CONFLICT, "so it is"};
    a->peers.n = 2;
    for (int i = 0; i < 2; i++) snprintf(a->peers.at[i].host, RANK_ADDRESS_BYTES, "host%d", i);
    struct moe_info *info = &a->opened.info;
    info->name[0] = info->architecture[0] = info->backend[0] = info->quantization[0] = '\0';
    a->head = (struct rank_step_head){true, 1};
    struct moe_sampling *p = &a->start.sampling;
    p->n_bias = 3;
    p->n_stop_ids = 2;
    p->logprobs = true;
    p->n_top = 1;
    a->start.ids = ids;
    a->start.n_ids = 7;
    for (int i = 0; i < 4; i++) {
        a->seqs[i].n_tokens = i + 1;
        a->seqs[i].n_blocks = 2;
        a->seqs[i].rows = (enum moe_rows)(i % 3);
        a->rows[i].n_top = i;
        a->rows[i].st = i == 3 ? ST_NUMERIC : ST_OK;
    }
    a->step = (struct moe_step){4, 10, a->seqs, ids, blocks};
    a->result.n_rows = 4;
    a->result.rows = a->rows;
}

static void pass_body(int body, struct pass *p, struct all *a) {
    switch (body) {
    case 0: pass_hello(p, &a->hello); break;
    case 1: pass_welcome(p, &a->welcome); break;
    case 2: pass_error(p, &a->error); break;
    case 3: pass_port(p, &a->port); break;
    case 4: pass_peers(p, &a->peers); break;
    case 5: pass_opened(p, &a->opened); break;
    case 6:
        pass_step_head(p, &a->head);
        pass_start(p, &a->start);
        pass_step(p, &a->step, a->seqs, 4);
        break;
    default: a->result.rows = a->rows; pass_result(p, &a->result, 4);
    }
}

/* Writing what was read gives the same bytes; a body that is cut short or too long is no body. */
static void test_bodies(void **state) {
    (void)state;
    static struct all a, b;
    static _Alignas(16) uint8_t bytes[1 << 16], again[1 << 16];
    fill_all(&a);
    for (int body = 0; body < N_BODIES; body++) {
        struct pass w = pass_writer(bytes, sizeof bytes);
        pass_body(body, &w, &a);
        assert_false(w.bad);
        memset(&b, 0, sizeof b);
        struct pass r = pass_reader(bytes, w.at);
        pass_body(body, &r, &b);
        assert_true(pass_done(&r));
        struct pass w2 = pass_writer(again, sizeof again);
        pass_body(body, &w2, &b);
        assert_int_equal(w2.at, w.at);
        assert_memory_equal(bytes, again, w.at);
        for (size_t n = 0; n <= w.at + 4; n++) {
            if (n == w.at) continue;
            uint8_t *cut = malloc(n > 0 ? n : 1); /* so that a sanitizer sees a read beyond it */
            memcpy(cut, bytes, n);
            r = pass_reader(cut, n);
            pass_body(body, &r, &b);
            assert_false(pass_done(&r));
            free(cut);
            struct pass little = pass_writer(again, n < w.at ? n : w.at);
            pass_body(body, &little, &a);
            assert_int_equal(little.bad, n < w.at);
        }
    }
    assert_string_equal(b.hello.version, "");
    assert_true(a.rows[3].top_ids[2] == b.rows[3].top_ids[2] && b.rows[3].st == ST_NUMERIC);
}

/* Any bytes at all: what is taken holds its promises. */
static void test_any_bytes(void **state) {
    (void)state;
    static struct all a, b;
    static _Alignas(16) uint8_t bytes[1 << 16];
    uint64_t rng = 11;
    fill_all(&a);
    int n_taken = 0;
    for (int i = 0; i < 40000; i++) {
        int body = i % N_BODIES;
        struct pass w = pass_writer(bytes, sizeof bytes);
        pass_body(body, &w, &a);
        for (int k = 1 + (int)(test_random(&rng) % 3); k > 0; k--)
            bytes[test_random(&rng) % w.at] = (uint8_t)test_random(&rng);
        struct pass r = pass_reader(bytes, w.at);
        pass_body(body, &r, &b);
        if (!pass_done(&r)) continue;
        n_taken++;
        int64_t n_tokens = 0;
        for (int32_t s = 0; body == 6 && s < b.step.n_seqs; s++) n_tokens += b.seqs[s].n_tokens;
        if (body == 6) {
            assert_true(b.step.n_seqs <= 4 && b.step.n_tokens == n_tokens);
            assert_true((const uint8_t *)(b.step.ids + n_tokens) <= bytes + w.at);
        }
        if (body == 0) assert_non_null(memchr(b.hello.version, 0, sizeof b.hello.version));
        if (body == 1) assert_true(b.welcome.rank < b.welcome.n_ranks);
        if (body == 2) assert_true(b.error.code < ST_COUNT);
        for (int32_t row = 0; body == 7 && row < b.result.n_rows; row++)
            assert_true(b.rows[row].st < ST_COUNT && b.rows[row].n_top <= MOE_MAX_TOP);
    }
    assert_true(n_taken > 1000);
}

/* ---- links ---------------------------------------------------------------------------------- */

static void open_link(struct rank_link *l, int *raw) {
    int fds[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
    assert_int_equal(rank_link_create(fds[0], 100, l), ST_OK);
    *raw = fds[1];
}

/* A frame: beats come first, and bytes one by one. */
static void test_cut(void **state) {
    (void)state;
    struct rank_link l, sender;
    struct rank_link_frame f;
    struct error e = {0};
    int raw, copied;
    uint8_t stream[256];
    open_link(&sender, &copied);
    assert_int_equal(rank_link_send(&sender, RANK_LINK_BEAT, NULL, 0, &e), ST_OK);
    assert_int_equal(rank_link_send(&sender, RANK_LINK_STEP, "abcdefg", 7, &e), ST_OK);
    assert_int_equal(rank_link_send(&sender, RANK_LINK_BYE, NULL, 0, &e), ST_OK);
    ssize_t n = read(copied, stream, sizeof stream);
    assert_int_equal(n, 3 * RANK_LINK_HEADER_BYTES + 7);
    open_link(&l, &raw);
    int n_frames = 0;
    for (ssize_t i = 0; i < n; i++) {
        assert_int_equal(write(raw, stream + i, 1), 1);
        assert_ok(rank_link_next(&l, 0, &e, &f), &e);
        if (f.type == RANK_LINK_NONE) continue;
        n_frames++;
        assert_int_equal(f.type, n_frames == 1 ? RANK_LINK_STEP : RANK_LINK_BYE);
        if (n_frames == 1) assert_true(f.n == 7 && memcmp(f.body, "abcdefg", 7) == 0);
    }
    assert_int_equal(n_frames, 2);
    close(raw);
    assert_int_equal(rank_link_next(&l, 0, &e, &f), ST_ENGINE_LOST);
    rank_link_close(&l);
    rank_link_close(&sender);
    close(copied);
}

static void test_bad_headers(void **state) {
    (void)state;
    const struct {
        size_t at;
        uint8_t byte;
        enum status want;
    } cases[] = {{0, 'M', ST_OK},        {0, 'X', ST_INVALID}, {4, 9, ST_UNSUPPORTED},
                 {6, 0, ST_INVALID},     {6, 200, ST_INVALID}, {8, 101, ST_INVALID},
                 {11, 0xff, ST_INVALID}, {12, 1, ST_INVALID}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct rank_link l;
        struct rank_link_frame f;
        struct error e = {0};
        int raw;
        uint8_t h[RANK_LINK_HEADER_BYTES] = {'M', 'O', 'E', 'L', RANK_LINK_VERSION, 0, 8};
        h[cases[i].at] = cases[i].byte;
        open_link(&l, &raw);
        assert_int_equal(write(raw, h, sizeof h), sizeof h);
        assert_int_equal(rank_link_next(&l, 0, &e, &f), cases[i].want);
        rank_link_close(&l);
        close(raw);
    }
}

/* ---- a remote engine ------------------------------------------------------------------------ */

enum { SLOT = 2 };

static void answer(int raw, struct rank_link *far, int kind) {
    uint8_t body[1024];
    struct error e = {0};
    struct moe_row rows[2] = {{.slot = SLOT, .token = 7}, {.slot = 1, .token = 7}};
    struct rank_result r = {.n_rows = 1, .rows = rows, .run_ns = 5};
    r.counters.n_steps = 9;
    if (kind == 1) r.n_rows = 2;
    if (kind == 2) rows[0].slot = 3;
    if (kind == 3) rows[0].token = 50;
    if (kind == 4) rows[0].token = -1;
    if (kind == 5) rows[0].st = ST_TIMEOUT;
    struct pass p = pass_writer(body, sizeof body);
    pass_result(&p, &r, 2);
    if (kind == 6) p.at--;
    enum rank_link_type type = kind == 7 ? RANK_LINK_OPENED : RANK_LINK_RESULT;
    if (kind == 8)
        close(raw), far->fd = -1;
    else
        assert_int_equal(rank_link_send(far, type, body, p.at, &e), ST_OK);
}

static void test_results(void **state) {
    (void)state;
    const struct engine_ops *ops = &engine_remote_ops;
    for (int kind = 0; kind < 9; kind++) { /* 0: nothing is wrong */
        struct engine_remote r = {.limits = limits, .shape = {.n_vocab = 50, .n_ctx_train = 64}};
        struct rank_link far;
        struct rank_link_frame f;
        struct error e = {0};
        int raw;
        uint8_t body[1024];
        open_link(&r.link, &raw);
        assert_int_equal(rank_link_room(&r.link, 4096), ST_OK);
        assert_int_equal(rank_link_create(raw, 65536, &far), ST_OK);
        struct rank_opened o = {.info = {.shape = r.shape, .limits = limits}, .depth = 1};
        struct pass p = pass_writer(body, sizeof body);
        pass_opened(&p, &o);
        assert_int_equal(rank_link_send(&far, RANK_LINK_OPENED, body, p.at, &e), ST_OK);
        assert_ok(ops->open(&r, &e), &e);
        assert_int_equal(ops->depth(&r), 1);
        assert_int_equal(ops->fd(&r), r.link.fd);
        assert_int_equal(ops->idle(&r), ST_OK);

        struct moe_slot_start start = {.slot = SLOT, .ids = ids, .n_ids = 3, .n_prompt = 3};
        struct moe_step_seq seq = {SLOT, 0, 3, 1, MOE_ROWS_SAMPLE};
        struct moe_step step = {1, 3, &seq, ids, blocks};
        assert_int_equal(ops->slot_start(&r, &start), ST_OK);
        assert_int_equal(ops->submit(&r, &step), ST_OK);
        assert_ok(rank_link_next(&far, 1000, &e, &f), &e);
        assert_int_equal(f.type, RANK_LINK_STEP);
        assert_true(ops->fd(&r) < 0);
        answer(raw, &far, kind);
        struct moe_row rows[4];
        struct moe_result result = {.rows = rows};
        assert_int_equal(ops->collect(&r, &result), kind == 0 ? ST_OK : ST_ENGINE_LOST);
        if (kind == 0) {
            struct moe_counters c;
            ops->counters(&r, &c);
            assert_true(result.n_rows == 1 && rows[0].token == 7 && c.n_steps == 9);
            assert_int_equal(result.run_ns, 5);
        }
        ops->close(&r);
        if (far.fd >= 0) rank_link_close(&far);
        free(far.room);
    }
}

/* What a rank may not have opened. */
static void test_opened(void **state) {
    (void)state;
    for (int kind = 0; kind < 7; kind++) {
        struct engine_remote r = {.limits = limits, .shape = {.n_vocab = 50, .n_ctx_train = 64}};
        struct rank_link far;
        struct error e = {0};
        int raw;
        uint8_t body[1024];
        open_link(&r.link, &raw);
        assert_int_equal(rank_link_room(&r.link, 4096), ST_OK);
        assert_int_equal(rank_link_create(raw, 64, &far), ST_OK);
        struct rank_opened o = {.info = {.shape = r.shape, .limits = limits}, .depth = 1};
        if (kind == 1) o.info.shape.n_vocab = 51;
        if (kind == 2) o.info.limits.max_seqs = 5;
        if (kind == 3) o.info.limits.n_blocks = 0;
        if (kind == 4) o.info.limits.max_seq_tokens = 65;
        if (kind == 5) o.depth = 3;
        if (kind == 6) o.info.limits.n_blocks = INT32_MAX;
        struct pass p = pass_writer(body, sizeof body);
        pass_opened(&p, &o);
        assert_int_equal(rank_link_send(&far, RANK_LINK_OPENED, body, p.at, &e), ST_OK);
        assert_int_equal(engine_remote_ops.open(&r, &e), kind == 0 ? ST_OK : ST_INVALID);
        engine_remote_ops.close(&r);
        rank_link_close(&far);
    }
}

int main(void) {
    log_set_level(LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bodies),  cmocka_unit_test(test_any_bytes),
        cmocka_unit_test(test_cut),     cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_results), cmocka_unit_test(test_opened),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
