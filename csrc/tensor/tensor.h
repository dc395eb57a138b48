/* Tensors: a strided view of a storage, with what autograd hangs on it.
**
** Ownership. Tensors are counted. A function that returns a `moe_tensor *` returns a *scoped*
** reference: it belongs to the innermost open scope (moe_scope_open/close) and dies with it
** unless retained. So C code composes operations as plainly as Lua does; NULL goes through
** every operation, and one check at the end suffices:
**
**     moe_scope s = moe_scope_open();
**     moe_tensor *y = moe_keep(MOE_CALL(add, T(a), T(b)));   (now ours: release it later)
**     moe_scope_close(s);
**     if (y == NULL) return moe_error_code();
**
** A tensor belongs to one thread at a time. Sizes and strides are int64_t and count elements;
** C counts dimensions and positions from 0, messages count from 1 as the user does.
*/
#ifndef MOE_TENSOR_TENSOR_H
#define MOE_TENSOR_TENSOR_H

#include "tensor/device.h"
#include "tensor/dtype.h"
#include "tensor/iter.h"

typedef struct moe_storage {
  int refs;
  uint32_t version; /* bumped by every in-place write */
  moe_device *device;
  int64_t bytes;
  void *data; /* NULL when bytes == 0 */
} moe_storage;

typedef struct moe_tensor moe_tensor;
struct moe_node;

struct moe_tensor {
  int refs;
  moe_dtype dtype;
  int ndim;
  bool requires_grad;  /* a leaf that wants a gradient, or the result of a recorded call */
  bool carries_lua;    /* some Lua closure takes part in its history: see csrc/lua/anchor.c */
  bool is_view;        /* shares its storage with the tensor it was made from */
  uint8_t tag;         /* free for the layer above (parameter, buffer, no weight decay: nn/module.h) */
  moe_storage *storage;
  int64_t offset; /* elements */
  moe_tensor *grad;       /* leaves only */
  moe_tensor *rows;       /* of a row-sparse gradient: autograd/rows.h */
  struct moe_node *node;  /* the call that made it, or NULL */
  int node_out;           /* which result of that call */
  struct moe_hook *hooks; /* autograd/graph.h */
  int64_t shape[MOE_MAX_DIM], stride[MOE_MAX_DIM];
};

/* --- lifetime --- */
moe_tensor *moe_retain(moe_tensor *t);  /* NULL passes through */
void moe_release(moe_tensor *t);        /* NULL is ignored */
typedef int moe_scope;
moe_scope moe_scope_open(void);
void moe_scope_close(moe_scope s);      /* releases all scoped references made since */
moe_tensor *moe_scoped(moe_tensor *t);  /* gives one owned reference to the current scope; returns t; NULL and a release on no memory */
#define moe_keep(t) moe_retain(t)

/* --- making; all results are scoped, contiguous, without history --- */
moe_tensor *moe_empty(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev); /* NaN-filled in debug builds */
moe_tensor *moe_full(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev, double value);
moe_tensor *moe_zeros(int ndim, const int64_t *shape, moe_dtype dtype, moe_device *dev);
moe_tensor *moe_empty_like(const moe_tensor *t);
moe_tensor *moe_zeros_like(const moe_tensor *t);
moe_tensor *moe_scalar(double v, moe_dtype dtype, moe_device *dev); /* shape {} */
/* A view of t's storage with another shape; no history. The range is checked. */
moe_tensor *moe_view_of(moe_tensor *t, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset);
/* The same data without history. */
moe_tensor *moe_detach(moe_tensor *t);
/* t itself when it is contiguous, else a copy; no history. */
moe_tensor *moe_contiguous_raw(moe_tensor *t);
/* t itself when it has that type and device, else a converted contiguous copy; no history. */
moe_tensor *moe_to_raw(moe_tensor *t, moe_dtype dtype, moe_device *dev);
/* Contiguous and of that type: what most kernels want. No history. */
moe_tensor *moe_dense(moe_tensor *t, moe_dtype dtype);
/* dst <- src, broadcast and converted; bumps dst's version. Overlap is handled. No history. */
moe_status moe_copy(moe_tensor *dst, moe_tensor *src);
moe_status moe_fill(moe_tensor *dst, double v); /* bumps the version */

/* --- asking --- */
int64_t moe_numel(const moe_tensor *t);
bool moe_is_contiguous(const moe_tensor *t);
bool moe_same_shape(const moe_tensor *a, const moe_tensor *b);
static inline void *moe_data(const moe_tensor *t) {
  return t->storage->data ? (char *)t->storage->data + t->offset * moe_dtype_size(t->dtype) : NULL;
}
#define moe_data_f32(t) ((float *)moe_data(t))
#define moe_data_f64(t) ((double *)moe_data(t))
#define moe_data_i64(t) ((int64_t *)moe_data(t))
static inline moe_device *moe_dev(const moe_tensor *t) { return t->storage->device; }
static inline void moe_touch(moe_tensor *t) { t->storage->version++; } /* after writing in place */
/* One element, read from any device. `pos` is the element's index in row-major order. */
moe_status moe_get_f64(moe_tensor *t, int64_t pos, double *v);
moe_status moe_get_i64(moe_tensor *t, int64_t pos, int64_t *v);
/* Reads a whole tensor into host memory as contiguous `dtype`. */
moe_status moe_read(moe_tensor *t, void *host, moe_dtype dtype);
/* Writes contiguous host elements of `dtype` into t (any type, any strides); bumps the version. */
moe_status moe_write(moe_tensor *t, const void *host, moe_dtype dtype);

/* "[2, 3]" into buf; returns buf. */
enum { MOE_SHAPE_TEXT = 128 };
const char *moe_shape_text(char *buf, int ndim, const int64_t *shape);
#define moe_shape_of(buf, t) moe_shape_text(buf, (t)->ndim, (t)->shape)

/* --- shapes --- */
/* numel with overflow and negative sizes refused. */
moe_status moe_shape_numel(const char *op, int ndim, const int64_t *shape, int64_t *numel);
/* Broadcast of two shapes; fails with both shapes in the message. */
moe_status moe_broadcast(const char *op, const moe_tensor *a, const moe_tensor *b, int *ndim, int64_t *shape);
/* Fills `it` for operands (0 = output) seen in the given shape; operands broadcast to it. */
void moe_iter_make(moe_iter *it, int ndim, const int64_t *shape, int noperands, moe_tensor *const *operands);
/* A plain walk over an iterator's outer dimensions, for host kernels: calls `inner` with pointers and
** element strides of the innermost dimension for every row. esize[i]: bytes an element of operand i. */
typedef void moe_inner_fn(void *arg, int64_t n, void *const *ptr, const int64_t *stride);
void moe_iter_rows(const moe_iter *it, int64_t begin_row, int64_t end_row, const int64_t *esize, moe_inner_fn *inner, void *arg);
int64_t moe_iter_nrows(const moe_iter *it); /* rows outside of dimension 0 */
/* A contiguous row-major stride list for shape. */
void moe_contiguous_strides(int ndim, const int64_t *shape, int64_t *stride);

#endif
