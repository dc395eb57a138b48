/* The products of gemm.h for one element type; blas.c includes this once with REAL = float, once with double.
** NAME(x) is moe_gemm_f32 or moe_gemm_f64 with x behind it, STATIC(x) a private one, BLAS(x) the routine of the BLAS. */

/* Any size and stride, slowly: the reference, and the way for what a BLAS's 32-bit sizes cannot say. */
static void STATIC(plain)(bool ta, bool tb, int64_t m, int64_t n, int64_t k, REAL alpha, const REAL *a, int64_t lda,
                          const REAL *b, int64_t ldb, REAL beta, REAL *c, int64_t ldc) {
  for (int64_t i = 0; i < m; i++) {
    REAL *ci = c + i * ldc;
    for (int64_t j = 0; j < n; j++) ci[j] = beta == 0 ? 0 : beta * ci[j];
    for (int64_t p = 0; p < k; p++) {
      REAL aip = alpha * (ta ? a[p * lda + i] : a[i * lda + p]);
      for (int64_t j = 0; j < n; j++) ci[j] += aip * (tb ? b[j * ldb + p] : b[p * ldb + j]);
    }
  }
}

/* y (step incy) = alpha A x (step incx) + beta y, A [rows, cols] or its transpose. */
static void STATIC(gemv)(bool trans, int64_t rows, int64_t cols, REAL alpha, const REAL *a, int64_t lda, const REAL *x,
                         int64_t incx, REAL beta, REAL *y, int64_t incy) {
  int64_t ny = trans ? cols : rows;
  if (beta == 0) { /* whatever y held, NaN included, is overwritten */
    for (int64_t i = 0; i < ny; i++) y[i * incy] = 0;
    beta = 1;
  }
  BLAS(gemv)(ROW_MAJOR, trans ? TRANS : NO_TRANS, (int)rows, (int)cols, alpha, a, (int)lda, x, (int)incx, beta, y, (int)incy);
}

