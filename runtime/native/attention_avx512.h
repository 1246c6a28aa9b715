/* Attention of frames in int8: scores as SageAttention2 has them (Zhang et al. 2024, arXiv:2411.10958): keys less their
 * mean, which no softmax notices, queries less theirs, whose scores are added in float, one scale per query and per key.
 * Weights are rounded to 8 bits below the largest of
 * each block of keys, and values with a scale per block and channel. Sums over blocks are FlashAttention's (Dao 2022).
 */
#pragma once

#include <math.h>

#include "avx512.h"
#include "int8.h"

enum { ROWS = 4, MOST_DIM = 128, MOST_REGISTERS = MOST_DIM / 16 };
#define LOG2_E 1.44269504f
#define UNSEEN (-1e30f) /* the score of what is behind the last key; finite, so that differences of it are numbers */

/* One head's row of q or k, rotated: [x1 cos - x2 sin, x2 cos + x1 sin], its largest magnitude returned. */
static void rotate_row(const Attention *a, const float *x, int64_t position, float factor, float *out) {
    const int64_t half = a->dim / 2;
    const float *cosine = a->cosine + position * half, *sine = a->sine + position * half;
    for (int64_t i = 0; i < half; i++) {
        out[i] = (x[i] * cosine[i] - x[half + i] * sine[i]) * factor;
        out[half + i] = (x[half + i] * cosine[i] + x[i] * sine[i]) * factor;
    }
}

/* int8 codes of `padded` numbers, the largest of which is 127 scales; the scale. */
INLINE float round_to_int8(const float *x, int64_t padded, int8_t *codes) {
    __m512 largest = _mm512_set1_ps(1e-30f);
    for (int64_t i = 0; i < padded; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    const float scale = _mm512_reduce_max_ps(largest) / 127;
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    for (int64_t i = 0; i < padded; i += 16)
        _mm_storeu_si128((__m128i *)(codes + i),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse))));
    return scale;
}

static const float *head_row(const Attention *a, int64_t head, int64_t row, int part) {
    const int64_t frame = head / a->heads, width = a->heads * a->dim;
    return a->qkv + ((frame * a->length + row) * 3 + part) * width + head % a->heads * a->dim;
}

/* All of a head's queries (part 0) or keys (1), rotated, and their mean. rotated: [length, padded dim]. */
static void rotate_all(const Attention *a, int64_t head, int part, float *rotated, float *mean) {
    const int64_t padded = padded_dim(a), first = head / a->heads * a->length;
    const float factor = part == 0 ? a->scale * LOG2_E : 1, share = 1 / (float)a->length;
    memset(rotated, 0, a->length * padded * sizeof(float));
    memset(mean, 0, padded * sizeof(float));
    for (int64_t n = 0; n < a->length; n++) {
        rotate_row(a, head_row(a, head, n, part), first + n, factor, rotated + n * padded);
        for (int64_t i = 0; i < padded; i++) mean[i] += rotated[n * padded + i] * share;
    }
}

static void prepare_head_keys(const Attention *a, int64_t head) {
    const int64_t padded = padded_dim(a), room = padded_length(a);
    uint8_t *keys = a->keys + head * room * padded;
    float *scales = a->key_scales + head * room, *biases = a->key_biases + head * room;
    float *query = a->query_means + head * padded, mean[MOST_DIM], row[MOST_DIM];
    float *rotated = aligned_alloc(64, a->length * padded * sizeof(float));
    int8_t codes[MOST_DIM];
    rotate_all(a, head, 0, rotated, query);
    rotate_all(a, head, 1, rotated, mean);
    memset(keys, 128, room * padded);
    for (int64_t n = 0; n < room; n++) {
        scales[n] = 0, biases[n] = UNSEEN;
        if (n >= a->length) continue;
        float bias = 0;
        for (int64_t i = 0; i < padded; i++) {
            row[i] = rotated[n * padded + i] - mean[i];
            bias += row[i] * query[i];
        }
        biases[n] = bias;
        scales[n] = round_to_int8(row, padded, codes);
        uint8_t *to = keys + n / KEYS * KEYS * padded + n % KEYS * 4;
        for (int64_t i = 0; i < padded; i++) to[i / 4 * KEYS * 4 + i % 4] = (uint8_t)(codes[i] + 128);
    }
    free(rotated);
}

