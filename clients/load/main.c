/* moed-load: put a daemon under load and measure what its clients see. Options and the order of
 * a run; see load.h. */
#include <stdio.h>
#include <string.h>

#include "clients/load/load.h"

enum { OPEN_LOOP_CONCURRENCY = 256, CLOSED_LOOP_CONCURRENCY = 8 };

static int check_options(const struct command *cmd, struct load_options *o) {
    if (o->requests == 0 && o->duration_s == 0) o->requests = 100;
    if (o->concurrency == 0)
        o->concurrency = o->rate > 0 ? OPEN_LOOP_CONCURRENCY : CLOSED_LOOP_CONCURRENCY;
    if (o->verify > 0 && o->temperature > 0)
        return usage_error(cmd, "--verify compares greedy answers: it wants --temperature 0");
    if (o->show_answers && !o->prompts_path)
        return usage_error(cmd,
                           "--show-answers wants --prompts: random tokens have none worth showing");
    if (!o->prompts_path && o->prompt_tokens == 0)
        return usage_error(cmd, "--prompt-tokens must be at least 1");
    if (!utf8_valid(o->label, strlen(o->label))) return usage_error(cmd, "--label is not UTF-8");
    return EXIT_DONE;
}

static void copy_text(char *dst, size_t cap, struct bytes s) {
    snprintf(dst, cap, "%.*s", (int)s.n, (const char *)s.p);
    if (!utf8_valid(dst, strlen(dst))) dst[0] = 0;
}

static int measure(struct load *l, struct load_report *rep) {
    load_run(l);
    size_t alive = 0;
    while (alive < l->n_clients && !l->clients[alive]) alive++;
    if (alive < l->n_clients) {
        /* Before the verification, whose reads are not the run's. */
        counters_read(l->clients[alive], &l->o.endpoint, &rep->after);
        load_verify(l);
    } else {
        rep->after = rep->before;
    }
    report_print(rep);
    bool good = true;
    if (l->o.json_path) good &= report_json(rep, l->o.json_path);
    if (l->o.csv_path) good &= report_csv(rep, l->o.csv_path);
    const struct load_result *r = &l->result;
    bool complete = (l->o.requests == 0 || r->sent == (uint64_t)l->o.requests) && l->n_running == 0;
    if (l->o.duration_s > 0) complete = l->n_running == 0;
    good &= complete && r->failed == 0 && r->rejected == 0 && r->broken == 0 &&
            r->verified == r->verify_same && alive < l->n_clients;
    return good ? EXIT_DONE : EXIT_FAILED;
}

static int run(const struct command *cmd, const struct load_options *o) {
    struct load l = {.o = *o};
    int code = check_options(cmd, &l.o);
    if (code != EXIT_DONE) return code;
    struct load_report rep = {.load = &l};
    struct wire_msg reply, ask = {.type = WIRE_MODEL_INFO};
    code = load_open(&l);
    if (code == EXIT_DONE &&
        ask_or_complain("moed-load", l.clients[0], &l.o.endpoint, &ask, &reply, &code)) {
        copy_text(rep.model, sizeof rep.model, reply.model_info.name);
        copy_text(rep.backend, sizeof rep.backend, reply.model_info.backend);
        if (!prompts_open(&l.o, &reply.model_info, &l.prompts)) code = EXIT_USAGE;
    }
    if (code == EXIT_DONE) {
        counters_read(l.clients[0], &l.o.endpoint, &rep.before);
        catch_interrupt();
        code = measure(&l, &rep);
    }
    load_close(&l);
    return code;
}

static const char load_summary[] =
    "Put a moed daemon under load and measure what its clients see: time to the first token,\n"
    "time between tokens, time of whole requests, and rates. Percentiles are exact, from all\n"
    "samples. Every stream is checked: chunks without gaps, a hash over the tokens, one final\n"
    "message.";

static const char load_details[] =
    "Exit status: 0 every request was answered (and every --verify agreed), 1 not so, 2 usage,\n"
    "3 no connection.\n"
    "\n"
    "  moed-load -c 32 -r 500 --prompt-tokens 256 --max-tokens 128\n"
    "  moed-load --rate 20 --duration 60 --prompts questions.txt --csv runs.csv\n"
    "  moed-load -c 64 -r 256 --verify 16";

int main(int argc, char **argv) {
    struct load_options o = {.endpoint = ENDPOINT_DEFAULTS,
                             .prompt_tokens = 128,
                             .max_tokens = 64,
                             .seed = 1,
                             .label = ""};
    const struct arg args[] = {
        {ARG_SECTION, .help = "How much"},
        {ARG_INT, "concurrency", 'c', "N", &o.concurrency, 1, 16384,
         "requests at once (8); with --rate the most at once (256).\n"
         "As many sessions are opened as the daemon's limit asks for"},
        {ARG_INT, "requests", 'r', "M", &o.requests, 1, 1e15,
         "send M in all (100, without --duration)"},
        {ARG_REAL, "duration", 0, "S", &o.duration_s, 0.001, 1e9,
         "send for S seconds, then let them end"},
        {ARG_REAL, "rate", 0, "R", &o.rate, 0.001, 1e6,
         "open loop: R arrivals per second (Poisson), each timed from\n"
         "when it was due, whether or not it could be sent then"},
        {ARG_SECTION, .help = "What"},
        {ARG_INT, "prompt-tokens", 0, "N", &o.prompt_tokens, 1, 1 << 20,
         "random prompts of N tokens (128); such requests make exactly\n"
         "--max-tokens, going on after end-of-turn tokens"},
        {ARG_STRING, "prompts", 'f', "FILE", &o.prompts_path, 0, 0,
         "prompts from FILE instead, in turn: one per line, or JSON objects\n"
         "with messages or prompt (or batch lines) and their own parameters"},
        {ARG_FLAG, "raw", 0, NULL, &o.raw, 0, 0,
         "plain lines as prompts; without it each is a user's message"},
        {ARG_INT, "max-tokens", 0, "M", &o.max_tokens, 1, 1 << 20, "at most M new tokens (64)"},
        {ARG_FLAG, "ignore-eos", 0, NULL, &o.ignore_eos, 0, 0, "go on after end-of-turn tokens"},
        {ARG_REAL, "temperature", 't', "X", &o.temperature, 0, 100, "0 = greedy (0)"},
        {ARG_INT, "seed", 0, "N", &o.seed, 0, 9.2e18, "of prompts, arrivals and sampling (1)"},
        {ARG_SECTION, .help = "Results"},
        {ARG_INT, "verify", 0, "K", &o.verify, 0, 1 << 20,
         "ask K of the requests again at the end, one at a time, and\n"
         "compare the tokens"},
        {ARG_FLAG, "show-answers", 0, NULL, &o.show_answers, 0, 0,
         "print each question and answer on a line when it is done"},
        {ARG_STRING, "json", 0, "FILE", &o.json_path, 0, 0, "write the results to FILE"},
        {ARG_STRING, "csv", 0, "FILE", &o.csv_path, 0, 0, "append them to FILE as one row"},
        {ARG_STRING, "label", 0, "TEXT", &o.label, 0, 0, "name of the run, for both"},
        ENDPOINT_ARGS(&o.endpoint),
    };
    const struct command cmd = {.name = "moed-load",
                                .summary = load_summary,
                                .details = load_details,
                                .args = args,
                                .n_args = sizeof args / sizeof *args};
    int code;
    return args_parse(&cmd, argc, argv, &code) ? run(&cmd, &o) : code;
}
