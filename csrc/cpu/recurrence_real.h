/* Linear recurrences for one element type; recurrence.c includes this once with REAL = float, once with double. R(x) is
** x with the type's name behind it.
**
** A chunk of n rows is done with matrix products. Let D(j, i) be the product of the decays of rows j + 1 .. i. With S the
** state before the chunk, a read x of row i (inclusive: after the row's own decay; exclusive: before it) sees
**   S under the decay from the chunk's start, and what rows j <= i (or j < i) wrote, under D(j, i) (or D(j, i - 1)):
**   M_ij = sum over c of x_ic y_jc D(j, i)_c.
** The outputs are (q D) S + M(q, k) V, the state behind the chunk is D S + (k D)^T V. Where the state is read to be
** written (the delta rule, low-rank decays) the values U written by p are the solution of the triangular system
**   U = (r D) S + (what is known) + M(r, p) U.
** Sources: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635; "Parallelizing
** Linear Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484; Dao and Gu, arXiv 2405.21060.
**
** All decays D here are running products of exp(decay) over the rows between, never a quotient or a difference of cumulative
** sums: none overflows while decays are at most 1, a decay of 0 is exact, and products below TINY are 0, so that no
** subnormal number slows the loops. With one decay a head they are a matrix [n, n] (l). With a decay a column, rows are
** taken in blocks: D(j, i) for j in an earlier block is D(j, start of i's block) D(start, i), one factor for each side of
** a matrix product. Within a block it is D(start, i) / D(start, j), again one for each side, as long as no product in the
** block falls below MILD: the blocks of a chunk are as large as that allows. Where decays are so strong that BLOCK rows
** are too many, pairs of rows within a block are done one by one.
*/

/* The running chunk, all in scratch. w: columns of a decay, dk or 1. */
typedef struct R(chunk) {
  int64_t n, room, dk, dv, w;
  REAL *q, *k, *v;   /* [n, dk], [n, dk], [n, dv]: q scaled, v times beta */
  REAL *r, *p, *u;   /* [n, dk], [n, dk], [n, dv]; r NULL where the state is not read; delta: p is k and u lies over v */
  REAL *beta;        /* [n] */
  REAL *a;           /* [n, w] exp(decay) */
  REAL *pre;         /* [n + 1, w] from the start of the chunk through row i - 1 */
  REAL *suf;         /* [n, w] from behind row i to the end of the chunk */
  int64_t block;     /* wide: rows of a block */
  bool mild;         /* wide: quotients serve within a block */
  REAL *within;      /* wide: [n, dk] from the start of the block through row i */
  REAL *inverse;     /* wide, mild: 1 / within */
  REAL *rest;        /* wide: [n, dk] from behind row i to the end of its block */
  REAL *toward;      /* wide: [n, dk] from behind row j to the start of the running block */
  REAL *l;           /* one decay a head: [n, n] l_ij = D(j, i) for j <= i */
  REAL *x, *y;       /* [n, dk] products of rows and decays */
  REAL *m, *m2;      /* [n, n] */
  REAL *solve;       /* [n, n] M(r, p) */
  REAL *known;       /* [n, n] M(r, k) of low-rank decays */
  REAL *state;       /* [dk, dv] */
  /* backward */
  REAL *dq, *dk_, *dr, *dp, *t; /* [n, dk] */
  REAL *du, *dval;              /* [n, dv] */
  REAL *decay;                  /* [n + 1, w] */
  REAL *bonus, *dbonus;         /* [dk] */
} R(chunk);

/* Whether q reads the state before its own row is written. */
#define Q_EXCLUSIVE(f) ((f)->bonus != NULL)
#define R_EXCLUSIVE(f) (!(f)->delta)

static inline REAL R(flush)(REAL x) { return x < TINY ? 0 : x; } /* of a decay, at least 0; NaN stays */

static inline REAL R(dot)(const REAL *restrict a, const REAL *restrict b, int64_t n) {
  REAL s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t c = 0; c < n; c++) s += a[c] * b[c];
  return s;
}

