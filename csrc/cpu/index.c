/* Reading and writing at positions that a tensor gives. Every kernel checks all positions before it writes, and
** results do not depend on the number of threads: whoever writes an element owns it.
*/
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/radix.h"

/* --- bounds --- */

static moe_status out_of_range(int64_t v, int64_t base, int64_t n) {
  if (n == 0) return moe_fail(MOE_EINVAL, "index %lld: the dimension is empty", (long long)v);
  return moe_fail(MOE_EINVAL, "index %lld is outside of %lld..%lld", (long long)v, (long long)base, (long long)(base + n - 1));
}

static moe_status check_row(const int64_t *index, int64_t stride, int64_t count, int64_t base, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < count; i++) bad |= (uint64_t)index[i * stride] - (uint64_t)base >= (uint64_t)n;
  if (!bad) return MOE_OK;
  for (int64_t i = 0; i < count; i++)
    if ((uint64_t)index[i * stride] - (uint64_t)base >= (uint64_t)n) return out_of_range(index[i * stride], base, n);
  return MOE_OK;
}

/* A strided index tensor; repeated dimensions are looked at once. */
static moe_status check_index(const int64_t *index, int ndim, const int64_t *shape, const int64_t *stride, int64_t base, int64_t n) {
  int64_t at[MOE_MAX_DIM] = {0};
  int last = ndim - 1;
  for (int d = 0; d < ndim; d++)
    if (shape[d] == 0) return MOE_OK;
  int64_t count = ndim && stride[last] ? shape[last] : 1;
  for (;;) {
    const int64_t *p = index;
    for (int d = 0; d < last; d++) p += at[d] * stride[d];
    MOE_TRY(check_row(p, ndim ? stride[last] : 1, count, base, n));
    int d = last - 1;
    for (; d >= 0; d--) {
      if (stride[d] != 0 && ++at[d] < shape[d]) break;
      at[d] = 0;
    }
    if (d < 0) return MOE_OK;
  }
}

/* --- whole rows: [outer, n, inner] <-> [outer, k, inner] --- */

typedef struct row_job {
  char *y;
  const char *x;
  const int64_t *index;
  int64_t base, n, k, inner, esize;
  int64_t *order;         /* positions sorted by row: writing only */
  int64_t grain, tasks;   /* sorted positions a task */
} row_job;

#define TAKE(ctype)                                                             \
  do {                                                                          \
    ctype *y = (ctype *)(void *)r->y;                                           \
    const ctype *x = (const ctype *)(const void *)r->x;                         \
    for (int64_t i = begin; i < end; i++)                                       \
      y[i] = x[i / r->k * r->n + (r->index[i % r->k] - r->base)];               \
  } while (0)

static void take_task(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const row_job *r = arg;
  int64_t bytes = r->inner * r->esize;
  if (bytes == 4) TAKE(uint32_t);
  else if (bytes == 8) TAKE(uint64_t);
  else
    for (int64_t i = begin; i < end; i++)
      memcpy(r->y + i * bytes, r->x + (i / r->k * r->n + (r->index[i % r->k] - r->base)) * bytes, (size_t)bytes);
}

moe_status MOE_CPU(rows_take)(void *y, const void *x, const int64_t *index, int64_t base, int64_t outer, int64_t n, int64_t k,
                              int64_t inner, int64_t esize) {
  MOE_TRY(check_row(index, 1, k, base, n));
  row_job r = {.y = y, .x = x, .index = index, .base = base, .n = n, .k = k, .inner = inner, .esize = esize};
  if (outer * k * inner > 0) moe_parallel_range(outer * k, MOE_MAX(MOE_GRAIN / inner, 1), take_task, &r);
  return MOE_OK;
}

