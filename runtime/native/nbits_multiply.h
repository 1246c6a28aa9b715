/* The products, in terms of one instruction set's registers. A file that includes this has defined before:
 *   LANES           32-bit numbers of a register
 *   TILE_REGISTERS  of outputs in a tile
 *   TILE_ROWS       rows of x whose sums fit into the registers beside them
 *   TOGETHER        outputs that few rows are multiplied by at a time
 *   OFFSET          what whole_codes takes away from codes of 8 bits
 *   Bytes, Ints, Floats, Columns   registers; the last is 16 columns of a row of x, or where they are
 *   load_bytes, load_columns, load_floats, load_first_floats (zeros behind the first `count`), store_floats, splat
 *   in_register     GCC would load a number again for every instruction that takes it from memory
 *   low_codes, high_codes, whole_codes   codes out of bytes
 *   begin, dot, dot_lane, finish   sums of products, at most 8 of `dot` between begin and finish
 *   first_sums      a number for each block that one register's sums are of, in the block's first lane, else 0
 *   zero_products   minus a sum of x, times the zero points
 *   to_floats, sum_of_lanes, and sums_of_lanes of four registers
 *   spread          factors of the blocks that one register's sums are of, each in as many lanes
 *   transpose       dwords j of LANES rows as registers of their own
 */
#include "nbits_common.h"

enum {
    AHEAD = 8192,    /* bytes: what the hardware's prefetcher does by itself leaves half of the bandwidth unused */
    LINE = 64,       /* bytes that one prefetch brings */
    MOST_ROWS = 384, /* rows of x that stay in the second-level cache beside their outputs */
    FEW_ROWS = 6,    /* up to these, laying out a tile costs more than it saves */
    FEW_BLOCKS = 1024, /* of a row, padded: up to these, factors of few rows have room on the stack */
    WIDTH = 4 * LANES,
    REGISTERS = CHUNK / WIDTH,
    TILE = TILE_REGISTERS * LANES,
};

/* ---------------------------------------------------------------- few rows of x: one or two outputs after the other */

/* Of outputs that are taken together. */
typedef struct {
    float *factors;       /* [outputs, rows, padded blocks] */
    int32_t *zeros;       /* of the first output, as zero_sums leaves them */
    int64_t next_zeros;   /* 0: the same for all */
} Room;

/* What the zero points take away from the sums of one output, which begin with it: [chunks, rows, units]. Without zero
 * points it is the same for all outputs. */
OUT_OF_LINE void zero_sums(const Weight *w, const Activations *x, int64_t n, int32_t *restrict to) {
    const int64_t units = x->units == 1 ? w->block / CHUNK : 1; /* of a block */
    const int offset = w->bits == 8 ? OFFSET : 0;
    int64_t block = 0, left = units;
    for (int64_t c = 0; c < x->chunks; c++)
        for (int u = 0; u < x->units; u++) {
            const int32_t zero = block < w->blocks ? weight_zero(w, n, block) - offset : 0;
            for (int64_t i = c * x->rows * x->units + u; i < (c + 1) * x->rows * x->units; i += x->units)
                to[i] = -zero * x->sums[i];
            if (--left == 0) block++, left = units;
        }
}

/* Factors of every block of one output: scale of the weight times scale of x. */
INLINE void block_factors(const Weight *w, const Activations *x, int64_t n, int64_t m, float *factors) {
    const float *scales = w->scales + n * w->blocks, *rounded = x->scales + m * x->padded;
    for (int64_t b = 0; b < w->blocks; b += LANES)
        store_floats(factors + b, load_first_floats(scales + b, w->blocks - b) * load_floats(rounded + b));
}

/* Of 4-bit codes, the low ones of every byte come first, as in the rows of x. */
INLINE void load_chunk(const uint8_t *from, Bytes *codes, int bits) {
    UNROLL for (int i = 0; i < REGISTERS * bits / 8; i++) {
        const Bytes bytes = load_bytes(from + i * WIDTH);
        codes[i] = bits == 4 ? low_codes(bytes) : whole_codes(bytes);
        if (bits == 4) codes[REGISTERS / 2 + i] = high_codes(bytes);
    }
}

