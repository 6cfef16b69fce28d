/* amx_emulated: the AMX kernels with the tiles' operations computed by AVX-512, so that machines without AMX test
 * them too: bit for bit what the processor's manual specifies. */
#ifndef MOED_TESTS_AMX_EMULATED_H
#define MOED_TESTS_AMX_EMULATED_H

#include "moe/cpu_kernels.h"

/* NULL if this processor lacks what the rest of these kernels needs: AVX-512 with VNNI. */
const struct cpu_kernels *amx_emulated(void);

/* In a program linked with --wrap=cpu_kernels_amx, where the processor has no AMX: these kernels stand in for it while
 * this is set. */
extern bool amx_emulate;

#endif
