/* See config.h. */
#include "daemon/config.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const config_help[CONFIG_HELP_PARTS] = {
    "moed serves a Mixture-of-Experts language model from a GGUF file to many clients at once.\n"
    "\n"
    "Usage: moed --model FILE [flags]\n"
    "\n"
    "What to serve, and where\n"
    "  --model FILE              the GGUF file (any part of a split one)\n"
    "  --listen ipc://PATH       the socket; default: $MOED_ENDPOINT, or moed.sock in\n"
    "                            $XDG_RUNTIME_DIR, or /tmp/moed-UID.sock. Clients use the same "
    "rule\n"
    "  --device DEV[,DEV…]       cpu (default), reference (slow and simple) or cuda:N; several of "
    "one "
    "kind\n"
    "                            share the requests, such as cuda:0,cuda:1\n"
    "  --threads N               CPU threads, for all devices of the process together; default: "
    "all "
    "cores\n"
    "  --cpu-isa NAME            avx2, avx512 or amx; default: the best that there is\n"
    "  --chat-template NAME      chatml, qwen2.5, qwen3 or qwq, whatever the file says; default: "
    "the "
    "file's\n"
    "\n"
    "Several devices, processes and hosts\n"
    "  --parallel MODE           replica (default): each device holds the whole model; expert: each\n"
    "                            holds a share of the experts and computes them for all; auto: each\n"
    "                            holds all, and what decodes faster is measured\n"
    "  --experts-per-device N    with expert: experts held per layer; default: as few as hold each "
    "once.\n"
    "                            More give room for copies of those in demand\n"
    "  --expert-load FILE        with expert: place experts by the load in FILE, if it is there, "
    "and "
    "write\n"
    "                            what was measured to it at the end (CSV); likewise with\n"
    "                            --offload-experts, if there are any in host memory\n"
    "  --workers N               wait for N devices of other processes, which then count as this "
    "one's\n"
    "  --worker-listen tcp://ADDRESS:PORT  where they join. Not encrypted: for trusted networks "
    "only\n"
    "  --worker tcp://HOST:PORT  be such a process: compute with --device for the moed that "
    "listens "
    "there,\n"
    "                            on the same model. Of the other flags only --threads, --cpu-isa,\n"
    "                            --gpu-memory-utilization, --offload-experts and --log-level count; "
    "the\n"
    "                            rest is the server's\n"
    "  --launched tcp://HOST:PORT  the same command in every process of an mpirun or srun: the "
    "first "
    "one\n"
    "                            listens there and serves, the others join it. --device cuda is "
    "then "
    "the\n"
    "                            GPU with the process's number on its host\n"
    "\n",
    "Capacity, of each device (memory follows from it; --check prints the table)\n"
    "  --max-seqs N              sequences that run at once (256)\n"
    "  --max-seq-tokens N        longest prompt and completion together; default: the model's "
    "context\n"
    "  --max-batch-tokens N      tokens computed in one step (512; on a GPU 2048)\n"
    "  --prefill-chunk N         most prompt tokens of one sequence in a step; default: a whole "
    "step.\n"
    "                            Smaller keeps running streams smoother while long prompts are "
    "read\n"
    "  --max-itl-ms N            while streams run, steps take prompt tokens only as far as they "
    "are "
    "expected\n"
    "                            to end within N ms; default 0: no bound. A step that takes longer "
    "with no\n"
    "                            prompt in it is not helped by this; prompts go on under any "
    "bound\n"
    "  --kv-blocks N             blocks in the KV pool; default: what memory allows\n"
    "  --block-tokens N          tokens in a KV block, a power of two (16)\n"
    "  --gpu-memory-utilization F  share of a GPU's memory to use (0.90)\n"
    "  --offload-experts auto|N  keep experts in host memory, page-locked, those least in demand\n"
    "                            first: N of all layers together, or as many as the GPU has no room\n"
    "                            for beside --kv-blocks (or 1024 tokens for each of --max-seqs, if\n"
    "                            that is at most a quarter of the room there is). A step reads what\n"
    "                            it needs of them over PCIe, some 30 GB/s: --check says how much.\n"
    "                            Default 0: a model that does not fit is refused\n"
    "\n"
    "Load\n"
    "  --max-queue N             requests that may wait; more are refused (1024)\n"
    "  --max-queued-tokens N     prompt tokens that may wait (1048576)\n"
    "  --drain-seconds N         how long running requests may take after SIGTERM (30)\n"
    "\n"
    "Other\n"
    "  --log-level LEVEL         debug, info (default), warn, error; one line per event on stderr\n"
    "  --check                   load the model, print what it is and the memory table, exit\n"
    "  --version                 print the version, exit\n"
    "  --help                    print this, exit\n"
    "\n"
    "SIGTERM or SIGINT: refuse new requests, finish running ones, exit 0; a second one: exit at "
    "once.\n"
    "Exit status: 0 done, 1 the engine, a worker or the server was lost, or a fault of the daemon, "
    "2\n"
    "the command line, the model, a worker or the socket was not usable.\n"};

