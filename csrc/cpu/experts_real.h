/* The kernels of expert networks for one element type; experts.c includes this once with REAL = float, once
** with double. R(x) is x with the type's name behind it, VM1(x) the elementary function of cpu/vmath.h.
**
** Work is cut into tiles of one expert's rows, by the plan alone. A tile is gathered into scratch and stays in
** cache through its products, each on one thread; no gathered copy of x is kept. The backward takes an expert
** of moderate size whole (its hidden gradients never leave scratch); a large one is cut into tiles of rows, and
** then its weight gradients into stripes of hidden units, so that the threads stay even and every element of
** a gradient is summed by one task, in the order of rows.
**
** The gradient of a row's weight is <dy w_out, a>, which the backward has at hand: the unweighted expert
** outputs are not kept (Guo et al., "SonicMoE", 2025, section 4).
*/

/* --- activations: f and df of x --- */

static inline void R(silu)(REAL x, REAL *f, REAL *df) {
  REAL s = VM1(sigmoid)(x);
  *f = x * s;
  *df = s * (1 + x * (1 - s));
}
static inline void R(gelu)(REAL x, REAL *f, REAL *df) {
  REAL c = (REAL)0.5 * (1 + VM1(erf)(x * (REAL)0.70710678118654752440));
  *f = x * c;
  *df = c + x * VM1(exp)((REAL)-0.5 * x * x) * (REAL)0.39894228040143267794;
}
static inline void R(gelu_tanh)(REAL x, REAL *f, REAL *df) {
  const REAL c = (REAL)0.79788456080286535588, a = (REAL)0.044715;
  REAL t = VM1(tanh)(c * (x + a * x * x * x));
  *f = (REAL)0.5 * x * (1 + t);
  *df = (REAL)0.5 * (1 + t) + (REAL)0.5 * x * (1 - t * t) * c * (1 + 3 * a * x * x);
}
static inline void R(relu)(REAL x, REAL *f, REAL *df) {
  *f = x > 0 ? x : (x <= 0 ? 0 : x); /* NaN stays */
  *df = x > 0 ? 1 : 0;
}
static inline void R(relu2)(REAL x, REAL *f, REAL *df) {
  REAL r = x > 0 ? x : (x <= 0 ? 0 : x);
  *f = r * r;
  *df = 2 * r;
}
static inline void R(tanh)(REAL x, REAL *f, REAL *df) {
  REAL t = VM1(tanh)(x);
  *f = t;
  *df = 1 - t * t;
}
static inline void R(sigmoid)(REAL x, REAL *f, REAL *df) {
  REAL s = VM1(sigmoid)(x);
  *f = s;
  *df = s * (1 - s);
}
static inline void R(identity)(REAL x, REAL *f, REAL *df) {
  *f = x;
  *df = 1;
}

/* Over one row: a [n] of h [n], or gated of h = [gate [n], up [n]]. The backward takes da = w_out^T dy without the
** row's weight w; writes dh, wa = w a; returns <da, a>. */
#define ACT(name)                                                                                    \
  static void R(name##_fwd)(REAL *restrict a, const REAL *restrict h, int64_t n, bool gated) {       \
    const REAL *restrict up = h + n;                                                                 \
    REAL f, df;                                                                                      \
    if (gated)                                                                                       \
      for (int64_t i = 0; i < n; i++) {                                                              \
        R(name)(h[i], &f, &df);                                                                      \
        a[i] = f * up[i];                                                                            \
      }                                                                                              \
    else                                                                                             \
      for (int64_t i = 0; i < n; i++) {                                                              \
        R(name)(h[i], &f, &df);                                                                      \
        a[i] = f;                                                                                    \
      }                                                                                              \
  }                                                                                                  \
  static REAL R(name##_bwd)(REAL *restrict dh, REAL *restrict wa, const REAL *restrict da,           \
                            const REAL *restrict h, int64_t n, bool gated, REAL w) {                 \
    const REAL *restrict up = h + n;                                                                 \
    REAL *restrict dup = dh + n;                                                                     \
    REAL f, df, s = 0;                                                                               \
    if (gated) _Pragma("omp simd private(f, df) reduction(+ : s)") for (int64_t i = 0; i < n; i++) { \
        R(name)(h[i], &f, &df);                                                                      \
        REAL g = w * da[i], a = f * up[i];                                                           \
        s += da[i] * a;                                                                              \
        wa[i] = w * a;                                                                               \
        dup[i] = g * f;                                                                              \
        dh[i] = g * up[i] * df;                                                                      \
      }                                                                                              \
    else                                                                                             \
      _Pragma("omp simd private(f, df) reduction(+ : s)") for (int64_t i = 0; i < n; i++) {          \
        R(name)(h[i], &f, &df);                                                                      \
        s += da[i] * f;                                                                              \
        wa[i] = w * f;                                                                               \
        dh[i] = w * da[i] * df;                                                                      \
      }                                                                                              \
    return s;                                                                                        \
  }
