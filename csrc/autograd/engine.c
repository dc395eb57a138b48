/* The walk: nodes in descending order of their numbers, which is an order in which every gradient is
** complete before it is used. Nothing recurses on the depth of the graph, and sums are made in a fixed order.
*/
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/graph.h"
#include "autograd/rows.h"

typedef struct leaf_sum {
  moe_tensor *leaf, *sum; /* owned */
} leaf_sum;

typedef struct walk {
  uint64_t mark;
  moe_node **node;
  int64_t n, cap;
  unsigned flags;
  /* moe_grad: what is asked for; NULL under moe_backward, which feeds leaves' .grad */
  moe_tensor **target;
  int ntarget;
  moe_tensor **result; /* owned */
  leaf_sum *leaf;      /* leaves with hooks: their sums wait for the end */
  int nleaf, leafcap;
} walk;

static _Atomic uint64_t marks;

static const char *name_of(const moe_node *n) { return n->op ? n->op->name : n->custom.name; }

/* --- collecting --- */

static moe_status visit(walk *w, moe_node *n) {
  if (n == NULL || n->mark == w->mark) return MOE_OK;
  if (n->grad != NULL)
    return moe_fail(MOE_EINVAL, "backward: this graph is being walked already (backward inside of its own backward)");
  if (w->n == w->cap) {
    int64_t cap = w->cap ? w->cap * 2 : 256;
    moe_node **p = realloc(w->node, (size_t)cap * sizeof *p);
    if (p == NULL) return moe_fail(MOE_ENOMEM, "backward: out of memory");
    w->node = p;
    w->cap = cap;
  }
  n->mark = w->mark;
  moe_node_retain(n);
  w->node[w->n++] = n;
  return MOE_OK;
}

static int newest_first(const void *a, const void *b) {
  uint64_t x = (*(moe_node *const *)a)->seq, y = (*(moe_node *const *)b)->seq;
  return x < y ? 1 : x > y ? -1 : 0;
}

static moe_status collect(walk *w, moe_tensor **root, int nroot) {
  for (int i = 0; i < nroot; i++) MOE_TRY(visit(w, root[i]->node));
  for (int64_t k = 0; k < w->n; k++) /* the list grows while it is read */
    for (int i = 0; i < w->node[k]->nin; i++) MOE_TRY(visit(w, w->node[k]->edge[i].node));
  if (w->n > 1) qsort(w->node, (size_t)w->n, sizeof *w->node, newest_first);
  for (int64_t k = 0; k < w->n; k++) {
    moe_node *n = w->node[k];
    n->grad = calloc((size_t)n->nout + 1, sizeof *n->grad);
    if (n->grad == NULL) return moe_fail(MOE_ENOMEM, "backward: out of memory");
  }
  return MOE_OK;
}

/* Under moe_grad only paths that reach a target are walked: need[] is cut down to them; oldest first. */
static bool reaches(const walk *w, const moe_edge *e) {
  for (int i = 0; i < w->ntarget; i++) {
    const moe_tensor *t = w->target[i];
    if (e->leaf == t && t->node == NULL) return true;
    if (e->node && e->node == t->node && e->out == t->node_out) return true;
  }
  return e->node && e->node->grad && e->node->grad[e->node->nout] != NULL;
}

static void prune(walk *w) {
  for (int64_t k = w->n - 1; k >= 0; k--) {
    moe_node *n = w->node[k];
    bool any = false;
    for (int i = 0; i < n->nin; i++) {
      n->need[i] = (n->edge[i].node || n->edge[i].leaf) && reaches(w, &n->edge[i]);
      any |= n->need[i];
    }
    /* one place more than results: marks "leads to a target"; any non-NULL pointer serves, it is never followed */
    n->grad[n->nout] = any ? w->target[0] : NULL;
  }
}

/* --- sums --- */

/* Nobody else can see it, and each element has a place of its own (an expanded gradient has not). */
static bool ours_alone(const moe_tensor *t) { return t->refs == 1 && t->storage->refs == 1 && moe_is_contiguous(t); }

/* *slot += g. Takes a reference of g. The sum is made in place when nobody else can see it. */
static moe_status accumulate(moe_tensor **slot, moe_tensor *g, unsigned flags) {
  if (*slot == NULL) {
    *slot = moe_retain(g);
    return MOE_OK;
  }
  moe_tensor *old = *slot, *sum;
  const moe_value args[] = {T(old), T(g)};
  if (!(flags & MOE_BACKWARD_CREATE) && ours_alone(old) && old->dtype == g->dtype) {
    moe_tensor *out[MOE_MAX_OUT];
    return moe_call(&moe_ops[MOE_OP_add], 0, true, args, 2, out, NULL);
  }
  sum = moe_retain(moe_call1(MOE_OP_add, args, 2));
  if (sum == NULL) return moe_error_code();
  moe_release(old);
  *slot = sum;
  return MOE_OK;
}