enum { CPU_BATCH_TOKENS = 512, GPU_BATCH_TOKENS = 2048 };

enum flag {
    F_MODEL = 256,
    F_LISTEN,
    F_DEVICE,
    F_PARALLEL,
    F_EXPERT_LOAD,
    F_OFFLOAD,
    F_WORKER_LISTEN,
    F_WORKER,
    F_LAUNCHED,
    F_CPU_ISA,
    F_CHAT_TEMPLATE,
    F_GPU_MEMORY,
    F_LOG_LEVEL,
    F_CHECK,
    F_VERSION,
    F_HELP,
    F_NUMBERS /* number flags follow, in the table's order */
};

struct number_flag {
    const char *name;
    size_t offset; /* of an int32_t in struct config */
    int32_t lo, hi, initial;
};

_Static_assert(sizeof(int) == sizeof(int32_t), "threads is set as an int32_t");
#define NUMBER(name, field, lo, hi, initial)                                                       \
    { name, offsetof(struct config, field), lo, hi, initial }
static const struct number_flag numbers[] = {
    NUMBER("threads", threads, 1, 1024, 0),
    NUMBER("max-batch-tokens", max_batch_tokens, 1, 1 << 16, 0),
    NUMBER("max-seqs", max_seqs, 1, 1 << 14, 256),
    NUMBER("max-seq-tokens", max_seq_tokens, 2, 1 << 24, 0),
    NUMBER("kv-blocks", kv_blocks, 1, 1 << 28, 0),
    NUMBER("block-tokens", block_tokens, 1, 256, 16),
    NUMBER("workers", n_workers, 1, MOE_MAX_RANKS - 1, 0),
    NUMBER("experts-per-device", experts_per_device, 1, 1 << 16, 0),
    NUMBER("prefill-chunk", prefill_chunk, 1, 1 << 16, 0),
    NUMBER("max-itl-ms", max_itl_ms, 0, 60000, 0),
    NUMBER("max-queue", max_queue, 1, 1 << 16, 1024),
    NUMBER("max-queued-tokens", max_queued_tokens, 1, 1 << 30, 1 << 20),
    NUMBER("drain-seconds", drain_seconds, 0, 86400, 30),
};
enum { N_NUMBERS = sizeof numbers / sizeof numbers[0] };

static const struct option words[] = {
    {"model", required_argument, NULL, F_MODEL},
    {"listen", required_argument, NULL, F_LISTEN},
    {"device", required_argument, NULL, F_DEVICE},
    {"parallel", required_argument, NULL, F_PARALLEL},
    {"expert-load", required_argument, NULL, F_EXPERT_LOAD},
    {"offload-experts", required_argument, NULL, F_OFFLOAD},
    {"worker-listen", required_argument, NULL, F_WORKER_LISTEN},
    {"worker", required_argument, NULL, F_WORKER},
    {"launched", required_argument, NULL, F_LAUNCHED},
    {"cpu-isa", required_argument, NULL, F_CPU_ISA},
    {"chat-template", required_argument, NULL, F_CHAT_TEMPLATE},
    {"gpu-memory-utilization", required_argument, NULL, F_GPU_MEMORY},
    {"log-level", required_argument, NULL, F_LOG_LEVEL},
    {"check", no_argument, NULL, F_CHECK},
    {"version", no_argument, NULL, F_VERSION},
    {"help", no_argument, NULL, F_HELP},
};
enum { N_WORDS = sizeof words / sizeof words[0] };

void config_default_endpoint(char *dst, size_t cap) {
    const char *endpoint = getenv("MOED_ENDPOINT"), *run = getenv("XDG_RUNTIME_DIR");
    if (endpoint && *endpoint)
        snprintf(dst, cap, "%s", endpoint);
    else if (run && *run)
        snprintf(dst, cap, "ipc://%s/moed.sock", run);
    else
        snprintf(dst, cap, "ipc:///tmp/moed-%u.sock", (unsigned)getuid());
}

static enum status set_number(const struct number_flag *f, const char *arg, struct error *e,
                              struct config *c) {
    char *end;
    errno = 0;
    long long v = strtoll(arg, &end, 10);
    if (*arg == '\0' || *end != '\0')
        return error_set(e, ST_INVALID, "--%s %s: not a whole number", f->name, arg);
    if (errno != 0 || v < f->lo || v > f->hi)
        return error_set(e, ST_INVALID, "--%s %s: must lie between %d and %d", f->name, arg, f->lo,
                         f->hi);
    int32_t value = (int32_t)v;
    memcpy((char *)c + f->offset, &value, sizeof value);
    return ST_OK;
}

