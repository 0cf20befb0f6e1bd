/* low = x Dᵀ: dot products of rows with rows, sixteen partial sums each, added up in one order. */
#include "isa.h"
#include "steps.h"

static int64_t steps(const svdq_input* in) { return (in->features + 2 * LANES - 1) / (2 * LANES); }

int32_t SVDQ_NAME(branch_is_bf16)(const svdq_input* in, const svdq_weight* weight) {
  return SVDQ_BF16_DOT && in->x_type == SVDQ_BF16 && weight->down_type == SVDQ_BF16 && weight->up_type == SVDQ_BF16;
}

int64_t SVDQ_NAME(low_bytes)(const svdq_input* in, const svdq_weight* weight) {
  return in->rows * padded_rank(weight) * (SVDQ_NAME(branch_is_bf16)(in, weight) ? 2 : 4);
}

int64_t SVDQ_NAME(down_bytes)(const svdq_input* in, const svdq_weight* weight) {
  const int64_t rows = weight->rank + (int64_t)in->threads * DOT_ROWS;
  return rows * steps(in) * 2 * LANES * (SVDQ_NAME(branch_is_bf16)(in, weight) ? 2 : 4);
}

void SVDQ_NAME(down_begin)(SVDQ_NAME(down_context) * c, const svdq_input* in, const svdq_weight* weight, void* low,
                           void* scratch) {
  const int64_t wide = steps(in) * 2 * LANES;
  c->in = in;
  c->weight = weight;
  c->low = low;
  c->bf16 = SVDQ_NAME(branch_is_bf16)(in, weight);
  c->rows = (float*)((uint8_t*)scratch + weight->rank * wide * (c->bf16 ? 2 : 4));
  c->down = scratch;
  if (c->bf16 && in->features == wide) {
    c->down = weight->down;
    return;
  }
  for (int64_t r = 0; r < weight->rank; r++)
    for (int64_t k = 0; k < wide; k += LANES) {
      vf32 v = load_some_as_f32(weight->down, r * in->features + k, weight->down_type, in->features - k);
      store_from_f32(scratch, r * wide + k, c->bf16 ? SVDQ_BF16 : SVDQ_F32, v);
    }
}

#define TILE(NAME, ELEMENT, LOAD, STEP, COUNT)                                                                      \
  INLINE void NAME(const ELEMENT* const* x, const ELEMENT* d, int64_t stride, int64_t count, int rows, int columns, \
                   float out[DOT_ROWS][DOT_COLUMNS]) {                                                              \
    vf32 acc[DOT_ROWS][DOT_COLUMNS] = {0};                                                                          \
    for (int64_t k = 0; k < count; k++) {                                                                           \
      __typeof__(LOAD(d)) b[DOT_COLUMNS];                                                                           \
      _Pragma("clang loop unroll(full)") for (int j = 0; j < columns; j++) b[j] = LOAD(d + j * stride + k * COUNT);  \
      _Pragma("clang loop unroll(full)") for (int i = 0; i < rows; i++) {                                           \
        __typeof__(LOAD(d)) a = LOAD(x[i] + k * COUNT);                                                             \
        _Pragma("clang loop unroll(full)") for (int j = 0; j < columns; j++) acc[i][j] = STEP;                      \
      }                                                                                                             \
    }                                                                                                               \
    for (int i = 0; i < rows; i++)                                                                                  \
      for (int j = 0; j < columns; j++) out[i][j] = sum_lanes(acc[i][j]);                                           \
  }

#if SVDQ_BF16_DOT
INLINE vu32 load_pairs(const uint16_t* p) { vu32 v; memcpy(&v, p, sizeof v); return v; }
TILE(tile_bf16, uint16_t, load_pairs, dot_bf16(acc[i][j], a, b[j]), 2 * LANES)
#endif
TILE(tile_f32, float, load_f32, fma_f32(a, b[j], acc[i][j]), LANES)

