/* attention(q, k, v): softmax(scale q k^T + mask) v, without the matrix of weights. */
#include <math.h>

#include "autograd/graph.h"
#include "op/product.h"

enum { Q, K, V, MASK, CAUSAL, SCALE, SEEN, WINDOW, RELATIVE, PACKED, PACKED_K }; /* arguments */
enum { S_Q, S_K, S_V, S_MASK, S_RELATIVE, S_SPAN, S_SEEN, S_Y, S_LSE };          /* saved */

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

static moe_tensor *given(const moe_ctx *c, int i) { return c->arg[i].kind == MOE_K_none ? NULL : c->arg[i].t; }

/* --- which keys a query may see --- */

/* Cumulative lengths: n + 1 numbers that rise from 0 to `total`. They are counts, the same from C and from Lua. */
static moe_tensor *boundaries(moe_ctx *c, const char *name, moe_tensor *t, int64_t total, const char *of) {
  char got[MOE_SHAPE_TEXT];
  if (t->ndim != 1 || t->shape[0] < 1 || moe_dtype_is_float(t->dtype) || t->dtype == MOE_bool) {
    OP_FAIL(c, "%s must be integers [sequences + 1], got %s %s", name, moe_dtype_name(t->dtype), moe_shape_of(got, t));
    return NULL;
  }
  t = moe_contiguous_raw(moe_to_raw(t, MOE_i64, moe_cpu()));
  if (t == NULL) return NULL;
  const int64_t *at = moe_data_i64(t);
  for (int64_t i = 0, n = t->shape[0]; i < n; i++) {
    if (at[i] >= (i > 0 ? at[i - 1] : 0) && (i > 0 || at[i] == 0) && (i < n - 1 || at[i] == total)) continue;
    OP_FAIL(c, "%s must rise from 0 to the %lld positions of %s, but its element %lld is %lld", name, (long long)total, of,
            (long long)i + 1, (long long)at[i]);
    return NULL;
  }
  return t;
}

/* The spans of all queries as i64 [t, 3]. Queries and keys of a sequence end together. */
static moe_tensor *spans(moe_ctx *c, int64_t t, int64_t s) {
  moe_tensor *pq = given(c, PACKED), *pk = given(c, PACKED_K);
  const int64_t whole_q[2] = {0, t}, whole_k[2] = {0, s}, *at = whole_q, *key = whole_k;
  int64_t window = c->arg[WINDOW].kind == MOE_K_none ? INT64_MAX / 4 : MOE_MIN(c->arg[WINDOW].i, INT64_MAX / 4);
  bool causal = c->arg[CAUSAL].i != 0;
  if (window < 1) {
    OP_FAIL(c, "window must be at least 1 (a position sees itself), got %lld", (long long)window);
    return NULL;
  }
  if (pk && !pq) {
    OP_FAIL(c, "cu_seqlens_k wants cu_seqlens beside it");
    return NULL;
  }
  if (pq && !pk && t != s) {
    OP_FAIL(c, "cu_seqlens holds for q and k alike, but q has %lld positions and k has %lld: give cu_seqlens_k", (long long)t,
            (long long)s);
    return NULL;
  }
  if (pq && (pq = boundaries(c, "cu_seqlens", pq, t, "q")) == NULL) return NULL;
  if (pk && (pk = boundaries(c, "cu_seqlens_k", pk, s, "k")) == NULL) return NULL;
  if (pq && pk && pq->shape[0] != pk->shape[0]) {
    OP_FAIL(c, "cu_seqlens and cu_seqlens_k must be of the same length, got %lld and %lld", (long long)pq->shape[0],
            (long long)pk->shape[0]);
    return NULL;
  }
  if (pq) at = key = moe_data_i64(pq);
  if (pk) key = moe_data_i64(pk);
  moe_tensor *out = moe_empty(2, (const int64_t[]){t, 3}, MOE_i64, moe_cpu());
  if (out == NULL) return NULL;
  moe_attention_span *span = moe_data(out);
  for (int64_t i = 0, seq = 0; i < t; i++) {
    while (i >= at[seq + 1]) seq++;
    int64_t here = key[seq + 1] - at[seq + 1] + i, to = causal ? MOE_MIN(here + 1, key[seq + 1]) : key[seq + 1];
    span[i].from = MOE_MAX(key[seq], here - window + 1);
    span[i].to = MOE_MAX(MOE_MIN(to, here + window), span[i].from);
    span[i].at = here;
  }
  return moe_to_raw(out, MOE_i64, moe_dev(c->arg[Q].t));
}

