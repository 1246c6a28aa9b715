/* Attention over a cache in float32, in terms of one instruction set's registers (LANES, Floats, splat, load_floats,
 * store_floats and sum_of_lanes, see nbits_multiply.h). Sums over blocks of keys are FlashAttention's (Dao 2022).
 */
#pragma once

#include "causal.h"
#include "nbits_common.h"
#include "rotate.h"

enum {
    SUM_ROWS = 6,                           /* of a tile of sums that stays in registers, and its width: */
    SUM_REGISTERS = LANES == 8 ? 2 : 4,
    SUM_WIDTH = SUM_REGISTERS * LANES,
    KEYS_AHEAD = 2048, /* numbers to fetch ahead, as far as of weights (nbits_multiply.h) */
};

typedef struct {
    float q[MOST_QUERIES][MOST_HEAD_DIM];
    float sums[MOST_QUERIES][MOST_HEAD_DIM];
    float largest[MOST_QUERIES], totals[MOST_QUERIES];
} Sums;

/* One head's row of q or k, rotated and multiplied. */
INLINE void rotate_head(const CausalAttention *a, int64_t token, const float *restrict x, float factor,
                        float *restrict out) {
    const int64_t half = a->dim / 2;
    rotate(x, a->cosine + token * half, a->sine + token * half, half, factor, out);
}

/* New tokens [first, last) of a row into the cache. */
static void write_tokens(const CausalAttention *a, int64_t row, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const int64_t token = row * a->count + i, place = first_new(a, row) + i;
        for (int64_t g = 0; g < a->groups; g++) {
            const int64_t to = ((row * a->groups + g) * a->capacity + place) * a->dim;
            rotate_head(a, token, a->k + token * a->k_stride + g * a->dim, 1, a->keys + to);
            memcpy(a->values + to, a->v + token * a->v_stride + g * a->dim, a->dim * sizeof(float));
        }
    }
}

/* A block of keys with the numbers of each a column; what is behind the last is not looked at. */
static void pack_keys(const CausalAttention *a, int64_t row, int64_t group, int64_t block) {
    const int64_t pair = row * a->groups + group, left = a->last[row] + 1 - block * KEY_BLOCK;
    const float *from = a->keys + (pair * a->capacity + block * KEY_BLOCK) * a->dim;
    float *to = a->packed + (pair * a->blocks + block) * KEY_BLOCK * a->dim;
    if (left < KEY_BLOCK) memset(to, 0, KEY_BLOCK * a->dim * sizeof(float));
    for (int64_t n = 0; n < (left < KEY_BLOCK ? left : KEY_BLOCK); n++)
        for (int64_t i = 0; i < a->dim; i++) to[i * KEY_BLOCK + n] = from[n * a->dim + i];
}

/* sums[r][.] = Σ a[r][k] × b[k][.], of `registers` registers */
INLINE void sum_tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t count, int rows,
                     int registers, Floats sums[SUM_ROWS][SUM_REGISTERS]) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < registers; v++) sums[r][v] = splat(0);
    for (int64_t k = 0; k < count; k++) {
        Floats line[SUM_REGISTERS];
        UNROLL for (int v = 0; v < registers; v++)
            line[v] = load_floats(b + k * b_stride + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const Floats factor = splat(a[r * a_stride + k]);
            UNROLL for (int v = 0; v < registers; v++)
                sums[r][v] = sums[r][v] + factor * line[v];
        }
    }
}

/* ----------------------------------------------------------------------------------------- scores of SUM_ROWS rows */

INLINE void score_packed(const float *q, const float *keys, int64_t dim, int rows, float scores[SUM_ROWS][KEY_BLOCK]) {
    Floats sums[SUM_ROWS][SUM_REGISTERS];
    for (int64_t n = 0; n < KEY_BLOCK; n += SUM_WIDTH) {
        sum_tile(q, MOST_HEAD_DIM, keys + n, KEY_BLOCK, dim, rows, SUM_REGISTERS, sums);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < SUM_REGISTERS; v++) store_floats(scores[r] + n + v * LANES, sums[r][v]);
    }
}

