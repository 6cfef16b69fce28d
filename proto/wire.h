/* wire: moed's protocol as plain structs. Encodes and decodes one frame; owns the limits that a
 * frame is held to. Only wire*.c see protobuf-c.
 *
 * On a ROUTER socket a message has three frames: [routing id][header, 32 bytes][body]; on a DEALER
 * two: [header][body]. The header is fixed and checked before the body is looked at.
 *
 * Header, little-endian:  0 magic "MOED"  4 major u8  5 minor u8  6 type u16  8 flags u32 (0)
 *                        12 body_bytes u32  16 request_id u64  24 reserved u64 (0)
 *
 * Pure functions of their arguments: no state, any thread. */
#ifndef MOED_PROTO_WIRE_H
#define MOED_PROTO_WIRE_H

#include "proto/base.h"

enum {
    WIRE_MAJOR = 1,
    WIRE_MINOR = 0,
    WIRE_HEADER_BYTES = 32,
    WIRE_MAX_BODY_BYTES = 4 << 20,
    WIRE_MAX_UNKNOWN_FIELDS = 16,
    WIRE_MAX_STOPS = 16,       /* stop strings, and as many stop ids, per request */
    WIRE_MAX_STOP_BYTES = 256, /* per stop string */
    WIRE_MAX_BIASES = 128,
    WIRE_MAX_TOP_LOGPROBS = 20,
    WIRE_MAX_CHOICES = 16,
    WIRE_MAX_MESSAGES = 1024, /* chat messages per prompt */
    WIRE_MAX_TAG_BYTES = 64,
    WIRE_ID_BYTES = 16 /* boot_id and session */
};

/* Message types. The numbers are the protocol; never reuse one. Even: to the server. */
enum wire_type {
    WIRE_HELLO = 2,
    WIRE_WELCOME = 3,
    WIRE_PING = 4,
    WIRE_PONG = 5,
    WIRE_BYE = 6,
    WIRE_GOODBYE = 7,
    WIRE_GOAWAY = 9,
    WIRE_SUBMIT = 16,
    WIRE_ACCEPTED = 17,
    WIRE_REJECTED = 19,
    WIRE_TOKEN_CHUNK = 21,
    WIRE_FINISHED = 23,
    WIRE_FAILED = 25,
    WIRE_CANCEL = 18,
    WIRE_ACK = 27,
    WIRE_CREDIT = 20,
    WIRE_MODEL_INFO = 32,
    WIRE_MODEL_INFO_RESULT = 33,
    WIRE_HEALTH = 34,
    WIRE_HEALTH_RESULT = 35,
    WIRE_STATS = 36,
    WIRE_STATS_RESULT = 37,
    WIRE_TOKENIZE = 38,
    WIRE_TOKENIZE_RESULT = 39,
    WIRE_DETOKENIZE = 40,
    WIRE_DETOKENIZE_RESULT = 41
};
const char *wire_type_name(enum wire_type type); /* "Submit"; "?" if unknown */

enum wire_reason { REASON_STOP = 1, REASON_LENGTH = 2, REASON_CANCELLED = 3, REASON_TIMEOUT = 4 };
const char *wire_reason_name(enum wire_reason reason); /* "stop", "length", … */

struct wire_header {
    uint8_t major, minor;
    uint16_t type; /* any number: an unknown one is the receiver's to answer UNIMPLEMENTED */
    uint32_t body_bytes;
    uint64_t request_id; /* 0 when the message is about the session */
};

/* ---- bodies. Arrays and bytes are borrowed: after decoding they lie in the arena. --------------
 *
 * What decoding promises of every message, besides what stands at the fields: floats are finite,
 * text is valid UTF-8 (NUL included), token ids are >= 0, status codes and reasons are ones of
 * this version. */

struct wire_hello {
    const uint32_t *majors;
    size_t n_majors;
    uint64_t features;
    struct bytes client; /* <= WIRE_MAX_TAG_BYTES */
};

struct wire_limits {
    uint32_t max_frame_bytes, max_inflight, credit_window, max_context_tokens, max_stops,
        max_choices;
};

