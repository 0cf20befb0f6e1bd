/* x/s, rotated, quantized: one pass over x, a few rows at a time. */
#include "parallel.h"
#include "prepare.h"
#include "vectors.h"

enum { ROWS_PER_TASK = 12, HADAMARD = 128 };

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Everything behind the last feature is zero, so the widest padding of all does. */
static int64_t padded(const svdq_input* in) { return round_up(in->columns, SVDQ_BLOCK); }

static int shift_is_row(const svdq_input* in) { return in->bits == 8 && in->range_count > 0; }

void SVDQ_NAME(input_bytes)(svdq_input* in, int64_t* sizes) {
  in->all_rows = in->rows + (shift_is_row(in) ? 2 : 0);
  in->blocks = padded(in) / SVDQ_BLOCK;
  sizes[0] = in->blocks * in->all_rows * SVDQ_BLOCK;
  sizes[1] = (in->bits == 8 ? 1 : padded(in) / in->group) * in->all_rows * (int64_t)sizeof(float);
  sizes[2] = padded(in) / in->sum_group * in->all_rows * (int64_t)sizeof(int32_t);
  /* Smoothing, shift, and one row per worker. */
  sizes[3] = (2 + in->threads) * padded(in) * (int64_t)sizeof(float);
}

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  const float* factor; /* 1/s for 8-bit codes, s itself where codes must be exact; NULL = ones */
  const float* shift;  /* added to x before 4-bit codes; NULL = none */
  float* rows;         /* [workers][padded] */
  SVDQ_NAME(down_context) down;
} context;

INLINE vf32 butterfly(vf32 v, vf32 swapped, vi32 upper) { return choose(upper, swapped - v, v + swapped); }

static void rotate_block(float* h) {
  vf32 v[HADAMARD / LANES];
  for (int i = 0; i < 8; i++) v[i] = load_f32(h + i * LANES);
  for (int half = 4; half; half /= 2)
    for (int i = 0; i < 8; i++)
      if (!(i & half)) {
        vf32 a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
  const vi32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int i = 0; i < 8; i++) {
    vf32 a = v[i];
    a = butterfly(a, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), (lane & 8) != 0);
    a = butterfly(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11), (lane & 4) != 0);
    a = butterfly(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13), (lane & 2) != 0);
    a = butterfly(a, __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), (lane & 1) != 0);
    store_f32(h + i * LANES, a * 0.088388347648318447f);
  }
}

/* One row of h = x/s in float32, zero behind the features; returns its largest magnitude. */
static float smooth_row(const context* c, int64_t row, float* h) {
  const svdq_input* in = c->in;
  const int exact = in->bits == 4;
  const int64_t start = row * in->x_stride, whole = in->features / LANES * LANES;
  vu32 top = {0};
  for (int64_t k = 0; k < in->features; k += LANES) {
    vf32 v = k < whole ? load_as_f32(in->x, start + k, in->x_type)
                       : load_some_as_f32(in->x, start + k, in->x_type, in->features - k);
    if (c->shift) v = v + load_f32(c->shift + k);
    if (c->factor) v = exact ? v / load_f32(c->factor + k) : v * load_f32(c->factor + k);
    store_f32(h + k, v);
    vu32 magnitude = (vu32)v & 0x7fffffff;
    top = __builtin_elementwise_max(top, magnitude);
  }
  if (in->rotate) {
    top = (vu32){0};
    for (int64_t k = 0; k < in->columns; k += HADAMARD) {
      rotate_block(h + k);
      for (int i = 0; i < HADAMARD; i += LANES)
        top = __builtin_elementwise_max(top, (vu32)load_f32(h + k + i) & 0x7fffffff);
    }
  }
  return largest_magnitude(top);
}

INLINE vi32 encode(vf32 v, float low, float high) {
  v = __builtin_elementwise_min(__builtin_elementwise_max(v, splat(low)), splat(high));
  return __builtin_convertvector(__builtin_elementwise_roundeven(v), vi32);
}

