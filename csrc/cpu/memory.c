/* Lookups in tables of very many rows: sums of chosen rows, products with them, the choice by two halves of a key, and hashes
** of n-grams. What a token does not touch costs nothing.
*/
#include <math.h>
#include <stdatomic.h>

#include "cpu/cpu.h"

enum { SCRATCH = 5, BLOCK = 16, AHEAD = 2 };

static moe_status check_positions(const int64_t *index, int64_t k, int64_t n, int64_t base) {
  for (int64_t p = 0; p < k; p++) /* base - 1: none */
    if (index[p] < base - 1 || index[p] >= base + n)
      return moe_fail(MOE_EINVAL, "index %lld is outside of %lld..%lld (%lld: none)", (long long)index[p], (long long)base,
                      (long long)(base + n - 1), (long long)base - 1);
  return MOE_OK;
}

typedef struct lookup {
  void *y;
  const void *table, *x; /* x: the weights of mix, the vectors of dots */
  const int64_t *index;
  int64_t k, d, base;
} lookup;

/* Rows lie anywhere in a table far larger than the caches: the next ones are asked for while this one is worked on. */
static inline void fetch(const char *row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}

#define LOOKUPS(T)                                                                                                    \
  static void mix_##T(void *arg, int64_t begin, int64_t end, int worker) {                                            \
    (void)worker;                                                                                                     \
    const lookup *j = arg;                                                                                            \
    const int64_t d = j->d, k = j->k;                                                                                 \
    const T *table = j->table, *weight = j->x;                                                                        \
    for (int64_t t = begin; t < end; t++) {                                                                           \
      T *restrict y = (T *)j->y + t * d;                                                                              \
      const int64_t *index = j->index + t * k;                                                                        \
      for (int64_t c = 0; c < d; c++) y[c] = 0;                                                                       \
      for (int64_t i = 0; i < k; i++) {                                                                               \
        if (i + AHEAD < k && index[i + AHEAD] >= j->base)                                                             \
          fetch((const char *)(table + (index[i + AHEAD] - j->base) * d), d * (int64_t)sizeof(T));                    \
        if (index[i] < j->base) continue;                                                                             \
        const T *restrict row = table + (index[i] - j->base) * d;                                                     \
        const T w = weight[t * k + i];                                                                                \
        for (int64_t c = 0; c < d; c++) y[c] += w * row[c];                                                           \
      }                                                                                                               \
    }                                                                                                                 \
  }                                                                                                                   \
  static void dots_##T(void *arg, int64_t begin, int64_t end, int worker) {                                           \
    (void)worker;                                                                                                     \
    const lookup *j = arg;                                                                                            \
    const int64_t d = j->d, k = j->k;                                                                                 \
    const T *table = j->table;                                                                                        \
    for (int64_t t = begin; t < end; t++) {                                                                           \
      T *restrict y = (T *)j->y + t * k;                                                                              \
      const T *restrict x = (const T *)j->x + t * d;                                                                  \
      const int64_t *index = j->index + t * k;                                                                        \
      for (int64_t i = 0; i < k; i++) {                                                                               \
        if (i + AHEAD < k && index[i + AHEAD] >= j->base)                                                             \
          fetch((const char *)(table + (index[i + AHEAD] - j->base) * d), d * (int64_t)sizeof(T));                    \
        T sum = 0;                                                                                                    \
        if (index[i] >= j->base) {                                                                                    \
          const T *restrict row = table + (index[i] - j->base) * d;                                                   \
          _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < d; c++) sum += row[c] * x[c];                \
        }                                                                                                             \
        y[i] = sum;                                                                                                   \
      }                                                                                                               \
    }                                                                                                                 \
  }
LOOKUPS(float)
LOOKUPS(double)

static moe_status run(lookup *j, int64_t tokens, int64_t n, moe_range_fn *fn) {
  MOE_TRY(check_positions(j->index, tokens * j->k, n, j->base));
  int64_t work = MOE_MAX(j->k * j->d, 1);
  if (tokens > 0) moe_parallel_range(tokens, MOE_MAX(MOE_GRAIN / work, 1), fn, j);
  return MOE_OK;
}

moe_status MOE_CPU(memory_mix)(void *y, const void *values, const int64_t *index, const void *weight, int64_t tokens, int64_t k,
                               int64_t n, int64_t d, moe_dtype dt, int64_t base) {
  lookup j = {y, values, weight, index, k, d, base};
  return run(&j, tokens, n, dt == MOE_f64 ? mix_double : mix_float);
}

