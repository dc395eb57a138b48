/* Lua closures that take part in a graph (custom functions, hooks) live in user values of tensor boxes, so that the
** collector sees them and cycles die; the C node holds only a number.
**
** User value 1 of a box is its anchor: a table { [id] = function, p = {parent anchors} }, which only keeps alive. A result
** whose history carries closures gets an anchor whose parents are those of the call's arguments: while any tensor that
** leads to a closure is in reach, so is the closure. A backward finds it by its number in a table that is weak.
*/
#include <stdatomic.h>

#include "lua/lmoe.h"

static _Atomic int64_t next_id = 1;

static const char closures_key = 'w';

static void push_closures(lua_State *L) {
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &closures_key) == LUA_TTABLE) return;
  lua_pop(L, 1);
  lua_newtable(L);
  lua_createtable(L, 0, 1);
  lua_pushliteral(L, "v");
  lua_setfield(L, -2, "__mode");
  lua_setmetatable(L, -2);
  lua_pushvalue(L, -1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &closures_key);
}

/* Pushes the anchor of the box, or nothing. */
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
  push_closures(L);
  lua_pushvalue(L, fn_idx);
  lua_rawseti(L, -2, id);
  lua_pop(L, 2);
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
  push_closures(L);
  bool found = lua_rawgeti(L, -1, id) == LUA_TFUNCTION;
  lua_remove(L, -2);
  if (!found) lua_pop(L, 1);
  return found;
}
