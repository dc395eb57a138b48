/* Joining tensors, and results that show x's positions again, turned or shifted: cat stack tile
** repeat_interleave flip roll pad. All but the first two are one kernel, `remap`: result dimension d at i
** reads x at position pos[d][i], or a fill value where that is -1.
*/
#include "op/arg.h"

/* --- cat, stack --- */

static moe_status check_list(moe_ctx *c, moe_tensor **x, int n, moe_dtype *dtype) {
  if (n < 1) return OP_FAIL(c, "no tensors are given");
  *dtype = x[0]->dtype;
  for (int k = 1; k < n; k++) {
    if (moe_dev(x[k]) != moe_dev(x[0]))
      return OP_FAIL(c, "tensor 1 is on %s, tensor %d is on %s", moe_dev(x[0])->name, k + 1, moe_dev(x[k])->name);
    *dtype = moe_dtype_promote(*dtype, x[k]->dtype);
  }
  return MOE_OK;
}

static moe_status differ(moe_ctx *c, moe_tensor **x, int k, const char *where) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "shapes differ%s: tensor 1 is %s, tensor %d is %s", where, moe_shape_of(a, x[0]), k + 1, moe_shape_of(b, x[k]));
}

moe_status moe_fwd_cat(moe_ctx *c) {
  moe_tensor **x = c->arg[0].list.v;
  int n = c->arg[0].list.n;
  moe_dtype dtype;
  MOE_TRY(check_list(c, x, n, &dtype));
  if (x[0]->ndim == 0) return OP_FAIL(c, "tensors without dimensions cannot be joined (hint: stack)");
  int ndim = x[0]->ndim, dim = arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, ndim);
  if (dim < 0) return moe_error_code();
  int64_t shape[MOE_MAX_DIM];
  for (int d = 0; d < ndim; d++) shape[d] = x[0]->shape[d];
  for (int k = 1; k < n; k++) {
    if (x[k]->ndim != ndim) return differ(c, x, k, "");
    for (int d = 0; d < ndim; d++)
      if (d != dim && x[k]->shape[d] != shape[d]) return differ(c, x, k, " outside of the joined dim");
    if (__builtin_add_overflow(shape[dim], x[k]->shape[dim], &shape[dim])) return OP_FAIL(c, "the result is too large");
  }
  moe_tensor *y = moe_empty(ndim, shape, dtype, moe_dev(x[0]));
  MOE_TRY(moe_set_out(c, 0, y));
  int64_t at = 0;
  for (int k = 0; k < n; at += x[k++]->shape[dim]) {
    if (moe_numel(x[k]) == 0) continue;
    MOE_TRY(moe_copy(moe_view_of(y, ndim, x[k]->shape, y->stride, y->offset + at * y->stride[dim]), x[k]));
  }
  return MOE_OK;
}

moe_status moe_bwd_cat(moe_ctx *c) {
  int dim = arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, c->outs[0].ndim);
  int64_t at = 0;
  for (int k = 0; k < c->nin; at += c->in[k++].shape[dim])
    if (c->need[k]) MOE_TRY(gin_set(c, k, MOE_CALL(narrow, T(c->gout[0]), I(dim), I(at), I(c->in[k].shape[dim]))));
  return MOE_OK;
}

moe_status moe_fwd_stack(moe_ctx *c) {
  moe_tensor **x = c->arg[0].list.v;
  int n = c->arg[0].list.n;
  moe_dtype dtype;
  MOE_TRY(check_list(c, x, n, &dtype));
  for (int k = 1; k < n; k++)
    if (!moe_same_shape(x[0], x[k])) return differ(c, x, k, "");
  int ndim = x[0]->ndim, dim = arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, ndim + 1);
  if (dim < 0) return moe_error_code();
  if (ndim == MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  int64_t shape[MOE_MAX_DIM], stride[MOE_MAX_DIM];
  for (int d = 0; d <= ndim; d++) shape[d] = d < dim ? x[0]->shape[d] : d == dim ? n : x[0]->shape[d - 1];
  moe_tensor *y = moe_empty(ndim + 1, shape, dtype, moe_dev(x[0]));
  MOE_TRY(moe_set_out(c, 0, y));
  for (int d = 0; d < ndim; d++) stride[d] = y->stride[d < dim ? d : d + 1];
  for (int k = 0; k < n && moe_numel(x[0]) > 0; k++)
    MOE_TRY(moe_copy(moe_view_of(y, ndim, x[k]->shape, stride, y->offset + k * y->stride[dim]), x[k]));
  return MOE_OK;
}

