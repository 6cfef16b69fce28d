/* cpu_attention: query rows against one split of a sequence's keys and values, with a running softmax,
 * for both instruction sets. Included by the kernel files only.
 *
 * Scores: a lane is a position, and a row's score is one chain of fused multiply-adds over the head. Values:
 * a lane is a column of the head, and a row's sum is one chain over positions. So no row's arithmetic
 * depends on which rows share its pass. Lanes of positions that are not covered may hold anything, NaN
 * included: they are replaced before anything is drawn from them. */
#ifndef MOED_MOE_CPU_ATTENTION_H
#define MOED_MOE_CPU_ATTENTION_H

#include "moe/cpu_kernels.h"
#include "moe/cpu_simd.h"

/* scores[r][p] of rows first … first + n - 1, `wide` groups of positions in one pass. Meanwhile the next
 * split's keys are prefetched: a group is a page or less, too short for the hardware to run ahead in. */
CPU_INLINE void attend_scores(const struct cpu_attend *a, int first, int n, int wide,
                              float scores[][CPU_SPLIT]) {
    const int n_groups = (a->n_pos + CPU_POS - 1) / CPU_POS;
    for (int g = 0; g < n_groups; g += wide) {
        const uint16_t *k[4], *next[4];
        vf acc[16];
        CPU_UNROLL
        for (int j = 0; j < wide; j++) {
            int group = g + j < n_groups ? g + j : n_groups - 1;
            k[j] = a->k[group];
            next[j] = a->next_k[group] ? a->next_k[group] : k[j];
        }
        CPU_UNROLL
        for (int i = 0; i < n * wide; i++) acc[i] = vf_zero();
        for (int32_t d = 0; d < a->head_dim; d += 2) { /* two columns of a group: a cache line */
            CPU_UNROLL
            for (int j = 0; j < wide; j++) {
                const uint16_t *key = k[j] + (size_t)d * CPU_POS;
                vf key0 = vf_from_f16(key), key1 = vf_from_f16(key + CPU_POS);
                _mm_prefetch((const char *)(next[j] + (size_t)d * CPU_POS), _MM_HINT_T1);
                CPU_UNROLL
                for (int r = 0; r < n; r++) {
                    vf s = vf_fma(key0, vf_set1(a->q[first + r][d]), acc[j * n + r]);
                    acc[j * n + r] = vf_fma(key1, vf_set1(a->q[first + r][d + 1]), s);
                }
            }
        }
        CPU_UNROLL
        for (int j = 0; j < wide; j++) {
            if (g + j >= n_groups) break;
            int32_t at = (g + j) * CPU_POS, left = a->n_pos - at;
            CPU_UNROLL
            for (int r = 0; r < n; r++) {
                vf s = vf_mul(acc[j * n + r], vf_set1(a->scale));
                if (left < CPU_POS) s = vf_first(s, vf_set1(-INFINITY), left);
                vf_store(scores[r] + at, s);
            }
        }
    }
}

/* Scores to p = exp(score - max) in place; returns what the row's sums so far must be multiplied by. */
CPU_INLINE float attend_softmax(const struct cpu_attend *a, int row, float *scores) {
    const int n_groups = (a->n_pos + CPU_POS - 1) / CPU_POS;
    vf top = vf_set1(*a->max[row]);
    for (int g = 0; g < n_groups; g++) top = vf_max(top, vf_load(scores + g * CPU_POS));
    float max = vf_max_lane(top);
    vf m = vf_set1(max), sum = vf_zero();
    for (int g = 0; g < n_groups; g++) {
        vf p = vf_exp(vf_sub(vf_load(scores + g * CPU_POS), m));
        vf_store(scores + g * CPU_POS, p);
        sum = vf_add(sum, p);
    }
    float lanes[16];
    vf_store(lanes, vf_exp(vf_set1(*a->max[row] - max)));
    *a->sum[row] = *a->sum[row] * lanes[0] + vf_sum(sum);
    *a->max[row] = max;
    return lanes[0];
}

/* Of each row: the scores and then p of a split, and what the row's sums so far must be multiplied by. */
struct attend_work {
    float p[CPU_QROWS][CPU_SPLIT], scale[CPU_QROWS];
};

/* out[r] = out[r] * scale[r] + sum over positions of p * v, `wide` vectors of columns in one pass, and the next
 * split's values prefetched. */
CPU_INLINE void attend_values(const struct cpu_attend *a, int first, int n, int wide,
                              int32_t column, const struct attend_work *s) {
    vf acc[16];
    CPU_UNROLL
    for (int r = 0; r < n; r++) {
        CPU_UNROLL
        for (int c = 0; c < wide; c++)
            acc[r * wide + c] =
                vf_mul(vf_load(a->out[first + r] + column + 16 * c), vf_set1(s->scale[r]));
    }
    const int32_t width = (a->head_dim + 15) / 16 * 16;
    for (int32_t at = 0; at < a->n_pos; at += CPU_POS) {
        const uint16_t *value = a->v[at / CPU_POS] + column;
        const uint16_t *next = a->next_v[at / CPU_POS] ? a->next_v[at / CPU_POS] + column : value;
        int32_t end = a->n_pos - at < CPU_POS ? a->n_pos : at + CPU_POS;
        for (int32_t p = at; p < end; p++, value += width, next += width) {
            vf v[8];
            CPU_UNROLL
            for (int c = 0; c < wide; c += 2) /* two vectors are a cache line */
                _mm_prefetch((const char *)(next + 16 * c), _MM_HINT_T1);
            CPU_UNROLL
            for (int c = 0; c < wide; c++) v[c] = vf_from_f16(value + 16 * c);
            CPU_UNROLL
            for (int r = 0; r < n; r++) {
                vf weight = vf_set1(s->p[r][p]);
                CPU_UNROLL
                for (int c = 0; c < wide; c++)
                    acc[r * wide + c] = vf_fma(v[c], weight, acc[r * wide + c]);
            }
        }
    }
    CPU_UNROLL
    for (int r = 0; r < n; r++) {
        CPU_UNROLL
        for (int c = 0; c < wide; c++)
            vf_store(a->out[first + r] + column + 16 * c, acc[r * wide + c]);
    }
}

CPU_INLINE void attend_rows(const struct cpu_attend *a, int first, int n, int groups, int columns) {
    struct attend_work s;
    attend_scores(a, first, n, groups, s.p);
    for (int r = 0; r < n; r++) s.scale[r] = attend_softmax(a, first + r, s.p[r]);
    int32_t column = 0;
    for (; column + 16 * columns <= a->head_dim; column += 16 * columns)
        attend_values(a, first, n, columns, column, &s);
    for (; column < a->head_dim; column += 16) attend_values(a, first, n, 1, column, &s);
}

static void k_attend(const struct cpu_attend *a) {
    int r = 0;
    for (; a->n_rows - r >= 8; r += 8) attend_rows(a, r, 8, 2, 2);
    for (; a->n_rows - r >= 4; r += 4) attend_rows(a, r, 4, 2, 4);
    for (; a->n_rows - r >= 2; r += 2) attend_rows(a, r, 2, 4, 8);
    for (; r < a->n_rows; r++) attend_rows(a, r, 1, 4, 8);
}

#endif
