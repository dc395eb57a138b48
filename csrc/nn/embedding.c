#include "nn/init.h"
#include "nn/module.h"

moe_status moe_nn_init_embedding(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "num_embeddings", 1));
  MOE_TRY(moe_module_at_least(m, "embedding_dim", 1));
  int64_t shape[2] = {moe_module_int(m, "num_embeddings", 0), moe_module_int(m, "embedding_dim", 0)};
  moe_tensor *weight = moe_module_parameter(m, "weight", 2, shape);
  if (weight == NULL) return moe_error_code();
  const char *init = moe_module_string(m, "init");
  return init ? moe_init_named(weight, init) : moe_init_normal(weight, 0, 1);
}

moe_status moe_nn_forward_embedding(moe_module *m, moe_module_call *c) {
  const moe_value args[] = {T(m->slot[0].t), T(c->arg[0].t), *moe_module_opt(m, "padding_idx"),
                            I(moe_module_flag(m, "sparse"))};
  int n = 1;
  return moe_call(&moe_ops[MOE_OP_embedding], c->base, false, args, 4, c->out, &n);
}

moe_status moe_nn_init_dropout(moe_module *m) {
  double p = moe_module_number(m, "p", 0);
  return p >= 0 && p <= 1 ? MOE_OK : moe_module_fail(m, "p must lie in [0, 1], got %g", p);
}

moe_status moe_nn_forward_dropout(moe_module *m, moe_module_call *c) {
  double p = moe_module_number(m, "p", 0);
  moe_tensor *x = c->arg[0].t;
  if (!m->training || p == 0) c->out[0] = x;
  else c->out[0] = MOE_CALL(dropout, T(x), F(p), I(true));
  return MOE_OK;
}
