/* moed-cli batch: a file of requests, many in flight, resumable. See batch.h for the promise. */
#include "clients/cli/batch.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/cli.h"
#include "clients/common/progress.h"

enum {
    SLICE_MS = 100, /* how often an interrupt is looked for */
    SLICE_MSGS = 512, /* and after how many messages */
    FIRST_RETRY_MS = 100,
    LAST_RETRY_MS = 10000
};

enum job_state { JOB_FREE, JOB_WAITING, JOB_RUNNING };

/* A request between its input and its output line. */
struct job {
    enum job_state state;
    size_t line;
    struct batch_request request;
    struct answer answer;
    uint64_t request_id;
    uint64_t due_ns; /* WAITING: not before */
    int attempts;
};

struct batch {
    struct endpoint_options endpoint;
    const char *in_path, *out_path;
    int64_t concurrency, retries, priority;
    struct batch_input in;
    struct batch_output out;
    struct client *client;
    struct token_names names;
    struct job *jobs;
    size_t n_jobs, next_line, n_todo, n_at_start;
    struct progress progress;
    struct progress_now now; /* of this run */
};

/* ---- ends of a job --------------------------------------------------------------------------- */

static bool finish_job(struct batch *b, struct job *j, json_t *result, bool failed) {
    bool good = result && batch_output_write(&b->out, result);
    json_decref(result);
    b->in.lines[j->line].state = LINE_DONE;
    b->now.done++;
    b->now.failed += failed;
    b->out.n_failed += failed;
    answer_free(&j->answer);
    batch_request_free(&j->request);
    *j = (struct job){0};
    return good;
}

static bool fail_job(struct batch *b, struct job *j, const struct error *e) {
    return finish_job(b, j, batch_error(j->request.custom_id, e), true);
}

/* Wait before the next attempt: what the server says, else doubling; 20 % to and fro, so that
 * many clients that were turned away together do not come back together. */
static void put_off(struct job *j, uint32_t retry_after_ms) {
    uint64_t ms = retry_after_ms;
    if (ms == 0) ms = (uint64_t)FIRST_RETRY_MS << (j->attempts < 8 ? j->attempts : 8);
    if (ms > LAST_RETRY_MS) ms = LAST_RETRY_MS;
    uint32_t r;
    random_bytes(&r, sizeof r);
    uint64_t ns = ms * 800000u + ms * 400000u / 1000u * (r % 1000u);
    j->due_ns = clock_now_ns() + ns;
    j->state = JOB_WAITING;
    j->attempts++;
}

static bool end_job(struct batch *b, struct job *j) {
    struct answer *a = &j->answer;
    if (a->error.code == ST_OK)
        return finish_job(b, j, batch_result(b->client, &b->names, &j->request, a), false);
    if (!a->retryable || j->attempts >= b->retries) return fail_job(b, j, &a->error);
    uint32_t after_ms = a->retry_after_ms;
    answer_free(a);
    put_off(j, after_ms);
    return true;
}

/* ---- running --------------------------------------------------------------------------------- */

/* Put the next line that is to be done into a free job. False: the files are unusable. */
static bool fill_job(struct batch *b, struct job *j) {
    while (j->state == JOB_FREE && b->next_line < b->in.n_lines) {
        size_t i = b->next_line++;
        if (b->in.lines[i].state == LINE_DONE) continue;
        *j = (struct job){.state = JOB_WAITING, .line = i};
        if (!batch_input_read(&b->in, i, &j->request)) return false;
        if (j->request.error.code != ST_OK) {
            struct error e = j->request.error;
            if (!fail_job(b, j, &e)) return false;
        }
    }
    return true;
}

static enum status send_job(struct batch *b, struct job *j, struct error *e) {
    struct wire_submit *s = &j->request.body.submit;
    s->priority = (uint32_t)b->priority;
    enum status st = client_submit(b->client, s, e, &j->request_id);
    if (st == ST_TIMEOUT) {
        put_off(j, 0);
        return ST_OK;
    }
    if (st == ST_TOO_LARGE) return fail_job(b, j, e) ? ST_OK : ST_INTERNAL;
    if (st != ST_OK) return st;
    answer_start(&j->answer, s->n);
    j->state = JOB_RUNNING;
    return ST_OK;
}

