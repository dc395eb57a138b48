/* The selective scan for one element type; selective.c includes this once with REAL = float, once with double.
**
** A lane is a channel: the states of W channels of one group are advanced together, h [states, W], so that nothing is
** summed across lanes but the gradients of B and C, once a group. The backward goes from chunk to chunk, last to first: the states
** within a chunk are made again from the one that the forward kept at its beginning.
*/
enum { R(W) = 64 / (int)sizeof(REAL) }; /* channels advanced together: a cache line */

#define LANES for (int64_t l = 0; l < R(W); l++)

/* Up to W numbers of a row; the lanes beyond `w` hold zeros. */
static inline void R(get)(REAL *restrict to, const REAL *from, int64_t w) {
  if (w == R(W))
    memcpy(to, from, R(W) * sizeof(REAL));
  else
    LANES to[l] = l < w ? from[l] : 0;
}
static inline void R(put)(REAL *to, const REAL *from, int64_t w) {
  if (w == R(W))
    memcpy(to, from, R(W) * sizeof(REAL));
  else
    for (int64_t l = 0; l < w; l++) to[l] = from[l];
}

/* [w channels, n] <-> [n, W] */
static void R(turn)(REAL *restrict to, const REAL *from, int64_t n, int64_t w) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t l = 0; l < R(W); l++) to[i * R(W) + l] = from && l < w ? from[l * n + i] : 0;
}
static void R(turn_back)(REAL *restrict to, const REAL *from, int64_t n, int64_t w) {
  for (int64_t l = 0; l < w; l++)
    for (int64_t i = 0; i < n; i++) to[l * n + i] = from[i * R(W) + l];
}

/* The time step of W channels: dt, and its derivative by delta in slope where that is not NULL. */
static inline void R(step)(REAL *restrict dt, REAL *restrict slope, const moe_selective *s, int64_t at, int64_t c0,
                           int64_t w) {
  REAL x[R(W)], bias[R(W)];
  R(get)(x, (const REAL *)s->delta + at, w);
  if (s->bias) {
    R(get)(bias, (const REAL *)s->bias + c0, w);
    LANES x[l] += bias[l];
  }
  if (s->softplus) {
    LANES dt[l] = VM1(softplus)(x[l]);
    if (slope) LANES slope[l] = VM1(sigmoid)(x[l]);
  } else {
    LANES dt[l] = x[l];
    if (slope) LANES slope[l] = 1;
  }
  if (w < R(W))
    for (int64_t l = w; l < R(W); l++) dt[l] = 0;
}

/* h <- exp(dt A) h + dt u B, and y = <C, h>. Where `made` is not NULL, exp(dt A) [n, W] goes there. */
static inline __attribute__((always_inline)) void R(advance)(REAL *restrict h, REAL *restrict y, REAL *restrict made,
                                                             const REAL *restrict a, const REAL *restrict dt,
                                                             const REAL *restrict x, const REAL *restrict b,
                                                             const REAL *restrict c, const int64_t n) {
  REAL sum[R(W)];
  LANES sum[l] = 0;
  for (int64_t i = 0; i < n; i++) {
    REAL bi = b[i], ci = c[i];
    REAL *restrict hi = h + i * R(W);
    const REAL *restrict ai = a + i * R(W);
#pragma omp simd
    LANES {
      REAL e = VM1(exp)(dt[l] * ai[l]), v = e * hi[l] + x[l] * bi;
      if (made) made[i * R(W) + l] = e;
      hi[l] = v;
      sum[l] += v * ci;
    }
  }
  memcpy(y, sum, sizeof sum);
}

