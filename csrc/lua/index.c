/* Where the 1-based numbers of Lua become the core's, and x[key] for every key but a string:
**
**   x[3]  x[-1]                 one position of dim 1; an element of a 1-D tensor is a Lua value
**   x[{ 2, {3, 5}, {} }]        a list: a position, a range (both ends belong to it; {first, last, step} too), all
**   "newaxis" in a list         a new dim of size 1 (moe.newaxis); "..." stands for as many {} as are missing
**   x[tensor]                   rows by number (integers), or where true (bool); one such tensor may stand in a list
**
** Reading goes through select, slice, unsqueeze, index_select and masked_select, so gradients flow. Writing is not
** recorded, and refused where autograd would miss it.
*/
#include <string.h>

#include "lua/lmoe.h"

/* --- numbers --- */

/* From 1 or from the end; the core checks the far end. */
static int64_t from_lua(lua_State *L, int idx, const char *fname, const char *pname, const char *what) {
  int ok = 0;
  lua_Integer v = lua_type(L, idx) == LUA_TNUMBER ? lua_tointegerx(L, idx, &ok) : 0;
  if (!ok) luaL_error(L, "%s: '%s' must be an integer, got %s", fname, pname, moeL_describe(L, idx));
  if (v == 0) luaL_error(L, "%s: '%s' is 0: %s count from 1, or from -1 at the end", fname, pname, what);
  return v > 0 ? v - 1 : v;
}

int64_t moeL_checkdim(lua_State *L, int idx, const char *fname, const char *pname) {
  return from_lua(L, idx, fname, pname, "dimensions");
}

int64_t moeL_checkpos(lua_State *L, int idx, const char *fname, const char *pname) {
  return from_lua(L, idx, fname, pname, "positions");
}

/* --- a key, read before the core is entered --- */

typedef enum part_kind { PART_AT, PART_RANGE, PART_ALL, PART_NEW, PART_REST, PART_LIST } part_kind;

typedef struct part {
  part_kind kind;
  int64_t first, last, step;
  moe_tensor *list; /* positions or a mask; held by the key's table */
} part;

enum { MAX_PARTS = 2 * MOE_MAX_DIM };

typedef struct selection {
  int n;
  part part[MAX_PARTS];
  int list_dim;     /* where the list of positions applies to the view; -1: there is none */
  moe_tensor *list;
} selection;

static void read_range(lua_State *L, int table, part *p) {
  lua_Unsigned n = lua_rawlen(L, table);
  int64_t v[3] = {0, 0, 1};
  if (n > 3) luaL_error(L, "index: a range is {first, last} or {first, last, step}, got %I numbers", (lua_Integer)n);
  p->kind = n == 0 ? PART_ALL : PART_RANGE;
  for (lua_Unsigned i = 0; i < n; i++) {
    lua_rawgeti(L, table, (lua_Integer)i + 1);
    int ok = 0;
    int64_t step = i == 2 && lua_type(L, -1) == LUA_TNUMBER ? lua_tointegerx(L, -1, &ok) : 0;
    if (i == 2 && !ok) luaL_error(L, "index: the step of a range must be an integer, got %s", moeL_describe(L, -1));
    v[i] = i == 2 ? step : moeL_checkpos(L, -1, "index", i == 0 ? "first" : "last");
    lua_pop(L, 1);
  }
  p->first = v[0];
  p->last = n > 1 ? v[1] : v[0];
  p->step = v[2];
}

static void read_part(lua_State *L, int idx, part *p) {
  size_t len;
  memset(p, 0, sizeof *p);
  switch (lua_type(L, idx)) {
    case LUA_TNUMBER:
      p->kind = PART_AT;
      p->first = moeL_checkpos(L, idx, "index", "position");
      return;
    case LUA_TTABLE: read_range(L, idx, p); return;
    case LUA_TSTRING: {
      const char *s = lua_tolstring(L, idx, &len);
      p->kind = strcmp(s, "newaxis") == 0 ? PART_NEW : PART_REST;
      if (p->kind == PART_REST && strcmp(s, "...") != 0) break;
      return;
    }
    default:
      if ((p->list = moeL_totensor(L, idx)) == NULL) break;
      p->kind = PART_LIST;
      return;
  }
  luaL_error(L, "index: wanted a position, a range {first, last}, {} for all, moe.newaxis or a tensor; got %s", moeL_describe(L, idx));
}

