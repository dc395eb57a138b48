/* Template of cpu/poly.c, included once for float and once for double. No include guard. */

/* y [m] <- sum_i c_i z^i by Horner's rule: a coefficient of 0 stays 0 beside a power that overflows. */
static inline void NAME(horner)(REAL *restrict y, const REAL *restrict z, int64_t m, const REAL *c, int64_t terms) {
  REAL top = c[terms - 1];
  for (int64_t j = 0; j < m; j++) y[j] = top;
  for (int64_t i = terms - 2; i >= 0; i--) {
    REAL ci = c[i];
    for (int64_t j = 0; j < m; j++) y[j] = y[j] * z[j] + ci;
  }
}

static inline REAL NAME(sum)(const REAL *restrict x, int64_t m) {
  REAL s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t j = 0; j < m; j++) s += x[j];
  return s;
}

/* Rows are divided by their largest magnitude where that is above 1, so that no power overflows: the ratios stay,
** eps shrinks with the power. A NaN gives NaN. */
static inline REAL NAME(scale)(const REAL *restrict x, int64_t n) {
  KEY most = BITS(1);
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; j++) {
    KEY v = BITS(x[j]) & KEY_MAX; /* of the magnitude: the bits order as the values do */
    most = v > most ? v : most;
  }
  return 1 / UNBITS(most);
}

/* z [m] <- what the powers are taken of */
static inline void NAME(base)(REAL *restrict z, const REAL *restrict x, int64_t m, bool norm, REAL s) {
  if (norm) {
    for (int64_t j = 0; j < m; j++) z[j] = x[j] * s;
  } else {
    for (int64_t j = 0; j < m; j++) z[j] = x[j] < 0 ? 0 : x[j];
  }
}

/* The sums of a row: square[i] of z^2i (norm alone), moment[i] of g z^i unless g is NULL. */
static void NAME(sums)(const job *jb, const REAL *x, const REAL *g, REAL s, double *square, double *moment) {
  REAL z[BLOCK], p[BLOCK], q[BLOCK];
  for (int64_t i = 0; i < jb->terms; i++) square[i] = moment[i] = 0;
  for (int64_t i0 = 0; i0 < jb->n; i0 += BLOCK) {
    int64_t m = MOE_MIN(jb->n - i0, BLOCK);
    NAME(base)(z, x + i0, m, jb->norm, s);
    if (jb->norm && jb->terms > 1) {
      for (int64_t j = 0; j < m; j++) p[j] = z[j] = z[j] * z[j];
      square[1] += (double)NAME(sum)(p, m);
      for (int64_t i = 2; i < jb->terms; i++) {
        for (int64_t j = 0; j < m; j++) p[j] *= z[j];
        square[i] += (double)NAME(sum)(p, m);
      }
    }
    if (g == NULL) continue;
    if (jb->norm) NAME(base)(z, x + i0, m, true, s);
    for (int64_t j = 0; j < m; j++) q[j] = g[i0 + j];
    moment[0] += (double)NAME(sum)(q, m);
    for (int64_t i = 1; i < jb->terms; i++) {
      for (int64_t j = 0; j < m; j++) q[j] *= z[j];
      moment[i] += (double)NAME(sum)(q, m);
    }
  }
}

/* rstd[i] = 1 / sqrt(mean(z^2i) + eps s^2i) */
static void NAME(roots)(const job *jb, const double *square, REAL s, double *rstd) {
  double shrink = 1;
  for (int64_t i = 1; i < jb->terms; i++) {
    shrink *= (double)s * (double)s;
    rstd[i] = 1.0 / sqrt(square[i] / (double)jb->n + jb->eps * shrink);
  }
}

static void NAME(forward)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *jb = arg;
  int64_t n = jb->n, terms = jb->terms;
  double square[MAX_TERMS], moment[MAX_TERMS], rstd[MAX_TERMS];
  REAL z[BLOCK], c[MAX_TERMS];
  (void)worker;
  for (int64_t row = begin; row < end; row++) {
    const REAL *x = (const REAL *)jb->x + row * n, *a = (const REAL *)jb->a + (jb->own ? row * terms : 0);
    REAL *y = (REAL *)jb->y + row * n, s = 1;
    for (int64_t i = 0; i < terms; i++) c[i] = a[i];
    if (jb->norm) {
      s = NAME(scale)(x, n);
      NAME(sums)(jb, x, NULL, s, square, moment);
      NAME(roots)(jb, square, s, rstd);
      for (int64_t i = 1; i < terms; i++) c[i] = (REAL)((double)a[i] * rstd[i]);
    }
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t m = MOE_MIN(n - i0, BLOCK);
      NAME(base)(z, x + i0, m, jb->norm, s);
      NAME(horner)(y + i0, z, m, c, terms);
    }
  }
}

/* With G_i = sum g z^i: ga_i = G_i for powers as they are. Normed, ga_i = r_i G_i, and
** gx = s (g sum_i i c_i z^(i-1) - sum_i i e_i z^(2i-1)), c_i = a_i r_i, e_i = a_i r_i^3 G_i / n. */
static void NAME(backward)(void *arg, int64_t begin, int64_t end, int worker) {
  const job *jb = arg;
  int64_t n = jb->n, terms = jb->terms;
  double square[MAX_TERMS], moment[MAX_TERMS], rstd[MAX_TERMS];
  REAL z[BLOCK], p[BLOCK], d[MAX_TERMS] = {0}, e[MAX_TERMS] = {0};
  (void)worker;
  for (int64_t row = begin; row < end; row++) {
    const REAL *x = (const REAL *)jb->x + row * n, *g = (const REAL *)jb->g + row * n;
    const REAL *a = (const REAL *)jb->a + (jb->own ? row * terms : 0);
    REAL *ga = (REAL *)jb->ga + row * terms, s = jb->norm ? NAME(scale)(x, n) : 1;
    NAME(sums)(jb, x, g, s, square, moment);
    if (jb->norm) NAME(roots)(jb, square, s, rstd);
    ga[0] = (REAL)moment[0];
    for (int64_t i = 1; i < terms; i++) {
      double r = jb->norm ? rstd[i] : 1, ai = (double)a[i] * (double)i;
      ga[i] = (REAL)(moment[i] * r);
      d[i - 1] = (REAL)(ai * r);
      e[i - 1] = jb->norm ? (REAL)(ai * r * r * r * moment[i] / (double)n) : 0;
    }
    if (jb->y == NULL) continue;
    REAL *gx = (REAL *)jb->y + row * n;
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t m = MOE_MIN(n - i0, BLOCK);
      const REAL *gi = g + i0, *xi = x + i0;
      REAL *restrict out = gx + i0;
      NAME(base)(z, xi, m, jb->norm, s);
      NAME(horner)(out, z, m, d, MOE_MAX(terms - 1, 1));
      if (!jb->norm) {
        for (int64_t j = 0; j < m; j++) out[j] = xi[j] <= 0 ? 0 : gi[j] * out[j];
        continue;
      }
      REAL u[BLOCK];
      for (int64_t j = 0; j < m; j++) u[j] = z[j] * z[j];
      NAME(horner)(p, u, m, e, MOE_MAX(terms - 1, 1));
      for (int64_t j = 0; j < m; j++) out[j] = s * (gi[j] * out[j] - z[j] * p[j]);
    }
  }
}

#undef REAL
#undef NAME
#undef KEY
#undef KEY_MAX
#undef BITS
#undef UNBITS
