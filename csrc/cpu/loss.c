/* Losses: cross-entropy over the rows of [rows, n], and elementwise losses of pairs, summed without a buffer of
** their terms. Sums go in fixed pieces joined in order.
*/
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/order.h"
#include "cpu/vmath.h"
#include "tensor/reduction.h"

enum { BLOCK = 2048, CHUNK = 16384 };

typedef struct ce_job {
  void *loss, *lse, *weight;  /* forward: [rows] */
  void *gx, *gt;              /* backward: [rows, n] */
  const void *g, *total;      /* gradient [rows] or [1]; what it is divided by */
  const void *x, *w, *probs;
  const void *lse_in;
  const int64_t *target;
  int64_t n, ignore, base;
  double smoothing, scale, wsum; /* wsum: sum of the class weights */
  bool g_one;
} ce_job;

typedef struct pair_job {
  void *y, *ga, *gb;
  const void *a, *b, *g;
  double *part;
  int64_t n;
  int kind;
  double p, scale;
  bool g_one;
} pair_job;

#define REAL float
#define NAME(name) name##_f32
#define KEY int32_t
#define KEY_OF moe_key_f32
#define UNKEY moe_unkey_f32
#define F(name) vm_##name##_f32
#define PAIR_SIMD _Pragma("omp simd reduction(+ : s)")
#include "cpu/loss_real.h"

#define REAL double
#define NAME(name) name##_f64
#define KEY int64_t
#define KEY_OF moe_key_f64
#define UNKEY moe_unkey_f64
#define F(name) vm_##name##_f64
#define PAIR_SIMD /* calls the C library */
#include "cpu/loss_real.h"

#define PICK(name, dt) ((dt) == MOE_f32 ? name##_f32 : name##_f64)
#define CHECK_REAL(what, dt) \
  if ((dt) != MOE_f32 && (dt) != MOE_f64) return moe_fail(MOE_EDEVICE, "no kernel '%s' for %s on cpu", what, moe_dtype_name(dt))

static int64_t rows_a_task(int64_t n) { return MOE_MAX(1, MOE_GRAIN / MOE_MAX(n, 1)); }

static double weight_sum(const void *w, int64_t n, moe_dtype dt) {
  if (w == NULL) return (double)n;
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += dt == MOE_f32 ? (double)((const float *)w)[i] : ((const double *)w)[i];
  return s;
}

moe_status MOE_CPU(cross_entropy)(void *loss, void *lse, void *weight, const void *x, const int64_t *target,
                                  const void *w, int64_t rows, int64_t n, int64_t ignore, double smoothing,
                                  moe_dtype dt, int64_t base) {
  CHECK_REAL("cross_entropy", dt);
  for (int64_t i = 0; i < rows; i++)
    if (target[i] != ignore && (target[i] < base || target[i] - base >= n))
      return moe_fail(MOE_EINVAL, "target %lld (element %lld) is out of range: the classes are %lld .. %lld",
                      (long long)target[i], (long long)(i + 1), (long long)base, (long long)(base + n - 1));
  ce_job b = {.loss = loss, .lse = lse, .weight = weight, .x = x, .target = target, .w = w, .n = n, .ignore = ignore,
              .base = base, .smoothing = smoothing, .wsum = weight_sum(w, n, dt)};
  moe_parallel_range(rows, rows_a_task(n), PICK(ce, dt), &b);
  return MOE_OK;
}

moe_status MOE_CPU(cross_entropy_bwd)(void *gx, const void *g, bool g_one, const void *total, const void *x,
                                      const void *lse, const int64_t *target, const void *w, int64_t rows, int64_t n,
                                      int64_t ignore, double smoothing, moe_dtype dt, int64_t base) {
  CHECK_REAL("cross_entropy_bwd", dt);
  ce_job b = {.gx = gx, .g = g, .g_one = g_one, .total = total, .x = x, .lse_in = lse, .target = target, .w = w, .n = n,
              .ignore = ignore, .base = base, .smoothing = smoothing, .wsum = weight_sum(w, n, dt)};
  moe_parallel_range(rows, rows_a_task(n), PICK(ce_bwd, dt), &b);
  return MOE_OK;
}

moe_status MOE_CPU(soft_cross_entropy)(void *loss, void *lse, const void *x, const void *target, const void *w,
                                       int64_t rows, int64_t n, double smoothing, moe_dtype dt) {
  CHECK_REAL("soft_cross_entropy", dt);
  ce_job b = {.loss = loss, .lse = lse, .x = x, .probs = target, .w = w, .n = n, .smoothing = smoothing};
  moe_parallel_range(rows, rows_a_task(n), PICK(soft_ce, dt), &b);
  return MOE_OK;
}

moe_status MOE_CPU(soft_cross_entropy_bwd)(void *gx, void *gt, const void *g, bool g_one, double scale, const void *x,
                                           const void *lse, const void *target, const void *w, int64_t rows, int64_t n,
                                           double smoothing, moe_dtype dt) {
  CHECK_REAL("soft_cross_entropy_bwd", dt);
  ce_job b = {.gx = gx, .gt = gt, .g = g, .g_one = g_one, .scale = scale, .x = x, .lse_in = lse, .probs = target, .w = w,
              .n = n, .smoothing = smoothing};
  moe_parallel_range(rows, rows_a_task(n), PICK(soft_ce_bwd, dt), &b);
  return MOE_OK;
}

moe_status MOE_CPU(pair_loss)(void *y, const void *a, const void *b, int64_t n, moe_dtype dt, int kind, double p,
                              bool reduced, double scale) {
  CHECK_REAL("pair_loss", dt);
  pair_job j = {.y = y, .a = a, .b = b, .n = n, .kind = kind, .p = p};
  if (!reduced) {
    moe_parallel_range(n, CHUNK, PICK(pair_each, dt), &j);
    return MOE_OK;
  }
  int64_t chunks = (n + CHUNK - 1) / CHUNK;
  j.part = moe_scratch(0, MOE_MAX(chunks, 1) * (int64_t)sizeof(double));
  if (j.part == NULL) return moe_fail(MOE_ENOMEM, "out of memory in a loss");
  moe_parallel_range(n, CHUNK, PICK(pair_sum, dt), &j);
  double sum = 0;
  for (int64_t c = 0; c < chunks; c++) sum += j.part[c];
  if (dt == MOE_f32)
    *(float *)y = (float)(sum * scale);
  else
    *(double *)y = sum * scale;
  return MOE_OK;
}

moe_status MOE_CPU(pair_loss_bwd)(void *ga, void *gb, const void *g, bool g_one, double scale, const void *a,
                                  const void *b, int64_t n, moe_dtype dt, int kind, double p) {
  CHECK_REAL("pair_loss_bwd", dt);
  pair_job j = {.ga = ga, .gb = gb, .g = g, .g_one = g_one, .scale = scale, .a = a, .b = b, .n = n, .kind = kind, .p = p};
  moe_parallel_range(n, CHUNK, PICK(pair_bwd, dt), &j);
  return MOE_OK;
}
