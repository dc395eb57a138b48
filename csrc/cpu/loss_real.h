/* Template of cpu/loss.c, included once for float and once for double. No include guard. */

/* *max, log of sum of exp(x - *max) */
static inline double NAME(row_logsumexp)(const REAL *restrict x, int64_t n, double *max) {
  KEY k = KEY_OF((REAL)-INFINITY);
#pragma omp simd reduction(max : k)
  for (int64_t i = 0; i < n; i++) {
    KEY v = KEY_OF(x[i]);
    k = v > k ? v : k;
  }
  REAL m = UNKEY(k);
  double total = 0;
  for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
    int64_t stop = MOE_MIN(i0 + BLOCK, n);
    REAL s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = i0; i < stop; i++) s += F(exp)(x[i] - m);
    total += (double)s;
  }
  *max = (double)m;
  return log(total);
}

/* loss = (1 - s) w_t (lse - x_t) + s / n sum_c w_c (lse - x_c), with lse = 0 for log-probabilities (nll) */
static void NAME(ce)(void *arg, int64_t begin, int64_t end, int worker) {
  const ce_job *b = arg;
  const REAL *restrict w = b->w;
  int64_t n = b->n;
  (void)worker;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)b->x + row * n;
    double max = 0, rest = 0, loss = 0, weight = 0;
    bool ignored = b->target[row] == b->ignore;
    if (b->lse && n > 0) {
      rest = NAME(row_logsumexp)(x, n, &max);
      ((REAL *)b->lse)[row] = (REAL)(max + rest);
    }
    if (!ignored) {
      int64_t t = b->target[row] - b->base;
      weight = w ? (double)w[t] : 1.0;
      loss = (1.0 - b->smoothing) * weight * ((max - (double)x[t]) + rest);
      if (b->smoothing > 0) {
        double sum = 0;
        for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
          int64_t stop = MOE_MIN(i0 + BLOCK, n);
          REAL s = 0, m = (REAL)max;
          if (w) {
#pragma omp simd reduction(+ : s)
            for (int64_t i = i0; i < stop; i++) s += w[i] * (m - x[i]);
          } else {
#pragma omp simd reduction(+ : s)
            for (int64_t i = i0; i < stop; i++) s += m - x[i];
          }
          sum += (double)s;
        }
        loss += b->smoothing / (double)n * (sum + rest * b->wsum);
      }
    }
    ((REAL *)b->loss)[row] = (REAL)loss;
    if (b->weight) ((REAL *)b->weight)[row] = (REAL)weight;
  }
}

/* d loss / d x_c = ((1 - s) w_t + s / n sum w) p_c - s / n w_c - (1 - s) w_t [c = t] */
static void NAME(ce_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const ce_job *b = arg;
  const REAL *restrict w = b->w;
  int64_t n = b->n;
  double by = b->total ? 1.0 / (double)*(const REAL *)b->total : 1.0;
  (void)worker;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)b->x + row * n;
    REAL *restrict gx = (REAL *)b->gx + row * n;
    if (b->target[row] == b->ignore) {
      memset(gx, 0, (size_t)n * sizeof(REAL));
      continue;
    }
    int64_t t = b->target[row] - b->base;
    if (t < 0 || t >= n) t = 0; /* the forward has refused it; the user wrote over the target since */
    double g = (double)((const REAL *)b->g)[b->g_one ? 0 : row] * by;
    double one = g * (1.0 - b->smoothing) * (w ? (double)w[t] : 1.0), each = g * b->smoothing / (double)n;
    if (b->lse_in) {
      REAL lse = ((const REAL *)b->lse_in)[row], cp = (REAL)(one + each * b->wsum), ce = (REAL)each;
      if (w) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) gx[i] = cp * F(exp)(x[i] - lse) - ce * w[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) gx[i] = cp * F(exp)(x[i] - lse) - ce;
      }
    } else {
      memset(gx, 0, (size_t)n * sizeof(REAL));
    }
    gx[t] -= (REAL)one;
  }
}

/* loss = sum_c q_c (lse - x_c), q = w_c ((1 - s) target_c + s / n); gx_c = p_c sum q - q_c;
** gt_c = (1 - s) w_c (lse - x_c) */
static inline __attribute__((always_inline)) REAL NAME(soft_q)(REAL t, const REAL *w, int64_t i, REAL keep, REAL each,
                                                               bool with_w) {
  REAL q = keep * t + each;
  return with_w ? q * w[i] : q;
}

