/* Attention for one element type: attention.c includes this with REAL = float and double. */
#include "cpu/tile_real.h"

/* A block of scores: queries q0 .. of one head with keys k0 ... Row i has the columns [from[i], to[i]) of KEYS, a tile of
** ROWS rows the columns [low, high); what lies outside of a row but in whole vectors of its tile is 0 as a weight. */
typedef struct R(block) {
  int64_t b, h, q0, rows, k0, n, tiles;
  int64_t from[QUERIES], to[QUERIES], low[QUERIES / R(ROWS)], high[QUERIES / R(ROWS)];
} R(block);

static inline const REAL *R(head)(const void *p, const int64_t *stride, int64_t b, int64_t h) {
  return (const REAL *)p + b * stride[0] + h * stride[1];
}

/* Narrows the keys [*from, *to) of a block that a query sees to those between the first and the last that a mask allows:
** where blocks of a mask are false nothing is computed. */
static void R(narrow)(const R(block) * k, const moe_attention *a, int64_t i, int64_t *from, int64_t *to) {
  int64_t step = a->sm[3], at = k->b * a->sm[0] + k->h * a->sm[1] + (k->q0 + i) * a->sm[2] + k->k0 * step;
  const uint8_t *m = (const uint8_t *)a->mask + at;
  while (*from < *to && !m[*from * step]) ++*from;
  while (*from < *to && !m[(*to - 1) * step]) --*to;
}

/* Whether any query of the block sees any of its keys. */
static bool R(start)(R(block) * k, const moe_attention *a, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t k0, int64_t n) {
  const int64_t *seen = seen_of(a, b, h);
  k->b = b, k->h = h, k->q0 = q0, k->rows = rows, k->k0 = k0, k->n = n, k->tiles = (rows + R(ROWS) - 1) / R(ROWS);
  bool any = false;
  for (int64_t r = 0; r < k->tiles; r++) {
    int64_t low = n, high = 0;
    for (int64_t i = r * R(ROWS); i < (r + 1) * R(ROWS); i++) {
      int64_t from = 0, to = 0;
      if (i < rows) keys_of(a, seen, q0 + i, &from, &to);
      from = MOE_MAX(from - k0, 0), to = MOE_MIN(to - k0, n);
      if (from < to && a->mask_kind == MOE_MASK_MAY_ATTEND) R(narrow)(k, a, i, &from, &to);
      if (from >= to) from = to = 0;
      else low = MOE_MIN(low, from), high = MOE_MAX(high, to);
      k->from[i] = from, k->to[i] = to;
    }
    k->low[r] = MOE_MIN(low, high), k->high[r] = high;
    any = any || low < high;
  }
  return any;
}

static inline int64_t R(down)(int64_t column) { return column / R(VL) * R(VL); }

/* p [QUERIES, KEYS] <- rows of x (stride ldx) with panels of width `inner`, in the whole vectors that the tiles want. */
static void R(products)(const R(block) * k, REAL *p, const REAL *x, int64_t ldx, const REAL *panels, int64_t inner) {
  for (int64_t at = 0; at < k->n; at += R(WIDE), panels += inner * R(WIDE))
    for (int64_t r = 0; r < k->tiles; r++) {
      REAL *y = p + r * R(ROWS) * KEYS + at;
      const REAL *a = x + r * R(ROWS) * ldx;
      bool left = k->low[r] < at + R(VL) && k->high[r] > at, right = k->low[r] < at + R(WIDE) && k->high[r] > at + R(VL);
      if (left && right)
        R(tile)(R(ROWS), 2, inner, y, KEYS, a, ldx, 1, panels, R(WIDE), false);
      else if (left)
        R(tile)(R(ROWS), 1, inner, y, KEYS, a, ldx, 1, panels, R(WIDE), false);
      else if (right)
        R(tile)(R(ROWS), 1, inner, y + R(VL), KEYS, a, ldx, 1, panels + R(VL), R(WIDE), false);
    }
}

