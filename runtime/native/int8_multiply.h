/* Products of int8 by int8, in terms of one instruction set's registers (see nbits_multiply.h for those that it shares).
 * A file that includes this has defined besides:
 *   XCode         of a number of x
 *   X_ZERO, X_LEAST, X_MOST  the code of 0 in the middle of a row's codes, the least code and the most
 *   PLACE         where a column's weight stands among all columns
 *   INT8_ROWS     rows of x whose sums fit into the registers beside a tile's weights
 *   Signed        int8, 4 columns of LANES outputs, as they are multiplied
 *   load_signed, load_wide, store_wide   out of int8; out of, and into, WIDE bytes for each
 *   dot_x         sums of products of codes of x, 4 columns of 16, by weights
 *   load_ints, store_ints
 *   lesser, greater   of two registers of floats
 *
 * Outputs lie in lanes: of a tile of TILE outputs, one behind the other, dword j has 4 columns of each.
 */
#pragma once

#include "int8.h"
#include "nbits_common.h"

#include <math.h>

enum {
    INT8_AHEAD = 8192,    /* bytes: the hardware's prefetcher alone leaves half of the bandwidth unused */
    INT8_MOST_ROWS = 384, /* rows of x that stay in the second-level cache */
    FEW_INT8_ROWS = 4,    /* up to which weights come out of memory faster than they are multiplied */
};

/* ------------------------------------------------------------------------------------------------ rounding rows of x */

/* The scale of a row and the code of 0: 127 scales are its largest magnitude, or all codes its range, 0 in it. NaN where
 * a number is NaN or infinite, so that its products are. */
INLINE float int8_scale(const float *row, int64_t columns, int affine, int32_t *zero) {
    const float largest = largest_magnitude(row, columns);
    *zero = X_ZERO;
    if (!(largest < INFINITY)) return NAN;
    if (!affine) return largest / 127 > TINY ? largest / 127 : TINY;
    Floats low = splat(0), high = low;
    float ends[2][LANES], least = 0, most = 0;
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        low = lesser(low, load_floats(row + k));
        high = greater(high, load_floats(row + k));
    }
    store_floats(ends[0], low);
    store_floats(ends[1], high);
    for (int i = 0; i < LANES; i++) {
        least = ends[0][i] < least ? ends[0][i] : least;
        most = ends[1][i] > most ? ends[1][i] : most;
    }
    for (; k < columns; k++) {
        least = row[k] < least ? row[k] : least;
        most = row[k] > most ? row[k] : most;
    }
    const float scale = (most - least) / (X_MOST - X_LEAST);
    if (scale <= TINY) return TINY;
    if (!(scale < INFINITY)) return NAN;
    *zero = X_LEAST + (int32_t)lrintf(-least / scale);
    return scale;
}

static void round_int8(const Int8Weight *w, const float *x, const Int8Rows *to, int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
        const float *row = x + (m - first) * w->columns;
        int32_t zero;
        to->scales[m] = int8_scale(row, w->columns, w->affine, &zero);
        to->zeros[m] = zero;
        const float inverse = 1 / to->scales[m];
        for (int64_t column = 0; column < w->columns; column += DEPTH) {
            const int64_t left = w->columns - column, count = left < DEPTH ? left : DEPTH;
            XCode *restrict codes = (XCode *)to->codes + (column / DEPTH * to->rows + m) * DEPTH;
            for (int64_t k = 0; k < count; k++) {
                const int32_t code = (int32_t)__builtin_rintf(row[column + k] * inverse) + zero;
                codes[k] = (XCode)(code < X_LEAST ? X_LEAST : code > X_MOST ? X_MOST : code);
            }
            memset(codes + count, 0, (up_to_16(count) - count) * sizeof(XCode)); /* weights are 0 there */
        }
    }
}

/* ------------------------------------------------------------------------------------------------- laying weights out */

/* By columns on the outside: the source is read once, from its beginning to its end. */
static void pack_int8(const Int8Weight *w, const int8_t *from, int8_t *codes, int32_t *sums) {
    const int64_t rows = padded_rows(w), columns = padded_columns(w);
    memset(sums, 0, rows * sizeof(int32_t));
    for (int64_t column = 0; column < columns; column += 4)
        for (int64_t n = 0; n < rows; n += TILE) {
            int8_t four[4][TILE] = {{0}};
            const int64_t width = w->rows - n < TILE ? w->rows - n : TILE;
            for (int i = 0; i < 4 && column + i < w->columns && width > 0; i++) {
                if (width == TILE) memcpy(four[i], from + (column + i) * w->rows + n, TILE);
                else memcpy(four[i], from + (column + i) * w->rows + n, width);
            }
            int8_t *restrict to = codes + n * columns + column * TILE;
            for (int i = 0; i < TILE; i++) {
                for (int k = 0; k < 4; k++) to[i * 4 + PLACE(k)] = four[k][i];
            }
            for (int i = 0; i < TILE; i++) sums[n + i] += four[0][i] + four[1][i] + four[2][i] + four[3][i];
        }
}

/* -------------------------------------------------------------------------------------------------------- multiplying */

/* int8 as they are multiplied many times, `bytes` being a multiple of a register. */
INLINE void widen(const int8_t *from, int64_t bytes, int8_t *to) {
    for (int64_t i = 0; i < bytes; i += WIDTH) store_wide(to + i * WIDE, load_signed(from + i));
}

