/* Multi-head attention with one fused projection of queries, keys and values; a mixer whose state is the cache
** of keys and values. Grouped heads: Ainslie et al., "GQA", 2023. Windows: Beltagy et al., "Longformer", 2020. A cross
** attention takes its keys from another sequence; its state holds them once they are made.
*/
#include <math.h>

#include "nn/init.h"
#include "nn/kv_cache.h"
#include "nn/module.h"
#include "op/product.h"

enum { QKV_WEIGHT, QKV_BIAS, O_WEIGHT, O_BIAS, Q_NORM, K_NORM }; /* slots */
enum { HEADS, KV_HEADS, HEAD_DIM, CAUSAL, ROPE, WINDOW, CROSS }; /* data; window 0: none */
enum { K, V };                                                   /* state: [batch, kv heads, time, head_dim] */
enum { X, MASK, PACKED, RELATIVE, MEMORY, PACKED_MEMORY };       /* arguments of the call */

static moe_status projection(moe_module *m, const char *weight, const char *bias, bool with_bias, int64_t out,
                             int64_t in) {
  const char *init = moe_module_string(m, "init");
  moe_tensor *w = moe_module_parameter(m, weight, 2, (const int64_t[]){out, in});
  if (w == NULL) return moe_error_code();
  MOE_TRY(init ? moe_init_named(w, init) : moe_init_linear(w, in));
  if (!with_bias) {
    moe_module_absent(m, bias);
    return MOE_OK;
  }
  moe_tensor *b = moe_module_parameter(m, bias, 1, &out);
  if (b == NULL) return moe_error_code();
  b->tag |= MOE_TAG_NO_DECAY;
  return moe_fill(b, 0);
}

static moe_status head_norm(moe_module *m, const char *name, int64_t n) {
  if (!moe_module_flag(m, "qk_norm")) {
    moe_module_absent(m, name);
    return MOE_OK;
  }
  moe_tensor *w = moe_module_parameter(m, name, 1, &n);
  if (w == NULL) return moe_error_code();
  w->tag |= MOE_TAG_NO_DECAY;
  return moe_fill(w, 1);
}

moe_status moe_nn_init_attention(moe_module *m) {
  static const char *const sizes[] = {"d_model", "num_heads", "num_kv_heads", "head_dim"};
  for (int i = 0; i < 4; i++) MOE_TRY(moe_module_at_least(m, sizes[i], 1));
  int64_t d = moe_module_int(m, "d_model", 0), heads = moe_module_int(m, "num_heads", 0);
  int64_t kv = moe_module_int(m, "num_kv_heads", heads), dim = moe_module_int(m, "head_dim", d / heads);
  double p = moe_module_number(m, "dropout", 0);
  if (moe_module_opt(m, "head_dim")->kind == MOE_K_none && d % heads != 0)
    return moe_module_fail(m, "d_model = %lld is no multiple of num_heads = %lld (or give head_dim)", (long long)d,
                           (long long)heads);
  if (heads > 1 << 24) return moe_module_fail(m, "num_heads = %lld is too large", (long long)heads);
  if (heads % kv != 0)
    return moe_module_fail(m, "num_heads = %lld is no multiple of num_kv_heads = %lld", (long long)heads, (long long)kv);
  if (moe_module_flag(m, "rope") && dim % 2 != 0)
    return moe_module_fail(m, "rope turns pairs: head_dim must be even, got %lld", (long long)dim);
  if (!(p >= 0 && p < 1)) return moe_module_fail(m, "dropout must lie in [0, 1), got %g", p);
  if (moe_module_opt(m, "window")->kind != MOE_K_none) MOE_TRY(moe_module_at_least(m, "window", 1));
  if (moe_module_flag(m, "cross") && moe_module_flag(m, "rope"))
    return moe_module_fail(m, "a cross attention has no positions in common with its memory: rope must be false");
  MOE_TRY(moe_rope_check(m->cls->name, moe_module_string(m, "rope_scaling")));
  m->data[HEADS] = heads;
  m->data[KV_HEADS] = kv;
  m->data[HEAD_DIM] = dim;
  m->data[CROSS] = moe_module_flag(m, "cross");
  m->data[CAUSAL] = moe_module_flag(m, "causal") && !m->data[CROSS];
  m->data[WINDOW] = moe_module_int(m, "window", 0);
  m->data[ROPE] = moe_module_flag(m, "rope");
  int64_t total;
  MOE_TRY(moe_shape_numel(m->cls->name, 3, (const int64_t[]){heads + 2 * kv, dim, d}, &total));
  bool bias = moe_module_flag(m, "bias");
  bool qkv_bias = moe_module_int(m, "qkv_bias", bias) != 0;
  MOE_TRY(projection(m, "qkv_proj.weight", "qkv_proj.bias", qkv_bias, (heads + 2 * kv) * dim, d));
  MOE_TRY(projection(m, "o_proj.weight", "o_proj.bias", bias, d, heads * dim));
  MOE_TRY(head_norm(m, "q_norm.weight", dim));
  return head_norm(m, "k_norm.weight", dim);
}

