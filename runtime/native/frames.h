/* Frames that attend: where their rows are, their keys and their queries, which the instruction sets share.
 *
 * A file that includes this has defined XCode, X_ZERO and PLACE (see int8_multiply.h), and
 *   round_head   int8 codes of a head's numbers, as XCode, and their scale
 */
#pragma once

#include <stdlib.h>
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

/* A head's keys, and what their scores are multiplied with and added to. 0: no memory */
static int prepare_keys(const Attention *a, int64_t head) {
    const int64_t padded = padded_dim(a), room = padded_length(a);
    uint8_t *keys = a->keys + head * room * padded;
    float *scales = a->key_scales + head * room, *limits = a->key_limits + head * room;
    float mean[MOST_DIM], row[MOST_DIM], beyond = 0; /* 0, or NaN where a number of the keys is NaN or infinite */
    float *rotated = aligned_alloc(64, a->length * padded * sizeof(float));
    XCode codes[MOST_DIM];
    if (rotated == NULL) return 0;
    rotate_keys(a, head, rotated, mean);
    for (int64_t i = 0; i < padded; i++) beyond += mean[i] - mean[i];
    memset(keys, X_ZERO, room * padded);
    for (int64_t n = 0; n < room; n++) {
        scales[n] = 0, limits[n] = (n < a->length ? 0 : UNSEEN) + beyond;
        if (n >= a->length) continue;
        for (int64_t i = 0; i < padded; i++) row[i] = rotated[n * padded + i] - mean[i];
        scales[n] = round_head(row, padded, codes);
        uint8_t *to = keys + n / KEYS * KEYS * padded + n % KEYS * 4;
        for (int64_t i = 0; i < padded; i += 4) {
            uint8_t four[4];
            for (int k = 0; k < 4; k++) four[PLACE(k)] = (uint8_t)(codes[i + k] + X_ZERO);
            memcpy(to + i * KEYS, four, 4);
        }
    }
    free(rotated);
    return 1;
}

/* A block of queries, and what has been seen of their keys so far. */
typedef struct {
    XCode codes[QUERIES][MOST_DIM];
    int32_t offsets[QUERIES]; /* -X_ZERO × the sum of the codes: what X_ZERO in every code of the keys adds */
    float scales[QUERIES];    /* with the softmax's own, and to base 2 */
    float largest[QUERIES], totals[QUERIES];
    float sums[QUERIES][MOST_DIM];
} Queries;

static void open_queries(const Attention *a, int64_t head, int64_t first, int64_t count, Queries *q) {
    const int64_t padded = padded_dim(a), frame = head / a->heads;
    for (int64_t m = 0; m < QUERIES; m++) {
        float row[MOST_DIM] = {0};
        if (m < count) {
            fetch_row(a, head, first + m + ROWS_AHEAD, 0);
            rotate_row(a, head_row(a, head, first + m, 0), frame * a->length + first + m, a->scale * LOG2_E, row);
        }
        q->scales[m] = round_head(row, padded, q->codes[m]);
        q->offsets[m] = 0;
        for (int64_t i = 0; i < padded; i++) q->offsets[m] -= X_ZERO * (int8_t)q->codes[m][i];
        q->largest[m] = UNSEEN, q->totals[m] = 0;
        memset(q->sums[m], 0, padded * sizeof(float));
    }
}

/* What was seen, into the output. */
static void close_queries(const Attention *a, int64_t head, int64_t first, int64_t count, const Queries *q) {
    for (int64_t m = 0; m < count; m++) {
        float *out = a->out + (head / a->heads * a->length + first + m) * a->heads * a->dim + head % a->heads * a->dim;
        for (int64_t i = 0; i < a->dim; i++) out[i] = q->sums[m][i] / q->totals[m];
    }
}
