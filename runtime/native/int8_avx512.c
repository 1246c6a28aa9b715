/* AVX-512 with VNNI (Intel since Ice Lake, AMD since Zen 4): products of int8 by int8, one scale per row of x. */
#include "nbits.h"
#ifdef NBITS_X86
#include "attention_avx512.h"
#include "avx512.h"
#include "int8.h"

#include <math.h>

enum {
    AHEAD = 8192,     /* bytes: the hardware's prefetcher alone leaves half of the bandwidth unused */
    TILE_ROWS = 12,   /* rows of x whose sums fit into the registers beside them */
    MOST_ROWS = 384,  /* rows of x that stay in the second-level cache */
};

/* The scale of a row and the code of 0: 127 scales are its largest magnitude, or 255 its range, 0 in it. NaN where a
 * number is NaN or infinite, so that its products are. */
INLINE float row_scale(const float *row, int64_t columns, int affine, int32_t *zero) {
    __m512 low = _mm512_setzero_ps(), high = low;
    __mmask16 none = 0; /* that are no numbers, which the extremes would pass over */
    for (int64_t k = 0; k < columns; k += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(first_of_16(columns - k), row + k);
        low = _mm512_min_ps(low, x);
        high = _mm512_max_ps(high, x);
        none |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    }
    const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    const float scale = affine ? (most - least) / 255 : (most > -least ? most : -least) / 127;
    const int finite = none == 0 && scale < INFINITY;
    *zero = affine && finite && scale > TINY ? (int32_t)lrintf(-least / scale) : 128;
    return !finite ? NAN : scale > TINY ? scale : TINY;
}

static void round_rows(const Int8Weight *w, const float *x, const Int8Rows *to, int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
        const float *row = x + (m - first) * w->columns;
        to->scales[m] = row_scale(row, w->columns, w->affine, to->zeros + m);
        const __m512 inverse = _mm512_set1_ps(1 / to->scales[m]);
        const __m512i zero = _mm512_set1_epi32(to->zeros[m]), none = _mm512_setzero_si512();
        for (int64_t k = 0; k < w->columns; k += 16) {
            const __mmask16 mask = first_of_16(w->columns - k);
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, mask ? row + k : row), inverse);
            const __m512i code = _mm512_max_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero), none);
            uint8_t *piece = (uint8_t *)to->codes + (k / DEPTH * to->rows + m) * DEPTH;
            _mm_storeu_si128((__m128i *)(piece + k % DEPTH), _mm512_cvtusepi32_epi8(code));
        }
    }
}

/* By columns on the outside: the source is read once, from its beginning to its end. */
static void pack(const Int8Weight *w, const int8_t *from, int8_t *codes, int32_t *sums) {
    const int64_t rows = padded_rows(w), columns = padded_columns(w);
    memset(sums, 0, rows * sizeof(int32_t));
    for (int64_t column = 0; column < columns; column += 4)
        for (int64_t n = 0; n < rows; n += 16) {
            const __mmask16 mask = first_of_16(w->rows - n);
            const int8_t *at = from + column * w->rows + (mask ? n : 0);
            __m128i columns_of_16[4];
            UNROLL for (int i = 0; i < 4; i++)
                columns_of_16[i] = column + i < w->columns ? _mm_maskz_loadu_epi8(mask, at + i * w->rows)
                                                           : _mm_setzero_si128();
            const __m512i four = interleave(columns_of_16);
            _mm512_store_si512(codes + n / OUTPUTS * OUTPUTS * columns + column * OUTPUTS + n % OUTPUTS * 4, four);
            const __m512i sum = _mm512_dpbusd_epi32(_mm512_load_si512(sums + n), _mm512_set1_epi8(1), four);
            _mm512_store_si512(sums + n, sum);
        }
}

/* sums [rows, OUTPUTS] += x [rows, 4 × steps] by the tile. The next rows of x come meanwhile. */
INLINE void multiply_tile(const int8_t *tile, const uint8_t *x, int64_t steps, int count, int32_t *sums) {
    __m512i d[TILE_ROWS][2];
    UNROLL for (int i = 0; i < count; i++)
        for (int half = 0; half < 2; half++) d[i][half] = _mm512_load_si512(sums + i * OUTPUTS + half * 16);
    for (int64_t j = 0; j < steps; j++) {
        if (count <= 4) _mm_prefetch((const char *)tile + j * 128 + AHEAD, _MM_HINT_T1);
        if (count <= 4) _mm_prefetch((const char *)tile + j * 128 + 64 + AHEAD, _MM_HINT_T1);
        if (count == TILE_ROWS) _mm_prefetch((const char *)x + TILE_ROWS * DEPTH + j * 64, _MM_HINT_T0);
        const __m512i v0 = _mm512_load_si512(tile + j * 128), v1 = _mm512_load_si512(tile + j * 128 + 64);
        UNROLL for (int i = 0; i < count; i++) {
            const __m512i a = broadcast_4(x + i * DEPTH + 4 * j);
            d[i][0] = _mm512_dpbusd_epi32(d[i][0], a, v0);
            d[i][1] = _mm512_dpbusd_epi32(d[i][1], a, v1);
        }
    }
    UNROLL for (int i = 0; i < count; i++)
        for (int half = 0; half < 2; half++) _mm512_store_si512(sums + i * OUTPUTS + half * 16, d[i][half]);
}

