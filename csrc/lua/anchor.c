/* Lua closures that take part in a graph (custom functions, hooks) live in user values of tensor boxes, so that the
** collector sees them and cycles die; the C node holds only a number.
**
** User value 1 of a box is its anchor: a table { [id] = function, p = {parent anchors} }. A result whose history carries
** closures gets an anchor whose parents are those of the call's arguments. A backward finds a closure by its number
** from the box it was called on.
*/
#include <stdatomic.h>

#include "lua/lmoe.h"

static _Atomic int64_t next_id = 1;

/* Pushes the anchor of the box, or nil. */
static bool push_anchor(lua_State *L, int idx) {
  lua_getiuservalue(L, idx, 1);
  if (lua_istable(L, -1)) return true;
  lua_pop(L, 1);
  return false;
}

int64_t moeL_anchor_add(lua_State *L, int box_idx, int fn_idx) {
  box_idx = lua_absindex(L, box_idx);
  fn_idx = lua_absindex(L, fn_idx);
  int64_t id = atomic_fetch_add(&next_id, 1);
  if (!push_anchor(L, box_idx)) {
    lua_newtable(L);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, box_idx, 1);
  }
  lua_pushvalue(L, fn_idx);
  lua_rawseti(L, -2, id);
  lua_pop(L, 1);
  return id;
}

/* Ties the box at idx to the anchors of all other boxes on the stack. */
void moeL_anchor_inherit(lua_State *L, int idx) {
  int top = lua_gettop(L), count = 0;
  idx = lua_absindex(L, idx);
  luaL_checkstack(L, 6, "anchors");
  lua_newtable(L); /* the parents */
  int parents = top + 1;
  for (int i = 1; i <= top; i++) {
    if (i == idx || !moeL_istensor(L, i) || !push_anchor(L, i)) continue;
    bool known = false;
    for (int k = 1; k <= count && !known; k++) {
      lua_rawgeti(L, parents, k);
      known = lua_rawequal(L, -1, -2);
      lua_pop(L, 1);
    }
    if (known) lua_pop(L, 1);
    else lua_rawseti(L, parents, ++count);
  }
  if (count > 0) {
    if (push_anchor(L, idx)) { /* its own closures stay: they become one more parent */
      lua_rawseti(L, parents, ++count);
    }
    if (count == 1) {
      lua_rawgeti(L, parents, 1);
    } else {
      lua_newtable(L);
      lua_pushvalue(L, parents);
      lua_setfield(L, -2, "p");
    }
    lua_setiuservalue(L, idx, 1);
  }
  lua_settop(L, top);
}

bool moeL_anchor_find(lua_State *L, int64_t id) {
  int top = lua_gettop(L), queue = top + 1, seen = top + 2;
  int64_t n = 0;
  luaL_checkstack(L, 10, "anchors");
  lua_newtable(L);
  lua_newtable(L);
  for (int i = 1; i <= top; i++)
    if (moeL_istensor(L, i) && push_anchor(L, i)) lua_rawseti(L, queue, ++n);
    else if (lua_istable(L, i)) { /* a list of tensors as an argument */
      lua_Integer len = (lua_Integer)lua_rawlen(L, i);
      for (lua_Integer k = 1; k <= len; k++) {
        lua_rawgeti(L, i, k);
        if (moeL_istensor(L, -1) && push_anchor(L, -1)) lua_rawseti(L, queue, ++n);
        lua_pop(L, 1);
      }
    }
  for (int64_t k = 1; k <= n; k++) {
    lua_rawgeti(L, queue, k);
    lua_pushvalue(L, -1);
    bool old = lua_rawget(L, seen) != LUA_TNIL;
    lua_pop(L, 1);
    if (old) {
      lua_pop(L, 1);
      continue;
    }
    lua_pushvalue(L, -1);
    lua_pushboolean(L, 1);
    lua_rawset(L, seen);
    if (lua_rawgeti(L, -1, id) == LUA_TFUNCTION) {
      lua_replace(L, top + 1);
      lua_settop(L, top + 1);
      return true;
    }
    lua_pop(L, 1);
    if (lua_getfield(L, -1, "p") == LUA_TTABLE) {
      lua_Integer len = (lua_Integer)lua_rawlen(L, -1);
      for (lua_Integer j = 1; j <= len; j++) {
        lua_rawgeti(L, -1, j);
        lua_rawseti(L, queue, ++n);
      }
    }
    lua_pop(L, 2);
  }
  lua_settop(L, top);
  return false;
}
