/* y = codes x weight + low x up + bias, panel by panel: 64 outputs at a time, 256 columns of weights unpacked at a time. */
#include "parallel.h"
#include "steps.h"
#include "tile.h"
#include "unpack.h"

enum { CHUNK = 1152, FEWEST = 48, EXTRA_ROWS = 2 };

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  const void* low;
  void* y;
  int64_t y_stride;
  int32_t y_type;
  int32_t gelu;
  int32_t group; /* columns that share both scales */
  int32_t bf16;  /* the branch's products are */
  int64_t panels;
  int64_t chunk; /* rows of one task */
  int64_t up_bytes;
  uint8_t* scratch;
  int64_t scratch_bytes; /* per worker */
} context;

typedef struct {
  uint8_t* block;  /* [SVDQ_BLOCK / 4][SVDQ_PANEL][4] */
  float* scales;   /* [SVDQ_BLOCK / 16][SVDQ_PANEL] */
  float* bias;     /* [SVDQ_PANEL] */
  float* sums;     /* [chunk][SVDQ_PANEL] */
  float* extra;    /* [EXTRA_ROWS][SVDQ_PANEL] */
  void* up;        /* [rank / 2][SVDQ_PANEL][2] bfloat16 or [rank][SVDQ_PANEL] float32 */
} workspace;

