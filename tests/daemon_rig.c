/* See daemon_rig.h. */
#include "tests/daemon_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

/* ---- the fake engine ------------------------------------------------------------------------ */

static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t kv_value(uint64_t before, int32_t token) {
    return mix(before * 31 + (uint64_t)token + 1);
}

/* An ordinary token: the ids from 256 on are text, the last few are special. */
static int32_t draw(uint64_t kv, uint64_t seed) {
    return 512 + (int32_t)(mix(kv ^ mix(seed + 7)) % 4096);
}

void fake_answer(const int32_t *prompt, int32_t n_prompt, uint64_t seed, int32_t *out, int32_t n) {
    uint64_t kv = 0;
    for (int32_t i = 0; i < n_prompt; i++) kv = kv_value(kv, prompt[i]);
    for (int32_t i = 0; i < n; i++) {
        out[i] = draw(kv, seed);
        kv = kv_value(kv, out[i]);
    }
}

static enum status fake_slot_start(void *ctx, const struct moe_slot_start *start) {
    struct fake *f = ctx;
    CHECK(start->slot >= 0 && start->slot < f->info.limits.max_seqs && start->n_ids > 0);
    f->slots[start->slot] = (struct fake_slot){.sampling = start->sampling,
                                               .n_known = start->n_ids,
                                               .n_prompt = start->n_prompt,
                                               .first_id = start->ids[0],
                                               .last = start->ids[start->n_ids - 1]};
    return ST_OK;
}

static int32_t scripted(const struct fake *f, const struct fake_slot *slot, int32_t drawn) {
    for (int i = 0, n = atomic_load(&f->n_scripts); i < n; i++) {
        const struct fake_script *s = &f->scripts[i];
        if (s->first_id != slot->first_id) continue;
        int32_t k = slot->n_known - slot->n_prompt;
        return k < s->n ? s->ids[k] : RIG_EOS;
    }
    return drawn;
}

static void sample(struct fake *f, int32_t idx, uint64_t kv, struct moe_row *row) {
    struct fake_slot *slot = &f->slots[idx];
    *row = (struct moe_row){.slot = idx, .token = -1, .st = ST_NUMERIC};
    if (slot->first_id == FAKE_NUMERIC && slot->n_known - slot->n_prompt >= 2) return;
    row->st = ST_OK;
    row->token = scripted(f, slot, draw(kv, slot->sampling.seed));
    if (slot->sampling.logprobs) {
        row->logprob = -(float)(row->token % 64) / 8;
        row->n_top = slot->sampling.n_top;
        for (int32_t i = 0; i < row->n_top; i++) {
            row->top_ids[i] = row->token + i;
            row->top_logprobs[i] = row->logprob - (float)i;
        }
    }
    slot->last = row->token;
    slot->n_known++;
    f->counters.n_sampled++;
}

static enum status fake_submit(void *ctx, const struct moe_step *step) {
    struct fake *f = ctx;
    const struct moe_limits *l = &f->info.limits;
    CHECK(f->n_submitted < f->depth && step->n_tokens <= l->max_batch_tokens);
    struct fake_step *out = &f->steps[(f->first + f->n_submitted++) % MOE_MAX_IN_FLIGHT];
    const int32_t *id = step->ids, *blocks = step->blocks;
    out->n_rows = 0;
    for (int32_t i = 0; i < step->n_seqs; i++) {
        const struct moe_step_seq *s = &step->seqs[i];
        uint64_t kv = 0;
        CHECK(s->n_blocks * l->block_tokens >= s->start_pos + s->n_tokens);
        for (int32_t t = 0, pos = s->start_pos; t < s->n_tokens; t++, pos++, id++) {
            int32_t token = *id == MOE_LAST_TOKEN ? f->slots[s->slot].last : *id;
            int32_t b = l->block_tokens;
            kv = pos == 0 ? 0 : f->kv[blocks[(pos - 1) / b] * b + (pos - 1) % b];
            CHECK(blocks[pos / b] >= 0 && blocks[pos / b] < l->n_blocks);
            kv = kv_value(kv, token);
            f->kv[blocks[pos / b] * b + pos % b] = kv;
        }
        if (s->rows == MOE_ROWS_SAMPLE) sample(f, s->slot, kv, &out->rows[out->n_rows++]);
        blocks += s->n_blocks;
    }
    f->counters.n_steps++;
    f->counters.n_tokens += (uint64_t)step->n_tokens;
    return ST_OK;
}