/* sum + products of a chunk of codes and of x, both in registers. zeros, factors: of the chunk's units. */
INLINE Floats multiply_chunk(Floats sum, const Bytes *codes, const Bytes *x, const int32_t *zeros,
                             const float *factors, int bits, int units) {
    const int pieces = REGISTERS * bits / 8; /* registers of bytes, in the order of the columns */
    const int together = units < pieces ? pieces / units : 1, blocks = units < pieces ? 1 : units / pieces;
    UNROLL for (int i = 0; i < pieces; i += together) {
        const Ints first = first_sums(zeros + i * units / pieces, blocks);
        Ints d = begin(first, bits);
        UNROLL for (int j = i; j < i + together; j++) {
            d = dot(d, codes[j], x[j], bits);
            if (bits == 4) d = dot(d, codes[pieces + j], x[pieces + j], bits);
        }
        sum = sum + to_floats(finish(first, d, bits)) * spread(factors + i * units / pieces, blocks);
    }
    return sum;
}

OUT_OF_LINE const uint8_t *padded_chunk(uint8_t *to, const uint8_t *from, int64_t bytes) {
    memset(to, 0, CHUNK);
    return memcpy(to, from, bytes);
}

/* Of `count` rows and `together` outputs, whose codes meet each register of x that was loaded. */
INLINE void some_outputs(const Weight *w, const Activations *x, float *y, int64_t n, const Room *room, int bits,
                         int units, int count, int together) {
    const int64_t bytes = weight_row_bytes(w), step = CHUNK * bits / 8, whole = bytes / step;
    const int64_t chunks_of_block = units == 1 ? w->block / CHUNK : 1;
    const uint8_t *p = w->codes + n * bytes;
    uint8_t rest[CHUNK];
    Floats sums[TOGETHER * FEW_ROWS + 3];
    UNROLL for (int s = 0; s < together * count + 3; s++)
        sums[s] = splat(0);
    int64_t block = 0, left = chunks_of_block;
    for (int64_t c = 0; c < x->chunks; c++, p += step) {
        Bytes codes[TOGETHER][REGISTERS];
        UNROLL for (int o = 0; o < together; o++) {
            UNROLL for (int i = 0; i < step; i += LINE)
                __builtin_prefetch((const char *)p + o * bytes + AHEAD + i, 0, 2);
            load_chunk(c < whole ? p + o * bytes : padded_chunk(rest, p + o * bytes, bytes % step), codes[o], bits);
        }
        UNROLL for (int i = 0; i < count; i++) {
            Bytes columns[REGISTERS];
            UNROLL for (int j = 0; j < REGISTERS; j++)
                columns[j] = in_register(load_bytes(x->codes + (c * count + i) * CHUNK + j * WIDTH));
            UNROLL for (int o = 0; o < together; o++)
                sums[i * together + o] = multiply_chunk(sums[i * together + o], codes[o], columns,
                                                        room->zeros + o * room->next_zeros + (c * count + i) * units,
                                                        room->factors + (o * count + i) * x->padded + block, bits,
                                                        units);
        }
        if (--left == 0) block += units, left = chunks_of_block;
    }
    UNROLL for (int s = 0; s < together * count; s += 4) {
        float four[4];
        sums_of_lanes(sums + s, four);
        for (int i = s; i < s + 4 && i < together * count; i++)
            y[i / together * w->rows + n + i % together] = four[i - s] + (w->bias ? w->bias[n + i % together] : 0);
    }
}

/* One output at a time of one row: what counts there is how fast weights come out of memory, one behind the other. */
INLINE void few_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, const Room *room,
                     int bits, int units, int count) {
    const int pair = count > 1 ? TOGETHER : 1;
    for (int64_t n = first; n < last; n += pair) {
        for (int o = 0; o < pair && n + o < last; o++) {
            if (n + o == first || w->zeros != NULL) zero_sums(w, x, n + o, room->zeros + o * room->next_zeros);
            for (int i = 0; i < count; i++) block_factors(w, x, n + o, i, room->factors + (o * count + i) * x->padded);
        }
        if (n + pair <= last) some_outputs(w, x, y, n, room, bits, units, count, pair);
        else some_outputs(w, x, y, n, room, bits, units, count, 1);
    }
}

/* ------------------------------------------------------------------- many rows of x: tiles of outputs by rows of x */

