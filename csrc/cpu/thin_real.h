/* Products of few rows with a matrix of weights, for one element type; included like experts_real.h, which uses them.
**
** A BLAS packs both operands first and zeroes or reads the result: with 4 to 100 rows that costs as much as the
** product, and the weights pass through memory three times. Here every weight is read as it lies, once, and every
** element of a result written once. Rows may be given by pointer, so that tokens need not be gathered.
** All sums run in an order that the sizes alone fix.
*/
#include "cpu/vec.h"

typedef REAL R(vec) MOE_VEC_OF(REAL);
enum {
  R(VL) = MOE_VEC_BYTES / (int)sizeof(REAL), /* elements of a vector */
  R(MIX_V) = 3,                              /* the tile of mix: vectors of a row, */
  R(MIX_O) = MOE_VEC_REGISTERS / 4,          /* rows of the result */
  R(MIX_IN) = 32,                            /* rows read between two visits of the result: they stay in the cache */
  R(DOT_N) = R(VL) >= 8 ? 4 : 2,             /* the tile of dots: VL products, which fold into one vector */
  R(DOT_M) = R(VL) / R(DOT_N),
  R(STRIP) = 64 /* columns of packed_nt between two transposes */
};

static inline R(vec) R(load)(const REAL *p) { return *(const R(vec) *)p; }

/* --- sums of rows --- */

/* y_o [vecs VL] (+)= sum over i of a[o so + i si] x_i, from column `at` on, for `outs` rows y_o. x_i is x[i], or, without
** such a list, base + i stride. ahead: fetches the rows that the next visit reads. */
static inline __attribute__((always_inline)) void R(mix_tile)(const int outs, const int vecs, int64_t ins,
                                                              REAL *const *y, const REAL *const *x,
                                                              const REAL *base, int64_t stride, const REAL *a,
                                                              int64_t so, int64_t si, int64_t at, bool add,
                                                              const bool ahead) {
  R(vec) acc[R(MIX_O)][R(MIX_V)];
  for (int o = 0; o < outs; o++)
    for (int v = 0; v < vecs; v++) acc[o][v] = add ? R(load)(y[o] + at + v * R(VL)) : (R(vec)){0};
  for (int64_t i = 0; i < ins; i++) {
    const REAL *xi = (x ? x[i] : base + i * stride) + at;
    R(vec) row[R(MIX_V)];
    for (int v = 0; v < vecs; v++) row[v] = R(load)(xi + v * R(VL));
    if (ahead)
      for (int v = 0; v < vecs; v++) __builtin_prefetch(xi + R(MIX_IN) * stride + v * R(VL));
    for (int o = 0; o < outs; o++) {
      REAL w = a[o * so + i * si];
      for (int v = 0; v < vecs; v++) acc[o][v] += w * row[v];
    }
  }
  for (int o = 0; o < outs; o++)
    for (int v = 0; v < vecs; v++) *(R(vec) *)(y[o] + at + v * R(VL)) = acc[o][v];
}

/* All columns of `outs` rows. */
static inline __attribute__((always_inline)) void R(mix_rows)(const int outs, int64_t ins, int64_t d,
                                                              REAL *const *y, const REAL *const *x,
                                                              const REAL *base, int64_t stride, const REAL *a,
                                                              int64_t so, int64_t si, bool add,
                                                              const bool ahead) {
  int64_t at = 0;
  for (; at + R(MIX_V) * R(VL) <= d; at += R(MIX_V) * R(VL))
    R(mix_tile)(outs, R(MIX_V), ins, y, x, base, stride, a, so, si, at, add, ahead);
  for (; at + R(VL) <= d; at += R(VL))
    R(mix_tile)(outs, 1, ins, y, x, base, stride, a, so, si, at, add, ahead);
  for (; at < d; at++)
    for (int o = 0; o < outs; o++) {
      REAL s = add ? y[o][at] : 0;
      for (int64_t i = 0; i < ins; i++) s += a[o * so + i * si] * (x ? x[i] : base + i * stride)[at];
      y[o][at] = s;
    }
}

/* The same for any number of rows by lists of pointers. Two rows y of a block must not be the same. */
static void R(mix)(int64_t outs, int64_t ins, int64_t d, REAL *const *y, const REAL *const *x, const REAL *a,
                   int64_t so, int64_t si, bool add) {
  for (int64_t i = 0; i < ins; i += R(MIX_IN)) {
    int64_t n = MOE_MIN(R(MIX_IN), ins - i), o = 0;
    bool on = add || i > 0;
    for (; o + R(MIX_O) <= outs; o += R(MIX_O))
      R(mix_rows)(R(MIX_O), n, d, y + o, x + i, NULL, 0, a + o * so + i * si, so, si, on, false);
    for (; o < outs; o++) R(mix_rows)(1, n, d, y + o, x + i, NULL, 0, a + o * so + i * si, so, si, on, false);
  }
}

