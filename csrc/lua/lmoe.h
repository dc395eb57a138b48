/* The bindings' shared helpers. Only csrc/lua includes Lua's headers.
**
** The order inside every bound function: check arguments -> push empty result boxes -> moeL_enter ->
** call the core (no Lua API that can raise) -> fill the boxes -> moeL_leave, which closes the scope and
** raises what the core reported. So a raise at any point leaks nothing.
**
**   static int tensor_foo(lua_State *L) {
**     moe_tensor *x = moeL_checktensor(L, 1, "foo");
**     moeL_box(L);
**     moeL_frame f;
**     moeL_enter(L, &f);
**     moe_tensor *y = MOE_CALL(foo, T(x));
**     moeL_fill(L, -1, y);
**     return moeL_leave(L, &f, y ? MOE_OK : moe_error_code(), 1);
**   }
*/
#ifndef MOE_LUA_LMOE_H
#define MOE_LUA_LMOE_H

#include <lauxlib.h>
#include <lua.h>

#include "autograd/graph.h"
#include "op/op.h"

#define MOEL_TENSOR "moe.Tensor"

/* One a Lua state, in the registry: see moeL_context. */
typedef struct moeL_ctx {
  moe_env env;
  int64_t collect_at;   /* live bytes at which an entry collects (moe.memory counts them) */
  int64_t collections;
  bool fresh_anchors;   /* a box was filled with a tensor whose history carries closures: see moeL_tie_anchors */
} moeL_ctx;

typedef struct moeL_tensor {
  moe_tensor *t; /* NULL: closed, or not filled yet */
  uint64_t mark; /* MOEL_MARK: tells a box from other userdata of its size without a metatable look-up */
} moeL_tensor;
#define MOEL_MARK UINT64_C(0x6d6f652e54656e73)

typedef struct moeL_frame {
  moe_scope scope;
  moe_env *outer;
  void *outer_host;
  moeL_ctx *ctx;
} moeL_frame;

moeL_ctx *moeL_context(lua_State *L); /* through the registry: works anywhere */
/* Makes the state's settings current, opens a scope, collects garbage when memory presses. May raise
** (a finalizer's error, Lua's out of memory): call it before anything is acquired. */
void moeL_enter(lua_State *L, moeL_frame *f);
/* Closes the scope; raises when status != MOE_OK; else returns nresults. */
int moeL_leave(lua_State *L, moeL_frame *f, moe_status status, int nresults);
/* The same without the raise, for functions that answer nil, message. */
void moeL_exit(lua_State *L, moeL_frame *f);
/* Raises moe_error() with the position of the Lua caller. A failed callback's own error value is rethrown. */
int moeL_raise(lua_State *L);

/* Keeps the error value on the top of the stack (popped) for moeL_raise; the core function then answers
** moe_fail(MOE_ECALLBACK, ...). For callbacks that run under lua_pcall. */
void moeL_keep_error(lua_State *L);

/* --- tensors --- */
void moeL_box(lua_State *L);                        /* pushes an empty tensor */
void moeL_fill(lua_State *L, int idx, moe_tensor *t); /* retains t (NULL: leaves it empty); never raises */
void moeL_tie_anchors(lua_State *L);                /* after the call; moeL_leave does it */
void moeL_pushtensor(lua_State *L, moe_tensor *t);  /* box + fill; NULL pushes nil */
moe_tensor *moeL_totensor(lua_State *L, int idx);   /* NULL when it is no tensor or a closed one; never raises */
bool moeL_istensor(lua_State *L, int idx);          /* open or closed */
moe_tensor *moeL_checktensor(lua_State *L, int arg, const char *fname); /* raises: "foo: argument 1 must be a tensor, got string" */
/* "foo: argument 2 (dim) must be an integer, got a string" */
int moeL_argerror(lua_State *L, const char *fname, int arg, const char *pname, const char *wanted);
/* "a table", "a f32 tensor [2, 3]", "nil", "the string \"x\"" ... on the Lua stack; returns it */
const char *moeL_describe(lua_State *L, int idx);
/* Lua's name for `key` nearest to it among names (NULL-ended), for "did you mean"; NULL when nothing is near. */
const char *moeL_nearest(const char *key, const char *const *names);

/* --- index.c: the one place where 1-based numbers of Lua become the core's --- */
/* Dimension: 1.. or negative; 0 raises. */
int64_t moeL_checkdim(lua_State *L, int idx, const char *fname, const char *pname);
/* Position along a dimension, the same way; the core checks the upper end. */
int64_t moeL_checkpos(lua_State *L, int idx, const char *fname, const char *pname);
/* x[key] and x[key] = value for every kind of key but strings: 1 result / none. */
int moeL_index(lua_State *L);
int moeL_newindex(lua_State *L);

/* --- args.c: arguments by signature --- */
/* Reads the Lua arguments first..top by the signature into v (positional, then a trailing option table by name;
** unknown names raise with the nearest known one). Lists live in userdata pushed on the stack, below what the caller
** pushes later. Raises on a misuse. */
void moeL_readargs(lua_State *L, const char *fname, const moe_signature *sig, int first, moe_value *v);
/* A Lua table of (nested tables of) numbers or booleans -> tensor box pushed on the stack. */
void moeL_tensor_from_table(lua_State *L, int idx, const char *fname, moe_dtype dtype, bool dtype_given, moe_device *dev);

/* --- anchor.c: Lua closures that take part in a graph live in user values, so that cycles die --- */
/* Registers the function at fn_idx under a fresh id and ties it to the tensor box at box_idx (user value 1). */
int64_t moeL_anchor_add(lua_State *L, int box_idx, int fn_idx);
/* Pushes the function with that id; false (and nothing pushed): it was collected. */
/* Ties the box at idx to the closures of all other boxes on the stack. May raise. */
void moeL_anchor_inherit(lua_State *L, int idx);
bool moeL_anchor_find(lua_State *L, int64_t id);

/* --- openers: each adds its functions to the table on the top of the stack (the module moe.core) --- */
void moeL_open_tensor(lua_State *L);
void moeL_open_ops(lua_State *L);
void moeL_open_autograd(lua_State *L);
void moeL_open_module(lua_State *L);
void moeL_open_routing(lua_State *L);
void moeL_open_train(lua_State *L);
void moeL_open_io(lua_State *L);
/* Sets functions with the context as upvalue 1 into the table on the top. */
void moeL_setfuncs(lua_State *L, const luaL_Reg *l);

#endif
