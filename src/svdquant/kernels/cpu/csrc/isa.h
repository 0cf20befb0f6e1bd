/* What the products need of an instruction set, by one name for all of them. */
#ifndef SVDQ_ISA_H
#define SVDQ_ISA_H

#include "vectors.h"

/* Unsigned times signed bytes, or signed times signed where that is what there is. */
#if defined(__aarch64__)
#define SVDQ_INT8_OFFSET 0
#else
#define SVDQ_INT8_OFFSET 128
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SVDQ_WIDE 1
enum { DOT_ROWS = 6, DOT_COLUMNS = 4, TILE_ROWS = 3, TILE_VECTORS = 4 };
#else
#define SVDQ_WIDE 0
enum { DOT_ROWS = 2, DOT_COLUMNS = 2 };
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#if defined(__AVX512BF16__) && SVDQ_WIDE
#define SVDQ_BF16_DOT 1
/* acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] */
INLINE vf32 dot_bf16(vf32 acc, vu32 a, vu32 b) { return (vf32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
#define SVDQ_BF16_DOT 0
#endif

/* Added to every code, so that it is unsigned; nvfp4's values are doubled, so that they are whole. */
INLINE int32_t code_offset(int32_t format) { return format == SVDQ_INT4 ? 8 : format == SVDQ_NVFP4 ? 12 : SVDQ_INT8_OFFSET; }

INLINE vf32 fma_f32(vf32 a, vf32 b, vf32 acc) { return __builtin_elementwise_fma(a, b, acc); }

/* Nearest, ties to even. */
INLINE vi32 round_to_int(vf32 v) {
#if SVDQ_WIDE
  return (vi32)_mm512_cvtps_epi32((__m512)v);
#else
  return __builtin_convertvector(__builtin_elementwise_roundeven(v), vi32);
#endif
}

#endif
