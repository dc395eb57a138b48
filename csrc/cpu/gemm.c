/* The product slots of the device table over gemm.h, and the sum of a matrix's rows. */
#include "cpu/gemm.h"

#include "cpu/cpu.h"

moe_status MOE_CPU(gemm)(moe_dtype dt, int64_t nbatch, bool ta, bool tb, int64_t m, int64_t n, int64_t k, double alpha,
                         const void *a, int64_t lda, const int64_t *off_a, const void *b, int64_t ldb,
                         const int64_t *off_b, double beta, void *c, int64_t ldc, int64_t step_c) {
  if (dt == MOE_f64)
    moe_gemm_f64_batch(nbatch, ta, tb, m, n, k, alpha, a, lda, off_a, b, ldb, off_b, beta, c, ldc, step_c);
  else
    moe_gemm_f32_batch(nbatch, ta, tb, m, n, k, (float)alpha, a, lda, off_a, b, ldb, off_b, (float)beta, c, ldc, step_c);
  return MOE_OK;
}

moe_status MOE_CPU(linear)(moe_dtype dt, void *y, const void *x, const void *w, const void *bias, int64_t m, int64_t n,
                           int64_t k, int64_t ldx, int64_t ldw) {
  if (dt == MOE_f64)
    moe_gemm_f64_linear(m, n, k, x, ldx, w, ldw, bias, y, n);
  else
    moe_gemm_f32_linear(m, n, k, x, ldx, w, ldw, bias, y, n);
  return MOE_OK;
}

/* Columns a task sums: whole cache lines, so that no two tasks write one. */
enum { COLUMNS = 64 };

typedef struct colsum {
  void *y;
  const void *x;
  int64_t m, n;
} colsum;

/* Four rows at a time keep four loads in flight; the order of the sum depends on m alone. */
#define COLSUM(type)                                                                              \
  static void colsum_##type(void *arg, int64_t begin, int64_t end, int worker) {                   \
    (void)worker;                                                                                 \
    const colsum *s = arg;                                                                        \
    int64_t w = end - begin, n = s->n, i = 0;                                                     \
    type *restrict y = (type *)s->y + begin;                                                      \
    for (int64_t j = 0; j < w; j++) y[j] = 0;                                                     \
    for (; i + 4 <= s->m; i += 4) {                                                               \
      const type *restrict p0 = (const type *)s->x + i * n + begin;                               \
      const type *restrict p1 = p0 + n, *restrict p2 = p1 + n, *restrict p3 = p2 + n;             \
      for (int64_t j = 0; j < w; j++) y[j] += (p0[j] + p1[j]) + (p2[j] + p3[j]);                  \
    }                                                                                             \
    for (; i < s->m; i++) {                                                                       \
      const type *restrict p = (const type *)s->x + i * n + begin;                                \
      for (int64_t j = 0; j < w; j++) y[j] += p[j];                                               \
    }                                                                                             \
  }
COLSUM(float)
COLSUM(double)

moe_status MOE_CPU(colsum)(moe_dtype dt, void *y, const void *x, int64_t m, int64_t n) {
  colsum s = {y, x, m, n};
  moe_parallel_range(n, m * n < MOE_GRAIN ? n : COLUMNS, dt == MOE_f64 ? colsum_double : colsum_float, &s);
  return MOE_OK;
}
