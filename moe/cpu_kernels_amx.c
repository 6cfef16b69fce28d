/* See cpu_kernels.h: the table for AMX. */
#include "moe/cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "moe/cpu_dot_amx.h"

static struct cpu_kernels kernels; /* written once */
static bool available;

static bool has_amx(void) {
    unsigned a, b, c, d;
    const unsigned tiles = 1u << 24 | 1u << 25; /* AMX-TILE, -INT8 */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles) == tiles;
}

/* Linux hands out the tile registers on request, for the whole process. Kernels before 5.16 refuse. */
static bool ask_for_tiles(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static void fill_table(void) {
    const struct cpu_kernels *avx512 = cpu_kernels_avx512();
    if (!avx512 || !has_amx() || !ask_for_tiles()) return;
    amx_table(&kernels, avx512);
    kernels.name = "amx-int8";
    available = true;
}
#endif

const struct cpu_kernels *cpu_kernels_amx(void) {
#if defined(__x86_64__)
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    if (available) return &kernels;
#endif
    return NULL;
}
