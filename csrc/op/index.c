/* Indexing: results and writes at positions that a tensor gives.
**
** Two layouts. Where one list of positions serves a whole dimension (index_select, index_add, index_copy,
** embedding), x is [outer, n, inner] about it and whole rows move. Where every element has a position of its own
** (gather, scatter), the index has x's rank. Positions count from c->base and are checked in the kernel.
*/
#include "autograd/rows.h"
#include "op/arg.h"

/* --- shared --- */

/* Positions as i64, with the strides they came with. */
static moe_tensor *positions_of(moe_ctx *c, int i) {
  moe_tensor *t = c->arg[i].t;
  if (t->dtype == MOE_i64) return t;
  if (t->dtype == MOE_i32 || t->dtype == MOE_u8) return moe_dense(t, MOE_i64);
  OP_FAIL(c, "index must hold integers (i64, i32 or u8), got %s", moe_dtype_name(t->dtype));
  return NULL;
}

/* A kernel's message about a bad position, with the operation and the dimension. */
static moe_status named(moe_ctx *c, moe_status st, int dim, const moe_tensor *x) {
  if (st != MOE_EINVAL) return st;
  char said[256], s[MOE_SHAPE_TEXT];
  size_t k = 0;
  for (const char *p = moe_error(); *p && k < sizeof said - 1; p++) said[k++] = *p;
  said[k] = 0;
  return OP_FAIL(c, "%s, dim %d of %s", said, dim + 1, moe_shape_of(s, x));
}

typedef struct layout {
  int64_t outer, n, inner;
} layout;

static layout layout_of(const moe_tensor *x, int dim) {
  layout l = {1, x->ndim ? x->shape[dim] : 1, 1};
  for (int d = 0; d < x->ndim; d++) {
    if (d < dim) l.outer *= x->shape[d];
    else if (d > dim) l.inner *= x->shape[d];
  }
  return l;
}

/* Result 0 made of x and then written to. The kernel writes `work`: the result itself where that is dense and of type dt. */
typedef struct target {
  moe_tensor *out, *work;
} target;

static moe_status target_open(moe_ctx *c, moe_tensor *x, moe_dtype dt, target *t) {
  t->out = moe_out(c, 0, x->ndim, x->shape, x->dtype);
  if (t->out == NULL) return moe_error_code();
  bool direct = t->out->dtype == dt && moe_is_contiguous(t->out);
  t->work = direct ? t->out : moe_empty(x->ndim, x->shape, dt, moe_dev(x));
  return t->work ? moe_copy(t->work, x) : moe_error_code();
}

static moe_status target_close(target *t) { return t->work == t->out ? MOE_OK : moe_copy(t->out, t->work); }

/* src dense, of type dt, and not in the memory that is written to. */
static moe_tensor *source(moe_tensor *src, moe_dtype dt, const moe_tensor *work) {
  moe_tensor *s = moe_dense(src, dt);
  if (s == NULL || s->storage != work->storage) return s;
  moe_tensor *own = moe_empty(s->ndim, s->shape, dt, moe_dev(s));
  return own && moe_copy(own, s) == MOE_OK ? own : NULL;
}

/* Positions that lie in the memory that is written to would change after they were checked. */
static moe_tensor *apart(moe_tensor *index, const moe_tensor *work) {
  return index->storage == work->storage ? source(index, MOE_i64, work) : index;
}

/* --- rows --- */

/* The positions of argument i as a dense list; a scalar is a list of one. */
static moe_tensor *row_positions(moe_ctx *c, int i) {
  char s[MOE_SHAPE_TEXT];
  moe_tensor *t = positions_of(c, i);
  if (t && t->ndim > 1) {
    OP_FAIL(c, "index must have one dimension, got shape %s", moe_shape_of(s, t));
    return NULL;
  }
  return moe_contiguous_raw(t);
}

