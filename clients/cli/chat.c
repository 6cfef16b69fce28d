/* moed-cli chat: a conversation, or one question. The conversation is kept here and sent whole
 * each turn. See cli.h. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/cli/cli.h"

struct conversation {
    struct wire_chat messages[WIRE_MAX_MESSAGES]; /* contents malloc'd, roles static */
    size_t n, n_fixed; /* the system message stays on /reset */
};

struct chat {
    struct endpoint_options endpoint;
    struct sampling_options sampling;
    const char *prompt, *system;
    bool verbose;
    struct wire_submit submit;
    struct client *client;
    struct conversation talk;
};

static bool add_message(struct conversation *t, const char *role, const char *s, size_t n) {
    char *copy = t->n < WIRE_MAX_MESSAGES ? malloc(n + 1) : NULL;
    if (!copy) return false;
    memcpy(copy, s, n);
    t->messages[t->n++] = (struct wire_chat){bytes_of(role), {(const uint8_t *)copy, n}};
    return true;
}

static void drop_messages(struct conversation *t, size_t keep) {
    while (t->n > keep) free((char *)t->messages[--t->n].content.p);
}

/* One turn: the user's text is the last message. A turn that failed leaves the conversation as
 * it was before. */
static int answer_turn(const char *program, struct chat *h) {
    struct answer a;
    size_t before = h->talk.n - 1;
    h->submit.messages = h->talk.messages;
    h->submit.n_messages = h->talk.n;
    int code = stream_request(program, h->client, &h->submit, SHOW_TEXT, &a);
    bool has_text = a.error.code == ST_OK && a.choices[0].n_text > 0;
    if (code == EXIT_DONE && h->verbose) print_usage_line(&a);
    /* What was said before Ctrl-C was said: the model will be asked to go on from there. */
    if (!has_text || !add_message(&h->talk, "assistant", a.choices[0].text, a.choices[0].n_text))
        drop_messages(&h->talk, before);
    if (a.error.code == ST_TOO_LONG && h->talk.n > h->talk.n_fixed)
        fprintf(stderr, "%s: the conversation is full: /reset begins a new one\n", program);
    answer_free(&a);
    return code;
}

/* A daemon that was restarted while we sat at the prompt knows nothing of us: connect again,
 * once. */
static int turn(const char *program, struct chat *h, const char *line, size_t n) {
    if (!add_message(&h->talk, "user", line, n)) {
        fprintf(stderr, "%s: the conversation is full: /reset begins a new one\n", program);
        return EXIT_FAILED;
    }
    struct wire_msg m;
    if (client_next(h->client, 0, NULL, &m) != ST_TIMEOUT) {
        struct client *again = connect_or_complain(program, &h->endpoint);
        if (!again) {
            drop_messages(&h->talk, h->talk.n - 1);
            return EXIT_CONNECT;
        }
        client_close(h->client);
        h->client = again;
    }
    return answer_turn(program, h);
}

enum line { LINE_TEXT, LINE_EMPTY, LINE_END };

static enum line read_line(bool tty, char **line, size_t *cap, size_t *n) {
    if (tty) {
        fputs("> ", stdout);
        fflush(stdout);
    }
    errno = 0;
    /* A terminal gives a line at a time: none is in stdin's buffer. */
    bool waited = !tty || await_input(STDIN_FILENO);
    ssize_t got = waited ? getline(line, cap, stdin) : -1;
    if (!waited || (got < 0 && errno == EINTR && interrupted())) {
        clearerr(stdin);
        puts("\n(/exit or Ctrl-D leaves)");
        return LINE_EMPTY;
    }
    if (got < 0) return LINE_END;
    while (got > 0 && ((*line)[got - 1] == '\n' || (*line)[got - 1] == '\r')) got--;
    (*line)[got] = 0;
    *n = (size_t)got;
    return got > 0 ? LINE_TEXT : LINE_EMPTY;
}

