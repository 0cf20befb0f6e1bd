/* What one instruction set offers; dispatch.c picks a table once. */
#ifndef SVDQ_VARIANTS_H
#define SVDQ_VARIANTS_H

#include "svdquant.h"

typedef struct {
  const char* name;
  void (*input_bytes)(svdq_input*, int64_t*);
  void (*prepare)(const svdq_input*, const svdq_weight*, void*, void*);
  void (*low_bytes)(const svdq_input*, const svdq_weight*, int64_t*);
  void (*multiply)(const svdq_input*, const svdq_weight*, const void*, void*, int64_t, int32_t, void*);
  int64_t (*multiply_bytes)(const svdq_input*, const svdq_weight*);
  void (*weight_only)(const svdq_input*, const svdq_weight*, void*, int64_t, int32_t, void*);
  int64_t (*weight_only_bytes)(const svdq_input*, const svdq_weight*);
} svdq_variant;

const svdq_variant* svdq_current(void);

#endif
