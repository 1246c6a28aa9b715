/* AVX-512 with VNNI (Intel since Ice Lake, AMD since Zen 4). */
#include "nbits.h"
#ifdef NBITS_X86
#include "avx512.h"
#include "nbits_common.h"

enum { LANES = 16, TILE_REGISTERS = 2, TILE_ROWS = 8, FEW_ROWS = 6, MANY_UNPACKED = 0, OFFSET = 0 };

typedef __m512i Bytes, Ints;
typedef __m512 Floats;
typedef const int8_t *Columns;

/* ------------------------------------------------------------------------------------------------- sums of products */

INLINE Ints begin(Ints d, int bits) { return (void)bits, d; }
INLINE Ints finish(Ints d, Ints sums, int bits) { return (void)d, (void)bits, sums; }
INLINE Columns load_columns(const int8_t *x) { return x; }

INLINE Ints dot_lane(Ints sums, Bytes codes, Columns x, int lane, int bits) {
    return (void)bits, _mm512_dpbusd_epi32(sums, codes, broadcast_4(x + 4 * lane));
}

INLINE Ints splat_ints(int32_t value) { return _mm512_set1_epi32(value); }

INLINE Ints load_zeros(const uint8_t *from, int offset) {
    return _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)), splat_ints(offset));
}

/* Both fit into 16 bits: one instruction, where a product of 32 bits takes two. It multiplies the upper halves too, of
 * which that of a zero point is 0. */
INLINE Ints zero_products(int32_t sum, Ints zeros) { return _mm512_madd_epi16(zeros, splat_ints(-sum)); }

/* ------------------------------------------------------------------------------------------------- bytes and floats */

INLINE Bytes load_bytes(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store_bytes(void *to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
INLINE Bytes low_codes(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE Bytes high_codes(Bytes bytes) { return low_codes(_mm512_srli_epi16(bytes, 4)); }
INLINE Bytes whole_codes(Bytes bytes) { return bytes; }

INLINE Floats splat(float value) { return _mm512_set1_ps(value); }
INLINE Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE Floats load_halves(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE void store_floats(float *to, Floats values) { _mm512_storeu_ps(to, values); }
INLINE Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
INLINE float sum_of_lanes(Floats values) { return _mm512_reduce_add_ps(values); }

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

const Kernels nbits_avx512 = {"avx512-vnni", has_avx512_vnni, PRODUCT_KERNELS, CAUSAL_KERNELS};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
