/* What the client programs share: answers held to the protocol's promises, JSON bodies,
 * percentiles, options. */
#include "tests/support.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/common/answer.h"
#include "clients/common/args.h"
#include "clients/common/body.h"
#include "clients/common/samples.h"
#include "clients/common/session.h"

static struct bytes str(const char *s) { return bytes_of(s); }

/* ---- answer ---------------------------------------------------------------------------------- */

static const int32_t ids[] = {5, 6, 7, 8};

static struct wire_msg chunk(uint32_t choice, uint32_t seq, int first, size_t n, const char *text) {
    return (struct wire_msg){
        .type = WIRE_TOKEN_CHUNK,
        .chunk = {.choice = choice, .seq = seq, .ids = ids + first, .n_ids = n, .text = str(text)}};
}

static struct wire_choice ended(uint32_t index, size_t n_ids, uint32_t n_chunks) {
    uint64_t hash = WIRE_HASH_START;
    for (size_t i = 0; i < n_ids; i++) hash = wire_hash_id(hash, ids[i]);
    return (struct wire_choice){.index = index,
                                .reason = REASON_STOP,
                                .completion_tokens = (uint32_t)n_ids,
                                .last_seq = n_chunks,
                                .hash = hash};
}

static struct wire_msg finished(const struct wire_choice *c, size_t n) {
    return (struct wire_msg){
        .type = WIRE_FINISHED,
        .finished = {.choices = c, .n_choices = n, .prompt_tokens = 9, .completion_tokens = 4}};
}

static const struct wire_msg accepted = {.type = WIRE_ACCEPTED, .accepted = {.prompt_tokens = 9}};

static void add(struct answer *a, struct wire_msg m) {
    struct error e;
    enum status st = answer_add(a, &m, &e);
    if (st != ST_OK) fail_msg("%s: %s", status_name(st), e.text);
}

static void refuse(struct answer *a, struct wire_msg m, const char *text) {
    struct error e;
    assert_int_equal(answer_add(a, &m, &e), ST_CORRUPT);
    if (!strstr(e.text, text)) fail_msg("'%s' lacks '%s'", e.text, text);
    answer_free(a);
}

static void test_answer(void **state) {
    (void)state;
    struct answer a;
    answer_start(&a, 2);
    add(&a, accepted);
    add(&a, chunk(1, 0, 0, 1, "x"));
    add(&a, chunk(0, 0, 0, 2, "ab"));
    add(&a, chunk(0, 1, 2, 2, "c"));
    add(&a, chunk(0, 2, 0, 0, "d")); /* text that was held back, without tokens */
    add(&a, finished((struct wire_choice[]){ended(1, 1, 1), ended(0, 4, 3)}, 2));
    assert_true(a.ended);
    assert_int_equal(a.error.code, ST_OK);
    assert_string_equal(a.choices[0].text, "abcd");
    assert_string_equal(a.choices[1].text, "x");
    assert_int_equal(a.choices[0].n_ids, 4);
    assert_int_equal(a.choices[0].ids[3], 8);
    assert_int_equal(a.choices[1].reason, REASON_STOP);
    assert_int_equal(a.prompt_tokens, 9);
    answer_free(&a);
}

static void test_answer_refuses(void **state) {
    (void)state;
    struct answer a;
    answer_start(&a, 1);
    refuse(&a, chunk(0, 0, 0, 1, "x"), "before Accepted");
    answer_start(&a, 1);
    add(&a, accepted);
    refuse(&a, accepted, "twice");
    answer_start(&a, 1);
    add(&a, accepted);
    refuse(&a, chunk(1, 0, 0, 1, "x"), "choice 1");
    answer_start(&a, 1);
    add(&a, accepted);
    refuse(&a, chunk(0, 1, 0, 1, "x"), "missing");
    answer_start(&a, 1);
    add(&a, accepted);
    add(&a, chunk(0, 0, 0, 2, "x"));
    refuse(&a, chunk(0, 0, 0, 2, "x"), "missing");

    struct wire_choice bad[5];
    for (int i = 0; i < 5; i++) bad[i] = ended(0, 2, 1);
    bad[0].hash ^= 1;
    bad[1].last_seq = 2;
    bad[2].completion_tokens = 3;
    bad[3].index = 1;
    static const char *const texts[] = {"hash", "chunks", "tokens", "choice 1 of 1"};
    for (int i = 0; i < 4; i++) {
        answer_start(&a, 1);
        add(&a, accepted);
        add(&a, chunk(0, 0, 0, 2, "x"));
        refuse(&a, finished(&bad[i], 1), texts[i]);
    }
    answer_start(&a, 2);
    add(&a, accepted);
    refuse(&a, finished((struct wire_choice[]){ended(0, 0, 0), ended(0, 0, 0)}, 2), "twice");
    answer_start(&a, 1);
    add(&a, accepted);
    add(&a, finished((struct wire_choice[]){ended(0, 0, 0)}, 1));
    refuse(&a, finished((struct wire_choice[]){ended(0, 0, 0)}, 1), "after the request's end");
    answer_start(&a, 1);
    refuse(&a, (struct wire_msg){.type = WIRE_PONG}, "not about a request");
}

