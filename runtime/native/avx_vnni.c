/* AVX-VNNI: one instruction for what AVX2 takes three to do. */
#include "nbits.h"
#ifdef NBITS_AVX_VNNI
#define AVX_VNNI
#include "avx2.c"
#endif