moe_status moe_nn_start_attention(moe_module *m, int64_t batch, moe_tensor **out) {
  int64_t shape[4] = {batch, m->data[KV_HEADS], 0, m->data[HEAD_DIM]};
  out[K] = moe_zeros(4, shape, m->dtype, m->device);
  out[V] = moe_zeros(4, shape, m->dtype, m->device);
  return MOE_OK;
}

static moe_value maybe(moe_tensor *t) { return t ? T(t) : NIL; }

static moe_status check_state(const moe_module *m, const moe_tensor *t, const char *name, int64_t batch) {
  char shape[MOE_SHAPE_TEXT];
  if (t->ndim == 4 && t->shape[0] == batch && t->shape[1] == m->data[KV_HEADS] && t->shape[3] == m->data[HEAD_DIM])
    return MOE_OK;
  return moe_module_fail(m, "state.%s must be [%lld, %lld, time, %lld], got %s", name, (long long)batch,
                         (long long)m->data[KV_HEADS], (long long)m->data[HEAD_DIM], moe_shape_of(shape, t));
}

/* [t, s] bool: query i, at key s - t + i, sees what the operation lets it see. */
static moe_tensor *position_mask(const moe_module *m, int64_t t, int64_t s, moe_device *dev) {
  moe_tensor *keep = moe_empty(2, (const int64_t[]){t, s}, MOE_bool, moe_cpu());
  if (keep == NULL) return NULL;
  uint8_t *p = moe_data(keep);
  int64_t window = m->data[WINDOW];
  for (int64_t i = 0; i < t; i++)
    for (int64_t j = 0; j < s; j++) {
      int64_t far = s - t + i - j;
      p[i * s + j] = (!m->data[CAUSAL] || far >= 0) && (window == 0 || (far < window && -far < window));
    }
  return moe_to_raw(keep, MOE_bool, dev);
}

/* relative [.., 2 n - 1] by distance as [.., t, s], query i at key s - t + i. */
static moe_tensor *spread(moe_tensor *relative, int64_t t, int64_t s) {
  int64_t last = relative->shape[relative->ndim - 1] - 1, heads = relative->ndim > 1 ? relative->shape[0] : 1;
  moe_tensor *place = moe_empty(1, (const int64_t[]){t * s}, MOE_i64, moe_cpu());
  if (place == NULL) return NULL;
  int64_t *p = moe_data_i64(place);
  for (int64_t i = 0; i < t; i++)
    for (int64_t j = 0; j < s; j++) p[i * s + j] = MOE_MIN(MOE_MAX(last / 2 + j - (s - t + i), 0), last);
  moe_tensor *r = MOE_CALL(index_select, T(relative), I(-1), T(moe_to_raw(place, MOE_i64, moe_dev(relative))));
  return MOE_CALL(reshape, T(r), INTS(((const int64_t[]){heads, t, s}), 3));
}

