/* router_gates: a variable number of experts a token. Every published rule takes the best experts of a token down to
** some place in their order; the rules differ in where it lies. */
#include "op/op.h"

enum { SCORE, MASS, THRESHOLD, MIN_K, MAX_K, LIMITS = MAX_K };

static const char *const names[] = {"score", "mass", "threshold", "min_k", "max_k"};

/* Limit i as f64 [tokens]; *out NULL when it is absent. */
static moe_status limit_of(moe_ctx *c, int i, int64_t tokens, moe_device *dev, moe_tensor **out) {
  const moe_value *a = &c->arg[i];
  *out = NULL;
  if (a->kind == MOE_K_none) return MOE_OK;
  if (a->kind == MOE_K_tensor) {
    char s[MOE_SHAPE_TEXT];
    if (moe_numel(a->t) != tokens || a->t->dtype == MOE_bool)
      return OP_FAIL(c, "%s is a %s tensor %s, wanted a number or one a token, [%lld]", names[i],
                     moe_dtype_name(a->t->dtype), moe_shape_of(s, a->t), (long long)tokens);
    *out = moe_dense(a->t, MOE_f64);
  } else {
    if (a->f != a->f) return OP_FAIL(c, "%s is NaN", names[i]);
    if ((i == MIN_K || i == MAX_K) && a->f < 0)
      return OP_FAIL(c, "%s is %g, wanted a count of experts", names[i], a->f);
    *out = moe_full(1, &tokens, MOE_f64, dev, a->f);
  }
  return *out ? MOE_OK : moe_error_code();
}

moe_status moe_fwd_router_gates(moe_ctx *c) {
  moe_tensor *x = c->arg[SCORE].t, *limit[LIMITS];
  char s[MOE_SHAPE_TEXT];
  if (x->ndim != 2 || x->shape[1] < 1 || x->shape[1] > INT32_MAX || !moe_dtype_is_float(x->dtype))
    return OP_FAIL(c, "score is a %s tensor %s, wanted floats [tokens, experts]", moe_dtype_name(x->dtype),
                   moe_shape_of(s, x));
  const double *at[LIMITS];
  for (int i = 0; i < LIMITS; i++) {
    MOE_TRY(limit_of(c, i + MASS, x->shape[0], moe_dev(x), &limit[i]));
    at[i] = limit[i] ? moe_data_f64(limit[i]) : NULL;
  }
  moe_dtype ct = moe_dtype_compute(x->dtype);
  moe_tensor *xs = moe_dense(x, ct), *gate = moe_out(c, 0, 2, x->shape, ct);
  if (xs == NULL || gate == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, router_gates, moe_data(gate), moe_data(xs), at[MASS - 1], at[THRESHOLD - 1],
                  at[MIN_K - 1], at[MAX_K - 1], x->shape[0], x->shape[1], ct));
  moe_save(c, gate);
  return MOE_OK;
}

/* The choice is piecewise constant: what was taken passes its gradient on. */
moe_status moe_bwd_router_gates(moe_ctx *c) {
  if (!c->need[0]) return MOE_OK;
  moe_tensor *g = MOE_CALL(masked_keep, T(c->gout[0]), T(MOE_CALL(ne, T(c->saved[0]), F(0))));
  if (g != NULL && g->dtype != c->in[0].dtype) g = MOE_CALL(cast, T(g), I(c->in[0].dtype));
  c->gin[0] = g;
  return g ? MOE_OK : moe_error_code();
}
