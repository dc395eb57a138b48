/* Scaled dot-product attention in blocks: a task holds the scores of one block of queries with one block of keys,
** never the T x S matrix. The products go to the BLAS on the task's thread. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vmath.h"

/* Two blocks of f32 scores fit a second-level cache of 256 KiB, and the products are large enough for the full rate. */
enum { QUERIES = 64, KEYS = 256 };

/* Strides count elements and stand for batch, head, position; the last dimension is contiguous. */
#define JOB(name, type)                                                                            \
  typedef struct name {                                                                            \
    int64_t b, h, t, s, d, dv, group; /* group: query heads a key-value head */                     \
    bool causal;                                                                                   \
    int mask_kind;                                                                                 \
    type scale;                                                                                    \
    const type *q, *k, *v, *g;                                                                     \
    const void *mask;                                                                              \
    const int64_t *limit; /* [b, h, t]: how many keys a query sees, or NULL */                      \
    type *y, *lse, *dq, *dk, *dvalue, *dmask;                                                      \
    const int64_t *sq, *sk, *sv, *sm, *sy, *sg, *sdq, *sdk, *sdv;                                  \
    atomic_bool short_of_memory;                                                                   \
  } name;

JOB(job_f32, float)
#define REAL float
#define STATIC(x) x##_f32
#define GEMM moe_gemm_f32
#define EXP vm_exp_f32
#define LOG logf
#include "cpu/attention_real.h"
#undef REAL
#undef STATIC
#undef GEMM
#undef EXP
#undef LOG

JOB(job_f64, double)
#define REAL double
#define STATIC(x) x##_f64
#define GEMM moe_gemm_f64
#define EXP exp
#define LOG log
#include "cpu/attention_real.h"

/* What both directions set. */
#define COMMON(type)                                                                                                    \
  .b = size[0], .h = size[1], .t = size[3], .s = size[4], .d = size[5], .dv = size[6], .group = size[1] / size[2],      \
  .causal = causal, .mask_kind = mask_kind, .scale = (type)scale, .q = q, .k = k, .v = v, .mask = mask, .limit = seen, .sq = sq, \
  .sk = sk, .sv = sv, .sm = sm, .y = y, .sy = sy, .lse = lse

moe_status MOE_CPU(attention)(moe_dtype dt, void *y, void *lse, const void *q, const void *k, const void *v, const void *mask,
                              const int64_t *size, const int64_t *sy, const int64_t *sq, const int64_t *sk, const int64_t *sv,
                              const int64_t *sm, int mask_kind, bool causal, const int64_t *seen, double scale) {
  int64_t tasks = size[0] * size[1] * ((size[3] + QUERIES - 1) / QUERIES);
  int64_t work = MOE_MIN(size[3], QUERIES) * size[4] * (size[5] + size[6]), grain = MOE_MAX(1, MOE_GRAIN * 8 / MOE_MAX(work, 1));
  bool short_of_memory;
  if (dt == MOE_f64) {
    job_f64 j = {COMMON(double)};
    moe_parallel_range(tasks, grain, forward_range_f64, &j);
    short_of_memory = j.short_of_memory;
  } else {
    job_f32 j = {COMMON(float)};
    moe_parallel_range(tasks, grain, forward_range_f32, &j);
    short_of_memory = j.short_of_memory;
  }
  return short_of_memory ? moe_fail(MOE_ENOMEM, "attention: no memory for a block of scores") : MOE_OK;
}

moe_status MOE_CPU(attention_backward)(moe_dtype dt, void *dq, void *dk, void *dv, void *dmask, const void *g, void *y, void *lse,
                                       const void *q, const void *k, const void *v, const void *mask, const int64_t *size,
                                       const int64_t *sdq, const int64_t *sdk, const int64_t *sdv, const int64_t *sg,
                                       const int64_t *sy, const int64_t *sq, const int64_t *sk, const int64_t *sv,
                                       const int64_t *sm, int mask_kind, bool causal, const int64_t *seen, double scale) {
  int64_t tasks = size[0] * size[2];
  int64_t work = size[1] / size[2] * size[3] * size[4] * (size[5] + size[6]);
  int64_t grain = MOE_MAX(1, MOE_GRAIN * 4 / MOE_MAX(work, 1));
  bool short_of_memory;
  if (dt == MOE_f64) {
    job_f64 j = {COMMON(double), .g = g, .sg = sg, .dq = dq, .dk = dk, .dvalue = dv,
                .sdq = sdq, .sdk = sdk, .sdv = sdv, .dmask = dmask};
    moe_parallel_range(tasks, grain, backward_range_f64, &j);
    short_of_memory = j.short_of_memory;
  } else {
    job_f32 j = {COMMON(float), .g = g, .sg = sg, .dq = dq, .dk = dk, .dvalue = dv,
                .sdq = sdq, .sdk = sdk, .sdv = sdv, .dmask = dmask};
    moe_parallel_range(tasks, grain, backward_range_f32, &j);
    short_of_memory = j.short_of_memory;
  }
  return short_of_memory ? moe_fail(MOE_ENOMEM, "attention: no memory for a block of scores") : MOE_OK;
}
