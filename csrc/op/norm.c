/* layer_norm and rms_norm over the trailing dimensions that weight (or bias) has; the last one without them. */
#include "op/fold.h"

static inline moe_tensor *optional(moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor ? c->arg[i].t : NULL; }
static inline bool needed(moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor && c->need[c->slot[i]]; }

/* weight and bias must have the shape of x's last dimensions; *n: elements of a row. */
static moe_status check_trailing(moe_ctx *c, moe_tensor *x, int arg, int *trailing, int64_t *n) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  moe_tensor *w = optional(c, arg);
  if (w == NULL) return MOE_OK;
  bool fits = w->ndim >= 1 && w->ndim <= x->ndim;
  for (int d = 0; fits && d < w->ndim; d++) fits = w->shape[d] == x->shape[x->ndim - w->ndim + d];
  const char *name = moe_op_signature(c->op)->param[arg].name;
  if (!fits)
    return OP_FAIL(c, "%s must have the shape of x's last dimensions: %s is %s, x is %s", name, name, moe_shape_of(a, w),
                   moe_shape_of(b, x));
  if (*trailing > 0 && *trailing != w->ndim)
    return OP_FAIL(c, "weight and bias must have one shape: weight has %d dimensions, bias %d", *trailing, w->ndim);
  *trailing = w->ndim;
  *n = moe_numel(w);
  return MOE_OK;
}

/* saved: x, weight, mean, rstd. user[0]: elements of a row */
static moe_status forward(moe_ctx *c, bool center, int eps_arg) {
  moe_tensor *a = c->arg[0].t, *w = optional(c, 1), *b = center ? optional(c, 2) : NULL;
  int trailing = 0;
  int64_t n = a->ndim ? a->shape[a->ndim - 1] : 1;
  double eps = c->arg[eps_arg].f;
  if (a->ndim == 0) return OP_FAIL(c, "x has no dimension to normalise over");
  if (!moe_dtype_is_float(a->dtype)) return OP_FAIL(c, "x must be floating, got %s", moe_dtype_name(a->dtype));
  if (!(eps >= 0)) return OP_FAIL(c, "eps must not be negative, got %g", eps);
  MOE_TRY(check_trailing(c, a, 1, &trailing, &n));
  if (center) MOE_TRY(check_trailing(c, a, 2, &trailing, &n));
  moe_dtype t = moe_dtype_compute(a->dtype);
  moe_tensor *x = moe_dense(a, t), *wd = w ? moe_dense(w, t) : NULL, *bd = b ? moe_dense(b, t) : NULL;
  if (x == NULL || (w && !wd) || (b && !bd)) return moe_error_code();
  int64_t rows = n > 0 ? moe_numel(x) / n : 0;
  moe_tensor *mean = center ? moe_empty(1, &rows, t, moe_dev(x)) : NULL, *rstd = moe_empty(1, &rows, t, moe_dev(x));
  moe_tensor *y = moe_result_begin(c, 0, a->ndim, a->shape, t, a->dtype, moe_dev(x));
  if ((center && !mean) || rstd == NULL || y == NULL) return moe_error_code();
  if (rows > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, norm_rows, moe_data(y), center ? moe_data(mean) : NULL, moe_data(rstd), moe_data(x),
                  wd ? moe_data(wd) : NULL, bd ? moe_data(bd) : NULL, rows, n, eps, t));
  MOE_TRY(moe_result_end(c, 0, y, a->dtype));
  moe_save(c, a);
  moe_save(c, w);
  moe_save(c, mean);
  moe_save(c, rstd);
  c->user[0] = n;
  return MOE_OK;
}

