/* conv1d, composed of windows and a product; causal_conv1d, fused. */
#include "autograd/graph.h"
#include "op/product.h"

/* --- unfold1d: windows of x [b, c, t] as columns [b, c, width, len]; fold1d is its adjoint --- */

enum { WIDTH = 1, STRIDE, PADDING, DILATION, LENGTH };

moe_status moe_fwd_unfold1d(moe_ctx *c) {
  bool back = c->op->variant != 0;
  int64_t width = c->arg[WIDTH].i, stride = c->arg[STRIDE].i, padding = c->arg[PADDING].i, dilation = c->arg[DILATION].i;
  moe_dtype dt = c->arg[0].t->dtype, ct = moe_dtype_compute(dt);
  moe_tensor *x = moe_dense(c->arg[0].t, ct), *y;
  if (x == NULL) return moe_error_code();
  int64_t t = back ? c->arg[LENGTH].i : x->shape[2], len = back ? x->shape[3] : (t + 2 * padding - dilation * (width - 1) - 1) / stride + 1;
  if (back)
    y = moe_out(c, 0, 3, (const int64_t[]){x->shape[0], x->shape[1], t}, ct);
  else
    y = moe_out(c, 0, 4, (const int64_t[]){x->shape[0], x->shape[1], width, len}, ct);
  if (y == NULL) return moe_error_code();
  if (moe_numel(y) == 0) return MOE_OK;
  if (moe_numel(x) == 0) return moe_fill(y, 0);
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, unfold1d, ct, moe_data(y), moe_data(x), x->shape[0] * x->shape[1], t, width, len, stride,
                  padding, dilation, back));
  return ct == dt ? MOE_OK : moe_set_out(c, 0, moe_to_raw(y, dt, moe_dev(x)));
}

moe_status moe_bwd_unfold1d(moe_ctx *c) {
  moe_value args[] = {T(c->gout[0]), c->arg[WIDTH], c->arg[STRIDE], c->arg[PADDING], c->arg[DILATION], I(c->in[0].shape[2])};
  c->gin[0] = c->op->variant ? moe_call1(MOE_OP_unfold1d, args, 5) : moe_call1(MOE_OP_fold1d, args, 6);
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* --- conv1d --- */

moe_status moe_fwd_conv1d(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *w = c->arg[1].t, *bias = c->arg[2].kind == MOE_K_none ? NULL : c->arg[2].t;
  int64_t stride = c->arg[3].i, padding = c->arg[4].i, dilation = c->arg[5].i, groups = c->arg[6].i;
  char bx[MOE_SHAPE_TEXT], bw[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "x", x));
  MOE_TRY(moe_want_float(c, "weight", w));
  if (x->ndim != 3 || w->ndim != 3)
    return OP_FAIL(c, "wants x [batch, channels, time] and weight [out, channels / groups, width]: x is %s, weight is %s",
                   moe_shape_of(bx, x), moe_shape_of(bw, w));
  const int64_t limit = (int64_t)1 << 31; /* keeps every size below free of overflow */
  if (stride < 1 || dilation < 1 || groups < 1 || padding < 0 || stride > limit || dilation > limit || padding > limit)
    return OP_FAIL(c, "stride, dilation and groups count from 1 and padding from 0, got stride %lld, padding %lld, dilation %lld, groups %lld",
                   (long long)stride, (long long)padding, (long long)dilation, (long long)groups);
  int64_t b = x->shape[0], cin = x->shape[1], t = x->shape[2], cout = w->shape[0], width = w->shape[2];
  if (cin % groups != 0 || cout % groups != 0 || w->shape[1] != cin / groups)
    return OP_FAIL(c, "channels do not fit: x is %s, weight is %s, groups is %lld (weight's dim 2 must be x's dim 2 / groups, and "
                   "groups must divide both)", moe_shape_of(bx, x), moe_shape_of(bw, w), (long long)groups);
  if (width < 1 || width > limit / dilation || t + 2 * padding < dilation * (width - 1) + 1)
    return OP_FAIL(c, "the window is longer than the input: x is %s with padding %lld, weight is %s with dilation %lld",
                   moe_shape_of(bx, x), (long long)padding, moe_shape_of(bw, w), (long long)dilation);
  if (bias && (bias->ndim != 1 || bias->shape[0] != cout))
    return OP_FAIL(c, "bias must be [%lld], one number a row of weight %s, got %s", (long long)cout, moe_shape_of(bw, w),
                   moe_shape_of(bx, bias));
  int64_t len = (t + 2 * padding - dilation * (width - 1) - 1) / stride + 1, cg = cin / groups * width;
  moe_tensor *col = MOE_CALL(unfold1d, T(x), I(width), I(stride), I(padding), I(dilation)), *y;
  if (groups == 1) {
    col = MOE_CALL(reshape, T(col), INTS(((const int64_t[]){b, cg, len}), 3));
    y = MOE_CALL(matmul, T(MOE_CALL(reshape, T(w), INTS(((const int64_t[]){cout, cg}), 2))), T(col));
  } else {
    col = MOE_CALL(reshape, T(col), INTS(((const int64_t[]){b, groups, cg, len}), 4));
    y = MOE_CALL(matmul, T(MOE_CALL(reshape, T(w), INTS(((const int64_t[]){groups, cout / groups, cg}), 3))), T(col));
    y = MOE_CALL(reshape, T(y), INTS(((const int64_t[]){b, cout, len}), 3));
  }
  if (bias) y = MOE_CALL(add, T(y), T(MOE_CALL(reshape, T(bias), INTS(((const int64_t[]){cout, 1}), 2))));
  return y ? moe_set_out(c, 0, y) : moe_fail_prefix("conv1d");
}

