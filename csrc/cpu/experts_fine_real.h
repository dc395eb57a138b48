/* Narrow experts in large number, for one element type; included by experts.c after experts_real.h.
**
** With 64 experts a token, the rows that pass between tokens and experts are 64 times the tokens: no list of rows is
** made here. A task is a tile of tokens that stays in cache; every expert in turn reads its tokens where they lie and
** adds its result to theirs. The order of a token's sum is that of the experts. The gradients of weights are a second pass,
** expert by expert, over the hidden gradients.
*/

/* The transpose of every listed expert's w_out [d_out, I]: job->w_t [groups, I, d_out]. */
static void R(fine_transpose)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const ffn_job *job = arg;
  const moe_ffn *f = job->f;
  int64_t I = f->hidden, n = f->d_out;
  for (int64_t g = begin; g < end; g++) {
    const REAL *restrict w = (const REAL *)f->w_out + f->plan.expert[g] * n * I;
    REAL *restrict t = (REAL *)job->w_t + g * I * n;
    for (int64_t o = 0; o < n; o++)
      for (int64_t i = 0; i < I; i++) t[i * n + o] = w[o * I + i];
  }
}

/* Rows of group g whose tokens lie in [t0, t1). */
static inline int64_t R(first_row)(const moe_plan *p, int64_t g, int64_t token) {
  int64_t low = p->start[g], high = p->start[g + 1];
  while (low < high) {
    int64_t mid = low + (high - low) / 2;
    if (p->token[mid] < token)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

static inline REAL R(weight_of)(const moe_ffn *f, int64_t row) {
  return f->weight ? ((const REAL *)f->weight)[f->plan.source[row]] : 1;
}

/* Tokens [t0, t1), at most FINE_TOKENS. */
static void R(fine_fwd)(ffn_job *job, int64_t t0, int64_t t1) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t I = f->hidden, F = f->gated ? 2 * I : I, din = f->d_in, dout = f->d_out;
  REAL *room = moe_scratch(SCRATCH, FINE_TOKENS * (I + F) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  REAL *a = room, *y = job->y, *yp[FINE_TOKENS];
  const REAL *xp[FINE_TOKENS], *wp[FINE_HIDDEN];
  memset(y + t0 * dout, 0, (size_t)((t1 - t0) * dout) * sizeof *y);
  for (int64_t g = 0; g < p->groups; g++) {
    int64_t r0 = R(first_row)(p, g, t0), m = R(first_row)(p, g, t1) - r0, e = p->expert[g];
    if (m == 0) continue;
    REAL *h = job->h ? (REAL *)job->h + r0 * F : room + FINE_TOKENS * I;
    for (int64_t r = 0; r < m; r++) {
      xp[r] = (const REAL *)f->x + p->token[r0 + r] * din;
      yp[r] = y + p->token[r0 + r] * dout;
    }
    for (int64_t i = 0; i < I; i++) wp[i] = (const REAL *)job->w_t + (g * I + i) * dout;
    if (f->b_in) R(fill_rows)(h, (const REAL *)f->b_in + e * F, m, F);
    R(dots_nt)(m, F, din, xp, (const REAL *)f->w_in + e * F * din, f->b_in != NULL, h, F);
    for (int64_t r = 0; r < m; r++) {
      REAL w = R(weight_of)(f, r0 + r);
      R(acts)[f->act].fwd(a + r * I, h + r * F, I, f->gated);
      for (int64_t i = 0; i < I; i++) a[r * I + i] *= w;
      if (f->b_out) {
        const REAL *restrict b = (const REAL *)f->b_out + e * dout;
        for (int64_t o = 0; o < dout; o++) yp[r][o] += w * b[o];
      }
    }
    R(mix)(m, I, dout, yp, wp, a, I, 1, true);
  }
}

/* Hidden gradients into job->dh [rows, F] and job->wa [rows, I]; the gradients of x and of the rows' weights. */
static void R(fine_bwd)(ffn_job *job, int64_t t0, int64_t t1) {
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t I = f->hidden, F = f->gated ? 2 * I : I, din = f->d_in, dout = f->d_out;
  REAL *da = moe_scratch(SCRATCH, FINE_TOKENS * I * (int64_t)sizeof(REAL)), *gx = job->gx, *gp[FINE_TOKENS];
  if (da == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  const REAL *dyp[FINE_TOKENS], *wp[2 * FINE_HIDDEN];
  if (gx) memset(gx + t0 * din, 0, (size_t)((t1 - t0) * din) * sizeof *gx);
  for (int64_t g = 0; g < p->groups; g++) {
    int64_t r0 = R(first_row)(p, g, t0), m = R(first_row)(p, g, t1) - r0, e = p->expert[g];
    if (m == 0) continue;
    const REAL *h = (const REAL *)job->hidden + r0 * F, *b_out = f->b_out ? (const REAL *)f->b_out + e * dout : NULL;
    REAL *dh = (REAL *)job->dh + r0 * F, *wa = (REAL *)job->wa + r0 * I;
    for (int64_t r = 0; r < m; r++) {
      dyp[r] = (const REAL *)job->gy + p->token[r0 + r] * dout;
      if (gx) gp[r] = gx + p->token[r0 + r] * din;
    }
    R(dots_nt)(m, I, dout, dyp, (const REAL *)job->w_t + g * I * dout, false, da, I);
    for (int64_t r = 0; r < m; r++) {
      REAL s = R(acts)[f->act].bwd(dh + r * F, wa + r * I, da + r * I, h + r * F, I, f->gated, R(weight_of)(f, r0 + r));
      if (job->gweight)
        ((REAL *)job->gweight)[p->source[r0 + r]] = b_out ? s + R(dot)(dyp[r], b_out, dout) : s;
    }
    if (!gx) continue;
    for (int64_t i = 0; i < F; i++) wp[i] = (const REAL *)f->w_in + (e * F + i) * din;
    R(mix)(m, F, din, gp, wp, dh, F, 1, true);
  }
}

/* The gradients of the weights of groups [begin, end). */
static void R(fine_weights)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  ffn_job *job = arg;
  const moe_ffn *f = job->f;
  const moe_plan *p = &f->plan;
  int64_t I = f->hidden, F = f->gated ? 2 * I : I, din = f->d_in, dout = f->d_out;
  REAL *t = moe_scratch(SCRATCH, I * dout * (int64_t)sizeof(REAL)), *row[2 * FINE_HIDDEN];
  if (t == NULL) {
    atomic_store(&job->failed, 1);
    return;
  }
  const REAL *xp[FINE_TOKENS];
  for (int64_t g = begin; g < end; g++) {
    int64_t e = p->expert[g];
    REAL *gw_in = job->gw_in ? (REAL *)job->gw_in + e * F * din : NULL;
    REAL *gw_out = job->gw_out ? (REAL *)job->gw_out + e * dout * I : NULL;
    for (int64_t r0 = p->start[g]; r0 < p->start[g + 1]; r0 += FINE_TOKENS) {
      int64_t m = MOE_MIN(FINE_TOKENS, p->start[g + 1] - r0);
      bool add = r0 > p->start[g];
      const REAL *dh = (const REAL *)job->dh + r0 * F, *wa = (const REAL *)job->wa + r0 * I;
      for (int64_t r = 0; gw_in && r < m; r++) xp[r] = (const REAL *)f->x + p->token[r0 + r] * din;
      for (int64_t i = 0; gw_in && i < F; i++) row[i] = gw_in + i * din;
      if (gw_in) R(mix)(F, m, din, row, xp, dh, 1, F, add);
      for (int64_t r = 0; gw_out && r < m; r++) xp[r] = (const REAL *)job->gy + p->token[r0 + r] * dout;
      for (int64_t i = 0; gw_out && i < I; i++) row[i] = t + i * dout;
      if (gw_out) R(mix)(I, m, dout, row, xp, wa, 1, I, add);
    }
    for (int64_t o = 0; gw_out && o < dout; o++)
      for (int64_t i = 0; i < I; i++) gw_out[o * I + i] = t[i * dout + o];
    int64_t r0 = p->start[g], n = p->start[g + 1] - r0;
    if (job->gb_in) R(sum_rows)((REAL *)job->gb_in + e * F, (const REAL *)job->dh + r0 * F, NULL, n, F, F);
    if (job->gb_out) {
      REAL *restrict gb = (REAL *)job->gb_out + e * dout;
      for (int64_t o = 0; o < dout; o++) gb[o] = 0;
      for (int64_t r = r0; r < r0 + n; r++) {
        const REAL *restrict dy = (const REAL *)job->gy + p->token[r] * dout;
        REAL w = R(weight_of)(f, r);
        for (int64_t o = 0; o < dout; o++) gb[o] += w * dy[o];
      }
    }
  }
}
