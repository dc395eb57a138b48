#include "tensor/dtype.h"

#include <math.h>

static const struct {
  const char *name;
  int8_t size;
} info[MOE_DTYPE_COUNT] = {
#define X(name, ctype, fl) {#name, sizeof(ctype)},
    MOE_DTYPES(X)
#undef X
};

int64_t moe_dtype_size(moe_dtype t) { return info[t].size; }
const char *moe_dtype_name(moe_dtype t) { return info[t].name; }

bool moe_dtype_from_name(const char *name, moe_dtype *t) {
  static const struct {
    const char *name;
    moe_dtype t;
  } other[] = {{"float", MOE_f32}, {"double", MOE_f64}, {"long", MOE_i64},      {"int", MOE_i32},
               {"byte", MOE_u8},   {"half", MOE_f16},   {"bfloat16", MOE_bf16}};
  for (int i = 0; i < MOE_DTYPE_COUNT; i++)
    if (strcmp(name, info[i].name) == 0) return *t = (moe_dtype)i, true;
  for (size_t i = 0; i < sizeof other / sizeof *other; i++)
    if (strcmp(name, other[i].name) == 0) return *t = other[i].t, true;
  return false;
}

moe_dtype moe_dtype_promote(moe_dtype a, moe_dtype b) {
  if ((a == MOE_f16 && b == MOE_bf16) || (a == MOE_bf16 && b == MOE_f16)) return MOE_f32;
  return a > b ? a : b;
}

float moe_f16_to_f32(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, e = x >> 10 & 31, m = x & 1023, u;
  if (e == 31) u = sign | 0x7F800000u | m << 13;
  else if (e != 0) u = sign | (e + 112) << 23 | m << 13;
  else {
    float f = ldexpf((float)m, -24);
    return sign ? -f : f;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

uint16_t moe_f32_to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7FFFFFFFu;
  if (u > 0x7F800000u) return (uint16_t)(sign | 0x7E00); /* NaN */
  if (u >= 0x477FF000u) return (uint16_t)(sign | 0x7C00); /* rounds to infinity */
  if (u < 0x38800000u) { /* subnormal: the magic addend lines the bits up and rounds */
    float a, magic = 0.5f;
    memcpy(&a, &u, 4);
    a += magic;
    uint32_t r, m;
    memcpy(&r, &a, 4);
    memcpy(&m, &magic, 4);
    return (uint16_t)(sign | (r - m));
  }
  u += 0xC8000FFFu + (u >> 13 & 1); /* exponent bias 127 -> 15, then round to even */
  return (uint16_t)(sign | u >> 13);
}

double moe_load_f64(const void *p, moe_dtype t) {
  switch (t) {
    case MOE_f32: return (double)*(const float *)p;
    case MOE_f64: return *(const double *)p;
    case MOE_bf16: return (double)moe_bf16_to_f32(*(const uint16_t *)p);
    case MOE_f16: return (double)moe_f16_to_f32(*(const uint16_t *)p);
    default: return (double)moe_load_i64(p, t);
  }
}

int64_t moe_load_i64(const void *p, moe_dtype t) {
  switch (t) {
    case MOE_bool:
    case MOE_u8: return *(const uint8_t *)p;
    case MOE_i32: return *(const int32_t *)p;
    case MOE_i64: return *(const int64_t *)p;
    default: {
      double d = moe_load_f64(p, t);
      return d >= 9.2e18 ? INT64_MAX : d <= -9.2e18 ? INT64_MIN : d != d ? 0 : (int64_t)d;
    }
  }
}

void moe_store_i64(void *p, moe_dtype t, int64_t v) {
  switch (t) {
    case MOE_bool: *(uint8_t *)p = v != 0; break;
    case MOE_u8: *(uint8_t *)p = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v); break;
    case MOE_i32: *(int32_t *)p = (int32_t)(v < INT32_MIN ? INT32_MIN : v > INT32_MAX ? INT32_MAX : v); break;
    case MOE_i64: *(int64_t *)p = v; break;
    default: moe_store_f64(p, t, (double)v);
  }
}

void moe_store_f64(void *p, moe_dtype t, double v) {
  switch (t) {
    case MOE_f32: *(float *)p = (float)v; break;
    case MOE_f64: *(double *)p = v; break;
    case MOE_bf16: *(uint16_t *)p = moe_f32_to_bf16((float)v); break;
    case MOE_f16: *(uint16_t *)p = moe_f32_to_f16((float)v); break;
    case MOE_bool: *(uint8_t *)p = v != 0; break;
    default: moe_store_i64(p, t, moe_load_i64(&v, MOE_f64)); break;
  }
}
