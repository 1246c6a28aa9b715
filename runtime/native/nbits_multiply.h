/* The products, in terms of one instruction set's registers. A file that includes this has defined before:
 *   LANES           32-bit numbers of a register
 *   TILE_REGISTERS  of outputs in a tile
 *   TILE_ROWS       rows of x whose sums fit into the registers beside them
 *   FEW_ROWS        at most 6, whose sums of floats fit too
 *   MANY_UNPACKED   1: with more rows, codes are made bytes once and not for every TILE_ROWS rows
 *   OFFSET          what whole_codes takes away from codes of 8 bits
 *   Bytes, Ints, Floats, Columns   registers; the last is 16 columns of a row of x, or where they are
 *   load_bytes, store_bytes, load_columns, load_floats, load_halves, store_floats, splat, splat_ints
 *   low_codes, high_codes, whole_codes   codes out of bytes
 *   begin, dot_lane, finish   sums of products, at most 8 of `dot_lane` between begin and finish
 *   load_zeros      LANES zero points out of bytes
 *   zero_products   minus a sum of x, times zero points
 *   to_floats, and sum_of_lanes, which only attention needs
 *   transpose       dwords j of LANES rows as registers of their own
 *
 * Outputs lie in lanes, so that factors meet whole registers of sums, and nothing is added up across lanes. The file's
 * bytes are laid out for that once, while a model opens:
 *
 * Tiles of TILE outputs, one behind the other, each one stream of memory. Of a tile, for every block (for every chunk
 * where blocks are shorter): scales [units, TILE], of 16 bits where that is exact, else of 32; if there are any, uint8
 * zero points [units, TILE]; nothing up to a whole register; the block's chunks, dword j of each output
 * [CHUNK × bits / 32, TILE, 4]. Outputs behind the last and blocks behind a row's end are zeros.
 */
#include "nbits_common.h"

enum {
    AHEAD = 4096,    /* bytes: what the hardware's prefetcher does by itself leaves half of the bandwidth unused */
    LINE = 64,       /* bytes that one prefetch brings */
    MOST_ROWS = 384, /* rows of x that stay in the second-level cache beside their outputs */
    WIDTH = 4 * LANES,
    TILE = TILE_REGISTERS * LANES,
    MOST_UNITS = 4,
};

INLINE int64_t chunks_of_block(const Weight *w) { return w->block < CHUNK ? 1 : w->block / CHUNK; }
INLINE int64_t chunk_bytes(const Weight *w) { return CHUNK * w->bits / 8 * TILE; }

INLINE int64_t scale_bytes(const Weight *w) { return weight_units(w) * TILE * (w->half ? 2 : 4); }

/* Of factors before a block's codes. */
INLINE int64_t head_bytes(const Weight *w) {
    const int64_t bytes = scale_bytes(w) + (w->zeros == NULL ? 0 : weight_units(w) * TILE);
    return (bytes + WIDTH - 1) / WIDTH * WIDTH;
}

static int64_t tile_bytes(const Weight *w) {
    const int64_t heads = (weight_chunks(w) + chunks_of_block(w) - 1) / chunks_of_block(w);
    return heads * head_bytes(w) + weight_chunks(w) * chunk_bytes(w);
}

/* ------------------------------------------------------------------------------------------------------ laying out */

static void pack_head(const Weight *w, int64_t n, int64_t block, uint8_t *to) {
    uint8_t *zeros = to + scale_bytes(w);
    memset(to, 0, head_bytes(w));
    for (int64_t u = 0; u < weight_units(w) && block + u < w->blocks; u++)
        for (int64_t i = 0; i < TILE && n + i < w->rows; i++) {
            const float scale = w->scales[(n + i) * w->blocks + block + u];
            if (w->half) exact_half(scale, (uint16_t *)to + u * TILE + i);
            else ((float *)to)[u * TILE + i] = scale;
            if (w->zeros != NULL) zeros[u * TILE + i] = weight_zero(w, n + i, block + u);
        }
}

