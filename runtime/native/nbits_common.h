/* Rounding rows of x in plain C, which a compiler turns into the instructions of the file that includes this. */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "compiler.h"
#include "nbits.h"

/* As whole numbers: the bits of floats without a sign are in the floats' order, and compilers vectorise only these. */
INLINE float largest_magnitude(const float *x, int64_t count) {
    int32_t largest = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t magnitude;
        memcpy(&magnitude, x + k, sizeof magnitude);
        magnitude &= INT32_MAX;
        largest = magnitude > largest ? magnitude : largest;
    }
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

/* Columns as int8, their largest magnitude being 127 × scale. Returns their sum. */
INLINE int32_t round_columns(const float *x, int count, float scale, int8_t *to) {
    const float inverse = scale > TINY ? 1 / scale : 0;
    int32_t sum = 0;
    for (int k = 0; k < count; k++) {
        to[k] = (int8_t)(int32_t)__builtin_rintf(x[k] * inverse);
        sum += to[k];
    }
    return sum;
}

INLINE void round_chunk(const Weight *w, const float *x, const Activations *to, int64_t row, int64_t chunk) {
    const int64_t first = chunk * CHUNK, block = first / w->block, left = w->columns - first;
    const float *scales = to->scales + row * to->padded + block;
    float last[CHUNK];
    int8_t *codes = to->codes + (chunk * to->rows + row) * CHUNK, plain[CHUNK];
    int32_t *sums = to->sums + (chunk * to->rows + row) * to->units;
    const int unit = CHUNK / to->units;
    const float *from = x + first;
    if (left < CHUNK) {
        memset(last, 0, sizeof last);
        from = memcpy(last, from, left * sizeof(float));
    }
    for (int u = 0; u < to->units; u++)
        sums[u] = round_columns(from + u * unit, unit, scales[u], plain + u * unit);
    if (w->bits == 8) {
        memcpy(codes, plain, CHUNK);
        return;
    }
    for (int k = 0; k < CHUNK / 2; k++) {
        codes[k] = plain[2 * k];
        codes[CHUNK / 2 + k] = plain[2 * k + 1];
    }
}

static inline void round_rows(const Weight *w, const float *x, const Activations *to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *from = x + (row - first) * w->columns;
        float *scales = to->scales + row * to->padded;
        memset(scales, 0, to->padded * sizeof(float));
        for (int64_t b = 0; b < w->blocks; b++) {
            const int64_t left = w->columns - b * w->block;
            scales[b] = largest_magnitude(from + b * w->block, left < w->block ? left : w->block) / 127;
        }
        for (int64_t chunk = 0; chunk < to->chunks; chunk++) round_chunk(w, from, to, row, chunk);
    }
}

typedef float Sixteen __attribute__((vector_size(64))); /* as registers of any width */

/* Sum of (x - mean)^power, power 1 or 2. */
INLINE float sum_of_powers(const float *x, int64_t count, float mean, int power) {
    Sixteen sums = {0};
    float sum = 0;
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) {
        Sixteen term;
        memcpy(&term, x + k, sizeof term);
        term -= mean;
        sums += power == 1 ? term : term * term;
    }
    for (; k < count; k++) sum += power == 1 ? x[k] - mean : (x[k] - mean) * (x[k] - mean);
    for (int i = 0; i < 16; i++) sum += sums[i];
    return sum;
}

static inline void normalize(const Norm *norm, const float *x, int64_t columns, float *restrict to) {
    const float count = (float)columns, mean = norm->bias ? sum_of_powers(x, columns, 0, 1) / count : 0;
    const float factor = 1 / __builtin_sqrtf(sum_of_powers(x, columns, mean, 2) / count + norm->epsilon);
    const float *weight = norm->weight, *bias = norm->bias;
    if (bias == NULL)
        for (int64_t k = 0; k < columns; k++) to[k] = x[k] * factor * weight[k];
    else
        for (int64_t k = 0; k < columns; k++) to[k] = (x[k] - mean) * factor * weight[k] + bias[k];
}

/* y × 2^whole, for numbers whose results are normal ones. */
INLINE float scaled_by_power(float y, float whole) {
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    bits += (uint32_t)(int32_t)whole << 23;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* 2^x within 2e-7 of itself, as a compiler can vectorise it; x beyond ±126 counts as that. */
INLINE float power_of_two(float x) {
    x = x < -126 ? -126 : x > 126 ? 126 : x;
    const float whole = __builtin_rintf(x), f = x - whole;
    float y = 1.5403530e-4f; /* the Taylor series of 2^f */
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1;
    return scaled_by_power(y, whole);
}

/* x / (1 + e^-x) */
INLINE float silu(float x) { return x / (1 + power_of_two(-1.44269504f * x)); }

static inline void gate_and_add(const float *restrict gate, const float *restrict residual, float *restrict y,
                                int64_t count) {
    if (gate != NULL)
        for (int64_t i = 0; i < count; i++) y[i] *= silu(gate[i]);
    if (residual != NULL)
        for (int64_t i = 0; i < count; i++) y[i] += residual[i];
}
