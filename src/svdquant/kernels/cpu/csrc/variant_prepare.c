/* x/s, rotated, quantized: one pass over x, a few rows at a time. */
#include "isa.h"
#include "parallel.h"
#include "steps.h"

enum { ROWS_PER_TASK = 12, HADAMARD = 128 };

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Everything behind the last feature is zero, so the widest padding of all does. */
static int64_t padded(const svdq_input* in) { return round_up(in->columns, SVDQ_BLOCK); }

int64_t SVDQ_NAME(input_bytes)(svdq_input* in) {
  const int shift_is_row = in->bits == 8 && in->range_count > 0;
  in->all_rows = in->rows + (shift_is_row ? 2 : 0);
  in->blocks = padded(in) / SVDQ_BLOCK;
  const int64_t codes = in->blocks * in->all_rows * SVDQ_BLOCK;
  const int64_t scales = (in->bits == 8 ? 1 : padded(in) / in->group) * in->all_rows * (int64_t)sizeof(float);
  const int64_t sums = padded(in) / in->sum_group * in->all_rows * (int64_t)sizeof(int32_t);
  const uintptr_t base = (uintptr_t)in->buffer; /* NULL while the size is asked for */
  in->codes = (int8_t*)base;
  in->scales = (float*)(base + codes);
  in->sums = (int32_t*)(base + codes + scales);
  const int64_t before = round_up(codes + scales + sums, 64);
  in->seen = (uint64_t*)(base + before);
  return before + (in->rows + 1) * 2 * (int64_t)sizeof(uint64_t);
}

/* Smoothing, shift and one row per worker; the branch's own behind them. */
static int64_t own_bytes(const svdq_input* in) { return (2 + in->threads) * padded(in) * (int64_t)sizeof(float); }

int64_t SVDQ_NAME(prepare_bytes)(const svdq_input* in, const svdq_weight* weight) {
  return own_bytes(in) + (weight && weight->rank ? SVDQ_NAME(down_bytes)(in, weight) : 0);
}

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight; /* NULL = no branch */
  int32_t fresh;
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

typedef enum { NONE, TIMES, OVER } scaling;

INLINE vf32 scaled(vf32 v, const float* factor, scaling how) {
  return how == TIMES ? v * load_f32(factor) : how == OVER ? v / load_f32(factor) : v;
}

INLINE float smooth_as(const context* c, int64_t row, float* h, const int32_t type, const scaling how) {
  const svdq_input* in = c->in;
  const int64_t start = row * in->x_stride, whole = in->features / LANES * LANES;
  vu32 top = {0};
  for (int64_t k = 0; k < in->features; k += LANES) {
    vf32 v = k < whole ? load_as_f32(in->x, start + k, type) : load_some_as_f32(in->x, start + k, type, in->features - k);
    if (c->shift) v = v + load_f32(c->shift + k);
    v = scaled(v, c->factor + k, how);
    store_f32(h + k, v);
    top = __builtin_elementwise_max(top, (vu32)v & 0x7fffffff);
  }
  return largest_magnitude(top);
}

/* One row of h = x/s in float32, zero behind the features; returns its largest magnitude. */
static float smooth_row(const context* c, int64_t row, float* h) {
  const svdq_input* in = c->in;
  const scaling how = !c->factor ? NONE : in->bits == 8 ? TIMES : OVER;
  float largest;
#define CASE(TYPE)                                                       \
  largest = how == NONE    ? smooth_as(c, row, h, TYPE, NONE)            \
            : how == TIMES ? smooth_as(c, row, h, TYPE, TIMES)           \
                           : smooth_as(c, row, h, TYPE, OVER)
  if (in->x_type == SVDQ_BF16) CASE(SVDQ_BF16);
  else if (in->x_type == SVDQ_F16) CASE(SVDQ_F16);
  else CASE(SVDQ_F32);
#undef CASE
  if (!in->rotate) return largest;
  vu32 top = {0};
  for (int64_t k = 0; k < in->columns; k += HADAMARD) {
    rotate_block(h + k);
    for (int i = 0; i < HADAMARD; i += LANES)
      top = __builtin_elementwise_max(top, (vu32)load_f32(h + k + i) & 0x7fffffff);
  }
  return largest_magnitude(top);
}

INLINE vi32 clamp_round(vf32 v, float low, float high) {
  return round_to_int(__builtin_elementwise_min(__builtin_elementwise_max(v, splat(low)), splat(high)));
}

INLINE void store_codes(const svdq_input* in, int64_t row, int64_t k, vi32 codes) {
  vi8 bytes = __builtin_convertvector(codes, vi8);
  memcpy(in->codes + ((k / SVDQ_BLOCK) * in->all_rows + row) * SVDQ_BLOCK + k % SVDQ_BLOCK, &bytes, sizeof bytes);
}

INLINE int finite(float value) { return value - value == 0; }