moe_status moe_fwd_index_select(moe_ctx *c) {
  moe_tensor *x = moe_dense(c->arg[0].t, c->arg[0].t->dtype), *index = row_positions(c, 2);
  if (x == NULL || index == NULL) return moe_error_code();
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  layout l = layout_of(x, dim);
  int64_t shape[MOE_MAX_DIM], k = moe_numel(index);
  for (int d = 0; d < x->ndim; d++) shape[d] = d == dim ? k : x->shape[d];
  if (x->ndim == 0) shape[0] = k;
  moe_tensor *y = moe_out(c, 0, MOE_MAX(x->ndim, 1), shape, x->dtype);
  if (y == NULL) return moe_error_code();
  moe_save(c, c->arg[2].t);
  return named(c, MOE_RUN(moe_dev(x), c->op->name, rows_take, moe_data(y), moe_data(x), moe_data_i64(index), c->base, l.outer, l.n, k,
                          l.inner, moe_dtype_size(x->dtype)), dim, x);
}

static moe_tensor *zeros_of(const moe_meta *m, moe_dtype dt) { return moe_zeros(m->ndim, m->shape, dt, m->device); }

moe_status moe_bwd_index_select(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  if (c->in[0].ndim == 0) g = moe_unbroadcast(g, &c->in[0]); /* x counts as one row */
  else g = CALL_OVER(c->base, index_add, T(zeros_of(&c->in[0], g->dtype)), I(c->arg[1].i), T(c->saved[0]), T(g));
  return gin_set(c, 0, g);
}

enum { PUT_ROWS, ADD_ROWS };

/* index_copy [variant 0], index_add [1]: (x, dim, index, src) */
moe_status moe_fwd_index_write(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *src = c->arg[3].t, *index = row_positions(c, 2);
  if (index == NULL) return moe_error_code();
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  int64_t k = moe_numel(index);
  bool fits = x->ndim == src->ndim && x->ndim > 0;
  for (int d = 0; d < x->ndim && fits; d++) fits = src->shape[d] == (d == dim ? k : x->shape[d]);
  if (!fits)
    return OP_FAIL(c, "src must be x of shape %s with dim %d = %lld, the number of positions; got %s", moe_shape_of(a, x), dim + 1,
                   (long long)k, moe_shape_of(b, src));
  bool add = c->op->variant == ADD_ROWS;
  moe_dtype dt = add ? moe_dtype_compute(x->dtype) : x->dtype;
  target t;
  MOE_TRY(target_open(c, x, dt, &t));
  if ((src = source(src, dt, t.work)) == NULL || (index = apart(index, t.work)) == NULL) return moe_error_code();
  layout l = layout_of(x, dim);
  moe_save(c, c->arg[2].t);
  moe_status st = add ? MOE_RUN(moe_dev(x), c->op->name, rows_add, moe_data(t.work), moe_data(src), moe_data_i64(index), c->base,
                                l.outer, l.n, k, l.inner, dt)
                      : MOE_RUN(moe_dev(x), c->op->name, rows_put, moe_data(t.work), moe_data(src), moe_data_i64(index), c->base,
                                l.outer, l.n, k, l.inner, moe_dtype_size(dt));
  MOE_TRY(named(c, st, dim, x));
  return target_close(&t);
}

moe_status moe_bwd_index_write(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *index = c->saved[0];
  moe_value dim = I(c->arg[1].i);
  if (c->need[0])
    MOE_TRY(gin_set(c, 0, c->op->variant == ADD_ROWS ? g : CALL_BASED(c->base, index_fill, T(g), dim, T(index), F(0))));
  if (c->need[c->slot[3]]) MOE_TRY(gin_set(c, c->slot[3], CALL_BASED(c->base, index_select, T(g), dim, T(index))));
  return MOE_OK;
}

