#include "nn/routing.h"

#include <stdlib.h>
#include <string.h>

/* --- lifetime --- */

static moe_routing *routing_new(int64_t tokens, int64_t experts) {
  moe_routing *r = calloc(1, sizeof *r);
  if (r == NULL) {
    moe_fail(MOE_ENOMEM, "out of memory for a routing");
    return NULL;
  }
  *r = (moe_routing){.refs = 1, .tokens = tokens, .experts = experts};
  return r;
}

moe_routing *moe_routing_retain(moe_routing *r) {
  if (r) r->refs++;
  return r;
}

void moe_routing_free(moe_routing *r) {
  if (r == NULL || --r->refs > 0) return;
  for (int i = 0; i < MOE_PLAN_LISTS; i++) moe_release(r->plan[i]);
  moe_tensor *const held[] = {r->weight,        r->mask,           r->dispatch, r->combine,
                              r->dropped_token, r->dropped_expert, r->demand};
  for (size_t i = 0; i < sizeof held / sizeof *held; i++) moe_release(held[i]);
  free(r);
}

/* --- lists --- */

static moe_tensor *list_new(int64_t n, moe_device *dev) { return moe_empty(1, &n, MOE_i64, dev); }

/* Choices as (token, expert, source) triples. */
typedef struct entries {
  moe_tensor *token, *expert, *source; /* scoped, with room for all */
  int64_t rows;
} entries;

/* Sorts the entries into r->plan. `tokens`: of the plan, that is the slots of a soft routing. */
static moe_status plan_make(moe_routing *r, const entries *e, int64_t tokens, bool ordered) {
  moe_device *dev = moe_dev(e->token);
  int64_t n = e->rows, groups = MOE_MIN(n, r->experts);
  moe_tensor *list[MOE_PLAN_LISTS];
  const int64_t size[] = {groups, groups + 1, n, n, tokens + 1, n}; /* ORDER moe_plan */
  for (int i = 0; i < MOE_PLAN_LISTS; i++)
    if ((list[i] = list_new(size[i], dev)) == NULL) return moe_error_code();
  moe_plan p = moe_plan_of(list, r->experts);
  p.tokens = tokens;
  p.rows = n;
  MOE_TRY(MOE_RUN(dev, "routing", route_sort, &p, moe_data_i64(e->token), moe_data_i64(e->expert),
                  moe_data_i64(e->source), ordered));
  if (p.groups < groups) {
    const int64_t step = 1, ng = p.groups, ns = p.groups + 1;
    list[MOE_PLAN_EXPERT] = moe_view_of(list[MOE_PLAN_EXPERT], 1, &ng, &step, 0);
    list[MOE_PLAN_START] = moe_view_of(list[MOE_PLAN_START], 1, &ns, &step, 0);
    if (!list[MOE_PLAN_EXPERT] || !list[MOE_PLAN_START]) return moe_error_code();
  }
  for (int i = 0; i < MOE_PLAN_LISTS; i++) r->plan[i] = moe_retain(list[i]);
  return MOE_OK;
}

static bool entries_room(entries *e, int64_t n, moe_device *dev) {
  return (e->token = list_new(n, dev)) && (e->expert = list_new(n, dev)) && (e->source = list_new(n, dev));
}

/* --- checking --- */

static moe_status check_index(const char *fname, const moe_tensor *index, const moe_tensor *weight,
                              const char *wanted) {
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  if (index->ndim != 2 || moe_dtype_is_float(index->dtype) || index->dtype == MOE_bool)
    return moe_fail(MOE_EINVAL, "%s: index is a %s tensor %s, wanted integers %s", fname,
                    moe_dtype_name(index->dtype), moe_shape_of(a, index), wanted);
  if (weight && !moe_same_shape(index, weight))
    return moe_fail(MOE_EINVAL, "%s: weight is %s, but index is %s", fname, moe_shape_of(b, weight),
                    moe_shape_of(a, index));
  if (weight && !moe_dtype_is_float(weight->dtype))
    return moe_fail(MOE_EINVAL, "%s: weight must be of floats, got %s", fname, moe_dtype_name(weight->dtype));
  if (weight && moe_dev(weight) != moe_dev(index))
    return moe_fail(MOE_EDEVICE, "%s: index is on %s, weight on %s", fname, moe_dev(index)->name,
                    moe_dev(weight)->name);
  return MOE_OK;
}

