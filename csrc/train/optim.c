/* Optimizers: see optim.h. To add one: a row in moe_optims, its hyper function, a kernel slot in tensor/kernels.def with
** the parameters of moe_optim_kernel, and its loops (csrc/cpu/optim.c).
*/
#include "train/optim.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/rows.h"
#include "nn/module.h"

/* --- the rows --- */

#define KERNEL_OF(name) \
  static moe_optim_kernel *name##_kernel(const moe_device *dev) { return dev->k.name##_step; }
KERNEL_OF(adamw)
KERNEL_OF(sgd)

/* Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), with bias correction as in PyTorch:
** p <- p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps) */
enum { ADAMW_LR, ADAMW_BETA1, ADAMW_BETA2, ADAMW_EPS, ADAMW_DECAY };
static void adamw_hyper(const double *v, int64_t t, double *h) {
  double b1 = v[ADAMW_BETA1], b2 = v[ADAMW_BETA2];
  h[1] = 1 - v[ADAMW_LR] * v[ADAMW_DECAY];
  h[2] = 1 - b1;
  h[3] = b2;
  h[4] = 1 - b2;
  h[5] = v[ADAMW_LR] / (1 - pow(b1, (double)t));
  h[6] = 1 / sqrt(1 - pow(b2, (double)t));
  h[7] = v[ADAMW_EPS];
}

/* PyTorch's SGD: g <- g + wd p; buf <- momentum buf + (1 - dampening) g, the first time g itself;
** p <- p - lr (nesterov ? g + momentum buf : buf) */
enum { SGD_LR, SGD_MOMENTUM, SGD_DAMPENING, SGD_NESTEROV, SGD_DECAY };
static void sgd_hyper(const double *v, int64_t t, double *h) {
  h[1] = v[SGD_DECAY];
  h[2] = v[SGD_MOMENTUM];
  h[3] = t == 1 ? 1 : 1 - v[SGD_DAMPENING];
  h[4] = v[SGD_LR];
  h[5] = v[SGD_NESTEROV];
}
static const char *sgd_check(const double *v) {
  if (v[SGD_NESTEROV] != 0 && (v[SGD_MOMENTUM] <= 0 || v[SGD_DAMPENING] != 0))
    return "nesterov needs a momentum above 0 and no dampening";
  return NULL;
}
static int sgd_states(const double *v) { return v[SGD_MOMENTUM] != 0; }

const moe_optim_class moe_optims[] = {
    {"adamw",
     {"exp_avg", "exp_avg_sq"},
     {{"lr", 1, false, {1e-3}, 0, HUGE_VAL},
      {"betas", 2, false, {0.9, 0.999}, 0, 1},
      {"eps", 1, false, {1e-8}, 0, HUGE_VAL},
      {"weight_decay", 1, false, {0.01}, 0, HUGE_VAL}},
     adamw_kernel, adamw_hyper, NULL, NULL,
     "Adam with decoupled weight decay (Loshchilov and Hutter 2019), step for step as PyTorch's AdamW"},
    {"sgd",
     {"momentum_buffer"},
     {{"lr", 1, false, {1e-3}, 0, HUGE_VAL},
      {"momentum", 1, false, {0}, 0, HUGE_VAL},
      {"dampening", 1, false, {0}, -HUGE_VAL, HUGE_VAL},
      {"nesterov", 1, true, {0}, 0, 2},
      {"weight_decay", 1, false, {0}, 0, HUGE_VAL}},
     sgd_kernel, sgd_hyper, sgd_check, sgd_states,
     "stochastic gradient descent with momentum, as PyTorch's SGD (weight_decay is an L2 penalty)"},
};
const int moe_optim_count = sizeof moe_optims / sizeof *moe_optims;

const moe_optim_class *moe_optim_find(const char *name) {
  for (int i = 0; i < moe_optim_count; i++)
    if (strcmp(moe_optims[i].name, name) == 0) return &moe_optims[i];
  return NULL;
}

int moe_optim_place(const moe_optim_class *c, const char *name, const moe_optim_option **row) {
  int place = 0;
  for (const moe_optim_option *o = c->option; o->name != NULL; place += o->size, o++) {
    if (strcmp(o->name, name) != 0) continue;
    if (row != NULL) *row = o;
    return place;
  }
  return -1;
}

void moe_optim_defaults(const moe_optim_class *c, double *value) {
  for (const moe_optim_option *o = c->option; o->name != NULL; o++)
    for (int k = 0; k < o->size; k++) *value++ = o->def[k];
}

