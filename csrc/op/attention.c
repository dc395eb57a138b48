/* attention(q, k, v): softmax(scale q k^T + mask) v, without the matrix of weights. */
#include <math.h>

#include "autograd/graph.h"
#include "op/product.h"

enum { Q, K, V, MASK, CAUSAL, SCALE, SEEN };         /* arguments */
enum { SAVED_Y = MASK + 1, SAVED_LSE, SAVED_SEEN };  /* saved: q, k, v, mask, y, lse, seen */
enum { NO_MASK, MAY_ATTEND, ADDED };         /* the kernel's kinds of mask */

moe_tensor *moe_heads_like(const moe_tensor *like, const int64_t *shape, moe_dtype dt) {
  if (like->stride[2] <= like->stride[1]) return moe_empty(4, shape, dt, moe_dev(like));
  moe_tensor *t = moe_empty(4, (const int64_t[]){shape[0], shape[2], shape[1], shape[3]}, dt, moe_dev(like));
  if (t == NULL) return NULL;
  int64_t stride[4] = {t->stride[0], t->stride[2], t->stride[1], t->stride[3]};
  return moe_view_of(t, 4, shape, stride, t->offset);
}

/* Of type dt, with contiguous rows that do not overlap. */
static moe_tensor *with_rows(moe_tensor *t, moe_dtype dt) {
  t = t ? moe_to_raw(t, dt, moe_dev(t)) : NULL;
  if (t == NULL) return NULL;
  bool fine = (t->stride[3] == 1 || t->shape[3] == 1) && (t->stride[2] >= t->shape[3] || t->shape[2] == 1);
  return fine ? t : moe_contiguous_raw(t);
}

static void mask_strides(const moe_tensor *mask, int64_t *stride) {
  for (int i = 0; i < 4; i++) {
    int d = i - (4 - mask->ndim);
    stride[i] = d < 0 || mask->shape[d] == 1 ? 0 : mask->stride[d];
  }
}

static moe_status check_shapes(moe_ctx *c, const moe_tensor *q, const moe_tensor *k, const moe_tensor *v, const moe_tensor *mask) {
  char bq[MOE_SHAPE_TEXT], bk[MOE_SHAPE_TEXT], bv[MOE_SHAPE_TEXT];
  const moe_tensor *all[] = {q, k, v};
  const char *names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; i++) {
    MOE_TRY(moe_want_float(c, names[i], all[i]));
    if (all[i]->ndim != 4)
      return OP_FAIL(c, "%s must be [batch, heads, positions, size], got %s", names[i], moe_shape_of(bq, all[i]));
  }
  moe_shape_of(bq, q), moe_shape_of(bk, k), moe_shape_of(bv, v);
  if (q->shape[0] != k->shape[0] || q->shape[0] != v->shape[0])
    return OP_FAIL(c, "batch sizes differ (dim 1): q is %s, k is %s, v is %s", bq, bk, bv);
  if (k->shape[1] != v->shape[1] || k->shape[2] != v->shape[2])
    return OP_FAIL(c, "k and v differ in heads or positions (dims 2 and 3): k is %s, v is %s", bk, bv);
  if (q->shape[3] != k->shape[3])
    return OP_FAIL(c, "q and k differ in size (dim 4): q is %s, k is %s", bq, bk);
  if (k->shape[1] == 0 ? q->shape[1] != 0 : q->shape[1] % k->shape[1] != 0)
    return OP_FAIL(c, "q's heads must be a multiple of k's (dim 2): q is %s, k is %s", bq, bk);
  if (mask == NULL) return MOE_OK;
  if (mask->dtype != MOE_bool && !moe_dtype_is_float(mask->dtype))
    return OP_FAIL(c, "mask must be bool (true: may attend) or floating point (added to the scores), got %s",
                   moe_dtype_name(mask->dtype));
  int64_t to[4] = {q->shape[0], q->shape[1], q->shape[2], k->shape[2]};
  bool fits = mask->ndim <= 4;
  for (int d = 0; fits && d < mask->ndim; d++) {
    int64_t n = mask->shape[d];
    fits = n == 1 || n == to[d + 4 - mask->ndim];
  }
  if (fits) return MOE_OK;
  return OP_FAIL(c, "mask is %s, which does not broadcast to [batch, heads, queries, keys] = %s", moe_shape_of(bv, mask),
                 moe_shape_text(bq, 4, to));
}

/* *seen as the kernel takes it: i64 [b, h, t], dense. */
static moe_status prepare_seen(moe_ctx *c, moe_tensor **seen, int64_t b, int64_t h, int64_t t) {
  *seen = c->arg[SEEN].kind == MOE_K_none ? NULL : c->arg[SEEN].t;
  if (*seen == NULL) return MOE_OK;
  const moe_tensor *s = *seen;
  if (s->dtype != MOE_i64 || s->ndim != 3 || s->shape[0] != b || s->shape[1] != h || s->shape[2] != t) {
    char got[MOE_SHAPE_TEXT];
    return OP_FAIL(c, "seen must be i64 [batch, heads, queries] = [%lld, %lld, %lld], got %s %s", (long long)b, (long long)h,
                   (long long)t, moe_dtype_name(s->dtype), moe_shape_of(got, s));
  }
  *seen = moe_contiguous_raw(*seen);
  return *seen ? MOE_OK : moe_error_code();
}

static double scale_of(const moe_ctx *c, int64_t d) {
  return c->arg[SCALE].kind == MOE_K_none ? 1 / sqrt((double)MOE_MAX(d, 1)) : c->arg[SCALE].f;
}

