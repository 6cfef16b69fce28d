/* Conversations as ids.
 *
 * A file's chat template is a program in another language; it is recognised, never run. For plain
 * conversations (system, user and assistant turns without tools) each template in the table below amounts
 * to ChatML with the differences that its style states. Recognition is by a hash of the template's text:
 * it guards against mistakes, not against a forger, who gains nothing but one of these same styles.
 *
 * What comes from the template may be special tokens; what comes from a message never is, whatever it
 * spells. Template text and message text between two special tokens are encoded together, as the
 * reference tokenizer sees them: "user\n" and a newline that begins the message are one word. */
#include "moe/text_internal.h"

#include <stdlib.h>
#include <string.h>

enum chat_think {
    THINK_KEPT, /* an assistant's content as it is */
    THINK_STRIPPED, /* all but the last message: only what follows the last </think> */
    THINK_REWRITTEN /* Qwen3's: see assistant_qwen3 */
};

struct chat_style {
    const char *name;
    const char *default_system; /* when the conversation does not begin with a system message */
    enum chat_think think;
    const char *opening; /* of the assistant's turn */
};

static const struct chat_style styles[] = {
    {"chatml", NULL, THINK_KEPT, "<|im_start|>assistant\n"},
    {"qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", THINK_KEPT,
     "<|im_start|>assistant\n"},
    {"qwen3", NULL, THINK_REWRITTEN, "<|im_start|>assistant\n"},
    {"qwq", NULL, THINK_STRIPPED, "<|im_start|>assistant\n<think>\n</think>"},
};

/* Templates whose renderings of plain conversations were compared with these styles by running them
 * (tests/make_chat.py prints the rows). The hash leaves out one newline at the end of the text. */
static const struct {
    uint64_t fnv1a;
    const char *style;
} known[] = {
    {0xa41d6bae9b9141bc, "chatml"}, /* the plainest, as in many files */
    {0x2bdb6446f8d36516, "chatml"}, /* the same with spaces; the bundled model's */
    {0x17fde6ecda9c7c01, "chatml"}, /* the same with a default for add_generation_prompt */
    {0x21dc9ed0659009cb, "chatml"}, /* Qwen3-Coder */
    {0xe642ce246d7f2e3d, "qwen2.5"}, {0x2bfdb7aa9754484e, "qwen3"}, {0x40c4db92561734c8, "qwq"},
};

const char *chat_style_name(const struct chat_style *style) { return style->name; }
const char *chat_style_names(void) { return "chatml, qwen2.5, qwen3, qwq"; }

const struct chat_style *chat_style_named(const char *name) {
    for (size_t i = 0; i < sizeof styles / sizeof *styles; i++)
        if (strcmp(styles[i].name, name) == 0) return &styles[i];
    return NULL;
}

const struct chat_style *chat_style_hashed(uint64_t fnv1a) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].fnv1a == fnv1a) return chat_style_named(known[i].style);
    return NULL;
}

const struct chat_style *chat_style_of(struct bytes template_text) {
    size_t n = template_text.n;
    if (n > 0 && template_text.p[n - 1] == '\n') n--;
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < n; i++) h = (h ^ template_text.p[i]) * UINT64_C(0x100000001b3);
    return chat_style_hashed(h);
}

/* ---- output: runs of ordinary text between special tokens ------------------------------------------------ */

struct render {
    const struct text *t;
    struct id_list ids;
    uint8_t *run; /* ordinary text since the last special token */
    size_t n, cap;
    enum status st; /* the first failure; nothing happens after it */
};

static void put_content(struct render *r, struct bytes s) {
    size_t want;
    if (r->st != ST_OK || s.n == 0) return;
    if (!size_add(r->n, s.n, &want)) {
        r->st = ST_TOO_LONG;
        return;
    }
    if (want > r->cap) {
        size_t cap = want + want / 2;
        uint8_t *p = realloc(r->run, cap);
        if (!p) {
            r->st = ST_NO_MEMORY;
            return;
        }
        r->run = p;
        r->cap = cap;
    }
    memcpy(r->run + r->n, s.p, s.n);
    r->n = want;
}

static void end_run(struct render *r) {
    if (r->st == ST_OK) r->st = text_encode_plain(r->t, r->run, r->n, &r->ids);
    r->n = 0;
}

/* Text of the template itself. */
static void put_template(struct render *r, const char *text) {
    const uint8_t *s = (const uint8_t *)text;
    size_t n = strlen(text);
    while (n > 0 && r->st == ST_OK) {
        size_t len = 1;
        int32_t id = vocab_special_at(&r->t->vocab, s, n, &len);
        if (id < 0) {
            put_content(r, (struct bytes){s, len});
        } else {
            end_run(r);
            if (r->st == ST_OK && r->ids.n == r->ids.cap) r->st = ST_TOO_LONG;
            if (r->st == ST_OK) r->ids.p[r->ids.n++] = id;
        }
        s += len;
        n -= len;
    }
}

static void put_turn(struct render *r, const char *role, struct bytes content) {
    put_template(r, "<|im_start|>");
    put_template(r, role);
    put_template(r, "\n");
    put_content(r, content);
    put_template(r, "<|im_end|>\n");
}

/* ---- pieces of a message ------------------------------------------------------------------------------------ */

static struct bytes of(const char *s) { return (struct bytes){(const uint8_t *)s, strlen(s)}; }
static bool is(struct bytes b, const char *s) {
    return b.n == strlen(s) && memcmp(b.p, s, b.n) == 0;
}

static struct bytes strip_left(struct bytes b) {
    while (b.n > 0 && b.p[0] == '\n') {
        b.p++;
        b.n--;
    }
    return b;
}

