/* Products of int8 by int8, and attention of frames in int8: what a vision encoder of W8A8 is made of. */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum {
    OUTPUTS = 32, /* what rows of a packed weight are padded to: a multiple of a tile's */
    DEPTH = 640,  /* columns of a tile that stay in the first-level cache; rows of x lie in pieces of as many */
};

/* y = activation(x Wᵀ + bias), x rounded to 8 bits with one scale per row. */
typedef struct {
    const int8_t *codes;  /* [padded rows / tile, padded columns / 4, tile, 4], as `pack` lays them */
    const int32_t *sums;  /* [padded rows], of a row's codes: what a step of the zero point adds */
    const float *scales;  /* [rows] */
    const float *bias;    /* [rows], or NULL */
    const float *gate;     /* like y, or NULL: y is multiplied with gate × sigmoid(gate) */
    const float *residual; /* like y, or NULL: added to y at last */
    int64_t rows, columns;
    int quick_gelu;       /* y × sigmoid(1.702 y), else y itself */
    int affine;           /* codes of x between its extremes, else with 0 in their middle */
} Int8Weight;

typedef struct {
    void *codes;     /* [pieces, rows, DEPTH], of `code_bytes` */
    float *scales;   /* [rows] */
    int32_t *zeros;  /* [rows]: the code of 0 */
    int64_t rows;
} Int8Rows;

/* Every frame attends to itself, without a mask. Queries and keys are rotated here. */
typedef struct {
    const float *qkv;         /* [frames, length, 3 × heads × dim] */
    const float *cosine, *sine; /* [frames, length, dim / 2] */
    float *out;               /* [frames, length, heads × dim] */
    int64_t frames, length, heads, dim;
    float scale;
    /* Of every frame and head, laid out by `prepare`: */
    uint8_t *keys;            /* blocks of KEYS, [padded dim / 4, KEYS, 4]: int8 + 128, or int8 */
    int8_t *values;           /* blocks of KEYS, [KEYS / 4, padded dim, 4] */
    float *key_scales;        /* [padded length] */
    float *key_limits;        /* [padded length]: 0, and far below all scores behind the last key */
    float *value_scales;      /* blocks of KEYS, [padded dim] */
} Attention;

enum { KEYS = 128, QUERIES = 64 };

typedef struct {
    const char *name;
    int (*supported)(void);
    size_t code_bytes; /* of a number of x */
    /* From ONNX's order [columns, rows] into room for w's codes and sums. */
    void (*pack)(const Int8Weight *w, const int8_t *from, int8_t *codes, int32_t *sums);
    /* Rows [first, last), which x begins with. */
    void (*round)(const Int8Weight *w, const float *x, const Int8Rows *to, int64_t first, int64_t last);
    void (*multiply)(const Int8Weight *w, const Int8Rows *x, float *y, int64_t first, int64_t last);
    /* head: frame × heads + head; block: of QUERIES rows. */
    int (*prepare)(const Attention *a, int64_t head); /* 0: no memory */
    void (*attend)(const Attention *a, int64_t head, int64_t block);
} Int8Kernels;

extern const Int8Kernels int8_avx512, int8_avx_vnni, int8_avx2, int8_neon;
extern const Int8Kernels *const all_int8_kernels[]; /* that were built, best first, then NULL */
const Int8Kernels *usable_int8_kernels(void);       /* the best of this processor that may be used, or NULL */

static inline int64_t up_to_16(int64_t size) { return (size + 15) / 16 * 16; }

static inline int64_t padded_rows(const Int8Weight *w) { return (w->rows + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }
static inline int64_t padded_columns(const Int8Weight *w) { return up_to_16(w->columns); }
static inline int64_t key_blocks(const Attention *a) { return (a->length + KEYS - 1) / KEYS; }
static inline int64_t padded_length(const Attention *a) { return key_blocks(a) * KEYS; }
static inline int64_t padded_dim(const Attention *a) { return up_to_16(a->dim); }
