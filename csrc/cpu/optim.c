/* CPU kernels of the optimizers: one pass over parameter, state and gradient, in pieces that shapes alone fix. */
#include "cpu/cpu.h"

#include <math.h>

#include "base/pool.h"
#include "train/optim.h"

enum { PIECE = 8192, SCRATCH = MOE_SCRATCH_SLOTS - 1 };

/* Pieces of many tensors as one range of tasks: first[i] is the number of tensor i's first piece. */
typedef struct pieces {
  void *const *p, *const *state;
  const void *const *g;
  const int64_t *n;
  const int64_t *const *rows; /* or NULL: dense gradients alone */
  const int64_t *width;
  const double *hyper;
  const int64_t *first;
  int64_t count;
  double *sums; /* [pieces] */
  double factor;
  moe_dtype dt;
  /* n elements, from `at` on in the parameter and its states, from `begin` on in the gradient */
  void (*piece_f32)(const struct pieces *, int64_t tensor, int64_t at, int64_t begin, int64_t n);
  void (*piece_f64)(const struct pieces *, int64_t tensor, int64_t at, int64_t begin, int64_t n);
} pieces;

/* Listed rows lie anywhere in tables larger than the caches: the beginning of the next one is asked for while this one is
** worked on; the machine follows from there. */
static void fetch_row(const pieces *s, int64_t tensor, int64_t at, int64_t n) {
  int64_t esize = moe_dtype_size(s->dt), end = at * esize + MOE_MIN(n * esize, (int64_t)256);
  void *const *state = s->state + tensor * MOE_OPTIM_STATES;
  for (int64_t b = at * esize; b < end; b += 64) {
    __builtin_prefetch((const char *)s->p[tensor] + b, 1);
    for (int k = 0; k < MOE_OPTIM_STATES; k++)
      if (state[k] != NULL) __builtin_prefetch((const char *)state[k] + b, 1);
  }
}

static void piece_task(void *arg, int64_t task, int worker) {
  const pieces *s = arg;
  int64_t low = 0, high = s->count; /* the last tensor whose first piece is at or before `task` */
  (void)worker;
  while (high - low > 1) {
    int64_t mid = low + (high - low) / 2;
    if (s->first[mid] <= task) low = mid;
    else high = mid;
  }
  int64_t begin = (task - s->first[low]) * PIECE, n = MOE_MIN(s->n[low] - begin, (int64_t)PIECE), at = begin;
  const int64_t *rows = s->rows ? s->rows[low] : NULL;
  void (*piece)(const struct pieces *, int64_t, int64_t, int64_t, int64_t) = s->dt == MOE_f64 ? s->piece_f64 : s->piece_f32;
  for (int64_t end = begin + n; begin < end; begin += n) { /* a list of rows: what of each lies in the piece */
    if (rows != NULL) {
      int64_t d = s->width[low], column = begin % d;
      at = rows[begin / d] * d + column;
      n = MOE_MIN(d - column, end - begin);
      if (begin + n < end) fetch_row(s, low, rows[begin / d + 1] * d, MOE_MIN(d, end - begin - n));
    }
    piece(s, low, at, begin, n);
  }
}

/* An empty tensor has no piece: its `first` equals the next one's, and the search passes it by. */
static moe_status run_pieces(pieces *s, bool sums, int64_t *total) {
  int64_t all = 0, elements = 0;
  for (int64_t i = 0; i < s->count; i++) {
    all += (s->n[i] + PIECE - 1) / PIECE;
    elements += s->n[i];
  }
  int64_t *first = moe_scratch(SCRATCH, (s->count + 1) * (int64_t)sizeof *first + (sums ? all : 0) * (int64_t)sizeof(double));
  if (first == NULL) return moe_fail(MOE_ENOMEM, "optimizer: no memory for scratch");
  int64_t at = 0;
  for (int64_t i = 0; i < s->count; at += (s->n[i] + PIECE - 1) / PIECE, i++) first[i] = at;
  s->first = first;
  s->sums = (double *)(first + s->count + 1);
  *total = all;
  if (elements > MOE_GRAIN) moe_parallel(all, piece_task, s);
  else /* waking the pool costs more */
    for (int64_t i = 0; i < all; i++) piece_task(s, i, 0);
  return MOE_OK;
}

