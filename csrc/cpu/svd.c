/* The singular value decomposition, by LAPACK's divide and conquer (gesdd). The routines are declared here and weak: a BLAS
** may come without its LAPACK, and then this operation alone says so.
*/
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/gemm.h"

/* The last argument is the length of jobz, which Fortran passes behind the others. */
#define DECLARE(name, REAL)                                                                                               \
  void name(const char *jobz, const int *m, const int *n, REAL *a, const int *lda, REAL *s, REAL *u, const int *ldu, \
            REAL *vt, const int *ldvt, REAL *work, const int *lwork, int *iwork, int *info, size_t length)                \
      __attribute__((weak));
DECLARE(sgesdd_, float)
DECLARE(dgesdd_, double)

typedef struct job {
  void *u, *s, *v;
  const void *x;
  int64_t m, n, k;
  int lwork;
  atomic_bool no_memory;
  atomic_llong failed; /* the first matrix that did not converge, or the number of matrices */
} job;

static void note_failure(job *b, long long i) {
  long long first = atomic_load(&b->failed);
  while (i < first && !atomic_compare_exchange_weak(&b->failed, &first, i)) {
  }
}

/* A row-major x [m, n] is the column-major x^T [n, m], and x^T = V S U^T: the routine's U is V [n, k], by columns, and its
** VT is U^T by columns, that is U [m, k] by rows. Signs are fixed: of each column of U the largest element is positive. */
#define SVD(SFX, REAL, GESDD, ABS)                                                                                        \
  static int workspace_##SFX(int64_t m, int64_t n) {                                                                     \
    int mi = (int)m, ni = (int)n, k = MOE_MIN(mi, ni), query = -1, info = 0;                                              \
    REAL want = 0;                                                                                                       \
    GESDD("S", &ni, &mi, NULL, &ni, NULL, NULL, &ni, NULL, &k, &want, &query, NULL, &info, 1);                            \
    if (info != 0) return -1;                                                                                            \
    /* the answer is a rounded float; and what old versions ask for at least */                                          \
    double kd = k, least = 3 * kd + MOE_MAX((double)MOE_MAX(m, n), 4 * kd * kd + 7 * kd);                                 \
    double size = MOE_MAX((double)want * (1 + 1e-6) + 1, least);                                                         \
    return size < INT_MAX ? (int)size : -1;                                                                              \
  }                                                                                                                      \
  static void svd_##SFX(void *arg, int64_t begin, int64_t end, int worker) {                                             \
    job *b = arg;                                                                                                        \
    (void)worker;                                                                                                        \
    int64_t m = b->m, n = b->n, k = b->k, reals = m * n + n * k + b->lwork;                                              \
    REAL *room = moe_scratch(3, reals * (int64_t)sizeof(REAL) + 8 * k * (int64_t)sizeof(int));                            \
    if (room == NULL) {                                                                                                  \
      atomic_store(&b->no_memory, true);                                                                                 \
      return;                                                                                                            \
    }                                                                                                                    \
    REAL *a = room, *columns = a + m * n, *work = columns + n * k;                                                       \
    int *iwork = (int *)(room + reals), mi = (int)m, ni = (int)n, ki = (int)k;                                           \
    for (int64_t i = begin; i < end; i++) {                                                                              \
      REAL *u = (REAL *)b->u + i * m * k, *s = (REAL *)b->s + i * k, *v = (REAL *)b->v + i * n * k;                      \
      int info = 0;                                                                                                      \
      memcpy(a, (const REAL *)b->x + i * m * n, (size_t)(m * n) * sizeof(REAL));                                         \
      GESDD("S", &ni, &mi, a, &ni, s, columns, &ni, u, &ki, work, &b->lwork, iwork, &info, 1);                           \
      if (info != 0) {                                                                                                   \
        note_failure(b, i);                                                                                              \
        continue;                                                                                                        \
      }                                                                                                                  \
      for (int64_t j = 0; j < k; j++) {                                                                                  \
        REAL most = u[j];                                                                                                \
        for (int64_t r = 1; r < m; r++)                                                                                  \
          if (ABS(u[r * k + j]) > ABS(most)) most = u[r * k + j];                                                        \
        REAL sign = most < 0 ? -1 : 1;                                                                                   \
        for (int64_t r = 0; r < m; r++) u[r * k + j] *= sign;                                                            \
        for (int64_t r = 0; r < n; r++) v[r * k + j] = sign * columns[j * n + r];                                        \
      }                                                                                                                  \
    }                                                                                                                    \
  }                                                                                                                      \
  static int64_t not_finite_##SFX(const REAL *x, int64_t size) {                                                         \
    for (int64_t i = 0; i < size; i++)                                                                                   \
      if (!isfinite(x[i])) return i;                                                                                     \
    return -1;                                                                                                           \
  }

SVD(f32, float, sgesdd_, fabsf)
SVD(f64, double, dgesdd_, fabs)

moe_status MOE_CPU(svd)(void *u, void *s, void *v, const void *x, int64_t batch, int64_t m, int64_t n, moe_dtype dt) {
  bool single = dt == MOE_f32;
  if (!single && dt != MOE_f64) return moe_fail(MOE_EDEVICE, "no kernel 'svd' for %s on cpu", moe_dtype_name(dt));
  if (single ? sgesdd_ == NULL : dgesdd_ == NULL)
    return moe_fail(MOE_EDEVICE, "svd: the BLAS that moe is linked with has no LAPACK (%s)", single ? "sgesdd_" : "dgesdd_");
  if (MOE_MAX(m, n) > INT_MAX)
    return moe_fail(MOE_EINVAL, "svd: x is [.., %lld, %lld], more than LAPACK's 32-bit sizes hold", (long long)m, (long long)n);
  /* a NaN would keep the iteration from ending */
  int64_t bad = single ? not_finite_f32(x, batch * m * n) : not_finite_f64(x, batch * m * n);
  if (bad >= 0)
    return moe_fail(MOE_EINVAL, "svd: x holds NaN or an infinity (matrix %lld of %lld, row %lld, column %lld)",
                    (long long)(bad / (m * n) + 1), (long long)batch, (long long)(bad % (m * n) / n + 1), (long long)(bad % n + 1));
  moe_blas_start();
  job b = {.u = u, .s = s, .v = v, .x = x, .m = m, .n = n, .k = MOE_MIN(m, n)};
  b.lwork = single ? workspace_f32(m, n) : workspace_f64(m, n);
  if (b.lwork < 0)
    return moe_fail(MOE_EINVAL, "svd: x is [.., %lld, %lld], too large for LAPACK's 32-bit workspace", (long long)m, (long long)n);
  atomic_store(&b.failed, (long long)batch);
  double work = 8.0 * (double)m * (double)n * (double)b.k;
  moe_parallel_range(batch, MOE_MAX(1, (int64_t)(1e6 / work)), single ? svd_f32 : svd_f64, &b);
  if (atomic_load(&b.no_memory)) return moe_fail(MOE_ENOMEM, "svd: out of memory for a workspace of %d elements", b.lwork);
  long long first = atomic_load(&b.failed);
  if (first < batch) return moe_fail(MOE_EINVAL, "svd: did not converge (matrix %lld of %lld)", first + 1, (long long)batch);
  return MOE_OK;
}
