/* batch_files: a batch's input and output. See batch.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clients/cli/batch.h"

enum {
    MAX_COMPLAINTS = 20,
    MAX_LINE_BYTES = 8 * WIRE_MAX_BODY_BYTES, /* escapes make JSON longer than what it says */
    MAX_CUSTOM_ID_BYTES = 512,
    SYNC_MS = 500
};

/* ---- one line -------------------------------------------------------------------------------- */

static enum status read_request(json_t *root, struct error *e, struct body *body) {
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) {
        if (strcmp(key, "custom_id") && strcmp(key, "method") && strcmp(key, "url") &&
            strcmp(key, "body"))
            return error_set(e, ST_UNSUPPORTED, "%.80s is not a field of a batch line", key);
    }
    const char *method = json_string_value(json_object_get(root, "method"));
    const char *url = json_string_value(json_object_get(root, "url"));
    if (method && strcmp(method, "POST") != 0)
        return error_set(e, ST_UNSUPPORTED, "method must be POST");
    if (!url) return error_set(e, ST_INVALID, "url is missing");
    bool chat = strcmp(url, "/v1/chat/completions") == 0;
    if (!chat && strcmp(url, "/v1/completions") != 0)
        return error_set(e, ST_UNSUPPORTED,
                         "url must be /v1/chat/completions or /v1/completions, not %.80s", url);
    return body_read(json_object_get(root, "body"), chat, e, body);
}

/* Parse a line. NULL, or what is wrong with the line itself. */
static const char *parse_line(const char *s, size_t n, char *dst, size_t cap,
                              struct batch_request *out) {
    json_error_t je;
    *out = (struct batch_request){
        .root = json_loadb(s, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je)};
    if (!out->root) {
        snprintf(dst, cap, "not JSON: %s (column %d)", je.text, je.column);
        return dst;
    }
    const json_t *id = json_object_get(out->root, "custom_id");
    size_t len = json_string_length(id);
    out->custom_id = json_string_value(id);
    if (out->custom_id && len > 0 && len <= MAX_CUSTOM_ID_BYTES && strlen(out->custom_id) == len)
        return NULL;
    json_decref(out->root);
    out->root = NULL;
    snprintf(dst, cap, "needs a \"custom_id\": a string of 1 to %d bytes", MAX_CUSTOM_ID_BYTES);
    return dst;
}

void batch_request_free(struct batch_request *r) {
    if (r->root && r->error.code == ST_OK) body_free(&r->body);
    json_decref(r->root);
    *r = (struct batch_request){0};
}

/* ---- input ----------------------------------------------------------------------------------- */

static const char *add_line(struct batch_input *in, const char *s, size_t n, uint64_t offset,
                            char *dst, size_t cap) {
    struct batch_request r;
    const char *problem = parse_line(s, n, dst, cap, &r);
    if (problem) return problem;
    if (json_object_get(in->index, r.custom_id)) {
        snprintf(dst, cap, "custom_id \"%.100s\" was used before", r.custom_id);
        problem = dst;
    } else if (in->n_lines == in->cap_lines) {
        size_t want = in->cap_lines ? in->cap_lines * 2 : 1024;
        struct batch_line *lines = realloc(in->lines, want * sizeof *lines);
        if (lines) {
            in->lines = lines;
            in->cap_lines = want;
        } else {
            problem = "no memory";
        }
    }
    if (!problem) {
        json_object_set_new(in->index, r.custom_id, json_integer((json_int_t)in->n_lines));
        in->lines[in->n_lines++] = (struct batch_line){.offset = offset, .n_bytes = n};
    }
    json_decref(r.root);
    return problem;
}

static bool is_blank(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!strchr(" \t\r\n", s[i]) || s[i] == 0) return false;
    return true;
}

