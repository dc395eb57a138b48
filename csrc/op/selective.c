/* selective_scan: the recurrence of Mamba. What it computes: tensor/selective.h. */
#include <stdlib.h>

#include "autograd/graph.h"
#include "op/arg.h"
#include "tensor/selective.h"

enum { U, DELTA, A, B, C, D, Z, BIAS, SOFTPLUS, STATE, PACKED };
enum { KEPT = STATE + 1, START, CHUNK }; /* among the saved: the tensors by their argument (SOFTPLUS stays empty), then these */

static moe_status want(moe_ctx *c, const char *name, const moe_tensor *t, int ndim, const int64_t *shape) {
  bool ok = t->ndim == ndim;
  for (int d = 0; ok && d < ndim; d++) ok = t->shape[d] == shape[d];
  if (ok && moe_dtype_is_float(t->dtype)) return MOE_OK;
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  return OP_FAIL(c, "%s is a %s tensor %s, wanted floats %s", name, moe_dtype_name(t->dtype), moe_shape_of(a, t),
                 moe_shape_text(b, ndim, shape));
}

/* Where sequences begin, from cu_seqlens (numbers from 0 to the total) or, without it, `batch` of length `time`; and
** the chunks before each: two tensors [sequences + 1]. */
static moe_status boundaries(moe_ctx *c, moe_tensor *packed, int64_t batch, int64_t time, moe_tensor **start,
                             moe_tensor **chunk) {
  int64_t n = packed ? moe_numel(packed) : batch + 1;
  char s[MOE_SHAPE_TEXT];
  if (packed && (packed->ndim != 1 || n < 1 || moe_dtype_is_float(packed->dtype) || packed->dtype == MOE_bool))
    return OP_FAIL(c, "cu_seqlens is a %s tensor %s, wanted integers [sequences + 1]", moe_dtype_name(packed->dtype),
                   moe_shape_of(s, packed));
  if (packed && batch != 1)
    return OP_FAIL(c, "cu_seqlens packs sequences into a batch of 1, but u has a batch of %lld", (long long)batch);
  *start = moe_empty(1, &n, MOE_i64, moe_dev(c->arg[U].t));
  *chunk = moe_empty(1, &n, MOE_i64, moe_dev(c->arg[U].t));
  int64_t *at = malloc((size_t)(2 * n) * sizeof *at), *before = at + n;
  if (*start == NULL || *chunk == NULL || at == NULL) {
    free(at);
    return moe_fail(MOE_ENOMEM, "out of memory for the boundaries of a scan");
  }
  moe_status st = packed ? moe_read(packed, at, MOE_i64) : MOE_OK;
  before[0] = 0;
  for (int64_t i = 0; st == MOE_OK && i < n; i++) {
    if (!packed) at[i] = i * time;
    bool bad = packed && (at[i] < (i > 0 ? at[i - 1] : 0) || (i == 0 && at[i] != 0) || (i == n - 1 && at[i] != time));
    if (bad)
      st = OP_FAIL(c, "cu_seqlens must rise from 0 to the %lld positions of u, but its element %lld is %lld", (long long)time,
                   (long long)i + 1, (long long)at[i]);
    else if (i > 0)
      before[i] = before[i - 1] + (at[i] - at[i - 1] + MOE_SCAN_CHUNK - 1) / MOE_SCAN_CHUNK;
  }
  if (st == MOE_OK) st = moe_write(*start, at, MOE_i64);
  if (st == MOE_OK) st = moe_write(*chunk, before, MOE_i64);
  free(at);
  return st;
}

static void *data(moe_tensor *t) { return t ? moe_data(t) : NULL; }

/* The kernel's view of dense tensors t, by argument. */
static void fill(moe_selective *s, moe_tensor *const *t, moe_tensor *start, moe_tensor *chunk, moe_dtype ct, bool softplus) {
  int64_t groups = t[B]->shape[t[B]->ndim - 2];
  *s = (moe_selective){.dtype = ct,
                  .rows = t[U]->shape[0] * t[U]->shape[1],
                  .sequences = moe_numel(start) - 1,
                  .channels = t[U]->shape[2],
                  .states = t[A]->shape[1],
                  .groups = groups,
                  .softplus = softplus,
                  .start = moe_data(start),
                  .chunk = moe_data(chunk),
                  .u = data(t[U]),
                  .delta = data(t[DELTA]),
                  .z = data(t[Z]),
                  .a = data(t[A]),
                  .b = data(t[B]),
                  .c = data(t[C]),
                  .d = data(t[D]),
                  .bias = data(t[BIAS]),
                  .state = data(t[STATE])};
}