/* A stable sort of the k positions by row. */
static moe_status sort_rows(row_job *r) {
  int64_t buckets = moe_radix_buckets(r->k, r->n);
  r->order = moe_scratch(0, (3 * r->k + buckets) * (int64_t)sizeof *r->order);
  if (r->order == NULL) return moe_fail(MOE_ENOMEM, "out of memory for %lld positions", (long long)r->k);
  int64_t *key = r->order + r->k, *spare = key + r->k, *count = spare + r->k;
  for (int64_t j = 0; j < r->k; j++) key[j] = r->index[j] - r->base;
  moe_radix_sort(r->order, spare, NULL, key, r->k, r->n, count);
  return MOE_OK;
}

/* Calls `line` for every row of y with the positions that go there: a task has the rows whose first sorted
** position lies in its part. */
typedef void line_fn(const row_job *r, int64_t o, int64_t v, const int64_t *order, int64_t count);

typedef struct line_walk {
  const row_job *r;
  line_fn *line;
} line_walk;

static void lines_task(void *arg, int64_t task, int worker) {
  (void)worker;
  const line_walk *w = arg;
  const row_job *r = w->r;
  int64_t o = task / r->tasks, begin = task % r->tasks * r->grain, end = MOE_MIN(begin + r->grain, r->k);
  int64_t p = begin;
  if (p > 0) /* a row that began before belongs to the task before */
    while (p < end && r->index[r->order[p]] == r->index[r->order[p - 1]]) p++;
  while (p < end) {
    int64_t v = r->index[r->order[p]], next = p + 1;
    while (next < r->k && r->index[r->order[next]] == v) next++;
    w->line(r, o, v - r->base, r->order + p, next - p);
    p = next;
  }
}

static moe_status each_line(row_job *r, int64_t outer, line_fn *line) {
  if (outer * r->k * r->inner == 0) return MOE_OK;
  MOE_TRY(sort_rows(r));
  r->grain = MOE_MAX(MOE_GRAIN / r->inner, 1);
  r->tasks = (r->k + r->grain - 1) / r->grain;
  line_walk w = {r, line};
  moe_parallel(outer * r->tasks, lines_task, &w);
  return MOE_OK;
}

static void put_line(const row_job *r, int64_t o, int64_t v, const int64_t *order, int64_t count) {
  int64_t bytes = r->inner * r->esize; /* the last one wins */
  memcpy(r->y + (o * r->n + v) * bytes, r->x + (o * r->k + order[count - 1]) * bytes, (size_t)bytes);
}

moe_status MOE_CPU(rows_put)(void *y, const void *src, const int64_t *index, int64_t base, int64_t outer, int64_t n, int64_t k,
                             int64_t inner, int64_t esize) {
  MOE_TRY(check_row(index, 1, k, base, n));
  row_job r = {.y = y, .x = src, .index = index, .base = base, .n = n, .k = k, .inner = inner, .esize = esize};
  return each_line(&r, outer, put_line);
}

#define ADD_ROW(name, ctype)                                                                        \
  static inline void add_row_##name(ctype *restrict y, const ctype *restrict s, int64_t n) {        \
    for (int64_t i = 0; i < n; i++) y[i] += s[i];                                                   \
  }                                                                                                 \
  static void add_line_##name(const row_job *r, int64_t o, int64_t v, const int64_t *order, int64_t count) { \
    ctype *y = (ctype *)(void *)r->y + (o * r->n + v) * r->inner;                                   \
    const ctype *x = (const ctype *)(const void *)r->x + o * r->k * r->inner;                       \
    for (int64_t j = 0; j < count; j++) add_row_##name(y, x + order[j] * r->inner, r->inner);       \
  }                                                                                                 \
  /* the same sums in the same order, without sorting: few elements */                              \
  static void add_plain_##name(const row_job *r, int64_t outer) {                                      \
    ctype *y = (ctype *)(void *)r->y;                                                               \
    const ctype *x = (const ctype *)(const void *)r->x;                                             \
    for (int64_t i = 0; i < outer * r->k; i++)                                                      \
      add_row_##name(y + (i / r->k * r->n + (r->index[i % r->k] - r->base)) * r->inner, x + i * r->inner, r->inner); \
  }
ADD_ROW(f32, float)
ADD_ROW(f64, double)
ADD_ROW(i64, uint64_t) /* sums wrap round */

