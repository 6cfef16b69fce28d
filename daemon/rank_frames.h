/* rank_frames: the bodies of the frames between the process that serves and the ranks of other processes
 * (rank_link.h). Each body has one function, which writes or reads it, so that the two cannot differ; what was read
 * is held to its types and bounds here, to the model and its limits by whoever uses it.
 *
 * Numbers are little-endian, as they lie; bools are 32 bits, 0 or 1. Pure functions; any thread. */
#ifndef MOED_DAEMON_RANK_FRAMES_H
#define MOED_DAEMON_RANK_FRAMES_H

#include "moe/moe.h"
#include "proto/base.h"

/* Where a body is written to or read from. */
struct pass {
    uint8_t *p; /* not written when reading */
    size_t n, at;
    bool writes, bad; /* bad: no room, or not what it should be; nothing is passed from then on */
};
static inline struct pass pass_writer(uint8_t *p, size_t n) {
    return (struct pass){.p = p, .n = n, .writes = true};
}
static inline struct pass pass_reader(const uint8_t *p, size_t n) {
    return (struct pass){.p = (uint8_t *)(uintptr_t)p, .n = n};
}
/* All was read, and all was well. */
static inline bool pass_done(const struct pass *p) { return !p->bad && p->at == p->n; }

enum { RANK_TOKEN_BYTES = 16, RANK_ADDRESS_BYTES = 64, RANK_MAX_EXPERTS = 1 << 20 };

struct rank_hello {
    char version[32]; /* of moed: both sides must be of one build's arithmetic */
    char kind[16]; /* of device: "cpu", "reference", "cuda" */
    int32_t launched_rank, index; /* the launcher's number of the process, or -1; device in it */
    struct moe_identity model;
};

struct rank_welcome {
    int32_t rank, n_ranks;
    struct moe_limits limits; /* as asked for */
    bool group; /* of experts: then what follows counts */
    int32_t experts_per_rank;
    struct moe_unique_id unique_id;
    uint8_t token[RANK_TOKEN_BYTES]; /* by which the ranks know each other */
    uint32_t n_load; /* of the load: measured tokens of each (layer, expert), or 0 */
    const uint8_t *load; /* [n_load] u64, unaligned; borrowed from the body when read */
};

struct rank_peers {
    int32_t n;
    struct {
        char host[RANK_ADDRESS_BYTES]; /* "": the host of the process that serves */
        uint16_t port;
    } at[MOE_MAX_RANKS];
};

struct rank_opened {
    struct moe_info info;
    int32_t depth; /* see engine_ops */
};

/* In front of a step come its starts, their number and whether the group's experts are computed together. */
struct rank_step_head {
    bool together;
    uint32_t n_starts;
};

struct rank_result {
    uint64_t run_ns;
    struct moe_counters counters;
    int32_t n_rows;
    struct moe_row *rows; /* [max_rows] the caller's */
};

void pass_hello(struct pass *p, struct rank_hello *v);
void pass_welcome(struct pass *p, struct rank_welcome *v);
void pass_error(struct pass *p, struct error *v); /* RANK_LINK_REFUSED, RANK_LINK_LOST */
void pass_port(struct pass *p, uint16_t *v);
void pass_peers(struct pass *p, struct rank_peers *v);
void pass_opened(struct pass *p, struct rank_opened *v);
void pass_step_head(struct pass *p, struct rank_step_head *v);
void pass_start(struct pass *p, struct moe_slot_start *v); /* ids are borrowed when read */
/* seqs: room for max_seqs when reading; ids and blocks are borrowed. */
void pass_step(struct pass *p, struct moe_step *v, struct moe_step_seq *seqs, int32_t max_seqs);
void pass_result(struct pass *p, struct rank_result *v, int32_t max_rows);

/* Most bytes of a step's frame and of a result's under these limits. */
size_t rank_step_bytes(const struct moe_limits *l);
size_t rank_result_bytes(const struct moe_limits *l);

#endif