/* *relative as the kernel takes it: [h or 1, entries] dense. */
static moe_status prepare_relative(moe_ctx *c, moe_tensor **relative, int64_t h, moe_dtype ct, moe_attention *a) {
  moe_tensor *r = *relative;
  if (r == NULL) return MOE_OK;
  char got[MOE_SHAPE_TEXT];
  bool fits = moe_dtype_is_float(r->dtype) && (r->ndim == 1 || (r->ndim == 2 && (r->shape[0] == h || r->shape[0] == 1)));
  if (!fits || r->shape[r->ndim - 1] % 2 == 0)
    return OP_FAIL(c, "relative must be floats [heads or 1, 2 n - 1] (the middle: a key at the query's position), got %s %s",
                   moe_dtype_name(r->dtype), moe_shape_of(got, r));
  *relative = r = moe_dense(r, ct);
  if (r == NULL) return moe_error_code();
  int64_t entries = r->shape[r->ndim - 1];
  a->relative = moe_data(r);
  a->reach = (entries + 1) / 2;
  a->srelative = r->ndim == 2 && r->shape[0] > 1 ? entries : 0;
  return MOE_OK;
}

/* What both directions tell the kernel; tensors are brought into its form. y: NULL in the forward, before it is made. */
typedef struct operands {
  moe_tensor *q, *k, *v, *mask, *relative, *span, *seen;
  int64_t sm[4];
} operands;

static moe_status prepare(moe_ctx *c, operands *o, moe_dtype ct, moe_attention *a) {
  const moe_tensor *q = o->q, *k = o->k, *v = o->v;
  int64_t d = q->shape[3];
  *a = (moe_attention){.dtype = ct, .b = q->shape[0], .h = q->shape[1], .hk = k->shape[1], .t = q->shape[2], .s = k->shape[2],
                       .d = d, .dv = v->shape[3], .reach = 1, .sm = o->sm,
                       .scale = c->arg[SCALE].kind == MOE_K_none ? 1 / sqrt((double)MOE_MAX(d, 1)) : c->arg[SCALE].f};
  o->q = with_rows(o->q, ct);
  o->k = with_rows(o->k, ct);
  o->v = with_rows(o->v, ct);
  if (o->q == NULL || o->k == NULL || o->v == NULL || o->span == NULL) return moe_error_code();
  a->q = moe_data(o->q), a->k = moe_data(o->k), a->v = moe_data(o->v);
  a->sq = o->q->stride, a->sk = o->k->stride, a->sv = o->v->stride;
  a->span = (const moe_attention_span *)moe_data(o->span);
  a->seen = o->seen ? moe_data_i64(o->seen) : NULL;
  if (o->mask) {
    a->mask_kind = o->mask->dtype == MOE_bool ? MOE_MASK_MAY_ATTEND : MOE_MASK_ADDED;
    if (a->mask_kind == MOE_MASK_ADDED) o->mask = moe_to_raw(o->mask, ct, moe_dev(o->mask));
    if (o->mask == NULL) return moe_error_code();
    mask_strides(o->mask, o->sm);
    a->mask = moe_data(o->mask);
  }
  return prepare_relative(c, &o->relative, a->h, ct, a);
}

