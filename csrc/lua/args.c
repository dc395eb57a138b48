/* Arguments by signature: what a row of the operation table (or of the layer table) wants, read from the Lua stack.
**
** Positional arguments come first; a trailing table with string keys gives the rest by name. A list parameter takes
** a table, or all following integers when no later parameter could take one: x:view(2, 3), x:sum(1, 2, true); a list of
** tensors likewise: moe.einsum("ij,jk->ik", a, b).
*/
#include <math.h>
#include <string.h>

#include "lua/lmoe.h"

static bool is_list_kind(moe_kind k) { return k == MOE_K_ints || k == MOE_K_dims; }

static bool takes_integer(moe_kind k) {
  return k == MOE_K_int || k == MOE_K_number || k == MOE_K_operand || k == MOE_K_dim || k == MOE_K_pos || is_list_kind(k);
}

static const char *wanted(const moe_param *p) {
  switch (p->kind) {
    case MOE_K_tensor: return "a tensor";
    case MOE_K_operand: return "a tensor or a number";
    case MOE_K_index: return "a tensor of positions (i64, i32 or u8)";
    case MOE_K_tensors: return "a list of tensors";
    case MOE_K_number: return "a number";
    case MOE_K_int: return "an integer";
    case MOE_K_dim: return "a dimension";
    case MOE_K_dims: return "a dimension or a list of dimensions";
    case MOE_K_pos: return "a position";
    case MOE_K_ints: return "a list of integers";
    case MOE_K_bool: return "a boolean";
    case MOE_K_enum: return "one of its choices";
    case MOE_K_dtype: return "a type name (f32, f64, bf16, f16, i64, i32, u8, bool)";
    case MOE_K_device: return "a device name (cpu, cuda, cuda:0)";
    default: return "a string";
  }
}

typedef struct reader {
  lua_State *L;
  const char *fname;
  const moe_param *p;
} reader;

static int bad(reader *r, int idx, int arg) {
  if (arg > 0) return moeL_argerror(r->L, r->fname, arg, r->p->name, wanted(r->p));
  return luaL_error(r->L, "%s: option '%s' must be %s, got %s", r->fname, r->p->name, wanted(r->p), moeL_describe(r->L, idx));
}

/* An integer, or a float with an integral value (3.0). Strings are not numbers here. */
static int64_t read_int(reader *r, int idx, int arg) {
  int ok = 0;
  lua_Integer v = lua_type(r->L, idx) == LUA_TNUMBER ? lua_tointegerx(r->L, idx, &ok) : 0;
  if (!ok) bad(r, idx, arg);
  return v;
}

static int64_t read_one(reader *r, int idx, int arg) {
  return r->p->kind == MOE_K_dims ? (read_int(r, idx, arg), moeL_checkdim(r->L, idx, r->fname, r->p->name)) : read_int(r, idx, arg);
}

static int64_t *new_list(lua_State *L, int n) {
  if (n > 1 << 20) luaL_error(L, "a list of %d numbers is too long", n);
  return lua_newuserdatauv(L, sizeof(int64_t) * (size_t)(n > 0 ? n : 1), 0);
}

static moe_value read_list(reader *r, int idx, int arg) {
  lua_State *L = r->L;
  moe_value v = {.kind = r->p->kind};
  if (lua_type(L, idx) != LUA_TTABLE) {
    int64_t one = read_one(r, idx, arg), *p = new_list(L, 1);
    *p = one;
    v.ints.v = p;
    v.ints.n = 1;
    return v;
  }
  lua_Unsigned n = lua_rawlen(L, idx);
  if (n > 1 << 20) luaL_error(L, "%s: '%s' is a list of %I numbers: too long", r->fname, r->p->name, (lua_Integer)n);
  int64_t *p = new_list(L, (int)n);
  for (lua_Unsigned i = 0; i < n; i++) {
    lua_rawgeti(L, idx, (lua_Integer)i + 1);
    if (lua_type(L, -1) != LUA_TNUMBER) bad(r, -1, 0);
    p[i] = read_one(r, lua_gettop(L), 0);
    lua_pop(L, 1);
  }
  v.ints.v = p;
  v.ints.n = (int)n;
  return v;
}