moe_status MOE_CPU(memory_dots)(void *y, const void *keys, const int64_t *index, const void *x, int64_t tokens, int64_t k,
                                int64_t n, int64_t d, moe_dtype dt, int64_t base) {
  lookup j = {y, keys, x, index, k, d, base};
  return run(&j, tokens, n, dt == MOE_f64 ? dots_double : dots_float);
}

/* --- the best pairs of two lists --- */

typedef struct pairs {
  void *score;
  int64_t *index, *first, *second; /* first, second: the halves' positions from 0, or NULL */
  const void *a, *b;
  int64_t n, m, k, base;
  atomic_int failed;
} pairs;

/* The pair ranked (i, j) from 0 within its halves is beaten by the (i + 1) (j + 1) - 1 pairs that rank no lower in both: only
** those with (i + 1) (j + 1) <= k can be among the k best. Sums are taken in double, so that for f32 they keep the order of
** their terms (a sum that two terms round to the same float would hide who is better), and equal sums go to the lowest slot. */
#define PAIRS(T)                                                                                                      \
  /* the k best of those of x that are not below `least`, in order; of equals the first, NaN as the least of all */   \
  static void take_##T(int64_t *restrict at, T *restrict value, const T *restrict x, int64_t n, int64_t k, T least) { \
    int64_t have = 0;                                                                                                 \
    for (int64_t e = 0; e < n;) {                                                                                     \
      if (e + BLOCK <= n) { /* most blocks hold nothing that is good enough */                                        \
        int any = 0;                                                                                                  \
        for (int64_t l = 0; l < BLOCK; l++) any |= !(x[e + l] < least);                                               \
        if (!any) {                                                                                                   \
          e += BLOCK;                                                                                                 \
          continue;                                                                                                   \
        }                                                                                                             \
      }                                                                                                               \
      for (int64_t stop = MOE_MIN(e + BLOCK, n); e < stop; e++) {                                                     \
        if (x[e] < least) continue;                                                                                   \
        T v = x[e] == x[e] ? x[e] : -(T)INFINITY;                                                                     \
        if (have == k && !(v > value[k - 1])) continue;                                                               \
        int64_t i = have < k ? have++ : k - 1;                                                                        \
        for (; i > 0 && v > value[i - 1]; i--) {                                                                      \
          value[i] = value[i - 1];                                                                                    \
          at[i] = at[i - 1];                                                                                          \
        }                                                                                                             \
        value[i] = v;                                                                                                 \
        at[i] = e;                                                                                                    \
      }                                                                                                               \
    }                                                                                                                 \
  }                                                                                                                   \
  /* The k-th best of the blocks' maxima is no more than the k-th best of all: a bound that leaves little to sort. */ \
  static void best_##T(int64_t *restrict at, T *restrict value, const T *restrict x, int64_t n, int64_t k, T *top) {  \
    int64_t blocks = n / BLOCK;                                                                                       \
    T least = -(T)INFINITY;                                                                                           \
    if (blocks >= 2 * k) {                                                                                            \
      for (int64_t c = 0; c < blocks; c++) {                                                                          \
        T most = -(T)INFINITY;                                                                                        \
        for (int64_t l = 0; l < BLOCK; l++) most = x[c * BLOCK + l] > most ? x[c * BLOCK + l] : most;                 \
        top[c] = most;                                                                                                \
      }                                                                                                               \
      take_##T(at, value, top, blocks, k, least);                                                                     \
      least = value[k - 1];                                                                                           \
    }                                                                                                                 \
    take_##T(at, value, x, n, k, least);                                                                              \
  }                                                                                                                   \
  static void pairs_##T(void *arg, int64_t begin, int64_t end, int worker) {                                          \
    (void)worker;                                                                                                     \
    pairs *p = arg;                                                                                                   \
    const int64_t n = p->n, m = p->m, k = p->k, ka = MOE_MIN(k, n), kb = MOE_MIN(k, m);                               \
    int64_t places = ka + kb, blocks = MOE_MAX(n, m) / BLOCK;                                                         \
    char *room = moe_scratch(SCRATCH, k * 16 + places * (int64_t)(8 + sizeof(T)) + blocks * (int64_t)sizeof(T));      \
    if (room == NULL) {                                                                                               \
      atomic_store(&p->failed, 1);                                                                                    \
      return;                                                                                                         \
    }                                                                                                                 \
    double *sum = (double *)(void *)room;                                                                             \
    int64_t *slot = (int64_t *)(sum + k), *ia = slot + k, *ib = ia + ka;                                              \
    T *va = (T *)(ib + kb), *vb = va + ka, *top = vb + kb;                                                            \
    for (int64_t t = begin; t < end; t++) {                                                                           \
      const T *a = (const T *)p->a + t * n, *b = (const T *)p->b + t * m;                                             \
      best_##T(ia, va, a, n, ka, top);                                                                                \
      best_##T(ib, vb, b, m, kb, top);                                                                                \
      int64_t have = 0;                                                                                               \
      for (int64_t i = 0; i < ka; i++) {                                                                              \
        for (int64_t j = 0; j < kb && (i + 1) * (j + 1) <= k; j++) {                                                  \
          double v = (double)va[i] + (double)vb[j];                                                                   \
          int64_t s = ia[i] * m + ib[j];                                                                              \
          if (v != v) v = -(double)INFINITY;                                                                          \
          if (have == k && !(v > sum[k - 1] || (v == sum[k - 1] && s < slot[k - 1]))) continue;                       \
          int64_t at = have < k ? have++ : k - 1;                                                                     \
          for (; at > 0 && (v > sum[at - 1] || (v == sum[at - 1] && s < slot[at - 1])); at--) {                       \
            sum[at] = sum[at - 1];                                                                                    \
            slot[at] = slot[at - 1];                                                                                  \
          }                                                                                                           \
          sum[at] = v;                                                                                                \
          slot[at] = s;                                                                                               \
        }                                                                                                             \
      }                                                                                                               \
      for (int64_t c = 0; c < k; c++) {                                                                               \
        int64_t i = slot[c] / m, j = slot[c] % m;                                                                     \
        ((T *)p->score)[t * k + c] = a[i] + b[j];                                                                     \
        p->index[t * k + c] = slot[c] + p->base;                                                                      \
        if (p->first) p->first[t * k + c] = i;                                                                        \
        if (p->second) p->second[t * k + c] = j;                                                                      \
      }                                                                                                               \
    }                                                                                                                 \
  }