/* x × sigmoid(factor x) */
INLINE __m512 swish(__m512 x, float factor) {
    const __m512 e = exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-factor * 1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1)));
}

static void store_rows(const Int8Weight *w, const Int8Rows *x, float *y, int64_t start, int64_t stop, int64_t n,
                       int64_t width, const int32_t *sums) {
    for (int half = 0; half < 2; half++) {
        const __mmask16 mask = first_of_16(width - half * 16);
        const int64_t at = mask ? n + half * 16 : 0;
        const __m512 scales = _mm512_maskz_loadu_ps(mask, w->scales + at);
        const __m512 bias = w->bias ? _mm512_maskz_loadu_ps(mask, w->bias + at) : _mm512_setzero_ps();
        const __m512i added = _mm512_load_si512(w->sums + n + half * 16);
        for (int64_t m = start; m < stop; m++) {
            const __m512i offset = _mm512_mullo_epi32(added, _mm512_set1_epi32(x->zeros[m]));
            const __m512i d = _mm512_sub_epi32(_mm512_load_si512(sums + (m - start) * OUTPUTS + half * 16), offset);
            const __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(x->scales[m]));
            __m512 out = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), factor, bias);
            const int64_t to = m * w->rows + at;
            if (w->quick_gelu) out = swish(out, 1.702f);
            if (w->gate) out = _mm512_mul_ps(out, swish(_mm512_maskz_loadu_ps(mask, w->gate + to), 1));
            if (w->residual) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, w->residual + to));
            _mm512_mask_storeu_ps(y + to, mask, out);
        }
    }
}

/* Of a tile's rows, which lie so far from each other that the hardware's prefetcher sees no stream in them. */
INLINE void fetch_outputs(const float *y, int64_t stride) {
    if (y == NULL) return;
    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
        _mm_prefetch((const char *)(y + i * stride), _MM_HINT_T0);
        _mm_prefetch((const char *)(y + i * stride + 16), _MM_HINT_T0);
    }
}

/* `count` rows from m on by one piece of a tile of weights; behind the last piece they are stored, while their outputs
 * and their sums are in the first-level cache. */
INLINE void multiply_rows(const Int8Weight *w, const Int8Rows *x, float *y, int64_t m, int count, int64_t n,
                          int64_t width, int64_t column, int32_t *sums) {
    const int64_t columns = padded_columns(w), left = columns - column, steps = (left < DEPTH ? left : DEPTH) / 4;
    const int last = left <= DEPTH;
    if (last && count == TILE_ROWS) {
        const int64_t at = m * w->rows + n;
        fetch_outputs(y + at, w->rows);
        fetch_outputs(w->gate ? w->gate + at : NULL, w->rows);
        fetch_outputs(w->residual ? w->residual + at : NULL, w->rows);
    }
    const uint8_t *rows = (const uint8_t *)x->codes + (column / DEPTH * x->rows + m) * DEPTH;
    multiply_tile(w->codes + n * columns + column * OUTPUTS, rows, steps, count, sums);
    if (last) store_rows(w, x, y, m, m + count, n, width, sums);
}

static void multiply(const Int8Weight *w, const Int8Rows *x, float *y, int64_t first, int64_t last) {
    const int64_t columns = padded_columns(w);
    int32_t sums[MOST_ROWS * OUTPUTS] __attribute__((aligned(64)));
    for (int64_t start = 0; start < x->rows; start += MOST_ROWS)
        for (int64_t n = first; n < last; n += OUTPUTS) {
            const int64_t stop = start + MOST_ROWS < x->rows ? start + MOST_ROWS : x->rows;
            const int64_t width = last - n < OUTPUTS ? last - n : OUTPUTS;
            memset(sums, 0, (stop - start) * OUTPUTS * sizeof(int32_t));
            for (int64_t column = 0; column < columns; column += DEPTH) {
                int32_t *to = sums;
                int64_t m = start;
                for (; m + TILE_ROWS <= stop; m += TILE_ROWS, to += TILE_ROWS * OUTPUTS)
                    multiply_rows(w, x, y, m, TILE_ROWS, n, width, column, to);
                for (; m + 4 <= stop; m += 4, to += 4 * OUTPUTS) multiply_rows(w, x, y, m, 4, n, width, column, to);
                for (; m < stop; m++, to += OUTPUTS) multiply_rows(w, x, y, m, 1, n, width, column, to);
            }
        }
}

const Int8Kernels int8_avx512 = {"avx512-vnni", has_avx512_vnni, 1, pack, round_rows, multiply,
                                  prepare_frames, attend};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
