/* The userdata moe.Optimizer, over train/optim.h, and the functions of core._optimizer. lua/moe/optim.lua turns models and
** option tables into the list of groups that `new` takes.
**
** User value 1 is the list of parameters as Lua sees them: hooks live on these boxes.
*/
#include "train/optim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lua/loptim.h"

static const char *const spare_names[] = {"tagged", "vectors", "none", NULL};

moe_optim *moeL_tooptim(lua_State *L, int idx) {
  moeL_optim *box = luaL_testudata(L, idx, MOEL_OPTIM);
  return box ? box->o : NULL;
}

static moe_optim *check_optim(lua_State *L, int arg, const char *fname) {
  moe_optim *o = moeL_tooptim(L, arg);
  if (o == NULL) moeL_argerror(L, fname, arg, NULL, "an optimizer");
  return o;
}

/* --- options --- */

static double check_number(lua_State *L, const moe_optim_class *c, const moe_optim_option *row, int idx) {
  if (row->boolean) {
    if (!lua_isboolean(L, idx)) luaL_error(L, "%s: %s must be true or false, got %s", c->name, row->name, moeL_describe(L, idx));
    return lua_toboolean(L, idx);
  }
  if (lua_type(L, idx) != LUA_TNUMBER) luaL_error(L, "%s: %s must be a number, got %s", c->name, row->name, moeL_describe(L, idx));
  if (moe_optim_check(c, row, lua_tonumber(L, idx)) != MOE_OK) moeL_raise(L);
  return lua_tonumber(L, idx);
}

/* The value at idx (absolute) into the places of its option. */
static void set_option(lua_State *L, const moe_optim_class *c, const moe_optim_option *row, double *value, int idx) {
  if (row->size == 1) {
    value[0] = check_number(L, c, row, idx);
    return;
  }
  if (!lua_istable(L, idx) || lua_rawlen(L, idx) != (lua_Unsigned)row->size)
    luaL_error(L, "%s: %s must be a list of %d numbers, got %s", c->name, row->name, row->size, moeL_describe(L, idx));
  for (int k = 0; k < row->size; k++) {
    lua_rawgeti(L, idx, k + 1);
    value[k] = check_number(L, c, row, lua_gettop(L));
    lua_pop(L, 1);
  }
}

static void push_option(lua_State *L, const moe_optim_option *row, const double *value) {
  if (row->boolean) {
    lua_pushboolean(L, value[0] != 0);
  } else if (row->size == 1) {
    lua_pushnumber(L, value[0]);
  } else {
    lua_createtable(L, row->size, 0);
    for (int k = 0; k < row->size; k++) {
      lua_pushnumber(L, value[k]);
      lua_rawseti(L, -2, k + 1);
    }
  }
}

static int unknown_option(lua_State *L, const moe_optim_class *c, int idx) {
  const char *known[MOE_OPTIM_OPTIONS + 4];
  int n = 0;
  for (const moe_optim_option *o = c->option; o->name != NULL; o++) known[n++] = o->name;
  known[n++] = "no_decay";
  known[n++] = "params";
  known[n] = NULL;
  if (lua_type(L, idx) != LUA_TSTRING) return luaL_error(L, "%s: unknown option %s", c->name, moeL_describe(L, idx));
  const char *near = moeL_nearest(lua_tostring(L, idx), known);
  return near ? luaL_error(L, "%s: unknown option '%s' (did you mean '%s'?)", c->name, lua_tostring(L, idx), near)
              : luaL_error(L, "%s: unknown option '%s'", c->name, lua_tostring(L, idx));
}

