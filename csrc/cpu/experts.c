/* Expert networks over a routing's plan: how the work is cut, and the slots. The arithmetic is in experts_real.h. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vmath.h"

enum {
  SCRATCH = 7,        /* the scratch slot of these kernels */
  TILE_ROWS = 256,    /* rows of a tile, or half as many again: packing the weights then costs 1/256 of a product */
  TILE_LEAST = 32,    /* ... and at least, where the whole routing is small */
  WHOLE_ROWS = 512,   /* an expert with more rows is cut in the backward */
  THIN_SCRATCH = 5,   /* ... and of their products */
  THIN_ROWS = 160,    /* products of at most so many rows are cheaper without packing the weights */
  FINE_HIDDEN = 32,   /* experts of at most so many units ... */
  FINE_SHARE = 4,     /* ... and so many a token are added up token by token, */
  FINE_TOKENS = 256,  /* in tiles of so many tokens */
  STRIPE_ROWS = 512,  /* rows gathered at a time for a stripe of weight gradients */
  TASK_MACS = 1 << 20 /* small experts share a task up to so many multiplications */
};

typedef struct ffn_task {
  int64_t g0, g1; /* groups [g0, g1), ... */
  int64_t r0, r1; /* ... or, of group g0 alone, rows [r0, r1), or hidden units */
  int64_t at;     /* where the group's hidden gradients begin, in rows; -1: the groups are taken whole */
  int64_t cost;
} ffn_task;

typedef struct ffn_job {
  const moe_ffn *f;
  ffn_task *task;
  atomic_int failed;  /* out of scratch */
  void *y, *gx;       /* [rows, d] */
  void *h;            /* the forward's [rows, F], or NULL */
  const void *hidden; /* the same, as the backward reads it */
  const void *gy;
  void *gw_in, *gw_out, *gb_in, *gb_out, *gweight;
  void *dh, *wa; /* [rows of cut experts, F], [.., I] */
  void *w_t;     /* fine: w_out transposed, [groups, I, d_out] */
} ffn_job;

typedef struct rows_job {
  const moe_plan *plan;
  void *y;
  const void *x, *weight;
  int64_t d;
} rows_job;

typedef struct linear_job {
  const moe_plan *plan;
  ffn_task *task;
  void *y, *gx, *gw, *gb;
  const void *x, *w, *b, *g;
  int64_t n, k;
} linear_job;

#define REAL float
#define REAL_BYTES 4
#define R(x) x##_f32
#define VM1(name) VM(name, f32)
#define GEMM moe_gemm_f32
#include "cpu/thin_real.h"
#include "cpu/experts_real.h"
#include "cpu/experts_fine_real.h"
#undef REAL
#undef REAL_BYTES
#undef R
#undef VM1
#undef GEMM

#define REAL double
#define REAL_BYTES 8
#define R(x) x##_f64
#define VM1(name) VM(name, f64)
#define GEMM moe_gemm_f64
#include "cpu/thin_real.h"
#include "cpu/experts_real.h"
#include "cpu/experts_fine_real.h"
#undef REAL
#undef REAL_BYTES
#undef R
#undef VM1
#undef GEMM

#define BY_TYPE(dt, name, ...) ((dt) == MOE_f64 ? name##_f64(__VA_ARGS__) : name##_f32(__VA_ARGS__))

/* --- cutting --- */

/* Rows of a tile when the plan has `rows` in all: about eight tiles of a small layer, so that threads stay even. */
static int64_t tile_target(int64_t rows) { return MOE_MIN(TILE_ROWS, MOE_MAX(TILE_LEAST, rows / 8)); }

static int64_t tiles_of(int64_t n, int64_t target) { return MOE_MAX(1, (n + target / 2) / target); }

/* An expert with most of the rows would keep one thread alone at work. */
static bool is_cut(int64_t n, int64_t rows) { return n > WHOLE_ROWS || (n > TILE_LEAST && n > rows / 6); }

static int by_cost(const void *pa, const void *pb) {
  const ffn_task *a = pa, *b = pb;
  if (a->cost != b->cost) return a->cost > b->cost ? -1 : 1;
  return a->g0 != b->g0 ? (a->g0 < b->g0 ? -1 : 1) : a->r0 < b->r0 ? -1 : a->r0 > b->r0;
}

typedef struct task_list {
  ffn_task *v;
  int64_t n, room;
} task_list;

