/* batch: the parts of moed-cli batch. Input and output files here, running in batch.c, result lines
 * in batch_result.c.
 *
 * Promise: every custom_id of the input comes to stand in the output exactly once, however
 * often the program is killed and started again. The output is the only record: a line counts
 * when its newline was written, one that was torn is cut off and answered again. Single thread;
 * one process per output file (it is locked). */
#ifndef MOED_CLIENTS_CLI_BATCH_H
#define MOED_CLIENTS_CLI_BATCH_H

#include <jansson.h>

#include "clients/common/answer.h"
#include "clients/common/body.h"
#include "clients/lib/client.h"

/* ---- batch_files.c --------------------------------------------------------------------------- */

enum line_state { LINE_TODO, LINE_DONE };

struct batch_line {
    uint64_t offset;
    size_t n_bytes;
    enum line_state state;
};

struct batch_input {
    const char *path; /* borrowed */
    int fd;
    struct batch_line *lines;
    size_t n_lines, cap_lines;
    json_t *index; /* custom_id -> position in lines */
};

/* One line of the input, read again. */
struct batch_request {
    json_t *root;
    const char *custom_id; /* owned by root */
    struct error error; /* ST_OK: body is valid; else why the line cannot be served */
    struct body body;
};

/* Read and check the whole file. False after complaints on stderr: it cannot be read, a line is
 * not JSON or has no custom_id of its own. A line whose request cannot be served is no such
 * case: it gets an error line. */
bool batch_input_open(const char *path, struct batch_input *out);
void batch_input_close(struct batch_input *in);
/* Read line i. False: the file is not what it was; a complaint was printed. */
bool batch_input_read(const struct batch_input *in, size_t i, struct batch_request *out);
void batch_request_free(struct batch_request *r);

struct batch_output {
    const char *path; /* borrowed */
    int fd;
    uint64_t unsynced; /* lines written since the last sync */
    uint64_t synced_ns;
    size_t n_done, n_failed; /* lines in it, and those that tell of an error */
};

/* Open or create, lock, cut off a torn last line, and mark in `in` what is there already. False
 * after a complaint: it holds lines that are no results, or results of another input. */
bool batch_output_open(const char *path, struct batch_input *in, struct batch_output *out);
/* Append one line, at once and whole. False after a complaint. */
bool batch_output_write(struct batch_output *out, const json_t *result);
/* To the disk: now, or if it was not done lately. False after a complaint. */
bool batch_output_sync(struct batch_output *out, bool now);
void batch_output_close(struct batch_output *out);

/* ---- batch_result.c -------------------------------------------------------------------------- */

/* Token texts, asked of the daemon once per id. */
struct token_names {
    char **names; /* JSON-escaped with quotes; NULL = not asked yet */
    size_t n;
};
void token_names_free(struct token_names *t);

/* The output line for an answered request. Asks the daemon for token texts when
 * log-probabilities were asked for. NULL: no memory. */
json_t *batch_result(struct client *c, struct token_names *names, const struct batch_request *r,
                     const struct answer *a);
/* The output line for a request that was not served. */
json_t *batch_error(const char *custom_id, const struct error *e);

#endif
