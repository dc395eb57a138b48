/* Reductions over dimensions: sum mean prod amax amin max min argmax argmin any all count_nonzero norm var std
** logsumexp. All see x as [outer, n, inner] (op/fold.h). Integers sum in i64; mean, var, norm of integers are f32.
*/
#include <math.h>

#include "op/fold.h"
#include "tensor/reduction.h"

static bool fold_args(moe_ctx *c, int dims_arg, bool keepdim, int ndim, const int64_t *shape, fold *f) {
  bool flag[MOE_MAX_DIM];
  if (!moe_arg_dims(c, dims_arg, ndim, flag)) return false;
  moe_fold_make(f, ndim, shape, flag, keepdim);
  return true;
}

static moe_status check_some(moe_ctx *c, const fold *f) {
  char s[MOE_SHAPE_TEXT];
  if (f->n > 0 || f->outer == 0 || f->inner == 0) return MOE_OK;
  return OP_FAIL(c, "nothing to choose from: x is %s and the reduced dimensions have no element",
                 moe_shape_text(s, f->ndim, f->shape));
}

/* Result 0 of kind `kind` over the dims of argument 1; `compute` in, `made` what the kernel writes, `dtype` the result. */
static moe_status reduce_fold(moe_ctx *c, const fold *f, int kind, double p, moe_dtype compute, moe_dtype made,
                              moe_dtype dtype) {
  moe_tensor *x = moe_fold_in(f, c->arg[0].t, compute);
  if (x == NULL) return moe_error_code();
  moe_tensor *y = moe_result_begin(c, 0, f->out_ndim, f->out, made, dtype, moe_dev(x));
  if (y == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, reduce, moe_data(y), moe_data(x), f->outer, f->n, f->inner, compute, kind, p));
  return moe_result_end(c, 0, y, dtype);
}

/* --- sum, mean, prod --- */

moe_status moe_fwd_sum(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
  moe_dtype made = moe_dtype_compute(x->dtype);
  return reduce_fold(c, &f, MOE_RED_SUM, 0, made, made, moe_dtype_is_float(x->dtype) ? x->dtype : MOE_i64);
}

moe_status moe_fwd_mean(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
  moe_dtype t = moe_float_of(x->dtype), made = moe_dtype_compute(t);
  return reduce_fold(c, &f, MOE_RED_MEAN, (double)f.n, made, made, t);
}

moe_status moe_fwd_prod(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
  moe_dtype made = moe_dtype_compute(x->dtype);
  moe_save(c, x);
  return reduce_fold(c, &f, MOE_RED_PROD, 0, made, made, moe_dtype_is_float(x->dtype) ? x->dtype : MOE_i64);
}

/* A tensor of the reduced shape with its dims of size 1 back, so that it broadcasts against x. */
static moe_tensor *unreduce(const fold *f, moe_tensor *g) {
  return MOE_CALL(reshape, T(g), INTS(f->kept, f->ndim));
}

moe_status moe_bwd_sum(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  moe_tensor *g = unreduce(&f, c->gout[0]);
  return gin_set(c, 0, MOE_CALL(expand, T(g), INTS(f.shape, f.ndim)));
}

moe_status moe_bwd_mean(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  moe_tensor *g = MOE_CALL(mul, T(unreduce(&f, c->gout[0])), F(1.0 / (double)f.n));
  return gin_set(c, 0, MOE_CALL(expand, T(g), INTS(f.shape, f.ndim)));
}

moe_status moe_bwd_prod(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  MOE_TRY(moe_first_derivative_only(c));
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *x = moe_fold_in(&f, c->saved[0], t), *g = moe_dense(c->gout[0], t);
  moe_tensor *gx = moe_fold_empty(&f, t, c->in[0].device);
  if (x == NULL || g == NULL || gx == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, prod_bwd, moe_data(gx), moe_data(g), moe_data(x), f.outer, f.n, f.inner, t));
  return gin_set(c, 0, moe_fold_back(&f, gx));
}

/* --- largest and smallest --- */

