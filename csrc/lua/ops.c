/* The operation table as Lua functions and methods: one C function serves every row. */
#include <string.h>

#include "lua/lmoe.h"

/* Results of a call with any number of them, owned until they are boxed. */
typedef struct many {
  int n;
  moe_tensor *t[MOE_MAX_OUT];
} many;

static int many_gc(lua_State *L) {
  many *m = lua_touserdata(L, 1);
  while (m->n > 0) moe_release(m->t[--m->n]);
  return 0;
}

static many *new_many(lua_State *L) {
  many *m = lua_newuserdatauv(L, sizeof *m, 0);
  m->n = 0;
  if (luaL_newmetatable(L, "moe.Results")) {
    lua_pushcfunction(L, many_gc);
    lua_setfield(L, -2, "__gc");
  }
  lua_setmetatable(L, -2);
  return m;
}

static int call_many(lua_State *L, const moe_op *op, const moe_value *v, int nargs) {
  many *m = new_many(L);
  moe_tensor *outs[MOE_MAX_OUT];
  moeL_frame f;
  moeL_enter(L, &f);
  int nout = 0;
  moe_status st = moe_call(op, 1, false, v, nargs, outs, &nout);
  for (int k = 0; st == MOE_OK && k < nout; k++) m->t[m->n++] = moe_retain(outs[k]);
  moeL_leave(L, &f, st, 0);
  luaL_checkstack(L, nout + 4, "results");
  for (int k = 0; k < nout; k++) moeL_pushtensor(L, m->t[k]);
  return nout;
}

/* Creation: the option requires_grad makes the result a leaf. */
static moe_status make_leaf(const moe_op *op, const moe_signature *sig, const moe_value *v, moe_tensor *t) {
  for (int i = 0; i < sig->nparams; i++)
    if (strcmp(sig->param[i].name, "requires_grad") == 0 && v[i].kind != MOE_K_none && v[i].i) {
      if (!moe_dtype_is_float(t->dtype))
        return moe_fail(MOE_EINVAL, "%s: only float tensors can require a gradient, this one is %s", op->name, moe_dtype_name(t->dtype));
      t->requires_grad = true;
    }
  return MOE_OK;
}

/* Upvalues: context, operation (light), 1 for the in-place form. */
static int op_call(lua_State *L) {
  const moe_op *op = lua_touserdata(L, lua_upvalueindex(2));
  bool inplace = lua_toboolean(L, lua_upvalueindex(3));
  const moe_signature *sig = moe_op_signature(op);
  moe_value v[MOE_MAX_PARAM];
  moeL_readargs(L, op->name, sig, 1, v);
  if (sig->nresults < 0) return call_many(L, op, v, sig->nparams);
  if (inplace && v[0].kind != MOE_K_tensor) return luaL_error(L, "%s_: argument 1 must be a tensor", op->name);
  int first = lua_gettop(L) + 1;
  if (inplace) lua_pushvalue(L, 1);
  else
    for (int k = 0; k < sig->nresults; k++) moeL_box(L);
  moe_tensor *outs[MOE_MAX_OUT];
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_call(op, 1, inplace, v, sig->nparams, outs, NULL);
  if (st == MOE_OK && (op->flags & MOE_F_FUNCTION)) st = make_leaf(op, sig, v, outs[0]);
  if (st == MOE_OK && !inplace)
    for (int k = 0; k < sig->nresults; k++) moeL_fill(L, first + k, outs[k]);
  moeL_leave(L, &f, st, 0);
  if (inplace) {
    if (moeL_totensor(L, 1)->carries_lua) moeL_anchor_inherit(L, 1); /* new parents beside the box's own */
    return 1;
  }
  for (int k = 0; k < sig->nresults; k++) /* an optional result that did not come */
    if (outs[k] == NULL) {
      lua_pushnil(L);
      lua_replace(L, first + k);
    }
  return sig->nresults;
}

/* Unary minus passes its operand twice. */
static int op_call_unary(lua_State *L) {
  lua_settop(L, 1);
  return op_call(L);
}

