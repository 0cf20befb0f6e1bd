/* Instructions that the processor lacks, in C: included before a variant's sources, it makes them compile for AMX or
   AVX-VNNI and run without. Where the processor would raise an exception, this aborts. */
#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbsud emulated_dpbsud

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
} emulated_shapes;

/* Threads whose tile registers are in use. */
extern _Atomic int emulated_tile_users;
static _Thread_local emulated_shapes shapes;
static _Thread_local uint8_t tiles[8][16][64];

static inline void require(int condition) {
  if (!condition) abort();
}

static inline void require_tile(int t) { require(shapes.palette == 1 && t >= 0 && t < 8 && shapes.rows[t] > 0); }

static inline void emulated_loadconfig(const void* from) {
  emulated_shapes s;
  memcpy(&s, from, sizeof s);
  require(s.palette == 1 && s.start_row == 0);
  for (int i = 0; i < 14; i++) require(s.reserved[i] == 0);
  for (int i = 0; i < 16; i++) {
    require(s.rows[i] <= (i < 8 ? 16 : 0) && s.column_bytes[i] <= (i < 8 ? 64 : 0));
    require((s.rows[i] == 0) == (s.column_bytes[i] == 0));
  }
  if (shapes.palette == 0) emulated_tile_users++;
  shapes = s;
  /* The processor clears them; nothing should depend on it. */
  memset(tiles, 0x5a, sizeof tiles);
}

static inline void emulated_release(void) {
  if (shapes.palette == 1) emulated_tile_users--;
  shapes.palette = 0;
}

static inline void emulated_zero(int t) {
  require_tile(t);
  memset(tiles[t], 0, sizeof tiles[t]);
}

static inline void emulated_loadd(int t, const void* base, int64_t stride) {
  require_tile(t);
  memset(tiles[t], 0, sizeof tiles[t]);
  for (int i = 0; i < shapes.rows[t]; i++)
    memcpy(tiles[t][i], (const uint8_t*)base + i * stride, shapes.column_bytes[t]);
}

static inline void emulated_stored(int t, void* base, int64_t stride) {
  require_tile(t);
  for (int i = 0; i < shapes.rows[t]; i++) memcpy((uint8_t*)base + i * stride, tiles[t][i], shapes.column_bytes[t]);
}

static inline void emulated_dpbsud(int c, int a, int b) {
  require_tile(a);
  require_tile(b);
  require_tile(c);
  require(a != b && a != c && b != c);
  require(shapes.column_bytes[a] % 4 == 0 && shapes.column_bytes[b] % 4 == 0);
  require(shapes.column_bytes[c] == shapes.column_bytes[b]);
  require(shapes.rows[c] == shapes.rows[a] && shapes.rows[b] == shapes.column_bytes[a] / 4);
  for (int i = 0; i < shapes.rows[c]; i++)
    for (int j = 0; j < shapes.column_bytes[c] / 4; j++) {
      uint32_t sum;
      memcpy(&sum, &tiles[c][i][4 * j], 4);
      for (int k = 0; k < shapes.column_bytes[a]; k++)
        sum += (uint32_t)((int8_t)tiles[a][i][k] * tiles[b][k / 4][4 * j + k % 4]);
      memcpy(&tiles[c][i][4 * j], &sum, 4);
    }
}
#endif

#if defined(EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

static inline __m256i emulated_dpbusd(__m256i acc, __m256i bytes, __m256i signed_bytes) {
  typedef int32_t ints __attribute__((vector_size(32)));
  ints sum = (ints)acc;
  for (int i = 0; i < 4; i++) sum += ((ints)bytes >> 8 * i & 255) * ((ints)signed_bytes << (24 - 8 * i) >> 24);
  return (__m256i)sum;
}
#endif