/* Every tile in one of four shapes, each a loop of its own with all its sums in registers. */
#define BLOCK(NAME, DOT, ELEMENT)                                                                                     \
  static void NAME(const ELEMENT* const* x, const ELEMENT* d, int64_t stride, int64_t count, int rows, int64_t rank, \
                   float* out) {                                                                                      \
    float part[DOT_ROWS][DOT_COLUMNS];                                                                                \
    for (int64_t r = 0; r < rank; r += DOT_COLUMNS) {                                                                 \
      const int columns = rank - r < DOT_COLUMNS ? (int)(rank - r) : DOT_COLUMNS;                                     \
      if (rows == DOT_ROWS && columns == DOT_COLUMNS) {                                                               \
        DOT(x, d + r * stride, stride, count, DOT_ROWS, DOT_COLUMNS, part);                                          \
        for (int i = 0; i < rows; i++)                                                                                \
          for (int j = 0; j < columns; j++) out[i * rank + r + j] = part[i][j];                                       \
        continue;                                                                                                     \
      }                                                                                                               \
      for (int i = 0; i < rows; i++) {                                                                                \
        if (columns == DOT_COLUMNS) DOT(x + i, d + r * stride, stride, count, 1, DOT_COLUMNS, part);                 \
        else                                                                                                          \
          for (int j = 0; j < columns; j++) {                                                                         \
            float one[DOT_ROWS][DOT_COLUMNS];                                                                         \
            DOT(x + i, d + (r + j) * stride, stride, count, 1, 1, one);                                              \
            part[0][j] = one[0][0];                                                                                   \
          }                                                                                                           \
        for (int j = 0; j < columns; j++) out[i * rank + r + j] = part[0][j];                                         \
      }                                                                                                               \
    }                                                                                                                 \
  }

#if SVDQ_BF16_DOT
BLOCK(block_bf16, tile_bf16, uint16_t)
#endif
BLOCK(block_f32, tile_f32, float)

/* The strengths of adapters, before anything is rounded. */
INLINE void scale_low(const svdq_input* in, int64_t row, int rows, int64_t rank, float* out) {
  if (!in->low_scales) return;
  for (int i = 0; i < rows; i++) {
    const float* scales = in->low_scales + (in->low_first + row + i) / in->low_rows * rank;
    for (int64_t r = 0; r < rank; r++) out[i * rank + r] *= scales[r];
  }
}

void SVDQ_NAME(down_rows)(const SVDQ_NAME(down_context) * c, int64_t first, int64_t last, int32_t worker) {
  const svdq_input* in = c->in;
  const int64_t wide = steps(in) * 2 * LANES, rank = c->weight->rank, width = padded_rank(c->weight);
  float out[DOT_ROWS * 1024];
  for (int64_t row = first; row < last; row += DOT_ROWS) {
    const int rows = last - row < DOT_ROWS ? (int)(last - row) : DOT_ROWS;
#if SVDQ_BF16_DOT
    if (c->bf16) {
      const uint16_t* x[DOT_ROWS];
      for (int i = 0; i < rows; i++) {
        const uint16_t* source = (const uint16_t*)in->x + (row + i) * in->x_stride;
        x[i] = source;
        if (in->features != wide) {
          uint16_t* copy = (uint16_t*)c->rows + (worker * DOT_ROWS + i) * wide;
          memset(copy + wide - 2 * LANES, 0, 2 * LANES * sizeof(uint16_t));
          memcpy(copy, source, in->features * sizeof(uint16_t));
          x[i] = copy;
        }
      }
      block_bf16(x, c->down, wide, wide / (2 * LANES), rows, rank, out);
      scale_low(in, row, rows, rank, out);
      for (int i = 0; i < rows; i++) {
        uint16_t* low = (uint16_t*)c->low + (row + i) * width;
        for (int64_t r = 0; r < rank; r += LANES) {
          const int64_t count = rank - r < LANES ? rank - r : LANES;
          store_some_from_f32(low, r, SVDQ_BF16, load_some_as_f32(out, i * rank + r, SVDQ_F32, count), count);
        }
        if (width > rank) low[rank] = 0;
      }
      continue;
    }
#endif
    const float* x[DOT_ROWS];
    for (int i = 0; i < rows; i++) {
      float* copy = c->rows + (worker * DOT_ROWS + i) * wide;
      for (int64_t k = 0; k < wide; k += LANES)
        store_f32(copy + k, load_some_as_f32(in->x, (row + i) * in->x_stride + k, in->x_type, in->features - k));
      x[i] = copy;
    }
    block_f32(x, c->down, wide, wide / LANES, rows, rank, out);
    scale_low(in, row, rows, rank, out);
    for (int i = 0; i < rows; i++) {
      float* low = (float*)c->low + (row + i) * width;
      memcpy(low, out + i * rank, rank * sizeof(float));
      /* A bfloat16 model's low-rank activation is bfloat16, whoever multiplies it. */
      if (in->x_type == SVDQ_BF16)
        for (int64_t r = 0; r < rank; r++) low[r] = round_bf16(splat(low[r]))[0];
      if (width > rank) low[rank] = 0;
    }
  }
}
