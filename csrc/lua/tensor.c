/* The tensor userdata: boxes, fields, and the methods that are not rows of the operation table. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/rows.h"
#include "lua/lmoe.h"
#include "tensor/print.h"

static const char metatable_key = 't';

/* --- moe.scope: the boxes made while it runs are noted in a list, and closed at its end --- */

static const char scope_key = 's';
static MOE_HOT_TLS int scopes_open; /* over all states of the thread: a cheap first test */

static void note_in_scope(lua_State *L) { /* the new box is on the top */
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &scope_key) == LUA_TTABLE) {
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, (lua_Integer)lua_rawlen(L, -2) + 1);
  }
  lua_pop(L, 1);
}

static moeL_tensor *tobox(lua_State *L, int idx);

/* moe.core.scope(f, ...): results, and the tensors in result tables one level deep, stay open. */
static int core_scope(lua_State *L) {
  if (!lua_isfunction(L, 1)) return moeL_argerror(L, "scope", 1, "f", "a function");
  int nargs = lua_gettop(L) - 1;
  lua_newtable(L);
  lua_rawgetp(L, LUA_REGISTRYINDEX, &scope_key); /* the scope around this one, or nil */
  lua_insert(L, 1);
  lua_insert(L, 1); /* list, outer, f, arguments */
  lua_pushvalue(L, 1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &scope_key);
  scopes_open++;
  int st = lua_pcall(L, nargs, LUA_MULTRET, 0);
  scopes_open--;
  int top = lua_gettop(L);
  luaL_checkstack(L, 8, "scope");
  lua_pushvalue(L, 2);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &scope_key);
  lua_newtable(L); /* what stays */
  int keep = top + 1;
  for (int i = 3; i <= top; i++) {
    lua_pushvalue(L, i);
    lua_pushboolean(L, 1);
    if (moeL_istensor(L, i)) lua_rawset(L, keep);
    else lua_pop(L, 2);
    if (!lua_istable(L, i)) continue;
    lua_pushnil(L);
    while (lua_next(L, i)) {
      if (moeL_istensor(L, -1)) {
        lua_pushvalue(L, -1);
        lua_pushboolean(L, 1);
        lua_rawset(L, keep);
      }
      lua_pop(L, 1);
    }
  }
  lua_Integer n = (lua_Integer)lua_rawlen(L, 1);
  for (lua_Integer k = 1; k <= n; k++) {
    lua_rawgeti(L, 1, k);
    lua_pushvalue(L, -1);
    bool stays = lua_rawget(L, keep) != LUA_TNIL;
    lua_pop(L, 1);
    moeL_tensor *b = tobox(L, -1);
    if (b && !stays) {
      moe_tensor *t = b->t;
      b->t = NULL;
      moe_release(t);
    } else if (stays && lua_istable(L, 2)) { /* now it belongs to the scope around */
      lua_pushvalue(L, -1);
      lua_rawseti(L, 2, (lua_Integer)lua_rawlen(L, 2) + 1);
    }
    lua_pop(L, 1);
  }
  lua_settop(L, top);
  return st == LUA_OK ? top - 2 : lua_error(L);
}

/* --- boxes --- */

void moeL_box(lua_State *L) {
  moeL_tensor *b = lua_newuserdatauv(L, sizeof *b, 1);
  b->t = NULL;
  b->mark = MOEL_MARK;
  lua_rawgetp(L, LUA_REGISTRYINDEX, &metatable_key);
  lua_setmetatable(L, -2);
  if (scopes_open) note_in_scope(L);
}

void moeL_fill(lua_State *L, int idx, moe_tensor *t) {
  moeL_tensor *b = lua_touserdata(L, idx);
  if (t == NULL) return;
  if (b->t != t) {
    moe_tensor *old = b->t;
    b->t = moe_retain(t);
    moe_release(old);
  }
  if (t->carries_lua) moeL_context(L)->fresh_anchors = true;
}