moe_status moe_fwd_index_fill(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *index = row_positions(c, 2);
  if (index == NULL) return moe_error_code();
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  if (x->ndim == 0) return OP_FAIL(c, "x has no dimensions");
  target t;
  MOE_TRY(target_open(c, x, x->dtype, &t));
  int64_t shape[MOE_MAX_DIM], k = moe_numel(index);
  for (int d = 0; d < x->ndim; d++) shape[d] = d == dim ? k : x->shape[d];
  moe_tensor *src = moe_full(x->ndim, shape, x->dtype, moe_dev(x), c->arg[3].f);
  if (src == NULL || (index = apart(index, t.work)) == NULL) return moe_error_code();
  layout l = layout_of(x, dim);
  moe_save(c, c->arg[2].t);
  MOE_TRY(named(c, MOE_RUN(moe_dev(x), c->op->name, rows_put, moe_data(t.work), moe_data(src), moe_data_i64(index), c->base, l.outer, l.n,
                           k, l.inner, moe_dtype_size(x->dtype)), dim, x));
  return target_close(&t);
}

moe_status moe_bwd_index_fill(moe_ctx *c) {
  return gin_set(c, 0, CALL_BASED(c->base, index_fill, T(c->gout[0]), I(c->arg[1].i), T(c->saved[0]), F(0)));
}

/* Row `padding` of the weight gets no gradient; -1: there is none. */
static moe_status padding_row(moe_ctx *c, int64_t rows, int64_t *padding) {
  *padding = -1;
  if (arg_absent(c, 2)) return MOE_OK;
  int64_t p = c->arg[2].i, r = p < 0 ? p + rows : p;
  if (r < 0 || r >= rows)
    return OP_FAIL(c, "padding_idx %lld is outside of a weight of %lld rows", (long long)(p < 0 ? p : p + 1), (long long)rows);
  *padding = r;
  return MOE_OK;
}

moe_status moe_fwd_embedding(moe_ctx *c) {
  char s[MOE_SHAPE_TEXT];
  moe_tensor *w = moe_dense(c->arg[0].t, c->arg[0].t->dtype), *index = moe_contiguous_raw(positions_of(c, 1));
  if (w == NULL || index == NULL) return moe_error_code();
  if (w->ndim != 2) return OP_FAIL(c, "weight must be [rows, features], got %s", moe_shape_of(s, w));
  if (index->ndim == MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  int64_t shape[MOE_MAX_DIM], padding;
  MOE_TRY(padding_row(c, w->shape[0], &padding));
  for (int d = 0; d < index->ndim; d++) shape[d] = index->shape[d];
  shape[index->ndim] = w->shape[1];
  moe_tensor *y = moe_out(c, 0, index->ndim + 1, shape, w->dtype);
  if (y == NULL) return moe_error_code();
  moe_save(c, c->arg[1].t);
  return named(c, MOE_RUN(moe_dev(w), c->op->name, rows_take, moe_data(y), moe_data(w), moe_data_i64(index), c->base, (int64_t)1,
                          w->shape[0], moe_numel(index), w->shape[1], moe_dtype_size(w->dtype)), 0, w);
}

/* g [.., features] -> rows added by position; the sums of bf16 and f16 are taken in f32. */
moe_status moe_bwd_embedding(moe_ctx *c) {
  const moe_meta *in = &c->in[0];
  int64_t k = 1, padding;
  MOE_TRY(padding_row(c, in->shape[0], &padding));
  if (c->arg[3].i && moe_rows_wanted()) return moe_give_rows(c, 0, c->saved[0], c->gout[0], NULL, padding);
  for (int d = 0; d < c->in[1].ndim; d++) k *= c->in[1].shape[d];
  moe_tensor *index = MOE_CALL(reshape, T(c->saved[0]), INTS(&k, 1));
  moe_tensor *g = MOE_CALL(reshape, T(c->gout[0]), INTS(((const int64_t[]){k, in->shape[1]}), 2));
  if (g == NULL) return moe_error_code();
  g = CALL_OVER(c->base, index_add, T(zeros_of(in, g->dtype)), I(0), T(index), T(g));
  if (padding >= 0) {
    moe_tensor *row = moe_full(0, NULL, MOE_i64, in->device, (double)padding);
    g = MOE_CALL(index_fill, T(g), I(0), T(row), F(0));
  }
  return gin_set(c, 0, g);
}

/* --- elements --- */

/* Merges neighbouring dimensions, other than dim, that every operand walks evenly; returns the new rank. */
static int merge_dims(int ndim, int *dim, int64_t *shape, int nop, int64_t (*stride)[MOE_MAX_DIM]) {
  int n = 0, new_dim = 0;
  for (int d = 0; d < ndim; d++) {
    bool joins = n > 0 && d != *dim && d - 1 != *dim;
    for (int k = 0; k < nop && joins; k++) joins = stride[k][n - 1] == shape[d] * stride[k][d];
    if (joins) {
      shape[n - 1] *= shape[d];
    } else {
      if (d == *dim) new_dim = n;
      shape[n++] = shape[d];
    }
    for (int k = 0; k < nop; k++) stride[k][n - 1] = stride[k][d];
  }
  *dim = new_dim;
  return n;
}

/* The order in which the dimensions are walked: as they are, but a dim of size 1 comes first, so that the rows that kernels
** walk are long. Returns dim's place. */
static int walk_order(const moe_tensor *index, int dim, int *order) {
  int n = 0;
  bool first = index->shape[dim] == 1;
  if (first) order[n++] = dim;
  for (int d = 0; d < index->ndim; d++)
    if (!first || d != dim) order[n++] = d;
  return first ? 0 : dim;
}

static moe_status check_cells(moe_ctx *c, const moe_tensor *x, const moe_tensor *index, int dim) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  bool fits = x->ndim == index->ndim;
  for (int d = 0; d < x->ndim && fits; d++) fits = d == dim || index->shape[d] <= x->shape[d];
  if (x->ndim == 0) return OP_FAIL(c, "x has no dimensions");
  if (!fits)
    return OP_FAIL(c, "index %s must have x's rank and, but for dim %d, no size above x's %s", moe_shape_of(b, index), dim + 1,
                   moe_shape_of(a, x));
  return MOE_OK;
}

