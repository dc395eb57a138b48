/* Convolutions over time. */
#include "nn/init.h"
#include "nn/module.h"

static moe_status fill(moe_module *m, moe_tensor *weight, int64_t fan_in, int64_t nbias) {
  const char *init = moe_module_string(m, "init");
  MOE_TRY(init ? moe_init_named(weight, init) : moe_init_linear(weight, fan_in));
  if (!moe_module_flag(m, "bias")) {
    moe_module_absent(m, "bias");
    return MOE_OK;
  }
  moe_tensor *bias = moe_module_parameter(m, "bias", 1, &nbias);
  if (bias == NULL) return moe_error_code();
  bias->tag |= MOE_TAG_NO_DECAY;
  return init ? moe_fill(bias, 0) : moe_init_linear(bias, fan_in);
}

static moe_value maybe(moe_tensor *t) { return t ? T(t) : NIL; }

/* --- conv1d: x [batch, in_channels, time] --- */

enum { WIDTH, STRIDE, PADDING, DILATION, GROUPS, CAUSAL }; /* data */

moe_status moe_nn_init_conv1d(moe_module *m) {
  static const char *const sizes[] = {"in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"};
  for (int i = 0; i < 6; i++) MOE_TRY(moe_module_at_least(m, sizes[i], 1));
  MOE_TRY(moe_module_at_least(m, "padding", 0));
  for (int i = 2; i < 7; i++) {
    const char *name = i < 6 ? sizes[i] : "padding";
    if (moe_module_int(m, name, 0) > 1 << 28) return moe_module_fail(m, "%s is too large", name);
  }
  int64_t in = moe_module_int(m, "in_channels", 0), out = moe_module_int(m, "out_channels", 0);
  int64_t width = moe_module_int(m, "kernel_size", 0), groups = moe_module_int(m, "groups", 1);
  if (in % groups != 0 || out % groups != 0)
    return moe_module_fail(m, "in_channels = %lld and out_channels = %lld must be multiples of groups = %lld",
                           (long long)in, (long long)out, (long long)groups);
  m->data[WIDTH] = width;
  m->data[STRIDE] = moe_module_int(m, "stride", 1);
  m->data[PADDING] = moe_module_int(m, "padding", 0);
  m->data[DILATION] = moe_module_int(m, "dilation", 1);
  m->data[GROUPS] = groups;
  m->data[CAUSAL] = moe_module_flag(m, "causal");
  if (m->data[CAUSAL] && m->data[PADDING] != 0)
    return moe_module_fail(m, "a causal convolution pads by itself: padding must be 0");
  moe_tensor *weight = moe_module_parameter(m, "weight", 3, (const int64_t[]){out, in / groups, width});
  if (weight == NULL) return moe_error_code();
  return fill(m, weight, in / groups * width, out);
}

/* Causal: padded on both sides, of which the right one is cut off: y[t] sees x[.. t * stride]. */
moe_status moe_nn_forward_conv1d(moe_module *m, moe_module_call *c) {
  const int64_t *o = m->data;
  moe_tensor *x = c->arg[0].t;
  int64_t pad = o[CAUSAL] ? (o[WIDTH] - 1) * o[DILATION] : o[PADDING];
  moe_tensor *y = MOE_CALL(conv1d, T(x), T(m->slot[0].t), maybe(m->slot[1].t), I(o[STRIDE]), I(pad), I(o[DILATION]),
                           I(o[GROUPS]));
  if (o[CAUSAL] && y != NULL) {
    int64_t times = (x->shape[x->ndim - 1] + o[STRIDE] - 1) / o[STRIDE];
    y = MOE_CALL(narrow, T(y), I(-1), I(0), I(times));
  }
  c->out[0] = y;
  return MOE_OK;
}

/* --- causal_conv1d: each channel by itself, x [batch, time, channels] --- */

moe_status moe_nn_init_causal_conv1d(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "channels", 1));
  MOE_TRY(moe_module_at_least(m, "kernel_size", 1));
  int64_t channels = moe_module_int(m, "channels", 0), width = moe_module_int(m, "kernel_size", 0);
  moe_tensor *weight = moe_module_parameter(m, "weight", 2, (const int64_t[]){channels, width});
  if (weight == NULL) return moe_error_code();
  return fill(m, weight, width, channels);
}

moe_status moe_nn_forward_causal_conv1d(moe_module *m, moe_module_call *c) {
  moe_tensor *out[2];
  MOE_TRY(MOE_CALLN(out, causal_conv1d, T(c->arg[0].t), T(m->slot[0].t), maybe(m->slot[1].t), maybe(c->state[0]),
                    *moe_module_opt(m, "activation")));
  c->out[0] = out[0];
  c->next[0] = out[1];
  return MOE_OK;
}

moe_status moe_nn_start_causal_conv1d(moe_module *m, int64_t batch, moe_tensor **out) {
  int64_t shape[3] = {batch, moe_module_int(m, "kernel_size", 1) - 1, moe_module_int(m, "channels", 0)};
  out[0] = moe_zeros(3, shape, m->dtype, m->device);
  return MOE_OK;
}