static moe_status extreme_over(moe_ctx *c, const fold *f, int kind) {
  moe_tensor *x = c->arg[0].t;
  moe_dtype made = moe_dtype_compute(x->dtype);
  MOE_TRY(check_some(c, f));
  MOE_TRY(reduce_fold(c, f, kind, 0, made, made, x->dtype));
  moe_save(c, x);
  moe_save(c, c->out[0]);
  return MOE_OK;
}

static moe_status amax_or_amin(moe_ctx *c, int kind) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
  return extreme_over(c, &f, kind);
}

moe_status moe_fwd_amax(moe_ctx *c) { return amax_or_amin(c, MOE_RED_MAX); }
moe_status moe_fwd_amin(moe_ctx *c) { return amax_or_amin(c, MOE_RED_MIN); }

/* gx = g spread evenly over what equals y. saved: x, y */
static moe_status extreme_bwd(moe_ctx *c, const fold *f, bool magnitude) {
  if (moe_grad_enabled()) { /* composed, so that it is recorded: the choice itself is constant */
    moe_tensor *x = c->saved[0], *m = magnitude ? MOE_CALL(abs, T(x)) : x;
    moe_tensor *hit = MOE_CALL(eq, T(moe_detach(m)), T(unreduce(f, moe_detach(c->saved[1]))));
    hit = MOE_CALL(cast, T(hit), I(c->in[0].dtype));
    moe_tensor *count = unreduce(f, MOE_CALL(sum, T(MOE_CALL(reshape, T(hit), INTS(f->shape, f->ndim))), c->arg[magnitude ? 2 : 1]));
    moe_tensor *g = MOE_CALL(div, T(unreduce(f, c->gout[0])), T(count));
    if (magnitude) hit = MOE_CALL(mul, T(hit), T(MOE_CALL(sign, T(moe_detach(x)))));
    return gin_set(c, 0, MOE_CALL(mul, T(hit), T(g)));
  }
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *x = moe_fold_in(f, c->saved[0], t), *y = moe_dense(c->saved[1], t), *g = moe_dense(c->gout[0], t);
  moe_tensor *gx = moe_fold_empty(f, t, c->in[0].device);
  if (x == NULL || y == NULL || g == NULL || gx == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, extreme_bwd, moe_data(gx), moe_data(g), moe_data(y), moe_data(x), f->outer, f->n,
                  f->inner, t, magnitude));
  return gin_set(c, 0, moe_fold_back(f, gx));
}

moe_status moe_bwd_amax(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  return extreme_bwd(c, &f, false);
}

/* Results value (unless `only_index`) and index along one dimension. */
static moe_status choose(moe_ctx *c, bool largest, bool only_index, const fold *f) {
  moe_tensor *a = c->arg[0].t;
  moe_dtype t = moe_dtype_compute(a->dtype);
  MOE_TRY(check_some(c, f));
  moe_tensor *x = moe_fold_in(f, a, t), *value = NULL;
  if (x == NULL) return moe_error_code();
  if (!only_index && (value = moe_result_begin(c, 0, f->out_ndim, f->out, t, a->dtype, moe_dev(x))) == NULL)
    return moe_error_code();
  moe_tensor *index = moe_out(c, only_index ? 0 : 1, f->out_ndim, f->out, MOE_i64);
  if (index == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, reduce_arg, value ? moe_data(value) : NULL, moe_data_i64(index), moe_data(x), f->outer,
                  f->n, f->inner, t, largest, c->base));
  return only_index ? MOE_OK : moe_result_end(c, 0, value, a->dtype);
}

static moe_status max_or_min(moe_ctx *c, bool largest) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (c->arg[1].kind == MOE_K_none) {
    if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
    return extreme_over(c, &f, largest ? MOE_RED_MAX : MOE_RED_MIN);
  }
  if (!moe_fold_dim(c, 1, &f, x->ndim, x->shape, c->arg[2].i)) return moe_error_code();
  MOE_TRY(choose(c, largest, false, &f));
  moe_save(c, c->out[1]);
  return MOE_OK;
}

