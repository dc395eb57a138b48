/* Kernels of two operands: arithmetic, comparison; and the choice between two by a third. */
#include "cpu/span.h"
#include "cpu/vmath.h"
#include "op/pointwise.h"

#define SIMD _Pragma("omp simd")

/* Remainder with the divisor's sign, as Lua's %. */
static inline float vm_floormod_f32(float a, float b) {
  float m = fmodf(a, b);
  return m != 0 && (m < 0) != (b < 0) ? m + b : m;
}
static inline double vm_floormod_f64(double a, double b) {
  double m = fmod(a, b);
  return m != 0 && (m < 0) != (b < 0) ? m + b : m;
}

/* Modulo 2^64; a negative exponent gives the integer part of the quotient. */
static inline int64_t int_pow(int64_t a, int64_t b) {
  if (b < 0) return a == 1 ? 1 : a == -1 ? (b & 1 ? -1 : 1) : 0;
  uint64_t r = 1, f = (uint64_t)a;
  for (; b; b >>= 1, f *= f)
    if (b & 1) r *= f;
  return (int64_t)r;
}

/* rep: bit 1 = a is one value, bit 2 = b is one value; not both */
#define LOOPS(fname, O, T, value, HINT)                                                           \
  static void fname(O *o, const T *pa, const T *pb, int64_t n, unsigned rep) {                     \
    if (rep == 0) {                                                                               \
      HINT for (int64_t i = 0; i < n; i++) {                                                      \
        const T a = pa[i], b = pb[i];                                                             \
        o[i] = value;                                                                             \
      }                                                                                           \
    } else if (rep == 4) {                                                                        \
      const T b = *pb;                                                                            \
      HINT for (int64_t i = 0; i < n; i++) {                                                      \
        const T a = pa[i];                                                                        \
        o[i] = value;                                                                             \
      }                                                                                           \
    } else {                                                                                      \
      const T a = *pa;                                                                            \
      HINT for (int64_t i = 0; i < n; i++) {                                                      \
        const T b = pb[i];                                                                        \
        o[i] = value;                                                                             \
      }                                                                                           \
    }                                                                                             \
  }
#define NOHINT
#define U(x) ((uint64_t)(x))

#define M(f) VM(f, f32)
#define BINARY(name, value) LOOPS(name##_f32, float, float, value, SIMD)
#define BINARY_CALL(name, value) LOOPS(name##_f32, float, float, value, NOHINT)
#define COMPARE(name, value) LOOPS(name##_f32, uint8_t, float, value, SIMD)
#include "op/pointwise.def"
#undef M

#define M(f) VM(f, f64)
#define BINARY(name, value) LOOPS(name##_f64, double, double, value, NOHINT)
#define BINARY_CALL(name, value) LOOPS(name##_f64, double, double, value, NOHINT)
#define COMPARE(name, value) LOOPS(name##_f64, uint8_t, double, value, NOHINT)
#include "op/pointwise.def"
#undef M

#define BINARY_INT(name, value) LOOPS(name##_i64, int64_t, int64_t, value, NOHINT)
#define COMPARE(name, value) LOOPS(name##_i64, uint8_t, int64_t, value, NOHINT)
#include "op/pointwise.def"

typedef void (*any_fn)(void);
enum { F32, F64, I64, TYPES };

static any_fn const arithmetic[TYPES][MOE_BI_COUNT] = {
    {
#define BINARY(name, value) (any_fn)name##_f32,
#define BINARY_CALL(name, value) (any_fn)name##_f32,
#include "op/pointwise.def"
    },
    {
#define BINARY(name, value) (any_fn)name##_f64,
#define BINARY_CALL(name, value) (any_fn)name##_f64,
#include "op/pointwise.def"
    },
    {
#define BINARY_INT(name, value) [MOE_BI_##name] = (any_fn)name##_i64,
#include "op/pointwise.def"
    }};

static any_fn const comparison[TYPES][MOE_CM_COUNT] = {
    {
#define COMPARE(name, value) (any_fn)name##_f32,
#include "op/pointwise.def"
    },
    {
#define COMPARE(name, value) (any_fn)name##_f64,
#include "op/pointwise.def"
    },
    {
#define COMPARE(name, value) (any_fn)name##_i64,
#include "op/pointwise.def"
    }};

typedef void arith_f32(float *, const float *, const float *, int64_t, unsigned);

/* Both inputs repeated: one value for the whole span. */
#define RUN(name, O, T)                                                                    \
  static void run_##name(const span_job *j, int64_t n, char *const *p, unsigned rep) {     \
    void (*f)(O *, const T *, const T *, int64_t, unsigned) =                              \
        (void (*)(O *, const T *, const T *, int64_t, unsigned))j->fn;                     \
    O *o = (O *)p[0];                                                                      \
    if (rep != 6) {                                                                        \
      f(o, (const T *)p[1], (const T *)p[2], n, rep);                                      \
      return;                                                                              \
    }                                                                                      \
    O v;                                                                                   \
    f(&v, (const T *)p[1], (const T *)p[2], 1, 0);                                         \
    for (int64_t i = 0; i < n; i++) o[i] = v;                                              \
  }
RUN(a_f32, float, float)
RUN(a_f64, double, double)
RUN(a_i64, int64_t, int64_t)
RUN(c_f32, uint8_t, float)
RUN(c_f64, uint8_t, double)
RUN(c_i64, uint8_t, int64_t)

static const int64_t type_size[TYPES] = {4, 8, 8};
static span_fn *const run_arithmetic[TYPES] = {run_a_f32, run_a_f64, run_a_i64};
static span_fn *const run_comparison[TYPES] = {run_c_f32, run_c_f64, run_c_i64};

