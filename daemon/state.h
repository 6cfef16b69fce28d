/* state: what the loop owns, shared by the files of the loop (server.c, receive.c, submit.c,
 * reply.c, step.c, stats.c) and by nobody else.
 *
 * Rule of sending: a failed send only marks the session `gone`. Sessions that are gone are cleared
 * away by server_clear_gone, between messages and steps, so that nobody's walk over requests loses
 * its footing. */
#ifndef MOED_DAEMON_STATE_H
#define MOED_DAEMON_STATE_H

#include "daemon/request.h"
#include "daemon/server.h"
#include "daemon/session.h"
#include "daemon/textwork.h"
#include "paging/paging.h"

enum { MAX_RETRY_AFTER_MS = 60000, MIN_RETRY_AFTER_MS = 50 };

struct tallies { /* since start */
    uint64_t accepted, finished[5], failed[ST_COUNT], rejected[ST_COUNT]; /* by reason, by code */
    uint64_t dropped; /* requests whose session ended first */
    uint64_t prompt_tokens, completion_tokens, chunks;
    uint64_t sessions_opened, sessions_lost; /* lost: not by Bye */
    uint64_t bad_messages; /* frames that were not the protocol */
    uint64_t messages_in, messages_out;
};

/* One engine and what is scheduled on it: a device's own sequences, blocks and steps. */
struct rank {
    struct engine *engine;
    struct paging *paging;
    struct sched *sched;
    struct engine_step steps[MOE_MAX_IN_FLIGHT];
    struct engine_step *idle_steps[MOE_MAX_IN_FLIGHT]; /* not with the engine */
    int n_idle_steps;
    bool answer_due; /* the engine waits to hear what comes next */
    uint64_t moved_ns; /* when a step last came back, or went out while none was out */
    int32_t *choice_of_seq; /* [max_sequences]; -1: none */
    struct moe_counters counters; /* of the step applied last */
};

struct server {
    struct server_options o;
    struct net *net;
    struct textwork *textwork;
    struct sessions *sessions;
    struct requests *requests;
    struct rank ranks[MOE_MAX_RANKS]; /* [o.n_ranks] */
    int stop_fd;
    uint8_t boot_id[WIRE_ID_BYTES];

    struct sched_token *tokens; /* [max_seqs] */
    int32_t max_sequences; /* on all ranks */

    int32_t *dirty; /* sessions to flush: [n_dirty], may repeat none */
    bool *is_dirty; /* [max_sessions] */
    int32_t n_dirty, n_gone;

    struct arena decode, encode;
    uint8_t *frame; /* [WIRE_MAX_BODY_BYTES] */
    struct wire_token_logprob *logprobs; /* [PENDING_MAX_IDS] */

    uint64_t now_ns; /* of this turn of the loop */
    uint64_t timer_ns; /* earliest time that something is due; UINT64_MAX: nothing */
    uint64_t start_ns, last_step_ns;
    uint64_t drain_until_ns; /* 0: not draining */
    uint64_t random; /* state of server_random */
    int n_stops; /* server_stop calls seen */
    enum status lost; /* the engine's status, if it is lost */

    double finish_interval_ns; /* smoothed time between ends of requests; 0: not known yet */
    uint64_t last_finish_ns;
    struct tallies tallies;
    uint64_t n_bytes;
};

/* ---- server.c */
uint64_t server_random(struct server *v);
/* Make sure the timers are looked at by then. */
void server_timer(struct server *v, uint64_t at_ns);
void server_dirty(struct server *v, struct session *s);
static inline bool server_draining(const struct server *v) { return v->drain_until_ns != 0; }

/* ---- reply.c: everything that is sent, and every end of a request */
void send_session(struct server *v, struct session *s, const struct wire_msg *msg);
void send_route(struct server *v, struct bytes route, const struct wire_msg *msg);
void send_rejected(struct server *v, struct session *s, uint64_t request_id, const struct error *e);
void send_failed(struct server *v, struct session *s, uint64_t request_id, const struct error *e);
void send_goodbye(struct server *v, struct bytes route, const struct error *e);
/* Say Goodbye, and have the session cleared away. */
void session_dismiss(struct server *v, struct session *s, const struct error *e);
void session_lose(struct server *v, struct session *s, const char *why);
/* Close sessions marked gone; their requests are dropped and their blocks freed. */
void server_clear_gone(struct server *v);
/* Send what waits as far as the windows allow, finish what is over, hold and release. */
void server_flush(struct server *v);

/* Take a choice's sequence out of the scheduler, keeping what the Finished needs of it. */
void choice_take_out(struct server *v, struct request *r, struct choice *c);
/* End what is open for that reason; the Finished follows once all text is sent. */
void request_end_early(struct server *v, struct request *r, enum wire_reason reason);
void request_reject(struct server *v, struct request *r, const struct error *e);
void request_fail(struct server *v, struct request *r, enum status st, const char *text);

/* ---- receive.c */
void receive_message(struct server *v, const struct net_message *m);

/* ---- submit.c */
void submit_receive(struct server *v, struct session *s, const struct wire_msg *msg);
/* ST_INVALID, with `what` named: a token that the vocabulary does not have. */
enum status submit_check_ids(const struct server *v, const int32_t *ids, size_t n, const char *what,
                             struct error *e);
void submit_tokenized(struct server *v, const struct text_result *result);

/* ---- step.c */
enum status step_create(struct server *v);
void step_destroy(struct server *v);
void step_results(struct server *v);
void step_plan(struct server *v);
void step_timers(struct server *v); /* an engine that keeps a step too long is lost */
/* Where a new sequence goes: the rank with the most blocks to spare. */
int step_pick_rank(const struct server *v);

/* ---- stats.c */
void stats_send(struct server *v, struct session *s, uint64_t request_id);
/* Of all ranks together. */
struct sched_stats stats_sched(const struct server *v);
void stats_finished(struct server *v); /* a request ended: for the estimate below */
uint32_t stats_retry_after_ms(struct server *v);

#endif
