/* Where the rows of frames are that attend, and how they are rotated: what the instruction sets share. */
#pragma once

#include <string.h>

#include "int8.h"
#include "rotate.h"

enum { ROWS_AHEAD = 8, MOST_DIM = 128 };

static const float *head_row(const Attention *a, int64_t head, int64_t row, int part) {
    const int64_t frame = head / a->heads, width = a->heads * a->dim;
    return a->qkv + ((frame * a->length + row) * 3 + part) * width + head % a->heads * a->dim;
}

/* Rows of one head lie far from each other: the hardware's prefetcher sees no stream in them. */
static void fetch_row(const Attention *a, int64_t head, int64_t row, int part) {
    const char *from = (const char *)head_row(a, head, row, part);
    for (int64_t i = 0; i < a->dim * (int64_t)sizeof(float); i += 64) __builtin_prefetch(from + i, 0, 3);
}

/* One head's row of q or k, rotated and multiplied. */
static void rotate_row(const Attention *a, const float *restrict x, int64_t position, float factor,
                       float *restrict out) {
    const int64_t half = a->dim / 2;
    rotate(x, a->cosine + position * half, a->sine + position * half, half, factor, out);
}

/* All of a head's keys [length, padded dim], rotated, and their mean. */
static void rotate_keys(const Attention *a, int64_t head, float *rotated, float *restrict mean) {
    const int64_t padded = padded_dim(a), first = head / a->heads * a->length;
    const float share = 1 / (float)a->length;
    memset(rotated, 0, a->length * padded * sizeof(float));
    memset(mean, 0, padded * sizeof(float));
    for (int64_t n = 0; n < a->length; n++) {
        float *restrict row = rotated + n * padded;
        fetch_row(a, head, n + ROWS_AHEAD, 1);
        rotate_row(a, head_row(a, head, n, 1), first + n, 1, row);
        for (int64_t i = 0; i < padded; i++) mean[i] += row[i] * share;
    }
}