static bool add_task(task_list *l, ffn_task t) {
  if (l->n == l->room) {
    int64_t room = l->room ? 2 * l->room : 64;
    ffn_task *v = realloc(l->v, (size_t)room * sizeof *v);
    if (v == NULL) {
      moe_fail(MOE_ENOMEM, "out of memory");
      return false;
    }
    l->v = v;
    l->room = room;
  }
  l->v[l->n++] = t;
  return true;
}

/* Cuts the plan: groups for which `cut` says so into tiles of rows, small neighbours joined, the others whole.
** macs: multiplications a row. cut_rows: rows of all cut groups. Largest first, so that the threads end together. */
static bool make_tasks(task_list *l, const moe_plan *p, int64_t macs, bool always_cut, int64_t *cut_rows) {
  int64_t target = tile_target(p->rows), at = 0;
  ffn_task open = {.g0 = -1};
  for (int64_t g = 0; g < p->groups; g++) {
    int64_t r0 = p->start[g], n = p->start[g + 1] - r0;
    if (always_cut ? n > target : is_cut(n, p->rows)) {
      int64_t tiles = tiles_of(n, target), base = n / tiles, more = n % tiles, r = r0;
      for (int64_t i = 0; i < tiles; i++) {
        int64_t m = base + (i < more);
        if (!add_task(l, (ffn_task){g, g + 1, r, r + m, at, m * macs})) return false;
        r += m;
      }
      at += n;
      continue;
    }
    if (open.g0 >= 0 && open.g1 == g && open.cost + n * macs <= TASK_MACS) {
      open.g1 = g + 1;
      open.cost += n * macs;
      continue;
    }
    if (open.g0 >= 0 && !add_task(l, open)) return false;
    open = (ffn_task){g, g + 1, 0, 0, -1, n * macs};
  }
  if (open.g0 >= 0 && !add_task(l, open)) return false;
  if (cut_rows) *cut_rows = at;
  if (l->n > 1) qsort(l->v, (size_t)l->n, sizeof *l->v, by_cost);
  return true;
}

/* Stripes of `width` units for every cut group. */
static bool make_stripes(task_list *l, const moe_plan *p, int64_t units, int64_t macs, bool always) {
  int64_t at = 0;
  for (int64_t g = 0; g < p->groups; g++) {
    int64_t n = p->start[g + 1] - p->start[g];
    if (!always && !is_cut(n, p->rows)) continue;
    int64_t count = MOE_MAX(1, MOE_MIN(8, units / 64));
    if (n * units * macs < 2 * TASK_MACS) count = 1;
    for (int64_t i = 0; i < count; i++) {
      int64_t i0 = units * i / count, i1 = units * (i + 1) / count;
      if (!add_task(l, (ffn_task){g, g + 1, i0, i1, at, n * (i1 - i0)})) return false;
    }
    at += n;
  }
  if (l->n > 1) qsort(l->v, (size_t)l->n, sizeof *l->v, by_cost);
  return true;
}

/* Zeroes the parts of [experts, bytes] that belong to experts without rows. */
static void zero_idle(void *base, const moe_plan *p, int64_t bytes) {
  if (base == NULL) return;
  int64_t e = 0;
  for (int64_t g = 0; g <= p->groups; g++) {
    int64_t next = g < p->groups ? p->expert[g] : p->experts;
    if (next > e) memset((char *)base + e * bytes, 0, (size_t)((next - e) * bytes));
    e = next + 1;
  }
}

static moe_status finish(const ffn_job *job) {
  return job->failed ? moe_fail(MOE_ENOMEM, "out of memory for the scratch space of an expert") : MOE_OK;
}

/* --- forward --- */

static void fwd_task(void *arg, int64_t i, int worker) {
  (void)worker;
  ffn_job *job = arg;
  const ffn_task *t = job->task + i;
  const moe_plan *p = &job->f->plan;
  if (t->at >= 0)
    BY_TYPE(job->f->dtype, fwd_tile, job, t->g0, t->r0, t->r1);
  else
    for (int64_t g = t->g0; g < t->g1; g++)
      BY_TYPE(job->f->dtype, fwd_tile, job, g, p->start[g], p->start[g + 1]);
}

static void run_rows(moe_range_fn *fn, rows_job *j, int64_t n, int64_t elements) {
  int64_t each = MOE_MAX(1, elements / MOE_MAX(1, n)); /* elements touched a step */
  moe_parallel_range(n, MOE_MAX(1, MOE_GRAIN / each), fn, j);
}