/* Adds the masks; columns of [begin, end) that the row does not see are -infinity. */
static void R(mask_row)(const R(block) * k, const moe_attention *a, int64_t i, REAL *restrict p, int64_t begin, int64_t end) {
  int64_t from = k->from[i], to = k->to[i], query = k->q0 + i;
  bool some = from < to; /* rows beyond the last query have none */
  if (some && a->mask_kind != MOE_MASK_NONE) {
    int64_t step = a->sm[3], at = k->b * a->sm[0] + k->h * a->sm[1] + query * a->sm[2] + k->k0 * step;
    if (a->mask_kind == MOE_MASK_MAY_ATTEND) {
      const uint8_t *restrict m = (const uint8_t *)a->mask + at;
      for (int64_t c = from; c < to; c++) p[c] = m[c * step] ? p[c] : (REAL)-INFINITY;
    } else {
      const REAL *restrict m = (const REAL *)a->mask + at;
      for (int64_t c = from; c < to; c++) p[c] += m[c * step];
    }
  }
  if (some && a->relative) {
    const REAL *restrict w = (const REAL *)a->relative + k->h * a->srelative;
    int64_t zero = a->reach - 1 + k->k0 - a->span[query].at, last = 2 * a->reach - 2; /* column c: entry zero + c */
    int64_t low = MOE_MIN(MOE_MAX(from, -zero), to), high = MOE_MAX(MOE_MIN(to, last + 1 - zero), low);
    for (int64_t c = from; c < low; c++) p[c] += w[0];
    for (int64_t c = low; c < high; c++) p[c] += w[zero + c];
    for (int64_t c = high; c < to; c++) p[c] += w[last];
  }
  for (int64_t c = begin; c < from; c++) p[c] = (REAL)-INFINITY;
  for (int64_t c = MOE_MAX(to, begin); c < end; c++) p[c] = (REAL)-INFINITY;
}

static inline REAL R(row_max)(const REAL *s, int64_t n, REAL m) {
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; c++) m = s[c] > m ? s[c] : m;
  return m;
}

/* s <- exp(s - m); the sum */
static inline REAL R(row_exp)(REAL *s, int64_t n, REAL m) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; c++) {
    REAL e = EXP(s[c] - m);
    s[c] = e;
    sum += e;
  }
  return sum;
}

/* y [rows, dv] (+)= p v, each row over the columns that it sees alone: numbers that are not finite stay where they are seen. */
static void R(careful_rows)(const R(block) * k, int64_t r, REAL *y, int64_t width, const REAL *p, const REAL *x, bool add) {
  for (int64_t i = r * R(ROWS); i < (r + 1) * R(ROWS); i++) {
    REAL *restrict yi = y + i * width;
    for (int64_t c = 0; c < width && !add; c++) yi[c] = 0;
    for (int64_t j = k->from[i]; j < k->to[i]; j++) {
      REAL w = p[i * KEYS + j];
      for (int64_t c = 0; c < width && w != 0; c++) yi[c] += w * x[j * width + c];
    }
  }
}

/* y [KEYS, width] += p^T x over the rows that see a key. */
static void R(careful_columns)(const R(block) * k, REAL *y, int64_t width, const REAL *p, const REAL *x) {
  for (int64_t i = 0; i < k->rows; i++)
    for (int64_t j = k->from[i]; j < k->to[i]; j++) {
      REAL w = p[i * KEYS + j];
      for (int64_t c = 0; c < width && w != 0; c++) y[j * width + c] += w * x[i * width + c];
    }
}

