/* stats: the counters that Stats answers with, and the estimate behind retry_after_ms. */
#include <stdio.h>
#include <string.h>

#include "daemon/state.h"

enum { MAX_COUNTERS = 256, NAME_BYTES = 48 };

struct counter_list {
    struct wire_counter counters[MAX_COUNTERS];
    char names[MAX_COUNTERS][NAME_BYTES];
    int n;
};

static void add(struct counter_list *l, const char *prefix, const char *name, double value) {
    CHECK(l->n < MAX_COUNTERS);
    char *dst = l->names[l->n];
    int n = snprintf(dst, NAME_BYTES, "%s%s", prefix, name);
    CHECK(n > 0 && n < NAME_BYTES);
    for (char *p = dst; *p; p++)
        if (*p >= 'A' && *p <= 'Z') *p = (char)(*p + 'a' - 'A'); /* status names are in capitals */
    l->counters[l->n++] = (struct wire_counter){{(const uint8_t *)dst, (size_t)n}, value};
}

static void add_requests(struct counter_list *l, const struct server *v) {
    const struct tallies *t = &v->tallies;
    add(l, "requests_", "accepted", (double)t->accepted);
    add(l, "requests_", "in_flight", requests_count(v->requests));
    for (int i = REASON_STOP; i <= REASON_TIMEOUT; i++)
        add(l, "requests_finished_", wire_reason_name((enum wire_reason)i), (double)t->finished[i]);
    add(l, "requests_", "dropped", (double)t->dropped);
    uint64_t n_failed = 0, n_rejected = 0;
    for (int i = 0; i < ST_COUNT; i++) {
        n_failed += t->failed[i];
        n_rejected += t->rejected[i];
    }
    add(l, "requests_", "failed", (double)n_failed);
    add(l, "requests_", "rejected", (double)n_rejected);
    /* Every code that can occur, zeros included: who reads this wants the same names each time. */
    static const enum status failing[] = {ST_NUMERIC, ST_SLOW_CONSUMER, ST_DRAINING,
                                          ST_ENGINE_LOST};
    static const enum status rejecting[] = {
        ST_INVALID,   ST_TOO_LONG, ST_UNSUPPORTED, ST_UNAUTHENTICATED, ST_CONFLICT, ST_STALE_EPOCH,
        ST_TOO_LARGE, ST_QUOTA,    ST_INTERNAL,    ST_OVERLOADED,      ST_DRAINING, ST_ENGINE_LOST};
    for (size_t i = 0; i < sizeof failing / sizeof *failing; i++)
        add(l, "requests_failed_", status_name(failing[i]), (double)t->failed[failing[i]]);
    for (size_t i = 0; i < sizeof rejecting / sizeof *rejecting; i++)
        add(l, "requests_rejected_", status_name(rejecting[i]), (double)t->rejected[rejecting[i]]);
}

struct sched_stats stats_sched(const struct server *v) {
    struct sched_stats sum = {0};
    for (int i = 0; i < v->o.n_ranks; i++) {
        struct sched_stats s = sched_stats(v->ranks[i].sched);
        sum.n_waiting += s.n_waiting;
        sum.n_running += s.n_running;
        sum.n_waiting_tokens += s.n_waiting_tokens;
        sum.n_preempted += s.n_preempted;
        sum.n_plans += s.n_plans;
        sum.n_prompt_tokens += s.n_prompt_tokens;
        sum.n_decode_tokens += s.n_decode_tokens;
    }
    return sum;
}

/* The peak is the sum of the ranks' peaks, which may have been at different times. */
static struct paging_stats all_blocks(const struct server *v) {
    struct paging_stats sum = {0};
    for (int i = 0; i < v->o.n_ranks; i++) {
        struct paging_stats p = paging_stats(v->ranks[i].paging);
        sum.total += p.total;
        sum.free += p.free;
        sum.held += p.held;
        sum.peak_held += p.peak_held;
    }
    return sum;
}

static struct moe_counters all_counters(const struct server *v) {
    struct moe_counters sum = {0};
    for (int i = 0; i < v->o.n_ranks; i++) {
        const struct moe_counters *c = &v->ranks[i].counters;
        sum.n_steps += c->n_steps;
        sum.n_tokens += c->n_tokens;
        sum.n_sampled += c->n_sampled;
        sum.expert_reads += c->expert_reads;
        sum.expert_reads_ungrouped += c->expert_reads_ungrouped;
        sum.offload_bytes += c->offload_bytes;
        sum.busy_ns += c->busy_ns;
    }
    return sum;
}

