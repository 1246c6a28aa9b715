/* AVX-512 with VNNI (Intel since Ice Lake, AMD since Zen 4). */
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "nbits.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
    AHEAD = 8192,       /* bytes: what the hardware's prefetcher does by itself leaves half of the bandwidth unused */
    TILE = 32,          /* outputs of one tile: two registers */
    TILE_ROWS = 12,     /* rows of x whose sums fit into the registers beside them */
    MOST_ROWS = 384,    /* rows of x that stay in the second-level cache beside their outputs */
    FEW_ROWS = 6,       /* up to these, laying out a tile costs more than it saves */
};

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

/* ---------------------------------------------------------------------------------------------- rounding rows of x */

/* 16 columns as int8, their largest magnitude being 127 / inverse. */
INLINE __m128i round_16(const float *x, __mmask16 mask, __m512 inverse) {
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), inverse)));
}

INLINE __mmask16 first_of_16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

static void round_row(const Weight *w, const float *x, const Activations *to, int64_t row) {
    float *scales = to->scales + row * to->padded, *totals = to->totals + row * to->padded;
    memset(scales, 0, to->padded * sizeof(float));
    memset(totals, 0, to->padded * sizeof(float));
    for (int64_t b = 0; b < w->blocks; b++) {
        __m512 largest = _mm512_setzero_ps();
        const int64_t start = b * w->block, stop = start + w->block < w->columns ? start + w->block : w->columns;
        for (int64_t k = start; k < stop; k += 16)
            largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_of_16(stop - k), x + k)));
        scales[b] = _mm512_reduce_max_ps(largest) / 127;
    }
    for (int64_t c = 0; c < to->chunks; c++) {
        int8_t *out = to->codes + (c * to->rows + row) * CHUNK;
        int32_t *sums = to->sums + (c * to->rows + row) * to->units;
        const int unit = CHUNK / to->units;
        int8_t plain[CHUNK] __attribute__((aligned(64)));
        for (int u = 0; u < to->units; u++) {
            const int64_t block = (c * CHUNK + u * unit) / w->block;
            const float scale = scales[block];
            const __m512 inverse = _mm512_set1_ps(scale > TINY ? 1 / scale : 0);
            __m512i sum = _mm512_setzero_si512();
            for (int k = u * unit; k < (u + 1) * unit; k += 16) {
                const int64_t column = c * CHUNK + k;
                const __mmask16 mask = first_of_16(w->columns - column);
                const __m128i codes = round_16(mask ? x + column : x, mask, inverse);
                _mm_store_si128((__m128i *)(plain + k), codes);
                sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(codes));
            }
            sums[u] = _mm512_reduce_add_epi32(sum);
            totals[block] += (float)sums[u];
        }
        if (w->bits == 8) {
            memcpy(out, plain, CHUNK);
            continue;
        }
        for (int half = 0; half < 2; half++) { /* 64 columns: even ones to the first half of the chunk, odd to the second */
            const __m512i pairs = _mm512_load_si512(plain + half * 64);
            _mm256_storeu_si256((__m256i *)(out + half * 32), _mm512_cvtepi16_epi8(pairs));
            _mm256_storeu_si256((__m256i *)(out + 64 + half * 32), _mm512_cvtepi16_epi8(_mm512_srli_epi16(pairs, 8)));
        }
    }
}

static void round_rows(const Weight *w, const float *x, const Activations *to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) round_row(w, x + row * w->columns, to, row);
}

/* ------------------------------------------------------------------------ few rows of x: one output after the other */

/* Factors of the blocks that one register's 16 sums are of: 1, 2 or 4 numbers, each in as many lanes. */
INLINE __m512 spread(const float *factors, int blocks) {
    if (blocks == 1) return _mm512_set1_ps(factors[0]);
    const __m512i lanes = blocks == 2 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                                      : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(factors)));
}

INLINE __m512 accumulate(__m512 sum, __m512i products, __m512 factors) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factors, sum);
}