/* Queries [q0, q0 + count) of one head. Over the key blocks the softmax is kept as a running maximum, a running sum
** and an output still to be divided by it (Milakov and Gimelshein, "Online normalizer calculation for softmax",
** 2018; Dao et al., "FlashAttention", 2022). */
static bool R(forward)(const moe_attention *a, int64_t b, int64_t h, int64_t q0, int64_t count) {
  int64_t d = a->d, dv = a->dv, wv = R(whole)(dv, R(VL)), rows = R(whole)(count, R(ROWS)), tiles = rows / R(ROWS);
  REAL *room = moe_scratch(SCRATCH, (KEYS * (d + wv) + QUERIES * KEYS + rows * (d + wv + 2)) * (int64_t)sizeof(REAL));
  if (room == NULL) return false;
  REAL *p = room, *panels = p + QUERIES * KEYS, *values = panels + KEYS * d, *out = values + KEYS * wv;
  REAL *queries = out + rows * wv, *max = queries + rows * d, *sum = max + rows;
  bool started[FORWARD / R(ROWS)] = {false};
  int64_t group = a->h / a->hk, begin, end;
  const REAL *q = R(head)(a->q, a->sq, b, h) + q0 * a->sq[2];
  const REAL *keys = R(head)(a->k, a->sk, b, h / group), *v = R(head)(a->v, a->sv, b, h / group);
  R(pack_rows)(queries, d, q, a->sq[2], count, d, (REAL)a->scale);
  for (int64_t i = count * d; i < rows * d; i++) queries[i] = 0;
  for (int64_t i = 0; i < rows; i++) max[i] = (REAL)-INFINITY, sum[i] = 0;
  keys_of_all(a, seen_of(a, b, h), q0, q0 + count, &begin, &end);
  for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
    int64_t n = MOE_MIN(KEYS, end - k0);
    R(pack_panels)(panels, keys + k0 * a->sk[2], a->sk[2], n, d);
    R(pack_rows)(values, wv, v + k0 * a->sv[2], a->sv[2], n, dv, 1);
    bool finite = R(finite)(values, n * wv);
    for (int64_t first = 0; first < count; first += QUERIES) {
      R(block) k;
      if (!R(start)(&k, a, b, h, q0 + first, MOE_MIN(QUERIES, count - first), k0, n)) continue;
      R(products)(&k, p, queries + first * d, d, panels, d);
      for (int64_t r = 0; r < k.tiles; r++) {
        int64_t low = R(down)(k.low[r]), high = R(whole)(k.high[r], R(VL)), tile = first / R(ROWS) + r;
        if (k.low[r] >= k.high[r]) continue;
        for (int64_t i = r * R(ROWS); i < (r + 1) * R(ROWS); i++) {
          REAL *s = p + i * KEYS, *now = max + first + i;
          R(mask_row)(&k, a, i, s, low, high);
          REAL m = R(row_max)(s + low, high - low, *now);
          REAL base = m == (REAL)-INFINITY ? 0 : m; /* nothing seen yet: every exponential is 0 */
          REAL again = EXP(*now - base);
          sum[first + i] = sum[first + i] * again + R(row_exp)(s + low, high - low, base);
          *now = m;
          REAL *restrict y = out + (first + i) * wv;
          for (int64_t c = 0; c < wv && started[tile]; c++) y[c] *= again;
        }
        REAL *y = out + (first + r * R(ROWS)) * wv;
        if (finite)
          R(strip)(k.high[r] - k.low[r], wv, y, wv, p + r * R(ROWS) * KEYS + k.low[r], KEYS, 1, values + k.low[r] * wv, wv, started[tile]);
        else
          R(careful_rows)(&k, r, out + first * wv, wv, p, values, started[tile]);
        started[tile] = true;
      }
    }
  }
  REAL *y = (REAL *)a->y + b * a->sy[0] + h * a->sy[1] + q0 * a->sy[2], *lse = a->lse;
  for (int64_t r = 0; r < tiles; r++)
    for (int64_t i = r * R(ROWS); i < MOE_MIN((r + 1) * R(ROWS), count); i++) {
      REAL *restrict yi = y + i * a->sy[2], by = sum[i] == 0 ? 0 : 1 / sum[i];
      for (int64_t c = 0; c < dv; c++) yi[c] = started[r] ? out[i * wv + c] * by : 0;
      /* A row that sees nothing: +infinity makes every weight of the backward 0. */
      if (lse) lse[(b * a->h + h) * a->t + q0 + i] = sum[i] == 0 ? (REAL)INFINITY : max[i] + LOG(sum[i]);
    }
  return true;
}

