/* A tensor as text, for people. */
#ifndef MOE_TENSOR_PRINT_H
#define MOE_TENSOR_PRINT_H

#include "tensor/tensor.h"

/* At most 12 lines: aligned numbers, `…` where some are left out, and a last line with type, shape, device and
** where the gradient goes. Reads the printed corner only. malloc'ed; NULL on failure. */
char *moe_tensor_text(moe_tensor *t);

#endif
