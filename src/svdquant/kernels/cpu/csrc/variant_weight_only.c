/* y = x Wᵀ + b, weights quantized, x not: few rows, so it is reading the weights that takes the time.

   Every output is a dot product of sixteen partial sums: codes times x within a group, then the group's scale. The order
   of additions is that of the columns, however many rows there are. */
#include "isa.h"
#include "parallel.h"

enum { STEP = 32, OUTPUTS_PER_TASK = 16, ROWS_PER_TASK = 96, FEW = 4, MOST_TOGETHER = 4 };

/* 32 columns of codes or of x, the even ones beside the odd ones. */
#if SVDQ_BF16_WIDE
typedef vu32 pairs16; /* bfloat16: one lane holds two neighbours */
#endif
typedef struct {
  vf32 even, odd;
} pairs32;

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  void* y;
  int64_t y_stride;
  int32_t y_type;
  int32_t bf16;
  int64_t steps;      /* of a row */
  int64_t group;      /* steps that share a scale, 0 = 16 columns do */
  const uint8_t* x;   /* [rows][steps * STEP], arranged */
  int64_t x_bytes;    /* from row to row */
  float* x_sums;      /* [rows][groups], where there are zero points */
  uint8_t* scratch;
  int64_t scratch_bytes;
} context;

typedef struct {
  float* scales; /* [MOST_TOGETHER][groups + 1] */
  uint8_t* codes;
} workspace;

static int64_t row_steps(const svdq_input* in) { return (in->features + STEP - 1) / STEP; }
static int use_bf16(const svdq_input* in) { return SVDQ_BF16_WIDE && in->x_type == SVDQ_BF16; }

static context begin(const svdq_input* in, const svdq_weight* weight) {
  context c = {.in = in, .weight = weight};
  c.bf16 = use_bf16(in);
  c.steps = row_steps(in);
  c.group = weight->group == 0 ? c.steps : weight->group / STEP;
  c.x_bytes = c.steps * STEP * (c.bf16 ? 2 : 4);
  c.scratch_bytes = MOST_TOGETHER * ((weight->groups + LANES) * (int64_t)sizeof(float) + c.x_bytes);
  c.scratch_bytes = (c.scratch_bytes + 63) / 64 * 64;
  return c;
}

int64_t SVDQ_NAME(weight_only_bytes)(const svdq_input* in, const svdq_weight* weight) {
  const context c = begin(in, weight);
  return in->rows * (c.x_bytes + (weight->zeros ? weight->groups * (int64_t)sizeof(float) : 0)) + 64 + c.scratch_bytes * in->threads;
}

INLINE vi32 signed_code(vu32 nibbles, int32_t format) {
  if (format == SVDQ_UINT4) return (vi32)nibbles;
  if (format == SVDQ_INT4) return (vi32)(nibbles ^ 8) - 8;
  /* e2m1, doubled */
  vi32 m = (vi32)nibbles & 7;
  vi32 value = m - (m == 5) - 2 * (m == 6) - 5 * (m == 7);
  vi32 negative = (vi32)nibbles > 7;
  return (value ^ negative) - negative;
}

INLINE vu32 load_bytes(const svdq_weight* w, int64_t output, int64_t step, int64_t count) {
  const uint8_t* p = w->qweight + output * w->row_bytes + step * count;
  uint8_t buffer[STEP];
  if (__builtin_expect((step + 1) * count > w->row_bytes, 0)) {
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, p, w->row_bytes - step * count);
    p = buffer;
  }
  if (count == STEP) {
    vu16 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vu32);
  }
  vu8 v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vu32);
}

INLINE pairs32 decode32(const svdq_weight* w, int64_t output, int64_t step, int32_t format) {
  vi32 even, odd;
  if (format == SVDQ_INT8) {
    const vu32 v = load_bytes(w, output, step, STEP);
    even = (vi32)(v << 24) >> 24;
    odd = (vi32)(v << 16) >> 24;
  } else {
    const vu32 v = load_bytes(w, output, step, STEP / 2);
    even = signed_code(v & 15, format);
    odd = signed_code(v >> 4, format);
  }
  return (pairs32){__builtin_convertvector(even, vf32), __builtin_convertvector(odd, vf32)};
}

INLINE pairs32 load32(const uint8_t* p, int64_t step) {
  return (pairs32){load_f32((const float*)p + step * STEP), load_f32((const float*)p + step * STEP + LANES)};
}

INLINE void store32(uint8_t* p, int64_t step, pairs32 v) {
  store_f32((float*)p + step * STEP, v.even);
  store_f32((float*)p + step * STEP + LANES, v.odd);
}

