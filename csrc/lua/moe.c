/* luaopen_moe_core: the context of a state, entry and exit of calls, and the module's plain functions. */
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "base/pool.h"
#include "lua/lmoe.h"

static const char context_key = 'c', callback_key = 'e';

/* A full collection runs at a call's entry when live tensor bytes pass twice what lived after the last one, and at least
** this much more. Small enough that a loop's dead tensors do not push its working set out of the cache, large enough that
** a collection (1.7 ms at 100,000 Lua objects) is a few percent of the time in which a machine can write that much. */
static const int64_t slack = (int64_t)32 << 20;

moeL_ctx *moeL_context(lua_State *L) {
  lua_rawgetp(L, LUA_REGISTRYINDEX, &context_key);
  moeL_ctx *c = lua_touserdata(L, -1);
  lua_pop(L, 1);
  return c;
}

void moeL_setfuncs(lua_State *L, const luaL_Reg *l) {
  lua_rawgetp(L, LUA_REGISTRYINDEX, &context_key);
  luaL_setfuncs(L, l, 1);
}

/* --- entry and exit --- */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void collect(lua_State *L, moeL_ctx *c) {
  lua_gc(L, LUA_GCCOLLECT, 0);
  int64_t live = moe_memory_live(moe_cpu());
  c->collect_at = live + MOE_MAX(slack, live);
  c->collections++;
}

void moeL_enter(lua_State *L, moeL_frame *f) {
  moeL_ctx *c = moeL_context(L); /* not upvalue 1: a closure may keep something else there */
  if (moe_memory_live(moe_cpu()) > c->collect_at) collect(L, c);
  f->ctx = c;
  f->outer = moe_env_set(&c->env);
  f->outer_host = c->env.host;
  c->env.host = L;
  f->scope = moe_scope_open();
  moe_error_clear();
}

void moeL_exit(lua_State *L, moeL_frame *f) {
  (void)L;
  moe_scope_close(f->scope);
  f->ctx->env.host = f->outer_host;
  moe_env_set(f->outer);
}

int moeL_leave(lua_State *L, moeL_frame *f, moe_status status, int nresults) {
  moeL_exit(L, f);
  if (status != MOE_OK) return moeL_raise(L);
  if (f->ctx->fresh_anchors) moeL_tie_anchors(L);
  return nresults;
}

void moeL_keep_error(lua_State *L) { lua_rawsetp(L, LUA_REGISTRYINDEX, &callback_key); }

int moeL_raise(lua_State *L) {
  if (moe_error_code() == MOE_ECALLBACK) { /* the callback's own error value, whatever it is */
    lua_rawgetp(L, LUA_REGISTRYINDEX, &callback_key);
    lua_pushboolean(L, 0);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &callback_key);
    if (lua_toboolean(L, -1)) return lua_error(L);
  }
  return luaL_error(L, "%s", moe_error());
}

/* --- messages --- */

const char *moeL_describe(lua_State *L, int idx) {
  char shape[MOE_SHAPE_TEXT];
  moe_tensor *t = moeL_totensor(L, idx);
  if (t) return lua_pushfstring(L, "a %s tensor %s", moe_dtype_name(t->dtype), moe_shape_of(shape, t));
  if (moeL_istensor(L, idx)) return lua_pushstring(L, "a closed tensor");
  switch (lua_type(L, idx)) {
    case LUA_TNONE: return lua_pushstring(L, "nothing");
    case LUA_TNIL: return lua_pushstring(L, "nil");
    case LUA_TNUMBER:
      return lua_isinteger(L, idx) ? lua_pushfstring(L, "the number %I", lua_tointeger(L, idx))
                                   : lua_pushfstring(L, "the number %f", lua_tonumber(L, idx));
    case LUA_TSTRING: {
      size_t n;
      const char *s = lua_tolstring(L, idx, &n);
      return n <= 40 ? lua_pushfstring(L, "the string \"%s\"", s) : lua_pushstring(L, "a string");
    }
    case LUA_TBOOLEAN: return lua_pushfstring(L, "the boolean %s", lua_toboolean(L, idx) ? "true" : "false");
    case LUA_TUSERDATA:
      if (luaL_getmetafield(L, idx, "__name") == LUA_TSTRING) {
        const char *name = lua_pushfstring(L, "a %s", lua_tostring(L, -1));
        lua_remove(L, -2);
        return name;
      }
  }
  return lua_pushfstring(L, "a %s", luaL_typename(L, idx));
}

