/* Row-sparse gradients on the CPU: which rows were touched, and the sum of what came to each. */
#include "cpu/cpu.h"
#include "cpu/radix.h"

enum { SCRATCH = 5 }; /* for the length of rows_group */

/* rows, start (with one place more) and order have room for k numbers: the distinct rows, and the positions that name row u
** as order[start[u] .. start[u + 1] - 1], ascending. Touches nothing of size n. */
moe_status MOE_CPU(rows_group)(int64_t *rows, int64_t *start, int64_t *order, int64_t *count, const int64_t *index, int64_t k,
                               int64_t n, int64_t skip, int64_t base) {
  int64_t buckets = moe_radix_buckets(k, n);
  int64_t *key = moe_scratch(SCRATCH, (3 * k + buckets) * (int64_t)sizeof *key);
  if (key == NULL) return moe_fail(MOE_ENOMEM, "out of memory for %lld positions", (long long)k);
  int64_t *position = key + k, *spare = position + k, *counts = spare + k, kept = 0;
  for (int64_t p = 0; p < k; p++) {
    int64_t v = index[p] - base;
    if (v == skip || v == -1) continue;
    if (v < 0 || v >= n)
      return moe_fail(MOE_EINVAL, "index %lld is outside of %lld..%lld", (long long)index[p], (long long)base,
                      (long long)(base + n - 1));
    key[kept] = v;
    position[kept++] = p;
  }
  moe_radix_sort(order, spare, NULL, key, kept, n, counts);
  int64_t u = 0;
  for (int64_t i = 0; i < kept; i++) {
    int64_t v = key[order[i]];
    if (i == 0 || v != rows[u - 1]) {
      rows[u] = v;
      start[u++] = i;
    }
    order[i] = position[order[i]];
  }
  start[u] = kept;
  *count = u;
  return MOE_OK;
}

typedef struct sum_job {
  void *y;
  const void *src, *weight;
  const int64_t *order, *start;
  int64_t per, d;
} sum_job;

#define SUM(T)                                                                                   \
  static void sum_##T(void *arg, int64_t begin, int64_t end, int worker) {                       \
    (void)worker;                                                                                \
    const sum_job *j = arg;                                                                      \
    const int64_t d = j->d, *order = j->order;                                                   \
    for (int64_t u = begin; u < end; u++) {                                                      \
      T *restrict y = (T *)j->y + u * d;                                                         \
      for (int64_t c = 0; c < d; c++) y[c] = 0;                                                  \
      for (int64_t i = j->start[u]; i < j->start[u + 1]; i++) {                                  \
        const T *restrict x = (const T *)j->src + order[i] / j->per * d;                         \
        const T w = j->weight ? ((const T *)j->weight)[order[i]] : (T)1;                         \
        for (int64_t c = 0; c < d; c++) y[c] += w * x[c];                                        \
      }                                                                                          \
    }                                                                                            \
  }
SUM(float)
SUM(double)

moe_status MOE_CPU(rows_sum)(void *y, const void *src, const void *weight, const int64_t *order, const int64_t *start,
                             int64_t count, int64_t per, int64_t d, moe_dtype dt) {
  sum_job j = {y, src, weight, order, start, per, d};
  if (count * d > 0) moe_parallel_range(count, MOE_MAX(MOE_GRAIN / 4 / d, 1), dt == MOE_f64 ? sum_double : sum_float, &j);
  return MOE_OK;
}