static int read_lines(struct batch_input *in, FILE *f) {
    char *line = NULL, text[512];
    size_t cap = 0;
    uint64_t offset = 0;
    int complaints = 0, number = 0;
    for (ssize_t got; (got = getline(&line, &cap, f)) > 0; offset += (uint64_t)got) {
        number++;
        size_t n = (size_t)got;
        if (is_blank(line, n)) continue;
        const char *problem = "too long for one request";
        if (n <= MAX_LINE_BYTES) problem = add_line(in, line, n, offset, text, sizeof text);
        if (problem && ++complaints <= MAX_COMPLAINTS)
            fprintf(stderr, "moed-cli batch: %s:%d: %s\n", in->path, number, problem);
    }
    free(line);
    if (ferror(f)) {
        fprintf(stderr, "moed-cli batch: %s: %s\n", in->path, strerror(errno));
        complaints++;
    }
    if (complaints > MAX_COMPLAINTS)
        fprintf(stderr, "moed-cli batch: and %d more\n", complaints - MAX_COMPLAINTS);
    return complaints;
}

bool batch_input_open(const char *path, struct batch_input *out) {
    *out = (struct batch_input){.path = path, .fd = -1, .index = json_object()};
    FILE *f = fopen(path, "rbe");
    struct stat s;
    if (!f || fstat(fileno(f), &s) != 0) {
        fprintf(stderr, "moed-cli batch: %s: %s\n", path, strerror(errno));
        if (f) fclose(f);
        batch_input_close(out);
        return false;
    }
    int complaints = 1;
    if (!S_ISREG(s.st_mode))
        fprintf(stderr, "moed-cli batch: %s is not a file: it is read more than once\n", path);
    else
        complaints = read_lines(out, f);
    if (complaints == 0) out->fd = dup(fileno(f));
    fclose(f);
    if (complaints > 0) {
        fprintf(stderr, "moed-cli batch: nothing was sent\n");
        batch_input_close(out);
        return false;
    }
    return true;
}

void batch_input_close(struct batch_input *in) {
    if (in->fd >= 0) close(in->fd);
    free(in->lines);
    json_decref(in->index);
    *in = (struct batch_input){.fd = -1};
}

bool batch_input_read(const struct batch_input *in, size_t i, struct batch_request *out) {
    const struct batch_line *l = &in->lines[i];
    char *s = malloc(l->n_bytes + 1), text[512];
    const char *problem = "no memory";
    if (s) {
        problem = "it has changed";
        if (pread(in->fd, s, l->n_bytes, (off_t)l->offset) == (ssize_t)l->n_bytes)
            problem = parse_line(s, l->n_bytes, text, sizeof text, out);
    }
    free(s);
    if (!problem) {
        json_t *pos = json_object_get(in->index, out->custom_id);
        if (pos && json_integer_value(pos) == (json_int_t)i) {
            if (read_request(out->root, &out->error, &out->body) == ST_OK) out->error.code = ST_OK;
            return true;
        }
        json_decref(out->root);
        problem = "it has changed";
    }
    fprintf(stderr, "moed-cli batch: %s cannot be read again: %s\n", in->path, problem);
    return false;
}

/* ---- output ---------------------------------------------------------------------------------- */

/* What an output line says of itself: its custom_id's position in the input; -1: it is no
 * result; -2: it is one of another batch. */
static json_int_t recognise(const struct batch_input *in, const char *s, size_t n, bool *failed) {
    json_t *root = json_loadb(s, n, JSON_ALLOW_NUL, NULL);
    const json_t *id = json_object_get(root, "custom_id");
    const json_t *pos =
        json_is_string(id) ? json_object_get(in->index, json_string_value(id)) : NULL;
    json_int_t i = pos ? json_integer_value(pos) : json_is_string(id) ? -2 : -1;
    const json_t *error = json_object_get(root, "error");
    *failed = error && !json_is_null(error);
    json_decref(root);
    return i;
}

/* What a crash can leave of a line of ours: a beginning of it, or, when the machine went down, a
 * hole. Anything else at the end is somebody's file, which we do not cut. */
static bool is_torn(const char *s, size_t n) {
    static const char begin[] = "{\"id\":\"batch_req_";
    size_t len = n < sizeof begin - 1 ? n : sizeof begin - 1;
    if (memcmp(s, begin, len) == 0) return true;
    for (size_t i = 0; i < n; i++)
        if (s[i] != 0 && s[i] != '\n') return false;
    return true;
}

static bool complain_line(const struct batch_output *out, size_t number, const char *problem) {
    fprintf(
        stderr,
        "moed-cli batch: %s:%zu %s: name another output, or move this one away. Nothing was sent\n",
        out->path, number, problem);
    return false;
}

