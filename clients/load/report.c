/* report: a run's results as a table, as JSON and as a CSV row. See load.h. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "clients/load/load.h"

/* ---- the daemon's counters ------------------------------------------------------------------- */

void counters_read(struct client *c, const struct endpoint_options *o, struct load_counters *out) {
    *out = (struct load_counters){-1, -1, -1, -1};
    const struct {
        const char *name;
        double *value;
    } wanted[] = {{"expert_reads", &out->expert_reads},
                  {"expert_reads_ungrouped", &out->expert_reads_ungrouped},
                  {"kv_blocks_held_peak", &out->kv_blocks_peak},
                  {"kv_blocks_total", &out->kv_blocks_total}};
    struct wire_msg reply, ask = {.type = WIRE_STATS};
    if (client_call(c, &ask, (int)o->timeout_ms, NULL, &reply) != ST_OK) return;
    for (size_t i = 0; i < reply.stats.n_counters; i++) {
        const struct wire_counter *k = &reply.stats.counters[i];
        for (size_t w = 0; w < sizeof wanted / sizeof *wanted; w++)
            if (k->name.n == strlen(wanted[w].name) &&
                memcmp(k->name.p, wanted[w].name, k->name.n) == 0)
                *wanted[w].value = k->value;
    }
}

/* Of the expert reads that serving each token alone would have cost, in this run. -1: not known. */
static double reads_made(const struct load_report *r) {
    return r->before.expert_reads < 0 ? -1 : r->after.expert_reads - r->before.expert_reads;
}

static double reads_alone(const struct load_report *r) {
    return r->before.expert_reads_ungrouped < 0
               ? -1
               : r->after.expert_reads_ungrouped - r->before.expert_reads_ungrouped;
}

/* ---- table ----------------------------------------------------------------------------------- */

static double per_second(const struct load_result *r, uint64_t n) {
    return r->seconds > 0 ? (double)n / r->seconds : 0;
}

static void print_times(const char *name, struct samples *s) {
    printf("%-22s %9.1f %9.1f %9.1f %9.1f\n", name, samples_percentile(s, 0.50),
           samples_percentile(s, 0.90), samples_percentile(s, 0.99), samples_percentile(s, 1));
}

static void print_codes(const char *what, const uint64_t by[ST_COUNT]) {
    for (int i = 0; i < ST_COUNT; i++)
        if (by[i] > 0)
            printf("  %s %-16s %llu\n", what, status_name((enum status)i),
                   (unsigned long long)by[i]);
}

void report_print(const struct load_report *rep) {
    struct load *l = rep->load;
    struct load_result *r = &l->result;
    char line[300];
    if (l->o.show_answers) putchar('\n');
    printf("requests               %llu ok, %llu failed, %llu rejected\n",
           (unsigned long long)r->ok, (unsigned long long)r->failed,
           (unsigned long long)r->rejected);
    print_codes("failed  ", r->failed_by);
    print_codes("rejected", r->rejected_by);
    if (r->broken > 0) printf("  broken streams           %llu\n", (unsigned long long)r->broken);
    if (r->first_error.code != ST_OK)
        printf("  first error: %s\n", error_line(&r->first_error, line, sizeof line));
    printf("time                   %.2f s, %zu session%s, %s\n", r->seconds, r->n_sessions,
           r->n_sessions == 1 ? "" : "s", l->o.rate > 0 ? "open loop" : "closed loop");
    printf("output                 %llu tokens, %.1f tokens/s, %.2f requests/s\n",
           (unsigned long long)r->output_tokens, per_second(r, r->output_tokens),
           per_second(r, r->ok));
    printf("prompts                %llu tokens\n", (unsigned long long)r->prompt_tokens);
    printf("%-22s %9s %9s %9s %9s\n", "milliseconds", "p50", "p90", "p99", "max");
    print_times("to first token", &r->ttft_ms);
    print_times("between tokens", &r->itl_ms);
    print_times("whole request", &r->e2e_ms);
    if (rep->after.kv_blocks_total >= 0)
        printf("KV blocks              %.0f of %.0f at the peak\n", rep->after.kv_blocks_peak,
               rep->after.kv_blocks_total);
    double made = reads_made(rep), alone = reads_alone(rep);
    if (made >= 0 && alone > 0)
        printf(
            "expert reads           %.0f, where each token alone would need %.0f: %.1f %% saved\n",
            made, alone, 100 * (1 - made / alone));
    if (l->o.verify > 0)
        printf("asked again alone      %llu of %llu gave the same tokens\n",
               (unsigned long long)r->verify_same, (unsigned long long)r->verified);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *times_json(struct samples *s) {
    return json_pack("{s:I, s:f, s:f, s:f, s:f, s:f}", "n", (json_int_t)s->n, "mean",
                     samples_mean(s), "p50", samples_percentile(s, 0.50), "p90",
                     samples_percentile(s, 0.90), "p99", samples_percentile(s, 0.99), "max",
                     samples_percentile(s, 1));
}

static json_t *codes_json(const uint64_t by[ST_COUNT]) {
    json_t *o = json_object();
    for (int i = 0; i < ST_COUNT; i++)
        if (by[i] > 0)
            json_object_set_new(o, status_name((enum status)i), json_integer((json_int_t)by[i]));
    return o;
}

static void set_count(json_t *o, const char *key, uint64_t n) {
    json_object_set_new(o, key, json_integer((json_int_t)n));
}

bool report_json(const struct load_report *rep, const char *path) {
    struct load *l = rep->load;
    struct load_result *r = &l->result;
    json_t *o =
        json_pack("{s:s, s:s, s:s, s:s, s:I, s:f, s:I, s:f}", "label", l->o.label, "model",
                  rep->model, "backend", rep->backend, "loop", l->o.rate > 0 ? "open" : "closed",
                  "concurrency", (json_int_t)l->o.concurrency, "rate", l->o.rate, "sessions",
                  (json_int_t)r->n_sessions, "seconds", r->seconds);
    set_count(o, "sent", r->sent);
    set_count(o, "ok", r->ok);
    set_count(o, "failed", r->failed);
    json_object_set_new(o, "failed_by", codes_json(r->failed_by));
    set_count(o, "rejected", r->rejected);
    json_object_set_new(o, "rejected_by", codes_json(r->rejected_by));
    set_count(o, "broken_streams", r->broken);
    set_count(o, "prompt_tokens", r->prompt_tokens);
    set_count(o, "cached_tokens", r->cached_tokens);
    set_count(o, "output_tokens", r->output_tokens);
    set_count(o, "preemptions", r->preemptions);
    json_object_set_new(o, "output_tokens_per_s", json_real(per_second(r, r->output_tokens)));
    json_object_set_new(o, "requests_per_s", json_real(per_second(r, r->ok)));
    json_object_set_new(o, "ttft_ms", times_json(&r->ttft_ms));
    json_object_set_new(o, "itl_ms", times_json(&r->itl_ms));
    json_object_set_new(o, "e2e_ms", times_json(&r->e2e_ms));
    json_object_set_new(o, "expert_reads", json_real(reads_made(rep)));
    json_object_set_new(o, "expert_reads_ungrouped", json_real(reads_alone(rep)));
    json_object_set_new(o, "kv_blocks_peak", json_real(rep->after.kv_blocks_peak));
    json_object_set_new(o, "kv_blocks_total", json_real(rep->after.kv_blocks_total));
    set_count(o, "verified", r->verified);
    set_count(o, "verified_same", r->verify_same);
    bool good =
        json_dump_file(o, path, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6)) == 0;
    json_decref(o);
    if (!good) fprintf(stderr, "moed-load: cannot write %s\n", path);
    return good;
}