static enum status set_share(const char *arg, struct error *e, struct config *c) {
    char *end;
    double v = strtod(arg, &end);
    if (*arg == '\0' || *end != '\0' || !isfinite(v) || v < 0.05 || v > 1.0)
        return error_set(e, ST_INVALID, "--gpu-memory-utilization %s: must lie between 0.05 and 1",
                         arg);
    c->gpu_memory_utilization = v;
    return ST_OK;
}

static enum status set_offload(const char *arg, struct error *e, int32_t *out) {
    char *end;
    errno = 0;
    long long v = strtoll(arg, &end, 10);
    bool automatic = strcmp(arg, "auto") == 0, whole = *arg != '\0' && *end == '\0' && errno == 0;
    if (!automatic && (!whole || v < 0 || v > INT32_MAX))
        return error_set(e, ST_INVALID, "--offload-experts %s: must be auto or a number of experts", arg);
    *out = automatic ? MOE_OFFLOAD_AUTO : (int32_t)v;
    return ST_OK;
}

static enum status set_devices(const char *list, struct error *e, struct moe_devices *out) {
    if (moe_devices_parse(list, NULL, out) == ST_OK) return ST_OK;
    return error_set(e, ST_INVALID,
                     "--device %s: must be cpu, reference or cuda:N, or up to %d of one of these "
                     "with commas between them",
                     list, MOE_MAX_RANKS);
}

static enum status set_parallel(const char *arg, struct error *e, enum config_parallel *out) {
    static const char *const names[] = {"replica", "expert", "auto"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(arg, names[i]) != 0) continue;
        *out = (enum config_parallel)i;
        return ST_OK;
    }
    return error_set(e, ST_INVALID, "--parallel %s: must be replica, expert or auto", arg);
}

static enum status set_word(int flag, const char *arg, struct error *e, struct config *c) {
    switch (flag) {
    case F_MODEL: c->model = arg; return ST_OK;
    case F_LISTEN:
        if (strlen(arg) >= sizeof c->listen)
            return error_set(e, ST_INVALID, "--listen: the endpoint is too long");
        snprintf(c->listen, sizeof c->listen, "%s", arg);
        return ST_OK;
    case F_DEVICE: return set_devices(arg, e, &c->devices);
    case F_PARALLEL: return set_parallel(arg, e, &c->parallel);
    case F_EXPERT_LOAD: c->expert_load = arg; return ST_OK;
    case F_OFFLOAD: return set_offload(arg, e, &c->offload_experts);
    case F_WORKER_LISTEN: c->workers_at = arg; return ST_OK;
    case F_WORKER: c->server = arg; return ST_OK;
    case F_LAUNCHED: c->workers_at = c->server = arg; return ST_OK; /* settle_launch */
    case F_CPU_ISA: c->cpu_isa = arg; return ST_OK;
    case F_CHAT_TEMPLATE: c->chat_template = arg; return ST_OK;
    case F_GPU_MEMORY: return set_share(arg, e, c);
    case F_LOG_LEVEL:
        if (!log_parse_level(arg, &c->log_level))
            return error_set(e, ST_INVALID, "--log-level %s: must be debug, info, warn or error",
                             arg);
        return ST_OK;
    case F_CHECK: c->action = CONFIG_CHECK; return ST_OK;
    case F_VERSION: c->action = CONFIG_VERSION; return ST_OK;
    default: c->action = CONFIG_HELP; return ST_OK;
    }
}

