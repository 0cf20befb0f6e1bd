/* y = x Wᵀ + b, weights quantized, x not: few rows, so it is reading the weights that takes the time.

   64 bytes of a row are one step: 128 codes of 4 bits or 64 of 8. Lane i of every vector holds columns that lie side by
   side, its part of the 64 bytes; x is arranged once so that plane q of a step has each lane's q-th column. A step's
   sums are multiplied by the scales of their lanes and added; the order is that of the columns, however many rows. */
#include "isa.h"
#include "parallel.h"

enum { STEP_BYTES = 64, ROWS_PER_TASK = 96, FEW = 4 };
/* Outputs of a task: what was fetched ahead of its end another thread reads, and its own beginning nobody fetched. */
enum { FEWEST_OUTPUTS = 64, MOST_OUTPUTS = 512, TASKS_PER_THREAD = 4 };
/* Rows of weights and of x whose sums the registers hold. */
enum { TOGETHER = SVDQ_WIDE ? 4 : 2, SEVERAL = SVDQ_WIDE ? 3 : 2 };

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  void* y;
  int64_t y_stride;
  int32_t y_type;
  int32_t bf16;
  int32_t planes;
  int64_t step;     /* columns */
  int64_t steps;    /* of a row */
  int64_t lanes;    /* that share a scale; LANES where a step does */
  int64_t outputs;  /* of a task */
  const uint8_t* x; /* [rows][steps][planes][64 bytes] */
  int64_t x_bytes;  /* from row to row */
  float* x_sums;    /* [rows][groups], where there are zero points */
  uint8_t* scratch;
  int64_t scratch_bytes;
} context;

typedef struct {
  float* scales; /* [TOGETHER][scale_stride] */
  uint8_t* codes;
} workspace;

static int64_t scale_stride(const svdq_weight* weight) { return weight->groups + LANES; }

static context begin(const svdq_input* in, const svdq_weight* weight) {
  context c = {.in = in, .weight = weight};
  const int bytes = weight->format == SVDQ_INT8;
  c.bf16 = SVDQ_BF16_WIDE && in->x_type == SVDQ_BF16 && !bytes;
  c.planes = bytes || c.bf16 ? 4 : 8;
  c.step = bytes ? STEP_BYTES : 2 * STEP_BYTES;
  c.steps = (in->features + c.step - 1) / c.step;
  c.lanes = weight->group && weight->group < c.step ? weight->group / (c.step / LANES) : LANES;
  c.x_bytes = c.steps * c.planes * 64;
  c.outputs = weight->outputs / (TASKS_PER_THREAD * (int64_t)in->threads) / FEWEST_OUTPUTS * FEWEST_OUTPUTS;
  if (c.outputs < FEWEST_OUTPUTS) c.outputs = FEWEST_OUTPUTS;
  if (c.outputs > MOST_OUTPUTS) c.outputs = MOST_OUTPUTS;
  c.scratch_bytes = (TOGETHER * (scale_stride(weight) * (int64_t)sizeof(float) + c.x_bytes) + 63) / 64 * 64;
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

/* One step of a row; what lies behind the row's end meets an x of zero. */
INLINE vu32 load_raw(const uint8_t* row, int64_t step, int64_t row_bytes) {
  vu32 v;
  if (__builtin_expect((step + 1) * STEP_BYTES <= row_bytes, 1)) {
    memcpy(&v, row + step * STEP_BYTES, sizeof v);
    return v;
  }
  uint8_t buffer[STEP_BYTES] = {0};
  memcpy(buffer, row + step * STEP_BYTES, row_bytes - step * STEP_BYTES);
  memcpy(&v, buffer, sizeof v);
  return v;
}

/* The scales of a step's lanes. */
INLINE vf32 lane_scales(const float* scales, int64_t step, int64_t columns, int64_t group, int64_t lanes) {
  if (lanes == LANES) return splat(scales[group ? step * columns / group : 0]);
  const vf32 v = load_f32(scales + step * (LANES / lanes));
  if (lanes == 8) return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  if (lanes == 4) return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}

/* Float32 planes. */
typedef vf32 plane32;
INLINE plane32 load32(const uint8_t* p) { return load_f32((const float*)p); }
INLINE plane32 decode32(vu32 raw, int q, int32_t format) {
  if (format == SVDQ_INT8) return __builtin_convertvector((vi32)(raw << (24 - 8 * q)) >> 24, vf32);
  return __builtin_convertvector(signed_code((raw >> (4 * q)) & 15, format), vf32);
}
INLINE vf32 dot32(vf32 acc, plane32 w, plane32 x) { return fma_f32(w, x, acc); }

#if SVDQ_BF16_WIDE
/* Planes of 32 bfloat16, two columns to a lane. */
typedef vu32 plane16;
INLINE plane16 load16(const uint8_t* p) { vu32 v; memcpy(&v, p, sizeof v); return v; }

/* The sixteen codes as bfloat16, twice: an index has five bits, and the fifth is the next code's. */
INLINE __m512i code_table(int32_t format) {
  uint16_t words[32];
  for (uint32_t i = 0; i < 32; i++) {
    const float value = (float)signed_code((vu32){0} + (i & 15), format)[0];
    uint32_t bits;
    memcpy(&bits, &value, 4);
    words[i] = (uint16_t)(bits >> 16);
  }
  return _mm512_loadu_si512(words);
}

INLINE plane16 decode16(vu32 raw, int q, int32_t format) {
  return (vu32)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)raw, 4 * q), code_table(format));
}
INLINE vf32 dot16(vf32 acc, plane16 w, plane16 x) { return dot_bf16(acc, w, x); }
#endif