/* Mark what is done. *keep: the length up to the last whole result. */
static bool read_results(struct batch_output *out, struct batch_input *in, FILE *f,
                         uint64_t *keep) {
    char *line = NULL;
    size_t cap = 0, number = 0, bad = 0;
    bool good = true;
    *keep = 0;
    uint64_t offset = 0;
    for (ssize_t got; good && (got = getline(&line, &cap, f)) > 0; offset += (uint64_t)got) {
        number++;
        bool failed = false, whole = line[got - 1] == '\n';
        /* Only the last line can be torn: a bad one that is followed by another is not ours. */
        if (bad > 0) good = complain_line(out, bad, "is not a batch result");
        if (!good) continue;
        json_int_t i = whole ? recognise(in, line, (size_t)got, &failed) : -1;
        if (i == -2 || (i == -1 && !is_torn(line, (size_t)got))) {
            good = complain_line(
                out, number, i == -2 ? "is a result of another batch" : "is not a batch result");
            continue;
        }
        if (i < 0) {
            bad = number;
            continue;
        }
        if (in->lines[i].state == LINE_DONE) {
            good = complain_line(out, number, "repeats a custom_id");
            continue;
        }
        in->lines[i].state = LINE_DONE;
        out->n_done++;
        out->n_failed += failed;
        *keep = offset + (uint64_t)got;
    }
    free(line);
    return good;
}

static bool complain_errno(const struct batch_output *out) {
    fprintf(stderr, "moed-cli batch: %s: %s\n", out->path, strerror(errno));
    return false;
}

bool batch_output_open(const char *path, struct batch_input *in, struct batch_output *out) {
    *out = (struct batch_output){.path = path,
                                 .fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666)};
    if (out->fd < 0) return complain_errno(out);
    struct stat a, b;
    bool good = fstat(out->fd, &a) == 0 && fstat(in->fd, &b) == 0;
    if (!good) complain_errno(out);
    if (good && !S_ISREG(a.st_mode)) {
        fprintf(stderr, "moed-cli batch: %s is not a file: what was done could not be read back\n",
                path);
        good = false;
    }
    if (good && a.st_dev == b.st_dev && a.st_ino == b.st_ino) {
        fprintf(stderr, "moed-cli batch: input and output are the same file\n");
        good = false;
    }
    if (good && flock(out->fd, LOCK_EX | LOCK_NB) != 0) {
        fprintf(stderr, "moed-cli batch: %s is being written by another moed-cli\n", path);
        good = false;
    }
    int fd = good ? dup(out->fd) : -1;
    FILE *f = fd >= 0 ? fdopen(fd, "rb") : NULL;
    uint64_t keep = 0;
    good = good && f && read_results(out, in, f, &keep);
    if (f) fclose(f);
    if (good && keep < (uint64_t)a.st_size) {
        fprintf(stderr, "moed-cli batch: %s ends in a torn line: cut off, to be answered again\n",
                path);
        good = ftruncate(out->fd, (off_t)keep) == 0 || complain_errno(out);
    }
    if (!good) batch_output_close(out);
    return good;
}

bool batch_output_write(struct batch_output *out, const json_t *result) {
    char *s = json_dumps(result, JSON_COMPACT | JSON_PRESERVE_ORDER);
    size_t n = s ? strlen(s) : 0, done = 0;
    if (!s) errno = ENOMEM;
    bool good = s != NULL;
    if (s) s[n++] = '\n'; /* over the NUL: one write of the whole line */
    while (good && done < n) {
        ssize_t w = write(out->fd, s + done, n - done);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0)
            good = false;
        else
            done += (size_t)w;
    }
    if (!good) complain_errno(out);
    free(s);
    if (good) {
        out->n_done++;
        out->unsynced++;
    }
    return good;
}

bool batch_output_sync(struct batch_output *out, bool now) {
    uint64_t t = clock_now_ns();
    if (out->unsynced == 0 || (!now && t - out->synced_ns < (uint64_t)SYNC_MS * 1000000u))
        return true;
    out->unsynced = 0;
    out->synced_ns = t;
    return fdatasync(out->fd) == 0 || complain_errno(out);
}

void batch_output_close(struct batch_output *out) {
    if (out->fd >= 0) close(out->fd);
    out->fd = -1;
}
