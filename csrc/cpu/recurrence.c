/* Linear recurrences: a task runs one head of one sequence, chunk by chunk. The arithmetic is in
** recurrence_real.h and recurrence_back_real.h. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vmath.h"

enum {
  SCRATCH = 3, /* the scratch slot of these kernels */
  BLOCK = 16,  /* rows of a block on the diagonal of a chunk that is solved, or multiplied pair by pair, without a BLAS */
  SLAB = 64,   /* rows of a product of which the part above the diagonal is left out */
  STEPS = 4    /* chunks of so few rows run step by step */
};

typedef struct recurrence_job {
  const moe_recurrence *f;
  void *o, *last, *states; /* states: kept for the backward, or NULL */
  const void *initial;
  const void *kept, *go;
  const moe_recurrence_grad *grad;
  atomic_bool short_of_memory;
} recurrence_job;

#define REAL float
#define TINY 1e-30f
#define MILD 1e-15f
#define R(x) x##_f32
#define EXP vm_exp_f32
#define GEMM moe_gemm_f32
#include "cpu/recurrence_chunk_real.h"
#include "cpu/recurrence_pair_real.h"
#include "cpu/recurrence_real.h"
#include "cpu/recurrence_back_real.h"
#undef REAL
#undef TINY
#undef MILD
#undef R
#undef EXP
#undef GEMM

#define REAL double
#define TINY 1e-290
#define MILD 1e-140
#define R(x) x##_f64
#define EXP vm_exp_f64
#define GEMM moe_gemm_f64
#include "cpu/recurrence_chunk_real.h"
#include "cpu/recurrence_pair_real.h"
#include "cpu/recurrence_real.h"
#include "cpu/recurrence_back_real.h"

static moe_status run(const moe_recurrence *f, recurrence_job *j, moe_range_fn *fn) {
  int64_t tasks = f->sequences * f->heads;
  if (tasks == 0) return MOE_OK;
  int64_t rows = f->start ? f->start[f->sequences] : f->sequences * f->time, each = (rows / f->sequences + 1) * f->dk * f->dv;
  moe_parallel_range(tasks, MOE_MAX(1, MOE_GRAIN * 4 / MOE_MAX(1, each)), fn, j);
  return j->short_of_memory ? moe_fail(MOE_ENOMEM, "out of memory for the scratch space of a recurrence") : MOE_OK;
}

moe_status MOE_CPU(recurrence)(void *o, void *last, void *states, const void *initial, const moe_recurrence *f) {
  recurrence_job j = {.f = f, .o = o, .last = last, .states = states, .initial = initial};
  return run(f, &j, f->dtype == MOE_f64 ? forward_range_f64 : forward_range_f32);
}

moe_status MOE_CPU(recurrence_backward)(const moe_recurrence_grad *grad, const void *go, const void *states,
                                        const moe_recurrence *f) {
  recurrence_job j = {.f = f, .grad = grad, .go = go, .kept = states};
  return run(f, &j, f->dtype == MOE_f64 ? backward_range_f64 : backward_range_f32);
}
