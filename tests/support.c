/* See support.h. */
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint8_t *test_read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("cannot open %s", path);
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    uint8_t *p = malloc((size_t)size + 1);
    if (!p || fread(p, 1, (size_t)size, f) != (size_t)size) fail_msg("cannot read %s", path);
    fclose(f);
    p[size] = 0;
    *n = (size_t)size;
    return p;
}

char *test_write_temp(const void *p, size_t n) {
    char *path = strdup("/tmp/moed-test-XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0) fail_msg("mkstemp");
    const uint8_t *b = p;
    while (n > 0) {
        ssize_t w = write(fd, b, n);
        if (w <= 0) fail_msg("write %s", path);
        b += w;
        n -= (size_t)w;
    }
    close(fd);
    return path;
}

uint64_t test_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

float test_uniform(uint64_t *state, float lo, float hi) {
    float u = (float)(test_random(state) >> 40) * 0x1p-24f;
    return lo + (hi - lo) * u;
}

static int next_int(void) {
    char *w = strtok(NULL, " \n");
    if (!w) fail_msg("golden: a line is short");
    return atoi(w);
}

static double next_float(void) {
    char *w = strtok(NULL, " \n");
    if (!w) fail_msg("golden: a line is short");
    return atof(w);
}

static int32_t *next_ids(int *n) {
    *n = next_int();
    int32_t *ids = calloc((size_t)*n + 1, sizeof *ids);
    for (int i = 0; i < *n; i++) ids[i] = next_int();
    return ids;
}

static void golden_line(struct golden *g, struct golden_prompt *p, const char *word) {
    if (strcmp(word, "ids") == 0) {
        p->ids = next_ids(&p->n_ids);
    } else if (strcmp(word, "greedy") == 0) {
        p->greedy = next_ids(&p->n_greedy);
    } else if (strcmp(word, "margins") == 0) {
        int n = next_int();
        p->margins = calloc((size_t)n + 1, sizeof *p->margins);
        for (int i = 0; i < n; i++) p->margins[i] = (float)next_float();
    } else if (strcmp(word, "nll") == 0) {
        p->nll = next_float();
    } else if (strcmp(word, "top8") == 0) {
        int n = next_int();
        for (int i = 0; i < n && i < 8; i++) {
            p->top8_ids[i] = next_int();
            p->top8_logprobs[i] = (float)next_float();
        }
    } else if (strcmp(word, "full") == 0) {
        p->has_full = 1;
        size_t offset = (size_t)next_int();
        p->n_tokens = next_int();
        p->n_vocab = next_int();
        p->n_layers = next_int();
        p->n_embd = next_int();
        p->logits = g->f32 + offset / sizeof(float);
        p->hidden = p->logits + (size_t)p->n_tokens * (size_t)p->n_vocab;
    } else if (strcmp(word, "route") == 0) {
        p->routes = realloc(p->routes, (size_t)(p->n_routes + 1) * sizeof *p->routes);
        struct golden_route *r = &p->routes[p->n_routes++];
        r->layer = next_int();
        r->pos = next_int();
        r->n = next_int();
        for (int i = 0; i < r->n && i < 8; i++) {
            r->ids[i] = next_int();
            r->weights[i] = (float)next_float();
        }
    } else if (strcmp(word, "end") != 0) {
        fail_msg("golden: unknown keyword %s", word);
    }
}

struct golden *golden_load(void) {
    struct golden *g = calloc(1, sizeof *g);
    size_t n;
    g->f32 = (float *)(void *)test_read_file(TEST_DATA "/tiny-moe-q4_k_m.f32", &n);
    FILE *f = fopen(TEST_DATA "/tiny-moe-q4_k_m.golden", "r");
    if (!f) fail_msg("no golden file");
    char *line = NULL;
    size_t cap = 0;
    while (getline(&line, &cap, f) > 0) {
        char *word = strtok(line, " \n");
        if (!word) continue;
        if (strcmp(word, "prompt") == 0) {
            g->prompts = realloc(g->prompts, (size_t)(g->n_prompts + 1) * sizeof *g->prompts);
            struct golden_prompt *p = &g->prompts[g->n_prompts++];
            memset(p, 0, sizeof *p);
            snprintf(p->name, sizeof p->name, "%s", strtok(NULL, " \n"));
        } else {
            if (g->n_prompts == 0) fail_msg("golden: no prompt line");
            golden_line(g, &g->prompts[g->n_prompts - 1], word);
        }
    }
    free(line);
    fclose(f);
    return g;
}

void golden_free(struct golden *g) {
    for (int i = 0; i < g->n_prompts; i++) {
        free(g->prompts[i].ids);
        free(g->prompts[i].greedy);
        free(g->prompts[i].margins);
        free(g->prompts[i].routes);
    }
    free(g->prompts);
    free(g->f32);
    free(g);
}
