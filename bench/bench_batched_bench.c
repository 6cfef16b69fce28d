/* moed-batched-bench: how fast does the model prefill and decode B sequences together, without a daemon or sockets
 * around it? Steps are submitted one ahead, as the daemon does. The fields are named as in llama.cpp's
 * llama-batched-bench, so that the two can be put side by side; its prompts, like these, are not text.
 *
 * Several devices: a thread for each, which opens the model and runs its share of the sequences. Threads meet at a
 * barrier before and after each phase, so that a phase lasts until the slowest is done. */
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

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
    "medians over --repeat), and of the first device's decode steps offload_bytes_per_step (of experts in "
    "host\n"
    "memory) and experts_per_step (read, counted in every layer).\n"
    "\n"
    "  --model FILE            GGUF model\n"
    "  --device NAME[,NAME…]   cpu, reference or cuda:N (default cpu); several share the B "
    "sequences\n"
    "  --parallel MODE         replica (default): each device has the whole model; expert: a share "
    "of\n"
    "                          the experts, which it computes for all\n"
    "  --threads N             CPU threads, for all devices together (default: all cores)\n"
    "  --cpu-isa NAME          CPU kernels: auto, avx2, avx512, amx (default auto)\n"
    "  --pp N                  prompt tokens per sequence (default 128)\n"
    "  --tg N                  tokens to decode per sequence (default 32)\n"
    "  --npl LIST              batch sizes (default 1,2,4,8,16,32)\n"
    "  --max-batch-tokens N    tokens in one step (default 512)\n"
    "  --repeat N              runs per batch size, of which the median counts (default 3)\n"
    "  --busy PERCENT          meanwhile another process keeps one core busy so much of every 10 "
    "ms (default 0)\n"
    "  --gpu-memory-utilization PERCENT  (default 90)\n"
    "  --offload-experts auto|N  experts that a GPU reads from host memory (default 0)\n";

enum { MAX_NPL = 32, BLOCK_TOKENS = 16 };

struct options {
    struct moe_options open;
    struct moe_devices devices;
    int busy; /* percent of a core that another process takes */
    int pp, tg, max_batch_tokens, n_repeat;
    int npl[MAX_NPL], n_npl;
    bool experts; /* --parallel expert: open.group */
    pthread_barrier_t *meet; /* all devices' threads */
};

