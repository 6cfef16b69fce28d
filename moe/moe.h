/* moe: the model, as the daemon and the benches see it. Opens a GGUF file on a backend, runs steps.
 *
 * A step is one batch: for each of S sequences, the next n tokens (1 for decoding, a chunk for
 * prefill), the block table that covers them, and whether the last one is sampled. Sampling state lives
 * with the model, per slot, so that a step can be submitted before the previous one's tokens are known:
 * a token id of MOE_LAST_TOKEN stands for "what this slot sampled last".
 *
 * One caller thread (the daemon's engine thread). moe_submit and moe_collect do not allocate.
 *
 * Letters: see backend.h. */
#ifndef MOED_MOE_MOE_H
#define MOED_MOE_MOE_H

#include "proto/base.h"

enum {
    MOE_LAST_TOKEN = -1,
    MOE_MAX_TOP = 20,      /* top logprobs per row */
    MOE_MAX_BIASES = 128,
    MOE_MAX_STOP_IDS = 24, /* ids banned until min_tokens */
    MOE_MAX_IN_FLIGHT = 2, /* steps between submit and collect */
    MOE_MAX_RANKS = 16,    /* devices that serve one model */
    MOE_OFFLOAD_AUTO = -1, /* as many experts as it takes */
    MOE_UNIQUE_ID_BYTES = 128
};

/* What the file's metadata says, range-checked by the loader (fields: model-math, GGUF keys). */
struct model_shape {
    int32_t n_layers;        /* L */
    int32_t n_embd;          /* D */
    int32_t n_heads;         /* H */
    int32_t n_kv_heads;      /* G */
    int32_t head_dim;        /* Hd: attention.key_length; not D/H */
    int32_t n_experts;       /* E */
    int32_t n_experts_used;  /* K */
    int32_t n_ff_expert;     /* F */
    int32_t n_vocab;         /* V */
    int32_t n_ctx_train;     /* context_length */
    float norm_eps;
    float rope_base;
};

/* What ranks in several processes compare before they take each other for copies. */
struct moe_identity {
    struct model_shape shape;
    uint64_t fingerprint; /* of every tensor's name, type, shape and some of its bytes: no seal against malice */
};
/* Reads little of the file. Errors as moe_open's. */
enum status moe_identify(const char *model_path, struct error *e, struct moe_identity *out);

/* Capacity: everything is allocated from these before the first step. */
struct moe_limits {
    int32_t max_batch_tokens; /* T: tokens in one step */
    int32_t max_seqs;         /* slots, and sequences in one step */
    int32_t max_rows;         /* R: rows that may reach the head in one step; >= max_seqs */
    int32_t max_seq_tokens;   /* positions of one sequence; clipped to n_ctx_train; 0 = that, or the pool if less */
    int32_t block_tokens;     /* B */
    int32_t n_blocks;         /* KV pool; 0 = what memory allows (GPU) or max_seqs * 1024 tokens' worth */
};

struct moe_options {
    const char *model_path;
    const char *device; /* "cpu", "reference", "cuda:0" */
    struct moe_limits limits;
    int n_threads;       /* for all ranks together; 0 = all cores */
    int n_ranks;         /* models of this process that share the cores; 0 = 1 */
    struct moe_group *group; /* NULL, or what this model computes its experts with */
    int rank;            /* in the group; each once */
    const char *cpu_isa; /* NULL = auto */
    double gpu_memory_utilization;
    /* Experts, of all layers together, that a GPU reads from page-locked host memory: coldest first; 0: a model that does
     * not fit is refused (ST_NO_MEMORY says what it would take). Not in a group. */
    int32_t offload_experts; /* or MOE_OFFLOAD_AUTO */
    const uint64_t *expert_load; /* [n_expert_load] tokens of each (layer, expert), measured before; NULL: not known.
                                    Borrowed until the model is open */
    size_t n_expert_load; /* L * E, else opening says ST_INVALID */
};

/* Ranks, of this process or of several, that compute one model's experts together (expert parallel): each has its
 * own sequences, KV blocks and attention, and computes the experts that it holds for all ranks' tokens. Every
 * rank runs the same steps at the same time, an empty one (n_seqs 0) where it has no sequences. Tokens are
 * those of one rank alone, bit for bit. */
struct moe_group;
/* What names a group to its backends, before its ranks know each other: an ncclUniqueId, for instance. Made in
 * one process and carried to all. */