static moe_value read_tensors(reader *r, int idx, int arg) {
  lua_State *L = r->L;
  moe_value v = {.kind = MOE_K_tensors};
  if (lua_type(L, idx) != LUA_TTABLE) bad(r, idx, arg);
  lua_Unsigned n = lua_rawlen(L, idx);
  if (n > MOE_MAX_INPUT) luaL_error(L, "%s: '%s' has %I tensors: at most %d are possible", r->fname, r->p->name, (lua_Integer)n, (int)MOE_MAX_INPUT);
  moe_tensor **list = lua_newuserdatauv(L, sizeof *list * (size_t)(n > 0 ? n : 1), 1);
  lua_pushvalue(L, idx);
  lua_setiuservalue(L, -2, 1); /* the table stays alive */
  for (lua_Unsigned i = 0; i < n; i++) {
    lua_rawgeti(L, idx, (lua_Integer)i + 1);
    list[i] = moeL_totensor(L, -1);
    if (list[i] == NULL)
      luaL_error(L, "%s: element %d of '%s' must be a tensor, got %s", r->fname, (int)i + 1, r->p->name, moeL_describe(L, -1));
    lua_pop(L, 1);
  }
  v.list.v = list;
  v.list.n = (int)n;
  return v;
}

/* `count` tensors that stand on the stack from position idx on: f(a, b, c) for f({a, b, c}). */
static moe_value gather_tensors(reader *r, int idx, int count) {
  lua_createtable(r->L, count, 0);
  for (int k = 0; k < count; k++) {
    lua_pushvalue(r->L, idx + k);
    lua_rawseti(r->L, -2, k + 1);
  }
  return read_tensors(r, lua_gettop(r->L), idx);
}

static moe_value read_enum(reader *r, int idx, int arg) {
  const char *s = lua_type(r->L, idx) == LUA_TSTRING ? lua_tostring(r->L, idx) : NULL;
  if (s != NULL) {
    size_t n = strlen(s);
    int i = 0;
    for (const char *c = r->p->choices; *c; i++) {
      size_t len = strcspn(c, "|");
      if (len == n && memcmp(c, s, n) == 0) return (moe_value){.kind = MOE_K_enum, .i = i};
      c += len + (c[len] == '|');
    }
  }
  const char *got = moeL_describe(r->L, idx);
  luaL_gsub(r->L, r->p->choices, "|", ", ");
  luaL_error(r->L, "%s: '%s' must be one of %s; got %s", r->fname, r->p->name, lua_tostring(r->L, -1), got);
  (void)arg;
  return (moe_value){0};
}

/* arg > 0: the number of the positional argument; 0: it came by name. */
static moe_value read_value(reader *r, int idx, int arg) {
  lua_State *L = r->L;
  moe_value v = {.kind = r->p->kind};
  int type = lua_type(L, idx);
  switch (r->p->kind) {
    case MOE_K_operand:
      if (type == LUA_TNUMBER || type == LUA_TBOOLEAN) {
        v.kind = MOE_K_number;
        v.is_int = type == LUA_TBOOLEAN || lua_isinteger(L, idx);
        v.f = type == LUA_TBOOLEAN ? lua_toboolean(L, idx) : lua_tonumber(L, idx);
        return v;
      } /* else a tensor */ /* FALLTHROUGH */
    case MOE_K_tensor:
    case MOE_K_index:
      v.kind = MOE_K_tensor;
      v.t = moeL_totensor(L, idx);
      if (v.t == NULL && r->p->kind == MOE_K_index && type == LUA_TTABLE) {
        moeL_tensor_from_table(L, idx, r->fname, MOE_i64, true, moe_cpu());
        v.t = moeL_totensor(L, -1);
      }
      if (v.t == NULL) {
        if (moeL_istensor(L, idx)) luaL_error(L, "%s: argument '%s' is a closed tensor", r->fname, r->p->name);
        bad(r, idx, arg);
      }
      if (r->p->kind == MOE_K_index && (moe_dtype_is_float(v.t->dtype) || v.t->dtype == MOE_bool)) bad(r, idx, arg);
      return v;
    case MOE_K_tensors: return read_tensors(r, idx, arg);
    case MOE_K_number:
      if (type != LUA_TNUMBER) bad(r, idx, arg);
      v.f = lua_tonumber(L, idx);
      v.is_int = lua_isinteger(L, idx);
      return v;
    case MOE_K_int: v.i = read_int(r, idx, arg); return v;
    case MOE_K_dim:
      read_int(r, idx, arg);
      v.i = moeL_checkdim(L, idx, r->fname, r->p->name);
      return v;
    case MOE_K_pos:
      read_int(r, idx, arg);
      v.i = moeL_checkpos(L, idx, r->fname, r->p->name);
      return v;
    case MOE_K_dims:
    case MOE_K_ints: return read_list(r, idx, arg);
    case MOE_K_bool:
      if (type != LUA_TBOOLEAN) bad(r, idx, arg);
      v.i = lua_toboolean(L, idx);
      return v;
    case MOE_K_enum: return read_enum(r, idx, arg);
    case MOE_K_dtype: {
      moe_dtype dt = MOE_f32;
      if (type != LUA_TSTRING || !moe_dtype_from_name(lua_tostring(L, idx), &dt)) bad(r, idx, arg);
      v.i = dt;
      return v;
    }
    case MOE_K_device:
      if (type != LUA_TSTRING) bad(r, idx, arg);
      v.dev = moe_device_find(lua_tostring(L, idx));
      if (v.dev == NULL) luaL_error(L, "%s: %s", r->fname, moe_error());
      return v;
    case MOE_K_string:
      if (type != LUA_TSTRING) bad(r, idx, arg);
      v.s = lua_tostring(L, idx);
      return v;
    default: return v;
  }
}

