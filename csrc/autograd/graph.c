/* Building and freeing the graph. */
#include "autograd/graph.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static _Atomic uint64_t sequence;

bool moe_grad_enabled(void) { return !moe_env_now()->grad_off; }

/* --- one block a node: the struct, then its arrays --- */

typedef struct block {
  char *p;
  size_t used, cap;
} block;

static void *carve(block *b, size_t bytes) {
  size_t at = (b->used + 7) & ~(size_t)7;
  b->used = at + bytes;
  return b->p ? b->p + at : NULL;
}

static moe_meta meta_of(block *b, const moe_tensor *t) {
  moe_meta m = {t->dtype, t->ndim, NULL, moe_dev(t)};
  int64_t *shape = carve(b, sizeof *shape * (size_t)t->ndim);
  if (b->p && t->ndim) memcpy(shape, t->shape, sizeof *shape * (size_t)t->ndim);
  m.shape = shape;
  return m;
}

/* A non-tensor argument, its list or string copied into the block. */
static moe_value value_of(block *b, const moe_value *v) {
  moe_value r = *v;
  if (v->kind == MOE_K_tensor) r.t = NULL;
  else if (v->kind == MOE_K_tensors) r.list.v = NULL;
  else if (v->kind == MOE_K_ints || v->kind == MOE_K_dims) {
    int64_t *p = carve(b, sizeof *p * (size_t)v->ints.n);
    if (b->p && v->ints.n) memcpy(p, v->ints.v, sizeof *p * (size_t)v->ints.n);
    r.ints.v = p;
  } else if (v->kind == MOE_K_string && v->s) {
    size_t n = strlen(v->s) + 1;
    char *p = carve(b, n);
    if (b->p) memcpy(p, v->s, n);
    r.s = p;
  }
  return r;
}

typedef struct plan {
  const moe_value *arg;
  int nargs;
  moe_tensor *const *in; /* or a plain list of inputs */
  int nin;
  moe_tensor *const *out;
  int nout;
} plan;

/* Lays the node out in b; with b->p == NULL it only counts bytes. */
static moe_node *layout(block *b, const plan *p) {
  moe_node *n = carve(b, sizeof *n);
  moe_value *arg = carve(b, sizeof *arg * (size_t)p->nargs);
  moe_edge *edge = carve(b, sizeof *edge * (size_t)p->nin);
  moe_meta *in = carve(b, sizeof *in * (size_t)p->nin), *outs = carve(b, sizeof *outs * (size_t)p->nout);
  bool *need = carve(b, sizeof *need * (size_t)p->nin);
  if (n) {
    memset(n, 0, sizeof *n);
    n->refs = 1;
    n->nargs = p->nargs;
    n->nin = p->nin;
    n->nout = p->nout;
    n->arg = arg;
    n->edge = edge;
    n->in = in;
    n->outs = outs;
    n->need = need;
  }
  int slot = 0;
  for (int i = 0; i < p->nargs; i++) {
    moe_value v = value_of(b, &p->arg[i]);
    if (!n) continue;
    n->arg[i] = v;
    n->slot[i] = slot;
    slot += v.kind == MOE_K_tensor ? 1 : v.kind == MOE_K_tensors ? v.list.n : 0;
  }
  for (int i = 0; i < p->nin; i++) {
    moe_meta m = meta_of(b, p->in[i]);
    if (n) n->in[i] = m;
  }
  for (int i = 0; i < p->nout; i++) {
    if (p->out[i] == NULL) {
      if (n) n->outs[i] = (moe_meta){0};
      continue;
    }
    moe_meta m = meta_of(b, p->out[i]);
    if (n) n->outs[i] = m;
  }
  return n;
}

static moe_node *node_new(const plan *p) {
  block count = {0};
  layout(&count, p);
  block b = {malloc(count.used), 0, count.used};
  if (b.p == NULL) {
    moe_fail(MOE_ENOMEM, "out of memory for a graph node");
    return NULL;
  }
  moe_node *n = layout(&b, p);
  n->bytes = (int64_t)count.used;
  n->seq = atomic_fetch_add_explicit(&sequence, 1, memory_order_relaxed) + 1;
  for (int i = 0; i < p->nin; i++) {
    moe_tensor *t = p->in[i];
    n->edge[i] = (moe_edge){0};
    n->need[i] = t->requires_grad;
    n->carries_lua |= t->carries_lua;
    if (!t->requires_grad) continue;
    if (t->node) {
      n->edge[i].node = t->node;
      n->edge[i].out = t->node_out;
      moe_node_retain(t->node);
    } else {
      n->edge[i].leaf = moe_retain(t);
    }
  }
  return n;
}

/* Ties the results to the node; integer results stay without a gradient. */
static void adopt(moe_node *n, moe_tensor *const *out, int nout) {
  for (int k = 0; k < nout; k++) {
    moe_tensor *t = out[k];
    if (t == NULL || !moe_dtype_is_float(t->dtype)) continue;
    if (t->node) moe_node_release(t->node);
    t->node = n;
    t->node_out = k;
    t->requires_grad = true;
    t->carries_lua |= n->carries_lua;
    moe_node_retain(n);
  }
  moe_node_release(n);
}

