/* Rounding to the levels -levels .. levels times a scale of each row of [rows, n]: its largest magnitude over levels, or the
** mean of its magnitudes. Halves go to even. A NaN spoils its row.
*/
#include "cpu/cpu.h"
#include "cpu/order.h"

enum { BLOCK = 2048 }; /* elements summed in their own type before they go to f64 */

typedef struct job {
  void *y;
  const void *x;
  int64_t n, levels;
  bool mean;
} job;

/* MAGIC: 1.5 * 2^(bits of the mantissa); adding and taking it away rounds what is small beside it. The bits of magnitudes order
** as the magnitudes do, NaN above all. */
#define ROWS(REAL, NAME, MAGIC, KEY, KEY_MAX, BITS, UNBITS)                      \
  static void NAME(void *arg, int64_t begin, int64_t end, int worker) {          \
    const job *jb = arg;                                                         \
    const REAL top = (REAL)jb->levels, magic = (REAL)MAGIC;                      \
    (void)worker;                                                                \
    for (int64_t row = begin; row < end; row++) {                                \
      const REAL *restrict x = (const REAL *)jb->x + row * jb->n;                \
      REAL *restrict y = (REAL *)jb->y + row * jb->n;                            \
      KEY most = 0;                                                              \
      double sum = 0;                                                            \
      for (int64_t i0 = 0; jb->mean && i0 < jb->n; i0 += BLOCK) {                \
        int64_t stop = MOE_MIN(i0 + BLOCK, jb->n);                               \
        REAL part = 0;                                                           \
        _Pragma("omp simd reduction(+ : part)")                                  \
        for (int64_t i = i0; i < stop; i++) part += x[i] < 0 ? -x[i] : x[i];     \
        sum += (double)part;                                                     \
      }                                                                          \
      if (!jb->mean) {                                                           \
        _Pragma("omp simd reduction(max : most)")                                \
        for (int64_t i = 0; i < jb->n; i++) {                                    \
          KEY v = BITS(x[i]) & KEY_MAX;                                          \
          most = v > most ? v : most;                                            \
        }                                                                        \
      }                                                                          \
      REAL s = jb->mean ? (REAL)(sum / (double)jb->n) : UNBITS(most) / top;      \
      for (int64_t i = 0; i < jb->n; i++) {                                      \
        REAL v = x[i] / s;                                                       \
        v = v < -top ? -top : v;                                                 \
        v = v > top ? top : v;                                                   \
        REAL r = ((v + magic) - magic) * s;                                      \
        y[i] = s == 0 ? 0 : r;                                                   \
      }                                                                          \
    }                                                                            \
  }

#define UNBITS_f32(b) moe_bits_f32((uint32_t)(b))
#define UNBITS_f64(b) moe_bits_f64((uint64_t)(b))
ROWS(float, rows_f32, 12582912.0f, int32_t, INT32_MAX, moe_f32_bits, UNBITS_f32)
ROWS(double, rows_f64, 6755399441055744.0, int64_t, INT64_MAX, moe_f64_bits, UNBITS_f64)

moe_status MOE_CPU(fake_quantize)(void *y, const void *x, int64_t rows, int64_t n, int64_t levels, bool mean, moe_dtype dt) {
  job j = {.y = y, .x = x, .n = n, .levels = levels, .mean = mean};
  if (dt != MOE_f32 && dt != MOE_f64)
    return moe_fail(MOE_EDEVICE, "no kernel 'fake_quantize' for %s on cpu", moe_dtype_name(dt));
  moe_parallel_range(rows, MOE_MAX(1, MOE_GRAIN / MOE_MAX(n, 1)), dt == MOE_f32 ? rows_f32 : rows_f64, &j);
  return MOE_OK;
}
