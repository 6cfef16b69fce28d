/* sched_check: every invariant that sched.h names, in O(sequences + blocks). For tests, and for
 * whoever doubts. One thread. */
#include "daemon/sched_state.h"

#define BROKEN(e, ...) error_set((e), ST_INTERNAL, __VA_ARGS__)

/* Rows of idx's current run in outstanding plans. */
static int32_t rows_out(const struct sched *s, int32_t idx) {
    const struct seq *q = &s->seqs[idx];
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_out; i++) {
        const struct sched_out *o = &s->out[(s->first_out + i) % MOE_MAX_IN_FLIGHT];
        for (int32_t r = 0; r < o->n_rows; r++)
            n += o->rows[r].id.idx == idx && o->rows[r].id.generation == q->generation &&
                 o->rows[r].run == q->run;
    }
    return n;
}

static enum status check_progress(const struct sched *s, int32_t idx, struct error *e) {
    const struct seq *q = &s->seqs[idx];
    if (q->n_prompt < 1 || q->n_known < q->n_prompt || n_virtual(q) > q->limit ||
        q->limit > s->most_seq_tokens)
        return BROKEN(e, "sequence %d knows %d + %d of %d tokens, prompt %d", idx, q->n_known,
                      q->n_out, q->limit, q->n_prompt);
    if (q->n_step != 0) return BROKEN(e, "sequence %d has a step between plans", idx);
    if (q->state != SEQ_RUNNING) {
        if (q->slot != -1 || q->n_scheduled != 0 || q->n_out != 0)
            return BROKEN(e, "sequence %d does not run and has progress", idx);
        return ST_OK;
    }
    if (q->slot < 0 || q->slot >= s->limits.max_running || s->seq_of_slot[q->slot] != idx)
        return BROKEN(e, "sequence %d runs in slot %d, which is not its own", idx, q->slot);
    /* After a row that failed, the token computed ahead of it belongs to nothing. */
    if (q->n_scheduled < 0 || (!q->failed && (q->n_scheduled > n_virtual(q) ||
                                              (q->decoding && q->n_scheduled != n_virtual(q) - 1))))
        return BROKEN(e, "sequence %d has %d of %d tokens scheduled", idx, q->n_scheduled,
                      n_virtual(q));
    if (q->n_out != rows_out(s, idx))
        return BROKEN(e, "sequence %d waits for %d rows of %d", idx, q->n_out, rows_out(s, idx));
    if (paging_seq_n_blocks(s->paging, q->slot) != blocks_of(s, q->n_scheduled))
        return BROKEN(e, "sequence %d has %d blocks for %d tokens", idx,
                      paging_seq_n_blocks(s->paging, q->slot), q->n_scheduled);
    return ST_OK;
}

static enum status check_list(const struct sched *s, const struct seq_list *l, int32_t priority,
                              enum seq_state state, struct error *e) {
    int32_t n = 0, prev = -1;
    for (int32_t i = l->head; i >= 0; prev = i, i = s->seqs[i].next, n++) {
        const struct seq *q = &s->seqs[i];
        if (n == l->n || q->prev != prev || q->state != state || q->priority != priority)
            return BROKEN(e, "sequence %d is in a list that is not its own", i);
        if (prev >= 0 && s->seqs[prev].arrival >= q->arrival)
            return BROKEN(e, "sequence %d is in front of an older one", prev);
    }
    if (n != l->n || l->tail != prev) return BROKEN(e, "a list of %d has %d sequences", l->n, n);
    return ST_OK;
}

static enum status check_counts(const struct sched *s, const int32_t *n_state, struct error *e) {
    int32_t n_waiting = 0, n_in_running = 0, n_slots = 0;
    for (int32_t c = 0; c < SCHED_N_PRIORITIES; c++) {
        n_waiting += s->waiting[c].n;
        n_in_running += s->running[c].n;
        enum status st = check_list(s, &s->waiting[c], c, SEQ_WAITING, e);
        if (st == ST_OK) st = check_list(s, &s->running[c], c, SEQ_RUNNING, e);
        if (st != ST_OK) return st;
    }
    for (int32_t slot = 0; slot < s->limits.max_running; slot++) {
        n_slots += s->seq_of_slot[slot] >= 0;
        if (s->seq_of_slot[slot] < 0 && paging_seq_n_blocks(s->paging, slot) != 0)
            return BROKEN(e, "slot %d is free and holds blocks", slot);
    }
    if (n_waiting != n_state[SEQ_WAITING] || n_in_running != n_state[SEQ_RUNNING] ||
        n_slots != n_in_running || n_running(s) != n_in_running || n_in_running > s->most_running ||
        s->n_free_seqs != n_state[SEQ_FREE])
        return BROKEN(e, "%d waiting, %d running in %d slots, %d free: the lists do not agree",
                      n_waiting, n_in_running, n_slots, s->n_free_seqs);
    return ST_OK;
}

enum status sched_check(const struct sched *s, struct error *e) {
    int32_t n_state[SEQ_OVER + 1] = {0}, n_queued_tokens = 0;
    for (int32_t i = 0; i < s->limits.max_sequences; i++) {
        const struct seq *q = &s->seqs[i];
        n_state[q->state]++;
        if (q->state == SEQ_WAITING) n_queued_tokens += q->n_prompt;
        enum status st = q->state == SEQ_FREE ? ST_OK : check_progress(s, i, e);
        if (st != ST_OK) return st;
    }
    if (n_queued_tokens != s->n_queued_tokens)
        return BROKEN(e, "%d tokens are queued, not %d", n_queued_tokens, s->n_queued_tokens);
    enum status st = check_counts(s, n_state, e);
    return st == ST_OK ? paging_check(s->paging, e) : st;
}