/* Lays the chunk's arrays out in the worker's scratch; false without memory. */
static bool R(chunk_layout)(R(chunk) *c, const moe_recurrence *f, int64_t room, bool backward) {
  int64_t dk = f->dk, dv = f->dv, w = f->wide ? dk : 1;
  bool reads = f->delta || f->a.data != NULL;
  *c = (R(chunk)){.room = room, .dk = dk, .dv = dv, .w = w};
  REAL *base = NULL;
  for (int pass = 0; pass < 2; pass++) { /* counts, then hands out */
    int64_t at = 0;
#define TAKE(field, size, when)                                            \
  do {                                                                     \
    if (base && (when)) c->field = base + at;                              \
    if (when) at += ((size) + 15) / 16 * 16;                               \
  } while (0)
    TAKE(q, room * dk, true);
    TAKE(k, room * dk, true);
    TAKE(v, room * dv, true);
    TAKE(r, room * dk, reads);
    TAKE(p, room * dk, reads && !f->delta);
    TAKE(u, room * dv, reads && !f->delta);
    TAKE(beta, room, true);
    TAKE(a, room * w, true);
    TAKE(pre, (room + 1) * w, true);
    TAKE(suf, room * w, true);
    TAKE(within, room * dk, f->wide);
    TAKE(inverse, room * dk, f->wide);
    TAKE(rest, room * dk, f->wide);
    TAKE(toward, room * dk, f->wide);
    TAKE(l, room * room, !f->wide);
    TAKE(x, room * dk, true);
    TAKE(y, room * dk, true);
    TAKE(m, room * room, true);
    TAKE(m2, room * room, backward);
    TAKE(solve, room * room, reads);
    TAKE(known, room * room, reads && !f->delta);
    TAKE(state, dk * dv, backward);
    TAKE(dq, room * dk, backward);
    TAKE(dk_, room * dk, backward);
    TAKE(dr, room * dk, backward && reads);
    TAKE(dp, room * dk, backward && reads && !f->delta);
    TAKE(t, MOE_MAX(room, 1) * dk, true);
    TAKE(du, room * dv, backward && reads && !f->delta);
    TAKE(dval, room * dv, backward);
    TAKE(decay, (room + 1) * w, backward);
    TAKE(bonus, dk, f->bonus != NULL);
    TAKE(dbonus, dk, backward && f->bonus != NULL);
#undef TAKE
    if (base == NULL && (base = moe_scratch(SCRATCH, (at + 16) * (int64_t)sizeof(REAL))) == NULL) return false;
  }
  if (f->delta) {
    c->p = c->k;
    c->u = c->v;
    c->dp = c->dk_;
    c->du = c->dval;
  }
  return true;
}

/* --- rows in --- */

static inline const REAL *R(row)(const moe_row_list *l, int64_t b, int64_t t, int64_t h) {
  return (const REAL *)l->data + b * l->stride[0] + t * l->stride[1] + h * l->stride[2];
}

static void R(copy_rows)(REAL *restrict to, const moe_row_list *l, int64_t b, int64_t t, int64_t h, int64_t n, int64_t d, REAL by) {
  for (int64_t i = 0; i < n; i++) {
    const REAL *restrict p = R(row)(l, b, t + i, h);
    for (int64_t c = 0; c < d; c++) to[i * d + c] = p[c] * by;
  }
}

/* Lays blocks of that many rows; whether all products within them are mild. */
static bool R(blocks)(R(chunk) *c, int64_t block) {
  int64_t n = c->n, w = c->w, strong = 0;
  c->block = block;
  for (int64_t i0 = 0; i0 < n; i0 += block)
    for (int64_t i = i0; i < MOE_MIN(i0 + block, n); i++) {
      REAL *restrict to = c->within + i * w;
      const REAL *restrict from = i == i0 ? NULL : to - w, *restrict a = c->a + i * w;
      for (int64_t e = 0; e < w; e++) to[e] = from ? R(flush)(from[e] * a[e]) : a[e];
      for (int64_t e = 0; e < w; e++) strong += !(to[e] >= MILD && to[e] <= 1 / MILD); /* NaN is not mild */
    }
  return strong == 0;
}

/* The decays of the chunk's rows and all their running products. */
static void R(load_decays)(R(chunk) *c, const moe_recurrence *f, int64_t b, int64_t t, int64_t h) {
  int64_t n = c->n, w = c->w;
  if (f->decay.data == NULL) {
    for (int64_t i = 0; i < n * w; i++) c->a[i] = 1;
  } else {
    int64_t step = f->decay.stride[3];
    for (int64_t i = 0; i < n; i++) {
      const REAL *p = R(row)(&f->decay, b, t + i, h);
      REAL *restrict a = c->a + i * w;
      for (int64_t e = 0; e < w; e++) a[e] = p[e * step];
    }
    for (int64_t i = 0; i < n * w; i++) c->a[i] = R(flush)(EXP(c->a[i]));
  }
  for (int64_t e = 0; e < w; e++) c->pre[e] = c->suf[(n - 1) * w + e] = 1;
  for (int64_t i = 0; i < n; i++)
    for (int64_t e = 0; e < w; e++) c->pre[(i + 1) * w + e] = R(flush)(c->pre[i * w + e] * c->a[i * w + e]);
  for (int64_t i = n - 1; i-- > 0;)
    for (int64_t e = 0; e < w; e++) c->suf[i * w + e] = R(flush)(c->suf[(i + 1) * w + e] * c->a[(i + 1) * w + e]);
  if (!f->wide) {
    for (int64_t i = 0; i < n; i++) {
      REAL *restrict to = c->l + i * n, by = c->a[i];
      const REAL *restrict from = i > 0 ? to - n : to;
      for (int64_t j = 0; j < i; j++) to[j] = R(flush)(from[j] * by);
      to[i] = 1;
    }
    return;
  }
  c->mild = R(blocks)(c, n) || R(blocks)(c, 2 * BLOCK) || R(blocks)(c, BLOCK);
  if (c->mild)
    for (int64_t i = 0; i < n * w; i++) c->inverse[i] = 1 / c->within[i];
  for (int64_t i0 = 0; i0 < n; i0 += c->block) {
    int64_t end = MOE_MIN(i0 + c->block, n);
    for (int64_t i = end; i-- > i0;)
      for (int64_t e = 0; e < w; e++)
        c->rest[i * w + e] = i == end - 1 ? 1 : R(flush)(c->rest[(i + 1) * w + e] * c->a[(i + 1) * w + e]);
  }
}