int moeL_argerror(lua_State *L, const char *fname, int arg, const char *pname, const char *wanted) {
  const char *got = moeL_describe(L, arg);
  if (pname) return luaL_error(L, "%s: argument %d (%s) must be %s, got %s", fname, arg, pname, wanted, got);
  return luaL_error(L, "%s: argument %d must be %s, got %s", fname, arg, wanted, got);
}

/* Edit distance of short words: a change, a letter more or less, and two neighbours swapped cost one each. */
static int distance(const char *a, const char *b) {
  enum { LONGEST = 40 };
  int d[LONGEST + 1][LONGEST + 1], n = (int)strlen(a), m = (int)strlen(b);
  if (n > LONGEST || m > LONGEST) return LONGEST;
  for (int i = 0; i <= n; i++)
    for (int j = 0; j <= m; j++) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      int best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      best = MOE_MIN(best, MOE_MIN(d[i - 1][j], d[i][j - 1]) + 1);
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) best = MOE_MIN(best, d[i - 2][j - 2] + 1);
      d[i][j] = best;
    }
  return d[n][m];
}

const char *moeL_nearest(const char *key, const char *const *names) {
  const char *best = NULL;
  int least = 1 + (int)strlen(key) / 2;
  for (; *names; names++) {
    int d = distance(key, *names);
    if (strstr(*names, key) || strstr(key, *names)) d = MOE_MIN(d, 2);
    if (d < least) {
      least = d;
      best = *names;
    }
  }
  return best;
}

/* --- plain functions --- */

static int core_threads(lua_State *L) {
  if (!lua_isnoneornil(L, 1)) {
    if (!lua_isinteger(L, 1)) return moeL_argerror(L, "threads", 1, "n", "an integer");
    lua_Integer n = lua_tointeger(L, 1);
    if (n < 1 || n > MOE_MAX_THREADS) return luaL_error(L, "threads: %I is out of range: 1 to %d", n, (int)MOE_MAX_THREADS);
    moe_pool_set_threads((int)n);
  }
  lua_pushinteger(L, moe_pool_threads());
  return 1;
}

static int core_manual_seed(lua_State *L) {
  if (!lua_isinteger(L, 1)) return moeL_argerror(L, "manual_seed", 1, "seed", "an integer");
  moeL_context(L)->env.rng = (moe_rng){.seed = (uint64_t)lua_tointeger(L, 1)};
  return 0;
}

/* The generator's state as two integers, and back: a run resumes where it stopped. */
static int core_rng_state(lua_State *L) {
  moe_rng *r = &moeL_context(L)->env.rng;
  lua_pushinteger(L, (lua_Integer)r->seed);
  lua_pushinteger(L, (lua_Integer)r->offset);
  return 2;
}

static int core_set_rng_state(lua_State *L) {
  for (int i = 1; i <= 2; i++)
    if (!lua_isinteger(L, i)) return moeL_argerror(L, "set_rng_state", i, i == 1 ? "seed" : "offset", "an integer");
  moeL_context(L)->env.rng = (moe_rng){(uint64_t)lua_tointeger(L, 1), (uint64_t)lua_tointeger(L, 2)};
  return 0;
}

static int core_clock(lua_State *L) {
  lua_pushnumber(L, now());
  return 1;
}