static int converse(const char *program, struct chat *h) {
    bool tty = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    char *line = NULL;
    size_t cap = 0, n = 0;
    int code = EXIT_DONE;
    if (tty)
        printf("Talking with %.*s: /reset begins anew, /exit leaves, Ctrl-C stops an answer.\n",
               (int)client_welcome(h->client)->model.n, client_welcome(h->client)->model.p);
    for (enum line kind; (kind = read_line(tty, &line, &cap, &n)) != LINE_END;) {
        if (kind == LINE_EMPTY) continue;
        if (strcmp(line, "/exit") == 0 || strcmp(line, "/quit") == 0) break;
        if (strcmp(line, "/reset") == 0) {
            drop_messages(&h->talk, h->talk.n_fixed);
            continue;
        }
        if (line[0] == '/') {
            fprintf(stderr, "%s: there is /reset and /exit\n", program);
            continue;
        }
        if (!utf8_valid(line, n)) {
            fprintf(stderr, "%s: that line is not UTF-8 text\n", program);
            continue;
        }
        int turn_code = turn(program, h, line, n);
        /* At a terminal a failed turn was seen and talk goes on; in a script it decides the exit
         * status. */
        if (!tty && turn_code != EXIT_DONE) code = turn_code;
        if (turn_code == EXIT_CONNECT && !tty) break;
    }
    if (tty) putchar('\n');
    free(line);
    return code;
}

static int run(const struct command *cmd, struct chat *h) {
    int code = sampling_apply(cmd, &h->sampling, &h->submit);
    if (code != EXIT_DONE) return code;
    if ((h->system && !utf8_valid(h->system, strlen(h->system))) ||
        (h->prompt && !utf8_valid(h->prompt, strlen(h->prompt))))
        return usage_error(cmd, "--system and --prompt must be UTF-8 text");
    if (h->prompt && !*h->prompt) return usage_error(cmd, "the prompt is empty");
    h->client = connect_or_complain(cmd->name, &h->endpoint);
    if (!h->client) return EXIT_CONNECT;
    if (h->system) add_message(&h->talk, "system", h->system, strlen(h->system));
    h->talk.n_fixed = h->talk.n;
    catch_interrupt();
    if (h->prompt)
        code = turn(cmd->name, h, h->prompt, strlen(h->prompt));
    else
        code = converse(cmd->name, h);
    drop_messages(&h->talk, 0);
    client_close(h->client);
    return code;
}

static const char chat_summary[] =
    "Talk with the model, in its chat format. Each line is a message; the whole conversation\n"
    "goes with it. Ctrl-C stops the answer that is being given and keeps what was said of it.";

static const char chat_details[] =
    "Lines that begin with a slash are commands: /reset begins a new conversation, /exit (or\n"
    "Ctrl-D) leaves. When standard input is not a terminal, each line is answered in turn, and\n"
    "the exit status tells of the last turn that failed.\n"
    "Exit status: 0 done, 1 rejected, failed or cancelled, 2 usage, 3 no connection.\n"
    "\n"
    "  moed-cli chat\n"
    "  moed-cli chat -p 'What is a mutex?'\n"
    "  moed-cli chat --system 'Answer in one sentence.' -t 0.7";

int command_chat(int argc, char **argv) {
    static struct chat h = {.endpoint = ENDPOINT_DEFAULTS, .sampling = SAMPLING_DEFAULTS};
    const struct arg args[] = {
        {ARG_SECTION, .help = "Conversation"},
        {ARG_STRING, "prompt", 'p', "TEXT", &h.prompt, 0, 0, "ask this one question and exit"},
        {ARG_STRING, "system", 0, "TEXT", &h.system, 0, 0, "begin with this system message"},
        SAMPLING_ARGS(&h.sampling),
        {ARG_FLAG, "verbose", 'v', NULL, &h.verbose, 0, 0,
         "counts and times on stderr after each answer"},
        ENDPOINT_ARGS(&h.endpoint),
    };
    const struct command cmd = {.name = "moed-cli chat",
                                .summary = chat_summary,
                                .details = chat_details,
                                .args = args,
                                .n_args = sizeof args / sizeof *args};
    int code;
    return args_parse(&cmd, argc, argv, &code) ? run(&cmd, &h) : code;
}
