/* The userdata moe.Trainer: the loop of train/trainer.h over a table of Lua functions. lua/moe/trainer.lua makes the
** table and the methods that are better said in Lua.
**
** User value 1: the trainer's own table (model, options, what the user sees as fields); 2: the optimizer, which the loop
** borrows; 3: the callbacks by the names of moe_trainer_calls.
*/
#include "train/trainer.h"

#include <string.h>

#include "lua/loptim.h"

#define MOEL_TRAINER "moe.Trainer"

enum { UV_SELF = 1, UV_OPTIM, UV_CALLS, UV_COUNT = 3 };

static moe_trainer *check_trainer(lua_State *L, int arg, const char *fname) {
  moe_trainer *t = luaL_testudata(L, arg, MOEL_TRAINER);
  if (t == NULL || t->optim == NULL) moeL_argerror(L, fname, arg, NULL, "a trainer");
  return t;
}

/* --- callbacks --- */

typedef struct host {
  lua_State *L;
  int calls; /* stack place of the table of callbacks */
} host;

/* Pushes callback `name`; false (and nothing pushed) when there is none. */
static bool push_call(const host *h, const char *name) {
  lua_pushstring(h->L, name);
  if (lua_rawget(h->L, h->calls) != LUA_TNIL) return true;
  lua_pop(h->L, 1);
  return false;
}

static moe_status run_call(const host *h, int nargs, int nresults) {
  if (lua_pcall(h->L, nargs, nresults, 0) == LUA_OK) return MOE_OK;
  moeL_keep_error(h->L);
  return moe_fail(MOE_ECALLBACK, "a callback failed");
}

static moe_status call_number(const host *h, const char *name, int64_t step) {
  if (!push_call(h, name)) return MOE_OK;
  lua_pushinteger(h->L, step);
  return run_call(h, 1, 0);
}

static moe_status on_begin(void *ud, int64_t step) { return call_number(ud, "begin", step); }
static moe_status on_stepped(void *ud, int64_t step) { return call_number(ud, "stepped", step); }
static moe_status on_evaluate(void *ud, int64_t step) { return call_number(ud, "evaluate", step); }
static moe_status on_save(void *ud, int64_t step) { return call_number(ud, "save", step); }

static moe_status on_rate(void *ud, int64_t step, double *multiplier) {
  const host *h = ud;
  if (!push_call(h, "rate")) return MOE_OK;
  lua_pushinteger(h->L, step);
  MOE_TRY(run_call(h, 1, 1));
  bool number = lua_type(h->L, -1) == LUA_TNUMBER;
  *multiplier = lua_tonumber(h->L, -1);
  const char *got = luaL_typename(h->L, -1);
  lua_pop(h->L, 1);
  return number ? MOE_OK
                : moe_fail(MOE_EINVAL, "trainer: the schedule must return a number, got %s at step %lld", got, (long long)step);
}

/* The function returns the loss and the number of tokens, or nil at the end. */
static moe_status on_loss(void *ud, int64_t step, int micro, bool training, moe_tensor **loss, double *tokens) {
  const host *h = ud;
  lua_State *L = h->L;
  if (!push_call(h, "loss")) return moe_fail(MOE_EINVAL, "trainer: no loss");
  lua_pushinteger(L, step);
  lua_pushinteger(L, micro);
  lua_pushboolean(L, training);
  MOE_TRY(run_call(h, 3, 2));
  moe_tensor *t = moeL_totensor(L, -2);
  bool end = lua_isnil(L, -2);
  const char *got = luaL_typename(L, -2);
  if (t != NULL) *loss = moe_scoped(moe_retain(t));
  *tokens = lua_tonumber(L, -1);
  lua_pop(L, 1);
  lua_replace(L, h->calls + 1); /* closures of hooks and custom functions hang on the box: the backward finds them here */
  if (t != NULL) return *loss ? MOE_OK : moe_error_code();
  return end ? MOE_OK : moe_fail(MOE_EINVAL, "trainer: the loss function must return a tensor, got %s", got);
}

static moe_status on_not_finite(void *ud, int64_t step, const char *what, double value) {
  const host *h = ud;
  if (!push_call(h, "not_finite")) return MOE_OK;
  lua_pushinteger(h->L, step);
  lua_pushstring(h->L, what);
  lua_pushnumber(h->L, value);
  return run_call(h, 3, 0);
}

