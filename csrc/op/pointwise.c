/* Elementwise operations: types and broadcasting here, the scalar functions in op/pointwise.def.
**
** Types. A float function of integers gives f32. Two tensors meet in moe_dtype_promote; a number raises a
** tensor's type only to a higher kind (bool < integer < float): i64 + 1.5 is f32, bf16 + 1.5 is bf16. In place
** the first argument keeps its type within floats or within integers. Work is done in f32, f64 or i64.
*/
#include "op/pointwise.h"

#include <math.h>

#include "autograd/graph.h"
#include "op/op.h"

static inline moe_dtype float_type(moe_dtype t) { return moe_dtype_is_float(t) ? t : MOE_f32; }

/* Where to compute the result y: y itself or a temporary of the computing type. */
static moe_tensor *target(moe_tensor *y, moe_dtype work) {
  return y == NULL || y->dtype == work ? y : moe_empty(y->ndim, y->shape, work, moe_dev(y));
}

static moe_status finish(moe_tensor *y, moe_tensor *r) { return y == r ? MOE_OK : moe_copy(y, r); }

static bool same_view(const moe_tensor *a, const moe_tensor *b) {
  if (a->offset != b->offset || !moe_same_shape(a, b)) return false;
  for (int i = 0; i < a->ndim; i++)
    if (a->stride[i] != b->stride[i]) return false;
  return true;
}

/* An input in the computing type. One that overlaps the result otherwise than element for element is copied. */
static moe_tensor *input(moe_tensor *x, moe_dtype work, const moe_tensor *y) {
  if (x == NULL || y == NULL) return NULL;
  if (x->dtype != work) return moe_to_raw(x, work, moe_dev(x));
  if (x->storage != y->storage || same_view(x, y)) return x;
  moe_tensor *copy = moe_empty_like(x);
  return copy && moe_copy(copy, x) == MOE_OK ? copy : NULL;
}

/* The result of a call whose first argument may be a number. */
static moe_tensor *result(moe_ctx *c, moe_tensor *like, int ndim, const int64_t *shape, moe_dtype dt) {
  if (c->inplace || c->arg[0].kind == MOE_K_tensor) return moe_out(c, 0, ndim, shape, dt);
  moe_tensor *y = moe_empty(ndim, shape, dt, moe_dev(like));
  return moe_set_out(c, 0, y) == MOE_OK ? y : NULL;
}

/* --- one operand --- */

static const char keeps[MOE_UN_COUNT] = { /* which tensor the slope is a function of */
#define UNARY(name, keep, value, slope) #keep[0],
#include "op/pointwise.def"
};
static const bool knows_int[MOE_UN_COUNT] = {
#define UNARY_INT(name, value) [MOE_UN_##name] = true,
#include "op/pointwise.def"
};

/* A second argument is the function's parameter, or an enum that chooses among neighbouring rows. */
static int function_of(const moe_ctx *c, double *p) {
  *p = 0;
  if (c->nargs < 2) return c->op->variant;
  if (c->arg[1].kind == MOE_K_enum) return c->op->variant + (int)c->arg[1].i;
  *p = c->arg[1].f;
  return c->op->variant;
}

moe_status moe_fwd_unary(moe_ctx *c) {
  double p;
  int fn = function_of(c, &p);
  moe_tensor *x = c->arg[0].t;
  moe_dtype dt = knows_int[fn] ? x->dtype : float_type(x->dtype);
  if (dt == MOE_bool) dt = MOE_i64;
  moe_dtype work = moe_dtype_compute(dt);
  moe_tensor *y = moe_out(c, 0, x->ndim, x->shape, dt), *r = target(y, work), *in = input(x, work, r);
  if (r == NULL || in == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, r->ndim, r->shape, 2, (moe_tensor *const[]){r, in});
  if (it.numel > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, unary, &it, work, fn, p));
  MOE_TRY(finish(y, r));
  if (keeps[fn] != 'N') moe_save(c, keeps[fn] == 'X' ? x : y);
  return MOE_OK;
}

