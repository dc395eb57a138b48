/* The backward of linear recurrences for one element type: chunks from the last to the first, each from its kept first state,
** with what recurrence_real.h computes for it done again.
**
** With G the logarithm of the decay from the chunk's start, a read x of row i depends on x_i exp(G_i) and a write y of row
** j on y_j exp(-G_j), so the gradient by G_i is x_i dx_i - y_i dy_i (summed over the columns where a decay has but one),
** and by the G of the last row also the products of the last state and its gradient. Those sums run backwards over the
** chunk: the gradient by decay_t is that of all G_i, i >= t.
*/

/* Through the pairs of rows i0 .. of one block. */
static void R(pair_block_back)(const R(chunk) *c, const REAL *dm, const REAL *x, const REAL *y, REAL *dx, REAL *dy, int64_t i0,
                               int64_t rows, bool exclusive, bool own) {
  int64_t n = c->n, dk = c->dk;
  REAL *restrict p = c->t;
  for (int64_t i = i0; i < i0 + rows; i++) {
    const REAL *mi = dm + i * n, *restrict xi = x + i * dk, *restrict ai = c->a + i * dk;
    REAL *restrict dxi = dx + i * dk;
    if (own) {
      const REAL *restrict yi = y + i * dk, g = mi[i];
      REAL *restrict dyi = dy + i * dk;
      for (int64_t e = 0; e < dk; e++) dxi[e] += g * yi[e], dyi[e] += g * xi[e];
    }
    for (int64_t e = 0; e < dk; e++) p[e] = exclusive ? 1 : ai[e];
    for (int64_t j = i; j-- > i0;) {
      const REAL *restrict yj = y + j * dk, *restrict aj = c->a + j * dk, g = mi[j];
      REAL *restrict dyj = dy + j * dk;
      for (int64_t e = 0; e < dk; e++) {
        REAL by = g * p[e];
        dxi[e] += by * yj[e];
        dyj[e] += by * xi[e];
        p[e] = R(flush)(p[e] * aj[e]);
      }
    }
  }
}

static void R(pair_wide_back)(const R(chunk) *c, REAL *dm, const REAL *x, const REAL *y, REAL *dx, REAL *dy,
                              bool exclusive, bool own) {
  int64_t n = c->n, dk = c->dk;
  for (int64_t i0 = 0; i0 < n; i0 += c->block) {
    int64_t rows = MOE_MIN(c->block, n - i0), before = c->mild ? i0 + rows : i0; /* columns done by products */
    REAL *di = dm + i0 * n;
    R(cut_block)(dm, n, i0, rows, own);
    if (before > 0) {
      R(times)(c->y, y, c->toward, i0, dk, dk, false);
      if (c->mild) R(times)(c->y + i0 * dk, y + i0 * dk, c->inverse + i0 * dk, rows, dk, dk, false);
      GEMM(false, false, rows, dk, before, 1, di, n, c->y, dk, 0, c->t, dk);
      if (exclusive) {
        for (int64_t e = 0; e < dk; e++) dx[i0 * dk + e] += c->t[e];
        R(times)(dx + (i0 + 1) * dk, c->t + dk, c->within + i0 * dk, rows - 1, dk, dk, true);
      } else {
        R(times)(dx + i0 * dk, c->t, c->within + i0 * dk, rows, dk, dk, true);
      }
      R(from_start)(c, x, i0, rows, exclusive);
      GEMM(true, false, before, dk, rows, 1, di, n, c->x, dk, 0, c->t, dk);
      R(times)(dy, c->t, c->toward, i0, dk, dk, true);
      if (c->mild) R(times)(dy + i0 * dk, c->t + i0 * dk, c->inverse + i0 * dk, rows, dk, dk, true);
    }
    if (!c->mild) R(pair_block_back)(c, dm, x, y, dx, dy, i0, rows, exclusive, own);
    if (i0 + rows < n) R(next_block)(c, i0, rows);
  }
}

/* dx, dy += the gradients through M(x, y), of which dm [n, n] is the gradient (overwritten). */
static void R(pair_back)(const R(chunk) *c, REAL *dm, const REAL *x, const REAL *y, REAL *dx, REAL *dy, bool exclusive, bool own) {
  int64_t n = c->n, dk = c->dk;
  if (c->l == NULL) {
    R(pair_wide_back)(c, dm, x, y, dx, dy, exclusive, own);
    return;
  }
  R(mask)(c, dm, exclusive, own);
  R(lower_times)(dx, dk, dm, y, dk, n, dk);
  R(upper_times)(dy, dk, dm, x, dk, n, dk);
}

