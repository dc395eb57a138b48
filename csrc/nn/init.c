#include "nn/init.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/pool.h"
#include "base/rng.h"
#include "tensor/env.h"

/* --- drawing: block b of four words gives the elements 4b .. 4b+3 --- */

typedef struct draw {
  double *out;
  int64_t n;
  uint64_t seed, first;
  double a, b, lo, hi; /* uniform: [a, b); normal: mean a, deviation b; truncated to [lo, hi] as well */
  void (*four)(const struct draw *d, moe_philox4 p, double *v);
} draw;

static double open_unit(uint32_t x) { return ((double)x + 0.5) * (1.0 / 4294967296.0); }

static void four_uniform(const draw *d, moe_philox4 p, double *v) {
  for (int i = 0; i < 4; i++) v[i] = d->a + (d->b - d->a) * (double)moe_u32_to_unit(p.v[i]);
}

/* Box and Muller, "A note on the generation of random normal deviates", 1958. */
static void four_normal(const draw *d, moe_philox4 p, double *v) {
  for (int i = 0; i < 4; i += 2) {
    double r = sqrt(-2 * log(open_unit(p.v[i]))), angle = 6.283185307179586 * open_unit(p.v[i + 1]);
    v[i] = d->a + d->b * r * cos(angle);
    v[i + 1] = d->a + d->b * r * sin(angle);
  }
}

/* x with erf(x) = y: Winitzki's closed form, then three steps of Newton. */
static double inverse_erf(double y) {
  if (!(fabs(y) < 1)) return copysign(6, y); /* beyond double's reach; the caller clamps to its bounds */
  double l = log1p(-y * y), c = 4.546884979448284 + l / 2; /* 2/(pi a) with a = 0.14 */
  double x = copysign(sqrt(sqrt(c * c - l / 0.14) - c), y);
  for (int i = 0; i < 3; i++) x -= (erf(x) - y) / (1.1283791670955126 * exp(-x * x));
  return x;
}

/* The inverse of the distribution function, so that each element takes one word whatever the bounds are. */
static void four_truncated(const draw *d, moe_philox4 p, double *v) {
  double below = erf((d->lo - d->a) / (d->b * sqrt(2.0))), above = erf((d->hi - d->a) / (d->b * sqrt(2.0)));
  for (int i = 0; i < 4; i++) {
    double y = below + (above - below) * open_unit(p.v[i]);
    double x = d->a + d->b * sqrt(2.0) * inverse_erf(y);
    v[i] = x < d->lo ? d->lo : x > d->hi ? d->hi : x;
  }
}

static void draw_range(void *arg, int64_t begin, int64_t end, int worker) {
  const draw *d = arg;
  (void)worker;
  for (int64_t b = begin; b < end; b++) {
    double v[4];
    d->four(d, moe_philox(d->seed, d->first + (uint64_t)b), v);
    for (int64_t i = 4 * b; i < MOE_MIN(d->n, 4 * b + 4); i++) d->out[i] = v[i - 4 * b];
  }
}

static moe_status draw_into(moe_tensor *t, draw d) {
  moe_env *env = moe_env_now();
  d.n = moe_numel(t);
  int64_t blocks = (d.n + 3) / 4;
  d.seed = env->rng.seed;
  d.first = moe_rng_take(&env->rng, (uint64_t)blocks);
  if (d.n == 0) return MOE_OK;
  moe_scope s = moe_scope_open();
  moe_tensor *host = moe_empty(1, &d.n, MOE_f64, moe_cpu());
  moe_status st = host == NULL ? moe_error_code() : MOE_OK;
  if (st == MOE_OK) {
    d.out = moe_data_f64(host);
    moe_parallel_range(blocks, 4096, draw_range, &d);
    st = moe_write(t, d.out, MOE_f64);
  }
  moe_scope_close(s);
  return st;
}

static moe_status check_float(const moe_tensor *t, const char *what) {
  if (moe_dtype_is_float(t->dtype)) return MOE_OK;
  return moe_fail(MOE_EINVAL, "init.%s_: the tensor must be of a floating type, got %s", what,
                  moe_dtype_name(t->dtype));
}

moe_status moe_init_uniform(moe_tensor *t, double lo, double hi) {
  MOE_TRY(check_float(t, "uniform"));
  return draw_into(t, (draw){.a = lo, .b = hi, .four = four_uniform});
}

moe_status moe_init_normal(moe_tensor *t, double mean, double std) {
  MOE_TRY(check_float(t, "normal"));
  return draw_into(t, (draw){.a = mean, .b = std, .four = four_normal});
}

