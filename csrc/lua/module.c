/* C layers in Lua: userdata "moe.Module". Fields are parameters, buffers and options; the protocol of modules
** (parameters, state_dict, to, train ...) is written once, in lua/moe/nn/module.lua, over the few functions in
** the table core._module here.
**
** User value 1 of a module is a table slot name -> tensor box, so that m.weight is one and the same userdata
** each time and what hangs on it (hooks, anchors) lives as long as the module.
*/
#include <string.h>

#include "lua/lmodule.h"

moe_module *moeL_tomodule(lua_State *L, int idx) {
  moeL_module *box = luaL_testudata(L, idx, MOEL_MODULE);
  return box ? box->m : NULL;
}

moe_module *moeL_checkmodule(lua_State *L, int idx, const char *fname) {
  moe_module *m = moeL_tomodule(L, idx);
  if (m == NULL) luaL_error(L, "%s: argument %d must be a module, got %s", fname, idx, moeL_describe(L, idx));
  return m;
}

/* --- parts --- */

/* Pushes the one box of slot i, or nil where the layer does not have it. */
void moeL_pushslot(lua_State *L, int idx, moe_module *m, int i) {
  const moe_slot *s = &m->slot[i];
  if (s->t == NULL) {
    lua_pushnil(L);
    return;
  }
  lua_getiuservalue(L, idx, 1);
  lua_getfield(L, -1, s->name);
  if (moeL_totensor(L, -1) != s->t) {
    lua_pop(L, 1);
    moeL_box(L);
    moeL_fill(L, -1, s->t);
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, s->name);
  }
  lua_remove(L, -2);
}

static void push_option(lua_State *L, const moe_param *p, const moe_value *v) {
  switch (v->kind == MOE_K_none ? MOE_K_none : p->kind) { /* kinds, not operations */
    case MOE_K_int: lua_pushinteger(L, v->i); break;
    case MOE_K_dim:
    case MOE_K_pos: lua_pushinteger(L, v->i < 0 ? v->i : v->i + 1); break;
    case MOE_K_number:
      if (v->f == (double)(lua_Integer)v->f && v->is_int) lua_pushinteger(L, (lua_Integer)v->f);
      else lua_pushnumber(L, v->f);
      break;
    case MOE_K_bool: lua_pushboolean(L, v->i != 0); break;
    case MOE_K_string: lua_pushstring(L, v->s); break;
    case MOE_K_dtype: lua_pushstring(L, moe_dtype_name((moe_dtype)v->i)); break;
    case MOE_K_device: lua_pushstring(L, v->dev->name); break;
    case MOE_K_enum: {
      const char *at = p->choices;
      for (int64_t i = 0; i < v->i; i++) at += strcspn(at, "|") + 1;
      lua_pushlstring(L, at, strcspn(at, "|"));
      break;
    }
    case MOE_K_ints:
    case MOE_K_dims:
      lua_createtable(L, v->ints.n, 0);
      for (int i = 0; i < v->ints.n; i++) {
        lua_pushinteger(L, v->ints.v[i] + (p->kind == MOE_K_dims && v->ints.v[i] >= 0));
        lua_rawseti(L, -2, i + 1);
      }
      break;
    default: lua_pushnil(L);
  }
}

static int find_slot(const moe_module *m, const char *key) {
  for (int i = 0; i < m->nslots; i++)
    if (strcmp(m->slot[i].name, key) == 0) return i;
  return -1;
}

static int find_option(const moe_module *m, const char *key) {
  const moe_signature *sig = moe_module_options(m->cls);
  for (int i = 0; i < sig->nparams; i++)
    if (strcmp(sig->param[i].name, key) == 0) return i;
  return -1;
}

/* --- m.part where slots are called "part.weight": a proxy, so that m.part.weight reads and writes --- */

static int part_index(lua_State *L) {
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_pushvalue(L, lua_upvalueindex(2));
  lua_pushliteral(L, ".");
  luaL_tolstring(L, 2, NULL);
  lua_concat(L, 3);
  lua_gettable(L, -2);
  return 1;
}

static int part_newindex(lua_State *L) {
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_pushvalue(L, lua_upvalueindex(2));
  lua_pushliteral(L, ".");
  luaL_tolstring(L, 2, NULL);
  lua_concat(L, 3);
  lua_pushvalue(L, 3);
  lua_settable(L, -3);
  return 0;
}

