/* Reductions over the middle of [outer, n, inner].
**
** Numerics: elements are summed in several lanes of the element's type over blocks of BLOCK, and the blocks in
** f64 (integers: i64), so that the error does not grow with n. Work is cut by shape alone and pieces are joined
** in order: the same bits for any number of threads.
** Maxima are taken over integer keys that order as the floats do, NaN on the winning side: branch-free, and the
** compiler vectorises an integer maximum without being allowed to forget about NaN.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/order.h"
#include "tensor/reduction.h"

enum {
  BLOCK = 256,  /* elements summed in the element's own type before they go to f64 */
  TILE = 64,    /* columns handled together where inner > 1 */
  CHUNK = 32768 /* elements of one piece of a long reduction */
};

typedef union acc {
  double f;
  int64_t i;
} acc;

/* One kind of reduction for one element type. */
typedef struct reducer {
  void (*run)(acc *a, const void *x, int64_t n, double p);                             /* n contiguous elements */
  void (*cols)(acc *a, const void *x, int64_t n, int64_t stride, int64_t w, double p); /* w <= TILE columns of n rows */
  void (*join)(acc *a, const acc *b);
  void (*finish)(void *y, int64_t at, acc a, double p);
  acc init;
  int esize;
} reducer;

#define PRAGMA(x) _Pragma(#x)
#define WIDE_f double
#define WIDE_i int64_t

