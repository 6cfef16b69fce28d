/* Answers: tokens, text, stop rules, choices, log-probabilities, cancellation and deadlines, on a
 * fake engine whose every token is known. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/daemon_rig.h"

static const int32_t prompt[] = {600, 601, 602, 603, 604};
enum { N_PROMPT = 5 };

static void start(struct rig *r, struct peer *p, const struct rig_options *o) {
    rig_start(r, o);
    peer_open(p, r);
    peer_hello(p);
}

static void stop(struct rig *r, struct peer *p) {
    peer_wait_stat(p, "kv_blocks_held", 0);
    assert_true(peer_stat(p, "requests_in_flight") == 0);
    peer_close(p);
    assert_int_equal(rig_stop(r), ST_OK);
}

/* Submit and read to the end. */
static void ask(struct peer *p, const struct wire_msg *submit, struct answer *a,
                struct wire_msg *finished) {
    struct wire_msg m;
    peer_send(p, submit);
    peer_expect(p, WIRE_ACCEPTED, submit->request_id, &m);
    peer_collect(p, submit->request_id, a, finished);
}

static void text_of(const struct rig *r, const int32_t *ids, size_t n, char *dst, size_t cap) {
    size_t len;
    assert_int_equal(text_decode(r->text, ids, n, true, true, dst, cap - 1, &len), ST_OK);
    dst[len] = '\0';
}

/* ---- tokens and text ------------------------------------------------------------------------ */

static void test_answer(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct answer a;
    struct wire_msg m, f;
    int32_t want[40];
    char text[1024];
    start(&r, &p, &(struct rig_options){0});
    m = submit_ids(7, prompt, N_PROMPT, 40);
    ask(&p, &m, &a, &f);
    fake_answer(prompt, N_PROMPT, 7, want, 40);
    assert_int_equal(a.n_ids, 40);
    assert_memory_equal(a.ids, want, sizeof want);
    text_of(&r, want, 40, text, sizeof text);
    assert_string_equal(a.text, text);
    assert_int_equal(f.finished.choices[0].reason, REASON_LENGTH);
    assert_false(f.finished.choices[0].has_stop_id);
    assert_int_equal(f.finished.choices[0].stop.n, 0);
    assert_int_equal(f.finished.prompt_tokens, N_PROMPT);
    assert_int_equal(f.finished.completion_tokens, 40);
    assert_int_equal(f.finished.preemptions, 0);
    assert_true(f.finished.queue_ms >= 0 && f.finished.prefill_ms > 0 && f.finished.decode_ms > 0);
    /* The same seed gives the same answer, another one another. */
    struct answer b;
    m.request_id = 8;
    ask(&p, &m, &b, &f);
    assert_memory_equal(b.ids, a.ids, sizeof want);
    m.submit.sampling.seed = 9;
    ask(&p, &m, &b, &f);
    fake_answer(prompt, N_PROMPT, 9, want, 40);
    assert_memory_equal(b.ids, want, sizeof want);
    assert_memory_not_equal(b.ids, a.ids, sizeof want);
    stop(&r, &p);
}

static void test_prompt_kinds(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct answer a;
    struct wire_msg m, f;
    struct error e;
    int32_t ids[64], want[8];
    size_t n;
    start(&r, &p, &(struct rig_options){0});
    static const char text[] = "What is a mutex?<|im_end|>";
    for (int parse = 0; parse < 2; parse++) {
        assert_int_equal(text_encode(r.text, text, strlen(text), parse, ids, 64, &n), ST_OK);
        m = submit_ids(1, NULL, 0, 8);
        m.submit.prompt_text = (struct bytes){(const uint8_t *)text, strlen(text)};
        m.submit.parse_special = parse;
        ask(&p, &m, &a, &f);
        fake_answer(ids, (int32_t)n, 1, want, 8);
        assert_memory_equal(a.ids, want, sizeof want);
        assert_int_equal(f.finished.prompt_tokens, n);
    }
    struct wire_chat chat[] = {{{(const uint8_t *)"system", 6}, {(const uint8_t *)"Be kind.", 8}},
                               {{(const uint8_t *)"user", 4}, {NULL, 0}},
                               {{(const uint8_t *)"user", 4}, {(const uint8_t *)"hi", 2}}};
    struct text_message messages[3];
    for (int i = 0; i < 3; i++) messages[i] = (struct text_message){chat[i].role, chat[i].content};
    assert_int_equal(text_chat_encode(r.text, messages, 3, &e, ids, 64, &n), ST_OK);
    m = submit_ids(2, NULL, 0, 8);
    m.submit.messages = chat;
    m.submit.n_messages = 3;
    ask(&p, &m, &a, &f);
    fake_answer(ids, (int32_t)n, 2, want, 8);
    assert_memory_equal(a.ids, want, sizeof want);
    stop(&r, &p);
}