void NAME()(bool ta, bool tb, int64_t m, int64_t n, int64_t k, REAL alpha, const REAL *a, int64_t lda, const REAL *b,
                int64_t ldb, REAL beta, REAL *c, int64_t ldc) {
  if (m <= 0 || n <= 0) return;
  /* A matrix of one row has no row stride of its own: the BLAS wants one that it believes. */
  lda = MOE_MAX(lda, ta ? m : k);
  ldb = MOE_MAX(ldb, tb ? k : n);
  ldc = MOE_MAX(ldc, n);
  if (k <= 0 || MOE_MAX(MOE_MAX(m, n), MOE_MAX(MOE_MAX(k, lda), MOE_MAX(ldb, ldc))) > INT_MAX) {
    STATIC(plain)(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  one_thread();
  if (n == 1)
    STATIC(gemv)(ta, ta ? k : m, ta ? m : k, alpha, a, lda, b, tb ? 1 : ldb, beta, c, ldc);
  else if (m == 1) /* c^T = b^T a^T */
    STATIC(gemv)(!tb, tb ? n : k, tb ? k : n, alpha, b, ldb, a, ta ? lda : 1, beta, c, 1);
  else
    BLAS(gemm)(ROW_MAJOR, ta ? TRANS : NO_TRANS, tb ? TRANS : NO_TRANS, (int)m, (int)n, (int)k, alpha, a, (int)lda, b,
               (int)ldb, beta, c, (int)ldc);
}

typedef struct STATIC(job) {
  bool ta, tb;
  int64_t m, n, k, lda, ldb, ldc, tile_m, tile_n, across, tiles; /* tiles a product, `across` of them side by side */
  int64_t nbatch, group, step_c;                                 /* a task does `group` whole products, or one tile */
  const int64_t *off_a, *off_b;
  REAL alpha, beta;
  const REAL *a, *b, *bias;
  REAL *c;
} STATIC(job);

static void STATIC(tile)(const STATIC(job) *j, int64_t batch, int64_t tile) {
  int64_t i = tile / j->across * j->tile_m, l = tile % j->across * j->tile_n;
  int64_t m = MOE_MIN(j->tile_m, j->m - i), n = MOE_MIN(j->tile_n, j->n - l);
  const REAL *a = j->a + (j->off_a ? j->off_a[batch] : 0) + (j->ta ? i : i * j->lda);
  const REAL *b = j->b + (j->off_b ? j->off_b[batch] : 0) + (j->tb ? l * j->ldb : l);
  REAL *c = j->c + batch * j->step_c + i * j->ldc + l;
  if (j->bias)
    for (int64_t r = 0; r < m; r++) memcpy(c + r * j->ldc, j->bias + l, (size_t)n * sizeof *c);
  NAME()(j->ta, j->tb, m, n, j->k, j->alpha, a, j->lda, b, j->ldb, j->beta, c, j->ldc);
}

static void STATIC(task)(void *arg, int64_t t, int worker) {
  (void)worker;
  const STATIC(job) *j = arg;
  if (j->tiles > 1) {
    STATIC(tile)(j, t / j->tiles, t % j->tiles);
    return;
  }
  int64_t end = MOE_MIN((t + 1) * j->group, j->nbatch);
  for (int64_t i = t * j->group; i < end; i++) STATIC(tile)(j, i, 0);
}

static void STATIC(run)(STATIC(job) *j) {
  if (j->m <= 0 || j->n <= 0 || j->nbatch <= 0) return;
  moe_gemm_tile(j->m, j->n, j->k, &j->tile_m, &j->tile_n);
  j->across = (j->n + j->tile_n - 1) / j->tile_n;
  j->tiles = j->across * ((j->m + j->tile_m - 1) / j->tile_m);
  double work = 2.0 * (double)j->m * (double)j->n * (double)(j->k + 1);
  j->group = j->tiles > 1 ? 1 : MOE_MAX(1, (int64_t)(TASK_FLOPS / work));
  moe_parallel(j->tiles > 1 ? j->nbatch * j->tiles : (j->nbatch + j->group - 1) / j->group, STATIC(task), j);
}

void NAME(_par)(bool ta, bool tb, int64_t m, int64_t n, int64_t k, REAL alpha, const REAL *a, int64_t lda,
                      const REAL *b, int64_t ldb, REAL beta, REAL *c, int64_t ldc) {
  NAME(_batch)(1, ta, tb, m, n, k, alpha, a, lda, NULL, b, ldb, NULL, beta, c, ldc, 0);
}

void NAME(_batch)(int64_t nbatch, bool ta, bool tb, int64_t m, int64_t n, int64_t k, REAL alpha, const REAL *a,
                        int64_t lda, const int64_t *off_a, const REAL *b, int64_t ldb, const int64_t *off_b, REAL beta,
                        REAL *c, int64_t ldc, int64_t step_c) {
  STATIC(job) j = {.ta = ta, .tb = tb, .m = m, .n = n, .k = k, .lda = lda, .ldb = ldb, .ldc = ldc, .nbatch = nbatch,
                   .step_c = step_c, .off_a = off_a, .off_b = off_b, .alpha = alpha, .beta = beta, .a = a, .b = b, .c = c};
  STATIC(run)(&j);
}

void NAME(_linear)(int64_t m, int64_t n, int64_t k, const REAL *x, int64_t ldx, const REAL *w, int64_t ldw,
                         const REAL *bias, REAL *y, int64_t ldy) {
  STATIC(job) j = {.tb = true, .m = m, .n = n, .k = k, .lda = ldx, .ldb = ldw, .ldc = ldy, .nbatch = 1, .alpha = 1,
                   .beta = bias ? 1 : 0, .a = x, .b = w, .bias = bias, .c = y};
  STATIC(run)(&j);
}
