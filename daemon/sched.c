/* sched: the life of a sequence, from sched_add to sched_remove, and what results mean for it.
 * Choosing a step is in sched_plan.c. Every operation is O(1) in the number of sequences, but for
 * insertions into a list, which walk past the few sequences that were preempted or held. One
 * thread. */
#include "daemon/sched.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/sched_state.h"

/* ---- lists, by arrival ----------------------------------------------------------------------- */

static void list_remove(struct sched *s, struct seq_list *l, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    if (q->prev >= 0)
        s->seqs[q->prev].next = q->next;
    else
        l->head = q->next;
    if (q->next >= 0)
        s->seqs[q->next].prev = q->prev;
    else
        l->tail = q->prev;
    l->n--;
}

/* Insert idx behind `after`, or at the head if that is -1. */
static void list_insert(struct sched *s, struct seq_list *l, int32_t after, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    q->prev = after;
    q->next = after >= 0 ? s->seqs[after].next : l->head;
    if (q->prev >= 0)
        s->seqs[q->prev].next = idx;
    else
        l->head = idx;
    if (q->next >= 0)
        s->seqs[q->next].prev = idx;
    else
        l->tail = idx;
    l->n++;
}

/* Into the queue. New sequences go to the tail; those that come back belong near the head. */
static void enqueue(struct sched *s, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    struct seq_list *l = &s->waiting[q->priority];
    int32_t after = l->tail;
    if (after >= 0 && s->seqs[after].arrival > q->arrival) {
        int32_t before = l->head;
        while (s->seqs[before].arrival < q->arrival) before = s->seqs[before].next;
        after = s->seqs[before].prev;
    }
    list_insert(s, l, after, idx);
    q->state = SEQ_WAITING;
    s->n_queued_tokens += q->n_prompt;
}

static void dequeue(struct sched *s, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    list_remove(s, &s->waiting[q->priority], idx);
    s->n_queued_tokens -= q->n_prompt;
}

void sched_start(struct sched *s, int32_t idx, uint64_t now_ns) {
    struct seq *q = &s->seqs[idx];
    struct seq_list *l = &s->running[q->priority];
    dequeue(s, idx);
    int32_t after = l->tail; /* almost always: what waits is younger than what runs */
    while (after >= 0 && s->seqs[after].arrival > q->arrival) after = s->seqs[after].prev;
    list_insert(s, l, after, idx);
    q->state = SEQ_RUNNING;
    q->slot = s->free_slots[--s->n_free_slots];
    s->seq_of_slot[q->slot] = idx;
    q->run++;
    q->decoding = false;
    if (q->first_scheduled_ns == 0) q->first_scheduled_ns = now_ns;
}

void sched_stop(struct sched *s, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    list_remove(s, &s->running[q->priority], idx);
    paging_seq_free(s->paging, q->slot);
    s->seq_of_slot[q->slot] = -1;
    s->free_slots[s->n_free_slots++] = q->slot;
    q->slot = -1;
    q->n_scheduled = q->n_out = q->n_step = 0;
}

void sched_preempt(struct sched *s, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    bool over = q->failed || q->n_known == q->limit;
    sched_stop(s, idx);
    q->n_preempted++;
    s->n_preempted++;
    if (over)
        q->state = SEQ_OVER;
    else
        enqueue(s, idx);
}

/* ---- add, remove, hold ----------------------------------------------------------------------- */

/* The sequence that id names, or NULL. */
static struct seq *find(const struct sched *s, struct sched_id id) {
    if (id.idx < 0 || id.idx >= s->limits.max_sequences) return NULL;
    struct seq *q = &s->seqs[id.idx];
    return q->state != SEQ_FREE && q->generation == id.generation ? q : NULL;
}

static int32_t n_waiting(const struct sched *s) {
    int32_t n = 0;
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++) n += s->waiting[c].n;
    return n;
}