moe_status moe_fwd_gather(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *index = positions_of(c, 2);
  if (index == NULL) return moe_error_code();
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  MOE_TRY(check_cells(c, x, index, dim));
  moe_tensor *y = moe_out(c, 0, x->ndim, index->shape, x->dtype);
  if (y == NULL) return moe_error_code();
  moe_save(c, c->arg[2].t);
  int64_t shape[MOE_MAX_DIM], stride[2][MOE_MAX_DIM], n = x->shape[dim];
  int order[MOE_MAX_DIM], at = walk_order(index, dim, order);
  for (int k = 0; k < x->ndim; k++) {
    int d = order[k];
    shape[k] = index->shape[d];
    stride[0][k] = x->stride[d];
    stride[1][k] = shape[k] == 1 ? 0 : index->stride[d];
  }
  int ndim = merge_dims(x->ndim, &at, shape, 2, stride);
  return named(c, MOE_RUN(moe_dev(x), c->op->name, gather, moe_data(y), moe_data(x), moe_data_i64(index), c->base, ndim, shape, stride[0],
                          stride[1], at, n, moe_dtype_size(x->dtype)), dim, x);
}

moe_status moe_bwd_gather(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  return gin_set(c, 0, CALL_OVER(c->base, scatter_add, T(zeros_of(&c->in[0], g->dtype)), I(c->arg[1].i), T(c->saved[0]), T(g)));
}

