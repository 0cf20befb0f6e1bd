/* Loops on the threads that the host program already has. */
#ifndef SVDQ_PARALLEL_H
#define SVDQ_PARALLEL_H

#include <stdint.h>

#include "svdquant.h"

typedef void (*svdq_task)(void* context, int64_t index, int32_t worker);

/* task(context, i, worker) once for every i in [0, tasks), in no order, and returns when all are done. worker, in
   [0, threads), is one running thread's own. May be called from several threads at once and from within a task. */
SVDQ_PUBLIC void svdq_parallel_for(int64_t tasks, int32_t threads, svdq_task task, void* context);

#endif