static moe_status check_mask(const char *fname, const moe_tensor *mask, int64_t tokens) {
  char a[MOE_SHAPE_TEXT];
  if (mask == NULL || (moe_numel(mask) == tokens && !moe_dtype_is_float(mask->dtype))) return MOE_OK;
  return moe_fail(MOE_EINVAL,
                  "%s: mask is a %s tensor %s, wanted bool [%lld], true for the tokens that take part", fname,
                  moe_dtype_name(mask->dtype), moe_shape_of(a, mask), (long long)tokens);
}

/* --- making --- */

/* What the three sparse constructors share; `from` is a dense i64 index or dense gates. */
static moe_routing *make(const char *fname, moe_tensor *from, moe_tensor *weight, moe_tensor *mask,
                         int64_t tokens, int64_t experts, int64_t outer, int64_t inner, moe_choice kind,
                         int base) {
  moe_status st = check_mask(fname, mask, tokens);
  if (st == MOE_OK && (experts < 1 || experts > INT32_MAX))
    st = moe_fail(MOE_EINVAL, "%s: num_experts must be at least 1 and below 2^31, got %lld", fname,
                  (long long)experts);
  moe_routing *r = st == MOE_OK ? routing_new(tokens, experts) : NULL;
  if (r == NULL) return NULL;
  moe_scope s = moe_scope_open();
  entries e;
  moe_tensor *ms = mask ? moe_dense(mask, MOE_bool) : NULL;
  st = MOE_EINVAL;
  if (from && (!mask || ms) && entries_room(&e, moe_numel(from), moe_dev(from))) {
    st = MOE_RUN(moe_dev(from), fname, route_entries, moe_data_i64(e.token), moe_data_i64(e.expert),
                 moe_data_i64(e.source), &e.rows, &r->masked, &r->none, moe_data(from), from->dtype,
                 ms ? moe_data(ms) : NULL, outer, inner, kind == MOE_CHOICE_EXPERT ? tokens : experts, kind,
                 base);
    if (st != MOE_OK) moe_fail_prefix(fname);
    if (st == MOE_OK) st = plan_make(r, &e, tokens, kind != MOE_CHOICE_EXPERT);
  }
  r->weight = moe_retain(weight);
  r->mask = moe_retain(ms);
  moe_scope_close(s);
  if (st == MOE_OK) return r;
  moe_routing_free(r);
  return NULL;
}

moe_routing *moe_routing_topk(moe_tensor *index, moe_tensor *weight, int64_t experts, moe_tensor *mask,
                              int base) {
  const char *fname = "routing.topk";
  if (check_index(fname, index, weight, "[tokens, k]") != MOE_OK) return NULL;
  moe_scope s = moe_scope_open();
  moe_routing *r = make(fname, moe_dense(index, MOE_i64), weight, mask, index->shape[0], experts,
                        index->shape[0], index->shape[1], MOE_CHOICE_TOKEN, base);
  moe_scope_close(s);
  return r;
}

moe_routing *moe_routing_experts(moe_tensor *index, moe_tensor *weight, int64_t tokens, moe_tensor *mask,
                                 int base) {
  const char *fname = "routing.experts";
  if (check_index(fname, index, weight, "[experts, capacity]") != MOE_OK) return NULL;
  if (tokens < 0 || tokens > (int64_t)1 << 40) {
    moe_fail(MOE_EINVAL, "%s: num_tokens must not be negative and at most 2^40, got %lld", fname,
             (long long)tokens);
    return NULL;
  }
  moe_scope s = moe_scope_open();
  moe_routing *r = make(fname, moe_dense(index, MOE_i64), weight, mask, tokens, index->shape[0],
                        index->shape[0], index->shape[1], MOE_CHOICE_EXPERT, base);
  moe_scope_close(s);
  return r;
}