static void push_op(lua_State *L, lua_CFunction fn, const moe_op *op, bool inplace) {
  lua_pushlightuserdata(L, moeL_context(L));
  /* the context itself, not a light pointer: moeL_enter reads upvalue 1 as a userdata of either kind */
  union {
    const void *in;
    void *out;
  } p = {op};
  lua_pushlightuserdata(L, p.out);
  lua_pushboolean(L, inplace);
  lua_pushcclosure(L, fn, 3);
}

/* moe.core.ops(): the table's rows, for the help, the documents and the automatic checks. */
static int core_ops(lua_State *L) {
  static const struct {
    unsigned bit;
    const char *name;
  } flags[] = {{MOE_F_INPLACE, "inplace"}, {MOE_F_FUNCTION, "function_only"}, {MOE_F_INTERNAL, "internal"}, {MOE_F_VIEW, "view"},
               {MOE_F_RANDOM, "random"},   {MOE_F_NOCHECK, "nocheck"},        {MOE_F_METHOD, "method_only"}, {MOE_F_COMPOSED, "composed"}};
  lua_createtable(L, MOE_OP_COUNT, 0);
  for (int i = 0; i < MOE_OP_COUNT; i++) {
    const moe_op *op = &moe_ops[i];
    const char *fields[][2] = {{"name", op->name}, {"args", op->args}, {"results", op->results}, {"examples", op->examples}, {"doc", op->doc}};
    lua_newtable(L);
    for (size_t k = 0; k < sizeof fields / sizeof *fields; k++) {
      lua_pushstring(L, fields[k][1]);
      lua_setfield(L, -2, fields[k][0]);
    }
    for (size_t k = 0; k < sizeof flags / sizeof *flags; k++)
      if (op->flags & flags[k].bit) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, flags[k].name);
      }
    lua_pushboolean(L, op->backward != NULL || (op->flags & MOE_F_COMPOSED));
    lua_setfield(L, -2, "differentiable");
    const moe_signature *sig = moe_op_signature(op);
    lua_createtable(L, sig->nparams, 0);
    for (int k = 0; k < sig->nparams; k++) {
      lua_newtable(L);
      lua_pushstring(L, sig->param[k].name);
      lua_setfield(L, -2, "name");
      lua_pushstring(L, moe_kind_name(sig->param[k].kind));
      lua_setfield(L, -2, "kind");
      lua_pushboolean(L, sig->param[k].optional);
      lua_setfield(L, -2, "optional");
      if (sig->param[k].choices[0]) {
        lua_pushstring(L, sig->param[k].choices);
        lua_setfield(L, -2, "choices");
      }
      lua_rawseti(L, -2, k + 1);
    }
    lua_setfield(L, -2, "params");
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

void moeL_open_ops(lua_State *L) {
  static const struct {
    const char *event, *op;
  } meta[] = {{"__add", "add"}, {"__sub", "sub"}, {"__mul", "mul"}, {"__div", "div"}, {"__pow", "pow"}, {"__mod", "remainder"}, {"__idiv", "floor_divide"}, {"__unm", "neg"}};
  static const luaL_Reg fns[] = {{"ops", core_ops}, {NULL, NULL}};
  moeL_setfuncs(L, fns);
  luaL_getmetatable(L, MOEL_TENSOR);
  lua_getfield(L, -1, "__metatable"); /* core, metatable, methods */
  for (int i = 0; i < MOE_OP_COUNT; i++) {
    const moe_op *op = &moe_ops[i];
    if (!(op->flags & MOE_F_INTERNAL)) {
      push_op(L, op_call, op, false);
      if (!(op->flags & MOE_F_FUNCTION)) {
        lua_pushvalue(L, -1);
        lua_setfield(L, -3, op->name);
      }
      if (!(op->flags & MOE_F_METHOD)) lua_setfield(L, -4, op->name);
      else lua_pop(L, 1);
    }
    if (op->flags & MOE_F_INPLACE) {
      push_op(L, op_call, op, true);
      lua_pushfstring(L, "%s_", op->name);
      lua_insert(L, -2);
      lua_settable(L, -3);
    }
  }
  for (size_t i = 0; i < sizeof meta / sizeof *meta; i++) {
    const moe_op *op = moe_op_find(meta[i].op);
    if (op == NULL) continue;
    push_op(L, strcmp(meta[i].op, "neg") == 0 ? op_call_unary : op_call, op, false);
    lua_setfield(L, -3, meta[i].event);
  }
  lua_pop(L, 2);
}