moe_status MOE_CPU(rows_add)(void *y, const void *src, const int64_t *index, int64_t base, int64_t outer, int64_t n, int64_t k,
                             int64_t inner, moe_dtype dt) {
  MOE_TRY(check_row(index, 1, k, base, n));
  row_job r = {.y = y, .x = src, .index = index, .base = base, .n = n, .k = k, .inner = inner, .esize = moe_dtype_size(dt)};
  if (outer * k * inner <= MOE_GRAIN) {
    if (dt == MOE_f32) add_plain_f32(&r, outer);
    else if (dt == MOE_f64) add_plain_f64(&r, outer);
    else add_plain_i64(&r, outer);
    return MOE_OK;
  }
  return each_line(&r, outer, dt == MOE_f32 ? add_line_f32 : dt == MOE_f64 ? add_line_f64 : add_line_i64);
}

/* --- single elements: an index of x's rank --- */

typedef struct cells {
  char *y;
  const char *x;
  const int64_t *index;
  int64_t base;
  int ndim, dim;
  const int64_t *shape, *ystride, *xstride, *istride;
  int64_t esize, piece, pieces; /* scatter: elements of the last dimension a task */
} cells;

/* Row i of y (all dimensions but the last): y and index by their strides, x by its own but in dim. */
#define GATHER_ROWS(N, ctype)                                                                    \
  static void gather_##N(void *arg, int64_t begin, int64_t end, int worker) {                    \
    (void)worker;                                                                                \
    const cells *c = arg;                                                                        \
    int last = c->ndim - 1;                                                                      \
    int64_t n = c->shape[last], si = c->istride[last], sd = c->xstride[c->dim];                   \
    int64_t sx = c->dim == last ? 0 : c->xstride[last];                                          \
    for (int64_t i = begin; i < end; i++) {                                                      \
      int64_t rest = i, xo = 0, io = 0;                                                          \
      for (int d = last - 1; d >= 0; d--) {                                                      \
        int64_t p = rest % c->shape[d];                                                          \
        rest /= c->shape[d];                                                                     \
        io += p * c->istride[d];                                                                 \
        if (d != c->dim) xo += p * c->xstride[d];                                                \
      }                                                                                          \
      ctype *restrict y = (ctype *)(void *)c->y + i * n;                                         \
      const ctype *restrict x = (const ctype *)(const void *)c->x + xo;                          \
      const int64_t *restrict index = c->index + io;                                             \
      if (si == 0 && sx == 1) memcpy(y, x + (index[0] - c->base) * sd, (size_t)n * sizeof *y);   \
      else                                                                                       \
        for (int64_t j = 0; j < n; j++) y[j] = x[j * sx + (index[j * si] - c->base) * sd];       \
    }                                                                                            \
  }
GATHER_ROWS(1, uint8_t)
GATHER_ROWS(2, uint16_t)
GATHER_ROWS(4, uint32_t)
GATHER_ROWS(8, uint64_t)

moe_status MOE_CPU(gather)(void *y, const void *x, const int64_t *index, int64_t base, int ndim, const int64_t *shape,
                           const int64_t *xstride, const int64_t *istride, int dim, int64_t n, int64_t esize) {
  static moe_range_fn *const by_size[9] = {[1] = gather_1, [2] = gather_2, [4] = gather_4, [8] = gather_8};
  MOE_TRY(check_index(index, ndim, shape, istride, base, n));
  cells c = {.y = y, .x = x, .index = index, .base = base, .ndim = ndim, .dim = dim, .shape = shape, .xstride = xstride,
             .istride = istride, .esize = esize};
  int64_t count = 1;
  for (int d = 0; d < ndim - 1; d++) count *= shape[d];
  if (count * shape[ndim - 1] > 0) moe_parallel_range(count, MOE_MAX(MOE_GRAIN / shape[ndim - 1], 1), by_size[esize], &c);
  return MOE_OK;
}

