/* See remote.h. */
#include "daemon/remote.h"

#include <stdlib.h>
#include <string.h>

enum { STEP_HEAD_BYTES = 8 };

static enum status lose(const struct engine_remote *r, enum status st, const struct error *e) {
    log_event(LOG_ERROR, "daemon", "rank_lost", "device=%d status=%s error=\"%s\"", r->rank,
              status_name(st), e->text);
    return ST_ENGINE_LOST;
}

/* What the rank said before it went. */
static enum status take_lost(const struct rank_link_frame *f, struct error *e) {
    struct pass p = pass_reader(f->body, f->n);
    pass_error(&p, e);
    if (!pass_done(&p) || e->code == ST_OK)
        return error_set(e, ST_INVALID, "a rank's last words are not understood");
    return e->code;
}

/* Wait for a frame of this type, which is the only one due. */
static enum status await(struct engine_remote *r, enum rank_link_type type, struct error *e,
                         struct rank_link_frame *out) {
    for (;;) {
        enum status st = rank_link_next(&r->link, 1000, e, out);
        if (st != ST_OK) return st;
        if (out->type == type) return ST_OK;
        if (out->type == RANK_LINK_LOST || out->type == RANK_LINK_REFUSED) return take_lost(out, e);
        if (out->type != RANK_LINK_NONE)
            return error_set(e, ST_INVALID, "%s sent what was not due", r->link.peer);
    }
}

/* ---- life ----------------------------------------------------------------------------------- */

static bool limits_fit(const struct moe_limits *asked, const struct moe_limits *l) {
    return l->max_batch_tokens == asked->max_batch_tokens && l->max_seqs == asked->max_seqs &&
           l->max_rows == asked->max_rows && l->block_tokens == asked->block_tokens &&
           l->max_seq_tokens >= 1 && l->n_blocks >= 1 &&
           (int64_t)l->n_blocks * l->block_tokens <= INT32_MAX;
}

static enum status take_opened(struct engine_remote *r, const struct rank_link_frame *f,
                               struct error *e) {
    struct rank_opened o = {0};
    struct pass p = pass_reader(f->body, f->n);
    pass_opened(&p, &o);
    if (!pass_done(&p) || memcmp(&o.info.shape, &r->shape, sizeof r->shape) != 0 ||
        !limits_fit(&r->limits, &o.info.limits) ||
        o.info.limits.max_seq_tokens > r->shape.n_ctx_train || o.depth < 1 ||
        o.depth > MOE_MAX_IN_FLIGHT)
        return error_set(e, ST_INVALID, "%s opened something else than it was asked to",
                         r->link.peer);
    r->info = o.info;
    r->depth = o.depth;
    return ST_OK;
}

static enum status allocate(struct engine_remote *r) {
    const struct moe_limits *l = &r->info.limits;
    r->n_frame = rank_step_bytes(l);
    r->frame = malloc(r->n_frame);
    bool ok = r->frame && rank_link_room(&r->link, rank_result_bytes(l)) == ST_OK;
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) {
        r->steps[i].slots = calloc((size_t)l->max_rows, sizeof(int32_t));
        ok = ok && r->steps[i].slots;
    }
    return ok ? ST_OK : ST_NO_MEMORY;
}

static void begin_frame(struct engine_remote *r) {
    r->starts = pass_writer(r->frame, r->n_frame);
    r->starts.at = STEP_HEAD_BYTES;
    r->n_starts = 0;
}

static enum status remote_open(void *ctx, struct error *e) {
    struct engine_remote *r = ctx;
    struct rank_link_frame f;
    enum status st = await(r, RANK_LINK_OPENED, e, &f);
    if (st == ST_OK) st = take_opened(r, &f, e);
    if (st == ST_OK && (st = allocate(r)) != ST_OK)
        error_set(e, st, "no memory for the frames of rank %d", r->rank);
    if (st == ST_OK) begin_frame(r);
    return st;
}

static void remote_close(void *ctx) {
    struct engine_remote *r = ctx;
    struct error e;
    if (r->link.room)
        rank_link_send(&r->link, RANK_LINK_BYE, NULL, 0, &e); /* gone already: as well */
    rank_link_close(&r->link);
    free(r->frame);
    for (int i = 0; i < MOE_MAX_IN_FLIGHT; i++) free(r->steps[i].slots);
}

/* ---- steps ---------------------------------------------------------------------------------- */

static enum status remote_slot_start(void *ctx, const struct moe_slot_start *start) {
    struct engine_remote *r = ctx;
    struct moe_slot_start copy = *start;
    pass_start(&r->starts, &copy);
    r->n_starts++;
    return ST_OK;
}