/* scatter [variant 0]: src a tensor or a number; scatter_add [1] */
moe_status moe_fwd_scatter(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *index = positions_of(c, 2), *src = NULL;
  if (index == NULL) return moe_error_code();
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  MOE_TRY(check_cells(c, x, index, dim));
  bool add = c->op->variant == ADD_ROWS;
  moe_dtype dt = add ? moe_dtype_compute(x->dtype) : x->dtype;
  target t;
  MOE_TRY(target_open(c, x, dt, &t));
  bool number = c->arg[3].kind == MOE_K_number;
  if (number) {
    src = moe_scalar(c->arg[3].f, dt, moe_dev(x));
  } else {
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
    if (!moe_same_shape(c->arg[3].t, index))
      return OP_FAIL(c, "src %s must have the shape of index %s", moe_shape_of(a, c->arg[3].t), moe_shape_of(b, index));
    src = source(c->arg[3].t, dt, t.work);
  }
  if (src == NULL || (index = apart(index, t.work)) == NULL) return moe_error_code();
  moe_save(c, c->arg[2].t);
  /* An index repeated over all dims but its own is a list of rows. */
  bool list = add;
  for (int d = 0; d < x->ndim && list; d++)
    list = d == dim || (index->shape[d] == x->shape[d] && (index->stride[d] == 0 || index->shape[d] == 1));
  int64_t k = index->shape[dim];
  if (list && x->ndim > 1 && moe_numel(index) > 0 && (k == 1 || index->stride[dim] == 1)) {
    layout l = layout_of(x, dim);
    MOE_TRY(named(c, MOE_RUN(moe_dev(x), c->op->name, rows_add, moe_data(t.work), moe_data(src), moe_data_i64(index), c->base, l.outer, l.n,
                             k, l.inner, dt), dim, x));
    return target_close(&t);
  }
  int64_t shape[MOE_MAX_DIM], stride[3][MOE_MAX_DIM], n = x->shape[dim];
  int order[MOE_MAX_DIM], at = walk_order(index, dim, order);
  for (int i = 0; i < x->ndim; i++) {
    int d = order[i];
    shape[i] = index->shape[d];
    stride[0][i] = t.work->stride[d];
    stride[1][i] = number ? 0 : src->stride[d];
    stride[2][i] = shape[i] == 1 ? 0 : index->stride[d];
  }
  int ndim = merge_dims(x->ndim, &at, shape, 3, stride);
  MOE_TRY(named(c, MOE_RUN(moe_dev(x), c->op->name, scatter, moe_data(t.work), moe_data(src), moe_data_i64(index), c->base, ndim, shape,
                           stride[0], stride[1], stride[2], at, n, dt, add), dim, x));
  return target_close(&t);
}

moe_status moe_bwd_scatter(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *index = c->saved[0];
  moe_value dim = I(c->arg[1].i);
  if (c->need[0]) MOE_TRY(gin_set(c, 0, c->op->variant == ADD_ROWS ? g : CALL_BASED(c->base, scatter, T(g), dim, T(index), F(0))));
  if (c->nin > 2 && c->need[2]) MOE_TRY(gin_set(c, 2, CALL_BASED(c->base, gather, T(g), dim, T(index))));
  return MOE_OK;
}

/* --- masks --- */

static moe_tensor *mask_of(moe_ctx *c, int i, int ndim, const int64_t *shape) {
  moe_tensor *m = c->arg[i].t;
  if (m->dtype != MOE_bool && m->dtype != MOE_u8) {
    OP_FAIL(c, "mask must be bool (or u8), got %s", moe_dtype_name(m->dtype));
    return NULL;
  }
  int64_t stride[MOE_MAX_DIM];
  for (int d = 0; d < ndim; d++) {
    int old = d - (ndim - m->ndim);
    stride[d] = old < 0 || m->shape[old] != shape[d] ? 0 : m->stride[old];
  }
  return moe_view_of(m, ndim, shape, stride, m->offset);
}

/* masked_fill [variant 1]: y = value where mask, else x; masked_keep [0]: y = 0 where not mask. */
moe_status moe_fwd_masked_fill(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  MOE_TRY(moe_broadcast(c->op->name, x, c->arg[1].t, &ndim, shape));
  moe_tensor *mask = mask_of(c, 1, ndim, shape);
  if (mask == NULL) return moe_error_code();
  double v = 0;
  if (c->op->variant && c->arg[2].kind == MOE_K_tensor) {
    char s[MOE_SHAPE_TEXT];
    if (moe_numel(c->arg[2].t) != 1) return OP_FAIL(c, "value must be one number, got shape %s", moe_shape_of(s, c->arg[2].t));
    MOE_TRY(moe_get_f64(c->arg[2].t, 0, &v));
  } else if (c->op->variant) {
    v = c->arg[2].f;
  }
  moe_tensor *y = moe_out(c, 0, ndim, shape, x->dtype);
  if (y == NULL) return moe_error_code();
  moe_save(c, c->arg[1].t);
  uint64_t bits = 0;
  moe_store_f64(&bits, x->dtype, v);
  moe_iter it;
  moe_iter_make(&it, ndim, shape, 3, (moe_tensor *const[]){y, x, mask});
  return MOE_RUN(moe_dev(x), c->op->name, masked_fill, &it, moe_dtype_size(x->dtype), bits, c->op->variant);
}