MOE_ACTS(ACT)
#undef ACT

typedef void R(act_fwd)(REAL *restrict a, const REAL *restrict h, int64_t n, bool gated);
typedef REAL R(act_bwd)(REAL *restrict dh, REAL *restrict wa, const REAL *restrict da, const REAL *restrict h,
                        int64_t n, bool gated, REAL w);
static const struct {
  R(act_fwd) * fwd;
  R(act_bwd) * bwd;
} R(acts)[MOE_ACT_COUNT] = {
#define X(name) [MOE_ACT_##name] = {R(name##_fwd), R(name##_bwd)},
    MOE_ACTS(X)
#undef X
};

/* --- small pieces --- */

static inline REAL R(dot)(const REAL *restrict a, const REAL *restrict b, int64_t n) {
  REAL s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
  return s;
}

static inline void R(fill_rows)(REAL *y, const REAL *row, int64_t m, int64_t n) {
  for (int64_t r = 0; r < m; r++) memcpy(y + r * n, row, (size_t)n * sizeof *y);
}

/* y [n] <- sum over rows of scale[r] x[r], scale NULL = 1 */
static void R(sum_rows)(REAL *restrict y, const REAL *restrict x, const REAL *scale, int64_t m, int64_t n,
                        int64_t ld) {
  for (int64_t i = 0; i < n; i++) y[i] = 0;
  for (int64_t r = 0; r < m; r++) {
    REAL s = scale ? scale[r] : 1;
    for (int64_t i = 0; i < n; i++) y[i] += s * x[r * ld + i];
  }
}

/* Products of m rows with weights: by thin_real.h where they are few, else by the BLAS. */

/* c [m, n] = a [m, k] b [n, k]^T (+ c) */
static void R(nt)(int64_t m, int64_t n, int64_t k, const REAL *a, const REAL *b, bool add, REAL *c) {
  REAL *room = NULL;
  if (m > 1 && m <= THIN_ROWS)
    room = moe_scratch(THIN_SCRATCH, (k + R(STRIP)) * (m + R(VL)) * (int64_t)sizeof(REAL));
  if (room)
    R(packed_nt)(m, n, k, a, b, add, c, room);
  else
    GEMM(false, true, m, n, k, 1, a, k, b, k, add ? 1 : 0, c, n);
}

/* c [m, n] = a [m, k] b [k, n] */
static void R(nn)(int64_t m, int64_t n, int64_t k, const REAL *a, const REAL *b, REAL *c) {
  if (m > 1 && m <= THIN_ROWS)
    R(mix_at)(m, k, n, c, n, b, n, a, k, 1, false, false);
  else
    GEMM(false, false, m, n, k, 1, a, k, b, n, 0, c, n);
}

/* c [m, n] (row stride ldc) = a [rows, m]^T b [rows, n] (+ c), row strides lda, ldb */
static void R(tn)(int64_t m, int64_t n, int64_t rows, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                  bool add, REAL *c, int64_t ldc) {
  if (rows > 0 && rows <= THIN_ROWS)
    R(mix_at)(m, rows, n, c, ldc, b, ldb, a, 1, lda, add, false);
  else
    GEMM(true, false, m, n, rows, 1, a, lda, b, ldb, add ? 1 : 0, c, ldc);
}