/* Rows in equal parts of at most CHUNK, smaller where there would not be a few tasks for every thread. */
static int64_t chunk_rows(const svdq_input* in, const svdq_weight* weight) {
  const int64_t panels = (weight->outputs + SVDQ_PANEL - 1) / SVDQ_PANEL;
  int64_t parts = (in->rows + CHUNK - 1) / CHUNK;
  while (parts * panels < 6 * (int64_t)in->threads && in->rows / (2 * parts) >= FEWEST) parts *= 2;
  const int64_t chunk = (in->rows + parts - 1) / (parts ? parts : 1);
  return (chunk + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

static workspace lay_out(const context* c, uint8_t* at) {
  workspace w;
  w.block = at;
  at += SVDQ_BLOCK * SVDQ_PANEL;
  w.scales = (float*)at;
  at += SVDQ_BLOCK / 16 * SVDQ_PANEL * sizeof(float);
  w.bias = (float*)at;
  at += SVDQ_PANEL * sizeof(float);
  w.extra = (float*)at;
  at += EXTRA_ROWS * SVDQ_PANEL * sizeof(float);
  w.up = at;
  at += c->up_bytes;
  w.sums = (float*)at;
  return w;
}

static context begin(const svdq_input* in, const svdq_weight* weight) {
  context c = {.in = in, .weight = weight};
  c.bf16 = weight->rank && SVDQ_NAME(branch_is_bf16)(in, weight);
  c.panels = (weight->outputs + SVDQ_PANEL - 1) / SVDQ_PANEL;
  c.chunk = chunk_rows(in, weight);
  c.group = SVDQ_BLOCK;
  if (weight->group && weight->group < c.group) c.group = weight->group;
  if (in->bits == 4 && in->group < c.group) c.group = in->group;
  c.up_bytes = weight->rank ? padded_rank(weight) * SVDQ_PANEL * (c.bf16 ? 2 : 4) : 0;
  c.scratch_bytes = SVDQ_BLOCK * SVDQ_PANEL + (SVDQ_BLOCK / 16 + 1 + EXTRA_ROWS + c.chunk) * SVDQ_PANEL * (int64_t)sizeof(float) + c.up_bytes;
  return c;
}

int64_t SVDQ_NAME(multiply_bytes)(const svdq_input* in, const svdq_weight* weight) {
  return begin(in, weight).scratch_bytes * in->threads;
}

static void pack_up(const context* c, void* packed, int64_t start, int64_t valid) {
  const svdq_weight* weight = c->weight;
  const int64_t rank = weight->rank, width = padded_rank(weight);
  if (!c->bf16) {
    for (int64_t r = 0; r < width; r++)
      for (int64_t n = 0; n < SVDQ_PANEL; n++)
        ((float*)packed)[r * SVDQ_PANEL + n] =
            n < valid && r < rank ? scalar_as_f32(weight->up, (start + n) * rank + r, weight->up_type) : 0;
    return;
  }
  const uint16_t* up = weight->up;
  uint16_t* out = packed;
  for (int64_t r = 0; r < width; r += 2)
    for (int64_t n = 0; n < SVDQ_PANEL; n++) {
      out[(r / 2 * SVDQ_PANEL + n) * 2] = n < valid ? up[(start + n) * rank + r] : 0;
      out[(r / 2 * SVDQ_PANEL + n) * 2 + 1] = n < valid && r + 1 < rank ? up[(start + n) * rank + r + 1] : 0;
    }
}

/* Outputs start + n and the next, as many as registers hold. */
INLINE void finish_rows(const context* c, const workspace* w, const float* sums, int64_t row, const int rows, int64_t start,
                        int64_t n) {
  const svdq_input* in = c->in;
  const int64_t width = c->weight->rank ? padded_rank(c->weight) : 0;
  vf32 v[FINISH_ROWS][FINISH_VECTORS];
  for (int i = 0; i < rows; i++) {
    const float scale = in->bits == 8 ? in->scales[row + i] : 1;
    for (int j = 0; j < FINISH_VECTORS; j++)
      v[i][j] = fma_f32(load_f32(sums + i * SVDQ_PANEL + n + j * LANES), splat(scale), load_f32(w->bias + n + j * LANES));
  }
#if SVDQ_BF16_DOT
  if (c->bf16) {
    const uint16_t* low = (const uint16_t*)c->low + row * width;
    const uint32_t* up = w->up;
    for (int64_t r = 0; r < width / 2; r++) {
      vu32 u[FINISH_VECTORS];
      for (int j = 0; j < FINISH_VECTORS; j++) memcpy(&u[j], up + r * SVDQ_PANEL + n + j * LANES, sizeof u[j]);
      for (int i = 0; i < rows; i++) {
        uint32_t pair;
        memcpy(&pair, low + i * width + 2 * r, 4);
        for (int j = 0; j < FINISH_VECTORS; j++) v[i][j] = dot_bf16(v[i][j], u[j], (vu32){0} + pair);
      }
    }
  } else
#endif
  {
    const float* low = (const float*)c->low + row * width;
    for (int64_t r = 0; r < width; r++)
      for (int i = 0; i < rows; i++)
        for (int j = 0; j < FINISH_VECTORS; j++)
          v[i][j] = fma_f32(load_f32((const float*)w->up + r * SVDQ_PANEL + n + j * LANES), splat(low[i * width + r]), v[i][j]);
  }
  if (c->gelu)
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < FINISH_VECTORS; j++) v[i][j] = gelu_tanh(v[i][j]);
  const int64_t valid = c->weight->outputs - start - n;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < FINISH_VECTORS; j++)
      if (j * LANES < valid)
        store_results(c->y, (row + i) * c->y_stride + start + n + j * LANES, c->y_type, v[i][j], valid - j * LANES);
}

/* The product takes longer than fetching where its results will go. */
INLINE void fetch_outputs(const context* c, int64_t row, int rows, int64_t start) {
  const int64_t size = element_bytes(c->y_type);
  for (int i = 0; i < rows; i++) {
    const uint8_t* y = (const uint8_t*)c->y + ((row + i) * c->y_stride + start) * size;
    for (int64_t line = 0; line < SVDQ_PANEL * size; line += 64) __builtin_prefetch(y + line, 1);
  }
}

/* One block of columns for rows [first, first + count); start: the first output where their sums are complete after
   this block, else -1. */
