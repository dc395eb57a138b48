/* Calling an operation: fill in defaults, run the forward in a scope with recording off, record. */
#include "op/op.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "autograd/graph.h"

moe_status moe_op_fail(const moe_ctx *c, moe_status code, const char *fmt, ...) {
  char text[768];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  return moe_fail(code, "%s%s: %s", c->op ? c->op->name : "call", c->inplace ? "_" : "", text);
}

/* --- for the writers of operations --- */

moe_tensor *moe_out(moe_ctx *c, int k, int ndim, const int64_t *shape, moe_dtype dtype) {
  moe_tensor *t;
  if (c->inplace && k == 0) {
    moe_tensor *x = c->inplace;
    bool fits = x->ndim == ndim && x->dtype == dtype;
    for (int i = 0; fits && i < ndim; i++) fits = x->shape[i] == shape[i];
    if (!fits) {
      char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
      OP_FAIL(c, "the result is %s %s and does not fit in place of %s %s", moe_dtype_name(dtype),
              moe_shape_text(a, ndim, shape), moe_dtype_name(x->dtype), moe_shape_of(b, x));
      return NULL;
    }
    t = moe_detach(x); /* an alias: what is saved of the old value stays apart from the new one */
  } else {
    t = moe_empty(ndim, shape, dtype, c->arg[0].kind == MOE_K_tensor ? moe_dev(c->arg[0].t) : moe_cpu());
  }
  if (t == NULL) return NULL;
  c->out[k] = t;
  if (c->nout <= k) c->nout = k + 1;
  return t;
}

moe_status moe_set_out(moe_ctx *c, int k, moe_tensor *t) {
  if (t == NULL) return moe_error_code();
  c->out[k] = t;
  if (c->nout <= k) c->nout = k + 1;
  return MOE_OK;
}

void moe_save(moe_ctx *c, moe_tensor *t) {
  if (!c->record) return;
  MOE_ASSERT(c->nsaved < MOE_MAX_SAVED);
  c->saved_version[c->nsaved] = t ? t->storage->version : 0;
  c->saved[c->nsaved++] = t;
}

moe_tensor *moe_unbroadcast(moe_tensor *g, const moe_meta *to) {
  if (g == NULL) return NULL;
  bool same = g->ndim == to->ndim;
  for (int i = 0; same && i < g->ndim; i++) same = g->shape[i] == to->shape[i];
  if (!same) {
    int64_t dims[MOE_MAX_DIM];
    int n = 0, lead = g->ndim - to->ndim;
    for (int i = 0; i < g->ndim; i++)
      if (i < lead || (to->shape[i - lead] == 1 && g->shape[i] != 1)) dims[n++] = i;
    if (n > 0) g = MOE_CALL(sum, T(g), INTS(dims, n), I(true));
    if (lead > 0) g = MOE_CALL(reshape, T(g), INTS(to->shape, to->ndim));
  }
  if (g && g->dtype != to->dtype) g = MOE_CALL(cast, T(g), I(to->dtype));
  return g;
}

int moe_arg_dim(moe_ctx *c, int i, int ndim) {
  int64_t d = c->arg[i].i, n = ndim > 0 ? ndim : 1;
  if (d >= -n && d < n) return (int)(d < 0 ? d + n : d);
  OP_FAIL(c, "dim %lld is out of range for a tensor of %d dimensions", (long long)(d < 0 ? d : d + 1), ndim);
  return -1;
}

bool moe_arg_dims(moe_ctx *c, int i, int ndim, bool *flag) {
  const moe_value *v = &c->arg[i];
  int64_t n = ndim > 0 ? ndim : 1;
  memset(flag, v->kind == MOE_K_none, (size_t)n);
  if (v->kind == MOE_K_none) return true;
  int64_t one = v->i;
  const int64_t *list = v->kind == MOE_K_ints || v->kind == MOE_K_dims ? v->ints.v : &one;
  int count = v->kind == MOE_K_ints || v->kind == MOE_K_dims ? v->ints.n : 1;
  for (int k = 0; k < count; k++) {
    int64_t d = list[k];
    if (d < -n || d >= n) {
      OP_FAIL(c, "dim %lld is out of range for a tensor of %d dimensions", (long long)(d < 0 ? d : d + 1), ndim);
      return false;
    }
    if (d < 0) d += n;
    if (flag[d]) {
      OP_FAIL(c, "dim %lld appears twice", (long long)(d + 1));
      return false;
    }
    flag[d] = true;
  }
  return true;
}

