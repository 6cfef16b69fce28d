/* The command line: defaults, every number's range, every refusal named. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/config.h"
#include "tests/support.h"

static enum status parse(struct config *c, struct error *e, const char *a, const char *b,
                         const char *d) {
    char *argv[5] = {"moed"};
    int n = 1;
    if (a) argv[n++] = (char *)(uintptr_t)a;
    if (b) argv[n++] = (char *)(uintptr_t)b;
    if (d) argv[n++] = (char *)(uintptr_t)d;
    *e = (struct error){0};
    return config_parse(n, argv, e, c);
}

static void test_defaults(void **state) {
    (void)state;
    struct config c;
    struct error e;
    setenv("MOED_ENDPOINT", "ipc:///somewhere/sock", 1);
    assert_int_equal(parse(&c, &e, "--model", "m.gguf", NULL), ST_OK);
    assert_int_equal(c.action, CONFIG_SERVE);
    assert_string_equal(c.model, "m.gguf");
    assert_string_equal(c.listen, "ipc:///somewhere/sock");
    assert_int_equal(c.devices.n, 1);
    assert_string_equal(c.devices.names[0], "cpu");
    assert_int_equal(c.max_seqs, 256);
    assert_int_equal(c.max_batch_tokens, 512);
    assert_int_equal(c.block_tokens, 16);
    assert_int_equal(c.max_seq_tokens, 0);
    assert_int_equal(c.kv_blocks, 0);
    assert_int_equal(c.threads, 0);
    assert_int_equal(c.max_queue, 1024);
    assert_int_equal(c.max_queued_tokens, 1 << 20);
    assert_int_equal(c.drain_seconds, 30);
    assert_true(c.gpu_memory_utilization == 0.90);
    assert_null(c.cpu_isa);
    assert_null(c.chat_template);
    assert_int_equal(c.max_itl_ms, 0);
    assert_int_equal(parse(&c, &e, "--device=cuda:0", "--model", "m.gguf"), ST_OK);
    assert_int_equal(c.max_batch_tokens, 2048);
    assert_int_equal(parse(&c, &e, "--max-batch-tokens=77", "--device=cuda:0", "--model=m"), ST_OK);
    assert_int_equal(c.max_batch_tokens, 77);
}

static void test_endpoint_rule(void **state) {
    (void)state;
    char endpoint[128];
    unsetenv("MOED_ENDPOINT");
    setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
    config_default_endpoint(endpoint, sizeof endpoint);
    assert_string_equal(endpoint, "ipc:///run/user/7/moed.sock");
    setenv("MOED_ENDPOINT", "", 1);
    config_default_endpoint(endpoint, sizeof endpoint);
    assert_string_equal(endpoint, "ipc:///run/user/7/moed.sock");
    unsetenv("XDG_RUNTIME_DIR");
    config_default_endpoint(endpoint, sizeof endpoint);
    assert_int_equal(strncmp(endpoint, "ipc:///tmp/moed-", 16), 0);
}

static void refuse(const char *flag, const char *value, const char *want) {
    struct config c;
    struct error e;
    if (parse(&c, &e, "--model=m", flag, value) != ST_INVALID)
        fail_msg("%s %s was taken", flag, value ? value : "");
    if (!strstr(e.text, want)) fail_msg("%s: \"%s\" does not say \"%s\"", flag, e.text, want);
}

static void test_ranges(void **state) {
    (void)state;
    static const struct {
        const char *flag, *low, *high;
    } numbers[] = {
        {"--threads", "1", "1024"},        {"--max-batch-tokens", "1", "65536"},
        {"--max-seqs", "1", "16384"},      {"--max-seq-tokens", "2", "16777216"},
        {"--kv-blocks", "1", "268435456"}, {"--block-tokens", "1", "256"},
        {"--prefill-chunk", "1", "65536"}, {"--max-itl-ms", "0", "60000"},
        {"--max-queue", "1", "65536"},     {"--max-queued-tokens", "1", "1073741824"},
        {"--drain-seconds", "0", "86400"},
    };
    struct config c;
    struct error e;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char out[32];
        assert_int_equal(parse(&c, &e, "--model=m", numbers[i].flag, numbers[i].low), ST_OK);
        assert_int_equal(parse(&c, &e, "--model=m", numbers[i].flag, numbers[i].high), ST_OK);
        snprintf(out, sizeof out, "%lld", atoll(numbers[i].high) + 1);
        refuse(numbers[i].flag, out, numbers[i].flag);
        snprintf(out, sizeof out, "%lld", atoll(numbers[i].low) - 1);
        refuse(numbers[i].flag, out, "must lie between");
        refuse(numbers[i].flag, "12x", "not a whole number");
        refuse(numbers[i].flag, "", "not a whole number");
        refuse(numbers[i].flag, "99999999999999999999", "must lie between");
    }
}

static void test_refusals(void **state) {
    (void)state;
    struct config c;
    struct error e;
    refuse("--no-such-flag", NULL, "--no-such-flag: unknown flag");
    refuse("--max-seqs", NULL, "--max-seqs: needs a value");
    refuse("stray", NULL, "stray: not a flag");
    refuse("--device", "gpu", "--device gpu");
    refuse("--device", "cuda:", "--device cuda:");
    refuse("--device", "cuda:1x", "--device cuda:1x");
    refuse("--device", "cpu,", "--device cpu,");
    refuse("--device", "cpu,cuda:0", "--device cpu,cuda:0");
    refuse("--device", "cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu",
           "up to 16");
    refuse("--parallel", "both", "--parallel both");
    refuse("--experts-per-device", "3", "for --parallel expert");
    refuse("--expert-load", "x", "for --parallel expert");
    refuse("--offload-experts", "auto", "for GPUs");
    refuse("--offload-experts", "-1", "auto or a number");
    refuse("--offload-experts", "3x", "auto or a number");
    refuse("--offload-experts", "", "auto or a number");
    refuse("--workers", "2", "go together");
    refuse("--workers", "16", "between 1 and 15");
    refuse("--worker-listen", "tcp://127.0.0.1:1", "go together");
    refuse("--launched", "tcp://127.0.0.1:1", "no launcher");
    assert_int_equal(parse(&c, &e, "--model=m", "--worker=a", "--worker-listen=b"), ST_INVALID);
    assert_non_null(strstr(e.text, "--worker"));
    refuse("--block-tokens", "24", "power of two");
    refuse("--gpu-memory-utilization", "1.5", "between 0.05 and 1");
    refuse("--gpu-memory-utilization", "nan", "between 0.05 and 1");
    refuse("--log-level", "loud", "--log-level loud");
    assert_int_equal(parse(&c, &e, "--max-seqs", "3", NULL), ST_INVALID);
    assert_string_equal(e.text, "--model is missing; see --help");
    char longer[400];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    refuse("--listen", longer, "--listen");
}

static void test_actions(void **state) {
    (void)state;
    struct config c;
    struct error e;
    assert_int_equal(parse(&c, &e, "--help", NULL, NULL), ST_OK);
    assert_int_equal(c.action, CONFIG_HELP);
    assert_int_equal(parse(&c, &e, "--version", NULL, NULL), ST_OK);
    assert_int_equal(c.action, CONFIG_VERSION);
    assert_int_equal(parse(&c, &e, "--model=m", "--check", NULL), ST_OK);
    assert_int_equal(c.action, CONFIG_CHECK);
    assert_int_equal(parse(&c, &e, "--model=m", "--device", "cuda:3"), ST_OK);
    assert_string_equal(c.devices.names[0], "cuda:3");
    assert_int_equal(parse(&c, &e, "--model=m", "--device", "cuda:0,cuda:12"), ST_OK);
    assert_int_equal(c.devices.n, 2);
    assert_string_equal(c.devices.names[1], "cuda:12");
    assert_int_equal(parse(&c, &e, "--model=m", "--log-level", "warn"), ST_OK);
    assert_int_equal(c.log_level, LOG_WARN);
    /* Every flag is in the help. */
    static const char *const flags[] = {"--model",
                                        "--listen",
                                        "--device",
                                        "--parallel",
                                        "--experts-per-device",
                                        "--expert-load",
                                        "--offload-experts",
                                        "--workers",
                                        "--worker-listen",
                                        "--worker ",
                                        "--launched",
                                        "--threads",
                                        "--cpu-isa",
                                        "--chat-template",
                                        "--max-seqs",
                                        "--max-seq-tokens",
                                        "--max-batch-tokens",
                                        "--prefill-chunk",
                                        "--max-itl-ms",
                                        "--kv-blocks",
                                        "--block-tokens",
                                        "--gpu-memory-utilization",
                                        "--max-queue",
                                        "--max-queued-tokens",
                                        "--drain-seconds",
                                        "--log-level",
                                        "--check",
                                        "--version",
                                        "--help"};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (!strstr(config_help[0], flags[i]) && !strstr(config_help[1], flags[i]))
            fail_msg("%s is not in the help", flags[i]);
}