static struct bytes strip_right(struct bytes b) {
    while (b.n > 0 && b.p[b.n - 1] == '\n') b.n--;
    return b;
}

static const uint8_t *find(struct bytes b, struct bytes mark) {
    return b.n > 0 ? memmem(b.p, b.n, mark.p, mark.n) : NULL;
}

static struct bytes before_first(struct bytes b, const char *mark) {
    const uint8_t *p = find(b, of(mark));
    if (p) b.n = (size_t)(p - b.p);
    return b;
}

static struct bytes after_last(struct bytes b, const char *mark) {
    const uint8_t *p;
    while ((p = find(b, of(mark)))) {
        size_t skip = (size_t)(p - b.p) + strlen(mark);
        b.p += skip;
        b.n -= skip;
    }
    return b;
}

static bool is_tool_response(struct bytes b) {
    static const char begin[] = "<tool_response>", end[] = "</tool_response>";
    return b.n >= sizeof begin - 1 && b.n >= sizeof end - 1 &&
           memcmp(b.p, begin, sizeof begin - 1) == 0 &&
           memcmp(b.p + b.n - (sizeof end - 1), end, sizeof end - 1) == 0;
}

/* ---- rendering ------------------------------------------------------------------------------------------------ */

/* Index of the last question a person asked; Qwen3 keeps reasoning only after it. */
static size_t last_query(const struct text_message *msgs, size_t n) {
    for (size_t i = n; i-- > 0;)
        if (is(msgs[i].role, "user") && !is_tool_response(msgs[i].content)) return i;
    return n - 1;
}

/* Qwen3: reasoning is cut out of an assistant's message, and put back, in its own form, only into
 * messages after the last question (into the last message of all even when there is none). */
static void assistant_qwen3(struct render *r, struct bytes whole, bool after_query, bool last) {
    struct bytes content = whole, reasoning = {NULL, 0};
    if (find(whole, of("</think>"))) {
        content = strip_left(after_last(whole, "</think>"));
        reasoning = strip_right(before_first(whole, "</think>"));
        reasoning = strip_left(after_last(reasoning, "<think>"));
    }
    put_template(r, "<|im_start|>assistant\n");
    if (after_query && (last || reasoning.n > 0)) {
        put_template(r, "<think>\n");
        put_content(r, reasoning);
        put_template(r, "\n</think>\n\n");
        content = strip_left(content);
    }
    put_content(r, content);
    put_template(r, "<|im_end|>\n");
}

static void render_all(struct render *r, const struct text_message *msgs, size_t n) {
    const struct chat_style *style = r->t->chat;
    size_t query = last_query(msgs, n);
    if (style->default_system && !is(msgs[0].role, "system"))
        put_turn(r, "system", of(style->default_system));
    for (size_t i = 0; i < n && r->st == ST_OK; i++) {
        struct bytes content = msgs[i].content;
        bool last = i + 1 == n;
        if (is(msgs[i].role, "system"))
            put_turn(r, "system", content);
        else if (is(msgs[i].role, "user"))
            put_turn(r, "user", content);
        else if (style->think == THINK_REWRITTEN)
            assistant_qwen3(r, content, i > query, last);
        else if (style->think == THINK_STRIPPED && !last)
            put_turn(r, "assistant", strip_left(after_last(content, "</think>")));
        else
            put_turn(r, "assistant", content);
    }
    put_template(r, style->opening);
    end_run(r);
}

static enum status chat_check(const struct text *t, const struct text_message *msgs, size_t n,
                              struct error *e) {
    if (!t->chat)
        return error_set(e, ST_UNSUPPORTED,
                         "the model's file has %s; choose one with --chat-template chatml (there "
                         "are: %s)",
                         t->has_template ? "a chat template that is not known here"
                                         : "no chat template",
                         chat_style_names());
    if (vocab_special_find(&t->vocab, "<|im_start|>", 12) < 0 ||
        vocab_special_find(&t->vocab, "<|im_end|>", 10) < 0)
        return error_set(e, ST_UNSUPPORTED,
                         "the chat template %s needs the special tokens <|im_start|> and "
                         "<|im_end|>, which the vocabulary does not have: send plain prompts",
                         t->chat->name);
    if (n == 0) return error_set(e, ST_INVALID, "a conversation needs at least one message");
    for (size_t i = 0; i < n; i++) {
        if (!is(msgs[i].role, "system") && !is(msgs[i].role, "user") &&
            !is(msgs[i].role, "assistant"))
            return error_set(e, ST_INVALID,
                             "the role of message %zu must be system, user or assistant", i);
        if (!utf8_valid(msgs[i].content.p, msgs[i].content.n))
            return error_set(e, ST_INVALID, "the content of message %zu is not UTF-8", i);
    }
    return ST_OK;
}

enum status text_chat_encode(const struct text *t, const struct text_message *msgs, size_t n_msgs,
                             struct error *e, int32_t *ids, size_t cap, size_t *n_ids) {
    enum status st = chat_check(t, msgs, n_msgs, e);
    if (st != ST_OK) return st;
    struct render r = {.t = t, .ids = {ids, cap, 0}};
    render_all(&r, msgs, n_msgs);
    free(r.run);
    if (r.st == ST_TOO_LONG)
        return error_set(e, ST_TOO_LONG, "the conversation is longer than %zu tokens", cap);
    if (r.st != ST_OK)
        return error_set(e, r.st,
                         r.st == ST_NO_MEMORY ? "no memory for the conversation"
                                              : "the conversation could not be encoded");
    *n_ids = r.ids.n;
    return ST_OK;
}
