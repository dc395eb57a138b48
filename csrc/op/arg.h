/* Small helpers of the files that write operations on shapes and positions. */
#ifndef MOE_OP_ARG_H
#define MOE_OP_ARG_H

#include "op/op.h"

static inline bool arg_absent(const moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_none; }

/* The numbers of a list argument; a C caller may give one number instead. */
static inline const int64_t *arg_list(const moe_ctx *c, int i, int *n) {
  const moe_value *v = &c->arg[i];
  bool list = v->kind == MOE_K_ints || v->kind == MOE_K_dims;
  *n = list ? v->ints.n : v->kind == MOE_K_none ? 0 : 1;
  return list ? v->ints.v : &v->i;
}

/* gin[i] <- g in the type of input i. */
static inline moe_status gin_set(moe_ctx *c, int i, moe_tensor *g) {
  if (g != NULL && g->dtype != c->in[i].dtype) g = MOE_CALL(cast, T(g), I(c->in[i].dtype));
  c->gin[i] = g;
  return g ? MOE_OK : moe_error_code();
}

/* One result of an operation whose index arguments count from `base`, as those of the running call do. */
static inline moe_tensor *call_based(int base, bool inplace, moe_op_id id, const moe_value *args, int nargs) {
  moe_tensor *outs[MOE_MAX_OUT];
  for (int i = 0; i < nargs; i++)
    if (args[i].kind == MOE_K_tensor && args[i].t == NULL) return NULL;
  return moe_call(&moe_ops[id], base, inplace, args, nargs, outs, NULL) == MOE_OK ? outs[0] : NULL;
}
#define CALL_BASED(base, name, ...)                                        \
  call_based((base), false, MOE_OP_##name, (const moe_value[]){__VA_ARGS__}, \
             (int)(sizeof((const moe_value[]){__VA_ARGS__}) / sizeof(moe_value)))
/* Over its first argument, a fresh tensor. */
#define CALL_OVER(base, name, ...)                                        \
  call_based((base), true, MOE_OP_##name, (const moe_value[]){__VA_ARGS__}, \
             (int)(sizeof((const moe_value[]){__VA_ARGS__}) / sizeof(moe_value)))

#endif
