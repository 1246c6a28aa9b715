/* AVX2 (Intel since Haswell, AMD since Zen); with AVX_VNNI defined, the same and AVX-VNNI (Intel since Alder Lake). */
#include "nbits.h"
#ifdef NBITS_X86
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__) && defined(AVX_VNNI)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(AVX_VNNI)
#pragma GCC target("avx2,fma,f16c,avxvnni")
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "nbits_common.h"

enum { LANES = 8, TILE_REGISTERS = 2, FEW_ROWS = 3 };

typedef __m256i Bytes, Ints;
typedef __m256 Floats;
typedef const int8_t *Columns;

/* ------------------------------------------------------------------------------------------------- sums of products */

/* GCC 12 would first make all the terms of a sum, more than there are registers, and then add them; or copy each sum to
 * another register and back in every step. */
INLINE Ints in_order(Ints sums) {
    __asm__("" : "+x"(sums));
    return sums;
}

#ifdef AVX_VNNI

enum { TILE_ROWS = 4, MANY_UNPACKED = 0, OFFSET = 0 };

INLINE Bytes whole_codes(Bytes bytes) { return bytes; }
INLINE Ints begin(Ints d, int bits) { return (void)bits, d; }
INLINE Ints finish(Ints d, Ints sums, int bits) { return (void)d, (void)bits, sums; }
INLINE Ints dot(Ints sums, Bytes codes, Bytes x, int bits) {
    return (void)bits, _mm256_dpbusd_avx_epi32(sums, codes, x);
}

typedef uint8_t XCode;
#define PLACE(column) (column)
enum { X_ZERO = 128, X_LEAST = 0, X_MOST = 255, WEIGHT_ZERO = 0, INT8_ROWS = 6, WIDE = 1 };
typedef Bytes Signed;

INLINE Signed load_signed(const int8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE Signed load_wide(const int8_t *from) { return load_signed(from); }
INLINE void store_wide(int8_t *to, Signed codes) { _mm256_storeu_si256((__m256i *)to, codes); }

INLINE Ints dot_bytes(Ints sums, Bytes codes, Bytes signed_codes) {
    return in_order(_mm256_dpbusd_avx_epi32(sums, codes, signed_codes));
}

#else

enum { TILE_ROWS = 4, MANY_UNPACKED = 1, OFFSET = 128 };

INLINE Bytes whole_codes(Bytes bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }

/* Products of 4-bit codes stay sums of 16 bits meanwhile: 16 of 15 × 127 fit. */
INLINE Ints begin(Ints d, int bits) { return bits == 4 ? _mm256_setzero_si256() : d; }

INLINE Ints finish(Ints d, Ints sums, int bits) {
    return bits == 4 ? _mm256_add_epi32(d, _mm256_madd_epi16(sums, _mm256_set1_epi16(1))) : sums;
}

/* Two products of 8-bit codes fit into 16 bits only when the codes are signed, 2 × 128 × 127; the instruction wants one
 * side unsigned, so the sign of the codes goes over to x. */
INLINE Ints dot(Ints sums, Bytes codes, Bytes x, int bits) {
    if (bits == 4) return in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    return in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}

/* Products of int8 by int8 are those of 16 bits: signs would have to be moved for every row. What is even and what is odd
 * among four bytes becomes two words, which PLACE makes those of neighbours. */
typedef int16_t XCode;
#define PLACE(column) ((column) % 4 == 1 ? (column) + 1 : (column) % 4 == 2 ? (column) - 1 : (column))
enum { X_ZERO = 0, X_LEAST = -128, X_MOST = 127, WEIGHT_ZERO = 0, INT8_ROWS = 4, WIDE = 2 };
typedef struct {
    Bytes even, odd;
} Signed;

INLINE Signed load_signed(const int8_t *from) {
    const Bytes bytes = _mm256_loadu_si256((const __m256i *)from);
    return (Signed){_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

INLINE Signed load_wide(const int8_t *from) {
    return (Signed){_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)};
}

INLINE void store_wide(int8_t *to, Signed codes) {
    _mm256_storeu_si256((__m256i *)to, codes.even);
    _mm256_storeu_si256((__m256i *)to + 1, codes.odd);
}

INLINE Ints dot_words(Ints sums, Signed codes, const XCode *x) {
    int32_t first, second;
    memcpy(&first, x, sizeof first);
    memcpy(&second, x + 2, sizeof second);
    sums = in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(codes.even, _mm256_set1_epi32(first))));
    return in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(codes.odd, _mm256_set1_epi32(second))));
}

