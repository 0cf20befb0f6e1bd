/* The low-rank branch's down-projection, a part of the pass over x. */
#ifndef SVDQ_PREPARE_H
#define SVDQ_PREPARE_H

#include "vectors.h"

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  void* low;
  const void* down; /* [rank, padded features] in the type of the product */
  float* rows;      /* float32 products: x widened, [workers][ROWS][padded features] */
  int32_t bf16;
} SVDQ_NAME(down_context);

/* Both operands of the branch's products are bfloat16, and the processor multiplies it. */
int32_t SVDQ_NAME(branch_is_bf16)(const svdq_input* in, const svdq_weight* weight);
void SVDQ_NAME(down_begin)(SVDQ_NAME(down_context) * c, const svdq_input* in, const svdq_weight* weight, void* low,
                           void* scratch);
void SVDQ_NAME(down_rows)(const SVDQ_NAME(down_context) * c, int64_t first, int64_t last, int32_t worker);

/* Columns of the low-rank activation: pairs, so that bfloat16 products come out even. */
INLINE int64_t padded_rank(const svdq_weight* weight) { return (weight->rank + 1) / 2 * 2; }

#endif
