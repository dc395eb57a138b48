/* Memories: tables of very many rows, of which a token reads few. memory_mix adds rows up, memory_dots multiplies with them, and each
** is the other's gradient by its third argument; the table's gradient is row-sparse (autograd/rows.h). product_key_topk chooses rows by
** two halves of a key (Lample et al. 2019, arXiv 1907.05242), ngram_hash by the tokens themselves.
*/
#include <stdio.h>

#include "autograd/rows.h"
#include "op/arg.h"

enum { TABLE, INDEX, OTHER, SPARSE };

/* Positions of argument i, dense i64. */
static moe_tensor *positions_of(moe_ctx *c, int i) {
  moe_tensor *t = c->arg[i].t;
  if (!moe_dtype_is_float(t->dtype) && t->dtype != MOE_bool) return moe_dense(t, MOE_i64);
  OP_FAIL(c, "%s must hold integers (i64, i32 or u8), got %s", moe_op_signature(c->op)->param[i].name, moe_dtype_name(t->dtype));
  return NULL;
}

/* memory_mix [variant 0]: (values [N, d], index [.., k], weight [.., k]) -> [.., d];
** memory_dots [1]: (keys [N, d], index [.., k], x [.., d]) -> [.., k] */
moe_status moe_fwd_memory(moe_ctx *c) {
  bool dots = c->op->variant == 1;
  const char *what = dots ? "keys" : "values", *other = dots ? "x" : "weight";
  char s[MOE_SHAPE_TEXT], r[MOE_SHAPE_TEXT], w[MOE_SHAPE_TEXT];
  moe_tensor *table = c->arg[TABLE].t, *x = c->arg[OTHER].t;
  if (table->ndim != 2 || !moe_dtype_is_float(table->dtype))
    return OP_FAIL(c, "%s must be floats [rows, features], got %s %s", what, moe_dtype_name(table->dtype), moe_shape_of(s, table));
  if (!moe_dtype_is_float(x->dtype)) return OP_FAIL(c, "%s must hold floats, got %s", other, moe_dtype_name(x->dtype));
  moe_tensor *index = positions_of(c, INDEX);
  if (index == NULL) return moe_error_code();
  if (index->ndim == 0) return OP_FAIL(c, "index must be [.., k], got a single number");
  int64_t shape[MOE_MAX_DIM], d = table->shape[1], last = index->ndim - 1, k = index->shape[last], tokens = 1;
  for (int64_t i = 0; i < last; i++) tokens *= shape[i] = index->shape[i];
  shape[last] = dots ? d : k;
  bool fits = x->ndim == index->ndim;
  for (int64_t i = 0; fits && i <= last; i++) fits = x->shape[i] == shape[i];
  if (!fits)
    return OP_FAIL(c, "%s must be %s, got %s: %s is %s, index %s", other, moe_shape_text(w, index->ndim, shape), moe_shape_of(s, x), what,
                   moe_shape_of(r, table), moe_shape_of((char[MOE_SHAPE_TEXT]){0}, index));
  shape[last] = dots ? k : d;
  moe_dtype dt = moe_dtype_compute(table->dtype); /* a table in bf16 or f16 is converted whole: f32 is the type of a large one */
  moe_tensor *out = moe_out(c, 0, index->ndim, shape, table->dtype), *y = out;
  if (out != NULL && dt != table->dtype) y = moe_empty(index->ndim, shape, dt, moe_dev(table));
  moe_save(c, table);
  moe_save(c, index);
  moe_save(c, x);
  moe_tensor *rows = moe_dense(table, dt);
  if ((x = moe_dense(x, dt)) == NULL || y == NULL || rows == NULL) return moe_error_code();
  moe_status st = dots ? MOE_RUN(moe_dev(table), c->op->name, memory_dots, moe_data(y), moe_data(rows), moe_data_i64(index), moe_data(x),
                                 tokens, k, table->shape[0], d, dt, c->base)
                       : MOE_RUN(moe_dev(table), c->op->name, memory_mix, moe_data(y), moe_data(rows), moe_data_i64(index), moe_data(x),
                                 tokens, k, table->shape[0], d, dt, c->base);
  if (st == MOE_OK && y != out) return moe_copy(out, y);
  if (st != MOE_EINVAL) return st;
  char said[256];
  snprintf(said, sizeof said, "%s", moe_error());
  return OP_FAIL(c, "%s, the rows of %s %s", said, what, moe_shape_of(s, table));
}

