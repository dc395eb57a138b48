/* Convolutions over time for one element type: conv.c includes this with REAL = float and double. */

/* --- unfold1d: every window as a column --- */

static void STATIC(unfold_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const unfold_job *j = arg;
  for (int64_t r = begin; r < end; r++) { /* row (b c, w) of the result: input channel b c seen from place w of the window */
    const REAL *restrict x = (const REAL *)j->from + r / j->width * j->t;
    REAL *restrict y = (REAL *)j->to + r * j->len;
    int64_t shift = r % j->width * j->dilation - j->padding;
    for (int64_t l = 0; l < j->len; l++) {
      int64_t at = l * j->stride + shift;
      y[l] = at >= 0 && at < j->t ? x[at] : 0;
    }
  }
}

/* The adjoint: windows added back, a task an input channel. */
static void STATIC(fold_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const unfold_job *j = arg;
  for (int64_t r = begin; r < end; r++) {
    REAL *restrict x = (REAL *)j->to + r * j->t;
    for (int64_t i = 0; i < j->t; i++) x[i] = 0;
    for (int64_t w = 0; w < j->width; w++) {
      const REAL *restrict y = (const REAL *)j->from + (r * j->width + w) * j->len;
      int64_t shift = w * j->dilation - j->padding;
      for (int64_t l = 0; l < j->len; l++) {
        int64_t at = l * j->stride + shift;
        if (at >= 0 && at < j->t) x[at] += y[l];
      }
    }
  }
}

/* --- causal depthwise --- */

/* Row i of the input led by its initial state: i in [0, w - 1 + t). */
static inline const REAL *STATIC(led)(const causal_job *j, int64_t b, int64_t i, int64_t c0) {
  if (i >= j->w - 1) return (const REAL *)j->x + b * j->sx[0] + (i - (j->w - 1)) * j->sx[1] + c0;
  return j->initial ? (const REAL *)j->initial + (b * (j->w - 1) + i) * j->c + c0 : (const REAL *)zeros;
}

/* z = bias + sum over k of weight[k] row(t + k), for n <= LANES channels from c0 on */
static inline void STATIC(taps)(const causal_job *j, int64_t b, int64_t t, int64_t c0, int64_t n, REAL *restrict z) {
  const REAL *wt = (const REAL *)j->weight_t + c0;
  for (int64_t c = 0; c < n; c++) z[c] = j->bias ? ((const REAL *)j->bias)[c0 + c] : 0;
  for (int64_t k = 0; k < j->w; k++) {
    const REAL *restrict x = STATIC(led)(j, b, t + k, c0), *restrict w = wt + k * j->c;
    for (int64_t c = 0; c < n; c++) z[c] += w[c] * x[c];
  }
}

static void STATIC(causal_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const causal_job *j = arg;
  for (int64_t r = begin; r < end; r++) {
    int64_t b = r / j->t, t = r % j->t;
    for (int64_t c0 = 0; c0 < j->c; c0 += LANES) {
      int64_t n = MOE_MIN(LANES, j->c - c0);
      REAL z[LANES], *restrict y = (REAL *)j->y + r * j->c + c0;
      STATIC(taps)(j, b, t, c0, n, z);
      if (j->silu)
        for (int64_t c = 0; c < n; c++) y[c] = z[c] * SIGMOID(z[c]);
      else
        for (int64_t c = 0; c < n; c++) y[c] = z[c];
    }
  }
}

/* The gradient by z of row t, and what it adds to those by weight and bias. */
static inline void STATIC(grad_z)(const causal_job *j, int64_t b, int64_t t, int64_t c0, int64_t n, REAL *restrict gz) {
  const REAL *restrict g = (const REAL *)j->g + (b * j->t + t) * j->c + c0;
  if (!j->silu) {
    for (int64_t c = 0; c < n; c++) gz[c] = g[c];
    return;
  }
  REAL z[LANES];
  STATIC(taps)(j, b, t, c0, n, z);
  for (int64_t c = 0; c < n; c++) {
    REAL s = SIGMOID(z[c]);
    gz[c] = g[c] * s * (1 + z[c] * (1 - s));
  }
}

/* A task: one sequence, LANES channels. A ring of the last w rows of gz is all that is in flight. */
static void STATIC(causal_back_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  causal_job *j = arg;
  int64_t blocks = (j->c + LANES - 1) / LANES, w = j->w;
  REAL *ring = moe_scratch(1, w * LANES * (int64_t)sizeof(REAL));
  if (ring == NULL) {
    atomic_store(&j->short_of_memory, true);
    return;
  }
  for (int64_t r = begin; r < end; r++) {
    int64_t b = r / blocks, c0 = r % blocks * LANES, n = MOE_MIN(LANES, j->c - c0);
    REAL *dw = (REAL *)j->dweight + b * (w + 1) * j->c + c0, *db = dw + w * j->c;
    for (int64_t k = 0; k <= w; k++)
      for (int64_t c = 0; c < n; c++) dw[k * j->c + c] = 0;
    /* Row i of the led input is seen by outputs i - k, k = 0 .. w - 1. */
    for (int64_t i = 0; i < j->t + w - 1; i++) {
      REAL acc[LANES];
      bool in_final = i >= j->t;
      const REAL *restrict gf = in_final && j->gfinal ? (const REAL *)j->gfinal + (b * (w - 1) + i - j->t) * j->c + c0 : (const REAL *)zeros;
      for (int64_t c = 0; c < n; c++) acc[c] = gf[c];
      if (i < j->t) {
        REAL *restrict gz = ring + i % w * LANES;
        STATIC(grad_z)(j, b, i, c0, n, gz);
        for (int64_t c = 0; c < n; c++) db[c] += gz[c];
        for (int64_t k = 0; k < w; k++) {
          const REAL *restrict x = STATIC(led)(j, b, i + k, c0);
          REAL *restrict d = dw + k * j->c;
          for (int64_t c = 0; c < n; c++) d[c] += gz[c] * x[c];
        }
      }
      for (int64_t k = MOE_MAX(0, i - j->t + 1); k < w && k <= i; k++) {
        const REAL *restrict gz = ring + (i - k) % w * LANES, *restrict wt = (const REAL *)j->weight_t + k * j->c + c0;
        for (int64_t c = 0; c < n; c++) acc[c] += wt[c] * gz[c];
      }
      REAL *to = i >= w - 1 ? (REAL *)j->dx + (b * j->t + i - (w - 1)) * j->c + c0
                 : j->dinitial ? (REAL *)j->dinitial + (b * (w - 1) + i) * j->c + c0 : NULL;
      if (to)
        for (int64_t c = 0; c < n; c++) to[c] = acc[c];
    }
  }
}