moe_status moe_fwd_selective_scan(moe_ctx *c) {
  static const char *const names[] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "", "state"};
  moe_tensor *t[STATE + 1];
  for (int i = U; i <= STATE; i++) t[i] = i != SOFTPLUS && c->arg[i].kind == MOE_K_tensor ? c->arg[i].t : NULL;
  moe_tensor *u = t[U];
  char s[MOE_SHAPE_TEXT], r[MOE_SHAPE_TEXT];
  if (u->ndim != 3 || u->shape[2] < 1 || t[A]->ndim != 2 || t[A]->shape[0] != u->shape[2] || t[A]->shape[1] < 1)
    return OP_FAIL(c, "wants u [batch, time, channels] and A [channels, states]: u is %s, A is %s", moe_shape_of(s, u),
                   moe_shape_of(r, t[A]));
  int64_t batch = u->shape[0], time = u->shape[1], ch = u->shape[2], n = t[A]->shape[1];
  int64_t groups = t[B]->ndim == 4 ? t[B]->shape[2] : 1;
  if (groups < 1 || ch % groups != 0)
    return OP_FAIL(c, "B is %s: its %lld groups do not divide the %lld channels of u", moe_shape_of(s, t[B]), (long long)groups,
                   (long long)ch);
  moe_tensor *start = NULL, *chunk = NULL;
  MOE_TRY(boundaries(c, c->arg[PACKED].kind == MOE_K_tensor ? c->arg[PACKED].t : NULL, batch, time, &start, &chunk));
  int64_t sequences = moe_numel(start) - 1, flat[] = {batch, time, n}, grouped[] = {batch, time, groups, n},
          state[] = {sequences, ch, n};
  const int64_t *bc = t[B]->ndim == 4 ? grouped : flat;
  int bd = t[B]->ndim == 4 ? 4 : 3;
  const struct {
    int ndim;
    const int64_t *shape;
  } wanted[] = {[U] = {3, u->shape}, [DELTA] = {3, u->shape}, [A] = {2, t[A]->shape}, [B] = {bd, bc}, [C] = {bd, bc},
                [D] = {1, &ch},      [Z] = {3, u->shape},     [BIAS] = {1, &ch},      [STATE] = {3, state}};
  moe_dtype dt = moe_dtype_promote(u->dtype, t[DELTA]->dtype), ct = moe_dtype_compute(dt);
  for (int i = U; i <= STATE; i++)
    if (t[i]) {
      MOE_TRY(want(c, names[i], t[i], wanted[i].ndim, wanted[i].shape));
      if (t[i]->dtype == MOE_f64) ct = MOE_f64;
    }
  for (int i = U; i <= STATE; i++)
    if (t[i] && (t[i] = moe_dense(t[i], ct)) == NULL) return moe_error_code();
  if (bd == 3) { /* as one group */
    const int64_t strides[] = {time * n, n, n, 1};
    for (int i = B; i <= C; i++)
      if ((t[i] = moe_view_of(t[i], 4, grouped, strides, t[i]->offset)) == NULL) return moe_error_code();
  }
  moe_tensor *y = moe_out(c, 0, 3, u->shape, dt), *last = moe_out(c, 1, 3, state, ct);
  moe_tensor *out = y == NULL || dt == ct ? y : moe_empty(3, u->shape, ct, moe_dev(u));
  if (out == NULL || last == NULL) return moe_error_code();
  moe_selective scan;
  fill(&scan, t, start, chunk, ct, c->arg[SOFTPLUS].i != 0);
  int64_t width, chunks;
  MOE_TRY(moe_read(moe_view_of(chunk, 0, NULL, NULL, chunk->offset + sequences), &chunks, MOE_i64));
  MOE_TRY(MOE_RUN(moe_dev(u), c->op->name, scan_width, &width, &scan));
  const int64_t kshape[] = {chunks, width, n};
  moe_tensor *kept = c->record ? moe_empty(3, kshape, ct, moe_dev(u)) : NULL;
  if (c->record && kept == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(u), c->op->name, selective_scan, moe_data(out), moe_data(last), data(kept), &scan));
  for (int i = U; i <= STATE; i++) moe_save(c, t[i]);
  moe_save(c, kept);
  moe_save(c, start);
  moe_save(c, chunk);
  return out == y ? MOE_OK : moe_copy(y, out);
}

moe_status moe_bwd_selective_scan(moe_ctx *c) {
  if (moe_grad_enabled()) return OP_FAIL(c, "has no second derivative");
  moe_tensor **t = c->saved, *u = t[U], *g[STATE + 1] = {0};
  moe_dtype ct = u->dtype;
  moe_device *dev = moe_dev(u);
  moe_tensor *gy = c->gout[0] ? moe_dense(c->gout[0], ct) : moe_zeros(3, u->shape, ct, dev);
  moe_tensor *glast = c->gout[1] ? moe_dense(c->gout[1], ct) : NULL;
  if (gy == NULL || (c->gout[1] && glast == NULL)) return moe_error_code();
  for (int i = U; i <= STATE; i++)
    if (t[i] && (g[i] = moe_empty(t[i]->ndim, t[i]->shape, ct, dev)) == NULL) return moe_error_code();
  moe_selective scan;
  fill(&scan, t, t[START], t[CHUNK], ct, c->arg[SOFTPLUS].i != 0);
  moe_selective_grads q = {.u = data(g[U]),
                      .delta = data(g[DELTA]),
                      .z = data(g[Z]),
                      .a = data(g[A]),
                      .d = data(g[D]),
                      .bias = data(g[BIAS]),
                      .b = data(g[B]),
                      .c = data(g[C]),
                      .state = data(g[STATE]),
                      .gy = moe_data(gy),
                      .glast = data(glast)};
  MOE_TRY(MOE_RUN(dev, c->op->name, selective_scan_bwd, &q, moe_data(t[KEPT]), &scan));
  int at = 0; /* absent arguments take no place among the inputs */
  for (int i = U; i <= STATE; i++) {
    if (t[i] == NULL) continue;
    if (c->need[at]) {
      const moe_meta *m = &c->in[at];
      moe_tensor *v = g[i];
      if (m->ndim != v->ndim) v = MOE_CALL(reshape, T(v), INTS(m->shape, m->ndim));
      if (v == NULL) return moe_error_code();
      MOE_TRY(gin_set(c, at, v));
    }
    at++;
  }
  return MOE_OK;
}
