/* Stored weights, row by row, to what the products read: columns side by side, four codes of each. */
#ifndef SVDQ_UNPACK_H
#define SVDQ_UNPACK_H

#include "isa.h"

/* 32 bytes of two 4-bit codes each to 64 bytes of one. */
INLINE bytes64 spread_nibbles(const uint8_t* p) {
  typedef uint8_t half __attribute__((vector_size(32)));
  typedef uint16_t wide __attribute__((vector_size(64)));
  half v;
  memcpy(&v, p, sizeof v);
  wide w = __builtin_convertvector(v, wide);
  return (bytes64)((w | (w << 4)) & 0x0f0f);
}

/* e2m1 to twice its value plus 12: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives. */
INLINE bytes64 e2m1_codes(bytes64 nibbles) {
#if SVDQ_WIDE
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return (bytes64)_mm512_shuffle_epi8(table, (__m512i)nibbles);
#else
  bytes64 m = nibbles & 7;
  bytes64 value = m + ((bytes64)(m == 5) & 1) + ((bytes64)(m == 6) & 2) + ((bytes64)(m == 7) & 5);
  bytes64 negative = (bytes64)(nibbles > 7);
  return ((12 - value) & negative) | ((12 + value) & ~negative);
#endif
}

/* 64 columns' codes of one output, from column `column` on; columns behind the row's end are some code. */
INLINE vu32 load_codes(const svdq_weight* w, int64_t output, int64_t column) {
  const int four_bit = w->format != SVDQ_INT8;
  const int64_t at = four_bit ? column / 2 : column, wanted = four_bit ? 32 : 64;
  const uint8_t* p = w->qweight + output * w->row_bytes + at;
  uint8_t buffer[64];
  if (at + wanted > w->row_bytes) {
    memset(buffer, 0, sizeof buffer);
    if (at < w->row_bytes) memcpy(buffer, p, w->row_bytes - at);
    p = buffer;
  }
  if (w->format == SVDQ_INT4) return (vu32)(spread_nibbles(p) ^ 8);
  if (w->format == SVDQ_NVFP4) return (vu32)e2m1_codes(spread_nibbles(p));
  bytes64 v;
  memcpy(&v, p, sizeof v);
  return (vu32)(v ^ SVDQ_INT8_OFFSET);
}

#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

/* r[i][j] becomes r[j][i]. */
INLINE void transpose16(vu32* r) {
  vu32 t[16];
  _Pragma("clang loop unroll(full)") for (int i = 0; i < 16; i += 2) {
    t[i] = PICK(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = PICK(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  _Pragma("clang loop unroll(full)") for (int i = 0; i < 16; i += 4) {
    r[i] = PICK(t[i], t[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    r[i + 1] = PICK(t[i], t[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    r[i + 2] = PICK(t[i + 1], t[i + 3], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    r[i + 3] = PICK(t[i + 1], t[i + 3], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  _Pragma("clang loop unroll(full)") for (int i = 0; i < 4; i++) {
    vu32 p = PICK(r[i], r[4 + i], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    vu32 q = PICK(r[i], r[4 + i], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vu32 s = PICK(r[8 + i], r[12 + i], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    vu32 u = PICK(r[8 + i], r[12 + i], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    t[i] = PICK(p, s, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[4 + i] = PICK(p, s, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    t[8 + i] = PICK(q, u, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[12 + i] = PICK(q, u, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* b [SVDQ_BLOCK / 4][SVDQ_PANEL][4] for outputs [start, start + valid); the others repeat the last one. */
static void unpack_block(const svdq_weight* w, int64_t start, int64_t valid, int64_t block, uint8_t* b) {
  for (int64_t k = 0; k < SVDQ_BLOCK; k += 64) {
    const int64_t column = block * SVDQ_BLOCK + k;
    if (column >= w->columns) return;
    for (int64_t n = 0; n < SVDQ_PANEL; n += LANES) {
      vu32 r[LANES];
      for (int64_t i = 0; i < LANES; i++) r[i] = load_codes(w, start + (n + i < valid ? n + i : valid - 1), column);
      transpose16(r);
      for (int64_t i = 0; i < LANES; i++) memcpy(b + ((k / 4 + i) * SVDQ_PANEL + n) * 4, &r[i], sizeof r[i]);
    }
  }
}

/* Asks for one output's codes of a block, before unpack_block needs them. */
INLINE void fetch_codes(const svdq_weight* w, int64_t output, int64_t block) {
  const int64_t size = w->format == SVDQ_INT8 ? SVDQ_BLOCK : SVDQ_BLOCK / 2;
  const uint8_t* p = w->qweight + output * w->row_bytes + block * size;
  for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(p + line);
}

/* scales [SVDQ_BLOCK / group][SVDQ_PANEL]: float32, group scale times outer scale. */
static void unpack_scales(const svdq_weight* w, int64_t start, int64_t valid, int64_t block, int32_t group, float* scales) {
  const float unit = w->format == SVDQ_NVFP4 ? 0.5f : 1;
  const int64_t count = SVDQ_BLOCK / group;
  for (int64_t g = 0; g < count; g++) {
    const int64_t column = block * SVDQ_BLOCK + g * group;
    if (column >= w->columns) return;
    const int64_t source = w->group ? column / w->group : 0;
    for (int64_t n = 0; n < SVDQ_PANEL; n++) {
      const int64_t output = start + (n < valid ? n : valid - 1);
      float scale = scalar_as_f32(w->scales, output * w->groups + source, w->scales_type) * unit;
      if (w->outer) {
        const int64_t part = source / (w->groups / w->outer_blocks);
        scale *= scalar_as_f32(w->outer, output * w->outer_blocks + part, w->outer_type);
      }
      scales[g * SVDQ_PANEL + n] = scale;
    }
  }
}

#endif
