/* Routings in Lua: userdata "moe.Routing", their constructors, and the operations that take one. The table
** core._sparse holds them; lua/moe/routing.lua and lua/moe/experts.lua are the face.
**
** User value 1 of a routing is a table of what hangs on it: the tensors it was made from (so that gradients and
** the closures behind them live as long), probs, logits, losses, and whatever a router of one's own puts there. */
#include <string.h>

#include "lua/lmoe.h"
#include "nn/routing.h"

#define MOEL_ROUTING "moe.Routing"

typedef struct moeL_routing {
  moe_routing *r; /* NULL: half built, or closed */
} moeL_routing;

/* An empty box with its table of fields, both on the stack: box, fields. */
static moeL_routing *push_empty(lua_State *L) {
  moeL_routing *box = lua_newuserdatauv(L, sizeof *box, 1);
  box->r = NULL;
  luaL_setmetatable(L, MOEL_ROUTING);
  lua_newtable(L);
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, -3, 1);
  return box;
}

static moe_routing *check_routing(lua_State *L, int arg, const char *fname) {
  moeL_routing *box = luaL_testudata(L, arg, MOEL_ROUTING);
  if (box == NULL)
    moeL_argerror(L, fname, arg, "routing", "a routing");
  else if (box->r == NULL)
    luaL_error(L, "%s: the routing is closed", fname);
  return box ? box->r : NULL;
}

static moe_tensor *opt_tensor(lua_State *L, int arg, const char *fname) {
  return lua_isnoneornil(L, arg) ? NULL : moeL_checktensor(L, arg, fname);
}

static int64_t check_count(lua_State *L, int arg, const char *fname, const char *pname) {
  if (!lua_isinteger(L, arg)) moeL_argerror(L, fname, arg, pname, "an integer");
  return lua_tointeger(L, arg);
}

/* fields[name] = the value at arg, when it is there; the fields are on the top */
static void keep(lua_State *L, int arg, const char *name) {
  if (lua_isnoneornil(L, arg)) return;
  lua_pushvalue(L, arg);
  lua_setfield(L, -2, name);
}

/* --- constructors --- */

/* topk(index, weight?, num_experts, mask?) and experts(index, weight?, num_tokens, mask?): the index lists choices of
** one side, `limit` is the size of the other. */
typedef moe_routing *by_index_fn(moe_tensor *index, moe_tensor *weight, int64_t limit, moe_tensor *mask, int base);

static int by_index(lua_State *L, const char *fname, const char *limit_name, by_index_fn *make) {
  moe_tensor *index = moeL_checktensor(L, 1, fname), *weight = opt_tensor(L, 2, fname),
             *mask = opt_tensor(L, 4, fname);
  int64_t limit = check_count(L, 3, fname, limit_name);
  lua_settop(L, 4);
  moeL_routing *box = push_empty(L);
  keep(L, 1, "index");
  keep(L, 2, "gate");
  keep(L, 4, "mask");
  lua_pop(L, 1);
  moeL_frame f;
  moeL_enter(L, &f);
  box->r = make(index, weight, limit, mask, 1);
  return moeL_leave(L, &f, box->r ? MOE_OK : moe_error_code(), 1);
}

static int sparse_topk(lua_State *L) { return by_index(L, "routing.topk", "num_experts", moe_routing_topk); }
static int sparse_experts(lua_State *L) { return by_index(L, "routing.experts", "num_tokens", moe_routing_experts); }

/* dense(gates, mask?) */
static int sparse_dense(lua_State *L) {
  moe_tensor *gates = moeL_checktensor(L, 1, "routing.dense"), *mask = opt_tensor(L, 2, "routing.dense");
  lua_settop(L, 2);
  moeL_routing *box = push_empty(L);
  keep(L, 1, "gate");
  keep(L, 2, "mask");
  lua_pop(L, 1);
  moeL_frame f;
  moeL_enter(L, &f);
  box->r = moe_routing_dense(gates, mask);
  return moeL_leave(L, &f, box->r ? MOE_OK : moe_error_code(), 1);
}