/* Slopes as recorded calls, for second derivatives: k is what the forward kept. */
typedef moe_tensor *slope_fn(moe_tensor *k, double p);
#define SLOPE(name) static moe_tensor *slope_##name(moe_tensor *k, double p)
#define PLUS(a, b) MOE_CALL(add, T(a), b)
#define TIMES(a, b) MOE_CALL(mul, T(a), b)
#define ONE_MINUS(a) MOE_CALL(sub, F(1), T(a))
#define MASK(cmp, k) MOE_CALL(cast, T(MOE_CALL(cmp, T(k), F(0))), I((k)->dtype))
#define UNUSED_P (void)p

SLOPE(neg) { UNUSED_P; return MOE_CALL(fill, T(k), F(-1)); }
SLOPE(abs) { UNUSED_P; return MOE_CALL(sign, T(k)); }
SLOPE(square) { UNUSED_P; return TIMES(k, F(2)); }
SLOPE(reciprocal) { UNUSED_P; return MOE_CALL(neg, T(MOE_CALL(square, T(k)))); }
SLOPE(sqrt) { UNUSED_P; return MOE_CALL(div, F(0.5), T(k)); }
SLOPE(rsqrt) { UNUSED_P; return TIMES(TIMES(MOE_CALL(square, T(k)), T(k)), F(-0.5)); }
SLOPE(exp) { UNUSED_P; return k; }
SLOPE(expm1) { UNUSED_P; return PLUS(k, F(1)); }
SLOPE(log) { UNUSED_P; return MOE_CALL(reciprocal, T(k)); }
SLOPE(log2) { UNUSED_P; return MOE_CALL(div, F(1.44269504088896340736), T(k)); }
SLOPE(log1p) { UNUSED_P; return MOE_CALL(reciprocal, T(PLUS(k, F(1)))); }
SLOPE(sin) { UNUSED_P; return MOE_CALL(cos, T(k)); }
SLOPE(cos) { UNUSED_P; return MOE_CALL(neg, T(MOE_CALL(sin, T(k)))); }
SLOPE(tanh) { UNUSED_P; return ONE_MINUS(MOE_CALL(square, T(k))); }
static moe_tensor *gauss(moe_tensor *x, double scale, double factor) { /* scale exp(factor x^2) */
  return TIMES(MOE_CALL(exp, T(TIMES(MOE_CALL(square, T(x)), F(factor)))), F(scale));
}
SLOPE(erf) { UNUSED_P; return gauss(k, 1.12837916709551257390, -1); }
SLOPE(sigmoid) { UNUSED_P; return TIMES(k, T(ONE_MINUS(k))); }
SLOPE(logsigmoid) { UNUSED_P; return MOE_CALL(sigmoid, T(MOE_CALL(neg, T(k)))); }
SLOPE(softplus) { return MOE_CALL(sigmoid, T(TIMES(k, F(p)))); }
SLOPE(relu) { UNUSED_P; return MASK(gt, k); }
SLOPE(relu_squared) { UNUSED_P; return TIMES(MOE_CALL(relu, T(k)), F(2)); }
SLOPE(leaky_relu) { return MOE_CALL(where, T(MOE_CALL(gt, T(k), F(0))), F(1), F(p)); }
SLOPE(elu) { return MOE_CALL(where, T(MOE_CALL(gt, T(k), F(0))), F(1), T(TIMES(MOE_CALL(exp, T(k)), F(p)))); }
SLOPE(silu) {
  UNUSED_P;
  moe_tensor *s = MOE_CALL(sigmoid, T(k));
  return TIMES(s, T(PLUS(TIMES(k, T(ONE_MINUS(s))), F(1))));
}
SLOPE(gelu) {
  UNUSED_P;
  moe_tensor *phi = TIMES(PLUS(MOE_CALL(erf, T(TIMES(k, F(0.70710678118654752440)))), F(1)), F(0.5));
  return PLUS(phi, T(TIMES(k, T(gauss(k, 0.39894228040143267794, -0.5)))));
}
SLOPE(gelu_tanh) {
  UNUSED_P;
  const double s = 0.79788456080286535588;
  moe_tensor *x2 = MOE_CALL(square, T(k));
  moe_tensor *t = MOE_CALL(tanh, T(TIMES(TIMES(k, F(s)), T(PLUS(TIMES(x2, F(0.044715)), F(1))))));
  moe_tensor *du = PLUS(TIMES(x2, F(s * 0.134145)), F(s));
  moe_tensor *inner = TIMES(TIMES(k, T(ONE_MINUS(MOE_CALL(square, T(t))))), T(du));
  return TIMES(PLUS(PLUS(t, F(1)), T(inner)), F(0.5));
}