moe_routing *moe_routing_dense(moe_tensor *gates, moe_tensor *mask) {
  const char *fname = "routing.dense";
  char a[MOE_SHAPE_TEXT];
  if (gates->ndim != 2 || !moe_dtype_is_float(gates->dtype)) {
    moe_fail(MOE_EINVAL, "%s: gates is a %s tensor %s, wanted floats [tokens, experts]", fname,
             moe_dtype_name(gates->dtype), moe_shape_of(a, gates));
    return NULL;
  }
  moe_scope s = moe_scope_open();
  moe_routing *r = make(fname, moe_dense(gates, moe_dtype_compute(gates->dtype)), gates, mask, gates->shape[0],
                        gates->shape[1], gates->shape[0], gates->shape[1], MOE_CHOICE_DENSE, 0);
  moe_scope_close(s);
  return r;
}

static moe_status soft_plan(moe_routing *r, int64_t batch, int64_t slots, moe_device *dev) {
  int64_t n = batch * r->experts * slots;
  entries e = {.rows = n};
  int64_t *host = malloc((size_t)MOE_MAX(n, 1) * sizeof *host);
  if (host == NULL) return moe_fail(MOE_ENOMEM, "out of memory for a routing");
  moe_status st = entries_room(&e, n, dev) ? MOE_OK : moe_error_code();
  for (int64_t i = 0; i < n; i++) host[i] = i;
  if (st == MOE_OK) st = moe_write(e.token, host, MOE_i64);
  if (st == MOE_OK) st = moe_write(e.source, host, MOE_i64);
  for (int64_t i = 0; i < n; i++) host[i] = i / slots % r->experts;
  if (st == MOE_OK) st = moe_write(e.expert, host, MOE_i64);
  free(host);
  return st == MOE_OK ? plan_make(r, &e, n, true) : st;
}

moe_routing *moe_routing_soft(moe_tensor *dispatch, moe_tensor *combine) {
  const char *fname = "routing.soft";
  char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
  int nd = dispatch->ndim;
  if ((nd != 3 && nd != 4) || !moe_dtype_is_float(dispatch->dtype) || !moe_dtype_is_float(combine->dtype) ||
      !moe_same_shape(dispatch, combine) || dispatch->shape[nd - 2] < 1) {
    moe_fail(
        MOE_EINVAL,
        "%s: dispatch is %s %s and combine %s %s; wanted floats of one "
             "shape, [tokens, experts, slots] or [batch, time, experts, slots]",
        fname, moe_dtype_name(dispatch->dtype), moe_shape_of(a, dispatch), moe_dtype_name(combine->dtype),
        moe_shape_of(b, combine));
    return NULL;
  }
  int64_t batch = nd == 4 ? dispatch->shape[0] : 1;
  moe_routing *r = routing_new(batch * dispatch->shape[nd - 3], dispatch->shape[nd - 2]);
  if (r == NULL) return NULL;
  r->dispatch = moe_retain(dispatch);
  r->combine = moe_retain(combine);
  moe_scope s = moe_scope_open();
  moe_status st = soft_plan(r, batch, dispatch->shape[nd - 1], moe_dev(dispatch));
  moe_scope_close(s);
  if (st == MOE_OK) return r;
  moe_routing_free(r);
  return NULL;
}

/* --- capacity --- */

