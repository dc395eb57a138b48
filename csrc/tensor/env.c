#include "tensor/env.h"

#include <stddef.h>

#include "base/err.h"

static MOE_HOT_TLS moe_env thread_env = {.rng = {.seed = 0x6d6f65}};
static MOE_HOT_TLS moe_env *current;

moe_env *moe_env_now(void) { return current ? current : &thread_env; }

moe_env *moe_env_set(moe_env *env) {
  moe_env *old = current;
  current = env;
  return old;
}