static void test_workers(void **state) {
    (void)state;
    struct config c;
    struct error e;
    char *argv[] = {"moed", "--model=m", "--workers=15", "--worker-listen=tcp://h:1",
                    "--device=cpu,cpu"};
    assert_int_equal(config_parse(4, argv, &e, &c), ST_OK);
    assert_int_equal(c.action, CONFIG_SERVE);
    assert_int_equal(c.n_workers, 15);
    assert_string_equal(c.workers_at, "tcp://h:1");
    assert_int_equal(config_parse(5, argv, &e, &c), ST_INVALID);
    assert_non_null(strstr(e.text, "at most 16"));
    assert_int_equal(parse(&c, &e, "--model=m", "--worker=tcp://h:1", NULL), ST_OK);
    assert_int_equal(c.action, CONFIG_WORK);
    assert_int_equal(c.launched_rank, -1);
    assert_string_equal(c.server, "tcp://h:1");
    assert_int_equal(parse(&c, &e, "--model=m", "--worker=tcp://h:1", "--check"), ST_OK);
    assert_int_equal(c.action, CONFIG_CHECK);
}

static void set_launcher(const char *const names[3], const char *rank, const char *size,
                         const char *local) {
    const char *const values[] = {rank, size, local};
    for (int i = 0; i < 3; i++) {
        if (values[i])
            setenv(names[i], values[i], 1);
        else
            unsetenv(names[i]);
    }
}