static void read_key(lua_State *L, int idx, selection *s) {
  s->list_dim = -1;
  s->list = NULL;
  if (lua_type(L, idx) != LUA_TTABLE) {
    s->n = 1;
    read_part(L, idx, &s->part[0]);
    return;
  }
  lua_Unsigned n = lua_rawlen(L, idx);
  if (n > MAX_PARTS) luaL_error(L, "index: a list of %I keys is too long", (lua_Integer)n);
  if (n == 0 && (lua_pushnil(L), lua_next(L, idx)))
    luaL_error(L, "index: the key is a list like { 2, {3, 5}, {} }; got the field %s", moeL_describe(L, -2));
  s->n = (int)n;
  for (int i = 0; i < s->n; i++) {
    lua_rawgeti(L, idx, i + 1);
    read_part(L, lua_gettop(L), &s->part[i]);
    lua_pop(L, 1);
  }
}

/* --- applying it --- */

/* One result of a call whose positions count from 1. */
static moe_tensor *call1(moe_op_id id, bool inplace, const moe_value *v, int n) {
  moe_tensor *outs[MOE_MAX_OUT];
  for (int i = 0; i < n; i++)
    if (v[i].kind == MOE_K_tensor && v[i].t == NULL) return NULL;
  return moe_call(&moe_ops[id], 1, inplace, v, n, outs, NULL) == MOE_OK ? outs[0] : NULL;
}
#define CALL1(name, inplace, ...) \
  call1(MOE_OP_##name, inplace, (const moe_value[]){__VA_ARGS__}, (int)(sizeof((const moe_value[]){__VA_ARGS__}) / sizeof(moe_value)))

/* The view that all parts but a list show of x. */
static moe_tensor *apply(moe_tensor *x, selection *s) {
  int used = 0, rest = -1, d = 0;
  for (int i = 0; i < s->n; i++) {
    if (s->part[i].kind == PART_REST && rest >= 0) {
      moe_fail(MOE_EINVAL, "index: \"...\" appears twice");
      return NULL;
    }
    if (s->part[i].kind == PART_REST) rest = i;
    /* a mask of several dimensions takes as many of x's */
    else if (s->part[i].kind == PART_LIST && s->part[i].list->dtype == MOE_bool) used += s->part[i].list->ndim;
    else if (s->part[i].kind != PART_NEW) used++;
  }
  char text[MOE_SHAPE_TEXT];
  if (used > x->ndim) {
    moe_fail(MOE_EINVAL, "index: %d keys for a tensor of shape %s", used, moe_shape_of(text, x));
    return NULL;
  }
  moe_tensor *y = x;
  int all = x->ndim - used;
  for (int i = 0; i < s->n && y != NULL; i++) {
    const part *p = &s->part[i];
    switch (p->kind) {
      case PART_AT: y = MOE_CALL(select, T(y), I(d), I(p->first)); break;
      case PART_RANGE: y = MOE_CALL(slice, T(y), I(d), I(p->first), I(p->last), I(p->step)); d++; break;
      case PART_ALL: d++; break;
      case PART_NEW: y = MOE_CALL(unsqueeze, T(y), I(d)); d++; break;
      case PART_REST: d += all; break;
      case PART_LIST:
        if (s->list) {
          moe_fail(MOE_EINVAL, "index: only one key of a list may be a tensor");
          return NULL;
        }
        s->list = p->list;
        s->list_dim = d++;
        if (p->list->dtype != MOE_bool) break;
        /* the dims under the mask become one */
        for (int k = 0; k < p->list->ndim; k++)
          if (p->list->shape[k] != y->shape[s->list_dim + k]) {
            char m[MOE_SHAPE_TEXT];
            moe_fail(MOE_EINVAL, "index: a mask of shape %s does not lie over dim %d of %s", moe_shape_of(m, p->list), s->list_dim + 1,
                     moe_shape_of(text, y));
            return NULL;
          }
        if (p->list->ndim == 0) {
          moe_fail(MOE_EINVAL, "index: a mask needs a dimension");
          return NULL;
        }
        if (p->list->ndim > 1) y = MOE_CALL(flatten, T(y), I(s->list_dim), I(s->list_dim + p->list->ndim - 1));
        break;
    }
  }
  return y;
}

/* The list's positions in one dimension, counting from 1. */
static moe_tensor *list_positions(selection *s) {
  const int64_t all = -1;
  if (moe_dtype_is_float(s->list->dtype)) {
    moe_fail(MOE_EINVAL, "index: a tensor of positions must be i64, i32 or u8, or bool for a mask; got %s", moe_dtype_name(s->list->dtype));
    return NULL;
  }
  moe_tensor *flat = MOE_CALL(reshape, T(s->list), INTS(&all, 1));
  return s->list->dtype == MOE_bool ? MOE_CALL(reshape, T(CALL1(nonzero, false, T(flat))), INTS(&all, 1)) : flat;
}

static moe_tensor *read_list(moe_tensor *y, selection *s) {
  moe_tensor *r = CALL1(index_select, false, T(y), I(s->list_dim), T(list_positions(s)));
  if (r == NULL || s->list->dtype == MOE_bool || s->list->ndim == 1) return r;
  int64_t shape[MOE_MAX_DIM];
  int n = 0, extra = s->list->ndim - 1;
  if (y->ndim + extra > MOE_MAX_DIM) {
    moe_fail(MOE_EINVAL, "index: the result would have more than %d dimensions", MOE_MAX_DIM);
    return NULL;
  }
  for (int d = 0; d < y->ndim; d++) {
    if (d != s->list_dim) shape[n++] = y->shape[d];
    else
      for (int k = 0; k < s->list->ndim; k++) shape[n++] = s->list->shape[k];
  }
  return MOE_CALL(reshape, T(r), INTS(shape, n));
}

/* --- reading --- */

static void push_element(lua_State *L, const void *p, moe_dtype dtype) {
  if (dtype == MOE_bool) lua_pushboolean(L, moe_load_i64(p, dtype) != 0);
  else if (moe_dtype_is_float(dtype)) lua_pushnumber(L, moe_load_f64(p, dtype));
  else lua_pushinteger(L, moe_load_i64(p, dtype));
}

/* x[i] of a 1-D tensor in host memory; NULL when it is not that. Raises when i is out of range. */
static void *plain_element(lua_State *L, moe_tensor *x, int key) {
  if (x->ndim != 1 || lua_type(L, key) != LUA_TNUMBER || !moe_dev(x)->host_memory) return NULL;
  int64_t i = moeL_checkpos(L, key, "index", "position"), n = x->shape[0], at = i < 0 ? i + n : i;
  if (at < 0 || at >= n) luaL_error(L, "index: position %I is outside of dim 1 of size %I", (lua_Integer)(i < 0 ? i : i + 1), (lua_Integer)n);
  return (char *)x->storage->data + (x->offset + at * x->stride[0]) * moe_dtype_size(x->dtype);
}

int moeL_index(lua_State *L) {
  moe_tensor *x = moeL_checktensor(L, 1, "index");
  const void *p = plain_element(L, x, 2);
  if (p != NULL) {
    push_element(L, p, x->dtype);
    return 1;
  }
  selection s;
  read_key(L, 2, &s);
  moeL_box(L);
  moeL_frame f;
  moeL_enter(L, &f);
  char element[8];
  bool scalar = false;
  moe_dtype dtype = x->dtype;
  moe_tensor *y = apply(x, &s);
  if (y && s.list) y = read_list(y, &s);
  if (y && !s.list && s.n > 0 && y->ndim == 0 && moe_dev(y)->host_memory && y != x) {
    scalar = true;
    memcpy(element, moe_data(y), (size_t)moe_dtype_size(dtype));
  } else if (y == x) {
    y = moe_grad_enabled() && x->requires_grad ? x : moe_detach(x);
  }
  if (y && !scalar) moeL_fill(L, -1, y);
  moeL_leave(L, &f, y ? MOE_OK : moe_error_code(), 1);
  if (scalar) push_element(L, element, dtype);
  return 1;
}

/* --- writing --- */

typedef struct source {
  moe_tensor *t; /* NULL: the number */
  bool is_int;
  double f;
  int64_t i;
} source;

static void read_source(lua_State *L, int idx, const moe_tensor *x, source *s) {
  memset(s, 0, sizeof *s);
  int type = lua_type(L, idx);
  if (type == LUA_TNUMBER || type == LUA_TBOOLEAN) {
    s->is_int = type == LUA_TBOOLEAN || lua_isinteger(L, idx);
    s->i = type == LUA_TBOOLEAN ? lua_toboolean(L, idx) : lua_isinteger(L, idx) ? lua_tointeger(L, idx) : 0;
    s->f = s->is_int ? (double)s->i : lua_tonumber(L, idx);
  } else if (type == LUA_TTABLE) {
    moeL_tensor_from_table(L, idx, "index", x->dtype, true, moe_cpu());
    s->t = moeL_totensor(L, -1);
  } else {
    s->t = moeL_totensor(L, idx);
    if (s->t == NULL) luaL_error(L, "index: the value must be a number, a tensor or a table of numbers, got %s", moeL_describe(L, idx));
  }
}

/* y <- the value, broadcast. */
static moe_status write_tensor(moe_tensor *y, moe_tensor *t) {
  int lead = y->ndim - t->ndim;
  bool fits = lead >= 0;
  for (int d = 0; d < t->ndim && fits; d++) fits = t->shape[d] == 1 || t->shape[d] == y->shape[d + lead];
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (!fits) return moe_fail(MOE_EINVAL, "index: a value of shape %s does not fit into a place of shape %s", moe_shape_of(a, t), moe_shape_of(b, y));
  return moe_copy(y, t);
}

static moe_status write_view(moe_tensor *y, const source *v) {
  if (v->t) return write_tensor(y, v->t);
  if (v->is_int && moe_numel(y) == 1) return moe_write(y, &v->i, MOE_i64); /* exact beyond 2^53 */
  return moe_fill(y, v->f);
}

/* Rows of the view: the value is one number, or broadcast to the rows. */
static moe_status write_list(moe_tensor *y, selection *s, const source *v) {
  moe_tensor *pos = list_positions(s), *r;
  if (pos == NULL) return moe_error_code();
  if (!v->t) {
    r = CALL1(index_fill, true, T(y), I(s->list_dim), T(pos), F(v->f));
  } else {
    int64_t shape[MOE_MAX_DIM];
    for (int d = 0; d < y->ndim; d++) shape[d] = d == s->list_dim ? moe_numel(pos) : y->shape[d];
    moe_tensor *src = moe_empty(y->ndim, shape, y->dtype, moe_dev(y)), *given = v->t;
    if (src == NULL) return moe_error_code();
    if (given->ndim > 1 && s->list->dtype != MOE_bool && s->list->ndim > 1 && moe_numel(given) == moe_numel(src))
      given = MOE_CALL(reshape, T(given), INTS(shape, y->ndim)); /* as reading gives it */
    MOE_TRY(write_tensor(src, given));
    r = CALL1(index_copy, true, T(y), I(s->list_dim), T(pos), T(src));
  }
  return r ? MOE_OK : moe_error_code();
}

static moe_status check_writable(const moe_tensor *x, const source *v) {
  if (moe_grad_enabled() && x->requires_grad)
    return moe_fail(MOE_EINVAL, "index: x takes part in autograd, which does not record an assignment (use moe.no_grad, or "
                                "index_copy, masked_fill, where)");
  if (moe_grad_enabled() && v->t && v->t->requires_grad)
    return moe_fail(MOE_EINVAL, "index: the value requires a gradient, which an assignment would lose (use value:detach(), or "
                                "index_copy, cat, where)");
  for (int d = 0; d < x->ndim; d++)
    if (x->stride[d] == 0 && x->shape[d] > 1)
      return moe_fail(MOE_EINVAL, "index: an expanded tensor cannot be written to: its elements share memory (use :clone())");
  return MOE_OK;
}

int moeL_newindex(lua_State *L) {
  moe_tensor *x = moeL_checktensor(L, 1, "index");
  selection s;
  source v;
  void *p = plain_element(L, x, 2);
  read_source(L, 3, x, &v);
  if (p == NULL || v.t != NULL) read_key(L, 2, &s);
  moeL_frame f;
  moeL_enter(L, &f);
  moe_status st = check_writable(x, &v);
  if (st == MOE_OK && p != NULL && !v.t) {
    if (v.is_int) moe_store_i64(p, x->dtype, v.i);
    else moe_store_f64(p, x->dtype, v.f);
    moe_touch(x);
  } else if (st == MOE_OK) {
    moe_env *env = moe_env_now();
    bool outer = env->grad_off;
    env->grad_off = true;
    moe_tensor *y = apply(x, &s);
    if (y && y->storage != x->storage) st = moe_fail(MOE_EINVAL, "index: dims under the mask are not contiguous (use :contiguous() first)");
    else st = y == NULL ? moe_error_code() : s.list ? write_list(y, &s, &v) : write_view(y, &v);
    env->grad_off = outer;
  }
  return moeL_leave(L, &f, st, 0);
}