/* soft(dispatch, combine) */
static int sparse_soft(lua_State *L) {
  moe_tensor *dispatch = moeL_checktensor(L, 1, "routing.soft"),
             *combine = moeL_checktensor(L, 2, "routing.soft");
  lua_settop(L, 2);
  moeL_routing *box = push_empty(L);
  keep(L, 1, "dispatch");
  keep(L, 2, "combine_matrix");
  lua_pop(L, 1);
  moeL_frame f;
  moeL_enter(L, &f);
  box->r = moe_routing_soft(dispatch, combine);
  return moeL_leave(L, &f, box->r ? MOE_OK : moe_error_code(), 1);
}

/* routing:limit(capacity, "probs" | "position" | priority [A]): the same with at most so many tokens an expert */
static int routing_limit(lua_State *L) {
  static const char *const policies[] = {"probs", "position", NULL}; /* ORDER moe_drop */
  moe_routing *r = check_routing(L, 1, "routing:limit");
  int64_t capacity = check_count(L, 2, "routing:limit", "capacity");
  int policy = 0;
  moe_tensor *priority = moeL_istensor(L, 3) ? moeL_checktensor(L, 3, "routing:limit") : NULL;
  if (priority) {
    policy = MOE_DROP_PRIORITY;
  } else if (!lua_isnoneornil(L, 3)) {
    if (lua_type(L, 3) != LUA_TSTRING)
      return moeL_argerror(L, "routing:limit", 3, "policy", "\"probs\", \"position\" or a tensor of priorities");
    const char *word = lua_tostring(L, 3);
    while (policies[policy] && strcmp(policies[policy], word) != 0) policy++;
    if (policies[policy] == NULL)
      return luaL_error(L, "routing:limit: unknown drop policy '%s' (probs, position)", word);
  }
  lua_settop(L, 3);
  moeL_routing *box = push_empty(L);
  lua_getiuservalue(L, 1, 1);
  lua_pushnil(L);
  while (lua_next(L, -2)) { /* all fields but the weights, which are fewer now */
    bool weight = lua_type(L, -2) == LUA_TSTRING && strcmp(lua_tostring(L, -2), "weight") == 0;
    lua_pushvalue(L, -2);
    lua_insert(L, -2);
    if (weight)
      lua_pop(L, 2);
    else
      lua_rawset(L, -5);
  }
  lua_pop(L, 2);
  moeL_frame f;
  moeL_enter(L, &f);
  box->r = moe_routing_limit(r, capacity, (moe_drop)policy, priority);
  return moeL_leave(L, &f, box->r ? MOE_OK : moe_error_code(), 1);
}

/* routing:pick{e, ...}: the assignments of those experts alone, as experts 1, 2, ... */
static int routing_pick(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:pick");
  if (lua_type(L, 2) != LUA_TTABLE) return moeL_argerror(L, "routing:pick", 2, "experts", "a list of expert numbers");
  lua_settop(L, 2);
  lua_Integer n = (lua_Integer)lua_rawlen(L, 2);
  int64_t *pick = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof *pick, 0);
  for (lua_Integer i = 1; i <= n; i++) {
    if (lua_rawgeti(L, 2, i) != LUA_TNUMBER || !lua_isinteger(L, -1))
      return luaL_error(L, "routing:pick: the list must hold expert numbers, got a %s at position %I", luaL_typename(L, -1),
                        (LUAI_UACINT)i);
    pick[i - 1] = (int64_t)lua_tointeger(L, -1) - 1;
    lua_pop(L, 1);
  }
  moeL_routing *box = push_empty(L);
  lua_getiuservalue(L, 1, 1);
  lua_getfield(L, -1, "gate");
  lua_setfield(L, -3, "gate"); /* whence its weights come */
  lua_pop(L, 2);
  moeL_frame f;
  moeL_enter(L, &f);
  box->r = moe_routing_pick(r, pick, n);
  return moeL_leave(L, &f, box->r ? MOE_OK : moe_error_code(), 1);
}

/* --- operations --- */

/* Pushes the routing's weight tensor, so that results inherit the closures that hang on it. */
static void push_gate(lua_State *L, int arg) {
  lua_getiuservalue(L, arg, 1);
  lua_getfield(L, -1, "gate");
  lua_remove(L, -2);
}

static moe_value plan_value(moe_routing *r) { return r ? TS(r->plan, MOE_PLAN_LISTS) : NIL; }