static void test_launched(void **state) {
    (void)state;
    static const char *const mpi[] = {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                                      "OMPI_COMM_WORLD_LOCAL_RANK"},
                             *const pmi[] = {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
                             *const slurm[] = {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"};
    struct config c;
    struct error e;
    /* mpirun inside an allocation of Slurm: its word counts. */
    set_launcher(slurm, "0", "1", "0");
    set_launcher(mpi, "5", "8", "1");
    assert_int_equal(parse(&c, &e, "--model=m", "--launched=tcp://h:1", "--device=cuda"), ST_OK);
    assert_int_equal(c.action, CONFIG_WORK);
    assert_int_equal(c.launched_rank, 5);
    assert_string_equal(c.devices.names[0], "cuda:1");
    assert_null(c.workers_at);
    set_launcher(mpi, "0", "3", "0");
    assert_int_equal(parse(&c, &e, "--model=m", "--launched=tcp://h:1", "--device=cpu,cpu"), ST_OK);
    assert_int_equal(c.action, CONFIG_SERVE);
    assert_int_equal(c.n_workers, 4);
    assert_string_equal(c.workers_at, "tcp://h:1");
    assert_null(c.server);
    set_launcher(mpi, NULL, NULL, NULL);
    assert_int_equal(parse(&c, &e, "--model=m", "--launched=tcp://h:1", NULL), ST_OK); /* alone */
    assert_int_equal(c.action, CONFIG_SERVE);
    assert_null(c.workers_at);
    set_launcher(slurm, NULL, NULL, NULL);
    set_launcher(pmi, "2", "4", "0");
    assert_int_equal(parse(&c, &e, "--model=m", "--launched=tcp://h:1", "--device=cuda:3"), ST_OK);
    assert_int_equal(c.launched_rank, 2);
    assert_string_equal(c.devices.names[0], "cuda:3");
    static const char *const bad[][3] = {{"4", "4", "0"},  {"x", "4", "0"}, {"-1", "4", "0"},
                                         {"1", NULL, "0"}, {"1", "4", "2"}, {"", "4", "0"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        set_launcher(pmi, bad[i][0], bad[i][1], bad[i][2]);
        refuse("--launched", "tcp://h:1", "no launcher");
    }
    set_launcher(pmi, "0", "17", "0");
    refuse("--launched", "tcp://h:1", "at most 16");
    set_launcher(pmi, "0", "2", "0");
    assert_int_equal(parse(&c, &e, "--model=m", "--launched=a", "--workers=2"), ST_INVALID);
    set_launcher(pmi, NULL, NULL, NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults), cmocka_unit_test(test_endpoint_rule),
        cmocka_unit_test(test_ranges),   cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_actions),  cmocka_unit_test(test_workers),
        cmocka_unit_test(test_launched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