moe_status moe_optim_check(const moe_optim_class *c, const moe_optim_option *row, double v) {
  if (isfinite(v) && v >= row->min && v < row->max) return MOE_OK;
  if (isfinite(row->max))
    return moe_fail(MOE_EINVAL, "%s: %s must be at least %g and below %g, got %g", c->name, row->name, row->min, row->max, v);
  if (isfinite(row->min))
    return moe_fail(MOE_EINVAL, "%s: %s must be a finite number of at least %g, got %g", c->name, row->name, row->min, v);
  return moe_fail(MOE_EINVAL, "%s: %s must be a finite number, got %g", c->name, row->name, v);
}

/* --- making --- */

moe_optim *moe_optim_new(const moe_optim_class *cls) {
  moe_optim *o = calloc(1, sizeof *o);
  if (o == NULL) {
    moe_fail(MOE_ENOMEM, "%s: out of memory", cls->name);
    return NULL;
  }
  o->cls = cls;
  o->lr_scale = 1;
  return o;
}

void moe_optim_free(moe_optim *o) {
  if (o == NULL) return;
  for (int64_t i = 0; i < o->nparams; i++) {
    moe_optim_param *p = &o->param[i];
    for (int k = 0; k < MOE_OPTIM_STATES; k++) moe_release(p->state[k]);
    moe_release(p->master);
    moe_release(p->t);
    free(p->name);
  }
  free(o->param);
  free(o->group);
  free(o);
}

static int compare_pointers(const void *a, const void *b) {
  uintptr_t x = (uintptr_t) * (moe_tensor *const *)a, y = (uintptr_t) * (moe_tensor *const *)b;
  return (x > y) - (x < y);
}

static moe_status check_params(const moe_optim *o, int64_t n, moe_tensor *const *t) {
  const char *op = o->cls->name;
  for (int64_t i = 0; i < n; i++) {
    if (!moe_dtype_is_float(t[i]->dtype))
      return moe_fail(MOE_EINVAL, "%s: parameter %lld has type %s; only floating types can be trained", op, (long long)i + 1,
                      moe_dtype_name(t[i]->dtype));
    if (t[i]->node != NULL)
      return moe_fail(MOE_EINVAL, "%s: parameter %lld is the result of a recorded call; only leaves can be trained", op,
                      (long long)i + 1);
  }
  int64_t all = o->nparams + n;
  const moe_tensor **list = malloc((size_t)all * sizeof *list + 1);
  if (list == NULL) return moe_fail(MOE_ENOMEM, "%s: out of memory", op);
  for (int64_t i = 0; i < all; i++) list[i] = i < n ? t[i] : o->param[i - n].t;
  qsort(list, (size_t)all, sizeof *list, compare_pointers);
  bool twice = false;
  for (int64_t i = 1; i < all; i++) twice = twice || list[i] == list[i - 1];
  free(list);
  return twice ? moe_fail(MOE_EINVAL, "%s: a parameter was given twice", op) : MOE_OK;
}

moe_status moe_optim_add(moe_optim *o, const moe_optim_group *g, int64_t n, moe_tensor *const *t, const char *const *names) {
  const char *why = o->cls->check ? o->cls->check(g->value) : NULL;
  if (why != NULL) return moe_fail(MOE_EINVAL, "%s: %s", o->cls->name, why);
  MOE_TRY(check_params(o, n, t));
  moe_optim_group *groups = realloc(o->group, (size_t)(o->ngroups + 1) * sizeof *groups);
  if (groups != NULL) o->group = groups;
  moe_optim_param *params = realloc(o->param, (size_t)(o->nparams + n) * sizeof *params + 1);
  if (params != NULL) o->param = params;
  if (groups == NULL || params == NULL) return moe_fail(MOE_ENOMEM, "%s: out of memory", o->cls->name);
  o->group[o->ngroups++] = *g;
  for (int64_t i = 0; i < n; i++) {
    moe_optim_param *p = &o->param[o->nparams];
    char number[24];
    snprintf(number, sizeof number, "%lld", (long long)o->nparams + 1);
    *p = (moe_optim_param){.t = t[i], .group = o->ngroups - 1, .name = strdup(names && names[i] ? names[i] : number)};
    if (p->name == NULL) return moe_fail(MOE_ENOMEM, "%s: out of memory", o->cls->name);
    moe_retain(t[i]);
    o->nparams++;
  }
  return MOE_OK;
}