/* The number of a choice of op's parameter; raises for an unknown word. */
static int64_t check_choice(lua_State *L, int arg, moe_op_id id, int param, const char *fname) {
  const moe_param *p = &moe_op_signature(&moe_ops[id])->param[param];
  if (lua_isnoneornil(L, arg)) return p->def.i;
  size_t n;
  const char *word = luaL_checklstring(L, arg, &n), *at = p->choices;
  for (int64_t i = 0; *at; i++) {
    size_t len = strcspn(at, "|");
    if (len == n && memcmp(at, word, n) == 0) return i;
    at += len + (at[len] == '|');
  }
  return luaL_error(L, "%s: unknown %s '%s' (%s)", fname, p->name, word, p->choices);
}

static int finish(lua_State *L, moeL_frame *f, int box, moe_tensor *y) {
  if (y != NULL) moeL_fill(L, box, y);
  int n = moeL_leave(L, f, y ? MOE_OK : moe_error_code(), 1);
  lua_settop(L, box);
  return n;
}

/* Under moe.autocast the products are taken in its type; the router's weights stay as they are. */
static moe_tensor *autocast(moe_tensor *t) {
  int dtype = moe_env_now()->autocast;
  return t != NULL && dtype != 0 && t->dtype == MOE_f32 ? MOE_CALL(cast, T(t), I(dtype)) : t;
}

