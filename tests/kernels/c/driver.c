/* Runs the library's operations for a program on another processor: requests on standard input, results on standard
   output. A request: what it is, the records as bytes, and what their pointers mean, each with its length before it. */
#include <stdio.h>
#include <stdlib.h>

#include "svdquant.h"

enum { SELECT, LINEAR, WEIGHT_ONLY };

typedef struct {
  int64_t operation, gelu, y_type, y_bytes;
} request;

static void get(void* to, size_t bytes) {
  if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0);
}

static void put(const void* from, size_t bytes) {
  if (bytes) fwrite(from, bytes, 1, stdout);
}

static void* get_part(void) {
  int64_t bytes;
  get(&bytes, sizeof bytes);
  if (bytes < 0) return NULL;
  void* p = malloc(bytes);
  get(p, bytes);
  return p;
}

static void select_variant(void) {
  char* name = get_part();
  int64_t failed = svdq_select(name);
  put(&failed, sizeof failed);
  free(name);
}

static void operate(const request* r) {
  svdq_input in;
  svdq_weight w;
  get(&in, sizeof in);
  get(&w, sizeof w);
  const void** const parts[] = {&in.x, &in.smooth, (const void**)&in.ranges, (const void**)&in.low_scales,
                                (const void**)&w.qweight, &w.scales, &w.outer, &w.zeros, &w.down, &w.up, &w.bias};
  enum { PARTS = sizeof parts / sizeof *parts };
  for (int i = 0; i < PARTS; i++) *parts[i] = get_part();
  void* y = malloc(r->y_bytes);
  in.threads = 1;
  if (r->operation == WEIGHT_ONLY) {
    void* scratch = malloc(svdq_weight_only_bytes(&in, &w));
    svdq_weight_only(&in, &w, y, w.outputs, r->y_type, scratch);
    free(scratch);
  } else {
    in.buffer = NULL;
    in.buffer = malloc(svdq_input_bytes(&in));
    svdq_input_bytes(&in);
    void* scratch = malloc(svdq_linear_bytes(&in, &w));
    svdq_linear(&in, &w, 1, (int32_t)r->gelu, y, w.outputs, (int32_t)r->y_type, scratch);
    free(scratch);
    free(in.buffer);
  }
  put(y, r->y_bytes);
  free(y);
  for (int i = 0; i < PARTS; i++) free((void*)*parts[i]);
}

int main(void) {
  for (;;) {
    request r;
    get(&r, sizeof r);
    if (r.operation == SELECT) select_variant();
    else operate(&r);
    fflush(stdout);
  }
}