/* Ties boxes that were filled with tensors whose history carries closures to those closures: after the call, where a
** raise leaks nothing. */
void moeL_tie_anchors(lua_State *L) {
  moeL_context(L)->fresh_anchors = false;
  int top = lua_gettop(L);
  for (int i = 1; i <= top; i++) {
    moe_tensor *t = moeL_totensor(L, i);
    if (t == NULL || !t->carries_lua) continue;
    bool tied = lua_getiuservalue(L, i, 1) == LUA_TTABLE;
    lua_pop(L, 1);
    if (!tied) moeL_anchor_inherit(L, i);
  }
}

void moeL_pushtensor(lua_State *L, moe_tensor *t) {
  if (t == NULL) {
    lua_pushnil(L);
    return;
  }
  moeL_box(L);
  moeL_fill(L, -1, t);
  if (moeL_context(L)->fresh_anchors) moeL_tie_anchors(L);
}

static moeL_tensor *tobox(lua_State *L, int idx) {
  if (lua_rawlen(L, idx) != sizeof(moeL_tensor)) return NULL; /* 0 for light userdata */
  moeL_tensor *b = lua_touserdata(L, idx);
  return b && b->mark == MOEL_MARK ? b : NULL;
}

bool moeL_istensor(lua_State *L, int idx) { return tobox(L, idx) != NULL; }

moe_tensor *moeL_totensor(lua_State *L, int idx) {
  moeL_tensor *b = tobox(L, idx);
  return b ? b->t : NULL;
}

moe_tensor *moeL_checktensor(lua_State *L, int arg, const char *fname) {
  moeL_tensor *b = tobox(L, arg);
  if (b && b->t) return b->t;
  if (b) luaL_error(L, "%s: argument %d is a closed tensor", fname, arg);
  moeL_argerror(L, fname, arg, NULL, "a tensor");
  return NULL;
}

static int tensor_close(lua_State *L) {
  moeL_tensor *b = tobox(L, 1);
  if (b == NULL) return moeL_argerror(L, "close", 1, NULL, "a tensor");
  moe_tensor *t = b->t;
  b->t = NULL;
  moe_release(t);
  return 0;
}

/* --- fields --- */

static int field_shape(lua_State *L, moe_tensor *t) {
  lua_createtable(L, t->ndim, 0);
  for (int i = 0; i < t->ndim; i++) {
    lua_pushinteger(L, t->shape[i]);
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

static int field_dtype(lua_State *L, moe_tensor *t) {
  lua_pushstring(L, moe_dtype_name(t->dtype));
  return 1;
}

static int field_device(lua_State *L, moe_tensor *t) {
  lua_pushstring(L, moe_dev(t)->name);
  return 1;
}

/* A row-sparse gradient reads as a dense copy; grad_rows and grad_values are what it is made of. */
static int field_grad(lua_State *L, moe_tensor *t) {
  if (!moe_is_rows(t->grad)) {
    moeL_pushtensor(L, t->grad);
    return 1;
  }
  moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *g = moe_grad_dense(t);
  moeL_fill(L, -1, g);
  return moeL_leave(L, &f, g ? MOE_OK : moe_error_code(), 1);
}

static int field_grad_rows(lua_State *L, moe_tensor *t) {
  if (!moe_is_rows(t->grad)) return 0;
  moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *rows = MOE_CALL(add, T(t->grad->rows), I(1)); /* a copy: what the optimizers read stays in range */
  moeL_fill(L, -1, rows);
  return moeL_leave(L, &f, rows ? MOE_OK : moe_error_code(), 1);
}

static int field_grad_values(lua_State *L, moe_tensor *t) {
  if (!moe_is_rows(t->grad)) return 0;
  moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *values = moe_detach(t->grad);
  moeL_fill(L, -1, values);
  return moeL_leave(L, &f, values ? MOE_OK : moe_error_code(), 1);
}

static int field_requires_grad(lua_State *L, moe_tensor *t) {
  lua_pushboolean(L, t->requires_grad);
  return 1;
}

static int field_ndim(lua_State *L, moe_tensor *t) {
  lua_pushinteger(L, t->ndim);
  return 1;
}

static int field_is_leaf(lua_State *L, moe_tensor *t) {
  lua_pushboolean(L, t->node == NULL);
  return 1;
}

/* The operation that made it, or nil. */
static int field_grad_fn(lua_State *L, moe_tensor *t) {
  if (t->node == NULL) lua_pushnil(L);
  else lua_pushstring(L, t->node->op ? t->node->op->name : t->node->custom.name);
  return 1;
}

static const struct {
  const char *name;
  int (*get)(lua_State *L, moe_tensor *t);
} fields[] = {{"shape", field_shape}, {"dtype", field_dtype}, {"device", field_device},   {"grad", field_grad},
              {"requires_grad", field_requires_grad}, {"ndim", field_ndim}, {"is_leaf", field_is_leaf}, {"grad_fn", field_grad_fn},
              {"grad_rows", field_grad_rows}, {"grad_values", field_grad_values}};
enum { FIELDS = sizeof fields / sizeof *fields };

/* Upvalues: context, methods. Methods first: they are asked for most. */
static int tensor_index(lua_State *L) {
  if (lua_type(L, 2) != LUA_TSTRING) return moeL_index(L);
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(2)) != LUA_TNIL) return 1;
  const char *key = lua_tostring(L, 2);
  for (int i = 0; i < FIELDS; i++)
    if (strcmp(fields[i].name, key) == 0) return fields[i].get(L, moeL_checktensor(L, 1, key));
  const char *names[FIELDS + 1] = {NULL};
  for (int i = 0; i < FIELDS; i++) names[i] = fields[i].name;
  const char *near = moeL_nearest(key, names);
  if (near) return luaL_error(L, "a tensor has no field or method '%s' (did you mean '%s'?)", key, near);
  return luaL_error(L, "a tensor has no field or method '%s'", key);
}

