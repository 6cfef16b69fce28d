/* args: command lines. A program describes its options in a table; parsing, range checks and
 * --help come from that table, so that they cannot disagree. Pure but for printing; single
 * thread. */
#ifndef MOED_CLIENTS_COMMON_ARGS_H
#define MOED_CLIENTS_COMMON_ARGS_H

#include "proto/base.h"

/* Exit codes of moed's client programs. */
enum exit_code { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_CONNECT = 3 };

enum arg_kind {
    ARG_SECTION, /* a heading in --help: only help is set */
    ARG_FLAG, /* bool */
    ARG_STRING, /* const char *, borrowed from argv */
    ARG_INT, /* int64_t within [lo, hi] */
    ARG_REAL, /* double within [lo, hi], finite */
    ARG_LIST /* struct arg_list: may be repeated */
};

enum { ARG_LIST_MAX = 128 };
struct arg_list {
    const char *items[ARG_LIST_MAX];
    size_t n;
};

struct operands {
    char **items; /* in argv, compacted */
    int n;
};

struct arg {
    enum arg_kind kind;
    const char *name; /* "max-tokens" */
    char letter; /* 'p', or 0 */
    const char *value; /* what --help calls its value */
    void *dest; /* keeps its value when the option is not given */
    double lo, hi;
    const char *help;
};

struct command {
    const char *name; /* "moed-cli generate" */
    const char *operands; /* "[TEXT]", or NULL: none are taken */
    const char *summary; /* what it does, whole sentences, lines broken by hand */
    const char *details; /* after the options; NULL = nothing */
    const struct arg *args;
    size_t n_args;
    struct operands *rest; /* NULL when none are taken */
};

/* Parse argv[1 …]. Returns true to go on; false when the program is to exit with *code: help was
 * printed (EXIT_DONE) or a complaint (EXIT_USAGE). "--" ends options. */
bool args_parse(const struct command *c, int argc, char **argv, int *code);

/* Parse a whole string as a number; false if it is none or out of range. */
bool args_int(const char *s, double lo, double hi, int64_t *out);
bool args_real(const char *s, double lo, double hi, double *out);

/* "prog: text" on stderr; returns EXIT_USAGE. */
int usage_error(const struct command *c, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
