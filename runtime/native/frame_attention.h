/* Attention of frames in int8, in terms of one instruction set's registers: scores as SageAttention has them (Zhang et al.
 * 2024, arXiv:2410.02367): keys less their mean, which no softmax notices, one scale per query and per key. Weights are
 * rounded to 255 steps below the largest of each block of keys, and values with a scale per block and channel.
 * Sums over blocks are FlashAttention's (Dao 2022).
 *
 * A file that includes this has defined, besides what int8_multiply.h wants:
 *   WEIGHT_ZERO   what is taken away from a weight's code, of 0 to 255, to fit into what dot_x multiplies
 *   dot_keys      sums of products of keys' codes, in lanes, by 4 numbers of 16 of a query in int8
 */
#pragma once

#include "int8_multiply.h"

enum { FRAME_ROWS = 4 };

/* int8 codes of numbers the largest of which is 127 scales; the scale, NaN where one is NaN or infinite. */
INLINE float round_head(const float *x, int64_t padded, XCode *restrict codes) {
    const float largest = largest_magnitude(x, padded);
    const float scale = (largest > TINY ? largest : TINY) / 127 + (largest - largest);
    const float inverse = 1 / scale;
    for (int64_t i = 0; i < padded; i++) codes[i] = (XCode)(int32_t)__builtin_rintf(x[i] * inverse);
    return scale;
}

#include "frames.h"

/* ----------------------------------------------------------------------------------------------------------- values */

/* Of one block of keys: the scales of its channels, [padded dim], and one over them. NaN where a number of the channel is
 * NaN or infinite: magnitudes are compared as whole numbers, as by largest_magnitude. */
static void scale_values(const Attention *a, int64_t head, int64_t block, int64_t count, float *scales,
                         float *inverses) {
    int32_t largest[MOST_DIM];
    float values[MOST_DIM];
    for (int64_t i = 0; i < MOST_DIM; i++) values[i] = TINY;
    memcpy(largest, values, sizeof largest);
    for (int64_t n = 0; n < count; n++) {
        const float *x = head_row(a, head, block * KEYS + n, 2);
        fetch_row(a, head, block * KEYS + n + ROWS_AHEAD, 2);
        for (int64_t i = 0; i < a->dim; i++) {
            int32_t magnitude;
            memcpy(&magnitude, x + i, sizeof magnitude);
            magnitude &= INT32_MAX;
            largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
    }
    memcpy(values, largest, sizeof values);
    for (int64_t i = 0; i < padded_dim(a); i++) {
        scales[i] = values[i] / 127 + (values[i] - values[i]);
        inverses[i] = 1 / scales[i];
    }
}

static void prepare_values(const Attention *a, int64_t head) {
    const int64_t padded = padded_dim(a), blocks = key_blocks(a);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t count = a->length - b * KEYS < KEYS ? a->length - b * KEYS : KEYS;
        int8_t *values = a->values + (head * blocks + b) * KEYS * padded;
        float inverses[MOST_DIM];
        scale_values(a, head, b, count, a->value_scales + (head * blocks + b) * padded, inverses);
        if (count < KEYS || padded > a->dim) memset(values, 0, KEYS * padded);
        for (int64_t n = 0; n < count; n++) {
            const float *x = head_row(a, head, b * KEYS + n, 2);
            int8_t *to = values + n / 4 * 4 * padded + PLACE(n % 4);
            for (int64_t i = 0; i < a->dim; i++) to[i * 4] = (int8_t)(int32_t)__builtin_rintf(x[i] * inverses[i]);
        }
    }
}

static int prepare_frames(const Attention *a, int64_t head) {
    prepare_values(a, head);
    return prepare_keys(a, head);
}

/* ------------------------------------------------------------------------------------------------ scores and weights */

/* Of FRAME_ROWS queries and a block of keys. */
typedef struct {
    float scores[FRAME_ROWS][KEYS];  /* to base 2 */
    XCode codes[FRAME_ROWS][KEYS];   /* of the weights, 255 - WEIGHT_ZERO for the largest of the block */
    float largest[FRAME_ROWS];
    int32_t totals[FRAME_ROWS];      /* of the codes, from 0 on */
} __attribute__((aligned(64))) Weights;

