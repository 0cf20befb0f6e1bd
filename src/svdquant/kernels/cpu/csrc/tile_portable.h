/* 4 rows by 16 columns in registers of 8 or 4 integers; the float sums stay in memory. */
#if defined(__aarch64__)
enum { TILE_ROWS = 4, QUAD = 4 };
typedef int32x4_t quads;

INLINE quads load_quads(const uint8_t* p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t*)p)); }
INLINE quads same_quads(int32_t value) { return vdupq_n_s32(value); }
/* Codes of weights stay below 128, so signed times signed does for all formats. */
INLINE quads dot_quads(quads acc, quads w, quads x, int whole_bytes) {
  (void)whole_bytes;
  return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
#else
enum { TILE_ROWS = 4, QUAD = 8 };
typedef __m256i quads;

INLINE quads load_quads(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE quads same_quads(int32_t value) { return _mm256_set1_epi32(value); }

INLINE quads dot_quads(quads acc, quads w, quads x, int whole_bytes) {
#if defined(__AVXVNNI__)
  (void)whole_bytes;
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  /* Sums of two products have 16 bits: enough for codes of 5 bits, so bytes are multiplied as two halves. */
  const __m256i ones = _mm256_set1_epi16(1);
  if (!whole_bytes) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  const __m256i nibble = _mm256_set1_epi8(15), sixteens = _mm256_set1_epi16(16);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), low = _mm256_and_si256(w, nibble);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), sixteens));
#endif
}
#endif

enum { CHUNK_QUADS = LANES / QUAD };

INLINE void tile_rows(const tile_work* t, const int rows, const int whole_bytes) {
  for (int32_t g = 0; g < t->groups; g++) {
    const int8_t* a = t->a + g * t->steps * 4;
    for (int n = 0; n < SVDQ_PANEL; n += LANES) {
      const uint8_t* b = t->b + (int64_t)g * t->steps * SVDQ_PANEL * 4 + n * 4;
      quads acc[TILE_ROWS][CHUNK_QUADS];
      for (int i = 0; i < rows; i++)
        for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = same_quads(t->sums[g * t->sum_stride + i]);
      for (int k = 0; k < t->steps; k++) {
        quads w[CHUNK_QUADS];
        for (int j = 0; j < CHUNK_QUADS; j++) w[j] = load_quads(b + k * SVDQ_PANEL * 4 + j * QUAD * 4);
        for (int i = 0; i < rows; i++) {
          int32_t four;
          memcpy(&four, a + i * SVDQ_BLOCK + k * 4, 4);
          const quads x = same_quads(four);
          for (int j = 0; j < CHUNK_QUADS; j++) acc[i][j] = dot_quads(acc[i][j], w[j], x, whole_bytes);
        }
      }
      const vf32 scale = load_f32(t->b_scale + g * SVDQ_PANEL + n);
      for (int i = 0; i < rows; i++) {
        float* c = t->c + i * SVDQ_PANEL + n;
        vi32 part;
        memcpy(&part, acc[i], sizeof part);
        const vf32 before = t->first && g == 0 ? splat(0) : load_f32(c);
        const vf32 both = t->a_scale ? scale * splat(t->a_scale[g / t->a_every * t->a_stride + i]) : scale;
        store_f32(c, fma_f32(__builtin_convertvector(part, vf32), both, before));
      }
    }
  }
}

static __attribute__((noinline)) void tile_4_codes(const tile_work* t) { tile_rows(t, TILE_ROWS, 0); }
static __attribute__((noinline)) void tile_1_codes(const tile_work* t) { tile_rows(t, 1, 0); }
static __attribute__((noinline)) void tile_4_bytes(const tile_work* t) { tile_rows(t, TILE_ROWS, 1); }
static __attribute__((noinline)) void tile_1_bytes(const tile_work* t) { tile_rows(t, 1, 1); }

INLINE void tile(const tile_work* t, int rows) {
  if (rows == TILE_ROWS) {
    (t->whole_bytes ? tile_4_bytes : tile_4_codes)(t);
    return;
  }
  tile_work one = *t;
  for (int i = 0; i < rows; i++) {
    (t->whole_bytes ? tile_1_bytes : tile_1_codes)(&one);
    one.a += SVDQ_BLOCK;
    one.sums++;
    one.a_scale += one.a_scale != NULL;
    one.c += SVDQ_PANEL;
  }
}
