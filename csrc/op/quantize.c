/* fake_quantize: values rounded to few levels, kept as floats; the gradient passes straight through. */
#include "op/fold.h"

moe_status moe_fwd_fake_quantize(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t;
  int64_t levels = c->arg[1].i, dims = c->arg[3].i;
  if (!moe_dtype_is_float(a->dtype)) return OP_FAIL(c, "x must be floating, got %s", moe_dtype_name(a->dtype));
  if (levels < 1 || levels > 1 << 20) return OP_FAIL(c, "levels must lie in 1..2^20, got %lld", (long long)levels);
  if (dims < 0 || dims > a->ndim)
    return OP_FAIL(c, "dims must lie in 0..%d, the dimensions of x, got %lld", a->ndim, (long long)dims);
  moe_dtype t = moe_dtype_compute(a->dtype);
  moe_tensor *x = moe_dense(a, t), *y = moe_result_begin(c, 0, a->ndim, a->shape, t, a->dtype, moe_dev(a));
  if (x == NULL || y == NULL) return moe_error_code();
  int64_t n = 1;
  for (int d = a->ndim - (int)dims; d < a->ndim; d++) n *= a->shape[d];
  if (moe_numel(x) > 0)
    MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, fake_quantize, moe_data(y), moe_data(x), moe_numel(x) / n, n, levels,
                    c->arg[2].i == 1, t));
  return moe_result_end(c, 0, y, a->dtype);
}