/* Rows [r0, r1) of the plan, from x [tokens, d]: x itself where they lie together, else gathered into `room`. */
static const REAL *R(rows_of)(const moe_plan *p, const REAL *x, int64_t d, int64_t r0, int64_t r1, REAL *room) {
  if (p->dense) return x + r0 * d;
  if (r1 - r0 == 1) return x + p->token[r0] * d;
  for (int64_t r = r0; r < r1; r++) memcpy(room + (r - r0) * d, x + p->token[r] * d, (size_t)d * sizeof *x);
  return room;
}

/* --- forward --- */

static void R(fwd_tile)(ffn_job *job, int64_t g, int64_t r0, int64_t r1) {
  const moe_ffn *f = job->f;
  int64_t m = r1 - r0, e = f->plan.expert[g], F = f->gated ? 2 * f->hidden : f->hidden, I = f->hidden;
  REAL *room = moe_scratch(SCRATCH, m * (f->d_in + I + (job->h ? 0 : F)) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  REAL *a = room + m * f->d_in, *h = job->h ? (REAL *)job->h + r0 * F : a + m * I,
       *y = (REAL *)job->y + r0 * f->d_out;
  const REAL *x = R(rows_of)(&f->plan, f->x, f->d_in, r0, r1, room);
  if (f->b_in) R(fill_rows)(h, (const REAL *)f->b_in + e * F, m, F);
  R(nt)(m, F, f->d_in, x, (const REAL *)f->w_in + e * F * f->d_in, f->b_in != NULL, h);
  for (int64_t r = 0; r < m; r++) R(acts)[f->act].fwd(a + r * I, h + r * F, I, f->gated);
  if (f->b_out) R(fill_rows)(y, (const REAL *)f->b_out + e * f->d_out, m, f->d_out);
  R(nt)(m, f->d_out, I, a, (const REAL *)f->w_out + e * f->d_out * I, f->b_out != NULL, y);
}

/* --- backward --- */

/* Hidden gradients of rows [r0, r1) of group g into dh [m, F] and wa [m, I]; dy [m, d_out] their gathered output
** gradients, da [m, I] room. Also the gradients of the rows' weights and of their inputs. */
static void R(bwd_tile)(ffn_job *job, int64_t g, int64_t r0, int64_t r1, REAL *dh, REAL *wa, const REAL *dy,
                        REAL *da) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t m = r1 - r0, e = p->expert[g], F = f->gated ? 2 * f->hidden : f->hidden, I = f->hidden;
  const REAL *weight = f->weight, *b_out = f->b_out ? (const REAL *)f->b_out + e * f->d_out : NULL;
  const REAL *h = (const REAL *)job->hidden + r0 * F;
  R(nn)(m, I, f->d_out, dy, (const REAL *)f->w_out + e * f->d_out * I, da);
  for (int64_t r = 0; r < m; r++) {
    REAL w = weight ? weight[p->source[r0 + r]] : 1;
    REAL s = R(acts)[f->act].bwd(dh + r * F, wa + r * I, da + r * I, h + r * F, I, f->gated, w);
    if (job->gweight)
      ((REAL *)job->gweight)[p->source[r0 + r]] = b_out ? s + R(dot)(dy + r * f->d_out, b_out, f->d_out) : s;
  }
  if (job->gx)
    R(nn)(m, f->d_in, F, dh, (const REAL *)f->w_in + e * F * f->d_in, (REAL *)job->gx + r0 * f->d_in);
}

static void R(bias_out)(const ffn_job *job, REAL *gb, const REAL *dy, int64_t r0, int64_t r1, int64_t o0,
                        int64_t o1, bool add) {
  const moe_ffn *f = job->f;
  const REAL *weight = f->weight;
  if (!add)
    for (int64_t o = o0; o < o1; o++) gb[o] = 0;
  for (int64_t r = r0; r < r1; r++) {
    REAL w = weight ? weight[f->plan.source[r]] : 1;
    const REAL *restrict d = dy + (r - r0) * f->d_out;
    for (int64_t o = o0; o < o1; o++) gb[o] += w * d[o];
  }
}