moe_status moe_bwd_masked_fill(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *mask = c->saved[0];
  if (c->need[0]) {
    moe_tensor *gx = c->op->variant ? MOE_CALL(masked_fill, T(g), T(mask), F(0)) : MOE_CALL(masked_keep, T(g), T(mask));
    MOE_TRY(gin_set(c, 0, moe_unbroadcast(gx, &c->in[0])));
  }
  if (c->nin > 2 && c->need[2]) MOE_TRY(gin_set(c, 2, moe_unbroadcast(MOE_CALL(masked_keep, T(g), T(mask)), &c->in[2])));
  return MOE_OK;
}

/* Row-major positions, from 0, of what is not 0 in a dense mask. */
static moe_tensor *true_positions(moe_ctx *c, moe_tensor *mask) {
  int64_t n = moe_numel(mask), k = 0;
  moe_device *dev = moe_dev(mask);
  if (n > 0 && MOE_RUN(dev, c->op->name, mask_count, &k, moe_data(mask), n) != MOE_OK) return NULL;
  moe_tensor *pos = moe_empty(1, &k, MOE_i64, dev);
  if (pos && k > 0 && MOE_RUN(dev, c->op->name, mask_positions, moe_data_i64(pos), moe_data(mask), n) != MOE_OK) return NULL;
  return pos;
}

moe_status moe_fwd_masked_select(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  MOE_TRY(moe_broadcast(c->op->name, x, c->arg[1].t, &ndim, shape));
  moe_tensor *mask = moe_contiguous_raw(mask_of(c, 1, ndim, shape));
  moe_tensor *pos = mask ? true_positions(c, mask) : NULL;
  moe_tensor *full = pos ? moe_contiguous_raw(MOE_CALL(expand, T(x), INTS(shape, ndim))) : NULL;
  if (full == NULL) return moe_error_code();
  int64_t k = moe_numel(pos);
  moe_tensor *y = moe_out(c, 0, 1, &k, x->dtype);
  if (y == NULL) return moe_error_code();
  moe_save(c, c->arg[1].t);
  if (k == 0) return MOE_OK;
  return MOE_RUN(moe_dev(x), c->op->name, rows_take, moe_data(y), moe_data(full), moe_data_i64(pos), (int64_t)0, (int64_t)1, moe_numel(full),
                 k, (int64_t)1, moe_dtype_size(x->dtype));
}

moe_status moe_bwd_masked_select(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *mask = c->saved[0];
  const moe_meta *in = &c->in[0];
  int64_t shape[MOE_MAX_DIM];
  int n = MOE_MAX(in->ndim, mask->ndim);
  for (int d = 0; d < n; d++) {
    int a = d - (n - in->ndim), b = d - (n - mask->ndim);
    shape[d] = a < 0 ? mask->shape[b] : b < 0 || mask->shape[b] == 1 ? in->shape[a] : mask->shape[b];
  }
  moe_tensor *zero = moe_zeros(n, shape, g->dtype, in->device);
  return gin_set(c, 0, moe_unbroadcast(MOE_CALL(masked_scatter, T(zero), T(mask), T(g)), in));
}