/* The table's gradient: weight [.., k] times the rows of src [.., d], at index. Recorded calls where it is recorded itself. */
static moe_status table_gradient(moe_ctx *c, moe_tensor *index, moe_tensor *src, moe_tensor *weight) {
  const moe_meta *in = &c->in[TABLE];
  if (moe_rows_wanted()) {
    MOE_TRY(moe_give_rows(c, TABLE, index, src, weight, -1));
    if (!c->arg[SPARSE].i) c->gin[TABLE] = moe_rows_dense(c->gin[TABLE], in);
    return c->gin[TABLE] ? MOE_OK : moe_error_code();
  }
  int64_t k = moe_numel(index);
  moe_tensor *there = MOE_CALL(ge, T(index), I(c->base)); /* positions that name no row add 0 to the first one */
  weight = MOE_CALL(where, T(there), T(weight), F(0));
  index = MOE_CALL(reshape, T(MOE_CALL(clamp, T(index), F(c->base), NIL)), INTS(&k, 1));
  moe_tensor *each = MOE_CALL(mul, T(MOE_CALL(unsqueeze, T(weight), I(-1))), T(MOE_CALL(unsqueeze, T(src), I(-2))));
  each = MOE_CALL(reshape, T(each), INTS(((const int64_t[]){k, in->shape[1]}), 2));
  moe_tensor *zeros = moe_zeros(2, in->shape, in->dtype, in->device);
  return gin_set(c, TABLE, CALL_OVER(c->base, index_add, T(zeros), I(0), T(index), T(each)));
}

moe_status moe_bwd_memory(moe_ctx *c) {
  moe_tensor *table = c->saved[0], *index = c->saved[1], *other = c->saved[2], *g = c->gout[0];
  bool dots = c->op->variant == 1;
  if (c->need[TABLE]) MOE_TRY(table_gradient(c, index, dots ? other : g, dots ? g : other));
  if (!c->need[OTHER]) return MOE_OK;
  moe_value sparse = I(c->arg[SPARSE].i);
  return gin_set(c, OTHER, dots ? CALL_BASED(c->base, memory_mix, T(table), T(index), T(g), sparse)
                                : CALL_BASED(c->base, memory_dots, T(table), T(index), T(g), sparse));
}