/* Attention whose weights drop out: made of plain operations, the scores of a whole batch at once. */
static moe_tensor *attention_dropout(const moe_module *m, moe_tensor *q, moe_tensor *k, moe_tensor *v, moe_tensor *mask,
                                     moe_tensor *relative, double p) {
  if (q == NULL || k == NULL || v == NULL) return NULL;
  int64_t batch = q->shape[0], heads = q->shape[1], kv = k->shape[1], s = k->shape[2], d = q->shape[3];
  if (heads != kv) { /* every head its own copy */
    moe_value wide = INTS(((const int64_t[]){batch, kv, heads / kv, s, d}), 5);
    moe_value flat = INTS(((const int64_t[]){batch, heads, s, d}), 4);
    k = MOE_CALL(reshape, T(MOE_CALL(expand, T(MOE_CALL(unsqueeze, T(k), I(2))), wide)), flat);
    v = MOE_CALL(reshape, T(MOE_CALL(expand, T(MOE_CALL(unsqueeze, T(v), I(2))), wide)), flat);
  }
  moe_tensor *a = MOE_CALL(matmul, T(q), T(MOE_CALL(transpose, T(k), I(-1), I(-2))));
  a = MOE_CALL(mul, T(a), F(1 / sqrt((double)d)));
  if (relative) a = MOE_CALL(add, T(a), T(spread(relative, q->shape[2], s)));
  bool positions = m->data[CAUSAL] || m->data[WINDOW] > 0;
  moe_tensor *keep = positions ? position_mask(m, q->shape[2], s, moe_dev(q)) : NULL;
  if (positions && keep == NULL) return NULL;
  if (keep) a = MOE_CALL(where, T(keep), T(a), F(-1e30));
  bool choose = mask && mask->dtype == MOE_bool;
  if (choose) a = MOE_CALL(where, T(mask), T(a), F(-1e30));
  else if (mask) a = MOE_CALL(add, T(a), T(mask));
  a = MOE_CALL(softmax, T(a), I(-1));
  if (choose) { /* a query that sees no key gives 0 */
    a = MOE_CALL(where, T(mask), T(a), F(0));
    if (keep) a = MOE_CALL(where, T(keep), T(a), F(0));
  }
  return MOE_CALL(matmul, T(MOE_CALL(dropout, T(a), F(p), I(true))), T(v));
}

/* --- sequences packed one after another: cu_seqlens [n + 1], the cumulative lengths from 0 to the total --- */

/* They are counts, not positions: the same numbers from C and from Lua. */
static moe_tensor *read_lengths(const moe_module *m, const char *name, moe_tensor *cu, int64_t batch, int64_t time,
                                const char *of, bool stateful) {
  char got[MOE_SHAPE_TEXT];
  if (cu->ndim != 1 || cu->shape[0] < 1 || moe_dtype_is_float(cu->dtype)) {
    moe_module_fail(m, "%s must be integers [sequences + 1], got %s %s", name, moe_dtype_name(cu->dtype), moe_shape_of(got, cu));
    return NULL;
  }
  if (batch != 1 || stateful) {
    moe_module_fail(m, stateful ? "packed sequences start anew: there can be no state with %s"
                                : "%s packs sequences into a batch of 1", name);
    return NULL;
  }
  cu = moe_contiguous_raw(moe_to_raw(cu, MOE_i64, moe_cpu()));
  if (cu == NULL) return NULL;
  const int64_t *at = moe_data_i64(cu);
  int64_t n = cu->shape[0];
  bool good = at[0] == 0 && at[n - 1] == time;
  for (int64_t i = 1; i < n && good; i++) good = at[i - 1] <= at[i];
  if (good) return cu;
  moe_module_fail(m, "%s must rise from 0 to the %lld positions of %s", name, (long long)time, of);
  return NULL;
}

/* [time]: how far each position lies from the start of its sequence. */
static moe_tensor *restarting_positions(moe_tensor *cu, int64_t time, moe_device *dev) {
  moe_tensor *pos = moe_empty(1, &time, MOE_i64, moe_cpu());
  if (pos == NULL) return NULL;
  int64_t *p = moe_data_i64(pos);
  const int64_t *at = moe_data_i64(cu);
  for (int64_t i = 0, seq = 0; i < time; i++) {
    while (i >= at[seq + 1]) seq++;
    p[i] = i - at[seq];
  }
  return moe_to_raw(pos, MOE_i64, dev);
}

typedef struct packing {
  moe_tensor *q, *k; /* cumulative lengths, or NULL */
} packing;

