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
** The arrays of a chunk are in recurrence_chunk_real.h, its products in recurrence_pair_real.h.
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
