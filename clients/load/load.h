/* load: moed-load's parts: what is asked (prompts.c), the run (run.c), and what came of it
 * (report.c). Single thread; all time is clock_now_ns. */
#ifndef MOED_CLIENTS_LOAD_LOAD_H
#define MOED_CLIENTS_LOAD_LOAD_H

#include <jansson.h>
#include <poll.h>

#include "clients/common/answer.h"
#include "clients/common/body.h"
#include "clients/common/progress.h"
#include "clients/common/samples.h"
#include "clients/common/session.h"

struct load_options {
    struct endpoint_options endpoint;
    int64_t concurrency; /* closed loop: requests at once; open loop: the most at once */
    int64_t requests; /* 0 = until the duration is over */
    double rate; /* arrivals per second; 0 = closed loop */
    double duration_s; /* 0 = until the requests are sent */
    int64_t prompt_tokens, max_tokens, seed;
    double temperature;
    const char *prompts_path; /* NULL = random ids */
    bool raw, ignore_eos, show_answers;
    int64_t verify;
    const char *json_path, *csv_path, *label;
};

/* ---- prompts.c ------------------------------------------------------------------------------- */

/* A line of a prompts file. */
struct prompt_line {
    const char *text; /* of a plain line, and for show_answers */
    bool is_json;
    struct body body;
    struct wire_chat message; /* a plain line as a chat */
};

/* What request number i asks. Random prompts are a pure function of (seed, i), so that a run can
 * be repeated and any request of it asked again. */
struct prompts {
    const struct load_options *o;
    uint32_t n_vocab;
    char *text; /* the file, its lines cut apart by NULs */
    struct prompt_line *lines;
    size_t n_lines;
};

/* False after a complaint: the file cannot be used. */
bool prompts_open(const struct load_options *o, const struct wire_model_info *m,
                  struct prompts *out);
void prompts_close(struct prompts *p);
/* ids: room for o->prompt_tokens; *submit points into it and into p. */
void prompts_get(const struct prompts *p, uint64_t number, int32_t *ids,
                 struct wire_submit *submit);
/* The question in words, "" for random prompts. */
const char *prompts_text(const struct prompts *p, uint64_t number);

/* Uniform in [0, 1) from a stream that (seed, a, b) names; the same everywhere. */
double hash_uniform(uint64_t seed, uint64_t a, uint64_t b);

/* ---- run.c ----------------------------------------------------------------------------------- */

/* A finished request that is asked again at the end. */
struct kept_answer {
    uint64_t number;
    struct answer answer;
};

struct load_result {
    uint64_t ok, failed, rejected, broken, sent;
    uint64_t failed_by[ST_COUNT], rejected_by[ST_COUNT];
    uint64_t prompt_tokens, cached_tokens, output_tokens, preemptions;
    double seconds;
    size_t n_sessions;
    struct samples ttft_ms, itl_ms, e2e_ms;
    struct error first_error; /* the first failure's text, for the report */
    uint64_t verified, verify_same;
};

struct load {
    struct load_options o;
    struct prompts prompts;
    struct client **clients; /* NULL: that session was lost */
    size_t *in_flight; /* per session */
    struct pollfd *fds; /* [n_clients], scratch */
    size_t n_clients, per_session;
    struct flight *flights;
    size_t n_flights, n_running;
    int32_t *ids; /* scratch for one prompt */
    struct kept_answer *kept;
    size_t n_kept;
    uint64_t n_seen; /* answers that could have been kept */
    struct progress progress;
    struct load_result result;
};

/* Connect the sessions. EXIT_DONE, or a code after a complaint. */
int load_open(struct load *l);
void load_close(struct load *l);
/* Send, receive, measure. Stops early on interrupt or when no session is left. */
void load_run(struct load *l);
/* Ask the kept requests again, one at a time, and compare. */
void load_verify(struct load *l);

/* ---- report.c -------------------------------------------------------------------------------- */

/* The daemon's counters that the report looks at: -1 = it has no such counter. */
struct load_counters {
    double expert_reads, expert_reads_ungrouped, kv_blocks_peak, kv_blocks_total;
};
void counters_read(struct client *c, const struct endpoint_options *o, struct load_counters *out);

struct load_report {
    struct load *load;
    struct load_counters before, after;
    char model[128], backend[128];
};
void report_print(const struct load_report *r);
/* False after a complaint. */
bool report_json(const struct load_report *r, const char *path);
bool report_csv(const struct load_report *r, const char *path);

#endif
