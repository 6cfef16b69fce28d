/* main: from the command line to a running server and back. Exit status: see config_help. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "daemon/choose.h"
#include "daemon/config.h"
#include "daemon/gather.h"
#include "daemon/load_file.h"
#include "daemon/remote.h"
#include "daemon/server.h"
#include "daemon/worker.h"

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

static struct moe_limits limits_of(const struct config *c) {
    return (struct moe_limits){.max_batch_tokens = c->max_batch_tokens,
                               .max_seqs = c->max_seqs,
                               .max_rows = c->max_seqs,
                               .max_seq_tokens = c->max_seq_tokens,
                               .block_tokens = c->block_tokens,
                               .n_blocks = c->kv_blocks};
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

/* What the engines run on: devices of this process, then ranks of others; engines and what they drive have
 * the same index. */
struct devices {
    int n, n_here;
    struct moe_group
        *groups[MOE_MAX_RANKS]; /* expert parallel: one for all here, or one each (moe.h) */
    int n_groups;
    uint64_t *load; /* what --expert-load said, or NULL */
    size_t n_load;
    struct engine_moe models[MOE_MAX_RANKS]; /* [n_here] */
    struct engine_remote remotes[MOE_MAX_RANKS]; /* [n - n_here] */
    struct engine *engines[MOE_MAX_RANKS];
};

static struct moe_options model_options(const struct config *c, const struct devices *d,
                                        struct moe_group *group, int rank) {
    return (struct moe_options){.model_path = c->model,
                                .device = c->devices.names[rank],
                                .n_ranks = c->devices.n,
                                .group = group,
                                .rank = rank,
                                .limits = limits_of(c),
                                .n_threads = c->threads,
                                .cpu_isa = c->cpu_isa,
                                .gpu_memory_utilization = c->gpu_memory_utilization,
                                .offload_experts = c->offload_experts,
                                .expert_load = d->load,
                                .n_expert_load = d->n_load};
}

static const struct moe_info *info_of(const struct devices *d, int i) {
    return i < d->n_here ? moe_info(d->models[i].moe) : &d->remotes[i - d->n_here].info;
}

/* The rank whose limits hold for all: pools may differ, and with them the longest sequence. */
static const struct moe_info *common_info(const struct devices *d) {
    const struct moe_info *least = info_of(d, 0);
    for (int i = 1; i < d->n; i++)
        if (info_of(d, i)->limits.max_seq_tokens < least->limits.max_seq_tokens)
            least = info_of(d, i);
    return least;
}

/* The load that was measured, by the group or, while their engines stop, by the devices. */
static enum status write_load(const struct config *c, struct devices *d, struct error *e) {
    const struct model_shape shape = common_info(d)->shape;
    size_t n = (size_t)shape.n_layers * (size_t)shape.n_experts;
    uint64_t *load = calloc(n, sizeof *load), sum = 0;
    uint16_t *held = calloc(n, sizeof *held);
    enum status st = load && held ? ST_OK : error_set(e, ST_NO_MEMORY, "no memory for the measured load");
    for (int i = 0; i < d->n_here && st == ST_OK && d->n_groups == 0; i++) d->models[i].load = load;
    server_destroy(serving);
    for (size_t i = 0; i < n && st == ST_OK; i++) held[i] = (uint16_t)((1u << d->n) - 1u);
    if (st == ST_OK && d->n_groups > 0) {
        moe_group_load(d->groups[0], load);
        moe_group_held(d->groups[0], held);
    }
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
    bool together = d->n_groups > 0;
    if (together && c->parallel == PARALLEL_AUTO) {
        const struct choose_args choose = {d->engines, d->n, d->groups, d->n_groups,
                                           common_info(d)};
        enum status measured = choose_parallel(&choose, &together);
        if (measured != ST_OK) {
            net_close(net);
            error_set(&e, measured, "the first steps failed: %s", status_name(measured));
            return complain(&e);
        }
    }
    int32_t rank_blocks[MOE_MAX_RANKS];
    bool on_gpu = strncmp(c->devices.names[0], "cuda", 4) == 0;
    for (int i = 0; i < d->n; i++) rank_blocks[i] = info_of(d, i)->limits.n_blocks;
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
        log_model(info_of(d, i), i);
        if (i < d->n_here) log_memory(d->models[i].moe);
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
    if (st == ST_OK && d->n_load > RANK_MAX_EXPERTS)
        st = error_set(e, ST_TOO_LARGE, "%s: too many experts", c->expert_load);
    if (st == ST_OK)
        log_event(LOG_INFO, "daemon", "expert_load", "file=\"%s\" experts=%zu", c->expert_load,
                  d->n_load);
    return st;
}

static int32_t experts_per_rank(const struct config *c) {
    return c->parallel == PARALLEL_AUTO ? INT32_MAX : c->experts_per_device;
}