/* One query: each key and value is read once where it lies. */
static bool R(one)(const moe_attention *a, int64_t b, int64_t h) {
  int64_t group = a->h / a->hk, begin, end;
  REAL *p = moe_scratch(SCRATCH, KEYS * (int64_t)sizeof(REAL)), max = (REAL)-INFINITY, sum = 0;
  if (p == NULL) return false;
  const REAL *q = R(head)(a->q, a->sq, b, h);
  const REAL *keys = R(head)(a->k, a->sk, b, h / group), *v = R(head)(a->v, a->sv, b, h / group);
  REAL *restrict y = (REAL *)a->y + b * a->sy[0] + h * a->sy[1], *lse = a->lse;
  for (int64_t c = 0; c < a->dv; c++) y[c] = 0;
  keys_of_all(a, seen_of(a, b, h), 0, 1, &begin, &end);
  for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
    int64_t n = MOE_MIN(KEYS, end - k0);
    R(block) k = {.b = b, .h = h, .k0 = k0, .rows = 1, .n = n, .to = {n}};
    GEMM(false, true, 1, n, a->d, (REAL)a->scale, q, a->sq[2], keys + k0 * a->sk[2], a->sk[2], 0, p, n);
    R(mask_row)(&k, a, 0, p, 0, n);
    REAL m = R(row_max)(p, n, max), base = m == (REAL)-INFINITY ? 0 : m, again = EXP(max - base);
    sum = sum * again + R(row_exp)(p, n, base);
    max = m;
    for (int64_t c = 0; c < a->dv; c++) y[c] *= again;
    GEMM(false, false, 1, a->dv, n, 1, p, n, v + k0 * a->sv[2], a->sv[2], 1, y, a->dv);
  }
  for (int64_t c = 0; c < a->dv; c++) y[c] *= sum == 0 ? 0 : 1 / sum;
  if (lse) lse[b * a->h + h] = sum == 0 ? (REAL)INFINITY : max + LOG(sum);
  return true;
}

/* What the backward of a key block holds. */
typedef struct R(held) {
  REAL *p, *dp, *key_panels, *value_panels, *keys, *dk, *dv, *queries, *g, *dq;
  bool finite;
} R(held);

