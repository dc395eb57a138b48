/* Expert networks and grouped products over a routing's plan, and the moves between tokens and rows.
**
** A plan is the last tensor argument, a list: op/plan.h. Without one, expert_ffn is a dense network: one expert that
** has every token, through the same kernel. */
#include "op/plan.h"
#include "op/arg.h"

/* The plan of a call, and room for that of a dense one. */
typedef struct call_plan {
  moe_plan p;
  int64_t expert[1], start[2];
} call_plan;

static void plan_make(call_plan *cp, moe_tensor *const *lists, int64_t experts, int64_t tokens) {
  if (lists != NULL) {
    cp->p = moe_plan_of(lists, experts);
    return;
  }
  cp->expert[0] = 0;
  cp->start[0] = 0;
  cp->start[1] = tokens;
  cp->p = (moe_plan){.dense = true,
                     .tokens = tokens,
                     .experts = 1,
                     .rows = tokens,
                     .groups = tokens > 0,
                     .expert = cp->expert,
                     .start = cp->start};
}

static moe_tensor **lists_of(const moe_ctx *c, int i) {
  return c->arg[i].kind == MOE_K_tensors && c->arg[i].list.n == MOE_PLAN_LISTS ? c->arg[i].list.v : NULL;
}

static void save_lists(moe_ctx *c, moe_tensor **lists) {
  for (int k = 0; k < MOE_PLAN_LISTS; k++) moe_save(c, lists ? lists[k] : NULL);
}

/* Where gradients go: a fresh tensor of input i's shape in type `ct`, when it is wanted; gin takes it at the end. */
typedef struct want {
  moe_tensor *t;
  int slot;
} want;

static bool want_grad(moe_ctx *c, int arg, moe_dtype ct, want *w) {
  *w = (want){NULL, -1};
  if (c->arg[arg].kind != MOE_K_tensor || !c->need[c->slot[arg]]) return true;
  w->slot = c->slot[arg];
  const moe_meta *m = &c->in[w->slot];
  w->t = moe_empty(m->ndim, m->shape, ct, m->device);
  return w->t != NULL;
}

static moe_status give_grad(moe_ctx *c, want *w) { return w->slot < 0 ? MOE_OK : gin_set(c, w->slot, w->t); }
static void *data_or_null(moe_tensor *t) { return t ? moe_data(t) : NULL; }

/* --- expert_ffn(x, w_in, w_out, b_in?, b_out?, weight?, plan?, act, gated) --- */

enum { FFN_X, FFN_W_IN, FFN_W_OUT, FFN_B_IN, FFN_B_OUT, FFN_WEIGHT, FFN_PLAN, FFN_ACT, FFN_GATED };

static moe_status check_shape(moe_ctx *c, const char *name, const moe_tensor *t, int ndim,
                              const int64_t *want_shape) {
  bool ok = t->ndim == ndim;
  for (int d = 0; ok && d < ndim; d++) ok = t->shape[d] == want_shape[d];
  if (ok && moe_dtype_is_float(t->dtype)) return MOE_OK;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "%s is a %s tensor %s, wanted floats %s", name, moe_dtype_name(t->dtype),
                 moe_shape_of(a, t), moe_shape_text(b, ndim, want_shape));
}

static moe_status ffn_check(moe_ctx *c, moe_tensor *const *t, bool gated) {
  static const char *const names[] = {"x", "w_in", "w_out"};
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT], s[MOE_SHAPE_TEXT];
  for (int i = FFN_X; i <= FFN_W_OUT; i++)
    if (!moe_dtype_is_float(t[i]->dtype))
      return OP_FAIL(c, "%s must be of floats, got %s", names[i], moe_dtype_name(t[i]->dtype));
  const moe_tensor *x = t[FFN_X], *w_in = t[FFN_W_IN], *w_out = t[FFN_W_OUT];
  if (w_in->ndim != 3 || w_out->ndim != 3 || w_in->shape[0] != w_out->shape[0] ||
      w_in->shape[1] != (gated ? 2 : 1) * w_out->shape[2] || moe_numel(w_in) == 0 || moe_numel(w_out) == 0)
    return OP_FAIL(
        c, "weights do not fit each other: w_in is %s, w_out is %s, wanted [E, %sI, d] and [E, d_out, I]",
        moe_shape_of(a, w_in), moe_shape_of(b, w_out), gated ? "2*" : "");
  if (x->ndim < 1 || x->shape[x->ndim - 1] != w_in->shape[2])
    return OP_FAIL(c, "x is %s, but the experts take vectors of %lld (w_in is %s)", moe_shape_of(s, x),
                   (long long)w_in->shape[2], moe_shape_of(a, w_in));
  if (t[FFN_B_IN]) MOE_TRY(check_shape(c, "b_in", t[FFN_B_IN], 2, w_in->shape));
  if (t[FFN_B_OUT]) MOE_TRY(check_shape(c, "b_out", t[FFN_B_OUT], 2, w_out->shape));
  if (t[FFN_WEIGHT] && !moe_dtype_is_float(t[FFN_WEIGHT]->dtype))
    return OP_FAIL(c, "weight must be of floats, got %s", moe_dtype_name(t[FFN_WEIGHT]->dtype));
  return MOE_OK;
}

