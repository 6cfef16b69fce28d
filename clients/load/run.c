/* run: the load itself: sessions, arrivals, measuring. See load.h.
 *
 * Closed loop: a request ends, the next is sent. Open loop: requests arrive at random
 * (Poisson) at a given rate, whether the earlier ones are done or not, and are timed from when
 * they should have been sent, so that a server that falls behind cannot hide it by slowing its
 * clients down (coordinated omission). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/load/load.h"

enum { SLICE_MS = 100, DRAIN_MSGS = 256 };

struct flight {
    bool used;
    size_t session;
    uint64_t request_id, number;
    uint64_t intended_ns, last_ns; /* last_ns: the latest chunk with tokens; 0 = none yet */
    struct answer answer;
};

/* ---- sessions -------------------------------------------------------------------------------- */

int load_open(struct load *l) {
    size_t wanted = (size_t)l->o.concurrency;
    struct client *first = connect_or_complain("moed-load", &l->o.endpoint);
    if (!first) return EXIT_CONNECT;
    l->per_session = client_welcome(first)->limits.max_inflight;
    if (l->per_session == 0) l->per_session = 1;
    l->n_clients = (wanted + l->per_session - 1) / l->per_session;
    l->clients = calloc(l->n_clients, sizeof *l->clients);
    l->in_flight = calloc(l->n_clients, sizeof *l->in_flight);
    l->fds = calloc(l->n_clients, sizeof *l->fds);
    l->flights = calloc(wanted, sizeof *l->flights);
    l->kept = calloc((size_t)l->o.verify + 1, sizeof *l->kept);
    l->ids = calloc((size_t)l->o.prompt_tokens + 1, sizeof *l->ids);
    CHECK(l->clients && l->in_flight && l->fds && l->flights && l->kept && l->ids);
    l->n_flights = wanted;
    l->clients[0] = first;
    for (size_t i = 1; i < l->n_clients; i++) {
        l->clients[i] = connect_or_complain("moed-load", &l->o.endpoint);
        if (!l->clients[i]) return EXIT_CONNECT;
    }
    l->result.n_sessions = l->n_clients;
    return EXIT_DONE;
}

void load_close(struct load *l) {
    for (size_t i = 0; i < l->n_flights; i++)
        if (l->flights[i].used) answer_free(&l->flights[i].answer);
    for (size_t i = 0; i < l->n_clients; i++) client_close(l->clients[i]);
    for (size_t i = 0; i < l->n_kept; i++) answer_free(&l->kept[i].answer);
    prompts_close(&l->prompts);
    free(l->clients);
    free(l->in_flight);
    free(l->fds);
    free(l->flights);
    free(l->kept);
    free(l->ids);
    samples_free(&l->result.ttft_ms);
    samples_free(&l->result.itl_ms);
    samples_free(&l->result.e2e_ms);
}

static size_t live_sessions(const struct load *l) {
    size_t n = 0;
    for (size_t i = 0; i < l->n_clients; i++) n += l->clients[i] != NULL;
    return n;
}

/* ---- ends ------------------------------------------------------------------------------------ */

static void note_error(struct load *l, const struct error *e) {
    if (l->result.first_error.code == ST_OK) l->result.first_error = *e;
}

static void end_flight(struct load *l, struct flight *f) {
    answer_free(&f->answer);
    l->in_flight[f->session]--;
    l->n_running--;
    *f = (struct flight){0};
}

static void fail_flight(struct load *l, struct flight *f, const struct error *e) {
    l->result.failed++;
    l->result.failed_by[e->code]++;
    note_error(l, e);
    end_flight(l, f);
}

static void lose_session(struct load *l, size_t session, const struct error *e) {
    for (size_t i = 0; i < l->n_flights; i++)
        if (l->flights[i].used && l->flights[i].session == session)
            fail_flight(l, &l->flights[i], e);
    client_close(l->clients[session]);
    l->clients[session] = NULL;
}

