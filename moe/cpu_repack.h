/* cpu_repack: matrices in the layout that the CPU kernels read (cpu_kernels.h), made from GGUF rows a row
 * tile at a time and readable back row by row, bit for bit what quant.h's dequantize gives. Pure
 * functions. Private to the CPU backend and its tests. */
#ifndef MOED_MOE_CPU_REPACK_H
#define MOED_MOE_CPU_REPACK_H

#include "moe/cpu_kernels.h"

struct cpu_matrix {
    enum cpu_format format;
    enum tensor_type type;
    int32_t n_experts, n_rows, n_cols;
    int32_t n_tiles; /* row tiles per expert: n_rows / 16, rounded up; rows beyond are zero */
    int32_t n_units; /* units per row tile */
    size_t row_bytes; /* of a GGUF row */
    size_t tile_bytes, n_bytes;
    uint8_t *p; /* [n_experts][n_tiles][tile_bytes]; the caller's */
};

/* Fill in everything but p. False: a type we do not have, rows that are not whole blocks, overflow. */
bool cpu_matrix_plan(enum tensor_type type, int32_t n_experts, int32_t n_rows, int32_t n_cols,
                     struct cpu_matrix *out);
static inline bool cpu_matrix_quantized(const struct cpu_matrix *m) {
    return m->format < CPU_N_QUANTS;
}
static inline uint8_t *cpu_matrix_tile(const struct cpu_matrix *m, int32_t expert, int32_t tile) {
    return m->p + ((size_t)expert * (size_t)m->n_tiles + (size_t)tile) * m->tile_bytes;
}
/* Write one row tile from its n_rows (1 … 16) GGUF rows, one after the other. */
void cpu_repack_tile(const struct cpu_matrix *m, const uint8_t *rows, int n_rows, uint8_t *tile);
/* Row of an expert's matrix, dequantised: n_cols values. */
void cpu_matrix_row(const struct cpu_matrix *m, int32_t expert, int32_t row, float *dst);

#endif