/* The trailing table of options: no list part, a string key. An empty table is a list where one is wanted. */
static bool is_options(lua_State *L, int idx) {
  if (lua_type(L, idx) != LUA_TTABLE || lua_rawlen(L, idx) > 0) return false;
  lua_pushnil(L);
  if (!lua_next(L, idx)) return false;
  bool named = lua_type(L, -2) == LUA_TSTRING;
  lua_pop(L, 2);
  return named;
}

static bool is_empty(lua_State *L, int idx) {
  lua_pushnil(L);
  if (!lua_next(L, idx)) return true;
  lua_pop(L, 2);
  return false;
}

static bool takes_table(moe_kind k) { return is_list_kind(k) || k == MOE_K_tensors || k == MOE_K_index; }

static void read_options(lua_State *L, const char *fname, const moe_signature *sig, int table, moe_value *v, const bool *given) {
  lua_pushnil(L);
  while (lua_next(L, table)) {
    if (lua_type(L, -2) != LUA_TSTRING)
      luaL_error(L, "%s: option names must be strings, got %s", fname, moeL_describe(L, -2));
    const char *key = lua_tostring(L, -2);
    int i = 0;
    while (i < sig->nparams && strcmp(sig->param[i].name, key) != 0) i++;
    if (i == sig->nparams) {
      const char *names[MOE_MAX_PARAM + 1];
      for (int k = 0; k < sig->nparams; k++) names[k] = sig->param[k].name;
      names[sig->nparams] = NULL;
      const char *near = moeL_nearest(key, names);
      if (near) luaL_error(L, "%s: unknown option '%s' (did you mean '%s'?)", fname, key, near);
      luaL_error(L, "%s: unknown option '%s'", fname, key);
    }
    if (given[i]) luaL_error(L, "%s: '%s' is given twice, by position and by name", fname, key);
    reader r = {L, fname, &sig->param[i]};
    int before = lua_gettop(L);
    v[i] = read_value(&r, before, 0);
    if (lua_gettop(L) > before) { /* what holds a list must outlive the loop: below key and value */
      lua_insert(L, table);
      table++;
      lua_settop(L, before + 1);
    }
    lua_pop(L, 1);
  }
}

void moeL_readargs(lua_State *L, const char *fname, const moe_signature *sig, int first, moe_value *v) {
  int top = lua_gettop(L), n = sig->nparams, i = 0;
  bool given[MOE_MAX_PARAM];
  for (int k = 0; k < n; k++) {
    given[k] = false;
    v[k] = (moe_value){.kind = MOE_K_none};
  }
  int options = top >= first && is_options(L, top) ? top : 0;
  int last = options ? top - 1 : top;
  for (int a = first; a <= last; i++) {
    if (i == n) {
      if (a == last && lua_type(L, a) == LUA_TTABLE && is_empty(L, a)) break; /* empty options */
      luaL_error(L, "%s: takes at most %d arguments, got %d", fname, n, last - first + 1);
    }
    const moe_param *p = &sig->param[i];
    reader r = {L, fname, p};
    if (a == last && lua_type(L, a) == LUA_TTABLE && !takes_table(p->kind) && is_empty(L, a)) break; /* empty options */
    if (lua_isnil(L, a)) {
      a++;
      continue;
    }
    given[i] = true;
    if (p->kind == MOE_K_tensors && moeL_istensor(L, a)) {
      int count = 0;
      while (a + count <= last && moeL_istensor(L, a + count)) count++;
      v[i] = gather_tensors(&r, a, count);
      a += count;
      continue;
    }
    bool swallow = is_list_kind(p->kind) && lua_type(L, a) == LUA_TNUMBER;
    for (int k = i + 1; swallow && k < n; k++) swallow = !takes_integer(sig->param[k].kind);
    if (!swallow) {
      v[i] = read_value(&r, a, a);
      a++;
      continue;
    }
    int count = 0;
    while (a + count <= last && lua_type(L, a + count) == LUA_TNUMBER) count++;
    int64_t *list = new_list(L, count);
    for (int k = 0; k < count; k++) list[k] = read_one(&r, a + k, a + k);
    v[i] = (moe_value){.kind = p->kind, .ints = {list, count}};
    a += count;
  }
  if (options) read_options(L, fname, sig, options, v, given);
  for (int k = 0; k < n; k++)
    if (v[k].kind == MOE_K_none && !sig->param[k].optional)
      luaL_error(L, "%s: argument %d (%s) is missing: %s is wanted", fname, first + k, sig->param[k].name, wanted(&sig->param[k]));
}

