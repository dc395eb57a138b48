/* Kernels of one operand: functions, their slopes for the backward, predicates, clamp. */
#include "cpu/span.h"
#include "cpu/vmath.h"
#include "op/pointwise.h"

/* Loops may write over their first input, element by element; that is no dependence between elements. */
#define SIMD _Pragma("omp simd")

typedef void loop_f32(float *o, const float *a, int64_t n, float p);
typedef void loop_f64(double *o, const double *a, int64_t n, double p);
typedef void loop_i64(int64_t *o, const int64_t *a, int64_t n);
typedef void slope_f32(float *o, const float *g, const float *kept, int64_t n, float p);
typedef void slope_f64(double *o, const double *g, const double *kept, int64_t n, double p);
typedef void test_f32(uint8_t *o, const float *a, int64_t n);
typedef void test_f64(uint8_t *o, const double *a, int64_t n);

#define KEPT_N(T) (void)kept;
#define KEPT_X(T) const T x = kept[i];
#define KEPT_Y(T) const T y = kept[i];

/* --- f32 --- */
#define C(v) ((float)(v))
#define M(f) VM(f, f32)
#define UNARY(name, keep, value, slope)                                                             \
  static void name##_f32(float *o, const float *in, int64_t n, float p) {                            \
    (void)p;                                                                                        \
    SIMD for (int64_t i = 0; i < n; i++) {                                                          \
      const float x = in[i];                                                                        \
      o[i] = value;                                                                                 \
    }                                                                                               \
  }                                                                                                 \
  static void slope_##name##_f32(float *o, const float *g, const float *kept, int64_t n, float p) { \
    (void)p;                                                                                        \
    SIMD for (int64_t i = 0; i < n; i++) {                                                          \
      KEPT_##keep(float) o[i] = g[i] * (slope);                                                     \
    }                                                                                               \
  }
#define PREDICATE(name, value)                                      \
  static void name##_f32(uint8_t *o, const float *in, int64_t n) {  \
    SIMD for (int64_t i = 0; i < n; i++) {                          \
      const float x = in[i];                                        \
      o[i] = value;                                                 \
    }                                                               \
  }
#include "op/pointwise.def"
#undef C
#undef M

/* --- f64: the library's functions are calls, so nothing is asked of the vectoriser --- */
#define C(v) ((double)(v))
#define M(f) VM(f, f64)
#define UNARY(name, keep, value, slope)                                                                \
  static void name##_f64(double *o, const double *in, int64_t n, double p) {                            \
    (void)p;                                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                                  \
      const double x = in[i];                                                                          \
      o[i] = value;                                                                                    \
    }                                                                                                  \
  }                                                                                                    \
  static void slope_##name##_f64(double *o, const double *g, const double *kept, int64_t n, double p) { \
    (void)p;                                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                                  \
      KEPT_##keep(double) o[i] = g[i] * (slope);                                                       \
    }                                                                                                  \
  }
#define PREDICATE(name, value)                                       \
  static void name##_f64(uint8_t *o, const double *in, int64_t n) {  \
    for (int64_t i = 0; i < n; i++) {                                \
      const double x = in[i];                                        \
      o[i] = value;                                                  \
    }                                                                \
  }
#include "op/pointwise.def"
#undef C
#undef M

#define UNARY_INT(name, value)                                         \
  static void name##_i64(int64_t *o, const int64_t *in, int64_t n) {   \
    SIMD for (int64_t i = 0; i < n; i++) {                             \
      const int64_t x = in[i];                                         \
      o[i] = value;                                                    \
    }                                                                  \
  }
#include "op/pointwise.def"

/* --- the tables --- */
static loop_f32 *const fn_f32[MOE_UN_COUNT] = {
#define UNARY(name, keep, value, slope) name##_f32,
#include "op/pointwise.def"
};
static loop_f64 *const fn_f64[MOE_UN_COUNT] = {
#define UNARY(name, keep, value, slope) name##_f64,
#include "op/pointwise.def"
};
static loop_i64 *const fn_i64[MOE_UN_COUNT] = {
#define UNARY_INT(name, value) [MOE_UN_##name] = name##_i64,
#include "op/pointwise.def"
};
static slope_f32 *const slopes_f32[MOE_UN_COUNT] = {
#define UNARY(name, keep, value, slope) slope_##name##_f32,
#include "op/pointwise.def"
};
static slope_f64 *const slopes_f64[MOE_UN_COUNT] = {
#define UNARY(name, keep, value, slope) slope_##name##_f64,
#include "op/pointwise.def"
};
static test_f32 *const tests_f32[MOE_PR_COUNT] = {
#define PREDICATE(name, value) name##_f32,
#include "op/pointwise.def"
};
static test_f64 *const tests_f64[MOE_PR_COUNT] = {
#define PREDICATE(name, value) name##_f64,
#include "op/pointwise.def"
};

