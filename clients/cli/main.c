/* moed-cli: talk to a moed daemon from a shell. Chooses the subcommand; see cli.h. */
#include <stdio.h>
#include <string.h>

#include "clients/cli/cli.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary;
} commands[] = {
    {"chat", command_chat, "talk with the model, or ask one question"},
    {"generate", command_generate, "continue a prompt"},
    {"batch", command_batch, "answer a file of requests; resumes where it stopped"},
    {"tokenize", command_tokenize, "text to token ids"},
    {"detokenize", command_detokenize, "token ids to text"},
    {"info", command_info, "the model, the backend and the limits"},
    {"health", command_health, "whether the daemon takes requests"},
    {"stats", command_stats, "the daemon's counters"},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_help(FILE *f) {
    fprintf(f, "usage: moed-cli COMMAND [options]\n\nTalk to a moed daemon.\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %-12s%s\n", commands[i].name, commands[i].summary);
    fprintf(f,
            "\n'moed-cli COMMAND --help' describes each. All of them take --endpoint URI; without "
            "it the\n"
            "daemon is looked for at $MOED_ENDPOINT, else ipc://$XDG_RUNTIME_DIR/moed.sock, else\n"
            "ipc:///tmp/moed-<uid>.sock, which is where a daemon of the same user listens.\n\n"
            "Exit status: 0 done, 1 the request failed, 2 usage, 3 no connection to the daemon.\n");
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return EXIT_DONE;
    }
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(argv[1], commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "moed-cli: there is no command '%s'.\nTry 'moed-cli --help'.\n", argv[1]);
    return EXIT_USAGE;
}