/* The walk of a fused backward: gx <- g times a slope of what the forward kept, all in the type of computing. */
typedef struct slope_walk {
  moe_tensor *gx;
  moe_dtype work;
  moe_iter it;
} slope_walk;

static moe_status slope_begin(const moe_ctx *c, moe_tensor *g, moe_tensor *kept, slope_walk *w) {
  const moe_meta *x = &c->in[0];
  w->work = moe_dtype_compute(x->dtype);
  g = moe_to_raw(g, w->work, x->device);
  kept = moe_to_raw(kept, w->work, x->device);
  w->gx = moe_empty(x->ndim, x->shape, w->work, x->device);
  if (g == NULL || kept == NULL || w->gx == NULL) return moe_error_code();
  moe_iter_make(&w->it, w->gx->ndim, w->gx->shape, 3, (moe_tensor *const[]){w->gx, g, kept});
  return MOE_OK;
}

static moe_status slope_end(moe_ctx *c, const slope_walk *w) {
  c->gin[0] = moe_to_raw(w->gx, c->in[0].dtype, c->in[0].device);
  return c->gin[0] ? MOE_OK : moe_error_code();
}
SLOPE(sign) { UNUSED_P; return MOE_CALL(fill, T(k), F(0)); }
#define slope_floor slope_sign
#define slope_ceil slope_sign
#define slope_round slope_sign
#define slope_trunc slope_sign

static slope_fn *const slopes[MOE_UN_COUNT] = {
#define UNARY(name, keep, value, slope) slope_##name,
#include "op/pointwise.def"
};

moe_status moe_bwd_unary(moe_ctx *c) {
  double p;
  int fn = function_of(c, &p);
  const moe_meta *x = &c->in[0];
  moe_tensor *g = c->gout[0], *k = keeps[fn] == 'N' ? g : c->saved[0];
  if (moe_grad_enabled()) {
    moe_tensor *s = slopes[fn](k, p);
    c->gin[0] = s ? MOE_CALL(mul, T(g), T(s)) : NULL;
    return c->gin[0] ? MOE_OK : moe_error_code();
  }
  slope_walk w;
  MOE_TRY(slope_begin(c, g, k, &w));
  if (w.it.numel > 0) MOE_TRY(MOE_RUN(x->device, c->op->name, unary_bwd, &w.it, w.work, fn, p));
  return slope_end(c, &w);
}

/* Piecewise constant functions. */
moe_status moe_bwd_zero(moe_ctx *c) {
  (void)c;
  return MOE_OK;
}

moe_status moe_bwd_neg(moe_ctx *c) {
  c->gin[0] = MOE_CALL(neg, T(c->gout[0]));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* isnan, isinf, isfinite: an integer is finite */
moe_status moe_fwd_predicate(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, MOE_bool);
  if (y == NULL) return moe_error_code();
  if (!moe_dtype_is_float(x->dtype)) return moe_fill(y, c->op->variant == MOE_PR_isfinite);
  moe_dtype work = moe_dtype_compute(x->dtype);
  if ((x = moe_to_raw(x, work, moe_dev(x))) == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, y->ndim, y->shape, 2, (moe_tensor *const[]){y, x});
  return it.numel > 0 ? MOE_RUN(moe_dev(x), c->op->name, predicate, &it, work, c->op->variant) : MOE_OK;
}

