/* Which kernels there are, and which of them this processor has instructions for. */
#include "int8.h"
#include "nbits.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

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

const Int8Kernels *const all_int8_kernels[] = {
#ifdef NBITS_X86
    &int8_avx512,
#ifdef NBITS_AVX_VNNI
    &int8_avx_vnni,
#endif
    &int8_avx2,
#endif
#ifdef NBITS_NEON
    &int8_neon,
#endif
    NULL,
};

/* The environment may name the only ones to use, as runtime/native_kernels.py says. */
static int may_be_used(const char *name) {
    const char *only = getenv("EDGEVL_KERNELS");
    return only == NULL || *only == 0 || strcmp(only, "on") == 0 || strcmp(only, name) == 0;
}

const Kernels *usable_kernels(void) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (may_be_used((*k)->name) && (*k)->supported()) return *k;
    return NULL;
}

const Int8Kernels *usable_int8_kernels(void) {
    for (const Int8Kernels *const *k = all_int8_kernels; *k != NULL; k++)
        if (may_be_used((*k)->name) && (*k)->supported()) return *k;
    return NULL;
}