/* What one device has, and its thread. */
struct bench {
    const struct options *o;
    int rank;
    pthread_t thread;
    struct moe *m;
    int pp, tg, max_batch_tokens, max_seqs;
    int32_t *prompts; /* [max_seqs][pp] */
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

/* This device's share of pl sequences; rank 0 has the largest. */
static int share(const struct bench *b, int rank, int pl) {
    int n = b->o->devices.n;
    return pl / n + (rank < pl % n);
}

/* Full steps of prompt tokens, sequence after sequence; each prompt's last token is sampled. In a group a device
 * goes on, with nothing, until the one with most is done. */
static void prefill(struct bench *b, int pl) {
    int n_seqs = share(b, b->rank, pl), most = share(b, 0, pl) * b->pp;
    int n_steps = (most + b->max_batch_tokens - 1) / b->max_batch_tokens;
    int32_t s = 0, pos = 0;
    for (int k = 0; k < n_steps && (s < n_seqs || b->o->open.group); k++) {
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
}

static void decode(struct bench *b, int pl) {
    static const int32_t last = MOE_LAST_TOKEN;
    int n_seqs = share(b, b->rank, pl);
    for (int32_t k = 0; k < b->tg && (n_seqs > 0 || b->o->open.group); k++) {
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
}

/* A phase on all devices: from when all are ready until all are done, in seconds. */
static double timed(struct bench *b, void (*phase)(struct bench *, int), int pl) {
    pthread_barrier_wait(b->o->meet);
    uint64_t begun = clock_now_ns();
    phase(b, pl);
    pthread_barrier_wait(b->o->meet);
    return (double)(clock_now_ns() - begun) * 1e-9;
}

static void run(struct bench *b, int pl) {
    int n_repeat = b->o->n_repeat, n_seqs = share(b, b->rank, pl);
    double *t_pp = bench_alloc((size_t)n_repeat, sizeof *t_pp);
    double *t_tg = bench_alloc((size_t)n_repeat, sizeof *t_tg);
    struct moe_counters before, after;
    uint64_t offload_bytes = 0, expert_reads = 0; /* in decode steps, of this device */
    for (int i = 0; i < n_repeat; i++) {
        for (int32_t s = 0; s < n_seqs; s++)
            bench_start_greedy(b->m, s, b->prompts + (size_t)s * (size_t)b->pp, b->pp);
        t_pp[i] = timed(b, prefill, pl);
        moe_counters(b->m, &before);
        t_tg[i] = timed(b, decode, pl);
        moe_counters(b->m, &after);
        offload_bytes += after.offload_bytes - before.offload_bytes;
        expert_reads += after.expert_reads - before.expert_reads;
    }
    double pp = bench_median(t_pp, n_repeat), tg = bench_median(t_tg, n_repeat);
    if (b->rank == 0)
        printf("{\"pp\": %d, \"tg\": %d, \"pl\": %d, \"devices\": %d, \"parallel\": \"%s\", "
               "\"n_kv\": %d, \"t_pp\": %.6f, "
               "\"speed_pp\": %.2f, \"t_tg\": %.6f, \"speed_tg\": %.2f, \"offload_bytes_per_step\": %.0f, "
               "\"experts_per_step\": %.0f}\n",
               b->pp, b->tg, pl, b->o->devices.n, b->o->experts ? "expert" : "replica",
               pl * (b->pp + b->tg), pp, pl * b->pp / pp, tg, pl * b->tg / tg,
               (double)offload_bytes / n_repeat / b->tg, (double)expert_reads / n_repeat / b->tg);
    fflush(stdout);
    free(t_pp);
    free(t_tg);
}

/* What a machine shared with others is like: a process of its own that computes for a part of every 10 ms. */
static void start_neighbour(int percent) {
    enum { PERIOD_NS = 10000000 };
    pid_t parent = getpid(), child = fork();
    if (child < 0) bench_require(ST_NO_MEMORY, "fork");
    if (child != 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (getppid() == parent) {
        uint64_t end = clock_now_ns() + PERIOD_NS / 100 * (uint64_t)percent;
        while (clock_now_ns() < end) {
        }
        struct timespec rest = {0, PERIOD_NS / 100 * (100 - percent)};
        nanosleep(&rest, NULL);
    }
    _exit(0);
}

static void open_bench(struct bench *b) {
    struct moe_options open = b->o->open;
    open.device = b->o->devices.names[b->rank];
    open.n_ranks = b->o->devices.n;
    open.rank = b->rank;
    open.limits = (struct moe_limits){.max_batch_tokens = b->max_batch_tokens,
                                      .max_seqs = b->max_seqs,
                                      .max_rows = b->max_seqs,
                                      .max_seq_tokens = b->pp + b->tg,
                                      .block_tokens = BLOCK_TOKENS,
                                      .n_blocks = b->max_seqs * b->blocks_per_seq};
    b->m = bench_open(&open);
    size_t n_seqs = (size_t)b->max_seqs, n_prompt = n_seqs * (size_t)b->pp;
    b->prompts = bench_alloc(n_prompt, sizeof *b->prompts);
    b->seqs = bench_alloc(n_seqs, sizeof *b->seqs);
    b->ids = bench_alloc((size_t)b->max_batch_tokens, sizeof *b->ids);
    b->blocks = bench_alloc(n_seqs * (size_t)b->blocks_per_seq, sizeof *b->blocks);
    b->rows = bench_alloc(n_seqs, sizeof *b->rows);
    for (size_t i = 0; i < n_prompt; i++)
        b->prompts[i] = random_token(i + (size_t)b->rank * n_prompt, moe_info(b->m)->shape.n_vocab);
}

static void *bench_main(void *ctx) {
    struct bench *b = ctx;
    open_bench(b);
    bench_start_greedy(b->m, 0, b->prompts, b->pp);
    (void)timed(b, prefill, b->o->devices.n); /* warm: every page touched, graphs recorded */
    (void)timed(b, decode, b->o->devices.n);
    for (int i = 0; i < b->o->n_npl; i++) run(b, b->o->npl[i]);
    moe_close(b->m);
    free(b->prompts);
    free(b->seqs);
    free(b->ids);
    free(b->blocks);
    free(b->rows);
    return NULL;
}

static void parse(int argc, char **argv, struct options *o) {
    enum {
        MODEL = 1,
        DEVICE,
        PARALLEL,
        THREADS,
        ISA,
        PP,
        TG,
        NPL,
        BATCH,
        REPEAT,
        BUSY,
        UTILIZATION,
        OFFLOAD,
        HELP
    };
    static const struct option longs[] = {{"model", 1, 0, MODEL},
                                          {"device", 1, 0, DEVICE},
                                          {"parallel", 1, 0, PARALLEL},
                                          {"threads", 1, 0, THREADS},
                                          {"cpu-isa", 1, 0, ISA},
                                          {"pp", 1, 0, PP},
                                          {"tg", 1, 0, TG},
                                          {"npl", 1, 0, NPL},
                                          {"max-batch-tokens", 1, 0, BATCH},
                                          {"repeat", 1, 0, REPEAT},
                                          {"busy", 1, 0, BUSY},
                                          {"gpu-memory-utilization", 1, 0, UTILIZATION},
                                          {"offload-experts", 1, 0, OFFLOAD},
                                          {"help", 0, 0, HELP},
                                          {0, 0, 0, 0}};
    *o = (struct options){.open = {.gpu_memory_utilization = 0.9},
                          .pp = 128,
                          .tg = 32,
                          .max_batch_tokens = 512,
                          .n_repeat = 3};
    const char *npl = "1,2,4,8,16,32", *devices = "cpu";
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case MODEL: o->open.model_path = optarg; break;
        case DEVICE: devices = optarg; break;
        case PARALLEL:
            o->experts = strcmp(optarg, "expert") == 0;
            if (o->experts || strcmp(optarg, "replica") == 0) break;
            fprintf(stderr, "%s: --parallel %s: want replica or expert\n", program, optarg);
            exit(2);
        case THREADS: o->open.n_threads = bench_int("threads", optarg, 1, 1024); break;
        case ISA: o->open.cpu_isa = optarg; break;
        case PP: o->pp = bench_int("pp", optarg, 1, 1 << 20); break;
        case TG: o->tg = bench_int("tg", optarg, 1, 1 << 20); break;
        case NPL: npl = optarg; break;
        case BATCH: o->max_batch_tokens = bench_int("max-batch-tokens", optarg, 1, 1 << 16); break;
        case REPEAT: o->n_repeat = bench_int("repeat", optarg, 1, 1000); break;
        case BUSY: o->busy = bench_int("busy", optarg, 0, 100); break;
        case UTILIZATION:
            o->open.gpu_memory_utilization =
                bench_int("gpu-memory-utilization", optarg, 1, 100) / 100.0;
            break;
        case OFFLOAD:
            o->open.offload_experts = strcmp(optarg, "auto") == 0
                                          ? MOE_OFFLOAD_AUTO
                                          : bench_int("offload-experts", optarg, 0, INT_MAX);
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
    struct error e;
    if (moe_devices_parse(devices, &e, &o->devices) == ST_OK) return;
    fprintf(stderr, "%s: %s\n", program, e.text);
    exit(2);
}

int main(int argc, char **argv) {
    struct options o;
    parse(argc, argv, &o);
    int n = o.devices.n, max_pl = n;
    struct moe_group_options group = {.n_ranks = n};
    if (o.experts) bench_require(moe_group_create(&group, NULL, &o.open.group), "group");
    for (int i = 0; i < o.n_npl; i++)
        if (o.npl[i] > max_pl) max_pl = o.npl[i];
    int max_seqs = (max_pl + n - 1) / n;
    if (o.busy > 0) start_neighbour(o.busy); /* before there are threads */
    pthread_barrier_t meet;
    pthread_barrier_init(&meet, NULL, (unsigned)n);
    o.meet = &meet;
    struct bench benches[MOE_MAX_RANKS];
    for (int i = 0; i < n; i++) {
        benches[i] = (struct bench){
            .o = &o,
            .rank = i,
            .pp = o.pp,
            .tg = o.tg,
            .max_seqs = max_seqs,
            .max_batch_tokens = o.max_batch_tokens > max_seqs ? o.max_batch_tokens : max_seqs,
            .blocks_per_seq = (o.pp + o.tg + BLOCK_TOKENS - 1) / BLOCK_TOKENS};
        if (pthread_create(&benches[i].thread, NULL, bench_main, &benches[i]) != 0) {
            fprintf(stderr, "%s: no thread for device %d\n", program, i);
            exit(1);
        }
    }
    for (int i = 0; i < n; i++) pthread_join(benches[i].thread, NULL);
    pthread_barrier_destroy(&meet);
    moe_group_destroy(o.open.group);
    return 0;
}
