/* rope: rotary position embedding; its gradient is the turn back. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/graph.h"
#include "op/product.h"

enum { X, POSITIONS, OFFSET, BASE, INTERLEAVED, DIM, SCALING }; /* arguments */

/* --- frequencies for contexts longer than those of training --- */

enum { FACTOR, ORIGINAL, FAST, SLOW, LOW, HIGH, ATTENTION, FIELDS };
static const char *const field_names[FIELDS] = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                                                "low_freq_factor", "high_freq_factor", "attention_factor"};

/* Turns frequencies f [half] of base^(-2i/dim) in place for sequences of `length`; gives the factor of the lengths. */
typedef double scale_fn(double *f, int64_t half, double base, double length, const double *field);

static double scale_linear(double *f, int64_t half, double base, double length, const double *field) {
  (void)base, (void)length;
  for (int64_t i = 0; i < half; i++) f[i] /= field[FACTOR];
  return 1;
}

static void rebase(double *f, int64_t half, double base) {
  for (int64_t i = 0; i < half; i++) f[i] = pow(base, -(double)i / (double)half);
}

/* The lowest frequency is divided by the factor, the highest stays. */
static double scale_ntk(double *f, int64_t half, double base, double length, const double *field) {
  (void)length;
  if (half > 1) rebase(f, half, base * pow(field[FACTOR], (double)half / (double)(half - 1)));
  return 1;
}

static double scale_dynamic(double *f, int64_t half, double base, double length, const double *field) {
  double by = field[FACTOR] * MOE_MAX(length, field[ORIGINAL]) / field[ORIGINAL] - (field[FACTOR] - 1);
  if (half > 1) rebase(f, half, base * pow(by, (double)half / (double)(half - 1)));
  return 1;
}

