/* The product of a few rows of codes with one block of one panel, added to float32 sums. */
#ifndef SVDQ_TILE_H
#define SVDQ_TILE_H

#include "isa.h"

typedef struct {
  const int8_t* a;      /* rows of codes, SVDQ_BLOCK apart */
  const int32_t* sums;  /* what the rows' sums start from, [groups], sum_stride apart */
  const uint8_t* b;     /* [groups * steps][SVDQ_PANEL][4]: weight codes + offset */
  const float* b_scale; /* [groups][SVDQ_PANEL] */
  const float* a_scale; /* NULL, or [groups / a_every], a_stride apart */
  float* c;             /* rows of sums, SVDQ_PANEL apart */
  int64_t sum_stride;
  int64_t a_stride;
  int32_t groups;       /* that share scales */
  int32_t group;        /* columns of one */
  int32_t steps;        /* of 4 columns, per group */
  int32_t whole_bytes;  /* weight codes of 8 bits, not 5 */
  int32_t a_every;      /* groups that share an a_scale */
  int32_t first;        /* the sums start here */
} tile_work;

enum { VECTORS = SVDQ_PANEL / LANES };

/* tile(t, rows): at most TILE_ROWS. A task calls tile_begin before and tile_end after all its tiles. */
#if SVDQ_AMX
#include "tile_avx512.h"
#include "tile_amx.h"
#else
#if SVDQ_WIDE
#include "tile_avx512.h"
INLINE void tile(const tile_work* t, int rows) { tile_avx512(t, rows); }
#else
#include "tile_portable.h"
#endif
INLINE void tile_begin(int32_t group) { (void)group; }
INLINE void tile_end(void) {}
#endif

#endif