/* One block of scores in the backward, with the keys in m: adds to m->dk and m->dv, leaves dq of the block in m->dq.
** P = exp(S - lse), dP = dO V^T, dS = P (dP - sum_c dO O):  dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q. */
static void R(backward_block)(const attention_job *j, const R(held) * m, const R(block) * k, REAL *drelative) {
  const moe_attention *a = j->a;
  int64_t d = a->d, dv = a->dv, w = R(whole)(d, R(VL)), wv = R(whole)(dv, R(VL)), q0 = k->q0, padded = k->tiles * R(ROWS);
  const REAL *q = R(head)(a->q, a->sq, k->b, k->h) + q0 * a->sq[2], *y = R(head)(a->y, a->sy, k->b, k->h) + q0 * a->sy[2];
  const REAL *g = R(head)(j->g->g, j->g->sg, k->b, k->h) + q0 * j->g->sg[2], *lse = (const REAL *)a->lse + (k->b * a->h + k->h) * a->t + q0;
  R(pack_rows)(m->queries, w, q, a->sq[2], k->rows, d, (REAL)a->scale);
  R(pack_rows)(m->g, wv, g, j->g->sg[2], k->rows, dv, 1);
  bool finite = m->finite && R(finite)(m->queries, k->rows * w) && R(finite)(m->g, k->rows * wv);
  for (int64_t i = k->rows * w; i < padded * w; i++) m->queries[i] = 0;
  for (int64_t i = k->rows * wv; i < padded * wv; i++) m->g[i] = 0;
  R(products)(k, m->p, m->queries, w, m->key_panels, d);
  R(products)(k, m->dp, m->g, wv, m->value_panels, dv);
  for (int64_t i = 0; i < padded; i++) {
    int64_t r = i / R(ROWS), low = R(down)(k->low[r]), high = R(whole)(k->high[r], R(VL));
    if (k->low[r] >= k->high[r]) continue;
    REAL *restrict p = m->p + i * KEYS;
    R(mask_row)(k, a, i, p, low, high);
    R(row_exp)(p + low, high - low, i < k->rows ? lse[i] : (REAL)INFINITY);
  }
  /* the rows that may see a tile of keys: from the first tile of rows that does to the last */
  if (!finite) R(careful_columns)(k, m->dv, wv, m->p, m->g);
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t c = 0; c < k->n && finite; c += R(ROWS)) {
      int64_t first = 0, last = k->tiles;
      while (first < last && (c >= k->high[first] || c + R(ROWS) <= k->low[first])) first++;
      while (last > first && (c >= k->high[last - 1] || c + R(ROWS) <= k->low[last - 1])) last--;
      if (first == last) continue;
      /* between them all rows hold weights: those of tiles that see none of these keys are not zero yet */
      for (int64_t r = first; r < last; r++)
        if (pass == 0 && (c < R(down)(k->low[r]) || c + R(ROWS) > R(whole)(k->high[r], R(VL))))
          for (int64_t i = r * R(ROWS); i < (r + 1) * R(ROWS); i++)
            for (int64_t o = c; o < c + R(ROWS); o++)
              if (o < R(down)(k->low[r]) || o >= R(whole)(k->high[r], R(VL))) m->p[i * KEYS + o] = 0;
      int64_t row = first * R(ROWS), rows = (last - first) * R(ROWS);
      if (pass == 0)
        R(strip)(rows, wv, m->dv + c * wv, wv, m->p + row * KEYS + c, 1, KEYS, m->g + row * wv, wv, true);
      else
        R(strip)(rows, w, m->dk + c * w, w, m->p + row * KEYS + c, 1, KEYS, m->queries + row * w, w, true);
    }
    if (pass == 1) break;
    for (int64_t i = 0; i < k->rows; i++) {
      int64_t r = i / R(ROWS), low = R(down)(k->low[r]), high = R(whole)(k->high[r], R(VL));
      REAL *restrict p = m->p + i * KEYS, *restrict dp = m->dp + i * KEYS, delta = 0;
      const REAL *restrict gi = m->g + i * wv, *restrict yi = y + i * a->sy[2];
#pragma omp simd reduction(+ : delta)
      for (int64_t c = 0; c < dv; c++) delta += gi[c] * yi[c];
      if (!finite) low = k->from[i], high = k->to[i];
      for (int64_t c = low; c < high; c++) p[c] *= dp[c] - delta;
      int64_t from = k->from[i], n = k->to[i] - from;
      if (j->g->dmask && n > 0)
        memcpy((REAL *)j->g->dmask + ((k->b * a->h + k->h) * a->t + q0 + i) * a->s + k->k0 + from, p + from, (size_t)n * sizeof *p);
      if (drelative == NULL) continue;
      int64_t zero = a->reach - 1 + k->k0 - a->span[q0 + i].at, last = 2 * a->reach - 2;
      for (int64_t c = from; c < from + n; c++) drelative[MOE_MIN(MOE_MAX(zero + c, 0), last)] += p[c];
    }
  }
  if (!finite) R(careful_columns)(k, m->dk, w, m->p, m->queries);
  for (int64_t r = 0; r < k->tiles; r++) {
    int64_t low = k->low[r];
    if (low >= k->high[r]) continue;
    if (finite)
      R(strip)(k->high[r] - low, w, m->dq + r * R(ROWS) * w, w, m->p + r * R(ROWS) * KEYS + low, KEYS, 1, m->keys + low * w, w, false);
    else
      R(careful_rows)(k, r, m->dq, w, m->p, m->keys, false);
  }
}

