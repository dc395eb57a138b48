/* The binding of token streams, opened with the files. */
#ifndef MOE_LUA_LDATA_H
#define MOE_LUA_LDATA_H

#include "lua/lmoe.h"

void moeL_open_data(lua_State *L);

#endif