static void push_metrics(lua_State *L, const moe_metrics *m) {
  const struct {
    const char *name;
    double v;
  } fields[] = {{"loss", m->loss},       {"lr", m->lr},           {"grad_norm", m->grad_norm},
                {"tokens", m->tokens},   {"seconds", m->seconds}, {"tokens_per_second", m->tokens_per_second}};
  lua_createtable(L, 0, 8);
  lua_pushinteger(L, m->step);
  lua_setfield(L, -2, "step");
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
    lua_pushnumber(L, fields[i].v);
    lua_setfield(L, -2, fields[i].name);
  }
}

/* Making the table may raise (no memory): it is made under the protected call. */
static int report_protected(lua_State *L) {
  const moe_metrics *m = lua_touserdata(L, 2);
  push_metrics(L, m);
  lua_replace(L, 2);
  lua_call(L, 1, 0);
  return 0;
}

static moe_status on_report(void *ud, const moe_metrics *m) {
  const host *h = ud;
  lua_pushcfunction(h->L, report_protected);
  if (!push_call(h, "report")) {
    lua_pop(h->L, 1);
    return MOE_OK;
  }
  lua_pushlightuserdata(h->L, (void *)(uintptr_t)m);
  return run_call(h, 2, 0);
}

static moe_trainer_calls make_calls(host *h) {
  return (moe_trainer_calls){.host = h,
                             .begin = on_begin,
                             .rate = on_rate,
                             .loss = on_loss,
                             .not_finite = on_not_finite,
                             .stepped = on_stepped,
                             .report = on_report,
                             .evaluate = on_evaluate,
                             .save = on_save};
}

/* Lays out the stack for a loop: the callbacks, and a place for the current loss. */
static moe_trainer_calls open_loop(lua_State *L, host *h) {
  luaL_checkstack(L, 24, "trainer");
  lua_getiuservalue(L, 1, UV_CALLS);
  h->L = L;
  h->calls = lua_gettop(L);
  lua_pushnil(L);
  return make_calls(h);
}

/* --- making --- */

static double field_number(lua_State *L, int t, const char *name, double def) {
  lua_getfield(L, t, name);
  double v = lua_isnil(L, -1) ? def : luaL_checknumber(L, -1);
  lua_pop(L, 1);
  return v;
}

static int64_t field_integer(lua_State *L, int t, const char *name, int64_t def) {
  lua_getfield(L, t, name);
  int64_t v = lua_isnil(L, -1) ? def : luaL_checkinteger(L, -1);
  lua_pop(L, 1);
  return v;
}

/* new(self, optimizer, calls, {accumulate, clip, autocast, eval_every, save_every}): checked by trainer.lua */
static int trainer_new(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  moe_optim *o = moeL_tooptim(L, 2);
  if (o == NULL) return moeL_argerror(L, "trainer", 2, "optimizer", "an optimizer");
  luaL_checktype(L, 3, LUA_TTABLE);
  luaL_checktype(L, 4, LUA_TTABLE);
  moe_trainer *t = lua_newuserdatauv(L, sizeof *t, UV_COUNT);
  memset(t, 0, sizeof *t);
  luaL_setmetatable(L, MOEL_TRAINER);
  for (int i = 1; i <= UV_COUNT; i++) {
    lua_pushvalue(L, i);
    lua_setiuservalue(L, -2, i);
  }
  t->accumulate = (int)MOE_MIN(field_integer(L, 4, "accumulate", 1), (int64_t)INT32_MAX);
  t->clip = field_number(L, 4, "clip", 0);
  t->eval_every = field_integer(L, 4, "eval_every", 0);
  t->save_every = field_integer(L, 4, "save_every", 0);
  lua_getfield(L, 4, "autocast");
  t->autocast = MOE_bool;
  if (!lua_isnil(L, -1) && !moe_dtype_from_name(luaL_checkstring(L, -1), &t->autocast)) return moeL_raise(L);
  lua_pop(L, 1);
  t->optim = o;
  return 1;
}

/* --- methods --- */

/* _run(until): the whole loop */
static int trainer_run(lua_State *L) {
  moe_trainer *t = check_trainer(L, 1, "fit");
  int64_t until = luaL_checkinteger(L, 2);
  host h;
  moe_trainer_calls c = open_loop(L, &h);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_trainer_run(t, &c, until);
  return moeL_leave(L, &f, st, 0);
}