static void add_steps(struct counter_list *l, const struct server *v) {
    struct sched_stats s = stats_sched(v);
    struct paging_stats p = all_blocks(v);
    struct moe_counters counters = all_counters(v), *c = &counters;
    add(l, "", "sequences_waiting", s.n_waiting);
    add(l, "", "sequences_running", s.n_running);
    add(l, "", "prompt_tokens_waiting", s.n_waiting_tokens);
    add(l, "", "preemptions", (double)s.n_preempted);
    add(l, "", "prompt_tokens", (double)v->tallies.prompt_tokens);
    add(l, "", "completion_tokens", (double)v->tallies.completion_tokens);
    add(l, "", "kv_blocks_total", p.total);
    add(l, "", "kv_blocks_free", p.free);
    add(l, "", "kv_blocks_held", p.held);
    add(l, "", "kv_blocks_held_peak", p.peak_held);
    add(l, "", "steps", (double)c->n_steps);
    add(l, "", "step_tokens", (double)c->n_tokens);
    add(l, "", "tokens_per_step", c->n_steps ? (double)c->n_tokens / (double)c->n_steps : 0);
    add(l, "", "tokens_sampled", (double)c->n_sampled);
    add(l, "", "expert_reads", (double)c->expert_reads);
    add(l, "", "expert_reads_ungrouped", (double)c->expert_reads_ungrouped);
    add(l, "", "expert_offload_bytes", (double)c->offload_bytes);
    add(l, "", "engine_busy_seconds", (double)c->busy_ns / 1e9);
}

/* What each of several devices has of the above. */
static void add_devices(struct counter_list *l, const struct server *v) {
    for (int i = 0; i < v->o.n_ranks && v->o.n_ranks > 1; i++) {
        const struct rank *r = &v->ranks[i];
        struct sched_stats s = sched_stats(r->sched);
        char prefix[NAME_BYTES];
        snprintf(prefix, sizeof prefix, "device_%d_", i);
        add(l, prefix, "sequences_waiting", s.n_waiting);
        add(l, prefix, "sequences_running", s.n_running);
        add(l, prefix, "kv_blocks_free", paging_stats(r->paging).free);
        add(l, prefix, "steps", (double)r->counters.n_steps);
        add(l, prefix, "step_tokens", (double)r->counters.n_tokens);
        add(l, prefix, "engine_busy_seconds", (double)r->counters.busy_ns / 1e9);
        if (!v->o.lockstep) continue;
        add(l, prefix, "expert_rows", (double)r->counters.expert_rows);
        add(l, prefix, "experts_moved_in", (double)r->counters.n_moved);
        add(l, prefix, "exchange_bytes", (double)r->counters.exchange_bytes);
    }
    if (!v->o.lockstep) return;
    uint64_t most = 0, sum = 0;
    for (int i = 0; i < v->o.n_ranks; i++) {
        uint64_t n = v->ranks[i].counters.expert_rows;
        sum += n;
        if (n > most) most = n;
    }
    add(l, "", "expert_imbalance", sum > 0 ? (double)most * v->o.n_ranks / (double)sum : 1);
    add(l, "", "expert_replans", (double)v->ranks[0].counters.n_replans);
}

static void add_traffic(struct counter_list *l, const struct server *v) {
    const struct tallies *t = &v->tallies;
    add(l, "", "sessions", sessions_count(v->sessions));
    add(l, "", "sessions_opened", (double)t->sessions_opened);
    add(l, "", "sessions_lost", (double)t->sessions_lost);
    add(l, "", "chunks_sent", (double)t->chunks);
    add(l, "", "messages_received", (double)t->messages_in);
    add(l, "", "messages_sent", (double)t->messages_out);
    add(l, "", "messages_malformed", (double)t->bad_messages);
    add(l, "", "received_bytes", (double)net_bytes_in(v->net));
    add(l, "", "sent_bytes", (double)net_bytes_out(v->net));
    add(l, "", "uptime_seconds", (double)(v->now_ns - v->start_ns) / 1e9);
}

void stats_send(struct server *v, struct session *s, uint64_t request_id) {
    struct counter_list l;
    l.n = 0;
    add_requests(&l, v);
    add_steps(&l, v);
    add_devices(&l, v);
    add_traffic(&l, v);
    struct wire_msg m = {.type = WIRE_STATS_RESULT,
                         .request_id = request_id,
                         .stats = {.counters = l.counters, .n_counters = (size_t)l.n}};
    send_session(v, s, &m);
}

void stats_finished(struct server *v) {
    if (v->last_finish_ns != 0) {
        double interval = (double)(v->now_ns - v->last_finish_ns);
        v->finish_interval_ns =
            v->finish_interval_ns == 0 ? interval : 0.9 * v->finish_interval_ns + 0.1 * interval;
    }
    v->last_finish_ns = v->now_ns;
}

/* The backlog over the rate at which requests end, with a jitter of a fifth so that refused clients
 * do not come back all at once. A second per request until a rate is known. */
uint32_t stats_retry_after_ms(struct server *v) {
    double interval_ms = v->finish_interval_ns == 0 ? 1000.0 : v->finish_interval_ns / 1e6;
    double ms = interval_ms * (1 + stats_sched(v).n_waiting);
    double u = (double)(server_random(v) >> 11) * 0x1p-53;
    ms *= 0.8 + 0.4 * u;
    if (ms < MIN_RETRY_AFTER_MS) ms = MIN_RETRY_AFTER_MS;
    if (ms > MAX_RETRY_AFTER_MS) ms = MAX_RETRY_AFTER_MS;
    return (uint32_t)ms;
}