/* One chunk: v0 and v1 are its codes as bytes, against the two halves of a row of x. */
INLINE __m512 add_chunk(__m512 sum, __m512i v0, __m512i v1, const int8_t *x, const float *factors, int bits, int units) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i d = _mm512_dpbusd_epi32(zero, v0, _mm512_loadu_si512(x));
    if (bits == 4 || units == 1)
        return accumulate(sum, _mm512_dpbusd_epi32(d, v1, _mm512_loadu_si512(x + 64)), spread(factors, units));
    sum = accumulate(sum, d, spread(factors, units / 2));
    d = _mm512_dpbusd_epi32(zero, v1, _mm512_loadu_si512(x + 64));
    return accumulate(sum, d, spread(factors + units / 2, units / 2));
}

/* Factors of every block of one output, scale of the weight times scale of x, and what the zero points take away. */
INLINE __m512 block_factors(const Weight *w, const Activations *x, int64_t n, int64_t m, float *factors) {
    const float *scales = w->scales + n * w->blocks;
    const float *rounded = x->scales + m * x->padded, *totals = x->totals + m * x->padded;
    const __m512 middle = _mm512_set1_ps(w->bits == 4 ? 8 : 128);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t b = 0; b < w->blocks; b += 16) {
        const __mmask16 mask = first_of_16(w->blocks - b);
        const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scales + b), _mm512_loadu_ps(rounded + b));
        _mm512_storeu_ps(factors + b, factor);
        __m512 zeros = middle;
        if (w->zeros != NULL) {
            float each[16];
            for (int i = 0; i < 16; i++) each[i] = b + i < w->blocks ? (float)weight_zero(w, n, b + i) : 0;
            zeros = _mm512_loadu_ps(each);
        }
        sum = _mm512_fnmadd_ps(factor, _mm512_mul_ps(zeros, _mm512_loadu_ps(totals + b)), sum);
    }
    return sum;
}

INLINE void few_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, float *factors,
                     int bits, int units, int count) {
    const int64_t bytes = weight_row_bytes(w), step = CHUNK * bits / 8, whole = bytes / step;
    const int64_t chunks_of_block = w->block > CHUNK ? w->block / CHUNK : 1;
    const __m512i low = _mm512_set1_epi8(15);
    const __mmask64 rest = (1ull << bytes % step % 64) - 1;
    for (int64_t n = first; n < last; n++) {
        const uint8_t *p = w->codes + n * bytes;
        __m512 sums[FEW_ROWS];
        UNROLL for (int i = 0; i < count; i++)
            sums[i] = block_factors(w, x, n, i, factors + i * x->padded);
        for (int64_t c = 0; c < x->chunks; c++, p += step) {
            __m512i v0, v1;
            if (c < whole) {
                _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T1);
                v0 = _mm512_loadu_si512(p);
                if (bits == 8) {
                    _mm_prefetch((const char *)p + AHEAD + 64, _MM_HINT_T1);
                    v1 = _mm512_loadu_si512(p + 64);
                }
            } else if (bits == 4) {
                v0 = _mm512_maskz_loadu_epi8(rest, p);
            } else {
                const int long_rest = bytes % step >= 64;
                v0 = _mm512_maskz_loadu_epi8(long_rest ? ~0ull : rest, p);
                v1 = _mm512_maskz_loadu_epi8(long_rest ? rest : 0, p + 64);
            }
            if (bits == 4) {
                v1 = _mm512_and_si512(_mm512_srli_epi16(v0, 4), low);
                v0 = _mm512_and_si512(v0, low);
            }
            const int64_t block = units > 1 ? c * units : c / chunks_of_block;
            UNROLL for (int i = 0; i < count; i++)
                sums[i] = add_chunk(sums[i], v0, v1, x->codes + (c * x->rows + i) * CHUNK,
                                    factors + i * x->padded + block, bits, units);
        }
        UNROLL for (int i = 0; i < count; i++)
            y[i * w->rows + n] = _mm512_reduce_add_ps(sums[i]) + (w->bias ? w->bias[n] : 0);
    }
}

/* ----------------------------------------------------------------- many rows of x: tiles of 32 outputs by 12 rows */