/* --- a step --- */

static moe_dtype state_type(const moe_tensor *t) { return t->dtype == MOE_f64 ? MOE_f64 : MOE_f32; }

/* What one parameter contributes to a step. */
typedef struct job {
  moe_optim_param *p;
  moe_tensor *work; /* contiguous, in the state's type: the parameter itself where it is so already; scoped */
  moe_tensor *g;    /* scoped */
} job;

/* Is the master copy still what the parameter was rounded from? A write from outside that puts the same rounded values
** there (a checkpoint being loaded) does not count. */
static bool master_holds(const moe_optim_param *p) {
  moe_tensor *t = p->t, *m = p->master;
  if (m == NULL || moe_dev(m) != moe_dev(t)) return false;
  if (p->seen == t->storage->version) return true;
  if (!moe_dev(t)->host_memory) return false;
  moe_tensor *rounded = moe_dense(m, t->dtype), *now = moe_contiguous_raw(t);
  int64_t bytes = moe_numel(t) * moe_dtype_size(t->dtype);
  return rounded && now && (bytes == 0 || memcmp(moe_data(rounded), moe_data(now), (size_t)bytes) == 0);
}

static moe_status prepare(const moe_optim *o, moe_optim_param *p, job *j) {
  moe_tensor *t = p->t;
  moe_dtype dt = state_type(t);
  const double *value = o->group[p->group].value;
  *j = (job){.p = p};
  if ((!moe_is_rows(t->grad) && !moe_same_shape(t->grad, t)) || moe_dev(t->grad) != moe_dev(t)) {
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "%s: parameter \"%.80s\" is %s on %s, its gradient %s on %s", o->cls->name, p->name,
                    moe_shape_of(a, t), moe_dev(t)->name, moe_shape_of(b, t->grad), moe_dev(t->grad)->name);
  }
  j->g = moe_dense(t->grad, dt);
  if (j->g == NULL) return moe_error_code();
  int states = o->cls->states ? o->cls->states(value) : MOE_OPTIM_STATES;
  for (int k = 0; k < states && o->cls->state[k] != NULL; k++) {
    if (p->state[k] != NULL && p->state[k]->dtype == dt && moe_dev(p->state[k]) == moe_dev(t)) continue;
    moe_tensor *s = p->state[k] ? moe_to_raw(p->state[k], dt, moe_dev(t)) : moe_zeros(t->ndim, t->shape, dt, moe_dev(t));
    if (s == NULL) return moe_error_code();
    moe_release(p->state[k]);
    p->state[k] = moe_retain(s);
  }
  if (t->dtype == dt) {
    moe_release(p->master);
    p->master = NULL;
    j->work = moe_contiguous_raw(t);
  } else {
    if (!master_holds(p)) {
      moe_tensor *m = moe_dense(t, dt);
      if (m == NULL) return moe_error_code();
      moe_release(p->master);
      p->master = moe_retain(m);
    }
    j->work = p->master;
  }
  return j->work ? MOE_OK : moe_error_code();
}

static bool decays(const moe_optim *o, const moe_optim_param *p) {
  switch (o->group[p->group].spare) {
    case MOE_SPARE_TAGGED: return (p->t->tag & MOE_TAG_NO_DECAY) == 0;
    case MOE_SPARE_VECTORS: return p->t->ndim >= 2;
    default: return true;
  }
}

static void fill_hyper(const moe_optim *o, const moe_optim_param *p, double grad_scale, double *h) {
  double value[MOE_OPTIM_VALUES];
  memcpy(value, o->group[p->group].value, sizeof value);
  value[0] *= o->lr_scale;
  int decay = moe_optim_place(o->cls, "weight_decay", NULL);
  if (decay >= 0 && !decays(o, p)) value[decay] = 0;
  memset(h, 0, MOE_OPTIM_HYPER * sizeof *h);
  h[0] = grad_scale;
  o->cls->hyper(value, p->steps + 1, h);
}

/* Runs the kernel over the jobs that share the first one's device and type, and takes them out of the list. */
typedef struct lists {
  void **p, **state;
  const void **g;
  const int64_t **rows;
  int64_t *n, *width;
  double *hyper;
} lists;