static inline int type_of(moe_dtype dt) { return dt == MOE_f32 ? F32 : dt == MOE_f64 ? F64 : I64; }

static void find_zero(void *found, int64_t n, void *const *p, const int64_t *stride) {
  const int64_t *b = p[2];
  for (int64_t i = 0; i < n; i++)
    if (b[i * stride[2]] == 0) *(bool *)found = true;
}

static moe_status check_divisor(const moe_iter *it, int fn) {
  if (fn != MOE_BI_floor_divide && fn != MOE_BI_remainder && fn != MOE_BI_fmod) return MOE_OK;
  bool found = false;
  moe_iter_rows(it, 0, moe_iter_nrows(it), (const int64_t[]){8, 8, 8}, find_zero, &found);
  return found ? moe_fail(MOE_EINVAL, "attempt to divide an integer by zero") : MOE_OK;
}

moe_status MOE_CPU(binary)(const moe_iter *it, moe_dtype dt, int fn) {
  int t = type_of(dt);
  if (t == F32 && span_tiny(it)) {
    ((arith_f32 *)arithmetic[F32][fn])(it->ptr[0], it->ptr[1], it->ptr[2], it->numel, 0);
    return MOE_OK;
  }
  if (t == I64) MOE_TRY(check_divisor(it, fn));
  if (arithmetic[t][fn] == NULL) return moe_fail(MOE_EDEVICE, "no integer kernel of this function");
  int64_t s = type_size[t];
  span_run(&(span_job){.it = it, .run = run_arithmetic[t], .fn = arithmetic[t][fn], .esize = {s, s, s}});
  return MOE_OK;
}

moe_status MOE_CPU(compare)(const moe_iter *it, moe_dtype dt, int fn) {
  int t = type_of(dt);
  int64_t s = type_size[t];
  span_run(&(span_job){.it = it, .run = run_comparison[t], .fn = comparison[t][fn], .esize = {1, s, s}});
  return MOE_OK;
}

/* A number in the type of the computation, and the iterator with it as an operand. */
typedef union number {
  float f32;
  double f64;
  int64_t i64;
} number;

static void put_number(number *v, int t, double value) {
  if (t == F32) v->f32 = (float)value;
  else if (t == F64) v->f64 = value;
  else v->i64 = moe_load_i64(&value, MOE_f64);
}

static void with_number(moe_iter *three, const moe_iter *it, number *v, bool left) {
  *three = *it;
  three->noperands = 3;
  int k = left ? 1 : 2;
  three->ptr[3 - k] = it->ptr[1];
  memcpy(three->stride[3 - k], it->stride[1], sizeof it->stride[1]);
  three->ptr[k] = v;
  memset(three->stride[k], 0, sizeof it->stride[k]);
}

moe_status MOE_CPU(binary_scalar)(const moe_iter *it, moe_dtype dt, int fn, double value, bool left) {
  int t = type_of(dt);
  number v;
  put_number(&v, t, value);
  if (t == F32 && span_tiny(it)) {
    ((arith_f32 *)arithmetic[F32][fn])(it->ptr[0], left ? &v.f32 : it->ptr[1], left ? it->ptr[1] : &v.f32, it->numel,
                                       left ? 2 : 4);
    return MOE_OK;
  }
  moe_iter three;
  with_number(&three, it, &v, left);
  return MOE_CPU(binary)(&three, dt, fn);
}

moe_status MOE_CPU(compare_scalar)(const moe_iter *it, moe_dtype dt, int fn, double value, bool left) {
  number v;
  moe_iter three;
  put_number(&v, type_of(dt), value);
  with_number(&three, it, &v, left);
  return MOE_CPU(compare)(&three, dt, fn);
}

/* --- where: bits are chosen, so only the size of an element matters --- */
#define WHERE(bytes, T)                                                                   \
  static void where_##bytes(const span_job *j, int64_t n, char *const *p, unsigned rep) { \
    (void)j;                                                                              \
    T *o = (T *)p[0];                                                                     \
    const uint8_t *c = (const uint8_t *)p[1];                                             \
    const T *a = (const T *)p[2], *b = (const T *)p[3];                                   \
    int64_t sc = !(rep & 2), sa = !(rep & 4), sb = !(rep & 8);                            \
    if (rep == 0) {                                                                       \
      SIMD for (int64_t i = 0; i < n; i++) {                                              \
        const T x = a[i], y = b[i];                                                       \
        o[i] = c[i] ? x : y;                                                              \
      }                                                                                   \
    } else if (sc) {                                                                      \
      for (int64_t i = 0; i < n; i++) {                                                   \
        const T x = a[i * sa], y = b[i * sb];                                             \
        o[i] = c[i] ? x : y;                                                              \
      }                                                                                   \
    } else {                                                                              \
      const T *s = *c ? a : b;                                                            \
      int64_t st = *c ? sa : sb;                                                          \
      for (int64_t i = 0; i < n; i++) o[i] = s[i * st];                                   \
    }                                                                                     \
  }
WHERE(1, uint8_t)
WHERE(2, uint16_t)
WHERE(4, uint32_t)
WHERE(8, uint64_t)

moe_status MOE_CPU(where)(const moe_iter *it, moe_dtype dt) {
  int64_t s = moe_dtype_size(dt);
  span_fn *run = s == 1 ? where_1 : s == 2 ? where_2 : s == 4 ? where_4 : where_8;
  span_run(&(span_job){.it = it, .run = run, .esize = {s, 1, s, s}});
  return MOE_OK;
}