/* NAME, element T, lane L, acc field, clause of omp reduction, neutral lane value, v of x, fold of a and b,
** output type, value of the accumulator. */
#define REDUCER(NAME, T, L, FIELD, CLAUSE, NEUTRAL, MAP, FOLD, OUT, FINISH)                               \
  static void NAME##_run(acc *a, const void *xv, int64_t n, double p) {                                   \
    const T *restrict x = xv;                                                                             \
    (void)p;                                                                                              \
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {                                                           \
      int64_t m = MOE_MIN(n - i0, BLOCK), q = m >= TILE ? m / 4 : 0;                                      \
      const T *x0 = x + i0, *x1 = x0 + q, *x2 = x1 + q, *x3 = x2 + q;                                     \
      L s0 = NEUTRAL, s1 = NEUTRAL, s2 = NEUTRAL, s3 = NEUTRAL;                                           \
      PRAGMA(omp simd reduction(CLAUSE : s0, s1, s2, s3))                                                 \
      for (int64_t i = 0; i < q; i++) {                                                                   \
        L v0 = MAP(x0[i]), v1 = MAP(x1[i]), v2 = MAP(x2[i]), v3 = MAP(x3[i]);                             \
        s0 = FOLD(s0, v0);                                                                                \
        s1 = FOLD(s1, v1);                                                                                \
        s2 = FOLD(s2, v2);                                                                                \
        s3 = FOLD(s3, v3);                                                                                \
      }                                                                                                   \
      PRAGMA(omp simd reduction(CLAUSE : s0))                                                             \
      for (int64_t i = 4 * q; i < m; i++) {                                                               \
        L v = MAP(x0[i]);                                                                                 \
        s0 = FOLD(s0, v);                                                                                 \
      }                                                                                                   \
      s0 = FOLD(s0, s1);                                                                                  \
      s2 = FOLD(s2, s3);                                                                                  \
      s0 = FOLD(s0, s2);                                                                                  \
      a->FIELD = FOLD(a->FIELD, (WIDE_##FIELD)s0);                                                              \
    }                                                                                                     \
  }                                                                                                       \
  static void NAME##_cols(acc *a, const void *xv, int64_t n, int64_t stride, int64_t w, double p) {       \
    const T *x = xv;                                                                                      \
    (void)p;                                                                                              \
    for (int64_t i0 = 0; i0 < n; i0 += TILE) {                                                            \
      int64_t m = MOE_MIN(n - i0, TILE), i = 0;                                                           \
      const T *b = x + i0 * stride;                                                                       \
      L lane[TILE];                                                                                       \
      for (int64_t j = 0; j < w; j++) lane[j] = NEUTRAL;                                                  \
      for (; i + 4 <= m; i += 4, b += 4 * stride) {                                                       \
        const T *restrict r0 = b, *restrict r1 = b + stride, *restrict r2 = b + 2 * stride;               \
        const T *restrict r3 = b + 3 * stride;                                                            \
        PRAGMA(omp simd)                                                                                  \
        for (int64_t j = 0; j < w; j++) {                                                                 \
          L v0 = MAP(r0[j]), v1 = MAP(r1[j]), v2 = MAP(r2[j]), v3 = MAP(r3[j]);                           \
          v0 = FOLD(v0, v1);                                                                              \
          v2 = FOLD(v2, v3);                                                                              \
          v0 = FOLD(v0, v2);                                                                              \
          lane[j] = FOLD(lane[j], v0);                                                                    \
        }                                                                                                 \
      }                                                                                                   \
      for (; i < m; i++, b += stride) {                                                                   \
        PRAGMA(omp simd)                                                                                  \
        for (int64_t j = 0; j < w; j++) {                                                                 \
          L v = MAP(b[j]);                                                                                \
          lane[j] = FOLD(lane[j], v);                                                                     \
        }                                                                                                 \
      }                                                                                                   \
      for (int64_t j = 0; j < w; j++) a[j].FIELD = FOLD(a[j].FIELD, (WIDE_##FIELD)lane[j]);                             \
    }                                                                                                     \
  }                                                                                                       \
  static void NAME##_join(acc *a, const acc *b) { a->FIELD = FOLD(a->FIELD, b->FIELD); }                  \
  static void NAME##_finish(void *y, int64_t at, acc a, double p) {                                       \
    (void)p;                                                                                              \
    ((OUT *)y)[at] = (OUT)(FINISH(a.FIELD));                                                              \
  }

#define SAME(x) (x)
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
/* integers wrap around, as the hardware does */
#define ADD_I(a, b) ((int64_t)((uint64_t)(a) + (uint64_t)(b)))
#define MUL_I(a, b) ((int64_t)((uint64_t)(a) * (uint64_t)(b)))
#define OVER_P(a) ((a) / p)
#define SQUARE(x) ((x) * (x))
#define POWER(x) pow(fabs((double)(x)), p)
#define ROOT_P(a) pow(a, 1.0 / p)
#define NONZERO(x) ((x) != 0)
#define ZERO(x) ((x) == 0)
#define IS_SOME(a) ((a) != 0)
#define IS_NONE(a) ((a) == 0)
#define UNKEY_F32(a) moe_unkey_f32((int32_t)(a))
#define UNKEY_ABS_F32(a) moe_bits_f32((a) < 0 ? 0x7FC00000u : (uint32_t)(a))
#define UNKEY_ABS_F64(a) moe_bits_f64((a) < 0 ? 0x7FF8000000000000u : (uint64_t)(a))

REDUCER(sum_f32, float, float, f, +, 0, SAME, ADD, float, SAME)
REDUCER(sum_f64, double, double, f, +, 0, SAME, ADD, double, SAME)
REDUCER(sum_i64, int64_t, int64_t, i, +, 0, SAME, ADD_I, int64_t, SAME)
REDUCER(mean_f32, float, float, f, +, 0, SAME, ADD, float, OVER_P)
REDUCER(mean_f64, double, double, f, +, 0, SAME, ADD, double, OVER_P)
REDUCER(prod_f32, float, float, f, *, 1, SAME, MUL, float, SAME)
REDUCER(prod_f64, double, double, f, *, 1, SAME, MUL, double, SAME)
REDUCER(prod_i64, int64_t, int64_t, i, *, 1, SAME, MUL_I, int64_t, SAME)
REDUCER(max_f32, float, int32_t, i, max, INT32_MIN, moe_key_max_f32, MAX, float, UNKEY_F32)
REDUCER(max_f64, double, int64_t, i, max, INT64_MIN, moe_key_max_f64, MAX, double, moe_unkey_f64)
REDUCER(max_i64, int64_t, int64_t, i, max, INT64_MIN, SAME, MAX, int64_t, SAME)
REDUCER(min_f32, float, int32_t, i, min, INT32_MAX, moe_key_min_f32, MIN, float, UNKEY_F32)
REDUCER(min_f64, double, int64_t, i, min, INT64_MAX, moe_key_min_f64, MIN, double, moe_unkey_f64)
REDUCER(min_i64, int64_t, int64_t, i, min, INT64_MAX, SAME, MIN, int64_t, SAME)
REDUCER(norm1_f32, float, float, f, +, 0, fabsf, ADD, float, SAME)
REDUCER(norm1_f64, double, double, f, +, 0, fabs, ADD, double, SAME)
REDUCER(norm2_f32, float, float, f, +, 0, SQUARE, ADD, float, sqrt)
REDUCER(norm2_f64, double, double, f, +, 0, SQUARE, ADD, double, sqrt)
REDUCER(normp_f32, float, double, f, +, 0, POWER, ADD, float, ROOT_P)
REDUCER(normp_f64, double, double, f, +, 0, POWER, ADD, double, ROOT_P)
REDUCER(maxabs_f32, float, int32_t, i, max, 0, moe_key_maxabs_f32, MAX, float, UNKEY_ABS_F32)
REDUCER(maxabs_f64, double, int64_t, i, max, 0, moe_key_maxabs_f64, MAX, double, UNKEY_ABS_F64)
REDUCER(minabs_f32, float, int32_t, i, min, 0x7F800000, moe_key_minabs_f32, MIN, float, UNKEY_ABS_F32)
REDUCER(minabs_f64, double, int64_t, i, min, 0x7FF0000000000000, moe_key_minabs_f64, MIN, double, UNKEY_ABS_F64)

#define COUNTERS(SFX, T, L)                                               \
  REDUCER(count_##SFX, T, L, i, +, 0, NONZERO, ADD, int64_t, SAME)        \
  REDUCER(any_##SFX, T, L, i, +, 0, NONZERO, ADD, uint8_t, IS_SOME)       \
  REDUCER(all_##SFX, T, L, i, +, 0, ZERO, ADD, uint8_t, IS_NONE)
COUNTERS(f32, float, int32_t)
COUNTERS(f64, double, int64_t)
COUNTERS(i64, int64_t, int64_t)
COUNTERS(u8, uint8_t, int32_t)

#define ROW_F(NAME, T, NEUTRAL) {NAME##_run, NAME##_cols, NAME##_join, NAME##_finish, {.f = NEUTRAL}, sizeof(T)}
#define ROW_I(NAME, T, NEUTRAL) {NAME##_run, NAME##_cols, NAME##_join, NAME##_finish, {.i = NEUTRAL}, sizeof(T)}
#define NONE {NULL, NULL, NULL, NULL, {0}, 0}

/* [kind][f32, f64, i64, u8] */
static const reducer table[MOE_RED_KINDS][4] = {
  [MOE_RED_SUM] = {ROW_F(sum_f32, float, 0), ROW_F(sum_f64, double, 0), ROW_I(sum_i64, int64_t, 0), NONE},
  [MOE_RED_MEAN] = {ROW_F(mean_f32, float, 0), ROW_F(mean_f64, double, 0), NONE, NONE},
  [MOE_RED_PROD] = {ROW_F(prod_f32, float, 1), ROW_F(prod_f64, double, 1), ROW_I(prod_i64, int64_t, 1), NONE},
  [MOE_RED_MAX] = {ROW_I(max_f32, float, INT32_MIN), ROW_I(max_f64, double, INT64_MIN), ROW_I(max_i64, int64_t, INT64_MIN), NONE},
  [MOE_RED_MIN] = {ROW_I(min_f32, float, INT32_MAX), ROW_I(min_f64, double, INT64_MAX), ROW_I(min_i64, int64_t, INT64_MAX), NONE},
  [MOE_RED_COUNT] = {ROW_I(count_f32, float, 0), ROW_I(count_f64, double, 0), ROW_I(count_i64, int64_t, 0), ROW_I(count_u8, uint8_t, 0)},
  [MOE_RED_ANY] = {ROW_I(any_f32, float, 0), ROW_I(any_f64, double, 0), ROW_I(any_i64, int64_t, 0), ROW_I(any_u8, uint8_t, 0)},
  [MOE_RED_ALL] = {ROW_I(all_f32, float, 0), ROW_I(all_f64, double, 0), ROW_I(all_i64, int64_t, 0), ROW_I(all_u8, uint8_t, 0)},
  [MOE_RED_NORM1] = {ROW_F(norm1_f32, float, 0), ROW_F(norm1_f64, double, 0), NONE, NONE},
  [MOE_RED_NORM2] = {ROW_F(norm2_f32, float, 0), ROW_F(norm2_f64, double, 0), NONE, NONE},
  [MOE_RED_NORMP] = {ROW_F(normp_f32, float, 0), ROW_F(normp_f64, double, 0), NONE, NONE},
  [MOE_RED_MAXABS] = {ROW_I(maxabs_f32, float, 0), ROW_I(maxabs_f64, double, 0), NONE, NONE},
  [MOE_RED_MINABS] = {ROW_I(minabs_f32, float, 0x7F800000), ROW_I(minabs_f64, double, 0x7FF0000000000000), NONE, NONE},
};

/* Column of the table, or -1. */
static int type_column(moe_dtype dt) {
  switch (dt) {
    case MOE_f32: return 0;
    case MOE_f64: return 1;
    case MOE_i64: return 2;
    case MOE_u8:
    case MOE_bool: return 3;
    default: return -1;
  }
}

typedef struct job {
  const reducer *r;
  void *y;
  const char *x;
  int64_t outer, n, inner, chunk, nchunks, tiles;
  double p;
  acc *part; /* [outer, nchunks, inner], or NULL when nchunks == 1 */
} job;

/* Columns [j0, j0 + w) of outer o, rows [begin, end). */
static void reduce_piece(const job *b, acc *a, int64_t o, int64_t begin, int64_t end, int64_t j0, int64_t w) {
  const reducer *r = b->r;
  const char *x = b->x + ((o * b->n + begin) * b->inner + j0) * r->esize;
  for (int64_t j = 0; j < w; j++) a[j] = r->init;
  if (b->inner == 1)
    r->run(a, x, end - begin, b->p);
  else
    r->cols(a, x, end - begin, b->inner, w, b->p);
}

/* Outers [begin, end) whole. */
static void reduce_outers(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  acc a[TILE];
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j0 = 0; j0 < b->inner; j0 += TILE) {
      int64_t w = MOE_MIN(b->inner - j0, TILE);
      reduce_piece(b, a, o, 0, b->n, j0, w);
      for (int64_t j = 0; j < w; j++) b->r->finish(b->y, o * b->inner + j0 + j, a[j], b->p);
    }
}

/* Task (o, chunk, group of columns) of a long reduction. */
enum { GROUP = 16 * TILE };
static void reduce_chunk(void *arg, int64_t task, int worker) {
  const job *b = arg;
  int64_t tile = task % b->tiles, c = task / b->tiles % b->nchunks, o = task / b->tiles / b->nchunks;
  int64_t begin = c * b->chunk, end = MOE_MIN(begin + b->chunk, b->n);
  int64_t stop = MOE_MIN((tile + 1) * GROUP, b->inner);
  (void)worker;
  for (int64_t j0 = tile * GROUP; j0 < stop; j0 += TILE)
    reduce_piece(b, b->part + (o * b->nchunks + c) * b->inner + j0, o, begin, end, j0, MOE_MIN(stop - j0, TILE));
}

static void join_outers(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j = 0; j < b->inner; j++) {
      const acc *p = b->part + o * b->nchunks * b->inner + j;
      acc a = p[0];
      for (int64_t c = 1; c < b->nchunks; c++) b->r->join(&a, p + c * b->inner);
      b->r->finish(b->y, o * b->inner + j, a, b->p);
    }
}

moe_status MOE_CPU(reduce)(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, moe_dtype dt, int kind,
                           double p) {
  int col = type_column(dt);
  if (col < 0 || table[kind][col].run == NULL)
    return moe_fail(MOE_EDEVICE, "no reduction of kind %d for %s on cpu", kind, moe_dtype_name(dt));
  job b = {.r = &table[kind][col], .y = y, .x = x, .outer = outer, .n = n, .inner = inner, .nchunks = 1, .p = p};
  if (outer == 0 || inner == 0) return MOE_OK;
  if (n * inner > CHUNK) {
    b.tiles = (inner + GROUP - 1) / GROUP;
    b.chunk = MOE_MAX(CHUNK / MOE_MIN(inner, GROUP), TILE);
    b.nchunks = (n + b.chunk - 1) / b.chunk;
    b.part = moe_scratch(0, outer * b.nchunks * inner * (int64_t)sizeof(acc));
    if (b.part == NULL) return moe_fail(MOE_ENOMEM, "out of memory in a reduction");
    moe_parallel(outer * b.nchunks * b.tiles, reduce_chunk, &b);
    moe_parallel_range(outer, MOE_MAX(1, MOE_GRAIN / (b.nchunks * inner)), join_outers, &b);
    return MOE_OK;
  }
  moe_parallel_range(outer, MOE_MAX(1, MOE_GRAIN / MOE_MAX(n * inner, 1)), reduce_outers, &b);
  return MOE_OK;
}

/* --- the position of the largest or smallest ---
** Every type becomes an integer key of 64 bits (32 for f32) whose maximum is sought. */

typedef struct arg_job {
  void *value;
  int64_t *index;
  const void *x;
  int64_t n, inner, base;
} arg_job;

#define ARG(NAME, T, K, KEY)                                                                              \
  static void NAME(void *arg, int64_t begin, int64_t end, int worker) {                                   \
    const arg_job *b = arg;                                                                               \
    int64_t n = b->n, inner = b->inner;                                                                   \
    (void)worker;                                                                                         \
    for (int64_t o = begin; o < end; o++) {                                                               \
      const T *x = (const T *)b->x + o * n * inner;                                                       \
      for (int64_t j0 = 0; j0 < inner; j0 += TILE) {                                                      \
        int64_t w = MOE_MIN(inner - j0, TILE);                                                            \
        K best[TILE];                                                                                     \
        int64_t at[TILE] = {0};                                                                           \
        if (inner == 1) {                                                                                 \
          K m = KEY(x[0]);                                                                                \
          PRAGMA(omp simd reduction(max : m))                                                             \
          for (int64_t i = 0; i < n; i++) {                                                               \
            K k = KEY(x[i]);                                                                              \
            m = MAX(m, k);                                                                                \
          }                                                                                               \
          while (KEY(x[at[0]]) != m) at[0]++;                                                             \
        } else {                                                                                          \
          for (int64_t j = 0; j < w; j++) best[j] = KEY(x[j0 + j]);                                       \
          for (int64_t i = 1; i < n; i++) {                                                               \
            const T *restrict r = x + i * inner + j0;                                                     \
            for (int64_t j = 0; j < w; j++) {                                                             \
              K k = KEY(r[j]);                                                                            \
              at[j] = k > best[j] ? i : at[j];                                                            \
              best[j] = MAX(best[j], k);                                                                  \
            }                                                                                             \
          }                                                                                               \
        }                                                                                                 \
        for (int64_t j = 0; j < w; j++) {                                                                 \
          int64_t out = o * inner + j0 + j;                                                               \
          b->index[out] = at[j] + b->base;                                                                \
          if (b->value) ((T *)b->value)[out] = x[at[j] * inner + j0 + j];                                 \
        }                                                                                                 \
      }                                                                                                   \
    }                                                                                                     \
  }

/* For a minimum the keys are complemented. Zeros of both signs are one value: + 0 makes them so. */
#define KEY_MAX_F32(x) moe_key_max_f32((x) + 0.0f)
#define KEY_MIN_F32(x) (~moe_key_min_f32((x) + 0.0f))
#define KEY_MAX_F64(x) moe_key_max_f64((x) + 0.0)
#define KEY_MIN_F64(x) (~moe_key_min_f64((x) + 0.0))
#define KEY_MIN_I64(x) (~(x))
ARG(argmax_f32, float, int32_t, KEY_MAX_F32)
ARG(argmin_f32, float, int32_t, KEY_MIN_F32)
ARG(argmax_f64, double, int64_t, KEY_MAX_F64)
ARG(argmin_f64, double, int64_t, KEY_MIN_F64)
ARG(argmax_i64, int64_t, int64_t, SAME)
ARG(argmin_i64, int64_t, int64_t, KEY_MIN_I64)

moe_status MOE_CPU(reduce_arg)(void *value, int64_t *index, const void *x, int64_t outer, int64_t n, int64_t inner,
                               moe_dtype dt, bool largest, int64_t base) {
  static moe_range_fn *const fn[3][2] = {
    {argmin_f32, argmax_f32}, {argmin_f64, argmax_f64}, {argmin_i64, argmax_i64}};
  int col = type_column(dt);
  if (col < 0 || col > 2) return moe_fail(MOE_EDEVICE, "no arg reduction for %s on cpu", moe_dtype_name(dt));
  arg_job b = {value, index, x, n, inner, base};
  if (inner == 0) return MOE_OK;
  moe_parallel_range(outer, MOE_MAX(1, MOE_GRAIN / MOE_MAX(n * inner, 1)), fn[col][largest], &b);
  return MOE_OK;
}

/* --- f32 and f64 alike: variance, gradients, running sums --- */
typedef struct real_job {
  void *y;
  const void *a, *b, *c;
  int64_t n, inner;
  int kind;
  bool flag;
  double p;
} real_job;

#define REAL float
#define REAL_NAME(name) name##_f32
#define REAL_SUM_RUN sum_f32_run
#define REAL_SUM_COLS sum_f32_cols
#include "cpu/reduce_real.h"
#undef REAL
#undef REAL_NAME
#undef REAL_SUM_RUN
#undef REAL_SUM_COLS
#define REAL double
#define REAL_NAME(name) name##_f64
#define REAL_SUM_RUN sum_f64_run
#define REAL_SUM_COLS sum_f64_cols
#include "cpu/reduce_real.h"
#undef REAL
#undef REAL_NAME
#undef REAL_SUM_RUN
#undef REAL_SUM_COLS

static void scan_i64(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner, step = b->flag ? -inner : inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++) {
    const int64_t *x = (const int64_t *)b->a + o * n * inner + (b->flag ? (n - 1) * inner : 0);
    int64_t *y = (int64_t *)b->y + (x - (const int64_t *)b->a);
    for (int64_t i = 0; i < n; i++, x += step, y += step)
      for (int64_t j = 0; j < inner; j++)
        y[j] = i == 0 ? x[j] : b->kind == MOE_SCAN_SUM ? ADD_I(y[j - step], x[j]) : MUL_I(y[j - step], x[j]);
  }
}

static moe_status run_real(const char *what, moe_range_fn *f32, moe_range_fn *f64, moe_range_fn *i64, moe_dtype dt,
                           int64_t outer, real_job *b) {
  moe_range_fn *fn = dt == MOE_f32 ? f32 : dt == MOE_f64 ? f64 : dt == MOE_i64 ? i64 : NULL;
  if (fn == NULL) return moe_fail(MOE_EDEVICE, "no kernel '%s' for %s on cpu", what, moe_dtype_name(dt));
  if (b->inner == 0) return MOE_OK;
  moe_parallel_range(outer, MOE_MAX(1, MOE_GRAIN / MOE_MAX(b->n * b->inner, 1)), fn, b);
  return MOE_OK;
}

moe_status MOE_CPU(variance)(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, moe_dtype dt,
                             double divisor, bool root) {
  real_job b = {.y = y, .a = x, .n = n, .inner = inner, .flag = root, .p = divisor};
  return run_real("variance", variance_f32, variance_f64, NULL, dt, outer, &b);
}

moe_status MOE_CPU(extreme_bwd)(void *gx, const void *g, const void *y, const void *x, int64_t outer, int64_t n,
                                int64_t inner, moe_dtype dt, bool magnitude) {
  real_job b = {.y = gx, .a = g, .b = y, .c = x, .n = n, .inner = inner, .flag = magnitude};
  return run_real("extreme_bwd", extreme_bwd_f32, extreme_bwd_f64, NULL, dt, outer, &b);
}

moe_status MOE_CPU(prod_bwd)(void *gx, const void *g, const void *x, int64_t outer, int64_t n, int64_t inner,
                             moe_dtype dt) {
  real_job b = {.y = gx, .a = g, .b = x, .n = n, .inner = inner};
  return run_real("prod_bwd", prod_bwd_f32, prod_bwd_f64, NULL, dt, outer, &b);
}

moe_status MOE_CPU(scan)(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, moe_dtype dt, int kind,
                         bool reverse) {
  if (n == 0) return MOE_OK; /* reversed scans begin at n - 1 */
  real_job b = {.y = y, .a = x, .n = n, .inner = inner, .kind = kind, .flag = reverse};
  return run_real("scan", scan_f32, scan_f64, scan_i64, dt, outer, &b);
}

moe_status MOE_CPU(cumprod_bwd)(void *gx, const void *g, const void *x, int64_t outer, int64_t n, int64_t inner,
                                moe_dtype dt) {
  real_job b = {.y = gx, .a = g, .b = x, .n = n, .inner = inner};
  return run_real("cumprod_bwd", cumprod_bwd_f32, cumprod_bwd_f64, NULL, dt, outer, &b);
}