/* The forward over W channels of one sequence. */
static inline __attribute__((always_inline)) void R(forward)(const scan_job *j, int64_t seq, int64_t g, int64_t c0,
                                                             int64_t w, const int64_t n, REAL *restrict room) {
  const moe_selective *s = j->s;
  int64_t D = s->channels, t0 = s->start[seq], t1 = s->start[seq + 1];
  REAL *restrict h = room, *restrict a = room + n * R(W);
  REAL dt[R(W)], u[R(W)], x[R(W)], y[R(W)], d[R(W)] = {0}, z[R(W)];
  R(turn)(a, (const REAL *)s->a + c0 * n, n, w);
  R(turn)(h, s->state ? (const REAL *)s->state + (seq * D + c0) * n : NULL, n, w);
  if (s->d) R(get)(d, (const REAL *)s->d + c0, w);
  for (int64_t t = t0; t < t1; t++) {
    int64_t at = t * D + c0;
    if (j->kept && (t - t0) % MOE_SCAN_CHUNK == 0)
      memcpy((REAL *)j->kept + ((s->chunk[seq] + (t - t0) / MOE_SCAN_CHUNK) * j->width + j->column(s, g, c0)) * n, h,
             (size_t)(n * R(W)) * sizeof *h);
    R(step)(dt, NULL, s, at, c0, w);
    R(get)(u, (const REAL *)s->u + at, w);
    LANES x[l] = dt[l] * u[l];
    R(advance)(h, y, NULL, a, dt, x, (const REAL *)s->b + (t * s->groups + g) * n,
               (const REAL *)s->c + (t * s->groups + g) * n, n);
    LANES y[l] += d[l] * u[l];
    if (s->z) {
      R(get)(z, (const REAL *)s->z + at, w);
      LANES y[l] *= z[l] * VM1(sigmoid)(z[l]);
    }
    R(put)((REAL *)j->y + at, y, w);
  }
  R(turn_back)((REAL *)j->last + (seq * D + c0) * n, h, n, w);
}

