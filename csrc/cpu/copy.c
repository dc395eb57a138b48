/* fill and copy (with conversion) for every type. */
#include <string.h>

#include "cpu/cpu.h"

#undef bool /* so that the type row named bool keeps its name when macros paste it */

/* --- conversion rows: one inner loop a pair of types --- */

/* How an element of a type is read as the pair's common type, and written from it. */
#define READ_bool(x) (x)
#define READ_u8(x) (x)
#define READ_i32(x) (x)
#define READ_i64(x) (x)
#define READ_f16(x) moe_f16_to_f32(x)
#define READ_bf16(x) moe_bf16_to_f32(x)
#define READ_f32(x) (x)
#define READ_f64(x) (x)

/* Float to integer: truncation, saturating, NaN gives 0; narrowing between integers wraps nothing: it saturates. */
static inline int64_t f64_to_i64(double d) {
  return d >= 9223372036854775807.0 ? INT64_MAX : d <= -9223372036854775808.0 ? INT64_MIN : d != d ? 0 : (int64_t)d;
}
static inline int32_t i64_to_i32(int64_t v) { return (int32_t)(v < INT32_MIN ? INT32_MIN : v > INT32_MAX ? INT32_MAX : v); }
static inline uint8_t i64_to_u8(int64_t v) { return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v); }

#define FROM_INT_bool(v) ((uint8_t)((v) != 0))
#define FROM_INT_u8(v) i64_to_u8(v)
#define FROM_INT_i32(v) i64_to_i32(v)
#define FROM_INT_i64(v) ((int64_t)(v))
#define FROM_INT_f16(v) moe_f32_to_f16((float)(v))
#define FROM_INT_bf16(v) moe_f32_to_bf16((float)(v))
#define FROM_INT_f32(v) ((float)(v))
#define FROM_INT_f64(v) ((double)(v))

#define FROM_FLT_bool(v) ((uint8_t)((v) != 0))
#define FROM_FLT_u8(v) i64_to_u8(f64_to_i64((double)(v)))
#define FROM_FLT_i32(v) i64_to_i32(f64_to_i64((double)(v)))
#define FROM_FLT_i64(v) f64_to_i64((double)(v))
#define FROM_FLT_f16(v) moe_f32_to_f16((float)(v))
#define FROM_FLT_bf16(v) moe_f32_to_bf16((float)(v))
#define FROM_FLT_f32(v) ((float)(v))
#define FROM_FLT_f64(v) ((double)(v))

#define T_bool uint8_t
#define T_u8 uint8_t
#define T_i32 int32_t
#define T_i64 int64_t
#define T_f16 uint16_t
#define T_bf16 uint16_t
#define T_f32 float
#define T_f64 double

#define PAIR(D, S, WRITE)                                                                       \
  static void cv_##D##_##S(void *arg, int64_t n, void *const *p, const int64_t *st) {            \
    (void)arg;                                                                                  \
    T_##D *restrict d = p[0];                                                                   \
    const T_##S *restrict s = p[1];                                                             \
    int64_t sd = st[0], ss = st[1];                                                             \
    if (sd == 1 && ss == 1)                                                                     \
      for (int64_t i = 0; i < n; i++) d[i] = WRITE##_##D(READ_##S(s[i]));                       \
    else                                                                                        \
      for (int64_t i = 0; i < n; i++) d[i * sd] = WRITE##_##D(READ_##S(s[i * ss]));             \
  }
#define FROM_INTS(D) PAIR(D, bool, FROM_INT) PAIR(D, u8, FROM_INT) PAIR(D, i32, FROM_INT) PAIR(D, i64, FROM_INT)
#define FROM_FLTS(D) PAIR(D, f16, FROM_FLT) PAIR(D, bf16, FROM_FLT) PAIR(D, f32, FROM_FLT) PAIR(D, f64, FROM_FLT)
#define X(name, ctype, fl) FROM_INTS(name) FROM_FLTS(name)
MOE_DTYPES(X)
#undef X

static moe_inner_fn *const convert[MOE_DTYPE_COUNT][MOE_DTYPE_COUNT] = {
#define X(D, ctype, fl)                                                                                      \
  [MOE_##D] = {[MOE_bool] = cv_##D##_bool, [MOE_u8] = cv_##D##_u8,   [MOE_i32] = cv_##D##_i32,               \
               [MOE_i64] = cv_##D##_i64,   [MOE_f16] = cv_##D##_f16, [MOE_bf16] = cv_##D##_bf16,             \
               [MOE_f32] = cv_##D##_f32,   [MOE_f64] = cv_##D##_f64},
    MOE_DTYPES(X)
#undef X
};

/* Bitwise copies by element size. */
#define BITS(N, ctype)                                                                           \
  static void bits_##N(void *arg, int64_t n, void *const *p, const int64_t *st) {                \
    (void)arg;                                                                                   \
    ctype *restrict d = p[0];                                                                    \
    const ctype *restrict s = p[1];                                                              \
    int64_t sd = st[0], ss = st[1];                                                              \
    if (sd == 1 && ss == 1) memcpy(d, s, (size_t)n * sizeof *d);                                 \
    else if (sd == 1 && ss == 0)                                                                 \
      for (int64_t i = 0; i < n; i++) d[i] = *s;                                                 \
    else                                                                                         \
      for (int64_t i = 0; i < n; i++) d[i * sd] = s[i * ss];                                     \
  }
