/* The graph that recorded calls leave behind, and the engine that walks it (engine.c).
**
** A node is one recorded call: its operation, the non-tensor arguments, what the forward saved, and an
** edge for every tensor argument. Nodes carry an ever-growing number; a call can only use results of
** calls made before it, so descending numbers are a topological order, and neither the walk nor the
** release of a graph recurses.
*/
#ifndef MOE_AUTOGRAD_GRAPH_H
#define MOE_AUTOGRAD_GRAPH_H

#include "op/op.h"

typedef struct moe_edge {
  struct moe_node *node; /* the call that made the input, or NULL */
  moe_tensor *leaf;      /* the leaf whose grad is fed, or NULL; neither: no gradient wanted */
  int out;               /* which result of `node` */
} moe_edge;

/* A differentiable call made of callbacks: moe.fn, moe.checkpoint, fused layers. */
typedef struct moe_custom {
  const char *name;
  moe_op_fn *backward; /* finds `ud` in c->user[0] as a pointer */
  void (*release)(void *ud);
  void *ud;
  bool carries_lua;
} moe_custom;

typedef struct moe_node {
  int refs;
  int base;
  uint64_t seq;
  const moe_op *op;      /* NULL for a custom node */
  moe_custom custom;
  int nargs, nin, nout, nsaved;
  bool released;         /* backward() has freed what it saved */
  bool carries_lua;
  moe_value *arg;
  moe_edge *edge;        /* [nin] */
  moe_meta *in, *outs;   /* [nin], [nout] */
  bool *need;            /* [nin] */
  struct moe_hook **out_hooks; /* [nout] hooks on a result, or NULL altogether */
  moe_tensor *saved[MOE_MAX_SAVED];
  uint32_t saved_version[MOE_MAX_SAVED];
  int8_t saved_out[MOE_MAX_SAVED]; /* it is this result of the call itself (kept without its node: no cycle), or -1 */
  int slot[MOE_MAX_PARAM];
  int64_t user[4];
  /* the engine's, during a walk */
  uint64_t mark;
  moe_tensor **grad; /* [nout] */
  int64_t bytes;     /* of this block */
} moe_node;

/* Called when a tensor's gradient is complete; returns a replacement (scoped), g itself, or NULL on error. */
typedef struct moe_hook {
  struct moe_hook *next;
  int64_t id;
  moe_tensor *(*call)(void *ud, moe_tensor *g);
  void (*release)(void *ud);
  void *ud;
} moe_hook;

/* Adds a hook; its id goes to *id. On failure ud is not released. */
moe_status moe_hook_add(moe_tensor *t, moe_hook hook, int64_t *id);
bool moe_hook_remove(moe_tensor *t, int64_t id);

/* Records a call made outside the operation table: outs get this node. Does nothing when no input wants a gradient. */
moe_status moe_record_custom(const moe_custom *cb, moe_tensor **in, int nin, moe_tensor **out, int nout);
/* Used by moe_call: builds the node of a finished forward. */
moe_status moe_record(moe_ctx *c);
bool moe_grad_enabled(void);
static inline bool moe_wants_grad(const moe_tensor *t) { return t != NULL && t->requires_grad; }

enum { MOE_BACKWARD_RETAIN = 1, MOE_BACKWARD_CREATE = 2 };
/* Adds gradients of the roots into the leaves' .grad. grads[i] NULL = ones, for a root of one element. */
moe_status moe_backward(moe_tensor **root, moe_tensor **grad, int n, unsigned flags);
/* Gradients of the roots by `in`, into out (scoped; NULL where unused), leaves' .grad untouched. */
moe_status moe_grad(moe_tensor **root, moe_tensor **grad, int n, moe_tensor **in, int nin, unsigned flags, moe_tensor **out);

void moe_node_retain(moe_node *n);
void moe_node_release(moe_node *n);
/* Drops what the node saved (after backward). */
void moe_node_free_saved(moe_node *n);

#endif
