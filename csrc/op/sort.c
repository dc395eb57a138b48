/* topk, sort, argsort along one dimension. Equals come in order of position, NaN counts as the largest. */
#include "op/fold.h"

/* Results [value,] index of the k first along dim. */
static moe_status choose(moe_ctx *c, int dim, int64_t k, bool largest, bool only_index) {
  moe_tensor *a = c->arg[0].t;
  moe_dtype t = moe_dtype_compute(a->dtype);
  moe_tensor *x = moe_dim_to_end(a, dim, t);
  if (x == NULL) return moe_error_code();
  int64_t n = a->ndim ? a->shape[dim] : 1, shape[MOE_MAX_DIM], rows = 1;
  for (int d = 0; d < x->ndim; d++) shape[d] = x->shape[d];
  for (int d = 0; d < x->ndim - 1; d++) rows *= shape[d];
  if (x->ndim) shape[x->ndim - 1] = k;
  bool direct = dim >= x->ndim - 1; /* results are made in place, not moved back from the end */
  moe_tensor *value = NULL, *index;
  if (!only_index) {
    value = direct ? moe_result_begin(c, 0, x->ndim, shape, t, a->dtype, moe_dev(x)) : moe_empty(x->ndim, shape, t, moe_dev(x));
    if (value == NULL) return moe_error_code();
  }
  int ki = only_index ? 0 : 1;
  index = direct ? moe_out(c, ki, x->ndim, shape, MOE_i64) : moe_empty(x->ndim, shape, MOE_i64, moe_dev(x));
  if (index == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, topk, value ? moe_data(value) : NULL, moe_data_i64(index), moe_data(x), rows, n, k, t,
                  largest, c->base));
  if (!direct) {
    index = moe_dim_from_end(index, dim);
    MOE_TRY(moe_set_out(c, ki, index ? moe_contiguous_raw(index) : NULL));
    if (value) {
      value = moe_dim_from_end(value, dim);
      value = value ? moe_contiguous_raw(value) : NULL;
    }
  }
  if (!only_index) MOE_TRY(moe_result_end(c, 0, value, a->dtype));
  moe_save(c, c->out[ki]);
  return MOE_OK;
}

/* args: x, k, dim, largest, sorted; without `sorted` any order will do, so it is sorted too */
moe_status moe_fwd_topk(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  char s[MOE_SHAPE_TEXT];
  int dim = moe_arg_dim(c, 2, x->ndim);
  if (dim < 0) return moe_error_code();
  int64_t n = x->ndim ? x->shape[dim] : 1, k = c->arg[1].i;
  if (k < 0 || k > n)
    return OP_FAIL(c, "k = %lld is out of range: x is %s, dim %d has %lld elements", (long long)k, moe_shape_of(s, x), dim + 1,
                   (long long)n);
  return choose(c, dim, k, c->arg[3].i, false);
}

static moe_status whole(moe_ctx *c, bool only_index) {
  moe_tensor *x = c->arg[0].t;
  int dim = moe_arg_dim(c, 1, x->ndim);
  if (dim < 0) return moe_error_code();
  return choose(c, dim, x->ndim ? x->shape[dim] : 1, c->arg[2].i, only_index);
}

moe_status moe_fwd_sort(moe_ctx *c) { return whole(c, false); }
moe_status moe_fwd_argsort(moe_ctx *c) { return whole(c, true); }

moe_status moe_put_along(moe_ctx *c, moe_tensor *g, moe_tensor *index, int dim) {
  const moe_meta *in = &c->in[0];
  int64_t rows = 1, n = in->ndim ? in->shape[dim] : 1, shape[MOE_MAX_DIM];
  if (in->ndim == 0) return gin_set(c, 0, g);
  if (moe_grad_enabled()) { /* recorded */
    moe_tensor *zero = moe_zeros(in->ndim, in->shape, in->dtype, in->device);
    return gin_set(c, 0, CALL_BASED(c->base, scatter, T(zero), I(dim), T(index), T(g)));
  }
  moe_dtype t = moe_dtype_compute(in->dtype);
  moe_tensor *gd = moe_dim_to_end(g, dim, t), *at = moe_dim_to_end(index, dim, MOE_i64);
  if (gd == NULL || at == NULL) return moe_error_code();
  for (int d = 0; d < in->ndim; d++) shape[d] = gd->shape[d];
  for (int d = 0; d < in->ndim - 1; d++) rows *= shape[d];
  int64_t k = shape[in->ndim - 1];
  shape[in->ndim - 1] = n;
  moe_tensor *gx = moe_empty(in->ndim, shape, t, in->device);
  if (gx == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(in->device, c->op->name, put_rows, moe_data(gx), moe_data(gd), moe_data_i64(at), rows, n, k, t, c->base));
  return gin_set(c, 0, moe_dim_from_end(gx, dim));
}

moe_status moe_bwd_topk(moe_ctx *c) {
  if (c->gout[0] == NULL) return MOE_OK;
  return moe_put_along(c, c->gout[0], c->saved[0], moe_arg_dim(c, 2, c->in[0].ndim));
}

moe_status moe_bwd_sort(moe_ctx *c) {
  if (c->gout[0] == NULL) return MOE_OK;
  return moe_put_along(c, c->gout[0], c->saved[0], moe_arg_dim(c, 1, c->in[0].ndim));
}
