/* sched_plan: choosing a step. Three passes over the running sequences, oldest first, each O(1) a
 * sequence: reserve decides how many tokens each gets and takes their blocks, preempting from the
 * young end; then decoding sequences are written to the plan, then prompt chunks; last, sequences
 * are admitted from the queue. A victim is always younger than the sequence that needs its blocks,
 * and so has no tokens in this plan yet. One thread. */
#include <stdlib.h>
#include <string.h>

#include "daemon/sched_state.h"

/* What is left to give while a plan is made. */
struct picking {
    struct sched_plan *plan;
    int32_t n_budget; /* tokens */
    int32_t n_decoding; /* sequences that will decode, not reached yet: a token of budget each */
    int32_t n_promised; /* blocks that running prompts still need */
    int32_t n_start_ids;
};

/* ---- plans ----------------------------------------------------------------------------------- */

/* Ids of the sequences that one plan may start: one of any length, and more while they fit. */
static size_t start_ids_cap(const struct sched_limits *l) {
    return 2 * (size_t)l->max_seq_tokens + (size_t)l->max_batch_tokens;
}

enum status sched_plan_create(const struct sched_limits *l, int32_t max_blocks_per_seq,
                              struct sched_plan *out) {
    size_t n = (size_t)l->max_running, n_blocks;
    *out = (struct sched_plan){0};
    if (!size_mul(n, (size_t)max_blocks_per_seq, &n_blocks)) return ST_NO_MEMORY;
    out->seqs = calloc(n, sizeof *out->seqs);
    out->ids = calloc((size_t)l->max_batch_tokens, sizeof *out->ids);
    out->blocks = calloc(n_blocks, sizeof *out->blocks);
    out->id_of = calloc(n, sizeof *out->id_of);
    out->starts = calloc(n, sizeof *out->starts);
    out->start_ids = calloc(start_ids_cap(l), sizeof *out->start_ids);
    if (!out->seqs || !out->ids || !out->blocks || !out->id_of || !out->starts || !out->start_ids) {
        sched_plan_destroy(out);
        return ST_NO_MEMORY;
    }
    return ST_OK;
}

void sched_plan_destroy(struct sched_plan *p) {
    free(p->seqs);
    free(p->ids);
    free(p->blocks);
    free(p->id_of);
    free(p->starts);
    free(p->start_ids);
    *p = (struct sched_plan){0};
}

/* ---- running sequences ----------------------------------------------------------------------- */

/* Has a token to compute. At its limit only rows are awaited. */
static bool can_run(const struct seq *q) { return !q->failed && n_virtual(q) < q->limit; }

static int32_t n_blocks_held(const struct sched *s, const struct seq *q) {
    return paging_seq_n_blocks(s->paging, q->slot);
}

/* The running sequence that gives way first. */
static int32_t youngest(const struct sched *s) {
    for (int32_t c = SCHED_N_PRIORITIES; c-- > 0;)
        if (s->running[c].n > 0) return s->running[c].tail;
    return -1;
}

/* Blocks for the next n tokens of idx, or for as many of them as can be had without taking
 * anything from an older sequence. Returns how many: 0 if none. */
static int32_t make_room(struct sched *s, struct picking *k, int32_t idx, int32_t n) {
    struct seq *q = &s->seqs[idx];
    for (;;) {
        int64_t n_blocks = n_blocks_held(s, q) + (int64_t)paging_n_free(s->paging);
        int64_t room = n_blocks * s->block_tokens - q->n_scheduled;
        if (room > 0) {
            if (room < n) n = (int32_t)room;
            CHECK(paging_seq_reserve(s->paging, q->slot, q->n_scheduled + n) == ST_OK);
            return n;
        }
        int32_t victim = youngest(s);
        if (victim == idx) return 0;
        if (s->seqs[victim].decoding && can_run(&s->seqs[victim])) k->n_decoding--;
        sched_preempt(s, victim);
        k->plan->n_preempted++;
    }
}