moe_status moe_init_linear(moe_tensor *t, int64_t fan_in) {
  double bound = fan_in > 0 ? 1 / sqrt((double)fan_in) : 0;
  return moe_init_uniform(t, -bound, bound);
}

/* --- the table's functions --- */

static moe_status fans(const moe_tensor *t, const char *what, double *in, double *out) {
  if (t->ndim < 2) {
    char shape[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "init.%s_: the tensor must have at least 2 dimensions [out, in, ...], got %s", what,
                    moe_shape_of(shape, t));
  }
  double field = 1;
  for (int i = 2; i < t->ndim; i++) field *= (double)t->shape[i];
  *in = MOE_MAX(1, (double)t->shape[1] * field);
  *out = MOE_MAX(1, (double)t->shape[0] * field);
  return MOE_OK;
}

static moe_status run_zeros(moe_tensor *t, const double *arg) {
  (void)arg;
  return moe_fill(t, 0);
}

static moe_status run_ones(moe_tensor *t, const double *arg) {
  (void)arg;
  return moe_fill(t, 1);
}

static moe_status run_constant(moe_tensor *t, const double *arg) { return moe_fill(t, arg[0]); }

static moe_status run_uniform(moe_tensor *t, const double *arg) {
  if (!(arg[0] <= arg[1])) return moe_fail(MOE_EINVAL, "init.uniform_: a = %g is above b = %g", arg[0], arg[1]);
  return moe_init_uniform(t, arg[0], arg[1]);
}

static moe_status run_normal(moe_tensor *t, const double *arg) {
  if (!(arg[0] >= 0)) return moe_fail(MOE_EINVAL, "init.normal_: std must not be negative, got %g", arg[0]);
  return moe_init_normal(t, arg[1], arg[0]);
}

static moe_status run_trunc_normal(moe_tensor *t, const double *arg) {
  MOE_TRY(check_float(t, "trunc_normal"));
  if (!(arg[0] > 0)) return moe_fail(MOE_EINVAL, "init.trunc_normal_: std must be positive, got %g", arg[0]);
  if (!(arg[2] < arg[3]))
    return moe_fail(MOE_EINVAL, "init.trunc_normal_: a = %g is not below b = %g", arg[2], arg[3]);
  return draw_into(t, (draw){.a = arg[1], .b = arg[0], .lo = arg[2], .hi = arg[3], .four = four_truncated});
}

/* Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010. */
static moe_status run_xavier_uniform(moe_tensor *t, const double *arg) {
  double in, out;
  MOE_TRY(fans(t, "xavier_uniform", &in, &out));
  double bound = arg[0] * sqrt(6 / (in + out));
  return moe_init_uniform(t, -bound, bound);
}

static moe_status run_xavier_normal(moe_tensor *t, const double *arg) {
  double in, out;
  MOE_TRY(fans(t, "xavier_normal", &in, &out));
  return moe_init_normal(t, 0, arg[0] * sqrt(2 / (in + out)));
}

/* He et al., "Delving deep into rectifiers", 2015; a: the slope of a leaky ReLU for negative inputs. */
static moe_status run_kaiming_uniform(moe_tensor *t, const double *arg) {
  double in, out;
  MOE_TRY(fans(t, "kaiming_uniform", &in, &out));
  double bound = sqrt(6 / ((1 + arg[0] * arg[0]) * in));
  return moe_init_uniform(t, -bound, bound);
}

static moe_status run_kaiming_normal(moe_tensor *t, const double *arg) {
  double in, out;
  MOE_TRY(fans(t, "kaiming_normal", &in, &out));
  return moe_init_normal(t, 0, sqrt(2 / ((1 + arg[0] * arg[0]) * in)));
}

static moe_status run_linear(moe_tensor *t, const double *arg) {
  double in, out;
  (void)arg;
  MOE_TRY(fans(t, "linear", &in, &out));
  return moe_init_linear(t, (int64_t)in);
}

