/* moed-kv-bench: what does the KV cache save? Generates from one prompt with it, and without it in two ways: computing
 * the prefix again for every token one position at a time (what a server without a cache and without batching does: a
 * whole forward pass, logits included, per position: 784 of them for 9 + 32 tokens instead of 40), and computing it again as one batch
 * (where grouping makes up for much of the waste). Says whether all gave the same ids. */
#include <getopt.h>

static const char program[] = "moed-kv-bench";
#include "bench/model_bench.h"

static const char usage[] =
    "moed-kv-bench: generation with the KV cache and without it\n"
    "\n"
    "  moed-kv-bench --model FILE [options]\n"
    "\n"
    "Generates greedily at batch 1, prompt included in the time, and prints tokens per second with "
    "the cache,\n"
    "without it position by position (ratio), and without it with the prefix as one batch "
    "(ratio_batched), and\n"
    "whether the ids are equal. Exit status 1 if they are not.\n"
    "\n"
    "  --model FILE      GGUF model\n"
    "  --device NAME     cpu, reference or cuda:N (default cpu)\n"
    "  --threads N       CPU threads (default: all cores)\n"
    "  --cpu-isa NAME    CPU kernels: auto, avx2, avx512, amx (default auto)\n"
    "  --ids LIST        the prompt's token ids (default: nine tokens of the bundled model's "
    "vocabulary)\n"
    "  --tokens N        tokens to generate (default 32)\n"
    "  --repeat N        runs of each kind, of which the median counts (default 3)\n";

enum { MAX_PROMPT = 4096, BLOCK_TOKENS = 16 };

struct options {
    struct moe_options open;
    int ids[MAX_PROMPT];
    int n_ids, n_tokens, n_repeat;
};

static void parse(int argc, char **argv, struct options *o) {
    enum { MODEL = 1, DEVICE, THREADS, ISA, IDS, TOKENS, REPEAT, HELP };
    static const struct option longs[] = {
        {"model", 1, 0, MODEL},   {"device", 1, 0, DEVICE}, {"threads", 1, 0, THREADS},
        {"cpu-isa", 1, 0, ISA},   {"ids", 1, 0, IDS},       {"tokens", 1, 0, TOKENS},
        {"repeat", 1, 0, REPEAT}, {"help", 0, 0, HELP},     {0, 0, 0, 0}};
    *o = (struct options){
        .open = {.device = "cpu", .gpu_memory_utilization = 0.9}, .n_tokens = 32, .n_repeat = 3};
    /* "What does the word compiler mean to a programmer" */
    const char *ids = "388,475,271,360,2142,344,308,257,7768";
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case MODEL: o->open.model_path = optarg; break;
        case DEVICE: o->open.device = optarg; break;
        case THREADS: o->open.n_threads = bench_int("threads", optarg, 1, 1024); break;
        case ISA: o->open.cpu_isa = optarg; break;
        case IDS: ids = optarg; break;
        case TOKENS: o->n_tokens = bench_int("tokens", optarg, 1, 1 << 16); break;
        case REPEAT: o->n_repeat = bench_int("repeat", optarg, 1, 1000); break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fprintf(stderr, "%s: --help lists the options\n", program); exit(2);
        }
    }
    if (optind < argc) {
        fprintf(stderr, "%s: %s: --help lists the options\n", program, argv[optind]);
        exit(2);
    }
    o->n_ids = bench_ints("ids", ids, 0, INT_MAX, o->ids, MAX_PROMPT);
}

enum mode { CACHED, UNCACHED, UNCACHED_BATCHED, N_MODES };