/* With weights that drop out, each sequence by itself. */
static moe_tensor *dropout_packed(moe_module *m, moe_tensor *q, moe_tensor *k, moe_tensor *v, moe_tensor *relative,
                                  packing pack, double p) {
  const int64_t *at = moe_data_i64(pack.q), *key = pack.k ? moe_data_i64(pack.k) : at;
  int64_t n = pack.q->shape[0] - 1;
  moe_tensor *parts = moe_empty(1, (const int64_t[]){MOE_MAX(n, 1) * (int64_t)sizeof(moe_tensor *)}, MOE_u8, moe_cpu());
  if (parts == NULL) return NULL;
  moe_tensor **part = moe_data(parts);
  int count = 0;
  for (int64_t i = 0; i < n; i++) {
    moe_value dim = I(2), start = I(key[i]), length = I(key[i + 1] - key[i]);
    if (at[i + 1] == at[i]) continue;
    part[count] = attention_dropout(m, MOE_CALL(narrow, T(q), dim, I(at[i]), I(at[i + 1] - at[i])), MOE_CALL(narrow, T(k), dim, start, length),
                                    MOE_CALL(narrow, T(v), dim, start, length), NULL, relative, p);
    if (part[count++] == NULL) return NULL;
  }
  return count == 0 ? q : count == 1 ? part[0] : MOE_CALL(cat, TS(part, count), I(2));
}

/* Attention of q, k, v [batch, heads, time, dim]. */
static moe_tensor *attend(moe_module *m, moe_tensor *q, moe_tensor *k, moe_tensor *v, moe_tensor *mask, moe_tensor *relative,
                          packing pack) {
  double p = m->training ? moe_module_number(m, "dropout", 0) : 0;
  if (p > 0 && pack.q) return dropout_packed(m, q, k, v, relative, pack, p);
  if (p > 0) return attention_dropout(m, q, k, v, mask, relative, p);
  return MOE_CALL(attention, T(q), T(k), T(v), maybe(mask), I(m->data[CAUSAL]), NIL, NIL, m->data[WINDOW] ? I(m->data[WINDOW]) : NIL,
                  maybe(relative), maybe(pack.q), maybe(pack.k));
}

static moe_tensor *argument(const moe_module_call *c, int i) { return c->arg[i].kind == MOE_K_none ? NULL : c->arg[i].t; }

/* x [batch, time, d] through rows [first, first + heads) of the projection, as views [batch, heads, time, dim]. */
static moe_tensor *project(moe_module *m, moe_tensor *x, int64_t first, int64_t heads) {
  int64_t dim = m->data[HEAD_DIM], all = m->data[HEADS] + 2 * m->data[KV_HEADS];
  moe_tensor *w = m->slot[QKV_WEIGHT].t, *b = m->slot[QKV_BIAS].t;
  if (heads < all) {
    w = MOE_CALL(narrow, T(w), I(0), I(first * dim), I(heads * dim));
    if (b) b = MOE_CALL(narrow, T(b), I(0), I(first * dim), I(heads * dim));
  }
  moe_tensor *y = MOE_CALL(linear, T(x), T(w), maybe(b));
  return MOE_CALL(reshape, T(y), INTS(((const int64_t[]){x->shape[0], x->shape[1], heads, dim}), 4));
}

static moe_tensor *heads_first(moe_tensor *t) { return MOE_CALL(transpose, T(t), I(1), I(2)); }

/* Keys and values of a cross attention: those of the state, or of the memory. */
static moe_status recall(moe_module *m, moe_module_call *c, int64_t batch, int64_t past, moe_tensor **k, moe_tensor **v) {
  moe_tensor *memory = argument(c, MEMORY), *split[2] = {NULL};
  int64_t d = moe_module_int(m, "d_model", 0), kv = m->data[KV_HEADS];
  char got[MOE_SHAPE_TEXT];
  if (past > 0) {
    *k = c->state[K], *v = c->state[V];
    return MOE_OK;
  }
  if (memory == NULL) return moe_module_fail(m, "a cross attention wants memory [batch, positions, %lld] in its context", (long long)d);
  if (memory->ndim != 3 || memory->shape[2] != d || memory->shape[0] != batch)
    return moe_module_fail(m, "memory must be [%lld, positions, %lld], got %s", (long long)batch, (long long)d, moe_shape_of(got, memory));
  moe_tensor *kv_heads = project(m, memory, m->data[HEADS], 2 * kv);
  MOE_TRY(MOE_CALLN(split, split, T(kv_heads), INTS(((const int64_t[]){kv, kv}), 2), I(2)));
  *k = heads_first(split[0]);
  *v = heads_first(split[1]);
  if (m->slot[K_NORM].t) *k = MOE_CALL(rms_norm, T(*k), T(m->slot[K_NORM].t));
  return MOE_OK;
}

