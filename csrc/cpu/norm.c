/* Layer norm (Ba, Kiros, Hinton 2016) and root mean square norm (Zhang, Sennrich 2019) over the rows of [rows, n].
** A row is read once from memory; the further passes find it in the cache. Gradients of weight and bias are
** summed over fixed blocks of rows, and the blocks' sums in order.
*/
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"

enum {
  BLOCK = 2048,   /* elements summed in their own type before they go to f64 */
  MAX_PARTS = 256 /* blocks of rows in the backward */
};

typedef struct job {
  void *y, *mean, *rstd; /* written by the forward; y: gx in the backward */
  const void *x, *w, *b;
  const void *g, *mean_in, *rstd_in; /* the backward's */
  void *gw, *gb;
  void *part; /* [parts, 2, n]: sums of g xhat and of g over a block of rows; or NULL */
  int64_t rows, n, rows_a_part, parts;
  double eps;
  bool center;
} job;

#define REAL float
#define NAME(name) name##_f32
#include "cpu/norm_real.h"
#define REAL double
#define NAME(name) name##_f64
#include "cpu/norm_real.h"

#define PICK(name, dt) ((dt) == MOE_f32 ? name##_f32 : name##_f64)
#define CHECK_REAL(what, dt) \
  if ((dt) != MOE_f32 && (dt) != MOE_f64) return moe_fail(MOE_EDEVICE, "no kernel '%s' for %s on cpu", what, moe_dtype_name(dt))

moe_status MOE_CPU(norm_rows)(void *y, void *mean, void *rstd, const void *x, const void *w, const void *b,
                              int64_t rows, int64_t n, double eps, moe_dtype dt) {
  CHECK_REAL("norm_rows", dt);
  job j = {.y = y, .mean = mean, .rstd = rstd, .x = x, .w = w, .b = b, .n = n, .eps = eps, .center = mean != NULL};
  moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / MOE_MAX(n, 1)), PICK(forward, dt), &j);
  return MOE_OK;
}

moe_status MOE_CPU(norm_rows_bwd)(void *gx, void *gw, void *gb, const void *g, const void *x, const void *w,
                                  const void *mean, const void *rstd, int64_t rows, int64_t n, moe_dtype dt) {
  CHECK_REAL("norm_rows_bwd", dt);
  if (n == 0) return MOE_OK;
  job j = {.y = gx, .g = g, .x = x, .w = w, .mean_in = mean, .rstd_in = rstd, .gw = gw, .gb = gb,
           .rows = rows, .n = n, .center = mean != NULL};
  j.rows_a_part = MOE_MAX(MOE_MAX(MOE_GRAIN / n, 1), (rows + MAX_PARTS - 1) / MAX_PARTS);
  j.parts = (rows + j.rows_a_part - 1) / j.rows_a_part;
  if (gw || gb) {
    j.part = moe_scratch(0, MOE_MAX(j.parts, 1) * 2 * n * moe_dtype_size(dt));
    if (j.part == NULL) return moe_fail(MOE_ENOMEM, "out of memory in a norm's gradient");
  }
  moe_parallel(j.parts, PICK(backward, dt), &j);
  if (gw || gb) moe_parallel_range(n, MOE_MAX(1, MOE_GRAIN / MOE_MAX(j.parts, 1)), PICK(join, dt), &j);
  return MOE_OK;
}
