/* main: from the command line to a running server and back. Exit status: see config_help. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "daemon/choose.h"
#include "daemon/config.h"
#include "daemon/load_file.h"
#include "daemon/server.h"

enum { EXIT_LOST = 1, EXIT_UNUSABLE = 2, MAX_MEMORY_LINES = 64 };
#define LOADING_LINE_NS UINT64_C(2000000000)
/* A GPU's step takes milliseconds; a CPU may well take a minute for a large one. */
#define GPU_STEP_NS UINT64_C(10000000000)

static struct server *serving; /* for the signal handler; set before it is installed */

static void on_signal(int signal) {
    (void)signal;
    server_stop(serving);
}

/* Until here SIGTERM and SIGINT have their default action: a daemon that is still loading just
 * ends. */
static void install_signals(void) {
    struct sigaction a = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&a.sa_mask);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGINT, &a, NULL);
}

/* One descriptor per client: take what the hard limit allows. */
static void raise_descriptor_limit(void) {
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) != 0) return;
    l.rlim_cur = l.rlim_max;
    setrlimit(RLIMIT_NOFILE, &l);
}

/* A line now and then while a large file loads; a small one is there before the first. */
static void report_progress(void *ctx, uint64_t done, uint64_t total) {
    static uint64_t said_ns;
    (void)ctx;
    uint64_t now = clock_now_ns();
    if (said_ns == 0) said_ns = now;
    if (now - said_ns < LOADING_LINE_NS) return;
    said_ns = now;
    log_event(LOG_INFO, "daemon", "loading", "bytes=%llu of=%llu", (unsigned long long)done,
              (unsigned long long)total);
}

static void log_model(const struct moe_info *i, int rank) {
    const struct model_shape *s = &i->shape;
    log_event(LOG_INFO, "daemon", "model",
              "name=\"%s\" architecture=%s quantization=%s layers=%d experts=%d used=%d vocab=%d "
              "context=%d device=%d backend=\"%s\"",
              i->name, i->architecture, i->quantization, s->n_layers, s->n_experts,
              s->n_experts_used, s->n_vocab, i->limits.max_seq_tokens, rank, i->backend);
    log_event(LOG_INFO, "daemon", "capacity",
              "sequences=%d batch_tokens=%d kv_blocks=%d block_tokens=%d kv_tokens=%lld",
              i->limits.max_seqs, i->limits.max_batch_tokens, i->limits.n_blocks,
              i->limits.block_tokens, (long long)i->limits.n_blocks * i->limits.block_tokens);
}

static void log_memory(const struct moe *m) {
    struct moe_memory_line lines[MAX_MEMORY_LINES];
    int n = moe_memory(m, lines, MAX_MEMORY_LINES);
    for (int i = 0; i < n; i++)
        log_event(LOG_INFO, "daemon", "memory", "what=\"%s\" bytes=%llu", lines[i].what,
                  (unsigned long long)lines[i].n_bytes);
}

static void print_check(const struct moe *m) {
    const struct moe_info *i = moe_info(m);
    struct moe_memory_line lines[MAX_MEMORY_LINES];
    int n = moe_memory(m, lines, MAX_MEMORY_LINES);
    uint64_t total = 0;
    printf("model     %s (%s, %s experts)\n", i->name, i->architecture, i->quantization);
    printf("backend   %s\n", i->backend);
    printf("capacity  %d sequences, %d tokens in a step, %d of one sequence\n", i->limits.max_seqs,
           i->limits.max_batch_tokens, i->limits.max_seq_tokens);
    printf("kv pool   %d blocks of %d tokens\n", i->limits.n_blocks, i->limits.block_tokens);
    if (i->offload.n_experts > 0)
        printf("offload   %d of %d experts in host memory; expected over PCIe: %.1f MiB in a step of one "
               "token, %.1f MiB in one of %d sequences\n",
               i->offload.n_experts, i->shape.n_layers * i->shape.n_experts,
               i->offload.alone_bytes / 1048576.0, i->offload.full_bytes / 1048576.0,
               i->limits.max_seqs);
    putchar('\n');
    for (int k = 0; k < n; k++) {
        printf("%-48s %14.1f MiB\n", lines[k].what, (double)lines[k].n_bytes / 1048576.0);
        total += lines[k].n_bytes;
    }
    printf("%-48s %14.1f MiB\n", "total", (double)total / 1048576.0);
}

