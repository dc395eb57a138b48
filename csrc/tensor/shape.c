/* Shapes, broadcasting, and the walk over strided operands. */
#include <stdio.h>
#include <string.h>

#include "tensor/tensor.h"

int64_t moe_numel(const moe_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
  return n;
}

bool moe_is_contiguous(const moe_tensor *t) {
  int64_t step = 1;
  for (int i = t->ndim - 1; i >= 0; i--) {
    if (t->shape[i] == 0) return true;
    if (t->shape[i] != 1 && t->stride[i] != step) {
      for (int j = i - 1; j >= 0; j--)
        if (t->shape[j] == 0) return true;
      return false;
    }
    step *= t->shape[i];
  }
  return true;
}

bool moe_same_shape(const moe_tensor *a, const moe_tensor *b) {
  if (a->ndim != b->ndim) return false;
  for (int i = 0; i < a->ndim; i++)
    if (a->shape[i] != b->shape[i]) return false;
  return true;
}

const char *moe_shape_text(char *buf, int ndim, const int64_t *shape) {
  int n = snprintf(buf, MOE_SHAPE_TEXT, "[");
  for (int i = 0; i < ndim && n < MOE_SHAPE_TEXT - 24; i++)
    n += snprintf(buf + n, (size_t)(MOE_SHAPE_TEXT - n), i ? ", %lld" : "%lld", (long long)shape[i]);
  snprintf(buf + n, (size_t)(MOE_SHAPE_TEXT - n), "]");
  return buf;
}

moe_status moe_shape_numel(const char *op, int ndim, const int64_t *shape, int64_t *numel) {
  int64_t n = 1;
  bool empty = false, over = false;
  for (int i = 0; i < ndim; i++) {
    if (shape[i] < 0)
      return moe_fail(MOE_EINVAL, "%s%ssize %d is %lld: sizes cannot be negative", op ? op : "", op ? ": " : "", i + 1,
                      (long long)shape[i]);
    if (shape[i] == 0) empty = true;
    else if (__builtin_mul_overflow(n, shape[i], &n)) over = true, n = 1;
  }
  /* More than addresses reach. A size of 0 excuses no other: strides and loops over leading sizes still count them. */
  if (over || n > (int64_t)1 << 48) {
    char b[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "%s%sa tensor of shape %s is too large", op ? op : "", op ? ": " : "",
                    moe_shape_text(b, ndim, shape));
  }
  *numel = empty ? 0 : n;
  return MOE_OK;
}

/* Beside a size of 0 the others may be of any size: then the strides mean nothing and may wrap. */
void moe_contiguous_strides(int ndim, const int64_t *shape, int64_t *stride) {
  uint64_t step = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    stride[i] = (int64_t)step;
    step *= shape[i] > 0 ? (uint64_t)shape[i] : 1;
  }
}

moe_status moe_broadcast(const char *op, const moe_tensor *a, const moe_tensor *b, int *ndim, int64_t *shape) {
  int n = MOE_MAX(a->ndim, b->ndim);
  for (int i = 0; i < n; i++) { /* i counts from the last dimension */
    int64_t sa = i < a->ndim ? a->shape[a->ndim - 1 - i] : 1;
    int64_t sb = i < b->ndim ? b->shape[b->ndim - 1 - i] : 1;
    if (sa != sb && sa != 1 && sb != 1) {
      char ta[MOE_SHAPE_TEXT], tb[MOE_SHAPE_TEXT];
      return moe_fail(MOE_EINVAL, "%s: shapes %s and %s do not broadcast: sizes %lld and %lld in dim -%d", op,
                      moe_shape_of(ta, a), moe_shape_of(tb, b), (long long)sa, (long long)sb, i + 1);
    }
    shape[n - 1 - i] = sa == 1 ? sb : sa;
  }
  *ndim = n;
  return MOE_OK;
}

void moe_iter_make(moe_iter *it, int ndim, const int64_t *shape, int noperands, moe_tensor *const *op) {
  it->noperands = noperands;
  it->ndim = 0;
  it->numel = 1;
  for (int k = 0; k < noperands; k++) it->ptr[k] = moe_data(op[k]);
  for (int i = ndim - 1; i >= 0; i--) {
    it->numel *= shape[i];
    if (shape[i] == 1) continue;
    int64_t st[MOE_ITER_OPERANDS];
    for (int k = 0; k < noperands; k++) {
      int d = i - (ndim - op[k]->ndim);
      st[k] = d < 0 || op[k]->shape[d] == 1 ? 0 : op[k]->stride[d];
    }
    int m = it->ndim;
    bool merge = m > 0;
    for (int k = 0; merge && k < noperands; k++) merge = st[k] == it->stride[k][m - 1] * it->shape[m - 1];
    if (merge) {
      it->shape[m - 1] *= shape[i];
      continue;
    }
    it->shape[m] = shape[i];
    for (int k = 0; k < noperands; k++) it->stride[k][m] = st[k];
    it->ndim = m + 1;
  }
}

int64_t moe_iter_nrows(const moe_iter *it) {
  if (it->numel == 0) return 0;
  return it->ndim == 0 ? 1 : it->numel / it->shape[0];
}

void moe_iter_rows(const moe_iter *it, int64_t begin, int64_t end, const int64_t *esize, moe_inner_fn *inner, void *arg) {
  int n = it->noperands;
  int64_t width = it->ndim ? it->shape[0] : 1, inner_stride[MOE_ITER_OPERANDS], at[MOE_MAX_DIM];
  char *p[MOE_ITER_OPERANDS];
  for (int k = 0; k < n; k++) {
    p[k] = it->ptr[k];
    inner_stride[k] = it->ndim ? it->stride[k][0] : 0;
  }
  int64_t rest = begin;
  for (int d = 1; d < it->ndim; d++) {
    at[d] = rest % it->shape[d];
    rest /= it->shape[d];
    for (int k = 0; k < n; k++) p[k] += at[d] * it->stride[k][d] * esize[k];
  }
  for (int64_t row = begin; row < end; row++) {
    inner(arg, width, (void *const *)p, inner_stride);
    for (int d = 1; d < it->ndim; d++) { /* an odometer over the outer dimensions */
      for (int k = 0; k < n; k++) p[k] += it->stride[k][d] * esize[k];
      if (++at[d] < it->shape[d]) break;
      for (int k = 0; k < n; k++) p[k] -= it->shape[d] * it->stride[k][d] * esize[k];
      at[d] = 0;
    }
  }
}
