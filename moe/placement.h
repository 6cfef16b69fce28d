/* placement: which experts' weights lie on which device. One pure function from measured load to a plan;
 * no device, no clock, no state.
 *
 * Each layer is planned alone. A device has `slots` places per layer; a place holds one expert's weights (a
 * replica). Every expert gets at least one replica; further places go to replicas of hot experts. The policy is
 * the greedy one of DeepSeek's EPLB (MIT licence; the algorithm, not its code):
 *   1. pack groups of experts to hosts: heaviest first, into the least loaded host that has room;
 *   2. within a host, give each further replica to the expert with the highest load per replica;
 *   3. pack replicas to the host's devices as in 1, with load / replicas as the weight.
 * One host and one group give the global policy. Ties go to the lower index, so that the same load always gives the same
 * plan. What an expert's tokens do with several replicas is the exchange's business; the plan assumes an even split.
 *
 * Any thread. */
#ifndef MOED_MOE_PLACEMENT_H
#define MOED_MOE_PLACEMENT_H

#include "proto/base.h"

struct placement_problem {
    int32_t n_layers;
    int32_t n_experts;  /* E, per layer */
    int32_t n_groups;   /* experts g*E/n_groups … belong to group g and stay on one host; divides E */
    int32_t n_hosts;    /* divides n_groups and n_devices */
    int32_t n_devices;
    int32_t slots;      /* replicas per device and layer; slots * n_devices >= E */
    const double *load; /* [n_layers][E], tokens or any other weight; finite, >= 0 */
};

/* Results, in the caller's arrays. Place p belongs to device p / slots. */
struct placement {
    int32_t *expert_of;  /* [n_layers][n_devices * slots] the expert in each place */
    int32_t *n_replicas; /* [n_layers][E] */
};

/* ST_INVALID with the field named when the problem contradicts itself or a load is not finite or is
 * negative; ST_NO_MEMORY. O(L · n_devices·slots · E). */
enum status placement_plan(const struct placement_problem *p, struct error *e,
                           struct placement *out);

/* Largest device load over the mean for one layer of a plan (1 = perfect), when each expert's load is
 * split evenly over its replicas. A layer without load: 1. */
double placement_imbalance(const struct placement_problem *p, const struct placement *plan,
                           int32_t layer);

#endif
