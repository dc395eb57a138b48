/* moe.core._files (moe.io in Lua): safetensors, JSON, and the little of a file system that checkpoints need.
** Misuse raises; what files do to us is answered with nil, message.
*/
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lua/ldata.h"
#include "lua/lmoe.h"

#define FILE_GUARD "moe.io.file"
#define TEXT_GUARD "moe.io.text"
#define JSON_GUARD "moe.io.json"
#define BLOCK_GUARD "moe.io.block"

/* nil, message for what files did; a raise for the rest. */
static int answer(lua_State *L, moe_status st) {
  if (st == MOE_OK) {
    lua_pushboolean(L, 1);
    return 1;
  }
  if (st != MOE_EIO) return moeL_raise(L);
  lua_pushnil(L);
  lua_pushstring(L, moe_error());
  return 2;
}

static const char *check_path(lua_State *L, int arg, const char *fname) {
  size_t n;
  if (lua_type(L, arg) != LUA_TSTRING) moeL_argerror(L, fname, arg, "path", "a file name");
  const char *s = lua_tolstring(L, arg, &n);
  if (strlen(s) != n || n == 0) luaL_error(L, "%s: argument %d (path) is %s", fname, arg, n == 0 ? "empty" : "no file name: it holds a zero byte");
  return s;
}

/* Empty guards: what they hold is freed by __gc when something raises, by us otherwise. */
static void *new_guard(lua_State *L, size_t size, const char *type) {
  void *p = lua_newuserdatauv(L, size, 0);
  memset(p, 0, size);
  luaL_setmetatable(L, type);
  return p;
}

static int file_gc(lua_State *L) {
  moe_st_close(lua_touserdata(L, 1));
  return 0;
}

static int text_gc(lua_State *L) {
  moe_text_free(lua_touserdata(L, 1));
  return 0;
}

static int json_gc(lua_State *L) {
  moe_json_free(lua_touserdata(L, 1));
  return 0;
}

static int block_gc(lua_State *L) {
  void **p = lua_touserdata(L, 1);
  free(*p);
  *p = NULL;
  return 0;
}

/* --- safetensors --- */

/* Counts the pairs of the table at `arg`, checking kinds: tensors or strings by strings. */
static int64_t count_pairs(lua_State *L, int arg, const char *pname, bool tensors) {
  int64_t n = 0;
  if (lua_type(L, arg) != LUA_TTABLE) moeL_argerror(L, "save", arg, pname, "a table");
  for (lua_pushnil(L); lua_next(L, arg); lua_pop(L, 1), n++) {
    if (lua_type(L, -2) != LUA_TSTRING)
      return luaL_error(L, "save: the keys of %s must be strings, got %s", pname, moeL_describe(L, -2));
    const char *key = lua_tostring(L, -2);
    if (tensors ? moeL_totensor(L, -1) == NULL : lua_type(L, -1) != LUA_TSTRING)
      return luaL_error(L, "save: %s[\"%s\"] must be a %s, got %s", pname, key, tensors ? "tensor" : "string",
                        moeL_describe(L, -1));
  }
  return n;
}