static moe_status run_alike(const moe_optim *o, job *jobs, int64_t *njobs, double grad_scale, const lists *l) {
  moe_device *dev = moe_dev(jobs[0].work);
  moe_dtype dt = jobs[0].work->dtype;
  moe_optim_kernel *kernel = o->cls->kernel(dev);
  int64_t count = 0, left = 0, total = *njobs;
  for (int64_t i = 0; i < total; i++) {
    job *j = &jobs[i];
    if (moe_dev(j->work) != dev || j->work->dtype != dt) {
      jobs[left++] = *j;
      continue;
    }
    l->p[count] = moe_data(j->work);
    const moe_tensor *grad = j->p->t->grad;
    l->g[count] = moe_data(j->g);
    l->n[count] = moe_numel(j->g);
    l->rows[count] = moe_is_rows(grad) ? moe_data_i64(grad->rows) : NULL;
    l->width[count] = moe_is_rows(grad) && l->n[count] > 0 ? l->n[count] / grad->shape[0] : 0;
    for (int k = 0; k < MOE_OPTIM_STATES; k++)
      l->state[count * MOE_OPTIM_STATES + k] = j->p->state[k] ? moe_data(j->p->state[k]) : NULL;
    fill_hyper(o, j->p, grad_scale, &l->hyper[count * MOE_OPTIM_HYPER]);
    count++;
  }
  *njobs = left;
  return kernel(l->p, l->state, l->g, l->n, l->rows, l->width, count, l->hyper, dt);
}

/* The rows that a step has touched of a rounded parameter. */
static moe_status write_rows(moe_tensor *t, moe_tensor *work, const moe_tensor *rows) {
  int64_t k = moe_numel(rows), shape[MOE_MAX_DIM], d = 1;
  for (int i = 1; i < t->ndim; i++) d *= shape[i] = t->shape[i];
  shape[0] = k;
  moe_tensor *part = moe_empty(t->ndim, shape, work->dtype, moe_dev(t));
  if (part == NULL) return moe_error_code();
  MOE_TRY(MOE_RUN(moe_dev(t), "optimizer", rows_take, moe_data(part), moe_data(work), moe_data_i64(rows), 0, (int64_t)1, t->shape[0], k, d,
                  moe_dtype_size(work->dtype)));
  if ((part = moe_to_raw(part, t->dtype, moe_dev(t))) == NULL) return moe_error_code();
  moe_touch(t);
  return MOE_RUN(moe_dev(t), "optimizer", rows_put, moe_data(t), moe_data(part), moe_data_i64(rows), 0, (int64_t)1, t->shape[0], k, d,
                 moe_dtype_size(t->dtype));
}

/* After the kernel: the rounded or strided parameter follows its work copy. */
static moe_status finish(job *j) {
  moe_optim_param *p = j->p;
  moe_tensor *t = p->t;
  p->steps++;
  if (j->work == t) moe_touch(t);
  else if (moe_is_rows(t->grad) && moe_is_contiguous(t)) MOE_TRY(write_rows(t, j->work, t->grad->rows));
  else MOE_TRY(moe_copy(t, j->work));
  p->seen = t->storage->version;
  return MOE_OK;
}

moe_status moe_optim_step(moe_optim *o, double grad_scale) {
  int64_t most = o->nparams, n = 0;
  size_t each = 2 * sizeof(job) + (3 + MOE_OPTIM_STATES) * sizeof(void *) + 2 * sizeof(int64_t) + MOE_OPTIM_HYPER * sizeof(double);
  job *jobs = malloc((size_t)most * each + 1);
  if (jobs == NULL) return moe_fail(MOE_ENOMEM, "%s: out of memory", o->cls->name);
  job *todo = jobs + most;
  lists l;
  l.p = (void **)(todo + most);
  l.state = l.p + most;
  l.g = (const void **)(void *)(l.state + most * MOE_OPTIM_STATES);
  l.rows = (const int64_t **)(void *)(l.g + most);
  l.n = (int64_t *)(l.rows + most);
  l.width = l.n + most;
  l.hyper = (double *)(l.width + most);
  moe_scope s = moe_scope_open();
  moe_status st = MOE_OK;
  for (int64_t i = 0; i < most && st == MOE_OK; i++) {
    moe_optim_param *p = &o->param[i];
    if (p->t->grad == NULL) continue;
    st = prepare(o, p, &jobs[n]);
    if (st == MOE_OK && o->cls->kernel(moe_dev(p->t)) == NULL)
      st = moe_fail(MOE_EDEVICE, "%s: no kernel on device %s", o->cls->name, moe_dev(p->t)->name);
    n++;
  }
  if (st == MOE_OK && n > 0) memcpy(todo, jobs, (size_t)n * sizeof *jobs);
  for (int64_t left = n; left > 0 && st == MOE_OK;) st = run_alike(o, todo, &left, grad_scale, &l);
  for (int64_t i = 0; i < n && st == MOE_OK; i++) st = finish(&jobs[i]);
  moe_scope_close(s);
  free(jobs);
  return st;
}