/* A leaf's .grad lives on: it must not share memory with anything. */
static moe_status feed_leaf(moe_tensor *leaf, moe_tensor *g, unsigned flags) {
  if (leaf->grad != NULL) {
    if (moe_is_rows(g)) return moe_rows_add(leaf, g);
    if (moe_is_rows(leaf->grad)) {
      moe_tensor *dense = moe_grad_dense(leaf);
      if (dense == NULL) return moe_error_code();
      moe_release(leaf->grad);
      leaf->grad = moe_retain(dense);
    }
    if (flags & MOE_BACKWARD_CREATE) return accumulate(&leaf->grad, g, flags);
    moe_tensor *out[MOE_MAX_OUT];
    return moe_call(&moe_ops[MOE_OP_add], 0, true, (const moe_value[]){T(leaf->grad), T(g)}, 2, out, NULL);
  }
  if (!(flags & MOE_BACKWARD_CREATE) && (!ours_alone(g) || !moe_is_contiguous(g) || g->node)) {
    moe_tensor *copy = moe_empty_like(g);
    if (copy == NULL) return moe_error_code();
    MOE_TRY(moe_copy(copy, g));
    copy->rows = moe_retain(g->rows);
    g = copy;
  }
  leaf->grad = moe_retain(g);
  return MOE_OK;
}

static moe_status run_hooks(moe_hook *h, moe_tensor **g) {
  for (; h; h = h->next) {
    moe_tensor *r = h->call(h->ud, *g);
    if (r == NULL) return moe_error_code();
    if (r == *g) continue;
    if (!moe_same_shape(r, *g)) {
      char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
      return moe_fail(MOE_EINVAL, "hook: returned a gradient of shape %s where %s was given", moe_shape_of(a, r),
                      moe_shape_of(b, *g));
    }
    moe_retain(r);
    moe_release(*g);
    *g = r;
  }
  return MOE_OK;
}

static moe_status to_leaf(walk *w, moe_tensor *leaf, moe_tensor *g) {
  if (w->target == NULL && leaf->hooks == NULL) return feed_leaf(leaf, g, w->flags);
  int i = 0;
  while (i < w->nleaf && w->leaf[i].leaf != leaf) i++;
  if (i == w->nleaf) {
    if (w->nleaf == w->leafcap) {
      int cap = w->leafcap ? w->leafcap * 2 : 16;
      leaf_sum *p = realloc(w->leaf, (size_t)cap * sizeof *p);
      if (p == NULL) return moe_fail(MOE_ENOMEM, "backward: out of memory");
      w->leaf = p;
      w->leafcap = cap;
    }
    w->leaf[w->nleaf++] = (leaf_sum){moe_retain(leaf), NULL};
  }
  return accumulate(&w->leaf[i].sum, g, w->flags);
}

static moe_status finish_leaves(walk *w) {
  for (int i = 0; i < w->nleaf; i++) {
    leaf_sum *l = &w->leaf[i];
    if (l->sum == NULL) continue;
    moe_scope s = moe_scope_open();
    moe_status st = run_hooks(l->leaf->hooks, &l->sum);
    if (st == MOE_OK && w->target == NULL) st = feed_leaf(l->leaf, l->sum, w->flags);
    moe_scope_close(s);
    MOE_TRY(st);
    for (int k = 0; k < w->ntarget; k++)
      if (w->target[k] == l->leaf && w->target[k]->node == NULL) w->result[k] = moe_retain(l->sum);
  }
  return MOE_OK;
}

/* --- one node --- */

/* Saved values as the backward sees them. Under create_graph a saved result gets its node back. */
static moe_status unpack(moe_node *n, moe_ctx *c, bool create) {
  if (n->released)
    return moe_fail(MOE_EINVAL,
                    "backward: what '%s' saved was freed by an earlier backward (pass retain_graph = true to the first one)",
                    name_of(n));
  for (int i = 0; i < n->nsaved; i++) {
    moe_tensor *t = n->saved[i];
    if (t && t->storage->version != n->saved_version[i])
      return moe_fail(MOE_EINVAL, "backward: a tensor that '%s' needs for its gradient was changed in place afterwards",
                      name_of(n));
    if (create && t && n->saved_out[i] >= 0) {
      if ((t = moe_detach(t)) == NULL) return moe_error_code();
      t->node = n;
      t->node_out = n->saved_out[i];
      t->requires_grad = true;
      moe_node_retain(n);
    }
    c->saved[i] = t;
  }
  c->nsaved = n->nsaved;
  return MOE_OK;
}