/* --- the call --- */

static inline bool is_tensor_kind(moe_kind k) { return k == MOE_K_tensor || k == MOE_K_operand || k == MOE_K_index; }

/* A value of a list kind given as one number, and numbers given where the other number kind is wanted. */
static void adapt(moe_value *v, moe_kind want) {
  if (v->kind == MOE_K_int && (want == MOE_K_number || want == MOE_K_operand)) {
    v->f = (double)v->i;
    v->is_int = true;
    v->kind = MOE_K_number;
  } else if (v->kind == MOE_K_number && want != MOE_K_number && want != MOE_K_operand && want != MOE_K_tensor) {
    v->i = (int64_t)v->f;
    v->kind = want;
  } else if (v->kind != MOE_K_none && want != MOE_K_operand && v->kind != MOE_K_tensor && v->kind != MOE_K_tensors &&
             want != MOE_K_dims && want != MOE_K_ints) {
    v->kind = want;
  }
}

static moe_status missing(const moe_op *op, const moe_param *p) {
  if (moe_error_code() != MOE_OK && p->kind != MOE_K_number) return moe_error_code(); /* NULL from a failed call */
  return moe_fail(MOE_EINVAL, "%s: argument '%s' is missing", op->name, p->name);
}

static moe_status same_device(const moe_op *op, moe_device **dev, moe_tensor *t) {
  if (*dev == NULL) *dev = moe_dev(t);
  else if (*dev != moe_dev(t))
    return moe_fail(MOE_EDEVICE, "%s: tensors on different devices: %s and %s", op->name, (*dev)->name, moe_dev(t)->name);
  return MOE_OK;
}

/* What an in-place call may not touch. */
static moe_status check_inplace(moe_ctx *c, bool record) {
  moe_tensor *x = c->inplace;
  if (moe_grad_enabled() && x->requires_grad && x->node == NULL)
    return OP_FAIL(c, "a leaf that requires a gradient cannot be changed in place (wrap it in moe.no_grad)");
  if (record && x->is_view)
    return OP_FAIL(c, "a view cannot be changed in place while autograd records (use the form without '_')");
  for (int i = 0; i < x->ndim; i++)
    if (x->stride[i] == 0 && x->shape[i] > 1)
      return OP_FAIL(c, "an expanded tensor cannot be changed in place (several elements share one place; use :clone())");
  return MOE_OK;
}

/* A result that should carry a gradient but cannot. */
static moe_status check_differentiable(moe_ctx *c) {
  for (int k = 0; k < c->nout; k++)
    if (c->out[k] && moe_dtype_is_float(c->out[k]->dtype))
      return OP_FAIL(c, "has no gradient; use moe.no_grad or x:detach() if none is wanted");
  return MOE_OK;
}

/* moe.autocast: recorded casts go before the call, so that gradients come back in the arguments' own type. */
static bool has_f32(const moe_value *v, int n) {
  for (int i = 0; i < n; i++)
    if (v[i].kind == MOE_K_tensor && v[i].t->dtype == MOE_f32) return true;
  return false;
}

static moe_status call_autocast(const moe_op *op, int base, bool inplace, moe_value *v, int n, moe_tensor **outs, int *nouts,
                                moe_dtype dtype) {
  for (int i = inplace; i < n; i++)
    if (v[i].kind == MOE_K_tensor && v[i].t->dtype == MOE_f32) {
      v[i].t = MOE_CALL(cast, T(v[i].t), I(dtype));
      if (v[i].t == NULL) return moe_error_code();
    }
  moe_env *env = moe_env_now();
  int outer = env->autocast;
  env->autocast = 0;
  moe_status st = moe_call(op, base, inplace, v, n, outs, nouts);
  env->autocast = outer;
  return st;
}