static int complain(const struct error *e) {
    log_event(LOG_ERROR, "daemon", "failed", "code=%s error=\"%s\"", status_name(e->code), e->text);
    return EXIT_UNUSABLE;
}

/* What the engines run on; engines and models of the same index belong together. */
struct devices {
    int n;
    struct moe_group *group; /* expert parallel, else NULL */
    uint64_t *load; /* what --expert-load said, or NULL */
    size_t n_load;
    struct engine_moe models[MOE_MAX_RANKS];
    struct engine *engines[MOE_MAX_RANKS];
};

static struct moe_options model_options(const struct config *c, const struct devices *d, int rank) {
    return (struct moe_options){.model_path = c->model,
                                .device = c->devices.names[rank],
                                .n_ranks = c->devices.n,
                                .group = d->group,
                                .rank = rank,
                                .limits = {.max_batch_tokens = c->max_batch_tokens,
                                           .max_seqs = c->max_seqs,
                                           .max_rows = c->max_seqs,
                                           .max_seq_tokens = c->max_seq_tokens,
                                           .block_tokens = c->block_tokens,
                                           .n_blocks = c->kv_blocks},
                                .n_threads = c->threads,
                                .cpu_isa = c->cpu_isa,
                                .gpu_memory_utilization = c->gpu_memory_utilization,
                                .offload_experts = c->offload_experts,
                                .expert_load = d->load,
                                .n_expert_load = d->n_load};
}

/* The rank whose limits hold for all: pools may differ, and with them the longest sequence. */
static const struct moe_info *common_info(const struct devices *d) {
    const struct moe_info *least = moe_info(d->models[0].moe);
    for (int i = 1; i < d->n; i++) {
        const struct moe_info *info = moe_info(d->models[i].moe);
        if (info->limits.max_seq_tokens < least->limits.max_seq_tokens) least = info;
    }
    return least;
}

/* The load that was measured, by the group or, while their engines stop, by the devices. */
static enum status write_load(const struct config *c, struct devices *d, struct error *e) {
    const struct model_shape shape = moe_info(d->models[0].moe)->shape;
    size_t n = (size_t)shape.n_layers * (size_t)shape.n_experts;
    uint64_t *load = calloc(n, sizeof *load);
    uint16_t *held = calloc(n, sizeof *held);
    enum status st = load && held ? ST_OK : error_set(e, ST_NO_MEMORY, "no memory for the measured load");
    for (int i = 0; i < d->n && st == ST_OK && !d->group; i++) d->models[i].load = load;
    server_destroy(serving);
    for (size_t i = 0; i < n && st == ST_OK; i++) held[i] = (uint16_t)((1u << d->n) - 1u);
    if (st == ST_OK && d->group) {
        moe_group_load(d->group, load);
        moe_group_held(d->group, held);
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < n && st == ST_OK; i++) sum += load[i];
    if (sum > 0) st = load_file_write(c->expert_load, &shape, load, held, e); /* else what is there is better */
    free(load);
    free(held);
    return st;
}

/* The models are open; `net` holds the endpoint's lock. All are closed here. */
static int serve(const struct config *c, struct text *text, struct net *net,
                 struct devices *d) {
    struct error e;
    bool together = d->group != NULL;
    if (together && c->parallel == PARALLEL_AUTO) {
        const struct choose_args choose = {d->engines, d->n, d->group, common_info(d)};
        enum status measured = choose_parallel(&choose, &together);
        if (measured != ST_OK) {
            net_close(net);
            error_set(&e, measured, "the first steps failed: %s", status_name(measured));
            return complain(&e);
        }
    }
    int32_t rank_blocks[MOE_MAX_RANKS];
    bool on_gpu = strncmp(c->devices.names[0], "cuda", 4) == 0;
    for (int i = 0; i < d->n; i++) rank_blocks[i] = moe_info(d->models[i].moe)->limits.n_blocks;
    struct server_options o = {.text = text,
                               .info = common_info(d),
                               .n_ranks = d->n,
                               .rank_blocks = rank_blocks,
                               .lockstep = together,
                               .prefill_chunk = c->prefill_chunk,
                               .max_itl_ns = (uint64_t)c->max_itl_ms * 1000000u,
                               .max_queue = c->max_queue,
                               .max_queued_tokens = c->max_queued_tokens,
                               .step_ns = on_gpu ? GPU_STEP_NS : 0,
                               .drain_ns = (uint64_t)c->drain_seconds * 1000000000u};
    if (server_create(&o, net, d->engines, &e, &serving) != ST_OK) return complain(&e);
    for (int i = 0; i < d->n; i++) {
        log_model(moe_info(d->models[i].moe), i);
        log_memory(d->models[i].moe);
    }
    log_event(LOG_INFO, "daemon", "memory", "what=\"daemon tables, reserved\" bytes=%llu",
              (unsigned long long)server_bytes(serving));
    install_signals();
    log_event(LOG_INFO, "daemon", "ready", "endpoint=%s", c->listen);
    enum status st = server_run(serving);
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    if (st != ST_OK) {
        server_abandon(serving);
        _exit(EXIT_LOST); /* whatever an engine is stuck in */
    }
    if (c->expert_load) return write_load(c, d, &e) == ST_OK ? EXIT_SUCCESS : complain(&e);
    server_destroy(serving);
    return EXIT_SUCCESS;
}

