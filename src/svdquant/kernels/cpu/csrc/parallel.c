#include "parallel.h"

#include <stdatomic.h>
#include <stddef.h>

/* libgomp's and LLVM's entry points, declared here: the library is linked to neither. */
typedef void (*gomp_parallel_fn)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

typedef struct {
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
} kmpc_location;
typedef void (*kmpc_body)(int32_t* thread, int32_t* bound, ...);
typedef void (*kmpc_fork_call_fn)(kmpc_location*, int32_t argument_count, kmpc_body, ...);
typedef void (*kmpc_push_num_threads_fn)(kmpc_location*, int32_t thread, int32_t threads);
typedef int32_t (*kmpc_global_thread_num_fn)(kmpc_location*);

static _Atomic(gomp_parallel_fn) gomp_parallel;
static _Atomic(kmpc_fork_call_fn) kmpc_fork_call;
static _Atomic(kmpc_push_num_threads_fn) kmpc_push_num_threads;
static _Atomic(kmpc_global_thread_num_fn) kmpc_global_thread_num;

/* The counters lie on cache lines of their own: every thread writes them, and reads the rest. */
typedef struct {
  _Alignas(64) atomic_int_least64_t next;
  _Alignas(64) atomic_int_least32_t worker;
  _Alignas(64) svdq_task task;
  void* context;
  int64_t tasks;
  int32_t threads;
} loop;

void svdq_set_runtime(void* gomp, void* fork_call, void* push_num_threads, void* global_thread_num) {
  atomic_store(&gomp_parallel, (gomp_parallel_fn)gomp);
  atomic_store(&kmpc_push_num_threads, (kmpc_push_num_threads_fn)push_num_threads);
  atomic_store(&kmpc_global_thread_num, (kmpc_global_thread_num_fn)global_thread_num);
  atomic_store(&kmpc_fork_call, (kmpc_fork_call_fn)fork_call);
}

static void run(void* data) {
  loop* l = data;
  int32_t worker = atomic_fetch_add_explicit(&l->worker, 1, memory_order_relaxed);
  /* A runtime that gives more threads than were asked for gets them back. */
  if (worker >= l->threads) return;
  for (;;) {
    int64_t index = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
    if (index >= l->tasks) return;
    l->task(l->context, index, worker);
  }
}

static void run_kmpc(int32_t* thread, int32_t* bound, void* data) {
  (void)thread;
  (void)bound;
  run(data);
}

void svdq_parallel_for(int64_t tasks, int32_t threads, svdq_task task, void* context) {
  gomp_parallel_fn gomp = atomic_load_explicit(&gomp_parallel, memory_order_acquire);
  kmpc_fork_call_fn fork_call = atomic_load_explicit(&kmpc_fork_call, memory_order_acquire);
  if (tasks <= 1 || threads <= 1 || (gomp == NULL && fork_call == NULL)) {
    for (int64_t index = 0; index < tasks; index++) task(context, index, 0);
    return;
  }
  loop l = {.task = task, .context = context, .tasks = tasks, .threads = threads};
  /* All threads, even for fewer tasks: libgomp ends the threads that a smaller team leaves over and starts them
     again for the next larger one, which costs more than waking them. */
  if (gomp != NULL) {
    gomp(run, &l, (unsigned)threads, 0);
    return;
  }
  kmpc_location location = {.flags = 2, .source = ";unknown;unknown;0;0;;"};
  kmpc_push_num_threads_fn push = atomic_load_explicit(&kmpc_push_num_threads, memory_order_acquire);
  kmpc_global_thread_num_fn thread_num = atomic_load_explicit(&kmpc_global_thread_num, memory_order_acquire);
  if (push != NULL && thread_num != NULL) push(&location, thread_num(&location), threads);
  fork_call(&location, 1, (kmpc_body)(void (*)(void))run_kmpc, &l);
}
