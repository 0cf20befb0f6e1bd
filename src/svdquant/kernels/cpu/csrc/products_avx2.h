/* Products of bytes on registers of 8 integers: rows by 16 columns, steps a multiple of 4. */
enum { QUAD = 8, CHUNK_QUADS = LANES / QUAD };

INLINE __m256i load_quads(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE __m256i same_quads(const int8_t* p) { int32_t four; memcpy(&four, p, 4); return _mm256_set1_epi32(four); }

#if !SVDQ_NARROW_VNNI
/* Sums of two products have 16 bits, so do sums of eight where weight codes have 5 (8 x 24 x 127 < 2^15): those stay in
   registers, and the sums of 32 bits in memory. */
INLINE void products_of_codes(__m256i acc[TILE_ROWS][CHUNK_QUADS], const int8_t* a, const uint8_t* b, int32_t steps,
                              const int rows) {
  _Pragma("clang loop unroll(disable)") for (int32_t k = 0; k < steps; k += 4) {
    __m256i sum[TILE_ROWS][CHUNK_QUADS];
    _Pragma("clang loop unroll(full)") for (int s = 0; s < 4; s++) {
      __m256i w[CHUNK_QUADS];
      for (int j = 0; j < CHUNK_QUADS; j++) w[j] = load_quads(b + ((k + s) * SVDQ_PANEL + j * QUAD) * 4);
      for (int i = 0; i < rows; i++) {
        const __m256i x = same_quads(a + i * SVDQ_BLOCK + (k + s) * 4);
        for (int j = 0; j < CHUNK_QUADS; j++) {
          const __m256i two = _mm256_maddubs_epi16(w[j], x);
          sum[i][j] = s ? _mm256_add_epi16(sum[i][j], two) : two;
          /* Else clang adds in another order, for which the registers do not suffice. */
          __asm__("" : "+x"(sum[i][j]));
        }
      }
    }
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < CHUNK_QUADS; j++)
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(sum[i][j], _mm256_set1_epi16(1)));
  }
}
#endif

INLINE __m256i dot_quads(__m256i acc, __m256i w, __m256i x) {
#if SVDQ_NARROW_VNNI
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  /* |w| times x with w's sign: x, unlike w, is never -128, and 2 x 128 x 127 has 16 bits. */
  const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
#endif
}

#define TOGETHER(ROWS) 1
INLINE const int8_t* arrange_rows(int8_t* to, const int8_t* a, int32_t steps, int rows) {
  (void)to, (void)steps, (void)rows;
  return a;
}

INLINE void products(vi32* part, const int8_t* a, const uint8_t* b, const int32_t* sums, int32_t steps, const int rows,
                     const int whole_bytes) {
  __m256i acc[TILE_ROWS][CHUNK_QUADS];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = _mm256_set1_epi32(sums[i]);
#if !SVDQ_NARROW_VNNI
  if (!whole_bytes) products_of_codes(acc, a, b, steps, rows);
  else
#endif
    for (int32_t k = 0; k < steps; k++) {
      __m256i w[CHUNK_QUADS];
      for (int j = 0; j < CHUNK_QUADS; j++) w[j] = load_quads(b + (k * SVDQ_PANEL + j * QUAD) * 4);
      for (int i = 0; i < rows; i++) {
        const __m256i x = same_quads(a + i * SVDQ_BLOCK + k * 4);
        for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = dot_quads(acc[i][j], w[j], x);
      }
    }
  (void)whole_bytes;
  for (int i = 0; i < rows; i++) memcpy(&part[i], acc[i], sizeof part[i]);
}
