/* linear_attention: the family of linear recurrences (tensor/recurrence.h). */
#include <math.h>

#include "autograd/graph.h"
#include "op/arg.h"
#include "op/fold.h"
#include "op/product.h"
#include "tensor/recurrence.h"

enum { Q, K, V, DECAY, BETA, A, B, BONUS, INITIAL, CU, DELTA, SCALE, CHUNK }; /* arguments */
enum { TENSORS = CU + 1, SAVED_STATES = TENSORS };                             /* saved: the tensor arguments, states */

static const char *const names[] = {"q", "k", "v", "decay", "beta", "a", "b", "bonus", "initial_state", "cu_seqlens"};

/* The arguments as the kernel takes them, and what keeps them alive. */
typedef struct recurrence {
  moe_recurrence f;
  moe_tensor *t[TENSORS];
  int64_t batch, shared; /* shared: heads of q and k */
  int64_t states;        /* kept states: first[sequences] */
} recurrence;

static moe_status want_shape(moe_ctx *c, const moe_tensor *t, int i, int ndim, const int64_t *shape, const char *what) {
  bool fits = t->ndim == ndim;
  for (int d = 0; fits && d < ndim; d++) fits = t->shape[d] == shape[d];
  if (fits) return MOE_OK;
  char want[MOE_SHAPE_TEXT], got[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "%s must be %s = %s, got %s", names[i], what, moe_shape_text(want, ndim, shape), moe_shape_of(got, t));
}

static moe_status check_shapes(moe_ctx *c, moe_tensor *const *t) {
  char b0[MOE_SHAPE_TEXT], b1[MOE_SHAPE_TEXT], b2[MOE_SHAPE_TEXT];
  for (int i = Q; i < CU; i++) {
    if (t[i] == NULL) continue;
    MOE_TRY(moe_want_float(c, names[i], t[i]));
    if (i <= V && t[i]->ndim != 4)
      return OP_FAIL(c, "%s must be [batch, time, heads, width], got %s", names[i], moe_shape_of(b0, t[i]));
  }
  const int64_t *q = t[Q]->shape, *v = t[V]->shape;
  MOE_TRY(want_shape(c, t[K], K, 4, q, "as q"));
  if (q[0] != v[0] || q[1] != v[1])
    return OP_FAIL(c, "batch or time differ (dims 1 and 2): q is %s, k is %s, v is %s", moe_shape_of(b0, t[Q]),
                   moe_shape_of(b1, t[K]), moe_shape_of(b2, t[V]));
  if (q[2] == 0 ? v[2] != 0 : v[2] % q[2] != 0)
    return OP_FAIL(c, "v's heads must be a multiple of q's (dim 3): q is %s, v is %s", moe_shape_of(b0, t[Q]), moe_shape_of(b1, t[V]));
  int64_t wide[4] = {v[0], v[1], v[2], q[3]};
  if (t[DECAY] && t[DECAY]->ndim == 1)
    MOE_TRY(want_shape(c, t[DECAY], DECAY, 1, wide + 2, "[heads] (or [batch, time, heads] or [.., width of k])"));
  else if (t[DECAY])
    MOE_TRY(want_shape(c, t[DECAY], DECAY, t[DECAY]->ndim == 4 ? 4 : 3, wide, "[batch, time, heads] (or [heads] or [.., width of k])"));
  if (t[BETA]) MOE_TRY(want_shape(c, t[BETA], BETA, 3, wide, "[batch, time, heads]"));
  if (t[A]) MOE_TRY(want_shape(c, t[A], A, 4, q, "as k"));
  if (t[B]) MOE_TRY(want_shape(c, t[B], B, 4, q, "as k"));
  if ((t[A] == NULL) != (t[B] == NULL)) return OP_FAIL(c, "a and b come together: the state is read by a and written by b");
  if (t[A] && c->arg[DELTA].i) return OP_FAIL(c, "delta = true already reads by k: it cannot come with a and b");
  if (t[BONUS]) MOE_TRY(want_shape(c, t[BONUS], BONUS, 2, wide + 2, "[heads, width of k]"));
  if (t[BONUS] && c->arg[DELTA].i) return OP_FAIL(c, "bonus is for sums that are written as they come: it cannot go with delta = true");
  if (t[BONUS] && t[A]) return OP_FAIL(c, "bonus is for sums that are written as they come: it cannot go with a and b");
  if (c->arg[CHUNK].i < 1) return OP_FAIL(c, "chunk_size must be at least 1, got %lld", (long long)c->arg[CHUNK].i);
  return MOE_OK;
}