moe_status moe_record(moe_ctx *c) {
  moe_tensor *in[MOE_MAX_INPUT];
  int nin = 0;
  for (int i = 0; i < c->nargs; i++) {
    const moe_value *v = &c->arg[i];
    if (v->kind == MOE_K_tensor) {
      if (nin == MOE_MAX_INPUT) break;
      in[nin++] = v->t;
    } else if (v->kind == MOE_K_tensors) {
      if (nin + v->list.n > MOE_MAX_INPUT)
        return moe_op_fail(c, MOE_EINVAL, "more than %d tensors in one recorded call", MOE_MAX_INPUT);
      for (int k = 0; k < v->list.n; k++) in[nin++] = v->list.v[k];
    }
  }
  /* A forward may hand out an input itself (contiguous, reshape): the result must be a tensor of its own. */
  for (int k = 0; k < c->nout; k++)
    for (int i = 0; i < nin; i++)
      if (c->out[k] == in[i] && (c->out[k] = moe_detach(in[i])) == NULL) return moe_error_code();
  plan p = {c->arg, c->nargs, in, nin, c->out, c->nout};
  moe_node *n = node_new(&p);
  if (n == NULL) return moe_error_code();
  n->op = c->op;
  n->base = c->base;
  memcpy(n->user, c->user, sizeof n->user);
  for (int i = 0; i < c->nsaved; i++) {
    moe_tensor *t = c->saved[i];
    n->saved_out[i] = -1;
    n->saved_version[i] = c->saved_version[i];
    for (int k = 0; t && k < c->nout; k++)
      if (t == c->out[k]) {
        n->saved_out[i] = (int8_t)k;
        t = moe_detach(t);
        if (t == NULL) {
          moe_node_release(n);
          return moe_error_code();
        }
        n->saved_version[i] = t->storage->version;
      }
    n->saved[i] = moe_retain(t);
    n->nsaved = i + 1;
  }
  adopt(n, c->out, c->nout);
  return MOE_OK;
}

moe_status moe_record_custom(const moe_custom *cb, moe_tensor **in, int nin, moe_tensor **out, int nout) {
  plan p = {NULL, 0, in, nin, out, nout};
  moe_node *n = node_new(&p);
  if (n == NULL) return moe_error_code();
  n->custom = *cb;
  n->carries_lua |= cb->carries_lua;
  adopt(n, out, nout);
  return MOE_OK;
}

/* --- freeing, without recursion: nodes whose count falls to zero wait in a list --- */

static MOE_HOT_TLS moe_node *dead;
static MOE_HOT_TLS bool burying;

void moe_node_retain(moe_node *n) { n->refs++; }

void moe_node_free_saved(moe_node *n) {
  for (int i = 0; i < n->nsaved; i++) {
    moe_tensor *t = n->saved[i];
    n->saved[i] = NULL;
    moe_release(t);
  }
  n->nsaved = 0;
  n->released = true;
}

static void hooks_free(moe_hook *h) {
  while (h) {
    moe_hook *next = h->next;
    if (h->release) h->release(h->ud);
    free(h);
    h = next;
  }
}

static void bury(moe_node *n) {
  moe_node_free_saved(n);
  for (int i = 0; i < n->nin; i++) {
    moe_release(n->edge[i].leaf);
    if (n->edge[i].node) moe_node_release(n->edge[i].node);
  }
  if (n->out_hooks) {
    for (int k = 0; k < n->nout; k++) hooks_free(n->out_hooks[k]);
    free(n->out_hooks);
  }
  if (n->custom.release) n->custom.release(n->custom.ud);
  free(n);
}

void moe_node_release(moe_node *n) {
  if (--n->refs > 0) return;
  n->mark = (uint64_t)(uintptr_t)dead; /* the list's link */
  dead = n;
  if (burying) return;
  burying = true;
  while (dead) {
    n = dead;
    dead = (moe_node *)(uintptr_t)n->mark;
    bury(n);
  }
  burying = false;
}

/* --- hooks --- */

static moe_hook **hook_list(moe_tensor *t, bool create) {
  if (t->node == NULL) return &t->hooks;
  if (t->node->out_hooks == NULL) {
    if (!create) return NULL;
    t->node->out_hooks = calloc((size_t)t->node->nout, sizeof(moe_hook *));
    if (t->node->out_hooks == NULL) return NULL;
  }
  return &t->node->out_hooks[t->node_out];
}

moe_status moe_hook_add(moe_tensor *t, moe_hook hook, int64_t *id) {
  static _Atomic int64_t next_id = 1;
  moe_hook **list = hook_list(t, true), *h = malloc(sizeof *h);
  if (list == NULL || h == NULL) {
    free(h);
    return moe_fail(MOE_ENOMEM, "out of memory for a hook");
  }
  *h = hook;
  h->id = atomic_fetch_add(&next_id, 1);
  h->next = NULL;
  while (*list) list = &(*list)->next; /* hooks run in the order in which they were added */
  *list = h;
  *id = h->id;
  return MOE_OK;
}

bool moe_hook_remove(moe_tensor *t, int64_t id) {
  moe_hook **list = hook_list(t, false);
  for (; list && *list; list = &(*list)->next)
    if ((*list)->id == id) {
      moe_hook *h = *list;
      *list = h->next;
      h->next = NULL;
      hooks_free(h);
      return true;
    }
  return false;
}
