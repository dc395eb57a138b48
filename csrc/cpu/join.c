/* remap: a dense result whose dimension d at i reads x at position pos[d][i]. */
#include <string.h>

#include "cpu/cpu.h"

typedef struct remap {
  char *y;
  const char *x;
  int ndim;
  const int64_t *shape, *stride, *const *pos;
  int64_t esize;
  uint64_t fill;
} remap;

/* n elements of the last dimension, at `src`; pos NULL: 0, 1, 2 .. */
#define ROW(N, ctype)                                                                                          \
  static void row_##N(char *yp, const char *xp, int64_t n, int64_t stride, const int64_t *pos, uint64_t fill) { \
    ctype *restrict y = (ctype *)(void *)yp;                                                                   \
    const ctype *restrict x = (const ctype *)(const void *)xp;                                                 \
    ctype f;                                                                                                   \
    memcpy(&f, &fill, sizeof f); /* little endian: the low bytes */                                            \
    if (x == NULL) {                                                                                           \
      for (int64_t i = 0; i < n; i++) y[i] = f;                                                                \
    } else if (pos == NULL && stride == 1) {                                                                   \
      memcpy(y, x, (size_t)n * sizeof f);                                                                      \
    } else if (pos == NULL) {                                                                                  \
      for (int64_t i = 0; i < n; i++) y[i] = x[i * stride];                                                    \
    } else {                                                                                                   \
      for (int64_t i = 0; i < n; i++) y[i] = pos[i] < 0 ? f : x[pos[i] * stride];                              \
    }                                                                                                          \
  }
ROW(1, uint8_t)
ROW(2, uint16_t)
ROW(4, uint32_t)
ROW(8, uint64_t)

typedef void row_fn(char *y, const char *x, int64_t n, int64_t stride, const int64_t *pos, uint64_t fill);
static row_fn *const row_of[9] = {[1] = row_1, [2] = row_2, [4] = row_4, [8] = row_8};

static void remap_rows(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const remap *r = arg;
  int last = r->ndim - 1;
  int64_t n = r->shape[last];
  row_fn *row = row_of[r->esize];
  for (int64_t i = begin; i < end; i++) {
    const char *x = r->x;
    int64_t rest = i, at = 0;
    for (int d = last - 1; d >= 0; d--) {
      int64_t p = rest % r->shape[d];
      rest /= r->shape[d];
      if (r->pos[d]) p = r->pos[d][p];
      if (p < 0) {
        x = NULL;
        break;
      }
      at += p * r->stride[d];
    }
    row(r->y + i * n * r->esize, x ? x + at * r->esize : NULL, n, r->stride[last], r->pos[last], r->fill);
  }
}

moe_status MOE_CPU(remap)(void *y, const void *x, int ndim, const int64_t *shape, const int64_t *stride, const int64_t *const *pos,
                          int64_t esize, uint64_t fill) {
  remap r = {y, x, ndim, shape, stride, pos, esize, fill};
  int64_t rows = 1;
  for (int d = 0; d < ndim - 1; d++) rows *= shape[d];
  moe_parallel_range(rows, MOE_MAX(MOE_GRAIN / shape[ndim - 1], 1), remap_rows, &r);
  return MOE_OK;
}
