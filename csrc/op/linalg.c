/* Decompositions of matrices, by LAPACK. Without gradients. */
#include "op/fold.h"

/* svd(x [.., m, n]) -> U [.., m, k], S [.., k], V [.., n, k], k = min(m, n) */
moe_status moe_fwd_svd(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  char s[MOE_SHAPE_TEXT];
  if (x->ndim < 2) return OP_FAIL(c, "x is %s, wanted [.., m, n]", moe_shape_of(s, x));
  int64_t m = x->shape[x->ndim - 2], n = x->shape[x->ndim - 1], k = MOE_MIN(m, n), batch = 1, shape[MOE_MAX_DIM];
  if (k == 0) return OP_FAIL(c, "x is %s, wanted matrices of at least one row and one column", moe_shape_of(s, x));
  for (int d = 0; d < x->ndim - 2; d++) {
    shape[d] = x->shape[d];
    batch *= x->shape[d];
  }
  int last = x->ndim - 1;
  moe_dtype dt = moe_float_of(x->dtype), ct = moe_dtype_compute(dt);
  moe_tensor *a = moe_dense(x, ct);
  shape[last - 1] = m;
  shape[last] = k;
  moe_tensor *u = moe_result_begin(c, 0, x->ndim, shape, ct, dt, moe_dev(x));
  shape[last - 1] = n;
  moe_tensor *v = moe_result_begin(c, 2, x->ndim, shape, ct, dt, moe_dev(x));
  shape[last - 1] = k;
  moe_tensor *w = moe_result_begin(c, 1, last, shape, ct, dt, moe_dev(x));
  if (a == NULL || u == NULL || v == NULL || w == NULL) return moe_error_code();
  if (batch > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, svd, moe_data(u), moe_data(w), moe_data(v), moe_data(a), batch, m, n, ct));
  MOE_TRY(moe_result_end(c, 0, u, dt));
  MOE_TRY(moe_result_end(c, 1, w, dt));
  return moe_result_end(c, 2, v, dt);
}