INLINE vf32 dot32(vf32 acc, pairs32 a, pairs32 b) { return fma_f32(a.odd, b.odd, fma_f32(a.even, b.even, acc)); }

#if SVDQ_BF16_WIDE
/* The sixteen codes as bfloat16, twice: a word's index has five bits. */
INLINE __m512i code_table(int32_t format) {
  uint16_t words[32];
  for (uint32_t i = 0; i < 32; i++) {
    const vf32 value = __builtin_convertvector(signed_code((vu32){0} + (i & 15), format), vf32);
    uint32_t bits;
    float first = value[0];
    memcpy(&bits, &first, 4);
    words[i] = (uint16_t)(bits >> 16);
  }
  return _mm512_loadu_si512(words);
}

INLINE pairs16 decode16(const svdq_weight* w, int64_t output, int64_t step, int32_t format) {
  if (format == SVDQ_INT8) {
    const pairs32 v = decode32(w, output, step, format);
    return (vu32)v.even >> 16 | ((vu32)v.odd & 0xffff0000u);
  }
  const vu32 v = load_bytes(w, output, step, STEP / 2);
  return (vu32)_mm512_permutexvar_epi16((__m512i)((v | v << 12) & 0x000f000f), code_table(format));
}

INLINE pairs16 load16(const uint8_t* p, int64_t step) { vu32 v; memcpy(&v, p + step * sizeof v, sizeof v); return v; }
INLINE void store16(uint8_t* p, int64_t step, pairs16 v) { memcpy(p + step * sizeof v, &v, sizeof v); }
#endif

/* The scale of a step where 16 columns share one: two in a step. */
INLINE vf32 two_scales(const float* scales, int64_t step) {
  const vi32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return choose(lane < 8, splat(scales[2 * step]), splat(scales[2 * step + 1]));
}

/* rows of x with `outputs` rows of weights; DECODE(output index, step) fetches 32 columns of a weight. */
#define PRODUCTS(PAIRS, LOAD, DOT, DECODE)                                                                         \
  vf32 acc[rows][outputs];                                                                                         \
  for (int i = 0; i < rows; i++)                                                                                   \
    for (int j = 0; j < outputs; j++) acc[i][j] = splat(0);                                                        \
  const int64_t group = c->group ? c->group : 1;                                                                   \
  for (int64_t first = 0, g = 0; first < c->steps; first += group, g++) {                                          \
    const int64_t last = first + group < c->steps ? first + group : c->steps;                                      \
    vf32 part[rows][outputs];                                                                                      \
    for (int i = 0; i < rows; i++)                                                                                 \
      for (int j = 0; j < outputs; j++) part[i][j] = splat(0);                                                     \
    for (int64_t s = first; s < last; s++) {                                                                       \
      PAIRS w[outputs];                                                                                            \
      for (int j = 0; j < outputs; j++) w[j] = DECODE;                                                             \
      for (int i = 0; i < rows; i++) {                                                                             \
        const PAIRS x = LOAD(xs + i * c->x_bytes, s);                                                              \
        for (int j = 0; j < outputs; j++) part[i][j] = DOT(part[i][j], w[j], x);                                   \
      }                                                                                                            \
    }                                                                                                              \
    for (int j = 0; j < outputs; j++) {                                                                            \
      const float* scales = ws->scales + j * (c->weight->groups + 1);                                              \
      const vf32 scale = c->group ? splat(scales[g]) : two_scales(scales, first);                                  \
      for (int i = 0; i < rows; i++) acc[i][j] = fma_f32(part[i][j], scale, acc[i][j]);                            \
    }                                                                                                              \
  }                                                                                                                \
  for (int i = 0; i < rows; i++)                                                                                   \
    for (int j = 0; j < outputs; j++) out[i * MOST_TOGETHER + j] = sum_lanes(acc[i][j]);

