/* Attention for one element type: attention.c includes this with REAL = float and double. */

static inline void STATIC(clear)(REAL *p, int64_t n) { /* memset may not see the NULL of an empty tensor */
  for (int64_t c = 0; c < n; c++) p[c] = 0;
}

/* Keys that query i of a head sees, of s; the most that any of `rows` queries from q0 sees. `limit` [t] is the head's. */
static inline int64_t STATIC(seen)(const STATIC(job) *j, const int64_t *limit, int64_t i) {
  int64_t n = j->causal ? j->s - j->t + i + 1 : j->s;
  if (limit != NULL && limit[i] < n) n = limit[i];
  return n < 0 ? 0 : n > j->s ? j->s : n;
}

static inline int64_t STATIC(most)(const STATIC(job) *j, const int64_t *limit, int64_t q0, int64_t rows) {
  if (limit == NULL) return STATIC(seen)(j, NULL, q0 + rows - 1);
  int64_t n = 0;
  for (int64_t i = 0; i < rows; i++) n = MOE_MAX(n, STATIC(seen)(j, limit, q0 + i));
  return n;
}

static inline const int64_t *STATIC(limits)(const STATIC(job) *j, int64_t b, int64_t h) {
  return j->limit ? j->limit + (b * j->h + h) * j->t : NULL;
}

static inline const REAL *STATIC(head)(const REAL *p, const int64_t *stride, int64_t b, int64_t h) {
  return p + b * stride[0] + h * stride[1];
}

/* Scores [rows, n] (row stride KEYS) of queries q0.. and keys k0..; what may not be attended is -infinity. */
static void STATIC(scores)(const STATIC(job) *j, REAL *p, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t k0, int64_t n) {
  const int64_t *limit = STATIC(limits)(j, b, h);
  const REAL *q = STATIC(head)(j->q, j->sq, b, h) + q0 * j->sq[2];
  const REAL *k = STATIC(head)(j->k, j->sk, b, h / j->group) + k0 * j->sk[2];
  GEMM(false, true, rows, n, j->d, j->scale, q, j->sq[2], k, j->sk[2], 0, p, KEYS);
  for (int64_t i = 0; i < rows && j->mask_kind != 0; i++) {
    REAL *restrict s = p + i * KEYS;
    int64_t at = b * j->sm[0] + h * j->sm[1] + (q0 + i) * j->sm[2] + k0 * j->sm[3], step = j->sm[3];
    if (j->mask_kind == 1) {
      const uint8_t *restrict m = (const uint8_t *)j->mask + at;
      for (int64_t c = 0; c < n; c++) s[c] = m[c * step] ? s[c] : (REAL)-INFINITY;
    } else {
      const REAL *restrict m = (const REAL *)j->mask + at;
      for (int64_t c = 0; c < n; c++) s[c] += m[c * step];
    }
  }
  for (int64_t i = 0; i < rows && (j->causal || limit); i++) {
    int64_t from = STATIC(seen)(j, limit, q0 + i) - k0;
    for (int64_t c = from < 0 ? 0 : from; c < n; c++) p[i * KEYS + c] = (REAL)-INFINITY;
  }
}

static inline REAL STATIC(row_max)(const REAL *s, int64_t n, REAL m) {
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; c++) m = s[c] > m ? s[c] : m;
  return m;
}

/* s <- exp(s - m); the sum */
static inline REAL STATIC(row_exp)(REAL *s, int64_t n, REAL m) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; c++) {
    REAL e = EXP(s[c] - m);
    s[c] = e;
    sum += e;
  }
  return sum;
}

/* One block of queries of one head. Over the key blocks the softmax is kept as a running maximum, a running sum
** and an output still to be divided by it (Milakov and Gimelshein, "Online normalizer calculation for softmax",
** 2018; Dao et al., "FlashAttention", 2022). */
static void STATIC(forward)(STATIC(job) *j, int64_t b, int64_t h, int64_t q0) {
  REAL *p = moe_scratch(0, (QUERIES * KEYS + 2 * QUERIES) * (int64_t)sizeof(REAL));
  if (p == NULL) {
    atomic_store(&j->short_of_memory, true);
    return;
  }
  REAL *max = p + QUERIES * KEYS, *sum = max + QUERIES;
  int64_t rows = MOE_MIN(QUERIES, j->t - q0), end = STATIC(most)(j, STATIC(limits)(j, b, h), q0, rows);
  const REAL *v = STATIC(head)(j->v, j->sv, b, h / j->group);
  REAL *y = j->y + b * j->sy[0] + h * j->sy[1] + q0 * j->sy[2];
  for (int64_t i = 0; i < rows; i++) max[i] = (REAL)-INFINITY, sum[i] = 0;
  if (end == 0)
    for (int64_t i = 0; i < rows; i++) STATIC(clear)(y + i * j->sy[2], j->dv);
  for (int64_t k0 = 0; k0 < end; k0 += KEYS) {
    int64_t n = MOE_MIN(KEYS, end - k0);
    STATIC(scores)(j, p, b, h, q0, rows, k0, n);
    for (int64_t i = 0; i < rows; i++) {
      REAL *s = p + i * KEYS, m = STATIC(row_max)(s, n, max[i]);
      REAL base = m == (REAL)-INFINITY ? 0 : m; /* nothing seen yet: every exponential is 0 */
      REAL again = EXP(max[i] - base);
      sum[i] = sum[i] * again + STATIC(row_exp)(s, n, base);
      max[i] = m;
      if (k0 > 0) {
        REAL *restrict yi = y + i * j->sy[2];
        for (int64_t c = 0; c < j->dv; c++) yi[c] *= again;
      }
    }
    GEMM(false, false, rows, j->dv, n, 1, p, KEYS, v + k0 * j->sv[2], j->sv[2], k0 > 0, y, j->sy[2]);
  }
  for (int64_t i = 0; i < rows; i++) {
    REAL *restrict yi = y + i * j->sy[2], by = sum[i] == 0 ? 0 : 1 / sum[i];
    for (int64_t c = 0; c < j->dv; c++) yi[c] *= by;
    /* A row that sees nothing: +infinity makes every weight of the backward 0. */
    if (j->lse) j->lse[(b * j->h + h) * j->t + q0 + i] = sum[i] == 0 ? (REAL)INFINITY : max[i] + LOG(sum[i]);
  }
}

