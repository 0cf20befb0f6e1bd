/* What lies between the products. Each operation reads its operands once, computes in float32 and rounds once; a row's
   result depends on nothing but the row. */
#include "isa.h"
#include "parallel.h"
#include "variants.h"

enum { ROWS_PER_TASK = 8 };

typedef struct {
  const svdq_shape* shape;
  const svdq_view* x;
  const svdq_view* residual;
  const svdq_view* y;
  const float* scale; /* factors, gates or weights */
  const float* shift;
  const float* cosine;
  const float* sine;
  int64_t stride;
  float eps;
} work;

INLINE uint8_t* row_of(const svdq_view* v, int64_t batch, int64_t row, int64_t head, int32_t type) {
  return (uint8_t*)v->data + (batch * v->batch + row * v->row + head * v->head) * element_bytes(type);
}

INLINE vf32 first_lanes(vf32 v, int64_t count) {
  const vi32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return choose(lane < (int32_t)count, v, splat(0));
}

/* The sum of x - centre, or of its squares. */
INLINE float sum_row(const void* x, int64_t count, float centre, const int squares, const int32_t type) {
  vf32 part[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      const vf32 v = load_as_f32(x, i + j * LANES, type) - centre;
      part[j] = squares ? fma_f32(v, v, part[j]) : part[j] + v;
    }
  for (; i < count; i += LANES) {
    const int64_t rest = count - i;
    vf32 v = load_some_as_f32(x, i, type, rest) - centre;
    if (rest < LANES) v = first_lanes(v, rest);
    part[0] = squares ? fma_f32(v, v, part[0]) : part[0] + v;
  }
  return sum_lanes((part[0] + part[1]) + (part[2] + part[3]));
}

INLINE void norm_row(const work* w, int64_t batch, int64_t row, const int32_t type) {
  const int64_t n = w->shape->features;
  const void* x = row_of(w->x, batch, row, 0, type);
  void* y = row_of(w->y, batch, row, 0, type);
  const float* scale = w->scale + batch * w->stride;
  const float* shift = w->shift + batch * w->stride;
  const float mean = sum_row(x, n, 0, 0, type) / (float)n;
  const float factor = 1 / __builtin_sqrtf(sum_row(x, n, mean, 1, type) / (float)n + w->eps);
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t rest = n - i;
    const vf32 v = (load_some_as_f32(x, i, type, rest) - mean) * factor;
    const vf32 s = load_some_as_f32(scale, i, SVDQ_F32, rest), t = load_some_as_f32(shift, i, SVDQ_F32, rest);
    store_some_from_f32(y, i, type, fma_f32(v, s, t), rest);
  }
}

INLINE void heads_row(const work* w, int64_t batch, int64_t row, const int32_t type) {
  const vi32 odd = {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1};
  const int64_t n = w->shape->features;
  for (int64_t head = 0; head < w->shape->heads; head++) {
    const void* x = row_of(w->x, batch, row, head, type);
    void* y = row_of(w->y, batch, row, head, type);
    const float factor = 1 / __builtin_sqrtf(sum_row(x, n, 0, 1, type) / (float)n + w->eps);
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t rest = n - i;
      vf32 v = load_some_as_f32(x, i, type, rest) * factor;
      if (w->scale != NULL) v *= load_some_as_f32(w->scale, i, SVDQ_F32, rest);
      if (w->cosine != NULL) {
        const vf32 other = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        const vf32 sine = load_some_as_f32(w->sine + row * n, i, SVDQ_F32, rest);
        v *= load_some_as_f32(w->cosine + row * n, i, SVDQ_F32, rest);
        v = fma_f32(choose(odd, other, -other), sine, v);
      }
      store_some_from_f32(y, i, type, v, rest);
    }
  }
}

INLINE void gate_row(const work* w, int64_t batch, int64_t row, const int32_t type) {
  const int64_t n = w->shape->features;
  const void* x = row_of(w->x, batch, row, 0, type);
  const void* residual = row_of(w->residual, batch, row, 0, type);
  void* y = row_of(w->y, batch, row, 0, type);
  const float* gate = w->scale + batch * w->stride;
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t rest = n - i;
    const vf32 v = load_some_as_f32(x, i, type, rest), r = load_some_as_f32(residual, i, type, rest);
    vf32 sum = fma_f32(load_some_as_f32(gate, i, SVDQ_F32, rest), v, r);
    if (type == SVDQ_F16) {
      sum = choose(sum > 65504.0f, splat(65504), sum);
      sum = choose(sum < -65504.0f, splat(-65504), sum);
    }
    store_some_from_f32(y, i, type, sum, rest);
  }
}

/* A task: some rows, by a loop of their own per type. */
#define TASK(OPERATION)                                                                              \
  static void OPERATION##s(void* context, int64_t index, int32_t worker) {                           \
    const work* w = context;                                                                         \
    const int64_t all = w->shape->batch * w->shape->rows, first = index * ROWS_PER_TASK;             \
    const int64_t last = first + ROWS_PER_TASK < all ? first + ROWS_PER_TASK : all;                  \
    (void)worker;                                                                                    \
    for (int64_t i = first; i < last; i++) {                                                         \
      const int64_t batch = i / w->shape->rows, row = i % w->shape->rows;                            \
      if (w->shape->type == SVDQ_BF16) OPERATION(w, batch, row, SVDQ_BF16);                          \
      else if (w->shape->type == SVDQ_F16) OPERATION(w, batch, row, SVDQ_F16);                       \
      else OPERATION(w, batch, row, SVDQ_F32);                                                       \
    }                                                                                                \
  }

TASK(norm_row)
TASK(heads_row)
TASK(gate_row)

static void run(work* w, svdq_task task) {
  const int64_t rows = w->shape->batch * w->shape->rows;
  svdq_parallel_for((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, w->shape->threads, task, w);
}

void SVDQ_NAME(norm_modulate)(const svdq_shape* shape, const svdq_view* x, const float* scale, const float* shift,
                              int64_t stride, float eps, const svdq_view* y) {
  run(&(work){.shape = shape, .x = x, .y = y, .scale = scale, .shift = shift, .stride = stride, .eps = eps}, norm_rows);
}

void SVDQ_NAME(norm_rotate)(const svdq_shape* shape, const svdq_view* x, const float* weight, float eps,
                            const float* cosine, const float* sine, const svdq_view* y) {
  run(&(work){.shape = shape, .x = x, .y = y, .scale = weight, .eps = eps, .cosine = cosine, .sine = sine}, heads_rows);
}

void SVDQ_NAME(gate_add)(const svdq_shape* shape, const svdq_view* residual, const float* gate, int64_t stride,
                         const svdq_view* x, const svdq_view* y) {
  run(&(work){.shape = shape, .x = x, .residual = residual, .y = y, .scale = gate, .stride = stride}, gate_rows);
}
