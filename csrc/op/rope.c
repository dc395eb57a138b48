/* rope: rotary position embedding; its gradient is the turn back. */
#include <math.h>

#include "autograd/graph.h"
#include "op/product.h"

enum { X, POSITIONS, OFFSET, BASE, INTERLEAVED, DIM }; /* arguments */

moe_status moe_fwd_rope(moe_ctx *c) {
  moe_tensor *x = c->arg[X].t, *pos = c->arg[POSITIONS].kind == MOE_K_none ? NULL : c->arg[POSITIONS].t;
  char bx[MOE_SHAPE_TEXT], bp[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "x", x));
  if (x->ndim < 2) return OP_FAIL(c, "x must be [.., positions, size], got %s", moe_shape_of(bx, x));
  int64_t d = x->shape[x->ndim - 1], t = x->shape[x->ndim - 2], dim = c->arg[DIM].kind == MOE_K_none ? d : c->arg[DIM].i;
  double base = c->arg[BASE].f;
  if (dim < 0 || dim > d || dim % 2 != 0)
    return OP_FAIL(c, "dim, the part of a row that turns, must be even and at most the size %lld, got %lld", (long long)d,
                   (long long)dim);
  if (!(base > 0) || isinf(base)) return OP_FAIL(c, "base must be positive, got %g", base);
  moe_dtype dt = x->dtype, ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(x);

  /* positions [.., t], dimensions of 1 or absent ones repeated: strides in its elements for every dimension but the last of x */
  int64_t sp[MOE_MAX_DIM] = {0}, npositions = t;
  int lead = x->ndim - 1;
  sp[lead - 1] = 1;
  if (pos) {
    bool fits = pos->ndim >= 1 && pos->ndim <= lead && pos->dtype != MOE_bool;
    for (int i = 0; fits && i < pos->ndim; i++) {
      int64_t n = pos->shape[i];
      fits = n == 1 || n == x->shape[i + lead - pos->ndim];
    }
    if (!fits)
      return OP_FAIL(c, "positions must hold numbers and broadcast to x's shape %s without its last dim, got %s %s",
                     moe_shape_of(bx, x), moe_dtype_name(pos->dtype), moe_shape_of(bp, pos));
    moe_save(c, pos);
    pos = moe_dense(pos, MOE_f64);
    if (pos == NULL) return moe_error_code();
    for (int i = 0; i < lead; i++) {
      int k = i - (lead - pos->ndim);
      sp[i] = k < 0 || pos->shape[k] == 1 ? 0 : pos->stride[k];
    }
    npositions = moe_numel(pos);
  } else {
    moe_save(c, NULL);
  }

  /* Seen as [b, h, t, d]: fewer dimensions are led by ones, more are folded into b. */
  x = moe_to_raw(x, ct, dev);
  if (x && ((x->stride[lead] != 1 && d != 1) || x->ndim > 4)) x = moe_contiguous_raw(x);
  if (x == NULL) return moe_error_code();
  if (pos && lead > 3) {
    pos = moe_contiguous_raw(moe_view_of(pos, lead, x->shape, sp, pos->offset));
    if (pos == NULL) return moe_error_code();
    moe_contiguous_strides(lead, x->shape, sp);
    npositions = moe_numel(pos);
  }
  moe_tensor *y = x->ndim == 4 ? moe_heads_like(x, x->shape, ct) : moe_empty(x->ndim, x->shape, ct, dev);
  if (y == NULL) return moe_error_code();
  int64_t size[4] = {1, 1, t, d}, sx[3] = {0}, sy[3] = {0}, sq[3] = {0};
  for (int i = 0; i < MOE_MIN(lead, 3); i++) {
    int from = lead - 1 - i, to = 2 - i;
    size[to] = x->shape[from];
    sx[to] = x->stride[from];
    sy[to] = y->stride[from];
    sq[to] = sp[from];
  }
  for (int i = 0; i < lead - 3; i++) size[0] *= x->shape[i];
  if (moe_numel(x) > 0)
    MOE_TRY(MOE_RUN(dev, c->op->name, rope, ct, moe_data(y), moe_data(x), pos ? moe_data_f64(pos) : NULL, size, sy, sx, sq,
                    npositions, c->arg[OFFSET].i, base, dim, c->arg[INTERLEAVED].i != 0, c->op->variant != 0));
  return moe_set_out(c, 0, ct == dt ? y : moe_to_raw(y, dt, dev));
}

moe_status moe_bwd_rope(moe_ctx *c) {
  moe_value pos = c->saved[0] ? T(c->saved[0]) : NIL;
  moe_value args[] = {T(c->gout[0]), pos, c->arg[OFFSET], c->arg[BASE], c->arg[INTERLEAVED], c->arg[DIM]};
  c->gin[0] = moe_call1(c->op->variant ? MOE_OP_rope : MOE_OP_rope_back, args, 6);
  return c->gin[0] ? MOE_OK : moe_error_code();
}
