/* backward, grad, no_grad, hooks, and custom functions whose backward is a Lua closure. */
#include <stdlib.h>
#include <string.h>

#include "lua/lmoe.h"

/* A list of tensors as a Lua argument: a tensor, or a table of them. NULL holes (nil) where `holes`. */
typedef struct tensor_list {
  moe_tensor **v;
  int n;
} tensor_list;

static tensor_list check_list(lua_State *L, int arg, const char *fname, const char *pname, bool holes, int want) {
  tensor_list l = {NULL, 0};
  if (lua_isnoneornil(L, arg)) return l;
  bool single = !lua_istable(L, arg);
  l.n = single ? 1 : holes ? want : (int)lua_rawlen(L, arg);
  if (l.n > 1 << 20) luaL_error(L, "%s: '%s' is too long a list", fname, pname);
  l.v = lua_newuserdatauv(L, sizeof *l.v * (size_t)(l.n > 0 ? l.n : 1), 1);
  lua_pushvalue(L, arg);
  lua_setiuservalue(L, -2, 1);
  for (int i = 0; i < l.n; i++) {
    if (single) lua_pushvalue(L, arg);
    else lua_rawgeti(L, arg, i + 1);
    l.v[i] = moeL_totensor(L, -1);
    if (l.v[i] == NULL && !(holes && lua_isnil(L, -1)))
      luaL_error(L, "%s: '%s' must be a tensor or a list of tensors, got %s", fname, pname, moeL_describe(L, -1));
    lua_pop(L, 1);
  }
  return l;
}

static unsigned read_flags(lua_State *L, int arg, const char *fname) {
  static const struct {
    const char *name;
    unsigned bit;
  } known[] = {{"retain_graph", MOE_BACKWARD_RETAIN}, {"create_graph", MOE_BACKWARD_CREATE}};
  unsigned flags = 0;
  if (lua_isnoneornil(L, arg)) return 0;
  if (!lua_istable(L, arg)) moeL_argerror(L, fname, arg, "options", "a table");
  lua_pushnil(L);
  while (lua_next(L, arg)) {
    const char *key = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : "";
    size_t i = 0;
    while (i < 2 && strcmp(known[i].name, key) != 0) i++;
    if (i == 2) luaL_error(L, "%s: unknown option '%s' (known: retain_graph, create_graph)", fname, key);
    if (!lua_isboolean(L, -1)) luaL_error(L, "%s: option '%s' must be a boolean, got %s", fname, key, moeL_describe(L, -1));
    if (lua_toboolean(L, -1)) flags |= known[i].bit;
    lua_pop(L, 1);
  }
  return flags;
}

/* loss:backward(gradient?, {retain_graph=, create_graph=}); moe.backward({t1, t2}, {g1, g2}, options) */
static int core_backward(lua_State *L) {
  lua_settop(L, 3);
  if (lua_istable(L, 2) && lua_isnil(L, 3) && lua_rawlen(L, 2) == 0) { /* options in second place */
    lua_pushvalue(L, 2);
    lua_replace(L, 3);
    lua_pushnil(L);
    lua_replace(L, 2);
  }
  tensor_list roots = check_list(L, 1, "backward", "tensors", false, 0);
  if (roots.n == 0) return moeL_argerror(L, "backward", 1, "tensors", "a tensor or a list of tensors");
  tensor_list grads = check_list(L, 2, "backward", "gradient", true, roots.n);
  unsigned flags = read_flags(L, 3, "backward");
  moeL_frame f;
  moeL_enter(L, &f);
  return moeL_leave(L, &f, moe_backward(roots.v, grads.v, roots.n, flags), 0);
}

