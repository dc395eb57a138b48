/* The running chunk of a linear recurrence for one element type: its arrays in scratch, its rows and the products of their decays.
** See recurrence_real.h for what they mean.
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