/* ffn(x, w_in, w_out, b_in, b_out, routing, act, gated); without a routing: one dense network */
static int sparse_ffn(lua_State *L) {
  const char *fname = "experts";
  lua_settop(L, 8);
  moe_tensor *x = moeL_checktensor(L, 1, fname), *w_in = moeL_checktensor(L, 2, fname),
             *w_out = moeL_checktensor(L, 3, fname);
  moe_tensor *b_in = opt_tensor(L, 4, fname), *b_out = opt_tensor(L, 5, fname);
  moe_routing *r = lua_isnil(L, 6) ? NULL : check_routing(L, 6, fname);
  int64_t act = check_choice(L, 7, MOE_OP_expert_ffn, 7, fname);
  bool gated = lua_toboolean(L, 8);
  int64_t experts = w_in->ndim > 0 ? w_in->shape[0] : 0;
  if (r && r->experts != experts)
    return luaL_error(L, "%s: the routing is over %I experts, the bank has %I", fname, (LUAI_UACINT)r->experts,
                      (LUAI_UACINT)experts);
  if (r) push_gate(L, 6);
  moeL_box(L);
  int box = lua_gettop(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *y = MOE_CALL(expert_ffn, T(autocast(x)), T(autocast(w_in)), T(autocast(w_out)), T(autocast(b_in)),
                           T(autocast(b_out)), T(r ? r->weight : NULL), plan_value(r), I(act), I(gated));
  return finish(L, &f, box, y);
}

/* routing:gather(x): [T, d] -> [A, d], sorted by expert */
static int routing_gather(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:gather");
  moe_tensor *x = moeL_checktensor(L, 2, "routing:gather");
  moeL_box(L);
  int box = lua_gettop(L);
  moeL_frame f;
  moeL_enter(L, &f);
  return finish(L, &f, box, MOE_CALL(expert_gather, T(x), plan_value(r)));
}

/* routing:combine(y [, weighted = true]): [A, d] -> [T, d] */
static int routing_combine(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:combine");
  moe_tensor *y = moeL_checktensor(L, 2, "routing:combine");
  bool weighted = lua_isnoneornil(L, 3) || lua_toboolean(L, 3);
  push_gate(L, 1);
  moeL_box(L);
  int box = lua_gettop(L);
  moeL_frame f;
  moeL_enter(L, &f);
  return finish(L, &f, box, MOE_CALL(expert_combine, T(y), T(weighted ? r->weight : NULL), plan_value(r)));
}

/* routing:linear(x, w, b?): each row of x [A, k] times its expert's w [n, k] */
static int routing_linear(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:linear");
  moe_tensor *x = moeL_checktensor(L, 2, "routing:linear"), *w = moeL_checktensor(L, 3, "routing:linear"),
             *b = opt_tensor(L, 4, "routing:linear");
  moeL_box(L);
  int box = lua_gettop(L);
  moeL_frame f;
  moeL_enter(L, &f);
  return finish(
      L, &f, box,
      MOE_CALL(expert_linear, T(autocast(x)), T(autocast(w)), T(autocast(b)), plan_value(r), I(r->experts)));
}

/* --- reading --- */

/* A fresh tensor made by one of the core's readers. */
#define PUSH_MADE(L, expr)                                 \
  do {                                                     \
    moeL_box(L);                                           \
    int box_ = lua_gettop(L);                              \
    moeL_frame f_;                                         \
    moeL_enter(L, &f_);                                    \
    moe_tensor *t_ = (expr);                               \
    if (t_ != NULL) moeL_fill(L, box_, t_);                \
    moeL_leave(L, &f_, t_ ? MOE_OK : moe_error_code(), 1); \
  } while (0)

static int routing_load(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:load");
  PUSH_MADE(L, moe_routing_load(r));
  return 1;
}

static int routing_demand(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:demand");
  PUSH_MADE(L, r->demand ? moe_detach(r->demand) : moe_routing_load(r));
  return 1;
}

static int routing_importance(lua_State *L) {
  moe_routing *r = check_routing(L, 1, "routing:importance");
  PUSH_MADE(L, moe_routing_importance(r));
  return 1;
}

/* The weights of the assignments, sorted as they are: [A], differentiable. */
static moe_tensor *sorted_weights(moe_routing *r) {
  int64_t n = moe_numel(r->plan[MOE_PLAN_TOKEN]), flat = -1;
  if (r->weight == NULL) return moe_full(1, &n, MOE_f32, moe_dev(r->plan[0]), 1);
  moe_tensor *w = MOE_CALL(reshape, T(r->weight), INTS(&flat, 1));
  return MOE_CALL(index_select, T(w), I(0), T(r->plan[MOE_PLAN_SOURCE]));
}

enum {
  FIELD_TOKENS,
  FIELD_EXPERTS,
  FIELD_ASSIGNMENTS,
  FIELD_DROPPED,
  FIELD_MASKED,
  FIELD_NONE,
  FIELD_TOKEN,
  FIELD_EXPERT,
  FIELD_SOURCE,
  FIELD_OFFSETS,
  FIELD_WEIGHT,
  FIELD_DROPPED_TOKEN,
  FIELD_DROPPED_EXPERT,
  FIELD_COUNT
};
static const char *const computed[FIELD_COUNT] = {
    "num_tokens", "num_experts", "num_assignments", "dropped", "masked",        "unassigned",    "token",
    "expert",     "source",      "offsets",         "weight",  "dropped_token", "dropped_expert"};

static int find_computed(const char *key) {
  int i = 0;
  while (i < FIELD_COUNT && strcmp(computed[i], key) != 0) i++;
  return i;
}

static void push_list_or_nil(lua_State *L, moe_tensor *list) {
  if (list == NULL)
    lua_pushnil(L);
  else
    PUSH_MADE(L, moe_routing_list(list, 1));
}

/* upvalue 2: the methods */
static int routing_index(lua_State *L) {
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(2)) != LUA_TNIL) return 1;
  moe_routing *r = check_routing(L, 1, "routing");
  lua_getiuservalue(L, 1, 1);
  lua_pushvalue(L, 2);
  if (lua_rawget(L, -2) != LUA_TNIL || lua_type(L, 2) != LUA_TSTRING) return 1;
  switch (find_computed(lua_tostring(L, 2))) {
    case FIELD_TOKENS: lua_pushinteger(L, r->tokens); break;
    case FIELD_EXPERTS: lua_pushinteger(L, r->experts); break;
    case FIELD_ASSIGNMENTS: lua_pushinteger(L, moe_numel(r->plan[MOE_PLAN_TOKEN])); break;
    case FIELD_DROPPED: lua_pushinteger(L, r->dropped); break;
    case FIELD_MASKED: lua_pushinteger(L, r->masked); break;
    case FIELD_NONE: lua_pushinteger(L, r->none); break;
    case FIELD_TOKEN: PUSH_MADE(L, moe_routing_list(r->plan[MOE_PLAN_TOKEN], 1)); break;
    case FIELD_SOURCE: PUSH_MADE(L, moe_routing_list(r->plan[MOE_PLAN_SOURCE], 1)); break;
    case FIELD_EXPERT: PUSH_MADE(L, moe_routing_expert(r, 1)); break;
    case FIELD_OFFSETS: PUSH_MADE(L, moe_routing_offsets(r, 1)); break;
    case FIELD_DROPPED_TOKEN: push_list_or_nil(L, r->dropped_token); break;
    case FIELD_DROPPED_EXPERT: push_list_or_nil(L, r->dropped_expert); break;
    case FIELD_WEIGHT: /* made once, so that its gradient can be asked for */
      push_gate(L, 1);
      PUSH_MADE(L, sorted_weights(r));
      lua_getiuservalue(L, 1, 1);
      lua_pushvalue(L, -2);
      lua_setfield(L, -2, "weight");
      lua_pop(L, 1);
      break;
    default: lua_pushnil(L);
  }
  return 1;
}

