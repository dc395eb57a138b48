/* Routing on the CPU: the lists of a plan, and the top-k router. Sorting is serial: it touches a few numbers an
** assignment, the experts a few thousand. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/radix.h"
#include "cpu/vmath.h"

enum { SCRATCH = 6 }; /* the scratch slot of these kernels */
enum { FAILED_MEMORY = 1, FAILED_RANGE, FAILED_WILD, FAILED_MASKED };

typedef struct router_job {
  const moe_topk_options *o;
  void *weight, *score; /* what the forward writes ... */
  int64_t *index;
  const void *saved_weight, *saved_score; /* ... and the backward reads */
  const int64_t *saved_index;
  void *glogits;
  const void *logits, *bias, *gweight, *gscore;
  const uint8_t *mask;
  int64_t base;
  atomic_int failed;
} router_job;

#define REAL float
#define R(x) x##_f32
#define VM1(name) VM(name, f32)
#include "cpu/route_real.h"
#undef REAL
#undef R
#undef VM1

#define REAL double
#define R(x) x##_f64
#define VM1(name) VM(name, f64)
#include "cpu/route_real.h"
#undef REAL
#undef R
#undef VM1

static moe_status router_run(router_job *j, moe_range_fn *fn, moe_dtype dt) {
  moe_parallel_range(j->o->tokens, MOE_MAX(1, MOE_GRAIN / MOE_MAX(1, j->o->experts)), fn, j);
  if (j->failed == FAILED_RANGE)
    return moe_fail(MOE_EINVAL, "router_topk: choice has a value outside of %lld to %lld", (long long)j->base,
                    (long long)(j->base + j->o->experts - 1));
  if (j->failed == FAILED_WILD || j->failed == FAILED_MASKED)
    return dt == MOE_f64 ? explain_f64(j) : explain_f32(j);
  return j->failed ? moe_fail(MOE_ENOMEM, "out of memory for the router's scratch space") : MOE_OK;
}

moe_status MOE_CPU(router_topk)(void *weight, int64_t *index, void *score, const void *logits, const void *bias,
                                const uint8_t *mask, const moe_topk_options *o, moe_dtype dt, int64_t base) {
  router_job j = {.o = o,
                  .weight = weight,
                  .index = index,
                  .score = score,
                  .logits = logits,
                  .bias = bias,
                  .mask = mask,
                  .base = base};
  return router_run(&j, dt == MOE_f64 ? topk_rows_f64 : topk_rows_f32, dt);
}

moe_status MOE_CPU(router_topk_bwd)(void *glogits, const void *gweight, const void *gscore, const void *score,
                                    const void *weight, const int64_t *index, const uint8_t *mask,
                                    const moe_topk_options *o, moe_dtype dt, int64_t base) {
  router_job j = {.o = o,
                  .glogits = glogits,
                  .gweight = gweight,
                  .gscore = gscore,
                  .saved_score = score,
                  .saved_weight = weight,
                  .saved_index = index,
                  .mask = mask,
                  .base = base};
  return router_run(&j, dt == MOE_f64 ? topk_rows_bwd_f64 : topk_rows_bwd_f32, dt);
}

/* --- lists --- */

static inline bool gate_on(const void *gates, moe_dtype dt, int64_t i) {
  return dt == MOE_f64 ? ((const double *)gates)[i] != 0 : ((const float *)gates)[i] != 0;
}

moe_status MOE_CPU(route_entries)(int64_t *token, int64_t *expert, int64_t *source, int64_t *rows,
                                  int64_t *masked, int64_t *none, const void *from, moe_dtype dt,
                                  const uint8_t *mask, int64_t outer, int64_t inner, int64_t limit,
                                  moe_choice kind, int64_t base) {
  int64_t n = 0;
  *masked = *none = 0;
  for (int64_t o = 0; o < outer; o++) {
    for (int64_t i = 0; i < inner; i++) {
      int64_t at = o * inner + i, value = i;
      if (kind == MOE_CHOICE_DENSE) {
        if (!gate_on(from, dt, at)) continue;
      } else {
        value = ((const int64_t *)from)[at] - base;
        if (value < -1 || value >= limit)
          return moe_fail(MOE_EINVAL, "index [%lld, %lld] is %lld; wanted %lld to %lld, or %lld for none",
                          (long long)o + 1, (long long)i + 1, (long long)(value + base), (long long)base,
                          (long long)(limit - 1 + base), (long long)base - 1);
      }
      int64_t t = kind == MOE_CHOICE_EXPERT ? value : o;
      if (mask && t >= 0 && !mask[t]) {
        ++*masked;
        continue;
      }
      if (value < 0) {
        ++*none;
        continue;
      }
      token[n] = t;
      expert[n] = kind == MOE_CHOICE_EXPERT ? o : value;
      source[n++] = at;
    }
  }
  *rows = n;
  return MOE_OK;
}

