/* Sequences and random numbers. Philox block b holds the words 4b .. 4b+3; of a draw that starts at block s
** an element of one word, i, takes word i of the words from s on, an element of two words takes words 2i, 2i+1.
**   uniform f32  24 bits of a word            uniform f64  53 bits of two words
**   normal       Box & Muller (1958), elements 2j and 2j+1 from the words (f32) or word pairs (f64) of both
*/
#include <stdlib.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

enum { CHUNK = 64 }; /* blocks drawn at a time: 256 words */

/* `count` <= CHUNK blocks from `block` on, as their words in order. Same numbers as moe_philox. */
static void words_of(uint32_t *restrict w, uint64_t seed, uint64_t block, int count) {
  uint32_t a[CHUNK], b[CHUNK], x[CHUNK], y[CHUNK];
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < CHUNK; i++) {
    a[i] = (uint32_t)(block + (uint64_t)i);
    b[i] = (uint32_t)((block + (uint64_t)i) >> 32);
    x[i] = y[i] = 0;
  }
  for (int round = 0; round < 10; round++) {
#pragma omp simd
    for (int i = 0; i < CHUNK; i++) {
      uint64_t p0 = (uint64_t)0xD2511F53u * a[i], p1 = (uint64_t)0xCD9E8D57u * x[i];
      uint32_t h0 = (uint32_t)(p0 >> 32), h1 = (uint32_t)(p1 >> 32);
      a[i] = h1 ^ b[i] ^ k0;
      b[i] = (uint32_t)p1;
      x[i] = h0 ^ y[i] ^ k1;
      y[i] = (uint32_t)p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < count; i++) {
    w[4 * i] = a[i];
    w[4 * i + 1] = b[i];
    w[4 * i + 2] = x[i];
    w[4 * i + 3] = y[i];
  }
}

static inline double unit53(uint32_t hi, uint32_t lo) { /* [0, 1) */
  return (double)(((uint64_t)hi << 32 | lo) >> 11) * 0x1p-53;
}

/* One draw: `body` fills elements [first, first + n) from their words; per: elements a chunk serves. */
typedef struct draw draw;
struct draw {
  void (*body)(const draw *d, int64_t first, int64_t n, const uint32_t *w);
  void *y;
  const void *x;
  double a, b;
  int64_t low;
  uint64_t span, seed, block;
  int64_t n, per;
};

static void draw_chunks(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const draw *d = arg;
  uint32_t w[4 * CHUNK];
  for (int64_t k = begin; k < end; k++) {
    int64_t first = k * d->per, n = MOE_MIN(d->n - first, d->per);
    words_of(w, d->seed, d->block + (uint64_t)(k * CHUNK), CHUNK);
    d->body(d, first, n, w);
  }
}

static moe_status run_draw(draw *d) {
  int64_t chunks = (d->n + d->per - 1) / d->per;
  moe_parallel_range(chunks, MOE_GRAIN / (4 * CHUNK), draw_chunks, d);
  return MOE_OK;
}

/* --- uniform, normal --- */

static void uniform_f32(const draw *d, int64_t first, int64_t n, const uint32_t *w) {
  float *y = (float *)d->y + first;
  float a = (float)d->a, b = (float)d->b, width = b - a;
  for (int64_t i = 0; i < n; i++) {
    float v = a + width * ((float)(int32_t)(w[i] >> 8) * 0x1p-24f);
    y[i] = v < b ? v : a; /* rounding may reach b */
  }
}

static void uniform_f64(const draw *d, int64_t first, int64_t n, const uint32_t *w) {
  double *y = (double *)d->y + first;
  for (int64_t i = 0; i < n; i++) {
    double v = d->a + (d->b - d->a) * unit53(w[2 * i], w[2 * i + 1]);
    y[i] = v < d->b ? v : d->a;
  }
}

static void normal_f32(const draw *d, int64_t first, int64_t n, const uint32_t *w) {
  float s[2 * CHUNK], c[2 * CHUNK];
#pragma omp simd
  for (int j = 0; j < 2 * CHUNK; j++) {
    float u = ((float)(int32_t)(w[2 * j] >> 1) + 0.5f) * 0x1p-31f; /* (0, 1]: the logarithm is finite */
    float r = sqrtf(-2.0f * vm_log_f32(u));
    float sj, cj;
    vm_sincos_turn((float)(int32_t)w[2 * j + 1] * 0x1p-32f, &sj, &cj);
    s[j] = r * sj;
    c[j] = r * cj;
  }
  float *y = (float *)d->y + first;
  float mean = (float)d->a, dev = (float)d->b;
  for (int64_t i = 0; i < n; i++) y[i] = mean + dev * (i & 1 ? s[i / 2] : c[i / 2]);
}

