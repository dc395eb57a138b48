/* Tensors, storages and scopes: making, counting, asking. Shapes and walks are in shape.c. */
#include "tensor/tensor.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/graph.h"

/* --- headers of tensors and storages, kept for reuse per thread --- */

typedef struct spare {
  struct spare *next;
} spare;

typedef struct thread_heads {
  spare *tensors, *storages;
  int ntensors, nstorages;
  moe_tensor **scoped; /* the scoped references, in order of creation */
  int nscoped, cap;
} thread_heads;

enum { MAX_SPARES = 1024 };

static MOE_HOT_TLS thread_heads heads;
static MOE_HOT_TLS bool heads_registered;
static pthread_key_t heads_key;
static pthread_once_t heads_once = PTHREAD_ONCE_INIT;

static void free_spares(spare *s) {
  while (s) {
    spare *next = s->next;
    free(s);
    s = next;
  }
}

static void heads_free(void *p) {
  thread_heads *h = p;
  free_spares(h->tensors);
  free_spares(h->storages);
  free(h->scoped);
  memset(h, 0, sizeof *h);
}

static void heads_init(void) { pthread_key_create(&heads_key, heads_free); }

static void heads_register(void) { /* so that a thread's end frees them */
  pthread_once(&heads_once, heads_init);
  pthread_setspecific(heads_key, &heads);
  heads_registered = true;
}

static void *take(spare **list, int *n, size_t size) {
  spare *s = *list;
  if (s != NULL) {
    *list = s->next;
    --*n;
    return s;
  }
  void *p = malloc(size);
  if (p == NULL) moe_fail(MOE_ENOMEM, "out of memory");
  return p;
}

static void give(spare **list, int *n, void *p) {
  if (!heads_registered) heads_register();
  if (*n >= MAX_SPARES) {
    free(p);
    return;
  }
  spare *s = p;
  s->next = *list;
  *list = s;
  ++*n;
}

/* --- storages --- */

static moe_storage *storage_new(moe_device *dev, int64_t bytes) {
  moe_storage *s = take(&heads.storages, &heads.nstorages, sizeof *s);
  if (s == NULL) return NULL;
  *s = (moe_storage){.refs = 1, .device = dev, .bytes = bytes};
  if (bytes > 0 && (s->data = moe_mem_alloc(dev, bytes)) == NULL) {
    give(&heads.storages, &heads.nstorages, s);
    return NULL;
  }
  return s;
}

static void storage_release(moe_storage *s) {
  if (--s->refs > 0) return;
  moe_mem_free(s->device, s->data, s->bytes);
  give(&heads.storages, &heads.nstorages, s);
}

/* --- counting --- */

static moe_tensor *tensor_new(moe_storage *s, moe_dtype dtype, int ndim) {
  moe_tensor *t = take(&heads.tensors, &heads.ntensors, sizeof *t);
  if (t == NULL) return NULL;
  memset(t, 0, offsetof(moe_tensor, shape));
  t->refs = 1;
  t->dtype = dtype;
  t->ndim = ndim;
  t->storage = s;
  return t;
}

moe_tensor *moe_retain(moe_tensor *t) {
  if (t) t->refs++;
  return t;
}

void moe_release(moe_tensor *t) {
  if (t == NULL || --t->refs > 0) return;
  if (t->grad) moe_release(t->grad);
  if (t->rows) moe_release(t->rows);
  while (t->hooks) {
    moe_hook *h = t->hooks;
    t->hooks = h->next;
    if (h->release) h->release(h->ud);
    free(h);
  }
  if (t->node) moe_node_release(t->node);
  if (t->storage) storage_release(t->storage);
  give(&heads.tensors, &heads.ntensors, t);
}

moe_scope moe_scope_open(void) { return heads.nscoped; }

void moe_scope_close(moe_scope s) {
  while (heads.nscoped > s) moe_release(heads.scoped[--heads.nscoped]);
}

moe_tensor *moe_scoped(moe_tensor *t) {
  if (t == NULL) return NULL;
  if (heads.nscoped == heads.cap) {
    int cap = heads.cap ? heads.cap * 2 : 256;
    moe_tensor **p = realloc(heads.scoped, (size_t)cap * sizeof *p);
    if (p == NULL) {
      moe_release(t);
      moe_fail(MOE_ENOMEM, "out of memory");
      return NULL;
    }
    heads.scoped = p;
    heads.cap = cap;
    if (!heads_registered) heads_register();
  }
  heads.scoped[heads.nscoped++] = t;
  return t;
}

/* --- making --- */

#ifdef MOE_DEBUG
/* Reads of memory that nobody wrote become visible. */
static void poison(moe_tensor *t, int64_t n) {
  if (!moe_dev(t)->host_memory || n == 0) return;
  for (int64_t i = 0; i < n; i++) {
    if (t->dtype == MOE_f32) moe_data_f32(t)[i] = __builtin_nanf("");
    else if (t->dtype == MOE_f64) moe_data_f64(t)[i] = __builtin_nan("");
    else if (moe_dtype_is_float(t->dtype)) ((uint16_t *)moe_data(t))[i] = 0x7FFF;
  }
}
#endif