/* Arguments beyond the reach of the vector sine and cosine: the library's. */
#define FAR(name)                                                                     \
  static void name##_far_f32(float *o, const float *in, int64_t n, float p) {         \
    float top = 0;                                                                    \
    for (int64_t i = 0; i < n; i++) top = fabsf(in[i]) > top ? fabsf(in[i]) : top;    \
    if (top <= VM_TRIG_MAX) name##_f32(o, in, n, p);                                  \
    else                                                                              \
      for (int64_t i = 0; i < n; i++) o[i] = name##f(in[i]);                          \
  }
FAR(sin)
FAR(cos)

/* --- slots --- */

/* A repeated input of a broadcast view: computed once a span. */
#define RUN_UNARY(type, T, ...)                                                        \
  static void run_##type(const span_job *j, int64_t n, char *const *p, unsigned rep) { \
    loop_##type *f = (loop_##type *)j->fn;                                             \
    T *o = (T *)p[0];                                                                  \
    if (!rep) f(o, (const T *)p[1], n __VA_ARGS__);                                    \
    else if (n > 0) {                                                                  \
      T v;                                                                             \
      f(&v, (const T *)p[1], 1 __VA_ARGS__);                                           \
      for (int64_t i = 0; i < n; i++) o[i] = v;                                        \
    }                                                                                  \
  }
RUN_UNARY(f32, float, , (float)j->p)
RUN_UNARY(f64, double, , j->p)
RUN_UNARY(i64, int64_t)

moe_status MOE_CPU(unary)(const moe_iter *it, moe_dtype dt, int fn, double p) {
  if (dt == MOE_f32) {
    loop_f32 *f = fn == MOE_UN_sin ? sin_far_f32 : fn == MOE_UN_cos ? cos_far_f32 : fn_f32[fn];
    if (span_tiny(it)) {
      f(it->ptr[0], it->ptr[1], it->numel, (float)p);
      return MOE_OK;
    }
    span_run(&(span_job){.it = it, .run = run_f32, .fn = (void (*)(void))f, .p = p, .esize = {4, 4}});
  } else if (dt == MOE_f64) {
    span_run(&(span_job){.it = it, .run = run_f64, .fn = (void (*)(void))fn_f64[fn], .p = p, .esize = {8, 8}});
  } else {
    if (fn_i64[fn] == NULL) return moe_fail(MOE_EDEVICE, "no integer kernel of this function");
    span_run(&(span_job){.it = it, .run = run_i64, .fn = (void (*)(void))fn_i64[fn], .esize = {8, 8}});
  }
  return MOE_OK;
}

/* Fills `buf` with a repeated operand and points p at it. */
#define SPREAD(T, k, buf)                                              \
  do {                                                                 \
    for (int64_t i = 0; i < m; i++) (buf)[i] = *(const T *)p[k];       \
  } while (0)

/* Two inputs of one type, either of which may be repeated: through buffers of SPAN_BLOCK. */
#define RUN_SLOPE(type, T)                                                                       \
  static void run_slope_##type(const span_job *j, int64_t n, char *const *p, unsigned rep) {     \
    slope_##type *f = (slope_##type *)j->fn;                                                     \
    if (!rep) {                                                                                  \
      f((T *)p[0], (const T *)p[1], (const T *)p[2], n, (T)j->p);                                \
      return;                                                                                    \
    }                                                                                            \
    T b1[SPAN_BLOCK], b2[SPAN_BLOCK];                                                            \
    int64_t m = MOE_MIN(n, SPAN_BLOCK);                                                          \
    if (rep & 2) SPREAD(T, 1, b1);                                                               \
    if (rep & 4) SPREAD(T, 2, b2);                                                               \
    for (int64_t i = 0; i < n; i += SPAN_BLOCK) {                                                \
      const T *g = rep & 2 ? b1 : (const T *)p[1] + i, *s = rep & 4 ? b2 : (const T *)p[2] + i;  \
      f((T *)p[0] + i, g, s, MOE_MIN(n - i, SPAN_BLOCK), (T)j->p);                               \
    }                                                                                            \
  }
RUN_SLOPE(f32, float)
RUN_SLOPE(f64, double)