/* The options among the fields of the group table at t (absolute). */
static void read_group(lua_State *L, const moe_optim_class *c, int t, moe_optim_group *g) {
  for (lua_pushnil(L); lua_next(L, t); lua_pop(L, 1)) {
    const moe_optim_option *row;
    if (lua_type(L, -2) != LUA_TSTRING) unknown_option(L, c, -2);
    const char *key = lua_tostring(L, -2);
    if (strcmp(key, "params") == 0 || strcmp(key, "names") == 0) continue;
    if (strcmp(key, "no_decay") == 0) {
      int k = 0;
      const char *s = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "";
      while (spare_names[k] && strcmp(spare_names[k], s) != 0) k++;
      if (spare_names[k] == NULL)
        luaL_error(L, "%s: no_decay must be \"tagged\", \"vectors\" or \"none\", got %s", c->name, moeL_describe(L, -1));
      g->spare = (moe_optim_spare)k;
      continue;
    }
    int place = moe_optim_place(c, key, &row);
    if (place < 0) unknown_option(L, c, -2);
    set_option(L, c, row, &g->value[place], lua_gettop(L));
  }
}

/* --- making --- */

/* Pushes two arrays for n parameters: tensors and names. The tensors also go to the end of the list at `all`. */
static void read_params(lua_State *L, const char *fname, int group, int all, int64_t n, moe_tensor ***t, const char ***names) {
  *t = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof **t, 0);
  *names = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof **names, 0);
  lua_getfield(L, group, "params");
  lua_getfield(L, group, "names");
  bool named = lua_istable(L, -1);
  lua_Integer before = (lua_Integer)lua_rawlen(L, all);
  for (int64_t i = 0; i < n; i++) {
    lua_rawgeti(L, -2, i + 1);
    (*t)[i] = moeL_totensor(L, -1);
    if ((*t)[i] == NULL) luaL_error(L, "%s: parameter %d must be a tensor, got %s", fname, (int)i + 1, moeL_describe(L, -1));
    lua_rawseti(L, all, before + i + 1);
    (*names)[i] = NULL;
    if (!named) continue;
    if (lua_rawgeti(L, -1, i + 1) == LUA_TSTRING) (*names)[i] = lua_tostring(L, -1); /* kept alive by the table */
    lua_pop(L, 1);
  }
  lua_pop(L, 2);
}

/* new(kind, {group, ...}): a group holds params (a list of tensors), names (a list of strings) and options */
static int optim_new(lua_State *L) {
  const moe_optim_class *c = moe_optim_find(luaL_checkstring(L, 1));
  if (c == NULL) return luaL_error(L, "optim: there is no optimizer '%s'", lua_tostring(L, 1));
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  moeL_optim *box = lua_newuserdatauv(L, sizeof *box, 1);
  box->o = NULL;
  luaL_setmetatable(L, MOEL_OPTIM);
  lua_newtable(L); /* 4: the parameters as Lua sees them */
  lua_pushvalue(L, 4);
  lua_setiuservalue(L, 3, 1);
  box->o = moe_optim_new(c);
  if (box->o == NULL) return moeL_raise(L);
  for (lua_Integer i = 1, n = (lua_Integer)lua_rawlen(L, 2); i <= n; i++) {
    moe_tensor **t;
    const char **names;
    moe_optim_group g = {.spare = MOE_SPARE_TAGGED};
    lua_settop(L, 4);
    if (lua_rawgeti(L, 2, i) != LUA_TTABLE) return luaL_error(L, "%s: group %d must be a table", c->name, (int)i);
    moe_optim_defaults(c, g.value);
    read_group(L, c, 5, &g);
    if (lua_getfield(L, 5, "params") != LUA_TTABLE)
      return luaL_error(L, "%s: group %d: params must be a list of tensors, got %s", c->name, (int)i, moeL_describe(L, -1));
    int64_t count = (int64_t)lua_rawlen(L, -1);
    lua_pop(L, 1);
    read_params(L, c->name, 5, 4, count, &t, &names);
    if (moe_optim_add(box->o, &g, count, t, names) != MOE_OK) return moeL_raise(L);
  }
  lua_settop(L, 3);
  return 1;
}

static int optim_gc(lua_State *L) {
  moeL_optim *box = lua_touserdata(L, 1);
  moe_optim *o = box->o;
  box->o = NULL;
  moe_optim_free(o);
  return 0;
}

/* --- methods --- */

