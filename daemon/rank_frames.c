/* See rank_frames.h. */
#include "daemon/rank_frames.h"

#include <string.h>

/* ---- words ---------------------------------------------------------------------------------- */

static void pass_bytes(struct pass *p, void *v, size_t n) {
    if (p->bad || n > p->n - p->at) {
        p->bad = true;
        return;
    }
    if (p->writes)
        memcpy(p->p + p->at, v, n);
    else
        memcpy(v, p->p + p->at, n);
    p->at += n;
}

static void pass_i32(struct pass *p, int32_t *v) { pass_bytes(p, v, sizeof *v); }
static void pass_u32(struct pass *p, uint32_t *v) { pass_bytes(p, v, sizeof *v); }
static void pass_u64(struct pass *p, uint64_t *v) { pass_bytes(p, v, sizeof *v); }
static void pass_f32(struct pass *p, float *v) { pass_bytes(p, v, sizeof *v); }

static void pass_bool(struct pass *p, bool *v) {
    uint32_t n = p->writes ? *v : 0;
    pass_u32(p, &n);
    if (n > 1) p->bad = true;
    if (!p->writes && !p->bad) *v = n == 1;
}

/* A number of things, 0 … most. */
static void pass_count(struct pass *p, int32_t *v, int32_t most) {
    pass_i32(p, v);
    if (!p->bad && (*v < 0 || *v > most)) p->bad = true;
    if (p->bad && !p->writes) *v = 0;
}

/* Text in a field of n bytes. */
static void pass_text(struct pass *p, char *v, size_t n) {
    pass_bytes(p, v, n);
    if (p->writes) return;
    if (p->bad || !memchr(v, 0, n)) {
        p->bad = true;
        v[0] = '\0';
    }
}

/* n numbers, which stay in the body when read: everything before them has a multiple of four bytes. */
static void pass_ids(struct pass *p, const int32_t **v, int32_t n) {
    size_t bytes = (size_t)n * sizeof **v;
    if (p->bad || bytes > p->n - p->at) {
        p->bad = true;
        return;
    }
    if (p->writes && n > 0)
        memcpy(p->p + p->at, *v, bytes);
    else if (!p->writes)
        *v = (const int32_t *)(const void *)(p->p + p->at);
    p->at += bytes;
}

/* ---- joining -------------------------------------------------------------------------------- */

static void pass_shape(struct pass *p, struct model_shape *v) {
    int32_t *const fields[] = {&v->n_layers, &v->n_embd,     &v->n_heads,        &v->n_kv_heads,
                               &v->head_dim, &v->n_experts,  &v->n_experts_used, &v->n_ff_expert,
                               &v->n_vocab,  &v->n_ctx_train};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) pass_i32(p, fields[i]);
    pass_f32(p, &v->norm_eps);
    pass_f32(p, &v->rope_base);
}

static void pass_limits(struct pass *p, struct moe_limits *v) {
    pass_i32(p, &v->max_batch_tokens);
    pass_i32(p, &v->max_seqs);
    pass_i32(p, &v->max_rows);
    pass_i32(p, &v->max_seq_tokens);
    pass_i32(p, &v->block_tokens);
    pass_i32(p, &v->n_blocks);
}

void pass_hello(struct pass *p, struct rank_hello *v) {
    pass_text(p, v->version, sizeof v->version);
    pass_text(p, v->kind, sizeof v->kind);
    pass_i32(p, &v->launched_rank);
    pass_i32(p, &v->index);
    pass_u64(p, &v->model.fingerprint);
    pass_shape(p, &v->model.shape);
}

void pass_welcome(struct pass *p, struct rank_welcome *v) {
    pass_count(p, &v->n_ranks, MOE_MAX_RANKS);
    pass_count(p, &v->rank, v->n_ranks - 1);
    pass_limits(p, &v->limits);
    pass_bool(p, &v->group);
    pass_i32(p, &v->experts_per_rank);
    pass_bytes(p, v->unique_id.bytes, sizeof v->unique_id.bytes);
    pass_bytes(p, v->token, sizeof v->token);
    pass_u32(p, &v->n_load);
    size_t n = (size_t)v->n_load * sizeof(uint64_t);
    if (p->bad || v->n_load > RANK_MAX_EXPERTS || n > p->n - p->at) {
        p->bad = true;
        return;
    }
    if (p->writes && n > 0)
        memcpy(p->p + p->at, v->load, n);
    else if (!p->writes)
        v->load = p->p + p->at;
    p->at += n;
}

void pass_error(struct pass *p, struct error *v) {
    int32_t code = p->writes ? (int32_t)v->code : 0;
    pass_count(p, &code, ST_COUNT - 1);
    pass_text(p, v->text, sizeof v->text);
    if (!p->writes) v->code = (enum status)code;
}

void pass_port(struct pass *p, uint16_t *v) {
    uint32_t n = p->writes ? *v : 0;
    pass_u32(p, &n);
    if (n > UINT16_MAX) p->bad = true;
    if (!p->writes && !p->bad) *v = (uint16_t)n;
}

void pass_peers(struct pass *p, struct rank_peers *v) {
    pass_count(p, &v->n, MOE_MAX_RANKS);
    for (int32_t i = 0; i < v->n && !p->bad; i++) {
        pass_text(p, v->at[i].host, sizeof v->at[i].host);
        pass_port(p, &v->at[i].port);
    }
}