/* Many at once on too few blocks: waiting, preemption and steps in flight change no answer. */
static void crowd(int depth) {
    enum { N = 60, LENGTH = 90 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    static struct answer answers[N + 1];
    memset(answers, 0, sizeof answers);
    /* 8 run at once; each needs up to 8 blocks, and there are 40. */
    start(&r, &p,
          &(struct rig_options){
              .max_seqs = 8, .n_blocks = 40, .max_batch_tokens = 24, .depth = depth});
    int32_t ids[30];
    for (int i = 0; i < 30; i++) ids[i] = 700 + i;
    for (uint64_t i = 1; i <= N; i++) {
        ids[0] = 1000 + (int32_t)i;
        m = submit_ids(i, ids, (size_t)(1 + i % 30), LENGTH);
        peer_send(&p, &m);
    }
    int n_accepted = 0, n_finished = 0;
    double preemptions = 0;
    while (n_finished < N) {
        peer_next(&p, &m);
        uint64_t i = m.request_id;
        assert_true(i >= 1 && i <= N);
        if (m.type == WIRE_ACCEPTED) {
            n_accepted++;
        } else if (m.type == WIRE_TOKEN_CHUNK) {
            answer_chunk(&answers[i], &m);
        } else {
            assert_int_equal(m.type, WIRE_FINISHED);
            n_finished++;
            preemptions += m.finished.preemptions;
            int32_t want[LENGTH];
            ids[0] = 1000 + (int32_t)i;
            fake_answer(ids, (int32_t)(1 + i % 30), i, want, LENGTH);
            assert_int_equal(answers[i].n_ids, LENGTH);
            assert_memory_equal(answers[i].ids, want, sizeof want);
            assert_true(m.finished.choices[0].hash == answers[i].hash);
        }
    }
    assert_int_equal(n_accepted, N);
    assert_true(preemptions > 0);
    assert_true(peer_stat(&p, "preemptions") == preemptions);
    assert_true(peer_stat(&p, "tokens_per_step") > 2);
    assert_true(peer_stat(&p, "completion_tokens") == N * LENGTH);
    stop(&r, &p);
}

static void test_crowd(void **state) {
    (void)state;
    crowd(1);
}

static void test_crowd_two_steps_in_flight(void **state) {
    (void)state;
    crowd(2);
}

static void test_choices(void **state) {
    (void)state;
    enum { N = 5, LENGTH = 12 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    static struct answer answers[N];
    memset(answers, 0, sizeof answers);
    start(&r, &p, &(struct rig_options){0}); /* four slots: the fifth choice waits */
    m = submit_ids(3, prompt, N_PROMPT, LENGTH);
    m.submit.n = N;
    m.submit.sampling.seed = 100;
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 3, &m);
    for (;;) {
        peer_next(&p, &m);
        if (m.type != WIRE_TOKEN_CHUNK) break;
        assert_true(m.chunk.choice < N);
        answer_chunk(&answers[m.chunk.choice], &m);
    }
    assert_int_equal(m.type, WIRE_FINISHED);
    assert_int_equal(m.finished.n_choices, N);
    assert_int_equal(m.finished.completion_tokens, N * LENGTH);
    for (uint32_t i = 0; i < N; i++) {
        int32_t want[LENGTH];
        fake_answer(prompt, N_PROMPT, 100 + i, want, LENGTH);
        assert_memory_equal(answers[i].ids, want, sizeof want);
        assert_int_equal(m.finished.choices[i].index, i);
        assert_int_equal(m.finished.choices[i].last_seq, answers[i].n_chunks);
        assert_true(m.finished.choices[i].hash == answers[i].hash);
    }
    stop(&r, &p);
}

static void test_logprobs(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p, &(struct rig_options){0});
    for (uint32_t n_top = 0; n_top <= 20; n_top += 20) {
        m = submit_ids(n_top + 1, prompt, N_PROMPT, 20);
        m.submit.sampling.logprobs = true;
        m.submit.sampling.top_logprobs = n_top;
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, n_top + 1, &m);
        size_t seen = 0;
        for (;;) {
            peer_next(&p, &m);
            if (m.type != WIRE_TOKEN_CHUNK) break;
            assert_int_equal(m.chunk.n_logprobs, m.chunk.n_ids);
            for (size_t i = 0; i < m.chunk.n_ids; i++, seen++) {
                const struct wire_token_logprob *lp = &m.chunk.logprobs[i];
                float want = -(float)(m.chunk.ids[i] % 64) / 8;
                assert_true(lp->logprob == want);
                assert_int_equal(lp->n_top, n_top);
                for (uint32_t k = 0; k < n_top; k++) {
                    assert_int_equal(lp->top[k].token, m.chunk.ids[i] + (int)k);
                    assert_true(lp->top[k].logprob == want - (float)k);
                }
            }
        }
        assert_int_equal(m.type, WIRE_FINISHED);
        assert_int_equal(seen, 20);
    }
    stop(&r, &p);
}

