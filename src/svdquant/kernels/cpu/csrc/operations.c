/* The public operations: whatever variant is in use does them. */
#include "variants.h"

void svdq_input_bytes(svdq_input* input, int64_t* sizes) { svdq_current()->input_bytes(input, sizes); }

void svdq_prepare(const svdq_input* input, const svdq_weight* weight, void* low, void* low_scratch) {
  svdq_current()->prepare(input, weight, low, low_scratch);
}

void svdq_low_bytes(const svdq_input* input, const svdq_weight* weight, int64_t* sizes) {
  svdq_current()->low_bytes(input, weight, sizes);
}

void svdq_multiply(const svdq_input* input, const svdq_weight* weight, const void* low, void* y, int64_t y_stride,
                   int32_t y_type, void* scratch) {
  svdq_current()->multiply(input, weight, low, y, y_stride, y_type, scratch);
}

int64_t svdq_multiply_bytes(const svdq_input* input, const svdq_weight* weight) {
  return svdq_current()->multiply_bytes(input, weight);
}

void svdq_weight_only(const svdq_input* input, const svdq_weight* weight, void* y, int64_t y_stride, int32_t y_type,
                      void* scratch) {
  svdq_current()->weight_only(input, weight, y, y_stride, y_type, scratch);
}

int64_t svdq_weight_only_bytes(const svdq_input* input, const svdq_weight* weight) {
  return svdq_current()->weight_only_bytes(input, weight);
}