/* One register's outputs from n on, of one chunk. */
static void pack_codes(const Weight *w, int64_t n, int64_t chunk, uint8_t *to) {
    const int64_t bytes = weight_row_bytes(w), step = CHUNK * w->bits / 8, rows = w->rows - n;
    for (int64_t r = 0; r < step; r += WIDTH) {
        const int64_t at = chunk * step + r, left = bytes - at;
        const uint8_t *from = w->codes + n * bytes + at;
        uint8_t part[LANES][WIDTH];
        Bytes dwords[LANES];
        if (rows >= LANES && left >= WIDTH) {
            transpose(from, bytes, dwords);
        } else {
            memset(part, 0, sizeof part);
            for (int i = 0; i < LANES && i < rows && left > 0; i++)
                memcpy(part[i], from + i * bytes, left < WIDTH ? left : WIDTH);
            transpose(part[0], WIDTH, dwords);
        }
        for (int j = 0; j < LANES; j++) store_bytes(to + (r / 4 + j) * TILE_REGISTERS * WIDTH, dwords[j]);
    }
}

static void pack_tile(const Weight *w, int64_t tile, uint8_t *to) {
    for (int64_t chunk = 0; chunk < weight_chunks(w); chunk++, to += chunk_bytes(w)) {
        if (chunk % chunks_of_block(w) == 0) {
            pack_head(w, tile * TILE, chunk * CHUNK / w->block, to);
            to += head_bytes(w);
        }
        for (int t = 0; t < TILE_REGISTERS; t++) pack_codes(w, tile * TILE + t * LANES, chunk, to + t * WIDTH);
    }
}

/* ----------------------------------------------------------------------------------------------------- multiplying */

/* Where the products of one chunk are: rows of x from the first on, and the tile's part. */
typedef struct {
    const int8_t *x;       /* [rows, CHUNK] */
    const int32_t *x_sums; /* [rows, units] */
    const float *x_scales; /* [rows, x_stride], of the chunk's first block */
    int64_t x_stride;
    const float *scales;   /* [units, TILE] */
    const uint8_t *zeros;  /* [units, TILE], or NULL */
    const uint8_t *codes;  /* as they lie in memory, or as `unpack` leaves them */
} Chunk;

/* Of one block. Scales are copied out of the tile at once: read as they are wanted, behind their block's codes, they made
 * of one stream of memory two, which the hardware's prefetcher did not follow (1.5 times the time at blocks of 32). */
typedef struct {
    float scales[MOST_UNITS * TILE]; /* [units, TILE] */
    const uint8_t *zeros;            /* [units, TILE], or NULL */
} Factors;

/* Codes of a chunk are packed as they lie in memory, in so many bits; or bytes as `unpack` leaves them. */
enum { UNPACKED = 0 };

INLINE void fetch_ahead(const uint8_t *from, int64_t bytes) {
    UNROLL for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)from + AHEAD + i, 0, 3);
}

/* One register of outputs by four of the first 16 columns, and by four of the second: of 4-bit codes the low and the high
 * halves of the same bytes. */
INLINE void load_codes(const uint8_t *from, int packed, int t, Bytes *first, Bytes *second) {
    const Bytes bytes = load_bytes(from + t * WIDTH);
    if (packed == 4) {
        *first = low_codes(bytes);
        *second = high_codes(bytes);
    } else {
        const Bytes behind = load_bytes(from + (4 * TILE_REGISTERS + t) * WIDTH);
        *first = packed == 8 ? whole_codes(bytes) : bytes;
        *second = packed == 8 ? whole_codes(behind) : behind;
    }
}

/* 32 columns, which of 4-bit codes are 16 of the even and 16 of the odd ones. */
INLINE void multiply_32(const Chunk *c, int group, int count, int bits, int packed, int fetch,
                        Ints d[TILE_ROWS][TILE_REGISTERS]) {
    const int64_t bytes = (packed == UNPACKED ? 8 : packed) * 4 * TILE;
    const uint8_t *codes = c->codes + group * bytes;
    Ints sums[TILE_ROWS][TILE_REGISTERS];
    Columns first[TILE_ROWS], second[TILE_ROWS];
    if (fetch) fetch_ahead(codes, bytes);
    UNROLL for (int i = 0; i < count; i++) {
        const int8_t *x = c->x + i * CHUNK + group * (bits == 4 ? 16 : 32);
        first[i] = load_columns(x);
        second[i] = load_columns(x + (bits == 4 ? CHUNK / 2 : 16));
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            sums[i][t] = begin(d[i][t], bits);
    }
    UNROLL for (int lane = 0; lane < 4; lane++) {
        Bytes low[TILE_REGISTERS], high[TILE_REGISTERS];
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            load_codes(codes + lane * TILE_REGISTERS * WIDTH, packed, t, low + t, high + t);
        UNROLL for (int i = 0; i < count; i++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                sums[i][t] = dot_lane(sums[i][t], low[t], first[i], lane, bits);
        }
        UNROLL for (int i = 0; i < count; i++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                sums[i][t] = dot_lane(sums[i][t], high[t], second[i], lane, bits);
        }
    }
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            d[i][t] = finish(d[i][t], sums[i][t], bits);
    }
}

