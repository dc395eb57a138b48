/* What the bindings of training share. */
#ifndef MOE_LUA_LOPTIM_H
#define MOE_LUA_LOPTIM_H

#include "lua/lmoe.h"
#include "train/optim.h"

#define MOEL_OPTIM "moe.Optimizer"

typedef struct moeL_optim {
  moe_optim *o; /* NULL: half built */
} moeL_optim;

moe_optim *moeL_tooptim(lua_State *L, int idx); /* NULL when it is none */
void moeL_open_optim(lua_State *L);

#endif