static int io_save(lua_State *L) {
  const char *path = check_path(L, 1, "save");
  lua_settop(L, 3);
  int64_t n = count_pairs(L, 2, "tensors", true), nmeta = 0;
  if (!lua_isnil(L, 3)) nmeta = count_pairs(L, 3, "metadata", false);
  moe_st_string *name = lua_newuserdatauv(L, (size_t)(n + 2 * nmeta + 1) * sizeof *name, 0), *meta = name + n;
  moe_tensor **t = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof *t, 0);
  luaL_checkstack(L, 4, "save");
  moeL_frame f;
  moeL_enter(L, &f); /* may collect, and so run finalizers: the tables are read after it */
  int64_t i = 0, k = 0;
  for (lua_pushnil(L); lua_next(L, 2) && i < n; lua_pop(L, 1), i++) {
    size_t len;
    name[i].s = lua_type(L, -2) == LUA_TSTRING ? lua_tolstring(L, -2, &len) : NULL;
    t[i] = moeL_totensor(L, -1);
    if (name[i].s == NULL || t[i] == NULL) break;
    name[i].len = (int64_t)len;
  }
  lua_settop(L, 5);
  if (nmeta > 0)
    for (lua_pushnil(L); lua_next(L, 3) && k < nmeta; lua_pop(L, 1), k++)
      for (int side = 0; side < 2; side++) {
        size_t len = 0;
        bool text = lua_type(L, -2 + side) == LUA_TSTRING;
        meta[2 * k + side].s = text ? lua_tolstring(L, -2 + side, &len) : "";
        meta[2 * k + side].len = (int64_t)len;
      }
  lua_settop(L, 5);
  moe_status st = i != n || k != nmeta ? moe_fail(MOE_EINVAL, "the tables changed meanwhile")
                                       : moe_st_save(path, n, name, t, nmeta, meta);
  if (st == MOE_EINVAL) moe_fail_prefix("save");
  moeL_exit(L, &f);
  return answer(L, st);
}

static moe_st_file *open_file(lua_State *L, const char *path, moe_status *st) {
  moe_st_file *file = new_guard(L, sizeof *file, FILE_GUARD);
  *st = moe_st_open(file, path);
  return file;
}

static void push_metadata(lua_State *L, const moe_st_file *file) {
  const moe_json *j = &file->header;
  lua_newtable(L);
  if (file->metadata < 0) return;
  int32_t k = file->metadata + 1;
  for (int32_t i = 0; i < j->node[file->metadata].count; i++, k = j->node[k].next) {
    lua_pushlstring(L, j->node[k].key, (size_t)j->node[k].key_len);
    lua_pushlstring(L, j->node[k].s, (size_t)j->node[k].len);
    lua_rawset(L, -3);
  }
}

/* Reads one tensor into the table on the top. */
static moe_status load_entry(lua_State *L, const moe_st_file *file, const moe_st_entry *e) {
  lua_pushlstring(L, e->name, (size_t)e->name_len);
  moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_tensor *t = moe_st_read(file, e);
  moe_status st = t ? MOE_OK : moe_error_code();
  if (t != NULL) moeL_fill(L, -1, t);
  moeL_exit(L, &f);
  lua_rawset(L, -3);
  return st;
}

static void check_load_options(lua_State *L) {
  static const char *const known[] = {"names", NULL};
  lua_settop(L, 2);
  if (lua_isnil(L, 2)) return;
  if (!lua_istable(L, 2)) moeL_argerror(L, "load", 2, "options", "a table");
  for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
    if (lua_type(L, -2) != LUA_TSTRING || strcmp(lua_tostring(L, -2), "names") != 0) {
      const char *near = lua_type(L, -2) == LUA_TSTRING ? moeL_nearest(lua_tostring(L, -2), known) : NULL;
      luaL_error(L, "load: unknown option %s%s", moeL_describe(L, -2), near ? " (did you mean 'names'?)" : "");
    }
  }
  lua_getfield(L, 2, "names");
  if (!lua_isnil(L, -1) && !lua_istable(L, -1)) luaL_error(L, "load: names must be a list of strings, got %s", moeL_describe(L, -1));
  for (lua_Integer i = 1, n = lua_istable(L, -1) ? (lua_Integer)lua_rawlen(L, -1) : 0; i <= n; i++) {
    if (lua_rawgeti(L, -1, i) != LUA_TSTRING)
      luaL_error(L, "load: names[%d] must be a string, got %s", (int)i, moeL_describe(L, -1));
    lua_pop(L, 1);
  }
  lua_replace(L, 2);
}

