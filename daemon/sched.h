/* sched: which sequences run in the next step, and with which tokens. Owns every sequence's token
 * ids, its state and its progress; asks paging for blocks; never looks at a clock, a socket or a
 * device: every call takes `now`, so that tests run it on virtual time.
 *
 * A sequence is WAITING (no slot, no blocks), RUNNING (slot and blocks) or gone. Each plan picks
 * at most max_batch_tokens tokens: first the next token of every running sequence whose prompt is
 * done, then prompt chunks, oldest first, then new sequences from the queue (priority, then
 * arrival) while a slot, blocks and budget are left. When a running sequence needs a block and
 * none is free, the youngest running sequence (of the lowest priority) is preempted: its blocks
 * and slot go back, it returns to the head of the queue with the tokens it has, and is computed
 * again later. Its tokens do not change: KV is a pure function of the ids and the sampler of
 * (seed, position). The oldest sequence always advances: a sequence that could never fit the pool
 * alone is refused by sched_add.
 *
 * "Older" means (priority, then arrival), which a preemption does not change. What follows from
 * it:
 *   - A running sequence takes blocks from younger ones only. The youngest itself, when short of a
 *     block, keeps what it has and sits the step out: an older one finishes, or takes its blocks.
 *   - A chunk shrinks to the blocks that are free before anyone is preempted for it.
 *   - The queue is served strictly in order: what waits at its head is overtaken by higher priorities
 *     only. Within a priority nothing starves; a steady stream of a higher one can starve a lower.
 *   - A sequence is admitted only if all the tokens it has fit, beside what running prompts still
 *     need, and leave a reserve of 1 + running / 8 blocks (none when nothing runs); and not in a
 *     plan that preempted. Without the reserve, a full pool would admit and preempt in turns.
 *   - At most min(max_running, max_batch_tokens) run, so that every plan has a token for each of
 *     them.
 *
 * One step ahead: sched_plan may be called again before sched_apply of the previous plan. A
 * sequence whose sampled token is still out is planned with MOE_LAST_TOKEN at the next position,
 * unless it has reached its limit. What turns out not to be wanted (the token was a stop) is
 * dropped when its row arrives: sched_apply reports only rows of live sequences. Blocks may be
 * reused at once, because the engine runs steps in order.
 *
 * How long a step took is the time between its plan, or the results before it, and its results; a plan
 * that decodes is sized by that for max_itl_ns.
 *
 * Invariants (sched_check): scheduled <= known + out <= limit; blocks == ceil(scheduled / B); one
 * state; a slot belongs to one running sequence; lists in order; plan tokens <= max_batch_tokens;
 * each sequence at most once per plan.
 *
 * One owner thread (the loop). No allocation after sched_create. */
#ifndef MOED_DAEMON_SCHED_H
#define MOED_DAEMON_SCHED_H

#include "moe/moe.h"
#include "paging/paging.h"
#include "proto/base.h"

struct sched;

enum { SCHED_N_PRIORITIES = 3 }; /* classes 0, 1, 2 */

struct sched_limits {
    int32_t max_batch_tokens;
    int32_t max_running;    /* slots, == moe_limits.max_seqs */
    int32_t max_sequences;  /* waiting and running together */
    int32_t max_seq_tokens; /* prompt + completion of one */
    /* Prompt tokens waiting; over it sched_add says ST_OVERLOADED, unless none waits. */
    int32_t max_queued_tokens;
    int32_t prefill_chunk; /* most prompt tokens of one sequence in a step; 0 = the whole budget */
    /* Steps that decode hold no more prompt tokens than are expected to end within it (pace.h), but a block's
     * worth at least, so that prompts get on under any bound. 0 = no bound. */
    uint64_t max_itl_ns;
};

/* Names a sequence until sched_remove; generation tells a reused index apart. */
struct sched_id {
    int32_t idx; /* 0 … max_sequences-1: callers keep their own table by it */
    uint32_t generation;
};