/* ---- stop rules ----------------------------------------------------------------------------- */

static void test_stop_ids(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct answer a;
    struct wire_msg m, f;
    start(&r, &p, &(struct rig_options){0});
    int32_t answer[4] = {700, 701, 702, 703};
    int32_t first[] = {400};
    fake_add_script(&r, 400, answer, 4); /* then the end token, for ever */
    m = submit_ids(1, first, 1, 100);
    ask(&p, &m, &a, &f);
    assert_int_equal(a.n_ids, 4);
    assert_memory_equal(a.ids, answer, sizeof answer);
    assert_int_equal(f.finished.choices[0].reason, REASON_STOP);
    assert_true(f.finished.choices[0].has_stop_id);
    assert_int_equal(f.finished.choices[0].stop_id, RIG_EOS);
    /* The client's own stop id. */
    m.submit.n_stop_ids = 1;
    m.submit.stop_ids[0] = 702;
    ask(&p, &m, &a, &f);
    assert_int_equal(a.n_ids, 2);
    assert_int_equal(f.finished.choices[0].stop_id, 702);
    /* ignore_eos: the end token is a token like others, without text. */
    m = submit_ids(2, first, 1, 6);
    m.submit.ignore_eos = true;
    ask(&p, &m, &a, &f);
    assert_int_equal(a.n_ids, 6);
    assert_int_equal(a.ids[4], RIG_EOS);
    assert_int_equal(f.finished.choices[0].reason, REASON_LENGTH);
    char text[64];
    text_of(&r, answer, 4, text, sizeof text);
    assert_string_equal(a.text, text);
    /* An end token exactly where max_tokens ends is a stop, not a length. */
    m = submit_ids(3, first, 1, 5);
    ask(&p, &m, &a, &f);
    assert_int_equal(f.finished.choices[0].reason, REASON_STOP);
    stop(&r, &p);
}

/* "the cat sat" with stop strings, one token a character: every boundary there is. */
static void test_stop_strings(void **state) {
    (void)state;
    static const struct {
        const char *stop, *second, *want;
        uint32_t min_tokens;
        bool matched;
    } cases[] = {
        {"cat", NULL, "the ", 0, true},
        {"t", NULL, "", 0, true},
        {" sat", NULL, "the cat", 0, true},
        {"the cat sat", NULL, "", 0, true},
        {"catty", NULL, "the cat sat", 0, false},
        {"sat!", NULL, "the cat sat", 0, false}, /* held back to the end, then released */
        {"cat sat", "at", "the c", 0, true}, /* the one that ends first */
        {"dog", "e c", "th", 0, true},
        {"t", NULL, "the ca", 2, true}, /* not before two tokens */
        {"t", NULL, "the cat sa", 8, true},
    };
    struct rig r;
    struct peer p;
    struct answer a;
    struct wire_msg m, f;
    start(&r, &p, &(struct rig_options){0});
    static const char said[] = "the cat sat";
    int32_t ids[16], first[] = {400};
    int n = 0;
    for (const char *c = said; *c; c++) ids[n++] = fake_char(&r, *c);
    fake_add_script(&r, 400, ids, n);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        m = submit_ids(i + 1, first, 1, 100);
        m.submit.stop[0] = (struct bytes){(const uint8_t *)cases[i].stop, strlen(cases[i].stop)};
        m.submit.n_stop = 1;
        if (cases[i].second)
            m.submit.stop[m.submit.n_stop++] =
                (struct bytes){(const uint8_t *)cases[i].second, strlen(cases[i].second)};
        m.submit.min_tokens = cases[i].min_tokens;
        ask(&p, &m, &a, &f);
        assert_string_equal(a.text, cases[i].want);
        const struct wire_choice *c = &f.finished.choices[0];
        assert_int_equal(c->reason, REASON_STOP);
        assert_int_equal(c->has_stop_id, !cases[i].matched);
        assert_int_equal(c->stop.n > 0, cases[i].matched);
        if (cases[i].second)
            assert_memory_equal(c->stop.p, cases[i].second, strlen(cases[i].second));
        else if (cases[i].matched)
            assert_memory_equal(c->stop.p, cases[i].stop, strlen(cases[i].stop));
    }
    /* Held-back text comes out when the length ends the answer. */
    m = submit_ids(50, first, 1, 10);
    m.submit.stop[0] = (struct bytes){(const uint8_t *)"sa!", 3};
    m.submit.n_stop = 1;
    ask(&p, &m, &a, &f);
    assert_string_equal(a.text, "the cat sa");
    assert_int_equal(f.finished.choices[0].reason, REASON_LENGTH);
    stop(&r, &p);
}