static void set_requires_grad(lua_State *L, moe_tensor *t, bool on) {
  if (on && !moe_dtype_is_float(t->dtype))
    luaL_error(L, "requires_grad: only float tensors can require a gradient, this one is %s", moe_dtype_name(t->dtype));
  if (t->node && !on) luaL_error(L, "requires_grad: only leaves can be changed; use x:detach()");
  if (t->node == NULL) t->requires_grad = on;
}

static int tensor_newindex(lua_State *L) {
  if (lua_type(L, 2) != LUA_TSTRING) return moeL_newindex(L);
  const char *key = lua_tostring(L, 2);
  moe_tensor *t = moeL_checktensor(L, 1, key);
  if (strcmp(key, "requires_grad") == 0) {
    if (!lua_isboolean(L, 3)) return moeL_argerror(L, "requires_grad", 3, "value", "a boolean");
    set_requires_grad(L, t, lua_toboolean(L, 3));
    return 0;
  }
  if (strcmp(key, "grad") == 0) {
    moe_tensor *g = NULL;
    if (!lua_isnil(L, 3)) {
      g = moeL_checktensor(L, 3, "grad");
      char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
      if (!moe_same_shape(g, t) || g->dtype != t->dtype)
        return luaL_error(L, "grad: a gradient %s %s does not fit the tensor %s %s", moe_dtype_name(g->dtype), moe_shape_of(a, g),
                          moe_dtype_name(t->dtype), moe_shape_of(b, t));
      if (g == t) return luaL_error(L, "grad: a tensor cannot be its own gradient");
      if (g->requires_grad) return luaL_error(L, "grad: the gradient must not carry a history (use g:detach())");
    }
    moe_tensor *old = t->grad;
    t->grad = moe_retain(g);
    moe_release(old);
    return 0;
  }
  return luaL_error(L, "a tensor has no field '%s' to assign (requires_grad, grad, or an index)", key);
}

/* --- methods --- */

