/* 16 rows by 16 columns in tile registers, 64 codes at a time. Sums leave them by memory: while one lot of groups is
   scaled and added, the next is multiplied. Same integers and same order of float32 operations as tile_avx512.h: same bits. */
enum { EDGE = 16, TILE_COLUMNS = 64, LOT = 4, FEWEST_ROWS = 8 };

typedef int32_t lot[LOT][EDGE][LANES];

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
} tile_shapes;

/* Columns of a tile of codes: a group's, where that has fewer than a tile. */
INLINE int tile_depth(int32_t group) { return group < TILE_COLUMNS ? group : TILE_COLUMNS; }

/* Registers 0 to 3 hold activations, 4 and 5 weights, 6 and 7 sums. */
INLINE void shape_tiles(int rows, int32_t group) {
  const int depth = tile_depth(group);
  tile_shapes s = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    s.rows[i] = (uint8_t)(i == 4 || i == 5 ? depth / 4 : rows);
    s.column_bytes[i] = (uint16_t)(i < 4 ? depth : LANES * 4);
  }
  _tile_loadconfig(&s);
}

INLINE void tile_begin(int32_t group) { shape_tiles(EDGE, group); }
INLINE void tile_end(void) { _tile_release(); }

#define MULTIPLY(SUMS, A, W, K)                                               \
  _tile_loadd(W, b + (K) * (TILE_COLUMNS / 4) * SVDQ_PANEL * 4, SVDQ_PANEL * 4); \
  _tile_dpbsud(SUMS, A, W);
#define STORE(SUMS, G) _tile_stored(SUMS, out[G], LANES * 4);
#define ONE_TILE_GROUP(SUMS, W, G) \
  _tile_zero(SUMS);                \
  MULTIPLY(SUMS, G, W, G)          \
  STORE(SUMS, G)

/* All groups of a block of 256 columns, whose activations are in registers. */
INLINE void multiply_held(const tile_work* t, const uint8_t* b, lot out) {
  const int tiles = (t->steps * 4 + TILE_COLUMNS - 1) / TILE_COLUMNS;
  if (tiles == 1) {
    ONE_TILE_GROUP(6, 4, 0)
    if (t->groups > 1) { ONE_TILE_GROUP(7, 5, 1) }
    if (t->groups > 2) { ONE_TILE_GROUP(6, 4, 2) }
    if (t->groups > 3) { ONE_TILE_GROUP(7, 5, 3) }
    return;
  }
  _tile_zero(6);
  MULTIPLY(6, 0, 4, 0)
  MULTIPLY(6, 1, 5, 1)
  if (tiles > 2) { MULTIPLY(6, 2, 4, 2) }
  if (tiles > 3) { MULTIPLY(6, 3, 5, 3) }
  STORE(6, 0)
  if (t->groups == 1) return;
  _tile_zero(7);
  MULTIPLY(7, 2, 4, 2)
  MULTIPLY(7, 3, 5, 3)
  STORE(7, 1)
}

/* A few groups of less than a tile each. */
INLINE void multiply_small(const tile_work* t, const uint8_t* b, int32_t first, int32_t groups, lot out) {
  const int64_t depth = t->group;
#define SMALL_GROUP(SUMS, A, W, G)                                              \
  _tile_zero(SUMS);                                                             \
  _tile_loadd(A, t->a + (first + (G)) * depth, SVDQ_BLOCK);                      \
  _tile_loadd(W, b + (first + (G)) * depth * SVDQ_PANEL, SVDQ_PANEL * 4);        \
  _tile_dpbsud(SUMS, A, W);                                                     \
  STORE(SUMS, G)
  SMALL_GROUP(6, 0, 4, 0)
  if (groups > 1) { SMALL_GROUP(7, 1, 5, 1) }
  if (groups > 2) { SMALL_GROUP(6, 2, 4, 2) }
  if (groups > 3) { SMALL_GROUP(7, 3, 5, 3) }
#undef SMALL_GROUP
}

INLINE void add_scaled(const tile_work* t, const lot in, int n, int32_t first, int32_t groups, int row,
                       const int rows) {
  float* c = t->c + row * SVDQ_PANEL + n;
  vf32 sum[FEWEST_ROWS];
  for (int i = 0; i < rows; i++) sum[i] = t->first && first == 0 ? splat(0) : load_f32(c + i * SVDQ_PANEL);
  for (int32_t g = 0; g < groups; g++) {
    const int32_t* sums = t->sums + (first + g) * t->sum_stride + row;
    const float* a_scale = t->a_scale ? t->a_scale + (first + g) / t->a_every * t->a_stride + row : NULL;
    const vf32 scale = load_f32(t->b_scale + (first + g) * SVDQ_PANEL + n);
    for (int i = 0; i < rows; i++) {
      vi32 part;
      memcpy(&part, in[g][row + i], sizeof part);
      const vf32 both = a_scale ? scale * splat(a_scale[i]) : scale;
      sum[i] = fma_f32(__builtin_convertvector(part + sums[i], vf32), both, sum[i]);
    }
  }
  for (int i = 0; i < rows; i++) store_f32(c + i * SVDQ_PANEL, sum[i]);
}

static __attribute__((noinline)) void tile_amx(const tile_work* t, int rows) {
  _Alignas(64) lot lots[2];
  const int held = tile_depth(t->group) == TILE_COLUMNS;
  const int per_column = (t->groups + LOT - 1) / LOT, count = VECTORS * per_column;
  if (held) {
    _tile_loadd(0, t->a, SVDQ_BLOCK);
    _tile_loadd(1, t->a + TILE_COLUMNS, SVDQ_BLOCK);
    _tile_loadd(2, t->a + 2 * TILE_COLUMNS, SVDQ_BLOCK);
    _tile_loadd(3, t->a + 3 * TILE_COLUMNS, SVDQ_BLOCK);
  }
  for (int i = 0; i <= count; i++) {
    if (i < count) {
      const uint8_t* b = t->b + i / per_column * LANES * 4;
      const int32_t first = i % per_column * LOT, left = t->groups - first;
      if (held) multiply_held(t, b, lots[i % 2]);
      else multiply_small(t, b, first, left < LOT ? left : LOT, lots[i % 2]);
    }
    if (i == 0) continue;
    const int n = (i - 1) / per_column * LANES;
    const int32_t first = (i - 1) % per_column * LOT, left = t->groups - first, groups = left < LOT ? left : LOT;
    int32_t(*const done)[EDGE][LANES] = lots[(i - 1) % 2];
    int row = 0;
    for (; row + FEWEST_ROWS <= rows; row += FEWEST_ROWS) add_scaled(t, done, n, first, groups, row, FEWEST_ROWS);
    for (; row < rows; row++) add_scaled(t, done, n, first, groups, row, 1);
  }
}

INLINE void tile(const tile_work* t, int rows) {
  if (rows == EDGE) {
    tile_amx(t, rows);
    return;
  }
  if (rows >= FEWEST_ROWS) {
    shape_tiles(rows, t->group);
    tile_amx(t, rows);
    shape_tiles(EDGE, t->group);
    return;
  }
  tile_work rest = *t;
  for (int row = 0; row < rows; row += REGISTER_ROWS) {
    tile_avx512(&rest, rows - row < REGISTER_ROWS ? rows - row : REGISTER_ROWS);
    rest.a += REGISTER_ROWS * SVDQ_BLOCK;
    rest.sums += REGISTER_ROWS;
    if (rest.a_scale) rest.a_scale += REGISTER_ROWS;
    rest.c += REGISTER_ROWS * SVDQ_PANEL;
  }
}
