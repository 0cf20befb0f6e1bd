/* Sixteen lanes at a time, whatever the processor's own width: clang splits what does not fit one register. */
#ifndef SVDQ_VECTORS_H
#define SVDQ_VECTORS_H

#include <stdint.h>
#include <string.h>

#include "svdquant.h"

#define SVDQ_JOIN_(a, b) a##_##b
#define SVDQ_JOIN(a, b) SVDQ_JOIN_(a, b)
/* One source, compiled once per instruction set: every external name carries the set's. */
#define SVDQ_NAME(name) SVDQ_JOIN(svdq_##name, SVDQ_ISA)

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };

typedef float vf32 __attribute__((vector_size(64)));
typedef int32_t vi32 __attribute__((vector_size(64)));
typedef uint32_t vu32 __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));
typedef _Float16 vf16 __attribute__((vector_size(32)));
typedef int8_t vi8 __attribute__((vector_size(16)));
typedef uint8_t vu8 __attribute__((vector_size(16)));
typedef uint8_t bytes64 __attribute__((vector_size(64)));

INLINE vf32 splat(float value) { return (vf32){0} + value; }
INLINE vf32 load_f32(const float* p) { vf32 v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_f32(float* p, vf32 v) { memcpy(p, &v, sizeof v); }

INLINE vf32 widen_bf16(vu16 bits) { return (vf32)(__builtin_convertvector(bits, vu32) << 16); }

INLINE vf32 choose(vi32 mask, vf32 yes, vf32 no) { return (vf32)(((vi32)yes & mask) | ((vi32)no & ~mask)); }

/* Nearest bfloat16, ties to even; what is not a number stays none. */
INLINE vu16 narrow_bf16(vf32 v) {
  vu32 bits = (vu32)v;
  vu32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu32 nan = (vu32)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vu16);
}

INLINE vf32 round_bf16(vf32 v) { return widen_bf16(narrow_bf16(v)); }
INLINE vf32 round_f16(vf32 v) { return __builtin_convertvector(__builtin_convertvector(v, vf16), vf32); }

/* 16 elements of a float type. */
INLINE vf32 load_as_f32(const void* base, int64_t index, int32_t type) {
  if (type == SVDQ_F32) return load_f32((const float*)base + index);
  if (type == SVDQ_BF16) { vu16 v; memcpy(&v, (const uint16_t*)base + index, sizeof v); return widen_bf16(v); }
  vf16 v;
  memcpy(&v, (const _Float16*)base + index, sizeof v);
  return __builtin_convertvector(v, vf32);
}

INLINE void store_from_f32(void* base, int64_t index, int32_t type, vf32 value) {
  if (type == SVDQ_F32) { store_f32((float*)base + index, value); return; }
  if (type == SVDQ_BF16) { vu16 v = narrow_bf16(value); memcpy((uint16_t*)base + index, &v, sizeof v); return; }
  vf16 v = __builtin_convertvector(value, vf16);
  memcpy((_Float16*)base + index, &v, sizeof v);
}

INLINE int64_t element_bytes(int32_t type) { return type == SVDQ_F32 ? 4 : type == SVDQ_E4M3 ? 1 : 2; }

/* The same where fewer than 16 are there; the others are zero. */
INLINE vf32 load_some_as_f32(const void* base, int64_t index, int32_t type, int64_t count) {
  if (count >= LANES) return load_as_f32(base, index, type);
  uint8_t buffer[64] = {0};
  if (count > 0) memcpy(buffer, (const uint8_t*)base + index * element_bytes(type), count * element_bytes(type));
  return load_as_f32(buffer, 0, type);
}

INLINE void store_some_from_f32(void* base, int64_t index, int32_t type, vf32 value, int64_t count) {
  if (count >= LANES) { store_from_f32(base, index, type, value); return; }
  uint8_t buffer[64];
  store_from_f32(buffer, 0, type, value);
  if (count > 0) memcpy((uint8_t*)base + index * element_bytes(type), buffer, count * element_bytes(type));
}

INLINE float e4m3_value(uint8_t code) {
  const uint32_t magnitude = code & 127, bits = (magnitude << 20) + (120u << 23);
  float value;
  memcpy(&value, &bits, 4);
  if (magnitude < 8) value = (float)magnitude * 0x1p-9f;
  if (magnitude == 127) value = __builtin_nanf("");
  return code & 128 ? -value : value;
}

INLINE float scalar_as_f32(const void* base, int64_t index, int32_t type) {
  if (type == SVDQ_F32) return ((const float*)base)[index];
  if (type == SVDQ_E4M3) return e4m3_value(((const uint8_t*)base)[index]);
  if (type == SVDQ_F16) return (float)((const _Float16*)base)[index];
  uint32_t bits = (uint32_t)((const uint16_t*)base)[index] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* e^v, to the last bits of a float32; for v of at most 88 in magnitude. */
INLINE vf32 exponential(vf32 v) {
  vf32 n = __builtin_elementwise_roundeven(v * 1.44269504f);
  vf32 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  vf32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (vf32)((__builtin_convertvector(n, vi32) + 127) << 23);
}

/* x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, as x times a sigmoid. */
INLINE vf32 gelu_tanh(vf32 x) {
  vf32 u = x * (1 + 0.044715f * x * x) * -1.5957691216f;
  u = __builtin_elementwise_min(__builtin_elementwise_max(u, splat(-87)), splat(87));
  /* Where the exponential would end, so does the function. */
  return choose(x < -20, splat(0), x / (1 + exponential(u)));
}

/* Additions in one fixed order: the sum of a row must not depend on what computes it. */
INLINE float sum_lanes(vf32 v) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

/* Largest of the magnitudes' bits: ordered as the magnitudes are, with what is not a number above all. */
INLINE float largest_magnitude(vu32 bits) {
  uint32_t top = __builtin_reduce_max(bits);
  float value;
  memcpy(&value, &top, 4);
  return value;
}

#endif
