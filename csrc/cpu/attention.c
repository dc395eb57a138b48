/* Scaled dot-product attention in blocks: a task holds the scores of one block of queries with one block of keys,
** never the T x S matrix. What it holds at a time, whatever T and S are (head width d, values dv, elements):
**   forward   KEYS (d + dv) packed keys and values, FORWARD (d + dv + 2) queries and results, QUERIES KEYS scores
**   backward  KEYS (3 d + 2 dv) keys, values and their gradients, QUERIES (2 d + dv) queries, 2 QUERIES KEYS scores; where
**             batch x key-value heads are fewer than SPLITS, also SPLITS h ROUND d parts of dq
** Besides the results, the op keeps one number a query (the logarithm of the sum of its exponentials). */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vmath.h"
#include "tensor/attention.h"

enum {
  QUERIES = 64,  /* rows of a block of scores, */
  KEYS = 256,    /* and its columns: with keys and values it fits a second-level cache */
  FORWARD = 256, /* queries of a task forward, which share the packed keys, */
  ENOUGH = 16,   /* unless that made fewer tasks than this */
  SPLITS = 8,    /* tasks backward at least, where the keys are enough: parts of the keys of a head take turns, */
  ROUND = 1024   /* and their parts of dq are added up after so many queries */
};

enum { SCRATCH = 0, SCRATCH_DQ = 3, SCRATCH_RELATIVE = 5 }; /* slots; the last two hold for the length of the kernel */

typedef struct attention_job {
  const moe_attention *a;
  const moe_attention_grads *g;
  int64_t count;                /* forward: queries of a task */
  int64_t splits, first, last;  /* backward: parts of the keys, queries of this round */
  void *part;                   /* [splits, b, h, last - first, d] of dq, or NULL: straight into dq */
  void *relative;               /* [splits, b, h, 2 reach - 1] */
  atomic_bool short_of_memory;
} attention_job;

/* Keys that query i sees: [*from, *to). seen: of its head [t], or NULL. */
static inline void keys_of(const moe_attention *a, const int64_t *seen, int64_t i, int64_t *from, int64_t *to) {
  *from = a->span[i].from;
  *to = seen && seen[i] < a->span[i].to ? MOE_MAX(seen[i], *from) : a->span[i].to;
}

static inline const int64_t *seen_of(const moe_attention *a, int64_t b, int64_t h) {
  return a->seen ? a->seen + (b * a->h + h) * a->t : NULL;
}

/* Keys that any of the queries [q0, q1) sees. */
static void keys_of_all(const moe_attention *a, const int64_t *seen, int64_t q0, int64_t q1, int64_t *from, int64_t *to) {
  *from = a->s, *to = 0;
  for (int64_t i = q0; i < q1; i++) {
    int64_t lo, hi;
    keys_of(a, seen, i, &lo, &hi);
    if (lo >= hi) continue;
    *from = MOE_MIN(*from, lo);
    *to = MOE_MAX(*to, hi);
  }
}

#define REAL float
#define R(x) x##_f32
#define GEMM moe_gemm_f32
#define EXP vm_exp_soft_f32
#define LOG logf
#include "cpu/attention_real.h"
#undef REAL
#undef R
#undef GEMM
#undef EXP
#undef LOG

#define REAL double
#define R(x) x##_f64
#define GEMM moe_gemm_f64
#define EXP exp
#define LOG log
#include "cpu/attention_real.h"

static moe_status finished(const attention_job *j) {
  return j->short_of_memory ? moe_fail(MOE_ENOMEM, "attention: no memory for a block of scores") : MOE_OK;
}

moe_status MOE_CPU(attention)(const moe_attention *a) {
  bool wide = a->dtype == MOE_f64;
  attention_job j = {.a = a, .count = FORWARD};
  int64_t heads = a->b * a->h, row = MOE_MAX(a->s * (a->d + a->dv), 1);
  if (a->t == 1) {
    moe_parallel_range(heads, MOE_MAX(1, MOE_GRAIN * 8 / row), wide ? one_range_f64 : one_range_f32, &j);
  } else {
    if (heads * ((a->t + FORWARD - 1) / FORWARD) < ENOUGH) j.count = QUERIES;
    int64_t tasks = heads * ((a->t + j.count - 1) / j.count), grain = MOE_MAX(1, MOE_GRAIN * 8 / (MOE_MIN(a->t, j.count) * row));
    moe_parallel_range(tasks, grain, wide ? forward_range_f64 : forward_range_f32, &j);
  }
  return finished(&j);
}

moe_status MOE_CPU(attention_backward)(const moe_attention_grads *g, const moe_attention *a) {
  bool wide = a->dtype == MOE_f64;
  int64_t size = wide ? 8 : 4, heads = a->b * a->hk, blocks = MOE_MAX(1, (a->s + KEYS - 1) / KEYS);
  attention_job j = {.a = a, .g = g, .splits = 1, .last = a->t};
  if (heads > 0 && heads < SPLITS) j.splits = MOE_MIN(blocks, (SPLITS + heads - 1) / heads);
  int64_t round = j.splits > 1 ? ROUND : MOE_MAX(a->t, 1), entries = 2 * a->reach - 1;
  int64_t work = a->h / MOE_MAX(a->hk, 1) * MOE_MIN(a->t, round) * (a->s / j.splits) * (a->d + a->dv);
  int64_t grain = MOE_MAX(1, MOE_GRAIN * 4 / MOE_MAX(work, 1));
  if (g->drelative) {
    int64_t bytes = j.splits * a->b * a->h * entries * size;
    if ((j.relative = moe_scratch(SCRATCH_RELATIVE, bytes)) == NULL) return moe_fail(MOE_ENOMEM, "attention: no memory for gradients");
    memset(j.relative, 0, (size_t)bytes);
  }
  if (j.splits > 1) {
    j.part = moe_scratch(SCRATCH_DQ, j.splits * a->b * a->h * MOE_MIN(a->t, round) * a->d * size);
    if (j.part == NULL) return moe_fail(MOE_ENOMEM, "attention: no memory for gradients");
  }
  for (j.first = 0; j.first < MOE_MAX(a->t, 1); j.first += round) { /* without queries once, for the zeros of dk and dv */
    j.last = MOE_MIN(a->t, j.first + round);
    moe_parallel_range(heads * j.splits, grain, wide ? backward_range_f64 : backward_range_f32, &j);
    if (j.splits > 1)
      moe_parallel_range(a->b * a->h * (j.last - j.first), MOE_MAX(1, MOE_GRAIN / MOE_MAX(j.splits * a->d, 1)),
                         wide ? add_parts_f64 : add_parts_f32, &j);
  }
  if (g->drelative) {
    moe_parallel_range(a->h * entries, MOE_GRAIN, wide ? add_relative_f64 : add_relative_f32, &j);
  }
  return finished(&j);
}