/* r->f.start and the number of sequences, from cu_seqlens: counts, the same numbers from C and from Lua. */
static moe_status read_lengths(moe_ctx *c, recurrence *r, moe_tensor *cu, int64_t time) {
  char got[MOE_SHAPE_TEXT];
  if (cu->ndim != 1 || cu->shape[0] < 1 || moe_dtype_is_float(cu->dtype))
    return OP_FAIL(c, "cu_seqlens must be integers [sequences + 1], got %s %s", moe_dtype_name(cu->dtype), moe_shape_of(got, cu));
  if (r->batch != 1)
    return OP_FAIL(c, "cu_seqlens packs sequences into a batch of 1, but the batch is %lld", (long long)r->batch);
  cu = r->t[CU] = moe_contiguous_raw(moe_to_raw(cu, MOE_i64, moe_cpu()));
  if (cu == NULL) return moe_error_code();
  const int64_t *at = moe_data_i64(cu);
  int64_t n = cu->shape[0] - 1;
  if (at[0] != 0 || at[n] != time)
    return OP_FAIL(c, "cu_seqlens must run from 0 to the %lld times of q, got %lld .. %lld", (long long)time, (long long)at[0],
                   (long long)at[n]);
  for (int64_t i = 0; i < n; i++)
    if (at[i] > at[i + 1])
      return OP_FAIL(c, "cu_seqlens must not fall: element %lld is %lld after %lld", (long long)i + 2, (long long)at[i + 1],
                     (long long)at[i]);
  r->f.start = at;
  r->f.sequences = n;
  return MOE_OK;
}

/* t: the tensor arguments, NULL where absent. */
static moe_status prepare(moe_ctx *c, recurrence *r, moe_tensor *const *t) {
  const int64_t *q = t[Q]->shape;
  int64_t heads = t[V]->shape[2];
  moe_dtype dt = moe_dtype_promote(t[Q]->dtype, moe_dtype_promote(t[K]->dtype, t[V]->dtype)), ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(t[Q]);
  *r = (recurrence){.batch = q[0], .shared = q[2]};
  r->f = (moe_recurrence){.dtype = ct, .sequences = q[0], .heads = heads, .group = q[2] ? heads / q[2] : 1, .dk = q[3],
                          .dv = t[V]->shape[3], .time = q[1], .wide = t[DECAY] && t[DECAY]->ndim == 4, .delta = c->arg[DELTA].i != 0,
                          .scale = c->arg[SCALE].kind == MOE_K_none ? 1 / sqrt((double)MOE_MAX(q[3], 1)) : c->arg[SCALE].f,
                          .chunk = c->arg[CHUNK].i};
  if (t[CU]) MOE_TRY(read_lengths(c, r, t[CU], q[1]));
  moe_row_list *list[] = {&r->f.q, &r->f.k, &r->f.v, &r->f.decay, &r->f.beta, &r->f.a, &r->f.b};
  for (int i = Q; i <= B; i++) {
    if (t[i] == NULL) continue;
    moe_tensor *x = moe_to_raw(t[i], ct, dev);
    if (x && x->ndim == 4 && i != DECAY && x->stride[3] != 1 && x->shape[3] != 1) x = moe_contiguous_raw(x);
    if (x == NULL) return moe_error_code();
    r->t[i] = x;
    list[i]->data = moe_data(x);
    if (x->ndim == 1)
      list[i]->stride[2] = x->stride[0];
    else
      for (int d = 0; d < x->ndim; d++) list[i]->stride[d] = x->stride[d];
  }
  if (t[BONUS]) {
    r->t[BONUS] = moe_dense(t[BONUS], ct);
    if (r->t[BONUS] == NULL) return moe_error_code();
    r->f.bonus = moe_data(r->t[BONUS]);
  }
  int64_t n = r->f.sequences;
  moe_tensor *first = moe_empty(1, (const int64_t[]){n + 1}, MOE_i64, moe_cpu());
  if (first == NULL) return moe_error_code();
  int64_t *at = moe_data_i64(first);
  at[0] = 0;
  for (int64_t s = 0; s < n; s++) {
    int64_t time = r->f.start ? r->f.start[s + 1] - r->f.start[s] : r->f.time;
    at[s + 1] = at[s] + time / r->f.chunk + (time % r->f.chunk != 0) + 1;
  }
  r->f.first = at;
  r->states = at[n];
  return MOE_OK;
}

#define DATA(t) ((t) ? moe_data(t) : NULL)

