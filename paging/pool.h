/* pool: the inside of paging, for paging.c and its unit test (which breaks it to see paging_check
 * notice). */
#ifndef MOED_PAGING_POOL_H
#define MOED_PAGING_POOL_H

#include "paging/paging.h"

struct paging {
    struct paging_limits limits;
    int32_t *free_blocks; /* [n_blocks]: a stack, of which the first n_free are free */
    int32_t n_free;
    int32_t *tables; /* [n_slots][max_blocks_per_seq] */
    int32_t *n_table; /* [n_slots]: blocks in each table */
    int32_t *n_tokens; /* [n_slots]: positions reserved */
    uint8_t *seen; /* [n_blocks]: paging_check's own */
    int32_t peak_held;
    uint64_t n_reserved, n_released, n_refused;
};

#endif