moe_status moe_fwd_attention(moe_ctx *c) {
  operands o = {.q = c->arg[Q].t, .k = c->arg[K].t, .v = c->arg[V].t, .mask = given(c, MASK), .relative = given(c, RELATIVE)};
  MOE_TRY(check_shapes(c, o.q, o.k, o.v, o.mask));
  int64_t b = o.q->shape[0], h = o.q->shape[1], t = o.q->shape[2], shape[4] = {b, h, t, o.v->shape[3]};
  moe_dtype dt = moe_dtype_promote(o.q->dtype, moe_dtype_promote(o.k->dtype, o.v->dtype)), ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(o.q);
  moe_attention a;
  MOE_TRY(prepare_seen(c, &o.seen, b, h, t));
  o.span = spans(c, t, o.k->shape[2]);
  moe_save(c, o.q);
  moe_save(c, o.k);
  moe_save(c, o.v);
  moe_save(c, o.mask);
  moe_save(c, o.relative);
  moe_save(c, o.span);
  moe_save(c, o.seen);
  MOE_TRY(prepare(c, &o, ct, &a));
  moe_tensor *y = moe_heads_like(o.q, shape, ct), *lse = c->record ? moe_empty(3, shape, ct, dev) : NULL;
  if (y == NULL || (c->record && lse == NULL)) return moe_error_code();
  a.y = moe_data(y), a.sy = y->stride, a.lse = lse ? moe_data(lse) : NULL;
  if (moe_numel(y) > 0 || (lse && moe_numel(lse) > 0)) MOE_TRY(MOE_RUN(dev, c->op->name, attention, &a));
  if (ct != dt) {
    moe_tensor *r = moe_to_raw(y, dt, dev);
    if (r == NULL) return moe_error_code();
    y = r;
  }
  MOE_TRY(moe_set_out(c, 0, y));
  moe_save(c, y);
  moe_save(c, lse);
  return MOE_OK;
}

/* The place of a tensor argument among the inputs when its gradient is wanted, else -1. */
static int wanted(const moe_ctx *c, int arg) {
  if (c->arg[arg].kind == MOE_K_none) return -1;
  int at = c->slot[arg];
  return at < c->nin && c->need[at] ? at : -1;
}

moe_status moe_bwd_attention(moe_ctx *c) {
  if (moe_grad_enabled()) return OP_FAIL(c, "has no second derivative; compose it of matmul and softmax where one is wanted");
  operands o = {.q = c->saved[S_Q], .k = c->saved[S_K], .v = c->saved[S_V], .mask = c->saved[S_MASK],
                .relative = c->saved[S_RELATIVE], .span = c->saved[S_SPAN], .seen = c->saved[S_SEEN]};
  moe_tensor *lse = c->saved[S_LSE];
  moe_dtype ct = lse->dtype;
  moe_device *dev = moe_dev(o.q);
  moe_attention a;
  MOE_TRY(prepare(c, &o, ct, &a));
  moe_tensor *y = with_rows(c->saved[S_Y], ct), *g = with_rows(c->gout[0], ct);
  if (y == NULL || g == NULL) return moe_error_code();
  moe_tensor *grad[5] = {moe_heads_like(o.q, o.q->shape, ct), moe_heads_like(o.k, o.k->shape, ct), moe_heads_like(o.v, o.v->shape, ct)};
  if (wanted(c, MASK) >= 0) grad[3] = moe_zeros(4, (const int64_t[]){a.b, a.h, a.t, a.s}, ct, dev);
  if (wanted(c, RELATIVE) >= 0) grad[4] = moe_zeros(2, (const int64_t[]){a.h, 2 * a.reach - 1}, ct, dev);
  static const int argument[5] = {Q, K, V, MASK, RELATIVE};
  for (int i = 0; i < 5; i++)
    if ((i < 3 || wanted(c, argument[i]) >= 0) && grad[i] == NULL) return moe_error_code();
  a.y = moe_data(y), a.sy = y->stride, a.lse = moe_data(lse);
  moe_attention_grads r = {.g = moe_data(g), .sg = g->stride, .dq = moe_data(grad[0]), .dk = moe_data(grad[1]), .dv = moe_data(grad[2]),
                           .dmask = grad[3] ? moe_data(grad[3]) : NULL, .drelative = grad[4] ? moe_data(grad[4]) : NULL,
                           .sdq = grad[0]->stride, .sdk = grad[1]->stride, .sdv = grad[2]->stride};
  if (a.b > 0 && a.h > 0) MOE_TRY(MOE_RUN(dev, c->op->name, attention_backward, &r, &a));
  for (int i = 0; i < 5; i++) {
    int at = wanted(c, argument[i]);
    if (at < 0) continue;
    c->gin[at] = moe_unbroadcast(grad[i], &c->in[at]);
    if (c->gin[at] == NULL) return moe_error_code();
  }
  return MOE_OK;
}