struct moe_unique_id {
    uint8_t bytes[MOE_UNIQUE_ID_BYTES];
};
/* For ranks on devices such as this one; zeros where the backend needs none. */
enum status moe_unique_id_create(const char *device, struct error *e, struct moe_unique_id *out);
struct moe_group_options {
    int n_ranks; /* 1 … MOE_MAX_RANKS */
    int32_t experts_per_rank; /* held per layer; 0: as few as hold each once; more than E: all, everywhere */
    /* NULL: all ranks are threads of this process, and use this one group. Else [n_ranks] connected stream sockets
     * that do not block, one to each other rank; the group is that of `rank` alone, and closes them in any case. */
    const int *streams;
    int rank;
    uint64_t timeout_ns; /* a rank that keeps the others waiting for longer is lost; 0: 10 s */
    uint64_t replan_tokens; /* look at the balance every so many routed tokens of all layers; 0: 2^20, on GPUs 2^26 */
    double max_imbalance; /* plan anew above it; 0: 1.1 */
    const uint64_t *load; /* [n_load] tokens of each (layer, expert), measured before: the first plan is made for
                             them; NULL: all alike. Borrowed until the models are open */
    size_t n_load; /* L * E, else opening says ST_INVALID */
    const struct moe_unique_id *unique_id; /* as moe_unique_id_create gave it to one of the ranks; NULL: none */
};
/* ST_INVALID; ST_NO_MEMORY. The group outlives its models. */
enum status moe_group_create(const struct moe_group_options *o, struct error *e,
                             struct moe_group **out);
void moe_group_destroy(struct moe_group *g); /* NULL is fine */
/* Whether the ranks compute their experts together (as they do at first) or each alone, as replicas; the tokens are
 * the same. Said to the groups of all ranks, where each has its own. ST_UNSUPPORTED: alone, but some rank does not hold all experts. The models are open, and no step
 * is out. */
enum status moe_group_use(struct moe_group *g, bool together);
bool moe_group_together(const struct moe_group *g);
/* For tests and tools: tokens routed since the group began, [L][E], L and E as in moe_info. Any thread. */
void moe_group_load(const struct moe_group *g, uint64_t *dst);
/* Likewise who holds each expert, a bit for each rank. No step may be out. */
void moe_group_held(const struct moe_group *g, uint16_t *dst);

/* Devices as a person lists them: "cuda:0,cuda:1". */
struct moe_devices {
    int n; /* 1 … MOE_MAX_RANKS */
    char names[MOE_MAX_RANKS][16];
};
/* ST_INVALID names the word that is no device. All must be of one kind (cpu, reference or cuda). */
enum status moe_devices_parse(const char *list, struct error *e, struct moe_devices *out);

/* Experts in host memory, and what a step is expected to read of them over PCIe. */
struct moe_offload {
    int32_t n_experts; /* 0: all weights are on the device */
    uint64_t host_bytes;
    double alone_bytes, full_bytes; /* in a step of one token, and of one for each of max_seqs sequences */
};

struct moe_info {
    char name[128];         /* general.name */
    char architecture[32];
    char backend[128];
    char quantization[16];  /* most common expert tensor type: "Q4_K" */
    struct model_shape shape;
    struct moe_limits limits; /* as in force: n_blocks filled */
    uint64_t weight_bytes;      /* in the file */
    uint64_t kv_bytes_per_token;
    struct moe_offload offload;
    int32_t eos_id;         /* -1 if the file names none */
};

struct moe_memory_line {
    char what[48];
    uint64_t n_bytes;
};

/* Since open. An "expert read" is one expert's gate, up and down read for one group in one step. */
struct moe_counters {
    uint64_t n_steps, n_tokens, n_sampled;
    uint64_t expert_reads;         /* non-empty (layer, expert) groups */
    uint64_t expert_reads_ungrouped; /* what serving each token alone would have read: sum of T*K */
    uint64_t busy_ns;              /* in steps */
    uint64_t offload_bytes;        /* of experts, read from host memory */
    /* In a group: */
    uint64_t expert_rows; /* (token, expert) pairs that this rank computed */
    uint64_t exchange_bytes; /* rows that came from other ranks */
    uint64_t n_replans, n_moved; /* plans that were taken, and experts that this rank gained by them */
};

struct moe_bias {
    int32_t token;
    float bias;
};

/* How one sequence is sampled; moe/sampler.h defines the order of operations. Neutral values switch a
 * feature off. All floats finite (the wire sees to it; CHECK here). */
struct moe_sampling {
    float temperature; /* 0 = greedy: the largest logit, ties to the lower id */
    int32_t top_k;     /* 0 = off */
    float top_p;       /* 1 = off */
    float min_p;       /* 0 = off */
    float repetition_penalty;                  /* 1 = off; over prompt and output */
    float presence_penalty, frequency_penalty; /* 0 = off; over output */
    uint64_t seed;     /* a draw depends on (seed, position) only */
    int32_t n_bias;
    struct moe_bias bias[MOE_MAX_BIASES];
    int32_t min_tokens; /* until so many were sampled, stop_ids are not */
    int32_t n_stop_ids;
    int32_t stop_ids[MOE_MAX_STOP_IDS];
    bool logprobs;      /* report the drawn token's log-probability */
    int32_t n_top;      /* and the n most likely ones'; 0 … MOE_MAX_TOP */
};