static bool push_part(lua_State *L, const moe_module *m, const char *key) {
  size_t n = strlen(key);
  int i = 0;
  while (i < m->nslots && !(strncmp(m->slot[i].name, key, n) == 0 && m->slot[i].name[n] == '.')) i++;
  if (i == m->nslots) return false;
  lua_newtable(L);
  lua_createtable(L, 0, 2);
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 2);
  lua_pushcclosure(L, part_index, 2);
  lua_setfield(L, -2, "__index");
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 2);
  lua_pushcclosure(L, part_newindex, 2);
  lua_setfield(L, -2, "__newindex");
  lua_setmetatable(L, -2);
  return true;
}

/* --- fields; upvalue 2: the methods --- */

static int module_index(lua_State *L) {
  moe_module *m = moeL_checkmodule(L, 1, "module");
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(2)) != LUA_TNIL) return 1;
  if (lua_type(L, 2) != LUA_TSTRING) return 1;
  const char *key = lua_tostring(L, 2);
  int i = find_slot(m, key);
  if (i >= 0) {
    moeL_pushslot(L, 1, m, i);
  } else if (strcmp(key, "training") == 0) {
    lua_pushboolean(L, m->training);
  } else if (strcmp(key, "dtype") == 0) {
    lua_pushstring(L, moe_dtype_name(m->dtype));
  } else if (strcmp(key, "device") == 0) {
    lua_pushstring(L, m->device->name);
  } else if ((i = find_option(m, key)) >= 0) {
    push_option(L, &moe_module_options(m->cls)->param[i], &m->opt[i]);
  } else if (!push_part(L, m, key)) {
    lua_pushnil(L);
  }
  return 1;
}

static int unknown_field(lua_State *L, const moe_module *m, const char *key) {
  const char *names[MOE_MODULE_SLOTS + MOE_MAX_PARAM + 2];
  const moe_signature *sig = moe_module_options(m->cls);
  int n = 0;
  for (int i = 0; i < m->nslots; i++) names[n++] = m->slot[i].name;
  for (int i = 0; i < sig->nparams; i++) names[n++] = sig->param[i].name;
  names[n++] = "training";
  names[n] = NULL;
  const char *near = moeL_nearest(key, names);
  return luaL_error(L, "%s: no field '%s'%s%s%s", m->cls->name, key, near ? " (did you mean '" : "", near ? near : "",
                    near ? "'?)" : "");
}

/* Options that a forward reads at each call may change; those that gave the layer its shape may not. */
static int set_option(lua_State *L, moe_module *m, const moe_param *p, moe_value *v) {
  if (p->kind != MOE_K_number)
    return luaL_error(L, "%s: %s is fixed when the layer is made", m->cls->name, p->name);
  if (lua_type(L, 3) != LUA_TNUMBER)
    return luaL_error(L, "%s: %s must be a number, got %s", m->cls->name, p->name, moeL_describe(L, 3));
  *v = (moe_value){.kind = MOE_K_number, .is_int = lua_isinteger(L, 3), .f = lua_tonumber(L, 3)};
  return 0;
}

static int module_newindex(lua_State *L) {
  moe_module *m = moeL_checkmodule(L, 1, "module");
  const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : NULL;
  if (key == NULL) return luaL_error(L, "%s: a field's name must be a string, got %s", m->cls->name, moeL_describe(L, 2));
  int i = find_slot(m, key);
  if (i >= 0) {
    if (m->slot[i].t == NULL && lua_isnil(L, 3)) return 0;
    moe_tensor *t = moeL_totensor(L, 3);
    if (t == NULL) return luaL_error(L, "%s: %s must be a tensor, got %s", m->cls->name, key, moeL_describe(L, 3));
    lua_getiuservalue(L, 1, 1);
    lua_pushvalue(L, 3);
    moeL_frame f;
    moeL_enter(L, &f);
    moeL_leave(L, &f, moe_module_put(m, i, t), 0);
    lua_setfield(L, -2, key);
    return 0;
  }
  if (strcmp(key, "training") == 0) {
    if (!lua_isboolean(L, 3))
      return luaL_error(L, "%s: training must be true or false, got %s", m->cls->name, moeL_describe(L, 3));
    m->training = lua_toboolean(L, 3);
    return 0;
  }
  i = find_option(m, key);
  if (i >= 0) return set_option(L, m, &moe_module_options(m->cls)->param[i], &m->opt[i]);
  return unknown_field(L, m, key);
}

