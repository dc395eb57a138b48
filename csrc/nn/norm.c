#include "nn/module.h"

static moe_tensor *ones(moe_module *m, const char *name, int64_t n) {
  moe_tensor *t = moe_module_parameter(m, name, 1, &n);
  if (t == NULL || moe_fill(t, 1) != MOE_OK) return NULL;
  t->tag |= MOE_TAG_NO_DECAY;
  return t;
}

moe_status moe_nn_init_layernorm(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "size", 1));
  int64_t n = moe_module_int(m, "size", 0);
  if (ones(m, "weight", n) == NULL) return moe_error_code();
  if (!moe_module_flag(m, "bias")) {
    moe_module_absent(m, "bias");
    return MOE_OK;
  }
  moe_tensor *bias = moe_module_parameter(m, "bias", 1, &n);
  if (bias == NULL) return moe_error_code();
  bias->tag |= MOE_TAG_NO_DECAY;
  return moe_fill(bias, 0);
}

moe_status moe_nn_forward_layernorm(moe_module *m, moe_module_call *c) {
  moe_tensor *bias = m->slot[1].t;
  moe_value eps = F(moe_module_number(m, "eps", 0));
  c->out[0] = MOE_CALL(layer_norm, T(c->arg[0].t), T(m->slot[0].t), bias ? T(bias) : NIL, eps);
  return MOE_OK;
}

moe_status moe_nn_init_rmsnorm(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "size", 1));
  return ones(m, "weight", moe_module_int(m, "size", 0)) ? MOE_OK : moe_error_code();
}

moe_status moe_nn_forward_rmsnorm(moe_module *m, moe_module_call *c) {
  c->out[0] = MOE_CALL(rms_norm, T(c->arg[0].t), T(m->slot[0].t), F(moe_module_number(m, "eps", 0)));
  return MOE_OK;
}