static void normal_f64(const draw *d, int64_t first, int64_t n, const uint32_t *w) {
  double *y = (double *)d->y + first;
  for (int64_t i = 0; i < n; i += 2) {
    double u = 1.0 - unit53(w[2 * i], w[2 * i + 1]), t = 6.28318530717958647693 * unit53(w[2 * i + 2], w[2 * i + 3]);
    double r = sqrt(-2.0 * log(u));
    y[i] = d->a + d->b * (r * cos(t));
    if (i + 1 < n) y[i + 1] = d->a + d->b * (r * sin(t));
  }
}

moe_status MOE_CPU(random_uniform)(void *y, int64_t n, moe_dtype dt, double a, double b, uint64_t seed, uint64_t block) {
  bool wide = dt == MOE_f64;
  return run_draw(&(draw){.body = wide ? uniform_f64 : uniform_f32, .y = y, .a = a, .b = b, .seed = seed, .block = block,
                          .n = n, .per = wide ? 2 * CHUNK : 4 * CHUNK});
}

moe_status MOE_CPU(random_normal)(void *y, int64_t n, moe_dtype dt, double mean, double std, uint64_t seed, uint64_t block) {
  bool wide = dt == MOE_f64;
  return run_draw(&(draw){.body = wide ? normal_f64 : normal_f32, .y = y, .a = mean, .b = std, .seed = seed, .block = block,
                          .n = n, .per = wide ? 2 * CHUNK : 4 * CHUNK});
}

/* --- integers: the high half of a 64 x 64 bit product; biased by less than span / 2^64 --- */

static void integers(const draw *d, int64_t first, int64_t n, const uint32_t *w) {
  int64_t *y = (int64_t *)d->y + first;
  for (int64_t i = 0; i < n; i++) {
    uint64_t v = (uint64_t)w[2 * i] << 32 | w[2 * i + 1];
    if (d->span != 0) v = (uint64_t)((unsigned __int128)v * d->span >> 64);
    y[i] = (int64_t)((uint64_t)d->low + v);
  }
}

moe_status MOE_CPU(random_int)(int64_t *y, int64_t n, int64_t low, uint64_t span, uint64_t seed, uint64_t block) {
  return run_draw(&(draw){.body = integers, .y = y, .low = low, .span = span, .seed = seed, .block = block, .n = n, .per = 2 * CHUNK});
}

/* --- bernoulli, dropout --- */

#define CHOICES(type, T)                                                                                \
  static void bernoulli_##type(const draw *d, int64_t first, int64_t n, const uint32_t *w) {             \
    T *y = (T *)d->y + first;                                                                           \
    const T *p = (const T *)d->x + first;                                                               \
    for (int64_t i = 0; i < n; i++) y[i] = (T)((float)(int32_t)(w[i] >> 8) * 0x1p-24f) < p[i] ? 1 : 0;   \
  }                                                                                                     \
  static void dropout_##type(const draw *d, int64_t first, int64_t n, const uint32_t *w) {               \
    T *y = (T *)d->y + first;                                                                           \
    const T *x = (const T *)d->x + first;                                                               \
    T scale = (T)d->b;                                                                                  \
    float p = (float)d->a;                                                                              \
    for (int64_t i = 0; i < n; i++) y[i] = (float)(int32_t)(w[i] >> 8) * 0x1p-24f >= p ? x[i] * scale : 0; \
  }                                                                                                     \
  static int64_t bad_probability_##type(const T *p, int64_t n) {                                        \
    for (int64_t i = 0; i < n; i++)                                                                     \
      if (!(p[i] >= 0 && p[i] <= 1)) return i;                                                          \
    return -1;                                                                                          \
  }
CHOICES(f32, float)
CHOICES(f64, double)

moe_status MOE_CPU(random_bernoulli)(void *y, const void *p, int64_t n, moe_dtype dt, uint64_t seed, uint64_t block) {
  int64_t bad = dt == MOE_f32 ? bad_probability_f32(p, n) : bad_probability_f64(p, n);
  if (bad >= 0)
    return moe_fail(MOE_EINVAL, "element %lld of p is %g: a probability lies in [0, 1]", (long long)bad + 1,
                    moe_load_f64((const char *)p + bad * moe_dtype_size(dt), dt));
  return run_draw(&(draw){.body = dt == MOE_f32 ? bernoulli_f32 : bernoulli_f64, .y = y, .x = p, .seed = seed,
                          .block = block, .n = n, .per = 4 * CHUNK});
}

moe_status MOE_CPU(dropout)(void *y, const void *x, int64_t n, moe_dtype dt, double p, uint64_t seed, uint64_t block) {
  return run_draw(&(draw){.body = dt == MOE_f32 ? dropout_f32 : dropout_f64, .y = y, .x = x, .a = p,
                          .b = p < 1 ? 1 / (1 - p) : 0, .seed = seed, .block = block, .n = n, .per = 4 * CHUNK});
}

