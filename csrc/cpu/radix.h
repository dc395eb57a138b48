/* A stable radix sort of positions by key, for lists that are short beside the range of their keys. */
#ifndef MOE_CPU_RADIX_H
#define MOE_CPU_RADIX_H

#include <stdint.h>
#include <string.h>

enum { MOE_RADIX_BITS = 11 };

/* One pass, stable: out [n] <- in [n] (NULL: 0 .. n - 1) in order of the bits `mask` of key[in] >> shift. `count`
** has room for `buckets` numbers: the whole range of keys where that is about as long as the list, else 2^11. */
static inline void moe_radix_pass(int64_t *out, const int64_t *in, const int64_t *key, int64_t n, int shift, int64_t mask,
                                  int64_t *count, int64_t buckets) {
  memset(count, 0, (size_t)buckets * sizeof *count);
  for (int64_t i = 0; i < n; i++) count[key[i] >> shift & mask]++;
  int64_t at = 0;
  for (int64_t b = 0; b < buckets; b++) {
    int64_t c = count[b];
    count[b] = at;
    at += c;
  }
  for (int64_t i = 0; i < n; i++) {
    int64_t j = in ? in[i] : i;
    out[count[key[j] >> shift & mask]++] = j;
  }
}

/* The room that `count` needs for n keys of 0 .. range - 1. */
static inline int64_t moe_radix_buckets(int64_t n, int64_t range) {
  int64_t size = 1, least = 1 << MOE_RADIX_BITS;
  while (size < range) size *= 2;
  return size <= (4 * n > least ? 4 * n : least) ? size : least;
}

/* out [n] <- in [n] (NULL: 0 .. n - 1; a permutation of these) in order of key; spare [n]. */
static inline void moe_radix_sort(int64_t *out, int64_t *spare, const int64_t *in, const int64_t *key, int64_t n, int64_t range,
                                  int64_t *count) {
  int64_t buckets = moe_radix_buckets(n, range);
  int bits = 0, passes = 0;
  while ((int64_t)1 << bits < buckets) bits++;
  if (bits == 0) bits = 1;
  for (int64_t r = range - 1; passes == 0 || r > 0; r >>= bits) passes++;
  for (int p = 0; p < passes; p++) {
    int64_t *to = (passes - p) % 2 ? out : spare; /* the last pass ends in out */
    moe_radix_pass(to, in, key, n, p * bits, buckets - 1, count, buckets);
    in = to;
  }
}

#endif