moe_status MOE_CPU(unary_bwd)(const moe_iter *it, moe_dtype dt, int fn, double p) {
  if (dt == MOE_f32)
    span_run(&(span_job){
        .it = it, .run = run_slope_f32, .fn = (void (*)(void))slopes_f32[fn], .p = p, .esize = {4, 4, 4}});
  else
    span_run(&(span_job){
        .it = it, .run = run_slope_f64, .fn = (void (*)(void))slopes_f64[fn], .p = p, .esize = {8, 8, 8}});
  return MOE_OK;
}

#define RUN_TEST(type, T)                                                                    \
  static void run_test_##type(const span_job *j, int64_t n, char *const *p, unsigned rep) {  \
    test_##type *f = (test_##type *)j->fn;                                                   \
    f((uint8_t *)p[0], (const T *)p[1], rep ? 1 : n);                                        \
    if (rep) memset(p[0], *p[0], (size_t)n);                                                 \
  }
RUN_TEST(f32, float)
RUN_TEST(f64, double)

moe_status MOE_CPU(predicate)(const moe_iter *it, moe_dtype dt, int fn) {
  if (dt == MOE_f32)
    span_run(&(span_job){.it = it, .run = run_test_f32, .fn = (void (*)(void))tests_f32[fn], .esize = {1, 4}});
  else
    span_run(&(span_job){.it = it, .run = run_test_f64, .fn = (void (*)(void))tests_f64[fn], .esize = {1, 8}});
  return MOE_OK;
}

/* --- clamp --- */

static int64_t bound_i64(double rounded) { /* saturating */
  return rounded >= 9223372036854775807.0 ? INT64_MAX : rounded <= -9223372036854775808.0 ? INT64_MIN : (int64_t)rounded;
}

#define CLAMP(type, T, LO, HI)                                                             \
  static void run_clamp_##type(const span_job *j, int64_t n, char *const *p, unsigned rep) { \
    T *o = (T *)p[0];                                                                      \
    const T *in = (const T *)p[1];                                                         \
    const T lo = LO, hi = HI;                                                              \
    int64_t step = !rep;                                                                   \
    if (step) {                                                                            \
      SIMD for (int64_t i = 0; i < n; i++) {                                               \
        T x = in[i];                                                                       \
        x = x < lo ? lo : x;                                                               \
        o[i] = x > hi ? hi : x;                                                            \
      }                                                                                    \
    } else {                                                                               \
      T x = *in;                                                                           \
      x = x < lo ? lo : x;                                                                 \
      x = x > hi ? hi : x;                                                                 \
      for (int64_t i = 0; i < n; i++) o[i] = x;                                            \
    }                                                                                      \
  }
CLAMP(f32, float, (float)j->p, (float)j->q)
CLAMP(f64, double, j->p, j->q)
CLAMP(i64, int64_t, bound_i64(ceil(j->p)), bound_i64(floor(j->q)))

moe_status MOE_CPU(clamp)(const moe_iter *it, moe_dtype dt, double lo, double hi) {
  span_fn *run = dt == MOE_f32 ? run_clamp_f32 : dt == MOE_f64 ? run_clamp_f64 : run_clamp_i64;
  int64_t size = moe_dtype_size(dt);
  span_run(&(span_job){.it = it, .run = run, .p = lo, .q = hi, .esize = {size, size}});
  return MOE_OK;
}

/* gx = g where lo <= x <= hi, else 0 */
#define CLAMP_BWD(type, T)                                                                       \
  static void run_clamp_bwd_##type(const span_job *j, int64_t n, char *const *p, unsigned rep) { \
    T *o = (T *)p[0];                                                                            \
    const T *g = (const T *)p[1], *in = (const T *)p[2];                                         \
    const T lo = (T)j->p, hi = (T)j->q;                                                          \
    int64_t sg = !(rep & 2), sx = !(rep & 4);                                                    \
    if (sg & sx) {                                                                               \
      SIMD for (int64_t i = 0; i < n; i++) o[i] = ((in[i] >= lo) & (in[i] <= hi)) ? g[i] : 0;    \
    } else                                                                                       \
      for (int64_t i = 0; i < n; i++) o[i] = ((in[i * sx] >= lo) & (in[i * sx] <= hi)) ? g[i * sg] : 0; \
  }
CLAMP_BWD(f32, float)
CLAMP_BWD(f64, double)

moe_status MOE_CPU(clamp_bwd)(const moe_iter *it, moe_dtype dt, double lo, double hi) {
  int64_t size = moe_dtype_size(dt);
  span_run(&(span_job){.it = it,
                       .run = dt == MOE_f32 ? run_clamp_bwd_f32 : run_clamp_bwd_f64,
                       .p = lo,
                       .q = hi,
                       .esize = {size, size, size}});
  return MOE_OK;
}