/* moe.grad(outputs, inputs, {grad_outputs=, retain_graph=, create_graph=}) -> gradients, one result an input */
static int core_grad(lua_State *L) {
  lua_settop(L, 3);
  lua_pushnil(L);
  if (lua_istable(L, 3) && lua_getfield(L, 3, "grad_outputs") != LUA_TNIL) { /* apart from the flags */
    lua_replace(L, 4);
    lua_newtable(L);
    lua_pushnil(L);
    while (lua_next(L, 3)) {
      lua_pushvalue(L, -2);
      lua_insert(L, -2);
      if (lua_type(L, -2) == LUA_TSTRING && strcmp(lua_tostring(L, -2), "grad_outputs") == 0) lua_pop(L, 2);
      else lua_settable(L, -4);
    }
    lua_replace(L, 3);
  }
  lua_settop(L, 4);
  tensor_list roots = check_list(L, 1, "grad", "outputs", false, 0), in = check_list(L, 2, "grad", "inputs", false, 0);
  if (roots.n == 0) return moeL_argerror(L, "grad", 1, "outputs", "a tensor or a list of tensors");
  if (in.n == 0) return moeL_argerror(L, "grad", 2, "inputs", "a tensor or a list of tensors");
  tensor_list grads = check_list(L, 4, "grad", "grad_outputs", true, roots.n);
  unsigned flags = read_flags(L, 3, "grad");
  luaL_checkstack(L, in.n + 4, "gradients");
  int first = lua_gettop(L) + 1;
  for (int i = 0; i < in.n; i++) moeL_box(L);
  moe_tensor **out = lua_newuserdatauv(L, sizeof *out * (size_t)in.n, 0);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_grad(roots.v, grads.v, roots.n, in.v, in.n, flags, out);
  for (int i = 0; st == MOE_OK && i < in.n; i++) moeL_fill(L, first + i, out[i]);
  moeL_leave(L, &f, st, 0);
  lua_pop(L, 1);
  for (int i = 0; i < in.n; i++)
    if (moeL_totensor(L, first + i) == NULL) {
      lua_pushnil(L);
      lua_replace(L, first + i);
    }
  return in.n;
}

/* --- switching the recording --- */

/* Runs f(...) with recording on or off, and puts the old setting back also after an error. */
static int with_grad(lua_State *L, bool off, const char *fname) {
  if (lua_type(L, 1) != LUA_TFUNCTION) {
    if (luaL_getmetafield(L, 1, "__call") == LUA_TNIL) return moeL_argerror(L, fname, 1, "f", "a function");
    lua_pop(L, 1);
  }
  moe_env *env = &moeL_context(L)->env;
  bool old = env->grad_off;
  env->grad_off = off;
  int top = lua_gettop(L);
  int st = lua_pcall(L, top - 1, LUA_MULTRET, 0);
  env->grad_off = old;
  if (st != LUA_OK) return lua_error(L);
  return lua_gettop(L);
}

static int core_no_grad(lua_State *L) { return with_grad(L, true, "no_grad"); }
static int core_enable_grad(lua_State *L) { return with_grad(L, false, "enable_grad"); }

/* core.autocast(dtype, f, ...): rows marked MOE_F_AUTOCAST take their f32 arguments in that type; nil switches it off. */
static int core_autocast(lua_State *L) {
  moe_dtype dt = MOE_bool;
  if (!lua_isnil(L, 1)) {
    const char *s = lua_type(L, 1) == LUA_TSTRING ? lua_tostring(L, 1) : "";
    if (!moe_dtype_from_name(s, &dt) || (dt != MOE_bf16 && dt != MOE_f16 && dt != MOE_f32))
      return luaL_error(L, "autocast: argument 1 (dtype) must be \"bf16\", \"f16\", \"f32\" or nil, got %s", moeL_describe(L, 1));
  }
  if (lua_type(L, 2) != LUA_TFUNCTION) {
    if (luaL_getmetafield(L, 2, "__call") == LUA_TNIL) return moeL_argerror(L, "autocast", 2, "f", "a function");
    lua_pop(L, 1);
  }
  moe_env *env = &moeL_context(L)->env;
  int old = env->autocast;
  env->autocast = dt == MOE_f32 ? 0 : (int)dt;
  int st = lua_pcall(L, lua_gettop(L) - 2, LUA_MULTRET, 0);
  env->autocast = old;
  if (st != LUA_OK) return lua_error(L);
  return lua_gettop(L) - 1;
}

static int core_is_grad_enabled(lua_State *L) {
  lua_pushboolean(L, !moeL_context(L)->env.grad_off);
  return 1;
}

/* --- Lua closures as backward functions --- */

typedef struct closure {
  int64_t id;
} closure;

static void closure_free(void *ud) { free(ud); }

