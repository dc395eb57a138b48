/* Tensors from nothing: constants, sequences. The rows end in "dtype, device, requires_grad". */
#include <math.h>

#include "op/make.h"

/* --- shared with random.c --- */

moe_tensor *moe_make(moe_ctx *c, int ndim, const int64_t *shape, moe_dtype dtype, int at) {
  moe_device *dev = c->arg[at + 1].kind == MOE_K_none ? NULL : c->arg[at + 1].dev;
  if (dev == NULL) dev = c->arg[0].kind == MOE_K_tensor ? moe_dev(c->arg[0].t) : moe_cpu();
  bool grad = c->arg[at + 2].i != 0;
  if (grad && !moe_dtype_is_float(dtype)) {
    OP_FAIL(c, "requires_grad wants a float type, got %s", moe_dtype_name(dtype));
    return NULL;
  }
  moe_tensor *y = moe_empty(ndim, shape, dtype, dev);
  if (y == NULL) {
    moe_fail_prefix(c->op->name);
    return NULL;
  }
  y->requires_grad = grad;
  return moe_set_out(c, 0, y) == MOE_OK ? y : NULL;
}

static moe_dtype dtype_at(const moe_ctx *c, int at, moe_dtype otherwise) {
  return c->arg[at].kind == MOE_K_none ? otherwise : (moe_dtype)c->arg[at].i;
}

moe_tensor *moe_make_shaped(moe_ctx *c, int at) {
  return moe_make(c, c->arg[0].ints.n, c->arg[0].ints.v, dtype_at(c, at, MOE_f32), at);
}

moe_tensor *moe_make_like(moe_ctx *c, int at) {
  const moe_tensor *x = c->arg[0].t;
  return moe_make(c, x->ndim, x->shape, dtype_at(c, at, x->dtype), at);
}

/* --- constants: the variant is the value --- */

moe_status moe_fwd_constant(moe_ctx *c) {
  moe_tensor *y = moe_make_shaped(c, 1);
  return y ? moe_fill(y, c->op->variant) : moe_error_code();
}

moe_status moe_fwd_constant_like(moe_ctx *c) {
  moe_tensor *y = moe_make_like(c, 1);
  return y ? moe_fill(y, c->op->variant) : moe_error_code();
}

moe_status moe_fwd_empty(moe_ctx *c) { return moe_make_shaped(c, 1) ? MOE_OK : moe_error_code(); }

moe_status moe_fwd_full(moe_ctx *c) {
  moe_tensor *y = moe_make_shaped(c, 2);
  return y ? moe_fill(y, c->arg[1].f) : moe_error_code();
}

moe_status moe_fwd_full_like(moe_ctx *c) {
  moe_tensor *y = moe_make_like(c, 2);
  return y ? moe_fill(y, c->arg[1].f) : moe_error_code();
}

moe_status moe_fwd_eye(moe_ctx *c) {
  int64_t n = c->arg[0].i, m = c->arg[1].kind == MOE_K_none ? n : c->arg[1].i;
  moe_tensor *y = moe_make(c, 2, (const int64_t[]){n, m}, dtype_at(c, 2, MOE_f32), 2);
  if (y == NULL) return moe_error_code();
  MOE_TRY(moe_fill(y, 0));
  int64_t len = MOE_MIN(n, m), step = m + 1;
  if (len == 0) return MOE_OK;
  return moe_fill(moe_view_of(y, 1, &len, &step, 0), 1);
}

/* --- sequences --- */

static moe_status sequence(moe_tensor *y, double start, double step) {
  moe_dtype work = moe_dtype_compute(y->dtype);
  moe_tensor *r = y->dtype == work ? y : moe_empty(y->ndim, y->shape, work, moe_dev(y));
  if (r == NULL) return moe_error_code();
  int64_t n = moe_numel(y);
  if (n > 0) MOE_TRY(MOE_RUN(moe_dev(y), "arange", sequence, moe_data(r), n, work, start, step));
  return r == y ? MOE_OK : moe_copy(y, r);
}

/* As Lua's for: arange(a, b, step) counts from a up to b, b included; arange(n) counts 1..n. A quotient that
** misses a whole number by rounding alone (0, 0.3, 0.1) counts as that number. */
moe_status moe_fwd_arange(moe_ctx *c) {
  bool one = c->arg[1].kind == MOE_K_none;
  double start = one ? 1 : c->arg[0].f, stop = one ? c->arg[0].f : c->arg[1].f, step = c->arg[2].kind == MOE_K_none ? 1 : c->arg[2].f;
  bool whole = c->arg[0].is_int && (one || c->arg[1].is_int) && (c->arg[2].kind == MOE_K_none || c->arg[2].is_int);
  if (!(step != 0) || !isfinite(start) || !isfinite(stop) || !isfinite(step))
    return OP_FAIL(c, "wants finite numbers and a step other than 0, got %g, %g, %g", start, stop, step);
  double q = (stop - start) / step, steps = floor(q + 1e-9 * fmax(1, fabs(q)));
  if (steps > 9e15) return OP_FAIL(c, "from %g to %g by %g are too many numbers", start, stop, step);
  int64_t n = steps < 0 ? 0 : (int64_t)steps + 1;
  moe_tensor *y = moe_make(c, 1, &n, dtype_at(c, 3, whole ? MOE_i64 : MOE_f32), 3);
  return y ? sequence(y, start, step) : moe_error_code();
}

moe_status moe_fwd_linspace(moe_ctx *c) {
  double start = c->arg[0].f, stop = c->arg[1].f;
  int64_t n = c->arg[2].i, one = 1;
  moe_tensor *y = moe_make(c, 1, &n, dtype_at(c, 3, MOE_f32), 3);
  if (y == NULL) return moe_error_code();
  MOE_TRY(sequence(y, start, n > 1 ? (stop - start) / (double)(n - 1) : 0));
  return n > 1 ? moe_fill(moe_view_of(y, 1, &one, &one, n - 1), stop) : MOE_OK; /* the end to the bit */
}