/* --- two operands, each a tensor or a number --- */

/* The type in which operands meet; false with an error when there is no tensor. */
static bool meet(moe_ctx *c, const moe_value *a, const moe_value *b, moe_dtype *dt) {
  if (a->kind == MOE_K_tensor && b->kind == MOE_K_tensor) {
    *dt = a->t->dtype == b->t->dtype ? a->t->dtype : moe_dtype_promote(a->t->dtype, b->t->dtype);
    return true;
  }
  const moe_value *t = a->kind == MOE_K_tensor ? a : b, *n = t == a ? b : a;
  if (t->kind != MOE_K_tensor) {
    OP_FAIL(c, "one of the two arguments must be a tensor, got two numbers");
    return false;
  }
  *dt = t->t->dtype;
  if (!moe_dtype_is_float(*dt)) *dt = !n->is_int ? MOE_f32 : *dt == MOE_bool ? MOE_i64 : *dt;
  return true;
}

/* y <- fn(a, b) through the tensor or the number slot of a pair of kernels; `work`: the type computed in. */
static moe_status run_pair(moe_ctx *c, moe_tensor *y, const moe_value *a, const moe_value *b, moe_dtype work, bool compare) {
  moe_iter it;
  int fn = c->op->variant;
  const char *name = c->op->name;
  if (a->kind == MOE_K_tensor && b->kind == MOE_K_tensor) {
    moe_tensor *ta = input(a->t, work, y), *tb = input(b->t, work, y);
    if (ta == NULL || tb == NULL) return moe_error_code();
    moe_iter_make(&it, y->ndim, y->shape, 3, (moe_tensor *const[]){y, ta, tb});
    if (it.numel == 0) return MOE_OK;
    return compare ? MOE_RUN(moe_dev(y), name, compare, &it, work, fn) : MOE_RUN(moe_dev(y), name, binary, &it, work, fn);
  }
  bool left = a->kind != MOE_K_tensor;
  moe_tensor *t = input(left ? b->t : a->t, work, y);
  if (t == NULL) return moe_error_code();
  double v = left ? a->f : b->f;
  moe_iter_make(&it, y->ndim, y->shape, 2, (moe_tensor *const[]){y, t});
  if (it.numel == 0) return MOE_OK;
  return compare ? MOE_RUN(moe_dev(y), name, compare_scalar, &it, work, fn, v, left)
                 : MOE_RUN(moe_dev(y), name, binary_scalar, &it, work, fn, v, left);
}

static moe_status pair_shape(moe_ctx *c, const moe_value *a, const moe_value *b, int *ndim, int64_t *shape) {
  if (a->kind == MOE_K_tensor && b->kind == MOE_K_tensor) return moe_broadcast(c->op->name, a->t, b->t, ndim, shape);
  const moe_tensor *t = a->kind == MOE_K_tensor ? a->t : b->t;
  *ndim = t->ndim;
  for (int i = 0; i < t->ndim; i++) shape[i] = t->shape[i];
  return MOE_OK;
}

static inline bool wants(const moe_value *v) { return v->kind == MOE_K_tensor && v->t->requires_grad; }

/* What each backward needs of the operands: [0] a, [1] b, kept only when the other's or its own gradient asks. */
enum { KEEP_NOTHING, KEEP_OTHER, KEEP_DIV, KEEP_BOTH };
static const char keep_pair[MOE_BI_COUNT] = {
    [MOE_BI_mul] = KEEP_OTHER,     [MOE_BI_div] = KEEP_DIV,        [MOE_BI_minimum] = KEEP_BOTH,
    [MOE_BI_maximum] = KEEP_BOTH,  [MOE_BI_pow] = KEEP_BOTH,       [MOE_BI_remainder] = KEEP_DIV,
    [MOE_BI_fmod] = KEEP_DIV,      [MOE_BI_atan2] = KEEP_BOTH,
};

