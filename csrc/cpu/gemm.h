/* Matrix products on the CPU: our use of a BLAS.
**
** The BLAS runs on one thread; parallelism is ours. A product is cut into tiles of its output by
** shape alone, never along the inner dimension and never by the number of threads, so results are
** the same to the bit for any number of threads.
**
** All matrices are row-major. op(X) is X, or its transpose when tx: a is [m, k] with row stride lda
** (ta: stored as [k, m]), b is [k, n] with ldb (tb: stored as [n, k]), c is [m, n] with ldc.
**   c = alpha op(a) op(b) + beta c
** beta == 0 overwrites c whatever it held; k == 0 gives beta c. Sizes of zero are allowed.
*/
#ifndef MOE_CPU_GEMM_H
#define MOE_CPU_GEMM_H

#include <stdbool.h>
#include <stdint.h>

/* Puts the BLAS on one thread; before any use of it that does not go through the functions below (LAPACK). */
void moe_blas_start(void);

/* Single-threaded, on the calling thread: for use inside tasks of the pool. */
void moe_gemm_f32(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                  const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void moe_gemm_f64(bool ta, bool tb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
                  const double *b, int64_t ldb, double beta, double *c, int64_t ldc);

/* Tiled over the pool; small products run at once on the calling thread. */
void moe_gemm_f32_par(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                      const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void moe_gemm_f64_par(bool ta, bool tb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
                      const double *b, int64_t ldb, double beta, double *c, int64_t ldc);

/* nbatch products of one shape: matrix i begins at a + off_a[i], b + off_b[i] (NULL: all at 0) and c + i * step_c. */
void moe_gemm_f32_batch(int64_t nbatch, bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                        int64_t lda, const int64_t *off_a, const float *b, int64_t ldb, const int64_t *off_b, float beta,
                        float *c, int64_t ldc, int64_t step_c);
void moe_gemm_f64_batch(int64_t nbatch, bool ta, bool tb, int64_t m, int64_t n, int64_t k, double alpha, const double *a,
                        int64_t lda, const int64_t *off_a, const double *b, int64_t ldb, const int64_t *off_b, double beta,
                        double *c, int64_t ldc, int64_t step_c);

/* y [m, n] = x [m, k] w [n, k]^T + bias [n] (NULL: none), tiled over the pool. */
void moe_gemm_f32_linear(int64_t m, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw,
                         const float *bias, float *y, int64_t ldy);
void moe_gemm_f64_linear(int64_t m, int64_t n, int64_t k, const double *x, int64_t ldx, const double *w, int64_t ldw,
                         const double *bias, double *y, int64_t ldy);

/* The tile of an [m, n] output with inner size k: how a parallel product is cut. */
void moe_gemm_tile(int64_t m, int64_t n, int64_t k, int64_t *tile_m, int64_t *tile_n);

#endif