static int32_t run_step(struct moe *m, int32_t start, int32_t n, enum moe_rows rows,
                        const int32_t *ids, const int32_t *blocks) {
    struct moe_row row = {.token = -1};
    struct moe_result result = {.rows = &row};
    struct moe_step_seq seq = {.start_pos = start,
                               .n_tokens = n,
                               .n_blocks = (start + n + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
                               .rows = rows};
    struct moe_step step = {
        .n_seqs = 1, .n_tokens = n, .seqs = &seq, .ids = ids + start, .blocks = blocks};
    bench_require(moe_submit(m, &step), "step");
    bench_collect(m, &result);
    return row.token;
}

/* Generate n_tokens after the n_ids in ids[n_ids + n_tokens]; returns seconds. */
static double generate(struct moe *m, enum mode mode, int32_t n_ids, int32_t n_tokens, int32_t *ids,
                       const int32_t *blocks) {
    bench_start_greedy(m, 0, ids, n_ids);
    uint64_t begun = clock_now_ns();
    for (int32_t n = n_ids; n < n_ids + n_tokens; n++) {
        int32_t from = mode == CACHED && n > n_ids ? n - 1 : 0;
        for (; mode == UNCACHED && from < n - 1; from++)
            run_step(m, from, 1, MOE_ROWS_ALL, ids, blocks);
        ids[n] = run_step(m, from, n - from, MOE_ROWS_SAMPLE, ids, blocks);
    }
    return (double)(clock_now_ns() - begun) * 1e-9;
}

int main(int argc, char **argv) {
    static struct options o;
    parse(argc, argv, &o);
    int32_t n = o.n_ids + o.n_tokens, n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    o.open.limits = (struct moe_limits){.max_batch_tokens = n,
                                        .max_seqs = 1,
                                        .max_rows = 1,
                                        .max_seq_tokens = n,
                                        .block_tokens = BLOCK_TOKENS,
                                        .n_blocks = n_blocks};
    struct moe *m = bench_open(&o.open);
    int32_t *ids[N_MODES], *blocks = bench_alloc((size_t)n_blocks, sizeof *blocks);
    double *seconds[N_MODES], rate[N_MODES];
    for (int32_t i = 0; i < n_blocks; i++) blocks[i] = i;
    for (int k = 0; k < N_MODES; k++) {
        ids[k] = bench_alloc((size_t)n, sizeof *ids[k]);
        seconds[k] = bench_alloc((size_t)o.n_repeat, sizeof *seconds[k]);
        for (int i = 0; i < o.n_ids; i++) {
            ids[k][i] = o.ids[i];
            if (o.ids[i] < moe_info(m)->shape.n_vocab) continue;
            fprintf(stderr, "%s: --ids: %d is not in the vocabulary of %d\n", program, o.ids[i],
                    (int)moe_info(m)->shape.n_vocab);
            return 2;
        }
    }
    (void)generate(m, CACHED, o.n_ids, o.n_tokens, ids[0], blocks); /* warm */
    for (int i = 0; i < o.n_repeat; i++)
        for (int k = 0; k < N_MODES; k++)
            seconds[k][i] = generate(m, (enum mode)k, o.n_ids, o.n_tokens, ids[k], blocks);
    for (int k = 0; k < N_MODES; k++) rate[k] = o.n_tokens / bench_median(seconds[k], o.n_repeat);
    bool equal = true;
    for (int k = 1; k < N_MODES; k++)
        equal = equal && memcmp(ids[0], ids[k], (size_t)n * sizeof *ids[0]) == 0;
    printf("{\"prompt\": %d, \"tokens\": %d, \"cached_tokens_per_s\": %.2f, "
           "\"uncached_tokens_per_s\": %.2f, \"ratio\": %.2f, \"uncached_batched_tokens_per_s\": "
           "%.2f, "
           "\"ratio_batched\": %.2f, \"ids_equal\": %s}\n",
           o.n_ids, o.n_tokens, rate[CACHED], rate[UNCACHED], rate[CACHED] / rate[UNCACHED],
           rate[UNCACHED_BATCHED], rate[CACHED] / rate[UNCACHED_BATCHED], equal ? "true" : "false");
    for (int k = 0; k < N_MODES; k++) {
        free(ids[k]);
        free(seconds[k]);
    }
    free(blocks);
    moe_close(m);
    return equal ? 0 : 1;
}
