/* cli: moed-cli's subcommands and what they share. Each command parses its own line, talks to
 * the daemon and returns the exit code. Single thread. */
#ifndef MOED_CLIENTS_CLI_CLI_H
#define MOED_CLIENTS_CLI_CLI_H

#include "clients/common/answer.h"
#include "clients/common/args.h"
#include "clients/common/session.h"

int command_generate(int argc, char **argv);
int command_chat(int argc, char **argv);
int command_batch(int argc, char **argv);
int command_tokenize(int argc, char **argv);
int command_detokenize(int argc, char **argv);
int command_info(int argc, char **argv);
int command_health(int argc, char **argv);
int command_stats(int argc, char **argv);

/* ---- sampling.c: the options that say how to sample ------------------------------------------ */

struct sampling_options {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k, seed, logprobs, max_tokens, min_tokens, n, ttl_ms, priority;
    struct arg_list bias, stop, stop_ids;
    bool ignore_eos, raw_special;
    struct wire_bias biases[WIRE_MAX_BIASES];
};
#define SAMPLING_DEFAULTS                                                                          \
    { .top_p = 1, .repetition = 1, .seed = -1, .logprobs = -1, .n = 1, .priority = 1 }

/* clang-format off */
#define SAMPLING_ARGS(v) \
    {ARG_SECTION, .help = "Sampling"}, \
    {ARG_REAL, "temperature", 't', "X", &(v)->temperature, 0, 100, \
     "0 takes the likeliest token each time (0)"}, \
    {ARG_INT, "top-k", 0, "N", &(v)->top_k, 0, INT32_MAX, \
     "sample from the N likeliest; 0 = all (0)"}, \
    {ARG_REAL, "top-p", 0, "P", &(v)->top_p, 1e-6, 1, \
     "sample from the likeliest whose sum reaches P (1)"}, \
    {ARG_REAL, "min-p", 0, "P", &(v)->min_p, 0, 1, \
     "leave out tokens below P times the likeliest (0)"}, \
    {ARG_REAL, "repetition-penalty", 0, "X", &(v)->repetition, 1e-6, 100, \
     "divide the logits of tokens already seen (1)"}, \
    {ARG_REAL, "presence-penalty", 0, "X", &(v)->presence, -2, 2, \
     "subtract from tokens already generated (0)"}, \
    {ARG_REAL, "frequency-penalty", 0, "X", &(v)->frequency, -2, 2, \
     "the same, times how often (0)"}, \
    {ARG_LIST, "bias", 0, "ID=V", &(v)->bias, 0, 0, \
     "add V (-100 to 100) to a token's logit; repeatable"}, \
    {ARG_INT, "seed", 0, "N", &(v)->seed, 0, 9.2e18, \
     "same seed, same answer; default: drawn anew"}, \
    {ARG_SECTION, .help = "Stopping"}, \
    {ARG_INT, "max-tokens", 0, "N", &(v)->max_tokens, 0, INT32_MAX, \
     "at most N tokens; 0 = as many as the context holds"}, \
    {ARG_INT, "min-tokens", 0, "N", &(v)->min_tokens, 0, INT32_MAX, \
     "no stop before N tokens (0)"}, \
    {ARG_LIST, "stop", 0, "TEXT", &(v)->stop, 0, 0, "end where TEXT appears; repeatable"}, \
    {ARG_LIST, "stop-id", 0, "ID", &(v)->stop_ids, 0, 0, "end at this token; repeatable"}, \
    {ARG_FLAG, "ignore-eos", 0, NULL, &(v)->ignore_eos, 0, 0, "go on after end-of-turn tokens"}, \
    {ARG_INT, "ttl-ms", 0, "MS", &(v)->ttl_ms, 0, UINT32_MAX, \
     "give up after MS, queueing included; 0 = never (0)"}, \
    {ARG_SECTION, .help = "Request"}, \
    {ARG_INT, "priority", 0, "N", &(v)->priority, 0, 2, "0 high, 1 normal, 2 batch (1)"}
/* clang-format on */

/* Fill submit's sampling, stops and limits. Borrows from o. EXIT_DONE, or EXIT_USAGE after a
 * complaint. */
int sampling_apply(const struct command *cmd, struct sampling_options *o,
                   struct wire_submit *submit);

/* ---- stream.c: one request, shown as it comes ------------------------------------------------ */

enum show {
    SHOW_TEXT, /* choice 0 as it streams, the others when it has ended */
    SHOW_LOGPROBS /* a line per token */
};

/* Submit and read to the end into *answer (which is freed by the caller whatever is returned),
 * writing to stdout. An interrupt cancels the request. EXIT_DONE; EXIT_FAILED (rejected, failed,
 * cancelled, timed out) or EXIT_CONNECT, after a complaint on stderr. */
int stream_request(const char *program, struct client *c, const struct wire_submit *submit,
                   enum show show, struct answer *answer);
/* "17 prompt tokens (0 cached), 42 new, first after 12 ms, 105 tokens/s, ended by stop" on
 * stderr. */
void print_usage_line(const struct answer *a);

/* Text for people: on a terminal, control characters but newline and tab are shown as '?', so
 * that an answer cannot drive the terminal. False when the file is closed or full. */
bool put_text(const char *s, size_t n);

/* The text of one token, quoted and escaped as JSON, malloc'd; NULL when the daemon does not
 * say. */
char *token_text(struct client *c, int32_t id);

#endif
