/* The public operations: whatever variant is in use does them. */
#include "variants.h"

int64_t svdq_input_bytes(svdq_input* input) { return svdq_current()->input_bytes(input); }

void svdq_quantize(svdq_input* input, void* scratch) { svdq_current()->quantize(input, scratch); }

int64_t svdq_quantize_bytes(const svdq_input* input) { return svdq_current()->quantize_bytes(input); }

void svdq_linear(svdq_input* input, const svdq_weight* weight, int32_t fresh, int32_t gelu, void* y, int64_t y_stride,
                 int32_t y_type, void* scratch) {
  svdq_current()->linear(input, weight, fresh, gelu, y, y_stride, y_type, scratch);
}

int64_t svdq_linear_bytes(const svdq_input* input, const svdq_weight* weight) {
  return svdq_current()->linear_bytes(input, weight);
}

void svdq_weight_only(const svdq_input* input, const svdq_weight* weight, void* y, int64_t y_stride, int32_t y_type,
                      void* scratch) {
  svdq_current()->weight_only(input, weight, y, y_stride, y_type, scratch);
}

int64_t svdq_weight_only_bytes(const svdq_input* input, const svdq_weight* weight) {
  return svdq_current()->weight_only_bytes(input, weight);
}

void svdq_norm_modulate(const svdq_shape* shape, const svdq_view* x, const float* scale, const float* shift,
                        int64_t stride, float eps, const svdq_view* y) {
  svdq_current()->norm_modulate(shape, x, scale, shift, stride, eps, y);
}

void svdq_norm_rotate(const svdq_shape* shape, const svdq_view* x, const float* weight, float eps, const float* cosine,
                      const float* sine, const svdq_view* y) {
  svdq_current()->norm_rotate(shape, x, weight, eps, cosine, sine, y);
}

void svdq_gate_add(const svdq_shape* shape, const svdq_view* residual, const float* gate, int64_t stride,
                   const svdq_view* x, const svdq_view* y) {
  svdq_current()->gate_add(shape, residual, gate, stride, x, y);
}