#define PLANES(WIDTH, FORMAT) ((WIDTH) == 16 || (FORMAT) == SVDQ_INT8 ? 4 : 8)

/* `rows` rows of x with `outputs` rows of weights: straight from their bytes where there is one row of x, else from
   planes that were decoded before. */
#define KERNEL(NAME, WIDTH, FORMAT, ROWS, OUTPUTS, DIRECT)                                                             \
  static __attribute__((noinline)) void NAME(const context* c, const workspace* ws, const uint8_t* xs, int64_t output, \
                                             float* out) {                                                             \
    enum { rows = ROWS, outputs = OUTPUTS, planes = PLANES(WIDTH, FORMAT) };                                           \
    const int64_t row_bytes = c->weight->row_bytes, stride = scale_stride(c->weight);                                  \
    const uint8_t* packed = c->weight->qweight + output * row_bytes;                                                   \
    vf32 acc[rows][outputs];                                                                                           \
    for (int i = 0; i < rows; i++)                                                                                     \
      for (int j = 0; j < outputs; j++) acc[i][j] = splat(0);                                                          \
    for (int64_t s = 0; s < c->steps; s++) {                                                                           \
      vf32 part[rows][outputs];                                                                                        \
      vu32 raw[outputs];                                                                                               \
      for (int j = 0; j < outputs; j++) {                                                                              \
        for (int i = 0; i < rows; i++) part[i][j] = splat(0);                                                          \
        if (!(DIRECT)) continue;                                                                                       \
        raw[j] = load_raw(packed + j * row_bytes, s, row_bytes);                                                       \
        /* In the order of memory, which the processor's own prefetchers then follow, and to the second cache, which   \
           waits for more lines at a time than the first. */                                                           \
        __builtin_prefetch(packed + AHEAD * row_bytes + (s * outputs + j) * STEP_BYTES, 0, 2);                         \
      }                                                                                                                \
      _Pragma("clang loop unroll(full)") for (int q = 0; q < planes; q++) {                                            \
        plane##WIDTH w[outputs];                                                                                       \
        for (int j = 0; j < outputs; j++)                                                                              \
          w[j] = (DIRECT) ? decode##WIDTH(raw[j], q, FORMAT)                                                           \
                          : load##WIDTH(ws->codes + j * c->x_bytes + (s * planes + q) * 64);                           \
        for (int i = 0; i < rows; i++) {                                                                               \
          const plane##WIDTH x = load##WIDTH(xs + i * c->x_bytes + (s * planes + q) * 64);                             \
          for (int j = 0; j < outputs; j++) part[i][j] = dot##WIDTH(part[i][j], w[j], x);                              \
        }                                                                                                              \
      }                                                                                                                \
      for (int j = 0; j < outputs; j++) {                                                                              \
        const vf32 scale = lane_scales(ws->scales + j * stride, s, c->step, c->weight->group, c->lanes);               \
        for (int i = 0; i < rows; i++) acc[i][j] = fma_f32(part[i][j], scale, acc[i][j]);                              \
      }                                                                                                                \
    }                                                                                                                  \
    for (int i = 0; i < rows; i++)                                                                                     \
      for (int j = 0; j < outputs; j++) out[i * TOGETHER + j] = sum_lanes(acc[i][j]);                                  \
  }

