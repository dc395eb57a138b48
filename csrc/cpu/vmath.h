/* Elementary functions as plain branch-free inline code, so that a loop over them is vectorised
** by the compiler on every instruction set: no tables, no calls, no data-dependent branches.
**
**   vm_<name>_f32   polynomials after Cephes (S. Moshier, "Methods and Programs for Mathematical
**                   Functions", 1989) where no other source is named; errors in units in the last
**                   place, measured over every exponent: exp 1, log 1, log1p 2, expm1 2, tanh 3,
**                   erf 2, sigmoid 3, sin and cos 2 (|x| <= VM_TRIG_MAX). NaN gives NaN, infinities give
**                   the limit, overflow gives infinity; exp and log know subnormal numbers.
**   vm_<name>_f64   the C library's, for code written for both types: VM(name, f32)(x)
**
** Wants -fno-math-errno -fno-trapping-math; must not be compiled with -ffast-math (the rounding
** steps rely on the order of operations).
*/
#ifndef MOE_CPU_VMATH_H
#define MOE_CPU_VMATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t vm_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

static inline float vm_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

#define VM_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, which lies in the low bits */
#define VM_LN2_HI 0.693359375f
#define VM_LN2_LO (-2.12194440e-4f)

/* x = n ln2 + r, |r| <= ln2/2; *n as a two's complement number. */
static inline float vm_exp_reduce(float x, uint32_t *n) {
  float t = x * 1.44269504088896341f + VM_MAGIC;
  *n = vm_bits(t) - vm_bits(VM_MAGIC);
  t -= VM_MAGIC;
  return (x - t * VM_LN2_HI) - t * VM_LN2_LO;
}

/* (exp(r) - 1 - r) / r^2 for |r| <= ln2/2 */
static inline float vm_exp_tail(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p;
}

static inline float vm_exp_f32(float x) {
  uint32_t n;
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  float r = vm_exp_reduce(x, &n);
  float y = (vm_exp_tail(r) * r * r + r) + 1.0f;
  /* 2^n in two factors: n reaches 128 and -150. The logical shift is of n + 256, which is positive. */
  uint32_t h = ((n + 256u) >> 1) - 128u;
  return y * vm_float((h + 127u) << 23) * vm_float((n - h + 127u) << 23);
}

/* exp for arguments that are hardly positive, as those of a softmax less its greatest: 0 below -87.3, up to 88. One factor. */
static inline float vm_exp_soft_f32(float x) {
  uint32_t n;
  x = x < -88.0f ? -88.0f : x; /* n = -127: the factor's bits are those of 0 */
  float r = vm_exp_reduce(x, &n);
  return ((vm_exp_tail(r) * r * r + r) + 1.0f) * vm_float((n + 127u) << 23);
}

static inline float vm_expm1_f32(float x) {
  uint32_t n;
  x = x > 89.0f ? 89.0f : x;
  float xc = x < -30.0f ? -30.0f : x;
  float r = vm_exp_reduce(xc, &n);
  float p = vm_exp_tail(r) * r * r + r;
  float s = vm_float((n + 126u) << 23); /* 2^(n-1): n may be 128 */
  float y = (s * p + (s - 0.5f)) * 2.0f;
  return x == 0.0f ? x : y;
}

/* (log(1+f) - f + f^2/2) / f^3 for 1+f in [sqrt(1/2), sqrt(2)] */
static inline float vm_log_tail(float f) {
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return p;
}

static inline float vm_log_join(float f, float n) {
  float z = f * f;
  float y = f * z * vm_log_tail(f);
  y += n * VM_LN2_LO;
  y -= 0.5f * z;
  return (f + y) + n * VM_LN2_HI;
}

#define VM_SQRT_HALF 0x3F3504F3u /* the bits of sqrt(1/2) */