/* --- tables of numbers as tensors --- */

typedef struct nest {
  lua_State *L;
  const char *fname;
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  bool bools;    /* every leaf so far is a boolean */
  bool any;
  double *f;     /* leaves in order: as numbers ... */
  int64_t *i;    /* ... and exactly, where they are integers */
  int64_t at;
} nest;

/* The shape, from the first branch down. */
static void measure(nest *n, int idx) {
  lua_State *L = n->L;
  luaL_checkstack(L, MOE_MAX_DIM + 4, "nested tables");
  int base = lua_gettop(L);
  lua_pushvalue(L, idx);
  while (lua_type(L, -1) == LUA_TTABLE) {
    if (n->ndim == MOE_MAX_DIM) luaL_error(L, "%s: tables are nested deeper than %d", n->fname, (int)MOE_MAX_DIM);
    n->shape[n->ndim++] = (int64_t)lua_rawlen(L, -1);
    if (lua_rawlen(L, -1) == 0) break;
    lua_rawgeti(L, -1, 1);
  }
  lua_settop(L, base);
}

static void read_nest(nest *n, int idx, int depth) {
  lua_State *L = n->L;
  if (depth == n->ndim) {
    int type = lua_type(L, idx);
    if (type == LUA_TBOOLEAN) {
      n->f[n->at] = (double)(n->i[n->at] = lua_toboolean(L, idx));
    } else if (type == LUA_TNUMBER) {
      n->bools = false;
      n->f[n->at] = lua_tonumber(L, idx);
      n->i[n->at] = lua_isinteger(L, idx) ? lua_tointeger(L, idx) : moe_load_i64(&n->f[n->at], MOE_f64);
    } else {
      luaL_error(L, "%s: element %d of the table must be a number, got %s", n->fname, (int)n->at + 1, moeL_describe(L, idx));
    }
    n->any = true;
    n->at++;
    return;
  }
  if (lua_type(L, idx) != LUA_TTABLE || (int64_t)lua_rawlen(L, idx) != n->shape[depth])
    luaL_error(L, "%s: the table is ragged: at depth %d a row of %d elements was expected, got %s", n->fname, depth + 1,
               (int)n->shape[depth],
               lua_type(L, idx) == LUA_TTABLE ? lua_pushfstring(L, "%d", (int)lua_rawlen(L, idx)) : moeL_describe(L, idx));
  for (int64_t k = 0; k < n->shape[depth]; k++) {
    lua_rawgeti(L, idx, k + 1);
    read_nest(n, lua_gettop(L), depth + 1);
    lua_pop(L, 1);
  }
}

void moeL_tensor_from_table(lua_State *L, int idx, const char *fname, moe_dtype dtype, bool dtype_given, moe_device *dev) {
  idx = lua_absindex(L, idx);
  nest n = {.L = L, .fname = fname, .bools = true};
  measure(&n, idx);
  int64_t numel;
  if (moe_shape_numel(fname, n.ndim, n.shape, &numel) != MOE_OK) luaL_error(L, "%s", moe_error());
  moeL_box(L);
  int box = lua_gettop(L);
  n.f = lua_newuserdatauv(L, sizeof(double) * (size_t)(numel + 1), 0);
  n.i = lua_newuserdatauv(L, sizeof(int64_t) * (size_t)(numel + 1), 0);
  luaL_checkstack(L, 2 * MOE_MAX_DIM, "nested tables");
  read_nest(&n, idx, 0);
  if (!dtype_given && n.any && n.bools) dtype = MOE_bool;
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *t = moe_empty(n.ndim, n.shape, dtype, dev);
  moe_status st = t ? MOE_OK : moe_error_code();
  if (st == MOE_OK && numel > 0) st = moe_dtype_is_float(dtype) ? moe_write(t, n.f, MOE_f64) : moe_write(t, n.i, MOE_i64);
  if (st == MOE_OK) moeL_fill(L, box, t);
  moeL_leave(L, &f, st, 0);
  lua_settop(L, box);
}