moe_status moe_bwd_stack(moe_ctx *c) {
  int dim = arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, c->outs[0].ndim);
  for (int k = 0; k < c->nin; k++)
    if (c->need[k]) MOE_TRY(gin_set(c, k, MOE_CALL(select, T(c->gout[0]), I(dim), I(k))));
  return MOE_OK;
}

/* --- remap --- */

/* A list of n positions in host memory; *v points to it. */
static moe_tensor *positions(int64_t n, int64_t **v) {
  moe_tensor *t = moe_empty(1, &n, MOE_i64, moe_cpu());
  if (t) *v = moe_data_i64(t);
  return t;
}

/* Result 0 [shape] <- x at pos[d] (NULL: i itself) in every dimension. */
static moe_status remap(moe_ctx *c, moe_tensor *x, const int64_t *shape, int64_t *const *pos, double fill) {
  moe_tensor *y = moe_out(c, 0, x->ndim, shape, x->dtype);
  if (y == NULL) return moe_error_code();
  if (moe_numel(y) == 0) return MOE_OK;
  /* Trailing dimensions that stay as they are become one row. */
  int64_t rshape[MOE_MAX_DIM + 1], rstride[MOE_MAX_DIM + 1];
  int n = 0;
  const int64_t *rpos[MOE_MAX_DIM + 1];
  for (int d = 0; d < x->ndim; d++) {
    bool plain = pos[d] == NULL;
    if (n > 0 && plain && rpos[n - 1] == NULL && rstride[n - 1] == shape[d] * x->stride[d]) {
      rshape[n - 1] *= shape[d];
      rstride[n - 1] = x->stride[d];
      continue;
    }
    rshape[n] = shape[d], rstride[n] = x->stride[d], rpos[n++] = pos[d];
  }
  if (n == 0) rshape[0] = 1, rstride[0] = 1, rpos[0] = NULL, n = 1;
  uint64_t bits = 0;
  moe_store_f64(&bits, x->dtype, fill);
  return MOE_RUN(moe_dev(x), c->op->name, remap, moe_data(y), moe_data(x), n, rshape, rstride, rpos, moe_dtype_size(x->dtype), bits);
}

/* A gradient [outer, a, b, inner] summed over a [which = 1] or b [2]. */
static moe_tensor *sum_dim(moe_tensor *g, const int64_t *four, int which) {
  if (g == NULL) return NULL;
  int64_t to[4] = {four[0], four[1], four[2], four[3]};
  to[which] = 1;
  moe_meta meta = {.dtype = g->dtype, .ndim = 4, .shape = to, .device = moe_dev(g)};
  return moe_unbroadcast(MOE_CALL(reshape, T(g), INTS(four, 4)), &meta);
}