moe_status moe_fwd_masked_scatter(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *src = c->arg[2].t;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  MOE_TRY(moe_broadcast(c->op->name, x, c->arg[1].t, &ndim, shape));
  bool fits = ndim == x->ndim;
  for (int d = 0; d < ndim && fits; d++) fits = shape[d] == x->shape[d];
  if (!fits) return OP_FAIL(c, "mask %s does not broadcast to x %s", moe_shape_of(a, c->arg[1].t), moe_shape_of(b, x));
  moe_tensor *mask = moe_contiguous_raw(mask_of(c, 1, ndim, shape));
  moe_tensor *pos = mask ? true_positions(c, mask) : NULL;
  if (pos == NULL) return moe_error_code();
  int64_t k = moe_numel(pos);
  if (moe_numel(src) < k)
    return OP_FAIL(c, "the mask has %lld true elements, src %s only %lld", (long long)k, moe_shape_of(a, src), (long long)moe_numel(src));
  target t;
  MOE_TRY(target_open(c, x, x->dtype, &t));
  if ((src = source(src, x->dtype, t.work)) == NULL) return moe_error_code();
  moe_save(c, c->arg[1].t);
  if (k > 0)
    MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, rows_put, moe_data(t.work), moe_data(src), moe_data_i64(pos), (int64_t)0, (int64_t)1,
                    moe_numel(x), k, (int64_t)1, moe_dtype_size(x->dtype)));
  return target_close(&t);
}

moe_status moe_bwd_masked_scatter(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *mask = c->saved[0];
  if (c->need[0]) MOE_TRY(gin_set(c, 0, MOE_CALL(masked_fill, T(g), T(mask), F(0))));
  if (!c->need[2]) return MOE_OK;
  const moe_meta *src = &c->in[2];
  int64_t n;
  MOE_TRY(moe_shape_numel(c->op->name, src->ndim, src->shape, &n));
  moe_tensor *gs = MOE_CALL(masked_select, T(g), T(mask));
  if (gs == NULL) return moe_error_code();
  if (moe_numel(gs) < n) gs = MOE_CALL(pad, T(gs), INTS(((const int64_t[]){0, n - moe_numel(gs)}), 2));
  return gin_set(c, 2, MOE_CALL(reshape, T(gs), INTS(src->shape, src->ndim)));
}

moe_status moe_fwd_nonzero(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *mask = moe_dense(x, MOE_bool), *pos = mask ? true_positions(c, mask) : NULL;
  if (pos == NULL) return moe_error_code();
  int64_t shape[2] = {moe_numel(pos), x->ndim};
  moe_tensor *y = moe_out(c, 0, 2, shape, MOE_i64);
  if (y == NULL) return moe_error_code();
  if (moe_numel(y) == 0) return MOE_OK;
  return MOE_RUN(moe_dev(x), c->op->name, unravel, moe_data_i64(y), moe_data_i64(pos), shape[0], x->ndim, x->shape, (int64_t)c->base);
}

/* --- counting --- */

/* The largest position, from 0; -1 when there are none. Reads the tensor. */
static moe_status largest(moe_ctx *c, moe_tensor *index, int64_t *out) {
  moe_tensor *host = moe_contiguous_raw(moe_to_raw(index, MOE_i64, moe_cpu()));
  if (host == NULL) return moe_error_code();
  int64_t n = moe_numel(host), most = -1;
  for (int64_t i = 0; i < n; i++) {
    int64_t v = moe_data_i64(host)[i];
    if (v < c->base) return OP_FAIL(c, "index %lld is below %d", (long long)v, c->base);
    most = MOE_MAX(most, v - c->base);
  }
  if (most >= (int64_t)1 << 56) return OP_FAIL(c, "index %lld needs too large a result", (long long)(most + c->base));
  *out = most;
  return MOE_OK;
}

