/* core._data: token streams (userdata moe.Tokens) and what loaders need of random numbers. Positions count from 1.
** Draws depend on (seed, number of the draw) alone, so that a loader's state is two integers.
*/
#include <stdlib.h>
#include <string.h>

#include "io/json.h"
#include "io/tokens.h"
#include "lua/ldata.h"

#define MOEL_TOKENS "moe.Tokens"
#define MOEL_VOCAB "moe.Vocab"

typedef struct vocab_box {
  uint32_t *code;
  int64_t n;
} vocab_box;

static moe_tokens *check_tokens(lua_State *L, const char *fname) {
  moe_tokens *t = luaL_testudata(L, 1, MOEL_TOKENS);
  if (t == NULL || t->width == 0) moeL_argerror(L, fname, 1, NULL, "a token stream");
  return t;
}

static int tokens_gc(lua_State *L) {
  moe_tokens_free(lua_touserdata(L, 1));
  return 0;
}

static int vocab_gc(lua_State *L) {
  vocab_box *b = lua_touserdata(L, 1);
  free(b->code);
  b->code = NULL;
  return 0;
}

static moe_tokens *new_tokens(lua_State *L) {
  moe_tokens *t = lua_newuserdatauv(L, sizeof *t, 0);
  memset(t, 0, sizeof *t);
  luaL_setmetatable(L, MOEL_TOKENS);
  return t;
}

static const char *check_text(lua_State *L, size_t *len) {
  if (lua_type(L, 1) != LUA_TSTRING) moeL_argerror(L, "text", 1, "text", "a string");
  return lua_tolstring(L, 1, len);
}

static int fail(lua_State *L, moe_status st) {
  if (st != MOE_EIO) return moeL_raise(L);
  lua_pushnil(L);
  lua_pushstring(L, moe_error());
  return 2;
}

/* bytes(text) -> tokens */
static int data_bytes(lua_State *L) {
  size_t len;
  const char *s = check_text(L, &len);
  moe_status st = moe_tokens_bytes(new_tokens(L), s, (int64_t)len);
  return st == MOE_OK ? 1 : fail(L, st);
}

/* chars(text) -> tokens, list of characters; or nil, message */
static int data_chars(lua_State *L) {
  size_t len;
  const char *s = check_text(L, &len);
  vocab_box *v = lua_newuserdatauv(L, sizeof *v, 0);
  memset(v, 0, sizeof *v);
  luaL_setmetatable(L, MOEL_VOCAB);
  moe_status st = moe_tokens_vocab(s, (int64_t)len, &v->code, &v->n);
  if (st != MOE_OK) return fail(L, st);
  moe_tokens *t = new_tokens(L);
  st = moe_tokens_chars(t, s, (int64_t)len, v->code, v->n);
  if (st != MOE_OK) return fail(L, st);
  lua_createtable(L, (int)v->n, 0);
  for (int64_t i = 0; i < v->n; i++) {
    char text[4];
    lua_pushlstring(L, text, (size_t)moe_utf8_encode(v->code[i], text));
    lua_rawseti(L, -2, i + 1);
  }
  return 2;
}

static int64_t check_int(lua_State *L, int arg, const char *fname, const char *pname, int64_t least, int64_t most) {
  if (!lua_isinteger(L, arg)) moeL_argerror(L, fname, arg, pname, "an integer");
  int64_t v = lua_tointeger(L, arg);
  if (v < least || v > most)
    luaL_error(L, "%s: argument %d (%s) is %I; it must lie between %I and %I", fname, arg, pname, (lua_Integer)v,
               (lua_Integer)least, (lua_Integer)most);
  return v;
}

/* A number below n from 64 random bits; the bias is below 2^-32 for every stream that fits into memory. */
static int64_t below(uint64_t seed, uint64_t block, int64_t n) {
  moe_philox4 p = moe_philox(seed, block);
  uint64_t r = (uint64_t)p.v[0] << 32 | p.v[1];
  return (int64_t)(((unsigned __int128)r * (uint64_t)n) >> 64);
}

/* Fills the boxes x and y at -2 and -1, [b, t]: row i holds the tokens from start[i] on; y lies one further. */
static int make_windows(lua_State *L, const moe_tokens *tk, const int64_t *start, int64_t b, int64_t t) {
  moeL_frame f;
  const int64_t shape[2] = {b, t};
  moeL_box(L);
  moeL_box(L);
  moeL_enter(L, &f);
  moe_tensor *x = moe_empty(2, shape, MOE_i64, moe_cpu()), *y = moe_empty(2, shape, MOE_i64, moe_cpu());
  moe_status st = x && y ? MOE_OK : moe_error_code();
  for (int64_t i = 0; i < b && st == MOE_OK; i++) {
    moe_tokens_copy(tk, start[i], t, 1, moe_data_i64(x) + i * t);
    moe_tokens_copy(tk, start[i] + 1, t, 1, moe_data_i64(y) + i * t);
  }
  if (st == MOE_OK) {
    moeL_fill(L, -2, x);
    moeL_fill(L, -1, y);
  }
  return moeL_leave(L, &f, st, 2);
}

enum { MAX_BATCH = 1 << 20 };

