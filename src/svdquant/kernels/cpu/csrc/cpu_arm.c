#if defined(__aarch64__)

#include "cpu.h"

#if defined(__linux__)
#include <sys/auxv.h>

svdq_cpu svdq_examine_cpu(void) {
  /* Names of the kernel's interface, which older C libraries lack. */
  enum { ASIMDHP = 1 << 10, ASIMDDP = 1 << 20, I8MM = 1 << 13, BF16 = 1 << 14 };
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  svdq_cpu cpu = {0};
  cpu.neon = (first & ASIMDHP) && (first & ASIMDDP);
  cpu.i8mm = cpu.neon && (second & I8MM) && (second & BF16);
  return cpu;
}

#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

static bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

svdq_cpu svdq_examine_cpu(void) {
  svdq_cpu cpu = {.neon = true}; /* every Mac with an ARM processor */
  cpu.i8mm = feature("hw.optional.arm.FEAT_I8MM") && feature("hw.optional.arm.FEAT_BF16");
  return cpu;
}

#else
#error "no way to examine this operating system's ARM processors"
#endif

#endif