BITS(1, uint8_t)
BITS(2, uint16_t)
BITS(4, uint32_t)
BITS(8, uint64_t)

typedef struct walk {
  const moe_iter *it;
  moe_inner_fn *inner;
  int64_t esize[MOE_ITER_OPERANDS];
} walk;

static void walk_rows(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const walk *w = arg;
  moe_iter_rows(w->it, begin, end, w->esize, w->inner, NULL);
}

static void walk_flat(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const walk *w = arg;
  void *p[MOE_ITER_OPERANDS];
  int64_t st[MOE_ITER_OPERANDS];
  for (int k = 0; k < w->it->noperands; k++) {
    st[k] = w->it->ndim ? w->it->stride[k][0] : 0;
    p[k] = (char *)w->it->ptr[k] + begin * st[k] * w->esize[k];
  }
  w->inner(NULL, end - begin, p, st);
}

static void run(walk *w) {
  const moe_iter *it = w->it;
  if (it->ndim <= 1) {
    moe_parallel_range(it->numel, MOE_GRAIN * 4, walk_flat, w);
  } else {
    int64_t rows = MOE_GRAIN / it->shape[0];
    moe_parallel_range(moe_iter_nrows(it), MOE_MAX(rows, 1), walk_rows, w);
  }
}

/* Copies whose inner rows are short while the source runs along another dimension (a transpose): blocks of
** BLOCK x BLOCK elements keep both sides' cache lines in use. 4-byte elements, the common case. */
enum { BLOCK = 16 };

typedef struct transpose {
  const moe_iter *it;
  int other; /* the dimension along which the source is contiguous */
  int64_t blocks;
} transpose;

static void transpose_task(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const transpose *t = arg;
  const moe_iter *it = t->it;
  int o = t->other;
  for (int64_t task = begin; task < end; task++) {
    int64_t rest = task / t->blocks, block = task % t->blocks;
    uint32_t *d = it->ptr[0];
    const uint32_t *s = it->ptr[1];
    for (int k = 1; k < it->ndim; k++) {
      if (k == o) continue;
      int64_t at = rest % it->shape[k];
      rest /= it->shape[k];
      d += at * it->stride[0][k];
      s += at * it->stride[1][k];
    }
    int64_t j0 = block * BLOCK, j1 = MOE_MIN(j0 + BLOCK, it->shape[o]), dj = it->stride[0][o], si = it->stride[1][0];
    for (int64_t i0 = 0; i0 < it->shape[0]; i0 += BLOCK) {
      int64_t i1 = MOE_MIN(i0 + BLOCK, it->shape[0]);
      for (int64_t j = j0; j < j1; j++)
        for (int64_t i = i0; i < i1; i++) d[j * dj + i] = s[i * si + j];
    }
  }
}

static _Bool run_transpose(const moe_iter *it) {
  if (it->ndim < 2 || it->stride[0][0] != 1 || it->stride[1][0] <= 1) return false;
  int o = 0;
  for (int k = 1; k < it->ndim; k++)
    if (it->stride[1][k] == 1) o = k;
  if (o == 0) return false;
  transpose t = {it, o, (it->shape[o] + BLOCK - 1) / BLOCK};
  int64_t tasks = it->numel / it->shape[0] / it->shape[o] * t.blocks;
  moe_parallel_range(tasks, MOE_MAX(1, MOE_GRAIN / (BLOCK * it->shape[0])), transpose_task, &t);
  return true;
}

moe_status MOE_CPU(copy)(const moe_iter *it, moe_dtype dst, moe_dtype src) {
  static moe_inner_fn *const bits[9] = {[1] = bits_1, [2] = bits_2, [4] = bits_4, [8] = bits_8};
  if (dst == src && moe_dtype_size(dst) == 4 && run_transpose(it)) return MOE_OK;
  walk w = {.it = it, .esize = {moe_dtype_size(dst), moe_dtype_size(src)}};
  w.inner = dst == src ? bits[moe_dtype_size(dst)] : convert[dst][src];
  run(&w);
  return MOE_OK;
}

moe_status MOE_CPU(fill)(const moe_iter *it, moe_dtype dt, double value) {
  static moe_inner_fn *const bits[9] = {[1] = bits_1, [2] = bits_2, [4] = bits_4, [8] = bits_8};
  uint64_t v = 0;
  moe_store_f64(&v, dt, value);
  moe_iter two = *it; /* a copy from one repeated element */
  two.noperands = 2;
  two.ptr[1] = &v;
  memset(two.stride[1], 0, sizeof two.stride[1]);
  int64_t size = moe_dtype_size(dt);
  walk w = {.it = &two, .esize = {size, size}, .inner = bits[size]};
  run(&w);
  return MOE_OK;
}
