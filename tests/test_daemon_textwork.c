/* The text worker: every job's result, in order, through a byte ring that wraps; refusals when it
 * is full. */
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/textwork.h"
#include "tests/support.h"

enum { BUDGET = 4096, MAX_INPUT = 1500 };

static struct text *open_text(void) {
    struct text *t = NULL;
    struct error e = {0};
    assert_ok(text_open(TINY_MODEL, "chatml", &e, &t), &e);
    return t;
}

static void wait_result(struct textwork *w, struct text_result *r) {
    while (!textwork_peek(w, r)) {
        struct pollfd p = {.fd = textwork_fd(w), .events = POLLIN};
        assert_int_equal(poll(&p, 1, 10000), 1);
        textwork_clear(w);
    }
}

struct expected {
    enum text_job_kind kind;
    char input[MAX_INPUT];
    size_t n;
    uint64_t id;
};

static void random_words(uint64_t *rng, struct expected *x) {
    x->n = test_random(rng) % MAX_INPUT;
    for (size_t i = 0; i < x->n; i++) x->input[i] = "abcdefg hij\n.9"[test_random(rng) % 14];
}

static void check_result(const struct text *t, const struct expected *x,
                         const struct text_result *r) {
    static int32_t ids[2 * MAX_INPUT];
    char text[2 * MAX_INPUT];
    size_t n;
    struct error e = {0};
    assert_int_equal(r->ticket.request_id, x->id);
    assert_int_equal(r->kind, x->kind);
    if (r->error.code != ST_OK) fail_msg("%s", r->error.text);
    if (x->kind == TEXT_JOB_CHAT) {
        struct text_message m[] = {
            {{(const uint8_t *)"user", 4}, {(const uint8_t *)x->input, x->n / 2}},
            {{(const uint8_t *)"assistant", 9},
             {(const uint8_t *)x->input + x->n / 2, x->n - x->n / 2}}};
        assert_ok(text_chat_encode(t, m, 2, &e, ids, 2 * MAX_INPUT, &n), &e);
    } else {
        assert_int_equal(text_encode(t, x->input, x->n, false, ids, 2 * MAX_INPUT, &n), ST_OK);
    }
    if (x->kind == TEXT_JOB_DETOKENIZE) {
        assert_int_equal(text_decode(t, ids, n, false, true, text, sizeof text, &n), ST_OK);
        assert_int_equal(r->text.n, n);
        if (n > 0) assert_memory_equal(r->text.p, text, n);
    } else {
        assert_int_equal(r->n_ids, n);
        if (n > 0) assert_memory_equal(r->ids, ids, n * sizeof *ids);
    }
}

/* False: the worker has no room for it now. */
static bool give(struct textwork *w, const struct text *t, const struct expected *x) {
    static int32_t ids[MAX_INPUT];
    struct wire_chat chat[] = {
        {{(const uint8_t *)"user", 4}, {(const uint8_t *)x->input, x->n / 2}},
        {{(const uint8_t *)"assistant", 9},
         {(const uint8_t *)x->input + x->n / 2, x->n - x->n / 2}}};
    struct text_job job = {
        .kind = x->kind, .ticket = {.request_id = x->id}, .max_ids = 2 * MAX_INPUT};
    if (x->kind == TEXT_JOB_DETOKENIZE) {
        size_t n;
        assert_int_equal(text_encode(t, x->input, x->n, false, ids, MAX_INPUT, &n), ST_OK);
        job.ids = ids;
        job.n_ids = n;
    } else if (x->kind == TEXT_JOB_CHAT) {
        job.messages = chat;
        job.n_messages = 2;
    } else {
        job.text = (struct bytes){(const uint8_t *)x->input, x->n};
    }
    enum status st = textwork_submit(w, &job);
    assert_true(st == ST_OK || st == ST_OVERLOADED);
    return st == ST_OK;
}

static void test_order_and_wrap(void **state) {
    (void)state;
    enum { N = 600, QUEUE = 64 };
    struct text *t = open_text();
    struct textwork *w = NULL;
    struct text_result r;
    static struct expected queue[QUEUE];
    uint64_t rng = 5;
    int n_given = 0, n_taken = 0, n_refused = 0;
    assert_int_equal(textwork_create(t, BUDGET, &w), ST_OK);
    while (n_taken < N) {
        bool refused = false;
        while (n_given < N && n_given - n_taken < QUEUE && !refused) {
            struct expected *x = &queue[n_given % QUEUE];
            x->kind = (enum text_job_kind)(test_random(&rng) % 3);
            x->id = (uint64_t)n_given;
            random_words(&rng, x);
            refused = !give(w, t, x);
            if (refused)
                n_refused++;
            else
                n_given++;
        }
        if (n_taken == n_given)
            continue; /* refused with nothing waiting: only for a job too large */
        wait_result(w, &r);
        check_result(t, &queue[n_taken % QUEUE], &r);
        textwork_pop(w);
        n_taken++;
    }
    assert_true(n_refused > 0);
    textwork_destroy(w);
    text_close(t);
}

static void test_errors(void **state) {
    (void)state;
    struct text *t = open_text();
    struct textwork *w = NULL;
    struct text_result r;
    assert_int_equal(textwork_create(t, BUDGET, &w), ST_OK);
    struct text_job job = {
        .kind = TEXT_JOB_TEXT, .text = {(const uint8_t *)"one two three four", 18}, .max_ids = 2};
    assert_int_equal(textwork_submit(w, &job), ST_OK);
    wait_result(w, &r);
    assert_int_equal(r.error.code, ST_TOO_LONG);
    assert_true(r.error.text[0] != '\0');
    assert_int_equal(r.n_ids, 0);
    textwork_pop(w);
    job.text = (struct bytes){(const uint8_t *)"\xff", 1};
    assert_int_equal(textwork_submit(w, &job), ST_OK);
    wait_result(w, &r);
    assert_int_equal(r.error.code, ST_INVALID);
    textwork_pop(w);
    struct wire_chat chat = {{(const uint8_t *)"nobody", 6}, {NULL, 0}};
    job = (struct text_job){
        .kind = TEXT_JOB_CHAT, .messages = &chat, .n_messages = 1, .max_ids = 100};
    assert_int_equal(textwork_submit(w, &job), ST_OK);
    wait_result(w, &r);
    assert_int_equal(r.error.code, ST_INVALID);
    textwork_pop(w);
    /* More than the ring ever holds. */
    static uint8_t large[BUDGET + 1];
    job = (struct text_job){.kind = TEXT_JOB_TEXT, .text = {large, sizeof large}, .max_ids = 2};
    assert_int_equal(textwork_submit(w, &job), ST_OVERLOADED);
    textwork_destroy(w);
    text_close(t);
}

static void test_destroy_with_work_waiting(void **state) {
    (void)state;
    struct text *t = open_text();
    for (int n = 0; n < 12; n++) {
        struct textwork *w = NULL;
        assert_int_equal(textwork_create(t, BUDGET, &w), ST_OK);
        struct text_job job = {
            .kind = TEXT_JOB_TEXT, .text = {(const uint8_t *)"some words", 10}, .max_ids = 20};
        for (int i = 0; i < n; i++) assert_int_equal(textwork_submit(w, &job), ST_OK);
        textwork_destroy(w);
    }
    text_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_and_wrap),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_destroy_with_work_waiting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