/* sums += count rows by one chunk of a tile. */
INLINE void multiply_chunk(const Chunk *c, int count, int bits, int units, int packed, int fetch,
                           Floats sums[TILE_ROWS][TILE_REGISTERS]) {
    const int groups = CHUNK / 32 / units, offset = bits == 8 ? OFFSET : 0;
    for (int u = 0; u < units; u++) {
        Ints d[TILE_ROWS][TILE_REGISTERS];
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++) {
            const Ints zeros = c->zeros ? load_zeros(c->zeros + u * TILE + t * LANES, offset)
                                        : splat_ints((bits == 4 ? 8 : 128) - offset);
            UNROLL for (int i = 0; i < count; i++)
                d[i][t] = zero_products(c->x_sums[i * units + u], zeros);
        }
        for (int group = u * groups; group < (u + 1) * groups; group++) {
            __asm__ volatile("" ::: "memory"); /* GCC would keep loads for the fourth group on, which never comes */
            multiply_32(c, group, count, bits, packed, fetch, d);
        }
        UNROLL for (int i = 0; i < count; i++) {
            const Floats scale = splat(c->x_scales[i * c->x_stride + u]);
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                sums[i][t] = sums[i][t] + to_floats(d[i][t]) * (scale * load_floats(c->scales + u * TILE + t * LANES));
        }
    }
}

/* The chunk of rows from m on, by a block's factors and what stands at `codes`. */
INLINE Chunk chunk_at(const Weight *w, const Activations *x, int64_t chunk, int64_t m, int units, const Factors *factors,
                      const uint8_t *codes) {
    const int64_t row = chunk * x->rows + m;
    return (Chunk){x->codes + row * CHUNK,
                   x->sums + row * units,
                   x->scales + m * x->padded + chunk * CHUNK / w->block,
                   x->padded,
                   factors->scales,
                   factors->zeros,
                   codes};
}

/* A block's factors; `at` moves on to its codes. */
INLINE void next_head(const Weight *w, const uint8_t **at, Factors *factors) {
    const uint8_t *head = *at;
    *at += head_bytes(w);
    for (int64_t i = 0; i < head_bytes(w); i += LINE) fetch_ahead(head + i, LINE);
    factors->zeros = w->zeros == NULL ? NULL : head + scale_bytes(w);
    for (int i = 0; i < weight_units(w) * TILE; i += LANES)
        store_floats(factors->scales + i,
                     w->half ? load_halves((const uint16_t *)head + i) : load_floats((const float *)head + i));
}

/* Outputs from n on of a row: `sums` and the bias. */
INLINE void store_outputs(const Weight *w, const float *sums, int64_t n, int64_t last, float *y) {
    const int64_t width = last - n < TILE ? last - n : TILE;
    for (int64_t i = 0; i < width; i++) y[n + i] = sums[i] + (w->bias ? w->bias[n + i] : 0);
}

/* All of a tile's weights come out of memory: their products are done before the next ones are there. */
INLINE void few_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits, int units,
                     int count) {
    for (int64_t n = first; n < last; n += TILE) {
        const uint8_t *p = w->packed + n / TILE * tile_bytes(w);
        Factors factors;
        Floats sums[TILE_ROWS][TILE_REGISTERS];
        UNROLL for (int i = 0; i < count; i++) {
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                sums[i][t] = splat(0);
        }
        int64_t left = 0;
        for (int64_t chunk = 0; chunk < x->chunks; chunk++, left--, p += chunk_bytes(w)) {
            if (left == 0) next_head(w, &p, &factors), left = chunks_of_block(w);
            const Chunk c = chunk_at(w, x, chunk, 0, units, &factors, p);
            multiply_chunk(&c, count, bits, units, bits, 1, sums);
        }
        UNROLL for (int i = 0; i < count; i++) {
            float row[TILE];
            UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
                store_floats(row + t * LANES, sums[i][t]);
            store_outputs(w, row, n, last, y + i * w->rows);
        }
    }
}

