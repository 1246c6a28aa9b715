/* Products with weights of 4 or 8 bits in blocks: what the operator and the instruction sets share.
 *
 * y = x Wᵀ + bias, where a weight is (code - zero point) × scale of its block, and x is rounded to int8 with one scale
 * for every row and block: the arithmetic of ONNX Runtime's MatMulNBits with accuracy_level 4, over the same bytes.
 */
#pragma once

#include <stdint.h>
#include <string.h>

#include "causal.h"

enum { CHUNK = 128 }; /* columns that one step takes; rows of activations are padded to whole chunks */
#define TINY 1e-30f   /* a scale below it has no inverse worth the name: all zeros then */

typedef struct {
    const uint8_t *codes;  /* [rows, blocks, block * bits / 8]; of two codes in a byte the low bits come first */
    const float *scales;   /* [rows, blocks] */
    const uint8_t *zeros;  /* [rows, ceil(blocks * bits / 8)], or NULL: 8 of 4 bits, 128 of 8 */
    const float *bias;     /* [rows], or NULL */
    int64_t rows, columns, blocks;
    int bits, block;       /* 4 or 8; 32, 64 or a multiple of 128 */
    int half;              /* whether all scales are kept in 16 bits, which hold them exactly; `pack_weight` finds out */
    const uint8_t *packed; /* as `pack_tile` lays the parts above out: all of them but the bias */
} Weight;

/* Rows of x, rounded. Codes of 4-bit weights lie two in a byte, so within a chunk columns 0, 2, 4... come first and
 * 1, 3, 5... behind them. Sums are of units: blocks, or chunks where a block is longer. */
typedef struct {
    int8_t *codes;   /* [chunks, rows, CHUNK], zero behind the last column */
    int32_t *sums;   /* [chunks, rows, units of a chunk] */
    float *scales;   /* [rows, padded blocks], zero behind the last block */
    int64_t rows, chunks, padded;
    int units;       /* of a chunk: 1, 2 or 4 */
} Activations;

/* What is done to a row of x before it is rounded, y = x / sqrt(mean(x²) + epsilon) × weight, or LayerNorm where there
 * is a bias: of x less its mean, plus the bias. */
typedef struct {
    const float *weight; /* [columns], or NULL: nothing is done */
    const float *bias;   /* [columns], or NULL */
    float epsilon;
} Norm;

typedef struct {
    const char *name;
    int (*supported)(void);
    int64_t tile;                            /* outputs */
    int64_t (*tile_bytes)(const Weight *w); /* packed */
    void (*pack_tile)(const Weight *w, int64_t tile, uint8_t *to);
    void (*normalize)(const Norm *norm, const float *x, int64_t columns, float *to);
    /* Rows [first, last), which x begins with, into `to`. */
    void (*round)(const Weight *w, const float *x, const Activations *to, int64_t first, int64_t last);
    /* Outputs [first, last), rows of the packed weight from a tile's first on, of every row of x: y [x->rows, w->rows]. */
    void (*multiply)(const Weight *w, const Activations *x, float *y, int64_t first, int64_t last);
    /* y × gate × sigmoid(gate) + residual, over y; either may be NULL. */
    void (*gate_and_add)(const float *gate, const float *residual, float *y, int64_t count);
    CausalKernels causal;
} Kernels;

/* Compilers that know the instructions: Clang's arm_neon.h names the dot product of any target only since 16. */
#if defined(__x86_64__) && defined(__GNUC__)
#define NBITS_X86 1
#if defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 11
#define NBITS_AVX_VNNI 1
#endif
#elif defined(__aarch64__) && defined(__GNUC__)
#if !defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD)
#define NBITS_NEON 1
#endif
#endif

extern const Kernels nbits_avx512, nbits_avx_vnni, nbits_avx2, nbits_neon;
extern const Kernels *const all_kernels[]; /* that were built, best first, then NULL */
const Kernels *usable_kernels(void);       /* the best of this processor, or NULL */

/* Fills in w->half and w->packed: the weight laid out, which others may have had laid out before; NULL: no memory. To be
 * released. Pages of the file that it was read from are given back. */
void pack_weight(const Kernels *kernels, Weight *w);
void release_weight(const uint8_t *packed); /* NULL: nothing */

static inline int64_t weight_chunks(const Weight *w) { return (w->columns + CHUNK - 1) / CHUNK; } /* of a row */
static inline int weight_units(const Weight *w) { return w->block < CHUNK ? CHUNK / w->block : 1; } /* of a chunk */
static inline int64_t weight_row_bytes(const Weight *w) { return w->blocks * w->block * w->bits / 8; }

static inline int64_t weight_zero_bytes(const Weight *w) { return (w->blocks * w->bits + 7) / 8; } /* of a row */

/* The number in IEEE's 16 bits; 0 where they do not hold it exactly. Numbers below their normal ones are not tried. */
static inline int exact_half(float value, uint16_t *half) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t exponent = bits >> 23 & 255, sign = bits >> 16 & 0x8000;
    if (exponent >= 113 && exponent <= 142 && (bits & 0x1fff) == 0)
        *half = (uint16_t)(sign | (exponent - 112) << 10 | (bits >> 13 & 1023));
    else if ((bits & 0x7fffffff) == 0)
        *half = (uint16_t)sign;
    else
        return 0;
    return 1;
}

static inline int weight_zero(const Weight *w, int64_t row, int64_t block) {
    if (w->zeros == 0) return w->bits == 4 ? 8 : 128;
    if (w->bits == 8) return w->zeros[row * w->blocks + block];
    return w->zeros[row * ((w->blocks + 1) / 2) + block / 2] >> (block % 2 * 4) & 15;
}