/* --- narrow experts in large number (experts_fine_real.h) --- */

static bool is_fine(const moe_ffn *f) {
  const moe_plan *p = &f->plan;
  if (p->dense || f->hidden > FINE_HIDDEN || p->rows < FINE_SHARE * p->tokens) return false;
  for (int64_t g = 0; g < p->groups; g++) /* a token twice at one expert would be added to at once */
    for (int64_t r = p->start[g] + 1; r < p->start[g + 1]; r++)
      if (p->token[r] == p->token[r - 1]) return false;
  return true;
}

static int64_t fine_tile(const moe_plan *p) { return MOE_MIN(FINE_TOKENS, MOE_MAX(TILE_LEAST, p->tokens / 8)); }

#define FINE_TASK(name, fn)                                                                        \
  static void name(void *arg, int64_t i, int worker) {                                             \
    (void)worker;                                                                                  \
    ffn_job *job = arg;                                                                            \
    int64_t tile = fine_tile(&job->f->plan), t0 = i * tile;                                        \
    BY_TYPE(job->f->dtype, fn, job, t0, MOE_MIN(t0 + tile, job->f->plan.tokens));                  \
  }
FINE_TASK(fine_fwd_task, fine_fwd)
FINE_TASK(fine_bwd_task, fine_bwd)

/* fn over all tiles of tokens, with the transposed output weights at hand. */
static moe_status fine_run(ffn_job *job, moe_task_fn *fn) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t matrix = f->hidden * f->d_out, bytes = p->groups * matrix * moe_dtype_size(f->dtype);
  if ((job->w_t = moe_mem_alloc(moe_cpu(), bytes)) == NULL && bytes > 0) return moe_error_code();
  moe_parallel_range(p->groups, MOE_MAX(1, MOE_GRAIN / MOE_MAX(1, matrix)),
                     f->dtype == MOE_f64 ? fine_transpose_f64 : fine_transpose_f32, job);
  int64_t tile = fine_tile(p);
  moe_parallel((p->tokens + tile - 1) / tile, fn, job);
  moe_mem_free(moe_cpu(), job->w_t, bytes);
  return finish(job);
}

moe_status MOE_CPU(ffn)(void *y, void *h, const moe_ffn *f) {
  const moe_plan *p = &f->plan;
  int64_t size = moe_dtype_size(f->dtype), bytes = p->rows * f->d_out * size;
  ffn_job job = {.f = f, .h = h, .y = y};
  task_list tasks = {0};
  moe_status st = MOE_OK;
  if (is_fine(f)) return fine_run(&job, fine_fwd_task);
  if (!p->dense && (job.y = moe_mem_alloc(moe_cpu(), bytes)) == NULL && bytes > 0) return moe_error_code();
  if (make_tasks(&tasks, p, f->hidden * (f->d_in * (f->gated ? 2 : 1) + f->d_out), true, NULL)) {
    job.task = tasks.v;
    moe_parallel(tasks.n, fwd_task, &job);
    st = finish(&job);
    if (st == MOE_OK && !p->dense) {
      rows_job c = {p, y, job.y, f->weight, f->d_out};
      run_rows(f->dtype == MOE_f64 ? combine_f64 : combine_f32, &c, p->tokens,
               (p->rows + p->tokens) * f->d_out);
    }
  } else {
    st = moe_error_code();
  }
  if (!p->dense) moe_mem_free(moe_cpu(), job.y, bytes);
  free(tasks.v);
  return st;
}

/* --- backward --- */

/* The backward of narrow experts: dh and wa for all rows, then the weights of each expert. */
static moe_status fine_backward(ffn_job *job) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t size = moe_dtype_size(f->dtype), I = f->hidden, F = f->gated ? 2 * I : I;
  int64_t dh_bytes = p->rows * F * size, wa_bytes = p->rows * I * size;
  moe_status st = MOE_ENOMEM;
  job->dh = moe_mem_alloc(moe_cpu(), dh_bytes);
  job->wa = moe_mem_alloc(moe_cpu(), wa_bytes);
  if (job->dh && job->wa) st = fine_run(job, fine_bwd_task);
  if (st == MOE_OK && (job->gw_in || job->gw_out || job->gb_in || job->gb_out)) {
    int64_t macs = p->rows / MOE_MAX(1, p->groups) * (F * f->d_in + I * f->d_out); /* of an expert, about */
    moe_parallel_range(p->groups, MOE_MAX(1, TASK_MACS / MOE_MAX(1, macs)),
                       f->dtype == MOE_f64 ? fine_weights_f64 : fine_weights_f32, job);
    st = finish(job);
  }
  if (job->dh) moe_mem_free(moe_cpu(), job->dh, dh_bytes);
  if (job->wa) moe_mem_free(moe_cpu(), job->wa, wa_bytes);
  return st;
}

