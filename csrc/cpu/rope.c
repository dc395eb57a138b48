/* Rotary position embedding (Su et al., "RoFormer", 2021): pair i of a row at position p turns by p base^(-2i/dim). */
#include <math.h>

#include "cpu/cpu.h"

enum { ROPE_LANES = 64, ROPE_ROWS = 64 }; /* rows of a table's task: shape decides, not threads */

typedef struct rope_job {
  int64_t h, t, d, half, offset;
  double grow; /* the factor of cosines and sines */
  bool interleaved, inverse;
  const void *x;
  void *y, *table;          /* table [positions][cos, sin][half], of the element type */
  const double *positions;  /* NULL: offset, offset + 1, .. */
  const double *turn;       /* [3][half]: angle of one position, its cosine, its sine */
  const int64_t *sx, *sy, *sp;
} rope_job;

#define REAL float
#define STATIC(x) x##_f32
#include "cpu/rope_real.h"
#undef REAL
#undef STATIC

#define REAL double
#define STATIC(x) x##_f64
#include "cpu/rope_real.h"

moe_status MOE_CPU(rope)(moe_dtype dt, void *y, const void *x, const double *positions, const int64_t *size, const int64_t *sy,
                         const int64_t *sx, const int64_t *sp, int64_t npositions, int64_t offset, const double *freq,
                         double grow, int64_t dim, bool interleaved, bool inverse) {
  int64_t half = dim / 2, rows = size[0] * size[1] * size[2];
  int64_t esize = dt == MOE_f64 ? 8 : 4;
  double *turn = moe_scratch(2, 3 * half * 8 + npositions * 2 * half * esize);
  if (turn == NULL) return moe_fail(MOE_ENOMEM, "rope: no memory for the table of angles");
  for (int64_t i = 0; i < half; i++) {
    turn[i] = freq[i];
    turn[half + i] = cos(turn[i]);
    turn[2 * half + i] = sin(turn[i]);
  }
  rope_job j = {.h = size[1], .t = size[2], .d = size[3], .half = half, .offset = offset, .interleaved = interleaved,
                .inverse = inverse, .x = x, .y = y, .grow = grow, .table = turn + 3 * half, .positions = positions, .turn = turn,
                .sx = sx, .sy = sy, .sp = sp};
  moe_parallel_range(npositions, ROPE_ROWS, dt == MOE_f64 ? table_range_f64 : table_range_f32, &j);
  moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / MOE_MAX(size[3], 1)), dt == MOE_f64 ? rows_range_f64 : rows_range_f32, &j);
  return MOE_OK;
}