/* Calls the closure on gout (nil where there is none); its results become gin. Runs inside moe_backward. */
static int run_backward(lua_State *L) { /* protected: (ctx light userdata, function) */
  moe_ctx *c = lua_touserdata(L, 1);
  luaL_checkstack(L, c->nout + c->nin + 8, "custom backward");
  lua_settop(L, 2);
  for (int k = 0; k < c->nout; k++) moeL_pushtensor(L, c->gout[k]);
  lua_call(L, c->nout, c->nin);
  for (int i = 0; i < c->nin; i++) {
    int idx = 2 + i; /* the results took the place of the function */
    if (lua_isnil(L, idx)) continue;
    moe_tensor *g = moeL_totensor(L, idx);
    if (g == NULL) return luaL_error(L, "a custom backward must return a tensor or nil for input %d, got %s", i + 1, moeL_describe(L, idx));
    c->gin[i] = moe_scoped(moe_retain(g));
    if (c->gin[i] == NULL) return luaL_error(L, "%s", moe_error());
  }
  return 0;
}

typedef struct protected_call {
  int64_t id;
  lua_CFunction run; /* gets (argument light, closure) */
  void *arg;
} protected_call;

static int find_and_run(lua_State *L) {
  const protected_call *p = lua_touserdata(L, 1);
  lua_pushcfunction(L, p->run);
  lua_pushlightuserdata(L, p->arg);
  if (!moeL_anchor_find(L, p->id))
    return luaL_error(L, "backward: the function of a hook or of moe.fn was collected; keep its tensor in a variable until then");
  lua_call(L, 2, 0);
  return 0;
}

/* Nothing in here raises: it runs in the middle of moe_backward. A failure's value is kept for moeL_raise. */
static moe_status call_closure(lua_State *L, int64_t id, lua_CFunction fn, void *arg) {
  int top = lua_gettop(L);
  protected_call p = {id, fn, arg};
  if (!lua_checkstack(L, 8)) return moe_fail(MOE_ENOMEM, "not enough memory for the Lua stack");
  moe_env *env = moe_env_now();
  bool grad_off = env->grad_off;
  lua_pushcfunction(L, find_and_run);
  lua_pushlightuserdata(L, &p);
  int st = lua_pcall(L, 1, 0, 0);
  env->grad_off = grad_off;
  if (st != LUA_OK) moeL_keep_error(L);
  lua_settop(L, top);
  return st == LUA_OK ? MOE_OK : moe_fail(MOE_ECALLBACK, "backward: a custom function failed");
}

static moe_status closure_backward(moe_ctx *c) {
  const closure *k = (const closure *)(intptr_t)c->user[0];
  return call_closure(moe_env_now()->host, k->id, run_backward, c);
}

/* core.record(name, backward, force, inputs, outputs): ties outputs, made under no_grad, to a custom node. With `force` the
** outputs require a gradient even when no input does (a checkpoint over parameters that it captured). */
static int core_record(lua_State *L) {
  static const char *const names[] = {"fn", "checkpoint"};
  int which = luaL_checkoption(L, 1, NULL, (const char *const[]){"fn", "checkpoint", NULL});
  luaL_checktype(L, 2, LUA_TFUNCTION);
  bool force = lua_toboolean(L, 3);
  lua_settop(L, 5);
  tensor_list in = check_list(L, 4, "fn", "inputs", false, 0), out = check_list(L, 5, "fn", "outputs", false, 0);
  if (out.n == 0) return luaL_error(L, "fn: the forward must return at least one tensor");
  bool wants = force;
  for (int i = 0; i < in.n; i++) wants |= in.v[i]->requires_grad;
  if (!wants || moeL_context(L)->env.grad_off) return 0;
  for (int i = 0; i < out.n; i++)
    if (out.v[i]->node || out.v[i]->requires_grad) return luaL_error(L, "fn: an output already has a history");
  luaL_checkstack(L, in.n + out.n + 8, "fn");
  int top = lua_gettop(L);
  for (int i = 1; i <= in.n; i++) lua_rawgeti(L, 4, i); /* on the stack: their anchors are inherited */
  for (int i = 1; i <= out.n; i++) {
    lua_rawgeti(L, 5, i);
    int box = lua_gettop(L);
    if (i == 1) {
      lua_pushinteger(L, moeL_anchor_add(L, box, 2));
      lua_insert(L, top + 1);
    } else { /* the same anchor serves all outputs */
      lua_rawgeti(L, 5, 1);
      lua_getiuservalue(L, -1, 1);
      lua_setiuservalue(L, box, 1);
      lua_pop(L, 1);
    }
  }
  int64_t id = lua_tointeger(L, top + 1);
  for (int i = 1; i <= out.n; i++) moeL_anchor_inherit(L, lua_gettop(L) - out.n + i);
  moeL_frame f;
  moeL_enter(L, &f);
  closure *k = malloc(sizeof *k);
  moe_status st = k ? MOE_OK : moe_fail(MOE_ENOMEM, "fn: out of memory");
  if (k) {
    k->id = id;
    moe_custom cb = {names[which], closure_backward, closure_free, k, true};
    st = moe_record_custom(&cb, in.v, in.n, out.v, out.n);
    if (st != MOE_OK) free(k);
  }
  return moeL_leave(L, &f, st, 0);
}