static enum status fake_collect(void *ctx, struct moe_result *out) {
    struct fake *f = ctx;
    CHECK(f->n_submitted > 0);
    if (atomic_load(&f->gated)) sem_wait(&f->gate);
    int us = atomic_load(&f->step_us);
    if (us > 0) usleep((useconds_t)us);
    int lose = atomic_load(&f->lose_at_step);
    if (lose > 0 && f->counters.n_steps >= (uint64_t)lose) return ST_ENGINE_LOST;
    struct fake_step *step = &f->steps[f->first];
    f->first = (f->first + 1) % MOE_MAX_IN_FLIGHT;
    f->n_submitted--;
    out->n_rows = step->n_rows;
    if (step->n_rows > 0) memcpy(out->rows, step->rows, (size_t)step->n_rows * sizeof *step->rows);
    return ST_OK;
}

static void fake_counters(void *ctx, struct moe_counters *out) {
    *out = ((struct fake *)ctx)->counters;
}

static int fake_depth(void *ctx) { return ((struct fake *)ctx)->depth; }

static const struct engine_ops fake_ops = {.slot_start = fake_slot_start,
                                           .submit = fake_submit,
                                           .collect = fake_collect,
                                           .counters = fake_counters,
                                           .depth = fake_depth};

void fake_add_script(struct rig *r, int32_t first_id, const int32_t *ids, int32_t n) {
    int at = atomic_load(&r->fake.n_scripts);
    CHECK(at < FAKE_SCRIPTS && n <= 64);
    struct fake_script *s = &r->fake.scripts[at];
    s->first_id = first_id;
    s->n = n;
    memcpy(s->ids, ids, (size_t)n * sizeof *ids);
    atomic_store(&r->fake.n_scripts, at + 1);
}

void fake_let(struct rig *r, int n) {
    while (n-- > 0) sem_post(&r->fake.gate);
}

int32_t fake_char(const struct rig *r, char c) {
    int32_t id;
    size_t n;
    enum status st = text_encode(r->text, &c, 1, false, &id, 1, &n);
    if (st != ST_OK || n != 1) fail_msg("no token for '%c'", c);
    return id;
}

/* ---- the daemon ----------------------------------------------------------------------------- */

static int32_t or_default(int32_t v, int32_t fallback) { return v != 0 ? v : fallback; }

static void fake_init(struct fake *f, const struct rig_options *o) {
    f->info = (struct moe_info){
        .name = "fake",
        .architecture = "fake",
        .backend = "fake",
        .quantization = "none",
        .shape = {.n_layers = 2, .n_experts = 8, .n_experts_used = 2, .n_vocab = RIG_VOCAB},
        .limits = {.max_batch_tokens = or_default(o->max_batch_tokens, 64),
                   .max_seqs = or_default(o->max_seqs, 4),
                   .max_rows = or_default(o->max_seqs, 4),
                   .max_seq_tokens = or_default(o->max_seq_tokens, 256),
                   .block_tokens = 16,
                   .n_blocks = or_default(o->n_blocks, 64)},
        .eos_id = RIG_EOS};
    const struct moe_limits *l = &f->info.limits;
    f->depth = or_default(o->depth, 1);
    f->slots = calloc((size_t)l->max_seqs, sizeof *f->slots);
    f->kv = calloc((size_t)l->n_blocks * (size_t)l->block_tokens, sizeof *f->kv);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++)
        f->steps[i].rows = calloc((size_t)l->max_rows, sizeof *f->steps[i].rows);
    sem_init(&f->gate, 0, 0);
}

static void fake_free(struct fake *f) {
    free(f->slots);
    free(f->kv);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) free(f->steps[i].rows);
    sem_destroy(&f->gate);
}