/* Dwords j of 16 rows of codes, `stride` bytes apart, as registers of their own: out[j]. */
INLINE void transpose(const uint8_t *from, int64_t stride, __mmask64 mask, int64_t rows, __m512i *out) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) {
        a[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, from + i * stride) : _mm512_setzero_si512();
    }
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) { /* a[i + j]: dwords j, j + 4, j + 8, j + 12 of rows i to i + 3 */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88),
                      odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        out[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        out[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        out[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        out[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

/* A chunk of 16 outputs: [32 steps of 4 columns][TILE / 16] registers, of which this fills one column. */
INLINE void lay_out(const Weight *w, int64_t n, int64_t chunk, int bits, __m512i *tile) {
    const int64_t bytes = weight_row_bytes(w), rows = w->rows - n < 16 ? w->rows - n : 16;
    const __m512i low = _mm512_set1_epi8(15);
    const int registers = bits == 4 ? 1 : 2;
    for (int r = 0; r < registers; r++) {
        const int64_t at = chunk * CHUNK * bits / 8 + r * 64, left = bytes - at;
        const uint8_t *from = w->codes + n * bytes + at;
        const __mmask64 mask = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
        __m512i parts[16];
        transpose(from, bytes, mask, rows, parts);
        for (int i = 0; i < 16; i++) _mm_prefetch((const char *)from + (i + TILE) * bytes, _MM_HINT_T0);
        if (bits == 8) {
            for (int j = 0; j < 16; j++) tile[(r * 16 + j) * 2] = parts[j];
        } else {
            for (int j = 0; j < 16; j++) {
                tile[j * 2] = _mm512_and_si512(parts[j], low);
                tile[(16 + j) * 2] = _mm512_and_si512(_mm512_srli_epi16(parts[j], 4), low);
            }
        }
    }
}

typedef struct {
    __m512i codes[2 * CHUNK / 4];
    __m512 scales[4][2]; /* of a unit, for 2 × 16 outputs */
    __m512i zeros[4][2];
} Tile;

static void lay_out_tile(const Weight *w, int64_t n, int64_t chunk, int units, Tile *tile) {
    for (int half = 0; half < 2; half++) {
        const int64_t start = n + half * 16;
        if (start >= w->rows) {
            for (int j = 0; j < CHUNK / 4; j++) tile->codes[2 * j + half] = _mm512_setzero_si512();
        } else if (w->bits == 4) {
            lay_out(w, start, chunk, 4, tile->codes + half);
        } else {
            lay_out(w, start, chunk, 8, tile->codes + half);
        }
        for (int u = 0; u < units; u++) {
            float scales[16] = {0};
            int32_t zeros[16] = {0};
            const int64_t block = (chunk * CHUNK + u * (CHUNK / units)) / w->block;
            for (int i = 0; i < 16 && start + i < w->rows && block < w->blocks; i++) {
                scales[i] = w->scales[(start + i) * w->blocks + block];
                zeros[i] = weight_zero(w, start + i, block);
            }
            tile->scales[u][half] = _mm512_loadu_ps(scales);
            tile->zeros[u][half] = _mm512_loadu_si512(zeros);
        }
    }
}

/* sums [rows, TILE] += one chunk of `count` rows of x by the tile. */
INLINE void multiply_tile(const Tile *tile, const Weight *w, const Activations *x, int64_t chunk, int64_t m, int count,
                          float *sums, int bits, int units) {
    const int8_t *codes = x->codes + (chunk * x->rows + m) * CHUNK;
    const int32_t *totals = x->sums + (chunk * x->rows + m) * units;
    for (int u = 0; u < units; u++) {
        __m512i d[TILE_ROWS][2];
        UNROLL for (int i = 0; i < count; i++) {
            const __m512i total = _mm512_set1_epi32(-totals[i * units + u]);
            d[i][0] = _mm512_mullo_epi32(total, tile->zeros[u][0]);
            d[i][1] = _mm512_mullo_epi32(total, tile->zeros[u][1]);
        }
        /* A unit is `runs` stretches of dwords of the chunk: of 4-bit codes, some of the even and some of the odd columns. */
        const int runs = bits == 4 ? 2 : 1, length = CHUNK / 4 / units / runs;
        for (int run = 0; run < runs; run++) {
            const int from = run * (CHUNK / 8) + u * length;
            for (int j = from; j < from + length; j++) {
                const __m512i v0 = tile->codes[2 * j], v1 = tile->codes[2 * j + 1];
                UNROLL for (int i = 0; i < count; i++) {
                    int32_t four;
                    memcpy(&four, codes + i * CHUNK + 4 * j, 4);
                    const __m512i a = _mm512_set1_epi32(four);
                    d[i][0] = _mm512_dpbusd_epi32(d[i][0], v0, a);
                    d[i][1] = _mm512_dpbusd_epi32(d[i][1], v1, a);
                }
            }
        }
        const int64_t block = (chunk * CHUNK + u * (CHUNK / units)) / w->block;
        UNROLL for (int i = 0; i < count; i++) {
            const __m512 scale = _mm512_set1_ps(x->scales[(m + i) * x->padded + block]);
            float *out = sums + i * TILE;
            for (int half = 0; half < 2; half++)
                _mm512_store_ps(out + half * 16,
                                _mm512_fmadd_ps(_mm512_cvtepi32_ps(d[i][half]), _mm512_mul_ps(scale, tile->scales[u][half]),
                                                _mm512_load_ps(out + half * 16)));
        }
    }
}

INLINE void many_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits, int units) {
    const int64_t room = x->rows < MOST_ROWS ? x->rows : MOST_ROWS;
    float *sums = aligned_alloc(64, room * TILE * sizeof(float));
    Tile tile;
    for (int64_t start = 0; start < x->rows; start += MOST_ROWS)
        for (int64_t n = first; n < last; n += TILE) {
            const int64_t stop = start + MOST_ROWS < x->rows ? start + MOST_ROWS : x->rows;
            memset(sums, 0, (stop - start) * TILE * sizeof(float));
            for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
                lay_out_tile(w, n, chunk, units, &tile);
                int64_t m = start;
                for (; m + TILE_ROWS <= stop; m += TILE_ROWS)
                    multiply_tile(&tile, w, x, chunk, m, TILE_ROWS, sums + (m - start) * TILE, bits, units);
                for (; m + 4 <= stop; m += 4)
                    multiply_tile(&tile, w, x, chunk, m, 4, sums + (m - start) * TILE, bits, units);
                for (; m < stop; m++)
                    multiply_tile(&tile, w, x, chunk, m, 1, sums + (m - start) * TILE, bits, units);
            }
            const int64_t width = last - n < TILE ? last - n : TILE;
            for (int64_t m = start; m < stop; m++)
                for (int half = 0; half < 2; half++) {
                    const __mmask16 mask = first_of_16(width - half * 16);
                    __m512 out = _mm512_load_ps(sums + (m - start) * TILE + half * 16);
                    if (w->bias) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, w->bias + n + half * 16));
                    _mm512_mask_storeu_ps(y + m * w->rows + n + half * 16, mask, out);
                }
        }
    free(sums);
}