static moe_status check_gin(const moe_node *n, int i, const moe_tensor *g) {
  const moe_meta *m = &n->in[i];
  bool same = g->ndim == m->ndim && g->dtype == m->dtype;
  for (int d = moe_is_rows(g); same && d < g->ndim; d++) same = g->shape[d] == m->shape[d];
  if (same) return MOE_OK;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  return moe_fail(MOE_EINVAL, "backward: '%s' gave a gradient %s %s for its input %d, which is %s %s", name_of(n),
                  moe_dtype_name(g->dtype), moe_shape_of(a, g), i + 1, moe_dtype_name(m->dtype),
                  moe_shape_text(b, m->ndim, m->shape));
}

static moe_status run_node(walk *w, moe_node *n, moe_tensor **gin) {
  bool any = false;
  for (int k = 0; k < n->nout; k++) {
    if (n->grad[k] == NULL) continue;
    any = true;
    if (n->out_hooks) MOE_TRY(run_hooks(n->out_hooks[k], &n->grad[k]));
    for (int i = 0; i < w->ntarget; i++)
      if (w->target[i]->node == n && w->target[i]->node_out == k) w->result[i] = moe_retain(n->grad[k]);
  }
  if (!any || (w->target && n->grad[n->nout] == NULL)) return MOE_OK;
  moe_ctx c;
  memset(c.out, 0, sizeof c.out[0]);
  c.op = n->op;
  c.base = n->base;
  c.nargs = n->nargs;
  c.arg = n->arg;
  c.inplace = NULL;
  c.record = false;
  memcpy(c.slot, n->slot, sizeof c.slot);
  memcpy(c.user, n->user, sizeof c.user);
  c.nin = n->nin;
  c.in = n->in;
  c.need = n->need;
  c.nout = n->nout;
  c.gout = n->grad;
  c.outs = n->outs;
  c.gin = gin;
  memset(gin, 0, sizeof *gin * (size_t)n->nin);
  MOE_TRY(unpack(n, &c, w->flags & MOE_BACKWARD_CREATE));
  if (n->op == NULL) c.user[0] = (int64_t)(intptr_t)n->custom.ud;
  MOE_TRY(n->op ? n->op->backward(&c) : n->custom.backward(&c));
  for (int i = 0; i < n->nin; i++) {
    moe_tensor *g = gin[i];
    if (g == NULL || !n->need[i]) continue;
    MOE_TRY(check_gin(n, i, g));
    moe_edge *e = &n->edge[i];
    bool plain_leaf = w->target == NULL && e->leaf && e->leaf->hooks == NULL;
    if (!plain_leaf && (g = moe_rows_dense(g, &n->in[i])) == NULL) return moe_error_code();
    if (e->node) MOE_TRY(accumulate(&e->node->grad[e->out], g, w->flags));
    else if (e->leaf) MOE_TRY(to_leaf(w, e->leaf, g));
  }
  return MOE_OK;
}

static void drop_grads(moe_node *n) {
  if (n->grad == NULL) return;
  for (int k = 0; k < n->nout; k++) moe_release(n->grad[k]);
  free(n->grad);
  n->grad = NULL;
}

static moe_status run_all(walk *w) {
  moe_env *env = moe_env_now();
  bool outer = env->grad_off;
  int most = 1;
  for (int64_t k = 0; k < w->n; k++) most = MOE_MAX(most, w->node[k]->nin);
  moe_tensor **gin = malloc(sizeof *gin * (size_t)most);
  if (gin == NULL) return moe_fail(MOE_ENOMEM, "backward: out of memory");
  env->grad_off = !(w->flags & MOE_BACKWARD_CREATE);
  moe_status st = MOE_OK;
  for (int64_t k = 0; k < w->n && st == MOE_OK; k++) {
    moe_node *n = w->node[k];
    moe_scope s = moe_scope_open();
    st = run_node(w, n, gin);
    bool used = st == MOE_OK && !(w->target && n->grad[n->nout] == NULL);
    drop_grads(n);
    if (used && !(w->flags & MOE_BACKWARD_RETAIN)) moe_node_free_saved(n);
    moe_scope_close(s);
  }
  if (st == MOE_OK) st = finish_leaves(w);
  env->grad_off = outer;
  free(gin);
  return st;
}

