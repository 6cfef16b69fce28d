/* moed-tokenize: how fast is text encoded and decoded? One thread; the best of several rounds, since
 * anything slower was disturbed. */
#include "moe/text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 7, MAX_BYTES = 256 << 20 };

static int usage(void) {
    fprintf(
        stderr,
        "moed-tokenize MODEL.gguf TEXT: encodes and decodes the file TEXT with the model's\n"
        "vocabulary and prints milliseconds to open, bytes, ids and MB/s (1 MB = 10^6 bytes)\n");
    return 2;
}

static char *read_all(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *p = f ? malloc(MAX_BYTES) : NULL;
    if (!p) {
        fprintf(stderr, "moed-tokenize: cannot read %s\n", path);
        exit(1);
    }
    *n = fread(p, 1, MAX_BYTES, f);
    fclose(f);
    return p;
}

static double seconds_since(uint64_t start) { return (double)(clock_now_ns() - start) * 1e-9; }

int main(int argc, char **argv) {
    if (argc != 3) return usage();
    struct error e = {0};
    struct text *t;
    uint64_t start = clock_now_ns();
    if (text_open(argv[1], NULL, &e, &t) != ST_OK) {
        fprintf(stderr, "moed-tokenize: %s\n", e.text);
        return 1;
    }
    double open_s = seconds_since(start), encode_s = 1e9, decode_s = 1e9;
    size_t n, cap, n_ids = 0, n_back = 0;
    char *s = read_all(argv[2], &n);
    cap = 3 * n + 1; /* normalisation at most triples a text */
    int32_t *ids = malloc(cap * sizeof *ids);
    char *back = malloc(cap);
    enum status st = ids && back ? ST_OK : ST_NO_MEMORY;
    for (int i = 0; i < ROUNDS && st == ST_OK; i++) {
        start = clock_now_ns();
        st = text_encode(t, s, n, true, ids, cap, &n_ids);
        double took = seconds_since(start);
        if (took < encode_s) encode_s = took;
        if (st != ST_OK) break;
        start = clock_now_ns();
        st = text_decode(t, ids, n_ids, false, true, back, cap, &n_back);
        took = seconds_since(start);
        if (took < decode_s) decode_s = took;
    }
    if (st != ST_OK)
        fprintf(stderr, "moed-tokenize: %s\n", status_name(st));
    else
        printf("open %.0f ms; %zu bytes, %zu ids; encode %.1f MB/s; decode %.1f MB/s\n",
               open_s * 1e3, n, n_ids, (double)n / encode_s * 1e-6,
               (double)n_back / decode_s * 1e-6);
    free(back);
    free(ids);
    free(s);
    text_close(t);
    return st == ST_OK ? 0 : 1;
}