#define OPTIMIZER(T, F, SQRT)                                                                             \
  static void adamw_##T(const pieces *s, int64_t i, int64_t at, int64_t begin, int64_t n) {               \
    T *restrict p = (T *)s->p[i] + at;                                                                    \
    T *restrict m = (T *)s->state[i * MOE_OPTIM_STATES] + at;                                             \
    T *restrict v = (T *)s->state[i * MOE_OPTIM_STATES + 1] + at;                                         \
    const T *restrict g = (const T *)s->g[i] + begin;                                                     \
    const double *h = &s->hyper[i * MOE_OPTIM_HYPER];                                                     \
    const T scale = (T)h[0], keep = (T)h[1], one_b1 = (T)h[2], b2 = (T)h[3], one_b2 = (T)h[4];            \
    const T rate = (T)h[5], root = (T)h[6], eps = (T)h[7];                                                \
    _Pragma("omp simd") for (int64_t k = 0; k < n; k++) {                                                 \
      T gk = g[k] * scale;                                                                                \
      T mk = m[k] + (gk - m[k]) * one_b1;                                                                 \
      T vk = v[k] * b2 + gk * gk * one_b2;                                                                \
      m[k] = mk;                                                                                          \
      v[k] = vk;                                                                                          \
      p[k] = p[k] * keep - rate * mk / (SQRT(vk) * root + eps);                                           \
    }                                                                                                     \
  }                                                                                                       \
  static void sgd_##T(const pieces *s, int64_t i, int64_t at, int64_t begin, int64_t n) {                 \
    T *restrict p = (T *)s->p[i] + at;                                                                    \
    const T *restrict g = (const T *)s->g[i] + begin;                                                     \
    const double *h = &s->hyper[i * MOE_OPTIM_HYPER];                                                     \
    const T scale = (T)h[0], decay = (T)h[1], momentum = (T)h[2], fresh = (T)h[3], rate = (T)h[4];        \
    const T ahead = h[5] != 0 ? momentum : 0, plain = h[5] != 0 ? (T)1 : 0, old = h[5] != 0 ? 0 : (T)1;   \
    if (s->state[i * MOE_OPTIM_STATES] == NULL) {                                                         \
      _Pragma("omp simd") for (int64_t k = 0; k < n; k++) p[k] -= rate * (g[k] * scale + decay * p[k]);   \
      return;                                                                                             \
    }                                                                                                     \
    T *restrict b = (T *)s->state[i * MOE_OPTIM_STATES] + at;                                             \
    _Pragma("omp simd") for (int64_t k = 0; k < n; k++) {                                                 \
      T gk = g[k] * scale + decay * p[k];                                                                 \
      T bk = b[k] * momentum + gk * fresh;                                                                \
      b[k] = bk;                                                                                          \
      p[k] -= rate * (plain * gk + (old + ahead) * bk);                                                   \
    }                                                                                                     \
  }                                                                                                       \
  static void squares_##T(const pieces *s, int64_t i, int64_t at, int64_t begin, int64_t n) {             \
    const T *restrict g = (const T *)s->g[i] + begin;                                                     \
    (void)at;                                                                                             \
    double lane[16] = {0}, sum = 0;                                                                       \
    int64_t whole = n / 16 * 16;                                                                          \
    for (int64_t k = 0; k < whole; k += 16)                                                               \
      for (int64_t l = 0; l < 16; l++) lane[l] += (double)g[k + l] * (double)g[k + l];                    \
    for (int64_t k = whole; k < n; k++) lane[k - whole] += (double)g[k] * (double)g[k];                   \
    for (int64_t l = 0; l < 16; l++) sum += lane[l];                                                      \
    s->sums[s->first[i] + begin / PIECE] = sum;                                                           \
  }                                                                                                       \
  static void scale_##T(const pieces *s, int64_t i, int64_t at, int64_t begin, int64_t n) {               \
    (void)begin;                                                                                          \
    T *restrict x = (T *)s->p[i] + at;                                                                    \
    const T f = (T)s->factor;                                                                             \
    _Pragma("omp simd") for (int64_t k = 0; k < n; k++) x[k] *= f;                                        \
  }
OPTIMIZER(float, f, sqrtf)
OPTIMIZER(double, d, sqrt)

moe_status MOE_CPU(adamw_step)(void *const *p, void *const *state, const void *const *g, const int64_t *n,
                               const int64_t *const *rows, const int64_t *width, int64_t count, const double *hyper, moe_dtype dt) {
  int64_t total = 0;
  pieces s = {.p = p, .state = state, .g = g, .n = n, .rows = rows, .width = width, .count = count, .hyper = hyper, .dt = dt,
              .piece_f32 = adamw_float, .piece_f64 = adamw_double};
  return run_pieces(&s, false, &total);
}

moe_status MOE_CPU(sgd_step)(void *const *p, void *const *state, const void *const *g, const int64_t *n,
                             const int64_t *const *rows, const int64_t *width, int64_t count, const double *hyper, moe_dtype dt) {
  int64_t total = 0;
  pieces s = {.p = p, .state = state, .g = g, .n = n, .rows = rows, .width = width, .count = count, .hyper = hyper, .dt = dt,
              .piece_f32 = sgd_float, .piece_f64 = sgd_double};
  return run_pieces(&s, false, &total);
}

moe_status MOE_CPU(sum_squares)(double *sum, const void *const *x, const int64_t *n, int64_t count, moe_dtype dt) {
  int64_t total = 0;
  pieces s = {.g = x, .n = n, .count = count, .dt = dt, .piece_f32 = squares_float, .piece_f64 = squares_double};
  MOE_TRY(run_pieces(&s, true, &total));
  *sum = 0;
  for (int64_t i = 0; i < total; i++) *sum += s.sums[i];
  return MOE_OK;
}

moe_status MOE_CPU(multi_scale)(void *const *x, const int64_t *n, int64_t count, double factor, moe_dtype dt) {
  int64_t total = 0;
  pieces s = {.p = x, .n = n, .count = count, .factor = factor, .dt = dt, .piece_f32 = scale_float, .piece_f64 = scale_double};
  return run_pieces(&s, false, &total);
}