typedef struct {
    Bytes codes[CHUNK / 4][TILE_REGISTERS]; /* 4 columns of each output */
    float scales[4][TILE] __attribute__((aligned(64))); /* of a unit */
    int32_t zeros[4][TILE] __attribute__((aligned(64)));
    int64_t block; /* of the first unit */
} Tile;

/* One register's outputs from n on: `tile->codes[..][column]`. */
INLINE void lay_out_codes(const Weight *w, int64_t n, int64_t chunk, int bits, Tile *tile, int column) {
    const int64_t bytes = weight_row_bytes(w), rows = w->rows - n;
    for (int r = 0; r < REGISTERS * bits / 8; r++) {
        const int64_t at = chunk * CHUNK * bits / 8 + r * WIDTH, left = bytes - at;
        const uint8_t *from = w->codes + n * bytes + at;
        uint8_t part[LANES][WIDTH];
        Bytes dwords[LANES];
        if (rows >= LANES && left >= WIDTH) {
            transpose(from, bytes, dwords);
            if (r * WIDTH % LINE == 0)
                for (int i = 0; i < LANES; i++) __builtin_prefetch((const char *)from + (i + TILE) * bytes, 0, 3);
        } else {
            memset(part, 0, sizeof part);
            for (int i = 0; i < LANES && i < rows && left > 0; i++)
                memcpy(part[i], from + i * bytes, left < WIDTH ? left : WIDTH);
            transpose(part[0], WIDTH, dwords);
        }
        for (int j = 0; j < LANES; j++) {
            tile->codes[r * LANES + j][column] = bits == 4 ? low_codes(dwords[j]) : whole_codes(dwords[j]);
            if (bits == 4) tile->codes[CHUNK / 8 + r * LANES + j][column] = high_codes(dwords[j]);
        }
    }
}

static void lay_out(const Weight *w, int64_t n, int64_t chunk, int units, Tile *tile) {
    for (int column = 0; column < TILE_REGISTERS; column++) {
        if (w->bits == 4) lay_out_codes(w, n + column * LANES, chunk, 4, tile, column);
        if (w->bits == 8) lay_out_codes(w, n + column * LANES, chunk, 8, tile, column);
    }
    const int offset = w->bits == 8 ? OFFSET : 0;
    tile->block = chunk * CHUNK / w->block;
    for (int u = 0; u < units; u++)
        for (int i = 0; i < TILE; i++) {
            const int there = n + i < w->rows && tile->block + u < w->blocks;
            tile->scales[u][i] = there ? w->scales[(n + i) * w->blocks + tile->block + u] : 0;
            tile->zeros[u][i] = there ? weight_zero(w, n + i, tile->block + u) - offset : 0;
        }
}

/* 32 columns, which of 4-bit codes are 16 of the even and 16 of the odd ones. */
INLINE void multiply_32(const Tile *tile, const int8_t *x, int group, int count, int bits,
                        Ints d[TILE_ROWS][TILE_REGISTERS]) {
    Ints sums[TILE_ROWS][TILE_REGISTERS];
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            sums[i][t] = begin(d[i][t], bits);
    }
    UNROLL for (int half = 0; half < 2; half++) {
        const int quad = bits == 4 ? half * (CHUNK / 32) + group : group * 2 + half;
        Columns columns[TILE_ROWS];
        UNROLL for (int i = 0; i < count; i++)
            columns[i] = load_columns(x + i * CHUNK + quad * 16);
        UNROLL for (int lane = 0; lane < 4; lane++) {
            const Bytes *codes = tile->codes[quad * 4 + lane];
            UNROLL for (int i = 0; i < count; i++) {
                UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                    sums[i][t] = dot_lane(sums[i][t], codes[t], columns[i], lane, bits);
            }
        }
    }
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            d[i][t] = finish(d[i][t], sums[i][t], bits);
    }
}