/* The gradients made of recorded calls, for second derivatives. */
static moe_status recorded(moe_ctx *c, bool center, double eps) {
  moe_tensor *x0 = c->saved[0], *w = c->saved[1];
  int64_t n = c->user[0], rows = n > 0 ? moe_numel(x0) / n : 0;
  const int64_t shape[2] = {rows, n}, row[1] = {n};
  moe_tensor *x = MOE_CALL(reshape, T(x0), INTS(shape, 2)), *g = MOE_CALL(reshape, T(c->gout[0]), INTS(shape, 2));
  moe_tensor *h = w ? MOE_CALL(mul, T(g), T(MOE_CALL(reshape, T(w), INTS(row, 1)))) : g;
  moe_tensor *xc = center ? MOE_CALL(sub, T(x), T(MOE_CALL(mean, T(x), DIM1(1), I(true)))) : x;
  moe_tensor *ms = MOE_CALL(mean, T(MOE_CALL(mul, T(xc), T(xc))), DIM1(1), I(true));
  moe_tensor *r = MOE_CALL(rsqrt, T(MOE_CALL(add, T(ms), F(eps)))), *xh = MOE_CALL(mul, T(xc), T(r));
  if (xh == NULL || h == NULL) return moe_error_code();
  if (needed(c, 0)) {
    moe_tensor *dot = MOE_CALL(mean, T(MOE_CALL(mul, T(h), T(xh))), DIM1(1), I(true));
    moe_tensor *v = MOE_CALL(sub, T(h), T(MOE_CALL(mul, T(xh), T(dot))));
    if (center) v = MOE_CALL(sub, T(v), T(MOE_CALL(mean, T(h), DIM1(1), I(true))));
    MOE_TRY(gin_set(c, 0, MOE_CALL(reshape, T(MOE_CALL(mul, T(v), T(r))), INTS(c->in[0].shape, c->in[0].ndim))));
  }
  if (needed(c, 1)) {
    const moe_meta *m = &c->in[c->slot[1]];
    moe_tensor *s = MOE_CALL(sum, T(MOE_CALL(mul, T(g), T(xh))), DIM1(0));
    MOE_TRY(gin_set(c, c->slot[1], MOE_CALL(reshape, T(s), INTS(m->shape, m->ndim))));
  }
  if (center && needed(c, 2)) {
    const moe_meta *m = &c->in[c->slot[2]];
    MOE_TRY(gin_set(c, c->slot[2], MOE_CALL(reshape, T(MOE_CALL(sum, T(g), DIM1(0))), INTS(m->shape, m->ndim))));
  }
  return MOE_OK;
}

/* A gradient buffer of the compute type for argument i, or NULL where none is wanted. */
static moe_status make_grad(moe_ctx *c, int i, moe_dtype t, moe_tensor **g) {
  *g = NULL;
  if (!needed(c, i)) return MOE_OK;
  const moe_meta *m = &c->in[c->slot[i]];
  *g = moe_empty(m->ndim, m->shape, t, m->device);
  return *g ? MOE_OK : moe_error_code();
}

static moe_status backward(moe_ctx *c, bool center, int eps_arg) {
  if (c->gout[0] == NULL) return MOE_OK;
  if (moe_grad_enabled()) return recorded(c, center, c->arg[eps_arg].f);
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *x = moe_dense(c->saved[0], t), *w = c->saved[1] ? moe_dense(c->saved[1], t) : NULL;
  moe_tensor *g = moe_dense(c->gout[0], t), *gx, *gw, *gb = NULL;
  if (x == NULL || g == NULL || (c->saved[1] && !w)) return moe_error_code();
  MOE_TRY(make_grad(c, 0, t, &gx));
  MOE_TRY(make_grad(c, 1, t, &gw));
  if (center) MOE_TRY(make_grad(c, 2, t, &gb));
  int64_t n = c->user[0], rows = n > 0 ? moe_numel(x) / n : 0;
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, norm_rows_bwd, gx ? moe_data(gx) : NULL, gw ? moe_data(gw) : NULL, gb ? moe_data(gb) : NULL,
                  moe_data(g), moe_data(x), w ? moe_data(w) : NULL, c->saved[2] ? moe_data(c->saved[2]) : NULL,
                  moe_data(c->saved[3]), rows, n, t));
  if (gx) MOE_TRY(gin_set(c, 0, gx));
  if (gw) MOE_TRY(gin_set(c, c->slot[1], gw));
  if (gb) MOE_TRY(gin_set(c, c->slot[2], gb));
  return MOE_OK;
}

moe_status moe_fwd_layer_norm(moe_ctx *c) { return forward(c, true, 3); }
moe_status moe_bwd_layer_norm(moe_ctx *c) { return backward(c, true, 3); }
moe_status moe_fwd_rms_norm(moe_ctx *c) { return forward(c, false, 2); }
moe_status moe_bwd_rms_norm(moe_ctx *c) { return backward(c, false, 2); }
