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

INLINE vf32 fma_f32(vf32 a, vf32 b, vf32 acc) { return __builtin_elementwise_fma(a, b, acc); }

#endif
