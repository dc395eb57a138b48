/* gemm.h over a BLAS with the C interface. Declared here, not included: every BLAS has these, under headers of
** many names. Compiled once; the BLAS chooses its own instruction set. */
#include "cpu/gemm.h"

#include <limits.h>
#include <pthread.h>
#include <string.h>

#include "base/err.h"
#include "base/pool.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc);
void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda, const double *b,
                 int ldb, double beta, double *c, int ldc);
void cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x, int incx,
                 float beta, float *y, int incy);
void cblas_dgemv(int order, int trans, int m, int n, double alpha, const double *a, int lda, const double *x, int incx,
                 double beta, double *y, int incy);

/* Weak: the library that is linked has one of them, or none. */
void openblas_set_num_threads(int n) __attribute__((weak));
void MKL_Set_Num_Threads(int n) __attribute__((weak));

static void set_one_thread(void) {
  if (openblas_set_num_threads) openblas_set_num_threads(1);
  if (MKL_Set_Num_Threads) MKL_Set_Num_Threads(1);
}

static inline void one_thread(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, set_one_thread);
}

void moe_blas_start(void) { one_thread(); }

/* A task worth handing to another core: about 10 us of a core that does 100 GFLOP/s. */
#define TASK_FLOPS 1e6

/* Halves the longer side. Tiles of 128 and more on a side run at the full rate of a large product (measured with
** OpenBLAS, inner sizes of 128 and up), so the least side is that; eight tiles keep a few cores even, more only
** when each is long. */
void moe_gemm_tile(int64_t m, int64_t n, int64_t k, int64_t *tile_m, int64_t *tile_n) {
  int64_t tm = m, tn = n, tiles = 1;
  bool vector = m == 1 || n == 1; /* bound by memory: a task is a stretch of 32 Ki elements */
  for (;;) {
    int64_t *side = tm >= tn ? &tm : &tn;
    double work = 2.0 * (double)tm * (double)tn * (double)k;
    if (work < (vector ? 131072.0 : 2 * TASK_FLOPS)) break;
    if (*side < (vector ? 32 : tiles < 2 ? 64 : 256)) break;
    if (tiles >= 8 && work < 256 * TASK_FLOPS) break;
    *side = (*side / 2 + 15) / 16 * 16;
    tiles *= 2;
  }
  *tile_m = MOE_MAX(tm, 1);
  *tile_n = MOE_MAX(tn, 1);
}

#define REAL float
#define NAME(x) moe_gemm_f32##x
#define STATIC(x) x##_f32
#define BLAS(x) cblas_s##x
#include "cpu/blas_real.h"
#undef REAL
#undef NAME
#undef STATIC
#undef BLAS

#define REAL double
#define NAME(x) moe_gemm_f64##x
#define STATIC(x) x##_f64
#define BLAS(x) cblas_d##x
#include "cpu/blas_real.h"