INLINE void store_codes(const svdq_input* in, int64_t row, int64_t k, vi32 codes) {
  vi8 bytes = __builtin_convertvector(codes, vi8);
  memcpy(in->codes + ((k / SVDQ_BLOCK) * in->all_rows + row) * SVDQ_BLOCK + k % SVDQ_BLOCK, &bytes, sizeof bytes);
}

INLINE int finite(float value) { return value - value == 0; }

/* Codes of h / scale, and their sums. */
static void encode_row8(const svdq_input* in, int64_t row, const float* h, float inverse) {
  const int64_t columns = padded(in);
  for (int64_t k = 0; k < columns; k += in->sum_group) {
    vi32 sum = {0};
    for (int64_t i = k; i < k + in->sum_group; i += LANES) {
      vi32 codes = encode(load_f32(h + i) * inverse, -127, 127);
      sum += codes;
      store_codes(in, row, i, codes);
    }
    in->sums[k / in->sum_group * in->all_rows + row] = __builtin_reduce_add(sum);
  }
}

static void quantize_row8(const svdq_input* in, int64_t row, float* h, float largest) {
  if (!finite(largest)) {
    /* A value that is none makes the whole row none, as its scale is. */
    memset(h, 0, padded(in) * sizeof(float));
    in->scales[row] = __builtin_nanf("");
    encode_row8(in, row, h, 0);
    return;
  }
  float scale = largest / 127;
  if (scale == 0) scale = 1;
  in->scales[row] = scale;
  /* The reciprocal of a subnormal scale is infinite, and infinity times zero is no code. */
  if (scale < 0x1p-120f) {
    for (int64_t k = 0; k < padded(in); k += LANES) store_f32(h + k, load_f32(h + k) / scale);
    encode_row8(in, row, h, 1);
  } else {
    encode_row8(in, row, h, 1 / scale);
  }
}

static float stored_scale(float scale, int32_t type) {
  vf32 v = splat(scale);
  if (type == SVDQ_BF16) {
    v = splat(scale > 0x1.fep127f ? 0x1.fep127f : scale);
    return round_bf16(v)[0];
  }
  if (type == SVDQ_F16) {
    v = splat(scale > 65504.f ? 65504.f : scale);
    return round_f16(v)[0];
  }
  return scale;
}

static int is_unsigned(const svdq_input* in, int64_t column) {
  for (int32_t i = 0; i < in->range_count; i++) {
    int64_t start = in->ranges[2 * i] / in->group, stop = (in->ranges[2 * i + 1] + in->group - 1) / in->group;
    if (column / in->group >= start && column / in->group < stop) return 1;
  }
  return 0;
}

static void quantize_row4(const svdq_input* in, int64_t row, float* h) {
  const int64_t columns = padded(in);
  if (in->x_type != SVDQ_F32)
    for (int64_t k = 0; k < columns; k += LANES) {
      vf32 v = load_f32(h + k);
      store_f32(h + k, in->x_type == SVDQ_BF16 ? round_bf16(v) : round_f16(v));
    }
  for (int64_t g = 0; g < columns; g += in->group) {
    vu32 top = {0};
    for (int64_t k = g; k < g + in->group; k += LANES) top = __builtin_elementwise_max(top, (vu32)load_f32(h + k) & 0x7fffffff);
    const float largest = largest_magnitude(top);
    const int positive = is_unsigned(in, g);
    const float high = positive ? 15 : 7, low = positive ? 0 : -7;
    const int none = !finite(largest);
    float scale = none ? 1 : largest / high;
    if (scale == 0) scale = 1;
    in->scales[g / in->group * in->all_rows + row] = none ? __builtin_nanf("") : stored_scale(scale, in->x_type);
    for (int64_t k = g; k < g + in->group; k += LANES) {
      vi32 codes = none ? (vi32){0} : encode(load_f32(h + k) / scale, low, high);
      store_codes(in, row, k, codes);
      h[k / LANES] = (float)__builtin_reduce_add(codes); /* behind the read position: k / LANES <= k */
    }
  }
  const int64_t vectors = in->sum_group / LANES;
  for (int64_t s = 0; s < columns / in->sum_group; s++) {
    float sum = 0;
    for (int64_t i = 0; i < vectors; i++) sum += h[s * vectors + i];
    in->sums[s * in->all_rows + row] = (int32_t)sum;
  }
}