#define DECODED(WIDTH, FORMAT)                                                                                         \
  KERNEL(direct##WIDTH##_##FORMAT##_all, WIDTH, SVDQ_##FORMAT, 1, TOGETHER, 1)                                           \
  KERNEL(direct##WIDTH##_##FORMAT##_one, WIDTH, SVDQ_##FORMAT, 1, 1, 1)                                                  \
  static void expand##WIDTH##_##FORMAT(const context* c, uint8_t* to, int64_t output) {                                \
    enum { planes = PLANES(WIDTH, SVDQ_##FORMAT) };                                                                    \
    for (int64_t s = 0; s < c->steps; s++) {                                                                           \
      const vu32 raw = load_raw(c->weight->qweight + output * c->weight->row_bytes, s, c->weight->row_bytes);          \
      for (int q = 0; q < planes; q++) {                                                                               \
        const plane##WIDTH w = decode##WIDTH(raw, q, SVDQ_##FORMAT);                                                   \
        memcpy(to + (s * planes + q) * 64, &w, sizeof w);                                                              \
      }                                                                                                                \
    }                                                                                                                  \
  }

#define EXPANDED(WIDTH, FORMAT, NAME)                            \
  KERNEL(coded##NAME##_several_all, WIDTH, FORMAT, SEVERAL, TOGETHER, 0)       \
  KERNEL(coded##NAME##_several_one, WIDTH, FORMAT, SEVERAL, 1, 0)              \
  KERNEL(coded##NAME##_one_all, WIDTH, FORMAT, 1, TOGETHER, 0)       \
  KERNEL(coded##NAME##_one_one, WIDTH, FORMAT, 1, 1, 0)

/* Rows ahead of those being read. */
enum { AHEAD = TOGETHER };

DECODED(32, INT4)
DECODED(32, UINT4)
DECODED(32, NVFP4)
DECODED(32, INT8)
EXPANDED(32, SVDQ_INT4, 32)
EXPANDED(32, SVDQ_INT8, 8)
#if SVDQ_BF16_WIDE
DECODED(16, INT4)
DECODED(16, UINT4)
DECODED(16, NVFP4)
EXPANDED(16, SVDQ_INT4, 16)
#endif

typedef void (*kernel)(const context*, const workspace*, const uint8_t*, int64_t, float*);
typedef void (*expander)(const context*, uint8_t*, int64_t);

typedef struct {
  kernel direct[2];   /* one output, TOGETHER */
  expander expand;
  kernel coded[2][2]; /* one row or SEVERAL; one output or TOGETHER */
} format_kernels;

#define ROW(WIDTH, FORMAT, NAME)                                                                          \
  {{direct##WIDTH##_##FORMAT##_one, direct##WIDTH##_##FORMAT##_all}, expand##WIDTH##_##FORMAT,            \
   {{coded##NAME##_one_one, coded##NAME##_one_all}, {coded##NAME##_several_one, coded##NAME##_several_all}}}
static const format_kernels of_format[2][4] = {
    {ROW(32, INT4, 32), ROW(32, NVFP4, 32), ROW(32, INT8, 8), ROW(32, UINT4, 32)},
#if SVDQ_BF16_WIDE
    {ROW(16, INT4, 16), ROW(16, NVFP4, 16), ROW(32, INT8, 8), ROW(16, UINT4, 16)},
#endif
};

INLINE vf32 widen_e4m3(vu8 codes) {
  const vu32 v = __builtin_convertvector(codes, vu32), magnitude = v & 127;
  vf32 value = (vf32)((magnitude << 20) + (120u << 23));
  value = choose((vi32)(magnitude < 8), __builtin_convertvector(magnitude, vf32) * 0x1p-9f, value);
  value = choose((vi32)(magnitude == 127), splat(__builtin_nanf("")), value);
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
  memset(scales + w->groups, 0, LANES * sizeof(float)); /* of what a row's last step lacks */
  if (!w->outer) return;
  const int64_t per_part = w->groups / w->outer_blocks;
  for (int64_t g = 0; g < w->groups; g++)
    scales[g] *= scalar_as_f32(w->outer, output * w->outer_blocks + g / per_part, w->outer_type);
}

static void task(void* pointer, int64_t index, int32_t worker) {
  const context* c = pointer;
  const svdq_weight* w = c->weight;
  const int64_t tasks = (w->outputs + c->outputs - 1) / c->outputs;
  const int64_t start = index % tasks * c->outputs, first = index / tasks * ROWS_PER_TASK;
  const int64_t stop = start + c->outputs < w->outputs ? start + c->outputs : w->outputs;
  const int64_t last = first + ROWS_PER_TASK < c->in->rows ? first + ROWS_PER_TASK : c->in->rows;
  workspace ws;
  ws.codes = c->scratch + worker * c->scratch_bytes;
  ws.scales = (float*)(ws.codes + TOGETHER * c->x_bytes);
  const format_kernels* kernels = &of_format[c->bf16][w->format];
  for (int64_t output = start, together; output < stop; output += together) {
    together = stop - output >= TOGETHER ? TOGETHER : 1;
    for (int64_t j = 0; j < together; j++) {
      load_scales(w, output + j, ws.scales + j * scale_stride(w));
      if (last - first > FEW) kernels->expand(c, ws.codes + j * c->x_bytes, output + j);
    }
    for (int64_t row = first, rows; row < last; row += rows) {
      float out[SEVERAL * TOGETHER];
      rows = last - first > FEW && last - row >= SEVERAL ? SEVERAL : 1;
      const int all = together == TOGETHER;
      const kernel run = last - first > FEW ? kernels->coded[rows == SEVERAL][all] : kernels->direct[all];
      run(c, &ws, c->x + row * c->x_bytes, output, out);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < together; j++) {
          float value = out[i * TOGETHER + j];
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
  const int64_t spread = c->bf16 ? 2 * LANES : LANES; /* columns of a plane */
  for (int64_t s = 0; s < c->steps; s++) {
    if (c->bf16 && (s + 1) * c->step <= in->features) {
      const uint16_t* from = (const uint16_t*)in->x + at + s * c->step;
      for (int64_t i = 0; i < 2 * LANES; i++)
        for (int q = 0; q < 4; q++) ((uint16_t*)to)[(s * 4 + q) * 2 * LANES + i] = from[4 * i + q];
      continue;
    }
    for (int64_t k = 0; k < c->step; k++) {
      const int64_t column = s * c->step + k, place = (s * c->planes + k % c->planes) * spread + k / c->planes;
      const int inside = column < in->features;
      if (c->bf16) ((uint16_t*)to)[place] = inside ? ((const uint16_t*)in->x)[at + column] : 0;
      else ((float*)to)[place] = inside ? scalar_as_f32(in->x, at + column, in->x_type) : 0;
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
  const int64_t tasks = (weight->outputs + c.outputs - 1) / c.outputs;
  svdq_parallel_for(tasks * ((in->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK), in->threads, task, &c);
}