static moe_device *check_device(lua_State *L, int arg, const char *fname) {
  if (lua_isnoneornil(L, arg)) return moe_cpu();
  if (lua_type(L, arg) != LUA_TSTRING) moeL_argerror(L, fname, arg, "device", "a device name");
  moe_device *d = moe_device_find(lua_tostring(L, arg));
  if (d == NULL) luaL_error(L, "%s: %s", fname, moe_error());
  return d;
}

static int core_memory(lua_State *L) {
  moe_device *d = check_device(L, 1, "memory");
  moe_memory_info m;
  moe_memory(d, &m);
  const struct {
    const char *name;
    int64_t v;
  } fields[] = {{"live", m.live},
                {"peak", m.peak},
                {"cached", m.cached},
                {"allocations", m.allocations},
                {"system_allocations", m.system_allocations},
                {"collections", moeL_context(L)->collections}};
  lua_createtable(L, 0, 6);
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
    lua_pushinteger(L, fields[i].v);
    lua_setfield(L, -2, fields[i].name);
  }
  return 1;
}

static int core_reset_peak(lua_State *L) {
  moe_memory_reset_peak(check_device(L, 1, "reset_peak_memory"));
  return 0;
}

static int core_empty_cache(lua_State *L) {
  moe_memory_trim(check_device(L, 1, "empty_cache"));
  return 0;
}

/* For the specs: the n-th allocation of tensor memory from now on fails (0: off). */
static int core_fail_after(lua_State *L) {
  moe_memory_fail_after(luaL_checkinteger(L, 1));
  return 0;
}

static const luaL_Reg functions[] = {{"threads", core_threads},
                                     {"manual_seed", core_manual_seed},
                                     {"rng_state", core_rng_state},
                                     {"set_rng_state", core_set_rng_state},
                                     {"clock", core_clock},
                                     {"memory", core_memory},
                                     {"reset_peak_memory", core_reset_peak},
                                     {"empty_cache", core_empty_cache},
                                     {"fail_after", core_fail_after},
                                     {NULL, NULL}};

static void push_build(lua_State *L) {
  lua_newtable(L);
  lua_pushstring(L, moe_isa_name(moe_cpu_isa()));
  lua_setfield(L, -2, "simd");
  lua_pushstring(L, "openblas");
  lua_setfield(L, -2, "blas");
  lua_pushboolean(L, 0);
  lua_setfield(L, -2, "cuda");
  lua_newtable(L);
  for (int i = 0, n = 0; i < MOE_ISA_COUNT; i++)
    if (moe_cpu_has((moe_isa)i)) {
      lua_pushstring(L, moe_isa_name((moe_isa)i));
      lua_rawseti(L, -2, ++n);
    }
  lua_setfield(L, -2, "isas");
  lua_pushstring(L, moe_isa_note());
  lua_setfield(L, -2, "note");
}

__attribute__((visibility("default"))) int luaopen_moe_core(lua_State *L);

int luaopen_moe_core(lua_State *L) {
  luaL_checkversion(L);
  if (moeL_context(L) == NULL) { /* made first, so finalized last */
    moeL_ctx *c = lua_newuserdatauv(L, sizeof *c, 0);
    memset(c, 0, sizeof *c);
    c->env.rng.seed = 0x6d6f65;
    c->collect_at = moe_memory_live(moe_cpu()) + slack;
    lua_rawsetp(L, LUA_REGISTRYINDEX, &context_key);
    lua_pushboolean(L, 0); /* the place of a callback's error: there from now on, so that keeping one needs no memory */
    lua_rawsetp(L, LUA_REGISTRYINDEX, &callback_key);
  }
  lua_newtable(L);
  moeL_setfuncs(L, functions);
  push_build(L);
  lua_setfield(L, -2, "build");
  moeL_open_tensor(L);
  moeL_open_ops(L);
  moeL_open_autograd(L);
  moeL_open_module(L);
  moeL_open_routing(L);
  moeL_open_train(L);
  moeL_open_io(L);
  return 1;
}