/* sums [count, TILE] += one chunk of rows of x from m on by the tile. */
INLINE void multiply_tile(const Tile *tile, const Activations *x, int64_t chunk, int64_t m, int count, float *sums,
                          int bits) {
    const int64_t row = chunk * x->rows + m;
    const int units = x->units, groups = CHUNK / 32 / units;
    for (int u = 0; u < units; u++) {
        Ints d[TILE_ROWS][TILE_REGISTERS];
        UNROLL for (int i = 0; i < count; i++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                d[i][t] = zero_products(x->sums[(row + i) * units + u], tile->zeros[u] + t * LANES);
        }
        for (int group = u * groups; group < (u + 1) * groups; group++) {
            __asm__ volatile("" ::: "memory"); /* GCC would keep loads for the fourth group on, which never comes */
            multiply_32(tile, x->codes + row * CHUNK, group, count, bits, d);
        }
        UNROLL for (int i = 0; i < count; i++) {
            const Floats scale = splat(x->scales[(m + i) * x->padded + tile->block + u]);
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++) {
                float *to = sums + i * TILE + t * LANES;
                const Floats factor = scale * load_floats(tile->scales[u] + t * LANES);
                store_floats(to, load_floats(to) + to_floats(d[i][t]) * factor);
            }
        }
    }
}

/* y, rows [start, stop) of x by outputs [n, last), at most a tile of them. */
INLINE void fill_tile(const Weight *w, const Activations *x, float *y, int64_t start, int64_t stop, int64_t n,
                      int64_t last, float *sums, int bits) {
    Tile tile;
    memset(sums, 0, (stop - start) * TILE * sizeof(float));
    for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
        lay_out(w, n, chunk, x->units, &tile);
        float *to = sums;
        int64_t m = start;
        for (; m + TILE_ROWS <= stop; m += TILE_ROWS, to += TILE_ROWS * TILE)
            multiply_tile(&tile, x, chunk, m, TILE_ROWS, to, bits);
        for (; TILE_ROWS > 4 && m + 4 <= stop; m += 4, to += 4 * TILE)
            multiply_tile(&tile, x, chunk, m, 4, to, bits);
        for (; m < stop; m++, to += TILE)
            multiply_tile(&tile, x, chunk, m, 1, to, bits);
    }
    const int64_t width = last - n < TILE ? last - n : TILE;
    for (int64_t m = start; m < stop; m++)
        for (int64_t i = 0; i < width; i++)
            y[m * w->rows + n + i] = sums[(m - start) * TILE + i] + (w->bias ? w->bias[n + i] : 0);
}

static void many_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last) {
    float sums[MOST_ROWS * TILE] __attribute__((aligned(64)));
    for (int64_t start = 0; start < x->rows; start += MOST_ROWS) {
        const int64_t stop = start + MOST_ROWS < x->rows ? start + MOST_ROWS : x->rows;
        for (int64_t n = first; n < last; n += TILE) {
            if (w->bits == 4) fill_tile(w, x, y, start, stop, n, last, sums, 4);
            if (w->bits == 8) fill_tile(w, x, y, start, stop, n, last, sums, 8);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------ by format */

INLINE void few_rows_as(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits,
                        int units) {
    float factors[TOGETHER * FEW_ROWS * FEW_BLOCKS];
    int32_t zeros[TOGETHER * FEW_ROWS * FEW_BLOCKS];
    const Room room = {factors, zeros, w->zeros == NULL ? 0 : FEW_ROWS * FEW_BLOCKS};
    switch (x->rows) { /* counts that the compiler knows keep the sums in registers */
    case 1: few_rows(w, x, y, first, last, &room, bits, units, 1); break;
    case 2: few_rows(w, x, y, first, last, &room, bits, units, 2); break;
    case 3: few_rows(w, x, y, first, last, &room, bits, units, 3); break;
    case 4: few_rows(w, x, y, first, last, &room, bits, units, 4); break;
    case 5: few_rows(w, x, y, first, last, &room, bits, units, 5); break;
    default: few_rows(w, x, y, first, last, &room, bits, units, FEW_ROWS);
    }
}

static void multiply(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last) {
    if (x->rows > FEW_ROWS || x->padded > FEW_BLOCKS || x->chunks * x->units > FEW_BLOCKS) {
        many_rows(w, x, y, first, last);
    } else if (w->bits == 4) {
        if (x->units == 1) few_rows_as(w, x, y, first, last, 4, 1);
        if (x->units == 2) few_rows_as(w, x, y, first, last, 4, 2);
        if (x->units == 4) few_rows_as(w, x, y, first, last, 4, 4);
    } else {
        if (x->units == 1) few_rows_as(w, x, y, first, last, 8, 1);
        if (x->units == 2) few_rows_as(w, x, y, first, last, 8, 2);
        if (x->units == 4) few_rows_as(w, x, y, first, last, 8, 4);
    }
}