moe_tensor *moe_empty(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev) {
  int64_t n;
  if (ndim > MOE_MAX_DIM) {
    moe_fail(MOE_EINVAL, "a tensor of %d dimensions: at most %d are possible", ndim, MOE_MAX_DIM);
    return NULL;
  }
  if (moe_shape_numel(NULL, ndim, shape, &n) != MOE_OK) return NULL;
  moe_storage *s = storage_new(dev, n * moe_dtype_size(dtype));
  if (s == NULL) return NULL;
  moe_tensor *t = tensor_new(s, dtype, ndim);
  if (t == NULL) {
    storage_release(s);
    return NULL;
  }
  for (int i = 0; i < ndim; i++) t->shape[i] = shape[i];
  moe_contiguous_strides(ndim, shape, t->stride);
#ifdef MOE_DEBUG
  poison(t, n);
#endif
  return moe_scoped(t);
}

moe_tensor *moe_full(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev, double value) {
  moe_tensor *t = moe_empty(ndim, shape, dtype, dev);
  return t && moe_fill(t, value) == MOE_OK ? t : NULL;
}

moe_tensor *moe_zeros(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev) {
  return moe_full(ndim, shape, dtype, dev, 0);
}

moe_tensor *moe_empty_like(const moe_tensor *t) {
  return t ? moe_empty(t->ndim, t->shape, t->dtype, moe_dev(t)) : NULL;
}

moe_tensor *moe_zeros_like(const moe_tensor *t) {
  return t ? moe_zeros(t->ndim, t->shape, t->dtype, moe_dev(t)) : NULL;
}

moe_tensor *moe_scalar(double v, moe_dtype dtype, moe_device *dev) { return moe_full(0, NULL, dtype, dev, v); }

moe_tensor *moe_view_of(moe_tensor *t, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset) {
  if (t == NULL) return NULL;
  int64_t n, low = offset, high = offset;
  if (ndim > MOE_MAX_DIM) {
    moe_fail(MOE_EINVAL, "a tensor of %d dimensions: at most %d are possible", ndim, MOE_MAX_DIM);
    return NULL;
  }
  if (moe_shape_numel(NULL, ndim, shape, &n) != MOE_OK) return NULL;
  for (int i = 0; i < ndim; i++) {
    if (stride[i] < 0) low += (shape[i] - 1) * stride[i];
    else high += (shape[i] - 1) * stride[i];
  }
  if (n > 0 && (low < 0 || (high + 1) * moe_dtype_size(t->dtype) > t->storage->bytes)) {
    moe_fail(MOE_EINVAL, "a view reaches outside of its storage");
    return NULL;
  }
  moe_tensor *v = tensor_new(t->storage, t->dtype, ndim);
  if (v == NULL) return NULL;
  t->storage->refs++;
  v->is_view = true;
  v->offset = n > 0 ? offset : 0;
  for (int i = 0; i < ndim; i++) {
    v->shape[i] = shape[i];
    v->stride[i] = stride[i];
  }
  return moe_scoped(v);
}

moe_tensor *moe_detach(moe_tensor *t) { return t ? moe_view_of(t, t->ndim, t->shape, t->stride, t->offset) : NULL; }

moe_tensor *moe_contiguous_raw(moe_tensor *t) {
  if (t == NULL) return NULL;
  if (moe_is_contiguous(t)) return t;
  moe_tensor *c = moe_empty_like(t);
  return c && moe_copy(c, t) == MOE_OK ? c : NULL;
}

moe_tensor *moe_to_raw(moe_tensor *t, moe_dtype dtype, moe_device *dev) {
  if (t == NULL || (t->dtype == dtype && moe_dev(t) == dev)) return t;
  if (moe_dev(t) == dev) {
    moe_tensor *c = moe_empty(t->ndim, t->shape, dtype, dev);
    return c && moe_copy(c, t) == MOE_OK ? c : NULL;
  }
  /* between devices: contiguous bytes travel through the host */
  moe_tensor *src = moe_contiguous_raw(t);
  moe_tensor *dst = src ? moe_empty(t->ndim, t->shape, t->dtype, dev) : NULL;
  if (dst == NULL) return NULL;
  int64_t bytes = moe_numel(t) * moe_dtype_size(t->dtype);
  if (bytes > 0) {
    moe_device *from = moe_dev(src);
    if (dev->host_memory) {
      if (from->to_host(from, moe_data(dst), moe_data(src), bytes) != MOE_OK) return NULL;
    } else if (from->host_memory) {
      if (dev->from_host(dev, moe_data(dst), moe_data(src), bytes) != MOE_OK) return NULL;
    } else {
      moe_tensor *host = moe_to_raw(src, t->dtype, moe_cpu());
      return host ? moe_to_raw(host, dtype, dev) : NULL;
    }
  }
  return moe_to_raw(dst, dtype, dev);
}