enum status sched_add(struct sched *s, const struct sched_request *r, uint64_t now_ns,
                      struct sched_id *out) {
    CHECK(r->n_ids >= 1 && r->max_tokens >= 1);
    CHECK(r->priority >= 0 && r->priority < SCHED_N_PRIORITIES);
    if (r->n_ids >= s->most_seq_tokens) return ST_TOO_LONG;
    if (s->n_free_seqs == 0) return ST_OVERLOADED;
    if (n_waiting(s) > 0 && r->n_ids > s->limits.max_queued_tokens - s->n_queued_tokens)
        return ST_OVERLOADED;
    int32_t idx = s->free_seqs[--s->n_free_seqs];
    struct seq *q = &s->seqs[idx];
    int32_t room = s->most_seq_tokens - r->n_ids;
    *q = (struct seq){
        .generation = q->generation,
        .run = q->run,
        .arrival = s->next_arrival++,
        .priority = r->priority,
        .n_prompt = r->n_ids,
        .n_known = r->n_ids,
        .limit = r->n_ids + (r->max_tokens < room ? r->max_tokens : room),
        .slot = -1,
        .added_ns = now_ns,
    };
    memcpy(ids_of(s, idx), r->ids, (size_t)r->n_ids * sizeof *r->ids);
    s->sampling[idx] = r->sampling;
    enqueue(s, idx);
    *out = (struct sched_id){.idx = idx, .generation = q->generation};
    return ST_OK;
}

void sched_remove(struct sched *s, struct sched_id id) {
    struct seq *q = find(s, id);
    if (!q) return;
    if (q->state == SEQ_RUNNING) sched_stop(s, id.idx);
    if (q->state == SEQ_WAITING) dequeue(s, id.idx);
    q->state = SEQ_FREE;
    q->generation++;
    s->free_seqs[s->n_free_seqs++] = id.idx;
}

void sched_hold(struct sched *s, struct sched_id id, bool held) {
    struct seq *q = find(s, id);
    if (!q) return;
    if (!held) {
        if (q->state == SEQ_HELD) enqueue(s, id.idx);
        return;
    }
    if (q->state != SEQ_RUNNING && q->state != SEQ_WAITING) return;
    bool over = q->failed || q->n_known == q->limit;
    if (q->state == SEQ_RUNNING)
        sched_stop(s, id.idx);
    else
        dequeue(s, id.idx);
    q->run++; /* drops the rows that are out */
    q->state = over ? SEQ_OVER : SEQ_HELD;
}

/* ---- results --------------------------------------------------------------------------------- */

/* A row of q's current run. */
static void take_row(struct sched *s, int32_t idx, const struct moe_row *row,
                     struct sched_token *out) {
    struct seq *q = &s->seqs[idx];
    if (row->st != ST_OK) {
        q->failed = true;
    } else {
        CHECK(q->n_known < q->limit);
        ids_of(s, idx)[q->n_known++] = row->token;
    }
    bool at_limit = q->n_known == q->limit;
    if (q->state == SEQ_WAITING && (q->failed || at_limit)) {
        dequeue(s, idx);
        q->state = SEQ_OVER;
    }
    *out = (struct sched_token){
        .id = {idx, q->generation},
        .row = row,
        .n_sampled = q->n_known - q->n_prompt,
        .at_limit = at_limit,
    };
}

int32_t sched_apply(struct sched *s, struct sched_plan *plan, const struct moe_result *result,
                    uint64_t now_ns, struct sched_token *out) {
    CHECK(s->n_out > 0);
    const struct sched_out *o = &s->out[s->first_out];
    CHECK(plan->number == o->number && result->n_rows == o->n_rows);
    /* It ran from when it was planned, or from when the one before it ended. */
    uint64_t start_ns = o->planned_ns > s->applied_ns ? o->planned_ns : s->applied_ns;
    pace_learn(&s->pace, o->n_tokens, now_ns > start_ns ? now_ns - start_ns : 0);
    s->applied_ns = now_ns;
    int32_t n = 0;
    for (int32_t i = 0; i < o->n_rows; i++) {
        const struct sched_row *r = &o->rows[i];
        CHECK(result->rows[i].slot == r->slot);
        struct seq *q = find(s, r->id);
        if (!q || q->run != r->run) continue;
        if (q->state == SEQ_RUNNING) q->n_out--;
        if (q->failed) continue; /* a token after one that never was */
        take_row(s, r->id.idx, &result->rows[i], &out[n++]);
    }
    s->first_out = (s->first_out + 1) % MOE_MAX_IN_FLIGHT;
    s->n_out--;
    return n;
}

/* ---- looking --------------------------------------------------------------------------------- */

