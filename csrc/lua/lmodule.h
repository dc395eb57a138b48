/* What module.c, the userdata of C layers, and protocol.c, the functions below the protocol in Lua, share. */
#ifndef MOE_LUA_LMODULE_H
#define MOE_LUA_LMODULE_H

#include "lua/lmoe.h"
#include "nn/module.h"

#define MOEL_MODULE "moe.Module"

typedef struct moeL_module {
  moe_module *m; /* NULL: half built */
} moeL_module;

moe_module *moeL_tomodule(lua_State *L, int idx); /* NULL when it is none */
moe_module *moeL_checkmodule(lua_State *L, int idx, const char *fname);
/* Pushes the one box of slot i, or nil where the layer does not have it. */
void moeL_pushslot(lua_State *L, int idx, moe_module *m, int i);
/* "linear(8 -> 4, bias)" */
void moeL_pushhead(lua_State *L, const moe_module *m);
/* Pushes the table core._module without what module.c adds. */
void moeL_open_protocol(lua_State *L);

#endif
