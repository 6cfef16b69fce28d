/* upload: a step as the kernels read it: one block of memory, copied to the device in one piece. Header; per token its
 * id, position and sequence; per sequence its slot and where its block table begins; head rows; and, of sizes that
 * only the step knows, the block tables and attention's work. */
#include "cuda/device.h"

#include <string.h>

static const int32_t sizes[] = {1,   2,   4,   8,   16,  24,   32,   48,   64,   96,   128, 192,
                                256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096};

int32_t upload_round_up(int32_t n, int32_t most) {
    int32_t size = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes && size < n; i++) size = sizes[i];
    while (size < n) size += 2048;
    return size < most ? size : most;
}

static bool takes_tiles(const struct moe_step_seq *s) { return s->n_tokens >= MIN_TILE_TOKENS; }

int32_t upload_rows(const struct moe_step *step) {
    int32_t n = 0;
    for (int32_t i = 0; i < step->n_seqs; i++)
        n += step->seqs[i].rows == MOE_ROWS_ALL      ? step->seqs[i].n_tokens
             : step->seqs[i].rows == MOE_ROWS_SAMPLE ? 1
                                                     : 0;
    return n;
}

struct bucket upload_bucket(const struct cuda *c, const struct moe_step *step) {
    struct bucket b = {0};
    b.n_tokens = upload_round_up(step->n_tokens, c->limits.max_batch_tokens);
    b.n_seqs = b.n_tokens < c->limits.max_seqs ? b.n_tokens : c->limits.max_seqs;
    b.n_rows = upload_round_up(upload_rows(step), c->limits.max_rows);
    for (int32_t i = 0; i < step->n_seqs; i++)
        if (takes_tiles(&step->seqs[i])) b.tiles = true;
    return b;
}

static size_t aligned(size_t n) { return (n + 15) & ~(size_t)15; }

/* Bytes of the parts whose place follows from the bucket. */
static size_t fixed_bytes(const struct bucket *b) {
    return aligned(sizeof(struct step_header)) + 3 * aligned((size_t)b->n_tokens * sizeof(int32_t)) +
           2 * aligned((size_t)b->n_seqs * sizeof(int32_t)) +
           aligned((size_t)b->n_rows * sizeof(struct head_row));
}

static const void *take(uint8_t **p, size_t n) {
    uint8_t *at = *p;
    *p += aligned(n);
    return at;
}

struct step_view upload_view(const struct bucket *b, uint8_t *base) {
    struct step_view v;
    v.header = take(&base, sizeof(struct step_header));
    v.ids = take(&base, (size_t)b->n_tokens * sizeof(int32_t));
    v.pos = take(&base, (size_t)b->n_tokens * sizeof(int32_t));
    v.seq = take(&base, (size_t)b->n_tokens * sizeof(int32_t));
    v.slot = take(&base, (size_t)b->n_seqs * sizeof(int32_t));
    v.table = take(&base, (size_t)b->n_seqs * sizeof(int32_t));
    v.rows = take(&base, (size_t)b->n_rows * sizeof(struct head_row));
    return v;
}

size_t upload_capacity(const struct cuda *c) {
    const struct moe_limits *l = &c->limits;
    const struct bucket most = {.n_tokens = l->max_batch_tokens,
                                .n_seqs = l->max_seqs,
                                .n_rows = l->max_rows};
    size_t seq_blocks = ((size_t)l->max_seq_tokens + (size_t)l->block_tokens - 1) / (size_t)l->block_tokens;
    size_t n_pieces = (size_t)c->n_partials + (size_t)l->max_batch_tokens;
    return fixed_bytes(&most) + aligned(n_pieces * sizeof(struct attn_piece)) +
           aligned((size_t)l->max_batch_tokens * sizeof(struct attn_tile)) +
           aligned((size_t)l->max_seqs * seq_blocks * sizeof(int32_t));
}

/* Rows of one sequence that reach the head. */
static int32_t add_rows(const struct moe_step_seq *s, int32_t first_token, struct head_row *out) {
    if (s->rows == MOE_ROWS_NONE) return 0;
    if (s->rows == MOE_ROWS_SAMPLE) {
        out[0] = (struct head_row){first_token + s->n_tokens - 1, s->slot, 1};
        return 1;
    }
    for (int32_t i = 0; i < s->n_tokens; i++) out[i] = (struct head_row){first_token + i, s->slot, 0};
    return s->n_tokens;
}