PAIRS(float)
PAIRS(double)

moe_status MOE_CPU(product_key_topk)(void *score, int64_t *index, int64_t *first, int64_t *second, const void *a, const void *b,
                                     int64_t rows, int64_t n, int64_t m, int64_t k, moe_dtype dt, int64_t base) {
  pairs p = {.score = score, .index = index, .first = first, .second = second, .a = a, .b = b, .n = n, .m = m, .k = k, .base = base};
  if (rows > 0 && k > 0)
    moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / (n + m + k)), dt == MOE_f64 ? pairs_double : pairs_float, &p);
  return p.failed ? moe_fail(MOE_ENOMEM, "out of memory for the best pairs") : MOE_OK;
}

/* --- hashes of n-grams --- */

typedef struct hashes {
  int64_t *index;
  const int64_t *ids, *multiplier, *size;
  int64_t time, orders, heads, base;
} hashes;

static void hash_row(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const hashes *h = arg;
  int64_t width = h->orders * h->heads;
  for (int64_t r = begin; r < end; r++) {
    const int64_t *ids = h->ids + r * h->time;
    for (int64_t t = 0; t < h->time; t++) {
      int64_t *out = h->index + (r * h->time + t) * width, offset = h->base;
      uint64_t mixed = 0;
      for (int64_t back = 0; back <= h->orders; back++) { /* ids count from 1; 0 stands before the start */
        uint64_t id = t >= back ? (uint64_t)(ids[t - back] - h->base + 1) : 0;
        mixed ^= id * (uint64_t)h->multiplier[back];
        for (int64_t c = 0; back > 0 && c < h->heads; c++) {
          int64_t size = h->size[(back - 1) * h->heads + c];
          *out++ = offset + (int64_t)(mixed % (uint64_t)size);
          offset += size;
        }
      }
    }
  }
}

moe_status MOE_CPU(ngram_hash)(int64_t *index, const int64_t *ids, int64_t rows, int64_t time, const int64_t *multiplier,
                               const int64_t *size, int64_t orders, int64_t heads, int64_t base) {
  hashes h = {index, ids, multiplier, size, time, orders, heads, base};
  if (rows * time > 0) moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / 8 / (time * orders * heads)), hash_row, &h);
  return MOE_OK;
}