moe_status MOE_CPU(route_sort)(moe_plan *p, const int64_t *token, const int64_t *expert, const int64_t *source,
                               bool ordered) {
  int64_t n = p->rows, buckets = MOE_MAX(moe_radix_buckets(n, p->experts), moe_radix_buckets(n, p->tokens));
  int64_t bytes = (3 * n + buckets) * (int64_t)sizeof(int64_t);
  int64_t *room = moe_scratch(SCRATCH, bytes);
  if (room == NULL) return moe_fail(MOE_ENOMEM, "out of memory for the lists of a routing");
  int64_t *first = room, *perm = room + n, *spare = room + 2 * n, *count = room + 3 * n;
  const int64_t *by_token = NULL; /* entries in order of token */
  if (!ordered) {
    moe_radix_sort(first, spare, NULL, token, n, p->tokens, count);
    by_token = first;
  }
  /* a position within the order of tokens, for each row */
  moe_radix_sort(perm, spare, by_token, expert, n, p->experts, count);
  p->groups = 0;
  for (int64_t r = 0; r < n; r++) {
    int64_t i = perm[r];
    p->token[r] = token[i];
    p->source[r] = source[i];
    if (r == 0 || expert[i] != p->expert[p->groups - 1]) {
      p->expert[p->groups] = expert[i];
      p->start[p->groups++] = r;
    }
    spare[i] = r;
  }
  p->start[p->groups] = n;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t j = by_token ? by_token[i] : i;
    while (at <= token[j]) p->row_start[at++] = i;
    p->slot[i] = spare[j];
  }
  while (at <= p->tokens) p->row_start[at++] = n;
  return MOE_OK;
}

typedef struct wanted {
  double weight;
  int64_t row;
} wanted;

static int by_weight(const void *pa, const void *pb) {
  const wanted *a = pa, *b = pb;
  if (a->weight != b->weight) return a->weight > b->weight ? -1 : 1;
  return a->row < b->row ? -1 : 1;
}

moe_status MOE_CPU(route_limit)(uint8_t *keep, const moe_plan *p, const void *weight, moe_dtype dt,
                                int64_t capacity, moe_drop policy) {
  int64_t most = 0;
  for (int64_t g = 0; g < p->groups; g++) most = MOE_MAX(most, p->start[g + 1] - p->start[g]);
  wanted *list = most > capacity ? malloc((size_t)most * sizeof *list) : NULL;
  if (most > capacity && list == NULL) return moe_fail(MOE_ENOMEM, "out of memory");
  for (int64_t g = 0; g < p->groups; g++) {
    int64_t r0 = p->start[g], n = p->start[g + 1] - r0;
    memset(keep + r0, n <= capacity, (size_t)n);
    if (n <= capacity) continue;
    for (int64_t i = 0; i < n; i++) {
      int64_t s = policy == MOE_DROP_PRIORITY ? r0 + i : p->source[r0 + i];
      double w = policy == MOE_DROP_POSITION || weight == NULL ? 0
                 : dt == MOE_f64                               ? ((const double *)weight)[s]
                                                               : (double)((const float *)weight)[s];
      list[i] = (wanted){w == w ? w : -(double)INFINITY, r0 + i};
    }
    if (policy != MOE_DROP_POSITION) qsort(list, (size_t)n, sizeof *list, by_weight);
    for (int64_t i = 0; i < capacity; i++) keep[list[i].row] = 1;
  }
  free(list);
  return MOE_OK;
}

moe_status MOE_CPU(route_load)(int64_t *count, const moe_plan *p) {
  memset(count, 0, (size_t)p->experts * sizeof *count);
  for (int64_t g = 0; g < p->groups; g++) count[p->expert[g]] = p->start[g + 1] - p->start[g];
  return MOE_OK;
}