/* step{clip = number?}: returns the norm when it clips */
static int optim_step(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "step");
  double factor = 1, norm = 0, most = 0;
  bool clip = false;
  if (!lua_isnoneornil(L, 2)) {
    if (!lua_istable(L, 2)) return moeL_argerror(L, "step", 2, "options", "a table");
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
      if (lua_type(L, -2) != LUA_TSTRING || strcmp(lua_tostring(L, -2), "clip") != 0)
        return luaL_error(L, "step: unknown option %s (it takes 'clip')", moeL_describe(L, -2));
      most = lua_type(L, -1) == LUA_TNUMBER ? lua_tonumber(L, -1) : -1;
      if (!(most > 0)) return luaL_error(L, "step: clip must be a number above 0, got %s", moeL_describe(L, -1));
      clip = true;
    }
  }
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = clip ? moe_optim_grad_norm(o, &norm) : MOE_OK;
  if (clip) factor = moe_clip_factor(norm, most);
  if (st == MOE_OK) st = moe_optim_step(o, factor);
  if (clip) lua_pushnumber(L, norm);
  return moeL_leave(L, &f, st, clip);
}

static int optim_zero_grad(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "zero_grad");
  moeL_frame f;
  moeL_enter(L, &f);
  moe_optim_zero_grad(o);
  return moeL_leave(L, &f, MOE_OK, 0);
}

static int optim_grad_norm(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "grad_norm");
  double norm = 0;
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_optim_grad_norm(o, &norm);
  lua_pushnumber(L, norm);
  return moeL_leave(L, &f, st, 1);
}

/* "name.exp_avg" and so on, in the order: states, master */
static const char *state_name(const moe_optim *o, int k) {
  return k == MOE_OPTIM_STATES ? "master" : o->cls->state[k];
}

/* {"<parameter>.<state>" = tensor}: the tensors themselves; "<parameter>.step" holds an i64 */
static int optim_state_dict(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "state_dict");
  lua_settop(L, 1);
  lua_newtable(L);
  for (int64_t i = 0; i < o->nparams; i++) {
    const moe_optim_param *p = &o->param[i];
    if (p->steps == 0) continue;
    for (int k = 0; k <= MOE_OPTIM_STATES; k++) {
      moe_tensor *t = k == MOE_OPTIM_STATES ? p->master : p->state[k];
      if (t == NULL) continue;
      lua_pushfstring(L, "%s.%s", p->name, state_name(o, k));
      moeL_box(L);
      moeL_fill(L, -1, t);
      lua_rawset(L, 2);
    }
    lua_pushfstring(L, "%s.step", p->name);
    moeL_box(L);
    moeL_frame f;
    moeL_enter(L, &f);
    moe_tensor *n = moe_empty(0, NULL, MOE_i64, moe_cpu());
    if (n != NULL) {
      *moe_data_i64(n) = p->steps;
      moeL_fill(L, -1, n);
    }
    moeL_leave(L, &f, n ? MOE_OK : moe_error_code(), 0);
    lua_rawset(L, 2);
  }
  return 1;
}

/* Looks "<name>.<what>" up in the table at 2; NULL when it is not there. The string and value are popped. */
static moe_tensor *lookup(lua_State *L, const char *name, const char *what) {
  lua_pushfstring(L, "%s.%s", name, what);
  lua_rawget(L, 2);
  moe_tensor *t = moeL_totensor(L, -1); /* kept alive by the table */
  lua_pop(L, 1);
  return t;
}