/* --- the call --- */

/* A mixer's second argument, a table or nil, is its state: its tensors go to the bottom of the stack, where
** the anchors of their history are found, and the argument goes away. Returns how many were put there. */
static int take_state(lua_State *L, const moe_module_class *cls, moe_module_call *c) {
  char name[24];
  int n = 0;
  if (lua_gettop(L) < 3 || moeL_istensor(L, 3)) return 0;
  if (!lua_isnil(L, 3) && !lua_istable(L, 3))
    return luaL_error(L, "%s: the state must be a table (%s) or nil, got %s", cls->name, cls->state, moeL_describe(L, 3));
  if (lua_istable(L, 3)) {
    c->stateful = true;
    int at = 3;
    for (; moe_module_name_at(cls->state, n, name, sizeof name); n++, at++) {
      lua_getfield(L, at, name);
      if (!lua_isnil(L, -1)) {
        c->state[n] = moeL_totensor(L, -1);
        if (c->state[n] == NULL)
          return luaL_error(L, "%s: state.%s must be a tensor, got %s", cls->name, name, moeL_describe(L, -1));
      }
      lua_insert(L, 1);
    }
  }
  lua_remove(L, 3 + n);
  return n;
}

/* m(x, ctx): a context table is handed down through whole models and holds more than one layer wants; keeps what
** the signature names. */
static void trim_context(lua_State *L, int idx, const moe_signature *sig) {
  lua_createtable(L, 0, sig->nparams);
  for (int i = 1; i < sig->nparams; i++) {
    lua_getfield(L, idx, sig->param[i].name);
    lua_setfield(L, -2, sig->param[i].name);
  }
  lua_replace(L, idx);
}

static bool is_empty_table(lua_State *L, int idx) {
  if (!lua_istable(L, idx)) return false;
  lua_pushnil(L);
  if (lua_next(L, idx) == 0) return true;
  lua_pop(L, 2);
  return false;
}

/* With defaults filled in; an empty table of options is none. */
static void read(lua_State *L, const char *fname, const moe_signature *sig, int first, moe_value *v) {
  int top = lua_gettop(L);
  if (top >= first && is_empty_table(L, top)) lua_settop(L, top - 1);
  moeL_readargs(L, fname, sig, first, v);
  for (int i = 0; i < sig->nparams; i++)
    if (v[i].kind == MOE_K_none) v[i] = sig->param[i].def;
}

static int module_call(lua_State *L) {
  moe_module *m = moeL_checkmodule(L, 1, "module");
  const moe_module_class *cls = m->cls;
  const moe_signature *sig = moe_module_call_signature(cls);
  moe_module_call c = {.base = 1};
  moe_value arg[MOE_MAX_PARAM];
  int first = 2, nstate = 0, nresults = sig->nresults;
  if (cls->state[0] != '\0') first += take_state(L, cls, &c);
  if (lua_gettop(L) == first + 1 && lua_istable(L, first + 1)) trim_context(L, first + 1, sig);
  read(L, cls->name, sig, first, arg);
  c.arg = arg;
  luaL_checkstack(L, MOE_MODULE_SLOTS + MOE_MODULE_RESULTS + MOE_MODULE_STATE + 4, cls->name);
  for (int i = 0; i < m->nslots; i++) /* gradient hooks on parameters */
    if (m->slot[i].t != NULL && m->slot[i].t->carries_lua) moeL_pushslot(L, first - 1, m, i);
  int out = lua_gettop(L) + 1;
  for (int i = 0; i < nresults; i++) moeL_box(L);
  char name[24];
  if (c.stateful)
    for (; moe_module_name_at(cls->state, nstate, name, sizeof name); nstate++) moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = cls->forward(m, &c);
  for (int i = 0; i < nresults && st == MOE_OK; i++) {
    if (c.out[i] == NULL) st = moe_error_code();
    else moeL_fill(L, out + i, c.out[i]);
  }
  for (int i = 0; i < nstate && st == MOE_OK; i++) {
    if (c.next[i] == NULL) st = moe_error_code();
    else moeL_fill(L, out + nresults + i, c.next[i]);
  }
  moeL_leave(L, &f, st, 0);
  if (!c.stateful) return nresults;
  lua_createtable(L, 0, nstate);
  for (int i = 0; i < nstate; i++) {
    moe_module_name_at(cls->state, i, name, sizeof name);
    lua_pushvalue(L, out + nresults + i);
    lua_setfield(L, -2, name);
  }
  lua_replace(L, out + nresults);
  lua_settop(L, out + nresults);
  return nresults + 1;
}