static struct fake *fake_of(struct rig *r, int rank) {
    return rank == 0 ? &r->fake : &r->more[rank - 1];
}

void fake_gate(struct rig *r) {
    for (int i = 0; i < r->n_ranks; i++) atomic_store(&fake_of(r, i)->gated, true);
}

void fake_ungate(struct rig *r) {
    for (int i = 0; i < r->n_ranks; i++) {
        struct fake *f = fake_of(r, i);
        atomic_store(&f->gated, false);
        /* The step that waits, and one that had looked before the store. */
        for (int n = 0; n < 2; n++) sem_post(&f->gate);
    }
}

static void *rig_main(void *ctx) {
    struct rig *r = ctx;
    r->result = server_run(r->server);
    return NULL;
}

void rig_start(struct rig *r, const struct rig_options *o) {
    struct error e = {0};
    memset(r, 0, sizeof *r);
    r->n_ranks = or_default(o->n_ranks, 1);
    struct engine_driver fakes[RIG_MAX_RANKS];
    for (int i = 0; i < r->n_ranks; i++) {
        fakes[i] = (struct engine_driver){&fake_ops, fake_of(r, i)};
        fake_init(fake_of(r, i), o);
    }
    log_set_level(getenv("MOED_TEST_LOG") ? LOG_DEBUG : LOG_ERROR);
    snprintf(r->dir, sizeof r->dir, "/tmp/moed-test-XXXXXX");
    if (!mkdtemp(r->dir)) fail_msg("mkdtemp");
    snprintf(r->endpoint, sizeof r->endpoint, "ipc://%s/moed.sock", r->dir);
    assert_ok(text_open(TINY_MODEL, "chatml", &e, &r->text), &e);
    struct net *net = NULL;
    struct engine *engines[RIG_MAX_RANKS];
    assert_ok(net_open(r->endpoint, &e, &net), &e);
    assert_ok(engine_start(fakes, r->n_ranks, &e, engines), &e);
    struct server_options options = {.text = r->text,
                                     .info = &r->fake.info,
                                     .n_ranks = r->n_ranks,
                                     .lockstep = o->lockstep,
                                     .max_queue = or_default(o->max_queue, 64),
                                     .max_queued_tokens = or_default(o->max_queued_tokens, 10000),
                                     .max_sessions = or_default(o->max_sessions, 64),
                                     .step_ns = (uint64_t)o->step_ms * 1000000u,
                                     .drain_ns = (uint64_t)or_default(o->drain_ms, 5000) * 1000000u,
                                     .stall_ns =
                                         (uint64_t)or_default(o->stall_ms, 30000) * 1000000u};
    assert_ok(server_create(&options, net, engines, &e, &r->server), &e);
    if (pthread_create(&r->thread, NULL, rig_main, r) != 0) fail_msg("pthread_create");
}

enum status rig_join(struct rig *r) {
    pthread_join(r->thread, NULL);
    fake_ungate(r);
    server_destroy(r->server);
    text_close(r->text);
    for (int i = 0; i < r->n_ranks; i++) fake_free(fake_of(r, i));
    /* Succeeds only if the socket and its lock are gone. */
    assert_int_equal(rmdir(r->dir), 0);
    return r->result;
}

enum status rig_stop(struct rig *r) {
    server_stop(r->server);
    return rig_join(r);
}

/* ---- clients -------------------------------------------------------------------------------- */

void peer_open(struct peer *p, const struct rig *r) {
    memset(p, 0, sizeof *p);
    p->ctx = zmq_ctx_new();
    p->sock = zmq_socket(p->ctx, ZMQ_DEALER);
    int zero = 0;
    zmq_setsockopt(p->sock, ZMQ_LINGER, &zero, sizeof zero);
    if (zmq_connect(p->sock, r->endpoint) != 0) fail_msg("zmq_connect");
    p->body = malloc(WIRE_MAX_BODY_BYTES);
    assert_int_equal(arena_create(WIRE_ARENA_BYTES, &p->arena), ST_OK);
    assert_int_equal(arena_create(WIRE_ARENA_BYTES, &p->scratch), ST_OK);
    p->auto_credit = true;
}