moe_status moe_fwd_linear_attention(moe_ctx *c) {
  moe_tensor *t[TENSORS];
  recurrence r;
  for (int i = 0; i < TENSORS; i++) t[i] = c->arg[i].kind == MOE_K_none ? NULL : c->arg[i].t;
  MOE_TRY(check_shapes(c, t));
  MOE_TRY(prepare(c, &r, t));
  const moe_recurrence *f = &r.f;
  moe_device *dev = moe_dev(t[Q]);
  int64_t state[4] = {f->sequences, f->heads, f->dk, f->dv}, kept[4] = {r.states, f->heads, f->dk, f->dv};
  moe_tensor *initial = t[INITIAL];
  if (initial) MOE_TRY(want_shape(c, initial, INITIAL, 4, state, "[sequences, heads, width of k, width of v]"));
  initial = initial ? moe_dense(initial, f->dtype) : NULL;
  moe_dtype dt = moe_dtype_promote(t[Q]->dtype, moe_dtype_promote(t[K]->dtype, t[V]->dtype));
  moe_tensor *o = moe_out(c, 0, 4, t[V]->shape, dt), *last = moe_out(c, 1, 4, state, f->dtype);
  moe_tensor *work = o == NULL || dt == f->dtype ? o : moe_empty(4, t[V]->shape, f->dtype, dev);
  moe_tensor *states = c->record ? moe_empty(4, kept, f->dtype, dev) : NULL;
  if (work == NULL || last == NULL || (c->record && states == NULL) || (t[INITIAL] && initial == NULL)) return moe_error_code();
  MOE_TRY(MOE_RUN(dev, c->op->name, recurrence, moe_data(work), moe_data(last), DATA(states), DATA(initial), f));
  for (int i = 0; i < TENSORS; i++) moe_save(c, t[i]);
  moe_save(c, states);
  return work == o ? MOE_OK : moe_copy(o, work);
}

/* The gradient of a tensor that `group` heads share, from that of every head [b, t, heads, d]. */
static moe_tensor *over_group(moe_tensor *g, int64_t shared, int64_t group) {
  if (group == 1) return g;
  int64_t shape[5] = {g->shape[0], g->shape[1], shared, group, g->shape[3]};
  return MOE_CALL(sum, T(moe_reshaped(g, 5, shape)), DIM1(3));
}

moe_status moe_bwd_linear_attention(moe_ctx *c) {
  MOE_TRY(moe_first_derivative_only(c));
  moe_tensor **t = c->saved, *states = c->saved[SAVED_STATES], *g[TENSORS] = {NULL};
  recurrence r;
  MOE_TRY(prepare(c, &r, t));
  const moe_recurrence *f = &r.f;
  moe_device *dev = moe_dev(t[Q]);
  moe_dtype ct = f->dtype;
  int64_t B_ = r.batch, time = f->time, H = f->heads;
  int64_t rows_k[4] = {B_, time, H, f->dk}, rows_v[4] = {B_, time, H, f->dv}, rows_1[3] = {B_, time, H};
  int64_t bonus[3] = {f->sequences, H, f->dk}, state[4] = {f->sequences, H, f->dk, f->dv};
  bool need[TENSORS] = {false};
  for (int i = 0, at = 0; i < TENSORS; i++)
    if (t[i]) need[i] = c->need[at++];
  const bool has[TENSORS] = {[Q] = true, [K] = true, [V] = true, [DECAY] = need[DECAY], [BETA] = need[BETA], [A] = t[A] != NULL,
                             [B] = t[B] != NULL, [BONUS] = t[BONUS] != NULL};
  for (int i = Q; i <= BONUS; i++) {
    if (!has[i]) continue;
    if (i == BONUS) g[i] = moe_empty(3, bonus, ct, dev);
    else if (i == V) g[i] = moe_empty(4, rows_v, ct, dev);
    else if (i == BETA || (i == DECAY && !f->wide)) g[i] = moe_empty(3, rows_1, ct, dev);
    else g[i] = moe_empty(4, rows_k, ct, dev);
    if (g[i] == NULL) return moe_error_code();
  }
  /* the state's gradient is written over: a copy of one's own */
  g[INITIAL] = moe_zeros(4, state, ct, dev);
  moe_tensor *go = c->gout[0] ? moe_dense(c->gout[0], ct) : moe_zeros(4, rows_v, ct, dev);
  if (g[INITIAL] == NULL || go == NULL) return moe_error_code();
  if (c->gout[1]) MOE_TRY(moe_copy(g[INITIAL], c->gout[1]));
  moe_recurrence_grad grad = {.q = moe_data(g[Q]), .k = moe_data(g[K]), .v = moe_data(g[V]), .a = DATA(g[A]), .b = DATA(g[B]),
                              .decay = DATA(g[DECAY]), .beta = DATA(g[BETA]), .bonus = DATA(g[BONUS]), .state = moe_data(g[INITIAL])};
  MOE_TRY(MOE_RUN(dev, c->op->name, recurrence_backward, &grad, moe_data(go), moe_data(states), f));
  const int shared[] = {Q, K, A, B};
  for (int i = 0; i < 4; i++)
    if (g[shared[i]] && need[shared[i]]) g[shared[i]] = over_group(g[shared[i]], r.shared, f->group);
  for (int i = 0, at = 0; i < TENSORS; i++) {
    if (t[i] == NULL) continue;
    if (need[i]) {
      c->gin[at] = moe_unbroadcast(g[i], &c->in[at]);
      if (c->gin[at] == NULL) return moe_error_code();
    }
    at++;
  }
  return MOE_OK;
}

