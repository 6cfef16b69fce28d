/* See args.h. */
#include "clients/common/args.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int usage_error(const struct command *c, const char *fmt, ...) {
    va_list ap;
    fprintf(stderr, "%s: ", c->name);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\nTry '%s --help'.\n", c->name);
    return EXIT_USAGE;
}

bool args_int(const char *s, double lo, double hi, int64_t *out) {
    char *end;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (*s == 0 || *end != 0 || errno != 0 || (double)v < lo || (double)v > hi) return false;
    *out = v;
    return true;
}

bool args_real(const char *s, double lo, double hi, double *out) {
    char *end;
    double v = strtod(s, &end);
    if (*s == 0 || *end != 0 || !isfinite(v) || v < lo || v > hi) return false;
    *out = v;
    return true;
}

/* ---- --help ---------------------------------------------------------------------------------- */

enum { HELP_COLUMN = 28 };

/* Help text that has several lines is aligned to the column. */
static void print_help_text(const char *text, int column) {
    for (;;) {
        const char *eol = strchr(text, '\n');
        if (!eol) break;
        printf("%.*s\n%*s", (int)(eol - text), text, column, "");
        text = eol + 1;
    }
    printf("%s\n", text);
}

static void print_option(const struct arg *a) {
    char head[64];
    char letter[8] = "    ";
    if (a->letter) snprintf(letter, sizeof letter, "-%c, ", a->letter);
    int n = snprintf(head, sizeof head, "  %s--%s%s%s", letter, a->name, a->value ? " " : "",
                     a->value ? a->value : "");
    if (n < HELP_COLUMN - 1)
        printf("%-*s", HELP_COLUMN, head);
    else
        printf("%s\n%*s", head, HELP_COLUMN, "");
    print_help_text(a->help, HELP_COLUMN);
}

static void print_help(const struct command *c) {
    printf("usage: %s [options]%s%s\n\n%s\n", c->name, c->operands ? " " : "",
           c->operands ? c->operands : "", c->summary);
    if (c->n_args > 0 && c->args[0].kind != ARG_SECTION) printf("\nOptions\n");
    for (size_t i = 0; i < c->n_args; i++) {
        if (c->args[i].kind == ARG_SECTION)
            printf("\n%s\n", c->args[i].help);
        else
            print_option(&c->args[i]);
    }
    printf("      --help                print this and exit\n");
    if (c->details) printf("\n%s\n", c->details);
}

/* ---- parsing --------------------------------------------------------------------------------- */

static const struct arg *find_arg(const struct command *c, const char *name, size_t n,
                                  char letter) {
    for (size_t i = 0; i < c->n_args; i++) {
        const struct arg *a = &c->args[i];
        if (a->kind == ARG_SECTION) continue;
        if (letter ? a->letter == letter : strlen(a->name) == n && memcmp(a->name, name, n) == 0)
            return a;
    }
    return NULL;
}

/* EXIT_DONE or EXIT_USAGE, after saying why. */
static int set_value(const struct command *c, const struct arg *a, const char *value) {
    struct arg_list *list = a->dest;
    switch (a->kind) {
    case ARG_STRING: *(const char **)a->dest = value; return EXIT_DONE;
    case ARG_INT:
        if (args_int(value, a->lo, a->hi, a->dest)) return EXIT_DONE;
        return usage_error(c, "--%s wants a whole number from %.0f to %.0f, not '%s'", a->name,
                           a->lo, a->hi, value);
    case ARG_REAL:
        if (args_real(value, a->lo, a->hi, a->dest)) return EXIT_DONE;
        return usage_error(c, "--%s wants a number from %g to %g, not '%s'", a->name, a->lo, a->hi,
                           value);
    case ARG_LIST:
        if (list->n == ARG_LIST_MAX)
            return usage_error(c, "--%s may be given %d times at most", a->name, ARG_LIST_MAX);
        list->items[list->n++] = value;
        return EXIT_DONE;
    case ARG_SECTION:
    case ARG_FLAG: break;
    }
    CHECK(false && "an option with a value");
    return EXIT_USAGE;
}

/* argv[*i] is an option: consume it, and its value. */
static int parse_option(const struct command *c, int argc, char **argv, int *i) {
    char *word = argv[*i];
    bool is_long = word[1] == '-';
    char *name = word + (is_long ? 2 : 1), *value = NULL;
    if (is_long) {
        value = strchr(name, '=');
    } else if (name[1] != 0) {
        value = name + 1; /* -pTEXT */
    }
    size_t n = is_long && value ? (size_t)(value - name) : strlen(name);
    const struct arg *a = find_arg(c, name, n, is_long ? 0 : name[0]);
    if (!a)
        return usage_error(c, "there is no option %.*s",
                           (int)(value && is_long ? n + 2 : strlen(word)), word);
    if (is_long && value) value++;
    if (a->kind == ARG_FLAG) {
        if (value) return usage_error(c, "--%s takes no value", a->name);
        *(bool *)a->dest = true;
        return EXIT_DONE;
    }
    if (!value) {
        if (*i + 1 >= argc) return usage_error(c, "--%s wants a value: %s", a->name, a->value);
        value = argv[++*i];
    }
    return set_value(c, a, value);
}

bool args_parse(const struct command *c, int argc, char **argv, int *code) {
    bool options = true;
    *code = EXIT_DONE;
    if (c->rest) *c->rest = (struct operands){.items = argv};
    for (int i = 1; i < argc && *code == EXIT_DONE; i++) {
        if (options && strcmp(argv[i], "--") == 0) {
            options = false;
        } else if (options && (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)) {
            print_help(c);
            return false;
        } else if (options && argv[i][0] == '-' && argv[i][1] != 0) {
            *code = parse_option(c, argc, argv, &i);
        } else if (!c->rest) {
            *code = usage_error(c, "what is '%s'? No operands are taken", argv[i]);
        } else {
            c->rest->items[c->rest->n++] = argv[i];
        }
    }
    return *code == EXIT_DONE;
}