#endif

INLINE Columns load_columns(const int8_t *x) { return x; }

INLINE Bytes four_columns(Columns x, int lane) {
    int32_t four;
    memcpy(&four, x + 4 * lane, sizeof four);
    return _mm256_set1_epi32(four);
}

INLINE Ints dot_lane(Ints sums, Bytes codes, Columns x, int lane, int bits) {
    return dot(sums, codes, four_columns(x, lane), bits);
}

#ifdef AVX_VNNI
INLINE Ints dot_x(Ints sums, Signed weights, Columns x, int lane) {
    return dot_bytes(sums, four_columns(x, lane), weights);
}
INLINE Ints dot_keys(Ints sums, Signed keys, Columns q, int lane) {
    return dot_bytes(sums, keys, four_columns(q, lane));
}
#else
INLINE Ints dot_x(Ints sums, Signed weights, Columns x, int lane) {
    return dot_words(sums, weights, (const XCode *)x + 4 * lane);
}
INLINE Ints dot_keys(Ints sums, Signed keys, Columns q, int lane) { return dot_x(sums, keys, q, lane); }
#endif

INLINE Ints load_ints(const int32_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store_ints(int32_t *to, Ints values) { _mm256_storeu_si256((__m256i *)to, values); }
INLINE Ints splat_ints(int32_t value) { return _mm256_set1_epi32(value); }

INLINE Ints load_zeros(const uint8_t *from, int offset) {
    return _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)), splat_ints(offset));
}

/* Both fit into 16 bits: one instruction, where a product of 32 bits takes two. It multiplies the upper halves too,
 * which hold signs: those of the zero points are cleared. */
INLINE Ints zero_products(int32_t sum, Ints zeros) {
    return _mm256_madd_epi16(_mm256_and_si256(zeros, splat_ints(0xffff)), splat_ints(-sum));
}

/* ------------------------------------------------------------------------------------------------- bytes and floats */

INLINE Bytes load_bytes(const void *from) { return _mm256_loadu_si256(from); }
INLINE void store_bytes(void *to, Bytes bytes) { _mm256_storeu_si256(to, bytes); }
INLINE Bytes low_codes(Bytes bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
INLINE Bytes high_codes(Bytes bytes) { return low_codes(_mm256_srli_epi16(bytes, 4)); }

INLINE Floats splat(float value) { return _mm256_set1_ps(value); }
INLINE Floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
INLINE Floats load_halves(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE void store_floats(float *to, Floats values) { _mm256_storeu_ps(to, values); }
INLINE Floats to_floats(Ints values) { return _mm256_cvtepi32_ps(values); }
INLINE Floats lesser(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }

INLINE float sum_of_lanes(Floats values) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE void transpose(const uint8_t *from, int64_t stride, Bytes *out) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = load_bytes(from + i * stride);
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) { /* a[i + j]: dwords j and j + 4 of rows i to i + 3 */
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        out[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        out[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
    }
}

/* ------------------------------------------------------------------------------------------------------ the kernels */

#include "nbits_multiply.h"
#include "causal_attention.h"
#include "frame_attention.h"

/* F16C and AVX-VNNI are asked of the processor itself: compilers' names for them are younger than their instructions. */
static int has_avx2(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}

#ifdef AVX_VNNI

static int supported(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

const Kernels nbits_avx_vnni = {"avx-vnni", supported, PRODUCT_KERNELS, CAUSAL_KERNELS};
const Int8Kernels int8_avx_vnni = {"avx-vnni", supported, INT8_KERNELS};

#else

const Kernels nbits_avx2 = {"avx2", has_avx2, PRODUCT_KERNELS, CAUSAL_KERNELS};
const Int8Kernels int8_avx2 = {"avx2", has_avx2, INT8_KERNELS};

#endif

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
