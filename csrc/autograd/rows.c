/* Row-sparse gradients: see rows.h. */
#include "autograd/rows.h"

#include "autograd/graph.h"
#include "op/arg.h"

bool moe_rows_wanted(void) { return !moe_grad_enabled(); }

static int64_t width_of(int ndim, const int64_t *shape) {
  int64_t d = 1;
  for (int i = 1; i < ndim; i++) d *= shape[i];
  return d;
}

/* The first n numbers of a list as a list of their own. */
static moe_tensor *head_of(moe_tensor *list, int64_t n) {
  if (moe_numel(list) == n) return list;
  moe_tensor *part = moe_view_of(list, 1, &n, (const int64_t[]){1}, 0), *own = moe_empty(1, &n, MOE_i64, moe_dev(list));
  return part && own && moe_copy(own, part) == MOE_OK ? own : NULL;
}

/* The rows that `index` names of a leaf like `like`, and what comes to each. */
static moe_tensor *gather(const char *name, const moe_meta *like, moe_tensor *index, moe_tensor *src, moe_tensor *weight,
                          int64_t skip, int base) {
  int64_t k = moe_numel(index), d = width_of(like->ndim, like->shape), m = d > 0 ? moe_numel(src) / d : 0;
  moe_dtype dt = moe_dtype_compute(like->dtype);
  moe_device *dev = like->device;
  index = moe_dense(index, MOE_i64);
  src = moe_dense(src, dt);
  if (weight != NULL && (weight = moe_dense(weight, dt)) == NULL) return NULL;
  moe_tensor *rows = moe_empty(1, &k, MOE_i64, dev), *order = moe_empty(1, &k, MOE_i64, dev);
  moe_tensor *start = moe_empty(1, (const int64_t[]){k + 1}, MOE_i64, dev);
  if (!index || !src || !rows || !order || !start) return NULL;
  int64_t count = 0, shape[MOE_MAX_DIM];
  if (MOE_RUN(dev, name, rows_group, moe_data_i64(rows), moe_data_i64(start), moe_data_i64(order), &count, moe_data_i64(index), k,
              like->shape[0], skip, base) != MOE_OK)
    return NULL;
  for (int i = 0; i < like->ndim; i++) shape[i] = i == 0 ? count : like->shape[i];
  moe_tensor *g = moe_empty(like->ndim, shape, dt, dev);
  if (g == NULL || (rows = head_of(rows, count)) == NULL) return NULL;
  if (MOE_RUN(dev, name, rows_sum, moe_data(g), moe_data(src), weight ? moe_data(weight) : NULL, moe_data_i64(order),
              moe_data_i64(start), count, m > 0 ? k / m : 1, d, dt) != MOE_OK)
    return NULL;
  g = moe_to_raw(g, like->dtype, dev);
  if (g != NULL) g->rows = moe_retain(rows);
  return g;
}

moe_status moe_give_rows(moe_ctx *c, int i, moe_tensor *index, moe_tensor *src, moe_tensor *weight, int64_t skip) {
  if (index == NULL || src == NULL) return moe_error_code();
  c->gin[i] = gather(c->op->name, &c->in[i], index, src, weight, skip, c->base);
  return c->gin[i] ? MOE_OK : moe_error_code();
}

moe_tensor *moe_rows_dense(moe_tensor *g, const moe_meta *like) {
  if (!moe_is_rows(g)) return g;
  moe_tensor *y = moe_zeros(like->ndim, like->shape, g->dtype, moe_dev(g));
  return CALL_OVER(0, index_add, T(y), I(0), T(g->rows), T(g));
}

moe_tensor *moe_grad_dense(const moe_tensor *leaf) {
  moe_meta like = {leaf->dtype, leaf->ndim, leaf->shape, moe_dev(leaf)};
  return moe_rows_dense(leaf->grad, &like);
}

moe_status moe_rows_add(moe_tensor *leaf, moe_tensor *g) {
  moe_tensor *old = leaf->grad;
  if (!moe_is_rows(old))
    return CALL_OVER(0, index_add, T(old), I(0), T(g->rows), T(g)) ? MOE_OK : moe_error_code();
  moe_meta like = {leaf->dtype, leaf->ndim, leaf->shape, moe_dev(leaf)};
  moe_tensor *rows[] = {old->rows, g->rows}, *values[] = {old, g};
  moe_tensor *index = MOE_CALL(cat, TS(rows, 2), I(0)), *src = MOE_CALL(cat, TS(values, 2), I(0));
  moe_tensor *sum = index && src ? gather("backward", &like, index, src, NULL, -1, 0) : NULL;
  if (sum == NULL) return moe_error_code();
  leaf->grad = moe_retain(sum);
  moe_release(old);
  return MOE_OK;
}