moe_status moe_fwd_max(moe_ctx *c) { return max_or_min(c, true); }
moe_status moe_fwd_min(moe_ctx *c) { return max_or_min(c, false); }

moe_status moe_bwd_max(moe_ctx *c) {
  const moe_meta *in = &c->in[0];
  if (c->gout[0] == NULL) return MOE_OK;
  if (c->arg[1].kind == MOE_K_none) return moe_bwd_amax(c);
  int dim = moe_arg_dim(c, 1, in->ndim);
  bool keepdim = c->arg[2].i;
  if (in->ndim == 0) return gin_set(c, 0, c->gout[0]);
  moe_tensor *index = c->saved[0], *g = c->gout[0];
  if (!keepdim) {
    index = MOE_CALL(unsqueeze, T(index), I(dim));
    g = MOE_CALL(unsqueeze, T(g), I(dim));
  }
  return moe_put_along(c, g, index, dim);
}

static moe_status argmax_or_argmin(moe_ctx *c, bool largest) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (c->arg[1].kind == MOE_K_none) {
    if (!fold_args(c, 1, c->arg[2].i, x->ndim, x->shape, &f)) return moe_error_code();
  } else if (!moe_fold_dim(c, 1, &f, x->ndim, x->shape, c->arg[2].i)) {
    return moe_error_code();
  }
  return choose(c, largest, true, &f);
}

moe_status moe_fwd_argmax(moe_ctx *c) { return argmax_or_argmin(c, true); }
moe_status moe_fwd_argmin(moe_ctx *c) { return argmax_or_argmin(c, false); }

/* --- any, all, count_nonzero --- */

static moe_status count_kind(moe_ctx *c, int kind, bool keepdim, moe_dtype made, moe_dtype dtype) {
  moe_tensor *x = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, keepdim, x->ndim, x->shape, &f)) return moe_error_code();
  moe_dtype t = x->dtype == MOE_bool || x->dtype == MOE_u8 ? x->dtype : moe_dtype_compute(x->dtype);
  return reduce_fold(c, &f, kind, 0, t, made, dtype);
}

moe_status moe_fwd_any(moe_ctx *c) { return count_kind(c, MOE_RED_ANY, c->arg[2].i, MOE_bool, MOE_bool); }
moe_status moe_fwd_all(moe_ctx *c) { return count_kind(c, MOE_RED_ALL, c->arg[2].i, MOE_bool, MOE_bool); }
moe_status moe_fwd_count_nonzero(moe_ctx *c) { return count_kind(c, MOE_RED_COUNT, c->arg[2].i, MOE_i64, MOE_i64); }

/* --- norm: (sum |x|^p)^(1/p) --- */

moe_status moe_fwd_norm(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  double p = c->arg[1].f;
  fold f;
  if (isnan(p)) return OP_FAIL(c, "p is NaN");
  if (!fold_args(c, 2, c->arg[3].i, x->ndim, x->shape, &f)) return moe_error_code();
  moe_dtype t = moe_float_of(x->dtype), made = moe_dtype_compute(t);
  int kind = p == 2 ? MOE_RED_NORM2 : p == 1 ? MOE_RED_NORM1 : p == 0 ? MOE_RED_COUNT : isinf(p) ? (p > 0 ? MOE_RED_MAXABS : MOE_RED_MINABS)
             : MOE_RED_NORMP;
  if (kind == MOE_RED_MINABS) MOE_TRY(check_some(c, &f));
  MOE_TRY(reduce_fold(c, &f, kind, p, made, p == 0 ? MOE_i64 : made, t));
  moe_save(c, x);
  moe_save(c, c->out[0]);
  return MOE_OK;
}

