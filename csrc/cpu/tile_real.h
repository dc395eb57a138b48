/* Products of matrices that a task holds in its cache, for one element type: REAL and R(x) are set where it is
** included. Everything is padded: rows of a result in steps of ROWS, their width in whole vectors, so that no product has
** a remainder. The order of every sum is that of its index.
*/
#include "cpu/vec.h"

typedef REAL R(vec) MOE_VEC_OF(REAL);
enum {
  R(VL) = MOE_VEC_BYTES / (int)sizeof(REAL), /* elements of a vector */
  R(WIDE) = 2 * R(VL),                  /* columns of a tile, and of a panel */
  R(ROWS) = MOE_VEC_REGISTERS / 4            /* rows of a tile */
};

static inline int64_t R(whole)(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* y_r [vecs VL] (row stride ldy) (+)= sum over i < n of a[r so + i si] x_i (row stride ldx) for `rows` rows. */
static inline __attribute__((always_inline)) void R(tile)(const int rows, const int vecs, int64_t n, REAL *y, int64_t ldy,
                                                               const REAL *a, int64_t so, int64_t si, const REAL *x,
                                                               int64_t ldx, bool add) {
  R(vec) acc[R(ROWS)][2];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) acc[r][v] = add ? *(const R(vec) *)(y + r * ldy + v * R(VL)) : (R(vec)){0};
  for (int64_t i = 0; i < n; i++) {
    R(vec) row[2];
    for (int v = 0; v < vecs; v++) row[v] = *(const R(vec) *)(x + i * ldx + v * R(VL));
    for (int r = 0; r < rows; r++) {
      REAL w = a[r * so + i * si];
      for (int v = 0; v < vecs; v++) acc[r][v] += w * row[v];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) *(R(vec) *)(y + r * ldy + v * R(VL)) = acc[r][v];
}

/* The same for ROWS rows of `width` columns, a multiple of VL. */
static void R(strip)(int64_t n, int64_t width, REAL *y, int64_t ldy, const REAL *a, int64_t so, int64_t si, const REAL *x,
                          int64_t ldx, bool add) {
  int64_t at = 0;
  for (; at + R(WIDE) <= width; at += R(WIDE))
    R(tile)(R(ROWS), 2, n, y + at, ldy, a, so, si, x + at, ldx, add);
  if (at < width) R(tile)(R(ROWS), 1, n, y + at, ldy, a, so, si, x + at, ldx, add);
}

/* Whether all of x [n] are finite. */
static bool R(finite)(const REAL *x, int64_t n) {
  REAL probe = 0;
#pragma omp simd reduction(+ : probe)
  for (int64_t i = 0; i < n; i++) probe += x[i] * 0;
  return probe == 0;
}

/* [n, width] with rows of `to` columns <- rows of x (stride ldx) times `by`, zeros behind them. */
static void R(pack_rows)(REAL *restrict y, int64_t to, const REAL *x, int64_t ldx, int64_t n, int64_t width, REAL by) {
  for (int64_t i = 0; i < n; i++) {
    const REAL *restrict xi = x + i * ldx;
    REAL *restrict yi = y + i * to;
    for (int64_t c = 0; c < width; c++) yi[c] = xi[c] * by;
    for (int64_t c = width; c < to; c++) yi[c] = 0;
  }
}

/* Four columns of four rows, turned. */
static inline void R(turn)(REAL *restrict y, int64_t ldy, const REAL *x, int64_t ldx) {
#if defined __has_builtin && !defined MOE_NO_SHUFFLE
  typedef REAL quad __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
  quad a = *(const quad *)x, b = *(const quad *)(x + ldx), c = *(const quad *)(x + 2 * ldx), d = *(const quad *)(x + 3 * ldx);
  quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  *(quad *)y = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  *(quad *)(y + ldy) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *(quad *)(y + 2 * ldy) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  *(quad *)(y + 3 * ldy) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
  for (int64_t c = 0; c < 4; c++)
    for (int64_t r = 0; r < 4; r++) y[c * ldy + r] = x[r * ldx + c];
#endif
}

/* Panels [n / WIDE][width][WIDE] <- the transpose of rows of x, zeros beyond n. */
static void R(pack_panels)(REAL *restrict y, const REAL *x, int64_t ldx, int64_t n, int64_t width) {
  for (int64_t p = 0; p < n; p += R(WIDE), y += width * R(WIDE))
    for (int64_t l = 0; l < R(WIDE); l += 4) {
      int64_t c = 0;
      for (; c + 4 <= width && p + l + 4 <= n; c += 4) R(turn)(y + c * R(WIDE) + l, R(WIDE), x + (p + l) * ldx + c, ldx);
      for (; c < width; c++)
        for (int64_t r = l; r < l + 4; r++) y[c * R(WIDE) + r] = p + r < n ? x[(p + r) * ldx + c] : 0;
    }
}
