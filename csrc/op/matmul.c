/* Matrix products: matmul and its kin, addmm, outer, linear.
**
** Everything comes down to `product`, op(a) op(b) over broadcast batches, whose backward is two products again:
** with C = op(a) op(b),  d op(a) = G op(b)^T  and  d op(b) = op(a)^T G. Transposed views go to the kernel as
** they are; only what has no unit stride in its last two dimensions is copied. */
#include "op/product.h"

#include "autograd/graph.h"

enum { MATMUL, MM, BMM, MV, DOT };

/* The last two dimensions of t as the kernel takes them: row-major, or the transpose of row-major. */
static bool matrix_of(const moe_tensor *t, bool *trans, int64_t *ld) {
  int64_t rows = t->shape[t->ndim - 2], cols = t->shape[t->ndim - 1];
  int64_t rs = t->stride[t->ndim - 2], cs = t->stride[t->ndim - 1];
  if ((cs == 1 || cols == 1) && (rows == 1 || rs >= MOE_MAX(cols, 1))) {
    *trans = false;
    *ld = rows == 1 ? cols : rs;
    return true;
  }
  if ((rs == 1 || rows == 1) && (cols == 1 || cs >= MOE_MAX(rows, 1))) {
    *trans = true;
    *ld = cols == 1 ? rows : cs;
    return true;
  }
  return false;
}

/* True when the dimensions before the last are one long column of rows of one stride. */
static bool rows_fold(const moe_tensor *t, int64_t *ld) {
  int64_t cols = t->shape[t->ndim - 1], step = cols, next = -1; /* step: of the rows; next: what the dimension outside must have */
  if (cols != 1 && t->stride[t->ndim - 1] != 1) return false;
  for (int d = t->ndim - 2; d >= 0; d--) {
    if (t->shape[d] == 1) continue;
    if (next < 0) step = next = t->stride[d];
    if (t->stride[d] != next) return false;
    next *= t->shape[d];
  }
  *ld = step;
  return step >= MOE_MAX(cols, 1); /* not 0: an expanded row is no matrix */
}

/* Element offset of every batch (row-major over `shape`) of t, whose last two dimensions are left out. NULL in *off when
** they are all zero. */
static moe_status batch_offsets(const moe_tensor *t, int nb, const int64_t *shape, int64_t nbatch, const int64_t **off) {
  int64_t stride[MOE_MAX_DIM];
  int lead = nb - (t->ndim - 2);
  bool any = false;
  for (int d = 0; d < nb; d++) {
    stride[d] = d < lead || t->shape[d - lead] == 1 ? 0 : t->stride[d - lead];
    any = any || stride[d] != 0;
  }
  *off = NULL;
  if (!any || nbatch <= 1) return MOE_OK;
  moe_tensor *list = moe_empty(1, &nbatch, MOE_i64, moe_cpu());
  if (list == NULL) return moe_error_code();
  int64_t *o = moe_data_i64(list), at[MOE_MAX_DIM] = {0}, here = 0;
  for (int64_t i = 0; i < nbatch; i++) {
    o[i] = here;
    for (int d = nb - 1; d >= 0; d--) {
      here += stride[d];
      if (++at[d] < shape[d]) break;
      here -= stride[d] * shape[d];
      at[d] = 0;
    }
  }
  *off = o;
  return MOE_OK;
}

moe_status moe_want_float(moe_ctx *c, const char *name, const moe_tensor *t) {
  if (moe_dtype_is_float(t->dtype)) return MOE_OK;
  return OP_FAIL(c, "%s must be of a floating-point type, got %s: convert it first, as in x:to(\"f32\")", name,
                 moe_dtype_name(t->dtype));
}