/* Chunk [t0, t1) of one sequence backward, for W channels. gh [n, W] is the gradient of the state after the chunk,
** and becomes that of the state before it. ga [n, W], gd, gbias [W] and pb, pc [chunk, n, W] are added to. */
static inline __attribute__((always_inline)) void R(backward)(const scan_job *j, int64_t g, int64_t t0, int64_t t1,
                                                              int64_t c0, int64_t w, const int64_t n,
                                                              const REAL *kept, const REAL *restrict a,
                                                              REAL *restrict gh, REAL *restrict ga,
                                                              REAL *restrict gd, REAL *restrict gbias,
                                                              REAL *restrict pb, REAL *restrict pc,
                                                              REAL *restrict hs, REAL *restrict es) {
  const moe_selective *s = j->s;
  const moe_selective_grads *q = j->q;
  int64_t D = s->channels, step = n * R(W);
  REAL dts[MOE_SCAN_CHUNK][R(W)], slopes[MOE_SCAN_CHUNK][R(W)], ys[MOE_SCAN_CHUNK][R(W)];
  REAL u[R(W)], x[R(W)], d[R(W)] = {0};
  if (s->d) R(get)(d, (const REAL *)s->d + c0, w);
  memcpy(hs, kept, (size_t)step * sizeof *hs);
  for (int64_t t = t0, i = 0; t < t1; t++, i++) { /* hs [chunk + 1, n, W]: the states before and within the chunk */
    int64_t at = t * D + c0;
    R(step)(dts[i], slopes[i], s, at, c0, w);
    R(get)(u, (const REAL *)s->u + at, w);
    LANES x[l] = dts[i][l] * u[l];
    memcpy(hs + (i + 1) * step, hs + i * step, (size_t)step * sizeof *hs);
    R(advance)(hs + (i + 1) * step, ys[i], es + i * step, a, dts[i], x, (const REAL *)s->b + (t * s->groups + g) * n,
               (const REAL *)s->c + (t * s->groups + g) * n, n);
  }
  for (int64_t t = t1 - 1, i = t1 - t0 - 1; i >= 0; t--, i--) {
    int64_t at = t * D + c0;
    REAL gy[R(W)], gx[R(W)], gdt[R(W)];
    R(get)(gy, (const REAL *)q->gy + at, w);
    R(get)(u, (const REAL *)s->u + at, w);
    if (s->z) {
      REAL z[R(W)], gz[R(W)];
      R(get)(z, (const REAL *)s->z + at, w);
      LANES {
        REAL sig = VM1(sigmoid)(z[l]), y = ys[i][l] + d[l] * u[l];
        gz[l] = gy[l] * y * sig * (1 + z[l] * (1 - sig));
        gy[l] *= z[l] * sig;
      }
      if (q->z) R(put)((REAL *)q->z + at, gz, w);
    }
    const REAL *restrict b = (const REAL *)s->b + (t * s->groups + g) * n;
    const REAL *restrict c = (const REAL *)s->c + (t * s->groups + g) * n;
    REAL *restrict dt = dts[i];
    LANES {
      gx[l] = gdt[l] = 0;
      x[l] = dt[l] * u[l];
    }
    for (int64_t k = 0; k < n; k++) {
      const REAL *restrict h0 = hs + i * step + k * R(W), *restrict h1 = h0 + step, *restrict e = es + i * step + k * R(W);
      const REAL *restrict ak = a + k * R(W);
      REAL *restrict ghk = gh + k * R(W), *restrict gak = ga + k * R(W);
      REAL *restrict pbk = pb + i * step + k * R(W), *restrict pck = pc + i * step + k * R(W);
      REAL bk = b[k], ck = c[k];
#pragma omp simd
      LANES {
        REAL v = ghk[l] + ck * gy[l], ve = v * e[l], vh = ve * h0[l];
        pck[l] += gy[l] * h1[l];
        pbk[l] += v * x[l];
        gx[l] += v * bk;
        gdt[l] += vh * ak[l];
        gak[l] += vh * dt[l];
        ghk[l] = ve;
      }
    }
    LANES {
      gdt[l] = (gdt[l] + gx[l] * u[l]) * slopes[i][l];
      gbias[l] += gdt[l];
      gd[l] += gy[l] * u[l];
      gx[l] = gx[l] * dt[l] + d[l] * gy[l];
    }
    R(put)((REAL *)q->u + at, gx, w);
    R(put)((REAL *)q->delta + at, gdt, w);
  }
}

/* --- tasks: a sequence and a part of a group's channels --- */

static void R(forward_task)(void *arg, int64_t i, int worker) {
  (void)worker;
  scan_job *j = arg;
  const moe_selective *s = j->s;
  scan_part p = part_of(s, i, R(W));
  REAL *room = moe_scratch(SCRATCH, 2 * s->states * R(W) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&j->failed, 1);
    return;
  }
  for (int64_t c0 = p.c0; c0 < p.c1; c0 += R(W)) {
    int64_t w = MOE_MIN(R(W), p.c1 - c0);
    if (s->states == 16)
      R(forward)(j, p.seq, p.group, c0, w, 16, room);
    else
      R(forward)(j, p.seq, p.group, c0, w, s->states, room);
  }
}