static void test_answer_errors(void **state) {
    (void)state;
    struct answer a;
    answer_start(&a, 1);
    add(&a, (struct wire_msg){.type = WIRE_REJECTED,
                              .rejected = {.code = ST_OVERLOADED,
                                           .text = str("full"),
                                           .retryable = true,
                                           .retry_after_ms = 70}});
    assert_true(a.ended && a.rejected && a.retryable);
    assert_int_equal(a.error.code, ST_OVERLOADED);
    assert_string_equal(a.error.text, "full");
    assert_int_equal(a.retry_after_ms, 70);
    answer_free(&a);
    answer_start(&a, 1);
    add(&a, accepted);
    add(&a, (struct wire_msg){.type = WIRE_FAILED, .failed = {.code = 9999, .text = str("odd")}});
    assert_true(a.ended && !a.rejected && !a.retryable);
    assert_int_equal(a.error.code, ST_INTERNAL); /* a code of a later version */
    answer_free(&a);
}

static void test_answer_logprobs(void **state) {
    (void)state;
    struct wire_top_logprob top[2] = {{11, -0.5f}, {12, -1.5f}};
    struct wire_token_logprob lp[2] = {{-0.25f, top, 2}, {-0.75f, top, 1}};
    struct answer a;
    answer_start(&a, 1);
    add(&a, accepted);
    struct wire_msg m = chunk(0, 0, 0, 2, "ab");
    m.chunk.logprobs = lp;
    m.chunk.n_logprobs = 2;
    add(&a, m);
    m.chunk.seq = 1;
    add(&a, m);
    const struct answer_choice *c = &a.choices[0];
    assert_int_equal(c->n_ids, 4);
    assert_int_equal(c->n_top, 2);
    assert_true(c->logprobs[2] == -0.25f && c->logprobs[3] == -0.75f);
    assert_int_equal(c->top[2 * 2 + 1].token, 12);
    assert_int_equal(c->top[3 * 2 + 1].token, -1); /* fewer alternatives came */
    refuse(&a, chunk(0, 2, 0, 1, "x"), "some have none");
}

/* ---- body ------------------------------------------------------------------------------------ */

static enum status read_body(const char *text, bool chat, struct error *e, struct body *b) {
    json_error_t je;
    json_t *root = json_loads(text, JSON_DECODE_ANY, &je);
    if (!root) fail_msg("%s: %s", text, je.text);
    enum status st = body_read(root, chat, e, b);
    json_decref(root);
    return st;
}

