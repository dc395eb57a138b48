/* The settings under which calls run: one per Lua state (or C host), current on the thread that
** runs it. A binding makes its own current at entry; C programs get a default one a thread.
*/
#ifndef MOE_TENSOR_ENV_H
#define MOE_TENSOR_ENV_H

#include <stdbool.h>

#include "base/rng.h"
#include "tensor/dtype.h"

typedef struct moe_env {
  moe_rng rng;
  bool grad_off;         /* moe.no_grad */
  int autocast;          /* a moe_dtype for matrix products, or 0 (MOE_bool) for none */
  bool (*interrupted)(struct moe_env *env); /* polled by long loops; may be NULL */
  void *host;            /* the binding's own, e.g. the lua_State of the call that runs */
} moe_env;

moe_env *moe_env_now(void);
/* Makes `env` current on this thread (NULL: the thread's default); returns the previous one. */
moe_env *moe_env_set(moe_env *env);

#endif