/* The rows of p with keep == want as entries; host memory in, device memory out. */
static bool rows_kept(entries *e, const moe_routing *r, const uint8_t *keep, bool want, int64_t count) {
  moe_plan p = moe_routing_plan(r);
  int64_t n = p.rows;
  int64_t *host = malloc((size_t)MOE_MAX(3 * n, 1) * sizeof *host);
  if (host == NULL) {
    moe_fail(MOE_ENOMEM, "out of memory for a routing");
    return false;
  }
  int64_t *token = host, *source = host + n, *expert = host + 2 * n, at = 0;
  moe_tensor *experts = moe_routing_expert(r, 0);
  bool ok = experts && entries_room(e, count, moe_dev(experts)) &&
            moe_read(experts, expert, MOE_i64) == MOE_OK &&
            moe_read(r->plan[MOE_PLAN_TOKEN], token, MOE_i64) == MOE_OK &&
            moe_read(r->plan[MOE_PLAN_SOURCE], source, MOE_i64) == MOE_OK;
  for (int64_t i = 0; ok && i < n; i++)
    if ((keep[i] != 0) == want) {
      token[at] = token[i];
      source[at] = source[i];
      expert[at++] = expert[i];
    }
  e->rows = count;
  ok = ok && moe_write(e->token, token, MOE_i64) == MOE_OK && moe_write(e->source, source, MOE_i64) == MOE_OK &&
       moe_write(e->expert, expert, MOE_i64) == MOE_OK;
  free(host);
  return ok;
}

static moe_status limit(moe_routing *out, const moe_routing *r, int64_t capacity, moe_drop policy,
                        moe_tensor *priority) {
  moe_plan p = moe_routing_plan(r);
  int64_t n = p.rows, kept = 0;
  moe_tensor *keep = moe_empty(1, &n, MOE_u8, moe_dev(r->plan[0]));
  moe_tensor *by = policy == MOE_DROP_PRIORITY ? priority : r->weight;
  if (priority && (!moe_dtype_is_float(priority->dtype) || moe_numel(priority) != n)) {
    char s[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "routing:limit: the priority is a %s tensor %s, wanted floats [%lld], one an assignment",
                    moe_dtype_name(priority->dtype), moe_shape_of(s, priority), (long long)n);
  }
  moe_tensor *w = by ? moe_dense(by, moe_dtype_compute(by->dtype)) : NULL;
  if (keep == NULL || (by && w == NULL)) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(keep), "routing:limit", route_limit, moe_data(keep), &p, w ? moe_data(w) : NULL,
                  w ? w->dtype : MOE_f32, capacity, policy));
  uint8_t *host = malloc((size_t)MOE_MAX(n, 1));
  if (host == NULL) return moe_fail(MOE_ENOMEM, "out of memory for a routing");
  moe_status st = moe_read(keep, host, MOE_u8);
  for (int64_t i = 0; st == MOE_OK && i < n; i++) kept += host[i];
  entries stay, go;
  if (st == MOE_OK && !(rows_kept(&stay, r, host, true, kept) && rows_kept(&go, r, host, false, n - kept)))
    st = moe_error_code();
  free(host);
  if (st != MOE_OK) return st;
  MOE_TRY(plan_make(out, &stay, p.tokens, false));
  out->dropped = r->dropped + n - kept;
  if (n > kept) {
    out->dropped_token = moe_retain(go.token);
    out->dropped_expert = moe_retain(go.expert);
  }
  out->demand = moe_retain(r->demand ? r->demand : moe_routing_load(r));
  return out->demand ? MOE_OK : moe_error_code();
}

moe_routing *moe_routing_limit(const moe_routing *r, int64_t capacity, moe_drop policy, moe_tensor *priority) {
  if (capacity < 0) {
    moe_fail(MOE_EINVAL, "routing:limit: capacity must not be negative, got %lld", (long long)capacity);
    return NULL;
  }
  if (r->dispatch) {
    moe_fail(MOE_EINVAL, "routing:limit: a soft routing has a fixed number of slots");
    return NULL;
  }
  moe_routing *out = routing_new(r->tokens, r->experts);
  if (out == NULL) return NULL;
  out->weight = moe_retain(r->weight);
  out->mask = moe_retain(r->mask);
  out->masked = r->masked;
  out->none = r->none;
  moe_scope s = moe_scope_open();
  moe_status st = limit(out, r, capacity, policy, priority);
  moe_scope_close(s);
  if (st == MOE_OK) return out;
  moe_routing_free(out);
  return NULL;
}