/* Through what y wrote with the values z and q read: dy and dz are set, dq added to. g [n, dv] with row stride ldg. */
static void R(write_back)(R(chunk) *c, const moe_recurrence *f, const REAL *y, const REAL *z, REAL *dy, REAL *dz, const REAL *g,
                          int64_t ldg, const REAL *ds, bool bonus) {
  int64_t n = c->n, dk = c->dk, dv = c->dv, w = c->w;
  bool exclusive = Q_EXCLUSIVE(f);
  R(times)(c->y, y, c->suf, n, dk, w, false);
  GEMM(false, false, n, dv, dk, 1, c->y, dk, ds, dv, 0, dz, dv);
  GEMM(false, true, n, dk, dv, 1, z, dv, ds, dv, 0, c->t, dk);
  R(times)(dy, c->t, c->suf, n, dk, w, false);
  R(pair)(c, c->m, c->q, y, exclusive, !exclusive);
  if (bonus) R(bonus_diagonal)(c, c->m);
  R(upper_times)(dz, dv, c->m, g, ldg, n, dv);
  R(lower)(c->m2, g, ldg, z, dv, n, dv);
  R(pair_back)(c, c->m2, c->q, y, c->dq, dy, exclusive, !exclusive);
}

/* decay [n, w] <- the gradient by the decays; its row n holds that of the last state. */
static void R(decay_back)(R(chunk) *c, const moe_recurrence *f) {
  int64_t n = c->n, dk = c->dk, w = c->w;
  bool q_before = Q_EXCLUSIVE(f), r_before = R_EXCLUSIVE(f);
  for (int64_t i = n; i-- > 0;) {
    REAL *restrict to = c->decay + i * w, *restrict t = c->t;
    const REAL *restrict q = c->q + i * dk, *restrict dq = c->dq + i * dk, *restrict k = c->k + i * dk, *restrict dki = c->dk_ + i * dk;
    for (int64_t e = 0; e < dk; e++) t[e] = -k[e] * dki[e];
    if (!q_before)
      for (int64_t e = 0; e < dk; e++) t[e] += q[e] * dq[e];
    else if (i + 1 < n)
      for (int64_t e = 0; e < dk; e++) t[e] += q[dk + e] * dq[dk + e];
    if (c->r) {
      int64_t at = (r_before ? i + 1 : i) * dk;
      if (at < n * dk)
        for (int64_t e = 0; e < dk; e++) t[e] += c->r[at + e] * c->dr[at + e];
      if (!f->delta)
        for (int64_t e = 0; e < dk; e++) t[e] -= c->p[i * dk + e] * c->dp[i * dk + e];
    }
    if (w == 1) {
      REAL sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < dk; e++) sum += t[e];
      to[0] = to[1] + sum;
    } else {
      for (int64_t e = 0; e < dk; e++) to[e] = to[dk + e] + t[e];
    }
  }
}

/* One chunk. first, last: the states before and behind it; ds: the gradient of the last, then of the first. */
static void R(chunk_backward)(R(chunk) *c, const moe_recurrence *f, const REAL *first, const REAL *last, REAL *ds, const REAL *g,
                              int64_t ldg, bool want_decay) {
  int64_t n = c->n, dk = c->dk, dv = c->dv, w = c->w;
  bool exclusive = Q_EXCLUSIVE(f), r_exclusive = R_EXCLUSIVE(f);
  if (want_decay) {
    REAL *end = c->decay + n * w, sum = 0;
    for (int64_t i = 0; i < dk; i++) {
      REAL by = R(dot)(ds + i * dv, last + i * dv, dv);
      sum += by;
      if (w > 1) end[i] = by;
    }
    if (w == 1) end[0] = sum;
  }
  if (c->r) R(written)(c, f, first);
  const REAL *pre_q = c->pre + (exclusive ? 0 : w), *pre_r = c->pre + (r_exclusive ? 0 : w);
  GEMM(false, true, n, dk, dv, 1, g, ldg, first, dv, 0, c->t, dk);
  R(times)(c->dq, c->t, pre_q, n, dk, w, false);
  if (!f->delta) R(write_back)(c, f, c->k, c->v, c->dk_, c->dval, g, ldg, ds, f->bonus != NULL);
  if (c->r) R(write_back)(c, f, c->p, c->u, c->dp, c->du, g, ldg, ds, false);
  R(decay_state)(ds, c->pre + n * w, dk, dv, w);
  R(times)(c->x, c->q, pre_q, n, dk, w, false);
  GEMM(true, false, dk, dv, n, 1, c->x, dk, g, ldg, 1, ds, dv);
  if (c->r) {
    R(solve_back)(c->solve, c->du, n, dv);
    GEMM(false, true, n, dk, dv, 1, c->du, dv, first, dv, 0, c->t, dk);
    R(times)(c->dr, c->t, pre_r, n, dk, w, false);
    R(lower)(c->m2, c->du, dv, c->u, dv, n, dv);
    R(pair_back)(c, c->m2, c->r, c->p, c->dr, c->dp, r_exclusive, false);
    R(times)(c->x, c->r, pre_r, n, dk, w, false);
    GEMM(true, false, dk, dv, n, 1, c->x, dk, c->du, dv, 1, ds, dv);
    if (!f->delta) {
      R(lower)(c->m2, c->du, dv, c->v, dv, n, dv);
      R(pair_back)(c, c->m2, c->r, c->k, c->dr, c->dk_, r_exclusive, false);
      R(upper_times)(c->dval, dv, c->known, c->du, dv, n, dv);
    }
  }
  if (want_decay) R(decay_back)(c, f);
}