static void save_pair(moe_ctx *c, const moe_value *a, const moe_value *b) {
  int keep = keep_pair[c->op->variant];
  if (!c->record || keep == KEEP_NOTHING) return;
  bool ka = keep == KEEP_BOTH || wants(b), kb = keep != KEEP_OTHER || wants(a);
  moe_save(c, ka && a->kind == MOE_K_tensor ? a->t : NULL);
  moe_save(c, kb && b->kind == MOE_K_tensor ? b->t : NULL);
}

/* Powers that are cheaper by another name; the kernel numbers of unary functions, or -1. */
static int power_function(double e) {
  return e == 2 ? MOE_UN_square : e == 0.5 ? MOE_UN_sqrt : e == -1 ? MOE_UN_reciprocal : e == -0.5 ? MOE_UN_rsqrt : -1;
}

moe_status moe_fwd_binary(moe_ctx *c) {
  const moe_value *a = &c->arg[0], *b = &c->arg[1];
  int fn = c->op->variant, ndim;
  int64_t shape[MOE_MAX_DIM];
  moe_dtype dt;
  if (!meet(c, a, b, &dt)) return moe_error_code();
  if (!moe_dtype_is_float(dt) && (fn == MOE_BI_div || fn == MOE_BI_atan2)) dt = MOE_f32;
  if (!moe_dtype_is_float(dt) && fn == MOE_BI_pow && b->kind != MOE_K_tensor && b->f < 0) dt = MOE_f32;
  moe_dtype work = moe_dtype_compute(dt);
  if (c->inplace && moe_dtype_is_float(dt) == moe_dtype_is_float(c->inplace->dtype)) dt = c->inplace->dtype;
  MOE_TRY(pair_shape(c, a, b, &ndim, shape));
  moe_tensor *y = result(c, a->kind == MOE_K_tensor ? a->t : b->t, ndim, shape, dt), *r = target(y, work);
  if (r == NULL) return moe_error_code();
  if (fn == MOE_BI_pow && b->kind != MOE_K_tensor && work != MOE_i64 && power_function(b->f) >= 0) {
    moe_tensor *x = input(a->t, work, r);
    if (x == NULL) return moe_error_code();
    moe_iter it;
    moe_iter_make(&it, r->ndim, r->shape, 2, (moe_tensor *const[]){r, x});
    if (it.numel > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, unary, &it, work, power_function(b->f), 0));
  } else {
    moe_status st = run_pair(c, r, a, b, work, false);
    if (st != MOE_OK) return work == MOE_i64 ? moe_fail_prefix(c->op->name) : st;
  }
  save_pair(c, a, b);
  return finish(y, r);
}

moe_status moe_fwd_compare(moe_ctx *c) {
  const moe_value *a = &c->arg[0], *b = &c->arg[1];
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  moe_dtype dt;
  if (!meet(c, a, b, &dt)) return moe_error_code();
  moe_dtype work = moe_dtype_compute(dt);
  const moe_value *t = a->kind == MOE_K_tensor ? a : b;
  /* integers against a fraction: in f64, where both are exact */
  if ((a->kind != MOE_K_tensor || b->kind != MOE_K_tensor) && moe_dtype_is_float(dt) && !moe_dtype_is_float(t->t->dtype))
    work = MOE_f64;
  MOE_TRY(pair_shape(c, a, b, &ndim, shape));
  moe_tensor *y = result(c, t->t, ndim, shape, MOE_bool);
  return y ? run_pair(c, y, a, b, work, true) : moe_error_code();
}

moe_status moe_fwd_logical_not(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, MOE_bool);
  moe_dtype work = moe_dtype_compute(x->dtype);
  x = moe_to_raw(x, work, moe_dev(x));
  if (x == NULL || y == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, y->ndim, y->shape, 2, (moe_tensor *const[]){y, x});
  if (it.numel == 0) return MOE_OK;
  return MOE_RUN(moe_dev(x), c->op->name, compare_scalar, &it, work, MOE_CM_eq, 0, false);
}