/* The mask as the kernel takes it. */
static moe_status prepare_mask(moe_tensor **mask, moe_dtype ct, int64_t *stride, int *kind) {
  *kind = NO_MASK;
  for (int i = 0; i < 4; i++) stride[i] = 0;
  if (*mask == NULL) return MOE_OK;
  *kind = (*mask)->dtype == MOE_bool ? MAY_ATTEND : ADDED;
  if (*kind == ADDED) *mask = moe_to_raw(*mask, ct, moe_dev(*mask));
  if (*mask == NULL) return moe_error_code();
  mask_strides(*mask, stride);
  return MOE_OK;
}

moe_status moe_fwd_attention(moe_ctx *c) {
  moe_tensor *q = c->arg[Q].t, *k = c->arg[K].t, *v = c->arg[V].t;
  moe_tensor *mask = c->arg[MASK].kind == MOE_K_none ? NULL : c->arg[MASK].t;
  MOE_TRY(check_shapes(c, q, k, v, mask));
  int64_t b = q->shape[0], h = q->shape[1], t = q->shape[2], s = k->shape[2], d = q->shape[3], dv = v->shape[3];
  int64_t shape[4] = {b, h, t, dv}, size[7] = {b, h, k->shape[1], t, s, d, dv}, sm[4];
  moe_dtype dt = moe_dtype_promote(q->dtype, moe_dtype_promote(k->dtype, v->dtype)), ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(q);
  moe_save(c, q);
  moe_save(c, k);
  moe_save(c, v);
  moe_save(c, mask);
  int kind;
  moe_tensor *seen;
  MOE_TRY(prepare_seen(c, &seen, b, h, t));
  q = with_rows(q, ct);
  k = with_rows(k, ct);
  v = with_rows(v, ct);
  MOE_TRY(prepare_mask(&mask, ct, sm, &kind));
  moe_tensor *y = q ? moe_heads_like(q, shape, ct) : NULL;
  moe_tensor *lse = c->record && y ? moe_empty(3, shape, ct, dev) : NULL;
  if (y == NULL || k == NULL || v == NULL || (c->record && lse == NULL)) return moe_error_code();
  if (moe_numel(y) > 0 || (lse && moe_numel(lse) > 0))
    MOE_TRY(MOE_RUN(dev, c->op->name, attention, ct, moe_data(y), lse ? moe_data(lse) : NULL, moe_data(q), moe_data(k), moe_data(v),
                    mask ? moe_data(mask) : NULL, size, y->stride, q->stride, k->stride, v->stride, sm, kind,
                    c->arg[CAUSAL].i != 0, seen ? moe_data(seen) : NULL, scale_of(c, d)));
  if (ct != dt) {
    moe_tensor *r = moe_to_raw(y, dt, dev);
    if (r == NULL) return moe_error_code();
    y = r;
  }
  MOE_TRY(moe_set_out(c, 0, y));
  moe_save(c, y);
  moe_save(c, lse);
  moe_save(c, seen);
  return MOE_OK;
}

moe_status moe_bwd_attention(moe_ctx *c) {
  if (moe_grad_enabled()) return OP_FAIL(c, "has no second derivative; compose it of matmul and softmax where one is wanted");
  moe_tensor *q = c->saved[Q], *k = c->saved[K], *v = c->saved[V], *mask = c->saved[MASK];
  moe_tensor *y = c->saved[SAVED_Y], *lse = c->saved[SAVED_LSE], *seen = c->saved[SAVED_SEEN];
  int64_t b = q->shape[0], h = q->shape[1], t = q->shape[2], s = k->shape[2], d = q->shape[3], dv = v->shape[3];
  int64_t size[7] = {b, h, k->shape[1], t, s, d, dv}, sm[4];
  moe_dtype ct = lse->dtype;
  moe_device *dev = moe_dev(q);
  int kind;
  bool need_mask = mask != NULL && c->nin > MASK && c->need[MASK];
  q = with_rows(q, ct);
  k = with_rows(k, ct);
  v = with_rows(v, ct);
  y = with_rows(y, ct);
  moe_tensor *g = with_rows(c->gout[0], ct);
  MOE_TRY(prepare_mask(&mask, ct, sm, &kind));
  if (q == NULL || k == NULL || v == NULL || y == NULL || g == NULL) return moe_error_code();
  moe_tensor *dq  = moe_heads_like(q, q->shape, ct), *dk  = moe_heads_like(k, k->shape, ct), *dvalue  = moe_heads_like(v, v->shape, ct);
  moe_tensor *dmask = need_mask ? moe_zeros(4, (const int64_t[]){b, h, t, s}, ct, dev) : NULL;
  if (dq == NULL || dk == NULL || dvalue == NULL || (need_mask && dmask == NULL)) return moe_error_code();
  if (b > 0 && h > 0)
    MOE_TRY(MOE_RUN(dev, c->op->name, attention_backward, ct, moe_data(dq), moe_data(dk), moe_data(dvalue), dmask ? moe_data(dmask) : NULL,
                    moe_data(g), moe_data(y), moe_data(lse), moe_data(q), moe_data(k), moe_data(v), mask ? moe_data(mask) : NULL, size,
                    dq->stride, dk->stride, dvalue->stride, g->stride, y->stride, q->stride, k->stride, v->stride, sm, kind,
                    c->arg[CAUSAL].i != 0, seen ? moe_data(seen) : NULL, scale_of(c, d)));
  moe_tensor *grads[] = {dq, dk, dvalue, dmask};
  for (int i = 0; i < c->nin && i < 4; i++) {
    if (!c->need[i]) continue;
    c->gin[i] = moe_unbroadcast(grads[i], &c->in[i]);
    if (c->gin[i] == NULL) return moe_error_code();
  }
  return MOE_OK;
}