static enum status read_load(const struct config *c, struct error *e, struct devices *d) {
    if (!c->expert_load) return ST_OK;
    enum status st = load_file_read(c->expert_load, e, &d->load, &d->n_load);
    if (st == ST_OK)
        log_event(LOG_INFO, "daemon", "expert_load", "file=\"%s\" experts=%zu", c->expert_load,
                  d->n_load);
    return st;
}

static enum status create_group(const struct config *c, struct error *e, struct devices *d) {
    const struct moe_group_options o = {
        .n_ranks = c->devices.n,
        .experts_per_rank = c->parallel == PARALLEL_AUTO ? INT32_MAX : c->experts_per_device,
        .load = d->load,
        .n_load = d->n_load};
    return moe_group_create(&o, e, &d->group);
}

/* Whether a group is worth trying: only auto may decide that it is not. */
static bool may_share(const struct config *c) {
    if (c->parallel != PARALLEL_AUTO) return true;
    if (c->devices.n > 1) return true;
    log_event(LOG_INFO, "daemon", "parallel", "mode=replica why=\"one device\"");
    return false;
}

static enum status open_models(const struct config *c, struct error *e, struct devices *d) {
    void *ctxs[MOE_MAX_RANKS];
    d->n = c->devices.n;
    enum status st = read_load(c, e, d);
    if (st != ST_OK) return st;
    if (c->parallel != PARALLEL_REPLICA && may_share(c)) {
        st = create_group(c, e, d);
        if (st != ST_OK) return st;
    }
    for (int i = 0; i < d->n; i++) {
        d->models[i] = (struct engine_moe){.options = model_options(c, d, i),
                                           .progress = i == 0 ? report_progress : NULL};
        ctxs[i] = &d->models[i];
    }
    return engine_start(&engine_moe_ops, ctxs, d->n, e, d->engines);
}

static int check_or_serve(const struct config *c) {
    struct error e = {0};
    struct text *text = NULL;
    struct net *net = NULL;
    struct devices d = {0};
    /* The lock comes first: a second daemon is told so before it loads gigabytes. */
    enum status st = c->action == CONFIG_SERVE ? net_open(c->listen, &e, &net) : ST_OK;
    if (st == ST_OK) st = text_open(c->model, c->chat_template, &e, &text);
    if (st == ST_OK) st = open_models(c, &e, &d);
    int rc = EXIT_SUCCESS;
    if (st != ST_OK) {
        rc = complain(&e);
        net_close(net);
    } else if (c->action == CONFIG_CHECK) {
        for (int i = 0; i < d.n; i++) print_check(d.models[i].moe);
        for (int i = 0; i < d.n; i++) engine_stop(d.engines[i]);
    } else {
        rc = serve(c, text, net, &d);
    }
    moe_group_destroy(d.group);
    free(d.load);
    text_close(text);
    return rc;
}

int main(int argc, char **argv) {
    struct config c;
    struct error e;
    if (config_parse(argc, argv, &e, &c) != ST_OK) {
        fprintf(stderr, "moed: %s\n", e.text);
        return EXIT_UNUSABLE;
    }
    if (c.action == CONFIG_HELP) return fputs(config_help, stdout) < 0 ? EXIT_LOST : EXIT_SUCCESS;
    if (c.action == CONFIG_VERSION) return puts(MOED_SERVER_NAME) < 0 ? EXIT_LOST : EXIT_SUCCESS;
    log_set_level(c.log_level);
    signal(SIGPIPE, SIG_IGN); /* a closed stderr costs log lines, not the daemon */
    raise_descriptor_limit();
    return check_or_serve(&c);
}
