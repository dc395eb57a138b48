/* Losses. Each is one kernel forward, which writes at most a number a row, and one kernel backward, which writes
** the gradient and nothing else. Shapes must agree exactly: a broadcast loss is nearly always a mistake.
*/
#include <math.h>

#include "op/fold.h"
#include "tensor/reduction.h"

enum { REDUCE_MEAN, REDUCE_SUM, REDUCE_NONE, REDUCE_BATCHMEAN }; /* the choices of `reduction`, in order */

static inline moe_tensor *optional(moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor ? c->arg[i].t : NULL; }
static inline bool needed(moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor && c->need[c->slot[i]]; }

/* --- cross_entropy, nll: the classes lie in the last dimension of x ---
** Arguments: x, target, weight, ignore_index, then for cross_entropy label_smoothing, then reduction.
** saved: x, lse (none for nll), target (i64 or probabilities), weight, total weight (mean of class targets only) */

typedef struct ce {
  int reduction;
  double smoothing;
  int64_t ignore, rows, n;
  moe_dtype t;
} ce;

static ce ce_options(const moe_ctx *c, const int64_t *shape, int ndim, moe_dtype dtype) {
  bool smoothed = c->nargs == 6;
  ce o = {.reduction = (int)c->arg[smoothed ? 5 : 4].i, .smoothing = smoothed ? c->arg[4].f : 0, .ignore = c->arg[3].i,
          .rows = 1, .n = shape[ndim - 1], .t = moe_dtype_compute(dtype)};
  for (int d = 0; d < ndim - 1; d++) o.rows *= shape[d];
  return o;
}

/* *soft: target holds probabilities */
static moe_status ce_check(moe_ctx *c, bool log_prob, bool *soft) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  moe_tensor *x = c->arg[0].t, *target = c->arg[1].t, *w = optional(c, 2);
  moe_shape_of(a, x);
  moe_shape_of(b, target);
  if (!moe_dtype_is_float(x->dtype)) return OP_FAIL(c, "x must be floating, got %s", moe_dtype_name(x->dtype));
  if (x->ndim < 1) return OP_FAIL(c, "x must be [.., classes], got a tensor without dimensions");
  bool rows = target->ndim == x->ndim - 1;
  for (int d = 0; rows && d < target->ndim; d++) rows = target->shape[d] == x->shape[d];
  *soft = false;
  if (moe_dtype_is_float(target->dtype)) {
    *soft = !log_prob && moe_same_shape(x, target);
    if (rows && !*soft)
      return OP_FAIL(c, "target holds class numbers %s but is %s: convert it, target:to(\"i64\")", b, moe_dtype_name(target->dtype));
    if (!*soft) return OP_FAIL(c, "x is %s, so target must be %s%s, got %s", a, "an integer tensor of its shape without the last dimension (the classes)",
                     log_prob ? "" : " or class probabilities of its shape", b);
  } else if (!rows) {
    return OP_FAIL(c, "x is %s, so target must have its shape without the last dimension (the classes), got %s", a, b);
  } else if (target->dtype == MOE_bool) {
    return OP_FAIL(c, "target must hold class numbers, got bool");
  }
  if (w && (w->ndim != 1 || w->shape[0] != x->shape[x->ndim - 1]))
    return OP_FAIL(c, "weight must be [%lld], a number a class, got %s", (long long)x->shape[x->ndim - 1], moe_shape_of(b, w));
  if (w && w->requires_grad && c->record) return OP_FAIL(c, "weight has no gradient: use weight:detach()");
  return MOE_OK;
}

/* The losses [rows] reduced into result 0: sum / total, or sum * scale. */
static moe_status ce_reduce(moe_ctx *c, const ce *o, moe_tensor *loss, moe_tensor *total, double scale) {
  moe_tensor *x = c->arg[0].t;
  if (o->reduction != REDUCE_NONE) {
    loss = MOE_CALL(sum, T(loss));
    if (o->reduction == REDUCE_MEAN) loss = total ? MOE_CALL(div, T(loss), T(total)) : MOE_CALL(mul, T(loss), F(scale));
  } else {
    loss = MOE_CALL(reshape, T(loss), INTS(x->shape, x->ndim - 1));
  }
  return moe_set_out(c, 0, loss ? moe_to_raw(loss, x->dtype, moe_dev(x)) : NULL);
}