/* sign(x) |x|^(p-1) y^(1-p) g. A y of 0 means that all x are 0: the divisor may be anything else. */
moe_status moe_bwd_norm(moe_ctx *c) {
  double p = c->arg[1].f;
  fold f;
  if (c->gout[0] == NULL || p == 0) return MOE_OK;
  if (!fold_args(c, 2, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  if (isinf(p)) return extreme_bwd(c, &f, true);
  moe_tensor *x = c->saved[0], *g = unreduce(&f, c->gout[0]);
  if (p == 1) return gin_set(c, 0, MOE_CALL(mul, T(MOE_CALL(sign, T(x))), T(g)));
  moe_tensor *y = MOE_CALL(clamp, T(unreduce(&f, c->saved[1])), F(1e-37));
  if (p == 2) return gin_set(c, 0, MOE_CALL(mul, T(x), T(MOE_CALL(div, T(g), T(y)))));
  moe_tensor *r = MOE_CALL(pow, T(MOE_CALL(div, T(MOE_CALL(abs, T(x))), T(y))), F(p - 1));
  return gin_set(c, 0, MOE_CALL(mul, T(MOE_CALL(mul, T(MOE_CALL(sign, T(x))), T(r))), T(g)));
}

/* --- variance, standard deviation --- */

static moe_status spread(moe_ctx *c, bool root) {
  moe_tensor *a = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, a->ndim, a->shape, &f)) return moe_error_code();
  moe_dtype t = moe_float_of(a->dtype), made = moe_dtype_compute(t);
  moe_tensor *x = moe_fold_in(&f, a, made);
  if (x == NULL) return moe_error_code();
  moe_tensor *y = moe_result_begin(c, 0, f.out_ndim, f.out, made, t, moe_dev(x));
  if (y == NULL) return moe_error_code();
  double divisor = MOE_MAX((double)f.n - (double)c->arg[3].i, 0.0);
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, variance, moe_data(y), moe_data(x), f.outer, f.n, f.inner, made, divisor, root));
  MOE_TRY(moe_result_end(c, 0, y, t));
  moe_save(c, a);
  moe_save(c, root ? c->out[0] : NULL);
  return MOE_OK;
}

moe_status moe_fwd_var(moe_ctx *c) { return spread(c, false); }
moe_status moe_fwd_std(moe_ctx *c) { return spread(c, true); }

/* var: 2 (x - mean) / divisor g;  std: (x - mean) / (divisor y) g, 0 where y is 0 */
moe_status moe_bwd_spread(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  moe_tensor *x = c->saved[0], *y = c->saved[1], *g = unreduce(&f, c->gout[0]);
  double divisor = MOE_MAX((double)f.n - (double)c->arg[3].i, 0.0);
  if (y) g = MOE_CALL(div, T(g), T(MOE_CALL(clamp, T(unreduce(&f, y)), F(1e-37))));
  g = MOE_CALL(mul, T(g), F((y ? 1.0 : 2.0) / divisor));
  moe_tensor *mean = MOE_CALL(mean, T(x), c->arg[1], I(true));
  return gin_set(c, 0, MOE_CALL(mul, T(MOE_CALL(sub, T(x), T(mean))), T(g)));
}

/* --- logsumexp --- */

moe_status moe_fwd_logsumexp(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t;
  fold f;
  if (!fold_args(c, 1, c->arg[2].i, a->ndim, a->shape, &f)) return moe_error_code();
  moe_dtype t = moe_float_of(a->dtype), made = moe_dtype_compute(t);
  moe_tensor *x = moe_fold_in(&f, a, made);
  if (x == NULL) return moe_error_code();
  moe_tensor *y = moe_result_begin(c, 0, f.out_ndim, f.out, made, t, moe_dev(x));
  if (y == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, logsumexp, moe_data(y), moe_data(x), f.outer, f.n, f.inner, made));
  MOE_TRY(moe_result_end(c, 0, y, t));
  moe_save(c, a);
  moe_save(c, c->out[0]);
  return MOE_OK;
}

moe_status moe_bwd_logsumexp(moe_ctx *c) {
  fold f;
  if (c->gout[0] == NULL) return MOE_OK;
  if (!fold_args(c, 1, false, c->in[0].ndim, c->in[0].shape, &f)) return moe_error_code();
  moe_tensor *p = MOE_CALL(exp, T(MOE_CALL(sub, T(c->saved[0]), T(unreduce(&f, c->saved[1])))));
  return gin_set(c, 0, MOE_CALL(mul, T(p), T(unreduce(&f, c->gout[0]))));
}
