/* Fails every allocation of Lua in turn: each snippet is run again and again, with memory refused from the n-th
** allocation on, until it succeeds. Every failure must be an ordinary Lua error, leak no tensor memory, and leave
** the state usable. Run by oom_spec.lua; prints one line a snippet.
*/
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int luaopen_moe_core(lua_State *L);

static long countdown; /* > 0: allocations until memory is refused */
static int refusing;

static void *alloc(void *ud, void *p, size_t old, size_t want) {
  (void)ud;
  if (want == 0) {
    free(p);
    return NULL;
  }
  if (p == NULL || want > old) {
    if (countdown > 0 && --countdown == 0) refusing = 1;
    if (refusing) return NULL;
  }
  return realloc(p, want);
}

static const char *const snippets[] = {
    "local x = moe.randn(3, 4); local y = (x:t():matmul(x) + 1):sum()",
    "local x = moe.tensor{{1,2},{3,4}}; return x[{ {1,2}, 1 }]:totable()",
    "local w = moe.randn(4, 4, {requires_grad = true}); local l = (w:matmul(w):silu() * 2):sum(); l:backward(); return w.grad",
    "local w = moe.ones(4, {requires_grad = true}); return moe.grad((w * w):sum(), w)",
    "local a, b = moe.randn(4, 6):chunk(2, 2); return moe.cat({a, b}, 1)",
    ("local f = moe.fn{forward = function(c, x) c.x = x; return x * x end, backward = function(c, g) return g * c.x * 2 end};"
     "local w = moe.ones(3, {requires_grad = true}); f(f(w)):sum():backward()"),
    "local w = moe.ones(3, {requires_grad = true}); w:register_hook(function(g) return g * 2 end); (w * 3):sum():backward()",
    "local w = moe.ones(3, {requires_grad = true}); moe.checkpoint(function(x) return (x * w):exp() end, w):sum():backward()",
    "return tostring(moe.randn(20, 20))",
    "return moe.scope(function() local x = moe.zeros(5); return x + 1 end)",
    "local ok, e = pcall(function() return moe.zeros(2):matmul(moe.zeros(3, 3)) end); assert(not ok)",
    "local v, i = moe.randn(3, 5):topk(2); return moe.nn.linear(5, 2)(moe.randn(3, 5)):sum():item()",
};

static int run_snippet(lua_State *L) { /* the compiled snippet */
  lua_call(L, 0, 0);
  return 0;
}

static long live(lua_State *L) {
  lua_gc(L, LUA_GCCOLLECT, 0);
  lua_gc(L, LUA_GCCOLLECT, 0);
  lua_getglobal(L, "moe");
  lua_getfield(L, -1, "memory");
  lua_call(L, 0, 1);
  lua_getfield(L, -1, "live");
  long n = (long)lua_tointeger(L, -1);
  lua_pop(L, 3);
  return n;
}

int main(int argc, char **argv) {
  if (argc != 2) return fprintf(stderr, "usage: oom_check LUA_PATH\n"), 2;
  lua_State *L = lua_newstate(alloc, NULL);
  luaL_openlibs(L);
  luaL_requiref(L, "moe.core", luaopen_moe_core, 0);
  lua_getglobal(L, "package");
  lua_pushstring(L, argv[1]);
  lua_setfield(L, -2, "path");
  lua_settop(L, 0);
  if (luaL_dostring(L, "moe = require 'moe'; local _ = moe.nn")) return fprintf(stderr, "%s\n", lua_tostring(L, -1)), 2;
  int bad = 0;
  for (size_t i = 0; i < sizeof snippets / sizeof *snippets; i++) {
    if (luaL_dostring(L, snippets[i])) { /* once undisturbed: caches fill */
      printf("FAILED without a fault: %s\n", lua_tostring(L, -1));
      return 1;
    }
    lua_settop(L, 0);
    long base = live(L), n = 1;
    int done = 0;
    for (; !done && n < 5000; n++) {
      if (luaL_loadstring(L, snippets[i]) != LUA_OK) return 1;
      lua_pushcfunction(L, run_snippet);
      lua_insert(L, -2);
      countdown = n;
      refusing = 0;
      int st = lua_pcall(L, 1, 0, 0);
      done = !refusing;
      countdown = 0;
      refusing = 0;
      const char *m = st == LUA_OK ? "" : lua_tostring(L, -1);
      if (st != LUA_OK && (m == NULL || strstr(m, "memory") == NULL)) {
        printf("FAILED: snippet %zu, allocation %ld: a strange error: %s\n", i + 1, n, m ? m : "(no message)");
        bad = 1;
      }
      lua_settop(L, 0);
      if (live(L) != base) {
        printf("FAILED: snippet %zu, allocation %ld: %ld bytes leaked\n", i + 1, n, live(L) - base);
        bad = 1;
        base = live(L);
      }
    }
    printf("snippet %zu: %ld allocations failed in turn\n", i + 1, n - 2);
  }
  lua_close(L);
  return bad;
}
