#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "cpu.h"
#include "svdquant.h"
#include "variants.h"

/* SVDQ_VARIANTS(use) is the build's list: use(name) for each variant compiled in, best first. */
#define DECLARE(isa) extern const svdq_variant svdq_variant_##isa;
SVDQ_VARIANTS(DECLARE)

enum { MOST = 8, NAME_BYTES = 16 };

static const svdq_variant* runnable[MOST + 1];
static char names[MOST * NAME_BYTES];
static _Atomic(const svdq_variant*) current;

static void offer(const svdq_variant* variant) {
  int count = 0;
  while (runnable[count] != NULL) count++;
  runnable[count] = variant;
  if (count > 0) strcat(names, ",");
  strcat(names, variant->name);
}

static void examine(void) {
  svdq_cpu cpu = svdq_examine_cpu();
  (void)cpu;
#define OFFER(isa) if (cpu.isa) offer(&svdq_variant_##isa);
  SVDQ_VARIANTS(OFFER)
  atomic_store(&current, runnable[0]);
}

/* Once, whichever thread comes first; the others wait the microseconds that it takes. */
static void ensure_examined(void) {
  enum { NOT_YET, BUSY, DONE };
  static atomic_int state;
  if (atomic_load_explicit(&state, memory_order_acquire) == DONE) return;
  int expected = NOT_YET;
  if (atomic_compare_exchange_strong(&state, &expected, BUSY)) {
    examine();
    atomic_store(&state, DONE);
  }
  while (atomic_load(&state) != DONE) {}
}

const svdq_variant* svdq_current(void) {
  ensure_examined();
  return atomic_load_explicit(&current, memory_order_acquire);
}

int32_t svdq_abi_version(void) { return SVDQ_ABI_VERSION; }

const char* svdq_isa(void) {
  const svdq_variant* variant = svdq_current();
  return variant == NULL ? "" : variant->name;
}

const char* svdq_available(void) {
  ensure_examined();
  return names;
}

int32_t svdq_select(const char* name) {
  ensure_examined();
  for (int i = 0; runnable[i] != NULL; i++) {
    if (strcmp(runnable[i]->name, name) != 0) continue;
    atomic_store(&current, runnable[i]);
    return 0;
  }
  return 1;
}