/* All of group g at once. */
static void R(bwd_whole)(ffn_job *job, int64_t g) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t r0 = p->start[g], r1 = p->start[g + 1], m = r1 - r0, e = p->expert[g];
  int64_t I = f->hidden, F = f->gated ? 2 * I : I, din = f->d_in, dout = f->d_out;
  REAL *room = moe_scratch(SCRATCH, m * (din + dout + F + 2 * I) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  REAL *dh = room + m * (din + dout), *wa = dh + m * F, *da = wa + m * I;
  const REAL *dy = R(rows_of)(p, job->gy, dout, r0, r1, room + m * din);
  R(bwd_tile)(job, g, r0, r1, dh, wa, dy, da);
  if (job->gw_in) {
    const REAL *x = R(rows_of)(p, f->x, din, r0, r1, room);
    R(tn)(F, din, m, dh, F, x, din, false, (REAL *)job->gw_in + e * F * din, din);
  }
  if (job->gw_out) R(tn)(dout, I, m, dy, dout, wa, I, false, (REAL *)job->gw_out + e * dout * I, I);
  if (job->gb_in) R(sum_rows)((REAL *)job->gb_in + e * F, dh, NULL, m, F, F);
  if (job->gb_out) R(bias_out)(job, (REAL *)job->gb_out + e * dout, dy, r0, r1, 0, dout, false);
}

/* A tile of a large group: hidden gradients go to the job's memory, at `at` rows. */
static void R(bwd_part)(ffn_job *job, int64_t g, int64_t r0, int64_t r1, int64_t at) {
  const moe_ffn *f = job->f;
  int64_t m = r1 - r0, I = f->hidden, F = f->gated ? 2 * I : I;
  REAL *room = moe_scratch(SCRATCH, m * (f->d_out + I) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  const REAL *dy = R(rows_of)(&f->plan, job->gy, f->d_out, r0, r1, room);
  R(bwd_tile)(job, g, r0, r1, (REAL *)job->dh + at * F, (REAL *)job->wa + at * I, dy, room + m * f->d_out);
}

/* Hidden units [i0, i1) of a large group: their stripes of the weight gradients, over all of its rows. */
static void R(bwd_stripe)(ffn_job *job, int64_t g, int64_t i0, int64_t i1, int64_t at) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t I = f->hidden, F = f->gated ? 2 * I : I, din = f->d_in, dout = f->d_out, e = p->expert[g];
  int64_t n = p->start[g + 1] - p->start[g], step = MOE_MIN(n, STRIPE_ROWS), w = i1 - i0;
  REAL *room = moe_scratch(SCRATCH, step * MOE_MAX(din, dout) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  const REAL *dh = (const REAL *)job->dh + at * F, *wa = (const REAL *)job->wa + at * I;
  REAL *gw_in = job->gw_in ? (REAL *)job->gw_in + e * F * din : NULL;
  REAL *gw_out = job->gw_out ? (REAL *)job->gw_out + e * dout * I : NULL;
  for (int64_t r = 0; r < n; r += step) {
    int64_t r0 = p->start[g] + r, m = MOE_MIN(step, n - r);
    if (gw_in) {
      const REAL *x = R(rows_of)(p, f->x, din, r0, r0 + m, room);
      R(tn)(w, din, m, dh + r * F + i0, F, x, din, r > 0, gw_in + i0 * din, din);
      if (f->gated) R(tn)(w, din, m, dh + r * F + I + i0, F, x, din, r > 0, gw_in + (I + i0) * din, din);
    }
    if (gw_out || job->gb_out) {
      const REAL *dy = R(rows_of)(p, job->gy, dout, r0, r0 + m, room);
      if (gw_out) R(tn)(dout, w, m, dy, dout, wa + r * I + i0, I, r > 0, gw_out + i0, I);
      if (job->gb_out)
        R(bias_out)(job, (REAL *)job->gb_out + e * dout, dy, r0, r0 + m, dout * i0 / I, dout * i1 / I, r > 0);
    }
  }
  if (job->gb_in) {
    REAL *gb = (REAL *)job->gb_in + e * F;
    R(sum_rows)(gb + i0, dh + i0, NULL, n, w, F);
    if (f->gated) R(sum_rows)(gb + I + i0, dh + I + i0, NULL, n, w, F);
  }
}

/* --- rows and tokens --- */

static void R(gather)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const rows_job *j = arg;
  const moe_plan *p = j->plan;
  int64_t d = j->d;
  for (int64_t r = begin; r < end; r++) {
    const REAL *restrict x = (const REAL *)j->x + (p->dense ? r : p->token[r]) * d;
    REAL *restrict y = (REAL *)j->y + r * d;
    if (j->weight == NULL) {
      memcpy(y, x, (size_t)d * sizeof *y);
      continue;
    }
    REAL w = ((const REAL *)j->weight)[p->source[r]];
    for (int64_t i = 0; i < d; i++) y[i] = w * x[i];
  }
}