/* (a [.., n], b [.., m], k) -> score [.., k], index [.., k] */
moe_status moe_fwd_product_key_topk(moe_ctx *c) {
  moe_tensor *a = c->arg[0].t, *b = c->arg[1].t;
  int64_t k = c->arg[2].i, shape[MOE_MAX_DIM], rows = 1;
  char s[MOE_SHAPE_TEXT], r[MOE_SHAPE_TEXT];
  bool fits = a->ndim >= 1 && a->ndim == b->ndim && moe_dtype_is_float(a->dtype) && a->dtype == b->dtype;
  for (int i = 0; fits && i < a->ndim - 1; i++) {
    fits = a->shape[i] == b->shape[i];
    rows *= shape[i] = a->shape[i];
  }
  if (!fits)
    return OP_FAIL(c, "a and b must be floats of one type, [.., n] and [.., m] with the same sizes before; got %s %s and %s %s",
                   moe_dtype_name(a->dtype), moe_shape_of(s, a), moe_dtype_name(b->dtype), moe_shape_of(r, b));
  int64_t n = a->shape[a->ndim - 1], m = b->shape[b->ndim - 1];
  if (n > 0 && m > INT64_MAX / n) return OP_FAIL(c, "%lld times %lld slots cannot be counted", (long long)n, (long long)m);
  if (k < 1 || k > n * m)
    return OP_FAIL(c, "k is %lld, wanted 1 to %lld, the number of slots", (long long)k, (long long)(n * m));
  shape[a->ndim - 1] = k;
  moe_dtype dt = moe_dtype_compute(a->dtype);
  moe_tensor *score = moe_out(c, 0, a->ndim, shape, dt), *index = moe_out(c, 1, a->ndim, shape, MOE_i64), *half[2] = {NULL, NULL};
  moe_tensor *da = moe_dense(a, dt), *db = moe_dense(b, dt);
  for (int i = 0; i < 2 && c->record; i++) {
    half[i] = moe_empty(a->ndim, shape, MOE_i64, moe_dev(a));
    if (half[i] == NULL) return moe_error_code();
    moe_save(c, half[i]);
  }
  if (!score || !index || !da || !db) return moe_error_code();
  return MOE_RUN(moe_dev(a), c->op->name, product_key_topk, moe_data(score), moe_data_i64(index),
                 half[0] ? moe_data_i64(half[0]) : NULL, half[1] ? moe_data_i64(half[1]) : NULL, moe_data(da), moe_data(db), rows, n, m, k,
                 dt, c->base);
}

moe_status moe_bwd_product_key_topk(moe_ctx *c) {
  moe_tensor *g = c->gout[0];
  for (int i = 0; i < 2 && g != NULL; i++) {
    if (!c->need[i]) continue;
    moe_tensor *zeros = moe_zeros(c->in[i].ndim, c->in[i].shape, g->dtype, c->in[i].device);
    MOE_TRY(gin_set(c, i, CALL_OVER(0, scatter_add, T(zeros), I(-1), T(c->saved[i]), T(g))));
  }
  return MOE_OK;
}

/* (ids [.., time], multipliers [N], sizes [(N - 1) heads]) -> index [.., time, (N - 1) heads] */
moe_status moe_fwd_ngram_hash(moe_ctx *c) {
  int nmul, nsize;
  const int64_t *mul = arg_list(c, 1, &nmul), *size = arg_list(c, 2, &nsize);
  moe_tensor *ids = positions_of(c, 0);
  if (ids == NULL) return moe_error_code();
  if (ids->ndim < 1 || ids->ndim == MOE_MAX_DIM) return OP_FAIL(c, "ids must be [.., time] of at most %d dimensions", MOE_MAX_DIM - 1);
  if (nmul < 2) return OP_FAIL(c, "multipliers must be at least 2 numbers (for 2-grams), got %d", nmul);
  if (nsize < 1 || nsize % (nmul - 1) != 0)
    return OP_FAIL(c, "sizes must be as many numbers for each of the %d orders 2..%d, got %d", nmul - 1, nmul, nsize);
  int64_t total = 0;
  for (int i = 0; i < nsize; i++) {
    if (size[i] < 1 || size[i] > INT64_MAX / 2 - total)
      return OP_FAIL(c, "sizes must be positive, got %lld", (long long)size[i]);
    total += size[i];
  }
  int64_t shape[MOE_MAX_DIM], rows = 1, time = ids->shape[ids->ndim - 1];
  for (int i = 0; i < ids->ndim; i++) shape[i] = ids->shape[i];
  for (int i = 0; i < ids->ndim - 1; i++) rows *= ids->shape[i];
  shape[ids->ndim] = nsize;
  moe_tensor *index = moe_out(c, 0, ids->ndim + 1, shape, MOE_i64);
  if (index == NULL) return moe_error_code();
  return MOE_RUN(moe_dev(ids), c->op->name, ngram_hash, moe_data_i64(index), moe_data_i64(ids), rows, time, mul, size, nmul - 1,
                 nsize / (nmul - 1), c->base);
}
