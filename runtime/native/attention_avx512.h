/* Attention of frames in int8: scores as SageAttention has them (Zhang et al. 2024, arXiv:2410.02367): keys less their
 * mean, which no softmax notices, one scale per query and per key. Weights are rounded to 8 bits below the largest of
 * each block of keys, and values with a scale per block and channel. Sums over blocks are FlashAttention's (Dao 2022).
 */
#pragma once

#include <math.h>

#include "avx512.h"

typedef int8_t XCode;
#define PLACE(column) (column)
enum { X_ZERO = 128 };

/* The larger magnitudes; as whole numbers, among which NaN is the largest and is not passed over. */
INLINE __m512 larger(__m512 magnitudes, __m512 x) {
    return _mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_castps_si512(magnitudes), _mm512_castps_si512(_mm512_abs_ps(x))));
}

/* int8 codes of `padded` numbers, the largest of which is 127 scales; the scale, NaN where one is NaN or infinite. */
INLINE float round_head(const float *x, int64_t padded, XCode *codes) {
    __m512 magnitudes = _mm512_set1_ps(1e-30f);
    for (int64_t i = 0; i < padded; i += 16) magnitudes = larger(magnitudes, _mm512_loadu_ps(x + i));
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(magnitudes));
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    const float scale = largest / 127 + (largest - largest);
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    for (int64_t i = 0; i < padded; i += 16)
        _mm_storeu_si128((__m128i *)(codes + i),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse))));
    return scale;
}

#include "frames.h"

enum { ROWS = 4, MOST_REGISTERS = MOST_DIM / 16 };

/* Codes of up to four neighbouring values, padded: [padded dim, 4]. */
INLINE void interleave_values(const float *const rows[4], const float *inverse, int64_t dim, int8_t *to) {
    for (int64_t i = 0; i < dim; i += 16) {
        __m128i r[4];
        const __mmask16 mask = first_of_16(dim - i);
        UNROLL for (int k = 0; k < 4; k++) {
            const __m512 x = rows[k] ? _mm512_maskz_loadu_ps(mask, rows[k] + i) : _mm512_setzero_ps();
            r[k] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_loadu_ps(inverse + i))));
        }
        _mm512_storeu_si512(to + i * 4, interleave(r));
    }
}

static void prepare_values(const Attention *a, int64_t head) {
    const int64_t padded = padded_dim(a), blocks = key_blocks(a);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t count = a->length - b * KEYS < KEYS ? a->length - b * KEYS : KEYS;
        int8_t *values = a->values + (head * blocks + b) * KEYS * padded;
        float inverse[MOST_DIM], *scale = a->value_scales + (head * blocks + b) * padded;
        for (int64_t i = 0; i < padded; i += 16) {
            const __mmask16 mask = first_of_16(a->dim - i);
            __m512 largest = _mm512_set1_ps(1e-30f);
            for (int64_t n = 0; n < count; n++) {
                if (i == 0) fetch_row(a, head, b * KEYS + n + ROWS_AHEAD, 2);
                const __m512 x = _mm512_maskz_loadu_ps(mask, head_row(a, head, b * KEYS + n, 2) + i);
                largest = larger(largest, x);
            }
            const __m512 finite = _mm512_sub_ps(largest, largest); /* 0, else NaN */
            const __m512 step = _mm512_add_ps(_mm512_div_ps(largest, _mm512_set1_ps(127)), finite);
            _mm512_storeu_ps(scale + i, step);
            _mm512_storeu_ps(inverse + i, _mm512_div_ps(_mm512_set1_ps(1), step));
        }
        for (int64_t four = 0; four < KEYS / 4; four++) {
            const float *rows[4];
            for (int64_t k = 0; k < 4; k++)
                rows[k] = four * 4 + k < count ? head_row(a, head, b * KEYS + four * 4 + k, 2) : NULL;
            interleave_values(rows, inverse, a->dim, values + four * 4 * padded);
        }
    }
}

static int prepare_frames(const Attention *a, int64_t head) {
    prepare_values(a, head);
    return prepare_keys(a, head);
}

/* The empty statement keeps a sum in one register: GCC 12 copies each to another and back in every step, a quarter of
 * the time. */
INLINE void add_dot(__m512i *sum, __m512i codes, __m512i signed_codes) {
    *sum = _mm512_dpbusd_epi32(*sum, codes, signed_codes);
    __asm__("" : "+v"(*sum));
}

/* Of ROWS queries and a block of keys. */
typedef struct {
    float scores[ROWS][KEYS];   /* to base 2 */
    uint8_t codes[ROWS][KEYS];  /* of the weights, 255 for the largest of the block */
    float largest[ROWS];
} __attribute__((aligned(64))) Weights;

/* 2^x within 1e-4 of itself, of which half a step of 1/255 is twenty times as much. */
INLINE __m512 weight_ps(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0558263f), f, _mm512_set1_ps(0.2401397f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931471f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, f, _mm512_set1_ps(1)), whole);
}

/* Codes of 16 neighbouring weights, the `place`th of ROWS x KEYS / 16. */
INLINE void weigh(Weights *w, int place) {
    const int row = place / (KEYS / 16), at = place % (KEYS / 16) * 16;
    const __m512 limit = _mm512_set1_ps(w->largest[row] - 7.9943534f); /* log2(255) */
    const __m512 weights = weight_ps(_mm512_sub_ps(_mm512_load_ps(w->scores[row] + at), limit));
    _mm_store_si128((__m128i *)(w->codes[row] + at), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(weights)));
}

