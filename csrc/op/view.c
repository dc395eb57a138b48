/* Views: the same storage under another shape.
**
** A view is a change of geometry (shape, strides, offset). Each operation here is one geom_* function;
** forward applies it to x's own geometry, and a backward that must put a gradient back into a larger
** tensor applies it to the geometry of a dense tensor of x's shape: one description serves both.
** Views that lose nothing (permutations, reshapes) go back by the inverse view instead.
*/
#include "op/arg.h"

typedef struct geom {
  int ndim;
  int64_t shape[MOE_MAX_DIM], stride[MOE_MAX_DIM], offset;
} geom;

typedef moe_status geom_fn(moe_ctx *c, geom *g);

static geom geom_of(const moe_tensor *x) {
  geom g = {.ndim = x->ndim, .offset = x->offset};
  for (int d = 0; d < x->ndim; d++) g.shape[d] = x->shape[d], g.stride[d] = x->stride[d];
  return g;
}

static moe_status view_forward(moe_ctx *c, geom_fn *change) {
  moe_tensor *x = c->arg[0].t;
  geom g = geom_of(x);
  MOE_TRY(change(c, &g));
  return moe_set_out(c, 0, moe_view_of(x, g.ndim, g.shape, g.stride, g.offset));
}

/* gin <- zeros with gout at the places that the view showed. */
static moe_status view_backward(moe_ctx *c, geom_fn *change) {
  const moe_meta *in = &c->in[0];
  geom g = {.ndim = in->ndim};
  for (int d = 0; d < in->ndim; d++) g.shape[d] = in->shape[d];
  moe_contiguous_strides(in->ndim, in->shape, g.stride);
  MOE_TRY(change(c, &g));
  c->gin[0] = MOE_CALL(view_put, T(c->gout[0]), INTS(in->shape, in->ndim), INTS(g.shape, g.ndim),
                       INTS(g.stride, g.ndim), I(g.offset));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* A position that counts from the end when negative; -1 with an error outside of [0, limit). */
static int64_t resolve_pos(moe_ctx *c, int64_t pos, int64_t limit, const geom *g, int dim) {
  int64_t p = pos < 0 ? pos + g->shape[dim] : pos;
  if (p >= 0 && p < limit) return p;
  char s[MOE_SHAPE_TEXT];
  OP_FAIL(c, "position %lld is outside of dim %d of size %lld (x is %s)", (long long)(pos < 0 ? pos : pos + 1),
          dim + 1, (long long)g->shape[dim], moe_shape_text(s, g->ndim, g->shape));
  return -1;
}

static void remove_dim(geom *g, int dim) {
  g->ndim--;
  for (int d = dim; d < g->ndim; d++) g->shape[d] = g->shape[d + 1], g->stride[d] = g->stride[d + 1];
}

static moe_status insert_dim(moe_ctx *c, geom *g, int dim, int64_t size, int64_t stride) {
  if (g->ndim == MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  for (int d = g->ndim++; d > dim; d--) g->shape[d] = g->shape[d - 1], g->stride[d] = g->stride[d - 1];
  g->shape[dim] = size;
  g->stride[dim] = stride;
  return MOE_OK;
}

/* --- shape --- */

/* The strides that show g's elements, in row-major order, under another shape; false when none do. Runs of
** old dimensions that step evenly are matched with runs of new ones of the same number of elements. */
static bool restride(const geom *g, int ndim, const int64_t *shape, int64_t *stride) {
  int64_t numel = 1;
  for (int d = 0; d < g->ndim; d++) numel *= g->shape[d];
  if (numel == 0) {
    moe_contiguous_strides(ndim, shape, stride);
    return true;
  }
  int n = ndim - 1;                                        /* next new dimension to lay, from the last */
  int64_t step = g->ndim ? g->stride[g->ndim - 1] : 1;     /* stride of the innermost old one of this run */
  int64_t old_run = 1, new_run = 1;
  for (int d = g->ndim - 1; d >= 0; d--) {
    old_run *= g->shape[d];
    bool run_ends = d == 0 || (g->shape[d - 1] != 1 && g->stride[d - 1] != old_run * step);
    if (!run_ends) continue;
    while (n >= 0 && (new_run < old_run || shape[n] == 1)) {
      stride[n] = new_run * step;
      new_run *= shape[n--];
    }
    if (new_run != old_run) return false;
    if (d > 0) step = g->stride[d - 1], old_run = new_run = 1;
  }
  while (n >= 0) stride[n--] = 1; /* of a scalar: sizes 1 alone */
  return true;
}

/* The sizes of argument `i` with -1 filled in, to hold as many elements as `have`. */
static moe_status infer_sizes(moe_ctx *c, int i, int have_ndim, const int64_t *have, int64_t *out, int *ndim) {
  const int64_t *want = arg_list(c, i, ndim);
  int n = *ndim;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (n > MOE_MAX_DIM) return OP_FAIL(c, "a shape of %d dimensions: at most %d are possible", n, MOE_MAX_DIM);
  int64_t numel, known;
  MOE_TRY(moe_shape_numel(c->op->name, have_ndim, have, &numel));
  int hole = -1;
  for (int d = 0; d < n; d++) {
    out[d] = want[d];
    if (want[d] == -1) {
      if (hole >= 0) return OP_FAIL(c, "only one size may be -1, got %s", moe_shape_text(a, n, want));
      hole = d;
      out[d] = 1;
    } else if (want[d] < 0) {
      return OP_FAIL(c, "size %lld of dim %d is negative, in %s", (long long)want[d], d + 1, moe_shape_text(a, n, want));
    }
  }
  MOE_TRY(moe_shape_numel(c->op->name, n, out, &known));
  if (hole >= 0 && known == 0 && numel == 0)
    return OP_FAIL(c, "the size -1 of %s is not determined: x of shape %s has no elements", moe_shape_text(a, n, want),
                   moe_shape_text(b, have_ndim, have));
  if (hole >= 0 && known > 0 && numel % known == 0) {
    out[hole] = numel / known;
    known = numel;
  }
  if (known != numel)
    return OP_FAIL(c, "%s does not hold the %lld elements of shape %s", moe_shape_text(a, n, want), (long long)numel,
                   moe_shape_text(b, have_ndim, have));
  return MOE_OK;
}

/* Result 0 <- x under another shape of as many elements; a copy where no view does, if that is allowed. */
static moe_status reshape_to(moe_ctx *c, int ndim, const int64_t *shape, bool may_copy) {
  moe_tensor *x = c->arg[0].t;
  int64_t stride[MOE_MAX_DIM];
  geom g = geom_of(x);
  if (!restride(&g, ndim, shape, stride)) {
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT], s[MOE_SHAPE_TEXT];
    if (!may_copy)
      return OP_FAIL(c, "shape %s needs a copy of x of shape %s with strides %s (hint: reshape copies where it must)",
                     moe_shape_text(a, ndim, shape), moe_shape_of(b, x), moe_shape_text(s, x->ndim, x->stride));
    if ((x = moe_contiguous_raw(x)) == NULL) return moe_error_code();
    moe_contiguous_strides(ndim, shape, stride);
  }
  return moe_set_out(c, 0, moe_view_of(x, ndim, shape, stride, x->offset));
}

/* view [variant 0], reshape [1] */
moe_status moe_fwd_view(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int64_t shape[MOE_MAX_DIM];
  int n;
  MOE_TRY(infer_sizes(c, 1, x->ndim, x->shape, shape, &n));
  return reshape_to(c, n, shape, c->op->variant != 0);
}

moe_status moe_bwd_reshape(moe_ctx *c) {
  c->gin[0] = MOE_CALL(reshape, T(c->gout[0]), INTS(c->in[0].shape, c->in[0].ndim));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

moe_status moe_fwd_flatten(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int first = arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, x->ndim);
  int last = arg_absent(c, 2) ? MOE_MAX(x->ndim - 1, 0) : moe_arg_dim(c, 2, x->ndim);
  if (first < 0 || last < 0) return moe_error_code();
  if (first > last) return OP_FAIL(c, "first dim %d comes after last dim %d", first + 1, last + 1);
  int64_t shape[MOE_MAX_DIM] = {1};
  int n = 0;
  for (int d = 0; d < x->ndim; d++) {
    if (d > first && d <= last) shape[n - 1] *= x->shape[d];
    else shape[n++] = x->shape[d];
  }
  return reshape_to(c, MOE_MAX(n, 1), shape, true);
}

moe_status moe_fwd_unflatten(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int dim = moe_arg_dim(c, 1, x->ndim), n;
  if (dim < 0) return moe_error_code();
  int64_t one = 1, sizes[MOE_MAX_DIM], shape[MOE_MAX_DIM];
  MOE_TRY(infer_sizes(c, 2, 1, x->ndim ? &x->shape[dim] : &one, sizes, &n));
  if (x->ndim + n - 1 > MOE_MAX_DIM) return OP_FAIL(c, "the result would have more than %d dimensions", MOE_MAX_DIM);
  int k = 0;
  for (int d = 0; d < dim; d++) shape[k++] = x->shape[d];
  for (int d = 0; d < n; d++) shape[k++] = sizes[d];
  for (int d = dim + 1; d < x->ndim; d++) shape[k++] = x->shape[d];
  return reshape_to(c, k, shape, true);
}

static moe_status geom_squeeze(moe_ctx *c, geom *g) {
  bool flag[MOE_MAX_DIM];
  if (!moe_arg_dims(c, 1, g->ndim, flag)) return moe_error_code();
  for (int d = g->ndim - 1; d >= 0; d--)
    if (flag[d] && g->shape[d] == 1) remove_dim(g, d);
  return MOE_OK;
}

static moe_status geom_unsqueeze(moe_ctx *c, geom *g) {
  int dim = moe_arg_dim(c, 1, g->ndim + 1);
  if (dim < 0) return moe_error_code();
  return insert_dim(c, g, dim, 1, dim < g->ndim ? g->shape[dim] * g->stride[dim] : 1);
}

static moe_status expand_to(moe_ctx *c, geom *g, int ndim, const int64_t *want) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (ndim > MOE_MAX_DIM) return OP_FAIL(c, "a shape of %d dimensions: at most %d are possible", ndim, MOE_MAX_DIM);
  int lead = ndim - g->ndim;
  bool fits = lead >= 0;
  geom r = {.ndim = ndim, .offset = g->offset};
  for (int d = 0; d < ndim && fits; d++) {
    int64_t have = d < lead ? 1 : g->shape[d - lead], size = want[d];
    if (size == -1 && d >= lead) size = have;
    fits = size >= 0 && (have == size || have == 1);
    r.shape[d] = size;
    r.stride[d] = d < lead || have != size ? 0 : g->stride[d - lead];
  }
  if (!fits)
    return OP_FAIL(c, "x of shape %s cannot become %s (a size may grow from 1 only; -1 keeps one)",
                   moe_shape_text(a, g->ndim, g->shape), moe_shape_text(b, ndim, want));
  *g = r;
  return MOE_OK;
}

