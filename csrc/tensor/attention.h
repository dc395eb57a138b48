/* What the kernels of attention are given. Strides count elements and stand for batch, head, position; the last dimension
** is contiguous. Query i attends to the keys span[i].from .. span[i].to - 1: causality, windows and packed sequences are
** said there, once for all heads. */
#ifndef MOE_TENSOR_ATTENTION_H
#define MOE_TENSOR_ATTENTION_H

#include <stdint.h>

#include "tensor/dtype.h"

enum { MOE_MASK_NONE, MOE_MASK_MAY_ATTEND, MOE_MASK_ADDED };

typedef struct moe_attention_span {
  int64_t from, to; /* keys, from <= to */
  int64_t at;       /* the key that stands where the query stands: distances are counted from it */
} moe_attention_span;

typedef struct moe_attention {
  moe_dtype dtype; /* f32 or f64, of all arrays but masks that say who may attend */
  int64_t b, h, hk, t, s, d, dv; /* batch, heads, key-value heads, queries, keys, sizes */
  double scale;
  const void *q, *k, *v; /* [b, h, t, d], [b, hk, s, d], [b, hk, s, dv] */
  const int64_t *sq, *sk, *sv;
  int mask_kind;
  const void *mask; /* u8 or added; sm: batch, head, query, key, 0 where broadcast */
  const int64_t *sm;
  const void *relative; /* [h or 1, 2 reach - 1] added to the score: entry reach - 1 + (key - at), ends beyond; or NULL */
  int64_t reach, srelative; /* srelative: from head to head, 0 for one row */
  const moe_attention_span *span; /* [t] */
  const int64_t *seen;            /* [b, h, t] a query sees so many keys from the first, or NULL */
  void *y; /* [b, h, t, dv] */
  const int64_t *sy;
  void *lse; /* [b, h, t] log of the sum of exponentials, +inf for a row that sees nothing; NULL: not wanted */
} moe_attention;

/* Gradients of all: rows by their strides; dmask [b, h, t, s] zero-filled by the caller or NULL, drelative [h, 2 reach - 1]
** or NULL. */
typedef struct moe_attention_grads {
  const void *g; /* of y */
  const int64_t *sg;
  void *dq, *dk, *dv, *dmask, *drelative;
  const int64_t *sdq, *sdk, *sdv;
} moe_attention_grads;

#endif