/* Fill and send what may be sent; *wake_ns: when the next waiting job is due. */
static enum status send_due(struct batch *b, uint64_t *wake_ns, struct error *e) {
    uint64_t now = clock_now_ns();
    *wake_ns = UINT64_MAX;
    b->now.running = 0;
    for (size_t i = 0; i < b->n_jobs; i++) {
        struct job *j = &b->jobs[i];
        if (!fill_job(b, j)) return ST_INTERNAL;
        if (j->state == JOB_WAITING && j->due_ns <= now) {
            enum status st = send_job(b, j, e);
            if (st != ST_OK) return st;
        }
        if (j->state == JOB_WAITING && j->due_ns < *wake_ns) *wake_ns = j->due_ns;
        if (j->state == JOB_RUNNING) b->now.running++;
    }
    return ST_OK;
}

static enum status take_message(struct batch *b, const struct wire_msg *m, struct error *e) {
    for (size_t i = 0; i < b->n_jobs; i++) {
        struct job *j = &b->jobs[i];
        if (j->state != JOB_RUNNING || j->request_id != m->request_id) continue;
        if (m->type == WIRE_TOKEN_CHUNK) b->now.tokens += m->chunk.n_ids;
        enum status st = answer_add(&j->answer, m, e);
        if (st == ST_OK && j->answer.ended && !end_job(b, j)) return ST_INTERNAL;
        return st;
    }
    return error_set(e, ST_CORRUPT, "a message came after its request's end");
}

static int until_ms(uint64_t wake_ns) {
    uint64_t now = clock_now_ns();
    if (wake_ns <= now) return 0;
    uint64_t ms = (wake_ns - now) / 1000000u + 1;
    return ms < SLICE_MS ? (int)ms : SLICE_MS;
}

/* ST_OK: all done. ST_CANCELLED: interrupted. ST_INTERNAL: a complaint about the files was
 * printed. Else what the session said. */
static enum status work(struct batch *b, struct error *e) {
    while (b->now.done < b->n_todo) {
        uint64_t wake_ns;
        struct wire_msg m;
        enum status st = send_due(b, &wake_ns, e);
        if (st != ST_OK) return st;
        if (b->now.done == b->n_todo) break;
        int timeout_ms = until_ms(wake_ns);
        for (int i = 0; i < SLICE_MSGS; i++, timeout_ms = 0) {
            st = client_next(b->client, timeout_ms, e, &m);
            if (st == ST_OK) st = take_message(b, &m, e);
            if (st != ST_OK) break;
        }
        if (st != ST_OK && st != ST_TIMEOUT) return st;
        progress_update(&b->progress, &b->now);
        if (!batch_output_sync(&b->out, false)) return ST_INTERNAL;
        if (interrupted()) return error_set(e, ST_CANCELLED, "interrupted");
    }
    return ST_OK;
}

static int report(struct batch *b, enum status st, const struct error *e) {
    const char *name = "moed-cli batch";
    char t[32];
    double seconds = progress_update(&b->progress, &b->now);
    progress_clear(&b->progress);
    if (st != ST_OK && st != ST_INTERNAL) fprintf(stderr, "%s: %s\n", name, e->text);
    fprintf(stderr, "%s: %zu of %zu requests done, %zu of them with an error; %llu tokens in %s\n",
            name, b->out.n_done, b->in.n_lines, b->out.n_failed, (unsigned long long)b->now.tokens,
            format_seconds(seconds, t, sizeof t));
    if (st != ST_OK) {
        fprintf(stderr, "%s: the same command goes on where this stopped\n", name);
        return st == ST_CANCELLED || st == ST_INTERNAL ? EXIT_FAILED : EXIT_CONNECT;
    }
    return b->out.n_failed > 0 ? EXIT_FAILED : EXIT_DONE;
}

static size_t choose_jobs(const struct batch *b) {
    size_t limit = client_welcome(b->client)->limits.max_inflight;
    if (limit == 0) limit = 1;
    if (b->concurrency == 0) return limit;
    if ((size_t)b->concurrency <= limit) return (size_t)b->concurrency;
    fprintf(stderr, "moed-cli batch: the daemon takes %zu requests at once\n", limit);
    return limit;
}