static void R(load)(R(chunk) *c, const moe_recurrence *f, int64_t b, int64_t t, int64_t h, int64_t n) {
  int64_t shared = h / f->group, dk = f->dk, dv = f->dv;
  c->n = n;
  R(copy_rows)(c->q, &f->q, b, t, shared, n, dk, (REAL)f->scale);
  R(copy_rows)(c->k, &f->k, b, t, shared, n, dk, 1);
  for (int64_t i = 0; i < n; i++) {
    REAL by = c->beta[i] = f->beta.data ? *R(row)(&f->beta, b, t + i, h) : 1;
    const REAL *restrict v = R(row)(&f->v, b, t + i, h);
    for (int64_t e = 0; e < dv; e++) c->v[i * dv + e] = v[e] * by;
    if (!f->delta) continue;
    for (int64_t e = 0; e < dk; e++) c->r[i * dk + e] = -by * c->k[i * dk + e];
  }
  if (f->a.data) {
    R(copy_rows)(c->r, &f->a, b, t, shared, n, dk, 1);
    R(copy_rows)(c->p, &f->b, b, t, shared, n, dk, 1);
  }
  R(load_decays)(c, f, b, t, h);
  if (f->bonus) memcpy(c->bonus, (const REAL *)f->bonus + h * dk, (size_t)dk * sizeof(REAL));
}

/* --- products --- */

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

/* --- a chunk forward --- */

/* m's diagonal <- q . (u k): the bonus of the running row */
static void R(bonus_diagonal)(const R(chunk) *c, REAL *m) {
  int64_t n = c->n, dk = c->dk;
  for (int64_t i = 0; i < n; i++) {
    const REAL *restrict q = c->q + i * dk, *restrict k = c->k + i * dk, *restrict u = c->bonus;
    REAL s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t e = 0; e < dk; e++) s += q[e] * u[e] * k[e];
    m[i * n + i] = s;
  }
}

/* u: what is written by p; M(r, p) and M(r, k) stay for the backward. s: the state before the chunk. */
static void R(written)(R(chunk) *c, const moe_recurrence *f, const REAL *s) {
  int64_t n = c->n, dk = c->dk, dv = c->dv;
  bool exclusive = R_EXCLUSIVE(f);
  if (!f->delta) {
    for (int64_t i = 0; i < n * dv; i++) c->u[i] = 0;
    R(pair)(c, c->known, c->r, c->k, exclusive, false);
    R(lower_times)(c->u, dv, c->known, c->v, dv, n, dv);
  }
  R(times)(c->x, c->r, c->pre + (exclusive ? 0 : c->w), n, dk, c->w, false);
  GEMM(false, false, n, dv, dk, 1, c->x, dk, s, dv, 1, c->u, dv);
  R(pair)(c, c->solve, c->r, c->p, exclusive, false);
  R(solve)(c->solve, c->u, n, dv);
}

/* o [n, dv] of row stride ldo; s: the state before the chunk, then the one behind it */
static void R(chunk_forward)(R(chunk) *c, const moe_recurrence *f, REAL *s, REAL *o, int64_t ldo) {
  int64_t n = c->n, dk = c->dk, dv = c->dv, w = c->w;
  bool exclusive = Q_EXCLUSIVE(f);
  if (c->r) R(written)(c, f, s);
  R(times)(c->x, c->q, c->pre + (exclusive ? 0 : w), n, dk, w, false);
  GEMM(false, false, n, dv, dk, 1, c->x, dk, s, dv, 0, o, ldo);
  R(decay_state)(s, c->pre + n * w, dk, dv, w);
  if (!f->delta) {
    R(pair)(c, c->m, c->q, c->k, exclusive, !exclusive);
    if (exclusive) R(bonus_diagonal)(c, c->m);
    R(lower_times)(o, ldo, c->m, c->v, dv, n, dv);
    R(times)(c->y, c->k, c->suf, n, dk, w, false);
    GEMM(true, false, dk, dv, n, 1, c->y, dk, c->v, dv, 1, s, dv);
  }
  if (c->r) {
    R(pair)(c, c->m, c->q, c->p, exclusive, !exclusive);
    R(lower_times)(o, ldo, c->m, c->u, dv, n, dv);
    R(times)(c->y, c->p, c->suf, n, dk, w, false);
    GEMM(true, false, dk, dv, n, 1, c->y, dk, c->u, dv, 1, s, dv);
  }
}