static void bwd_task(void *arg, int64_t i, int worker) {
  (void)worker;
  ffn_job *job = arg;
  const ffn_task *t = job->task + i;
  if (t->at >= 0)
    BY_TYPE(job->f->dtype, bwd_part, job, t->g0, t->r0, t->r1, t->at + (t->r0 - job->f->plan.start[t->g0]));
  else
    for (int64_t g = t->g0; g < t->g1; g++) BY_TYPE(job->f->dtype, bwd_whole, job, g);
}

static void stripe_task(void *arg, int64_t i, int worker) {
  (void)worker;
  ffn_job *job = arg;
  const ffn_task *t = job->task + i;
  BY_TYPE(job->f->dtype, bwd_stripe, job, t->g0, t->r0, t->r1, t->at);
}

moe_status MOE_CPU(ffn_bwd)(void *gx, void *gw_in, void *gw_out, void *gb_in, void *gb_out, void *gweight,
                            int64_t nweight, const void *gy, const void *h, const moe_ffn *f) {
  const moe_plan *p = &f->plan;
  int64_t size = moe_dtype_size(f->dtype), I = f->hidden, F = f->gated ? 2 * I : I;
  int64_t macs = I * (f->d_in * (f->gated ? 2 : 1) + f->d_out), cut_rows = 0, gx_bytes = 0;
  ffn_job job = {.f = f,
                 .hidden = h,
                 .gy = gy,
                 .gx = gx,
                 .gw_in = gw_in,
                 .gw_out = gw_out,
                 .gb_in = gb_in,
                 .gb_out = gb_out,
                 .gweight = gweight};
  task_list tasks = {0}, stripes = {0};
  moe_status st = MOE_ENOMEM;
  zero_idle(gw_in, p, F * f->d_in * size);
  zero_idle(gw_out, p, f->d_out * I * size);
  zero_idle(gb_in, p, F * size);
  zero_idle(gb_out, p, f->d_out * size);
  if (gweight) memset(gweight, 0, (size_t)(nweight * size));

  if (is_fine(f)) return fine_backward(&job);
  if (!make_tasks(&tasks, p, 2 * macs, false, &cut_rows)) goto done;
  if (gx && !p->dense) {
    gx_bytes = p->rows * f->d_in * size;
    if ((job.gx = moe_mem_alloc(moe_cpu(), gx_bytes)) == NULL && gx_bytes > 0) goto done;
  }
  if (cut_rows > 0) {
    if ((job.dh = moe_mem_alloc(moe_cpu(), cut_rows * F * size)) == NULL) goto done;
    if ((job.wa = moe_mem_alloc(moe_cpu(), cut_rows * I * size)) == NULL) goto done;
  }
  job.task = tasks.v;
  moe_parallel(tasks.n, bwd_task, &job);
  if ((st = finish(&job)) != MOE_OK) goto done;
  if (cut_rows > 0 && (gw_in || gw_out || gb_in || gb_out)) {
    st = MOE_ENOMEM;
    if (!make_stripes(&stripes, p, I, f->d_in + f->d_out, false)) goto done;
    job.task = stripes.v;
    moe_parallel(stripes.n, stripe_task, &job);
    if ((st = finish(&job)) != MOE_OK) goto done;
  }
  if (gx && !p->dense) {
    rows_job c = {p, gx, job.gx, NULL, f->d_in};
    run_rows(f->dtype == MOE_f64 ? combine_f64 : combine_f32, &c, p->tokens, (p->rows + p->tokens) * f->d_in);
  }
done:
  if (job.dh) moe_mem_free(moe_cpu(), job.dh, cut_rows * F * size);
  if (job.wa) moe_mem_free(moe_cpu(), job.wa, cut_rows * I * size);
  if (job.gx != gx) moe_mem_free(moe_cpu(), job.gx, gx_bytes);
  free(tasks.v);
  free(stripes.v);
  return st;
}

