/* core._module: the few functions that lua/moe/nn/module.lua, where the protocol of modules is written, stands on. */
#include <stdio.h>
#include <string.h>

#include "lua/lmodule.h"
#include "nn/init.h"

static int is_module(lua_State *L) {
  lua_pushboolean(L, moeL_tomodule(L, 1) != NULL);
  return 1;
}

static int is_tensor(lua_State *L) {
  lua_pushboolean(L, moeL_totensor(L, 1) != NULL);
  return 1;
}

/* entries(m) -> {name, tensor, name, tensor, ...} of the parts that are there */
static int entries(lua_State *L) {
  moe_module *m = moeL_checkmodule(L, 1, "entries");
  lua_createtable(L, 2 * m->nslots, 0);
  lua_Integer n = 0;
  for (int i = 0; i < m->nslots; i++) {
    if (m->slot[i].t == NULL) continue;
    lua_pushstring(L, m->slot[i].name);
    lua_rawseti(L, -2, ++n);
    moeL_pushslot(L, 1, m, i);
    lua_rawseti(L, -2, ++n);
  }
  return 1;
}

/* info(tensor) -> tag, is a leaf, requires a gradient, number of elements, identity */
static int tensor_info(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "module");
  lua_pushinteger(L, t->tag);
  lua_pushboolean(L, t->node == NULL);
  lua_pushboolean(L, t->requires_grad);
  lua_pushinteger(L, moe_numel(t));
  lua_pushlightuserdata(L, t);
  return 5;
}

static int set_tag(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "module");
  t->tag = (uint8_t)luaL_checkinteger(L, 2);
  return 0;
}

/* mark(leaf, flag): whether a leaf wants a gradient */
static int set_requires_grad(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "module");
  if (t->node != NULL) return luaL_error(L, "module: the tensor is the result of a recorded call, not a leaf");
  t->requires_grad = lua_toboolean(L, 2);
  return 0;
}

static int drop_grad(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "zero_grad");
  moe_tensor *g = t->grad;
  t->grad = NULL;
  moe_release(g);
  return 0;
}

/* assign(parameter, values): copies, converted; without history */
static int assign(lua_State *L) {
  moe_tensor *dst = moeL_checktensor(L, 1, "load_state_dict"), *src = moeL_checktensor(L, 2, "load_state_dict");
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = MOE_OK;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (!moe_same_shape(dst, src))
    st = moe_fail(MOE_EINVAL, "load_state_dict: the parameter is %s, the value %s", moe_shape_of(a, dst),
                  moe_shape_of(b, src));
  else st = moe_copy(dst, src);
  return moeL_leave(L, &f, st, 0);
}

/* convert(tensor or C layer, "bf16" or "cuda:0", ...): in place */
static int convert(lua_State *L) {
  moe_module *m = moeL_tomodule(L, 1);
  moe_tensor *t = m ? NULL : moeL_checktensor(L, 1, "to");
  int dtype = -1;
  moe_device *dev = NULL;
  for (int i = 2; i <= lua_gettop(L); i++) {
    if (lua_isnil(L, i)) continue;
    if (lua_type(L, i) != LUA_TSTRING)
      return luaL_error(L, "to: a type (\"bf16\") or a device (\"cuda\") was wanted, got %s", moeL_describe(L, i));
    moe_dtype dt;
    if (moe_dtype_from_name(lua_tostring(L, i), &dt)) dtype = dt;
    else if ((dev = moe_device_find(lua_tostring(L, i))) == NULL) return luaL_error(L, "to: %s", moe_error());
  }
  if (dtype >= 0 && !moe_dtype_is_float((moe_dtype)dtype))
    return luaL_error(L, "to: a module takes a floating type, got %s", moe_dtype_name((moe_dtype)dtype));
  moeL_frame f;
  moeL_enter(L, &f);
  return moeL_leave(L, &f, m ? moe_module_to(m, dtype, dev) : moe_leaf_to(t, dtype, dev), 0);
}

/* initialise(tensor, "normal", number, ...) or initialise(tensor, "normal(0.02)"); returns the tensor */
static int initialise(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "init");
  const char *name = luaL_checkstring(L, 2);
  int n = lua_gettop(L) - 2;
  char text[256];
  int used = snprintf(text, sizeof text, "%s", name);
  for (int i = 0; i < n && used > 0 && used < (int)sizeof text; i++) {
    if (lua_type(L, 3 + i) != LUA_TNUMBER)
      return luaL_error(L, "init.%s_: argument %d must be a number, got %s", name, i + 2, moeL_describe(L, 3 + i));
    used += snprintf(text + used, sizeof text - (size_t)used, "%s%.17g", i ? "," : "(", lua_tonumber(L, 3 + i));
  }
  if (n > 0 && used > 0 && used < (int)sizeof text)
    used += snprintf(text + used, sizeof text - (size_t)used, ")");
  if (used < 0 || used >= (int)sizeof text) return luaL_error(L, "init: the name is too long");
  lua_settop(L, 1);
  moeL_frame f;
  moeL_enter(L, &f);
  return moeL_leave(L, &f, moe_init_named(t, text), 1);
}

/* nearest(name, {known names}) -> the known name nearest to it, or nil */
static int nearest(lua_State *L) {
  enum { MOST = 128 };
  const char *names[MOST + 1];
  int n = 0;
  const char *key = luaL_checkstring(L, 1);
  luaL_checktype(L, 2, LUA_TTABLE);
  luaL_checkstack(L, MOST + 4, "nearest");
  for (lua_Integer i = 1; n < MOST && lua_rawgeti(L, 2, i) == LUA_TSTRING; i++) names[n++] = lua_tostring(L, -1);
  names[n] = NULL;
  lua_pushstring(L, moeL_nearest(key, names));
  return 1;
}

static int module_head(lua_State *L) {
  moeL_pushhead(L, moeL_checkmodule(L, 1, "describe"));
  return 1;
}

static const luaL_Reg functions[] = {
  {"is", is_module},     {"is_tensor", is_tensor}, {"entries", entries}, {"info", tensor_info}, {"set_tag", set_tag},
  {"head", module_head}, {"drop_grad", drop_grad}, {"assign", assign},     {"convert", convert},
  {"mark", set_requires_grad}, {"initialise", initialise}, {"nearest", nearest}, {NULL, NULL}};

static void push_initialisers(lua_State *L) {
  lua_createtable(L, moe_initialiser_count, 0);
  for (int i = 0; i < moe_initialiser_count; i++) {
    lua_createtable(L, 0, 3);
    lua_pushstring(L, moe_initialisers[i].name);
    lua_setfield(L, -2, "name");
    lua_pushstring(L, moe_initialisers[i].args);
    lua_setfield(L, -2, "args");
    lua_pushstring(L, moe_initialisers[i].doc);
    lua_setfield(L, -2, "doc");
    lua_rawseti(L, -2, i + 1);
  }
}

void moeL_open_protocol(lua_State *L) {
  lua_newtable(L);
  moeL_setfuncs(L, functions);
  push_initialisers(L);
  lua_setfield(L, -2, "initialisers");
}
