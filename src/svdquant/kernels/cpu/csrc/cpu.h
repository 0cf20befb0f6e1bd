/* What this processor and its operating system can run. */
#ifndef SVDQ_CPU_H
#define SVDQ_CPU_H

#include <stdbool.h>

typedef struct {
  bool avx2, avxvnni, avx512, avx512bf16, amx;
  bool neon, i8mm;
} svdq_cpu;

/* Fields carry the variants' names. Asks Linux for the AMX state where the processor has one. */
svdq_cpu svdq_examine_cpu(void);

#endif
