/* A few rows by 16 columns of integers in registers; the float sums stay in memory. */
#if defined(__aarch64__)
#include "products_arm.h"
#else
#include "products_avx2.h"
#endif

INLINE void tile_rows(const tile_work* t, const int rows, const int whole_bytes) {
  /* Codes behind the last column are zero. */
  const int32_t steps = (t->steps + 3) / 4 * 4;
  int8_t arranged[TILE_ROWS * SVDQ_BLOCK];
  const int8_t* codes = arrange_rows(arranged, t->a, (t->groups - 1) * t->steps + steps, rows);
  for (int32_t g = 0; g < t->groups; g++) {
    const int8_t* a = codes + g * t->steps * 4 * TOGETHER(rows);
    const int32_t* sums = t->sums + g * t->sum_stride;
    for (int n = 0; n < SVDQ_PANEL; n += LANES) {
      vi32 part[TILE_ROWS];
      products(part, a, t->b + ((int64_t)g * t->steps * SVDQ_PANEL + n) * 4, sums, steps, rows, whole_bytes);
      const vf32 scale = load_f32(t->b_scale + g * SVDQ_PANEL + n);
      for (int i = 0; i < rows; i++) {
        float* c = t->c + i * SVDQ_PANEL + n;
        const vf32 before = t->first && g == 0 ? splat(0) : load_f32(c);
        const vf32 both = t->a_scale ? scale * splat(t->a_scale[g / t->a_every * t->a_stride + i]) : scale;
        store_f32(c, fma_f32(__builtin_convertvector(part[i], vf32), both, before));
      }
    }
  }
}

#define TILE_SHAPE(ROWS)                                                                                  \
  static __attribute__((noinline)) void tile_##ROWS##_codes(const tile_work* t) { tile_rows(t, ROWS, 0); } \
  static __attribute__((noinline)) void tile_##ROWS##_bytes(const tile_work* t) { tile_rows(t, ROWS, 1); }

enum { SOME_ROWS = 4 };
TILE_SHAPE(TILE_ROWS)
TILE_SHAPE(SOME_ROWS)
TILE_SHAPE(1)

INLINE void tile(const tile_work* t, int rows) {
  if (rows == TILE_ROWS) {
    (t->whole_bytes ? tile_TILE_ROWS_bytes : tile_TILE_ROWS_codes)(t);
    return;
  }
  tile_work rest = *t;
  while (rows > 0) {
    const int some = rows < SOME_ROWS ? 1 : SOME_ROWS;
    if (some == 1) (t->whole_bytes ? tile_1_bytes : tile_1_codes)(&rest);
    else (t->whole_bytes ? tile_SOME_ROWS_bytes : tile_SOME_ROWS_codes)(&rest);
    rest.a += some * SVDQ_BLOCK;
    rest.sums += some;
    if (rest.a_scale) rest.a_scale += some;
    rest.c += some * SVDQ_PANEL;
    rows -= some;
  }
}
