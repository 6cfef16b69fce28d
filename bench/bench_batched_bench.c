/* moed-batched-bench: how fast does the model prefill and decode B sequences together, without a daemon or sockets
 * around it? Steps are submitted one ahead, as the daemon does. The fields are named as in llama.cpp's
 * llama-batched-bench, so that the two can be put side by side; its prompts, like these, are not text. */
#include <getopt.h>

static const char program[] = "moed-batched-bench";
#include "bench/model_bench.h"

static const char usage[] =
    "moed-batched-bench: prefill and decode rates by batch size\n"
    "\n"
    "  moed-batched-bench --model FILE [options]\n"
    "\n"
    "For each B of --npl: B prompts of --pp random tokens are prefilled in steps of at most "
    "--max-batch-tokens,\n"
    "then --tg tokens are decoded for all B, greedily. One JSON line per B on standard output: pp, "
    "tg, pl (B),\n"
    "n_kv, t_pp and t_tg in seconds, speed_pp and speed_tg in tokens per second over all sequences "
    "(t_* are\n"
    "medians over --repeat).\n"
    "\n"
    "  --model FILE            GGUF model\n"
    "  --device NAME           cpu, reference or cuda:N (default cpu)\n"
    "  --threads N             CPU threads (default: all cores)\n"
    "  --cpu-isa NAME          CPU kernels: auto, avx2, avx512, amx (default auto)\n"
    "  --pp N                  prompt tokens per sequence (default 128)\n"
    "  --tg N                  tokens to decode per sequence (default 32)\n"
    "  --npl LIST              batch sizes (default 1,2,4,8,16,32)\n"
    "  --max-batch-tokens N    tokens in one step (default 512)\n"
    "  --repeat N              runs per batch size, of which the median counts (default 3)\n"
    "  --gpu-memory-utilization PERCENT  (default 90)\n";

enum { MAX_NPL = 32, BLOCK_TOKENS = 16 };

struct bench {
    struct moe *m;
    int pp, tg, max_batch_tokens;
    int32_t *prompts; /* [max B][pp] */
    int32_t blocks_per_seq;
    /* One step in the making. */
    struct moe_step_seq *seqs;
    int32_t *ids, *blocks;
    struct moe_row *rows;
    int n_in_flight;
};

/* splitmix64's finaliser: the same prompts in every run. */
static int32_t random_token(uint64_t i, int32_t n_vocab) {
    uint64_t z = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (int32_t)((z ^ (z >> 31)) % (uint64_t)n_vocab);
}

static void collect(struct bench *b) {
    struct moe_result result = {.rows = b->rows};
    bench_collect(b->m, &result);
    b->n_in_flight--;
}

static void submit(struct bench *b, const struct moe_step *step) {
    bench_require(moe_submit(b->m, step), "step");
    /* One step ahead: its predecessor is collected while it waits or runs. */
    if (++b->n_in_flight == MOE_MAX_IN_FLIGHT) collect(b);
}

static void drain(struct bench *b) {
    while (b->n_in_flight > 0) collect(b);
}