static void multiply_rows(const context* c, const workspace* w, int64_t block, int64_t first, int64_t count, float* sums,
                          int64_t start, int64_t panel) {
  const int64_t valid = c->weight->outputs - panel < SVDQ_PANEL ? c->weight->outputs - panel : SVDQ_PANEL;
  const svdq_input* in = c->in;
  const int64_t left = c->weight->columns - block * SVDQ_BLOCK;
  const int64_t here = left < SVDQ_BLOCK ? left : SVDQ_BLOCK;
  tile_work t = {
      .b = w->block,
      .b_scale = w->scales,
      .sum_stride = in->all_rows,
      .a_stride = in->bits == 4 ? in->all_rows : 0,
      .group = c->group,
      .groups = (int32_t)((here + c->group - 1) / c->group),
      .steps = (int32_t)(here < c->group ? (here + 3) / 4 : c->group / 4),
      .a_every = in->bits == 4 ? in->group / c->group : 1,
      .whole_bytes = c->weight->format == SVDQ_INT8,
      .first = block == 0,
  };
  for (int64_t row = 0; row < count; row += TILE_ROWS) {
    const int64_t at = first + row;
    t.a = in->codes + (block * in->all_rows + at) * SVDQ_BLOCK;
    t.sums = in->sums + block * (SVDQ_BLOCK / in->sum_group) * in->all_rows + at;
    t.a_scale = in->bits == 4 ? in->scales + block * (SVDQ_BLOCK / in->group) * in->all_rows + at : NULL;
    t.c = sums + row * SVDQ_PANEL;
    const int rows = count - row < TILE_ROWS ? (int)(count - row) : TILE_ROWS;
    if (start >= 0) fetch_outputs(c, at, rows, start);
    else
      for (int64_t n = row * valid / count; n < (row + rows) * valid / count; n++) fetch_codes(c->weight, panel + n, block + 1);
    tile(&t, rows);
    if (start < 0) continue;
    /* While the sums are in the first cache. */
    for (int i = 0; i < rows; i += rows - i < FINISH_ROWS ? 1 : FINISH_ROWS)
      for (int64_t n = 0; n < SVDQ_PANEL; n += FINISH_VECTORS * LANES)
        if (rows - i < FINISH_ROWS) finish_rows(c, w, t.c + i * SVDQ_PANEL, at + i, 1, start, n);
        else finish_rows(c, w, t.c + i * SVDQ_PANEL, at + i, FINISH_ROWS, start, n);
  }
}

static void task(void* pointer, int64_t index, int32_t worker) {
  const context* c = pointer;
  const svdq_input* in = c->in;
  const svdq_weight* weight = c->weight;
  const workspace w = lay_out(c, c->scratch + worker * c->scratch_bytes);
  /* All panels of the first rows, then of the next: their codes stay in cache meanwhile. */
  const int64_t panel = index % c->panels, first = index / c->panels * c->chunk, start = panel * SVDQ_PANEL;
  const int64_t count = in->rows - first < c->chunk ? in->rows - first : c->chunk;
  const int64_t valid = weight->outputs - start < SVDQ_PANEL ? weight->outputs - start : SVDQ_PANEL;
  const int64_t extra = in->all_rows - in->rows;
  const int64_t blocks = (weight->columns + SVDQ_BLOCK - 1) / SVDQ_BLOCK;
  for (int64_t n = 0; n < SVDQ_PANEL; n++)
    w.bias[n] = n < valid && weight->bias ? scalar_as_f32(weight->bias, start + n, weight->bias_type) : 0;
  if (weight->rank) pack_up(c, w.up, start, valid);
  tile_begin(c->group);
  for (int64_t block = 0; block < blocks; block++) {
    const int last = block == blocks - 1;
    unpack_block(weight, start, valid, block, w.block);
    unpack_scales(weight, start, valid, block, c->group, w.scales);
    if (extra) {
      multiply_rows(c, &w, block, in->rows, extra, w.extra, -1, start);
      for (int64_t e = 0; last && e < extra; e++)
        for (int64_t n = 0; n < SVDQ_PANEL; n++) w.bias[n] += w.extra[e * SVDQ_PANEL + n] * in->scales[in->rows + e];
    }
    multiply_rows(c, &w, block, first, count, w.sums, last ? start : -1, start);
  }
  tile_end();
}

void SVDQ_NAME(multiply)(const svdq_input* in, const svdq_weight* weight, const void* low, int32_t gelu, void* y,
                         int64_t y_stride, int32_t y_type, void* scratch) {
  context c = begin(in, weight);
  c.low = low;
  c.gelu = gelu;
  c.y = y;
  c.y_stride = y_stride;
  c.y_type = y_type;
  c.scratch = scratch;
  svdq_parallel_for(c.panels * ((in->rows + c.chunk - 1) / c.chunk), in->threads, task, &c);
}