moe_status moe_call(const moe_op *op, int base, bool inplace, const moe_value *args, int nargs, moe_tensor **outs, int *nouts) {
  const moe_signature *sig = moe_op_signature(op);
  moe_value full[MOE_MAX_PARAM];
  moe_ctx c;
  c.op = op;
  c.base = base;
  c.nargs = sig->nparams;
  c.arg = full;
  c.nout = c.nsaved = 0;
  c.inplace = NULL;
  memset(c.out, 0, sizeof(moe_tensor *) * (size_t)(sig->nresults > 0 ? sig->nresults : MOE_MAX_OUT));
  memset(c.user, 0, sizeof c.user);
  bool wants = false;
  moe_device *dev = NULL;
  for (int i = 0; i < sig->nparams; i++) {
    const moe_param *p = &sig->param[i];
    full[i] = i < nargs ? args[i] : (moe_value){.kind = MOE_K_none};
    moe_value *v = &full[i];
    if (v->kind == MOE_K_tensor && v->t == NULL) v->kind = MOE_K_none;
    if (v->kind == MOE_K_none) {
      if (!p->optional) return missing(op, p);
      *v = p->def;
      continue;
    }
    if (is_tensor_kind(p->kind)) {
      if (v->kind == MOE_K_tensor) {
        MOE_TRY(same_device(op, &dev, v->t));
        wants |= v->t->requires_grad;
      } else if (p->kind == MOE_K_operand) {
        adapt(v, p->kind);
      } else {
        return moe_fail(MOE_EINVAL, "%s: argument '%s' must be a tensor", op->name, p->name);
      }
    } else if (p->kind == MOE_K_tensors) {
      for (int k = 0; k < v->list.n; k++) {
        if (v->list.v[k] == NULL) return missing(op, p);
        MOE_TRY(same_device(op, &dev, v->list.v[k]));
        wants |= v->list.v[k]->requires_grad;
      }
    } else {
      adapt(v, p->kind);
    }
  }
  moe_env *env = moe_env_now();
  if (env->autocast && (op->flags & MOE_F_AUTOCAST) && has_f32(full, sig->nparams))
    return call_autocast(op, base, inplace, full, sig->nparams, outs, nouts, (moe_dtype)env->autocast);
  bool recording = wants && !env->grad_off;
  c.record = recording && op->backward != NULL;
  if (inplace) {
    c.inplace = full[0].t;
    MOE_TRY(check_inplace(&c, recording));
  }
  moe_scope scope = moe_scope_open();
  bool outer = env->grad_off;
  if (!(op->flags & MOE_F_COMPOSED)) env->grad_off = true;
  moe_status st = op->forward(&c);
  env->grad_off = outer;
  if (st == MOE_OK && inplace) moe_touch(c.inplace);
  if (st == MOE_OK && recording && !(op->flags & MOE_F_COMPOSED))
    st = op->backward ? moe_record(&c) : check_differentiable(&c);
  if (st != MOE_OK) {
    moe_scope_close(scope);
    moe_fail_name(op->name); /* the makers of tensors do not know whose was too large */
    return st;
  }
  if (inplace && c.out[0] != c.inplace) { /* the alias hands its history over */
    moe_tensor *a = c.out[0], *x = c.inplace;
    if (a->node) {
      struct moe_node *old = x->node;
      x->node = a->node;
      x->node_out = a->node_out;
      x->requires_grad = true;
      x->carries_lua = a->carries_lua;
      a->node = NULL;
      if (old) moe_node_release(old);
    }
    c.out[0] = x;
  }
  for (int k = 0; k < c.nout; k++) moe_retain(c.out[k]);
  moe_scope_close(scope);
  for (int k = 0; k < c.nout; k++) {
    outs[k] = moe_scoped(c.out[k]);
    if (outs[k] == NULL && c.out[k] != NULL) {
      for (int j = k + 1; j < c.nout; j++) moe_release(c.out[j]);
      return moe_error_code();
    }
  }
  if (nouts) *nouts = c.nout;
  return MOE_OK;
}

/* A tensor argument that is NULL although the call needs it: an earlier call failed, its error stands. */
static bool failed_before(const moe_op *op, const moe_value *args, int nargs) {
  const moe_signature *sig = moe_op_signature(op);
  for (int i = 0; i < nargs && i < sig->nparams; i++)
    if (args[i].kind == MOE_K_tensor && args[i].t == NULL && !sig->param[i].optional) return true;
  return false;
}

moe_tensor *moe_call1(moe_op_id id, const moe_value *args, int nargs) {
  moe_tensor *outs[MOE_MAX_OUT];
  if (failed_before(&moe_ops[id], args, nargs)) return NULL;
  return moe_call(&moe_ops[id], 0, false, args, nargs, outs, NULL) == MOE_OK ? outs[0] : NULL;
}

moe_status moe_calln(moe_op_id id, const moe_value *args, int nargs, moe_tensor **outs) {
  if (failed_before(&moe_ops[id], args, nargs)) return moe_error_code();
  return moe_call(&moe_ops[id], 0, false, args, nargs, outs, NULL);
}