void pass_opened(struct pass *p, struct rank_opened *v) {
    struct moe_info *i = &v->info;
    pass_text(p, i->name, sizeof i->name);
    pass_text(p, i->architecture, sizeof i->architecture);
    pass_text(p, i->backend, sizeof i->backend);
    pass_text(p, i->quantization, sizeof i->quantization);
    pass_shape(p, &i->shape);
    pass_limits(p, &i->limits);
    pass_u64(p, &i->weight_bytes);
    pass_u64(p, &i->kv_bytes_per_token);
    pass_i32(p, &i->eos_id);
    pass_i32(p, &v->depth);
}

/* ---- steps ---------------------------------------------------------------------------------- */

void pass_step_head(struct pass *p, struct rank_step_head *v) {
    pass_bool(p, &v->together);
    pass_u32(p, &v->n_starts);
}

static void pass_sampling(struct pass *p, struct moe_sampling *v) {
    pass_f32(p, &v->temperature);
    pass_i32(p, &v->top_k);
    pass_f32(p, &v->top_p);
    pass_f32(p, &v->min_p);
    pass_f32(p, &v->repetition_penalty);
    pass_f32(p, &v->presence_penalty);
    pass_f32(p, &v->frequency_penalty);
    pass_u64(p, &v->seed);
    pass_count(p, &v->n_bias, MOE_MAX_BIASES);
    for (int32_t i = 0; i < v->n_bias; i++) {
        pass_i32(p, &v->bias[i].token);
        pass_f32(p, &v->bias[i].bias);
    }
    pass_i32(p, &v->min_tokens);
    pass_count(p, &v->n_stop_ids, MOE_MAX_STOP_IDS);
    for (int32_t i = 0; i < v->n_stop_ids; i++) pass_i32(p, &v->stop_ids[i]);
    pass_bool(p, &v->logprobs);
    pass_i32(p, &v->n_top);
}

void pass_start(struct pass *p, struct moe_slot_start *v) {
    pass_i32(p, &v->slot);
    pass_sampling(p, &v->sampling);
    pass_i32(p, &v->n_prompt);
    pass_count(p, &v->n_ids, INT32_MAX);
    pass_ids(p, &v->ids, v->n_ids);
}

void pass_step(struct pass *p, struct moe_step *v, struct moe_step_seq *seqs, int32_t max_seqs) {
    int64_t n_tokens = 0, n_blocks = 0;
    pass_count(p, &v->n_seqs, max_seqs);
    for (int32_t i = 0; i < v->n_seqs && !p->bad; i++) {
        struct moe_step_seq s = p->writes ? v->seqs[i] : (struct moe_step_seq){0};
        int32_t rows = (int32_t)s.rows;
        pass_i32(p, &s.slot);
        pass_i32(p, &s.start_pos);
        pass_count(p, &s.n_tokens, INT32_MAX);
        pass_count(p, &s.n_blocks, INT32_MAX);
        pass_count(p, &rows, MOE_ROWS_ALL);
        s.rows = (enum moe_rows)rows;
        n_tokens += s.n_tokens;
        n_blocks += s.n_blocks;
        if (!p->writes) seqs[i] = s;
    }
    if (n_tokens > INT32_MAX || n_blocks > INT32_MAX) p->bad = true;
    if (p->bad) return;
    if (!p->writes) *v = (struct moe_step){v->n_seqs, (int32_t)n_tokens, seqs, NULL, NULL};
    pass_ids(p, &v->ids, (int32_t)n_tokens);
    pass_ids(p, &v->blocks, (int32_t)n_blocks);
}

static void pass_counters(struct pass *p, struct moe_counters *v) {
    uint64_t *const fields[] = {&v->n_steps,
                                &v->n_tokens,
                                &v->n_sampled,
                                &v->expert_reads,
                                &v->expert_reads_ungrouped,
                                &v->busy_ns,
                                &v->expert_rows,
                                &v->exchange_bytes,
                                &v->n_replans,
                                &v->n_moved,
                                &v->offload_bytes};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) pass_u64(p, fields[i]);
}

static void pass_row(struct pass *p, struct moe_row *v) {
    int32_t st = p->writes ? (int32_t)v->st : 0;
    pass_i32(p, &v->slot);
    pass_i32(p, &v->token);
    pass_count(p, &st, ST_COUNT - 1);
    v->st = (enum status)st;
    pass_f32(p, &v->logprob);
    pass_count(p, &v->n_top, MOE_MAX_TOP);
    for (int32_t i = 0; i < v->n_top; i++) {
        pass_i32(p, &v->top_ids[i]);
        pass_f32(p, &v->top_logprobs[i]);
    }
}

void pass_result(struct pass *p, struct rank_result *v, int32_t max_rows) {
    pass_u64(p, &v->run_ns);
    pass_counters(p, &v->counters);
    pass_count(p, &v->n_rows, max_rows);
    for (int32_t i = 0; i < v->n_rows && !p->bad; i++) pass_row(p, &v->rows[i]);
}

/* ---- sizes ---------------------------------------------------------------------------------- */

size_t rank_step_bytes(const struct moe_limits *l) {
    size_t n_seqs = (size_t)l->max_seqs, n_seq_tokens = (size_t)l->max_seq_tokens;
    size_t n_tables = n_seqs * (n_seq_tokens / (size_t)l->block_tokens + 1);
    /* A plan starts sequences of two full ones' ids and a step's tokens at most (sched_plan.c). */
    size_t n_ids = 2 * n_seq_tokens + 2 * (size_t)l->max_batch_tokens;
    size_t n_each = sizeof(struct moe_slot_start) + sizeof(struct moe_step_seq);
    return 64 + n_seqs * n_each + (n_ids + n_tables) * sizeof(int32_t);
}

size_t rank_result_bytes(const struct moe_limits *l) {
    return 256 + (size_t)l->max_rows * sizeof(struct moe_row);
}