moe_status moe_nn_forward_attention(moe_module *m, moe_module_call *c) {
  moe_tensor *x = c->arg[X].t, *mask = argument(c, MASK), *cu = argument(c, PACKED), *positions = NULL;
  moe_tensor *relative = m->data[CROSS] ? NULL : argument(c, RELATIVE);
  packing pack = {NULL, NULL};
  char got[MOE_SHAPE_TEXT];
  int64_t d = moe_module_int(m, "d_model", 0);
  int64_t heads = m->data[HEADS], kv = m->data[KV_HEADS], dim = m->data[HEAD_DIM];
  if (x->ndim != 3 || x->shape[2] != d)
    return moe_module_fail(m, "x must be [batch, time, %lld], got %s", (long long)d, moe_shape_of(got, x));
  int64_t batch = x->shape[0], time = x->shape[1], past = 0;
  if (c->state[K] && c->state[V]) {
    MOE_TRY(check_state(m, c->state[K], "k", batch));
    MOE_TRY(check_state(m, c->state[V], "v", batch));
    if (c->state[K]->shape[2] != c->state[V]->shape[2])
      return moe_module_fail(m, "state.k and state.v hold %lld and %lld positions", (long long)c->state[K]->shape[2],
                             (long long)c->state[V]->shape[2]);
    past = c->state[K]->shape[2];
  } else if (c->state[K] || c->state[V]) {
    return moe_module_fail(m, "the state must hold both k and v");
  }
  if (cu) {
    if (mask) return moe_module_fail(m, "attn_mask and cu_seqlens cannot come together");
    pack.q = read_lengths(m, "cu_seqlens", cu, batch, time, "x", c->stateful);
    if (pack.q == NULL) return moe_error_code();
    if (m->data[ROPE] && (positions = restarting_positions(pack.q, time, m->device)) == NULL) return moe_error_code();
  }

  moe_tensor *split[3] = {NULL}, *q, *k = NULL, *v = NULL;
  if (m->data[CROSS]) {
    q = heads_first(project(m, x, 0, heads));
    MOE_TRY(recall(m, c, batch, past, &k, &v));
    if (pack.q) {
      moe_tensor *packed = argument(c, PACKED_MEMORY);
      if (packed == NULL) return moe_module_fail(m, "packed sequences want cu_seqlens_memory beside cu_seqlens");
      if (k == NULL) return moe_error_code();
      pack.k = read_lengths(m, "cu_seqlens_memory", packed, batch, k->shape[2], "memory", c->stateful);
      if (pack.k == NULL) return moe_error_code();
      if (pack.k->shape[0] != pack.q->shape[0])
        return moe_module_fail(m, "cu_seqlens and cu_seqlens_memory must be of the same length");
    }
  } else {
    moe_tensor *y = project(m, x, 0, heads + 2 * kv);
    MOE_TRY(MOE_CALLN(split, split, T(y), INTS(((const int64_t[]){heads, kv, kv}), 3), I(2)));
    q = heads_first(split[0]);
    k = heads_first(split[1]);
    v = heads_first(split[2]);
  }
  if (m->slot[Q_NORM].t) {
    q = MOE_CALL(rms_norm, T(q), T(m->slot[Q_NORM].t));
    if (!m->data[CROSS]) k = MOE_CALL(rms_norm, T(k), T(m->slot[K_NORM].t));
  }
  if (m->data[ROPE]) {
    const char *text = moe_module_string(m, "rope_scaling");
    moe_value base = F(moe_module_number(m, "rope_base", 10000)), start = I(past);
    moe_value scaling = text ? (moe_value){.kind = MOE_K_string, .s = text} : NIL;
    q = MOE_CALL(rope, T(q), maybe(positions), start, base, I(false), NIL, scaling);
    k = MOE_CALL(rope, T(k), maybe(positions), start, base, I(false), NIL, scaling);
  }
  if (!m->data[CROSS]) {
    k = moe_kv_extend(c->state[K], k, c->stateful);
    v = moe_kv_extend(c->state[V], v, c->stateful);
  }
  c->next[K] = k;
  c->next[V] = v;
  moe_tensor *y = heads_first(attend(m, q, k, v, mask, relative, pack));
  y = MOE_CALL(reshape, T(y), INTS(((const int64_t[]){batch, time, heads * dim}), 3));
  c->out[0] = MOE_CALL(linear, T(y), T(m->slot[O_WEIGHT].t), maybe(m->slot[O_BIAS].t));
  return MOE_OK;
}
