/* NEON with the dot product (Armv8.2 with FEAT_DotProd: Cortex-A55 and A75 and later, Apple since A13). */
#include "nbits.h"
#ifdef NBITS_NEON
#include <arm_neon.h>
#include <stdlib.h>
#include <string.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP /* by the C library, or not */
#define HWCAP_ASIMDDP (1 << 20)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#elif !defined(__ARM_FEATURE_DOTPROD)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#define PUSHED
#endif

#include "nbits_common.h"

/* 16 sums, and columns and codes of 4 registers each, of 32 registers. */
enum { LANES = 4, TILE_REGISTERS = 4, TILE_ROWS = 4, FEW_ROWS = 2, MANY_UNPACKED = 1, OFFSET = 128 };

typedef int8x16_t Bytes, Columns;
typedef int32x4_t Ints;
typedef float32x4_t Floats;

/* ------------------------------------------------------------------------------------------------- sums of products */

INLINE Ints begin(Ints d, int bits) { return (void)bits, d; }
INLINE Ints finish(Ints d, Ints sums, int bits) { return (void)d, (void)bits, sums; }

INLINE Columns load_columns(const int8_t *x) { return vld1q_s8(x); }

INLINE Ints dot_lane(Ints sums, Bytes codes, Columns x, int lane, int bits) {
    (void)bits;
    switch (lane) { /* the instruction holds it, so compilers want it written out */
    case 0: return vdotq_laneq_s32(sums, codes, x, 0);
    case 1: return vdotq_laneq_s32(sums, codes, x, 1);
    case 2: return vdotq_laneq_s32(sums, codes, x, 2);
    default: return vdotq_laneq_s32(sums, codes, x, 3);
    }
}

typedef int8_t XCode;
#define PLACE(column) (column)
enum { X_ZERO = 0, X_LEAST = -128, X_MOST = 127, WEIGHT_ZERO = 128, INT8_ROWS = 4, WIDE = 1 };
typedef Bytes Signed;

INLINE Signed load_signed(const int8_t *from) { return vld1q_s8(from); }
INLINE Signed load_wide(const int8_t *from) { return load_signed(from); }
INLINE void store_wide(int8_t *to, Signed codes) { vst1q_s8(to, codes); }
INLINE Ints dot_x(Ints sums, Signed weights, Columns x, int lane) { return dot_lane(sums, weights, x, lane, 8); }
INLINE Ints dot_keys(Ints sums, Signed keys, Columns q, int lane) { return dot_lane(sums, keys, q, lane, 8); }

INLINE Ints load_ints(const int32_t *from) { return vld1q_s32(from); }
INLINE void store_ints(int32_t *to, Ints values) { vst1q_s32(to, values); }
INLINE Ints splat_ints(int32_t value) { return vdupq_n_s32(value); }

INLINE Ints load_zeros(const uint8_t *from, int offset) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))), splat_ints(offset));
}

INLINE Ints zero_products(int32_t sum, Ints zeros) { return vmulq_n_s32(zeros, -sum); }

/* ------------------------------------------------------------------------------------------------- bytes and floats */

INLINE Bytes load_bytes(const void *from) { return vld1q_s8(from); }
INLINE void store_bytes(void *to, Bytes bytes) { vst1q_s8(to, bytes); }
INLINE Bytes low_codes(Bytes bytes) { return vandq_s8(bytes, vdupq_n_s8(15)); }
INLINE Bytes high_codes(Bytes bytes) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(bytes), 4)); }
INLINE Bytes whole_codes(Bytes bytes) { return veorq_s8(bytes, vdupq_n_s8(-128)); }

INLINE Floats splat(float value) { return vdupq_n_f32(value); }
INLINE Floats load_floats(const float *from) { return vld1q_f32(from); }
INLINE Floats load_halves(const uint16_t *from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
INLINE void store_floats(float *to, Floats values) { vst1q_f32(to, values); }
INLINE Floats to_floats(Ints values) { return vcvtq_f32_s32(values); }
INLINE Floats lesser(Floats a, Floats b) { return vminq_f32(a, b); }
INLINE Floats greater(Floats a, Floats b) { return vmaxq_f32(a, b); }
INLINE float sum_of_lanes(Floats values) { return vaddvq_f32(values); }

INLINE void transpose(const uint8_t *from, int64_t stride, Bytes *out) {
    const int32x4_t a = vreinterpretq_s32_s8(load_bytes(from)), b = vreinterpretq_s32_s8(load_bytes(from + stride));
    const int32x4_t c = vreinterpretq_s32_s8(load_bytes(from + 2 * stride));
    const int32x4_t d = vreinterpretq_s32_s8(load_bytes(from + 3 * stride));
    const int64x2_t ab_even = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab_odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t cd_even = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd_odd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    out[0] = vreinterpretq_s8_s64(vtrn1q_s64(ab_even, cd_even));
    out[1] = vreinterpretq_s8_s64(vtrn1q_s64(ab_odd, cd_odd));
    out[2] = vreinterpretq_s8_s64(vtrn2q_s64(ab_even, cd_even));
    out[3] = vreinterpretq_s8_s64(vtrn2q_s64(ab_odd, cd_odd));
}

/* ------------------------------------------------------------------------------------------------------ the kernels */

#include "nbits_multiply.h"
#include "causal_attention.h"
#include "frame_attention.h"

static int supported(void) {
#if defined(__APPLE__)
    return 1;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 0;
#endif
}

const Kernels nbits_neon = {"neon-dotprod", supported, PRODUCT_KERNELS, CAUSAL_KERNELS};
/* Not where products of matrices of int8 are an instruction (FEAT_I8MM), twice as fast: ONNX Runtime has those. */
static int supported_int8(void) {
#if defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, NULL, 0) != 0 || !has;
#elif defined(__linux__)
    return supported() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) == 0;
#else
    return 0;
#endif
}

const Int8Kernels int8_neon = {"neon-dotprod", supported_int8, INT8_KERNELS};

#ifdef PUSHED
#pragma clang attribute pop
#endif
#endif