struct wire_welcome {
    uint32_t major, minor;
    uint64_t features;
    uint8_t boot_id[WIRE_ID_BYTES];
    uint8_t session[WIRE_ID_BYTES];
    struct wire_limits limits;
    uint32_t heartbeat_ms;
    struct bytes model, server;
};

struct wire_ping {
    uint64_t nonce;
}; /* also Pong */

struct wire_goaway {
    uint32_t deadline_ms;
};

struct wire_goodbye {
    uint32_t code; /* enum status */
    struct bytes text;
    const uint32_t *majors;
    size_t n_majors;
};

struct wire_chat {
    struct bytes role, content;
};

struct wire_bias {
    int32_t token; /* >= 0; the vocabulary's size is the receiver's to check */
    float bias;    /* finite, |bias| <= 100 */
};

/* All floats are finite and in range after decoding; defaults are filled in. */
struct wire_sampling {
    float temperature;        /* 0 … 100; 0 = greedy */
    uint32_t top_k;           /* 0 = off */
    float top_p;              /* (0, 1] */
    float min_p;              /* [0, 1] */
    float repetition_penalty; /* (0, 100] */
    float presence_penalty, frequency_penalty; /* [-2, 2] */
    const struct wire_bias *bias;
    size_t n_bias;
    bool has_seed;
    uint64_t seed;
    bool logprobs;
    uint32_t top_logprobs; /* <= WIRE_MAX_TOP_LOGPROBS; > 0 implies logprobs */
};

struct wire_submit {
    struct bytes boot_id; /* 0 or 16 bytes */
    const int32_t *prompt_ids;
    size_t n_prompt_ids;
    struct bytes prompt_text; /* valid UTF-8 */
    const struct wire_chat *messages; /* valid UTF-8 */
    size_t n_messages; /* exactly one of the three prompts is non-empty after decoding */
    struct wire_sampling sampling;
    struct bytes stop[WIRE_MAX_STOPS]; /* non-empty valid UTF-8 */
    size_t n_stop;
    int32_t stop_ids[WIRE_MAX_STOPS];
    size_t n_stop_ids;
    bool has_max_tokens;
    uint32_t max_tokens; /* > 0 if present */
    uint32_t min_tokens; /* <= max_tokens if both are given */
    bool ignore_eos;
    uint32_t priority; /* 0, 1 or 2 */
    uint32_t ttl_ms;
    uint32_t n; /* 1 … WIRE_MAX_CHOICES */
    bool parse_special;
    struct bytes tag; /* valid UTF-8 */
};

struct wire_accepted {
    uint32_t prompt_tokens, queue_depth;
};

struct wire_rejected {
    uint32_t code; /* enum status, not ST_OK */
    struct bytes text;
    bool retryable;
    uint32_t retry_after_ms, queue_depth;
};

struct wire_top_logprob {
    int32_t token;
    float logprob;
};
struct wire_token_logprob {
    float logprob;
    const struct wire_top_logprob *top;
    size_t n_top;
};

struct wire_token_chunk {
    uint32_t choice, seq;
    const int32_t *ids;
    size_t n_ids;
    struct bytes text;
    const struct wire_token_logprob *logprobs; /* n_ids of them, or none */
    size_t n_logprobs;
    uint64_t session_seq;
};

struct wire_choice {
    uint32_t index;
    uint32_t reason; /* enum wire_reason */
    uint32_t completion_tokens, last_seq;
    uint64_t hash;
    struct bytes stop;
    bool has_stop_id;
    int32_t stop_id;
};
/* Running hash of a choice's ids: start with WIRE_HASH_START, then one call per id. FNV-1a 64 over
 * the id's four little-endian bytes. */
#define WIRE_HASH_START UINT64_C(0xcbf29ce484222325)
uint64_t wire_hash_id(uint64_t hash, int32_t id);

struct wire_finished {
    const struct wire_choice *choices;
    size_t n_choices;
    uint32_t prompt_tokens, cached_tokens, completion_tokens;
    double queue_ms, prefill_ms, decode_ms;
    uint32_t preemptions;
};