/* Characters whose bytes are spread over tokens: no chunk ever ends inside one. */
static void test_whole_characters(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct answer a;
    struct wire_msg m, f;
    start(&r, &p, &(struct rig_options){0});
    static const char said[] = "\xf0\x9f\xa6\x86 \xe2\x82\xac \xf0\x9d\x84\x9e\xc3\xa9";
    int32_t ids[64], first[] = {400};
    size_t n;
    assert_int_equal(text_encode(r.text, said, strlen(said), false, ids, 64, &n), ST_OK);
    assert_true(n > 6); /* rare characters: several tokens each */
    fake_add_script(&r, 400, ids, (int32_t)n);
    m = submit_ids(1, first, 1, 100);
    ask(&p, &m, &a, &f); /* answer_chunk looks at every chunk */
    assert_string_equal(a.text, said);
    assert_int_equal(a.n_ids, n);
    /* Cut inside the first character: what is left of it is replaced. */
    m = submit_ids(2, first, 1, 1);
    ask(&p, &m, &a, &f);
    assert_string_equal(a.text, "\xef\xbf\xbd");
    stop(&r, &p);
}

/* ---- ends ----------------------------------------------------------------------------------- */

static void test_cancel(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m, f;
    struct answer a;
    start(&r, &p, &(struct rig_options){.max_seqs = 1});
    atomic_store(&r.fake.gated, true);
    /* Running, then waiting, then twice, then after its end. */
    m = submit_ids(1, prompt, N_PROMPT, 100);
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 1, &m);
    m = submit_ids(2, prompt, N_PROMPT, 100);
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 2, &m);
    peer_wait_stat(&p, "sequences_running", 1);
    assert_true(peer_stat(&p, "kv_blocks_held") > 0);
    m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = 2};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_FINISHED, 2, &f);
    assert_int_equal(f.finished.choices[0].reason, REASON_CANCELLED);
    assert_int_equal(f.finished.completion_tokens, 0);
    fake_let(&r, 3);
    peer_wait_stat(&p, "steps", 3); /* the fourth is under way */
    m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = 1};
    peer_send(&p, &m);
    peer_expect(&p, WIRE_FINISHED, 1, &f);
    assert_int_equal(f.finished.choices[0].reason, REASON_CANCELLED);
    assert_int_equal(f.finished.completion_tokens, 3);
    assert_true(peer_stat(&p, "kv_blocks_held") == 0);
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACK, 1, &f);
    fake_ungate(&r);
    /* The step that was under way for 1 changes nothing for the next in its slot. */
    m = submit_ids(3, prompt, N_PROMPT, 10);
    ask(&p, &m, &a, &f);
    int32_t want[10];
    fake_answer(prompt, N_PROMPT, 3, want, 10);
    assert_memory_equal(a.ids, want, sizeof want);
    assert_true(peer_stat(&p, "requests_finished_cancelled") == 2);
    stop(&r, &p);
}

