/* Template of cpu/softmax.c, included once for float and once for double. No include guard. */

static inline REAL NAME(row_max)(const REAL *restrict x, int64_t n) {
  KEY m = KEY_OF((REAL)-INFINITY);
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; i++) {
    KEY k = KEY_OF(x[i]);
    m = k > m ? k : m;
  }
  return UNKEY(m);
}

/* sum of exp(x - m), kept in y unless that is NULL */
static inline double NAME(row_exp)(REAL *restrict y, const REAL *restrict x, int64_t n, REAL m) {
  double total = 0;
  for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
    int64_t stop = MOE_MIN(i0 + BLOCK, n);
    REAL s = 0;
    if (y) { /* two loops: one that both stores and sums is vectorised for long rows only */
#pragma omp simd
      for (int64_t i = i0; i < stop; i++) y[i] = EXP(x[i] - m);
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < stop; i++) s += y[i];
    } else {
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < stop; i++) s += EXP(x[i] - m);
    }
    total += (double)s;
  }
  return total;
}

static void NAME(rows)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  int64_t n = b->n;
  (void)worker;
  for (int64_t o = begin; o < end; o++) {
    const REAL *restrict x = (const REAL *)b->x + o * n;
    REAL *restrict y = (REAL *)b->y + o * n;
    REAL m = NAME(row_max)(x, n);
    if (b->logarithm) {
      REAL l = (REAL)log(NAME(row_exp)(NULL, x, n, m));
      for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) - l;
    } else {
      REAL r = (REAL)(1.0 / NAME(row_exp)(y, x, n, m));
      for (int64_t i = 0; i < n; i++) y[i] *= r;
    }
  }
}

/* m[w] <- maxima, s[w] <- sums of exp(x - m) of the columns of x [n, stride]. `finite`: an infinite maximum is not
** taken out, which makes s 0, inf or NaN as logsumexp wants it. */
static inline void NAME(col_stats)(REAL *restrict m, double *restrict s, const REAL *x, int64_t n, int64_t stride,
                                   int64_t w, bool finite) {
  KEY key[TILE];
  for (int64_t j = 0; j < w; j++) key[j] = KEY_OF((REAL)-INFINITY);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < w; j++) {
      KEY k = KEY_OF(x[i * stride + j]);
      key[j] = k > key[j] ? k : key[j];
    }
  for (int64_t j = 0; j < w; j++) {
    m[j] = UNKEY(key[j]);
    if (finite && isinf(m[j])) m[j] = 0;
    s[j] = 0;
  }
  for (int64_t i0 = 0; i0 < n; i0 += ROWS) {
    REAL part[TILE];
    for (int64_t j = 0; j < w; j++) part[j] = 0;
    for (int64_t i = i0; i < MOE_MIN(i0 + ROWS, n); i++) {
      const REAL *restrict r = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < w; j++) part[j] += EXP(r[j] - m[j]);
    }
    for (int64_t j = 0; j < w; j++) s[j] += (double)part[j];
  }
}

/* Strip t of [outer, n, inner]: up to TILE neighbouring columns. */
static inline int64_t NAME(strip)(const job *b, int64_t t, int64_t *w) {
  int64_t j0 = t % b->strips * TILE;
  *w = MOE_MIN(b->inner - j0, TILE);
  return t / b->strips * b->n * b->inner + j0;
}

static void NAME(cols)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  int64_t n = b->n, inner = b->inner, w;
  (void)worker;
  for (int64_t t = begin; t < end; t++) {
    int64_t first = NAME(strip)(b, t, &w);
    const REAL *x = (const REAL *)b->x + first;
    REAL *y = (REAL *)b->y + first, m[TILE], f[TILE];
    double s[TILE];
    NAME(col_stats)(m, s, x, n, inner, w, false);
    for (int64_t j = 0; j < w; j++) f[j] = (REAL)(b->logarithm ? log(s[j]) : 1.0 / s[j]);
    for (int64_t i = 0; i < n; i++) {
      const REAL *restrict r = x + i * inner;
      REAL *restrict q = y + i * inner;
      if (b->logarithm) {
        for (int64_t j = 0; j < w; j++) q[j] = (r[j] - m[j]) - f[j];
      } else {
#pragma omp simd
        for (int64_t j = 0; j < w; j++) q[j] = EXP(r[j] - m[j]) * f[j];
      }
    }
  }
}

/* softmax: gx = y (g - sum g y); log_softmax: gx = g - exp(y) sum g */
static void NAME(rows_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  int64_t n = b->n;
  (void)worker;
  for (int64_t o = begin; o < end; o++) {
    const REAL *restrict y = (const REAL *)b->x + o * n, *restrict g = (const REAL *)b->g + o * n;
    REAL *restrict gx = (REAL *)b->y + o * n;
    double total = 0;
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t stop = MOE_MIN(i0 + BLOCK, n);
      REAL s = 0;
      if (b->logarithm) {
#pragma omp simd reduction(+ : s)
        for (int64_t i = i0; i < stop; i++) s += g[i];
      } else {
#pragma omp simd reduction(+ : s)
        for (int64_t i = i0; i < stop; i++) s += g[i] * y[i];
      }
      total += (double)s;
    }
    REAL t = (REAL)total;
    if (b->logarithm) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) gx[i] = g[i] - EXP(y[i]) * t;
    } else {
      for (int64_t i = 0; i < n; i++) gx[i] = y[i] * (g[i] - t);
    }
  }
}

static void NAME(cols_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  int64_t n = b->n, inner = b->inner, w;
  (void)worker;
  for (int64_t t = begin; t < end; t++) {
    int64_t first = NAME(strip)(b, t, &w);
    const REAL *restrict y = (const REAL *)b->x + first, *restrict g = (const REAL *)b->g + first;
    REAL *restrict gx = (REAL *)b->y + first;
    double sum[TILE];
    for (int64_t j = 0; j < w; j++) sum[j] = 0;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < w; j++) {
        REAL v = g[i * inner + j];
        sum[j] += (double)(b->logarithm ? v : v * y[i * inner + j]);
      }
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < w; j++) {
        REAL v = g[i * inner + j], z = y[i * inner + j];
        gx[i * inner + j] = b->logarithm ? v - EXP(z) * (REAL)sum[j] : z * (v - (REAL)sum[j]);
      }
  }
}

static void NAME(logsumexp)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *b = arg;
  int64_t n = b->n, inner = b->inner, w;
  (void)worker;
  for (int64_t t = begin; t < end; t++) {
    int64_t first = NAME(strip)(b, t, &w);
    const REAL *x = (const REAL *)b->x + first;
    REAL *y = (REAL *)b->y + t / b->strips * inner + t % b->strips * TILE, m[TILE];
    double s[TILE];
    if (inner == 1) {
      m[0] = NAME(row_max)(x, n);
      if (isinf(m[0])) m[0] = 0;
      s[0] = NAME(row_exp)(NULL, x, n, m[0]);
    } else {
      NAME(col_stats)(m, s, x, n, inner, w, true);
    }
    for (int64_t j = 0; j < w; j++) y[j] = (REAL)((double)m[j] + log(s[j]));
  }
}

#undef REAL
#undef NAME
#undef KEY
#undef KEY_OF
#undef UNKEY
#undef EXP