/* sums [count, TILE] += x [count, 16 × steps] by the tile, each of its weights being of `wide` bytes. */
INLINE void multiply_int8_tile(const int8_t *tile, const XCode *x, int64_t steps, int count, int wide, int32_t *sums) {
    Ints d[INT8_ROWS][TILE_REGISTERS];
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            d[i][t] = load_ints(sums + i * TILE + t * LANES);
    }
    for (int64_t j = 0; j < steps; j++, tile += 16 * TILE * wide, x += 16) {
        Columns columns[INT8_ROWS];
        UNROLL for (int i = 0; i < count; i++)
            columns[i] = load_columns((const int8_t *)(x + i * DEPTH));
        if (wide == 1 && count <= FEW_INT8_ROWS)
            UNROLL for (int64_t i = 0; i < 16 * TILE; i += LINE)
                __builtin_prefetch(tile + INT8_AHEAD + i, 0, 2);
        UNROLL for (int lane = 0; lane < 4; lane++) {
            Signed weights[TILE_REGISTERS];
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++) {
                const int8_t *from = tile + (lane * TILE_REGISTERS + t) * WIDTH * wide;
                weights[t] = wide == 1 ? load_signed(from) : load_wide(from);
            }
            UNROLL for (int i = 0; i < count; i++) {
                UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                    d[i][t] = dot_x(d[i][t], weights[t], columns[i], lane);
            }
        }
    }
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            store_ints(sums + i * TILE + t * LANES, d[i][t]);
    }
}

/* One row's outputs from n on, of which there are `width`. */
INLINE void store_int8_row(const Int8Weight *w, const Int8Rows *x, float *y, int64_t m, int64_t n, int64_t width,
                           const int32_t *restrict sums) {
    const int32_t zero = x->zeros[m];
    const float scale = x->scales[m];
    float out[TILE];
    for (int64_t i = 0; i < width; i++)
        out[i] = (float)(sums[i] - w->sums[n + i] * zero) * (w->scales[n + i] * scale);
    if (w->bias)
        for (int64_t i = 0; i < width; i++) out[i] += w->bias[n + i];
    if (w->quick_gelu)
        for (int64_t i = 0; i < width; i++) out[i] = out[i] / (1 + power_of_two(-1.702f * LOG2_E * out[i]));
    const int64_t at = m * w->rows + n;
    if (w->gate)
        for (int64_t i = 0; i < width; i++) out[i] *= silu(w->gate[at + i]);
    if (w->residual)
        for (int64_t i = 0; i < width; i++) out[i] += w->residual[at + i];
    memcpy(y + at, out, width * sizeof(float));
}

/* Where a piece of a tile of weights is: DEPTH columns or what is left of them, from `column` on, of outputs from n on. */
typedef struct {
    const int8_t *weights;
    int64_t n, width, column, steps;
    int last;
} Piece;

/* `count` rows from m on by a piece; behind the last one they are stored, while their sums are in the first-level cache. */
INLINE void multiply_int8_rows(const Int8Weight *w, const Int8Rows *x, float *y, const Piece *p, int64_t m, int count,
                               int wide, int32_t *sums) {
    const XCode *from = (const XCode *)x->codes + (p->column / DEPTH * x->rows + m) * DEPTH;
    multiply_int8_tile(p->weights, from, p->steps, count, wide, sums);
    for (int i = 0; i < count && p->last; i++) {
        if (p->width == TILE) store_int8_row(w, x, y, m + i, p->n, TILE, sums + i * TILE);
        else store_int8_row(w, x, y, m + i, p->n, p->width, sums + i * TILE);
    }
}

/* Rows [start, stop) by a tile. */
INLINE void fill_int8_tile(const Int8Weight *w, const Int8Rows *x, float *y, int64_t start, int64_t stop, int64_t n,
                           int64_t last, int wide) {
    int32_t sums[INT8_MOST_ROWS * TILE] __attribute__((aligned(64)));
    int8_t room[WIDE > 1 ? DEPTH * TILE * WIDE : 1] __attribute__((aligned(64)));
    const int64_t columns = padded_columns(w);
    memset(sums, 0, (stop - start) * TILE * sizeof(int32_t));
    for (int64_t column = 0; column < columns; column += DEPTH) {
        const int64_t left = columns - column, count = left < DEPTH ? left : DEPTH;
        Piece p = {w->codes + n * columns + column * TILE, n, last - n < TILE ? last - n : TILE, column, count / 16,
                   left <= DEPTH};
        int32_t *to = sums;
        int64_t m = start;
        if (wide > 1) {
            widen(p.weights, count * TILE, room);
            p.weights = room;
        }
        for (; m + INT8_ROWS <= stop; m += INT8_ROWS, to += INT8_ROWS * TILE)
            multiply_int8_rows(w, x, y, &p, m, INT8_ROWS, wide, to);
        if (INT8_ROWS > 4 && m + 4 <= stop) {
            multiply_int8_rows(w, x, y, &p, m, 4, wide, to);
            m += 4, to += 4 * TILE;
        }
        for (; m < stop; m++, to += TILE) multiply_int8_rows(w, x, y, &p, m, 1, wide, to);
    }
}

static void multiply_int8(const Int8Weight *w, const Int8Rows *x, float *y, int64_t first, int64_t last) {
    for (int64_t start = 0; start < x->rows; start += INT8_MOST_ROWS)
        for (int64_t n = first; n < last; n += TILE) {
            const int64_t stop = start + INT8_MOST_ROWS < x->rows ? start + INT8_MOST_ROWS : x->rows;
            if (WIDE > 1 && stop - start > FEW_INT8_ROWS) fill_int8_tile(w, x, y, start, stop, n, last, WIDE);
            else fill_int8_tile(w, x, y, start, stop, n, last, 1);
        }
}
