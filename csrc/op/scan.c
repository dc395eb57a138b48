/* cumsum and cumprod along one dimension; `reverse` runs from the end. */
#include "op/fold.h"
#include "tensor/reduction.h"

static moe_status running(moe_ctx *c, int kind, bool reverse) {
  moe_tensor *a = c->arg[0].t;
  fold f;
  if (!moe_fold_dim(c, 1, &f, a->ndim, a->shape, true)) return moe_error_code();
  moe_dtype t = moe_dtype_compute(a->dtype), dtype = moe_dtype_is_float(a->dtype) ? a->dtype : MOE_i64;
  moe_tensor *x = moe_fold_in(&f, a, t);
  if (x == NULL) return moe_error_code();
  moe_tensor *y = moe_result_begin(c, 0, a->ndim, a->shape, t, dtype, moe_dev(x));
  if (y == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, scan, moe_data(y), moe_data(x), f.outer, f.n, f.inner, t, kind, reverse));
  moe_save(c, a);
  return moe_result_end(c, 0, y, dtype);
}

moe_status moe_fwd_cumsum(moe_ctx *c) { return running(c, MOE_SCAN_SUM, c->arg[2].i); }
moe_status moe_fwd_cumprod(moe_ctx *c) { return running(c, MOE_SCAN_PROD, false); }

moe_status moe_bwd_cumsum(moe_ctx *c) {
  if (c->gout[0] == NULL) return MOE_OK;
  return gin_set(c, 0, MOE_CALL(cumsum, T(c->gout[0]), c->arg[1], I(!c->arg[2].i)));
}

moe_status moe_bwd_cumprod(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  MOE_TRY(moe_first_derivative_only(c));
  if (!moe_fold_dim(c, 1, &f, c->in[0].ndim, c->in[0].shape, true)) return moe_error_code();
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *x = moe_dense(c->saved[0], t), *g = moe_dense(c->gout[0], t);
  moe_tensor *gx = moe_empty(c->in[0].ndim, c->in[0].shape, t, c->in[0].device);
  if (x == NULL || g == NULL || gx == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, cumprod_bwd, moe_data(gx), moe_data(g), moe_data(x), f.outer, f.n, f.inner, t));
  return gin_set(c, 0, gx);
}