/* --- causal_conv1d --- */

enum { X, WEIGHT, BIAS, INITIAL, ACTIVATION };
enum { SILU = 1 };

typedef struct causal {
  moe_tensor *x, *weight_t, *bias, *initial;
  int64_t sx[2];
} causal;

/* The arguments as the kernel takes them: weight as [w, c], x with contiguous rows. */
static moe_status prepare(moe_dtype ct, moe_tensor *x, moe_tensor *w, moe_tensor *bias, moe_tensor *initial, causal *a) {
  a->x = moe_to_raw(x, ct, moe_dev(x));
  if (a->x && a->x->stride[2] != 1 && a->x->shape[2] != 1) a->x = moe_contiguous_raw(a->x);
  a->weight_t = moe_view_of(w, 2, (const int64_t[]){w->shape[1], w->shape[0]}, (const int64_t[]){w->stride[1], w->stride[0]}, w->offset);
  if (a->x == NULL || a->weight_t == NULL) return moe_error_code();
  a->weight_t = moe_dense(a->weight_t, ct);
  a->bias = bias ? moe_dense(bias, ct) : NULL;
  a->initial = initial ? moe_dense(initial, ct) : NULL;
  if (a->weight_t == NULL || (bias && !a->bias) || (initial && !a->initial)) return moe_error_code();
  a->sx[0] = a->x->stride[0];
  a->sx[1] = a->x->stride[1];
  return MOE_OK;
}

#define DATA(t) ((t) ? moe_data(t) : NULL)

/* to [b, w-1, c] <- the last w-1 rows of initial, x */
static moe_status final_rows(moe_tensor *to, moe_tensor *x, moe_tensor *initial) {
  int64_t keep = to->shape[1], t = x->shape[1], old = t < keep ? keep - t : 0; /* rows still of the initial state */
  if (old > 0) {
    int64_t shape[3] = {to->shape[0], old, to->shape[2]};
    moe_tensor *dst = moe_view_of(to, 3, shape, to->stride, to->offset);
    if (dst == NULL) return moe_error_code();
    if (initial) {
      moe_tensor *src = moe_view_of(initial, 3, shape, initial->stride, initial->offset + t * initial->stride[1]);
      if (src == NULL) return moe_error_code();
      MOE_TRY(moe_copy(dst, src));
    } else {
      MOE_TRY(moe_fill(dst, 0));
    }
  }
  if (keep > old) {
    int64_t shape[3] = {to->shape[0], keep - old, to->shape[2]};
    moe_tensor *dst = moe_view_of(to, 3, shape, to->stride, to->offset + old * to->stride[1]);
    moe_tensor *src = moe_view_of(x, 3, shape, x->stride, x->offset + (t - (keep - old)) * x->stride[1]);
    if (dst == NULL || src == NULL) return moe_error_code();
    MOE_TRY(moe_copy(dst, src));
  }
  return MOE_OK;
}