/* tokens:random(first, last, rows, length, seed, draw) -> x, y: windows that begin anywhere in first .. last - length */
static int tokens_random(lua_State *L) {
  moe_tokens *t = check_tokens(L, "random");
  int64_t first = check_int(L, 2, "random", "first", 1, t->n), last = check_int(L, 3, "random", "last", first, t->n);
  int64_t b = check_int(L, 4, "random", "rows", 1, MAX_BATCH), len = check_int(L, 5, "random", "length", 1, last - first);
  uint64_t seed = (uint64_t)check_int(L, 6, "random", "seed", INT64_MIN, INT64_MAX);
  uint64_t draw = (uint64_t)check_int(L, 7, "random", "draw", 0, INT64_MAX / MAX_BATCH);
  int64_t *start = lua_newuserdatauv(L, (size_t)b * sizeof *start, 0);
  for (int64_t i = 0; i < b; i++) start[i] = first - 1 + below(seed, draw * MAX_BATCH + (uint64_t)i, last - first + 1 - len);
  return make_windows(L, t, start, b, len);
}

/* tokens:sequence(first, rows, length) -> x, y: windows one after the other */
static int tokens_sequence(lua_State *L) {
  moe_tokens *t = check_tokens(L, "sequence");
  int64_t first = check_int(L, 2, "sequence", "first", 1, t->n), b = check_int(L, 3, "sequence", "rows", 1, MAX_BATCH);
  int64_t len = check_int(L, 4, "sequence", "length", 1, INT64_MAX / MAX_BATCH / 2);
  if (b * len > t->n - first)
    return luaL_error(L, "sequence: %I windows of %I tokens from token %I on do not fit into %I", (lua_Integer)b,
                      (lua_Integer)len, (lua_Integer)first, (lua_Integer)t->n);
  int64_t *start = lua_newuserdatauv(L, (size_t)b * sizeof *start, 0);
  for (int64_t i = 0; i < b; i++) start[i] = first - 1 + i * len;
  return make_windows(L, t, start, b, len);
}

/* tokens:ids(first, last) -> i64 tensor of one dimension */
static int tokens_ids(lua_State *L) {
  moe_tokens *t = check_tokens(L, "ids");
  int64_t first = check_int(L, 2, "ids", "first", 1, t->n + 1), last = check_int(L, 3, "ids", "last", first - 1, t->n);
  const int64_t shape[1] = {last - first + 1};
  moeL_frame f;
  moeL_box(L);
  moeL_enter(L, &f);
  moe_tensor *x = moe_empty(1, shape, MOE_i64, moe_cpu());
  if (x != NULL) {
    moe_tokens_copy(t, first - 1, shape[0], 1, moe_data_i64(x));
    moeL_fill(L, -1, x);
  }
  return moeL_leave(L, &f, x ? MOE_OK : moe_error_code(), 1);
}

static int tokens_len(lua_State *L) {
  lua_pushinteger(L, check_tokens(L, "#")->n);
  return 1;
}

static int tokens_tostring(lua_State *L) {
  moe_tokens *t = check_tokens(L, "tostring");
  lua_pushfstring(L, "moe.Tokens: %I tokens of %d byte%s", (lua_Integer)t->n, t->width, t->width == 1 ? "" : "s");
  return 1;
}

/* permutation(n, seed, draw) -> i64 tensor: 1 .. n in an order that seed and draw fix (Fisher and Yates) */
static int data_permutation(lua_State *L) {
  int64_t n = check_int(L, 1, "permutation", "n", 0, (int64_t)1 << 31);
  uint64_t seed = (uint64_t)check_int(L, 2, "permutation", "seed", INT64_MIN, INT64_MAX);
  uint64_t draw = (uint64_t)check_int(L, 3, "permutation", "draw", 0, (int64_t)1 << 31);
  const int64_t shape[1] = {n};
  moeL_frame f;
  moeL_box(L);
  moeL_enter(L, &f);
  moe_tensor *x = moe_empty(1, shape, MOE_i64, moe_cpu());
  if (x != NULL) {
    int64_t *p = moe_data_i64(x);
    for (int64_t i = 0; i < n; i++) p[i] = i + 1;
    for (int64_t i = n - 1; i > 0; i--) {
      int64_t k = below(seed, draw << 32 | (uint64_t)i, i + 1), v = p[k];
      p[k] = p[i];
      p[i] = v;
    }
    moeL_fill(L, -1, x);
  }
  return moeL_leave(L, &f, x ? MOE_OK : moe_error_code(), 1);
}

static const luaL_Reg functions[] = {{"bytes", data_bytes}, {"chars", data_chars}, {"permutation", data_permutation}, {NULL, NULL}};
static const luaL_Reg methods[] = {
    {"random", tokens_random}, {"sequence", tokens_sequence}, {"ids", tokens_ids}, {NULL, NULL}};

void moeL_open_data(lua_State *L) {
  luaL_newmetatable(L, MOEL_VOCAB);
  lua_pushcfunction(L, vocab_gc);
  lua_setfield(L, -2, "__gc");
  luaL_newmetatable(L, MOEL_TOKENS);
  lua_pushcfunction(L, tokens_gc);
  lua_setfield(L, -2, "__gc");
  lua_pushcfunction(L, tokens_len);
  lua_setfield(L, -2, "__len");
  lua_pushcfunction(L, tokens_tostring);
  lua_setfield(L, -2, "__tostring");
  lua_newtable(L);
  moeL_setfuncs(L, methods);
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index");
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "__metatable");
  lua_setfield(L, -2, "__index");
  lua_pop(L, 2);
  lua_newtable(L);
  moeL_setfuncs(L, functions);
  lua_setfield(L, -2, "_data");
}