static void test_body_chat(void **state) {
    (void)state;
    struct body b;
    struct error e;
    enum status st =
        read_body("{\"model\":\"m\",\"messages\":[{\"role\":\"system\",\"content\":\"s\"},"
                  "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"one "
                  "\"},{\"type\":\"text\",\"text\":\"two\"}]}],"
                  "\"max_tokens\":7,\"temperature\":0.5,\"top_p\":0.25,\"top_k\":3,\"min_p\":0.125,"
                  "\"seed\":42,\"n\":2,"
                  "\"stop\":[\"x\",\"yy\"],\"stop_token_ids\":[4,5],\"presence_penalty\":1,"
                  "\"frequency_penalty\":-1,"
                  "\"repetition_penalty\":1.5,\"logit_bias\":{\"17\":-100},\"logprobs\":true,\"top_"
                  "logprobs\":2,"
                  "\"min_tokens\":3,\"ignore_eos\":true,\"stream\":false,\"user\":\"u\","
                  "\"metadata\":{\"a\":1},"
                  "\"response_format\":{\"type\":\"text\"},\"tools\":null}",
                  true, &e, &b);
    if (st != ST_OK) fail_msg("%s", e.text);
    const struct wire_submit *s = &b.submit;
    assert_int_equal(s->n_messages, 2);
    assert_int_equal(s->messages[1].content.n, 7);
    assert_memory_equal(s->messages[1].content.p, "one two", 7);
    assert_true(s->has_max_tokens && s->max_tokens == 7 && s->min_tokens == 3 && s->n == 2);
    assert_true(s->sampling.temperature == 0.5f && s->sampling.top_p == 0.25f);
    assert_true(s->sampling.top_k == 3 && s->sampling.min_p == 0.125f);
    assert_true(s->sampling.presence_penalty == 1 && s->sampling.frequency_penalty == -1);
    assert_true(s->sampling.repetition_penalty == 1.5f);
    assert_true(s->sampling.has_seed && s->sampling.seed == 42);
    assert_true(s->sampling.logprobs && s->sampling.top_logprobs == 2 && b.logprobs);
    assert_int_equal(s->sampling.n_bias, 1);
    assert_true(s->sampling.bias[0].token == 17 && s->sampling.bias[0].bias == -100);
    assert_int_equal(s->n_stop, 2);
    assert_memory_equal(s->stop[1].p, "yy", 2);
    assert_true(s->n_stop_ids == 2 && s->stop_ids[1] == 5 && s->ignore_eos);
    body_free(&b);
}

static void test_body_completion(void **state) {
    (void)state;
    struct body b;
    struct error e;
    assert_int_equal(read_body("{\"prompt\":\"hi\",\"stop\":\"z\",\"logprobs\":0}", false, &e, &b),
                     ST_OK);
    assert_memory_equal(b.submit.prompt_text.p, "hi", 2);
    assert_true(b.submit.n_stop == 1 && b.logprobs && b.submit.sampling.top_logprobs == 0);
    assert_true(b.submit.sampling.temperature == 1.0f); /* OpenAI's default */
    assert_false(b.submit.has_max_tokens);
    body_free(&b);
    assert_int_equal(read_body("{\"prompt\":[3,1,2]}", false, &e, &b), ST_OK);
    assert_int_equal(b.submit.n_prompt_ids, 3);
    assert_int_equal(b.submit.prompt_ids[2], 2);
    body_free(&b);
}

