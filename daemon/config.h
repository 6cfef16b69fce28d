/* config: what the command line says. Every number is range-checked here, so that the rest of the
 * daemon may trust it. Pure but for environment variables (config_default_endpoint, config_launcher). */
#ifndef MOED_DAEMON_CONFIG_H
#define MOED_DAEMON_CONFIG_H

#include "moe/moe.h"
#include "proto/base.h"

enum config_action { CONFIG_SERVE, CONFIG_WORK, CONFIG_CHECK, CONFIG_VERSION, CONFIG_HELP };

enum config_parallel { PARALLEL_REPLICA, PARALLEL_EXPERT, PARALLEL_AUTO };

struct config {
    enum config_action action;
    const char *model;
    char listen[256];
    struct moe_devices devices;
    enum config_parallel parallel; /* what several devices do */
    int32_t experts_per_device; /* of a layer; 0: as few as hold each once */
    int32_t offload_experts; /* in host memory, or MOE_OFFLOAD_AUTO */
    const char *expert_load; /* NULL, or where the measured load is kept */
    /* Ranks in other processes: */
    const char *server; /* CONFIG_WORK: tcp:// address of the moed to compute for */
    const char *workers_at; /* NULL, or the tcp:// address at which workers join */
    int32_t n_workers; /* devices of theirs to wait for */
    int32_t launched_rank; /* the launcher's number of this process; -1: none */
    const char *cpu_isa; /* NULL: the best this machine has */
    const char *chat_template; /* NULL: recognise the model's own */
    int threads; /* 0: all cores */
    int32_t max_batch_tokens, max_seqs, block_tokens;
    int32_t max_seq_tokens; /* 0: the model's context length */
    int32_t kv_blocks; /* 0: what memory allows */
    int32_t prefill_chunk; /* 0: the whole batch */
    int32_t max_itl_ms; /* 0: no bound */
    int32_t max_queue, max_queued_tokens;
    int32_t drain_seconds;
    double gpu_memory_utilization;
    enum log_level log_level;
};

/* Strings are borrowed from argv. With --launched, the launcher's variables say which of several processes this is
 * (config_launcher). ST_INVALID, with the flag and its range named. */
enum status config_parse(int argc, char **argv, struct error *e, struct config *out);
enum { CONFIG_HELP_PARTS = 2 }; /* a string literal has at most 4095 characters */
extern const char *const config_help[CONFIG_HELP_PARTS];

/* Which of how many processes this is, and which of its host, as mpirun (Open MPI, MPICH) or srun tells. False: no
 * launcher, or one that contradicts itself. */
struct config_launch {
    int32_t rank, size, local_rank;
};
bool config_launcher(struct config_launch *out);

/* $MOED_ENDPOINT, else ipc://$XDG_RUNTIME_DIR/moed.sock, else ipc:///tmp/moed-<uid>.sock: the
 * client library's rule. */
void config_default_endpoint(char *dst, size_t cap);

#endif