/* Result 0 of the call = op(a) op(b); drop_m, drop_n: leave that dimension (of size 1) out of the result's shape. */
static moe_status multiply(moe_ctx *c, moe_tensor *a, bool ta, moe_tensor *b, bool tb, bool drop_m, bool drop_n) {
  moe_dtype dt = moe_dtype_promote(a->dtype, b->dtype), ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(a);
  int nb = MOE_MAX(a->ndim, b->ndim) - 2, ndim = 0;
  int64_t m = a->shape[a->ndim - (ta ? 1 : 2)], k = a->shape[a->ndim - (ta ? 2 : 1)], n = b->shape[b->ndim - (tb ? 2 : 1)];
  int64_t shape[MOE_MAX_DIM], nbatch = 1, nbatch_b = 1;
  for (int d = 0; d < nb; d++) {
    int da = d - (nb - (a->ndim - 2)), db = d - (nb - (b->ndim - 2));
    int64_t sa = da < 0 ? 1 : a->shape[da], sb = db < 0 ? 1 : b->shape[db];
    if (sa != sb && sa != 1 && sb != 1) {
      char ba[MOE_SHAPE_TEXT], bb[MOE_SHAPE_TEXT];
      return OP_FAIL(c, "the dimensions before the last two do not broadcast: a is %s, b is %s", moe_shape_of(ba, a),
                     moe_shape_of(bb, b));
    }
    shape[ndim++] = sa == 1 ? sb : sa;
  }
  MOE_TRY(moe_shape_numel(c->op->name, nb, shape, &nbatch));
  if (!drop_m) shape[ndim++] = m;
  if (!drop_n) shape[ndim++] = n;
  moe_tensor *y = moe_out(c, 0, ndim, shape, dt);
  moe_tensor *r = y == NULL || dt == ct ? y : moe_empty(ndim, shape, ct, dev);
  a = moe_to_raw(a, ct, dev);
  b = moe_to_raw(b, ct, dev);
  if (r == NULL || a == NULL || b == NULL) return moe_error_code();
  if (k == 0) return moe_fill(y, 0);
  if (moe_numel(y) == 0) return MOE_OK;
  for (int d = 0; d < b->ndim - 2; d++) nbatch_b *= b->shape[d];

  bool va, vb; /* stored transposed */
  int64_t lda, ldb;
  if (!matrix_of(b, &vb, &ldb)) {
    b = moe_contiguous_raw(b);
    if (b == NULL || !matrix_of(b, &vb, &ldb)) return moe_error_code();
  }
  bool fold = nbatch_b == 1 && !ta && nbatch > 1 && rows_fold(a, &lda);
  if (!fold && !matrix_of(a, &va, &lda)) {
    a = moe_contiguous_raw(a);
    if (a == NULL) return moe_error_code();
    fold = nbatch_b == 1 && !ta && nbatch > 1 && rows_fold(a, &lda);
    if (!fold && !matrix_of(a, &va, &lda)) return moe_error_code();
  }
  if (fold) {
    MOE_TRY(MOE_RUN(dev, c->op->name, gemm, ct, 1, false, tb != vb, nbatch * m, n, k, 1, moe_data(a), lda, NULL,
                    moe_data(b), ldb, NULL, 0, moe_data(r), n, 0));
  } else {
    const int64_t *off_a, *off_b;
    MOE_TRY(batch_offsets(a, nb, shape, nbatch, &off_a));
    MOE_TRY(batch_offsets(b, nb, shape, nbatch, &off_b));
    MOE_TRY(MOE_RUN(dev, c->op->name, gemm, ct, nbatch, ta != va, tb != vb, m, n, k, 1, moe_data(a), lda, off_a,
                    moe_data(b), ldb, off_b, 0, moe_data(r), n, m * n));
  }
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_tensor *moe_reshaped(moe_tensor *t, int ndim, const int64_t *shape) {
  if (t == NULL) return NULL;
  if (moe_grad_enabled()) return MOE_CALL(reshape, T(t), INTS(shape, ndim));
  int64_t stride[MOE_MAX_DIM];
  moe_contiguous_strides(ndim, shape, stride);
  moe_tensor *d = moe_contiguous_raw(t);
  return d ? moe_view_of(d, ndim, shape, stride, d->offset) : NULL;
}

/* [.., n] -> [rows, n] */
static moe_tensor *as_rows(moe_tensor *t) {
  if (t == NULL || t->ndim == 2) return t;
  int64_t n = t->shape[t->ndim - 1], rows;
  if (moe_shape_numel("matmul", t->ndim - 1, t->shape, &rows) != MOE_OK) return NULL;
  return moe_reshaped(t, 2, (const int64_t[]){rows, n});
}

/* Whether a saved matrix lies transposed in memory. Its gradient is then made in that order too: the view's own
** backward turns it into a plain matrix again, and nobody copies it to get there. */
static bool turned(const moe_tensor *t) {
  bool trans;
  int64_t ld;
  return t != NULL && t->ndim >= 2 && matrix_of(t, &trans, &ld) && trans;
}

static moe_tensor *turn(moe_tensor *t) { return t ? MOE_CALL(transpose, T(t), I(-2), I(-1)) : NULL; }

/* Gradients of op(a) op(b), both of at least two dimensions, for whichever is asked; not yet unbroadcast. */
static moe_tensor *grad_a(moe_tensor *g, const moe_tensor *a, bool ta, moe_tensor *b, bool tb) {
  if (!ta && turned(a)) return turn(MOE_CALL(product, T(b), T(g), I(tb), I(1)));
  return ta ? MOE_CALL(product, T(b), T(g), I(tb), I(1)) : MOE_CALL(product, T(g), T(b), I(0), I(!tb));
}

static moe_tensor *grad_b(moe_tensor *g, moe_tensor *a, bool ta, const moe_meta *b, const moe_tensor *saved_b, bool tb) {
  if (b->ndim == 2 && a != NULL && a->ndim > 2 && !ta) { /* the batches are more rows of one inner dimension */
    a = as_rows(a);
    g = as_rows(g);
  }
  if (!tb && turned(saved_b)) return turn(MOE_CALL(product, T(g), T(a), I(1), I(ta)));
  return tb ? MOE_CALL(product, T(g), T(a), I(1), I(ta)) : MOE_CALL(product, T(a), T(g), I(!ta), I(0));
}

static moe_status inner_differ(moe_ctx *c, const char *na, const moe_tensor *a, int da, const char *nb, const moe_tensor *b,
                               int db) {
  char ba[MOE_SHAPE_TEXT], bb[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "inner sizes differ: %s is %s, %s is %s (%s's dim %d = %lld, %s's dim %d = %lld)", na, moe_shape_of(ba, a),
                 nb, moe_shape_of(bb, b), na, da + 1, (long long)a->shape[da], nb, db + 1, (long long)b->shape[db]);
}

/* Saves what each gradient needs, and no more: a for b's, b for a's. */
static void save_pair(moe_ctx *c, moe_tensor *a, moe_tensor *b) {
  moe_save(c, moe_wants_grad(b) ? a : NULL);
  moe_save(c, moe_wants_grad(a) ? b : NULL);
}

/* --- product(a, b, ta, tb): matrices with flags, for C --- */

moe_status moe_fwd_product(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t, *b = c->arg[1].t;
  bool ta = c->arg[2].i != 0, tb = c->arg[3].i != 0;
  MOE_TRY(moe_want_float(c, "a", a));
  MOE_TRY(moe_want_float(c, "b", b));
  if (a->ndim < 2 || b->ndim < 2) return OP_FAIL(c, "wants two dimensions and more");
  int da = a->ndim - (ta ? 2 : 1), db = b->ndim - (tb ? 1 : 2);
  if (a->shape[da] != b->shape[db]) return inner_differ(c, "a", a, da, "b", b, db);
  save_pair(c, a, b);
  return multiply(c, a, ta, b, tb, false, false);
}

moe_status moe_bwd_product(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  bool ta = c->arg[2].i != 0, tb = c->arg[3].i != 0;
  if (c->need[0]) c->gin[0] = moe_unbroadcast(grad_a(g, c->saved[0], ta, c->saved[1], tb), &c->in[0]);
  if (c->need[1]) c->gin[1] = moe_unbroadcast(grad_b(g, c->saved[0], ta, &c->in[1], c->saved[1], tb), &c->in[1]);
  return (c->need[0] && !c->gin[0]) || (c->need[1] && !c->gin[1]) ? moe_error_code() : MOE_OK;
}

/* --- matmul, mm, bmm, mv, dot --- */

static const struct {
  int ndim_a, ndim_b;
} ranks[] = {[MATMUL] = {-1, -1}, [MM] = {2, 2}, [BMM] = {3, 3}, [MV] = {2, 1}, [DOT] = {1, 1}};

/* A vector on the left is a row, on the right a column. */
static moe_tensor *as_matrix(moe_tensor *t, bool right) {
  if (t == NULL || t->ndim != 1) return t;
  int64_t n = t->shape[0], s = t->stride[0];
  if (moe_grad_enabled()) return MOE_CALL(reshape, T(t), INTS(((const int64_t[]){right ? n : 1, right ? 1 : n}), 2));
  return right ? moe_view_of(t, 2, (const int64_t[]){n, 1}, (const int64_t[]){s, 1}, t->offset)
               : moe_view_of(t, 2, (const int64_t[]){1, n}, (const int64_t[]){MOE_MAX(n, 1), s}, t->offset);
}

moe_status moe_fwd_matmul(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t, *b = c->arg[1].t;
  MOE_TRY(moe_want_float(c, "a", a));
  MOE_TRY(moe_want_float(c, "b", b));
  char ba[MOE_SHAPE_TEXT], bb[MOE_SHAPE_TEXT];
  int wa = ranks[c->op->variant].ndim_a, wb = ranks[c->op->variant].ndim_b;
  if (a->ndim < 1 || b->ndim < 1)
    return OP_FAIL(c, "wants tensors of one dimension and more: a is %s, b is %s (for a number, use a * b)",
                   moe_shape_of(ba, a), moe_shape_of(bb, b));
  if ((wa > 0 && a->ndim != wa) || (wb > 0 && b->ndim != wb))
    return OP_FAIL(c, "wants a with %d and b with %d dimension%s: a is %s, b is %s", wa, wb, wb == 1 ? "" : "s",
                   moe_shape_of(ba, a), moe_shape_of(bb, b));
  if (c->op->variant == BMM && a->shape[0] != b->shape[0])
    return OP_FAIL(c, "batch sizes differ: a is %s, b is %s (dim 1)", moe_shape_of(ba, a), moe_shape_of(bb, b));
  int da = a->ndim - 1, db = b->ndim == 1 ? 0 : b->ndim - 2;
  if (a->shape[da] != b->shape[db]) return inner_differ(c, "a", a, da, "b", b, db);
  save_pair(c, a, b);
  bool row = a->ndim == 1, column = b->ndim == 1;
  a = as_matrix(a, false);
  b = as_matrix(b, true);
  if (a == NULL || b == NULL) return moe_error_code();
  return multiply(c, a, false, b, false, row, column);
}

/* The gradient of a vector, found as that of a matrix of one row or column. */
static moe_tensor *back_to(moe_tensor *g, const moe_meta *in, bool right) {
  if (in->ndim != 1) return moe_unbroadcast(g, in);
  int64_t n = in->shape[0], shape[2] = {right ? n : 1, right ? 1 : n};
  moe_meta matrix = {.dtype = in->dtype, .ndim = 2, .shape = shape, .device = in->device};
  g = g ? moe_unbroadcast(g, &matrix) : NULL;
  return moe_reshaped(g, 1, in->shape);
}

moe_status moe_bwd_matmul(moe_ctx *c) {
  bool row = c->in[0].ndim == 1, column = c->in[1].ndim == 1;
  moe_tensor *a = as_matrix(c->saved[0], false), *b = as_matrix(c->saved[1], true), *g = c->gout[0];
  if (row || column) {
    int64_t shape[MOE_MAX_DIM];
    int nd = 0;
    for (; nd < g->ndim - (row && column ? 0 : 1); nd++) shape[nd] = g->shape[nd];
    if (row && column) shape[nd++] = 1, shape[nd++] = 1;
    else if (row) shape[nd++] = 1, shape[nd++] = g->shape[g->ndim - 1];
    else shape[nd++] = g->shape[g->ndim - 1], shape[nd++] = 1;
    g = moe_reshaped(g, nd, shape);
  }
  moe_meta meta_b = {.ndim = column ? 2 : c->in[1].ndim};
  if (c->need[0] && g && b) c->gin[0] = back_to(grad_a(g, a, false, b, false), &c->in[0], false);
  if (c->need[1] && g && a) c->gin[1] = back_to(grad_b(g, a, false, &meta_b, b, false), &c->in[1], true);
  return (c->need[0] && !c->gin[0]) || (c->need[1] && !c->gin[1]) ? moe_error_code() : MOE_OK;
}

/* --- addmm: beta input + alpha a b --- */

moe_status moe_fwd_addmm(moe_ctx *c) {
  moe_tensor *in = c->arg[0].t, *a = c->arg[1].t, *b = c->arg[2].t;
  double beta = c->arg[3].f, alpha = c->arg[4].f;
  char bi[MOE_SHAPE_TEXT], ba[MOE_SHAPE_TEXT], bb[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "input", in));
  MOE_TRY(moe_want_float(c, "a", a));
  MOE_TRY(moe_want_float(c, "b", b));
  if (a->ndim != 2 || b->ndim != 2)
    return OP_FAIL(c, "wants matrices: a is %s, b is %s", moe_shape_of(ba, a), moe_shape_of(bb, b));
  if (a->shape[1] != b->shape[0]) return inner_differ(c, "a", a, 1, "b", b, 0);
  int64_t m = a->shape[0], k = a->shape[1], n = b->shape[1], shape[2] = {m, n};
  int64_t in_rows = in->ndim > 1 ? in->shape[in->ndim - 2] : 1, in_cols = in->ndim > 0 ? in->shape[in->ndim - 1] : 1;
  if (in->ndim > 2 || (in_rows != 1 && in_rows != m) || (in_cols != 1 && in_cols != n))
    return OP_FAIL(c, "input is %s, which does not broadcast to the product's [%lld, %lld]", moe_shape_of(bi, in),
                   (long long)m, (long long)n);
  moe_dtype dt = moe_dtype_promote(in->dtype, moe_dtype_promote(a->dtype, b->dtype)), ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(a);
  save_pair(c, a, b);
  moe_tensor *y = moe_out(c, 0, 2, shape, dt), *r = y == NULL || dt == ct ? y : moe_empty(2, shape, ct, dev);
  a = moe_to_raw(a, ct, dev);
  b = moe_to_raw(b, ct, dev);
  if (r == NULL || a == NULL || b == NULL) return moe_error_code();
  if (moe_numel(y) == 0) return MOE_OK;
  MOE_TRY(beta == 0 ? moe_fill(r, 0) : moe_copy(r, in));
  bool ta, tb;
  int64_t lda, ldb;
  if (!matrix_of(a, &ta, &lda)) {
    a = moe_contiguous_raw(a);
    if (a == NULL || !matrix_of(a, &ta, &lda)) return moe_error_code();
  }
  if (!matrix_of(b, &tb, &ldb)) {
    b = moe_contiguous_raw(b);
    if (b == NULL || !matrix_of(b, &tb, &ldb)) return moe_error_code();
  }
  MOE_TRY(MOE_RUN(dev, c->op->name, gemm, ct, 1, ta, tb, m, n, k, alpha, moe_data(a), lda, NULL, moe_data(b), ldb, NULL,
                  beta, moe_data(r), n, 0));
  return r == y ? MOE_OK : moe_copy(y, r);
}

