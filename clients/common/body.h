/* body: the JSON body of an OpenAI-style request (chat completions or completions) as a Submit. A
 * field that would change the meaning of the answer and that we do not serve is refused by name,
 * never ignored.
 *
 * Pure; single thread per struct. */
#ifndef MOED_CLIENTS_COMMON_BODY_H
#define MOED_CLIENTS_COMMON_BODY_H

#include <jansson.h>

#include "proto/base.h"
#include "proto/wire.h"

struct body {
    struct wire_submit submit; /* points into the members below */
    bool chat;
    bool logprobs; /* asked for: top_logprobs may be 0 */
    json_t *root; /* a reference: it owns the strings */
    struct wire_chat *messages;
    char **joined; /* contents that came in parts; [n_joined] */
    size_t n_joined;
    int32_t *prompt_ids;
    struct wire_bias *bias;
};

/* Read `root` (borrowed; a reference is kept). chat: `messages` is wanted, else `prompt`.
 * ST_INVALID or ST_UNSUPPORTED with the field named. On failure nothing is to be freed. */
enum status body_read(json_t *root, bool chat, struct error *e, struct body *out);
void body_free(struct body *b);

#endif