#define DIRECT(WIDTH, FORMAT, ROWS, OUTPUTS)                                                                 \
  static __attribute__((noinline)) void direct##WIDTH##_##FORMAT##_##ROWS##_##OUTPUTS(                       \
      const context* c, const workspace* ws, const uint8_t* xs, int64_t output, float* out) {                \
    enum { rows = ROWS, outputs = OUTPUTS };                                                                 \
    PRODUCTS(pairs##WIDTH, load##WIDTH, DOT##WIDTH, decode##WIDTH(c->weight, output + j, s, SVDQ_##FORMAT)) \
  }
#define DOT16 dot_bf16
#define DOT32 dot32
#define CODED(WIDTH, ROWS, OUTPUTS)                                                                                     \
  static __attribute__((noinline)) void coded##WIDTH##_##ROWS##_##OUTPUTS(const context* c, const workspace* ws,        \
                                                                         const uint8_t* xs, int64_t output, float* out) { \
    enum { rows = ROWS, outputs = OUTPUTS };                                                                            \
    (void)output;                                                                                                       \
    PRODUCTS(pairs##WIDTH, load##WIDTH, DOT##WIDTH, load##WIDTH(ws->codes + j * c->x_bytes, s))                         \
  }
#define EXPAND(WIDTH, FORMAT)                                                                                    \
  static __attribute__((noinline)) void expand##WIDTH##_##FORMAT(const context* c, uint8_t* to, int64_t output) { \
    for (int64_t s = 0; s < c->steps; s++) store##WIDTH(to, s, decode##WIDTH(c->weight, output, s, SVDQ_##FORMAT)); \
  }
#define FORMAT_KERNELS(WIDTH, FORMAT) DIRECT(WIDTH, FORMAT, 1, 4) DIRECT(WIDTH, FORMAT, 1, 1) EXPAND(WIDTH, FORMAT)
#define WIDTH_KERNELS(WIDTH)                                                                                      \
  FORMAT_KERNELS(WIDTH, INT4) FORMAT_KERNELS(WIDTH, UINT4) FORMAT_KERNELS(WIDTH, NVFP4) FORMAT_KERNELS(WIDTH, INT8) \
  CODED(WIDTH, 3, 4) CODED(WIDTH, 1, 4) CODED(WIDTH, 3, 1) CODED(WIDTH, 1, 1)

#if SVDQ_BF16_WIDE
WIDTH_KERNELS(16)
#endif
WIDTH_KERNELS(32)

typedef void (*kernel)(const context*, const workspace*, const uint8_t*, int64_t, float*);
typedef void (*expander)(const context*, uint8_t*, int64_t);

typedef struct {
  kernel direct4, direct1;
  expander expand;
} format_kernels;

#define ROW(WIDTH, FORMAT) {direct##WIDTH##_##FORMAT##_1_4, direct##WIDTH##_##FORMAT##_1_1, expand##WIDTH##_##FORMAT}
static const format_kernels of_format[2][4] = {
    {ROW(32, INT4), ROW(32, NVFP4), ROW(32, INT8), ROW(32, UINT4)},
#if SVDQ_BF16_WIDE
    {ROW(16, INT4), ROW(16, NVFP4), ROW(16, INT8), ROW(16, UINT4)},
#endif
};
static const kernel coded[2][2][2] = {
    {{coded32_1_1, coded32_1_4}, {coded32_3_1, coded32_3_4}},
#if SVDQ_BF16_WIDE
    {{coded16_1_1, coded16_1_4}, {coded16_3_1, coded16_3_4}},
#endif
};

/* 16 bytes of e4m3: its exponent and mantissa are those of a float32 that is 2^120 times too small. */
INLINE vf32 widen_e4m3(vu8 codes) {
  vu32 v = __builtin_convertvector(codes, vu32);
  vf32 value = (vf32)((v & 127) << 20) * 0x1p120f;
  value = choose((vi32)((v & 127) == 127), splat(__builtin_nanf("")), value);
  return (vf32)((vu32)value | (v & 128) << 24);
}

static void load_scales(const svdq_weight* w, int64_t output, float* scales) {
  const float unit = w->format == SVDQ_NVFP4 ? 0.5f : 1;
  for (int64_t g = 0; g < w->groups; g += LANES) {
    const int64_t count = w->groups - g < LANES ? w->groups - g : LANES;
    vf32 v;
    if (w->scales_type == SVDQ_E4M3) {
      vu8 codes = {0};
      uint8_t buffer[LANES] = {0};
      memcpy(buffer, (const uint8_t*)w->scales + output * w->groups + g, count);
      memcpy(&codes, buffer, sizeof codes);
      v = widen_e4m3(codes);
    } else {
      v = load_some_as_f32(w->scales, output * w->groups + g, w->scales_type, count);
    }
    store_some_from_f32(scales, g, SVDQ_F32, v * unit, count);
  }
  scales[w->groups] = 0; /* of the half step that a row may end in */
  if (!w->outer) return;
  const int64_t per_part = w->groups / w->outer_blocks;
  for (int64_t g = 0; g < w->groups; g++)
    scales[g] *= scalar_as_f32(w->outer, output * w->outer_blocks + g / per_part, w->outer_type);
}

