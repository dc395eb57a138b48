/* Convolutions over time: windows for the general one, which is a product with them, and the causal depthwise one
** of state-space blocks, which runs along the channels. */
#include <stdatomic.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

enum { LANES = 64 }; /* channels at a time */

static const double zeros[LANES]; /* a row before the beginning */

typedef struct unfold_job {
  int64_t t, width, len, stride, padding, dilation;
  const void *from;
  void *to;
} unfold_job;

typedef struct causal_job {
  int64_t t, c, w;
  const int64_t *sx;
  bool silu;
  const void *x, *weight_t, *bias, *initial, *g, *gfinal;
  void *y, *dx, *dweight, *dinitial;
  atomic_bool short_of_memory;
} causal_job;

#define REAL float
#define STATIC(x) x##_f32
#define SIGMOID vm_sigmoid_f32
#include "cpu/conv_real.h"
#undef REAL
#undef STATIC
#undef SIGMOID

#define REAL double
#define STATIC(x) x##_f64
#define SIGMOID vm_sigmoid_f64
#include "cpu/conv_real.h"

moe_status MOE_CPU(unfold1d)(moe_dtype dt, void *y, const void *x, int64_t rows, int64_t t, int64_t width, int64_t len,
                             int64_t stride, int64_t padding, int64_t dilation, bool back) {
  unfold_job j = {t, width, len, stride, padding, dilation, x, y};
  if (back)
    moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / MOE_MAX(t + width * len, 1)), dt == MOE_f64 ? fold_range_f64 : fold_range_f32, &j);
  else
    moe_parallel_range(rows * width, MOE_MAX(1, MOE_GRAIN / MOE_MAX(len, 1)), dt == MOE_f64 ? unfold_range_f64 : unfold_range_f32, &j);
  return MOE_OK;
}

moe_status MOE_CPU(causal_conv1d)(moe_dtype dt, void *y, const void *x, const void *weight_t, const void *bias, const void *initial,
                                  int64_t b, int64_t t, int64_t c, int64_t w, const int64_t *sx, bool silu) {
  causal_job j = {.t = t, .c = c, .w = w, .sx = sx, .silu = silu, .x = x, .weight_t = weight_t, .bias = bias, .initial = initial, .y = y};
  int64_t grain = MOE_MAX(1, MOE_GRAIN / MOE_MAX(c * w, 1));
  moe_parallel_range(b * t, grain, dt == MOE_f64 ? causal_range_f64 : causal_range_f32, &j);
  return MOE_OK;
}

moe_status MOE_CPU(causal_conv1d_backward)(moe_dtype dt, void *dx, void *dweight, void *dinitial, const void *g, const void *gfinal,
                                           const void *x, const void *weight_t, const void *bias, const void *initial, int64_t b,
                                           int64_t t, int64_t c, int64_t w, const int64_t *sx, bool silu) {
  causal_job j = {.t = t, .c = c, .w = w, .sx = sx, .silu = silu, .x = x, .weight_t = weight_t, .bias = bias, .initial = initial,
                  .g = g, .gfinal = gfinal, .dx = dx, .dweight = dweight, .dinitial = dinitial};
  int64_t tasks = b * ((c + LANES - 1) / LANES), grain = MOE_MAX(1, MOE_GRAIN / 4 / MOE_MAX(t * w * MOE_MIN(c, LANES), 1));
  moe_parallel_range(tasks, grain, dt == MOE_f64 ? causal_back_range_f64 : causal_back_range_f32, &j);
  return j.short_of_memory ? moe_fail(MOE_ENOMEM, "causal_conv1d: no memory for a window of gradients") : MOE_OK;
}