static void ffn_fill(moe_ffn *f, moe_tensor *const *t, const moe_plan *p, moe_dtype ct, int act, bool gated) {
  *f = (moe_ffn){.plan = *p,
                 .dtype = ct,
                 .act = act,
                 .gated = gated,
                 .d_in = t[FFN_W_IN]->shape[2],
                 .hidden = t[FFN_W_OUT]->shape[2],
                 .d_out = t[FFN_W_OUT]->shape[1],
                 .x = data_or_null(t[FFN_X]),
                 .w_in = moe_data(t[FFN_W_IN]),
                 .w_out = moe_data(t[FFN_W_OUT]),
                 .b_in = data_or_null(t[FFN_B_IN]),
                 .b_out = data_or_null(t[FFN_B_OUT]),
                 .weight = data_or_null(t[FFN_WEIGHT])};
}

moe_status moe_fwd_expert_ffn(moe_ctx *c) {
  moe_tensor *t[FFN_PLAN], **lists = lists_of(c, FFN_PLAN);
  for (int i = 0; i < FFN_PLAN; i++) t[i] = c->arg[i].kind == MOE_K_tensor ? c->arg[i].t : NULL;
  bool gated = c->arg[FFN_GATED].i != 0;
  MOE_TRY(ffn_check(c, t, gated));
  moe_tensor *x = t[FFN_X];
  moe_dtype dt = moe_dtype_promote(x->dtype, t[FFN_W_IN]->dtype), ct = moe_dtype_compute(dt);
  int64_t experts = t[FFN_W_IN]->shape[0], tokens = 1, shape[MOE_MAX_DIM];
  for (int d = 0; d < x->ndim; d++) shape[d] = x->shape[d];
  for (int d = 0; d + 1 < x->ndim; d++) tokens *= x->shape[d];
  shape[x->ndim - 1] = t[FFN_W_OUT]->shape[1];
  call_plan cp;
  plan_make(&cp, lists, experts, tokens);
  if (lists == NULL && (experts != 1 || t[FFN_WEIGHT]))
    return OP_FAIL(c, "%lld experts need a routing", (long long)experts);
  if (cp.p.tokens != tokens) {
    char s[MOE_SHAPE_TEXT];
    return OP_FAIL(c, "x is %s, that is %lld tokens, but the routing has %lld", moe_shape_of(s, x),
                   (long long)tokens, (long long)cp.p.tokens);
  }
  for (int i = 0; i < FFN_PLAN; i++)
    if (t[i] && (t[i] = moe_dense(t[i], ct)) == NULL) return moe_error_code();
  int64_t hshape[] = {cp.p.rows, t[FFN_W_IN]->shape[1]};
  moe_tensor *y = moe_out(c, 0, x->ndim, shape, dt);
  moe_tensor *r = y == NULL || dt == ct ? y : moe_empty(x->ndim, shape, ct, moe_dev(x));
  moe_tensor *h = c->record ? moe_empty(2, hshape, ct, moe_dev(x)) : NULL;
  if (r == NULL || (c->record && h == NULL)) return moe_error_code();
  moe_ffn f;
  ffn_fill(&f, t, &cp.p, ct, (int)c->arg[FFN_ACT].i, gated);
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, ffn, moe_data(r), data_or_null(h), &f));
  for (int i = 0; i < FFN_PLAN; i++) moe_save(c, t[i]);
  moe_save(c, h);
  save_lists(c, lists);
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_bwd_expert_ffn(moe_ctx *c) {
  moe_tensor **t = c->saved, *h = c->saved[FFN_PLAN],
             **lists = c->saved[FFN_PLAN + 1] ? c->saved + FFN_PLAN + 1 : NULL;
  moe_dtype ct = h->dtype;
  moe_tensor *g = moe_dense(c->gout[0], ct);
  if (g == NULL) return moe_error_code();
  want w[FFN_PLAN];
  for (int i = 0; i < FFN_PLAN; i++)
    if (!want_grad(c, i, ct, &w[i])) return moe_error_code();
  call_plan cp;
  plan_make(&cp, lists, t[FFN_W_IN]->shape[0], h->shape[0]);
  moe_ffn f;
  ffn_fill(&f, t, &cp.p, ct, (int)c->arg[FFN_ACT].i, c->arg[FFN_GATED].i != 0);
  MOE_TRY(MOE_RUN(moe_dev(h), c->op->name, ffn_bwd, data_or_null(w[FFN_X].t), data_or_null(w[FFN_W_IN].t),
                  data_or_null(w[FFN_W_OUT].t), data_or_null(w[FFN_B_IN].t), data_or_null(w[FFN_B_OUT].t),
                  data_or_null(w[FFN_WEIGHT].t), w[FFN_WEIGHT].t ? moe_numel(w[FFN_WEIGHT].t) : 0, moe_data(g),
                  moe_data(h), &f));
  for (int i = 0; i < FFN_PLAN; i++) MOE_TRY(give_grad(c, &w[i]));
  return MOE_OK;
}

