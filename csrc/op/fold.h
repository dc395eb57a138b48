/* How operations along dimensions see a tensor: as [outer, n, inner] in memory order, n running over the chosen
** dimensions. Where these do not lie together they are moved to the end (a copy), and inner is 1.
*/
#ifndef MOE_OP_FOLD_H
#define MOE_OP_FOLD_H

#include "autograd/graph.h"
#include "op/arg.h"

typedef struct fold {
  int64_t outer, n, inner;
  int ndim, out_ndim;
  bool moved;                      /* dimension i of the folded tensor is dimension order[i] of x */
  int order[MOE_MAX_DIM];
  int64_t shape[MOE_MAX_DIM];      /* of x */
  int64_t kept[MOE_MAX_DIM];       /* of x with the chosen dimensions of size 1 */
  int64_t out[MOE_MAX_DIM];        /* of the result of a reduction */
} fold;

void moe_fold_make(fold *f, int ndim, const int64_t *shape, const bool *flag, bool keepdim);
/* The same for one dimension, resolved from argument i; false with an error. */
bool moe_fold_dim(moe_ctx *c, int i, fold *f, int ndim, const int64_t *shape, bool keepdim);
/* x with its elements in folded order; contiguous; NULL passes through. */
moe_tensor *moe_fold_in(const fold *f, moe_tensor *x, moe_dtype dtype);
/* A fresh tensor in folded order for moe_fold_back, which shows it (without a copy) in the shape of x. */
moe_tensor *moe_fold_empty(const fold *f, moe_dtype dtype, moe_device *dev);
moe_tensor *moe_fold_back(const fold *f, moe_tensor *folded);

/* dim as the last one: a dense copy (x itself where it is so already); and back, as a view. */
moe_tensor *moe_dim_to_end(moe_tensor *x, int dim, moe_dtype dtype);
moe_tensor *moe_dim_from_end(moe_tensor *x, int dim);

/* gin[0] <- zeros with g at the positions `index` of `dim`, which count from c->base and are distinct along it. */
moe_status moe_put_along(moe_ctx *c, moe_tensor *g, moe_tensor *index, int dim);

/* The floating type of a result of x: integers give f32. */
static inline moe_dtype moe_float_of(moe_dtype t) { return moe_dtype_is_float(t) ? t : MOE_f32; }
/* Result k computed in `compute` and handed out as `dtype`: moe_result_begin, the kernel, moe_result_end. */
static inline moe_tensor *moe_result_begin(moe_ctx *c, int k, int ndim, const int64_t *shape, moe_dtype compute,
                                           moe_dtype dtype, moe_device *dev) {
  return compute == dtype ? moe_out(c, k, ndim, shape, dtype) : moe_empty(ndim, shape, compute, dev);
}
static inline moe_status moe_result_end(moe_ctx *c, int k, moe_tensor *y, moe_dtype dtype) {
  if (y == NULL) return moe_error_code();
  return y == c->out[k] ? MOE_OK : moe_set_out(c, k, moe_to_raw(y, dtype, moe_dev(y)));
}
/* For a backward whose kernels are not recorded. */
static inline moe_status moe_first_derivative_only(moe_ctx *c) {
  return moe_grad_enabled() ? OP_FAIL(c, "has no second derivative") : MOE_OK;
}

#endif