moe_status moe_fwd_causal_conv1d(moe_ctx *c) {
  moe_tensor *x = c->arg[X].t, *w = c->arg[WEIGHT].t;
  moe_tensor *bias = c->arg[BIAS].kind == MOE_K_none ? NULL : c->arg[BIAS].t;
  moe_tensor *initial = c->arg[INITIAL].kind == MOE_K_none ? NULL : c->arg[INITIAL].t;
  char bx[MOE_SHAPE_TEXT], bw[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "x", x));
  MOE_TRY(moe_want_float(c, "weight", w));
  if (x->ndim != 3 || w->ndim != 2 || x->shape[2] != w->shape[0] || w->shape[1] < 1)
    return OP_FAIL(c, "wants x [batch, time, channels] and weight [channels, width]: x is %s, weight is %s", moe_shape_of(bx, x),
                   moe_shape_of(bw, w));
  int64_t b = x->shape[0], t = x->shape[1], ch = x->shape[2], width = w->shape[1], state[3] = {b, width - 1, ch};
  if (bias && (bias->ndim != 1 || bias->shape[0] != ch))
    return OP_FAIL(c, "bias must be [%lld], one number a channel of x %s, got %s", (long long)ch, moe_shape_of(bx, x), moe_shape_of(bw, bias));
  if (initial && (initial->ndim != 3 || initial->shape[0] != b || initial->shape[1] != width - 1 || initial->shape[2] != ch))
    return OP_FAIL(c, "initial_state must be %s = [batch, width - 1, channels], got %s", moe_shape_text(bx, 3, state), moe_shape_of(bw, initial));
  moe_dtype dt = moe_dtype_promote(x->dtype, w->dtype), ct = moe_dtype_compute(dt);
  bool silu = c->arg[ACTIVATION].i == SILU;
  causal a;
  moe_save(c, x);
  moe_save(c, w);
  moe_save(c, bias);
  moe_save(c, initial);
  MOE_TRY(prepare(ct, x, w, bias, initial, &a));
  moe_tensor *y = moe_out(c, 0, 3, x->shape, dt), *last = moe_out(c, 1, 3, state, dt);
  moe_tensor *r = y == NULL || ct == dt ? y : moe_empty(3, x->shape, ct, moe_dev(x));
  if (r == NULL || last == NULL) return moe_error_code();
  if (moe_numel(last) > 0) MOE_TRY(final_rows(last, a.x, a.initial));
  if (moe_numel(y) == 0) return MOE_OK;
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, causal_conv1d, ct, moe_data(r), moe_data(a.x), moe_data(a.weight_t), DATA(a.bias),
                  DATA(a.initial), b, t, ch, width, a.sx, silu));
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_bwd_causal_conv1d(moe_ctx *c) {
  if (moe_grad_enabled()) return OP_FAIL(c, "has no second derivative; compose it of conv1d where one is wanted");
  moe_tensor *x = c->saved[X], *w = c->saved[WEIGHT], *bias = c->saved[BIAS], *initial = c->saved[INITIAL];
  moe_dtype ct = moe_dtype_compute(moe_dtype_promote(x->dtype, w->dtype));
  moe_device *dev = moe_dev(x);
  int64_t b = x->shape[0], t = x->shape[1], ch = x->shape[2], width = w->shape[1];
  causal a;
  MOE_TRY(prepare(ct, x, w, bias, initial, &a));
  moe_tensor *g = c->gout[0] ? moe_dense(c->gout[0], ct) : moe_zeros(3, x->shape, ct, dev);
  moe_tensor *gfinal = c->gout[1] ? moe_dense(c->gout[1], ct) : NULL;
  moe_tensor *dx = moe_empty(3, x->shape, ct, dev), *dinitial = initial ? moe_empty(3, initial->shape, ct, dev) : NULL;
  /* by sequence: the gradients of the taps [w, c], then of the bias [c] */
  moe_tensor *parts = moe_empty(2, (const int64_t[]){b, (width + 1) * ch}, ct, dev);
  moe_tensor *sum = moe_zeros(1, (const int64_t[]){(width + 1) * ch}, ct, dev);
  if (g == NULL || (c->gout[1] && !gfinal) || dx == NULL || (initial && !dinitial) || parts == NULL || sum == NULL)
    return moe_error_code();
  if (b > 0 && ch > 0) {
    MOE_TRY(MOE_RUN(dev, c->op->name, causal_conv1d_backward, ct, moe_data(dx), moe_data(parts), DATA(dinitial), moe_data(g),
                    DATA(gfinal), moe_data(a.x), moe_data(a.weight_t), DATA(a.bias), DATA(a.initial), b, t, ch, width, a.sx,
                    c->arg[ACTIVATION].i == SILU));
    MOE_TRY(MOE_RUN(dev, c->op->name, colsum, ct, moe_data(sum), moe_data(parts), b, (width + 1) * ch));
  }
  moe_tensor *grads[] = {dx, moe_view_of(sum, 2, w->shape, (const int64_t[]){1, ch}, sum->offset),
                         moe_view_of(sum, 1, &ch, (const int64_t[]){1}, sum->offset + width * ch), dinitial};
  int at = 0; /* absent arguments take no place among the inputs */
  for (int i = X; i <= INITIAL; i++) {
    if (c->saved[i] == NULL) continue;
    if (c->need[at]) {
      c->gin[at] = grads[i] ? moe_unbroadcast(moe_contiguous_raw(grads[i]), &c->in[at]) : NULL;
      if (c->gin[at] == NULL) return moe_error_code();
    }
    at++;
  }
  return MOE_OK;
}