INLINE void score(const Queries *q, int64_t m, const int8_t *keys, const float *scales, const float *limits,
                  int64_t padded, Weights *to) {
    Floats largest[FRAME_ROWS];
    UNROLL for (int r = 0; r < FRAME_ROWS; r++)
        largest[r] = splat(UNSEEN);
    for (int part = 0; part < KEYS; part += TILE) {
        Ints d[FRAME_ROWS][TILE_REGISTERS];
        UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                d[r][t] = splat_ints(q->offsets[m + r]);
        }
        for (int64_t j = 0; j < padded; j += 16) {
            Columns columns[FRAME_ROWS];
            UNROLL for (int r = 0; r < FRAME_ROWS; r++)
                columns[r] = load_columns((const int8_t *)(q->codes[m + r] + j));
            UNROLL for (int lane = 0; lane < 4; lane++) {
                Signed four[TILE_REGISTERS];
                UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                    four[t] = load_wide(keys + ((j / 4 + lane) * 4 * KEYS + part * 4 + t * WIDTH) * WIDE);
                UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
                    UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                        d[r][t] = dot_keys(d[r][t], four[t], columns[r], lane);
                }
            }
        }
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++) {
            const Floats scale = load_floats(scales + part + t * LANES);
            const Floats limit = load_floats(limits + part + t * LANES);
            UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
                const Floats scores = to_floats(d[r][t]) * (scale * splat(q->scales[m + r])) + limit;
                largest[r] = greater(largest[r], scores);
                store_floats(to->scores[r] + part + t * LANES, scores);
            }
        }
    }
    UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
        float lanes[LANES];
        store_floats(lanes, largest[r]);
        to->largest[r] = lanes[0];
        for (int i = 1; i < LANES; i++) to->largest[r] = lanes[i] > to->largest[r] ? lanes[i] : to->largest[r];
    }
}

/* 2^x within 1e-4 of itself, of which half a step of 1/255 is twenty times as much. */
INLINE float rough_power(float x) {
    x = x < -126 ? -126 : x;
    const float whole = __builtin_rintf(x), f = x - whole;
    float y = 0.0558263f * f + 0.2401397f;
    y = y * f + 0.6931471f;
    return scaled_by_power(y * f + 1, whole);
}

/* Codes of one query's weights. */
INLINE void weigh_row(Weights *w, int row) {
    const float limit = w->largest[row] - 7.9943534f; /* log2(255) */
    const float *scores = w->scores[row];
    XCode *restrict codes = w->codes[row];
    for (int i = 0; i < KEYS; i++)
        codes[i] = (XCode)((int32_t)__builtin_rintf(rough_power(scores[i] - limit)) - WEIGHT_ZERO);
    int32_t total = KEYS * WEIGHT_ZERO;
    for (int i = 0; i < KEYS; i++) total += codes[i];
    w->totals[row] = total;
}

/* sums [FRAME_ROWS, TILE] += codes [FRAME_ROWS, KEYS] by the values of TILE channels. */
INLINE void multiply_values(const XCode *codes, int64_t stride, const int8_t *values, int64_t padded, int rows,
                            Ints sums[FRAME_ROWS][TILE_REGISTERS]) {
    for (int64_t j = 0; j < KEYS; j += 16) {
        Columns columns[FRAME_ROWS];
        UNROLL for (int r = 0; r < rows; r++)
            columns[r] = load_columns((const int8_t *)(codes + r * stride + j));
        UNROLL for (int lane = 0; lane < 4; lane++) {
            Signed four[TILE_REGISTERS];
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                four[t] = load_wide(values + ((j / 4 + lane) * padded * 4 + t * WIDTH) * WIDE);
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                    sums[r][t] = dot_x(sums[r][t], four[t], columns[r], lane);
            }
        }
    }
}

