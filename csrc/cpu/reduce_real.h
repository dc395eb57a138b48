/* Template of cpu/reduce.c, included once for float and once for double (REAL, REAL_NAME). Every function
** handles outers [begin, end) of [outer, n, inner]. No include guard. */

static void REAL_NAME(variance)(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j0 = 0; j0 < inner; j0 += TILE) {
      int64_t w = MOE_MIN(inner - j0, TILE);
      const REAL *x = (const REAL *)b->a + o * n * inner + j0;
      REAL *y = (REAL *)b->y + o * inner + j0;
      acc sum[TILE];
      REAL mean[TILE];
      double sq[TILE] = {0}, off[TILE] = {0};
      for (int64_t j = 0; j < w; j++) sum[j].f = 0;
      if (inner == 1)
        REAL_SUM_RUN(sum, x, n, 0);
      else
        REAL_SUM_COLS(sum, x, n, inner, w, 0);
      for (int64_t j = 0; j < w; j++) mean[j] = (REAL)(sum[j].f / (double)n);
      if (inner == 1) {
        for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
          int64_t stop = MOE_MIN(i0 + BLOCK, n);
          REAL s = 0, e = 0, m = mean[0];
#pragma omp simd reduction(+ : s, e)
          for (int64_t i = i0; i < stop; i++) {
            REAL d = x[i] - m;
            s += d * d;
            e += d;
          }
          sq[0] += (double)s;
          off[0] += (double)e;
        }
      } else {
        for (int64_t i0 = 0; i0 < n; i0 += TILE) {
          REAL s[TILE] = {0}, e[TILE] = {0};
          for (int64_t i = i0; i < MOE_MIN(i0 + TILE, n); i++) {
            const REAL *restrict r = x + i * inner;
            for (int64_t j = 0; j < w; j++) {
              REAL d = r[j] - mean[j];
              s[j] += d * d;
              e[j] += d;
            }
          }
          for (int64_t j = 0; j < w; j++) {
            sq[j] += (double)s[j];
            off[j] += (double)e[j];
          }
        }
      }
      for (int64_t j = 0; j < w; j++) {
        /* the rounding of the mean is taken out again: Chan, Golub, LeVeque 1983, eq. 1.7 */
        double v = (sq[j] - off[j] * off[j] / (double)n) / b->p;
        y[j] = (REAL)(b->flag ? sqrt(v) : v);
      }
    }
}

/* gx = g / (number of elements equal to y) at those, 0 elsewhere. With `flag` magnitudes are compared. */
static void REAL_NAME(extreme_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j = 0; j < inner; j++) {
      const REAL *x = (const REAL *)b->c + o * n * inner + j;
      REAL *gx = (REAL *)b->y + o * n * inner + j;
      REAL y = ((const REAL *)b->b)[o * inner + j], g = ((const REAL *)b->a)[o * inner + j];
      int64_t count = 0;
      for (int64_t i = 0; i < n; i++) {
        REAL v = x[i * inner], m = b->flag ? (v < 0 ? -v : v) : v;
        count += (m == y) | ((m != m) & (y != y));
      }
      g = count > 0 ? g / (REAL)count : 0;
      for (int64_t i = 0; i < n; i++) {
        REAL v = x[i * inner], m = b->flag ? (v < 0 ? -v : v) : v;
        REAL s = b->flag ? (REAL)((v > 0) - (v < 0)) : 1;
        gx[i * inner] = (m == y) | ((m != m) & (y != y)) ? g * s : 0;
      }
    }
}

/* The product of the others is that of those before times that of those after: exact with zeros. */
static void REAL_NAME(prod_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j0 = 0; j0 < inner; j0 += TILE) {
      int64_t w = MOE_MIN(inner - j0, TILE), first = o * n * inner + j0;
      const REAL *x = (const REAL *)b->b + first, *g = (const REAL *)b->a + o * inner + j0;
      REAL *gx = (REAL *)b->y + first, run[TILE];
      for (int64_t j = 0; j < w; j++) run[j] = 1;
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < w; j++) {
          gx[i * inner + j] = run[j];
          run[j] *= x[i * inner + j];
        }
      for (int64_t j = 0; j < w; j++) run[j] = g[j];
      for (int64_t i = n; i-- > 0;)
        for (int64_t j = 0; j < w; j++) {
          gx[i * inner + j] *= run[j];
          run[j] *= x[i * inner + j];
        }
    }
}

/* The running value is f64: long sums keep their accuracy. */
static void REAL_NAME(scan)(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner, step = b->flag ? -inner : inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j0 = 0; j0 < inner; j0 += TILE) {
      int64_t w = MOE_MIN(inner - j0, TILE), at = (o * n + (b->flag ? n - 1 : 0)) * inner + j0;
      double run[TILE];
      for (int64_t j = 0; j < w; j++) run[j] = b->kind == MOE_SCAN_SUM ? 0 : 1;
      for (int64_t i = 0; i < n; i++, at += step) {
        const REAL *restrict x = (const REAL *)b->a + at;
        REAL *restrict y = (REAL *)b->y + at;
        if (b->kind == MOE_SCAN_SUM)
          for (int64_t j = 0; j < w; j++) y[j] = (REAL)(run[j] += (double)x[j]);
        else
          for (int64_t j = 0; j < w; j++) y[j] = (REAL)(run[j] *= (double)x[j]);
      }
    }
}

/* gx_i = (product of x before i) * s_i, s_i = g_i + x_{i+1} s_{i+1}: no division, exact with zeros. */
static void REAL_NAME(cumprod_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const real_job *b = arg;
  int64_t n = b->n, inner = b->inner;
  (void)worker;
  for (int64_t o = begin; o < end; o++)
    for (int64_t j = 0; j < inner; j++) {
      int64_t first = o * n * inner + j;
      const REAL *x = (const REAL *)b->b + first, *g = (const REAL *)b->a + first;
      REAL *gx = (REAL *)b->y + first;
      double run = 1, s = 0;
      for (int64_t i = 0; i < n; i++) {
        gx[i * inner] = (REAL)run;
        run *= (double)x[i * inner];
      }
      for (int64_t i = n; i-- > 0;) {
        s = (double)g[i * inner] + (i + 1 < n ? (double)x[(i + 1) * inner] * s : 0);
        gx[i * inner] = (REAL)((double)gx[i * inner] * s);
      }
    }
}
