/* AVX-512 with VNNI (Intel since Ice Lake, AMD since Zen 4). */
#include "nbits.h"
#ifdef NBITS_X86
#include "avx512.h"
#include "nbits_common.h"

enum { LANES = 16, TILE_REGISTERS = 2, TILE_ROWS = 12, TOGETHER = 2, OFFSET = 0 };

typedef __m512i Bytes, Ints;
typedef __m512 Floats;
typedef const int8_t *Columns;

/* ------------------------------------------------------------------------------------------------- sums of products */

/* Which of two or four blocks each lane is of. */
INLINE __m512i block_of_lane(int blocks) {
    return blocks == 2 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                       : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
}

/* By a permutation: VPEXPANDD, which is made for it, takes Zen 4 longer than the products. */
INLINE Ints first_sums(const int32_t *from, int blocks) {
    Ints first;
    if (blocks == 1) {
        __asm__("vmovd %1, %x0" : "=v"(first) : "m"(*from));
        return first;
    }
    const __m128i *at = (const __m128i *)from;
    first = _mm512_castsi128_si512(blocks == 2 ? _mm_loadl_epi64(at) : _mm_loadu_si128(at));
    return _mm512_maskz_permutexvar_epi32(blocks == 2 ? 0x0101 : 0x1111, block_of_lane(blocks), first);
}

INLINE Ints begin(Ints d, int bits) { return (void)bits, d; }
INLINE Ints finish(Ints d, Ints sums, int bits) { return (void)d, (void)bits, sums; }
INLINE Ints dot(Ints sums, Bytes codes, Bytes x, int bits) { return (void)bits, _mm512_dpbusd_epi32(sums, codes, x); }

INLINE Columns load_columns(const int8_t *x) { return x; }

INLINE Ints dot_lane(Ints sums, Bytes codes, Columns x, int lane, int bits) {
    return dot(sums, codes, broadcast_4(x + 4 * lane), bits);
}

/* Both fit into 16 bits: one instruction, where a product of 32 bits takes two. It multiplies the upper halves too, of
 * which that of a zero point is 0. */
INLINE Ints zero_products(int32_t sum, const int32_t *zeros) {
    return _mm512_madd_epi16(_mm512_loadu_si512(zeros), _mm512_set1_epi32(-sum));
}

/* ------------------------------------------------------------------------------------------------- bytes and floats */

INLINE Bytes load_bytes(const void *from) { return _mm512_loadu_si512(from); }

INLINE Bytes in_register(Bytes bytes) {
    __asm__("" : "+v"(bytes));
    return bytes;
}

INLINE Bytes low_codes(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE Bytes high_codes(Bytes bytes) { return low_codes(_mm512_srli_epi16(bytes, 4)); }
INLINE Bytes whole_codes(Bytes bytes) { return bytes; }

INLINE Floats splat(float value) { return _mm512_set1_ps(value); }
INLINE Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, Floats values) { _mm512_storeu_ps(to, values); }
INLINE Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
INLINE float sum_of_lanes(Floats values) { return _mm512_reduce_add_ps(values); }

INLINE void sums_of_lanes(const Floats from[4], float *to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(from[0], from[1]), _mm512_unpackhi_ps(from[0], from[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(from[2], from[3]), _mm512_unpackhi_ps(from[2], from[3]));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

INLINE Floats load_first_floats(const float *from, int64_t count) {
    return _mm512_maskz_loadu_ps(count >= LANES ? 0xffff : (1u << count) - 1, from);
}

INLINE Floats spread(const float *factors, int blocks) {
    if (blocks == 1) return splat(factors[0]);
    return _mm512_permutexvar_ps(block_of_lane(blocks), _mm512_castps128_ps512(_mm_loadu_ps(factors)));
}

INLINE void transpose(const uint8_t *from, int64_t stride, Bytes *out) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++)
        a[i] = load_bytes(from + i * stride);
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
        const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        out[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        out[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        out[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        out[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

/* ------------------------------------------------------------------------------------------------------ the kernels */

#include "nbits_multiply.h"
#include "causal_attention.h"

const Kernels nbits_avx512 = {"avx512-vnni", has_avx512_vnni, normalize, round_rows, multiply, gate_and_add,
                              CAUSAL_KERNELS};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
