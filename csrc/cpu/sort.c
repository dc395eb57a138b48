/* Sorting and choosing within rows.
**
** Every element becomes a signed integer `rank` whose ascending order is the order wanted (NaN counts as the
** largest value, both zeros as one), so that one code serves both directions; equal ranks keep the order of
** position. Three ways: few of a short f32 row by repeated branch-free minima over (rank, position) packed into
** one integer; few of any row by insertion below a threshold; else a stable radix sort.
*/
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/order.h"

enum {
  PACKED_N = 1024, /* longest row and most choices of the packed way */
  PACKED_K = 16,
  INSERT_K = 64,   /* most choices of the threshold way */
  SMALL_N = 48     /* rows up to here are sorted by insertion */
};

typedef struct job {
  void *value;
  int64_t *index;
  const void *x;
  int64_t n, k, base;
  bool largest;
  atomic_bool no_memory;
} job;

typedef struct pair {
  uint64_t key;
  int64_t at;
} pair;

/* Stable, least significant byte first; bytes that all keys share are skipped. Returns a or tmp. */
static pair *radix_sort(pair *a, pair *tmp, int64_t n) {
  uint64_t differ = 0;
  for (int64_t i = 1; i < n; i++) differ |= a[i].key ^ a[0].key;
  for (int shift = 0; shift < 64; shift += 8) {
    if ((differ >> shift & 0xFF) == 0) continue;
    int64_t start[256] = {0}, sum = 0;
    for (int64_t i = 0; i < n; i++) start[a[i].key >> shift & 0xFF]++;
    for (int d = 0; d < 256; d++) {
      int64_t count = start[d];
      start[d] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; i++) tmp[start[a[i].key >> shift & 0xFF]++] = a[i];
    pair *t = a;
    a = tmp;
    tmp = t;
  }
  return a;
}

static void insertion_sort(pair *a, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    pair p = a[i];
    int64_t j = i;
    for (; j > 0 && a[j - 1].key > p.key; j--) a[j] = a[j - 1];
    a[j] = p;
  }
}

static const pair *sort_pairs(pair *a, pair *tmp, int64_t n) {
  if (n > SMALL_N) return radix_sort(a, tmp, n);
  insertion_sort(a, n);
  return a;
}

/* The k smallest of n packed (rank << 32 | position): all differ, so that the next is the smallest above the last. */
static inline void choose_packed(const int64_t *restrict p, int64_t n, int64_t k, int64_t *at) {
  int64_t last = p[0];
#pragma omp simd reduction(min : last)
  for (int64_t i = 1; i < n; i++) last = p[i] < last ? p[i] : last;
  at[0] = (int64_t)(uint32_t)last;
  for (int64_t c = 1; c < k; c++) {
    int64_t m = INT64_MAX;
#pragma omp simd reduction(min : m)
    for (int64_t i = 0; i < n; i++) {
      int64_t v = p[i] > last ? p[i] : INT64_MAX;
      m = v < m ? v : m;
    }
    last = m;
    at[c] = (int64_t)(uint32_t)m;
  }
}

#define RANK_f32(x) ((int64_t)moe_key_max_f32((x) + 0.0f))
#define RANK_f64(x) moe_key_max_f64((x) + 0.0)
#define RANK_i64(x) (x)

