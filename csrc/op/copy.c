/* Copies and conversions as operations. */
#include "op/op.h"

moe_status moe_fwd_contiguous(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  return moe_set_out(c, 0, moe_is_contiguous(x) ? moe_detach(x) : moe_contiguous_raw(x));
}

moe_status moe_fwd_clone(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, x->dtype);
  return y ? moe_copy(y, x) : moe_error_code();
}

moe_status moe_bwd_identity(moe_ctx *c) {
  c->gin[0] = c->gout[0];
  return MOE_OK;
}

moe_status moe_fwd_cast(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, (moe_dtype)c->arg[1].i);
  return y ? moe_copy(y, x) : moe_error_code();
}

moe_status moe_bwd_cast(moe_ctx *c) {
  c->gin[0] = MOE_CALL(cast, T(c->gout[0]), I(c->in[0].dtype));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* dst:copy_(src). Out of place it is src, shaped and typed as dst. */
moe_status moe_fwd_copy_(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, x->dtype);
  if (y == NULL) return moe_error_code();
  return c->arg[1].kind == MOE_K_tensor ? moe_copy(y, c->arg[1].t) : moe_fill(y, c->arg[1].f);
}

moe_status moe_bwd_copy_(moe_ctx *c) {
  if (c->nin > 1 && c->need[1]) {
    c->gin[1] = moe_unbroadcast(c->gout[0], &c->in[1]);
    if (c->gin[1] == NULL) return moe_error_code();
  }
  return MOE_OK;
}
