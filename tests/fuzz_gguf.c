/* libFuzzer target: any bytes as a GGUF file, through opening, every getter, the architecture and reads of
 * every tensor's ends. Seeds: tests/data/fuzz-gguf (tests/make_fuzz_seeds.py). Run:
 *
 *     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_gguf
 *     build/fuzz/bin/fuzz_gguf -max_len=8192 /tmp/corpus tests/data/fuzz-gguf */
#include "moe/arch.h"
#include "moe/gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Read a string to its end, so that a wrong length is a report. */
static unsigned touch(struct bytes s) {
    unsigned sum = 0;
    for (size_t i = 0; i < s.n; i++) sum += s.p[i];
    return sum;
}

static unsigned touch_keys(const struct gguf *g) {
    static const char *const keys[] = {"general.architecture",      "general.name",
                                       "general.alignment",         "qwen3moe.block_count",
                                       "qwen3moe.rope.freq_base",   "tokenizer.ggml.tokens",
                                       "tokenizer.ggml.token_type", "tokenizer.ggml.add_bos_token"};
    unsigned sum = 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int64_t v;
        double d;
        bool flag;
        struct bytes s;
        const struct bytes *strings;
        const int32_t *ints;
        size_t n;
        if (gguf_get_int(g, keys[i], -5, 1000, NULL, &v) == ST_OK) sum += (unsigned)v;
        if (gguf_get_float(g, keys[i], -1, 1e9, NULL, &d) == ST_OK) sum += d > 0;
        if (gguf_get_bool(g, keys[i], NULL, &flag) == ST_OK) sum += flag;
        if (gguf_get_string(g, keys[i], NULL, &s) == ST_OK) sum += touch(s);
        if (gguf_string_array(g, keys[i], NULL, &strings, &n) == ST_OK)
            for (size_t k = 0; k < n; k++) sum += touch(strings[k]);
        if (gguf_int_array(g, keys[i], NULL, &ints, &n) == ST_OK)
            for (size_t k = 0; k < n; k++) sum += (unsigned)ints[k];
    }
    return sum;
}

static unsigned touch_tensors(const struct gguf *g, bool has_data) {
    unsigned sum = 0;
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        uint8_t ends[2];
        CHECK(gguf_tensor_find(g, t->name) == t);
        if (!has_data) continue;
        CHECK(gguf_tensor_read(g, t, 0, &ends[0], 1) == ST_OK);
        CHECK(gguf_tensor_read(g, t, t->n_bytes - 1, &ends[1], 1) == ST_OK);
        sum += ends[0] + ends[1];
    }
    return sum;
}

/* The last byte chooses between a whole file and metadata alone. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    static volatile unsigned sink;
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        if (fd < 0) abort();
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    bool metadata_only = size > 0 && data[size - 1] & 1;
    if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
    struct error e = {0};
    struct gguf *g;
    struct arch_model m;
    enum status st = gguf_open(path, metadata_only, &e, &g);
    if (st != ST_OK) {
        CHECK(e.code == st && e.text[0] && !g);
        return 0;
    }
    sink = sink + touch_keys(g) + touch_tensors(g, !metadata_only);
    st = arch_read(g, &e, &m);
    if (st == ST_OK)
        arch_free(&m);
    else
        CHECK(e.code == st && e.text[0]);
    gguf_close(g);
    return 0;
}
