#include "nn/init.h"
#include "nn/module.h"

moe_status moe_nn_init_linear(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "in_features", 1));
  MOE_TRY(moe_module_at_least(m, "out_features", 1));
  int64_t in = moe_module_int(m, "in_features", 0), out = moe_module_int(m, "out_features", 0);
  moe_tensor *weight = moe_module_parameter(m, "weight", 2, (const int64_t[]){out, in});
  if (weight == NULL) return moe_error_code();
  const char *init = moe_module_string(m, "init");
  MOE_TRY(init ? moe_init_named(weight, init) : moe_init_linear(weight, in));
  if (!moe_module_flag(m, "bias")) {
    moe_module_absent(m, "bias");
    return MOE_OK;
  }
  moe_tensor *bias = moe_module_parameter(m, "bias", 1, &out);
  if (bias == NULL) return moe_error_code();
  bias->tag |= MOE_TAG_NO_DECAY;
  return init ? moe_fill(bias, 0) : moe_init_linear(bias, in);
}

moe_status moe_nn_forward_linear(moe_module *m, moe_module_call *c) {
  moe_tensor *bias = m->slot[1].t;
  c->out[0] = MOE_CALL(linear, T(c->arg[0].t), T(m->slot[0].t), bias ? T(bias) : NIL);
  return MOE_OK;
}
