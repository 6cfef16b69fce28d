/* See stops.h. */
#include "daemon/stops.h"

#include <string.h>

/* The longest string that ends at text[end), or -1. */
static int match_ending_at(const struct stop_set *set, const uint8_t *text, size_t end) {
    int best = -1;
    for (int i = 0; i < set->n; i++) {
        size_t n = set->strings[i].n_bytes;
        const uint8_t *s = set->strings[i].bytes;
        if (n > end || s[n - 1] != text[end - 1] || memcmp(text + end - n, s, n) != 0) continue;
        if (best < 0 || n > set->strings[best].n_bytes) best = i;
    }
    return best;
}

/* Length of the longest suffix of text[0, n) that begins a stop string without completing it. */
static size_t held_length(const struct stop_set *set, const uint8_t *text, size_t n) {
    size_t longest = 0;
    for (int i = 0; i < set->n; i++) {
        size_t len = set->strings[i].n_bytes;
        size_t k = len - 1 < n ? len - 1 : n;
        for (; k > longest; k--) {
            if (memcmp(text + n - k, set->strings[i].bytes, k) == 0) longest = k;
        }
    }
    return longest;
}

int stops_push(const struct stop_set *set, struct stop_state *s, const void *text, size_t n,
               uint8_t *dst, size_t *n_out) {
    CHECK(n <= STOPS_MAX_PIECE_BYTES);
    if (set->n == 0) {
        if (n > 0) memcpy(dst, text, n);
        *n_out = n;
        return -1;
    }
    uint8_t work[STOPS_MAX_HELD_BYTES + STOPS_MAX_PIECE_BYTES];
    size_t n_old = s->n_held, total = n_old + n;
    memcpy(work, s->held, n_old);
    if (n > 0) memcpy(work + n_old, text, n);
    for (size_t end = n_old + 1; end <= total; end++) {
        int match = match_ending_at(set, work, end);
        if (match < 0) continue;
        *n_out = end - set->strings[match].n_bytes;
        memcpy(dst, work, *n_out);
        s->n_held = 0;
        return match;
    }
    size_t hold = held_length(set, work, total);
    *n_out = total - hold;
    memcpy(dst, work, *n_out);
    memcpy(s->held, work + *n_out, hold);
    s->n_held = (uint16_t)hold;
    return -1;
}

size_t stops_finish(struct stop_state *s, uint8_t *dst) {
    size_t n = s->n_held;
    memcpy(dst, s->held, n);
    s->n_held = 0;
    return n;
}