/* --- entries --- */

static moe_status check_roots(const char *name, moe_tensor **root, moe_tensor **grad, int n) {
  for (int i = 0; i < n; i++) {
    if (!root[i]->requires_grad)
      return moe_fail(MOE_EINVAL, "%s: the tensor has no gradient (nothing that it was made of has requires_grad)", name);
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
    if ((grad == NULL || grad[i] == NULL) && moe_numel(root[i]) != 1)
      return moe_fail(MOE_EINVAL, "%s: a gradient must be given for a tensor of shape %s (only one element needs none)", name,
                      moe_shape_of(a, root[i]));
    if (grad && grad[i] && !moe_same_shape(grad[i], root[i]))
      return moe_fail(MOE_EINVAL, "%s: the gradient has shape %s, the tensor %s", name, moe_shape_of(a, grad[i]),
                      moe_shape_of(b, root[i]));
  }
  return MOE_OK;
}

static moe_status seed(walk *w, moe_tensor **root, moe_tensor **grad, int nroot) {
  for (int i = 0; i < nroot; i++) {
    moe_tensor *r = root[i], *g = grad ? grad[i] : NULL;
    if (g == NULL) g = moe_full(r->ndim, r->shape, r->dtype, moe_dev(r), 1);
    else if (g->dtype != r->dtype) g = moe_to_raw(g, r->dtype, moe_dev(r));
    if (g == NULL) return moe_error_code();
    if (r->node) MOE_TRY(accumulate(&r->node->grad[r->node_out], g, w->flags));
    else MOE_TRY(to_leaf(w, r, g));
  }
  return MOE_OK;
}

static moe_status walk_graph(walk *w, moe_tensor **root, moe_tensor **grad, int nroot) {
  w->mark = atomic_fetch_add(&marks, 1) + 1;
  moe_scope s = moe_scope_open();
  moe_status st = collect(w, root, nroot);
  if (st == MOE_OK) {
    if (w->target) prune(w);
    st = seed(w, root, grad, nroot);
  }
  if (st == MOE_OK) st = run_all(w);
  moe_scope_close(s);
  for (int64_t k = 0; k < w->n; k++) {
    moe_node *n = w->node[k];
    drop_grads(n);
    for (int i = 0; w->target && i < n->nin; i++) n->need[i] = n->edge[i].node || n->edge[i].leaf; /* undo prune */
  }
  return st;
}

static void walk_free(walk *w) {
  for (int64_t k = 0; k < w->n; k++) moe_node_release(w->node[k]);
  free(w->node);
  for (int i = 0; i < w->nleaf; i++) {
    moe_release(w->leaf[i].leaf);
    moe_release(w->leaf[i].sum);
  }
  free(w->leaf);
}

moe_status moe_backward(moe_tensor **root, moe_tensor **grad, int n, unsigned flags) {
  if (flags & MOE_BACKWARD_CREATE) flags |= MOE_BACKWARD_RETAIN;
  MOE_TRY(check_roots("backward", root, grad, n));
  walk w = {.flags = flags};
  moe_status st = walk_graph(&w, root, grad, n);
  walk_free(&w);
  return st;
}

moe_status moe_grad(moe_tensor **root, moe_tensor **grad, int n, moe_tensor **in, int nin, unsigned flags, moe_tensor **out) {
  if (flags & MOE_BACKWARD_CREATE) flags |= MOE_BACKWARD_RETAIN;
  MOE_TRY(check_roots("grad", root, grad, n));
  for (int i = 0; i < nin; i++) {
    out[i] = NULL;
    if (!in[i]->requires_grad) return moe_fail(MOE_EINVAL, "grad: input %d does not require a gradient", i + 1);
  }
  if (nin == 0) return MOE_OK;
  moe_tensor **result = calloc((size_t)nin, sizeof *result);
  if (result == NULL) return moe_fail(MOE_ENOMEM, "grad: out of memory");
  walk w = {.flags = flags, .target = in, .ntarget = nin, .result = result};
  moe_status st = walk_graph(&w, root, grad, n);
  walk_free(&w);
  for (int i = 0; i < nin; i++) {
    moe_tensor *t = result[i];
    if (st == MOE_OK && t) {
      out[i] = moe_scoped(t);
      if (out[i] == NULL) st = moe_error_code();
    } else {
      moe_release(t);
    }
  }
  free(result);
  return st;
}