/* m:state(batch) -> the empty state of a mixer */
static int module_state(lua_State *L) {
  moe_module *m = moeL_checkmodule(L, 1, "state");
  if (m->cls->start == NULL) return luaL_error(L, "%s: this layer has no state", m->cls->name);
  int isint;
  lua_Integer batch = luaL_opt(L, lua_tointeger, 2, 1);
  if (!lua_isnoneornil(L, 2)) {
    batch = lua_tointegerx(L, 2, &isint);
    if (!isint || batch < 0)
      return luaL_error(L, "%s: state: the batch size must be a count, got %s", m->cls->name, moeL_describe(L, 2));
  }
  lua_settop(L, 2);
  char name[24];
  int n = 0;
  for (; moe_module_name_at(m->cls->state, n, name, sizeof name); n++) moeL_box(L);
  moe_tensor *t[MOE_MODULE_STATE] = {NULL};
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = m->cls->start(m, batch, t);
  for (int i = 0; i < n && st == MOE_OK; i++) {
    if (t[i] == NULL) st = moe_error_code();
    else moeL_fill(L, 3 + i, t[i]);
  }
  moeL_leave(L, &f, st, 0);
  lua_createtable(L, 0, n);
  for (int i = 0; i < n; i++) {
    moe_module_name_at(m->cls->state, i, name, sizeof name);
    lua_pushvalue(L, 3 + i);
    lua_setfield(L, -2, name);
  }
  return 1;
}

/* --- text: "linear(8 -> 4, bias) 36 parameters" --- */

static bool is_default(const moe_param *p, const moe_value *v) {
  if (v->kind == MOE_K_none) return true;
  if (p->def.kind == MOE_K_none) return false;
  return p->kind == MOE_K_number ? v->f == p->def.f : p->kind != MOE_K_string && v->i == p->def.i;
}

void moeL_pushhead(lua_State *L, const moe_module *m) {
  const moe_signature *sig = moe_module_options(m->cls);
  lua_pushfstring(L, "%s(", m->cls->name);
  const char *sep = "";
  for (int i = 0; i < sig->nparams; i++) {
    const moe_param *p = &sig->param[i];
    const moe_value *v = &m->opt[i];
    bool plain = i < m->cls->npositional && v->kind != MOE_K_none;
    if (p->kind == MOE_K_bool ? v->kind == MOE_K_none || !v->i : !plain && is_default(p, v)) continue;
    lua_pushstring(L, plain && i == 1 && strncmp(p->name, "out_", 4) == 0 ? " -> " : sep);
    if (p->kind == MOE_K_bool) {
      lua_pushstring(L, p->name);
    } else {
      push_option(L, p, v);
      if (lua_istable(L, -1)) {
        lua_pop(L, 1);
        lua_pushliteral(L, "{..}");
      }
      const char *text = luaL_tolstring(L, -1, NULL);
      if (plain) lua_pushstring(L, text);
      else lua_pushfstring(L, "%s=%s", p->name, text);
      lua_replace(L, -3);
      lua_pop(L, 1);
    }
    lua_concat(L, 3);
    sep = ", ";
  }
  lua_pushliteral(L, ")");
  lua_concat(L, 2);
}

static int module_tostring(lua_State *L) {
  moe_module *m = moeL_tomodule(L, 1);
  if (m == NULL) {
    lua_pushliteral(L, "moe.Module (empty)");
    return 1;
  }
  int64_t n = 0;
  for (int i = 0; i < m->nslots; i++)
    if (m->slot[i].t && m->slot[i].t->tag & MOE_TAG_PARAMETER) n += moe_numel(m->slot[i].t);
  moeL_pushhead(L, m);
  if (n > 0) {
    lua_pushfstring(L, " %I parameter%s", (LUAI_UACINT)n, n == 1 ? "" : "s");
    lua_concat(L, 2);
  }
  return 1;
}