void peer_close(struct peer *p) {
    zmq_close(p->sock);
    zmq_ctx_term(p->ctx);
    free(p->body);
    arena_destroy(&p->arena);
    arena_destroy(&p->scratch);
}

void peer_send_frames(struct peer *p, const struct bytes *frames, int n) {
    for (int i = 0; i < n; i++) {
        int flags = i + 1 < n ? ZMQ_SNDMORE : 0;
        if (zmq_send(p->sock, frames[i].p, frames[i].n, flags) < 0) fail_msg("zmq_send");
    }
}

void peer_send(struct peer *p, const struct wire_msg *m) {
    size_t n = 0;
    arena_reset(&p->scratch);
    assert_int_equal(wire_encode(m, &p->scratch, p->body, WIRE_MAX_BODY_BYTES, &n), ST_OK);
    struct wire_header h = {.major = WIRE_MAJOR,
                            .type = (uint16_t)m->type,
                            .body_bytes = (uint32_t)n,
                            .request_id = m->request_id};
    uint8_t header[WIRE_HEADER_BYTES];
    wire_header_encode(&h, header);
    struct bytes frames[] = {{header, sizeof header}, {p->body, n}};
    peer_send_frames(p, frames, 2);
}

bool peer_poll(struct peer *p, int timeout_ms, struct wire_msg *out) {
    struct error e = {0};
    zmq_pollitem_t item = {.socket = p->sock, .events = ZMQ_POLLIN};
    if (zmq_poll(&item, 1, timeout_ms) <= 0) return false;
    uint8_t header[WIRE_HEADER_BYTES];
    struct wire_header h;
    int n = zmq_recv(p->sock, header, sizeof header, 0);
    assert_int_equal(n, WIRE_HEADER_BYTES);
    assert_ok(wire_header_decode(header, (size_t)n, &e, &h), &e);
    n = zmq_recv(p->sock, p->body, WIRE_MAX_BODY_BYTES, 0);
    assert_int_equal(n, h.body_bytes);
    arena_reset(&p->arena);
    assert_ok(wire_decode(&h, p->body, (size_t)n, &p->arena, &e, out), &e);
    if (out->type == WIRE_TOKEN_CHUNK) {
        assert_int_equal(out->chunk.session_seq, p->last_session_seq + 1);
        p->last_session_seq = out->chunk.session_seq;
        if (p->auto_credit) {
            struct wire_msg credit = {.type = WIRE_CREDIT, .credit = {p->last_session_seq}};
            uint8_t small[16], credit_header[WIRE_HEADER_BYTES];
            size_t len = 0;
            arena_reset(&p->scratch);
            assert_int_equal(wire_encode(&credit, &p->scratch, small, sizeof small, &len), ST_OK);
            struct wire_header ch = {
                .major = WIRE_MAJOR, .type = WIRE_CREDIT, .body_bytes = (uint32_t)len};
            wire_header_encode(&ch, credit_header);
            struct bytes frames[] = {{credit_header, sizeof credit_header}, {small, len}};
            peer_send_frames(p, frames, 2);
        }
    }
    return true;
}

void peer_next(struct peer *p, struct wire_msg *out) {
    if (!peer_poll(p, 5000, out)) fail_msg("no message within 5 s");
}

static void expect(const struct wire_msg *m, enum wire_type type, uint64_t request_id) {
    if (m->type == type && m->request_id == request_id) return;
    struct bytes text = {(const uint8_t *)"", 0};
    if (m->type == WIRE_REJECTED) text = m->rejected.text;
    if (m->type == WIRE_FAILED) text = m->failed.text;
    if (m->type == WIRE_GOODBYE) text = m->goodbye.text;
    fail_msg("got %s %llu (%.*s) instead of %s %llu", wire_type_name(m->type),
             (unsigned long long)m->request_id, (int)text.n, (const char *)text.p,
             wire_type_name(type), (unsigned long long)request_id);
}

void peer_expect(struct peer *p, enum wire_type type, uint64_t request_id, struct wire_msg *out) {
    peer_next(p, out);
    expect(out, type, request_id);
}