/* load(path, {names = list}?) -> {name = tensor}, metadata */
static int io_load(lua_State *L) {
  const char *path = check_path(L, 1, "load");
  moe_status st;
  check_load_options(L); /* 2: the list of names, or nil */
  moe_st_file *file = open_file(L, path, &st);
  if (st != MOE_OK) return answer(L, st);
  lua_newtable(L);
  if (lua_isnil(L, 2)) {
    for (int64_t i = 0; i < file->n && st == MOE_OK; i++) st = load_entry(L, file, &file->entry[i]);
  } else {
    for (lua_Integer i = 1, n = (lua_Integer)lua_rawlen(L, 2); i <= n && st == MOE_OK; i++) {
      size_t len;
      lua_rawgeti(L, 2, i);
      const char *name = lua_tolstring(L, -1, &len);
      const moe_st_entry *e = moe_st_find(file, name, (int64_t)len);
      st = e ? MOE_OK : moe_fail(MOE_EIO, "%s: holds no tensor \"%.100s\"", path, name);
      lua_pop(L, 1);
      if (e != NULL) st = load_entry(L, file, e);
    }
  }
  if (st != MOE_OK) {
    lua_pushnil(L);
    lua_pushstring(L, moe_error());
  } else {
    push_metadata(L, file);
  }
  moe_st_close(file);
  return 2;
}

/* inspect(path) -> {name = {dtype =, shape =, bytes =}}, metadata: reads the header alone */
static int io_inspect(lua_State *L) {
  const char *path = check_path(L, 1, "inspect");
  moe_status st;
  moe_st_file *file = open_file(L, path, &st);
  if (st != MOE_OK) return answer(L, st);
  lua_newtable(L);
  for (int64_t i = 0; i < file->n; i++) {
    const moe_st_entry *e = &file->entry[i];
    lua_pushlstring(L, e->name, (size_t)e->name_len);
    lua_createtable(L, 0, 3);
    lua_pushstring(L, e->dtype >= 0 ? moe_dtype_name((moe_dtype)e->dtype) : e->type_name);
    lua_setfield(L, -2, "dtype");
    lua_createtable(L, e->ndim, 0);
    for (int d = 0; d < e->ndim; d++) {
      lua_pushinteger(L, e->shape[d]);
      lua_rawseti(L, -2, d + 1);
    }
    lua_setfield(L, -2, "shape");
    lua_pushinteger(L, e->end - e->begin);
    lua_setfield(L, -2, "bytes");
    lua_rawset(L, -3);
  }
  push_metadata(L, file);
  moe_st_close(file);
  return 2;
}

/* --- JSON --- */

static void push_json(lua_State *L, const moe_json *j, int32_t at) {
  const moe_json_node *v = &j->node[at];
  int32_t k = at + 1;
  luaL_checkstack(L, 4, "json_decode"); /* depth is bounded by MOE_JSON_DEPTH */
  switch (v->kind) {
    case MOE_JSON_NULL: lua_pushnil(L); break;
    case MOE_JSON_BOOL: lua_pushboolean(L, (int)v->i); break;
    case MOE_JSON_INT: lua_pushinteger(L, v->i); break;
    case MOE_JSON_FLOAT: lua_pushnumber(L, v->f); break;
    case MOE_JSON_STRING: lua_pushlstring(L, v->s, (size_t)v->len); break;
    default:
      lua_newtable(L);
      for (int32_t i = 0; i < v->count; i++, k = j->node[k].next) {
        if (v->kind == MOE_JSON_OBJECT) lua_pushlstring(L, j->node[k].key, (size_t)j->node[k].key_len);
        else lua_pushinteger(L, i + 1);
        push_json(L, j, k);
        lua_rawset(L, -3);
      }
  }
}

/* json_decode(text) -> value, or nil, message; null becomes nil */
static int io_json_decode(lua_State *L) {
  size_t len;
  if (lua_type(L, 1) != LUA_TSTRING) return moeL_argerror(L, "json_decode", 1, "text", "a string");
  const char *text = lua_tolstring(L, 1, &len);
  moe_json *j = new_guard(L, sizeof *j, JSON_GUARD);
  moe_status st = moe_json_parse(j, text, (int64_t)len);
  if (st != MOE_OK) return answer(L, st);
  push_json(L, j, 0);
  moe_json_free(j);
  return 1;
}

