#if defined(__x86_64__)

#define _GNU_SOURCE /* syscall */
#include <cpuid.h>
#include <stdint.h>

#include "cpu.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
  unsigned eax, ebx, ecx, edx;
} leaf;

static leaf cpuid(unsigned number, unsigned sub) {
  leaf l = {0};
  __get_cpuid_count(number, sub, &l.eax, &l.ebx, &l.ecx, &l.edx);
  return l;
}

static bool has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

/* Register states that the operating system saves. */
static unsigned saved_states(void) {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

/* Linux gives a process the tile registers only on request. */
static bool tiles_granted(void) {
#if defined(__linux__)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

svdq_cpu svdq_examine_cpu(void) {
  const unsigned vectors = bit_SSE3 | bit_SSSE3 | bit_FMA | bit_SSE4_1 | bit_SSE4_2 | bit_MOVBE | bit_POPCNT |
                           bit_OSXSAVE | bit_AVX | bit_F16C;
  const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL;
  const unsigned tiles = bit_AMXTILE | bit_AMXINT8 | bit_AMXBF16;
  enum { AVX_STATE = 0x6, AVX512_STATE = 0xe0, TILE_STATE = 0x60000 };
  svdq_cpu cpu = {0};
  leaf basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1), amd = cpuid(0x80000001, 0);
  if (!has(basic.ecx, vectors)) return cpu;
  unsigned states = saved_states();
  cpu.avx2 = has(states, AVX_STATE) && has(extended.ebx, bit_BMI | bit_AVX2 | bit_BMI2) && has(amd.ecx, bit_LZCNT);
  cpu.avxvnni = cpu.avx2 && has(more.eax, bit_AVXVNNI);
  cpu.avx512 = cpu.avx2 && has(states, AVX512_STATE) && has(extended.ebx, wide) && has(extended.ecx, bit_AVX512VNNI);
  cpu.avx512bf16 = cpu.avx512 && has(more.eax, bit_AVX512BF16);
  cpu.amx = cpu.avx512bf16 && has(states, TILE_STATE) && has(extended.edx, tiles) && tiles_granted();
  return cpu;
}

#endif
