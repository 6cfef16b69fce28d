/* sched_state: the inside of the scheduler, shared by sched.c (the life of a sequence) and
 * sched_plan.c (choosing a step). */
#ifndef MOED_DAEMON_SCHED_STATE_H
#define MOED_DAEMON_SCHED_STATE_H

#include "daemon/pace.h"
#include "daemon/sched.h"

enum seq_state {
    SEQ_FREE, /* the entry is unused */
    SEQ_WAITING, /* in waiting[priority] */
    SEQ_RUNNING, /* in running[priority]; has a slot */
    SEQ_HELD, /* in no list: its client does not read */
    SEQ_OVER /* in no list: at its limit or failed while it had no slot; to be removed */
};

/* Tokens 0 … n_known-1 are in ids_of(). The n_out that follow were planned and not yet applied: the
 * engine knows them, we do not. A plan computes positions from n_scheduled on; the position
 * known + out - 1 is the one whose row is sampled. */
struct seq {
    enum seq_state state;
    uint32_t generation;
    uint32_t run; /* counts starts; a row of an earlier run is dropped */
    uint64_t arrival; /* over all sequences */
    int32_t priority;
    int32_t prev, next; /* in its list, or -1 */
    int32_t n_prompt, n_known, limit;
    int32_t n_scheduled; /* positions given to the engine in this run */
    int32_t n_out; /* sampled rows in outstanding plans of this run */
    int32_t n_step; /* tokens in the plan being made */
    int32_t slot; /* or -1 */
    int32_t n_preempted;
    bool decoding; /* this run has sampled: one token a step from now on */
    bool failed; /* a row was not ST_OK */
    uint64_t added_ns, first_scheduled_ns;
};

/* Sequences by arrival, oldest first. */
struct seq_list {
    int32_t head, tail, n;
};

/* Who a plan's sampled rows belong to. */
struct sched_row {
    struct sched_id id;
    uint32_t run;
    int32_t slot;
};

struct sched_out {
    uint64_t number, planned_ns;
    int32_t n_tokens, n_rows;
    struct sched_row *rows; /* [max_running] */
};

struct sched {
    struct sched_limits limits;
    struct paging *paging; /* borrowed */
    int32_t block_tokens;
    int32_t most_running; /* min(max_running, max_batch_tokens) */
    int32_t most_seq_tokens; /* min(max_seq_tokens, what the pool holds) */

    struct seq *seqs; /* [max_sequences] */
    struct moe_sampling *sampling; /* [max_sequences] */
    struct arena ids; /* [max_sequences][max_seq_tokens], see ids_of */
    struct seq_list waiting[SCHED_N_PRIORITIES], running[SCHED_N_PRIORITIES];
    int32_t *free_seqs, n_free_seqs; /* a stack */
    int32_t *free_slots, n_free_slots; /* a stack */
    int32_t *seq_of_slot; /* [max_running], or -1 */
    int32_t n_queued_tokens; /* prompts of waiting sequences */

    struct sched_out out[MOE_MAX_IN_FLIGHT]; /* outstanding plans, a ring */
    int32_t first_out, n_out;
    struct pace pace; /* learnt from the steps applied */
    uint64_t applied_ns; /* when the last plan's results came */
    uint64_t next_arrival;
    uint64_t n_preempted, n_plans, n_prompt_tokens, n_decode_tokens;
};

static inline int32_t *ids_of(const struct sched *s, int32_t idx) {
    return (int32_t *)(void *)s->ids.base + (size_t)idx * (size_t)s->limits.max_seq_tokens;
}

static inline int32_t blocks_of(const struct sched *s, int32_t n_tokens) {
    return (n_tokens + s->block_tokens - 1) / s->block_tokens;
}

/* Tokens there are or will be once what is out has come back. */
static inline int32_t n_virtual(const struct seq *q) { return q->n_known + q->n_out; }

static inline int32_t n_running(const struct sched *s) {
    return s->limits.max_running - s->n_free_slots;
}

/* Move a sequence from the head of its waiting list to running, with a slot and no blocks. */
void sched_start(struct sched *s, int32_t idx, uint64_t now_ns);
/* Take slot and blocks from a running sequence and leave it in no list. */
void sched_stop(struct sched *s, int32_t idx);
/* Back to the queue with the tokens it has; rows that are out count unless it starts before. */
void sched_preempt(struct sched *s, int32_t idx);

#endif