static void task(void* pointer, int64_t index, int32_t worker) {
  const context* c = pointer;
  const svdq_weight* w = c->weight;
  const int64_t tasks = (w->outputs + OUTPUTS_PER_TASK - 1) / OUTPUTS_PER_TASK;
  const int64_t start = index % tasks * OUTPUTS_PER_TASK, first = index / tasks * ROWS_PER_TASK;
  const int64_t stop = start + OUTPUTS_PER_TASK < w->outputs ? start + OUTPUTS_PER_TASK : w->outputs;
  const int64_t last = first + ROWS_PER_TASK < c->in->rows ? first + ROWS_PER_TASK : c->in->rows;
  workspace ws;
  ws.codes = c->scratch + worker * c->scratch_bytes;
  ws.scales = (float*)(ws.codes + MOST_TOGETHER * c->x_bytes);
  const format_kernels* kernels = &of_format[c->bf16][w->format];
  for (int64_t output = start, together; output < stop; output += together) {
    together = stop - output >= MOST_TOGETHER ? MOST_TOGETHER : 1;
    for (int64_t j = 0; j < together; j++) {
      load_scales(w, output + j, ws.scales + j * (w->groups + 1));
      if (last - first > FEW) kernels->expand(c, ws.codes + j * c->x_bytes, output + j);
    }
    for (int64_t row = first, rows; row < last; row += rows) {
      float out[3 * MOST_TOGETHER];
      rows = last - first > FEW && last - row >= 3 ? 3 : 1;
      const uint8_t* xs = c->x + row * c->x_bytes;
      if (last - first > FEW) coded[c->bf16][rows == 3][together == MOST_TOGETHER](c, &ws, xs, output, out);
      else (together == MOST_TOGETHER ? kernels->direct4 : kernels->direct1)(c, &ws, xs, output, out);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < together; j++) {
          float value = out[i * MOST_TOGETHER + j];
          if (w->zeros) {
            float shift = 0;
            for (int64_t g = 0; g < w->groups; g++)
              shift += scalar_as_f32(w->zeros, (output + j) * w->groups + g, w->zeros_type) * c->x_sums[(row + i) * w->groups + g];
            value += shift;
          }
          if (w->bias) value += scalar_as_f32(w->bias, output + j, w->bias_type);
          store_some_from_f32(c->y, (row + i) * c->y_stride + output + j, c->y_type, splat(value), 1);
        }
    }
  }
}

static void arrange(const context* c, int64_t row) {
  const svdq_input* in = c->in;
  uint8_t* to = (uint8_t*)c->x + row * c->x_bytes;
  const int64_t at = row * in->x_stride;
  if (c->bf16) {
    memset(to + (c->steps - 1) * STEP * 2, 0, STEP * 2);
    memcpy(to, (const uint16_t*)in->x + at, in->features * 2);
  } else {
    for (int64_t s = 0; s < c->steps; s++) {
      vf32 a = load_some_as_f32(in->x, at + s * STEP, in->x_type, in->features - s * STEP);
      vf32 b = load_some_as_f32(in->x, at + s * STEP + LANES, in->x_type, in->features - s * STEP - LANES);
      store_f32((float*)to + s * STEP, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
      store_f32((float*)to + s * STEP + LANES, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    }
  }
  if (!c->weight->zeros) return;
  const int64_t size = c->weight->group ? c->weight->group : in->features;
  for (int64_t g = 0; g < c->weight->groups; g++) {
    vf32 sum = splat(0);
    for (int64_t k = g * size; k < (g + 1) * size && k < in->features; k += LANES)
      sum += load_some_as_f32(in->x, at + k, in->x_type, in->features - k);
    c->x_sums[row * c->weight->groups + g] = sum_lanes(sum);
  }
}

void SVDQ_NAME(weight_only)(const svdq_input* in, const svdq_weight* weight, void* y, int64_t y_stride, int32_t y_type, void* scratch) {
  context c = begin(in, weight);
  c.y = y;
  c.y_stride = y_stride;
  c.y_type = y_type;
  c.x = scratch;
  c.x_sums = (float*)((uint8_t*)scratch + in->rows * c.x_bytes);
  const int64_t sums = weight->zeros ? in->rows * weight->groups * (int64_t)sizeof(float) : 0;
  c.scratch = (uint8_t*)(((uintptr_t)c.x_sums + sums + 63) / 64 * 64);
  for (int64_t row = 0; row < in->rows; row++) arrange(&c, row);
  const int64_t tasks = (weight->outputs + OUTPUTS_PER_TASK - 1) / OUTPUTS_PER_TASK;
  svdq_parallel_for(tasks * ((in->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK), in->threads, task, &c);
}
