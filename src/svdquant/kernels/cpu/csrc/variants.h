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
} svdq_variant;

const svdq_variant* svdq_current(void);

#endif