/* Cancel right behind Submit, with a prompt that is still with the text worker. */
static void test_cancel_while_tokenizing(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    static char words[200000];
    int n_early = 0; /* cancelled before the text worker was done */
    start(&r, &p, &(struct rig_options){.max_seq_tokens = 200000, .n_blocks = 20000});
    for (size_t i = 0; i < sizeof words; i++) words[i] = "lorem ipsum "[i % 12];
    for (uint64_t i = 1; i <= 20; i++) {
        m = submit_ids(i, NULL, 0, 100000);
        m.submit.prompt_text = (struct bytes){(const uint8_t *)words, sizeof words};
        peer_send(&p, &m);
        m = (struct wire_msg){.type = WIRE_CANCEL, .request_id = i};
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, i, &m);
        n_early += m.accepted.prompt_tokens == 0;
        peer_expect_after_chunks(&p, WIRE_FINISHED, i, &m);
        assert_int_equal(m.finished.choices[0].reason, REASON_CANCELLED);
        /* The id is free again, and the late result of the worker belongs to nobody. */
        m = submit_ids(i, prompt, N_PROMPT, 2);
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, i, &m);
        assert_int_equal(m.accepted.prompt_tokens, N_PROMPT);
        peer_expect_after_chunks(&p, WIRE_FINISHED, i, &m);
        assert_int_equal(m.finished.completion_tokens, 2);
    }
    assert_true(n_early > 0);
    stop(&r, &p);
}

static void test_ttl(void **state) {
    (void)state;
    struct rig r;
    struct peer p;
    struct wire_msg m;
    start(&r, &p, &(struct rig_options){.max_seqs = 1});
    atomic_store(&r.fake.gated, true);
    for (uint64_t i = 1; i <= 2; i++) { /* one runs, one waits: the deadline finds both */
        m = submit_ids(i, prompt, N_PROMPT, 100);
        m.submit.ttl_ms = 30;
        peer_send(&p, &m);
        peer_expect(&p, WIRE_ACCEPTED, i, &m);
    }
    m = submit_ids(3, prompt, N_PROMPT, 4); /* and not the one without */
    peer_send(&p, &m);
    peer_expect(&p, WIRE_ACCEPTED, 3, &m);
    for (int n = 0; n < 2; n++) {
        peer_next(&p, &m);
        assert_int_equal(m.type, WIRE_FINISHED);
        assert_true(m.request_id == 1 || m.request_id == 2);
        assert_int_equal(m.finished.choices[0].reason, REASON_TIMEOUT);
    }
    fake_ungate(&r);
    peer_expect_after_chunks(&p, WIRE_FINISHED, 3, &m);
    assert_int_equal(m.finished.choices[0].reason, REASON_LENGTH);
    assert_true(peer_stat(&p, "requests_finished_timeout") == 2);
    stop(&r, &p);
}

static void test_numeric(void **state) {
    (void)state;
    enum { LENGTH = 50 };
    struct rig r;
    struct peer p;
    struct wire_msg m;
    static struct answer answers[4];
    memset(answers, 0, sizeof answers);
    start(&r, &p, &(struct rig_options){0});
    int32_t bad[] = {FAKE_NUMERIC, 600};
    int32_t good[] = {650, 651};
    for (uint64_t i = 1; i <= 3; i++) {
        m = submit_ids(i, i == 2 ? bad : good, 2, LENGTH);
        m.submit.n = i == 2 ? 2 : 1; /* both of its choices fail, and the request once */
        peer_send(&p, &m);
    }
    int n_failed = 0, n_finished = 0;
    while (n_failed + n_finished < 3) {
        peer_next(&p, &m);
        if (m.type == WIRE_TOKEN_CHUNK && m.request_id != 2)
            answer_chunk(&answers[m.request_id], &m);
        if (m.type == WIRE_FAILED) {
            assert_int_equal(m.request_id, 2);
            assert_int_equal(m.failed.code, ST_NUMERIC);
            assert_false(m.failed.retryable);
            n_failed++;
        }
        if (m.type == WIRE_FINISHED) {
            int32_t want[LENGTH];
            fake_answer(good, 2, m.request_id, want, LENGTH);
            assert_memory_equal(answers[m.request_id].ids, want, sizeof want);
            n_finished++;
        }
    }
    assert_int_equal(n_failed, 1);
    assert_false(peer_poll(&p, 50, &m));
    assert_true(peer_stat(&p, "requests_failed_numeric") == 1);
    stop(&r, &p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answer),
        cmocka_unit_test(test_prompt_kinds),
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_crowd_two_steps_in_flight),
        cmocka_unit_test(test_choices),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_stop_ids),
        cmocka_unit_test(test_stop_strings),
        cmocka_unit_test(test_whole_characters),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_cancel_while_tokenizing),
        cmocka_unit_test(test_ttl),
        cmocka_unit_test(test_numeric),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