static inline float vm_log_f32(float x) {
  float small = x < 1.17549435e-38f ? 1.0f : 0.0f; /* subnormal: scale up first */
  float xs = x < 1.17549435e-38f ? x * 8388608.0f : x;
  uint32_t u = vm_bits(xs) - VM_SQRT_HALF;
  float n = (float)((int32_t)u >> 23) - 23.0f * small;
  float f = vm_float((u & 0x007FFFFFu) + VM_SQRT_HALF) - 1.0f;
  float y = vm_log_join(f, n);
  y = x == 0.0f ? -INFINITY : y;
  y = x < 0.0f ? NAN : y;
  return x < INFINITY ? y : x + x; /* inf and NaN as they came */
}

/* 1+x = 2^n (1+f), the rounding of 1+x carried into f (as in W. Kahan's log1p) */
static inline float vm_log1p_f32(float x) {
  float w = 1.0f + x;
  float c = x < 1.0f ? x - (w - 1.0f) : 1.0f - (w - x); /* exact: 1+x = w+c */
  uint32_t u = vm_bits(w) - VM_SQRT_HALF;
  int32_t n = (int32_t)u >> 23;
  float f = vm_float((u & 0x007FFFFFu) + VM_SQRT_HALF) - 1.0f;
  float scale = vm_float((uint32_t)(127 - n) << 23);
  f += n < 64 ? c * scale : 0.0f;
  float y = vm_log_join(f, (float)n);
  y = x == -1.0f ? -INFINITY : y;
  y = x < -1.0f ? NAN : y;
  y = x == 0.0f ? x : y;
  return x < INFINITY ? y : x + x;
}

static inline float vm_log2_f32(float x) { return vm_log_f32(x) * 1.44269504088896341f; }

static inline float vm_sigmoid_f32(float x) { return 1.0f / (1.0f + vm_exp_f32(-x)); }

static inline float vm_tanh_f32(float x) {
  float a = fabsf(x);
  float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  float small = p * z * x + x;
  float c = a > 20.0f ? 20.0f : a;
  float big = copysignf(1.0f - 2.0f / (vm_exp_f32(2.0f * c) + 1.0f), x);
  return a < 0.625f ? small : big;
}

/* after N. Juffa's erff: a polynomial below 0.93, 1 - exp(polynomial) above */
static inline float vm_erf_f32(float x) {
  float a = fabsf(x);
  float t = a > 4.0f ? 4.0f : a; /* erf(4) rounds to 1 */
  float s = t * t;
  float r = (-1.72853470e-5f * t + 3.83197126e-4f) * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  float big = copysignf(1.0f - vm_exp_f32(r), x);
  float q = -5.96761703e-4f;
  q = q * s + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  return a > 0.927734375f ? big : q * x + x;
}

/* log(1 + exp(x)) */
static inline float vm_softplus_f32(float x) {
  float m = x < 0.0f ? 0.0f : x;
  return m + vm_log1p_f32(vm_exp_f32(-fabsf(x)));
}

/* sine and cosine for |r| <= pi/4 */
static inline float vm_sin_core(float r) {
  float z = r * r;
  return ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
}

static inline float vm_cos_core(float r) {
  float z = r * r;
  return ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
}

/* The quadrant is kept as a quarter: x = r + (pi/2) k, *quarter = k/4 less its nearest integer. The
** reduction runs in double and serves arguments up to VM_TRIG_MAX; beyond it the value is of no use. */
#define VM_TRIG_MAX 134217728.0f /* 2^27 */
static inline float vm_trig_reduce(float x, float *quarter) {
  const double magic = 6755399441055744.0; /* 1.5 * 2^52 */
  double k = ((double)x * 0.63661977236758134308 + magic) - magic;
  /* pi/2 in pieces of 26, 26 and 53 bits: k times a short one is exact */
  double r = (((double)x - k * 0x1.921fb5p+0) - k * 0x1.110b46p-26) - k * 0x1.1a62633145c07p-54;
  double q = k * 0.25;
  *quarter = (float)(q - ((q + magic) - magic));
  return (float)r;
}