/* Reservoir sampling (Vitter's algorithm R): each finished request is kept with the same chance. */
static void maybe_keep(struct load *l, struct flight *f) {
    if (l->o.verify == 0) return;
    uint64_t seen = l->n_seen++;
    size_t slot = l->n_kept;
    if (l->n_kept < (size_t)l->o.verify) {
        l->n_kept++;
    } else {
        slot = (size_t)(hash_uniform((uint64_t)l->o.seed, UINT64_MAX, seen) * (double)(seen + 1));
        if (slot >= l->n_kept) return;
        answer_free(&l->kept[slot].answer);
    }
    l->kept[slot] = (struct kept_answer){f->number, f->answer};
    f->answer = (struct answer){0};
}

/* Its question and its answer on one line. */
static void show_answer(struct load *l, const struct flight *f) {
    const struct answer_choice *c = &f->answer.choices[0];
    progress_clear(&l->progress);
    bool tty = isatty(STDOUT_FILENO);
    printf("%3llu  %s%s%s  ", (unsigned long long)f->number + 1, tty ? "\033[1m" : "",
           prompts_text(&l->prompts, f->number), tty ? "\033[0m" : "");
    for (size_t i = 0; i < c->n_text; i++) {
        unsigned char b = (unsigned char)c->text[i];
        putchar(b == '\n' ? ' ' : b < 0x20 || b == 0x7f ? '?' : b);
    }
    putchar('\n');
    fflush(stdout);
}

static void finish_flight(struct load *l, struct flight *f, uint64_t now) {
    struct answer *a = &f->answer;
    struct load_result *r = &l->result;
    if (a->rejected) {
        r->rejected++;
        r->rejected_by[a->error.code]++;
        note_error(l, &a->error);
        end_flight(l, f);
        return;
    }
    enum wire_reason reason = a->choices[0].reason;
    if (a->error.code == ST_OK && reason != REASON_STOP && reason != REASON_LENGTH)
        error_set(&a->error, reason == REASON_TIMEOUT ? ST_TIMEOUT : ST_CANCELLED, "ended by %s",
                  wire_reason_name(reason));
    if (a->error.code != ST_OK) {
        struct error e = a->error;
        fail_flight(l, f, &e);
        return;
    }
    r->ok++;
    r->prompt_tokens += a->prompt_tokens;
    r->cached_tokens += a->cached_tokens;
    r->output_tokens += a->completion_tokens;
    r->preemptions += a->preemptions;
    samples_add(&r->e2e_ms, (double)(now - f->intended_ns) / 1e6, 1);
    if (l->o.show_answers) show_answer(l, f);
    maybe_keep(l, f);
    end_flight(l, f);
}

/* ---- messages -------------------------------------------------------------------------------- */

static struct flight *find_flight(struct load *l, size_t session, uint64_t request_id) {
    for (size_t i = 0; i < l->n_flights; i++) {
        struct flight *f = &l->flights[i];
        if (f->used && f->session == session && f->request_id == request_id) return f;
    }
    return NULL;
}

/* The first chunk gives the time to the first token; of a later one with k tokens, each took a
 * k-th of the time since the chunk before. */
static void measure_chunk(struct load *l, struct flight *f, const struct wire_token_chunk *k,
                          uint64_t now) {
    if (k->n_ids == 0) return;
    if (f->last_ns == 0)
        samples_add(&l->result.ttft_ms, (double)(now - f->intended_ns) / 1e6, 1);
    else
        samples_add(&l->result.itl_ms, (double)(now - f->last_ns) / 1e6 / (double)k->n_ids,
                    k->n_ids);
    f->last_ns = now;
}