static inline __attribute__((always_inline)) void NAME(soft_rows)(const ce_job *b, int64_t begin, int64_t end, bool with_w) {
  const REAL *restrict w = b->w;
  int64_t n = b->n;
  REAL keep = (REAL)(1.0 - b->smoothing), each = n > 0 ? (REAL)(b->smoothing / (double)n) : 0;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)b->x + row * n, *restrict t = (const REAL *)b->probs + row * n;
    double max = 0, rest = n > 0 ? NAME(row_logsumexp)(x, n, &max) : 0, loss = 0;
    REAL m = (REAL)max, r = (REAL)rest;
    ((REAL *)b->lse)[row] = (REAL)(max + rest);
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t stop = MOE_MIN(i0 + BLOCK, n);
      REAL s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < stop; i++) {
        REAL q = NAME(soft_q)(t[i], w, i, keep, each, with_w);
        s += q == 0 ? 0 : q * ((m - x[i]) + r);
      }
      loss += (double)s;
    }
    ((REAL *)b->loss)[row] = (REAL)loss;
  }
}

static void NAME(soft_ce)(void *arg, int64_t begin, int64_t end, int worker) {
  const ce_job *b = arg;
  (void)worker;
  if (b->w)
    NAME(soft_rows)(b, begin, end, true);
  else
    NAME(soft_rows)(b, begin, end, false);
}

static inline __attribute__((always_inline)) void NAME(soft_rows_bwd)(const ce_job *b, int64_t begin, int64_t end, bool with_w) {
  const REAL *restrict w = b->w;
  int64_t n = b->n;
  REAL keep = (REAL)(1.0 - b->smoothing), each = n > 0 ? (REAL)(b->smoothing / (double)n) : 0;
  for (int64_t row = begin; row < end; row++) {
    const REAL *restrict x = (const REAL *)b->x + row * n, *restrict t = (const REAL *)b->probs + row * n;
    REAL lse = ((const REAL *)b->lse_in)[row];
    REAL g = (REAL)((double)((const REAL *)b->g)[b->g_one ? 0 : row] * b->scale);
    double total = 0;
    for (int64_t i0 = 0; i0 < n; i0 += BLOCK) {
      int64_t stop = MOE_MIN(i0 + BLOCK, n);
      REAL s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < stop; i++) s += NAME(soft_q)(t[i], w, i, keep, each, with_w);
      total += (double)s;
    }
    REAL sum = (REAL)total;
    if (b->gx) {
      REAL *restrict gx = (REAL *)b->gx + row * n;
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        gx[i] = g * (sum * F(exp)(x[i] - lse) - NAME(soft_q)(t[i], w, i, keep, each, with_w));
    }
    if (b->gt) {
      REAL *restrict gt = (REAL *)b->gt + row * n;
      for (int64_t i = 0; i < n; i++) gt[i] = g * keep * (with_w ? w[i] : 1) * (lse - x[i]);
    }
  }
}

static void NAME(soft_ce_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const ce_job *b = arg;
  (void)worker;
  if (b->w)
    NAME(soft_rows_bwd)(b, begin, end, true);
  else
    NAME(soft_rows_bwd)(b, begin, end, false);
}

/* --- elementwise --- */

#define L_SQUARE(a, b) (((a) - (b)) * ((a) - (b)))
#define L_ABS(a, b) F(abs)((a) - (b))
#define L_KL(a, b) ((b) > 0 ? (b) * (F(log)(b) - (a)) : 0)
#define L_KL_LOG(a, b) (F(exp)(b) * ((b) - (a)))
#define L_BCE(a, b) (((a) > 0 ? (a) : 0) - (a) * (b) + F(log1p)(F(exp)(-F(abs)(a))))

static inline REAL NAME(huber)(REAL a, REAL b, REAL delta) {
  REAL d = F(abs)(a - b);
  return d <= delta ? d * d / 2 : delta * (d - delta / 2);
}