/* Wait for the ranks of other processes. */
static enum status gather_workers(const struct config *c, bool group, struct error *e,
                                  struct devices *d, struct moe_unique_id *id,
                                  struct gathered *out) {
    struct gather_options o = {.address = c->workers_at,
                               .n = c->n_workers,
                               .n_here = d->n_here,
                               .per_process = c->launched_rank >= 0 ? c->devices.n : 0,
                               .welcome = {.limits = limits_of(c),
                                           .group = group,
                                           .experts_per_rank = experts_per_rank(c),
                                           .unique_id = *id,
                                           .n_load = (uint32_t)d->n_load,
                                           .load = (const uint8_t *)d->load}};
    enum status st = gather_identify(c->model, c->devices.names[0], e, &o.self);
    if (st == ST_OK) st = gather(&o, e, out);
    if (st != ST_OK) return st;
    for (int i = 0; i < c->n_workers; i++)
        d->remotes[i] = (struct engine_remote){.link = out->links[i],
                                               .rank = d->n_here + i,
                                               .limits = limits_of(c),
                                               .shape = o.self.model.shape};
    return ST_OK;
}

/* One group for all ranks of this process, or one each where there are others. */
static enum status create_groups(const struct config *c, const struct gathered *others,
                                 const struct moe_unique_id *id, struct error *e,
                                 struct devices *d) {
    enum status st = ST_OK;
    d->n_groups = others ? d->n_here : 1;
    for (int i = 0; i < d->n_groups && st == ST_OK; i++) {
        const struct moe_group_options o = {.n_ranks = d->n,
                                            .streams = others ? others->streams[i] : NULL,
                                            .rank = i,
                                            .experts_per_rank = experts_per_rank(c),
                                            .load = d->load,
                                            .n_load = d->n_load,
                                            .unique_id = id};
        st = moe_group_create(&o, e, &d->groups[i]);
    }
    for (int i = 0; i < c->n_workers; i++) d->remotes[i].group = d->groups[0];
    return st;
}

/* Whether a group is worth trying: only auto may decide that it is not. */
static bool may_share(const struct config *c, const struct devices *d) {
    if (c->parallel != PARALLEL_AUTO) return c->parallel == PARALLEL_EXPERT;
    if (d->n > 1) return true;
    log_event(LOG_INFO, "daemon", "parallel", "mode=replica why=\"one device\"");
    return false;
}

static enum status open_models(const struct config *c, struct error *e, struct devices *d) {
    struct engine_driver drivers[MOE_MAX_RANKS];
    struct moe_unique_id id = {{0}};
    struct gathered others;
    bool any_others = c->action == CONFIG_SERVE && c->n_workers > 0;
    d->n_here = c->devices.n;
    d->n = d->n_here + (any_others ? c->n_workers : 0);
    bool group = may_share(c, d);
    enum status st = read_load(c, e, d);
    if (st == ST_OK && group && any_others)
        st = moe_unique_id_create(c->devices.names[0], e, &id);
    if (st == ST_OK && any_others) st = gather_workers(c, group, e, d, &id, &others);
    if (st == ST_OK && group) st = create_groups(c, any_others ? &others : NULL, &id, e, d);
    if (st != ST_OK) return st;
    for (int i = 0; i < d->n_here; i++) {
        struct moe_group *own = group ? d->groups[i % d->n_groups] : NULL;
        d->models[i] = (struct engine_moe){.options = model_options(c, d, own, i),
                                           .progress = i == 0 ? report_progress : NULL};
        drivers[i] = (struct engine_driver){&engine_moe_ops, &d->models[i]};
    }
    for (int i = d->n_here; i < d->n; i++)
        drivers[i] = (struct engine_driver){&engine_remote_ops, &d->remotes[i - d->n_here]};
    return engine_start(drivers, d->n, e, d->engines);
}

static int check_or_serve(const struct config *c) {
    struct error e = {0};
    struct text *text = NULL;
    struct net *net = NULL;
    static struct devices d; /* too large for comfort */
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
    for (int i = 0; i < d.n_groups; i++) moe_group_destroy(d.groups[i]);
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
    if (c.action == CONFIG_HELP) {
        for (int i = 0; i < CONFIG_HELP_PARTS; i++) fputs(config_help[i], stdout);
        return ferror(stdout) || fflush(stdout) != 0 ? EXIT_LOST : EXIT_SUCCESS;
    }
    if (c.action == CONFIG_VERSION) return puts(MOED_SERVER_NAME) < 0 ? EXIT_LOST : EXIT_SUCCESS;
    log_set_level(c.log_level);
    signal(SIGPIPE, SIG_IGN); /* a closed stderr costs log lines, not the daemon */
    raise_descriptor_limit();
    if (c.action == CONFIG_WORK) worker_run(&c);
    return check_or_serve(&c);
}