struct sched_stats sched_stats(const struct sched *s) {
    return (struct sched_stats){
        .n_waiting = n_waiting(s),
        .n_running = n_running(s),
        .n_waiting_tokens = s->n_queued_tokens,
        .n_preempted = s->n_preempted,
        .n_plans = s->n_plans,
        .n_prompt_tokens = s->n_prompt_tokens,
        .n_decode_tokens = s->n_decode_tokens,
    };
}

enum status sched_seq_info(const struct sched *s, struct sched_id id, struct sched_seq_info *out) {
    const struct seq *q = find(s, id);
    if (!q) return ST_NOT_FOUND;
    *out = (struct sched_seq_info){
        .running = q->state == SEQ_RUNNING,
        .n_prompt = q->n_prompt,
        .n_known = q->n_known,
        .n_preempted = q->n_preempted,
        .added_ns = q->added_ns,
        .first_scheduled_ns = q->first_scheduled_ns,
    };
    return ST_OK;
}

/* ---- create, destroy ------------------------------------------------------------------------- */

static bool limits_ok(const struct sched_limits *l, const struct paging *p, int32_t block_tokens) {
    struct paging_limits pl = paging_limits(p);
    if (l->max_batch_tokens < 1 || l->max_running < 1 || l->max_sequences < 1) return false;
    if (l->max_seq_tokens < 2 || l->max_queued_tokens < 1 || l->prefill_chunk < 0) return false;
    const int32_t most = 1 << 28; /* so that sums of a few of them are int32_t */
    if (l->max_seq_tokens > most || l->max_batch_tokens > most) return false;
    if (pl.block_tokens != block_tokens || pl.n_slots < l->max_running) return false;
    /* The last token that a sequence samples needs no position. */
    return (int64_t)pl.max_blocks_per_seq * block_tokens >= l->max_seq_tokens - 1;
}

static bool allocate(struct sched *s) {
    size_t n_seqs = (size_t)s->limits.max_sequences, n_slots = (size_t)s->limits.max_running;
    size_t n_ids_bytes;
    if (!size_mul(n_seqs * sizeof(int32_t), (size_t)s->limits.max_seq_tokens, &n_ids_bytes))
        return false;
    if (arena_create(n_ids_bytes, &s->ids) != ST_OK) return false;
    s->seqs = calloc(n_seqs, sizeof *s->seqs);
    s->sampling = calloc(n_seqs, sizeof *s->sampling);
    s->free_seqs = calloc(n_seqs, sizeof *s->free_seqs);
    s->free_slots = calloc(n_slots, sizeof *s->free_slots);
    s->seq_of_slot = calloc(n_slots, sizeof *s->seq_of_slot);
    bool ok = s->seqs && s->sampling && s->free_seqs && s->free_slots && s->seq_of_slot;
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        s->out[i].rows = calloc(n_slots, sizeof *s->out[i].rows);
        ok = ok && s->out[i].rows;
    }
    return ok;
}

enum status sched_create(const struct sched_limits *l, struct paging *p, int32_t block_tokens,
                         struct sched **out) {
    *out = NULL;
    if (!limits_ok(l, p, block_tokens)) return ST_INVALID;
    struct sched *s = calloc(1, sizeof *s);
    if (!s) return ST_NO_MEMORY;
    s->limits = *l;
    s->paging = p;
    s->block_tokens = block_tokens;
    s->most_running = l->max_running < l->max_batch_tokens ? l->max_running : l->max_batch_tokens;
    int64_t pool = (int64_t)paging_stats(p).total * block_tokens + 1;
    s->most_seq_tokens = pool < l->max_seq_tokens ? (int32_t)pool : l->max_seq_tokens;
    if (!allocate(s)) {
        sched_destroy(s);
        return ST_NO_MEMORY;
    }
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++)
        s->waiting[c] = s->running[c] = (struct seq_list){.head = -1, .tail = -1};
    for (int32_t i = l->max_sequences; i-- > 0;) s->free_seqs[s->n_free_seqs++] = i;
    for (int32_t i = l->max_running; i-- > 0;) {
        s->free_slots[s->n_free_slots++] = i;
        s->seq_of_slot[i] = -1;
    }
    *out = s;
    return ST_OK;
}

void sched_destroy(struct sched *s) {
    if (!s) return;
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) free(s->out[i].rows);
    free(s->seqs);
    free(s->sampling);
    free(s->free_seqs);
    free(s->free_slots);
    free(s->seq_of_slot);
    arena_destroy(&s->ids);
    free(s);
}
