/* text: byte-level BPE from a GGUF vocabulary, incremental detokenizing, ChatML rendering.
 *
 * A `struct text` is immutable after opening: any number of threads may use it. Encoding needs scratch
 * memory, which it allocates and frees itself; it belongs on a text thread, not in the event loop. */
#ifndef MOED_MOE_TEXT_H
#define MOED_MOE_TEXT_H

#include "proto/base.h"

struct text;

/* Read the tokenizer keys of a GGUF file (tensors are not looked at). ST_UNSUPPORTED names a tokenizer
 * model, pre-tokenizer or normaliser that we do not have; ST_CORRUPT names the key that is wrong.
 * chat_template: NULL = recognise the file's template; else the name of one that is used whatever the file
 * says: chatml, qwen2.5, qwen3 or qwq; ST_INVALID for any other name. */
enum status text_open(const char *gguf_path, const char *chat_template, struct error *e,
                      struct text **out);
void text_close(struct text *t); /* NULL is fine */

int32_t text_n_vocab(const struct text *t);
int32_t text_eos_id(const struct text *t); /* -1: none */
/* Ids that end a turn: eos, and <|im_end|>, <|endoftext|> where the vocabulary has them. Returns the
 * count; at most cap are written. */
int text_end_ids(const struct text *t, int32_t *dst, int cap);

/* Encode n bytes of UTF-8. parse_special: names of special tokens in the text become those tokens;
 * otherwise they are ordinary text. The text is NFC-normalised as the reference tokenizer does it.
 * ST_INVALID: not UTF-8. ST_TOO_LONG: more than cap ids (*n_ids is then unset). O(n log n). */
enum status text_encode(const struct text *t, const void *s, size_t n, bool parse_special,
                        int32_t *ids, size_t cap, size_t *n_ids);

/* The bytes of one token (special tokens: their name). Borrowed from t. Ids out of range: empty. */
struct bytes text_piece(const struct text *t, int32_t id);
/* Control tokens (token_type 3), which decoding may hide. User-defined ones (4: <think>, <tool_call>) are
 * parsed as special tokens are, but are text to a reader. */
bool text_is_special(const struct text *t, int32_t id);

/* Decode ids to bytes, replacing ill-formed UTF-8 by U+FFFD when `lossy`. skip_special leaves special
 * tokens out. ST_TOO_LARGE with *n set to the size needed if cap is short. */
enum status text_decode(const struct text *t, const int32_t *ids, size_t n_ids, bool skip_special,
                        bool lossy, char *dst, size_t cap, size_t *n);

/* Incremental detokenizing: push ids, get whole characters. Holds back up to 3 bytes that begin a
 * character. Plain data: copy it, zero it to start. */
struct text_stream {
    uint8_t pending[8];
    uint8_t n_pending;
};
enum { TEXT_STREAM_MAX_BYTES = 3072 }; /* most bytes one push can return; text_open refuses longer pieces */
/* Append id's bytes; write what is complete to dst (room for TEXT_STREAM_MAX_BYTES) and return its
 * length. Bytes that can never become a character come out as U+FFFD. Special tokens give nothing. */
size_t text_stream_push(const struct text *t, struct text_stream *s, int32_t id, char *dst);
/* The end: what is pending comes out as U+FFFD. */
size_t text_stream_finish(struct text_stream *s, char *dst);

struct text_message {
    struct bytes role, content; /* UTF-8 */
};
/* Render a conversation and open the assistant's turn. Special tokens inside content stay text: the
 * result is ids, so that a user cannot forge a turn. ST_UNSUPPORTED: the file's template is not one we
 * know, and how to choose one; ST_INVALID: no message, or a role the template does not have. */
enum status text_chat_encode(const struct text *t, const struct text_message *msgs, size_t n_msgs,
                             struct error *e, int32_t *ids, size_t cap, size_t *n_ids);

#endif
