/* Choices that give every expert its share: balanced_assignment and sinkhorn_price. */
#include "op/op.h"

/* scores [T, E], their mask [T] as bool or NULL in *mask */
static moe_status check(moe_ctx *c, moe_tensor **mask) {
  moe_tensor *x = c->arg[0].t;
  char s[MOE_SHAPE_TEXT], m[MOE_SHAPE_TEXT];
  const char *name = moe_op_signature(c->op)->param[0].name;
  *mask = c->arg[1].kind == MOE_K_tensor ? c->arg[1].t : NULL;
  if (x->ndim != 2 || x->shape[1] < 1 || !moe_dtype_is_float(x->dtype))
    return OP_FAIL(c, "%s is a %s tensor %s, wanted floats [tokens, experts]", name, moe_dtype_name(x->dtype),
                   moe_shape_of(s, x));
  if (*mask && (moe_numel(*mask) != x->shape[0] || moe_dtype_is_float((*mask)->dtype)))
    return OP_FAIL(c, "mask is a %s tensor %s, wanted bool [%lld]: %s is %s", moe_dtype_name((*mask)->dtype),
                   moe_shape_of(m, *mask), (long long)x->shape[0], name, moe_shape_of(s, x));
  if (*mask && (*mask = moe_dense(*mask, MOE_bool)) == NULL) return moe_error_code();
  return MOE_OK;
}

/* args: score, mask, top_k */
moe_status moe_fwd_balanced_assignment(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *mask;
  MOE_TRY(check(c, &mask));
  int64_t k = c->arg[2].i, E = x->shape[1], shape[] = {x->shape[0], k};
  if (k < 1 || k > E)
    return OP_FAIL(c, "top_k is %lld, wanted 1 to %lld (the number of experts)", (long long)k, (long long)E);
  moe_tensor *index = moe_out(c, 0, 2, shape, MOE_i64), *xs = moe_dense(x, MOE_f64);
  if (!index || !xs) return moe_error_code();
  return MOE_RUN(moe_dev(x), c->op->name, assign, moe_data_i64(index), moe_data_f64(xs), mask ? moe_data(mask) : NULL,
                 x->shape[0], E, k, c->base);
}

/* args: logits, mask, iterations, tolerance */
moe_status moe_fwd_sinkhorn_price(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *mask;
  MOE_TRY(check(c, &mask));
  int64_t iterations = c->arg[2].i;
  double tolerance = c->arg[3].f;
  if (iterations < 1) return OP_FAIL(c, "iterations is %lld, wanted at least 1", (long long)iterations);
  if (!(tolerance >= 0)) return OP_FAIL(c, "tolerance must not be negative, got %g", tolerance);
  moe_dtype ct = moe_dtype_compute(x->dtype);
  moe_tensor *price = moe_out(c, 0, 1, &x->shape[1], ct), *xs = moe_dense(x, ct);
  if (!price || !xs) return moe_error_code();
  return MOE_RUN(moe_dev(x), c->op->name, sinkhorn, moe_data(price), moe_data(xs), mask ? moe_data(mask) : NULL,
                 x->shape[0], x->shape[1], iterations, tolerance, ct);
}