/* --- expert_gather(x [T, d], plan) -> [A, d]; its transpose expert_combine(x [A, d], weight?, plan) -> [T, d] --- */

static moe_status rows_check(moe_ctx *c, const moe_tensor *x, int64_t n, const char *what) {
  if (x->ndim == 2 && x->shape[0] == n && moe_dtype_is_float(x->dtype)) return MOE_OK;
  char s[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "x is a %s tensor %s, wanted floats [%lld, d]: the routing has %lld %s",
                 moe_dtype_name(x->dtype), moe_shape_of(s, x), (long long)n, (long long)n, what);
}

/* y <- kernel over x; both of `ct`. */
static moe_status move(moe_ctx *c, moe_tensor *y, moe_tensor *x, moe_tensor *weight, const moe_plan *p,
                       bool gather) {
  moe_device *dev = moe_dev(y);
  if (moe_numel(y) == 0) return MOE_OK;
  return gather ? MOE_RUN(dev, c->op->name, route_gather, moe_data(y), moe_data(x), data_or_null(weight), p,
                          y->shape[1], y->dtype)
                : MOE_RUN(dev, c->op->name, route_combine, moe_data(y), moe_data(x), data_or_null(weight), p,
                          y->shape[1], y->dtype);
}

static moe_status move_fwd(moe_ctx *c, moe_tensor *weight, moe_tensor **lists, bool gather) {
  moe_tensor *x = c->arg[0].t;
  moe_plan p = moe_plan_of(lists, 0);
  MOE_TRY(rows_check(c, x, gather ? p.tokens : p.rows, gather ? "tokens" : "assignments"));
  moe_dtype dt = x->dtype, ct = moe_dtype_compute(dt);
  int64_t shape[] = {gather ? p.rows : p.tokens, x->shape[1]};
  moe_tensor *y = moe_out(c, 0, 2, shape, dt),
             *r = y == NULL || dt == ct ? y : moe_empty(2, shape, ct, moe_dev(x));
  moe_tensor *xs = moe_dense(x, ct), *w = weight ? moe_dense(weight, ct) : NULL;
  if (r == NULL || xs == NULL || (weight && w == NULL)) return moe_error_code();
  MOE_TRY(move(c, r, xs, w, &p, gather));
  moe_save(c, gather || !weight ? NULL : xs);
  moe_save(c, w);
  save_lists(c, lists);
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_fwd_expert_gather(moe_ctx *c) { return move_fwd(c, NULL, c->arg[1].list.v, true); }

moe_status moe_bwd_expert_gather(moe_ctx *c) {
  moe_dtype ct = moe_dtype_compute(c->in[0].dtype);
  moe_plan p = moe_plan_of(c->saved + 2, 0);
  moe_tensor *g = moe_dense(c->gout[0], ct);
  want w;
  if (g == NULL || !want_grad(c, 0, ct, &w) || w.t == NULL) return moe_error_code();
  MOE_TRY(move(c, w.t, g, NULL, &p, false));
  return give_grad(c, &w);
}

moe_status moe_fwd_expert_combine(moe_ctx *c) {
  moe_tensor *weight = c->arg[1].kind == MOE_K_tensor ? c->arg[1].t : NULL;
  return move_fwd(c, weight, c->arg[2].list.v, false);
}

moe_status moe_bwd_expert_combine(moe_ctx *c) {
  moe_tensor *x = c->saved[0], *weight = c->saved[1];
  moe_dtype ct = moe_dtype_compute(c->in[0].dtype);
  moe_plan p = moe_plan_of(c->saved + 2, 0);
  moe_tensor *g = moe_dense(c->gout[0], ct);
  want wx, ww;
  if (g == NULL || !want_grad(c, 0, ct, &wx) || !want_grad(c, 1, ct, &ww)) return moe_error_code();
  if (wx.t) MOE_TRY(move(c, wx.t, g, weight, &p, true));
  if (ww.t)
    MOE_TRY(MOE_RUN(moe_dev(g), c->op->name, route_dots, moe_data(ww.t), moe_numel(ww.t), moe_data(g),
                    moe_data(x), &p, g->shape[1], ct));
  MOE_TRY(give_grad(c, &wx));
  return give_grad(c, &ww);
}

/* --- expert_linear(x [A, k], w [E, n, k], b [E, n]?, plan) -> [A, n] --- */

moe_status moe_fwd_expert_linear(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *w = c->arg[1].t, *b = c->arg[2].kind == MOE_K_tensor ? c->arg[2].t : NULL,
             **lists = c->arg[3].list.v;
  int64_t experts = c->arg[4].i;
  moe_plan p = moe_plan_of(lists, experts);
  MOE_TRY(rows_check(c, x, p.rows, "assignments"));
  if (w->ndim != 3 || w->shape[0] != experts || w->shape[2] != x->shape[1] || !moe_dtype_is_float(w->dtype)) {
    char s[MOE_SHAPE_TEXT], r[MOE_SHAPE_TEXT];
    return OP_FAIL(c, "w is a %s tensor %s, wanted floats [%lld, n, %lld] for %lld experts and x %s",
                   moe_dtype_name(w->dtype), moe_shape_of(s, w), (long long)experts, (long long)x->shape[1],
                   (long long)experts, moe_shape_of(r, x));
  }
  if (b) MOE_TRY(check_shape(c, "b", b, 2, w->shape));
  moe_dtype dt = moe_dtype_promote(x->dtype, w->dtype), ct = moe_dtype_compute(dt);
  int64_t shape[] = {p.rows, w->shape[1]};
  if (moe_numel(w) == 0) {
    char s[MOE_SHAPE_TEXT];
    return OP_FAIL(c, "w is %s, wanted sizes of at least 1", moe_shape_of(s, w));
  }
  moe_tensor *y = moe_out(c, 0, 2, shape, dt),
             *r = y == NULL || dt == ct ? y : moe_empty(2, shape, ct, moe_dev(x));
  moe_tensor *xs = moe_dense(x, ct), *ws = moe_dense(w, ct), *bs = b ? moe_dense(b, ct) : NULL;
  if (r == NULL || xs == NULL || ws == NULL || (b && bs == NULL)) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, grouped_linear, moe_data(r), moe_data(xs), moe_data(ws),
                  data_or_null(bs), &p, w->shape[1], w->shape[2], ct));
  moe_save(c, xs);
  moe_save(c, ws);
  save_lists(c, lists);
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_bwd_expert_linear(moe_ctx *c) {
  moe_tensor *x = c->saved[0], *w = c->saved[1];
  moe_plan p = moe_plan_of(c->saved + 2, w->shape[0]);
  moe_tensor *g = moe_dense(c->gout[0], x->dtype);
  want wx, ww, wb;
  if (g == NULL || !want_grad(c, 0, x->dtype, &wx) || !want_grad(c, 1, x->dtype, &ww) ||
      !want_grad(c, 2, x->dtype, &wb))
    return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(g), c->op->name, grouped_linear_bwd, data_or_null(wx.t), data_or_null(ww.t),
                  data_or_null(wb.t), moe_data(g), moe_data(x), moe_data(w), &p, w->shape[1], w->shape[2],
                  x->dtype));
  MOE_TRY(give_grad(c, &wx));
  MOE_TRY(give_grad(c, &ww));
  return give_grad(c, &wb);
}
