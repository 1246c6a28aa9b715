/* For benchmarks: memory is read as the products read weights, so that what they reach has a true ceiling. */
#include "operator.h"

enum { AHEAD = 8192 / 8, LINE = 64 / 8 }; /* words; as in nbits_multiply.h */

/* The sum of `count` words, a multiple of 8. */
EXPORT uint64_t edgevl_read_memory(const uint64_t *from, int64_t count) {
    uint64_t sums[LINE] = {0}, sum = 0;
    for (int64_t i = 0; i < count; i += LINE) {
        __builtin_prefetch(from + i + AHEAD);
        for (int j = 0; j < LINE; j++) sums[j] += from[i + j];
    }
    for (int j = 0; j < LINE; j++) sum += sums[j];
    return sum;
}