/* Append [start, start + n) of sequence s to the step. */
static void add_seq(struct bench *b, struct moe_step *step, int32_t *n_blocks, int32_t s,
                    struct moe_step_seq seq, const int32_t *ids) {
    seq.slot = s;
    seq.n_blocks = (seq.start_pos + seq.n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    b->seqs[step->n_seqs++] = seq;
    memcpy(b->ids + step->n_tokens, ids, (size_t)seq.n_tokens * sizeof *ids);
    step->n_tokens += seq.n_tokens;
    for (int32_t i = 0; i < seq.n_blocks; i++) b->blocks[(*n_blocks)++] = s * b->blocks_per_seq + i;
}

/* Full steps of prompt tokens, sequence after sequence; each prompt's last token is sampled. */
static double prefill(struct bench *b, int n_seqs) {
    for (int32_t s = 0; s < n_seqs; s++)
        bench_start_greedy(b->m, s, b->prompts + (size_t)s * (size_t)b->pp, b->pp);
    uint64_t begun = clock_now_ns();
    int32_t s = 0, pos = 0;
    while (s < n_seqs) {
        struct moe_step step = {.seqs = b->seqs, .ids = b->ids, .blocks = b->blocks};
        int32_t n_blocks = 0;
        while (s < n_seqs && step.n_tokens < b->max_batch_tokens) {
            int32_t n = b->pp - pos, room = b->max_batch_tokens - step.n_tokens;
            bool last = n <= room;
            if (!last) n = room;
            add_seq(b, &step, &n_blocks, s,
                    (struct moe_step_seq){.start_pos = pos,
                                          .n_tokens = n,
                                          .rows = last ? MOE_ROWS_SAMPLE : MOE_ROWS_NONE},
                    b->prompts + (size_t)s * (size_t)b->pp + pos);
            pos = last ? 0 : pos + n;
            s += last;
        }
        submit(b, &step);
    }
    drain(b);
    return (double)(clock_now_ns() - begun) * 1e-9;
}

static double decode(struct bench *b, int n_seqs) {
    static const int32_t last = MOE_LAST_TOKEN;
    uint64_t begun = clock_now_ns();
    for (int32_t k = 0; k < b->tg; k++) {
        struct moe_step step = {.seqs = b->seqs, .ids = b->ids, .blocks = b->blocks};
        int32_t n_blocks = 0;
        for (int32_t s = 0; s < n_seqs; s++)
            add_seq(b, &step, &n_blocks, s,
                    (struct moe_step_seq){
                        .start_pos = b->pp + k, .n_tokens = 1, .rows = MOE_ROWS_SAMPLE},
                    &last);
        submit(b, &step);
    }
    drain(b);
    return (double)(clock_now_ns() - begun) * 1e-9;
}

static void run(struct bench *b, int pl, int n_repeat) {
    double *t_pp = bench_alloc((size_t)n_repeat, sizeof *t_pp);
    double *t_tg = bench_alloc((size_t)n_repeat, sizeof *t_tg);
    for (int i = 0; i < n_repeat; i++) {
        t_pp[i] = prefill(b, pl);
        t_tg[i] = decode(b, pl);
    }
    double pp = bench_median(t_pp, n_repeat), tg = bench_median(t_tg, n_repeat);
    printf("{\"pp\": %d, \"tg\": %d, \"pl\": %d, \"n_kv\": %d, \"t_pp\": %.6f, \"speed_pp\": %.2f, "
           "\"t_tg\": %.6f, \"speed_tg\": %.2f}\n",
           b->pp, b->tg, pl, pl * (b->pp + b->tg), pp, pl * b->pp / pp, tg, pl * b->tg / tg);
    fflush(stdout);
    free(t_pp);
    free(t_tg);
}

struct options {
    struct moe_options open;
    int pp, tg, max_batch_tokens, n_repeat;
    int npl[MAX_NPL], n_npl;
};

static void parse(int argc, char **argv, struct options *o) {
    enum { MODEL = 1, DEVICE, THREADS, ISA, PP, TG, NPL, BATCH, REPEAT, UTILIZATION, HELP };
    static const struct option longs[] = {
        {"model", 1, 0, MODEL},     {"device", 1, 0, DEVICE},
        {"threads", 1, 0, THREADS}, {"cpu-isa", 1, 0, ISA},
        {"pp", 1, 0, PP},           {"tg", 1, 0, TG},
        {"npl", 1, 0, NPL},         {"max-batch-tokens", 1, 0, BATCH},
        {"repeat", 1, 0, REPEAT},   {"gpu-memory-utilization", 1, 0, UTILIZATION},
        {"help", 0, 0, HELP},       {0, 0, 0, 0}};
    *o = (struct options){.open = {.device = "cpu", .gpu_memory_utilization = 0.9},
                          .pp = 128,
                          .tg = 32,
                          .max_batch_tokens = 512,
                          .n_repeat = 3};
    const char *npl = "1,2,4,8,16,32";
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case MODEL: o->open.model_path = optarg; break;
        case DEVICE: o->open.device = optarg; break;
        case THREADS: o->open.n_threads = bench_int("threads", optarg, 1, 1024); break;
        case ISA: o->open.cpu_isa = optarg; break;
        case PP: o->pp = bench_int("pp", optarg, 1, 1 << 20); break;
        case TG: o->tg = bench_int("tg", optarg, 1, 1 << 20); break;
        case NPL: npl = optarg; break;
        case BATCH: o->max_batch_tokens = bench_int("max-batch-tokens", optarg, 1, 1 << 16); break;
        case REPEAT: o->n_repeat = bench_int("repeat", optarg, 1, 1000); break;
        case UTILIZATION:
            o->open.gpu_memory_utilization =
                bench_int("gpu-memory-utilization", optarg, 1, 100) / 100.0;
            break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fprintf(stderr, "%s: --help lists the options\n", program); exit(2);
        }
    }
    if (optind < argc) {
        fprintf(stderr, "%s: %s: --help lists the options\n", program, argv[optind]);
        exit(2);
    }
    o->n_npl = bench_ints("npl", npl, 1, 4096, o->npl, MAX_NPL);
}

int main(int argc, char **argv) {
    struct options o;
    parse(argc, argv, &o);
    int max_pl = 1;
    for (int i = 0; i < o.n_npl; i++)
        if (o.npl[i] > max_pl) max_pl = o.npl[i];
    struct bench b = {.pp = o.pp,
                      .tg = o.tg,
                      .max_batch_tokens = o.max_batch_tokens > max_pl ? o.max_batch_tokens : max_pl,
                      .blocks_per_seq = (o.pp + o.tg + BLOCK_TOKENS - 1) / BLOCK_TOKENS};
    o.open.limits = (struct moe_limits){.max_batch_tokens = b.max_batch_tokens,
                                        .max_seqs = max_pl,
                                        .max_rows = max_pl,
                                        .max_seq_tokens = o.pp + o.tg,
                                        .block_tokens = BLOCK_TOKENS,
                                        .n_blocks = max_pl * b.blocks_per_seq};
    b.m = bench_open(&o.open);
    size_t n_prompt = (size_t)max_pl * (size_t)o.pp;
    b.prompts = bench_alloc(n_prompt, sizeof *b.prompts);
    b.seqs = bench_alloc((size_t)max_pl, sizeof *b.seqs);
    b.ids = bench_alloc((size_t)b.max_batch_tokens, sizeof *b.ids);
    b.blocks = bench_alloc((size_t)max_pl * (size_t)b.blocks_per_seq, sizeof *b.blocks);
    b.rows = bench_alloc((size_t)max_pl, sizeof *b.rows);
    for (size_t i = 0; i < n_prompt; i++)
        b.prompts[i] = random_token(i, moe_info(b.m)->shape.n_vocab);

    (void)prefill(&b, 1); /* warm: every page touched, graphs recorded */
    (void)decode(&b, 1);
    for (int i = 0; i < o.n_npl; i++) run(&b, o.npl[i], o.n_repeat);
    moe_close(b.m);
    free(b.prompts);
    free(b.seqs);
    free(b.ids);
    free(b.blocks);
    free(b.rows);
    return 0;
}