/* --- backward of two operands, composed: g a is g * a, and so on --- */

static inline bool need(const moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor && c->need[c->slot[i]]; }

static moe_status give(moe_ctx *c, int i, moe_tensor *g) {
  int k = c->slot[i];
  c->gin[k] = moe_unbroadcast(g, &c->in[k]);
  return c->gin[k] ? MOE_OK : moe_error_code();
}

/* Operand i as an argument of a call: the number, or the tensor that was kept. */
static moe_value kept(const moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_tensor ? T(c->saved[i]) : F(c->arg[i].f); }

moe_status moe_bwd_add(moe_ctx *c) {
  if (need(c, 0)) MOE_TRY(give(c, 0, c->gout[0]));
  if (need(c, 1)) MOE_TRY(give(c, 1, c->gout[0]));
  return MOE_OK;
}

moe_status moe_bwd_sub(moe_ctx *c) {
  if (need(c, 0)) MOE_TRY(give(c, 0, c->gout[0]));
  if (need(c, 1)) MOE_TRY(give(c, 1, MOE_CALL(neg, T(c->gout[0]))));
  return MOE_OK;
}

moe_status moe_bwd_mul(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  if (need(c, 0)) MOE_TRY(give(c, 0, MOE_CALL(mul, T(g), kept(c, 1))));
  if (need(c, 1)) MOE_TRY(give(c, 1, MOE_CALL(mul, T(g), kept(c, 0))));
  return MOE_OK;
}

moe_status moe_bwd_div(moe_ctx *c) {
  moe_tensor *ga = MOE_CALL(div, T(c->gout[0]), kept(c, 1));
  if (ga == NULL) return moe_error_code();
  if (need(c, 0)) MOE_TRY(give(c, 0, ga));
  if (need(c, 1)) { /* -g a / b^2 */
    moe_tensor *y = MOE_CALL(div, kept(c, 0), kept(c, 1));
    MOE_TRY(give(c, 1, MOE_CALL(neg, T(MOE_CALL(mul, T(ga), T(y))))));
  }
  return MOE_OK;
}

/* minimum and maximum: equals share the gradient, as in PyTorch */
moe_status moe_bwd_extreme(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *half = MOE_CALL(mul, T(g), F(0.5));
  bool least = c->op->variant == MOE_BI_minimum;
  moe_tensor *eq = MOE_CALL(eq, kept(c, 0), kept(c, 1)), *lt = MOE_CALL(lt, kept(c, 0), kept(c, 1));
  moe_tensor *gt = MOE_CALL(gt, kept(c, 0), kept(c, 1));
  moe_tensor *tie = MOE_CALL(where, T(eq), T(half), F(0));
  if (need(c, 0)) MOE_TRY(give(c, 0, MOE_CALL(where, T(least ? lt : gt), T(g), T(tie))));
  if (need(c, 1)) MOE_TRY(give(c, 1, MOE_CALL(where, T(least ? gt : lt), T(g), T(tie))));
  return MOE_OK;
}