/* Begin or resume a sequence in a slot: the sampler's history becomes ids. Takes effect in order with
 * steps. Until the next start, sampled tokens are appended. */
struct moe_slot_start {
    int32_t slot;
    struct moe_sampling sampling;
    const int32_t *ids; /* prompt, then what was sampled before (after a preemption): all ids before the next sampled one */
    int32_t n_ids, n_prompt;
};

enum moe_rows {
    MOE_ROWS_NONE,   /* a prefill chunk before the last */
    MOE_ROWS_SAMPLE, /* the last token's logits are sampled */
    MOE_ROWS_ALL     /* logits of every token, nothing sampled (scoring, tests) */
};

struct moe_step_seq {
    int32_t slot;      /* 0 … max_seqs-1; at most once in a step */
    int32_t start_pos; /* position of its first token in this step */
    int32_t n_tokens;  /* >= 1 */
    int32_t n_blocks;  /* == ceil((start_pos + n_tokens) / B) at least */
    enum moe_rows rows;
};

/* Borrowed until moe_submit returns. Tokens of a sequence are contiguous, sequences in array order. */
struct moe_step {
    int32_t n_seqs, n_tokens; /* >= 1; 0 only in a group */
    const struct moe_step_seq *seqs; /* [n_seqs] */
    const int32_t *ids;              /* [n_tokens]; MOE_LAST_TOKEN only for a slot that has sampled */
    const int32_t *blocks;           /* the sequences' tables, one after the other */
};

struct moe_row {
    int32_t slot;
    int32_t token;   /* sampled id; -1 for ROWS_ALL or on error */
    enum status st;  /* ST_NUMERIC: logits were not finite */
    float logprob;   /* when asked for; of the distribution before temperature and penalties */
    int32_t n_top;
    int32_t top_ids[MOE_MAX_TOP];
    float top_logprobs[MOE_MAX_TOP];
};

struct moe_result {
    int32_t n_rows;
    struct moe_row *rows; /* the caller's array, limits.max_rows long; in step order */
    uint64_t run_ns;      /* time the step ran */
};

struct moe;

/* Load and validate the file, load the weights, allocate everything. Errors name the key, tensor or
 * limit. progress (may be NULL) is called on this thread now and then with bytes loaded. */
enum status moe_open(const struct moe_options *o,
                     void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                     struct error *e, struct moe **out);
void moe_close(struct moe *m); /* NULL is fine */

const struct moe_info *moe_info(const struct moe *m);
/* Boot-time byte table: weights, KV, activations, sampler, …; returns the number of lines. */
int moe_memory(const struct moe *m, struct moe_memory_line *dst, int cap);
void moe_counters(const struct moe *m, struct moe_counters *out);
/* sum[L][E] += tokens routed to each (layer, expert) since open. ST_UNSUPPORTED: only a model with experts in host
 * memory counts them; a group has moe_group_load. No step may be out. */
enum status moe_expert_load(struct moe *m, uint64_t *sum);

/* Whether a start, or a step after the starts before it, is within limits, in the vocabulary and in order: for those
 * that come from elsewhere. */
bool moe_start_fits(const struct moe *m, const struct moe_slot_start *start);
bool moe_step_fits(struct moe *m, const struct moe_step *step);

/* CHECK: moe_start_fits. */
enum status moe_slot_start(struct moe *m, const struct moe_slot_start *start);
/* Start a step. CHECK: moe_step_fits, at most MOE_MAX_IN_FLIGHT uncollected. A CPU backend computes
 * here; a GPU launches. */
enum status moe_submit(struct moe *m, const struct moe_step *step);
/* Wait for the oldest submitted step. ST_ENGINE_LOST: the device is gone; end the process. */
enum status moe_collect(struct moe *m, struct moe_result *out);

/* After moe_collect: logits of row r of the step collected last, V floats. For ROWS_ALL rows; after
 * sampling the buffer may have been overwritten, so sampled rows are not available. CHECK: no step was
 * submitted since. */
enum status moe_logits(struct moe *m, int32_t row, float *dst);

/* Test hook: called after the embedding (layer -1) and after each layer, on the caller's thread, with
 * the hidden state [T][D] and, for layer >= 0, routed ids and weights [T][K]. NULL removes it. */
typedef void moe_probe_fn(void *ctx, int layer, int32_t n_tokens, const float *hidden,
                          const int32_t *ids, const float *weights);
void moe_set_probe(struct moe *m, moe_probe_fn *fn, void *ctx);

/* Test hook: overwrite all keys and values with a byte (0xFF makes them NaN), which must not change what
 * sequences that begin afterwards compute. */
enum status moe_kv_poison(struct moe *m, uint8_t byte);

#endif
