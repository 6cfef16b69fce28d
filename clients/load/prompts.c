/* prompts: see load.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/load/load.h"

enum { MAX_FILE_BYTES = 256 << 20 };

/* splitmix64 (Steele, Lea, Flood 2014) over the three numbers. */
static uint64_t mix(uint64_t z) {
    z += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

double hash_uniform(uint64_t seed, uint64_t a, uint64_t b) {
    return (double)(mix(mix(mix(seed) ^ a) ^ b) >> 11) * 0x1p-53;
}

static bool read_json_line(struct prompt_line *line, size_t number, const char *path) {
    struct error e;
    json_error_t je;
    json_t *root = json_loads(line->text, JSON_ALLOW_NUL, &je);
    if (!root) {
        fprintf(stderr, "moed-load: %s:%zu: not JSON: %s\n", path, number, je.text);
        return false;
    }
    json_t *body = json_object_get(root, "body"); /* a line of a batch file */
    if (!body) body = root;
    enum status st = body_read(body, json_object_get(body, "messages") != NULL, &e, &line->body);
    json_decref(root);
    if (st != ST_OK) {
        fprintf(stderr, "moed-load: %s:%zu: %s\n", path, number, e.text);
        return false;
    }
    line->is_json = true;
    line->text = "";
    const struct wire_submit *s = &line->body.submit;
    const json_t *last = json_array_get(json_object_get(line->body.root, "messages"),
                                        s->n_messages > 0 ? s->n_messages - 1 : 0);
    const char *text = json_string_value(last ? json_object_get(last, "content")
                                              : json_object_get(line->body.root, "prompt"));
    if (text) line->text = text;
    return true;
}

static bool add_line(struct prompts *p, size_t *cap, char *text, size_t number, const char *path) {
    if (p->n_lines == *cap) {
        size_t want = *cap ? *cap * 2 : 64;
        struct prompt_line *lines = realloc(p->lines, want * sizeof *lines);
        if (!lines) return false;
        p->lines = lines;
        *cap = want;
    }
    struct prompt_line *line = &p->lines[p->n_lines++];
    *line = (struct prompt_line){.text = text};
    return text[0] != '{' || read_json_line(line, number, path);
}

bool prompts_open(const struct load_options *o, const struct wire_model_info *m,
                  struct prompts *out) {
    *out = (struct prompts){.o = o, .n_vocab = m->n_vocab};
    if (!o->prompts_path) return true;
    size_t n, cap = 0, number = 0;
    out->text = read_text_file("moed-load", o->prompts_path, MAX_FILE_BYTES, &n);
    bool good = out->text != NULL;
    for (char *s = out->text; good && s && *s;) {
        char *eol = strchr(s, '\n');
        if (eol) *eol = 0;
        number++;
        size_t len = strlen(s);
        if (len > 0 && s[len - 1] == '\r') s[--len] = 0;
        if (len > 0) good = add_line(out, &cap, s, number, o->prompts_path);
        s = eol ? eol + 1 : NULL;
    }
    if (good && out->n_lines == 0) {
        fprintf(stderr, "moed-load: %s holds no prompt\n", o->prompts_path);
        good = false;
    }
    for (size_t i = 0; i < out->n_lines; i++) /* the array has its place now */
        out->lines[i].message = (struct wire_chat){bytes_of("user"), bytes_of(out->lines[i].text)};
    if (!good) prompts_close(out);
    return good;
}

void prompts_close(struct prompts *p) {
    for (size_t i = 0; i < p->n_lines; i++)
        if (p->lines[i].is_json) body_free(&p->lines[i].body);
    free(p->lines);
    free(p->text);
    *p = (struct prompts){0};
}

static void random_prompt(const struct prompts *p, uint64_t number, int32_t *ids,
                          struct wire_submit *s) {
    size_t n = (size_t)p->o->prompt_tokens;
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(hash_uniform((uint64_t)p->o->seed, number, i) * p->n_vocab);
    s->prompt_ids = ids;
    s->n_prompt_ids = n;
    s->ignore_eos = true;
}

void prompts_get(const struct prompts *p, uint64_t number, int32_t *ids, struct wire_submit *s) {
    const struct prompt_line *line = p->n_lines > 0 ? &p->lines[number % p->n_lines] : NULL;
    const json_t *given = line && line->is_json ? line->body.root : NULL;
    *s = (struct wire_submit){.sampling = {.top_p = 1, .repetition_penalty = 1},
                              .priority = 1,
                              .n = 1,
                              .parse_special = true};
    if (given)
        *s = line->body.submit;
    else if (!line)
        random_prompt(p, number, ids, s);
    else if (p->o->raw)
        s->prompt_text = line->message.content;
    else {
        s->messages = &line->message;
        s->n_messages = 1;
    }
    /* What a line says of itself goes before the options. */
    if (!json_object_get(given, "temperature")) s->sampling.temperature = (float)p->o->temperature;
    if (!json_object_get(given, "seed")) {
        s->sampling.has_seed = true;
        s->sampling.seed = (uint64_t)p->o->seed + number;
    }
    if (!s->has_max_tokens) {
        s->has_max_tokens = true;
        s->max_tokens = (uint32_t)p->o->max_tokens;
    }
    if (p->o->ignore_eos) s->ignore_eos = true;
}

const char *prompts_text(const struct prompts *p, uint64_t number) {
    return p->n_lines > 0 ? p->lines[number % p->n_lines].text : "";
}
