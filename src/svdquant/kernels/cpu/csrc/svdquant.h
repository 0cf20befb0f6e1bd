/* The C interface of the CPU products: plain pointers and integers, no dependence on torch. */
#ifndef SVDQUANT_H
#define SVDQUANT_H

#include <stdint.h>

#define SVDQ_ABI_VERSION 3

#if defined(_WIN32)
#define SVDQ_PUBLIC __declspec(dllexport)
#else
#define SVDQ_PUBLIC __attribute__((visibility("default")))
#endif

enum { SVDQ_F32 = 0, SVDQ_BF16 = 1, SVDQ_F16 = 2, SVDQ_E4M3 = 3 };
enum { SVDQ_INT4 = 0, SVDQ_NVFP4 = 1, SVDQ_INT8 = 2, SVDQ_UINT4 = 3 };

/* Codes lie in blocks of this many columns, [blocks][rows][SVDQ_BLOCK]; columns of weights come in panels. */
enum { SVDQ_BLOCK = 256, SVDQ_PANEL = 64 };

/* One input x [rows, features], quantized: what every linear that reads x shares. */
typedef struct {
  int64_t rows;
  int64_t features;      /* K */
  int64_t columns;       /* K padded as the weight's columns are, before the activation's own groups */
  const void* x;         /* rows of contiguous elements */
  int64_t x_stride;      /* elements from row to row */
  int32_t x_type;
  int32_t bits;          /* 8: one scale per row; 4: one per row and group */
  int32_t group;         /* of the activation codes, 4 bits only: 16 to 256 */
  int32_t sum_group;     /* columns that share one sum: 16 to SVDQ_BLOCK */
  const void* smooth;    /* s [features] or NULL */
  int32_t smooth_type;
  int32_t rotate;
  const int64_t* ranges; /* [2 * range_count]: columns [start, stop) that are shifted, and unsigned in 4 bits */
  int32_t range_count;
  float shift;
  int32_t threads;
  int32_t format;        /* of the weights that the codes will meet */
  const float* low_scales; /* [..., rank] strengths of the branch's directions, or NULL = ones */
  int64_t low_rows;        /* consecutive rows that share a line of them */
  int64_t low_first;       /* where the rows of x begin among those that share lines */
  void* buffer;          /* svdq_input_bytes; what follows is set by svdq_input_bytes and svdq_place */
  int64_t all_rows;      /* rows, and two more where 8-bit codes need the shift as a row of its own */
  int64_t blocks;
  int8_t* codes;         /* [blocks][all_rows][SVDQ_BLOCK] */
  float* scales;         /* 8 bits: [all_rows]; 4 bits: [columns / group][all_rows] */
  int32_t* sums;         /* [columns / sum_group][all_rows] sums of codes, times minus the weight codes' offset */
  uint64_t* seen;        /* [rows + 1][2] checksums of the rows of x that the codes were made from, and of smooth */
} svdq_input;

/* One weight [outputs, columns] with its low-rank branch and bias. */
typedef struct {
  int64_t outputs;       /* N */
  int64_t columns;
  int64_t row_bytes;     /* of qweight */
  const uint8_t* qweight;
  int32_t format;
  int32_t group;         /* columns per scale; 0 = the whole row */
  const void* scales;    /* [outputs, groups] */
  int64_t groups;
  const void* outer;     /* [outputs, outer_blocks] or NULL */
  const void* zeros;     /* [outputs, groups] or NULL */
  const void* down;      /* [rank, features] or NULL */
  const void* up;        /* [outputs, rank] */
  const void* bias;      /* [outputs] or NULL */
  int64_t rank;
  int64_t outer_blocks;
  int32_t scales_type;
  int32_t outer_type;
  int32_t zeros_type;
  int32_t down_type;
  int32_t up_type;
  int32_t bias_type;
} svdq_weight;

SVDQ_PUBLIC int32_t svdq_abi_version(void);
/* The variant in use, "" if none fits this processor. */
SVDQ_PUBLIC const char* svdq_isa(void);
/* Variants that this processor can run, best first, separated by commas. */
SVDQ_PUBLIC const char* svdq_available(void);
/* 0, or 1 where this processor cannot run it. */
SVDQ_PUBLIC int32_t svdq_select(const char* name);
/* Thread runtime of the host program: GOMP_parallel, or __kmpc_fork_call with __kmpc_push_num_threads and
   __kmpc_global_thread_num; all NULL = one thread. */
SVDQ_PUBLIC void svdq_set_runtime(void* gomp_parallel, void* kmpc_fork_call, void* kmpc_push_num_threads,
                                  void* kmpc_global_thread_num);

/* Bytes of buffer, which holds codes, scales, sums and checksums. */
SVDQ_PUBLIC int64_t svdq_input_bytes(svdq_input* input);
/* x/s, rotated, quantized, into input->buffer. scratch: svdq_quantize_bytes. */
SVDQ_PUBLIC void svdq_quantize(svdq_input* input, void* scratch);
SVDQ_PUBLIC int64_t svdq_quantize_bytes(const svdq_input* input);
/* y [rows, outputs] = codes * weight + (x * down) * up + bias, and GELU (tanh) of it where gelu is set. fresh: the buffer holds nothing yet; else it holds the codes of
   some input of the same description, and only rows that are not those it was made from are quantized.
   scratch: svdq_linear_bytes. */
SVDQ_PUBLIC void svdq_linear(svdq_input* input, const svdq_weight* weight, int32_t fresh, int32_t gelu, void* y,
                             int64_t y_stride, int32_t y_type, void* scratch);
SVDQ_PUBLIC int64_t svdq_linear_bytes(const svdq_input* input, const svdq_weight* weight);
/* y = x * weight + bias, x not quantized. */
SVDQ_PUBLIC void svdq_weight_only(const svdq_input* input, const svdq_weight* weight, void* y, int64_t y_stride,
                                  int32_t y_type, void* scratch);
SVDQ_PUBLIC int64_t svdq_weight_only_bytes(const svdq_input* input, const svdq_weight* weight);

/* What the operations between products share: operands [batch, rows, heads, features] of one float type. */
typedef struct {
  int64_t batch;
  int64_t rows;
  int64_t heads;
  int64_t features;
  int32_t type;
  int32_t threads;
} svdq_shape;

/* One operand: elements from one batch, row and head to the next; features are contiguous. */
typedef struct {
  void* data;
  int64_t batch;
  int64_t row;
  int64_t head;
} svdq_view;

/* y = layer_norm(x) * scale[batch] + shift[batch]; both [batch, features], stride apart. heads = 1; y may be x. */
SVDQ_PUBLIC void svdq_norm_modulate(const svdq_shape* shape, const svdq_view* x, const float* scale, const float* shift,
                                    int64_t stride, float eps, const svdq_view* y);
/* rms_norm(x) * weight of every head, its pairs (2i, 2i + 1) rotated. weight [features] or NULL; cosine and sine
   [rows, features], or both NULL; y may be x. */
SVDQ_PUBLIC void svdq_norm_rotate(const svdq_shape* shape, const svdq_view* x, const float* weight, float eps,
                                  const float* cosine, const float* sine, const svdq_view* y);
/* y = residual + gate[batch] * x, float16 kept finite. gate [batch, features], stride apart; heads = 1; y may be
   residual or x. */
SVDQ_PUBLIC void svdq_gate_add(const svdq_shape* shape, const svdq_view* residual, const float* gate, int64_t stride,
                               const svdq_view* x, const svdq_view* y);

#endif
