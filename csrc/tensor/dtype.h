/* Element types. */
#ifndef MOE_TENSOR_DTYPE_H
#define MOE_TENSOR_DTYPE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Rows: name, C type of one element, is floating. Order = promotion order within a kind. */
#define MOE_DTYPES(X)      \
  X(bool, uint8_t, 0)      \
  X(u8, uint8_t, 0)        \
  X(i32, int32_t, 0)       \
  X(i64, int64_t, 0)       \
  X(f16, uint16_t, 1)      \
  X(bf16, uint16_t, 1)     \
  X(f32, float, 1)         \
  X(f64, double, 1)

typedef enum moe_dtype {
#define X(name, ctype, fl) MOE_##name,
  MOE_DTYPES(X)
#undef X
  MOE_DTYPE_COUNT
} moe_dtype;

int64_t moe_dtype_size(moe_dtype t);
const char *moe_dtype_name(moe_dtype t);
bool moe_dtype_from_name(const char *name, moe_dtype *t); /* also accepts "float", "double", "long", "int", "byte", "half", "bfloat16" */
static inline bool moe_dtype_is_float(moe_dtype t) { return t >= MOE_f16; }

/* The type in which a and b meet: bool < u8 < i32 < i64 < {f16, bf16} < f32 < f64; f16 with bf16 gives f32. */
moe_dtype moe_dtype_promote(moe_dtype a, moe_dtype b);

/* The type in which kernels compute: f32 for every float but f64, i64 for every integer. */
static inline moe_dtype moe_dtype_compute(moe_dtype t) {
  return t == MOE_f64 ? MOE_f64 : moe_dtype_is_float(t) ? MOE_f32 : MOE_i64;
}

/* Scalar conversions, round to nearest even; NaN stays NaN. */
static inline float moe_bf16_to_f32(uint16_t x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t moe_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
  return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16 | 0x40) : rounded);
}

float moe_f16_to_f32(uint16_t x);
uint16_t moe_f32_to_f16(float f);

/* One element of any type as a double (exact but for i64 beyond 2^53) and back (saturating for integers). */
double moe_load_f64(const void *p, moe_dtype t);
void moe_store_f64(void *p, moe_dtype t, double v);
int64_t moe_load_i64(const void *p, moe_dtype t);
void moe_store_i64(void *p, moe_dtype t, int64_t v);

#endif