/* ------------------------------------------------------------------------------------------------------ by format */

INLINE void multiply_as(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits, int units) {
    if (x->rows > FEW_ROWS) {
        many_rows(w, x, y, first, last, bits, units);
        return;
    }
    float *factors = malloc(x->rows * x->padded * sizeof(float));
    switch (x->rows) { /* counts that the compiler knows keep the sums in registers */
    case 1: few_rows(w, x, y, first, last, factors, bits, units, 1); break;
    case 2: few_rows(w, x, y, first, last, factors, bits, units, 2); break;
    case 3: few_rows(w, x, y, first, last, factors, bits, units, 3); break;
    case 4: few_rows(w, x, y, first, last, factors, bits, units, 4); break;
    case 5: few_rows(w, x, y, first, last, factors, bits, units, 5); break;
    default: few_rows(w, x, y, first, last, factors, bits, units, FEW_ROWS);
    }
    free(factors);
}

static void multiply(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last) {
    if (w->bits == 4 && x->units == 1) multiply_as(w, x, y, first, last, 4, 1);
    if (w->bits == 4 && x->units == 2) multiply_as(w, x, y, first, last, 4, 2);
    if (w->bits == 4 && x->units == 4) multiply_as(w, x, y, first, last, 4, 4);
    if (w->bits == 8 && x->units == 1) multiply_as(w, x, y, first, last, 8, 1);
    if (w->bits == 8 && x->units == 2) multiply_as(w, x, y, first, last, 8, 2);
    if (w->bits == 8 && x->units == 4) multiply_as(w, x, y, first, last, 8, 4);
}

const Kernels nbits_avx512 = {"avx512-vnni", supported, round_rows, multiply};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