/* The same, row by row: the recurrence as it is written. */
static void R(steps_forward)(R(chunk) *c, const moe_recurrence *f, REAL *s, REAL *o, int64_t ldo) {
  int64_t n = c->n, dk = c->dk, dv = c->dv, w = c->w;
  bool before = Q_EXCLUSIVE(f);
  for (int64_t i = 0; i < n; i++) {
    const REAL *q = c->q + i * dk, *k = c->k + i * dk, *a = c->a + i * w;
    REAL *restrict v = c->v + i * dv, *restrict oi = o + i * ldo;
    if (c->r) {
      const REAL *r = c->r + i * dk;
      REAL *restrict u = c->u + i * dv;
      if (!f->delta)
        for (int64_t e = 0; e < dv; e++) u[e] = 0;
      for (int64_t j = 0; j < dk; j++) {
        const REAL *restrict sj = s + j * dv, by = f->delta ? r[j] * a[w == 1 ? 0 : j] : r[j];
        for (int64_t e = 0; e < dv; e++) u[e] += by * sj[e];
      }
    }
    for (int64_t e = 0; e < dv; e++) oi[e] = 0;
    for (int64_t j = 0; j < dk; j++) {
      REAL *restrict sj = s + j * dv;
      REAL by = a[w == 1 ? 0 : j], kj = k[j], qj = q[j];
      if (before)
        for (int64_t e = 0; e < dv; e++) oi[e] += qj * sj[e];
      for (int64_t e = 0; e < dv; e++) sj[e] = sj[e] * by + kj * v[e]; /* delta: v is what is written */
      if (c->r && !f->delta) {
        const REAL *restrict u = c->u + i * dv, pj = c->p[i * dk + j];
        for (int64_t e = 0; e < dv; e++) sj[e] += pj * u[e];
      }
      if (!before)
        for (int64_t e = 0; e < dv; e++) oi[e] += qj * sj[e];
    }
    if (!before) continue;
    REAL own = 0;
    for (int64_t e = 0; e < dk; e++) own += q[e] * c->bonus[e] * k[e];
    for (int64_t e = 0; e < dv; e++) oi[e] += own * v[e];
  }
}

/* --- tasks: one head of one sequence --- */

static inline void R(where)(const moe_recurrence *f, int64_t s, int64_t *b, int64_t *t, int64_t *time) {
  *b = f->start ? 0 : s;
  *t = f->start ? f->start[s] : 0;
  *time = f->start ? f->start[s + 1] - *t : f->time;
}

static void R(forward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  recurrence_job *j = arg;
  const moe_recurrence *f = j->f;
  int64_t H = f->heads, matrix = f->dk * f->dv;
  for (int64_t task = begin; task < end; task++) {
    int64_t seq = task / H, h = task % H, b, t0, time;
    R(where)(f, seq, &b, &t0, &time);
    REAL *s = (REAL *)j->last + task * matrix;
    REAL *kept = j->states ? (REAL *)j->states + (f->first[seq] * H + h) * matrix : NULL;
    size_t bytes = (size_t)matrix * sizeof(REAL);
    R(chunk) c;
    if (!R(chunk_layout)(&c, f, MOE_MIN(f->chunk, MOE_MAX(time, 1)), false)) {
      atomic_store(&j->short_of_memory, true);
      return;
    }
    if (j->initial && matrix > 0)
      memcpy(s, (const REAL *)j->initial + task * matrix, bytes);
    else
      for (int64_t e = 0; e < matrix; e++) s[e] = 0;
    for (int64_t t = 0; t < time; t += f->chunk) {
      int64_t n = MOE_MIN(f->chunk, time - t), row = b * f->time + t0 + t;
      REAL *o = (REAL *)j->o + (row * H + h) * f->dv;
      if (kept && matrix > 0) memcpy(kept, s, bytes);
      R(load)(&c, f, b, t0 + t, h, n);
      (n <= STEPS ? R(steps_forward) : R(chunk_forward))(&c, f, s, o, H * f->dv);
      if (kept) kept += H * matrix;
    }
    if (kept && matrix > 0) memcpy(kept, s, bytes);
  }
}