/* --- some of the experts --- */

/* number [experts]: what an expert is called in `out`, or -1; host: room for four lists of rows */
static moe_status pick_rows(moe_routing *out, const moe_routing *r, const int64_t *number, int64_t *host) {
  moe_plan p = moe_routing_plan(r);
  int64_t n = p.rows, *token = host, *source = host + n, *expert = host + 2 * n, *slot = host + 3 * n;
  moe_tensor *experts = moe_routing_expert(r, 0);
  if (experts == NULL) return moe_error_code();
  MOE_TRY(moe_read(experts, expert, MOE_i64));
  MOE_TRY(moe_read(r->plan[MOE_PLAN_TOKEN], token, MOE_i64));
  MOE_TRY(moe_read(r->plan[MOE_PLAN_SOURCE], source, MOE_i64));
  MOE_TRY(moe_read(r->plan[MOE_PLAN_SLOT], slot, MOE_i64));
  /* in the order in which tokens add up their rows, so that sums of all experts stay as they were to the bit */
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++)
    if (number[expert[slot[i]]] >= 0) slot[at++] = slot[i];
  int64_t *column = malloc((size_t)(at + 1) * sizeof *column);
  if (column == NULL) return moe_fail(MOE_ENOMEM, "out of memory for a routing");
  entries e = {.rows = at};
  moe_status st = entries_room(&e, at, moe_dev(experts)) ? MOE_OK : moe_error_code();
  for (int64_t i = 0; i < at; i++) column[i] = token[slot[i]];
  if (st == MOE_OK) st = moe_write(e.token, column, MOE_i64);
  for (int64_t i = 0; i < at; i++) column[i] = source[slot[i]];
  if (st == MOE_OK) st = moe_write(e.source, column, MOE_i64);
  for (int64_t i = 0; i < at; i++) column[i] = number[expert[slot[i]]];
  if (st == MOE_OK) st = moe_write(e.expert, column, MOE_i64);
  free(column);
  return st == MOE_OK ? plan_make(out, &e, p.tokens, true) : st;
}

moe_routing *moe_routing_pick(const moe_routing *r, const int64_t *pick, int64_t n) {
  moe_plan p = moe_routing_plan(r);
  if (n < 1) {
    moe_fail(MOE_EINVAL, "routing:pick: the list names no expert");
    return NULL;
  }
  moe_routing *out = routing_new(p.tokens, n);
  int64_t *number = malloc((size_t)(r->experts + 4 * p.rows) * sizeof *number);
  moe_status st = out && number ? MOE_OK : moe_fail(MOE_ENOMEM, "out of memory for a routing");
  for (int64_t e = 0; st == MOE_OK && e < r->experts; e++) number[e] = -1;
  for (int64_t i = 0; st == MOE_OK && i < n; i++) {
    if (pick[i] < 0 || pick[i] >= r->experts)
      st = moe_fail(MOE_EINVAL, "routing:pick: expert %lld at position %lld is none of the %lld", (long long)pick[i] + 1,
                    (long long)i + 1, (long long)r->experts);
    else if (number[pick[i]] >= 0)
      st = moe_fail(MOE_EINVAL, "routing:pick: expert %lld is named twice", (long long)pick[i] + 1);
    else
      number[pick[i]] = i;
  }
  moe_scope s = moe_scope_open();
  if (st == MOE_OK) {
    out->weight = moe_retain(r->weight);
    out->mask = r->dispatch ? NULL : moe_retain(r->mask);
    st = pick_rows(out, r, number, number + r->experts);
  }
  moe_scope_close(s);
  free(number);
  if (st == MOE_OK) return out;
  moe_routing_free(out);
  return NULL;
}

/* --- reading --- */