static int run_files(struct batch *b) {
    struct error e = {0};
    b->n_todo = b->in.n_lines - b->out.n_done;
    if (b->out.n_done > 0)
        fprintf(stderr, "moed-cli batch: %zu of %zu are done already\n", b->out.n_done,
                b->in.n_lines);
    if (b->n_todo > 0) {
        b->client = connect_or_complain("moed-cli batch", &b->endpoint);
        if (!b->client) return EXIT_CONNECT;
        b->n_jobs = choose_jobs(b);
        b->jobs = calloc(b->n_jobs, sizeof *b->jobs);
        CHECK(b->jobs);
    }
    progress_start(&b->progress, b->n_todo);
    catch_interrupt();
    enum status st = work(b, &e);
    if (!batch_output_sync(&b->out, true)) st = ST_INTERNAL;
    int code = report(b, st, &e);
    for (size_t i = 0; i < b->n_jobs; i++) {
        answer_free(&b->jobs[i].answer);
        batch_request_free(&b->jobs[i].request);
    }
    free(b->jobs);
    client_close(b->client);
    token_names_free(&b->names);
    return code;
}

static const char batch_summary[] =
    "Answer a file of requests in OpenAI's batch format: each line has custom_id, method POST,\n"
    "url (/v1/chat/completions or /v1/completions) and body. The whole input is checked before\n"
    "anything is sent: a line that is not JSON or has no custom_id of its own stops the run; a\n"
    "request that cannot be served gets a result that says why.";

static const char batch_details[] =
    "Results come in the order in which they are done: id, custom_id, response {status_code,\n"
    "request_id, body} and error. Each custom_id comes to stand in the output once: started\n"
    "again after an interruption or a crash, the same command cuts off a torn last line and\n"
    "goes on.\n"
    "\n"
    "Body fields: model (not looked at), messages or prompt, max_tokens, max_completion_tokens,\n"
    "temperature (1), top_p, n, seed, stop, logprobs, top_logprobs, presence_penalty,\n"
    "frequency_penalty, logit_bias; also top_k, min_p, repetition_penalty, min_tokens,\n"
    "stop_token_ids, ignore_eos. Any other field that would change the answer is refused by\n"
    "name.\n"
    "\n"
    "Exit status: 0 all done, 1 a result tells of an error or the run was interrupted, 2 usage\n"
    "or unusable files, 3 no connection or it was lost.\n"
    "\n"
    "  moed-cli batch -i requests.jsonl -o results.jsonl";

int command_batch(int argc, char **argv) {
    struct batch b = {.endpoint = ENDPOINT_DEFAULTS, .retries = 50, .priority = 2};
    const struct arg args[] = {
        {ARG_SECTION, .help = "Files"},
        {ARG_STRING, "input", 'i', "FILE", &b.in_path, 0, 0, "requests, one JSON object per line"},
        {ARG_STRING, "output", 'o', "FILE", &b.out_path, 0, 0, "results; appended to"},
        {ARG_SECTION, .help = "Running"},
        {ARG_INT, "concurrency", 'c', "N", &b.concurrency, 1, 65536,
         "requests in flight; default: what the daemon allows"},
        {ARG_INT, "retries", 0, "N", &b.retries, 0, 1000000,
         "attempts after one that may succeed later: the daemon is\n"
         "overloaded, loading, draining (50)"},
        {ARG_INT, "priority", 0, "N", &b.priority, 0, 2, "0 high, 1 normal, 2 batch (2)"},
        ENDPOINT_ARGS(&b.endpoint),
    };
    const struct command cmd = {.name = "moed-cli batch",
                                .summary = batch_summary,
                                .details = batch_details,
                                .args = args,
                                .n_args = sizeof args / sizeof *args};
    int code;
    if (!args_parse(&cmd, argc, argv, &code)) return code;
    if (!b.in_path || !b.out_path) return usage_error(&cmd, "--input and --output are wanted");
    code = EXIT_USAGE;
    if (!batch_input_open(b.in_path, &b.in)) return code;
    if (batch_output_open(b.out_path, &b.in, &b.out)) {
        code = run_files(&b);
        batch_output_close(&b.out);
    }
    batch_input_close(&b.in);
    return code;
}