struct sched_request {
    const int32_t *ids; /* prompt, copied; n_ids >= 1 */
    int32_t n_ids;
    int32_t max_tokens; /* to sample; >= 1; clipped to what max_seq_tokens and the pool hold */
    int32_t priority;   /* 0 first; < SCHED_N_PRIORITIES */
    struct moe_sampling sampling; /* copied */
};

/* ST_TOO_LONG: the prompt leaves no room for one token, or would never fit the pool;
 * ST_OVERLOADED: table or token queue full. */
enum status sched_add(struct sched *s, const struct sched_request *r, uint64_t now_ns,
                      struct sched_id *out);
/* The sequence is over (stopped, cancelled, failed): give back slot and blocks. Unknown or old id:
 * no effect. */
void sched_remove(struct sched *s, struct sched_id id);
/* Hold: as if preempted (slot and blocks go back, rows still out are dropped) and not planned
 * again until released; then it returns to the head of its queue. For sequences whose client does
 * not read. A sequence held already, or not held, or unknown: no effect. */
void sched_hold(struct sched *s, struct sched_id id, bool held);

/* A plan: what to hand to the engine. Owned by the caller, sized by sched_plan_create, filled by
 * sched_plan, left alone until its results were applied. */
struct sched_plan {
    uint64_t number;            /* 1, 2, 3 … */
    struct moe_step step;       /* points into the arrays below */
    struct moe_step_seq *seqs;
    int32_t *ids, *blocks;
    struct sched_id *id_of;     /* [n_seqs]: who each step sequence is */
    int32_t n_starts;
    struct moe_slot_start *starts; /* to pass to moe_slot_start before the step */
    int32_t *start_ids;            /* what the starts' ids point to */
    int32_t n_decode_tokens, n_prefill_tokens, n_preempted; /* in this plan */
};
enum status sched_plan_create(const struct sched_limits *l, int32_t max_blocks_per_seq,
                              struct sched_plan *out);
void sched_plan_destroy(struct sched_plan *p);

/* Choose the next step. Returns false, with an empty plan, when nothing can run now. At most
 * MOE_MAX_IN_FLIGHT plans may be out. */
bool sched_plan(struct sched *s, uint64_t now_ns, struct sched_plan *out);

/* What a plan's result means for one live sequence. */
struct sched_token {
    struct sched_id id;
    const struct moe_row *row;  /* borrowed from the result */
    int32_t n_sampled;          /* this one included */
    bool at_limit;              /* it was the last one max_tokens or the context allows */
};
/* Take the oldest outstanding plan's result: append sampled tokens to their sequences and list
 * them, in step order, in out[max_running]. Rows of sequences removed (or preempted and restarted)
 * since are dropped. A row with st != ST_OK is listed and not appended, and its sequence not
 * planned again: the caller removes it, and one that is at its limit. Returns how many. CHECK: the
 * rows are those that the plan asked for, in order. */
int32_t sched_apply(struct sched *s, struct sched_plan *plan, const struct moe_result *result,
                    uint64_t now_ns, struct sched_token *out);

struct sched_stats {
    int32_t n_waiting, n_running, n_waiting_tokens;
    uint64_t n_preempted, n_plans;
    uint64_t n_prompt_tokens, n_decode_tokens; /* scheduled, recomputed ones included */
};
struct sched_stats sched_stats(const struct sched *s);
/* Per sequence, for timings. first_scheduled_ns is 0 until then. */
struct sched_seq_info {
    bool running;
    int32_t n_prompt, n_known, n_preempted;
    uint64_t added_ns, first_scheduled_ns;
};
/* ST_NOT_FOUND: unknown or old id. */
enum status sched_seq_info(const struct sched *s, struct sched_id id, struct sched_seq_info *out);

/* ST_INVALID: a limit below 1 (prefill_chunk below 0), or a pool that does not fit the limits
 * (block_tokens, slots, the longest table); ST_NO_MEMORY. Memory for max_sequences *
 * max_seq_tokens ids is reserved, and used as ids come. */
enum status sched_create(const struct sched_limits *l, struct paging *p, int32_t block_tokens,
                         struct sched **out); /* p is borrowed */
void sched_destroy(struct sched *s);
enum status sched_check(const struct sched *s, struct error *e);

#endif
