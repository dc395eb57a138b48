/* Rotary embedding for one element type: rope.c includes this with REAL = float and double. */

/* Rows [begin, end) of the table: cosines, then sines, `half` of each. */
static void STATIC(table_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const rope_job *j = arg;
  const double *step_cos = j->turn + j->half, *step_sin = step_cos + j->half;
  double c[ROPE_LANES], s[ROPE_LANES];
  for (int64_t i0 = 0; i0 < j->half; i0 += ROPE_LANES) {
    int64_t n = MOE_MIN(ROPE_LANES, j->half - i0);
    for (int64_t p = begin; p < end; p++) {
      REAL *restrict row = (REAL *)j->table + p * 2 * j->half + i0, *restrict row_sin = row + j->half;
      if (j->positions || p == begin || sizeof(REAL) == sizeof(double)) {
        double at = j->positions ? j->positions[p] : (double)j->offset + (double)p;
        for (int64_t i = 0; i < n; i++) {
          double angle = at * j->turn[i0 + i];
          c[i] = cos(angle);
          s[i] = sin(angle);
        }
      } else { /* one turn on from the position before: its error, a few 1e-16 a step over a task's rows, is far below f32 */
        for (int64_t i = 0; i < n; i++) {
          double ci = c[i] * step_cos[i0 + i] - s[i] * step_sin[i0 + i];
          s[i] = s[i] * step_cos[i0 + i] + c[i] * step_sin[i0 + i];
          c[i] = ci;
        }
      }
      for (int64_t i = 0; i < n; i++) {
        row[i] = (REAL)(j->grow * c[i]);
        row_sin[i] = (REAL)(j->grow * s[i]);
      }
    }
  }
}

static void STATIC(rows_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const rope_job *j = arg;
  int64_t half = j->half;
  REAL sign = j->inverse ? -1 : 1;
  for (int64_t r = begin; r < end; r++) {
    int64_t t = r % j->t, h = r / j->t % j->h, b = r / j->t / j->h;
    const REAL *restrict x = (const REAL *)j->x + b * j->sx[0] + h * j->sx[1] + t * j->sx[2];
    REAL *restrict y = (REAL *)j->y + b * j->sy[0] + h * j->sy[1] + t * j->sy[2];
    const REAL *restrict c = (const REAL *)j->table + (b * j->sp[0] + h * j->sp[1] + t * j->sp[2]) * 2 * half, *restrict s = c + half;
    if (j->interleaved)
      for (int64_t i = 0; i < half; i++) {
        REAL x0 = x[2 * i], x1 = x[2 * i + 1], si = sign * s[i];
        y[2 * i] = x0 * c[i] - x1 * si;
        y[2 * i + 1] = x1 * c[i] + x0 * si;
      }
    else
      for (int64_t i = 0; i < half; i++) {
        REAL x0 = x[i], x1 = x[i + half], si = sign * s[i];
        y[i] = x0 * c[i] - x1 * si;
        y[i + half] = x1 * c[i] + x0 * si;
      }
    for (int64_t i = 2 * half; i < j->d; i++) y[i] = x[i];
  }
}