/* The same for rows that lie at strides. `whole`: every row of the result is made in one visit, for results that are
** narrow and rows x that stay in the cache; else x passes in blocks of MIX_IN rows, for x that comes from memory. */
static void R(mix_at)(int64_t outs, int64_t ins, int64_t d, REAL *y, int64_t ldy, const REAL *x, int64_t ldx,
                      const REAL *a, int64_t so, int64_t si, bool add, bool whole) {
  int64_t block = whole ? ins : R(MIX_IN);
  for (int64_t i = 0; i < ins; i += block) {
    int64_t n = MOE_MIN(block, ins - i), o = 0;
    bool on = add || i > 0, ahead = i + block + R(MIX_IN) <= ins;
    const REAL *xi = x + i * ldx;
    REAL *row[R(MIX_O)];
    for (; o + R(MIX_O) <= outs; o += R(MIX_O)) {
      const REAL *ai = a + o * so + i * si;
      for (int r = 0; r < R(MIX_O); r++) row[r] = y + (o + r) * ldy;
      if (ahead && o == 0)
        R(mix_rows)(R(MIX_O), n, d, row, NULL, xi, ldx, ai, so, si, on, true);
      else
        R(mix_rows)(R(MIX_O), n, d, row, NULL, xi, ldx, ai, so, si, on, false);
    }
    if (o + 4 <= outs && R(MIX_O) > 4) {
      for (int r = 0; r < 4; r++) row[r] = y + (o + r) * ldy;
      R(mix_rows)(4, n, d, row, NULL, xi, ldx, a + o * so + i * si, so, si, on, false);
      o += 4;
    }
    for (; o < outs; o++) {
      row[0] = y + o * ldy;
      R(mix_rows)(1, n, d, row, NULL, xi, ldx, a + o * so + i * si, so, si, on, false);
    }
  }
}

/* --- products of rows with rows --- */

/* c [m, n] = a [m, k] b [n, k]^T (+ c). a is transposed into room, so that a vector holds one unit of VL rows; b is read
** as it lies. room [(k + STRIP) mp], mp = m rounded up to VL. */
static void R(packed_nt)(int64_t m, int64_t n, int64_t k, const REAL *a, const REAL *b, bool add, REAL *c,
                         REAL *room) {
  int64_t mp = (m + R(VL) - 1) / R(VL) * R(VL);
  REAL *restrict at = room, *restrict ct = room + k * mp;
  for (int64_t i = 0; i < mp; i += 8)
    for (int64_t p = 0; p < k; p++)
      for (int64_t r = i; r < MOE_MIN(i + 8, mp); r++) at[p * mp + r] = r < m ? a[r * k + p] : 0;
  for (int64_t j = 0; j < n; j += R(STRIP)) {
    int64_t w = MOE_MIN(R(STRIP), n - j);
    R(mix_at)(w, k, mp, ct, mp, at, mp, b + j * k, k, 1, false, true);
    for (int64_t i = 0; i < m; i++) {
      REAL *restrict ci = c + i * n + j;
      if (add)
        for (int64_t s = 0; s < w; s++) ci[s] += ct[s * mp + i];
      else
        for (int64_t s = 0; s < w; s++) ci[s] = ct[s * mp + i];
    }
  }
}

/* Sums the lanes of each of v [VL] into a lane of the result: pairs of vectors fold, at distances 1, 2, 4, 8. */
static inline R(vec) R(fold)(R(vec) * v) {
#if defined __has_builtin && !defined MOE_NO_SHUFFLE
#define FOLD(n, low, high)                                         \
  for (int i = 0; i < (n); i++)                                    \
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], low) +  \
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], high);
#define LIST(...) __VA_ARGS__
#if MOE_VEC_BYTES / REAL_BYTES == 16
  FOLD(8, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
       LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  FOLD(4, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
       LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  FOLD(2, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
       LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  FOLD(1, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
       LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif MOE_VEC_BYTES / REAL_BYTES == 8
  FOLD(4, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
  FOLD(2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
  FOLD(1, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
#elif MOE_VEC_BYTES / REAL_BYTES == 4
  FOLD(2, LIST(0, 4, 2, 6), LIST(1, 5, 3, 7))
  FOLD(1, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
#else
  FOLD(1, LIST(0, 2), LIST(1, 3))
#endif
#undef LIST
#undef FOLD
  return v[0];
#else
  R(vec) sum = {0};
  for (int i = 0; i < R(VL); i++)
    for (int l = 0; l < R(VL); l++) sum[i] += v[i][l];
  return sum;
#endif
}

/* c [m, n] (row stride ldc) = <a_i, b_j> (+ c): rows a[i] [k] by pointer, b [n, k]. For few columns: nothing is packed. */
static void R(dots_nt)(int64_t m, int64_t n, int64_t k, const REAL *const *a, const REAL *b, bool add, REAL *c,
                       int64_t ldc) {
  enum { M = R(DOT_M), N = R(DOT_N) };
  int64_t whole = k - k % R(VL);
  for (int64_t i = 0; i < m; i += M) {
    const REAL *ai[M];
    for (int r = 0; r < M; r++) ai[r] = a[MOE_MIN(i + r, m - 1)]; /* beyond the end: the last, dropped below */
    for (int64_t j = 0; j < n; j += N) {
      const REAL *bj[N];
      for (int s = 0; s < N; s++) bj[s] = b + MOE_MIN(j + s, n - 1) * k;
      R(vec) acc[M * N];
      for (int r = 0; r < M * N; r++) acc[r] = (R(vec)){0};
      for (int64_t p = 0; p < whole; p += R(VL)) {
        R(vec) v[N];
        for (int s = 0; s < N; s++) v[s] = R(load)(bj[s] + p);
        for (int r = 0; r < M; r++) {
          R(vec) u = R(load)(ai[r] + p);
          for (int s = 0; s < N; s++) acc[r * N + s] += u * v[s];
        }
      }
      R(vec) sum = R(fold)(acc);
      for (int r = 0; r < M && i + r < m; r++)
        for (int s = 0; s < N && j + s < n; s++) {
          REAL t = sum[r * N + s], *to = c + (i + r) * ldc + j + s;
          for (int64_t p = whole; p < k; p++) t += ai[r][p] * bj[s][p];
          *to = add ? *to + t : t;
        }
    }
  }
}
