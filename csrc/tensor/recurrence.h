/* What the kernels of linear recurrences are given. A sequence's head has a state S [dk, dv]; at each time
**
**   S' = diag(exp(decay)) S
**   delta rule:  x = beta (v - S'^T k),            S = S' + k x^T
**   low rank:    S = S' + b (a^T S_before) + k (beta v)^T
**   else:        S = S' + k (beta v)^T
**   o = scale S^T q;  with a bonus u:  o = scale (S_before^T q + (q . u k) beta v)
**
** A time of a head is a row; its values lie side by side. Strides count elements and stand for batch, time, head, column.
*/
#ifndef MOE_TENSOR_RECURRENCE_H
#define MOE_TENSOR_RECURRENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor/dtype.h"

typedef struct moe_row_list {
  const void *data; /* NULL: absent */
  int64_t stride[4];
} moe_row_list;

typedef struct moe_recurrence {
  moe_dtype dtype; /* f32 or f64 */
  int64_t sequences, heads, group; /* group: heads that share q, k, a and b */
  int64_t dk, dv, chunk;           /* rows of a chunk, at least 1 */
  int64_t time;                    /* rows of a batch entry: sequence s is batch entry s, or, where start is given, ... */
  const int64_t *start;            /* [sequences + 1]: rows start[s] .. start[s + 1] - 1 of batch entry 0; or NULL */
  const int64_t *first;            /* [sequences + 1]: where the kept states of a sequence begin: one a chunk and the last */
  bool wide;                       /* a decay for every column of k, not one a head */
  bool delta;
  double scale;
  moe_row_list q, k, v, decay, beta, a, b; /* columns of q, k, v, a and b are contiguous */
  const void *bonus;                       /* [heads, dk] or NULL */
} moe_recurrence;

/* Gradients, dense; NULL where none is wanted but for q, k, v and state. B, T: batch and time of the inputs. */
typedef struct moe_recurrence_grad {
  void *q, *k, *a, *b; /* [B, T, heads, dk]: of every head, also where heads share */
  void *v;             /* [B, T, heads, dv] */
  void *decay;         /* [B, T, heads, dk or 1] */
  void *beta;          /* [B, T, heads] */
  void *bonus;         /* [sequences, heads, dk] */
  void *state;         /* [sequences, heads, dk, dv]: on entry of the last state, on return of the first */
} moe_recurrence_grad;

#endif