/* 8 bits: what the shift adds to every row, (shift/s) times the weight, as two more rows of codes: 16 bits together. */
static void quantize_shift(const svdq_input* in, const float* shift, const float* factor, float* h) {
  const int64_t columns = padded(in);
  vu32 top = {0};
  for (int64_t k = 0; k < columns; k += LANES) {
    vf32 v = load_f32(shift + k);
    if (factor) v = v * load_f32(factor + k);
    store_f32(h + k, v);
    top = __builtin_elementwise_max(top, (vu32)v & 0x7fffffff);
  }
  quantize_row8(in, in->rows, h, largest_magnitude(top));
  const float scale = in->scales[in->rows], inverse = 1 / scale;
  for (int64_t k = 0; k < columns; k += LANES) {
    vf32 v = load_f32(h + k);
    store_f32(h + k, v - __builtin_elementwise_roundeven(v * inverse) * scale);
  }
  const float rest = scale / 2; /* fixed, so that the second row does not depend on rounding luck */
  in->scales[in->rows + 1] = rest / 127;
  encode_row8(in, in->rows + 1, h, 127 / rest);
}

static void task(void* pointer, int64_t index, int32_t worker) {
  const context* c = pointer;
  const svdq_input* in = c->in;
  const int64_t first = index * ROWS_PER_TASK;
  const int64_t last = first + ROWS_PER_TASK < in->rows ? first + ROWS_PER_TASK : in->rows;
  if (in->codes) {
    float* h = c->rows + worker * padded(in);
    for (int64_t row = first; row < last; row++) {
      memset(h + in->features / LANES * LANES, 0, (padded(in) - in->features / LANES * LANES) * sizeof(float));
      float largest = smooth_row(c, row, h);
      if (in->bits == 8) quantize_row8(in, row, h, largest);
      else quantize_row4(in, row, h);
    }
  }
  if (c->weight) SVDQ_NAME(down_rows)(&c->down, first, last, worker);
}

void SVDQ_NAME(prepare)(const svdq_input* in, const svdq_weight* weight, void* low, void* low_scratch) {
  const int64_t columns = padded(in);
  context c = {.in = in, .weight = weight && weight->rank ? weight : NULL};
  if (in->codes) {
    float* factor = in->scratch;
    float* shift = factor + columns;
    c.rows = shift + columns;
    if (in->smooth) {
      for (int64_t k = 0; k < columns; k += LANES) {
        vf32 s = load_some_as_f32(in->smooth, k, in->smooth_type, in->features - k);
        store_f32(factor + k, in->bits == 8 ? 1 / s : s);
      }
      /* Divisors of the padding, which is zero. */
      for (int64_t k = in->features; k < columns; k++) factor[k] = 1;
      c.factor = factor;
    }
    if (in->range_count) {
      memset(shift, 0, columns * sizeof(float));
      for (int32_t i = 0; i < in->range_count; i++)
        for (int64_t k = in->ranges[2 * i]; k < in->ranges[2 * i + 1]; k++) shift[k] = in->shift;
      if (in->bits == 4) c.shift = shift;
      else quantize_shift(in, shift, c.factor, c.rows);
    }
  }
  if (c.weight) SVDQ_NAME(down_begin)(&c.down, in, weight, low, low_scratch);
  svdq_parallel_for((in->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, in->threads, task, &c);
}