/* A task has one place in the dimensions before the last, without dim, and a piece of the last one (all of it where dim is the
** last); it walks dim in order, so that of several writers to one element the last wins, and sums have one order. */
#define SCATTER(name, ctype, OP)                                                                  \
  static void scatter_##name(void *arg, int64_t task, int worker) {                              \
    (void)worker;                                                                                \
    const cells *c = arg;                                                                        \
    int last = c->ndim - 1;                                                                      \
    int64_t rest = task / c->pieces, begin = task % c->pieces * c->piece;                        \
    int64_t yo = 0, xo = 0, io = 0, sd = c->ystride[c->dim];                                     \
    for (int d = last - 1; d >= 0; d--) {                                                        \
      if (d == c->dim) continue;                                                                 \
      int64_t p = rest % c->shape[d];                                                            \
      rest /= c->shape[d];                                                                       \
      yo += p * c->ystride[d], xo += p * c->xstride[d], io += p * c->istride[d];                 \
    }                                                                                            \
    int64_t end = MOE_MIN(begin + c->piece, c->shape[last]);                                     \
    bool inner = c->dim == last;                                                                 \
    int64_t steps = inner ? 1 : c->shape[c->dim], sy = inner ? 0 : c->ystride[last];             \
    int64_t sx = c->xstride[last], si = c->istride[last];                                        \
    for (int64_t k = 0; k < steps; k++) {                                                        \
      ctype *y = (ctype *)(void *)c->y + yo;                                                     \
      const ctype *x = (const ctype *)(const void *)c->x + xo + (inner ? 0 : k * c->xstride[c->dim]); \
      const int64_t *index = c->index + io + (inner ? 0 : k * c->istride[c->dim]);               \
      for (int64_t j = begin; j < end; j++) y[j * sy + (index[j * si] - c->base) * sd] OP x[j * sx]; \
    }                                                                                            \
  }
SCATTER(put_1, uint8_t, =)
SCATTER(put_2, uint16_t, =)
SCATTER(put_4, uint32_t, =)
SCATTER(put_8, uint64_t, =)
SCATTER(add_f32, float, +=)
SCATTER(add_f64, double, +=)
SCATTER(add_i64, uint64_t, +=)

moe_status MOE_CPU(scatter)(void *y, const void *src, const int64_t *index, int64_t base, int ndim, const int64_t *shape,
                            const int64_t *ystride, const int64_t *sstride, const int64_t *istride, int dim, int64_t n,
                            moe_dtype dt, int add) {
  static moe_task_fn *const put[9] = {[1] = scatter_put_1, [2] = scatter_put_2, [4] = scatter_put_4, [8] = scatter_put_8};
  MOE_TRY(check_index(index, ndim, shape, istride, base, n));
  cells c = {.y = y, .x = src, .index = index, .base = base, .ndim = ndim, .dim = dim, .shape = shape, .ystride = ystride,
             .xstride = sstride, .istride = istride};
  int last = ndim - 1;
  int64_t places = 1;
  for (int d = 0; d < last; d++)
    if (d != dim) places *= shape[d];
  c.piece = dim == last ? shape[last] : MOE_MIN(shape[last], MOE_MAX(MOE_GRAIN / MOE_MAX(shape[dim], 1), 64));
  if (places * shape[last] * shape[dim] == 0) return MOE_OK;
  c.pieces = (shape[last] + c.piece - 1) / c.piece;
  moe_task_fn *task = !add ? put[moe_dtype_size(dt)] : dt == MOE_f32 ? scatter_add_f32 : dt == MOE_f64 ? scatter_add_f64 : scatter_add_i64;
  int64_t total = places * shape[last] * (dim == last ? 1 : shape[dim]);
  if (total <= MOE_GRAIN)
    for (int64_t i = 0; i < places * c.pieces; i++) task(&c, i, 0);
  else moe_parallel(places * c.pieces, task, &c);
  return MOE_OK;
}

/* --- masks --- */

typedef struct fill {
  uint64_t value;
  int on;
} fill;

