#include "op/fold.h"

void moe_fold_make(fold *f, int ndim, const int64_t *shape, const bool *flag, bool keepdim) {
  int first = -1, last = -1, nkept = 0, at = 0;
  f->ndim = ndim;
  f->outer = f->n = f->inner = 1;
  f->out_ndim = 0;
  f->moved = false;
  for (int d = 0; d < ndim; d++) {
    f->shape[d] = shape[d];
    f->kept[d] = flag[d] ? 1 : shape[d];
    if (keepdim || !flag[d]) f->out[f->out_ndim++] = f->kept[d];
    if (!flag[d]) f->order[nkept++] = d;
    if (!flag[d] || shape[d] == 1) continue;
    if (first < 0) first = d;
    last = d;
  }
  for (int d = first; d >= 0 && d <= last; d++) f->moved |= !flag[d] && shape[d] != 1;
  for (int d = 0; d < ndim; d++)
    if (flag[d]) f->order[nkept++] = d;
  for (at = 0; at < ndim; at++) {
    if (flag[at])
      f->n *= shape[at];
    else if (f->moved || first < 0 || at < first)
      f->outer *= shape[at];
    else
      f->inner *= shape[at];
  }
}

bool moe_fold_dim(moe_ctx *c, int i, fold *f, int ndim, const int64_t *shape, bool keepdim) {
  bool flag[MOE_MAX_DIM] = {false};
  int dim = moe_arg_dim(c, i, ndim);
  if (dim < 0) return false;
  flag[dim] = true;
  moe_fold_make(f, ndim, shape, flag, keepdim);
  return true;
}

static void ordered_shape(const fold *f, int64_t *shape) {
  for (int i = 0; i < f->ndim; i++) shape[i] = f->shape[f->moved ? f->order[i] : i];
}

moe_tensor *moe_fold_in(const fold *f, moe_tensor *x, moe_dtype dtype) {
  if (x == NULL || !f->moved) return x ? moe_dense(x, dtype) : NULL;
  int64_t shape[MOE_MAX_DIM], stride[MOE_MAX_DIM];
  ordered_shape(f, shape);
  for (int i = 0; i < f->ndim; i++) stride[i] = x->stride[f->order[i]];
  moe_tensor *v = moe_view_of(x, f->ndim, shape, stride, x->offset);
  return v ? moe_dense(v, dtype) : NULL;
}

moe_tensor *moe_fold_empty(const fold *f, moe_dtype dtype, moe_device *dev) {
  int64_t shape[MOE_MAX_DIM];
  ordered_shape(f, shape);
  return moe_empty(f->ndim, shape, dtype, dev);
}

moe_tensor *moe_fold_back(const fold *f, moe_tensor *t) {
  if (t == NULL || !f->moved) return t;
  int64_t stride[MOE_MAX_DIM];
  for (int i = 0; i < f->ndim; i++) stride[f->order[i]] = t->stride[i];
  return moe_view_of(t, f->ndim, f->shape, stride, t->offset);
}

/* Dimension `from` of t taken out and put in at `to`; the others keep their order. */
static moe_tensor *move_dim(moe_tensor *t, int from, int to) {
  int64_t shape[MOE_MAX_DIM], stride[MOE_MAX_DIM];
  for (int i = 0, d = 0; i < t->ndim; i++) {
    if (i != to && d == from) d++;
    int source = i == to ? from : d++;
    shape[i] = t->shape[source];
    stride[i] = t->stride[source];
  }
  return moe_view_of(t, t->ndim, shape, stride, t->offset);
}

moe_tensor *moe_dim_to_end(moe_tensor *x, int dim, moe_dtype dtype) {
  if (x == NULL) return NULL;
  if (dim < x->ndim - 1) x = move_dim(x, dim, x->ndim - 1);
  return x ? moe_dense(x, dtype) : NULL;
}

moe_tensor *moe_dim_from_end(moe_tensor *x, int dim) {
  return x == NULL || dim >= x->ndim - 1 ? x : move_dim(x, x->ndim - 1, dim);
}