/* Codes of h * inverse, none of which exceeds 127, and their sums. */
static void encode_row8(const svdq_input* in, int64_t row, const float* h, float inverse) {
  const int64_t columns = padded(in), group = in->sum_group;
  const int32_t offset = code_offset(in->format);
  for (int64_t k = 0; k < columns; k += group) {
    int8_t* codes = in->codes + ((k / SVDQ_BLOCK) * in->all_rows + row) * SVDQ_BLOCK + k % SVDQ_BLOCK;
    vi32 sum = {0};
    for (int64_t i = 0; i < group; i += LANES) {
      const vi32 values = round_to_int(load_f32(h + k + i) * inverse);
      const vi8 bytes = __builtin_convertvector(values, vi8);
      sum += values;
      memcpy(codes + i, &bytes, sizeof bytes);
    }
    in->sums[k / group * in->all_rows + row] = -offset * __builtin_reduce_add(sum);
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
  if (scale >= 0x1p-120f) {
    encode_row8(in, row, h, 1 / scale);
    return;
  }
  /* The reciprocal of a subnormal scale is infinite, and the scale itself coarse. */
  for (int64_t k = 0; k < padded(in); k += LANES)
    store_f32(h + k, __builtin_convertvector(clamp_round(load_f32(h + k) / scale, -127, 127), vf32));
  encode_row8(in, row, h, 1);
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
      vi32 codes = none ? (vi32){0} : clamp_round(load_f32(h + k) / scale, low, high);
      store_codes(in, row, k, codes);
      h[k / LANES] = (float)__builtin_reduce_add(codes); /* behind the read position: k / LANES <= k */
    }
  }
  const int64_t vectors = in->sum_group / LANES;
  for (int64_t s = 0; s < columns / in->sum_group; s++) {
    float sum = 0;
    for (int64_t i = 0; i < vectors; i++) sum += h[s * vectors + i];
    in->sums[s * in->all_rows + row] = -code_offset(in->format) * (int32_t)sum;
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
  }
  for (int64_t k = 0; in->rotate && k < in->columns; k += HADAMARD) rotate_block(h + k);
  for (int64_t k = 0; k < columns; k += LANES) top = __builtin_elementwise_max(top, (vu32)load_f32(h + k) & 0x7fffffff);
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

INLINE vu32 mixed(vu32 sum, const uint8_t* p) {
  vu32 v;
  memcpy(&v, p, sizeof v);
  v *= 0x85ebca77u;
  v = (sum ^ v ^ (v >> 15)) * 0x9e3779b1u;
  return v ^ (v >> 15);
}

/* 64 sums of 32 bits, folded to 128: a change of one element always changes them, of several all but never. */
static void checksum(const void* data, int64_t bytes, uint64_t out[2]) {
  enum { TOGETHER = 4 };
  vu32 sums[TOGETHER] = {{0}, {1}, {2}, {3}};
  const uint8_t* p = data;
  int64_t i = 0;
  for (; i + 64 * TOGETHER <= bytes; i += 64 * TOGETHER)
    for (int j = 0; j < TOGETHER; j++) sums[j] = mixed(sums[j], p + i + 64 * j);
  for (; i < bytes; i += 64) {
    uint8_t buffer[64] = {0};
    memcpy(buffer, p + i, bytes - i < 64 ? bytes - i : 64);
    sums[0] = mixed(sums[0], buffer);
  }
  uint64_t weight = 0x9e3779b97f4a7c15u;
  out[0] = out[1] = (uint64_t)bytes;
  for (int j = 0; j < TOGETHER; j++)
    for (int lane = 0; lane < LANES; lane++) {
      weight = weight * 0xd1342543de82ef95u + 2; /* stays odd: no change of one lane is lost */
      out[0] += sums[j][lane] * weight;
      out[1] += (sums[j][lane] ^ 0x55555555u) * (weight >> 17 | 1);
    }
}

/* Whether data is what it was when `seen` was last written, and meant the same; now it is. */
static int unchanged(const void* data, int64_t bytes, uint64_t meaning, uint64_t seen[2], int fresh) {
  uint64_t now[2];
  checksum(data, bytes, now);
  now[0] += meaning;
  if (!fresh && now[0] == seen[0] && now[1] == seen[1]) return 1;
  seen[0] = now[0];
  seen[1] = now[1];
  return 0;
}

static void task(void* pointer, int64_t index, int32_t worker) {
  const context* c = pointer;
  const svdq_input* in = c->in;
  const int64_t first = index * ROWS_PER_TASK;
  const int64_t last = first + ROWS_PER_TASK < in->rows ? first + ROWS_PER_TASK : in->rows;
  float* h = c->rows + worker * padded(in);
  const int64_t size = element_bytes(in->x_type);
  for (int64_t row = first; row < last; row++) {
    const uint8_t* x = (const uint8_t*)in->x + row * in->x_stride * size;
    if (unchanged(x, in->features * size, 0, in->seen + 2 * row, c->fresh)) continue;
    memset(h + in->features / LANES * LANES, 0, (padded(in) - in->features / LANES * LANES) * sizeof(float));
    float largest = smooth_row(c, row, h);
    if (in->bits == 8) quantize_row8(in, row, h, largest);
    else quantize_row4(in, row, h);
  }
  if (c->weight) SVDQ_NAME(down_rows)(&c->down, first, last, worker);
}

void SVDQ_NAME(prepare)(const svdq_input* in, int32_t fresh, const svdq_weight* weight, void* low, void* scratch) {
  const int64_t columns = padded(in);
  context c = {.in = in, .weight = weight && weight->rank ? weight : NULL};
  const int64_t smooth_bytes = in->smooth ? in->features * element_bytes(in->smooth_type) : 0;
  c.fresh = !unchanged(in->smooth, smooth_bytes, (uint64_t)code_offset(in->format), in->seen + 2 * in->rows, fresh);
  float* factor = scratch;
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
    else if (c.fresh) quantize_shift(in, shift, c.factor, c.rows);
  }
  if (c.weight) SVDQ_NAME(down_begin)(&c.down, in, weight, low, (uint8_t*)scratch + own_bytes(in));
  svdq_parallel_for((in->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, in->threads, task, &c);
}