moe_status moe_fwd_tile(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int n;
  const int64_t *r = arg_list(c, 1, &n);
  char s[MOE_SHAPE_TEXT], u[MOE_SHAPE_TEXT];
  if (n < x->ndim)
    return OP_FAIL(c, "%s repeats fewer dims than x of shape %s has", moe_shape_text(s, n, r), moe_shape_of(u, x));
  if (n > MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  int64_t from[MOE_MAX_DIM], stride[MOE_MAX_DIM], shape[MOE_MAX_DIM] = {0}, *pos[MOE_MAX_DIM] = {NULL};
  for (int d = 0; d < n; d++) {
    int old = d - (n - x->ndim);
    from[d] = old < 0 ? 1 : x->shape[old];
    stride[d] = old < 0 ? 0 : x->stride[old];
    if (r[d] < 0 || __builtin_mul_overflow(from[d], r[d], &shape[d]))
      return OP_FAIL(c, "x of shape %s cannot be repeated %s times", moe_shape_of(u, x), moe_shape_text(s, n, r));
  }
  int64_t numel;
  MOE_TRY(moe_shape_numel(c->op->name, n, shape, &numel));
  for (int d = 0; d < n && numel > 0; d++) {
    if (r[d] == 1) continue;
    if (positions(shape[d], &pos[d]) == NULL) return moe_error_code();
    for (int64_t i = 0; i < shape[d]; i++) pos[d][i] = i % from[d];
  }
  moe_tensor *v = moe_view_of(x, n, from, stride, x->offset);
  return v ? remap(c, v, shape, pos, 0) : moe_error_code();
}

moe_status moe_bwd_tile(moe_ctx *c) {
  const moe_meta *in = &c->in[0], *out = &c->outs[0];
  int nr;
  const int64_t *r = arg_list(c, 1, &nr);
  moe_tensor *g = c->gout[0];
  int64_t outer = 1; /* what is already summed, before dim d */
  for (int d = 0; d < out->ndim; d++) {
    int old = d - (out->ndim - in->ndim);
    int64_t n = old < 0 ? 1 : in->shape[old], inner = 1;
    for (int k = d + 1; k < out->ndim; k++) inner *= out->shape[k];
    if (r[d] != 1) g = sum_dim(g, (const int64_t[]){outer, r[d], n, inner}, 1);
    outer *= n;
  }
  return gin_set(c, 0, MOE_CALL(reshape, T(g), INTS(in->shape, in->ndim)));
}

/* Without dim, x is taken as one row. */
static moe_tensor *row_or_dim(moe_ctx *c, int i, int *dim) {
  moe_tensor *x = c->arg[0].t;
  if (arg_absent(c, i)) {
    const int64_t all = -1;
    *dim = 0;
    return MOE_CALL(reshape, T(x), INTS(&all, 1));
  }
  *dim = moe_arg_dim(c, i, x->ndim);
  return *dim < 0 ? NULL : x->ndim == 0 ? MOE_CALL(unsqueeze, T(x), I(0)) : x;
}

moe_status moe_fwd_repeat_interleave(moe_ctx *c) {
  int dim;
  int64_t r = c->arg[1].i, shape[MOE_MAX_DIM], *pos[MOE_MAX_DIM] = {NULL};
  if (r < 0) return OP_FAIL(c, "repeats must not be negative, got %lld", (long long)r);
  moe_tensor *x = row_or_dim(c, 2, &dim);
  if (x == NULL) return moe_error_code();
  for (int d = 0; d < x->ndim; d++) shape[d] = x->shape[d];
  int64_t numel;
  if (__builtin_mul_overflow(shape[dim], r, &shape[dim])) return OP_FAIL(c, "the result is too large");
  MOE_TRY(moe_shape_numel(c->op->name, x->ndim, shape, &numel));
  if (positions(shape[dim], &pos[dim]) == NULL) return moe_error_code();
  for (int64_t i = 0; i < shape[dim]; i++) pos[dim][i] = i / r;
  return remap(c, x, shape, pos, 0);
}

moe_status moe_bwd_repeat_interleave(moe_ctx *c) {
  const moe_meta *in = &c->in[0];
  int64_t four[4] = {1, 1, c->arg[1].i, 1};
  int dim = arg_absent(c, 2) ? -1 : moe_arg_dim(c, 2, in->ndim);
  for (int d = 0; d < in->ndim; d++) four[dim < 0 || d == dim ? 1 : d < dim ? 0 : 3] *= in->shape[d];
  moe_tensor *g = sum_dim(c->gout[0], four, 2);
  return gin_set(c, 0, MOE_CALL(reshape, T(g), INTS(in->shape, in->ndim)));
}

moe_status moe_fwd_flip(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  bool flag[MOE_MAX_DIM] = {false};
  int64_t *pos[MOE_MAX_DIM] = {NULL};
  if (!moe_arg_dims(c, 1, x->ndim, flag)) return moe_error_code();
  for (int d = 0; d < x->ndim; d++) {
    if (!flag[d]) continue;
    if (positions(x->shape[d], &pos[d]) == NULL) return moe_error_code();
    for (int64_t i = 0; i < x->shape[d]; i++) pos[d][i] = x->shape[d] - 1 - i;
  }
  return remap(c, x, x->shape, pos, 0);
}

moe_status moe_bwd_flip(moe_ctx *c) { return gin_set(c, 0, MOE_CALL(flip, T(c->gout[0]), c->arg[1])); }

moe_status moe_fwd_roll(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int n, ndims, flat;
  const int64_t *shift = arg_list(c, 1, &n), *dims = arg_list(c, 2, &ndims);
  int64_t by[MOE_MAX_DIM] = {0}, *pos[MOE_MAX_DIM] = {NULL}, numel = moe_numel(x);
  bool all = arg_absent(c, 2);
  if (all ? n != 1 : n != ndims)
    return OP_FAIL(c, "%d shifts for %d dims: each dim needs one", n, all ? 1 : ndims);
  moe_tensor *y = all ? row_or_dim(c, 2, &flat) : x;
  if (y == NULL) return moe_error_code();
  for (int k = 0; k < n && numel > 0; k++) {
    int64_t given = all ? 0 : dims[k], d = given < 0 ? given + y->ndim : given;
    if (d < 0 || d >= y->ndim)
      return OP_FAIL(c, "dim %lld is out of range for a tensor of %d dimensions", (long long)(given < 0 ? given : given + 1), y->ndim);
    by[d] = (by[d] + shift[k] % y->shape[d] + y->shape[d]) % y->shape[d];
  }
  for (int d = 0; d < y->ndim; d++) {
    if (by[d] == 0) continue;
    if (positions(y->shape[d], &pos[d]) == NULL) return moe_error_code();
    for (int64_t i = 0; i < y->shape[d]; i++) pos[d][i] = (i - by[d] + y->shape[d]) % y->shape[d];
  }
  MOE_TRY(remap(c, y, y->shape, pos, 0));
  if (!all) return MOE_OK;
  return moe_set_out(c, 0, MOE_CALL(reshape, T(c->out[0]), INTS(x->shape, x->ndim)));
}

moe_status moe_bwd_roll(moe_ctx *c) {
  int64_t back[MOE_MAX_DIM];
  int n;
  const int64_t *shift = arg_list(c, 1, &n);
  if (n > MOE_MAX_DIM) return OP_FAIL(c, "%d shifts: at most %d have a gradient", n, MOE_MAX_DIM);
  for (int k = 0; k < n; k++) back[k] = shift[k] == INT64_MIN ? 0 : -shift[k];
  return gin_set(c, 0, MOE_CALL(roll, T(c->gout[0]), INTS(back, n), c->arg[2]));
}

/* --- pad --- */

enum { PAD_CONSTANT, PAD_REFLECT, PAD_REPLICATE };

/* Where the padded position i comes from, in a dimension of size n: -1 is outside. */
static int64_t pad_source(int64_t i, int64_t n, int mode) {
  if (i >= 0 && i < n) return i;
  if (mode == PAD_CONSTANT) return -1;
  if (mode == PAD_REPLICATE) return i < 0 ? 0 : n - 1;
  return i < 0 ? -i : 2 * (n - 1) - i;
}

moe_status moe_fwd_pad(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int n, mode = (int)c->arg[2].i;
  const int64_t *pad = arg_list(c, 1, &n);
  int64_t shape[MOE_MAX_DIM], *pos[MOE_MAX_DIM] = {NULL};
  char s[MOE_SHAPE_TEXT], u[MOE_SHAPE_TEXT];
  if (n % 2 != 0 || n / 2 > x->ndim)
    return OP_FAIL(c, "padding %s: wanted {left, right} for at most %d dims of x %s, the last dim first", moe_shape_text(s, n, pad),
                   x->ndim, moe_shape_of(u, x));
  for (int d = 0; d < x->ndim; d++) {
    int k = 2 * (x->ndim - 1 - d);
    int64_t left = k < n ? pad[k] : 0, right = k < n ? pad[k + 1] : 0, size = x->shape[d];
    if (__builtin_add_overflow(size, left, &size) || __builtin_add_overflow(size, right, &size) || size < 0)
      return OP_FAIL(c, "padding %s gives dim %d of x %s no possible size", moe_shape_text(s, n, pad), d + 1, moe_shape_of(u, x));
    if (left < -x->shape[d] || right < -x->shape[d])
      return OP_FAIL(c, "padding %s takes more than dim %d of x %s has", moe_shape_text(s, n, pad), d + 1, moe_shape_of(u, x));
    bool grows = left > 0 || right > 0;
    if ((mode == PAD_REFLECT && (left >= MOE_MAX(x->shape[d], 1) || right >= MOE_MAX(x->shape[d], 1))) ||
        (mode == PAD_REPLICATE && grows && x->shape[d] == 0))
      return OP_FAIL(c, "padding %s is too large for dim %d of x %s in this mode", moe_shape_text(s, n, pad), d + 1, moe_shape_of(u, x));
    shape[d] = size;
  }
  int64_t numel;
  MOE_TRY(moe_shape_numel(c->op->name, x->ndim, shape, &numel));
  for (int d = 0; d < x->ndim && numel > 0; d++) {
    int k = 2 * (x->ndim - 1 - d);
    if (k >= n || (pad[k] == 0 && pad[k + 1] == 0)) continue;
    if (positions(shape[d], &pos[d]) == NULL) return moe_error_code();
    for (int64_t i = 0; i < shape[d]; i++) pos[d][i] = pad_source(i - pad[k], x->shape[d], mode);
  }
  return remap(c, x, shape, pos, c->arg[3].f);
}

/* Constant: cutting off is padding by the negative. Otherwise each padded dim adds its copies back. */
moe_status moe_bwd_pad(moe_ctx *c) {
  const moe_meta *in = &c->in[0];
  int n, mode = (int)c->arg[2].i;
  const int64_t *pad = arg_list(c, 1, &n);
  moe_tensor *g = c->gout[0];
  if (mode == PAD_CONSTANT) {
    int64_t back[2 * MOE_MAX_DIM];
    for (int k = 0; k < n; k++) back[k] = -pad[k];
    return gin_set(c, 0, MOE_CALL(pad, T(g), INTS(back, n)));
  }
  int64_t shape[MOE_MAX_DIM];
  for (int d = 0; d < in->ndim; d++) shape[d] = c->outs[0].shape[d];
  for (int k = 0; k < n && g != NULL; k += 2) {
    int d = in->ndim - 1 - k / 2;
    if (pad[k] == 0 && pad[k + 1] == 0) continue;
    int64_t *pos;
    moe_tensor *index = positions(shape[d], &pos);
    if (index == NULL) return moe_error_code();
    for (int64_t i = 0; i < shape[d]; i++) pos[i] = pad_source(i - pad[k], in->shape[d], mode);
    shape[d] = in->shape[d];
    moe_tensor *zero = moe_zeros(in->ndim, shape, g->dtype, in->device);
    g = MOE_CALL(index_add, T(zero), I(d), T(moe_to_raw(index, MOE_i64, in->device)), T(g));
  }
  return gin_set(c, 0, g);
}