static void prepare_head_values(const Attention *a, int64_t head) {
    const int64_t padded = padded_dim(a), blocks = key_blocks(a);
    int8_t *values = a->values + head * blocks * KEYS * padded;
    float *scales = a->value_scales + head * blocks * padded;
    memset(values, 0, blocks * KEYS * padded);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t count = a->length - b * KEYS < KEYS ? a->length - b * KEYS : KEYS;
        float inverse[MOST_DIM], *scale = scales + b * padded;
        for (int64_t i = 0; i < padded; i++) scale[i] = 1e-30f;
        for (int64_t n = 0; n < count; n++) {
            const float *x = head_row(a, head, b * KEYS + n, 2);
            for (int64_t i = 0; i < a->dim; i++) scale[i] = fabsf(x[i]) > scale[i] ? fabsf(x[i]) : scale[i];
        }
        for (int64_t i = 0; i < padded; i++) scale[i] /= 127, inverse[i] = 1 / scale[i];
        for (int64_t n = 0; n < count; n++) {
            const float *x = head_row(a, head, b * KEYS + n, 2);
            int8_t *to = values + (b * KEYS + n / 4 * 4) * padded + n % 4;
            for (int64_t i = 0; i < a->dim; i++) to[i * 4] = (int8_t)lrintf(x[i] * inverse[i]);
        }
    }
}

static void prepare_keys(const Attention *a, int64_t head) {
    prepare_head_keys(a, head);
    prepare_head_values(a, head);
}

/* A block of queries, and what has been seen of their keys so far. */
typedef struct {
    int8_t codes[QUERIES][MOST_DIM];
    int32_t offsets[QUERIES]; /* -128 × the sum of the codes: what the 128 in every code of the keys adds */
    float scales[QUERIES];    /* with the softmax's own, and to base 2 */
    float largest[QUERIES], totals[QUERIES];
    float sums[QUERIES][MOST_DIM];
} Queries;

static void open_queries(const Attention *a, int64_t head, int64_t first, int64_t count, Queries *q) {
    const int64_t padded = padded_dim(a), frame = head / a->heads;
    for (int64_t m = 0; m < QUERIES; m++) {
        float row[MOST_DIM] = {0};
        if (m < count) {
            rotate_row(a, head_row(a, head, first + m, 0), frame * a->length + first + m, a->scale * LOG2_E, row);
            for (int64_t i = 0; i < padded; i++) row[i] -= a->query_means[head * padded + i];
        }
        q->scales[m] = round_to_int8(row, padded, q->codes[m]);
        q->offsets[m] = 0;
        for (int64_t i = 0; i < padded; i++) q->offsets[m] -= 128 * q->codes[m][i];
        q->largest[m] = UNSEEN, q->totals[m] = 0;
        memset(q->sums[m], 0, padded * sizeof(float));
    }
}

/* Scores of ROWS queries and KEYS keys, to base 2. */
INLINE void score(const Queries *q, int64_t m, const uint8_t *keys, const float *scales, const float *biases, int steps,
                  float scores[ROWS][KEYS]) {
    for (int part = 0; part < KEYS; part += 64) {
        __m512i d[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < 4; v++)
                d[r][v] = _mm512_set1_epi32(q->offsets[m + r]);
        }
        for (int j = 0; j < steps; j++) {
            const uint8_t *at = keys + (j * KEYS + part) * 4;
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512i a = broadcast_4(q->codes[m + r] + 4 * j);
                UNROLL for (int v = 0; v < 4; v++)
                    d[r][v] = _mm512_dpbusd_epi32(d[r][v], _mm512_load_si512(at + v * 64), a);
            }
        }
        UNROLL for (int v = 0; v < 4; v++) {
            const __m512 scale = _mm512_load_ps(scales + part + v * 16), bias = _mm512_load_ps(biases + part + v * 16);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(q->scales[m + r]));
                _mm512_store_ps(scores[r] + part + v * 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(d[r][v]), factor, bias));
            }
        }
    }
}

/* 2^x for x <= 0 within 1e-4 of itself: less than half of a step of 1/255. */
INLINE __m512 weight_ps(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0558263f), f, _mm512_set1_ps(0.2401397f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931471f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, f, _mm512_set1_ps(1)), whole);
}

/* Codes of the weights of one query, 255 for the largest of the block, and their sum. */
INLINE int32_t weigh(const float *scores, float *largest, uint8_t *codes) {
    __m512 top = _mm512_load_ps(scores);
    UNROLL for (int v = 1; v < KEYS / 16; v++) top = _mm512_max_ps(top, _mm512_load_ps(scores + v * 16));
    *largest = _mm512_reduce_max_ps(top);
    const __m512 limit = _mm512_set1_ps(*largest), steps = _mm512_set1_ps(255);
    __m512i sum = _mm512_setzero_si512();
    UNROLL for (int v = 0; v < KEYS / 16; v++) {
        const __m512 weight = weight_ps(_mm512_sub_ps(_mm512_load_ps(scores + v * 16), limit));
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(weight, steps));
        sum = _mm512_add_epi32(sum, code);
        _mm_store_si128((__m128i *)(codes + v * 16), _mm512_cvtusepi32_epi8(code));
    }
    return _mm512_reduce_add_epi32(sum);
}

