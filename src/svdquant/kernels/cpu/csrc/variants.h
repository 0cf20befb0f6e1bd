/* What one instruction set offers; dispatch.c picks a table once. */
#ifndef SVDQ_VARIANTS_H
#define SVDQ_VARIANTS_H

#include "svdquant.h"

typedef struct {
  const char* name;
  int64_t (*input_bytes)(svdq_input*);
  void (*quantize)(svdq_input*, void*);
  int64_t (*quantize_bytes)(const svdq_input*);
  void (*linear)(svdq_input*, const svdq_weight*, int32_t, int32_t, void*, int64_t, int32_t, void*);
  int64_t (*linear_bytes)(const svdq_input*, const svdq_weight*);
  void (*weight_only)(const svdq_input*, const svdq_weight*, void*, int64_t, int32_t, void*);
  int64_t (*weight_only_bytes)(const svdq_input*, const svdq_weight*);
  void (*norm_modulate)(const svdq_shape*, const svdq_view*, const float*, const float*, int64_t, float, const svdq_view*);
  void (*norm_rotate)(const svdq_shape*, const svdq_view*, const float*, float, const float*, const float*,
                      const svdq_view*);
  void (*gate_add)(const svdq_shape*, const svdq_view*, const float*, int64_t, const svdq_view*, const svdq_view*);
} svdq_variant;

const svdq_variant* svdq_current(void);

#endif