/* Scores of ROWS queries and KEYS keys, and meanwhile the codes of those before: they wait for each other's results,
 * where products wait for nothing but room. */
INLINE void score(const Queries *q, int64_t m, const uint8_t *keys, const float *scales, const float *limits, int steps,
                  Weights *to, Weights *before) {
    __m512 largest[ROWS];
    int place = 0;
    UNROLL for (int part = 0; part < KEYS; part += 64) {
        __m512i d[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < 4; v++)
                d[r][v] = _mm512_set1_epi32(q->offsets[m + r]);
        }
        for (int j = 0; j < steps; j++) {
            __m512i four[4];
            UNROLL for (int v = 0; v < 4; v++)
                four[v] = _mm512_load_si512(keys + (j * KEYS + part) * 4 + v * 64);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512i a = broadcast_4(q->codes[m + r] + 4 * j);
                UNROLL for (int v = 0; v < 4; v++)
                    add_dot(&d[r][v], four[v], a);
            }
            if (before != NULL && place < ROWS * KEYS / 16) weigh(before, place++);
        }
        UNROLL for (int v = 0; v < 4; v++) {
            const __m512 scale = _mm512_load_ps(scales + part + v * 16), limit = _mm512_load_ps(limits + part + v * 16);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(q->scales[m + r]));
                const __m512 scores = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d[r][v]), factor, limit);
                largest[r] = part == 0 && v == 0 ? scores : _mm512_max_ps(largest[r], scores);
                _mm512_store_ps(to->scores[r] + part + v * 16, scores);
            }
        }
    }
    for (; before != NULL && place < ROWS * KEYS / 16; place++) weigh(before, place);
    UNROLL for (int r = 0; r < ROWS; r++)
        to->largest[r] = _mm512_reduce_max_ps(largest[r]);
}

/* The sum of one query's codes. */
INLINE int32_t total(const uint8_t codes[KEYS]) {
    __m512i sum = _mm512_setzero_si512();
    UNROLL for (int part = 0; part < KEYS; part += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(codes + part), _mm512_set1_epi8(1));
    return _mm512_reduce_add_epi32(sum);
}

INLINE void add_values(Queries *q, int64_t m, const uint8_t codes[ROWS][KEYS], const int8_t *values,
                       const float *scales, const float *kept, const float *added, int registers) {
    __m512i d[ROWS][MOST_REGISTERS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < registers; v++) d[r][v] = _mm512_setzero_si512();
    for (int j = 0; j < KEYS / 4; j++) {
        __m512i four[MOST_REGISTERS];
        UNROLL for (int v = 0; v < registers; v++)
            four[v] = _mm512_load_si512(values + (j * registers + v) * 64);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const __m512i a = broadcast_4(codes[r] + 4 * j);
            UNROLL for (int v = 0; v < registers; v++)
                add_dot(&d[r][v], a, four[v]);
        }
    }
    UNROLL for (int v = 0; v < registers; v++) {
        const __m512 scale = _mm512_loadu_ps(scales + v * 16);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *to = q->sums[m + r] + v * 16;
            const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(added[r]));
            const __m512 new = _mm512_mul_ps(_mm512_cvtepi32_ps(d[r][v]), factor);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(kept[r]), new));
        }
    }
}

/* Weights of ROWS queries and a block of keys, which are known now, times its values. */
INLINE void finish(const Weights *w, Queries *q, int64_t m, const int8_t *values, const float *scales, int registers) {
    float powers[16] = {0};
    for (int r = 0; r < ROWS; r++) {
        const float before = q->largest[m + r], now = w->largest[r] > before ? w->largest[r] : before;
        powers[r] = before - now, powers[ROWS + r] = w->largest[r] - now;
        q->largest[m + r] = now;
    }
    _mm512_storeu_ps(powers, exp2_ps(_mm512_loadu_ps(powers)));
    for (int r = 0; r < ROWS; r++)
        q->totals[m + r] = q->totals[m + r] * powers[r] + powers[ROWS + r] * (float)total(w->codes[r]);
    add_values(q, m, w->codes, values, scales, powers, powers + ROWS, registers);
}

/* One block of keys against all queries. */
INLINE void add_block(const Attention *a, int64_t head, int64_t block, Queries *q, int64_t count, int registers) {
    const int64_t padded = registers * 16, place = head * padded_length(a) + block * KEYS;
    const float *value_scales = a->value_scales + (head * key_blocks(a) + block) * padded;
    const uint8_t *keys = a->keys + place * padded;
    const int8_t *values = a->values + place * padded;
    Weights both[2], *now = both, *before = NULL;
    for (int64_t m = 0; m < count; m += ROWS) {
        score(q, m, keys, a->key_scales + place, a->key_limits + place, registers * 4, now, before);
        if (before != NULL) finish(before, q, m - ROWS, values, value_scales, registers);
        before = now;
        now = both + (now == both);
    }
    for (int i = 0; i < ROWS * KEYS / 16; i++) weigh(before, i);
    finish(before, q, (count - 1) / ROWS * ROWS, values, value_scales, registers);
}

INLINE void attend_in(const Attention *a, int64_t head, int64_t block, int registers) {
    const int64_t first = block * QUERIES, blocks = key_blocks(a);
    const int64_t count = a->length - first < QUERIES ? a->length - first : QUERIES;
    Queries q;
    open_queries(a, head, first, count, &q);
    for (int64_t b = 0; b < blocks; b++) add_block(a, head, b, &q, count, registers);
    close_queries(a, head, first, count, &q);
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
