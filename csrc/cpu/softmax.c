/* softmax, log_softmax and logsumexp over the middle of [outer, n, inner]; inner == 1 (rows) is the fast case.
** The maximum is taken out first; a row of n elements is read from the cache for all further passes. NaN, and a
** row without a finite maximum, give NaN.
*/
#include <math.h>

#include "cpu/cpu.h"
#include "cpu/order.h"
#include "cpu/vmath.h"

enum {
  TILE = 256,  /* columns at a time: a page of each row, or a quarter */
  ROWS = 64,   /* of a column are summed in its own type, then in double */
  BLOCK = 2048 /* the same along a row */
};

typedef struct job {
  void *y;
  const void *x, *g;
  int64_t n, inner, strips; /* strips of TILE columns, of which one has n * TILE elements */
  bool logarithm;
} job;

#define REAL float
#define NAME(name) name##_f32
#define KEY int32_t
#define KEY_OF moe_key_f32
#define UNKEY moe_unkey_f32
#define EXP vm_exp_f32
#include "cpu/softmax_real.h"

#define REAL double
#define NAME(name) name##_f64
#define KEY int64_t
#define KEY_OF moe_key_f64
#define UNKEY moe_unkey_f64
#define EXP exp
#include "cpu/softmax_real.h"

static moe_status run(const char *what, moe_range_fn *f32, moe_range_fn *f64, moe_dtype dt, int64_t outer, job *b) {
  moe_range_fn *fn = dt == MOE_f32 ? f32 : dt == MOE_f64 ? f64 : NULL;
  if (fn == NULL) return moe_fail(MOE_EDEVICE, "no kernel '%s' for %s on cpu", what, moe_dtype_name(dt));
  b->strips = (b->inner + TILE - 1) / TILE;
  moe_parallel_range(outer * b->strips, MOE_MAX(1, MOE_GRAIN / MOE_MAX(b->n * MOE_MIN(b->inner, TILE), 1)), fn, b);
  return MOE_OK;
}

moe_status MOE_CPU(softmax)(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, moe_dtype dt,
                            bool logarithm) {
  job b = {.y = y, .x = x, .n = n, .inner = inner, .logarithm = logarithm};
  if (n == 0 || inner == 0) return MOE_OK;
  return inner == 1 ? run("softmax", rows_f32, rows_f64, dt, outer, &b)
                    : run("softmax", cols_f32, cols_f64, dt, outer, &b);
}

moe_status MOE_CPU(softmax_bwd)(void *gx, const void *g, const void *y, int64_t outer, int64_t n, int64_t inner,
                                moe_dtype dt, bool logarithm) {
  job b = {.y = gx, .x = y, .g = g, .n = n, .inner = inner, .logarithm = logarithm};
  if (n == 0 || inner == 0) return MOE_OK;
  return inner == 1 ? run("softmax_bwd", rows_bwd_f32, rows_bwd_f64, dt, outer, &b)
                    : run("softmax_bwd", cols_bwd_f32, cols_bwd_f64, dt, outer, &b);
}

moe_status MOE_CPU(logsumexp)(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, moe_dtype dt) {
  job b = {.y = y, .x = x, .n = n, .inner = inner};
  if (inner == 0) return MOE_OK;
  return run("logsumexp", logsumexp_f32, logsumexp_f64, dt, outer, &b);
}
