/* Products within a chunk of a linear recurrence, for one element type: rows and decays, M(x, y) with one decay a head or with
** a decay a column, the triangular system. See recurrence_real.h for what they mean.
*/

/* to [n, d] <- x times the decays by [n, w], or added */
static void R(times)(REAL *restrict to, const REAL *restrict x, const REAL *restrict by, int64_t n, int64_t d, int64_t w, bool add) {
  for (int64_t i = 0; i < n; i++) {
    REAL *restrict ti = to + i * d;
    const REAL *restrict xi = x + i * d, *restrict bi = by + i * w;
    if (w == 1 && add)
      for (int64_t c = 0; c < d; c++) ti[c] += xi[c] * bi[0];
    else if (w == 1)
      for (int64_t c = 0; c < d; c++) ti[c] = xi[c] * bi[0];
    else if (add)
      for (int64_t c = 0; c < d; c++) ti[c] += xi[c] * bi[c];
    else
      for (int64_t c = 0; c < d; c++) ti[c] = xi[c] * bi[c];
  }
}

/* s [dk, dv] <- every row times its decay over the chunk */
static void R(decay_state)(REAL *restrict s, const REAL *total, int64_t dk, int64_t dv, int64_t w) {
  for (int64_t i = 0; i < dk; i++) {
    REAL by = total[w == 1 ? 0 : i];
    for (int64_t c = 0; c < dv; c++) s[i * dv + c] *= by;
  }
}

/* Products with a triangle of [n, n], the part above the diagonal left out in slabs.
** m <- x y^T on and below the diagonal (x, y [n, d], row strides ldx, ldy); above it m may hold anything. */
static void R(lower)(REAL *m, const REAL *x, int64_t ldx, const REAL *y, int64_t ldy, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i += SLAB) {
    int64_t rows = MOE_MIN(SLAB, n - i);
    GEMM(false, true, rows, i + rows, d, 1, x + i * ldx, ldx, y, ldy, 0, m + i * n, n);
  }
}

/* to [n, d] += m x, m lower triangular with 0 above */
static void R(lower_times)(REAL *to, int64_t ldt, const REAL *m, const REAL *x, int64_t ldx, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i += SLAB) {
    int64_t rows = MOE_MIN(SLAB, n - i);
    GEMM(false, false, rows, d, i + rows, 1, m + i * n, n, x, ldx, 1, to + i * ldt, ldt);
  }
}

/* to [n, d] += m^T x */
static void R(upper_times)(REAL *to, int64_t ldt, const REAL *m, const REAL *x, int64_t ldx, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i += SLAB) {
    int64_t rows = MOE_MIN(SLAB, n - i);
    GEMM(true, false, rows, d, n - i, 1, m + i * n + i, n, x + i * ldx, ldx, 1, to + i * ldt, ldt);
  }
}

/* m [n, n] times the decays, for a read of that kind; what it does not see becomes 0. */
static void R(mask)(const R(chunk) *c, REAL *m, bool exclusive, bool own) {
  int64_t n = c->n;
  for (int64_t i = 0; i < n; i++) {
    REAL *restrict mi = m + i * n;
    const REAL *restrict li = c->l + (exclusive && i > 0 ? i - 1 : i) * n;
    int64_t end = own ? i + 1 : i;
    for (int64_t j = 0; j < end; j++) mi[j] *= li[j];
    for (int64_t j = end; j < n; j++) mi[j] = 0;
  }
}

/* x of a block's rows, times the decay from the block's start: rows i0 .. of c->x. */
static void R(from_start)(const R(chunk) *c, const REAL *x, int64_t i0, int64_t rows, bool exclusive) {
  int64_t dk = c->dk;
  if (!exclusive) {
    R(times)(c->x, x + i0 * dk, c->within + i0 * dk, rows, dk, dk, false);
    return;
  }
  memcpy(c->x, x + i0 * dk, (size_t)dk * sizeof(REAL));
  R(times)(c->x + dk, x + (i0 + 1) * dk, c->within + i0 * dk, rows - 1, dk, dk, false);
}

/* The decays toward the next block, from those toward the one at i0. */
static void R(next_block)(const R(chunk) *c, int64_t i0, int64_t rows) {
  int64_t dk = c->dk;
  const REAL *restrict all = c->within + (i0 + rows - 1) * dk;
  for (int64_t j = 0; j < i0; j++) {
    REAL *restrict to = c->toward + j * dk;
    for (int64_t e = 0; e < dk; e++) to[e] = R(flush)(to[e] * all[e]);
  }
  memcpy(c->toward + i0 * dk, c->rest + i0 * dk, (size_t)(rows * dk) * sizeof(REAL));
}

