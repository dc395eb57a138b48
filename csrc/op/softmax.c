/* softmax and log_softmax along one dimension: one kernel forward, one backward. */
#include "op/fold.h"

static moe_status forward(moe_ctx *c, bool logarithm) {
  moe_tensor *a = c->arg[0].t;
  fold f;
  if (!moe_fold_dim(c, 1, &f, a->ndim, a->shape, true)) return moe_error_code();
  moe_dtype dtype = moe_float_of(a->dtype), t = moe_dtype_compute(dtype);
  moe_tensor *x = moe_dense(a, t);
  if (x == NULL) return moe_error_code();
  moe_tensor *y = moe_result_begin(c, 0, a->ndim, a->shape, t, dtype, moe_dev(x));
  if (y == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, softmax, moe_data(y), moe_data(x), f.outer, f.n, f.inner, t, logarithm));
  MOE_TRY(moe_result_end(c, 0, y, dtype));
  moe_save(c, c->out[0]);
  return MOE_OK;
}

static moe_status backward(moe_ctx *c, bool logarithm) {
  moe_tensor *y0 = c->saved[0], *g0 = c->gout[0];
  fold f;
  if (g0 == NULL) return MOE_OK;
  if (!moe_fold_dim(c, 1, &f, c->in[0].ndim, c->in[0].shape, true)) return moe_error_code();
  if (moe_grad_enabled()) { /* composed, so that it is recorded */
    moe_tensor *s = MOE_CALL(sum, T(logarithm ? g0 : MOE_CALL(mul, T(g0), T(y0))), DIM1(c->arg[1].i), I(true));
    return gin_set(c, 0, logarithm ? MOE_CALL(sub, T(g0), T(MOE_CALL(mul, T(MOE_CALL(exp, T(y0))), T(s))))
                                   : MOE_CALL(mul, T(y0), T(MOE_CALL(sub, T(g0), T(s)))));
  }
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *y = moe_dense(y0, t), *g = moe_dense(g0, t);
  moe_tensor *gx = moe_empty(c->in[0].ndim, c->in[0].shape, t, c->in[0].device);
  if (y == NULL || g == NULL || gx == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(y), c->op->name, softmax_bwd, moe_data(gx), moe_data(g), moe_data(y), f.outer, f.n, f.inner, t, logarithm));
  return gin_set(c, 0, gx);
}

moe_status moe_fwd_softmax(moe_ctx *c) { return forward(c, false); }
moe_status moe_bwd_softmax(moe_ctx *c) { return backward(c, false); }
moe_status moe_fwd_log_softmax(moe_ctx *c) { return forward(c, true); }
moe_status moe_bwd_log_softmax(moe_ctx *c) { return backward(c, true); }
