/* libFuzzer target: any bytes as the body of any message. What decodes keeps every promise of
 * wire.h, fits its budget, and encodes to bytes that decode again. The first byte picks the type;
 * the first bytes are also tried as a header. Run:
 *
 *     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_wire
 *     build/fuzz/bin/fuzz_wire -max_len=4096 */
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "tests/wire_promises.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_TYPE = 48, MAX_ENCODED = 1 << 20 };

static void try_header(const uint8_t *data, size_t size) {
    struct wire_header h;
    uint8_t again[WIRE_HEADER_BYTES];
    struct error e;
    if (wire_header_decode(data, size, &e, &h) != ST_OK) return;
    CHECK(h.body_bytes <= WIRE_MAX_BODY_BYTES);
    wire_header_encode(&h, again);
    CHECK(memcmp(again, data, sizeof again) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct arena arena, scratch;
    static uint8_t encoded[MAX_ENCODED];
    if (!arena.base) {
        CHECK(arena_create(WIRE_ARENA_BYTES, &arena) == ST_OK);
        CHECK(arena_create(WIRE_ARENA_BYTES, &scratch) == ST_OK);
    }
    try_header(data, size > WIRE_HEADER_BYTES ? WIRE_HEADER_BYTES : size);
    if (size == 0) return 0;
    size_t n = size - 1, len;
    struct wire_header h = {WIRE_MAJOR, WIRE_MINOR, data[0] % MAX_TYPE, (uint32_t)n, 1};
    struct wire_msg m, m2;
    struct error e = {.code = ST_OK};
    arena_reset(&arena);
    enum status st = wire_decode(&h, data + 1, n, &arena, &e, &m);
    if (st != ST_OK) {
        CHECK(st == ST_INVALID || st == ST_TOO_LARGE || st == ST_UNIMPLEMENTED);
        CHECK(e.code == st && strlen(e.text) > 0 && arena.used_bytes == 0);
        return 0;
    }
    CHECK(arena.used_bytes <= 8 * n + WIRE_BUDGET_BYTES);
    CHECK(wire_broken_promise(&m) == NULL);
    if (wire_encode(&m, &scratch, encoded, sizeof encoded, &len) != ST_OK) {
        CHECK(len > sizeof encoded);
        return 0;
    }
    CHECK(scratch.used_bytes == 0);
    h.body_bytes = (uint32_t)len;
    arena_reset(&arena);
    st = wire_decode(&h, encoded, len, &arena, NULL, &m2);
    /* Leaving out defaults makes a body shorter, and with it its budget. */
    CHECK(st == ST_OK || st == ST_TOO_LARGE);
    return 0;
}