static int32_t chunk_of(const struct sched *s, const struct seq *q, int32_t n_budget) {
    int32_t n = n_virtual(q) - q->n_scheduled;
    if (s->limits.prefill_chunk > 0 && n > s->limits.prefill_chunk) n = s->limits.prefill_chunk;
    return n < n_budget ? n : n_budget;
}

/* The step's tokens, when streams wait for its end. */
static int32_t budget_in_time(const struct sched *s, int32_t n_decoding) {
    int32_t most = s->limits.max_batch_tokens;
    if (s->limits.max_itl_ns == 0 || n_decoding == 0) return most;
    /* A tenth is left for what the estimate misses and for sending. */
    int32_t n = pace_tokens(&s->pace, s->limits.max_itl_ns / 10 * 9);
    if (n < n_decoding + s->block_tokens) n = n_decoding + s->block_tokens;
    return n < most ? n : most;
}

/* How many tokens each running sequence gets in this plan (n_step), with the blocks for them. */
static void reserve(struct sched *s, struct picking *k) {
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++)
        for (int32_t i = s->running[c].head; i >= 0; i = s->seqs[i].next)
            k->n_decoding += s->seqs[i].decoding && can_run(&s->seqs[i]);
    k->n_budget = budget_in_time(s, k->n_decoding);
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++) {
        for (int32_t i = s->running[c].head; i >= 0; i = s->seqs[i].next) {
            struct seq *q = &s->seqs[i];
            q->n_step = 0;
            if (!can_run(q)) continue;
            k->n_decoding -= q->decoding;
            int32_t n = q->decoding ? 1 : chunk_of(s, q, k->n_budget - k->n_decoding);
            if (n > 0) q->n_step = make_room(s, k, i, n);
            k->n_budget -= q->n_step;
            if (!q->decoding) k->n_promised += blocks_of(s, n_virtual(q)) - n_blocks_held(s, q);
        }
    }
}

/* Write idx with its n_step tokens to the plan. */
static void write_seq(struct sched *s, struct sched_plan *plan, int32_t idx) {
    struct seq *q = &s->seqs[idx];
    int32_t i = plan->step.n_seqs++, end = q->n_scheduled + q->n_step;
    int32_t *ids = plan->ids + plan->step.n_tokens;
    /* Behind what is known comes, at most, the one token that the slot sampled last. */
    int32_t n_copied = (end < q->n_known ? end : q->n_known) - q->n_scheduled;
    if (n_copied > 0)
        memcpy(ids, ids_of(s, idx) + q->n_scheduled, (size_t)n_copied * sizeof *ids);
    else
        n_copied = 0;
    CHECK(q->n_step - n_copied <= 1);
    if (n_copied < q->n_step) ids[n_copied] = MOE_LAST_TOKEN;
    struct moe_step_seq *seq = &plan->seqs[i];
    *seq = (struct moe_step_seq){
        .slot = q->slot,
        .start_pos = q->n_scheduled,
        .n_tokens = q->n_step,
        .n_blocks = n_blocks_held(s, q),
        .rows = end == n_virtual(q) ? MOE_ROWS_SAMPLE : MOE_ROWS_NONE,
    };
    plan->id_of[i] = (struct sched_id){idx, q->generation};
    plan->step.n_tokens += q->n_step;
    if (q->decoding)
        plan->n_decode_tokens += q->n_step;
    else
        plan->n_prefill_tokens += q->n_step;
    q->n_scheduled = end;
    if (seq->rows == MOE_ROWS_SAMPLE) {
        struct sched_out *o = &s->out[(s->first_out + s->n_out) % MOE_MAX_IN_FLIGHT];
        o->rows[o->n_rows++] = (struct sched_row){{idx, q->generation}, q->run, q->slot};
        q->n_out++;
        q->decoding = true;
    }
}