/* load_state_dict(t): copies; parameters without entries start afresh; entries of unknown parameters are refused. */
static int optim_load_state_dict(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "load_state_dict");
  lua_settop(L, 2);
  if (!lua_istable(L, 2)) return moeL_argerror(L, "load_state_dict", 2, "state", "a table of tensors");
  int64_t known = 0, given = 0;
  for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1), given++)
    if (moeL_totensor(L, -1) == NULL || lua_type(L, -2) != LUA_TSTRING)
      return luaL_error(L, "load_state_dict: the state must hold tensors by name, got %s", moeL_describe(L, -1));
  /* everything is looked at before anything changes */
  for (int64_t i = 0; i < o->nparams; i++) {
    moe_optim_param *p = &o->param[i];
    moe_tensor *steps = lookup(L, p->name, "step");
    known += steps != NULL;
    if (steps != NULL && (steps->dtype != MOE_i64 || moe_numel(steps) != 1))
      return luaL_error(L, "load_state_dict: \"%s.step\" must hold one i64", p->name);
    for (int k = 0; k <= MOE_OPTIM_STATES; k++) {
      moe_tensor *t = state_name(o, k) ? lookup(L, p->name, state_name(o, k)) : NULL;
      if (t == NULL) continue;
      char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
      known++;
      if (!moe_same_shape(t, p->t) || !moe_dtype_is_float(t->dtype))
        return luaL_error(L, "load_state_dict: \"%s.%s\" is %s %s, the parameter %s %s", p->name, state_name(o, k),
                          moe_dtype_name(t->dtype), moe_shape_of(a, t), moe_dtype_name(p->t->dtype), moe_shape_of(b, p->t));
      if (steps == NULL) return luaL_error(L, "load_state_dict: \"%s.step\" is missing", p->name);
    }
  }
  if (known != given)
    return luaL_error(L, "load_state_dict: %d of %d entries belong to no parameter of this %s", (int)(given - known), (int)given,
                      o->cls->name);
  moeL_frame f;
  moe_status st = MOE_OK;
  luaL_checkstack(L, 4, "load_state_dict");
  for (int64_t i = 0; i < o->nparams && st == MOE_OK; i++) {
    moe_optim_param *p = &o->param[i];
    moe_tensor *t[MOE_OPTIM_STATES + 1], *steps = lookup(L, p->name, "step");
    for (int k = 0; k <= MOE_OPTIM_STATES; k++) t[k] = state_name(o, k) ? lookup(L, p->name, state_name(o, k)) : NULL;
    moeL_enter(L, &f);
    int64_t n = 0;
    if (steps != NULL) st = moe_get_i64(steps, 0, &n);
    if (st == MOE_OK && n < 0) st = moe_fail(MOE_EINVAL, "load_state_dict: \"%s.step\" is negative", p->name);
    for (int k = 0; k <= MOE_OPTIM_STATES && st == MOE_OK; k++) {
      moe_tensor **place = k == MOE_OPTIM_STATES ? &p->master : &p->state[k];
      if (t[k] != NULL) {
        st = moe_optim_load_state(p, k, t[k]);
      } else {
        moe_release(*place);
        *place = NULL;
      }
    }
    if (st == MOE_OK) p->steps = n;
    moeL_leave(L, &f, st, 0);
  }
  return 0;
}

/* --- fields --- */

/* Proxies of groups: their options read and assign the optimizer's. Upvalues: optimizer, number. */
static moe_optim *proxy_optim(lua_State *L, int *group) {
  *group = (int)lua_tointeger(L, lua_upvalueindex(2));
  return moeL_tooptim(L, lua_upvalueindex(1));
}

static void set_checked(lua_State *L, moe_optim *o, int group, const moe_optim_option *row, int place, int idx) {
  double value[MOE_OPTIM_VALUES];
  memcpy(value, o->group[group].value, sizeof value);
  set_option(L, o->cls, row, &value[place], idx);
  const char *why = o->cls->check ? o->cls->check(value) : NULL;
  if (why != NULL) luaL_error(L, "%s: %s", o->cls->name, why);
  memcpy(o->group[group].value, value, sizeof value);
}

static int group_index(lua_State *L) {
  int group;
  moe_optim *o = proxy_optim(L, &group);
  const moe_optim_option *row;
  const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (strcmp(key, "no_decay") == 0) {
    lua_pushstring(L, spare_names[o->group[group].spare]);
    return 1;
  }
  if (strcmp(key, "params") == 0) {
    lua_newtable(L);
    lua_getiuservalue(L, lua_upvalueindex(1), 1);
    for (int64_t i = 0, n = 0; i < o->nparams; i++)
      if (o->param[i].group == group) {
        lua_rawgeti(L, -1, i + 1);
        lua_rawseti(L, -3, ++n);
      }
    lua_pop(L, 1);
    return 1;
  }
  int place = moe_optim_place(o->cls, key, &row);
  if (place < 0) return 0;
  push_option(L, row, &o->group[group].value[place]);
  return 1;
}

