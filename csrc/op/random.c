/* Random tensors and dropout. A call takes as many blocks of four 32-bit words from the generator of the
** current settings as its elements need; which word serves which element is fixed (cpu/random.c), so that
** the numbers depend on the seed and the order of the calls alone.
*/
#include <math.h>

#include "op/make.h"

/* Blocks for n elements of `words` words each. */
static uint64_t take(int64_t n, int words) {
  return moe_rng_take(&moe_env_now()->rng, ((uint64_t)n * (uint64_t)words + 3) / 4);
}

static uint64_t seed_now(void) { return moe_env_now()->rng.seed; }

/* uniform or normal into y, through the computing type; a, b: bounds, or mean and deviation */
static moe_status draw(moe_ctx *c, moe_tensor *y, bool normal, double a, double b) {
  if (y == NULL) return moe_error_code();
  if (!moe_dtype_is_float(y->dtype)) return OP_FAIL(c, "wants a float type, got %s", moe_dtype_name(y->dtype));
  moe_dtype work = moe_dtype_compute(y->dtype);
  moe_tensor *r = y->dtype == work && moe_is_contiguous(y) ? y : moe_empty(y->ndim, y->shape, work, moe_dev(y));
  if (r == NULL) return moe_error_code();
  int64_t n = moe_numel(y);
  if (n == 0) return MOE_OK;
  uint64_t block = take(n, work == MOE_f64 ? 2 : 1);
  if (normal) MOE_TRY(MOE_RUN(moe_dev(y), c->op->name, random_normal, moe_data(r), n, work, a, b, seed_now(), block));
  else MOE_TRY(MOE_RUN(moe_dev(y), c->op->name, random_uniform, moe_data(r), n, work, a, b, seed_now(), block));
  return r == y ? MOE_OK : moe_copy(y, r);
}

/* variant 0: rand, 1: randn */
moe_status moe_fwd_rand(moe_ctx *c) { return draw(c, moe_make_shaped(c, 1), c->op->variant, 0, 1); }
moe_status moe_fwd_rand_like(moe_ctx *c) { return draw(c, moe_make_like(c, 1), c->op->variant, 0, 1); }

/* x:uniform_(low, high), x:normal_(mean, std) */
moe_status moe_fwd_redraw(moe_ctx *c) {
  const moe_tensor *x = c->arg[0].t;
  double a = c->arg[1].f, b = c->arg[2].f;
  if (!isfinite(a) || !isfinite(b) || (c->op->variant ? b < 0 : b < a))
    return OP_FAIL(c, c->op->variant ? "wants a finite mean and a deviation >= 0, got %g, %g"
                                     : "wants finite bounds with low <= high, got %g, %g", a, b);
  return draw(c, moe_out(c, 0, x->ndim, x->shape, x->dtype), c->op->variant, a, b);
}

moe_status moe_fwd_randint(moe_ctx *c) {
  int64_t low = c->arg[0].i, high = c->arg[1].i;
  if (low > high) return OP_FAIL(c, "low = %lld is above high = %lld", (long long)low, (long long)high);
  moe_tensor *y = moe_make(c, c->arg[2].ints.n, c->arg[2].ints.v, (moe_dtype)c->arg[3].i, 3);
  moe_tensor *r = y == NULL || y->dtype == MOE_i64 ? y : moe_empty(y->ndim, y->shape, MOE_i64, moe_dev(y));
  if (r == NULL) return moe_error_code();
  int64_t n = moe_numel(y);
  if (n == 0) return MOE_OK;
  uint64_t span = (uint64_t)high - (uint64_t)low + 1;
  MOE_TRY(MOE_RUN(moe_dev(y), c->op->name, random_int, moe_data_i64(r), n, low, span, seed_now(), take(n, 2)));
  return r == y ? MOE_OK : moe_copy(y, r);
}

/* A permutation by Fisher and Yates, on the host: block first + i serves position i. Counts from c->base. */
moe_status moe_fwd_randperm(moe_ctx *c) {
  int64_t n = c->arg[0].i;
  moe_tensor *y = moe_make(c, 1, &n, (moe_dtype)c->arg[1].i, 1);
  moe_tensor *h = y ? moe_empty(1, &n, MOE_i64, moe_cpu()) : NULL;
  if (h == NULL) return moe_error_code();
  if (n == 0) return MOE_OK;
  int64_t *p = moe_data_i64(h);
  uint64_t seed = seed_now(), first = take(n, 4);
  for (int64_t i = 0; i < n; i++) p[i] = i + c->base;
  for (int64_t i = n - 1; i > 0; i--) {
    moe_philox4 w = moe_philox(seed, first + (uint64_t)i);
    int64_t j = (int64_t)((unsigned __int128)((uint64_t)w.v[0] << 32 | w.v[1]) * (uint64_t)(i + 1) >> 64);
    int64_t t = p[i];
    p[i] = p[j];
    p[j] = t;
  }
  return moe_copy(y, h);
}

