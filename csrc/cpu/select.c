/* Gates of a variable number of experts a token: the slot router_gates. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"

enum { SCRATCH = 5 }; /* the scratch slot of these kernels, for their length */

typedef struct gates_job {
  void *gate;
  const void *score;
  const double *mass, *threshold, *min_k, *max_k;
  int64_t experts;
  atomic_bool no_memory;
} gates_job;

/* A count from a number that may be anything: 0 .. n, NaN is 0. */
static inline int64_t count_of(double v, int64_t n) { return v >= (double)n ? n : v >= 1 ? (int64_t)v : 0; }

#define REAL float
#define R(x) x##_f32
#include "cpu/select_real.h"
#undef REAL
#undef R

#define REAL double
#define R(x) x##_f64
#include "cpu/select_real.h"
#undef REAL
#undef R

moe_status MOE_CPU(router_gates)(void *gate, const void *score, const double *mass, const double *threshold,
                                 const double *min_k, const double *max_k, int64_t tokens, int64_t experts,
                                 moe_dtype dt) {
  gates_job j = {.gate = gate,
                 .score = score,
                 .mass = mass,
                 .threshold = threshold,
                 .min_k = min_k,
                 .max_k = max_k,
                 .experts = experts};
  moe_parallel_range(tokens, MOE_MAX(1, MOE_GRAIN / experts), dt == MOE_f64 ? gates_rows_f64 : gates_rows_f32, &j);
  return atomic_load(&j.no_memory) ? moe_fail(MOE_ENOMEM, "out of memory for the router's scratch space") : MOE_OK;
}