void moe_optim_zero_grad(moe_optim *o) {
  for (int64_t i = 0; i < o->nparams; i++) {
    moe_release(o->param[i].t->grad);
    o->param[i].t->grad = NULL;
  }
}

/* --- the gradients' norm --- */

moe_status moe_grad_norm(moe_tensor *const *t, int64_t n, double *norm) {
  double total = 0;
  *norm = 0;
  const void **x = malloc((size_t)n * (sizeof *x + sizeof(int64_t)) + 1);
  if (x == NULL) return moe_fail(MOE_ENOMEM, "grad_norm: out of memory");
  int64_t *size = (int64_t *)(x + n);
  moe_scope s = moe_scope_open();
  moe_status st = MOE_OK;
  /* runs of one device and type, in order: one kernel call each */
  for (int64_t i = 0; i < n && st == MOE_OK;) {
    int64_t count = 0;
    moe_device *dev = NULL;
    moe_dtype dt = MOE_f32;
    for (; i < n; i++) {
      moe_tensor *g = t[i]->grad;
      if (g == NULL) continue;
      if (count > 0 && (moe_dev(g) != dev || moe_dtype_compute(g->dtype) != dt)) break;
      dev = moe_dev(g);
      dt = moe_dtype_compute(g->dtype);
      moe_tensor *d = moe_dense(g, dt);
      if (d == NULL) {
        st = moe_error_code();
        break;
      }
      x[count] = moe_data(d);
      size[count++] = moe_numel(d);
    }
    double sum = 0;
    if (st == MOE_OK && count > 0) st = MOE_RUN(dev, "grad_norm", sum_squares, &sum, x, size, count, dt);
    total += sum;
  }
  moe_scope_close(s);
  free(x);
  *norm = sqrt(total);
  return st;
}

moe_status moe_optim_grad_norm(const moe_optim *o, double *norm) {
  moe_tensor **t = malloc((size_t)o->nparams * sizeof *t + 1);
  if (t == NULL) return moe_fail(MOE_ENOMEM, "grad_norm: out of memory");
  for (int64_t i = 0; i < o->nparams; i++) t[i] = o->param[i].t;
  moe_status st = moe_grad_norm(t, o->nparams, norm);
  free(t);
  return st;
}

moe_status moe_grad_scale(moe_tensor *const *t, int64_t n, double factor) {
  moe_status st = MOE_OK;
  for (int64_t i = 0; i < n && st == MOE_OK; i++) {
    moe_tensor *g = t[i]->grad;
    if (g == NULL) continue;
    moe_scope s = moe_scope_open();
    moe_tensor *d = moe_dense(g, moe_dtype_compute(g->dtype));
    st = d ? MOE_OK : moe_error_code();
    if (d != NULL) {
      void *x = moe_data(d);
      int64_t size = moe_numel(d);
      st = MOE_RUN(moe_dev(d), "grad_scale", multi_scale, &x, &size, 1, factor, d->dtype);
      if (st == MOE_OK && d != g) st = moe_copy(g, d);
      else if (st == MOE_OK) moe_touch(g);
    }
    moe_scope_close(s);
  }
  return st;
}

moe_status moe_optim_load_state(moe_optim_param *p, int k, moe_tensor *from) {
  moe_tensor **place = k == MOE_OPTIM_STATES ? &p->master : &p->state[k];
  if (!moe_same_shape(from, p->t)) {
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "load_state_dict: the state of \"%.80s\" is %s, the parameter %s", p->name,
                    moe_shape_of(a, from), moe_shape_of(b, p->t));
  }
  moe_scope s = moe_scope_open();
  moe_tensor *t = moe_empty(p->t->ndim, p->t->shape, state_type(p->t), moe_dev(p->t));
  moe_status st = t ? moe_copy(t, from) : moe_error_code();
  if (st == MOE_OK) {
    moe_release(*place);
    *place = moe_retain(t);
    if (k == MOE_OPTIM_STATES) p->seen = p->t->storage->version;
  }
  moe_scope_close(s);
  return st;
}
