/* See load_file.h. */
#include "daemon/load_file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char header[] = "layer,expert,devices,tokens\n";

/* What is read: the next line must be of the same layer and the next expert, or of the next layer and
 * expert 0, and all layers equally long. */
struct reading {
    uint64_t *tokens;
    size_t n, cap;
    unsigned layer, expert, n_experts; /* of the line expected; n_experts 0: not known yet */
};

static enum status take_line(struct reading *r, const char *line) {
    unsigned layer, expert;
    uint64_t tokens;
    int end = 0;
    if (sscanf(line, "%u,%u,%*[0-9+],%" SCNu64 "%n", &layer, &expert, &tokens, &end) != 3 ||
        strcmp(line + end, "\n") != 0)
        return ST_CORRUPT;
    if (r->n_experts == 0 && layer == 1 && r->layer == 0) {
        r->n_experts = r->expert;
        r->layer = 1;
        r->expert = 0;
    }
    if (layer != r->layer || expert != r->expert) return ST_CORRUPT;
    if (r->n == r->cap) {
        size_t cap = r->cap > 0 ? r->cap * 2 : 1024;
        uint64_t *p = realloc(r->tokens, cap * sizeof *p);
        if (!p) return ST_NO_MEMORY;
        r->tokens = p;
        r->cap = cap;
    }
    r->tokens[r->n++] = tokens;
    if (++r->expert == r->n_experts) {
        r->layer++;
        r->expert = 0;
    }
    return ST_OK;
}

enum status load_file_read(const char *path, struct error *e, uint64_t **tokens, size_t *n) {
    *tokens = NULL;
    *n = 0;
    FILE *f = fopen(path, "r");
    if (!f && errno == ENOENT) return ST_OK;
    if (!f) return error_set(e, ST_IO, "%s: %s", path, strerror(errno));
    struct reading r = {0};
    char line[256];
    int number = 1;
    bool any = fgets(line, sizeof line, f) != NULL;
    enum status st = any && strcmp(line, header) == 0 ? ST_OK : ST_CORRUPT;
    if (ferror(f)) st = ST_IO;
    while (st == ST_OK && fgets(line, sizeof line, f)) {
        number++;
        st = take_line(&r, line);
    }
    if (st == ST_OK && ferror(f)) st = ST_IO;
    if (st == ST_OK && (r.n == 0 || (r.n_experts > 0 && r.expert != 0))) st = ST_CORRUPT;
    fclose(f);
    if (st != ST_OK) {
        free(r.tokens);
        return error_set(e, st, "%s: line %d is not what a measured load looks like", path, number);
    }
    *tokens = r.tokens;
    *n = r.n;
    return ST_OK;
}

static void write_lines(FILE *f, const struct model_shape *shape, const uint64_t *tokens,
                        const uint16_t *held) {
    fputs(header, f);
    size_t i = 0;
    for (int32_t l = 0; l < shape->n_layers; l++) {
        for (int32_t x = 0; x < shape->n_experts; x++, i++) {
            fprintf(f, "%d,%d,", l, x);
            const char *between = "";
            for (int r = 0; r < MOE_MAX_RANKS; r++) {
                if (!(held[i] >> r & 1)) continue;
                fprintf(f, "%s%d", between, r);
                between = "+";
            }
            fprintf(f, ",%" PRIu64 "\n", tokens[i]);
        }
    }
}

enum status load_file_write(const char *path, const struct model_shape *shape, const uint64_t *tokens,
                            const uint16_t *held, struct error *e) {
    char *temporary = malloc(strlen(path) + 5);
    enum status st = temporary ? ST_OK : ST_NO_MEMORY;
    if (st == ST_OK) {
        sprintf(temporary, "%s.new", path);
        FILE *f = fopen(temporary, "w");
        if (f) write_lines(f, shape, tokens, held);
        bool written = f && !ferror(f);
        if (f) written &= fclose(f) == 0;
        if (!written || rename(temporary, path) != 0) st = ST_IO;
    }
    if (st != ST_OK) error_set(e, st, "%s: cannot be written: %s", path, strerror(errno));
    free(temporary);
    return st;
}
