#include "variants.h"
#include "vectors.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

void SVDQ_NAME(input_bytes)(svdq_input*, int64_t*);
void SVDQ_NAME(prepare)(const svdq_input*, const svdq_weight*, void*, void*);
void SVDQ_NAME(low_bytes)(const svdq_input*, const svdq_weight*, int64_t*);
void SVDQ_NAME(multiply)(const svdq_input*, const svdq_weight*, const void*, void*, int64_t, int32_t, void*);
int64_t SVDQ_NAME(multiply_bytes)(const svdq_input*, const svdq_weight*);
void SVDQ_NAME(weight_only)(const svdq_input*, const svdq_weight*, void*, int64_t, int32_t, void*);
int64_t SVDQ_NAME(weight_only_bytes)(const svdq_input*, const svdq_weight*);

const svdq_variant SVDQ_NAME(variant) = {
    .name = TEXT(SVDQ_ISA),
    .input_bytes = SVDQ_NAME(input_bytes),
    .prepare = SVDQ_NAME(prepare),
    .low_bytes = SVDQ_NAME(low_bytes),
    .multiply = SVDQ_NAME(multiply),
    .multiply_bytes = SVDQ_NAME(multiply_bytes),
    .weight_only = SVDQ_NAME(weight_only),
    .weight_only_bytes = SVDQ_NAME(weight_only_bytes),
};
