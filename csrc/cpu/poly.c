/* Polynomials of activations over the rows of [rows, n]: sum_i a_i z^i with z = max(x, 0) (poly_relu), or
** a_0 + sum_i a_i x^i / sqrt(mean(x^2i) + eps) (poly_norm). A row lies in the cache after its first pass. Every
** row's gradient of a is its own; who shares coefficients adds them up.
*/
#include <math.h>

#include "cpu/cpu.h"
#include "cpu/order.h"

enum {
  BLOCK = 256,   /* elements summed in their own type before they go to f64 */
  MAX_TERMS = 16 /* ORDER with op/poly.c */
};

typedef struct job {
  void *y, *ga; /* y: gx in the backward, may be NULL */
  const void *x, *a, *g;
  int64_t n, terms;
  bool own, norm; /* own: a is [rows, terms] */
  double eps;
} job;

#define REAL float
#define NAME(name) name##_f32
#define KEY int32_t
#define KEY_MAX INT32_MAX
#define BITS moe_f32_bits
#define UNBITS(b) moe_bits_f32((uint32_t)(b))
#include "cpu/poly_real.h"
#define REAL double
#define NAME(name) name##_f64
#define KEY int64_t
#define KEY_MAX INT64_MAX
#define BITS moe_f64_bits
#define UNBITS(b) moe_bits_f64((uint64_t)(b))
#include "cpu/poly_real.h"

static moe_status run(moe_range_fn *f32, moe_range_fn *f64, moe_dtype dt, int64_t rows, job *j) {
  moe_range_fn *fn = dt == MOE_f32 ? f32 : dt == MOE_f64 ? f64 : NULL;
  if (fn == NULL) return moe_fail(MOE_EDEVICE, "no kernel 'poly' for %s on cpu", moe_dtype_name(dt));
  moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / 2 / MOE_MAX(j->n, 1)), fn, j);
  return MOE_OK;
}

moe_status MOE_CPU(poly)(void *y, const void *x, const void *a, int64_t rows, int64_t n, int64_t terms, bool own, bool norm,
                         double eps, moe_dtype dt) {
  job j = {.y = y, .x = x, .a = a, .n = n, .terms = terms, .own = own, .norm = norm, .eps = eps};
  return run(forward_f32, forward_f64, dt, rows, &j);
}

moe_status MOE_CPU(poly_bwd)(void *gx, void *ga, const void *g, const void *x, const void *a, int64_t rows, int64_t n,
                             int64_t terms, bool own, bool norm, double eps, moe_dtype dt) {
  job j = {.y = gx, .ga = ga, .g = g, .x = x, .a = a, .n = n, .terms = terms, .own = own, .norm = norm, .eps = eps};
  return run(backward_f32, backward_f64, dt, rows, &j);
}