/* rows of to (stride ld) <- or += rows of from */
static void R(put)(REAL *to, int64_t ld, const REAL *from, int64_t w, int64_t n, int64_t width, bool add) {
  for (int64_t i = 0; i < n; i++) {
    REAL *restrict y = to + i * ld;
    const REAL *restrict x = from + i * w;
    for (int64_t c = 0; c < width; c++) y[c] = (add ? y[c] : 0) + x[c];
  }
}

/* The gradients of every splits-th key block of a key-value head, from block `part` on, over the query heads that share it:
** nobody else writes those of its keys, nor its part of dq. */
static bool R(backward)(const attention_job *j, int64_t b, int64_t hk, int64_t part) {
  const moe_attention *a = j->a;
  const moe_attention_grads *g = j->g;
  int64_t d = a->d, dv = a->dv, w = R(whole)(d, R(VL)), wv = R(whole)(dv, R(VL)), group = a->h / a->hk, entries = 2 * a->reach - 1;
  int64_t numbers = 2 * QUERIES * KEYS + KEYS * (d + dv + 2 * w + wv) + QUERIES * (2 * w + wv);
  REAL *room = moe_scratch(SCRATCH, numbers * (int64_t)sizeof(REAL));
  if (room == NULL) return false;
  R(held) m = {.p = room, .dp = room + QUERIES * KEYS, .keys = room + 2 * QUERIES * KEYS};
  m.dk = m.keys + KEYS * w, m.dv = m.dk + KEYS * w, m.queries = m.dv + KEYS * wv, m.dq = m.queries + QUERIES * w;
  m.g = m.dq + QUERIES * w, m.key_panels = m.g + QUERIES * wv, m.value_panels = m.key_panels + KEYS * d;
  const REAL *k = R(head)(a->k, a->sk, b, hk), *v = R(head)(a->v, a->sv, b, hk);
  REAL *dk = (REAL *)g->dk + b * g->sdk[0] + hk * g->sdk[1], *dvalue = (REAL *)g->dv + b * g->sdv[0] + hk * g->sdv[1];
  int64_t sdq = j->part ? d : g->sdq[2], count = j->last - j->first;
  for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
    REAL *dq = j->part ? (REAL *)j->part + ((part * a->b + b) * a->h + h) * count * d
                       : (REAL *)g->dq + b * g->sdq[0] + h * g->sdq[1] + j->first * sdq;
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < d; c++) dq[i * sdq + c] = 0;
  }
  for (int64_t k0 = part * KEYS; k0 < a->s; k0 += j->splits * KEYS) {
    int64_t n = MOE_MIN(KEYS, a->s - k0);
    bool packed = false;
    for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
      REAL *dq = j->part ? (REAL *)j->part + ((part * a->b + b) * a->h + h) * count * d
                         : (REAL *)g->dq + b * g->sdq[0] + h * g->sdq[1] + j->first * sdq;
      REAL *drelative = j->relative ? (REAL *)j->relative + ((part * a->b + b) * a->h + h) * entries : NULL;
      for (int64_t q0 = j->first; q0 < j->last; q0 += QUERIES) {
        R(block) block;
        if (!R(start)(&block, a, b, h, q0, MOE_MIN(QUERIES, j->last - q0), k0, n)) continue;
        if (!packed) {
          R(pack_rows)(m.keys, w, k + k0 * a->sk[2], a->sk[2], n, d, 1);
          R(pack_panels)(m.key_panels, k + k0 * a->sk[2], a->sk[2], n, d);
          R(pack_panels)(m.value_panels, v + k0 * a->sv[2], a->sv[2], n, dv);
          int64_t padded = R(whole)(n, R(ROWS));
          m.finite = R(finite)(m.keys, n * w) && R(finite)(m.value_panels, R(whole)(n, R(WIDE)) * dv);
          for (int64_t i = 0; i < padded * w; i++) m.dk[i] = 0;
          for (int64_t i = 0; i < padded * wv; i++) m.dv[i] = 0;
          packed = true;
        }
        R(backward_block)(j, &m, &block, drelative);
        for (int64_t i = 0; i < block.rows; i++) {
          if (block.low[i / R(ROWS)] >= block.high[i / R(ROWS)]) continue;
          REAL *restrict to = dq + (q0 - j->first + i) * sdq;
          for (int64_t c = 0; c < d; c++) to[c] += (REAL)a->scale * m.dq[i * w + c];
        }
      }
    }
    if (packed) {
      R(put)(dk + k0 * g->sdk[2], g->sdk[2], m.dk, w, n, d, j->first > 0);
      R(put)(dvalue + k0 * g->sdv[2], g->sdv[2], m.dv, wv, n, dv, j->first > 0);
    } else if (j->first == 0) {
      for (int64_t i = k0; i < k0 + n; i++) {
        for (int64_t c = 0; c < d; c++) dk[i * g->sdk[2] + c] = 0;
        for (int64_t c = 0; c < dv; c++) dvalue[i * g->sdv[2] + c] = 0;
      }
    }
  }
  return true;
}