/* ---- CSV ------------------------------------------------------------------------------------- */

/* A field that may hold anything (RFC 4180: quotes are doubled). */
static void put_quoted(FILE *f, const char *s) {
    putc('"', f);
    for (; *s; s++) {
        if (*s == '"') putc('"', f);
        putc(*s, f);
    }
    putc('"', f);
}

static void put_csv_times(FILE *f, struct samples *s) {
    fprintf(f, ",%.3f,%.3f,%.3f,%.3f", samples_percentile(s, 0.50), samples_percentile(s, 0.90),
            samples_percentile(s, 0.99), samples_percentile(s, 1));
}

static const char csv_head[] =
    "label,time,model,backend,loop,concurrency,rate,sent,ok,failed,rejected,seconds,prompt_tokens,"
    "cached_tokens,output_tokens,output_tokens_per_s,requests_per_s,ttft_p50_ms,ttft_p90_ms,"
    "ttft_p99_ms,ttft_max_ms,itl_p50_ms,itl_p90_ms,itl_p99_ms,itl_max_ms,e2e_p50_ms,e2e_p90_ms,"
    "e2e_p99_ms,e2e_max_ms,expert_reads,expert_reads_ungrouped,verified,verified_same\n";

bool report_csv(const struct load_report *rep, const char *path) {
    struct load *l = rep->load;
    struct load_result *r = &l->result;
    char when[32];
    time_t t = time(NULL);
    struct tm tm;
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &tm));
    FILE *f = fopen(path, "a");
    struct stat s;
    if (!f || fstat(fileno(f), &s) != 0) {
        fprintf(stderr, "moed-load: %s: %s\n", path, strerror(errno));
        if (f) fclose(f);
        return false;
    }
    if (s.st_size == 0) fputs(csv_head, f);
    put_quoted(f, l->o.label);
    fprintf(f, ",%s,", when);
    put_quoted(f, rep->model);
    putc(',', f);
    put_quoted(f, rep->backend);
    fprintf(f, ",%s,%lld,%g,%llu,%llu,%llu,%llu,%.3f,%llu,%llu,%llu,%.2f,%.3f",
            l->o.rate > 0 ? "open" : "closed", (long long)l->o.concurrency, l->o.rate,
            (unsigned long long)r->sent, (unsigned long long)r->ok, (unsigned long long)r->failed,
            (unsigned long long)r->rejected, r->seconds, (unsigned long long)r->prompt_tokens,
            (unsigned long long)r->cached_tokens, (unsigned long long)r->output_tokens,
            per_second(r, r->output_tokens), per_second(r, r->ok));
    put_csv_times(f, &r->ttft_ms);
    put_csv_times(f, &r->itl_ms);
    put_csv_times(f, &r->e2e_ms);
    fprintf(f, ",%.0f,%.0f,%llu,%llu\n", reads_made(rep), reads_alone(rep),
            (unsigned long long)r->verified, (unsigned long long)r->verify_same);
    bool good = !ferror(f);
    good = fclose(f) == 0 && good;
    if (!good) fprintf(stderr, "moed-load: cannot write %s\n", path);
    return good;
}
