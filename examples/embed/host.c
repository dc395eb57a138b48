/* A C program that embeds Lua with moe linked statically: two threads, each with a Lua state of its own,
** train a tiny model by a script and query it from C.
**
**   embed [folder of the Lua files, default lua] [script, default examples/embed/learn.lua]
**
** A state belongs to one thread at a time; states share nothing but the pool of worker threads.
*/
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

int luaopen_moe_core(lua_State *L);

typedef struct job {
  const char *lua_dir, *script;
  int seed;
  double asked, answer; /* the model's value at `asked`, 0 when something failed */
  char message[512];    /* empty when all went well */
} job;

/* Everything that may raise runs in here, under lua_pcall. */
static int work(lua_State *L) {
  job *j = lua_touserdata(L, 1);
  luaL_openlibs(L);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
  lua_pushcfunction(L, luaopen_moe_core);
  lua_setfield(L, -2, "moe.core"); /* `require "moe"` finds the core here and the rest by package.path */
  lua_getglobal(L, "package");
  lua_pushfstring(L, "%s/?.lua;%s/?/init.lua", j->lua_dir, j->lua_dir);
  lua_setfield(L, -2, "path");
  if (luaL_loadfile(L, j->script) != LUA_OK) return lua_error(L);
  lua_pushinteger(L, j->seed);
  lua_call(L, 1, 1); /* learn(seed) returns the function predict(number) */
  lua_pushnumber(L, j->asked);
  lua_call(L, 1, 1);
  j->answer = luaL_checknumber(L, -1);
  return 0;
}

static void *thread_main(void *arg) {
  job *j = arg;
  lua_State *L = luaL_newstate();
  if (L == NULL) {
    snprintf(j->message, sizeof j->message, "not enough memory for a state");
    return NULL;
  }
  lua_pushcfunction(L, work);
  lua_pushlightuserdata(L, j);
  if (lua_pcall(L, 1, 0, 0) != LUA_OK) {
    const char *text = lua_tostring(L, -1);
    snprintf(j->message, sizeof j->message, "%s", text ? text : "an error that is no string");
  }
  lua_close(L);
  return NULL;
}

int main(int argc, char **argv) {
  const char *lua_dir = argc > 1 ? argv[1] : "lua";
  const char *script = argc > 2 ? argv[2] : "examples/embed/learn.lua";
  job jobs[2] = {{lua_dir, script, 1, 0.25, 0, ""}, {lua_dir, script, 2, 0.75, 0, ""}};
  pthread_t threads[2];
  for (int i = 0; i < 2; i++)
    if (pthread_create(&threads[i], NULL, thread_main, &jobs[i]) != 0) {
      fprintf(stderr, "embed: cannot start a thread\n");
      return EXIT_FAILURE;
    }
  int status = EXIT_SUCCESS;
  for (int i = 0; i < 2; i++) {
    pthread_join(threads[i], NULL);
    if (jobs[i].message[0]) {
      fprintf(stderr, "thread %d: %s\n", i + 1, jobs[i].message);
      status = EXIT_FAILURE;
    } else {
      printf("thread %d: f(%.2f) = %.3f\n", i + 1, jobs[i].asked, jobs[i].answer);
    }
  }
  return status;
}