static moe_tensor *scaled(moe_tensor *t, double by) { return by == 1 ? t : MOE_CALL(mul, T(t), F(by)); }

moe_status moe_bwd_addmm(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  double beta = c->arg[3].f, alpha = c->arg[4].f;
  if (c->need[0]) c->gin[0] = moe_unbroadcast(scaled(g, beta), &c->in[0]);
  if (c->need[1]) c->gin[1] = moe_unbroadcast(scaled(grad_a(g, c->saved[0], false, c->saved[1], false), alpha), &c->in[1]);
  if (c->need[2]) c->gin[2] = moe_unbroadcast(scaled(grad_b(g, c->saved[0], false, &c->in[2], c->saved[1], false), alpha), &c->in[2]);
  for (int i = 0; i < 3; i++)
    if (c->need[i] && c->gin[i] == NULL) return moe_error_code();
  return MOE_OK;
}

/* --- outer --- */

moe_status moe_fwd_outer(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t, *b = c->arg[1].t;
  char ba[MOE_SHAPE_TEXT], bb[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "a", a));
  MOE_TRY(moe_want_float(c, "b", b));
  if (a->ndim != 1 || b->ndim != 1)
    return OP_FAIL(c, "wants vectors: a is %s, b is %s", moe_shape_of(ba, a), moe_shape_of(bb, b));
  save_pair(c, a, b);
  a = as_matrix(a, true);
  b = as_matrix(b, false);
  if (a == NULL || b == NULL) return moe_error_code();
  return multiply(c, a, false, b, false, false, false);
}