static int tensor_item(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "item");
  if (moe_numel(t) != 1) {
    char b[MOE_SHAPE_TEXT];
    return luaL_error(L, "item: the tensor has shape %s; only a tensor of one element is a number", moe_shape_of(b, t));
  }
  double d = 0;
  int64_t i = 0;
  moe_status st = moe_dtype_is_float(t->dtype) ? moe_get_f64(t, 0, &d) : moe_get_i64(t, 0, &i);
  if (st != MOE_OK) return moeL_raise(L);
  if (t->dtype == MOE_bool) lua_pushboolean(L, i != 0);
  else if (moe_dtype_is_float(t->dtype)) lua_pushnumber(L, d);
  else lua_pushinteger(L, i);
  return 1;
}

static void push_nested(lua_State *L, const moe_tensor *t, int dim, const double *f, const int64_t *i, int64_t *at) {
  if (dim == t->ndim) {
    if (t->dtype == MOE_bool) lua_pushboolean(L, i[*at] != 0);
    else if (f) lua_pushnumber(L, f[*at]);
    else lua_pushinteger(L, i[*at]);
    ++*at;
    return;
  }
  lua_createtable(L, (int)MOE_MIN(t->shape[dim], 1 << 24), 0);
  for (int64_t k = 0; k < t->shape[dim]; k++) {
    push_nested(L, t, dim + 1, f, i, at);
    lua_rawseti(L, -2, k + 1);
  }
}

static int tensor_totable(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "totable");
  int64_t n = moe_numel(t), at = 0;
  void *host = lua_newuserdatauv(L, (size_t)(n > 0 ? n : 1) * 8, 0);
  bool is_float = moe_dtype_is_float(t->dtype);
  moeL_frame f;
  moeL_enter(L, &f);
  moeL_leave(L, &f, moe_read(t, host, is_float ? MOE_f64 : MOE_i64), 0);
  luaL_checkstack(L, MOE_MAX_DIM + 4, "totable");
  push_nested(L, t, 0, is_float ? host : NULL, host, &at);
  return 1;
}

static int resolve_dim(lua_State *L, moe_tensor *t, const char *fname) {
  int64_t d = moeL_checkdim(L, 2, fname, "dim");
  if (d < -t->ndim || d >= t->ndim)
    return luaL_error(L, "%s: dim %I is out of range for a tensor of %d dimensions", fname, lua_tointeger(L, 2), t->ndim);
  return (int)(d < 0 ? d + t->ndim : d);
}

static int tensor_size(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "size");
  if (lua_isnoneornil(L, 2)) return field_shape(L, t);
  lua_pushinteger(L, t->shape[resolve_dim(L, t, "size")]);
  return 1;
}

static int tensor_stride(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "stride");
  if (!lua_isnoneornil(L, 2)) {
    lua_pushinteger(L, t->stride[resolve_dim(L, t, "stride")]);
    return 1;
  }
  lua_createtable(L, t->ndim, 0);
  for (int i = 0; i < t->ndim; i++) {
    lua_pushinteger(L, t->stride[i]);
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

static int tensor_dim(lua_State *L) { return field_ndim(L, moeL_checktensor(L, 1, "dim")); }

static int tensor_numel(lua_State *L) {
  lua_pushinteger(L, moe_numel(moeL_checktensor(L, 1, "numel")));
  return 1;
}

static int tensor_is_contiguous(lua_State *L) {
  lua_pushboolean(L, moe_is_contiguous(moeL_checktensor(L, 1, "is_contiguous")));
  return 1;
}

static int tensor_len(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "#");
  if (t->ndim == 0) return luaL_error(L, "#: a tensor without dimensions has no length");
  lua_pushinteger(L, t->shape[0]);
  return 1;
}

static int tensor_eq(lua_State *L) {
  moe_tensor *a = moeL_totensor(L, 1), *b = moeL_totensor(L, 2);
  lua_pushboolean(L, a != NULL && a == b);
  return 1;
}

static int tensor_requires_grad_(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "requires_grad_");
  if (!lua_isnoneornil(L, 2) && !lua_isboolean(L, 2)) return moeL_argerror(L, "requires_grad_", 2, "on", "a boolean");
  set_requires_grad(L, t, lua_isnoneornil(L, 2) || lua_toboolean(L, 2));
  lua_settop(L, 1);
  return 1;
}