static void R(combine)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const rows_job *j = arg;
  const moe_plan *p = j->plan;
  const REAL *rows = j->x, *weight = j->weight;
  int64_t d = j->d;
  for (int64_t t = begin; t < end; t++) {
    REAL *restrict y = (REAL *)j->y + t * d;
    int64_t s = p->row_start[t], s1 = p->row_start[t + 1];
    if (s == s1) {
      memset(y, 0, (size_t)d * sizeof *y);
      continue;
    }
    for (bool first = true; s < s1; first = false) {
      /* two rows at a time; the order of the sum is that of the slots */
      int64_t ra = p->slot[s], rb = s + 1 < s1 ? p->slot[s + 1] : ra;
      bool two = s + 1 < s1;
      const REAL *restrict a = rows + ra * d, *restrict b = rows + rb * d;
      REAL wa = weight ? weight[p->source[ra]] : 1, wb = weight ? weight[p->source[rb]] : 1;
      if (first && two)
        for (int64_t i = 0; i < d; i++) y[i] = wa * a[i] + wb * b[i];
      else if (first)
        for (int64_t i = 0; i < d; i++) y[i] = wa * a[i];
      else if (two)
        for (int64_t i = 0; i < d; i++) y[i] = (y[i] + wa * a[i]) + wb * b[i];
      else
        for (int64_t i = 0; i < d; i++) y[i] += wa * a[i];
      s += 2;
    }
  }
}

static void R(dots)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const rows_job *j = arg;
  const moe_plan *p = j->plan;
  for (int64_t r = begin; r < end; r++)
    ((REAL *)j->y)[p->source[r]] = R(dot)((const REAL *)j->x + (p->dense ? r : p->token[r]) * j->d,
                                          (const REAL *)j->weight + r * j->d, j->d);
}

/* --- grouped linear: rows [r0, r1) of group g --- */

static void R(linear_fwd)(linear_job *j, int64_t g, int64_t r0, int64_t r1) {
  int64_t e = j->plan->expert[g], m = r1 - r0;
  REAL *y = (REAL *)j->y + r0 * j->n;
  if (j->b) R(fill_rows)(y, (const REAL *)j->b + e * j->n, m, j->n);
  R(nt)(m, j->n, j->k, (const REAL *)j->x + r0 * j->k, (const REAL *)j->w + e * j->n * j->k, j->b != NULL, y);
}

static void R(linear_gx)(linear_job *j, int64_t g, int64_t r0, int64_t r1) {
  int64_t e = j->plan->expert[g];
  R(nn)
  (r1 - r0, j->k, j->n, (const REAL *)j->g + r0 * j->n, (const REAL *)j->w + e * j->n * j->k,
   (REAL *)j->gx + r0 * j->k);
}

/* Outputs [n0, n1) of all of group g's rows. */
static void R(linear_gw)(linear_job *j, int64_t g, int64_t n0, int64_t n1) {
  int64_t e = j->plan->expert[g], r0 = j->plan->start[g], m = j->plan->start[g + 1] - r0;
  const REAL *dy = (const REAL *)j->g + r0 * j->n + n0;
  if (j->gw)
    R(tn)
    (n1 - n0, j->k, m, dy, j->n, (const REAL *)j->x + r0 * j->k, j->k, false,
     (REAL *)j->gw + (e * j->n + n0) * j->k, j->k);
  if (j->gb) R(sum_rows)((REAL *)j->gb + e * j->n + n0, dy, NULL, m, n1 - n0, j->n);
}
