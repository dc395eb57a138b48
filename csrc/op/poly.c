/* poly_relu and poly_norm: learned polynomials of an activation (PolyCom, Zhuo et al. 2024, arXiv 2411.03884, eqs. 3, 4). */
#include "op/fold.h"

enum { MAX_TERMS = 16 }; /* ORDER with cpu/poly.c */

/* a is [terms] for all rows, or [.., terms] with a row's own. */
static moe_status check(moe_ctx *c, const moe_tensor *x, const moe_tensor *a) {
  char sa[MOE_SHAPE_TEXT], sx[MOE_SHAPE_TEXT];
  if (!moe_dtype_is_float(x->dtype) || !moe_dtype_is_float(a->dtype))
    return OP_FAIL(c, "x and a must be floating, got %s and %s", moe_dtype_name(x->dtype), moe_dtype_name(a->dtype));
  if (x->ndim == 0) return OP_FAIL(c, "x has no dimension");
  bool fits = a->ndim == 1 || (a->ndim == x->ndim && a->ndim > 1);
  for (int d = 0; fits && d + 1 < a->ndim; d++) fits = a->shape[d] == x->shape[d];
  if (!fits)
    return OP_FAIL(c, "a must be [terms], or [.., terms] with x's leading sizes: a is %s, x is %s", moe_shape_of(sa, a),
                   moe_shape_of(sx, x));
  int64_t terms = a->shape[a->ndim - 1];
  if (terms < 1 || terms > MAX_TERMS)
    return OP_FAIL(c, "a must have 1 to %d terms (powers from 0), got %lld", MAX_TERMS, (long long)terms);
  return MOE_OK;
}

static int64_t rows_of(const moe_tensor *x) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < x->ndim; d++) rows *= x->shape[d];
  return rows;
}

/* saved: x, a */
static moe_status forward(moe_ctx *c, bool norm) {
  moe_tensor *x0 = c->arg[0].t, *a0 = c->arg[1].t;
  double eps = norm ? c->arg[2].f : 0;
  MOE_TRY(check(c, x0, a0));
  if (!(eps >= 0)) return OP_FAIL(c, "eps must not be negative, got %g", eps);
  moe_dtype t = moe_dtype_compute(x0->dtype);
  moe_tensor *x = moe_dense(x0, t), *a = moe_dense(a0, t);
  moe_tensor *y = moe_result_begin(c, 0, x0->ndim, x0->shape, t, x0->dtype, moe_dev(x0));
  if (x == NULL || a == NULL || y == NULL) return moe_error_code();
  if (moe_numel(x) > 0)
    MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, poly, moe_data(y), moe_data(x), moe_data(a), rows_of(x),
                    x->shape[x->ndim - 1], a->shape[a->ndim - 1], a->ndim > 1, norm, eps, t));
  MOE_TRY(moe_result_end(c, 0, y, x0->dtype));
  moe_save(c, x0);
  moe_save(c, a0);
  return MOE_OK;
}

static moe_status backward(moe_ctx *c, bool norm) {
  if (c->gout[0] == NULL) return MOE_OK;
  MOE_TRY(moe_first_derivative_only(c));
  moe_dtype t = moe_dtype_compute(c->in[0].dtype);
  moe_tensor *x = moe_dense(c->saved[0], t), *a = moe_dense(c->saved[1], t), *g = moe_dense(c->gout[0], t);
  if (x == NULL || a == NULL || g == NULL) return moe_error_code();
  int64_t rows = rows_of(x), n = x->shape[x->ndim - 1], terms = a->shape[a->ndim - 1];
  bool own = a->ndim > 1;
  moe_tensor *gx = c->need[0] ? moe_empty(x->ndim, x->shape, t, moe_dev(x)) : NULL;
  moe_tensor *ga = moe_zeros(2, (const int64_t[]){rows, terms}, t, moe_dev(x));
  if (ga == NULL || (c->need[0] && gx == NULL)) return moe_error_code();
  if (moe_numel(x) > 0)
    MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, poly_bwd, gx ? moe_data(gx) : NULL, moe_data(ga), moe_data(g), moe_data(x),
                    moe_data(a), rows, n, terms, own, norm, norm ? c->arg[2].f : 0, t));
  if (gx) MOE_TRY(gin_set(c, 0, gx));
  if (!c->need[1]) return MOE_OK;
  return gin_set(c, 1, own ? MOE_CALL(reshape, T(ga), INTS(a->shape, a->ndim)) : MOE_CALL(sum, T(ga), DIM1(0)));
}

moe_status moe_fwd_poly_relu(moe_ctx *c) { return forward(c, false); }
moe_status moe_bwd_poly_relu(moe_ctx *c) { return backward(c, false); }
moe_status moe_fwd_poly_norm(moe_ctx *c) { return forward(c, true); }
moe_status moe_bwd_poly_norm(moe_ctx *c) { return backward(c, true); }