moe_tensor *moe_dense(moe_tensor *t, moe_dtype dtype) {
  return t ? moe_contiguous_raw(moe_to_raw(t, dtype, moe_dev(t))) : NULL;
}

/* --- writing and reading --- */

static bool share_memory(const moe_tensor *a, const moe_tensor *b) { return a->storage == b->storage; }

moe_status moe_copy(moe_tensor *dst, moe_tensor *src) {
  if (dst == NULL || src == NULL) return moe_error_code();
  if (moe_dev(dst) != moe_dev(src) && (src = moe_to_raw(src, src->dtype, moe_dev(dst))) == NULL) return moe_error_code();
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  MOE_TRY(moe_broadcast("copy", dst, src, &ndim, shape));
  bool fits = ndim == dst->ndim;
  for (int i = 0; fits && i < ndim; i++) fits = shape[i] == dst->shape[i];
  if (!fits) {
    char a[MOE_SHAPE_TEXT], b[MOE_SHAPE_TEXT];
    return moe_fail(MOE_EINVAL, "copy: %s does not fit into %s", moe_shape_of(a, src), moe_shape_of(b, dst));
  }
  if (share_memory(dst, src)) { /* the views may overlap: go through a copy, unless they are the same */
    bool same = dst->offset == src->offset && dst->dtype == src->dtype && moe_same_shape(dst, src);
    for (int i = 0; same && i < dst->ndim; i++) same = dst->stride[i] == src->stride[i];
    if (same) return MOE_OK;
    moe_tensor *tmp = moe_empty_like(src);
    if (tmp == NULL) return moe_error_code();
    MOE_TRY(moe_copy(tmp, src));
    src = tmp;
  }
  moe_iter it;
  moe_iter_make(&it, dst->ndim, dst->shape, 2, (moe_tensor *const[]){dst, src});
  moe_touch(dst);
  if (it.numel == 0) return MOE_OK;
  return MOE_RUN(moe_dev(dst), "copy", copy, &it, dst->dtype, src->dtype);
}

moe_status moe_fill(moe_tensor *dst, double v) {
  if (dst == NULL) return moe_error_code();
  moe_iter it;
  moe_iter_make(&it, dst->ndim, dst->shape, 1, &dst);
  moe_touch(dst);
  if (it.numel == 0) return MOE_OK;
  return MOE_RUN(moe_dev(dst), "fill", fill, &it, dst->dtype, v);
}

/* A scoped host tensor over memory of the caller's: lives only while the scope of the call does. */
static moe_status through_host(moe_tensor *t, void *host, moe_dtype dtype, bool to_host) {
  moe_scope s = moe_scope_open();
  int64_t bytes = moe_numel(t) * moe_dtype_size(dtype);
  moe_tensor *c = moe_empty(t->ndim, t->shape, dtype, moe_cpu());
  moe_status st = MOE_OK;
  if (c == NULL) st = moe_error_code();
  else if (bytes > 0) {
    if (to_host) {
      st = moe_copy(c, t);
      if (st == MOE_OK) memcpy(host, moe_data(c), (size_t)bytes);
    } else {
      memcpy(moe_data(c), host, (size_t)bytes);
      st = moe_copy(t, c);
    }
  }
  moe_scope_close(s);
  return st;
}

moe_status moe_read(moe_tensor *t, void *host, moe_dtype dtype) {
  if (t->dtype == dtype && moe_dev(t)->host_memory && moe_is_contiguous(t)) {
    int64_t bytes = moe_numel(t) * moe_dtype_size(dtype);
    if (bytes > 0) memcpy(host, moe_data(t), (size_t)bytes);
    return MOE_OK;
  }
  return through_host(t, host, dtype, true);
}

moe_status moe_write(moe_tensor *t, const void *host, moe_dtype dtype) {
  union {
    const void *in;
    void *out;
  } p = {host}; /* through_host only reads it */
  return through_host(t, p.out, dtype, false);
}

/* The address of one element in host memory, copied into `room` where the device's memory is elsewhere. */
static const void *element(moe_tensor *t, int64_t pos, void *room) {
  int64_t at = t->offset;
  for (int i = t->ndim - 1; i >= 0; i--) {
    at += pos % t->shape[i] * t->stride[i];
    pos /= t->shape[i];
  }
  int64_t size = moe_dtype_size(t->dtype);
  const char *p = (const char *)t->storage->data + at * size;
  moe_device *d = moe_dev(t);
  if (d->host_memory) return p;
  return d->to_host(d, room, p, size) == MOE_OK ? room : NULL;
}

moe_status moe_get_f64(moe_tensor *t, int64_t pos, double *v) {
  double room;
  const void *p = element(t, pos, &room);
  if (p == NULL) return moe_error_code();
  *v = moe_load_f64(p, t->dtype);
  return MOE_OK;
}

moe_status moe_get_i64(moe_tensor *t, int64_t pos, int64_t *v) {
  double room;
  const void *p = element(t, pos, &room);
  if (p == NULL) return moe_error_code();
  *v = moe_load_i64(p, t->dtype);
  return MOE_OK;
}
