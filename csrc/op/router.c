/* router_topk: from logits to the chosen experts and their weights, in the one order of steps that all published
** routers are cases of: scores of the logits -> + selection bias -> mask groups -> choose -> gather the unbiased
** scores -> normalise -> scale. Sources: Mixtral and Qwen (softmax, normalised), DeepSeek-V3 (arXiv 2412.19437:
** sigmoid, bias, groups, normalised, scaled), Granite and SonicMoE (softmax over the chosen). */
#include "op/op.h"
#include "tensor/plan.h"

enum { LOGITS, BIAS, MASK, TOP_K, SCORE, SCORE_AFTER, N_GROUP, TOPK_GROUP, GROUP_TOP, NORM, SCALE, CHOICE };

static void options_of(const moe_ctx *c, int64_t tokens, int64_t experts, moe_topk_options *o) {
  const moe_value *a = c->arg;
  *o = (moe_topk_options){.tokens = tokens,
                          .experts = experts,
                          .top_k = a[TOP_K].i,
                          .score = (int)a[SCORE].i,
                          .score_after = a[SCORE_AFTER].i != 0,
                          .normalise = a[NORM].i != 0,
                          .n_group = a[N_GROUP].i,
                          .topk_group = a[TOPK_GROUP].i,
                          .group_top = a[GROUP_TOP].i,
                          .scale = a[SCALE].f};
  if (o->group_top == 0)
    o->group_top = MOE_MAX(1, o->top_k / MOE_MAX(1, o->topk_group)); /* DeepSeek-V3: 8 / 4 */
}

static moe_status check(moe_ctx *c, const moe_topk_options *o) {
  long long E = o->experts, k = o->top_k, g = o->n_group;
  if (k < 1 || k > E) return OP_FAIL(c, "top_k is %lld, wanted 1 to %lld (the number of experts)", k, E);
  if (g < 1 || E % g != 0) return OP_FAIL(c, "n_group is %lld, wanted a divisor of the %lld experts", g, E);
  if (o->topk_group < 1 || o->topk_group > g)
    return OP_FAIL(c, "topk_group is %lld, wanted 1 to n_group = %lld", (long long)o->topk_group, g);
  if (o->group_top < 1 || o->group_top > E / g)
    return OP_FAIL(c, "group_top is %lld, wanted 1 to the %lld experts of a group", (long long)o->group_top,
                   E / g);
  if (k > o->topk_group * (E / g))
    return OP_FAIL(c,
                   "top_k is %lld, but topk_group = %lld groups of %lld experts leave only %lld to choose from",
                   k, (long long)o->topk_group, E / g, (long long)o->topk_group * (E / g));
  if (o->normalise && k == 1)
    return OP_FAIL(
        c,
        "norm_topk_prob with top_k = 1 makes every weight 1 and cuts the router off from its gradient; "
        "set norm_topk_prob = false");
  if (o->scale != o->scale || o->scale - o->scale != 0)
    return OP_FAIL(c, "routed_scaling_factor must be finite");
  return MOE_OK;
}

moe_status moe_fwd_router_topk(moe_ctx *c) {
  moe_tensor *x = c->arg[LOGITS].t, *bias = c->arg[BIAS].kind == MOE_K_tensor ? c->arg[BIAS].t : NULL;
  moe_tensor *mask = c->arg[MASK].kind == MOE_K_tensor ? c->arg[MASK].t : NULL;
  char s[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (x->ndim != 2 || x->shape[1] < 1 || !moe_dtype_is_float(x->dtype))
    return OP_FAIL(c, "logits is a %s tensor %s, wanted floats [tokens, experts]", moe_dtype_name(x->dtype),
                   moe_shape_of(s, x));
  int64_t T = x->shape[0], E = x->shape[1];
  if (bias && (bias->ndim != 1 || bias->shape[0] != E || !moe_dtype_is_float(bias->dtype)))
    return OP_FAIL(c, "bias is a %s tensor %s, wanted floats [%lld]: logits is %s", moe_dtype_name(bias->dtype),
                   moe_shape_of(b, bias), (long long)E, moe_shape_of(s, x));
  if (mask && (moe_numel(mask) != T || moe_dtype_is_float(mask->dtype)))
    return OP_FAIL(c, "mask is a %s tensor %s, wanted bool [%lld]: logits is %s", moe_dtype_name(mask->dtype),
                   moe_shape_of(b, mask), (long long)T, moe_shape_of(s, x));
  moe_topk_options o;
  options_of(c, T, E, &o);
  MOE_TRY(check(c, &o));
  moe_tensor *choice = c->arg[CHOICE].kind == MOE_K_tensor ? c->arg[CHOICE].t : NULL;
  if (choice) {
    if (choice->ndim != 2 || choice->shape[0] != T || choice->shape[1] != o.top_k)
      return OP_FAIL(c, "choice is %s, wanted [%lld, %lld]", moe_shape_of(b, choice), (long long)T,
                     (long long)o.top_k);
    if ((choice = moe_dense(choice, MOE_i64)) == NULL) return moe_error_code();
    o.forced = moe_data_i64(choice);
  }
  moe_dtype ct = moe_dtype_compute(x->dtype);
  int64_t shape[] = {T, o.top_k};
  /* A router decides in f32 at least, whatever its logits are stored in. */
  moe_tensor *weight = moe_out(c, 0, 2, shape, ct), *index = moe_out(c, 1, 2, shape, MOE_i64),
             *score = moe_out(c, 2, 2, x->shape, ct);
  moe_tensor *xs = moe_dense(x, ct), *bs = bias ? moe_dense(bias, ct) : NULL,
             *ms = mask ? moe_dense(mask, MOE_bool) : NULL;
  if (!weight || !index || !score || !xs || (bias && !bs) || (mask && !ms)) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, router_topk, moe_data(weight), moe_data_i64(index), moe_data(score),
                  moe_data(xs), bs ? moe_data(bs) : NULL, ms ? moe_data(ms) : NULL, &o, ct, c->base));
  moe_save(c, weight);
  moe_save(c, index);
  moe_save(c, score);
  moe_save(c, ms);
  return MOE_OK;
}

moe_status moe_bwd_router_topk(moe_ctx *c) {
  moe_tensor *weight = c->saved[0], *index = c->saved[1], *score = c->saved[2], *mask = c->saved[3];
  if (!c->need[0]) return MOE_OK; /* the bias takes no gradient: it moves choices alone */
  moe_dtype ct = score->dtype;
  moe_topk_options o;
  options_of(c, score->shape[0], score->shape[1], &o);
  moe_tensor *gw = c->gout[0] ? moe_dense(c->gout[0], ct) : NULL,
             *gs = c->gout[2] ? moe_dense(c->gout[2], ct) : NULL;
  moe_tensor *g = moe_empty_like(score);
  if ((c->gout[0] && !gw) || (c->gout[2] && !gs) || !g) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(score), c->op->name, router_topk_bwd, moe_data(g), gw ? moe_data(gw) : NULL,
                  gs ? moe_data(gs) : NULL, moe_data(score), moe_data(weight), moe_data_i64(index),
                  mask ? moe_data(mask) : NULL, &o, ct, c->base));
  if (c->in[0].dtype != ct) g = MOE_CALL(cast, T(g), I(c->in[0].dtype));
  c->gin[0] = g;
  return g ? MOE_OK : moe_error_code();
}
