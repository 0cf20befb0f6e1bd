/* The two passes of a linear, and what they hand over. */
#ifndef SVDQ_STEPS_H
#define SVDQ_STEPS_H

#include "vectors.h"

typedef struct {
  const svdq_input* in;
  const svdq_weight* weight;
  void* low;
  const void* down; /* [rank, padded features] in the type of the product */
  float* rows;      /* x in that type where it has to be copied, [workers][DOT_ROWS][padded features] */
  int32_t bf16;
} SVDQ_NAME(down_context);

/* One pass over x: codes into in->buffer (fresh: of all rows, else of those that have changed), its down-projection into low (weight with a rank). */
void SVDQ_NAME(prepare)(const svdq_input* in, int32_t fresh, const svdq_weight* weight, void* low, void* scratch);
int64_t SVDQ_NAME(prepare_bytes)(const svdq_input* in, const svdq_weight* weight);

/* One pass over y. */
void SVDQ_NAME(multiply)(const svdq_input* in, const svdq_weight* weight, const void* low, int32_t gelu, void* y,
                         int64_t y_stride, int32_t y_type, void* scratch);
int64_t SVDQ_NAME(multiply_bytes)(const svdq_input* in, const svdq_weight* weight);

/* The low-rank activation [rows, padded rank], bfloat16 where both operands of the branch's products are and the
   processor multiplies it, else float32. */
int64_t SVDQ_NAME(low_bytes)(const svdq_input* in, const svdq_weight* weight);
int32_t SVDQ_NAME(branch_is_bf16)(const svdq_input* in, const svdq_weight* weight);
int64_t SVDQ_NAME(down_bytes)(const svdq_input* in, const svdq_weight* weight);
void SVDQ_NAME(down_begin)(SVDQ_NAME(down_context) * c, const svdq_input* in, const svdq_weight* weight, void* low,
                           void* scratch);
void SVDQ_NAME(down_rows)(const SVDQ_NAME(down_context) * c, int64_t first, int64_t last, int32_t worker);

/* Columns of the low-rank activation: pairs, so that bfloat16 products come out even. */
INLINE int64_t padded_rank(const svdq_weight* weight) { return (weight->rank + 1) / 2 * 2; }

#endif