/* WEIGHT_ZERO times the sums of a block's values, [padded]: what is missing where the codes of weights are less by it. */
INLINE void sum_values(const int8_t *values, int64_t padded, int32_t *to) {
    XCode codes[KEYS];
    for (int i = 0; i < KEYS; i++) codes[i] = (XCode)-WEIGHT_ZERO; /* WEIGHT_ZERO itself may not fit */
    for (int64_t part = 0; part < padded; part += TILE) {
        Ints sums[FRAME_ROWS][TILE_REGISTERS];
        for (int t = 0; t < TILE_REGISTERS; t++) sums[0][t] = splat_ints(0);
        multiply_values(codes, 0, values + part * 4 * WIDE, padded, 1, sums);
        for (int t = 0; t < TILE_REGISTERS; t++) store_ints(to + part + t * LANES, sums[0][t]);
    }
    for (int64_t i = 0; i < padded; i++) to[i] = -to[i];
}

INLINE void add_values(Queries *q, int64_t m, const Weights *w, const int8_t *values, const int32_t *offsets,
                       const float *scales, const float *kept, const float *added, int64_t padded) {
    for (int64_t part = 0; part < padded; part += TILE) {
        Ints d[FRAME_ROWS][TILE_REGISTERS];
        UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                d[r][t] = WEIGHT_ZERO ? load_ints(offsets + part + t * LANES) : splat_ints(0);
        }
        multiply_values(w->codes[0], KEYS, values + part * 4 * WIDE, padded, FRAME_ROWS, d);
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++) {
            const Floats scale = load_floats(scales + part + t * LANES);
            UNROLL for (int r = 0; r < FRAME_ROWS; r++) {
                float *to = q->sums[m + r] + part + t * LANES;
                store_floats(to, load_floats(to) * splat(kept[r]) + to_floats(d[r][t]) * (scale * splat(added[r])));
            }
        }
    }
}

/* Weights of FRAME_ROWS queries and a block of keys times its values. */
INLINE void finish_block(const Weights *w, Queries *q, int64_t m, const int8_t *values, const int32_t *offsets,
                         const float *scales, int64_t padded) {
    float powers[2 * FRAME_ROWS];
    for (int r = 0; r < FRAME_ROWS; r++) {
        const float before = q->largest[m + r], now = w->largest[r] > before ? w->largest[r] : before;
        powers[r] = before - now, powers[FRAME_ROWS + r] = w->largest[r] - now;
        q->largest[m + r] = now;
    }
    for (int r = 0; r < 2 * FRAME_ROWS; r++) powers[r] = power_of_two(powers[r]);
    for (int r = 0; r < FRAME_ROWS; r++)
        q->totals[m + r] = q->totals[m + r] * powers[r] + powers[FRAME_ROWS + r] * (float)w->totals[r];
    add_values(q, m, w, values, offsets, scales, powers, powers + FRAME_ROWS, padded);
}

/* One block of keys against all queries. */
static void add_block(const Attention *a, int64_t head, int64_t block, Queries *q, int64_t count) {
    const int64_t padded = padded_dim(a), place = head * padded_length(a) + block * KEYS;
    const int8_t *keys = (const int8_t *)a->keys + place * padded, *values = a->values + place * padded;
    const float *value_scales = a->value_scales + (head * key_blocks(a) + block) * padded;
    int8_t room[2][WIDE > 1 ? KEYS * MOST_DIM * WIDE : 1] __attribute__((aligned(64)));
    int32_t offsets[MOST_DIM];
    Weights w;
    if (WIDE > 1) {
        widen(keys, KEYS * padded, room[0]);
        widen(values, KEYS * padded, room[1]);
        keys = room[0], values = room[1];
    }
    if (WEIGHT_ZERO) sum_values(values, padded, offsets);
    for (int64_t m = 0; m < count; m += FRAME_ROWS) {
        score(q, m, keys, a->key_scales + place, a->key_limits + place, padded, &w);
        for (int r = 0; r < FRAME_ROWS; r++) weigh_row(&w, r);
        finish_block(&w, q, m, values, offsets, value_scales, padded);
    }
}

static void attend_frames(const Attention *a, int64_t head, int64_t block) {
    const int64_t first = block * QUERIES;
    const int64_t count = a->length - first < QUERIES ? a->length - first : QUERIES;
    Queries q;
    open_queries(a, head, first, count, &q);
    for (int64_t b = 0; b < key_blocks(a); b++) add_block(a, head, b, &q, count);
    close_queries(a, head, first, count, &q);
}

#define INT8_KERNELS sizeof(XCode), pack_int8, round_int8, multiply_int8, prepare_frames, attend_frames
