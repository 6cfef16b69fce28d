/* The pre-tokenizer: cuts text into words, which byte-pair encoding never joins again.
 *
 * The cut is a regular expression, named by tokenizer.ggml.pre, that matches at every position of every
 * text; each match is one word. A row of the table below is one such expression.
 *
 * No text can make it hang: the expressions have no nested repeats, so that a match costs no more than
 * the run of characters it looks at, and PCRE2's own limits (proportional to the text for matching steps,
 * constant for depth and memory) stand behind that. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "moe/text_internal.h"

#include <stdio.h>
#include <string.h>

/* Unicode's White_Space, which is what \s means to the reference tokenizer. PCRE2's own \s also holds
 * U+180E. */
#define SPACE                                                                                      \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"    \
    "\\x{205f}\\x{3000}"

/* Expressions as in the models' tokenizer.json. Letters and numbers are those of PCRE2's Unicode version
 * (14 in PCRE2 10.42); the reference's may be newer. */
static const struct {
    const char *name, *pattern;
} pre_tokenizers[] = {
    {"qwen2", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
              "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|[" SPACE "]*[\\r\\n]+"
              "|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+"},
};

enum { DEPTH_LIMIT = 1000, HEAP_LIMIT_KIB = 1024 };

enum status splitter_open(struct bytes pre, bool jit, struct error *e, struct splitter *out) {
    const char *pattern = NULL;
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof *pre_tokenizers; i++)
        if (strlen(pre_tokenizers[i].name) == pre.n &&
            memcmp(pre_tokenizers[i].name, pre.p, pre.n) == 0)
            pattern = pre_tokenizers[i].pattern;
    if (!pattern) {
        char name[64];
        return error_set(e, ST_UNSUPPORTED,
                         "tokenizer.ggml.pre '%s' is not supported (supported: qwen2)",
                         text_printable(pre, name));
    }
    int code;
    PCRE2_SIZE at;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_NO_AUTO_CAPTURE,
                                   &code, &at, NULL);
    if (!re) {
        PCRE2_UCHAR why[128] = {0};
        pcre2_get_error_message(code, why, sizeof why);
        return error_set(e, ST_INTERNAL, "the pre-tokenizer does not compile: %s",
                         (const char *)why);
    }
    /* Where generated code is not allowed this fails and matching is interpreted. */
    if (jit) (void)pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);
    out->pattern = re;
    return ST_OK;
}

void splitter_close(struct splitter *p) {
    pcre2_code_free(p->pattern);
    p->pattern = NULL;
}

enum status split_start(const struct splitter *p, const void *s, size_t n, struct split *out) {
    *out = (struct split){.splitter = p, .s = s, .n = n};
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    out->limits = limits;
    out->match = pcre2_match_data_create(1, NULL);
    if (!out->limits || !out->match) {
        split_end(out);
        return ST_NO_MEMORY;
    }
    size_t steps = n < UINT32_MAX / 4 ? 4 * n + 1000 : UINT32_MAX;
    pcre2_set_match_limit(limits, (uint32_t)steps);
    pcre2_set_depth_limit(limits, DEPTH_LIMIT);
    pcre2_set_heap_limit(limits, HEAP_LIMIT_KIB);
    return ST_OK;
}

enum status split_next(struct split *x, struct bytes *word) {
    *word = (struct bytes){x->s + x->at, 0};
    if (x->at == x->n) return ST_OK;
    /* The caller validated the text; validating again at each word would make this quadratic. */
    int rc = pcre2_match(x->splitter->pattern, x->s, x->n, x->at, PCRE2_NO_UTF_CHECK, x->match,
                         x->limits);
    if (rc < 0) return rc == PCRE2_ERROR_NOMEMORY ? ST_NO_MEMORY : ST_INTERNAL;
    size_t end = pcre2_get_ovector_pointer(x->match)[1];
    if (end <= x->at) return ST_INTERNAL;
    word->n = end - x->at;
    x->at = end;
    return ST_OK;
}

void split_end(struct split *x) {
    pcre2_match_data_free(x->match);
    pcre2_match_context_free(x->limits);
    *x = (struct split){0};
}