static inline float vm_sin_f32(float x) {
  float q, r = vm_trig_reduce(x, &q);
  float a = fabsf(q);
  float y = a == 0.25f ? vm_cos_core(r) : vm_sin_core(r);
  return (a == 0.5f || q == -0.25f) ? -y : y;
}

static inline float vm_cos_f32(float x) {
  float q, r = vm_trig_reduce(x, &q);
  float a = fabsf(q);
  float y = a == 0.25f ? vm_sin_core(r) : vm_cos_core(r);
  return (a == 0.5f || q == 0.25f) ? -y : y;
}

/* sin and cos of 2 pi u, u in [-1/2, 1/2]: for random normal numbers */
static inline void vm_sincos_turn(float u, float *s, float *c) {
  float k = (u * 4.0f + VM_MAGIC) - VM_MAGIC; /* -2 .. 2 */
  float r = (u * 4.0f - k) * 1.57079632679489662f;
  float a = fabsf(k), sr = vm_sin_core(r), cr = vm_cos_core(r);
  float ys = a == 1.0f ? cr : sr, yc = a == 1.0f ? sr : cr;
  *s = (a == 2.0f || k == -1.0f) ? -ys : ys;
  *c = (a == 2.0f || k == 1.0f) ? -yc : yc;
}

/* rounding, half to even; floor, ceil and trunc are single instructions or a few where the processor has none */
static inline float vm_round_f32(float x) {
  float a = fabsf(x);
  float r = copysignf((a + 8388608.0f) - 8388608.0f, x);
  return a < 8388608.0f ? r : x;
}

static inline float vm_trunc_f32(float x) {
  float r = vm_round_f32(fabsf(x));
  r = r > fabsf(x) ? r - 1.0f : r;
  return copysignf(r, x);
}

static inline float vm_floor_f32(float x) {
  float r = vm_round_f32(x);
  return r > x ? r - 1.0f : r;
}

static inline float vm_ceil_f32(float x) {
  float r = vm_round_f32(x);
  return r < x ? copysignf(r + 1.0f, x) : r;
}

static inline float vm_sqrt_f32(float x) { return sqrtf(x); }
static inline float vm_abs_f32(float x) { return fabsf(x); }
static inline float vm_pow_f32(float x, float y) { return powf(x, y); } /* a call: not vectorised */
static inline float vm_fmod_f32(float x, float y) { return fmodf(x, y); }
static inline float vm_atan2_f32(float y, float x) { return atan2f(y, x); }

static inline double vm_exp_f64(double x) { return exp(x); }
static inline double vm_expm1_f64(double x) { return expm1(x); }
static inline double vm_log_f64(double x) { return log(x); }
static inline double vm_log1p_f64(double x) { return log1p(x); }
static inline double vm_log2_f64(double x) { return log2(x); }
static inline double vm_tanh_f64(double x) { return tanh(x); }
static inline double vm_erf_f64(double x) { return erf(x); }
static inline double vm_sin_f64(double x) { return sin(x); }
static inline double vm_cos_f64(double x) { return cos(x); }
static inline double vm_sigmoid_f64(double x) { return 1.0 / (1.0 + exp(-x)); }
static inline double vm_softplus_f64(double x) { return (x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x))); }
static inline double vm_round_f64(double x) { return rint(x); }
static inline double vm_trunc_f64(double x) { return trunc(x); }
static inline double vm_floor_f64(double x) { return floor(x); }
static inline double vm_ceil_f64(double x) { return ceil(x); }
static inline double vm_sqrt_f64(double x) { return sqrt(x); }
static inline double vm_abs_f64(double x) { return fabs(x); }
static inline double vm_pow_f64(double x, double y) { return pow(x, y); }
static inline double vm_fmod_f64(double x, double y) { return fmod(x, y); }
static inline double vm_atan2_f64(double y, double x) { return atan2(y, x); }

#define VM_(name, type) vm_##name##_##type
#define VM(name, type) VM_(name, type)

#endif