/* Keys as they lie, each read once; meanwhile the values come. */
INLINE void score_plain(const float *q, const float *keys, const float *values, int64_t dim, int64_t count, int rows,
                        float scores[SUM_ROWS][KEY_BLOCK]) {
    for (int64_t n = 0; n < count; n++) {
        const float *key = keys + n * dim;
        Floats sums[SUM_ROWS];
        UNROLL for (int r = 0; r < rows; r++)
            sums[r] = splat(0);
        for (int64_t i = 0; i < dim; i += LANES) {
            const Floats part = load_floats(key + i);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r] = sums[r] + part * load_floats(q + r * MOST_HEAD_DIM + i);
        }
        for (int64_t i = 0; i < dim; i += 16) {
            __builtin_prefetch(key + KEYS_AHEAD + i);
            __builtin_prefetch(values + n * dim + i);
        }
        UNROLL for (int r = 0; r < rows; r++)
            scores[r][n] = sum_of_lanes(sums[r]);
    }
}

/* ----------------------------------------------------------------------------------------------- weights and values */

/* Scores of the first `count` keys into weights below the largest score so far. What the sums before are still worth. */
INLINE float weigh(Sums *s, int64_t row, int64_t count, float *scores) {
    float top[LANES], sum = 0, largest = s->largest[row];
    if (count <= 0) {
        memset(scores, 0, KEY_BLOCK * sizeof(float));
        return 1;
    }
    for (int64_t n = count; n < KEY_BLOCK; n++) scores[n] = UNSEEN;
    memcpy(top, scores, sizeof top);
    for (int n = LANES; n < KEY_BLOCK; n += LANES)
        for (int l = 0; l < LANES; l++) top[l] = scores[n + l] > top[l] ? scores[n + l] : top[l];
    for (int l = 0; l < LANES; l++) largest = top[l] > largest ? top[l] : largest;
    for (int n = 0; n < KEY_BLOCK; n++) scores[n] = power_of_two(scores[n] - largest);
    for (int64_t n = count; n < KEY_BLOCK; n++) scores[n] = 0;
    Floats sums = load_floats(scores);
    for (int n = LANES; n < KEY_BLOCK; n += LANES) sums = sums + load_floats(scores + n);
    sum = sum_of_lanes(sums);
    const float kept = power_of_two(s->largest[row] - largest);
    s->totals[row] = s->totals[row] * kept + sum;
    s->largest[row] = largest;
    return kept;
}

INLINE void add_values_in(Sums *s, int64_t row, int rows, int registers, const float weights[SUM_ROWS][KEY_BLOCK],
                          const float *kept, const float *values, int64_t dim, int64_t count, int64_t first) {
    Floats sums[SUM_ROWS][SUM_REGISTERS];
    sum_tile(weights[0], KEY_BLOCK, values + first, dim, count, rows, registers, sums);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < registers; v++) {
            float *to = s->sums[row + r] + first + v * LANES;
            store_floats(to, load_floats(to) * splat(kept[r]) + sums[r][v]);
        }
}

/* The first `count` keys of a block, `packed` or else as they lie, and their values. The first token of these queries
 * is at `place`, counted from the first key. */
INLINE void see_in(const CausalAttention *a, Sums *s, int64_t row, int rows, int64_t place, const float *keys,
                   const float *packed, const float *values, int64_t count) {
    float scores[SUM_ROWS][KEY_BLOCK], kept[SUM_ROWS];
    if (packed != NULL)
        score_packed(s->q[row], packed, a->dim, rows, scores);
    else
        score_plain(s->q[row], keys, values, a->dim, count, rows, scores);
    for (int r = 0; r < rows; r++) { /* a token sees itself and what is before it */
        const int64_t seen = place + (row + r) / a->heads + 1;
        kept[r] = weigh(s, row + r, seen < count ? seen : count, scores[r]);
    }
    int64_t i = 0;
    for (; i + SUM_WIDTH <= a->dim; i += SUM_WIDTH)
        add_values_in(s, row, rows, SUM_REGISTERS, scores, kept, values, a->dim, count, i);
    for (; i < a->dim; i += LANES) add_values_in(s, row, rows, 1, scores, kept, values, a->dim, count, i);
}