static void take_message(struct load *l, size_t session, const struct wire_msg *m) {
    uint64_t now = clock_now_ns();
    struct error e;
    struct flight *f = find_flight(l, session, m->request_id);
    if (!f) { /* that flight has ended: the session cannot be trusted */
        error_set(&e, ST_CORRUPT, "a %s came after the request's end", wire_type_name(m->type));
        l->result.broken++;
        note_error(l, &e);
        return;
    }
    if (answer_add(&f->answer, m, &e) != ST_OK) {
        l->result.broken++;
        bool ended = f->answer.ended;
        if (!ended) client_cancel(l->clients[session], f->request_id);
        fail_flight(l, f, &e);
        /* Its other messages would look like strays. */
        if (!ended) lose_session(l, session, &e);
        return;
    }
    if (m->type == WIRE_TOKEN_CHUNK) measure_chunk(l, f, &m->chunk, now);
    if (f->answer.ended) finish_flight(l, f, now);
}

/* Read what is there, up to a bound, so that sending is not starved. True if there may be more. */
static bool drain(struct load *l, size_t session) {
    for (int i = 0; i < DRAIN_MSGS && l->clients[session]; i++) {
        struct wire_msg m;
        struct error e;
        enum status st = client_next(l->clients[session], 0, &e, &m);
        if (st == ST_TIMEOUT) return false;
        if (st == ST_OK)
            take_message(l, session, &m);
        else
            lose_session(l, session, &e);
    }
    return l->clients[session] != NULL;
}

/* ---- sending --------------------------------------------------------------------------------- */

/* The live session with the fewest requests, if one has room. */
static bool choose_session(const struct load *l, size_t *out) {
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < l->n_clients; i++)
        if (l->clients[i] && l->in_flight[i] < l->per_session &&
            (best == SIZE_MAX || l->in_flight[i] < l->in_flight[best]))
            best = i;
    *out = best;
    return best != SIZE_MAX;
}

static bool has_room(const struct load *l, size_t *session) {
    return l->n_running < l->n_flights && choose_session(l, session);
}

static void send_request(struct load *l, size_t session, uint64_t intended_ns) {
    struct flight *f = l->flights;
    while (f->used) f++;
    struct wire_submit submit;
    struct error e;
    *f = (struct flight){.used = true, .session = session, .number = l->result.sent++};
    prompts_get(&l->prompts, f->number, l->ids, &submit);
    f->intended_ns = intended_ns;
    l->in_flight[session]++;
    l->n_running++;
    answer_start(&f->answer, submit.n);
    enum status st = client_submit(l->clients[session], &submit, &e, &f->request_id);
    if (st == ST_OK) return;
    if (st == ST_IO || st == ST_CORRUPT)
        lose_session(l, session, &e);
    else
        fail_flight(l, f, &e);
}

struct arrivals {
    uint64_t start_ns, end_ns; /* end_ns: UINT64_MAX without a duration */
    uint64_t next_ns; /* open loop */
    uint64_t n_drawn;
};

static bool all_sent(const struct load *l, const struct arrivals *a, uint64_t now) {
    if (l->o.requests > 0 && l->result.sent >= (uint64_t)l->o.requests) return true;
    /* In the open loop what should have been sent before the end still is. */
    return l->o.rate > 0 ? a->next_ns >= a->end_ns : now >= a->end_ns;
}

static void draw_next(const struct load *l, struct arrivals *a) {
    double u = hash_uniform((uint64_t)l->o.seed, UINT64_MAX - 1, a->n_drawn++);
    a->next_ns += (uint64_t)(-log(1.0 - u) / l->o.rate * 1e9);
}

/* Send what is due. Returns how long nothing is due, in ms. */
static int send_due(struct load *l, struct arrivals *a) {
    size_t session;
    for (;;) {
        uint64_t now = clock_now_ns();
        if (all_sent(l, a, now)) return SLICE_MS;
        if (l->o.rate > 0 && a->next_ns > now) {
            uint64_t ms =
                (a->next_ns - now) / 1000000u; /* poll counts in ms: wake before, not after */
            return ms < SLICE_MS ? (int)ms : SLICE_MS;
        }
        if (!has_room(l, &session)) return SLICE_MS;
        send_request(l, session, l->o.rate > 0 ? a->next_ns : now);
        if (l->o.rate > 0) draw_next(l, a);
    }
}