/* d/da a^b = b a^(b-1), 0 where b = 0; d/db = a^b log a, 0 where a = 0 <= b */
moe_status moe_bwd_pow(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  moe_value a = kept(c, 0), b = kept(c, 1);
  if (need(c, 0)) {
    if (b.kind == MOE_K_number) {
      if (b.f == 0) return MOE_OK;
      moe_tensor *s = b.f == 2 ? a.t : MOE_CALL(pow, a, F(b.f - 1));
      MOE_TRY(give(c, 0, MOE_CALL(mul, T(g), T(MOE_CALL(mul, T(s), b)))));
    } else {
      moe_tensor *s = MOE_CALL(mul, b, T(MOE_CALL(pow, a, T(MOE_CALL(sub, b, F(1))))));
      MOE_TRY(give(c, 0, MOE_CALL(mul, T(g), T(MOE_CALL(where, T(MOE_CALL(eq, b, F(0))), F(0), T(s))))));
    }
  }
  if (need(c, 1)) {
    moe_tensor *y = MOE_CALL(pow, a, b);
    moe_tensor *s;
    if (a.kind == MOE_K_number) {
      s = MOE_CALL(mul, T(y), F(a.f == 0 ? 0 : log(a.f)));
    } else {
      moe_tensor *flat = MOE_CALL(logical_and, T(MOE_CALL(eq, a, F(0))), T(MOE_CALL(ge, b, F(0))));
      s = MOE_CALL(where, T(flat), F(0), T(MOE_CALL(mul, T(y), T(MOE_CALL(log, a)))));
    }
    MOE_TRY(give(c, 1, MOE_CALL(mul, T(g), T(s))));
  }
  return MOE_OK;
}

/* a - b q with the whole quotient q = floor(a / b), or towards zero for fmod */
moe_status moe_bwd_remainder(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  if (need(c, 0)) MOE_TRY(give(c, 0, g));
  if (need(c, 1)) {
    moe_tensor *q = MOE_CALL(div, kept(c, 0), kept(c, 1));
    q = c->op->variant == MOE_BI_fmod ? MOE_CALL(trunc, T(q)) : MOE_CALL(floor, T(q));
    MOE_TRY(give(c, 1, MOE_CALL(neg, T(MOE_CALL(mul, T(g), T(q))))));
  }
  return MOE_OK;
}

/* the angle of the point (b, a): (b, -a) / (a^2 + b^2) */
moe_status moe_bwd_atan2(moe_ctx *c) {
  moe_value a = kept(c, 0), b = kept(c, 1);
  moe_tensor *norm = MOE_CALL(add, T(a.kind == MOE_K_number ? MOE_CALL(fill, b, F(a.f * a.f)) : MOE_CALL(square, a)),
                              b.kind == MOE_K_number ? F(b.f * b.f) : T(MOE_CALL(square, b)));
  moe_tensor *s = MOE_CALL(div, T(c->gout[0]), T(norm));
  if (s == NULL) return moe_error_code();
  if (need(c, 0)) MOE_TRY(give(c, 0, MOE_CALL(mul, T(s), b)));
  if (need(c, 1)) MOE_TRY(give(c, 1, MOE_CALL(neg, T(MOE_CALL(mul, T(s), a)))));
  return MOE_OK;
}

/* --- where, clamp, fill --- */

moe_status moe_fwd_where(moe_ctx *c) {
  moe_tensor *cond = c->arg[0].t, *in[2];
  const moe_value *v[2] = {&c->arg[1], &c->arg[2]};
  moe_dtype dt;
  if (v[0]->kind != MOE_K_tensor && v[1]->kind != MOE_K_tensor) dt = v[0]->is_int && v[1]->is_int ? MOE_i64 : MOE_f32;
  else if (!meet(c, v[0], v[1], &dt)) return moe_error_code();
  int ndim = cond->ndim;
  int64_t shape[MOE_MAX_DIM];
  for (int i = 0; i < ndim; i++) shape[i] = cond->shape[i];
  for (int k = 0; k < 2; k++) {
    in[k] = v[k]->kind == MOE_K_tensor ? moe_to_raw(v[k]->t, dt, moe_dev(cond)) : moe_scalar(v[k]->f, dt, moe_dev(cond));
    if (in[k] == NULL) return moe_error_code();
    moe_tensor sofar = {.ndim = ndim}; /* only its shape is looked at */
    for (int i = 0; i < ndim; i++) sofar.shape[i] = shape[i];
    MOE_TRY(moe_broadcast(c->op->name, &sofar, in[k], &ndim, shape));
  }
  moe_save(c, cond);
  moe_tensor *y = moe_out(c, 0, ndim, shape, dt);
  cond = moe_to_raw(cond, MOE_bool, moe_dev(cond));
  if (y == NULL || cond == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, ndim, shape, 4, (moe_tensor *const[]){y, cond, in[0], in[1]});
  return it.numel > 0 ? MOE_RUN(moe_dev(y), c->op->name, where, &it, dt) : MOE_OK;
}