static void test_body_refuses(void **state) {
    (void)state;
#define M "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
    static const struct {
        const char *text;
        bool chat;
        enum status st;
        const char *word;
    } cases[] = {
        {"[]", true, ST_INVALID, "object"},
        {"{}", true, ST_INVALID, "messages is missing"},
        {"{}", false, ST_INVALID, "prompt is missing"},
        {"{\"messages\":[]}", true, ST_INVALID, "at least one"},
        {"{\"prompt\":\"x\"}", true, ST_INVALID, "prompt does not belong"},
        {"{" M "}", false, ST_INVALID, "messages does not belong"},
        {"{\"prompt\":[\"a\",\"b\"]}", false, ST_UNSUPPORTED, "several prompts"},
        {"{\"prompt\":[1,-2]}", false, ST_INVALID, "token ids"},
        {"{\"prompt\":\"\"}", false, ST_INVALID, "non-empty"},
        {"{\"messages\":[{\"role\":\"user\"}]}", true, ST_INVALID, "messages[0].content"},
        {"{\"messages\":[{\"content\":\"x\"}]}", true, ST_INVALID, "messages[0].role"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"name\":\"n\"}]}", true,
         ST_UNSUPPORTED, "name"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", true,
         ST_UNSUPPORTED, "only text"},
        {"{" M ",\"tools\":[]}", true, ST_UNSUPPORTED, "tools"},
        {"{" M ",\"best_of\":2}", true, ST_UNSUPPORTED, "best_of"},
        {"{" M ",\"stream\":true}", true, ST_UNSUPPORTED, "stream"},
        {"{" M ",\"response_format\":{\"type\":\"json_object\"}}", true, ST_UNSUPPORTED,
         "response_format"},
        {"{" M ",\"temperature\":-1}", true, ST_INVALID, "temperature"},
        {"{" M ",\"temperature\":\"1\"}", true, ST_INVALID, "temperature"},
        {"{" M ",\"top_p\":0}", true, ST_INVALID, "top_p"},
        {"{" M ",\"max_tokens\":0}", true, ST_INVALID, "max_tokens"},
        {"{" M ",\"max_tokens\":1.5}", true, ST_INVALID, "max_tokens"},
        {"{" M ",\"n\":17}", true, ST_INVALID, "n must"},
        {"{" M ",\"stop\":[\"\"]}", true, ST_INVALID, "stop"},
        {"{" M ",\"logit_bias\":{\"a\":1}}", true, ST_INVALID, "logit_bias"},
        {"{" M ",\"logit_bias\":{\"1\":101}}", true, ST_INVALID, "logit_bias"},
        {"{" M ",\"logprobs\":3}", true, ST_INVALID, "logprobs"},
        {"{" M ",\"top_logprobs\":3}", true, ST_INVALID, "needs logprobs"},
        {"{" M ",\"max_tokens\":2,\"min_tokens\":3}", true, ST_INVALID, "min_tokens"},
        {"{" M ",\"seed\":1.5}", true, ST_INVALID, "seed"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct body b;
        struct error e;
        enum status st = read_body(cases[i].text, cases[i].chat, &e, &b);
        if (st != cases[i].st || !strstr(e.text, cases[i].word))
            fail_msg("%s: %s '%s'", cases[i].text, status_name(st), st == ST_OK ? "" : e.text);
    }
}

/* ---- samples --------------------------------------------------------------------------------- */

static void test_percentiles(void **state) {
    (void)state;
    struct samples s = {0};
    assert_true(samples_percentile(&s, 0.5) == 0);
    for (int i = 100; i >= 1; i--) assert_true(samples_add(&s, i, 1)); /* 1 … 100, backwards */
    assert_true(samples_percentile(&s, 0.50) == 50);
    assert_true(samples_percentile(&s, 0.90) == 90);
    assert_true(samples_percentile(&s, 0.99) == 99);
    assert_true(samples_percentile(&s, 1.0) == 100);
    assert_true(samples_percentile(&s, 0.001) == 1);
    assert_true(samples_percentile(&s, 0.07) == 7);
    assert_true(samples_mean(&s) == 50.5);
    assert_true(samples_add(&s, 1000, 100)); /* half of all values now */
    assert_true(samples_percentile(&s, 0.50) == 100);
    assert_true(samples_percentile(&s, 0.51) == 1000);
    samples_free(&s);
    assert_true(samples_add(&s, 7, 1));
    assert_true(samples_percentile(&s, 0.5) == 7 && samples_percentile(&s, 0.99) == 7);
    samples_free(&s);
    for (int i = 1; i <= 7; i++) samples_add(&s, i, 1);
    assert_true(samples_percentile(&s, 0.5) == 4); /* of seven, the rank is rounded up */
    assert_true(samples_percentile(&s, 0.9) == 7);
    samples_free(&s);
    for (int i = 0; i < 5000; i++) samples_add(&s, i % 10, 1);
    assert_int_equal(s.n, 5000);
    assert_true(samples_percentile(&s, 0.9) == 8);
    samples_free(&s);
}

/* ---- args ------------------------------------------------------------------------------------ */

struct parsed {
    bool flag;
    const char *text;
    int64_t count;
    double real;
    struct arg_list list;
    struct operands rest;
    int code;
    bool go_on;
};

static struct parsed parse(int argc, char **argv) {
    struct parsed p = {.count = -7, .real = 0.5};
    const struct arg args[] = {
        {ARG_SECTION, .help = "All"},
        {ARG_FLAG, "flag", 'f', NULL, &p.flag, 0, 0, "a flag"},
        {ARG_STRING, "text", 't', "TEXT", &p.text, 0, 0, "a text"},
        {ARG_INT, "count", 'c', "N", &p.count, 1, 10, "a count"},
        {ARG_REAL, "real", 0, "X", &p.real, 0, 1, "a number"},
        {ARG_LIST, "item", 'i', "X", &p.list, 0, 0, "items"},
    };
    const struct command c = {.name = "test",
                              .summary = "Test.",
                              .args = args,
                              .n_args = sizeof args / sizeof *args,
                              .rest = &p.rest};
    p.go_on = args_parse(&c, argc, argv, &p.code);
    return p;
}

static void test_args(void **state) {
    (void)state;
    struct parsed p = parse(
        10, (char *[]){"test", "-f", "one", "--text=a=b", "-c3", "--item", "x", "-i", "y", "two"});
    assert_true(p.go_on && p.flag && p.count == 3 && p.real == 0.5);
    assert_string_equal(p.text, "a=b");
    assert_int_equal(p.list.n, 2);
    assert_string_equal(p.list.items[1], "y");
    assert_int_equal(p.rest.n, 2);
    p = parse(4, (char *[]){"test", "--", "-f", "-"});
    assert_true(p.go_on && !p.flag && p.rest.n == 2);

    static char *bad[][3] = {
        {"test", "--count", "0"},  {"test", "--count", "11"},  {"test", "--count", "x"},
        {"test", "--count", "2x"}, {"test", "--count", ""},    {"test", "--real", "nan"},
        {"test", "--real", "1.1"}, {"test", "--nothing", "1"}, {"test", "--flag=1", "x"},
        {"test", "x", "--text"},   {"test", "x", "-q"},        {"test", "x", "--cou"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        p = parse(3, bad[i]);
        if (p.go_on || p.code != EXIT_USAGE) fail_msg("%s %s was taken", bad[i][1], bad[i][2]);
    }
}

static void test_http_status(void **state) {
    (void)state;
    static const struct {
        enum status st;
        int http;
    } cases[] = {
        {ST_INVALID, 400},   {ST_TOO_LONG, 400}, {ST_UNSUPPORTED, 400},   {ST_DENIED, 403},
        {ST_NOT_FOUND, 404}, {ST_CONFLICT, 409}, {ST_TOO_LARGE, 413},     {ST_QUOTA, 429},
        {ST_NUMERIC, 500},   {ST_INTERNAL, 500}, {ST_UNIMPLEMENTED, 501}, {ST_OVERLOADED, 503},
        {ST_DRAINING, 503},  {ST_LOADING, 503},  {ST_ENGINE_LOST, 503},   {ST_TIMEOUT, 504}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(http_status(cases[i].st), cases[i].http);
}

static void *interrupt_later(void *thread) {
    struct timespec moment = {0, 20000000};
    nanosleep(&moment, NULL);
    pthread_kill(*(pthread_t *)thread, SIGINT);
    return NULL;
}

/* Nobody types anything: an interrupt ends the wait, be it there already or come later, and is gone then. */
static void test_await_input(void **state) {
    (void)state;
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    catch_interrupt();
    alarm(60); /* a wait that misses the interrupt would be for ever */
    raise(SIGINT);
    assert_false(await_input(ends[0]));
    assert_false(interrupted());
    pthread_t self = pthread_self(), other;
    assert_int_equal(pthread_create(&other, NULL, interrupt_later, &self), 0);
    assert_false(await_input(ends[0]));
    pthread_join(other, NULL);
    assert_int_equal(write(ends[1], "a", 1), 1);
    assert_true(await_input(ends[0]));
    char c;
    assert_int_equal(read(ends[0], &c, 1), 1);
    close(ends[1]);
    assert_true(await_input(ends[0])); /* its end */
    alarm(0);
    close(ends[0]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answer),        cmocka_unit_test(test_answer_refuses),
        cmocka_unit_test(test_answer_errors), cmocka_unit_test(test_answer_logprobs),
        cmocka_unit_test(test_body_chat),     cmocka_unit_test(test_body_completion),
        cmocka_unit_test(test_body_refuses),  cmocka_unit_test(test_percentiles),
        cmocka_unit_test(test_args),          cmocka_unit_test(test_http_status),
        cmocka_unit_test(test_await_input),
    };
    return cmocka_run_group_tests_name("client_common", tests, NULL, NULL);
}