static void wait_any(struct load *l, int timeout_ms) {
    nfds_t n = 0;
    for (size_t i = 0; i < l->n_clients; i++)
        if (l->clients[i]) l->fds[n++] = (struct pollfd){client_fd(l->clients[i]), POLLIN, 0};
    poll(l->fds, n, timeout_ms);
}

static void show_progress(struct load *l) {
    const struct load_result *r = &l->result;
    struct progress_now now = {.done = r->ok + r->failed + r->rejected,
                               .failed = r->failed + r->rejected,
                               .running = l->n_running,
                               .tokens = r->ttft_ms.n + r->itl_ms.n};
    progress_update(&l->progress, &now);
}

void load_run(struct load *l) {
    struct arrivals a = {.start_ns = clock_now_ns(), .end_ns = UINT64_MAX};
    if (l->o.duration_s > 0) a.end_ns = a.start_ns + (uint64_t)(l->o.duration_s * 1e9);
    a.next_ns = a.start_ns;
    if (l->o.rate > 0) draw_next(l, &a);
    progress_start(&l->progress, (uint64_t)l->o.requests);
    while (live_sessions(l) > 0 && !interrupted()) {
        int idle_ms = send_due(l, &a);
        if (l->n_running == 0 && all_sent(l, &a, clock_now_ns())) break;
        bool more = false;
        size_t running = l->n_running;
        for (size_t i = 0; i < l->n_clients; i++) more |= l->clients[i] && drain(l, i);
        show_progress(l);
        /* Something ended: in the closed loop its successor is due. */
        if (!more && l->n_running == running) wait_any(l, idle_ms);
    }
    l->result.seconds = (double)(clock_now_ns() - a.start_ns) / 1e9;
    progress_clear(&l->progress);
}

/* ---- verification ---------------------------------------------------------------------------- */

static bool same_ids(const struct answer *a, const struct answer *b) {
    if (a->n_choices != b->n_choices || a->error.code != b->error.code) return false;
    for (uint32_t i = 0; i < a->n_choices; i++) {
        const struct answer_choice *x = &a->choices[i], *y = &b->choices[i];
        if (x->n_ids != y->n_ids || x->reason != y->reason) return false;
        if (x->n_ids > 0 && memcmp(x->ids, y->ids, x->n_ids * sizeof *x->ids) != 0) return false;
    }
    return true;
}

static enum status ask_alone(struct load *l, struct client *c, uint64_t number, struct answer *a,
                             struct error *e) {
    struct wire_submit submit;
    uint64_t id;
    prompts_get(&l->prompts, number, l->ids, &submit);
    answer_start(a, submit.n);
    enum status st = client_submit(c, &submit, e, &id);
    while (st == ST_OK && !a->ended && !interrupted()) {
        struct wire_msg m;
        st = client_next(c, SLICE_MS, e, &m);
        if (st == ST_OK)
            st = answer_add(a, &m, e);
        else if (st == ST_TIMEOUT)
            st = ST_OK;
    }
    return st;
}

void load_verify(struct load *l) {
    struct client *c = NULL;
    for (size_t i = 0; i < l->n_clients && !c; i++) c = l->clients[i];
    for (size_t i = 0; i < l->n_kept && c; i++) {
        struct answer a;
        struct error e;
        enum status st = ask_alone(l, c, l->kept[i].number, &a, &e);
        l->result.verified++;
        if (st != ST_OK)
            note_error(l, &e);
        else if (same_ids(&l->kept[i].answer, &a))
            l->result.verify_same++;
        answer_free(&a);
        if (st != ST_OK) return;
    }
}