bool config_launcher(struct config_launch *out) {
    static const char *const names[][3] = {
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
        {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
        {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int32_t v[3] = {0};
        int n = 0;
        for (; n < 3; n++) {
            const char *text = getenv(names[i][n]);
            char *end;
            long number = text ? strtol(text, &end, 10) : -1;
            if (!text || !*text || *end || number < 0 || number > INT32_MAX) break;
            v[n] = (int32_t)number;
        }
        *out = (struct config_launch){v[0], v[1], v[2]};
        if (n == 3) return out->rank < out->size && out->local_rank <= out->rank;
    }
    return false;
}

/* Which part --launched gives to this process. */
static enum status settle_launch(struct error *e, struct config *c) {
    struct config_launch l;
    if (c->n_workers > 0)
        return error_set(e, ST_INVALID, "--workers: --launched knows how many there are");
    if (!config_launcher(&l))
        return error_set(
            e, ST_INVALID,
            "--launched: no launcher said which process this is (as mpirun and srun do "
            "by OMPI_COMM_WORLD_RANK, PMI_RANK or SLURM_PROCID)");
    if (l.size > MOE_MAX_RANKS)
        return error_set(e, ST_INVALID, "--launched: %d processes, at most %d", l.size,
                         MOE_MAX_RANKS);
    c->launched_rank = l.rank;
    c->n_workers = l.rank == 0 ? (l.size - 1) * c->devices.n : 0;
    if (l.rank == 0) c->server = NULL;
    if (l.rank > 0 || l.size == 1) c->workers_at = NULL;
    char *name = c->devices.names[0];
    if (c->devices.n == 1 && strcmp(name, "cuda") == 0)
        snprintf(name, sizeof c->devices.names[0], "cuda:%d", l.local_rank);
    return ST_OK;
}

static enum status check_workers(const struct config *c, struct error *e) {
    if (c->server && (c->workers_at || c->n_workers > 0))
        return error_set(e, ST_INVALID, "--worker: a worker has no workers of its own");
    if ((c->n_workers > 0) != (c->workers_at != NULL))
        return error_set(e, ST_INVALID, "--workers and --worker-listen go together");
    if (c->devices.n + c->n_workers > MOE_MAX_RANKS)
        return error_set(e, ST_INVALID, "%d devices here and %d of workers: at most %d",
                         c->devices.n, c->n_workers, MOE_MAX_RANKS);
    return ST_OK;
}

static enum status check_together(const struct config *c, struct error *e) {
    if (!c->model) return error_set(e, ST_INVALID, "--model is missing; see --help");
    if ((c->block_tokens & (c->block_tokens - 1)) != 0)
        return error_set(e, ST_INVALID, "--block-tokens %d: must be a power of two",
                         c->block_tokens);
    enum status st = check_workers(c, e);
    if (st != ST_OK) return st;
    if (c->experts_per_device > 0 && c->parallel != PARALLEL_EXPERT)
        return error_set(e, ST_INVALID, "--experts-per-device is for --parallel expert");
    if (c->offload_experts != 0 &&
        (c->parallel != PARALLEL_REPLICA || strncmp(c->devices.names[0], "cuda", 4) != 0))
        return error_set(e, ST_INVALID, "--offload-experts is for GPUs with --parallel replica");
    if (c->expert_load && c->parallel != PARALLEL_EXPERT && c->offload_experts == 0)
        return error_set(e, ST_INVALID, "--expert-load is for --parallel expert and --offload-experts");
    return ST_OK;
}

enum status config_parse(int argc, char **argv, struct error *e, struct config *out) {
    struct config c = {.action = CONFIG_SERVE,
                       .devices = {.n = 1, .names = {"cpu"}},
                       .gpu_memory_utilization = 0.90,
                       .launched_rank = -1,
                       .log_level = LOG_INFO};
    struct option options[N_WORDS + N_NUMBERS + 1] = {0};
    memcpy(options, words, sizeof words);
    for (int i = 0; i < N_NUMBERS; i++) {
        memcpy((char *)&c + numbers[i].offset, &numbers[i].initial, sizeof(int32_t));
        options[N_WORDS + i] =
            (struct option){numbers[i].name, required_argument, NULL, F_NUMBERS + i};
    }
    config_default_endpoint(c.listen, sizeof c.listen);
    bool launched = false;
    optind = 0; /* glibc: start over, so that tests may parse more than once */
    opterr = 0;
    for (;;) {
        int flag = getopt_long(argc, argv, ":", options, NULL);
        if (flag < 0) break;
        if (flag == '?')
            return error_set(e, ST_INVALID, "%s: unknown flag; see --help", argv[optind - 1]);
        if (flag == ':') return error_set(e, ST_INVALID, "%s: needs a value", argv[optind - 1]);
        enum status st = flag >= F_NUMBERS ? set_number(&numbers[flag - F_NUMBERS], optarg, e, &c)
                                           : set_word(flag, optarg, e, &c);
        if (st != ST_OK) return st;
        launched |= flag == F_LAUNCHED;
        if (c.action == CONFIG_VERSION || c.action == CONFIG_HELP) break;
    }
    if (c.action == CONFIG_SERVE || c.action == CONFIG_CHECK) {
        if (optind < argc)
            return error_set(e, ST_INVALID, "%s: not a flag; see --help", argv[optind]);
        enum status st = launched ? settle_launch(e, &c) : ST_OK;
        if (st == ST_OK) st = check_together(&c, e);
        if (st != ST_OK) return st;
        if (c.action == CONFIG_SERVE && c.server) c.action = CONFIG_WORK;
    }
    /* A step of a GPU is short; what it reads for one is worth sharing among more tokens. */
    if (c.max_batch_tokens == 0)
        c.max_batch_tokens =
            strncmp(c.devices.names[0], "cuda", 4) == 0 ? GPU_BATCH_TOKENS : CPU_BATCH_TOKENS;
    *out = c;
    return ST_OK;
}