/* Peng et al. 2023, "YaRN", arXiv 2309.00071, section 3: pairs that turn often in the original context stay, those that
** turn hardly are divided, a ramp between; cosines and sines grow by 0.1 log(factor) + 1. */
static double scale_yarn(double *f, int64_t half, double base, double length, const double *field) {
  (void)length;
  double bound[2], turns[2] = {isnan(field[FAST]) ? 32 : field[FAST], isnan(field[SLOW]) ? 1 : field[SLOW]};
  for (int i = 0; i < 2; i++) bound[i] = (double)half * log(field[ORIGINAL] / (turns[i] * 2 * 3.14159265358979323846)) / log(base);
  double low = MOE_MAX(floor(bound[0]), 0), high = MOE_MIN(ceil(bound[1]), (double)(2 * half - 1));
  if (low == high) high += 0.001;
  for (int64_t i = 0; i < half; i++) {
    double ramp = ((double)i - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    f[i] = f[i] / field[FACTOR] * ramp + f[i] * (1 - ramp);
  }
  return isnan(field[ATTENTION]) ? field[FACTOR] <= 1 ? 1 : 0.1 * log(field[FACTOR]) + 1 : field[ATTENTION];
}

/* By the wavelength against the original context, as the models of Llama 3.1 do (arXiv 2407.21783). */
static double scale_llama3(double *f, int64_t half, double base, double length, const double *field) {
  (void)base, (void)length;
  double low = isnan(field[LOW]) ? 1 : field[LOW], high = isnan(field[HIGH]) ? 4 : field[HIGH];
  for (int64_t i = 0; i < half; i++) {
    double turns = field[ORIGINAL] * f[i] / (2 * 3.14159265358979323846), smooth = (turns - low) / (high - low);
    smooth = turns < low ? 0 : turns > high ? 1 : smooth;
    f[i] = (1 - smooth) * f[i] / field[FACTOR] + smooth * f[i];
  }
  return 1;
}

static const struct scaling {
  const char *name;
  scale_fn *scale;
  unsigned fields; /* that it knows, by bit; the factor and, where it knows it, the original length must be given */
} scalings[] = {{"linear", scale_linear, 1u << FACTOR},
                {"ntk", scale_ntk, 1u << FACTOR},
                {"dynamic", scale_dynamic, 1u << FACTOR | 1u << ORIGINAL},
                {"yarn", scale_yarn, 1u << FACTOR | 1u << ORIGINAL | 1u << FAST | 1u << SLOW | 1u << ATTENTION},
                {"llama3", scale_llama3, 1u << FACTOR | 1u << ORIGINAL | 1u << LOW | 1u << HIGH}};
enum { SCALINGS = sizeof scalings / sizeof *scalings };

/* Reads `name(field=value, ...)`; *failed: what is wrong with it, or NULL. */
static const struct scaling *read_scaling(const char *text, double *field, const char **failed) {
  size_t n = strcspn(text, "(");
  const struct scaling *s = NULL;
  for (int i = 0; i < SCALINGS; i++)
    if (strlen(scalings[i].name) == n && memcmp(scalings[i].name, text, n) == 0) s = &scalings[i];
  for (int i = 0; i < FIELDS; i++) field[i] = (double)NAN;
  *failed = "it is none of linear, ntk, dynamic, yarn, llama3";
  if (s == NULL) return NULL;
  *failed = "it must be name(field=number, ...)";
  const char *p = text + n;
  while (*p == '(' || *p == ',') {
    p++;
    p += strspn(p, " ");
    if (*p == ')') break;
    size_t length = strcspn(p, " =");
    int found = -1;
    for (int i = 0; i < FIELDS; i++)
      if (strlen(field_names[i]) == length && memcmp(field_names[i], p, length) == 0 && s->fields >> i & 1) found = i;
    if (found < 0) *failed = "it has a field that is not known to it";
    if (found < 0) return NULL;
    p += length;
    p += strspn(p, " =");
    char *end;
    field[found] = strtod(p, &end);
    if (end == p) return NULL;
    p = end + strspn(end, " ");
  }
  if (p[0] != ')' || p[1] != 0) return NULL;
  *failed = "factor must be given, and be at least 1";
  if (!(field[FACTOR] >= 1)) return NULL;
  *failed = "original_max_position_embeddings must be given, and be positive";
  if (s->fields >> ORIGINAL & 1 && !(field[ORIGINAL] > 0)) return NULL;
  for (int i = 0; i < FIELDS; i++)
    if (isinf(field[i])) return NULL;
  *failed = NULL;
  return s;
}

moe_status moe_rope_check(const char *who, const char *scaling) {
  double field[FIELDS];
  const char *failed = NULL;
  if (scaling) read_scaling(scaling, field, &failed);
  return failed ? moe_fail(MOE_EINVAL, "%s: rope scaling '%s': %s", who, scaling, failed) : MOE_OK;
}

/* Angles of one position of all pairs [half]; the factor of cosines and sines. */
static double frequencies(const char *text, double *f, int64_t half, double base, double length) {
  double field[FIELDS];
  const char *failed;
  rebase(f, half, base);
  const struct scaling *s = text ? read_scaling(text, field, &failed) : NULL;
  return s && half > 0 ? s->scale(f, half, base, length, field) : 1;
}

moe_status moe_fwd_rope(moe_ctx *c) {
  moe_tensor *x = c->arg[X].t, *pos = c->arg[POSITIONS].kind == MOE_K_none ? NULL : c->arg[POSITIONS].t;
  char bx[MOE_SHAPE_TEXT], bp[MOE_SHAPE_TEXT];
  MOE_TRY(moe_want_float(c, "x", x));
  if (x->ndim < 2) return OP_FAIL(c, "x must be [.., positions, size], got %s", moe_shape_of(bx, x));
  int64_t d = x->shape[x->ndim - 1], t = x->shape[x->ndim - 2], dim = c->arg[DIM].kind == MOE_K_none ? d : c->arg[DIM].i;
  double base = c->arg[BASE].f;
  if (dim < 0 || dim > d || dim % 2 != 0)
    return OP_FAIL(c, "dim, the part of a row that turns, must be even and at most the size %lld, got %lld", (long long)d,
                   (long long)dim);
  if (!(base > 0) || isinf(base)) return OP_FAIL(c, "base must be positive, got %g", base);
  const char *scaling = c->arg[SCALING].kind == MOE_K_none ? NULL : c->arg[SCALING].s;
  MOE_TRY(moe_rope_check(c->op->name, scaling));
  moe_dtype dt = x->dtype, ct = moe_dtype_compute(dt);
  moe_device *dev = moe_dev(x);
  double length = (double)c->arg[OFFSET].i + (double)t;

  /* positions [.., t], dimensions of 1 or absent ones repeated: strides in its elements for every dimension but the last of x */
  int64_t sp[MOE_MAX_DIM] = {0}, npositions = t;
  int lead = x->ndim - 1;
  sp[lead - 1] = 1;
  if (pos) {
    bool fits = pos->ndim >= 1 && pos->ndim <= lead && pos->dtype != MOE_bool;
    for (int i = 0; fits && i < pos->ndim; i++) {
      int64_t n = pos->shape[i];
      fits = n == 1 || n == x->shape[i + lead - pos->ndim];
    }
    if (!fits)
      return OP_FAIL(c, "positions must hold numbers and broadcast to x's shape %s without its last dim, got %s %s",
                     moe_shape_of(bx, x), moe_dtype_name(pos->dtype), moe_shape_of(bp, pos));
    moe_save(c, pos);
    pos = moe_dense(pos, MOE_f64);
    if (pos == NULL) return moe_error_code();
    for (int i = 0; i < lead; i++) {
      int k = i - (lead - pos->ndim);
      sp[i] = k < 0 || pos->shape[k] == 1 ? 0 : pos->stride[k];
    }
    npositions = moe_numel(pos);
    if (scaling) /* dynamic scaling goes by the last position */
      for (int64_t i = 0; i < npositions; i++) length = i == 0 || moe_data_f64(pos)[i] + 1 > length ? moe_data_f64(pos)[i] + 1 : length;
  } else {
    moe_save(c, NULL);
  }

  /* Seen as [b, h, t, d]: fewer dimensions are led by ones, more are folded into b. */
  x = moe_to_raw(x, ct, dev);
  if (x && ((x->stride[lead] != 1 && d != 1) || x->ndim > 4)) x = moe_contiguous_raw(x);
  if (x == NULL) return moe_error_code();
  if (pos && lead > 3) {
    pos = moe_contiguous_raw(moe_view_of(pos, lead, x->shape, sp, pos->offset));
    if (pos == NULL) return moe_error_code();
    moe_contiguous_strides(lead, x->shape, sp);
    npositions = moe_numel(pos);
  }
  moe_tensor *y = x->ndim == 4 ? moe_heads_like(x, x->shape, ct) : moe_empty(x->ndim, x->shape, ct, dev);
  if (y == NULL) return moe_error_code();
  int64_t size[4] = {1, 1, t, d}, sx[3] = {0}, sy[3] = {0}, sq[3] = {0};
  for (int i = 0; i < MOE_MIN(lead, 3); i++) {
    int from = lead - 1 - i, to = 2 - i;
    size[to] = x->shape[from];
    sx[to] = x->stride[from];
    sy[to] = y->stride[from];
    sq[to] = sp[from];
  }
  for (int i = 0; i < lead - 3; i++) size[0] *= x->shape[i];
  moe_tensor *freq = moe_empty(1, (const int64_t[]){dim / 2}, MOE_f64, moe_cpu());
  if (freq == NULL) return moe_error_code();
  double grow = frequencies(scaling, moe_data(freq), dim / 2, base, length);
  if (moe_numel(x) > 0)
    MOE_TRY(MOE_RUN(dev, c->op->name, rope, ct, moe_data(y), moe_data(x), pos ? moe_data_f64(pos) : NULL, size, sy, sx, sq,
                    npositions, c->arg[OFFSET].i, moe_data_f64(freq), grow, dim, c->arg[INTERLEAVED].i != 0, c->op->variant != 0));
  return moe_set_out(c, 0, ct == dt ? y : moe_to_raw(y, dt, dev));
}

moe_status moe_bwd_rope(moe_ctx *c) {
  moe_value pos = c->saved[0] ? T(c->saved[0]) : NIL;
  moe_value args[] = {T(c->gout[0]), pos, c->arg[OFFSET], c->arg[BASE], c->arg[INTERLEAVED], c->arg[DIM], c->arg[SCALING]};
  c->gin[0] = moe_call1(c->op->variant ? MOE_OP_rope : MOE_OP_rope_back, args, 7);
  return c->gin[0] ? MOE_OK : moe_error_code();
}