INLINE void add_values(Queries *q, int64_t m, const uint8_t codes[ROWS][KEYS], const int8_t *values, const float *scales,
                       const float *kept, const float *added, int registers) {
    __m512i d[ROWS][MOST_REGISTERS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < registers; v++) d[r][v] = _mm512_setzero_si512();
    for (int j = 0; j < KEYS / 4; j++) {
        const int8_t *at = values + j * registers * 64;
        UNROLL for (int r = 0; r < ROWS; r++) {
            const __m512i a = broadcast_4(codes[r] + 4 * j);
            UNROLL for (int v = 0; v < registers; v++)
                d[r][v] = _mm512_dpbusd_epi32(d[r][v], a, _mm512_load_si512(at + v * 64));
        }
    }
    UNROLL for (int v = 0; v < registers; v++) {
        const __m512 scale = _mm512_loadu_ps(scales + v * 16);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *to = q->sums[m + r] + v * 16;
            const __m512 new = _mm512_mul_ps(_mm512_cvtepi32_ps(d[r][v]), _mm512_mul_ps(scale, _mm512_set1_ps(added[r])));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(kept[r]), new));
        }
    }
}

/* One block of keys against all queries. */
INLINE void add_block(const Attention *a, int64_t head, int64_t block, Queries *q, int64_t count, int registers) {
    const int64_t padded = registers * 16, place = head * padded_length(a) + block * KEYS;
    const float *value_scales = a->value_scales + (head * key_blocks(a) + block) * padded;
    float scores[ROWS][KEYS] __attribute__((aligned(64)));
    uint8_t codes[ROWS][KEYS] __attribute__((aligned(64)));
    for (int64_t m = 0; m < count; m += ROWS) {
        float powers[16] = {0};
        int32_t totals[ROWS];
        score(q, m, a->keys + place * padded, a->key_scales + place, a->key_biases + place, registers * 4, scores);
        for (int r = 0; r < ROWS; r++) {
            float largest;
            totals[r] = weigh(scores[r], &largest, codes[r]);
            const float before = q->largest[m + r], now = largest > before ? largest : before;
            powers[r] = before - now, powers[ROWS + r] = largest - now;
            q->largest[m + r] = now;
        }
        _mm512_storeu_ps(powers, exp2_ps(_mm512_loadu_ps(powers)));
        for (int r = 0; r < ROWS; r++)
            q->totals[m + r] = q->totals[m + r] * powers[r] + powers[ROWS + r] * (float)totals[r];
        add_values(q, m, codes, a->values + place * padded, value_scales, powers, powers + ROWS, registers);
    }
}

INLINE void attend_in(const Attention *a, int64_t head, int64_t block, int registers) {
    const int64_t first = block * QUERIES, blocks = key_blocks(a);
    const int64_t count = a->length - first < QUERIES ? a->length - first : QUERIES;
    Queries *q = aligned_alloc(64, (sizeof(Queries) + 63) / 64 * 64);
    open_queries(a, head, first, count, q);
    for (int64_t b = 0; b < blocks; b++) add_block(a, head, b, q, count, registers);
    for (int64_t m = 0; m < count; m++) {
        float *out = a->out + (head / a->heads * a->length + first + m) * a->heads * a->dim + head % a->heads * a->dim;
        for (int64_t i = 0; i < a->dim; i++) out[i] = q->sums[m][i] / q->totals[m];
    }
    free(q);
}

static void attend(const Attention *a, int64_t head, int64_t block) {
    switch (padded_dim(a) / 16) { /* counts that the compiler knows keep the sums in registers */
    case 1: attend_in(a, head, block, 1); break;
    case 2: attend_in(a, head, block, 2); break;
    case 3: attend_in(a, head, block, 3); break;
    case 4: attend_in(a, head, block, 4); break;
    case 5: attend_in(a, head, block, 5); break;
    case 6: attend_in(a, head, block, 6); break;
    case 7: attend_in(a, head, block, 7); break;
    default: attend_in(a, head, block, MOST_REGISTERS);
    }
}