static moe_status ce_forward(moe_ctx *c, bool log_prob) {
  moe_tensor *a = c->arg[0].t, *w0 = optional(c, 2);
  bool soft = false;
  MOE_TRY(ce_check(c, log_prob, &soft));
  ce o = ce_options(c, a->shape, a->ndim, a->dtype);
  if (!(o.smoothing >= 0 && o.smoothing <= 1)) return OP_FAIL(c, "label_smoothing must lie in 0 .. 1, got %g", o.smoothing);
  moe_device *dev = moe_dev(a);
  moe_tensor *x = moe_dense(a, o.t), *target = moe_dense(c->arg[1].t, soft ? o.t : MOE_i64), *w = w0 ? moe_dense(w0, o.t) : NULL;
  moe_tensor *loss = moe_empty(1, &o.rows, o.t, dev), *lse = log_prob ? NULL : moe_empty(1, &o.rows, o.t, dev);
  if (x == NULL || target == NULL || (w0 && !w) || loss == NULL || (!log_prob && !lse)) return moe_error_code();
  moe_tensor *total = NULL;
  if (soft) {
    MOE_TRY(MOE_RUN(dev, c->op->name, soft_cross_entropy, moe_data(loss), moe_data(lse), moe_data(x), moe_data(target),
                    w ? moe_data(w) : NULL, o.rows, o.n, o.smoothing, o.t));
  } else {
    moe_tensor *weight = o.reduction == REDUCE_MEAN ? moe_empty(1, &o.rows, o.t, dev) : NULL;
    if (o.reduction == REDUCE_MEAN && weight == NULL) return moe_error_code();
    moe_status st = MOE_RUN(dev, c->op->name, cross_entropy, moe_data(loss), lse ? moe_data(lse) : NULL, weight ? moe_data(weight) : NULL,
                            moe_data(x), moe_data_i64(target), w ? moe_data(w) : NULL, o.rows, o.n, o.ignore, o.smoothing, o.t, c->base);
    if (st != MOE_OK) return moe_fail_prefix(c->op->name);
    if (weight && (total = MOE_CALL(sum, T(weight))) == NULL) return moe_error_code();
  }
  MOE_TRY(ce_reduce(c, &o, loss, total, 1.0 / (double)o.rows));
  moe_save(c, a);
  moe_save(c, lse);
  moe_save(c, soft ? c->arg[1].t : target);
  moe_save(c, w);
  moe_save(c, total);
  c->user[0] = soft;
  return MOE_OK;
}

static moe_status ce_backward(moe_ctx *c) {
  if (c->gout[0] == NULL) return MOE_OK;
  MOE_TRY(moe_first_derivative_only(c));
  const moe_meta *in = &c->in[0];
  ce o = ce_options(c, in->shape, in->ndim, in->dtype);
  bool soft = c->user[0] != 0, one = o.reduction != REDUCE_NONE;
  moe_tensor *x = moe_dense(c->saved[0], o.t), *lse = c->saved[1], *w = c->saved[3], *total = c->saved[4];
  moe_tensor *target = soft ? moe_dense(c->saved[2], o.t) : c->saved[2], *g = moe_dense(c->gout[0], o.t), *gx = NULL, *gt = NULL;
  if (x == NULL || target == NULL || g == NULL) return moe_error_code();
  if (needed(c, 0) && (gx = moe_empty(in->ndim, in->shape, o.t, in->device)) == NULL) return moe_error_code();
  if (soft) {
    if (needed(c, 1) && (gt = moe_empty(in->ndim, in->shape, o.t, in->device)) == NULL) return moe_error_code();
    double scale = o.reduction == REDUCE_MEAN ? 1.0 / (double)o.rows : 1.0;
    MOE_TRY(MOE_RUN(in->device, c->op->name, soft_cross_entropy_bwd, gx ? moe_data(gx) : NULL, gt ? moe_data(gt) : NULL, moe_data(g), one,
                    scale, moe_data(x), moe_data(lse), moe_data(target), w ? moe_data(w) : NULL, o.rows, o.n, o.smoothing, o.t));
    if (gt) MOE_TRY(gin_set(c, c->slot[1], gt));
  } else if (gx) {
    MOE_TRY(MOE_RUN(in->device, c->op->name, cross_entropy_bwd, moe_data(gx), moe_data(g), one, total ? moe_data(total) : NULL,
                    moe_data(x), lse ? moe_data(lse) : NULL, moe_data_i64(target), w ? moe_data(w) : NULL, o.rows, o.n, o.ignore,
                    o.smoothing, o.t, c->base));
  }
  return gx ? gin_set(c, 0, gx) : MOE_OK;
}

moe_status moe_fwd_cross_entropy(moe_ctx *c) { return ce_forward(c, false); }
moe_status moe_bwd_cross_entropy(moe_ctx *c) { return ce_backward(c); }
moe_status moe_fwd_nll(moe_ctx *c) { return ce_forward(c, true); }
moe_status moe_bwd_nll(moe_ctx *c) { return ce_backward(c); }

/* --- elementwise losses of input and target --- */

static moe_dtype pair_type(moe_dtype a, moe_dtype b) { return moe_float_of(moe_dtype_promote(a, b)); }

static double pair_scale(int reduction, int64_t numel, int ndim, const int64_t *shape) {
  if (reduction == REDUCE_MEAN) return 1.0 / (double)numel;
  if (reduction == REDUCE_BATCHMEAN) return 1.0 / (double)(ndim ? shape[0] : 1);
  return 1.0;
}