/* --- hooks --- */

typedef struct hook_call {
  moe_tensor *g, *r;
} hook_call;

static int run_hook(lua_State *L) {
  hook_call *h = lua_touserdata(L, 1);
  lua_settop(L, 2);
  moeL_pushtensor(L, h->g);
  lua_call(L, 1, 1);
  h->r = h->g;
  if (!lua_isnil(L, -1)) {
    moe_tensor *r = moeL_totensor(L, -1);
    if (r == NULL) return luaL_error(L, "hook: must return a tensor or nil, got %s", moeL_describe(L, -1));
    h->r = moe_scoped(moe_retain(r));
    if (h->r == NULL) return luaL_error(L, "%s", moe_error());
  }
  return 0;
}

static moe_tensor *hook_call_closure(void *ud, moe_tensor *g) {
  const closure *k = ud;
  hook_call h = {g, NULL};
  return call_closure(moe_env_now()->host, k->id, run_hook, &h) == MOE_OK ? h.r : NULL;
}

static int tensor_register_hook(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "register_hook");
  if (!lua_isfunction(L, 2)) return moeL_argerror(L, "register_hook", 2, "f", "a function");
  if (!t->requires_grad) return luaL_error(L, "register_hook: the tensor does not require a gradient");
  closure *k = lua_newuserdatauv(L, sizeof *k, 0); /* found again by its number only */
  k->id = moeL_anchor_add(L, 1, 2);
  closure *own = malloc(sizeof *own);
  if (own == NULL) return luaL_error(L, "out of memory");
  *own = *k;
  int64_t id;
  if (moe_hook_add(t, (moe_hook){.call = hook_call_closure, .release = closure_free, .ud = own}, &id) != MOE_OK) {
    free(own);
    return moeL_raise(L);
  }
  t->carries_lua = true;
  if (t->node) t->node->carries_lua = true;
  lua_pushinteger(L, id);
  return 1;
}

static int tensor_remove_hook(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "remove_hook");
  if (!lua_isinteger(L, 2)) return moeL_argerror(L, "remove_hook", 2, "id", "the number that register_hook gave");
  lua_pushboolean(L, moe_hook_remove(t, lua_tointeger(L, 2)));
  return 1;
}

void moeL_open_autograd(lua_State *L) {
  static const luaL_Reg fns[] = {{"backward", core_backward},       {"grad", core_grad},
                                 {"no_grad", core_no_grad},         {"enable_grad", core_enable_grad},
                                 {"is_grad_enabled", core_is_grad_enabled}, {"record", core_record}, {"autocast", core_autocast},
                                 {NULL, NULL}};
  static const luaL_Reg methods[] = {{"backward", core_backward},
                                     {"register_hook", tensor_register_hook},
                                     {"remove_hook", tensor_remove_hook},
                                     {NULL, NULL}};
  moeL_setfuncs(L, fns);
  luaL_getmetatable(L, MOEL_TENSOR);
  lua_getfield(L, -1, "__metatable");
  moeL_setfuncs(L, methods);
  lua_pop(L, 2);
}
