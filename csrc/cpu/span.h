/* Elementwise kernels over an iterator: whatever the strides, the kernel's inner loop sees spans in which the
** output is contiguous and every input is contiguous or one repeated value. Other strides go through small
** buffers. Cut into tasks of MOE_GRAIN elements.
*/
#ifndef MOE_CPU_SPAN_H
#define MOE_CPU_SPAN_H

#include <string.h>

#include "cpu/cpu.h"

/* ptr[0] output, the others inputs; bit k of `repeated`: operand k is one value for the whole span */
typedef struct span_job span_job;
typedef void span_fn(const span_job *j, int64_t n, char *const *ptr, unsigned repeated);

struct span_job {
  const moe_iter *it;
  span_fn *run;
  void (*fn)(void); /* the typed inner loop, cast by `run` */
  double p, q;      /* its parameters */
  int64_t esize[MOE_ITER_OPERANDS];
};

enum { SPAN_BLOCK = 256, SPAN_SHORT = 32 };

static void span_gather(char *restrict d, const char *restrict s, int64_t n, int64_t step, int64_t esize) {
#define SPAN_COPY(type)                                                     \
  do {                                                                      \
    for (int64_t i = 0; i < n; i++) ((type *)d)[i] = ((const type *)s)[i * step]; \
  } while (0)
  if (esize == 4) SPAN_COPY(uint32_t);
  else if (esize == 8) SPAN_COPY(uint64_t);
  else if (esize == 1) SPAN_COPY(uint8_t);
  else SPAN_COPY(uint16_t);
#undef SPAN_COPY
}

static void span_scatter(char *restrict d, const char *restrict s, int64_t n, int64_t step, int64_t esize) {
#define SPAN_COPY(type)                                                     \
  do {                                                                      \
    for (int64_t i = 0; i < n; i++) ((type *)d)[i * step] = ((const type *)s)[i]; \
  } while (0)
  if (esize == 4) SPAN_COPY(uint32_t);
  else if (esize == 8) SPAN_COPY(uint64_t);
  else if (esize == 1) SPAN_COPY(uint8_t);
  else SPAN_COPY(uint16_t);
#undef SPAN_COPY
}

static inline void span_seek(const moe_iter *it, int64_t pos, int64_t *at) {
  for (int d = 0; d < it->ndim; d++) {
    at[d] = pos % it->shape[d];
    pos /= it->shape[d];
  }
}

static inline void span_advance(const moe_iter *it, int64_t n, int64_t *at) { /* n <= what is left of dimension 0 */
  at[0] += n;
  for (int d = 0; d + 1 < it->ndim && at[d] == it->shape[d]; d++) {
    at[d] = 0;
    at[d + 1]++;
  }
}

static inline char *span_at(const span_job *j, int k, const int64_t *at) {
  int64_t off = 0;
  for (int d = 0; d < j->it->ndim; d++) off += at[d] * j->it->stride[k][d];
  return (char *)j->it->ptr[k] + off * j->esize[k];
}

/* Whether operand k lies in the order of the walk, without gaps. */
static inline _Bool span_linear(const moe_iter *it, int k) {
  int64_t step = 1;
  for (int d = 0; d < it->ndim; step *= it->shape[d++])
    if (it->stride[k][d] != step) return 0;
  return 1;
}

static void span_rows(const span_job *j, int64_t begin, int64_t end, unsigned repeated) {
  int64_t at[MOE_MAX_DIM] = {0};
  span_seek(j->it, begin, at);
  while (begin < end) {
    char *p[MOE_ITER_OPERANDS];
    int64_t n = MOE_MIN(end - begin, j->it->ndim ? j->it->shape[0] - at[0] : 1);
    for (int k = 0; k < j->it->noperands; k++) p[k] = span_at(j, k, at);
    j->run(j, n, p, repeated);
    begin += n;
    if (begin < end) span_advance(j->it, n, at);
  }
}

static void span_blocks(const span_job *j, int64_t begin, int64_t end) {
  const moe_iter *it = j->it;
  _Alignas(64) char buf[MOE_ITER_OPERANDS][SPAN_BLOCK * 8];
  _Bool linear[MOE_ITER_OPERANDS];
  int64_t at[MOE_MAX_DIM] = {0}, back[MOE_MAX_DIM];
  for (int k = 0; k < it->noperands; k++) linear[k] = span_linear(it, k);
  span_seek(it, begin, at);
  for (int64_t n; begin < end; begin += n) {
    char *p[MOE_ITER_OPERANDS];
    n = MOE_MIN(end - begin, SPAN_BLOCK);
    memcpy(back, at, sizeof back);
    for (int k = 0; k < it->noperands; k++)
      p[k] = linear[k] ? (char *)it->ptr[k] + begin * j->esize[k] : buf[k];
    for (int64_t done = 0, m; done < n; done += m) {
      m = MOE_MIN(n - done, it->shape[0] - at[0]);
      for (int k = 1; k < it->noperands; k++)
        if (!linear[k]) span_gather(buf[k] + done * j->esize[k], span_at(j, k, at), m, it->stride[k][0], j->esize[k]);
      span_advance(it, m, at);
    }
    j->run(j, n, p, 0);
    if (linear[0]) continue;
    for (int64_t done = 0, m; done < n; done += m) {
      m = MOE_MIN(n - done, it->shape[0] - back[0]);
      span_scatter(span_at(j, 0, back), buf[0] + done * j->esize[0], m, it->stride[0][0], j->esize[0]);
      span_advance(it, m, back);
    }
  }
}

static void span_task(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  const span_job *j = arg;
  const moe_iter *it = j->it;
  unsigned repeated = 0;
  _Bool plain = it->ndim <= 1 || it->shape[0] >= SPAN_SHORT;
  for (int k = 0; it->ndim && k < it->noperands; k++) {
    int64_t st = it->stride[k][0];
    if (st == 0 && k > 0) repeated |= 1u << k;
    else if (st != 1) plain = 0;
  }
  if (plain) span_rows(j, begin, end, repeated);
  else span_blocks(j, begin, end);
}

static void span_run(span_job *j) {
  if (j->it->numel <= MOE_GRAIN) {
    if (j->it->numel > 0) span_task(j, 0, j->it->numel, 0);
  } else moe_parallel_range(j->it->numel, MOE_GRAIN, span_task, j);
}

/* Every operand contiguous and small: the call needs no walk. */
static inline _Bool span_tiny(const moe_iter *it) {
  if (it->numel > MOE_GRAIN) return 0;
  if (it->ndim > 1) return 0;
  for (int k = 0; it->ndim && k < it->noperands; k++)
    if (it->stride[k][0] != 1) return 0;
  return 1;
}

#endif