static int routing_newindex(lua_State *L) {
  check_routing(L, 1, "routing");
  if (lua_type(L, 2) == LUA_TSTRING) {
    const char *key = lua_tostring(L, 2);
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(2)) != LUA_TNIL || find_computed(key) < FIELD_COUNT)
      return luaL_error(L, "routing: field '%s' cannot be set", key);
    lua_pop(L, 1);
  }
  lua_getiuservalue(L, 1, 1);
  lua_pushvalue(L, 2);
  lua_pushvalue(L, 3);
  lua_rawset(L, -3);
  return 0;
}

static int routing_tostring(lua_State *L) {
  moeL_routing *box = luaL_testudata(L, 1, MOEL_ROUTING);
  if (box == NULL || box->r == NULL) {
    lua_pushliteral(L, "moe.Routing (closed)");
    return 1;
  }
  if (lua_getfield(L, lua_upvalueindex(2), "describe") == LUA_TFUNCTION) {
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    return 1;
  }
  lua_pushfstring(L, "moe.Routing: %I tokens, %I experts", (LUAI_UACINT)box->r->tokens,
                  (LUAI_UACINT)box->r->experts);
  return 1;
}

static int routing_close(lua_State *L) {
  moeL_routing *box = luaL_testudata(L, 1, MOEL_ROUTING);
  if (box != NULL) {
    moe_routing *r = box->r;
    box->r = NULL;
    moe_routing_free(r);
  }
  return 0;
}

static int sparse_is_routing(lua_State *L) {
  lua_pushboolean(L, luaL_testudata(L, 1, MOEL_ROUTING) != NULL);
  return 1;
}

void moeL_open_routing(lua_State *L) {
  static const luaL_Reg methods[] = {
      {"limit", routing_limit},           {"gather", routing_gather}, {"combine", routing_combine},
      {"linear", routing_linear},         {"load", routing_load},     {"demand", routing_demand},
      {"importance", routing_importance}, {"close", routing_close},   {"pick", routing_pick},
      {NULL, NULL}};
  static const luaL_Reg functions[] = {
      {"topk", sparse_topk}, {"dense", sparse_dense}, {"experts", sparse_experts},
      {"soft", sparse_soft}, {"ffn", sparse_ffn},     {"is_routing", sparse_is_routing},
      {NULL, NULL}};
  static const struct {
    const char *event;
    lua_CFunction fn;
  } meta[] = {{"__index", routing_index}, {"__newindex", routing_newindex}, {"__tostring", routing_tostring}};
  luaL_newmetatable(L, MOEL_ROUTING);
  lua_pushcfunction(L, routing_close);
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__gc");
  lua_setfield(L, -2, "__close");
  lua_newtable(L); /* metatable, methods */
  moeL_setfuncs(L, methods);
  for (size_t i = 0; i < sizeof meta / sizeof *meta; i++) {
    lua_pushlightuserdata(L, moeL_context(L));
    lua_pushvalue(L, -2);
    lua_pushcclosure(L, meta[i].fn, 2);
    lua_setfield(L, -3, meta[i].event);
  }
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index"); /* completers look for it here */
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__metatable");
  lua_newtable(L); /* core._sparse */
  moeL_setfuncs(L, functions);
  lua_insert(L, -2);
  lua_setfield(L, -2, "methods");
  lua_setfield(L, -3, "_sparse");
  lua_pop(L, 1);
}
