/* Opens a Lua state, loads the module the usual way, works in parallel, closes the state; again and again, in turns with
** waiting. Closing a state unloads its libraries: the worker threads of the pool must outlive that. Run by close_spec.lua.
*/
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <time.h>

int main(void) {
  for (int i = 0; i < 20; i++) {
    lua_State *L = luaL_newstate();
    if (L == NULL) return 1;
    luaL_openlibs(L);
    if (luaL_dostring(L, "local moe = require 'moe'; moe.threads(2); local x = moe.ones(300, 300); return x:matmul(x)[1][1]")) {
      printf("%s\n", lua_tostring(L, -1));
      return 1;
    }
    if (lua_tonumber(L, -1) != 300) return 1;
    lua_close(L);
    nanosleep(&(struct timespec){.tv_nsec = i % 4 * 3000000}, NULL);
  }
  printf("20 states opened and closed\n");
  return 0;
}