static int compare_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static void indent(moe_text *b, int depth) {
  moe_text_add(b, "\n", 1);
  for (int i = 0; i < depth; i++) moe_text_add(b, "  ", 2);
}

static void add_quoted(lua_State *L, moe_text *b, int idx) {
  size_t n;
  const char *s = lua_tolstring(L, idx, &n);
  if (!moe_utf8_valid(s, (int64_t)n) || strlen(s) != n) luaL_error(L, "json_encode: a string is not UTF-8 text");
  moe_text_quote(b, s, (int64_t)n);
}

static void add_json(lua_State *L, moe_text *b, int depth);

/* A table with a first element is a list and may hold nothing else; any other is an object with sorted string keys. */
static void add_table(lua_State *L, moe_text *b, int depth) {
  int t = lua_gettop(L);
  lua_Integer n = (lua_Integer)lua_rawlen(L, t), count = 0;
  for (lua_pushnil(L); lua_next(L, t); lua_pop(L, 1), count++)
    if (n > 0 ? !lua_isinteger(L, -2) : lua_type(L, -2) != LUA_TSTRING)
      luaL_error(L, "json_encode: a table must be a list or have string keys alone, got the key %s", moeL_describe(L, -2));
  if (n > 0) {
    if (count != n) luaL_error(L, "json_encode: a list has holes");
    moe_text_add(b, "[", 1);
    for (lua_Integer i = 1; i <= n; i++) {
      if (i > 1) moe_text_add(b, ", ", 2);
      lua_rawgeti(L, t, i);
      add_json(L, b, depth + 1);
      lua_pop(L, 1);
    }
    moe_text_add(b, "]", 1);
    return;
  }
  const char **key = lua_newuserdatauv(L, (size_t)(count + 1) * sizeof *key, 0);
  lua_Integer i = 0;
  for (lua_pushnil(L); lua_next(L, t); lua_pop(L, 1)) {
    size_t len;
    key[i] = lua_tolstring(L, -2, &len);
    if (strlen(key[i++]) != len) luaL_error(L, "json_encode: a key holds a zero byte");
  }
  qsort(key, (size_t)count, sizeof *key, compare_text);
  moe_text_add(b, "{", 1);
  for (i = 0; i < count; i++) {
    if (i > 0) moe_text_add(b, ",", 1);
    indent(b, depth);
    lua_pushstring(L, key[i]);
    add_quoted(L, b, -1);
    moe_text_add(b, ": ", 2);
    lua_rawget(L, t);
    add_json(L, b, depth + 1);
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  if (count > 0) indent(b, depth - 1);
  moe_text_add(b, "}", 1);
}

/* The value on the top, which stays. */
static void add_json(lua_State *L, moe_text *b, int depth) {
  if (depth > MOE_JSON_DEPTH) luaL_error(L, "json_encode: nested too deeply (a table that holds itself?)");
  luaL_checkstack(L, 8, "json_encode");
  switch (lua_type(L, -1)) {
    case LUA_TBOOLEAN: moe_text_addf(b, lua_toboolean(L, -1) ? "true" : "false"); break;
    case LUA_TSTRING: add_quoted(L, b, -1); break;
    case LUA_TTABLE: add_table(L, b, depth); break;
    case LUA_TNUMBER:
      if (lua_isinteger(L, -1)) moe_text_addf(b, "%lld", (long long)lua_tointeger(L, -1));
      else if (isfinite(lua_tonumber(L, -1))) moe_text_number(b, lua_tonumber(L, -1));
      else luaL_error(L, "json_encode: %f has no JSON form", lua_tonumber(L, -1));
      break;
    default: luaL_error(L, "json_encode: %s has no JSON form", moeL_describe(L, -1));
  }
  if (b->failed) luaL_error(L, "json_encode: out of memory");
}

static int io_json_encode(lua_State *L) {
  luaL_checkany(L, 1);
  lua_settop(L, 1);
  moe_text *b = new_guard(L, sizeof *b, TEXT_GUARD);
  lua_insert(L, 1);
  add_json(L, b, 1);
  lua_pushlstring(L, b->s ? b->s : "", (size_t)b->n);
  moe_text_free(b);
  return 1;
}

/* --- files --- */

static int io_read(lua_State *L) {
  const char *path = check_path(L, 1, "read");
  lua_Integer limit = lua_isnoneornil(L, 2) ? (lua_Integer)1 << 40 : luaL_checkinteger(L, 2);
  char **data = new_guard(L, sizeof *data, BLOCK_GUARD);
  int64_t size;
  moe_status st = moe_file_read(path, limit, data, &size);
  if (st != MOE_OK) return answer(L, st);
  lua_pushlstring(L, *data, (size_t)size);
  free(*data);
  *data = NULL;
  return 1;
}

static int io_write(lua_State *L) {
  const char *path = check_path(L, 1, "write");
  size_t n;
  if (lua_type(L, 2) != LUA_TSTRING) return moeL_argerror(L, "write", 2, "text", "a string");
  const char *s = lua_tolstring(L, 2, &n);
  return answer(L, moe_file_replace(path, s, (int64_t)n));
}

static int io_list(lua_State *L) {
  const char *path = check_path(L, 1, "list");
  char ***list = new_guard(L, sizeof *list, BLOCK_GUARD);
  int64_t n;
  moe_status st = moe_file_list(path, list, &n);
  if (st != MOE_OK) return answer(L, st);
  lua_createtable(L, (int)MOE_MIN(n, (int64_t)1 << 20), 0);
  for (int64_t i = 0; i < n; i++) {
    lua_pushstring(L, (*list)[i]);
    lua_rawseti(L, -2, i + 1);
  }
  free(*list);
  *list = NULL;
  return 1;
}

static int io_make_dir(lua_State *L) { return answer(L, moe_file_make_dir(check_path(L, 1, "make_dir"))); }
static int io_remove(lua_State *L) { return answer(L, moe_file_remove(check_path(L, 1, "remove"))); }

/* "file", "directory", "other", or nil for what is not there */
static int io_kind(lua_State *L) {
  static const char *const names[] = {NULL, "file", "directory", "other"};
  lua_pushstring(L, names[moe_file_stat(check_path(L, 1, "kind"))]);
  return 1;
}

/* is_terminal(1 or 2): of standard output or error */
static int io_is_terminal(lua_State *L) {
  lua_pushboolean(L, isatty((int)luaL_checkinteger(L, 1)));
  return 1;
}

static const luaL_Reg functions[] = {{"save", io_save},
                                     {"is_terminal", io_is_terminal},
                                     {"load", io_load},
                                     {"inspect", io_inspect},
                                     {"json_decode", io_json_decode},
                                     {"json_encode", io_json_encode},
                                     {"read", io_read},
                                     {"write", io_write},
                                     {"list", io_list},
                                     {"make_dir", io_make_dir},
                                     {"remove", io_remove},
                                     {"kind", io_kind},
                                     {NULL, NULL}};

static void new_type(lua_State *L, const char *name, lua_CFunction gc) {
  luaL_newmetatable(L, name);
  lua_pushcfunction(L, gc);
  lua_setfield(L, -2, "__gc");
  lua_pop(L, 1);
}

void moeL_open_io(lua_State *L) {
  new_type(L, FILE_GUARD, file_gc);
  new_type(L, TEXT_GUARD, text_gc);
  new_type(L, JSON_GUARD, json_gc);
  new_type(L, BLOCK_GUARD, block_gc);
  lua_newtable(L);
  moeL_setfuncs(L, functions);
  lua_setfield(L, -2, "_files");
  moeL_open_data(L);
}