/* --- ssd: the recurrence of one decay a head, with the steps of Mamba-2 around it --- */

enum { X, DT, SA, SB, SC, D, Z, DT_BIAS, S_INITIAL, S_CU, SOFTPLUS, S_CHUNK }; /* arguments */

static moe_status ssd_shapes(moe_ctx *c, moe_tensor *const *t) {
  static const char *const own[] = {"x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"};
  char want[MOE_SHAPE_TEXT], got[MOE_SHAPE_TEXT];
  for (int i = X; i <= S_INITIAL; i++)
    if (t[i]) MOE_TRY(moe_want_float(c, own[i], t[i]));
  if (t[X]->ndim != 4) return OP_FAIL(c, "x must be [batch, time, heads, width], got %s", moe_shape_of(got, t[X]));
  const int64_t *x = t[X]->shape;
  if (t[SB]->ndim != 4 || t[SB]->shape[2] < 1 || x[2] % t[SB]->shape[2] != 0)
    return OP_FAIL(c, "B must be [batch, time, groups, states], groups dividing the %lld heads of x, got %s", (long long)x[2],
                   moe_shape_of(got, t[SB]));
  int64_t bc[4] = {x[0], x[1], t[SB]->shape[2], t[SB]->shape[3]};
  int64_t state[4] = {t[S_CU] && t[S_INITIAL] && t[S_INITIAL]->ndim > 0 ? t[S_INITIAL]->shape[0] : x[0], x[2], bc[3], x[3]};
  const struct {
    int i, ndim;
    const int64_t *shape;
  } rows[] = {{DT, 3, x}, {SA, 1, x + 2}, {SB, 4, bc}, {SC, 4, bc}, {D, t[D] && t[D]->ndim == 2 ? 2 : 1, x + 2}, {Z, 4, x},
              {DT_BIAS, 1, x + 2}, {S_INITIAL, 4, state}};
  for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
    const moe_tensor *a = t[rows[r].i];
    bool fits = a == NULL || a->ndim == rows[r].ndim;
    for (int d = 0; a && fits && d < a->ndim; d++) fits = a->shape[d] == rows[r].shape[d];
    if (!fits)
      return OP_FAIL(c, "%s must be %s (x is %s), got %s", own[rows[r].i], moe_shape_text(want, rows[r].ndim, rows[r].shape),
                     moe_shape_of(((char[MOE_SHAPE_TEXT]){0}), t[X]), moe_shape_of(got, a));
  }
  return MOE_OK;
}

moe_status moe_fwd_ssd(moe_ctx *c) {
  moe_tensor *t[S_CU + 1], *out[2];
  for (int i = 0; i <= S_CU; i++) t[i] = c->arg[i].kind == MOE_K_none ? NULL : c->arg[i].t;
  MOE_TRY(ssd_shapes(c, t));
  moe_tensor *step = t[DT];
  if (t[DT_BIAS]) step = MOE_CALL(add, T(step), T(t[DT_BIAS]));
  if (c->arg[SOFTPLUS].i) step = MOE_CALL(softplus, T(step));
  moe_tensor *decay = MOE_CALL(mul, T(step), T(t[SA]));
  if (decay == NULL) return moe_error_code();
  MOE_TRY(MOE_CALLN(out, linear_attention, T(t[SC]), T(t[SB]), T(t[X]), T(decay), T(step), NIL, NIL, NIL, c->arg[S_INITIAL], c->arg[S_CU],
                    I(false), F(1), c->arg[S_CHUNK]));
  moe_tensor *y = out[0];
  if (t[D]) {
    moe_tensor *skip = t[D]->ndim == 2 ? t[D] : MOE_CALL(unsqueeze, T(t[D]), I(-1));
    y = MOE_CALL(add, T(y), T(MOE_CALL(mul, T(t[X]), T(skip))));
  }
  if (t[Z]) y = MOE_CALL(mul, T(y), T(MOE_CALL(silu, T(t[Z]))));
  if (y == NULL) return moe_error_code();
  MOE_TRY(moe_set_out(c, 0, y));
  return moe_set_out(c, 1, out[1]);
}
