/* The selective scan on the CPU: how it is cut, and the slots. The arithmetic is in selective_real.h. */
#include <stdatomic.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"
#include "tensor/selective.h"

enum { SCRATCH = 4 }; /* the scratch slot of these kernels */

/* The work of a task: channels [c0, c1) of one group of one sequence; `index`: which part of the group they are. */
typedef struct scan_part {
  int64_t seq, group, index, c0, c1;
} scan_part;

typedef struct scan_job {
  const moe_selective *s;
  const moe_selective_grads *q;
  void *y, *last, *kept; /* kept [chunks, width, states]: the states at the beginning of each chunk, or NULL */
  void *gb, *gc;         /* [parts, rows, groups, states] */
  void *ga, *gd, *gbias; /* [sequences, channels (, states)] */
  int64_t width;         /* lanes of a position: channels rounded up within each group */
  int64_t (*column)(const moe_selective *s, int64_t group, int64_t c0);
  atomic_int failed;
} scan_job;

/* Blocks of `lanes` channels within a group, and into how many parts they are cut: enough for 16 tasks, by shape alone. */
static int64_t blocks_of(const moe_selective *s, int64_t lanes) { return (s->channels / s->groups + lanes - 1) / lanes; }

static int64_t parts_of(const moe_selective *s, int64_t lanes) {
  int64_t wanted = 16 / MOE_MAX(1, s->sequences * s->groups);
  return MOE_MAX(1, MOE_MIN(blocks_of(s, lanes), MOE_MAX(2, wanted)));
}

static scan_part part_of(const moe_selective *s, int64_t i, int64_t lanes) {
  int64_t parts = parts_of(s, lanes), blocks = blocks_of(s, lanes), each = s->channels / s->groups;
  scan_part p = {.index = i % parts, .group = i / parts % s->groups, .seq = i / parts / s->groups};
  p.c0 = p.group * each + p.index * blocks / parts * lanes;
  p.c1 = p.group * each + MOE_MIN(each, (p.index + 1) * blocks / parts * lanes);
  return p;
}

static inline int64_t column_of(const moe_selective *s, int64_t group, int64_t c0, int64_t lanes) {
  return group * blocks_of(s, lanes) * lanes + (c0 - group * (s->channels / s->groups));
}

#define REAL float
#define R(x) x##_f32
#define VM1(name) VM(name, f32)
#include "cpu/selective_real.h"
#undef REAL
#undef R
#undef VM1

#define REAL double
#define R(x) x##_f64
#define VM1(name) VM(name, f64)
#include "cpu/selective_real.h"
#undef REAL
#undef R
#undef VM1

static int64_t column_f32(const moe_selective *s, int64_t group, int64_t c0) { return column_of(s, group, c0, W_f32); }
static int64_t column_f64(const moe_selective *s, int64_t group, int64_t c0) { return column_of(s, group, c0, W_f64); }

static int64_t lanes_of(const moe_selective *s) { return s->dtype == MOE_f64 ? W_f64 : W_f32; }

static scan_job job_of(const moe_selective *s) {
  int64_t lanes = lanes_of(s);
  return (scan_job){.s = s, .width = s->groups * blocks_of(s, lanes) * lanes, .column = s->dtype == MOE_f64 ? column_f64 : column_f32};
}

static moe_status finish(const scan_job *j) {
  return j->failed ? moe_fail(MOE_ENOMEM, "out of memory for the scratch space of a scan") : MOE_OK;
}

moe_status MOE_CPU(scan_width)(int64_t *width, const moe_selective *s) {
  *width = job_of(s).width;
  return MOE_OK;
}

moe_status MOE_CPU(selective_scan)(void *y, void *last, void *kept, const moe_selective *s) {
  scan_job j = job_of(s);
  j.y = y;
  j.last = last;
  j.kept = kept;
  moe_parallel(s->sequences * s->groups * parts_of(s, lanes_of(s)), s->dtype == MOE_f64 ? forward_task_f64 : forward_task_f32, &j);
  return finish(&j);
}

moe_status MOE_CPU(selective_scan_bwd)(const moe_selective_grads *q, const void *kept, const moe_selective *s) {
  int64_t size = moe_dtype_size(s->dtype), parts = parts_of(s, lanes_of(s)), n = s->rows * s->groups * s->states;
  int64_t bc = parts * n * size, weights = s->sequences * s->channels * (s->states + 2) * size;
  scan_job j = job_of(s);
  j.q = q;
  j.kept = (void *)(uintptr_t)kept;
  char *sums = moe_mem_alloc(moe_cpu(), 2 * bc), *by_sequence = moe_mem_alloc(moe_cpu(), weights);
  moe_status st = MOE_ENOMEM;
  if (sums && by_sequence) {
    int64_t states = s->sequences * s->channels * s->states * size, channels = s->sequences * s->channels * size;
    j.gb = sums;
    j.gc = sums + bc;
    j.ga = by_sequence;
    j.gd = by_sequence + states;
    j.gbias = by_sequence + states + channels;
    moe_parallel(s->sequences * s->groups * parts, s->dtype == MOE_f64 ? backward_task_f64 : backward_task_f32, &j);
    st = finish(&j);
  }
  if (st == MOE_OK) {
#define ADD(to, from, count, len) \
  (s->dtype == MOE_f64 ? add_parts_f64(to, from, count, len) : add_parts_f32(to, from, count, len))
    ADD(q->b, j.gb, parts, n);
    ADD(q->c, j.gc, parts, n);
    ADD(q->a, j.ga, s->sequences, s->channels * s->states);
    ADD(q->d, j.gd, s->sequences, s->channels);
    ADD(q->bias, j.gbias, s->sequences, s->channels);
#undef ADD
  }
  if (sums) moe_mem_free(moe_cpu(), sums, 2 * bc);
  if (by_sequence) moe_mem_free(moe_cpu(), by_sequence, weights);
  return st;
}
