/* An elementwise walk over up to MOE_ITER_OPERANDS strided operands of one broadcast shape.
** Dimensions are merged where every operand allows it and ordered so that dimension 0 is the
** innermost. Strides count elements; 0 repeats a value.
*/
#ifndef MOE_TENSOR_ITER_H
#define MOE_TENSOR_ITER_H

#include <stdint.h>

enum { MOE_MAX_DIM = 16, MOE_ITER_OPERANDS = 4 };

typedef struct moe_iter {
  int ndim;      /* after merging; 0 for a single element */
  int noperands; /* operand 0 is the output */
  int64_t numel;
  int64_t shape[MOE_MAX_DIM];
  int64_t stride[MOE_ITER_OPERANDS][MOE_MAX_DIM];
  void *ptr[MOE_ITER_OPERANDS];
} moe_iter;

#endif