moe_status moe_bwd_outer(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  if (c->need[0]) c->gin[0] = moe_unbroadcast(MOE_CALL(matmul, T(g), T(c->saved[1])), &c->in[0]);
  if (c->need[1]) c->gin[1] = moe_unbroadcast(MOE_CALL(matmul, T(c->saved[0]), T(g)), &c->in[1]);
  return (c->need[0] && !c->gin[0]) || (c->need[1] && !c->gin[1]) ? moe_error_code() : MOE_OK;
}

/* --- linear: y = x w^T + bias, the bias laid down in the tile before its product --- */

moe_status moe_fwd_linear(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t, *w = c->arg[1].t, *bias = c->arg[2].kind == MOE_K_none ? NULL : c->arg[2].t;
  char bx[MOE_SHAPE_TEXT], bw[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "x", x));
  MOE_TRY(moe_want_float(c, "weight", w));
  if (x->ndim < 1 || w->ndim != 2)
    return OP_FAIL(c, "wants x [.., in] and weight [out, in]: x is %s, weight is %s", moe_shape_of(bx, x), moe_shape_of(bw, w));
  if (x->shape[x->ndim - 1] != w->shape[1]) return inner_differ(c, "x", x, x->ndim - 1, "weight", w, 1);
  int64_t k = w->shape[1], n = w->shape[0], shape[MOE_MAX_DIM], m;
  moe_dtype dt = moe_dtype_promote(x->dtype, w->dtype);
  if (bias) {
    MOE_TRY(moe_want_float(c, "bias", bias));
    if (bias->ndim != 1 || bias->shape[0] != n)
      return OP_FAIL(c, "bias must be [%lld], one number a row of weight %s, got %s", (long long)n, moe_shape_of(bw, w),
                     moe_shape_of(bx, bias));
    dt = moe_dtype_promote(dt, bias->dtype);
  }
  moe_dtype ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(x);
  for (int d = 0; d + 1 < x->ndim; d++) shape[d] = x->shape[d];
  MOE_TRY(moe_shape_numel(c->op->name, x->ndim - 1, shape, &m));
  shape[x->ndim - 1] = n;
  save_pair(c, x, w);
  moe_tensor *y = moe_out(c, 0, x->ndim, shape, dt), *r = y == NULL || dt == ct ? y : moe_empty(x->ndim, shape, ct, dev);
  x = moe_to_raw(x, ct, dev);
  w = moe_to_raw(w, ct, dev);
  if (bias) bias = moe_dense(bias, ct);
  if (r == NULL || x == NULL || w == NULL || (c->arg[2].kind != MOE_K_none && bias == NULL)) return moe_error_code();
  if (moe_numel(y) == 0) return MOE_OK;
  int64_t ldx, ldw;
  bool tw;
  if (!rows_fold(x, &ldx)) {
    x = moe_contiguous_raw(x);
    ldx = k;
  }
  if (!matrix_of(w, &tw, &ldw) || tw) {
    w = moe_contiguous_raw(w);
    ldw = k;
  }
  if (x == NULL || w == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(dev, c->op->name, linear, ct, moe_data(r), moe_data(x), moe_data(w), bias ? moe_data(bias) : NULL, m, n, k,
                  ldx, ldw));
  return r == y ? MOE_OK : moe_copy(y, r);
}