/* Work is put in order by classes of its length; what is longer is in the last. */
enum { CLASSES = 64, TILE_CLASS = 64 /* tokens */ };

static int32_t divide_up(int64_t n, int64_t by) { return (int32_t)((n + by - 1) / by); }

/* Tokens that attention takes one by one. */
static bool is_single(const struct moe_step *step, int32_t seq) { return !takes_tiles(&step->seqs[seq]); }

/* How tokens are cut into pieces of work, and how many partial results that has taken so far. */
struct cut {
    bool by_blocks;       /* a split to a block, always; else a piece to a warp */
    int32_t most_splits; /* of a token that is one piece */
    int32_t n_partials;
};

/* A block takes a split while there are few of them; else a token is whole if it has no more than its share of all
 * splits, a processor having two tokens at a time. */
static struct cut choose_cut(const struct cuda *c, const struct moe_step *step, const struct step_view *v) {
    const struct model_shape *m = &c->shape;
    int32_t units = m->n_kv_heads * attn_octets(m->n_heads, m->n_kv_heads);
    int64_t n_splits = 0;
    for (int32_t t = 0; t < step->n_tokens; t++)
        if (is_single(step, v->seq[t])) n_splits += divide_up(v->pos[t] + 1, SPLIT_KEYS);
    bool by_blocks = n_splits * units <= 2 * c->queue.n_sm && n_splits <= c->n_partials;
    return (struct cut){.by_blocks = by_blocks,
                        .most_splits = by_blocks ? 1 : divide_up(n_splits * units, 2 * c->queue.n_sm)};
}

/* Spans of each of a token's pieces. A token that runs out of room for partial results is one. */
static int32_t spans_of_piece(const struct cuda *c, struct cut *cut, int32_t n_spans) {
    enum { SPANS = SPLIT_KEYS / SPAN_KEYS };
    int32_t each = n_spans <= cut->most_splits * SPANS ? n_spans : SPANS, n_pieces = divide_up(n_spans, each);
    if (n_pieces == 1 || cut->n_partials + n_pieces > c->n_partials) return n_spans;
    cut->n_partials += n_pieces;
    return each;
}

/* Attention's pieces, the longest first. Returns how many. */
static int32_t add_pieces(const struct cuda *c, const struct moe_step *step, const struct step_view *v,
                          int32_t blocks_at, struct attn_piece *out) {
    int32_t first[CLASSES + 1] = {0}, n = 0; /* first[i]: pieces of class i + 1 and above; then where class i is next */
    for (int pass = 0; pass < 2; pass++) {
        struct cut cut = choose_cut(c, step, v);
        for (int32_t t = 0; t < step->n_tokens; t++) {
            if (!is_single(step, v->seq[t])) continue;
            int32_t n_spans = divide_up(v->pos[t] + 1, SPAN_KEYS), before = cut.n_partials;
            int32_t each = spans_of_piece(c, &cut, n_spans), n_pieces = divide_up(n_spans, each);
            for (int32_t i = 0; i < n_pieces; i++) {
                int32_t own = i < n_pieces - 1 ? each : n_spans - i * each, class = own < CLASSES ? own : CLASSES;
                if (pass == 0) {
                    for (int32_t k = 0; k < class; k++) first[k]++;
                    continue;
                }
                out[first[class]++] = (struct attn_piece){.token = t,
                                                          .end = v->pos[t] + 1,
                                                          .table = blocks_at + v->table[v->seq[t]],
                                                          .span = i * each,
                                                          .n_spans = own,
                                                          .piece = i,
                                                          .n_pieces = n_pieces,
                                                          .partial = n_pieces > 1 ? before + i : -1};
                n++;
            }
        }
    }
    return n;
}

static int32_t tile_class(int32_t pos) { return pos / TILE_CLASS + 1 < CLASSES ? pos / TILE_CLASS + 1 : CLASSES; }

