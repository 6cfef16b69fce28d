/* See progress.h. */
#include "clients/common/progress.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { DRAW_MS = 100, PLAIN_MS = 10000, BAR_CELLS = 24 };

void progress_start(struct progress *p, uint64_t total) {
    uint64_t now = clock_now_ns();
    *p = (struct progress){
        .tty = isatty(STDERR_FILENO), .start_ns = now, .last_ns = now, .total = total};
}

const char *format_seconds(double s, char *dst, size_t cap) {
    unsigned long t = s > 0 ? (unsigned long)(s + 0.5) : 0;
    if (t >= 3600)
        snprintf(dst, cap, "%lu:%02lu:%02lu", t / 3600, t / 60 % 60, t % 60);
    else
        snprintf(dst, cap, "%lu:%02lu", t / 60, t % 60);
    return dst;
}

/* "[####....] 12/100", or "12" when the total is not known. */
static void put_bar(const struct progress *p, const struct progress_now *now) {
    if (p->total == 0) {
        fprintf(stderr, "%llu done", (unsigned long long)now->done);
        return;
    }
    if (p->tty) {
        size_t filled = (size_t)(now->done * BAR_CELLS / p->total);
        char bar[BAR_CELLS + 1];
        memset(bar, '.', BAR_CELLS);
        memset(bar, '#', filled < BAR_CELLS ? filled : BAR_CELLS);
        bar[BAR_CELLS] = 0;
        fprintf(stderr, "[%s] ", bar);
    }
    fprintf(stderr, "%llu/%llu", (unsigned long long)now->done, (unsigned long long)p->total);
}

double progress_update(struct progress *p, const struct progress_now *now) {
    uint64_t t = clock_now_ns();
    double seconds = (double)(t - p->start_ns) / 1e9;
    if (t - p->last_ns < (uint64_t)(p->tty ? DRAW_MS : PLAIN_MS) * 1000000u) return seconds;
    p->last_ns = t;
    char eta[24];
    if (p->tty) fputs("\r", stderr);
    put_bar(p, now);
    fprintf(stderr, "  %llu running  %.0f tok/s", (unsigned long long)now->running,
            (double)now->tokens / seconds);
    if (p->total > 0 && now->done > 0 && now->done < p->total) {
        double left = seconds * (double)(p->total - now->done) / (double)now->done;
        fprintf(stderr, "  ETA %s", format_seconds(left, eta, sizeof eta));
    }
    if (now->failed > 0) fprintf(stderr, "  %llu failed", (unsigned long long)now->failed);
    fputs(p->tty ? "\033[K" : "\n", stderr);
    p->drawn = p->tty;
    return seconds;
}

void progress_clear(struct progress *p) {
    if (!p->drawn) return;
    fputs("\r\033[K", stderr);
    p->drawn = false;
    p->last_ns = 0;
}
