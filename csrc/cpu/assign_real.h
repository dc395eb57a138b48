/* Sinkhorn's iteration for one element type; assign.c includes this once with REAL = float, once with double. */

/* The shares of the experts in a block of rows: sums of softmax(logits + price). */
static void R(shares)(void *arg, int64_t block, int worker) {
  (void)worker;
  sinkhorn_job *j = arg;
  int64_t E = j->experts, last = MOE_MIN(j->tokens, (block + 1) * BLOCK);
  double *restrict share = j->share + block * E;
  REAL *restrict p = moe_scratch(SCRATCH, E * (int64_t)sizeof(REAL));
  if (p == NULL) {
    atomic_store(&j->failed, 1);
    return;
  }
  const REAL *restrict price = j->price;
  for (int64_t e = 0; e < E; e++) share[e] = 0;
  for (int64_t t = block * BLOCK; t < last; t++) {
    const REAL *restrict x = (const REAL *)j->logits + t * E;
    if (j->mask && !j->mask[t]) continue;
    REAL top = x[0] + price[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t e = 0; e < E; e++) {
      REAL v = x[e] + price[e];
      top = v > top ? v : top;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < E; e++) {
      p[e] = VM1(exp)(x[e] + price[e] - top);
      sum += p[e];
    }
    double scale = 1 / (double)sum;
    for (int64_t e = 0; e < E; e++) share[e] += (double)p[e] * scale;
  }
}

static moe_status R(sinkhorn)(REAL *price, const REAL *logits, const uint8_t *mask, int64_t tokens, int64_t experts,
                              int64_t iterations, double tolerance) {
  int64_t n = 0, E = experts, blocks = (tokens + BLOCK - 1) / BLOCK;
  for (int64_t e = 0; e < E; e++) price[e] = 0;
  for (int64_t t = 0; t < tokens; t++) {
    if (mask && !mask[t]) continue;
    n++;
    REAL odd = 0; /* 0 when all are finite */
    const REAL *x = logits + t * E;
#pragma omp simd reduction(+ : odd)
    for (int64_t e = 0; e < E; e++) odd += x[e] - x[e];
    for (int64_t e = 0; odd != 0 && e < E; e++)
      if (x[e] - x[e] != 0)
        return moe_fail(MOE_EINVAL, "sinkhorn_price: the logit of token %lld for expert %lld is %s", (long long)t + 1,
                        (long long)e + 1, x[e] == x[e] ? "infinite" : "NaN");
  }
  if (n == 0) return MOE_OK;
  double *share = malloc((size_t)((blocks + 1) * E) * sizeof *share), *g = share ? share + blocks * E : NULL;
  if (share == NULL) return moe_fail(MOE_ENOMEM, "out of memory for Sinkhorn's iteration");
  sinkhorn_job j = {.logits = logits, .mask = mask, .tokens = tokens, .experts = E, .price = price, .share = share};
  double target = (double)n / (double)E, off = tolerance + 1;
  for (int64_t e = 0; e < E; e++) g[e] = 0;
  for (int64_t i = 0; i < iterations && off > tolerance && !j.failed; i++) {
    moe_parallel(blocks, R(shares), &j);
    double mean = 0;
    off = 0;
    for (int64_t e = 0; e < E; e++) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; b++) sum += share[b * E + e];
      off = fmax(off, fabs(sum / target - 1));
      g[e] += log(target / fmax(sum, 1e-30)); /* an expert that nobody wants: a long step, and then others */
      mean += g[e] / (double)E;
    }
    for (int64_t e = 0; e < E; e++) g[e] -= mean;
    for (int64_t e = 0; e < E; e++) price[e] = (REAL)g[e];
  }
  free(share);
  return j.failed ? moe_fail(MOE_ENOMEM, "out of memory for Sinkhorn's iteration") : MOE_OK;
}