/* x:to("f64"), x:to("cuda"), x:to("f64", "cpu"): each argument names a type or a device. */
static int tensor_to(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "to");
  moe_dtype dtype = t->dtype;
  moe_device *dev = moe_dev(t);
  for (int i = 2; i <= lua_gettop(L); i++) {
    if (lua_type(L, i) != LUA_TSTRING) return moeL_argerror(L, "to", i, NULL, "a type or device name");
    const char *s = lua_tostring(L, i);
    if (moe_dtype_from_name(s, &dtype)) continue;
    dev = moe_device_find(s);
    if (dev == NULL) return luaL_error(L, "to: '%s' is neither a type nor a device that is there: %s", s, moe_error());
  }
  if (dtype == t->dtype && dev == moe_dev(t)) {
    lua_settop(L, 1);
    return 1;
  }
  moeL_box(L);
  int box = lua_gettop(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *y = t;
  if (dev != moe_dev(t)) {
    y = t->requires_grad && moe_grad_enabled() ? NULL : moe_to_raw(t, t->dtype, dev);
    if (y == NULL && t->requires_grad) moe_fail(MOE_EDEVICE, "to: moving between devices is not recorded; use x:detach():to(...)");
  }
  if (y && dtype != y->dtype) y = MOE_CALL(cast, T(y), I(dtype));
  if (y) moeL_fill(L, box, y);
  return moeL_leave(L, &f, y ? MOE_OK : moe_error_code(), 1);
}

static int tensor_zero_(lua_State *L) {
  moe_tensor *t = moeL_checktensor(L, 1, "zero_");
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *outs[MOE_MAX_OUT];
  moe_status st = moe_call(&moe_ops[MOE_OP_copy], 1, true, (const moe_value[]){T(t), F(0)}, 2, outs, NULL);
  moeL_leave(L, &f, st, 0);
  lua_settop(L, 1);
  return 1;
}

static int tensor_tostring(lua_State *L) {
  moeL_tensor *b = tobox(L, 1);
  if (b == NULL || b->t == NULL) {
    lua_pushstring(L, "moe.Tensor (closed)");
    return 1;
  }
  moeL_frame f;
  moeL_enter(L, &f);
  char *text = moe_tensor_text(b->t);
  moeL_leave(L, &f, text ? MOE_OK : moe_error_code(), 0);
  char *kept = lua_newuserdatauv(L, strlen(text) + 1, 0); /* so that a failing push leaks nothing larger than this */
  strcpy(kept, text);
  free(text);
  lua_pushstring(L, kept);
  return 1;
}

/* for i, row in pairs(x) */
static int pairs_next(lua_State *L) {
  lua_Integer i = luaL_optinteger(L, 2, 0) + 1;
  moe_tensor *t = moeL_checktensor(L, 1, "pairs");
  if (t->ndim == 0 || i > t->shape[0]) return 0;
  lua_pushinteger(L, i);
  lua_pushinteger(L, i);
  lua_gettable(L, 1);
  return 2;
}

static int tensor_pairs(lua_State *L) {
  moeL_checktensor(L, 1, "pairs");
  lua_pushcfunction(L, pairs_next);
  lua_pushvalue(L, 1);
  lua_pushinteger(L, 0);
  return 3;
}

/* The address of the storage: two tensors that share one answer the same. */
static int tensor_storage_id(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)(intptr_t)moeL_checktensor(L, 1, "storage_id")->storage);
  return 1;
}

static moe_signature tensor_options;
static pthread_once_t tensor_options_once = PTHREAD_ONCE_INIT; /* states of several threads share it */

static void parse_tensor_options(void) {
  moe_signature_parse("dtype:dtype?, device:device?, requires_grad:bool=false", "tensor", &tensor_options);
}

