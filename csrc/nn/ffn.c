/* The dense feed-forward network: the same operation that serves a bank of experts, with one expert and no plan, so
** that a sparse layer of one expert equals it to the bit.
*/
#include <string.h>

#include "nn/init.h"
#include "nn/module.h"

enum { IN_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS }; /* slots */
enum { ACT, GATED };                               /* data */

/* In the order of the choices of `activation`. The gated ones: Shazeer, "GLU variants improve transformer", 2020. */
static const struct activation {
  const char *act; /* a choice of expert_ffn's */
  bool gated;
} activations[] = {
  {"gelu", false}, {"gelu_tanh", false}, {"relu", false}, {"relu2", false}, {"silu", false},
  {"silu", true},  {"gelu", true},       {"relu", true},
};

/* The number of a choice of an operation's enum. */
static int64_t choice(const moe_op *op, const char *param, const char *word) {
  const moe_signature *sig = moe_op_signature(op);
  for (int i = 0; i < sig->nparams; i++) {
    if (strcmp(sig->param[i].name, param) != 0) continue;
    const char *at = sig->param[i].choices;
    for (int64_t k = 0; *at; k++) {
      size_t n = strcspn(at, "|");
      if (strlen(word) == n && memcmp(at, word, n) == 0) return k;
      at += n + (at[n] == '|');
    }
  }
  return 0;
}

static moe_status projection(moe_module *m, const char *weight, const char *bias, int64_t out, int64_t in) {
  const char *init = moe_module_string(m, "init");
  moe_tensor *w = moe_module_parameter(m, weight, 2, (const int64_t[]){out, in});
  if (w == NULL) return moe_error_code();
  MOE_TRY(init ? moe_init_named(w, init) : moe_init_linear(w, in));
  if (!moe_module_flag(m, "bias")) {
    moe_module_absent(m, bias);
    return MOE_OK;
  }
  moe_tensor *b = moe_module_parameter(m, bias, 1, &out);
  if (b == NULL) return moe_error_code();
  b->tag |= MOE_TAG_NO_DECAY;
  return init ? moe_fill(b, 0) : moe_init_linear(b, in);
}

moe_status moe_nn_init_ffn(moe_module *m) {
  MOE_TRY(moe_module_at_least(m, "d_model", 1));
  MOE_TRY(moe_module_at_least(m, "intermediate_size", 1));
  int64_t d = moe_module_int(m, "d_model", 0);
  if (d > 1 << 28) return moe_module_fail(m, "d_model = %lld is too large", (long long)d);
  int64_t hidden = moe_module_int(m, "intermediate_size", 4 * d);
  int64_t total;
  MOE_TRY(moe_shape_numel(m->cls->name, 3, (const int64_t[]){2, hidden, d}, &total));
  const struct activation *a = &activations[moe_module_int(m, "activation", 0)];
  m->data[ACT] = choice(&moe_ops[MOE_OP_expert_ffn], "act", a->act);
  m->data[GATED] = a->gated;
  if (a->gated) MOE_TRY(projection(m, "gate_up_proj.weight", "gate_up_proj.bias", 2 * hidden, d));
  else MOE_TRY(projection(m, "up_proj.weight", "up_proj.bias", hidden, d));
  return projection(m, "down_proj.weight", "down_proj.bias", d, hidden);
}

static moe_value bank(moe_tensor *t) { return t ? T(MOE_CALL(unsqueeze, T(t), I(0))) : NIL; }

moe_status moe_nn_forward_ffn(moe_module *m, moe_module_call *c) {
  const moe_slot *s = m->slot;
  c->out[0] = MOE_CALL(expert_ffn, T(c->arg[0].t), bank(s[IN_WEIGHT].t), bank(s[OUT_WEIGHT].t), bank(s[IN_BIAS].t),
                       bank(s[OUT_BIAS].t), NIL, NIL, I(m->data[ACT]), I(m->data[GATED]));
  return MOE_OK;
}