void peer_expect_after_chunks(struct peer *p, enum wire_type type, uint64_t request_id,
                              struct wire_msg *out) {
    do {
        peer_next(p, out);
    } while (out->type == WIRE_TOKEN_CHUNK);
    expect(out, type, request_id);
}

void peer_hello(struct peer *p) {
    static const uint32_t majors[] = {1};
    struct wire_msg m = {.type = WIRE_HELLO, .hello = {majors, 1, 0, {(const uint8_t *)"test", 4}}};
    peer_send(p, &m);
    peer_expect(p, WIRE_WELCOME, 0, &m);
    memcpy(p->boot_id, m.welcome.boot_id, WIRE_ID_BYTES);
}

void peer_credit(struct peer *p, uint64_t session_seq) {
    struct wire_msg m = {.type = WIRE_CREDIT, .credit = {session_seq}};
    peer_send(p, &m);
}

struct wire_msg submit_ids(uint64_t request_id, const int32_t *ids, size_t n, uint32_t max_tokens) {
    return (struct wire_msg){
        .type = WIRE_SUBMIT,
        .request_id = request_id,
        .submit = {
            .prompt_ids = ids,
            .n_prompt_ids = n,
            .sampling = {.top_p = 1, .repetition_penalty = 1, .has_seed = true, .seed = request_id},
            .has_max_tokens = true,
            .max_tokens = max_tokens,
            .priority = 1,
            .n = 1,
            .parse_special = true}};
}

double peer_stat(struct peer *p, const char *name) {
    static uint64_t next_id = UINT64_C(1) << 60;
    struct wire_msg m = {.type = WIRE_STATS, .request_id = next_id};
    peer_send(p, &m);
    peer_expect_after_chunks(p, WIRE_STATS_RESULT, next_id++, &m);
    for (size_t i = 0; i < m.stats.n_counters; i++) {
        struct bytes b = m.stats.counters[i].name;
        if (b.n == strlen(name) && memcmp(b.p, name, b.n) == 0) return m.stats.counters[i].value;
    }
    fail_msg("Stats has no counter %s", name);
    return 0;
}

void peer_wait_stat(struct peer *p, const char *name, double value) {
    double got = 0;
    for (int i = 0; i < 500; i++) {
        got = peer_stat(p, name);
        if (got == value) return;
        usleep(10000);
    }
    fail_msg("%s is %g and does not become %g", name, got, value);
}

void answer_chunk(struct answer *a, const struct wire_msg *m) {
    const struct wire_token_chunk *c = &m->chunk;
    assert_int_equal(c->seq, a->n_chunks);
    if (a->n_chunks++ == 0) a->hash = WIRE_HASH_START;
    assert_true(utf8_valid(c->text.p, c->text.n));
    assert_true(a->n_ids + (int)c->n_ids <= 1024 && a->n_text + c->text.n < sizeof a->text);
    for (size_t i = 0; i < c->n_ids; i++) {
        a->ids[a->n_ids++] = c->ids[i];
        a->hash = wire_hash_id(a->hash, c->ids[i]);
    }
    if (c->text.n > 0) memcpy(a->text + a->n_text, c->text.p, c->text.n);
    a->n_text += c->text.n;
    a->text[a->n_text] = '\0';
}

void peer_collect(struct peer *p, uint64_t request_id, struct answer *a, struct wire_msg *out) {
    memset(a, 0, sizeof *a);
    a->hash = WIRE_HASH_START;
    for (;;) {
        peer_next(p, out);
        if (out->type != WIRE_TOKEN_CHUNK) break;
        assert_int_equal(out->request_id, request_id);
        answer_chunk(a, out);
    }
    expect(out, WIRE_FINISHED, request_id);
    assert_int_equal(out->finished.n_choices, 1);
    const struct wire_choice *c = &out->finished.choices[0];
    assert_int_equal(c->completion_tokens, a->n_ids);
    assert_int_equal(c->last_seq, a->n_chunks);
    assert_true(c->hash == a->hash);
}
