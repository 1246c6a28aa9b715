/* What is asked of the compiler. */
#pragma once

#define INLINE static inline __attribute__((always_inline))
#define OUT_OF_LINE static __attribute__((noinline)) /* for what many loops would hold a copy of */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
