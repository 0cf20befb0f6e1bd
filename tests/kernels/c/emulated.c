/* The processor of a library whose variants are emulated: what it has, and what it pretends to have. */
#include <stdatomic.h>

#include "cpu.h"

_Atomic int emulated_tile_users;

__attribute__((visibility("default"))) int emulated_tiles_in_use(void) { return emulated_tile_users; }

svdq_cpu real_examine_cpu(void);

svdq_cpu svdq_examine_cpu(void) {
  svdq_cpu cpu = real_examine_cpu();
  cpu.amx = cpu.avx512;
  cpu.avxvnni = cpu.avx2;
  return cpu;
}
