/* What the products need of an instruction set, by one name for all of them. */
#ifndef SVDQ_ISA_H
#define SVDQ_ISA_H

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SVDQ_WIDE 1
#else
#define SVDQ_WIDE 0
#endif
#if SVDQ_WIDE && defined(__AMX_INT8__)
#define SVDQ_AMX 1
#else
#define SVDQ_AMX 0
#endif
#if defined(__AVXVNNI__) && !SVDQ_WIDE
#define SVDQ_NARROW_VNNI 1
#else
#define SVDQ_NARROW_VNNI 0
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define SVDQ_ARM_MATRICES 1
#else
#define SVDQ_ARM_MATRICES 0
#endif

/* Unsigned times signed bytes, or signed times signed where that is what there is. */
#if SVDQ_WIDE || SVDQ_NARROW_VNNI
#define SVDQ_INT8_OFFSET 128
#else
#define SVDQ_INT8_OFFSET 0
#endif

/* What stays in registers. DOT_: rows by columns of a down-projection's sums; TILE_ROWS: rows of one call of a product;
   FINISH_: rows by 16 outputs of what is added to it. Sixteen lanes are one register, two or four. */
#if SVDQ_WIDE
#include <immintrin.h>
enum { DOT_ROWS = 6, DOT_COLUMNS = 4, TILE_ROWS = SVDQ_AMX ? 16 : 3, FINISH_ROWS = 3, FINISH_VECTORS = 4 };
#elif defined(__x86_64__)
#include <immintrin.h>
enum { DOT_ROWS = 2, DOT_COLUMNS = 2, TILE_ROWS = 6, FINISH_ROWS = TILE_ROWS, FINISH_VECTORS = 1 };
#else
#include <arm_neon.h>
enum { DOT_ROWS = 2, DOT_COLUMNS = 2, TILE_ROWS = SVDQ_ARM_MATRICES ? 8 : 4, FINISH_ROWS = 4, FINISH_VECTORS = 1 };
#endif

/* acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] */
#if defined(__AVX512BF16__) && SVDQ_WIDE
#define SVDQ_BF16_DOT 1
INLINE vf32 dot_bf16(vf32 acc, vu32 a, vu32 b) { return (vf32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SVDQ_BF16_DOT 1
INLINE vf32 dot_bf16(vf32 acc, vu32 a, vu32 b) {
  float32x4_t sums[4];
  bfloat16x8_t x[4], y[4];
  memcpy(sums, &acc, sizeof acc);
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  for (int i = 0; i < 4; i++) sums[i] = vbfdotq_f32(sums[i], x[i], y[i]);
  memcpy(&acc, sums, sizeof acc);
  return acc;
}
#else
#define SVDQ_BF16_DOT 0
#endif
/* Whether there are instructions for sixteen lanes of it. */
#define SVDQ_BF16_WIDE (SVDQ_BF16_DOT && SVDQ_WIDE)

/* Added to every code, so that it is unsigned; nvfp4's values are doubled, so that they are whole. */
INLINE int32_t code_offset(int32_t format) { return format == SVDQ_INT4 ? 8 : format == SVDQ_NVFP4 ? 12 : SVDQ_INT8_OFFSET; }

INLINE vf32 fma_f32(vf32 a, vf32 b, vf32 acc) { return __builtin_elementwise_fma(a, b, acc); }

/* Sixteen results; in one instruction where there is one, which takes subnormal ones for zero. */
INLINE void store_results(void* base, int64_t index, int32_t type, vf32 value, int64_t count) {
#if SVDQ_BF16_WIDE
  if (type == SVDQ_BF16) {
    const __m256bh v = _mm512_cvtneps_pbh((__m512)value);
    memcpy((uint16_t*)base + index, &v, count >= LANES ? (int64_t)sizeof v : count * 2);
    return;
  }
#endif
  store_some_from_f32(base, index, type, value, count);
}

/* Nearest, ties to even. */
INLINE vi32 round_to_int(vf32 v) {
#if SVDQ_WIDE
  return (vi32)_mm512_cvtps_epi32((__m512)v);
#else
  return __builtin_convertvector(__builtin_elementwise_roundeven(v), vi32);
#endif
}

#endif