OUT_OF_LINE void see(const CausalAttention *a, Sums *s, int64_t row, int64_t rows, int64_t place, const float *keys,
                     const float *packed, const float *values, int64_t count) {
    switch (rows) { /* counts that the compiler knows keep the sums in registers */
    case 1: see_in(a, s, row, 1, place, keys, packed, values, count); break;
    case 2: see_in(a, s, row, 2, place, keys, packed, values, count); break;
    case 3: see_in(a, s, row, 3, place, keys, packed, values, count); break;
    case 4: see_in(a, s, row, 4, place, keys, packed, values, count); break;
    case 5: see_in(a, s, row, 5, place, keys, packed, values, count); break;
    default: see_in(a, s, row, SUM_ROWS, place, keys, packed, values, count);
    }
}

/* ----------------------------------------------------------------------------------------------------------- a task */

static float *out_row(const CausalAttention *a, const QueryBlock *queries, int64_t row) {
    const int64_t token = queries->row * a->count + queries->first + row / a->heads;
    return a->out + ((token * a->groups + queries->group) * a->heads + row % a->heads) * a->dim;
}

/* Keys [first, last) of the cache, first being a multiple of KEY_BLOCK; into `partial`, or straight to the output. */
static void attend_causally(const CausalAttention *a, const QueryBlock *queries, int64_t first, int64_t last,
                            float *partial) {
    Sums s;
    const int64_t rows = queries->count * a->heads, pair = queries->row * a->groups + queries->group;
    const int64_t place = first_new(a, queries->row) + queries->first;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = queries->row * a->count + queries->first + r / a->heads;
        const float *q = a->q + token * a->q_stride + (queries->group * a->heads + r % a->heads) * a->dim;
        rotate_head(a, token, q, a->scale, s.q[r]);
        memset(s.sums[r], 0, a->dim * sizeof(float));
        s.largest[r] = UNSEEN, s.totals[r] = 0;
    }
    for (int64_t n = first; n < last; n += KEY_BLOCK) {
        const int64_t count = last - n < KEY_BLOCK ? last - n : KEY_BLOCK, at = (pair * a->capacity + n) * a->dim;
        const int64_t block = (pair * a->blocks + n / KEY_BLOCK) * KEY_BLOCK * a->dim;
        const float *packed = a->packed == NULL ? NULL : a->packed + block;
        for (int64_t r = 0; r < rows; r += SUM_ROWS)
            see(a, &s, r, rows - r, place - n, a->keys + at, packed, a->values + at, count);
    }
    for (int64_t r = 0; r < rows; r++)
        if (partial != NULL) {
            float *to = partial + r * (2 + a->dim);
            to[0] = s.largest[r], to[1] = s.totals[r];
            memcpy(to + 2, s.sums[r], a->dim * sizeof(float));
        } else {
            float *to = out_row(a, queries, r);
            for (int64_t i = 0; i < a->dim; i++) to[i] = s.sums[r][i] / s.totals[r];
        }
}

static void join_parts(const CausalAttention *a, const QueryBlock *queries, const float *partials, int64_t parts,
                       int64_t size) {
    const int64_t rows = queries->count * a->heads;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = partials + r * (2 + a->dim);
        float largest = UNSEEN, total = 0, *to = out_row(a, queries, r);
        for (int64_t p = 0; p < parts; p++) largest = from[p * size] > largest ? from[p * size] : largest;
        memset(to, 0, a->dim * sizeof(float));
        for (int64_t p = 0; p < parts; p++) {
            const float *part = from + p * size, share = power_of_two(part[0] - largest);
            total += share * part[1];
            for (int64_t i = 0; i < a->dim; i++) to[i] += share * part[2 + i];
        }
        for (int64_t i = 0; i < a->dim; i++) to[i] /= total;
    }
}

#define CAUSAL_KERNELS {write_tokens, pack_keys, attend_causally, join_parts}
