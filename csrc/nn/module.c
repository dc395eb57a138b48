#include "nn/module.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALL_LAYERS ", dtype:dtype?, device:device?"

const moe_module_class moe_modules[] = {
#define MODULE(group, name, options, npositional, call, results, init, forward, doc)                     \
  {#group, #name, options ALL_LAYERS, npositional, call, results, "", moe_nn_init_##init,                \
   moe_nn_forward_##forward, NULL, doc},
#define MIXER(group, name, options, npositional, call, state, init, forward, start, doc)                 \
  {#group, #name, options ALL_LAYERS, npositional, call, "y", state, moe_nn_init_##init,                 \
   moe_nn_forward_##forward, moe_nn_start_##start, doc},
#include "nn/modules.def"
#undef MODULE
#undef MIXER
};
const int moe_module_count = (int)(sizeof moe_modules / sizeof moe_modules[0]);

/* --- signatures --- */

enum { CLASSES = sizeof moe_modules / sizeof moe_modules[0] };
static moe_signature options[CLASSES], calls[CLASSES];
static pthread_once_t parsed = PTHREAD_ONCE_INIT;

static void parse_all(void) {
  for (int i = 0; i < moe_module_count; i++) {
    moe_signature_parse(moe_modules[i].options, "", &options[i]);
    moe_signature_parse(moe_modules[i].call, moe_modules[i].results, &calls[i]);
  }
}

const moe_signature *moe_module_options(const moe_module_class *cls) {
  pthread_once(&parsed, parse_all);
  return &options[cls - moe_modules];
}

const moe_signature *moe_module_call_signature(const moe_module_class *cls) {
  pthread_once(&parsed, parse_all);
  return &calls[cls - moe_modules];
}

const moe_module_class *moe_module_find(const char *group, const char *name) {
  for (int i = 0; i < moe_module_count; i++)
    if (strcmp(moe_modules[i].group, group) == 0 && strcmp(moe_modules[i].name, name) == 0) return &moe_modules[i];
  return NULL;
}

bool moe_module_name_at(const char *names, int i, char *buf, int size) {
  while (i-- > 0) {
    names = strchr(names, ',');
    if (names == NULL) return false;
    names++;
  }
  names += strspn(names, " ");
  int len = (int)strcspn(names, ", ");
  if (len == 0 || len >= size) return false;
  memcpy(buf, names, (size_t)len);
  buf[len] = 0;
  return true;
}

/* --- making --- */

/* The module outlives the call that made it, so strings and lists are copied. */
static moe_status own_value(moe_value *v) {
  if (v->kind == MOE_K_string) {
    char *s = strdup(v->s);
    if (s == NULL) return moe_fail(MOE_ENOMEM, "out of memory");
    v->s = s;
  } else if (v->kind == MOE_K_ints || v->kind == MOE_K_dims) {
    int64_t *p = malloc((size_t)MOE_MAX(v->ints.n, 1) * sizeof *p);
    if (p == NULL) return moe_fail(MOE_ENOMEM, "out of memory");
    if (v->ints.n > 0) memcpy(p, v->ints.v, (size_t)v->ints.n * sizeof *p);
    v->ints.v = p;
  }
  return MOE_OK;
}

static void free_value(moe_value *v) {
  union {
    const void *in;
    void *out;
  } p = {NULL};
  if (v->kind == MOE_K_string) p.in = v->s;
  if (v->kind == MOE_K_ints || v->kind == MOE_K_dims) p.in = v->ints.v;
  free(p.out);
}

moe_module *moe_module_new(const moe_module_class *cls, const moe_value *opt) {
  const moe_signature *sig = moe_module_options(cls);
  moe_module *m = calloc(1, sizeof *m);
  if (m == NULL) {
    moe_fail(MOE_ENOMEM, "%s: out of memory", cls->name);
    return NULL;
  }
  m->cls = cls;
  m->training = true;
  m->dtype = MOE_f32;
  m->device = moe_cpu();
  moe_scope s = moe_scope_open();
  moe_status st = MOE_OK;
  for (int i = 0; i < sig->nparams && st == MOE_OK; i++) {
    moe_value v = opt[i];
    st = own_value(&v);
    if (st == MOE_OK) m->opt[i] = v;
  }
  if (st == MOE_OK) {
    const moe_value *dtype = moe_module_opt(m, "dtype"), *device = moe_module_opt(m, "device");
    if (dtype->kind != MOE_K_none) m->dtype = (moe_dtype)dtype->i;
    if (device->kind != MOE_K_none) m->device = device->dev;
    if (!moe_dtype_is_float(m->dtype))
      st = moe_module_fail(m, "dtype must be a floating type, got %s", moe_dtype_name(m->dtype));
  }
  if (st == MOE_OK) st = cls->init(m);
  moe_scope_close(s);
  if (st == MOE_OK) return m;
  moe_fail_name(cls->name);
  moe_module_free(m);
  return NULL;
}

void moe_module_free(moe_module *m) {
  if (m == NULL) return;
  for (int i = 0; i < m->nslots; i++) moe_release(m->slot[i].t);
  for (int i = 0; i < MOE_MAX_PARAM; i++) free_value(&m->opt[i]);
  free(m);
}

static moe_tensor *add_slot(moe_module *m, const char *name, moe_tensor *t, int tag) {
  MOE_ASSERT(m->nslots < MOE_MODULE_SLOTS);
  if (t != NULL) {
    t->tag = (uint8_t)tag;
    t->requires_grad = tag & MOE_TAG_PARAMETER;
  }
  m->slot[m->nslots++] = (moe_slot){name, moe_retain(t)};
  return t;
}

moe_tensor *moe_module_parameter(moe_module *m, const char *name, int ndim, const int64_t *shape) {
  moe_tensor *t = moe_empty(ndim, shape, m->dtype, m->device);
  return t == NULL ? NULL : add_slot(m, name, t, MOE_TAG_PARAMETER);
}

moe_tensor *moe_module_buffer(moe_module *m, const char *name, moe_dtype dtype, int ndim, const int64_t *shape) {
  moe_tensor *t = moe_zeros(ndim, shape, dtype, m->device);
  return t == NULL ? NULL : add_slot(m, name, t, MOE_TAG_BUFFER);
}

void moe_module_absent(moe_module *m, const char *name) { add_slot(m, name, NULL, 0); }

moe_tensor *moe_module_get(const moe_module *m, const char *name) {
  for (int i = 0; i < m->nslots; i++)
    if (strcmp(m->slot[i].name, name) == 0) return m->slot[i].t;
  return NULL;
}

/* --- options --- */

const moe_value *moe_module_opt(const moe_module *m, const char *name) {
  static const moe_value none = {.kind = MOE_K_none};
  const moe_signature *sig = moe_module_options(m->cls);
  for (int i = 0; i < sig->nparams; i++)
    if (strcmp(sig->param[i].name, name) == 0) return &m->opt[i];
  MOE_ASSERT(!"an option that the row does not name");
  return &none;
}

int64_t moe_module_int(const moe_module *m, const char *name, int64_t absent) {
  const moe_value *v = moe_module_opt(m, name);
  return v->kind == MOE_K_none ? absent : v->i;
}

double moe_module_number(const moe_module *m, const char *name, double absent) {
  const moe_value *v = moe_module_opt(m, name);
  return v->kind == MOE_K_none ? absent : v->f;
}

bool moe_module_flag(const moe_module *m, const char *name) {
  const moe_value *v = moe_module_opt(m, name);
  return v->kind != MOE_K_none && v->i != 0;
}

const char *moe_module_string(const moe_module *m, const char *name) {
  const moe_value *v = moe_module_opt(m, name);
  return v->kind == MOE_K_string ? v->s : NULL;
}

moe_status moe_module_at_least(const moe_module *m, const char *name, int64_t least) {
  const moe_value *v = moe_module_opt(m, name);
  if (v->kind == MOE_K_none || v->i >= least) return MOE_OK;
  return moe_module_fail(m, "%s must be at least %lld, got %lld", name, (long long)least, (long long)v->i);
}

moe_status moe_module_fail(const moe_module *m, const char *fmt, ...) {
  char text[512];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  return moe_fail(MOE_EINVAL, "%s: %s", m->cls->name, text);
}

/* --- converting --- */

/* The version goes on counting, so that a graph recorded before the conversion notices it. */
static moe_status convert_in_place(moe_tensor *t, moe_dtype dtype, moe_device *dev) {
  moe_tensor *to = moe_to_raw(t, dtype, dev);
  if (to == NULL) return moe_error_code();
  if (to == t) return MOE_OK;
  uint32_t version = t->storage->version;
  moe_tensor old = *t;
  t->storage = to->storage;
  t->offset = to->offset;
  t->dtype = dtype;
  t->is_view = false;
  memcpy(t->stride, to->stride, sizeof t->stride);
  to->storage = old.storage; /* dies with the scope */
  to->offset = old.offset;
  to->dtype = old.dtype;
  memcpy(to->stride, old.stride, sizeof t->stride);
  t->storage->version = version + 1;
  return MOE_OK;
}

moe_status moe_leaf_to(moe_tensor *t, int dtype, moe_device *dev) {
  if (t->node != NULL)
    return moe_fail(MOE_EINVAL, "to: the tensor is the result of a recorded call; only leaves are converted in place");
  bool keep = dtype < 0 || !moe_dtype_is_float(t->dtype) || (t->tag & MOE_TAG_KEEP_TYPE);
  moe_dtype want = keep ? t->dtype : (moe_dtype)dtype;
  if (dev == NULL) dev = moe_dev(t);
  if (want == t->dtype && dev == moe_dev(t)) return MOE_OK;
  moe_scope s = moe_scope_open();
  moe_status st = convert_in_place(t, want, dev);
  if (st == MOE_OK && t->grad != NULL) st = convert_in_place(t->grad, want, dev);
  if (st == MOE_OK && t->grad != NULL && t->grad->rows != NULL) st = convert_in_place(t->grad->rows, MOE_i64, dev);
  moe_scope_close(s);
  return st;
}

moe_status moe_module_to(moe_module *m, int dtype, moe_device *dev) {
  if (dtype >= 0 && !moe_dtype_is_float((moe_dtype)dtype))
    return moe_module_fail(m, "to: a module takes a floating type, got %s", moe_dtype_name((moe_dtype)dtype));
  for (int i = 0; i < m->nslots; i++)
    if (m->slot[i].t != NULL) MOE_TRY(moe_leaf_to(m->slot[i].t, dtype, dev));
  if (dtype >= 0) m->dtype = (moe_dtype)dtype;
  if (dev != NULL) m->device = dev;
  return MOE_OK;
}

moe_status moe_module_put(moe_module *m, int i, moe_tensor *t) {
  moe_slot *s = &m->slot[i];
  char want[MOE_SHAPE_TEXT], got[MOE_SHAPE_TEXT];
  if (s->t == NULL) return moe_module_fail(m, "this layer was made without %s", s->name);
  if (!moe_same_shape(s->t, t))
    return moe_module_fail(m, "%s is %s, got a tensor %s", s->name, moe_shape_of(want, s->t), moe_shape_of(got, t));
  if (moe_dtype_is_float(s->t->dtype) != moe_dtype_is_float(t->dtype))
    return moe_module_fail(m, "%s is %s, got a tensor of %s", s->name, moe_dtype_name(s->t->dtype),
                           moe_dtype_name(t->dtype));
  if (t->node != NULL)
    return moe_module_fail(m, "%s must be a leaf: the tensor is the result of a recorded call (detach it)", s->name);
  t->tag = s->t->tag;
  t->requires_grad = s->t->requires_grad;
  moe_retain(t);
  moe_release(s->t);
  s->t = t;
  return MOE_OK;
}