/* Rows (or columns, whichever are fewer) orthonormal: modified Gram-Schmidt, twice, on a normal matrix
** [out, in * ...]. Saxe et al., "Exact solutions to the nonlinear dynamics of learning", 2014. */
static moe_status run_orthogonal(moe_tensor *t, const double *arg) {
  double in, out;
  MOE_TRY(fans(t, "orthogonal", &in, &out));
  MOE_TRY(moe_init_normal(t, 0, 1));
  int64_t n = moe_numel(t), rows = t->shape[0];
  if (n == 0) return MOE_OK;
  int64_t cols = n / rows;
  bool wide = cols >= rows;
  int64_t vectors = wide ? rows : cols, length = wide ? cols : rows;
  int64_t step = wide ? 1 : cols, next = wide ? cols : 1; /* within a vector, between vectors */
  moe_scope s = moe_scope_open();
  moe_tensor *host = moe_empty(1, &n, MOE_f64, moe_cpu());
  moe_status st = host == NULL ? moe_error_code() : moe_read(t, moe_data(host), MOE_f64);
  if (st == MOE_OK) {
    double *q = moe_data_f64(host);
    for (int64_t i = 0; i < vectors; i++) {
      double *v = q + i * next;
      for (int pass = 0; pass < 2; pass++) {
        for (int64_t j = 0; j < i; j++) {
          const double *u = q + j * next;
          double dot = 0;
          for (int64_t k = 0; k < length; k++) dot += u[k * step] * v[k * step];
          for (int64_t k = 0; k < length; k++) v[k * step] -= dot * u[k * step];
        }
        double norm = 0;
        for (int64_t k = 0; k < length; k++) norm += v[k * step] * v[k * step];
        norm = norm > 0 ? 1 / sqrt(norm) : 0;
        for (int64_t k = 0; k < length; k++) v[k * step] *= norm;
      }
    }
    for (int64_t k = 0; k < n; k++) q[k] *= arg[0];
    st = moe_write(t, q, MOE_f64);
  }
  moe_scope_close(s);
  return st;
}

const moe_initialiser moe_initialisers[] = {
  {"zeros", "", "0", run_zeros},
  {"ones", "", "1", run_ones},
  {"constant", "value=0", "one value", run_constant},
  {"uniform", "a=0, b=1", "U(a, b)", run_uniform},
  {"normal", "std=1, mean=0", "N(mean, std^2)", run_normal},
  {"trunc_normal", "std=1, mean=0, a=-2, b=2", "N(mean, std^2) restricted to [a, b]", run_trunc_normal},
  {"xavier_uniform", "gain=1", "U(-r, r), r = gain sqrt(6 / (fan_in + fan_out))", run_xavier_uniform},
  {"xavier_normal", "gain=1", "N(0, s^2), s = gain sqrt(2 / (fan_in + fan_out))", run_xavier_normal},
  {"kaiming_uniform", "a=0", "U(-r, r), r = sqrt(6 / ((1 + a^2) fan_in))", run_kaiming_uniform},
  {"kaiming_normal", "a=0", "N(0, s^2), s = sqrt(2 / ((1 + a^2) fan_in))", run_kaiming_normal},
  {"linear", "", "U(-r, r), r = 1 / sqrt(fan_in): a linear layer's default", run_linear},
  {"orthogonal", "gain=1", "gain times orthonormal rows or columns", run_orthogonal},
};
const int moe_initialiser_count = (int)(sizeof moe_initialisers / sizeof moe_initialisers[0]);

/* The defaults of "std=1, mean=0"; returns how many there are. */
static int defaults(const char *args, double *arg) {
  int n = 0;
  for (const char *p = strchr(args, '='); p != NULL; p = strchr(p + 1, '=')) arg[n++] = strtod(p + 1, NULL);
  return n;
}

moe_status moe_init_named(moe_tensor *t, const char *text) {
  size_t len = strcspn(text, "(");
  for (int i = 0; i < moe_initialiser_count; i++) {
    const moe_initialiser *in = &moe_initialisers[i];
    if (strlen(in->name) != len || memcmp(in->name, text, len) != 0) continue;
    double arg[MOE_INIT_ARGS] = {0};
    int max = defaults(in->args, arg), n = 0;
    const char *p = text + len;
    if (*p == '(') {
      do {
        char *end;
        double v = strtod(p + 1, &end);
        if (end == p + 1 || n == max)
          return moe_fail(MOE_EINVAL, "init: '%s' takes numbers (%s), got '%s'", in->name, in->args, text);
        arg[n++] = v;
        p = end + strspn(end, " ");
      } while (*p == ',');
      if (strcmp(p, ")") != 0) return moe_fail(MOE_EINVAL, "init: '%s' does not end in ')'", text);
    }
    return in->run(t, arg);
  }
  char names[400];
  size_t used = 0;
  names[0] = 0;
  for (int i = 0; i < moe_initialiser_count && used + 24 < sizeof names; i++) {
    const char *name = moe_initialisers[i].name;
    if (i > 0) names[used++] = ' ';
    memcpy(names + used, name, strlen(name) + 1);
    used += strlen(name);
  }
  return moe_fail(MOE_EINVAL, "init: no initialiser '%s'; there are: %s", text, names);
}