/* [rows, n] -> [n] */
static moe_tensor *column_sum(moe_ctx *c, moe_tensor *g) {
  if (g == NULL) return NULL;
  if (moe_grad_enabled()) return MOE_CALL(sum, T(g), DIM1(0));
  moe_dtype ct = moe_dtype_compute(g->dtype);
  moe_tensor *d = moe_dense(g, ct), *y = moe_empty(1, &g->shape[1], ct, moe_dev(g));
  if (d == NULL || y == NULL) return NULL;
  return MOE_RUN(moe_dev(g), c->op->name, colsum, ct, moe_data(y), moe_data(d), d->shape[0], d->shape[1]) == MOE_OK ? y : NULL;
}

moe_status moe_bwd_linear(moe_ctx *c) {
  moe_tensor *g = c->gout[0], *rows = as_rows(g->ndim == 1 ? as_matrix(g, false) : g), *x = c->saved[0];
  bool need_bias = c->nin > 2 && c->need[2];
  if (rows == NULL) return moe_error_code();
  if (c->need[0]) {
    moe_tensor *gx = MOE_CALL(product, T(rows), T(c->saved[1]), I(0), I(0));
    c->gin[0] = gx ? moe_unbroadcast(moe_reshaped(gx, c->in[0].ndim, c->in[0].shape), &c->in[0]) : NULL;
  }
  if (c->need[1]) {
    x = as_rows(x->ndim == 1 ? as_matrix(x, false) : x);
    c->gin[1] = moe_unbroadcast(MOE_CALL(product, T(rows), T(x), I(1), I(0)), &c->in[1]);
  }
  if (need_bias) c->gin[2] = moe_unbroadcast(column_sum(c, rows), &c->in[2]);
  for (int i = 0; i < c->nin; i++)
    if (c->need[i] && c->gin[i] == NULL) return moe_error_code();
  return MOE_OK;
}