/* y[i] = the loss of pair i, i in [0, n); with y NULL only the sum is made */
static inline double NAME(pair_run)(const pair_job *j, REAL *restrict y, int64_t begin, int64_t end) {
  const REAL *restrict a = j->a, *restrict b = j->b;
  REAL delta = (REAL)j->p, s = 0;
  double total = 0;
#define CASE(kind_, expr)                                       \
  case kind_:                                                   \
    if (y) {                                                    \
      for (int64_t i = i0; i < stop; i++) y[i] = (REAL)(expr); \
    } else {                                                    \
      PAIR_SIMD for (int64_t i = i0; i < stop; i++) s += (REAL)(expr); \
    }                                                           \
    break;
  for (int64_t i0 = begin; i0 < end; i0 += BLOCK) {
    int64_t stop = MOE_MIN(i0 + BLOCK, end);
    s = 0;
    switch (j->kind) {
      CASE(MOE_LOSS_SQUARE, L_SQUARE(a[i], b[i]))
      CASE(MOE_LOSS_ABS, L_ABS(a[i], b[i]))
      CASE(MOE_LOSS_HUBER, NAME(huber)(a[i], b[i], delta))
      CASE(MOE_LOSS_KL, L_KL(a[i], b[i]))
      CASE(MOE_LOSS_KL_LOG, L_KL_LOG(a[i], b[i]))
      CASE(MOE_LOSS_BCE, L_BCE(a[i], b[i]))
    }
    total += (double)s;
  }
#undef CASE
  return total;
}

static void NAME(pair_each)(void *arg, int64_t begin, int64_t end, int worker) {
  const pair_job *j = arg;
  (void)worker;
  NAME(pair_run)(j, j->y, begin, end);
}

static void NAME(pair_sum)(void *arg, int64_t begin, int64_t end, int worker) {
  const pair_job *j = arg;
  (void)worker;
  j->part[begin / CHUNK] = NAME(pair_run)(j, NULL, begin, end);
}

/* derivatives by a and by b */
static inline void NAME(pair_slope)(int kind, REAL delta, REAL a, REAL b, REAL *da, REAL *db) {
  REAL d = a - b;
  switch (kind) {
    case MOE_LOSS_SQUARE: *da = 2 * d; *db = -2 * d; break;
    case MOE_LOSS_ABS: *da = (REAL)((d > 0) - (d < 0)); *db = -*da; break;
    case MOE_LOSS_HUBER: *da = d > delta ? delta : d < -delta ? -delta : d; *db = -*da; break;
    case MOE_LOSS_KL: *da = b > 0 ? -b : 0; *db = b > 0 ? F(log)(b) - a + 1 : 0; break;
    case MOE_LOSS_KL_LOG: *da = -F(exp)(b); *db = F(exp)(b) * (b - a + 1); break;
    default: *da = F(sigmoid)(a) - b; *db = -a; break;
  }
}

static inline __attribute__((always_inline)) void NAME(pair_bwd_kind)(const pair_job *j, int64_t begin, int64_t end, int kind) {
  const REAL *restrict a = j->a, *restrict b = j->b, *restrict g = j->g;
  REAL *restrict ga = j->ga, *restrict gb = j->gb, delta = (REAL)j->p, scale = (REAL)j->scale;
  for (int64_t i = begin; i < end; i++) {
    REAL da, db, gi = g[j->g_one ? 0 : i] * scale;
    NAME(pair_slope)(kind, delta, a[i], b[i], &da, &db);
    if (ga) ga[i] = gi * da;
    if (gb) gb[i] = gi * db;
  }
}

static void NAME(pair_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  const pair_job *j = arg;
  (void)worker;
  switch (j->kind) { /* one loop a kind, so that each is vectorised */
    case MOE_LOSS_SQUARE: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_SQUARE); break;
    case MOE_LOSS_ABS: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_ABS); break;
    case MOE_LOSS_HUBER: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_HUBER); break;
    case MOE_LOSS_KL: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_KL); break;
    case MOE_LOSS_KL_LOG: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_KL_LOG); break;
    default: NAME(pair_bwd_kind)(j, begin, end, MOE_LOSS_BCE); break;
  }
}

#undef L_SQUARE
#undef L_ABS
#undef L_KL
#undef L_KL_LOG
#undef L_BCE
#undef REAL
#undef NAME
#undef KEY
#undef KEY_OF
#undef UNKEY
#undef PAIR_SIMD
#undef F