static moe_status geom_expand(moe_ctx *c, geom *g) {
  int n;
  const int64_t *want = arg_list(c, 1, &n);
  return expand_to(c, g, n, want);
}
static moe_status geom_expand_as(moe_ctx *c, geom *g) { return expand_to(c, g, c->arg[1].t->ndim, c->arg[1].t->shape); }

moe_status moe_bwd_expand(moe_ctx *c) {
  c->gin[0] = moe_unbroadcast(c->gout[0], &c->in[0]);
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* --- order of dimensions --- */

static void swap_dims(geom *g, int a, int b) {
  int64_t n = g->shape[a], s = g->stride[a];
  g->shape[a] = g->shape[b], g->stride[a] = g->stride[b];
  g->shape[b] = n, g->stride[b] = s;
}

static moe_status geom_transpose(moe_ctx *c, geom *g) {
  int a = moe_arg_dim(c, 1, g->ndim), b = a < 0 ? -1 : moe_arg_dim(c, 2, g->ndim);
  if (b < 0) return moe_error_code();
  swap_dims(g, a, b);
  return MOE_OK;
}

moe_status moe_bwd_transpose(moe_ctx *c) {
  c->gin[0] = MOE_CALL(transpose, T(c->gout[0]), I(c->arg[1].i), I(c->arg[2].i));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

static moe_status geom_t(moe_ctx *c, geom *g) {
  char s[MOE_SHAPE_TEXT];
  if (g->ndim > 2)
    return OP_FAIL(c, "x must have at most 2 dimensions, got %s (hint: transpose(-2, -1))", moe_shape_text(s, g->ndim, g->shape));
  if (g->ndim == 2) swap_dims(g, 0, 1);
  return MOE_OK;
}

moe_status moe_bwd_t(moe_ctx *c) {
  c->gin[0] = MOE_CALL(t, T(c->gout[0]));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* The dims argument i as numbers in [0, ndim), each at most once. */
static moe_status list_dims(moe_ctx *c, int i, int ndim, int64_t *out) {
  bool seen[MOE_MAX_DIM] = {false};
  int n;
  const int64_t *v = arg_list(c, i, &n);
  for (int k = 0; k < n; k++) {
    int64_t d = v[k], r = d < 0 ? d + ndim : d;
    if (r < 0 || r >= ndim)
      return OP_FAIL(c, "dim %lld is out of range for a tensor of %d dimensions", (long long)(d < 0 ? d : d + 1), ndim);
    if (seen[r]) return OP_FAIL(c, "dim %lld appears twice", (long long)r + 1);
    seen[r] = true;
    out[k] = r;
  }
  return MOE_OK;
}

/* from[k]: the old dimension that comes to place k. */
static moe_status permute_order(moe_ctx *c, int ndim, int64_t *from) {
  int n;
  arg_list(c, 1, &n);
  if (n != ndim) return OP_FAIL(c, "%d dims for a tensor of %d dimensions: each must be given once", n, ndim);
  return list_dims(c, 1, ndim, from);
}

static moe_status movedim_order(moe_ctx *c, int ndim, int64_t *from) {
  int n, places;
  arg_list(c, 1, &n);
  arg_list(c, 2, &places);
  if (n != places) return OP_FAIL(c, "%d dims to move to %d places", n, places);
  if (n > ndim) return OP_FAIL(c, "%d dims of a tensor of %d dimensions", n, ndim);
  int64_t src[MOE_MAX_DIM], dst[MOE_MAX_DIM];
  bool moved[MOE_MAX_DIM] = {false};
  MOE_TRY(list_dims(c, 1, ndim, src));
  MOE_TRY(list_dims(c, 2, ndim, dst));
  for (int k = 0; k < ndim; k++) from[k] = -1;
  for (int k = 0; k < n; k++) from[dst[k]] = src[k], moved[src[k]] = true;
  int next = 0;
  for (int k = 0; k < ndim; k++) {
    if (from[k] >= 0) continue;
    while (moved[next]) next++;
    from[k] = next++;
  }
  return MOE_OK;
}

/* permute [variant 0], movedim [1] */
static moe_status order_of(moe_ctx *c, int ndim, int64_t *from) {
  return c->op->variant ? movedim_order(c, ndim, from) : permute_order(c, ndim, from);
}

static moe_status geom_permute(moe_ctx *c, geom *g) {
  int64_t from[MOE_MAX_DIM];
  MOE_TRY(order_of(c, g->ndim, from));
  geom old = *g;
  for (int k = 0; k < g->ndim; k++) g->shape[k] = old.shape[from[k]], g->stride[k] = old.stride[from[k]];
  return MOE_OK;
}

moe_status moe_bwd_permute(moe_ctx *c) {
  int n = c->in[0].ndim;
  int64_t from[MOE_MAX_DIM], back[MOE_MAX_DIM];
  MOE_TRY(order_of(c, n, from));
  for (int k = 0; k < n; k++) back[from[k]] = k;
  c->gin[0] = MOE_CALL(permute, T(c->gout[0]), INTS(back, n));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* --- parts --- */

static moe_status need_dims(moe_ctx *c, const geom *g, const char *what) {
  return g->ndim > 0 ? MOE_OK : OP_FAIL(c, "a tensor without dimensions has no %s", what);
}

static moe_status geom_select(moe_ctx *c, geom *g) {
  MOE_TRY(need_dims(c, g, "positions"));
  int dim = moe_arg_dim(c, 1, g->ndim);
  if (dim < 0) return moe_error_code();
  int64_t p = resolve_pos(c, c->arg[2].i, g->shape[dim], g, dim);
  if (p < 0) return moe_error_code();
  g->offset += p * g->stride[dim];
  remove_dim(g, dim);
  return MOE_OK;
}

static moe_status geom_narrow(moe_ctx *c, geom *g) {
  MOE_TRY(need_dims(c, g, "ranges"));
  int dim = moe_arg_dim(c, 1, g->ndim);
  if (dim < 0) return moe_error_code();
  int64_t length = c->arg[3].i, p = resolve_pos(c, c->arg[2].i, g->shape[dim] + 1, g, dim);
  if (p < 0) return moe_error_code();
  if (length < 0 || length > g->shape[dim] - p) {
    char s[MOE_SHAPE_TEXT];
    return OP_FAIL(c, "%lld elements from position %lld do not fit dim %d of size %lld (x is %s)", (long long)length,
                   (long long)p + 1, dim + 1, (long long)g->shape[dim], moe_shape_text(s, g->ndim, g->shape));
  }
  g->offset += length ? p * g->stride[dim] : 0;
  g->shape[dim] = length;
  return MOE_OK;
}

/* Both ends belong to the range; last = first - 1 is an empty one. */
static moe_status geom_slice(moe_ctx *c, geom *g) {
  MOE_TRY(need_dims(c, g, "ranges"));
  int dim = moe_arg_dim(c, 1, g->ndim);
  if (dim < 0) return moe_error_code();
  int64_t n = g->shape[dim], step = c->arg[4].i;
  if (step < 1) return OP_FAIL(c, "step must be at least 1, got %lld (hint: flip turns a dimension round)", (long long)step);
  int64_t first = arg_absent(c, 2) ? 0 : resolve_pos(c, c->arg[2].i, n + 1, g, dim);
  if (first < 0) return moe_error_code();
  int64_t last = n - 1;
  if (!arg_absent(c, 3) && (last = resolve_pos(c, c->arg[3].i, n, g, dim)) < 0) return moe_error_code();
  if (last < first - 1) return OP_FAIL(c, "the range from %lld to %lld runs backwards", (long long)first + 1, (long long)last + 1);
  int64_t count = last >= first ? (last - first) / step + 1 : 0;
  g->offset += count ? first * g->stride[dim] : 0;
  g->shape[dim] = count;
  if (count > 1) g->stride[dim] *= step;
  return MOE_OK;
}

static moe_status geom_diagonal(moe_ctx *c, geom *g) {
  char s[MOE_SHAPE_TEXT];
  if (g->ndim < 2) return OP_FAIL(c, "x must have at least 2 dimensions, got %s", moe_shape_text(s, g->ndim, g->shape));
  int64_t offset = c->arg[1].i;
  int a = arg_absent(c, 2) ? 0 : moe_arg_dim(c, 2, g->ndim), b = arg_absent(c, 3) ? 1 : moe_arg_dim(c, 3, g->ndim);
  if (a < 0 || b < 0) return moe_error_code();
  if (a == b) return OP_FAIL(c, "the two dims are the same one, %d", a + 1);
  /* offsets beyond the matrix give an empty diagonal */
  int64_t rows = offset < 0 ? g->shape[a] - MOE_MIN(-(offset + 1), g->shape[a]) - 1 : g->shape[a];
  int64_t cols = offset > 0 ? g->shape[b] - MOE_MIN(offset, g->shape[b]) : g->shape[b];
  int64_t n = MOE_MAX(MOE_MIN(rows, cols), 0), stride = g->stride[a] + g->stride[b];
  if (n > 0) g->offset += offset > 0 ? offset * g->stride[b] : -offset * g->stride[a];
  remove_dim(g, MOE_MAX(a, b));
  remove_dim(g, MOE_MIN(a, b));
  return insert_dim(c, g, g->ndim, n, stride);
}

static moe_status geom_unfold(moe_ctx *c, geom *g) {
  MOE_TRY(need_dims(c, g, "windows"));
  int dim = moe_arg_dim(c, 1, g->ndim);
  if (dim < 0) return moe_error_code();
  int64_t size = c->arg[2].i, step = c->arg[3].i, stride = g->stride[dim];
  if (size < 1 || step < 1) return OP_FAIL(c, "size and step must be at least 1, got %lld and %lld", (long long)size, (long long)step);
  if (size > g->shape[dim])
    return OP_FAIL(c, "windows of %lld do not fit dim %d of size %lld", (long long)size, dim + 1, (long long)g->shape[dim]);
  g->shape[dim] = (g->shape[dim] - size) / step + 1;
  if (g->shape[dim] > 1) g->stride[dim] = stride * step;
  return insert_dim(c, g, g->ndim, size, stride);
}

/* Windows overlap: every element collects from all the windows that show it.
** g [.., n, .., size] -> [.., n*size, ..], added at positions i*step + j. */
moe_status moe_bwd_unfold(moe_ctx *c) {
  const moe_meta *in = &c->in[0];
  int dim = moe_arg_dim(c, 1, in->ndim);
  int64_t size = c->arg[2].i, step = c->arg[3].i, n = c->outs[0].shape[dim];
  int64_t shape[MOE_MAX_DIM], count = n * size, from = in->ndim, to = dim + 1;
  for (int d = 0; d < in->ndim; d++) shape[d] = in->shape[d];
  shape[dim] = count;
  moe_tensor *g = MOE_CALL(movedim, T(c->gout[0]), INTS(&from, 1), INTS(&to, 1));
  g = MOE_CALL(reshape, T(g), INTS(shape, in->ndim));
  moe_tensor *index = moe_empty(1, &count, MOE_i64, moe_cpu());
  if (g == NULL || index == NULL) return moe_error_code();
  for (int64_t i = 0; i < count; i++) moe_data_i64(index)[i] = i / size * step + i % size;
  moe_tensor *zero = moe_zeros(in->ndim, in->shape, g->dtype, in->device);
  c->gin[0] = MOE_CALL(index_add, T(zero), I(dim), T(moe_to_raw(index, MOE_i64, in->device)), T(g));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

#define VIEW(name) moe_status moe_fwd_##name(moe_ctx *c) { return view_forward(c, geom_##name); }
VIEW(squeeze) VIEW(unsqueeze) VIEW(expand) VIEW(expand_as)
VIEW(transpose) VIEW(t) VIEW(permute)
VIEW(select) VIEW(narrow) VIEW(slice) VIEW(diagonal) VIEW(unfold)

#define VIEW_PUT_BACK(name) moe_status moe_bwd_##name(moe_ctx *c) { return view_backward(c, geom_##name); }
VIEW_PUT_BACK(select) VIEW_PUT_BACK(narrow) VIEW_PUT_BACK(slice) VIEW_PUT_BACK(diagonal)

moe_status moe_fwd_detach(moe_ctx *c) { return moe_set_out(c, 0, moe_detach(c->arg[0].t)); }

/* --- several parts --- */

static moe_status part_dim(moe_ctx *c, int i, const moe_tensor *x, int *dim) {
  if (x->ndim == 0) return OP_FAIL(c, "a tensor without dimensions cannot be divided");
  *dim = arg_absent(c, i) ? 0 : moe_arg_dim(c, i, x->ndim);
  return *dim < 0 ? moe_error_code() : MOE_OK;
}

static moe_status too_many(moe_ctx *c, int64_t n) {
  return n <= MOE_MAX_OUT ? MOE_OK : OP_FAIL(c, "%lld results: at most %d are possible", (long long)n, MOE_MAX_OUT);
}

static moe_status set_part(moe_ctx *c, int k, moe_tensor *x, int dim, int64_t start, int64_t length) {
  geom g = geom_of(x);
  g.shape[dim] = length;
  g.offset += length ? start * g.stride[dim] : 0;
  return moe_set_out(c, k, moe_view_of(x, g.ndim, g.shape, g.stride, g.offset));
}

static moe_status set_even_parts(moe_ctx *c, moe_tensor *x, int dim, int64_t size) {
  int64_t n = x->shape[dim], parts = n == 0 ? 1 : (n - 1) / size + 1;
  MOE_TRY(too_many(c, parts));
  for (int64_t k = 0; k < parts; k++) MOE_TRY(set_part(c, (int)k, x, dim, k * size, MOE_MIN(size, n - k * size)));
  return MOE_OK;
}

moe_status moe_fwd_chunk(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int dim = 0;
  MOE_TRY(part_dim(c, 2, x, &dim));
  int64_t n = c->arg[1].i;
  if (n < 1) return OP_FAIL(c, "the number of chunks must be at least 1, got %lld", (long long)n);
  int64_t size = x->shape[dim];
  return set_even_parts(c, x, dim, size == 0 ? 1 : (size - 1) / n + 1); /* rounded up without a sum that could overflow */
}

moe_status moe_fwd_split(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int dim = 0, n;
  const int64_t *size = arg_list(c, 1, &n);
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  MOE_TRY(part_dim(c, 2, x, &dim));
  if (n == 1) {
    if (size[0] < 1) return OP_FAIL(c, "size must be at least 1, got %lld", (long long)size[0]);
    return set_even_parts(c, x, dim, size[0]);
  }
  MOE_TRY(too_many(c, n));
  int64_t left = x->shape[dim];
  bool fits = n > 0;
  for (int k = 0; k < n && fits; k++) {
    fits = size[k] >= 0 && size[k] <= left;
    left -= fits ? size[k] : 0;
  }
  if (!fits || left != 0)
    return OP_FAIL(c, "sizes %s do not add up to dim %d of x %s (%lld)", moe_shape_text(a, n, size), dim + 1,
                   moe_shape_of(b, x), (long long)x->shape[dim]);
  int64_t start = 0;
  for (int k = 0; k < n; start += size[k++]) MOE_TRY(set_part(c, k, x, dim, start, size[k]));
  return MOE_OK;
}

moe_status moe_fwd_unbind(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  int dim = 0;
  MOE_TRY(part_dim(c, 1, x, &dim));
  MOE_TRY(too_many(c, x->shape[dim]));
  for (int64_t k = 0; k < x->shape[dim]; k++) {
    geom g = geom_of(x);
    g.offset += k * g.stride[dim];
    remove_dim(&g, dim);
    MOE_TRY(moe_set_out(c, (int)k, moe_view_of(x, g.ndim, g.shape, g.stride, g.offset)));
  }
  return MOE_OK;
}

/* The gradient of all parts at once, written once; absent ones are one zero seen many times. */
static moe_status join_parts(moe_ctx *c, int dim, bool stack) {
  moe_tensor *part[MOE_MAX_OUT], *zero = NULL;
  const int64_t none[MOE_MAX_DIM] = {0};
  for (int k = 0; k < c->nout; k++) {
    part[k] = c->gout[k];
    if (part[k] != NULL) continue;
    if (zero == NULL && (zero = moe_scalar(0, c->in[0].dtype, c->in[0].device)) == NULL) return moe_error_code();
    part[k] = moe_view_of(zero, c->outs[k].ndim, c->outs[k].shape, none, 0);
    if (part[k] == NULL) return moe_error_code();
  }
  c->gin[0] = stack ? MOE_CALL(stack, TS(part, c->nout), I(dim)) : MOE_CALL(cat, TS(part, c->nout), I(dim));
  return c->gin[0] ? MOE_OK : moe_error_code();
}

/* of chunk and split */
moe_status moe_bwd_split(moe_ctx *c) {
  return join_parts(c, arg_absent(c, 2) ? 0 : moe_arg_dim(c, 2, c->in[0].ndim), false);
}

moe_status moe_bwd_unbind(moe_ctx *c) {
  return join_parts(c, arg_absent(c, 1) ? 0 : moe_arg_dim(c, 1, c->in[0].ndim), true);
}

/* --- a view of a dense tensor by its strides, and its adjoint (no two elements of the view are one) --- */

moe_status moe_fwd_view_put(moe_ctx *c) {
  moe_tensor *g = c->arg[0].t;
  moe_tensor *y = moe_out(c, 0, c->arg[1].ints.n, c->arg[1].ints.v, g->dtype);
  if (y == NULL) return moe_error_code();
  MOE_TRY(moe_fill(y, 0));
  moe_tensor *place = moe_view_of(y, c->arg[2].ints.n, c->arg[2].ints.v, c->arg[3].ints.v, c->arg[4].i);
  return place ? moe_copy(place, g) : moe_error_code();
}

moe_status moe_bwd_view_put(moe_ctx *c) {
  c->gin[0] = MOE_CALL(view_take, T(c->gout[0]), c->arg[2], c->arg[3], c->arg[4]);
  return c->gin[0] ? MOE_OK : moe_error_code();
}

moe_status moe_fwd_view_take(moe_ctx *c) {
  moe_tensor *x = moe_contiguous_raw(c->arg[0].t);
  if (x == NULL) return moe_error_code();
  return moe_set_out(c, 0, moe_view_of(x, c->arg[1].ints.n, c->arg[1].ints.v, c->arg[2].ints.v, x->offset + c->arg[3].i));
}

moe_status moe_bwd_view_take(moe_ctx *c) {
  c->gin[0] = MOE_CALL(view_put, T(c->gout[0]), INTS(c->in[0].shape, c->in[0].ndim), c->arg[1], c->arg[2], c->arg[3]);
  return c->gin[0] ? MOE_OK : moe_error_code();
}
