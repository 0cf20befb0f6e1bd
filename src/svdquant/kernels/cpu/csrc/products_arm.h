/* Products of bytes on registers of 4 integers: rows by 16 columns, steps a multiple of 4. Weight codes stay below 128,
   so signed times signed does for all formats. */
enum { QUAD = 4, CHUNK_QUADS = LANES / QUAD };

INLINE int8x16_t load_quads(const uint8_t* p) { return vld1q_s8((const int8_t*)p); }

/* sdot: a row's 16 codes are four broadcasts. */
INLINE void products_by_dots(vi32* part, const int8_t* a, const uint8_t* b, const int32_t* sums, int32_t steps,
                             const int rows) {
  int32x4_t acc[TILE_ROWS][CHUNK_QUADS];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = vdupq_n_s32(sums[i]);
  _Pragma("clang loop unroll(disable)") for (int32_t k = 0; k < steps; k += 4) {
    int8x16_t x[TILE_ROWS], w[CHUNK_QUADS];
    for (int i = 0; i < rows; i++) x[i] = vld1q_s8(a + i * SVDQ_BLOCK + k * 4);
#define STEP(S)                                                                                                      \
  for (int j = 0; j < CHUNK_QUADS; j++) w[j] = load_quads(b + ((k + S) * SVDQ_PANEL + j * QUAD) * 4);                 \
  for (int i = 0; i < rows; i++)                                                                                     \
    for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = vdotq_laneq_s32(acc[i][j], w[j], x[i], S);
    STEP(0) STEP(1) STEP(2) STEP(3)
#undef STEP
  }
  for (int i = 0; i < rows; i++) memcpy(&part[i], acc[i], sizeof part[i]);
}

#if SVDQ_ARM_MATRICES
#define TOGETHER(ROWS) ((ROWS) == TILE_ROWS ? 2 : 1)

/* smmla: 2 rows by 2 columns over 8 codes, twice the work of an sdot. Eight rows by eight columns at a time; the
   panel's quads of two steps, zipped, are two columns' 8 codes. Rows lie in pairs, 8 codes of each by turns. */
INLINE void products_by_matrices(vi32* part, const int8_t* a, const uint8_t* b, const int32_t* sums, int32_t steps) {
  enum { PAIRS = TILE_ROWS / 2, HALF = 8 };
  int32_t out[TILE_ROWS][LANES];
  _Pragma("clang loop unroll(disable)") for (int n = 0; n < LANES; n += HALF) {
    int32x4_t acc[PAIRS][HALF / 2];
    for (int p = 0; p < PAIRS; p++) {
      const int32x4_t start = vcombine_s32(vdup_n_s32(sums[2 * p]), vdup_n_s32(sums[2 * p + 1]));
      for (int j = 0; j < HALF / 2; j++) acc[p][j] = start;
    }
    _Pragma("clang loop unroll(disable)") for (int32_t k = 0; k < steps; k += 2) {
      int8x16_t w[HALF / 2];
      for (int j = 0; j < HALF; j += QUAD) {
        const uint8_t* at = b + (k * SVDQ_PANEL + n + j) * 4;
        const int32x4_t first = vreinterpretq_s32_s8(load_quads(at));
        const int32x4_t second = vreinterpretq_s32_s8(load_quads(at + SVDQ_PANEL * 4));
        w[j / 2] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
        w[j / 2 + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      }
      for (int p = 0; p < PAIRS; p++) {
        const int8x16_t x = vld1q_s8(a + 2 * p * SVDQ_BLOCK + k * 8);
        for (int j = 0; j < HALF / 2; j++) acc[p][j] = vmmlaq_s32(acc[p][j], x, w[j]);
      }
    }
    for (int p = 0; p < PAIRS; p++)
      for (int j = 0; j < HALF / 2; j += 2) {
        const int64x2_t left = vreinterpretq_s64_s32(acc[p][j]), right = vreinterpretq_s64_s32(acc[p][j + 1]);
        vst1q_s32(&out[2 * p][n + 2 * j], vreinterpretq_s32_s64(vzip1q_s64(left, right)));
        vst1q_s32(&out[2 * p + 1][n + 2 * j], vreinterpretq_s32_s64(vzip2q_s64(left, right)));
      }
  }
  for (int i = 0; i < TILE_ROWS; i++) memcpy(&part[i], out[i], sizeof part[i]);
}
#else
#define TOGETHER(ROWS) 1
#endif

/* Rows as the products read them, once for all columns: TOGETHER of them by turns. */
INLINE const int8_t* arrange_rows(int8_t* to, const int8_t* a, int32_t steps, const int rows) {
  if (TOGETHER(rows) == 1) return a;
  for (int i = 0; i < rows; i += 2)
    for (int32_t k = 0; k < steps * 4; k += 16) {
      const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(a + i * SVDQ_BLOCK + k));
      const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(a + (i + 1) * SVDQ_BLOCK + k));
      vst1q_s8(to + i * SVDQ_BLOCK + 2 * k, vreinterpretq_s8_s64(vzip1q_s64(first, second)));
      vst1q_s8(to + i * SVDQ_BLOCK + 2 * k + 16, vreinterpretq_s8_s64(vzip2q_s64(first, second)));
    }
  return to;
}

INLINE void products(vi32* part, const int8_t* a, const uint8_t* b, const int32_t* sums, int32_t steps, const int rows,
                     const int whole_bytes) {
  (void)whole_bytes;
#if SVDQ_ARM_MATRICES
  if (rows == TILE_ROWS) {
    products_by_matrices(part, a, b, sums, steps);
    return;
  }
#endif
  products_by_dots(part, a, b, sums, steps, rows);
}