moe_status moe_fwd_one_hot(moe_ctx *c) {
  moe_tensor *index = moe_contiguous_raw(positions_of(c, 0));
  if (index == NULL) return moe_error_code();
  int64_t classes = arg_absent(c, 1) ? 0 : c->arg[1].i;
  if (arg_absent(c, 1)) {
    MOE_TRY(largest(c, index, &classes));
    classes++;
  } else if (classes < 1) {
    return OP_FAIL(c, "num_classes must be at least 1, got %lld", (long long)classes);
  }
  if (index->ndim == MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  int64_t shape[MOE_MAX_DIM], n = moe_numel(index);
  for (int d = 0; d < index->ndim; d++) shape[d] = index->shape[d];
  shape[index->ndim] = classes;
  moe_dtype dt = arg_absent(c, 2) ? MOE_i64 : (moe_dtype)c->arg[2].i;
  moe_tensor *y = moe_out(c, 0, index->ndim + 1, shape, dt);
  moe_tensor *one = moe_scalar(1, dt, moe_dev(index));
  if (y == NULL || one == NULL) return moe_error_code();
  MOE_TRY(moe_fill(y, 0));
  const int64_t two[2] = {n, 1}, ystride[2] = {classes, 1}, none[2] = {0, 0}, istride[2] = {1, 0};
  return named(c, MOE_RUN(moe_dev(y), c->op->name, scatter, moe_data(y), moe_data(one), moe_data_i64(index), c->base, 2, two, ystride, none,
                          istride, 1, classes, dt, 0), index->ndim, y);
}

/* (index, minlength, weights) */
moe_status moe_fwd_bincount(moe_ctx *c) {
  moe_tensor *index = moe_contiguous_raw(positions_of(c, 0)), *w = arg_absent(c, 2) ? NULL : c->arg[2].t;
  if (index == NULL) return moe_error_code();
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (w && !moe_same_shape(w, index))
    return OP_FAIL(c, "weights %s must have the shape of index %s", moe_shape_of(a, w), moe_shape_of(b, index));
  int64_t most, k = moe_numel(index);
  if (c->arg[1].i < 0) return OP_FAIL(c, "minlength must not be negative, got %lld", (long long)c->arg[1].i);
  MOE_TRY(largest(c, index, &most));
  int64_t n = MOE_MAX(most + 1, c->arg[1].i);
  moe_dtype out = w ? w->dtype : MOE_i64, dt = moe_dtype_compute(out);
  moe_tensor *y = moe_out(c, 0, 1, &n, out);
  moe_tensor *work = y == NULL || dt == out ? y : moe_empty(1, &n, dt, moe_dev(index));
  moe_tensor *src = w ? moe_dense(w, dt) : moe_full(1, &k, dt, moe_dev(index), 1);
  if (work == NULL || src == NULL) return moe_error_code();
  moe_save(c, c->arg[0].t);
  MOE_TRY(moe_fill(work, 0));
  MOE_TRY(MOE_RUN(moe_dev(index), c->op->name, rows_add, moe_data(work), moe_data(src), moe_data_i64(index), c->base, (int64_t)1, n, k,
                  (int64_t)1, dt));
  return work == y ? MOE_OK : moe_copy(y, work);
}

moe_status moe_bwd_bincount(moe_ctx *c) {
  const moe_meta *w = &c->in[1];
  int64_t all = -1;
  moe_tensor *flat = MOE_CALL(reshape, T(c->saved[0]), INTS(&all, 1));
  moe_tensor *g = CALL_BASED(c->base, index_select, T(c->gout[0]), I(0), T(flat));
  return gin_set(c, 1, MOE_CALL(reshape, T(g), INTS(w->shape, w->ndim)));
}

/* --- triangles: tril [variant 0], triu [1] --- */

moe_status moe_fwd_tri(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  char s[MOE_SHAPE_TEXT];
  if (x->ndim < 2) return OP_FAIL(c, "x must have at least 2 dimensions, got %s", moe_shape_of(s, x));
  target t;
  MOE_TRY(target_open(c, x, x->dtype, &t));
  int64_t rows = x->shape[x->ndim - 2], cols = x->shape[x->ndim - 1], batch = 1;
  for (int d = 0; d < x->ndim - 2; d++) batch *= x->shape[d];
  int64_t diagonal = MOE_MAX(MOE_MIN(c->arg[1].i, cols + 1), -rows - 1);
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, tri, moe_data(t.work), moe_data(t.work), batch, rows, cols, diagonal, c->op->variant,
                  moe_dtype_size(x->dtype)));
  return target_close(&t);
}

moe_status moe_bwd_tri(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  return gin_set(c, 0, c->op->variant ? MOE_CALL(triu, T(g), c->arg[1]) : MOE_CALL(tril, T(g), c->arg[1]));
}
