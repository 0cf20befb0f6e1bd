/* 3 rows by 64 columns: 12 integer and 12 float sums, 4 weights and a broadcast fill the 32 registers, so that a group's
   integers are scaled and added without leaving them. */
enum { REGISTER_ROWS = 3 };

INLINE void tile_rows(const tile_work* t, const int rows, const int steps, const int scaled) {
  vf32 sum[REGISTER_ROWS][VECTORS];
  const int8_t* a = t->a;
  const uint8_t* b = t->b;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < VECTORS; j++) sum[i][j] = t->first ? splat(0) : load_f32(t->c + i * SVDQ_PANEL + j * LANES);
  _Pragma("clang loop unroll(disable)") for (int32_t g = 0; g < t->groups; g++) {
    __m512i acc[REGISTER_ROWS][VECTORS];
    for (int i = 0; i < rows; i++) {
      const __m512i start = _mm512_set1_epi32(t->sums[g * t->sum_stride + i]);
      for (int j = 0; j < VECTORS; j++) acc[i][j] = start;
    }
    _Pragma("clang loop unroll_count(4)") for (int k = 0; k < steps; k++) {
      __m512i w[VECTORS];
      for (int j = 0; j < VECTORS; j++) w[j] = _mm512_loadu_si512(b + j * 64);
      b += SVDQ_PANEL * 4;
      for (int i = 0; i < rows; i++) {
        int32_t four;
        memcpy(&four, a + i * SVDQ_BLOCK, 4);
        const __m512i x = _mm512_set1_epi32(four);
        for (int j = 0; j < VECTORS; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], w[j], x);
      }
      a += 4;
    }
    for (int j = 0; j < VECTORS; j++) {
      const vf32 scale = load_f32(t->b_scale + g * SVDQ_PANEL + j * LANES);
      for (int i = 0; i < rows; i++) {
        const vf32 part = (vf32)_mm512_cvtepi32_ps(acc[i][j]);
        sum[i][j] = fma_f32(part, scaled ? scale * splat(t->a_scale[g / t->a_every * t->a_stride + i]) : scale, sum[i][j]);
      }
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < VECTORS; j++) store_f32(t->c + i * SVDQ_PANEL + j * LANES, sum[i][j]);
}

#define TILE_SHAPE(ROWS, STEPS, NAME)                                                          \
  static __attribute__((noinline)) void NAME##_plain(const tile_work* t) { tile_rows(t, ROWS, STEPS, 0); } \
  static __attribute__((noinline)) void NAME##_scaled(const tile_work* t) { tile_rows(t, ROWS, STEPS, 1); }

TILE_SHAPE(3, 16, tile_3_64)
TILE_SHAPE(3, 4, tile_3_16)
TILE_SHAPE(3, t->steps, tile_3_any)
TILE_SHAPE(2, t->steps, tile_2_any)
TILE_SHAPE(1, t->steps, tile_1_any)

INLINE void tile_avx512(const tile_work* t, int rows) {
  const int scaled = t->a_scale != NULL;
#define RUN(NAME) { if (scaled) NAME##_scaled(t); else NAME##_plain(t); }
  if (rows == 3 && t->steps == 16) RUN(tile_3_64)
  else if (rows == 3 && t->steps == 4) RUN(tile_3_16)
  else if (rows == 3) RUN(tile_3_any)
  else if (rows == 2) RUN(tile_2_any)
  else RUN(tile_1_any)
#undef RUN
}