/* The gradients of the bonus term, which reads no state: after the decays'. */
static void R(bonus_back)(R(chunk) *c, const REAL *g, int64_t ldg) {
  int64_t dk = c->dk;
  for (int64_t i = 0; i < c->n; i++) {
    const REAL *restrict q = c->q + i * dk, *restrict k = c->k + i * dk, *restrict u = c->bonus;
    REAL *restrict dq = c->dq + i * dk, *restrict dk_ = c->dk_ + i * dk, *restrict du = c->dbonus;
    REAL by = R(dot)(g + i * ldg, c->v + i * c->dv, c->dv);
    for (int64_t e = 0; e < dk; e++) {
      dq[e] += by * u[e] * k[e];
      dk_[e] += by * u[e] * q[e];
      du[e] += by * q[e] * k[e];
    }
  }
}

static void R(put_rows)(void *to, const REAL *from, int64_t row, int64_t h, int64_t H, int64_t n, int64_t d, REAL by) {
  if (to == NULL) return;
  for (int64_t i = 0; i < n; i++) {
    REAL *restrict p = (REAL *)to + ((row + i) * H + h) * d;
    const REAL *restrict x = from + i * d;
    for (int64_t e = 0; e < d; e++) p[e] = x[e] * by;
  }
}

/* The chunk's gradients to where they belong. */
static void R(store)(R(chunk) *c, const recurrence_job *j, int64_t b, int64_t t, int64_t h) {
  const moe_recurrence *f = j->f;
  const moe_recurrence_grad *to = j->grad;
  int64_t n = c->n, dk = c->dk, dv = c->dv, H = f->heads, row = b * f->time + t;
  R(put_rows)(to->decay, c->decay, row, h, H, n, c->w, 1);
  if (f->beta.data) {
    for (int64_t i = 0; i < n; i++) { /* delta: k also reads, as r = -beta k */
      const REAL *k = c->k + i * dk;
      REAL *restrict dki = c->dk_ + i * dk, by = R(dot)(c->dval + i * dv, R(row)(&f->v, b, t + i, h), dv);
      if (f->delta) {
        const REAL *restrict dr = c->dr + i * dk;
        by -= R(dot)(k, dr, dk);
        for (int64_t e = 0; e < dk; e++) dki[e] -= c->beta[i] * dr[e];
      }
      if (to->beta) ((REAL *)to->beta)[(row + i) * H + h] = by;
      for (int64_t e = 0; e < dv; e++) c->dval[i * dv + e] *= c->beta[i];
    }
  } else if (f->delta) {
    for (int64_t i = 0; i < n * dk; i++) c->dk_[i] -= c->dr[i];
  }
  R(put_rows)(to->q, c->dq, row, h, H, n, dk, (REAL)f->scale);
  R(put_rows)(to->k, c->dk_, row, h, H, n, dk, 1);
  R(put_rows)(to->v, c->dval, row, h, H, n, dv, 1);
  R(put_rows)(to->a, c->dr, row, h, H, n, dk, 1);
  R(put_rows)(to->b, c->dp, row, h, H, n, dk, 1);
}

static void R(backward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  recurrence_job *j = arg;
  const moe_recurrence *f = j->f;
  int64_t H = f->heads, matrix = f->dk * f->dv;
  for (int64_t task = begin; task < end; task++) {
    int64_t seq = task / H, h = task % H, b, t0, time;
    R(where)(f, seq, &b, &t0, &time);
    REAL *ds = (REAL *)j->grad->state + task * matrix;
    R(chunk) c;
    if (!R(chunk_layout)(&c, f, MOE_MIN(f->chunk, MOE_MAX(time, 1)), true)) {
      atomic_store(&j->short_of_memory, true);
      return;
    }
    for (int64_t e = 0; f->bonus && e < f->dk; e++) c.dbonus[e] = 0;
    for (int64_t i = time / f->chunk + (time % f->chunk != 0); i-- > 0;) {
      int64_t t = i * f->chunk, n = MOE_MIN(f->chunk, time - t), row = b * f->time + t0 + t;
      const REAL *first = (const REAL *)j->kept + ((f->first[seq] + i) * H + h) * matrix;
      const REAL *g = (const REAL *)j->go + (row * H + h) * f->dv;
      R(load)(&c, f, b, t0 + t, h, n);
      R(chunk_backward)(&c, f, first, first + H * matrix, ds, g, H * f->dv, j->grad->decay != NULL);
      if (f->bonus) R(bonus_back)(&c, g, H * f->dv);
      R(store)(&c, j, b, t0 + t, h);
    }
    if (j->grad->bonus) memcpy((REAL *)j->grad->bonus + task * f->dk, c.dbonus, (size_t)f->dk * sizeof(REAL));
  }
}