/* m, in rows i0 .. of a block: what a read of that kind does not see becomes 0. */
static void R(cut_block)(REAL *m, int64_t n, int64_t i0, int64_t rows, bool own) {
  for (int64_t i = i0; i < i0 + rows; i++)
    for (int64_t j = own ? i + 1 : i; j < n; j++) m[i * n + j] = 0;
}

/* Rows i0 .. of M(x, y) for the columns of the same block, pair by pair. */
static void R(pair_block)(const R(chunk) *c, REAL *m, const REAL *x, const REAL *y, int64_t i0, int64_t rows, bool exclusive) {
  int64_t n = c->n, dk = c->dk;
  REAL *restrict z = c->t;
  for (int64_t i = i0; i < i0 + rows; i++) {
    REAL *mi = m + i * n;
    const REAL *restrict xi = x + i * dk, *restrict ai = c->a + i * dk;
    mi[i] = R(dot)(xi, y + i * dk, dk);
    for (int64_t e = 0; e < dk; e++) z[e] = exclusive ? xi[e] : xi[e] * ai[e];
    for (int64_t j = i; j-- > i0;) {
      const REAL *restrict yj = y + j * dk, *restrict aj = c->a + j * dk;
      REAL sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < dk; e++) {
        sum += z[e] * yj[e];
        REAL next = z[e] * aj[e];
        z[e] = next < TINY && next > -TINY ? 0 : next;
      }
      mi[j] = sum;
    }
  }
}

/* M(x, y) [n, n] with wide decays. own: a row sees its own write. */
static void R(pair_wide)(const R(chunk) *c, REAL *m, const REAL *x, const REAL *y, bool exclusive, bool own) {
  int64_t n = c->n, dk = c->dk;
  for (int64_t i0 = 0; i0 < n; i0 += c->block) {
    int64_t rows = MOE_MIN(c->block, n - i0), before = c->mild ? i0 + rows : i0; /* columns done by products */
    if (before > 0) {
      R(from_start)(c, x, i0, rows, exclusive);
      R(times)(c->y, y, c->toward, i0, dk, dk, false);
      if (c->mild) R(times)(c->y + i0 * dk, y + i0 * dk, c->inverse + i0 * dk, rows, dk, dk, false);
      GEMM(false, true, rows, before, dk, 1, c->x, dk, c->y, dk, 0, m + i0 * n, n);
    }
    if (!c->mild) R(pair_block)(c, m, x, y, i0, rows, exclusive);
    R(cut_block)(m, n, i0, rows, own);
    if (i0 + rows < n) R(next_block)(c, i0, rows);
  }
}

static void R(pair)(const R(chunk) *c, REAL *m, const REAL *x, const REAL *y, bool exclusive, bool own) {
  if (c->l == NULL) {
    R(pair_wide)(c, m, x, y, exclusive, own);
    return;
  }
  R(lower)(m, x, c->dk, y, c->dk, c->n, c->dk);
  R(mask)(c, m, exclusive, own);
}

/* x <- (1 - m)^-1 x, m [n, n] strictly lower, x [n, d]: forward substitution, blocks by products */
static void R(solve)(const REAL *m, REAL *x, int64_t n, int64_t d) {
  for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
    int64_t end = MOE_MIN(i0 + BLOCK, n);
    if (i0 > 0) GEMM(false, false, end - i0, d, i0, 1, m + i0 * n, n, x, d, 1, x + i0 * d, d);
    for (int64_t i = i0 + 1; i < end; i++) {
      REAL *restrict xi = x + i * d;
      for (int64_t j = i0; j < i; j++) {
        const REAL *restrict xj = x + j * d, by = m[i * n + j];
        for (int64_t e = 0; e < d; e++) xi[e] += by * xj[e];
      }
    }
  }
}

/* x <- (1 - m)^-T x */
static void R(solve_back)(const REAL *m, REAL *x, int64_t n, int64_t d) {
  for (int64_t i0 = (n - 1) / BLOCK * BLOCK; i0 >= 0; i0 -= BLOCK) {
    int64_t end = MOE_MIN(i0 + BLOCK, n);
    if (end < n) GEMM(true, false, end - i0, d, n - end, 1, m + end * n + i0, n, x + end * d, d, 1, x + i0 * d, d);
    for (int64_t i = end; i-- > i0;) {
      const REAL *restrict xi = x + i * d;
      for (int64_t j = i0; j < i; j++) {
        REAL *restrict xj = x + j * d, by = m[i * n + j];
        for (int64_t e = 0; e < d; e++) xj[e] += by * xi[e];
      }
    }
  }
}