static void write_running(struct sched *s, struct sched_plan *plan) {
    /* In the first round `decoding` is still what it was when tokens were given; the second takes
     * what the first left, which is marked by n_step. */
    for (int round = 0; round < 2; round++)
        for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++)
            for (int32_t i = s->running[c].head; i >= 0; i = s->seqs[i].next) {
                struct seq *q = &s->seqs[i];
                if (q->n_step == 0 || (round == 0 && !q->decoding)) continue;
                write_seq(s, plan, i);
                q->n_step = 0;
            }
}

/* ---- new sequences --------------------------------------------------------------------------- */

static int32_t queue_head(const struct sched *s) {
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++)
        if (s->waiting[c].n > 0) return s->waiting[c].head;
    return -1;
}

/* The policy is in sched.h: all tokens fit, beside what running prompts were promised and a
 * reserve. */
static bool may_start(const struct sched *s, const struct picking *k, int32_t idx) {
    const struct seq *q = &s->seqs[idx];
    int32_t running = n_running(s);
    if (running >= s->most_running) return false;
    if ((size_t)(k->n_start_ids + q->n_known) > start_ids_cap(&s->limits)) return false;
    int64_t reserve_blocks = running > 0 ? 1 + running / 8 : 0;
    return (int64_t)paging_n_free(s->paging) - k->n_promised - blocks_of(s, q->n_known) >=
           reserve_blocks;
}

static void admit(struct sched *s, struct picking *k, uint64_t now_ns) {
    struct sched_plan *plan = k->plan;
    for (int32_t idx; k->n_budget > 0 && (idx = queue_head(s)) >= 0;) {
        if (!may_start(s, k, idx)) return;
        sched_start(s, idx, now_ns);
        struct seq *q = &s->seqs[idx];
        q->n_step = make_room(s, k, idx, chunk_of(s, q, k->n_budget));
        k->n_budget -= q->n_step;
        k->n_promised += blocks_of(s, q->n_known) - n_blocks_held(s, q);
        int32_t *ids = plan->start_ids + k->n_start_ids;
        memcpy(ids, ids_of(s, idx), (size_t)q->n_known * sizeof *ids);
        k->n_start_ids += q->n_known;
        plan->starts[plan->n_starts++] = (struct moe_slot_start){
            .slot = q->slot,
            .sampling = s->sampling[idx],
            .ids = ids,
            .n_ids = q->n_known,
            .n_prompt = q->n_prompt,
        };
        write_seq(s, plan, idx);
        q->n_step = 0;
    }
}

/* ---- the plan -------------------------------------------------------------------------------- */

static void copy_tables(const struct sched *s, struct sched_plan *plan) {
    int32_t *table = plan->blocks;
    for (int32_t i = 0; i < plan->step.n_seqs; i++) {
        paging_seq_copy(s->paging, plan->seqs[i].slot, plan->seqs[i].n_blocks, table);
        table += plan->seqs[i].n_blocks;
    }
}

bool sched_plan(struct sched *s, uint64_t now_ns, struct sched_plan *plan) {
    CHECK(s->n_out < MOE_MAX_IN_FLIGHT);
    plan->step = (struct moe_step){.seqs = plan->seqs, .ids = plan->ids, .blocks = plan->blocks};
    plan->n_starts = plan->n_decode_tokens = plan->n_prefill_tokens = plan->n_preempted = 0;
    struct picking k = {.plan = plan};
    struct sched_out *o = &s->out[(s->first_out + s->n_out) % MOE_MAX_IN_FLIGHT];
    o->n_rows = 0;
    reserve(s, &k);
    write_running(s, plan);
    if (plan->n_preempted == 0) admit(s, &k, now_ns);
    if (plan->step.n_seqs == 0) return false;
    copy_tables(s, plan);
    plan->number = o->number = ++s->n_plans;
    o->planned_ns = now_ns;
    o->n_tokens = plan->step.n_tokens;
    s->n_out++;
    s->n_prompt_tokens += (uint64_t)plan->n_prefill_tokens;
    s->n_decode_tokens += (uint64_t)plan->n_decode_tokens;
    return true;
}