/* moe.tensor(data, {dtype=, device=, requires_grad=}): a number, a boolean, nested tables, or a tensor to copy. */
static int core_tensor(lua_State *L) {
  pthread_once(&tensor_options_once, parse_tensor_options);
  moe_value v[MOE_MAX_PARAM];
  luaL_checkany(L, 1);
  moeL_readargs(L, "tensor", &tensor_options, 2, v);
  bool given = v[0].kind != MOE_K_none, leaf = v[2].kind != MOE_K_none && v[2].i;
  moe_dtype dtype = given ? (moe_dtype)v[0].i : MOE_f32;
  moe_device *dev = v[1].kind != MOE_K_none ? v[1].dev : moe_cpu();
  moe_tensor *t = moeL_totensor(L, 1);
  if (t) {
    moeL_box(L);
    moeL_frame f;
    moeL_enter(L, &f);
    moe_tensor *y = moe_to_raw(t, given ? dtype : t->dtype, dev);
    if (y == t && (y = moe_empty_like(t)) != NULL && moe_copy(y, t) != MOE_OK) y = NULL;
    if (y) moeL_fill(L, -1, y);
    moeL_leave(L, &f, y ? MOE_OK : moe_error_code(), 0);
  } else if (lua_istable(L, 1)) {
    moeL_tensor_from_table(L, 1, "tensor", dtype, given, dev);
  } else if (lua_type(L, 1) == LUA_TNUMBER || lua_isboolean(L, 1)) {
    lua_createtable(L, 1, 0);
    lua_pushvalue(L, 1);
    lua_rawseti(L, -2, 1);
    moeL_tensor_from_table(L, -1, "tensor", dtype, given, dev);
    moe_tensor *s = moeL_totensor(L, -1);
    s->ndim = 0;
  } else {
    return moeL_argerror(L, "tensor", 1, "data", "a table, a number, a boolean or a tensor");
  }
  if (leaf) set_requires_grad(L, moeL_totensor(L, -1), true);
  return 1;
}

static int core_is_tensor(lua_State *L) {
  lua_pushboolean(L, moeL_totensor(L, 1) != NULL);
  return 1;
}

void moeL_open_tensor(lua_State *L) {
  static const luaL_Reg methods[] = {{"item", tensor_item},
                                     {"totable", tensor_totable},
                                     {"size", tensor_size},
                                     {"stride", tensor_stride},
                                     {"dim", tensor_dim},
                                     {"numel", tensor_numel},
                                     {"is_contiguous", tensor_is_contiguous},
                                     {"requires_grad_", tensor_requires_grad_},
                                     {"to", tensor_to},
                                     {"zero_", tensor_zero_},
                                     {"storage_id", tensor_storage_id},
                                     {"close", tensor_close},
                                     {"free", tensor_close},
                                     {NULL, NULL}};
  static const luaL_Reg meta[] = {{"__gc", tensor_close},  {"__close", tensor_close},       {"__len", tensor_len}, {"__eq", tensor_eq},
                                  {"__tostring", tensor_tostring}, {"__pairs", tensor_pairs}, {NULL, NULL}};
  static const luaL_Reg fns[] = {{"tensor", core_tensor}, {"is_tensor", core_is_tensor}, {"scope", core_scope}, {NULL, NULL}};
  if (luaL_newmetatable(L, MOEL_TENSOR)) {
    moeL_setfuncs(L, meta);
    lua_newtable(L);
    moeL_setfuncs(L, methods);
    /* completers walk getmetatable(x).__index as a table, and nobody can reach __gc from outside */
    lua_pushvalue(L, -1);
    lua_setfield(L, -2, "__index");
    lua_pushlightuserdata(L, moeL_context(L));
    lua_pushvalue(L, -2);
    lua_pushcclosure(L, tensor_index, 2);
    lua_setfield(L, -3, "__index");
    lua_setfield(L, -2, "__metatable");
    lua_pushlightuserdata(L, moeL_context(L));
    lua_pushcclosure(L, tensor_newindex, 1);
    lua_setfield(L, -2, "__newindex");
    lua_pushvalue(L, -1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &metatable_key);
  }
  lua_pop(L, 1);
  moeL_setfuncs(L, fns);
}