/* All gradients of one key-value head, over the query heads that share it: nobody else writes them. With
** P = exp(S - lse), dP = dO V^T, dS = P (dP - sum_c dO O):  dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q. */
static void STATIC(backward)(STATIC(job) *j, int64_t b, int64_t hk) {
  REAL *p = moe_scratch(0, 2 * QUERIES * KEYS * (int64_t)sizeof(REAL)), *dp = p + QUERIES * KEYS;
  if (p == NULL) {
    atomic_store(&j->short_of_memory, true);
    return;
  }
  const REAL *k = STATIC(head)(j->k, j->sk, b, hk), *v = STATIC(head)(j->v, j->sv, b, hk);
  REAL *dk = j->dk + b * j->sdk[0] + hk * j->sdk[1], *dv = j->dvalue + b * j->sdv[0] + hk * j->sdv[1];
  for (int64_t i = 0; i < j->s; i++) {
    STATIC(clear)(dk + i * j->sdk[2], j->d);
    STATIC(clear)(dv + i * j->sdv[2], j->dv);
  }
  for (int64_t h = hk * j->group; h < (hk + 1) * j->group; h++) {
    const REAL *q = STATIC(head)(j->q, j->sq, b, h), *y = STATIC(head)(j->y, j->sy, b, h);
    const REAL *g = STATIC(head)(j->g, j->sg, b, h), *lse = j->lse + (b * j->h + h) * j->t;
    REAL *dq = j->dq + b * j->sdq[0] + h * j->sdq[1];
    const int64_t *limit = STATIC(limits)(j, b, h);
    for (int64_t q0 = 0; q0 < j->t; q0 += QUERIES) {
      int64_t rows = MOE_MIN(QUERIES, j->t - q0), end = STATIC(most)(j, limit, q0, rows);
      REAL delta[QUERIES];
      for (int64_t i = 0; i < rows; i++) {
        const REAL *gi = g + (q0 + i) * j->sg[2], *yi = y + (q0 + i) * j->sy[2];
        REAL sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < j->dv; c++) sum += gi[c] * yi[c];
        delta[i] = sum;
        if (end == 0) STATIC(clear)(dq + (q0 + i) * j->sdq[2], j->d);
      }
      const REAL *gq = g + q0 * j->sg[2];
      for (int64_t k0 = 0; k0 < end; k0 += KEYS) {
        int64_t n = MOE_MIN(KEYS, end - k0);
        STATIC(scores)(j, p, b, h, q0, rows, k0, n);
        for (int64_t i = 0; i < rows; i++) STATIC(row_exp)(p + i * KEYS, n, lse[q0 + i]);
        GEMM(true, false, n, j->dv, rows, 1, p, KEYS, gq, j->sg[2], 1, dv + k0 * j->sdv[2], j->sdv[2]);
        GEMM(false, true, rows, n, j->dv, 1, gq, j->sg[2], v + k0 * j->sv[2], j->sv[2], 0, dp, KEYS);
        for (int64_t i = 0; i < rows; i++) {
          REAL *restrict pi = p + i * KEYS, *restrict di = dp + i * KEYS, de = delta[i];
          for (int64_t c = 0; c < n; c++) pi[c] *= di[c] - de;
          if (j->dmask) memcpy(j->dmask + ((b * j->h + h) * j->t + q0 + i) * j->s + k0, pi, (size_t)n * sizeof *pi);
        }
        GEMM(false, false, rows, j->d, n, j->scale, p, KEYS, k + k0 * j->sk[2], j->sk[2], k0 > 0, dq + q0 * j->sdq[2], j->sdq[2]);
        GEMM(true, false, n, j->d, rows, j->scale, p, KEYS, q + q0 * j->sq[2], j->sq[2], 1, dk + k0 * j->sdk[2], j->sdk[2]);
      }
    }
  }
}

static void STATIC(forward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  STATIC(job) *j = arg;
  int64_t blocks = (j->t + QUERIES - 1) / QUERIES;
  for (int64_t i = begin; i < end; i++) {
    int64_t at = i / blocks;
    /* The last block sees the most keys under a causal mask: it goes first. */
    STATIC(forward)(j, at / j->h, at % j->h, (blocks - 1 - i % blocks) * QUERIES);
  }
}

static void STATIC(backward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  STATIC(job) *j = arg;
  int64_t heads = j->h / j->group;
  for (int64_t i = begin; i < end; i++) STATIC(backward)(j, i / heads, i % heads);
}