/* `flip` is -1 (all bits) for the largest first, 0 for the smallest first. */
#define TOPK(SFX, T)                                                                                          \
  static void choose_few_##SFX(const T *x, int64_t n, int64_t k, int64_t flip, int64_t *at) {                 \
    int64_t rank[INSERT_K], have = 0;                                                                         \
    for (int64_t i = 0; i < n; i++) {                                                                         \
      int64_t r = RANK_##SFX(x[i]) ^ flip;                                                                    \
      if (have == k && r >= rank[k - 1]) continue;                                                            \
      int64_t j = have < k ? have++ : k - 1;                                                                  \
      for (; j > 0 && rank[j - 1] > r; j--) {                                                                 \
        rank[j] = rank[j - 1];                                                                                \
        at[j] = at[j - 1];                                                                                    \
      }                                                                                                       \
      rank[j] = r;                                                                                            \
      at[j] = i;                                                                                              \
    }                                                                                                         \
  }                                                                                                           \
  static void topk_##SFX(void *arg, int64_t begin, int64_t end, int worker) {                                 \
    job *b = arg;                                                                                             \
    int64_t n = b->n, k = b->k, flip = b->largest ? -1 : 0;                                                   \
    bool packed = sizeof(T) == 4 && n <= PACKED_N && k <= PACKED_K;                                           \
    pair *pairs = NULL;                                                                                       \
    (void)worker;                                                                                             \
    if (!packed && k > INSERT_K) {                                                                            \
      pairs = moe_scratch(1, 2 * n * (int64_t)sizeof(pair));                                                  \
      if (pairs == NULL) {                                                                                    \
        atomic_store(&b->no_memory, true);                                                                    \
        return;                                                                                               \
      }                                                                                                       \
    }                                                                                                         \
    for (int64_t row = begin; row < end; row++) {                                                             \
      const T *restrict x = (const T *)b->x + row * n;                                                        \
      int64_t at[INSERT_K], *index = b->index + row * k;                                                      \
      const pair *sorted = NULL;                                                                              \
      if (packed) {                                                                                           \
        int64_t p[PACKED_N];                                                                                  \
        for (int64_t i = 0; i < n; i++)                                                                       \
          p[i] = (int64_t)((uint64_t)(RANK_##SFX(x[i]) ^ flip) << 32 | (uint64_t)i);                          \
        choose_packed(p, n, k, at);                                                                           \
      } else if (pairs == NULL) {                                                                             \
        choose_few_##SFX(x, n, k, flip, at);                                                                  \
      } else {                                                                                                \
        for (int64_t i = 0; i < n; i++)                                                                       \
          pairs[i] = (pair){(uint64_t)(RANK_##SFX(x[i]) ^ flip) ^ (uint64_t)INT64_MIN, i};                    \
        sorted = sort_pairs(pairs, pairs + n, n);                                                             \
      }                                                                                                       \
      for (int64_t c = 0; c < k; c++) {                                                                       \
        int64_t i = sorted ? sorted[c].at : at[c];                                                            \
        index[c] = i + b->base;                                                                               \
        if (b->value) ((T *)b->value)[row * k + c] = x[i];                                                    \
      }                                                                                                       \
    }                                                                                                         \
  }

TOPK(f32, float)
TOPK(f64, double)
TOPK(i64, int64_t)

moe_status MOE_CPU(topk)(void *value, int64_t *index, const void *x, int64_t rows, int64_t n, int64_t k, moe_dtype dt,
                         bool largest, int64_t base) {
  moe_range_fn *fn = dt == MOE_f32 ? topk_f32 : dt == MOE_f64 ? topk_f64 : dt == MOE_i64 ? topk_i64 : NULL;
  if (fn == NULL) return moe_fail(MOE_EDEVICE, "no kernel 'topk' for %s on cpu", moe_dtype_name(dt));
  job b = {.value = value, .index = index, .x = x, .n = n, .k = k, .base = base, .largest = largest};
  if (k == 0) return MOE_OK;
  moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / (n * MOE_MIN(k, 8))), fn, &b);
  return atomic_load(&b.no_memory) ? moe_fail(MOE_ENOMEM, "out of memory while sorting") : MOE_OK;
}

typedef struct put_job {
  void *gx;
  const void *g;
  const int64_t *index;
  int64_t n, k, base;
} put_job;

#define PUT(SFX, T)                                                                        \
  static void put_##SFX(void *arg, int64_t begin, int64_t end, int worker) {               \
    const put_job *b = arg;                                                                \
    (void)worker;                                                                          \
    for (int64_t row = begin; row < end; row++) {                                          \
      T *gx = (T *)b->gx + row * b->n;                                                     \
      const T *g = (const T *)b->g + row * b->k;                                           \
      const int64_t *index = b->index + row * b->k;                                        \
      memset(gx, 0, (size_t)b->n * sizeof(T));                                             \
      for (int64_t c = 0; c < b->k; c++) {                                                 \
        int64_t i = index[c] - b->base;                                                    \
        if (i >= 0 && i < b->n) gx[i] = g[c]; /* the user may have written over the index */ \
      }                                                                                    \
    }                                                                                      \
  }

PUT(f32, float)
PUT(f64, double)

moe_status MOE_CPU(put_rows)(void *gx, const void *g, const int64_t *index, int64_t rows, int64_t n, int64_t k,
                             moe_dtype dt, int64_t base) {
  moe_range_fn *fn = dt == MOE_f32 ? put_f32 : dt == MOE_f64 ? put_f64 : NULL;
  if (fn == NULL) return moe_fail(MOE_EDEVICE, "no kernel 'put_rows' for %s on cpu", moe_dtype_name(dt));
  put_job b = {gx, g, index, n, k, base};
  if (n > 0) moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / n), fn, &b);
  return MOE_OK;
}