static void note_step(struct engine_remote *r, const struct moe_step *step) {
    struct remote_step *s = &r->steps[r->n_sent++ % MOE_MAX_IN_FLIGHT];
    s->n_rows = 0;
    for (int32_t i = 0; i < step->n_seqs; i++)
        if (step->seqs[i].rows == MOE_ROWS_SAMPLE) s->slots[s->n_rows++] = step->seqs[i].slot;
}

static enum status remote_submit(void *ctx, const struct moe_step *step) {
    struct engine_remote *r = ctx;
    struct error e;
    CHECK(r->n_sent - r->n_got < MOE_MAX_IN_FLIGHT);
    struct rank_step_head head = {.together = r->group && moe_group_together(r->group),
                                  .n_starts = r->n_starts};
    struct pass front = pass_writer(r->frame, STEP_HEAD_BYTES), body = r->starts;
    struct moe_step copy = *step;
    pass_step_head(&front, &head);
    pass_step(&body, &copy, NULL, r->limits.max_seqs);
    CHECK(!front.bad && !body.bad); /* rank_step_bytes */
    note_step(r, step);
    enum status st = rank_link_send(&r->link, RANK_LINK_STEP, r->frame, body.at, &e);
    begin_frame(r);
    return st == ST_OK ? ST_OK : lose(r, st, &e);
}

static bool row_fits(const struct engine_remote *r, const struct moe_row *row, int32_t slot) {
    int32_t n_vocab = r->shape.n_vocab;
    bool ok = row->slot == slot && row->token < n_vocab;
    ok = ok && (row->st == ST_OK ? row->token >= 0 : row->st == ST_NUMERIC);
    for (int32_t i = 0; ok && i < row->n_top; i++)
        ok = row->top_ids[i] >= 0 && row->top_ids[i] < n_vocab;
    return ok;
}

static enum status remote_collect(void *ctx, struct moe_result *out) {
    struct engine_remote *r = ctx;
    struct error e;
    struct rank_link_frame f;
    CHECK(r->n_sent > r->n_got);
    enum status st = await(r, RANK_LINK_RESULT, &e, &f);
    if (st != ST_OK) return lose(r, st, &e);
    const struct remote_step *s = &r->steps[r->n_got++ % MOE_MAX_IN_FLIGHT];
    struct rank_result result = {.rows = out->rows};
    struct pass p = pass_reader(f.body, f.n);
    pass_result(&p, &result, r->limits.max_rows);
    bool ok = pass_done(&p) && result.n_rows == s->n_rows;
    for (int32_t i = 0; ok && i < s->n_rows; i++) ok = row_fits(r, &out->rows[i], s->slots[i]);
    if (!ok) {
        st = error_set(&e, ST_INVALID, "%s sent a result that is not the step's", r->link.peer);
        return lose(r, st, &e);
    }
    out->n_rows = result.n_rows;
    out->run_ns = result.run_ns;
    r->counters = result.counters;
    return ST_OK;
}

static void remote_counters(void *ctx, struct moe_counters *out) {
    *out = ((const struct engine_remote *)ctx)->counters;
}

static int remote_depth(void *ctx) { return ((const struct engine_remote *)ctx)->depth; }

static void remote_rest(void *ctx) {
    struct engine_remote *r = ctx;
    struct error e;
    rank_link_send(&r->link, RANK_LINK_REST, NULL, 0, &e); /* lost: whoever reads next will see */
}

/* With a step out, what comes is collect's. */
static int remote_fd(void *ctx) {
    const struct engine_remote *r = ctx;
    return r->n_sent > r->n_got ? -1 : r->link.fd;
}

static enum status remote_idle(void *ctx) {
    struct engine_remote *r = ctx;
    struct error e;
    struct rank_link_frame f = {0};
    bool out = r->n_sent > r->n_got;
    enum status st = out ? rank_link_beat(&r->link, &e) : rank_link_next(&r->link, 0, &e, &f);
    if (st == ST_OK && f.type == RANK_LINK_LOST) st = take_lost(&f, &e);
    if (st == ST_OK && f.type != RANK_LINK_NONE)
        st = error_set(&e, ST_INVALID, "%s sent what was not due", r->link.peer);
    return st == ST_OK ? ST_OK : lose(r, st, &e);
}

const struct engine_ops engine_remote_ops = {
    .open = remote_open,
    .close = remote_close,
    .slot_start = remote_slot_start,
    .submit = remote_submit,
    .collect = remote_collect,
    .counters = remote_counters,
    .depth = remote_depth,
    .rest = remote_rest,
    .fd = remote_fd,
    .idle = remote_idle,
};