static void R(one_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  attention_job *j = arg;
  for (int64_t i = begin; i < end; i++)
    if (!R(one)(j->a, i / j->a->h, i % j->a->h)) atomic_store(&j->short_of_memory, true);
}

static void R(forward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  attention_job *j = arg;
  int64_t t = j->a->t, blocks = (t + j->count - 1) / j->count;
  for (int64_t i = begin; i < end; i++) {
    /* The last block sees the most keys under a causal mask: it goes first. */
    int64_t at = i / blocks, q0 = (blocks - 1 - i % blocks) * j->count;
    if (!R(forward)(j->a, at / j->a->h, at % j->a->h, q0, MOE_MIN(j->count, t - q0))) atomic_store(&j->short_of_memory, true);
  }
}

static void R(backward_range)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  attention_job *j = arg;
  for (int64_t i = begin; i < end; i++) {
    int64_t at = i / j->splits;
    if (!R(backward)(j, at / j->a->hk, at % j->a->hk, i % j->splits)) atomic_store(&j->short_of_memory, true);
  }
}

/* Rows of dq [b, h, queries of the round] <- the sum of their parts, in order. */
static void R(add_parts)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const attention_job *j = arg;
  const int64_t *stride = j->g->sdq;
  int64_t count = j->last - j->first, d = j->a->d, all = j->a->b * j->a->h * count * d;
  for (int64_t i = begin; i < end; i++) {
    int64_t at = i / count, b = at / j->a->h, h = at % j->a->h;
    REAL *restrict y = (REAL *)j->g->dq + b * stride[0] + h * stride[1] + (j->first + i % count) * stride[2];
    for (int64_t part = 0; part < j->splits; part++) {
      const REAL *restrict x = (const REAL *)j->part + part * all + i * d;
      for (int64_t c = 0; c < d; c++) y[c] = (part == 0 ? 0 : y[c]) + x[c];
    }
  }
}

/* Entries of drelative [h, 2 reach - 1] <- the sum of their parts, in order. */
static void R(add_relative)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const attention_job *j = arg;
  int64_t all = j->a->h * (2 * j->a->reach - 1);
  for (int64_t i = begin; i < end; i++) {
    REAL sum = 0;
    for (int64_t part = 0; part < j->splits * j->a->b; part++) sum += ((const REAL *)j->relative)[part * all + i];
    ((REAL *)j->g->drelative)[i] = sum;
  }
}