moe_status moe_bwd_where(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *cond = c->saved[0];
  if (need(c, 1)) MOE_TRY(give(c, 1, MOE_CALL(where, T(cond), T(g), F(0))));
  if (need(c, 2)) MOE_TRY(give(c, 2, MOE_CALL(where, T(cond), F(0), T(g))));
  return MOE_OK;
}

static void bounds(const moe_ctx *c, double *lo, double *hi) {
  *lo = c->arg[1].kind == MOE_K_none ? -(double)INFINITY : c->arg[1].f;
  *hi = c->arg[2].kind == MOE_K_none ? (double)INFINITY : c->arg[2].f;
}

moe_status moe_fwd_clamp(moe_ctx *c) {
  double lo, hi;
  moe_tensor *x = c->arg[0].t;
  bounds(c, &lo, &hi);
  if (c->arg[1].kind == MOE_K_none && c->arg[2].kind == MOE_K_none) return OP_FAIL(c, "give min, max or both");
  moe_dtype work = moe_dtype_compute(x->dtype);
  moe_save(c, x);
  moe_tensor *y = moe_out(c, 0, x->ndim, x->shape, x->dtype), *r = target(y, work), *in = input(x, work, r);
  if (r == NULL || in == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, r->ndim, r->shape, 2, (moe_tensor *const[]){r, in});
  if (it.numel > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, clamp, &it, work, lo, hi));
  return finish(y, r);
}

moe_status moe_bwd_clamp(moe_ctx *c) {
  double lo, hi;
  const moe_meta *x = &c->in[0];
  moe_tensor *g = c->gout[0], *k = c->saved[0];
  bounds(c, &lo, &hi);
  if (moe_grad_enabled()) {
    moe_tensor *inside = MOE_CALL(logical_and, T(MOE_CALL(ge, T(k), F(lo))), T(MOE_CALL(le, T(k), F(hi))));
    c->gin[0] = MOE_CALL(where, T(inside), T(g), F(0));
    return c->gin[0] ? MOE_OK : moe_error_code();
  }
  slope_walk w;
  MOE_TRY(slope_begin(c, g, k, &w));
  if (w.it.numel > 0) MOE_TRY(MOE_RUN(x->device, c->op->name, clamp_bwd, &w.it, w.work, lo, hi));
  return slope_end(c, &w);
}

/* fill, and zero, which has no second argument */
moe_status moe_fwd_fill(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *y = moe_out(c, 0, x->ndim, x->shape, x->dtype);
  return y ? moe_fill(y, c->nargs > 1 ? c->arg[1].f : 0) : moe_error_code();
}

/* --- composed --- */

static moe_status composed(moe_ctx *c, moe_tensor *y) {
  return moe_set_out(c, 0, y) == MOE_OK ? MOE_OK : moe_fail_prefix(c->op->name);
}

moe_status moe_fwd_lerp(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t, *d = MOE_CALL(sub, T(c->arg[1].t), T(a));
  return composed(c, MOE_CALL(add, T(a), T(MOE_CALL(mul, T(d), c->arg[2]))));
}

/* variant 0: x + value a b; 1: x + value a / b */
moe_status moe_fwd_addcmul(moe_ctx *c) {
  moe_tensor *a = c->arg[1].t, *b = c->arg[2].t;
  moe_tensor *ab = c->op->variant ? MOE_CALL(div, T(a), T(b)) : MOE_CALL(mul, T(a), T(b));
  if (c->arg[3].f != 1.0) ab = MOE_CALL(mul, T(ab), F(c->arg[3].f));
  return composed(c, MOE_CALL(add, T(c->arg[0].t), T(ab)));
}