moe_status moe_fwd_bernoulli(moe_ctx *c) {
  moe_tensor *p = c->arg[0].t;
  if (!moe_dtype_is_float(p->dtype)) return OP_FAIL(c, "p must be of a float type, got %s", moe_dtype_name(p->dtype));
  moe_dtype work = moe_dtype_compute(p->dtype);
  moe_tensor *y = moe_out(c, 0, p->ndim, p->shape, p->dtype), *in = moe_dense(p, work);
  if (y == NULL || in == NULL) return moe_error_code();
  moe_tensor *r = y->dtype == work && moe_is_contiguous(y) ? y : moe_empty(p->ndim, p->shape, work, moe_dev(p));
  if (r == NULL) return moe_error_code();
  int64_t n = moe_numel(p);
  if (n == 0) return MOE_OK;
  moe_status st = MOE_RUN(moe_dev(p), c->op->name, random_bernoulli, moe_data(r), moe_data(in), n, work, seed_now(), take(n, 1));
  if (st != MOE_OK) return moe_fail_prefix(c->op->name);
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_fwd_multinomial(moe_ctx *c) {
  moe_tensor *w = c->arg[0].t;
  int64_t k = c->arg[1].i;
  bool replacement = c->arg[2].i != 0;
  char text[MOE_SHAPE_TEXT];
  if (w->ndim < 1) return OP_FAIL(c, "probs must have at least one dimension [.., n], got a scalar");
  if (!moe_dtype_is_float(w->dtype)) return OP_FAIL(c, "probs must be of a float type, got %s", moe_dtype_name(w->dtype));
  int64_t n = w->shape[w->ndim - 1], shape[MOE_MAX_DIM], rows = 1;
  if (k < 0 || n == 0 || (!replacement && k > n))
    return OP_FAIL(c, "cannot draw num_samples = %lld of %lld without putting back (probs is %s)", (long long)k, (long long)n,
                   moe_shape_of(text, w));
  for (int i = 0; i < w->ndim; i++) shape[i] = w->shape[i];
  for (int i = 0; i + 1 < w->ndim; i++) rows *= shape[i];
  shape[w->ndim - 1] = k;
  moe_tensor *y = moe_out(c, 0, w->ndim, shape, MOE_i64), *in = moe_dense(w, MOE_f64);
  if (y == NULL || in == NULL) return moe_error_code();
  if (rows == 0 || k == 0) return MOE_OK;
  moe_status st = MOE_RUN(moe_dev(w), c->op->name, multinomial, moe_data_i64(y), moe_data_f64(in), rows, n, k, replacement,
                          seed_now(), take(rows * (replacement ? k : n), 2), c->base);
  return st == MOE_OK ? MOE_OK : moe_fail_prefix(c->op->name);
}

/* --- dropout: the mask is drawn again in the backward --- */

static moe_status apply(moe_ctx *c, double p, uint64_t seed, uint64_t block) {
  moe_tensor *x = c->arg[0].t;
  moe_dtype work = moe_dtype_compute(x->dtype);
  moe_tensor *y = moe_out(c, 0, x->ndim, x->shape, x->dtype), *in = moe_dense(x, work);
  if (y == NULL || in == NULL) return moe_error_code();
  moe_tensor *r = y->dtype == work ? y : moe_empty(x->ndim, x->shape, work, moe_dev(x));
  if (r == NULL) return moe_error_code();
  int64_t n = moe_numel(x);
  if (n > 0) MOE_TRY(MOE_RUN(moe_dev(x), c->op->name, dropout, moe_data(r), moe_data(in), n, work, p, seed, block));
  return r == y ? MOE_OK : moe_copy(y, r);
}

moe_status moe_fwd_dropout(moe_ctx *c) {
  moe_tensor *x = c->arg[0].t;
  double p = c->arg[1].f;
  if (!(p >= 0 && p <= 1)) return OP_FAIL(c, "p must lie in [0, 1], got %g", p);
  if (!moe_dtype_is_float(x->dtype)) return OP_FAIL(c, "x must be of a float type, got %s", moe_dtype_name(x->dtype));
  c->user[0] = c->arg[2].i != 0 && p > 0;
  if (!c->user[0]) return moe_set_out(c, 0, moe_detach(x));
  uint64_t seed = seed_now(), block = take(moe_numel(x), 1);
  c->user[1] = (int64_t)seed;
  c->user[2] = (int64_t)block;
  return apply(c, p, seed, block);
}

moe_status moe_bwd_dropout(moe_ctx *c) {
  c->gin[0] = c->user[0] ? MOE_CALL(dropout_mask, T(c->gout[0]), F(c->arg[1].f), I(c->user[1]), I(c->user[2])) : c->gout[0];
  return c->gin[0] ? MOE_OK : moe_error_code();
}

moe_status moe_fwd_dropout_mask(moe_ctx *c) {
  return apply(c, c->arg[1].f, (uint64_t)c->arg[2].i, (uint64_t)c->arg[3].i);
}

moe_status moe_bwd_dropout_mask(moe_ctx *c) {
  c->gin[0] = MOE_CALL(dropout_mask, T(c->gout[0]), c->arg[1], I(c->arg[2].i), I(c->arg[3].i));
  return c->gin[0] ? MOE_OK : moe_error_code();
}
