/* See session.h. */
#include "daemon/session.h"

#include <stdlib.h>
#include <string.h>

struct sessions {
    int32_t cap, n_used, end;
    uint32_t n_buckets; /* a power of two */
    uint64_t key; /* random, so that no client chooses its bucket */
    int32_t *buckets;
    struct session *all;
};

enum status sessions_create(int32_t max_sessions, struct sessions **out) {
    CHECK(max_sessions > 0);
    struct sessions *t = calloc(1, sizeof *t);
    if (!t) return ST_NO_MEMORY;
    t->cap = max_sessions;
    t->n_buckets = 1;
    while (t->n_buckets < (uint32_t)max_sessions * 2) t->n_buckets *= 2;
    t->buckets = malloc(t->n_buckets * sizeof *t->buckets);
    t->all = calloc((size_t)max_sessions, sizeof *t->all);
    if (!t->buckets || !t->all) {
        sessions_destroy(t);
        return ST_NO_MEMORY;
    }
    memset(t->buckets, 0xff, t->n_buckets * sizeof *t->buckets); /* -1 */
    random_bytes(&t->key, sizeof t->key);
    *out = t;
    return ST_OK;
}

void sessions_destroy(struct sessions *t) {
    if (!t) return;
    free(t->buckets);
    free(t->all);
    free(t);
}

int32_t sessions_count(const struct sessions *t) { return t->n_used; }
int32_t sessions_end(const struct sessions *t) { return t->end; }
struct session *session_at(struct sessions *t, int32_t idx) {
    return &t->all[idx];
}
int32_t session_idx(const struct sessions *t, const struct session *s) {
    return (int32_t)(s - t->all);
}

static int32_t *bucket_of(struct sessions *t, const uint8_t *route, size_t n) {
    uint64_t h = t->key;
    for (size_t i = 0; i < n; i++) h = (h ^ route[i]) * UINT64_C(0x100000001b3); /* FNV-1a */
    h ^= h >> 32;
    return &t->buckets[h & (t->n_buckets - 1)];
}

struct session *session_find(struct sessions *t, struct bytes route) {
    for (int32_t i = *bucket_of(t, route.p, route.n); i >= 0; i = t->all[i].next_in_bucket) {
        struct session *s = &t->all[i];
        if (s->n_route == route.n && memcmp(s->route, route.p, route.n) == 0) return s;
    }
    return NULL;
}

struct session *session_get(struct sessions *t, int32_t idx, uint32_t generation) {
    struct session *s = &t->all[idx];
    return s->used && s->generation == generation ? s : NULL;
}

struct session *session_open(struct sessions *t, struct bytes route) {
    CHECK(route.n <= NET_MAX_ROUTE_BYTES);
    if (t->n_used == t->cap) return NULL;
    int32_t i = 0;
    while (t->all[i].used) i++;
    struct session *s = &t->all[i];
    uint32_t generation = s->generation + 1;
    *s = (struct session){.used = true,
                          .generation = generation,
                          .n_route = (uint8_t)route.n,
                          .fd = -1,
                          .requests = -1};
    memcpy(s->route, route.p, route.n);
    random_bytes(s->token, sizeof s->token);
    int32_t *bucket = bucket_of(t, route.p, route.n);
    s->next_in_bucket = *bucket;
    *bucket = i;
    t->n_used++;
    if (i >= t->end) t->end = i + 1;
    return s;
}

void session_close(struct sessions *t, struct session *s) {
    CHECK(s->used && s->n_requests == 0);
    int32_t i = session_idx(t, s);
    int32_t *link = bucket_of(t, s->route, s->n_route);
    while (*link != i) link = &t->all[*link].next_in_bucket;
    *link = s->next_in_bucket;
    s->used = false;
    t->n_used--;
    while (t->end > 0 && !t->all[t->end - 1].used) t->end--;
}

bool session_credit(struct session *s, uint64_t session_seq, uint64_t now_ns) {
    if (session_seq > s->sent_seq) return false;
    if (session_seq > s->acked_seq) {
        s->acked_seq = session_seq;
        s->progress_ns = now_ns;
    }
    return true;
}

void session_suspect(struct session *s, uint64_t now_ns) {
    s->n_probes = SESSION_PROBES;
    s->next_probe_ns = now_ns;
}

uint64_t session_probed(struct session *s, uint64_t now_ns) {
    /* 0, 5, 25, 125, 425, 725 ms after the word came. */
    static const uint64_t after_ms[SESSION_PROBES] = {0, 300, 300, 100, 20, 5};
    if (--s->n_probes <= 0) return 0;
    s->next_probe_ns = now_ns + after_ms[s->n_probes] * 1000000u;
    return s->next_probe_ns;
}
