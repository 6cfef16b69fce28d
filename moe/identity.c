/* identity: whether two files are the same model, without reading all of them. Quantised tensors of another
 * training or another quantisation differ nearly everywhere, so a few pieces of each tensor tell them apart. */
#include <string.h>

#include "moe/arch.h"
#include "moe/gguf.h"
#include "moe/moe.h"

enum { PIECE = 256, N_PIECES = 3 };

/* FNV-1a (Fowler, Noll, Vo), 64 bits. */
static void hash(uint64_t *h, const void *p, size_t n) {
    for (const uint8_t *at = p; n > 0; at++, n--) *h = (*h ^ *at) * UINT64_C(0x100000001b3);
}

static enum status hash_tensor(uint64_t *h, const struct gguf *g, const struct gguf_tensor *t) {
    uint8_t piece[PIECE];
    uint64_t type = (uint64_t)t->type;
    hash(h, t->name, strlen(t->name) + 1);
    hash(h, &type, sizeof type);
    hash(h, t->ne, sizeof t->ne);
    size_t n = t->n_bytes < PIECE ? t->n_bytes : PIECE;
    for (size_t i = 0; i < N_PIECES; i++) {
        enum status st = gguf_tensor_read(g, t, (t->n_bytes - n) / (N_PIECES - 1) * i, piece, n);
        if (st != ST_OK) return st;
        hash(h, piece, n);
    }
    return ST_OK;
}

enum status moe_identify(const char *model_path, struct error *e, struct moe_identity *out) {
    struct gguf *g;
    struct arch_model arch;
    *out = (struct moe_identity){.fingerprint = UINT64_C(0xcbf29ce484222325)};
    enum status st = gguf_open(model_path, false, e, &g);
    if (st != ST_OK) return st;
    st = arch_read(g, e, &arch);
    if (st == ST_OK) {
        out->shape = arch.shape;
        arch_free(&arch);
    }
    for (size_t i = 0; st == ST_OK && i < gguf_n_tensors(g); i++) {
        st = hash_tensor(&out->fingerprint, g, gguf_tensor_at(g, i));
        if (st != ST_OK) error_set(e, st, "%s cannot be read", model_path);
    }
    gguf_close(g);
    return st;
}