struct wire_failed {
    uint32_t code; /* enum status, not ST_OK */
    struct bytes text;
    bool retryable;
};

struct wire_credit {
    uint64_t session_seq;
};

struct wire_model_info {
    struct bytes name, architecture, backend, quantization;
    uint32_t n_layers, n_vocab, n_experts, n_experts_used, max_context_tokens;
    uint64_t weight_bytes, kv_bytes_per_token;
    int32_t eos_id; /* -1 if there is none */
};

struct wire_health {
    bool live, ready;
    uint32_t state; /* enum status: OK, LOADING, DRAINING, ENGINE_LOST */
    uint64_t uptime_ms, last_step_ms;
};

struct wire_counter {
    struct bytes name;
    double value;
};
struct wire_stats {
    const struct wire_counter *counters;
    size_t n_counters;
};

struct wire_tokenize { /* exactly one of text (may be empty) and messages */
    struct bytes text;
    const struct wire_chat *messages;
    size_t n_messages;
    bool parse_special;
};
struct wire_ids { /* TokenizeResult and Detokenize */
    const int32_t *ids;
    size_t n_ids;
};
struct wire_text { /* DetokenizeResult: any bytes, because ids may cut a character */
    struct bytes text;
};

/* One message of any type; read the member that `type` names. Bye, Cancel, Ack, ModelInfo, Health
 * and Stats have no body fields and no member. */
struct wire_msg {
    enum wire_type type;
    uint64_t request_id;
    union {
        struct wire_hello hello;
        struct wire_welcome welcome;
        struct wire_ping ping; /* Ping, Pong */
        struct wire_goaway goaway;
        struct wire_goodbye goodbye;
        struct wire_submit submit;
        struct wire_accepted accepted;
        struct wire_rejected rejected;
        struct wire_token_chunk chunk;
        struct wire_finished finished;
        struct wire_failed failed;
        struct wire_credit credit;
        struct wire_model_info model_info; /* ModelInfoResult */
        struct wire_health health;         /* HealthResult */
        struct wire_stats stats;           /* StatsResult */
        struct wire_tokenize tokenize;
        struct wire_ids ids; /* TokenizeResult, Detokenize */
        struct wire_text text; /* DetokenizeResult */
    };
};

/* Read and check a header frame of n bytes. ST_INVALID: wrong length, magic, flags or reserved;
 * ST_UNSUPPORTED: another major; ST_TOO_LARGE: body_bytes over WIRE_MAX_BODY_BYTES. */
enum status wire_header_decode(const void *p, size_t n, struct error *e, struct wire_header *out);
void wire_header_encode(const struct wire_header *h, uint8_t out[WIRE_HEADER_BYTES]);

/* What a body may use beside 8 times its bytes: WIRE_MAX_MESSAGES of the shortest messages fit. */
enum { WIRE_BUDGET_BYTES = 256 << 10 };

/* Decode and validate the body that belongs to header h. All memory comes from the arena (which the
 * caller resets after use): at most min(8 * n + 256 KiB, 32 MiB) of it. Errors: ST_INVALID with the
 * field named (malformed, out of range, not UTF-8, not finite, too many of something, n differs
 * from h->body_bytes); ST_TOO_LARGE when the budget runs out; ST_UNIMPLEMENTED for an unknown type.
 * *out is written only on ST_OK. */
enum status wire_decode(const struct wire_header *h, const void *body, size_t n, struct arena *a,
                        struct error *e, struct wire_msg *out);

/* Encode msg's body into dst. ST_TOO_LARGE if it exceeds cap or WIRE_MAX_BODY_BYTES (then *len is
 * the size needed) or if scratch (used above its current mark and restored) is too small (then
 * *len is 0). The message is trusted: CHECK on what decode would refuse by shape (more stops than
 * the array holds). */
enum status wire_encode(const struct wire_msg *msg, struct arena *scratch, uint8_t *dst, size_t cap,
                        size_t *len);

/* Arena bytes that always suffice for wire_decode of any frame. */
#define WIRE_ARENA_BYTES ((size_t)(33) << 20)

#endif
