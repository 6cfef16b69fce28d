/* moed-cli generate: continue a prompt. See cli.h. */
#include <stdlib.h>
#include <string.h>

#include "clients/cli/cli.h"

struct generate {
    struct endpoint_options endpoint;
    struct sampling_options sampling;
    const char *prompt, *file;
    bool verbose;
};

static int run(const struct command *cmd, struct generate *g) {
    struct wire_submit submit = {0};
    int code = sampling_apply(cmd, &g->sampling, &submit);
    if (code != EXIT_DONE) return code;
    if (g->prompt && g->file) return usage_error(cmd, "give --prompt or --file, not both");
    char *text = NULL;
    if (g->prompt) {
        submit.prompt_text = bytes_of(g->prompt);
        if (!utf8_valid(submit.prompt_text.p, submit.prompt_text.n))
            return usage_error(cmd, "the prompt is not UTF-8 text");
    } else {
        size_t n;
        text = read_text_file(cmd->name, g->file ? g->file : "-", WIRE_MAX_BODY_BYTES, &n);
        if (!text) return EXIT_USAGE;
        if (n > 0 && text[n - 1] == '\n') n--;
        submit.prompt_text = (struct bytes){(const uint8_t *)text, n};
    }
    if (submit.prompt_text.n == 0) {
        free(text);
        return usage_error(cmd, "the prompt is empty");
    }
    struct client *c = connect_or_complain(cmd->name, &g->endpoint);
    if (c) {
        struct answer a;
        catch_interrupt();
        code = stream_request(cmd->name, c, &submit,
                              g->sampling.logprobs >= 0 ? SHOW_LOGPROBS : SHOW_TEXT, &a);
        if (code == EXIT_DONE && g->verbose) print_usage_line(&a);
        answer_free(&a);
    }
    client_close(c);
    free(text);
    return c ? code : EXIT_CONNECT;
}

static const char generate_summary[] =
    "Continue a prompt and print the continuation as it is made. The prompt is taken as it is:\n"
    "no chat template is applied (see moed-cli chat). Without --prompt and --file it is read\n"
    "from standard input; one newline at its end is left out. --max-tokens defaults to 256.";

static const char generate_details[] =
    "Ctrl-C cancels.\n"
    "Exit status: 0 done, 1 rejected, failed or cancelled, 2 usage, 3 no connection.\n"
    "\n"
    "  moed-cli generate -p 'A mutex is'\n"
    "  moed-cli generate -f story.txt -t 0.8 --top-p 0.95 --seed 7 --max-tokens 400\n"
    "  moed-cli generate -p 'The capital of France is' --logprobs 3 --max-tokens 2";

int command_generate(int argc, char **argv) {
    struct generate g = {.endpoint = ENDPOINT_DEFAULTS, .sampling = SAMPLING_DEFAULTS};
    g.sampling.max_tokens = 256;
    const struct arg args[] = {
        {ARG_SECTION, .help = "Prompt"},
        {ARG_STRING, "prompt", 'p', "TEXT", &g.prompt, 0, 0, "the prompt"},
        {ARG_STRING, "file", 'f', "FILE", &g.file, 0, 0, "read it from FILE; - is standard input"},
        {ARG_FLAG, "raw-special", 0, NULL, &g.sampling.raw_special, 0, 0,
         "names of special tokens in the prompt are ordinary text"},
        SAMPLING_ARGS(&g.sampling),
        {ARG_INT, "n", 'n', "N", &g.sampling.n, 1, WIRE_MAX_CHOICES,
         "so many answers; all but the first come at the end (1)"},
        {ARG_INT, "logprobs", 0, "N", &g.sampling.logprobs, 0, WIRE_MAX_TOP_LOGPROBS,
         "a line per token instead of the text: id, log-probability,\n"
         "text, and the N likeliest alternatives"},
        {ARG_FLAG, "verbose", 'v', NULL, &g.verbose, 0, 0, "counts and times on stderr at the end"},
        ENDPOINT_ARGS(&g.endpoint),
    };
    const struct command cmd = {.name = "moed-cli generate",
                                .summary = generate_summary,
                                .details = generate_details,
                                .args = args,
                                .n_args = sizeof args / sizeof *args};
    int code;
    return args_parse(&cmd, argc, argv, &code) ? run(&cmd, &g) : code;
}