static int module_gc(lua_State *L) {
  moeL_module *box = luaL_testudata(L, 1, MOEL_MODULE);
  if (box != NULL) {
    moe_module_free(box->m);
    box->m = NULL;
  }
  return 0;
}

/* --- constructors; upvalue 2: the class --- */

static int module_new(lua_State *L) {
  const moe_module_class *cls = lua_touserdata(L, lua_upvalueindex(2));
  moe_value opt[MOE_MAX_PARAM];
  int given = lua_gettop(L);
  if (given > 0 && lua_istable(L, given)) given--;
  if (given > cls->npositional)
    return luaL_error(L, "%s: takes %d positional argument%s and a table of options, got %d", cls->name,
                      cls->npositional, cls->npositional == 1 ? "" : "s", given);
  read(L, cls->name, moe_module_options(cls), 1, opt);
  moeL_module *box = lua_newuserdatauv(L, sizeof *box, 1);
  box->m = NULL;
  luaL_setmetatable(L, MOEL_MODULE);
  lua_newtable(L);
  lua_setiuservalue(L, -2, 1);
  moeL_frame f;
  moeL_enter(L, &f);
  box->m = moe_module_new(cls, opt);
  return moeL_leave(L, &f, box->m ? MOE_OK : moe_error_code(), 1);
}

static const luaL_Reg metamethods[] = {
  {"__call", module_call}, {"__tostring", module_tostring}, {"__gc", module_gc}, {NULL, NULL}};

static const luaL_Reg methods[] = {{"forward", module_call}, {"state", module_state}, {NULL, NULL}};

/* core._module.make[group][name](options) */
static void push_constructors(lua_State *L) {
  lua_newtable(L);
  for (int i = 0; i < moe_module_count; i++) {
    const moe_module_class *c = &moe_modules[i];
    luaL_getsubtable(L, -1, c->group);
    lua_pushlightuserdata(L, moeL_context(L));
    lua_pushlightuserdata(L, (void *)(uintptr_t)c);
    lua_pushcclosure(L, module_new, 2);
    lua_setfield(L, -2, c->name);
    lua_pop(L, 1);
  }
}

/* core.modules() -> list of {group=, name=, options=, call=, results=, state=, npositional=, doc=}, for help and stubs */
static int list_rows(lua_State *L) {
  lua_createtable(L, moe_module_count, 0);
  for (int i = 0; i < moe_module_count; i++) {
    const moe_module_class *c = &moe_modules[i];
    const char *const field[][2] = {{"group", c->group}, {"name", c->name},       {"options", c->options}, {"call", c->call},
                                    {"doc", c->doc},     {"results", c->results}, {"state", c->state}};
    lua_createtable(L, 0, 8);
    for (size_t k = 0; k < sizeof field / sizeof field[0]; k++) {
      lua_pushstring(L, field[k][1]);
      lua_setfield(L, -2, field[k][0]);
    }
    lua_pushinteger(L, c->npositional);
    lua_setfield(L, -2, "npositional");
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

void moeL_open_module(lua_State *L) {
  luaL_newmetatable(L, MOEL_MODULE);
  moeL_setfuncs(L, metamethods);
  lua_newtable(L); /* the methods: module.lua adds the protocol */
  moeL_setfuncs(L, methods);
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index"); /* completers look for it here */
  lua_pushlightuserdata(L, moeL_context(L));
  lua_pushvalue(L, -2);
  lua_pushcclosure(L, module_index, 2);
  lua_setfield(L, -3, "__index");
  lua_pushcfunction(L, module_newindex);
  lua_setfield(L, -3, "__newindex");
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__metatable");

  moeL_open_protocol(L); /* core, metatable, methods, core._module */
  lua_insert(L, -2);
  lua_setfield(L, -2, "methods");
  push_constructors(L);
  lua_setfield(L, -2, "make");
  lua_setfield(L, -3, "_module");
  lua_pop(L, 1);
  lua_pushcfunction(L, list_rows);
  lua_setfield(L, -2, "modules");
}
