/* The tokenizer's parts: vocabulary, merges, pre-tokenizer, NFC, conversation styles. Private to
 * moe/text*.c and their tests.
 *
 * Every part is built once by text_open from a file that is not trusted, and never changes after that:
 * what encoding writes lives in scratch memory of the call. */
#ifndef MOED_MOE_TEXT_INTERNAL_H
#define MOED_MOE_TEXT_INTERNAL_H

#include "moe/gguf.h"
#include "moe/text.h"

/* ---- vocabulary (text_vocab.c) ------------------------------------------------------------------ */

enum token_kind { /* tokenizer.ggml.token_type, GGUF's numbers */
                  TOKEN_NORMAL = 1,
                  TOKEN_UNKNOWN = 2,
                  TOKEN_CONTROL =
                      3, /* matched when special tokens are parsed; hidden when decoding on request */
                  TOKEN_USER_DEFINED =
                      4, /* matched when special tokens are parsed; text when decoding */
                  TOKEN_UNUSED = 5,
                  TOKEN_BYTE = 6
};

/* A piece and the 3 bytes a stream may hold back all become U+FFFD in the worst case. */
enum { TEXT_MAX_PIECE_BYTES = TEXT_STREAM_MAX_BYTES / 3 - 3 };

struct vocab {
    int32_t n;
    uint8_t *kind; /* [n] enum token_kind */
    uint8_t *piece; /* all pieces, end to end */
    uint32_t *first; /* [n+1] where each begins in piece */
    int32_t byte_id[256];
    int32_t *special; /* CONTROL and USER_DEFINED ids in byte order of their names */
    size_t n_special;
    bool special_lead[256]; /* a special token's name begins with this byte */
    int32_t eos_id; /* -1: none */
};

/* Ids by the string that the file spells them with, for reading the merges. Refers to the file. */
struct vocab_index {
    const struct bytes *tokens;
    int32_t *slot; /* [mask+1] id or -1 */
    size_t mask;
    uint64_t seed;
};

/* Zeroed structs in; after a failure vocab_free and vocab_index_free still apply. The index borrows
 * from g. */
enum status vocab_load(const struct gguf *g, struct error *e, struct vocab *v,
                       struct vocab_index *index);
void vocab_free(struct vocab *v);
void vocab_index_free(struct vocab_index *index);
int32_t vocab_index_find(const struct vocab_index *index, const void *s, size_t n); /* -1: none */
struct bytes vocab_piece(const struct vocab *v, int32_t id);
/* The id of the special token of this name, or -1. */
int32_t vocab_special_find(const struct vocab *v, const void *name, size_t n);
/* The longest special token that s begins with: its id and length, or -1. */
int32_t vocab_special_at(const struct vocab *v, const uint8_t *s, size_t n, size_t *len);

/* Mixes a seed into a hash, so that a file cannot be made whose keys all collide. */
uint64_t text_hash(const void *s, size_t n, uint64_t seed);
/* At most 48 bytes of s for an error sentence: valid UTF-8 without control characters, whatever s is. */
const char *text_printable(struct bytes s, char dst[64]);
/* A key that must be there and is not is a fault of the file. */
enum status text_required(enum status st, struct error *e);

/* ---- merges (text_bpe.c) ------------------------------------------------------------------------- */

struct merge {
    uint64_t pair; /* left id << 32 | right id */
    uint32_t rank; /* MERGE_NONE: empty slot */
    int32_t id; /* what the pair becomes */
};
#define MERGE_NONE UINT32_MAX

struct bpe {
    struct merge *slot; /* [mask+1] open addressing */
    size_t mask;
    uint64_t seed;
    const int32_t *byte_id; /* of the vocabulary */
};

struct id_list { /* the caller's array */
    int32_t *p;
    size_t cap, n;
};

/* Memory for words too long for the stack; zero to start, bpe_scratch_free at the end. */
struct bpe_scratch {
    void *memory;
    size_t cap_bytes;
};

enum status bpe_load(const struct gguf *g, const struct vocab *v, const struct vocab_index *index,
                     struct error *e, struct bpe *out);
void bpe_free(struct bpe *b);
/* Append the ids of one word. ST_TOO_LONG: the list is full. O(n log n). */
enum status bpe_word(const struct bpe *b, const uint8_t *s, size_t n, struct bpe_scratch *x,
                     struct id_list *out);
void bpe_scratch_free(struct bpe_scratch *x);

/* ---- pre-tokenizer (text_split.c) ---------------------------------------------------------------- */

struct splitter {
    void *pattern; /* pcre2_code */
};
/* One pass over a text; the pattern and the text must outlive it. */
struct split {
    const struct splitter *splitter;
    const uint8_t *s;
    size_t n, at;
    void *match, *limits;
};

/* pre: tokenizer.ggml.pre. jit false: interpreted matching, which is also the fallback where the
 * system forbids generated code. */
enum status splitter_open(struct bytes pre, bool jit, struct error *e, struct splitter *out);
void splitter_close(struct splitter *p);
/* s is well-formed UTF-8. */
enum status split_start(const struct splitter *p, const void *s, size_t n, struct split *out);
/* The next word; empty at the end. */
enum status split_next(struct split *x, struct bytes *word);
void split_end(struct split *x);

/* ---- NFC (text_nfc.c) ---------------------------------------------------------------------------- */

/* *out is s itself where s is seen to be in NFC, else memory in *owned, which the caller frees (NULL is
 * fine). s is well-formed UTF-8. O(n). */
enum status nfc_normalize(const void *s, size_t n, struct bytes *out, uint8_t **owned);

/* ---- conversations (text_chat.c) ------------------------------------------------------------------ */

struct chat_style;
/* By the name the user gave, or by the text of the file's template; NULL: unknown. */
const struct chat_style *chat_style_named(const char *name);
const struct chat_style *chat_style_of(struct bytes template_text);
const struct chat_style *chat_style_hashed(uint64_t fnv1a); /* of the template's text */
const char *chat_style_name(const struct chat_style *style);
const char *chat_style_names(void); /* for error sentences */

/* ---- the whole ------------------------------------------------------------------------------------ */

struct text {
    struct vocab vocab;
    struct bpe bpe;
    struct splitter splitter;
    const struct chat_style *chat; /* NULL: not known */
    bool has_template;
};

/* Append the ids of ordinary text: no special token is looked for. s is well-formed UTF-8. */
enum status text_encode_plain(const struct text *t, const uint8_t *s, size_t n,
                              struct id_list *out);

#endif
