/* Template of cpu/norm.c, included once for float and once for double. No include guard. */

static void NAME(forward)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *jb = arg;
  int64_t n = jb->n;
  const REAL *restrict w = jb->w, *restrict b = jb->b;
  (void)worker;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)jb->x + row * n;
    REAL *restrict y = (REAL *)jb->y + row * n;
    double sum = 0, sq = 0;
    REAL m = 0;
    if (jb->center) {
      for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
        int64_t stop = MOE_MIN(i0 + BLOCK, n);
        REAL s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = i0; i < stop; i++) s += x[i];
        sum += (double)s;
      }
      m = (REAL)(sum / (double)n);
      ((REAL *)jb->mean)[row] = m;
    }
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t stop = MOE_MIN(i0 + BLOCK, n);
      REAL s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < stop; i++) s += (x[i] - m) * (x[i] - m);
      sq += (double)s;
    }
    REAL r = (REAL)(1.0 / sqrt(sq / (double)n + jb->eps));
    ((REAL *)jb->rstd)[row] = r;
    if (w && b) {
      for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) * r * w[i] + b[i];
    } else if (w) {
      for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) * r * w[i];
    } else if (b) {
      for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) * r + b[i];
    } else {
      for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) * r;
    }
  }
}

/* With xhat = (x - mean) rstd and h = g w:  gx = rstd (h - mean(h) - xhat mean(h xhat)), without mean(h) for the
** root mean square form;  gw = sum g xhat;  gb = sum g. */
static inline __attribute__((always_inline)) void NAME(backward_rows)(const job *jb, int64_t begin, int64_t end,
                                                                      REAL *restrict pw, REAL *restrict pb,
                                                                      const REAL *restrict w, bool with_part, bool with_w) {
  int64_t n = jb->n;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)jb->x + row * n, *restrict g = (const REAL *)jb->g + row * n;
    REAL m = jb->center ? ((const REAL *)jb->mean_in)[row] : 0, r = ((const REAL *)jb->rstd_in)[row];
    double dot = 0, sum = 0;
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t stop = MOE_MIN(i0 + BLOCK, n);
      REAL d = 0, s = 0;
#pragma omp simd reduction(+ : d, s)
      for (int64_t i = i0; i < stop; i++) {
        REAL xh = (x[i] - m) * r, h = with_w ? g[i] * w[i] : g[i];
        d += h * xh;
        s += h;
      }
      if (with_part) { /* apart: a loop that both sums and stores is vectorised for long rows only */
#pragma omp simd
        for (int64_t i = i0; i < stop; i++) {
          pw[i] += g[i] * ((x[i] - m) * r);
          pb[i] += g[i];
        }
      }
      dot += (double)d;
      sum += (double)s;
    }
    if (jb->y == NULL) continue;
    REAL *restrict gx = (REAL *)jb->y + row * n;
    REAL c1 = (REAL)(dot / (double)n) * r, c2 = jb->center ? (REAL)(sum / (double)n) : 0;
    for (int64_t i = 0; i < n; i++) {
      REAL h = with_w ? g[i] * w[i] : g[i];
      gx[i] = r * (h - c2 - (x[i] - m) * c1);
    }
  }
}

static void NAME(backward)(void *arg, int64_t part, int worker) {
  const job *jb = arg;
  int64_t begin = part * jb->rows_a_part, end = MOE_MIN(begin + jb->rows_a_part, jb->rows);
  (void)worker;
  if (jb->part) {
    REAL *pw = (REAL *)jb->part + part * 2 * jb->n, *pb = pw + jb->n;
    memset(pw, 0, 2 * (size_t)jb->n * sizeof(REAL));
    if (jb->w)
      NAME(backward_rows)(jb, begin, end, pw, pb, jb->w, true, true);
    else
      NAME(backward_rows)(jb, begin, end, pw, pb, NULL, true, false);
  } else if (jb->w) {
    NAME(backward_rows)(jb, begin, end, NULL, NULL, jb->w, false, true);
  } else {
    NAME(backward_rows)(jb, begin, end, NULL, NULL, NULL, false, false);
  }
}

static void NAME(join)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *jb = arg;
  int64_t n = jb->n;
  (void)worker;
  for (int64_t i0 = begin; i0 < end; i0 += 64) {
    int64_t c = MOE_MIN(end - i0, 64);
    double sw[64] = {0}, sb[64] = {0};
    for (int64_t p = 0; p < jb->parts; p++) {
      const REAL *restrict pw = (const REAL *)jb->part + p * 2 * n + i0, *restrict pb = pw + n;
      for (int64_t i = 0; i < c; i++) {
        sw[i] += (double)pw[i];
        sb[i] += (double)pb[i];
      }
    }
    for (int64_t i = 0; i < c; i++) {
      if (jb->gw) ((REAL *)jb->gw)[i0 + i] = (REAL)sw[i];
      if (jb->gb) ((REAL *)jb->gb)[i0 + i] = (REAL)sb[i];
    }
  }
}

#undef REAL
#undef NAME
