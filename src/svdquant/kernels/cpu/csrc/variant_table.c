#include "variants.h"

#include "steps.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

int64_t SVDQ_NAME(input_bytes)(svdq_input*);
void SVDQ_NAME(weight_only)(const svdq_input*, const svdq_weight*, void*, int64_t, int32_t, void*);
int64_t SVDQ_NAME(weight_only_bytes)(const svdq_input*, const svdq_weight*);
void SVDQ_NAME(norm_modulate)(const svdq_shape*, const svdq_view*, const float*, const float*, int64_t, float,
                              const svdq_view*);
void SVDQ_NAME(norm_rotate)(const svdq_shape*, const svdq_view*, const float*, float, const float*, const float*,
                            const svdq_view*);
void SVDQ_NAME(gate_add)(const svdq_shape*, const svdq_view*, const float*, int64_t, const svdq_view*, const svdq_view*);

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static void quantize(svdq_input* in, void* scratch) {
  SVDQ_NAME(input_bytes)(in);
  SVDQ_NAME(prepare)(in, 1, NULL, NULL, scratch);
}

static int64_t quantize_bytes(const svdq_input* in) { return SVDQ_NAME(prepare_bytes)(in, NULL); }

/* Scratch: the low-rank activation, then what the two passes need one after the other. */
static int64_t linear_bytes(const svdq_input* in, const svdq_weight* weight) {
  const int64_t prepare = SVDQ_NAME(prepare_bytes)(in, weight), multiply = SVDQ_NAME(multiply_bytes)(in, weight);
  return aligned(SVDQ_NAME(low_bytes)(in, weight)) + (prepare > multiply ? prepare : multiply);
}

static void linear(svdq_input* in, const svdq_weight* weight, int32_t fresh, int32_t gelu, void* y, int64_t y_stride,
                   int32_t y_type, void* scratch) {
  if (in->rows <= 0) return;
  void* low = scratch;
  void* rest = (uint8_t*)scratch + aligned(SVDQ_NAME(low_bytes)(in, weight));
  SVDQ_NAME(input_bytes)(in);
  SVDQ_NAME(prepare)(in, fresh, weight, low, rest);
  SVDQ_NAME(multiply)(in, weight, low, gelu, y, y_stride, y_type, rest);
}

const svdq_variant SVDQ_NAME(variant) = {
    .name = TEXT(SVDQ_ISA),
    .input_bytes = SVDQ_NAME(input_bytes),
    .quantize = quantize,
    .quantize_bytes = quantize_bytes,
    .linear = linear,
    .linear_bytes = linear_bytes,
    .weight_only = SVDQ_NAME(weight_only),
    .weight_only_bytes = SVDQ_NAME(weight_only_bytes),
    .norm_modulate = SVDQ_NAME(norm_modulate),
    .norm_rotate = SVDQ_NAME(norm_rotate),
    .gate_add = SVDQ_NAME(gate_add),
};