static int group_newindex(lua_State *L) {
  int group;
  moe_optim *o = proxy_optim(L, &group);
  const moe_optim_option *row;
  int place = lua_type(L, 2) == LUA_TSTRING ? moe_optim_place(o->cls, lua_tostring(L, 2), &row) : -1;
  if (place < 0) return unknown_option(L, o->cls, 2);
  set_checked(L, o, group, row, place, 3);
  return 0;
}

static void push_groups(lua_State *L, const moe_optim *o) {
  lua_createtable(L, o->ngroups, 0);
  for (int i = 0; i < o->ngroups; i++) {
    lua_newtable(L);
    lua_createtable(L, 0, 2);
    for (int side = 0; side < 2; side++) {
      lua_pushvalue(L, 1);
      lua_pushinteger(L, i);
      lua_pushcclosure(L, side ? group_newindex : group_index, 2);
      lua_setfield(L, -2, side ? "__newindex" : "__index");
    }
    lua_setmetatable(L, -2);
    lua_rawseti(L, -2, i + 1);
  }
}

/* o.lr and other options are those of the first group; o.groups, o.params, o.kind; else a method (upvalue 1). */
static int optim_index(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "optimizer");
  const moe_optim_option *row;
  lua_settop(L, 2);
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL || lua_type(L, 2) != LUA_TSTRING) return 1;
  const char *key = lua_tostring(L, 2);
  int place = moe_optim_place(o->cls, key, &row);
  if (place >= 0 && o->ngroups > 0) push_option(L, row, &o->group[0].value[place]);
  else if (strcmp(key, "groups") == 0) push_groups(L, o);
  else if (strcmp(key, "params") == 0) lua_getiuservalue(L, 1, 1);
  else if (strcmp(key, "kind") == 0) lua_pushstring(L, o->cls->name);
  else if (strcmp(key, "lr_scale") == 0) lua_pushnumber(L, o->lr_scale);
  return 1;
}

/* Assigning an option sets it in every group. */
static int optim_newindex(lua_State *L) {
  moe_optim *o = check_optim(L, 1, "optimizer");
  const moe_optim_option *row;
  if (lua_type(L, 2) == LUA_TSTRING && strcmp(lua_tostring(L, 2), "lr_scale") == 0) {
    double v = lua_type(L, 3) == LUA_TNUMBER ? lua_tonumber(L, 3) : -1;
    if (!(v >= 0 && v < 1e30)) return luaL_error(L, "%s: lr_scale must be a number of at least 0, got %s", o->cls->name, moeL_describe(L, 3));
    o->lr_scale = v;
    return 0;
  }
  int place = lua_type(L, 2) == LUA_TSTRING ? moe_optim_place(o->cls, lua_tostring(L, 2), &row) : -1;
  if (place < 0) return unknown_option(L, o->cls, 2);
  for (int i = 0; i < o->ngroups; i++) set_checked(L, o, i, row, place, 3);
  return 0;
}

static int optim_tostring(lua_State *L) {
  moeL_optim *box = luaL_checkudata(L, 1, MOEL_OPTIM);
  if (box->o == NULL) {
    lua_pushstring(L, "moe.Optimizer (half built)");
    return 1;
  }
  const moe_optim *o = box->o;
  int64_t elements = 0;
  luaL_Buffer b;
  for (int64_t i = 0; i < o->nparams; i++) elements += moe_numel(o->param[i].t);
  luaL_buffinit(L, &b);
  lua_pushfstring(L, "moe.optim.%s: %I parameters in %I tensors", o->cls->name, (lua_Integer)elements, (lua_Integer)o->nparams);
  luaL_addvalue(&b);
  for (int g = 0; g < o->ngroups; g++) {
    const double *v = o->group[g].value;
    luaL_addstring(&b, o->ngroups > 1 ? "\n  " : "; ");
    for (const moe_optim_option *row = o->cls->option; row->name != NULL; v += row->size, row++) {
      char text[96];
      if (row->size == 2) snprintf(text, sizeof text, "%s%s = {%g, %g}", row == o->cls->option ? "" : ", ", row->name, v[0], v[1]);
      else snprintf(text, sizeof text, "%s%s = %g", row == o->cls->option ? "" : ", ", row->name, v[0]);
      luaL_addstring(&b, text);
    }
  }
  luaL_pushresult(&b);
  return 1;
}

