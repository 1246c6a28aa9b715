/* Attention of new tokens over a cache of keys and values: what the operator and the instruction sets share.
 *
 * The heads of a group read the same keys and values, so the rows that are worked on together are all of a group's
 * heads at some tokens: row token × heads + head.
 */
#pragma once

#include <stdint.h>

enum {
    KEY_BLOCK = 64,     /* keys that are looked at together */
    MOST_QUERIES = 96,  /* rows that are worked on together */
    MOST_HEAD_DIM = 128,
    HEAD_DIM_UNIT = 16, /* a head's numbers are a multiple of it */
};

typedef struct {
    const float *q, *k, *v;     /* of the new tokens, [batch, count, …], each token so far behind the last: */
    int64_t q_stride, k_stride, v_stride;
    const float *cosine, *sine; /* [batch, count, dim / 2] */
    const int32_t *last;        /* [batch]: where a row's last new token is in the cache */
    float *keys, *values;       /* [batch, groups, capacity, dim] */
    float *packed;              /* [batch, groups, blocks, dim, KEY_BLOCK], or NULL: keys are read where they lie */
    float *out;                 /* [batch, count, groups × heads × dim] */
    int64_t batch, count, groups, heads, capacity, blocks, dim;
    float scale;                /* of the scores, which are to base 2 */
} CausalAttention;

/* Tokens [first, first + count) of those that are new in one row of the batch, and one group's heads. */
typedef struct {
    int64_t row, group, first, count;
} QueryBlock;

static inline int64_t first_new(const CausalAttention *a, int64_t row) {
    return (int64_t)a->last[row] + 1 - a->count;
}
/* Of one task's partial result: the largest score, the sum of weights, and the weighted sum of values of every row. */
static inline int64_t partial_size(const CausalAttention *a, int64_t rows) { return rows * (2 + a->dim); }

typedef struct {
    /* New tokens [first, last) of a row of the batch into the cache, their keys rotated. */
    void (*write)(const CausalAttention *a, int64_t row, int64_t first, int64_t last);
    /* A block of KEY_BLOCK keys of the cache into its place among a->packed. */
    void (*pack)(const CausalAttention *a, int64_t row, int64_t group, int64_t block);
    /* Keys [first, last) as some tokens see them, first being a multiple of KEY_BLOCK; into `partial`, of partial_size,
     * or NULL: these are all keys, and the output is written. */
    void (*attend)(const CausalAttention *a, const QueryBlock *queries, int64_t first, int64_t last, float *partial);
    /* The output from the partial results of all keys, each `size` numbers behind the last. */
    void (*join)(const CausalAttention *a, const QueryBlock *queries, const float *partials, int64_t parts,
                 int64_t size);
} CausalKernels;
