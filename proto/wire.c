/* wire: the frame header, the names and the stream hash. Bodies are in wire_decode.c and
 * wire_encode.c; see wire.h. Pure functions, any thread. */
#include "proto/wire.h"

#include <string.h>

static const uint8_t magic[4] = {'M', 'O', 'E', 'D'};

/* Little-endian whatever the host is: compilers turn these loops into one load or store. */
static uint64_t get_le(const uint8_t *p, int n) {
    uint64_t v = 0;
    for (int i = 0; i < n; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static void put_le(uint8_t *p, int n, uint64_t v) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(v >> (8 * i));
}

enum status wire_header_decode(const void *p, size_t n, struct error *e, struct wire_header *out) {
    const uint8_t *h = p;
    if (n != WIRE_HEADER_BYTES)
        return error_set(e, ST_INVALID, "header has %zu bytes: must be %d", n, WIRE_HEADER_BYTES);
    if (memcmp(h, magic, sizeof magic) != 0)
        return error_set(e, ST_INVALID, "header does not start with MOED");
    if (h[4] != WIRE_MAJOR)
        return error_set(e, ST_UNSUPPORTED, "header's major is %d: this side speaks %d", h[4],
                         WIRE_MAJOR);
    if (get_le(h + 8, 4) != 0) return error_set(e, ST_INVALID, "header's flags must be 0");
    if (get_le(h + 24, 8) != 0) return error_set(e, ST_INVALID, "header's reserved must be 0");
    uint32_t body_bytes = (uint32_t)get_le(h + 12, 4);
    if (body_bytes > WIRE_MAX_BODY_BYTES)
        return error_set(e, ST_TOO_LARGE, "header's body_bytes is %u: at most %d", body_bytes,
                         WIRE_MAX_BODY_BYTES);
    *out = (struct wire_header){
        .major = h[4],
        .minor = h[5],
        .type = (uint16_t)get_le(h + 6, 2),
        .body_bytes = body_bytes,
        .request_id = get_le(h + 16, 8),
    };
    return ST_OK;
}

void wire_header_encode(const struct wire_header *h, uint8_t out[WIRE_HEADER_BYTES]) {
    memset(out, 0, WIRE_HEADER_BYTES);
    memcpy(out, magic, sizeof magic);
    out[4] = h->major;
    out[5] = h->minor;
    put_le(out + 6, 2, h->type);
    put_le(out + 12, 4, h->body_bytes);
    put_le(out + 16, 8, h->request_id);
}

const char *wire_type_name(enum wire_type type) {
    switch (type) {
    case WIRE_HELLO: return "Hello";
    case WIRE_WELCOME: return "Welcome";
    case WIRE_PING: return "Ping";
    case WIRE_PONG: return "Pong";
    case WIRE_BYE: return "Bye";
    case WIRE_GOODBYE: return "Goodbye";
    case WIRE_GOAWAY: return "Goaway";
    case WIRE_SUBMIT: return "Submit";
    case WIRE_ACCEPTED: return "Accepted";
    case WIRE_REJECTED: return "Rejected";
    case WIRE_TOKEN_CHUNK: return "TokenChunk";
    case WIRE_FINISHED: return "Finished";
    case WIRE_FAILED: return "Failed";
    case WIRE_CANCEL: return "Cancel";
    case WIRE_ACK: return "Ack";
    case WIRE_CREDIT: return "Credit";
    case WIRE_MODEL_INFO: return "ModelInfo";
    case WIRE_MODEL_INFO_RESULT: return "ModelInfoResult";
    case WIRE_HEALTH: return "Health";
    case WIRE_HEALTH_RESULT: return "HealthResult";
    case WIRE_STATS: return "Stats";
    case WIRE_STATS_RESULT: return "StatsResult";
    case WIRE_TOKENIZE: return "Tokenize";
    case WIRE_TOKENIZE_RESULT: return "TokenizeResult";
    case WIRE_DETOKENIZE: return "Detokenize";
    case WIRE_DETOKENIZE_RESULT: return "DetokenizeResult";
    }
    return "?";
}

const char *wire_reason_name(enum wire_reason reason) {
    switch (reason) {
    case REASON_STOP: return "stop";
    case REASON_LENGTH: return "length";
    case REASON_CANCELLED: return "cancelled";
    case REASON_TIMEOUT: return "timeout";
    }
    return "?";
}

uint64_t wire_hash_id(uint64_t hash, int32_t id) {
    for (int i = 0; i < 4; i++) {
        hash ^= (uint8_t)((uint32_t)id >> (8 * i));
        hash *= UINT64_C(0x100000001b3); /* FNV-1a 64: draft-eastlake-fnv */
    }
    return hash;
}