/* --- functions --- */

/* clip_grad_norm(params, max): params is a tensor or a list; returns the norm before */
static int clip_grad_norm(lua_State *L) {
  lua_settop(L, 2);
  if (moeL_totensor(L, 1) != NULL) {
    lua_createtable(L, 1, 0);
    lua_pushvalue(L, 1);
    lua_rawseti(L, -2, 1);
    lua_replace(L, 1);
  }
  if (!lua_istable(L, 1)) return moeL_argerror(L, "clip_grad_norm", 1, "params", "a list of tensors");
  double most = lua_type(L, 2) == LUA_TNUMBER ? lua_tonumber(L, 2) : -1, norm = 0;
  if (!(most > 0)) return moeL_argerror(L, "clip_grad_norm", 2, "max", "a number above 0");
  int64_t n = (int64_t)lua_rawlen(L, 1);
  moe_tensor **t = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof *t, 0);
  for (int64_t i = 0; i < n; i++) {
    lua_rawgeti(L, 1, i + 1);
    t[i] = moeL_totensor(L, -1);
    if (t[i] == NULL) return luaL_error(L, "clip_grad_norm: params[%d] must be a tensor, got %s", (int)i + 1, moeL_describe(L, -1));
    lua_pop(L, 1);
  }
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_grad_norm(t, n, &norm);
  if (st == MOE_OK && moe_clip_factor(norm, most) < 1) st = moe_grad_scale(t, n, moe_clip_factor(norm, most));
  lua_pushnumber(L, norm);
  return moeL_leave(L, &f, st, 1);
}

/* names() -> {{name =, doc =, options = {name = default}}, ...}: what help and the constructors are made from */
static int optim_kinds(lua_State *L) {
  lua_createtable(L, moe_optim_count, 0);
  for (int i = 0; i < moe_optim_count; i++) {
    const moe_optim_class *c = &moe_optims[i];
    lua_newtable(L);
    lua_pushstring(L, c->name);
    lua_setfield(L, -2, "name");
    lua_pushstring(L, c->doc);
    lua_setfield(L, -2, "doc");
    lua_newtable(L);
    for (const moe_optim_option *o = c->option; o->name != NULL; o++) {
      push_option(L, o, o->def);
      lua_setfield(L, -2, o->name);
    }
    lua_pushstring(L, "tagged");
    lua_setfield(L, -2, "no_decay");
    lua_setfield(L, -2, "options");
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

static const luaL_Reg methods[] = {{"step", optim_step},
                                   {"zero_grad", optim_zero_grad},
                                   {"grad_norm", optim_grad_norm},
                                   {"state_dict", optim_state_dict},
                                   {"load_state_dict", optim_load_state_dict},
                                   {NULL, NULL}};
static const luaL_Reg functions[] = {
    {"new", optim_new}, {"kinds", optim_kinds}, {"clip_grad_norm", clip_grad_norm}, {NULL, NULL}};

void moeL_open_optim(lua_State *L) {
  luaL_newmetatable(L, MOEL_OPTIM);
  lua_newtable(L);
  moeL_setfuncs(L, methods);
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index"); /* completers walk __metatable.__index */
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__metatable");
  lua_pushcclosure(L, optim_index, 1);
  lua_setfield(L, -2, "__index");
  lua_pushcfunction(L, optim_newindex);
  lua_setfield(L, -2, "__newindex");
  lua_pushcfunction(L, optim_tostring);
  lua_setfield(L, -2, "__tostring");
  lua_pushcfunction(L, optim_gc);
  lua_setfield(L, -2, "__gc");
  lua_pop(L, 1);
  lua_newtable(L);
  moeL_setfuncs(L, functions);
  lua_setfield(L, -2, "_optimizer");
}