/* --- rows and tokens --- */

moe_status MOE_CPU(route_gather)(void *y, const void *x, const void *weight, const moe_plan *p, int64_t d,
                                 moe_dtype dt) {
  rows_job j = {p, y, x, weight, d};
  run_rows(dt == MOE_f64 ? gather_f64 : gather_f32, &j, p->rows, p->rows * d);
  return MOE_OK;
}

moe_status MOE_CPU(route_combine)(void *y, const void *x, const void *weight, const moe_plan *p, int64_t d,
                                  moe_dtype dt) {
  rows_job j = {p, y, x, weight, d};
  run_rows(dt == MOE_f64 ? combine_f64 : combine_f32, &j, p->tokens, (p->rows + p->tokens) * d);
  return MOE_OK;
}

moe_status MOE_CPU(route_dots)(void *gweight, int64_t nweight, const void *a, const void *b, const moe_plan *p,
                               int64_t d, moe_dtype dt) {
  memset(gweight, 0, (size_t)(nweight * moe_dtype_size(dt)));
  rows_job j = {p, gweight, a, b, d};
  run_rows(dt == MOE_f64 ? dots_f64 : dots_f32, &j, p->rows, p->rows * d);
  return MOE_OK;
}

/* --- grouped linear --- */

/* Runs fn over the rows of each task's groups. */
#define LINEAR_TASK(name, fn)                                                                     \
  static void name(void *arg, int64_t i, int worker) {                                            \
    (void)worker;                                                                                 \
    linear_job *j = arg;                                                                          \
    const ffn_task *t = j->task + i;                                                              \
    if (t->at >= 0)                                                                               \
      fn(j, t->g0, t->r0, t->r1);                                                                 \
    else                                                                                          \
      for (int64_t g = t->g0; g < t->g1; g++) fn(j, g, j->plan->start[g], j->plan->start[g + 1]); \
  }
LINEAR_TASK(linear_fwd_task_f32, linear_fwd_f32)
LINEAR_TASK(linear_fwd_task_f64, linear_fwd_f64)
LINEAR_TASK(linear_gx_task_f32, linear_gx_f32)
LINEAR_TASK(linear_gx_task_f64, linear_gx_f64)
LINEAR_TASK(linear_gw_task_f32, linear_gw_f32)
LINEAR_TASK(linear_gw_task_f64, linear_gw_f64)

moe_status MOE_CPU(grouped_linear)(void *y, const void *x, const void *w, const void *b, const moe_plan *p,
                                   int64_t n, int64_t k, moe_dtype dt) {
  linear_job j = {.plan = p, .y = y, .x = x, .w = w, .b = b, .n = n, .k = k};
  task_list tasks = {0};
  bool ok = make_tasks(&tasks, p, n * k, true, NULL);
  j.task = tasks.v;
  if (ok) moe_parallel(tasks.n, dt == MOE_f64 ? linear_fwd_task_f64 : linear_fwd_task_f32, &j);
  free(tasks.v);
  return ok ? MOE_OK : moe_error_code();
}

moe_status MOE_CPU(grouped_linear_bwd)(void *gx, void *gw, void *gb, const void *g, const void *x,
                                       const void *w, const moe_plan *p, int64_t n, int64_t k, moe_dtype dt) {
  linear_job j = {.plan = p, .gx = gx, .gw = gw, .gb = gb, .g = g, .x = x, .w = w, .n = n, .k = k};
  task_list tasks = {0}, stripes = {0};
  bool ok = true;
  zero_idle(gw, p, n * k * moe_dtype_size(dt));
  zero_idle(gb, p, n * moe_dtype_size(dt));
  if (gx && (ok = make_tasks(&tasks, p, n * k, true, NULL))) {
    j.task = tasks.v;
    moe_parallel(tasks.n, dt == MOE_f64 ? linear_gx_task_f64 : linear_gx_task_f32, &j);
  }
  if (ok && (gw || gb) && (ok = make_stripes(&stripes, p, n, k, true))) {
    j.task = stripes.v;
    moe_parallel(stripes.n, dt == MOE_f64 ? linear_gw_task_f64 : linear_gw_task_f32, &j);
  }
  free(tasks.v);
  free(stripes.v);
  return ok ? MOE_OK : moe_error_code();
}
