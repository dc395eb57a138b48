/* Integers that order as floats do, for branch-free maxima and sorting.
**
** The bits of a float, seen as a signed integer, order as the values do where the sign bit is clear, and the
** other way where it is set; flipping the other bits of negative ones makes it one order. NaN of any sign
** becomes the largest key (max) or the smallest (min).
*/
#ifndef MOE_CPU_ORDER_H
#define MOE_CPU_ORDER_H

#include <stdint.h>
#include <string.h>

static inline int32_t moe_f32_bits(float x) {
  int32_t b;
  memcpy(&b, &x, 4);
  return b;
}

static inline int64_t moe_f64_bits(double x) {
  int64_t b;
  memcpy(&b, &x, 8);
  return b;
}

static inline float moe_bits_f32(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

static inline double moe_bits_f64(uint64_t b) {
  double x;
  memcpy(&x, &b, 8);
  return x;
}

static inline int32_t moe_key_f32(float x) {
  int32_t b = moe_f32_bits(x);
  return b ^ (b >> 31 & 0x7FFFFFFF);
}

static inline int64_t moe_key_f64(double x) {
  int64_t b = moe_f64_bits(x);
  return b ^ (b >> 63 & INT64_MAX);
}

static inline int32_t moe_key_max_f32(float x) { return x != x ? INT32_MAX : moe_key_f32(x); }
static inline int32_t moe_key_min_f32(float x) { return x != x ? INT32_MIN : moe_key_f32(x); }
static inline int64_t moe_key_max_f64(double x) { return x != x ? INT64_MAX : moe_key_f64(x); }
static inline int64_t moe_key_min_f64(double x) { return x != x ? INT64_MIN : moe_key_f64(x); }

/* The magnitude's bits; a NaN's lie above infinity's as they are, and below all for a minimum. */
static inline int32_t moe_key_maxabs_f32(float x) { return moe_f32_bits(x) & INT32_MAX; }
static inline int64_t moe_key_maxabs_f64(double x) { return moe_f64_bits(x) & INT64_MAX; }
static inline int32_t moe_key_minabs_f32(float x) { return x != x ? -1 : moe_f32_bits(x) & INT32_MAX; }
static inline int64_t moe_key_minabs_f64(double x) { return x != x ? -1 : moe_f64_bits(x) & INT64_MAX; }

/* Back; the NaN keys give NaN: INT32_MAX is a NaN's pattern, and so is what INT32_MIN turns into. */
static inline float moe_unkey_f32(int32_t k) { return moe_bits_f32((uint32_t)(k ^ (k >> 31 & 0x7FFFFFFF))); }
static inline double moe_unkey_f64(int64_t k) { return moe_bits_f64((uint64_t)(k ^ (k >> 63 & INT64_MAX))); }

#endif