/* Attention's tiles, those with the most keys first. Returns how many. */
static int32_t add_tiles(const struct moe_step *step, const struct step_view *v, int32_t blocks_at,
                         struct attn_tile *out) {
    int32_t longest = 0, n = 0;
    for (int32_t i = 0; i < step->n_seqs; i++) {
        const struct moe_step_seq *s = &step->seqs[i];
        int32_t size = tile_class(s->start_pos + s->n_tokens - 1);
        if (takes_tiles(s) && size > longest) longest = size;
    }
    for (int32_t size = longest; size > 0; size--) {
        int32_t token = 0;
        for (int32_t i = 0; i < step->n_seqs; token += step->seqs[i++].n_tokens) {
            const struct moe_step_seq *s = &step->seqs[i];
            for (int32_t t = 0; t < s->n_tokens && takes_tiles(s); t += TILE_TOKENS) {
                int32_t left = s->n_tokens - t;
                if (tile_class(s->start_pos + t) != size) continue;
                out[n++] = (struct attn_tile){.token = token + t,
                                              .n_tokens = left < TILE_TOKENS ? left : TILE_TOKENS,
                                              .pos = s->start_pos + t,
                                              .table = blocks_at + v->table[i]};
            }
        }
    }
    return n;
}

/* The work lists of attention at `at`: pieces, then tiles. Returns the bytes up to their end. */
static size_t add_attention(const struct cuda *c, const struct moe_step *step, const struct step_view *v,
                            size_t at, struct step_header *h) {
    uint8_t *dst = (uint8_t *)h;
    struct attn_piece *pieces = (struct attn_piece *)(void *)(dst + at);
    h->pieces_at = (int32_t)(at / sizeof(int32_t));
    h->n_pieces = add_pieces(c, step, v, h->blocks_at, pieces);
    h->by_blocks = choose_cut(c, step, v).by_blocks;
    at += aligned((size_t)h->n_pieces * sizeof *pieces);
    struct attn_tile *tiles = (struct attn_tile *)(void *)(dst + at);
    h->tiles_at = (int32_t)(at / sizeof(int32_t));
    h->n_tiles = add_tiles(step, v, h->blocks_at, tiles);
    return at + aligned((size_t)h->n_tiles * sizeof *tiles);
}

size_t upload_fill(struct cuda *c, const struct moe_step *step, uint8_t *dst) {
    struct bucket b = upload_bucket(c, step);
    struct step_view v = upload_view(&b, dst);
    struct step_header *h = (struct step_header *)(void *)dst;
    *h = (struct step_header){.n_tokens = step->n_tokens, .result = (int32_t)(c->n_begun & 1)};
    /* The view's arrays are const for the kernels; here they lie in dst. */
    int32_t *ids = (int32_t *)(uintptr_t)v.ids, *pos = (int32_t *)(uintptr_t)v.pos;
    int32_t *seq = (int32_t *)(uintptr_t)v.seq, *slot = (int32_t *)(uintptr_t)v.slot;
    int32_t *table = (int32_t *)(uintptr_t)v.table;
    struct head_row *rows = (struct head_row *)(uintptr_t)v.rows;
    memcpy(ids, step->ids, (size_t)step->n_tokens * sizeof *ids);
    int32_t token = 0, n_blocks = 0;
    for (int32_t i = 0; i < step->n_seqs; i++) {
        const struct moe_step_seq *s = &step->seqs[i];
        slot[i] = s->slot;
        table[i] = n_blocks;
        n_blocks += s->n_blocks;
        h->n_rows += add_rows(s, token, rows + h->n_rows);
        for (int32_t t = 0; t < s->n_tokens; t++, token++) {
            pos[token] = s->start_pos + t;
            seq[token] = i;
        }
    }
    size_t at = fixed_bytes(&b);
    h->blocks_at = (int32_t)(at / sizeof(int32_t));
    memcpy(dst + at, step->blocks, (size_t)n_blocks * sizeof(int32_t));
    at = add_attention(c, step, &v, at + aligned((size_t)n_blocks * sizeof(int32_t)), h);
    CHECK(at <= c->upload_cap);
    return at;
}