#define FILL(N, ctype)                                                                              \
  static void fill_##N(void *arg, int64_t n, void *const *ptr, const int64_t *st) {                \
    const fill *f = arg;                                                                            \
    ctype *y = ptr[0], v;                                                                           \
    const ctype *x = ptr[1];                                                                        \
    const uint8_t *m = ptr[2];                                                                      \
    int on = f->on;                                                                                 \
    memcpy(&v, &f->value, sizeof v); /* little endian: the low bytes */                             \
    if (st[0] == 1 && st[1] == 1 && st[2] == 1)                                                     \
      for (int64_t i = 0; i < n; i++) y[i] = (m[i] != 0) == on ? v : x[i];                          \
    else                                                                                            \
      for (int64_t i = 0; i < n; i++) y[i * st[0]] = (m[i * st[2]] != 0) == on ? v : x[i * st[1]];  \
  }
FILL(1, uint8_t)
FILL(2, uint16_t)
FILL(4, uint32_t)
FILL(8, uint64_t)

typedef struct fill_walk {
  const moe_iter *it;
  int64_t esize[MOE_ITER_OPERANDS];
  moe_inner_fn *inner;
  fill f;
} fill_walk;

static void fill_rows(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  fill_walk *w = arg;
  moe_iter_rows(w->it, begin, end, w->esize, w->inner, &w->f);
}

moe_status MOE_CPU(masked_fill)(const moe_iter *it, int64_t esize, uint64_t value, int on) {
  static moe_inner_fn *const by_size[9] = {[1] = fill_1, [2] = fill_2, [4] = fill_4, [8] = fill_8};
  fill_walk w = {it, {esize, esize, 1}, by_size[esize], {value, on}};
  if (it->numel == 0) return MOE_OK;
  int64_t row = it->ndim ? it->shape[0] : 1;
  moe_parallel_range(moe_iter_nrows(it), MOE_MAX(MOE_GRAIN / row, 1), fill_rows, &w);
  return MOE_OK;
}

moe_status MOE_CPU(mask_count)(int64_t *count, const uint8_t *mask, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += mask[i] != 0;
  *count = sum;
  return MOE_OK;
}

moe_status MOE_CPU(mask_positions)(int64_t *pos, const uint8_t *mask, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (mask[i]) *pos++ = i;
  return MOE_OK;
}

moe_status MOE_CPU(unravel)(int64_t *y, const int64_t *pos, int64_t k, int ndim, const int64_t *shape, int64_t base) {
  for (int64_t i = 0; i < k; i++) {
    int64_t rest = pos[i];
    for (int d = ndim - 1; d >= 0; d--) {
      y[i * ndim + d] = rest % shape[d] + base;
      rest /= shape[d];
    }
  }
  return MOE_OK;
}

/* --- triangles --- */

typedef struct tri {
  char *y;
  const char *x;
  int64_t rows, cols, diagonal, esize;
  int upper;
} tri;

static void tri_rows(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const tri *t = arg;
  for (int64_t i = begin; i < end; i++) {
    int64_t r = i % t->rows, bytes = t->cols * t->esize;
    /* columns [0, edge) lie below or on the diagonal (for upper: below it) */
    int64_t edge = MOE_MIN(MOE_MAX(r + t->diagonal + !t->upper, 0), t->cols) * t->esize;
    char *y = t->y + i * bytes;
    const char *x = t->x + i * bytes;
    if (t->upper) {
      memset(y, 0, (size_t)edge);
      if (y != x) memcpy(y + edge, x + edge, (size_t)(bytes - edge));
    } else {
      if (y != x) memcpy(y, x, (size_t)edge);
      memset(y + edge, 0, (size_t)(bytes - edge));
    }
  }
}

moe_status MOE_CPU(tri)(void *y, const void *x, int64_t batch, int64_t rows, int64_t cols, int64_t diagonal, int upper, int64_t esize) {
  tri t = {y, x, rows, cols, diagonal, esize, upper};
  if (batch * rows * cols > 0) moe_parallel_range(batch * rows, MOE_MAX(MOE_GRAIN / cols, 1), tri_rows, &t);
  return MOE_OK;
}