static void R(backward_task)(void *arg, int64_t i, int worker) {
  (void)worker;
  scan_job *j = arg;
  const moe_selective *s = j->s;
  const moe_selective_grads *q = j->q;
  scan_part p = part_of(s, i, R(W));
  int64_t n = s->states, step = n * R(W), blocks = (p.c1 - p.c0 + R(W) - 1) / R(W), D = s->channels;
  int64_t each = 3 * step + 2 * R(W); /* a, gh, ga, gd, gbias of a block */
  REAL *room = moe_scratch(SCRATCH, (blocks * each + (4 * MOE_SCAN_CHUNK + 1) * step) * (int64_t)sizeof(REAL));
  if (room == NULL) {
    atomic_store(&j->failed, 1);
    return;
  }
  REAL *pb = room + blocks * each, *pc = pb + MOE_SCAN_CHUNK * step, *es = pc + MOE_SCAN_CHUNK * step,
       *hs = es + MOE_SCAN_CHUNK * step;
  for (int64_t k = 0; k < blocks; k++) {
    int64_t c0 = p.c0 + k * R(W), w = MOE_MIN(R(W), p.c1 - c0);
    REAL *at = room + k * each;
    R(turn)(at, (const REAL *)s->a + c0 * n, n, w);
    R(turn)(at + step, q->glast ? (const REAL *)q->glast + (p.seq * D + c0) * n : NULL, n, w);
    memset(at + 2 * step, 0, (size_t)(step + 2 * R(W)) * sizeof *at);
  }
  int64_t t0 = s->start[p.seq], t1 = s->start[p.seq + 1];
  for (int64_t chunk = (t1 - t0 + MOE_SCAN_CHUNK - 1) / MOE_SCAN_CHUNK - 1; chunk >= 0; chunk--) {
    int64_t from = t0 + chunk * MOE_SCAN_CHUNK, to = MOE_MIN(t1, from + MOE_SCAN_CHUNK);
    memset(pb, 0, (size_t)(2 * MOE_SCAN_CHUNK * step) * sizeof *pb);
    for (int64_t k = 0; k < blocks; k++) {
      int64_t c0 = p.c0 + k * R(W), w = MOE_MIN(R(W), p.c1 - c0);
      REAL *a = room + k * each, *gh = a + step, *ga = gh + step, *gd = ga + step, *gbias = gd + R(W);
      const REAL *kept = (const REAL *)j->kept + ((s->chunk[p.seq] + chunk) * j->width + j->column(s, p.group, c0)) * n;
      if (n == 16)
        R(backward)(j, p.group, from, to, c0, w, 16, kept, a, gh, ga, gd, gbias, pb, pc, hs, es);
      else
        R(backward)(j, p.group, from, to, c0, w, n, kept, a, gh, ga, gd, gbias, pb, pc, hs, es);
    }
    for (int64_t t = from; t < to; t++) { /* sums over the part's channels, of which there may be several parts */
      REAL *gb = (REAL *)j->gb + ((p.index * s->rows + t) * s->groups + p.group) * n;
      REAL *gc = (REAL *)j->gc + ((p.index * s->rows + t) * s->groups + p.group) * n;
      for (int64_t k = 0; k < n; k++) {
        const REAL *bl = pb + (t - from) * step + k * R(W), *cl = pc + (t - from) * step + k * R(W);
        REAL sb = 0, sc = 0;
#pragma omp simd reduction(+ : sb, sc)
        LANES {
          sb += bl[l];
          sc += cl[l];
        }
        gb[k] = sb;
        gc[k] = sc;
      }
    }
  }
  for (int64_t k = 0; k < blocks; k++) {
    int64_t c0 = p.c0 + k * R(W), w = MOE_MIN(R(W), p.c1 - c0);
    REAL *gh = room + k * each + step, *ga = gh + step, *gd = ga + step;
    if (q->state) R(turn_back)((REAL *)q->state + (p.seq * D + c0) * n, gh, n, w);
    R(turn_back)((REAL *)j->ga + (p.seq * D + c0) * n, ga, n, w);
    R(put)((REAL *)j->gd + p.seq * D + c0, gd, w);
    R(put)((REAL *)j->gbias + p.seq * D + c0, gd + R(W), w);
  }
}

/* to [n] <- the sum of `parts` lists [n] that lie one after the other */
static void R(add_parts)(REAL *restrict to, const REAL *restrict from, int64_t parts, int64_t n) {
  if (to == NULL) return;
  for (int64_t i = 0; i < n; i++) to[i] = 0;
  for (int64_t p = 0; p < parts; p++)
    for (int64_t i = 0; i < n; i++) to[i] += from[p * n + i];
}
#undef LANES