moe_tensor *moe_routing_load(const moe_routing *r) {
  moe_plan p = moe_routing_plan(r);
  moe_tensor *t = list_new(r->experts, moe_dev(r->plan[0]));
  if (t == NULL || MOE_RUN(moe_dev(t), "routing:load", route_load, moe_data_i64(t), &p) != MOE_OK) return NULL;
  return t;
}

/* A host copy of a list, to be freed. */
static int64_t *host_list(moe_tensor *list, int64_t extra) {
  int64_t n = moe_numel(list), *v = malloc((size_t)(n + extra + 1) * sizeof *v);
  if (v == NULL) {
    moe_fail(MOE_ENOMEM, "out of memory for a list of a routing");
    return NULL;
  }
  if (moe_read(list, v, MOE_i64) == MOE_OK) return v;
  free(v);
  return NULL;
}

static moe_tensor *device_list(int64_t *v, int64_t n, moe_device *dev) {
  moe_tensor *t = list_new(n, dev);
  if (t != NULL && moe_write(t, v, MOE_i64) != MOE_OK) t = NULL;
  free(v);
  return t;
}

moe_tensor *moe_routing_list(moe_tensor *list, int base) {
  int64_t *v = host_list(list, 0), n = moe_numel(list);
  if (v == NULL) return NULL;
  for (int64_t i = 0; i < n; i++) v[i] += base;
  return device_list(v, n, moe_dev(list));
}

moe_tensor *moe_routing_expert(const moe_routing *r, int base) {
  moe_plan p = moe_routing_plan(r);
  int64_t *expert = host_list(r->plan[MOE_PLAN_EXPERT], 0), *start = host_list(r->plan[MOE_PLAN_START], 0);
  int64_t *v = malloc((size_t)(p.rows + 1) * sizeof *v);
  if (v == NULL) moe_fail(MOE_ENOMEM, "out of memory for a list of a routing");
  for (int64_t g = 0; v && expert && start && g < p.groups; g++)
    for (int64_t i = start[g]; i < start[g + 1]; i++) v[i] = expert[g] + base;
  bool ok = v && expert && start;
  free(expert);
  free(start);
  if (!ok) free(v);
  return ok ? device_list(v, p.rows, moe_dev(r->plan[0])) : NULL;
}

moe_tensor *moe_routing_offsets(const moe_routing *r, int base) {
  moe_tensor *load = moe_routing_load(r);
  int64_t *v = load ? host_list(load, 1) : NULL, at = base;
  if (v == NULL) return NULL;
  for (int64_t e = 0; e < r->experts; e++) {
    int64_t n = v[e];
    v[e] = at;
    at += n;
  }
  v[r->experts] = at;
  return device_list(v, r->experts + 1, moe_dev(load));
}

moe_tensor *moe_routing_importance(const moe_routing *r) {
  moe_plan p = moe_routing_plan(r);
  moe_tensor *t = moe_zeros(1, &r->experts, MOE_f64, moe_dev(r->plan[0])), *experts = moe_routing_expert(r, 0);
  int64_t n = r->weight ? moe_numel(r->weight) : 0, E = r->experts;
  double *sum = calloc((size_t)E, sizeof *sum), *weight = malloc((size_t)(n + 1) * sizeof *weight);
  int64_t *expert = experts ? host_list(experts, 0) : NULL, *source = host_list(r->plan[MOE_PLAN_SOURCE], 0);
  bool ok = t && sum && weight && expert && source;
  if (!sum || !weight) moe_fail(MOE_ENOMEM, "out of memory for the statistics of a routing");
  if (ok && r->weight) ok = moe_read(r->weight, weight, MOE_f64) == MOE_OK;
  for (int64_t i = 0; ok && i < p.rows; i++) sum[expert[i]] += r->weight ? weight[source[i]] : 1;
  if (ok) ok = moe_write(t, sum, MOE_f64) == MOE_OK;
  free(sum);
  free(weight);
  free(expert);
  free(source);
  return ok ? moe_to_raw(t, MOE_f32, moe_dev(t)) : NULL;
}
