/* Which kernels there are, and which of them this processor has instructions for. */
#include "nbits.h"

#include <stddef.h>

const Kernels *const all_kernels[] = { /* best first */
#ifdef NBITS_X86
    &nbits_avx512,
#ifdef NBITS_AVX_VNNI
    &nbits_avx_vnni,
#endif
    &nbits_avx2,
#endif
#ifdef NBITS_NEON
    &nbits_neon,
#endif
    NULL,
};

const Kernels *usable_kernels(void) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if ((*k)->supported()) return *k;
    return NULL;
}