/* A chunk's codes as bytes by themselves, for many rows. */
INLINE void unpack(const uint8_t *from, int bits, uint8_t *to) {
    for (int group = 0; group < CHUNK / 32; group++, from += 4 * bits * TILE, to += 32 * TILE) {
        fetch_ahead(from, 4 * bits * TILE);
        for (int i = 0; i < 4 * TILE_REGISTERS; i++) {
            Bytes first, second;
            load_codes(from + i * WIDTH, bits, 0, &first, &second);
            store_bytes(to + i * WIDTH, first);
            store_bytes(to + (4 * TILE_REGISTERS + i) * WIDTH, second);
        }
    }
}

/* to [count, TILE] += a chunk's products; added up as few_rows does, so that a row's outputs are the same among others. */
INLINE void add_chunk(const Chunk *c, int count, int bits, int units, int fetch, float *to) {
    Floats sums[TILE_ROWS][TILE_REGISTERS];
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            sums[i][t] = load_floats(to + i * TILE + t * LANES);
    }
    multiply_chunk(c, count, bits, units, MANY_UNPACKED ? UNPACKED : bits, fetch && !MANY_UNPACKED, sums);
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int t = 0; t < TILE_REGISTERS; t++)
            store_floats(to + i * TILE + t * LANES, sums[i][t]);
    }
}

/* y, rows [start, stop) of x by one tile of outputs [n, last). */
INLINE void fill_tile(const Weight *w, const Activations *x, float *y, int64_t start, int64_t stop, int64_t n,
                      int64_t last, int bits, int units) {
    float sums[MOST_ROWS * TILE] __attribute__((aligned(64)));
    uint8_t codes[CHUNK * TILE] __attribute__((aligned(64)));
    const uint8_t *p = w->packed + n / TILE * tile_bytes(w);
    Factors factors;
    int64_t left = 0;
    memset(sums, 0, (stop - start) * TILE * sizeof(float));
    for (int64_t chunk = 0; chunk < x->chunks; chunk++, left--, p += chunk_bytes(w)) {
        if (left == 0) next_head(w, &p, &factors), left = chunks_of_block(w);
        if (MANY_UNPACKED) unpack(p, bits, codes);
        float *to = sums;
        int64_t m = start;
        for (int count = TILE_ROWS; m < stop; m += count, to += count * TILE) {
            const Chunk c = chunk_at(w, x, chunk, m, units, &factors, MANY_UNPACKED ? codes : p);
            if (m + TILE_ROWS <= stop) {
                add_chunk(&c, TILE_ROWS, bits, units, m == start, to);
            } else if (TILE_ROWS > 4 && m + 4 <= stop) {
                count = 4;
                add_chunk(&c, 4, bits, units, m == start, to);
            } else if (m + 2 <= stop) {
                count = 2;
                add_chunk(&c, 2, bits, units, m == start, to);
            } else {
                count = 1;
                add_chunk(&c, 1, bits, units, m == start, to);
            }
        }
    }
    for (int64_t m = start; m < stop; m++) store_outputs(w, sums + (m - start) * TILE, n, last, y + m * w->rows);
}

INLINE void many_rows(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits,
                      int units) {
    for (int64_t start = 0; start < x->rows; start += MOST_ROWS) {
        const int64_t stop = start + MOST_ROWS < x->rows ? start + MOST_ROWS : x->rows;
        for (int64_t n = first; n < last; n += TILE) fill_tile(w, x, y, start, stop, n, last, bits, units);
    }
}

/* ------------------------------------------------------------------------------------------------------ by format */

/* Counts that the compiler knows keep sums in registers. */
INLINE void multiply_as(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last, int bits,
                        int units) {
    switch (x->rows <= FEW_ROWS ? x->rows : 0) {
#define OF(count) case count: few_rows(w, x, y, first, last, bits, units, FEW_ROWS < count ? FEW_ROWS : count); break
    OF(1); OF(2); OF(3); OF(4); OF(5); OF(6);
#undef OF
    default: many_rows(w, x, y, first, last, bits, units);
    }
}

static void multiply(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last) {
    if (w->bits == 4) {
        if (x->units == 1) multiply_as(w, x, y, first, last, 4, 1);
        if (x->units == 2) multiply_as(w, x, y, first, last, 4, 2);
        if (x->units == 4) multiply_as(w, x, y, first, last, 4, 4);
    } else {
        if (x->units == 1) multiply_as(w, x, y, first, last, 8, 1);
        if (x->units == 2) multiply_as(w, x, y, first, last, 8, 2);
        if (x->units == 4) multiply_as(w, x, y, first, last, 8, 4);
    }
}

#define PRODUCT_KERNELS TILE, tile_bytes, pack_tile, normalize, round_rows, multiply, gate_and_add