static moe_status pair_forward(moe_ctx *c, int kind, double p, int reduction) {
  char s[MOE_SHAPE_TEXT], r[MOE_SHAPE_TEXT];
  moe_tensor *a0 = c->arg[0].t, *b0 = c->arg[1].t;
  if (!moe_same_shape(a0, b0))
    return OP_FAIL(c, "input and target must have one shape: input is %s, target is %s", moe_shape_of(s, a0), moe_shape_of(r, b0));
  moe_dtype dtype = pair_type(a0->dtype, b0->dtype), t = moe_dtype_compute(dtype);
  moe_tensor *a = moe_dense(a0, t), *b = moe_dense(b0, t);
  if (a == NULL || b == NULL) return moe_error_code();
  bool one = reduction != REDUCE_NONE;
  moe_tensor *y = moe_result_begin(c, 0, one ? 0 : a0->ndim, a0->shape, t, dtype, moe_dev(a));
  if (y == NULL) return moe_error_code();
  int64_t n = moe_numel(a);
  MOE_TRY(MOE_RUN(moe_dev(a), c->op->name, pair_loss, moe_data(y), moe_data(a), moe_data(b), n, t, kind, p, one,
                  pair_scale(reduction, n, a0->ndim, a0->shape)));
  moe_save(c, a0);
  moe_save(c, b0);
  return moe_result_end(c, 0, y, dtype);
}

static moe_status pair_backward(moe_ctx *c, int kind, double p, int reduction) {
  if (c->gout[0] == NULL) return MOE_OK;
  const moe_meta *in = &c->in[0];
  int64_t n = moe_numel(c->saved[0]);
  double scale = pair_scale(reduction, n, in->ndim, in->shape);
  if (moe_grad_enabled() && kind == MOE_LOSS_SQUARE) {
    moe_tensor *d = MOE_CALL(mul, T(MOE_CALL(sub, T(c->saved[0]), T(c->saved[1]))), F(2 * scale));
    d = MOE_CALL(mul, T(d), T(c->gout[0]));
    if (needed(c, 0)) MOE_TRY(gin_set(c, 0, d));
    if (needed(c, 1)) MOE_TRY(gin_set(c, c->slot[1], MOE_CALL(neg, T(d))));
    return MOE_OK;
  }
  MOE_TRY(moe_first_derivative_only(c));
  moe_dtype t = moe_dtype_compute(pair_type(c->in[0].dtype, c->in[1].dtype));
  moe_tensor *a = moe_dense(c->saved[0], t), *b = moe_dense(c->saved[1], t), *g = moe_dense(c->gout[0], t), *ga = NULL, *gb = NULL;
  if (a == NULL || b == NULL || g == NULL) return moe_error_code();
  if (needed(c, 0) && (ga = moe_empty(in->ndim, in->shape, t, in->device)) == NULL) return moe_error_code();
  if (needed(c, 1) && (gb = moe_empty(in->ndim, in->shape, t, in->device)) == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(in->device, c->op->name, pair_loss_bwd, ga ? moe_data(ga) : NULL, gb ? moe_data(gb) : NULL, moe_data(g),
                  reduction != REDUCE_NONE, scale, moe_data(a), moe_data(b), n, t, kind, p));
  if (ga) MOE_TRY(gin_set(c, 0, ga));
  if (gb) MOE_TRY(gin_set(c, c->slot[1], gb));
  return MOE_OK;
}

moe_status moe_fwd_mse(moe_ctx *c) { return pair_forward(c, MOE_LOSS_SQUARE, 0, (int)c->arg[2].i); }
moe_status moe_bwd_mse(moe_ctx *c) { return pair_backward(c, MOE_LOSS_SQUARE, 0, (int)c->arg[2].i); }
moe_status moe_fwd_l1(moe_ctx *c) { return pair_forward(c, MOE_LOSS_ABS, 0, (int)c->arg[2].i); }
moe_status moe_bwd_l1(moe_ctx *c) { return pair_backward(c, MOE_LOSS_ABS, 0, (int)c->arg[2].i); }
moe_status moe_fwd_bce_with_logits(moe_ctx *c) { return pair_forward(c, MOE_LOSS_BCE, 0, (int)c->arg[2].i); }
moe_status moe_bwd_bce_with_logits(moe_ctx *c) { return pair_backward(c, MOE_LOSS_BCE, 0, (int)c->arg[2].i); }

moe_status moe_fwd_huber(moe_ctx *c) {
  if (!(c->arg[2].f > 0)) return OP_FAIL(c, "delta must be positive, got %g", c->arg[2].f);
  return pair_forward(c, MOE_LOSS_HUBER, c->arg[2].f, (int)c->arg[3].i);
}
moe_status moe_bwd_huber(moe_ctx *c) { return pair_backward(c, MOE_LOSS_HUBER, c->arg[2].f, (int)c->arg[3].i); }

moe_status moe_fwd_kl_div(moe_ctx *c) {
  return pair_forward(c, c->arg[2].i ? MOE_LOSS_KL_LOG : MOE_LOSS_KL, 0, (int)c->arg[3].i);
}
moe_status moe_bwd_kl_div(moe_ctx *c) {
  return pair_backward(c, c->arg[2].i ? MOE_LOSS_KL_LOG : MOE_LOSS_KL, 0, (int)c->arg[3].i);
}