/* _advance(final) -> metrics, or nil when the batches ran out */
static int trainer_advance(lua_State *L) {
  moe_trainer *t = check_trainer(L, 1, "steps");
  bool final = lua_toboolean(L, 2), end = false;
  host h;
  moe_trainer_calls c = open_loop(L, &h);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_trainer_advance(t, &c, final, &end);
  moeL_leave(L, &f, st, 0);
  if (end) return 0;
  push_metrics(L, &t->last);
  return 1;
}

/* _evaluate(batches) -> mean loss, batches seen */
static int trainer_evaluate(lua_State *L) {
  moe_trainer *t = check_trainer(L, 1, "evaluate");
  int64_t batches = luaL_checkinteger(L, 2), count;
  double mean;
  host h;
  moe_trainer_calls c = open_loop(L, &h);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = moe_trainer_evaluate(t, &c, batches, &mean, &count);
  moeL_leave(L, &f, st, 0);
  lua_pushnumber(L, mean);
  lua_pushinteger(L, count);
  return 2;
}

/* _set(name, value): the loop's own numbers */
static int trainer_set(lua_State *L) {
  static const char *const names[] = {"step", "clip", "eval_every", "save_every", NULL};
  moe_trainer *t = check_trainer(L, 1, "trainer");
  switch (luaL_checkoption(L, 2, NULL, names)) {
    case 0: t->step = luaL_checkinteger(L, 3); break;
    case 1: t->clip = luaL_checknumber(L, 3); break;
    case 2: t->eval_every = luaL_checkinteger(L, 3); break;
    default: t->save_every = luaL_checkinteger(L, 3);
  }
  return 0;
}

static int trainer_self(lua_State *L) {
  check_trainer(L, 1, "trainer");
  lua_getiuservalue(L, 1, UV_SELF);
  return 1;
}

/* trainer.step; trainer.optimizer; a method (upvalue 1); a field of its own table. */
static int trainer_index(lua_State *L) {
  moe_trainer *t = check_trainer(L, 1, "trainer");
  lua_settop(L, 2);
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL) return 1;
  const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (strcmp(key, "step") == 0) {
    lua_pushinteger(L, t->step);
  } else if (strcmp(key, "optimizer") == 0) {
    lua_getiuservalue(L, 1, UV_OPTIM);
  } else {
    lua_getiuservalue(L, 1, UV_SELF);
    lua_pushvalue(L, 2);
    lua_rawget(L, -2);
  }
  return 1;
}

/* Assignment goes through the methods' _assign, written in Lua: callbacks and the options that may change. */
static int trainer_newindex(lua_State *L) {
  lua_settop(L, 3);
  lua_getfield(L, lua_upvalueindex(1), "_assign");
  lua_insert(L, 1);
  lua_call(L, 3, 0);
  return 0;
}

static int trainer_tostring(lua_State *L) {
  lua_getfield(L, lua_upvalueindex(1), "_text");
  lua_pushvalue(L, 1);
  lua_call(L, 1, 1);
  return 1;
}

static const luaL_Reg methods[] = {{"_run", trainer_run},   {"_advance", trainer_advance}, {"_evaluate", trainer_evaluate},
                                   {"_set", trainer_set},   {"_self", trainer_self},       {NULL, NULL}};

void moeL_open_train(lua_State *L) {
  moeL_open_optim(L);
  lua_newtable(L); /* core._training */
  luaL_newmetatable(L, MOEL_TRAINER);
  lua_newtable(L);
  moeL_setfuncs(L, methods);
  lua_pushvalue(L, -1);
  lua_setfield(L, -4, "methods");
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index"); /* completers walk __metatable.__index */
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__metatable");
  lua_pushvalue(L, -1);
  lua_pushcclosure(L, trainer_index, 1);
  lua_setfield(L, -3, "__index");
  lua_pushvalue(L, -1);
  lua_pushcclosure(L, trainer_newindex, 1);
  lua_setfield(L, -3, "__newindex");
  lua_pushcclosure(L, trainer_tostring, 1);
  lua_setfield(L, -2, "__tostring");
  lua_pop(L, 1);
  lua_pushcfunction(L, trainer_new);
  lua_setfield(L, -2, "new");
  lua_setfield(L, -2, "_training");
}