/* --- sequence --- */

typedef struct steps {
  void *y;
  moe_dtype dt;
  double start, step;
} steps;

static void sequence_range(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const steps *s = arg;
  if (s->dt == MOE_f32)
    for (int64_t i = begin; i < end; i++) ((float *)s->y)[i] = (float)(s->start + (double)i * s->step);
  else if (s->dt == MOE_f64)
    for (int64_t i = begin; i < end; i++) ((double *)s->y)[i] = s->start + (double)i * s->step;
  else
    for (int64_t i = begin; i < end; i++) {
      double v = s->start + (double)i * s->step;
      ((int64_t *)s->y)[i] = moe_load_i64(&v, MOE_f64);
    }
}

moe_status MOE_CPU(sequence)(void *y, int64_t n, moe_dtype dt, double start, double step) {
  moe_parallel_range(n, MOE_GRAIN, sequence_range, &(steps){y, dt, start, step});
  return MOE_OK;
}

/* --- multinomial --- */

typedef struct lottery {
  int64_t *index;
  const double *weight;
  int64_t n, k, base;
  bool replacement;
  uint64_t seed, block;
  _Atomic bool *short_of; /* set when memory is short */
} lottery;

typedef struct ticket {
  double key;
  int64_t pos;
} ticket;

static int by_key(const void *a, const void *b) {
  const ticket *x = a, *y = b;
  if (x->key != y->key) return x->key < y->key ? -1 : 1;
  return (x->pos > y->pos) - (x->pos < y->pos);
}

static double unit_at(const lottery *l, int64_t i) { /* the i-th pair of words */
  moe_philox4 p = moe_philox(l->seed, l->block + (uint64_t)i / 2);
  return unit53(p.v[i & 1 ? 2 : 0], p.v[i & 1 ? 3 : 1]);
}

/* With putting back: the place of u * total among the running sums. */
static void draw_again(const lottery *l, int64_t row, double *sum) {
  const double *w = l->weight + row * l->n;
  double total = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < l->n; i++) {
    sum[i] = total += w[i];
    if (w[i] > 0) last = i;
  }
  for (int64_t j = 0; j < l->k; j++) {
    double u = unit_at(l, row * l->k + j) * total;
    int64_t lo = 0, hi = last;
    while (lo < hi) { /* the first sum above u */
      int64_t mid = lo + (hi - lo) / 2;
      if (sum[mid] > u) hi = mid;
      else lo = mid + 1;
    }
    l->index[row * l->k + j] = lo + l->base;
  }
}

/* Without: exponential clocks of rate w ring in the order of successive draws (Efraimidis & Spirakis 2006). */
static void draw_once(const lottery *l, int64_t row, ticket *t) {
  const double *w = l->weight + row * l->n;
  int64_t m = 0;
  for (int64_t i = 0; i < l->n; i++)
    if (w[i] > 0) t[m++] = (ticket){-log1p(-unit_at(l, row * l->n + i)) / w[i], i};
  qsort(t, (size_t)m, sizeof *t, by_key);
  for (int64_t j = 0; j < l->k; j++) l->index[row * l->k + j] = t[j].pos + l->base;
}

static void draw_row(void *arg, int64_t row, int worker) {
  (void)worker;
  const lottery *l = arg;
  void *room = moe_scratch(0, l->n * (int64_t)(l->replacement ? sizeof(double) : sizeof(ticket)));
  if (room == NULL) *l->short_of = true;
  else if (l->replacement) draw_again(l, row, room);
  else draw_once(l, row, room);
}

moe_status MOE_CPU(multinomial)(int64_t *index, const double *weight, int64_t rows, int64_t n, int64_t k, bool replacement,
                                uint64_t seed, uint64_t block, int64_t base) {
  for (int64_t r = 0; r < rows; r++) {
    int64_t positive = 0;
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
      double w = weight[r * n + i];
      if (!(w >= 0) || w == (double)INFINITY)
        return moe_fail(MOE_EINVAL, "probs has %g at row %lld, position %lld: weights are finite and not negative", w,
                        (long long)r + 1, (long long)i + 1);
      positive += w > 0;
      total += w;
    }
    if (positive == 0 || total == (double)INFINITY)
      return moe_fail(MOE_EINVAL, "row %lld of probs sums to %g", (long long)r + 1, total);
    if (!replacement && positive < k)
      return moe_fail(MOE_EINVAL, "row %lld of probs has %lld weights above 0, fewer than num_samples = %lld",
                      (long long)r + 1, (long long)positive, (long long)k);
  }
  _Atomic bool short_of = false;
  lottery l = {index, weight, n, k, base, replacement, seed, block, &short_of};
  moe_parallel(rows, draw_row, &l);
  return short_of ? moe_fail(MOE_ENOMEM, "out of memory") : MOE_OK;
}
